"""The state of a table, as `lora-embed status` shows it."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lora_embed.errors import TableError
from lora_embed.schema import Part
from lora_embed.store.store import Store
from lora_embed.table.manifest import Manifest
from lora_embed.table.versions import listed_versions, read_manifest
from lora_embed.text import counted, in_lines, number_of


@dataclass(frozen=True, kw_only=True)
class TableState:
    """The state of a table: its versions, staged parts, held spaces and gates."""

    table: str
    version: int | None
    space_id: str | None
    created: str | None
    counts: dict[str, int]
    versions: list[int]
    staged: dict[str, int]  # parts, by space and layout
    held: dict[str, str]  # spaces that a rollback holds back → reason
    forgotten: int  # images that were forgotten and must not come back
    gates: dict[str, dict[str, Any]]  # of the current version, as its manifest has them
    because: str = ""  # why it was made, if a person made it: by a rollback, or to forget images

    def describe(self) -> str:
        """For a person."""
        lines = [f"table     {self.table}"]
        if self.version is None:
            lines.append("version   nothing published yet")
        else:
            lines += [f"version   {self.version} of {self.created}, space {self.space_id}"]
            lines += [f"          {self.because}"] if self.because else []
            lines += [f"holds     {counted(self.counts)}"]
            lines += [f"retained  versions {', '.join(map(str, self.versions))}", *_gate_lines(self.gates)]
        lines += [f"held back space {space}: {why}" for space, why in self.held.items()]
        lines += [f"forgotten {number_of(self.forgotten, 'image')}"] if self.forgotten else []
        lines += [f"staged    {number_of(parts, 'part')} in {layout}" for layout, parts in self.staged.items()] or [
            "staged    nothing"
        ]
        return in_lines(lines)


def _gate_lines(gates: dict[str, dict[str, Any]]) -> list[str]:
    """One line for all gates that passed, and one line for each gate that a person accepted."""
    passed, accepted = [], []
    for name, gate in gates.items():
        value, limit = "not finite" if gate["value"] is None else f"{gate['value']:.3g}", f"{gate['limit']:.3g}"
        if gate.get("holds", True):  # the oldest tables have only a value and a limit in their gates
            passed.append(f"{name} {value} {'≥' if gate.get('direction') == 'at least' else '≤'} {limit}")
        else:
            accepted.append(f"accepted  {name} {value}, {gate['direction']} {limit} ({gate['accepted']}): {gate['says']}")
    return [f"gates     {len(passed)} passed: {', '.join(passed)}"] * bool(passed) + accepted


def describe_table(uri: str, storage_options: dict[str, Any] | None = None) -> TableState:
    """Read versions and staged parts of a table. Raises TableError if there is no table."""
    store = Store(uri, storage_options or {})
    staged: dict[str, int] = defaultdict(int)
    for entry in store.list_files("staging"):
        folder, _, name = entry.path.removeprefix("staging/").rpartition("/")
        if Part.parse(name) is not None:
            staged[folder] += 1
    manifest = read_manifest(store)
    if manifest is None and not staged and not store.list_files("encoders"):
        raise TableError(f"{uri}: is not a table: it has no versions, staged parts or encoders. Correct the path.")
    return TableState(
        table=uri,
        version=manifest.version if manifest else None,
        space_id=manifest.space_id if manifest else None,
        created=manifest.created if manifest else None,
        counts=manifest.counts if manifest else {},
        versions=listed_versions(store),
        staged=dict(staged),
        held=manifest.held if manifest else {},
        forgotten=len(manifest.forgotten) if manifest else 0,
        gates=manifest.gates if manifest else {},
        because=_because(manifest) if manifest else "",
    )


def _because(manifest: Manifest) -> str:
    """What a person did to make this version, with the reason that they gave."""
    rollback, forgot = (manifest.lineage.get(name) for name in ("rollback", "forgot"))
    if isinstance(forgot, dict):
        return f"made to forget {number_of(int(forgot.get('images', 0)), 'image')}: {forgot.get('why', '')}"
    if isinstance(rollback, dict):
        return f"a rollback to version {rollback.get('to')}: {rollback.get('why', '')}"
    return ""
