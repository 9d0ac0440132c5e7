"""Settings: their sources, and the errors for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import settings
from service.errors import StartupError

MODEL = ["--model-dir", "m"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """The settings of the machine's own environment are removed."""
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"{settings.ENV_PREFIX}{name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path):
    """A settings file."""
    path = tmp_path / "settings.toml"
    path.write_text('model_dir = "from-file"\nport = 3\nmax_running = 3\nmax_waiting = 3\n')
    return path


def test_precedence(monkeypatch, file):
    """A flag overrides the environment, which overrides the file, which overrides the default."""
    monkeypatch.setenv("COMPLETION_PORT", "2")
    monkeypatch.setenv("COMPLETION_MAX_RUNNING", "2")
    loaded = settings.load(["--config", str(file), "--port", "1"])
    assert (loaded.port, loaded.max_running, loaded.max_waiting, loaded.prompt_chunk) == (1, 2, 3, 128)
    assert loaded.model_dir == (Path("from-file"),)


def test_file_named_by_the_environment(monkeypatch, file):
    """COMPLETION_CONFIG names the file like --config, and the flag wins."""
    monkeypatch.setenv("COMPLETION_CONFIG", str(file))
    assert settings.load([]).max_waiting == 3
    other = file.with_name("other.toml")
    other.write_text('model_dir = "x"\nmax_waiting = 4\n')
    assert settings.load([f"--config={other}"]).max_waiting == 4


def test_defaults():
    """Every setting but the model directory has a default, and by default the service listens on loopback."""
    loaded = settings.load(MODEL)
    assert (str(loaded.host), loaded.port, loaded.api_keys_file) == ("127.0.0.1", 50051, None)
    assert loaded.batch_invariant


def test_switches(monkeypatch):
    """A boolean setting has a flag and a negative flag."""
    assert not settings.load([*MODEL, "--no-batch-invariant"]).batch_invariant
    monkeypatch.setenv("COMPLETION_BATCH_INVARIANT", "false")
    assert not settings.load(MODEL).batch_invariant
    assert settings.load([*MODEL, "--batch-invariant"]).batch_invariant


def refused(*arguments):
    """The message of the error that keeps the service from starting."""
    with pytest.raises(StartupError) as caught:
        settings.load(arguments)
    return str(caught.value)


def test_missing_setting():
    """The message names the flag and the environment variable."""
    message = refused()
    assert "--model-dir" in message
    assert "COMPLETION_MODEL_DIR" in message


def test_value_out_of_range(monkeypatch):
    """The message names the bound and the given value, for every invalid setting."""
    monkeypatch.setenv("COMPLETION_MAX_RUNNING", "many")
    message = refused(*MODEL, "--port", "70000")
    assert "COMPLETION_PORT" in message
    assert "65535" in message
    assert "'70000'" in message
    assert "COMPLETION_MAX_RUNNING" in message
    assert "'many'" in message


def test_host_is_an_address():
    """`host` must be an IP address, because a name can resolve to several addresses."""
    assert settings.load([*MODEL, "--host", "::1"]).host.version == 6
    message = refused(*MODEL, "--host", "localhost")
    assert "COMPLETION_HOST" in message
    assert "'localhost'" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'model_dir = "x"\ntypo = 1\n', "typo"),
        (b"port = \n", "settings.toml"),
        (b'model_dir = "\xff"\n', "settings.toml"),
    ],
)
def test_bad_file(tmp_path, content, problem):
    """A misspelt setting or a damaged file is an error, and is not ignored."""
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    assert problem in refused("--config", str(path))


def test_missing_file(tmp_path):
    """A settings file that a flag names must exist."""
    assert "does not exist" in refused(*MODEL, "--config", str(tmp_path / "none.toml"))


def test_unknown_flag(capsys):
    """An unknown flag is refused by name, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        settings.load([*MODEL, "--prot", "1"])
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_settings_do_not_change():
    """A loaded setting cannot be assigned."""
    with pytest.raises(ValueError, match="frozen"):
        settings.load(MODEL).port = 1
