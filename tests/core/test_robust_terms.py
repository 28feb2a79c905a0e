"""The further terms of Selective Amnesia against slow loops in float64: an adversary, and the mixture target."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import tiny_text_to_image
import torch
from torch.testing import assert_close

from sa_diffusers.core.batches import conditions_of, map_tensors, take
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.losses import DiffusionLoss, FlowMatchingLoss
from sa_diffusers.core.objectives import Adversary, MixtureTarget, SelectiveAmnesia
from sa_diffusers.core.objectives.mixture import mixture_weights
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import get_family
from sa_diffusers.families.text_to_image.caption_encoder import CaptionEncoder
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder


TEMPLATES = ["a {}", "a red {} on black", "{} on white"]
KINDS = ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xl-v", "sd3-t5", "flux-dev", "klein"))]
STEPS, RATE = 2, 0.05


@pytest.fixture(scope="module", params=KINDS)
def family(request, tiny_pipeline, tiny_tokenizer):
    pipeline = tiny_pipeline() if request.param == "sd" else tiny_text_to_image.make(request.param, tiny_tokenizer)
    family = get_family(pipeline)
    for module in (family.module, *family.text_encoders):
        module.double()
    return family


@pytest.fixture(scope="module")
def frozen(family):
    """The model before it was changed; what it was changed to is `family.module`."""
    before = copy.deepcopy(family.module)
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded(tuple(parameter.shape)))
    return before


def conditions(family, prompts: list[str]) -> dict:
    return map_tensors(conditions_of(family.batch(torch.zeros(1), list(map(Condition, prompts)))), torch.Tensor.double)


def searched(family, groups: int = 2, rows: int = 2) -> dict:
    """A batch of an adversary, in which every row has a template of its own."""
    shape, generator = (groups, rows), seeded("searched")
    latents = torch.randn((*shape, *family.latent_shape), generator=generator, dtype=torch.float64)
    chosen = torch.arange(groups * rows).view(shape) % len(TEMPLATES)
    flat = {
        name: conditions(family, [TEMPLATES[i].replace("{}", word) for i in chosen.flatten().tolist()])
        for name, word in (("asked", "seven"), ("frozen", "nine"))
    }
    encoder = TemplateEncoder(family, TEMPLATES, 2)
    start = torch.randn(groups, 2, sum(encoder.widths), generator=generator, dtype=torch.float64)
    grouped = map_tensors(flat, lambda tensor: tensor.unflatten(0, shape))
    return grouped | {"sample": latents, "rows": chosen, "start": start}


def predicted(family, model, sample, term: int, noise, embedded: dict) -> torch.Tensor:
    """What a model says of one noisy picture, [C, H, W], with the scales written out."""
    loss = family.loss
    if isinstance(loss, DiffusionLoss):
        alpha = loss.alphas_cumprod.double()[term]
        noisy = alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
    else:
        sigma = loss.sigmas.double()[term]
        noisy = (1 - sigma) * sample + sigma * noise
    return loss.call(model, noisy[None], loss.times(torch.tensor([term])), embedded)[0]


def adam(value, vectors: torch.Tensor) -> torch.Tensor:
    """Kingma & Ba's algorithm 1."""
    first = second = torch.zeros_like(vectors)
    for step in range(1, STEPS + 1):
        moved = vectors.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(moved), [moved])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        vectors = vectors - RATE * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return vectors


def test_an_adversary_finds_and_teaches_what_a_slow_loop_does(family, frozen):
    encoder, loss = TemplateEncoder(family, TEMPLATES, 2), family.loss
    adversary = Adversary(loss, encoder, 3.0, STEPS, RATE)
    objective = SelectiveAmnesia(loss, None, 0.0, frozen, [adversary])
    data = {
        "sample": torch.randn(2, *family.latent_shape, generator=seeded("data"), dtype=torch.float64)
    } | conditions(family, ["a", "a red"])
    drawn = objective.draw({"surrogate": data, "adversary": searched(family)}, seeded("draw"))
    total, logged = objective(family.module, drawn)

    part, values = drawn["adversary"], []
    for group in range(2):
        one = take(part, group)

        def errors(vectors, towards: str, one=one) -> torch.Tensor:
            found = []
            for row in range(2):
                drawn_row = one["sample"][row], int(one["terms"][row]), one["noise"][row]
                with torch.no_grad():
                    target = predicted(family, frozen, *drawn_row, take(one[towards], [row]))
                own = predicted(family, family.module, *drawn_row, encoder(vectors, [int(one["rows"][row])]))
                found.append((own - target).square().mean())
            return torch.stack(found).mean()

        vectors = adam(lambda v: errors(v, "asked"), one["start"])  # noqa: B023
        assert_close(adversary.search(family.module, frozen, one), vectors, rtol=1e-6, atol=1e-9)
        assert errors(vectors, "asked") < errors(one["start"], "asked")
        values.append(errors(vectors, "frozen"))
    assert_close(logged["adversary_loss"], torch.stack(values).mean().detach(), rtol=1e-6, atol=1e-12)
    assert_close(total, logged["surrogate_loss"] + 3.0 * logged["adversary_loss"])
    gradient = torch.autograd.grad(total, next(iter(family.module.parameters())))[0]
    assert gradient.abs().max() > 0 and not any(p.grad is not None for p in family.module.parameters())


