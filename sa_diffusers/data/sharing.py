"""What a run leaves for others: Fishers, samples and SPEED's embeddings, from the hub and pushed with their cards."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from huggingface_hub import HfApi

from sa_diffusers.core.fisher import Fisher
from sa_diffusers.data.sample_set import SampleSet
from sa_diffusers.io.artifacts import run_lock
from sa_diffusers.io.atomic_files import load_tensors, read_json, write_json
from sa_diffusers.io.hub import PushError, check_push, fetch, push_folder, read_license
from sa_diffusers.io.model_names import is_on_hub
from sa_diffusers.report.cards import fisher_card, samples_card, speed_card


FISHER_FILE = "fisher.safetensors"
SPEED_FILE = "speed_retained.safetensors"
SAMPLES_FILES = ("samples.json", "samples.safetensors")
SAMPLES_PICTURE = "samples.png"
# What can be pushed of a run, and the file that is written last of it.
PARTS = {
    "pipeline": "pipeline/README.md",
    "lora": "lora/README.md",
    "fisher": FISHER_FILE,
    "samples": "samples/samples.json",
    "speed_retained": SPEED_FILE,
}


def locate(source: str | Path, name: str, revision: str | None = None) -> Path:
    """The file itself, that of this name in a folder such as a run's, or the downloaded one of a hub id.

    Raises ModelLoadError: not on the hub. A path that is not there is returned as it is.
    """
    path = Path(source)
    if path.is_dir():
        return path / name
    on_hub = path.suffix != ".safetensors" and is_on_hub(str(source))
    return fetch(str(source), [name], revision) / name if on_hub else path


def load_fisher(source: str | Path, revision: str | None = None) -> Fisher:
    """Read a Fisher; whether it belongs to a model is for `Fisher.check` to say.

    Args:
        source: a file, a folder (such as a run's) that holds fisher.safetensors, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError, FisherMismatch, ModelLoadError: no such file; it holds something else; not on the hub.
    """
    return Fisher.load(locate(source, FISHER_FILE, revision))


def load_samples(source: str | Path, revision: str | None = None) -> SampleSet:
    """Read the samples/ folder of a run, or a sample set on the hub. Raises FileNotFoundError, ModelLoadError."""
    folder = fetch_samples(source, revision)
    if not (folder / "samples.safetensors").is_file():
        raise FileNotFoundError(f"no samples.safetensors in {folder}; expected the samples/ folder of a run")
    return SampleSet.load(folder / "samples.safetensors")


def fetch_samples(source: str | Path, revision: str | None = None) -> Path:
    """A local folder with samples.safetensors and samples.json: `source` itself, or of a hub id the downloaded one.

    A path that is no folder is returned as it is, for the reader to say what is missing.
    """
    if not is_on_hub(str(source)):
        return Path(source)
    return fetch(str(source), SAMPLES_FILES, revision, repo_type="dataset")


def push_fisher(
    fisher: Fisher,
    repo_id: str,
    *,
    private: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    api: HfApi | None = None,
) -> str:
    """Push fisher.safetensors (see `Fisher.save`) and its card, in one commit, to a model repository; returns its URL.

    Raises:
        PushError: not logged in, or the upload failed.
    """
    check_push(repo_id, api)
    with TemporaryDirectory(prefix="sa_diffusers_") as folder:
        fisher.save(Path(folder, FISHER_FILE), dtype)
        metadata = fisher.metadata if dtype == "float32" else fisher.metadata | {"dtype": dtype}  # as in the file
        Path(folder, "README.md").write_text(fisher_card(metadata, repo_id, _license_of(metadata)), encoding="utf-8")
        again = "the Fisher is unchanged. Push it again by the same command or call."
        return push_folder(folder, repo_id, private=private, again=again, api=api)


def push_samples(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    api: HfApi | None = None,
) -> str:
    """Push the samples/ folder of a run and a card, in one commit, to a data set repository; returns its URL.

    What the folder holds of one concept alone (replay drawn without it) stays behind.

    Args:
        dtype: of the latents in the file; "float16" takes half the room, and rounds. Runs tell the two apart.

    Raises:
        ValueError, PushError: no finished sample set; not logged in, or the upload failed.
    """
    folder = Path(folder)
    missing = [name for name in SAMPLES_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"no samples in {folder}: it lacks {' and '.join(missing)}; pass the samples/ folder of a run"
        )
    check_push(repo_id, api)
    key = read_json(folder / "samples.json", "model")
    picture = SAMPLES_PICTURE if (folder / SAMPLES_PICTURE).is_file() else None
    again = f"{folder} is whole. Push it again by the same command or call."
    with TemporaryDirectory(prefix="sa_diffusers_") as temporary:
        for name in filter(None, (*SAMPLES_FILES, picture)):
            shutil.copy(folder / name, temporary)
        if dtype == "float16":
            samples = SampleSet.load(folder / "samples.safetensors")
            SampleSet(samples.latents.half(), samples.conditions).save(Path(temporary, "samples.safetensors"))
            key |= {"dtype": dtype}
            write_json(key, Path(temporary, "samples.json"))
        card = samples_card(key, repo_id, _license_of(key.get("provenance", {})), picture)
        Path(temporary, "README.md").write_text(card, encoding="utf-8")
        return push_folder(temporary, repo_id, private=private, repo_type="dataset", again=again, api=api)


def push_speed_retained(path: str | Path, repo_id: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Push what SPEED read of retained prompts and its card, in one commit, to a model repository; returns its URL.

    Raises:
        DamagedFile, PushError: another file; not logged in, or the upload failed.
    """
    _, notes = load_tensors(path, "text_encoders", "prompts")
    check_push(repo_id, api)
    with TemporaryDirectory(prefix="sa_diffusers_") as folder:
        shutil.copy(path, Path(folder, SPEED_FILE))
        card = speed_card(notes, repo_id, _license_of(notes.get("provenance", {})))
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        again = f"{path} is whole. Push it again by the same command or call."
        return push_folder(folder, repo_id, private=private, again=again, api=api)


def push_run(
    run: str | Path,
    ids: Mapping[str, str],
    *,
    private: bool = False,
    fisher_dtype: Literal["float32", "float16"] = "float32",
    samples_dtype: Literal["float32", "float16"] = "float32",
    api: HfApi | None = None,
) -> dict[str, str]:
    """Push parts of a finished run, each to a repository of its own, and return their URLs.

    Args:
        run: the run's folder; kept from other runs meanwhile.
        ids: part (of PARTS) to the repository's id.

    Raises:
        ValueError: a part that the run does not hold, or two with one id; nothing was pushed.
        PushError: not logged in, or an upload failed; the message says what is on the hub already.
    """
    run = Path(run)
    missing = [f"{part} ({run / PARTS[part]})" for part in ids if not (run / PARTS[part]).is_file()]
    if missing:
        raise ValueError(
            f"{run} does not hold {', '.join(missing)}. A run that is not finished has no cards yet: run its command "
            "again. One that reused samples or Fisher of another run leaves none: push those of that run."
        )
    models = [repo_id for part, repo_id in ids.items() if part != "samples"]  # those are a data set
    if len(set(models)) < len(models):
        raise ValueError(f"expected a repository of its own for each part, got {dict(ids)}")
    for repo_id in ids.values():
        check_push(repo_id, api)
    urls: dict[str, str] = {}
    with run_lock(run):
        for part, repo_id in ids.items():
            try:
                if part == "fisher":
                    urls[part] = push_fisher(load_fisher(run), repo_id, private=private, dtype=fisher_dtype, api=api)
                elif part == "samples":
                    urls[part] = push_samples(run / "samples", repo_id, private=private, dtype=samples_dtype, api=api)
                elif part == "speed_retained":
                    urls[part] = push_speed_retained(run / SPEED_FILE, repo_id, private=private, api=api)
                else:
                    urls[part] = push_folder(run / part, repo_id, private=private, api=api)
            except PushError as error:
                there = f" On the hub already: {', '.join(urls.values())}." if urls else ""
                raise PushError(f"{part}: {error}{there}") from error
    return urls


def _license_of(origin: Mapping) -> str | None:
    """The licence of the model that `provenance` names."""
    return read_license(origin["model"], origin.get("revision")) if origin.get("model") else None
