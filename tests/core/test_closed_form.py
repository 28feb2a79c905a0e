"""Training that starts at a closed-form edit: weights and adapters against it, and EWC that knows the model before."""

import copy
import json
from functools import partial

import pytest
import torch
from cheap_runs import context_of
from fake_hub import cache_repository
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close

from sa_diffusers.cli.adapters.choose import choose
from sa_diffusers.core.closed_form import ClosedFormEdit, closed_form_edit, start_from_edit
from sa_diffusers.core.objectives import LowRankChange
from sa_diffusers.families import get_family
from sa_diffusers.families.base import select_parameters
from sa_diffusers.families.scopes import SCOPES, adapted_layers, is_text_map, text_maps
from sa_diffusers.io.artifacts import StageMismatch
from sa_diffusers.methods import speed
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.forget import forget
from sa_diffusers.training import loop as training
from sa_diffusers.training.lora import add_lora, fuse_lora


ROWS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # concept, target, kept
ROWS[2] *= torch.logspace(-2, 0, 8, dtype=torch.float64)  # directions that count differently
EDITED = ("attn2.to_k.weight", "attn2.to_v.weight")


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline().unet


@pytest.fixture
def edit() -> ClosedFormEdit:
    return closed_form_edit([(ROWS[0], ROWS[1])], [ROWS[2]], erase_scale=0.7, preserve_scale=0.9, regularization=1e-3)


def interrupted(optimisation) -> None:
    raise KeyboardInterrupt


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_weights_start_where_the_edit_puts_them(unet, edit):
    expected, before = copy.deepcopy(unet), state(unet)
    edit.apply(text_maps(expected))
    start_from_edit(unet, select_parameters(unet, "full", SCOPES), edit, is_text_map)
    assert_close(state(unet), state(expected), rtol=0, atol=0)
    moved = {name for name, value in state(unet).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith(EDITED)} and len(moved) == 8


@pytest.mark.parametrize("rank", [8, 11])
def test_an_adapter_of_full_rank_holds_the_edit(rank, unet, edit):
    expected = copy.deepcopy(unet)
    edit.apply(text_maps(expected))
    start_from_edit(unet, add_lora(unet, adapted_layers(unet, "full", "attention"), rank, 3.0, 0), edit, is_text_map)
    fuse_lora(unet)
    assert_close(state(unet), state(expected), rtol=1e-4, atol=1e-5)


def test_a_smaller_adapter_is_the_best_there_is(unet, edit):
    """In the metric of the Gram matrix, by its symmetric root where the code takes Cholesky's; and no worse beside."""
    changes = add_lora(unet, adapted_layers(unet, "xattn", "attention"), 2, 6.0, 0)
    lengths = {name: change.down.detach().norm(dim=1) for name, change in changes.items()}
    start_from_edit(unet, changes, edit, is_text_map)
    gram = edit.root @ edit.root.T
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ values.sqrt().diag() @ vectors.T
    for name, change in changes.items():
        layer = unet.get_submodule(name.removesuffix(".weight"))
        if not name.endswith(EDITED):
            assert not change.delta().any(), name  # queries and outputs begin as ever
            continue
        wanted = layer.get_base_layer().weight.double() @ edit.change

        def cost(delta, wanted=wanted):
            return ((wanted - delta) @ gram @ (wanted - delta).T).trace()

        best = torch.linalg.svdvals(wanted @ root)[2:].square().sum()
        found = change.delta().detach().double()
        assert_close(cost(found), best, rtol=1e-3, atol=1e-7)
        left, values_, right = torch.linalg.svd(wanted)
        assert cost(left[:, :2] * values_[:2] @ right[:2]) > best * 1.01  # another two directions than the metric's
        assert_close(change.down.detach().norm(dim=1), lengths[name])


def test_what_it_costs_by_the_edit_s_own_objective(edit):
    """By tr(N G N^T), written out as the objective of W' + N less that of W', a row at a time."""
    concept, target, kept = ROWS.unbind()
    weight, beside = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def objective(new):
        terms = [(0.7, new @ c - weight @ t) for c, t in zip(concept, target, strict=True)]
        terms += [(0.9, new @ k - weight @ k) for k in kept] + [(1e-3, new - weight)]
        return sum(scale * part.square().sum() for scale, part in terms)

    more = objective(edit.edited("", weight) + beside) - objective(edit.edited("", weight))
    assert_close((beside @ edit.root).square().sum(), more)


