"""The table of `moeify finetune`."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.training.finetune import FinetuneResult


FINETUNE_FIGURES = {
    "layer_error": "layer error",
    "kl": "KL to the teacher",
    "lm": "loss",
    "perplexity": "perplexity",
}


def finetune_table(result: "FinetuneResult") -> Table:
    """Each stage, before and after, on held-out text."""
    table = Table(title=f"moeify finetune {result.out}", title_justify="left")
    table.add_column("stage")
    table.add_column("figure")
    for column in ("before", "after", "tokens", "seconds"):
        table.add_column(column, justify="right")
    for stage in result.stages:
        for name, label in FINETUNE_FIGURES.items():
            if name in stage.after:
                seconds = "earlier" if stage.seconds is None else f"{stage.seconds:,.0f}"
                values = (f"{stage.before[name]:,.4f}", f"{stage.after[name]:,.4f}")
                table.add_row(stage.stage, label, *values, f"{stage.num_tokens:,}", seconds)
    return table
