"""Prometheus' configuration, the alerts and the dashboard: checked by promtool, and by the service's own names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from service.telemetry.metrics import Metrics, Reading
from tests.support.stack import ROOT

FOLDER = ROOT / "deploy" / "observability"
CASES = Path(__file__).parent / "alerts_test.yaml"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
METRICS = ROOT / "docs" / "metrics.md"
ALERTS = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana" / "dashboards" / "completions.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def promtool(*arguments: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool") or shutil.which("promtool", path=Path(sys.executable).parent)
    if found is None:
        pytest.skip("no promtool: it is in Debian's package prometheus, from which `make test` takes it")
    return subprocess.run([found, *arguments], input=given, capture_output=True, text=True, check=False)


def test_configuration() -> None:
    """Prometheus accepts its configuration and the rules that it names."""
    result = promtool("check", "config", FOLDER / "prometheus.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_metrics_are_as_prometheus_likes_them() -> None:
    """Names, units and types have no fault that promtool finds; vLLM's have colons, and it says so."""
    counts = dict.fromkeys(("looked_up_tokens", "cached_tokens", "failed_steps", "not_finite", "slow_readers"), 0)
    reading = Reading(running=1, waiting=2, slots=4, slot_tokens=64, positions=256, free_positions=192, **counts)
    made = [
        Metrics(lambda: {"alphabet": reading}, vllm_names=vllm_names, certificate_expires=lambda: 1.8e9)
        for vllm_names in (False, True)
    ]
    pages = [generate_latest(each.registry).decode() for each in made]
    ours, both = (promtool("check", "metrics", given=page) for page in pages)
    assert (ours.returncode, ours.stdout + ours.stderr) == (0, "")
    assert "vllm:num_requests_running metric names should not contain ':'" in both.stdout + both.stderr


def test_alerts_fire_when_they_should() -> None:
    """The cases beside this file hold."""
    result = promtool("test", "rules", CASES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_alert_is_found(tmp_path: Path) -> None:
    """With a threshold that is ten times as high the cases do not hold."""
    changed = (FOLDER / "alerts.yaml").read_text().replace("> 0.05", "> 0.5")
    (tmp_path / "alerts.yaml").write_text(changed)
    cases = CASES.read_text().replace("../../deploy/observability/alerts.yaml", "alerts.yaml")
    (tmp_path / "cases.yaml").write_text(cases)
    result = promtool("test", "rules", tmp_path / "cases.yaml")
    assert result.returncode == 1
    assert "CompletionsOverloaded" in result.stdout + result.stderr


def test_every_alert_has_cases() -> None:
    """One where it fires, and one where it does not."""
    checks = [check for case in yaml.safe_load(CASES.read_text())["tests"] for check in case["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == names


def test_dashboards_queries(tmp_path: Path) -> None:
    """Every query of the dashboard is valid, with Grafana's variables filled in."""
    filled = [query.replace("$__rate_interval", "1m").replace("$instance", ".+") for query in QUERIES]
    assert not any("$" in query for query in filled)
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(filled)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    result = promtool("check", "rules", file)
    assert result.returncode == 0, result.stdout + result.stderr


def test_panels() -> None:
    """Panels have titles of their own, do not overlap, and ask the provisioned source."""
    source = yaml.safe_load((FOLDER / "grafana" / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    panels = DASHBOARD["panels"]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    asked = [panel["datasource"]["uid"] for panel in panels]
    asked += [target["datasource"]["uid"] for panel in panels for target in panel["targets"]]
    assert set(asked) == {source["uid"]}


@pytest.mark.skipif(not METRICS.exists(), reason="docs/metrics.md, the list of the service's metrics, is not there yet")
def test_names_are_the_services() -> None:
    """Alerts, dashboard and the chart's autoscaling name no metric and no value of a label that the service lacks."""
    documented = dict(re.findall(r"^\| `([a-z_]+)` \| (\w+) \|", METRICS.read_text(), re.MULTILINE))
    assert len(documented) > 10
    known = {"up"} | {
        f"{name}{suffix}"
        for name, kind in documented.items()
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }
    scaled = (ROOT / "deploy" / "helm" / "completion-service" / "templates" / "scaledobject.yaml").read_text()
    for text in [*QUERIES, *(rule["expr"] for rule in ALERTS), *re.findall(r"query: (.*)", scaled)]:
        named = set(re.findall(r"\b(?:llm|grpc_server|envoy)_[a-z_]+|\bup\b", re.sub(r"\{[^}]*\}", "", text)))
        assert named, text
        assert named <= known
        for values in re.findall(r'(?:outcome|reason|kind)(?:=~?|!=)"([a-z_|]+)"', text):
            assert all(f"`{value}`" in METRICS.read_text() for value in values.split("|"))


def test_paths_meet() -> None:
    """What the containers are told to read is where the folder is mounted, and there."""
    for name in ("prometheus", "grafana"):
        (mount,) = COMPOSE[name]["volumes"]
        source, target, _ = mount.split(":")
        assert (ROOT / source).resolve() == FOLDER
        told = [*COMPOSE[name].get("command", []), *COMPOSE[name].get("environment", {}).values()]
        paths = [word.rpartition("=")[2] for word in told if target in word]
        assert paths
        assert all((FOLDER / path.removeprefix(target).lstrip("/")).exists() for path in paths)
