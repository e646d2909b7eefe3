"""What `generate` and `chat` share: a fine-tuned language model, prompts, how to draw from it, columns of answers."""
