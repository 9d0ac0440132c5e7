"""Logging never waits: not for a reader, and not for a disk."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from service.telemetry import JsonFormatter, LossyHandler


@pytest.fixture
def logger():
    """A logger of the test's own."""
    made = logging.Logger("test")
    made.setLevel(logging.INFO)
    return made


def attach(logger, descriptor, capacity=10):
    handler = LossyHandler(descriptor, capacity)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    return handler


def drained(handler, reading):
    """All that the handler has to write."""
    os.set_blocking(reading, False)
    read = b""
    while handler._lines.unfinished_tasks:
        try:
            read += os.read(reading, 1 << 16)
        except BlockingIOError:
            time.sleep(0.001)
    with suppress(BlockingIOError):
        read += os.read(reading, 1 << 16)
    return read


def test_lines_are_written_in_order(logger):
    """One JSON object per line, with its fields; flush waits for them."""
    reading, writing = os.pipe()
    handler = attach(logger, writing)
    for number in range(5):
        logger.info("line", extra={"fields": {"number": number}})
    handler.flush()
    lines = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    assert handler.dropped == 0
    os.close(reading), os.close(writing)


def test_a_reader_that_does_not_read(logger):
    """Whoever logs goes on; what finds no room is dropped, and that is said as soon as lines are read again."""
    reading, writing = os.pipe()
    handler = attach(logger, writing)
    began = time.monotonic()
    for _ in range(2000):
        logger.info("x" * 200)
    assert time.monotonic() - began < 1
    dropped = handler.dropped
    assert 1000 < dropped < 2000
    lines = [json.loads(line) for line in drained(handler, reading).splitlines()]
    told = [line["dropped"] for line in lines if line["message"] == "log lines dropped"]
    assert told == sorted(told)
    assert len(lines) - len(told) + told[-1] == 2000
    os.close(reading), os.close(writing)


def test_a_full_disk(logger):
    """Lines that cannot be written are counted, and nobody fails."""
    with Path("/dev/full").open("wb") as full:
        handler = attach(logger, full.fileno())
        logger.info("one")
        logger.info("two")
        handler.flush()
        assert handler.dropped == 2


def test_flush_does_not_wait_for_ever(logger):
    """The process can end although nobody reads."""
    reading, writing = os.pipe()
    handler = attach(logger, writing, capacity=2000)
    for _ in range(1000):
        logger.info("x" * 200)
    began = time.monotonic()
    handler.flush()
    assert 0.5 < time.monotonic() - began < 3
    drained(handler, reading)
    os.close(reading), os.close(writing)
