"""What is timed: sampling, the Fisher and a training step, in the authors' way, as plain fine-tuning, and in ours."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sa_diffusers.core.batches import Batch
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import FisherSums, estimate_fisher
from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import (
    ElasticWeightConsolidation,
    Likelihood,
    LowRankEWC,
    Objective,
    SelectiveAmnesia,
)
from sa_diffusers.core.seeding import seeded
from sa_diffusers.data.sampling import Request, SamplingSettings, draw_samples
from sa_diffusers.families import Family
from sa_diffusers.families.scopes import adapted_layers
from sa_diffusers.models.precision import autocast_forward
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.training.lora import add_lora
from studies.costs.authors import (
    BATCH_SIZE,
    AutogradEWC,
    AutogradSelectiveAmnesia,
    add_squared_gradient,
    draw_one_by_one,
)
from studies.costs.memory import LORA_RANK
from studies.costs.timing import Way


EXACT_CHUNK = 50  # timesteps in one forward pass of the exact Fisher
EXACT = f"ours, all timesteps, {EXACT_CHUNK} a forward pass"
PLAIN, WITHOUT_EWC, EWC = "plain fine-tuning", "ours without EWC", "ours, EWC in closed form"
FROZEN = "ours, EWC in closed form, towards the frozen model"


@dataclass(frozen=True)
class Workload:
    """How much of each stage one turn does; more is steadier and slower.

    Attributes:
        images, images_one_by_one: drawn by ours, and in the authors' way.
        timesteps: of the exact Fisher, evenly spread over all; at most all.
        cheap_samples: of the cheap Fisher.
        steps: of training.
    """

    images: int
    images_one_by_one: int
    timesteps: int
    cheap_samples: int
    steps: int


def sampling_ways(
    ours: Family, authors: Family, prompts: Sequence[str], config: ForgetConfig, load: Workload
) -> list[Way]:
    """Pictures for replay: the authors' one by one, and ours in batches by a shorter sampler, kept as latents.

    Args:
        ours, authors: of one pipeline; the authors' with the sampler "ddim".
    """
    requests = [Request(Condition(prompts[index % len(prompts)]), index) for index in range(load.images)]
    settings = SamplingSettings(config.replay_guidance_scale, config.num_inference_steps, config.sample_batch_size)
    modules = [ours.pipeline.unet, ours.pipeline.vae, ours.pipeline.text_encoder]

    def weights(*chosen: nn.Module) -> Callable[[], list[Tensor]]:
        return lambda: [p for module in chosen for p in module.parameters()]

    few = requests[: load.images_one_by_one]
    return [
        Way("sampling", "authors", "image", len(few), lambda: draw_one_by_one(authors, few), weights(*modules)),
        Way(
            "sampling",
            "ours",
            "image",
            len(requests),
            lambda: draw_samples(ours, requests, settings),
            weights(*modules),
        ),
    ]


def fisher_ways(family: Family, prompts: Sequence[str], config: ForgetConfig, load: Workload) -> list[Way]:
    """The squared gradient of a sample, by evaluation: one timestep of one sample, forward and backward."""
    module = family.module.eval().requires_grad_(True)
    parameters = dict(module.named_parameters())
    loss = thinned(family.loss, load.timesteps)
    batches = [_batch(family, prompts, 1, index) for index in range(load.cheap_samples)]
    noise = loss.sample_noise({"sample": batches[0]["sample"].expand(loss.num_terms, -1, -1, -1)}, seeded("noise"))
    on_host = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    sums = FisherSums.zeros(parameters)

    def one_by_one() -> None:
        add_squared_gradient(module, loss, parameters, batches[0], noise, on_host)

    def ours(samples: int, terms: int | None, chunk_size: int) -> None:
        sums.unbiased.clear()
        with autocast_forward(module, family.compute_dtype):
            estimate_fisher(
                module, loss if terms is None else family.loss, parameters, lambda i: batches[i], range(samples),
                terms=terms, chunk_size=chunk_size, sums=sums,
            )  # fmt: skip

    def held() -> list[Tensor]:
        return [*parameters.values(), *sums.square.values()]

    terms = config.terms or 10
    evaluations = 2 * terms * load.cheap_samples
    return [
        Way("Fisher", "authors", "evaluation", loss.num_terms, one_by_one,
            lambda: [*parameters.values(), *on_host.values()]),
        Way("Fisher", EXACT, "evaluation", loss.num_terms, lambda: ours(1, None, EXACT_CHUNK), held),
        Way("Fisher", cheap_name(config), "evaluation", evaluations,
            lambda: ours(load.cheap_samples, terms, config.fisher_chunk_size), held),
    ]  # fmt: skip


def cheap_name(config: ForgetConfig) -> str:
    return f"ours, 2 draws of {config.terms or 10} timesteps, {config.fisher_chunk_size} a forward pass"


def training_ways(family: Family, prompts: Sequence[str], config: ForgetConfig, load: Workload) -> list[Way]:
    """An optimiser step of the UNet's weights, and of low-rank adapters; each on as many samples as the others.

    The authors' step is also theirs in batch size: it is 4 + 4 samples, all others are of the configuration's size.
    """
    module = family.module.requires_grad_(True)
    weights = dict(module.named_parameters())
    fisher = {name: torch.rand_like(p) for name, p in weights.items()}
    size, loss, device = config.train_batch_size, family.loss, family.device
    batch = {"surrogate": _batch(family, prompts, size, 1), "replayed": _batch(family, prompts, size, 2)}
    small = {name: {key: value[:BATCH_SIZE] for key, value in part.items()} for name, part in batch.items()}
    marked = {**batch, "replayed": {**batch["replayed"], "distilled": torch.ones(size, dtype=torch.bool)}}
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    closed = ElasticWeightConsolidation(weights, fisher, config.ewc_lambda)
    on_device = AutogradEWC(weights, fisher, config.ewc_lambda, device)
    on_host = AutogradEWC(weights, fisher, config.ewc_lambda, "cpu")

    way = Steps(module, family, load.steps).way
    ewc, autograd, host = ([*part.fisher, *part.anchor] for part in (closed, on_device, on_host))
    return [
        way("authors", AutogradSelectiveAmnesia(loss, on_host, one_pass=False), small, host, exact=True),
        way(PLAIN, Likelihood(loss), _batch(family, prompts, 2 * size, 3), against=PLAIN),
        way(WITHOUT_EWC, SelectiveAmnesia(loss, None), batch, against=PLAIN),
        way(EWC, SelectiveAmnesia(loss, closed), batch, ewc, against=WITHOUT_EWC),
        way("ours, EWC through autograd", AutogradSelectiveAmnesia(loss, on_device, one_pass=True), batch, autograd,
            against=WITHOUT_EWC),
        way(FROZEN, SelectiveAmnesia(loss, closed, frozen=frozen), marked,
            [*ewc, *frozen.parameters()], against=EWC, frozen=frozen),
        _lora_way(family, fisher, config, batch, load.steps),
    ]  # fmt: skip


def thinned(loss: DiffusionLoss, timesteps: int) -> DiffusionLoss:
    """The loss with `timesteps` of its timesteps, evenly spread: an evaluation costs the same at each of them.

    Raises:
        ValueError: not in [1, T].
    """
    if not 1 <= timesteps <= loss.num_terms:
        raise ValueError(f"expected between 1 and {loss.num_terms} timesteps, got {timesteps}")
    chosen = torch.arange(timesteps) * loss.num_terms // timesteps
    return DiffusionLoss(loss.alphas_cumprod[chosen], loss.prediction_type, loss.reduction)


def _batch(family: Family, prompts: Sequence[str], size: int, seed: int) -> Batch:
    """Random latents under prompts, on the device: what they show makes no difference to the time."""
    latents = torch.randn(size, *family.latent_shape, generator=seeded("latents", seed))
    batch = family.batch(latents, [Condition(prompts[index % len(prompts)]) for index in range(size)])
    return {key: value.to(family.device) for key, value in batch.items()}


def _lora_way(family: Family, fisher: Mapping[str, Tensor], config: ForgetConfig, batch: Batch, steps: int) -> Way:
    """A step of rank-16 adapters of all attention projections, with the EWC of what they change."""
    module = copy.deepcopy(family.module)
    changes = add_lora(module, adapted_layers(module, "full", "attention"), LORA_RANK, LORA_RANK, seed=0)
    ewc = LowRankEWC(changes, fisher, config.ewc_lambda)
    name = f"ours, LoRA of rank {LORA_RANK}, EWC in closed form"
    objective = SelectiveAmnesia(family.loss, ewc)
    return Steps(module, family, steps).way(name, objective, batch, ewc.fisher, against=WITHOUT_EWC)


class Steps:
    """Optimiser steps of a module's weights that take gradients, by ways that share one optimiser's state."""

    def __init__(self, module: nn.Module, family: Family, count: int):
        self.module, self.family, self.count = module, family, count
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-8, weight_decay=0.0)

    def way(
        self,
        name: str,
        objective: Objective,
        data: Batch,
        kept: Iterable[Tensor] = (),
        against: str | None = None,
        exact: bool = False,
        frozen: nn.Module | None = None,
    ) -> Way:
        """Steps as `training.train` takes them; `exact`: in the precision of the weights, never clipped."""
        module, optimizer = self.module, self.optimizer
        kept, dtype = list(kept), None if exact else self.family.compute_dtype

        def run() -> None:
            module.train()
            for step in range(self.count):
                drawn = objective.draw(data, seeded("step", step))
                with autocast_forward(module, dtype), autocast_forward(frozen or module, dtype if frozen else None):
                    total, _ = objective(module, _to(drawn, self.family.device))
                total.backward()
                objective.add_gradient()
                if not exact:
                    nn.utils.clip_grad_norm_(self.trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            module.eval()

        def held() -> list[Tensor]:
            state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
            return [*module.parameters(), *state, *kept]

        return Way("training step", name, "step", self.count, run, held, against)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: _to(v, device) if isinstance(v, dict) else v.to(device) for k, v in batch.items()}
