"""Control tokens, prompt parts and tokenizing, over a vocabulary of letters: what each field does, and refusals."""

from __future__ import annotations

import json
import re

import pytest
from completion.v1 import completion_pb2 as pb
from google.protobuf import json_format, struct_pb2

from service.errors import InvalidRequestError
from service.rpc.parse import Limits, parse
from service.rpc.tokenizing import describe, detokenize, tokenize
from service.text.tokenizer import Tokenizer
from tests.support.fakes import BEGIN, END, LETTERS, NO_SPECIAL, VOCABULARY, ids, manifest

LIMITS = Limits(context_length=64, stops=4)
LESS, GREATER = VOCABULARY, VOCABULARY + 1
BEGINS = NO_SPECIAL.model_copy(update={"bos": BEGIN, "add_bos": True})


def made(directory, special=NO_SPECIAL):
    """A tokenizer of one token per letter, "<" and ">", whose control tokens are `<end>` and `<begin>`."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    vocabulary |= {"<end>": END, "<begin>": BEGIN, "<": LESS, ">": GREATER}
    added = [
        {"id": index, "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for index, name in ((END, "<end>"), (BEGIN, "<begin>"))
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model, "decoder": {"type": "Fuse"}}))
    return Tokenizer(path, special, VOCABULARY + 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return made(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def begins(tmp_path_factory):
    """One that puts `<begin>` before every text."""
    return made(tmp_path_factory.mktemp("begins"), BEGINS)


def value(content):
    """A JSON value as REST callers send it."""
    return json_format.Parse(json.dumps(content), struct_pb2.Value())


def completed(tokenizer, limits=LIMITS, **fields):
    """The request that a completion's fields make."""
    message = pb.CreateCompletionRequest(model="alphabet", **fields)
    described = manifest(vocab_size=VOCABULARY + 2)
    return parse(message, described, tokenizer, limits, identity="", streaming=False)


def tokens(tokenizer, limits=LIMITS, **fields):
    """The tokens of a prompt, which a completion computes too; a completion never has none."""
    answer = tokenize(pb.TokenizeRequest(**fields), tokenizer, limits)
    assert answer.count == len(answer.tokens)
    assert answer.max_model_len == limits.context_length
    if answer.tokens:
        assert list(completed(tokenizer, limits, **fields).prompts[0].token_ids) == list(answer.tokens)
    return list(answer.tokens)


def parts(*given):
    """A prompt in parts, typed; each is (kind, value)."""
    return pb.PromptParts(
        parts=[
            pb.PromptPart(**{kind: pb.Tokens(ids=content) if kind == "tokens" else content}) for kind, content in given
        ]
    )


SPELLED = [LESS, *ids("end"), GREATER]


def test_control_tokens_are_read_unless_the_request_says_otherwise(tokenizer):
    """By default, by the setting, by the field, which overrides it; null is unset."""
    off = Limits(context_length=64, stops=4, parse_special=False)
    assert tokens(tokenizer, text="a<end>b") == [0, END, 1]
    assert tokens(tokenizer, text="a<end>b", parse_special=False) == [0, *SPELLED, 1]
    assert tokens(tokenizer, off, text="a<end>b") == [0, *SPELLED, 1]
    assert tokens(tokenizer, off, text="a<end>b", parse_special=True) == [0, END, 1]
    assert tokens(tokenizer, json_prompt=value("a<end>")) == [0, END]


def test_every_text_of_a_batch_is_read_alike(tokenizer):
    """A batch of texts is."""
    prompts = completed(tokenizer, texts=pb.TextBatch(texts=["<end>", "a<begin>"])).prompts
    assert [prompt.token_ids for prompt in prompts] == [(END,), (0, BEGIN)]
    assert [prompt.text for prompt in prompts] == ["<end>", "a<begin>"]


def test_tokens_before_a_text(begins):
    """They are left out on request, and not put before a text, or parts, that begin with them."""
    assert tokens(begins, text="a") == tokens(begins, text="a", add_special_tokens=True) == [BEGIN, 0]
    assert tokens(begins, text="a", add_special_tokens=False) == [0]
    assert tokens(begins, text="<begin>a") == [BEGIN, 0]
    assert tokens(begins, parts=parts(("control", "<begin>"), ("text", "a"))) == [BEGIN, 0]
    assert tokens(begins, parts=parts(("control", "<end>"), ("text", "a"))) == [BEGIN, END, 0]
    assert tokens(begins, parts=parts(("text", "a"))) == [BEGIN, 0]
    assert tokens(begins, parts=parts(("text", "a")), add_special_tokens=False) == [0]
    assert tokens(begins, parts=parts(("tokens", [5]), ("text", "a"))) == [5, 0]


def test_empty_texts(tokenizer, begins):
    """They have no tokens but those that go before every text; a completion needs one, and gets the default."""
    assert tokens(tokenizer, text="") == tokens(tokenizer, parts=parts(("text", ""))) == []
    assert tokens(begins, text="") == [BEGIN]
    assert tokens(begins, text="", add_special_tokens=False) == []
    assert completed(tokenizer, parts=parts(("text", ""))).prompts == completed(tokenizer, text="").prompts


