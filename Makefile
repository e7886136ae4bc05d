# Two commands do everything: `make sweep` and `make test`.

# This variable makes every process compile every import anew: 15 s instead of 6.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORAGE ?= results
INSTALLED := $(VENV)/.installed

.PHONY: install sweep ui test test-slow test-long lint format bench bench-runtime bench-flower bench-methods clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --requirement requirements-assets.txt
	touch $@

sweep: $(INSTALLED)
	$(BIN)/python -m fedlpp_ray.tune search_spaces/rank_bits.py --storage $(STORAGE)

ui: $(INSTALLED)
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(abspath $(STORAGE))/mlflow.db --host 127.0.0.1 --port 5000

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow and not long' --ignore tests/runtime --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m 'not slow and not long' tests/runtime  # one cluster at a time

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow and not long'

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

BENCHMARKS := rounds memory zero scale recovery startup arithmetic

bench-runtime: $(INSTALLED)
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --into benchmarks/README.md || exit 1; \
	done

bench-flower: $(INSTALLED)
	$(BIN)/python -m benchmarks.flower --into benchmarks/README.md

bench-methods: $(INSTALLED)
	$(BIN)/python -m benchmarks.methods --into README.md

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
