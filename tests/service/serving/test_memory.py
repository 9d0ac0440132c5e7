"""The memory's plan: what a slot costs, how many fit, what there is to share, and that the process keeps to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from service import manifest
from service.errors import StartupError
from service.manifest import FileEntry, KVLayout, Quantization
from service.serving import memory
from service.serving.memory import MIB
from service.settings import Settings
from tests.support import fakes
from tests.support.stack import ROOT

GIB = 1 << 30


def described(**sizes):
    """A manifest of the default model's shape, with files of these sizes in bytes."""
    sizes = {"model_onnx_data": 140 << 20, "prompt_onnx_data": 490 << 20, "tokenizer_json": 4 << 20} | sizes
    return fakes.manifest(
        context_length=8192,
        vocab_size=49152,
        kv=KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="float32"),
        quantization=Quantization(weights="int4z", activations="float32", source="Q4_1", min_rows=2, min_logits=1),
        files={name.replace("_", "."): FileEntry(bytes=size, sha256="0" * 64) for name, size in sizes.items()},
    )


def settings(**changes):
    return Settings(model_dir="m", **changes)


def plan(allowed=1 << 50, model=None, context_length=8192, **changes):
    return memory.plan(model or described(), settings(**changes), context_length, allowed)


def test_keys_and_values_by_hand():
    """A slot takes every position of the context; the model has one slot more than sequences run."""
    made = plan(max_running=4, context_length=1000)
    assert made.kv_slot == 1000 * 46_080
    assert made.total == made.weights + 5 * made.kv_slot + made.logits + made.other


def test_weights_are_the_data_of_every_graph():
    """A second graph's data counts as much as the first one's; a longer tokenizer file is not weights."""
    alone = plan(model=described(prompt_onnx_data=0)).weights
    assert plan(model=described(prompt_onnx_data=140 << 20)).weights == 2 * alone == 3 * (140 << 20)
    assert plan(model=described(tokenizer_json=5 << 20)).weights == plan().weights


def test_matrices_in_float16_are_kept_in_float32_too():
    """They take twice the room that others do."""
    stored = described().quantization.model_copy(update={"weights": "float16"})
    halves = described().model_copy(update={"quantization": stored})
    assert plan(model=halves).weights == 2 * plan().weights


def test_logits_of_the_larger_of_a_prompt_chunk_and_a_batch():
    """Scoring a prompt takes a row of logits for every token of a chunk, decoding one for every sequence."""
    row = 49152 * 4
    assert plan(prompt_chunk=256).logits - plan(prompt_chunk=128).logits == 128 * row
    assert plan(max_running=200).logits - plan(max_running=100).logits == 72 * row


@pytest.mark.parametrize("change", [{"max_waiting": 2000}, {"prompt_chunk": 1024}, {"context_length": 8193}])
def test_what_else_takes_memory(change):
    """Waiting prompts, larger chunks and longer sequences take more beside the keys and values."""
    assert plan(**change).other > plan().other


def test_slots_are_as_many_as_fit():
    """To the byte: what n slots take holds n of them, and one byte less holds one fewer."""
    for slots in (1, 2, 7):
        total = plan(max_running=slots).total
        assert plan(total, max_running=32).slots == slots
        if slots > 1:
            assert plan(total - 1, max_running=32).slots == slots - 1


def test_max_running_is_the_upper_limit():
    """More memory makes no more slots than asked for."""
    assert plan(max_running=3).slots == 3


def test_no_slot_fits():
    """The message says what one would take, what is allowed, and what to change."""
    needed = memory.mib(plan(max_running=1).total)
    with pytest.raises(StartupError) as caught:
        plan((needed - 1) * MIB, max_running=32)
    message = str(caught.value)
    assert f"one sequence of 8192 tokens: that takes {needed} MiB" in message
    assert f"{needed - 1} MiB are allowed" in message
    assert all(flag in message for flag in ("--context-length", "--memory-mib"))


def test_default_model_keeps_all_slots_on_a_machine_of_24_gib(monkeypatch, tmp_path):
    """The default settings give the default model its 32 slots where firmware and kernel have taken their part."""
    monkeypatch.setattr("service.host.memory._physical", lambda: int(23.4 * GIB))
    assert plan(memory.budget(settings(), tmp_path)).slots == 32


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 16 GiB, whose control groups are the files that a test writes; gives the default budget."""
    monkeypatch.setattr("service.host.memory._physical", lambda: 16 * GIB)

    def budget(membership, **limits):
        files = {"proc/self/cgroup": membership} | limits
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        return memory.budget(settings(), tmp_path)

    return budget


V1 = "4:cpu,cpuacct:/\n3:memory:/docker/abc\n0::/"


@pytest.mark.parametrize(
    ("membership", "limits", "limit"),
    [
        ("0::/", {"memory.max": "max"}, 16),
        ("0::/", {"memory.max": 4 * GIB}, 4),
        ("0::/", {"memory.max": 64 * GIB}, 16),
        ("0::/", {}, 16),
        ("0::/a.slice/b", {"a.slice/memory.max": 2 * GIB, "a.slice/b/memory.max": "max"}, 2),
        ("0::/a.slice/b", {"a.slice/memory.max": 8 * GIB, "a.slice/b/memory.max": 4 * GIB}, 4),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": 3 * GIB}, 3),
        (V1, {"memory/memory.limit_in_bytes": 3 * GIB}, 3),
        (V1, {"memory/memory.limit_in_bytes": 9223372036854771712}, 16),
    ],
)
def test_default_is_a_share_of_what_there_is(machine, membership, limits, limit):
    """The machine's memory, or the tightest limit of the groups that the process is in, where it sees them."""
    found = machine(membership, **{f"sys/fs/cgroup/{path}": value for path, value in limits.items()})
    assert found == int(limit * GIB * memory.DEFAULT_SHARE)


def test_machine_without_control_groups(monkeypatch, tmp_path):
    """Then its memory alone counts."""
    monkeypatch.setattr("service.host.memory._physical", lambda: 16 * GIB)
    assert memory.budget(settings(), tmp_path) == 12 * GIB


def test_setting_is_taken_as_it_is(machine):
    """Whoever names a number is given that, not a share of it."""
    assert memory.budget(settings(memory_mib=5)) == 5 * MIB


def test_process_stays_within_its_budget(model_dir):
    """With every slot filled to its end and every token scored, the process holds what was announced, and not far less.

    The memory decides how many slots there are, and the log says so.
    """
    context_length, slots = 1024, 32
    fixed = {"max_waiting": 16, "context_length": context_length}
    total = plan(model=manifest.load(model_dir), max_running=slots, **fixed).total
    flags = {"model-dir": model_dir, "memory-mib": memory.mib(total), "max-running": 64}
    flags |= {name.replace("_", "-"): value for name, value in fixed.items()}
    command = [
        sys.executable,
        "-m",
        "tests.support.fill_all_slots",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logged, found = (json.loads(line) for line in done.stdout.splitlines())
    assert (logged["level"], logged["slots"], logged["max_running"]) == ("warning", slots, 64)
    assert logged["total_mib"] == logged["budget_mib"] == memory.mib(total)
    assert (found["slots"], len(found["generated"])) == ([slots], slots)
    assert 0.7 * total < found["peak"] <= total
