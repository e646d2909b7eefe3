"""How texts become tokens and back: chat templates, and the tokenizer of a training as its checkpoints keep it."""
