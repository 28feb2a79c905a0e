"""A stand-in for the hub's client: what is pushed to it lands in the local cache, where the real download finds it."""

import hashlib
import inspect
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    def __init__(self, status_code: int) -> None:
        self.status_code, self.headers, self.request = status_code, {}, None


def hub_error(kind: type[HfHubHTTPError], status_code: int) -> HfHubHTTPError:
    return kind(f"status {status_code}", response=Response(status_code))


def cache_repository(repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> str:
    """Put files into the cache as a download would, and return their commit."""
    commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    folder = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"
    for name, content in (
        {f"snapshots/{commit}/{n}": c for n, c in files.items()} | {"refs/main": commit.encode()}
    ).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return commit


class FakeUrl(str):
    """As huggingface_hub's RepoUrl."""

    def __new__(cls, repo_id: str) -> "FakeUrl":
        self = super().__new__(cls, f"https://hub.example/{repo_id}")
        self.repo_id = repo_id
        return self


class FakeHub:
    """Keeps what it is sent. `fails` names the method that raises, and with what; "upload" is the second file sent."""

    def __init__(self, **fails: Exception) -> None:
        self.fails, self.calls = fails, []
        self.files: dict[str, dict[str, bytes]] = {}  # by repository; a commit is all or nothing

    def _call(self, name: str, **arguments: object) -> None:
        inspect.signature(getattr(HfApi, name)).bind(None, **arguments)  # the real client would take them
        self.calls.append((name, arguments))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict:
        self._call("whoami")
        return {"name": "someone"}

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str, exist_ok: bool) -> "FakeUrl":
        self._call("create_repo", repo_id=repo_id, private=private, repo_type=repo_type, exist_ok=exist_ok)
        url = FakeUrl(repo_id if "/" in repo_id else f"someone/{repo_id}")
        self.files.setdefault(url.repo_id, {})
        return url

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, repo_type: str, delete_patterns: list[str]
    ) -> None:
        assert repo_id in self.files, f"there is no {repo_id}"
        self._call(
            "upload_folder",
            repo_id=repo_id,
            folder_path=folder_path,
            commit_message=commit_message,
            repo_type=repo_type,
            delete_patterns=delete_patterns,
        )
        uploaded = {}
        for path in sorted(path for path in Path(folder_path).rglob("*") if path.is_file()):
            if uploaded and "upload" in self.fails:
                raise RuntimeError(f"Error while uploading '{path.name}' to the Hub.") from self.fails["upload"]
            uploaded[str(path.relative_to(folder_path))] = path.read_bytes()
        files = self.files[repo_id].items()
        kept = {n: content for n, content in files if not any(fnmatch(n, pattern) for pattern in delete_patterns)}
        self.files[repo_id] = kept | uploaded
        cache_repository(repo_id, self.files[repo_id], repo_type)
