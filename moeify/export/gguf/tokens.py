"""Tokens, types, merges and scores of a tokenizer, as llama.cpp wants them; refused where it would cut otherwise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import models

from moeify.errors import InputError, warn
from moeify.models.pretokenizers import PreTokenizer, candidates, stages_of
from moeify.words import listing, on_one_line

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"
# Below every score of a merge, as llama.cpp's converter has it for what no merge makes.
UNREACHABLE = -1000000.0
# Of what cannot be carried, so many are named.
SHOWN = 5
STATE_IT = "name llama.cpp's pre-tokeniser by --tokenizer-pre (names: its src/llama-vocab.cpp)"
OTHER_CONVERTER = "a GGUF of the dense model by llama.cpp's own converter is a source with a tokenizer"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of tokens.

    Args:
        model: llama.cpp's name of the kind: gpt2 (byte-level) or llama (sentencepiece).
        pre: llama.cpp's name of how a text is cut before merges.
        tokens: by id.
        types: of each token, of gguf.TokenType.
        merges: pairs, the first one first; for gpt2.
        scores: of each token, the higher the earlier it is made; for llama.
        add_space_prefix: whether a text gets a space before it.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    add_space_prefix: bool = False


def vocabulary_of(described: Mapping[str, Any], vocab_size: int, pre: str) -> Vocabulary:
    """Read a tokenizer.

    Args:
        described: contents of tokenizer.json.
        vocab_size: rows of the embedding; tokens are made up to it.
        pre: llama.cpp's name of how a text is cut before merges, where the user states it.

    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    model = described["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise InputError(f"the tokenizer is of the kind {on_one_line(kind)}; a GGUF gets BPE alone", OTHER_CONVERTER)
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if affix := next((name for name in affixes if model.get(name)), ""):
        raise InputError(
            f"the tokenizer has {affix} {on_one_line(repr(model[affix]))}, which llama.cpp does not have",
            OTHER_CONVERTER,
        )
    if model.get("byte_fallback"):
        return _sentencepiece(described, vocab_size)
    return _byte_level(described, vocab_size, pre)


def _byte_level(described: Mapping[str, Any], vocab_size: int, pre: str) -> Vocabulary:
    model = described["model"]
    merges = [_pair(merge) for merge in model["merges"]]
    if not merges or any(" " in part for pair in merges for part in pair):
        raise InputError(
            "the tokenizer is not byte-level BPE: " + ("some merges have spaces" if merges else "it has no merges"),
            OTHER_CONVERTER,
        )
    normalizers = [one["type"] for one in _flat(described.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise InputError(
            f"the tokenizer changes texts before it cuts them: {on_one_line(listing(normalizers))}; llama.cpp does not",
            OTHER_CONVERTER,
        )
    if normalizers:
        warn("the tokenizer composes letters and accents (NFC), llama.cpp does not: it cuts decomposed texts otherwise")
    tokens, types = _tokens(described, vocab_size)
    return Vocabulary("gpt2", pre or _name(described, merges), tokens, types, [" ".join(pair) for pair in merges])


def _name(described: Mapping[str, Any], merges: list[tuple[str, str]]) -> str:
    """llama.cpp's name of how a text is cut.

    Raises:
        InputError: it has none.
    """
    model = described["model"]
    try:
        names = candidates(stages_of(described.get("pre_tokenizer")))
    except ValueError as error:
        raise InputError(f"llama.cpp cuts no text by {on_one_line(error)}", STATE_IT) from error
    if not names:
        raise InputError(
            f"llama.cpp has no name for how the tokenizer cuts texts: {on_one_line(described['pre_tokenizer'])}",
            STATE_IT,
        )
    ignore = bool(model.get("ignore_merges"))
    choice = next((one for one in names if one.ignore_merges == ignore), None)
    if choice is None:
        choice = names[0]
        _check_merges(_unadded(described), merges, choice, ignore)
    if choice.approximate:
        warn(f"llama.cpp cuts texts nearly as the tokenizer does ({choice.name}): {choice.approximate}")
    return choice.name


def _unadded(described: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary without tokens that are found in a text before it is cut."""
    added = {one["content"] for one in described.get("added_tokens", ())}
    return {token: number for token, number in described["model"]["vocab"].items() if token not in added}


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], choice: PreTokenizer, ignore: bool) -> None:
    """Whether merges make every token, so that it is the same to take a piece that is a token as it is.

    Raises:
        InputError: they do not.
    """
    bpe = models.BPE(vocab, merges)
    unmade = [token for token in vocab if len(bpe.tokenize(token)) != 1]
    if unmade:
        raise InputError(
            f"ignore_merges is {ignore} in the tokenizer and {choice.ignore_merges} in llama.cpp's {choice.name}, and "
            f"no merges make {len(unmade):,} tokens, for example {on_one_line(repr(unmade[0]))}",
            STATE_IT,
        )


def _sentencepiece(described: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    vocab = described["model"]["vocab"]
    prefix = _space_prefix(described)
    missing = [name for name in (f"<0x{byte:02X}>" for byte in range(256)) if name not in vocab]
    if missing:
        raise InputError(f"the tokenizer has no token for {len(missing)} bytes, such as {missing[0]}", OTHER_CONVERTER)
    ranks = _ranks(_unadded(described), [_pair(merge) for merge in described["model"]["merges"]])
    tokens, types = _tokens(described, vocab_size)
    scores = [-float(ranks[token]) if token in ranks else UNREACHABLE for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)


def _ranks(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """When each token is made: llama.cpp merges whatever makes a token, by the score of that token.

    Raises:
        InputError: merges are not like that.
    """
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token in ranks and token != last:
            raise InputError(
                f"merges that make {on_one_line(repr(token))} are apart; llama.cpp has one score for all of them",
                OTHER_CONVERTER,
            )
        ranks.setdefault(token, len(ranks))
        last = token
    pairs = set(merges)
    for token in vocab:
        if BYTE.fullmatch(token):
            continue
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        left_out = next((cut for cut in cuts if cut[0] in vocab and cut[1] in vocab and cut not in pairs), None)
        if left_out and (token in ranks or _is_made(left_out, ranks)):
            raise InputError(
                f"the tokenizer does not merge {on_one_line(repr(left_out))}, llama.cpp would", OTHER_CONVERTER
            )
    return ranks


def _is_made(pair: tuple[str, str], ranks: Mapping[str, int]) -> bool:
    """Whether both can stand in a text before they are merged."""
    return all(len(part) == 1 or part in ranks for part in pair)


def _space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it.

    Raises:
        InputError: spaces become something else than llama.cpp makes of them.
    """
    prefix, escaped, near = False, False, ""
    for part in _flat(described.get("normalizer"), "normalizers"):
        if part == {"type": "Prepend", "prepend": SPACE} and not escaped:
            prefix = True
        elif part.get("type") == "Replace" and part.get("pattern") == {"String": " "} and part["content"] == SPACE:
            escaped = True
        else:
            raise _spaces(part)
    for part in _flat(described.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace" and part.get("replacement") == SPACE and not escaped:
            scheme = part.get("prepend_scheme", "always")
            inside = any(SPACE in token[1:] for token in described["model"]["vocab"])
            if part.get("split", True) and inside:
                raise _spaces(part)
            prefix, escaped = scheme != "never", True
            near = "" if scheme == "never" else "a text that begins with a space"
            near += " or follows a special token" if scheme == "first" else ""
        # Nothing is cut: no space is left when it is escaped.
        elif not (escaped and part.get("type") == "Split" and part.get("pattern") == {"String": " "}):
            raise _spaces(part)
    if not escaped:
        raise _spaces({"normalizer": described.get("normalizer"), "pre_tokenizer": described.get("pre_tokenizer")})
    if near:
        warn(f"llama.cpp puts a space before {near}, the tokenizer does not")
    return prefix


def _spaces(part: Mapping[str, Any]) -> InputError:
    return InputError(f"llama.cpp does nothing with spaces as the tokenizer does: {on_one_line(part)}", OTHER_CONVERTER)


def _tokens(described: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token; those that the tokenizer lacks are unused.

    Raises:
        InputError: two have the same text.
    """
    model = described["model"]
    by_id = {number: (token, TokenType.NORMAL) for token, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        by_id |= {n: (token, TokenType.BYTE) for n, (token, _) in by_id.items() if BYTE.fullmatch(token)}
        if model.get("unk_token") in model["vocab"]:
            by_id[model["vocab"][model["unk_token"]]] = (model["unk_token"], TokenType.UNKNOWN)
    for added in described.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if by_id.get(added["id"], ("", kind))[1] == TokenType.UNKNOWN:
            continue
        by_id[added["id"]] = (added["content"], kind)
    beyond = [token for number, (token, _) in sorted(by_id.items()) if number >= vocab_size]
    if beyond:
        warn(f"left out of the GGUF: {_some(beyond)}, which the model with {vocab_size:,} tokens has no embedding for")
    unused = ((f"[PAD{number}]", TokenType.UNUSED) for number in range(vocab_size))
    pairs = [by_id.get(number, unnamed) for number, unnamed in enumerate(unused)]
    texts = [token for token, _ in pairs]
    if len(set(texts)) < len(texts):
        twice = next(token for token in texts if texts.count(token) > 1)
        raise InputError(f"two tokens are {on_one_line(repr(twice))}; llama.cpp stops at that", OTHER_CONVERTER)
    _warn_of_added(described)
    return texts, [int(kind) for _, kind in pairs]


def _warn_of_added(described: Mapping[str, Any]) -> None:
    names = ("lstrip", "rstrip", "single_word")
    stripping = [one["content"] for one in described.get("added_tokens", ()) if any(one.get(name) for name in names)]
    if stripping:
        warn(f"llama.cpp keeps spaces beside {_some(stripping)}, the tokenizer drops them")
    if any(one["type"] == "Prepend" for one in _flat(described.get("normalizer"), "normalizers")):
        added = described.get("added_tokens", ())
        words = [one["content"] for one in added if one.get("normalized") and not one["special"]]
        if words:
            warn(f"llama.cpp finds {_some(words)} anywhere in a text, the tokenizer behind a space only")


def _some(tokens: Sequence[str]) -> str:
    shown = [on_one_line(repr(token)) for token in tokens[:SHOWN]]
    more = len(tokens) - len(shown)
    return listing([*shown, f"{more:,} more"] if more else shown)


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _flat(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """Parts of a sequence of parts, or the one part."""
    if not part:
        return
    if part.get("type") == "Sequence":
        for one in part[name]:
            yield from _flat(one, name)
    else:
        yield part
