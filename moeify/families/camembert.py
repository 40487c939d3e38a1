"""CamemBERT: RoBERTa with French words."""

from dataclasses import replace

from moeify.families.roberta import FAMILY as ROBERTA

FAMILY = replace(ROBERTA, model_type="camembert")
