"""Committer: from logits to what the caller gets to see."""

from __future__ import annotations

import math

import numpy as np
import pytest

from service.engine.commit import Committer
from service.engine.generation import Generation
from service.engine.sequence import PromptGroup, Sequence
from service.errors import EngineFaultError
from service.text.banned_texts import BannedTexts
from service.text.transcript import Transcript
from service.types import FinishReason, Prompt, SamplingParams
from tests.support.fakes import BEGIN, END, LETTERS, VOCABULARY, ids, request


def sequence(made, prompt_index=0, candidate=0):
    prompt = made.prompts[prompt_index]
    transcript = Transcript(made.stop, len(prompt.text), prompt.tail, include_stop=made.include_stop)
    group = PromptGroup(prompt, unstarted=made.best_of)
    generation = Generation(made.best_of, lambda _: None)
    return Sequence(made, generation, group, prompt_index, candidate, transcript, list(prompt.token_ids))


def peak(token, height=4.0):
    """Logits of which `token` is the likeliest."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token] = height
    return logits


def generate(committer, made, tokens, **which):
    """The pieces of a sequence that is made to choose `tokens`."""
    one = sequence(made, **which)
    return one, [committer.advance(one, peak(token)) for token in tokens]


@pytest.fixture(scope="module")
def committer(letters):
    return Committer(letters)


def test_ends_at_max_tokens(committer):
    """The last token is shown together with the reason."""
    _, deltas = generate(committer, request("a", max_tokens=2), ids("xy"))
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("x", None), ("y", FinishReason.LENGTH)]
    assert deltas[-1].completion_tokens == 2


def test_end_token_is_neither_shown_nor_counted(committer):
    """Nor scored."""
    one, deltas = generate(committer, request("a", logprobs=0), [*ids("x"), END])
    assert (deltas[1].text, deltas[1].tokens, deltas[1].finish_reason) == ("", (), FinishReason.STOP)
    assert deltas[1].completion_tokens == 1
    assert one.counts == {ids("x")[0]: 1}


def test_end_token_shows_what_was_held_back(committer):
    """Text that might have begun a stop text is shown when the end comes instead."""
    _, deltas = generate(committer, request("a", stop=("xyz",), max_tokens=9, logprobs=0), [*ids("xy"), END])
    assert deltas[:2] == [None, None]
    assert deltas[2].text == "xy"
    assert [token.text for token in deltas[2].tokens] == ["x", "y"]
    assert deltas[2].completion_tokens == 2


def test_stop_text_is_neither_shown_nor_counted_nor_scored(committer):
    """The choice ends right before it."""
    _, deltas = generate(committer, request("a", stop=("yz",), max_tokens=9, logprobs=2), ids("xyz"))
    assert [delta and delta.text for delta in deltas] == ["x", None, ""]
    assert deltas[2].finish_reason is FinishReason.STOP
    assert deltas[2].completion_tokens == 1
    assert deltas[2].tokens == ()


def test_max_tokens_shows_what_was_held_back(committer):
    """A stop text that does not come whole is text."""
    _, deltas = generate(committer, request("a", stop=("yz",), max_tokens=2), ids("xy"))
    assert (deltas[1].text, deltas[1].finish_reason) == ("y", FinishReason.LENGTH)


def test_stop_text_wins_over_max_tokens(committer):
    """When the last token completes a stop text, the reason is that."""
    _, deltas = generate(committer, request("a", stop=("xy",), max_tokens=2), ids("xy"))
    assert (deltas[1].text, deltas[1].finish_reason) == ("", FinishReason.STOP)


def test_min_tokens_bans_end_tokens(committer):
    """Until then the likeliest other token is chosen."""
    made = request("a", min_tokens=2, max_tokens=5)
    _, deltas = generate(committer, made, [END, END, END])
    assert [delta.text for delta in deltas] == ["a", "a", ""]
    assert deltas[2].finish_reason is FinishReason.STOP


def test_ignored_end_token_is_a_token_like_others(committer):
    """A request without stop tokens goes on, and shows it."""
    _, deltas = generate(committer, request("a", stop_token_ids=frozenset()), [END, *ids("x")])
    assert [delta.text for delta in deltas] == ["<end>", "x"]


def test_scores_are_the_models_own(committer):
    """Before temperature, penalties and bias; the chosen token is among them with the same float."""
    sampling = SamplingParams(temperature=0, logit_bias={3: 100})
    _, deltas = generate(committer, request("a", sampling=sampling, logprobs=2), ids("x"))
    (token,) = deltas[0].tokens
    normalizer = math.log(math.exp(4) + VOCABULARY - 1)
    assert token.text == "d"
    assert token.logprob == pytest.approx(-normalizer, abs=1e-6)
    assert [text for text, _ in token.top] == ["x", "d", "a"]
    assert dict(token.top)["d"] == token.logprob
    assert dict(token.top)["x"] == pytest.approx(4 - normalizer, abs=1e-6)


def test_offsets_count_from_the_start_of_the_prompt(committer):
    """Also without echo."""
    _, deltas = generate(committer, request("abc", logprobs=0), ids("xy"))
    assert [token.offset for delta in deltas for token in delta.tokens] == [3, 4]


def test_a_cut_token_is_scored_under_the_text_that_is_left(committer):
    """The text of a stop does not come back through the alternatives."""
    made = request("a", stop=("end",), stop_token_ids=frozenset(), logprobs=1, max_tokens=9)
    _, deltas = generate(committer, made, [END])
    (token,) = deltas[0].tokens
    assert token.text == "<"
    assert token.top == (("<", token.logprob),)


def test_prompt_scores(committer):
    """Each prompt token is scored by the logits before it; the first has none, nor has a token without text a text."""
    made = request(Prompt((BEGIN, *ids("ab")), "ab", implied=1), echo=True, logprobs=1, max_tokens=0)
    one = sequence(made)
    committer.score_prompt(one, np.stack([peak(0)]), 1)
    assert one.needs_prompt_scores
    committer.score_prompt(one, np.stack([peak(7), peak(9)]), 2)
    assert not one.needs_prompt_scores
    delta = committer.begin(one)
    assert delta.text == "ab"
    assert delta.finish_reason is FinishReason.LENGTH
    first, second, third = delta.tokens
    assert (first.text, first.offset, first.logprob, first.top) == ("", 0, None, None)
    assert (second.text, second.offset, [text for text, _ in second.top]) == ("a", 0, ["a"])
    assert (third.text, third.offset, [text for text, _ in third.top]) == ("b", 1, ["h", "b"])


def test_nothing_is_shown_before_the_first_token_without_echo(committer):
    """Unless nothing is to be generated."""
    assert committer.begin(sequence(request("a"))) is None
    assert committer.begin(sequence(request("a", max_tokens=0))).finish_reason is FinishReason.LENGTH
    assert committer.begin(sequence(request("ab", echo=True))).text == "ab"


def test_rank_is_the_mean_over_all_generated_tokens(committer):
    """The end token counts: it was chosen too."""
    made = request("a", best_of=2, max_tokens=9)
    one, deltas = generate(committer, made, [*ids("x"), END])
    assert deltas[-1].mean_logprob == pytest.approx(4 - math.log(math.exp(4) + VOCABULARY - 1), abs=1e-6)
    assert deltas[0].tokens == ()
    assert not one.unshown


def test_equal_prompts_of_a_batch_draw_their_own(committer):
    """Random numbers differ between the choices of a request, also between those of equal prompts."""
    made = request("a", "a", n=2, max_tokens=9, sampling=SamplingParams(seed=1))
    texts = []
    for prompt_index in (0, 1):
        for candidate in (0, 1):
            one = sequence(made, prompt_index, candidate)
            texts.append("".join(committer.advance(one, np.zeros(26, np.float32)).text for _ in range(8)))
    assert len(set(texts)) == 4


def test_seeded_choice_does_not_depend_on_history(committer):
    """A position's random number depends only on seed, choice and position."""
    made = request("a", max_tokens=50, sampling=SamplingParams(seed=-5))
    one, other = sequence(made), sequence(made)
    committer.advance(one, peak(1))
    committer.advance(other, peak(2))
    flat = np.zeros(26, np.float32)
    assert committer.advance(one, flat).text == committer.advance(other, flat).text
    assert committer.advance(one, flat).text in LETTERS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_a_fault(committer, bad, temperature):
    """One is enough, whatever would have been chosen: neither sampling nor scoring goes on with it."""
    logits = peak(3)
    logits[7] = bad
    one = sequence(request("ab", sampling=SamplingParams(temperature=temperature), echo=True, logprobs=1))
    with pytest.raises(EngineFaultError):
        committer.advance(one, logits)
    with pytest.raises(EngineFaultError):
        committer.score_prompt(one, logits[None], 1)


