#!/usr/bin/env bash
# Holds a running `sandbar dev` against its own OpenAPI document with schemathesis: no 5xx, no status, media type or shape
# that the document does not have. The installation is pinned and stays below target/. Requests end after BUDGET seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/dev.sh

readonly SANDBAR=$PWD/target/debug/sandbar
readonly VERSION=4.32.5
readonly DIR=$PWD/target/schemathesis
# Longest installation, time for requests, and longest run, in seconds; longest start, in tenths of one.
readonly INSTALL_LIMIT=300 BUDGET=40 LIMIT=180 START_LIMIT=600
readonly KEY=sbk_key-of-the-check-by-schemathesis

fail() {
    printf 'schemathesis: %s\n' "$*" >&2
    [[ ! -s ${log:-} ]] || tail -n 20 "$log" >&2
    exit 1
}

if ! "$DIR/bin/schemathesis" --version 2>/dev/null | grep -qF "$VERSION"; then
    rm -rf "$DIR"
    mkdir -p "$(dirname "$DIR")"
    if ! { python3 -m venv "$DIR" && timeout "$INSTALL_LIMIT" "$DIR/bin/pip" install --quiet --disable-pip-version-check \
        "schemathesis==$VERSION"; }; then
        fail "PyPI's schemathesis $VERSION cannot be installed (needs python3 with venv)"
    fi
fi
cargo build --locked --workspace --bins

work_with_dev schemathesis

env -u SANDBAR_CONFIG -u SANDBAR_DATABASE__URL SANDBAR_SERVER__ADMIN_KEY="$KEY" \
    "$SANDBAR" dev --data-dir "$work/data" --listen 127.0.0.1:0 >"$log" 2>&1 &
pid=$!
wait_for_dev

# Something for the paths to lead to.
curl -sf -o /dev/null -X PUT "$base/v1/secrets/TOKEN" -H "x-api-key: $KEY" -H 'content-type: application/json' -d '{"value":"x"}'

status=0
# One worker: Python 3.11 counts the depth of `ast` for all threads together, and two of them make it fail now and then.
(cd "$work" && timeout "$LIMIT" "$DIR/bin/schemathesis" run "$base/openapi.json" --url "$base" \
    --header "x-api-key: $KEY" --workers 1 --seed 1 --phases examples,coverage --max-time "$BUDGET" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --request-timeout 20 --no-color) >"$work/said.log" 2>&1 || status=$?
if ((status != 0)); then
    # What failed; not the many warnings about data that it did not find.
    sed '/^=* WARNINGS =*$/,/^=* SUMMARY =*$/d' "$work/said.log" | tail -n 200 >&2
    fail "the server does not keep to its document"
else
    tail -n 12 "$work/said.log"
fi
if grep -E 'internal error|panicked' "$log" >&2; then
    fail "the server failed"
fi
printf 'schemathesis: the server keeps to its document\n'
