"""The chat template of a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Strict

from model_export.errors import ExportError
from model_export.sources import field_types
from model_export.sources.files import plain_file, read_json
from model_export.sources.hugging_face.config import Entries
from model_export.sources.vocabulary import check_chat_template
from service.manifest import CHAT_TEMPLATE_FILE, LARGEST_CHAT_TEMPLATE

FILE = "tokenizer_config.json"


class NamedTemplate(Entries):
    """One of several chat templates."""

    name: field_types.Text
    template: field_types.Text


class TokenizerConfig(Entries):
    """The chat template of tokenizer_config.json: one, or several with names."""

    chat_template: field_types.Text | Annotated[list[NamedTemplate], Strict()] | None = None


def chat_template(directory: Path) -> str | None:
    """A directory's chat template: that of its own file, or else of its configuration, of several the default one.

    Raises ExportError where it is too large or no text.
    """
    path = directory / CHAT_TEMPLATE_FILE
    if path.exists():
        plain_file(directory, path.name, LARGEST_CHAT_TEMPLATE)
        try:
            return path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExportError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    path = directory / FILE
    if not path.exists():
        return None
    template = field_types.parse(TokenizerConfig, str(path), read_json(directory, FILE)).chat_template
    if isinstance(template, list):
        template = {each.name: each.template for each in template}.get("default")
    return check_chat_template(f"{path}: chat_template", template)
