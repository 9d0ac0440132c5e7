"""The tables of bad GGUF files: what is wrong, what is changed in a whole one, and what the refusal says of it."""

from __future__ import annotations

from gguf import GGMLQuantizationType as Tensor
from gguf import GGUFValueType as Value

from tests.model_export import tiny
from tests.model_export.bad_sources import content
from tests.model_export.gguf_files import (
    Gguf,
    Info,
    added_key,
    added_tensor,
    array,
    attributes,
    gguf,
    keys,
    poke,
    tensor,
    text,
    value,
)

MERGES, TOKENS, SCORES = "tokenizer.ggml.merges", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"
BOS, EOS, KINDS = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type"
HEADS, KV_HEADS = "llama.attention.head_count", "llama.attention.head_count_kv"
LAYERS, HEAD_SIZE, CONTEXT = "llama.block_count", "llama.attention.key_length", "llama.context_length"
EPSILON, BASE = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
SCALING, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"
HUGE = 1 << 60
NAN, INFINITY = float("nan"), float("inf")


def u32(number: int) -> bytes:
    return value(Value.UINT32, number)


def i32(number: int) -> bytes:
    return value(Value.INT32, number)


def f32(number: float) -> bytes:
    return value(Value.FLOAT32, number)


def string(content: str | bytes) -> bytes:
    return value(Value.STRING, content)


def strings(*items: str | bytes) -> bytes:
    return array(Value.STRING, list(items))


def tokens_with(index: int, token: str | bytes) -> bytes:
    """The token list with another token at `index`."""
    return strings(*tiny.TOKENS[:index], token, *tiny.TOKENS[index + 1 :])


# The file as a whole.
BYTES = [
    ("empty", b"", "it is empty"),
    ("three bytes", b"GGU", "begins with b'GGU'"),
    ("magic alone", b"GGUF", "its version takes 4 bytes at byte 4, the file has 0 there"),
    (
        "safetensors named GGUF",
        (100).to_bytes(8, "little") + b'{"a": {}}',
        "a safetensors file, whose directory is the source",
    ),
    ("zip", b"PK\x03\x04" + bytes(99), "a zip archive, perhaps a pickle"),
    ("pickle", b"\x80\x04" + bytes(99), "a pickle, which may run any code"),
]
ATTRIBUTES = [
    ("magic", {"magic": b"GGUX"}, "begins with b'GGUX', not b'GGUF'"),
    ("version", {"version": b"\x63\0\0\0"}, "its version is 99, expected 2 or 3"),
    ("big-endian", {"version": b"\0\0\0\x03"}, "it is big-endian"),
    ("no tensors", {"tensors": []}, "it has no tensors"),
    ("no keys", {"keys": []}, "has no general.architecture"),
]
LYING_ATTRIBUTES = [
    ("tensor count", {"claimed_tensors": HUGE}, f"claims {HUGE} tensors"),
    ("tensor count of what fits", {"claimed_tensors": 1000}, "not a complete GGUF file"),
    ("key count", {"claimed_keys": 10**9}, "claims 1000000000 keys"),
    ("key count of what fits", {"claimed_keys": 1000}, "not a complete GGUF file"),
]

