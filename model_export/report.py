"""What an export came out as, beside its source, for the person at the terminal."""

from __future__ import annotations

from service.manifest import Manifest, Measures

MIB = 1 << 20


def table(described: Manifest) -> str:
    """The form of an export and how far it is from its source, and under that size, perplexity and speed of both."""
    quality, quantization = described.quality, described.quantization
    if quality.source is None or quality.export is None:
        raise ValueError("the manifest holds no report")
    lines = [
        f"{quantization.weights} matrices, {quantization.activations} activations, "
        f"{quantization.prompts or 'no'} graph for prompts; over {quality.tokens} tokens:"
    ]
    columns = [("", f"source ({quantization.source})", "export")]
    columns += zip(
        ("size", "perplexity", "reading", "generating"), *map(_cells, (quality.source, quality.export)), strict=True
    )
    lines += [f"  {name:<12}{source:>20}{export:>20}" for name, source, export in columns]
    lines.append(
        f"  KL {quality.kl:.5f} nats/token ({quality.prompt_kl:.5f} prompts, {quality.decode_kl:.5f} decoding), "
        f"logit error mean {quality.mean_logit_error:.4f} max {quality.max_logit_error:.4f}"
    )
    return "\n".join(lines)


def _cells(measures: Measures) -> tuple[str, str, str, str]:
    generated = measures.generated_per_second
    return (
        f"{measures.bytes / MIB:.1f} MiB",
        f"{measures.perplexity:.3f}",
        f"{measures.read_per_second:.0f} tokens/s",
        "-" if generated is None else f"{generated:.0f} tokens/s",
    )
