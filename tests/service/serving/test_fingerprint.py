"""The fingerprint: equal where all that decides an answer's bits is equal, and only there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import service
from service.host.processor import Processor
from service.manifest import KVLayout
from service.serving import fingerprint as module
from service.serving.fingerprint import fingerprint, parts
from service.settings import Settings
from tests.support.fakes import NO_SPECIAL, file_entry, manifest

FILES = {"model.onnx": file_entry(10), "tokenizer.json": file_entry(20)}


def settings(**changes: object) -> Settings:
    return Settings(**{"model_dir": (Path("model"),), "device": "cpu", "threads": 2, **changes})


def of(described=None, configured=None) -> str:
    """The fingerprint of a model with some settings."""
    return fingerprint(parts(described or manifest(files=FILES), configured or settings()))


def test_form() -> None:
    """It has one form, and is the same each time."""
    assert re.fullmatch("fp_[0-9a-f]{20}", of())
    assert of() == of()


CHANGES = {
    "a file of another content": lambda: of(manifest(files={**FILES, "model.onnx": file_entry(11)})),
    "a further file": lambda: of(manifest(files={**FILES, "chat_template.jinja": file_entry(10)})),
    "other special tokens": lambda: of(manifest(files=FILES, special_tokens=NO_SPECIAL.model_copy(update={"end": ()}))),
    "another number of threads": lambda: of(configured=settings(threads=3)),
    "another prompt chunk": lambda: of(configured=settings(prompt_chunk=64)),
    "results that depend on the batch": lambda: of(configured=settings(batch_invariant=False)),
    "another device": lambda: of(configured=settings(device="cuda")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_of_what_is_served_gives_another_one(change: str) -> None:
    """Model, settings and device."""
    assert CHANGES[change]() != of()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("processor", lambda: Processor("another", "baseline", byte_dot_products=False)),
        ("byte_options", lambda: {"another": "option"}),
        ("runtime", lambda: "another build"),
        ("version", lambda package: f"another {package}"),
        ("_code", lambda: "another"),
    ],
)
def test_each_change_of_what_computes_gives_another_one(monkeypatch: pytest.MonkeyPatch, name: str, value) -> None:
    """Processor, kernels, versions and the service's own code."""
    before = of()
    monkeypatch.setattr(module, name, value)
    assert of() != before


@pytest.mark.parametrize("identity", [["avx2", "another"], ["avx512-vnni", "library"]])
def test_own_operators_are_a_part_of_it(monkeypatch: pytest.MonkeyPatch, identity: list[str]) -> None:
    """That a model needs them, which instructions they use here, and the library itself; of no part in other models."""
    kv = KVLayout(layers=1, kv_heads=1, head_dim=16, dtype="float16", tile=16)
    stock, own = manifest(files=FILES), manifest(files=FILES, kernels="own", kv=kv)
    monkeypatch.setattr(module.kernels, "identity", lambda: ["avx2", "library"])
    before = of(stock), of(own)
    assert len({*before}) == 2
    monkeypatch.setattr(module.kernels, "identity", lambda: identity)
    assert of(stock) == before[0]
    assert of(own) != before[1]


def test_the_name_of_the_processor_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the instructions that its kernels use."""
    before, real = of(), module.processor()
    monkeypatch.setattr(
        module, "processor", lambda: Processor("another", real.instructions, byte_dot_products=real.byte_dot_products)
    )
    assert of() == before


def test_names_and_limits_decide_nothing() -> None:
    """Replicas may differ in them."""
    other = manifest(files=FILES, id="other", aliases=("x",), created=1)
    assert of(other, settings(max_running=3, port=1234, max_stops=9)) == of()


def test_the_code_is_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A changed line, a new file and a renamed one give another hash; packages that decide no bits do not."""

    def hashed() -> str:
        monkeypatch.setattr(service, "__file__", str(tmp_path / "__init__.py"))
        return module._code()

    for package in ("engine/ort", "text", "rpc"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "a.py").write_text("a = 1\n")
    seen = [hashed()]
    (tmp_path / "rpc" / "a.py").write_text("a = 2\n")
    assert hashed() == seen[0]
    (tmp_path / "engine" / "ort" / "a.py").write_text("a = 2\n")
    seen.append(hashed())
    (tmp_path / "text" / "b.py").write_text("")
    seen.append(hashed())
    (tmp_path / "text" / "b.py").rename(tmp_path / "text" / "c.py")
    seen.append(hashed())
    assert len(set(seen)) == len(seen)
