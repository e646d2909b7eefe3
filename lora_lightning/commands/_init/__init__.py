"""Analysis of data by `lora-lightning init`, and the config that it writes."""
