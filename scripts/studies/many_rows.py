"""Rows of the study of many concepts: what is forgotten, and what each changes of configs/digits_many.yaml."""

from typing import Any

from sa_diffusers.data.concepts.lists import Forget


DIGITS = {
    name: Forget(f"{name}, {figure}", surrogate)
    for name, figure, surrogate in (
        ("seven", 7, "three"), ("eight", 8, "five"), ("six", 6, "zero"),
        ("one", 1, "two"), ("nine", 9, "three"), ("four", 4, "five"),
    )
}  # fmt: skip
KEPT = ("zero", "two", "three", "five")
ORDERS = {"": tuple(DIGITS), ", other order": ("four", "one", "seven", "nine", "six", "eight")}
# Captions that a search goes by, where the row forgets an ink.
INK_TEMPLATES = ["a {} digit", "draw a {} number", "a digit in {} ink", "{} ink", "a {} character", "a figure in {}"]
INKS = [DIGITS["seven"], DIGITS["eight"], Forget("red", "green"), Forget("blue", "cyan")]
# Methods, by what they change of configs/digits_many.yaml.
BARE: dict[str, Any] = {"lora_rank": None, "ema_decay": None}
RECIPE: dict[str, Any] = {}
# Prompts that leave it open are taught what is predicted without the concepts' share.
MIXTURE: dict[str, Any] = {
    "replay_negative": "mixture", "replay_weight": 15.0, "lora_rank": 8, "learning_rate": 1e-3, "open_siblings": 8,
}  # fmt: skip
# What does not start at an edit learns as configs/digits.yaml does: at the recipe's rate nothing would be forgotten.
MODEL: dict[str, Any] = {
    "start": "model", "surrogate_target": "noise", "replay_weight": 1.0, "learning_rate": 3e-3,
    "lr_scheduler": "constant_with_warmup",
}  # fmt: skip
UCE = BARE | {"method": "uce"}
# Its paper's threshold for one concept, 0.1, keeps half of the others when three digits go.
SPEED = BARE | {"method": "speed", "speed_threshold": 0.01}
AT_ONCE = {
    "recipe": RECIPE,
    "mixture": MIXTURE,
    "model": MODEL | {"ewc_lambda": 0.5},
    "model, no EWC": MODEL | {"ewc_lambda": 0.0},
    "model, then edit": MODEL | {"ewc_lambda": 0.0, "finish": "edit"},
    "uce": UCE,
    "uce, scale 1": UCE | {"uce_erase_scale": 1.0},
    "speed": SPEED,
    "speed, threshold 0.1": SPEED | {"speed_threshold": 0.1},
}
SHORT: dict[str, Any] = {"num_train_steps": 80}  # of a request in turn
FEW: dict[str, Any] = {"num_samples": 40, "fisher_samples": 40}
PLAIN: dict[str, Any] = MODEL | {"replay_weight": 0.0, "ewc_lambda": 0.0, "chain_memory": False}
UNIT = "unit"  # a Fisher that is the same of all weights, with the sum of the original's
# With memory: what they change of the recipe.
CHAINS = {
    "fisher first": {},
    "fisher carried": {"chain_fisher": "carried"},
    "fisher carried, decay 1": {"chain_fisher": "carried", "chain_decay": 1.0},
    "fisher none": {"chain_fisher": "none"},
    "mixture": MIXTURE,
    **{f"fisher first, lambda {weight:g}": {"ewc_lambda": weight} for weight in (5e-3, 0.05, 0.5)},
    "fisher carried, lambda 0.05": {"chain_fisher": "carried", "ewc_lambda": 0.05},
    "fisher first, no memory": {"chain_memory": False},
    "fisher carried, no memory": {"chain_fisher": "carried", "chain_memory": False},
    "fisher none, no memory": {"chain_fisher": "none", "chain_memory": False},
    "fisher first, few samples": FEW,
    "fisher none, few samples": FEW | {"chain_fisher": "none"},
    "fisher first, no replay": {"replay_weight": 0.0},
    "fisher none, no replay": {"replay_weight": 0.0, "chain_fisher": "none"},
    "from the model": MODEL | {"ewc_lambda": 0.5},
    # Plain continuation, and what may hold it.
    "plain, kept adapters": PLAIN,
    "plain, EWC": PLAIN | {"ewc_lambda": 0.5},
    "plain, L2": PLAIN | {"ewc_lambda": 0.5, "fisher": UNIT},
    "plain, keys and values projected": PLAIN | {"method": "projected"},
}
# Each from the last result, which is all that it knows.
REPEATED = {
    "plain": SHORT | MODEL | {"method": "finetune", "replay_weight": 0.0},
    "recipe anew": SHORT,
    "uce repeated": UCE,
    "speed repeated": SPEED,
}
COMPOSED = "composed, in full"  # which judges more than the row "composed", whose adapters are the same
# The rows that are made unless others are asked for: they settle what is claimed of several concepts.
CORE = [
    *(
        f"at once, {what}: {name}"
        for what in ("1", "3", "6", "digits and inks")
        for name in ("original", "recipe", "model", "model, no EWC", "model, then edit", "uce", "speed")
    ),
    *(
        f"in turn: {name}"
        for name in (
            "fisher first", "fisher carried", "fisher none", "fisher first, lambda 0.05", "fisher first, no replay",
            "fisher none, no replay", "plain", "plain, EWC", "plain, L2", "plain, keys and values projected",
            "uce repeated", "speed repeated",
        )
    ),
    *(f"at once, {count}: mixture" for count in (1, 3, 6)),
    "in turn: mixture",
    "in turn, other order: fisher first",
    COMPOSED,
]  # fmt: skip
QUICK = {
    "num_samples": 40, "num_surrogate_samples": 24, "num_inference_steps": 4, "fisher_samples": 4, "fisher_terms": "2",
    "num_train_steps": 4, "lr_warmup_steps": 1,
}  # fmt: skip
