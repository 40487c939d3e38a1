"""A small Qwen3 trained like the built-in Llama, on the same text, for measurements on a second family.

    python tests/train_qwen3.py FOLDER                 # about two minutes on two cores

Qwen3 has q/k norms and a head size of its own; everything else is as in moeify.models.builtin.
"""

import sys
from pathlib import Path

from moeify.models.builtin import BuiltinRecipe, builtin_documents, model_config, train_model, train_tokenizer


def main(folder: Path) -> None:
    recipe = BuiltinRecipe()
    documents = builtin_documents(heldout=False)
    tokenizer = train_tokenizer(recipe, documents)
    config = model_config(recipe, tokenizer, "qwen3", head_dim=recipe.hidden_size // recipe.num_heads)
    train_model(recipe, tokenizer, documents, config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
