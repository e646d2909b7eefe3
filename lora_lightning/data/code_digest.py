"""The code that reads and encodes data, as a part of the keys under which its results are kept."""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path

_FOREIGN = ("abc", "builtins", "lightning", "lightning_utilities", "typing")


@functools.cache
def code_digest(cls: type) -> str | None:
    """Return a digest of this package's code and of the files that define a class and its bases.

    Without it, rows that another version of the code has encoded would be taken for this one's.

    Args:
        cls: A data module.

    Returns:
        64 hexadecimal digits; None if a file cannot be read, as of a class that was defined at a prompt.
    """
    digest = hashlib.sha256()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in _FOREIGN:
            continue
        try:
            digest.update(Path(inspect.getfile(base)).read_bytes())
        except (OSError, TypeError):
            return None
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
