"""The pipeline: read a source, build its graph, write the model directory, verify it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from model_export import cuda
from model_export.decoder_source import DecoderSource
from model_export.errors import ExportError, TooFarError
from model_export.gguf_source import read_gguf
from model_export.hf_source import read_hugging_face
from model_export.initializers import Initializers
from model_export.operators import LinearForm
from model_export.quantize import Activations, Form
from model_export.source import Source
from model_export.verify import Report, verify
from service import manifest
from service.processor import has_byte_dot_products

PromptForm = Literal["int8", "float32"]

# Above this size of its matrices a second graph for prompts takes more memory than its speed is worth.
PROMPT_GRAPH_BYTES = 2 << 30
BYTES_PER_WEIGHT: dict[PromptForm, int] = {"int8": 1, "float32": 4}
FILL_IN_THE_MIDDLE = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)

Progress = Callable[[str, int], Callable[[], object]]


@dataclass(frozen=True)
class Options:
    """What the user chose; see `python -m model_export --help`."""

    id: str | None = None
    aliases: tuple[str, ...] = ()
    owned_by: str | None = None
    quantization: Form | Literal["auto"] = "auto"
    activations: Activations | Literal["auto"] = "auto"
    prompts: Literal["auto", "int8", "float32", "none"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    max_kl: float = 0.005
    overwrite: bool = False


def export(path: Path, directory: Path, options: Options, progress: Progress) -> Report:
    """Exports the source at `path` into the model directory `directory`, which appears whole or not at all.

    Raises ExportError when the source cannot be exported faithfully, or `directory` exists and may not be replaced.
    """
    _check_destination(directory, options.overwrite)
    source = read_source(path)
    form = _form(options.quantization, source, options.device)
    activations = _activations(options.activations, form, options.device)
    with _written_at_once(directory) as work:
        layers = source.dimensions.layers
        model = work / manifest.MODEL_FILE
        with Initializers(work / manifest.WEIGHTS_FILE, activations) as data:
            graph = source.build(form, data, progress("building", layers))
            if options.device == "cuda":
                cuda.add_shortlist(graph)
            lacking = cuda.unsupported(graph)
            if lacking and options.device == "cuda":
                raise ExportError(f"CUDA cannot run the graph: {'; '.join(lacking)}")
            ir.save(graph, model)
        source.vocabulary.tokenizer.save(str(work / manifest.TOKENIZER_FILE))
        prompts, report = _add_prompt_graph(source, form, activations, options, work, progress)
        described = _manifest(source, form, activations, prompts, report, options=options, directory=work)
        described.model_copy(update={"devices": ("cpu",) if lacking else ("cpu", "cuda")}).write(work)
    return report


def _add_prompt_graph(
    source: Source, form: Form, activations: Activations, options: Options, work: Path, progress: Progress
) -> tuple[PromptForm | None, Report]:
    """Builds the first wanted graph for prompts that is close enough to the source. Gives its form and the report.

    Raises TooFarError when none is, or when it is the generating graph that is too far.
    """
    layers, model = source.dimensions.layers, work / manifest.MODEL_FILE
    forms = _prompt_forms(options.prompts, form, activations, source)
    for prompts in forms:
        graph = work / manifest.PROMPT_MODEL_FILE
        with Initializers(work / manifest.PROMPT_WEIGHTS_FILE) as data:
            matrices: LinearForm = "int8_rows" if prompts == "int8" else "float32"
            on_layer = progress(f"building for prompts, {prompts}", layers)
            ir.save(source.build_for_prompts(matrices, form, data, on_layer), graph)
        try:
            return prompts, verify(source, model, graph, options.max_kl, progress("verifying", layers))
        except TooFarError:
            if prompts == forms[-1]:
                raise
    return None, verify(source, model, None, options.max_kl, progress("verifying", layers))


def _prompt_forms(
    wanted: Literal["auto", "int8", "float32", "none"], form: Form, activations: Activations, source: Source
) -> list[PromptForm]:
    """The forms of a second graph that are worth having beside one whose matrices are of `form`, the quickest first."""
    if wanted in ("int8", "float32") and activations == "float16":
        raise ExportError(
            f"--prompts {wanted} is for float32 activations; give --prompts none or --activations float32"
        )
    if form == "float32" or wanted == "none" or activations == "float16":
        return []
    if wanted != "auto":
        return [wanted]
    weights = source.dimensions.layer_weights
    quick: list[PromptForm] = ["int8", "float32"] if has_byte_dot_products() else ["float32"]
    return [each for each in quick if weights * BYTES_PER_WEIGHT[each] <= PROMPT_GRAPH_BYTES]


def _check_destination(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not overwrite:
        raise ExportError(f"{directory} exists; give --overwrite to replace it")
    if not (directory / manifest.FILE_NAME).is_file():
        raise ExportError(f"{directory} is not a model directory; refusing to replace it")


def read_source(path: Path) -> Source:
    """Opens a GGUF file or a Hugging Face directory."""
    if path.is_file():
        return DecoderSource(read_gguf(path))
    if path.is_dir():
        return DecoderSource(read_hugging_face(path))
    raise ExportError(f"{path} does not exist")


def _form(wanted: Form | Literal["auto"], source: Source, device: Literal["cpu", "cuda"]) -> Form:
    if wanted != "auto":
        return wanted
    if source.weights in ("Q4_0", "Q4_1"):
        return "int4z"
    return "float16" if device == "cuda" else "int8"


def _activations(wanted: Activations | Literal["auto"], form: Form, device: Literal["cpu", "cuda"]) -> Activations:
    """The type in which the graph computes: its matrices' where they are plain, else the device's unless asked for."""
    own: Activations | None = form if form in ("float32", "float16") else None
    if wanted == "auto":
        return own or ("float16" if device == "cuda" else "float32")
    if own not in (None, wanted):
        raise ExportError(f"--quantization {own} computes in {own}; --activations {wanted} is for int8, int4 and int4z")
    return wanted


@contextmanager
def _written_at_once(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its place at the end, or vanishes when anything goes wrong."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    replaced = work.with_name(f"{work.name}.replaced")
    try:
        yield work
        work.chmod(0o755)
        if directory.exists():
            directory.rename(replaced)
        work.rename(directory)
    except BaseException:
        if replaced.exists():
            replaced.rename(directory)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _manifest(
    source: Source,
    form: Form,
    activations: Activations,
    prompts: PromptForm | None,
    report: Report,
    *,
    options: Options,
    directory: Path,
) -> manifest.Manifest:
    dimensions = source.dimensions
    return manifest.Manifest(
        format_version=manifest.FORMAT_VERSION,
        id=options.id or source.name,
        aliases=options.aliases,
        created=int(time.time()),
        owned_by=options.owned_by or source.organization or "unknown",
        architecture=dimensions.family,
        context_length=dimensions.context_length,
        vocab_size=dimensions.vocab_size,
        special_tokens=_special_tokens(source),
        kv=manifest.KVLayout(
            layers=dimensions.layers,
            kv_heads=dimensions.kv_heads,
            head_dim=dimensions.head_dim,
            dtype=activations,
        ),
        quantization=manifest.Quantization(
            weights=form,
            activations=activations,
            prompts=prompts,
            source=source.weights,
            min_rows=2 if form == "int4z" else 1,
        ),
        quality=manifest.Quality(kl=report.kl, max_logit_error=report.max_logit_error, tokens=report.tokens),
        files={path.name: _file_entry(path) for path in sorted(directory.iterdir())},
    )


def _special_tokens(source: Source) -> manifest.SpecialTokens:
    vocabulary = source.vocabulary
    token_id = vocabulary.tokenizer.token_to_id
    end_of_text = token_id("<|endoftext|>")
    return manifest.SpecialTokens(
        bos=vocabulary.bos,
        add_bos=vocabulary.add_bos,
        end=vocabulary.end,
        default_prompt=vocabulary.bos if end_of_text is None else end_of_text,
        fill_in_the_middle=_fill_in_the_middle(token_id),
    )


def _fill_in_the_middle(token_id: Callable[[str], int | None]) -> manifest.FillInTheMiddle | None:
    for names in FILL_IN_THE_MIDDLE:
        prefix, suffix, middle = (token_id(name) for name in names)
        if prefix is not None and suffix is not None and middle is not None:
            return manifest.FillInTheMiddle(prefix=prefix, suffix=suffix, middle=middle)
    return None


def _file_entry(path: Path) -> manifest.FileEntry:
    return manifest.FileEntry(bytes=path.stat().st_size, sha256=manifest.file_sha256(path))
