"""What each model writes: the beginnings of the quality texts, continued, so that a reader sees what a ratio means.

Legend: B blocks of C tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moeify.benchmark.models.results import Sample
from moeify.check.generate import Speaker
from moeify.options import GenerateOptions, Track, untracked

PROMPT_TOKENS = 24
NEW_TOKENS = 32
# Of all texts together: the page shows them side by side, and a large model takes seconds for each.
MAX_PROMPTS = 2


def write_samples(
    models: Mapping[str, Any],
    texts: Mapping[str, Tensor],
    tokenizer: Any,
    longest: int,
    *,
    track: Track[Any] = untracked,
) -> list[Sample]:
    """One a beginning: of the first blocks of each text, of the first texts.

    Args:
        models: loaded, by name; their generation settings are replaced.
        texts: ids_BC by name.
        tokenizer: of all.
        longest: tokens that all models take, at least two.
        track: wraps the loop over beginnings.
    """
    num_prompt = min(PROMPT_TOKENS, longest // 2, *(ids_BC.shape[1] for ids_BC in texts.values()))
    options = GenerateOptions(tokens=min(NEW_TOKENS, longest - num_prompt), temperature=0.0)
    speakers = [Speaker.of(name, model, tokenizer, options) for name, model in models.items()]
    blocks = max(1, MAX_PROMPTS // len(texts))
    beginnings = [(name, ids_C[:num_prompt]) for name, ids_BC in texts.items() for ids_C in ids_BC[:blocks]][
        :MAX_PROMPTS
    ]
    return [
        Sample(
            data,
            str(tokenizer.decode(ids_P)),
            {speaker.name: speaker.say(ids_P.tolist()).text for speaker in speakers},
        )
        for data, ids_P in track(beginnings, "writing", len(beginnings))
    ]
