"""Conversion between PEFT's format and ours: names, keys and settings. It does not read or write files."""
