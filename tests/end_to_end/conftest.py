"""Shared by the end-to-end tests: a tiny model for services of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import export_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))
