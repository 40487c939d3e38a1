"""Partitions and routers on single layers: relative error of the FFN output on text that was not calibrated on.

    python tests/benchmark_methods.py inputs/smollm2-135m.gguf inputs/wiki.txt,builtin inputs/moby.txt,inputs/sotu.txt

Every partition under the ridge router, then every linear router under the default partition, with refit; six layers,
each on the dense model's hidden states; 8,192 tokens of calibration, 2,048 of each other text. Prints geometric means
over layers. One thread, about ten minutes for SmolLM2-135M.

Legend: T tokens, B blocks of C tokens.
"""

import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from moeify import partition, routers
from moeify.calibration.activations import CLIP_NORM
from moeify.convert.layer import fit_layer
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.texts import calibration_text
from moeify.data.text import evaluation_tokens
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

EXPERTS, ACTIVE, TOKENS, OTHER_TOKENS = 32, (24, 16), 8192, 2048
DEFAULT = SplitOptions()


def methods() -> list[tuple[str, str]]:
    """Partition and router; those that need gradients are left out."""
    partitions = [(name, "ridge") for name in partition.names() if not partition.needs_gradients(name)]
    return partitions + [(DEFAULT.partition, name) for name in routers.names() if routers.is_linear(name)]


def relative_error(outputs_TD: Tensor, dense_TD: Tensor) -> float:
    """Squared error over the dense output's energy, massive activations clipped."""
    norm_T = dense_TD.norm(dim=1)
    weight_T1 = (CLIP_NORM * norm_T.median() / norm_T).clamp(max=1)[:, None]
    return float(((outputs_TD - dense_TD) * weight_T1).square().sum() / (dense_TD * weight_T1).square().sum())


def measure(prepared: Prepared, others: list[str]) -> dict[tuple[str, str], list[float]]:
    """Errors of each method in each of the six layers."""
    dense, ids_BC = prepared.dense, calibration_text(prepared).ids_BC
    streams = [evaluation_tokens(text, dense.tokenizer(), num_tokens=OTHER_TOKENS).ids_T for text in others]
    other_BC = torch.cat([ids_T[: len(ids_T) // ids_BC.shape[1] * ids_BC.shape[1]] for ids_T in streams])
    stream = prepared.stream(torch.cat([ids_BC, other_BC.view(-1, ids_BC.shape[1])]))
    num_fit, num_layers = ids_BC.numel(), dense.num_layers
    chosen = {0, num_layers // 6, num_layers // 3, num_layers // 2, 2 * num_layers // 3, num_layers - 1}
    errors: dict[tuple[str, str], list[float]] = {}
    for layer in range(num_layers):
        inputs_TD, ffn = stream.attend(layer), prepared.ffn(layer)
        dense_TD = ffn(inputs_TD)
        for names in methods() if layer in chosen else ():
            fit = replace(prepared.fit(), partition=partition.find(names[0]), router=routers.find(names[1]))
            converted, _ = fit_layer(ffn, inputs_TD[:num_fit], fit)
            error = relative_error(converted(inputs_TD[num_fit:]), dense_TD[num_fit:])
            errors.setdefault(names, []).append(error)
        stream.advance(dense_TD)
    return errors


if __name__ == "__main__":
    model, calibration, texts = sys.argv[1:4]
    for active in ACTIVE:
        options = SplitOptions(experts=EXPERTS, active=active, calibration=tuple(calibration.split(",")), tokens=TOKENS)
        for (name, router), errors in measure(prepare(open_dense(model), options), texts.split(",")).items():
            mean = math.exp(sum(map(math.log, errors)) / len(errors))
            sys.stdout.write(f"{active} of {EXPERTS}  {name:12s} {router:12s} {mean:.4f}\n")
            sys.stdout.flush()
