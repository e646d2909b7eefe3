"""A table in memory as `train` and `predict`: a fit and its predictions are those from the same rows in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pandas
import pytest
import torch

from lora_lightning import AdapterCheckpoint, LoRA, Optim, PredictionWriter, SequenceClassification
from lora_lightning.data import TextClassificationData

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]
Table = pandas.DataFrame | datasets.Dataset
SETTINGS: dict[str, Any] = {"val_size": 4, "test_size": 4, "max_length": 16, "batch_size": 8}


def trainer(*callbacks: L.Callback) -> L.Trainer:
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=list(callbacks), default_root_dir=Path.cwd(), **settings
    )


def trained(train: Any, folder: str) -> Path:
    """Fit on a source and return the last checkpoint."""
    L.seed_everything(3, verbose=False)
    task = SequenceClassification("base", LoRA(r=2, target_modules=["query", "value"]), Optim(lr=1e-2))
    data = TextClassificationData(train=train, **SETTINGS)
    trainer(AdapterCheckpoint(dirpath=folder)).fit(task, data)
    assert task.label_names == ["no", "yes"]
    return Path(folder, "last.ckpt")


def predicted(checkpoint: Path, source: Any, output: str) -> pandas.DataFrame:
    """Predict a source with a checkpoint and read the file back."""
    task = SequenceClassification.load_from_checkpoint(checkpoint)
    data = TextClassificationData.load_from_checkpoint(checkpoint, predict=source)
    trainer(PredictionWriter(output)).predict(task, data, return_predictions=False)
    return pandas.read_csv(output)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint, weights_only=True)
    return {name: value for name, value in content["state_dict"].items() if value.is_floating_point()}


def as_filtered(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Give a frame the index that is left after filtering and sorting."""
    return frame.set_index(pandas.Index(range(100, 100 - len(frame), -1)))


def as_categories(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame.astype({column: "category" for column in frame.columns if column == "label"})


def as_class_labels(frame: pandas.DataFrame) -> datasets.Dataset:
    table = datasets.Dataset.from_pandas(frame)
    return table.class_encode_column("label") if "label" in table.column_names else table


@pytest.mark.parametrize(
    "build",
    [pandas.DataFrame, as_filtered, as_categories, datasets.Dataset.from_pandas, as_class_labels],
    ids=["frame", "filtered", "categories", "dataset", "class labels"],
)
def test_fit_and_predict(here, build: Callable[[pandas.DataFrame], Table]):
    rows = pandas.read_csv("train.csv")
    new = rows[["text"]].iloc[5:12].reset_index(drop=True)
    new.to_csv("new.csv", index=False)

    from_file, from_table = trained("train.csv", "file"), trained(build(rows), "table")
    expected, found = weights(from_file), weights(from_table)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    told, answers = predicted(from_file, "new.csv", "file.csv"), predicted(from_table, build(new), "table.csv")
    pandas.testing.assert_frame_equal(answers, told)
    assert list(answers["text"]) == list(new["text"])
    assert list(answers["index"]) == list(range(7))
    assert set(answers["predicted_label"]) <= {"no", "yes"}

    other = rows.assign(label=rows["label"][::-1].to_list())  # control: other labels train another adapter
    assert any(not torch.equal(value, expected[name]) for name, value in weights(trained(build(other), "x")).items())
