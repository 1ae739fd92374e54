"""How a model's hidden state becomes a vector: where it is taken, where its patches are, and how they are pooled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_embed.errors import EncoderError
from lora_embed.model.description import StateForm

LAST = "last_"  # begins the poolings of the last hidden state, after the final norm; the others are of the one before it


class HiddenState:
    """The last hidden state of a model, taken by a hook, so that the earlier ones need not be kept in memory.

    In some families (ViT, DINOv2), `hidden_states[-1]` of transformers is the output of the last block, before the final
    norm; in others (CLIP) it is the final output. `find_state` compares the tensors to find out.
    """

    def __init__(self, model: nn.Module, tap: str, *, channels_last: bool = False) -> None:
        self._model = model
        self._caught: list[torch.Tensor] = []
        self._tap, self._channels_last = tap, channels_last
        if tap:
            _module_named(model, tap).register_forward_hook(lambda _module, _inputs, out: self._caught.append(first_of(out)))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) → (n, tokens, d), or (n, d, h, w) for a map."""
        output = self._model(pixel_values=pixel_values)
        state: torch.Tensor = self._caught.pop() if self._tap else output.last_hidden_state
        return state.permute(0, 3, 1, 2) if self._channels_last else state


def first_of(output: Any) -> Any:
    """What a module gives first, if it gives several tensors."""
    return output[0] if isinstance(output, tuple) else output


def _module_named(model: nn.Module, tap: str) -> nn.Module:
    """Raises EncoderError if the model has no such module, as in an encoder whose description was changed."""
    try:
        return model.get_submodule(tap)
    except AttributeError:
        raise EncoderError(
            f"encoder.json: tap is {tap!r}, expected the name of a module of {type(model).__name__}. The file was changed: "
            "restore it, or build the encoder again."
        ) from None


def pooler(pooling: str, form: StateForm) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function (n, tokens, d) or (n, d, h, w) → (n, d).

    `mean` is over all tokens, special ones included; for feature maps, over height and width.
    Raises EncoderError if the pooling needs a class token and the model has none.
    """
    kind = pooling.removeprefix(LAST)
    if kind not in ("mean", "patch_mean", "cls"):
        raise NotImplementedError(f"pooling {pooling!r} has no arithmetic here")
    if kind == "cls" and form.prefix_tokens < 1:
        mean = pooling.replace("cls", "mean")
        raise EncoderError(f"pooling {pooling!r} needs a class token, but this model has none. Use pooling: {mean}.")

    def pool(states: torch.Tensor) -> torch.Tensor:
        if states.ndim == 4:
            return states.mean(dim=(2, 3))
        if kind == "cls":
            return states[:, 0]
        if kind == "patch_mean":
            states = states[:, form.prefix_tokens : states.shape[1] - form.suffix_tokens]
        return states.mean(dim=1)

    return pool
