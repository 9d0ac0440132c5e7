"""Sources with bytes changed at random: each exports or is refused by one sentence, never anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.errors import ExportError
from model_export.export import read_source
from model_export.native.source import DecoderSource
from tests.model_export import tiny
from tests.model_export.bad_sources import single

# Numbers at the edge of some type, or that are a type or a count in some format.
EDGES = [
    0,
    1,
    2,
    4,
    8,
    9,
    31,
    32,
    127,
    128,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


class Whole:
    """A valid source, its file to damage, and the number of bytes in the header of that file."""

    def __init__(self, source: Path, file: Path, header: int) -> None:
        self.source, self.file, self.raw = source, file, file.read_bytes()
        self.header = min(header, len(self.raw))


def gguf(kind: Tensor) -> Callable[[Path], Whole]:
    def make(folder: Path) -> Whole:
        path = tiny.gguf(folder / "Tiny.gguf", kind)
        return Whole(path, path, 8000)

    return make


def directory(name: str) -> Callable[[Path], Whole]:
    def make(folder: Path) -> Whole:
        source = single({})(folder / "Tiny")
        return Whole(source, source / name, 3000)

    return make


SOURCES = {
    "float32": gguf(Tensor.F32),
    "4 bits": gguf(Tensor.Q4_0),
    "safetensors": directory("model.safetensors"),
    "config": directory("config.json"),
    "tokenizer": directory("tokenizer.json"),
}


@pytest.fixture(scope="module", params=SOURCES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A source of each kind."""
    return SOURCES[request.param](tmp_path_factory.mktemp("whole"))


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, bool, bytes]]:
    """A change: its kind, its place as a share of the header or of the file, and its bytes."""
    content = st.one_of(
        st.binary(min_size=1, max_size=9),
        st.builds(
            lambda number, size: (number % 256**size).to_bytes(size, "little"),
            st.sampled_from(EDGES),
            st.sampled_from([1, 4, 8]),
        ),
        st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b"-", b"1e999", b"null", b"NaN", b"\\ud800"]),
    )
    one = st.tuples(
        st.sampled_from(["write", "write", "insert", "remove", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.booleans(),
        content,
    )
    return draw(st.lists(one, min_size=1, max_size=3))


def damaged(whole: Whole, damage: list[tuple[str, float, bool, bytes]]) -> bytes:
    """The bytes of the file after the change."""
    raw = bytearray(whole.raw)
    for what, share, in_header, content in damage:
        at = int(share * (min(whole.header, len(raw)) if in_header else len(raw)))
        match what:
            case "write":
                raw[at : at + len(content)] = content
            case "insert":
                raw[at:at] = content
            case "remove":
                del raw[at : at + len(content)]
            case _:
                del raw[at:]
    return bytes(raw)


def check(whole: Whole, damage: list[tuple[str, float, bool, bytes]]) -> None:
    """Reads the damaged source and all its weights; only ExportError may be raised."""
    whole.file.write_bytes(damaged(whole, damage))
    try:
        source = read_source(whole.source)
        assert isinstance(source, DecoderSource)
        for name in source.checkpoint.tensors:
            source.checkpoint.floats(name)
    except ExportError as error:
        refusal = str(error)
    else:
        return
    assert "Tiny" in refusal


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damage=damages())
def test_damaged_bytes(whole: Whole, damage: list[tuple[str, float, bool, bytes]]) -> None:
    """A source with some bytes changed, added or removed is read, or refused with its name."""
    check(whole, damage)


@pytest.mark.slow
@pytest.mark.timeout(12000)
@settings(max_examples=5000, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages())
def test_damaged_bytes_for_long(whole: Whole, damage: list[tuple[str, float, bool, bytes]]) -> None:
    """The same with far more examples."""
    check(whole, damage)
