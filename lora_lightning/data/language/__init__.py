"""Encoding of conversations, prompts and texts for language models: token ids and which of them are trained on."""
