"""The tables of bad Hugging Face directories: what is wrong, what is changed in a whole one, what the refusal says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tests.model_export import tiny
from tests.model_export.bad_sources import (
    GONE,
    config,
    copied_shard,
    cut_off,
    device,
    empty,
    fifo,
    header,
    header_length,
    hugging_face,
    itself,
    json_entries,
    leads_out,
    loop,
    missing_shard,
    no_tokenizer,
    no_weights,
    placed,
    replaced_by_fifo,
    sparse_config,
    stored,
    written,
)
from tests.model_export.gguf_files import whole

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
INDEX, SHARD, OTHER = "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
FIRST, SECOND = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("down", "up"))
EVIL = "model.layers.0.\x1b[31m\nevil"
HUGE = 1 << 60
# Some texts take this regular expression exponential time; the library gives up after a number of steps.
EXPLODING = r"(\w+\s?)*$"
NOT_WHOLE = "not a complete safetensors file"
NO_TOKENIZER = "tokenizer.json is not a tokenizer"
QUANTIZED = "weights that are already quantized ({}) are supported only as GGUF"


def split(regex: str) -> dict[str, Any]:
    """A pre-tokenizer that splits texts by `regex`."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def with_one(number: float) -> np.ndarray:
    """The embedding with one other weight."""
    made = tiny.weights("llama")[EMBED]
    made[3, 3] = number
    return made


# Something else in place of a directory.
PLACES = [
    ("fifo", fifo, "is neither a plain file nor a directory"),
    ("link to itself", loop, "is a link that leads nowhere"),
    ("device", device, "/dev/zero is neither a plain file nor a directory"),
    ("empty directory", empty, "config.json does not exist"),
]
FIFOS = [
    ("config.json is a fifo", CONFIG, "config.json is not a plain file"),
    ("tokenizer.json is a fifo", TOKENIZER, "tokenizer.json is not a plain file"),
    ("weights are a fifo", SHARD, "model-0.safetensors is not a plain file"),
]
LINKS = [
    ("config.json leads out", CONFIG, "config.json leads out of"),
    ("tokenizer.json leads out", TOKENIZER, "tokenizer.json leads out of"),
    ("weights lead out", OTHER, "model-1.safetensors leads out of"),
]

# A file and its content.
WRITTEN = [
    ("config not JSON", CONFIG, "{", "config.json is not JSON"),
    ("config not text", CONFIG, b"\xff\xfe{}", "config.json is not JSON"),
    ("config an array", CONFIG, "[]", "config.json does not hold a JSON object"),
    ("config nested", CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000, "config.json is nested too deeply"),
    ("config's long number", CONFIG, '{"vocab_size": ' + "9" * 10_000 + "}", "config.json is not JSON"),
    ("generation_config.json not JSON", GENERATION, "{", "generation_config.json is not JSON"),
    (
        "generation_config.json's eos",
        GENERATION,
        '{"eos_token_id": [{}]}',
        "generation_config.json: eos_token_id is [{}], expected a whole number within 0..4194303, or a list of them",
    ),
    ("header is not JSON", SHARD, (2).to_bytes(8, "little") + b"{]", f"{SHARD} is {NOT_WHOLE}"),
    ("empty file", SHARD, b"", f"{SHARD} is {NOT_WHOLE}"),
    ("GGUF named safetensors", SHARD, whole().encode(), f"{SHARD} is {NOT_WHOLE}"),
    ("pickle named safetensors", SHARD, b"\x80\x04K\x01." * 9, NOT_WHOLE),
    ("index not JSON", INDEX, "[", f"{INDEX} is not JSON"),
    ("tokenizer not JSON", TOKENIZER, "{", NO_TOKENIZER),
    ("tokenizer not text", TOKENIZER, b"\xff", NO_TOKENIZER),
    ("tokenizer an array", TOKENIZER, "[]", NO_TOKENIZER),
    ("tokenizer nested", TOKENIZER, '{"a":' * 10_000 + "1" + "}" * 10_000, NO_TOKENIZER),
]

