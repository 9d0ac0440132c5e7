"""Vocabularies of GGUF files, and tiny models that have them, which llama.cpp and the exporter both can load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

NORMAL, UNKNOWN, CONTROL = TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL
USER_DEFINED, UNUSED, BYTE = TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.BYTE
WIDTH = 32


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file with their types, and the keys of its tokenizer; `merges` of a byte-level one."""

    tokens: Mapping[str, int]
    keys: Mapping[str, int | str | bool] = field(default_factory=dict)
    merges: Sequence[str] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Writes a model of one layer with this vocabulary, all weights zero."""
        writer = GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_head_count(1)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(WIDTH)
        writer.add_context_length(64)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(WIDTH)
        writer.add_tokenizer_model("llama" if self.merges is None else "gpt2")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.tokens.values()))
        if self.merges is None:
            writer.add_token_scores([self.scores.get(token, 0.0) for token in self.tokens])
        else:
            writer.add_token_merges(list(self.merges))
        for key, value in self.keys.items():
            add = {int: writer.add_uint32, str: writer.add_string, bool: writer.add_bool}[type(value)]
            add(f"tokenizer.ggml.{key}", value)
        square, vector = np.zeros((WIDTH, WIDTH), np.float32), np.zeros(WIDTH, np.float32)
        writer.add_tensor("token_embd.weight", np.zeros((len(self.tokens), WIDTH), np.float32))
        writer.add_tensor("output_norm.weight", vector)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.0.{name}.weight", vector)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{name}.weight", square)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


# GPT-2's characters for bytes: those that are printable stand for themselves.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SPELLED = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(0x100 + at) for at, byte in enumerate(OTHERS)}

TEXTS = [
    "Hello World, it's 1234567 o'clock!",
    "HELLO world's I'LL you'Re",
    "  def f(x):\n\treturn x**2  # 42\n\n\nprint(f(10))  ",
    "a  b   c    d\t\te",
    "x = 3.14159; y=1e-10",
    "foo_bar.baz-qux/quux|corge",
    "What?!...\r\n\r\nReally... (yes) [no] {maybe}",
    "日本語のテキスト、中文字符。한국어",
    "Привет мир, как дела?",
    "naïve café déjà-vu",
    "price: $1,234.56 + 10% = ~€1.358",
    "١٢٣ ½ Ⅷ 12³",
    "🚢🚢 👩 x🎉y",
    "\n \n  \nz",
    "end of line \nnext\n",
    "'tis 'twas ''' \"quoted\" `code`",
    "CamelCaseWord XMLHttpRequest iPhone",
    "<b>bold</b> a<c a<=b ^x $y",
    "word1word 2nd 3rd4",
    " leading and trailing ",
    "#include(foo) .method() -flag @user",
    "中文abc テスト12 ひらがなカタカナ",
    "e\u0301te\u0301 हिन्दी ไทย",
    "don't l'été 'Ne 'Da",
    "-- \n!!\n\n??\n",
]


def merged(texts: Sequence[str], count: int) -> list[tuple[str, str]]:
    """The `count` commonest pairs of the texts' bytes, one after the other, also across words, lines and digits."""
    pieces = [[SPELLED[byte] for byte in text.encode()] for text in texts]
    made = []
    for _ in range(count):
        numbers: dict[tuple[str, str], int] = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                numbers[pair] = numbers.get(pair, 0) + 1
        if not numbers:
            break
        best = max(numbers, key=lambda pair: (numbers[pair], pair))
        made.append(best)
        for piece in pieces:
            at = 0
            while at < len(piece) - 1:
                if (piece[at], piece[at + 1]) == best:
                    piece[at : at + 2] = ["".join(best)]
                at += 1
    return made


MERGES = merged(TEXTS, 600)
BYTE_LEVEL = {
    "<s>": CONTROL,
    "</s>": CONTROL,
    **dict.fromkeys(SPELLED.values(), NORMAL),
    **dict.fromkeys(map("".join, MERGES), NORMAL),
}
LINES = [" ".join(pair) for pair in MERGES]
IDS = {"bos_token_id": 0, "eos_token_id": 1}


