"""What a run says: its plan, what it looks like on the way, and the numbers, pictures and page at the end."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sa_diffusers.core.fisher import Fisher
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.evaluation.before_after import Findings, judge, look, pairs
from sa_diffusers.evaluation.forgetting import replay_loss
from sa_diffusers.families import Family
from sa_diffusers.io.artifacts import Stage, fingerprint
from sa_diffusers.io.atomic_files import check_disk, write_json
from sa_diffusers.io.hub import read_license
from sa_diffusers.io.loading import model_hash
from sa_diffusers.report.cards import write_model_card
from sa_diffusers.report.metrics_table import metrics_table
from sa_diffusers.report.pictures import save_before_after
from sa_diffusers.report.run_page import write_report
from sa_diffusers.runs.inputs import Inputs
from sa_diffusers.runs.options import (
    DRAWS_NO_SURROGATE,
    ESD_METHODS,
    METHODS,
    SLD_METHODS,
    TRAINS_NOTHING,
    ForgetConfig,
)
from sa_diffusers.runs.plan import (
    StagePlan,
    check_memory,
    describe,
    disk_bytes,
    estimate,
    seconds_per_sample,
    trained_bytes,
)
from sa_diffusers.runs.tracking import LOOKED_AT, evaluation_settings, requests_to_look_at


KEPT_LOSS_SAMPLES = 64  # replay samples on which the loss is compared


def evaluation_key(config: ForgetConfig, inputs: Inputs) -> dict:
    """What decides the evaluation's numbers beside the model."""
    exams = {
        name: fingerprint({n: [asdict(r) for r in s.requests] for n, s in e.sets.items()})
        for name, e in inputs.exams.items()
    }
    return {
        "exams": exams,
        "classifiers": {name: model_hash(classifier) for name, classifier in inputs.classifiers.items()},
        "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.num_inference_steps,
        "sampler": config.sampler,
        "seed": config.seed,
    }


def examiner(config: ForgetConfig, family: Family, inputs: Inputs, replay: SampleSet | None) -> Callable[[], Findings]:
    """A function that judges the family's model as it stands."""

    def examine() -> Findings:
        if inputs.exams:
            findings = judge(family, inputs.classifiers, inputs.exams, evaluation_settings(config), config.seed)
        else:
            findings = look(family, *requests_to_look_at(config, inputs), evaluation_settings(config))
        if replay is not None:
            findings.values["replay_loss"] = replay_loss(family, replay, KEPT_LOSS_SAMPLES, config.seed)
        return findings

    return examine


def announce(config: ForgetConfig, family: Family, inputs: Inputs, output_dir: Path) -> str:
    """The plan as text. Raises NotEnoughMemory or DiskFull where the run cannot fit."""
    memory, disk = trained_bytes(family, config), disk_bytes(family, config)
    check_memory(memory, family.device)
    check_disk(output_dir, disk)
    exams = list(inputs.exams.values())
    evaluated = sum(len(s.requests) for s in exams[0].sets.values()) if exams else 2 * LOOKED_AT
    seconds = estimate(config, seconds_per_sample(family, config.sample_batch_size), evaluated, family.loss.num_terms)
    gradients = family.loss.num_terms if config.terms is None else 2 * config.terms
    samples = min(config.fisher_samples, config.num_samples)
    exact = f"the paper's way: {samples * family.loss.num_terms}"
    if config.terms is not None:
        exact += "; on the bundled model the cheap way agreed with it at Spearman .95, total .96"
    what = {
        "sample": f"{config.num_samples} samples of the model for replay and Fisher",
        "surrogate": f"{config.num_surrogate_samples} pictures: {inputs.concept.surrogate}",
        "fisher": f"{samples * gradients} gradient evaluations ({exact})",
        "train": _what_is_trained(config),
        "evaluate": f"{2 * evaluated} pictures, before and after",
    }
    skipped = {
        "fisher": not config.ewc_lambda,
        "sample": not (config.replay_weight or config.ewc_lambda),
        "surrogate": config.method in DRAWS_NO_SURROGATE,
        "train": config.method in TRAINS_NOTHING,
    }
    given = {"fisher": config.fisher, "sample": config.samples}
    markers = {"evaluate": "after"}
    rows = [
        StagePlan(
            name,
            f"from {given[name]}" if given.get(name) else what[name],
            seconds[name],
            bool(given.get(name)) or Stage(output_dir, markers.get(name, name), {}).marker.exists(),
        )
        for name in what
        if not skipped.get(name)
    ]
    return describe(rows, memory, disk, output_dir)


