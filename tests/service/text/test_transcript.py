"""Transcript: pieces of text that nothing takes back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.text.transcript import Piece, Transcript

TEXTS = st.text(alphabet="ab€👩‍💻é", max_size=24)
STOPS = st.lists(st.text(alphabet="ab€👩‍", min_size=1, max_size=5), max_size=4)
FAMILY = "👩‍👩‍👧"


def run(tokens: list[bytes], stops: list[str] | None = None, start: int = 0, tail: bytes = b"") -> list[Piece]:
    """The pieces of a whole sequence, which ends with its tokens or with a stop text."""
    transcript = Transcript(stops or [], start, tail)
    pieces = []
    for token in tokens:
        pieces.append(transcript.push(token))
        if pieces[-1].stopped:
            return pieces
    return [*pieces, transcript.finish()]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: list[Piece]) -> list[tuple[str, int]]:
    return [token for piece in pieces for token in piece.tokens]


def cut(data: bytes, bounds: list[int]) -> list[bytes]:
    """The data in parts, at `bounds` folded into its length."""
    places = sorted({0, len(data), *(bound % (len(data) + 1) for bound in bounds)})
    return [data[a:b] for a, b in pairwise(places)]


def before_stop(text: str, stops: list[str]) -> str:
    """The text before the stop text that is complete first, read character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXTS, STOPS, st.lists(st.integers(0, 200)))
def test_pieces_join_to_the_text_before_the_first_stop(text, stops, bounds):
    """However the bytes are cut into tokens, the text is the same and ends before the stop text completed first."""
    assert text_of(run(cut(text.encode(), bounds), stops)) == before_stop(text, stops)


@given(TEXTS, STOPS, st.lists(st.integers(0, 200)))
def test_shown_text_never_begins_a_stop(text, stops, bounds):
    """At no time do the pieces shown so far hold text that belongs to a stop text found later."""
    allowed = before_stop(text, stops)
    shown = ""
    for piece in run(cut(text.encode(), bounds), stops):
        shown += piece.text
        assert allowed.startswith(shown)


@given(TEXTS, st.lists(st.integers(0, 200)), st.integers(0, 9))
def test_tokens_join_to_the_text_and_start_where_they_say(text, bounds, start):
    """Every token is reported once, in order, at the character that its first byte belongs to."""
    parts = cut(text.encode(), bounds)
    at_byte = [index for index, character in enumerate(text) for _ in character.encode()]
    position, expected = 0, []
    for part in parts:
        try:
            name = part.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
        expected.append((name, start + at_byte[position]))
        position += len(part)
    assert tokens_of(run(parts, start=start)) == expected


@given(st.lists(st.sampled_from([b"a", b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x80b", b"\xff", b""]), max_size=12))
def test_any_bytes_decode_as_a_whole(parts):
    """Bytes that are not UTF-8 come out as in one decoding of all of them, less an unfinished character."""
    whole = b"".join(parts)
    pieces = run(parts)
    text, tokens = text_of(pieces), tokens_of(pieces)
    kept = whole.decode("utf-8", "replace")
    assert text in (kept, kept[:-1])
    assert len(tokens) == len(parts)
    assert [offset for _, offset in tokens] == sorted(offset for _, offset in tokens)


def test_stop_that_spans_tokens():
    """Text that may begin a stop text waits until it is known."""
    assert run([b"x", b"E", b"N", b"D", b"y"], ["END"]) == [
        Piece("x", (("x", 0),)),
        Piece("", ()),
        Piece("", ()),
        Piece("", (), stopped=True),
    ]


def test_held_text_is_shown_when_it_turns_out_harmless():
    """A false beginning of a stop text comes out whole, token by token."""
    pieces = run([b"E", b"N", b"x"], ["END"])
    assert pieces[2] == Piece("ENx", (("E", 0), ("N", 1), ("x", 2)))


def test_stop_that_begins_within_a_false_beginning():
    """Of "aab" after a false "aa" only what can no longer be a stop text is shown."""
    pieces = run([b"a", b"a", b"a", b"b", b"c"], ["aab"])
    assert text_of(pieces) == "a"
    assert pieces[2] == Piece("a", (("a", 0),))


@pytest.mark.parametrize("parts", [[b"abcd"], [b"abc", b"d"], [b"a", b"b", b"c", b"d"]])
def test_of_overlapping_stops_the_first_completed_counts(parts):
    """With "bc" and "abcd" a text "abcd" ends before "bc", whether it comes as one token or as many."""
    assert text_of(run(parts, ["abcd", "bc"])) == "a"


def test_of_stops_completed_together_the_longest_counts():
    """If two stop texts end at the same character, the longer one counts."""
    assert text_of(run([b"x", b"abc"], ["c", "abc"])) == "x"


def test_stop_equal_to_the_first_token():
    """Nothing is shown: no text, no token."""
    assert run([b"\n"], ["\n"]) == [Piece("", (), stopped=True)]


def test_stop_within_a_token_cuts_it():
    """A token that a stop text cuts is shown with what is left of it."""
    assert run([b"one", b" two.\n\nmore"], ["\n\n"])[-1] == Piece(" two.", ((" two.", 3),), stopped=True)


def test_stop_right_after_a_character_of_several_tokens():
    """The tokens of the character before a stop text are kept, that of the stop text is not."""
    pieces = run([b"\xe2", b"\x82", b"\xac", b"!"], ["!"])
    assert text_of(pieces) == "€"
    assert tokens_of(pieces) == [("bytes:\\xe2", 0), ("bytes:\\x82", 0), ("bytes:\\xac", 0)]


def test_stop_made_of_split_characters():
    """A stop text is found where its characters are split over tokens."""
    assert text_of(run([b"a\xe2", b"\x82", b"\xacb"], ["€"])) == "a"


def test_emoji_of_many_code_points():
    """Joined emoji come code point by code point, each as soon as it is whole."""
    pieces = run([bytes([byte]) for byte in FAMILY.encode()])
    assert [piece.text for piece in pieces if piece.text] == list(FAMILY)


def test_token_after_a_broken_character_starts_behind_it():
    """An unfinished character that the next token does not go on with becomes one U+FFFD of its own token."""
    pieces = run([b"\xe2\x82", b"A"], ["A"])
    assert text_of(pieces) == "\N{REPLACEMENT CHARACTER}"
    assert tokens_of(pieces) == [("bytes:\\xe2\\x82", 0)]


def test_unfinished_character_at_the_end_is_dropped():
    """Its token is reported; its text is not."""
    pieces = run([b"ok", b"\xf0\x9f"])
    assert text_of(pieces) == "ok"
    assert tokens_of(pieces) == [("ok", 0), ("bytes:\\xf0\\x9f", 2)]


def test_completion_finishes_the_prompts_last_character():
    """The bytes that the prompt left unfinished and the first tokens make one character, of the completion."""
    pieces = run([b"\xac", b"x"], start=5, tail=b"\xe2\x82")
    assert text_of(pieces) == "€x"
    assert tokens_of(pieces) == [("bytes:\\xac", 5), ("x", 6)]


def test_tail_that_is_never_finished():
    """Without a completion the prompt's unfinished character shows nothing."""
    assert text_of(run([], start=5, tail=b"\xe2\x82")) == ""


def test_token_without_bytes():
    """A token without bytes is reported with empty text."""
    assert tokens_of(run([b"a", b"", b"b"])) == [("a", 0), ("", 1), ("b", 1)]
