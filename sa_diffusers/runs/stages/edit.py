"""The closed-form edit that the method is, or that training starts at."""

from pathlib import Path

from sa_diffusers import methods
from sa_diffusers.core.closed_form import ClosedFormEdit
from sa_diffusers.data.concepts.given import describe_surrogates
from sa_diffusers.io.atomic_files import atomic_path
from sa_diffusers.io.configuration import identity_names
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Stage
from sa_diffusers.runs.context import RunContext


class EditStage(Stage[dict[str, ClosedFormEdit]]):
    """The first stage, since it may find that it does not fit the model; nothing is changed yet."""

    name, counts_as = "edit", "train"
    inputs = ("model", "prompts", "templates")
    leaves = ("edit*.safetensors",)

    @staticmethod
    def editor(context: RunContext) -> methods.Method:
        return methods.editor(context.options.edit) if context.method.trains else context.method

    def content(self, context: RunContext) -> dict:
        editor, concepts = self.editor(context), context.concepts
        kept = {"edited": context.edited.each("phrasings")} if context.adapters else {}
        own = kept | {name: getattr(context.options, name) for name in ("seed", *identity_names(editor.Options))}
        return own | concepts.key | {"editor": editor.name, "surrogate": concepts.each("surrogate")}

    def compute(self, context: RunContext) -> dict[str, ClosedFormEdit]:
        edits = self.editor(context).edit(context)
        for part, edit in edits.items() if process_state().is_main_process else ():
            with atomic_path(self._path(context, part)) as temporary:
                edit.save(temporary)
        return edits

    def load(self, context: RunContext) -> dict[str, ClosedFormEdit]:
        kind = self.editor(context).Edit
        return {part: kind.load(self._path(context, part)) for part in context.family.text_maps()}

    def describe(self, context: RunContext) -> str:
        said = describe_surrogates(context.edited)
        return f"new keys and values for the concept's words, in closed form: {said}"

    @staticmethod
    def _path(context: RunContext, part: str) -> Path:
        return context.folder / ("edit.safetensors" if part == "tokens" else f"edit_{part}.safetensors")
