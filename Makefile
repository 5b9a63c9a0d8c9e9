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
# every kind, in three minutes.
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
OLDEST_VERSIONS := 'tensorflow==2.20.*' 'keras==3.10.*'
OLDEST_TESTS := tests/test_private_names.py tests/cluster tests/compressors/test_goldens.py \
	tests/optimizers/test_arguments.py tests/optimizers/test_mixed_precision.py \
	tests/distribute/test_scopes.py tests/distribute/test_multi_worker.py

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-oldest lint format bench clean

help:
	@echo "make train      compare dense and compressed training on two local workers"
	@echo "                [DATASET=digits|mnist] [DATA_DIR=dir] [OUT=$(OUT)] [ARGS='--flag=...']"
	@echo "make test       the tests, without the slow ones [PYTEST_ARGS='-k top_k']"
	@echo "make test-slow  the slow tests and those that need network namespaces"
	@echo "make test-oldest  a part of the tests on the oldest TensorFlow and Keras that are allowed"
	@echo "make lint       ruff check and ruff format --check; make format repairs"
	@echo "make bench      time of every codec"
	@echo "make clean      remove $(VENV), $(OLDEST) and everything generated"

# The stamp is older than setup.cfg when a requirement has changed: then pip brings $(VENV) up to date.
# A new pip first: that of Python 3.10 did not finish resolving these requirements within 8 minutes.
$(INSTALLED): setup.cfg
	@echo "Installing into $(VENV): about 3 GB, mostly TensorFlow; only this once."
	$(PYTHON) -m venv $(VENV)
	$(VENV_PYTHON) -m pip install --quiet --upgrade pip
	$(VENV_PYTHON) -m pip install --progress-bar off --editable '.[experiments,test,lint]'
	touch $@

train: $(INSTALLED)
	$(VENV_PYTHON) -m experiments.compare --dataset=$(DATASET) $(if $(DATA_DIR),--data_dir=$(DATA_DIR)) \
		--out=$(OUT) $(ARGS)

test: $(INSTALLED)
	$(VENV_PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(VENV_PYTHON) -m pytest -m "slow or network" $(PYTEST_ARGS)

$(OLDEST_INSTALLED): setup.cfg
	@echo "Installing into $(OLDEST): about 3 GB, mostly TensorFlow; only this once."
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --progress-bar off --editable '.[test]' $(OLDEST_VERSIONS)
	touch $@

test-oldest: $(OLDEST_INSTALLED)
	$(OLDEST)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
		$(OLDEST_TESTS) $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(INSTALLED)
	$(VENV_PYTHON) -m benchmarks.codecs $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
