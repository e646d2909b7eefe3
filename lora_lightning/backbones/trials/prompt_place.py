"""Where transformers models take their tokens, as a trial call shows it, and whether virtual ones act as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.host import hang, unhang
from lora_lightning.adapters.selection.state import Selector
from lora_lightning.adapters.view import PromptPlace, input_embeddings
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.trials.trial import (
    NUM_FRONT,
    Call,
    Rows,
    Trial,
    arguments_of,
    first_tensor,
    has_values,
    is_same,
    path_of,
    quiet,
    recording,
    text_config,
)
from lora_lightning.errors import TargetError
from lora_lightning.methods.soft_prompt import POOLINGS, CrossMaskAdapter, PlaceholderAdapter, SoftPromptAdapter

_TRIAL = "trial"
_USUAL_POOLING = "states"


def find_prompt_place(model: Any) -> PromptPlace:  # noqa: ANN401 - a transformers model
    """Return the module of a transformers model that takes its tokens.

    A trial call with a few tokens shows which one it is. A prompt that holds the embeddings of tokens must then give
    the hidden states that these tokens give in front of a row, with and without a mask, padded on either side. On the
    meta device, where nothing can be compared, the first half decides.

    Raises:
        TargetError: The model takes no tokens, or virtual ones do not act as tokens in it.
    """
    trial = Trial.of(model)
    compares = has_values(model)
    with quiet(model):
        rows = trial.rows(with_front=True, with_mask=compares)
        with recording(model) as calls:
            outer = trial.call(model, rows)
        looked_up = _lookup(calls, input_embeddings(model), rows)
        if looked_up is None:
            raise _refusal(model, "called with token ids alone, it looks up no token embeddings", outer.problem)
        body = _body(looked_up, rows)
        if body is None:
            what = "no part of it that takes token ids returns hidden states for each of them"
            raise _refusal(model, what, outer.problem)
        place = _describe(model, body, looked_up.module, calls, trial)
        return _settle(model, place, trial, outer) if compares else place


def _refusal(model: Any, what: str, why: str = "") -> TargetError:  # noqa: ANN401 - a transformers model
    because = f" ({why})" if why else ""
    return TargetError(
        f"Soft prompts do not work on {type(model).__name__} ({model.config.model_type}): {what}{because}. Use LoRA or "
        "another method."
    )


def _lookup(calls: list[Call], embedding: nn.Module | None, rows: Rows) -> Call | None:
    """Return the call that looked the token ids up: of the known embedding, or of the first module that did."""
    known = [call for call in calls if call.module is embedding and _is_lookup(call, rows)]
    found = [call for call in calls if _is_leaf(call.module) and _is_lookup(call, rows)]
    return next(iter([*known, *found]), None)


def _is_lookup(call: Call, rows: Rows) -> bool:
    ids = next((one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor)), None)
    if ids is None or ids.is_floating_point() or ids.numel() != rows.ids.numel():
        return False
    weight = next(call.module.parameters(), None)
    return isinstance(call.output, Tensor) and call.output.dim() == 3 and weight is not None and weight.dim() == 2


def _is_leaf(module: nn.Module) -> bool:
    return all(name == RESERVED for name, _ in module.named_children())


def _body(looked_up: Call, rows: Rows) -> Call | None:
    """Return the innermost call that got the ids, and the mask itself where any did, and returned hidden states."""
    fitting = [call for call in looked_up.inside if _returns_states(call, rows) and _has(call, looked_up)]
    masked = [call for call in fitting if _mask_of(call, rows) is not None]
    return next(reversed(masked or fitting), None)


def _has(call: Call, part: Call) -> bool:
    return any(module is part.module for module in call.module.modules())


def _returns_states(call: Call, rows: Rows) -> bool:
    ids = call.given.get("input_ids")
    states = _states(call.output)
    is_called_with_ids = isinstance(ids, Tensor) and ids.shape == rows.ids.shape
    return is_called_with_ids and states is not None and states.dim() == 3 and states.shape[:2] == rows.ids.shape


def _states(output: Any) -> Tensor | None:  # noqa: ANN401 - what a module returns
    """Return the hidden states of a body's output; None if it is not the output of a body."""
    first = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    if isinstance(output, tuple):
        first = output[0]
    return first if isinstance(first, Tensor) else None


def _mask_of(call: Call, rows: Rows) -> Tensor | None:
    """Return the padding mask that a call got, None where it got none or one in another shape."""
    mask = call.given.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == rows.ids.shape else None


