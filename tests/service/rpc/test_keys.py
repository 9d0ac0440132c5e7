"""API keys."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from service.errors import AuthenticationError, StartupError
from service.rpc.keys import KeyRing
from service.rpc.quota import Quota

DIGEST = hashlib.sha256(b"sk-right").hexdigest()


@pytest.fixture
def load(tmp_path):
    def write(text):
        path = tmp_path / "keys"
        path.write_text(text)
        return KeyRing.load(path)

    return write


def test_known_key(load):
    """The caller is known by the key's name; the identity is not the key."""
    keys = load(f"# a comment\n\n{'0' * 64} other\n  {DIGEST}   team-a.1 \n")
    caller = keys.authenticate("Bearer sk-right")
    assert caller.name == "team-a.1"
    assert "sk-right" not in caller.identity
    assert keys.authenticate("bearer  sk-right") == caller
    assert not keys.open


def test_models_of_a_key(load):
    """A key may be limited to models, which have several names each; without the limit it may use all."""
    caller = load(f"{DIGEST} team models=a,org/b\n").authenticate("Bearer sk-right")
    assert [caller.may_use(*names) for names in (("a", "x"), ("x", "org/b"), ("x", "b"))] == [True, True, False]
    assert load(f"{DIGEST} team\n").authenticate("Bearer sk-right").may_use("anything")


@pytest.mark.parametrize(
    ("header", "says"),
    [
        *((header, "You didn't provide") for header in (None, "", "sk-right", "Bearer", "Bearer ", "Basic sk-right")),
        *((header, "Incorrect") for header in ("Bearer a b", "Bearer é", "Bearer a,Bearer b", "Basic a, bearer b")),
    ],
)
def test_missing_or_malformed_header(load, header, says):
    """Without a key file any will do; with one, a key in odd characters or given twice is a wrong one, not none."""
    with pytest.raises(AuthenticationError) as caught:
        load(f"{DIGEST} me\n").authenticate(header)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.message.startswith(says)
    assert KeyRing.load(None).authenticate(header).name == "anonymous"


@pytest.mark.parametrize("key", ["sk-wrong", "sk-righ", "sk-right1", DIGEST])
def test_wrong_key(load, key):
    """Nearly right is wrong, and so is the digest; the message does not repeat the key."""
    with pytest.raises(AuthenticationError) as caught:
        load(f"{DIGEST} me\n").authenticate(f"Bearer {key}")
    assert key not in caught.value.message


def test_without_a_file_any_key_will_do():
    """Yet different keys are different callers, and so is who has none."""
    keys = KeyRing.load(None)
    assert keys.authenticate(None).identity not in {keys.authenticate(f"Bearer {key}").identity for key in "ab"}
    one, other = keys.authenticate("Bearer a"), keys.authenticate("Bearer b")
    assert keys.open
    assert one.name == other.name == "anonymous"
    assert one.identity != other.identity


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        (f"{DIGEST}\n", "line 1"),
        (f"{DIGEST} me\n{DIGEST[:-1]} you\n", "line 2"),
        (f"{DIGEST.upper()} me\n", "line 1"),
        (f"{DIGEST} two words\n", "line 1"),
        (f"{DIGEST} me models=\n", "line 1"),
        (f"{DIGEST} me models=a b\n", "line 1"),
    ],
)
def test_bad_file(load, content, problem):
    """The service does not start, and says which line is wrong without repeating it."""
    with pytest.raises(StartupError, match=problem) as caught:
        load(content)
    assert DIGEST[:20] not in str(caught.value)


def test_unreadable_file(tmp_path):
    """Missing, a directory, or not text."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(StartupError, match="cannot be read"):
            KeyRing.load(path)


def rewrite(path, text):
    """Replaces a file's text, so that its time of change differs whatever the file system's resolution."""
    path.write_text(text)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock as the key ring reads it; it stands still until told to go on."""
    now = [1000.0]
    monkeypatch.setattr("service.rpc.keys.time.monotonic", lambda: now[0])
    return now


def test_keys_follow_their_file(tmp_path, clock):
    """A second after a change the new keys open and the old ones do not, without a restart."""
    path = tmp_path / "keys"
    path.write_text(f"{DIGEST} old\n")
    keys = KeyRing.load(path)
    new = hashlib.sha256(b"sk-new").hexdigest()
    rewrite(path, f"{new} new\n")
    clock[0] += 0.9
    assert keys.authenticate("Bearer sk-right").name == "old"
    clock[0] += 0.2
    assert keys.authenticate("Bearer sk-new").name == "new"
    with pytest.raises(AuthenticationError):
        keys.authenticate("Bearer sk-right")


@pytest.mark.parametrize("change", ["invalid", "empty", "deleted"])
def test_invalid_file_changes_nothing(tmp_path, clock, caplog, change):
    """The old keys stay, the log says why, once and without a key, and a valid file is read again."""
    path = tmp_path / "keys"
    path.write_text(f"{DIGEST} me\n")
    keys = KeyRing.load(path)
    if change == "deleted":
        path.unlink()
    else:
        rewrite(path, "" if change == "empty" else f"{DIGEST} me\n{DIGEST[:-1]} you\n")
    for _ in range(3):
        clock[0] += 1.1
        assert keys.authenticate("Bearer sk-right").name == "me"
    (record,) = caplog.records
    assert "stay as they were" in record.getMessage()
    assert DIGEST[:20] not in record.getMessage()
    rewrite(path, f"{DIGEST} again\n")
    keys.reload()
    assert keys.authenticate("Bearer sk-right").name == "again"


def test_limits_of_a_key(load):
    """A line may end with the key's own limits."""
    keys = load(f"{DIGEST} me tokens_per_minute=1000 max_sequences=4\n")
    assert keys.authenticate("Bearer sk-right").quota == Quota(1000, 4)
    assert load(f"{DIGEST} me\tmax_sequences=4\n").authenticate("Bearer sk-right").quota == Quota(None, 4)
    for wrong in ("tokens_per_minute=0", "tokens=5", "max_sequences=-1", "max_sequences=4x", "max_sequences = 4"):
        with pytest.raises(StartupError, match="line 1"):
            load(f"{DIGEST} me {wrong}\n")
