"""How byte-level tokenizers cut a text before they merge, and the name that llama.cpp has for it.

A GGUF has no regular expressions but a name, `tokenizer.ggml.pre`, that stands for some in llama.cpp's source
(src/llama-vocab.cpp, read in the version of llama-cpp-python 0.3.36). A name is chosen where these equal those of
tokenizer.json, stage by stage, whatever their spelling; else none is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Other spellings of the same. A possessive quantifier takes nothing here that the next part could take, and the longest
# white space that ends with a line break is the same with one line break or several at its end.
SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS),
    (r"[^\r\n\p{L}\p{N}]?+", r"[^\r\n\p{L}\p{N}]?"),
    (r"[^\s\p{L}\p{N}]++", r"[^\s\p{L}\p{N}]+"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (r"\p{N}{1}|", r"\p{N}|"),
)
DIGIT = r"\p{N}"
UP_TO_THREE = r"\p{N}{1,3}"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
WORD = BEFORE + r"\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SIGNS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (f"{BEFORE}{UPPER}*{LOWER}+", f"{BEFORE}{UPPER}+{LOWER}*")

# The expression that tokenizers' ByteLevel has built in.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = "|".join((CONTRACTIONS, WORD, UP_TO_THREE, SIGNS, SPACES))
QWEN2 = "|".join((CONTRACTIONS, WORD, DIGIT, SIGNS, SPACES))
QWEN35 = "|".join((CONTRACTIONS, BEFORE + r"[\p{L}\p{M}]+", DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", SPACES))
GPT4O = "|".join((*(one + CONTRACTIONS + "?" for one in CASED), UP_TO_THREE, SIGNS_OR_SLASH, SPACES))
TEKKEN = "|".join((*CASED, DIGIT, SIGNS_OR_SLASH, SPACES))
SEED_CODER = "|".join((CONTRACTIONS, WORD, DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", SPACES))
UFAKZEKA = "|".join((WORD, DIGIT, SIGNS, SPACES))
DEEPSEEK_V3 = (
    UP_TO_THREE,
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + SPACES,
)
MINICPM5 = (UP_TO_THREE, "|".join((CONTRACTIONS, WORD, r"\p{N}+", SIGNS, SPACES)))
# Every character of a text is part of a match: what is kept of matches alone is then all of it.
TOTAL = {GPT2, LLAMA3, QWEN2, QWEN35, GPT4O, TEKKEN, SEED_CODER, UFAKZEKA}


@dataclass(frozen=True)
class PreTokenizer:
    """One name of llama.cpp's.

    Args:
        name: value of tokenizer.ggml.pre.
        stages: expressions that cut a text, each the pieces of the one before.
        ignore_merges: whether a piece that is a token becomes that token without any merge.
        approximate: what llama.cpp's own expressions do otherwise, or nothing.
    """

    name: str
    stages: tuple[str, ...]
    ignore_merges: bool = False
    approximate: str = ""


ASCII_CASE = "it tells upper from lower case in ASCII alone, and takes combining marks for signs"
# The first that fits is taken: several names stand for the same.
PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("smollm", (DIGIT, GPT2)),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("gpt-4o", (GPT4O,), approximate=ASCII_CASE),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, approximate=ASCII_CASE),
    PreTokenizer("seed-coder", (SEED_CODER,)),
    PreTokenizer("ufakzeka", (UFAKZEKA,)),
    PreTokenizer("deepseek-v3", DEEPSEEK_V3),
    PreTokenizer("minicpm5", MINICPM5, ignore_merges=True),
)


# Other names of the same, in the source of https://github.com/ggml-org/llama.cpp/commit/00ad355e.
ALIASES: Mapping[str, str] = {
    alias: name
    for name, aliases in {
        "gpt-2": "phi-2 gigachat a.x-4.0 mellum exaone4 modern-bert mpt olmo jais trillion granite-docling",
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        "dbrx": "smaug-bpe glm4 chatglm-bpe",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    }.items()
    for alias in aliases.split()
}


def named(name: str) -> PreTokenizer | None:
    """What llama.cpp does under a name; None for one that is not known here."""
    return next((one for one in PRE_TOKENIZERS if one.name == ALIASES.get(name, name)), None)


def apply(one: PreTokenizer, backend: Any) -> None:
    """Let a byte-level BPE cut text as a name says; `stages_of` is the inverse.

    Args:
        one: how.
        backend: a `tokenizers.Tokenizer`.
    """
    parts: list[Any] = []
    for stage in one.stages:
        if stage == DIGIT:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif stage != GPT2:
            parts.append(pre_tokenizers.Split(Regex(stage), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in one.stages))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.model.ignore_merges = one.ignore_merges


def candidates(stages: tuple[str, ...]) -> tuple[PreTokenizer, ...]:
    """The names that cut a text like this; they differ in what they do with merges."""
    return tuple(one for one in PRE_TOKENIZERS if one.stages == stages)


def stages_of(pre_tokenizer: Any) -> tuple[str, ...]:
    """The expressions of a pre-tokenizer of tokenizer.json that ends with bytes.

    Raises:
        ValueError: a part of it is none that llama.cpp has; the message is that part.
    """
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise ValueError(str(pre_tokenizer))
    return tuple(stage for part in parts for stage in _stages(part))


def _parts(pre_tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(pre_tokenizer, Mapping):
        return ()
    if pre_tokenizer.get("type") == "Sequence":
        return [part for one in pre_tokenizer["pretokenizers"] for part in _parts(one)]
    return (pre_tokenizer,)


def _stages(part: Mapping[str, Any]) -> tuple[str, ...]:
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return (GPT2,) if part.get("use_regex", True) else ()
    if part["type"] == "Digits" and part.get("individual_digits"):
        return (DIGIT,)
    if part["type"] == "Split" and isinstance(part.get("pattern"), Mapping) and "Regex" in part["pattern"]:
        pattern = _spelled(part["pattern"]["Regex"])
        isolated = part.get("behavior") == "Isolated"
        # Inverted, the pattern matches what is removed: all but the pieces.
        pieces = part.get("behavior") == "Removed" and part.get("invert") and pattern in TOTAL
        if isolated or pieces:
            return (pattern,)
    raise ValueError(str(dict(part)))


def _spelled(pattern: str) -> str:
    for spelling, usual in SPELLINGS:
        pattern = pattern.replace(spelling, usual)
    return pattern
