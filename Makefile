# The two commands a user needs: `make demo` and `make test`. Each creates .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait must not spin: on a busy machine two of them can take ten times as long.
export OMP_WAIT_POLICY = passive
# Processes that test side by side, one thread each.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train HBNet and AGDNet on real digits beside their special cases, and search both spaces"
	@echo "make test      lint, type check and tests, in WORKERS=2 processes"
	@echo "make test-all  also timm's own test file on every registered model, and every pair of options"

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/python examples/01_train_on_digits.py --out runs/demo
	$(BIN)/python examples/03_search_on_digits.py --out runs/demo/search

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not every_model"

test-all: check
	$(PYTEST)

clean:
	rm -rf .venv runs
