"""A small Qwen3 trained like the built-in Llama, on the same text, for measurements on a second family.

    python tests/train_qwen3.py FOLDER                 # about two minutes on two cores

Qwen3 has q/k norms and a head size of its own; everything else is as in moeify.builtin.
"""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from moeify import builtin
from moeify.builtin import BuiltinRecipe, builtin_documents, train_model, train_tokenizer


def initial_model(recipe: BuiltinRecipe, tokenizer: Any) -> torch.nn.Module:
    """Random weights of the built-in model's size."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model: torch.nn.Module = Qwen3ForCausalLM(config)
    return model.to(torch.float32)


def main(folder: Path) -> None:
    recipe = BuiltinRecipe()
    documents = builtin_documents(heldout=False)
    tokenizer = train_tokenizer(recipe, documents)
    with patch.object(builtin, "_initial_model", initial_model):
        model = train_model(recipe, tokenizer, documents)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
