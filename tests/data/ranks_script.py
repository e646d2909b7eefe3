"""Trains over two processes and writes down which rows each of them saw; run as a file."""

import json
import sys
from pathlib import Path

import lightning as L
import torch

from lora_lightning.data import TextClassificationData
from tests.ranks import leave


class CountedData(TextClassificationData):
    """Counts the texts that this process reads and encodes."""

    num_read = num_encoded = 0

    def row_of(self, record, split):
        self.num_read += 1
        return super().row_of(record, split)

    def encode(self, rows, split, counts):
        self.num_encoded += len(rows)
        return super().encode(rows, split, counts)


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "predict": []}

    def note(self, split, batch):
        self.seen[split].append([self.current_epoch, batch["input_ids"][:, 1].tolist()])

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def predict_step(self, batch, batch_idx):
        self.note("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    csv, tokenizer, out = sys.argv[1:]
    data = CountedData(csv, val_size=17, test_size=11, batch_size=4, tokenizer=tokenizer)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Recorder()
    trainer.fit(module, data)
    trainer.predict(module, data)
    counted = {"read": data.num_read, "encoded": data.num_encoded}
    Path(out, f"{trainer.global_rank}.json").write_text(json.dumps({**module.seen, **counted}))
    leave()
