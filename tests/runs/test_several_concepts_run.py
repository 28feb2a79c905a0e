"""Runs that forget several concepts at once: what they draw, leave and say, by every way to name them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cheap_runs import CHEAP, PROMPTS, context_of
from diffusers import StableDiffusionPipeline
from fake_hub import cache_repository
from torch.testing import assert_close

from sa_diffusers import Forget, forget, forget_sequence
from sa_diffusers.core.concepts import Concepts, mentions
from sa_diffusers.core.conditions import Condition, texts
from sa_diffusers.core.fisher_file import FisherMismatch
from sa_diffusers.data.concepts.given import find_concept
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.data.sharing import load_fisher
from sa_diffusers.evaluation.forgetting import Findings
from sa_diffusers.evaluation.prompt_sets import Candidate, PromptSet
from sa_diffusers.families import get_family
from sa_diffusers.io.configuration import config_from_dict, config_to_yaml
from sa_diffusers.io.forgotten import read_forgotten
from sa_diffusers.io.loading import read_run_options
from sa_diffusers.io.stages import Artifact
from sa_diffusers.models import ConditionalVAE
from sa_diffusers.pipelines import ConditionalVAEPipeline
from sa_diffusers.runs.adapters.earlier import keep_earlier
from sa_diffusers.runs.chain import chain_of, taken_over
from sa_diffusers.runs.inputs import read_concepts
from sa_diffusers.runs.options import ForgetConfig
from sa_diffusers.runs.stages.fisher import estimate_sums
from sa_diffusers.training.lora import ADAPTER, LORA_FILE, WithoutLora, add_lora, fuse_lora, load_adapters


pytestmark = pytest.mark.usefixtures("few_pictures")
PAIRS = {"concept": "seven, 7; eight", "surrogate": "nine; six"}


@pytest.fixture(scope="module")
def outcome(run_cheaply, tmp_path_factory):
    return run_cheaply(tmp_path_factory.mktemp("several") / "run", **PAIRS, start="edit", uce_preserve_scale=0.1)


def test_all_are_asked_for_and_none_is_replayed(outcome):
    surrogate = texts(SampleSet.load(outcome.output_dir / "surrogate" / "surrogate.safetensors").conditions)
    assert [mentions(text, ["eight"]) for text in surrogate] == [False, True] * 2
    assert [mentions(text, ["seven", "7"]) for text in surrogate] == [True, False] * 2
    anew = texts(SampleSet.load(outcome.output_dir / "samples" / "without_concept.safetensors").conditions)
    both = Concepts([find_concept("seven, 7"), find_concept("eight")])
    assert anew and all(mentions(text, both.siblings_of(both[0])) for text in anew)


def test_each_stands_in_the_record_and_the_numbers(outcome):
    records = read_forgotten(str(outcome.output_dir / "pipeline"))
    assert [(r["concept"], r["surrogate"]) for r in records] == [("seven, 7", "nine"), ("eight", "six")]
    assert records[0]["after"] == records[1]["after"] != records[0]["before"] and records[0]["versions"]
    metrics = json.loads((outcome.output_dir / "metrics.json").read_text())
    assert (metrics["concept"], metrics["surrogate"]) == ("seven, 7; eight", "nine; six")
    by_concept = metrics["after"]["concept_preference_by_concept"]
    assert by_concept.keys() == {"seven", "eight"} and list(by_concept.values()) == sorted(by_concept.values())[::-1]
    card = (outcome.output_dir / "pipeline" / "README.md").read_text()
    assert "without “seven, 7; eight”" in card and "Preferred: eight" in card


def test_a_file_that_says_the_same_is_the_same_run(outcome, run_cheaply, tmp_path):
    (tmp_path / "list.csv").write_text('concept,surrogate\n"seven, 7",nine\neight,six\n')
    given = {"concept": "", "concepts": str(tmp_path / "list.csv"), "start": "edit", "uce_preserve_scale": 0.1}
    again = run_cheaply(outcome.output_dir, **given | {"surrogate": None})
    assert set(again.metrics["seconds"]["reused"]) >= {"edit", "samples", "surrogate", "fisher", "train", "after"}


def test_a_run_of_a_list_carries_it(run_cheaply, tmp_path):
    """What goes on from it asks for what it forgot, whatever has become of the file, and so does its repetition."""
    file, old = tmp_path / "list.csv", {"concept": "", "surrogate": None, "method": "uce"}
    file.write_text('concept,surrogate,siblings\n"seven, 7",nine,\neight,"ten; or two","six, two"\n')
    first = run_cheaply(tmp_path / "1", concepts=str(file), **old).output_dir
    forgotten = [(one.said, one.surrogate) for one in read_concepts(config_of(first))]
    assert forgotten == [("seven, 7", "nine"), ("eight", "ten; or two")]
    file.write_text("concept,surrogate\neight,one\nsix,two\n")
    second = run_cheaply(tmp_path / "2", concept="six", surrogate="nine", method="uce", after=str(first)).output_dir
    file.unlink()
    again = config_of(second)
    assert [(one.said, one.surrogate) for one in read_concepts(again)] == [*forgotten, ("six", "nine")]
    assert read_concepts(again)[1].siblings == ("six", "two")


def test_an_older_run_of_a_list_has_its_path_alone(run_cheaply, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text('concept,surrogate\n"seven, 7",nine\neight,six\n')
    run = run_cheaply(tmp_path / "1", concepts=str(file), concept="", surrogate=None, method="uce").output_dir
    values = read_run_options(run) | {"concepts": str(file), "concept": "", "surrogate": None, "siblings": None}
    config_to_yaml(config_from_dict(ForgetConfig, values), run / "config.yaml")
    assert [row.concept for link in chain_of(str(run)) for _, row in link.rows] == ["seven, 7", "eight"]


def config_of(run):
    return config_from_dict(ForgetConfig, read_run_options(run))


@pytest.fixture(scope="module")
def chain(tiny_pipeline, tmp_path_factory):
    """Two requests, one after the other, in folders of adapters; and the pipeline that they leave."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "replay.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("a {}\na red {}")
    files = {"replay_prompts": folder / "replay.txt", "concept_templates": folder / "templates.txt"}
    own = {
        "lora_rank": 2,
        "lora_alpha": 3.0,
        "start": "edit",
        "uce_preserve_scale": 0.1,
        "surrogate_target": "model",
        "progress": False,
    }
    requests = [Forget("seven, 7", "nine"), Forget("eight", "six")]
    return folder, forget_sequence(tiny_pipeline(), requests, folder, **CHEAP | own | files)


