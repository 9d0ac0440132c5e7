"""TLS at the door and between Envoy and the service, with certificates made here; and what the logs then hold."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trustme
import yaml
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from deploy import local
from service.errors import StartupError
from service.rpc import tls
from service.settings import Settings
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import (
    AUTHORIZED,
    KEY,
    MODEL,
    ROOT,
    ServiceThread,
    Stack,
    envoy,
    envoy_counts,
    free_ports,
    launched,
)

METADATA = list(AUTHORIZED.items())
SERVICE = "completion-service"


def issue(authority: trustme.CA, folder: Path, name: str, *identities: str) -> None:
    """Writes NAME.pem and NAME.key."""
    made = authority.issue_cert(*identities)
    made.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issue(authority, folder, "door", "127.0.0.1", "localhost")
    issue(authority, folder, "service", SERVICE)
    issue(authority, folder, "envoy", "envoy")
    issue(trustme.CA(), folder, "stranger", "envoy")
    return folder


@pytest.fixture(scope="module")
def secured(model_dir: Path, certificates: Path) -> Iterator[Stack]:
    """Service and Envoy as the launcher starts them with TLS_DIR: its first completion came over TLS."""
    with launched(model_dir, TLS_DIR=str(certificates)) as running:
        yield running


def trusting(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates / "ca.pem")


def complete(
    stack: Stack, context: ssl.SSLContext | None, scheme="https", path="/v1/completions", headers=AUTHORIZED, **fields
) -> dict:
    good = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    url = f"{scheme}://127.0.0.1:{stack.http}{path}"
    body = json.dumps({**good, **fields}).encode()
    request = urllib.request.Request(url, body, {**headers, "content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE, context=context) as answer:
        return json.load(answer)


def ask(channel: grpc.Channel, prompt: str = "The capital of France is") -> str:
    request = pb.CreateCompletionRequest(model=MODEL, text=prompt, max_tokens=1, temperature=0)
    stub = completion_pb2_grpc.CompletionServiceStub(channel)
    return stub.CreateCompletion(request, metadata=METADATA, timeout=PATIENCE).choices[0].text


def test_rest_over_tls(secured: Stack, certificates: Path) -> None:
    """A caller who trusts the authority is answered; one who does not, and one without TLS, are not."""
    assert complete(secured, trusting(certificates))["choices"][0]["text"] == " Paris"
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        complete(secured, ssl.create_default_context())
    with pytest.raises(OSError):  # noqa: PT011, however the connection ends
        complete(secured, None, "http")


def test_old_protocols_are_refused(secured: Stack, certificates: Path) -> None:
    """TLS below 1.2 is not spoken."""
    context = trusting(certificates)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):  # noqa: PT011, however the handshake fails
        complete(secured, context)


def test_grpc_over_tls(secured: Stack, certificates: Path) -> None:
    """Typed callers come through the same door."""
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    with grpc.secure_channel(secured.envoy_address, credentials) as channel:
        assert ask(channel) == " Paris"


@pytest.mark.parametrize("who", ["envoy", "stranger", "nobody", "plain"])
def test_the_service_knows_envoy(secured: Stack, certificates: Path, who: str) -> None:
    """The service's own port takes callers whose certificate its authority has issued, and no others."""
    root = (certificates / "ca.pem").read_bytes()
    pair = (
        [(certificates / f"{who}.{end}").read_bytes() for end in ("key", "pem")] if who in {"envoy", "stranger"} else []
    )
    named = [("grpc.ssl_target_name_override", SERVICE)]
    if who == "plain":
        channel = grpc.insecure_channel(secured.grpc_address)
    else:
        channel = grpc.secure_channel(secured.grpc_address, grpc.ssl_channel_credentials(root, *pair), named)
    with channel:
        if who == "envoy":
            assert ask(channel) == " Paris"
        else:
            with pytest.raises(grpc.RpcError) as caught:
                ask(channel)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


SECRETS = {
    "prompt": "zanzibar-prompt. Once upon a time there was",
    "suffix": "zanzibar-suffix",
    "stop": "zanzibar-stop",
    "user": "zanzibar-user",
}


