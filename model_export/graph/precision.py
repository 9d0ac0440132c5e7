"""The form in which a model's matrices are stored, and the type in which everything else is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model_export.errors import ExportError
from model_export.graph.quantize import PLAIN_FORMS, Activations, Form

# The values of --quantization: what becomes of weights, and of which sources exactly.
FORMS: Mapping[Form | Literal["auto"], tuple[str, str]] = {
    "auto": ("`int8`; for GPUs `int4` for sources in Q4_0, and `float16` for all others", "-"),
    "int8": ("8-bit blocks; 4-bit blocks keep their steps, and their offsets are rounded to 1/16 of one", "Q4_0, Q8_0"),
    "int4": ("4-bit blocks; all matrices but the exact ones are rounded to 4 bits", "Q4_0"),
    "float16": ("not quantized, in float16", "float16"),
    "float32": ("not quantized", "all"),
}

# The device that a model is exported for.
TargetDevice = Literal["cpu", "cuda"]

# The operators of a graph: onnxruntime's, or our own. The option may leave the choice to the exporter.
Kernels = Literal["stock", "own"]
KernelsOption = Literal["auto", "own", "stock"]

# The largest allowed KL divergence from the source, in nats per token. Rounding weights to 4 bits loses the most.
MAX_KL = 0.005
MAX_KL_INT4 = 0.1


@dataclass(frozen=True)
class Precision:
    """The form of the matrices, the type of activations and KV cache, and whose kernels compute with them.

    With own kernels matrices are the source's own blocks, of 4 or 8 bits, and `kv` is the type of the KV cache;
    otherwise it has that of the activations. `rounded_to_4_bits`: matrices lose much by their form.
    """

    form: Form
    activations: Activations
    kernels: Kernels = "stock"
    kv: Activations | None = None
    rounded_to_4_bits: bool = False

    @property
    def kv_type(self) -> Activations:
        """The type of the KV cache."""
        return self.kv or self.activations

    @property
    def max_kl(self) -> float:
        """The default of --max-kl: the largest allowed divergence from the source, in nats per token."""
        return MAX_KL_INT4 if self.rounded_to_4_bits else MAX_KL

    @property
    def pads_lone_row(self) -> bool:
        """Whether a lone row has kernels of its own, so that its bits are not those that it has among others.

        8-bit blocks with 8-bit activations have one kernel for any number of rows, and so have our own.
        """
        if self.kernels == "own" or self.form in PLAIN_FORMS:
            return False
        return self.form == "int4" or self.activations == "float16"


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
        for_gpu: Form = "int4" if source_weights == "Q4_0" else "float16"
        form = for_gpu if device == "cuda" else "int8"
    if form in ("float32", "float16"):
        if activations not in ("auto", form):
            raise ExportError(
                f"--quantization {form} computes in {form}; --activations {activations} goes with int8 and int4"
            )
        return Precision(form, form)
    if activations == "auto":
        activations = "float16" if device == "cuda" else "float32"
    return Precision(form, activations, rounded_to_4_bits=form == "int4" and source_weights != "Q4_0")


def precision_of_own_kernels(source_weights: str, kv: Activations | Literal["auto"]) -> Precision:
    """The same for own kernels, with the type `kv` of the KV cache."""
    blocks: Form = "int4" if source_weights in ("Q4_0", "Q4_1") else "int8"
    return Precision(blocks, "float32", "own", "float16" if kv == "auto" else kv)
