"""What can be exported, by family and by form, as text: for --help and docs/models.md."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from model_export.graph.precision import FORMS
from model_export.sources.families import FAMILIES, MLP, MOBIUS, MOBIUS_GGUF, Family
from model_export.sources.gguf.header import READABLE
from model_export.sources.gguf.pre_tokenizers import PRE_TOKENIZERS, TOLD_BY_TOKENS
from model_export.sources.gguf.read import BLOCK_TYPES
from model_export.sources.hugging_face.shards import FLOAT_TYPES
from model_export.sources.vocabulary import END_TOKENS
from service.text import decoding

WIDTH = 120
DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
_PART = re.compile(r"(<!-- generated: (?P<name>[a-z ]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def help_text() -> str:
    """The end of --help."""
    rows = [(family.name, _sources(family), family.title) for family in FAMILIES]
    rows += [
        (name, "GGUF too" if name in MOBIUS_GGUF else "", f"{title} (extra `families`)")
        for name, title in MOBIUS.items()
    ]
    families = [f"  {name:12} {sources:9} {title}" for name, sources, title in rows]
    forms = [f"  {form:12} {weights.replace('`', '')}" for form, (weights, _) in FORMS.items()]
    kept, read = _types()
    return "\n".join(
        [
            "families, by model_type in config.json:",
            *families,
            "",
            "forms of --quantization:",
            *(line for form in forms for line in _wrapped(form, " " * 15)),
            "",
            *_wrapped(f"GGUF types that are kept exactly: {kept}; that are dequantized: {read}", "  "),
            *_wrapped(f"tokenizer.ggml.pre of GGUF files: {', '.join(PRE_TOKENIZERS)}", "  "),
            "docs/models.md says more.",
        ]
    )


def refreshed(text: str) -> str:
    """The document `text` with its generated parts made again."""
    parts = {
        "families": _families(),
        "further families": _further_families(),
        "forms": _forms(),
        "types": _types_text(),
        "tokenizers": _tokenizers(),
    }
    return _PART.sub(lambda match: f"{match[1]}\n{parts[match['name']]}\n\n{match[3]}", text)


def _sources(family: Family) -> str:
    """The sources of a family besides its directories."""
    return "" if family.gguf is None else "GGUF too" if family.directories else "GGUF only"


def _families() -> str:
    rows = [
        (f.title, _code(f.name) if f.directories else "", _code(f.gguf), "; ".join(_properties(f))) for f in FAMILIES
    ]
    return _table(("family", "`model_type`", "GGUF", "special properties"), rows)


def _properties(family: Family) -> Iterable[str]:
    """What the layers of a family have that Llama's first models had not."""
    maps = {name for biases in family.biases for name in biases.maps}
    if maps:
        in_attention = "queries, keys and values" if maps.isdisjoint(["attn_output"]) else "attention"
        yield f"biases of {in_attention}{' and MLP' if maps & set(MLP) else ''}"
    if family.qk_norm:
        yield "norms of queries and keys"
    if family.windows is not None:
        every = family.windows.layers == "all" and not family.windows.reads_layer_types
        yield "sliding window" if every else "sliding window, in some or all layers"
    if family.full_every:
        yield "sliding window in all but some layers, which rotate by a base of their own"
    if family.gelu:
        yield "GELU"
    if family.post_norms:
        yield "norms before and after each part"
    if family.unrotated_every:
        yield "layers without rotary embedding"
    if family.fused:
        yield "fused matrices"
    if family.partial_rotation:
        yield "rotary embedding on a part of each head"


def _further_families() -> str:
    rows = [(title, _code(name), _code(name) if name in MOBIUS_GGUF else "") for name, title in MOBIUS.items()]
    return _table(("family", "`model_type`", "GGUF"), rows)


def _forms() -> str:
    rows = [(_code(form), weights, exact) for form, (weights, exact) in FORMS.items()]
    return _table(("`--quantization`", "weights", "exact for"), rows)


def _types() -> tuple[str, str]:
    read = sorted((kind for kind in READABLE if kind not in BLOCK_TYPES), key=int)
    return ", ".join(kind.name for kind in BLOCK_TYPES), ", ".join(kind.name for kind in read)


def _types_text() -> str:
    kept, read = _types()
    safetensors = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    floats = ", ".join(safetensors[kind] for kind in FLOAT_TYPES)
    return _paragraph(
        f"Safetensors are read in {floats}. Of GGUF's types, the blocks of {kept} are kept as they are. All others that"
        f" can be read are dequantized, then quantized to the form that `--quantization` asks for: {read}."
    )


def _tokenizers() -> str:
    names = ", ".join(f"`{name}`" for name in PRE_TOKENIZERS)
    told = ", ".join(f"`{name}`" for name in TOLD_BY_TOKENS)
    ends = ", ".join(f"`{name}`" for name in END_TOKENS)
    return "\n\n".join(
        _paragraph(text)
        for text in (
            f"`tokenizer.ggml.pre` of byte-level GGUF files may be {names}. Where the key is missing, the file is "
            f"refused, unless its tokens tell that it is one of {told}.",
            f"Tokens with these names end a completion of a GGUF file: {ends}.",
            f"A decoder in `tokenizer.json` may consist of {', '.join(decoding.SUPPORTED)}.",
        )
    )


def _code(name: str | None) -> str:
    return f"`{name}`" if name else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |")


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)


def write() -> None:
    """Makes the generated parts of docs/models.md again."""
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
