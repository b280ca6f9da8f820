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

bench: $(READY)-to-bench
	failed=; for program in benchmarks/*.py benchmarks/peers; do $(BIN)/python $$program || failed="$$failed $$program"; \
		done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos

fuzz: $(READY)
	HARNESSD_FUZZ=$${HARNESSD_FUZZ:-2000} $(BIN)/pytest --timeout 3600 -o faulthandler_timeout=3600 tests/fuzz

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[postgresql,stack]" hypothesis mypy pytest pytest-timeout pytest-xdist ruff schemathesis
	touch $(READY)

# What the peers' worker imports in one row.
$(READY)-to-bench: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt numpy pandas
	touch $@

clean:
	rm -rf .venv state
