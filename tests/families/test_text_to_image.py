"""What every large text-to-image family promises, a row each, against its stock pipeline and its training script."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
)
from peft import get_peft_model_state_dict
from tiny_text_to_image import NAMES, WORDS, make, t5
from torch import Tensor
from torch.testing import assert_close

from sa_diffusers.attacks import AttackSettings, attack_embedding, attack_text, draw_found
from sa_diffusers.attacks.searches import Vocabulary
from sa_diffusers.core.batches import map_tensors, take
from sa_diffusers.core.conditions import Condition
from sa_diffusers.core.fisher import estimate_fisher, stratified_terms
from sa_diffusers.core.objectives import ESD
from sa_diffusers.core.seeding import seeded
from sa_diffusers.families import get_family
from sa_diffusers.families.plain_parts import unfused
from sa_diffusers.families.samplers import make_scheduler
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.loading import check_model, load_pipeline
from sa_diffusers.methods.uce import edit_of_prompts
from sa_diffusers.runs.forget import _config_of
from sa_diffusers.runs.stages.replay import ReplayStage
from sa_diffusers.training.lora import LORA_FILE, add_lora, fuse_lora, save_lora, save_lora_for_others


PROMPTS = ["a red seven", "nine", "a green digit"]


@pytest.fixture(scope="module")
def pipelines(tiny_tokenizer) -> dict[str, DiffusionPipeline]:
    return {name: make(name, tiny_tokenizer) for name in NAMES}


def rows(*fast: str) -> list:
    """All names, those beside `fast` when there is time."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NAMES]


ROWS = rows("xl", "sd3-t5")
of_each_class = pytest.mark.parametrize("pipeline", rows("xl", "sd3-t5", "flux-dev", "klein"), indirect=True)


@pytest.fixture(params=ROWS)
def pipeline(request, pipelines) -> DiffusionPipeline:
    """Not to be changed."""
    return pipelines[request.param]


@pytest.fixture
def family(pipeline):
    """With a trained part of its own, to be changed at will."""
    parts = pipeline.components
    component = "transformer" if "transformer" in parts else "unet"
    options = {"add_watermarker": False} if component == "unet" else {}
    own = type(pipeline)(**parts | {component: copy.deepcopy(parts[component])}, **options)
    return get_family(own, sampler="pipeline")


@pytest.fixture
def exact(family):
    """In float64."""
    family.module.double()
    return family


def batch_of(family, rows: int = 3) -> dict:
    latents = torch.randn(rows, *family.latent_shape, generator=torch.Generator().manual_seed(4))
    return map_tensors(family.batch(latents, list(map(Condition, PROMPTS[:rows]))), Tensor.double)


