"""How the loss feels what each FFN puts out: one backward pass of the dense model over part of the calibration text.

The only place where a whole model is in memory; only methods that ask for gradients pay for it.

Legend: B blocks of C tokens, G = B * C, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify.calibration.overflow import check_activations
from moeify.models import stock
from moeify.models.dense import DenseModel
from moeify.models.heads import check_language_model
from moeify.models.inputs import Inputs, named

# Tokens whose gradients are taken.
GRADIENT_TOKENS = 4096


def output_gradients(dense: DenseModel, inputs: Tensor | Inputs, device: str) -> list[Tensor]:
    """gradient_GD for every layer: of the summed language modelling loss by the FFN's output, float32.

    Args:
        dense: the model.
        inputs: the calibration text; its first blocks are used, up to GRADIENT_TOKENS.
        device: where the arithmetic runs.

    Raises:
        InputError: gradients are not finite, or the model is no language model, whose loss needs nobody's labels.
    """
    check_language_model(dense.config, "a method that asks for gradients of the loss")
    ids_BC = named(inputs)["input_ids"]
    model: Any = stock.load(dense.path)
    model.to(device).eval().requires_grad_(requires_grad=False)
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, __: Any, output_1CD: Tensor) -> None:
            outputs[layer] = output_1CD

        return hook

    for layer in range(dense.num_layers):
        block = model.get_submodule(dense.block(layer))
        block.get_submodule(dense.family.write).register_forward_hook(keep(layer))
    per_layer: list[list[Tensor]] = [[] for _ in range(dense.num_layers)]
    for ids_C in ids_BC[: max(1, GRADIENT_TOKENS // ids_BC.shape[1])].to(device):
        with torch.enable_grad():
            embedded_1CD = model.get_input_embeddings()(ids_C[None]).requires_grad_()
            logits_1CV = model(inputs_embeds=embedded_1CD, use_cache=False).logits
            loss = cross_entropy(logits_1CV[0, :-1], ids_C[1:], reduction="sum")
            gradients = torch.autograd.grad(loss, [outputs[number] for number in range(dense.num_layers)])
        for layer_gradients, gradient_1CD in zip(per_layer, gradients, strict=True):
            layer_gradients.append(gradient_1CD[0])
    gathered = [torch.cat(layer_gradients) for layer_gradients in per_layer]
    for layer, gradient_GD in enumerate(gathered):
        check_activations(gradient_GD, f"layer {layer}: the gradients of its FFN")
    return gathered
