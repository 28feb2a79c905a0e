"""Closed-form edits of a model's weights: nothing is sampled and nothing is trained."""

from .uce import concept_edits, edit_prompts, unified_concept_edit


__all__ = ["concept_edits", "edit_prompts", "unified_concept_edit"]
