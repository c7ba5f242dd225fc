#!/usr/bin/env bash
# Builds the same task in several languages (examples/languages) into target/languages/LANGUAGE.wasm. A language whose
# tools cannot be had is skipped: target/languages/LANGUAGE.skipped says why, and so does stderr. What is wrong with our
# own source is a failure. Without arguments all languages, else those named.
set -euo pipefail
cd "$(dirname "$0")/.."

# The tools, at the versions that docs/guests.md names.
readonly ZIGLANG=0.17.0
readonly COMPONENTIZE_PY=0.25.1
readonly COMPONENTIZE_JS=0.23.0
# Longest installation of one tool and longest build of one guest, in seconds.
readonly INSTALL_LIMIT=600
readonly BUILD_LIMIT=600

readonly OUT=$PWD/target/languages
readonly TOOLS=$OUT/tools
readonly SOURCES=$PWD/examples/languages
readonly WIT=$PWD/guest-sdk/wit

say() { printf 'languages: %s\n' "$*" >&2; }

# LANGUAGE WHY: not an error, but never silent.
skip() {
    say "SKIPPED $1: $2"
    printf '%s\n' "$2" >"$OUT/$1.skipped"
}

# LANGUAGE SOURCE…: whether its component is newer than what it is made of.
fresh() {
    local out=$OUT/$1.wasm
    shift
    [[ -f $out ]] || return 1
    [[ -z $(find "$@" scripts/languages.sh -type f -newer "$out" -print -quit) ]]
}

# LANGUAGE COMMAND…: a build of ours; its failure is ours too.
build() {
    local language=$1 log=$OUT/$1.log
    shift
    if ! timeout "$BUILD_LIMIT" "$@" >"$log" 2>&1; then
        say "$language does not build:"
        cat "$log" >&2
        return 1
    fi
    rm -f "$OUT/$language.skipped"
    say "$language: $(($(wc -c <"$OUT/$language.wasm") / 1024)) KiB"
}

# PACKAGE VERSION: installs a PyPI package into a directory of its own, once. Prints the directory.
from_pypi() {
    local dir=$TOOLS/$1-$2
    if [[ ! -e $dir/complete ]]; then
        rm -rf "$dir"
        python3 -m venv "$dir" &&
            timeout "$INSTALL_LIMIT" "$dir/bin/pip" install --quiet --disable-pip-version-check "$1==$2" &&
            touch "$dir/complete"
    fi >"$OUT/$1.log" 2>&1 || return 1
    printf '%s\n' "$dir"
}

# PACKAGE VERSION NAME: the same from npm.
from_npm() {
    local dir=$TOOLS/$3-$2
    if [[ ! -e $dir/complete ]]; then
        rm -rf "$dir"
        mkdir -p "$dir" && echo '{"private":true}' >"$dir/package.json" &&
            timeout "$INSTALL_LIMIT" npm install --prefix "$dir" --no-audit --no-fund --no-save "$1@$2" &&
            touch "$dir/complete"
    fi >"$OUT/$3.log" 2>&1 || return 1
    printf '%s\n' "$dir"
}

reason() { tail -n 1 "$1" | cut -c 1-200; }

rust() {
    # Cargo knows best what is fresh. Its directory is shared with the other guests: most of what it builds is the same.
    build rust bash -c "CARGO_TARGET_DIR='$PWD/target/guests' cargo build --locked --release --target wasm32-wasip2 \
        --manifest-path '$SOURCES/rust/Cargo.toml' && cp '$PWD/target/guests/wasm32-wasip2/release/text_stats.wasm' '$OUT/rust.wasm'"
}

zig() {
    local dir
    fresh zig "$SOURCES/zig" && return
    command -v python3 >/dev/null || { skip zig "there is no python3 to install ziglang with"; return; }
    dir=$(from_pypi ziglang $ZIGLANG) ||
        { skip zig "PyPI's ziglang $ZIGLANG cannot be installed: $(reason "$OUT/ziglang.log")"; return; }
    build zig "$dir/bin/python" -m ziglang build-exe -target wasm32-wasi -O ReleaseSmall \
        -femit-bin="$OUT/zig.wasm" --cache-dir "$TOOLS/zig-cache" --global-cache-dir "$TOOLS/zig-cache" \
        "$SOURCES/zig/text_stats.zig"
}

python() {
    local dir
    fresh python "$SOURCES/python" "$WIT" && return
    command -v python3 >/dev/null || { skip python "there is no python3"; return; }
    dir=$(from_pypi componentize-py $COMPONENTIZE_PY) ||
        { skip python "PyPI's componentize-py $COMPONENTIZE_PY cannot be installed: $(reason "$OUT/componentize-py.log")"; return; }
    build python "$dir/bin/componentize-py" --wit-path "$WIT" --world task componentize \
        --python-path "$SOURCES/python" app --output "$OUT/python.wasm"
}

javascript() {
    local dir
    fresh javascript "$SOURCES/javascript" "$WIT" && return
    command -v npm >/dev/null || { skip javascript "there is no npm"; return; }
    dir=$(from_npm @bytecodealliance/componentize-js $COMPONENTIZE_JS componentize-js) ||
        { skip javascript "npm's componentize-js $COMPONENTIZE_JS cannot be installed: $(reason "$OUT/componentize-js.log")"; return; }
    build javascript "$dir/node_modules/.bin/componentize-js" "$SOURCES/javascript/text_stats.js" \
        --wit "$WIT" --world-name task --disable http fetch-event --out "$OUT/javascript.wasm"
}

mkdir -p "$TOOLS"
# Tests that run side by side build once.
exec 9>"$OUT/lock"
flock 9
(($# > 0)) || set -- rust zig python javascript
for language in "$@"; do
    case $language in
    rust | zig | python | javascript) "$language" ;;
    *)
        say "unknown language: $language"
        exit 2
        ;;
    esac
done