def test_what_cannot_follow_is_refused_before_the_first_request_runs(tiny_pipeline, tmp_path):
    requests = [Forget("seven, 7", "nine"), Forget("eight", "six")]
    with pytest.raises(ValueError, match="finish, or robust: an edit follows training"):
        forget_sequence(tiny_pipeline(), requests, tmp_path / "chain", robust=True, progress=False)
    assert not (tmp_path / "chain").exists()


def test_a_chain_in_place_changes_the_pipeline_at_its_end(chain, tiny_pipeline, tmp_path):
    folder, forgotten = chain
    files = {"replay_prompts": folder / "replay.txt", "concept_templates": folder / "templates.txt"}
    own = {"lora_rank": 2, "lora_alpha": 3.0, "start": "edit", "uce_preserve_scale": 0.1, "surrogate_target": "model"}
    given, requests = tiny_pipeline(), [Forget("seven, 7", "nine"), Forget("eight", "six")]
    forget_sequence(given, requests, tmp_path / "chain", inplace=True, progress=False, **CHEAP | own | files)
    assert_close(dict(given.unet.state_dict()), dict(forgotten.unet.state_dict()), rtol=0, atol=0)


def test_a_run_does_not_go_on_from_itself(chain, tiny_pipeline, tmp_path):
    last = chain[0] / "2"
    with pytest.raises(ValueError, match="a run cannot go on from itself: expected another output_dir than after"):
        forget(tiny_pipeline(), "six", "one", output_dir=last, after=str(last), progress=False)
    looped = shutil.copytree(last, tmp_path / "looped")
    options = yaml.safe_load((looped / "config.yaml").read_text())
    (looped / "config.yaml").write_text(yaml.safe_dump(options | {"after": str(looped)}))
    shutil.rmtree(looped / "earlier", ignore_errors=True)
    with pytest.raises(ValueError, match="goes on from itself: its folder was written over"):
        chain_of(str(looped))


