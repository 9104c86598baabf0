# Every command of the project. `make` lists them.
# The environment is built on first use from the hash-locked requirements; only Python 3.11+, git and make are assumed.
# Paths are relative, so that a checkout may stand below a folder with a space in its name.

PYTHON ?= python3
BIN = .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: help run test test-stack test-long lint format generate bench lock clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

run: .venv/run ## start Relay on its own PostgreSQL and do the main job once
	@$(BIN)/python -m relay_grpc demo

test: .venv/dev ## run the suite; needs nothing but the environment
	@$(BIN)/python -m pytest -m "not stack"

test-stack: .venv/dev ## run what needs Linux and Debian packages
	@tests/stack/install-packages
	@$(BIN)/python -m pytest -m stack

test-long: .venv/dev ## run the tests that have larger counts with them, and print their figures; as test-stack
	@tests/stack/install-packages
	@$(BIN)/python -m pytest -m long --long --timeout 3600

lint: .venv/dev ## check style, types, floors, protos and generated code
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf format -d --exit-code proto
	@$(BIN)/buf lint
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/lint.py

format: .venv/dev ## format Python and protos
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@$(BIN)/buf format -w proto

generate: .venv/dev ## write the stubs and the tables that come from the protos
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/generate.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/document.py

bench: .venv/dev ## measure calls per second and CPU per call
	@$(BIN)/python -m tests.bench

UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --no-header --extra embedded --no-emit-package relay-client pyproject.toml requirements/run.in

lock: .venv/dev ## resolve the dependencies anew
	@$(UV_COMPILE) --output-file requirements/run.lock
	@$(UV_COMPILE) --group dev --constraint requirements/run.lock --output-file requirements/dev.lock

clean: ## remove the environment and everything built
	rm -rf .venv build dist

.venv/run: requirements/run.lock pyproject.toml clients/python/pyproject.toml
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) tools/environment.py .venv
	@echo "Installing the environment in .venv (once)..."
	@$(BIN)/python -m pip install --quiet --use-pep517 --require-hashes --requirement requirements/run.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable clients/python --editable .
	@touch .venv/run

.venv/dev: .venv/run requirements/dev.lock
	@echo "Installing the development tools in .venv (once)..."
	@$(BIN)/python -m pip install --quiet --use-pep517 --require-hashes --requirement requirements/dev.lock
	@touch .venv/dev
