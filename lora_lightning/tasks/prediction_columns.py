"""Predictions as the columns of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def columns_of(prediction: Any) -> dict[str, Any]:  # noqa: ANN401 - the task's own type
    """Return a task's prediction for one row as columns.

    Args:
        prediction: A mapping gives a column `predicted_<name>` for each of its entries; anything else is one column,
            `prediction`.

    Example:
        >>> columns_of({"label": "yes"}), columns_of(0.5)
        ({'predicted_label': 'yes'}, {'prediction': 0.5})
    """
    if not isinstance(prediction, Mapping):
        return {"prediction": prediction}
    return {f"predicted_{name}": value for name, value in prediction.items()}


def class_columns(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes or numbers of a text as columns, with one for the probability of each class.

    Example:
        >>> class_columns({"label": "yes", "probabilities": {"no": 0.25, "yes": 0.75}})
        {'predicted_label': 'yes', 'probability_no': 0.25, 'probability_yes': 0.75}
        >>> class_columns({"values": {"width": 1.0, "height": 2.0}})
        {'predicted_width': 1.0, 'predicted_height': 2.0}
    """
    rest = {name: value for name, value in prediction.items() if name not in ("probabilities", "values")}
    probabilities, values = prediction.get("probabilities", {}), prediction.get("values", {})
    of_classes = {f"probability_{name}": value for name, value in probabilities.items()}
    return {**columns_of(rest), **columns_of(values), **of_classes}


def text_columns(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """Return a generated text as the column `generated`, with the prompt if there is one; ids without texts stay.

    Example:
        >>> text_columns({"prompt": "1 + 1 =", "generated": " 2", "prompt_ids": [1], "generated_ids": [2]})
        {'prompt_text': '1 + 1 =', 'generated': ' 2'}
    """
    if "generated" not in prediction:
        return dict(prediction)
    prompt = {"prompt_text": prediction["prompt"]} if "prompt" in prediction else {}
    return {**prompt, "generated": prediction["generated"]}
