"""The memory plan: the size of a slot, how many fit, the default budget, and that the process stays within the plan."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from service import manifest
from service.engine.ort.device import granule
from service.errors import StartupError
from service.manifest import KVLayout, Quantization
from service.serving import memory
from service.serving.memory import MIB
from service.settings import Settings
from tests.support import fakes
from tests.support.stack import ROOT

GIB = 1 << 30


def described(**sizes):
    """A manifest with the shape of the default model, and files of the given sizes in bytes."""
    sizes = {"model_onnx_data": 140 << 20, "tokenizer_json": 4 << 20} | sizes
    return fakes.manifest(
        context_length=8192,
        vocab_size=49152,
        kv=KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="float32"),
        quantization=Quantization(weights="int4", activations="float32", source="Q4_1", pads_lone_row=True),
        files={name.replace("_", "."): fakes.file_entry(size) for name, size in sizes.items()},
    )


def settings(**changes):
    return Settings(model_dir="m", **changes)


def planned(*models, allowed=1 << 50):
    """The plans of models, each with a manifest and settings, and perhaps a reserved size."""
    made = [memory.Model(f"m/{number}", *model) for number, model in enumerate(models)]
    return memory.plan(made, allowed)


def plan(allowed=1 << 50, model=None, **changes):
    (made,) = planned((model or described(), settings(**changes)), allowed=allowed)
    return made


POSITION = 46_080  # 30 layers of 3 keys and 3 values of 64 float32 numbers


def least(**changes):
    """The least memory that holds the model and one sequence of 512 tokens."""
    made = plan(**changes)
    return made.total - made.kv + (512 + 16) * POSITION


def test_positions_by_hand():
    """What is left beside everything else holds positions, by 16, which fill a page; 16 are for padding."""
    made = plan(least() + 1000 * POSITION)
    assert (made.positions, made.kv) == (1504, 1520 * POSITION)  # 1512, rounded down
    assert made.total == made.weights + made.logits + made.other + made.kv
    assert made.typical_requests == 2
    assert plan(least() + 1000 * POSITION, max_running=1).typical_requests == 1


def test_a_position_over_own_kernels_has_its_score():
    """64 bytes and 8 for each of `max_logprobs` beside the keys and values, which are float16; none on a GPU."""
    layout = {"layers": 30, "kv_heads": 3, "head_dim": 64, "dtype": "float16"}
    for kernels, tile, logprobs, kept in (("stock", 1, 5, 0), ("own", 16, 5, 104), ("own", 16, 100, 864)):
        model = described().model_copy(update={"kernels": kernels, "kv": KVLayout(**layout, tile=tile)})
        assert memory.Model("m", model, settings(max_logprobs=logprobs)).position == 23_040 + kept
        assert memory.Model("m", model, settings(max_logprobs=logprobs, device="cuda")).position == 0


def test_weights_are_the_data_of_the_graph():
    """Stock kernels pack the data file into memory of their own; own kernels map it; the tokenizer does not count."""
    stock = described()
    assert plan(model=stock).weights == int(1.1 * (140 << 20))
    assert plan(model=described(tokenizer_json=5 << 20)).weights == plan().weights
    own = stock.model_copy(update={"kernels": "own", "kv": stock.kv.model_copy(update={"tile": 16})})
    assert plan(model=own).weights == 140 << 20


def test_matrices_in_float16_are_kept_in_float32_too():
    """Float16 matrices take three times their size."""
    stored = described().quantization.model_copy(update={"weights": "float16"})
    halves = described().model_copy(update={"quantization": stored})
    assert plan(model=halves).weights == 3 * (140 << 20)


def test_logits_of_the_larger_of_a_prompt_chunk_and_a_batch():
    """Scoring a prompt needs a row of logits per token of a chunk, decoding a row per sequence."""
    row = 49152 * 4
    assert plan(prompt_chunk=256).logits - plan(prompt_chunk=128).logits == 128 * row
    assert plan(max_running=200).logits - plan(max_running=100).logits == 72 * row


def test_other_memory_is_bounded():
    """Larger chunks and more sequences take more memory besides the KV cache; what waits takes at most 256 MiB."""
    few = {"context_length": 1024, "max_waiting": 16, "max_running": 8}
    for change in ({"max_waiting": 2000}, {"prompt_chunk": 1024}, {"context_length": 2048}, {"max_running": 16}):
        assert plan(**few | change).other > plan(**few).other
    long = described().model_copy(update={"context_length": 1 << 20})
    assert plan(model=long).other == plan(model=described()).other
    assert plan(model=long).waiting_tokens * 64 == 256 * MIB


def test_a_sequence_of_512_tokens_is_enough():
    """The model starts with that much memory, with a shorter context than its own, and not with a page less."""
    made = plan(least())
    assert (made.positions, made.context_length, made.slots) == (512, 512, 32)
    with pytest.raises(StartupError) as caught:
        plan(least() - 16 * POSITION)
    message = str(caught.value)
    assert f"one sequence of 512 tokens: that takes {memory.mib(least())} MiB (m/0 " in message
    assert f"and {(least() - 16 * POSITION) // MIB} MiB are allowed" in message
    assert all(flag in message for flag in ("--prompt-chunk", "--max-running", "--max-waiting", "--memory-mib"))


def test_the_context_is_as_long_as_the_memory():
    """It is the model's own where that fits, and never longer."""
    assert plan(least() + 7000 * POSITION).context_length == 7504
    assert plan().context_length == 8192


