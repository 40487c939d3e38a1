"""Tiny mixture-of-experts models of stock architectures, and one step of training with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from conftest import fill
from torch import Tensor

from moeify.modeling.configuration_moeify import MoeifyConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
OWN = "Moeify"
# What differs: the router's dtype and normalisation, dense and shared experts beside the routed ones, widths that are
# no power of two, experts without a gate.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "Mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Glm4Moe": {
        "num_hidden_layers": 2,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_mtp_layers": 0,
    },
    "GraniteMoeShared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    "NemotronH": {
        "layers_block_type": ["full_attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 16,
    },
    # moeify's own: biases and no gate.
    OWN: {
        "dense_model_type": "gpt2",
        "expert_activation": "gelu_new",
        "expert_gate": False,
        "expert_bias": True,
        "output_bias": True,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "ffn_blocks": "transformer.h",
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "num_experts": 4,
        "num_key_value_heads": 4,
    },
}


def tiny(architecture: str, **overrides: Any) -> Any:
    """A seeded model with eager experts."""
    values = {**COMMON, **ARCHITECTURES.get(architecture, {}), **overrides}
    if architecture == OWN:
        config = MoeifyConfig(**values)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    else:
        config = getattr(transformers, f"{architecture}Config")(**values)
        model = getattr(transformers, f"{architecture}ForCausalLM")._from_config(config, experts_implementation="eager")
    fill(model.float(), 0)
    return model.to(DEVICE)


def text(num_texts: int = 2, num_tokens: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (num_texts, num_tokens), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chosen_of(routed: tuple[Tensor, ...]) -> Tensor:
    """The expert ids among what a router returns; their place depends on the version of transformers."""
    (found,) = (part for part in routed if part.dtype == torch.int64)
    return found


def num_moe_layers(model: Any) -> int:
    return sum(hasattr(module, "has_gate") for module in model.modules())


@dataclass(frozen=True)
class Step:
    """A step of training: logits, and the gradient of every parameter that has one."""

    logits: Tensor
    grads: Mapping[str, Tensor]


def step(model: Any, ids: Tensor, implementation: str, forward: Callable[..., Any] | None = None) -> Step:
    model.set_experts_implementation(implementation)
    model.train()
    model.zero_grad()
    out = (model if forward is None else forward)(input_ids=ids, labels=ids)
    out.loss.backward()
    return Step(out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def assert_equal(found: Step, expected: Step, tolerance: float = 1e-5) -> None:
    """Up to rounding; a gradient that is nothing but rounding, as a key's bias has, is measured against the others."""
    assert (found.logits - expected.logits).norm() <= tolerance * expected.logits.norm()
    assert found.grads.keys() == expected.grads.keys()
    largest = max(float(grad.norm()) for grad in expected.grads.values())
    for name, grad in expected.grads.items():
        error = float((found.grads[name] - grad).norm())
        assert error <= tolerance * (float(grad.norm()) + 1e-3 * largest), name
