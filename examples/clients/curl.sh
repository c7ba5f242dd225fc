#!/usr/bin/env bash
# The whole way with curl alone: push a module, invoke it, wait, show log and receipt, print the result.
#
#   curl.sh TASK MODULE.wasm [REQUEST.json] > RESULT
#
# REQUEST.json is the body of the invocation, {"input": …} for a task, {"args": […], "stdin": …} for a command; {} if
# absent. Needs SANDBAR_KEY; SANDBAR_URL is http://127.0.0.1:7260 if absent.
# The result goes to stdout, all else to stderr. Ends with 0 only if the invocation succeeded; 1: it did not, or was
# refused; 2: called in a wrong way.
set -euo pipefail

if (($# < 2 || $# > 3)); then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
task=$1 module=$2 request=${3:-}
url=${SANDBAR_URL:-http://127.0.0.1:7260}
if [[ -z ${SANDBAR_KEY:-} ]]; then
    echo 'curl.sh: set SANDBAR_KEY (sandbar dev writes one to .sandbar/admin.key)' >&2
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# By file, so that the key shows in no process list.
(umask 077 && printf 'x-api-key: %s\n' "$SANDBAR_KEY" >"$work/key")

fail() {
    printf 'curl.sh: %s\n' "$1" >&2
    [[ ! -s ${2:-} ]] || { cat "$2" && echo; } >&2
    exit 1
}

# OUTPUT [curl options…] PATH: prints the status. Tries again what is worth it (a broken connection, 408, 429, 5xx), as
# long after as the server's Retry-After says.
call() {
    local output=$1
    shift
    curl -sS --max-time 120 --retry 5 --retry-all-errors -H @"$work/key" -o "$output" -w '%{http_code}' \
        "${@:1:$#-1}" "$url${*: -1}" || fail "no answer from $url"
}

# FILE NAME: the first value of that name, a string without its quotes.
value() {
    { grep -oE "\"$2\":(\"[^\"]*\"|[^,}]*)" "$1" || true; } | head -n 1 | cut -d : -f 2- | tr -d '"'
}

# The same bytes again are the same version again: pushing twice does no harm.
status=$(call "$work/version" -H 'content-type: application/wasm' -H 'prefer: wait=60' \
    --data-binary @"$module" "/v1/tasks/$task/versions")
[[ $status == 20[01] ]] || fail "the upload was answered with $status" "$work/version"
number=$(value "$work/version" version)
while state=$(value "$work/version" state) && [[ $state == compiling ]]; do
    sleep 1
    status=$(call "$work/version" "/v1/tasks/$task/versions/$number")
    [[ $status == 200 ]] || fail "version $number was answered with $status" "$work/version"
done
echo "$task version $number is $state" >&2
[[ $state == ready ]] || fail "it cannot run" "$work/version"

# With a key of one's own, an invocation whose answer was lost is not made twice.
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
if [[ -n $request ]]; then body=@$request; else body='{}'; fi
status=$(call "$work/invocation" -H 'content-type: application/json' -H 'prefer: wait=30' \
    -H "idempotency-key: $key" --data-binary "$body" "/v1/tasks/$task/invocations")
[[ $status == 20[02] ]] || fail "the invocation was answered with $status" "$work/invocation"
path=/v1/invocations/$(value "$work/invocation" id)

# 202: it goes on. SANDBAR_WAIT is how many seconds more it may.
for ((waited = 0; ; waited++)); do
    state=$(value "$work/invocation" state)
    case $state in succeeded | dead | cancelled | expired) break ;; esac
    ((waited < ${SANDBAR_WAIT:-600})) || fail "$path is still $state"
    sleep 1
    status=$(call "$work/invocation" "$path")
    [[ $status == 200 ]] || fail "$path was answered with $status" "$work/invocation"
done

status=$(call "$work/logs" "$path/logs")
[[ $status == 200 ]] || fail "the log was answered with $status" "$work/logs"
{
    echo "log      $(cat "$work/logs")"
    { grep -oE '"receipt":\{[^}]*\}' "$work/invocation" || true; } | sed 's/^"receipt":/receipt  /'
    echo "state    $state ($path)"
} >&2
[[ $state == succeeded ]] || fail "it ended as $state: $({ grep -oE '"termination":\{[^}]*\}' "$work/invocation" || true; } | tail -n 1)"

status=$(call "$work/result" "$path/result")
[[ $status == 200 ]] || fail "the result was answered with $status" "$work/result"
cat "$work/result"
