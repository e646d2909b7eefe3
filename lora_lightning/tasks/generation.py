"""Generation with language models: continue prompts of different lengths, or answer the input of an encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_acting
from lora_lightning.adapters.walk import refuse_sharded, unwrap
from lora_lightning.errors import ConfigError
from lora_lightning.tasks.decoding import Draws, RepetitionPenalty, StopAt
from lora_lightning.tasks.token_loss import IGNORED
from lora_lightning.texts.generation_config import own_ends

Batching = Literal["any", "same length", "alone"]
"""Which prompts a model can process in one batch."""
_NUM_PADDED = 4
_NUM_TRIED = 2
"""Tokens of padding, and new tokens, with which a model is tried."""


class Example(NamedTuple):
    """The token ids before the first supervised tokens of a row, and the supervised ones."""

    prompt: list[int]
    answer: list[int]


def examples_of(batch: Mapping[str, Any]) -> list[Example]:
    """Return the first prompt and answer of each row of a batch.

    Padding is removed, and of packed rows all documents but the first. If every token is supervised, the first half of
    a row counts as the prompt; without labels, all of it.

    Args:
        batch: `input_ids` `[batch, length]`, and optionally `labels`, `attention_mask` and `position_ids` of the same
            shape.

    Example:
        >>> examples_of({"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, -100, 3]])})
        [Example(prompt=[1, 2], answer=[3])]
    """
    ids = batch["input_ids"]
    columns = {name: batch.get(name) for name in ("labels", "attention_mask", "position_ids")}
    given = {name: value for name, value in columns.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    rows = range(len(ids))
    return [_example(ids[row].tolist(), {name: value[row].tolist() for name, value in given.items()}) for row in rows]


def _example(ids: list[int], columns: Mapping[str, list[int]]) -> Example:
    mask, positions = columns.get("attention_mask"), columns.get("position_ids")
    kept = [index for index in range(len(ids)) if mask is None or mask[index]]
    if positions is not None:
        starts = [at for at, index in enumerate(kept) if at and positions[index] == 0]
        kept = kept[: starts[0]] if starts else kept
    tokens = [ids[index] for index in kept]
    if "labels" not in columns:
        return Example(tokens, [])
    wanted = [columns["labels"][index] != IGNORED for index in kept]
    if True not in wanted:
        return Example(tokens, [])
    first = wanted.index(True)
    if first == 0 or all(wanted[1:]):  # nothing, or only a start token, stands before what is learnt
        first = max(1, len(tokens) // 2)
    last = next((index for index in range(first, len(tokens)) if not wanted[index]), len(tokens))
    return Example(tokens[:first], tokens[first:last])


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
    is_complete: Callable[[Sequence[int]], bool] | None = None,
    seed: int = 0,
    streamer: Any = None,  # noqa: ANN401 - transformers' streamers have no public base class with types
) -> list[list[int]]:
    """Generate from prompts in one batch, padded on the left; a model with an encoder reads them as its input.

    Each prompt gets the same answer as alone, except for rounding in a batch. The model is in evaluation mode during
    the call; its modes and the global random state stay unchanged.

    Args:
        model: A model of transformers that generates, with or without adapters.
        prompts: Token ids, at least one each.
        max_new_tokens: Maximum number of tokens to generate; fewer if the model's positions end.
        temperature: 0 decodes greedily; a larger value samples.
        top_p: Sample from the most probable tokens whose probabilities sum to this.
        top_k: Sample from this many of the most probable tokens; 0 means all.
        repetition_penalty: A value above 1 makes tokens less likely that prompt or answer already hold.
        stop: Tokens that end an answer, besides the model's own end tokens.
        is_complete: Returns whether the answer so far is complete; called after each token.
        seed: Seed of the sampling; each prompt starts from it.
        streamer: Receives each token when it is generated, like transformers' `TextStreamer`; only for one prompt, and
            not for a model whose settings use beam search.

    Returns:
        The new tokens of each prompt, without the end token.

    Raises:
        ConfigError: A prompt is empty, or leaves no room for a new token.
        TargetError: The model's parameters are sharded over several processes.
    """
    from transformers import GenerationConfig

    bare: Any = unwrap(model)
    refuse_sharded(bare, "generate")  # ranks that generate differently long would wait for each other
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not all(prompts):
        raise ConfigError("A prompt has no tokens; give at least one word, or a tokenizer that adds a start token.")
    reads = has_encoder(bare)
    room = max_positions(bare) - (0 if reads else longest)
    if room < 1:
        raise ConfigError(f"A prompt of {longest} tokens leaves no room: the model takes {max_positions(bare)}.")
    ends = list(dict.fromkeys([*own_ends(bare), *stop]))
    pad = ends[0] if ends else 0
    device = next(bare.parameters()).device
    ids, mask = _padded(prompts, pad, device, on_the_left=not reads)
    start = 1 if reads else longest
    # An encoder-decoder's own settings name the token that its answers start with, and those that it is forced to take.
    config = _without_sampling(bare.generation_config) if reads else GenerationConfig()
    config.update(
        do_sample=False, max_new_tokens=min(max_new_tokens, int(min(room, 2**31))), eos_token_id=ends or None,
        pad_token_id=pad,
    )  # fmt: skip
    processors: list[Any] = []
    if repetition_penalty != 1:
        config.repetition_penalty = None
        processors.append(RepetitionPenalty(repetition_penalty, None if reads else mask))
    if temperature > 0:
        config.num_beams = 1  # beams follow what is likeliest
        draws = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "device": device}
        processors.append(Draws(len(prompts), seed, **draws))
    criteria = [] if is_complete is None else [StopAt(start, is_complete)]
    with _evaluating(bare):
        output = bare.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=streamer,
        )
    return [_until(row[start:].tolist(), ends) for row in output]


@torch.no_grad()
def batching_of(model: nn.Module, prompt: Sequence[int]) -> Batching:
    """Test which prompts a model can process in one batch with the same result for each as alone.

    Some models ignore the mask or count positions without it, and some mix the rows of a batch.

    Args:
        model: A model of transformers that generates, with or without adapters.
        prompt: Token ids, at least one.
    """
    room = max_positions(model) - len(prompt) - _NUM_TRIED
    longer = [*prompt, *list(prompt[:1]) * int(min(_NUM_PADDED, room))]
    alone = _first_logits(model, [prompt])
    dtypes = (parameter.dtype for parameter in unwrap(model).parameters())
    dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)  # some may be quantized
    tolerance = torch.finfo(dtype).eps ** 0.5 * float(alone.abs().max())

    def is_as_alone(companion: Sequence[int]) -> bool:
        return torch.allclose(_first_logits(model, [prompt, companion]), alone, rtol=0, atol=tolerance)

    if not is_as_alone([*prompt[:-1], prompt[0]]):
        return "alone"
    return "any" if is_as_alone(longer) else "same length"


def _first_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits after the first of some prompts and after its next tokens, `[steps, vocabulary]`."""
    from transformers import GenerationConfig

    bare: Any = unwrap(model)
    reads = has_encoder(bare)
    ids, mask = _padded(prompts, 0, next(bare.parameters()).device, on_the_left=not reads)
    config = _without_sampling(bare.generation_config) if reads else GenerationConfig()
    settings = {"output_logits": True, "return_dict_in_generate": True}
    config.update(do_sample=False, num_beams=1, max_new_tokens=_NUM_TRIED, pad_token_id=0, **settings)
    with _evaluating(bare):
        output = bare.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return torch.stack([step[0] for step in output.logits])


@torch.no_grad()
def answer(
    model: nn.Module, inputs: Mapping[str, Tensor], *, max_new_tokens: int = 64, num_beams: int = 1
) -> list[list[int]]:
    """Generate answers of an encoder-decoder model for a batch of texts, without sampling.

    The model is in evaluation mode during the call. Other entries of its generation config (start token, forced tokens)
    apply.

    Args:
        model: A model of transformers that generates, with or without adapters.
        inputs: Input of the encoder: `input_ids` and `attention_mask` `[batch, length]`.
        max_new_tokens: Maximum length of an answer.
        num_beams: Number of beams; 1 decodes greedily.

    Returns:
        The tokens of each answer, without start and end.

    Raises:
        TargetError: The model's parameters are sharded over several processes.
    """
    bare: Any = unwrap(model)
    refuse_sharded(bare, "generate")
    config = _without_sampling(bare.generation_config)
    config.update(do_sample=False, num_beams=num_beams, max_new_tokens=max_new_tokens)
    with _evaluating(bare):
        output = bare.generate(**inputs, generation_config=config)
    pad = {config.pad_token_id} - {None}
    return [_until(row[1:].tolist(), [*own_ends(bare), *pad]) for row in output]


def max_positions(model: Any) -> float:  # noqa: ANN401 - a transformers model
    """Return the number of tokens that a model takes besides its virtual ones; infinity if its config sets none."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    virtual = (adapter.num_virtual_tokens for _, _, adapter in iter_acting(model))
    return (getattr(config, "max_position_embeddings", None) or float("inf")) - max(virtual, default=0)


def searches_with_beams(model: Any) -> bool:  # noqa: ANN401 - a transformers model
    """Return whether a model's own settings, which those with an encoder follow, search with several beams."""
    config: Any = getattr(unwrap(model), "generation_config", None)
    return has_encoder(model) and (getattr(config, "num_beams", None) or 1) > 1


def has_encoder(model: Any) -> bool:  # noqa: ANN401 - a transformers model
    """Return whether a model reads its input with an encoder, and writes with a decoder."""
    return bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))


def _padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device, *, on_the_left: bool
) -> tuple[Tensor, Tensor]:
    """Return ids and mask of a batch, `[batch, length]`.

    A decoder continues the last position, so its prompts end there. Those of an encoder start at the first, since
    some count positions from there whatever the mask says (BART).
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), longest) if on_the_left else slice(len(prompt))
        ids[row, where] = torch.tensor(prompt, device=device)
        mask[row, where] = 1
    return ids, mask


def _without_sampling(config: Any) -> Any:  # noqa: ANN401 - transformers' GenerationConfig
    """Return a copy of generation settings without those of sampling and length, about which transformers warns."""
    config = copy.deepcopy(config)
    for name in ("temperature", "top_p", "top_k", "max_length"):
        setattr(config, name, None)
    return config


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
