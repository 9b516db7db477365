# Everything runs in one environment, which launch/install.py makes and keeps current; a second call costs seconds.
#   make quickstart ARGS="--workdir=runs/seed1 --config.seed=1"      make test ARGS="-k losses"      make setup VENV=/tmp/venv

VENV ?= .venv
ARGS ?=
# Images of containers set it. Packages are installed uncompiled: every process would compile all that it imports, for
# seconds each.
unexport PYTHONDONTWRITEBYTECODE
PYTHON := $(VENV)/bin/python
# Files side by side, so that what a file sets up is set up once; -n 0 turns it off.
IN_PARALLEL := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# A command that Ctrl-C stops ends with 130 and has said how to go on: make, which the signal ends as well, is not to
# add an error to that. Without the signal every status but 0 is an error.
define until_stopped
@trap 'stopped=1' INT; $(1); status=$$?; if [ "$$stopped:$$status" = 1:130 ]; then exit 0; fi; exit $$status
endef

# Any Python 3 starts the installer, which then picks the right one (a pyenv shim may exist and not run).
define bootstrap
$(call until_stopped,(for python in python3.11 python3 python3.12 python3.13; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then exec "$$python" $(1); fi; \
done; echo "No Python 3 found. On Debian 12: sudo apt-get install python3.11-venv"; exit 1))
endef

.DEFAULT_GOAL := help
.PHONY: help setup setup-vulkan quickstart test test-slow fuzz docs lint format doctor clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: setup-vulkan  ## set up everything, then clone -> trained, evaluated, filmed policy; starts or continues
	$(info $(PYTHON) launch/train.py --config=configs/quickstart.py $(ARGS))
	$(call until_stopped,$(PYTHON) launch/train.py --config=configs/quickstart.py $(ARGS))

test: setup  ## set up everything, then the tests
	$(PYTHON) -m pytest $(IN_PARALLEL) $(ARGS)

test-slow: setup  ## the tests that take minutes each
	$(PYTHON) -m pytest -m slow $(ARGS)

fuzz: setup  ## random changes of every kind of file that is read, and random command lines; ten minutes
	$(PYTHON) tests/fuzz/campaign.py $(ARGS)

docs: setup  ## the site of docs/, into build/docs; a warning is an error
	$(PYTHON) -m sphinx -b html -W --keep-going -d build/doctrees docs build/docs $(ARGS)

lint: setup  ## ruff: rules and formatting, changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: setup  ## ruff: format and mend what it can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

setup:  ## system packages, virtual environment, pinned packages with extras, this package
	$(call bootstrap,launch/install.py --venv "$(VENV)")

# What the quickstart does without is not downloaded for it; an environment that has it is fine as it is.
setup-vulkan:
	$(call bootstrap,launch/install.py --venv "$(VENV)" --need-vulkan --without-extras)

doctor:  ## check this machine and explain each failure with its remedy
	$(call bootstrap,launch/doctor.py)

clean:  ## remove the environment and caches; runs/ stays
	rm -rf "$(VENV)" .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
