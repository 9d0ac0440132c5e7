"""Damaged, mislabelled and hostile sources end in one sentence, run nothing and leave nothing."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_export.__main__ import main
from model_export.export import read_source
from tests.model_export import bad_directories, bad_gguf
from tests.model_export.bad_directories import EXPLODING, split
from tests.model_export.bad_sources import (
    content,
    fifo,
    hugging_face,
    json_entries,
    only_pickle,
    single,
)
from tests.model_export.gguf_files import Maker, gguf, whole
from tests.support.patience import PATIENCE

TABLES = {**bad_gguf.TABLES, **bad_directories.TABLES, **bad_gguf.LYING, **bad_directories.LYING}
# For each row of each table: a function that makes the bad source, and the expected message.
CASES = [
    pytest.param(make(*changes), message, id=f"{table}-{what}")
    for table, (make, rows) in TABLES.items()
    for what, *changes, message in rows
]
LYING = [
    (make(*changes), message)
    for make, rows in (bad_gguf.LYING | bad_directories.LYING).values()
    for _, *changes, message in rows
]


def state(path: Path) -> dict[str, str]:
    """Every file at and below `path`, with a hash of its content."""
    found = {}
    for each in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
        size = each.lstat().st_size
        plain = each.is_file() and size < 1 << 26 and not str(each).startswith("/dev")
        found[str(each)] = hashlib.sha256(each.read_bytes()).hexdigest() if plain else f"{each.lstat().st_mode} {size}"
    return found


def refused(source: Path, target: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The sentence with which the command line refuses `source`; the source has not changed and nothing was written."""
    before = state(source)
    assert main([str(source), str(target / "out" / "model"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("model_export: ")
    assert source.name in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.rstrip("\n").isprintable()
    assert state(source) == before
    assert list(target.iterdir()) == []
    return captured.err


@pytest.mark.parametrize(("make", "message"), CASES)
def test_one_sentence(make: Maker, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each bad source is refused by one sentence that says what is wrong, and nothing is left behind."""
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    source = make(tmp_path / "source" / "Tiny")
    assert message in refused(source, tmp_path / "target", capsys)


def test_cut_off_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF file that ends too early is refused wherever it ends."""
    raw = whole().encode()
    data = len(raw) - len(whole().data)
    chosen = random.Random(7)
    ends = [*range(0, 32, 3), *chosen.sample(range(32, data), 40), *chosen.sample(range(data, len(raw)), 20)]
    (tmp_path / "target").mkdir()
    for end in [*ends, len(raw) - 4]:
        source = content(raw[:end])(tmp_path / "Tiny.gguf")
        assert "Tiny.gguf is not a complete GGUF file: " in refused(source, tmp_path / "target", capsys)


def test_whole_sources_export(tmp_path: Path) -> None:
    """The sources that the bad ones are made from can be exported, so only the change can be the reason."""
    for name, make in {"a": gguf(lambda m: None), "b": hugging_face(), "c": single({})}.items():
        source = make(tmp_path / name)
        assert main([str(source), str(tmp_path / f"{name}.out"), "--quantization=float32"]) == 0


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    """A snapshot in the Hugging Face cache consists of links to blobs beside it; only those may lead out."""
    snapshot = hugging_face()(tmp_path / "made")
    home = tmp_path / "models--tiny" / "snapshots" / "Tiny"
    (home.parent.parent / "blobs").mkdir(parents=True)
    home.mkdir(parents=True)
    for file in snapshot.iterdir():
        file.rename(home.parent.parent / "blobs" / file.name)
        (home / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_source(home).origin.name == "Tiny"


LIMITED = """
import resource, sys
from model_export.__main__ import main
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), used + (200 << 20)))
print([main([source, sys.argv[1]]) for source in sys.argv[2:]])
"""


def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """Sources that claim to be huge are refused with the right message by a process that may use only 200 MiB more."""
    sources = [make(tmp_path / str(number)) for number, (make, _) in enumerate(LYING)]
    run = python("-c", LIMITED, str(tmp_path / "out" / "model"), *map(str, sources))
    assert run.stdout == f"{[2] * len(LYING)}\n"
    lines = run.stderr.splitlines()
    assert len(lines) == len(LYING)
    for line, (_, message) in zip(lines, LYING, strict=True):
        assert message in line
    assert not (tmp_path / "out").exists()


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python and waits for its end."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False, **options
    )


@pytest.mark.parametrize("case", ["cut off", "fifo", "directory", "panic"])
def test_command_line(case: str, tmp_path: Path) -> None:
    """The command exits with code 2 and prints one line."""
    make = {
        "cut off": content(whole().encode()[:9999]),
        "fifo": fifo,
        "directory": hugging_face(head_dim=0),
        "panic": json_entries("tokenizer.json", {"pre_tokenizer": split(EXPLODING)}),
    }[case]
    source = make(tmp_path / "Tiny")
    run = python("-m", "model_export", str(source), str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("model_export: ")
    assert source.name in run.stderr
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_pickle_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source whose weights are only a pickle is refused with advice, and the pickle is not opened."""
    marker, target = tmp_path / "ran", tmp_path / "target"
    target.mkdir()
    source = only_pickle(marker)(tmp_path / "Tiny")
    assert "only pytorch_model.bin: a pickle, which may run any code" in refused(source, target, capsys)
    assert not marker.exists()


CODE = {
    "AutoConfig": "modeling_x.Config",
    "AutoModelForCausalLM": "modeling_x.Model",
    "AutoTokenizer": ["modeling_x.T", None],
}


def with_code(marker: Path, **config: Any) -> Maker:
    """A Hugging Face directory with code that makes the file `marker`, named wherever code can be named."""

    def change(path: Path) -> None:
        code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
        for name in (
            "modeling_x.py",
            "configuration_x.py",
            "tokenization_x.py",
            "__init__.py",
            "setup.py",
            "config.py",
        ):
            (path / name).write_text(code)
        template = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
        settings = {"tokenizer_class": "X", "auto_map": CODE, "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        (path / "chat_template.jinja").write_text(template)

    return hugging_face(change, auto_map=CODE, trust_remote_code=True, architectures=["X"], **config)


def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code beside a model is never run: an unknown architecture is refused, and a known one does not need code."""
    marker, target = tmp_path / "ran", tmp_path / "target"
    target.mkdir()
    own = with_code(marker, model_type="x")(tmp_path / "Own")
    assert "architecture 'x' is not supported" in refused(own, target, capsys)
    assert not marker.exists()
    known = with_code(marker)(tmp_path / "Known")
    assert main([str(known), str(target / "model"), "--quantization=float32"]) == 0
    assert not marker.exists()
