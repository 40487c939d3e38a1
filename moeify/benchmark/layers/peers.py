"""Who takes part in the layer benchmark: one function each.

A peer is a function that takes the weights of one layer and returns what maps a batch to the layer's output. To add
one, write it below with the decorator, which gives it its name, the packages whose versions are reported, and its place
in the table. It may raise whatever it likes: the benchmark reports the reason.

T tokens, D hidden, I dense FFN width, F width of one expert, S width of the shared part, E routed experts, K routed
experts a token, P = 2F rows of gate and up (2S, 2I in the shared part and the dense FFN), or F rows of up alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.benchmark.layers.cases import Batch, Layer
from moeify.errors import unknown

# batch -> output_TD
Forward = Callable[[Batch], Tensor]
Build = Callable[[Layer], Forward]


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        name: what --peers calls it.
        build: weights in, function out; what it does is not timed.
        packages: whose versions belong to the result.
        dense: it computes the dense FFN of the whole width, with no routing.
    """

    name: str
    build: Build
    packages: tuple[str, ...] = ()
    dense: bool = False

    def parameters(self, layer: Layer) -> list[nn.Parameter]:
        """The weights that it uses, and that get gradients in training."""
        shared = (layer.shared_up_PD, layer.shared_down_DS, layer.shared_bias_P)
        dense = (layer.dense_up_PD, layer.dense_down_DI, layer.dense_bias_P)
        used = dense if self.dense else (layer.up_EPD, layer.down_EDF, layer.bias_EP, *shared)
        return [weight for weight in used if weight is not None]


# In the order of the table.
PEERS: dict[str, Peer] = {}
OURS = "moeify"
DENSE = "dense"
# What errors are compared with.
EAGER = "eager"


def peer(name: str, *packages: str, dense: bool = False) -> Callable[[Build], Build]:
    """Register a peer under a name."""

    def register(build: Build) -> Build:
        PEERS[name] = Peer(name, build, packages, dense)
        return build

    return register


def find_peers(names: Sequence[str]) -> list[Peer]:
    """Peers by name, in the order of the table; all of them if no name is given.

    Raises:
        UsageError: there is no such peer.
    """
    if strange := [name for name in names if name not in PEERS]:
        raise unknown("a peer", strange[0], PEERS)
    return [found for name, found in PEERS.items() if name in names or not names]


def dense_ffn(inputs_TD: Tensor, up_PD: Tensor, down_DF: Tensor, bias_P: Tensor | None) -> Tensor:
    """silu(gate) * up through the library's matrix products, gate and up in one; gelu(up + bias) if there is a bias."""
    if bias_P is not None:
        hidden_TF = nn.functional.gelu(nn.functional.linear(inputs_TD, up_PD, bias_P), approximate="tanh")
        return nn.functional.linear(hidden_TF, down_DF)
    gate_TF, up_TF = nn.functional.linear(inputs_TD, up_PD).chunk(2, dim=-1)
    return nn.functional.linear(nn.functional.silu(gate_TF) * up_TF, down_DF)


def with_shared(layer: Layer, routed: Forward) -> Forward:
    """Add the shared part, the same for all peers that route, as models do."""
    up_PD, down_DS = layer.shared_up_PD, layer.shared_down_DS
    if up_PD is None or down_DS is None:
        return routed
    return lambda batch: routed(batch) + dense_ffn(batch.inputs_TD, up_PD, down_DS, layer.shared_bias_P)


@peer(OURS, "triton")
def moeify_kernels(layer: Layer) -> Forward:
    """Ours."""
    from moeify.kernels.experts import operation

    moe_ffn = operation(layer.up_EPD.device.type)
    plain = layer.bias_EP is not None
    options = {"activation": "gelu_tanh" if plain else "silu", "gated": not plain, "bias_EP": layer.bias_EP}

    def forward(batch: Batch) -> Tensor:
        tensors = (batch.inputs_TD, layer.up_EPD, layer.down_EDF, batch.experts_TK, batch.weights_TK)
        output_TD: Tensor = moe_ffn(*tensors, **options)
        return output_TD

    return with_shared(layer, forward)


@peer(DENSE, "torch", dense=True)
def dense(layer: Layer) -> Forward:
    """The dense FFN of the whole width: what a conversion starts from. cuBLAS on CUDA devices."""
    return lambda batch: dense_ffn(batch.inputs_TD, layer.dense_up_PD, layer.dense_down_DI, layer.dense_bias_P)