def test_only_a_context_that_is_asked_for_is_refused():
    """The message names the longest that fits, and that one starts."""
    allowed = least(context_length=8000) + 1000 * POSITION
    with pytest.raises(StartupError, match=r"context_length 8000 does not fit .* --context-length (\d+)|\(") as caught:
        plan(allowed, context_length=8000)
    longest = int(str(caught.value).split("--context-length ")[1].split(")")[0])
    assert plan(allowed, context_length=longest).context_length == longest


def test_models_share_one_budget():
    """Each could take all positions; what one takes the others cannot. A reserved size is for its model only."""
    ours = (described(), settings())
    one, other, reserving = planned(ours, ours, (*ours, 3 << 30), allowed=9 << 30)
    assert one.positions == other.positions
    alone = plan(3 << 30, max_running=32)
    assert abs(reserving.positions - alone.positions) <= memory._PROCESS // POSITION  # of which a third counts here
    free = one.share.free
    assert one.share.take(free // 2) == 0
    assert other.share.free < free
    assert reserving.share.free == reserving.positions


def test_reserved_sizes_above_the_memory():
    """The message names the models, their sizes and the allowed total."""
    ours = (described(), settings())
    with pytest.raises(StartupError, match="m/0 70 MiB, m/1 50 MiB, together 120 MiB, and 100 MiB are allowed"):
        planned((*ours, 70 * MIB), (*ours, 50 * MIB), ours, allowed=100 * MIB)


def test_models_that_do_not_fit_together():
    """The message says what each model takes, and what they may take."""
    ours = (described(), settings())
    with pytest.raises(
        StartupError, match=r"the models and one sequence .*m/0 154 MiB of weights.*m/1 154 MiB"
    ) as caught:
        planned(ours, ours, allowed=1500 * MIB)
    assert "1500 MiB are allowed" in str(caught.value)
    assert "serve fewer models" in str(caught.value)


def test_default_model_runs_32_typical_requests_on_a_machine_of_4_gib(monkeypatch, tmp_path):
    """And on one of 24 GiB, less what firmware and kernel take, all its slots could be as long as its context."""
    for size, positions in ((4, 32 * 640), (23.4, 32 * 8192)):
        monkeypatch.setattr("service.host.memory._physical", lambda size=size: int(size * GIB))
        assert plan(memory.allowed(settings(), tmp_path)).positions > positions


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A fake machine of 16 GiB. Called with the files of control groups, it returns the default budget."""
    monkeypatch.setattr("service.host.memory._physical", lambda: 16 * GIB)

    def budget(membership, **limits):
        files = {"proc/self/cgroup": membership} | limits
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        return memory.allowed(settings(), tmp_path)

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
    assert memory.allowed(settings(), tmp_path) == 12 * GIB


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {5 << 20} kB"}, 5),
        # Of the 5 GiB that the group uses, 2 are files that the system drops when it must.
        (
            {
                "sys/fs/cgroup/memory.max": 8 * GIB,
                "sys/fs/cgroup/memory.current": 5 * GIB,
                "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {2 * GIB}",
            },
            5,
        ),
        ({"sys/fs/cgroup/memory.max": 8 * GIB, "sys/fs/cgroup/memory.current": 3 * GIB}, 5),
    ],
)
def test_memory_that_others_use(machine, files, free):
    """Of the memory that is free, 9/10 are taken where that is less."""
    assert machine("0::/", **files) == int(free * GIB * memory.DEFAULT_FREE_SHARE)


def test_a_size_in_the_settings(machine, tmp_path):
    """It is used as it is, unless it is more than the machine or the control group has."""
    machine("0::/", **{"sys/fs/cgroup/memory.max": 4 * GIB})
    assert memory.allowed(settings(memory_mib=4096), tmp_path) == 4 * GIB
    with pytest.raises(StartupError, match=r"memory_mib 4097 is more than the 4096 MiB of .*--memory-mib"):
        memory.allowed(settings(memory_mib=4097), tmp_path)


def test_process_stays_within_its_budget(model_dir):
    """With all positions taken and every token scored, the process uses at most the planned memory, and not far less.

    Twice as many sequences are asked for as the memory holds: half of them wait for it.
    """
    context_length, slots = 1024, 32
    fixed = {"max_waiting": 16, "context_length": context_length}
    model = manifest.load(model_dir)
    made, page = plan(model=model, max_running=2 * slots, **fixed), granule(model.kv)
    position = memory.Model("m", model, settings(**fixed)).position
    total = made.total - made.kv + (slots * context_length + page) * position
    flags = {"model-dir": model_dir, "memory-mib": memory.mib(total), "max-running": 2 * slots}
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
    # The setting is in whole MiB, so of the positions more some are left.
    assert slots * context_length <= logged["positions"] <= slots * context_length + page
    assert logged["slots"] == 2 * slots
    assert logged["total_mib"] == memory.mib(total)
    assert (found["slots"], len(found["generated"])) == ([2 * slots], 2 * slots)
    assert 0.7 * total < found["peak"] <= total
