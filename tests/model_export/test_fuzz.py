"""Headers, configurations and tokenizers that a fuzzer makes: each is read or refused in a sentence, soon and small."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.errors import ExportError
from model_export.native.source import DecoderSource
from model_export.opening import read_source
from model_export.sources.gguf import config as gguf_config
from model_export.sources.gguf import keys as gguf_keys
from model_export.sources.hugging_face.config import Config, Rotation
from tests.model_export import tiny
from tests.model_export.bad_sources import single
from tests.model_export.gguf_files import Gguf, Info, array, value, whole

# How many sources are made at a time.
BATCH = 40
# What reading one source may take at most: seconds of processor time, and bytes beyond what the process has.
LONGEST, LARGEST = float(os.environ.get("FUZZ_LONGEST", "20")), 512 << 20

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 5, 16, 31, 32, 64, 127, 192, 255, 260, 2**16, 2**31, 2**32 - 1, 2**63, 10**30, -1]),
    st.integers(-10, 300),
)
REALS = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1e-5, 1.0, 4.0, 1e4]))
NAMES = st.one_of(
    st.sampled_from(
        [
            *(
                "llama",
                "qwen2",
                "qwen3",
                "phi3",
                "smollm3",
                "seed_oss",
                "mistral",
                "gemma2",
                "gpt2",
                "mamba",
                "mixtral",
            ),
            *("default", "gpt-2", "llama-bpe", "smollm", "deepseek-llm", "linear", "yarn", "longrope", "dynamic", "su"),
            *("silu", "gelu", "float16", "full_attention", "sliding_attention", "x", "", "▁", "<0x0A>", "</s>"),
        ]
    ),
    st.text(max_size=6),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, REALS, NAMES)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
FIELDS = [
    *Config.model_fields,
    "quantization_config",
    "quantization",
    "auto_map",
    "attn_implementation",
    "vision_config",
]


class Fuzzer:
    """Reads made sources one after the other, and keeps the figures of all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = self.read = 0
        self.slowest = self.largest = 0.0

    def check(self, source: Path) -> None:
        """Reads a source with all its weights. Nothing but ExportError is raised, with one printable sentence."""
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refusal = self._refusal(source)
        assert refusal == "" or source.name in refusal, refusal
        assert "\n" not in refusal
        self.read += refusal == ""
        self.count += 1
        took = time.process_time() - began
        self.slowest = max(self.slowest, took)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        self.largest = max(self.largest, grown)
        assert took < LONGEST
        assert grown < LARGEST

    def _refusal(self, source: Path) -> str:
        try:
            made = read_source(source)
            if isinstance(made, DecoderSource):
                for name in made.checkpoint.tensors:
                    made.checkpoint.floats(name)
        except ExportError as error:
            return str(error)
        return ""


