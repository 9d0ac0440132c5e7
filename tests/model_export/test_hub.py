"""A model's name on a hub as the source, with the real client and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from model_export.__main__ import main
from model_export.sources.hugging_face.hub import HubName, hub_name
from service import manifest
from tests.model_export import tiny
from tests.model_export.hub import NAME, Command, Hub, Ran, client_imported_anew, in_a_new_process, variables


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with one tiny model, which has some files that must not be downloaded."""
    folder = tiny.hugging_face(tmp_path / "on the hub", "qwen2")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a model was run')")
    (folder / "consolidated.safetensors").write_bytes(b"another form")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"one more")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process, which takes a tenth of the time of one of its own."""

    def called(endpoint: str, home: Path, *arguments: str) -> Ran:
        with (
            monkeypatch.context() as patched,
            open(2, "w", buffering=1, closefd=False) as stderr,
            client_imported_anew(),
        ):
            patched.setattr(sys, "stderr", stderr)
            for name, value in variables(endpoint, home).items():
                patched.setenv(name, value)
            code = main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return called


def test_a_name_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    """For a model's name only the necessary files are downloaded; the export has its name and its owner's."""
    ran = in_a_new_process(hub.url, tmp_path / "home", NAME, str(tmp_path / "model"), "--max-kl", "0.05")
    assert ran.returncode == 0, ran.stderr
    described = manifest.load(tmp_path / "model")
    assert (described.id, described.owned_by) == ("Tiny-1M", "Somebody")
    files = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    weights = {"model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"}
    assert files == {"config.json", "tokenizer.json", *weights}
    assert not any("onnx/" in path for path in hub.asked)


def test_a_copy_serves_where_the_hub_cannot_be_reached(run: Command, hub: Hub, tmp_path: Path) -> None:
    """A model in the cache, here with its revision, can be exported without a network."""
    home = tmp_path / "home"
    first = run(hub.url, home, f"{NAME}@v1", str(tmp_path / "one"), "--max-kl", "0.05")
    assert first.returncode == 0, first.stderr
    again = run("http://127.0.0.1:9", home, f"{NAME}@v1", str(tmp_path / "two"), "--max-kl", "0.05")
    assert again.returncode == 0, again.stderr
    assert manifest.load(tmp_path / "two").id == "Tiny-1M"


def test_weights_of_unsupported_families_stay_there(run: Command, hub: Hub, tmp_path: Path) -> None:
    """A family that is not supported is refused after only its configuration was downloaded."""
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    ran = run(hub.url, tmp_path / "home", NAME, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"model_export: {NAME}: architecture 'mamba' is not supported: its recurrent layers")
    assert ran.stderr.count("\n") == 1
    assert [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path] == ["config.json"]
    assert not (tmp_path / "out").exists()


EARLY: dict[str, tuple[dict[str, Any], str]] = {
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq) are supported only as"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported are silu and swish"),
    "rotation": ({"rope_scaling": {"rope_type": "foo"}}, "rope_type is 'foo', supported in qwen2 are default"),
    "head size": ({"head_dim": 100}, "the head size is 100, supported are multiples of 16"),
    "variant": ({"model_type": "nemotron", "mlp_bias": True}, "mlp_bias is True, supported with nemotron is False"),
    "tokenizer": ({}, "is not a tokenizer"),
}
NO_FILES = {
    "tokenizer.json": "has no tokenizer.json on the hub; a slow tokenizer has to be converted first",
    "*.safetensors": "has no safetensors on the hub; other weights have to be converted first",
}


@pytest.mark.parametrize("case", EARLY)
def test_refused_before_the_weights(run: Command, hub: Hub, tmp_path: Path, case: str) -> None:
    """What can be told without weights is told before any of them is downloaded."""
    changes, message = EARLY[case]
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | changes))
    if case == "tokenizer":
        (hub.folder / "tokenizer.json").write_text("{}")
    refused(run, hub, tmp_path, NAME, message)


@pytest.mark.parametrize("missing", NO_FILES)
def test_refused_for_what_is_missing(run: Command, hub: Hub, tmp_path: Path, missing: str) -> None:
    """So is a file that the model does not have."""
    for file in hub.folder.glob(missing):
        file.unlink()
    refused(run, hub, tmp_path, NAME, NO_FILES[missing])


def test_adapters(run: Command, hub: Hub, tmp_path: Path) -> None:
    """An adapter is refused, also beside a whole model, as in a directory."""
    (hub.folder / "adapter_config.json").write_text("{}")
    refused(run, hub, tmp_path, NAME, "is an adapter (adapter_config.json); merge it into its model first")


def refused(run: Command, hub: Hub, tmp_path: Path, source: str, message: str) -> None:
    """The model is refused in one sentence, and no weights were asked for."""
    ran = run(hub.url, tmp_path / "home", source, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith(f"model_export: {source}")
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not any(path.endswith((".safetensors", ".gguf")) for path in hub.asked)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gguf_hub(hub: Hub) -> Hub:
    """The hub with two forms of a GGUF model, one of them in two parts."""
    for file in hub.folder.iterdir():
        if file.is_file():
            file.unlink()
    tiny.gguf(hub.folder / "Tiny-1M-Q8_0.gguf", GGMLQuantizationType.Q8_0)
    (hub.folder / "Q4_0").mkdir()
    tiny.gguf(hub.folder / "Q4_0" / "Tiny-1M-Q4_0.gguf", GGMLQuantizationType.Q4_0, split_max_tensors=12)
    (hub.folder / "mmproj-Tiny-1M-F16.gguf").write_bytes(b"GGUF")
    return hub


@pytest.mark.parametrize("form", ["Q8_0", "q4_0"])
def test_a_gguf_file(run: Command, gguf_hub: Hub, tmp_path: Path, form: str) -> None:
    """`owner/name:form` is that GGUF file, in all its parts, and only that."""
    ran = run(gguf_hub.url, tmp_path / "home", f"{NAME}:{form}", str(tmp_path / "model"), "--max-kl", "0.3")
    assert ran.returncode == 0, ran.stderr
    described = manifest.load(tmp_path / "model")
    assert (described.id, described.owned_by) == ("Tiny-1M", "Somebody")
    assert described.quantization.source == form.upper()
    assert {form.upper()} == {name for path in gguf_hub.asked for name in ("Q8_0", "Q4_0") if f"{name}" in path}
    again = run("http://127.0.0.1:9", tmp_path / "home", f"{NAME}:{form}", str(tmp_path / "2"), "--max-kl", "0.3")
    assert again.returncode == 0, again.stderr


def test_a_broken_download_goes_on(run: Command, gguf_hub: Hub, tmp_path: Path) -> None:
    """A download goes on where an earlier one ended."""
    content = (gguf_hub.folder / "Tiny-1M-Q8_0.gguf").read_bytes()
    blobs = tmp_path / "home" / "hub" / "models--Somebody--Tiny-1M" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.unfinished").write_bytes(content[:50_000])
    ran = run(gguf_hub.url, tmp_path / "home", f"{NAME}:Q8_0", str(tmp_path / "model"), "--max-kl", "0.3")
    assert ran.returncode == 0, ran.stderr
    assert gguf_hub.ranges == [("Tiny-1M-Q8_0.gguf", 0), ("Tiny-1M-Q8_0.gguf", 50_000)]


@pytest.mark.parametrize("source", [f"{NAME}:Q8_0", NAME])
def test_other_bytes(run: Command, hub: Hub, tmp_path: Path, source: str, request: pytest.FixtureRequest) -> None:
    """A file that is not what the hub says it is is refused and removed, so that another export downloads it again."""
    if ":" in source:
        request.getfixturevalue("gguf_hub")
    name = "Tiny-1M-Q8_0.gguf" if ":" in source else "model-0.safetensors"
    content = (hub.folder / name).read_bytes()
    hub.sent[name] = content[:-1] + bytes([content[-1] ^ 1])
    ran = run(hub.url, tmp_path / "home", source, str(tmp_path / "model"), "--max-kl", "0.3")
    assert ran.returncode == 2
    assert f"expected {hashlib.sha256(content).hexdigest()}; it was removed" in ran.stderr
    assert ran.stderr.count("\n") == 1
    hub.sent.clear()
    assert run(hub.url, tmp_path / "home", source, str(tmp_path / "model"), "--max-kl", "0.3").returncode == 0


def test_an_unsupported_gguf_file(run: Command, gguf_hub: Hub, tmp_path: Path) -> None:
    """The header of a GGUF file is checked before the rest is downloaded."""
    file = gguf_hub.folder / "Tiny-1M-Q8_0.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"olmo2"))
    ran = run(gguf_hub.url, tmp_path / "home", f"{NAME}:Q8_0", str(tmp_path / "model"))
    assert ran.returncode == 2
    assert "'olmo2' is supported as a Hugging Face directory, not as a GGUF file" in ran.stderr
    assert gguf_hub.ranges == [(file.name, 0)]
    assert not list((tmp_path / "home").rglob("*.gguf"))


def test_other_forms(run: Command, gguf_hub: Hub, tmp_path: Path) -> None:
    """A form that is not there, and none where one is needed, is refused with those that are there."""
    refused(
        run,
        gguf_hub,
        tmp_path,
        f"{NAME}:Q2_K",
        "has no GGUF file of the form Q2_K on the hub; its forms are Q4_0, Q8_0",
    )
    refused(run, gguf_hub, tmp_path, NAME, f"but GGUF files; name one of them: {NAME}:Q4_0, {NAME}:Q8_0")


def test_no_configuration(run: Command, hub: Hub, tmp_path: Path) -> None:
    """A model without a configuration, for example with only GGUF files, is refused for that reason."""
    (hub.folder / "config.json").unlink()
    ran = run(hub.url, tmp_path / "home", NAME, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert f"{NAME} has no config.json on the hub, so it is no model" in ran.stderr
    assert not any("/resolve/" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Somebody/Nothing", "there is none of that name, or it is private"),
        ("Somebody/Gated", "its owner asks for consent first"),
        (f"{NAME}@v2", "it has no revision v2"),
    ],
)
def test_what_the_hub_does_not_give(run: Command, hub: Hub, tmp_path: Path, name: str, reason: str) -> None:
    """One sentence says why there is no such source, and nothing is left behind."""
    ran = run(hub.url, tmp_path / "home", name, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"model_export: {name} is no file or directory, nor a model of {hub.url}: {reason}")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path: Path) -> None:
    """If the hub cannot be reached, the message says so."""
    ran = in_a_new_process("http://127.0.0.1:9", tmp_path / "home", NAME, str(tmp_path / "model"))
    assert ran.returncode == 2
    assert "the hub cannot be reached, and the cache has no complete copy" in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/b", HubName("a", "b", None)),
        ("HuggingFaceTB/SmolLM2-135M@refs/pr/1", HubName("HuggingFaceTB", "SmolLM2-135M", "refs/pr/1")),
        ("a/b:Q4_K_M", HubName("a", "b", None, "Q4_K_M")),
        ("a/b@v1:Q8_0", HubName("a", "b", "v1", "Q8_0")),
        (str(Path("https://huggingface.co/a/b")), HubName("a", "b")),
        (str(Path("https://huggingface.co/a/b/tree/v1/")), HubName("a", "b", "v1")),
        ("a/b:", None),
        ("model.gguf", None),
        ("/a/b", None),
        ("./a/b", None),
        ("../a", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/..", None),
        ("a b/c", None),
    ],
)
def test_names(source: str, name: HubName | None) -> None:
    """A name is an owner, a slash and a name; paths are not names."""
    assert hub_name(source) == name