def test_a_gradient_that_half_precision_would_lose_moves_the_search():
    """Of a mean over as many latents as a large model has."""

    class Far:
        num_terms = 10

        def predict(self, *_):
            return None

        def __call__(self, _, data, *__):
            return data["embedding"].float().sub(1).square().mean(1) / 2**26

    found = []
    for dtype in (torch.float16, torch.float32):
        encode = lambda vectors, rows, dtype=dtype: {"embedding": vectors.to(dtype).expand(len(rows), -1)}  # noqa: E731
        group = {
            "sample": torch.zeros(2, 1, dtype=dtype), "asked": {}, "rows": torch.arange(2), "start": torch.zeros(1, 8),
            "terms": torch.zeros(2, dtype=torch.long), "noise": torch.zeros(2, 1),
        }  # fmt: skip
        found.append(Adversary(Far(), encode, 1.0, 3, 0.05).search(None, None, group))
    assert found[1].abs().min() > 0.01
    assert_close(*found, rtol=1e-2, atol=0)


def test_one_signed_step_on_whole_embeddings_is_what_each_picture_says_by_itself(family, frozen):
    captions, size = [template.replace("{}", "seven") for template in TEMPLATES], 0.3
    encoder = CaptionEncoder(family, captions)
    adversary = Adversary(family.loss, encoder, 1.0, 1, size)
    batch = searched(family, groups=1) | {"start": encoder.start()[None].double()}
    group = take(adversary.draw(batch, seeded("draw")), 0)
    parts, pulls = [], 0
    for row in range(2):
        told = map_tensors(family.embed([captions[int(group["rows"][row])]]), torch.Tensor.double)
        read = {name: part.clone().requires_grad_() for name, part in family.text_parts(told).items()}
        added = told.get("added_cond_kwargs")
        names = {"tokens": "encoder_hidden_states", "pooled": "pooled_projections"}
        if added is None:
            embedded = {names[name]: part for name, part in read.items()}
        else:
            embedded = {names["tokens"]: read["tokens"], "added_cond_kwargs": added | {"text_embeds": read["pooled"]}}
        drawn = group["sample"][row], int(group["terms"][row]), group["noise"][row]
        with torch.no_grad():
            target = predicted(family, frozen, *drawn, take(group["asked"], [row]))
        error = (predicted(family, family.module, *drawn, embedded) - target).square().mean()
        units = {name: float(part.detach().square().mean()) ** 0.5 for name, part in read.items()}
        gradients = torch.autograd.grad(error, list(read.values()))
        pulls += torch.cat([units[n] * g.flatten() for n, g in zip(read, gradients, strict=True)])
        parts.append({name: (part.detach(), units[name]) for name, part in read.items()})
    moves = -size * pulls.sign()
    found = adversary.search(family.module, frozen, group)
    certain = pulls.abs() > 1e-9 * pulls.abs().max()  # the sign of what is zero but for rounding is anything
    assert certain.float().mean() > 0.5
    assert_close(found[certain], moves[certain], rtol=1e-6, atol=0)
    taught = family.text_parts(encoder(found, group["rows"].tolist()))
    for row, part in enumerate(parts):
        start = 0
        for name, (own, unit) in part.items():
            own_moves = found[start : start + own.numel()].view(own.shape[1:])
            assert_close(taught[name][row], own[0] + unit * own_moves, rtol=1e-9, atol=1e-12)
            start += own.numel()
        assert start == len(found)


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_groups_computed_apart_are_those_computed_together(family, frozen):
    adversary = Adversary(family.loss, TemplateEncoder(family, TEMPLATES, 2), 1.0, STEPS, RATE)
    drawn = adversary.draw(searched(family), seeded("draw"))
    parts = torch.arange(3) * family.loss.num_terms / 2
    assert ((drawn["terms"] >= parts[:2].floor()) & (drawn["terms"] < parts[1:])).all()
    whole = adversary(family.module, frozen, drawn)
    for group in range(2):
        alone = adversary(family.module, frozen, take(drawn, slice(group, None, 2)))
        assert_close(alone, take(whole, slice(2 * group, 2 * group + 2)), rtol=1e-6, atol=1e-9)


