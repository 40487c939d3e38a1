"""Prompts after which a model is sure of every token that it writes greedily, and the same from llama-completion.

Two implementations of one model round differently: where the two likeliest tokens are nearly as likely, either may come
first, and the texts differ from there on. Prompts whose least gap is large tell an engine that computes another model
from one that rounds.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMPLETION = "llama-completion"
SPARE_TOKENS, ATTEMPTS = 16, 5


@dataclass(frozen=True)
class Clear:
    """A prompt, the text that greedily follows, and the least gap of logits between the first and the second token."""

    prompt: str
    text: str
    gap: float


@torch.no_grad()
def clear_prompts(
    model: Any, tokenizer: Any, candidates: list[str], *, num_prompts: int, num_tokens: int
) -> list[Clear]:
    """The clearest of many prompts, by transformers."""
    found = []
    for prompt in candidates:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new_T = out.sequences[0, inputs["input_ids"].shape[1] :]
        tops_T2 = torch.cat(out.logits).float().topk(2).values
        gap = float((tops_T2[:, 0] - tops_T2[:, 1]).min())
        found.append(Clear(prompt, tokenizer.decode(new_T, skip_special_tokens=True), gap))
    return sorted(found, key=lambda clear: -clear.gap)[:num_prompts]


def completion(folder: Path, file: Path, clear: Clear, num_tokens: int) -> str:
    """What llama.cpp writes greedily after a prompt, as long as the text that is expected.

    The program ends without waiting for its log, through which it prints: more is written than is needed, and it runs
    again where the end is lost all the same.
    """
    words = [str(folder / COMPLETION), "-m", str(file), "-p", clear.prompt, "-n", str(num_tokens + SPARE_TOKENS)]
    words += ["--temp", "0", "-no-cnv", "--no-display-prompt", "-t", "1"]
    text = ""
    for _ in range(ATTEMPTS):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-2000:]
        text = done.stdout.lstrip()
        if len(text) >= len(clear.text.strip()):
            break
    return text[: len(clear.text.strip())]
