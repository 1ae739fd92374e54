"""The guide taken literally, with PEFT's own merging: what this project's vectors are held against."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification


def merge_by_hand(base: Path, adapters: dict[Path, int], weights: list[float], combination_type: str) -> PeftModel:
    """Load two adapters with heads of different sizes and merge them; `adapters` maps folders to numbers of classes."""
    (first, first_labels), (second, second_labels) = adapters.items()
    model = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(base, num_labels=first_labels), first, adapter_name="first"
    )
    hidden = model.base_model.model.classifier.original_module.in_features
    model.base_model.model.classifier = nn.Linear(hidden, second_labels)
    model.load_adapter(second, adapter_name="second")
    model.base_model.model.classifier = nn.Linear(hidden, second_labels)
    model.add_weighted_adapter(["first", "second"], weights, "merge", combination_type=combination_type)
    model.set_adapter("merge")
    return model.eval()


@torch.no_grad()
def embed_by_hand(model: PeftModel, base: Path, images: list[Image.Image], **processor: object) -> NDArray[np.float32]:
    """`outputs.hidden_states[-1].mean(dim=1)`, the processor's settings as given."""
    prepare = AutoImageProcessor.from_pretrained(base, backend="pil", **processor)
    pixels = prepare(images, return_tensors="pt")["pixel_values"]
    outputs = model(pixels, output_hidden_states=True)
    return outputs.hidden_states[-1].mean(dim=1).numpy()
