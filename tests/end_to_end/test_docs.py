"""The documents are true: their snippets run against the running stack, and their tables are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from completion.v1 import completion_pb2 as pb

from service.settings import ENV_PREFIX, Settings
from tests.support.stack import ROOT, Stack

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()


def at(stack: Stack, snippet: str) -> str:
    """A snippet with the addresses of the running stack."""
    return snippet.replace("127.0.0.1:8080", stack.envoy_address).replace("127.0.0.1:50051", stack.grpc_address)


def commands(text: str, start: str) -> list[str]:
    """The indented commands of a document that begin with `start`, continued lines joined."""
    blocks = re.findall(rf"^    {start}.*?(?<!\\)$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block).strip() for block in blocks]


def test_the_readme_curl_answers(stack: Stack) -> None:
    """The README's curl gets a completion."""
    (command,) = commands(README, "curl")
    done = subprocess.run(["bash", "-c", f"{at(stack, command)} -sS"], capture_output=True, text=True, check=True)
    assert '"finish_reason":"length"' in done.stdout


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readme_programs_run(stack: Stack, snippet: str) -> None:
    """The README's Python programs print a text."""
    done = subprocess.run([sys.executable, "-c", at(stack, snippet)], capture_output=True, text=True, check=True)
    assert len(done.stdout) > 10


def test_buf_curl_answers_by_reflection(stack: Stack) -> None:
    """The documented buf curl needs no stubs."""
    (command,) = commands(API, r"\.venv/bin/buf curl")
    buf = Path(sys.executable).with_name("buf")
    command = at(stack, command.replace(".venv/bin/buf", str(buf)))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"finishReason"' in done.stdout


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    """Each setting is in the table with its flag, variable, default and description."""
    field = Settings.model_fields[name]
    (row,) = [line for line in SETTINGS.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"`--{name.replace('_', '-')}` | `{ENV_PREFIX}{name.upper()}`" in row
    assert row.endswith(f"{field.description} |")
    if name != "threads" and field.default is not None and not isinstance(field.default, tuple | dict):
        assert f"| {field.default} |" in row


def test_every_parameter_is_in_the_readme() -> None:
    """The README names every field of the request but the forms of the prompt that are the contract's own."""
    fields = set(pb.CreateCompletionRequest.DESCRIPTOR.fields_by_name)
    fields -= {"text", "texts", "tokens", "token_batch", "parts", "json_prompt", "json_stop"}
    missing = [field for field in sorted(fields | {"prompt"}) if f"`{field}`" not in README]
    assert missing == []
