#!/usr/bin/env bash
# What a developer waits for, measured with the real binary against a running `sandbar dev`:
#   1. `sandbar new` to the first result, cargo's registry cached (target: 30 s)
#   2. the word-count component from upload to first result, never compiled before (target: 0.5 s)
#   3. `sandbar run` of it, compiled before (target: 0.3 s)
# Prints one line per figure: name, seconds of each run, median. Usage: benches/first_result.sh [RUNS] (default 5).
# SANDBAR=PATH measures another binary than target/release/sandbar.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly RUNS=${1:-5}
readonly START_LIMIT=600 # tenths of a second

if [[ -z ${SANDBAR:-} ]]; then
    cargo build --locked --release --workspace --bins
    SANDBAR=$PWD/target/release/sandbar
fi
readonly SANDBAR
CARGO_TARGET_DIR=$PWD/target/guests cargo build --locked --release --target wasm32-wasip2 \
    --package word-count --manifest-path examples/Cargo.toml
readonly MODULE=$PWD/target/guests/wasm32-wasip2/release/word_count.wasm

work=$(mktemp -d /tmp/sandbar-bench.XXXXXX)
chmod 711 "$work" # the user that Postgres runs as must get through
pid=
finish() {
    local status=$?
    trap - EXIT INT TERM
    [[ -z $pid ]] || { kill -TERM "$pid" 2>/dev/null && wait "$pid" || true; }
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Nothing of the caller's own settings.
for name in "${!SANDBAR_@}"; do [[ $name == SANDBAR_PG_BIN ]] || unset "$name"; done
export XDG_CONFIG_HOME=$work/config XDG_CACHE_HOME=$work/cache

# A server that has not seen the module: a new data directory for each run of figure 2.
start() {
    data=$1
    mkdir -p "$data"
    (cd "$data" && exec "$SANDBAR" dev --listen 127.0.0.1:0) >"$work/log" 2>&1 &
    pid=$!
    for ((n = 0; n < START_LIMIT; n++)); do
        if [[ -s $data/.sandbar/address ]] && curl -sf --max-time 2 -o /dev/null "$(<"$data/.sandbar/address")/readyz"; then
            return 0
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    tail -n 20 "$work/log" >&2
    echo "sandbar dev did not start" >&2
    exit 1
}
stop() {
    kill -TERM "$pid"
    wait "$pid"
    pid=
}

now() { date +%s.%N; }
report() { # NAME SECONDS…
    local name=$1
    shift
    printf '%s\n' "$@" | sort -n | awk -v name="$name" '
        { all = all sprintf(" %.2f", $1); value[NR] = $1 }
        END {
            median = NR % 2 ? value[(NR + 1) / 2] : (value[NR / 2] + value[NR / 2 + 1]) / 2
            printf "%-34s median %.2f s  (%s )\n", name, median, all
        }'
}

times=()
start "$work/one"
for ((run = 0; run < RUNS; run++)); do
    cd "$work/one"
    began=$(now)
    "$SANDBAR" new "hello-$run" >/dev/null 2>&1
    cd "hello-$run"
    "$SANDBAR" push >/dev/null 2>&1
    "$SANDBAR" invoke "hello-$run" --input '{"name": "Ada"}' --wait >/dev/null 2>&1
    # The first run may fill cargo's registry; it counts only when it did not have to.
    times+=("$(awk -v a="$began" -v b="$(now)" 'BEGIN { print b - a }')")
done
report "new to first result" "${times[@]}"
cd "$work"
stop

times=()
for ((run = 0; run < RUNS; run++)); do
    start "$work/upload-$run"
    cd "$work/upload-$run"
    began=$(now)
    "$SANDBAR" push "$MODULE" >/dev/null 2>&1
    "$SANDBAR" invoke word-count --input '{"text": "a b a"}' --wait >/dev/null 2>&1
    times+=("$(awk -v a="$began" -v b="$(now)" 'BEGIN { print b - a }')")
    cd "$work"
    stop
done
report "upload to first result" "${times[@]}"

times=()
"$SANDBAR" run "$MODULE" --input '{"text": "a"}' >/dev/null 2>&1
for ((run = 0; run < RUNS; run++)); do
    began=$(now)
    "$SANDBAR" run "$MODULE" --input '{"text": "a b a"}' >/dev/null 2>&1
    times+=("$(awk -v a="$began" -v b="$(now)" 'BEGIN { print b - a }')")
done
report "run, compiled before" "${times[@]}"
