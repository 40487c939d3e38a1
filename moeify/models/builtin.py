"""A small Llama that moeify trains itself, and the text it is trained on: both are there without any download.

The text is Python's own reference (`pydoc_data.topics`, part of every standard library). One part trains the model, the
other is held out for evaluation, and no paragraph is in both. The model is made once, in about a minute on two cores,
and kept in $MOEIFY_CACHE (default ~/.cache/moeify); `builtin_model()` returns its folder, which any Hugging Face loader
reads. It is a toy, but a trained one: its neurons fire for some tokens and not for others, which is what splitting into
experts needs and what random weights cannot show.

Trap: the text differs between Python versions, hence so do the weights and every number measured on them. The folder's
name carries the Python version.

Shapes: B blocks, C context, N tokens of the training stream.
"""

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeify.cache import cache_dir, made_once
from moeify.errors import InputError
from moeify.models.builtin_training import trained
from moeify.options import Track, untracked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BETAS = (0.9, 0.95)
# A tenth of the topics' text, but never so little that a perplexity over it is noise.
HELDOUT_FRACTION, HELDOUT_MIN_BYTES = 0.1, 45_000
# One giant topic must not be the whole held-out part.
HELDOUT_MAX_TOPIC_BYTES = 16_000
# Shorter paragraphs ("Note:", "See also:") are stock phrases, not content that leaks.
CONTENT_CHARACTERS = 40


@dataclass(frozen=True)
class BuiltinRecipe:
    """Everything that decides the built-in model besides its text. Changing a field gives another cache folder.

    Measured with the default: perplexity 27.4 on builtin-heldout (19,714 tokens in blocks of 256 that start without
    context), where a unigram model has 375 and the training text 12.5. 66 s with two threads (2 cores of an Intel Xeon,
    Python 3.11, PyTorch 2.13, 2026-11-22). Chosen by that perplexity among eleven recipes of about that cost; batch,
    rate and warmup matter most: 430 steps of 8 blocks end at 63; 900 of 4 at 45 with 6e-3 and at 28.5 with 3e-3.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 256
    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    seed: int = 0


def builtin_documents(*, heldout: bool) -> list[str]:
    """Return the topics of Python's reference: the training part, or the part that is held out from it.

    Which topics are held out is decided by a hash of their names, so it changes neither with the order of the topics
    nor with the process. Many topics quote others word for word; a paragraph that was seen before is left out, first of
    all from the training part if it is held out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python has no pydoc_data.topics, the built-in text",
            "install the complete standard library, or name a text of your own instead of `builtin`",
        ) from error
    wanted_bytes = max(HELDOUT_MIN_BYTES, HELDOUT_FRACTION * sum(len(text.encode()) for text in topics.values()))
    seen: set[str] = set()
    held: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(len(text.encode()) for text in held.values()) >= wanted_bytes:
            break
        if len(topics[name].encode()) <= HELDOUT_MAX_TOPIC_BYTES:
            held[name] = _unseen_paragraphs(topics[name], seen)
    if heldout:
        return [text for text in held.values() if text]
    # Longest first: a chapter stays whole and the sections quoted from it disappear, not the other way round.
    rest = sorted((name for name in topics if name not in held), key=lambda name: (-len(topics[name]), name))
    return [text for text in (_unseen_paragraphs(topics[name], seen) for name in rest) if text]


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    """Return the paragraphs of text that are not in seen, and add them to it."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        content = " ".join(paragraph.split())
        if len(content) >= CONTENT_CHARACTERS:
            if content in seen:
                continue
            seen.add(content)
        kept.append(paragraph)
    # A remainder of headings alone teaches nothing.
    return "\n\n".join(kept) if any(len(paragraph) >= CONTENT_CHARACTERS for paragraph in kept) else ""


def builtin_model(
    cache: Path | None = None, *, recipe: BuiltinRecipe | None = None, track: Track[Any] = untracked
) -> Path:
    """Return the folder of the built-in model; train it first if this machine has not yet.

    Args:
        cache: where model folders are kept; None is the cache of this user.
        recipe: what to train; the default is the published built-in model.
        track: wraps the training steps to show progress.

    Raises:
        InputError: the cache folder cannot be written.
    """
    recipe = recipe or BuiltinRecipe()
    documents = builtin_documents(heldout=False)
    folder = (cache or cache_dir()) / f"builtin-{_version(recipe, documents)}"
    if not folder.is_dir():
        with made_once(folder) as partial:
            tokenizer = train_tokenizer(recipe, documents)
            train_model(recipe, tokenizer, documents, track).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return folder


def _version(recipe: BuiltinRecipe, documents: list[str]) -> str:
    """Name what decides the weights: recipe, text and Python version."""
    text = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps([asdict(recipe), text], sort_keys=True).encode()).hexdigest()
    return f"{digest[:12]}-py{sys.version_info.major}.{sys.version_info.minor}"


def train_tokenizer(recipe: BuiltinRecipe, documents: list[str]) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer: it encodes any text and decodes to exactly the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bos_id = bpe.token_to_id(BOS)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)])
    # Any: transformers leaves this constructor and the model's call untyped.
    constructor: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = constructor(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def model_config(
    recipe: BuiltinRecipe, tokenizer: "PreTrainedTokenizerFast", model_type: str = "llama", **more: Any
) -> "PretrainedConfig":
    """The architecture of the recipe's sizes; `more` is what another family than llama says besides."""
    from transformers import AutoConfig

    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "max_position_embeddings": recipe.context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "float32",
    }
    config: PretrainedConfig = AutoConfig.for_model(model_type, **values, **more)
    return config


def train_model(
    recipe: BuiltinRecipe,
    tokenizer: "PreTrainedTokenizerFast",
    documents: list[str],
    track: Track[Any] = untracked,
    *,
    config: "PretrainedConfig | None" = None,
) -> "PreTrainedModel":
    """Train the model as `builtin_training.trained` does, on blocks of the text.

    Args:
        recipe: how long, and on what batches.
        tokenizer: of the vocabulary of `config`.
        documents: the text.
        track: wraps the training steps to show progress.
        config: another architecture than `model_config` gives.
    """
    from transformers import AutoModelForCausalLM

    ids_N = _training_stream(tokenizer, documents)

    def loss(model: Any, batches: torch.Generator) -> Tensor:
        ids_BC = _batch(ids_N, recipe, batches)
        # Every other block starts with BOS: the model meets text both with and without it.
        ids_BC[::2, 0] = tokenizer.bos_token_id
        value: Tensor = model(input_ids=ids_BC, labels=ids_BC, use_cache=False).loss
        return value

    config = config or model_config(recipe, tokenizer)
    model: PreTrainedModel = trained(
        recipe, lambda: AutoModelForCausalLM.from_config(config), loss, track, "model", betas=BETAS
    )
    return model


def _training_stream(tokenizer: "PreTrainedTokenizerFast", documents: list[str]) -> Tensor:
    """Return ids_N: the documents in a row, EOS after each."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(int(tokenizer.eos_token_id))
    return torch.tensor(ids)


def _batch(ids_N: Tensor, recipe: BuiltinRecipe, generator: torch.Generator) -> Tensor:
    """Return ids_BC: blocks that start anywhere in the stream."""
    starts_B = torch.randint(len(ids_N) - recipe.context, (recipe.batch_size,), generator=generator)
    return ids_N[starts_B[:, None] + torch.arange(recipe.context)]
