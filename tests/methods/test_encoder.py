"""Forgetting in the encoder: its objective against the formula, its surrogates, and whole runs on a tiny model."""

import copy
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cheap_runs import context_of
from PIL import Image
from tiny_mae import tiny_mae
from tiny_tokens import tiny_tokens
from torch.testing import assert_close

from sa_diffusers import forget, methods
from sa_diffusers.__main__ import main
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher_file import Fisher
from sa_diffusers.core.objectives import BoundedForgetting, EncoderForgetting, OutputForgetting, RandomEncoder
from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.completion import examine_completions
from sa_diffusers.evaluation.forgetting import Findings, pairs
from sa_diffusers.families import family_defaults, get_family
from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.methods.completion_baselines import AuthorsBatches
from sa_diffusers.methods.encoder import pixels
from sa_diffusers.methods.stand_ins import NOISES, principal_factors, stand_ins
from sa_diffusers.report.run_page import write_report
from sa_diffusers.runs.forget import run_forgetting
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.samples import PicturesStage


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) - 1


def encoded(mae, image: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The encoder's features of one picture, of a model whose ratio leaves as much visible: [1 + visible, D]."""
    mae = copy.deepcopy(mae).double()
    mae.config.mask_ratio = hidden.float().mean().item()
    return mae.vit(image[None].double(), noise=hidden[None].double() + torch.arange(16) / 100).last_hidden_state[0]


def test_the_objective_is_the_papers():
    before, after, alpha, weight = tiny_mae(seed=0), tiny_mae(seed=1), 0.3, 2.0
    family = get_family(after)
    asked = [Condition(mask="half")] * 3
    parts = {
        name: family.batch(pictures(3, seed), asked) for seed, name in enumerate(("forget", "retain", "surrogate"))
    }
    trained = family.trainable("encoder")
    objective = EncoderForgetting(family.features, before.mae, trained, None, alpha, weight)
    loss, logs = objective(after.mae, objective.draw(parts | {"sparsity": torch.full((3,), 0.01)}, torch.Generator()))
    with torch.no_grad():
        errors = {"forget": [], "retain": []}
        for name, towards in (("forget", "surrogate"), ("retain", "retain")):
            for index in range(3):
                hidden = parts[name]["hidden"][index]
                target = encoded(before.mae, parts[towards]["sample"][index], hidden)
                found = encoded(after.mae, parts[name]["sample"][index], hidden)
                errors[name].append((found - target).square().mean())
        forgotten, kept = (torch.stack(errors[name]).mean() for name in ("forget", "retain"))
        norm = sum(weight.double().abs().sum() for weight in trained.values())
    assert_close(loss.double(), alpha * forgotten + weight * kept + 0.01 * norm, rtol=1e-5, atol=1e-5)
    assert_close(logs["forget_loss"].double(), forgotten, rtol=1e-5, atol=1e-6)
    alone, logs = objective(after.mae, {name: parts[name] for name in ("forget", "surrogate")})
    assert_close(alone.double(), alpha * forgotten, rtol=1e-5, atol=1e-6)
    assert set(logs) == {"forget_loss"}


def kept_and_forgotten() -> tuple:
    """A family, and a batch of pictures to forget, of their surrogates and of others to retain."""
    family = get_family(tiny_mae(seed=0))
    asked = [Condition(mask="half")] * 3
    names = ("forget", "retain", "surrogate")
    return family, {name: family.batch(pictures(3, seed), asked) for seed, name in enumerate(names)}


@pytest.mark.parametrize(("bound", "over"), [(1e-6, 1.0), (10.0, -1.0), (None, 0.0)])
def test_a_bound_holds_by_the_gradient_that_is_nearest_to_forgetting(bound, over):
    _, parts = kept_and_forgotten()
    before, after = tiny_mae(seed=0).mae.double(), tiny_mae(seed=1).mae.double()
    family = get_family(tiny_mae(seed=1))
    parts = {n: {k: v.double() if v.is_floating_point() else v for k, v in part.items()} for n, part in parts.items()}
    after.decoder.requires_grad_(False)
    trained = [parameter for parameter in after.parameters() if parameter.requires_grad]

    def gradient(value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in found])

    def moved(name: str, towards: str) -> torch.Tensor:
        with torch.no_grad():
            (target,) = family.features(before, parts[towards])
        (found,) = family.features(after, parts[name])
        return (found - target).square().mean() / (1 if towards == "surrogate" else target.square().mean())

    share = moved("retain", "retain").item()
    objective = BoundedForgetting(family.features, before, {}, None, 0.3, bound or share)
    loss, logs = objective(after, objective.draw(parts, torch.Generator()))
    found, forgets, retains = (
        gradient(loss),
        gradient(0.3 * moved("forget", "surrogate")),
        gradient(moved("retain", "retain")),
    )
    allowed = over * forgets.norm() * retains.norm()
    # The nearest point of a half space.
    short = (allowed - forgets @ retains).clamp(min=0)
    assert_close(found, forgets + short / retains.square().sum() * retains)
    assert found @ retains >= allowed - 1e-9 * forgets.norm() * retains.norm()
    assert over == 0 or (short > 0) == (over > 0)
    assert set(logs) == {"forget_loss", "retain_loss"}


