"""The same model in plain numpy float32, the reference for exported graphs; shares no code with the graph builder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model_export.sources.checkpoint import Checkpoint, LayerAttention
from model_export.sources.rotary import Rotary
from model_export.sources.weights import Floats, dequantize


def reference_logits(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    on_layer: Callable[[], object],
    positions: NDArray[np.int64] | None = None,
) -> Floats:
    """The logits [positions, vocab] after those of `tokens` [tokens], one text, that `positions` names; all by default.

    A few rows of a matrix are in memory at a time.
    """
    architecture = checkpoint.architecture
    hidden = _embedded(checkpoint, tokens) * np.float32(architecture.embedding_scale)
    for layer, attention in enumerate(architecture.attention):
        prefix = f"blk.{layer}."
        attended = _attention(checkpoint, prefix, hidden, attention)
        hidden = hidden + _post_norm(checkpoint, prefix + "post_attention_norm", attended)
        hidden = hidden + _post_norm(checkpoint, prefix + "post_ffw_norm", _mlp(checkpoint, prefix, hidden))
        on_layer()
    if positions is not None:
        hidden = hidden[positions]
    head = "token_embd" if architecture.tied_embedding else "output"
    return _linear(checkpoint, head, _rms_norm(checkpoint, "output_norm", hidden))


def _embedded(checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> Floats:
    table = checkpoint.tensor("token_embd.weight")
    hidden = np.empty((len(tokens), table.shape[1]), np.float32)
    for rows in table.parts():
        here = (rows.start <= tokens) & (tokens < rows.stop)
        hidden[here] = dequantize(table.read(rows))[tokens[here] - rows.start]
    return hidden


def _attention(checkpoint: Checkpoint, prefix: str, hidden: Floats, attention: LayerAttention) -> Floats:
    architecture = checkpoint.architecture
    normed = _rms_norm(checkpoint, prefix + "attn_norm", hidden)
    query, key, value = (
        _linear(checkpoint, prefix + f"attn_{part}", normed).reshape(len(hidden), -1, architecture.head_dim)
        for part in "qkv"
    )
    if architecture.family.qk_norm:
        query = _rms_norm(checkpoint, prefix + "attn_q_norm", query)
        key = _rms_norm(checkpoint, prefix + "attn_k_norm", key)
    if (rotary := architecture.rotation(attention)) is not None:
        query, key = (_rotate(vectors, rotary) for vectors in (query, key))
    group = architecture.heads // architecture.kv_heads
    distance = np.arange(len(hidden))[:, None] - np.arange(len(hidden))
    masked = (distance < 0) | (distance >= (attention.window or len(hidden)))
    mixed = np.empty_like(query)
    for head in range(architecture.heads):
        scores = query[:, head] @ key[:, head // group].T / np.float32(np.sqrt(architecture.score_divisor))
        mixed[:, head] = _softmax(np.where(masked, -np.inf, scores)) @ value[:, head // group]
    return _linear(checkpoint, prefix + "attn_output", mixed.reshape(len(hidden), -1))


def _mlp(checkpoint: Checkpoint, prefix: str, hidden: Floats) -> Floats:
    normed = _rms_norm(checkpoint, prefix + "ffn_norm", hidden)
    gate = _linear(checkpoint, prefix + "ffn_gate", normed)
    up = _linear(checkpoint, prefix + "ffn_up", normed)
    activated = _gelu(gate) if checkpoint.architecture.family.gelu else gate / (1 + np.exp(-gate))
    return _linear(checkpoint, prefix + "ffn_down", activated * up)


def _gelu(values: Floats) -> Floats:
    """GELU in its approximation by tanh."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (values + np.float32(0.044715) * values**3)
    return np.asarray(values / 2 * (1 + np.tanh(inner)), np.float32)


def _linear(checkpoint: Checkpoint, name: str, values: Floats) -> Floats:
    (product,) = checkpoint.tensor(f"{name}.weight").joined(lambda part: [values @ dequantize(part).T], axis=1)
    bias = f"{name}.bias"
    return product + checkpoint.floats(bias) if bias in checkpoint.tensors else product


def _post_norm(checkpoint: Checkpoint, name: str, values: Floats) -> Floats:
    return _rms_norm(checkpoint, name, values) if checkpoint.architecture.family.post_norms else values


def _rms_norm(checkpoint: Checkpoint, name: str, values: Floats) -> Floats:
    mean_square = np.mean(np.square(values), axis=-1, keepdims=True)
    scale = np.sqrt(mean_square + np.float32(checkpoint.architecture.norm_epsilon))
    return np.asarray(values / scale * checkpoint.floats(f"{name}.weight"), np.float32)


def _rotate(vectors: Floats, rotary: Rotary) -> Floats:
    """Rotates each pair of `vectors` [position, head, head_dim] by its position times its frequency.

    The first 2 x pairs numbers of a head rotate, number i together with number i + pairs; the rest stays.
    """
    pairs = len(rotary.frequencies)
    angles = np.arange(len(vectors))[:, None, None] * rotary.frequencies
    first, second, rest = np.split(vectors, [pairs, 2 * pairs], axis=-1)
    cosine, sine = ((rotary.scale * function(angles)).astype(np.float32) for function in (np.cos, np.sin))
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)
