#!/usr/bin/env bash
# Installs the peers at pinned versions below target/, runs the same work on them and on Sandbar over one Postgres,
# and prints one table. Arguments select sections (drain single start fair weights deep snapshot); none means all.
# SANDBAR_BENCH_PROFILE=dev measures the development build, to see that it works.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly GRAPHILE_WORKER=0.17.3
readonly PGQUEUER=1.6.0
readonly PEERS=$PWD/target/peers
# The longest the measurements may take once everything is built, in seconds; what was measured until then is printed.
readonly LIMIT=570
readonly PROFILE=${SANDBAR_BENCH_PROFILE:-bench}

scripts/setup.sh
command -v node >/dev/null && command -v npm >/dev/null || { echo "bench-peers: Node.js is missing" >&2; exit 1; }
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bench-peers: Python 3.11 is missing" >&2; exit 1; }

mkdir -p "$PEERS/node"
if [[ ! -e $PEERS/node/graphile-$GRAPHILE_WORKER ]]; then
    npm install --prefix "$PEERS/node" --no-save --no-audit --no-fund --loglevel=error "graphile-worker@$GRAPHILE_WORKER" >&2
    touch "$PEERS/node/graphile-$GRAPHILE_WORKER"
fi
# A module finds its libraries beside itself.
cp benches/peers/graphile.mjs "$PEERS/node/graphile.mjs"
if [[ ! -e $PEERS/python/pgqueuer-$PGQUEUER ]]; then
    rm -rf "$PEERS/python"
    python3 -m venv "$PEERS/python"
    "$PEERS/python/bin/pip" install --quiet --disable-pip-version-check "pgqueuer[asyncpg]==$PGQUEUER" >&2
    touch "$PEERS/python/pgqueuer-$PGQUEUER"
fi
versions="node $(node --version), $("$PEERS/python/bin/python" --version), graphile-worker $GRAPHILE_WORKER, pgqueuer $PGQUEUER"

figures=$PEERS/figures.tsv
status=0
cargo bench --locked --workspace --profile "$PROFILE" --bench peers --no-run >&2
SANDBAR_PEERS=$PEERS timeout --signal=INT --kill-after=30 "$LIMIT" \
    cargo bench --locked --workspace --profile "$PROFILE" --bench peers -- "$@" | tee "$figures" >&2 || status=$?
echo
echo "$(nproc) cores, $(uname -sr), $versions, profile $PROFILE"
awk -f scripts/peers.awk "$figures"
exit "$status"
