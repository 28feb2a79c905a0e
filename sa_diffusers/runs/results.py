"""What a run says at its end: numbers, pictures, a page, and cards in the folders that can be pushed."""

import shlex
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sa_diffusers.evaluation.forgetting import pairs
from sa_diffusers.io.artifacts import fingerprint
from sa_diffusers.io.atomic_files import write_json
from sa_diffusers.io.configuration import identity_names, public_values
from sa_diffusers.io.forgotten import FORGOTTEN, read_forgotten, said_of
from sa_diffusers.io.hub import read_license
from sa_diffusers.io.model_names import public_name
from sa_diffusers.io.stages import Stages
from sa_diffusers.methods import ROBUST, editor
from sa_diffusers.report.cards import write_model_card
from sa_diffusers.report.metrics_table import metrics_table, request_table
from sa_diffusers.report.pictures import first_of_each, save_before_after
from sa_diffusers.report.run_page import write_report, write_strength_page
from sa_diffusers.report.verdict import verdict
from sa_diffusers.runs.chain import TOLD
from sa_diffusers.runs.context import RunContext
from sa_diffusers.runs.stages import stages_of
from sa_diffusers.runs.stages.auto import choice_sections
from sa_diffusers.runs.stages.fisher import FisherStage
from sa_diffusers.runs.stages.train import TRAINED, made_by, method_of, start_of, starts_at_edit
from sa_diffusers.training.strengths import offered


COUNTED = ("sample", "surrogate", "fisher", "train", "evaluate")  # what seconds are added up by


def combine(context: RunContext, stages: Stages) -> dict[str, Any]:
    """metrics.json."""
    seconds = {name: round(stages.seconds.get(name, 0.0), 2) for name in COUNTED}
    metrics = judged(context, context.result)
    metrics["seconds"] = seconds | {"total": round(sum(seconds.values()), 2), "reused": stages.reused}
    return metrics | {"amounts": _amounts(context, stages, seconds)}


def judged(context: RunContext, name: str) -> dict[str, Any]:
    """What one judgement says, by its name, beside that of before."""
    before, after = context.value("before"), context.value(name)
    metrics = {
        "concept": context.concepts.said,
        "surrogate": context.surrogate,
        "before": before.values,
        "after": after.values,
        "intervals": {"before": before.intervals, "after": after.intervals},
    }
    if not context.strength.trained:
        metrics["strength"] = str(context.strength)
    if context.merge:
        metrics["taken_back"] = context.merge.taken_back
    metrics |= {"retrained": retrained.values} if (retrained := context.value("retrained")) else {}
    if context.chain:
        metrics["chain"] = [link.numbers for link in context.chain]
    judges = list(context.inputs.judges.values())
    metrics["attribute"] = judges[0].attribute if judges else None
    if context.preference is not None:
        metrics["judged_by"] = {"name": context.preference.name, "instead": context.preference.instead}
    if before.by_classifier:
        metrics["by_classifier"] = {"before": before.by_classifier, "after": after.by_classifier}
    said = dict(zip(("said", "advice"), verdict(metrics, context.method.remedies(context.options)), strict=True))
    return metrics | {"verdict": said}


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
    """metrics.json, before_after.png, the pages, and a model card inside every folder that can be pushed."""
    folder, options = context.folder, context.options
    write_json(metrics, folder / "metrics.json")
    shown = pairs(context.value("before"), context.value(context.result), context.value("retrained"))
    if options.strength_sheet:
        _write_sheet(context)
    some, requests = first_of_each(shown), _requests(context, metrics)
    save_before_after(some, folder / "before_after.png")
    write_report(
        folder / "report.html",
        title=f"Forgetting {context.concepts.name}",
        summary=summary(context, metrics),
        record=_record(context),
        commands=commands(context, metrics, public_values),
        prompts=_prompts(context),
        metrics=metrics,
        pairs=shown,
        history=context.value("train"),
        seconds=metrics["seconds"] | {"reused": _wholly_reused(context, metrics)},
        amounts=metrics["amounts"],
        config=public_values(asdict(options)),
        fisher=_fisher(context),
        notes=_notes(context),
        sheet=options.strength_sheet,
        choices=choice_sections(context),
        requests=requests,
    )
    for name in _shared(context):
        save_before_after(some, folder / name / "before_after.png")
        write_model_card(
            folder / name,
            base_model=options.model,
            concept=metrics["concept"],
            surrogate=_drawn_instead(context),
            method=made_by(context),
            settings=_settings(context),
            metrics=metrics,
            images=["before_after.png"],
            license=read_license(options.model, options.revision),
            dtype=options.dtype,
            pipeline_class=type(context.family.pipeline).__name__,
            variant=options.save_variant,
            lora=name == "lora",
            requests=requests,
        )


