"""Attach adapters to a model and detach them: what is checked, what is changed, what is reported."""
