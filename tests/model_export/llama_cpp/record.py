"""Records what llama.cpp does with the vocabularies of this folder, in recorded.json.

Needs llama.cpp as a library: `python -m venv V && V/bin/pip install cyllama gguf==0.19.0 tokenizers pydantic`. Then, in
the root of the repository: `V/bin/python -m tests.model_export.llama_cpp.record`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.model_export.llama_cpp.vocabularies import DECODED, ENDS, TEXTS, Vocabulary, byte_level

RECORDED = Path(__file__).with_name("recorded.json")
# What each piece of text is tokenized as, with and without control tokens.
MIXED = ["a</s>b", "abs>", " a  b", "<|im_end|>a", "    a\n\nb", "é日本ção", "the<end_of_turn>"]


def loaded(path: str) -> Any:
    """llama.cpp's vocabulary of a file."""
    from cyllama.llama import llama_cpp

    model = llama_cpp.LlamaModel(path, llama_cpp.LlamaModelParams())
    return model, model.get_vocab() if hasattr(model, "get_vocab") else model.vocab


def described(path: str, texts: list[str]) -> dict[str, Any]:
    model, vocabulary = loaded(path)
    count = vocabulary.n_vocab
    found = {
        "ends": [index for index in range(count) if vocabulary.is_eog(index)],
        "begins": vocabulary.get_add_bos(),
        "pieces": [vocabulary.token_to_piece(index, 0, True) for index in range(count)],
        "plain": {text: list(vocabulary.tokenize(text, False, False)) for text in texts},
        "read": {text: list(vocabulary.tokenize(text, False, True)) for text in texts},
    }
    del model
    return found


def ask(vocabulary: Vocabulary, texts: list[str]) -> dict[str, Any] | None:
    """llama.cpp's answers in a process of its own, or None if it refuses the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = vocabulary.write(Path(folder) / "v.gguf")
        arguments = [sys.executable, "-m", __spec__.name, str(path), json.dumps(texts)]
        ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    answer = ran.stdout.rpartition("ANSWER")[2]
    return json.loads(answer) if ran.returncode == 0 else None


def record(names: list[str]) -> dict[str, Any]:
    """All answers; the texts' ids are given once for names that cut texts alike."""
    ways: list[dict[str, Any]] = []
    by_name: dict[str, int | None] = {}
    for name in names:
        answer = ask(byte_level(pre=name), TEXTS)
        way = answer and {"begins": answer["begins"], "ids": list(answer["plain"].values())}
        if way is not None and way not in ways:
            ways.append(way)
        by_name[name] = None if way is None else ways.index(way)
    return {
        "llama.cpp": "b9190, as in cyllama " + version("cyllama"),
        "ends": {name: ask(vocabulary, [])["ends"] for name, vocabulary in ENDS.items()},
        "decoded": {name: ask(vocabulary, MIXED) for name, vocabulary in DECODED.items()},
        "names": by_name,
        "ways": ways,
    }


def table(value: Any, depth: int = 0) -> str:
    """JSON with one row per line: objects down to the third level, and the ways to cut texts."""
    if isinstance(value, dict) and depth < 3:
        rows = [f"{json.dumps(name, ensure_ascii=False)}: {table(each, depth + 1)}" for name, each in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        rows = [table(each, depth + 1) for each in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(value, ensure_ascii=False)
    indent = " " * (depth + 1)
    return f"{opening}\n{indent}" + f",\n{indent}".join(rows) + f"\n{indent[1:]}{closing}"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print("ANSWER" + json.dumps(described(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        from model_export.sources.gguf.pre_tokenizers import PRE_TOKENIZERS

        RECORDED.write_text(table(record([*PRE_TOKENIZERS])) + "\n", encoding="utf-8")
