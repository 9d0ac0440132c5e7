"""What an export came out as, beside its source, for the person at the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from service.manifest import Manifest, Measures, Quality

MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """How far the exported model is from its source, over the positions of `tokens` tokens.

    `kl` is the mean Kullback-Leibler divergence from the source's next-token distribution, in nats per token, by the
    graph that generates; `prompt_kl` is that by the graph that reads prompts, and `decode_kl` that for the last tokens,
    generated one by one behind such a prompt. Errors are differences of logits, by the graph that generates. Speeds are
    in tokens a second; the source's is that of its own logits in float32.
    """

    tokens: int
    kl: float
    prompt_kl: float
    decode_kl: float
    mean_logit_error: float
    max_logit_error: float
    source_perplexity: float
    perplexity: float
    source_read_per_second: float
    read_per_second: float
    generated_per_second: float

    def quality(self, source_bytes: int, export_bytes: int) -> Quality:
        """The report as the manifest keeps it, with the sizes of source and export."""
        return Quality(
            kl=self.kl,
            max_logit_error=self.max_logit_error,
            tokens=self.tokens,
            prompt_kl=self.prompt_kl,
            decode_kl=self.decode_kl,
            mean_logit_error=self.mean_logit_error,
            source=Measures(
                bytes=source_bytes,
                perplexity=self.source_perplexity,
                read_per_second=self.source_read_per_second,
                generated_per_second=None,
            ),
            export=Measures(
                bytes=export_bytes,
                perplexity=self.perplexity,
                read_per_second=self.read_per_second,
                generated_per_second=self.generated_per_second,
            ),
        )

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} nats/token ({self.prompt_kl:.5f} prompts, {self.decode_kl:.5f} decoding), "
            f"logit error mean {self.mean_logit_error:.4f} max {self.max_logit_error:.4f}, over {self.tokens} tokens"
        )


def table(described: Manifest) -> str:
    """The form of an export and how far it is from its source, and under that size, perplexity and speed of both."""
    quality, quantization = described.quality, described.quantization
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
