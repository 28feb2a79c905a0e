"""The authors' files: official names to diffusers names, exactly; and nothing that a file asks for is run."""

import os
import pickle
import re
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict

import pytest
import torch
from cheap_runs import context_of
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from sa_diffusers.core.fisher import Fisher, FisherMismatch
from sa_diffusers.families import get_family
from sa_diffusers.families.authors_files import KEPT, ConversionError, import_checkpoint, import_fisher, rename_unet
from sa_diffusers.io.restricted_pickle import RefusedFile, RefusedTensor, read_restricted
from sa_diffusers.runs.stages.fisher import FisherStage
from scripts import convert


OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def official_name(name: str, unet: UNet2DConditionModel) -> str:
    """CompVis's name of a parameter of diffusers' UNet: blocks are counted through, with the layers inside them."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return f"diffusion_model.{theirs}.{name.removeprefix(f'{ours}.')}"
    layers = unet.config.layers_per_block
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, index, rest = match.groups()
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(index)}"
    elif match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|\w+samplers)\.(\d)\.(.+)", name):
        way, block, kind, layer, rest = match.groups()
        block, layer = int(block), int(layer)
        if kind == "downsamplers":
            place, rest = f"input_blocks.{(block + 1) * (layers + 1)}.0", rest.replace("conv", "op")
        elif kind == "upsamplers":
            attends = "Attn" in unet.config.up_block_types[block]
            place = f"output_blocks.{block * (layers + 1) + layers}.{2 if attends else 1}"
        else:
            first = (
                f"input_blocks.{1 + block * (layers + 1)}"
                if way == "down"
                else f"output_blocks.{block * (layers + 1)}"
            )
            stem, number = first.split(".")
            place = f"{stem}.{int(number) + layer}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        part, rest = rest.split(".", 1)
        rest = f"{RESNET[part]}.{rest}"
    return f"diffusion_model.{place}.{rest}"


@pytest.fixture
def pipeline(tiny_pipeline) -> StableDiffusionPipeline:
    """With the authors' 1,000 timesteps."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return pipeline


@pytest.fixture(scope="module")
def model(tiny_pipeline, tmp_path_factory) -> str:
    """It, saved; do not write into it."""
    made, folder = tiny_pipeline(), tmp_path_factory.mktemp("model")
    made.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    made.save_pretrained(folder)
    return str(folder)


def random_tensors(unet: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """By diffusers' names, >= 0."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) for name, p in unet.named_parameters()}


def official(tensors: dict[str, torch.Tensor], unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {official_name(name, unet): tensor for name, tensor in tensors.items()}


def checkpoint_of(weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor], unet: torch.nn.Module) -> dict:
    """As Lightning and CompVis's LitEma leave it."""
    state = OrderedDict((f"model.{name}", tensor) for name, tensor in official(weights, unet).items())
    state |= {f"model_ema.{name.replace('.', '')}": t for name, t in official(average, unet).items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= {"betas": torch.rand(1000), "first_stage_model.conv.weight": torch.rand(3)}
    state |= {"cond_stage_model.a.weight": torch.rand(3), "cond_stage_model.b.weight": torch.rand(3)}
    state._metadata = {"": {"version": 1}}
    return {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.rand(2)}}}]}


