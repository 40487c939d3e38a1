"""What fine-tuning minimises: divergence from the teacher and language modelling, and what routers owe beside them.

The scoring head takes the place of the last linear map's forward. Logits of a few tokens exist at a time, and what
their gradient adds to hidden states and weights is summed up at once, as in Liger's fused losses
(https://arxiv.org/abs/2410.10989): memory does not grow with tokens times vocabulary. As it runs inside the model's own
forward, distributed wrappers see nothing unusual.

Legend: B blocks, C tokens a block, D hidden size, V vocabulary, T tokens, R routed experts, K chosen for a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moeify.training.logits import Behind, Head

# Logits that exist at once, in bytes, on a CPU and on a GPU; the teacher's are as many again, gradients take the
# place of the student's.
CHUNK_BYTES = (1 << 26, 1 << 27)
# What is worked on at once in float32; on a CPU it should stay in the cache.
CACHED_LOGITS = (1 << 18, 1 << 25)


class ScoringHead:
    """Gives losses in place of logits while `targets` are set.

    They are made where the model calls its last linear map, so that its weights are there; what its class does behind
    that is done within, and its result, of losses, is put aside.

    Args:
        model: the student; forward of its last linear map is replaced until `remove`.
        kl, lm: weights of the losses.

    Raises:
        InputError: its logits are no function of one linear map of the last hidden states.
    """

    def __init__(self, model: Any, *, kl: float, lm: float) -> None:
        self._linear, self._behind = model.get_output_embeddings(), Head.of(model).behind
        self._kl, self._lm = kl, lm
        self._plain = self._linear.forward
        self._losses_B3: Tensor | None = None
        self.targets: tuple[Tensor, Tensor, Head] | None = None
        setattr(self._linear, "forward", self._forward)  # noqa: B010
        self._handle = model.register_forward_hook(self._put_in_place)

    def remove(self) -> None:
        delattr(self._linear, "forward")
        self._handle.remove()

    def _forward(self, hidden_BCD: Tensor) -> Tensor:
        """losses_B3: the weighted sum, the divergence and the language modelling loss, means over C - 1 predictions."""
        if self.targets is None:
            return self._plain(hidden_BCD)  # type: ignore[no-any-return]
        ids_BC, teacher_BCD, teacher = self.targets
        out: tuple[Tensor, Tensor] = _Scored.apply(  # type: ignore[no-untyped-call]
            hidden_BCD,
            self._linear.weight,
            self._linear.bias,
            ids_BC,
            teacher_BCD,
            teacher,
            self._behind,
            (self._kl, self._lm),
        )
        total, parts_B2 = out
        self._losses_B3 = torch.cat([total.expand(len(parts_B2), 1), parts_B2], dim=1)
        return self._losses_B3

    def _put_in_place(self, _: Any, __: Any, output: Any) -> None:
        if self.targets is not None:
            output.logits, self._losses_B3 = self._losses_B3, None


class _Scored(torch.autograd.Function):
    """(mean loss, parts_B2) of hidden states; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917
        context: Any,
        hidden_BCD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_BC: Tensor,
        teacher_BCD: Tensor,
        teacher: Head,
        behind: Behind | None,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        needs = context.needs_input_grad[:3]
        device = hidden_BCD.device.type
        # Cast here: autocast would keep a copy of the weights for every chunk.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        hidden_TD = hidden_BCD[:, :-1].flatten(0, 1).to(dtype)
        head_VD, head_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        student = Head(head_VD, head_V, behind)
        targets_T, its_TD = ids_BC[:, 1:].flatten(), teacher_BCD[:, :-1].flatten(0, 1)
        grad_BCD = torch.zeros_like(hidden_BCD) if needs[0] else None
        grad_TD = torch.empty_like(hidden_TD) if needs[0] else None
        grad_VD: Tensor | None = None
        grad_V = None if bias_V is None else torch.zeros_like(bias_V)
        parts_T2 = torch.empty(len(targets_T), 2, device=device)
        per_token = (weights[0] / len(targets_T), weights[1] / len(targets_T)) if any(needs) else None
        step = _chunk_tokens(len(targets_T), head_VD[:, :1].nbytes, device)
        # Memory that the system hands out anew for each chunk costs more than the arithmetic on it.
        logits_TV = hidden_TD.new_empty(step, len(head_VD))
        teacher_TV = logits_TV.new_empty(step, len(teacher.weight_VD), dtype=teacher.weight_VD.dtype)
        with torch.autocast(device, enabled=False):
            for rows in (slice(start, start + step) for start in range(0, len(targets_T), step)):
                chunk_TD = hidden_TD[rows]
                some_TV = student.raw(chunk_TD, out=logits_TV[: len(chunk_TD)])
                its_TV = teacher(its_TD[rows], out=teacher_TV[: len(chunk_TD)])
                parts_T2[rows] = _losses_behind(behind, some_TV, its_TV, targets_T[rows], per_token)
                if grad_TD is not None:
                    torch.mm(some_TV, head_VD, out=grad_TD[rows])
                if needs[2] and grad_V is not None:
                    grad_V += some_TV.sum(dim=0)
                if needs[1]:
                    part_VD = some_TV.T @ chunk_TD
                    grad_VD = part_VD.to(weight_VD.dtype) if grad_VD is None else grad_VD.add_(part_VD)
        if grad_BCD is not None and grad_TD is not None:
            grad_BCD[:, :-1] = grad_TD.view(*grad_BCD[:, :-1].shape)
        context.grads = (grad_BCD, grad_VD, grad_V if needs[2] else None)
        parts_B2 = parts_T2.view(len(ids_BC), -1, 2).mean(dim=1)
        context.mark_non_differentiable(parts_B2)
        # No matrix product, which autocast would round.
        return (parts_B2.mean(dim=0) * parts_B2.new_tensor(weights)).sum(), parts_B2

    @staticmethod
    def backward(context: Any, *outputs: Any) -> tuple[Any, ...]:
        # Scaled in place, so they are there once.
        grads, context.grads = context.grads, None
        return (*(None if grad is None else grad.mul_(outputs[0].to(grad)) for grad in grads), *[None] * 5)


