"""Downloads large files from the hub: resumes where an earlier download ended, and checks their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_export.errors import ExportError

Progress = Callable[[str, int], Callable[[], object]]

# The files of a model's folder in the cache are named by their hashes if they are large.
SHA256 = re.compile(r"[0-9a-f]{64}")
# How much is downloaded or hashed between two calls of a progress.
STEP = 16 << 20
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit; `sha256` is None for small files, which git itself holds."""

    repository: str
    commit: str
    name: str
    size: int
    sha256: str | None


def fetch(file: HubFile, progress: Progress) -> Path:
    """The path of a large file in the client's cache; what the cache lacks is downloaded.

    Raises ExportError where the file has not the hash that the hub names; it is then removed.
    """
    assert file.sha256 is not None
    folder = _folder(file)
    blob = folder / "blobs" / file.sha256
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        _download(file, blob, progress)
    link = folder / "snapshots" / file.commit / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path(*[".."] * (len(Path(file.name).parts) + 1)) / "blobs" / file.sha256)
    check_hash(link, progress)
    return link


def _folder(file: HubFile) -> Path:
    from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415, slow to load and rarely needed

    return cache() / repo_folder_name(repo_id=file.repository, repo_type="model")


def remember(file: HubFile, revision: str | None) -> None:
    """Notes in the cache which commit the revision is, as the client does, for when the hub cannot be reached."""
    path = _folder(file) / "refs" / (revision or "main")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(file.commit, encoding="utf-8")


def cache() -> Path:
    """The folder of the client's cache."""
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE)


def check_hash(link: Path, progress: Progress) -> None:
    """Raises ExportError unless the content of a cached file has the hash that names it, and removes it then."""
    blob = link.resolve()
    if not SHA256.fullmatch(blob.name):
        return
    step = progress(f"checking {link.name}", -(-blob.stat().st_size // STEP))
    digest = hashlib.sha256()
    with blob.open("rb") as content:
        while part := content.read(STEP):
            digest.update(part)
            step()
    if digest.hexdigest() != blob.name:
        blob.unlink()
        raise ExportError(
            f"{link} has the SHA-256 {digest.hexdigest()}, expected {blob.name}; it was removed: export again to "
            "download it again"
        )


def _download(file: HubFile, blob: Path, progress: Progress) -> None:
    """Downloads what is missing of the file; the rest stays for another attempt where the connection breaks."""
    unfinished = blob.with_name(blob.name + UNFINISHED)
    with unfinished.open("ab") as target:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"{file.name} of {file.repository} is being downloaded by another process") from None
        begin = target.tell()
        step = progress(f"downloading {file.name}", -(-(file.size - begin) // STEP))
        passed = 0
        while begin + passed < file.size:
            with requested(file, begin + passed) as response:
                if response.status_code == 200 and begin + passed:  # the server knows no ranges
                    target.truncate(0)
                    begin = passed = 0
                before = passed
                for part in response.iter_bytes(1 << 20):
                    target.write(part)
                    for _ in range((passed + len(part)) // STEP - passed // STEP):
                        step()
                    passed += len(part)
            if passed == before:
                raise ExportError(f"{file.name} of {file.repository} ends after {begin + passed} of {file.size} bytes")
    unfinished.rename(blob)


def requested(file: HubFile, begin: int, count: int | None = None) -> Any:
    """The response, to be used in a `with`, with `count` bytes of a file from `begin` on, or all of the rest."""
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined] # noqa: PLC0415

    end = "" if count is None else str(begin + count - 1)
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end}", "Accept-Encoding": "identity"}
    url = hf_hub_url(file.repository, file.name, revision=file.commit)
    return _Checked(get_session().stream("GET", url, headers=headers, follow_redirects=True))


class _Checked:
    """A streamed response whose status is checked when it begins."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Any:
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined] # noqa: PLC0415

        response = self._stream.__enter__()
        try:
            hf_raise_for_status(response)
        except BaseException as error:
            self._stream.__exit__(type(error), error, error.__traceback__)
            raise
        return response

    def __exit__(self, *details: Any) -> Any:
        return self._stream.__exit__(*details)
