"""A call of a graph: its shape, and its inputs in memory that onnxruntime reads in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.engine.ort.device import Block, Device

# Inputs start at multiples of this in their block, in bytes: enough for any type on any device.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a call, with its padding.

    `rows` slots from `first_slot` on, each with `width` tokens; `logits` positions of them get logits.
    """

    first_slot: int
    rows: int
    width: int
    logits: int

    @property
    def decodes(self) -> bool:
        """Whether this has the shape of a decode step, which recurs: one token for each slot from 0 on."""
        return self.first_slot == 0 and self.width == 1


@dataclass(frozen=True, slots=True)
class Call:
    """The inputs of one call, at fixed addresses.

    `graph` is the number under which a GPU captures and replays the call; None if it is never captured. Without
    `query_seqlens` every token of every row counts.
    """

    binding: Any
    graph: int | None
    inputs: Block
    input_ids: npt.NDArray[np.int64]
    logits_idx: npt.NDArray[np.int64]
    seqlens_k: npt.NDArray[np.int32]
    query_seqlens: npt.NDArray[np.int32] | None
    total_sequence_length: npt.NDArray[np.int32]


def bind_inputs(device: Device, binding: Any, sizes: dict[str, Any]) -> tuple[Block, dict[str, npt.NDArray[Any]]]:
    """Binds inputs of these shapes and types in one block, which one copy sends to the device.

    Returns the block and the host's view of each input. The caller releases the block.
    """
    places, end = {}, 0
    for name, (shape, dtype) in sizes.items():
        places[name] = slice(end, end + math.prod(shape) * np.dtype(dtype).itemsize)
        end = -(-places[name].stop // _ALIGNMENT) * _ALIGNMENT
    block, views = device.block(end), {}
    try:
        for name, (shape, dtype) in sizes.items():
            binding.bind_input(name, device.type, device.index, dtype, shape, block.address + places[name].start)
            views[name] = block.host[places[name]].view(dtype).reshape(shape)
    except BaseException:
        device.release(block)
        raise
    return block, views