def _describe(model: Any, body: Call, embedding: nn.Module, calls: list[Call], trial: Trial) -> PromptPlace:  # noqa: ANN401 - a transformers model
    """Return the place as the calls show it."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    takes_mask = "attention_mask" in arguments_of(body.module)
    decoder = next((call.module for call in calls if _attends_to(call, body)), None)
    return PromptPlace(
        body=path_of(model, body.module),
        embedding=path_of(body.module, embedding),
        arguments=arguments_of(body.module),
        placeholder=trial.placeholder,
        padding=None if takes_mask else trial.padding,
        pooling=_USUAL_POOLING if _pooled(body) is not None else None,
        max_positions=limit if limit is not None and limit > 0 else None,
        decoder=None if decoder is None else path_of(model, decoder),
    )


def _attends_to(call: Call, body: Call) -> bool:
    """Return whether a call is that of a decoder that got the body's hidden states."""
    states = call.given.get("encoder_hidden_states")
    return (
        states is not None and states is _states(body.output) and "encoder_attention_mask" in arguments_of(call.module)
    )


def _settle(model: Any, place: PromptPlace, trial: Trial, outer: Call) -> PromptPlace:  # noqa: ANN401 - a transformers model
    """Return the place with what only values tell, once virtual tokens act as tokens there.

    Raises:
        TargetError: They do not.
    """
    body = model.get_submodule(place.body)
    expected = [trial.call(body, trial.rows(with_front=True, with_mask=mask)) for mask in (True, False)]
    problem = next((call.problem for call in expected if call.problem), "")
    if problem:
        raise _refusal(model, f"its {type(body).__name__} does not run on token ids alone", problem)
    whole = expected[1]
    offset = _position_offset(whole, trial)
    place = replace(
        place,
        takes_embeddings=_takes_embeddings(whole, place),
        pooling=_pooling(model, whole),
        position_offset=offset,
        counts_padding=_counts_padding(expected[0], offset),
        ignores_padding=_ignores_padding(expected[0]),
        starts_at_zero=_starts_at_zero(model, whole, offset),
        max_positions=None if place.max_positions is None else place.max_positions - offset,
    )
    problems = []
    for candidate in (place, replace(place, placeholder=None)):
        problem = _problem(model, candidate, trial, expected, outer)
        if not problem:
            return candidate
        problems.append(problem)
    raise _refusal(model, "virtual tokens do not act as tokens in it", problems[0])


def _takes_embeddings(whole: Call, place: PromptPlace) -> bool:
    """Return whether a body gives the same for the embeddings of ids as for the ids."""
    embeds = whole.module.get_submodule(place.embedding)(whole.given["input_ids"])
    states = _again(whole, input_ids=None, inputs_embeds=embeds)
    return _is_that_of(states, whole)


def _is_that_of(states: Tensor | None, call: Call) -> bool:
    expected = _states(call.output)
    return states is not None and expected is not None and is_same(states, expected)


def _again(call: Call, **changes: Any) -> Tensor | None:  # noqa: ANN401 - the module's own
    """Call a module again with some arguments changed; return its hidden states, None where it raises."""
    try:
        return _states(call.module(**{**call.given, **changes}))
    except Exception:
        return None


def _position_offset(whole: Call, trial: Trial) -> int:
    """Return the number of the first position, where given positions that start there change nothing; else 0."""
    if "position_ids" not in arguments_of(whole.module) or whole.given.get("position_ids") is not None:
        return 0
    offsets = 0, trial.padding + 1, 2
    fitting = (one for one in offsets if _is_that_of(_again(whole, position_ids=_positions(whole, one)), whole))
    return next(fitting, 0)


def _counts_padding(masked: Call, offset: int) -> bool:
    """Return whether a body that gets no positions counts padding on the left; the last row of the call has some."""
    mask = masked.given.get("attention_mask")
    if mask is None or "position_ids" not in arguments_of(masked.module):
        return True
    states = _again(masked, position_ids=_positions(masked, offset).expand(len(mask), -1))
    expected, is_real = _states(masked.output), mask[-1] != 0
    if states is None or expected is None or states.shape[:2] != mask.shape:
        return True
    return is_same(states[-1][is_real], expected[-1][is_real])


def _ignores_padding(masked: Call) -> bool:
    """Return whether the last row of a call, padded on the left, has the states of the one padded on the right."""
    mask, states = masked.given.get("attention_mask"), _states(masked.output)
    if mask is None or states is None or states.shape[:2] != mask.shape:
        return True
    _, right, left = (row[real != 0] for row, real in zip(states, mask, strict=True))
    return is_same(left, right)


def _positions(call: Call, start: int) -> Tensor:
    ids = call.given["input_ids"]
    return torch.arange(start, start + ids.shape[1], device=ids.device)[None]


