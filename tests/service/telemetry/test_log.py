"""Logging never waits for the log's reader or for the disk."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

import service
from service.telemetry.log import LossyHandler, formatter, get_logger
from tests.support.patience import PATIENCE


@pytest.fixture
def logger():
    """A logger that only this test uses."""
    made = logging.Logger("test")
    made.setLevel(logging.INFO)
    return made


def attach(logger, descriptor, capacity=10):
    handler = LossyHandler(descriptor, capacity)
    handler.setFormatter(formatter())
    logger.addHandler(handler)
    return handler


def drained(handler, reading):
    """All bytes that the handler writes until it has written every line."""
    os.set_blocking(reading, False)
    read = b""
    while handler.unwritten:
        try:
            read += os.read(reading, 1 << 16)
        except BlockingIOError:
            time.sleep(0.001)
    with suppress(BlockingIOError):
        read += os.read(reading, 1 << 16)
    return read


def read_lines(handler, reading):
    """All lines that the handler writes, parsed."""
    handler.flush()
    return [json.loads(line) for line in drained(handler, reading).splitlines()]


@pytest.fixture
def ours():
    """A handler of the root logger, and the pipe that it writes to."""
    reading, writing = os.pipe()
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    handler = attach(root, writing)
    yield handler, reading
    root.removeHandler(handler)
    root.setLevel(level)
    os.close(reading), os.close(writing)


def test_lines_are_written_in_order(logger):
    """Each record is one line of JSON with its fields, and flush waits until all are written."""
    reading, writing = os.pipe()
    handler = attach(logger, writing)
    for number in range(5):
        logger.info("line", extra={"number": number})
    handler.flush()
    lines = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    assert handler.dropped == 0
    os.close(reading), os.close(writing)


def test_libraries_lines_have_the_same_form(ours):
    """Lines of the service and of libraries have time, level, logger and message first, then their fields."""
    get_logger("service.here").info("%s now", "serving", address="127.0.0.1:1", slots=4)
    logging.getLogger("grpc._cython.cygrpc").warning("%s of %d", "one", 3, extra={"address": "b"})
    own, foreign = read_lines(*ours)
    assert list(own) == ["time", "level", "logger", "message", "address", "slots"]
    assert list(foreign) == ["time", "level", "logger", "message", "address"]
    assert (own["level"], own["logger"], own["message"], own["slots"]) == ("info", "service.here", "serving now", 4)
    assert (foreign["level"], foreign["logger"], foreign["message"]) == ("warning", "grpc._cython.cygrpc", "one of 3")
    for line in (own, foreign):
        assert abs(datetime.fromisoformat(line["time"]).timestamp() - time.time()) < PATIENCE


def test_exceptions_are_fields(ours):
    """An exception and its traceback are one text field, in lines of the service and of libraries."""
    for log in (get_logger("service.here"), logging.getLogger("asyncio")):
        try:
            raise ValueError("no\nsuch")
        except ValueError:
            log.exception("it failed")
    get_logger("service.here").error("it failed", exc_info=KeyError("later"))
    lines = read_lines(*ours)
    assert [line["level"] for line in lines] == ["error"] * 3
    for line in lines[:2]:
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ValueError: no\nsuch")
    assert lines[2]["exception"] == "KeyError: 'later'"
    assert not any("exc_info" in line for line in lines)


def test_values_that_json_does_not_know(ours):
    """A field of any type, and text that is not valid Unicode, still make a line."""
    get_logger("service.here").warning("odd", path=Path("/model"), text="\udc80\x00\u2028")
    (line,) = read_lines(*ours)
    assert "/model" in line["path"]
    assert line["text"] == "\udc80\x00\u2028"


def test_fields_are_keyword_arguments():
    """No code of the service passes `extra=` to a logger, because that would become a field named `extra`."""
    sources = (Path(service.__file__).parent).rglob("*.py")
    assert [path for path in sources if "extra={" in path.read_text()] == []


def test_levels(ours):
    """Records below the level are not written."""
    get_logger("service.here").debug("hidden")
    logging.getLogger("grpc").debug("hidden")
    get_logger("service.here").info("shown")
    assert [line["message"] for line in read_lines(*ours)] == ["shown"]


def test_a_reader_that_does_not_read(logger):
    """Logging does not block; lines that do not fit are dropped, and a line reports that once lines are read again."""
    reading, writing = os.pipe()
    handler = attach(logger, writing)
    for _ in range(2000):
        logger.info("x" * 200)
    dropped = handler.dropped
    assert 1000 < dropped < 2000
    lines = [json.loads(line) for line in drained(handler, reading).splitlines()]
    told = [line["dropped"] for line in lines if line["message"] == "log lines dropped"]
    assert told == sorted(told)
    assert len(lines) - len(told) + told[-1] == 2000
    assert {line["logger"] for line in lines if line["message"] == "log lines dropped"} == {"service.telemetry.log"}
    os.close(reading), os.close(writing)


def test_a_full_disk(logger):
    """Lines that cannot be written are counted as dropped, and no caller gets an error."""
    with Path("/dev/full").open("wb") as full:
        handler = attach(logger, full.fileno())
        logger.info("one")
        logger.info("two")
        handler.flush()
        assert handler.dropped == 2


def test_flush_does_not_wait_for_ever(logger):
    """Flush returns although nothing reads the log, so that the process can end."""
    reading, writing = os.pipe()
    handler = attach(logger, writing, capacity=2000)
    for _ in range(1000):
        logger.info("x" * 200)
    began = time.monotonic()
    handler.flush()
    assert time.monotonic() - began > 0.5
    assert handler.unwritten
    drained(handler, reading)
    os.close(reading), os.close(writing)
