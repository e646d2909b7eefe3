"""PEFT's LoRA and DoRA: their config, and the conversion of their tensors for a model."""
