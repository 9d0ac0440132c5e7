"""The lists of what is supported, in the documents and on the command line."""

from __future__ import annotations

import pytest

from model_export.__main__ import main
from model_export.graph.precision import FORMS
from model_export.sources.families import MOBIUS, NATIVE
from model_export.sources.gguf.pre_tokenizers import PRE_TOKENIZERS
from model_export.supported import DOCUMENT, refreshed


def test_the_document_is_fresh() -> None:
    """docs/models.md has the lists that the code has; `make supported` makes them again."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert refreshed(text) == text
    assert all(f"| `{name}` |" in text for name in (*NATIVE, *MOBIUS, *FORMS))


def test_stale_lists_are_seen() -> None:
    """A family that is missing from the document would be noticed."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert refreshed(text.replace("| `qwen3` |", "| `qwen4` |")) == text


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help names every family, form and pre-tokenizer."""
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out.split()
    assert {*NATIVE, *MOBIUS, *FORMS} <= set(shown)
    assert set(PRE_TOKENIZERS) <= {word.rstrip(",") for word in shown}
