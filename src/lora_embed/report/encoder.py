"""The page of an encoder, from its merge report: what was merged, what each adapter changed, the remarks, the proof."""

from pathlib import Path
from typing import Any

from lora_embed.model.description import REPORT, Description, read_description
from lora_embed.model.files import read_json
from lora_embed.report.page import page, write

PAGE = "merge_report.html"  # never copied with an encoder: whoever gets a folder from others gets no page of theirs
SECTIONS = {
    "summary": "In short",
    "merged": "What was merged, and the proof",
    "remarks": "Remarks of the build",
    "weights": "Weight by weight",
    "lineage": "Provenance",
}


def write_encoder_page(folder: Path) -> Path:
    """Write the page beside the merge report of an encoder that was just built. Raises StorageError if that fails."""
    text = encoder_page(read_json(folder / REPORT), read_description(folder))
    write(text, folder / PAGE)
    return folder / PAGE


def encoder_page(report: dict[str, Any], encoder: Description) -> str:
    """The page's HTML. All text of the report is escaped on its way in."""
    members = [member | {"weights_changed": len(member["weights"])} for member in report["members"]]
    merges = [member for member in members if member["adapters"]]
    return page(
        f"Encoder {encoder.space_id}",
        [report["base"]["uri"]],
        "report/templates/encoder",
        SECTIONS,
        report=report,
        encoder=encoder,
        members=members,
        adapters=[adapter for member in merges for adapter in member["adapters"]],
        methods=list(dict.fromkeys(member["merge_method"] for member in merges)),
        changed=sum(member["weights_changed"] for member in merges),
        unexplained=max((member["largest_error_beyond_rounding"] for member in merges), default=0.0),
        vectors=max((member["largest_difference_of_vectors"] for member in merges), default=0.0),
    )