# Keys that are added, even if the file has them already.
ADDED_KEYS = [
    ("key twice", "general.architecture", string("llama"), "'general.architecture' appears twice"),
    ("key that is not UTF-8", b"\xff", u32(1), "a key is not UTF-8"),
]
# Keys that have another value; None removes one.
KEYS = [
    ("unknown type of a key", {"x": b"\x63\0\0\0"}, "x is of the unknown type 99"),
    ("array of arrays", {"x": array(Value.ARRAY, [])}, "array of arrays"),
    ("string that is not UTF-8", {"general.name": string(b"\xff")}, "general.name is not UTF-8"),
    ("alignment 0", {"general.alignment": u32(0)}, "general.alignment is 0, expected a power of two"),
    ("alignment 33", {"general.alignment": u32(33)}, "general.alignment is 33, expected a power of two"),
    ("alignment as a text", {"general.alignment": string("8")}, "general.alignment is '8'"),
    ("architecture of a number", {"general.architecture": u32(3)}, "general.architecture is 3, expected a text"),
    ("architecture of an array", {"general.architecture": array(Value.UINT32, [])}, "expected a text"),
    ("other architecture", {"general.architecture": string("mamba")}, "'mamba' is not supported"),
    ("no layers", {LAYERS: u32(0)}, "block_count is 0, expected a whole number within 1.."),
    ("layers below zero", {LAYERS: i32(-1)}, "block_count is -1, expected"),
    ("layers as a text", {LAYERS: string("two")}, "block_count is 'two', expected"),
    ("layers as a float", {LAYERS: f32(2.0)}, "block_count is 2.0, expected"),
    ("layers as a bool", {LAYERS: value(Value.BOOL, True)}, "block_count is True, expected"),
    ("layers as an array", {LAYERS: array(Value.UINT32, [2])}, "block_count is array"),
    ("more layers", {LAYERS: u32(3)}, "has no tensor blk.2."),
    ("heads of zero", {HEADS: u32(0)}, "head_count is 0, expected"),
    ("heads below zero", {HEADS: i32(-4)}, "head_count is -4, expected"),
    ("keys' heads of zero", {KV_HEADS: u32(0)}, "head_count_kv is 0, expected"),
    ("heads shared unevenly", {KV_HEADS: u32(3)}, "4 heads cannot share 3 heads"),
    ("heads per layer", {HEADS: array(Value.INT32, [4, 4])}, "head_count is array"),
    ("heads that do not divide", {HEAD_SIZE: None, HEADS: u32(6)}, "6 heads do not divide the hidden size 64"),
    ("odd head", {HEAD_SIZE: u32(31)}, "the head size is 31, supported are multiples of 16"),
    ("epsilon NaN", {EPSILON: f32(NAN)}, "epsilon is nan, expected"),
    ("epsilon zero", {EPSILON: f32(0)}, "epsilon is 0.0, expected"),
    ("rope base 0", {BASE: f32(0)}, "freq_base is 0.0, expected a number within"),
    ("rope base NaN", {BASE: f32(NAN)}, "freq_base is nan, expected"),
    ("rope base infinite", {BASE: f32(INFINITY)}, "freq_base is inf, expected"),
    ("rope factor", {SCALING: string("linear"), FACTOR: f32(0)}, "rope.scaling.factor is 0.0, expected"),
    ("fewer tokens than rows", {TOKENS: strings(*tiny.TOKENS[:200])}, "token_type has 260 elements"),
    (
        "more tokens than rows",
        {KINDS: None, TOKENS: strings(*tiny.TOKENS, "zz")},
        f"token_embd.weight has shape [{tiny.VOCAB}, 64], expected [{tiny.VOCAB + 1}, 64]",
    ),
    ("no tokens", {TOKENS: strings()}, "tokens holds no tokens"),
    ("tokens as numbers", {TOKENS: array(Value.UINT32, [1])}, "is an array of uint32, expected an array of texts"),
    ("tokens as a text", {TOKENS: string("abc")}, "tokens is 'abc', expected an array of texts"),
    ("token twice", {TOKENS: tokens_with(5, tiny.TOKENS[9])}, "twice, as 5 and as 9"),
    ("token that is not UTF-8", {TOKENS: tokens_with(5, b"\xff\xfe")}, f"element 5 of {TOKENS} is not UTF-8"),
    ("token of a megabyte", {TOKENS: tokens_with(5, "x" * 10**6)}, "has 1000000 bytes, expected at most 1024"),
    ("merge of unknown tokens", {MERGES: strings("t h", "no pe")}, "needs the token 'no'"),
    ("merge into an unknown token", {MERGES: strings("x y")}, "needs the token 'xy'"),
    ("merge without a space", {MERGES: strings("th")}, "needs the token ''"),
    ("merges as numbers", {MERGES: array(Value.INT32, [1])}, "is an array of int32, expected an array of texts"),
    ("scores not finite", {SCORES: array(Value.FLOAT32, [NAN] * tiny.VOCAB)}, "that is not finite"),
    (
        "scores too few",
        {SCORES: array(Value.FLOAT32, [1.0])},
        f"has 1 elements, expected one for each of {tiny.VOCAB}",
    ),
    ("bos beyond", {BOS: u32(tiny.VOCAB)}, f"bos_token_id is {tiny.VOCAB}, expected"),
    ("eos beyond", {EOS: u32(2**32 - 1)}, "eos_token_id is 4294967295, expected"),
    ("eos as a text", {EOS: string("0")}, "eos_token_id is '0', expected"),
    ("unknown tokenizer", {"tokenizer.ggml.model": string("x")}, "tokenizer.ggml.model is 'x', which is not supported"),
    ("tokenizer model of a number", {"tokenizer.ggml.model": u32(1)}, "tokenizer.ggml.model is 1, expected a text"),
    ("add_bos of a text", {"tokenizer.ggml.add_bos_token": string("y")}, "expected true or false"),
    ("sentence pieces without scores", {"tokenizer.ggml.model": string("llama")}, "has no tokenizer.ggml.scores"),
    ("one part of three", {"split.count": u32(3)}, "is one of 3 parts, but not named"),
]
LYING_KEYS = [
    (
        "length of a string",
        {"general.organization": string("")[:4] + text("us", 2**63)},
        "general.organization takes 9223372036854775808 bytes",
    ),
    ("length of an array of strings", {TOKENS: array(Value.STRING, ["a"], HUGE)}, f"has {HUGE} elements"),
    ("length of an array of bytes", {TOKENS: array(Value.UINT8, [1], HUGE)}, f"has {HUGE} elements"),
    ("array of bytes within the bound", {TOKENS: array(Value.UINT8, [1], 4_000_000)}, "takes 4000000 bytes"),
    ("layers", {LAYERS: u32(10**9)}, "block_count is 1000000000, expected a whole number"),
    ("head size", {HEAD_SIZE: u32(2**31)}, "key_length is 2147483648, expected a whole"),
    (
        "heads",
        {HEADS: u32(4096), KV_HEADS: u32(4096), HEAD_SIZE: u32(4096), CONTEXT: u32(64)},
        "attn_q.weight has shape",
    ),
    ("context", {CONTEXT: u32(2**32 - 1)}, "context_length is 4294967295, expected a whole"),
]

