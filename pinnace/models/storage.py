"""A model from where --storage_uri says: downloaded by KServe's own library, verified, and only then put in its place.

On a cluster KServe's storage initializer has done that before, and STORAGE_URI is /mnt/models. The library runs in a
process of its own: it imports boto3 and its like, 90 MB that the server need not keep.
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

from pinnace.errors import ConfigurationError, DownloadError, ModelFileNotFound, one_line
from pinnace.runtimes.directory_lock import exclusive_staging_directory
from pinnace.settings import Settings

logger = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"  # beside a model, as `sha256sum` writes it; model_export does
MOUNTED = Path("/mnt/models")  # where KServe puts a model
LIBRARY = "kserve_storage"
PROGRESS_SECONDS = 5.0


def model_of(settings: Settings) -> Path | None:
    """What --storage_uri means, fetched; None without it, with --model_dir or --model. Raises as `fetch` does."""
    if settings.model or settings.model_dir or not settings.storage_uri:
        return None
    return fetch(settings.storage_uri, settings.storage_cache_dir)


def fetch(uri: str, cache_dir: Path | None) -> Path:
    """The directory or file that `uri` means: a path as it is, anything else downloaded into `cache_dir`.

    What is there from an earlier start is taken if the source's SHA256SUMS still says so. Raises ModelMissing,
    BadSetting and DownloadFailed; nothing half-downloaded is ever left where a model is looked for.
    """
    if "://" not in uri or uri.startswith("file://"):
        return _existing(Path(uri.removeprefix("file://")), uri)
    if uri.startswith("pvc://"):
        return _existing(MOUNTED, f"{uri}, which Kubernetes would mount at {MOUNTED},")
    if importlib.util.find_spec(LIBRARY) is None:
        raise ConfigurationError(
            f"--storage_uri={redact_uri(uri)} needs a library: "
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
    """Without what may be a secret: the user's name and password, and a signed query."""
    return re.sub(r"//[^/]*@", "//", uri).partition("?")[0]


def _existing(path: Path, named: str) -> Path:
    if not os.access(path, os.F_OK):
        raise ModelFileNotFound(f"--storage_uri={named} is not there")
    return path


def _is_current(target: Path, uri: str, scratch: Path) -> bool:
    """Whether what was downloaded earlier is what `uri` has; where no checksums say so, it is not."""
    if not (target / CHECKSUMS).exists() or uri.startswith("http"):  # of which one file is all that can be had
        return False
    try:
        _download(uri, scratch, CHECKSUMS)
        return (scratch / CHECKSUMS).read_bytes() == (target / CHECKSUMS).read_bytes()
    except (DownloadError, FileNotFoundError):
        return False


def _download(uri: str, directory: Path, *patterns: str) -> None:
    """Into a new directory. Raises DownloadFailed."""
    directory.mkdir()
    started_at = time.monotonic()
    command = [sys.executable, "-m", "pinnace.models.storage", uri, str(directory), *patterns]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(  # noqa: S603 the library gets the address, no shell
            command,
            cwd=Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        ) as process,
    ):
        while _is_running(process):
            with suppress(FileNotFoundError):  # the library renames and removes as it goes
                have_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
                seconds = time.monotonic() - started_at
                logger.info("downloading %s: %.0f MB in %.0f s", redact_uri(uri), have_bytes / 1e6, seconds)
        said.seek(0)
        lines = said.read().strip().splitlines() or [f"exit code {process.returncode}"]
    if process.returncode:
        reason = lines[-1].replace(uri, redact_uri(uri))
        raise DownloadError(f"--storage_uri={redact_uri(uri)} cannot be downloaded ({reason})")
    logger.info("downloaded %s in %.1f s", " ".join(patterns) or redact_uri(uri), time.monotonic() - started_at)


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Asked after a while in which it may end."""
    try:
        process.wait(PROGRESS_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _verify(directory: Path, uri: str) -> None:
    """Every file that SHA256SUMS names, if there is one, has the content that it says."""
    checksums = directory / CHECKSUMS
    lines = checksums.read_text() if checksums.exists() else ""
    for wanted, name in re.findall(r"^([0-9a-f]{64}) [ *](.+)$", lines, re.MULTILINE):
        file = directory / Path(name).name
        if not file.is_file():
            raise DownloadError(f"--storage_uri={redact_uri(uri)} lacks {file.name}, which its {CHECKSUMS} names")
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != wanted:
                raise DownloadError(f"{file.name} of --storage_uri={redact_uri(uri)} is not what its {CHECKSUMS} says")


def _main(uri: str, directory: str, *patterns: str) -> None:
    """The other process: one line on standard error where it fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from kserve_storage import Storage

    try:
        Storage.download(uri, directory, allow_patterns=list(patterns) or None)
    except Exception as error:  # one for each library that it uses
        sys.exit(f"{type(error).__name__}: {one_line(error)}")


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, which a forked process would wait to close for ever
    os.killpg(0, 9)  # with the processes that the library has started


if __name__ == "__main__":
    _main(*sys.argv[1:])
