"""Qwen3-VL: qwen3 with a rotation of three parts beside a vision transformer; what reads text is cut."""

from moeify.families import Family

FAMILY = Family(
    "qwen3_vl",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    },
    towers={
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 127,
        "video_token_id": 126,
        "vision_start_token_id": 125,
        "vision_end_token_id": 124,
    },
    holders={"qwen3_vl_moe_text": "qwen3_vl_moe"},
)
