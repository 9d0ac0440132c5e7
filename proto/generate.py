"""Generates the Python stubs beside the contract; with --check, reports committed ones that are stale."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
CONTRACT = "completion/v1/completion.proto"
# The contract's stubs import the module of this file, which no package provides.
RULES = "buf/validate/validate.proto"


def generate(target: Path) -> None:
    """Writes the stubs into `target`, laid out like the contract."""
    plugins = {name: Path(sys.executable).with_name(f"protoc-gen-{name}") for name in ("mypy", "mypy_grpc")}
    arguments = [
        "protoc",
        f"-I{PROTO}",
        f"-I{files('grpc_tools') / '_proto'}",
        *(f"--plugin=protoc-gen-{name}={path}" for name, path in plugins.items()),
        f"--python_out={target}",
    ]
    typed = [f"--grpc_python_out={target}", f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    for run in ([*arguments, *typed, CONTRACT], [*arguments, RULES]):
        if protoc.main(run) != 0:
            sys.exit(f"protoc failed on {run[-1]}")


def stale(fresh: Path) -> list[str]:
    """The stubs in `fresh` that differ from the committed ones."""
    names = [path.relative_to(fresh) for path in fresh.rglob("*_pb2*")]
    return [
        str(name)
        for name in names
        if not (PROTO / name).exists() or (PROTO / name).read_bytes() != (fresh / name).read_bytes()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the committed stubs are stale")
    if not parser.parse_args().check:
        generate(PROTO)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if names := stale(Path(folder)):
            sys.exit(f"stale stubs, run `make stubs`: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
