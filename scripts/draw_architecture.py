"""Write what docs/architecture.md says of the source by itself: the picture of the folders, and the map of the files."""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lora_embed"
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "folders.svg"
GROUND = ("entries", "errors", "libraries", "schema", "text")
LABELS = {  # what stands under a folder's name in the picture
    "jobs": "entry points for Ray",
    "cli": "commands",
    "tune": "search for weights",
    "demo": "all of it, on real images",
    "evaluate": "encoders compared",
    "run": "job → published version",
    "gates": "may it be published?",
    "search": "nearest images, indexes",
    "chain": "decode → embed → write",
    "report": "HTML pages",
    "table": "files and versions",
    "shards": "inputs → samples",
    "model": "adapters → encoder",
    "monitor": "progress and run state",
    "config": "recipes and jobs",
    "vectors": "statistics, NumPy alone",
    "images": "bytes → pixels",
    "store": "disks and object stores",
}
OTHERS = {  # folders beside the package whose files the map lists
    "jobs": "Entry points for `ray job submit`.",
    "scripts": "Programs that write files of this repository.",
    "campaigns": "Long trials, which `make` starts: faults, nights, readers, hostile input.",
    "benchmarks": "Measurements of speed and quality.",
}
WIDTH, ROW, BOX, HEIGHT = 620, 62, 156, 38
Point = tuple[float, int]  # x, row


def python_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]


