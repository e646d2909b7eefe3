"""Validates on two sets over two processes and writes down each rank's figures; run as a file."""

import sys
from pathlib import Path

import torch

from tests.ranks import leave
from tests.tasks import languages
from tests.tasks.languages import Speaker
from tests.tasks.test_evaluation import loaders_of, seeded
from tests.tasks.toys import trainer

if __name__ == "__main__":
    backbone, out = sys.argv[1:]
    torch.set_num_threads(1)
    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    rank = trainer(**settings).global_rank
    figures = {}
    for problem in ("single_label", "multi_label"):
        # The sets have batches of 16 and 8, and of 16, 16 and 8 rows: the ranks have different numbers of rows.
        own = {name: languages.loader(list(loader)[rank::2]) for name, loader in loaders_of(problem).items()}
        figures[problem] = trainer(**settings).validate(seeded(backbone, problem), own, verbose=False)[0]
    parts = {"long": languages.batches((31, 14)), "short": languages.batches((5, 7))}
    own = {name: languages.loader(part[rank::2]) for name, part in parts.items()}
    figures["tokens"] = trainer(**settings).validate(Speaker(), own, verbose=False)[0]
    torch.save(figures, Path(out) / f"{rank}.pt")
    leave()
