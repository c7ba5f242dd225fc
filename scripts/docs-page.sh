#!/usr/bin/env bash
# Drives /docs in a headless Chromium against a running `sandbar dev`: every operation must be drawn, and the console
# must stay silent. Installs Chromium where it is missing. With SANDBAR_SCREENSHOT=FILE it takes a picture as well.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/dev.sh

readonly SANDBAR=$PWD/target/debug/sandbar
# Longest start, in tenths of a second.
readonly START_LIMIT=600

fail() {
    printf 'docs-page: %s\n' "$*" >&2
    [[ ! -s ${log:-} ]] || tail -n 20 "$log" >&2
    exit 1
}

browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [[ -z $browser ]]; then
    command -v apt-get >/dev/null || fail "please install chromium"
    printf 'docs-page: installing by apt-get: chromium\n' >&2
    sudo=
    if ((EUID != 0)); then sudo=sudo; fi
    $sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 \
        -o Acquire::Retries=3 install chromium >&2
    browser=$(command -v chromium) || fail "there is still no chromium"
fi
cargo build --locked --workspace --bins

work_with_dev docs

env -u SANDBAR_CONFIG -u SANDBAR_DATABASE__URL -u SANDBAR_SERVER__ADMIN_KEY \
    "$SANDBAR" dev --data-dir "$work/data" --listen 127.0.0.1:0 >"$log" 2>&1 &
pid=$!
wait_for_dev

# Guests of the page are nobody's: it shows our own document only, so no sandbox is needed where there is none (root).
drive() {
    timeout 120 "$browser" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions \
        --no-first-run --user-data-dir="$work/profile" --enable-logging=stderr --virtual-time-budget=15000 "$@" \
        2>>"$work/browser.log"
}
drive --dump-dom "$base/docs" >"$work/page.html" || fail "the browser failed: $(tail -n 5 "$work/browser.log")"
wanted=$(curl -sf "$base/openapi.json" | tr '{' '\n' | grep -cE '"(get|post|put|patch|delete)":$')
drawn=$(sed -n 's/^.*<html[^>]* data-drawn="\([0-9]*\)".*$/\1/p' "$work/page.html" | head -n 1)
if said=$(grep -F ':CONSOLE' "$work/browser.log"); then fail "the console said: $said"; fi
[[ -n $drawn && $drawn == "$wanted" ]] || fail "the page drew '$drawn' of $wanted operations"
if [[ -n ${SANDBAR_SCREENSHOT:-} ]]; then
    drive --window-size=1280,2400 --screenshot="$SANDBAR_SCREENSHOT" "$base/docs${SANDBAR_SCREENSHOT_AT:-}" >/dev/null
fi
printf 'docs-page: %s operations drawn, nothing on the console\n' "$drawn"
