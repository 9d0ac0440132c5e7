"""Shared by the end-to-end tests: a tiny model for services of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import export_tiny
from tests.support.stack import MODEL


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers to the default model's alias as well."""
    return export_tiny(tmp_path_factory.mktemp("tiny"), MODEL)
