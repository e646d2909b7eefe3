"""What methods may ask of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_lightning.adapters.targets import ends_with_any
from lora_lightning.adapters.view import (
    AttentionPlace,
    BlockPlaces,
    ModelView,
    PlainView,
    PromptPlace,
    output_embeddings,
)
from lora_lightning.backbones import attention, ties
from lora_lightning.backbones.blocks import BLOCKS
from lora_lightning.backbones.defaults import USUAL_TARGETS
from lora_lightning.backbones.trials.prompt_place import find_prompt_place
from lora_lightning.backbones.trials.read_past import read_past
from lora_lightning.errors import TargetError


class TransformersView(PlainView):
    """The view of a transformers model: anything with a `config` that names its `model_type`."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a module with a config
        super().__init__(model)
        self.config = model.config
        self.model_type: str | None = self.config.model_type
        self._factor: float | None = None  # by which tied models scale what enters their head
        self._read_past: Mapping[str, frozenset[str]] | None = None

    def usual_targets(self) -> list[str] | None:
        """Return queries and values, under this architecture's names."""
        usual = USUAL_TARGETS.get(self.model_type or "", ())
        names = {path.rpartition(".")[2] for path, _ in self.model.named_modules()}
        return [name for name in usual if name in names] or None

    def head_paths(self) -> list[str]:
        """Return what stands beside the base model (classifiers, `score`, `lm_head`), or the output embeddings."""
        prefix = getattr(self.model, "base_model_prefix", "")
        if prefix in dict(self.model.named_children()):
            beside = [(name, child) for name, child in self.model.named_children() if name != prefix]
            return [name for name, child in beside if any(True for _ in child.parameters())]
        output = output_embeddings(self.model)
        return [path for path, module in self.model.named_modules() if output is not None and module is output]

    def prompt_place(self) -> PromptPlace:
        """Return the body, the encoder of an encoder-decoder, with its token embedding."""
        return find_prompt_place(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Return a text's token ids under the backbone's own tokenizer."""
        from lora_lightning.backbones.load import load_tokenizer

        ids: list[int] = load_tokenizer(self.config._name_or_path)(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TargetError(f"{text!r} has no tokens under this model's tokenizer; give another text.")
        return ids

    def attention_places(self) -> list[AttentionPlace]:
        """Return the attention modules as a trial run finds them."""
        return attention.find_attention(self.model)

    def route_attention(self) -> Callable[[nn.Module], None]:
        """Send every attention through the function that asks adapters for keys and values."""
        return attention.route(self.model)

    def read_past(self) -> Mapping[str, frozenset[str]]:
        """Return what a trial run shows; it runs once for each view."""
        if self._read_past is None:
            self._read_past = read_past(self.model)
        return self._read_past

    def block_places(self) -> BlockPlaces:
        """Return where this architecture's attention and feed-forward layers are; TargetError where unknown."""
        places = BLOCKS.get(self.model_type or "")
        if places is None:
            raise TargetError(
                f"The model type {self.model_type!r} is none of those whose attention and feed-forward layers are "
                f"known by name: {', '.join(sorted(BLOCKS))}. Use a method that takes target_modules, and name them."
            )
        return places

    def query_share(self, path: str) -> float:
        """Return a third for a fused projection of this architecture, else 0."""
        places = BLOCKS.get(self.model_type or "")
        return 1 / 3 if places is not None and ends_with_any(path, places.fused) else 0.0

    def untie(self, path: str) -> None:
        """Give the module at `path` its own weight, and say so in the config, or a reload would tie them again.

        Raises:
            NotMergeable: The model computes otherwise where nothing is tied, by more than a factor.
        """
        if self._factor is None:
            self._factor = ties.flag_factor(self.model)
        super().untie(path)
        ties.give_up_ties(self.model, path)

    def after_merge(self) -> None:
        """Fold into the output head what the model's forward scales only where weights are tied."""
        if self._factor is not None:
            ties.scale_head(self.model, self._factor)
            self._factor = None


def view_of(model: nn.Module) -> ModelView:
    """Return the view that fits a model: transformers' where it has such a config, else a plain one."""
    is_transformers = hasattr(getattr(model, "config", None), "model_type")
    return TransformersView(model) if is_transformers else PlainView(model)
