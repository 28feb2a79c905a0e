"""The models under attack, checked before anything is drawn: their kind, their pictures' size, their words."""

from dataclasses import replace

from sa_diffusers.attacks.options import AttackConfig
from sa_diffusers.attacks.template_encoder import TemplateEncoder
from sa_diffusers.core.concepts import split_phrasings
from sa_diffusers.evaluation.subjects import Subject, open_subjects, pipeline_of
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.families.base import registry
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
    return replace(config, **vars(subjects(config)[0].settings))


def subjects(config: AttackConfig) -> list[Subject]:
    """The pipelines as those of an evaluation; how they are drawn is the forgotten one's."""
    original, forgotten, *control = roles(config).values()
    return open_subjects([forgotten, original, *control], [], config.drawn_as)


def roles(config: AttackConfig) -> dict[str, str]:
    """{role: pipeline} of the models to attack; the original comes first."""
    models = {"original": config.original, "forgotten": config.forgotten}
    return models | ({"never learned it": config.control} if config.control else {})


def load_family(config: AttackConfig, model: str) -> Family:
    """Raises ModelLoadError; ValueError for a prompt that the model would cut, or a concept that it cannot read."""
    family = get_family(load_pipeline(model, None, None, "float32"), sampler=config.sampler)
    encoder = TemplateEncoder(family, config.templates, config.num_tokens)
    word, tokenizer = split_phrasings(config.concept)[0], encoder.tokenizer
    ids = encoder.tokens(word)
    if not ids or set(ids) & set(tokenizer.all_special_ids):
        read = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise ValueError(
            f"expected a concept in words that the tokenizer of {model} knows, got {word!r}, read as {read}"
        )
    encoder.check_places(word)
    return family
