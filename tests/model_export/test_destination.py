"""Where the exporter may write, and what it leaves when it cannot go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model_export.__main__ import main
from model_export.destination import remove_leftovers
from tests.model_export import tiny
from tests.support.patience import PATIENCE, eventually

EXPORTER = """
import sys
from model_export import __main__
sys.exit(__main__.main())
"""
# Gives up root's right to write everywhere (linux/prctl.h, linux/capability.h), from the next program on; others have
# none to give up.
AS_ANYBODY = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "model_export", *sys.argv[1:]])
"""
# Writes no file above a size, as on a full disk.
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""
# Waits where a graph has been written and would be compared with its source. The test process may ignore signals, as
# background jobs of shells and commands under `nohup` do.
WAITING = """
import signal
from model_export import export
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
export.verify = lambda *arguments, **options: signal.pause()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny source in its own folder."""
    (tmp_path / "in").mkdir()
    return tiny.hugging_face(tmp_path / "in" / "Tiny")


def contents(path: Path) -> list[str]:
    """Everything below `path`."""
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def inside(source: Path) -> Path:
    return source / "out" / "model"


def itself(source: Path) -> Path:
    return source


def around(source: Path) -> Path:
    return source.parent


def through_a_link(source: Path) -> Path:
    (source.parent.parent / "link").symlink_to(source)
    return source.parent.parent / "link" / "out"


def file(source: Path) -> Path:
    (source.parent / "file").write_text("kept")
    return source.parent / "file"


def below_a_file(source: Path) -> Path:
    return file(source) / "model"


def link(source: Path) -> Path:
    (source.parent / "model").symlink_to("nowhere")
    return source.parent / "model"


def link_to_a_directory(source: Path) -> Path:
    (source.parent / "real").mkdir()
    (source.parent / "real" / "manifest.json").write_text("{}")
    (source.parent / "model").symlink_to("real")
    return source.parent / "model"


def loop(source: Path) -> Path:
    (source.parent / "model").symlink_to("model")
    return source.parent / "model" / "deeper"


def long_name(source: Path) -> Path:
    return source.parent / ("x" * 300)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (inside, "contains the other"),
        (itself, "contains the other"),
        (around, "contains the other"),
        (through_a_link, "contains the other"),
        (file, "is not a model directory; refusing to replace it"),
        (below_a_file, "file: "),
        (link, "is a link; give the directory that it leads to"),
        (link_to_a_directory, "is a link; give the directory that it leads to"),
        (loop, "model: "),
        (long_name, "File name too long"),
    ],
)
def test_place_that_will_not_do(
    place: Callable[[Path], Path], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal is one sentence and changes nothing, even with --overwrite."""
    target = place(source)
    before = contents(tmp_path)
    assert main([str(source), str(target), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("model_export: ")
    assert error.count("\n") == 1
    assert message in error
    assert contents(tmp_path) == before


def test_source_in_the_directory_to_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replacing a model directory never removes the source."""
    target = tmp_path / "model"
    assert main([str(tiny.hugging_face(tmp_path / "Tiny")), str(target), "--quantization=float32"]) == 0
    source = tiny.hugging_face(target / "Tiny")
    before = contents(tmp_path)
    assert main([str(source), str(target), "--overwrite"]) == 2
    assert "contains the other" in capsys.readouterr().err
    assert contents(tmp_path) == before


def command(source: Path, target: Path, prelude: str) -> subprocess.Popen[str]:
    """The exporter in a separate process, which runs `prelude` first."""
    return subprocess.Popen(
        [sys.executable, "-c", prelude + EXPORTER, str(source), str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("size", [100, 20_000, 150_000])
def test_full_disk(size: int, source: Path, tmp_path: Path) -> None:
    """If the disk is too full for the weights or the tokenizer, one sentence says so and nothing is left."""
    before = contents(tmp_path)
    process = command(source, tmp_path / "new" / "out", SMALL_FILES.format(size=size))
    output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (2, "")
    assert error.startswith("model_export: ")
    assert error.endswith("File too large\n")
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_read_only_parent(source: Path, tmp_path: Path) -> None:
    """If the destination is not writable, the message names it."""
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    process = command(source, tmp_path / "out", AS_ANYBODY)
    output, error = process.communicate(timeout=PATIENCE)
    tmp_path.chmod(0o755)
    assert (process.returncode, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"model_export: {tmp_path}/")
    assert error.endswith(": Permission denied\n")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_leaves_nothing(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """An export that gets a signal to end leaves nothing behind, not even the folder that it created."""
    before = contents(tmp_path)
    target = tmp_path / "new" / "out"
    process = command(source, target, WAITING)
    eventually(lambda: any(target.parent.glob("*/model.onnx")) or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(number)
    output, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (130, "")
    assert error == "model_export: interrupted; nothing was written\n"
    assert contents(tmp_path) == before


def test_killed_export(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a killed export left is removed by the next export to the same target, which says so; not while it runs."""
    target = tmp_path / "model"
    process = command(source, target, WAITING)
    eventually(lambda: any(tmp_path.glob(".model.*/tokenizer.json")) or process.poll() is not None)
    assert process.poll() is None
    (left,) = tmp_path.glob(".model.*")
    other = left.with_name(left.name.replace("model", "other"))
    other.mkdir()
    assert remove_leftovers(target) == []
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert left.exists()
    assert main([str(source), str(target), "--quantization=float32"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"model_export: removed {left} of ")
    assert error.endswith(" MiB, which an export that was killed left\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "in", "model"]


def test_killed_while_replacing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that a killed export had moved aside comes back; once there is another one, it is removed."""
    target, aside = tmp_path / "model", tmp_path / ".model.0123456789abcdef.replaced"
    assert main([str(source), str(target), "--quantization=float32"]) == 0
    before = contents(target)
    target.rename(aside)
    assert main([str(source), str(target)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"model_export: moved {aside} back to {target}, which an export that was killed was replacing"
    assert "give --overwrite to replace it" in second
    assert contents(target) == before
    aside.mkdir()
    assert len(remove_leftovers(target)) == 1
    assert contents(target) == before
    assert not aside.exists()


def test_what_is_no_leftover_stays(tmp_path: Path) -> None:
    """Only directories with the names that the exporter makes are removed, and no links."""
    for name in (".model.0123", ".model.0123456789abcdeg", ".model.0123456789abcdef0", "model.0123456789abcdef"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.0123456789abcdef").symlink_to(".model.0123")
    (tmp_path / ".model.1123456789abcdef").touch()
    before = contents(tmp_path)
    assert remove_leftovers(tmp_path / "model") == []
    assert contents(tmp_path) == before
