"""PEFT's format for adapters: names, keys and settings both ways. It reads and writes no file."""
