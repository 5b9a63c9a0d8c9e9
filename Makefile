# Everything below needs Python 3.10 to 3.13 (with its venv module), git and make, nothing else.
PYTHON ?= python3
DATASET ?= digits
OUT ?= runs/compare
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The oldest versions that setup.cfg allows, in an environment of their own, and what is tried there: a part of
# every kind, in three minutes. Only what is imported is compiled, here and where the wheel is tried.
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
OLDEST_VERSIONS := 'tensorflow==2.20.*' 'keras==3.10.*'
OLDEST_TESTS := tests/test_private_names.py tests/cluster tests/compressors/test_goldens.py \
	tests/optimizers/test_arguments.py tests/optimizers/test_mixed_precision.py \
	tests/distribute/test_scopes.py tests/distribute/test_multi_worker.py tests/test_pages.py

# The pages of docs/ and what is published, each with tools of its own and without TensorFlow.
DOCS := .venv-docs
DIST := .venv-dist
WHEEL := .venv-wheel
# pip takes the requirements of an extra only together with the package's own: so they are read.
EXTRA = $(PYTHON) -c "import configparser as c; s = c.ConfigParser(); s.read('setup.cfg'); \
	print(s['options.extras_require']['$(1)'])"

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-oldest test-gpu lint format bench docs dist clean

help:
	@echo "make train      compare dense and compressed training on two local workers"
	@echo "                [DATASET=digits|mnist] [DATA_DIR=dir] [OUT=$(OUT)] [ARGS='--flag=...']"
	@echo "                [BANDWIDTH=100mbit] [LATENCY=5ms] a slow network between them (Linux, root)"
	@echo "make test       the tests, without the slow ones [PYTEST_ARGS='-k top_k']"
	@echo "make test-slow  the slow tests and those that need network namespaces [PART=1/4]"
	@echo "make test-oldest  a part of the tests on the oldest TensorFlow and Keras that are allowed"
	@echo "make test-gpu   the laws, training and the codecs' speed on GPUs, where there are any"
	@echo "make lint       ruff check, ruff format --check, and mypy for the package; make format repairs"
	@echo "make bench      time of every codec"
	@echo "make docs       the pages of docs/ and the API reference, in site/"
	@echo "make dist       sdist and wheel in dist/, checked; the wheel is tried in an empty environment"
	@echo "make clean      remove all environments and everything generated"

# The stamp is older than setup.cfg when a requirement has changed: then pip brings $(VENV) up to date.
# A new pip first: that of Python 3.10 did not finish resolving these requirements within 8 minutes.
$(INSTALLED): setup.cfg
	@echo "Installing into $(VENV): about 3 GB, mostly TensorFlow; only this once."
	$(PYTHON) -m venv $(VENV)
	$(VENV_PYTHON) -m pip install --quiet --upgrade pip
	$(VENV_PYTHON) -m pip install --progress-bar off --editable '.[experiments,test,lint]'
	touch $@

# Whole files, in the order of tests/conftest.py.
BY_FILE := --dist=loadfile --no-loadscope-reorder

train: $(INSTALLED)
	$(VENV_PYTHON) -m experiments.compare --dataset=$(DATASET) $(if $(DATA_DIR),--data_dir=$(DATA_DIR)) \
		$(if $(BANDWIDTH),--bandwidth=$(BANDWIDTH)) $(if $(LATENCY),--latency=$(LATENCY)) \
		--out=$(OUT) $(ARGS)

test: $(INSTALLED)
	$(VENV_PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 $(BY_FILE) --durations=25 $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(VENV_PYTHON) -m pytest -m "(slow or network) and not gpu" --numprocesses=2 $(BY_FILE) --durations=25 \
		$(if $(PART),--part=$(PART)) $(PYTEST_ARGS)

$(OLDEST_INSTALLED): setup.cfg
	@echo "Installing into $(OLDEST): about 3 GB, mostly TensorFlow; only this once."
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --progress-bar off --no-compile --editable '.[test]' $(OLDEST_VERSIONS)
	touch $@

test-oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 $(BY_FILE) \
		$(OLDEST_TESTS) $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	$(VENV_PYTHON) -m tests.gpu $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(INSTALLED)
	$(VENV_PYTHON) -m benchmarks.codecs $(ARGS)

$(DOCS)/.installed: setup.cfg
	$(PYTHON) -m venv $(DOCS)
	$(call EXTRA,docs) | $(DOCS)/bin/python -m pip install --quiet --requirement /dev/stdin
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DIST)/.installed: setup.cfg
	$(PYTHON) -m venv $(DIST)
	$(call EXTRA,dist) | $(DIST)/bin/python -m pip install --quiet --requirement /dev/stdin
	touch $@

# The example runs outside of the clone, so that nothing but the wheel can be imported.
dist: $(DIST)/.installed
	rm -rf dist build $(WHEEL)
	$(DIST)/bin/python -m build
	$(DIST)/bin/twine check --strict dist/*
	@echo "Installing the wheel into $(WHEEL): about 3 GB, mostly TensorFlow."
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --no-compile dist/*.whl
	cd / && $(CURDIR)/$(WHEEL)/bin/python -m tfqcomm.launch --workers=2 \
		$(CURDIR)/examples/multi_worker.py

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) $(DIST) $(WHEEL) runs build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
