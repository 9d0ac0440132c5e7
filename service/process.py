"""Runs the server as a process: handles signals, watches for hangs, and decides how the process ends."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import logging
import os
import signal

from service import watchdog
from service.errors import EngineDiedError
from service.rpc.servicer import ServedModel
from service.server import LAST_ERRORS_SECONDS, Server, sums
from service.settings import Settings
from service.telemetry.log import get_logger

_log = get_logger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish; a second signal ends the process at once.

    Raises EngineDiedError when the engine of a model has died, so that a supervisor restarts the process.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:  # loading blocks the event loop, and no request has been accepted yet: exit at once
        signal.signal(number, lambda number, _: os._exit(128 + number))
    server = Server(settings)

    def end() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.add_signal_handler(number, os._exit, 128 + number)

    def end_hung_loop() -> None:
        _log.critical("the event loop hangs", seconds=settings.watchdog_seconds)
        _die()

    for number in _SIGNALS:
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, server.reload_keys)
    engines = [model.engine for model in server.models]
    deaths = [engine.died for engine in engines]
    seconds = settings.watchdog_seconds
    watches = [asyncio.ensure_future(_end_when_hung(server, model, seconds)) for model in server.models]
    with watchdog.Heartbeat(loop, seconds, end_hung_loop):
        async with server:
            await _wait_for_any(stop, *deaths)
            end()
            _log.info("draining", **sums(engine.stats for engine in engines))
            server.announce_end()
            await _wait_for_any(*deaths, within=settings.drain_delay_seconds)
    for watch in watches:
        watch.cancel()
    if dead := server.dead_models():
        raise EngineDiedError(f"the engine has died ({', '.join(dead)}); the log has the cause")


async def _end_when_hung(server: Server, model: ServedModel, seconds: float) -> None:
    """Watches a model's engine. When a step never ends, every call gets an error, and the process exits with 1."""
    await watchdog.hung(lambda: model.engine.running_step, seconds)
    _log.critical("the engine hangs", model=model.id, seconds=seconds, **dataclasses.asdict(model.engine.stats))
    server.abandon(model)
    await asyncio.sleep(LAST_ERRORS_SECONDS)
    _die()


def _die() -> None:
    """Ends the process with 1, after writing every thread's stack to standard error."""
    try:
        faulthandler.dump_traceback(all_threads=True)
        logging.shutdown()
    finally:
        os._exit(1)


async def _wait_for_any(*events: asyncio.Event, within: float | None = None) -> None:
    """Waits until one of the events is set, or for `within` seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
