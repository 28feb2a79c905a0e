"""Commands that make pipelines of what finished runs left: adapters, and strengths."""
