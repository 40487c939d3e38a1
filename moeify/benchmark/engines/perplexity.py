"""Perplexity of GGUF files by llama-perplexity, and by transformers on the same tokens.

llama-perplexity cuts a text into blocks of C tokens and scores the second half of each; a tokenizer that begins texts
with BOS has it in the place of each block's first token. Equal numbers say that the engine computes the same model.

Legend: B blocks of C tokens, V vocabulary.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.engines.programs import Failure, run
from moeify.data.documents import read_documents
from moeify.models import stock
from moeify.models.tokenizer import load_tokenizer

# More than any text has a token: enough is read for the tokens that are asked for, and little more.
LETTERS_PER_TOKEN = 8
ESTIMATE = re.compile(r"Final estimate: PPL = (\S+)")
RUNNING = re.compile(r"\[(\d+)\]([^,\s]+),")
CHUNKS = re.compile(r"over (\d+) chunks")
# The program ends without waiting for its log, whose last lines are lost now and then: measured with small models on a
# busy machine, 0.3.36 of llama-cpp-python (common/log.cpp says so).
ATTEMPTS = 5


@dataclass(frozen=True)
class Text:
    """What is scored.

    Args:
        text: at least as many tokens as are scored, if the source has them.
        context: C.
        num_blocks: B, at most.
    """

    text: str
    context: int
    num_blocks: int

    @classmethod
    def of(cls, source: str, *, tokens: int, context: int) -> "Text":
        """The beginning of a source of texts.

        Raises:
            InputError: it cannot be read.
        """
        documents, length = [], 0
        for document in read_documents(source):
            documents.append(document)
            length += len(document)
            if length >= LETTERS_PER_TOKEN * tokens:
                break
        # The program drops a line break at the end.
        text = "\n\n".join(documents)[: LETTERS_PER_TOKEN * tokens].strip()
        return cls(text, context, max(2, tokens // context))


def file_perplexity(file: Path, text_file: Path, text: Text, program: Path, limit_seconds: float) -> float:
    """Of a GGUF file.

    Args:
        file: the model.
        text_file: holds text.text.
        text: what is scored.
        program: llama-perplexity.
        limit_seconds: it is stopped after that.

    Raises:
        Failure: there is none, or it is not finite.
    """
    words = ["-m", str(file), "-f", str(text_file), "-c", str(text.context), "--chunks", str(text.num_blocks)]
    for _ in range(ATTEMPTS):
        done = run(program, *words, limit_seconds=limit_seconds)
        word = _estimate(done.stdout, done.stderr)
        if word:
            break
    else:
        line = next((line for line in reversed(done.stderr.splitlines()) if "perplexity: " in line), "no estimate")
        raise Failure(line.strip())
    value = _number(word)
    if not math.isfinite(value):
        raise Failure(f"its perplexity is {word}")
    return value


def _estimate(out: str, log: str) -> str:
    """The perplexity, as it was printed; "" if that was lost."""
    final = ESTIMATE.search(f"{out}\n{log}")
    if final is not None:
        return final[1]
    running, chunks = RUNNING.findall(out), CHUNKS.search(log)
    if any(word.endswith("nan") for _, word in running):
        return "nan"
    complete = running and chunks is not None and running[-1][0] == chunks[1]
    return str(running[-1][1]) if complete else ""


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


@torch.no_grad()
def folder_perplexity(folder: Path, text: Text, device: str) -> float:
    """Of a checkpoint in stock transformers, float32, on the tokens that llama-perplexity scores; NaN without any."""
    tokenizer = load_tokenizer(folder)
    ids_BC = blocks(tokenizer, text)
    if not len(ids_BC):
        return math.nan
    model: Any = stock.load(folder, dtype="float32").to(device).eval()
    return blocks_perplexity(model, ids_BC)


def blocks(tokenizer: Any, text: Text) -> Tensor:
    """ids_BC, as llama-perplexity makes them."""
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    num_blocks = min(len(ids) // text.context, text.num_blocks)
    ids_BC = torch.tensor(ids[: num_blocks * text.context], dtype=torch.int64).view(num_blocks, text.context)
    if num_blocks and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        ids_BC[:, 0] = tokenizer.bos_token_id
    return ids_BC


@torch.no_grad()
def blocks_perplexity(model: Any, ids_BC: Tensor) -> float:
    """Over the second half of each block."""
    half = ids_BC.shape[1] // 2
    losses = []
    for ids_C in ids_BC:
        logits_CV = model(ids_C[None].to(model.device), use_cache=False).logits[0].float().cpu()
        losses.append(torch.nn.functional.cross_entropy(logits_CV[half:-1], ids_C[half + 1 :]).item())
    return math.exp(sum(losses) / len(losses))
