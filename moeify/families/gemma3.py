"""Gemma 3 that also sees: SigLIP and a projection beside gemma3_text, which is what is cut."""

from moeify.families import Family

FAMILY = Family(
    "gemma3",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    towers={
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 127,
        "boi_token_index": 125,
        "eoi_token_index": 126,
    },
)
