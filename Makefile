# Every target sets up what it needs first: .venv with the versions pinned under requirements/.
# PYTHON=python3.12 chooses the interpreter; left out, python3 or the nearest supported one is taken.
# test-newest has a .venv-newest of its own, of Python 3.13 and the newest versions of all packages.

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
SETUP_FLAGS := --search
endif

VENV_PYTHON := .venv/bin/python
DEMO := .venv/bin/kd-compare --suite configs/suites/demo.yaml --output output/demo --jobs 2
# What `make test` runs, and in how many processes: make test TESTS=tests/heads JOBS=4
TESTS ?= tests
JOBS ?= 2
# as training sets them, see projects/start.py; elsewhere than on Linux they say nothing
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-newest test-wheel wheel lint docs clean

help:
	@echo "make setup   create .venv and install everything (other targets do this themselves)"
	@echo "make demo    train teacher, plain and distilled students on built-in data: output/demo"
	@echo "make test    run the tests (TESTS=tests/heads JOBS=4 to choose)"
	@echo "make test-newest, make test-wheel   on Python 3.13 and newest packages; of an installed wheel"
	@echo "make wheel   dist/*.whl, with the configs inside"
	@echo "make lint    ruff check, ruff format --check, codespell"
	@echo "make docs    build the documentation: output/site/index.html"
	@echo "make clean   remove caches (.venv, output and data stay)"
	@echo "PYTHON=python3.12 selects the interpreter (3.10 to 3.12)."

setup:
	@$(PYTHON) dev/setup_env.py $(SETUP_FLAGS)

demo: setup
	$(DEMO)

test: setup
	OMP_NUM_THREADS=1 $(HUGE_PAGES) $(VENV_PYTHON) -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

# For a release: .ci/run calls neither of these two.
test-newest:
	@$(PYTHON) dev/setup_env.py --newest $(SETUP_FLAGS)
	OMP_NUM_THREADS=1 $(HUGE_PAGES) .venv-newest/bin/python -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

test-wheel: setup
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m wheel tests/test_wheel.py

wheel: setup
	rm -rf build
	$(VENV_PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@rm -rf build
	@ls dist

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m codespell_lib .

# What only the site needs is installed once for each state of requirements/docs.txt.
.venv/docs_stamp: requirements/docs.txt | setup
	$(VENV_PYTHON) -m pip install -q --disable-pip-version-check -c requirements/runtime.txt -r $<
	@touch $@

docs: setup .venv/docs_stamp
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet
	@echo "output/site/index.html"

clean:
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache
