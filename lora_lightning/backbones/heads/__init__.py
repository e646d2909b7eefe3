"""The module that turns hidden states into logits, and what enters it."""
