"""Training in parts: two processes under FSDP2 or DeepSpeed equal one process, which holds all."""

import copy
import gc
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from diffusers import DDIMScheduler
from launch_in_parts import launch_environment, on_cpus
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from sa_diffusers.core.losses import DiffusionLoss
from sa_diffusers.core.objectives import (
    ESD,
    Adversary,
    ElasticWeightConsolidation,
    LowRankChange,
    LowRankEWC,
    MixtureTarget,
    SelectiveAmnesia,
)
from sa_diffusers.core.seeding import seeded
from sa_diffusers.core.sharding import local_part, part_like, sum_over_parts, whole_like
from sa_diffusers.io.processes import processes_part
from sa_diffusers.models.precision import compute_dtype
from sa_diffusers.training.launching import check_launch
from sa_diffusers.training.loop import TrainingConfig, TrainingDiverged, train
from sa_diffusers.training.lora import WithoutLora, add_lora


STEPS = 4
FROZEN = ("time_embedding.", "conv_in.bias")
ADAPTED = ["conv_in", "to_k", "to_v", "to_out.0", "conv1", "conv_out"]  # in blocks and outside; the last has one row


def make_model() -> nn.Module:
    """A UNet of diffusers with blocks to wrap, but not all that its class names; one bias is for one process only."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(6,), layers_per_block=1, norm_num_groups=2,
        attention_head_dim=2, cross_attention_dim=5, down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None, up_block_types=("UpBlock2D",),
    )  # fmt: skip
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))
    return unet


def batches(step: int) -> dict:
    def part(name: str) -> dict:
        states = torch.randn(4, 3, 5, generator=seeded(name, "states", step))
        sample = torch.randn(4, 1, 4, 4, generator=seeded(name, step))
        return {"sample": sample, "encoder_hidden_states": states}

    return {name: part(name) for name in ("surrogate", "replayed")}


def esd_batches(step: int) -> dict:
    parts = batches(step)
    empty = parts["surrogate"] | {"encoder_hidden_states": torch.zeros(4, 3, 5)}
    return {"concept": parts["surrogate"], "empty": empty}


def further_batches(step: int) -> dict:
    """Of two groups for an adversary, and of prompts that leave the concept open."""

    def draw(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seeded(name, "further", step))

    asked = {name: {"encoder_hidden_states": draw(name, 2, 2, 3, 5)} for name in ("asked", "frozen")}
    rows = {"rows": torch.zeros(2, 2, dtype=torch.long), "start": draw("start", 2, 3, 5)}
    mixed = {"sample": draw("open", 4, 1, 4, 4), "encoder_hidden_states": draw("prompts", 4, 3, 5)}
    words = {"asked": {"encoder_hidden_states": draw("words", 4, 2, 3, 5)}}
    return {"adversary": rows | asked | {"sample": draw("sample", 2, 2, 1, 4, 4)}, "open": mixed | words}


def further_terms(loss: DiffusionLoss) -> list:
    def encode(vectors: torch.Tensor, rows: list[int]) -> dict:
        return {"encoder_hidden_states": vectors.expand(len(rows), -1, -1)}

    return [Adversary(loss, encode, 1.0, 2, 0.1), MixtureTarget(loss, 1.0, 1.0)]


def amnesia(model: nn.Module, shared_anchor: bool, further: bool = False) -> SelectiveAmnesia:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: 100 * torch.rand(p.shape, generator=seeded(name)) for name, p in trained.items()}
    anchor = {name: p.detach().clone() for name, p in trained.items()} if shared_anchor else None
    ewc = ElasticWeightConsolidation(trained, fisher, 2.0, anchor=anchor)
    loss = DiffusionLoss(torch.linspace(0.99, 0.1, 10))
    frozen = copy.deepcopy(model).requires_grad_(False) if further else None
    return SelectiveAmnesia(loss, ewc, 1.0, frozen, further_terms(loss) if further else ())


def adapter_batches(step: int) -> dict:
    """One sample alone is denoised as without the adapter, so that the other process has none."""
    return {name: part | {"distilled": torch.arange(4) == step % 4} for name, part in batches(step).items()}


def adapters(model: nn.Module, precision: str | None, further: bool = False) -> SelectiveAmnesia:
    """With low-rank EWC and a frozen model; the weights are in the precision that is computed in, as a run's are."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if dtype := compute_dtype(precision):
        model.to(dtype)
    changes = add_lora(model, ADAPTED, 3, 6.0, seed=1)
    fisher = {name: 1e3 * torch.rand(shapes[name], generator=seeded(name)) for name in changes}
    ewc = LowRankEWC(changes, fisher, 2.0)
    loss = DiffusionLoss(torch.linspace(0.99, 0.1, 10))
    return SelectiveAmnesia(loss, ewc, 1.0, WithoutLora(model), further_terms(loss) if further else ())


