"""The table of `moeify finetune`."""

from typing import TYPE_CHECKING

from moeify.cli.tables.columns import DataTable
from moeify.words import explained

if TYPE_CHECKING:
    from moeify.training.finetune import FinetuneResult


FINETUNE_FIGURES = {
    "layer_error": "layer error",
    "kl": "KL to the teacher",
    "lm": "loss",
    "perplexity": "perplexity",
    "agreement": "same class as the teacher",
    "feature_error": "error of last hidden states",
    "feature_cosine": "cosine of last hidden states",
}


def finetune_table(result: "FinetuneResult") -> DataTable:
    """Each stage, before and after, on held-out text."""
    keys = ("stage", "figure")
    columns = (*keys, "before", "after", "tokens", "seconds")
    notes = f"before, after: on held-out text\n{explained('perplexity')}"
    table = DataTable(f"moeify finetune {result.out}", columns, words=keys, num_keys=2, notes=notes)
    for stage in result.stages:
        for name, label in FINETUNE_FIGURES.items():
            if name in stage.after:
                seconds = "earlier" if stage.seconds is None else f"{stage.seconds:,.0f}"
                values = (f"{stage.before[name]:,.4f}", f"{stage.after[name]:,.4f}")
                table.add_row(stage.stage, label, *values, f"{stage.num_tokens:,}", seconds)
    return table