def run_script(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
    convert.main()


def dump(content: object, path, kind: str) -> None:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


KINDS = pytest.mark.parametrize("kind", ["pickle", "zip", pytest.param("older", marks=pytest.mark.slow)])


# --- names


def test_every_name_of_stable_diffusion_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    parameters = dict(unet.named_parameters())
    theirs = {f"model.{official_name(name, unet)}": p for name, p in parameters.items()}
    assert len(theirs) == 686
    converted = rename_unet(theirs, unet)
    assert converted.keys() == parameters.keys()
    assert all(converted[name] is parameter for name, parameter in parameters.items())


# --- Fisher


@KINDS
@pytest.mark.slow
def test_fisher_script_writes_a_fisher_that_a_run_accepts(pipeline, model, tmp_path, monkeypatch, kind):
    fisher = random_tensors(pipeline.unet, 1)
    dump(official(fisher, pipeline.unet), tmp_path / "theirs.pkl", kind)
    output = tmp_path / "out" / "fisher.safetensors"
    run_script(monkeypatch, "fisher", tmp_path / "theirs.pkl", "--model", model, "--output", output)

    torch.testing.assert_close(Fisher.load(output).tensors, fisher, rtol=0, atol=0)
    loaded = FisherStage().given(context_of(get_family(pipeline), tmp_path, fisher=str(output))).value
    assert (loaded.metadata["num_terms"], loaded.metadata["reduction"]) == (1000, "mean")
    assert (loaded.metadata["terms"], loaded.metadata["prediction_type"]) == ("all", "epsilon")
    assert "theirs.pkl" in loaded.metadata["source"]

    dump(official(random_tensors(pipeline.unet, 2), pipeline.unet), tmp_path / "theirs.pkl", kind)
    other = import_fisher(tmp_path / "theirs.pkl", model)[0]
    assert other.metadata != loaded.metadata  # runs tell Fishers apart by it
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    with pytest.raises(FisherMismatch, match="model_hash"):
        FisherStage().given(context_of(get_family(pipeline), tmp_path, fisher=str(output)))


def test_fisher_lists_what_does_not_fit(pipeline, model, tmp_path):
    theirs = official(random_tensors(pipeline.unet, 1), pipeline.unet)
    del theirs["diffusion_model.time_embed.0.bias"]
    theirs["diffusion_model.out.2.weight"] = torch.rand(5)
    theirs |= {f"diffusion_model.label_emb.{index:02}": torch.rand(1) for index in range(12)}
    dump(theirs, tmp_path / "theirs.pkl", "pickle")
    with pytest.raises(ConversionError) as error:
        import_fisher(tmp_path / "theirs.pkl", model)
    message = str(error.value)
    assert "1 missing: time_embedding.linear_1.bias" in message
    assert "1 of another shape: conv_out.weight (5,) for (4, 4, 3, 3)" in message
    assert "12 extra: model.diffusion_model.label_emb.00" in message
    assert "label_emb.09, ..." in message and "label_emb.10" not in message


def test_rename_names_what_the_converter_takes_for_granted(pipeline):
    theirs = {f"model.{name}": t for name, t in official(random_tensors(pipeline.unet, 1), pipeline.unet).items()}
    del theirs["model.diffusion_model.output_blocks.1.2.conv.bias"]
    with pytest.raises(ConversionError, match=r"no tensor model\.diffusion_model\.output_blocks\.1\.2\.conv\.bias"):
        rename_unet(theirs, pipeline.unet)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_fisher_of_impossible_values_is_refused(pipeline, model, tmp_path, value):
    theirs = official(random_tensors(pipeline.unet, 1), pipeline.unet)
    theirs["diffusion_model.out.2.bias"][1] = value
    dump(theirs, tmp_path / "theirs.pkl", "pickle")
    with pytest.raises(ConversionError, match="conv_out.bias .*at least 0"):
        import_fisher(tmp_path / "theirs.pkl", model)


def test_fisher_is_refused_for_a_model_of_another_unit(tiny_pipeline_dir, pipeline, tmp_path):
    dump(official(random_tensors(pipeline.unet, 1), pipeline.unet), tmp_path / "theirs.pkl", "pickle")
    with pytest.raises(ConversionError, match="epsilon in 1000 timesteps.* predicts epsilon in 20"):
        import_fisher(tmp_path / "theirs.pkl", str(tiny_pipeline_dir))


# --- checkpoints


@pytest.mark.parametrize(("kind", "ema"), [("zip", True), ("older", False)])
def test_checkpoint_script_writes_a_plain_pipeline(pipeline, model, tmp_path, monkeypatch, capsys, kind, ema):
    weights, average = random_tensors(pipeline.unet, 1), random_tensors(pipeline.unet, 2)
    content = checkpoint_of(weights, average, pipeline.unet)
    # Classes of a library that is there when the file is written, and not when it is read.
    lightning = types.ModuleType("pytorch_lightning")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    lightning.Settings = type("Settings", (dict,), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    state = lightning.ModelCheckpoint()
    state.best = torch.rand(2)
    content |= {"callbacks": {lightning.ModelCheckpoint: state}, "hyper_parameters": lightning.Settings(lr=[1e-4])}
    dump(content, tmp_path / "last.ckpt", kind)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")

    output = tmp_path / "out"
    options = ["--ema"] if ema else []
    run_script(monkeypatch, "checkpoint", tmp_path / "last.ckpt", "--model", model, "--output", output, *options)

    converted = StableDiffusionPipeline.from_pretrained(output)
    torch.testing.assert_close(dict(converted.unet.named_parameters()), average if ema else weights, rtol=0, atol=0)
    for part in ("vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        torch.testing.assert_close(getattr(converted, part).state_dict(), expected, rtol=0, atol=0)
    said = capsys.readouterr().out
    assert "dropped, never imported: 'pytorch_lightning.ModelCheckpoint', 'pytorch_lightning.Settings'" in said
    left_out = "'betas' (1), 'cond_stage_model' (2), 'first_stage_model' (1)"
    assert left_out + ("; " if ema else f", 'model_ema' ({len(weights) + 2}); ") in said


@pytest.mark.parametrize("form", ["without model.", "diffusers", "unet.", "cross-attention alone", "safetensors"])
def test_forms_that_people_save_a_unet_in(pipeline, model, tmp_path, form):
    weights = {name: torch.rand(p.shape) for name, p in pipeline.unet.named_parameters()}
    names = {name: official_name(name, pipeline.unet) for name in weights}
    if form == "cross-attention alone":
        weights = {name: tensor for name, tensor in weights.items() if "attn2" in name}
    if form not in ("without model.", "safetensors"):
        names = {name: f"unet.{name}" if form == "unet." else name for name in weights}
    state = {names[name]: tensor for name, tensor in weights.items()}
    path = tmp_path / ("unet.safetensors" if form == "safetensors" else "unet.pt")
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    expected = dict(pipeline.unet.named_parameters()) | weights
    converted, ignored, _ = import_checkpoint(path, model, ema=False)
    torch.testing.assert_close(dict(converted.unet.named_parameters()), expected, rtol=0, atol=0)
    assert ignored[KEPT] == len(expected) - len(weights)


def test_a_file_of_the_average_alone_says_so(pipeline, model, tmp_path):
    state = {f"model.{official_name(name, pipeline.unet)}": p for name, p in pipeline.unet.named_parameters()}
    dump({"state_dict": state}, tmp_path / "emaonly.ckpt", "zip")
    with pytest.raises(ConversionError, match="omit --ema .files named emaonly"):
        import_checkpoint(tmp_path / "emaonly.ckpt", model, ema=True)


def test_averages_that_are_not_those_of_the_weights_are_refused(pipeline, model, tmp_path):
    content = checkpoint_of(*[random_tensors(pipeline.unet, 1)] * 2, pipeline.unet)
    content["state_dict"]["model_ema.diffusion_modelother"] = content["state_dict"].pop(
        "model_ema.diffusion_modelout2bias"
    )
    dump(content, tmp_path / "last.ckpt", "zip")
    with pytest.raises(ConversionError) as error:
        import_checkpoint(tmp_path / "last.ckpt", model, ema=True)
    assert "1 missing: model_ema.diffusion_modelout2bias" in str(error.value)
    assert "1 extra: model_ema.diffusion_modelother" in str(error.value)
    import_checkpoint(tmp_path / "last.ckpt", model, ema=False)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"unet.conv_in.weight": torch.rand(2)}}, r"unet.conv_in.weight has the shape \(2,\)"),
        ({"state_dict": {"vae.conv_in.weight": torch.rand(2)}}, r"no tensor of a UNet, model\.diffusion_model\.\*"),
        ([{"module.conv_in.weight": torch.rand(2)}, {}, 3], "class-conditional checkpoint"),
        ({"module.conv_in.weight": torch.rand(2)}, "class-conditional checkpoint"),
        ({"state_dict": {"lr": 3}}, "holds no tensors by name: .* got a dict of lr"),
        (torch.rand(2), "holds no tensors by name: .* got a Tensor"),
        (
            {"state_dict": {"model.diffusion_model.\x1b[2J": torch.rand(2)}},
            r"1 extra: model.diffusion_model.\\x1b\[2J",
        ),
    ],
)
def test_files_of_something_else_are_refused(model, tmp_path, content, message):
    dump(content, tmp_path / "file.ckpt", "zip")
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(tmp_path / "file.ckpt", model, ema=False)


