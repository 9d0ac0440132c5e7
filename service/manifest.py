"""The manifest describes a model directory: the exporter writes it, and the service reads and checks it."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from service import external_data, hashes
from service.errors import ModelDirectoryError
from service.quality import Quality, Record

FILE_NAME = "manifest.json"
MODEL_FILE = "model.onnx"
WEIGHTS_SUFFIX = ".onnx.data"
WEIGHTS_FILE = f"model{WEIGHTS_SUFFIX}"
SELF_TEST_FILE = "self_test.onnx"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
FORMAT_VERSION: Final = 2
KV_TILE: Final = 16  # positions, in the KV cache of our own operators
LARGEST_MANIFEST = LARGEST_CHAT_TEMPLATE = 1 << 20
_HINT = "export the model again: python -m model_export SOURCE DIRECTORY"


class FileEntry(Record):
    """One file: its size in bytes, and in lower-case hex the SHA-256 of each `hashes.BLOCK_BYTES` of it."""

    bytes: int = Field(ge=0)
    sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...]

    @model_validator(mode="after")
    def _check(self) -> FileEntry:
        if len(self.sha256) != (wanted := hashes.count(self.bytes)):
            raise ValueError(f"{self.bytes} bytes need {wanted} hashes in sha256, not {len(self.sha256)}")
        return self

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry that describes a file as it is."""
        return cls(bytes=path.stat().st_size, sha256=hashes.blocks(path))


class FillInTheMiddle(Record):
    """Token ids that mark a prompt's parts for a model trained to fill in the middle.

    Each token precedes its part. `order` is the order of the parts: prefix, suffix, middle (`psm`) or suffix, prefix,
    middle (`spm`). `middle` is None when no token separates the prefix from the middle, which only `spm` allows.
    """

    prefix: int = Field(ge=0)
    suffix: int = Field(ge=0)
    middle: int | None = Field(ge=0)
    order: Literal["psm", "spm"] = "psm"

    @model_validator(mode="after")
    def _check(self) -> FillInTheMiddle:
        if self.order == "psm" and self.middle is None:
            raise ValueError("the order psm needs a token before the middle")
        return self


class SpecialTokens(Record):
    """Token ids with a special meaning.

    `default_prompt` replaces an empty prompt; it is None when the model has neither a beginning-of-sequence nor an
    end-of-text token. The tokens of `end` end a completion; `eos` is the source's own, if it is known. With `add_bos`
    every text prompt is preceded by `bos`.
    """

    bos: int | None = Field(ge=0)
    add_bos: bool
    end: tuple[int, ...]
    default_prompt: int | None = Field(ge=0)
    eos: int | None = Field(None, ge=0)
    fill_in_the_middle: FillInTheMiddle | None = None


class KVLayout(Record):
    """Shape of one token in the KV cache: `layers` x `kv_heads` x `head_dim` keys and as many values, in `dtype`.

    A slot holds one head after another or, with a `tile` of 16, tiles of so many positions of all heads.
    """

    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dtype: Literal["float32", "float16"]
    tile: Literal[1, 16] = 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


class Quantization(Record):
    """How the weights are stored.

    `weights` is the form of the exported matrices, `source` their form in the source model. `activations` is the type
    in which the graph computes; a float16 graph uses only operators that GPUs also have kernels for.

    Where `pads_lone_row`, kernels compute a single row, or a single position that gets logits, in another way than
    several, so that its bits depend on whether it is alone: the service pads it to two, using one slot more than
    `max_running`.
    """

    weights: Literal["float32", "float16", "int8", "int4"]
    activations: Literal["float32", "float16"]
    source: str
    pads_lone_row: bool


class _Format(BaseModel):
    """Which format a manifest has, whatever else is in it."""

    format_version: int = Field(strict=True)


