"""stub"""
from __future__ import annotations
from collections.abc import Callable
from typing import Any
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from model_export.checkpoint import Vocabulary

def read_vocabulary(get: Callable[..., Any], require: Callable[[str], Any]) -> Vocabulary:
    tokens = require("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in require("tokenizer.ggml.merges")]
    t = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(tokens)}, merges=merges))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x, k in zip(tokens, require("tokenizer.ggml.token_type")) if k == 3])
    return Vocabulary(t, 1, False, (0, 2))
