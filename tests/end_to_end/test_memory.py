"""A service with little memory for the KV cache: what fits runs, the rest waits, what never could is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb

from service import manifest
from service.serving import memory
from service.serving.memory import MIB
from service.settings import Settings
from tests.support.patience import PATIENCE
from tests.support.processes import TINY, Service, export_tiny, service


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


def little(model: Path, models: int = 1) -> int:
    """The memory in MiB for which a model of 4,096 positions, or several of it, starts with less than its context."""
    described = manifest.read(model)
    for mib in range(1, 4000):
        settings = Settings(model_dir=model, device="cpu", memory_mib=mib)
        try:
            plans = memory.plan([memory.Model("m", described, settings)] * models, mib * MIB)
        except memory.StartupError:
            continue
        assert 512 <= plans[0].positions < 4096, plans
        return mib
    raise AssertionError("it never starts")


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tiny, tmp_path_factory.mktemp("served"), f"--memory-mib={little(tiny)}") as running:
        yield running


def max_model_len(served: Service, model: str = TINY) -> int:
    length: int = served.stub.GetModel(pb.GetModelRequest(model=model)).max_model_len
    return length


def test_the_served_context_is_what_fits(served: Service) -> None:
    """Callers read it, and the log warns of it; a longer request is refused with both numbers."""
    length = max_model_len(served)
    assert 512 <= length < 4096
    planned = served.logged("the memory holds fewer positions than the model's own context of 4096")
    assert (planned["max_model_len"], planned["level"]) == (length, "warning")
    with pytest.raises(grpc.RpcError) as caught:
        served.complete(max_tokens=length)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"maximum context length is {length} tokens, however you requested {length + 1}" in caught.value.details()


def test_requests_take_turns_for_the_memory(served: Service) -> None:
    """Each takes nearly all of it; all are answered, and so are small ones among them."""
    most = max_model_len(served) - 64
    with ThreadPoolExecutor(8) as pool:
        asked = [most if number % 2 else 8 for number in range(8)]
        answers = list(pool.map(lambda tokens: served.complete(PATIENCE, max_tokens=tokens), asked))
    assert [answer.usage.completion_tokens for answer in answers] == asked


def test_two_models_take_turns_for_the_memory(tiny: Path, tmp_path: Path) -> None:
    """They share what there is for both: each may take all of it while the other waits."""
    (tmp_path / "settings.toml").write_text(
        f"""
        memory_mib = {little(tiny, 2)}
        [models.one]
        dir = "{tiny}"
        """
    )
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    described = manifest.read(other).model_copy(update={"id": "other"})
    described.write(other)
    flags = ("--config", str(tmp_path / "settings.toml"), "--model-dir", str(other))
    with service(None, tmp_path, *flags) as running:
        most = {name: max_model_len(running, name) - 16 for name in (TINY, "other")}
        with ThreadPoolExecutor(6) as pool:
            asked = [(name, tokens) for _ in range(3) for name, tokens in most.items()]
            answers = list(pool.map(lambda each: running.complete(PATIENCE, model=each[0], max_tokens=each[1]), asked))
        assert [answer.usage.completion_tokens for answer in answers] == [tokens for _, tokens in asked]
