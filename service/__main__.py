"""`python -m service --model-dir DIR`: serves a model directory."""

from __future__ import annotations

import asyncio
import sys

from service import settings, telemetry
from service.errors import EngineDiedError, ModelDirectoryError, StartupError
from service.server import serve

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
# From sysexits.h, as supervisors know it: starting again will not help.
EXIT_CONFIG = 78


def main() -> int:
    try:
        loaded = settings.load(sys.argv[1:])
        telemetry.configure(loaded.log_level)
        asyncio.run(serve(loaded))
    except (StartupError, EngineDiedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, ModelDirectoryError) else EXIT_FAILURE
    except KeyboardInterrupt:  # a second interrupt: the first one drains
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
