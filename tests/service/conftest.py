"""Settings and fixtures of all fast tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

from service.text.tokenizer import Tokenizer
from tests.support.fakes import letters_tokenizer

# No deadline, since a busy machine is no failure; every run tries the same examples.
settings.register_profile("fast", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("fast")


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of one token per letter."""
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))
