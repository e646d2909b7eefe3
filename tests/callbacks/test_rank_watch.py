"""When a rank is gone, the others hear which, and end; nobody is taken for gone who is not."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lora_lightning.callbacks import RankWatch
from lora_lightning.callbacks import rank_links as module
from lora_lightning.callbacks.rank_links import Loss, RankLinks
from lora_lightning.callbacks.rank_watch import _is_of_communication, _listen
from lora_lightning.errors import ConfigError, RankLost
from tests.callbacks import lost_rank_script
from tests.callbacks.runs import LIGHTNING_WARNINGS

pytestmark = LIGHTNING_WARNINGS
TOKEN, HOST = "secret", socket.gethostname()


class Crew:
    """The links of some ranks, all in this process; `heard[rank]` is what a rank was told of."""

    def __init__(self, size: int, silence: float = 30.0) -> None:
        self.heard: dict[int, list[Loss]] = {rank: [] for rank in range(size)}
        listener = _listen()
        self.port = listener.getsockname()[1]
        self.links = [RankLinks(0, TOKEN, silence, self.heard[0].append, listener=listener)]
        for rank in range(1, size):
            hub = socket.create_connection(("127.0.0.1", self.port))
            self.links.append(RankLinks(rank, TOKEN, silence, self.heard[rank].append, hub=hub))
        for link in self.links:
            link.start()
        self.wait_for(lambda: sum(peer.rank is not None for peer in self.links[0]._peers) == size - 1)

    def wait_for(self, happened, seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, self.heard
            time.sleep(0.02)

    def kill(self, rank: int) -> None:
        """Break a rank's connection as the kernel does when its process dies."""
        self.links[rank]._is_over.set()
        for peer in list(self.links[rank]._peers):
            peer.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for link in self.links:
            link.end({"done": True})


@pytest.fixture
def crew():
    with contextlib.ExitStack() as stack:

        def make(*args, **settings):
            found = Crew(*args, **settings)
            stack.callback(found.close)
            return found

        yield make


def test_a_broken_connection_tells_all_others_at_once(crew):
    ranks = crew(3)
    ranks.kill(2)
    ranks.wait_for(lambda: ranks.heard[0] and ranks.heard[1])
    expected = Loss(2, HOST, "its process ended without a word (killed, or out of memory)")
    assert ranks.heard == {0: [expected], 1: [expected], 2: []}


def test_the_end_of_rank_0_is_heard_too(crew):
    ranks = crew(3)
    ranks.kill(0)
    ranks.wait_for(lambda: ranks.heard[1] and ranks.heard[2])
    assert [loss.rank for loss in ranks.heard[1] + ranks.heard[2]] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_passed_on(crew, rank):
    ranks = crew(3)
    ranks.links[rank].end({"failed": "OutOfMemoryError: no room"})
    ranks.wait_for(lambda: ranks.heard[1 - rank] and ranks.heard[2])
    expected = Loss(rank, HOST, "it failed with OutOfMemoryError: no room")
    assert ranks.heard[1 - rank] == ranks.heard[2] == [expected]


def test_who_is_done_or_slow_is_not_lost(crew, monkeypatch):
    monkeypatch.setattr(module, "_BEAT", 0.05)
    ranks = crew(3, silence=0.5)
    ranks.links[1].end({"done": True})
    time.sleep(1.0)  # twice the silence that is allowed, in which only beats are sent
    assert ranks.heard == {0: [], 1: [], 2: []}


def test_silence_is_noticed(crew, monkeypatch):
    monkeypatch.setattr(module, "_BEAT", 0.05)
    ranks = crew(3, silence=0.5)
    ranks.links[2]._is_over.set()  # the connection stays open, and nothing comes
    ranks.wait_for(lambda: ranks.heard[0] and ranks.heard[1])
    [loss] = ranks.heard[0]
    assert loss.rank == 2
    assert loss.how.startswith("nothing was heard from it for 0.5 seconds")


