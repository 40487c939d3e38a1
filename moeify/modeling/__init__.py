"""moeify's own mixture-of-experts model, for dense models that no stock architecture represents exactly.

`modeling_moeify.py` is the model: one file that needs torch and transformers alone, so that it can lie beside weights.
`registration.py` tells transformers of it as soon as both are imported.
"""
