"""Why transformers does not load a model or a tokenizer, in one sentence."""

from __future__ import annotations


def reason_of(error: Exception) -> str:
    r"""Return the first line of what transformers says; in our own words where it asks for `trust_remote_code`.

    Example:
        >>> reason_of(ValueError("No such architecture.\nTry another."))
        'No such architecture.'
    """
    if "contains custom code" in str(error):
        return (
            "its files bring code of their own (`auto_map` in their JSON files), and this library never runs it. Use a "
            "model of an architecture that transformers has itself, or build the model in configure_backbone of a task "
            "of your own."
        )
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
