"""Find the hidden state of a model that a pooling reads, and where the patches are in it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_embed.errors import EncoderError
from lora_embed.model.description import StateForm
from lora_embed.model.pooling import LAST, first_of

SAME = 1e-5  # a token whose values differ by less, relative to the largest value, is the same for every image


@dataclass(frozen=True, kw_only=True)
class FoundState:
    """The hidden state that a pooling reads in a model."""

    tap: str  # name of the module that gives it; "" for the model's final output
    form: StateForm
    dimension: int  # d


@torch.inference_mode()
def find_state(model: nn.Module, pixel_values: torch.Tensor, pooling: str) -> FoundState:
    """The hidden state that a pooling reads: `hidden_states[-1]` bit for bit, or the final output for the `last_` poolings.

    `pixel_values` are different images (n, 3, H, W), n > 1. Raises EncoderError if the model gives no such state with one
    entry for each image, or another one each time, or if the pooling does not fit it; ValueError if the model does not take
    such images.
    """
    name = type(model).__name__
    with _Watched(model) as watched:
        try:
            output = model(pixel_values=pixel_values, output_hidden_states=True)
        except (RuntimeError, ArithmeticError, AttributeError, LookupError, TypeError, AssertionError) as error:
            raise ValueError(str(error)) from None  # many models do not check the size themselves
    final = getattr(output, "last_hidden_state", None)
    if pooling.startswith(LAST):
        if not isinstance(final, torch.Tensor):
            raise EncoderError(f"{name} gives no last_hidden_state, which pooling {pooling!r} needs. Use pooling: mean.")
        tap, state = "", final
    else:
        tap, state = _last_of_hidden_states(name, getattr(output, "hidden_states", None), final, watched)
    if not torch.equal(state, _state_of(model, pixel_values, tap)):
        raise EncoderError(
            f"{name} gives the same images different states each time, like models that mask random patches. Name another base."
        )
    if state.ndim not in (3, 4) or len(state) != len(pixel_values):
        raise EncoderError(
            f"{name} gives a hidden state of shape {tuple(state.shape)} for {len(pixel_values)} images, expected tokens "
            "(n, tokens, d) or maps (n, d, h, w) of n images. Name another base."
        )
    if state.ndim == 4:
        form = StateForm(channels_last=_has_channels_last(model, pixel_values, tap, state))
        return FoundState(tap=tap, form=form, dimension=state.shape[3 if form.channels_last else 1])
    first_tokens, maps = watched.tokens(state), (getattr(output, "hidden_states", None) or [None])[-1]
    form = _map_among(first_tokens, maps) or _token_form(name, first_tokens, pooling)
    return FoundState(tap=tap, form=form, dimension=state.shape[2])


class _Watched:
    """What a model's modules receive and give in one pass, as far as `find_state` needs it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.blocks: dict[str, torch.Tensor] = {}  # outputs of the last module of each list, by name
        self._first_with: dict[tuple[int, int], torch.Tensor] = {}  # (n, tokens) → the first input of any module with these
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watched":
        lists = [(name, part) for name, part in self._model.named_modules() if isinstance(part, nn.ModuleList)]
        self.names = [f"{name}.{len(part) - 1}" for name, part in lists if len(part)]
        for name in self.names:
            self._handles.append(self._model.get_submodule(name).register_forward_hook(self._keep_output(name)))
        for part in self._model.modules():
            self._handles.append(part.register_forward_pre_hook(self._keep_input))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def tokens(self, state: torch.Tensor) -> torch.Tensor | None:
        """The first tokens (n, tokens, any) that became the tokens of `state`; None if no module received as many."""
        return self._first_with.get((state.shape[0], state.shape[1]))

    def _keep_output(self, name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: self.blocks.update({name: first_of(output)})

    def _keep_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for value in inputs[:1]:
            if isinstance(value, torch.Tensor) and value.ndim == 3:
                self._first_with.setdefault((value.shape[0], value.shape[1]), value)


def _state_of(model: nn.Module, pixel_values: torch.Tensor, tap: str) -> torch.Tensor:
    """The state in a pass that keeps no other ones."""
    with _Watched(model) as watched:
        output = model(pixel_values=pixel_values)
    state: torch.Tensor = watched.blocks[tap] if tap else output.last_hidden_state
    return state


def _last_of_hidden_states(name: str, states: Any, final: Any, watched: _Watched) -> tuple[str, torch.Tensor]:
    """`hidden_states[-1]`, and the module that gives it."""
    advice = "Use pooling: last_mean, or name another base." if isinstance(final, torch.Tensor) else "Name another base."
    if not states or not isinstance(states[-1], torch.Tensor):
        raise EncoderError(f"{name} gives no hidden_states, which all poolings need but those that begin with last_. {advice}")
    if isinstance(final, torch.Tensor) and torch.equal(states[-1], final):
        return "", states[-1]
    for block in watched.names:
        if isinstance(watched.blocks.get(block), torch.Tensor) and torch.equal(watched.blocks[block], states[-1]):
            return block, states[-1]
    compared = f" ({', '.join(watched.names)})" if watched.names else ""
    raise EncoderError(
        f"{name} gives a hidden_states[-1] that is not the output of the last of its blocks{compared}, so lora-embed "
        f"cannot find the layer to read. {advice}"
    )


def _map_among(tokens: torch.Tensor | None, maps: Any) -> StateForm | None:
    """Where the pixels of the last map are among tokens, as in DINOv3-ConvNeXT, whose first token is the mean of them."""
    if tokens is None or not isinstance(maps, torch.Tensor) or maps.ndim != 4:
        return None
    patches = maps.flatten(2).transpose(1, 2)
    others = tokens.shape[1] - patches.shape[1]
    for before in range(others + 1):
        if torch.equal(tokens[:, before : before + patches.shape[1]], patches):
            return StateForm(prefix_tokens=before, suffix_tokens=others - before)
    return None


def _token_form(name: str, first_tokens: torch.Tensor | None, pooling: str) -> StateForm:
    """How many tokens stand before and behind the patches: before the first block, they are the same for every image."""
    if first_tokens is None:
        return StateForm()
    moved = (first_tokens - first_tokens[:1]).abs().amax(dim=(0, 2))
    is_patch = moved > SAME * first_tokens.abs().max()
    patches = is_patch.nonzero().flatten().tolist()
    if not patches:  # a model whose tokens are learned and look at the image later
        return StateForm()
    if pooling.removeprefix(LAST) == "patch_mean" and len(patches) != patches[-1] + 1 - patches[0]:
        raise EncoderError(f"{name} has other tokens among its patches, so pooling {pooling!r} is not defined. Use mean.")
    return StateForm(prefix_tokens=patches[0], suffix_tokens=len(is_patch) - 1 - patches[-1])


def _has_channels_last(model: nn.Module, pixel_values: torch.Tensor, tap: str, state: torch.Tensor) -> bool:
    """True for a map (n, h, w, d), false for (n, d, h, w); h and w are in proportion to the image.

    If both may be, the model is given wider images, which change the width and no other axis.
    """
    height, width = pixel_values.shape[2:]
    _, first, second, third = state.shape
    is_first, is_last = abs(second / height * width - third) <= 1, abs(first / height * width - second) <= 1
    if is_first != is_last:
        return is_last
    wider = torch.cat([pixel_values, pixel_values], dim=3)
    shape = state.shape
    with contextlib.suppress(RuntimeError, ValueError):
        shape = _state_of(model, wider, tap).shape
    if (shape[3] != third) == (shape[2] != second):
        raise EncoderError(
            f"{type(model).__name__} gives maps of shape {tuple(state.shape)}, which do not show which axis is the channels. "
            "Set another image_size in the recipe, or name another base."
        )
    return bool(shape[2] != second)
