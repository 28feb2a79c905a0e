"""The replay set: samples that do not name the concept; those that might show it are drawn anew without it."""

from pathlib import Path

from sa_diffusers.core.conditions import texts
from sa_diffusers.data.replay import needs_negative, negative_requests, select_replay
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sampling import Request
from sa_diffusers.io.stages import Stage
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages.samples import (
    DRAWING,
    SamplesStage,
    draw_and_save,
    drawing_settings,
    drawn_before,
    parts_dir,
)


class ReplayStage(Stage[SampleSet]):
    """The replay set."""

    name, counts_as, inputs = "replay_samples", "sample", (SamplesStage.name,)
    fields = ("replay_negative", "negative_guidance_scale", *DRAWING)
    leaves = ("samples/without_concept.safetensors",)

    def content(self, context: RunContext) -> dict:
        said = {"siblings": context.concepts.each("siblings")}
        if len(context.concepts) > 1:
            said["negatives"] = "left open"  # once any of the concepts: of other kinds, too
        return context.computed_in | context.concepts.key | said

    def compute(self, context: RunContext) -> SampleSet:
        options, kept = context.options, self._kept(context)
        requests = self.requests(context)
        if not requests:
            return kept
        settings = drawing_settings(context, options.negative_guidance_scale)
        said = "without_concept", "sample without the concept"
        drawn = draw_and_save(context, requests, settings, *said, drawn_before(self, context))
        return kept + self._as_asked(context, drawn)

    def load(self, context: RunContext) -> SampleSet:
        drawn, kept = context.folder / "samples" / "without_concept.safetensors", self._kept(context)
        return kept + self._as_asked(context, SampleSet.load(drawn)) if self._count(context) else kept

    def workspace(self, context: RunContext) -> Path:
        return parts_dir(context, "without_concept")

    def describe(self, context: RunContext) -> str:
        return f"{self._count(context)} of them anew without the concept, which they leave open"

    def passes(self, context: RunContext) -> float:
        # A second pass says what to keep away from, also of a model that is told its guidance.
        return 2 * self._count(context) * context.options.num_inference_steps

    @staticmethod
    def requests(context: RunContext) -> list[Request]:
        samples, options = context.value(SamplesStage.name), context.options
        return negative_requests(samples, context.concepts, options.replay_negative, options.seed)

    def _kept(self, context: RunContext) -> SampleSet:
        return select_replay(context.value(SamplesStage.name), context.concepts, context.options.replay_negative)

    @staticmethod
    def _as_asked(context: RunContext, drawn: SampleSet) -> SampleSet:
        """Samples drawn anew under the prompts that leave the concepts open, whatever these were drawn with."""
        asked, mode = context.value(SamplesStage.name).conditions, context.options.replay_negative
        return SampleSet(drawn.latents, [one for one in asked if needs_negative(one.text, context.concepts, mode)])

    @staticmethod
    def _count(context: RunContext) -> int:
        samples, mode = context.value(SamplesStage.name), context.options.replay_negative
        if mode == "mixture":
            return 0
        asked = [r.condition for r in SamplesStage.requests(context)] if samples is None else samples.conditions
        return sum(needs_negative(prompt, context.concepts, mode) for prompt in texts(asked))
