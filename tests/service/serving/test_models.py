"""Several models: their settings, names and parts of the memory, and the errors when these do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import __main__ as command
from service import doctor, settings
from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.errors import ModelDirectoryError, StartupError
from service.rpc.parse import Limits
from service.rpc.servicer import ServedModel
from service.serving import memory, models
from service.serving.memory import MIB
from service.settings import Settings
from tests.support.fakes import VOCABULARY, FakeModel, letters_tokenizer, manifest
from tests.support.ports import free_ports
from tests.support.processes import TINY, export_tiny
from tests.support.stack import MODEL, ROOT

DEFAULT = "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """The settings of the machine's own environment are removed."""
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"{settings.ENV_PREFIX}{name.upper()}", raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("tiny"))


def edit_manifest(model: Path, **changes: object) -> None:
    """Changes entries of a model's manifest."""
    path = model / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def other(tiny, tmp_path):
    """A copy of the tiny model under another id, in its own folder."""
    copied = Path(shutil.copytree(tiny, tmp_path / "other"))
    edit_manifest(copied, id="other")
    return copied


# --- settings ---


@pytest.mark.parametrize(
    ("flags", "environment", "directories"),
    [
        (["--model-dir", "a"], None, ["a"]),
        (["--model-dir", "a", "--model-dir=b"], None, ["a", "b"]),
        (["--model-dir", '["a,b"]'], None, ["a,b"]),
        ([], "a", ["a"]),
        ([], "/with:colon,and comma", ["/with:colon,and comma"]),
        ([], '["a", "b"]', ["a", "b"]),
        (["--model-dir", "c"], '["a", "b"]', ["c"]),
    ],
)
def test_directories(monkeypatch, flags, environment, directories):
    """A flag may be repeated, the environment has one path or a JSON list, and the flag wins."""
    if environment is not None:
        monkeypatch.setenv("COMPLETION_MODEL_DIR", environment)
    loaded = settings.load(flags)
    assert [str(model.directory) for model in loaded.configured_models()] == directories


FILE = """
model_dir = ["first", "second"]
max_running = 16
prompt_chunk = 64

[alias]
fast = "org/small"

[models.small]
dir = "small"
aliases = ["quick", "cheap"]
max_running = 64
memory_mib = 2000
context_length = 1024
threads = 1
max_waiting = 7
max_queue_seconds = 1.5
batch_invariant = false

[models.plain]
dir = "plain"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    return path


def test_tables(file):
    """A table overrides settings for its model; missing entries, and other models, have the values for all."""
    loaded = settings.load(["--config", str(file), "--max-waiting", "99"])
    by_directory = {str(model.directory): model for model in loaded.configured_models()}
    assert list(by_directory) == ["first", "second", "small", "plain"]
    small = by_directory["small"].settings
    assert (small.max_running, small.context_length, small.threads) == (64, 1024, 1)
    assert (small.max_waiting, small.max_queue_seconds, small.batch_invariant) == (7, 1.5, False)
    assert small.prompt_chunk == 64
    assert (by_directory["small"].aliases, by_directory["small"].memory_mib) == (("quick", "cheap"), 2000)
    for name in ("first", "second", "plain"):
        assert by_directory[name].settings == loaded
        assert (by_directory[name].aliases, by_directory[name].memory_mib) == ((), None)
    assert loaded.alias == {"fast": "org/small"}


def test_tables_in_the_environment(monkeypatch):
    """The environment can hold the tables as JSON, for services without a settings file."""
    monkeypatch.setenv("COMPLETION_MODELS", '{"a": {"dir": "a", "max_running": 3}}')
    monkeypatch.setenv("COMPLETION_ALIAS", '{"x": "org/a"}')
    loaded = settings.load(["--max-running", "4", "--alias", "y=org/b", "--alias", "z=c"])
    (model,) = loaded.configured_models()
    assert (model.directory, model.settings.max_running) == (Path("a"), 3)
    assert loaded.alias == {"x": "org/a", "y": "org/b", "z": "c"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[models.a]\nmax_running = 3\n", ["models.a.dir", "Field required"]),
        ('[models.a]\ndir = "a"\nmax_runing = 3\n', ["models.a.max_runing", "3"]),
        ('[models.a]\ndir = "a"\nmax_running = 2000\n', ["models.a.max_running", "1024", "2000"]),
        ('[models.a]\ndir = "a"\naliases = ["two words"]\n', ["models.a.aliases.0", "two words"]),
        ('[models.a]\ndir = "a"\nport = 3\n', ["models.a.port"]),
        ('models = "a"\n', ["models", "'a'"]),
        ("port = 3\n", ["--model-dir", "COMPLETION_MODEL_DIR", "[models.NAME]"]),
    ],
)
def test_invalid_tables(tmp_path, content, parts):
    """The message names the table's entry, the bound and the given value."""
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(StartupError) as caught:
        settings.load(["--config", str(path)])
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("flags", [["--alias", "nothing"], ["--models", "{"], ["--alias", "a b=c"]])
def test_invalid_flags(flags):
    """An invalid flag is refused by name, with an error and not a traceback."""
    with pytest.raises(StartupError, match=flags[0].strip("-")):
        settings.load(["--model-dir", "m", *flags])


