"""The models under attack, checked before anything is drawn: their kind, their pictures' size, the first words."""

from dataclasses import replace

from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.evaluation.subjects import Subject, check_subjects, open_subjects, pipeline_of
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.families.base import registry
from sa_diffusers.families.text_to_image.template_encoder import TemplateEncoder
from sa_diffusers.io.loading import load_pipeline, read_model_index


def complete(config: AttackConfig) -> AttackConfig:
    """The same options with runs' folders as their pipelines, and with the guidance, steps and sampler to draw with.

    Raises:
        ModelLoadError, ValueError: no such model, or one that reads no embeddings of tokens.
    """
    models = {role: pipeline_of(model) for role, model in roles(config).items()}
    for role, model in models.items():
        kind = read_model_index(model)["_class_name"]
        family = family_class(kind)
        if family is None or "token_embedding" not in family.capabilities:
            known = [name for name, one in registry().items() if "token_embedding" in one.capabilities]
            raise ValueError(f"the attack is on prompts of {' or '.join(known)}; {model} ({role}) is a {kind}")
    original, forgotten, *control = models.values()
    config = replace(config, original=original, forgotten=forgotten, control=control[0] if control else None)
    return replace(config, **vars(_subjects(config)[0].settings))


def _subjects(config: AttackConfig) -> list[Subject]:
    """The pipelines as those of an evaluation; how they are drawn is the forgotten one's."""
    original, forgotten, *control = roles(config).values()
    return open_subjects([forgotten, original, *control], [], config.drawn_as)


def roles(config: AttackConfig) -> dict[str, str]:
    """{role: pipeline} of the models to attack; the original comes first."""
    models = {"original": config.original, "forgotten": config.forgotten}
    return models | ({"never learned it": config.control} if config.control else {})


def check_victims(config: AttackConfig, image_size: int | None) -> None:
    """As `check_subjects`; `image_size`: pixels a side that the classifier reads; None: any."""
    check_subjects(_subjects(config), image_size, alike=True, variant=None)


def load_family(config: AttackConfig, model: str) -> Family:
    """Raises ModelLoadError; ValueError for a prompt that the model would cut."""
    family = get_family(load_pipeline(model, None, None, "float32"), sampler=config.sampler)
    TemplateEncoder(family, config.templates, config.num_tokens).check_places(split_phrasings(config.concept)[0])
    return family


def first_tokens(config: AttackConfig, model: str) -> str:
    """Load a model for a look, and say what the attack on it starts from.

    Raises:
        ModelLoadError, ValueError: as `load_family`; `initial` holds what the tokenizer does not know.
    """
    encoder = TemplateEncoder(load_family(config, model), config.templates, config.num_tokens)
    words = config.initial or (split_phrasings(config.concept)[0] if config.attack != "text" else None)
    if words is None:
        return "the attack starts from words at random"
    ids, tokenizer = encoder.tokens(words), encoder.tokenizer
    if not ids or set(ids) & set(tokenizer.all_special_ids):
        read = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise ValueError(
            f"expected --initial of words that the tokenizer of {model} knows, got {words!r}, read as {read}"
        )
    encoder.check_places(words)
    used, pieces = ([encoder.text([token]) for token in part] for part in (encoder.readers[0].start(words), ids))
    count = f"{len(pieces)} token{'s' * (len(pieces) != 1)}"
    return f"the attack starts from {' | '.join(used)}, of {words!r} ({count}: {' | '.join(pieces)})"