def header_changes() -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Changes of a GGUF file's keys and of its tensors' descriptions."""
    prefixed = [
        f"{family}.{name}" for family in ("llama", "qwen2") for name in (*gguf_keys.NUMBERS, *gguf_config.SUPPORTED)
    ]
    tokenizer = ["scores", "token_type", "merges", "tokens"]
    keys = [*gguf_keys.KEYS, *gguf_keys.IDS, *prefixed, *(f"tokenizer.ggml.{name}" for name in tokenizer)]
    numbers = {Value.UINT8: 8, Value.UINT32: 32, Value.UINT64: 64, Value.INT8: -8, Value.INT32: -32}
    scalar = st.one_of(
        *(st.builds(value, st.just(kind), _within(bits)) for kind, bits in numbers.items()),
        st.builds(value, st.sampled_from([Value.FLOAT32, Value.FLOAT64]), REALS),
        st.builds(value, st.just(Value.BOOL), st.booleans()),
        st.builds(value, st.just(Value.STRING), NAMES.filter(_encodable)),
    )
    arrays = st.one_of(
        st.builds(array, st.just(Value.STRING), st.lists(NAMES.filter(_encodable), max_size=5)),
        st.builds(array, st.just(Value.INT32), st.lists(_within(-32), max_size=5)),
        st.builds(lambda count, kind: array(Value.INT32, [kind] * count), st.just(tiny.VOCAB), st.integers(-1, 7)),
        st.builds(lambda count, score: array(Value.FLOAT32, [score] * count), st.just(tiny.VOCAB), REALS),
        st.builds(
            lambda tokens: array(Value.STRING, [*tiny.TOKENS[: -len(tokens) or None], *tokens]),
            st.lists(NAMES.filter(_encodable), max_size=4, unique=True),
        ),
        st.builds(array, st.just(Value.UINT8), st.just([1]), st.integers(0, 2**64 - 1)),
    )
    key = st.tuples(st.just("key"), st.sampled_from(keys), st.one_of(scalar, arrays, st.none()))
    tensor = st.tuples(
        st.just("tensor"),
        st.integers(0, 30),
        st.sampled_from(["name", "shape", "kind", "offset", "dimensions"]),
        st.one_of(NUMBERS.filter(lambda number: 0 <= number < 2**32), st.lists(_within(64), max_size=5)),
    )
    return st.lists(st.one_of(key, key, key, tensor), min_size=1, max_size=4)


def _within(bits: int) -> st.SearchStrategy[int]:
    low, high = (0, 2**bits - 1) if bits > 0 else (-(2 ** (-bits - 1)), 2 ** (-bits - 1) - 1)
    return NUMBERS.filter(lambda number: low <= number <= high)


def _encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def headers(fuzzer: Fuzzer) -> Callable[[Any], None]:
    good = whole()

    def check(changes: list[tuple[Any, ...]]) -> None:
        made = Gguf(keys=list(good.keys), tensors=[replace(tensor) for tensor in good.tensors], data=good.data)
        for what, *details in changes:
            if what == "key":
                name, content = details
                made.drop(name) if content is None else made.set(name, content)
            else:
                at, attribute, content = details
                _change(made.tensors[at % len(made.tensors)], attribute, content)
        path = fuzzer.folder / "Tiny.gguf"
        path.write_bytes(made.encode())
        fuzzer.check(path)

    return check


def _change(tensor: Info, attribute: str, content: Any) -> None:
    if attribute == "name":
        tensor.name = str(content)
    elif attribute == "shape":
        tensor.shape = content if isinstance(content, list) else [content]
    elif not isinstance(content, list):
        setattr(tensor, attribute, content)


def configurations(fuzzer: Fuzzer) -> Callable[[Any], None]:
    source = single({})(fuzzer.folder / "Tiny")
    good = json.loads((source / "config.json").read_text())

    def check(changes: tuple[str, dict[str, Any], dict[str, Any], dict[str, Any] | None]) -> None:
        family, entries, rotation, generation = changes
        config = {**good, "model_type": family, **entries}
        if rotation:
            config["rope_scaling"] = rotation
        (source / "config.json").write_text(json.dumps(config))
        (source / "generation_config.json").unlink(missing_ok=True)
        (source / "tokenizer_config.json").unlink(missing_ok=True)
        if generation is not None:
            (source / "generation_config.json").write_text(json.dumps(generation))
            (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": generation.get("eos_token_id")}))
        fuzzer.check(source)

    return check


def configuration_changes() -> st.SearchStrategy[Any]:
    rotation = st.dictionaries(st.sampled_from([*Rotation.model_fields, "full_attention"]), JSON, max_size=4)
    kinds = st.builds(
        lambda kind, rest: {**rest, "rope_type": kind},
        st.sampled_from(["linear", "llama3", "yarn", "longrope"]),
        rotation,
    )
    return st.tuples(
        st.sampled_from(list(tiny.FAMILIES)),
        st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
        st.one_of(st.just({}), rotation, kinds),
        st.one_of(st.none(), st.dictionaries(st.sampled_from(["eos_token_id", "bos_token_id"]), JSON)),
    )


def tokenizers(fuzzer: Fuzzer) -> Callable[[Any], None]:
    source = single({})(fuzzer.folder / "Tiny")
    path = source / "tokenizer.json"
    good = path.read_text()

    def check(changes: list[tuple[str, Any]]) -> None:
        made = json.loads(good)
        for place, content in changes:
            *folders, last = place.split("/")
            inside = made
            for folder in folders:
                inside = inside.get(folder) if isinstance(inside, dict) else None
            if isinstance(inside, dict):
                inside[last] = content
        path.write_text(json.dumps(made))
        fuzzer.check(source)

    return check


def tokenizer_changes() -> st.SearchStrategy[Any]:
    step = st.one_of(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["ByteLevel", "ByteFallback", "Fuse", "WordPiece", "CTC", "x"])}
        ),
        st.just({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        st.builds(
            lambda mark, scheme: {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": True},
            st.characters(),
            st.sampled_from(["always", "never", "first", "x"]),
        ),
        st.builds(
            lambda text, new, kind: {"type": "Replace", "pattern": {kind: text}, "content": new},
            st.sampled_from(["▁", "", "a", "(", "(a+)+$", "\\A.\\z", " "]),
            NAMES,
            st.sampled_from(["String", "Regex"]),
        ),
        st.builds(
            lambda mark, start, stop: {"type": "Strip", "content": mark, "start": start, "stop": stop},
            st.characters(),
            st.integers(0, 3),
            st.integers(0, 1),
        ),
        JSON,
    )
    steps = st.one_of(
        step,
        st.builds(
            lambda parts: {"type": "Sequence", "decoders": parts, "pretokenizers": parts, "normalizers": parts},
            st.lists(step, max_size=4),
        ),
    )
    added = st.fixed_dictionaries(
        {
            "id": st.one_of(st.integers(0, tiny.VOCAB + 2), NUMBERS),
            "content": NAMES,
            **{name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized", "special")},
        }
    )
    vocabulary = st.dictionaries(NAMES, st.integers(0, tiny.VOCAB + 2), max_size=6)
    return st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["decoder", "pre_tokenizer", "normalizer", "post_processor"]), steps),
            st.tuples(st.just("added_tokens"), st.lists(added, max_size=3)),
            st.tuples(st.just("model/vocab"), vocabulary),
            st.tuples(st.just("model/merges"), st.lists(st.lists(NAMES, min_size=2, max_size=2), max_size=3)),
            st.tuples(
                st.sampled_from(
                    [
                        "model/unk_token",
                        "model/byte_fallback",
                        "model/type",
                        "truncation",
                        "padding",
                        "version",
                        "model",
                    ]
                ),
                JSON,
            ),
        ),
        min_size=1,
        max_size=4,
    )


PARTS: dict[str, tuple[Callable[[Fuzzer], Callable[[Any], None]], Callable[[], st.SearchStrategy[Any]]]] = {
    "headers": (headers, header_changes),
    "configurations": (configurations, configuration_changes),
    "tokenizers": (tokenizers, tokenizer_changes),
}


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", PARTS)
def test_made_sources(part: str, count: int, tmp_path: Path) -> None:
    """No made source ends in a traceback, takes long or takes more memory than the bound."""
    make, changes = PARTS[part]
    fuzzer = Fuzzer(tmp_path)
    check = make(fuzzer)

    @settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(change=changes())
    def run(change: Any) -> None:
        check(change)

    while fuzzer.count < count:
        run()
    largest = fuzzer.largest / 2**20
    print(f"{part}: {fuzzer.count} sources, {fuzzer.read} read, {fuzzer.slowest:.1f} s, {largest:.0f} MiB")
    assert 0 < fuzzer.read < fuzzer.count
