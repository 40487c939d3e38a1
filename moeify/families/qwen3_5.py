"""Qwen3.5 as it is published, with eyes: a vision transformer beside qwen3_5_text, which is what is cut."""

from moeify.families import Family

FAMILY = Family(
    "qwen3_5",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={
        "head_dim": 8,
        "full_attention_interval": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
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
        },
        "image_token_id": 127,
        "video_token_id": 126,
        "vision_start_token_id": 125,
        "vision_end_token_id": 124,
    },
    holders={"qwen3_5_moe_text": "qwen3_5_moe"},
)
