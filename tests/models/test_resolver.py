"""What references mean, what the hub is asked, and what each fault is told as."""

import errno
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.errors as hub_errors
import pytest

from models.errors import CacheWriteError, ModelNotFoundError
from models.loading import fetch
from models.loading.resolver import FetchOptions, ModelFiles, ModelKind, resolve_model, resolve_tokenizer


@pytest.fixture
def options(tmp_path: Path) -> FetchOptions:
    return FetchOptions(cache_dir=tmp_path / "cache", offline=True)


def touch(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


# --- local files


@pytest.mark.parametrize(
    ("files", "kind", "inner"),
    [
        (["config.json", "model.safetensors"], ModelKind.DIRECTORY, "."),
        (["config.json"], ModelKind.DIRECTORY, "."),
        (["config.json", "model.safetensors", "m.gguf"], ModelKind.DIRECTORY, "."),
        (["config.json", "m.gguf"], ModelKind.GGUF, "m.gguf"),
        (["m.gguf", "README.md"], ModelKind.GGUF, "m.gguf"),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ModelKind.GGUF, "m-00001-of-00002.gguf"),
        (["quire.json", "config.json"], ModelKind.ORBAX, "."),
    ],
)
def test_directories(tmp_path: Path, options: FetchOptions, files: list[str], kind: ModelKind, inner: str) -> None:
    for name in files:
        touch(tmp_path / "model" / name)
    assert resolve_model(str(tmp_path / "model"), options) == ModelFiles(kind, tmp_path / "model" / inner)


def test_gguf_files_by_name_or_by_content(tmp_path: Path, options: FetchOptions) -> None:
    for name in ("m.gguf", "blob"):
        path = touch(tmp_path / name, "GGUF")
        assert resolve_model(str(path), options) == ModelFiles(ModelKind.GGUF, path)
        assert resolve_tokenizer(str(path), options) == path
    assert resolve_tokenizer(str(tmp_path), options) == tmp_path


@pytest.mark.parametrize(
    ("files", "reference", "says"),
    [
        ([], "model", "no such file or directory"),
        (["model/weights.bin"], "model", "has no config.json. A model is a directory"),
        (["model/x/config.json"], "model", "its subdirectory x has; name that"),
        (["model/adapter_config.json"], "model", "it is an adapter"),
        (["model/a.gguf", "model/b.gguf"], "model", "2 GGUF models; name one: a.gguf, b.gguf"),
        (["model.bin"], "model.bin", "is not a GGUF file"),
        (["modle/config.json"], "model", "Did you mean .*modle?"),
        ([], "m.gguf", "no such file or directory"),
    ],
)
def test_near_misses(tmp_path: Path, options: FetchOptions, files: list[str], reference: str, says: str) -> None:
    for name in files:
        touch(tmp_path / name)
    with pytest.raises(ModelNotFoundError, match=says):
        resolve_model(str(tmp_path / reference), options)


def test_an_empty_directory_is_said_to_be_empty(tmp_path: Path, options: FetchOptions) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelNotFoundError, match="it is empty"):
        resolve_model(str(tmp_path / "model"), options)