def test_config_show(file, monkeypatch, capsys):
    """Entries of a table are printed with their source, and shared settings as shared."""
    monkeypatch.setattr(sys, "argv", ["service", "config", "show", "--config", str(file)])
    assert command.main() == 0
    rows = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert rows["model_dir"] == f"first, second file {file}"
    assert rows["models"] == f"small, plain file {file}"
    assert rows["alias"] == f"fast=org/small file {file}"
    assert rows["models.small.dir"] == f"small file {file}"
    assert rows["models.small.aliases"] == f"quick, cheap file {file}"
    assert rows["models.small.max_running"] == f"64 file {file}"
    assert rows["models.small.prompt_chunk"] == "64 as prompt_chunk"
    assert rows["models.plain.max_running"] == "16 as max_running"
    assert rows["models.small.memory_mib"] == f"2000 file {file}"
    assert "models.plain.memory_mib" not in rows


def test_config_show_of_tables_from_two_sources(file, monkeypatch, capsys):
    """Tables and aliases of several sources are merged, and each entry is printed with its source."""
    monkeypatch.setenv("COMPLETION_MODELS", '{"small": {"dir": "other"}, "third": {"dir": "third"}}')
    monkeypatch.setattr(
        sys, "argv", ["service", "config", "show", "--config", str(file), "--alias", "quicker=org/small"]
    )
    assert command.main() == 0
    rows = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert rows["models.small.dir"] == "other environment"
    assert rows["models.small.max_running"] == f"64 file {file}"
    assert rows["models.third.dir"] == "third environment"
    assert rows["models.plain.dir"].endswith(f"file {file}")
    assert rows["models"].endswith(f"environment, file {file}")
    assert rows["alias"].endswith(f"flag, file {file}")


# --- the memory ---


def test_the_process_counts_once(tiny, other):
    """The memory of the process itself is counted once, not for each model again."""
    totals = []
    for directories in ([tiny], [tiny, other]):
        given = Settings(model_dir=directories, max_running=1)
        found = [models.read(model) for model in given.configured_models()]
        totals.append(sum(model.plan.other for model in models.divide_memory(found, given)))
    alone, both = totals
    assert both - alone < alone - memory._PROCESS + MIB


def test_a_reserved_size_below_one_sequence(tiny, other):
    """The message names the model's directory, and no file is hashed before it."""
    path = other / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")  # a damage that only its hash would show
    given = Settings(models={"a": {"dir": tiny}, "b": {"dir": other, "memory_mib": 100}}, memory_mib=4000)
    with pytest.raises(StartupError, match=f"one sequence of 512 tokens: .*{other} .* and 100 MiB are allowed"):
        models.load(given)


def test_memory_above_the_machine(tiny):
    """More than the machine has is refused at once."""
    with pytest.raises(StartupError, match="memory_mib 100000000 is more than the"):
        models.load(Settings(model_dir=tiny, memory_mib=10**8))


# --- names ---


def test_names(tiny, other):
    """A model's aliases are those of its manifest, those of its table, and the `alias` entries that name its id."""
    edit_manifest(other, aliases=["from-manifest"])
    given = Settings(
        model_dir=tiny,
        models={"o": {"dir": other, "aliases": ["from-table", "from-manifest"]}},
        alias={"given": "other", "small": TINY},
    )
    found = [models.read(model) for model in given.configured_models()]
    aliases = {TINY: ("small",), "other": ("from-manifest", "from-table", "given")}
    assert models.aliases(found, given.alias) == aliases


@pytest.mark.parametrize(
    ("changes", "extra", "name"),
    [
        ({"id": TINY}, {}, TINY),
        ({"id": "other", "aliases": [TINY]}, {}, TINY),
        ({"id": "other"}, {"alias": {TINY: "other"}}, TINY),
        ({"id": "other"}, {"alias": {"other": TINY}}, "other"),
        ({"id": "other", "aliases": ["x"]}, {"alias": {"x": TINY}}, "x"),
    ],
)
def test_a_name_for_two_models(tiny, other, changes, extra, name):
    """The message names both directories and the name that both claim."""
    edit_manifest(other, **changes)
    with pytest.raises(StartupError) as caught:
        models.load(Settings(model_dir=[tiny, other], **extra))
    for part in (str(tiny), str(other), f"the name {name};"):
        assert part in str(caught.value)


