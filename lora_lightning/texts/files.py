"""The files beside an adapter's weights that make other tools ask the model as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.adapters.walk import unwrap
from lora_lightning.texts.generation_config import NAME, generation_config_for
from lora_lightning.texts.saved_tokenizer import SavedTokenizer, tokenizer_files


def text_files(
    model: Any,  # noqa: ANN401 - any module
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no public base class
    saved: SavedTokenizer | None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the files of the training's tokenizer and of its generation settings, by their names.

    Args:
        model: The adapted model.
        tokenizer: The tokenizer of the training, or None.
        saved: What is kept of it; None gives no files.
        settings: Generation settings of the task, such as `num_beams`.
    """
    if saved is None or tokenizer is None:
        return {}
    files = dict(tokenizer_files(tokenizer, saved.chat_template))
    answers = saved.answers_with(tokenizer)
    config = generation_config_for(unwrap(model), tokenizer, answers=answers, settings=settings)
    if files and config is not None:
        files[NAME] = config.to_json_string().encode()
    return files
