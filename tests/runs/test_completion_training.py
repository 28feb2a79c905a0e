"""Training of models that complete pictures: it learns, goes on where it was interrupted, and refuses nonsense."""

import pytest
import torch
from torch.testing import assert_close

from sa_diffusers.cli.train_base import main
from sa_diffusers.data.picture_groups import read_group
from sa_diffusers.evaluation.completion import completed, masked_errors
from sa_diffusers.families import get_family
from sa_diffusers.families.architectures import build_masked_autoencoder
from sa_diffusers.io.loading import load_pipeline
from sa_diffusers.runs.base.completion import HoleBatches, MaskedAutoencoderConfig


SMALL = {
    "image_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "decoder_hidden_size": 16,
    "decoder_num_layers": 1, "train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 50,
}  # fmt: skip


def train(folder, **options):
    flags = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": folder} | options).items()]
    main(["--family", "masked_autoencoder", *flags])
    return load_pipeline(str(folder / "pipeline"), None, None, "float32")


@pytest.mark.slow
def test_it_learns_and_goes_on_where_it_was_interrupted(tmp_path):
    whole = train(tmp_path / "whole", num_train_steps=60, checkpointing_steps=30)
    newest = max((tmp_path / "whole" / "checkpoints").glob("step_*"))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    resumed = train(tmp_path / "whole", num_train_steps=60, checkpointing_steps=30)
    assert_close(dict(resumed.mae.state_dict()), dict(whole.mae.state_dict()), rtol=0, atol=0)
    group = read_group("digits8x8", "dataset", 8)
    fresh = build_masked_autoencoder(MaskedAutoencoderConfig(**SMALL), 1, 0)
    errors = [masked_errors(*completed(get_family(p), group, "half", 0)).mean() for p in (fresh, whole)]
    assert errors[1] < 0.9 * errors[0]
    positions = "vit.embeddings.position_embeddings"
    assert whole.mae.get_parameter(positions).equal(fresh.mae.get_parameter(positions))


def test_batches_have_holes_of_one_kind_as_often_as_asked():
    config = MaskedAutoencoderConfig(**SMALL | {"holes": ["half=3", "random=1"], "train_batch_size": 4})
    family = get_family(build_masked_autoencoder(config, 1, 0))
    batches = HoleBatches(family, read_group("digits8x8", "dataset", 8).train, config)
    half = family.holes([family.example])[0, 0, ::2, ::2].flatten()
    alike = [(batches(step)["hidden"] == half).all().item() for step in range(200)]
    assert 0.65 < sum(alike) / 200 < 0.85
    drawn = batches(alike.index(False))["hidden"]
    assert drawn.sum(1).tolist() == [8] * 4 and not drawn[0].equal(drawn[1])  # each picture has its own
    assert torch.equal(batches(7)["sample"], batches(7)["sample"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"holes": ["half"]}, "expected holes such as half=10, got 'half'"),
        ({"holes": ["hole=1"]}, "expected a mask of half"),
        ({"dataset": "pictures"}, "expected a data_dir with dataset pictures"),
        ({"dataset": "digits8x8", "data_dir": "x"}, "none with digits8x8"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        MaskedAutoencoderConfig(**options)


def test_holes_are_those_of_the_model():
    data = read_group("digits8x8", "dataset", 8).train
    with pytest.raises(ValueError, match="the mask 'ring 80' hides 0 of 4 x 4 patches"):
        config = MaskedAutoencoderConfig(**SMALL | {"holes": ["half=1", "ring 80=1"]})  # not of every model
        HoleBatches(get_family(build_masked_autoencoder(config, 1, 0)), data, config)


def test_an_architecture_that_does_not_fit_is_refused():
    for options, said in (
        ({"patch_size": 3}, "patch_size that divides image_size 8, got 3"),
        ({"hidden_size": 20}, "4 x 2 heads"),
    ):
        with pytest.raises(ValueError, match=said):
            build_masked_autoencoder(MaskedAutoencoderConfig(**SMALL | options), 1, 0)