MIXED = [("text", "a<e"), ("text", "nd>"), ("control", "<end>"), ("tokens", [3, 4]), ("text", "<begin>")]


@pytest.mark.parametrize("form", ["typed", "json"])
def test_parts(tokenizer, form):
    """Texts stay text, also where they meet; control tokens and ids are what they are."""
    given = {"parts": parts(*MIXED)} if form == "typed" else {"json_prompt": value([{k: v} for k, v in MIXED])}
    begin = [LESS, *ids("begin"), GREATER]
    assert tokens(tokenizer, **given) == [0, *SPELLED, END, 3, 4, *begin]
    assert tokens(tokenizer, **given, parse_special=True) == [0, *SPELLED, END, 3, 4, *begin]
    assert completed(tokenizer, **given).prompts[0].text == "a<end><end>de<begin>"


def test_one_text_is_that_text(tokenizer):
    """Which is not read with its control tokens."""
    for text in ("", "a", "a<end>", "<begin>"):
        plain = completed(tokenizer, text=text, parse_special=False)
        assert completed(tokenizer, parts=parts(("text", text))).prompts == plain.prompts
        assert completed(tokenizer, json_prompt=value([{"text": text, "control": None}])).prompts == plain.prompts


def test_texts_and_offsets(tokenizer, begins):
    """They come where they are asked for, as with log probabilities; an added token has no text."""
    answer = tokenize(pb.TokenizeRequest(text="a<end>b"), tokenizer, LIMITS)
    assert (answer.WhichOneof("texts_or_null"), list(answer.offsets)) == ("no_token_strs", [])
    answer = tokenize(pb.TokenizeRequest(text="a<end>b", return_token_strs=True), begins, LIMITS)
    assert [text.text for text in answer.token_strs.values] == ["", "a", "<end>", "b"]
    assert list(answer.offsets) == [0, 0, 1, 6]
    answer = tokenize(pb.TokenizeRequest(text="", return_token_strs=True), tokenizer, LIMITS)
    assert answer.WhichOneof("texts_or_null") == "token_strs"


def test_longer_than_the_context(tokenizer):
    """A text may have more tokens than the context, and up to eight times as many characters."""
    assert len(tokenize(pb.TokenizeRequest(text="a" * 512), tokenizer, LIMITS).tokens) == 512


def test_tokens_to_text(tokenizer):
    """Control tokens show by name, and none is no text."""
    assert detokenize(pb.DetokenizeRequest(tokens=[0, END, 1]), tokenizer, LIMITS).prompt == "a<end>b"
    assert detokenize(pb.DetokenizeRequest(), tokenizer, LIMITS).prompt == ""


def test_generated_control_tokens(tokenizer):
    """They have no text unless the request asks for it; one that a stop names has its name."""
    assert completed(tokenizer, text="a").skip_special_tokens
    assert completed(tokenizer, text="a", stop=["<begin>", "b"]).control_stops == {BEGIN}
    shown = completed(tokenizer, text="a", stop=["<begin>"], skip_special_tokens=False)
    assert (shown.skip_special_tokens, shown.stop_token_ids) == (False, {END})


TOKENS_SIZE = "at most 2048 token ids, but got 2049 instead."
BOTH = {
    "part without anything": (
        {"parts": pb.PromptParts(parts=[pb.PromptPart()])},
        "prompt[0]",
        "invalid_value",
        "exactly one of",
    ),
    "no parts": ({"parts": pb.PromptParts()}, "prompt", "empty_array", "must not be empty"),
    "part without ids": (
        {"parts": parts(("text", "a"), ("tokens", []))},
        "prompt[1].tokens",
        "empty_array",
        "must not be empty",
    ),
    "no control token": (
        {"parts": parts(("control", "a"))},
        "prompt[0].control",
        "invalid_value",
        "'a' is not the name",
    ),
    "two control tokens": (
        {"parts": parts(("control", "<end><end>"))},
        "prompt[0].control",
        "invalid_value",
        "not the name",
    ),
    "id beyond": ({"parts": parts(("tokens", [30]))}, "prompt[0].tokens", "invalid_value", "Token id 30 is out of"),
    "65 parts": (
        {"parts": parts(*[("text", "")] * 65)},
        "prompt",
        "array_above_max_length",
        "at most 64 parts, but got 65",
    ),
    "long parts": ({"parts": parts(*[("text", "a" * 300)] * 2)}, "prompt", "context_length_exceeded", "600 characters"),
    "JSON: empty": ({"json_prompt": value([{}])}, "prompt[0]", "invalid_value", "exactly one of text, control, tokens"),
    "JSON: null": ({"json_prompt": value([{"text": None}])}, "prompt[0]", "invalid_value", "exactly one of"),
    "JSON: two": (
        {"json_prompt": value([{"text": "a"}, {"text": "a", "tokens": [1]}])},
        "prompt[1]",
        "invalid_value",
        "one of",
    ),
    "JSON: unknown": (
        {"json_prompt": value([{"text": "a", "x": 1}])},
        "prompt[0].x",
        "unknown_parameter",
        "supplied: prompt[0].x",
    ),
    "JSON: text 5": ({"json_prompt": value([{"text": 5}])}, "prompt[0].text", "invalid_type", "expected a string"),
    "JSON: tokens": (
        {"json_prompt": value([{"tokens": "a"}])},
        "prompt[0].tokens",
        "invalid_type",
        "an array of token ids",
    ),
    "JSON: no ids": ({"json_prompt": value([{"tokens": []}])}, "prompt[0].tokens", "empty_array", "must not be empty"),
    "JSON: half an id": (
        {"json_prompt": value([{"tokens": [1.5]}])},
        "prompt[0].tokens",
        "invalid_type",
        "expected an integer as token id",
    ),
    "JSON: mixed": ({"json_prompt": value([{"text": "a"}, "a"])}, "prompt", "invalid_type", "expected"),
    "JSON: number": ({"json_prompt": value(5)}, "prompt", "invalid_type", "expected a string"),
    "JSON: none": ({"json_prompt": value([])}, "prompt", "empty_array", "must not be empty"),
    "two prompts": ({"text": "a", "json_prompt": value("a")}, "prompt", None, "not both"),
    "long text": ({"text": "a" * 513}, "prompt", "context_length_exceeded", "513 characters, more than the 512"),
}


