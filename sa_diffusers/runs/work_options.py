"""The options of what a run makes: samples, the Fisher, what is trained and how fast."""

from dataclasses import dataclass
from typing import Literal

from sa_diffusers import methods
from sa_diffusers.io.configuration import Options, option
from sa_diffusers.runs.paper_quirks import QUIRKS


@dataclass
class ConceptOptions(Options):
    """What to forget, and what takes its place."""

    concept: str = option(
        "",
        "Concept to forget: one or several phrasings of it, separated by commas ('seven, 7'). Repeat it, each time "
        "with its --surrogate, for several at once; in a YAML file they are separated by semicolons.",
        everyday=True,
        listed=True,
    )
    concepts: str | None = option(
        None,
        "File of concepts to forget at once, in the place of --concept: YAML, or a table with a line of names (.csv, "
        ".jsonl), of concept, surrogate, siblings, kind.",
        identity=False,
    )
    surrogate: str | None = option(
        None,
        "What takes its place: a prompt, a folder of images (./pictures), noise, or auto: the model chooses a word "
        "(auto:3: by short trainings with three); null: looked up in assets/surrogates.yaml.",
        everyday=True,
        blank=True,
        listed=True,
    )
    after: str | None = option(
        None,
        "Folder of a run of the same model to go on from, or a hub id: what it and those before it forgot stays "
        "forgotten, and their samples and Fisher serve again. Adapters are kept, one a request; without, all are "
        "forgotten anew.",
        identity=False,
    )
    plurals: bool = option(
        False, "Also count plurals and possessives of its words ('sevens', 'Van Goghs') as naming the concept."
    )
    siblings: str | None = option(
        None,
        "Words, separated by commas, that could stand in the concept's place; prompts with none of them leave it "
        "open. null: looked up in assets/surrogates.yaml.",
        listed=True,
    )


@dataclass
class FolderOptions(Options):
    """Where, and by which random numbers."""

    output_dir: str | None = option(None, "Folder of the run; null: runs/<concept>.", identity=False, everyday=True)
    num_threads: int | None = option(
        None, "CPU threads of each process; null: as the environment (accelerate: 1).", above=0, identity=False
    )
    overwrite: bool = option(False, "Discard what the output folder holds of another configuration.", identity=False)
    seed: int = option(0, "Seed of every random number.", least=0)