# Entries of config.json.
ENTRIES = [
    ("text_config", {"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers is -1, expected"),
    ("layers as a text", {"num_hidden_layers": "two"}, "num_hidden_layers is"),
    ("layers below zero", {"num_hidden_layers": -1}, "num_hidden_layers is"),
    ("layers of zero", {"num_hidden_layers": 0}, "num_hidden_layers is"),
    ("layers of 1e9", {"num_hidden_layers": 1e9}, "num_hidden_layers is"),
    ("layers as a bool", {"num_hidden_layers": True}, "num_hidden_layers is"),
    ("layers of null", {"num_hidden_layers": None}, "num_hidden_layers is"),
    ("layers as a list", {"num_hidden_layers": [2]}, "num_hidden_layers is"),
    ("layers as a float", {"num_hidden_layers": 2.0}, "num_hidden_layers is"),
    ("no layers", {"num_hidden_layers": GONE}, "has no num_hidden_layers"),
    ("heads of zero", {"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
    ("heads shared unevenly", {"num_key_value_heads": 3}, "4 heads cannot share 3 heads"),
    ("odd head", {"head_dim": 31}, "the head size is 31, supported are multiples of 16"),
    ("epsilon NaN", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number within"),
    ("epsilon as a text", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
    ("rope base 0", {"rope_theta": 0}, "rope_theta is 0, expected a number within"),
    ("rope base infinite", {"rope_theta": float("inf")}, "rope_theta is inf, expected"),
    ("rope scaling as a text", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
    ("rope factor", {"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
    ("no rope factor", {"rope_scaling": {"type": "linear"}}, "has no factor"),
    (
        "rope factors in the wrong order",
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "low_freq_factor is 4.0, expected less than",
    ),
    ("rope type", {"rope_scaling": {"rope_type": ["x"]}}, "rope_type is ['x'], expected a text"),
    ("tied by a text", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
    ("type of an array", {"model_type": ["llama"]}, "model_type is ['llama'], expected a text"),
    ("no type", {"model_type": GONE}, "architecture None is not supported"),
    ("torch_dtype", {"torch_dtype": {"a": 1}}, "torch_dtype is {'a': 1}, expected a text"),
    ("window", {"sliding_window": -5}, "sliding_window is -5, expected"),
    ("bos beyond", {"bos_token_id": tiny.VOCAB}, f"begins a text is {tiny.VOCAB}, expected one of 0..259"),
    ("bos as a list", {"bos_token_id": [0]}, "bos_token_id is [0], expected a whole number within 0.."),
    ("eos beyond", {"eos_token_id": [0, 5000]}, "ends one is 5000, expected one of 0..259"),
    ("eos as a text", {"eos_token_id": "0"}, "eos_token_id is '0', expected"),
    ("eos below zero", {"eos_token_id": -1}, "eos_token_id is -1, expected"),
    ("vocabulary", {"vocab_size": 100}, "has shape [260, 64], expected [100, 64]"),
    ("quantized by gptq", {"quantization_config": {"quant_method": "gptq"}}, QUANTIZED.format("gptq")),
    ("quantized by awq", {"quantization_config": {"quant_method": "awq"}}, QUANTIZED.format("awq")),
    (
        "quantized by bitsandbytes",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        QUANTIZED.format("bitsandbytes"),
    ),
    ("quantized by fp8", {"quantization_config": {"quant_method": "fp8"}}, QUANTIZED.format("fp8")),
]
LYING_ENTRIES = [
    ("config's layers", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole"),
    ("config's head size", {"head_dim": 10**10}, "head_dim is 10000000000, expected a whole"),
    ("config's context", {"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
    (
        "config's rotations",
        {"max_position_embeddings": 1 << 22, "head_dim": 4096},
        "the context is 4194304 positions of a head of 4096 numbers, expected at most 131072 positions",
    ),
]

# A tensor in the header of a shard, and changes of its description, or another tensor whose bytes it claims.
HEADERS = [
    ("offsets beyond", EMBED, {"data_offsets": [0, 1 << 40]}, NOT_WHOLE),
    ("offsets below zero", EMBED, {"data_offsets": [-8, 8]}, NOT_WHOLE),
    ("offsets overlapping", FIRST, SECOND, NOT_WHOLE),
    ("hole", EMBED, GONE, NOT_WHOLE),
    ("type that does not fit", EMBED, {"dtype": "F64"}, NOT_WHOLE),
    ("unknown type", EMBED, {"dtype": "F7"}, NOT_WHOLE),
    ("shape that does not fit", EMBED, {"shape": [1, 1]}, NOT_WHOLE),
    (
        "shape that fits, of another model",
        EMBED,
        {"shape": [64, tiny.VOCAB]},
        "has shape [64, 260], expected [260, 64]",
    ),
    ("integers", EMBED, {"dtype": "I32"}, "tensor model.embed_tokens.weight holds I32"),
]
LYING_HEADERS = [("safetensors shape", EMBED, {"shape": [HUGE, 64]}, NOT_WHOLE)]
LYING_LENGTHS = [
    ("safetensors header", HUGE, NOT_WHOLE),
    ("safetensors header within its bound", 90 << 20, NOT_WHOLE),
]

# Entries of JSON files; a slash leads into an object.
JSON = [
    ("map is no map", INDEX, {"weight_map": ["x"]}, "weight_map is not an object"),
    ("no map", INDEX, {"weight_map": GONE}, "weight_map is not an object"),
    ("map of numbers", INDEX, {f"weight_map/{EMBED}": 7}, "weight_map is not an object"),
    ("not in its shard", INDEX, {f"weight_map/{EMBED}": OTHER}, f"has no tensor {EMBED}"),
    (
        "token beyond",
        TOKENIZER,
        {"model/vocab/extra": tiny.VOCAB},
        f"token 'extra' is {tiny.VOCAB}, expected one of 0..259",
    ),
    (
        "token far beyond",
        TOKENIZER,
        {"model/vocab/extra": 2**32 - 1},
        "token 'extra' is 4294967295, expected one of 0..259",
    ),
    ("token below zero", TOKENIZER, {"model/vocab/extra": -1}, NO_TOKENIZER),
    ("merge of unknown tokens", TOKENIZER, {"model/merges": [*map(list, tiny.MERGES), ["no", "pe"]]}, NO_TOKENIZER),
    (
        "no vocabulary",
        TOKENIZER,
        {"model/vocab": {}, "model/merges": [], "added_tokens": []},
        "makes 0 tokens of the text",
    ),
    ("broken regex", TOKENIZER, {"pre_tokenizer": split("(")}, NO_TOKENIZER),
    (
        "regex that explodes",
        TOKENIZER,
        {"pre_tokenizer": split(EXPLODING)},
        "its tokenizer fails on plain text: Onig: Regex search error",
    ),
]
# The one file that the index names for all tensors.
PLACED = [
    ("path upwards", "../../../../etc/x.safetensors", "leads out of"),
    ("absolute path", "/etc/passwd.safetensors", "leads out of"),
    ("path to what is no safetensors", "/etc/passwd", "expected a safetensors file"),
    ("path with a NUL", "a\0.safetensors", "expected a safetensors file"),
]
# A tensor in a directory with one weight file, and its values.
STORED = [
    ("NaN weight", EMBED, with_one(np.nan), "model.embed_tokens.weight holds a weight that is"),
    ("infinite bfloat16", NORM, np.full(64, np.inf, ml_dtypes.bfloat16), "model.norm.weight holds a weight that is"),
    (
        "weight that overflows",
        EMBED,
        np.full((tiny.VOCAB, tiny.HIDDEN), 3e38, np.float32),
        "its weights are so large that logits are not finite",
    ),
    ("tensor of another family", EVIL, np.zeros(3, np.float32), "which a llama model does not have"),
]


CHANGES = [
    ("config of a gigabyte", sparse_config, "config.json has 1073741824 bytes, expected at most 16777216"),
    ("cut off", cut_off, f"{SHARD} is {NOT_WHOLE}"),
    ("tensor in two shards", copied_shard, "which model-1.safetensors has too"),
    ("missing shard", missing_shard, "model-1.safetensors does not exist"),
    ("no weights", no_weights, "holds no safetensors"),
    ("tokenizer missing", no_tokenizer, "tokenizer.json does not exist"),
]

# Each table, and the function that makes a source from the middle columns of a row.
TABLES = {
    "places": (itself, PLACES),
    "fifos": (replaced_by_fifo, FIFOS),
    "links": (leads_out, LINKS),
    "files": (written, WRITTEN),
    "config": (config, ENTRIES),
    "JSON": (json_entries, JSON),
    "safetensors headers": (header, HEADERS),
    "index": (placed, PLACED),
    "tensors": (stored, STORED),
    "changes": (hugging_face, CHANGES),
}
# The tables of sources that claim to be far larger than they are.
LYING = {
    "lying config": (config, LYING_ENTRIES),
    "lying safetensors headers": (header, LYING_HEADERS),
    "lying lengths": (header_length, LYING_LENGTHS),
}
