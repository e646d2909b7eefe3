"""What a method is (a frozen description) and what an adapter is (the trainable module it hangs on a host)."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.weights import check_writable, read_weight, write_weight
from lora_lightning.errors import ConfigError, NotMergeable
from lora_lightning.keywords import remedy

if TYPE_CHECKING:
    from lora_lightning.adapters.selection.rows import Mixture
    from lora_lightning.adapters.view import ModelView


DEFAULT_NAME = "default"
"""The name of adapters that are attached without one."""


class Role(StrEnum):
    """What an adapter parameter is for; optimizer groups, summaries and checkpoints go by it.

    A and B are the factors of a low-rank update, and LoRA+ is about these two alone; a matrix of a network of its own,
    such as a bottleneck's, is a WEIGHT.
    """

    A = "A"
    B = "B"
    WEIGHT = "weight"
    MAGNITUDE = "magnitude"
    VECTOR = "vector"
    PROMPT = "prompt"
    BIAS = "bias"
    HEAD = "head"
    EMBEDDING = "embedding"


class Adapter(nn.Module):
    """The trainable part that one method hangs on one host module.

    An adapter never holds its host: the host owns the adapter and hands itself over in each call. Subclass
    `ForwardAdapter`, `InputAdapter` or `OutputAdapter`, and declare the role of each parameter in `roles`. A part that
    several adapters share (one module for all layers) is a submodule of each; counts, groups and states take it once,
    under the first host.

    Attributes:
        roles: Role of each parameter by its name in this module.
        may_rest: Whether its host need not be called: it is there for another one's sake, such as one of tied modules.
        host_class: Class of the host before it was adapted.
        argument_names: Names of what the host's forward takes by position.
        method: The method that it was attached for; None for a trained copy of a module.
        name: The name that it was attached under, `default` for an unnamed one.
        selected_by_name: The entry of a selection that chooses all adapters of its name.
        selected_as: The entry that chooses it among those of its name; one without always acts.
        num_virtual_tokens: Positions of the model that it takes up in front of the real tokens'.
        mixes_itself: Whether it computes a batch with several adapters by its method `mixed(host, mixture, ...)`, whose
            further arguments are those of its forward.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    may_rest: ClassVar[bool] = False
    mixes_itself: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.host_class: type[nn.Module] = nn.Module
        self.argument_names: tuple[str, ...] = ()
        self.method: Method | None = None
        self.name = DEFAULT_NAME
        self.selected_by_name = self.selected_as = ""
        self.num_virtual_tokens = 0

    @property
    def method_name(self) -> str:
        """What users know it by: its method's class, or that it is a trained copy."""
        return "a trained copy" if self.method is None else type(self.method).__name__

    def role_of(self, name: str) -> Role:
        """Return the role of the parameter called `name` in this module."""
        return self.roles[name]

    def named_roles(self) -> Iterator[tuple[str, nn.Parameter, Role]]:
        """Iterate over `(name, parameter, role)` of every parameter, the frozen ones too."""
        for name, parameter in self.named_parameters():
            yield name, parameter, self.role_of(name)

    def public_name(self, name: str) -> str:
        """Return the name under which `adapter_state_dict` lists a parameter or buffer of this module."""
        return name

    def folded_state(self) -> dict[str, Tensor]:
        """Return the tensors that using the adapter takes, without what only training needs."""
        return dict(self.state_dict(keep_vars=True))

    def fold(self) -> None:
        """Keep only what `folded_state` returns; the adapter computes as before. Does nothing the second time."""

    def refresh(self, host: nn.Module) -> None:
        """Forget what this adapter keeps of its host's weight, because that has changed."""

    def why_not_added(self) -> str:
        """Return why its effect cannot be added to that of another adapter on its host; empty where it can.

        The reason follows the adapter's name: `has a magnitude of its own`.
        """
        return f"uses {self.method_name}, of which one acts at a time"

    def mixed(self, host: Any, mixture: Mixture, *given: Any) -> Any:  # noqa: ANN401 - as forward's
        """Compute what `forward` computes for a batch whose rows have several adapters of this kind."""
        raise NotImplementedError  # never called: `mixes_itself` is False where a subclass lacks it

    def why_not_mixed(self, host: nn.Module) -> str:
        """Return why it cannot act on some rows of a batch alone, as in `it looks at the whole batch`; else nothing."""
        del host
        return ""

    def merge_into(self, host: nn.Module) -> None:
        """Fold this adapter into its host; `check_mergeable` has passed. Called with gradients off."""
        for _, _, merged in self.merged_weights(host):
            write_weight(host, merged)

    def merged_weights(self, host: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Iterate over `(parameter of the host, its weight, its merged weight)`, both float32 or wider.

        An adapter that changes several parameters of its host overrides this, and `merge_into`.
        """
        weight = read_weight(host)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        yield "weight", wide, self.merged_weight(host, wide)

    @property
    def changes_weights(self) -> bool:
        """Whether merging changes weights of the host, and `merged_weights` gives them."""
        own = type(self)
        return (own.merged_weight, own.merged_weights) != (Adapter.merged_weight, Adapter.merged_weights)

    def check_mergeable(self, host: nn.Module) -> None:
        """Raise NotMergeable, with the reason, where this adapter cannot be folded into its host."""
        if not self.changes_weights:
            name = type(self).__name__
            raise NotMergeable(
                f"{name} changes more than a weight and cannot be merged; keep it attached, and load its adapter "
                "folder onto the base wherever it is used."
            )
        check_writable(host)

    def merged_weight(self, host: nn.Module, weight: Tensor) -> Tensor:
        """Return the dense weight that makes the bare host compute what host and adapter compute together.

        An adapter that does not define this cannot be merged.

        Args:
            host: The host module.
            weight: The host's dense weight, float32 or wider, shape `[out, in]`.

        Returns:
            The new weight, same shape and dtype.
        """
        raise NotImplementedError  # never called: `changes_weights` is False where a subclass lacks it


class ForwardAdapter(Adapter):
    """An adapter that computes its host's whole forward, so that base and update are one operation.

    Subclasses define `forward(host, *args, **kwargs)`; the host's leading arguments come by position, however the host
    was called.
    """

    takes_names: ClassVar[bool] = False
    """Whether arguments come exactly as the host got them instead, for adapters that hand them on."""

    extends_base: ClassVar[bool] = False
    """Whether `forward` takes `base_output`, what the bare host returns for the same arguments, and builds on it."""

    adds_to_base: ClassVar[bool] = False
    """Whether what it adds to the bare host's output does not depend on that, and `forward` returns it alone for
    `update_only=True`."""

    def base_forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's own signature
        """Call the host as it was before it was adapted."""
        return self.host_class.forward(host, *args, **kwargs)


class InputAdapter(Adapter):
    """An adapter that changes what its host is called with.

    Subclasses define `forward(host, args, kwargs) -> (args, kwargs)`; `by_position(self.argument_names, args, kwargs)`
    has the leading arguments by position.
    """


class OutputAdapter(Adapter):
    """An adapter that changes what its host returns.

    Subclasses define `forward(host, args, kwargs, output) -> output`; see `InputAdapter` for the arguments.
    """


class AttentionAdapter(Adapter):
    """An adapter that gives its host, an attention module, keys and values to put in front of its own.

    The view of the model makes attention ask for them (`ModelView.route_attention`).
    Subclasses define `forward(host) -> (keys, values)`, `[heads, num, head size]` each.
    """


# What PEFT calls it -> what it is called here.
PEFT_SPELLINGS: Mapping[str, str] = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rank": "r",
    "use_rslora": "scaling: rslora",
    "use_dora": "the method DoRA",
    "init_lora_weights": "init",
    "inference_mode": "nothing: adapters are trainable until you merge or freeze them",
    "task_type": "nothing: the task's class says it",
}


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Which trainable parts are added where; every method of the library is a subclass.

    A method is a frozen description: it holds settings, never tensors. Its training hooks do nothing by default.

    Args:
        modules_to_save: Names (path suffixes) of modules to train as full copies beside the adapters, such as a
            head. The copies travel in the adapter's state dict and `disabled` bypasses them.
    """

    name: ClassVar[str]
    """Short lower-case name; also the key of this method's adapter on a host."""

    about: ClassVar[About] = About()
    """What the README and `lora-lightning compare` say about it."""

    size_setting: ClassVar[str | None] = None
    """The integer setting that grows the number of trainable parameters; None where nothing does."""

    usual_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)
    """Learning rates worth trying first, the lowest first."""

    training_settings: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})
    """Settings that say how the adapters are trained or find their hosts, and not what they compute from their tensors.

    An adapter folder loads where these differ; a subclass adds its own to its parent's.
    """

    exclusive: ClassVar[str | None] = None
    """What at most one of the methods attached together may provide, such as `the soft prompt`; None for nothing."""

    takes_packed_rows: ClassVar[bool] = True
    """Whether each of several documents packed into one row sees the adapter; what stands before a row, only the first.
    """

    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a string where a list of names is meant."""
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"{type(self).__name__}: modules_to_save must be a list of names, got a string; "
                f"write [{self.modules_to_save!r}]."
            )

    def __new__(cls, *values: Any, **settings: Any) -> Method:  # noqa: ANN401 - settings of any type
        """Refuse settings without a name, or that this method does not have, naming ours for other libraries' words."""
        if values:
            raise ConfigError(f"{cls.__name__} takes its settings by name, as in LoRA(r=8); got {values!r:.60}.")
        known = {field.name for field in fields(cls)} if "__dataclass_fields__" in cls.__dict__ else settings
        for key in settings:
            if key not in known:
                hint = PEFT_SPELLINGS.get(key)
                meant = f"use {hint}." if hint else remedy(key, known)
                raise ConfigError(f"{cls.__name__} has no setting {key!r}; {meant}")
        return super().__new__(cls)

    @abc.abstractmethod
    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build the adapters for a model, without changing it.

        Args:
            view: What the method may ask of the model.

        Yields:
            Pairs of a host's path in the base model and the adapter to hang on it.

        Raises:
            TargetError: The model has no fitting host.
        """

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` has anything to do; where it has not, a task sets up no data for it."""
        return type(self).calibrate is not Method.calibrate

    @property
    def penalizes(self) -> bool:
        """Whether `extra_loss` may return a penalty."""
        return type(self).extra_loss is not Method.extra_loss

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Look at data before the optimizer is built (never in a resumed run), and change the adapters by it.

        Args:
            model: The adapted model, in training mode, on its device.
            batches: Training batches on the same device, as many as one epoch has; each rank gets its own.
            loss: Returns the task's loss of a batch; to be run inside it, gradients included.
        """

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """Return a penalty that the task adds to its training loss, or None."""
        return None

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Act on the gradients just before optimizer step number `step` (0 is the first)."""

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Act on the updated adapters just after optimizer step number `step` (0 is the first)."""

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Give this method's adapters the structure of a state that is about to be loaded, such as a folded one."""

    def extra_state(self, model: nn.Module) -> dict[str, Any]:
        """Return what, beside parameters and buffers, must travel in a checkpoint (plain types and tensors)."""
        return {}

    def load_extra_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Take back what `extra_state` returned."""


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method whose hosts are chosen by name.

    Args:
        target_modules: Path suffixes (`["query", "value"]`), a regular expression that must match a whole path, or
            `all-linear` (every supported linear layer outside the output head). None takes the usual ones of the
            model type, else `all-linear`. A module of experts (a mixture's 3-D parameters) is taken only where it is
            named, such as `experts` or, for single parameters, `experts.down_proj` in a list; `all-linear` leaves it
            out, as in PEFT.
        exclude_modules: Path suffixes or a regular expression of modules to leave out.
        layers_to_transform: Indices of the layers (blocks) to adapt; None means all.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None

    takes_experts: ClassVar[bool] = False
    """Whether a module of experts, whose weights are 3-D parameters, can be a host."""

    training_settings: ClassVar[frozenset[str]] = Method.training_settings | {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    }

    def __post_init__(self) -> None:
        """Refuse empty target lists."""
        super().__post_init__()
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError(
                "target_modules is empty; name at least one module, or leave it out for the model type's usual ones."
            )


def check_positive_int(owner: str, name: str, value: object) -> None:
    """Raise ConfigError unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{owner}: {name} must be an integer of at least 1, got {value!r}.")


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{owner}: {name} must be a finite number above 0, got {value!r}.")


def check_dropout(owner: str, value: object) -> None:
    """Raise ConfigError unless `value` is a probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{owner}: dropout must be at least 0 and below 1, got {value!r}.")


def check_choice(owner: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{owner}: {name} must be one of {', '.join(choices)}, got {value!r}.")
