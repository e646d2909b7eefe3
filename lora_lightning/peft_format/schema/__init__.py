"""Schema of the configs of PEFT's adapters."""