def test_who_left_counts_as_lost_only_when_the_others_do_not_end(crew, monkeypatch):
    monkeypatch.setattr(module, "_BEAT", 0.05)
    ranks = crew(2, silence=1.0)
    ranks.links[1].end({"left": "SIGTERM"})
    time.sleep(0.4)
    assert not ranks.heard[0]
    ranks.wait_for(lambda: ranks.heard[0])
    assert ranks.heard[0] == [Loss(1, HOST, "it left the run")]


@pytest.mark.parametrize(
    "said",
    [b"", b"hello\n", b'{"token": "guessed", "rank": 1, "host": "x"}\n{"failed": "all"}\n', b"[1]\n", b"x" * 20_000],
)
def test_strangers_are_not_heard(crew, said):
    ranks = crew(2)
    with socket.create_connection(("127.0.0.1", ranks.port)) as stranger, contextlib.suppress(OSError):
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(10)
        while stranger.recv(100):
            pass
    assert ranks.heard == {0: [], 1: []}
    ranks.kill(1)
    ranks.wait_for(lambda: ranks.heard[0])


def test_a_forked_worker_does_not_hold_the_connection(crew):
    ranks = crew(2)
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:  # as a data worker, which outlives its rank for a while
        os.read(read, 1)
        os._exit(0)
    try:
        for peer in list(ranks.links[1]._peers):
            ranks.links[1]._is_over.set()
            peer.connection.close()  # not shut down: the kernel ends it once nobody has it open
        ranks.wait_for(lambda: ranks.heard[0])
    finally:
        os.write(write, b"x")
        os.waitpid(worker, 0)


def test_what_failed_communication_is():
    assert _is_of_communication(torch.distributed.DistNetworkError("x"))
    assert _is_of_communication(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:2"))
    assert not _is_of_communication(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not _is_of_communication(ConfigError("gloo"))


def test_settings():
    with pytest.raises(ConfigError, match="timeout must be above 3 seconds"):
        RankWatch(timeout=1)
    with pytest.raises(ConfigError, match="grace must be at least 0"):
        RankWatch(grace=-1)
    copy = pickle.loads(pickle.dumps(RankWatch(timeout=9, grace=2)))
    assert (copy.timeout, copy.grace) == (9, 2)


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_rank_that_waits_forever_is_ended(monkeypatch, capsys, ends_itself):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    watch = RankWatch(grace=0.1)
    if ends_itself:
        watch._is_ending.set()
    watch._note(Loss(3, "node7", "it left the run"))
    assert statuses == ([] if ends_itself else [75])
    sentence = (
        "lora-lightning: error: Rank 3 on node7 is gone: it left the run. The run ends; it had saved no checkpoint"
    )
    assert (sentence in capsys.readouterr().err) is not ends_itself


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The epoch was begun by 2 ranks")  # its plain loader cannot deal rows anew
def test_killing_one_of_two_ranks_ends_the_other_and_the_run_resumes(tmp_path):
    """As issue 5 shows it: SIGKILL to one rank; the other ends within 60 seconds and names it."""
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.callbacks.lost_rank_script", str(tmp_path)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)
    died_at = float((tmp_path / "died_at").read_text())
    assert time.time() - died_at < 60
    assert done.returncode == RankLost.status, done.stderr[-2000:]
    found = re.search(
        r"Rank 1 on \S+ is gone: its process ended without a word.*--ckpt_path (\S+)\.$", done.stderr, re.M
    )
    assert found, done.stderr[-2000:]
    kept = Path(found[1])
    assert torch.load(kept, weights_only=True)["global_step"] == lost_rank_script.LAST_STEP
    trainer = lost_rank_script.fit(tmp_path, devices=1, strategy="auto", ckpt_path=kept)
    assert trainer.global_step == 2 * trainer.num_training_batches


def test_no_watch_in_a_run_of_one_process(tmp_path):
    lost_rank_script.fit(tmp_path, devices=1, strategy="auto")
    assert "rank-links" not in {thread.name for thread in threading.enumerate()}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
