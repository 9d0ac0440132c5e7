"""The command line: python -m model_export SOURCE DIRECTORY."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.graph.precision import FORMS, MAX_KL, MAX_KL_INT4
from model_export.progress import progress
from model_export.supported import help_text
from model_export.verify.report import table
from model_export.verify.verify import FEWEST_TOKENS, MAX_TOKENS, MIN_TOKENS

LONGEST_MESSAGE = 1000


def main(arguments: list[str] | None = None) -> int:
    """Exports a model. Returns 0 on success, 2 when source or destination cannot be used, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        described = export(
            options.source,
            options.directory,
            Options(
                id=options.id,
                aliases=tuple(options.alias),
                owned_by=options.owned_by,
                quantization=options.quantization,
                activations=options.activations,
                device=options.device,
                kernels=options.kernels,
                kv_cache=options.kv_cache,
                max_kl=options.max_kl,
                verify_tokens=options.verify_tokens,
                fim_order=options.fim_order,
                overwrite=options.overwrite,
            ),
            progress,
            lambda sentence: print(f"model_export: {_printable(sentence)}", file=sys.stderr),
        )
    except (ExportError, OSError, MemoryError) as error:
        print(f"model_export: {_sentence(error, options.directory)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("model_export: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.directory}: {table(described)}")
    return 0


def _sentence(error: ExportError | OSError | MemoryError, directory: Path) -> str:
    """The error in one printable line, even where it quotes names from a damaged source."""
    if isinstance(error, OSError):
        message = f"{error.filename or directory}: {error.strerror or error}"
    elif isinstance(error, MemoryError):
        message = f"not enough memory {error}".rstrip()
    else:
        message = str(error)
    return _printable(message)


def _printable(message: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in message)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m model_export",
        description="Exports a language model to ONNX.",
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a GGUF file, a Hugging Face directory, or a model's name on the hub: owner/name, owner/name@revision, or "
        "owner/name:Q4_K_M with the form of a GGUF file",
    )
    parser.add_argument("directory", type=Path, help="the model directory to write")
    parser.add_argument("--id", help="the model's id; the source's name without its quantization by default")
    parser.add_argument("--alias", action="append", default=[], help="a further name to serve it by; may be repeated")
    parser.add_argument("--owned-by", help="who owns the model; the source's organization by default")
    parser.add_argument(
        "--quantization",
        choices=tuple(FORMS),
        default="auto",
        help="form of the matrices of a graph over stock kernels; auto uses 8 bits (%(default)s)",
    )
    parser.add_argument(
        "--activations",
        choices=("auto", "float16", "float32"),
        default="auto",
        help="type of activations and KV cache; auto uses float16 with float16 matrices, float32 with all others; a "
        "float16 graph has only operators that GPUs have too",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="the device to export for; with cuda, auto uses float16 matrices (Q4_0 stays in 4 bits) and float16 "
        "activations, and a graph that an NVIDIA GPU has no kernel for is refused (%(default)s)",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "own", "stock"),
        default="auto",
        help="whose operators compute: onnxruntime's (stock), or our own, which are faster, for CPUs with AVX2 and "
        "models of Llama's plain architecture in blocks of Q4_0, Q4_1 or Q8_0; auto uses our own wherever they compute "
        "the model, and says why where they do not (%(default)s)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("auto", "float16", "float32"),
        default="auto",
        help="type of the KV cache with own kernels; auto uses float16",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        help=f"largest allowed KL divergence from the source in nats per token ({MAX_KL}; int4 {MAX_KL_INT4})",
    )
    parser.add_argument(
        "--verify-tokens",
        type=int,
        metavar="N",
        help=f"how many tokens of text to compare the model with its source on, at least {MIN_TOKENS}; {MAX_TOKENS} by "
        f"default, and fewer, at least {FEWEST_TOKENS}, above 2 billion weights",
    )
    parser.add_argument(
        "--fim-order",
        choices=("auto", "psm", "spm"),
        default="auto",
        help="order of a prompt for filling in the middle: prefix, suffix, middle (psm) or suffix, prefix, middle "
        "(spm); auto follows from the names of the tokens",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model directory if it exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
