"""What runs the tutorials notices a block that fails, and leaves out what is only shown."""

import pytest

from tests.docs.pages import Block, PageError, blocks_of, run_page

PAGE = """
```python
# shown.py
NUMBER = 3
```

```python
from shown import NUMBER
```

Text between two blocks of one script.

```python
print("number", NUMBER)
```

```text
never run
```

```sh
ls *.py
```
"""


def test_blocks_are_files_scripts_and_commands():
    assert blocks_of(PAGE) == [
        Block("python", "# shown.py\nNUMBER = 3\n", "shown.py"),
        Block("python", 'from shown import NUMBER\n\nprint("number", NUMBER)\n'),
        Block("sh", "ls *.py\n"),
    ]


def test_they_run_in_order_in_the_folder(tmp_path):
    assert run_page(PAGE, tmp_path, tmp_path / "cache") == "number 3\nshown.py\n"


@pytest.mark.parametrize("block", ["```sh\nfalse\n```", "```python\nassert False\n```", "```sh\nfalse | true\n```"])
def test_a_block_that_fails_is_shown(block, tmp_path):
    with pytest.raises(PageError, match="status 1 of"):
        run_page(block, tmp_path, tmp_path / "cache")