def esd(model: nn.Module) -> ESD:
    """Trained on latents that the model draws as it is being trained, whose parts lie on both processes."""
    scheduler, frozen = DDIMScheduler(10, clip_sample=False), copy.deepcopy(model).requires_grad_(False)
    return ESD(DiffusionLoss(scheduler.alphas_cumprod), frozen, scheduler, num_inference_steps=5)


def run(
    model: nn.Module,
    shared_anchor: bool | str | None,
    folder: Path | None = None,
    callback=None,
    drawn=None,
    further: bool = False,
    **options,
) -> list[dict]:
    """Selective Amnesia; ESD, which has no anchor, for a shared_anchor of None, or adapters for "lora"."""
    if shared_anchor == "lora":
        objective, drawn = adapters(model, options.get("mixed_precision"), further), adapter_batches
    else:
        drawn = drawn or (batches if shared_anchor is not None else esd_batches)
        objective = amnesia(model, shared_anchor, further) if shared_anchor is not None else esd(model)
    if further:
        drawn = lambda step, drawn=drawn: drawn(step) | further_batches(step)  # noqa: E731
    # Some gradients are 0 but for rounding, which Adam's usual epsilon would blow up.
    defaults = {"num_train_steps": STEPS, "train_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
                "logging_steps": 1, "checkpointing_steps": 2, "ema_decay": 0.5, "lr_warmup_steps": 2}  # fmt: skip
    history = train(
        model, objective, drawn, TrainingConfig(**defaults | options),
        seed=3, checkpoint_dir=folder, callback=callback, callback_steps=1,
    )  # fmt: skip
    if shared_anchor == "lora":  # the caller's module stays in main memory where a copy is trained
        assert (objective.frozen.module is model) == ("RANK" not in os.environ)
    return history


