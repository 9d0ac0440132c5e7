"""The commands `doctor` and `config show`, neither of which starts the service."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import trustme

from service import __main__ as command
from service import doctor, manifest
from service.engine.ort import device
from service.host import kernels
from service.host.processor import processor
from service.settings import Settings
from tests.support.ports import free_ports
from tests.support.processes import export_tiny
from tests.support.stack import ROOT

NAMES = ["port", "metrics port", "API keys", "TLS", "traces", "processor"]
NAMES += ["kernels", "provider", "model", "names", "memory"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """For what is the same for every model."""
    return export_tiny(tmp_path_factory.mktemp("tiny"))


def examined(model_dir, **settings):
    """The findings by name. The ports are free ones, unless `settings` names them."""
    port, metrics_port = free_ports(2)
    values = {"port": port, "metrics_port": metrics_port, **settings}
    found = {finding.name: finding for finding in doctor.examine(Settings(model_dir=model_dir, **values))}
    assert list(found) == NAMES
    return found


def failing(found):
    return [name for name, finding in found.items() if not finding.passed]


def test_all_checks_pass(model_dir):
    """Each finding describes what was checked."""
    found = examined(model_dir)
    assert failing(found) == []
    assert "CPUExecutionProvider" in found["provider"].text
    assert found["processor"].text == str(processor())
    assert "positions in 32 slots: 32 requests of 640 tokens at once; max_model_len 8192; " in found["memory"].text
    assert str(model_dir) in found["model"].text
    assert found["model"].text.endswith(f"; {manifest.read(model_dir).computed_by}")


def test_ports_in_use(tiny_model):
    """A port in use fails, and its process is named; the default metrics port in use does not fail."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = examined(tiny_model, port=port, metrics_port=port)
        assert failing(found) == ["port", "metrics port"]
        assert f"port {port}: in use (pid {os.getpid()})" in found["port"].text
        unasked = Settings(model_dir=tiny_model, port=port, metrics_port=port)
        unasked.model_fields_set.discard("metrics_port")
        assert [finding.name for finding in doctor.examine(unasked) if not finding.passed] == ["port"]


def test_a_damaged_model(tiny_model, tmp_path):
    """The finding names the file whose hash is wrong."""
    damaged = shutil.copytree(tiny_model, tmp_path / "model")
    path = damaged / "tokenizer.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = examined(damaged)
    assert failing(found) == ["model", "names", "memory"]
    assert "tokenizer.json has SHA-256" in found["model"].text


def test_memory(model_dir):
    """Memory for less than one sequence fails; with less than the model's own context the served one is named."""
    found = examined(model_dir, memory_mib=100)
    assert failing(found) == ["memory"]
    assert "100 MiB are allowed" in found["memory"].text
    needed = re.search(r"one sequence of 512 tokens: that takes (\d+) MiB", found["memory"].text)
    assert needed is not None
    for_some = int(needed[1]) + 100
    enough = examined(model_dir, memory_mib=for_some)
    assert failing(enough) == []
    assert re.search(r"max_model_len \d+ of the model's 8192", enough["memory"].text)
    refused = examined(model_dir, memory_mib=for_some, context_length=8192)
    assert failing(refused) == ["memory"]
    longest = re.search(r"\(--context-length (\d+)\)", refused["memory"].text)
    assert longest is not None
    assert failing(examined(model_dir, memory_mib=for_some, context_length=longest[1])) == []
    assert "names" in failing(examined(model_dir, context_length=1 << 20))  # more than the model supports


def test_keys(tiny_model, tmp_path):
    """A valid key file passes; without a key file only a loopback host passes."""
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(b'k').hexdigest()} team\n")
    assert "1 keys" in examined(tiny_model, api_keys_file=keys)["API keys"].text
    keys.write_text("no digest\n")
    assert failing(examined(tiny_model, api_keys_file=keys)) == ["API keys"]
    assert failing(examined(tiny_model, host="0.0.0.0")) == ["API keys"]


def test_tls(tiny_model, tmp_path):
    """Certificate and key must exist and belong together."""
    authority = trustme.CA()
    certificate, key, other = (tmp_path / name for name in ("certificate.pem", "key.pem", "other.pem"))
    issued = authority.issue_cert("127.0.0.1", not_after=datetime(2099, 1, 2, 3, 4, tzinfo=UTC))
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(other)
    good = examined(tiny_model, tls_certificate=certificate, tls_key=key)
    assert (failing(good), str(certificate) in good["TLS"].text) == ([], True)
    assert "expires 2099-01-02 03:04 UTC" in good["TLS"].text
    assert failing(examined(tiny_model, tls_certificate=certificate, tls_key=other)) == ["TLS"]
    assert failing(examined(tiny_model, tls_certificate=certificate)) == ["TLS"]
    assert failing(examined(tiny_model, tls_certificate=certificate, tls_key=tmp_path / "none")) == ["TLS"]


def test_no_provider(tiny_model, monkeypatch):
    """Without the CPU provider of onnxruntime the check fails, and names the providers that exist."""
    monkeypatch.setattr(device.ort, "get_available_providers", lambda: ["OtherProvider"])
    found = examined(tiny_model)
    assert failing(found) == ["provider"]
    assert "OtherProvider" in found["provider"].text


