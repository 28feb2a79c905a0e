"""Training that starts at a closed-form edit: weights and adapters against it, and EWC that knows the model before."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sa_diffusers.editing import ClosedFormEdit, closed_form_edit, start_from_edit
from sa_diffusers.families.scopes import select_parameters
from sa_diffusers.forgetting import forget
from sa_diffusers.lora import adapted_layers, add_lora, fuse_lora
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline


EDITED = ("attn2.to_k.weight", "attn2.to_v.weight")


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline().unet


@pytest.fixture
def edit() -> ClosedFormEdit:
    rows = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[2] *= torch.logspace(-2, 0, 8, dtype=torch.float64)  # directions that count differently
    return closed_form_edit([(rows[0], rows[1])], [rows[2]], erase_scale=0.7, preserve_scale=0.9, regularization=1e-3)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_weights_start_where_the_edit_puts_them(unet, edit):
    expected, before = copy.deepcopy(unet), state(unet)
    edit.apply(expected)
    start_from_edit(unet, select_parameters(unet, "full"), edit)
    assert_close(state(unet), state(expected), rtol=0, atol=0)
    moved = {name for name, value in state(unet).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith(EDITED)} and len(moved) == 8


@pytest.mark.parametrize("rank", [8, 11])
def test_an_adapter_of_full_rank_holds_the_edit(rank, unet, edit):
    expected = copy.deepcopy(unet)
    edit.apply(expected)
    start_from_edit(unet, add_lora(unet, adapted_layers(unet, "full", "attention"), rank, 3.0, 0), edit)
    fuse_lora(unet)
    assert_close(state(unet), state(expected), rtol=1e-4, atol=1e-5)


def test_a_smaller_adapter_is_the_best_there_is(unet, edit):
    """In the metric of the Gram matrix, by its symmetric root where the code takes Cholesky's; and no worse beside."""
    changes = add_lora(unet, adapted_layers(unet, "xattn", "attention"), 2, 6.0, 0)
    lengths = {name: change.down.detach().norm(dim=1) for name, change in changes.items()}
    start_from_edit(unet, changes, edit)
    values, vectors = torch.linalg.eigh(edit.gram)
    root = vectors @ values.sqrt().diag() @ vectors.T
    for name, change in changes.items():
        layer = unet.get_submodule(name.removesuffix(".weight"))
        if not name.endswith(EDITED):
            assert not change.delta().any(), name  # queries and outputs begin as ever
            continue
        wanted = layer.get_base_layer().weight.double() @ edit.change

        def cost(delta, wanted=wanted):
            return ((wanted - delta) @ edit.gram @ (wanted - delta).T).trace()

        best = torch.linalg.svdvals(wanted @ root)[2:].square().sum()
        found = change.delta().detach().double()
        assert_close(cost(found), best, rtol=1e-3, atol=1e-7)
        left, values_, right = torch.linalg.svd(wanted)
        assert cost(left[:, :2] * values_[:2] @ right[:2]) > best * 1.01  # another two directions than the metric's
        assert_close(change.down.detach().norm(dim=1), lengths[name])


def test_there_must_be_something_to_edit(unet, edit):
    with pytest.raises(ValueError, match="expected keys or values of cross-attention"):
        start_from_edit(unet, select_parameters(unet, "noxattn"), edit)


@pytest.fixture(scope="module")
def start(run_cheaply):
    """Run in a folder, from the saved pipeline."""
    return partial(run_cheaply, num_train_steps=2, replay_target="model", surrogate_target="model", start="edit")


@pytest.mark.usefixtures("few_pictures")
class TestRuns:
    @pytest.mark.parametrize("lora_rank", [None, 8])
    def test_no_step_is_the_edit_and_ewc_holds_to_the_model_before(self, lora_rank, start, tmp_path):
        run = start(tmp_path / "run", lora_rank=lora_rank, learning_rate=1e-9)
        history = json.loads((run.output_dir / "history.json").read_text())
        assert history[0]["ewc"] > 0  # the distance of the edit; without one it is exactly 0 at the first step
        edited = start(tmp_path / "uce", method="uce", lora_rank=None)
        assert_close(state(run.pipeline.unet), state(edited.pipeline.unet), rtol=1e-3, atol=1e-4)

    def test_training_goes_on_from_there(self, start, tmp_path):
        """And the frozen teacher is the model before the edit: under a prompt to keep its target has not moved."""
        run, plain = (start(tmp_path / name, start=name, num_train_steps=1) for name in ("edit", "model"))
        first, other = (json.loads((o.output_dir / "history.json").read_text())[0] for o in (run, plain))
        assert other["ewc"] == 0 and other["replay_loss"] < 1e-9 < first["replay_loss"]
        assert run.metrics != plain.metrics
        assert "closed-form edit" in (run.output_dir / "pipeline" / "README.md").read_text()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train_scope": "noxattn"}, "which train_scope noxattn leaves out"),
            ({"surrogate": "noise", "surrogate_target": "noise"}, "expected a prompt as surrogate"),
        ],
    )
    def test_what_cannot_be_is_refused_before_anything_is_drawn(self, options, message, start, tmp_path):
        with pytest.raises(ValueError, match=message):
            start(tmp_path / "run", **options)
        assert not (tmp_path / "run" / "samples").exists()

    def test_a_vae_has_no_text(self):
        vae = ConditionalVAE(image_size=4, hidden_sizes=(8,), latent_dim=2, num_classes=2)
        with pytest.raises(ValueError, match="start edit edits what a model makes of text"):
            forget(ConditionalVAEPipeline(vae), "0", "1", start="edit", replay_target="noise")
