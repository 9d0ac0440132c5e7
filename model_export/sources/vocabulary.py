"""The tokenizer of a source and its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.sources.panics import reported_as
from service.manifest import LARGEST_CHAT_TEMPLATE
from service.text.decoding import Decoding
from service.text.tokenizer import token_outside

# The names of tokens that end a completion, whatever else a source declares.
END_TOKENS = (
    *("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),  # Llama 2, Gemma, GPT-2 and Qwen, Llama 3
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),  # ChatML, Llama 3, Phi-3, Gemma
    *("<|return|>", "<|call|>"),  # harmony
    *("<|flush|>", "<|calls|>"),  # Solar Open
    *("<turn|>", "<|tool_response>"),  # Gemma 4
    *("<｜end▁of▁sentence｜>", "<end_of_utterance>", "[e~["),  # DeepSeek, SmolVLM, MiniMax
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]"),  # Code Llama, Kimi K2
)
# A name that ends nothing if the vocabulary has all tokens of one of these groups: harmony, Solar Open, Gemma 4, PLaMo.
NO_ENDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "<|end|>": (
        ("<|return|>", "<|call|>"),
        ("<|return|>", "<|calls|>"),
        ("<|call|>", "<|flush|>"),
        ("<|calls|>", "<|flush|>"),
    ),
    "</s>": (("<|tool_response>",), ("<|plamo:eos|>",)),
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer and the special tokens.

    `bos` is the token that begins a text; `add_bos`: every text begins with it. `end` are the tokens that end a
    completion. `marks` are the fill-in-the-middle tokens that the source declares, by the part that each one precedes:
    `prefix`, `suffix`, `middle`. `eos` is the end token that the source names as its own, and `chat_template` the
    template of its chats, in Jinja, which is stored and never run.
    """

    tokenizer: Tokenizer
    bos: int | None
    add_bos: bool
    end: tuple[int, ...]
    marks: Mapping[str, int] = field(default_factory=dict)
    eos: int | None = None
    chat_template: str | None = None


def ends_of_generation(numbers: Mapping[str, int], declared: Iterable[int]) -> set[int]:
    """The `declared` end tokens and every token with the name of one; `numbers` are the tokens of the vocabulary."""
    ends = {numbers[name] for name in END_TOKENS if name in numbers} | set(declared)
    for name, groups in NO_ENDS.items():
        if any(all(numbers.get(sign) in ends for sign in group) for group in groups):
            ends.discard(numbers.get(name, -1))
    return ends


def check_chat_template(where: str, template: str | None) -> str | None:
    """The chat template at `where` in the source. Raises ExportError where it is too large, or no text in UTF-8."""
    try:
        size = 0 if template is None else len(template.encode())
    except UnicodeEncodeError as error:
        raise ExportError(f"{where} is no text: character {error.start} is half of a surrogate pair") from None
    if size > LARGEST_CHAT_TEMPLATE:
        raise ExportError(f"{where} has {size} bytes, expected at most {LARGEST_CHAT_TEMPLATE}")
    return template


def check_vocabulary(name: str, vocabulary: Vocabulary, vocab_size: int) -> None:
    """Raises ExportError where a token that text can become, or that begins or ends texts, is not in the vocabulary.

    `vocab_size` is that of the model.
    """
    with reported_as(f"{name}: its tokens cannot be decoded one by one"):
        Decoding(vocabulary.tokenizer, vocab_size)
    if outside := token_outside(vocabulary.tokenizer, vocab_size):
        token, index = outside
        raise ExportError(f"{name}: token {token!r} is {index}, expected one of 0..{vocab_size - 1}")
    for meaning, ids in (("begins a text", (vocabulary.bos,)), ("ends one", vocabulary.end)):
        if wrong := [index for index in ids if index is not None and not 0 <= index < vocab_size]:
            raise ExportError(f"{name}: the token that {meaning} is {wrong[0]}, expected one of 0..{vocab_size - 1}")
