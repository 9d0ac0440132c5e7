"""Alerts on Envoy's numbers, shown to fire on what was scraped of a real one while things went wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from grpc_health.v1 import health_pb2

from tests.deploy.test_observability import ALERTS, FOLDER, promtool
from tests.end_to_end.test_operators import METRICS, lines, scrape
from tests.support.patience import eventually
from tests.support.stack import Stack, envoy, free_ports
from tests.support.stub import Stub, serving

SECONDS = 5
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
NAMES = {name for rule in ALERTS for name in re.findall(r"\benvoy_\w+", rule["expr"])} - {
    "envoy_cluster_name",
    "envoy_http_conn_manager_prefix",
}
LABELS = 'job="completions-envoy", instance="here"'


class Scrapes:
    """What a Prometheus that scrapes every 5 s would have seen: the samples of each series, and whether it got any."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._series: dict[str, dict[int, str]] = defaultdict(dict)
        self.count = 0

    def scrape(self, times: int = 1) -> None:
        for _ in range(times):
            self._record(self._page())

    def scrape_once_it_shows(self, sample: str) -> None:
        """Waits until the metrics have this sample, and records that scrape."""
        self._record(eventually(lambda: self._page_with(sample)))

    def _page_with(self, sample: str) -> str:
        page = self._page()
        return page if sample in page else ""

    def _page(self) -> str:
        """The metrics; empty if Envoy does not answer."""
        try:
            return scrape(self._port, METRICS).body.decode()
        except ConnectionError:
            return ""

    def _record(self, page: str) -> None:
        self._series[f"up{{{LABELS}}}"][self.count] = "1" if page else "0"
        for name, labels, value in SAMPLE.findall(page):
            if name in NAMES:
                self._series[f"{name}{{{', '.join(filter(None, (labels, LABELS)))}}}"][self.count] = value
        self.count += 1

    def check(self, folder: Path, *expected: tuple[int, str, dict[str, str] | None, str]) -> None:
        """Has promtool see whether after so many scrapes an alert fires: with these labels and this summary, or not."""
        series = [
            {"series": name, "values": " ".join(values.get(number, "_") for number in range(self.count))}
            for name, values in self._series.items()
        ]
        checks = []
        for scrapes, alert, labels, summary in expected:
            fired = {"exp_labels": {**labels, "job": "completions-envoy", "instance": "here"}} if labels else None
            checks.append(
                {
                    "alertname": alert,
                    "eval_time": f"{SECONDS * (scrapes - 1)}s",
                    "exp_alerts": [{**fired, "exp_annotations": {"summary": summary}}] if fired else [],
                }
            )
        case = {"interval": f"{SECONDS}s", "input_series": series, "alert_rule_test": checks}
        file = folder / "cases.yaml"
        rules = str(FOLDER / "alerts.yaml")
        file.write_text(yaml.safe_dump({"rule_files": [rules], "evaluation_interval": "5s", "tests": [case]}))
        result = promtool("test", "rules", file)
        assert result.returncode == 0, result.stdout + result.stderr


def test_no_replica_and_a_door_that_is_gone(tmp_path: Path) -> None:
    """A replica that is not well is 503 and an alert; an Envoy that is killed amid requests is two more."""
    stub = Stub()
    http_port, metrics_port = free_ports(2)
    scrapes = Scrapes(metrics_port)
    stack = Stack(http_port, 0)
    with serving(stub) as grpc_port, envoy(http_port, grpc_port, tmp_path, metrics_port=metrics_port) as child:
        stack.wait_until_ready()
        scrapes.scrape()
        page = scrape(metrics_port).body.decode()
        assert {name for name, _, _ in SAMPLE.findall(page)} >= NAMES
        # Envoy starts before its service is known to be healthy: what it has refused until then is no news.
        scrapes.scrape(14)
        well = scrapes.count
        stub.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        eventually(lambda: stack.complete(prompt="a").status == 503)
        scrapes.scrape()
        refused = scrapes.count
        stub.health.set("", health_pb2.HealthCheckResponse.SERVING)
        stack.wait_until_ready()
        scrapes.scrape(14)
        well_again = scrapes.count
        stub.seconds = 60
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(stack.complete, prompt="a") for _ in range(2)]
            scrapes.scrape_once_it_shows('envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix="public"} 2')
            child.process.kill()
            child.process.wait()
            scrapes.scrape(14)
            for each in asked:
                with pytest.raises(ConnectionError):
                    each.result()
    assert lines(tmp_path / "envoy.log")
    cluster, public = {"envoy_cluster_name": "service"}, {"envoy_http_conn_manager_prefix": "public"}
    scrapes.check(
        tmp_path,
        (well, "CompletionsNoReplica", None, ""),
        (
            refused,
            "CompletionsNoReplica",
            {**cluster, "severity": "critical"},
            "here has answered 503: it has no healthy replica.",
        ),
        (well_again, "CompletionsNoReplica", None, ""),
        (well_again, "CompletionsDoorDown", None, ""),
        (well_again + 1, "CompletionsCutOff", None, ""),
        (
            well_again + 2,
            "CompletionsCutOff",
            {**public, "severity": "warning"},
            "here: running requests were cut off. Did something end without draining?",
        ),
        (
            scrapes.count,
            "CompletionsDoorDown",
            {"severity": "critical"},
            "here gives no metrics: it is gone, or cut off from its service's network.",
        ),
    )
