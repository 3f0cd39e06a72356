# `make demo` and `make test` need Python >= 3.11, make and a network to PyPI; nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that test; each takes about 2 GB of memory.
WORKERS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-all test-cluster check check-static clean-demo

demo: $(VENV)/installed
	$(BIN)/python -m ldm_train experiment=demo_autoencoder
	$(BIN)/python -m ldm_train experiment=demo
	$(BIN)/python -m ldm_train experiment=demo_lora
	@echo "Done. Pictures are in runs/*/default; charts: $(BIN)/wandb leet runs/demo/default/wandb"

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slurm and not thorough" $(ARGS)

# The longest as well, and which lines are reached.
test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term -m "not slurm" $(ARGS)

# On a SLURM that the tests start themselves. LDM_PREEMPTIONS=20 takes more jobs' places than the few of the default.
test-cluster: $(VENV)/installed
	$(BIN)/python -m pytest -m slurm -rs $(ARGS)

check: check-static
	$(BIN)/python -m pytest -q -m "not slow and not distributed and not slurm" -x

check-static: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_lengths.py

# Installed again when the requirements change.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean-demo:
	rm -rf runs/demo_autoencoder runs/demo runs/demo_lora
