"""What the tests of InstructionData share: records, a model that writes its batches down, and a short run."""

import lightning as L
import torch

PAIRS = [{"prompt": f"question {index} ", "completion": f"answer {index}"} for index in range(40)]


def everything(loader):
    return sorted([token for token in row.tolist() if token != -100] for batch in loader for row in batch["labels"])


class Model(L.LightningModule):
    """As much of a task as the data looks at, with every batch written down."""

    def __init__(self, backbone=None, model=None):
        super().__init__()
        self.backbone, self.model = backbone, model
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["input_ids"].tolist()))
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, model, **settings):
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, **settings},
    ).fit(model, data)
    return model