def _write_sheet(context: RunContext) -> None:
    """strength.html."""
    judgements = {str(one): "after" if one.trained else one.name for one in offered(context.options)}
    run = shlex.quote(public_values(str(context.folder)))
    write_strength_page(
        context.folder / "strength.html",
        title=f"Forgetting {context.concepts.name}: how strong",
        judged={said: judged(context, name) for said, name in judgements.items()},
        pairs={said: pairs(context.value("before"), context.value(name)) for said, name in judgements.items()},
        commands={said: f"sa-diffusers choose {run} --{said}" for said in judgements},
        result=str(context.strength),
    )


def all_written(context: RunContext) -> bool:
    """Whether `write_results` came to its end before."""
    last = [f"{name}/README.md" for name in _shared(context)]
    return all((context.folder / name).exists() for name in ("config.yaml", "metrics.json", "report.html", *last))


def _shared(context: RunContext) -> tuple[str, ...]:
    """The folders that can be pushed."""
    return tuple(name for name in ("pipeline", "lora") if (context.folder / name).exists())


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
        names += ["surrogate_target", *(n for n in ROBUST if n.startswith("robust_") and options.robust_weight)]
    names += ["train_batch_size", "learning_rate", "lr_scheduler", "ema_decay", "seed"]
    said = {name: getattr(options, name) for name in names}
    said |= {f"forgotten before ({i})": said_of(record) for i, record in enumerate(context.forgotten, 1)}
    said |= {"start": start_of(context)} if starts_at_edit(context) else {}
    said |= {"finish": editor(options.edit).strength(options)} if options.finish else {}
    return said | {
        "ewc_lambda (authors' units, no 1/2)": options.ewc_lambda,
        "num_train_steps": history[-1]["step"] if history else 0,
        **({} if context.strength.trained else {"strength": f"{context.strength}, chosen afterwards"}),
        "fisher": fingerprint(fisher) if fisher else None,
    }


def _fisher(context: RunContext) -> dict[str, Any] | None:
    """How the Fisher was made, of a run that has one."""
    return context.artifacts[FisherStage.name].info if FisherStage.name in context.artifacts else None


def _notes(context: RunContext) -> list[str]:
    dtype, kind = context.options.dtype, type(context.family.pipeline).__name__
    notes = [
        f"The pipeline lies beside this page: {kind}.from_pretrained('pipeline', dtype=torch.{dtype}).",
        *([context.merge.said] if context.merge else []),
        *(f"The model had forgotten before: {said_of(record)}." for record in context.forgotten),
    ]
    if not context.strength.trained:
        notes.append(f"The result is {context.strength}, chosen later; what training ended with is in {TRAINED}/.")
    if context.options.leaves_adapter:
        notes.append("What was trained alone lies in lora/, to be loaded as an adapter; the pipeline has it fused in.")
    if context.preference is not None:
        judge = context.preference
        said = f"No classifier was given: {judge.name} chose between the concept and {judge.instead}"
        notes.insert(0, f"{said}, which says little of a picture that shows neither.")
    return notes


