"""Pipelines that people really have: in folders, and in every state that diffusers and accelerate put them in."""

import copy
import fractions
import json
import shutil
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from cheap_runs import CHEAP, PROMPTS
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from sa_diffusers.attacks.searches import Vocabulary
from sa_diffusers.core.conditions import Condition
from sa_diffusers.data.sampling import FreshNoise
from sa_diffusers.families import get_family
from sa_diffusers.families.plain_parts import unwrapped
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.loading import check_model
from sa_diffusers.runs.forget import forget
from sa_diffusers.training.loop import TrainingDiverged


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """Of the quickest run there is: an edit in closed form, judged by two pictures of two steps."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "replay.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": str(folder / "replay.txt"), "concept_templates": str(folder / "templates.txt")}
    names = ("num_inference_steps", "guidance_scale", "eval_batch_size")
    return files | {name: CHEAP[name] for name in names} | {"concept": "seven", "surrogate": "nine", "method": "uce"}


@pytest.fixture
def argv(options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unet(**values: object):
    return lambda folder: change(folder, "unet/config.json", **values)


def pipeline_class(name: str | None):
    return lambda folder: change(folder, "model_index.json", _class_name=name)


def scheduler(cls: type, **values: object):
    def damage(folder: Path) -> None:
        cls(**values).save_pretrained(folder / "scheduler")
        change(folder, "model_index.json", scheduler=["diffusers", cls.__name__])

    return damage


def poisoned(part: str, file: str):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / part / file)
        tensors[max(tensors)].flatten()[0] = float("nan")
        save_file(tensors, folder / part / file, metadata={"format": "pt"})

    return damage


def half_only(folder: Path) -> None:
    for path in [*folder.glob("*/*.safetensors")]:
        path.rename(path.with_suffix(".fp16.safetensors"))


def cut(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).write_bytes((folder / "unet" / WEIGHTS).read_bytes()[:-100])


def without_vae(folder: Path) -> None:
    change(folder, "model_index.json", vae=[None, None])


HANDLED = "expected one of: "


def part_of(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    save_file({name: tensor for name, tensor in load_file(path).items() if "attn2" in name}, path)


FOLDERS = [
    ("inpainting UNet", unet(in_channels=9), ("in_channels 9", "expected 4", "inpainting")),
    ("InstructPix2Pix UNet", unet(in_channels=8), ("in_channels 8",)),
    ("learned variance", unet(out_channels=8), ("out_channels 8", "variance")),
    ("no sample size", unet(sample_size=None), ("sample_size None", "config.json")),
    ("two sample sizes", unet(sample_size=[8, 16]), ("sample_size [8, 16]",)),
    ("odd sample size", unet(sample_size=7), ("sample_size 7", "14 pixels", "multiples of 8")),
    ("LCM", unet(time_cond_proj_dim=16), ("time_cond_proj_dim 16", "guidance scale")),
    ("SDXL's conditions", unet(addition_embed_type="text_time"), ("addition_embed_type 'text_time'", "SDXL")),
    ("class embedding", unet(class_embed_type="timestep"), ("class_embed_type 'timestep'",)),
    ("class labels", unet(num_class_embeds=10), ("num_class_embeds 10",)),
    ("IP-Adapter's UNet", unet(encoder_hid_dim_type="ip_image_proj"), ("ip_image_proj", "unload_ip_adapter")),
    ("another text encoder", unet(cross_attention_dim=16), ("cross_attention_dim 16", "hidden_size 8")),
    ("16-channel VAE", lambda f: change(f, "vae/config.json", latent_channels=16), ("in_channels 4", "expected 16")),
    ("flow matching", scheduler(FlowMatchEulerDiscreteScheduler), ("FlowMatchEulerDiscreteScheduler", "no betas")),
    ("EDM", scheduler(EDMEulerScheduler), ("EDMEulerScheduler", "no betas")),
    ("consistency model", scheduler(diffusers.CMStochasticIterativeScheduler), ("CMStochastic", "no betas")),
    ("flow sigmas", scheduler(diffusers.UniPCMultistepScheduler, use_flow_sigmas=True), ("use_flow_sigmas",)),
    ("predicts pictures", scheduler(DDIMScheduler, prediction_type="sample"), ("prediction_type 'sample'",)),
    ("SDXL's class", pipeline_class("StableDiffusionXLPipeline"), ("no tokenizer_2 and no text_encoder_2",)),
    ("FLUX.2", pipeline_class("Flux2Pipeline"), ("Flux2Pipeline", HANDLED)),
    ("upscaling", pipeline_class("StableDiffusionUpscalePipeline"), ("StableDiffusionUpscalePipeline", HANDLED)),
    ("LCM pipeline", pipeline_class("LatentConsistencyModelPipeline"), ("LatentConsistencyModelPipeline", HANDLED)),
    ("AltDiffusion", pipeline_class("AltDiffusionPipeline"), ("AltDiffusionPipeline", HANDLED)),
    ("no class", lambda f: (f / "model_index.json").write_text("{}"), ("model_index.json", "names no class")),
    ("fp16 files only", half_only, ("--variant fp16",)),
    ("weights cut off", cut, (WEIGHTS, "is damaged")),
    ("some weights alone", part_of, ("unet", "lack ", " and ", "save the whole pipeline")),
    ("no weights", lambda f: (f / "unet" / WEIGHTS).unlink(), ("unet", "holds no weights")),
    ("no VAE", without_vae, ("has no vae",)),
    ("NaN in the UNet", poisoned("unet", WEIGHTS), ("unet", "NaN", "up_blocks")),
    ("NaN in the text encoder", poisoned("text_encoder", "model.safetensors"), ("text_encoder", "NaN", "weight")),
]


@pytest.mark.parametrize(("damage", "says"), [pytest.param(*case, id=name) for name, *case in FOLDERS])
def test_folder_is_refused(refused, argv, tiny_pipeline_dir, tmp_path, damage, says):
    folder = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    damage(folder)
    message = refused("forget", "--model", folder, *argv, says=says)
    assert "--concept" not in message


FILES = [
    ("damaged.safetensors", b"{}", ("damaged.safetensors is damaged",)),
    ("damaged.ckpt", b"{}", ("damaged.ckpt is damaged", "convert checkpoint")),
    ("config.yaml", b"{}", ("config.yaml is a file", "pass the folder")),
    ("lora.safetensors", {"unet.a.lora_A.weight": 2}, ("no pipeline under its original names", "unet.a.lora_A")),
    ("unet.safetensors", {"conv_in.weight": 2}, ("no pipeline under its original names", "convert checkpoint")),
    ("v1.ckpt", {"model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, ("is no UNet2D", "(320, 4, 3, 3)")),
    ("xl.safetensors", {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": 2,
                        "model.diffusion_model.a": 2}, ("is no UNet2DConditionModel", "lacks")),
    ("refiner.safetensors", {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": 2,
                             "model.diffusion_model.a": 2}, ("stable-diffusion-xl-refiner", "hf download")),
    ("code.ckpt", {"model.diffusion_model.a": fractions.Fraction(1, 2)}, ("more than tensors", "convert checkpoint")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "holds", "says"), FILES)
def test_file_in_place_of_a_folder(refused, argv, tmp_path, name, holds, says):
    path = tmp_path / name
    if isinstance(holds, dict):
        tensors = {key: torch.zeros(size) if isinstance(size, int | tuple) else size for key, size in holds.items()}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    else:
        path.write_bytes(holds)
    refused("forget", "--model", path, *argv, says=says)


def test_a_single_file_is_written_back_where_there_is_one(refused, argv, tiny_pipeline_dir):
    refused(
        "forget", "--model", tiny_pipeline_dir, "--save_single_file", True, *argv, says=("save_single_file", ".ckpt")
    )


def test_an_attack_is_refused_by_the_same_configurations(refused, tiny_pipeline_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    change(folder, "unet/config.json", time_cond_proj_dim=16)
    words = ("--original", tiny_pipeline_dir, "--concept", "seven")
    refused("attack", folder, *words, says=("time_cond_proj_dim",))


def test_half_precision_files_are_taken_by_their_variant(tiny_pipeline_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    half_only(folder)
    check_model(str(folder), variant="fp16")
    check_model(str(tiny_pipeline_dir))


ESD = ("--method", "esd-x")
NUMBERS = [
    ("more steps than timesteps", (), ("--num_inference_steps", 21), ("num_inference_steps", "21", "20 timesteps")),
    ("as many, by DDIM", (), ("--num_inference_steps", 21, "--sampler", "ddim"), ("num_inference_steps", "20")),
    ("more Fisher terms", (), ("--method", "sa", "--fisher_terms", 21), ("fisher_terms", "20 timesteps", "21")),
    ("more levels of ESD", (), (*ESD, "--esd_inference_steps", 21), ("num_inference_steps from 2 to", "20")),
    ("ESD at pure noise", ("trailing",), (*ESD, "--esd_inference_steps", 4), ("esd_inference_steps", "zero_snr")),
    ("DDIM at pure noise", ("trailing",), ("--sampler", "ddim"), ("num_inference_steps", "rescale_betas_zero_snr")),
]


@pytest.mark.parametrize(("spacing", "words", "says"), [pytest.param(*case, id=name) for name, *case in NUMBERS])
def test_numbers_that_the_schedule_does_not_hold(refused, argv, tiny_pipeline_dir, tmp_path, spacing, words, says):
    folder = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "model"))
    if spacing:
        change(folder, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing=spacing[0])
    refused("forget", "--model", folder, *argv, *words, says=says)


def adapter(part: str, *layers: str):
    return lambda pipeline: getattr(pipeline, part).add_adapter(LoraConfig(r=2, target_modules=list(layers)))


def another_forward(pipeline):
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, backend="eager")


def compiled_in_parts(pipeline):
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")


def poison(pipeline):
    pipeline.unet.conv_in.weight.data[0] = torch.inf


def layerwise(pipeline):
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(pipeline):
    here = torch.device("cpu")
    pipeline.unet.enable_group_offload(here, here, offload_type="leaf_level")


STATES = [
    ("LoRA of the text encoder", adapter("text_encoder", "q_proj"), ("text_encoder has adapters", "unload_lora")),
    ("LoRA of the UNet", adapter("unet", "to_q"), ("unet has adapters", "unload_lora_weights")),
    ("FreeU", lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4), ("unet has FreeU", "disable_freeu")),
    ("fp8 casting", layerwise, ("unet has hooks of diffusers", "layerwise_casting")),
    ("fp8 weights", lambda p: p.unet.to(torch.float8_e4m3fn), ("unet has", "float8_e4m3fn", "float32, float16")),
    ("group offloading", group_offload, ("unet has hooks of diffusers", "group_offloading")),
    ("sequential offloading", lambda p: accelerate.cpu_offload(p.unet, "cpu"), ("accelerate", "remove_all_hooks")),
    (
        "model offloading",
        lambda p: accelerate.cpu_offload_with_hook(p.text_encoder, "cpu"),
        ("text_encoder has hooks",),
    ),
    ("no values", lambda p: p.unet.to("meta"), ("unet has no values", "meta device")),
    ("compiled forward", another_forward, ("unet has another forward pass",)),
    ("compiled in parts", compiled_in_parts, ("unet is compiled in parts", "mid_block")),
    ("infinite weights", poison, ("unet has NaN or infinite values in conv_in.weight",)),
    ("half a text encoder", lambda p: p.text_encoder.half(), ("one precision", "text_encoder", "float16")),
    ("no tokenizer", lambda p: setattr(p, "tokenizer", None), ("has no tokenizer",)),
    ("flow matching", lambda p: setattr(p, "scheduler", FlowMatchEulerDiscreteScheduler()), ("has no betas",)),
]


@pytest.mark.parametrize(("enter", "says"), [pytest.param(*case, id=name) for name, *case in STATES])
def test_state_is_refused(tiny_pipeline, options, tmp_path, enter, says):
    pipeline = tiny_pipeline()
    enter(pipeline)
    with pytest.raises(ValueError) as refusal:
        forget(pipeline, **options, output_dir=tmp_path / "runs")
    assert not [part for part in says if part not in str(refusal.value)], refusal.value
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.safetensors"))


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in pipeline.unet.named_parameters()}


@pytest.fixture(scope="module")
def edited(tiny_pipeline, options, few_pictures) -> dict[str, torch.Tensor]:
    """What forgetting makes of the pipeline as it is loaded."""
    pipeline = tiny_pipeline()
    found = weights(forget(pipeline, **options))
    assert any(not torch.equal(found[name], value) for name, value in weights(pipeline).items())
    return found


def compiled(pipeline):
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def in_parallel(pipeline):
    pipeline.unet = nn.DataParallel(pipeline.unet)


def fused(pipeline):
    pipeline.fuse_qkv_projections(vae=False)


def fused_and_unfused(pipeline):
    pipeline.fuse_qkv_projections()
    pipeline.unfuse_qkv_projections()


def dropping(pipeline):
    pipeline.text_encoder.config.attention_dropout = 0.5
    for layer in pipeline.text_encoder.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.5
    pipeline.text_encoder.train()


SLOW = [pytest.param(enter, marks=pytest.mark.slow) for enter in (compiled, in_parallel, fused_and_unfused, dropping)]


@pytest.mark.parametrize("enter", [fused, *SLOW])
@pytest.mark.slow
def test_state_makes_no_difference(tiny_pipeline, options, edited, few_pictures, enter):
    pipeline = tiny_pipeline()
    enter(pipeline)
    assert_close(weights(forget(pipeline, **options)), edited)


@pytest.fixture(scope="module")
def training(options) -> dict:
    """Of the quickest run that takes a gradient."""
    return options | {"method": "finetune", "num_surrogate_samples": 2, "num_train_steps": 1, "train_batch_size": 2}


@pytest.fixture(scope="module")
def trained(tiny_pipeline, training, few_pictures) -> dict[str, torch.Tensor]:
    return weights(forget(tiny_pipeline(), **training))


@pytest.mark.slow
def test_the_callers_modes_make_no_difference(tiny_pipeline, training, trained, few_pictures):
    pipeline = tiny_pipeline()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            found = weights(forget(pipeline, **training))
            assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and torch.empty(1).is_meta
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(found, trained)


@pytest.mark.slow
def test_inference_mode_makes_no_difference(tiny_pipeline, training, trained, few_pictures):
    """Neither around the call nor where the pipeline was loaded."""
    with torch.inference_mode():
        found = weights(forget(tiny_pipeline(), **training))
        assert torch.is_inference_mode_enabled()
    assert_close(found, trained)


@pytest.mark.slow
@pytest.mark.parametrize("enter", [compiled, fused])
def test_in_place_what_stands_around_the_weights_stays(tiny_pipeline, options, edited, few_pictures, enter):
    """Fused projections are made anew of what was edited, so that the pipeline draws as it would unfused."""
    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    plain.unet.load_state_dict(edited)
    enter(pipeline)
    kind = type(pipeline.unet)
    assert forget(pipeline, **options, inplace=True) is pipeline and type(pipeline.unet) is kind
    noise, text, time = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 8), torch.tensor([5])
    with torch.no_grad():
        found, expected = (unwrapped(p.unet)(noise, time, text).sample for p in (pipeline, plain))
    assert_close(found, expected)


@pytest.mark.slow
def test_the_state_of_the_given_pipeline_is_that_of_the_returned_one(tiny_pipeline_dir, training, few_pictures):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, dtype=torch.float32)
    pipeline.unet.train()
    pipeline.unet.conv_in.requires_grad_(False)
    pipeline.text_encoder.train().requires_grad_(False)
    before = [(m.training, [p.requires_grad for p in m.parameters()]) for m in (pipeline.unet, pipeline.text_encoder)]
    returned = forget(pipeline, **training)
    for one in (pipeline, returned):
        state = [(m.training, [p.requires_grad for p in m.parameters()]) for m in (one.unet, one.text_encoder)]
        assert state == before and one.name_or_path == tiny_pipeline_dir


def test_embedding_of_several_vectors_is_read_as_the_pipeline_reads_it(tiny_pipeline, tiny_tokenizer):
    pipeline = tiny_pipeline()
    pipeline.tokenizer = copy.deepcopy(tiny_tokenizer)
    plain = get_family(pipeline).last_words("a red seven")
    pipeline.load_textual_inversion(torch.randn(3, 8), token="<cat>")
    family = get_family(pipeline)
    assert family.last_words("a red seven") == plain
    assert family.last_words("a red <cat>") == [(plain[0][0] + 2, plain[0][1])]


def test_a_deep_copy_is_attacked_like_the_original(tiny_pipeline):
    pipeline = tiny_pipeline()
    words = [
        Vocabulary(TemplateEncoder(get_family(one), ["a {}"], 1)).words for one in (pipeline, copy.deepcopy(pipeline))
    ]
    assert_close(*words)
    assert len(words[0]) > 10


def test_bundled_pipeline_draws_loaded_without_a_dtype():
    folder = resolve("bundled/digits/pipeline")
    plain, said = (DiffusionPipeline.from_pretrained(folder, **o) for o in ({}, {"dtype": torch.float32}))
    assert {part.dtype for part in (plain.unet, plain.text_encoder, plain.vae)} == {torch.float32}
    prompts = "a red seven", "cpu", 1, False
    assert_close(plain.encode_prompt(*prompts)[0], said.encode_prompt(*prompts)[0])


def test_tiny_autoencoder_with_noise_as_surrogate(tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    family, images = get_family(pipeline), torch.rand(2, 3, 16, 16) * 2 - 1
    assert_close(family.encode(images, torch.Generator()), pipeline.vae.encode(images).latents.detach())
    noise = FreshNoise([Condition("seven")]).batch(family, 2, step=0, seed=0)
    assert noise["sample"].shape == (2, *family.latent_shape) and noise["sample"].isfinite().all()


@pytest.mark.parametrize("track", [None, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_divergence_is_said_to_be_divergence(tiny_pipeline, training, few_pictures, tmp_path, track):
    """Of the last step, after which no other would tell."""
    too_fast = training | {"learning_rate": 1e30, "lr_warmup_steps": 0, "track_steps": track}
    with pytest.raises(TrainingDiverged, match="training diverged: .* Lower the learning rate"):
        forget(tiny_pipeline(), **too_fast, output_dir=tmp_path)
    assert not (tmp_path / "pipeline").exists()
