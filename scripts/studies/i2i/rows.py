"""The rows of the study: what each changes of bundled/digits_inpaint with all steps, and which are compared."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What goes by the family of the model.

    Attributes:
        title: what it is called.
        factor: the forgetting at which methods are compared, times the error before.
        limited: the same where few pictures or none are left to retain, an error; None: by the factor.
        base: what the model before has to reach, (measure, bar, whether that is the least), on all pictures.
        fooled: the most that the accuracy on forgotten pictures may be with `other` at alpha 1; None: no bar.
    """

    title: str
    factor: float
    limited: float | None = None
    base: tuple[tuple[str, float, bool], ...] = ()
    fooled: float | None = None


DEFAULT, PIXELS = "masked_autoencoder", "pixel_inpaint"
KINDS = {
    DEFAULT: Kind("masked autoencoder", 1.5, 0.65, (("accuracy", 0.88, True), ("masked_mse", 0.30, False)), 0.62),
    "token_inpaint": Kind("model of tokens", 1.25),
    PIXELS: Kind("diffusion of pixels", 1.2),
}
FORGOTTEN, RETAINED, THIRD = "2,5,8", "0,1,3,4", "6,7,9"
OTHER = {"surrogate": "other"}
SMALL = {"forget_alpha": 1.0, "num_train_steps": 80, "train_batch_size": 16}
# Without pictures to retain the same ones are judged by, as those that training never sees.
BARE = SMALL | {"retain_images": None, "other_images": RETAINED}
FEW = SMALL | {"images_class": 5}
FISHER_OF = "EWC alone, lambda 3000"  # the row whose Fisher, of all pictures to retain, others take
# EWC's dial is lambda; without EWC it is how long is trained, as Adam knows no weight of a single term.
LAMBDAS, STEPS = (3e3, 3e4, 5e4, 1e5), (5, 10, 20, 40)
BY_OUTPUTS = {"max-loss": (0.02, 0.05), "noisy-label": (0.1, 1.0), "retain-label": (0.1, 1.0)}


def _named(lead: str, dial: str, values: tuple[float, ...], changes: dict) -> dict[str, dict]:
    options = {
        "lambda": "ewc_lambda", "alpha": "forget_alpha", "bound": "retain_bound", "steps": "num_train_steps",
        "l1": "encoder_l1",
    }  # fmt: skip
    option = options[dial]
    return {f"{lead}, {dial} {value:g}": changes | {option: value} for value in values}


NOISE = _named("noise", "alpha", (0.02, 0.03, 0.25, 1.0), {})
OTHERS = _named("other", "alpha", (0.25, 1.0, 2.0), OTHER)
BOUNDED = _named("bounded", "bound", (0.003, 0.01, 0.03, 0.1), {})
RIVALS = {
    **{name: _named(name, "alpha", alphas, {"method": name}) for name, alphas in BY_OUTPUTS.items()},
    "random-encoder": _named("random-encoder", "alpha", (0.1, 1.0), {"method": "random-encoder"}),
}
# What a masked autoencoder need not be asked: others move less at the same weight.
WIDER = {
    "noise": _named("noise", "alpha", (4.0, 16.0), {}),
    "other": _named("other", "alpha", (4.0, 16.0), OTHER),
    "random-encoder": _named("random-encoder", "alpha", (4.0, 16.0), {"method": "random-encoder"}),
    "max-loss": _named("max-loss", "alpha", (0.25,), {"method": "max-loss"}),
    "noisy-label": _named("noisy-label", "alpha", (4.0,), {"method": "noisy-label"}),
    "retain-label": _named("retain-label", "alpha", (4.0,), {"method": "retain-label"}),
}
FURTHER = {"retain-only": {"method": "retain-only"}}
SPARSE = {
    "retain-only, l1": {"method": "retain-only", "encoder_l1": 1e-5},
    **_named("retain-only", "l1", (3e-5, 1e-4, 3e-4), {"method": "retain-only"}),
}
LIMITED = {
    "EWC alone": _named("EWC alone", "lambda", LAMBDAS[:1], BARE | {"fisher_images": RETAINED})
    | _named("EWC alone", "lambda", LAMBDAS[1:], BARE | {"fisher": FISHER_OF}),
    "nothing alone": _named("nothing alone", "steps", STEPS, BARE | {"fisher": FISHER_OF, "ewc_lambda": 1e-9}),
    "few pictures, EWC": _named("few pictures, EWC", "lambda", LAMBDAS, FEW | {"fisher": FISHER_OF}),
    "few pictures": _named("few pictures", "steps", STEPS, FEW),
}
# of the first seed alone
ONCE = {
    **{f"{kind}, alpha 0.25": {"surrogate": kind} for kind in ("nearest", "mean", "blur")},
    "proxy: third retained": {"retain_images": THIRD, "other_images": RETAINED},
}
# Of a diffusion of pixels alone, whose features of pictures to forget and to retain moved alike: what may part them.
SELECTIVE = {
    "low timesteps": _named("low timesteps", "alpha", (0.25, 1.0, 4.0), {"timestep_range": [0.0, 0.3]}),
    "deepest features": _named("deepest features", "alpha", (0.25, 1.0, 4.0), {"feature_depths": [-1]}),
    "released target": _named(
        "released target", "alpha", (0.25, 1.0, 4.0), {"surrogate_context": "real", "noise": "normal"}
    ),
    "retain weight 10": _named("retain weight 10", "alpha", (1.0, 4.0, 16.0), {"retain_weight": 10.0}),
}
ROWS: dict[str, dict] = {
    **NOISE, **OTHERS, **BOUNDED, **FURTHER, **SPARSE,
    **{name: row for rows in (*RIVALS.values(), *WIDER.values(), *LIMITED.values()) for name, row in rows.items()},
    **ONCE,
    **{name: row for rows in SELECTIVE.values() for name, row in rows.items()},
}  # fmt: skip
PROBED = ("noise, alpha 0.25", "noise, alpha 1", "other, alpha 1", "max-loss, alpha 0.05", "retain-only")
SPARSER = "sparse (l1)"
# At equal forgetting: the rows of a method, weakest first; of those by outputs the weakest is further training alone.
LINES: dict[str, tuple[str, ...]] = {
    "noise": ("original", *NOISE, *WIDER["noise"]),
    "other": ("original", *OTHERS, *WIDER["other"]),
    "bounded": ("original", *BOUNDED),
    "random-encoder": ("original", *RIVALS["random-encoder"], *WIDER["random-encoder"]),
    **{name: ("retain-only", *RIVALS[name], *WIDER[name]) for name in BY_OUTPUTS},
    SPARSER: ("retain-only", *SPARSE),
    **{name: ("original", *rows) for name, rows in (LIMITED | SELECTIVE).items()},
}


def rows_of(kind: str) -> dict[str, dict]:
    """The rows that a model of a family is asked."""
    others = (WIDER if kind == DEFAULT else {}, SELECTIVE if kind != PIXELS else {})
    left = {name for part in others for rows in part.values() for name in rows}
    return {name: changes for name, changes in ROWS.items() if name not in left}
