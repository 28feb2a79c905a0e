"""A pipeline in one file of weights: read as the folder it came from is, refused in a line, and written back."""

import inspect
import json
import shutil
from pathlib import Path
from types import FunctionType

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from families.test_authors_files import official_name
from safetensors.torch import load_file, save_file
from tiny_text_to_image import make
from torch.testing import assert_close

from sa_diffusers.cli.adapters.choose import choose
from sa_diffusers.families import get_family
from sa_diffusers.io.hub import ModelLoadError
from sa_diffusers.io.loading import check_model, load_pipeline
from sa_diffusers.models.single_file import configurations, rows_of, save_single_file, shipped


Tensors = dict[str, torch.Tensor]
SD3 = {  # diffusers' names within a block: the original ones, of the picture's stream and the text's
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
SD3_OUTSIDE = {
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
}  # fmt: skip


def stable_diffusion_3(weights: Tensors) -> Tensors:
    """Its transformer by Stability's names; queries, keys and values are one tensor, shifts stand before scales."""
    found = {"pos_embed": weights.pop("pos_embed.pos_embed")}
    joint: dict[str, dict[str, torch.Tensor]] = {}
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))
    for name, tensor in weights.items():
        place, _, kind = name.rpartition(".")
        if place in SD3_OUTSIDE:
            found[f"{SD3_OUTSIDE[place]}.{kind}"] = tensor
        elif place == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = tensor.roll(len(tensor) // 2, 0)
        else:
            _, block, rest = place.split(".", 2)
            if rest in SD3:
                swapped = int(block) == last and rest == "norm1_context.linear"
                tensor = tensor.roll(len(tensor) // 2, 0) if swapped else tensor
                found[f"joint_blocks.{block}.{SD3[rest]}.{kind}"] = tensor
            else:
                stream = "context_block" if "add_" in rest else "x_block"
                joint.setdefault(f"joint_blocks.{block}.{stream}.attn.qkv.{kind}", {})[rest.split("_")[1][0]] = tensor
    found |= {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in joint.items()}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


FLUX = {  # of a double block, then of a single one, then of all else
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
FLUX_SINGLE = {
    "norm.linear": "modulation.lin", "proj_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale",
}  # fmt: skip
FLUX_OUTSIDE = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
} | {
    f"time_text_embed.{ours}_embedder.linear_{n}": f"{theirs}_in.{way}_layer"
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
    for n, way in ((1, "in"), (2, "out"))
}  # fmt: skip


def flux(weights: Tensors) -> Tensors:
    """Its transformer by Black Forest Labs' names; what reads one stream is one tensor, shift stands before scale."""
    found: Tensors = {}
    joint: dict[str, list[torch.Tensor]] = {}
    for name in sorted(
        weights,
        key=lambda name: (
            name.split(".")[-1],
            "mlp" in name,
            "to_v" in name or "v_proj" in name,
            "to_k" in name or "k_proj" in name,
        ),
    ):  # q, k, v, then the MLP
        tensor, (place, _, kind) = weights[name], name.rpartition(".")
        stream, block, rest = place.split(".", 2) if "blocks." in place else ("", "", place)
        single, names = stream.startswith("single"), FLUX_SINGLE if stream.startswith("single") else FLUX
        home = f"{'single' if single else 'double'}_blocks.{block}"
        if not stream:
            swapped = tensor.roll(len(tensor) // 2, 0) if place == "norm_out.linear" else tensor
            found[f"{FLUX_OUTSIDE[place]}.{kind}"] = swapped
        elif f"{rest}.{kind}" in names:
            found[f"{home}.{names[f'{rest}.{kind}']}"] = tensor
        elif rest in names:
            found[f"{home}.{names[rest]}.{kind}"] = tensor
        else:
            part = "linear1" if single else "txt_attn.qkv" if "add_" in rest else "img_attn.qkv"
            joint.setdefault(f"{home}.{part}.{kind}", []).append(tensor)
    found |= {name: torch.cat(parts) for name, parts in joint.items()}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}


@pytest.fixture(autouse=True)
def flux_of_any_width(monkeypatch):
    """diffusers' converter with the width of the file in the place of the one that it knows, 3072."""
    entry = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = entry["checkpoint_mapping_fn"]

    def any_width(checkpoint, **options):
        width = next(len(tensor) for name, tensor in checkpoint.items() if name.endswith("img_in.weight"))
        known = tuple(width if value == 3072 else value for value in convert.__code__.co_consts)
        return FunctionType(convert.__code__.replace(co_consts=known), convert.__globals__)(checkpoint, **options)

    monkeypatch.setitem(entry, "checkpoint_mapping_fn", any_width)


def in_one_file(pipeline: DiffusionPipeline, path: Path) -> Path:
    """What draws under its original names, and a Stable Diffusion 1's text encoder; the rest in a folder beside."""
    pipeline.save_pretrained(path.with_suffix(""))
    family = get_family(pipeline)
    weights = {name: tensor.clone() for name, tensor in family.module.state_dict().items()}
    if family.component == "transformer":
        tensors = (flux if family.name == "flux" else stable_diffusion_3)(weights)
    else:
        tensors = {}
        for name, tensor in weights.items():
            if name.startswith("add_embedding.linear_"):
                part, kind = name.removeprefix("add_embedding.linear_").split(".")
                tensors[f"model.diffusion_model.label_emb.0.{2 * int(part) - 2}.{kind}"] = tensor
            else:
                tensors[f"model.{official_name(name, family.module)}"] = tensor
    for weight in (path.with_suffix("") / family.component).glob("*.safetensors"):
        weight.unlink()
    if family.name == "stable_diffusion":
        text = pipeline.text_encoder.state_dict()
        tensors |= {
            f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": t for n, t in text.items()
        }
        shutil.rmtree(path.with_suffix("") / "text_encoder", ignore_errors=True)
        pipeline.text_encoder.config.save_pretrained(path.with_suffix("") / "text_encoder")
        tensors["model_ema.decay"] = torch.tensor(0.9999)
    torch.save({"state_dict": tensors}, path) if path.suffix == ".ckpt" else save_file(tensors, path)
    return path


@pytest.fixture(
    scope="module",
    params=["v1.ckpt", "xl.safetensors", "sd3.safetensors", "sd3-t5.safetensors", "flux-dev.safetensors"],
)
def given(request, tiny_pipeline, tiny_tokenizer, tmp_path_factory) -> tuple[DiffusionPipeline, Path]:
    name = request.param.split(".")[0]
    pipeline = tiny_pipeline() if name == "v1" else make(name, tiny_tokenizer)
    return pipeline, in_one_file(pipeline, tmp_path_factory.mktemp("file") / request.param)


def test_it_loads_as_the_pipeline_that_it_is_of(given):
    pipeline, path = given
    check_model(str(path))
    loaded = load_pipeline(str(path), None, None, "float32")
    assert type(loaded) is type(pipeline) and not any(p.is_meta for p in get_family(loaded).module.parameters())
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            assert_close(getattr(loaded, name).state_dict(), part.state_dict(), rtol=0, atol=0)


def test_it_is_written_back_with_what_was_trained_and_nothing_else(given, tmp_path):
    pipeline, path = given
    family = get_family(pipeline)
    before = {name: tensor.clone() for name, tensor in family.module.state_dict().items()}
    with torch.no_grad():
        for parameter in family.module.parameters():
            parameter.add_(torch.randn_like(parameter)).copy_(parameter.half())
    copy = Path(shutil.copytree(path.with_suffix(""), tmp_path / path.stem)).with_suffix(".safetensors")
    save_single_file(path, family.module, copy, pipeline.scheduler.config)
    loaded = get_family(load_pipeline(str(copy), None, None, "float32")).module.state_dict()
    loaded.pop("pos_embed.pos_embed", None)  # not trained, and rounded as all else
    expected = {name: tensor for name, tensor in family.module.state_dict().items() if name in loaded}
    assert_close(loaded, expected, rtol=0, atol=0)
    written = load_file(copy)
    assert {tensor.dtype for tensor in written.values() if tensor.is_floating_point()} == {torch.float16}
    assert not any(name.startswith("model_ema") for name in written)
    assert all("cond_stage_model" in name or name.startswith("model.diffusion_model.") for name in written)
    family.module.load_state_dict(before)


@pytest.mark.parametrize("said", ["v_pred", "ztsnr", "metadata"])
def test_a_model_that_predicts_v_is_told_by_its_file(said, tiny_tokenizer, tmp_path):
    """Whatever its configuration says; written back it tells the same."""
    pipeline = make("xl", tiny_tokenizer)
    path = in_one_file(pipeline, tmp_path / "xl.safetensors")
    assert load_pipeline(str(path), None, None, "float32").scheduler.config.prediction_type == "epsilon"
    marks = {"v_pred": torch.empty(0)} | ({"ztsnr": torch.empty(0)} if said == "ztsnr" else {})
    metadata = {"modelspec.prediction_type": "v"} if said == "metadata" else None
    save_file(load_file(path) | (marks if metadata is None else {}), path, metadata)
    schedule = path.with_suffix("") / "scheduler" / "scheduler_config.json"
    settled = json.loads(schedule.read_text())  # which may say nothing of what it has by default
    schedule.write_text(
        json.dumps({k: v for k, v in settled.items() if k not in ("prediction_type", "rescale_betas_zero_snr")})
    )
    copy = Path(shutil.copytree(path.with_suffix(""), tmp_path / "copy")).with_suffix(".safetensors")
    expected = ("v_prediction", said == "ztsnr")
    for file in (path, copy):
        loaded = load_pipeline(str(file), None, None, "float32")
        config = loaded.scheduler.config
        assert (config.prediction_type, config.rescale_betas_zero_snr) == expected
        assert get_family(loaded).loss.prediction_type == "v_prediction"
        save_single_file(path, loaded.unet, copy, config)


def test_flux_is_mapped_by_the_names_of_black_forest_labs():
    """Its converter knows one width only: of weights as high, and a number wide, every row is found."""
    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    double = {"mod.lin": 6, "attn.qkv": 3, "attn.proj": 1, "mlp.0": 4, "mlp.2": 1}
    sizes = {f"double_blocks.0.{way}_{name}": 3072 * n for name, n in double.items() for way in ("img", "txt")}
    sizes |= {
        f"single_blocks.0.{name}": 3072 * n for name, n in {"modulation.lin": 3, "linear1": 7, "linear2": 1}.items()
    }
    for name in ("time_in", "vector_in", "guidance_in"):
        sizes |= {f"{name}.in_layer": 3072, f"{name}.out_layer": 3072}
    sizes |= {"img_in": 3072, "txt_in": 3072, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * 3072}
    tensors = {f"{name}.weight": torch.empty(n, 1, device="meta") for name, n in sizes.items()}
    tensors |= {f"{name}.bias": torch.empty(n, device="meta") for name, n in sizes.items()}
    norms = [f"double_blocks.0.{way}_attn" for way in ("img", "txt")] + ["single_blocks.0"]
    tensors |= {
        f"{n}.norm.{which}_norm.scale": torch.empty(128, device="meta") for n in norms for which in ("query", "key")
    }
    rows = rows_of(tensors, FluxTransformer2DModel, module.config)
    assert {name: len(places) for name, (_, places) in rows.items()} == {
        name: len(weight) for name, weight in module.state_dict().items()
    }
    for part, name in enumerate(("to_q", "to_k", "to_v", "proj_mlp")):
        place = f"single_transformer_blocks.0.{name if name == 'proj_mlp' else f'attn.{name}'}.weight"
        original, places = rows[place]
        assert original == "single_blocks.0.linear1.weight"
        assert places.equal(torch.arange(3072 * part, 3072 * part + len(places)))
    original, places = rows["norm_out.linear.bias"]  # scale before shift
    assert original == "final_layer.adaLN_modulation.1.bias" and places.equal(torch.arange(6144).roll(3072))


def test_the_folder_that_a_file_lies_in_configures_it_and_another_model_is_told(given, tmp_path):
    _, path = given
    inside = Path(shutil.copytree(path.with_suffix(""), tmp_path / "model")) / f"weights{path.suffix}"
    shutil.copy(path, inside)
    assert configurations(str(inside)) == str(tmp_path / "model")
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)["state_dict"]
    weights = tmp_path / "model" / "weights.safetensors"
    cut = ("time_embed.0.weight", "x_embedder.proj.weight", "img_in.weight")
    save_file({name: t[:-1].clone() if name.endswith(cut) else t for name, t in tensors.items()}, weights)
    with pytest.raises(
        ModelLoadError, match=r"expected .* for (time_embedding|pos_embed\.proj)\S+, got|Flux.* split_sizes"
    ):
        check_model(str(weights))
    save_file(tensors, weights)
    (tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no weights for vae"):
        check_model(str(weights))


def test_alone_it_is_read_by_the_configurations_that_ship(tiny_pipeline, tmp_path):
    """Which are those of real models, that a small one is not."""
    alone = str(shutil.copy(in_one_file(tiny_pipeline(), tmp_path / "given" / "v1.safetensors"), tmp_path))
    assert json.loads(Path(configurations(alone), "model_index.json").read_text())["requires_safety_checker"] is False
    with pytest.raises(ModelLoadError, match=r"is no UNet2DConditionModel .* expected \(\d*320"):
        check_model(alone)


COUNTS = {  # weights of the part that draws
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
}
IDS = {"CLIPTokenizer": [49406, 320, 1125, 539, 550, 18376, 49407], "T5Tokenizer": [3, 9, 1202, 13, 46, 30059, 1]}


@pytest.mark.parametrize(
    "repo", [pytest.param(repo, marks=[pytest.mark.slow] * ("v1" not in repo)) for repo in COUNTS]
)
def test_the_configurations_that_ship_are_those_of_the_hub(repo):
    """What is known of the models: how many weights draw, and how a text is tokenized."""
    folder = Path(shipped(repo).name)
    index = json.loads((folder / "model_index.json").read_text())
    part = "unet" if "unet" in index else "transformer"
    cls = getattr(diffusers, index[part][1])
    with torch.device("meta"):
        denoiser = cls.from_config(cls.load_config(folder, subfolder=part))
    assert sum(weight.numel() for weight in denoiser.parameters()) == COUNTS[repo]
    assert set(inspect.signature(getattr(diffusers, index["_class_name"])).parameters) >= index.keys() - {
        "_class_name"
    }
    for name, entry in index.items():
        if name.startswith("tokenizer"):
            tokenizer = getattr(transformers, entry[1]).from_pretrained(folder / name)
            assert tokenizer("a photo of an astronaut").input_ids == IDS[entry[1]]
        elif name.startswith("text_encoder"):
            config = getattr(transformers, entry[1]).config_class.from_pretrained(folder / name)
            assert config.vocab_size in (49408, 32128)


def test_of_all_else_nothing_ships():
    assert shipped("stabilityai/stable-diffusion-xl-refiner-1.0") is None


@pytest.mark.slow
def test_a_run_takes_a_file_and_leaves_one(tiny_pipeline, run_cheaply, tmp_path):
    path = in_one_file(tiny_pipeline(), tmp_path / "v1.ckpt")
    given = {"model": str(path), "lora_rank": 2, "learning_rate": 0.1}
    run_cheaply(tmp_path / "run", **given)
    assert not (tmp_path / "run" / "pipeline.safetensors").exists()
    asked_since = run_cheaply(tmp_path / "run", **given, save_single_file=True)
    assert "train" in asked_since.metrics["seconds"]["reused"]
    loaded = load_pipeline(str(tmp_path / "run" / "pipeline.safetensors"), None, None, "float32")
    saved = load_pipeline(str(tmp_path / "run" / "pipeline"), None, None, "float32")
    assert_close(loaded.unet.state_dict(), saved.unet.state_dict(), rtol=1e-3, atol=1e-3)
    stock = tiny_pipeline()
    stock.load_lora_weights(tmp_path / "run" / "lora.safetensors")
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert_close(stock.unet.state_dict(), saved.unet.state_dict(), rtol=1e-3, atol=1e-3)
    choose(tmp_path / "run", "scale", 0.5)
    half, chosen = tiny_pipeline(), load_pipeline(str(tmp_path / "run" / "pipeline"), None, None, "float32")
    half.load_lora_weights(tmp_path / "run" / "lora.safetensors")
    half.fuse_lora()
    half.unload_lora_weights()
    assert_close(half.unet.state_dict(), chosen.unet.state_dict(), rtol=1e-3, atol=1e-3)
    whole = stock.unet.state_dict()
    assert any(not torch.allclose(weight, whole[name]) for name, weight in half.unet.state_dict().items())