def test_logs_hold_no_secrets(secured: Stack, certificates: Path) -> None:
    """After all kinds of requests no log of either process holds a prompt, an answer, a key, or a user's name."""
    context = trusting(certificates)
    answered = complete(secured, context, prompt=SECRETS["prompt"], user=SECRETS["user"], max_tokens=16)
    text = json.dumps(answered["choices"][0]["text"])[1:-1]
    assert len(text) > 20
    for fields in (
        {**SECRETS, "stream": True},
        {"prompt": SECRETS["prompt"], "n": 0},
        {"user": SECRETS["user"] * 100},
        {"logit_bias": {SECRETS["prompt"]: 1}},
        {"model": {SECRETS["prompt"]: 5}},
        {"max_tokens": SECRETS["prompt"]},
        {SECRETS["prompt"] + "\ud800": 1},
    ):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            complete(secured, context, **fields)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        complete(secured, context, path="/v1/completions?prompt=zanzibar")
    for header in ("zanzibar-key", "Bearer zanzibar-key"):  # without a key file none is asked for
        complete(secured, context, headers={"authorization": header})
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
    with grpc.secure_channel(secured.envoy_address, credentials) as channel:
        ask(channel, SECRETS["prompt"])
    for log in (written(secured.logs / f"{name}.log") for name in ("service", "envoy")):
        for secret in ("zanzibar", text, KEY, hashlib.sha256(KEY.encode()).hexdigest()):
            assert secret not in log, [line for line in log.splitlines() if secret in line]


def written(log: Path) -> str:
    """A log, once the typed call is in it: Envoy writes its lines a little later."""
    eventually(lambda: "/CreateCompletion" in log.read_text(), log.read_text)
    return log.read_text()