def byte_level(tokens: Mapping[str, int] | None = None, **keys: int | str | bool) -> Vocabulary:
    """GPT-2's kind of vocabulary, with further tokens."""
    return Vocabulary({**BYTE_LEVEL, **(tokens or {})}, {"pre": "gpt-2", **IDS, **keys}, LINES)


PIECES = ["▁", "a", "b", "s", ">", "▁a", "ab", "s>", "▁▁", "/s", "é", "th", "▁th", "▁the", "e", "t", "h", "bs"]
SENTENCE_PIECE = {
    "<unk>": UNKNOWN,
    "<s>": CONTROL,
    "</s>": CONTROL,
    **{f"<0x{byte:02X}>": BYTE for byte in range(256)},
    **dict.fromkeys(PIECES, NORMAL),
}
SCORES = {piece: -float(index) for index, piece in enumerate(PIECES)}


def sentence_piece(tokens: Mapping[str, int] | None = None, **keys: int | str | bool) -> Vocabulary:
    """Llama's kind of vocabulary, with further tokens."""
    return Vocabulary({**SENTENCE_PIECE, **(tokens or {})}, keys, None, SCORES)


FIRST = len(BYTE_LEVEL)
# What is in the vocabulary beside its tokens of text.
ENDS: dict[str, Vocabulary] = {
    "only eos": byte_level(),
    "<end_of_turn>, without a key": byte_level({"<end_of_turn>": CONTROL}),
    "<|im_end|> as text": byte_level({"<|im_end|>": NORMAL}),
    "<|eot_id|> and <|eom_id|>": byte_level({"<|eot_id|>": CONTROL, "<|eom_id|>": USER_DEFINED}),
    "DeepSeek": byte_level({"<｜begin▁of▁sentence｜>": CONTROL, "<｜end▁of▁sentence｜>": NORMAL}),
    "<end_of_utterance>": byte_level({"<end_of_utterance>": CONTROL}),
    "[EOT] and [EOS]": byte_level({"[EOT]": NORMAL, "[EOS]": CONTROL}),
    "<eos>": byte_level({"<eos>": CONTROL}),
    "Phi-3": byte_level({"<|end|>": CONTROL, "<|user|>": CONTROL}),
    "harmony": byte_level({"<|start|>": CONTROL, "<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}),
    "eot and eom by key": byte_level({"<x>": CONTROL, "<y>": CONTROL}, eot_token_id=FIRST, eom_token_id=FIRST + 1),
    "fim_pad by name": byte_level({"<|fim_pad|>": CONTROL, "<|file_sep|>": NORMAL, "<|repo_name|>": CONTROL}),
    "fim_pad by key": byte_level({"<|fim_pad|>": NORMAL, "<z>": CONTROL}, fim_pad_token_id=FIRST + 1),
    "GPT-2's end beside others": byte_level({"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL}),
    "Gemma 4": byte_level({"<|tool_response>": CONTROL, "<turn|>": CONTROL}),
    "no end of anything by name": byte_level({"<|eot|>": CONTROL, "[/INST]": CONTROL, "<|im_sep|>": CONTROL}),
    "SentencePiece, without keys": sentence_piece(),
    "SentencePiece, <end_of_turn>": sentence_piece({"<start_of_turn>": CONTROL, "<end_of_turn>": CONTROL}),
    "SentencePiece, eos by key": sentence_piece({"<|im_end|>": USER_DEFINED}, eos_token_id=len(SENTENCE_PIECE)),
}
DECODED: dict[str, Vocabulary] = {
    "byte-level": byte_level(
        {
            "<|im_end|>": CONTROL,
            "    ": USER_DEFINED,
            "<｜x▁y｜>": CONTROL,
            "ção": USER_DEFINED,
            "日本": USER_DEFINED,
            "[PAD9]": UNUSED,
            "\n\n": USER_DEFINED,
        }
    ),
    "SentencePiece": sentence_piece(
        {
            "  ": USER_DEFINED,
            "    ": USER_DEFINED,
            "\n\n": USER_DEFINED,
            "<|im_end|>": CONTROL,
            "日本": USER_DEFINED,
            "<unused1>": UNUSED,
            "▁de": NORMAL,
        }
    ),
    "SentencePiece without a space before": sentence_piece({"   ": USER_DEFINED}, add_space_prefix=False),
}