def test_all_logits_impossible_is_a_fault(committer):
    """There is nothing to choose from."""
    with pytest.raises(EngineFaultError):
        committer.advance(sequence(request("a")), np.full(VOCABULARY, -np.inf, np.float32))


def test_stop_text_may_stay(committer):
    """With its tokens counted and scored; what a token has after it does not."""
    made = request("a", stop=("yz",), include_stop=True, max_tokens=9, logprobs=0, return_token_ids=True)
    _, deltas = generate(committer, made, ids("xyz"))
    assert [delta and delta.text for delta in deltas] == ["x", None, "yz"]
    assert (deltas[2].completion_tokens, deltas[2].stop, deltas[2].token_ids) == (3, "yz", tuple(ids("yz")))
    assert [token.text for token in deltas[2].tokens] == ["y", "z"]


def test_ids_come_with_their_text(committer):
    """Held back with it, without scores; an end token is the reason, and none of the ids."""
    made = request("a", stop=("xyz",), max_tokens=9, return_token_ids=True)
    _, deltas = generate(committer, made, [*ids("wxy"), END])
    assert [delta and (delta.text, delta.token_ids) for delta in deltas] == [
        ("w", tuple(ids("w"))),
        None,
        None,
        ("xy", tuple(ids("xy"))),
    ]
    assert deltas[3].stop == END
    assert all(not delta.tokens for delta in deltas if delta)


