"""Qwen2-VL: qwen2 with a rotation of three parts beside a vision transformer; what reads text is cut."""

from moeify.families import Family

FAMILY = Family(
    "qwen2_vl",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
    towers={
        "vision_config": {
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
        },
        "image_token_id": 127,
        "video_token_id": 126,
        "vision_start_token_id": 125,
        "vision_end_token_id": 124,
    },
)
