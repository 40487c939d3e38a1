"""What a benchmark of encoders reads: texts or images for quality, and batches of them for speed.

Legend: B examples in a batch, C positions of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.models.expert_use import expert_use, image_expert_use
from moeify.benchmark.models.inputs import Entrant
from moeify.benchmark.models.results import LayerExperts
from moeify.benchmark.options import BenchOptions
from moeify.check.evaluate import suited
from moeify.check.measures import Measure, open_measure
from moeify.check.scores import Score
from moeify.convert.texts import tokens_of_image
from moeify.data.examples import DEFAULT_CONTEXT, EXAMPLES, context_limit
from moeify.errors import UsageError
from moeify.models.dense import open_dense
from moeify.models.heads import modality_of
from moeify.models.inputs import Inputs
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, Track

# Positions of a text that is timed.
PROMPTS = (DEFAULT_CONTEXT,)


def suited_options(options: BenchOptions, entrants: Sequence[Entrant]) -> BenchOptions:
    """The options with data of the models' kind where nobody said which."""
    own = suited(_as_eval(options), [one.config for one in entrants])
    return replace(options, data=own.data, tasks=own.tasks)


def _as_eval(options: BenchOptions) -> EvalOptions:
    return EvalOptions(options.data, tokens=options.tokens, context=options.context, tasks=options.tasks)


@dataclass(frozen=True)
class Examples:
    """Examples and speed regimes that all models take.

    Args:
        context: C, of the examples for quality.
        sources: examples of B = 1 by name, for what experts do.
        cases: batches by regime: (B, C).
        measure: of the models' own job.
        text_of: turns a token id into text; None for images.
    """

    context: int
    sources: Mapping[str, Sequence[Inputs]]
    cases: Mapping[tuple[int, int], Inputs]
    measure: Measure
    text_of: Callable[[int], str] | None

    @classmethod
    def of(cls, entrants: Sequence[Entrant], options: BenchOptions) -> "Examples":
        """Read examples, and settle what is timed.

        Raises:
            InputError: a source cannot be read, or models read it differently.
            UsageError: other lengths are asked for than the models take.
        """
        first = entrants[0]
        read = EXAMPLES[modality_of(first.config)]
        is_text = modality_of(first.config) == "text"
        if is_text:
            limit = min(context_limit(one.path) for one in entrants)
            context = options.context or min(DEFAULT_CONTEXT, limit)
            lengths = options.prompt or tuple(min(length, limit) for length in PROMPTS)
            for option, length in (("--context", context), *(("--prompt", length) for length in lengths)):
                if not 3 <= length <= limit:
                    raise UsageError(f"{option} asks for {length} positions, all models take {limit}", "3 or more")
        else:
            context = tokens_of_image(open_dense(first.source))
            lengths = (context,)
            if options.prompt or options.context:
                raise UsageError(f"--prompt and --context are about text, an image has {context} positions", "--batch")
        sources = {source: read(first.path, source, options.tokens, context)[0] for source in options.data}
        cases = {
            (batch, length): _batch(
                read(first.path, options.data[0], batch * length, length)[0] if is_text else sources[options.data[0]],
                batch,
            )
            for length in lengths
            for batch in options.batch
        }
        tokenizer = load_tokenizer(first.path) if is_text else None
        return cls(
            context,
            sources,
            cases,
            open_measure({one.name: one.path for one in entrants}, _as_eval(options)),
            None if tokenizer is None else lambda token: str(tokenizer.decode([token])),
        )

    @property
    def largest(self) -> Inputs:
        """The batch with the most positions."""
        return self.cases[max(self.cases, key=lambda regime: regime[0] * regime[1])]

    def scores(self, models: Mapping[str, Any], track: Track[Any]) -> list[Score]:
        """Every model's own measure on every source; the first model is what others are compared with."""
        rows = [self.measure(model, name, source, track) for name, model in models.items() for source in self.sources]
        return [row for row in rows if isinstance(row, Score)]

    def experts(self, model: Any, track: Track[Any]) -> list[LayerExperts]:
        """What the experts of a model do on all sources."""
        if self.text_of is None:
            return image_expert_use(model, self.sources, self.context, track=track)
        texts = {name: _joined(some) for name, some in self.sources.items()}
        return expert_use(model, texts, self.text_of, track=track)


def _joined(examples: Sequence[Inputs]) -> Tensor:
    """ids_BC."""
    return torch.cat([one["input_ids"] for one in examples])


def _batch(examples: Sequence[Inputs], batch: int) -> Inputs:
    """The first examples, again and again if there are too few."""
    chosen = [examples[number % len(examples)] for number in range(batch)]
    return {name: torch.cat([one[name] for one in chosen]) for name in chosen[0]}
