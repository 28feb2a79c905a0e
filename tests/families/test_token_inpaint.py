"""Models of tokens: the pipeline, the family, its loss and features, forgetting, and training one."""

import copy
import json
import math
import shutil

import pytest
import torch
from tiny_tokens import ARCHITECTURE, tiny_tokens
from torch.nn import functional as F
from torch.testing import assert_close

from sa_diffusers import forget
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.objectives import OutputForgetting
from sa_diffusers.families import get_family
from sa_diffusers.families.completion.networks import build_token_inpaint
from sa_diffusers.io.loading import check_model, load_pipeline
from sa_diffusers.pipelines import TokenInpaintPipeline
from sa_diffusers.pipelines.pictures import generators_of
from sa_diffusers.runs.base.completion import HoleBatches, read_pictures
from sa_diffusers.runs.base.tokens import TokenInpaintConfig, train_token_inpaint


@pytest.fixture(scope="module")
def pipeline():
    return tiny_tokens()


@pytest.fixture(scope="module")
def family(pipeline):
    return get_family(pipeline)


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


HOLE = torch.zeros(1, 1, 8, 8).index_fill(3, torch.tensor([2, 3, 4, 5]), 1.0)
HALF = [Condition(mask="half")] * 3


@torch.no_grad()
def test_holes_are_filled_as_a_slow_loop_fills_them_and_the_rest_stays(pipeline):
    given, steps = images(2), 3
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    filled = pipeline(given, HOLE, seeds, steps, output_type="pt").images
    model, vq = copy.deepcopy(pipeline.transformer).double(), pipeline.vq
    for index, seed in enumerate((4, 5)):
        generator = torch.Generator().manual_seed(seed)
        picture = 2 * given[index : index + 1] - 1
        latents = vq.encode(picture * (HOLE == 0)).latents[0].flatten(1).T
        tokens = [int((vq.quantize.embedding.weight - latent).norm(dim=1).argmin()) for latent in latents]
        left = [place for place in range(16) if place % 4 in (1, 2)]
        for step in range(1, steps + 1):
            hidden = torch.tensor([[place in left for place in range(16)]])
            logits = model(torch.tensor([tokens]), hidden).logits[0]
            gumbel = -(-torch.rand(2, 16, 16, generator=generator).log()).log()
            sure = {}
            for place in left:
                tokens[place] = int((logits[place] + gumbel[0, place]).argmax())
                noise = pipeline.config.choice_temperature * (1 - step / steps) * gumbel[1, place, 0]
                sure[place] = logits[place].log_softmax(0)[tokens[place]] + noise
            stay = 0 if step == steps else math.floor(8 * math.cos(math.pi / 2 * step / steps))
            left = sorted(left, key=sure.__getitem__)[:stay]
        codes = vq.quantize.embedding.weight[torch.tensor(tokens)].T.view(1, 4, 4, 4)
        made = (vq.decode(codes, force_not_quantize=True).sample.clamp(-1, 1) + 1) / 2
        assert_close(filled[index], torch.where(HOLE > 0, made, given[index])[0], rtol=1e-4, atol=1e-5)
    assert filled[..., :2].equal(given[..., :2]) and (filled - given).abs().max() > 0.1


