"""The model for the fake GPU."""

from __future__ import annotations

import pytest

from model_export.export import Options, export
from tests.model_export import tiny


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A tiny random model for CUDA."""
    folder = tmp_path_factory.mktemp("gpu")
    source = tiny.hugging_face(folder / "source")
    export(source, folder / "model", Options(device="cuda", max_kl=0.05), lambda *_: lambda: None)
    return folder / "model"