def _what_is_trained(config: ForgetConfig) -> str:
    batch = f"{config.train_batch_size}" + (f" + {config.train_batch_size}" if config.replay_weight else "")
    said = [f"{config.num_train_steps} steps of {batch}", f"scope {config.train_scope}"]
    said += [f"LoRA of rank {config.lora_rank}"] if config.lora_rank else []
    said += [f"from {_start(config)}"] if config.start == "edit" else []
    said += [f"lambda {config.ewc_lambda:g}"] if config.ewc_lambda else []
    return ", ".join(said)


def _start(config: ForgetConfig) -> str:
    part = f", its best part of rank {config.lora_rank}" if config.lora_rank else ""
    return f"UCE's edit at erase scale {config.uce_erase_scale:g}{part}"


def amounts(config: ForgetConfig, family: Family, metrics: dict, steps: int) -> dict[str, dict]:
    """What each stage that the method has worked through: {"count", "of", "per_second"}; the last None if untimed."""
    terms = family.loss.num_terms if config.terms is None else min(2 * config.terms, family.loss.num_terms)
    drawn = metrics["after"]["num_images"] * (1 if config.before else 2)
    batch = config.train_batch_size * (2 if config.replay_weight else 1)
    counts = {
        "sample": (config.num_samples, "images"),
        "surrogate": (config.num_surrogate_samples, "images"),
        "fisher": (min(config.fisher_samples, config.num_samples) * terms, "gradients"),
        "train": (batch * steps, f"samples, {steps} steps"),
        "evaluate": (drawn, "images"),
    }
    seconds = metrics["seconds"]
    return {
        name: {
            "count": count,
            "of": what,
            "per_second": round(count / seconds[name], 2) if seconds[name] else None,
        }
        for name, (count, what) in counts.items()
        if seconds[name] or name in seconds["reused"]
    }


def combine(inputs: Inputs, before: Findings, after: Findings, seconds: dict[str, float], reused: list[str]) -> dict:
    """metrics.json."""
    names = ("sample", "surrogate", "fisher", "train", "evaluate")
    by_stage = {name: round(seconds.get(name, 0.0), 2) for name in names}
    metrics = {
        "concept": ", ".join(inputs.concept.phrasings),
        "surrogate": inputs.concept.surrogate,
        "before": before.values,
        "after": after.values,
        "intervals": {"before": before.intervals, "after": after.intervals},
        "seconds": by_stage | {"total": round(sum(by_stage.values()), 2), "reused": reused},
    }
    if before.by_classifier:
        metrics["by_classifier"] = {"before": before.by_classifier, "after": after.by_classifier}
    return metrics


