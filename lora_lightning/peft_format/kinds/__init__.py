"""The kinds of adapters of PEFT beside LoRA, one file each, both ways."""
