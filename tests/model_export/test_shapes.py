"""Models of any width export in every form; a size that the runtime does not support is refused at the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.graph.quantize import pack
from model_export.opening import read_source
from model_export.sources.weights import BLOCK
from service.manifest import Manifest
from tests.model_export import tiny

FORMS = {
    "int8": Options(quantization="int8", max_kl=0.1),
    "int8, for GPUs": Options(quantization="int8", activations="float16", max_kl=0.1),
    "int4": Options(quantization="int4", max_kl=2),
    "int4, for GPUs": Options(quantization="int4", activations="float16", max_kl=2),
    "float16": Options(quantization="float16"),
    "float32": Options(quantization="float32"),
}


def sized(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Lets the tiny models have other sizes."""
    for name, size in sizes.items():
        monkeypatch.setattr(tiny, name, size)


def exported(folder: Path, options: Options) -> Manifest:
    """The export of the tiny model in its present sizes."""
    source = tiny.hugging_face(folder / "Tiny")
    return export(source, folder / "model", options, lambda label, total: lambda: None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 172), (48, 112), (8, 40)])
def test_any_number_of_columns(
    form: str, hidden: int, intermediate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns that are no multiple of a block (ggml-org/llama.cpp#2708, ml-explore/mlx#328) change no result."""
    sized(monkeypatch, HIDDEN=hidden, INTERMEDIATE=intermediate, HEAD_DIM=16)
    assert exported(tmp_path, FORMS[form]).quality.kl < {"float16": 1e-3, "float32": 1e-6}.get(form, 2)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("columns", [1, 8, 31, 33, 172])
def test_filled_up_with_nothing(form: str, columns: int) -> None:
    """A matrix is stored as one with columns of zeros behind is."""
    weights = np.random.default_rng(7).standard_normal((5, columns)).astype(np.float32)
    made, padded = pack(weights, form), pack(np.pad(weights, ((0, 0), (0, -columns % BLOCK))), form)
    assert made.columns == columns
    np.testing.assert_array_equal(made.codes, padded.codes)
    np.testing.assert_array_equal(made.scales, padded.scales)
    np.testing.assert_array_equal(made.zero_points, padded.zero_points)


@pytest.mark.parametrize("size", [2, 8, 20, 24, 100])
def test_head_sizes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head size that the attention operator does not support is refused before anything is built."""
    sized(monkeypatch, HEAD_DIM=size)
    with pytest.raises(ExportError, match=rf"config.json: the head size is {size}, supported are multiples of 16"):
        read_source(tiny.hugging_face(tmp_path / "Tiny"))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.fixed_dictionaries(
        {
            "HIDDEN": st.integers(1, 80),
            "INTERMEDIATE": st.integers(1, 80),
            "KV_HEADS": st.integers(1, 3),
            "HEAD_DIM": st.sampled_from([16, 32, 48, 80]),
            "LAYERS": st.just(1),
        }
    ),
    group=st.integers(1, 3),
    form=st.sampled_from([form for form in FORMS if form != "float16"]),
)
def test_any_size(sizes: dict[str, int], group: int, form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is not refused at the start, onnxruntime can run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sized(monkeypatch, **sizes, HEADS=sizes["KV_HEADS"] * group)
        assert exported(tmp_path_factory.mktemp("sizes"), FORMS[form]).kv.head_dim == sizes["HEAD_DIM"]
