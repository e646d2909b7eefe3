"""YAML files of dialogues."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lightning.data.sources.record import ReadSettings, Record
from lora_lightning.data.sources.text import checked, text_lines
from lora_lightning.errors import DataError

_MAX_DEPTH = 64


def read_dialogues(path: Path, name: str, settings: ReadSettings) -> Iterator[Record]:
    """Read chatterbot's dialogues: a list of lists of texts under `conversations`; scalars are not converted.

    Raises:
        DataError: The file is not valid YAML, or holds no dialogues.
    """
    import yaml

    text = "".join(checked(text_lines(path, name, settings.encoding)))
    try:
        root = _compose(text, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataError(f"{name}{where}: this is not valid YAML ({reason}).") from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    dialogues = next((value for key, value in pairs if key.value == "conversations"), None)
    if not isinstance(dialogues, yaml.SequenceNode):
        raise DataError(f"{name} holds no dialogues: expected a list of lists of texts under 'conversations'.")
    for node in dialogues.value:
        turns = node.value if isinstance(node, yaml.SequenceNode) else [node]
        texts = [turn.value if isinstance(turn, yaml.ScalarNode) else None for turn in turns]
        yield Record(name, node.start_mark.line + 1, "line", {"dialogue": texts})


def _compose(text: str, name: str) -> Any:  # noqa: ANN401 - one of yaml's nodes
    """Parse YAML into nodes, after a look at its depth: libyaml composes nested nodes until the process crashes."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise DataError(
                f"{name}, line {line}: nested more than {_MAX_DEPTH} levels deep; expected a list "
                "of lists of texts under 'conversations'."
            )
    return yaml.compose(text, Loader=loader)
