"""API keys."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from service.errors import AuthenticationError, StartupError
from service.rpc.keys import Caller, KeyRing
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


@pytest.mark.parametrize("header", [None, "", "sk-right", "Bearer", "Bearer ", "Basic sk-right"])
def test_missing_key(load, header):
    """With a key file a bearer token is required; without one it is not."""
    with pytest.raises(AuthenticationError, match="didn't provide") as caught:
        load(f"{DIGEST} me\n").authenticate(header)
    assert caught.value.code == "invalid_api_key"
    assert KeyRing.load(None).authenticate(header).name == "anonymous"


@pytest.mark.parametrize("key", ["sk-wrong", "sk-righ", "sk-right1", DIGEST, "sk-right é", "ключ", "a,Bearer sk-right"])
def test_wrong_key(load, key):
    """Nearly right is wrong, and so is the digest, or what is no text of ASCII; the message does not repeat the key."""
    with pytest.raises(AuthenticationError, match="Incorrect") as caught:
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


def test_no_key_is_compared_with_another():
    """One lookup finds a key among any number, without a walk over the others."""

    class Closed(dict):
        def __iter__(self):
            raise AssertionError("walked over")

        items = keys = values = __iter__

    digest = bytes.fromhex(DIGEST)
    keys = KeyRing(Closed({digest: Caller("me", "me", DIGEST)}))
    assert keys.authenticate("Bearer sk-right").name == "me"
    with pytest.raises(AuthenticationError):
        keys.authenticate("Bearer sk-wrong")


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
        (f"{DIGEST} me most_urgent=-101\n", "line 1"),
        (f"{DIGEST} me most_urgent=101\n", "line 1"),
        (f"{DIGEST} me most_urgent=1.5\n", "line 1"),
    ],
)
def test_bad_file(load, content, problem):
    """The service does not start, and says which line is wrong without repeating it."""
    with pytest.raises(StartupError, match=problem) as caught:
        load(content)
    assert DIGEST[:20] not in str(caught.value)


def test_unreadable_file(tmp_path):
    """Missing, a directory, not text, or something that would never end."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary", tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(StartupError, match="cannot be read"):
            KeyRing.load(path)


def move_over(path, text):
    """Replaces a file by another."""
    other = path.with_name("new")
    other.write_text(text)
    other.replace(path)


def age(path, seconds):
    """Sets the time of a file's last write to this many seconds ago."""
    os.utime(path, ns=(time.time_ns(), time.time_ns() - int(seconds * 1e9)))


def opens(keys, key):
    """Whether a key opens the service."""
    try:
        keys.authenticate(f"Bearer {key}")
    except AuthenticationError:
        return False
    return True


NEW = hashlib.sha256(b"sk-new").hexdigest()


def test_keys_follow_a_file_that_is_moved_over(tmp_path):
    """The next look finds the new keys; the old ones open nothing, and it says whose they were."""
    path = tmp_path / "keys"
    path.write_text(f"{DIGEST} old\n")
    keys = KeyRing.load(path)
    assert keys.follow() == frozenset()
    move_over(path, f"{NEW} new\n")
    assert keys.follow() == {DIGEST}
    assert (opens(keys, "sk-new"), opens(keys, "sk-right")) == (True, False)


def test_keys_follow_a_link_that_is_switched(tmp_path):
    """As Kubernetes replaces the files of its secrets."""
    for name, digest in (("one", DIGEST), ("two", NEW)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"{digest} {name}\n")
    (tmp_path / "data").symlink_to("one")
    keys = KeyRing.load(tmp_path / "data" / "keys")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "data")
    assert keys.follow() == {DIGEST}
    assert opens(keys, "sk-new")


def test_a_file_that_is_being_written_is_waited_for(tmp_path):
    """A half-written key file removes no key; two seconds after the last write the whole file counts."""
    path = tmp_path / "keys"
    path.write_text(f"{NEW} new\n{DIGEST} old\n")
    keys = KeyRing.load(path)
    path.write_text(f"{NEW} new\n")
    assert keys.follow() == frozenset()
    assert opens(keys, "sk-right")
    with path.open("a") as file:
        file.write(f"{DIGEST} old\n{'0' * 64} third\n")
    age(path, 1.5)
    keys.follow()
    assert len(keys) == 2
    age(path, 2.1)
    assert keys.follow() == frozenset()
    assert len(keys) == 3
    path.write_text(f"{NEW} new\n")
    age(path, 2.1)
    assert keys.follow() == {DIGEST, "0" * 64}


@pytest.mark.parametrize("change", ["invalid", "empty", "deleted", "fifo", "folder"])
def test_invalid_file_changes_nothing(tmp_path, caplog, change):
    """The old keys stay, the log says why, once and without a key, and a valid file is read again."""
    path = tmp_path / "keys"
    path.write_text(f"{DIGEST} me\n")
    keys = KeyRing.load(path)
    if change in {"deleted", "fifo", "folder"}:
        path.unlink()
        if change != "deleted":
            (os.mkfifo if change == "fifo" else os.mkdir)(path)
            age(path, 3)  # it may have got the old file's inode
    else:
        move_over(path, "" if change == "empty" else f"{DIGEST} me\n{DIGEST[:-1]} you\n")
    for _ in range(3):
        assert keys.follow() == frozenset()
        assert keys.authenticate("Bearer sk-right").name == "me"
    (record,) = caplog.records
    assert "stay as they were" in record.getMessage()
    assert DIGEST[:20] not in record.getMessage()
    if change == "folder":
        path.rmdir()
    move_over(path, f"{DIGEST} again\n")
    keys.reload()
    assert keys.authenticate("Bearer sk-right").name == "again"


def test_limits_of_a_key(load):
    """A line may end with the key's own limits."""
    keys = load(f"{DIGEST} me tokens_per_minute=1000 max_sequences=4 requests_per_minute=7\n")
    assert keys.authenticate("Bearer sk-right").quota == Quota(1000, 4, 7)
    assert load(f"{DIGEST} me\tmax_sequences=4\n").authenticate("Bearer sk-right").quota == Quota(None, 4)
    for wrong in ("tokens_per_minute=0", "tokens=5", "max_sequences=-1", "max_sequences=4x", "max_sequences = 4"):
        with pytest.raises(StartupError, match="line 1"):
            load(f"{DIGEST} me {wrong}\n")


def test_keys_of_one_name_are_one_caller(load):
    """With the limits of their own lines; a removed one is told by its digest."""
    other = hashlib.sha256(b"sk-other").hexdigest()
    keys = load(f"{DIGEST} team most_urgent=-5\n{other} team most_urgent=10 max_sequences=3\n{'0' * 64} rest\n")
    one, two = keys.authenticate("Bearer sk-right"), keys.authenticate("Bearer sk-other")
    assert one.identity == two.identity
    assert (one.key, two.key) == (DIGEST, other)
    assert (one.most_urgent, two.most_urgent, two.quota.max_sequences) == (-5, 10, 3)
