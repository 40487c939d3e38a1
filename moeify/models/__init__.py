"""Models as moeify reads them: dense checkpoints, one FFN, the embedded model."""
