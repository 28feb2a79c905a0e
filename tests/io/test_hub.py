"""To and from the hub without a network: advice on errors, cards, and pushes to a stand-in."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from fake_hub import FakeHub, cache_repository, hub_error
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sa_diffusers.io.hub import (
    ModelLoadError,
    PushError,
    check_push,
    commit_of,
    explain_load_errors,
    fetch,
    push_folder,
    read_license,
)
from sa_diffusers.io.model_names import public_name
from sa_diffusers.report.cards import write_model_card


def pipeline_folder(folder: Path, lacking: str | None = None, tokenizer_file: str = "vocab.json") -> Path:
    """A folder with the outline of a Stable Diffusion, without weights."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    files = {"scheduler": "scheduler_config.json", "tokenizer": tokenizer_file, "unet": "config.json"}
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, file in files.items():
        if name != lacking:
            (folder / name).mkdir()
            (folder / name / file).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (hub_error(GatedRepoError, 403), "accept its licence .* `hf auth login`"),
        (hub_error(RepositoryNotFoundError, 404), "neither a local folder nor a model on the hub"),
        (hub_error(RevisionNotFoundError, 404), "--revision"),
        (hub_error(HfHubHTTPError, 503), "hub cannot be reached"),
        (OfflineModeIsEnabled("offline"), "Pass a local folder, or run `hf download some/model`"),
        (ConnectionRefusedError("refused"), "hub cannot be reached"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_hub_errors_become_advice(error, advice, wrapped):
    with pytest.raises(ModelLoadError, match=advice) as caught, explain_load_errors("some/model"):
        if wrapped:
            raise OSError("Cannot load model some/model") from error
        raise error
    cause = caught.value.__cause__
    assert (cause.__cause__ if wrapped else cause) is error


def test_what_the_library_says_is_kept_where_there_is_no_better_advice():
    with pytest.raises(ModelLoadError, match="'some/model' cannot be loaded: no variant fp16"):
        with explain_load_errors("some/model"):
            raise ValueError("no variant fp16")


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), explain_load_errors("some/model"):
        raise ZeroDivisionError


def test_name_that_is_nothing(tmp_path):
    with pytest.raises(ModelLoadError, match="neither a local folder nor a model on the hub: check the name"):
        with explain_load_errors(tmp_path / "typo"):
            DiffusionPipeline.from_pretrained(str(tmp_path / "typo"))


def test_hub_id_without_network():
    with pytest.raises(ModelLoadError, match="'some/model' is not on this machine and the hub cannot be reached"):
        with explain_load_errors("some/model"):
            DiffusionPipeline.from_pretrained("some/model")


def test_folder_without_index_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=f"{tmp_path} cannot be loaded. It has no model_index.json"):
        with explain_load_errors(tmp_path):
            DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("component", ["tokenizer", "unet", "scheduler"])
def test_missing_component_is_named_before_loading(tmp_path, component):
    folder = pipeline_folder(tmp_path / "pipeline", lacking=component)
    with pytest.raises(ModelLoadError, match=f"has no {component}, which its model_index.json lists"):
        with explain_load_errors(folder):
            pytest.fail("loaded a pipeline that lacks a component")


def test_tokenizer_without_vocabulary_counts_as_missing(tmp_path):
    folder = pipeline_folder(tmp_path / "pipeline", tokenizer_file="tokenizer_config.json")
    with pytest.raises(ModelLoadError, match="has no tokenizer"), explain_load_errors(folder):
        pytest.fail("loaded a pipeline with an empty tokenizer")


def test_whole_folder_passes_and_a_damaged_index_does_not(tmp_path):
    folder = pipeline_folder(tmp_path / "pipeline")
    with explain_load_errors(folder):
        pass
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be loaded"), explain_load_errors(folder):
        pass


def make_card(folder: Path, **changes) -> ModelCard:
    content = {
        "base_model": "CompVis/stable-diffusion-v1-4",
        "concept": "Brad Pitt",
        "surrogate": "a middle aged man",
        "method": "Selective Amnesia",
        "settings": {"lambda (per unit of Fisher)": 50.0, "Fisher": "0123456789abcdef", "prompts": "a|b", "seed": 0},
        "metrics": {
            "before": {"concept_probability": 0.98123, "attribute_accuracy": {"ink": 1.0}},
            "after": {"concept_probability": 0.01, "attribute_accuracy": None, "num_images": 200},
        },
        "images": ["before_after.png"],
        "license": "creativeml-openrail-m",
        "pipeline_class": "StableDiffusionPipeline",
        **{"dtype": "float32", "variant": None, "requests": None},
    }
    path = write_model_card(folder, **(content | changes))
    assert path == folder / "README.md"
    return ModelCard.load(path)


