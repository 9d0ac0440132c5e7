"""How byte-level vocabularies of GGUF files cut a text before they merge bytes, by `tokenizer.ggml.pre`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers import Regex, pre_tokenizers

from model_export.errors import ExportError

KEY = "tokenizer.ggml.pre"

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
CHINESE_AND_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
CHINESE_TO_KOREAN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
ASCII_MARK = r"[!-/:-@\[-`{-~]"
# The letters that deepseek-llm's tokenizer takes for words, as code points.
DEEPSEEK_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943 "
)


def _words(
    digits: str, *, letters: str = r"\p{L}", contractions: str = f"{CONTRACTIONS}|", line_ends: str = r"[\r\n]*"
) -> str:
    """A pattern of contractions, words, groups of digits, punctuation with the `line_ends` after it, and spaces."""
    marks = letters.removeprefix("[").removesuffix("]")
    words = rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letters}+"
    return rf"{words}|\p{{N}}{digits}| ?[^\s{marks}\p{{N}}]+{line_ends}|{SPACES}"


def _cased_words(digits: str, contractions: str = "") -> str:
    """A pattern of words, each capital beginning a new one, with `contractions`, groups of `digits`, and the rest."""
    before = r"[^\r\n\p{L}\p{N}]?"
    small, capital = f"{before}{UPPER}*{LOWER}+{contractions}", f"{before}{UPPER}+{LOWER}*{contractions}"
    return rf"{small}|{capital}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


def _code_points(ranges: str) -> str:
    """A class of the characters in `ranges` of hexadecimal code points."""
    parts = ("-".join(rf"\x{{{end}}}" for end in part.split("-")) for part in ranges.split())
    return f"[{''.join(parts)}]"


@dataclass(frozen=True)
class PreTokenizer:
    """Each of `splits` cuts what those before it have left in one piece; the pieces between its matches stay too.

    `whole_words`: a piece that is a token is not merged from its bytes. `begins`: texts begin with the
    beginning-of-sequence token unless the file says otherwise.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


LLAMA3, QWEN2 = _words("{1,3}"), _words("")
DEEPSEEK3 = rf"{ASCII_MARK}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
_as_gpt2, _as_smollm = partial(PreTokenizer, (GPT2,)), partial(PreTokenizer, (DIGIT, GPT2))

# The names that share a way to cut.
_BY_WAY: Sequence[tuple[str, PreTokenizer]] = (
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizer((LLAMA3,), whole_words=True, begins=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((LLAMA3,))),
    ("glm4 glm5", PreTokenizer((LLAMA3,), whole_words=True)),
    ("minicpm5", PreTokenizer((THREE_DIGITS, _words("+")), whole_words=True)),
    (
        "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
        "modern-bert mpt olmo jais trillion granite-docling exaone4",
        _as_gpt2(),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _as_smollm()),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizer((QWEN2,)),
    ),
    ("laguna", PreTokenizer((r"[^\n]+|[\n]+", QWEN2))),
    ("qwen35", PreTokenizer((_words("", letters=r"[\p{L}\p{M}]"),))),
    ("ufakzeka", PreTokenizer((_words("", contractions=""),))),
    ("seed-coder", PreTokenizer((_words("", line_ends=""),))),
    ("tekken", PreTokenizer((_cased_words(""),), whole_words=True, begins=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizer((_cased_words("{1,3}", f"{CONTRACTIONS}?"),))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreTokenizer((THREE_DIGITS, CHINESE_AND_KANA, DEEPSEEK3))),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE_TO_KOREAN, DIGIT))),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?{_code_points(DEEPSEEK_LETTERS)}+",
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
                r"\s+$",
                CHINESE_TO_KOREAN,
                r"\p{N}+",
            )
        ),
    ),
    ("falcon", PreTokenizer((r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"))),
    ("default", PreTokenizer((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: way for names, way in _BY_WAY for name in names.split()}

# Where a file does not say how it cuts texts, tokens that only one family has at these ids.
TOLD_BY_TOKENS: Mapping[str, Mapping[int, str]] = {
    "llama-bpe": {128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128009: "<|eot_id|>"},
    "qwen2": {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
    "tekken": {1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 131071: ""},
    "smollm": {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 3: "<repo_name>", 49151: ""},
    "gpt-2": {0: "!", 262: "Ġthe", 50255: "Ġgazed", 50256: "<|endoftext|>"},
}


def pre_tokenizer_name(name: str | None, tokens: Sequence[str]) -> str:
    """The name of the file's way to cut texts, which its `tokens` tell where the file does not say it.

    Raises ExportError for an unknown name, and where nothing tells it.
    """
    known = ", ".join(PRE_TOKENIZERS)
    if name is None:
        for told, signs in TOLD_BY_TOKENS.items():
            if len(tokens) > max(signs) and all(tokens[index] == sign for index, sign in signs.items() if sign):
                return told
        raise ExportError(
            f"{KEY} is missing, and the vocabulary is of no family that tells how it cuts texts; set the key with "
            f"`gguf-new-metadata --pre-tokenizer NAME OLD NEW` to one of {known}"
        )
    if name not in PRE_TOKENIZERS:
        raise ExportError(f"{KEY} is {name!r}, which is not supported; supported are {known}")
    return name
