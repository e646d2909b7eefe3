"""What conversations, prompts and texts become for a language model: learnt tokens."""
