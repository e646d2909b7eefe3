"""Parameters of modules that no codec reads and that are not experts of transformers' layout, such as a router's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.experts import DENSE, expert_weights
from lora_lightning.adapters.weights import Host, find_codec, original_class


def bare_weights(host: Host) -> tuple[str, ...]:
    """Return the names of the dense 2-D and 3-D parameters of a module that computes with them itself.

    Nothing for a module with a codec, for experts in transformers' layout, and for one without a forward of its own.
    """
    if find_codec(host) is not None or expert_weights(host):
        return ()
    if original_class(host).forward is nn.Module.forward:
        return ()
    return tuple(name for name, parameter in host._parameters.items() if _is_dense_matrix(parameter))


def _is_dense_matrix(parameter: Any) -> bool:  # noqa: ANN401 - a parameter, a packed one, or None
    if parameter is None or getattr(parameter, "quant_state", None) is not None:
        return False
    return parameter.dtype in DENSE and parameter.dim() in (2, 3)


def with_parameters(host: Host, changed: Mapping[str, Tensor]) -> nn.Module:
    """Return a stand-in of a host, of its class before it was adapted, that has other tensors for some parameters.

    It shares everything else with the host, which stays as it is: other threads may call it meanwhile.
    """
    host_class: Any = original_class(host)
    twin: nn.Module = host_class.__new__(host_class)
    twin.__dict__ = {**host.__dict__, "_parameters": {**host._parameters, **changed}}
    return twin
