"""transformers' Trainer with moeify's losses: what is computed, logged and checked in each step."""

import math
import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from moeify.errors import CheckError
from moeify.training.losses import RouterLosses, ScoringHead, hidden_error, load_figures, router_losses
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions
from moeify.training.routers import Explorer, RouterWatch, adjust_selection_biases
from moeify.training.states import StateTrainer

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Scored:
    """A batch that went through the student.

    Args:
        losses_BX: for each block the weighted sum of losses, then its parts.
        goal: what the teacher gave.
        layers, its_layers: hidden states of student and teacher, after the embedding and every layer, if needed.
    """

    losses_BX: Tensor
    goal: Tensor
    layers: tuple[Tensor, ...]
    its_layers: tuple[Tensor, ...]


class FinetuneTrainer(StateTrainer):
    """Trains a student against a teacher.

    Args:
        student: prepared for its stage.
        teacher: where its final hidden states or outputs come from.
        options: weights of losses and rates.
        arguments: how the Trainer runs, the learning rate of everything but routers included.
        datasets: of training and of evaluation.
        callbacks: of the stage.
    """

    def __init__(
        self,
        student: Student,
        teacher: Any,
        options: FinetuneOptions,
        arguments: TrainingArguments,
        *,
        datasets: tuple[Any, Any],
        callbacks: list[TrainerCallback],
    ) -> None:
        self._student, self._teacher, self._options = student, teacher, options
        rate = options.router_rate or 0.0
        self._explorer = Explorer(options.explore) if rate and options.explore else None
        self._watch = RouterWatch(student, self._explorer)
        self._head = self._scoring_head()
        # Of the routers as the stage found them, whatever a checkpoint holds.
        self._router_rates = [
            rate * float(weight.detach().square().mean().sqrt()) for weight in student.router_weights()
        ]
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._loads: list[Tensor] = []
        self.load_LR: Tensor | None = None
        super().__init__(
            model=student.model,
            args=arguments,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            callbacks=callbacks,
        )
        # The loss is a mean of the batch, so the Trainer has to divide it by the number of accumulated ones.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_BalanceCallback(self))

    def detach_model(self) -> None:
        """Take the hooks and the scoring head off the model again."""
        self._watch.remove()
        if self._head is not None:
            self._head.remove()

    @property
    def parts(self) -> tuple[str, ...]:
        """What the columns of losses_BX are, behind the weighted sum."""
        return ("kl", "lm")

    def _scoring_head(self) -> ScoringHead | None:
        return ScoringHead(self._student.model, kl=self._options.kl, lm=self._options.lm)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """AdamW; each router has a rate of its own, relative to the size of its weights."""
        if self.optimizer is None:
            routers = self._student.router_weights()
            known = {id(weight) for weight in routers}
            others = [p for p in self._student.model.parameters() if p.requires_grad and id(p) not in known]
            rate, decay = self.args.learning_rate, self._options.weight_decay
            groups: list[dict[str, Any]] = [
                {"params": [p for p in others if p.ndim > 1], "lr": rate, "weight_decay": decay},
                {"params": [p for p in others if p.ndim <= 1], "lr": rate, "weight_decay": 0.0},
            ]
            groups += [
                {"params": [weight], "lr": lr, "weight_decay": 0.0}
                for weight, lr in zip(routers, self._router_rates, strict=True)
                if weight.requires_grad
            ]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """The weighted sum of all losses; `outputs` are losses_BX: that sum, then `parts`."""
        hidden_wanted = self._options.hidden > 0 and model.training
        if self._explorer is not None and model.training:
            blocks = next(iter(inputs.values())).cpu().numpy()
            self._explorer.begin([zlib.crc32(block) ^ int(self.state.epoch or 0) for block in blocks])
        scored = self._scored(model, inputs, layers=hidden_wanted)
        losses_BX, loss = scored.losses_BX, scored.losses_BX[:, 0].mean()
        if not model.training:
            return (loss, losses_BX) if return_outputs else loss
        self._note(**dict(zip(self.parts, losses_BX[:, 1:].mean(dim=0), strict=True)))
        if hidden_wanted:
            error = hidden_error(scored.layers, scored.its_layers)
            loss = loss + self._options.hidden * error
            self._note(hidden=error)
        if self._watch.routed:
            owed = self._router_loss()
            loss = loss + owed if any(weight.requires_grad for weight in self._student.router_weights()) else loss
        self._check_finite(loss, scored.goal)
        return (loss, losses_BX) if return_outputs else loss

    def _scored(self, model: Any, inputs: dict[str, Tensor], *, layers: bool) -> "Scored":
        """Losses of a batch.

        Args:
            model: the student, maybe wrapped.
            inputs: of the batch.
            layers: the hidden states of every layer are needed.
        """
        assert self._head is not None
        ids_BC, (teacher_BCD, its_layers) = inputs["input_ids"], self._teacher.hidden(inputs, layers=layers)
        self._head.targets = (ids_BC, teacher_BCD, self._teacher.head)
        try:
            with self._watch.watch():
                out = model(input_ids=ids_BC, use_cache=False, output_hidden_states=layers)
        finally:
            self._head.targets = None
        return Scored(out.logits, teacher_BCD, tuple(out.hidden_states) if layers else (), its_layers)

    def _router_loss(self) -> Tensor:
        owed: RouterLosses = router_losses(
            self._watch.routed, self._student.scale, lambda load: self.accelerator.reduce(load, "mean")
        )
        self._loads.append(owed.load_LR)
        self._note(balance=owed.balance, z_loss=owed.z)
        balance = 0.0 if self._student.has_selection_bias else self._options.balance
        # Exploration gives a choice its slope per score as it was fitted; a weight alone gives it per stored score,
        # which reaches the fitted one times the scale. Either way losses stand to each other as if nothing was scaled.
        footing = 1.0 if self._explorer is not None else self._student.scale
        return footing * (balance * owed.balance + self._options.z_loss * owed.z)

    def balance_biases(self) -> None:
        """After each step: the load of its batches moves the selection biases, if there are any."""
        if self._loads:
            self.load_LR = torch.stack(self._loads).mean(dim=0)
            self._loads.clear()
            # They choose as routers do, which stay as they are unless they are trained.
            if self._student.has_selection_bias and self._student.router_weights()[0].requires_grad:
                adjust_selection_biases(self._student, self.load_LR, self._options.balance)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip routers by themselves: stored scaled down, they have gradients that would leave nothing of the others.

        Of SmolLM2-135M in 8 experts all other parameters together made up 0.2 % of the norm, and what clipping left of
        them came near AdamW's epsilon.
        """
        routers = [weight for weight in self._student.router_weights() if weight.grad is not None]
        known = {id(weight) for weight in routers}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        if routers:
            self.accelerator.clip_grad_norm_(routers, self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)

    def _note(self, **parts: Tensor) -> None:
        for name, value in parts.items():
            self._parts[name].append(value.detach().float())

    def _check_finite(self, loss: Tensor, goal: Tensor) -> None:
        """Stop before a bad gradient reaches a weight.

        Raises:
            CheckError: the loss is NaN or infinite; the message names the first layer that gave such values.
        """
        if loss.isfinite():
            return
        layer = self._watch.first_bad_layer()
        where = f"layer {layer} is the first that gives such values" if layer is not None else "all layers are finite"
        if not goal.isfinite().all():
            where = "the teacher gives such values"
        raise CheckError(
            f"the loss became {float(loss.detach())} at step {self.state.global_step + 1}: {where}; {self._kept()}",
            "--learning-rate and --router-rate take less; --overwrite starts anew with them",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss and what routers do."""
        if "loss" in logs and self._parts:
            names = sorted(self._parts)
            means = torch.stack([torch.stack(self._parts[name]).mean() for name in names])
            logs |= dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            logs |= {} if self.load_LR is None else load_figures(self.load_LR.cpu())
            self._parts.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Losses on the held-out text; every block counts once, however many processes share them."""
        loader = self.get_eval_dataloader()
        model = self.model_wrapped.train(mode=False)
        rows = []
        for inputs in loader:
            _, losses_BX = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
            rows.append(self.accelerator.gather_for_metrics(losses_BX))
        means = torch.cat(rows).mean(dim=0).tolist()
        metrics = {f"eval_{name}": mean for name, mean in zip(("loss", *self.parts), means, strict=True)}
        if "eval_lm" in metrics:
            metrics["eval_perplexity"] = _exp(metrics["eval_lm"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _BalanceCallback(TrainerCallback):
    """Balances the load without a gradient, once a step."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer.balance_biases()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
