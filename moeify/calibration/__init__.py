"""What a dense model does on calibration text: hidden states, activations, gradients, regressions."""
