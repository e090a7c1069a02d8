"""LoRA and its relatives on quantized models: what goes beyond stock PEFT."""
