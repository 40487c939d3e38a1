"""Parameters, operations and bytes of a model: what one token costs by part, and what one timed pass cannot do without.

Operations are those of matrix products, 2 for each weight and token, as torch's own FlopCounterMode counts them; norms,
activations, softmax and the scan of state-space layers are left out. An attention layer that sees n positions costs
4 * H * d * n more: scores and their sum over values.
"""

from dataclasses import dataclass

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models.anatomy import Anatomy
from moeify.benchmark.models.results import PARTS, Part, Phase

FLOPS_PER_WEIGHT = 2


@dataclass(frozen=True)
class Work:
    """The fewest bytes and operations of one pass."""

    bytes_read: int
    flops: int

    def floor_ms(self, ceilings: Ceilings) -> float:
        """No version of the pass is faster on this machine: bytes at copy bandwidth or operations at matmul rate."""
        seconds = max(self.bytes_read / ceilings.copy_bytes_per_second, self.flops / ceilings.matmul_flops_per_second)
        return 1e3 * seconds


def parts_of(anatomy: Anatomy, *, context: int, element_bytes: int) -> dict[str, Part]:
    """What one token costs, by part.

    Of the routed experts a token uses K of E. An embedding that is not the head is looked up, as learned positions are:
    no parameter of it is multiplied, and one row is read; that of images is computed. Attention is that of a token
    which sees `context` positions, their keys and values included in the bytes. The positions of an example share a
    head that says something of it as a whole. A model that decodes nothing reads nothing for a decoded token.

    Args:
        anatomy: of the model.
        context: positions.
        element_bytes: of one weight, key or value.
    """
    found = {}
    positions = sum(_seen(anatomy, window, context) for window in anatomy.windows)
    for part in (part for part in PARTS if part in anatomy.parts):
        count = anatomy.parts[part]
        active, multiplied, extra = count.parameters, count.matrices, 0
        if part == "embedding" and anatomy.looks_up and not anatomy.tied:
            # What an encoder's is multiplied with is no table.
            active, multiplied, extra = 0, count.matrices if anatomy.both_ways else 0, anatomy.hidden_size
        if part == "positions":
            active, multiplied, extra = 0, 0, anatomy.position_width
        if part == "ffn" and anatomy.experts is not None:
            active -= anatomy.experts.idle_parameters
            multiplied -= anatomy.experts.idle_matrices
        if part == "head" and anatomy.both_ways and not anatomy.head_everywhere:
            multiplied = round(multiplied / context)
        flops = FLOPS_PER_WEIGHT * multiplied
        if part == "attention":
            flops += 2 * FLOPS_PER_WEIGHT * anatomy.query_width * positions
            extra = anatomy.kv_width * positions
        read = 0 if anatomy.both_ways else (active + extra) * element_bytes
        found[part] = Part(count.parameters, active, flops, read)
    return found


def pass_work(
    anatomy: Anatomy,
    phase: Phase,
    *,
    batch: int,
    prompt: int,
    distinct_tokens: int,
    experts_hit: float | None,
    element_bytes: int,
) -> Work:
    """What one pass cannot do without, whatever the implementation.

    Each weight is read once, of the routed experts those that a token chose, of an embedding that is not the head the
    rows of the tokens. Prefill writes keys and values of the prompts and gives logits of their last tokens; position p
    sees p others and itself. Decode adds one token to each prompt and reads their keys and values. Forward keeps
    nothing, and every position sees all.

    Args:
        anatomy: of the model.
        phase: prefill, decode or forward.
        batch, prompt: sequences, and positions of each.
        distinct_tokens: different tokens among the inputs.
        experts_hit: share of the routed experts that at least one token chose.
        element_bytes: of one weight, key or value.
    """
    lengths = range(prompt + 1, prompt + 2) if phase == "decode" else range(1, prompt + 1)
    tokens = batch * len(lengths)
    experts = anatomy.experts
    routed = experts.routed_parameters if experts else 0
    weights = anatomy.num_parameters - routed + (experts_hit or 0.0) * routed
    embedding = anatomy.parts["embedding"]
    if anatomy.looks_up and not anatomy.tied:
        weights += distinct_tokens * anatomy.hidden_size - embedding.parameters
    if "positions" in anatomy.parts and anatomy.position_width:
        weights += len(lengths) * anatomy.position_width - anatomy.parts["positions"].parameters
    kept = 0 if anatomy.both_ways else sum(_seen(anatomy, window, prompt) for window in anatomy.windows)
    tied = embedding.matrices if anatomy.tied else 0
    head = tied + (anatomy.parts["head"].matrices if "head" in anatomy.parts else 0)
    aside = ("positions", "head", *(("embedding",) if anatomy.tied or not anatomy.both_ways else ()))
    body = sum(anatomy.parts[part].matrices for part in anatomy.parts if part not in aside)
    body -= experts.idle_matrices if experts else 0
    reach = [prompt] * prompt if anatomy.both_ways else lengths
    seen = sum(_seen(anatomy, window, length) for window in anatomy.windows for length in reach)
    flops = FLOPS_PER_WEIGHT * (tokens * body + (tokens if anatomy.head_everywhere else batch) * head)
    flops += 2 * FLOPS_PER_WEIGHT * anatomy.query_width * batch * seen
    return Work(round((weights + batch * kept * anatomy.kv_width) * element_bytes), flops)


def active_share(anatomy: Anatomy, dense_ffn: int) -> float:
    """Share of the dense model's FFN parameters that a token uses; of its own of a model that has more of them.

    Args:
        anatomy: of the model.
        dense_ffn: parameters of the dense model's FFNs.
    """
    ffn = anatomy.parts["ffn"].parameters
    idle = 0 if anatomy.experts is None else anatomy.experts.idle_parameters
    return (ffn - idle) / max(ffn, dense_ffn)


def _seen(anatomy: Anatomy, window: int | None, length: int) -> int:
    """Positions that one sees of so many; a window lies on both sides of it where it looks both ways."""
    if window is None:
        return length
    return min(2 * window + 1 if anatomy.both_ways else window, length)
