"""What the configs of PEFT's adapters may say, and how it is checked."""