def test_seeds_decide_and_batches_do_not(family):
    given = 2 * images(3) - 1
    filled = family.complete(given, HALF, [1, 2, 3])
    assert_close(family.complete(given[1:2], HALF[:1], [2])[0], filled[1])
    assert not family.complete(given[1:2], HALF[:1], [9])[0].equal(filled[1])
    hole = family.holes(HALF[:1])
    assert hole[0, 0, 2:6, 2:6].all() and hole.sum() == 16


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_what_is_hidden_and_sees_nothing_of_it(family, pipeline):
    given, loss = 2 * images(3) - 1, family.loss
    batch = family.batch(given, HALF)
    noise = loss.sample_noise(batch, torch.Generator().manual_seed(0))
    nothing = torch.zeros(3)
    truth = pipeline.tokenise(given)
    for values, drawn in ((loss(pipeline.transformer, batch, nothing.long(), noise), noise), (
        loss(pipeline.transformer, batch, nothing.long(), nothing), None
    )):  # fmt: skip
        for index in range(3):
            hole, hidden = batch["hidden"][index], batch["hidden"][index].clone()
            if drawn is not None:
                for place in range(16):
                    hidden[place] &= drawn[index, 1 + place] < math.cos(math.pi / 2 * drawn[index, 0])
            seen = pipeline.tokenise(given[index : index + 1] * ~family.holes(HALF[:1]))[0]
            shown = torch.where(hole, truth[index], seen)
            logits = pipeline.transformer(shown[None], hidden[None]).logits[0]
            errors = [F.cross_entropy(logits[place], truth[index, place]) for place in hidden.nonzero()[:, 0]]
            assert_close(values[index], torch.stack(errors).mean() if errors else torch.zeros(()))
    other = given.where(~family.holes(HALF), torch.ones(()))
    (found,), (same,) = (
        family.features(pipeline.transformer, family.batch(pixels, HALF)) for pixels in (given, other)
    )
    assert found.shape == (3, 16, 16) and found.equal(same)
    as_tokens = loss(pipeline.transformer, batch, nothing.long(), nothing, truth)
    as_logits = loss(pipeline.transformer, batch, nothing.long(), nothing, 1e4 * F.one_hot(truth, 16).float())
    assert_close(as_tokens, loss(pipeline.transformer, batch, nothing.long(), nothing))
    assert_close(as_logits, as_tokens)


def test_features_are_the_encoders_of_the_scope(family, pipeline):
    batch = family.batch(2 * images(2) - 1, HALF[:2])
    (found,) = family.features(pipeline.transformer, batch)
    found.sum().backward()
    reached = {name for name, p in pipeline.transformer.named_parameters() if p.grad is not None}
    assert reached == set(family.trainable("encoder")) < set(family.trainable("full"))
    pipeline.transformer.zero_grad()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": images(1)[..., :6, :]}, "expected 8 x 8 pixels in 1 channels"),
        ({"mask_image": torch.zeros(1, 1, 8, 8)}, "leave something to fill .* 0 of 16 patches"),
        ({"mask_image": HOLE.repeat(2, 1, 1, 1)}, "expected 1 mask or 1, got 2"),
        ({"num_inference_steps": 0}, "num_inference_steps 1 or more"),
        ({"generator": [torch.Generator()] * 2}, "expected 1 generator or 1, got 2"),
    ],
)
def test_what_cannot_be_filled_is_refused(pipeline, change, said):
    with pytest.raises(ValueError, match=said):
        pipeline(**{"image": images(1), "mask_image": HOLE} | change)


def test_saved_pipelines_load_and_parts_that_do_not_fit_are_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    check_model(str(tmp_path))
    loaded = load_pipeline(str(tmp_path), None, None, "float32")
    assert type(loaded) is TokenInpaintPipeline
    drawn = [
        one(images(2), HOLE, torch.Generator().manual_seed(0), output_type="pt").images for one in (loaded, pipeline)
    ]
    assert_close(*drawn)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"rows": 3}))
    with pytest.raises(ValueError, match="a transformer of the 16 codes and 4 rows .* got num_tokens 16 and rows 3"):
        check_model(str(tmp_path))


OPTIONS = {
    "forget_images": "digits8x8:2,5", "retain_images": "digits8x8:0,1", "eval_masks": ["half"], "images_class": 8,
    "eval_images_class": 2, "num_train_steps": 6, "train_batch_size": 4, "lr_warmup_steps": 1,
    "checkpointing_steps": 6, "logging_steps": 1, "num_inference_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vq", {"sample_size": 9}),
        ("vq", {"sample_size": [8, 8]}),
        ("vq", {"in_channels": 2, "out_channels": 2}),
    ],
)
def test_a_codebook_of_other_pictures_is_refused(pipeline, tmp_path, part, change):
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="expected a VQModel of square pictures, grey or RGB, of a size that 2 div"):
        check_model(str(tmp_path))


def test_rivals_train_by_the_training_loss_which_shows_parts_of_holes(family):
    hidden = []

    def seen(tokens: torch.Tensor, left: torch.Tensor):
        hidden.append(left.sum(1))
        return family.module(tokens, left)

    batch = family.batch(2 * images(64) - 1, [Condition(mask="half")] * 64)
    objective = OutputForgetting(family.loss, None, "own", 1.0, 1.0, {}, family.noised)
    drawn = objective.draw({"forget": batch, "retain": batch}, torch.Generator().manual_seed(0))
    objective(seen, drawn)
    whole = int(batch["hidden"][0].sum())
    assert all(one.unique().numel() > 1 and one.float().mean() < 0.8 * whole for one in hidden)
    assert_close(family.features(family.module, drawn["forget"]), family.features(family.module, batch))


