"""docker-compose.yml: valid by the specification's schema, confined, and pointing at files that exist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import ENV_PREFIX, Settings
from tests.support import slow_start

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
ENVOY = yaml.safe_load((ROOT / "envoy" / "envoy.yaml").read_text())


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def test_schema() -> None:
    """The compose specification's schema accepts the file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_confined(service: dict[str, Any]) -> None:
    """No container has a writable root, a capability, a way to gain one, or the root user."""
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert "privileged" not in service


def test_drains(service: dict[str, Any]) -> None:
    """Every container has longer to stop than the service takes to drain, and says whether it is healthy."""
    assert service["stop_grace_period"] == "40s"
    assert service["healthcheck"]["test"][0] == "CMD"


def test_large_models_have_time_to_start() -> None:
    """A container counts as unhealthy only after an 8B could have been read from a slow disk and loaded."""
    periods = [SERVICES[name]["healthcheck"]["start_period"] for name in ("service", "service-gpu")]
    periods += re.findall(r"--start-period=(\S+)", (ROOT / "deploy" / "Dockerfile").read_text())
    assert len(periods) == 3
    for period in periods:
        assert int(period.removesuffix("s")) > slow_start.SECONDS


def test_published_on_loopback_only(service: dict[str, Any]) -> None:
    """Only Envoy's listener and Grafana are published, and only on this machine."""
    listener = ENVOY["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:")
        assert port.endswith(":3000" if "grafana" in service.get("image", "") else f":{listener}")