def _starts_at_zero(model: Any, whole: Call, offset: int) -> bool:  # noqa: ANN401 - a transformers model
    """Return whether a body that gets later positions remembers other rows, as recurrent layers with a state may do."""
    from transformers import DynamicCache

    if not {"position_ids", "use_cache", "past_key_values"} <= set(arguments_of(whole.module)):
        return False
    moved, ids = _positions(whole, offset + NUM_FRONT), whole.given["input_ids"]
    states = []
    for one in (ids, ids.flip(1), ids):
        cache = DynamicCache(config=text_config(model))
        states.append(_again(whole, input_ids=one, position_ids=moved, use_cache=True, past_key_values=cache))
    first, _, second = states
    return first is not None and second is not None and not is_same(second, first)


def _pooling(model: Any, whole: Call) -> str | None:  # noqa: ANN401 - a transformers model
    """Return how a body pools, a key of `POOLINGS`.

    Raises:
        TargetError: It pools, and in none of these ways.
    """
    pooled = _pooled(whole)
    if pooled is None:
        return None
    first = _states(whole.output)[:, :1]  # type: ignore[index]  # the body returned states
    for name, pool in POOLINGS.items():
        try:
            if is_same(pool(whole.module, first), pooled):
                return name
        except Exception:  # another kind of pooler
            continue
    raise _refusal(model, f"the way in which its {type(whole.module).__name__} pools hidden states is unknown")


def _pooled(call: Call) -> Tensor | None:
    """Return what a body pooled, None where it does not pool."""
    return call.output.get("pooler_output") if isinstance(call.output, Mapping) else None


def _problem(model: Any, place: PromptPlace, trial: Trial, expected: list[Call], outer: Call) -> str:  # noqa: ANN401 - a transformers model
    """Return how virtual tokens with the embeddings of tokens differ from these tokens; empty where they do not."""
    body = model.get_submodule(place.body)
    masks = (True, False)
    with _prompted(model, place, trial) as adapter:
        for mask, want in zip(masks, expected, strict=True):
            got = trial.call(body, trial.rows(with_front=False, with_mask=mask))
            what = f"hidden states behind {NUM_FRONT} virtual tokens {'with' if mask else 'without'} a mask"
            problem = got.problem or _difference(trial, got, want, what=what, keeps=place.keeps_virtual, mask=mask)
            if problem:
                return problem
        if not outer.problem:
            got = trial.call(model, trial.rows(with_front=False, with_mask=True))
            problem = got.problem or _difference(
                trial, got, outer, what="the outputs of the model", keeps=False, mask=True
            )
            if problem:
                return problem
        adapter.prompt.copy_(adapter.prompt.flip(0) * -2)
        other = trial.call(body, trial.rows(with_front=False, with_mask=True))
        if not _difference(trial, other, expected[0], what="they", keeps=place.keeps_virtual, mask=True, exactly=True):
            return "they change no hidden state of the tokens behind them"
    return ""


def _difference(
    trial: Trial, got: Call, want: Call, *, what: str, keeps: bool, mask: bool, exactly: bool = False
) -> str:
    """Return a sentence where real tokens have other states than those behind real tokens in front; else nothing.

    Outputs that are not by token, such as those of a decoder, are compared as a whole where their shapes are the same
    and the model has a decoder; a classifier pools another token by design.
    """
    long, short = trial.rows(with_front=True, with_mask=mask), trial.rows(with_front=False, with_mask=mask)
    found, states = first_tensor(got.output), first_tensor(want.output)
    if found is None or states is None:
        return ""
    is_real = long.is_real if keeps else short.is_real
    if states.shape[:2] == long.is_real.shape:
        if found.shape[:2] != is_real.shape:
            return f"{what} have shape {tuple(found.shape)}"
        found, states = found[is_real], states[long.is_real]
    elif "decoder_input_ids" not in want.given:
        return ""
    is_equal = torch.equal(found, states) if exactly else is_same(found, states)
    return "" if is_equal else f"{what} are not those behind the tokens themselves"


@contextmanager
def _prompted(model: nn.Module, place: PromptPlace, trial: Trial) -> Iterator[Any]:
    """Hang a soft prompt with the embeddings of the trial's first tokens on a model inside the block."""
    body = model.get_submodule(place.body)
    embedding = body.get_submodule(place.embedding)
    adapter = SoftPromptAdapter(place, NUM_FRONT, prompt=embedding(trial.front).float())
    selector = Selector()
    hosts: list[tuple[nn.Module, Adapter]] = [(body, adapter)]
    if place.placeholder is not None:
        hosts.append((embedding, PlaceholderAdapter()))
    if place.decoder is not None:
        hosts.append((model.get_submodule(place.decoder), CrossMaskAdapter(NUM_FRONT)))
    try:
        for host, one in hosts:
            hang(host, _TRIAL, one, selector, path_of(model, host))
        yield adapter
    finally:
        for host, _ in hosts:
            unhang(host, [_TRIAL])
