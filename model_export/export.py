"""The pipeline: read a source, build its graph, write the model directory, verify it."""

from __future__ import annotations

import dataclasses
import os.path
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from model_export.errors import ExportError, TooFarError
from model_export.graph import cuda
from model_export.graph.initializers import Initializers
from model_export.graph.operators import LinearForm
from model_export.graph.precision import Device, Precision, choose_precision
from model_export.graph.quantize import Activations, Form
from model_export.graph.source import Source
from model_export.opening import find, read_source
from model_export.sources.fill_in_the_middle import Order, end_of_middle, find_marks, reorder
from model_export.verify.report import Report
from model_export.verify.verify import verify
from service import manifest
from service.host.processor import processor

PromptForm = Literal["int8", "float32"]

# Above this size of its matrices a second graph for prompts takes more memory than its speed is worth.
PROMPT_GRAPH_BYTES = 2 << 30
BYTES_PER_WEIGHT: dict[PromptForm, int] = {"int8": 1, "float32": 4}

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
    device: Device = "cpu"
    max_kl: float | None = None
    fim_order: Order | Literal["auto"] = "auto"
    overwrite: bool = False


# What overflows makes the divergence no number, and that is refused.
@np.errstate(all="ignore")
def export(path: Path, directory: Path, options: Options, progress: Progress) -> manifest.Manifest:
    """Exports the source at `path` into the model directory `directory`, which appears whole or not at all.

    What is no path but looks like a model's name on a hub is downloaded first. Returns the model's description.

    Raises ExportError when the source cannot be exported faithfully, or `directory` exists and may not be replaced.
    """
    _check_destination(path, directory, options.overwrite)
    path, source, options = _open(path, options)
    precision = choose_precision(options.quantization, options.activations, source.weights, options.device)
    if options.prompts in ("int8", "float32") and precision.activations == "float16":
        raise ExportError(f"--prompts {options.prompts} needs --activations float32, and these are to be float16")
    special_tokens = _special_tokens(source, options.fim_order)
    with _written_at_once(directory) as work:
        layers = source.dimensions.layers
        model = work / manifest.MODEL_FILE
        with Initializers(work / manifest.WEIGHTS_FILE, precision.activations) as data:
            graph = source.build(precision.form, data, progress("building", layers))
            devices = _finish_for(options.device, graph)
            ir.save(graph, model)
        text = source.vocabulary.tokenizer.to_str(pretty=True)
        (work / manifest.TOKENIZER_FILE).write_text(text, encoding="utf-8")
        prompts, report = _add_prompt_graph(source, precision, options, work, progress)
        files = {file.name: _file_entry(file) for file in sorted(work.iterdir())}
        described = manifest.Manifest(
            format_version=manifest.FORMAT_VERSION,
            id=options.id or source.name,
            aliases=options.aliases,
            created=int(time.time()),
            owned_by=options.owned_by or source.organization or "unknown",
            architecture=source.dimensions.family,
            context_length=source.dimensions.context_length,
            vocab_size=source.dimensions.vocab_size,
            special_tokens=special_tokens,
            kv=_kv_layout(source, precision),
            devices=devices,
            quantization=_quantization(source, precision, prompts),
            quality=report.quality(source.size, sum(entry.bytes for entry in files.values())),
            files=files,
        )
        described.write(work)
    return described


def _finish_for(device: Device, graph: ir.Model) -> tuple[Device, ...]:
    """Adds what that device wants of a graph, and gives the devices that can run it.

    Raises ExportError when that one cannot.
    """
    if device == "cuda":
        cuda.add_shortlist(graph)
    lacking = cuda.unsupported(graph)
    if lacking and device == "cuda":
        raise ExportError(f"CUDA cannot run the graph: {'; '.join(lacking)}")
    return ("cpu",) if lacking else ("cpu", "cuda")


