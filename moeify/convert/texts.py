"""Which text or images a split is calibrated on, and the inputs that the model makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeify.calibration.stream import HiddenStream
from moeify.data.audio import SoundBlocks, sound_blocks
from moeify.data.documents import BUILTIN
from moeify.data.examples import special_ids
from moeify.data.images import DIGITS, ImageBlocks, image_blocks
from moeify.data.pairs import PairBlocks, heard, text_pairs
from moeify.data.sampling import sample_from_model
from moeify.data.text import TokenBlocks, calibration_blocks
from moeify.errors import InputError, warn
from moeify.models import stock
from moeify.models.dense import DenseModel
from moeify.models.device import halves_are_fast
from moeify.models.heads import LANGUAGE_MODELS, auto_name, class_of, decoder_start
from moeify.models.image_processor import ImageProcessor
from moeify.models.inputs import Inputs
from moeify.models.sound_processor import SoundProcessor
from moeify.options import SplitOptions

if TYPE_CHECKING:
    from moeify.convert.prepare import Prepared

# What a model is calibrated on: inputs by name, B blocks of them, and where they came from.
Blocks = TokenBlocks | ImageBlocks | SoundBlocks | PairBlocks
DEFAULT_CONTEXT = 512
# Any size will do: a processor makes its own of it.
BLANK = (64, 64)
# One source of fewer documents is text of one kind.
FEW_DOCUMENTS = 8
# The one model that has no other text than Python's reference.
EMBEDDED = "builtin"
EMBEDDED_VIT = "builtin-vit"
# Larger models do not write text of their own unless they are told to: all of a model is in memory then, and 8,192
# tokens take SmolLM2-135M half a minute on 2 cores.
OWN_TEXT_PARAMETERS = 500_000_000


def default_texts(dense: DenseModel, options: SplitOptions) -> tuple[str, ...]:
    """What a split is calibrated on where nobody says: half of it text that the model itself writes.

    Measured: perplexity over dense of SmolLM2-135M in 24 experts, 75 % active, on builtin-heldout, Moby-Dick and
    Wikipedia (8,176 tokens each): calibrated on builtin 1.12, 1.87 and 2.05, on self and builtin 1.16, 1.45 and 1.58
    (2 cores of an Intel Xeon, 2026-11-26; 88 s and 142 s).
    """
    if dense.family.modality == "image":
        return DIGITS[:1]
    if dense.family.modality == "audio":
        # There is no recording in moeify: whoever splits has to name some.
        return ()
    context = options.context or min(DEFAULT_CONTEXT, dense.family.context_of(dense.text_config))
    if dense.family.is_pair or not class_of(dense.config).can_generate():
        return BUILTIN[:1]
    if dense.name == EMBEDDED or dense.num_parameters > OWN_TEXT_PARAMETERS or options.tokens < 2 * context:
        return BUILTIN[:1]
    return ("self", *BUILTIN[:1])


def calibration_inputs(prepared: "Prepared") -> Blocks:
    """The calibration inputs, of the kind that the model takes.

    Raises:
        UsageError, InputError: a source cannot be read, is too short, or does not fit the model.
    """
    dense, modality = prepared.dense, prepared.dense.family.modality
    if modality == "text" and dense.family.is_pair:
        blocks = calibration_text(prepared)
        start = decoder_start(dense.config)
        pairs = text_pairs(blocks.ids_BC, dense.tokenizer(), start, prepared.options.seed)
        return PairBlocks(pairs, blocks.provenance)
    if modality == "audio":
        return calibration_sound(prepared)
    return calibration_images(prepared) if modality == "image" else calibration_text(prepared)


def calibration_sound(prepared: "Prepared") -> SoundBlocks:
    """As many pieces of sound as have the calibration tokens, and what the model writes of them."""
    options, dense = prepared.options, prepared.dense
    assert options.context is not None
    blocks = sound_blocks(
        options.calibration,
        SoundProcessor(dense.path),
        num_pieces=options.tokens // options.context,
        block_tokens=options.context,
        seed=options.seed,
    )
    return replace(blocks, inputs=dictated(dense, blocks.inputs, options.device))


def dictated(dense: DenseModel, inputs: Inputs, device: str, length: int | None = None) -> dict[str, Tensor]:
    """Inputs of sound with what the model itself writes of them, if it writes; else as they are.

    Args:
        dense: the model.
        inputs: pieces of sound.
        device: where it writes.
        length: tokens of what is written; None means those of the longest, at least LEAST_TOKENS.
    """
    if not class_of(dense.config).can_generate():
        return dict(inputs)
    model: Any = stock.load(dense.path, dtype=torch.float32).to(device).eval()
    return heard(model, inputs, dense.tokenizer(), length)


def calibration_images(prepared: "Prepared") -> ImageBlocks:
    """As many images as have the calibration tokens."""
    options, dense = prepared.options, prepared.dense
    if set(options.calibration) <= set(DIGITS) and dense.name != EMBEDDED_VIT:
        warn(
            f"{dense.name} is calibrated on scikit-learn's handwritten digits, and loses more on other images: "
            "--calibration takes a folder, .parquet or .npz of images like yours"
        )
    assert options.context is not None
    return image_blocks(
        options.calibration,
        ImageProcessor(dense.path),
        num_images=options.tokens // options.context,
        block_tokens=options.context,
        seed=options.seed,
    )


def tokens_of_image(dense: DenseModel) -> int:
    """Tokens that a model makes of an image: patches, and what stands beside them.

    Raises:
        InputError: its folder does not say how images are prepared.
    """
    from PIL import Image

    return HiddenStream(dense, ImageProcessor(dense.path)([Image.new("RGB", BLANK)])).block_tokens


def calibration_text(prepared: "Prepared") -> TokenBlocks:
    """The calibration tokens, checked against the model's vocabulary."""
    options, dense = prepared.options, prepared.dense
    if set(options.calibration) <= set(BUILTIN) and dense.name != EMBEDDED:
        warn(
            f"{dense.name} is calibrated on Python's reference alone, and loses more on other text: "
            f"--calibration takes text like yours, several texts{_and_self(dense)}"
        )

    def sample(num_tokens: int, context: int, seed: int) -> Tensor:
        # Without conversations, which fine-tuning has: with them SmolLM2-135M-Instruct (24 of 32 experts, 16,384
        # tokens) had perplexity 75.6 and 23.0 on Moby-Dick and Wikipedia, without them 72.3 and 22.8.
        dtype = torch.bfloat16 if halves_are_fast(options.device) else torch.float32
        model: Any = stock.load(dense.path, dtype=dtype)
        return sample_from_model(model.to(options.device), num_tokens=num_tokens, context=context, seed=seed)

    if "self" in options.calibration and (dense.family.is_pair or not class_of(dense.config).can_generate()):
        raise InputError(
            f"{dense.name} is a {class_of(dense.config).__name__}, which writes nothing of its own for the source self",
            f"--calibration takes a text, such as {BUILTIN[0]}",
        )
    assert options.context is not None
    tokenizer = dense.tokenizer()
    # What reads whole texts finds special tokens around each; what goes on writing one begins anywhere.
    before, after = ([], []) if class_of(dense.config).can_generate() else special_ids(tokenizer)
    context = options.context - len(before) - len(after)
    blocks = calibration_blocks(
        options.calibration,
        tokenizer,
        num_tokens=options.tokens // options.context * context,
        context=context,
        seed=options.seed,
        sample=sample,
    )
    around = [torch.tensor(ids, dtype=torch.int64).expand(len(blocks.ids_BC), -1) for ids in (before, after)]
    blocks = replace(blocks, ids_BC=torch.cat([around[0], blocks.ids_BC, around[1]], dim=1))
    _warn_of_one_kind(dense, options.calibration, blocks)
    largest = int(blocks.ids_BC.max())
    if largest >= dense.text_config.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, the model has {dense.text_config.vocab_size} tokens",
            "tokenizer and weights are not of the same model",
        )
    return blocks


def _warn_of_one_kind(dense: DenseModel, sources: Sequence[str], blocks: TokenBlocks) -> None:
    """Of one source with few documents; that the embedded text is of one kind is said in other words."""
    few = blocks.provenance.num_documents < FEW_DOCUMENTS
    if len(sources) == 1 and few and not set(sources) <= {*BUILTIN, "self"}:
        warn(
            f"the calibration text is of one kind, documents in {sources[0]}: {blocks.provenance.num_documents}; "
            f"--calibration takes several texts{_and_self(dense)}"
        )


def _and_self(dense: DenseModel) -> str:
    """A further source, of a model that writes text."""
    return ", and self" if auto_name(dense.config) in LANGUAGE_MODELS else ""
