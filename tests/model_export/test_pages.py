"""Weights that have been read leave the memory of the process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.processes import memory
from model_export.sources.hugging_face.pages import Mappings
from model_export.sources.hugging_face.shards import open_shards

MIB = 1 << 20


def test_pages_of_shards_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all rows of a file of 64 MiB leaves none of its pages, and a row that is read again is the same."""
    weights = np.arange(16 * MIB, dtype=np.float32).reshape(1024, -1)
    save_file({"weight": weights}, tmp_path / "model.safetensors")
    tensor = open_shards(tmp_path)[0]["weight"]

    def resident_after_reading() -> int:
        before = memory(os.getpid(), "RssFile")
        assert all(np.array_equal(tensor.read(rows), weights[rows]) for rows in tensor.parts())
        return memory(os.getpid(), "RssFile") - before

    assert resident_after_reading() < 8 * MIB
    np.testing.assert_array_equal(tensor.read(slice(3, 4)), weights[3:4])
    monkeypatch.setattr(Mappings, "give_back", lambda self: None)
    assert resident_after_reading() > 48 * MIB


def test_files_that_are_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0" * MIB)
    assert Mappings.of(tmp_path / "file") == Mappings(())
