"""Several models: their settings and names, their parts of the memory, and what is said when these do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service import __main__ as command
from service import doctor, settings
from service.errors import ModelDirectoryError, StartupError
from service.serving import memory, models
from service.serving.memory import MIB, Claim
from service.settings import Settings
from tests.support.ports import free_ports
from tests.support.processes import TINY, export_tiny
from tests.support.stack import MODEL, ROOT

DEFAULT = "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """Nothing of the machine's own environment gets in."""
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"{settings.ENV_PREFIX}{name.upper()}", raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("tiny"))


def rename(model: Path, **changes: object) -> None:
    """Changes what a manifest says."""
    path = model / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def other(tiny, tmp_path):
    """The tiny model by another name, in a folder of its own."""
    copied = Path(shutil.copytree(tiny, tmp_path / "other"))
    rename(copied, id="other")
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
    """A flag may be repeated, the environment has one path or a JSON list; the flag wins."""
    if environment is not None:
        monkeypatch.setenv("COMPLETION_MODEL_DIR", environment)
    loaded = settings.load(flags)
    assert [str(model.directory) for model in loaded.each_model()] == directories


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
    """A table's numbers are that model's; what it leaves out, and models without a table, are as all."""
    loaded = settings.load(["--config", str(file), "--max-waiting", "99"])
    given = {str(model.directory): model for model in loaded.each_model()}
    assert list(given) == ["first", "second", "small", "plain"]
    small = given["small"].settings
    assert (small.max_running, small.context_length, small.threads) == (64, 1024, 1)
    assert (small.max_waiting, small.max_queue_seconds, small.batch_invariant) == (7, 1.5, False)
    assert small.prompt_chunk == 64
    assert (given["small"].aliases, given["small"].memory_mib) == (("quick", "cheap"), 2000)
    for name in ("first", "second", "plain"):
        assert given[name].settings == loaded
        assert (given[name].aliases, given[name].memory_mib) == ((), None)
    assert loaded.alias == {"fast": "org/small"}


def test_tables_in_the_environment(monkeypatch):
    """As JSON, where a file cannot be had."""
    monkeypatch.setenv("COMPLETION_MODELS", '{"a": {"dir": "a", "max_running": 3}}')
    monkeypatch.setenv("COMPLETION_ALIAS", '{"x": "org/a"}')
    loaded = settings.load(["--max-running", "4", "--alias", "y=org/b", "--alias", "z=c"])
    (model,) = loaded.each_model()
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
def test_tables_that_will_not_do(tmp_path, content, parts):
    """The message names the table's entry, the bound and what was given."""
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(StartupError) as caught:
        settings.load(["--config", str(path)])
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("flags", [["--alias", "nothing"], ["--models", "{"], ["--alias", "a b=c"]])
def test_flags_that_will_not_do(flags):
    """They are refused by name, as an error and not as a traceback."""
    with pytest.raises(StartupError, match=flags[0].strip("-")):
        settings.load(["--model-dir", "m", *flags])


def test_config_show(file, monkeypatch, capsys):
    """What each table has of its own, and what it has as all do, with where that is from."""
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
    """Tables and aliases come together, and each entry says where it is from."""
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


@pytest.mark.parametrize(
    ("claims", "allowed", "parts"),
    [
        ([(10, 90)], 100, [100]),
        ([(10, 90)], 5, [5]),
        ([(10, 50), (10, 30)], 80, [50, 30]),
        ([(10, 50), (10, 30)], 50, [30, 20]),
        ([(10, 50), (10, 30)], 20, [10, 10]),
        ([(10, 50), (10, 30)], 140, [90, 50]),
        ([(10, 10), (10, 10)], 30, [15, 15]),
        ([(10, 50, 25), (10, 30)], 100, [25, 75]),
        ([(10, 50, 60), (10, 30, 40)], 100, [60, 40]),
        ([(10, 50, 5), (10, 50), (10, 30)], 55, [5, 30, 20]),
        ([(1, 4), (1, 4), (1, 4)], 5, [1, 1, 1]),
    ],
)
def test_the_budget_is_divided(claims, allowed, parts):
    """Who has a budget of its own gets that; of the rest each gets its least, and more in proportion to its use."""
    made = memory.divide([Claim(str(number), *each) for number, each in enumerate(claims)], allowed)
    assert made == parts
    assert sum(made) <= allowed


def test_budgets_of_their_own_that_come_to_too_much():
    """The message says which models, how much, and what is allowed."""
    claims = [Claim("m/a", 1, 2, 70 * MIB), Claim("m/b", 1, 2, 50 * MIB), Claim("m/c", 1, 2)]
    with pytest.raises(StartupError, match="m/a 70 MiB, m/b 50 MiB, together 120 MiB, and 100 MiB are allowed"):
        memory.divide(claims, 100 * MIB)


