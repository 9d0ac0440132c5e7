"""The snippets of docs/clients.md, ready to run: at the running stack's ports, in a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.stack import ROOT, Stack

DOCUMENT = (ROOT / "docs" / "clients.md").read_text()
CLIENTS = ROOT / ".venv-clients" / "bin"
NODE_MODULES = ROOT / "tests" / "clients" / "node_modules"


@dataclass(frozen=True)
class Workplace:
    """A folder to run snippets in, with the repository's models and tests in sight; nothing in it asks the network."""

    stack: Stack
    folder: Path

    def __post_init__(self) -> None:
        for name, target in {
            "models": ROOT / "models",
            "tests": ROOT / "tests",
            "node_modules": NODE_MODULES,
            "proto": ROOT / "proto",
            "buf.yaml": ROOT / "buf.yaml",
        }.items():
            (self.folder / name).symlink_to(target)

    def snippet(self, title: str, language: str) -> str:
        """The blocks of `language` in the section `title`, joined, with the running stack's ports."""
        (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
        blocks = re.findall(rf"^```{language}\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        assert blocks, title
        return "\n".join(blocks).replace("127.0.0.1:8080", self.stack.envoy_address)

    def write(self, name: str, title: str, language: str) -> Path:
        path = self.folder / name
        path.write_text(self.snippet(title, language))
        return path

    def run(self, *command: str | Path) -> str:
        """The command's standard output; it must succeed. Skips where its program is not installed."""
        path = f"{CLIENTS}:{NODE_MODULES / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        program, *arguments = map(str, command)
        found = shutil.which(program, path=path)
        if found is None:
            pytest.skip(f"{program} is not installed: run `make test-clients`")
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": path,
            "LLM_USER_PATH": str(self.folder),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PROMPTFOO_CONFIG_DIR": str(self.folder / "promptfoo"),
            "PROMPTFOO_DISABLE_TELEMETRY": "1",
            "PROMPTFOO_DISABLE_UPDATE": "1",
            "PROMPTFOO_DISABLE_REMOTE_GENERATION": "1",
        }
        done = subprocess.run(
            [found, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def bash(self, title: str) -> str:
        """The output of the section's commands, each of which must succeed."""
        return self.run("bash", "-c", f"set -euo pipefail\n{self.snippet(title, 'bash')}")

    def needs(self, program: str) -> None:
        """Skips where one of the clients is not installed."""
        if not any((folder / program).exists() for folder in (CLIENTS, NODE_MODULES / ".bin")):
            pytest.skip(f"{program} is not installed: run `make test-clients`")
