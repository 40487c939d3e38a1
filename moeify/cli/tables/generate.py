"""The table of `moeify generate`."""

from typing import TYPE_CHECKING

from moeify.cli.tables.columns import DataTable

if TYPE_CHECKING:
    from moeify.check.generate import GenerateResult


def generate_table(result: "GenerateResult") -> DataTable:
    """One row a model."""
    columns = ("model", "prompt tokens", "new tokens", "first token ms", "tokens/s", "ended by")
    table = DataTable("moeify generate", columns, words=("model", "ended by"))
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