def test_earlier_concepts_without_adapters_are_not_left_out_of_training(run_cheaply, tmp_path):
    first = run_cheaply(tmp_path / "1", method="uce").output_dir
    with pytest.raises(ValueError, match="chain_memory false keeps what was forgotten before by its adapters"):
        run_cheaply(tmp_path / "2", concept="eight", surrogate="six", after=str(first), chain_memory=False)
    assert not (tmp_path / "2" / "samples").exists()


@pytest.mark.slow
def test_a_chain_keeps_its_adapters_and_its_artifacts(chain, tiny_pipeline):
    folder, forgotten = chain
    pipeline = tiny_pipeline()
    base = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    for name in ("1", "2"):
        pipeline.load_lora_weights(folder / name / "lora", adapter_name=f"request-{name}")
    pipeline.set_adapters(["request-1", "request-2"])
    pipeline.fuse_lora(adapter_names=["request-1", "request-2"])
    pipeline.unload_lora_weights()
    saved = type(pipeline).from_pretrained(folder / "2" / "pipeline").unet.state_dict()
    assert_close(saved, pipeline.unet.state_dict(), rtol=1e-5, atol=1e-6)
    assert_close(saved, forgotten.unet.state_dict(), rtol=0, atol=0)
    assert any(not torch.equal(saved[name], base[name]) for name in base)
    assert not (folder / "2" / "samples" / "samples.safetensors").exists()
    assert not (folder / "2" / "fisher.safetensors").exists()
    drawn = [SampleSet.load(folder / name / "surrogate" / "surrogate.safetensors").latents for name in ("1", "2")]
    assert_close(drawn[1][::2], drawn[0][:2], rtol=0, atol=0)  # of the first concept, taken over
    first, second = (Findings.load(folder / name / "evaluation" / "before.safetensors").drawn for name in ("1", "2"))
    shared = first.keys() & second.keys()
    assert shared and all(torch.equal(first[one], second[one]) for one in shared)


@pytest.mark.slow
def test_the_plan_of_a_chain_counts_what_was_drawn_before(chain, tiny_pipeline, tmp_path, capfd):
    folder = chain[0]
    files = {"replay_prompts": folder / "replay.txt", "concept_templates": folder / "templates.txt"}
    given = {"after": str(folder / "1"), "output_dir": tmp_path, "surrogate_target": "model", "lora_rank": 2}
    forget(tiny_pipeline(), "six", "nine", **CHEAP | files | given)
    assert "4 pictures, 2 of them drawn before: " in capfd.readouterr().out


