"""The pipeline: read a source, build its graph, write the model directory, verify it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from model_export.destination import check_destination, keep_refused, remove_leftovers, written_at_once
from model_export.errors import ExportError, TooFarError
from model_export.graph import cuda
from model_export.graph.initializers import Initializers
from model_export.graph.operators import LinearForm
from model_export.graph.precision import Kernels, Precision, TargetDevice, choose_precision, precision_of_own_kernels
from model_export.graph.quantize import Activations, Form
from model_export.graph.source import KernelSource, Source
from model_export.opening import check_before_download, read_source
from model_export.room import check_room
from model_export.sources.fill_in_the_middle import Order, end_of_middle, find_marks, reorder
from model_export.sources.hugging_face.hub import download, hub_name
from model_export.sources.vocabulary import Vocabulary
from model_export.verify.verify import MIN_TOKENS, steps, verify
from service import manifest
from service.host import kernels
from service.host.processor import processor

PrefillForm = Literal["int8", "float32"]

# The most bytes that the matrices of a prefill graph may take: beyond, its speed is not worth the memory.
PREFILL_GRAPH_BYTES = 2 << 30
BYTES_PER_WEIGHT: dict[PrefillForm, int] = {"int8": 1, "float32": 4}

Progress = Callable[[str, int], Callable[[], object]]


@dataclass(frozen=True)
class Options:
    """The options of the command line; see `python -m model_export --help`."""

    id: str | None = None
    aliases: tuple[str, ...] = ()
    owned_by: str | None = None
    quantization: Form | Literal["auto"] = "auto"
    activations: Activations | Literal["auto"] = "auto"
    prompts: Literal["auto", "int8", "float32", "none"] = "auto"
    device: TargetDevice = "cpu"
    kernels: Kernels = "stock"
    kv_cache: Activations | Literal["auto"] = "auto"
    max_kl: float | None = None
    verify_tokens: int | None = None
    fim_order: Order | Literal["auto"] = "auto"
    overwrite: bool = False


# After an overflow the divergence is not finite, which raises TooFarError.
@np.errstate(all="ignore")
def export(
    path: Path,
    directory: Path,
    options: Options,
    progress: Progress,
    say: Callable[[str], object] = lambda sentence: None,
) -> manifest.Manifest:
    """Exports the source at `path` into the model directory `directory`, which appears complete or not at all.

    If `path` does not exist and looks like a model's name on the hub, that model is downloaded first. Returns the
    manifest. Calls `say` with what else the user should know.

    Raises ExportError when the source cannot be exported faithfully, or `directory` exists and may not be replaced.
    A model that is too far from its source is kept in a directory beside `directory`, which the message names.
    """
    for sentence in remove_leftovers(directory):
        say(sentence)
    check_destination(path, directory, overwrite=options.overwrite)
    path, source, options = _open(path, options, progress)
    precision = _precision(options, source)
    if options.verify_tokens is not None and options.verify_tokens < MIN_TOKENS:
        raise ExportError(f"--verify-tokens {options.verify_tokens} is too few, expected at least {MIN_TOKENS}")
    vocabulary = source.origin.vocabulary
    special_tokens = _special_tokens(vocabulary, options.fim_order)
    likely_form = next(map(_matrices, _prefill_forms(options.prompts, precision, source)), None)
    check_room(source.dimensions, precision, likely_form, source.origin.weights, directory)
    with written_at_once(directory) as work:
        layers = source.dimensions.layers
        with (work / manifest.WEIGHTS_FILE).open("wb") as file:
            data = Initializers(file, precision.activations)
            on_layer = progress("building", source.dimensions.build_steps)
            graph = _build_decode_graph(source, precision, data, on_layer)
            devices = _prepare_for(options.device, graph)
            ir.save(graph, work / manifest.MODEL_FILE)
        (work / manifest.TOKENIZER_FILE).write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
        if vocabulary.chat_template is not None:
            (work / manifest.CHAT_TEMPLATE_FILE).write_text(vocabulary.chat_template, encoding="utf-8", newline="")
        prefill_form, quality, refusal = _add_prefill_graph(source, precision, options, work, progress)
        files = {file.name: manifest.FileEntry.of(file) for file in sorted(work.iterdir())}
        described = manifest.Manifest(
            format_version=manifest.FORMAT_VERSION,
            id=options.id or source.origin.name,
            aliases=options.aliases,
            created=int(time.time()),
            owned_by=options.owned_by or source.origin.organization or "unknown",
            architecture=source.dimensions.family,
            context_length=source.dimensions.context_length,
            vocab_size=source.dimensions.vocab_size,
            special_tokens=special_tokens,
            kv=manifest.KVLayout(
                layers=layers,
                kv_heads=source.dimensions.kv_heads,
                head_dim=source.dimensions.head_dim,
                dtype=precision.kv_type,
                tile=manifest.KV_TILE if precision.kernels == "own" else 1,
            ),
            kernels=precision.kernels,
            devices=devices,
            quantization=manifest.Quantization(
                weights=precision.form,
                activations=precision.activations,
                prompts=prefill_form,
                source=source.origin.weights,
                min_rows=precision.min_rows,
                min_logits=precision.min_logits,
            ),
            quality=quality,
            files=files,
        )
        described.write(work)
        if refusal is not None:
            kept = keep_refused(work, directory)
            raise TooFarError(
                f"{refusal}; it is kept in {kept}: move it to {directory} to take it without another export"
            )
    return described


def _precision(options: Options, source: Source) -> Precision:
    """The forms and types that the options ask for. Raises ExportError where they cannot be combined, or not here."""
    forms = options.quantization, options.activations, source.origin.weights, options.device
    if options.kernels == "stock":
        if options.kv_cache != "auto":
            raise ExportError(f"--kv-cache {options.kv_cache} needs --kernels own")
        precision = choose_precision(*forms)
        if options.prompts in ("int8", "float32") and precision.activations == "float16":
            raise ExportError(f"--prompts {options.prompts} needs --activations float32, and these are float16")
        return precision
    if options.prompts in ("int8", "float32"):
        raise ExportError(f"--kernels own has one graph for all calls, so it has no --prompts {options.prompts}")
    precision = precision_of_own_kernels(*forms, options.kv_cache)
    if (reason := kernels.why_not()) is not None:
        raise ExportError(f"--kernels own cannot be used here: {reason}")
    return precision


def _build_decode_graph(
    source: Source, precision: Precision, data: Initializers, on_layer: Callable[[], object]
) -> ir.Model:
    if precision.kernels == "stock":
        return source.build(precision.form, precision.form, data, on_layer, prefill=False)
    if not isinstance(source, KernelSource):
        raise ExportError(
            f"mobius-onnx builds the family {source.dimensions.family}, and not over own kernels; use --kernels stock"
        )
    return source.build_over_kernels(precision.kv_type, data, on_layer)


def _prepare_for(device: TargetDevice, graph: ir.Model) -> tuple[TargetDevice, ...]:
    """Adds the outputs that `device` needs to the graph, and returns the devices that can run it.

    Raises ExportError when `device` cannot.
    """
    if device == "cuda":
        cuda.add_shortlist(graph)
    missing = cuda.unsupported(graph)
    if missing and device == "cuda":
        raise ExportError(f"CUDA cannot run the graph: {'; '.join(missing)}")
    return ("cpu",) if missing else ("cpu", "cuda")


def _add_prefill_graph(
    source: Source, precision: Precision, options: Options, work: Path, progress: Progress
) -> tuple[PrefillForm | None, manifest.Quality, TooFarError | None]:
    """Builds the first wanted prefill graph that is close enough to the source. Returns its form and the quality.

    When no prefill graph is close enough, or the decode graph is not, it also returns the error that says so, for the
    last form; or raises this TooFarError where the model could not be used.
    """
    forms: list[PrefillForm | None] = [*_prefill_forms(options.prompts, precision, source)] or [None]
    for form in forms:
        try:
            graph = None if form is None else _build_prefill_graph(source, form, precision, work, progress)
            return form, _verify(source, precision, options, work, progress, prefill=graph), None
        except TooFarError as error:
            if form == forms[-1]:
                if error.quality is None:
                    raise
                return form, error.quality, error
    raise AssertionError("there is at least one form")


def _build_prefill_graph(
    source: Source, form: PrefillForm, precision: Precision, work: Path, progress: Progress
) -> Path:
    graph = work / manifest.PROMPT_MODEL_FILE
    with (work / manifest.PROMPT_WEIGHTS_FILE).open("wb") as file:
        on_layer = progress(f"building the prefill graph, {form}", source.dimensions.build_steps)
        ir.save(source.build(_matrices(form), precision.form, Initializers(file), on_layer, prefill=True), graph)
    return graph


def _matrices(form: PrefillForm) -> LinearForm:
    return "int8_rows" if form == "int8" else "float32"


def _verify(
    source: Source, precision: Precision, options: Options, work: Path, progress: Progress, *, prefill: Path | None
) -> manifest.Quality:
    return verify(
        source,
        work / manifest.MODEL_FILE,
        prefill,
        precision.max_kl if options.max_kl is None else options.max_kl,
        progress("verifying", steps(source.dimensions.layers, prefill=prefill is not None)),
        rounded=precision.form != "float32",
        most_tokens=options.verify_tokens,
        own_kernels=precision.kernels == "own",
    )


def _prefill_forms(
    wanted: Literal["auto", "int8", "float32", "none"], precision: Precision, source: Source
) -> list[PrefillForm]:
    """The forms that a prefill graph may take beside a decode graph of `precision`, the fastest first."""
    if precision.form == "float32" or wanted == "none" or precision.activations == "float16":
        return []
    if precision.kernels == "own":
        return []
    if wanted != "auto":
        return [wanted]
    weights = source.dimensions.layer_weights
    fast: list[PrefillForm] = ["int8", "float32"] if processor().byte_dot_products else ["float32"]
    return [form for form in fast if weights * BYTES_PER_WEIGHT[form] <= PREFILL_GRAPH_BYTES]


def _open(path: Path, options: Options, progress: Progress) -> tuple[Path, Source, Options]:
    """The path of the source, the source, and the options, completed by its name and owner on the hub."""
    name = None if path.exists() else hub_name(str(path))
    if name is not None:
        path = download(name, check_before_download, progress)
        own_name = None if name.form else name.name
        options = replace(options, id=options.id or own_name, owned_by=options.owned_by or name.owner)
    return path, read_source(path), options


def _special_tokens(vocabulary: Vocabulary, order: Order | Literal["auto"]) -> manifest.SpecialTokens:
    end_of_text = vocabulary.tokenizer.token_to_id("<|endoftext|>")
    marks = reorder(find_marks(vocabulary.tokenizer, vocabulary.marks), order)
    end = set(vocabulary.end) if marks is None else {*vocabulary.end, *end_of_middle(vocabulary.tokenizer)}
    return manifest.SpecialTokens(
        bos=vocabulary.bos,
        add_bos=vocabulary.add_bos,
        end=tuple(sorted(end)),
        default_prompt=vocabulary.bos if end_of_text is None else end_of_text,
        eos=vocabulary.eos,
        fill_in_the_middle=marks,
    )
