"""The on-disk layout that most MoE architectures share: one gate/up/down triple an expert."""

from torch import Tensor

from moeify.experts.slices import SplitFFN


def expert_tensors(
    prefix: str, ffn: SplitFFN, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Tensor]:
    """`{prefix}.experts.{i}.{gate,up,down}.weight` for every routed expert."""
    tensors = {}
    for i in range(ffn.gate_RfD.shape[0]):
        for name, weight in ((gate, ffn.gate_RfD), (up, ffn.up_RfD), (down, ffn.down_RDf)):
            tensors[f"{prefix}.experts.{i}.{name}.weight"] = weight[i]
    return tensors


def shared_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    """`{prefix}.{gate,up,down}_proj.weight` of the always-on part."""
    return {
        f"{prefix}.gate_proj.weight": ffn.gate_sD,
        f"{prefix}.up_proj.weight": ffn.up_sD,
        f"{prefix}.down_proj.weight": ffn.down_Ds,
    }