def test_wrong_arguments_are_refused_before_the_file_is_read(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.safetensors").write_text("")
    for kind, base, output, message in [
        ("fisher", model, "there.safetensors", "exists; pass another --output"),
        ("fisher", model, "fisher.pt", "end in .safetensors"),
        ("checkpoint", "bundled/nothing", "new", "bundled"),
        ("checkpoint", model, "new", "no file at"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run_script(monkeypatch, kind, tmp_path / "absent.ckpt", "--model", base, "--output", tmp_path / output)
        assert stop.value.code == 1
        assert message in capsys.readouterr().err


def test_only_stable_diffusion_is_a_base(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ConversionError, match="is a StableDiffusionXLPipeline"):
        import_checkpoint(tmp_path / "absent.ckpt", str(tmp_path), ema=False)


# --- malice


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """Payloads that leave a mark when one is run: by a call, and by an import alone."""
    mark = tmp_path / "mark"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trap.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef function(*_): pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    trap = types.ModuleType("trap")
    trap.function = type("function", (), {"__module__": "trap"})
    monkeypatch.setitem(sys.modules, "trap", trap)
    payload = [Call(os.system, f"touch {mark}"), trap.function]

    def dump_payload(content: object, path, kind: str) -> None:
        monkeypatch.setitem(sys.modules, "trap", trap)
        dump(content, path, kind)
        monkeypatch.delitem(sys.modules, "trap")

    return types.SimpleNamespace(payload=payload, mark=mark, dump=dump_payload)


def test_the_attack_works_on_others(attack, tmp_path):
    attack.dump(attack.payload[0], tmp_path / "file", "pickle")
    pickle.loads((tmp_path / "file").read_bytes())
    assert attack.mark.exists()
    attack.mark.unlink()
    attack.dump(attack.payload[1], tmp_path / "file", "zip")
    torch.load(tmp_path / "file", weights_only=False)
    assert attack.mark.exists()


@KINDS
def test_foreign_globals_are_dropped_and_never_run(attack, pipeline, model, tmp_path, kind):
    theirs = official(random_tensors(pipeline.unet, 1), pipeline.unet)
    attack.dump(theirs | {"payload": attack.payload}, tmp_path / "file", kind)
    fisher, dropped = import_fisher(tmp_path / "file", model)
    assert dropped == ["posix.system", "trap.function"]
    assert len(fisher.tensors) == len(theirs)
    assert not attack.mark.exists() and "trap" not in sys.modules


@KINDS
def test_a_tensor_that_depends_on_a_foreign_global_is_refused(attack, pipeline, model, tmp_path, kind):
    theirs = official(random_tensors(pipeline.unet, 1), pipeline.unet)
    name = "diffusion_model.out.2.bias"
    good = theirs[name]
    rebuild, storage = torch._utils._rebuild_tensor_v2, good._typed_storage()
    parts = [storage, 0, (4,), (1,), False, OrderedDict()]
    for place in range(len(parts)):
        bad = list(parts)
        bad[place] = {"hook": [attack.payload[0]]} if place == 5 else attack.payload[0]
        wrapped = Call(torch._utils._rebuild_parameter, Call(rebuild, *bad), False, OrderedDict())
        attack.dump(theirs | {name: wrapped}, tmp_path / "file", kind)
        with pytest.raises(ConversionError, match="'diffusion_model.out.2.bias' depends on 'posix.system'"):
            import_fisher(tmp_path / "file", model)
    theirs[name] = Call(torch._utils._rebuild_parameter, Call(rebuild, *parts), True, OrderedDict())
    attack.dump(theirs, tmp_path / "file", kind)
    torch.testing.assert_close(import_fisher(tmp_path / "file", model)[0].tensors["conv_out.bias"], good)
    assert not attack.mark.exists()


def test_a_storage_may_hold_numbers_only(attack, tmp_path):
    attack.dump([torch.rand(2), *attack.payload], tmp_path / "inner", "older")
    load = Call(torch.storage._load_from_bytes, (tmp_path / "inner").read_bytes())
    attack.dump({"tensor": load}, tmp_path / "file", "pickle")
    with pytest.raises(RefusedFile, match="storage holds more than numbers") as error:
        read_restricted(tmp_path / "file")
    assert "weights_only" not in str(error.value)  # torch's advice how to run it all the same
    assert not attack.mark.exists()


@pytest.mark.parametrize("function", [OrderedDict, torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes])
@pytest.mark.parametrize("state", [{"_function": 1}, (None, {"_function": 1})])
def test_a_file_cannot_change_what_it_may_call(tmp_path, function, state):
    # GLOBAL pushes the function, BUILD sets its state, as the last thing but for STOP.
    described = pickle.dumps(state, protocol=2)[2:-1]
    module, name = function.__module__, function.__qualname__
    (tmp_path / "file").write_bytes(b"\x80\x02" + f"c{module}\n{name}\n".encode() + described + b"b.")
    with pytest.raises(RefusedFile, match="sets the state of a function"):
        read_restricted(tmp_path / "file")


def test_placeholders_take_everything_that_unpickling_does(attack, tmp_path):
    class Listed(list):
        pass

    class Mapped(dict):
        pass

    foreign = types.ModuleType("foreign")
    for kind in (Listed, Mapped):
        kind.__module__, kind.__qualname__ = "foreign", kind.__name__
        setattr(foreign, kind.__name__, kind)
    sys.modules["foreign"] = foreign
    try:
        values = [Listed([1, 2]), Mapped(a=1), Call(Listed, state={"a": 1}), {1, 2}, frozenset([3])]
        dump({"tensor": torch.ones(2), "values": values, "type": torch.float16}, tmp_path / "file", "pickle")
    finally:
        del sys.modules["foreign"]
    content, dropped = read_restricted(tmp_path / "file")
    assert dropped == ["foreign.Listed", "foreign.Mapped", "torch.float16"]
    assert not any(isinstance(value, RefusedTensor) for value in content["values"])
    assert content["values"][3:] == [{1, 2}, {3}]
    torch.testing.assert_close(content["tensor"], torch.ones(2))


def test_other_archives_are_refused(tmp_path):
    torch.save(torch.rand(2), tmp_path / "program.pt")
    with zipfile.ZipFile(tmp_path / "program.pt", "a") as archive:
        archive.writestr("program/constants.pkl", pickle.dumps(()))  # what torch.load knows TorchScript by
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(tmp_path / "program.pt", "storages")
    (tmp_path / "text").write_text("not a pickle")
    (tmp_path / "cut").write_bytes((tmp_path / "program.pt").read_bytes()[:100])
    for name, message in [("program.pt", "TorchScript"), ("tar", "tar archive"), ("text", ""), ("cut", "")]:
        with pytest.raises(RefusedFile, match=f"(?s)cannot be read as tensors.*{message}"):
            read_restricted(tmp_path / name)
