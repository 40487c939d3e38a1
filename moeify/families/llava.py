"""LLaVA: CLIP and a projection beside a language model of any family, which is what is cut."""

from moeify.families import ANY, Family

FAMILY = Family(
    "llava",
    blocks="model.language_model.layers",
    auto="AutoModelForImageTextToText",
    tiny={"model_type": "llama"},
    towers={
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 16,
        },
        "image_token_index": 127,
    },
    holders={ANY: "llava"},
)
