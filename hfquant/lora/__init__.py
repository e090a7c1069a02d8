"""Fine-tuning adapters of PEFT on quantized layers: what only works because of how the weights are stored."""
