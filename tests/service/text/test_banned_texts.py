"""Banned texts: exactly the tokens that would complete one are banned, whatever the vocabulary and the text before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.text.banned_texts import BannedTexts
from service.text.spellings import Spellings

# Few bytes, so that texts overlap often; the last four are two characters of UTF-8, which tokens may divide.
PIECES = st.lists(st.sampled_from([b"a", b"b", b" ", b"\xc3", b"\xa9", b"\xc2", b"\xa3"]), max_size=4).map(b"".join)
VOCABULARIES = st.lists(PIECES, min_size=1, max_size=12)
TEXTS = st.lists(st.text("ab é£", min_size=1, max_size=5), min_size=1, max_size=4)


def contains(text: bytes, banned: list[str]) -> bool:
    """Whether a text has a banned one: as bytes, and as a reader sees it, which must be the same."""
    shown = text.decode("utf-8", "replace")
    found = any(each.encode() in text for each in banned)
    assert found == any(each in shown for each in banned)
    return found


@given(VOCABULARIES, PIECES)
def test_tokens_by_their_bytes(tokens, piece):
    """All tokens that start with some bytes, and all that contain them, are found."""
    spellings = Spellings(tokens)
    assert sorted(spellings.starting_with(piece)) == [i for i, token in enumerate(tokens) if token.startswith(piece)]
    if piece:
        assert sorted(spellings.containing(piece)) == [i for i, token in enumerate(tokens) if piece in token]


@given(VOCABULARIES, TEXTS, st.lists(st.integers(0, 11), max_size=12))
def test_exactly_the_tokens_that_complete_a_banned_text(tokens, banned, choices):
    """A token is banned if and only if the text with it contains a banned one; so no text ever contains one."""
    texts = BannedTexts(banned, Spellings(tokens), ())
    text, written = b"", b""
    for choice in [*choices, 0]:
        completing = set(texts.completing(written).tolist())
        assert completing == {i for i, token in enumerate(tokens) if contains(text + token, banned)}
        left = [i for i in range(len(tokens)) if i not in completing]
        if not left:
            break
        token = tokens[left[choice % len(left)]]
        text += token
        written = (written + token)[-texts.reach :]
        assert not contains(text, banned)


def test_silent_tokens_are_not_banned():
    """They add nothing to the text, whatever their bytes."""
    spellings = Spellings([b"bad", b"<bad>", b"d"])
    texts = BannedTexts(["bad"], spellings, [1])
    assert texts.completing(b"").tolist() == [0]
    assert sorted(texts.completing(b"ba").tolist()) == [0, 2]