def test_an_alias_of_an_unknown_model(tiny):
    """The message names the ids of the served models."""
    with pytest.raises(StartupError, match=r"alias x=nothing: no model has this id .*tiny"):
        models.load(Settings(model_dir=tiny, alias={"x": "nothing"}))


# --- what the start refuses and the doctor reports ---


def test_a_context_that_one_model_cannot(model_dir, tiny):
    """The message names the model's directory; a `context_length` in its table makes it fit."""
    with pytest.raises(StartupError, match=f"context_length 5000 is above the 4096 of {tiny}"):
        models.load(Settings(model_dir=[model_dir, tiny], context_length=5000))
    given = Settings(model_dir=model_dir, models={"t": {"dir": tiny, "context_length": 64}}, context_length=5000)
    found = [models.read(model) for model in given.configured_models()]
    assert [model.settings.context_length for model in found] == [5000, 64]


def test_a_damaged_model_beside_a_sound_one(tiny, other):
    """No model is loaded; the message names the file, and the exit code is that of a damaged directory."""
    path = other / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelDirectoryError, match=f"{path} has"):
        models.load(Settings(model_dir=[tiny, other]))
    (port,) = free_ports(1)
    flags = ["--model-dir", str(tiny), "--model-dir", str(other), "--port", str(port)]
    done = subprocess.run(
        [sys.executable, "-m", "service", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1


def examined(given):
    return [(finding.name, finding.passed, finding.text) for finding in doctor.examine(given)]


def test_the_doctor(model_dir, tiny, other):
    """The doctor reports on each model and its memory, and on all names; a damaged model does not hide the others."""
    port, metrics_port = free_ports(2)
    given = Settings(model_dir=[model_dir, tiny], alias={"small": TINY}, port=port, metrics_port=metrics_port)
    found = examined(given)
    assert all(good for _, good, _ in found)
    assert [text.split(" in ")[0] for name, _, text in found if name == "model"] == [DEFAULT, TINY]
    assert [text for name, _, text in found if name == "names"] == [f"{DEFAULT} = {MODEL}; {TINY} = small"]
    assert [text.split(":")[0] for name, _, text in found if name == "memory"] == [DEFAULT, TINY]
    (other / "tokenizer.json").unlink()
    found = examined(given.model_copy(update={"model_dir": (other, tiny)}))
    assert [(name, good) for name, good, _ in found[-4:]] == [
        ("model", False),
        ("model", True),
        ("names", False),
        ("memory", False),
    ]
    assert str(other / "tokenizer.json") in found[-4][2]


def test_the_doctor_of_names_and_budgets(tiny, other):
    """The doctor reports a name of two models, and memory that does not hold both."""
    port, metrics_port = free_ports(2)
    given = Settings(
        model_dir=[tiny, other], alias={"other": TINY}, memory_mib=300, port=port, metrics_port=metrics_port
    )
    found = {name: (good, text) for name, good, text in examined(given)}
    assert not found["names"][0]
    assert str(tiny) in found["names"][1]
    assert not found["memory"][0]
    assert "300 MiB are allowed" in found["memory"][1]


# --- the warm-up ---


@pytest.mark.parametrize(
    ("chunk", "context", "seconds", "lengths"),
    [
        (128, 4096, 0.01, [1, 16, 128]),
        (128, 4096, 0.25, [1, 16, 128]),  # 128 tokens take eight times as long as 16
        (128, 4096, 0.26, [1, 16]),
        (128, 64, 0.01, [1, 16, 62]),  # and two tokens of an answer
        (16, 4096, 0.01, [1, 16]),
        (128, 10, 100, [1, 8]),
    ],
)
def test_warm_up_requests(tmp_path, monkeypatch, chunk, context, seconds, lengths):
    """A full prompt chunk is computed unless it would take more than two seconds. No prompt begins like another."""
    now = 100.0
    monkeypatch.setattr(models, "time", SimpleNamespace(monotonic=lambda: now))
    letters, fake = letters_tokenizer(tmp_path), FakeModel(context_length=context)
    engine = Engine(fake, letters, Scheduler(KVCache(4, Share(Budget(4 * context))), chunk), max_waiting=1)
    prompts = []
    for request in models.warm_up_requests(ServedModel(manifest(), letters, engine, Limits(context, 4))):
        prompts += request.prompts
        now += seconds
    assert [len(prompt.token_ids) for prompt in prompts] == lengths
    firsts = {prompt.token_ids[0] for prompt in prompts}
    assert len(firsts) == len(prompts)
    assert firsts <= set(range(VOCABULARY))
