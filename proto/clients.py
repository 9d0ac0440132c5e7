"""Generates the callers' stubs into examples/<language>/stubs: for all languages, or for those named.

The stubs are made from the callers' view of the contract: without the options that only the service and Envoy read, and
without the method that only Envoy calls. So they need nothing but the language's own protobuf and gRPC libraries.

The generators are old: generated code works with libraries of its own version and later, never with earlier ones.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
CONTRACT = "completion/v1/completion.proto"
# gRPC's envelope of typed error details, for the languages whose gRPC library has no class for it.
STATUS = "google/rpc/status.proto"
ENVOYS_METHOD = "completion.v1.CompletionService.StreamCompletionEvents"

BIN = Path(sys.executable).parent
GENERATORS_PYTHON = ROOT / "build" / "generators" / "bin" / "python"
SEARCH = [EXAMPLES / "typescript" / "node_modules" / ".bin", ROOT / "build" / "bin", BIN]

DEBIAN = "install it with examples/install-toolchains.sh (Debian 12)"
NPM = "run `npm ci` in examples/typescript"
PIP = "run `make client-stubs`, which installs it"


class MissingToolError(Exception):
    """The missing or outdated tool, and where it comes from."""


@dataclass(frozen=True)
class Tool:
    """A program that generates code, its source, and its pinned version if the program reports one."""

    program: str
    source: str
    version: str = ""

    def path(self) -> str:
        """The path of the program, after a check that it is the pinned version."""
        folders = ":".join(map(str, SEARCH))
        found = shutil.which(self.program, path=folders) or shutil.which(self.program)
        if found is None:
            raise MissingToolError(f"{f'{self.program} {self.version}'.strip()} is missing: {self.source}")
        if self.version:
            check_version([found], self.version, self.source)
        return found

    def command(self) -> list[str]:
        return [self.path()]


@dataclass(frozen=True)
class Module:
    """A protoc that is a Python module in build/generators, and its pinned version."""

    name: str
    version: str

    def command(self) -> list[str]:
        """The command that runs it, after a check that it is the pinned version."""
        if not GENERATORS_PYTHON.exists():
            raise MissingToolError(f"{self.name} {self.version} is missing: {PIP}")
        command = [str(GENERATORS_PYTHON), "-m", self.name]
        check_version(command, self.version, PIP)
        return command


def check_version(command: list[str], version: str, source: str) -> None:
    """Raises unless the program reports this version."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    printed = (done.stdout + done.stderr).strip()
    if done.returncode != 0 or version not in re.findall(r"\d[\d.]*", printed):
        raise MissingToolError(f"{' '.join(command)} is {printed!r}, {version} is needed: {source}")


PROTOC = Tool("protoc", DEBIAN, "3.21.12")
# Those of generators.txt: grpcio-tools 1.66.2 contains protoc 27.2.
PYTHON_MESSAGES = Module("protoc", "25.5")
PYTHON_SERVICES = Module("grpc_tools.protoc", "27.2")
GRPC_TOOLS_PROTOC = [sys.executable, "-m", "grpc_tools.protoc"]


@dataclass(frozen=True)
class Run:
    """A run of protoc: its output flags, {out} being the folder, and its plugins by flag."""

    flags: tuple[str, ...]
    plugins: dict[str, Tool] = field(default_factory=dict)
    protoc: Tool | Module | None = None  # None: that of .venv's grpcio-tools
    sources: tuple[str, ...] = (CONTRACT,)


LANGUAGES = {
    "python": (
        Run(
            ("--python_out={out}", "--mypy_out=quiet:{out}", "--mypy_grpc_out=quiet:{out}"),
            {name: Tool(f"protoc-gen-{name}", PIP) for name in ("mypy", "mypy_grpc")},
            PYTHON_MESSAGES,
        ),
        Run(("--grpc_python_out={out}",), protoc=PYTHON_SERVICES),
    ),
    "typescript": (
        Run(
            ("--es_out={out}", "--es_opt=target=ts,import_extension=js"),
            {"es": Tool("protoc-gen-es", NPM, "2.2.0")},
        ),
    ),
    "go": (
        Run(
            (
                "--go_out={out}",
                "--go_opt=paths=source_relative",
                "--go-grpc_out={out}",
                "--go-grpc_opt=paths=source_relative",
            ),
            {"go": Tool("protoc-gen-go", DEBIAN, "1.28.1"), "go-grpc": Tool("protoc-gen-go-grpc", DEBIAN, "1.0")},
            PROTOC,
        ),
    ),
    "java": (
        Run(
            ("--java_out={out}", "--grpc_out={out}"),
            {"grpc": Tool("grpc_java_plugin", DEBIAN)},
            PROTOC,
            (CONTRACT, STATUS),
        ),
    ),
    "cpp": (
        Run(
            ("--cpp_out={out}", "--grpc_out={out}"),
            {"grpc": Tool("grpc_cpp_plugin", DEBIAN)},
            PROTOC,
            (CONTRACT, STATUS),
        ),
    ),
    "csharp": (
        Run(
            ("--csharp_out={out}", "--grpc_out={out}", "--grpc_opt=no_server"),
            {"grpc": Tool("grpc_csharp_plugin", DEBIAN)},
            PROTOC,
        ),
    ),
}


