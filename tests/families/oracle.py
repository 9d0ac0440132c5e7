"""Tiny random models of a family, made and computed by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.family import Family
from tests.families.vocabularies import BOS, EOS, tokenizer


def make(family: Family, directory: Path) -> Path:
    """Writes a Hugging Face directory of the family, its weights large enough that a wrong graph gives other logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    vocabulary = tokenizer(family.tokenizer, family.add_bos)
    special = {"bos_token_id": vocabulary.token_to_id(BOS), "eos_token_id": vocabulary.token_to_id(EOS)}
    settings = special | {"pad_token_id": None} | family.settings
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # scales of 1 or 0 and biases of 0 would not reveal a mistake
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token=BOS, eos_token=EOS, add_bos_token=family.add_bos
    ).save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Continuation:
    """A prompt's tokens and its greedy continuation; `logprobs` [tokens - 1, vocab] are those of each but the first."""

    tokens: list[int]
    logprobs: np.ndarray


class Oracle:
    """transformers' model of a Hugging Face directory, in float32 and without a KV cache."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def ids(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(self._tokenizer(text).input_ids)

    def continuation(self, prompt: list[int], count: int) -> Continuation:
        """The prompt and the `count` likeliest tokens after it, one by one."""
        import torch

        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
                tokens.append(int(logits[-1].argmax()))
        return Continuation(tokens, torch.log_softmax(logits, -1).numpy())