def test_places_weigh_as_much_as_tokens_at_the_start():
    fresh = build_token_inpaint(TokenInpaintConfig(**ARCHITECTURE), tiny_tokens().vq, 0).transformer
    assert 0.5 < fresh.positions.std() / fresh.embedding.weight.std() < 2


@pytest.mark.slow
def test_training_and_forgetting_compute_in_bfloat16(few_pictures, tmp_path):
    options = ARCHITECTURE | {"vq_warmup_steps": 2, "vq_steps": 2, "num_train_steps": 2, "train_batch_size": 4}
    trained = train_token_inpaint(
        TokenInpaintConfig(**options, mixed_precision="bf16", output_dir=str(tmp_path / "base"))
    )
    after = forget(
        trained, "2, 5", "other", output_dir=tmp_path / "run", mixed_precision="bf16", method="encoder", **OPTIONS
    )
    assert after.metrics["before"] != after.metrics["after"]
    key = json.loads((tmp_path / "run" / ".stages" / "after.json").read_text())["key"]
    assert key["compute_dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["encoder", "noisy-label", "retain-label"])
def test_methods_of_completion_forget_in_it(method, few_pictures, tmp_path):
    ewc = {"ewc_lambda": 1e-3, "fisher_samples": 4} if "encoder" in method else {}
    before = tiny_tokens()
    after = forget(before, "2, 5", "other", output_dir=tmp_path / "run", method=method, **OPTIONS, **ewc)
    changed = {n for n, p in after.transformer.named_parameters() if not p.equal(before.transformer.get_parameter(n))}
    scope = "encoder" if "encoder" in method else "full"
    assert changed == set(get_family(before).trainable(scope))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert {"retain_loss"} | ({"ewc_penalty"} if ewc else set()) <= set(history[-1])
    assert after.metrics["after"]["forget"]["num_images"] == 4


@pytest.mark.slow
def test_training_learns_and_goes_on_where_it_was_interrupted(tmp_path):
    options = ARCHITECTURE | {
        "vq_warmup_steps": 20, "vq_steps": 20, "num_train_steps": 40, "checkpointing_steps": 20, "logging_steps": 10,
        "train_batch_size": 16, "learning_rate": 3e-3, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config = TokenInpaintConfig(**options)
    whole = train_token_inpaint(config)
    for part in ("codebook", "transformer"):
        shutil.rmtree(max((tmp_path / "run" / "checkpoints" / part).glob("step_*")))
    (tmp_path / "run" / "parts" / "vq").rename(tmp_path / "vq")
    resumed = train_token_inpaint(config)
    for part in ("vq", "transformer"):
        assert_close(*(dict(getattr(one, part).state_dict()) for one in (resumed, whole)), rtol=0, atol=0)
    data = read_pictures(config)
    assert whole.tokenise(2 * data.sample(range(64)) - 1).unique().numel() >= 8  # half of the codes are in use
    fresh, batch = (
        build_token_inpaint(config, whole.vq, 0).transformer,
        HoleBatches(get_family(whole), data, config)(0),
    )
    nothing = torch.zeros(16)
    losses = [get_family(whole).loss(one, batch, nothing.long(), nothing).mean() for one in (fresh, whole.transformer)]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 15}, "a hidden_size that 2 heads divide, got 15"),
        ({"vq_channels": [4, 6]}, r"vq_channels that divide by 4 and halve image_size 8 to 2 or more, got \[4, 6\]"),
        ({"vq_channels": [4] * 4}, "halve image_size 8 to 2 or more"),
        ({"num_codes": 4000}, "num_codes up to 3200, .* got 4000"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_before_training(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train_token_inpaint(TokenInpaintConfig(**ARCHITECTURE | {"output_dir": str(tmp_path / "run")} | change))
    assert not (tmp_path / "run").exists()


def test_without_a_generator_the_seed_is_0():
    assert [one.initial_seed() for one in generators_of(None, 2)] == [0, 0]
    with pytest.raises(ValueError, match="expected 1 generator or 2, got 3"):
        generators_of([torch.Generator()] * 3, 2)
