"""SGLang, which reads the written folder.

From source (0.5.23, moe_runner/triton_utils/fused_moe_triton_config.py, fused_moe_triton/layer.py): Triton tiles of 64
or 32 columns unless a tuned file for the shape says otherwise; the TRT-LLM kernels of FlashInfer pad to multiples of
128. Nothing was run, so all of it is a note and no warning.
"""

from moeify.engines import Engine, Shape

TILE, PADDED = 32, 128


def note(shape: Shape) -> str:
    width = shape.expert_width
    if width % TILE:
        return f"experts of {width} neurons leave tiles of {TILE} columns in its kernels partly empty"
    return f"FlashInfer's kernels pad {width} neurons to a multiple of {PADDED}" if width % PADDED else ""


ENGINE = Engine("SGLang", tested="widths from source of 0.5.23, 2026-11-26", note=note)