@pytest.mark.parametrize("name", ["envoy", "envoy-gpu"])
def test_shares_its_services_network(name: str) -> None:
    """Each runs in the network of the service that it waits for, where 127.0.0.1 is the service."""
    service = SERVICES[name]
    (upstream,) = service["depends_on"]
    assert service["network_mode"] == f"service:{upstream}"
    assert service.get("profiles") == SERVICES[upstream].get("profiles")


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_prometheus_finds_every_service(name: str) -> None:
    """By its name in the network that they share, on the port of the metrics; starting Prometheus starts no service."""
    scraped = yaml.safe_load((ROOT / "deploy" / "observability" / "prometheus.yaml").read_text())["scrape_configs"]
    (source,) = scraped[0]["dns_sd_configs"]
    assert name in source["names"]
    assert source["port"] == Settings.model_fields["metrics_port"].default
    arguments = SERVICES[name]["command"].split("$")[0].split()
    assert arguments[arguments.index("--metrics-host") + 1] == "0.0.0.0"
    for watching in ("prometheus", "grafana"):
        assert "network_mode" not in SERVICES[watching]
        assert name not in SERVICES[watching].get("depends_on", {})
    source = yaml.safe_load((ROOT / "deploy/observability/grafana/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("name", ["envoy", "envoy-gpu"])
def test_prometheus_finds_every_envoy(name: str) -> None:
    """In its service's network, at the port of its numbers, where they can be had from beside and not from outside."""
    scraped = yaml.safe_load((ROOT / "deploy" / "observability" / "prometheus.yaml").read_text())["scrape_configs"]
    (job,) = [each for each in scraped if each["job_name"] == "completions-envoy"]
    (source,) = job["dns_sd_configs"]
    assert SERVICES[name]["network_mode"].removeprefix("service:") in source["names"]
    (listener,) = [each for each in ENVOY["static_resources"]["listeners"] if each["name"] == "metrics"]
    assert source["port"] == listener["address"]["socket_address"]["port_value"]
    (host,) = listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    (paths,) = [route["match"]["headers"] for route in host["routes"]]
    assert {"name": ":path", "string_match": {"exact": job["metrics_path"]}} in paths
    assert SERVICES[name]["environment"]["METRICS_HOST"] == "0.0.0.0"


@pytest.mark.parametrize(("service", "envoy"), [("service", "envoy"), ("service-gpu", "envoy-gpu")])
def test_the_longest_request_is_the_same_for_both(service: str, envoy: str) -> None:
    """The variable of whoever starts compose reaches both; Envoy's script puts it where the configuration has it."""
    for name in (service, envoy):
        assert "COMPLETION_LONGEST_REQUEST_SECONDS" in SERVICES[name]["environment"]
    given = {"COMPLETION_LONGEST_REQUEST_SECONDS": "1234", "METRICS_HOST": "0.0.0.0"}
    script = [*SERVICES[envoy]["entrypoint"][:2], "echo", *SERVICES[envoy]["command"]]
    done = subprocess.run(script, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    written = (ROOT / "envoy" / "envoy.yaml").read_text()
    written = written.replace("&longest_request 600s", "&longest_request 1234s")
    written = written.replace("&metrics_host 127.0.0.1", "&metrics_host 0.0.0.0")
    assert done.stdout.strip() == f"--config-yaml {written.strip()} --disable-hot-restart"
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "envoy" / "envoy.yaml").read_text().strip() in done.stdout


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_settings_that_are_passed_on(name: str) -> None:
    """Variables of whoever starts compose reach the service by the names of its settings."""
    known = {f"{ENV_PREFIX}{setting.upper()}" for setting in Settings.model_fields}
    given = set(SERVICES[name]["environment"]) - {"ORT_DISABLE_TELEMETRY"}
    assert (
        {"COMPLETION_OTLP_ENDPOINT", "COMPLETION_API_KEYS_FILE", "COMPLETION_LONGEST_REQUEST_SECONDS"} <= given <= known
    )


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_keys_are_one_setting_in_a_folder(name: str) -> None:
    """The service and its Envoy have the same variable for it; the file's folder is mounted, so that it can change."""
    (envoy,) = [each for each in SERVICES.values() if each.get("network_mode") == f"service:{name}"]
    variable = "COMPLETION_API_KEYS_FILE"
    assert SERVICES[name]["environment"][variable] == envoy["environment"][variable]
    assert SERVICES[name]["environment"][variable] == "${API_KEYS_DIR:+/run/keys/api_keys}"
    assert SERVICES[name]["volumes"] == ["${API_KEYS_DIR:-/dev/null}:/run/keys:ro"]


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_the_runtime_is_silent(name: str) -> None:
    """Onnxruntime's telemetry is off in the containers, and in every stage of the image that runs it."""
    assert SERVICES[name]["environment"]["ORT_DISABLE_TELEMETRY"] == "1"
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert sum("ORT_DISABLE_TELEMETRY=1" in line for line in lines if line.startswith("ENV ")) == 2


def test_logs_are_bounded(service: dict[str, Any]) -> None:
    """No container's log fills the disk."""
    assert service["logging"]["options"] == {"max-size": "64m", "max-file": "3"}


def test_the_gpu_is_reserved_and_asked_for() -> None:
    """The service for GPUs has one, is built with CUDA and its model, and does not start without."""
    service = SERVICES["service-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert service["environment"]["COMPLETION_DEVICE"] == "cuda"
    assert service["build"]["args"] == {"RUNTIME": "gpu"}
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert 'if [ "${RUNTIME}" = gpu ]; then device=cuda; else device=cpu; fi' in dockerfile
    assert '--device "${device}"' in dockerfile


def test_files_exist(service: dict[str, Any]) -> None:
    """Dockerfiles, mounted folders and the files that Envoy's configuration names are in the repository."""
    if "build" in service:
        assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for volume in service.get("volumes", []):
        assert volume.startswith("${API_KEYS_DIR") or (ROOT / volume.split(":")[0]).is_dir()


def test_envoys_files_exist() -> None:
    """Envoy's configuration names its files relative to the folder that holds `envoy/`."""
    filters = ENVOY["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"][
        "http_filters"
    ]
    named = {item["name"].rsplit(".", 1)[-1]: item["typed_config"] for item in filters}
    assert (ROOT / named["lua"]["default_source_code"]["filename"]).is_file()
    assert (ROOT / named["grpc_json_transcoder"]["proto_descriptor"]).is_file()


def test_image_gets_what_it_copies() -> None:
    """Everything that the Dockerfile copies exists and is let through by .dockerignore."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists()
        assert path in allowed


def test_image_has_what_settings_need() -> None:
    """The image has the extra for traces on every device; every extra that it installs exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    (runtime,) = [line for line in lines if "/opt/service/bin/pip install" in line]
    extras = re.search(r'\.whl\)\[(.*)\]"', runtime)
    assert extras is not None
    assert extras[1].split(",") == ["${RUNTIME}", "otel"]
    assert {"cpu", "gpu", "otel", "export"} <= set(project["optional-dependencies"])


def test_image_is_not_root() -> None:
    """The image runs as a user of its own also without compose, and holds nothing that it could write to."""
    stage = (ROOT / "deploy" / "Dockerfile").read_text().rsplit("\nFROM ", 1)[1]
    (user,) = [line.split()[1] for line in stage.splitlines() if line.startswith("USER ")]
    assert int(user.split(":")[0]) > 0
    assert "--chown" not in stage
    assert "RUN " not in stage
