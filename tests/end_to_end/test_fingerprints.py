"""Equal fingerprints promise equal text: shown over two processes, and two replicas behind one Envoy."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import Service, service
from tests.support.replicas import serving_pair

REQUESTS = [
    {"text": "once upon a time", "seed": 7, "temperature": 1.3, "max_tokens": 24},
    {"text": "the", "seed": -3, "temperature": 1, "top_p": 0.9, "n": 2, "max_tokens": 16, "logprobs": 3},
    {"text": "a", "seed": 1, "temperature": 0, "max_tokens": 20, "bad_words": ["e"], "frequency_penalty": 1},
]


def told(running: Service) -> tuple[set[str], list[list[str]]]:
    """The fingerprints and the texts of a service's answers."""
    answers = [running.complete(**fields) for fields in REQUESTS]
    return {answer.system_fingerprint for answer in answers}, [
        [choice.text for choice in answer.choices] for answer in answers
    ]


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_two_processes(tiny_model: Path, tmp_path: Path) -> None:
    """Equal ones, with equal texts, however they differ in limits; another setting gives another one."""
    with service(tiny_model, folder(tmp_path, "one")) as running:
        fingerprints, texts = told(running)
        assert not running.complete(max_tokens=1).HasField("system_fingerprint")
    (fingerprint,) = fingerprints
    with service(tiny_model, folder(tmp_path, "two"), "--max-running", "3", "--always-fingerprint") as running:
        assert told(running) == ({fingerprint}, texts)
        assert running.complete(max_tokens=1).system_fingerprint == fingerprint
    with service(tiny_model, folder(tmp_path, "three"), "--no-batch-invariant") as running:
        assert fingerprint not in told(running)[0]


def test_two_replicas(tiny_model: Path, tmp_path: Path) -> None:
    """Whichever answers, a request with a seed has one fingerprint and one text."""
    with serving_pair(tiny_model, tmp_path) as pair:
        fields = {"prompt": "once upon a time", "seed": 11, "temperature": 1.2, "max_tokens": 12}
        answers = [pair.stack.complete(**fields).json for _ in range(12)]
        assert min(pair.answered()) > 0
    assert len({answer["system_fingerprint"] for answer in answers}) == 1
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
