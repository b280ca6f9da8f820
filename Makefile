# Every target does its own set-up in .venv, so each works on a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test lint bench chaos fuzz clean

run: $(READY)
	$(BIN)/harnessd serve config

test: $(READY)
	$(BIN)/pytest -n logical --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for program in benchmarks/*.py benchmarks/peers; do $(BIN)/python $$program || exit 1; done

chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos

fuzz: $(READY)
	HARNESSD_FUZZ=$${HARNESSD_FUZZ:-2000} $(BIN)/pytest --timeout 3600 -o faulthandler_timeout=3600 tests/fuzz

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[postgresql,stack]" hypothesis mypy pytest pytest-timeout pytest-xdist ruff schemathesis
	touch $(READY)

clean:
	rm -rf .venv state
