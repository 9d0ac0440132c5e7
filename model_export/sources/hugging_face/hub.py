"""Downloads sources that are named by their name on the hub: a model's directory, or a GGUF file of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from model_export.errors import ExportError
from model_export.sources.hugging_face.directory import ADAPTER
from model_export.sources.hugging_face.hub_files import HubFile, Progress, cache, check_hash, fetch, remember, requested
from model_export.sources.panics import first_line, quiet
from service.manifest import CHAT_TEMPLATE_FILE

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# The files that are downloaded: no code, and no pickles, which run code when they are opened.
SETTINGS = (
    CONFIG,
    CHAT_TEMPLATE_FILE,
    "generation_config.json",
    "special_tokens_map.json",
    TOKENIZER,
    "tokenizer_config.json",
)
WEIGHTS = ("model.safetensors.index.json", "*.safetensors")
# Other forms of the same weights, in folders or under this name.
UNWANTED = ("*/*", "consolidated*")
# How much of a GGUF file is read before the rest is downloaded; its header ends within.
BEGINNING = 32 << 20

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(
    rf"(?P<owner>{_PART})/(?P<name>{_PART})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?(:(?P<form>[A-Za-z0-9][A-Za-z0-9_-]*))?"
)
# The address of a model's page, in which a path has lost one of its slashes.
_PAGE = re.compile(r"https?:/+(www\.)?(huggingface\.co|hf\.co)/(?P<name>[^/]+/[^/]+)(/tree/(?P<revision>[^/]+))?/*")
# The form at the end of a GGUF file's name, before the number of a part.
_FORM = re.compile(r"(?:^|[-._/])(?P<form>(?:UD-)?[A-Za-z]*\d[A-Za-z0-9_]*|BF16|F16|F32)(-\d{5}-of-\d{5})?\.gguf", re.I)


class HubName(NamedTuple):
    """A model on the hub: `owner/name`, in the `revision` or else the newest; `form` names one of its GGUF files."""

    owner: str
    name: str
    revision: str | None = None
    form: str | None = None

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        revision, form = self.revision and f"@{self.revision}", self.form and f":{self.form}"
        return f"{self.repository}{revision or ''}{form or ''}"


def hub_name(source: str) -> HubName | None:
    """`source` as `owner/name`, `owner/name@revision`, either with `:form`, or a page's address; else None."""
    if page := _PAGE.fullmatch(source):
        source = page["name"] + (f"@{page['revision']}" if page["revision"] else "")
    match = _NAME.fullmatch(source)
    return HubName(match["owner"], match["name"], match["revision"], match["form"]) if match else None


def download(wanted: HubName, check: Callable[[Path], None], progress: Progress) -> Path:
    """The model's directory or GGUF file in the client's cache; what the cache does not have is downloaded.

    `check` raises ExportError for a directory with some of its files, or the beginning of a GGUF file, if it cannot be
    exported; the rest is downloaded only after that. Raises ExportError where the hub cannot be reached, does not have
    the model, or does not give it to this user.
    """
    with quiet():
        files = _listed(wanted)
    if wanted.form is not None:
        return _gguf(wanted, files, check, progress)
    if files is not None:
        _check_names(wanted, files)
    commit = wanted.revision
    for settings in ((CONFIG,), SETTINGS):
        with quiet():
            snapshot = _snapshot(wanted, commit, settings)
        with _named(wanted):
            check(snapshot)
        commit = snapshot.name  # the folder's name is the commit, the same for all files
    for file in (files or {}).values():
        if file.sha256 and file.name.endswith(".safetensors") and _is_wanted(file.name):
            with _reported(wanted):
                fetch(file, progress)
    snapshot = _snapshot(wanted, commit, (*SETTINGS, *WEIGHTS))
    if files is None:
        for path in sorted(snapshot.glob("*.safetensors")):
            check_hash(path, progress)
    return snapshot


def _is_wanted(name: str) -> bool:
    return "/" not in name and not name.startswith("consolidated")


def _check_names(wanted: HubName, files: Mapping[str, HubFile]) -> None:
    """Raises ExportError where the names of the model's files tell that it cannot be exported."""
    if ADAPTER in files:
        raise ExportError(f"{wanted} is an adapter ({ADAPTER}); merge it into its model first")
    if CONFIG not in files:
        if forms := _forms(files):
            choices = ", ".join(f"{wanted.repository}:{form}" for form in forms)
            raise ExportError(f"{wanted} has no {CONFIG} on the hub, but GGUF files; name one of them: {choices}")
        raise ExportError(f"{wanted} has no {CONFIG} on the hub, so it is no model that can be exported by its name")
    if TOKENIZER not in files:
        raise ExportError(f"{wanted} has no {TOKENIZER} on the hub; a slow tokenizer has to be converted first")
    if not any(name.endswith(".safetensors") and _is_wanted(name) for name in files):
        raise ExportError(f"{wanted} has no safetensors on the hub; other weights have to be converted first")


