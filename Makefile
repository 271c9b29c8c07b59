# All there is to set up: `make demo` shows what the library does, `make test` runs the tests, `make docs` builds the
# documentation into site/ (a warning fails), `make docs-serve` shows it while you write.
# Each makes the environment first, in .venv, with PYTHON (3.10 or newer).
PYTHON ?= python3

.PHONY: demo test lint docs docs-serve clean

demo: .venv/ready
	.venv/bin/python examples/demo.py

test: .venv/ready
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

docs: .venv/ready
	.venv/bin/mkdocs build --strict

docs-serve: .venv/ready
	.venv/bin/mkdocs serve

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
