"""The models under attack, checked before anything is drawn: their kind, their pictures' size, the first words."""

from collections.abc import Sequence
from dataclasses import replace

from sa_diffusers.attacks.options import FROM_PICTURES, SEARCHES, AttackConfig
from sa_diffusers.attacks.searches import Vocabulary
from sa_diffusers.core.concepts import mentions, split_phrasings
from sa_diffusers.data.concepts.candidates import words_of
from sa_diffusers.data.prompts import read_prompts
from sa_diffusers.evaluation.subjects import Subject, check_subjects, open_subjects, pipeline_of
from sa_diffusers.families import Family, family_class, get_family
from sa_diffusers.families.base import registry
from sa_diffusers.families.text_to_image.template_encoder import PLACE, Reader, TemplateEncoder
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.io.hub import read_part
from sa_diffusers.io.loading import load_pipeline, read_model_index


CONTROL = "never learned it"


class DoesNotFit(ValueError):
    """An attack that a model has no place for, while others may have."""


def complete(config: AttackConfig) -> AttackConfig:
    """The same options with runs' folders as their pipelines, and with the guidance, steps and sampler to draw with.

    For all attacks also with prompts of something else to relearn by, where the pipeline says what took its place.

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
    if config.all and not config.relearn_prompts:
        config = replace(config, relearn_prompts=_in_its_place(config))
    return replace(config, **vars(_subjects(config)[0].settings))


def _in_its_place(config: AttackConfig) -> list[str]:
    """The templates with what the forgotten pipeline says took the concept's place; none where it says no words."""
    words = split_phrasings(config.concept)
    about = [one for one in read_forgotten(config.forgotten) if mentions(one["concept"], words)]
    told = [one["surrogate"] or "" for one in about if one["surrogate_kind"] == "prompt"]
    surrogates = [said.strip() for said in "; ".join(told[-1:]).split(";") if said.strip() not in ("", "noise")]
    prompts = [template.replace(PLACE, said) for template in config.templates for said in surrogates]
    return [prompt for prompt in prompts if not mentions(prompt, words)]


def _subjects(config: AttackConfig) -> list[Subject]:
    """The pipelines as those of an evaluation; how they are drawn is the forgotten one's."""
    original, forgotten, *control = roles(config).values()
    return open_subjects([forgotten, original, *control], [], config.drawn_as)


def roles(config: AttackConfig) -> dict[str, str]:
    """{role: pipeline} of the models to attack; the original comes first."""
    models = {"original": config.original, "forgotten": config.forgotten}
    return models | ({CONTROL: config.control} if config.control else {})


def meets(config: AttackConfig, role: str) -> bool:
    """Whether an attack is made on the model of this role: what was trained apart is not merged."""
    return config.attack != "merged" or role != CONTROL


def forbidden(config: AttackConfig) -> Sequence[str]:
    """What the attack `text` must not find."""
    return () if config.allow_concept_words else split_phrasings(config.concept)


def listed_words(config: AttackConfig) -> list[str] | None:
    """The words of `word_list`; None: any. Raises OSError, ValueError: no file of words."""
    if config.word_list is None:
        return None
    return sorted({word for line in read_prompts(config.word_list) for word in words_of(line)})


def check_victims(config: AttackConfig, image_size: int | None) -> None:
    """As `check_subjects`; `image_size`: pixels a side that the classifier reads; None: any."""
    check_subjects(_subjects(config), image_size, alike=True, variant=None)


def load_family(config: AttackConfig, model: str) -> Family:
    """Raises ModelLoadError."""
    return get_family(load_pipeline(model, None, None, "float32"), sampler=config.sampler)


def first_tokens(config: AttackConfig, model: str, family: Family | None = None) -> str:
    """Look at a model, loaded for this where it is not yet, and say what the attack on it starts from.

    Raises:
        ModelLoadError: as `load_family`. ValueError: `initial` holds what the tokenizer does not know.
        DoesNotFit: the attack cannot be made on this model, such as by a prompt that it would cut.
    """
    family, word = family or load_family(config, model), split_phrasings(config.concept)[0]
    try:
        encoder = _check_fit(config, model, family, word)
    except ValueError as error:
        raise DoesNotFit(str(error)) from error
    if encoder is None:
        return f"weights and pictures are tried by {word!r}"
    words = config.initial or (word if config.attack != "text" else None)
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


def _check_fit(config: AttackConfig, model: str, family: Family, word: str) -> TemplateEncoder | None:
    """What a search fills with vectors. Raises ValueError: the attack cannot be made."""
    if config.attack in FROM_PICTURES and isinstance(family.pipeline, family.own_classes):
        raise ValueError(f"{model} forgets in how it draws, and --attack {config.attack} draws in its own way")
    if config.attack == "merged":
        own, other = (read_part(source, family.component) for source in (model, config.original))
        wrong = [name for name in own.keys() | other.keys() if name[0] != "_" and own.get(name) != other.get(name)]
        if wrong:
            raise ValueError(f"merged: {model} differs from the original in its {family.component}'s {min(wrong)}")
    if config.attack not in SEARCHES:  # a T5 that stands in for one, and reads next to nothing, is no hindrance
        Reader(*family.text_readers()[0], [template.replace(PLACE, word) for template in config.templates], 1)
        return None
    encoder = TemplateEncoder(family, config.templates, config.num_tokens)
    encoder.check_places(word)
    if config.attack == "text":
        _ = encoder.shared  # raises where no word can be typed for all encoders
        if config.word_list:
            Vocabulary(encoder, forbidden(config), listed_words(config))
    return encoder