def _forms(files: Mapping[str, HubFile]) -> dict[str, list[str]]:
    """The names of the GGUF files of each form, in order."""
    forms: dict[str, list[str]] = {}
    for name in sorted(files):
        if (match := _FORM.search(name)) and "mmproj" not in name and "imatrix" not in name:
            forms.setdefault(match["form"].upper(), []).append(name)
    return forms


def _gguf(
    wanted: HubName, files: Mapping[str, HubFile] | None, check: Callable[[Path], None], progress: Progress
) -> Path:
    """The GGUF file of the form that is wanted, the first one if it is in several parts."""
    assert wanted.form is not None
    if files is None:
        return _cached_gguf(wanted, progress)
    forms = _forms(files)
    names = forms.get(wanted.form.upper(), [])
    if not names:
        there = ", ".join(forms) or "none"
        raise ExportError(f"{wanted} has no GGUF file of the form {wanted.form} on the hub; its forms are {there}")
    first = names[0]
    several = [name for name in names if re.sub(r"-\d{5}-of-", "-of-", name) != re.sub(r"-\d{5}-of-", "-of-", first)]
    if several:
        raise ExportError(f"{wanted} has several GGUF files of the form {wanted.form}: {first}, {several[0]}")
    with _named(wanted), _reported(wanted):
        _check_beginning(files[first], check)
        remember(files[first], wanted.revision)
        paths = [fetch(files[name], progress) if files[name].sha256 else _small(wanted, files[name]) for name in names]
    return paths[0]


def _check_beginning(file: HubFile, check: Callable[[Path], None]) -> None:
    """Checks the header of a GGUF file in a copy in which everything after its beginning is a hole."""
    with requested(file, 0, BEGINNING) as response, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.name).name
        with path.open("wb") as beginning:
            for part in response.iter_bytes(1 << 20):
                beginning.write(part)
                if beginning.tell() >= BEGINNING:
                    break
            beginning.truncate(max(file.size, beginning.tell()))
        check(path)


def _small(wanted: HubName, file: HubFile) -> Path:
    return _snapshot(wanted, file.commit, (file.name,), ignored=()) / file.name


def _cached_gguf(wanted: HubName, progress: Progress) -> Path:
    """The same without the hub, where the cache has all of it."""
    snapshot = _snapshot(wanted, wanted.revision, ("*.gguf",), ignored=())
    names = {str(path.relative_to(snapshot)): path for path in sorted(snapshot.rglob("*.gguf"))}
    found = [name for name in names if (match := _FORM.search(name)) and match["form"].upper() == wanted.form.upper()]  # type: ignore[union-attr]
    if not found:
        raise ExportError(f"{wanted}: the hub cannot be reached, and the cache in {cache()} has no such file")
    for name in found:
        check_hash(names[name], progress)
    return names[found[0]]


def _listed(wanted: HubName) -> dict[str, HubFile] | None:
    """The files of the model by their names, or None where the hub cannot be reached."""
    from huggingface_hub import HfApi  # noqa: PLC0415, slow to load and rarely needed

    with _reported(wanted, unreachable=True):
        info = HfApi().model_info(wanted.repository, revision=wanted.revision, files_metadata=True)
        return {
            file.rfilename: HubFile(
                wanted.repository,
                info.sha or "main",
                file.rfilename,
                file.size or 0,
                file.lfs.sha256 if file.lfs else None,
            )
            for file in info.siblings or []
        }
    return None


def _snapshot(
    wanted: HubName, revision: str | None, patterns: tuple[str, ...], ignored: tuple[str, ...] = UNWANTED
) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with _reported(wanted):
        return Path(
            snapshot_download(
                wanted.repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored)
            )
        )


@contextmanager
def _named(wanted: HubName) -> Iterator[None]:
    """Puts the model's name before errors that do not have it."""
    try:
        yield
    except ExportError as error:
        if str(wanted) in str(error):
            raise
        raise ExportError(f"{wanted}: {error}") from error


@contextmanager
def _reported(wanted: HubName, *, unreachable: bool = False) -> Iterator[None]:
    """Raises ExportError for errors of the client; with `unreachable` none if the hub cannot be reached."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    try:
        yield
    except ExportError:
        raise
    except errors.GatedRepoError:
        reason = "its owner asks for consent first: give it there, and set HF_TOKEN to your token"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {wanted.revision}"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it is private and HF_TOKEN is not set to a token that may read it"
    except errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the cache has no complete copy"
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined] # the client's own base
        if unreachable and not isinstance(error, errors.HfHubHTTPError):
            return
        reason = first_line(error)
    else:
        return
    raise ExportError(f"{wanted} is no file or directory, nor a model of {constants.ENDPOINT}: {reason}")
