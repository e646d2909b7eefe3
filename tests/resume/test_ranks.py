"""Two gloo ranks that are stopped and resumed, and one that goes on where they were stopped."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resume.runs import NUM_EPOCHS, NUM_ROWS, Reader, SaveAfter, TokenCounter, Tokens, fit, token_rows

WORLD, BATCH_SIZE = 2, 3
NUM_BATCHES = 5  # of each rank in an epoch: 13 rows
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def run(folder: Path, task: type, num_workers: int, ranks: int, stops: tuple[int, ...], name: str, **more: Any) -> None:
    settings = {"accumulate_grad_batches": 2, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", **more}
    data = Tokens(num_workers, batch_size=BATCH_SIZE)
    trace, weights = fit(task(), data, SaveAfter(folder, stops), **settings)
    rank = os.environ.get("LOCAL_RANK", "0")
    torch.save([trace.losses, trace.rows, trace.epochs, weights], folder / f"{name}_{rank}.pt")


def rank_main(rank: int, port: int, folder: Path, task: type, num_workers: int, stops: tuple[int, ...]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update(address, LOCAL_RANK=str(rank), NODE_RANK="0")
    run(folder, task, num_workers, WORLD, stops, "full", seed=11 + rank)
    for stop in stops:
        path = folder / f"{stop}.ckpt"
        run(folder, task, num_workers, WORLD, (), f"after_{stop}", seed=90 + rank, ckpt_path=path)


def run_ranks(folder: Path, task: type, num_workers: int, stops: tuple[int, ...]) -> None:
    """Run the ranks in two forks of a process that has imported everything and run nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.runs"])
    ranks = [
        context.Process(target=rank_main, args=(rank, port, folder, task, num_workers, stops)) for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(840)  # less than a test may take
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def load(folder: Path, name: str, rank: int) -> Any:
    return torch.load(folder / f"{name}_{rank}.pt", weights_only=True)


def check(folder: Path, task: type, num_workers: int, stops: tuple[int, ...]) -> None:
    run_ranks(folder, task, num_workers, stops)
    full = [load(folder, "full", rank) for rank in range(WORLD)]
    assert full[0][0] != full[1][0]
    for stop in stops:
        for rank in range(WORLD):
            losses, rows, _, weights = load(folder, f"after_{stop}", rank)
            assert losses == {number: loss for number, loss in full[rank][0].items() if number > stop}
            assert rows == {number: batch for number, batch in full[rank][1].items() if number > stop}
            assert all(torch.equal(weight, full[rank][3][name]) for name, weight in weights.items())
        random = torch.load(folder / f"{stop}.ckpt", weights_only=True)["exact_resume"]["ranks"]
        assert not torch.equal(random[0]["random"]["cpu"], random[1]["random"]["cpu"])  # each has its own


def test_two_ranks_and_then_one(tmp_path, capfd):
    check(tmp_path, Reader, 0, (3, 8))
    run(tmp_path, Reader, 0, 1, (), "alone", seed=99, ckpt_path=tmp_path / "8.ckpt")
    told = capfd.readouterr().err
    assert "The checkpoint was written by 2 ranks, and there are 1 now." in told
    assert "begun by 2 ranks with batches of 3; its remaining rows are divided among 1 with batches of 3" in told
    _, rows, epochs, _ = load(tmp_path, "alone", 0)
    passed = [load(tmp_path, "full", rank)[1][number] for rank in range(WORLD) for number in (6, 7, 8)]
    rest = [batch for number, batch in rows.items() if epochs[number] == 1]
    seen = [tuple(token for token in row if token) for batch in (*passed, *rest) for row in batch]
    assert sorted(seen) == sorted(map(tuple, token_rows()))
    assert list(epochs.values()).count(2) == -(-NUM_ROWS // BATCH_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("task", [Reader, TokenCounter])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_stop_of_two_ranks(task, num_workers, tmp_path):
    check(tmp_path, task, num_workers, tuple(range(1, NUM_BATCHES * NUM_EPOCHS, 3)))
