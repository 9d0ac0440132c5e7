"""Damaged, mislabelled and hostile sources end in one sentence, run nothing and leave nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Tensor
from gguf import GGUFValueType as Value

from model_export.__main__ import main
from model_export.export import read_source
from tests.model_export import tiny
from tests.model_export.bad_sources import (
    Gguf,
    Info,
    array,
    content,
    edited,
    gguf,
    header,
    hugging_face,
    key,
    only_pickle,
    poke,
    single,
    tensor,
    text,
    value,
    whole,
    written,
)
from tests.support.patience import PATIENCE

Maker = Callable[[Path], Path]
# An export of the tiny model takes a second or two; a refusal must not take longer on a busy machine.
MERGES, TOKENS, SCORES = "tokenizer.ggml.merges", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"
INDEX = "model.safetensors.index.json"


def double(model: Gguf) -> None:
    """The same tensor twice."""
    model.tensors.append(model.tensors[-1])


def overlap(model: Gguf) -> None:
    """Two tensors over the same bytes."""
    model.tensors[1].offset = model.tensors[0].offset


def add_tensor(name: str, shape: list[int], kind: int, raw: bytes) -> Callable[[Gguf], None]:
    """One more tensor."""

    def change(model: Gguf) -> None:
        model.tensors.append(Info(name, shape, kind, len(model.data)))
        model.data += raw

    return change


def tokens_with(index: int, token: str | bytes) -> bytes:
    """The token list with another token at `index`."""
    return array(Value.STRING, [*tiny.TOKENS[:index], token, *tiny.TOKENS[index + 1 :]])


def u32(number: int) -> bytes:
    return value(Value.UINT32, number)


def f32(number: float) -> bytes:
    return value(Value.FLOAT32, number)


HUGE = 1 << 60

# What claims to be far larger than it is: these are run where there is no memory for it.
LYING: dict[str, tuple[Maker, str]] = {
    "tensor count": (gguf(lambda m: setattr(m, "claimed_tensors", HUGE)), f"claims {HUGE} tensors"),
    "tensor count of what fits": (gguf(lambda m: setattr(m, "claimed_tensors", 1000)), "not a complete GGUF file"),
    "key count": (gguf(lambda m: setattr(m, "claimed_keys", 10**9)), "claims 1000000000 keys"),
    "key count of what fits": (gguf(lambda m: setattr(m, "claimed_keys", 1000)), "not a complete GGUF file"),
    "length of a key": (gguf(lambda m: m.keys.insert(0, (b"", text("a", 2**63)))), "not a complete GGUF file"),
    "length of a string": (
        key("general.organization", value(Value.STRING, "")[:4] + text("us", 2**63)),
        "general.organization takes 9223372036854775808 bytes",
    ),
    "length of an array of strings": (key(TOKENS, array(Value.STRING, ["a"], HUGE)), f"has {HUGE} elements"),
    "length of an array of bytes": (key(TOKENS, array(Value.UINT8, [1], HUGE)), f"has {HUGE} elements"),
    "array of bytes within the bound": (key(TOKENS, array(Value.UINT8, [1], 4_000_000)), "takes 4000000 bytes"),
    "shape that overflows": (tensor(shape=[2**32, 2**32]), "lies at bytes"),
    "shape of 2^60": (tensor(shape=[HUGE]), "lies at bytes"),
    "dimensions": (tensor(dimensions=2**32 - 1), "has 4294967295 dimensions, expected 1..4"),
    "tensor's name": (gguf(lambda m: m.tensors.insert(0, Info(b"x" * 5000, [1], 0, 0))), "has 5000 bytes"),
    "layers": (key("llama.block_count", u32(10**9)), "block_count is 1000000000, expected a whole number"),
    "head size": (key("llama.attention.key_length", u32(2**31)), "key_length is 2147483648, expected a whole"),
    "context": (key("llama.context_length", u32(2**32 - 1)), "context_length is 4294967295, expected a whole"),
    "config's layers": (hugging_face(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected a whole"),
    "config's head size": (hugging_face(head_dim=10**10), "head_dim is 10000000000, expected a whole"),
    "config's context": (hugging_face(max_position_embeddings=10**12), "max_position_embeddings is 1000000000000"),
    "config's rotations": (
        hugging_face(max_position_embeddings=1 << 22, head_dim=4096),
        "the context is 4194304 positions of a head of 4096 numbers, expected at most 131072 positions",
    ),
    "safetensors header": (header(lambda h: None, length=HUGE), "not a complete safetensors file"),
    "safetensors header within its bound": (header(lambda h: None, 90 << 20), "not a complete safetensors file"),
    "safetensors shape": (
        header(lambda h: h["model.embed_tokens.weight"].update(shape=[HUGE, 64])),
        "not a complete safetensors file",
    ),
}

GGUF: dict[str, tuple[Maker, str]] = {
    "empty": (content(b""), "it is empty"),
    "three bytes": (content(b"GGU"), "begins with b'GGU'"),
    "magic": (gguf(lambda m: setattr(m, "magic", b"GGUX")), "begins with b'GGUX', not b'GGUF'"),
    "magic alone": (content(b"GGUF"), "its version takes 4 bytes at byte 4, of which the file has 0"),
    "version": (gguf(lambda m: setattr(m, "version", b"\x63\0\0\0")), "its version is 99, expected 2 or 3"),
    "big-endian": (gguf(lambda m: setattr(m, "version", b"\0\0\0\x03")), "it is big-endian"),
    "unknown type of a key": (key("x", b"\x63\0\0\0"), "x is of the unknown type 99"),
    "array of arrays": (key("x", array(Value.ARRAY, [])), "array of arrays"),
    "key twice": (gguf(lambda m: m.keys.append(m.keys[0])), "'general.architecture' stands there twice"),
    "key that is not UTF-8": (gguf(lambda m: m.keys.append((b"\xff", u32(1)))), "a key is not UTF-8"),
    "string that is not UTF-8": (key("general.name", value(Value.STRING, b"\xff")), "general.name is not UTF-8"),
    "alignment 0": (key("general.alignment", u32(0)), "general.alignment is 0, expected a power of two"),
    "alignment 33": (key("general.alignment", u32(33)), "general.alignment is 33, expected a power of two"),
    "alignment as a text": (key("general.alignment", value(Value.STRING, "8")), "general.alignment is '8'"),
    "tensor beyond the file": (tensor(offset=1 << 40), "tensor blk.0.ffn_up.weight lies at bytes 1099511627776.."),
    "tensor unaligned": (tensor(offset=33), "begins at 33, expected a multiple of 32"),
    "tensors overlap": (gguf(overlap), "overlap"),
    "tensor twice": (gguf(double), "it has two tensors"),
    "tensor's name that is not UTF-8": (tensor(name=b"\xff"), "a tensor's name is not UTF-8"),
    "no dimensions": (tensor(shape=[]), "has 0 dimensions, expected 1..4"),
    "five dimensions": (tensor(shape=[1] * 5), "has 5 dimensions, expected 1..4"),
    "side of zero": (tensor(shape=[0, 96]), "has shape [0, 96], expected no side below 1"),
    "unknown type": (tensor(kind=99), "is of type 99, which is not supported"),
    "integers": (tensor(kind=int(Tensor.I32)), "is of type I32, which is not supported"),
    "no dequantization": (tensor(kind=int(Tensor.Q8_K)), "is of type Q8_K, which is not supported"),
    "rows that are no blocks": (tensor(kind=int(Tensor.Q4_K)), "has rows of 64 weights, expected a multiple of 256"),
    "quantized norm": (
        gguf(lambda m: setattr(m.tensor("output_norm.weight"), "kind", int(Tensor.Q4_0))),
        "of one dimension is of type Q4_0",
    ),
    "other shape": (tensor(shape=[64, 95]), "has shape [95, 64], expected [96, 64]"),
    "extra tensor": (gguf(add_tensor("evil\x1b[2J\n", [8], 0, bytes(32))), "which a llama model has not"),
    "no tensors": (gguf(lambda m: m.tensors.clear()), "it has no tensors"),
    "no keys": (gguf(lambda m: m.keys.clear()), "has no general.architecture"),
    "architecture of a number": (key("general.architecture", u32(3)), "general.architecture is 3, expected a text"),
    "architecture of an array": (key("general.architecture", array(Value.UINT32, [])), "expected a text"),
    "other architecture": (key("general.architecture", value(Value.STRING, "mamba")), "'mamba' is not supported"),
    "no layers": (key("llama.block_count", u32(0)), "block_count is 0, expected a whole number within 1.."),
    "layers below zero": (key("llama.block_count", value(Value.INT32, -1)), "block_count is -1, expected"),
    "layers as a text": (key("llama.block_count", value(Value.STRING, "two")), "block_count is 'two', expected"),
    "layers as a float": (key("llama.block_count", f32(2.0)), "block_count is 2.0, expected"),
    "layers as a bool": (key("llama.block_count", value(Value.BOOL, True)), "block_count is True, expected"),
    "layers as an array": (key("llama.block_count", array(Value.UINT32, [2])), "block_count is array"),
    "more layers": (key("llama.block_count", u32(3)), "has no tensor blk.2."),
    "heads of zero": (key("llama.attention.head_count", u32(0)), "head_count is 0, expected"),
    "heads below zero": (key("llama.attention.head_count", value(Value.INT32, -4)), "head_count is -4, expected"),
    "keys' heads of zero": (key("llama.attention.head_count_kv", u32(0)), "head_count_kv is 0, expected"),
    "heads shared unevenly": (key("llama.attention.head_count_kv", u32(3)), "4 heads cannot share 3 heads"),
    "heads per layer": (key("llama.attention.head_count", array(Value.INT32, [4, 4])), "head_count is array"),
    "heads that do not divide": (
        gguf(lambda m: (m.drop("llama.attention.key_length"), m.set("llama.attention.head_count", u32(6)))),
        "6 heads do not divide the hidden size 64",
    ),
    "odd head": (key("llama.attention.key_length", u32(31)), "the head size is 31, expected an even number"),
    "epsilon NaN": (key("llama.attention.layer_norm_rms_epsilon", f32(float("nan"))), "epsilon is nan, expected"),
    "epsilon zero": (key("llama.attention.layer_norm_rms_epsilon", f32(0)), "epsilon is 0.0, expected"),
    "rope base 0": (key("llama.rope.freq_base", f32(0)), "freq_base is 0.0, expected a number within"),
    "rope base NaN": (key("llama.rope.freq_base", f32(float("nan"))), "freq_base is nan, expected"),
    "rope base infinite": (key("llama.rope.freq_base", f32(float("inf"))), "freq_base is inf, expected"),
    "rope factor": (
        gguf(
            lambda m: (
                m.set("llama.rope.scaling.type", value(Value.STRING, "linear")),
                m.set("llama.rope.scaling.factor", f32(0)),
            )
        ),
        "rope.scaling.factor is 0.0, expected",
    ),
    "rope factors' shape": (gguf(add_tensor("rope_freqs.weight", [7], 0, bytes(28))), "shape [7], expected [16]"),
    "rope factors of zero": (gguf(add_tensor("rope_freqs.weight", [16], 0, bytes(64))), "frequencies are not finite"),
    "fewer tokens than rows": (key(TOKENS, array(Value.STRING, tiny.TOKENS[:200])), "token_type has 260 elements"),
    "more tokens than rows": (
        gguf(lambda m: (m.drop("tokenizer.ggml.token_type"), m.set(TOKENS, array(Value.STRING, [*tiny.TOKENS, "zz"])))),
        f"token_embd.weight has shape [{tiny.VOCAB}, 64], expected [{tiny.VOCAB + 1}, 64]",
    ),
    "no tokens": (key(TOKENS, array(Value.STRING, [])), "tokens holds no tokens"),
    "tokens as numbers": (key(TOKENS, array(Value.UINT32, [1])), "is an array of uint32, expected an array of texts"),
    "tokens as a text": (key(TOKENS, value(Value.STRING, "abc")), "tokens is 'abc', expected an array of texts"),
    "token twice": (key(TOKENS, tokens_with(5, tiny.TOKENS[9])), "twice, as 5 and as 9"),
    "token that is not UTF-8": (key(TOKENS, tokens_with(5, b"\xff\xfe")), f"element 5 of {TOKENS} is not UTF-8"),
    "token of a megabyte": (key(TOKENS, tokens_with(5, "x" * 10**6)), "has 1000000 bytes, expected at most 1024"),
    "merge of unknown tokens": (key(MERGES, array(Value.STRING, ["t h", "no pe"])), "needs the token 'no'"),
    "merge into an unknown token": (key(MERGES, array(Value.STRING, ["x y"])), "needs the token 'xy'"),
    "merge without a space": (key(MERGES, array(Value.STRING, ["th"])), "needs the token ''"),
    "merges as numbers": (key(MERGES, array(Value.INT32, [1])), "is an array of int32, expected an array of texts"),
    "scores not finite": (key(SCORES, array(Value.FLOAT32, [float("nan")] * tiny.VOCAB)), "that is not finite"),
    "scores too few": (
        key(SCORES, array(Value.FLOAT32, [1.0])),
        f"has 1 elements, expected one for each of {tiny.VOCAB}",
    ),
    "bos beyond": (key("tokenizer.ggml.bos_token_id", u32(tiny.VOCAB)), f"bos_token_id is {tiny.VOCAB}, expected"),
    "eos beyond": (key("tokenizer.ggml.eos_token_id", u32(2**32 - 1)), "eos_token_id is 4294967295, expected"),
    "eos as a text": (key("tokenizer.ggml.eos_token_id", value(Value.STRING, "0")), "eos_token_id is '0', expected"),
    "unknown tokenizer": (key("tokenizer.ggml.model", value(Value.STRING, "x")), "tokenizer model 'x' is not"),
    "tokenizer model of a number": (key("tokenizer.ggml.model", u32(1)), "tokenizer.ggml.model is 1, expected a text"),
    "add_bos of a text": (key("tokenizer.ggml.add_bos_token", value(Value.STRING, "y")), "expected true or false"),
    "sentence pieces without scores": (
        key("tokenizer.ggml.model", value(Value.STRING, "llama")),
        "has no tokenizer.ggml.scores",
    ),
    "one part of three": (key("split.count", value(Value.UINT32, 3)), "is one of 3 parts, but not named"),
    "NaN weight": (poke("blk.1.ffn_up.weight", float("nan")), "tensor blk.1.ffn_up.weight holds a weight that is"),
    "infinite weight": (poke("token_embd.weight", float("inf")), "tensor token_embd.weight holds a weight that is"),
    "infinite norm": (poke("output_norm.weight", float("-inf")), "tensor output_norm.weight holds a weight that is"),
    "weight that overflows": (
        poke("blk.0.ffn_down.weight", 3e38),
        "its weights are so large that logits are not finite",
    ),
    "safetensors named GGUF": (
        content((100).to_bytes(8, "little") + b'{"a": {}}'),
        "a safetensors file, whose directory is the source",
    ),
    "zip": (content(b"PK\x03\x04" + bytes(99)), "a zip archive, perhaps a pickle"),
    "pickle": (content(b"\x80\x04" + bytes(99)), "a pickle, which may run any code"),
}


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def leads_out(name: str) -> Maker:
    """A Hugging Face directory in which a file is a link out of it."""

    def change(path: Path) -> None:
        outside = path.parent / "elsewhere"
        outside.mkdir(exist_ok=True)
        (path / name).rename(outside / name)
        (path / name).symlink_to(outside / name)

    return hugging_face(change)


def replaced_by_fifo(name: str) -> Maker:
    """A Hugging Face directory in which a file is a pipe that nobody writes to."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return hugging_face(change)