@pytest.mark.parametrize(("fields", "param", "code", "message"), BOTH.values(), ids=BOTH.keys())
@pytest.mark.parametrize("ask", [completed, tokens])
def test_refused(tokenizer, ask, fields, param, code, message):
    """A completion and `/tokenize` refuse the same prompts in the same words."""
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        ask(tokenizer, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


ONLY = {
    "nothing": (tokenize, pb.TokenizeRequest(), "prompt", "missing_required_parameter", "Missing required parameter"),
    "null": (tokenize, pb.TokenizeRequest(json_prompt=value(None)), "prompt", "missing_required_parameter", "Missing"),
    "texts": (
        tokenize,
        pb.TokenizeRequest(json_prompt=value(["a"])),
        "prompt",
        "invalid_type",
        "a string or an array of parts",
    ),
    "ids": (
        tokenize,
        pb.TokenizeRequest(json_prompt=value([1])),
        "prompt",
        "invalid_type",
        "a string or an array of parts",
    ),
    "many ids in parts": (
        tokenize,
        pb.TokenizeRequest(parts=parts(("tokens", [-1] * 2049))),
        "prompt",
        "array_above_max_length",
        TOKENS_SIZE,
    ),
    "many ids": (detokenize, pb.DetokenizeRequest(tokens=[-1] * 2049), "tokens", "array_above_max_length", TOKENS_SIZE),
    "an id beyond": (detokenize, pb.DetokenizeRequest(tokens=[0, 30]), "tokens", "invalid_value", "(0..29)"),
    "an id below": (detokenize, pb.DetokenizeRequest(tokens=[-1]), "tokens", "invalid_value", "Token id -1 is out of"),
}


@pytest.mark.parametrize(("method", "request_", "param", "code", "message"), ONLY.values(), ids=ONLY.keys())
def test_refused_by_its_method(tokenizer, method, request_, param, code, message):
    """Ids and texts that are too many are refused by their number, before one is looked at."""
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        method(request_, tokenizer, LIMITS)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_prompt_of_parts_fits_the_context(tokenizer):
    """With `max_tokens`, by its ids alone before anything is read, and as a whole."""
    for given in ([("tokens", [-1] * 64)], [("tokens", [1] * 24), ("text", "a" * 25)]):
        with pytest.raises(InvalidRequestError, match=re.escape("maximum context length is 64")) as caught:
            completed(tokenizer, parts=parts(*given))
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_what_a_tokenizer_is(tokenizer, begins):
    """Names where there are tokens, null where there is none."""
    described = manifest(special_tokens=BEGINS, vocab_size=VOCABULARY + 2)
    answer = describe(described, begins, LIMITS, "{{ messages }}")
    assert (answer.bos_token, answer.eos_token, answer.add_bos_token) == ("<begin>", "<end>", True)
    assert (answer.chat_template, answer.vocab_size, answer.max_model_len) == ("{{ messages }}", VOCABULARY + 2, 64)
    assert [(token.id, token.name) for token in answer.control_tokens] == [(END, "<end>"), (BEGIN, "<begin>")]
    special = NO_SPECIAL.model_copy(update={"end": ()})
    answer = describe(manifest(special_tokens=special, vocab_size=VOCABULARY + 2), tokenizer, LIMITS, None)
    named = [answer.WhichOneof(f"{name}_or_null") for name in ("bos", "eos", "template")]
    assert named == ["no_bos_token", "no_eos_token", "no_chat_template"]
    special = special.model_copy(update={"end": (BEGIN, END), "eos": END})
    answer = describe(manifest(special_tokens=special, vocab_size=VOCABULARY + 2), tokenizer, LIMITS, None)
    assert answer.eos_token == "<end>"