# The description of the tensor blk.0.ffn_up.weight.
TENSORS = [
    ("tensor beyond the file", {"offset": 1 << 40}, "tensor blk.0.ffn_up.weight lies at bytes 1099511627776.."),
    ("tensor unaligned", {"offset": 33}, "begins at 33, expected a multiple of 32"),
    ("tensor's name that is not UTF-8", {"name": b"\xff"}, "a tensor's name is not UTF-8"),
    ("no dimensions", {"shape": []}, "has 0 dimensions, expected 1..4"),
    ("five dimensions", {"shape": [1] * 5}, "has 5 dimensions, expected 1..4"),
    ("side of zero", {"shape": [0, 96]}, "has shape [0, 96], expected no dimension below 1"),
    ("unknown type", {"kind": 99}, "is of type 99, which is not supported"),
    ("integers", {"kind": int(Tensor.I32)}, "is of type I32, which is not supported"),
    ("no dequantization", {"kind": int(Tensor.Q8_K)}, "is of type Q8_K, which is not supported"),
    ("rows that are no blocks", {"kind": int(Tensor.Q4_K)}, "has rows of 64 weights, expected a multiple of 256"),
    ("other shape", {"shape": [64, 95]}, "has shape [95, 64], expected [96, 64]"),
]
LYING_TENSORS = [
    ("shape that overflows", {"shape": [2**32, 2**32]}, "lies at bytes"),
    ("shape of 2^60", {"shape": [HUGE]}, "lies at bytes"),
    ("dimensions", {"dimensions": 2**32 - 1}, "has 4294967295 dimensions, expected 1..4"),
]
# One more tensor, in float32: its name, shape and bytes.
ADDED_TENSORS = [
    ("extra tensor", "evil\x1b[2J\n", [8], bytes(32), "which a llama model does not have"),
    ("rope factors' shape", "rope_freqs.weight", [7], bytes(28), "shape [7], expected [16]"),
    ("rope factors of zero", "rope_freqs.weight", [16], bytes(64), "frequencies are not finite"),
]
# One weight of a tensor.
WEIGHTS = [
    ("NaN weight", "blk.1.ffn_up.weight", NAN, "tensor blk.1.ffn_up.weight holds a weight that is"),
    ("infinite weight", "token_embd.weight", INFINITY, "tensor token_embd.weight holds a weight that is"),
    ("infinite norm", "output_norm.weight", -INFINITY, "tensor output_norm.weight holds a weight that is"),
    ("weight that overflows", "blk.0.ffn_down.weight", 3e38, "its weights are so large that logits are not finite"),
]


def overlap(model: Gguf) -> None:
    """Two tensors over the same bytes."""
    model.tensors[1].offset = model.tensors[0].offset


def double(model: Gguf) -> None:
    """The same tensor twice."""
    model.tensors.append(model.tensors[-1])


def quantized_norm(model: Gguf) -> None:
    """A vector in blocks."""
    model.tensor("output_norm.weight").kind = int(Tensor.Q4_0)


def endless_key(model: Gguf) -> None:
    """A key that claims a length of 2^63 bytes."""
    model.keys.insert(0, (b"", text("a", 2**63)))


def long_name(model: Gguf) -> None:
    """A tensor with a name of 5000 bytes."""
    model.tensors.insert(0, Info(b"x" * 5000, [1], 0, 0))


CHANGES = [
    ("tensors overlap", overlap, "overlap"),
    ("tensor twice", double, "it has two tensors"),
    ("quantized norm", quantized_norm, "of one dimension is of type Q4_0"),
]
LYING_CHANGES = [
    ("length of a key", endless_key, "not a complete GGUF file"),
    ("tensor's name", long_name, "has 5000 bytes"),
]

# Each table, and the function that makes a file from the middle columns of a row.
TABLES = {
    "GGUF file": (content, BYTES),
    "GGUF attributes": (attributes, ATTRIBUTES),
    "GGUF keys added": (added_key, ADDED_KEYS),
    "GGUF keys": (keys, KEYS),
    "GGUF tensors": (tensor, TENSORS),
    "GGUF tensors added": (added_tensor, ADDED_TENSORS),
    "GGUF weights": (poke, WEIGHTS),
    "GGUF changes": (gguf, CHANGES),
}
# The tables of sources that claim to be far larger than they are.
LYING = {
    "lying GGUF attributes": (attributes, LYING_ATTRIBUTES),
    "lying GGUF keys": (keys, LYING_KEYS),
    "lying GGUF tensors": (tensor, LYING_TENSORS),
    "lying GGUF changes": (gguf, LYING_CHANGES),
}
