#!/usr/bin/env bash
# Builds jaq for WebAssembly from its package on crates.io, unmodified, with the lock file that its authors published.
# Prints the path of the module; does nothing when it is there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

# The last version whose dependencies all know WASI: later ones come with an interactive mode that does not.
readonly VERSION=1.6.0
readonly OUT=${1:-$root/target/guests/jaq-$VERSION}
readonly MODULE=$OUT/bin/jaq.wasm

if [[ ! -s $MODULE ]]; then
    # The default features are an allocator written in C. Small code is compiled sooner by the host.
    env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET CARGO_TARGET_DIR="$OUT/build" \
        CARGO_PROFILE_RELEASE_OPT_LEVEL=s CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_STRIP=debuginfo \
        cargo install jaq --version "=$VERSION" --no-default-features --locked --no-track \
        --target wasm32-wasip1 --root "$OUT" >&2
    rm -rf "$OUT/build"
fi
printf '%s\n' "$MODULE"
