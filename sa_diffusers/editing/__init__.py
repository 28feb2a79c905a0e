"""Closed-form edits of a model's weights: nothing is sampled and nothing is trained."""

from .start import start_from_edit
from .uce import ClosedFormEdit, closed_form_edit, concept_edits, edit_of_prompts


__all__ = ["ClosedFormEdit", "closed_form_edit", "concept_edits", "edit_of_prompts", "start_from_edit"]
