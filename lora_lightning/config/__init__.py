"""Strict reading of configuration, and one-line explanations of errors in it."""
