"""Qwen2.5-VL: as qwen2_vl, beside a vision transformer that has windows and a gated FFN of its own."""

from moeify.families import Family

FAMILY = Family(
    "qwen2_5_vl",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
    towers={
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 127,
        "video_token_id": 126,
        "vision_start_token_id": 125,
        "vision_end_token_id": 124,
    },
)
