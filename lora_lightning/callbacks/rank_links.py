"""Connections between the ranks of a run, by which each rank notices at once that another is gone."""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_BEAT = 1.0
_LONGEST_LINE = 4096
_SOCKETS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_inherited() -> None:
    """Close the inherited connection in a forked data worker, which would keep it open after its rank is gone."""
    for one in list(_SOCKETS):
        one.close()


os.register_at_fork(after_in_child=_close_inherited)


@dataclass(frozen=True)
class Loss:
    """A rank that is gone.

    Args:
        rank: Its global rank.
        host: Name of its machine.
        how: Cause of its end, as the rest of a sentence: `its process ended …`.
    """

    rank: int
    host: str
    how: str


@dataclass
class _Peer:
    """One open connection; `rank` is None until the other side has identified itself."""

    connection: socket.socket
    rank: int | None = None
    host: str = "?"
    heard_at: float = field(default_factory=time.monotonic)
    left_at: float | None = None
    rest: bytes = b""


class RankLinks(threading.Thread):
    """A thread with a connection to rank 0, or, on rank 0, to all others; both sides send a heartbeat every second.

    A closed connection means that a process ended, a missing heartbeat that a machine or a network failed. Rank 0
    notifies the others.

    Args:
        rank: This process's global rank.
        token: Secret that the other side must send.
        silence: Seconds without a heartbeat after which a rank counts as gone.
        on_loss: Called once, in this thread, when another rank is gone.
        listener: On rank 0, the socket to accept connections on.
        hub: On the others, the connection to rank 0.
    """

    def __init__(
        self,
        rank: int,
        token: str,
        silence: float,
        on_loss: Callable[[Loss], None],
        *,
        listener: socket.socket | None = None,
        hub: socket.socket | None = None,
    ) -> None:
        super().__init__(daemon=True, name="rank-links")
        self._rank, self._token, self._silence, self._on_loss = rank, token, silence, on_loss
        self._listener = listener
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        if listener is not None:
            _SOCKETS.add(listener)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)
        if hub is not None:
            peer = self._add(hub)
            peer.rank, peer.host = 0, str(hub.getpeername()[0])
            self._send(peer, {"token": token, "rank": rank, "host": socket.gethostname()})

    def run(self) -> None:
        """Send and receive heartbeats until the end is requested or a rank is gone."""
        beaten_at = time.monotonic()
        while not self._is_over.is_set():
            for key, _ in self._selector.select(_BEAT):
                if key.data is None:
                    self._accept()
                else:
                    self._receive(key.data)
            pause = time.monotonic() - beaten_at
            if pause >= _BEAT:
                beaten_at += pause
                self._beat(pause)

    def _beat(self, pause: float) -> None:
        """Send a heartbeat on every connection, and find ranks that were silent for too long."""
        now = time.monotonic()
        for peer in list(self._peers):
            if pause > 5 * _BEAT:  # this process itself stood still, and could hear nobody
                peer.heard_at += pause
            self._send(peer, {})
            self._check_clock(peer, now)

    def end(self, message: Mapping[str, Any]) -> None:
        """Notify the others how this rank ends, and close the connections.

        Args:
            message: `{"done": true}` after the work, `{"left": reason}` on the way out, or `{"failed": reason}`.
        """
        self._is_over.set()
        if self._rank == 0 and "failed" in message:
            message = _told(Loss(0, socket.gethostname(), f"it failed with {message['failed']}"))
        for peer in list(self._peers):
            self._send(peer, message)
            self._drop(peer)
        if self._listener is not None:
            self._listener.close()

    def _add(self, connection: socket.socket) -> _Peer:
        connection.settimeout(_BEAT)
        _SOCKETS.add(connection)
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _drop(self, peer: _Peer) -> None:
        with self._lock:
            if peer not in self._peers:
                return
            self._peers.remove(peer)
        with suppress(KeyError, ValueError):  # closed already, by the other thread
            self._selector.unregister(peer.connection)
        peer.connection.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):  # who hung up before being accepted was no rank
            self._add(self._listener.accept()[0])

    def _send(self, peer: _Peer, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # a broken connection is noticed where it is read
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(_LONGEST_LINE)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(peer)
            return
        peer.heard_at = time.monotonic()
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        if len(peer.rest) > _LONGEST_LINE:
            self._drop(peer)
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or not self._take(peer, message):
                self._drop(peer)
                return

    def _take(self, peer: _Peer, message: dict[str, Any]) -> bool:
        """Process a message; return False if the sender is unknown."""
        if peer.rank is None:
            if message.get("token") != self._token:
                return False
            peer.rank, peer.host = int(message["rank"]), str(message["host"])
        elif "lost" in message:
            self._lose(Loss(*message["lost"]))
        elif "failed" in message:
            self._lose(Loss(peer.rank, peer.host, f"it failed with {message['failed']}"))
        elif "left" in message:
            peer.left_at = time.monotonic()
        elif "done" in message:
            self._drop(peer)
        return True

    def _hang_up(self, peer: _Peer) -> None:
        if peer.left_at is None:
            self._drop(peer)
            if peer.rank is not None and not self._is_over.is_set():
                self._lose(Loss(peer.rank, peer.host, "its process ended without a word (killed, or out of memory)"))
        else:  # it said so; what is left is to see whether this rank manages to end as well
            with suppress(KeyError, ValueError):
                self._selector.unregister(peer.connection)

    def _check_clock(self, peer: _Peer, now: float) -> None:
        if peer.left_at is not None:
            if now - peer.left_at > self._silence:
                self._lose(Loss(peer.rank or 0, peer.host, "it left the run"))
        elif now - peer.heard_at > self._silence:
            self._drop(peer)
            if peer.rank is not None:
                how = "(its machine or network is down, or it hangs)"
                self._lose(Loss(peer.rank, peer.host, f"nothing was heard from it for {self._silence:g} seconds {how}"))

    def _lose(self, loss: Loss) -> None:
        if self._is_over.is_set():
            return
        self._is_over.set()
        if self._rank == 0:
            for peer in list(self._peers):
                self._send(peer, _told(loss))
        self._on_loss(loss)


def _told(loss: Loss) -> dict[str, Any]:
    return {"lost": [loss.rank, loss.host, loss.how]}
