"""Writes Hugging Face directories of the shapes of published models: python -m tests.sizes.random_safetensors.

As `random_gguf`, with weights in bfloat16, in one file, of which a part is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model_export.sources.hugging_face.read import LAYER_NAMES, MODEL_NAMES
from tests.sizes.random_gguf import DEVIATION, SEED, SHAPES, Shape, vocabulary

NAMES = {short: long for long, short in {**MODEL_NAMES, **LAYER_NAMES}.items()}
WEIGHTS_AT_ONCE = 1 << 22


def write(shape: Shape, directory: Path) -> None:
    """Writes a model of `shape` into the new directory."""
    directory.mkdir()
    tensors = {_name(name): sides for name, sides in shape.tensors()}
    header, end = {}, 0
    for name, sides in tensors.items():
        begin, end = end, end + 2 * math.prod(sides)
        header[name] = {"dtype": "BF16", "shape": sides, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    rng = np.random.Generator(np.random.SFC64(SEED))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, sides in tensors.items():
            count, mean = math.prod(sides), float("norm" in name)
            for start in range(0, count, WEIGHTS_AT_ONCE):
                values = rng.standard_normal(min(WEIGHTS_AT_ONCE, count - start), np.float32)
                values = values * np.float32(DEVIATION) + np.float32(mean)
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())
    special = [shape.family.bos, shape.family.eos]
    (directory / "config.json").write_text(json.dumps(_config(shape, shape.vocabulary - len(special))))
    _tokenizer(shape, special).save(str(directory / "tokenizer.json"))


def _name(name: str) -> str:
    """The name in Hugging Face's files of a tensor with that name in GGUF files."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("blk."):
        return f"{NAMES[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


def _config(shape: Shape, bos: int) -> dict[str, object]:
    return {
        "model_type": shape.family.architecture,
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.family.norm_epsilon,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": bos,
        "eos_token_id": bos + 1,
    }


def _tokenizer(shape: Shape, special: list[str]) -> Tokenizer:
    tokens, merges = vocabulary(shape.vocabulary - len(special))
    ids = {token: index for index, token in enumerate(tokens + special)}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def main() -> None:
    """Writes the directory that the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sizes.random_safetensors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    options = parser.parse_args()
    write(SHAPES[options.shape], options.path)


if __name__ == "__main__":
    main()
