"""What families share that guide by two predictions in one batch: pipelines led away from a text while they draw."""

import inspect
from typing import Any, Self

from diffusers import DiffusionPipeline

from sa_diffusers.families.text_to_image.family import TextToImageFamily
from sa_diffusers.pipelines.safe_guidance import SAFETY_LEVELS


class SafelyGuidedFamily(TextToImageFamily):
    """The one class of `own_classes` is the stock pipeline under safety guidance (`pipelines.safe_guidance`)."""

    capabilities = TextToImageFamily.capabilities | {"safe_guidance"}

    def drawing_pipeline(self, cls: type[DiffusionPipeline], **options: Any) -> DiffusionPipeline:
        """Of a pipeline that is led away one that is, too."""
        safe = isinstance(self.pipeline, self.own_classes)
        return super().drawing_pipeline(self.own_classes[0] if safe else cls, **options)

    def drawing_options(self, guidance_scale: float, num_inference_steps: int) -> dict[str, Any]:
        """Of such a pipeline also its safety, whose warm-up is the paper's share of the steps."""
        options = super().drawing_options(guidance_scale, num_inference_steps)
        if not isinstance(self.pipeline, self.own_classes):
            return options
        config = self.pipeline.config
        named = {"tokens": "safety_concept_embeds", "pooled": "safety_concept_pooled_embeds"}
        avoided = self.text_parts(self.embed([config.safety_concept])).items()
        settings = SAFETY_LEVELS[config.safety_level].for_steps(num_inference_steps)
        return options | {"safety": settings} | {named[part]: text.to(self.device) for part, text in avoided}

    def safely_guided(self, concept: str, level: str, sampler: str) -> Self:
        """The same model in a pipeline that is led away from a text while it draws; `level` of SAFETY_LEVELS."""
        cls, parts, config = self.own_classes[0], self.pipeline.components, self.pipeline.config
        kept = {name: config[name] for name in inspect.signature(cls).parameters if name in config}
        pipeline = cls(**kept | parts | {"safety_concept": concept, "safety_level": level})
        return type(self)(pipeline, sampler, self.compute_dtype)
