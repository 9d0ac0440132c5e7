"""What llama.cpp says of texts: python llama_cpp.py MODEL.gguf < texts.json, in an environment with cyllama.

Reads a JSON list of texts. Writes a JSON list with, for each text, the ids of its tokens, and the log probability of
each token after the first one.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from cyllama.llama import llama_cpp

CONTEXT = 1024


class Model(llama_cpp.LlamaModel):
    """With an attribute that cyllama's contexts read, and its models lack."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def main() -> None:
    llama_cpp.disable_logging()
    model = Model(sys.argv[1], llama_cpp.LlamaModelParams())
    print(json.dumps([scored(model, text) for text in json.load(sys.stdin)]))


def scored(model: Model, text: str) -> dict[str, list[float]]:
    """The tokens of one text, with special tokens added as the file says, and their log probabilities."""
    ids = model.get_vocab().tokenize(text, add_special=True, parse_special=False)
    parameters = llama_cpp.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    context = llama_cpp.LlamaContext(model, parameters)
    batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for position, token in enumerate(ids):
        batch.add(token, position, [0], True)
    context.decode(batch)
    rows = [np.array(context.get_logits_ith(position), np.float64) for position in range(len(ids) - 1)]
    logprobs = [
        float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
        for row, token in zip(rows, ids[1:], strict=True)
    ]
    return {"ids": ids, "logprobs": logprobs}


if __name__ == "__main__":
    main()
