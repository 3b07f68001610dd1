# The project's commands; `make` alone lists them. Everything runs in $(VENV), made when needed.
VENV ?= .venv
MHC ?= 1
MATRIX ?= 0.18.2 0.19.2
# three files of tests at a time on two cores, for some wait; what a file trains once, its tests share
WORKERS ?= -n 3 --dist loadfile --no-loadscope-reorder
# a change of the stand-in for CUDA runs its own tests too
STAND_IN := patches/cpu/
QUICK ?= $(if $(shell git diff --name-only HEAD -- $(STAND_IN) 2>/dev/null),,-m "not thorough")
PYTHON ?= $(shell for p in python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)

lowest = $(shell sed -nE 's/^ *"$(1)>=([0-9.]+)[",;].*/\1/p' pyproject.toml)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := megatron_mhc kernels patches examples benchmarks tests docs

.PHONY: help env train test test-all test-cards test-lowest test-main test-matrix lint style types docs wheel dist clean

help:  ## List the commands
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

env: $(STAMP)  ## Make the environment in .venv (Python 3.12; PYTHON=... names another interpreter)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.12 found; name one with PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "== installing PyTorch, Megatron-Core and the tools into $(VENV): 6 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --progress-bar off -e '.[test]' $(MEGATRON_CORE:%='megatron-core==%') \
		$(TORCH:%='torch==%' 'numpy<2.4')
	@touch $@

train: env  ## Train a byte-level GPT with mHC, resume, sample, plot (MHC=0: the ordinary model)
	MHC=$(MHC) PYTHON=$(abspath $(BIN)/python) examples/train.sh

test: env  ## Run the tests (those that need a GPU are skipped where there is none)
	$(BIN)/python -m pytest $(WORKERS) $(QUICK) $(TESTS)

test-all: QUICK :=
test-all: test  ## Run all tests, the thorough ones too (some minutes more)

test-cards: env  ## Compile every kernel for every card, for what shared memory it takes (an hour)
	ALL_CARDS=1 $(BIN)/python -m pytest -n 2 tests/unit/kernels/test_cards.py

test-matrix: SHELL := bash -o pipefail
test-matrix:  ## Run the tests with every supported Megatron-Core, each in an environment of its own
	@status=0; for release in $(MATRIX); do \
		venv=$(VENV)-$$release; \
		$(MAKE) --no-print-directory env VENV=$$venv MEGATRON_CORE=$$release || exit; \
		$$venv/bin/python -m pytest -q $(WORKERS) $(QUICK) $(TESTS) 2>&1 | tee $$venv/tests.log || status=1; \
	done; \
	for release in $(MATRIX); do \
		echo "Megatron-Core $$release: $$(tail -n 1 $(VENV)-$$release/tests.log)"; \
	done; exit $$status

# A checkout has the dataset helpers as C++ alone; the wheel's are linked where their source is the same.
DATASETS = $(abspath $(MEGATRON_LM))/megatron/core/datasets
WHEELS := $(abspath $(VENV))/lib/python3.12/site-packages/megatron/core/datasets

test-main: env  ## Run the tests with the source of Megatron-LM in MEGATRON_LM=<checkout>
	@test -n "$(MEGATRON_LM)" -a -f "$(DATASETS)/helpers.cpp" || \
		{ echo "make: MEGATRON_LM=<a checkout of Megatron-LM> is missing" >&2; exit 1; }
	@ls -L $(DATASETS)/helpers_cpp*.so >/dev/null 2>&1 || \
		{ cmp $(DATASETS)/helpers.cpp $(WHEELS)/helpers.cpp && ln -sf $(WHEELS)/helpers_cpp*.so $(DATASETS); } || \
		{ echo "make: compile the helpers first: make -C $(DATASETS) (it needs pybind11)" >&2; exit 1; }
	PYTHONPATH=$(abspath $(MEGATRON_LM)) $(BIN)/python -m pytest $(WORKERS) $(QUICK) $(TESTS)

# Triton 3.5's interpreter, which the tests alone use, wants an older NumPy.
test-lowest:  ## Run the tests with the lowest PyTorch, Triton and Megatron-Core that pyproject.toml allows
	$(MAKE) --no-print-directory env VENV=$(VENV)-lowest TORCH=$(call lowest,torch) \
		MEGATRON_CORE=$(call lowest,megatron-core)
	$(VENV)-lowest/bin/python -m pytest $(WORKERS) $(TESTS)

lint: style types  ## Check style and types

style: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# kernels/ and patches/ are packages of megatron_mhc only once installed: types are checked there.
types: env
	@rm -rf build/lib build/types
	$(PIP) install --quiet --no-deps --target build/types .
	@cp -r benchmarks tests build/types
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml megatron_mhc benchmarks

# MkDocs and its friends, beside the rest; the site itself wants no network
$(VENV)/.docs: $(STAMP) pyproject.toml
	$(PIP) install --quiet --progress-bar off -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## Build the documentation into build/site and check every link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/tools/check_site.py build/site
	@echo "built build/site/index.html"

wheel: env  ## Build the wheel into dist/ and check that megatron_mhc is all it holds
	@rm -rf build/lib dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@listed="$$($(BIN)/python -m zipfile -l dist/*.whl | awk 'NR > 1 { print $$1 }')"; \
	others="$$(echo "$$listed" | grep -vE '^megatron_mhc(-[^/]+\.dist-info)?/')"; \
	if [ -n "$$others" ]; then echo "make: the wheel also holds: $$others" >&2; exit 1; fi
	@ls dist/*.whl

# What is uploaded is what is tried: the wheel alone in an environment made from nothing.
dist: env  ## Build sdist and wheel into dist/, check them, and try the wheel in a bare environment
	@rm -rf build/lib build/dist-try dist
	@mkdir -p build
	@$(PIP) install --quiet --progress-bar off build twine
	$(BIN)/python -m build --outdir dist . >build/dist.log 2>&1 || { cat build/dist.log; exit 1; }
	$(BIN)/twine check --strict dist/*
	@echo "== trying the wheel in build/dist-try: 6 GB, some minutes"
	@$(PYTHON) -m venv build/dist-try
	@build/dist-try/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off dist/*.whl
	cd build/dist-try && bin/python -c 'import megatron_mhc; print(megatron_mhc.__version__)' && \
		bin/python -m megatron_mhc --help >/dev/null && bin/python -m megatron_mhc.run --help >/dev/null && \
		bin/python -m megatron_mhc doctor >doctor.txt || { cat doctor.txt; exit 1; }
	@ls dist/*

clean:  ## Remove what was built and trained, and the environment
	rm -rf $(VENV) $(VENV)-lowest $(MATRIX:%=$(VENV)-%) build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -exec rm -rf {} +
