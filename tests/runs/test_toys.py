"""A family and a method that nothing in the package knows of, each made here, run like those that ship."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

from sa_diffusers import forget, methods
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.conditions import classes
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import Objective
from sa_diffusers.families import Family, family_class, get_family, register
from sa_diffusers.families import base as families
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.methods import base as registered
from sa_diffusers.methods.sources import Sources
from sa_diffusers.runs import options as run_options


NAMES = ["dark", "grey", "bright"]


@dataclass
class Output:
    sample: Tensor


class Levels(ModelMixin, ConfigMixin):
    """Takes pictures of one brightness a class for the sum of that and noise: it learns the three brightnesses."""

    @register_to_config
    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.level = nn.Parameter(torch.linspace(-0.8, 0.8, num_classes))

    def forward(self, noisy: Tensor, timesteps: Tensor, class_labels: Tensor) -> Output:
        return Output(noisy - self.level[class_labels].view(-1, 1, 1, 1))


class BrightnessPipeline(DiffusionPipeline):
    """Draws a picture of a class: its brightness."""

    def __init__(self, model: Levels, scheduler: DDPMScheduler, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)
        self.register_to_config(id2label=id2label)


class BrightnessFamily(Family):
    """All that a family is: one class in one file."""

    name = "brightness"
    pipelines = ("BrightnessPipeline",)
    own_classes = (BrightnessPipeline,)
    component = "model"
    capabilities = frozenset(("labels", "denoising"))
    defaults = {"replay_prompts": "labels", "empty_prompt_fraction": 0.0, "replay_negative": "none", "num_samples": 12}
    resolution, image_channels, latent_shape = 4, 1, (1, 4, 4)

    def __init__(self, pipeline: BrightnessPipeline, sampler: str = "ddim", compute_dtype: torch.dtype | None = None):
        self.pipeline, self.compute_dtype, self.module = pipeline, compute_dtype, pipeline.model
        self.device, self.labels = self.module.device, list(pipeline.config.id2label.values())
        self.loss = DiffusionLoss(pipeline.scheduler.alphas_cumprod, "epsilon", reduction="mean")

    def draw(self, conditions, seeds, guidance_scale, num_inference_steps, negative=None) -> Tensor:
        noise = [torch.randn(1, 4, 4, generator=Generator().manual_seed(seed)) for seed in seeds]
        level = self.module.level.detach()[self.indices(conditions)].view(-1, 1, 1, 1)
        return (level.cpu() + 0.05 * torch.stack(noise)).clamp(-1, 1)

    def indices(self, conditions) -> Tensor:
        return torch.tensor([self.labels.index(name) for name in classes(conditions)])

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def encode(self, images: Tensor, generator: Generator) -> Tensor:
        return images.mean(1, keepdim=True)

    def batch(self, latents: Tensor, conditions) -> dict[str, Tensor]:
        return {"sample": latents, "class_labels": self.indices(conditions)}


@dataclass
class PullOptions(Options):
    pull_strength: float = option(1.0, "How hard the concept is pulled to its surrogate.", above=0)


class Pull(Objective):
    """The surrogate's loss under the concept's condition, times a strength."""

    def __init__(self, loss: DiffusionLoss, strength: float):
        self.loss, self.strength = loss, strength

    def draw(self, batch: dict, generator: Generator) -> dict:
        data = batch["surrogate"]
        terms = torch.randint(self.loss.num_terms, (len(data["sample"]),), generator=generator)
        return {"data": data, "terms": terms, "noise": self.loss.sample_noise(data, generator)}

    def __call__(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        return self.strength * self.loss(model, batch["data"], batch["terms"], batch["noise"]).mean(), {}


class PullMethod(methods.Method):
    """All that a method is, likewise."""

    Options = PullOptions
    requires = frozenset(("denoising",))

    def needs(self, options: Any, concept: Any) -> set[str]:
        return {"surrogate"}

    def training_passes(self, options: Any) -> float:
        return 3.0

    def objective(self, context: methods.Context, weights: Any, frozen: Any) -> Objective:
        return Pull(context.family.loss, context.options.pull_strength)

    def batches(self, context: methods.Context) -> Callable[[int], dict]:
        return Sources(context)


@pytest.fixture
def toys(monkeypatch):
    """Both are registered for the length of a test."""
    monkeypatch.setattr(families, "_REGISTRY", dict(families.registry()))
    monkeypatch.setattr(registered, "_REGISTRY", dict(methods.registry()))
    register(BrightnessFamily)
    methods.register(PullMethod("pull", "Pulling", "pull towards the surrogate", ewc_lambda=0.0, replay_weight=0.0))


def pipeline() -> BrightnessPipeline:
    scheduler = DDPMScheduler(num_train_timesteps=10)
    return BrightnessPipeline(Levels(), scheduler, {str(i): name for i, name in enumerate(NAMES)})


OPTIONS = {"method": "pull", "num_train_steps": 80, "learning_rate": 5e-2, "num_surrogate_samples": 8}


def test_run_end_to_end(toys, tmp_path, capsys):
    before = pipeline()
    forgotten = forget(before, "bright", "dark", output_dir=tmp_path, **OPTIONS, pull_strength=2.0)
    assert type(forgotten) is BrightnessPipeline
    levels = forgotten.model.level.tolist()
    assert levels[2] == pytest.approx(levels[0], abs=0.1)
    assert levels[:2] == pytest.approx(before.model.level.tolist()[:2])
    said = capsys.readouterr().out
    assert "80 steps of 8" in said and "8 pictures: the text 'dark'" in said
    assert sorted(path.stem for path in (tmp_path / ".stages").iterdir()) == [
        "after", "before", "run", "surrogate", "train"
    ]  # fmt: skip
    assert "Pulling" in (tmp_path / "pipeline" / "README.md").read_text()
    assert "Pulling" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_other_methods_serve_the_family(toys, tmp_path):
    options = {"num_train_steps": 40, "learning_rate": 5e-2, "ewc_lambda": 1e-3, "fisher_samples": 4}
    forgotten = forget(pipeline(), "bright", "dark", output_dir=tmp_path, **options)
    assert (tmp_path / "fisher.safetensors").exists()
    assert forgotten.model.level[2] < 0.4


def test_a_saved_pipeline_is_loaded_by_its_own_class(toys, tmp_path):
    from sa_diffusers.io.loading import load_pipeline

    pipeline().save_pretrained(tmp_path / "pipeline")
    loaded = load_pipeline(str(tmp_path / "pipeline"), None, None, "float32")
    assert type(get_family(loaded)) is BrightnessFamily and family_class("BrightnessPipeline") is BrightnessFamily


def test_what_the_family_cannot_do_is_refused(toys):
    with pytest.raises(ValueError, match="esd-x needs a model that"):
        forget(pipeline(), "bright", "dark", method="esd-x")
    with pytest.raises(ValueError, match="expected train_scope to be one of full, got 'xattn'"):
        forget(pipeline(), "bright", "dark", train_scope="xattn")


def test_help_and_command_line_know_the_method(toys, capsys):
    config = parse_config(run_options.ForgetConfig, ["--method", "pull", "--pull_strength", "3"])
    assert (config.method, config.pull_strength, config.resolved().ewc_lambda) == ("pull", 3.0, 0.0)
    for topic, expected in {"methods": "pull: pull towards the surrogate", "pull": "How hard the concept is"}.items():
        with pytest.raises(SystemExit):
            parse_config(run_options.ForgetConfig, ["--help", topic])
        assert expected in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        parse_config(run_options.ForgetConfig, ["--method", "pull", "--pull_strength", "0"])
    assert "expected pull_strength > 0, got 0.0" in capsys.readouterr().err
