"""The manifest: what a model directory says about itself, and where exporter and service meet."""

from __future__ import annotations

import hashlib
import os.path
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service import external_data
from service.errors import ModelDirectoryError

FILE_NAME = "manifest.json"
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
PROMPT_MODEL_FILE = "prompt.onnx"
PROMPT_WEIGHTS_FILE = "prompt.onnx.data"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION: Final = 1
LARGEST_MANIFEST = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Part):
    """One file of the model directory: its size in bytes and its SHA-256 in lower-case hex."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class FillInTheMiddle(_Part):
    """Token ids that mark a prompt's parts for a model trained to fill in the middle.

    Each stands before its part, in the order of `order`: prefix, suffix, middle (`psm`) or suffix, prefix, middle
    (`spm`). `middle` is None where nothing stands between the prefix and the middle, which only `spm` allows.
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


class SpecialTokens(_Part):
    """Token ids with a meaning of their own.

    `default_prompt` stands in for an empty prompt; None when the model has neither a beginning-of-sequence nor an
    end-of-text token. `end` are the tokens that end a completion. `add_bos` says whether `bos` goes before every text
    prompt.
    """

    bos: int | None = Field(ge=0)
    add_bos: bool
    end: tuple[int, ...]
    default_prompt: int | None = Field(ge=0)
    fill_in_the_middle: FillInTheMiddle | None = None


class KVLayout(_Part):
    """Shape of the keys and of the values of one token: `layers` x `kv_heads` x `head_dim` numbers of `dtype`."""

    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dtype: Literal["float32", "float16"]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that keys and values of one token take over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


class Quantization(_Part):
    """How the weights are stored.

    `weights` is the form of the exported matrices, `source` the form they had. `activations` is the type in which the
    graph computes: in float16 it is made of operators that GPUs have as well. `prompts` is the form of the matrices of
    a second graph, which reads prompts faster; None when there is none. `min_rows` is the fewest rows of a call from
    which results no longer depend on the number of rows: one row may take another kernel than several.
    `min_logits` is the same for the positions that get logits. Kernels tell one from several, no more: a call of one is
    padded by one, for which there is a slot more than sequences run.
    """

    weights: Literal["float32", "float16", "int8", "int4", "int4z"]
    activations: Literal["float32", "float16"] = "float32"
    prompts: Literal["float32", "int8"] | None = None
    source: str
    min_rows: int = Field(ge=1, le=2)
    min_logits: int = Field(default=1, ge=1, le=2)


class Measures(_Part):
    """One model on the exporter's text and machine: its size, its perplexity, and its tokens a second.

    `bytes` are those of the files; `read_per_second` is reading a prompt, `generated_per_second` one token after the
    other, None where that was not measured. The source's are those of plain float32 arithmetic over its weights.
    """

    bytes: int = Field(ge=0)
    perplexity: float
    read_per_second: float
    generated_per_second: float | None


class Quality(_Part):
    """What the exporter measured against the source weights, over `tokens` tokens of text.

    Divergences are in nats per token: `kl` of the graph that generates, `prompt_kl` of the one that reads prompts,
    `decode_kl` of tokens generated one by one. Errors are in logits, of the graph that generates. Directories of before
    there was a report have `kl`, `max_logit_error` and `tokens` alone.
    """

    kl: float
    max_logit_error: float
    tokens: int = Field(ge=1)
    prompt_kl: float | None = None
    decode_kl: float | None = None
    mean_logit_error: float | None = None
    source: Measures | None = None
    export: Measures | None = None


class Manifest(_Part):
    """A model directory's description; see docs/model-directory.md for the file as JSON.

    `devices` are those that have a kernel for every operator of the graphs.
    """

    format_version: Literal[1]
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
    quality: Quality
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        special = self.special_tokens
        marks = special.fill_in_the_middle
        ids: set[int | None] = {special.bos, special.default_prompt, *special.end}
        if marks is not None:
            ids |= {marks.prefix, marks.suffix, marks.middle}
        wrong = sorted(index for index in ids if index is not None and index >= self.vocab_size)
        if wrong:
            raise ValueError(f"special tokens {wrong} are not within 0..{self.vocab_size - 1}")
        return self

    def write(self, directory: Path) -> None:
        """Writes the manifest into `directory`."""
        (directory / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> Manifest:
    """Reads and checks the manifest of `directory` and the size and hash of every file that it names.

    Raises ModelDirectoryError with the file, what was expected and what was found.
    """
    path = directory / FILE_NAME
    hint = "export the model again: python -m model_export SOURCE DIRECTORY"
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise ModelDirectoryError(f"{path} is not a plain file; {hint}")
        if (size := path.stat().st_size) > LARGEST_MANIFEST:
            raise ModelDirectoryError(f"{path} has {size} bytes, expected at most {LARGEST_MANIFEST}; {hint}")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelDirectoryError(f"{path} does not exist; {hint}") from None
    except OSError as error:
        raise ModelDirectoryError(f"{path} cannot be read: {error.strerror}; {hint}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ModelDirectoryError(f"{path}: {where}: {problem['msg']}; {hint}") from None
    needed = {MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE}
    if manifest.quantization.prompts:
        needed |= {PROMPT_MODEL_FILE, PROMPT_WEIGHTS_FILE}
    if missing := needed - set(manifest.files):
        raise ModelDirectoryError(f"{path} vouches for no {' and no '.join(sorted(missing))}; {hint}")
    for name, entry in manifest.files.items():
        _check_file(directory, name, entry, hint)
    return manifest


def _check_file(directory: Path, name: str, entry: FileEntry, hint: str) -> None:
    path = directory / name
    if "\0" in name or Path(os.path.realpath(path)).parent != Path(os.path.realpath(directory)):
        raise ModelDirectoryError(f"{path} is outside the model directory {directory}; refusing to load it")
    if not path.is_file():
        raise ModelDirectoryError(f"{path} does not exist; {hint}")
    if path.stat().st_nlink > 1:
        raise ModelDirectoryError(f"{path} has other names (hard links), by which it may change; copy it instead")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ModelDirectoryError(f"{path} has {size} bytes, expected {entry.bytes}; {hint}")
    digest = file_sha256(path)
    if digest != entry.sha256:
        raise ModelDirectoryError(f"{path} has SHA-256 {digest}, expected {entry.sha256}; {hint}")


def check_external_data(directory: Path, manifest: Manifest) -> None:
    """Raises ModelDirectoryError when a graph takes tensors from a file that the manifest does not vouch for."""
    for name in [MODEL_FILE, *([PROMPT_MODEL_FILE] if manifest.quantization.prompts else [])]:
        path = directory / name
        try:
            outside = external_data.locations(path.read_bytes()) - set(manifest.files)
        except ValueError as error:
            raise ModelDirectoryError(f"{path} is not an ONNX graph: {error}") from None
        if outside:
            message = f"{path} takes tensors from {min(outside)!r}, which {FILE_NAME} does not vouch for"
            raise ModelDirectoryError(f"{message}; refusing to load it")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