def _chunk_tokens(num_tokens: int, logit_bytes: int, device: str) -> int:
    """So many tokens at once: chunks of one size, or the last one would be slow."""
    most = max(1, CHUNK_BYTES[device != "cpu"] // logit_bytes)
    return -(-num_tokens // -(-num_tokens // most))


def _losses_behind(
    behind: Behind | None,
    raw_TV: Tensor,
    teacher_TV: Tensor,
    targets_T: Tensor,
    weights: tuple[float, float] | None,
) -> Tensor:
    """`_token_losses` of what is made of raw logits, whose gradient takes their place."""
    if behind is None:
        return _token_losses(raw_TV, teacher_TV, targets_T, weights)
    with torch.enable_grad():
        leaf_TV = raw_TV.detach().requires_grad_(weights is not None)
        logits_TV = behind(leaf_TV)
    grad_TV = logits_TV.detach().clone()
    losses_T2 = _token_losses(grad_TV, teacher_TV, targets_T, weights)
    if weights is not None:
        raw_TV.copy_(torch.autograd.grad(logits_TV, leaf_TV, grad_TV)[0])
    return losses_T2


def _token_losses(
    logits_TV: Tensor, teacher_TV: Tensor, targets_T: Tensor, weights: tuple[float, float] | None
) -> Tensor:
    """losses_T2: KL(teacher || student) and negative log-likelihood, in nats.

    Args:
        logits_TV: the student's; with `weights` the gradient of the sum, weighted so, takes their place.
        teacher_TV: the teacher's.
    """
    # Vocabularies padded to different sizes agree on the tokens that a tokenizer gives.
    shared = min(logits_TV.shape[1], teacher_TV.shape[1])
    losses_T2 = torch.empty(len(logits_TV), 2, device=logits_TV.device)
    step = max(1, CACHED_LOGITS[logits_TV.device.type != "cpu"] // logits_TV.shape[1])
    for rows in (slice(start, start + step) for start in range(0, len(logits_TV), step)):
        student_RV = logits_TV[rows].log_softmax(dim=1, dtype=torch.float32)
        log_RV = teacher_TV[rows].log_softmax(dim=1, dtype=torch.float32)[:, :shared]
        target_R1 = targets_T[rows, None]
        chances_RV = log_RV.exp()
        losses_T2[rows, 0] = (log_RV.sub_(student_RV[:, :shared]).mul_(chances_RV)).sum(dim=1)
        losses_T2[rows, 1] = -student_RV.gather(1, target_R1).squeeze(1)
        if weights is not None:
            divergence, language = weights
            # What the teacher gives to tokens that only it has pulls at nothing.
            mass_R1 = chances_RV.sum(dim=1, keepdim=True).mul_(divergence).add_(language)
            grad_RV = student_RV.exp_().mul_(mass_R1)
            grad_RV[:, :shared].sub_(chances_RV, alpha=divergence)
            grad_RV.scatter_add_(1, target_R1, torch.full_like(target_R1, -language, dtype=grad_RV.dtype))
            logits_TV[rows] = grad_RV
    return losses_T2


def hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers and tokens of the squared error of a layer's output relative to the teacher's.

    Relative for each token, so that massive activations count like any other.

    Args:
        student, teacher: hidden_BCD, or those of single tokens, after the embedding and after each layer.
    """
    errors = [
        ((mine - its).float().square().sum(-1) / its.float().square().sum(-1).clamp(min=1e-30)).mean()
        for mine, its in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack(errors).mean()


@dataclass(frozen=True)
class RouterLosses:
    """What the routers of one batch owe.

    Args:
        balance: R * sum of load share times mean probability, mean over layers; one if the load is even
            (https://arxiv.org/abs/2101.03961, equation 4).
        z: mean square of the log-sum-exp of scores (https://arxiv.org/abs/2202.08906, equation 5).
        load_LR: share of all choices that each expert of each layer got; NaN where a layer has fewer.
    """

    balance: Tensor
    z: Tensor
    load_LR: Tensor


def router_losses(
    routed: list[tuple[Tensor, Tensor]], scale: float, mean_over_processes: Callable[[Tensor], Tensor]
) -> RouterLosses:
    """Losses of all routers from what they gave.

    Scores are stored scaled down; the losses are of the scores as they were fitted.

    Args:
        routed: logits_TR and chosen_TK of each router.
        scale: of the stored scores.
        mean_over_processes: the load is that of all processes, or their losses would not add up to one process's.
    """
    loads, probabilities, squares = [], [], []
    for logits_TR, chosen_TK in routed:
        scores_TR = logits_TR.float() / scale
        # Where tokens have as many experts as they need, numbers past the last one are none.
        counts_R = chosen_TK.flatten().bincount(minlength=scores_TR.shape[1] + 1)[:-1].float()
        loads.append(counts_R / counts_R.sum().clamp(min=1))
        probabilities.append(scores_TR.softmax(dim=1).mean(dim=0))
        squares.append(scores_TR.logsumexp(dim=1).square().mean())
    # Layers may have other numbers of experts; where one has no further ones there is no load.
    load_LR = mean_over_processes(pad_sequence(loads, batch_first=True, padding_value=torch.nan))
    most, product_LR = load_LR.shape[1], load_LR.nan_to_num() * pad_sequence(probabilities, batch_first=True)
    part_L1 = torch.tensor([[len(load_R) / most] for load_R in loads], device=load_LR.device)
    balance = most * (product_LR * part_L1).sum(dim=1).mean()
    return RouterLosses(balance, torch.stack(squares).mean(), load_LR)


def load_figures(load_LR: Tensor) -> dict[str, float]:
    """Mean entropy of the load relative to an even one, and how many experts of all layers got nothing."""
    entropy_L = -(load_LR * load_LR.clamp(min=1e-30).log()).nansum(dim=1)
    even_L = (~load_LR.isnan()).sum(dim=1).float().log().clamp(min=1e-30)
    return {
        "load_entropy": float((entropy_L / even_L).mean()) if load_LR.shape[1] > 1 else 1.0,
        "dead_experts": float((load_LR == 0).sum()),
    }
