"""What the arithmetic of 8-bit activations costs: our own kernels and llama.cpp, on the same file and text."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.client import PeerError
from bench.peers import Setup
from bench.processes import optional_package
from bench.report import Figure, Outcome
from model_export.opening import read_source
from model_export.sources.weights import Floats
from model_export.verify.runner import Runner
from model_export.verify.verify import kl_divergence, verification_tokens
from service import manifest

OURS = "our service's graph"
THEIRS = "llama.cpp, same GGUF"


def measure(setup: Setup, options: Namespace) -> dict[str, Outcome]:
    """The mean KL divergence from the logits of the file's own weights in float arithmetic, by engine.

    Raises PeerError where llama.cpp is missing as a library.
    """
    source = read_source(setup.weights)
    tokens = verification_tokens(source, options.prompt_tokens)
    expected = source.logits(tokens, lambda: None)
    is_own = manifest.load(setup.model_dir).kernels == "own"
    runner = Runner(setup.model_dir / manifest.MODEL_FILE, len(tokens), own_kernels=is_own)
    logits = {OURS: runner.logits(tokens, [len(tokens)]), THEIRS: _llama_cpp(setup.weights, tokens, setup.threads)}
    return {
        name: Outcome(
            [
                Figure(
                    f"KL to float arithmetic, {len(tokens)} tokens", kl_divergence(expected, rows), "nats/token", "less"
                )
            ]
        )
        for name, rows in logits.items()
    }


def _llama_cpp(weights: Path, tokens: NDArray[np.int64], threads: int) -> Floats:
    """The logits [tokens, vocabulary] of llama.cpp, all tokens in one batch, with its KV cache in float16."""
    library: Any = optional_package("cyllama.llama.llama_cpp", "llama.cpp as a library, cyllama,")
    library.disable_logging()
    # Contexts read an attribute of the model that models of this version lack.
    model = type("Model", (library.LlamaModel,), {"n_vocab": property(lambda self: self.get_vocab().n_vocab)})(
        str(weights), library.LlamaModelParams()
    )
    parameters = library.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(tokens)
    parameters.n_threads = parameters.n_threads_batch = threads
    context = library.LlamaContext(model, parameters)
    batch = library.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for position, token in enumerate(tokens.tolist()):
        batch.add(token, position, [0], True)
    context.decode(batch)
    rows = np.array([context.get_logits_ith(position) for position in range(len(tokens))], np.float32)
    if not np.isfinite(rows).all():
        raise PeerError("llama.cpp gave no finite logits")
    return rows