def run(*command: str | Path) -> bytes:
    """The command's standard output; exits with its standard error when it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{Path(command[0]).name} failed:\n{done.stderr.decode()}")
    return done.stdout


def built(*flags: str) -> descriptor_pb2.FileDescriptorSet:
    """The contract and what it imports, comments kept, as buf builds them."""
    command = [Tool("buf", PIP).path(), "build", "--as-file-descriptor-set", "--path", f"proto/{CONTRACT}"]
    return descriptor_pb2.FileDescriptorSet.FromString(run(*command, *flags, "-o", "-"))


def callers_view() -> descriptor_pb2.FileDescriptorSet:
    """The contract and what it imports, as callers need it."""
    (contract,) = [file for file in built().file if file.name == CONTRACT]
    methods = [f"{service.name}.{method.name}" for service in contract.service for method in service.method]
    kept = [f"{contract.package}.{name}" for name in (*methods, *(message.name for message in contract.message_type))]
    view = built(*(f"--type={name}" for name in kept if name != ENVOYS_METHOD))
    # Custom options are unknown fields here, since nothing imports the code that declares them.
    view.DiscardUnknownFields()
    for file in view.file:
        if file.name == CONTRACT:
            needed = [name for name in file.dependency if name.startswith("google/protobuf/")]
            del file.dependency[:]
            file.dependency.extend(needed)
            # The contract leaves package names of other languages to its callers.
            file.options.java_multiple_files = True
            file.options.java_package = "completion.v1"
            file.options.go_package = "completion.example/stubs/completion/v1;completionv1"
    return view


def status_file(folder: Path) -> descriptor_pb2.FileDescriptorSet:
    """google.rpc.Status and what it imports, as the googleapis-common-protos package has it."""
    site = sysconfig.get_path("purelib")
    path = folder / "status.binpb"
    includes = [f"-I{site}", f"-I{site}/grpc_tools/_proto"]
    run(*GRPC_TOOLS_PROTOC, *includes, f"--descriptor_set_out={path}", "--include_imports", STATUS)
    return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())


def write_view(folder: Path) -> Path:
    """Writes all files that protoc needs, each once, into `folder`."""
    every = {file.name: file for part in (status_file(folder), callers_view()) for file in part.file}
    path = folder / "view.binpb"
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=every.values()).SerializeToString())
    return path


def generate(name: str, view: Path) -> Path:
    """Writes one language's stubs into an emptied folder, and returns the folder."""
    out = EXAMPLES / name / "stubs"
    commands = []
    for part in LANGUAGES[name]:
        protoc = part.protoc.command() if part.protoc else GRPC_TOOLS_PROTOC
        plugins = [f"--plugin=protoc-gen-{flag}={tool.path()}" for flag, tool in part.plugins.items()]
        flags = [flag.format(out=out) for flag in part.flags]
        commands.append([*protoc, f"--descriptor_set_in={view}", *plugins, *flags, *part.sources])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for command in commands:
        run(*command)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("languages", nargs="*", metavar="language", help=f"of {', '.join(LANGUAGES)}; default: all")
    names = parser.parse_args().languages or list(LANGUAGES)
    if unknown := [name for name in names if name not in LANGUAGES]:
        parser.error(f"no such language: {', '.join(unknown)}; there are {', '.join(LANGUAGES)}")
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            view = write_view(Path(folder))
        except MissingToolError as problem:
            sys.exit(f"no stubs: {problem}")
        for name in names:
            try:
                print(f"{name}: {generate(name, view).relative_to(ROOT)}")
            except MissingToolError as problem:
                missing.append(f"{name}: {problem}")
    if missing:
        sys.exit("no stubs for\n  " + "\n  ".join(missing))


if __name__ == "__main__":
    main()
