"""Frozen models from transformers: loading them, and what methods may ask of them."""
