"""The page docs/families.md: what `campaigns/families.py` found of each type, and what becomes of all other types."""

import inspect
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from family_specs import CLASSIFIED, OTHERS, POOLINGS, WRAPPERS, Form, Spec
from lora_embed.errors import EncoderError
from lora_embed.model.base_config import read_model_config

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADER = f"""| type | `hidden_states[-1]` | {" | ".join(f"`{pooling}`" for pooling in POOLINGS)} | own processor |
| --- | --- |{" --- |" * (len(POOLINGS) + 1)}
"""
RELEASE = f"transformers {transformers.__version__}"


def processor_settings(name: str, spec: Spec) -> dict[str, Any] | None:
    """The default settings of a type's own processor; None if it has none that can be made without torchvision."""
    if isinstance(spec.processor, dict):
        return spec.processor
    class_name = spec.processor or IMAGE_PROCESSOR_MAPPING_NAMES.get(name, {}).get("pil")
    return getattr(transformers, class_name)().to_dict() if class_name and name not in WRAPPERS else None


def hub_config(spec: Spec) -> dict[str, Any]:
    """The tiny configuration with images and patches of the type's own size."""

    def of_own_size(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in ("image_size", "patch_size")}
        return kept | ({"vision_config": of_own_size(config["vision_config"])} if "vision_config" in config else {})

    return of_own_size(spec.config)


def form_words(form: Form | None) -> str:
    if form is None:
        return "none"
    tokens = [f"{form.prefix} before the patches"] * bool(form.prefix) + [f"{form.suffix} behind them"] * bool(form.suffix)
    return ", ".join([form.axes, *tokens])


def line(row: Any) -> str:
    """What the campaign prints of a type."""
    figures = " ".join(f"{pooling} {value:.0e}" for pooling, value in row.figures.items())
    refused = "" if row.figures else f"refused: {next(iter(row.refused.values()), '')}"
    hub = f"; own processor: {row.hub[:160]}" if row.hub and row.figures else ""
    return f"{row.name}: {figures}{refused}{hub} ({row.seconds:.0f} s)" + "".join(
        f"\n  PROBLEM {text}" for text in row.problems
    )


def table(found: list[Any]) -> str:
    """A line of figures for each type that works."""
    lines = []
    for row in found:
        if not row.figures:
            continue
        cells = [f"{row.figures[pooling]:.0e}" if pooling in row.figures else "–" for pooling in POOLINGS]
        lines.append(f"| {row.name} | {form_words(row.spec.state)} | {' | '.join(cells)} | {in_table(row.hub)} |\n")
    return HEADER + "".join(lines)


def in_table(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def refusals(found: list[Any]) -> str:
    """A line for each type that is refused, with the sentence."""
    rows = [(row.name, next(iter(row.refused.values()))) for row in found if not row.figures and row.refused]
    lines = [f"| {name} | {in_table(text)} |\n" for name, text in rows]
    return "| type | message |\n| --- | --- |\n" + "".join(lines)


def image_types() -> list[str]:
    """All types with a class for image classification, and all others that AutoModel opens and that take pixels."""
    classified = [config.model_type for config in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING]
    others = []
    for config in MODEL_MAPPING:
        try:
            found = MODEL_MAPPING[config]
            taken = inspect.signature((found[0] if isinstance(found, tuple) else found).forward).parameters
        except (ImportError, ValueError):  # its package is not installed, or transformers names a class that it does not have
            continue
        if {"pixel_values", "pixel_values_videos"} & set(taken):
            others.append(config.model_type)
    return [*classified, *(name for name in others if name not in classified)]


def untried() -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """Types without a tiny model: by the part that is taken; by the sentence that refuses them; accepted and not tried."""
    parts, refused, rest = defaultdict(list), defaultdict(list), []
    for name in image_types():
        if name in CLASSIFIED or name in OTHERS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(CONFIG_MAPPING[name]().to_json_string())
            try:
                taken = read_model_config(Path(folder), "base").model_type
            except EncoderError as error:
                refused[without_name(str(error))].append(name)
                continue
        if taken == name:
            rest.append(name)
        else:
            parts[taken].append(name)
    return parts, refused, rest


def without_name(message: str) -> str:
    """A refusal with "…" for the name of the class or type, so that types with the same refusal stand together."""
    message = re.sub(r"^base: \w+ (needs|takes|reads|gives)", r"base: … \1", message)
    return re.sub(r"of type '[\w.-]+'", "of type …", message)


def others() -> str:
    """What becomes of the types that were not tried with a model."""
    parts, refused, rest = untried()
    taken = "".join(
        f"| {', '.join(types)} | {part}{'' if part in OTHERS or part in CLASSIFIED else ', not tried'} |\n"
        for part, types in sorted(parts.items())
    )
    lines = "".join(f"| {', '.join(types)} | {in_table(message)} |\n" for message, types in sorted(refused.items()))
    return (
        f"## Whole models whose part for images is the base\n\n| type | type of the part |\n| --- | --- |\n{taken}\n"
        f"## Refused by their configuration\n\n| types | message |\n| --- | --- |\n{lines}\n"
        f"## Not tried\n\nThe configuration of these types is accepted, and no model of theirs was tried: {', '.join(rest)}.\n"
    )


def write(found: list[Any]) -> None:
    """Write the figures between the marks of the page; the words before them stay."""
    before = DOCS.read_text(encoding="utf-8").partition(BEGIN)[0]
    families = [row for row in found if row.name in CLASSIFIED]
    works = [row for row in families if row.figures and not row.problems]
    counted = (
        f"{RELEASE} has {len(families)} families with a class for image classification: {len(works)} work, "
        f"{len(families) - len(works)} are refused. Each was made {min(row.repeat for row in families)} times, each other type "
        f"{min(row.repeat for row in found)} times, each time with other weights, adapters and images.\n"
    )
    body = (
        f"{counted}\n## Families for image classification\n\n{table(families)}\n"
        f"## Other types\n\n{table([row for row in found if row.name in OTHERS])}\n"
        f"## Whole models, tried\n\n{table([row for row in found if row.name in WRAPPERS])}\n"
        f"## Refused\n\n{refusals(found)}\n{others()}"
    )
    DOCS.write_text(f"{before}{BEGIN}\n{body}{END}\n", encoding="utf-8")