CASES = {
    "plain": {"shared_anchor": False, "ema_decay": None},
    "averaged": {"shared_anchor": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "esd": {"shared_anchor": None, "gradient_accumulation_steps": 2},
    "lora": {"shared_anchor": "lora", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "robust": {"shared_anchor": True, "further": True},
    "robust lora": {"shared_anchor": "lora", "further": True, "gradient_checkpointing": True},
}


def look(model: nn.Module, seen: list, interrupt_at: int | None, step: int, row: dict) -> None:
    """A callback: the model is an ordinary one, so that one process alone may use it."""
    assert not any(isinstance(p, DTensor) for p in model.parameters()) and not model.training
    if os.environ.get("RANK", "0") == "0":
        weights = model.time_embedding.linear_1.weight
        model(weights.new_zeros(1, 1, 4, 4), 1, weights.new_zeros(1, 3, 5))
    seen.append(next(p for p in model.parameters() if p.requires_grad).detach().clone())
    if step == interrupt_at:
        raise KeyboardInterrupt


def train_in_parts(way: str, folder: Path, cases: list[str]) -> None:
    """What each of two processes runs in the tests below."""
    on_cpus(way)
    if way == "deepspeed":
        import deepspeed

        from sa_diffusers.training import launching

        launching.BUCKET_SIZE = 200  # so that many are sent while backward goes on
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for a minute
    rank = int(os.environ["RANK"])
    for name in cases:
        options = CASES[name]
        interrupted, resumed, seen = make_model(), make_model(), []
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, folder=folder / name, callback=partial(look, interrupted, seen, 3), **options)
        history = run(resumed, folder=folder / name, callback=partial(look, resumed, seen, None), **options)
        assert type(resumed) is type(make_model())
        weights = resumed.state_dict()
        torch.save({"weights": weights, "history": history, "seen": seen}, folder / f"{name}_{rank}.pt")
        del interrupted, resumed
    if way == "fsdp2":
        check_parts()
        check_low_rank_parts()
    else:
        check_nothing_is_left()
        check_divergence()
    check_last_look(folder)


class LastLook(SelectiveAmnesia):
    """Its loss is finite in training, and in the last look at what came of it infinite on the second process only."""

    calls = 0

    def __call__(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        self.calls += 1
        loss, parts = super().__call__(model, batch)
        assert loss.requires_grad == (self.calls == 1)
        return loss * (math.inf if self.calls == 2 and os.environ["RANK"] == "1" else 1), parts


def check_last_look(folder: Path) -> None:
    """No step comes after the last that would tell; both processes find it, and nothing of it is kept."""
    for name, options in {
        "diverged": {"learning_rate": 1e30},
        "average": {"learning_rate": 1e30, "ema_decay": 0.5},
    }.items():
        with pytest.raises(TrainingDiverged, match="loss nan after step 1: .*no checkpoint was written"):
            run(make_model(), False, folder / name, num_train_steps=1, lr_warmup_steps=0, **options)
    config = TrainingConfig(num_train_steps=1, train_batch_size=4, checkpointing_steps=1)
    model = make_model()
    with pytest.raises(TrainingDiverged, match="loss inf after step 1"):
        train(
            model,
            LastLook(DiffusionLoss(torch.linspace(0.99, 0.1, 10)), None),
            batches,
            config,
            seed=3,
            checkpoint_dir=folder / "one",
        )
    assert not list(folder.glob("one/step_*"))


def check_nothing_is_left() -> None:
    """Neither an interrupted training nor one that ended keeps its copy of the model."""
    gc.collect()
    kind = type(make_model())
    assert not [one for one in gc.get_objects() if type(one) is kind]


def check_divergence() -> None:
    def broken(step: int) -> dict:
        scale = math.nan if step == 2 else 1.0
        return {name: part | {"sample": part["sample"] * scale} for name, part in batches(step).items()}

    with pytest.raises(TrainingDiverged, match="gradient norm inf at step 3: one is not finite"):
        run(make_model(), shared_anchor=False, drawn=broken)


def check_parts() -> None:
    """Parts of tensors that do not divide by the processes, or are shorter than these are many; on both processes."""
    mesh = init_device_mesh("cpu", (2,))
    for length in (1, 2, 5):
        whole = torch.arange(3.0 * length).view(length, 3)
        parameter = distribute_tensor(whole, mesh, [Shard(0)])
        part = part_like(whole, parameter)
        assert_close(part, local_part(parameter))
        assert part.numel() == 0 or part.data_ptr() in range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
        assert_close(whole_like(part, parameter), whole)
        assert_close(sum_over_parts(part.sum(), parameter), whole.sum())
    # Hybrid sharding: what several processes hold counts once.
    parameter = distribute_tensor(whole, init_device_mesh("cpu", (2, 1)), [Replicate(), Shard(0)])
    assert_close(part_like(whole, parameter), whole)
    assert_close(sum_over_parts(whole.sum(), parameter), whole.sum())


def check_low_rank_parts() -> None:
    """EWC of adapters in parts is the whole one's part, in float64: linear, of one row, and a convolution's."""
    shapes = {"linear": ((3, 4), (5, 3)), "row": ((1, 4), (1, 1)), "conv": ((3, 2, 3, 3), (4, 3, 1, 1))}
    for size, placements in (((2,), [Shard(0)]), ((2, 1), [Replicate(), Shard(0)])):
        mesh = init_device_mesh("cpu", size)
        changes, fisher, parameters = {}, {}, {}
        for name, pair in shapes.items():
            draw = {"generator": seeded(name), "dtype": torch.float64}
            down, up = (nn.Parameter(torch.randn(shape, **draw)) for shape in pair)
            fisher[name] = torch.rand(len(up), *down.shape[1:], **draw)
            changes[name] = LowRankChange(down, up, 1.5, (f"{name}.down", f"{name}.up"))
            for part, matrix in zip(changes[name].names, (down, up), strict=True):
                parameters[part] = nn.Parameter(distribute_tensor(matrix.detach(), mesh, placements))
        whole, parts = (LowRankEWC(changes, fisher, 0.7, torch.float64) for _ in range(2))
        parts.attach(parameters)
        assert [len(f) for f in parts.fisher] == [len(local_part(p)) for n, p in parameters.items() if "up" in n]
        assert_close(parts.value(), whole.value())
        for ewc in (whole, parts):
            ewc.add_gradient()
        for change in changes.values():
            for name, matrix in zip(change.names, (change.down, change.up), strict=True):
                assert_close(local_part(parameters[name].grad), part_like(matrix.grad, parameters[name]))


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the first precision that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def names_in(checkpoint: Path) -> set[str]:
    """Of the weights that it holds."""
    if (parts := checkpoint / "pytorch_model_fsdp_0").exists():
        return {n.removeprefix("model.") for n in FileSystemReader(parts).read_metadata().state_dict_metadata}
    state = torch.load(checkpoint / "pytorch_model" / "mp_rank_00_model_states.pt", weights_only=False)
    assert not state["frozen_param_fragments"]
    return set(state["module"])


def compare_two_processes(way: str, folder: Path, cases: list[str], precision: str, **options: str) -> int:
    """They equal one: weights, their average, losses, EWC's value, the gradient's norm; interrupted and resumed.

    Returns how many results were compared: one of each process and case.
    """
    compared = 0
    tolerance = {"no": 1e-4, "bf16": 1e-2}[precision]
    environment = launch_environment(way, mixed_precision=precision, **options)
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    if way == "fsdp2":
        environment["ACCELERATE_USE_CPU"] = "true"  # which turns DeepSpeed off
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__,
         way, str(folder), *cases],
        check=True, env=environment, timeout=200,
    )  # fmt: skip
    close = {"rtol": tolerance, "atol": tolerance / 10}
    for name in cases:
        one, seen = make_model(), []
        history = run(one, callback=partial(look, one, seen, None), mixed_precision=precision, **CASES[name])
        trained = {n for n, p in one.named_parameters() if p.requires_grad}
        assert names_in(folder / name / f"step_{STEPS:07d}") == trained
        assert name == "esd" or history[-1]["ewc_penalty"] > 0.01
        for rank in (0, 1):
            result = torch.load(folder / f"{name}_{rank}.pt")
            assert_close(result["weights"], one.state_dict(), **close)
            # The third step was seen twice: before the interruption, and after going on from the second.
            assert_close(result["seen"], [*seen[:3], *seen[2:]], **close)
            assert name == "esd" or result["history"][0]["ewc_penalty"] == 0
            for row, expected in zip(result["history"], history, strict=True):
                assert row == pytest.approx(expected, rel=10 * tolerance, abs=tolerance / 10)
            compared += 1
    return compared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cases"),
    [
        ("no", ["plain", "averaged", "esd"]),
        ("no", ["lora"]),
        ("bf16", ["averaged", "lora"]),
        ("no", ["robust", "robust lora"]),
    ],
)
def test_two_processes_with_a_part_of_the_weights_each_equal_one_with_all(
    tmp_path, fresh_accelerator, precision, cases
):
    assert compare_two_processes("fsdp2", tmp_path, cases, precision) == 2 * len(cases)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "cases"),
    [
        ("1", "no", ["averaged"]),
        ("2", "no", ["plain", "averaged", "lora"]),
        ("2", "bf16", ["averaged", "lora"]),
        ("2", "no", ["robust", "robust lora"]),
    ],
)
def test_two_processes_under_deepspeed_equal_one(tmp_path, fresh_accelerator, stage, precision, cases):
    pytest.importorskip("deepspeed", reason="an extra, which .ci/run installs for this test alone")
    assert compare_two_processes("deepspeed", tmp_path, cases, precision, zero_stage=stage) == 2 * len(cases)


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture
def deepspeed_installed(monkeypatch):
    monkeypatch.setattr("sa_diffusers.training.launching.is_deepspeed_available", lambda: True)


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "zero_stage 1 or 2, .*got zero_stage 3; .*fsdp2"),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {},
            "got offload_optimizer_dev.* cpu;",
        ),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"},
            {},
            "got config_file zero.json;",
        ),
        (DEEPSPEED, {"mixed_precision": "fp16"}, "expected bf16 or no"),
        (DEEPSPEED, {"optimizer": "adamw_8bit"}, "expected optimizer adamw under DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "expected fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "expected fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            {"optimizer": "adamw_8bit"},
            "expected optimizer adamw under FSDP2",
        ),
    ],
)
def test_other_ways_of_sharding_are_refused_before_anything_starts(
    monkeypatch, deepspeed_installed, environment, options, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = TrainingConfig()
    for name, value in options.items():  # unchecked, since its package need not be installed
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        train(None, None, None, config, seed=0)


def test_deepspeed_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr("sa_diffusers.training.launching.is_deepspeed_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"pip install .*\[deepspeed\]"):
        check_launch(TrainingConfig())


@pytest.mark.parametrize("asked", [1, 2])
def test_fewer_processes_than_were_asked_for_are_said(monkeypatch, asked):
    parsed = launch_command_parser().parse_args(["--cpu", "--num_processes", str(asked), "script.py"])
    _, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(parsed)[0])
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_launch(TrainingConfig())
    assert ["asked for several processes and has started one" in str(warning.message) for warning in said] == [
        True
    ] * (asked - 1)


@pytest.mark.parametrize(("way", "name"), [("fsdp2", "FSDP2"), ("deepspeed", "DeepSpeed")])
def test_the_configurations_are_such_that_training_takes(monkeypatch, deepspeed_installed, way, name):
    for variable, value in launch_environment(way).items():
        monkeypatch.setenv(variable, value)
    check_launch(TrainingConfig())
    with pytest.raises(ValueError, match=f"are whole on every process; launch without {name}"):
        check_launch(TrainingConfig(), shardable=False)


if __name__ == "__main__":
    with processes_part():
        train_in_parts(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
