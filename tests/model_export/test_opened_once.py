"""An export opens each file of its source once: for its header, and for its weights that stay mapped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from tests.model_export import tiny
from tests.support.patience import PATIENCE

# Exports a source and prints how often each of its files was opened. An audit hook sees the files that Python opens,
# but not those that Rust opens: the two functions that do, for shards and tokenizers, are replaced by ones that count.
COUNTED = """
import collections, json, os, sys, types
import safetensors, tokenizers

source, folder, target = sys.argv[1:]
opened = collections.Counter()

def count(path):
    path = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if path.startswith(os.path.realpath(folder)):
        opened[os.path.basename(path)] += 1

def counted(function):
    def call(path, *arguments):
        count(path)
        return function(path, *arguments)
    return call

safetensors.safe_open = counted(safetensors.safe_open)
sys.addaudithook(lambda event, arguments: count(arguments[0]) if event == "open" else None)

from model_export.__main__ import main
from model_export.sources.hugging_face import read

read.Tokenizer = types.SimpleNamespace(from_file=counted(tokenizers.Tokenizer.from_file))
code = main([source, target, "--max-kl", "0.05"])
print(json.dumps([code, opened]))
"""


def directory(folder: Path) -> Path:
    """A Hugging Face directory with two shards."""
    source = tiny.hugging_face(folder / "Tiny")
    (source / "generation_config.json").write_text('{"eos_token_id": [0]}')
    return source


def file(folder: Path) -> Path:
    """A GGUF file."""
    return tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q8_0)


def parts(folder: Path) -> Path:
    """A GGUF model in three files."""
    tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q8_0, split_max_tensors=8)
    return folder / "Tiny-00001-of-00003.gguf"


SOURCES: dict[Callable[[Path], Path], set[str]] = {
    directory: {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-0.safetensors",
        "model-1.safetensors",
        "tokenizer.json",
    },
    file: {"Tiny.gguf"},
    parts: {f"Tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)},
}


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_each_file_is_opened_once(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """An export, including its comparison with the source, opens each file of the source once."""
    (tmp_path / "source").mkdir()
    source = make(tmp_path / "source")
    run = subprocess.run(
        [sys.executable, "-c", COUNTED, str(source), str(tmp_path / "source"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    code, opened = json.loads(run.stdout.splitlines()[-1])
    assert code == 0, run.stderr
    assert opened == dict.fromkeys(SOURCES[make], 1)
