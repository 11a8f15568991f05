# Two commands do everything from a fresh clone: `make run` and `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: run mixture digits test lint slow docs clean

# Each rung keeps one core busy, so both run side by side; the second draws its progress bar on a line of its own.
run: .venv/ready
	$(MAKE) --no-print-directory -j2 mixture digits

mixture: .venv/ready
	$(BIN)/python -m toy.mixture --out runs/mixture

digits: .venv/ready
	TQDM_POSITION=1 $(BIN)/python -m toy.digits --out runs/digits

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

docs: .venv/ready
	$(BIN)/python .ci/docs.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv runs
