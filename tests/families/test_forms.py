"""The forms of matrices, over graphs that another builder made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.graph.quantize import Form
from model_export.opening import read_source
from tests.families.families import FAMILIES
from tests.families.oracle import make

pytestmark = pytest.mark.families

# The largest divergences in nats per token, with a margin of two: random weights are harder to round than trained ones.
DIVERGENCE: dict[Form, float] = {"float16": 1e-4, "int8": 2e-3, "int4": 0.15}


@pytest.fixture(scope="module", params=["gemma2", "gpt2", "granite"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soft-capped head and windows; learned positions and biases; factors everywhere."""
    (family,) = (family for family in FAMILIES if family.name == request.param)
    return make(family, tmp_path_factory.mktemp(family.name) / "source")


@pytest.mark.parametrize("form", DIVERGENCE)
def test_forms_are_near_the_source(source: Path, tmp_path: Path, form: Form) -> None:
    """Each form of matrices stays close to transformers."""
    options = Options(quantization=form, max_kl=DIVERGENCE[form])
    made = export(source, tmp_path / "model", options, lambda label, total: lambda: None)
    assert made.quality.kl <= DIVERGENCE[form]


def test_graphs_are_for_cuda(source: Path, tmp_path: Path) -> None:
    """A graph for CUDA has only operators with CUDA kernels, and computes the same on the CPU."""
    options = Options(device="cuda", max_kl=DIVERGENCE["float16"])
    assert export(source, tmp_path / "model", options, lambda label, total: lambda: None).devices == ("cpu", "cuda")


def test_without_the_extra_the_refusal_names_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If mobius-onnx is not installed, the message says what to install."""
    monkeypatch.setitem(sys.modules, "mobius", None)
    with pytest.raises(ExportError, match=r"needs mobius: pip install '\.\[families\]'"):
        read_source(source)