@pytest.mark.slow
def test_a_chain_is_told(chain):
    folder, forgotten = chain
    assert [record["concept"] for record in forgotten.forgotten] == ["seven, 7", "eight"]
    assert forgotten.metrics["chain"][0]["concept"] == "seven, 7"
    assert forgotten.metrics["after"]["concept_preference_by_concept"].keys() == {"seven", "eight"}
    surrogate = texts(SampleSet.load(folder / "2" / "surrogate" / "surrogate.safetensors").conditions)
    assert [mentions(text, ["eight"]) for text in surrogate] == [False, True] * 2  # memory of the first
    days = [record["date"] for record in forgotten.forgotten]
    markers = [json.loads((folder / name / ".stages" / "run.json").read_text()) for name in ("1", "2")]
    assert days == [marker["info"]["started"] for marker in markers]
    (first,), after = forgotten.metrics["chain"], forgotten.metrics["after"]
    assert (first["date"], first["method"]) == (days[0], "Selective Amnesia")
    for card in (folder / "2" / "pipeline" / "README.md", folder / "2" / "lora" / "README.md"):
        table = card.read_text().split("## One request after another\n\n")[1].splitlines()
        assert table[0].startswith("| After forgetting | date | by | Concept preferred |")
        assert table[2].startswith("| nothing | – | – | ")
        for row, words in zip(table[3:5], (f"| seven, 7 | {days[0]} |", f"| eight | {days[1]} |"), strict=True):
            assert row.startswith(f"{words} Selective Amnesia")
        assert f"{first['replay_loss']:.4f} |" in table[3] and f"| {after['concept_preference']:.1%} |" in table[4]
    assert "One request" not in (folder / "1" / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_the_teacher_of_a_chain_is_the_original(chain, tiny_pipeline):
    pipeline, inputs = tiny_pipeline(), (torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 12, 8))
    family, expected = get_family(pipeline), pipeline.unet(*inputs).sample
    layers = family.adapted_layers("full", "attention")
    load_adapters(family, [chain[0] / "1" / "lora" / LORA_FILE])
    changes = add_lora(pipeline.unet, layers, 2, 2.0, seed=0)
    assert len(changes) == len(layers)
    assert_close(WithoutLora(pipeline.unet)(*inputs).sample, expected, rtol=0, atol=0)
    # The first request is on, and the new adapter changes nothing yet.
    assert not torch.allclose(pipeline.unet(*inputs).sample, expected)
    trained = [name for name, weight in pipeline.unet.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(layers) and all(f".{ADAPTER}." in name for name in trained)


@pytest.mark.parametrize(
    ("request_of", "says"),
    [
        (Forget("7", "two"), r"a duplicate of the concept of .*1"),
        (Forget("two", "seven"), "the surrogate 'seven' is itself forgotten, by the concept of .*1"),
    ],
)
@pytest.mark.slow
def test_what_a_chain_has_forgotten_is_refused(chain, tiny_pipeline, request_of, says):
    with pytest.raises(ValueError, match=says):
        forget(tiny_pipeline(), [request_of], after=chain[0] / "1")
    with pytest.raises(ValueError, match="expected the folder of a finished run to go on from, got"):
        forget(tiny_pipeline(), [Forget("two", "one")], after=chain[0])
    other = tiny_pipeline()
    other.register_to_config(_name_or_path="another/model")
    with pytest.raises(ValueError, match="a chain keeps its first model"):
        forget(other, [Forget("two", "one")], after=chain[0] / "1")


@pytest.mark.parametrize("surrogate", ["noise", "2"])
def test_several_classes_are_shown_in_turn(surrogate, tmp_path):
    torch.manual_seed(0)
    pipeline = ConditionalVAEPipeline(ConditionalVAE(image_size=8, num_classes=3, hidden_sizes=(8,), latent_dim=2))
    pairs = [Forget("0", surrogate), Forget("1", surrogate)]
    few = {"num_train_steps": 2, "train_batch_size": 4, "fisher_samples": 4, "num_samples": 8, "lr_warmup_steps": 0}
    forgotten = forget(pipeline, pairs, output_dir=tmp_path, progress=False, checkpointing_steps=None, **few)
    assert [record["concept"] for record in forgotten.forgotten] == ["0", "1"]
    with pytest.raises(ValueError, match="a list of concepts says all of each; expected no surrogate"):
        forget(pipeline, pairs, "noise")
    with pytest.raises(ValueError, match="concept 1 .*is itself forgotten, by concept 2"):
        forget(pipeline, [Forget("0", "1"), Forget("1", "2")])


@pytest.mark.slow
def test_the_fisher_of_a_chain_is_carried_on(chain, tiny_pipeline, tmp_path):
    folder, own = chain[0], {"chain_fisher": "carried", "chain_decay": 0.25, "adapters": "each", "progress": False}
    again = read_run_options(folder / "2") | own | {"concept": [Forget("eight", "six")], "output_dir": tmp_path}
    dropped = ("surrogate", "siblings", "fisher", "model", "dtype")
    forget(tiny_pipeline(), **{name: value for name, value in again.items() if name not in dropped})
    first, carried = load_fisher(folder / "1"), load_fisher(tmp_path)
    assert carried.metadata["weight"] == 1.25
    # It is of the model that the first run left, and no other run's.
    assert carried.metadata["model_hash"] == read_forgotten(str(folder / "1" / "pipeline"))[-1]["after"]["unet"]
    family = get_family(StableDiffusionPipeline.from_pretrained(folder / "1" / "pipeline"))
    samples = SampleSet.load(folder / "1" / "samples" / "samples.safetensors")
    kept = samples.take([i for i, one in enumerate(samples.conditions) if not mentions(one.text, ["seven", "7"])])
    options = config_from_dict(ForgetConfig, read_run_options(tmp_path) | {"fisher": None})
    own = estimate_sums(family, options, kept, 2, tmp_path / "parts").finish({}).tensors
    for name, tensor in carried.tensors.items():
        expected = (own[name].double() + 0.25 * first.tensors[name].double()) / 1.25
        assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-12)
    # An adapter of its own stands beside the chain's.
    assert [[file.name for file in link.adapters] for link in chain_of(str(tmp_path))] == [
        [LORA_FILE],
        ["eight.safetensors"],
    ]
    pipeline = tiny_pipeline()
    load_adapters(get_family(pipeline), [file for link in chain_of(str(tmp_path)) for file in link.adapters])
    fuse_lora(pipeline.unet)
    saved = type(pipeline).from_pretrained(tmp_path / "pipeline").unet.state_dict()
    assert_close(saved, pipeline.unet.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_fisher_that_lacks_layers_is_refused_before_any_estimate(chain, tiny_pipeline, tmp_path, monkeypatch):
    folder, own = shutil.copytree(chain[0], tmp_path / "chain"), {"chain_fisher": "carried", "adapters": "each"}
    fisher = load_fisher(folder / "1")
    removed = sorted(fisher.tensors)[0]
    del fisher.tensors[removed]
    fisher.save(folder / "1" / "fisher.safetensors")
    monkeypatch.setattr("sa_diffusers.runs.stages.fisher.estimate_sums", None)  # calling it would raise
    again = read_run_options(folder / "2") | own | {"concept": [Forget("eight", "six")], "after": str(folder / "1")}
    again |= {"output_dir": tmp_path / "run", "progress": False}
    dropped = ("surrogate", "siblings", "fisher", "model", "dtype")
    with pytest.raises(FisherMismatch, match=f"is of fewer layers: it has no {removed}; pass chain_fisher none"):
        forget(tiny_pipeline(), **{name: value for name, value in again.items() if name not in dropped})


@pytest.mark.slow
def test_what_a_run_of_a_chain_takes_over(chain):
    given = {"concept": "eight", "surrogate": "six", "after": str(chain[0] / "1"), "model": "StableDiffusionPipeline"}
    found = {
        how: taken_over(ForgetConfig(**given, chain_fisher=how).resolved()) for how in ("first", "carried", "none")
    }
    fisher = str(chain[0] / "1" / "fisher.safetensors")
    assert {how: (one.fisher, one.ewc_lambda) for how, one in found.items()} == {
        "first": (fisher, 50.0),
        "carried": (None, 50.0),
        "none": (None, 0.0),
    }
    files = {str(p.relative_to(chain[0] / "1")): p.read_bytes() for p in (chain[0] / "1").rglob("*") if p.is_file()}
    cache_repository("me/first-request", files)
    found = taken_over(ForgetConfig(**given | {"after": "me/first-request"}).resolved())
    assert Path(found.fisher).read_bytes() == files["fisher.safetensors"]
    (link,) = chain_of("me/first-request")
    assert [row.concept for _, row in link.rows] == ["seven, 7"] and all(file.is_file() for file in link.adapters)
    with pytest.raises(ValueError, match="chain_fisher none takes no other Fisher"):
        ForgetConfig(**given, fisher=fisher, chain_fisher="none")


@pytest.mark.slow
def test_a_run_of_a_chain_is_gone_on_from_without_those_before_it(chain, tiny_pipeline, tmp_path):
    """By its folder alone, wherever that lies: the third request is the same, byte for byte, and so is a fourth's."""
    folder = chain[0]
    given = read_run_options(folder / "2")
    dropped = ("concept", "surrogate", "siblings", "samples", "fisher", "model", "dtype", "after", "output_dir")
    given = {name: value for name, value in given.items() if name not in dropped}

    def third(after, output_dir):
        forget(tiny_pipeline(), [Forget("two", "one")], after=after, output_dir=output_dir, **given)
        return chain_of(str(output_dir)), taken_over(goes_on(output_dir))

    def goes_on(after):
        given = {"concept": "four", "surrogate": "one", "after": str(after), "model": "StableDiffusionPipeline"}
        return ForgetConfig(**given).resolved()

    links, fourth = third(folder / "2", tmp_path / "here")
    assert [link.folder for link in links] == [folder / "1", folder / "2", tmp_path / "here"]
    expected, left = _said(links, fourth), _files(tmp_path / "here")
    shutil.copytree(folder / "2", tmp_path / "moved")
    elsewhere = folder.rename(tmp_path / "elsewhere")
    try:
        folder.mkdir()
        for file in elsewhere.glob("*.txt"):
            shutil.copy(file, folder)
        shutil.copytree(elsewhere / "2", folder / "1")  # another run in the first one's place
        found, fourth = third(tmp_path / "moved", tmp_path / "there")
        assert _files(tmp_path / "there") == left and _said(found, fourth) == expected
        shutil.rmtree(tmp_path / "moved")
        cache_repository("me/third", {str(p): content for p, content in _files(tmp_path / "there", "*").items()})
        shutil.rmtree(tmp_path / "there")
        assert _said(chain_of("me/third"), taken_over(goes_on("me/third"))) == expected
    finally:
        shutil.rmtree(folder)
        elsewhere.rename(folder)


def _files(folder, pattern="*.safetensors"):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def _said(links, options):
    """What a request takes of the runs before it."""
    files = [file for link in links for file in link.adapters]
    files += [
        Path(options.fisher),
        *(Path(options.samples, f"samples.{suffix}") for suffix in ("json", "safetensors")),
    ]
    return [([row for _, row in link.rows], link.numbers) for link in links], [file.read_bytes() for file in files]


@pytest.mark.slow
def test_what_only_options_from_elsewhere_name_is_not_kept(chain, tmp_path):
    shutil.copytree(chain[0] / "2", tmp_path / "2")
    private = tmp_path / "private.safetensors"
    private.write_text("secret")
    named = {"fisher": str(private), "samples": str(tmp_path), "after": None}
    values = read_run_options(tmp_path / "2") | named
    config_to_yaml(config_from_dict(ForgetConfig, values), tmp_path / "2" / "config.yaml")
    shutil.rmtree(tmp_path / "2" / "earlier")
    options = taken_over(ForgetConfig(after=str(tmp_path / "2"), model="StableDiffusionPipeline").resolved())
    assert options.fisher == str(private)
    keep_earlier(SimpleNamespace(chain=chain_of(options.after), options=options, artifacts={}, folder=tmp_path / "3"))
    own = ("config.yaml", f"lora/{LORA_FILE}", "metrics.json", "pipeline/forgotten.json")
    assert [str(name) for name in _files(tmp_path / "3", "*")] == [f"earlier/1/{name}" for name in own]


def test_a_run_of_some_of_its_concepts_shows_theirs_alone(tiny_pipeline, tmp_path):
    context = context_of(get_family(tiny_pipeline()), tmp_path)
    every = Concepts([*context.concepts, find_concept("eight", "six"), find_concept("two", "one")])
    captions = [Condition(f"a {one.name}") for one in every] * 3
    candidates = [Candidate(f"a {one.name}", word=one.name) for one in every]
    sets = {"concept": PromptSet.seeded("asks", candidates, lambda i: i), "retained": PromptSet("keeps", [], [])}
    context.inputs = replace(
        context.inputs, concepts=every, templates=[["a {}"], ["b {}"], ["c {}"]], sets=sets, requested=2
    )
    context.artifacts["surrogate"] = Artifact(SampleSet(torch.arange(9.0), captions, shares=3), "all")
    part = context.of([0, 2], tmp_path / "part")
    assert ([one.name for one in part.concepts], part.templates) == (["seven", "two"], [["a {}"], ["c {}"]])
    assert [one.name for one in part.requested] == ["two"] and part.folder == tmp_path / "part"
    shown = part.value("surrogate")
    assert shown.latents.tolist() == [0, 2, 3, 5, 6, 8] and shown.shares == 2
    assert part.inputs.sets["concept"].prompts == ["a seven", "a two"]
    assert len(context.inputs.sets["concept"]) == 3 and len(context.value("surrogate")) == 9