def nearest_mixture(target: torch.Tensor, words: torch.Tensor, ridge: float) -> torch.Tensor:
    """By every set of words that may have a share: the best of those whose shares are all positive."""
    count = len(words)
    apart = words - target
    weight = ridge * apart.square().sum(1).mean()

    def value(shares: torch.Tensor) -> float:
        return float((shares @ apart).square().sum() + weight * (shares - 1 / count).square().sum())

    found = []
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            gram = apart[list(chosen)] @ apart[list(chosen)].T + weight * torch.eye(size).double()
            shares = torch.zeros(count).double()
            solved = torch.linalg.solve(gram, torch.ones(size).double())
            shares[list(chosen)] = solved / solved.sum()
            if shares.min() >= 0:
                found.append(shares)
    return min(found, key=value)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_mixture_weights_are_the_best_on_the_simplex(ridge):
    words = torch.randn(6, 5, 9, generator=seeded("words"), dtype=torch.float64)
    target = torch.randn(6, 9, generator=seeded("target"), dtype=torch.float64)
    target[0], target[1] = words[0].mean(0), 0.8 * words[1, 2] + 0.2 * words[1, 4]
    found = mixture_weights(target, words, ridge)
    expected = torch.stack([nearest_mixture(*one, ridge) for one in zip(target, words, strict=True)])
    assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert ridge > 1 or (found == 0).any()
    same = mixture_weights(target[:1], target[:1, None].expand(1, 5, 9))
    assert_close(same, torch.full((1, 5), 0.2).double())


@pytest.mark.parametrize(("unearned", "concepts"), [(0.0, 1), (0.25, 1), (0.25, 2)])
def test_a_mixture_target_is_what_is_left_without_the_concepts(family, frozen, unearned, concepts):
    words, prompts = ["seven", "nine", "three"], ["a red", "a digit"]
    latents = torch.randn(2, *family.latent_shape, generator=seeded("latents"), dtype=torch.float64)
    asked = conditions(family, [f"{prompt} {word}" for prompt in prompts for word in words])
    batch = {"sample": latents} | conditions(family, prompts)
    batch |= {"asked": map_tensors(asked, lambda tensor: tensor.unflatten(0, (2, 3)))}
    term = MixtureTarget(family.loss, 4.0, 2.0, unearned, concepts)
    objective = SelectiveAmnesia(family.loss, None, 0.0, frozen, [term])
    drawn = objective.draw({"surrogate": {"sample": latents} | conditions(family, prompts), "open": batch}, seeded(1))
    total, logged = objective(family.module, drawn)
    part, values = drawn["open"], []
    with torch.no_grad():
        for row in range(2):
            drawn_row = latents[row], int(part["terms"][row]), part["noise"][row]
            plain = predicted(family, frozen, *drawn_row, take(conditions_of(part["data"]), [row]))
            each = [
                predicted(family, frozen, *drawn_row, take(take(part["asked"], [row]), (0, [k]))) for k in range(3)
            ]
            shares = nearest_mixture(plain.flatten(), torch.stack(each).flatten(1), 0.1)
            share = max(0.0, float(shares[:concepts].sum()) - unearned) / (1 - unearned)
            gone, others = (  # of parts without a share their plain mean
                sum((shares[k] + 1e-300) * each[k] for k in part) / (shares[list(part)] + 1e-300).sum()
                for part in (range(concepts), range(concepts, 3))
            )
            target = plain + 2 * share * (others - gone)
            own = predicted(family, family.module, *drawn_row, take(conditions_of(part["data"]), [row]))
            values.append((own - target).square().mean())
    assert_close(logged["open_loss"], torch.stack(values).mean(), rtol=1e-6, atol=1e-12)
    assert_close(total, logged["surrogate_loss"] + 4.0 * logged["open_loss"])


def test_exact_mixtures_lose_the_concept_alone():
    """Where the prediction under p is a mixture of those under "p, word", strength 1 leaves that of the others."""
    generator, shares = seeded("exact"), torch.tensor([0.3, 0.5, 0.2]).double()
    each = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    table = torch.cat([each, (shares @ each)[None]])

    class Model(torch.nn.Module):
        def forward(self, hidden_states, timestep, word):
            return SimpleNamespace(sample=table[word])

    loss = FlowMatchingLoss(torch.linspace(0.1, 1, 10).double())
    term = MixtureTarget(loss, 1.0, 1.0)
    batch = {
        "sample": torch.zeros(1, 4).double(),
        "word": torch.tensor([3]),
        "asked": {"word": torch.tensor([[0, 1, 2]])},
    }
    found = term.target(Model(), term.draw(batch, generator))[0]
    assert_close(found, (0.5 * each[1] + 0.2 * each[2]) / 0.7, rtol=0.15, atol=0.15)  # the ridge pulls a little


def test_an_adversary_takes_noise_levels_by_the_density_of_a_flow():
    loss = FlowMatchingLoss(torch.linspace(0.01, 1, 100))
    batch = {"rows": torch.zeros(4, 500), "sample": torch.zeros(4, 500, 1)}
    middle = {}
    for loss.density in ("uniform", "logit_normal"):
        drawn = Adversary(loss, None, 1.0, 1, 0.1).draw(batch, seeded(0))["terms"]
        middle[loss.density] = ((drawn > 0.4 * loss.num_terms) & (drawn < 0.6 * loss.num_terms)).float().mean().item()
    assert middle["uniform"] == pytest.approx(0.2, abs=0.02) and middle["logit_normal"] > 0.25
