"""Structured logging: one JSON object per line on standard output, without prompts, keys or user ids."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# The most lines that wait to be written: a few megabytes.
_CAPACITY = 10_000
# How long the end of the process waits for them, in seconds.
_LAST_LINES_SECONDS = 1.0


# Every line begins with these fields.
_FIRST_FIELDS = ("time", "level", "logger", "message")


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose keyword arguments become fields of its line: `log.info("serving", address=...)`.

    It passes them to the standard library's logger of that name, whose level and handlers apply.
    """
    chain: list[Processor] = [
        structlog.stdlib.filter_by_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ]
    wrapped = structlog.wrap_logger(
        logging.getLogger(name), processors=chain, wrapper_class=structlog.stdlib.BoundLogger, context_class=dict
    )
    logger: structlog.stdlib.BoundLogger = wrapped.bind()
    return logger


def formatter() -> logging.Formatter:
    """Renders records of these loggers, and of libraries with their `extra`, as JSON lines of the same form."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            _ordered,
            structlog.processors.JSONRenderer(),
        ],
    )


def _ordered(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    return {**{name: line[name] for name in _FIRST_FIELDS}, **line}


class LossyHandler(logging.Handler):
    """Writes lines to a file descriptor on its own thread, so that a slow reader of the log never blocks the service.

    Lines that do not fit into the queue, or that cannot be written, are dropped and counted. The next line that is
    written is preceded by a line with the number of dropped lines.
    """

    def __init__(self, descriptor: int, capacity: int = _CAPACITY) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(capacity)
        self._overflowed = self._unwritable = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @property
    def dropped(self) -> int:
        """Lines dropped so far."""
        return self._overflowed + self._unwritable

    @property
    def unwritten(self) -> int:
        """Lines that wait or are being written."""
        return self._lines.unfinished_tasks

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._overflowed += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Waits until all lines are written, but at most a second."""
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        while self.unwritten and time.monotonic() < deadline:
            time.sleep(0.005)

    def _run(self) -> None:
        reported = 0
        while True:
            line = self._lines.get()
            try:
                if self.dropped > reported:
                    reported = self.dropped
                    self._write(self.format(_dropped(reported)))
                self._write(line)
            except OSError:
                self._unwritable += 1
            self._lines.task_done()

    def _write(self, line: str) -> None:
        data = memoryview(f"{line}\n".encode())
        while data:
            data = data[os.write(self._descriptor, data) :]


def _dropped(lines: int) -> logging.LogRecord:
    fields = {"name": __name__, "levelname": "WARNING", "levelno": logging.WARNING, "msg": "log lines dropped"}
    return logging.makeLogRecord({**fields, "dropped": lines})


def configure(level: str) -> None:
    """Sends records of `level` and above to standard output, or to nothing if that is closed."""
    handler = LossyHandler(sys.stdout.fileno() if sys.stdout is not None else os.open(os.devnull, os.O_WRONLY))
    handler.setFormatter(formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
