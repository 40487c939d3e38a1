"""Where a model's weights lie on a machine with a small GPU, what a token reads on each side, and the bound from that.

Arithmetic alone. One token at a time (decode) reads every weight that it uses once, and layers run one after the other,
so the time of a token is at least the bytes read on each side over that side's bandwidth, added up.

The machine is run as llama.cpp runs it (common/arg.cpp, src/llama-model.cpp, August 2026): with -ngl 99 everything is
on the GPU but the table that token ids are looked up in; --n-cpu-moe N takes the routed experts of the first N layers
back into RAM, not the router nor the shared experts; --n-cpu-ffn N does that with the FFNs of a dense model. Without
room for what is always on, -ngl N keeps the head and the last N - 1 layers on the GPU.
"""

from dataclasses import dataclass

from moeify.command_line import quoted
from moeify.words import size

# Of the VRAM: what the driver and the compute kernels take. An assumption, not measured here.
RESERVE_BYTES = 400_000_000
# llama.cpp computes so many tokens of a prompt at once, in float32.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Machine:
    """What a model shall run on.

    Args:
        vram_bytes: of the GPU; 0 without one.
        gpu_bytes_per_second: what the GPU reads of its own memory.
        ram_bytes: None where it is not known, so that nothing is checked against it.
        ram_bytes_per_second: what the threads that run read of the RAM.
        threads: None leaves the number to the engine.
        measured: what was measured on this machine, in words; the rest was told.
    """

    vram_bytes: int
    gpu_bytes_per_second: float
    ram_bytes: int | None
    ram_bytes_per_second: float
    threads: int | None = None
    measured: str = ""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model by what an engine can move and what a token reads.

    Args:
        num_layers: of the model; the next four are of one layer.
        fixed_bytes: attention, norms, router and shared experts, which every token reads.
        cache_bytes: keys and values of the whole context.
        movable_bytes: routed experts, or the FFN of a dense model.
        movable_read_bytes: of those what a token reads.
        head_bytes: output head and last norm, which every token reads.
        embedding_bytes: the table that ids are looked up in, which no token reads more than a row of.
        tied: table and head are one tensor, stored twice where they lie on two sides.
        buffer_bytes: activations of a batch of the prompt.
    """

    num_layers: int
    fixed_bytes: int
    cache_bytes: int
    movable_bytes: int
    movable_read_bytes: int
    head_bytes: int
    embedding_bytes: int
    tied: bool
    buffer_bytes: int

    @property
    def always_bytes(self) -> int:
        """What every token reads, whatever is routed."""
        return self.head_bytes + self.num_layers * (self.fixed_bytes + self.cache_bytes)

    @property
    def read_bytes(self) -> int:
        """What a token reads."""
        return self.always_bytes + self.num_layers * self.movable_read_bytes


@dataclass(frozen=True)
class Placement:
    """Where a model's weights lie on one machine, and what follows.

    Args:
        gpu_layers: layers of which all but routed experts or FFNs is on the GPU.
        gpu_ffn_layers: of those the ones that have their routed experts or FFNs there too.
        gpu_read_bytes, ram_read_bytes: what a token reads on each side.
        vram_bytes, ram_bytes: memory that each side needs.
        tokens_per_second: an upper bound.
        refusal: why it does not fit, or "".
        flags: of llama.cpp.
    """

    gpu_layers: int
    gpu_ffn_layers: int
    gpu_read_bytes: int
    ram_read_bytes: int
    vram_bytes: int
    ram_bytes: int
    tokens_per_second: float
    refusal: str
    flags: str


def place(weights: Weights, machine: Machine, *, routed: bool, context: int) -> Placement:
    """Put as much on the GPU as fits: first what every token reads whole, then routed experts or FFNs layer by layer.

    That order gives the fewest bytes read from RAM, because of a byte of routed experts only a part is read.

    Args:
        weights: of the model.
        machine: what it runs on.
        routed: whether what can be moved are routed experts, or else FFNs of a dense model.
        context: tokens, for the flags; the cache is in the weights.
    """
    layers, each = weights.num_layers, weights.fixed_bytes + weights.cache_bytes
    room = machine.vram_bytes - RESERVE_BYTES - weights.buffer_bytes - weights.head_bytes
    has_head = machine.vram_bytes > 0 and room >= 0
    gpu_layers = min(layers, room // each) if has_head else 0
    resident = min(layers, (room - layers * each) // weights.movable_bytes) if gpu_layers == layers else 0
    head = weights.head_bytes if has_head else 0
    gpu_read = head + gpu_layers * each + resident * weights.movable_read_bytes
    on_gpu = head + gpu_layers * each + resident * weights.movable_bytes
    total = weights.always_bytes + layers * weights.movable_bytes
    second_table = 0 if weights.tied and not has_head else weights.embedding_bytes
    ram_bytes = total - on_gpu + second_table + weights.buffer_bytes
    ram_read = weights.read_bytes - gpu_read
    seconds = ram_read / machine.ram_bytes_per_second + (gpu_read / machine.gpu_bytes_per_second if gpu_read else 0.0)
    return Placement(
        gpu_layers=gpu_layers,
        gpu_ffn_layers=resident,
        gpu_read_bytes=gpu_read,
        ram_read_bytes=ram_read,
        vram_bytes=on_gpu + RESERVE_BYTES + weights.buffer_bytes if has_head else 0,
        ram_bytes=ram_bytes,
        tokens_per_second=1 / seconds,
        refusal=_refusal(ram_bytes, machine),
        flags=_flags(layers, gpu_layers if has_head else None, resident, machine, routed=routed, context=context),
    )


def _refusal(ram_bytes: int, machine: Machine) -> str:
    if machine.ram_bytes is None or ram_bytes <= machine.ram_bytes:
        return ""
    return f"needs {size(ram_bytes)} of RAM, there are {size(machine.ram_bytes)}"


def _flags(layers: int, gpu_layers: int | None, resident: int, machine: Machine, *, routed: bool, context: int) -> str:
    """What llama.cpp is told; `gpu_layers` is None where not even the head is on the GPU."""
    # -ngl counts the head as one layer more.
    offloaded = 0 if gpu_layers is None else max(99, layers + 1) if gpu_layers == layers else gpu_layers + 1
    words = ["-ngl", str(offloaded)]
    if gpu_layers and resident < layers:
        all_of_them = ["--cpu-moe"] if routed else ["--n-cpu-ffn", str(layers)]
        some = ["--n-cpu-moe" if routed else "--n-cpu-ffn", str(layers - resident)]
        words += some if resident else all_of_them
    words += ["-c", str(context)]
    return quoted(words + (["-t", str(machine.threads)] if machine.threads else []))
