# Everything a new machine needs: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
# Ranks of the quickstart: every GPU where there are some, otherwise two CPU processes.
RANKS := $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); [ $$n -gt 0 ] && echo $$n || echo 2)

.PHONY: quickstart test test-fast test-ci test-full test-slurm test-slurm-ci slurm-tools doctor quality style mutants coverage tensorboard docs docs-serve clean tools

# Where its port is taken: make quickstart MASTER_PORT=29501
MASTER_PORT ?= 29500
quickstart: $(INSTALLED)
	$(RUN) deepspeed --num_accelerators $(RANKS) --master_port $(MASTER_PORT) launcher/train.py --ds_config ds_configs/zero3.json --output_dir outputs/quickstart

test: test-fast test-ci

test-fast: $(INSTALLED)
	$(RUN) python -m pytest -m fast -q -n auto --maxprocesses 4

# Two files at a time: while ranks start, half of two cores is idle.
test-ci: $(INSTALLED)
	$(RUN) python -m pytest -m "ci and not full" -q -n auto --maxprocesses 2 --dist loadfile

# Where there is a chromium, what it shows is tested as well.
test-full: $(INSTALLED)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[full]'
	$(RUN) python tests/summary.py

# A real SLURM and MPI on this machine; where they cannot be installed, the tests that need them are skipped and say why.
test-slurm: $(INSTALLED)
	-@$(MAKE) -s slurm-tools
	$(RUN) python -m pytest -m "slurm or full" -q tests/slurm tests/integration/test_launchers.py

test-slurm-ci: $(INSTALLED)
	-@$(MAKE) -s slurm-tools
	$(RUN) python -m pytest -m slurm -q tests/slurm tests/integration/test_launchers.py

SLURM_PACKAGES := slurm-wlm munge openmpi-bin libopenmpi-dev
INSTALL_SLURM := apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES)
slurm-tools:
	@command -v slurmctld >/dev/null && command -v mpirun >/dev/null && exit 0; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || \
	    { echo "error: as root, where there is apt-get: $(INSTALL_SLURM)"; exit 1; }; \
	  said=$$({ $(INSTALL_SLURM); } 2>&1) || \
	    { echo "$$said" | tail -n 3; echo "error: apt-get could not install: $(SLURM_PACKAGES)"; exit 1; }

doctor: $(INSTALLED)
	$(RUN) python launcher/doctor.py

quality: $(INSTALLED)
	$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy

style: $(INSTALLED)
	$(RUN) ruff check --fix . && $(RUN) ruff format .

mutants: $(INSTALLED)
	$(RUN) python tests/mutants/run.py

coverage: $(INSTALLED)
	$(RUN) python -m pytest -m "fast or ci" -q --cov --cov-report=term-missing

tensorboard: $(INSTALLED)
	$(RUN) tensorboard --logdir outputs --host 127.0.0.1

# Its theme announces its successor at every build, which says nothing about these pages.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	$(RUN) mkdocs build
	@echo "site/index.html is there; to read it: make docs-serve"

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(INSTALLED)
	$(RUN) mkdocs serve --quiet --dev-addr 127.0.0.1:8000

clean:
	rm -rf site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage

tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 or newer is needed as '$(PYTHON)' (set PYTHON=..., or e.g. apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: e.g. apt-get install python3-venv"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "A C++ compiler is needed, DeepSpeed compiles an operator on first use: e.g. apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.isfile(s.get_paths()["include"] + "/Python.h"))' || \
	  { echo "Python's headers are needed, that operator includes Python.h: e.g. apt-get install python3-dev"; exit 1; }

# Of all that is installed few modules are ever imported: each is compiled when it first is, and those of a run are here.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install -qq --no-compile -c constraints.txt
MODULES := import prunadapt_ds.train, prunadapt_ds.pages, transformers.models.auto.modeling_auto
OPERATOR := from deepspeed.accelerator import get_accelerator as a; b = a().create_op_builder("ShareMemCommBuilder"); b and b.load()

$(INSTALLED): pyproject.toml constraints.txt | tools
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[sample,onnx,dev,docs]'
	@# DeepSpeed's operator for CPU ranks: now, so that the first run does not wait for it.
	@$(RUN) python -c '$(MODULES)' >/dev/null 2>&1 & $(RUN) python -c '$(OPERATOR)' >/dev/null 2>&1; wait
	@touch $@
