# Sourced by scripts that run `sandbar dev` for a while. They start it in the background with its output in $log, set `pid`,
# and have a function `fail` and START_LIMIT, in tenths of a second.

# NAME: a directory $work that is gone at the end, as is what runs as $pid by then.
work_with_dev() {
    work=$(mktemp -d "/tmp/sandbar-$1.XXXXXX")
    chmod 711 "$work" # the user that Postgres runs as must get through
    log=$work/sandbar.log pid=
    trap end_of_dev EXIT INT TERM
}

end_of_dev() {
    local status=$?
    trap - EXIT INT TERM
    if [[ -n $pid ]]; then
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" || true
    fi
    rm -rf "$work"
    exit "$status"
}

# Until it is ready; sets `base`, its address.
wait_for_dev() {
    local n
    base=
    for ((n = 0; ; n++)); do
        kill -0 "$pid" 2>/dev/null || fail "sandbar dev ended"
        ((n < START_LIMIT)) || fail "sandbar dev was not ready in $((START_LIMIT / 10)) s"
        [[ -n $base ]] || base=$(sed -n 's/^.*listening on \(http:\/\/[0-9.:]*\).*$/\1/p' "$log" | head -n 1)
        if [[ -n $base ]] && curl -sf --max-time 2 -o /dev/null "$base/readyz"; then break; fi
        sleep 0.1
    done
}