def test_only_allowed_tokens(committer):
    """Of them the likeliest, whatever else is likelier."""
    made = request("a", allowed_token_ids=tuple(ids("qr")), max_tokens=2)
    one = sequence(made)
    assert committer.advance(one, peak(3) + peak(ids("r")[0], 1.0)).text == "r"
    assert committer.advance(one, peak(3) + peak(ids("q")[0], 1.0)).text == "q"


def test_banned_texts_across_tokens(committer, letters):
    """The letter that would complete one is never chosen, the same letter elsewhere is."""
    banned = BannedTexts(["bad"], letters.spellings, {END})
    _, deltas = generate(committer, request("a", banned_texts=banned, max_tokens=9), ids("dbadbad"))
    # Where "d" is banned the likeliest is "a", the first of many that are equally likely.
    assert "".join(delta.text for delta in deltas) == "dbaabaa"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "rules",
    [
        {"allowed_token_ids": tuple(ids("x")), "banned": ["x"]},
        {"banned": [*LETTERS, "<begin>", "<end>"], "stop_token_ids": frozenset()},
        {"allowed_token_ids": (END,), "min_tokens": 1},
    ],
)
def test_no_token_left_ends_the_choice(committer, letters, rules, temperature):
    """As an end token does, with what was held back; it is no fault of the model, and there is no stop reason."""
    changes = {name: value for name, value in rules.items() if name != "banned"}
    if "banned" in rules:
        changes["banned_texts"] = BannedTexts(rules["banned"], letters.spellings, ())
    made = request("a", max_tokens=9, sampling=SamplingParams(temperature=temperature, top_p=0.9), **changes)
    delta = committer.advance(sequence(made), peak(3))
    assert (delta.text, delta.finish_reason, delta.stop) == ("", FinishReason.STOP, None)
    assert delta.completion_tokens == 0


def test_scores_of_chosen_ids(committer):
    """At each position, in the order of the request, beside the likeliest."""
    made = request("ab", logprobs=1, scored_token_ids=(5, 23), echo=True)
    one = sequence(made)
    committer.score_prompt(one, np.stack([peak(5)]), 1)
    normalizer = math.log(math.exp(4) + VOCABULARY - 1)
    assert one.group.scores[0].by_id == ()
    assert one.group.scores[1].by_id == pytest.approx((4 - normalizer, -normalizer), abs=1e-6)
    (token,) = committer.advance(one, peak(23)).tokens
    assert token.by_id == pytest.approx((-normalizer, 4 - normalizer), abs=1e-6)
    assert token.by_id[1] == token.logprob


def test_prompt_scores_from_a_position_on(committer):
    """Rows of earlier tokens are not looked at; if none is wanted, no row is needed."""
    one = sequence(request("abcd", echo=True, logprobs=0, logprobs_from=3, max_tokens=0))
    committer.score_prompt(one, np.full((1, VOCABULARY), np.nan, np.float32), 1)
    committer.score_prompt(one, np.stack([np.full(VOCABULARY, np.nan, np.float32), peak(3)]), 2)
    assert [token.logprob is None for token in committer.begin(one).tokens] == [True, True, True, False]
    one = sequence(request("abcd", echo=True, logprobs=0, logprobs_from=4, max_tokens=0))
    assert not one.needs_prompt_scores
    assert [token.logprob for token in committer.begin(one).tokens] == [None] * 4


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_control_token_that_is_a_stop_text(committer, skip, include):
    """It ends the choice by its name, also where control tokens have no text, and stays where stop texts do."""
    made = request(
        "a",
        stop=("<begin>",),
        control_stops=frozenset({BEGIN}),
        skip_special_tokens=skip,
        include_stop=include,
        max_tokens=9,
    )
    _, deltas = generate(committer, made, [*ids("x"), BEGIN])
    assert "".join(delta.text for delta in deltas if delta) == ("x<begin>" if include else "x")
    assert (deltas[-1].finish_reason, deltas[-1].stop) == (FinishReason.STOP, "<begin>")
    assert deltas[-1].completion_tokens == 1 + include
