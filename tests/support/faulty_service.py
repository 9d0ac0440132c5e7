"""The service with a fault: `python -m tests.support.faulty_service FAULT STEP_SECONDS [the service's flags]`.

The fault happens once, in the next step after SIGUSR1, or in all steps from then on (`gone`). Every step takes
STEP_SECONDS longer, so that tests can act during one. Everything else is the real service.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from service import __main__
from service.engine.ort.model import Model
from service.engine.scheduler import Scheduler
from service.rpc.keys import KeyRing

armed = False
forward, schedule, authenticate = Model.forward, Scheduler.schedule, KeyRing.authenticate


def arm(*_: object) -> None:
    global armed  # noqa: PLW0603
    armed = True
    os.write(2, b"armed\n")


def fired() -> bool:
    """Whether the fault is due, which it then is no more."""
    global armed
    due, armed = armed, False
    return due


def hang(model, first_slot, rows, past, logits_at):
    if fired():
        time.sleep(1000)
    return forward(model, first_slot, rows, past, logits_at)


def fail(model, first_slot, rows, past, logits_at):
    """Fails while the sequence in slot 0 is in the batch, including the step in which it runs by itself."""
    if armed and first_slot == 0 and rows[0]:
        if sum(map(bool, rows)) == 1:
            fired()
        raise RuntimeError("secret: failed as requested")
    return forward(model, first_slot, rows, past, logits_at)


def gone(model, first_slot, rows, past, logits_at):
    """Fails from then on, on everything."""
    if armed:
        raise RuntimeError("secret: the device is gone")
    return forward(model, first_slot, rows, past, logits_at)


def nan(model, first_slot, rows, past, logits_at):
    logits = forward(model, first_slot, rows, past, logits_at)
    if fired():
        logits[0, 5] = float("nan")
    return logits


def die(scheduler, now):
    if fired():
        raise RuntimeError("died as requested")
    return schedule(scheduler, now)


def forbid_children(event: str, _: object) -> None:
    """Ends the process when it forks or starts another: a process with gRPC's threads must not fork."""
    if event in {"os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}:
        os.write(2, f"{event} was called\n".encode())
        os._exit(99)


def hang_the_loop(keys, authorization):
    """Blocks the event loop for good while it looks up a key."""
    if fired():
        time.sleep(1000)
    return authenticate(keys, authorization)


def main() -> int:
    fault, seconds, *sys.argv[1:] = sys.argv[1:]
    signal.signal(signal.SIGUSR1, arm)
    inner = {"hang": hang, "fail": fail, "gone": gone, "nan": nan}.get(fault, forward)
    if fault == "loop":
        KeyRing.authenticate = hang_the_loop  # type: ignore[method-assign]
    if fault == "die":
        Scheduler.schedule = die  # type: ignore[method-assign]
    if fault == "spawn":
        sys.addaudithook(forbid_children)

    def slowly(*arguments):
        time.sleep(float(seconds))
        return inner(*arguments)

    Model.forward = slowly  # type: ignore[method-assign]
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