def opening(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def folder_imports() -> dict[str, set[str]]:
    """Folder of the package, or `jobs` → folders that its files import, the ground left out."""
    files = {path: path.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    files |= dict.fromkeys((ROOT / "jobs").glob("*.py"), "jobs")
    imports: dict[str, set[str]] = {folder: set() for folder in files.values()}
    for path, folder in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            for module in [f"{modules[0]}.{name}" for name in names] if modules else names:
                target = module.split(".")[1] if module.startswith("lora_embed.") else ""
                imports[folder] |= {target} & {*files.values()} - {folder}
    return imports


def levels(imports: dict[str, set[str]]) -> dict[str, int]:
    """Folder → the number of folders below it on the longest way down."""
    found: dict[str, int] = {}

    def level(folder: str) -> int:
        if folder not in found:
            found[folder] = max((1 + level(below) for below in imports[folder]), default=0)
        return found[folder]

    for folder in imports:
        level(folder)
    return found


def direct(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way implies."""

    def reached(folder: str) -> set[str]:
        return imports[folder].union(*(reached(below) for below in imports[folder]))

    return {
        folder: {below for below in belows if not any(below in reached(other) for other in belows)}
        for folder, belows in imports.items()
    }


def rows_of(imports: dict[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows from the top, and each arrow as the chain of what it passes: a place is kept free in each row between its ends."""
    level = levels(imports)
    top = max(level.values())
    rows: list[list[str]] = [[folder for folder in imports if top - level[folder] == row] for row in range(top + 1)]
    ways = []
    for folder, belows in direct(imports).items():
        for below in sorted(belows):
            first, last = top - level[folder], top - level[below]
            between = [f"{folder}>{below}@{row}" for row in range(first + 1, last)]
            for row, place in enumerate(between, first + 1):
                rows[row].append(place)
            ways.append([folder, *between, below])
    return rows, ways


def places(rows: list[list[str]], ways: list[list[str]]) -> dict[str, Point]:
    """A place for each folder and bend: in each row in the order of the means of what they are joined to."""
    joined: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for way in ways:
        for one, other in itertools.pairwise(way):
            joined[one].append(other)
            joined[other].append(one)
    at: dict[str, Point] = {}
    for number, row in enumerate(rows):
        _spread(at, row, number, {name: [other for other in joined[name] if other in at] for name in row})
    for _ in range(8):
        for number, row in [*reversed(list(enumerate(rows))), *enumerate(rows)]:
            _spread(at, row, number, {name: joined[name] for name in row})
    edges = [x + side * BOX / 2 for name, (x, _) in at.items() for side in (-1, 1) if "@" not in name]
    aside = (WIDTH - min(edges) - max(edges)) / 2
    return {name: (x + aside, row) for name, (x, row) in at.items()}


def _spread(at: dict[str, Point], row: list[str], number: int, joined: dict[str, list[str]]) -> None:
    """Place a row: as near to the mean of its neighbours as the others leave room for."""
    means = {name: sum(at[other][0] for other in joined[name]) / max(len(joined[name]), 1) or WIDTH / 2 for name in row}
    ordered = sorted(row, key=lambda name: (means[name], name))
    sizes = [30 if "@" in name else BOX + 24 for name in ordered]
    xs: list[float] = []
    for name, size, before in zip(ordered, sizes, [0, *sizes], strict=False):
        least = xs[-1] + (before + size) / 2 if xs else size / 2
        xs.append(max(least, means[name]))
    aside = sum(means[name] - x for name, x in zip(ordered, xs, strict=True)) / len(xs)  # all were moved to the right
    xs = [x + aside for x in xs]
    at.update({name: (x, number) for name, x in zip(ordered, xs, strict=True)})


def picture() -> str:
    """The folders as SVG: who is higher imports who is lower."""
    rows, ways = rows_of(folder_imports())
    at = places(rows, ways)
    height = ROW * len(rows) + 74
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        'text-anchor="middle" role="img" aria-labelledby="folders">',
        '  <title id="folders">The folders of lora-embed, each above those that it imports</title>',
        f'  <rect width="{WIDTH}" height="{height}" rx="12" fill="#fff"/>',
        '  <g fill="none" stroke="#8a8a8a" stroke-width="1.4">',
        *(f'    <path d="{_curve([at[name] for name in way])}"/>' for way in sorted(ways)),
        "  </g>",
        '  <g fill="#e8f0fe" stroke="#6b8fd6">',
    ]
    folders = sorted(name for name in at if "@" not in name)
    lines += [
        f'    <rect x="{at[name][0] - BOX / 2:.0f}" y="{_top(at[name][1])}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
        for name in folders
    ]
    ground = ROW * len(rows) + 16
    lines += [f'    <rect x="12" y="{ground}" width="{WIDTH - 24}" height="{HEIGHT}" rx="6" fill="#f1f1f1" stroke="#999"/>']
    lines += ["  </g>", '  <g fill="#222" font-size="14" font-weight="600">']
    lines += [f'    <text x="{at[name][0]:.0f}" y="{_top(at[name][1]) + 16}">{name}</text>' for name in folders]
    lines += [f'    <text x="{WIDTH / 2:.0f}" y="{ground + 24}">{" · ".join(GROUND)}</text>', "  </g>"]
    lines += ['  <g fill="#444" font-size="11.5">']
    lines += [f'    <text x="{at[name][0]:.0f}" y="{_top(at[name][1]) + 31}">{LABELS[name]}</text>' for name in folders]
    return "\n".join([*lines, "  </g>", "</svg>", ""])


def _top(row: int) -> int:
    return 12 + ROW * row


def _curve(points: list[Point]) -> str:
    """From the lower edge of the first box to the upper edge of the last, upright past the boxes in between."""
    x, row = points[0]
    path = f"M{x:.0f} {_top(row) + HEIGHT}"
    for number, (to, below) in enumerate(points[1:], 1):
        start, end = _top(below - 1) + HEIGHT, _top(below)
        path += f"C{x:.0f} {start + 12} {to:.0f} {end - 12} {to:.0f} {end}"
        if number < len(points) - 1:
            path += f"V{end + HEIGHT}"
        x = to
    return path


def file_map() -> str:
    """The map of files as Markdown: a heading a folder, a line a file."""
    level = levels(folder_imports())
    folders = sorted((folder for folder in level if folder != "jobs"), key=lambda folder: (-level[folder], folder))
    lines = []
    for folder in folders:
        lines += [f"### {folder}/", opening(PACKAGE / folder / "__init__.py"), "", *_rows(PACKAGE / folder)]
    lines += ["### The ground", "Single files, which every folder may import.", ""]
    lines += [f"- `{name}.py`: {opening(PACKAGE / f'{name}.py')}" for name in ("__init__", *GROUND)]
    for folder, purpose in OTHERS.items():
        lines += ["", f"### {folder}/ (beside the package)", purpose, "", *_rows(ROOT / folder)[:-1]]
    return "\n".join(lines) + "\n"


def _rows(folder: Path) -> list[str]:
    return [*(f"- `{path.relative_to(folder.parent)}`: {opening(path)}" for path in python_files(folder)), ""]


def page(text: str) -> str:
    """The page with its map made anew."""
    return re.sub(r"(<!-- map: begin -->\n).*(<!-- map: end -->)", lambda m: m[1] + file_map() + m[2], text, flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.write_text(picture())
    PAGE.write_text(page(PAGE.read_text()))
