"""What a run says at its end: numbers, pictures, a page, and cards in the folders that can be pushed."""

from dataclasses import asdict
from typing import Any

from sa_diffusers.evaluation.forgetting import pairs
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.configuration import identity_names, public_values
from sa_diffusers.io.forgotten import said_of
from sa_diffusers.io.hub import read_license
from sa_diffusers.io.stages import Stages
from sa_diffusers.methods import editor
from sa_diffusers.report.cards import write_model_card
from sa_diffusers.report.metrics_table import metrics_table
from sa_diffusers.report.pictures import by_group, save_before_after
from sa_diffusers.report.run_page import write_report
from sa_diffusers.report.verdict import verdict
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages import stages_of
from sa_diffusers.runs.stages.fisher import FisherStage
from sa_diffusers.runs.stages.train import start_of


COUNTED = ("sample", "surrogate", "fisher", "train", "evaluate")  # what seconds are added up by


def combine(context: RunContext, stages: Stages) -> dict[str, Any]:
    """metrics.json."""
    before, after = context.value("before"), context.value("after")
    seconds = {name: round(stages.seconds.get(name, 0.0), 2) for name in COUNTED}
    metrics = {
        "concept": ", ".join(context.concept.phrasings),
        "surrogate": context.surrogate,
        "before": before.values,
        "after": after.values,
        "intervals": {"before": before.intervals, "after": after.intervals},
        "seconds": seconds | {"total": round(sum(seconds.values()), 2), "reused": stages.reused},
    }
    if before.by_classifier:
        metrics["by_classifier"] = {"before": before.by_classifier, "after": after.by_classifier}
    return metrics | {"amounts": _amounts(context, stages, seconds)}


def _amounts(context: RunContext, stages: Stages, seconds: dict[str, float]) -> dict[str, dict]:
    """What the stages have worked through: {"count", "of", "per_second"}; the last None if untimed."""
    counts: dict[str, tuple[int, str]] = {}
    for stage in stages.stages:
        count, what = stage.amount(context)
        if count and (stage.name in stages.markers or stage.name != "before"):
            counts[stage.counts_as] = counts.get(stage.counts_as, (0, ""))[0] + count, what
    return {
        name: {"count": count, "of": what, "per_second": round(count / seconds[name], 2) if seconds[name] else None}
        for name, (count, what) in counts.items()
    }


def write_results(context: RunContext, metrics: dict[str, Any]) -> None:
    """metrics.json, before_after.png, report.html, and a model card inside every folder that can be pushed."""
    folder, options = context.folder, context.options
    write_json(metrics, folder / "metrics.json")
    shown, (found, advice) = pairs(context.value("before"), context.value("after")), verdict(metrics)
    some = [pair for group in by_group(shown).values() for pair in group[:8]]
    save_before_after(some, folder / "before_after.png")
    write_report(
        folder / "report.html",
        title=f"Forgetting {context.concept.name}",
        verdict=found,
        advice=advice,
        summary=summary(context, metrics),
        metrics=metrics,
        pairs=shown,
        history=context.value("train"),
        seconds=metrics["seconds"] | {"reused": _wholly_reused(context, metrics)},
        amounts=metrics["amounts"],
        config=public_values(asdict(options)),
        fisher=_fisher(context),
        notes=_notes(context),
    )
    for name in _shared(context):
        save_before_after(some, folder / name / "before_after.png")
        write_model_card(
            folder / name,
            base_model=options.model,
            concept=metrics["concept"],
            surrogate=_drawn_instead(context),
            method=_method(context),
            settings=_settings(context),
            metrics=metrics,
            images=["before_after.png"],
            license=read_license(options.model, options.revision),
            dtype=options.dtype,
            pipeline_class=type(context.family.pipeline).__name__,
            variant=options.save_variant,
            lora=name == "lora",
        )


def all_written(context: RunContext) -> bool:
    """Whether `write_results` came to its end before."""
    last = [f"{name}/README.md" for name in _shared(context)]
    return all((context.folder / name).exists() for name in ("config.yaml", "metrics.json", "report.html", *last))


def _shared(context: RunContext) -> tuple[str, ...]:
    """The folders that can be pushed."""
    return ("pipeline", "lora") if context.options.lora_rank else ("pipeline",)


