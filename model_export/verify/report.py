"""Shows the measured quality of an export on the terminal."""

from __future__ import annotations

from service.manifest import Manifest
from service.quality import Measures, Quality

MIB = 1 << 20


def summary(quality: Quality) -> str:
    """The divergences and errors of an export in one line."""
    return (
        f"KL {quality.kl:.5f} nats/token in prefill, {quality.decode_kl:.5f} in decode, "
        f"logit error mean {quality.mean_logit_error:.4f} max {quality.max_logit_error:.4f}"
    )


def table(described: Manifest) -> str:
    """The form of an export, the size, perplexity and speed of source and export, and how far apart they are."""
    quality, quantization = described.quality, described.quantization
    heading = (
        f"{quantization.weights} matrices, {quantization.activations} activations, {described.computed_by}; "
        f"over {quality.tokens} tokens:"
    )
    columns = [("", f"source ({quantization.source})", "export")]
    columns += zip(
        ("size", "perplexity", "prefill", "decode"), *map(_cells, (quality.source, quality.export)), strict=True
    )
    rows = [f"  {name:<12}{source:>20}{export:>20}" for name, source, export in columns]
    return "\n".join([heading, *rows, f"  {summary(quality)}"])


def _cells(measures: Measures) -> tuple[str, str, str, str]:
    generated = measures.generated_per_second
    return (
        f"{measures.bytes / MIB:.1f} MiB",
        f"{measures.perplexity:.3f}",
        f"{measures.read_per_second:.0f} tokens/s",
        "-" if generated is None else f"{generated:.0f} tokens/s",
    )
