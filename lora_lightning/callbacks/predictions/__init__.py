"""From the results of `predict_step` to a file of predictions."""