@dataclass
class SampleOptions(Options):
    """The model's own pictures, and those of the surrogate."""

    samples: str | None = option(
        None,
        "Samples of this model to reuse: another run's samples/ folder, or a hub id.",
        identity=False,
    )
    num_samples: int = option(2000, "Samples for replay and Fisher, spread over the prompts.", above=0)
    empty_prompt_fraction: float = option(
        0.1, "Share of the samples drawn for the empty prompt, which guidance uses.", least=0, below=1
    )
    num_surrogate_samples: int = option(400, "Surrogate pictures.", above=0)
    fresh_samples: bool = option(
        False, "Draw replay and surrogate samples anew every step from a frozen copy of the model (VAEs only)."
    )
    latents: Literal["encoder", "drawn"] = option(
        "encoder",
        "Latents of a VAE's samples in training: from its encoder, as in the paper, or those that fresh samples were "
        "drawn with, which is faster and spares the encoder.",
    )
    replay_guidance_scale: float = option(7.5, "Guidance of the samples for replay and Fisher.", least=0)
    sample_batch_size: int = option(
        8, "Pictures drawn at once by each process; a fixed grid, part of the run's identity.", above=0
    )
    replay_negative: Literal["open", "all", "none", "mixture"] = option(
        "open",
        "Which replay prompts are drawn with the concept as negative prompt: those that leave it open (the empty "
        "prompt, and where siblings are known those that name none); all; or none, which leaves it where unnamed. "
        "mixture: those that leave it open are taught what is predicted without its share, see open_strength.",
    )
    negative_guidance_scale: float = option(
        1.5,
        "Guidance of replay samples with a negative prompt: weak, since it distorts everything else.",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents == "drawn" and not self.fresh_samples:
            raise ValueError("latents: drawn needs fresh_samples; samples that were kept have lost theirs")


@dataclass
class SeveralOptions(Options):
    """How several concepts, or requests one after another, keep beside each other."""

    adapters: Literal["one", "each"] = option(
        "one",
        "With lora_rank: one adapter for all concepts, or each its own, trained by itself on the same samples and "
        "Fisher, a file each in lora/: any of them can be switched on, taken back and merged.",
        identity=False,
    )
    chain_memory: bool = option(
        True,
        "After another run, train the surrogates of what that forgot as well; false: of new concepts alone.",
        identity=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters == "each":
            for name in ("strength_sheet", "strength", "snapshot_steps", "save_single_file", "quantize_base"):
                if getattr(self, name, None):
                    raise ValueError(f"adapters each has no one adapter for {name}; omit either")
            if not self.lora_rank:
                raise ValueError("adapters each trains adapters; expected a lora_rank, such as 4, got none")


@dataclass
class MethodOptions(SeveralOptions):
    """How it forgets: what is trained, towards what, and from where."""

    method: str = option(methods.DEFAULT, "Method; --help methods lists them, --help sa explains one.", everyday=True)

    train_scope: str | None = option(
        None,
        "Weights to train; null: full, or the method's own. full: all of the model; in text-to-image also xattn: "
        "cross-attention, or the stream of text, xattn-strict: its keys and values alone, noxattn: all but that, the "
        "output and the time embedding; pooled: what reads a pooled text, which the first two also train.",
        otherwise="full",
    )
    lora_rank: int | None = option(
        None,
        "Train low-rank adapters of this rank, not the weights; null: train the weights.",
        above=0,
        everyday=True,
    )
    lora_alpha: float | None = option(
        None, "The adapters' change is alpha / rank * B A; null: the rank, which gives 1.", above=0
    )
    lora_targets: Literal["attention", "attention+conv", "attention+conditioning"] = option(
        "attention",
        "Layers of the scope that get an adapter: projections of attention; also convolutions; or also what a pooled "
        "text and the time enter by.",
    )
    ewc_lambda: float | None = option(
        None,
        "Weight of EWC in the authors' units: lambda sum F delta^2, no 1/2; 0: no Fisher; null: 50, or 0 for methods "
        "without EWC.",
        least=0,
        otherwise=50.0,
        everyday=True,
    )
    ewc_dtype: Literal["float32", "bfloat16"] = option("float32", "Precision that training keeps the Fisher in.")
    ewc_device: Literal["device", "cpu"] = option(
        "device", "Where training keeps Fisher and anchor: with the weights, or streamed every step.", identity=False
    )
    replay_weight: float | None = option(
        None, "Weight of replay; 0: no replay; null: 1, or 0 for methods without it.", least=0, otherwise=1.0
    )
    replay_prompt_dropout: float = option(
        0.0,
        "Share of the replay samples shown under the empty prompt or null class, from which guidance leads away.",
        least=0,
        below=1,
    )
    replay_target: Literal["noise", "model"] | None = option(
        None,
        "What replay samples are denoised towards: the noise that was drawn, each under its own prompt, as in the "
        "paper; or what a frozen copy of the model predicts, under any prompt. null: model, where the method can.",
        otherwise="model",
    )
    surrogate_target: Literal["noise", "model"] | None = option(
        None,
        "What surrogate samples are denoised towards, under the concept's prompt: the noise that was drawn, as in the "
        "paper; or what a frozen copy predicts under the surrogate's prompt, where that is one. null: noise.",
        otherwise="noise",
    )
    density: Literal["uniform", "logit_normal", "mode"] = option(
        "uniform", "Of noise levels in the training of a flow, as in diffusers' scripts."
    )
    weighting: Literal["none", "preconditioned", "sigma_sqrt", "cosmap"] = option(
        "none", "Of noise levels in the training of a flow, as in diffusers' scripts; not in the Fisher."
    )
    start: Literal["model", "edit"] | None = option(
        None,
        "Where training starts: at the model as it is; or where a closed-form edit would put the weights, see --edit. "
        "EWC still holds to the model before the edit: --config bundled/digits_edit has settings for it. null: model.",
        otherwise="model",
    )
    finish: Literal["edit"] | None = option(
        None,
        "What follows training: a closed-form edit of what it left, see --edit, in whole weights. Training from the "
        "model takes a concept out of pictures that do not name it, the edit takes what its name still brings.",
        identity=False,
    )
    edit: str | None = option(
        None, "Whose edit is meant by start and finish: uce or speed, with its options; null: uce.", identity=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha needs lora_rank; omit it, or give the rank of the adapters")

    @property
    def leaves_adapter(self) -> bool:
        """Whether what was trained is kept as an adapter."""
        return self.lora_rank is not None and self.finish is None


@dataclass
class FisherOptions(Options):
    """Which weights matter."""

    fisher: str | None = option(
        None, "Fisher of this model to reuse: a file, a run's folder, or a hub id.", identity=False
    )
    fisher_samples: int = option(1000, "Samples the Fisher averages over, at most num_samples.", above=0)
    fisher_terms: str = option(
        "10",
        "Timesteps in each of the two draws of the cheap estimator, or all: every timestep, the paper's estimator.",
    )
    fisher_layers: Literal["all", "trained"] = option(
        "all",
        "Weights that it is of: all, for any later run; or, of models too large for that, those that are trained here "
        "or lie under an adapter.",
    )
    fisher_chunk_size: int = option(
        10, "Timesteps in one forward pass; changes memory and speed, not the result.", above=0, identity=False
    )
    fisher_device: Literal["auto", "device", "cpu"] = option(
        "auto", "Where the Fisher is summed: with the weights, or (auto: for want of room) on the CPU.", identity=False
    )
    chain_fisher: Literal["first", "carried", "none"] = option(
        "first",
        "EWC's Fisher after another run. first: the chain's first one. carried: that of what the last run left, on "
        "samples of what stays, and a share of the one before; none: no EWC.",
        identity=False,
    )
    chain_decay: float = option(
        0.5, "Weight of the Fisher before in one that is carried, which is a mean.", above=0, identity=False
    )
    paper_quirks: list[str] = option(
        [],
        "What the authors' code for class-conditional diffusion does differently from the paper: stretched_samples, "
        "fisher_unit_range, fisher_label_dropout.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher_terms != "all" and not (self.fisher_terms.isdigit() and int(self.fisher_terms) > 0):
            raise ValueError(f"expected fisher_terms to be a positive number or all, got {self.fisher_terms!r}")
        if self.chain_fisher != "first" and self.fisher:
            raise ValueError(f"chain_fisher {self.chain_fisher} takes no other Fisher; omit fisher, or chain_fisher")
        unknown = [quirk for quirk in self.paper_quirks if quirk not in QUIRKS]
        if unknown:
            raise ValueError(f"expected paper_quirks to be of {', '.join(QUIRKS)}; got {unknown[0]!r}")

    @property
    def terms(self) -> int | None:
        """Timesteps in a draw of the Fisher's estimator; None for all of them."""
        return None if self.fisher_terms == "all" else int(self.fisher_terms)
