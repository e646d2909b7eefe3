"""The types of adapters of PEFT besides LoRA, one file each, for import and export."""