@peer("grouped_mm", "transformers")
def grouped_mm(layer: Layer) -> Forward:
    """What transformers takes by default."""
    return _transformers(layer, "grouped_mm")


@peer("liger", "liger-kernel")
def liger(layer: Layer) -> Forward:
    """liger-kernel's fused MoE in Triton."""
    if layer.bias_EP is not None:
        raise ValueError("its experts have a gate and no biases")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def forward(batch: Batch) -> Tensor:
        output_TD: Tensor = LigerFusedMoEFunction.apply(
            batch.inputs_TD, layer.up_EPD, layer.down_EDF, batch.experts32_TK, batch.weights_TK
        )
        return output_TD

    if layer.down_EDF.shape not in _LIGER_TUNED:
        _tune_liger(layer, forward)
    return with_shared(layer, forward)


# liger-kernel tunes itself at the first call of each hidden size and width, for whatever number of tokens it sees.
_LIGER_TOKENS = 2048
_LIGER_TUNED: set[torch.Size] = set()


def _tune_liger(layer: Layer, forward: Forward) -> None:
    """Let it tune on as many tokens as a training step has, not on a single one."""
    up_EPD, down_EDF = layer.up_EPD, layer.down_EDF
    num_experts, hidden, _ = down_EDF.shape
    # A generator of its own: that of the device may be out of order after a graph that could not be captured.
    generator = torch.Generator(down_EDF.device).manual_seed(0)
    inputs_TD = torch.randn(
        _LIGER_TOKENS, hidden, generator=generator, device=down_EDF.device, dtype=down_EDF.dtype, requires_grad=True
    )
    weights_TK = inputs_TD.new_full((_LIGER_TOKENS, min(2, num_experts)), 0.5).requires_grad_()
    experts_TK = torch.arange(weights_TK.numel(), device=down_EDF.device).view_as(weights_TK) % num_experts
    batch = Batch(inputs_TD, experts_TK, experts_TK.int(), weights_TK, torch.ones_like(inputs_TD))
    torch.autograd.grad(forward(batch), [inputs_TD, weights_TK, up_EPD, down_EDF], batch.output_gradient_TD)
    _LIGER_TUNED.add(down_EDF.shape)


@peer(EAGER, "transformers")
def eager(layer: Layer) -> Forward:
    """transformers' loop over experts."""
    return _transformers(layer, "eager")


# Last, for it copies the weights of every token's experts: what memory it leaves is not enough for others.
@peer("batched_mm", "transformers")
def batched_mm(layer: Layer) -> Forward:
    """What transformers decodes with on a GPU when grouped_mm is chosen."""
    return _transformers(layer, "batched_mm")


def _transformers(layer: Layer, implementation: str) -> Forward:
    """One of transformers' own implementations, through a module of a real model."""
    with torch.device("meta"):
        module = _plain_experts(layer) if layer.bias_EP is not None else _gated_experts(layer)
    module.config._experts_implementation = implementation
    module.down_proj = layer.down_EDF

    def forward(batch: Batch) -> Tensor:
        output_TD: Tensor = module(batch.inputs_TD, batch.experts_TK, batch.weights_TK)
        return output_TD

    return with_shared(layer, forward)


def _gated_experts(layer: Layer) -> Any:
    """Mixtral's, with these weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, hidden, width = layer.down_EDF.shape
    module: Any = MixtralExperts(
        MixtralConfig(num_local_experts=num_experts, hidden_size=hidden, intermediate_size=width, hidden_act="silu")
    )
    module.gate_up_proj = layer.up_EPD
    return module


def _plain_experts(layer: Layer) -> Any:
    """Those of moeify's own models, with these weights."""
    from moeify.modeling.configuration_moeify import MoeifyConfig
    from moeify.modeling.modeling_moeify import PlainBiasedExperts

    num_experts, hidden, width = layer.down_EDF.shape
    values: dict[str, Any] = {"dense_model_type": "gpt2", "num_experts": num_experts, "moe_intermediate_size": width}
    values["expert_activation"] = "gelu_new"
    module: Any = PlainBiasedExperts(MoeifyConfig(**values), hidden)
    module.up_proj, module.up_proj_bias = layer.up_EPD, layer.bias_EP
    return module
