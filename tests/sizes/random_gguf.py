"""Writes GGUF files of the shapes of published models, with random weights: python -m tests.sizes.random_gguf.

A file has the true sizes of every tensor, of the vocabulary and of the context, so that speed and memory are those of
the model; what it says means nothing. The same shape and form always give the same file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

SEED = 7
DEVIATION = 0.02  # of the weights of matrices, around zero
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # the most frequent in English first
SPACE = "Ġ"

# Each form of matrices, and the standard deviation of the integers in its blocks when all their bits are random.
FORMS = {
    "Q4_0": (GGMLQuantizationType.Q4_0, math.sqrt((2**8 - 1) / 12)),
    "Q8_0": (GGMLQuantizationType.Q8_0, math.sqrt((2**16 - 1) / 12)),
}


@dataclass(frozen=True)
class Family:
    """What the models of a family share. With `biases`, queries, keys and values have them."""

    architecture: str
    pre_tokenizer: str
    bos: str
    eos: str
    biases: bool
    norm_epsilon: float


LLAMA = Family("llama", "llama-bpe", "<|begin_of_text|>", "<|end_of_text|>", biases=False, norm_epsilon=1e-5)
QWEN = Family("qwen2", "qwen2", "<|endoftext|>", "<|im_end|>", biases=True, norm_epsilon=1e-6)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. Every head has `hidden` / `heads` numbers."""

    family: Family
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_base: float
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and the shape of each tensor, in the order of the file."""
        hidden, kv = self.hidden, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            yield prefix + "attn_norm.weight", (hidden,)
            for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
                yield f"{prefix}attn_{part}.weight", (rows, hidden)
                if self.family.biases:
                    yield f"{prefix}attn_{part}.bias", (rows,)
            yield prefix + "attn_output.weight", (hidden, hidden)
            yield prefix + "ffn_norm.weight", (hidden,)
            yield prefix + "ffn_gate.weight", (self.feed_forward, hidden)
            yield prefix + "ffn_up.weight", (self.feed_forward, hidden)
            yield prefix + "ffn_down.weight", (hidden, self.feed_forward)
        yield "output_norm.weight", (hidden,)
        if not self.tied:
            yield "output.weight", (self.vocabulary, hidden)


SHAPES = {
    "qwen2.5-0.5b": Shape(
        QWEN,
        layers=24,
        hidden=896,
        feed_forward=4864,
        heads=14,
        kv_heads=2,
        vocabulary=151_936,
        context=32_768,
        rope_base=1e6,
        tied=True,
    ),
    "llama-3.2-1b": Shape(
        LLAMA,
        layers=16,
        hidden=2048,
        feed_forward=8192,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        context=131_072,
        rope_base=5e5,
        tied=True,
    ),
    "llama-3.1-8b": Shape(
        LLAMA,
        layers=32,
        hidden=4096,
        feed_forward=14_336,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        context=131_072,
        rope_base=5e5,
        tied=False,
    ),
}


def write(shape: Shape, form: str, path: Path) -> None:
    """Writes a model of `shape`, its matrices in `form`, to `path`. Holds one tensor in memory at a time."""
    kind, code_deviation = FORMS[form]
    writer = GGUFWriter(path, shape.family.architecture)
    _add_keys(writer, shape)
    tensors = list(shape.tensors())
    for name, sides in tensors:
        if len(sides) == 1:
            writer.add_tensor_info(name, sides, np.dtype(np.float32), 4 * sides[0])
        else:
            stored = (sides[0], row_bytes(sides[1], kind))
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(SEED))
    for name, sides in tensors:
        if len(sides) == 2:
            writer.write_tensor_data(_blocks(rng, sides, kind, code_deviation))
        else:
            values = rng.normal(float("norm" in name), DEVIATION, sides)
            writer.write_tensor_data(values.astype(np.float32))
    writer.close()


def row_bytes(columns: int, kind: GGMLQuantizationType) -> int:
    """The bytes of a row of `columns` weights, which must be a multiple of a block's."""
    weights, size = GGML_QUANT_SIZES[kind]
    assert columns % weights == 0
    return columns // weights * size


def _blocks(
    rng: np.random.Generator, sides: tuple[int, ...], kind: GGMLQuantizationType, code_deviation: float
) -> NDArray[np.uint8]:
    """A matrix of random blocks as bytes [rows, row_bytes]: in each block a float16 scale, then random codes.

    Scales have either sign, because codes are not symmetric around zero and their mean would add up over the columns.
    """
    sizes = DEVIATION / code_deviation * np.linspace(0.5, 1.5, 128)
    scales = np.concatenate([sizes, -sizes]).astype("<f2")
    data = rng.integers(0, 256, (sides[0], row_bytes(sides[1], kind)), np.uint8)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    blocks[:, :2] = scales[blocks[:, 0]].view(np.uint8).reshape(-1, 2)
    return data


def _add_keys(writer: GGUFWriter, shape: Shape) -> None:
    family = shape.family
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(family.norm_epsilon)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    special = [family.bos, family.eos]
    tokens, merges = vocabulary(shape.vocabulary - len(special))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(family.pre_tokenizer)
    writer.add_token_list(tokens + special)
    writer.add_token_types([TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(special))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 1)


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level vocabulary of `size` tokens, and the merge that makes each token but the 256 bytes.

    Merges make two letters, then the beginnings of words of one to three letters, then four letters, in each case those
    of frequent letters first. English text becomes about three characters per token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(), size - len(alphabet)))
    tokens = alphabet + [first + second for first, second in merges]
    assert len(tokens) == size
    return tokens, merges


def _merges() -> Iterator[tuple[str, str]]:
    pairs = _frequent_first(LETTERS, LETTERS)
    twos = [first + second for first, second in pairs]
    yield from pairs
    yield from product([SPACE], twos)
    yield from product([SPACE], LETTERS)
    yield from _frequent_first([SPACE + two for two in twos], LETTERS)
    yield from _frequent_first(twos, twos)


def _frequent_first(firsts: Sequence[str], seconds: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of one of `firsts` and one of `seconds`, both in the order of how frequent they are."""
    ranked = product(enumerate(firsts), enumerate(seconds))
    ordered = sorted(ranked, key=lambda pair: pair[0][0] + pair[1][0])
    return [(first, second) for (_, first), (_, second) in ordered]


def main() -> None:
    """Writes the file that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.sizes.random_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    write(SHAPES[options.shape], options.form, options.path)


if __name__ == "__main__":
    main()