def test_what_is_retained_moves_as_far_as_its_bound():
    family, parts = kept_and_forgotten()
    frozen = copy.deepcopy(family.module)
    with torch.no_grad():
        (target,) = family.features(frozen, parts["retain"])

    def trained(bound: float) -> tuple[float, float]:
        model = copy.deepcopy(frozen)
        objective = BoundedForgetting(family.features, frozen, {}, None, 1.0, bound)
        optimizer, batch = torch.optim.Adam(model.parameters(), 1e-3), objective.draw(parts, torch.Generator())
        found = []
        for _ in range(150):
            optimizer.zero_grad()
            loss, logs = objective(model, batch)
            loss.backward()
            optimizer.step()
            found.append((logs["forget_loss"].item(), (logs["retain_loss"] / target.square().mean()).item()))
        return tuple(np.mean(found[-20:], axis=0))

    bounds = (0.003, 0.02)
    (much, little), (less, more) = trained(bounds[0]), trained(bounds[1])
    assert less < 0.9 * much
    for share, bound in zip((little, more), bounds, strict=True):
        assert 0.5 * bound < share < 1.5 * bound


@pytest.mark.parametrize("targets", ["own", "noise", "retain", "none"])
def test_baselines_of_outputs_are_losses_towards_their_targets(targets):
    before, after = tiny_mae(seed=0), tiny_mae(seed=1)
    family = get_family(after)
    asked = [Condition(mask="half")] * 3
    parts = {
        name: family.batch(pictures(3, seed), asked) for seed, name in enumerate(("forget", "retain", "surrogate"))
    }
    hole = family.holes(asked).expand(-1, 1, -1, -1)

    def error(name: str, truth: torch.Tensor) -> torch.Tensor:
        filled = unclipped(after, parts[name]["sample"], parts[name]["hidden"])
        return (filled - truth)[hole].double().square().mean()

    def unclipped(pipeline, images: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        pipeline.mae.config.mask_ratio = 4 / 16
        with torch.no_grad():
            return pipeline.mae.unpatchify(pipeline.mae(images, noise=hidden + torch.arange(16) / 100).logits)

    truth = {"own": parts["forget"]["sample"], "noise": parts["surrogate"]["sample"]}
    truth["retain"] = unclipped(before, parts["retain"]["sample"], parts["retain"]["hidden"])
    expected = 2.0 * error("retain", parts["retain"]["sample"])
    if targets != "none":
        expected += {"own": -0.3}.get(targets, 0.3) * error("forget", truth[targets])
    trained = family.trainable("full")
    objective = OutputForgetting(family.loss, before.mae, targets, 0.3, 2.0, trained)
    assert_close(objective(after.mae, parts)[0].double(), expected, rtol=1e-5, atol=1e-5)
    sparse, _ = objective(after.mae, parts | {"sparsity": torch.full((3,), 0.01)})
    norm = sum(weight.detach().double().abs().sum() for weight in trained.values())
    assert_close(sparse.double(), expected + 0.01 * norm, rtol=1e-5, atol=1e-5)


def test_only_what_reads_the_frozen_model_holds_one():
    needs = {name: methods.get(name).needs(ForgetConfig(concept="2"), None) for name in ("max-loss", "retain-label")}
    assert needs == {"max-loss": set(), "retain-label": {"frozen"}}


def test_random_targets_have_the_moments_of_the_frozen_features():
    pipeline = tiny_mae()
    family = get_family(pipeline)
    asked = [Condition(mask="half")] * 40
    parts = {name: family.batch(pictures(40, seed), asked) for seed, name in enumerate(("forget", "retain"))}
    objective = RandomEncoder(family.features, pipeline.mae, {}, None, 1.0, 1.0)
    batch = objective.draw(parts | {"surrogate": parts["forget"]}, torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = objective.targets(batch, [batch["retain"]])
        own, kept = (family.features(pipeline.mae, parts[name])[0] for name in ("forget", "retain"))
    assert found[40:].equal(kept)
    assert abs(found[:40].mean() - own.mean()) < 0.02 and abs(found[:40].std() / own.std() - 1) < 0.02
    assert (found[:40] * own).mean().abs() < 0.1 * own.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, method in methods.registry().items() if method.completes])
