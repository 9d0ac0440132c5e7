"""Evaluation and load tools, unmodified: lm-eval's scores are the model's own, and load runs end without errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploy import local
from model_export.native.reference import reference_logits
from model_export.native.source import DecoderSource
from model_export.opening import read_source
from tests.clients.documented import Workplace
from tests.model_export.session import Session
from tests.support.stack import Stack

pytestmark = pytest.mark.clients

END_OF_TEXT = 2  # what the documented tokenizer puts before a text that is scored from its first token on

Logits = Callable[[list[int]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def here(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(stack, tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def evaluated(here: Workplace) -> Path:
    """Where the documented evaluation has left its results."""
    here.needs("lm_eval")
    here.bash("lm-eval")
    (folder,) = (here.folder / "results").iterdir()
    return folder


def samples(folder: Path, task: str) -> list[dict]:
    """A task's samples as the harness logged them."""
    (path,) = folder.glob(f"samples_{task}_2*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder: Path) -> Iterator[tuple[str, str, float, bool]]:
    """Each scored answer: context, continuation, log probability, and whether it is the greedy one."""
    for sample in samples(folder, "facts"):
        for number, ((score, greedy),) in enumerate(sample["resps"]):
            asked = sample["arguments"][f"gen_args_{number}"]
            yield asked["arg_0"], asked["arg_1"], float(score), greedy == "True"


def texts(folder: Path) -> Iterator[tuple[str, float]]:
    """Each text scored as a whole, and its log probability."""
    for sample in samples(folder, "facts_text"):
        yield sample["arguments"]["gen_args_0"]["arg_0"], float(sample["resps"][0][0])


def scores(logits: Logits, tokens: list[int], start: int) -> tuple[NDArray[np.float64], bool]:
    """The log probabilities of the tokens from `start` on, and whether all of them are the likeliest."""
    rows = logits(tokens)[start - 1 : -1]
    highest = rows.max(axis=-1, keepdims=True)
    logprobs = rows - highest - np.log(np.exp(rows - highest).sum(axis=-1, keepdims=True))
    targets = np.array(tokens[start:])
    return logprobs[np.arange(len(targets)), targets], bool((rows.argmax(axis=-1) == targets).all())


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def test_lm_eval_scores_are_those_of_the_same_graph(evaluated: Path, model_dir: Path, tokenizer: Tokenizer) -> None:
    """Every score that went through REST equals the graph's own, run without the service, within 1e-4."""
    session = Session(model_dir, rows=1)

    def logits(tokens: list[int]) -> NDArray[np.float64]:
        return session.forward([np.array(tokens)], [0]).astype(np.float64)

    scored = list(answers(evaluated))
    assert len(scored) == 48
    for context, continuation, score, greedy in scored:
        tokens = tokenizer.encode(context + continuation).ids
        direct, likeliest = scores(logits, tokens, len(tokenizer.encode(context).ids))
        assert score == pytest.approx(direct.sum(), abs=1e-4)
        assert greedy == likeliest
    for text, score in texts(evaluated):
        direct, _ = scores(logits, [END_OF_TEXT, *tokenizer.encode(text).ids], 1)
        assert score == pytest.approx(direct.sum(), abs=1e-4)


def test_lm_eval_scores_are_near_the_source(evaluated: Path, tokenizer: Tokenizer) -> None:
    """Beside the source's weights in float32 numpy all texts' scores differ by at most 0.1 per token, one's by 0.25.

    A text has five to ten tokens, of each of which 8-bit arithmetic moves the score by 0.12 (one standard deviation).
    """
    source = read_source(local.default_weights())
    assert isinstance(source, DecoderSource)

    def logits(tokens: list[int]) -> NDArray[np.float64]:
        return reference_logits(source.checkpoint, np.array(tokens), lambda: None).astype(np.float64)

    scored = list(texts(evaluated))
    assert len(scored) == 12
    tokens, total = 0, 0.0
    for text, score in scored:
        direct, _ = scores(logits, [END_OF_TEXT, *tokenizer.encode(text).ids], 1)
        assert score / len(direct) == pytest.approx(direct.mean(), abs=0.25)
        tokens, total = tokens + len(direct), total + score - direct.sum()
    assert total / tokens == pytest.approx(0, abs=0.1)


def test_lm_eval_metrics_follow_from_the_scores(evaluated: Path) -> None:
    """The accuracy that the harness reports is that of its scores, and well above chance."""
    (path,) = evaluated.glob("results_*.json")
    results = json.loads(path.read_text())["results"]
    by_context: dict[str, list[float]] = {}
    for context, _, score, _ in answers(evaluated):
        by_context.setdefault(context, []).append(score)
    right = [
        int(np.argmax(by_context[sample["doc"]["question"]])) == sample["doc"]["answer"]
        for sample in samples(evaluated, "facts")
    ]
    assert results["facts"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["facts"]["acc,none"] >= 0.75
    size = sum(len(text.encode()) for text, _ in texts(evaluated))
    bits = -sum(score for _, score in texts(evaluated)) / np.log(2)
    assert results["facts_text"]["bits_per_byte,none"] == pytest.approx(bits / size)


@pytest.fixture(scope="module")
def remotely(here: Workplace) -> Path:
    """Where the documented evaluations with the service's own tokenizer, and of chats, have left their results."""
    here.needs("lm_eval")
    here.bash("lm-eval with the service's tokenizer")
    return here.folder


def test_lm_eval_with_the_services_tokenizer(remotely: Path, model_dir: Path, tokenizer: Tokenizer) -> None:
    """Its scores are those of the same graph, run without the service on tokens of the model's own file."""
    (folder,) = (remotely / "remote").iterdir()
    session = Session(model_dir, rows=1)

    def logits(tokens: list[int]) -> NDArray[np.float64]:
        return session.forward([np.array(tokens)], [0]).astype(np.float64)

    scored = list(answers(folder))
    assert len(scored) == 48
    for context, continuation, score, greedy in scored:
        direct, likeliest = scores(logits, tokenizer.encode(context + continuation).ids, len(tokenizer.encode(context)))
        assert score == pytest.approx(direct.sum(), abs=1e-4)
        assert greedy == likeliest
    bos = tokenizer.token_to_id("<|im_start|>")  # which the harness looks up by its name, and puts before whole texts
    for text, score in texts(folder):
        direct, _ = scores(logits, [bos, *tokenizer.encode(text).ids], 1)
        assert score == pytest.approx(direct.sum(), abs=1e-4)


def test_lm_eval_of_chats(remotely: Path) -> None:
    """With the model's own template, questions are answered as in a chat: in a sentence, and rightly."""
    (folder,) = (remotely / "chatted").iterdir()
    found = {sample["doc"]["country"]: sample for sample in samples(folder, "capitals")}
    for country, city in {"Russia": "Moscow", "Japan": "Tokyo"}.items():
        assert found[country]["arguments"]["gen_args_0"]["arg_0"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert found[country]["resps"] == [[f"The capital of {country} is {city}."]]
    (path,) = folder.glob("results_*.json")
    results = json.loads(path.read_text())["results"]
    right = [sample["exact_match"] for sample in found.values()]
    assert results["capitals"]["exact_match,city"] == pytest.approx(np.mean(right))
    assert np.mean(right) >= 0.6


def test_what_load_tools_send(stack: Stack) -> None:
    """`stop: null`, `ignore_eos` and `continuous_usage_stats` give every token asked for, counted in every event."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    certain_end = {str(END_OF_TEXT): 100}
    fields = {"prompt": "Once", "max_tokens": 6, "stop": None, "stream": True, "logit_bias": certain_end}
    *events, done = stack.complete(**fields, ignore_eos=True, stream_options=options).events
    assert done == "[DONE]"
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    *_, last, _ = stack.complete(**fields, ignore_eos=False, stream_options=options).events
    assert json.loads(last)["usage"]["completion_tokens"] == 0


def test_guidellm(here: Workplace, evaluated: Path) -> None:
    """GuideLLM's run has no errors; every request has exactly the tokens asked for, and its figures fit together."""
    here.needs("guidellm")
    here.bash("GuideLLM")
    (benchmark,) = json.loads((here.folder / "guidellm.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (requests["errored"], requests["incomplete"]) == ([], [])
    assert len(requests["successful"]) == 8
    for request in requests["successful"]:
        assert request["output_metrics"]["text_tokens"] == 16
        assert abs(request["input_metrics"]["text_tokens"] - 64) <= 4
        assert 0 < request["time_to_first_token_ms"] < request["request_latency"] * 1000


def test_locust(here: Workplace) -> None:
    """Locust's run has no failures, and its figures fit together."""
    here.needs("locust")
    here.write("locustfile.py", "Locust", "python")
    here.bash("Locust")
    (entry,) = json.loads((here.folder / "locust.json").read_text())
    assert entry["num_failures"] == 0
    assert entry["num_requests"] >= 4  # each user's last one is waited for, however slow it is
    mean = entry["total_response_time"] / entry["num_requests"]
    assert 0 < entry["min_response_time"] <= mean <= entry["max_response_time"]
