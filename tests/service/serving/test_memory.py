"""The memory plan: the size of a slot, how many fit, the default budget, and that the process stays within the plan."""

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
    """A manifest with the shape of the default model, and files of the given sizes in bytes."""
    sizes = {"model_onnx_data": 140 << 20, "prompt_onnx_data": 490 << 20, "tokenizer_json": 4 << 20} | sizes
    return fakes.manifest(
        context_length=8192,
        vocab_size=49152,
        kv=KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="float32"),
        quantization=Quantization(weights="int4-int8", activations="float32", source="Q4_1", min_rows=2, min_logits=1),
        files={name.replace("_", "."): FileEntry(bytes=size, sha256="0" * 64) for name, size in sizes.items()},
    )


def settings(**changes):
    return Settings(model_dir="m", **changes)


def plan(allowed=1 << 50, model=None, context_length=8192, **changes):
    return memory.plan(model or described(), settings(**changes), context_length, allowed)


def test_kv_cache_by_hand():
    """A slot holds every position of the context, and there is one slot more than max_running."""
    made = plan(max_running=4, context_length=1000)
    assert made.kv_slot == 1000 * 46_080
    assert made.total == made.weights + 5 * made.kv_slot + made.logits + made.other


def test_weights_are_the_data_of_every_graph():
    """The data files of both graphs count as weights, and the tokenizer file does not."""
    decode_only = plan(model=described(prompt_onnx_data=0)).weights
    assert plan(model=described(prompt_onnx_data=140 << 20)).weights == 2 * decode_only == 3 * (140 << 20)
    assert plan(model=described(tokenizer_json=5 << 20)).weights == plan().weights


def test_matrices_in_float16_are_kept_in_float32_too():
    """Float16 matrices take twice the memory of others."""
    stored = described().quantization.model_copy(update={"weights": "float16"})
    halves = described().model_copy(update={"quantization": stored})
    assert plan(model=halves).weights == 2 * plan().weights


def test_logits_of_the_larger_of_a_prompt_chunk_and_a_batch():
    """Scoring a prompt needs a row of logits per token of a chunk, decoding a row per sequence."""
    row = 49152 * 4
    assert plan(prompt_chunk=256).logits - plan(prompt_chunk=128).logits == 128 * row
    assert plan(max_running=200).logits - plan(max_running=100).logits == 72 * row


@pytest.mark.parametrize("change", [{"max_waiting": 2000}, {"prompt_chunk": 1024}, {"context_length": 8193}])
def test_other_memory(change):
    """Waiting prompts, larger chunks and longer sequences take more memory besides the KV cache."""
    assert plan(**change).other > plan().other


def test_slots_are_as_many_as_fit():
    """The memory of n slots holds n slots, and with one byte less it holds n - 1."""
    for slots in (1, 2, 7):
        total = plan(max_running=slots).total
        assert plan(total, max_running=32).slots == slots
        if slots > 1:
            assert plan(total - 1, max_running=32).slots == slots - 1


def test_max_running_is_the_upper_limit():
    """More memory does not give more slots than max_running."""
    assert plan(max_running=3).slots == 3


def test_no_slot_fits():
    """The message says what one slot would take, what is allowed, and what to change."""
    needed = memory.mib(plan(max_running=1).total)
    with pytest.raises(StartupError) as caught:
        plan((needed - 1) * MIB, max_running=32)
    message = str(caught.value)
    assert f"one sequence of 8192 tokens: that takes {needed} MiB" in message
    assert f"{needed - 1} MiB are allowed" in message
    assert all(flag in message for flag in ("--context-length", "--memory-mib"))


def test_default_model_keeps_all_slots_on_a_machine_of_24_gib(monkeypatch, tmp_path):
    """By default, the default model gets 32 slots on a machine of 24 GiB, less what firmware and kernel take."""
    monkeypatch.setattr("service.host.memory._physical", lambda: int(23.4 * GIB))
    assert plan(memory.budget(settings(), tmp_path)).slots == 32


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A fake machine of 16 GiB. Called with the files of control groups, it returns the default budget."""
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
def test_default_budget(machine, membership, limits, limit):
    """The default is a share of the machine's memory, or of the lowest limit of the process's control groups."""
    found = machine(membership, **{f"sys/fs/cgroup/{path}": value for path, value in limits.items()})
    assert found == int(limit * GIB * memory.DEFAULT_SHARE)


def test_machine_without_control_groups(monkeypatch, tmp_path):
    """Without control groups the default is a share of the machine's memory."""
    monkeypatch.setattr("service.host.memory._physical", lambda: 16 * GIB)
    assert memory.budget(settings(), tmp_path) == 12 * GIB


def test_setting_is_taken_as_it_is(machine):
    """A configured size is used as it is, and not a share of it."""
    assert memory.budget(settings(memory_mib=5)) == 5 * MIB


def test_process_stays_within_its_budget(model_dir):
    """With every slot full and every token scored, the process uses at most the planned memory, and not far less.

    The plan limits the number of slots, and the log says so.
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
