"""The directory that an export writes: it appears complete or not at all, and leftovers of killed exports go."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from model_export.errors import ExportError
from service import manifest

REPLACED = ".replaced"
_TOKEN = re.compile(rf"\.[0-9a-f]{{16}}({re.escape(REPLACED)})?")


def check_destination(path: Path, directory: Path, *, overwrite: bool) -> None:
    """Raises ExportError where the source `path` may not be exported to `directory`."""
    source, target = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ExportError(
            f"one of {directory} and the source {path} contains the other; give a directory beside the source"
        )
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; give the directory that it leads to")
    if directory.exists() and not overwrite:
        raise ExportError(f"{directory} exists; give --overwrite to replace it")
    if directory.exists() and not (directory / manifest.FILE_NAME).is_file():
        raise ExportError(f"{directory} is not a model directory; refusing to replace it")


def remove_leftovers(directory: Path) -> list[str]:
    """Removes what killed exports to `directory` left beside it. Returns a sentence for each.

    A model that was about to be replaced is moved back. What an export that still runs is writing stays.
    """
    sentences = []
    for path in sorted(directory.parent.glob(f".{glob.escape(directory.name)}.*")):
        token = path.name.removeprefix(f".{directory.name}")
        if not _TOKEN.fullmatch(token) or path.is_symlink() or not path.is_dir():
            continue
        if _is_written(path.with_name(path.name.removesuffix(REPLACED))):
            continue
        if token.endswith(REPLACED) and not os.path.lexists(directory):
            path.rename(directory)
            sentences.append(f"moved {path} back to {directory}, which an export that was killed was replacing")
        else:
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            shutil.rmtree(path)
            sentences.append(f"removed {path} of {size >> 20} MiB, which an export that was killed left")
    return sentences


def _is_written(work: Path) -> bool:
    """Whether a running export holds the lock of the directory."""
    try:
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def written_at_once(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its place at the end, and is removed when anything fails."""
    created = [parent for parent in directory.parents if not parent.exists()]
    # The name is known before the directory exists, so that an interrupt at any moment can remove it.
    work = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
    replaced = work.with_name(f"{work.name}{REPLACED}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700)
        with _locked(work):
            yield work
            work.chmod(0o755)
            if directory.exists():
                directory.rename(replaced)
            work.rename(directory)
    except BaseException:
        if replaced.exists():
            replaced.rename(directory)
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that is not empty stays, and so do those around it
            for parent in created:
                parent.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Holds the lock of the directory, which ends with the process at the latest."""
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def keep_refused(work: Path, directory: Path) -> Path:
    """Moves the complete model directory `work` beside `directory`, in place of an earlier one. Returns its path."""
    kept = directory.with_name(f"{directory.name}.refused")
    if (kept / manifest.FILE_NAME).is_file() and not kept.is_symlink():
        shutil.rmtree(kept)
    elif os.path.lexists(kept):
        kept = kept.with_name(f"{kept.name}.{secrets.token_hex(4)}")
    work.chmod(0o755)
    return work.rename(kept)
