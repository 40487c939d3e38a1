"""llama.cpp, which reads GGUF.

**It aborts with many routed active experts.** Its graph has room for max(1024, 8 x tensors) nodes, and each routed
active expert of a layer takes two, a view and an add; its scheduler has a hash table of about as many places, for nodes
and weights. So a layer's share of the room, eight for each of its tensors, limits the experts of a token:

    L * (nodes + 2 K)                     <= 8 * (L * tensors + 2)    where the right side is more than 1024
    L * (nodes + 2 K + tensors + 2) + end <= the table's size

Counted in its source (src/llama-context.cpp, graph_max_nodes; src/llama-graph.cpp, build_moe_ffn) at 0c1e570 of
2026-10-01, which llama-cpp-python 0.3.36 builds, and measured with that build on random models: the test has the table.
More tensors raise the limit, those of a model with biases too.
"""

from dataclasses import dataclass, replace

from moeify.engines import Engine, Shape

VERSION = "0c1e570 (2026-10-01)"
LEAST_NODES, NODES_A_TENSOR = 1024, 8
# ggml.c, ggml_hash_size: the least of these that holds the nodes; then powers of two and a few.
HASH_SIZES = (1031, 2053, 4099, 8209, 16411, 32771)
# A GGUF's tensors beside its layers: embedding, last norm, and the head where it is not tied.
TENSORS_BESIDE = 2
# K-quants have blocks of 256 numbers, the other types of 32.
K_BLOCK, BLOCK = 256, 32
# Experts narrower than this decode slower than the dense model: 32 of 48 neurons, half of them active, took 1.21 of its
# time in Q8_0 and 1.60 in Q4_0; 24 of 64 took 0.69 in Q8_0 (SmolLM2-135M, one thread of an Intel Xeon, 2026-11-25).
NARROW = 64


@dataclass(frozen=True)
class Graph:
    """What a layer adds to a model's file and to llama.cpp's graph of it, routed active experts left out.

    Args:
        tensors: of the file.
        nodes: of the graph, with flash attention, which is on unless it is turned off.
        end: nodes and inputs before the first and after the last layer.
        has_head: the file holds lm_head even where it is the embedding.
    """

    tensors: int
    nodes: int
    end: int = 12
    has_head: bool = False


GRAPHS = {
    "granitemoeshared": Graph(13, 50, 15),
    "mixtral": Graph(10, 43),
    "qwen2_moe": Graph(17, 50, has_head=True),
    "qwen3_moe": Graph(12, 47),
    "glm4_moe": Graph(14, 45),
}
DENSE_LAYER = Graph(9, 31)
# Further nodes of a layer without flash attention.
NO_FLASH = 5


def layer_graph(shape: Shape) -> Graph:
    """What one MoE layer of this shape adds."""
    graph = GRAPHS[shape.target]
    tensors, nodes = graph.tensors, graph.nodes
    if shape.target == "granitemoeshared" and not shape.layout.num_shared:
        tensors, nodes = tensors - 3, nodes - 5
    # A bias is one addition; qwen2_moe always has those of q, k and v, qwen3_moe always q/k norms.
    biases = (3 * shape.qkv_bias if shape.target != "qwen2_moe" else 0) + shape.output_bias
    norms = 2 if shape.qk_norm and shape.target == "glm4_moe" else 0
    return replace(graph, tensors=tensors + biases + norms, nodes=nodes + biases + 2 * norms)


def most_active(shape: Shape, further_nodes: int = 0) -> int:
    """Routed experts of a token that the graph has room for; below one, it has none.

    Args:
        shape: of a target that llama.cpp has.
        further_nodes: of each layer.
    """
    graph = layer_graph(shape)
    num_dense = len(shape.layout.dense_layers)
    num_moe = shape.num_layers - num_dense
    dense_tensors = num_dense * DENSE_LAYER.tensors
    tensors = num_moe * graph.tensors + dense_tensors + TENSORS_BESIDE + (graph.has_head or not shape.tied)
    fixed = num_moe * (graph.nodes + further_nodes) + num_dense * (DENSE_LAYER.nodes + further_nodes) + graph.end
    room = max(LEAST_NODES, NODES_A_TENSOR * tensors)
    table = next((size for size in HASH_SIZES if size >= room), room)
    # The table also holds weights, and two caches a layer.
    left = min(room - fixed, table - fixed - tensors - 2 * shape.num_layers)
    return left // (2 * num_moe)


def refuse(shape: Shape) -> str:
    if shape.target not in GRAPHS:
        return ""
    if shape.target == "qwen3_moe" and shape.output_bias:
        return "its qwen3moe has no bias on o"
    active, most = shape.layout.num_routed_active, most_active(shape)
    if active <= most:
        return ""
    return (
        f"{active} routed experts for a token, its graph has room for {most} in {shape.num_layers} layers of "
        f"{shape.target} and it aborts with more (version {VERSION}); more of the active ones can be shared"
    )


def caution(shape: Shape) -> str:
    width = shape.expert_width
    if width % BLOCK:
        return (
            f"experts of {width} neurons are not a multiple of {BLOCK}, so no quantised type takes the rows of their "
            "down_proj, which stay f16"
        )
    if width < NARROW:
        return f"experts of {width} neurons; those of {NARROW} and more decode faster than the dense model"
    return ""


def note(shape: Shape) -> str:
    notes = []
    width = shape.expert_width
    if width % K_BLOCK and not width % BLOCK:
        notes.append(f"K-quants fall back to simpler types for down_proj, {width} is not a multiple of {K_BLOCK}")
    if shape.target in GRAPHS and shape.layout.num_routed_active > most_active(shape, NO_FLASH):
        notes.append("it aborts with flash attention off")
    return "; ".join(notes)


ENGINE = Engine("llama.cpp", tested=f"{VERSION}: limits, widths; 2026-11-26", refuse=refuse, caution=caution, note=note)
