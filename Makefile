# Needs python3 (>= 3.11) and make; everything else is brought by `make setup` from PyPI.
PYTHON ?= python3
BIN := .venv/bin
# three times two cores: tests wait more than they compute
WORKERS ?= 6
# a shell that forbids it would make each process compile every module again: two seconds a start
unexport PYTHONDONTWRITEBYTECODE
LOCK := UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 $(BIN)/uv pip compile -q --universal --no-header --no-annotate --generate-hashes

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test unit test-full chaos canary check format bench migration previous lock clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/.ok: pyproject.toml requirements.lock bootstrap.py
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON) here; install python3 (>= 3.11)"; exit 1; }
	@$(PYTHON) bootstrap.py
	@touch $@

setup: .venv/.ok ## Make .venv with the locked dependencies

demo: .venv/.ok ## Real servers, real syncs, real crashes, proofs (KEEP=1 leaves it running)
	@$(BIN)/syncward demo $(if $(KEEP),--keep)

up: .venv/.ok ## Start everything on embedded servers and leave it running
	@$(BIN)/syncward up --dev --detach

down: .venv/.ok ## Stop what `make up` started
	@$(BIN)/syncward down

check: .venv/.ok ## Lint, types, import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: .venv/.ok ## Format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

# A process each would compile the tests as long as none has: two do it here, once.
COMPILED := tests/__pycache__/.compiled
$(COMPILED): | .venv/.ok
	@for part in "tests/connectors tests/integration" "tests --ignore tests/connectors --ignore tests/integration"; do \
	  $(BIN)/pytest -q --collect-only -p no:cacheprovider $$part >/dev/null 2>&1 & done; wait; mkdir -p $(@D); touch $@

test: .venv/.ok $(COMPILED) ## All tests that need nothing but PyPI; one that fails runs once more, and both are shown
	@$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not full" --hypothesis-profile repeatable --reruns 1 -r RfE

unit: .venv/.ok ## Tests without I/O
	@$(BIN)/pytest tests/unit

test-full: .venv/.ok $(COMPILED) ## Every test, also slow ones and those that need apt or root
	@$(BIN)/pytest -n $(WORKERS) --dist loadgroup

chaos: .venv/.ok ## An hour of faults on real processes, then the checker (SECONDS=3600 SEED=1)
	@$(BIN)/python -m tests.faults.chaos --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),1) $(if $(filter 0,$(shell id -u)),--real-disk)

canary: .venv/.ok ## 50 secrets through everything, then a search of all that is left behind (SECRETS=50)
	@$(BIN)/python -m tests.security.canary --secrets $(or $(SECRETS),50)

bench: .venv/.ok ## Compare with psql, sling and dlt on this machine; writes docs/benchmarks.md (ARGS=--quick)
	@$(BIN)/python -m benchmarks.pg_to_pg --write $(ARGS)

migration: .venv/.ok ## New migration: make migration m="add run priority"
	@$(BIN)/python -m storage.migrate new "$(m)"

previous: ## Keep the code of a release for the upgrade tests: make previous REV=v1.2.0
	@git archive --format=tar $(REV) audit cli connectors crypto embedded scheduler schemas storage workers | gzip -9n > tests/upgrade/previous.tar.gz

lock: .venv/.ok ## Resolve the dependencies again: all of them, and those of production alone
	@$(LOCK) --extra dev --extra files --extra mariadb pyproject.toml -o requirements.lock
	@$(LOCK) -c requirements.lock pyproject.toml -o deploy/requirements.lock

clean: ## Remove caches and .venv (data in .syncward only with CONFIRM=1)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@$(if $(CONFIRM),rm -rf .syncward,true)
