"""The parts of fine-tuning: options, inputs, teacher, model; then the stages, their losses and the writer."""
