"""Labelled sets as tasks: accuracy of a model's own head, or of a linear probe on its features.

A probe is scikit-learn's logistic regression on standardised features. One is fitted to the features of the first
model, the dense one, and put on every model: what changed shows. Another is fitted to each model's own features: what
is still in them shows.

Legend: N examples of the test, M of the training, D features, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.check.features import cosines, features, on_device
from moeify.check.tasks_scores import Scores
from moeify.data.examples import READERS, batches
from moeify.data.labelled import Labelled
from moeify.errors import InputError
from moeify.models.heads import auto_name, modality_of
from moeify.options import Track
from moeify.words import listing

# Whose logits are a class of the whole example.
CLASSIFIERS = ("AutoModelForSequenceClassification", "AutoModelForImageClassification")
# scikit-learn stops at 100, where 384 features of 8,000 texts still move.
ITERATIONS = 1000

# features_ND -> number of a class for each.
Probe = Callable[[Tensor], Tensor]


@dataclass
class LabelTask:
    """A labelled set that is ready to be asked.

    Args:
        data: the set.
        context: tokens of a text.
        limit: of examples for the test; None means all.
    """

    data: Labelled
    context: int | None = None
    limit: int | None = None
    _first: dict[str, Any] = field(default_factory=dict)

    @property
    def test(self) -> list[int]:
        return self.data.test[: self.limit]

    def ask(self, model: Any, path: Path, name: str, track: Track[Any]) -> list[Scores]:
        """Accuracy, agreement with the first model and cosine of the features, example by example.

        Args:
            model: it, loaded.
            path: its folder, which has tokenizer or preprocessor.
            name: for the progress.
            track: wraps the loop over examples.

        Raises:
            InputError: the model does not take such examples, or its classes are others.
        """
        if (takes := modality_of(model.config)) != self.data.modality:
            raise InputError(f"{self.data.name} holds {self.data.modality}, {name} takes {takes}", "name another set")
        read = READERS[takes](path, self.context)

        def examples(numbers: list[int]) -> Any:
            label = f"{name} on {self.data.name}"
            return (read(self.data.items[number]) for number in track(numbers, label, len(numbers)))

        right_N = self.data.labels_N[self.test]
        if auto_name(model.config) in CLASSIFIERS:
            predicted_N = classes_of(model, examples(self.test), self.data)
            kinds = {"accuracy": predicted_N}
        else:
            train_MD, test_ND = features(model, examples(self.data.train)), features(model, examples(self.test))
            own = fit_probe(train_MD, self.data.labels_N[self.data.train])
            kinds = {"probe": self._first.setdefault("probe", own)(test_ND), "own probe": own(test_ND)}
        scores = {metric: predicted_N == right_N for metric, predicted_N in kinds.items()}
        predicted_N = next(iter(kinds.values()))
        scores["agreement"] = predicted_N == self._first.setdefault("predicted", predicted_N)
        chance = float(right_N.bincount().max()) / len(right_N)
        rows = [
            Scores(self.data.name, metric, values_N.double(), None if metric == "agreement" else chance)
            for metric, values_N in scores.items()
        ]
        if "probe" in kinds:
            cosines_N = cosines(test_ND, self._first.setdefault("features", test_ND))
            rows.append(Scores(self.data.name, "cosine", cosines_N))
        return rows


@torch.no_grad()
def classes_of(model: Any, examples: Any, data: Labelled) -> Tensor:
    """Number in `data.classes` of the class that a model's head takes for likeliest.

    Raises:
        InputError: the model has not these classes.
    """
    order_V = torch.tensor(places(model.config, data))
    numbers: list[int] = []
    parts: list[Tensor] = []
    for some, inputs in batches(examples):
        logits_BV = model(**on_device(inputs, model)).logits
        parts.append(logits_BV.float().cpu()[:, order_V].argmax(dim=1))
        numbers += some
    return torch.cat(parts)[torch.tensor(numbers).argsort()]


def places(config: Any, data: Labelled) -> list[int]:
    """Place among a model's logits of each class of a set: by name, by number, or all in order where it has no names.

    Raises:
        InputError: none of these fits.
    """
    by_name = {str(name).casefold(): int(place) for place, name in (config.id2label or {}).items()}
    names = [name.casefold() for name in data.classes]
    if set(names) <= set(by_name):
        return [by_name[name] for name in names]
    if all(name.isdecimal() and int(name) < config.num_labels for name in names):
        return [int(name) for name in names]
    unnamed = all(name == f"label_{place}" for name, place in by_name.items())
    if unnamed and len(names) == config.num_labels:
        return list(range(len(names)))
    raise InputError(
        f"{data.name} has the classes {listing(data.classes):.200}, the model {listing(sorted(by_name)):.200}",
        "name a set with the model's classes, or their numbers",
    )


def fit_probe(train_MD: Tensor, labels_M: Tensor) -> Probe:
    """A linear classifier of features.

    Args:
        train_MD: features.
        labels_M: numbers of classes.

    Raises:
        InputError: features are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    if not train_MD.isfinite().all():
        raise InputError("a model's features are not finite, no probe can be fitted to them", "`moeify verify` it")
    mean_D, scale_D = train_MD.mean(dim=0), train_MD.std(dim=0).clamp(min=1e-6)
    found = LogisticRegression(max_iter=ITERATIONS).fit(((train_MD - mean_D) / scale_D).numpy(), labels_M.numpy())

    def predict(features_ND: Tensor) -> Tensor:
        known_ND = torch.nan_to_num((features_ND - mean_D) / scale_D)
        return torch.from_numpy(found.predict(known_ND.numpy()))

    return predict
