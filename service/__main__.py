"""`python -m service --model-dir DIR` serves a model directory.

With `config show` before the flags it prints each setting's value and source instead; with `doctor` it checks whether
the service could start.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from service import doctor, settings
from service.errors import EngineDiedError, ModelDirectoryError, StartupError
from service.model_table import ModelTable
from service.process import serve
from service.telemetry import log

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
# EX_CONFIG of sysexits.h, which supervisors know: starting again will not help.
EXIT_CONFIG = 78


def main() -> int:
    command, arguments = parse_command(sys.argv[1:])
    try:
        return command(arguments)
    except (StartupError, EngineDiedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ModelDirectoryError) else EXIT_FAILURE
    except KeyboardInterrupt:  # a second interrupt: the first one drains
        return EXIT_INTERRUPTED


def parse_command(arguments: Sequence[str]) -> tuple[Callable[[Sequence[str]], int], Sequence[str]]:
    """The function of the command that the arguments name, and the flags for it."""
    match list(arguments):
        case ["config", "show", *flags]:
            return _show_settings, flags
        case ["doctor", *flags]:
            return _run_doctor, flags
    return run_service, arguments


def run_service(arguments: Sequence[str]) -> int:
    loaded = settings.load(arguments)
    log.configure(loaded.log_level)
    asyncio.run(serve(loaded))
    return 0


def _show_settings(arguments: Sequence[str]) -> int:
    loaded, origins = settings.load(arguments), settings.origins(arguments)
    rows = [(name, _one_line(getattr(loaded, name)), origins[name]) for name in settings.Settings.model_fields]
    for name, table in loaded.models.items():
        rows += _table_rows(name, table, loaded, origins)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = (f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)
    print("\n".join(lines))
    return 0


def _table_rows(
    table_name: str, table: ModelTable, loaded: settings.Settings, origins: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """The rows of a model's table: the entries that it has, and the settings that it shares with all models."""
    for name in ModelTable.model_fields:
        row, value = f"models.{table_name}.{name}", getattr(table, name)
        if name in table.model_fields_set and value is not None:
            yield row, _one_line(value), origins[row]
        elif name != "memory_mib" and name in settings.Settings.model_fields:
            yield row, _one_line(getattr(loaded, name)), f"as {name}"


def _one_line(value: object) -> str:
    """A setting's value on one line; tables of models appear by their names."""
    match value:
        case dict():
            pairs = (name if isinstance(entry, ModelTable) else f"{name}={entry}" for name, entry in value.items())
            return ", ".join(pairs) or "None"
        case tuple():
            return ", ".join(map(str, value)) or "None"
    return str(value)


def _run_doctor(arguments: Sequence[str]) -> int:
    log.configure("error")  # the findings say what lower levels would log
    passed = True
    for finding in doctor.examine(settings.load(arguments)):
        print(finding, flush=True)
        passed &= finding.passed
    return 0 if passed else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
