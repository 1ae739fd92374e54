"""Writes what a build knows of its merge: `merge_report.json`, and the same for people, the encoder's README.md."""

import hashlib
import html
import json
import math
import re
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_embed.model.base_files import Base
from lora_embed.model.description import REPORT, Description
from lora_embed.model.member import Member, Proven

FORMAT = 1


def write_report(
    folder: Path,
    description: Description,
    base: Base,
    members: list[Member],
    proofs: list[Proven],
    notes: list[str],
    vectors_moved: float | None,
) -> None:
    """Write both files into an encoder's folder, whose other files are there already.

    `vectors_moved` is the relative L2 difference of vectors that came of storing the encoder as an adapter.
    """
    weights = sorted(folder.rglob("*.safetensors"))
    files = {file.relative_to(folder).as_posix(): file for file in (*weights, *sorted(folder.rglob("adapter_config.json")))}
    report = {
        "format": FORMAT,
        "space_id": description.space_id,
        "base": {"uri": base.uri, "content_hash": base.content_hash},
        "notes": notes,
        "store": {
            "is_adapter": description.base is not None,
            "bytes": sum(file.stat().st_size for file in weights),
            "base_bytes": sum(file.stat().st_size for file in base.folder.glob("*.safetensors")),
            "vectors_moved": vectors_moved,
        },
        "members": [_describe_member(member, proof) for member, proof in zip(members, proofs, strict=True)],
        "files": {name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    (folder / "README.md").write_text(_page(report, description))


def _describe_member(member: Member, proven: Proven) -> dict[str, Any]:
    proof = proven.weights
    merged, rows, relations = member.merged, member.rows, member.relations
    total = math.hypot(*(row.change for row in rows.values())) if rows else 0.0
    cut_norms = [row.cut for row in rows.values() if row.cut is not None]
    return {
        "merge_method": merged.method,
        "merge_options": merged.options,
        "adapters": [
            {
                "uri": adapter.uri,
                "content_hash": adapter.content_hash,
                "weight": weight,
                "norm": norm,
                "trained_on": adapter.trained_on,
                "weights_changed": len(adapter.changes),
                "head_keys_dropped": list(adapter.head_keys),
            }
            for adapter, weight, norm in zip(merged.adapters, merged.weights, relations.norms(), strict=True)
        ],
        "relations": relations.tables(),
        "norm": total,
        "relative_change": total / math.hypot(*(row.before for row in rows.values())) if rows else 0.0,
        "cut": math.hypot(*cut_norms) / total if cut_norms and total else None,
        "largest_error": max((row["error"] for row in proof.values()), default=0.0),
        "largest_error_beyond_rounding": max((max(0.0, row["error"] - row["rounding"]) for row in proof.values()), default=0.0),
        "largest_difference_of_vectors": proven.vectors,
        "weights": {name: asdict(row) | proof[name] for name, row in rows.items()},
    }


def _page(report: dict[str, Any], description: Description) -> str:
    """The report as Markdown, which model hubs show as the page of an encoder's directory."""
    lines = [
        "# Encoder " + description.space_id,
        "",
        f"Made by lora-embed from `{_code(report['base']['uri'])}`: {description.dimension}-dimensional vectors, pooling "
        f"`{description.pooling}`, images of {description.preprocessing.size[0]}×{description.preprocessing.size[1]} pixels.",
    ]
    if report["store"]["is_adapter"]:
        lines += ["", _store_page(report["store"])]
    lines += [f"\nNote: {_words(note)}." for note in report["notes"]]
    for number, member in enumerate(report["members"]):
        title = f" {number + 1} of {len(report['members'])}" if len(report["members"]) > 1 else ""
        lines += ["", *_member_page(member, title)]
    lines += ["", "## Files", "", "| file | bytes | sha256 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {file['bytes']:,} | `{file['sha256']}` |" for name, file in report["files"].items()]
    return "\n".join(lines) + "\n"


def _store_page(store: dict[str, Any]) -> str:
    stored_mb, saved_mb = store["bytes"] / 1e6, (store["base_bytes"] - store["bytes"]) / 1e6
    return (
        f"The encoder is stored as an adapter of {stored_mb:,.1f} MB for the base, {saved_mb:,.1f} MB less than a whole model. "
        f"The golden images' vectors differ from those of the whole merge by up to {store['vectors_moved']:.1e} (relative L2)."
    )


def _member_page(member: dict[str, Any], title: str) -> list[str]:
    if not member["adapters"]:
        return [
            f"## Model{title}",
            "",
            "This is the base model alone. Nothing was merged, and the saved weights equal the base's bit by bit.",
        ]
    options = ", ".join(f"{key} {value}" for key, value in member["merge_options"].items())
    lines = [
        f"## Merge{title}: {member['merge_method']}" + (f" ({options})" if options else ""),
        "",
        f"{len(member['weights'])} weights changed, by {member['relative_change']:.2%} of their norm. After saving, the "
        "change of each weight was computed again from the adapter files and compared with the saved files. The largest error "
        f"is {member['largest_error']:.1e} of the change; {_unexplained(member['largest_error_beyond_rounding'])}. All other "
        "weights equal the base's bit by bit. The golden images' vectors differ by up to "
        f"{member['largest_difference_of_vectors']:.1e} (relative L2) from those of adapters that are not merged.",
    ]
    if member["cut"] is not None:
        ranks = [row["rank"] for row in member["weights"].values()]
        lines += [
            "",
            f"One adapter of ranks {min(ranks)} to {max(ranks)} stores the change; it leaves out {member['cut']:.1e} of it.",
        ]
    lines += ["", "| | adapter | weight | norm of its share | weights | trained on |", "| --- | --- | --- | --- | --- | --- |"]
    for number, adapter in enumerate(member["adapters"], 1):
        figures = f"{adapter['weight']} | {adapter['norm']:.3g} | {adapter['weights_changed']}"
        lines.append(
            f"| {number} | `{_code(adapter['uri'])}` | {figures} | {_words(adapter['trained_on'] or 'not recorded')} |"
        )
    if len(member["adapters"]) > 1:
        lines += _relations_page(member["relations"])
    lines += ["", "<details><summary>Weight by weight</summary>", ""]
    lines += ["| weight | change / weight | shares | error |", "| --- | --- | --- | --- |"]
    for name, row in member["weights"].items():
        shares = " · ".join(f"{share:.3g}" for share in row["shares"])
        lines.append(f"| {name} | {row['change'] / (row['before'] or 1):.2%} | {shares} | {row['error']:.1e} |")
    return [*lines, "", "</details>"]


def _words(text: str) -> str:
    """Text that may come from others, such as an adapter's name for its base, so that it becomes no HTML, link or picture."""
    escaped = html.escape(_line(text), quote=False).replace("://", ":&#47;/")
    return re.sub(r"([\\`\[\]|!])", r"\\\1", escaped)


def _code(text: str) -> str:
    """The same for text within backticks, where only backticks and the bars of a table have a meaning."""
    return _line(text).replace("`", "'").replace("|", "\\|")


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _unexplained(error: float) -> str:
    """How much of an error rounding the weights to float32 explains."""
    return f"rounding to float32 does not explain {error:.1e} of it" if error else "rounding to float32 explains all of it"


def _relations_page(relations: dict[str, Any]) -> list[str]:
    """One row for each pair of adapters."""
    names = {"cosine": "cosine", "sign_conflicts": "sign conflicts", "subspace_overlap": "overlap of subspaces"}
    lines = ["", f"| adapters | {' | '.join(names.values())} |", "| --- " * 4 + "|"]
    count = len(relations["cosine"])
    for first, second in combinations(range(count), 2):
        cells = [relations[key][first][second] for key in names]
        row = " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {first + 1}, {second + 1} | {row} |")
    return [
        *lines,
        "",
        "Cosine: of the changes to the weights. Sign conflicts: of the weights that both change, the share changed in opposite "
        "directions; 0.5 is chance. Overlap of subspaces: the share of the smaller output space that lies in the other one.",
    ]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
