.PHONY: quality style test test-slow

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
