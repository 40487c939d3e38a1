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


def completion(folder: Path, file: Path, prompt: str, num_tokens: int) -> str:
    """What llama.cpp writes after a prompt, greedily."""
    words = [str(folder / COMPLETION), "-m", str(file), "-p", prompt, "-n", str(num_tokens), "--temp", "0"]
    words += ["-no-cnv", "--no-display-prompt", "-t", "1", "--seed", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
