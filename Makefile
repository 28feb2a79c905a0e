.PHONY: quality style test test-slow

# What CI checks; `style` repairs what can be repaired.
quality:
	ruff check .
	ruff format --check .
	lint-imports

style:
	ruff check --fix .
	ruff format .

test:
	pytest

test-slow:
	pytest -m slow
