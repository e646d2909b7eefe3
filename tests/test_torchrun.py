"""A run over two nodes, started by torchrun as docs/distributed.md says, where possible in two network namespaces."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

NODES = ("lora_node0", "lora_node1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """How to run a command on each of two nodes, their addresses, and their network interface.

    Two namespaces joined by a cable; where the machine does not allow these (CI without root), both nodes are this
    machine, and the rendezvous is the same.
    """
    with ExitStack() as stack:
        try:
            for node in NODES:
                ip("netns", "add", node)
                stack.callback(ip, "netns", "del", node)
            ip("link", "add", "lora0", "netns", NODES[0], "type", "veth", "peer", "name", "lora0", "netns", NODES[1])
        except (OSError, subprocess.CalledProcessError):
            stack.close()
            yield [[], []], ("127.0.0.1", "127.0.0.1"), "lo"
            return
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "lora0")
            ip("-n", node, "link", "set", "lora0", "up")
            ip("-n", node, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", node] for node in NODES], ADDRESSES, "lora0"


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_two_nodes(nodes, tmp_path, record_property):
    prefixes, addresses, interface = nodes
    record_property("network", interface)
    port = free_port()
    variables = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "PYTHONWARNINGS": "ignore"}
    agents = []
    with ExitStack() as stack:
        for rank, (prefix, address) in enumerate(zip(prefixes, addresses, strict=True)):
            command = [
                *(*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={addresses[0]}:{port}", "--rdzv-id=test"),
                *(f"--rdzv-conf=is_host={int(rank == 0)}", f"--local-addr={address}"),
                *("-m", "tests.torchrun_script", str(tmp_path)),
            ]
            log = stack.enter_context((tmp_path / f"log{rank}").open("w"))
            agents.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
            stack.callback(agents[-1].kill)
        statuses = [agent.wait(timeout=570) for agent in agents]
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert statuses == [0, 0], "\n".join(log[-2000:] for log in logs)
    assert not any("does not reach RankWatch" in log for log in logs)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for strategy, end in first.items():
        assert (end["world"], end["address"]) == (2, addresses[0])
        assert {end["node"], second[strategy]["node"]} == {0, 1}
        for name, tensor in end["state"].items():
            assert torch.equal(tensor, second[strategy]["state"][name]), name
            torch.testing.assert_close(tensor, first["ddp"]["state"][name], rtol=0, atol=1e-6)
    kept = {path.name for path in (tmp_path / "fsdp2").iterdir()}
    assert {"last", "last.ckpt"} <= kept
