# The two commands a user needs: `make demo` and `make test`. Each creates .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait must not spin: on a busy machine two of them can take ten times as long.
export OMP_WAIT_POLICY = passive
# Processes that test side by side, one thread each.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What the tests of numbers must not depend on: torch's kernels, oneDNN's, and how many threads share a sum.
KERNELS = ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2
ifneq ($(shell grep -s avx512_bf16 /proc/cpuinfo),)
KERNELS += ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
endif
THREADS = 1 2
# Files whose verdict is about processes, files and hosts.
OTHERS = autoload base_install cell_layout cli command_line distributed_search equations examples fake_cuda findings \
  genotype gpu_benchmark image_sources labels language layering mm_checkpoints mm_runner nni_data nni_faults nni_lazy \
  nni_search optuna own_data own_loop own_operation packaging plotting printed_commands progressive publish readme \
  recorded report report_browser report_pages reproduce reproduce_commands reproduce_page retrain run_files run_hosts \
  site site_browser strategy_table timm_scripts timm_suite training_service trials user_day

.PHONY: demo test test-all test-portable check docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo           train HBNet and AGDNet on real digits beside their special cases, and search both spaces"
	@echo "make test           lint, type check and tests, in WORKERS=2 processes"
	@echo "make test-all       also timm's own test file on every registered model, every pair of options, and 5,000 damaged files"
	@echo "make test-portable  the fast tests of numbers under the kernels of other processors, with one thread and two"
	@echo "make docs           the documentation site, docs/_build/html; EXAMPLES=1 also runs the examples, for minutes"

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Less than the tests need, which bring everything.
.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -e .venv/.installed || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nni,viz]'
	touch $@

demo: .venv/.demo
	@echo "== 1 of 2: training HBNet, AGDNet and their special cases on digits"
	$(BIN)/python examples/01_train_on_digits.py --out runs/demo
	@echo "== 2 of 2: searching a cell in both spaces, and retraining it"
	@if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("nni") is None)'; \
	then $(BIN)/python examples/03_search_on_digits.py --out runs/demo/search; \
	else echo "left out: NNI 3.0 has no wheel for this machine or Python"; fi

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not every_model"

test-all: check
	$(PYTEST)

test-portable: .venv/.installed
	@failed=; for kernels in $(KERNELS); do for threads in $(THREADS); do \
	  echo "== $$kernels OMP_NUM_THREADS=$$threads"; \
	  env $$kernels OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q \
	    -m "not slow and not every_model" $(OTHERS:%=--ignore=tests/test_%.py) || failed="$$failed $$kernels,$$threads"; \
	done; done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

.venv/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	rm -rf docs/_build docs/examples
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

clean:
	rm -rf .venv runs docs/_build docs/examples
