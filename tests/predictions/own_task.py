"""A task and a data module of a user's own, for the command line."""

import torch
from torch.utils.data import DataLoader

from tests.cli_toys import ToyData, ToyTask


class Sums(ToyTask):
    """Adds up points."""

    def predict(self, batch):
        return {"sum": batch["x"].sum(1)}


class Points(ToyData):
    """Points to predict, with names."""

    def predict_dataloader(self):
        return DataLoader(
            [{"x": torch.full((4,), float(one))} for one in range(self.num_points)], batch_size=self.batch_size
        )

    def input_rows(self, dataloader_idx):
        return ({"name": f"point {one}"} for one in range(self.num_points))
