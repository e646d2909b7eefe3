"""From what `predict_step` returns to a file of predictions."""
