"""What a model has on top of its blocks, by the class that its config names: the Auto class that makes it again."""

from typing import Any

import transformers

from moeify import families
from moeify.errors import InputError
from moeify.families import Modality
from moeify.modeling.modeling_moeify import AUTO_CLASSES, PREFIX
from moeify.words import listing, printable

LANGUAGE_MODEL = "AutoModelForCausalLM"
# What generates text from text, whatever else it takes.
LANGUAGE_MODELS = (LANGUAGE_MODEL, "AutoModelForImageTextToText")
MASKED_MODEL = "AutoModelForMaskedLM"
SPEECH_MODEL = "AutoModelForSpeechSeq2Seq"
# Reads a text and writes another.
PAIR_MODEL = "AutoModelForSeq2SeqLM"
BASE = "AutoModel"
# Whose models have defaults for generating text.
GENERATING = (*LANGUAGE_MODELS, PAIR_MODEL, SPEECH_MODEL)
# Whose heads have a name for each of their classes.
LABELLED = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)


def dense_type(config: Any) -> str:
    """The model type, of moeify's own models that of the dense model inside."""
    return str(getattr(config, "dense_model_type", "") or config.model_type)


def config_of_experts(config: Any) -> Any:
    """The part of a config that says how many experts a token uses: of moeify's own models the whole one."""
    return config if hasattr(config, "dense_model_type") else config.get_text_config()


def modality_of(config: Any) -> Modality:
    """Kind of a model's inputs; an architecture that is no family's, as stock MoE ones are, takes text."""
    name = dense_type(config)
    return families.find(name).modality if name in families.names() else "text"


def auto_name(config: Any) -> str:
    """Name of the Auto class of transformers that makes a model of this config with its head.

    A config that names no class, or the one below all heads, is of a model as its family usually is.

    Raises:
        InputError: it names a class that none of them makes.
    """
    usual = families.find(dense_type(config)).auto if dense_type(config) in families.names() else LANGUAGE_MODEL
    names = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    for name in names:
        found = [
            auto for auto in (usual, *AUTO_CLASSES) if _is_one_of(name.removeprefix(PREFIX), classes(auto, config))
        ]
        if not found:
            known = {one for auto in AUTO_CLASSES for one in classes(auto, config)}
            raise InputError(
                f"config.json says that the model is a {printable(name)}, expected one of {listing(sorted(known))}",
                "the head of another class would be lost: start from a model with one of these",
            )
        return usual if found[0] == BASE else found[0]
    return usual


def _is_one_of(name: str, known: tuple[str, ...]) -> bool:
    """Old files write LLaMAForCausalLM."""
    return name.casefold() in {one.casefold() for one in known}


def auto_class(config: Any) -> Any:
    """The Auto class itself; raises as `auto_name` does."""
    return getattr(transformers, auto_name(config))


def class_of(config: Any) -> Any:
    """The class of transformers that a model of this config is of."""
    found: Any = auto_class(config)._model_mapping[type(config)]
    choices = found if isinstance(found, tuple | list) else (found,)
    named = [one for one in choices if one.__name__ in (config.architectures or ())]
    return [*named, *choices][0]


def classes(auto: str, config: Any) -> tuple[str, ...]:
    """Names of the dense classes that an Auto class makes of configs of this type."""
    return classes_of_type(auto, dense_type(config))


def classes_of_type(auto: str, model_type: str) -> tuple[str, ...]:
    """The same for a model type."""
    mapping: Any = getattr(transformers, auto)._model_mapping._model_mapping
    found = mapping.get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def decoder_start(config: Any) -> int:
    """The token that a decoder begins with; where a config does not say, the one that fills up, as in T5.

    Raises:
        InputError: there is none.
    """
    names = (name for name in ("decoder_start_token_id", "pad_token_id") if getattr(config, name, None) is not None)
    if (name := next(names, None)) is None:
        raise InputError(
            "config.json has no decoder_start_token_id, with which a decoder begins", "add it, as the model was trained"
        )
    return int(getattr(config, name))


def check_language_model(config: Any, what: str) -> None:
    """Refuse what generates no text.

    Args:
        config: of the model.
        what: that needs one.

    Raises:
        InputError: the model has another head, or none.
    """
    if (name := auto_name(config)) not in LANGUAGE_MODELS:
        kind = (getattr(config, "architectures", None) or [f"{dense_type(config)} made by {name}"])[0]
        raise InputError(f"{what} needs a language model, this is a {printable(kind)}", "see `moeify eval --help`")
