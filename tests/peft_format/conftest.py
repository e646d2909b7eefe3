"""The tiny models of the tests of adapter files."""

from tests.checkpoint.conftest import build_model, logits

__all__ = ["build_model", "logits"]
