"""The chat template and the end token of a source: stored as they are, and never run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.sources.gguf.header import read_header
from model_export.sources.gguf.tokenizer import vocabulary_from_metadata
from model_export.sources.hugging_face.config import TokenIds
from model_export.sources.hugging_face.read import vocabulary_from_directory
from model_export.sources.vocabulary import Vocabulary
from service import manifest
from tests.model_export import tiny

TEMPLATE = "{% for message in messages %}{{ message['content'] }}é\r\n{% endfor %}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face directory without a chat template."""
    return tiny.hugging_face(tmp_path / "Tiny")


def read(source: Path, **settings: object) -> Vocabulary:
    """The vocabulary of a directory with these entries in its tokenizer_config.json."""
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocabulary_from_directory(source, TokenIds(eos_token_id=[5, 6]), TokenIds())


def test_where_the_template_is(source: Path) -> None:
    """In a file of its own, or else in the tokenizer's configuration: one, or several of which one is the default."""
    several = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": TEMPLATE}]
    assert read(source).chat_template is None
    assert read(source, chat_template=TEMPLATE).chat_template == TEMPLATE
    assert read(source, chat_template=several).chat_template == TEMPLATE
    assert read(source, chat_template=several[:1]).chat_template is None
    (source / "chat_template.jinja").write_bytes(b"in a file\r\n")
    assert read(source, chat_template=TEMPLATE).chat_template == "in a file\r\n"


def test_which_end_token_is_the_sources_own(source: Path) -> None:
    """That of the tokenizer's configuration, or else the first of the model's."""
    assert read(source).eos == 5
    assert read(source, eos_token="the").eos == tiny.TOKENS.index("the")
    assert read(source, eos_token={"content": "th", "lstrip": False}).eos == tiny.TOKENS.index("th")
    assert read(source, eos_token="not in the vocabulary").eos == 5


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"chat_template": "x" * (1 << 20) + "y"}, "chat_template has 1048577 bytes, expected at most 1048576"),
        ({"chat_template": "a\ud800"}, "character 1 is half of a surrogate pair"),
        ({"chat_template": 5}, "chat_template"),
        ({"chat_template": [{"name": "default"}]}, "template"),
        ({"eos_token": 5}, "eos_token is 5, expected a text"),
    ],
)
def test_refused(source: Path, settings: dict[str, object], problem: str) -> None:
    """A template that is too large or no text, and an end token without a name."""
    with pytest.raises(ExportError, match=problem):
        read(source, **settings)


def test_refused_files(source: Path) -> None:
    """So is a file of its own."""
    path = source / "chat_template.jinja"
    path.write_bytes(b"a\xff")
    with pytest.raises(ExportError, match=r"chat_template\.jinja is not UTF-8: invalid start byte at byte 1"):
        read(source)
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ExportError, match="has 1048577 bytes, expected at most 1048576"):
        read(source)


def test_template_of_a_gguf_file(tmp_path: Path) -> None:
    """It has a key of its own."""
    writer = GGUFWriter(tmp_path / "pieces.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "</s>", "a"])
    writer.add_token_scores([0.0] * 3)
    writer.add_token_types([2, 3, 1])
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary = vocabulary_from_metadata(read_header(tmp_path / "pieces.gguf").metadata)
    assert (vocabulary.chat_template, vocabulary.eos) == (TEMPLATE, 1)


def test_exported_template(source: Path, tmp_path: Path) -> None:
    """The model directory has it byte by byte, and the manifest lists it."""
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    options = Options(quantization="float32", max_kl=0.05)
    written = export(source, tmp_path / "model", options, lambda label, total: lambda: None)
    path = tmp_path / "model" / manifest.CHAT_TEMPLATE_FILE
    assert path.read_bytes() == TEMPLATE.encode()
    assert written.files[path.name].bytes == len(TEMPLATE.encode())
    assert manifest.load(tmp_path / "model").special_tokens.eos == 0
