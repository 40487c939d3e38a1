"""What fine-tuning needs before it starts: two models that fit each other, and text that both read alike.

Legend: B blocks of C tokens.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify import families
from moeify.check.perplexity import warn_of_few
from moeify.data.documents import read_documents
from moeify.data.pairs import text_pairs
from moeify.data.sampling import sample_from_model
from moeify.data.text import calibration_blocks, evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.models import stock
from moeify.models.chat import chat_turns
from moeify.models.config import load_config
from moeify.models.dense import DenseModel, open_dense
from moeify.models.device import halves_are_fast
from moeify.models.files import find_shards, locate
from moeify.models.fingerprint import Fingerprint
from moeify.models.heads import LANGUAGE_MODELS, auto_name, decoder_start, dense_type
from moeify.models.inputs import Inputs as ModelInputs
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track
from moeify.plan import PLAN_FILE, SplitPlan, load_plan
from moeify.training.examples import DEFAULT_CONTEXT, image_inputs, sound_inputs
from moeify.training.model import check_stages
from moeify.training.options import FinetuneOptions

MIN_CONTEXT = 16
# Both tokenizers cut so much of the text; where they differ, they do so early.
COMPARED_CHARACTERS = 20_000


@dataclass(frozen=True)
class Inputs:
    """Everything a run starts from.

    Args:
        name, path: the student, as it was named and where it is.
        plan: of its split; None for a model that moeify did not cut.
        files: fingerprint of its files when it was opened.
        teacher: the dense model.
        train, held_out: what both models are called with, by name.
        context: tokens of a block.
        provenance: of both.
    """

    name: str
    path: Path
    plan: SplitPlan | None
    files: Fingerprint
    teacher: DenseModel
    train: ModelInputs
    held_out: ModelInputs
    context: int
    provenance: dict[str, Any]

    @property
    def ids_BC(self) -> Tensor:
        """The training text."""
        return self.train["input_ids"]

    @property
    def eval_BC(self) -> Tensor:
        """The held-out text."""
        return self.held_out["input_ids"]

    @property
    def of_language(self) -> bool:
        """Whether it is a language model that is trained."""
        return auto_name(self.teacher.config) in LANGUAGE_MODELS

    def check_unchanged(self) -> None:
        """Compare the files of both models with what they were when they were opened.

        Raises:
            InputError: they changed, or are gone.
        """
        self.teacher.check_unchanged()
        self.files.check_unchanged()


def open_inputs(moe: str, teacher: str | Path | DenseModel, options: FinetuneOptions, track: Track[Any]) -> Inputs:
    """Open and check everything; loads no weights, but for the source `self`.

    Raises:
        InputError: a model or text cannot be used, or they do not fit each other.
        UsageError: the options ask for what these models do not have.
    """
    path = locate(moe, track)
    config, shards = load_config(path), find_shards(path)
    plan = load_plan(path) if (path / PLAN_FILE).is_file() else None
    if plan is None:
        open_dense(str(path), track)
    check_stages(plan, options, path)
    dense = open_dense(teacher, track)
    opened = partial(Inputs, moe, path, plan, Fingerprint.take(path, shards), dense)
    if auto_name(dense.config) != auto_name(config):
        raise InputError(
            f"{moe} is made by {auto_name(config)}, {dense.name} by {auto_name(dense.config)}",
            "the teacher must be the dense model itself or one of its kind",
        )
    if auto_name(config) not in LANGUAGE_MODELS and options.cache_teacher:
        raise UsageError("--cache-teacher is for language models, which have large teachers", "leave it out")
    if dense.family.modality == "audio":
        return opened(*sound_inputs(moe, path, dense, options))
    if dense.family.modality == "image":
        return opened(*image_inputs(moe, path, dense, options))
    if dense.family.is_pair and "self" in options.data:
        raise InputError(
            f"{moe} has an encoder and a decoder, which are not trained on text of its own", "leave it out"
        )
    context = _context(options, config, dense.config)
    tokenizer = load_tokenizer(path)
    _check_alike(moe, tokenizer, config, dense, options.data)

    def sample(num_tokens: int, length: int, seed: int) -> Tensor:
        dtype = torch.bfloat16 if halves_are_fast(options.device) else torch.float32
        turns, model = chat_turns(tokenizer, dense.name), stock.load(dense.path, dtype=dtype).to(options.device)
        return sample_from_model(model, num_tokens=num_tokens, context=length, seed=seed, turns=turns)

    blocks = calibration_blocks(
        options.data, tokenizer, num_tokens=options.tokens, context=context, seed=options.seed, sample=sample
    )
    streams = [evaluation_tokens(source, tokenizer, num_tokens=options.eval_tokens) for source in options.eval_data]
    eval_BC = torch.cat(
        [stream.ids_T[: len(stream.ids_T) // context * context].view(-1, context) for stream in streams]
    )
    if not len(eval_BC):
        raise InputError(
            f"{', '.join(options.eval_data)} gives no block of {context:,} tokens to evaluate on",
            "give a longer --eval-data, more --eval-tokens or a shorter --context",
        )
    warn_of_few(", ".join(options.eval_data), eval_BC.numel() - len(eval_BC))
    largest = int(max(blocks.ids_BC.max(), eval_BC.max()))
    for name, found in ((moe, config.get_text_config()), (dense.name, dense.text_config)):
        if largest >= found.vocab_size:
            raise InputError(
                f"the tokenizer gives token id {largest}, {name} has {found.vocab_size} tokens",
                "tokenizer and weights are not of the same model",
            )
    provenance = {"data": asdict(blocks.provenance), "eval": [asdict(stream.provenance) for stream in streams]}
    if dense.family.is_pair:
        start = decoder_start(dense.config)
        train, held_out = (text_pairs(ids_BC, tokenizer, start) for ids_BC in (blocks.ids_BC, eval_BC))
        return opened(train, held_out, context, provenance)
    return opened(blocks.inputs, {"input_ids": eval_BC}, context, provenance)


def _context(options: FinetuneOptions, *configs: Any) -> int:
    # Of an encoder and a decoder not every config has a word for it.
    limit = min(
        families.find(dense_type(config)).context_of(config)
        if config.is_encoder_decoder
        else int(config.get_text_config().max_position_embeddings)
        for config in configs
    )
    context = options.context or min(DEFAULT_CONTEXT, limit)
    if not MIN_CONTEXT <= context <= limit:
        raise InputError(
            f"context {context} does not fit models that take {MIN_CONTEXT} to {limit} tokens",
            f"--context {min(DEFAULT_CONTEXT, limit)}",
        )
    return context


def _check_alike(name: str, tokenizer: Any, config: Any, teacher: DenseModel, data: tuple[str, ...]) -> None:
    """Raise InputError unless both models read the text as the same tokens."""
    if not data:
        raise UsageError("no text was given", "--data builtin")
    source = "builtin" if data[0] == "self" else data[0]
    text = next(iter(read_documents(source)), "")[:COMPARED_CHARACTERS]
    mine, its = (
        found(text, add_special_tokens=False, verbose=False)["input_ids"] for found in (tokenizer, teacher.tokenizer())
    )
    if mine != its:
        place = next((i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b), min(len(mine), len(its)))
        raise InputError(
            f"{name} and {teacher.name} cut {source} into different tokens, first at token {place:,}",
            "the teacher must be the dense model itself or one with its tokenizer",
        )
    shared, found = int(config.get_text_config().vocab_size), int(teacher.text_config.vocab_size)
    if mine and max(mine) >= min(shared, found):
        raise InputError(
            f"{name} has {shared:,} tokens and {teacher.name} {found:,}, the text needs {max(mine) + 1:,}",
            "tokenizer and weights are not of the same model",
        )