def test_envoy_knows_the_service(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Envoy sends nothing to a service whose certificate has another name."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, identity in (("door", "127.0.0.1"), ("envoy", "envoy"), ("service", "another-service")):
        issue(authority, tmp_path, name, identity)
    http_port, grpc_port, admin_port = free_ports(3)
    files = {"certificate": "service.pem", "key": "service.key", "client_ca": "ca.pem"}
    tls_files = {f"tls_{name}": tmp_path / file for name, file in files.items()}
    monkeypatch.setenv("TLS_DIR", str(tmp_path))
    with (
        ServiceThread(Settings(model_dir=model_dir, port=grpc_port, drain_seconds=1, **tls_files)),
        envoy(http_port, grpc_port, tmp_path, admin_port=admin_port),
    ):
        eventually(lambda: envoy_counts(admin_port, "cluster.service.ssl.fail_verify_san"))
        with pytest.raises(urllib.error.HTTPError, match="503"):
            complete(Stack(http_port, grpc_port), trusting(tmp_path))
        assert envoy_counts(admin_port, "cluster.service.health_check.success") == 0


def test_written_configuration(certificates: Path, tmp_path: Path) -> None:
    """The launcher writes envoy.yaml with TLS, and Envoy accepts it."""
    target = tmp_path / "tls"
    command = [sys.executable, "deploy/local.py", "--envoy-with-tls", str(certificates), str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    config = yaml.safe_load((target / "envoy.yaml").read_text())
    assert config["static_resources"]["clusters"][0]["transport_socket"]
    command = [local.envoy_binary(), "--mode", "validate", "-c", str(target / "envoy.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def offered(port: int, client: Path | None = None) -> bytes:
    """The certificate that a port offers to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if client is not None:
        context.load_cert_chain(client / "envoy.pem", client / "envoy.key")
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname=SERVICE) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def der(path: Path) -> bytes:
    """The first certificate of a PEM file."""
    return ssl.PEM_cert_to_DER_cert(path.read_text().split("END CERTIFICATE-----")[0] + "END CERTIFICATE-----")


def replace(folder: Path, name: str, made: Path) -> None:
    """Moves another key and certificate to where the old ones are."""
    for end in ("key", "pem"):
        new = folder / f"{name}.{end}.new"
        new.write_bytes((made / f"{name}.{end}").read_bytes())
        new.rename(folder / f"{name}.{end}")


# The log and the message in which each process rejects a bad certificate.
COMPLAINTS = {
    "door": ("envoy.log", "Failed to reload certificates"),
    "service": ("service.log", "the TLS files are not valid"),
}


def renew(logs: Path, name: str, port: int, folder: Path, new: Path) -> None:
    """Replaces a certificate: by what will not do, after which the old one is offered, and by a new one."""
    file, complaint = COMPLAINTS[name]
    old = der(folder / f"{name}.pem")

    def complaints() -> int:
        assert offered(port, new) == old
        return (logs / file).read_text().count(complaint)

    # A certificate without its key, then no certificate at all.
    for broken in ((new / f"{name}.pem").read_bytes(), b"-----BEGIN CERTIFICATE-----"):
        before = complaints()
        (folder / "broken").write_bytes(broken)
        (folder / "broken").rename(folder / f"{name}.pem")
        eventually(lambda before=before: complaints() > before)
        assert offered(port, new) == old
    replace(folder, name, new)
    eventually(lambda: offered(port, new) == der(new / f"{name}.pem"))


def test_certificates_are_replaced(model_dir: Path, tmp_path: Path) -> None:
    """Without a restart new connections get new certificates, old ones go on, and what is not valid changes nothing."""
    authority, folder, new = trustme.CA(), tmp_path / "certificates", tmp_path / "new"
    identities = {"door": "127.0.0.1", "service": SERVICE, "envoy": "envoy"}
    for made in (folder, new):
        made.mkdir()
        authority.cert_pem.write_to_path(made / "ca.pem")
        for name, identity in identities.items():
            issue(authority, made, name, identity)
    with launched(model_dir, TLS_DIR=str(folder)) as running:
        ports = {"door": running.http, "service": running.grpc}
        credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
        with grpc.secure_channel(running.envoy_address, credentials) as channel:
            assert ask(channel) == " Paris"
            for name, port in ports.items():
                renew(running.logs, name, port, folder, new)
            replace(folder, "envoy", new)
            assert ask(channel) == " Paris"  # on the connection that was there before
        assert complete(running, trusting(folder))["choices"][0]["text"] == " Paris"
        assert "new connections get the new certificate" in (running.logs / "service.log").read_text()


def test_documented_certificates(tmp_path: Path) -> None:
    """The commands in docs/security.md make certificates that Envoy and the service accept."""
    document = (ROOT / "docs" / "security.md").read_text()
    (block,) = re.findall(r"^    mkdir -p certificates.*?(?=\n\n)", document, re.MULTILINE | re.DOTALL)
    commands = "set -e\n" + textwrap.dedent(block)
    done = subprocess.run(["bash", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "certificates"
    for name, identity in (("door", "IP Address:127.0.0.1"), ("service", f"DNS:{SERVICE}"), ("envoy", "DNS:envoy")):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        shown = ["openssl", "x509", "-in", str(folder / f"{name}.pem"), "-noout", "-ext", "subjectAltName"]
        assert identity in subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        checked = ["openssl", "verify", "-CAfile", str(folder / "ca.pem"), str(folder / f"{name}.pem")]
        subprocess.run(checked, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tls_certificate": "service.pem"}, "needs both"),
        ({"tls_key": "service.key"}, "needs both"),
        ({"tls_client_ca": "ca.pem"}, "needs both"),
        ({"tls_certificate": "none.pem", "tls_key": "service.key"}, "none.pem cannot be read"),
        ({"tls_certificate": "service.key", "tls_key": "service.key"}, "service.key holds no certificate"),
        ({"tls_certificate": "service.pem", "tls_key": "ca.pem"}, "ca.pem holds no private key"),
        (
            {"tls_certificate": "service.pem", "tls_key": "door.key"},
            "service.pem and .*door.key cannot be used: .*mismatch",
        ),
    ],
)
def test_incomplete_settings(certificates: Path, given: dict[str, str], problem: str) -> None:
    """Half a configuration is an error, never an unencrypted port."""
    files = {name: certificates / file for name, file in given.items()}
    with pytest.raises(StartupError, match=problem):
        tls.load(Settings(model_dir=certificates, **files))
