#!/usr/bin/env bash
# All checks, cheapest first; stops at the first that fails. CI runs exactly this.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly GUESTS_TARGET=$PWD/target/guests
summary=()

step() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || {
        local status=$?
        printf '\n== %s FAILED after %d s\n' "$name" "$((SECONDS - began))" >&2
        exit "$status"
    }
    summary+=("$(printf '%6d s  %s' "$((SECONDS - began))" "$name")")
    printf '== %s: ok, %d s\n' "$name" "$((SECONDS - began))"
}

# A workspace of guests: NAME DIRECTORY.
guests() {
    local name=$1 manifest=$2/Cargo.toml
    step "$name: format" cargo fmt --all --check --manifest-path "$manifest"
    step "$name: lints" env CARGO_TARGET_DIR="$GUESTS_TARGET" \
        cargo clippy --locked --release --workspace --target wasm32-wasip2 --manifest-path "$manifest" -- -D warnings
    step "$name: build" env CARGO_TARGET_DIR="$GUESTS_TARGET" \
        cargo build --locked --release --workspace --target wasm32-wasip2 --manifest-path "$manifest"
}

step "setup" scripts/setup.sh tests
step "format" cargo fmt --all --check
step "lints" cargo clippy --locked --workspace --all-targets -- -D warnings
guests "examples" examples
guests "test guests" tests/guests
step "test guests: preview 1" env CARGO_TARGET_DIR="$GUESTS_TARGET" \
    cargo build --locked --release --package guest-command --target wasm32-wasip1 --manifest-path tests/guests/Cargo.toml
step "examples: jaq from crates.io" examples/jaq/build.sh
step "examples: native tests" env CARGO_TARGET_DIR="$GUESTS_TARGET" \
    cargo test --locked --quiet --workspace --manifest-path examples/Cargo.toml
# What the macros' complaints look like; a workspace of its own, since trybuild would change how ours is built.
step "complaints of the macros" env CARGO_TARGET_DIR="$PWD/target/ui" \
    cargo test --locked --quiet --manifest-path guest-sdk/ui/Cargo.toml
step "guests in other languages" scripts/languages.sh
guests "languages: rust" examples/languages/rust
step "languages: rust: native tests" env CARGO_TARGET_DIR="$GUESTS_TARGET" \
    cargo test --locked --quiet --manifest-path examples/languages/rust/Cargo.toml
step "programs from registries" scripts/programs.sh
# All of them, so that one failure does not hide the others.
step "tests" cargo test --locked --workspace --no-fail-fast
step "API page in a browser" scripts/docs-page.sh
step "API against its document" scripts/schemathesis.sh
for why in target/languages/*.skipped; do
    [[ ! -e $why ]] || summary+=("SKIPPED  guest in $(basename "$why" .skipped): $(cat "$why")")
done
for why in target/programs/*.skipped; do
    [[ ! -e $why ]] || summary+=("SKIPPED  program $(basename "$why" .skipped): $(cat "$why")")
done

printf '\nAll passed in %d s:\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
