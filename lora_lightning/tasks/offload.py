"""Offload saved tensors to host memory, and copy them back when backward needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 1 << 20
"""Smaller tensors stay on the device: the copies would take too much time for the memory that they free."""

NUM_IN_FLIGHT = 4
"""Tensors that may stay on the device until their copies are complete, and that forward can still read there."""


class HostCopy(Protocol):
    """A copy of a tensor in host memory that may not be complete yet."""

    def wait(self) -> None:
        """Make the device's next operations wait for the copy."""

    def restore(self) -> Tensor:
        """Return the tensor on its device, as a new one."""


class PinnedMemory:
    """Copies tensors of a CUDA device into pinned host memory, on a separate stream."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, data: Tensor) -> HostCopy:
        """Start to copy a tensor; the caller must keep it alive and unchanged until `wait` has returned.

        Args:
            data: Any shape and dtype, on a CUDA device.
        """
        if data.device not in self._streams:
            self._streams[data.device] = torch.cuda.Stream(data.device)  # type: ignore[no-untyped-call]  # torch's
        stream = self._streams[data.device]
        stream.wait_stream(torch.cuda.current_stream(data.device))
        host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(data, non_blocking=True)
        return _PinnedCopy(host, data.device, stream.record_event())


@dataclass(frozen=True)
class _PinnedCopy:
    host: Tensor
    device: torch.device
    done: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def restore(self) -> Tensor:
        self.wait()
        return self.host.to(self.device, non_blocking=True)


_PINNED_MEMORY = PinnedMemory()  # one for all steps, so that their copies queue on one stream of each device


def is_on_cuda(tensor: Tensor) -> bool:
    """Return whether a tensor is on a device whose memory is not the host's."""
    return tensor.device.type == "cuda"


class OffloadActivations(saved_tensors_hooks):
    """Keep in host memory what a forward pass run inside saves for backward.

    Parameters and buffers of the model and views of them, tensors smaller than `min_bytes` and tensors outside CUDA
    devices stay in place. A storage that several operations save is copied once, as a whole, in each direction. Inside
    a checkpointed region only its inputs are saved. When the block ends, every copy has been started, and the device's
    memory can be reused.

    As without these hooks, backward refuses a saved tensor that was overwritten in the meantime; a tensor whose copy
    was complete by then has its old values.

    Args:
        model: Its parameters and buffers stay. Do not use it with sharded models (FSDP): their gathered weights look
            like activations.
        store: Takes a tensor of bytes, `[num_bytes]`, and returns its copy in host memory.
        is_movable: Returns by its device whether a tensor is moved.
        min_bytes: Size of the smallest storage that is moved.

    Attributes:
        num_bytes: Bytes moved to host memory so far.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> offload = OffloadActivations(model)
        >>> with offload:  # on the CPU there is nothing to move
        ...     loss = model(torch.ones(2, 4)).square().sum()
        >>> loss.backward()
        >>> offload.num_bytes
        0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        store: Callable[[Tensor], HostCopy] | None = None,
        is_movable: Callable[[Tensor], bool] = is_on_cuda,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        super().__init__(self._pack, self._unpack)
        self.num_bytes = 0
        self._model = model
        self._store = store or _PINNED_MEMORY
        self._is_movable, self._min_bytes = is_movable, min_bytes
        self._own: set[int] = set()
        self._known: WeakValueDictionary[tuple[int, int], _Moved] = WeakValueDictionary()
        self._addresses: list[StorageWeakRef] = []  # so that none of a known storage is given to another one
        self._in_flight: deque[_Moved] = deque()

    def __enter__(self) -> None:
        """Update the addresses of the model's own tensors, which may have moved since the last step."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors if type(tensor.data) is Tensor}
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Release the tensors on the device."""
        super().__exit__(*error)
        while self._in_flight:
            self._in_flight.popleft().settle()
        self._known.clear()
        self._addresses.clear()

    def _pack(self, tensor: Tensor) -> _Kept | _Part:
        if not self._moves(tensor):
            return _Kept(tensor, tensor._version)
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version
        moved = self._known.get(key)
        if moved is None:
            moved = self._known[key] = self._move(tensor)
            self._addresses.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return _Part(moved, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _moves(self, tensor: Tensor) -> bool:
        is_plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
        if not is_plain or not self._is_movable(tensor) or tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= self._min_bytes and storage._cdata not in self._own

    def _move(self, tensor: Tensor) -> _Moved:
        storage = tensor.untyped_storage()
        copy = self._store(_view(storage, torch.uint8, (storage.nbytes(),), (1,), 0))
        moved = _Moved(copy, tensor.detach(), tensor._version)
        self.num_bytes += storage.nbytes()
        self._in_flight.append(moved)
        if len(self._in_flight) > NUM_IN_FLIGHT:
            self._in_flight.popleft().settle()
        return moved

    @staticmethod
    def _unpack(saved: _Kept | _Part) -> Tensor:
        return saved.get()


def _view(
    storage: torch.UntypedStorage, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> Tensor:
    """Return a tensor on a storage."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)


def _check_unchanged(is_unchanged: bool) -> None:
    if not is_unchanged:
        raise RuntimeError(
            "A tensor that backward needs was overwritten by an in-place operation after it had been saved "
            "(offload_activations); use the operation's out-of-place form."
        )


class _Kept(NamedTuple):
    """A tensor that stays where it is; autograd leaves it to hooks to notice when one is overwritten."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        _check_unchanged(self.tensor._version == self.version)
        return self.tensor


class _Moved:
    """A storage in host memory.

    It holds the tensor until the copy is complete. When backward asks for it, it holds the new tensor until all
    operations that saved it are done: they ask in turn, and see each other's in-place changes.
    """

    def __init__(self, copy: HostCopy, source: Tensor, version: int) -> None:
        self.copy, self.version = copy, version
        self.source: Tensor | None = source
        self.is_unchanged = True
        self.back: Tensor | None = None

    def settle(self) -> None:
        """Release the tensor on the device."""
        assert self.source is not None
        self.copy.wait()
        self.is_unchanged = self.source._version == self.version
        self.source = None


class _Part(NamedTuple):
    """A saved tensor: a view of a storage in host memory."""

    moved: _Moved
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        moved, source = self.moved, self.moved.source
        if source is not None:
            _check_unchanged(source._version == moved.version)
            if source.dtype is self.dtype:  # a view shares the version, so that it is known when it is saved again
                return source.as_strided(self.size, self.stride, self.offset)
            return _view(source.untyped_storage(), self.dtype, self.size, self.stride, self.offset)
        _check_unchanged(moved.is_unchanged)
        if moved.back is None:
            moved.back = moved.copy.restore()
        return _view(moved.back.untyped_storage(), self.dtype, self.size, self.stride, self.offset)