@pytest.mark.parametrize("reference", ["Demo", "gpt2", "a/b/c", "org/name@", "org/", "https://x.org/y"])
def test_unknown_references_list_the_four_forms(options: FetchOptions, reference: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(reference, options)
    for form in ("config.json", ".gguf file", "org/name[@revision]", "'demo'"):
        assert form in str(caught.value)
    assert ("Did you mean 'demo'?" in str(caught.value)) == (reference == "Demo")


def test_revisions_are_for_the_hub_only(tmp_path: Path, options: FetchOptions) -> None:
    touch(tmp_path / "config.json")
    for reference in (str(tmp_path), "demo"):
        with pytest.raises(ModelNotFoundError, match="has no revisions"):
            resolve_model(reference, options, revision="main")
    with pytest.raises(ModelNotFoundError, match="Two revisions"):
        resolve_model("org/name@v1", options, revision="v2")


# --- the hub


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid/x"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A hub whose one snapshot lies at `path`, or which raises `error`; what it was asked is in `asked`."""
    state: dict[str, Any] = {"path": tmp_path / "snapshot", "error": None, "asked": {}}

    def download(repository: str, **asked: Any) -> str:
        state["asked"] = {"repository": repository, **asked}
        if state["error"] is not None:
            raise state["error"]
        bar = asked["tqdm_class"](total=0, unit="B", desc="x", name="huggingface_hub.snapshot_download")
        bar.total = 10
        bar.update(4)
        bar.update(6)
        return str(state["path"])

    monkeypatch.setattr(fetch, "snapshot_download", download)
    return state


def test_hub_snapshot(hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(hub["path"] / "config.json")
    touch(hub["path"] / "model.safetensors")
    seen: list[tuple[int, int, str]] = []
    options = FetchOptions(tmp_path, hf_token="secret", progress=lambda *step: seen.append(step))
    assert resolve_model("org/name@v1", options) == ModelFiles(ModelKind.DIRECTORY, hub["path"])
    asked = hub["asked"]
    assert (asked["repository"], asked["revision"], asked["token"]) == ("org/name", "v1", "secret")
    assert asked["local_files_only"] is False and asked["cache_dir"] is None
    assert "*.safetensors" in asked["allow_patterns"]
    assert seen == [(4, 10, "org/name"), (10, 10, "org/name")]
    assert capsys.readouterr() == ("", "")
    resolve_model("org/name", FetchOptions(tmp_path, download_dir=tmp_path / "d", offline=True), revision="v2")
    asked = hub["asked"]
    assert (asked["revision"], asked["cache_dir"], asked["local_files_only"]) == ("v2", tmp_path / "d", True)
    assert resolve_tokenizer("org/name", options) == hub["path"]
    assert "*.safetensors" not in hub["asked"]["allow_patterns"]


def test_a_local_directory_goes_before_the_hub(
    hub: dict[str, Any], tmp_path: Path, options: FetchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "org" / "name" / "config.json")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name", options).path == Path("org/name")
    assert hub["asked"] == {}


def test_hub_repositories_without_a_model(hub: dict[str, Any], options: FetchOptions) -> None:
    hub["path"].mkdir()
    with pytest.raises(ModelNotFoundError, match=r"org/name has no config.json"):
        resolve_model("org/name", options)
    touch(hub["path"] / "config.json")
    with pytest.raises(ModelNotFoundError, match=r"has no \*.safetensors; of a GGUF repository"):
        resolve_model("org/name", options)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            hub_errors.RepositoryNotFoundError("x", response=answer(404)),
            ModelNotFoundError,
            "has no repository org/name",
        ),
        (hub_errors.GatedRepoError("x", response=answer(403)), ModelNotFoundError, "is gated: accept its terms"),
        (hub_errors.RevisionNotFoundError("x", response=answer(404)), ModelNotFoundError, "no revision 'v1'"),
        (hub_errors.HfHubHTTPError("503 down", response=answer(503)), ModelNotFoundError, "the hub answers 503 down"),
        (hub_errors.LocalEntryNotFoundError("x"), ModelNotFoundError, "downloads are switched off"),
        (hub_errors.HFValidationError("too long"), ModelNotFoundError, "not a valid hub id"),
        (httpx2.ProxyError("no tunnel"), ModelNotFoundError, "cannot be downloaded: no tunnel"),
        (OSError(errno.ENOSPC, "No space left on device", "blob"), CacheWriteError, "disk of blob is full"),
        (PermissionError(errno.EACCES, "Permission denied", "blob"), CacheWriteError, "blob cannot be written"),
    ],
)
def test_hub_faults(
    hub: dict[str, Any], options: FetchOptions, error: Exception, kind: type[Exception], says: str
) -> None:
    hub["error"] = error
    with pytest.raises(kind, match=says) as caught:
        resolve_model("org/name@v1", options)
    assert "\n" not in str(caught.value)


def test_no_network_is_told_from_offline(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["error"] = hub_errors.LocalEntryNotFoundError("x")
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        resolve_model("org/name", FetchOptions(tmp_path))