def test_card_says_what_was_forgotten_and_how(tmp_path):
    card = make_card(tmp_path)
    data = card.data.to_dict()
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["license"] == "creativeml-openrail-m"
    assert {"diffusers", "stable-diffusion", "text-to-image", "sa_diffusers", "concept-forgetting"} <= set(
        data["tags"]
    )
    for text in (
        "to draw **a middle aged man** where it is asked for **Brad Pitt**",
        'from_pretrained("path/or/hub-id/of/this/model", dtype=torch.float32)',
        "![Before and after](before_after.png)",
        "| lambda (per unit of Fisher) | 50 |",
        "| Fisher | 0123456789abcdef |",
        r"| prompts | a\|b |",
        "| Concept when asked for | 98.1% | 1.0% |",
        "| Attributes: ink | 100.0% | – |",
        "suppressed, not proven erased",
        "`CompVis/stable-diffusion-v1-4`: creativeml-openrail-m.",
    ):
        assert text in card.content


def test_card_of_a_local_base_hides_its_path(tmp_path):
    (tmp_path / "mine").mkdir()
    card = make_card(tmp_path, base_model=str(tmp_path / "mine"), metrics=None, license=None, images=[])
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    assert "# mine without “Brad Pitt”" in card.content
    assert "## Before and after" not in card.content
    assert "look it up there" in card.content


def test_card_of_a_lora_says_what_it_is(tmp_path):
    card = make_card(tmp_path, lora=True)
    assert "lora" in card.data.tags
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "# stable-diffusion-v1-4 without “Brad Pitt” (LoRA)" in card.content
    assert "A LoRA for `CompVis/stable-diffusion-v1-4` changed by Selective Amnesia to draw" in card.content
    assert "lora" not in make_card(tmp_path).data.tags


def test_card_names_the_variant_that_the_folder_holds(tmp_path):
    assert 'variant="fp16", dtype=torch.float16' in make_card(tmp_path, variant="fp16").content
    assert "variant" not in make_card(tmp_path).content


def test_public_names_tell_no_local_path(tmp_path):
    (tmp_path / "mine" / "pipeline").mkdir(parents=True)
    assert public_name("CompVis/stable-diffusion-v1-4") == "CompVis/stable-diffusion-v1-4"
    assert public_name("bundled/digits/pipeline") == "bundled/digits/pipeline"
    assert public_name(str(tmp_path / "mine" / "pipeline")) == "mine"


def test_fetch_gives_the_folder_of_the_files_or_says_why_not():
    commit = cache_repository("someone/fetched", {"a.txt": b"a", "b.txt": b"b"})
    assert (fetch("someone/fetched", ["a.txt", "b.txt"]) / "b.txt").read_bytes() == b"b"
    assert (fetch("someone/fetched", ["a.txt"], revision=commit) / "a.txt").read_bytes() == b"a"
    with pytest.raises(ModelLoadError, match="'someone/fetched' is not on this machine"):
        fetch("someone/fetched", ["a.txt", "c.txt"])
    with pytest.raises(ModelLoadError, match="`hf download someone/fetched --repo-type dataset`"):
        fetch("someone/fetched", ["a.txt"], repo_type="dataset")


def test_the_commit_of_a_cached_model_is_found(tmp_path):
    commit = cache_repository("someone/base", {"model_index.json": b"{}"})
    assert commit_of("someone/base", None) == commit
    assert commit_of("someone/base", "main") == commit
    assert commit_of("someone/never-seen", "v1") == "v1"
    assert commit_of(str(tmp_path), None) is None


def test_the_licence_of_the_base_is_read_from_its_card(tmp_path):
    cache_repository("someone/licensed", {"README.md": b"---\nlicense: openrail\n---\n# A model"})
    assert read_license("someone/licensed") == "openrail"
    make_card(tmp_path, license="mit")
    assert read_license(str(tmp_path)) == "mit"  # of a model that forgot once already
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert read_license(str(tmp_path)) is None
    assert read_license("someone/never-seen") is None
    cache_repository("StableDiffusionPipeline", {"README.md": b"---\nlicense: openrail\n---\n# Somebody's"})
    assert read_license("StableDiffusionPipeline") is None  # what a pipeline without a name is called
    assert read_license("bundled/digits/pipeline") == "apache-2.0"


