"""Prompts after which a model is sure of every token that it writes greedily, and the same from llama-completion.

Two implementations of one model round differently: where the two likeliest tokens are nearly as likely, either may come
first, and the texts differ from there on. Prompts whose least gap is large tell an engine that computes another model
from one that rounds.

Legend: B prompts, T tokens, V vocabulary.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMPLETION = "llama-completion"
PROMPT_TOKENS = 16
SPARE_TOKENS, ATTEMPTS = 16, 5


@dataclass(frozen=True)
class Clear:
    """A prompt, the text that greedily follows, and the least gap of logits between the first and the second token."""

    prompt: str
    text: str
    gap: float


@torch.no_grad()
def clear_prompts(model: Any, tokenizer: Any, texts: list[str], *, num_prompts: int, num_tokens: int) -> list[Clear]:
    """The clearest of the beginnings of many texts, by transformers.

    Args:
        model, tokenizer: loaded.
        texts: some of them with PROMPT_TOKENS tokens.
        num_prompts: that are returned, the clearest first.
        num_tokens: that follow each.
    """
    beginnings = [tokenizer(text, verbose=False)["input_ids"][:PROMPT_TOKENS] for text in texts]
    prompts = {tokenizer.decode(ids, skip_special_tokens=True): ids for ids in beginnings if len(ids) == PROMPT_TOKENS}
    # Cut text must give the same tokens again.
    prompts = {prompt: ids for prompt, ids in prompts.items() if tokenizer(prompt)["input_ids"] == ids}
    ids_BT = torch.tensor(list(prompts.values()))
    out = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        pad_token_id=tokenizer.eos_token_id,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tops_TB2 = torch.stack(out.logits).float().topk(2).values
    gaps_B = (tops_TB2[..., 0] - tops_TB2[..., 1]).amin(dim=0)
    written = tokenizer.batch_decode(out.sequences[:, PROMPT_TOKENS:], skip_special_tokens=True)
    found = [Clear(*words, gap) for *words, gap in zip(prompts, written, gaps_B.tolist(), strict=True)]
    return sorted(found, key=lambda clear: -clear.gap)[:num_prompts]


def completion(folder: Path, file: Path, clear: Clear, num_tokens: int) -> str:
    """What llama.cpp writes greedily after a prompt, as long as the text that is expected.

    The program ends without waiting for its log, through which it prints: more is written than is needed, and it runs
    again where the end is lost all the same.
    """
    words = [str(folder / COMPLETION), "-m", str(file), "-p", clear.prompt, "-n", str(num_tokens + SPARE_TOKENS)]
    words += ["--temp", "0", "-no-cnv", "--no-display-prompt", "--ignore-eos", "-t", "1"]
    text = ""
    for _ in range(ATTEMPTS):
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-2000:]
        text = done.stdout.lstrip()
        if len(text) >= len(clear.text.strip()):
            break
    return text[: len(clear.text.strip())]