def test_models_that_do_not_fit_together():
    """The message says what each takes for a single sequence, and what is left to them."""
    claims = [Claim("m/a", 30 * MIB, 90 * MIB), Claim("m/b", 25 * MIB, 30 * MIB), Claim("m/c", 1, 2, 50 * MIB)]
    with pytest.raises(StartupError, match="m/a 30 MiB, m/b 25 MiB, and 50 MiB are left") as caught:
        memory.divide(claims, 100 * MIB)
    assert "--memory-mib" in str(caught.value)


def test_slots_of_each(model_dir, tiny):
    """Of a budget that holds all, every model has all its slots; of a smaller one each has some, within the budget."""
    checked = [models.check(given) for given in Settings(model_dir=[model_dir, tiny]).each_model()]
    enough = sum(
        memory.claim("", each.manifest, each.given.settings, each.context_length, own=None, models=2).most
        for each in checked
    )
    for allowed, all_slots in ((memory.mib(enough), True), (memory.mib(enough) // 2, False)):
        plans = models.plans(checked, Settings(model_dir=[model_dir, tiny], memory_mib=allowed))
        assert [plan.slots == 32 for _, plan in plans] == [all_slots, all_slots]
        assert all(plan.slots > 8 for _, plan in plans)
        assert sum(plan.total for _, plan in plans) <= sum(part for part, _ in plans) <= allowed * MIB


def test_the_process_counts_once(tiny, other):
    """What the process takes by itself is not reserved for each model again."""
    totals = []
    for directories in ([tiny], [tiny, other]):
        given = Settings(model_dir=directories, max_running=1)
        totals.append(
            sum(plan.total for _, plan in models.plans([models.check(each) for each in given.each_model()], given))
        )
    alone, both = totals
    assert both - alone < alone - memory._PROCESS + MIB


def test_a_budget_of_its_own_that_holds_no_sequence(tiny, other):
    """The message names the model."""
    given = Settings(models={"a": {"dir": tiny}, "b": {"dir": other, "memory_mib": 100}}, memory_mib=4000)
    with pytest.raises(StartupError, match=f"{other}: .*one sequence of 4096 tokens.* and 100 MiB are allowed"):
        models.load(given)


# --- names ---


def test_names(tiny, other):
    """A model has its id, its manifest's aliases, its table's, and those that lead to its id."""
    rename(other, aliases=["from-manifest"])
    given = Settings(
        model_dir=tiny,
        models={"o": {"dir": other, "aliases": ["from-table", "from-manifest"]}},
        alias={"given": "other", "small": TINY},
    )
    checked = [models.check(each) for each in given.each_model()]
    assert models.aliases(checked, given.alias) == [("small",), ("from-manifest", "from-table", "given")]


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
    """The message names both directories, and the name."""
    rename(other, **changes)
    with pytest.raises(StartupError) as caught:
        models.load(Settings(model_dir=[tiny, other], **extra))
    for part in (str(tiny), str(other), f"the name {name};"):
        assert part in str(caught.value)


def test_an_alias_of_nothing(tiny):
    """The message names the ids that there are."""
    with pytest.raises(StartupError, match=r"alias x=nothing: no model has this id .*tiny"):
        models.load(Settings(model_dir=tiny, alias={"x": "nothing"}))


# --- what a start refuses, and the doctor finds ---


def test_a_context_that_one_model_cannot(model_dir, tiny):
    """The directory is named; with one of its own it can."""
    with pytest.raises(StartupError, match=f"context_length 5000 is above the 4096 of {tiny}"):
        models.load(Settings(model_dir=[model_dir, tiny], context_length=5000))
    given = Settings(model_dir=model_dir, models={"t": {"dir": tiny, "context_length": 64}}, context_length=5000)
    checked = [models.check(each) for each in given.each_model()]
    assert [each.context_length for each in checked] == [5000, 64]


def test_a_damaged_model_beside_a_sound_one(tiny, other):
    """Nothing is loaded; the file is named, and the exit code is that of a damaged directory."""
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
    return [(each.name, each.good, each.text) for each in doctor.examine(given)]


def test_the_doctor(model_dir, tiny, other):
    """A line for each model and its memory, and one for all names; a damaged model is named beside the others."""
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
    """What a start would refuse: a name for two, and a budget that does not hold all."""
    port, metrics_port = free_ports(2)
    given = Settings(
        model_dir=[tiny, other], alias={"other": TINY}, memory_mib=300, port=port, metrics_port=metrics_port
    )
    found = {name: (good, text) for name, good, text in examined(given)}
    assert not found["names"][0]
    assert str(tiny) in found["names"][1]
    assert not found["memory"][0]
    assert "300 MiB are allowed" in found["memory"][1]
