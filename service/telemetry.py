"""Logging: one JSON object per line on standard output, without prompts, keys or user ids."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time

# Lines that may wait to be written: some megabytes.
_CAPACITY = 10_000
# How long the end of the process may wait for them, in seconds.
_LAST_LINES_SECONDS = 1.0


class JsonFormatter(logging.Formatter):
    """Renders a record and its `fields` (passed as `extra={"fields": {...}}`) as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class LossyHandler(logging.Handler):
    """Writes lines to a file descriptor on a thread of its own: whoever logs never waits for who reads the log.

    Lines that find no room, or that cannot be written, are dropped and counted; the next line that is written is
    preceded by one that says how many.
    """

    def __init__(self, descriptor: int, capacity: int = _CAPACITY) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(capacity)
        self._refused = self._lost = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @property
    def dropped(self) -> int:
        """Lines dropped so far."""
        return self._refused + self._lost

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._refused += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Waits until all is written, but not for long."""
        deadline = time.monotonic() + _LAST_LINES_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _run(self) -> None:
        told = 0
        while True:
            line = self._lines.get()
            try:
                if self.dropped > told:
                    dropped = self.dropped
                    self._write(json.dumps({"level": "warning", "message": "log lines dropped", "dropped": dropped}))
                    told = dropped
                self._write(line)
            except OSError:
                self._lost += 1
            self._lines.task_done()

    def _write(self, line: str) -> None:
        data = memoryview(f"{line}\n".encode())
        while data:
            data = data[os.write(self._descriptor, data) :]


def configure(level: str) -> None:
    """Sends records of `level` and above to standard output."""
    handler = LossyHandler(sys.stdout.fileno())
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
