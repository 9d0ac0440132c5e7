"""The manifest, and the checks of the files that it lists."""

from __future__ import annotations

import hashlib
import json

import pytest

from service import hashes, manifest
from service.errors import ModelDirectoryError, StartupError
from service.manifest import FileEntry
from tests.support import fakes


@pytest.fixture
def directory(tmp_path):
    """A model directory of four files, described by its manifest."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"weights")
    (directory / "tokenizer.json").write_bytes(b"letters")
    (directory / "model.onnx.data").write_bytes(b"numbers")
    (directory / "self_test.onnx").write_bytes(b"some of it")
    names = ("model.onnx", "model.onnx.data", "self_test.onnx", "tokenizer.json")
    fakes.manifest(files={name: FileEntry.of(directory / name) for name in names}).write(directory)
    return directory


def edit(directory, **changes):
    """Changes entries of the manifest's JSON."""
    path = directory / manifest.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(directory):
    """The message of the error that refuses the directory."""
    with pytest.raises(ModelDirectoryError) as caught:
        manifest.load(directory)
    return str(caught.value)


def test_written_manifest_is_read_back(directory):
    """A manifest that is written and read again is equal to the original."""
    loaded = manifest.load(directory)
    assert loaded == fakes.manifest(files=loaded.files)
    assert loaded.files["model.onnx"].bytes == 7


def test_missing_manifest(tmp_path):
    """The message names the file and the command that makes it."""
    message = refused(tmp_path)
    assert str(tmp_path / "manifest.json") in message
    assert "python -m model_export" in message


def test_another_format(directory):
    """A directory of format 1 is refused in one sentence, which names the command that exports it again."""
    old = json.loads((directory / manifest.FILE_NAME).read_text())
    edit(directory, format_version=1, quantization=old["quantization"] | {"prompts": None, "min_rows": 2})
    assert refused(directory) == (
        f"{directory / 'manifest.json'} has format 1, expected 2; export the model again:"
        f" python -m model_export SOURCE {directory} --overwrite"
    )


def test_path_that_is_not_a_directory(directory):
    """A path to a file instead of a directory is refused like a missing manifest."""
    assert "manifest.json" in refused(directory / "model.onnx")


def test_missing_file(directory):
    """The message names the file."""
    (directory / "model.onnx").unlink()
    assert f"{directory / 'model.onnx'} does not exist" in refused(directory)


def test_truncated_file(directory):
    """The message names both sizes."""
    (directory / "model.onnx").write_bytes(b"weigh")
    assert f"{directory / 'model.onnx'} has 5 bytes, expected 7" in refused(directory)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of three bytes, so that a file of seven has three of them."""
    monkeypatch.setattr(hashes, "BLOCK_BYTES", 3)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_each_block_has_a_hash(small_blocks, directory):
    """The blocks follow each other without a gap, and the last one may be shorter."""
    listed = json.loads((directory / manifest.FILE_NAME).read_text())["files"]["model.onnx.data"]
    assert listed == {"bytes": 7, "sha256": [sha256(b"num"), sha256(b"ber"), sha256(b"s")]}
    assert manifest.load(directory).files["model.onnx.data"] == FileEntry.of(directory / "model.onnx.data")


def test_file_without_content(tmp_path):
    """A file of no bytes has no block."""
    (tmp_path / "empty").touch()
    assert FileEntry.of(tmp_path / "empty") == FileEntry(bytes=0, sha256=())


@pytest.mark.parametrize(
    ("at", "block", "content"),
    [(0, "0 to 2", b"Num"), (4, "3 to 5", b"bEr"), (5, "3 to 5", b"beR"), (6, "6 to 6", b"S")],
)
def test_flipped_byte(small_blocks, directory, at, block, content):
    """The message names the block's bytes and both hashes."""
    path = directory / "model.onnx.data"
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 32
    path.write_bytes(damaged)
    message = refused(directory)
    expected = sha256(content.lower())
    assert f"{path} has SHA-256 {sha256(content)} in bytes {block}, expected {expected};" in message
    assert "python -m model_export" in message


