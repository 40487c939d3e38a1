"""Calibration hidden states walk through the model one layer at a time; no more than one layer is ever in memory.

Legend: B blocks of C tokens, T = B * C tokens, D hidden size.

    stream = HiddenStream(checkpoint, ids_BC)
    for layer in range(checkpoint.num_layers):
        inputs_TD = stream.attend(layer)          # attention of this layer; what its FFN would see
        stream.advance(converted_ffn(inputs_TD))  # the next layer is calibrated on what this one really gives
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moeify.models.ffn import CHUNK_TOKENS


class _Recorder(nn.Module):
    """Stands in for a decoder layer and notes what the model would pass to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.arguments: Mapping[str, Any] = {}
        # Some models choose the mask by an attribute of the layer.
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_BCD: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_BCD


class _Capture(nn.Module):
    """Stands in for the FFN: keeps its input and adds nothing to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs_BCD = torch.empty(0)

    def forward(self, inputs_BCD: Tensor) -> Tensor:
        self.inputs_BCD = inputs_BCD
        return torch.zeros_like(inputs_BCD)


class Source(Protocol):
    """What a stream needs of a model: a DenseCheckpoint on disk, or one that is loaded."""

    @property
    def config(self) -> Any: ...

    @property
    def skeleton(self) -> Any: ...

    @property
    def ties_embeddings(self) -> bool: ...

    def get(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class HiddenStream:
    """Hidden states of the calibration text on their way through the model.

    Args:
        checkpoint: the model.
        ids_BC: int64 token ids, B blocks of C consecutive tokens.
        device: where the arithmetic runs.
        dtype: in which it runs; float32 unless there is a reason.
        ffn_modules: attributes of a decoder layer that make up its FFN, the first one given all its inputs.
    """

    def __init__(
        self,
        checkpoint: Source,
        ids_BC: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        ffn_modules: tuple[str, ...] = ("mlp",),
    ) -> None:
        self._checkpoint = checkpoint
        self._ffn_modules = ffn_modules
        self._device = torch.device(device)
        self._dtype = dtype
        self._num_blocks, self._context = ids_BC.shape
        embedding = checkpoint.get(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        self._hidden_BCD = embedding[ids_BC].to(self._device, dtype)
        self._arguments = _layer_arguments(checkpoint.skeleton, self._hidden_BCD[:1])

    @torch.no_grad()
    def attend(self, layer: int) -> Tensor:
        """Run the attention half of a layer and return its FFN inputs_TD; `advance` must follow."""
        module = self._load(layer)
        inputs = []
        step = max(1, CHUNK_TOKENS // self._context)
        for start in range(0, self._num_blocks, step):
            block = slice(start, start + step)
            self._hidden_BCD[block] = module(self._hidden_BCD[block], **self._arguments[layer])
            inputs.append(getattr(module, self._ffn_modules[0]).inputs_BCD.flatten(0, 1))
        return torch.cat(inputs)

    @torch.no_grad()
    def advance(self, outputs_TD: Tensor) -> None:
        """Add the FFN's output to the residual stream."""
        self._hidden_BCD += outputs_TD.view_as(self._hidden_BCD)

    @torch.no_grad()
    def pass_through(self, layer: int, ffn: Callable[[Tensor], Tensor]) -> Tensor:
        """Take the stream through one whole layer, attention and this FFN; returns the residual_TD after it."""
        self.advance(ffn(self.attend(layer)))
        return self.residual()

    def residual(self) -> Tensor:
        """residual_TD, the stream as it is now."""
        return self._hidden_BCD.flatten(0, 1)

    def fork(self, residual_TD: Tensor) -> "HiddenStream":
        """Another stream at the same place of the model: whole blocks, with this residual."""
        forked = copy.copy(self)
        forked._hidden_BCD = residual_TD.reshape(-1, self._context, residual_TD.shape[-1]).clone()
        forked._num_blocks = len(forked._hidden_BCD)
        return forked

    @torch.no_grad()
    def losses(self, ids_BC: Tensor) -> Tensor:
        """After the last layer: negative log-likelihood in nats of every token but the first of each block, float32.

        Args:
            ids_BC: the ids of the last B of this stream's blocks.

        Returns:
            losses_BL with L = C - 1.
        """
        rows = [
            cross_entropy(logits_CV[:-1], ids_C[1:].to(logits_CV.device), reduction="none").cpu()
            for logits_CV, ids_C in zip(self.logits(range(self._num_blocks)[-len(ids_BC) :]), ids_BC, strict=True)
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self, blocks: Iterable[int]) -> Iterator[Tensor]:
        """After the last layer: logits_CV of these blocks, one at a time."""
        name = "model.embed_tokens.weight" if self._checkpoint.ties_embeddings else "lm_head.weight"
        tensors = self._checkpoint.get([name, "model.norm.weight"])
        head_VD = tensors[name].to(self._device, self._dtype)
        model: Any = self._checkpoint.skeleton.model
        norm = copy.deepcopy(model.norm)
        norm.load_state_dict({"weight": tensors["model.norm.weight"].to(self._device, self._dtype)}, assign=True)
        for block in blocks:
            yield norm(self._hidden_BCD[block]) @ head_VD.T

    def _load(self, layer: int) -> Any:
        """One decoder layer with weights, its FFN replaced by a capture."""
        module = type(self._checkpoint.skeleton.model.layers[layer])
        with torch.device("meta"):
            loaded = module(self._checkpoint.config, layer).eval()
        for name in self._ffn_modules:
            setattr(loaded, name, _Capture())
        prefix = f"model.layers.{layer}."
        tensors = self._checkpoint.get(prefix + name for name in loaded.state_dict())
        state = {name.removeprefix(prefix): t.to(self._device, self._dtype) for name, t in tensors.items()}
        loaded.load_state_dict(state, assign=True)
        return loaded


@torch.no_grad()
def _layer_arguments(skeleton: PreTrainedModel, hidden_1CD: Tensor) -> list[Mapping[str, Any]]:
    """Masks and rotary embeddings for each layer, made by the stock model itself."""
    model: Any = skeleton.model
    layers, norm = model.layers, model.norm
    recorders = [_Recorder(layer) for layer in layers]
    try:
        model.layers, model.norm = nn.ModuleList(recorders), nn.Identity()
        model.rotary_emb.to(hidden_1CD.device)
        model(inputs_embeds=hidden_1CD, use_cache=False)
    finally:
        model.layers, model.norm = layers, norm
    return [recorder.arguments for recorder in recorders]
