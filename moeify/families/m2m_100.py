"""M2M-100 and NLLB: translation between a hundred languages; blocks as BART's."""

from dataclasses import replace

from moeify.families.bart import FAMILY as BART

FAMILY = replace(BART, model_type="m2m_100")
