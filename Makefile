# Everything a contributor does. The first target lists the others.

.PHONY: help setup spark-setup lint types test spark-test check prove demo spark-demo bench spark-bench audit lock clean
.DEFAULT_GOAL := help
BIN := .venv/bin

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 8

setup: ## .venv and the servers that tests and the demo start; does only what is missing
	@scripts/setup

spark-setup: setup ## .venv-spark and a Java, for stream and backfill on a Spark cluster
	@scripts/spark-setup

lint: setup ## style, import rules, shell scripts, Dockerfiles
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run scripts/setup scripts/spark-setup scripts/lock docker/pg/*.sh
	$(BIN)/hadolint docker/*/Dockerfile

types: setup ## mypy --strict
	$(BIN)/mypy

test: setup ## the whole suite; arguments: make test ARGS="-k lane -n 0"
	$(BIN)/python -m pytest -n 4 --dist worksteal --durations=10 -m "not spark" $(ARGS)

spark-test: spark-setup ## what needs Spark; minutes
	$(BIN)/python -m pytest -m spark --durations=10 tests/spark $(ARGS)

check: lint types test ## lint, types and test

prove: setup ## the promise: crash matrix, chaos, environment matrix; more than an hour; writes docs/reliability.md
	@$(BIN)/python -m tests.prove $(ARGS)

demo: setup ## watch it work, without Docker, until Ctrl-C; make demo SECONDS=20 ends by itself
	@$(BIN)/python -m devstack.demo $(if $(SECONDS),--seconds $(SECONDS))

spark-demo: spark-setup ## stream and backfill on a Spark cluster of three processes; make spark-demo SECONDS=30
	@$(BIN)/python -m devstack.spark_demo $(if $(SECONDS),--seconds $(SECONDS))

bench: setup ## throughput and latency beside pg_recvlogical; takes minutes
	@$(BIN)/python -m benchmarks $(ARGS)

spark-bench: spark-setup ## stream and backfill on Spark beside the single process; takes minutes
	@$(BIN)/python -m benchmarks.spark $(ARGS)

audit: setup ## known vulnerabilities in what ships; needs the vulnerability service
	@$(BIN)/python scripts/audit.py

lock: setup ## pin what pyproject.toml asks for; make lock ARGS=--upgrade moves every pin
	scripts/lock $(ARGS)

clean: ## caches and build leftovers; .venv stays
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
