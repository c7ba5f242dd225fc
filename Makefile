# What a person types. Each target explains itself in `make help`; the work is in scripts/.

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench bench-first bench-peers soak

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: a PostgreSQL server, the wasm targets, a C compiler, curl
	@scripts/setup.sh

demo: ## Build, start everything, run a real task on a real text, show what came out, stop everything
	@scripts/demo.sh

test: ## Format, lints, unit, integration and documentation tests: what CI runs
	@scripts/test.sh

bench: ## Benchmarks, optimised build; figures of a quiet machine are in docs/performance.md
	@scripts/setup.sh
	cargo bench --locked --workspace --benches

bench-first: ## How long a developer waits for a first result, optimised build
	@scripts/setup.sh
	@benches/first_result.sh

bench-peers: ## The same work on Sandbar, graphile-worker and pgqueuer, over one Postgres: one table
	@scripts/bench-peers.sh

soak: ## Break everything again and again while a million invocations flow; 25 minutes at most, once built
	@scripts/setup.sh
	cargo test --locked --workspace --profile bench --test it --no-run
	SANDBAR_SOAK=long cargo test --locked --workspace --profile bench --test it soak:: -- --nocapture