class Manifest(Record):
    """The description of a model directory; docs/model-directory.md shows it as JSON.

    `devices` have a kernel for every operator of the graph: onnxruntime's, or those of the package `kernels` ("own").
    `why_stock` is why the exporter chose onnxruntime's, as a clause; None where it was told to.
    """

    format_version: Literal[2]
    id: str = Field(min_length=1)
    aliases: tuple[str, ...]
    created: int = Field(ge=0)
    owned_by: str
    architecture: str
    context_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    special_tokens: SpecialTokens
    kv: KVLayout
    quantization: Quantization
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu",)
    kernels: Literal["stock", "own"] = "stock"
    why_stock: str | None = None
    quality: Quality
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        special, marks = self.special_tokens, self.special_tokens.fill_in_the_middle
        ids: set[int | None] = {special.bos, special.default_prompt, special.eos, *special.end}
        if marks is not None:
            ids |= {marks.prefix, marks.suffix, marks.middle}
        wrong = sorted(index for index in ids if index is not None and index >= self.vocab_size)
        if wrong:
            raise ValueError(f"special tokens {wrong} are not within 0..{self.vocab_size - 1}")
        if (self.kernels == "own") != (self.kv.tile == KV_TILE) or (self.kernels == "own" and "cuda" in self.devices):
            raise ValueError(f"the kernels {self.kernels} do not go with kv.tile {self.kv.tile} and these devices")
        return self

    @property
    def computed_by(self) -> str:
        """Whose kernels compute the model, for readers."""
        if self.kernels == "own":
            return f"own kernels, {self.kv.dtype} KV cache"
        return "stock kernels" + (f" ({self.why_stock})" if self.why_stock else "")

    @property
    def weights_bytes(self) -> int:
        """The size of the files that hold weights."""
        return sum(entry.bytes for name, entry in self.files.items() if name.endswith(WEIGHTS_SUFFIX))

    def write(self, directory: Path) -> None:
        """Writes the manifest into `directory`."""
        (directory / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read(directory: Path) -> Manifest:
    """Reads the manifest of `directory`, and checks that every file that it lists is there, with the listed size.

    Raises ModelDirectoryError, which names the file, what was expected and what was found.
    """
    path = directory / FILE_NAME
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block until it has a writer
            raise ModelDirectoryError(f"{path} is not a plain file; {_HINT}")
        if (size := path.stat().st_size) > LARGEST_MANIFEST:
            raise ModelDirectoryError(f"{path} has {size} bytes, expected at most {LARGEST_MANIFEST}; {_HINT}")
        content = path.read_bytes()
        manifest = Manifest.model_validate_json(content)
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path} does not exist; {_HINT}") from None
    except OSError as error:
        raise ModelDirectoryError(f"{path} cannot be read: {error.strerror}; {_HINT}") from None
    except ValidationError as error:
        _check_format(directory, content)
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ModelDirectoryError(f"{path}: {where}: {problem['msg']}; {_HINT}") from None
    needed = {MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE} | ({SELF_TEST_FILE} if manifest.kernels == "stock" else set())
    if missing := needed - set(manifest.files):
        raise ModelDirectoryError(f"{path} does not list {' and '.join(sorted(missing))}; {_HINT}")
    for name, entry in manifest.files.items():
        _check_size(directory, name, entry)
    return manifest


def _check_format(directory: Path, content: bytes) -> None:
    """Raises ModelDirectoryError where a manifest that is none of this format says which other one it has."""
    try:
        found = _Format.model_validate_json(content).format_version
    except ValidationError:
        return
    if found != FORMAT_VERSION:
        raise ModelDirectoryError(
            f"{directory / FILE_NAME} has format {found}, expected {FORMAT_VERSION}; export the model again:"
            f" python -m model_export SOURCE {directory} --overwrite"
        )


def load(directory: Path) -> Manifest:
    """Reads the manifest of `directory`, and checks size and hashes of every file. Raises ModelDirectoryError."""
    manifest = read(directory)
    with hashes_checked(parsed_files(directory, manifest) | weights_files(directory, manifest)):
        return manifest


def parsed_files(directory: Path, manifest: Manifest) -> dict[Path, FileEntry]:
    """The listed files that are parsed: graph and tokenizer. They are small, and have to be checked before."""
    return {directory / name: file for name, file in manifest.files.items() if not name.endswith(WEIGHTS_SUFFIX)}


def weights_files(directory: Path, manifest: Manifest) -> dict[Path, FileEntry]:
    """The listed files that hold nothing but weights, which can be checked while they are loaded."""
    return {directory / name: file for name, file in manifest.files.items() if name.endswith(WEIGHTS_SUFFIX)}


@contextmanager
def hashes_checked(files: Mapping[Path, FileEntry]) -> Iterator[None]:
    """Checks the hashes of files in threads, beside the body; after it all of them have passed.

    Raises ModelDirectoryError when a block's SHA-256 is not the listed one. That error replaces one of the body, whose
    cause it may be.
    """
    threads = hashes.pool()
    try:
        checks: list[Future[None]] = [
            threads.submit(_check_block, path, entry, number)
            for path, entry in files.items()
            for number in range(len(entry.sha256))
        ]
        try:
            yield
        finally:
            for check in checks:
                check.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _check_block(path: Path, entry: FileEntry, number: int) -> None:
    expected = entry.sha256[number]
    try:
        found = hashes.block(path, number)
    except OSError as error:
        raise ModelDirectoryError(f"{path} cannot be read: {error.strerror}; {_HINT}") from None
    if found != expected:
        start = number * hashes.BLOCK_BYTES
        end = min(start + hashes.BLOCK_BYTES, entry.bytes)
        place = f"{path} has SHA-256 {found} in bytes {start} to {end - 1}"
        raise ModelDirectoryError(f"{place}, expected {expected}; {_HINT}")


def _check_size(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    if "\0" in name or Path(os.path.realpath(path)).parent != Path(os.path.realpath(directory)):
        raise ModelDirectoryError(f"{path} is outside the model directory {directory}; refusing to load it")
    if not path.is_file():
        raise ModelDirectoryError(f"{path} does not exist; {_HINT}")
    if path.stat().st_nlink > 1:
        raise ModelDirectoryError(f"{path} has other names (hard links) that could change it; copy it instead")
    if (size := path.stat().st_size) != entry.bytes:
        raise ModelDirectoryError(f"{path} has {size} bytes, expected {entry.bytes}; {_HINT}")


def check_external_data(directory: Path, manifest: Manifest) -> None:
    """Raises ModelDirectoryError when a graph takes tensors from a file that the manifest does not list."""
    for name in {MODEL_FILE, SELF_TEST_FILE} & set(manifest.files):
        external_data.check(directory / name, manifest.files, FILE_NAME)
