"""--storage_uri: models that KServe's storage library downloads. A download is verified before it is used.

On a cluster, KServe's storage initializer has already downloaded the model, and STORAGE_URI is /mnt/models. The library
runs in a separate process, because it imports boto3 and similar packages: 90 MB that the server need not keep.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from pinnace.errors import DownloadError, ModelFileNotFound, PackageMissing, one_line
from pinnace.runtimes.directory_lock import exclusive_staging_directory
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"  # next to the model, in the format of `sha256sum`; model_export writes it
MOUNTED = Path("/mnt/models")  # where KServe mounts a model
LIBRARY = "kserve_storage"
PROGRESS_SECONDS = 5.0


def fetch_model(settings: Settings) -> Path | None:
    """Return the path of the model that --storage_uri names; None if it is unset, or --model_dir or --model is set.

    Raises what `fetch` raises.
    """
    if settings.model or settings.model_dir or not settings.storage_uri:
        return None
    return fetch(settings.storage_uri, settings.storage_cache_dir)


def fetch(uri: str, cache_dir: Path | None) -> Path:
    """Return the model's directory or file: a local path as it is, anything else downloaded into `cache_dir`.

    An earlier download is used again if the source's SHA256SUMS has not changed. An incomplete download is never left
    where a model is looked for. Raises ModelFileNotFound, PackageMissing and DownloadError.
    """
    if "://" not in uri or uri.startswith("file://"):
        return _check_exists(Path(uri.removeprefix("file://")), uri)
    if uri.startswith("pvc://"):
        return _check_exists(MOUNTED, f"{uri}, which Kubernetes mounts at {MOUNTED},")
    if importlib.util.find_spec(LIBRARY) is None:
        raise PackageMissing(
            f"--storage_uri={redact_uri(uri)} needs kserve-storage: "
            "`pip install 'pinnace[storage]'`, in a clone `pip install -r requirements-storage.txt`"
        )
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME", "") + "/.cache"
    cache_dir = cache_dir or Path(caches, "pinnace")
    target = cache_dir / hashlib.sha256(uri.encode()).hexdigest()[:16]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive_staging_directory(target) as staging:
            if not _is_current(target, uri, staging / "checksums"):
                _download(uri, staging / "model")
                _verify(staging / "model", uri)
                if target.exists():
                    target.rename(staging / "old")
                (staging / "model").rename(target)
    except OSError as error:
        raise DownloadError(f"{cache_dir} cannot be written ({error.strerror}): see --storage_cache_dir") from None
    return target


def redact_uri(uri: str) -> str:
    """Return the URI without user name, password and query, which may be secret (a query can hold a signature)."""
    return re.sub(r"//[^/]*@", "//", uri.partition("?")[0])


def _check_exists(path: Path, named: str) -> Path:
    if not os.access(path, os.F_OK):
        raise ModelFileNotFound(f"--storage_uri={named} does not exist")
    return path


def _is_current(target: Path, uri: str, scratch: Path) -> bool:
    """Return whether the earlier download equals what `uri` names now; False if there are no checksums to compare."""
    if not (target / CHECKSUMS).exists() or uri.startswith("http"):  # HTTP downloads one file, without its checksums
        return False
    try:
        _download(uri, scratch, CHECKSUMS)
        return (scratch / CHECKSUMS).read_bytes() == (target / CHECKSUMS).read_bytes()
    except (DownloadError, FileNotFoundError):
        return False


def _download(uri: str, directory: Path, *patterns: str) -> None:
    """Download into a new directory the files that match a pattern, or all. Raises DownloadError."""
    directory.mkdir()
    started_at = time.monotonic()
    command = [sys.executable, "-m", "pinnace.models.storage", uri, str(directory), *patterns]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(  # noqa: S603 no shell: the library gets the URI as it is
            command,
            cwd=Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,  # closes when this process ends in any way
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        ) as process,
    ):
        while _is_running(process):
            with suppress(FileNotFoundError):  # the library renames and removes files meanwhile
                have_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
                seconds = time.monotonic() - started_at
                logger.info("downloading %s: %.0f MB in %.0f s", redact_uri(uri), have_bytes / 1e6, seconds)
        stderr.seek(0)
        lines = stderr.read().strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode:
        reason = lines[-1].replace(uri, redact_uri(uri))
        raise DownloadError(f"--storage_uri={redact_uri(uri)} cannot be downloaded ({reason})")
    logger.info("downloaded %s in %.1f s", " ".join(patterns) or redact_uri(uri), time.monotonic() - started_at)


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Wait for the process for PROGRESS_SECONDS. Return whether it is still running."""
    try:
        process.wait(PROGRESS_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _verify(directory: Path, uri: str) -> None:
    """Check all files that SHA256SUMS names, if the model has one. Raises DownloadError."""
    checksums = directory / CHECKSUMS
    lines = checksums.read_text() if checksums.exists() else ""
    for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", lines, re.MULTILINE):
        file = directory / Path(name).name
        if not file.is_file():
            raise DownloadError(f"--storage_uri={redact_uri(uri)} lacks {file.name}, which its {CHECKSUMS} names")
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                raise DownloadError(f"{file.name} of --storage_uri={redact_uri(uri)} does not match its {CHECKSUMS}")


def _main(uri: str, directory: str, *patterns: str) -> None:
    """Download the files that match a pattern, or all: the entry point of the process that `_download` starts.

    The process must lead a process group of its own, since the whole group is killed when standard input ends. On
    failure it exits with code 1, and the last line on standard error is the reason.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from kserve_storage import Storage

    try:
        Storage.download(uri, directory, allow_patterns=list(patterns) or None)
    except Exception as error:  # each library that it uses raises its own
        sys.exit(f"{type(error).__name__}: {one_line(error)}")


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a forked process would wait forever to close it
    os.killpg(0, 9)  # includes the processes that the library has started


if __name__ == "__main__":
    _main(*sys.argv[1:])
