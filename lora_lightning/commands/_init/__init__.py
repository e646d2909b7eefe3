"""What `lora-lightning init` sees in data, and the config that it writes for them."""