def _wholly_reused(context: RunContext, metrics: dict[str, Any]) -> list[str]:
    """What seconds are added up by, of which every stage was reused."""
    counted = [(stage.name in metrics["seconds"]["reused"], stage.counts_as) for stage in stages_of(context)]
    return [name for name in COUNTED if (True, name) in counted and (False, name) not in counted]


def _settings(context: RunContext) -> dict[str, Any]:
    """What a card says of how the model was made to forget."""
    options, fisher, history = context.options, _fisher(context), context.value("train")
    names = ["train_scope"]
    names += ["lora_rank", "lora_targets"] if options.lora_rank else []
    if context.pictures:
        names += identity_names(context.method.Options)
    else:
        names += ["replay_weight", *(["replay_target", "replay_negative"] if options.replay_weight else [])]
        names += ["surrogate_target"]
    names += ["train_batch_size", "learning_rate", "lr_scheduler", "ema_decay", "seed"]
    said = {name: getattr(options, name) for name in names}
    said |= {f"forgotten before ({i})": said_of(record) for i, record in enumerate(context.forgotten, 1)}
    said |= {"note": context.warning} if context.warning else {}
    said |= {"start": start_of(context)} if _starts_at_edit(context) else {}
    return said | {
        "ewc_lambda (authors' units, no 1/2)": options.ewc_lambda,
        "num_train_steps": history[-1]["step"] if history else 0,
        "fisher": fingerprint(fisher) if fisher else None,
    }


def _fisher(context: RunContext) -> dict[str, Any] | None:
    """How the Fisher was made, of a run that has one."""
    return context.artifacts[FisherStage.name].info if FisherStage.name in context.artifacts else None


def _notes(context: RunContext) -> list[str]:
    dtype, kind = context.options.dtype, type(context.family.pipeline).__name__
    notes = [
        f"The pipeline lies beside this page: {kind}.from_pretrained('pipeline', dtype=torch.{dtype}).",
        *([context.warning] if context.warning else []),
        *(f"The model had forgotten before: {said_of(record)}." for record in context.forgotten),
    ]
    if context.options.lora_rank:
        notes.append("The adapter alone lies in lora/; the pipeline has it fused in.")
    if not context.inputs.judges and not context.pictures:
        notes.insert(
            0, "No classifier was given: judge by the pictures, and by the change of the loss on replay samples."
        )
    return notes


def _starts_at_edit(context: RunContext) -> bool:
    return context.method.trains and "edit" in context.needs


def _method(context: RunContext) -> str:
    """Its name, with what has done a part of its work where it did not start at the model."""
    return context.method.title + (f" from {editor().title}" if _starts_at_edit(context) else "")


def _drawn_instead(context: RunContext) -> str | None:
    """The surrogate; None for methods that lead away from the concept and towards nothing."""
    return context.surrogate if context.method.favours else None


def summary(context: RunContext, metrics: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    before, after, surrogate = metrics["before"], metrics["after"], _drawn_instead(context)
    favoured = f" in favour of “{surrogate}”" if surrogate else ""
    lead = f"Asked to forget “{context.concept.name}”{favoured} by {_method(context)}."
    if "forget" in after:
        shares = [
            f"{name} {after[name]['masked_mse'] / before[name]['masked_mse'] - 1:+.0%}"
            for name in ("forget", "retain", "third")
            if name in after
        ]
        return f"{lead} Errors in the holes: {', '.join(shares)}."
    if before["concept_probability"] is None:
        change = (after["replay_loss"] / before["replay_loss"] - 1) if "replay_loss" in after else None
        return lead + ("" if change is None else f" The loss on samples of everything else changed by {change:+.2%}.")
    return (
        f"{lead} Asked for it, it shows it with probability {after['concept_probability']:.3f} (before: "
        f"{before['concept_probability']:.3f}); the other classes come out right in {after['retained_accuracy']:.1%} "
        f"of pictures (before: {before['retained_accuracy']:.1%})."
    )


def table(metrics: dict) -> str:
    """The numbers for the terminal."""
    seconds = dict(metrics["seconds"])
    reused = seconds.pop("reused")
    said = "seconds when computed: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    found = " ".join(verdict(metrics)).strip()
    return f"{found}\n\n{metrics_table(metrics)}\n\n{said}" + (f"\nreused: {', '.join(reused)}" if reused else "")
