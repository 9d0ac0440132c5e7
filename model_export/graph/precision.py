"""In which form a model's matrices are stored, and in which type all else is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model_export.errors import ExportError
from model_export.graph.quantize import PLAIN_FORMS, Activations, Form

# What a model is to run on.
Device = Literal["cpu", "cuda"]

# Nats per token that an export may be off its source. Rounding anew to 4 bits is never as close as the others.
MAX_KL = 0.005
MAX_KL_INT4 = 0.1


@dataclass(frozen=True)
class Precision:
    """The form of the matrices and the type of activations, keys and values."""

    form: Form
    activations: Activations

    @property
    def max_kl(self) -> float:
        """The divergence from the source that is allowed unless the user says otherwise, in nats per token."""
        return MAX_KL_INT4 if self.form == "int4" else MAX_KL

    @property
    def min_rows(self) -> int:
        """The fewest rows of a call with which none takes a kernel for one row alone.

        8-bit blocks and 8-bit activations have one kernel for any number.
        """
        if self.form in PLAIN_FORMS or (self.form == "int8" and self.activations == "float32"):
            return 1
        return 2

    @property
    def min_logits(self) -> int:
        """The same for the positions that get logits. With float32 activations the output table has one kernel."""
        return 2 if self.activations == "float16" and self.form not in PLAIN_FORMS else 1


def choose_precision(
    form: Form | Literal["auto"],
    activations: Activations | Literal["auto"],
    source_weights: str,
    device: Device = "cpu",
) -> Precision:
    """What `auto` means on a device for a source whose matrices are of the form `source_weights`.

    Raises ExportError where form and activations do not go together.
    """
    if form == "auto":
        plain: Form = "float16" if device == "cuda" else "int8"
        form = "int4z" if source_weights in ("Q4_0", "Q4_1") else plain
    own: Activations | None = form if form in ("float32", "float16") else None
    if own is not None and activations not in ("auto", own):
        raise ExportError(
            f"--quantization {own} computes in {own}; --activations {activations} goes with int8, int4 and int4z"
        )
    usual: Activations = "float16" if device == "cuda" else "float32"
    return Precision(form, own or (usual if activations == "auto" else activations))