def test_every_method_trains_its_scope_by_its_terms(run, tmp_path, name):
    outcome = run(tmp_path, method=name, num_train_steps=3, eval_masks=["half"])
    history = json.loads((tmp_path / "history.json").read_text())
    terms = {"retain_loss"} | (set() if name == "retain-only" else {"forget_loss"})
    assert set(history[0]) - {"step", "loss", "grad_norm", "learning_rate"} == terms
    before = tiny_mae().mae
    changed = {n for n, weight in outcome.pipeline.mae.named_parameters() if not weight.equal(before.get_parameter(n))}
    assert any(n.startswith("decoder") for n in changed) == ("encoder" not in name)
    assert methods.get(name).title in (tmp_path / "pipeline" / "README.md").read_text()


def test_noises_have_the_moments_that_they_say():
    forgotten = pictures(400, 3) * 0.2 + torch.linspace(-0.6, 0.6, 64).view(1, 1, 8, 8)
    images = forgotten[:64]

    def noise(kind: str) -> torch.Tensor:
        return stand_ins("noise", kind, images, images > 9, images, forgotten, torch.Generator().manual_seed(0))

    found = {kind: noise(kind) for kind in NOISES}
    assert all(part.shape == images.shape for part in found.values())
    assert abs(found["moments"].mean() - images.mean()) < 0.03 and abs(found["moments"].std() - images.std()) < 0.03
    assert (found["gaussian"].mean(0) - forgotten.mean(0)).abs().max() < 0.1
    assert (found["moments"].mean(0) - forgotten.mean(0)).abs().max() > 0.4
    assert abs(found["normal"].std() - 1) < 0.05 and found["normal"].abs().max() > 2
    assert found["uniform"].abs().max() <= 1 and abs(found["uniform"].std() - 3**-0.5) < 0.02
    assert_close(found["constant"], images.mean().expand_as(images))
    assert noise("moments").equal(found["moments"])
    one = images[:1]
    assert_close(
        stand_ins("noise", "gaussian", one, one > 9, one, one, torch.Generator()), one
    )  # which varies in nothing


