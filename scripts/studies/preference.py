"""How far the verdict without a classifier is to be trusted: both judges on the same pictures of the bundled model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from sa_diffusers.core.concepts import Concepts
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.prompts import read_labelled_prompts
from sa_diffusers.data.sampling import SamplingSettings
from sa_diffusers.evaluation.drawing import draw_sets
from sa_diffusers.evaluation.examination import examination
from sa_diffusers.evaluation.intervals import difference_interval, share_interval
from sa_diffusers.evaluation.judges.preference import PREFERENCE, PreferenceJudge
from sa_diffusers.evaluation.judging import ClassifierJudge, judge_pictures
from sa_diffusers.families import get_family
from sa_diffusers.io.configuration import config_from_dict, layered, read_values
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from studies.kept import Kept, kept


# A digit, a colour, a style, and a surrogate that is no picture: (concept, surrogate).
CASES = (("seven, 7", "three"), ("red", "green"), ("bold, thick", "thin"), ("seven, 7", "noise"))
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)  # factors of what a LoRA changes; 0: the original
# Enough to forget: what is asked for are models on the way there.
SHORT = {
    "num_samples": 120, "fisher_samples": 48, "num_surrogate_samples": 120, "num_train_steps": 100, "num_threads": 1,
    "track_steps": None, "eval_images_concept": 4, "eval_images_class": 0, "eval_images_other": 0,
}  # fmt: skip


@dataclass
class Judged:
    """What both say of one model's pictures: 1 or 0 each, and the prompts that they share."""

    classifier: Tensor
    preference: Tensor
    prompts: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        """Shares, how often they agree, and by how much preference says more, with 95 % intervals by prompts."""
        found: dict[str, Any] = {"pictures": len(self.prompts)}
        for name in ("classifier", "preference"):
            votes = getattr(self, name)
            found[name], found[f"{name}_interval"] = votes.mean().item(), share_interval(votes, self.prompts)
        found["agreement"] = (self.classifier == self.preference).double().mean().item()
        found["bias"] = (self.preference - self.classifier).mean().item()
        found["bias_interval"] = difference_interval(self.preference, self.classifier, self.prompts)
        shown = self.classifier == 1
        for name, rows, wrong in (("missed", shown, 0), ("false_alarms", ~shown, 1)):
            found[name] = (self.preference[rows] == wrong).double().mean().item() if rows.any() else None
        return found

    @classmethod
    def all_of(cls, models: Mapping[Any, "Judged"]) -> "Judged":
        """The pictures of several models as those of one."""
        parts = list(models.values())
        votes = (torch.cat([getattr(part, name) for part in parts]) for name in ("classifier", "preference"))
        return cls(*votes, [prompt for part in parts for prompt in part.prompts])


def rank_correlation(models: Mapping[Any, Judged]) -> float:
    """Spearman's, of the shares that the two judges find over several models."""
    shares = [[getattr(one, name).mean().item() for one in models.values()] for name in ("classifier", "preference")]
    return float(spearmanr(*shares).statistic)


def run_study(folder: Path, num_images: int, seed: int) -> dict[str, Any]:
    """Forget each concept in a LoRA, and have both judges read pictures of the model at each scale of it."""
    cases, everything, shared = [], {}, {}
    first = None
    for concept, surrogate in CASES:
        name = f"{concept} → {surrogate}"
        run = folder / "".join(c if c.isalnum() else "-" for c in name)
        first = first or run
        asked = {"concept": concept, "surrogate": surrogate, "output_dir": str(run), "seed": seed} | shared
        config = config_from_dict(
            ForgetConfig, layered(ForgetConfig, read_values(ForgetConfig, "bundled/digits"), SHORT | asked)
        )
        votes, notes = kept(
            run / "votes.safetensors", "votes", {"name": name, "seed": seed, "images": num_images, **SHORT},
            lambda config=config, run=run: _votes(config, run, num_images),
        )  # fmt: skip
        models = {scale: Judged(*votes["judged"][i], notes["prompts"]) for i, scale in enumerate(SCALES)}
        shared = {"samples": str(first / "samples"), "fisher": str(first / "fisher.safetensors")}
        everything |= {(name, scale): one for scale, one in models.items()}
        rows = [{"scale": scale} | one.summary for scale, one in models.items()]
        cases.append({"case": name, "rank_correlation": rank_correlation(models), "models": rows})
        cases[-1] |= Judged.all_of(models).summary
    together = {"rank_correlation": rank_correlation(everything)} | Judged.all_of(everything).summary
    return {"cases": cases, "together": together}


def _votes(config: ForgetConfig, run: Path, num_images: int) -> Kept:
    """What the run and both judges come to: votes [model, judge, picture]."""
    run_forgetting(config)
    models = judge_scales(config, run / "pipeline", num_images)
    judged = torch.stack([torch.stack([one.classifier, one.preference]) for one in models.values()])
    prompts = next(iter(models.values())).prompts
    return {"judged": judged}, {"prompts": prompts}


def judge_scales(config: ForgetConfig, forgotten: Path, num_images: int) -> dict[float, Judged]:
    """Both judges on the same pictures, which ask for the concept, of the model at each scale of its change."""
    pipeline = load_pipeline(config.model, None, None, "float32")
    changed = load_pipeline(str(forgotten), None, None, "float32").unet.state_dict()
    original = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    family, bundled = get_family(pipeline, sampler=config.sampler), read_values(ForgetConfig, "bundled/digits")
    concept = find_concept(config.concept, config.surrogate)
    judge = ClassifierJudge.load(bundled["classifier"][0], concept.phrasings)
    in_words = concept.surrogate_kind == "prompt"
    instead = PreferenceJudge(family, Concepts([concept]), in_words, config.eval_batch_size)
    instead.freeze()
    rows = read_labelled_prompts(bundled["eval_prompts"])
    asking = examination(judge, Concepts([concept]), rows, num_images, 0, 0, config.seed)["concept"]
    settings = SamplingSettings(config.guidance_scale, config.num_inference_steps, config.eval_batch_size)
    found = {}
    for scale in SCALES:
        pipeline.unet.load_state_dict({name: w.lerp(changed[name], scale) for name, w in original.items()})
        drawn = draw_sets(family, {"concept": asking}, settings)
        read = judge_pictures([judge, instead], {"concept": asking}, drawn, batch_size=60)["concept"]
        votes = (read["concept_probability"] > 0.5).double()
        found[scale] = Judged(votes, read[PREFERENCE], asking.prompts)
    return found
