"""The pipeline: read a source, build its graph, write the model directory, verify it."""

from __future__ import annotations

import contextlib
import os.path
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from model_export.errors import ExportError, TooFarError
from model_export.graph import cuda
from model_export.graph.initializers import Initializers
from model_export.graph.operators import LinearForm
from model_export.graph.precision import Precision, TargetDevice, choose_precision
from model_export.graph.quantize import Activations, Form
from model_export.graph.source import Source
from model_export.opening import read_source
from model_export.sources.fill_in_the_middle import Order, end_of_middle, find_marks, reorder
from model_export.sources.hugging_face.hub import download, hub_name
from model_export.sources.vocabulary import Vocabulary
from model_export.verify.verify import verify
from service import manifest
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
    max_kl: float | None = None
    fim_order: Order | Literal["auto"] = "auto"
    overwrite: bool = False


# After an overflow the divergence is not finite, which raises TooFarError.
@np.errstate(all="ignore")
def export(path: Path, directory: Path, options: Options, progress: Progress) -> manifest.Manifest:
    """Exports the source at `path` into the model directory `directory`, which appears complete or not at all.

    If `path` does not exist and looks like a model's name on the hub, that model is downloaded first. Returns the
    manifest.

    Raises ExportError when the source cannot be exported faithfully, or `directory` exists and may not be replaced.
    """
    _check_destination(path, directory, options.overwrite)
    path, source, options = _open(path, options)
    precision = choose_precision(options.quantization, options.activations, source.origin.weights, options.device)
    if options.prompts in ("int8", "float32") and precision.activations == "float16":
        raise ExportError(f"--prompts {options.prompts} needs --activations float32, and these are float16")
    vocabulary = source.origin.vocabulary
    special_tokens = _special_tokens(vocabulary, options.fim_order)
    with _written_at_once(directory) as work:
        layers = source.dimensions.layers
        with (work / manifest.WEIGHTS_FILE).open("wb") as file:
            data = Initializers(file, precision.activations)
            on_layer = progress("building", layers)
            graph = source.build(precision.form, precision.form, data, on_layer, prefill=False)
            devices = _prepare_for(options.device, graph)
            ir.save(graph, work / manifest.MODEL_FILE)
        (work / manifest.TOKENIZER_FILE).write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
        prefill_form, quality = _add_prefill_graph(source, precision, options, work, progress)
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
                dtype=precision.activations,
            ),
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
    return described


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
) -> tuple[PrefillForm | None, manifest.Quality]:
    """Builds the first wanted prefill graph that is close enough to the source. Returns its form and the quality.

    Raises TooFarError when no prefill graph is close enough, or the decode graph is not.
    """
    layers, model = source.dimensions.layers, work / manifest.MODEL_FILE
    max_kl = precision.max_kl if options.max_kl is None else options.max_kl
    forms = _prefill_forms(options.prompts, precision, source)
    for form in forms:
        graph = work / manifest.PROMPT_MODEL_FILE
        with (work / manifest.PROMPT_WEIGHTS_FILE).open("wb") as file:
            data = Initializers(file)
            matrices: LinearForm = "int8_rows" if form == "int8" else "float32"
            on_layer = progress(f"building the prefill graph, {form}", layers)
            ir.save(source.build(matrices, precision.form, data, on_layer, prefill=True), graph)
        try:
            return form, verify(source, model, graph, max_kl, progress("verifying", layers))
        except TooFarError:
            if form == forms[-1]:
                raise
    rounded = precision.form != "float32"
    return None, verify(source, model, None, max_kl, progress("verifying", layers), rounded=rounded)


def _prefill_forms(
    wanted: Literal["auto", "int8", "float32", "none"], precision: Precision, source: Source
) -> list[PrefillForm]:
    """The forms that a prefill graph may take beside a decode graph of `precision`, the fastest first."""
    if precision.form == "float32" or wanted == "none" or precision.activations == "float16":
        return []
    if wanted != "auto":
        return [wanted]
    weights = source.dimensions.layer_weights
    fast: list[PrefillForm] = ["int8", "float32"] if processor().byte_dot_products else ["float32"]
    return [form for form in fast if weights * BYTES_PER_WEIGHT[form] <= PREFILL_GRAPH_BYTES]


def _check_destination(path: Path, directory: Path, overwrite: bool) -> None:
    source, target = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ExportError(
            f"one of {directory} and the source {path} contains the other; give a directory beside the source"
        )
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; give the directory that it leads to")
    if directory.exists() and not overwrite:
        raise ExportError(f"{directory} exists; give --overwrite to replace it")
    if directory.exists() and not (directory / manifest.FILE_NAME).is_file():
        raise ExportError(f"{directory} is not a model directory; refusing to replace it")


def _open(path: Path, options: Options) -> tuple[Path, Source, Options]:
    """The path of the source, the source, and the options, completed by its name and owner on the hub."""
    name = None if path.exists() else hub_name(str(path))
    if name is not None:
        path = download(name)
        options = replace(options, id=options.id or name.name, owned_by=options.owned_by or name.owner)
    return path, read_source(path), options


@contextlib.contextmanager
def _written_at_once(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its place at the end, and is removed when anything fails."""
    created = [parent for parent in directory.parents if not parent.exists()]
    # The name is known before the directory exists, so that an interrupt at any moment can remove it.
    work = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
    replaced = work.with_name(f"{work.name}.replaced")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(mode=0o700)
        yield work
        work.chmod(0o755)
        if directory.exists():
            directory.rename(replaced)
        work.rename(directory)
    except BaseException:
        if replaced.exists():
            replaced.rename(directory)
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that is not empty stays, and so do those around it
            for parent in created:
                parent.rmdir()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _special_tokens(vocabulary: Vocabulary, order: Order | Literal["auto"]) -> manifest.SpecialTokens:
    end_of_text = vocabulary.tokenizer.token_to_id("<|endoftext|>")
    marks = reorder(find_marks(vocabulary.tokenizer, vocabulary.marks), order)
    end = set(vocabulary.end) if marks is None else {*vocabulary.end, *end_of_middle(vocabulary.tokenizer)}
    return manifest.SpecialTokens(
        bos=vocabulary.bos,
        add_bos=vocabulary.add_bos,
        end=tuple(sorted(end)),
        default_prompt=vocabulary.bos if end_of_text is None else end_of_text,
        fill_in_the_middle=marks,
    )
