"""Copies into pinned memory wait for what they copy, and are waited for; the streams here only write down."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lora_lightning.tasks.offload import PinnedMemory


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"


@pytest.fixture
def log(monkeypatch):
    """Put streams that write down what they are told in CUDA's place, and any memory in that of pinned memory."""
    log: list[str] = []
    empty, copy = torch.empty, torch.Tensor.copy_

    def pinned(*size, pin_memory=False, **settings):
        log.extend(["pinned memory"] if pin_memory else [])
        return empty(*size, **settings)

    @contextlib.contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    def copying(target, source, *, non_blocking=False):
        log.append(f"copy {'and go on' if non_blocking else 'and wait'}")
        return copy(target, source)

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copying", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("computing", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    return log


def test_a_copy_starts_after_what_computes_its_source(log):
    copied = PinnedMemory()(torch.arange(6, dtype=torch.uint8))
    assert log == ["copying waits for computing", "pinned memory", "on copying", "copy and go on", "off copying",
                   "copying records"]  # fmt: skip
    log.clear()
    copied.wait()
    assert log == ["computing waits for event of copying"]
    log.clear()
    assert copied.restore().tolist() == [*range(6)]
    assert log == ["computing waits for event of copying"]


def test_a_device_has_one_stream(log, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or Stream("copying", log))
    store = PinnedMemory()
    for _ in range(2):
        store(torch.ones(2))
    assert made == [torch.device("cpu")]
