# make demo    train a learned image compression model with SOAP on the photographs in examples/photos
# make test    run the tests (TESTS='-m "not slow"' for the quick loop)
# make bench   run the benchmarks
# make docs    build the documentation: build/docs/index.html
# All of them create .venv and install what they need on first use.

PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
TESTS  ?=
# (another version finds other things; .pre-commit-config.yaml has the same)
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
# As many tests at a time as there are cores (TESTS='-n 0 ...' for one); most of them take one thread and about 1 GB
PYTEST := $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test bench quick lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-examples
	$(VENV)/bin/python examples/train_lic.py

test: $(VENV)/.installed-test
	$(PYTEST) $(TESTS)

quick: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python -m pytest bench --benchmark-columns=median,min,rounds -s

lint: $(VENV)/.installed-test
	$(PIP) $(LINTERS)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs

# (needs no compiled parts, and leaves those that there are)
$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	SOAP_OPT_BUILD=0 $(PIP) -e ".[docs]"
	touch $@

# The dependencies first (each built as its own authors ask), then this package in place, without build isolation, so that
# its compiled parts are built against the torch that they will run with.
$(VENV)/.installed-%: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*) | $(VENV)/bin/python
	$(PIP) --upgrade pip "setuptools>=77" ninja
	SOAP_OPT_BUILD=0 $(PIP) -e ".[$*]"
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "soap_opt needs Python >= 3.10; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache .mypy_cache