def test_push_is_one_commit(tmp_path):
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "model_index.json").write_text("{}")
    hub = FakeHub()
    assert push_folder(tmp_path, "someone/model", private=True, api=hub) == "https://hub.example/someone/model"
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "someone/model", "private": True, "repo_type": "model", "exist_ok": True}
    assert hub.files["someone/model"] == {"README.md": b"card", "model_index.json": b"{}"}


def test_a_name_without_a_user_is_the_users_own(tmp_path):
    (tmp_path / "README.md").write_text("card")
    hub = FakeHub()
    assert push_folder(tmp_path, "model", private=False, api=hub) == "https://hub.example/someone/model"
    assert hub.files == {"someone/model": {"README.md": b"card"}}


def test_a_second_push_leaves_no_weights_of_the_first(tmp_path):
    hub, unet = FakeHub(), tmp_path / "unet"
    unet.mkdir()
    for name in ("w.safetensors", "w.fp16.safetensors"):
        (unet / name).write_text("before")
    push_folder(tmp_path, "someone/model", private=False, api=hub)
    hub.files["someone/model"] |= {"pictures/a.png": b"theirs", "other.safetensors": b"theirs"}
    (unet / "w.fp16.safetensors").unlink()
    (unet / "w.safetensors").write_text("after")
    push_folder(tmp_path, "someone/model", private=False, api=hub)
    theirs = {"pictures/a.png": b"theirs", "other.safetensors": b"theirs"}
    assert hub.files["someone/model"] == {"unet/w.safetensors": b"after"} | theirs


def test_the_advice_after_a_failed_push_keeps_the_model_private(tmp_path):
    for private in (True, False):
        with pytest.raises(PushError) as caught:
            push_folder(tmp_path, "a/b", private=private, api=FakeHub(create_repo=ConnectionResetError("reset")))
        assert (f"hf upload a/b {tmp_path} --private" in str(caught.value)) == private


def test_a_download_is_advised_of_the_revision_that_was_asked_for():
    with pytest.raises(ModelLoadError, match=r"hf download someone/model --revision v2`"):
        fetch("someone/model", ["model_index.json"], "v2")


def test_a_folder_is_pushed_to_a_data_set(tmp_path):
    (tmp_path / "weights").write_bytes(b"w")
    hub = FakeHub()
    push_folder(tmp_path, "someone/data", private=False, repo_type="dataset", again="again", api=hub)
    assert {call["repo_type"] for _, call in hub.calls} == {"dataset"}
    assert hub.files["someone/data"] == {"weights": b"w"}


@pytest.mark.parametrize(
    ("fails", "cause"),
    [
        ({"upload_folder": ConnectionResetError("reset by peer")}, "reset by peer"),
        ({"upload": ConnectionResetError("reset by peer")}, "Error while uploading 'b' to the Hub. .reset by peer."),
        ({"upload_folder": hub_error(HfHubHTTPError, 500)}, "status 500"),
    ],
    ids=["connection", "second file", "server"],
)
def test_push_that_fails_half_way_says_how_to_go_on(tmp_path, fails, cause):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    hub = FakeHub(**fails)
    with pytest.raises(PushError, match=f"failed: {cause}. Nothing is lost") as caught:
        push_folder(tmp_path, "someone/model", private=False, api=hub)
    assert f"`hf upload someone/model {tmp_path}`" in str(caught.value)
    assert hub.files == {"someone/model": {}}
    assert [(tmp_path / name).read_text() for name in "ab"] == ["1", "2"]
    hub.fails.clear()
    push_folder(tmp_path, "someone/model", private=False, api=hub)
    assert hub.files["someone/model"] == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize(
    "error", [LocalTokenNotFoundError("no token"), hub_error(HfHubHTTPError, 401)], ids=["no token", "refused token"]
)
def test_login_is_asked_for(tmp_path, error):
    with pytest.raises(PushError, match="`hf auth login`"):
        check_push("someone/model", FakeHub(whoami=error))
    with pytest.raises(PushError, match="^(Not logged in|The hub does not accept).* `hf auth login`"):
        push_folder(tmp_path, "someone/model", private=False, api=FakeHub(create_repo=error))


def test_check_push_passes_and_refuses(monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("sa_diffusers.io.hub.HfApi", lambda: hub)
    check_push("someone/model")
    assert hub.calls == [("whoami", {})]
    with pytest.raises(PushError, match="expected user/name"):
        check_push("a/b/c")
    with pytest.raises(PushError, match="cannot be reached: offline.*push later"):
        check_push("someone/model", FakeHub(whoami=OfflineModeIsEnabled("offline")))
