"""Parsing: whatever comes in."""

from __future__ import annotations

from completion.v1 import completion_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.rpc.parse import Limits, parse
from tests.support.fakes import manifest

LIMITS = Limits(context_length=64, stops=4)
FLOATS = st.floats(width=32)
INTEGERS = st.integers(-(2**31), 2**31 - 1)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"), FLOATS),
            **dict.fromkeys(("max_tokens", "n", "best_of", "logprobs", "top_k", "min_tokens"), INTEGERS),
            "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6),
            "logit_bias": st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), FLOATS),
            "tokens": st.lists(INTEGERS, max_size=4).map(lambda tokens: pb.Tokens(ids=tokens)),
            "stop_token_ids": st.lists(INTEGERS, max_size=4),
            "user": st.text(st.characters(exclude_categories=["Cs"])),
        },
    ),
    st.booleans(),
)
def test_anything_is_parsed_or_refused(letters, fields, streaming):
    """Any message becomes a request within its bounds or an error that names a field."""
    message = pb.CreateCompletionRequest(model="alphabet", **fields)
    try:
        request = parse(message, manifest(), letters, LIMITS, identity="", streaming=streaming)
    except InvalidRequestError as error:
        assert error.param and len(error.message) < 1000  # noqa: PT017, PT018, either outcome is right
        return
    assert 1 <= request.n <= request.best_of
    assert len(request.prompts) * request.best_of <= 128
    assert all(len(prompt.token_ids) + request.max_tokens <= 64 for prompt in request.prompts)
    assert 0 <= request.sampling.temperature <= 2
    assert 0 < request.sampling.repetition_penalty <= 2
