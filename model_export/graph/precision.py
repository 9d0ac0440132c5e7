"""The form in which a model's matrices are stored, and the type in which everything else is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model_export.errors import ExportError
from model_export.graph.quantize import PLAIN_FORMS, Activations, Form

# The values of --quantization: what becomes of weights, and of which sources exactly.
FORMS: Mapping[Form | Literal["auto"], tuple[str, str]] = {
    "auto": ("`int4-int8` for 4-bit sources, `int8` for all others; for GPUs `float16` in place of `int8`", "-"),
    "int4-int8": (
        "4-bit blocks exactly, with an integer zero point, and the rest of the exact zero point as a stored remainder; "
        "8 bits for matrices that are not in 4-bit blocks",
        "Q4_0, Q4_1",
    ),
    "int4": ("the same for 4-bit blocks; all other matrices are rounded to 4 bits", "Q4_0, Q4_1"),
    "int8": ("8 bits", "Q8_0"),
    "float16": ("not quantized, in float16", "float16"),
    "float32": ("not quantized", "all"),
}

# The device that a model is exported for.
TargetDevice = Literal["cpu", "cuda"]

# The operators of a graph: onnxruntime's, or our own.
Kernels = Literal["stock", "own"]

# The largest allowed KL divergence from the source, in nats per token. Rounding weights to 4 bits loses the most.
MAX_KL = 0.005
MAX_KL_INT4 = 0.1


@dataclass(frozen=True)
class Precision:
    """The form of the matrices, the type of activations and KV cache, and whose kernels compute with them.

    With own kernels matrices are the source's own blocks, and `kv` is the type of the KV cache; otherwise it has that
    of the activations.
    """

    form: Form
    activations: Activations
    kernels: Kernels = "stock"
    kv: Activations | None = None

    @property
    def kv_type(self) -> Activations:
        """The type of the KV cache."""
        return self.kv or self.activations

    @property
    def max_kl(self) -> float:
        """The default of --max-kl: the largest allowed divergence from the source, in nats per token."""
        return MAX_KL_INT4 if self.form == "int4" else MAX_KL

    @property
    def min_rows(self) -> int:
        """The fewest rows of a call that avoid the kernels for a single row.

        8-bit blocks with 8-bit activations have one kernel for any number of rows, and so have our own.
        """
        if self.kernels == "own" or self.form in PLAIN_FORMS or (self.form == "int8" and self.activations == "float32"):
            return 1
        return 2

    @property
    def min_logits(self) -> int:
        """The same for positions that get logits. With float32 activations the output matrix has one kernel for all."""
        return 2 if self.activations == "float16" and self.form not in PLAIN_FORMS else 1


def choose_precision(
    form: Form | Literal["auto"],
    activations: Activations | Literal["auto"],
    source_weights: str,
    device: TargetDevice = "cpu",
) -> Precision:
    """Replaces `auto` by the best choice for the device and for a source whose matrices have the form `source_weights`.

    Raises ExportError where form and activations cannot be combined.
    """
    if form == "auto":
        plain: Form = "float16" if device == "cuda" else "int8"
        form = "int4-int8" if source_weights in ("Q4_0", "Q4_1") else plain
    if form in ("float32", "float16"):
        if activations not in ("auto", form):
            raise ExportError(
                f"--quantization {form} computes in {form}; "
                f"--activations {activations} goes with int8, int4 and int4-int8"
            )
        return Precision(form, form)
    if activations == "auto":
        activations = "float16" if device == "cuda" else "float32"
    return Precision(form, activations)


def precision_of_own_kernels(
    form: Form | Literal["auto"],
    activations: Activations | Literal["auto"],
    source_weights: str,
    device: TargetDevice,
    kv: Activations | Literal["auto"],
) -> Precision:
    """The same for own kernels, with the type `kv` of the KV cache. Raises ExportError for what they do not have."""
    if device != "cpu":
        raise ExportError(f"--kernels own has no kernels for --device {device}, only for cpu")
    if form != "auto":
        raise ExportError(f"--kernels own keeps the source's blocks as they are, so it has no --quantization {form}")
    if activations == "float16":
        raise ExportError("--kernels own computes in float32, so it has no --activations float16")
    blocks: Form = "int4-int8" if source_weights in ("Q4_0", "Q4_1") else "int8"
    return Precision(blocks, "float32", "own", "float16" if kv == "auto" else kv)
