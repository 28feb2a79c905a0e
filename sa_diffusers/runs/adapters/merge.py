"""A pipeline made of adapters of a chain, and the judgement of the chain's end that it is compared with."""

import shutil

from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.io.artifacts import ArtifactError
from sa_diffusers.io.atomic_files import atomic_path, file_hash
from sa_diffusers.io.loading import save_pipeline
from sa_diffusers.io.processes import process_state
from sa_diffusers.io.stages import Artifact, Stage
from sa_diffusers.models.precision import kept_weights
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.evaluate import EvaluateStage
from sa_diffusers.runs.stages.train import load_weights
from sa_diffusers.training.lora import fuse_lora, fuse_ties, load_adapters, lora_file


class ChainEndStage(EvaluateStage):
    """What the chain's last run left is found to do."""

    def content(self, context: RunContext) -> dict:
        return super().content(context) | {"after": context.merge.run.forgotten[-1]["after"]}

    def given(self, context: RunContext) -> Artifact[Findings] | None:
        return None

    def compute(self, context: RunContext) -> Findings:
        with kept_weights(context.family.module):
            load_weights(context.family.module, context.merge.run.folder / "pipeline", context.family.component)
            return super().compute(context)


class MergeStage(Stage[None]):
    """The original with the changes of adapters; those that are of one concept each are kept besides."""

    name, counts_as, inputs, shown = "merge", "train", ("model",), True
    fields, leaves = ("dtype",), ("pipeline/**/*", "lora/*")

    def content(self, context: RunContext) -> dict:
        merge, own = context.merge, context.artifacts["model"].fingerprint
        if merge.run.forgotten[-1]["before"] != own:
            raise ArtifactError(
                f"the adapters of {merge.run.folder} are of another model: expected "
                f"{merge.run.forgotten[-1]['before']}, got {own}; pass the one that they were trained on"
            )
        return {"adapters": [file_hash(file) for file in merge.files], "density": merge.density}

    def compute(self, context: RunContext) -> None:
        merge, family, folder = context.merge, context.family, context.folder
        load_adapters(family, list(merge.files))
        if merge.density is None:
            fuse_lora(family.module)
        else:
            fuse_ties(family.module, merge.density)
        if not process_state().is_main_process:
            return
        kept = [record for record in merge.run.forgotten if record["concept"] in {o.said for o in context.concepts}]
        records = [{n: value for n, value in one.items() if n not in ("after", "versions")} for one in kept]
        saved = (context.options.dtype, context.options.save_variant, [*context.forgotten, *records])
        save_pipeline(family.pipeline, folder / "pipeline", family.module, *saved)
        if context.options.adapters == "each":
            with atomic_path(folder / "lora") as new:
                new.mkdir()
                for file, (name,) in merge.files.items():
                    shutil.copyfile(file, new / lora_file(name))

    def load(self, context: RunContext) -> None:
        load_weights(context.family.module, context.folder / "pipeline", context.family.component)

    def describe(self, context: RunContext) -> str:
        return f"{len(context.merge.files)} adapters on the original: {', '.join(context.merge.names)}"