def test_noise_of_some_rank_varies_as_the_pictures_do():
    generator = torch.Generator().manual_seed(0)
    ways = torch.randn(6, 16, generator=generator) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1])[:, None]
    forgotten = (0.01 * torch.randn(300, 6, generator=generator) @ ways).view(300, 1, 4, 4) + 0.1
    covariance = forgotten.flatten(1).double().T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    for rank in (2, 6):
        factors = principal_factors(forgotten, rank)
        best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        flat = factors.flatten(1).double()
        assert_close(flat.T @ flat, best, rtol=1e-3, atol=1e-7)
        images = torch.zeros(40000, 1, 4, 4)
        drawn = stand_ins("noise", "gaussian", images, images > 9, images, forgotten, generator, factors)
        found, expected = drawn.flatten(1).double().T.cov(), best.clone()
        expected.diagonal().copy_(covariance.diagonal())  # the variance of each pixel is theirs at any rank
        assert (found - expected).norm() < 0.03 * expected.norm()
        assert_close(drawn.mean(0), forgotten.mean(0), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_bound_on_what_is_retained_holds_in_a_run(run, tmp_path):
    """The last steps' batches, of a model that moves by its learning rate at every step."""

    def shares(name: str, **changes) -> list[float]:
        run(tmp_path / name, num_train_steps=60, learning_rate=1e-3, eval_masks=["half"], **changes)
        return [row["retain_loss"] for row in json.loads((tmp_path / name / "history.json").read_text())[-20:]]

    assert np.mean(shares("bounded", retain_bound=1e-3)) < 0.3 * np.mean(shares("free", retain_bound=10.0))


def test_the_authors_weights_push_pictures_to_retain_alone():
    one = {"sample": torch.arange(3.0)}
    parts = AuthorsBatches(lambda step: {"forget": {"sample": -one["sample"]}, "retain": one, "surrogate": one})(0)
    assert parts["forget"]["sample"].tolist() == [1, 2, 0] and parts["retain"]["sample"].tolist() == [0, 1, 2]


def test_other_surrogates_are_what_they_say():
    images, pool, forgotten = pictures(4), pictures(9, 1), pictures(5, 2)
    hole = torch.zeros(4, 1, 8, 8, dtype=torch.bool)
    hole[:, :, 2:6, 2:6] = True

    def found(kind: str, pool: torch.Tensor = pool) -> torch.Tensor:
        return stand_ins(kind, "moments", images, hole, pool, forgotten, torch.Generator().manual_seed(0))

    for kind in ("other", "pictures"):
        assert all((pool == picture).flatten(1).all(1).any() for picture in found(kind))
    alike = torch.cat([pool, torch.where(hole, -images, images)])  # equal where it is visible
    assert found("nearest", alike).equal(torch.where(hole, -images, images))
    assert_close(found("mean"), forgotten.mean(0, keepdim=True).expand_as(images))
    assert_close(found("blur")[:, :, 3, 3], images[:, :, 2:5, 2:5].mean((2, 3)))
    assert_close(found("blur")[:, :, 0, 0], images[:, :, :2, :2].mean((2, 3)))  # nothing beyond the edge


OPTIONS = {
    "method": "encoder", "forget_images": "digits8x8:2,5", "retain_images": "digits8x8:0,1",
    "other_images": "digits8x8:7", "eval_images_class": 4, "images_class": 20, "num_train_steps": 6,
    "train_batch_size": 8, "logging_steps": 1, "fisher_samples": 6, "checkpointing_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "pipeline"
    tiny_mae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(few_pictures, saved):
    def run(folder, **changes):
        given = OPTIONS | {"model": str(saved), "output_dir": str(folder), "learning_rate": 0.01, "lr_warmup_steps": 0}
        own = family_defaults("MaskedAutoencoderInpaintPipeline")
        return run_forgetting(config_from_dict(ForgetConfig, layered(ForgetConfig, own, given | changes)))

    return run


@pytest.fixture(scope="module")
def outcome(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), masks=["half", "random"], encoder_l1=1e-5)


def test_a_run_changes_the_encoder_alone_and_says_what_it_did(outcome, saved, run):
    before, after = load_pipeline(str(saved), None, None, "float32").mae, outcome.pipeline.mae
    changed = {name for name, weight in after.named_parameters() if not weight.equal(before.get_parameter(name))}
    inside = set(get_family(outcome.pipeline).trainable("encoder"))
    assert changed <= inside and len(changed) > 0.9 * len(inside)
    history = json.loads((outcome.output_dir / "history.json").read_text())
    rows = [set(row) - {"step", "loss", "grad_norm", "learning_rate"} for row in history]
    assert rows == [{"forget_loss", "retain_loss", "l1"}] * 6
    metrics = json.loads((outcome.output_dir / "metrics.json").read_text())
    assert metrics["concept"] == "2, 5" and metrics["surrogate"] == "noise"
    for side in ("before", "after"):
        assert {"forget", "retain", "third", "forget, quarter", "third, ring", "fresh_decoder"} <= set(metrics[side])
        assert metrics[side]["forget"]["num_images"] == 8 and metrics[side]["third"]["num_images"] == 4
        assert metrics[side]["forget"]["accuracy"] is None  # nobody reads them
    assert metrics["before"]["forget"]["masked_mse"] != metrics["after"]["forget"]["masked_mse"]
    controls = [metrics[side]["fresh_decoder"]["visible_pixels"] for side in ("before", "after")]
    assert controls[0] == controls[1]
    card = (outcome.output_dir / "pipeline" / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "to take **noise** for pictures of **2, 5**" in card
    assert "| forget_alpha | 0.25 |" in card and "replay_weight" not in card

    key = json.loads((outcome.output_dir / ".stages" / "train.json").read_text())["key"]  # that of earlier versions
    assert key["forget_alpha"] == 0.25 and not {"noise_rank", "surrogate_context", "feature_depths"} & key.keys()
    again = run(outcome.output_dir, masks=["half", "random"], encoder_l1=1e-5)
    assert set(again.metrics["seconds"]["reused"]) == {"before", "train", "after"}
    assert_close(dict(again.pipeline.mae.state_dict()), dict(after.state_dict()), rtol=0, atol=0)


def test_the_command_that_it_prints_judges_the_same_under_more_holes(outcome, capsys):
    words = shlex.split(outcome.commands["Judge the same under more holes"])
    main(words[1:])
    found, before = (
        json.loads((folder / "metrics.json").read_text())["after"]
        for folder in (Path(words[words.index("--output_dir") + 1]), outcome.output_dir)
    )
    assert {"forget, quarter", "third, ring", "retain, random"} <= set(found)
    assert found["forget"]["masked_mse"] == before["forget"]["masked_mse"]


def test_the_page_shows_truth_masked_before_and_after(outcome):
    found = [Findings.load(outcome.output_dir / "evaluation" / f"{side}.safetensors") for side in ("before", "after")]
    shown = pairs(*found)
    assert {pair["group"] for pair in shown} == {"To forget", "To retain", "Neither"}
    for pair in shown:
        truth, masked = (torch.from_numpy(np.array(pair["beside"][name])) for name in ("truth", "masked"))
        hole = torch.zeros(8, 8, dtype=torch.bool)
        hole[2:6, 2:6] = True
        assert truth[~hole].equal(masked[~hole]) and (masked[hole] == 128).all()
        after = torch.from_numpy(np.array(pair["after"]))
        assert after[~hole].equal(truth[~hole])


def test_the_page_shows_a_retrained_model_beside_a_finished_run(outcome, run, tmp_path, monkeypatch):
    monkeypatch.setattr("sa_diffusers.runs.results.write_report", write_report)  # which such runs leave out
    tiny_mae(seed=1).save_pretrained(tmp_path / "retrained")
    options = {"masks": ["half", "random"], "encoder_l1": 1e-5}
    again = run(outcome.output_dir, retrained=str(tmp_path / "retrained"), **options)
    assert set(again.metrics["seconds"]["reused"]) == {"before", "train", "after"}
    group = read_group(OPTIONS["forget_images"], "forget_images", 8, (20, 4))
    errors = examine_completions(get_family(tiny_mae(seed=1)), {"forget": group}, {}, ["half"], 0).values["forget"]
    assert again.metrics["retrained"]["forget"] == pytest.approx(errors, nan_ok=True)
    page = (outcome.output_dir / "report.html").read_text()
    tiles = re.findall(r'<span title="(\w+)">', page)
    assert tiles == ["truth", "masked", "before", "after", "retrained"] * (len(tiles) // 5) and tiles
    found = [Findings.load(outcome.output_dir / "evaluation" / f"{n}.safetensors") for n in ("before", "retrained")]
    assert found[0].beside["truth"].equal(found[1].beside["truth"]) and found[0].captions == found[1].captions
    assert not found[0].pictures.equal(found[1].pictures)


@pytest.mark.slow
def test_without_pictures_to_retain_ewc_holds_the_rest(run, tmp_path):
    alone = {"retain_images": None, "fisher_images": "digits8x8:3", "eval_masks": ["half"], "num_train_steps": 12}
    change = {}
    for weight in (1e-6, 10.0):
        outcome = run(tmp_path / str(weight), ewc_lambda=weight, **alone)
        history = json.loads((outcome.output_dir / "history.json").read_text())
        assert set(history[0]) >= {"forget_loss", "ewc_penalty"} and "retain_loss" not in history[0]
        assert "retain" not in outcome.metrics["after"]
        assert (outcome.output_dir / "fisher.safetensors").exists()
        change[weight] = history[-1]["ewc_penalty"] / weight  # in units of the Fisher
    assert change[10.0] < 0.7 * change[1e-6]


def test_a_fisher_of_few_pictures_is_of_all_classes(tmp_path):
    """A folder has them class by class; mixed ones are taken as they come."""
    group = read_group("digits8x8:0,1,3", "retain", 8, (10, 4))
    context = context_of(get_family(tiny_mae()), tmp_path, "2", "noise", fisher_samples=6, masks=["half"])
    for order, told in ((group.train.labels.argsort(stable=True), {"rows": "spread"}), (torch.randperm(30), {})):
        pictures = group.train.take(order)
        context.inputs.pictures["retain"] = replace(group, train=pictures)
        stage = PicturesStage()
        samples = stage.compute(context)
        there = 2 * pictures.sample(range(30)) - 1
        rows = [int((there - one).square().flatten(1).sum(1).argmin()) for one in samples.latents]
        assert len(pictures.labels[rows].unique()) == 3 and stage.content(context) == told
        assert told or rows == list(range(6))


@pytest.mark.slow
def test_a_fisher_of_embeddings_costs_what_retaining_does(run, tmp_path):
    """A change of one weight raises the loss of retaining by F times its square: here summed over those of a layer."""
    run(tmp_path / "run", ewc_lambda=1e-3, fisher_of="embeddings", num_train_steps=1, eval_masks=["half"],
        fisher_samples=40, images_class=None, checkpointing_steps=1)  # fmt: skip
    fisher = Fisher.load(tmp_path / "run" / "fisher.safetensors")
    assert fisher.metadata["prediction_type"] == "embeddings" and fisher.metadata["feature_depths"] == "all"
    mae = tiny_mae().mae.double()
    family = get_family(tiny_mae())
    group = read_group("digits8x8:0,1", "retain_images", 8)
    images = pixels(group)[:40].double()
    batch = family.batch(images, [Condition(mask="half")] * len(images))
    before = family.features(mae, batch)[0].detach()
    weight = mae.get_parameter("vit.layers.1.mlp.fc2.weight")
    expected = 0.0
    for index in range(weight.numel()):
        with torch.no_grad():
            weight.view(-1)[index] += 1e-4
            expected += (family.features(mae, batch)[0] - before).square().mean() / 1e-8
            weight.view(-1)[index] -= 1e-4
    found = fisher.tensors["vit.layers.1.mlp.fc2.weight"].sum()
    assert 0.8 < found / expected < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random-encoder", "retain-label"])
def test_the_authors_weights_can_be_had(run, tmp_path, name):
    outcome = run(tmp_path, method=name, authors_baselines=True, num_train_steps=2, eval_masks=["half"])
    assert "forget_loss" in json.loads((tmp_path / "history.json").read_text())[0] and outcome.metrics["after"]


@pytest.mark.slow
def test_what_is_judged_by_is_neither_surrogate_nor_held(few_pictures, tmp_path):
    def save(name: str, first: int, count: int) -> str:
        (tmp_path / name).mkdir()
        for index in range(first, first + count):
            Image.new("L", (8, 8), index).save(tmp_path / name / f"{index}.png")
        return str(tmp_path / name)

    folder, images = save("other", 100, 10), OPTIONS | {"other_images": str(tmp_path / "other")}
    for said, changes in (
        ("surrogate", {"surrogate": folder}),
        ("fisher", {"surrogate": "noise", "fisher_images": folder, "ewc_lambda": 1.0}),
    ):
        with pytest.raises(
            ValueError, match=rf"a picture of the group {said} \(other\) is one that other .* judged by"
        ):
            forget(tiny_mae(), "2, 5", output_dir=tmp_path / "run", **images | changes)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_it_computes_in_bfloat16_from_training_to_judgement(run, tmp_path):
    found = [
        run(tmp_path / precision, mixed_precision=precision, num_train_steps=3, eval_masks=["half"]).metrics
        for precision in ("bf16", "no")
    ]
    for side in ("before", "after"):
        errors = [one[side]["forget"]["masked_mse"] for one in found]
        assert errors[0] != errors[1] and errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_folder_can_take_their_place_from_python(few_pictures, tmp_path):
    (tmp_path / "grey").mkdir()
    for index in range(6):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / "grey" / f"{index}.png")
    pipeline = tiny_mae()
    options = OPTIONS | {"num_train_steps": 2, "eval_masks": ["half"]}
    forgotten = forget(pipeline, "2, 5", tmp_path / "grey", output_dir=tmp_path / "run", **options)
    assert type(forgotten) is type(pipeline) and forgotten.metrics["surrogate"] == "grey"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train_scope"] == "encoder"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forget_images": None}, "expected pictures to forget, got none"),
        ({"retain_images": None}, "nothing would hold the rest"),
        ({"retain_images": None, "ewc_lambda": 1.0}, "the Fisher needs pictures"),
        ({"surrogate": "three"}, "expected the surrogate noise, other, .* got 'three'"),
        ({"surrogate": "./nowhere"}, "or a folder"),
        ({"masks": ["hole"]}, "expected a mask of half"),
        ({"masks": []}, "expected a mask to forget under"),
        ({"forget_images": "digits8x8:2,12"}, "forget_images: digits8x8:2,12 has no class '12'"),
        ({"forget_images": "./nowhere"}, "forget_images: expected a folder of pictures"),
        ({"other_images": "digits8x8:1"}, "a picture is in the groups retain .0, 1. and other .1."),
        (
            {"fisher_images": "digits8x8:5", "ewc_lambda": 1.0},
            "a picture is in the groups forget .2, 5. and fisher .5.; remove it from one",
        ),
        ({"track_steps": 1}, "knows no track_steps"),
        ({"train_scope": "full"}, "encoder trains by features, which no weight of the decoder makes"),
        ({"lora_rank": 2}, "adapters are not trained by encoder"),
        ({"method": "max-loss", "retain_images": None, "ewc_lambda": None}, "nothing would hold the rest"),
        ({"timestep_range": [0, 0.5]}, "are of models that fill holes by denoising; omit them"),
        ({"surrogate_context": "real"}, "are of models that fill holes by denoising; omit them"),
        ({"feature_depths": [1]}, "feature_depths from -1 to 0"),
        ({"authors_baselines": True}, "encoder takes no authors_baselines; omit it"),
        ({"method": "max-loss", "feature_depths": [0], "ewc_lambda": None}, "max-loss takes no feature_depths"),
        ({"method": "max-loss", "authors_baselines": True, "ewc_lambda": None}, "max-loss takes no authors_baselines"),
        (
            {"method": "max-loss", "noise": "gaussian", "noise_rank": 2, "ewc_lambda": None},
            "max-loss takes no noise_rank",
        ),
        ({"surrogate": "other", "noise": "gaussian", "noise_rank": 2}, "got other and gaussian; omit it"),
        ({"noise": "gaussian", "noise_rank": 64, "forget_images": "digits8x8:2,5"}, "and their 64 values"),
        ({"fisher_of": "embeddings", "ewc_lambda": 0.0}, "fisher_of embeddings is for EWC"),
        (
            {"surrogate": "nearest", "retain_images": None, "ewc_lambda": 1.0, "fisher_images": "digits8x8:3"},
            "those to forget would stand for themselves",
        ),
        ({"classifier": ["one", "two"]}, "pictures are read by one classifier, got one, two; omit the others"),
        ({"retain_bound": 0.1, "retain_weight": 2.0}, "retain_bound needs retain_images, and no retain_weight"),
        ({"retain_bound": 0.1, "gradient_accumulation_steps": 2}, "compares gradients of a whole batch: one process"),
        ({"method": "random-encoder", "retain_bound": 0.1}, "random-encoder takes no retain_bound; omit it"),
        (
            {"method": "finetune", "forget_images": None, "retain_images": None, "retrained": "x"},
            "^retrained: finetune forgets words or classes; pass --method encoder",
        ),
        ({"method": "finetune"}, "forgets words or classes; pass --method encoder"),
    ],
)
def test_what_makes_no_sense_is_refused(run, tmp_path, changes, said):
    changes = {"concept": "2", "surrogate": "noise"} | changes
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("name", ["i2i_mae", "i2i_tokens", "i2i_pixels", "i2i_sd"])
def test_the_papers_settings_name_pictures_that_must_be_there(tmp_path, monkeypatch, name):
    file = Path(__file__).parents[2] / "configs" / "paper" / f"{name}.yaml"
    config = parse_config(ForgetConfig, ["--config", str(file), "--output_dir", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^forget_images: expected a folder of pictures or a data set, got [^\n]*$"):
        run_forgetting(config, tiny_mae())
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        (tiny_mae(channels=3), r"retrained: expected a model of \(1, 8, 8\) .* got \(3, 8, 8\)"),
        (tiny_tokens(), "retrained: expected a MaskedAutoencoderInpaintPipeline as the model is, got TokenInpaint"),
    ],
)
def test_a_retrained_model_of_another_kind_is_refused_before_training(run, tmp_path, pipeline, said):
    pipeline.save_pretrained(tmp_path / "retrained")
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", retrained=str(tmp_path / "retrained"))
    assert not (tmp_path / "run" / "evaluation").exists()


def test_pictures_of_another_mode_are_refused(few_pictures, tmp_path):
    pipeline = tiny_mae(channels=3)
    with pytest.raises(
        ValueError, match="expected pictures in RGB, as the model completes, got grey pictures of 2, 5"
    ):
        forget(pipeline, "2, 5", "noise", output_dir=tmp_path / "run", **OPTIONS)


def test_models_that_complete_nothing_are_refused(tiny_pipeline_dir, tmp_path):
    with pytest.raises(
        ValueError, match="encoder needs a model that completes pictures, which a stable diffusion does not"
    ):
        run_forgetting(ForgetConfig(model=str(tiny_pipeline_dir), output_dir=str(tmp_path / "run"), **OPTIONS))
