"""Fine-tuning of what is no language model: towards the teacher's outputs, be they logits of classes or features.

The loss of a classifier is its divergence from what the teacher's head gives, that of a decoder this and the language
modelling loss of what is written, that of a model without a head the error of its last hidden states, relative to each
one's size. Nobody's labels are needed: what is written may be the teacher's own.

Legend: B blocks (images, texts, sound), C tokens of one, L of what is written, D hidden size, V classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.data import Dataset

from moeify.check.evaluate import load
from moeify.check.features import on_device
from moeify.models.dense import DenseModel
from moeify.models.heads import BASE, auto_name
from moeify.models.inputs import Inputs, num_blocks, output_of, some_blocks, uncached
from moeify.training.trainer import FinetuneTrainer, Scored


class InputBlocks(Dataset[dict[str, Tensor]]):
    """Inputs of a model, block by block.

    Args:
        inputs: by name.
        block_tokens: C.
    """

    def __init__(self, inputs: Inputs, block_tokens: int) -> None:
        self.inputs, self.block_tokens = inputs, block_tokens

    def __len__(self) -> int:
        return num_blocks(self.inputs)

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in some_blocks(self.inputs, slice(block, block + 1)).items()}


class OutputTeacher:
    """Gives the dense model's outputs.

    Args:
        model: it, in inference mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def open(cls, dense: DenseModel, device: str, *, half: bool) -> "OutputTeacher":
        """Load the dense model.

        Args:
            dense: the model.
            device: where it runs.
            half: in bfloat16.
        """
        return cls(load(str(dense.path), dtype="bfloat16" if half else "float32", device=device).requires_grad_(False))

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Tensor], *, layers: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits or last hidden states and, with `layers`, hidden states after the embedding and every layer."""
        out = _called(self._model, on_device(inputs, self._model), layers=layers)
        return output_of(out).float(), _layers_of(out, inputs) if layers else ()


class OutputTrainer(FinetuneTrainer):
    """Trains a student towards an OutputTeacher."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Of what has a head the divergence, and where both say the same; else the error, and the cosine."""
        if self._writes:
            return ("kl", "lm", "agreement")
        is_classifier = getattr(self._student.model.config, "num_labels", 0) and self._has_head
        return ("kl", "agreement") if is_classifier else ("feature_error", "feature_cosine")

    @property
    def _writes(self) -> bool:
        return self._has_head and bool(self._student.model.config.is_encoder_decoder)

    @property
    def _has_head(self) -> bool:
        # What writes may be its own base.
        return auto_name(self._student.model.config) != BASE

    def _scoring_head(self) -> None:
        return None

    def _scored(self, model: Any, inputs: dict[str, Tensor], *, layers: bool) -> Scored:
        goal, its_layers = self._teacher.outputs(inputs, layers=layers)
        with self._watch.watch():
            out = _called(model, inputs, layers=layers)
        output = output_of(out).float()
        if self._writes:
            parts_BX = _writing_losses(output, goal, inputs)
            total_B1 = self._options.kl * parts_BX[:, :1] + self._options.lm * parts_BX[:, 1:2]
        else:
            parts_BX = (_class_losses if self._has_head else _feature_losses)(output, goal)
            total_B1 = self._options.kl * parts_BX[:, :1]
        losses_BX = torch.cat([total_B1, parts_BX], dim=1)
        return Scored(losses_BX, goal, _layers_of(out, inputs) if layers else (), its_layers)


def _called(model: Any, inputs: Mapping[str, Tensor], *, layers: bool) -> Any:
    plain = getattr(model, "module", model)
    return model(**inputs, **uncached(plain), **({"output_hidden_states": True} if layers else {}))


def _layers_of(out: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Hidden states after the embedding and after every layer; of a decoder those behind its embedding, of its text."""
    if getattr(out, "encoder_hidden_states", None) is None:
        return tuple(out.hidden_states)
    mask_BL = inputs.get("decoder_attention_mask")
    written = out.decoder_hidden_states[1:]
    rows = written if mask_BL is None else tuple(hidden_BLD[mask_BL.bool()] for hidden_BLD in written)
    return (*out.encoder_hidden_states, *rows)


def _writing_losses(logits_BLV: Tensor, goal_BLV: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """losses_B3: KL(teacher || student) and negative log-likelihood of what is written, in nats, and agreement.

    Means over the tokens of a text; what is masked behind it is the end that its last token predicts.
    """
    ids_BL = inputs["decoder_input_ids"]
    mask_BL = inputs.get("decoder_attention_mask", torch.ones_like(ids_BL)).to(logits_BLV.dtype)
    log_BLV, its_BLV = logits_BLV.log_softmax(dim=-1), goal_BLV.log_softmax(dim=-1)
    divergence_BL = (its_BLV.exp() * (its_BLV - log_BLV)).sum(dim=-1)
    same_BL = (logits_BLV.argmax(dim=-1) == goal_BLV.argmax(dim=-1)).to(mask_BL.dtype)
    loss_BL = -log_BLV[:, :-1].gather(2, ids_BL[:, 1:, None]).squeeze(2)
    parts = ((divergence_BL, mask_BL), (loss_BL, mask_BL[:, :-1]), (same_BL, mask_BL))
    return torch.stack([(part * mask).sum(dim=1) / mask.sum(dim=1) for part, mask in parts], dim=1)


def _class_losses(logits: Tensor, goal: Tensor) -> Tensor:
    """losses_B2: KL(teacher || student) in nats, and whether both take the same class for the likeliest."""
    log, its = logits.log_softmax(dim=-1), goal.log_softmax(dim=-1)
    divergence = (its.exp() * (its - log)).sum(dim=-1)
    same = (logits.argmax(dim=-1) == goal.argmax(dim=-1)).float()
    return torch.stack([part.flatten(1).mean(1) if part.ndim > 1 else part for part in (divergence, same)], dim=1)


def _feature_losses(hidden_BCD: Tensor, goal_BCD: Tensor) -> Tensor:
    """losses_B2: squared error relative to the teacher's square, and cosine, means over tokens."""
    error_BC = (hidden_BCD - goal_BCD).square().sum(-1) / goal_BCD.square().sum(-1).clamp(min=1e-30)
    return torch.stack([error_BC.mean(1), cosine_similarity(hidden_BCD, goal_BCD, dim=-1).mean(1)], dim=1)
