"""`compare` refuses data that it cannot split before anything trains."""

from pathlib import Path

import pytest

from tests.commands import compare_toys
from tests.mistakes.lines import mistake

COMPARE = ["compare", "--config", "compare.yaml", "--methods=[BitFit]", "--steps=1", "--search_steps=1"]
CONFIG = """\
model: {class_path: SequenceClassification, init_args: {backbone: base}}
data: {class_path: TextClassificationData, init_args: {train: train.csv, max_length: 16}}
"""


class Untested(compare_toys.PointData):
    """Has no test split."""

    test_dataloader = compare_toys.L.LightningDataModule.test_dataloader


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--data.test_size=0"], "There are no rows to test: test_size is 0. Set it, or give a file as test."),
        (["--data.val_size=0"], "There are no rows to validate: val_size is 0. Set it, or give a file as val."),
        (["--data.test_size=0.9", "--data.val_size=0.9"], "The sizes ask for 72 rows (val 36, test 36)"),
    ],
)
def test_data_without_a_split(here, capsys, settings, words):
    Path("compare.yaml").write_text(CONFIG)
    assert words in mistake(capsys, *COMPARE, *settings)


def test_a_data_module_without_a_test_loader(here, capsys):
    Path("compare.yaml").write_text(
        f"model: {{class_path: tests.commands.compare_toys.Points}}\ndata: {{class_path: {__name__}.Untested}}\n"
    )
    error = mistake(capsys, *COMPARE)
    assert error == "Untested defines no test_dataloader, on whose rows methods are compared; define it."
