"""The table of `moeify generate`."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.check.generate import GenerateResult


def generate_table(result: "GenerateResult") -> Table:
    """One row a model."""
    table = Table(title="moeify generate", title_justify="left")
    table.add_column("model", overflow="fold")
    for column in ("prompt tokens", "new tokens", "first token ms", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("ended by")
    for one in result.generations:
        table.add_row(
            one.model,
            f"{one.num_prompt_tokens:,}",
            f"{one.num_tokens:,}",
            f"{one.first_token_ms:,.0f}",
            f"{one.tokens_per_second:,.1f}",
            "the model" if one.ended else "--tokens",
        )
    return table
