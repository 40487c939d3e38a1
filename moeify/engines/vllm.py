"""vLLM, which reads the written folder.

Its fused kernels take any width that transformers' do. From source (0.32, fused_moe.py, oracle/unquantized.py,
experts/cpu_moe.py): Triton tiles of 64 columns for up to 64 tokens, of 128 for more, so that a narrower expert fills
part of one; the TRT-LLM kernels of FlashInfer take multiples of 128; those for CPUs pad narrower ones. What that costs
was not measured, so it is a note and no warning.
"""

from moeify.engines import Engine, Shape

TILE, FAST_TILE = 64, 128


def note(shape: Shape) -> str:
    width = shape.expert_width
    if width % TILE:
        return f"experts of {width} neurons leave tiles of {TILE} columns in its kernels partly empty"
    return (
        f"{width} neurons are not a multiple of {FAST_TILE}: not by FlashInfer's kernels" if width % FAST_TILE else ""
    )


TESTED = "0.32.0 on a CPU, float32: same greedy tokens and perplexity for every target; widths from source; 2026-11-26"
ENGINE = Engine("vLLM", tested=TESTED, note=note)