def normalised(pipeline: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """What its script makes of latents [B, C, 2 h, 2 w]: [B, 4 C, h, w]."""
    mean, variance = (part.view(1, -1, 1, 1) for part in (pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var))
    return (pipeline._patchify_latents(latents) - mean) / torch.sqrt(variance + pipeline.vae.config.batch_norm_eps)


def predict(family, batch: dict) -> Tensor:
    terms = torch.tensor([3, 11, 19])[: len(batch["sample"])]
    with torch.no_grad():
        return family.loss.predict(family.module, batch, terms, batch["sample"].roll(1))


@of_each_class
def test_the_time_of_what_is_drawn_away_from_a_concept_counts_both_passes(family, monkeypatch):
    rows = []
    count = family.module.register_forward_hook(
        lambda module, args, kwargs, found: rows.append(len(found[0])), with_kwargs=True
    )
    asked = list(map(Condition, PROMPTS))
    family.draw(asked, range(3), 2.5, 2, [Condition("blue digit")] * 3)
    count.remove()
    monkeypatch.setattr(ReplayStage, "_count", staticmethod(lambda context: 3))
    context = SimpleNamespace(
        family=family, options=SimpleNamespace(num_inference_steps=2, negative_guidance_scale=2.5)
    )
    assert ReplayStage().passes(context) == sum(rows)


@of_each_class
def test_draws_what_its_own_pipeline_draws_for_each_seed(pipeline, family):
    """Together as alone; from no words, and away from some."""
    led = {"guidance_scale": 2.5, "num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    for negative in (None, "blue digit"):
        options = led | {"negative_prompt": negative}
        if isinstance(pipeline, Flux2KleinPipeline):
            away = pipeline.encode_prompt(negative or "", max_sequence_length=24)[0]
            options = led | {"negative_prompt_embeds": away, "max_sequence_length": 24}
        if negative and isinstance(pipeline, FluxPipeline):
            options |= {"guidance_scale": 3.5, "true_cfg_scale": 2.5}
        expected = []
        for seed, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(seed)
            latents = pipeline(prompt=prompt, generator=generator, **options).images
            if isinstance(pipeline, FluxPipeline):
                latents = FluxPipeline._unpack_latents(latents, 16, 16, 2)
            if isinstance(pipeline, Flux2KleinPipeline):
                latents = normalised(pipeline, latents)
            expected.append(latents)
        avoided = negative and [Condition(negative)] * 3
        found = family.draw(list(map(Condition, PROMPTS)), range(3), 2.5, 2, avoided)
        assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
        assert found.shape == (3, *family.latent_shape)
    mixed = family.draw(
        list(map(Condition, PROMPTS)), range(3), 2.5, 2, [Condition(), Condition(negative), Condition()]
    )
    assert_close(mixed[1], found[1], rtol=1e-4, atol=1e-5)


def test_weights_in_float32_beside_encoders_in_bfloat16(pipeline):
    """As in a run on a pipeline in bfloat16."""
    half = copy.deepcopy(pipeline)
    for part in half.components.values():
        if isinstance(part, torch.nn.Module):
            part.bfloat16()
    family = get_family(half, sampler="pipeline")
    family.module.float()
    asked = list(map(Condition, PROMPTS))
    drawn = family.draw(asked, range(3), 2.5, 2)
    assert_close(drawn, get_family(pipeline, sampler="pipeline").draw(asked, range(3), 2.5, 2), rtol=0.1, atol=0.2)
    assert family.text_parts(family.embed(["nine"]))["tokens"].dtype == torch.bfloat16


def test_joint_projections_are_taken_apart(pipeline):
    module = copy.deepcopy(getattr(pipeline, get_family(pipeline).component))
    names = set(module.state_dict())
    if hasattr(module, "fuse_qkv_projections"):
        module.fuse_qkv_projections()
        assert set(unfused(module).state_dict()) == names


def test_pictures_become_latents_and_back_as_the_pipeline_has_it(pipeline, family):
    generator, prompt = torch.Generator().manual_seed(1), PROMPTS[0]
    options = {"guidance_scale": 1.0, "num_inference_steps": 2, "height": 16, "width": 16}
    if isinstance(pipeline, Flux2KleinPipeline):
        options["max_sequence_length"] = 24
    images = 2 * pipeline(prompt=prompt, generator=generator, output_type="pt", **options).images - 1
    assert_close(family.decode(family.draw([Condition(prompt)], [1], 1.0, 2)), images, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        posterior = pipeline.vae.encode(images).latent_dist
    if isinstance(pipeline, Flux2KleinPipeline):
        expected = normalised(pipeline, posterior.mode())
    else:
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
        expected = (posterior.mean + posterior.std * noise - (pipeline.vae.config.shift_factor or 0)) * 0.7
    assert_close(family.encode(images, torch.Generator().manual_seed(2)), expected)
    assert family.resolution == 16


def script_loss(family, latents: Tensor, prompts: list[str], terms: Tensor, noise: Tensor) -> Tensor:
    """diffusers' training scripts, line by line."""
    pipeline, model = family.pipeline, family.module
    if family.component == "unet":
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        noisy = scheduler.add_noise(latents, noise, terms)
        said = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        added = {"text_embeds": said[2].double(), "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * len(prompts))}
        predicted = model(noisy, terms, said[0].double(), added_cond_kwargs=added, return_dict=False)[0]
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, terms) if is_v else noise
        return torch.nn.functional.mse_loss(predicted, target)
    schedule = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    indices = 19 - terms
    sigmas = schedule.sigmas[indices].double().view(-1, 1, 1, 1)
    timesteps, noisy = schedule.timesteps[indices], (1 - sigmas) * latents + sigmas * noise
    if isinstance(pipeline, FluxPipeline):
        tokens, pooled, ids = pipeline.encode_prompt(prompts)
        told = torch.full([1], 3.5).expand(len(latents)) if model.config.guidance_embeds else None
        predicted = model(
            hidden_states=pipeline._pack_latents(noisy, len(latents), 4, 8, 8), timestep=timesteps / 1000,
            guidance=told, pooled_projections=pooled.double(), encoder_hidden_states=tokens.double(), txt_ids=ids,
            img_ids=pipeline._prepare_latent_image_ids(len(latents), 4, 4, "cpu", torch.float64), return_dict=False,
        )[0]  # fmt: skip
        predicted = pipeline._unpack_latents(predicted, 16, 16, 2)
    elif isinstance(pipeline, Flux2KleinPipeline):
        tokens, ids = pipeline.encode_prompt(prompts, max_sequence_length=24)
        places = pipeline._prepare_latent_ids(latents)
        predicted = model(
            hidden_states=pipeline._pack_latents(noisy), timestep=timesteps / 1000, guidance=None,
            encoder_hidden_states=tokens.double(), txt_ids=ids, img_ids=places, return_dict=False,
        )[0]  # fmt: skip
        predicted = pipeline._unpack_latents_with_ids(predicted, places)
    else:
        said = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        predicted = model(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=said[0].double(),
            pooled_projections=said[2].double(), return_dict=False,
        )[0]  # fmt: skip
    target = noise - latents
    return torch.mean(((predicted - target) ** 2).reshape(target.shape[0], -1), 1).mean()


@of_each_class
def test_the_loss_and_its_gradient_are_the_training_scripts(exact):
    batch, terms = batch_of(exact), torch.tensor([0, 11, 19])
    noise = exact.loss.sample_noise(batch, torch.Generator().manual_seed(7))
    parameters = list(exact.module.parameters())
    ours = exact.loss(exact.module, batch, terms, noise).mean()
    theirs = script_loss(exact, batch["sample"], PROMPTS, terms, noise)
    assert_close(ours, theirs, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (ours, theirs))
    assert_close(found, expected, rtol=1e-4, atol=1e-6)  # of prompts encoded in float32


def test_a_prompt_is_encoded_alone_whatever_was_encoded_before(family):
    """As after resuming: which kernel adds up a batch depends on its size."""
    sizes = []
    hooks = [e.register_forward_hook(lambda _, __, out: sizes.append(len(out[0]))) for e in family.text_encoders]
    again = get_family(family.pipeline, sampler="pipeline")
    first = again.embed(PROMPTS[:1])
    resumed, whole = again.embed(PROMPTS), family.embed(PROMPTS)
    for hook in hooks:
        hook.remove()
    assert sizes == [1] * 2 * len(PROMPTS) * len(hooks)
    for part, tensor in family.text_parts(whole).items():
        assert_close(family.text_parts(resumed)[part], tensor, rtol=0, atol=0)
        assert_close(family.text_parts(first)[part], tensor[:1], rtol=0, atol=0)


def test_the_empty_prompt_is_what_guidance_leads_away_from(pipeline, family):
    if isinstance(pipeline, FluxPipeline):
        expected = pipeline.encode_prompt("", device="cpu")[:2]
    elif isinstance(pipeline, Flux2KleinPipeline):
        expected = pipeline.encode_prompt("", max_sequence_length=24)[:1]
    elif family.component == "unet":
        expected = pipeline.encode_prompt("nine", device="cpu", do_classifier_free_guidance=True)[1::2]
        assert not expected[0].any()
    else:
        expected = pipeline.encode_prompt("nine", None, None, device="cpu")[1::2]
    found = family.text_parts(family.embed(["nine", "", "a red seven"]))
    assert_close([part[1:2] for part in found.values()], list(expected), rtol=1e-4, atol=1e-4)
    assert found["tokens"][[0, 2]].any()


def test_the_fisher_is_the_square_of_the_summed_gradient(exact):
    batch, parameters = batch_of(exact, 1), dict(exact.module.named_parameters())
    sums = estimate_fisher(exact.module, exact.loss, parameters, lambda _: batch, [0], terms=None, chunk_size=7)
    generator = seeded(0, "fisher", 0, 0)
    stratified_terms(20, 20, generator)
    noise = torch.randn(20, *exact.latent_shape, generator=generator, dtype=torch.float64)
    total = sum(exact.loss(exact.module, batch, torch.tensor([t]), noise[t : t + 1]).sum() for t in range(20))
    gradient = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True, allow_unused=True)
    squares = dict(zip(parameters, (g.square().float() for g in gradient), strict=True))
    assert_close(sums.finish({}).tensors, squares, rtol=1e-4, atol=1e-9)


def zeroed(family, scope: str, without: str | None = None) -> None:
    kept = set(family.trainable(without)) if without else set()
    with torch.no_grad():
        for name, parameter in family.trainable(scope).items():
            if name not in kept:
                parameter.zero_()


def test_scopes_hold_all_that_the_text_enters_by(exact):
    named = {scope: set(exact.trainable(scope)) for scope in exact.scopes}
    assert named.get("pooled", set()) < named["xattn-strict"] < named["xattn"] < named["full"]
    assert not named["xattn"] & named["noxattn"] and len(named["noxattn"]) > len(named["full"]) / 4
    batch = batch_of(exact)
    others = take(batch, [1, 2, 0]) | {"sample": batch["sample"]}

    def reads_text() -> bool:
        return not torch.allclose(predict(exact, batch), predict(exact, others), rtol=0, atol=1e-9)

    start = copy.deepcopy(exact.module.state_dict())
    assert reads_text()
    zeroed(exact, "xattn")
    assert not reads_text()
    if "pooled" not in named:
        return
    exact.module.load_state_dict(start)
    zeroed(exact, "xattn", without="pooled")  # attention and the stream of text alone: the pooled text is left
    assert reads_text()
    zeroed(exact, "pooled")
    assert not reads_text()


def test_an_adapter_reaches_the_pooled_text_and_is_loaded_by_stock_diffusers(family, tmp_path):
    names = family.adapted_layers("full", "attention+conditioning")
    plain = family.adapted_layers("full", "attention")
    pooled = family.scopes.get("pooled", family.scopes["xattn"])
    assert set(plain) < set(names) and any(map(pooled, (f"{name}." for name in set(names) - set(plain))))
    modulates = ("norm1.linear", "norm.linear", "time_emb_proj", "modulation_txt.linear")
    assert any(name.endswith(modulates) for name in names)
    source = tmp_path / "pipeline"
    family.pipeline.save_pretrained(source)
    batch = map_tensors(batch_of(family), Tensor.float)
    add_lora(family.module, names, 2, 3.0, seed=0)
    before = predict(family, batch)
    with torch.no_grad():
        for name, parameter in family.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if ".lora_" in name:
                parameter.copy_(parameter.bfloat16())  # float16 holds it, and three halves of it
    adapted = predict(family, batch)
    assert (adapted - before).abs().max() > 1e-2
    save_lora(family, tmp_path / "lora", "float32")
    save_lora_for_others(family, tmp_path / "lora" / LORA_FILE, 3.0, tmp_path / "others.safetensors")
    state = get_peft_model_state_dict(family.module, adapter_name="forget")
    fuse_lora(family.module)
    assert_close(predict(family, batch), adapted, rtol=0, atol=1e-5)
    for file in ("lora", "others.safetensors"):
        stock = load_pipeline(str(source), None, None, "float32")
        stock.load_lora_weights(tmp_path / file)
        module = getattr(stock, family.component)
        loaded = get_peft_model_state_dict(module, adapter_name=next(iter(module.peft_config)))
        assert loaded.keys() == state.keys()
        if file == "lora":
            assert_close(loaded, state, rtol=0, atol=0)
        family.module = module
        assert_close(predict(family, batch), adapted, rtol=0, atol=1e-5)


def test_a_closed_form_edit_moves_tokens_and_pooled_text(exact):
    before = copy.deepcopy(exact.text_maps())
    edits = edit_of_prompts(exact, [("seven", "nine")], [], regularization=1e-5)
    exact.edit(edits)
    concept, target = (exact.text_parts(exact.embed([word])) for word in ("seven", "nine"))
    assert set(exact.text_maps()) == set(concept)
    for part, maps in exact.text_maps().items():
        first, second = (rows[part].double() for rows in (concept, target))
        if part == "tokens":
            (places, other), *_ = zip(exact.last_words("seven"), exact.last_words("nine"), strict=True)
            assert places == other
            first, second = (rows[:, slice(*places)] for rows in (first, second))
        for name, layer in maps.items():
            with torch.no_grad():
                said, wanted, edited = before[part][name](first), before[part][name](second), layer(first)
            assert (edited - wanted).norm() < 0.1 * (said - wanted).norm() != 0


def test_attacks_go_through_every_encoder_and_the_pooled_text(pipeline, family):
    templates = ["a {}", "{} on black"]
    encoder = TemplateEncoder(family, templates, 1)
    vectors = encoder.start("seven").clone().requires_grad_()
    assert vectors.shape == (1, sum(encoder.widths))
    found = encoder(vectors, [0, 1])
    joined = isinstance(pipeline, Flux2KleinPipeline)  # a word and the space before it are one token
    expected = family.encode_prompts(["a seven", " seven on black" if joined else "seven on black"])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for part in family.text_parts(found).values():
        (gradient,) = torch.autograd.grad(part.square().sum(), vectors, retain_graph=True)
        assert gradient.any()
    latents = torch.randn(2, *family.latent_shape)
    settings = AttackSettings(steps=1, batch_size=2, keep_every=1)
    vector = attack_embedding(family, latents, templates, ["seven"], settings)
    assert draw_found(family, vector, templates, [0, 1], 2.0, 1).shape == latents.shape
    if joined:
        with pytest.raises(ValueError, match="another token; pass templates like 'a {}'"):
            attack_text(family, latents, templates, ["seven"], settings)
        templates = ["a {}", "a red {} on black"]
    text = attack_text(family, latents, templates, ["seven"], settings)
    assert draw_found(family, text, templates, [0, 1], 2.0, 1).shape == latents.shape


@pytest.mark.parametrize("name", ["sd3-t5", "flux-dev", "sd3", "klein"])
def test_typed_words_are_one_token_to_every_encoder_each_by_its_own_number(pipelines, name):
    """Also to a T5, whose tokenizer is another, and with a space, where a word and the one before it are one token."""
    family, templates = get_family(pipelines[name]), ["a {}", "a {} on black"]
    encoder = TemplateEncoder(family, templates, 2)
    words, table = Vocabulary(encoder).words.tolist(), encoder.table
    alone = Vocabulary(TemplateEncoder(family, templates, 1), ["seven"])
    assert len(alone.words) >= 15 and all(alone.readable([word]) for word in alone.words.tolist())
    typed = {encoder.text([i]): i for i in words}
    assert {"seven", "red"} <= typed.keys()
    if name in ("sd3-t5", "flux-dev"):  # a syllable of CLIP's is no word of the other's
        assert typed.keys() <= set(WORDS)
    ids = [typed["red"], typed["seven"]]
    assert encoder.reads_as("red seven", ids)
    assert not encoder.reads_as("seven red", ids)
    expected = family.encode_prompts(["a red seven", "a red seven on black"])
    assert_close(encoder(table[ids], [0, 1]), expected, rtol=1e-4, atol=1e-5)


def test_encoders_that_share_no_word_are_not_searched_for_any(pipelines):
    pipeline = copy.copy(pipelines["flux-dev"])
    pipeline.tokenizer_2, pipeline.text_encoder_2 = t5([word[::-1] for word in WORDS if len(word) > 1])
    encoder = TemplateEncoder(get_family(pipeline), ["a {}"], 1)
    with pytest.raises(ValueError, match="share no word; pass --attack embedding"):
        Vocabulary(encoder)


def test_esd_denoises_a_flow_by_eulers_method_on_the_grid_of_training(exact):
    scheduler = make_scheduler("ddim", exact.pipeline.scheduler)
    esd = ESD(exact.loss, copy.deepcopy(exact.module), scheduler, num_inference_steps=4, start_guidance=1.0)
    batch = batch_of(exact)
    drawn = esd.draw({"concept": batch, "empty": take(batch, [1, 2, 0])}, torch.Generator().manual_seed(3))
    drawn["level"][:] = 2  # one step from pure noise
    found = esd.partly_denoised(exact.module, drawn)
    if exact.component == "unet":
        assert found.isfinite().all()
        return
    level = esd.scheduler.sigmas[1].double()
    grid = exact.loss.sigmas[[14, 19]].double()  # where the third quarter of the terms ends, and all do
    assert_close(grid, torch.stack([level, level / level]), rtol=1e-5, atol=0)
    times = torch.full((3,), 20.0, dtype=torch.float64)
    with torch.no_grad():
        velocity = exact.loss.call(exact.module, drawn["noise"], times, drawn["concept"])
    assert_close(found, drawn["noise"] + (level - 1) * velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "xl"])
def test_saved_pipelines_are_checked_and_loaded_whole(pipelines, name, tmp_path):
    """Without T5, too, for which diffusers asks."""
    pipelines[name].save_pretrained(tmp_path)
    check_model(str(tmp_path))
    loaded = load_pipeline(str(tmp_path), None, None, "float32")
    assert type(loaded) is type(pipelines[name])
    family = get_family(loaded, sampler="pipeline")
    assert type(family).resolution_of(str(tmp_path)) == family.resolution == 16


def test_a_pipeline_of_a_class_of_its_own_has_the_defaults_of_what_it_inherits_from(tiny_tokenizer):
    class Own(FluxPipeline):
        pass

    stock = make("flux-dev", tiny_tokenizer)
    pipeline = Own(**stock.components)
    config = _config_of(pipeline, "float32", {"concept": "seven"})
    assert (config.sampler, config.guidance_scale) == ("pipeline", 3.5)
    assert type(get_family(pipeline, sampler=config.sampler)).name == "flux"