def _add_prompt_graph(
    source: Source, precision: Precision, options: Options, work: Path, progress: Progress
) -> tuple[PromptForm | None, Report]:
    """Builds the first wanted graph for prompts that is close enough to the source. Gives its form and the report.

    Raises TooFarError when none is, or when it is the generating graph that is too far.
    """
    layers, model = source.dimensions.layers, work / manifest.MODEL_FILE
    max_kl = precision.max_kl if options.max_kl is None else options.max_kl
    forms = _prompt_forms(options.prompts, precision, source)
    for prompts in forms:
        graph = work / manifest.PROMPT_MODEL_FILE
        with Initializers(work / manifest.PROMPT_WEIGHTS_FILE) as data:
            matrices: LinearForm = "int8_rows" if prompts == "int8" else "float32"
            on_layer = progress(f"building for prompts, {prompts}", layers)
            ir.save(source.build_for_prompts(matrices, precision.form, data, on_layer), graph)
        try:
            return prompts, verify(source, model, graph, max_kl, progress("verifying", layers))
        except TooFarError:
            if prompts == forms[-1]:
                raise
    rounded = precision.form != "float32"
    return None, verify(source, model, None, max_kl, progress("verifying", layers), rounded=rounded)


def _prompt_forms(
    wanted: Literal["auto", "int8", "float32", "none"], precision: Precision, source: Source
) -> list[PromptForm]:
    """The forms of a second graph that are worth having beside one of `precision`, the quickest first."""
    if precision.form == "float32" or wanted == "none" or precision.activations == "float16":
        return []
    if wanted != "auto":
        return [wanted]
    weights = source.dimensions.layer_weights
    quick: list[PromptForm] = ["int8", "float32"] if processor().byte_dot_products else ["float32"]
    return [each for each in quick if weights * BYTES_PER_WEIGHT[each] <= PROMPT_GRAPH_BYTES]


def _check_destination(path: Path, directory: Path, overwrite: bool) -> None:
    source, target = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ExportError(f"{directory} and the source {path} lie within each other; give a directory beside it")
    if directory.is_symlink():
        raise ExportError(f"{directory} is a link; give the directory that it leads to")
    if not directory.exists():
        return
    if not overwrite:
        raise ExportError(f"{directory} exists; give --overwrite to replace it")
    if not (directory / manifest.FILE_NAME).is_file():
        raise ExportError(f"{directory} is not a model directory; refusing to replace it")


def _open(path: Path, options: Options) -> tuple[Path, Source, Options]:
    """Where the source lies, the source, and the options with the names that a hub knows it by."""
    found, name = find(path)
    if name is not None:
        options = dataclasses.replace(options, id=options.id or name.name, owned_by=options.owned_by or name.owner)
    return found, read_source(found), options


@contextmanager
def _written_at_once(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` that takes its place at the end, or vanishes when anything goes wrong."""
    made = [parent for parent in directory.parents if not parent.exists()]
    # Named before it is made, so that an interrupt at any moment finds what to remove.
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
        _remove_empty(made)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, as far as nobody has put anything into them."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            break


def _kv_layout(source: Source, precision: Precision) -> manifest.KVLayout:
    dimensions = source.dimensions
    return manifest.KVLayout(
        layers=dimensions.layers,
        kv_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        dtype=precision.activations,
    )


def _quantization(source: Source, precision: Precision, prompts: PromptForm | None) -> manifest.Quantization:
    return manifest.Quantization(
        weights=precision.form,
        activations=precision.activations,
        prompts=prompts,
        source=source.weights,
        min_rows=precision.min_rows,
        min_logits=precision.min_logits,
    )


def _special_tokens(source: Source, order: Order | Literal["auto"]) -> manifest.SpecialTokens:
    vocabulary = source.vocabulary
    token_id = vocabulary.tokenizer.token_to_id
    end_of_text = token_id("<|endoftext|>")
    marks = reorder(find_marks(vocabulary.tokenizer, vocabulary.marks), order)
    end = set(vocabulary.end) if marks is None else {*vocabulary.end, *end_of_middle(vocabulary.tokenizer)}
    return manifest.SpecialTokens(
        bos=vocabulary.bos,
        add_bos=vocabulary.add_bos,
        end=tuple(sorted(end)),
        default_prompt=vocabulary.bos if end_of_text is None else end_of_text,
        fill_in_the_middle=marks,
    )


def _file_entry(path: Path) -> manifest.FileEntry:
    return manifest.FileEntry(bytes=path.stat().st_size, sha256=manifest.file_sha256(path))