def mapped(change: Callable[[dict[str, Any]], object]) -> Maker:
    """A Hugging Face directory whose index has another map."""
    return edited(INDEX, lambda index: change(index["weight_map"]))


def everywhere(name: str) -> Maker:
    """A Hugging Face directory whose index sends every tensor to the file `name`."""
    return mapped(lambda shards: shards.update(dict.fromkeys(shards, name)))


def unsharded(path: Path) -> None:
    """Removes the index: files are then found by their names."""
    (path / INDEX).unlink()


def copied_shard(path: Path) -> None:
    """The same tensors twice."""
    unsharded(path)
    (path / "model-2.safetensors").write_bytes((path / "model-1.safetensors").read_bytes())


def sparse_config(path: Path) -> None:
    """A configuration of a gigabyte."""
    with (path / "config.json").open("r+b") as file:
        file.truncate(1 << 30)


def add_token(index: int, token: str, **flags: bool) -> Maker:
    """A Hugging Face directory whose tokenizer has one more word."""
    return edited("tokenizer.json", lambda t: t["model"]["vocab"].update({token: index}))


def set_regex(regex: str) -> Maker:
    """A Hugging Face directory whose tokenizer splits text by `regex`."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return edited("tokenizer.json", lambda t: t.update(pre_tokenizer=split))


EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
FIRST, SECOND = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("down", "up"))

FILES: dict[str, tuple[Maker, str]] = {
    "fifo": (fifo, "is neither a plain file nor a directory"),
    "link to itself": (loop, "is a link that leads nowhere"),
    "device": (lambda path: Path("/dev/zero"), "/dev/zero is neither a plain file nor a directory"),
    "empty directory": (lambda path: path.mkdir() or path, "config.json does not exist"),
    "config.json is a fifo": (replaced_by_fifo("config.json"), "config.json is not a plain file"),
    "tokenizer.json is a fifo": (replaced_by_fifo("tokenizer.json"), "tokenizer.json is not a plain file"),
    "weights are a fifo": (replaced_by_fifo("model-0.safetensors"), "model-0.safetensors is not a plain file"),
    "config.json leads out": (leads_out("config.json"), "config.json leads out of"),
    "tokenizer.json leads out": (leads_out("tokenizer.json"), "tokenizer.json leads out of"),
    "weights lead out": (leads_out("model-1.safetensors"), "model-1.safetensors leads out of"),
}

CONFIG: dict[str, tuple[Maker, str]] = {
    "not JSON": (written("config.json", "{"), "config.json is not JSON"),
    "not text": (written("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
    "array": (written("config.json", "[]"), "config.json does not hold a JSON object"),
    "nested": (written("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "config.json is nested too deeply"),
    "gigabyte": (hugging_face(sparse_config), "config.json has 1073741824 bytes, expected at most 16777216"),
    "long number": (written("config.json", '{"vocab_size": ' + "9" * 10_000 + "}"), "config.json is not JSON"),
    "key twice": (written("config.json", '{"a": 1, "a": 2}'), "'a' stands there twice"),
    "text_config": (hugging_face(text_config={"num_hidden_layers": -1}), "num_hidden_layers is -1, expected"),
    **{
        f"layers of {layers!r}": (hugging_face(num_hidden_layers=layers), "num_hidden_layers is")
        for layers in ("two", -1, 0, 1e9, True, None, [2], 2.0)
    },
    "no layers": (edited("config.json", lambda c: c.pop("num_hidden_layers")), "has no num_hidden_layers"),
    "heads of zero": (hugging_face(num_attention_heads=0), "num_attention_heads is 0, expected"),
    "heads shared unevenly": (hugging_face(num_key_value_heads=3), "4 heads cannot share 3 heads"),
    "odd head": (hugging_face(head_dim=31), "the head size is 31, expected an even number"),
    "epsilon NaN": (hugging_face(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a number within"),
    "epsilon as a text": (hugging_face(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', expected a number"),
    "rope base 0": (hugging_face(rope_theta=0), "rope_theta is 0, expected a number within"),
    "rope base infinite": (hugging_face(rope_theta=float("inf")), "rope_theta is inf, expected"),
    "rope scaling as a text": (hugging_face(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
    "rope factor": (hugging_face(rope_scaling={"type": "linear", "factor": "4"}), "rope_scaling.factor is '4'"),
    "no rope factor": (hugging_face(rope_scaling={"type": "linear"}), "has no factor"),
    "rope factors in the wrong order": (
        hugging_face(rope_scaling={"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        "low_freq_factor is 4.0, expected less than",
    ),
    "rope type": (hugging_face(rope_scaling={"rope_type": ["x"]}), "rope_type is ['x'], expected a text"),
    "tied by a text": (hugging_face(tie_word_embeddings="no"), "tie_word_embeddings is 'no', expected true or false"),
    "type of an array": (hugging_face(model_type=["llama"]), "model_type is ['llama'], expected a text"),
    "no type": (edited("config.json", lambda c: c.pop("model_type")), "architecture None is not supported"),
    "torch_dtype": (hugging_face(torch_dtype={"a": 1}), "torch_dtype is {'a': 1}, expected a text"),
    "window": (hugging_face(sliding_window=-5), "sliding_window is -5, expected"),
    "bos beyond": (hugging_face(bos_token_id=tiny.VOCAB), f"begins a text is {tiny.VOCAB}, expected one of 0..259"),
    "eos beyond": (hugging_face(eos_token_id=[0, 5000]), "ends one is 5000, expected one of 0..259"),
    "eos as a text": (hugging_face(eos_token_id="0"), "eos_token_id is '0', expected"),
    "eos below zero": (hugging_face(eos_token_id=-1), "eos_token_id is -1, expected"),
    "vocabulary": (hugging_face(vocab_size=100), "has shape [260, 64], expected [100, 64]"),
    **{
        f"quantized by {method}": (
            hugging_face(quantization_config={"quant_method": method}),
            f"weights that are already quantized ({method}) are supported only as GGUF",
        )
        for method in ("gptq", "awq", "bitsandbytes", "fp8")
    },
    "generation_config.json not JSON": (written("generation_config.json", "{"), "generation_config.json is not JSON"),
    "generation_config.json's eos": (
        written("generation_config.json", '{"eos_token_id": [{}]}'),
        "generation_config.json: eos_token_id is [{}], expected a whole number within 0..4194303, or a list of such",
    ),
}

WEIGHTS: dict[str, tuple[Maker, str]] = {
    "header is not JSON": (
        written("model-0.safetensors", (2).to_bytes(8, "little") + b"{]"),
        "model-0.safetensors is not a complete safetensors file",
    ),
    "empty file": (written("model-0.safetensors", b""), "model-0.safetensors is not a complete safetensors file"),
    "GGUF named safetensors": (
        hugging_face(lambda path: (path / "model-0.safetensors").write_bytes(whole().encode())),
        "model-0.safetensors is not a complete safetensors file",
    ),
    "pickle named safetensors": (
        written("model-0.safetensors", b"\x80\x04K\x01." * 9),
        "not a complete safetensors file",
    ),
    "cut off": (
        hugging_face(lambda path: os.truncate(path / "model-0.safetensors", 9000)),
        "model-0.safetensors is not a complete safetensors file",
    ),
    "offsets beyond": (header(lambda h: h[EMBED].update(data_offsets=[0, 1 << 40])), "not a complete safetensors file"),
    "offsets below zero": (header(lambda h: h[EMBED].update(data_offsets=[-8, 8])), "not a complete safetensors file"),
    "offsets overlapping": (
        header(lambda h: h[FIRST].update(data_offsets=h[SECOND]["data_offsets"])),
        "not a complete safetensors file",
    ),
    "hole": (header(lambda h: h.pop(EMBED)), "not a complete safetensors file"),
    "type that does not fit": (header(lambda h: h[EMBED].update(dtype="F64")), "not a complete safetensors file"),
    "unknown type": (header(lambda h: h[EMBED].update(dtype="F7")), "not a complete safetensors file"),
    "shape that does not fit": (header(lambda h: h[EMBED].update(shape=[1, 1])), "not a complete safetensors file"),
    "shape that fits, of another model": (
        header(lambda h: h[EMBED].update(shape=[64, tiny.VOCAB])),
        "has shape [64, 260], expected [260, 64]",
    ),
    "integers": (header(lambda h: h[EMBED].update(dtype="I32")), "tensor model.embed_tokens.weight holds I32"),
    "tensor in two shards": (hugging_face(copied_shard), "which model-1.safetensors has too"),
    "missing shard": (
        hugging_face(lambda path: (path / "model-1.safetensors").unlink()),
        "model-1.safetensors does not exist",
    ),
    "index not JSON": (written(INDEX, "["), f"{INDEX} is not JSON"),
    "map is no map": (edited(INDEX, lambda i: i.update(weight_map=["x"])), "weight_map is not an object"),
    "map of numbers": (mapped(lambda shards: shards.update({EMBED: 7})), "weight_map is not an object"),
    "no map": (edited(INDEX, lambda i: i.clear()), "weight_map is not an object"),
    "not in its shard": (
        mapped(lambda shards: shards.update({EMBED: "model-1.safetensors"})),
        f"has no tensor {EMBED}",
    ),
    "path upwards": (everywhere("../../../../etc/x.safetensors"), "leads out of"),
    "absolute path": (everywhere("/etc/passwd.safetensors"), "leads out of"),
    "path to what is no safetensors": (everywhere("/etc/passwd"), "expected a safetensors file"),
    "path with a NUL": (everywhere("a\0.safetensors"), "expected a safetensors file"),
    "no weights": (
        hugging_face(lambda path: [file.unlink() for file in path.glob("model*")]),
        "holds no safetensors",
    ),
    "NaN weight": (single(lambda t: t[EMBED].__setitem__((3, 3), np.nan)), "token_embd.weight holds a weight that is"),
    "infinite bfloat16": (
        single(lambda t: t.update({NORM: np.full(64, np.inf, ml_dtypes.bfloat16)})),
        "output_norm.weight holds a weight that is",
    ),
    "weight that overflows": (
        single(lambda t: t[EMBED].fill(3e38)),
        "its weights are so large that logits are not finite",
    ),
    "tensor of another family": (
        single(lambda t: t.update({"model.layers.0.\x1b[31m\nevil": np.zeros(3, np.float32)})),
        "which a llama model has not",
    ),
}

TOKENIZER: dict[str, tuple[Maker, str]] = {
    "missing": (hugging_face(lambda path: (path / "tokenizer.json").unlink()), "tokenizer.json does not exist"),
    "not JSON": (written("tokenizer.json", "{"), "tokenizer.json is not a tokenizer"),
    "not text": (written("tokenizer.json", b"\xff"), "tokenizer.json is not a tokenizer"),
    "array": (written("tokenizer.json", "[]"), "tokenizer.json is not a tokenizer"),
    "nested": (written("tokenizer.json", '{"a":' * 10_000 + "1" + "}" * 10_000), "tokenizer.json is not a tokenizer"),
    "token beyond": (add_token(tiny.VOCAB, "extra"), f"token 'extra' is {tiny.VOCAB}, expected one of 0..259"),
    "token far beyond": (add_token(2**32 - 1, "extra"), "token 'extra' is 4294967295, expected one of 0..259"),
    "token below zero": (add_token(-1, "extra"), "tokenizer.json is not a tokenizer"),
    "merge of unknown tokens": (
        edited("tokenizer.json", lambda t: t["model"]["merges"].append(["no", "pe"])),
        "tokenizer.json is not a tokenizer",
    ),
    "broken regex": (set_regex("("), "tokenizer.json is not a tokenizer"),
    # Text that the regex takes exponential time for; the library gives up after so many steps.
    "regex that explodes": (set_regex(r"(\w+\s?)*$"), "its tokenizer fails on plain text: Onig: Regex search error"),
    "no vocabulary": (
        edited("tokenizer.json", lambda t: (t["model"].update(vocab={}, merges=[]), t.update(added_tokens=[]))),
        "makes 0 tokens of the text",
    ),
}

TABLES = {"gguf": GGUF, "files": FILES, "config": CONFIG, "weights": WEIGHTS, "tokenizer": TOKENIZER, "lying": LYING}
CASES = [(table, case) for table, cases in TABLES.items() for case in cases]


def state(path: Path) -> dict[str, str]:
    """Every file at and below `path`, and what is in it."""
    found = {}
    for each in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
        size = each.lstat().st_size
        plain = each.is_file() and size < 1 << 26 and not str(each).startswith("/dev")
        found[str(each)] = hashlib.sha256(each.read_bytes()).hexdigest() if plain else f"{each.lstat().st_mode} {size}"
    return found


def refused(source: Path, target: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The sentence with which the command line refuses `source`; nothing has changed and nothing is left."""
    before = state(source)
    assert main([str(source), str(target / "out" / "model"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("model_export: ")
    assert source.name in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.rstrip("\n").isprintable()
    assert state(source) == before
    assert list(target.iterdir()) == []
    return captured.err


@pytest.mark.parametrize(("table", "case"), CASES)
def test_one_sentence(table: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each bad source is refused by one sentence that says what is wrong, and nothing is left behind."""
    make, message = TABLES[table][case]
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    source = make(tmp_path / "source" / "Tiny")
    assert message in refused(source, tmp_path / "target", capsys)


def test_cut_off_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF file that ends too early is refused wherever it ends."""
    raw = whole().encode()
    data = len(raw) - len(whole().data)
    chosen = random.Random(7)
    ends = [*range(0, 32, 3), *chosen.sample(range(32, data), 40), *chosen.sample(range(data, len(raw)), 20)]
    (tmp_path / "target").mkdir()
    for end in [*ends, len(raw) - 4]:
        source = content(raw[:end])(tmp_path / "Tiny.gguf")
        assert "Tiny.gguf is not a complete GGUF file: " in refused(source, tmp_path / "target", capsys)


def test_whole_sources_export(tmp_path: Path) -> None:
    """What the bad sources are made from is good: only what was changed can be why they are refused."""
    for name, make in {"a": gguf(lambda m: None), "b": hugging_face(), "c": single(lambda t: None)}.items():
        source = make(tmp_path / name)
        assert main([str(source), str(tmp_path / f"{name}.out"), "--quantization=float32"]) == 0


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    """A snapshot in the Hugging Face cache consists of links to blobs beside it; only those may lead out."""
    snapshot = hugging_face()(tmp_path / "made")
    home = tmp_path / "models--tiny" / "snapshots" / "Tiny"
    (home.parent.parent / "blobs").mkdir(parents=True)
    home.mkdir(parents=True)
    for file in snapshot.iterdir():
        file.rename(home.parent.parent / "blobs" / file.name)
        (home / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_source(home).name == "Tiny"


LIMITED = """
import resource, sys
from model_export.__main__ import main
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), used + (200 << 20)))
print([main([source, sys.argv[1]]) for source in sys.argv[2:]])
"""


def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """What claims to be huge is refused for what it is, by a process that may take no more than 200 MiB for all."""
    sources = [make(tmp_path / str(number)) for number, (make, _) in enumerate(LYING.values())]
    run = python("-c", LIMITED, str(tmp_path / "out" / "model"), *map(str, sources))
    assert run.stdout == f"{[2] * len(LYING)}\n"
    lines = run.stderr.splitlines()
    assert len(lines) == len(LYING)
    for line, (_, message) in zip(lines, LYING.values(), strict=True):
        assert message in line
    assert not (tmp_path / "out").exists()


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False, **options
    )


@pytest.mark.parametrize("case", ["cut off", "fifo", "directory", "panic"])
def test_command_line(case: str, tmp_path: Path) -> None:
    """The command itself ends with 2 and one line, whatever stands around."""
    make = {
        "cut off": content(whole().encode()[:9999]),
        "fifo": fifo,
        "directory": hugging_face(head_dim=0),
        "panic": set_regex(r"(\w+\s?)*$"),
    }[case]
    source = make(tmp_path / "Tiny")
    run = python("-m", "model_export", str(source), str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("model_export: ")
    assert source.name in run.stderr
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_pickle_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are only there as a pickle are refused with what to do, and the pickle stays closed."""
    marker, target = tmp_path / "ran", tmp_path / "target"
    target.mkdir()
    source = only_pickle(marker)(tmp_path / "Tiny")
    assert "only pytorch_model.bin: a pickle, which may run any code" in refused(source, target, capsys)
    assert not marker.exists()


CODE = {
    "AutoConfig": "modeling_x.Config",
    "AutoModelForCausalLM": "modeling_x.Model",
    "AutoTokenizer": ["modeling_x.T", None],
}


def with_code(marker: Path, **config: Any) -> Maker:
    """A Hugging Face directory with code that makes the file `marker`, named wherever code can be named."""

    def change(path: Path) -> None:
        code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
        for name in (
            "modeling_x.py",
            "configuration_x.py",
            "tokenization_x.py",
            "__init__.py",
            "setup.py",
            "config.py",
        ):
            (path / name).write_text(code)
        template = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
        settings = {"tokenizer_class": "X", "auto_map": CODE, "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "chat_template.jinja").write_text(template)

    return hugging_face(change, auto_map=CODE, trust_remote_code=True, architectures=["X"], **config)


def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code beside a model is never run: an architecture of its own is refused, a known one needs none."""
    marker, target = tmp_path / "ran", tmp_path / "target"
    target.mkdir()
    own = with_code(marker, model_type="x")(tmp_path / "Own")
    assert "architecture 'x' is not supported" in refused(own, target, capsys)
    assert not marker.exists()
    known = with_code(marker)(tmp_path / "Known")
    assert main([str(known), str(target / "model"), "--quantization=float32"]) == 0
    assert not marker.exists()
