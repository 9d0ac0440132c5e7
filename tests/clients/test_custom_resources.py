"""The chart's custom resources, checked by validators that others made from the APIs' own definitions."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.documented import NODE_MODULES
from tests.deploy import helm as helms
from tests.support.stack import ROOT

pytestmark = pytest.mark.clients

KINDS = ("HTTPRoute", "ScaledObject", "ServiceMonitor")
VALUES = {
    "apiKeys": {"existingSecret": "mine"},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["texts.example"]},
    "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
}


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("helm")
    binary = helms.find(folder)
    if binary is None:
        pytest.skip("no helm")
    manifests = helms.Helm(binary, folder).render(VALUES)
    return {each["kind"]: each for each in manifests if each["kind"] in KINDS}


def check(*resources: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "@kubernetes-models").exists():
        pytest.skip("the validators are not installed: run `make test-clients`")
    script: Path = ROOT / "tests" / "clients" / "custom_resources.mjs"
    return subprocess.run([node, script], input=json.dumps(resources), capture_output=True, text=True, check=False)


def test_valid(resources: dict[str, dict[str, Any]]) -> None:
    """Everything that the chart renders of these kinds is valid."""
    assert set(resources) == set(KINDS)
    result = check(*resources.values())
    assert result.returncode == 0, result.stderr


def test_the_check_can_fail(resources: dict[str, dict[str, Any]]) -> None:
    """A number where a text belongs is found."""
    trigger = {"type": "prometheus", "metadata": {"threshold": 16}}
    scaled = resources["ScaledObject"]
    result = check({**scaled, "spec": {**scaled["spec"], "triggers": [trigger]}})
    assert result.returncode != 0
    assert "threshold" in result.stderr