@pytest.mark.parametrize(("size", "blocks"), [(7, 2), (7, 4), (6, 3), (0, 1)])
def test_wrong_number_of_hashes(small_blocks, directory, size, blocks):
    """Every block must have its hash, or some bytes would be loaded unchecked."""
    listed = json.loads((directory / manifest.FILE_NAME).read_text())["files"]
    edit(directory, files=listed | {"model.onnx.data": {"bytes": size, "sha256": ["0" * 64] * blocks}})
    message = refused(directory)
    assert f"manifest.json: files.model.onnx.data: Value error, {size} bytes need " in message
    assert f"hashes in sha256, not {blocks};" in message


def test_hash_of_the_whole_file(directory):
    """A manifest with a single hash for each file is refused, with the command that makes a new one."""
    listed = json.loads((directory / manifest.FILE_NAME).read_text())["files"]
    edit(directory, files={name: entry | {"sha256": entry["sha256"][0]} for name, entry in listed.items()})
    message = refused(directory)
    assert "files.model.onnx.sha256: " in message
    assert "export the model again: python -m model_export" in message


def test_files_are_checked_beside_the_body(directory):
    """The body of `hashes_checked` runs at once, and damage is reported at its end, also in place of another error."""
    listed = manifest.weights_files(directory, manifest.read(directory))
    (directory / "model.onnx.data").write_bytes(b"Numbers")
    loaded = []
    with pytest.raises(ModelDirectoryError, match=r"model\.onnx\.data has SHA-256"), manifest.hashes_checked(listed):
        loaded.append("weights")
    assert loaded == ["weights"]
    with pytest.raises(ModelDirectoryError, match=r"model\.onnx\.data has SHA-256"), manifest.hashes_checked(listed):
        raise StartupError("the model cannot be loaded")
    (directory / "model.onnx.data").write_bytes(b"numbers")
    with pytest.raises(StartupError, match="the model cannot be loaded"), manifest.hashes_checked(listed):
        raise StartupError("the model cannot be loaded")


def test_file_that_disappears(directory):
    """A file that is gone when its turn comes is named."""
    described = manifest.read(directory)
    (directory / "model.onnx.data").unlink()
    with (
        pytest.raises(ModelDirectoryError, match=r"model\.onnx\.data cannot be read: No such file"),
        manifest.hashes_checked(manifest.weights_files(directory, described)),
    ):
        pass


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file", "link", ".."])
def test_path_outside_the_directory(directory, name):
    """Only files directly in the directory are read, and no link leads out of it."""
    (directory.parent / "secret").write_bytes(b"weights")
    (directory / "link").symlink_to(directory.parent / "secret")
    listed = json.loads((directory / manifest.FILE_NAME).read_text())["files"]
    edit(directory, files={name: {"bytes": 7, "sha256": ["0" * 64]}, **listed})
    assert "outside the model directory" in refused(directory)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"format_version": "2"}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"special_tokens": {"bos": None, "add_bos": False, "end": [28], "default_prompt": None}}, "the file"),
        ({"quality": {"kl": 0.0, "max_logit_error": 0.0, "tokens": 1}}, "quality.decode_kl"),
        ({"kv": {"layers": 1, "kv_heads": 1, "head_dim": 1, "dtype": "int8"}}, "kv.dtype"),
        ({"files": {"model.onnx": {"bytes": 7, "sha256": ["abc"]}}}, "files.model.onnx.sha256.0"),
    ],
)
def test_field_that_does_not_fit(directory, changes, where):
    """The message names the file and the field, and what to do."""
    edit(directory, **changes)
    message = refused(directory)
    assert f"{directory / 'manifest.json'}: {where}: " in message
    assert "export the model again" in message


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "self_test.onnx", "tokenizer.json"])
def test_file_that_the_manifest_does_not_list(directory, name):
    """A manifest must list every file that is loaded, so that every one is checked."""
    listed = json.loads((directory / manifest.FILE_NAME).read_text())["files"]
    del listed[name]
    edit(directory, files=listed)
    assert f"does not list {name};" in refused(directory)


def test_manifest_that_is_not_json(directory):
    """A damaged manifest is refused like any damaged file."""
    (directory / "manifest.json").write_text("{")
    assert "manifest.json: the file: Invalid JSON" in refused(directory)


def test_bytes_per_token():
    """Keys and values count, in every layer and head."""
    layout = manifest.KVLayout(layers=2, kv_heads=3, head_dim=5, dtype="float32")
    assert layout.bytes_per_token == 2 * 2 * 3 * 5 * 4
    assert layout.model_copy(update={"dtype": "float16"}).bytes_per_token == 2 * 2 * 3 * 5 * 2
