"""What an attack starts from, checked before anything is drawn: folder, models, classifier, first words; the plan."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.prompt.prompt_attack import TemplateEncoder, check_places
from sa_diffusers.attacks.results import Judge
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.evaluation.judges.load_classifier import load_classifier
from sa_diffusers.evaluation.suite.options import PipelineEvaluationConfig
from sa_diffusers.evaluation.suite.subjects import open_subjects, pipeline_of
from sa_diffusers.families import get_family
from sa_diffusers.families.stable_diffusion import TextToImageFamily
from sa_diffusers.io.bundled import resolve
from sa_diffusers.io.hub import explain_load_errors
from sa_diffusers.io.loading import load_pipeline, read_model_index


KINDS = ("StableDiffusionPipeline", "SafeGuidancePipeline")
FOREIGN = ("pipeline", "config.yaml", "evaluation.json", "model_index.json")  # of a run, an evaluation, a pipeline


def check_folder(output_dir: str | Path) -> None:
    """Raise ValueError for a folder that is another script's: its report.html would be replaced."""
    there = [name for name in FOREIGN if (Path(output_dir) / name).exists()]
    if there:
        raise ValueError(
            f"{output_dir} holds {', '.join(there)}: it is the folder of a run, an evaluation or a pipeline; pass "
            "another --output_dir"
        )


def complete(config: AttackConfig) -> AttackConfig:
    """The same options with runs' folders as their pipelines, and with the guidance, steps and sampler to draw with.

    Raises:
        ModelLoadError: no such model.
        ValueError: one that is no text-to-image pipeline.
    """
    models = {role: pipeline_of(model) for role, model in roles(config).items()}
    for role, model in models.items():
        kind = read_model_index(model)["_class_name"]
        if kind not in KINDS:
            raise ValueError(f"the attack is on prompts of {' or '.join(KINDS)}; {model} ({role}) is a {kind}")
    original, forgotten, *control = models.values()
    asked = PipelineEvaluationConfig(
        pipeline=forgotten, compare=[original, *control], metrics="change", concept=config.concept,
        guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps, sampler=config.sampler,
    )  # fmt: skip
    settings = vars(open_subjects(asked)[0].settings)
    return replace(config, original=original, forgotten=forgotten, control=control[0] if control else None, **settings)


def roles(config: AttackConfig) -> dict[str, str]:
    """{role: pipeline} of the models to attack; the original comes first."""
    models = {"original": config.original, "forgotten": config.forgotten}
    return models | ({"never learned it": config.control} if config.control else {})


def load_judge(config: AttackConfig) -> Judge | None:
    """The classifier and the concept's class. Raises ValueError if there is no such class."""
    if config.classifier is None:
        return None
    classifier = load_classifier(resolve(config.classifier))
    found = classifier.find_class(list(split_phrasings(config.concept)))
    if found is None:
        raise ValueError(
            f"the classifier has no class named {config.concept!r}; it knows {classifier.config.attributes}. Pass one "
            "that knows the concept, or leave --classifier away"
        )
    return Judge(classifier, *found)


def check_resolutions(models: Mapping[str, str], image_size: int | None) -> None:
    """Raise ValueError for models that draw pictures of different sizes, or of another than the classifier reads.

    Their configurations alone are read.

    Args:
        image_size: pixels a side that the classifier reads; None: any.
    """
    sizes = {role: resolution(model) for role, model in models.items()}
    for role, model in models.items():
        if sizes[role] != sizes["original"]:
            raise ValueError(
                f"the original draws pictures of {sizes['original']} pixels, {model} ({role}) {sizes[role]}; pass "
                "models of one resolution"
            )
        if image_size not in (None, sizes[role]):
            raise ValueError(
                f"the classifier reads pictures of {image_size} pixels, {model} draws {sizes[role]}; pass another "
                "--classifier"
            )


def resolution(model: str) -> int:
    """Height and width in pixels of a pipeline's pictures, as `TextToImageFamily.resolution`, without its weights."""
    source = resolve(model)
    with explain_load_errors(source):
        unet = UNet2DConditionModel.load_config(source, subfolder="unet")
        vae = AutoencoderKL.load_config(source, subfolder="vae")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def load_family(config: AttackConfig, model: str) -> TextToImageFamily:
    """Raises ModelLoadError; ValueError for a prompt that the model would cut."""
    family = get_family(load_pipeline(model, None, None, "float32"), sampler=config.sampler)
    check_places(_encoder(config, family), split_phrasings(config.concept)[0])
    return family


def first_tokens(config: AttackConfig, model: str) -> str:
    """Load a model for a look, and say what the attack on it starts from.

    Raises:
        ModelLoadError: as `load_family`.
        ValueError: as `load_family`; `initial` holds what the tokenizer does not know.
    """
    encoder = _encoder(config, load_family(config, model))
    words = config.initial or (split_phrasings(config.concept)[0] if config.attack == "embedding" else None)
    if words is None:
        return "the attack starts from words at random"
    ids, tokenizer = encoder.tokens(words), encoder.pipeline.tokenizer
    if not ids or set(ids) & set(tokenizer.all_special_ids):
        read = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise ValueError(
            f"expected --initial of words that the tokenizer of {model} knows, got {words!r}, read as {read}"
        )
    check_places(encoder, words)
    pieces = [tokenizer.decode([token]).strip() for token in ids]
    used = [pieces[k % len(pieces)] for k in range(config.num_tokens)]
    count = f"{len(pieces)} token{'s' * (len(pieces) != 1)}"
    return f"the attack starts from {' | '.join(used)}, of {words!r} ({count}: {' | '.join(pieces)})"


def describe_plan(config: AttackConfig, judge: Judge | None) -> str:
    """What is about to be done, for the terminal."""
    models = roles(config)
    count = len(models) * config.num_restarts
    pictures = config.num_targets + config.num_images * (len(models) + count)
    lines = [f"bring {config.concept!r} back by --attack {config.attack}"]
    lines += [f"  {role}: {model}" for role, model in models.items()]
    lines += [
        f"{count:,} attacks ({len(models)} models x {config.num_restarts}) of {config.steps:,} steps, "
        f"{config.batch_size} targets each",
        f"{pictures:,} pictures: {config.num_targets:,} targets, and {config.num_images:,} of each model before and "
        "after each attack",
        f"  guidance {config.guidance_scale:g}, {config.num_inference_steps} steps of {config.sampler}",
        f"judged by {config.classifier} as {judge.attribute}" if judge else "no classifier: pictures only",
        f"into {Path(config.output_dir).resolve()}; what it holds already is reused",
    ]
    return "\n".join(lines)


def _encoder(config: AttackConfig, family: TextToImageFamily) -> TemplateEncoder:
    return TemplateEncoder(family, config.templates, config.num_tokens)
