#!/usr/bin/env bash
# The whole way of a task on this machine: build, start, upload, invoke, look, stop. Leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/dev.sh

# A text that every Debian has; elsewhere, one that this repository has.
TEXT=/usr/share/common-licenses/GPL-3
[[ -r $TEXT ]] || TEXT=LICENSE
readonly TEXT
readonly TASK=word-count
readonly SANDBAR=$PWD/target/debug/sandbar
readonly MODULE=$PWD/target/guests/wasm32-wasip2/release/word_count.wasm
# Longest start of `sandbar dev` in an empty directory, in tenths of a second.
readonly START_LIMIT=600
# Longest orderly stop, in tenths of a second.
readonly STOP_LIMIT=300

if [[ -t 1 ]]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' off=$'\e[0m'
else
    bold='' dim='' green='' red='' off=''
fi
title() { printf '\n%s%s%s\n' "$bold" "$*" "$off"; }
row() { printf '  %s%-14s%s %s\n' "$dim" "$1" "$off" "$2"; }

work=$(mktemp -d /tmp/sandbar-demo.XXXXXX)
chmod 711 "$work" # the user that Postgres runs as must get through
data=$work/data log=$work/sandbar.log pid=

fail() {
    printf '\n%sdemo: %s%s\n' "$red" "$*" "$off" >&2
    if [[ -s $log ]]; then
        echo 'The end of its log:' >&2
        tail -n 30 "$log" >&2
    fi
    exit 1
}

# Stops sandbar; the status is its own.
stop() {
    local n=0 status=0
    [[ -n $pid ]] || return 0
    kill -TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do
        if ((n++ >= STOP_LIMIT)); then
            kill -KILL "$pid" 2>/dev/null || true
            break
        fi
        sleep 0.1
    done
    wait "$pid" || status=$?
    pid=
    return "$status"
}

finish() {
    local status=$?
    trap - EXIT INT TERM
    stop || true
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# METHOD PATH OUTPUT [curl options…]: prints the status.
call() {
    local method=$1 path=$2 output=$3
    shift 3
    curl -sS --max-time 120 -X "$method" -H @"$work/key" -o "$output" -w '%{http_code}' "$@" "$base$path" ||
        fail "no answer to $method $path"
}

# FILE PATH: one value of a flattened answer.
field() {
    awk -F '\t' -v path="$2" '$1 == path { print $2; exit }' "$1"
}

flat() { awk -f scripts/json.awk "$1" >"$1.flat"; }

milliseconds() { awk -v ns="$1" 'BEGIN { printf "%.1f ms", ns / 1e6 }'; }
mebibytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }
grouped() { awk -v n="$1" 'BEGIN { while (match(n, /[0-9][0-9][0-9][0-9]/)) { sub(/[0-9][0-9][0-9]($|,)/, ",&", n) } print n }'; }

title "Sandbar"
scripts/setup.sh

began=$SECONDS
title "Building the server and an example task (the first time takes some minutes)"
# The whole workspace, so that `make test` finds its dependencies built with the same features.
cargo build --locked --workspace --bins
CARGO_TARGET_DIR=$PWD/target/guests cargo build --locked --release --target wasm32-wasip2 \
    --package word-count --manifest-path examples/Cargo.toml
row "built in" "$((SECONDS - began)) s"
row "task" "examples/word-count ($(($(wc -c <"$MODULE") / 1024)) KiB of WebAssembly)"

title "Starting everything: Postgres, API, scheduler, worker"
began=$(date +%s%N)
# Nothing of the caller's own installation.
env -u SANDBAR_CONFIG -u SANDBAR_DATABASE__URL -u SANDBAR_SERVER__ADMIN_KEY \
    "$SANDBAR" dev --data-dir "$data" --listen 127.0.0.1:0 >"$log" 2>&1 &
pid=$!
wait_for_dev
row "ready in" "$(milliseconds "$(($(date +%s%N) - began))"), with a new Postgres cluster"
row "address" "$base"
# By file, so that the key shows in no process list.
(umask 077 && printf 'x-api-key: %s\n' "$(cat "$data/admin.key")" >"$work/key")

title "Uploading"
status=$(call POST "/v1/tasks/$TASK/versions" "$work/version" \
    -H 'content-type: application/wasm' -H 'prefer: wait=60' --data-binary @"$MODULE")
flat "$work/version"
[[ $status == 201 || $status == 200 ]] || fail "the upload was answered with $status: $(cat "$work/version")"
state=$(field "$work/version.flat" state)
[[ $state == ready ]] || fail "the version is $state: $(cat "$work/version")"
row "task" "$TASK, version $(field "$work/version.flat" version), $state"
row "sha256" "$(field "$work/version.flat" sha256)"
row "about" "$(field "$work/version.flat" manifest.description | sed 's/  .*//')" # the first paragraph

title "Invoking on $TEXT"
{
    printf '{"tags":{"from":"demo"},"input":{"top":12,"text":"'
    # JSON escapes: backslash, quote, tab, line break; other control characters become spaces.
    awk '{ gsub(/\\/, "&&"); gsub(/"/, "\\\""); gsub(/\t/, "\\t"); gsub(/[[:cntrl:]]/, " "); printf "%s\\n", $0 }' "$TEXT"
    printf '"}}'
} >"$work/request"
began=$(date +%s%N)
status=$(call POST "/v1/tasks/$TASK/invocations" "$work/invocation" \
    -H 'content-type: application/json' -H 'prefer: wait=30' --data-binary @"$work/request")
took=$(($(date +%s%N) - began))
[[ $status == 200 ]] || fail "the invocation was answered with $status: $(cat "$work/invocation")"
flat "$work/invocation"
id=$(field "$work/invocation.flat" id)
state=$(field "$work/invocation.flat" state)
row "invocation" "$id"
[[ $state == succeeded ]] || fail "it ended as $state: $(cat "$work/invocation")"
row "state" "$green$state$off, answered in $(milliseconds "$took")"

status=$(call GET "/v1/invocations/$id/result" "$work/result")
[[ $status == 200 ]] || fail "the result was answered with $status"
flat "$work/result"
title "Result"
total=$(field "$work/result.flat" total)
row "words" "$(grouped "$total")"
row "different" "$(grouped "$(field "$work/result.flat" distinct)")"
echo
awk -F '\t' '
    $1 ~ /^top\.[0-9]+\.word$/ { word = $2 }
    $1 ~ /^top\.[0-9]+\.count$/ {
        if (!most) most = $2
        bar = ""
        for (i = 0; i < 40 * $2 / most; i++) bar = bar "#"
        printf "  %14s %6d  %s\n", word, $2, bar
    }' "$work/result.flat"

status=$(call GET "/v1/invocations/$id/logs" "$work/logs")
[[ $status == 200 ]] || fail "the logs were answered with $status"
flat "$work/logs"
title "Log"
awk -F '\t' '
    { key = $1; sub(/^.*\./, "", key) }
    key == "at_us" { at = $2 }
    key == "level" { level = $2 }
    key == "message" { printf "%s  %8.1f ms  %-5s  %s", sep, at / 1000, level, $2; sep = "\n" }
    $1 ~ /\.fields\.[^.]*$/ { printf "  %s=%s", key, $2 }
    END { print sep ? "" : "  (nothing)" }' "$work/logs.flat"

title "Receipt"
receipt() { field "$work/invocation.flat" "attempts.0.receipt.$1"; }
row "ended" "$(field "$work/invocation.flat" attempts.0.termination.reason) (attempt $(field "$work/invocation.flat" attempts.0.attempt))"
row "fuel" "$(grouped "$(receipt fuel)")"
row "CPU" "$(milliseconds "$(receipt cpu_ns)")"
row "wall" "$(milliseconds "$(receipt wall_ns)")"
row "peak memory" "$(mebibytes "$(receipt peak_memory_bytes)")"
row "input" "$(grouped "$(receipt input_bytes)") bytes"
row "output" "$(grouped "$(receipt output_bytes)") bytes"
row "log" "$(grouped "$(receipt log_bytes)") bytes"

# The task's answer, checked against another program's.
expected=$(LC_ALL=C grep -oE "[[:alnum:]]+('[[:alnum:]]+)*" "$TEXT" | wc -l)
[[ $total == "$expected" ]] || fail "the task counted $total words, grep counts $expected"

title "Stopping"
stop || fail "sandbar dev ended with status $?"
row "stopped" "everything, in order"
printf '\n%sNext:%s %s dev, then follow the tour in README.md\n' "$bold" "$off" "target/debug/sandbar"
