.PHONY: quality style test test-slow docs tables

# What CI checks; `style` repairs what can be repaired.
quality:
	ruff check .
	ruff format --check .
	PYTHONPATH=scripts lint-imports

style:
	ruff check --fix .
	ruff format .

test:
	pytest

test-slow:
	pytest -m slow

# Fails where a link or a name in the reference leads nowhere.
docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir build/site

# Tables of README and docs, from docs/results/*.json; a test fails where they differ.
tables:
	python scripts/tables.py
