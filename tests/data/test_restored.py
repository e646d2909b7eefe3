"""After a loader that could not be made, the process runs again."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.data.batches.restored import restore_loader_classes


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, index):
        return self.layer(batch[0]).sum()

    def predict_step(self, batch, index):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Failing(L.LightningDataModule):
    def train_dataloader(self):
        raise ValueError("no rows")


def trainer() -> L.Trainer:
    return L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(4, 2)), 4)  # the batch size by position


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_failed_loader_leaves_no_trace():
    own = DataLoader.__dict__["__init__"]
    with pytest.raises(ValueError, match="no rows"):
        trainer().fit(Line(), datamodule=Failing())
    assert DataLoader.__dict__["__init__"] is not own  # what Lightning leaves
    with pytest.raises(Exception, match="more than one `__init__` argument"):
        trainer().predict(Line(), loader())
    restore_loader_classes()
    assert DataLoader.__dict__["__init__"] is own
    assert len(trainer().predict(Line(), loader())) == 1
