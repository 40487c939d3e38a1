"""XLM-RoBERTa: RoBERTa with words of a hundred languages."""  # noqa: N999

from dataclasses import replace

from moeify.families.roberta import FAMILY as ROBERTA

FAMILY = replace(ROBERTA, model_type="xlm-roberta")
