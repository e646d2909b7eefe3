"""Finds phrases that are not plain technical English: none in the documentation, no new ones in the package."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASELINE = Path("scripts") / "words.json"
INSTEAD = {
    r"nobody": "say what is not known or not read",
    r"(is|are|was|were) told": "is reported, printed or passed",
    r"all the same": "also, or still",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"(is|are) no(?! longer| more| less)": "is not a",
    r"to be made of": "name the value",
    r"bit for bit": "bit-exactly",
    r"tells? whether": "return whether",
    r"dealt": "divided",
    r"place of the": "index, position or path of the",
}
"""What to write instead of each phrase; the phrases are regular expressions for whole words."""

PHRASE = re.compile("|".join(rf"\b(?:{phrase})\b" for phrase in INSTEAD), re.IGNORECASE)
PAGES = ("*.md", "docs/**/*.md")
GENERATED = ("docs/_build", "docs/reference/generated", "docs/compare_tweets", "docs/compare_lora_plus")


@dataclass(frozen=True)
class Hit:
    """A phrase that should not be there.

    Args:
        path: The file, relative to the project.
        line: Its line, from 1.
        phrase: The text.
    """

    path: Path
    line: int
    phrase: str

    @property
    def folder(self) -> str:
        """What the baseline counts it under: a folder of the package, or the page itself."""
        return "/".join(self.path.parts[:2]) if self.path.parts[0] == "lora_lightning" else str(self.path)

    def __str__(self) -> str:
        """Return the place, the phrase, and what to write instead."""
        instead = next(text for phrase, text in INSTEAD.items() if re.match(phrase, self.phrase, re.IGNORECASE))
        return f"{self.path}:{self.line}: {self.phrase!r}: {instead}"


def hits_in(text: str, path: Path, first_line: int = 1) -> Iterator[Hit]:
    """Yield the phrases in a text that begins at a line of a file; code in backticks counts too."""
    joined = re.sub(r"\n\s*", lambda match: " " * len(match.group()), text)  # a phrase may span two lines
    for match in PHRASE.finditer(joined):
        yield Hit(path, first_line + text.count("\n", 0, match.start()), match.group())


def hits_in_pages(root: Path) -> Iterator[Hit]:
    """Yield the phrases in the documentation."""
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            relative = path.relative_to(root)
            if not str(relative).startswith(GENERATED):
                yield from hits_in(path.read_text(encoding="utf-8"), relative)


def hits_in_package(root: Path) -> Iterator[Hit]:
    """Yield the phrases in docstrings and other texts of the package, such as messages; comments are not read."""
    for path in sorted((root / "lora_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from hits_in(node.value, path.relative_to(root), node.lineno)


def all_hits(root: Path) -> list[Hit]:
    """Return every phrase of the documentation and the package."""
    return [*hits_in_pages(root), *hits_in_package(root)]


def counts(hits: list[Hit]) -> dict[str, int]:
    """Return the number of phrases by folder or page, sorted."""
    return dict(sorted(Counter(hit.folder for hit in hits).items()))


def baseline(root: Path) -> dict[str, int]:
    """Return how many phrases each folder may have."""
    found: dict[str, int] = json.loads((root / BASELINE).read_text(encoding="utf-8"))
    return found


def new_hits(root: Path) -> list[str]:
    """Return a line for each folder that has more phrases than it may have, followed by its phrases."""
    hits, allowed = all_hits(root), baseline(root)
    lines: list[str] = []
    for folder, number in counts(hits).items():
        if number > allowed.get(folder, 0):
            lines.append(f"{folder} has {number} phrases, and may have {allowed.get(folder, 0)}:")
            lines += [f"  {hit}" for hit in hits if hit.folder == folder]
    return lines


def main(arguments: list[str]) -> int:
    """List, check or write; return the exit status."""
    if arguments == ["--list"]:
        print(*all_hits(ROOT), sep="\n")
        return 0
    if arguments == ["--write"]:
        (ROOT / BASELINE).write_text(json.dumps(counts(all_hits(ROOT)), indent=2) + "\n", encoding="utf-8")
        return 0
    lines = new_hits(ROOT)
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
