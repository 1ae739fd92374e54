"""Which hidden state of a model becomes the vector, and how its tokens are pooled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_embed.errors import EncoderError

LAST = "last_"  # begins the poolings of the last hidden state, after the final norm; the others are of the one before it


class HiddenState:
    """The last hidden state of a model, taken by a hook, so that the earlier ones need not be kept in memory.

    In some families (ViT, DINOv2), `hidden_states[-1]` of transformers is the output of the last block, before the final
    norm; in others (CLIP) it is the final output. `find_tap` compares the tensors to find out.
    """

    def __init__(self, model: nn.Module, tap: str) -> None:
        self._model = model
        self._caught: list[torch.Tensor] = []
        self._tap = tap
        if tap:
            _module_named(model, tap).register_forward_hook(lambda _module, _inputs, out: self._caught.append(_first(out)))

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) → (n, tokens, d), or (n, d, h, w) for convolutional models."""
        output = self._model(pixel_values=pixel_values).last_hidden_state
        return self._caught.pop() if self._tap else output


def _module_named(model: nn.Module, tap: str) -> nn.Module:
    """Raises EncoderError if the model has no such module, as in an encoder whose description was changed."""
    try:
        return model.get_submodule(tap)
    except AttributeError:
        raise EncoderError(
            f"encoder.json: tap is {tap!r}, expected the name of a module of {type(model).__name__}. The file was changed: "
            "restore it, or build the encoder again."
        ) from None


@torch.inference_mode()
def find_tap(model: nn.Module, pixel_values: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The name of the module whose output is `hidden_states[-1]` bit for bit, or "" for the final output; and that state.

    Raises EncoderError if the model gives no hidden states that can be pooled, or no block's output equals the last state;
    ValueError if the model does not take images of this size.
    """
    outputs: dict[str, Any] = {}
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    blocks = [f"{name}.{len(part) - 1}" for name, part in lists if len(part)]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: _first(out)}))
        for name in blocks
    ]
    try:
        output = model(pixel_values=pixel_values, output_hidden_states=True)
    except RuntimeError as error:  # from torch, if the model does not check the size itself (SigLIP)
        raise ValueError(str(error)) from None
    finally:
        for handle in handles:
            handle.remove()
    states = getattr(output, "hidden_states", None)
    if not states:
        raise EncoderError(f"{type(model).__name__} gives no hidden states, so nothing can be pooled. Name another base.")
    if states[-1].ndim not in (3, 4):
        raise EncoderError(
            f"{type(model).__name__} gives hidden states of shape {tuple(states[-1].shape)}, expected tokens (n, tokens, d) or "
            "maps (n, d, h, w). Name another base."
        )
    if torch.equal(states[-1], output.last_hidden_state):
        return "", states[-1]
    for name in blocks:
        if isinstance(outputs.get(name), torch.Tensor) and torch.equal(outputs[name], states[-1]):
            return name, states[-1]
    raise EncoderError(
        f"{type(model).__name__}: no block's output equals hidden_states[-1]; tried {blocks}. Name another base, or a pooling "
        "that begins with last_."
    )


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def pooler(pooling: str, prefix_tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function (n, tokens, d) or (n, d, h, w) → (n, d).

    `mean` is over all tokens, special ones included; for feature maps, over height and width.
    Raises EncoderError if the pooling needs a class token and the model has none.
    """
    kind = pooling.removeprefix(LAST)
    if kind not in ("mean", "patch_mean", "cls"):
        raise NotImplementedError(f"pooling {pooling!r} has no arithmetic here")
    if kind == "cls" and prefix_tokens < 1:
        raise EncoderError("pooling 'cls' needs a class token, but this model has none. Use 'mean'.")

    def pool(states: torch.Tensor) -> torch.Tensor:
        if states.ndim == 4:
            return states.mean(dim=(2, 3))
        if kind == "cls":
            return states[:, 0]
        return states[:, prefix_tokens if kind == "patch_mean" else 0 :].mean(dim=1)

    return pool
