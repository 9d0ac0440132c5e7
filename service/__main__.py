"""`python -m service --model-dir DIR`: serves a model directory.

`config show` before the flags says instead what each setting is and where that comes from; `doctor` what would keep the
service from starting.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from service import doctor, settings
from service.errors import EngineDiedError, ModelDirectoryError, StartupError
from service.server import serve
from service.telemetry import log

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
# From sysexits.h, as supervisors know it: starting again will not help.
EXIT_CONFIG = 78


def main() -> int:
    command, arguments = chosen(sys.argv[1:])
    try:
        return command(arguments)
    except (StartupError, EngineDiedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ModelDirectoryError) else EXIT_FAILURE
    except KeyboardInterrupt:  # a second interrupt: the first one drains
        return EXIT_INTERRUPTED


def chosen(arguments: Sequence[str]) -> tuple[Callable[[Sequence[str]], int], Sequence[str]]:
    """What is to be done, and with which flags."""
    match list(arguments):
        case ["config", "show", *flags]:
            return _show, flags
        case ["doctor", *flags]:
            return _examine, flags
    return run_service, arguments


def run_service(arguments: Sequence[str]) -> int:
    loaded = settings.load(arguments)
    log.configure(loaded.log_level)
    asyncio.run(serve(loaded))
    return 0


def _show(arguments: Sequence[str]) -> int:
    loaded, origins = settings.load(arguments), settings.origins(arguments)
    rows = [(name, _shown(getattr(loaded, name)), origins[name]) for name in settings.Settings.model_fields]
    rows += [row for model in loaded.each_model() if model.table for row in _of_table(model, loaded, origins)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = (f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)
    print("\n".join(lines))
    return 0


def _of_table(
    model: settings.ModelSettings, loaded: settings.Settings, origins: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """The rows of a model with a table: what it has of its own, and what it has as all models do."""
    assert model.table is not None
    table = loaded.models[model.table]
    for name in settings.ModelTable.model_fields:
        own = getattr(table, name)
        if name in table.model_fields_set and own is not None:
            yield f"models.{model.table}.{name}", _shown(own), origins[f"models.{model.table}.{name}"]
        elif name != "memory_mib" and name in settings.Settings.model_fields:
            yield f"models.{model.table}.{name}", _shown(getattr(loaded, name)), f"as {name}"


def _shown(value: object) -> str:
    """A setting's value on one line; of tables their names."""
    match value:
        case dict():
            pairs = (
                name if isinstance(each, settings.ModelTable) else f"{name}={each}" for name, each in value.items()
            )
            return ", ".join(pairs) or "None"
        case tuple():
            return ", ".join(map(str, value)) or "None"
    return str(value)


def _examine(arguments: Sequence[str]) -> int:
    log.configure("error")  # what is found is told in the findings' own words
    good = True
    for finding in doctor.examine(settings.load(arguments)):
        print(finding, flush=True)
        good &= finding.good
    return 0 if good else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