@pytest.mark.parametrize("shape", [(5, 8), (12, 8)])
def test_other_shapes_and_a_change_of_lower_rank_than_the_adapter(shape):
    """A concept of one row has a change of rank 1: the rest of the adapter stays free, and as it was drawn."""
    layer = nn.Linear(8, shape[0], bias=False)
    block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": layer})})
    one = closed_form_edit([(ROWS[0, :1], ROWS[1, :1])], [ROWS[2]])
    down, up = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(shape[0], 4))
    drawn = down.detach().clone()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_k"]), block)
    start_from_edit(block, {"attn2.to_k.weight": LowRankChange(down, up, 0.5)}, one, is_text_map)
    assert_close(0.5 * up @ down, one.delta("", layer.weight).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(down[1:], drawn[1:]) and not up[:, 1:].any()


def test_there_must_be_something_to_edit(unet, edit):
    with pytest.raises(ValueError, match="expected keys or values of cross-attention"):
        start_from_edit(unet, select_parameters(unet, "noxattn", SCOPES), edit, is_text_map)


@pytest.fixture(scope="module")
def start(run_cheaply):
    """Run in a folder, from the saved pipeline."""
    return partial(run_cheaply, num_train_steps=2, replay_target="model", surrogate_target="model", start="edit")


@pytest.fixture(scope="module")
def shared(start, tmp_path_factory) -> dict[str, str]:
    """Options that take samples and Fisher from a run that made them."""
    folder = start(tmp_path_factory.mktemp("shared") / "run").output_dir
    return {"samples": str(folder / "samples"), "fisher": str(folder / "fisher.safetensors")}


@pytest.fixture(scope="module")
def edited(run_cheaply, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after the edit alone."""
    return state(run_cheaply(tmp_path_factory.mktemp("edited") / "run", method="uce").pipeline.unet)


@pytest.mark.slow
@pytest.mark.usefixtures("few_pictures")
class TestRuns:
    @pytest.mark.parametrize("lora_rank", [pytest.param(None, marks=pytest.mark.slow), 8])
    def test_no_step_is_the_edit_and_ewc_holds_to_the_model_before(self, lora_rank, start, shared, edited, tmp_path):
        run = start(tmp_path / "run", lora_rank=lora_rank, learning_rate=1e-9, **shared)
        history = json.loads((run.output_dir / "history.json").read_text())
        assert history[0]["ewc_penalty"] > 0  # the distance of the edit; without one it is exactly 0 at the first step
        assert_close(state(run.pipeline.unet), edited, rtol=1e-3, atol=1e-4)

    def test_it_may_be_another_method_s_edit(self, run_cheaply, start, shared, tmp_path):
        only = state(run_cheaply(tmp_path / "only", method="speed").pipeline.unet)
        for name in ("run", "run"):  # the second time from what the first left
            run = start(tmp_path / name, edit="speed", learning_rate=1e-9, **shared)
        assert_close(state(run.pipeline.unet), only, rtol=1e-3, atol=1e-4)
        assert "SPEED's edit at threshold 0.1" in (run.output_dir / "pipeline" / "README.md").read_text()
        with pytest.raises(ValueError, match="expected edit to be one of uce, speed, got 'esd-x'"):
            start(tmp_path / "other", edit="esd-x")

    def test_speed_reads_what_is_retained_once(self, run_cheaply, tiny_pipeline, tmp_path, monkeypatch):
        first = run_cheaply(tmp_path / "first", method="speed")
        file, read, last_word = first.output_dir / "speed_retained.safetensors", [], speed._last_word
        monkeypatch.setattr(speed, "_last_word", lambda *given: read.append(given[1]) or last_word(*given))
        given = {"method": "speed", "speed_retained": str(first.output_dir)}
        run = run_cheaply(tmp_path / "folder", **given, speed_threshold=0.2, seed=7)
        again = run_cheaply(tmp_path / "first", method="speed", speed_threshold=0.2, seed=7, overwrite=True)
        assert not read and not (run.output_dir / file.name).exists()
        plain = run_cheaply(tmp_path / "plain", method="speed", speed_threshold=0.2, seed=7)
        for one in (run, again):
            assert_close(state(one.pipeline.unet), state(plain.pipeline.unet), rtol=0, atol=0)
        read.clear()
        # Of another concept it lacks the prompts that name the first.
        cache_repository("someone/retained", {file.name: file.read_bytes()})
        hub = run_cheaply(tmp_path / "hub", **given | {"speed_retained": "someone/retained"})
        assert not read and not (hub.output_dir / file.name).exists()
        other = run_cheaply(tmp_path / "other", **given | {"speed_retained": str(file)}, concept="six")
        assert sorted(read) == ["a green seven", "a red seven"] and (other.output_dir / file.name).is_file()
        plain = run_cheaply(tmp_path / "plain other", method="speed", concept="six")
        assert_close(state(other.pipeline.unet), state(plain.pipeline.unet), rtol=0, atol=0)
        with pytest.raises(FileNotFoundError, match="no embeddings at"):
            run_cheaply(tmp_path / "none", method="speed", speed_retained=str(tmp_path))
        stranger = tiny_pipeline()
        with torch.no_grad():
            next(stranger.text_encoder.parameters()).add_(1)
        with pytest.raises(ValueError, match="speed_retained: .* is of other text encoders"):
            context = context_of(get_family(stranger), tmp_path, **given)
            context.inputs.prompts.append("a red nine")
            context.method.check(context)

    @pytest.mark.parametrize("lora_rank", [None, 2])
    def test_it_may_end_with_an_edit_of_what_training_left(self, lora_rank, run_cheaply, start, shared, tmp_path):
        options = {"start": "model", "learning_rate": 1e-2, "lora_rank": lora_rank} | shared
        plain = start(tmp_path / "plain", **options)
        titles = {"uce": "Unified Concept Editing", "speed": "SPEED"}
        for edit in titles:
            expected = run_cheaply(tmp_path / edit, model=str(plain.output_dir / "pipeline"), method=edit)
            run = start(tmp_path / f"run-{edit}", finish="edit", edit=edit, **options)
            assert not (run.output_dir / "lora").exists()
            assert_close(state(run.pipeline.unet), state(expected.pipeline.unet), rtol=0, atol=0)
            said = (run.output_dir / "pipeline" / "README.md").read_text()
            assert f"by Selective Amnesia, then {titles[edit]}" in said and "finish" in said
        assert "train" in start(run.output_dir, finish="edit", edit=edit, **options).metrics["seconds"]["reused"]
        before, after = (state(one.pipeline.unet) for one in (plain, run))
        assert {name.endswith(EDITED) for name in before if not torch.equal(before[name], after[name])} == {True}
        with pytest.raises(ValueError, match="ended with an edit, which is whole or not there"):
            choose(run.output_dir, "scale", 0.5)
        with pytest.raises(ValueError, match="no surrogate is known for 'cat'"):
            run_cheaply(tmp_path / "other", finish="edit", method="esd-x", concept="cat", surrogate=None)
        for wrong in ({"method": "uce"}, {"snapshot_steps": [1]}, {"strength_sheet": True}, {"strength": 0.5}):
            with pytest.raises(
                ValueError, match="finish, or robust: an edit follows training, and the result is whole weights"
            ):
                run_cheaply(tmp_path / "other", finish="edit", **wrong)

    @pytest.mark.parametrize("replay_target", ["model", "noise"])  # with "noise" EWC copies its anchor itself
    @pytest.mark.slow
    def test_training_goes_on_from_there(self, replay_target, start, shared, edited, tmp_path):
        """And the frozen teacher is the model before the edit: under a prompt to keep its target has not moved."""
        options = {"num_train_steps": 1, "replay_negative": "none", "replay_target": replay_target} | shared
        run, plain = (start(tmp_path / name, start=name, **options) for name in ("edit", "model"))
        first, other = (json.loads((o.output_dir / "history.json").read_text())[0] for o in (run, plain))
        assert other["ewc_penalty"] == 0 < first["ewc_penalty"]
        if replay_target == "model":
            assert other["replay_loss"] < 1e-9 < first["replay_loss"]
        moved = {name for name, value in state(run.pipeline.unet).items() if not torch.equal(value, edited[name])}
        assert {name for name in moved if name.endswith(EDITED)} and {n for n in moved if not n.endswith(EDITED)}
        assert "UCE's edit at erase scale 1" in (run.output_dir / "pipeline" / "README.md").read_text()

    @pytest.mark.slow
    def test_it_resumes(self, start, shared, tmp_path, monkeypatch):
        options = {"checkpointing_steps": 1, "ema_decay": 0.5} | shared
        whole = start(tmp_path / "whole", **options)
        with monkeypatch.context() as patch:
            patch.setattr(training.Optimisation, "finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                start(tmp_path / "run", **options)
        again = start(tmp_path / "run", **options)
        assert_close(state(again.pipeline.unet), state(whole.pipeline.unet), rtol=0, atol=0)

    @pytest.mark.parametrize("method", [{"method": "uce", "start": "model", "surrogate_target": "noise"}, {}])
    @pytest.mark.slow
    def test_other_prompts_to_keep_are_another_result(self, method, start, shared, tmp_path):
        """Though nothing that is drawn depends on them, and the options name the same file."""
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red six\na green eight\n")
        options = method | {"replay_prompts": str(prompts), "samples": shared["samples"]}
        options |= {} if method else {"fisher": shared["fisher"]}
        first = state(start(tmp_path / "run", **options).pipeline.unet)
        prompts.write_text("a red nine\n")
        with pytest.raises(StageMismatch, match="prompts"):
            start(tmp_path / "run", **options)
        second = state(start(tmp_path / "run", overwrite=True, **options).pipeline.unet)
        assert any(not torch.equal(value, second[name]) for name, value in first.items())

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
        with pytest.raises(ValueError, match="start: an edit needs a model that makes keys and values of a text"):
            forget(ConditionalVAEPipeline(vae), "0", "1", start="edit", replay_target="noise")
