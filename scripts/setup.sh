#!/usr/bin/env bash
# Installs what building, testing and `sandbar dev` need and this machine lacks. Says what it does; does and says
# nothing when nothing is missing. Needs Rust; uses apt-get (as root or with sudo) and rustup. With the argument `tests`
# also what only the tests need: Python, whose programs judge the results of the examples.
set -euo pipefail

readonly MIN_POSTGRES=14
readonly WASM_TARGETS=(wasm32-wasip1 wasm32-wasip2)
# Keeps Debian's packages from making and starting a cluster of their own, which nobody here needs.
readonly NO_CLUSTER=/etc/postgresql-common/createcluster.d/sandbar-setup.conf

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

# The same places where `sandbar dev` looks.
has_postgres() {
    if [[ -n ${SANDBAR_PG_BIN:-} ]]; then
        [[ -x $SANDBAR_PG_BIN/postgres ]] || fail "SANDBAR_PG_BIN=$SANDBAR_PG_BIN has no postgres; correct or unset it"
        return 0
    fi
    local bin version path_dirs
    IFS=: read -ra path_dirs <<<"$PATH"
    for bin in /usr/lib/postgresql/*/bin /usr/pgsql-*/bin "${path_dirs[@]}"; do
        [[ -x $bin/postgres && -x $bin/initdb ]] || continue
        version=$("$bin/postgres" --version 2>/dev/null | sed -n 's/^.*(PostgreSQL) \([0-9]*\).*$/\1/p')
        if [[ -n $version ]] && ((version >= MIN_POSTGRES)); then return 0; fi
    done
    return 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "this needs root, and there is no sudo; as root, run: $*"
    fi
}

install_packages() {
    command -v apt-get >/dev/null ||
        fail "please install by your system's means (there is no apt-get here): $* (PostgreSQL $MIN_POSTGRES or newer)"
    say "installing by apt-get: $*"
    local guard=
    if [[ " $* " == *" postgresql "* && ! -e $NO_CLUSTER ]]; then
        as_root mkdir -p "${NO_CLUSTER%/*}"
        echo 'create_main_cluster = false' | as_root tee "$NO_CLUSTER" >/dev/null
        guard=yes
    fi
    local status=0
    {
        as_root apt-get -qq -o DPkg::Lock::Timeout=300 update &&
            as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
                -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 install "$@" >&2
    } || status=$?
    if [[ -n $guard ]]; then as_root rm -f "$NO_CLUSTER"; fi
    ((status == 0)) || fail "apt-get failed (see above)"
}

command -v cargo >/dev/null && command -v rustc >/dev/null ||
    fail "Rust is missing: install it with rustup (https://rustup.rs)"

packages=()
has_postgres || packages+=(postgresql)
command -v curl >/dev/null || packages+=(curl ca-certificates)
# The linker, and the C library to link with.
command -v cc >/dev/null || packages+=(gcc libc6-dev)
if [[ ${1:-} == tests ]]; then
    command -v python3 >/dev/null || packages+=(python3)
    python3 -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
    # Debian keeps it apart; without it `python3 -m venv` makes nothing.
    python3 -m ensurepip --version >/dev/null 2>&1 || packages+=(python3-venv)
fi
((${#packages[@]} == 0)) || install_packages "${packages[@]}"
has_postgres || fail "there is still no PostgreSQL server; set SANDBAR_PG_BIN to the directory of postgres and initdb"

sysroot=$(rustc --print sysroot)
missing=()
for target in "${WASM_TARGETS[@]}"; do
    [[ -d $sysroot/lib/rustlib/$target/lib ]] || missing+=("$target")
done
if ((${#missing[@]} > 0)); then
    command -v rustup >/dev/null ||
        fail "this Rust cannot compile to ${missing[*]} and there is no rustup to add it; install Rust with rustup"
    say "adding to Rust by rustup: ${missing[*]}"
    rustup target add "${missing[@]}" >&2
fi
components=()
cargo fmt --version >/dev/null 2>&1 || components+=(rustfmt)
cargo clippy --version >/dev/null 2>&1 || components+=(clippy)
if ((${#components[@]} > 0)) && command -v rustup >/dev/null; then
    say "adding to Rust by rustup: ${components[*]}"
    rustup component add "${components[@]}" >&2
fi