def write_results(
    config: ForgetConfig,
    inputs: Inputs,
    metrics: dict,
    findings: tuple[Findings, Findings],
    history: list[dict],
    fisher: Fisher | None,
    pipeline_class: str,
    output_dir: Path,
) -> None:
    """metrics.json, before_after.png, report.html, and a model card inside every folder that can be pushed."""
    write_json(metrics, output_dir / "metrics.json")
    shown = pairs(*findings)
    some = [pair for group in dict.fromkeys(p["group"] for p in shown) for pair in _of_group(shown, group)[:8]]
    save_before_after(some, output_dir / "before_after.png")
    replayed = config.replay_weight > 0
    settings = {
        "train_scope": config.train_scope,
        **({"lora_rank": config.lora_rank, "lora_targets": config.lora_targets} if config.lora_rank else {}),
        **({"start": _start(config)} if config.start == "edit" else {}),
        "ewc_lambda (authors' units, no 1/2)": config.ewc_lambda,
        "replay_weight": config.replay_weight,
        **({"replay_target": config.replay_target, "replay_negative": config.replay_negative} if replayed else {}),
        "surrogate_target": config.surrogate_target,
        "num_train_steps": history[-1]["step"] if history else 0,
        "train_batch_size": config.train_batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler": config.lr_scheduler,
        "ema_decay": config.ema_decay,
        "fisher": None if fisher is None else fingerprint(fisher.metadata),
        "seed": config.seed,
    }
    notes = [
        "Suppressed, not proven erased: whoever has the weights may train or attack the concept back.",
        f"The pipeline lies in {output_dir / 'pipeline'}, a {pipeline_class}.",
    ]
    if config.lora_rank:
        notes.append(f"The adapter alone lies in {output_dir / 'lora'}; the pipeline has it fused in.")
    if not inputs.exams:
        notes.insert(
            0, "No classifier was given: judge by the pictures, and by the change of the loss on replay samples."
        )
    write_report(
        output_dir / "report.html",
        title=f"Forgetting {inputs.concept.name}",
        summary=summary(config, inputs, metrics),
        metrics=metrics,
        pairs=shown,
        history=history,
        seconds=metrics["seconds"],
        amounts=metrics["amounts"],
        config=asdict(config),
        fisher=fisher and fisher.metadata,
        notes=notes,
    )
    for folder in ("pipeline", "lora") if config.lora_rank else ("pipeline",):
        save_before_after(some, output_dir / folder / "before_after.png")
        write_model_card(
            output_dir / folder,
            base_model=config.model,
            concept=metrics["concept"],
            surrogate=_drawn_instead(config, metrics["surrogate"]),
            method=_method(config),
            settings=settings,
            metrics=metrics,
            images=["before_after.png"],
            license=read_license(config.model, config.revision),
            dtype=config.dtype,
            pipeline_class=pipeline_class,
            variant=config.save_variant,
            lora=folder == "lora",
        )


def _method(config: ForgetConfig) -> str:
    """Its name, with what has done a part of its work where it did not start at the model."""
    return METHODS[config.method] + (" from Unified Concept Editing" if config.start == "edit" else "")


def _drawn_instead(config: ForgetConfig, surrogate: str) -> str | None:
    """The surrogate; None for methods that lead away from the concept and towards nothing."""
    return None if config.method in (*ESD_METHODS, *SLD_METHODS) else surrogate


def summary(config: ForgetConfig, inputs: Inputs, metrics: dict) -> str:
    """The result in a sentence or two."""
    before, after = metrics["before"], metrics["after"]
    surrogate = _drawn_instead(config, inputs.concept.surrogate)
    favoured = f" in favour of “{surrogate}”" if surrogate else ""
    lead = f"The model was made to forget “{inputs.concept.name}”{favoured} by {_method(config)}."
    if before["concept_probability"] is None:
        change = (after["replay_loss"] / before["replay_loss"] - 1) if "replay_loss" in after else None
        return lead + ("" if change is None else f" The loss on samples of everything else changed by {change:+.2%}.")
    return (
        f"{lead} Asked for it, it shows it with probability {after['concept_probability']:.3f} (before: "
        f"{before['concept_probability']:.3f}); everything else comes out right in {after['retained_accuracy']:.1%} "
        f"of pictures (before: {before['retained_accuracy']:.1%})."
    )


def table(metrics: dict) -> str:
    """The numbers for the terminal."""
    seconds = {k: v for k, v in metrics["seconds"].items() if k != "reused"}
    reused = metrics["seconds"]["reused"]
    lines = [
        metrics_table(metrics),
        "",
        "seconds when computed: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()),
    ]
    return "\n".join(lines + ([f"reused: {', '.join(reused)}"] if reused else []))


def _of_group(shown: list[dict], group: str) -> list[dict]:
    return [pair for pair in shown if pair["group"] == group]
