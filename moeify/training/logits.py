"""How a model turns its last hidden states into logits: a matrix, perhaps a bias, and what its class does behind them.

Some classes multiply logits with a factor (granite, cohere), some bend them towards a bound (gemma2). None of that is
listed here: the class's own forward runs with everything below the logits replaced by what it would have given.

Legend: B blocks of C tokens, T tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from moeify.errors import InputError

# Raw numbers from small ones to such as a logit hardly reaches.
PROBED = (1e-3, 1.0, 30.0, 300.0)
PROBE_TOKENS = 4
# Of logits, relative to the largest: more is no rounding.
TOLERANCE = 1e-3

Behind = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """From hidden states to logits.

    Args:
        weight_VD, bias_V: of the last linear map; its outputs are raw logits.
        behind: what makes logits_TV of raw ones; None where they are the same.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    behind: Behind | None = None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """That of a language model; shares its weights.

        Raises:
            InputError: its logits are no function of one linear map of the last hidden states.
        """
        linear, bare, base = model.get_output_embeddings(), _Bare(model), model.base_model_prefix
        name = next((name for name, module in model.named_children() if module is linear), "")

        def behind(raw_TV: Tensor) -> Tensor:
            return bare.logits({base: _Given(raw_TV[None, :, :1]), name: _Raw(raw_TV[None])}, raw_TV.device)

        hidden_TD = _probe(PROBE_TOKENS, linear.weight.shape[1]).to(linear.weight)
        modules = {**vars(model)["_modules"], base: _Given(hidden_TD[None])}
        with torch.no_grad():
            given_TV = bare.logits(modules, hidden_TD.device)
            with reading(linear) as read:
                bare.logits(modules, hidden_TD.device)
            made_TV = behind(linear(read[0][0])) if name and read else torch.full_like(given_TV, torch.nan)
        if not torch.allclose(made_TV, given_TV, rtol=0, atol=TOLERANCE * float(given_TV.abs().max())):
            raise InputError(
                f"the logits of {type(model).__name__} are no function of what its last linear map gives",
                "fine-tuning needs a model whose head is one linear map",
            )
        raw_TV = torch.cat([size * _probe(PROBE_TOKENS, linear.weight.shape[0]) for size in PROBED])
        plain = torch.equal(behind(raw_TV), raw_TV)
        bias_V = None if linear.bias is None else linear.bias.detach()
        return cls(linear.weight.detach(), bias_V, None if plain else behind)

    def raw(self, hidden_TD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """raw_TV, in the type of the weights."""
        hidden_TD = hidden_TD.to(self.weight_VD.dtype)
        if self.bias_V is None:
            return torch.mm(hidden_TD, self.weight_VD.T, out=out)
        return torch.addmm(self.bias_V.to(self.weight_VD.dtype), hidden_TD, self.weight_VD.T, out=out)

    def __call__(self, hidden_TD: Tensor, *, out: Tensor | None = None) -> Tensor:
        """logits_TV; in `out`, if it is given, where they are the raw ones."""
        raw_TV = self.raw(hidden_TD, out=out)
        return raw_TV if self.behind is None else self.behind(raw_TV)


@contextmanager
def reading(linear: Any) -> Iterator[list[Tensor]]:
    """Collect what a last linear map is given; it makes no logits meanwhile, but one number a token."""
    read: list[Tensor] = []

    def forward(hidden_BCD: Tensor) -> Tensor:
        read.append(hidden_BCD)
        return hidden_BCD[..., :1]

    linear.forward = forward
    try:
        yield read
    finally:
        del linear.forward


class _Bare:
    """A model's class and settings, with other modules; hooks that are put on the model later are not on this one."""

    def __init__(self, model: Any) -> None:
        self._model = copy.copy(model)
        values = vars(self._model)
        values |= {name: type(value)() for name, value in values.items() if name.endswith("_hooks")}
        values["_modules"] = {}

    def logits(self, modules: dict[str, nn.Module], device: torch.device) -> Tensor:
        """logits_TV that the class's own forward makes of what these give."""
        vars(self._model)["_modules"] = modules
        try:
            ids_11 = torch.zeros(1, 1, dtype=torch.long, device=device)
            logits_1TV: Tensor = type(self._model).forward(self._model, input_ids=ids_11, use_cache=False).logits
        finally:
            vars(self._model)["_modules"] = {}
        return logits_1TV[0]


def _probe(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


class _Output(BaseModelOutputWithPast):
    """What a base model gives; nothing of what further it may give."""

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands for everything below the head, and for any part of that, which some classes call instead."""

    def __init__(self, hidden_1TD: Tensor) -> None:
        super().__init__()
        self.given = hidden_1TD

    def __getattr__(self, name: str) -> Any:
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output(last_hidden_state=self.given)


class _Raw(nn.Module):
    """Stands for the last linear map."""

    def __init__(self, raw_1TV: Tensor) -> None:
        super().__init__()
        self.given = raw_1TV

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.given
