"""Downloads sources that are named by their name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from model_export.errors import ExportError
from model_export.sources import families
from model_export.sources.files import read_json
from model_export.sources.panics import first_line, quiet
from service.manifest import CHAT_TEMPLATE_FILE

CONFIG = "config.json"
# The files that are downloaded: no code, and no pickles, which run code when they are opened.
WANTED = (
    CONFIG,
    CHAT_TEMPLATE_FILE,
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
)
# Other forms of the same weights, in folders or under this name.
UNWANTED = ("*/*", "consolidated*")

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<owner>{_PART})/(?P<name>{_PART})(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?")


class HubName(NamedTuple):
    """A model's name on the hub: `owner/name`, in the `revision` or else the newest."""

    owner: str
    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.owner}/{self.name}" + (f"@{self.revision}" if self.revision else "")


def hub_name(source: str) -> HubName | None:
    """`source` as `owner/name` or `owner/name@revision`, or None where it is neither."""
    match = _NAME.fullmatch(source)
    return HubName(match["owner"], match["name"], match["revision"]) if match else None


def download(wanted: HubName) -> Path:
    """The directory of the model in the client's cache; what the cache does not have is downloaded.

    The configuration is downloaded first, and the weights only if the family is supported. Raises ExportError where the
    family is not supported, the hub cannot be reached, does not have the model, or does not give it to this user.
    """
    with quiet():
        snapshot = _snapshot(wanted, wanted.revision, (CONFIG,))
    if not (snapshot / CONFIG).exists():
        raise ExportError(f"{wanted} has no {CONFIG} on the hub, so it is no model that can be exported by its name")
    config = read_json(snapshot, CONFIG)
    if (family := config.get("model_type")) not in (*families.NATIVE, *families.MOBIUS):
        raise ExportError(f"{wanted}: {families.refusal(family, config)}")
    return _snapshot(wanted, snapshot.name, WANTED)  # the folder's name is the commit, the same for all files


def _snapshot(wanted: HubName, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # noqa: PLC0415, slow to load and rarely needed

    try:
        snapshot = snapshot_download(
            f"{wanted.owner}/{wanted.name}",
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(UNWANTED),
        )
    except errors.GatedRepoError:
        reason = "its owner asks for consent first: give it there, and set HF_TOKEN to your token"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {wanted.revision}"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it is private and HF_TOKEN is not set to a token that may read it"
    except errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the cache has no complete copy"
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined] # the client's own base
        reason = first_line(error)
    else:
        return Path(snapshot)
    raise ExportError(f"{wanted} is no file or directory, nor a model of {constants.ENDPOINT}: {reason}")
