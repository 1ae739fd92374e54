"""The fences of the house: which folder may import which, who alone imports a library, and what must stay light."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from jobs import ROOT

PACKAGE = ROOT / "src" / "lora_embed"
# Bottom to top: a folder imports from folders before it alone, and from the ground.
GROUND = ["text", "errors", "libraries", "installed", "entries", "schema"]
FLOORS = [
    "vectors", "store", "config", "monitor", "images", "model", "shards", "table", "chain", "report", "gates", "search", "run",
    "evaluate", "tune", "demo", "cli", "jobs",
]  # fmt: skip
FENCES = {  # library → who alone imports it
    "ray": ["chain.ray_private", "chain.cluster", "chain.pipeline"],
    "peft": ["model.member", "model.merge", "model.peft_private", "model.unmerged"],
    "transformers": ["model.*"],
    "fsspec": ["store.*"],
    "pyarrow.parquet": ["table.*", "shards.*", "search.*"],
}
# Training has no place in the package: the demo's adapters are trained by PEFT's own injection.
OUTSIDE_THE_FENCES = {"scripts.train_demo_adapters": {"peft", "transformers"}}
HEAVY = ["torch", "transformers", "ray", "peft"]


def modules() -> dict[str, Path]:
    """Name below the package, or `jobs.embed` and the like → file."""
    found = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
    for folder in ("jobs", "scripts"):
        found |= {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


MODULES = modules()


def imported(path: Path, *, at_import: bool = False) -> set[str]:
    """Dotted names that a file imports, those for type checkers left out; with `at_import`, not those within functions."""
    names = set()
    for node in nodes(ast.parse(path.read_text()), at_import=at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                names.add(str(node.args[0].value))
    return names


def nodes(node: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child, at_import=at_import)


def own_imports(name: str, *, at_import: bool = False) -> set[str]:
    """Modules of the package that a module imports, named as in `MODULES`."""
    found = set()
    for target in imported(MODULES[name], at_import=at_import):
        if target.partition(".")[0] != "lora_embed":
            continue
        below = target.removeprefix("lora_embed").removeprefix(".")
        found.add(below if below in MODULES else below.rpartition(".")[0])  # what is imported may be a name in the module
    return found - {"", "lora_embed"}


def is_one_of(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) or name == pattern.removesuffix(".*") for pattern in patterns)


def floor_of(name: str) -> int:
    """Of the ground 0 and less, each of its modules by itself."""
    folder = name.partition(".")[0]
    if folder in GROUND:
        return GROUND.index(folder) - len(GROUND)
    assert folder in FLOORS, f"{name}: give a new folder its place in FLOORS"
    return FLOORS.index(folder)


def is_placed(name: str) -> bool:
    return name != "__init__" and not name.startswith("scripts.")


def test_modules_are_found() -> None:
    assert {"config.models", "model.adapter", "demo.tour", "jobs.embed"} <= set(MODULES)
    assert own_imports("config.models") == {
        "errors", "config.messages", "config.paths", "config.recognise", "config.values", "config.yaml",
    }  # fmt: skip
    assert {"chain.items", "run.decide", "run.publish", "schema"} <= own_imports("run.job")
    assert "model.build" in own_imports("run.encoders")
    assert "model.build" not in own_imports("run.encoders", at_import=True)
    assert "table.read" not in own_imports("cli.tables", at_import=True)
    assert {"run.job", "demo.tour"} <= own_imports("cli.main")


@pytest.mark.parametrize("name", sorted(filter(is_placed, MODULES)))
def test_imports_go_downwards(name: str) -> None:
    above = {target for target in own_imports(name) if floor_of(target) > floor_of(name)}
    assert not above, f"{name} imports {sorted(above)}, which stand above it"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: own_imports(name) - {name} for name in MODULES if is_placed(name)}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(filter(is_placed, MODULES)))
def test_no_import_hides(name: str) -> None:
    """What a module needs of another, it imports or is handed."""
    text = MODULES[name].read_text()
    assert "sys.modules" not in text
    assert "import_module(" not in text or name == "libraries"


@pytest.mark.parametrize("folder", [folder for folder in FLOORS if folder != "jobs"])
def test_a_folder_says_what_it_is_for_and_imports(folder: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    assert said is not None
    assert "import" in said.lower()


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_imported_behind_its_fence_alone(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(f"{target}.".startswith(f"{library}.") for target in imported(path))}
    outside = {name for name, libraries in OUTSIDE_THE_FENCES.items() if library in libraries}
    assert users - outside
    assert {name for name in users if not is_one_of(name, FENCES[library])} == outside


def test_peft_is_not_asked_to_inject_modules() -> None:
    """Its configuration and pure functions only: injection is where merges go silently wrong."""
    folding = set(FENCES["peft"]) - {"model.unmerged"}  # which checks, and folds nothing
    used = {target for name in folding for target in imported(MODULES[name]) if target.startswith("peft")}
    assert used
    assert not {target for target in used if target.endswith(("get_peft_model", "PeftModel", "inject_adapter_in_model"))}


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("lora_embed", set()),
        ("lora_embed.images.isolate", set()),
        ("lora_embed.chain.chunks", set()),
        ("lora_embed.chain.actors", set()),
        ("lora_embed.cli.main", set()),
        ("lora_embed.run.plan", {"ray"}),
        ("lora_embed.model.ingredients", set()),
        ("lora_embed.model.encoder", {"torch", "transformers"}),
    ],
)
def test_what_must_stay_light_imports_nothing_heavy(module: str, needs: set[str]) -> None:
    """Decode workers start often and many to a machine; `--help` answers at once; a run starts before it needs torch."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    assert set(found.stdout.split()) == needs


def test_reading_a_table_needs_neither_torch_nor_ray() -> None:
    code = f"import sys, lora_embed; lora_embed.open_table; print(*[name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, cwd=ROOT)
    assert found.stdout.split() == []
