"""The pipeline: read a source, build its graph, write the model directory, verify it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from model_export.destination import check_destination, keep_refused, remove_leftovers, written_at_once
from model_export.errors import ExportError, TooFarError
from model_export.graph import cuda
from model_export.graph.initializers import Initializers
from model_export.graph.precision import (
    KernelsOption,
    Precision,
    TargetDevice,
    choose_precision,
    precision_of_own_kernels,
)
from model_export.graph.quantize import Activations, Form
from model_export.graph.self_test import self_test
from model_export.graph.source import KernelSource, Source
from model_export.opening import built_by_mobius, check_before_download, read_source
from model_export.room import check_room
from model_export.sources.fill_in_the_middle import Order, end_of_middle, find_marks, reorder
from model_export.sources.hugging_face.hub import download, hub_name
from model_export.sources.vocabulary import Vocabulary
from model_export.verify.verify import MIN_TOKENS, steps, verify
from service import manifest
from service.host import kernels
from service.quality import Quality

Progress = Callable[[str, int], Callable[[], object]]


@dataclass(frozen=True)
class Options:
    """The options of the command line; see `python -m model_export --help`."""

    id: str | None = None
    aliases: tuple[str, ...] = ()
    owned_by: str | None = None
    quantization: Form | Literal["auto"] = "auto"
    activations: Activations | Literal["auto"] = "auto"
    device: TargetDevice = "cpu"
    kernels: KernelsOption = "auto"
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
    unusable = _unusable(options)
    if options.kernels == "own" and unusable is not None:
        raise ExportError(f"--kernels own cannot be used: {unusable}")
    if options.verify_tokens is not None and options.verify_tokens < MIN_TOKENS:
        raise ExportError(f"--verify-tokens {options.verify_tokens} is too few, expected at least {MIN_TOKENS}")
    path, source, options = _open(path, options, progress)
    precision, why_stock = _precision(options, source, unusable)
    vocabulary = source.origin.vocabulary
    special_tokens = _special_tokens(vocabulary, options.fim_order)
    check_room(source.dimensions, precision, directory)
    with written_at_once(directory) as work:
        layers = source.dimensions.layers
        with (work / manifest.WEIGHTS_FILE).open("wb") as file:
            data = Initializers(file, precision.activations)
            on_layer = progress("building", source.dimensions.build_steps)
            graph = _build(source, precision, data, on_layer)
            devices = _prepare_for(options.device, graph)
            ir.save(graph, work / manifest.MODEL_FILE)
            if precision.kernels == "stock":
                ir.save(self_test(graph), work / manifest.SELF_TEST_FILE)
        (work / manifest.TOKENIZER_FILE).write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
        if vocabulary.chat_template is not None:
            (work / manifest.CHAT_TEMPLATE_FILE).write_text(vocabulary.chat_template, encoding="utf-8", newline="")
        quality, refusal = _measured(source, precision, options, work, progress)
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
            why_stock=why_stock,
            devices=devices,
            quantization=manifest.Quantization(
                weights=precision.form,
                activations=precision.activations,
                source=source.origin.weights,
                pads_lone_row=precision.pads_lone_row,
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


def _unusable(options: Options) -> str | None:
    """Why own kernels cannot be used with these options or on this machine, as a clause; None where they can."""
    if options.kernels == "stock":
        return "--kernels is stock"
    if options.device != "cpu":
        return f"own kernels run on CPUs, and --device is {options.device}"
    if options.quantization != "auto":
        return f"own kernels keep the source's blocks as they are, and --quantization is {options.quantization}"
    if options.activations == "float16":
        return "own kernels compute in float32, and --activations is float16"
    return kernels.why_not()


def _precision(options: Options, source: Source, unusable: str | None) -> tuple[Precision, str | None]:
    """The forms, types and kernels, and why these are stock although the options leave the choice.

    `unusable` is why own kernels cannot be used with any source. Raises ExportError where the options cannot be
    combined, or ask for own kernels that do not compute the source.
    """
    reason = unusable or _obstacle(source)
    if reason is None:
        return precision_of_own_kernels(source.origin.weights, options.kv_cache), None
    if options.kernels == "own":
        raise ExportError(f"--kernels own cannot be used: {reason}")
    if options.kv_cache != "auto":
        raise ExportError(f"--kv-cache {options.kv_cache} needs own kernels: {reason}")
    precision = choose_precision(options.quantization, options.activations, source.origin.weights, options.device)
    return precision, reason if options.kernels == "auto" else None


def _obstacle(source: Source) -> str | None:
    return source.obstacle() if isinstance(source, KernelSource) else built_by_mobius(source.dimensions.family)


def _build(source: Source, precision: Precision, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
    if precision.kernels == "stock":
        return source.build(precision.form, data, on_layer)
    assert isinstance(source, KernelSource), "own kernels are only chosen for these"
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


def _measured(
    source: Source, precision: Precision, options: Options, work: Path, progress: Progress
) -> tuple[Quality, TooFarError | None]:
    """The measured quality, and the error that says so where the graph is too far from the source.

    Raises this TooFarError where the model could not be used.
    """
    try:
        quality = verify(
            source,
            work / manifest.MODEL_FILE,
            precision.max_kl if options.max_kl is None else options.max_kl,
            progress("verifying", steps(source.dimensions.layers)),
            rounded=precision.form != "float32",
            most_tokens=options.verify_tokens,
            own_kernels=precision.kernels == "own",
        )
    except TooFarError as error:
        if error.quality is None:
            raise
        return error.quality, error
    return quality, None


def _open(path: Path, options: Options, progress: Progress) -> tuple[Path, Source, Options]:
    """The path of the source, the source, and the options, completed by its name and owner on the hub."""
    name = None if path.exists() else hub_name(str(path))
    if name is not None:
        check = partial(check_before_download, own_kernels=options.kernels == "own")
        path = download(name, check, progress)
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