def _requests(context: RunContext, metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """A chain's table, from the model that knew all to this run; None where it goes on from none."""
    if not context.chain:
        return None
    told = {side: {name: metrics[side].get(name) for name in TOLD} for side in ("before", "after")}
    first = {"concept": "nothing", "date": None, "method": None} | told["before"]
    own = {"concept": context.requested.said, "date": context.started, "method": method_of(context)} | told["after"]
    return request_table([first, *metrics["chain"], own], metrics["attribute"])


def _drawn_instead(context: RunContext) -> str | None:
    """The surrogate; None for methods that lead away from the concept and towards nothing."""
    return context.surrogate if context.method.favours else None


def summary(context: RunContext, metrics: dict[str, Any]) -> str:
    """The result in a sentence or two."""
    surrogate, losses = _drawn_instead(context), [metrics[side].get("replay_loss") for side in ("before", "after")]
    favoured = f" in favour of “{surrogate}”" if surrogate else ""
    chosen = "" if context.strength.trained else f", at {context.strength}"
    lead = f"Asked to forget “{context.concepts.name}”{favoured} by {made_by(context)}{chosen}."
    if "forget" in metrics["after"]:
        was, now = (metrics[side] for side in ("before", "after"))
        names = {"forget": "pictures to forget", "retain": "to retain", "third": "others"}
        kept = [name for name in names if name in now]
        change = [round(now[name]["masked_mse"] / was[name]["masked_mse"] - 1, 2) + 0.0 for name in kept]  # no "-0%"
        shares = [f"{names[name]} {value:+.0%}" for name, value in zip(kept, change, strict=True)]
        return f"{lead} Errors in the holes: {', '.join(shares)}."
    if None in losses or metrics["attribute"] is not None:  # of which the verdict tells more
        return lead
    change = round(losses[1] / losses[0] - 1, 3) + 0.0  # else some are "-0.0%"
    return f"{lead} The loss on samples of everything else changed by {change:+.1%}."


def _record(context: RunContext) -> dict[str, str]:
    """What holds the page to a model, a moment and programs: hashes are of weights, 16 hex digits a component."""
    options, record = context.options, read_forgotten(str(context.folder / "pipeline"))[-1]
    model = public_name(options.model) + (f", revision {record['revision']}" if record["revision"] else "")
    sets = context.inputs.sets
    counted = [f"{len(part)} {name} (prompts: {len(set(part.prompts))})" for name, part in sets.items()]
    counted += [f"{len(group.test)} {name}" for name, group in context.pictures.items() if len(group.test)]
    return {
        "Page of": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "Model": model,
        "Weights before": ", ".join(f"{name} {value}" for name, value in record["before"].items()),
        "Weights after": ", ".join(f"{name} {value}" for name, value in record["after"].items()),
        "Files": f"SHA-256 of each in pipeline/{FORGOTTEN}; sa-diffusers verify checks them",
        "Pictures": f"{', '.join(counted)}; each again after",
        "Seeds": f"all follow from seed {options.seed}; those of the pictures are among the numbers",
    }


def commands(context: RunContext, metrics: dict[str, Any], named: Callable[[str], str] = str) -> dict[str, str]:
    """What repeats the run, and what looks closer, of several concepts at the one that is left most; paths `named`."""
    run, model = (shlex.quote(named(str(path))) for path in (context.folder, context.options.model))
    again = context.merge.command if context.merge else f"sa-diffusers forget --config {run}/config.yaml"
    repeat = {"Repeat it": f"{again} --output_dir {run}-again"}
    if context.pictures:  # which `evaluate` does not draw
        holes = "half quarter ring top bottom left right random"
        return repeat | {"Judge the same under more holes": f"{again} --output_dir {run}-holes --eval_masks {holes}"}
    judges = "".join(f" --classifier {shlex.quote(named(name))}" for name in context.options.classifier[:1])
    if not context.family.can("text"):
        what = "Judge more pictures of each class" if judges else "Compare it with REAL, a folder of pictures"
        by = f"--metrics classifier{judges}" if judges else "--real REAL"
        return repeat | {what: f"sa-diffusers evaluate run {run} {by}"}
    worst = next(iter(metrics["after"].get("concept_probability_by_concept") or ()), context.concepts[0].name)
    words = shlex.quote(next(one.said for one in context.concepts if one.name == worst))
    by = judges or " --metrics clip,change"
    return repeat | {
        "Test it in more phrasings": f"sa-diffusers evaluate pipelines {model} --compare {run} --concept {words}{by}",
        "Try to bring it back": f"sa-diffusers attack {run} --original {model} --concept {words}{judges}",
    }


def _prompts(context: RunContext) -> dict[str, list[dict[str, Any]]]:
    """What was drawn, by set: each prompt with its seeds."""
    found = {}
    for name, part in context.inputs.sets.items():
        seeds: dict[str, list[int]] = {}
        for request, prompt in zip(part.requests, part.prompts, strict=True):
            seeds.setdefault(prompt, []).append(request.seed)
        found[name] = [{"prompt": prompt, "seeds": own} for prompt, own in seeds.items()]
    return found


def table(metrics: dict) -> str:
    """The numbers for the terminal."""
    seconds = dict(metrics["seconds"])
    reused = seconds.pop("reused")
    said = "seconds when computed: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    found = " ".join(metrics["verdict"].values()).strip()
    return f"{found}\n\n{metrics_table(metrics)}\n\n{said}" + (f"\nreused: {', '.join(reused)}" if reused else "")
