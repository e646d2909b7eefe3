"""PEFT's LoRA and DoRA: what a config says, and how the tensors fit a model."""
