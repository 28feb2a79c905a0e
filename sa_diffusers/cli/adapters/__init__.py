"""Commands that make pipelines of adapters."""