def test_own_kernels_that_cannot_be_used(tiny_model, tmp_path, monkeypatch):
    """A line says so, which is no failure unless a model was exported for them: that one is told how to do without."""
    monkeypatch.setattr(kernels, "why_not", lambda: "this processor lacks AVX2")
    path = shutil.copytree(tiny_model, tmp_path / "model") / "manifest.json"
    described = json.loads(path.read_text())

    def write(computed_by, tile):
        kv = described["kv"] | {"tile": tile}
        path.write_text(json.dumps(described | {"kernels": computed_by, "kv": kv, "why_stock": "it has biases"}))

    write("stock", 1)
    found = examined(path.parent)
    assert (failing(found), found["kernels"].text) == ([], "no own kernels: this processor lacks AVX2")
    assert found["model"].text.endswith("; stock kernels (it has biases)")
    write("own", 16)
    refused = examined(path.parent)
    assert failing(refused) == ["model", "names", "memory"]
    assert refused["model"].text == (
        f"{path.parent} needs our own kernels, which cannot be used here: this processor lacks AVX2; export the model"
        f" again: python -m model_export SOURCE {path.parent} --kernels stock --overwrite"
    )


def test_each_device_is_checked(tiny_model):
    """The devices of the models are checked, and a `device` setting that no model uses is not."""
    tables = {"small": {"dir": tiny_model, "device": "cpu"}}
    port, metrics_port = free_ports(2)
    unused = Settings(device="cuda", models=tables, port=port, metrics_port=metrics_port)
    assert [finding for finding in doctor.examine(unused) if not finding.passed] == []
    tables["large"] = {"dir": tiny_model, "device": "cuda", "device_id": 3}
    found = list(doctor.examine(Settings(models=tables, port=port, metrics_port=metrics_port)))
    assert [finding.passed for finding in found if finding.name == "provider"] == [True, False]


def test_traces_without_their_package(tiny_model, monkeypatch):
    """With `otlp_endpoint` set and OpenTelemetry not installed, the check of traces fails."""
    monkeypatch.setitem(sys.modules, "service.telemetry.tracing", None)
    assert failing(examined(tiny_model)) == []
    found = examined(tiny_model, otlp_endpoint="http://collector:4317")
    assert failing(found) == ["traces"]
    assert "pip install 'completion-service[otel]'" in found["traces"].text


def test_cuda_without_a_gpu(tiny_model):
    """`device` cuda fails without a GPU, and `auto` takes the CPU."""
    found = examined(tiny_model, device="cuda")
    assert failing(found) == ["provider", "memory"]
    assert "--device cuda is not available: onnxruntime-gpu is not installed" in found["provider"].text
    assert "pip install 'completion-service[gpu]'" in found["provider"].text
    assert failing(examined(tiny_model, device="auto")) == []


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--memory-mib", "100"), 1)])
def test_the_doctor_as_a_command(model_dir, flags, code):
    """It prints one line per check, and exits with 1 if any fails, else with 0."""
    port, metrics_port = map(str, free_ports(2))
    given = ["doctor", "--model-dir", str(model_dir), "--port", port, "--metrics-port", metrics_port, *flags]
    done = subprocess.run(
        [sys.executable, "-m", "service", *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "")
    lines = done.stdout.splitlines()
    assert [line[6:20].strip() for line in lines] == NAMES
    assert [line.startswith("FAIL") for line in lines] == [False] * (len(NAMES) - 1) + [bool(code)]


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs `config show` with flags; returns its exit code, and its rows by setting."""
    for name in list(os.environ):
        if name.startswith("COMPLETION_"):
            monkeypatch.delenv(name)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["service", "config", "show", *flags])
        code = command.main()
        rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
        return code, {name: [part.strip() for part in row] for name, row in rows.items()}

    return run


def test_config_show(show, monkeypatch, tmp_path):
    """Every setting is printed with its value and its source: flag, environment, file or default."""
    file = tmp_path / "settings.toml"
    file.write_text('model_dir = "m"\nport = 3\nmax_waiting = 3\nprompt_chunk = 33\n')
    monkeypatch.setenv("COMPLETION_MAX_WAITING", "4")
    monkeypatch.setenv("COMPLETION_PORT", "2")
    code, rows = show("--config", str(file), "--port", "1", "--no-batch-invariant")
    assert code == 0
    assert list(rows) == list(Settings.model_fields)
    assert rows["model_dir"] == ["m", f"file {file}"]
    assert rows["port"] == ["1", "flag"]
    assert rows["batch_invariant"] == ["False", "flag"]
    assert rows["max_waiting"] == ["4", "environment"]
    assert rows["prompt_chunk"] == ["33", f"file {file}"]
    assert rows["max_running"] == ["32", "default"]
    assert rows["tls_key"] == ["None", "default"]


def test_config_show_of_invalid_settings(show, capsys):
    """The command fails with the error that would keep the service from starting."""
    code, rows = show("--port", "0", "--model-dir", "m")
    assert (code, rows) == (1, {})


def test_a_flag_may_have_the_name_of_a_command_as_its_value():
    """Only the first words can name a command."""
    assert command.parse_command(["--model-dir", "doctor"])[0] is command.run_service
    assert command.parse_command([])[0] is command.run_service
