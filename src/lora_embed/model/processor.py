"""A folder's image processor: its settings with the defaults of its class, and the object that they are checked against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor

from lora_embed.errors import ProcessorRefused
from lora_embed.images.processors import REFUSED, TORCHVISION, kind_of
from lora_embed.model.files import MODEL_CONFIG, PROCESSOR_FILES, own_file, own_files, read_json
from lora_embed.model.transformers_private import is_torchvision_alone, processor_name_of
from lora_embed.text import in_one_line

# Errors of transformers for settings that its classes cannot take.
ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip
_AGAIN = "Copy or download the model again, or save its image processor there with save_pretrained."


@dataclass(frozen=True)
class Processor:
    """The settings of an image processor, and its object of transformers; None for a class that Pillow cannot make."""

    settings: dict[str, Any]
    made: Any | None


def read_processor(folder: Path) -> Processor:
    """The image processor. Always the PIL one: where torchvision is installed, the default would make other pixels.

    Raises ProcessorRefused if the folder has none, or none that is known.
    """
    file, written = _written(folder)
    kind = _kind(folder, file, written)
    if kind in REFUSED or kind in TORCHVISION:
        given = {key: value for key, value in written.items() if value is not None}
        return Processor(TORCHVISION.get(kind, {}) | given | {"image_processor_type": kind}, None)
    if is_torchvision_alone(kind):
        raise _refused(
            f"{file}: its image processor {kind} exists in transformers for torchvision alone, and lora-embed has no rule of "
            "its own for it.",
            "Name another base.",
        )
    named = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind, None)
    if not kind.endswith("ImageProcessor") or named is None or getattr(named, "is_dummy", False):
        lack = "does not have" if named is None or not kind.endswith("ImageProcessor") else "has for torchvision alone"
        raise _refused(
            f"{file}: its image processor is {kind[:100]!r}, which this version of transformers {lack}.",
            "Install a newer transformers, or name another base.",
        )
    try:
        made = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        settings = made.to_dict()
    except ERRORS as error:
        raise _refused(
            f"{file}: its settings cannot be used by {kind}: {in_one_line(error)}.", "Correct this file, or copy it again."
        ) from None
    # What a class leaves out is not done: `to_dict` drops what is None.
    steps = ("do_resize", "do_rescale", "do_normalize")
    return Processor(settings | {step: False for step in steps if not getattr(made, step, None)}, made)


def _written(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that transformers reads the image processor from, and what it says of it."""
    own_files(folder, (MODEL_CONFIG, *PROCESSOR_FILES))  # refuses links
    for name in reversed(PROCESSOR_FILES):
        file = own_file(folder, name)
        if file is None:
            continue
        try:
            content = read_json(file)
        except ValueError as error:
            raise _refused(f"{file}: is not valid JSON ({in_one_line(error)}).", _AGAIN) from None
        if not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else "one value"
            raise _refused(f"{file}: holds {kind}, expected a JSON object.", _AGAIN)
        written = content if name == PROCESSOR_FILES[0] else content.get("image_processor")
        if isinstance(written, dict):
            return file, written
    raise _refused(
        f"{folder}: has no image processor, neither in preprocessor_config.json nor as image_processor in "
        "processor_config.json.",
        "Save the image processor of the model there, with its save_pretrained.",
    )


def _kind(folder: Path, file: Path, written: dict[str, Any]) -> str:
    """The class of the image processor, as transformers finds it."""
    name = written.get("image_processor_type") or str(written.get("feature_extractor_type") or "").replace(
        "FeatureExtractor", "ImageProcessor"
    )
    config = own_file(folder, MODEL_CONFIG)
    if not name and "video_processor_type" not in written and config is not None:
        try:
            about = read_json(config)
        except ValueError as error:
            raise _refused(f"{config}: is not valid JSON ({in_one_line(error)}).", _AGAIN) from None
        about = about if isinstance(about, dict) else {}
        name = about.get("image_processor_type") or processor_name_of(str(about.get("model_type")))
    if not name:
        raise _refused(
            f"{file}: has no image_processor_type, and transformers takes none for a model of this type by itself.",
            "Save the image processor of the model there, with its save_pretrained.",
        )
    return kind_of(str(name))


def _refused(reason: str, advice: str) -> ProcessorRefused:
    return ProcessorRefused(f"{reason} {advice}", reason)
