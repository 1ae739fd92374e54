"""The fences of the design: who may import what, in which direction, and what must stay light."""

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
LAYERS = [  # top to bottom: a module imports from its own layer and those above it
    [
        "text",
        "errors",
        "libraries",
        "explain",
        "yaml_file",
        "hub",
        "config",
        "schema",
        "foreign",
        "manifest",
        "stages",
        "disk",
        "retry",
        "remote",
        "storage",
        "fetch",
        "lend",
        "effort",
        "heartbeat",
    ],
    ["evaluate", "evaluate.metrics", "evaluate.records", "evaluate.rank", "evaluate.figures", "evaluate.show", "evaluate.cka"],
    [
        "model.*",
        "parquet",
        "plan",
        "fields",
        "parquet_file",
        "read_tar",
        "read_parquet",
        "read",
        "resume",
        "decode",
        "isolate",
        "write",
        "health",
        "gates",
        "places",
        "index_files",
        "export",
        "progress",
        "ending",
        "page",
        "record",
    ],
    ["report.*"],
    [
        "embed",
        "embed_each",
        "versions",
        "retention",
        "staging",
        "table",
        "verify",
        "status",
        "compact",
        "lineage",
        "search",
        "ray_private",
        "cluster",
        "metrics",
        "runs",
    ],
    ["tune.*"],
    ["pipeline"],
    ["judge"],
    ["publish", "work"],
    ["preview", "journal"],
    ["run"],
    ["outlook"],
    ["evaluate.collect", "evaluate.candidates", "evaluate.thumbnails", "evaluate.assess"],
    ["cli", "cli_options", "cli_tables", "cli_evaluate", "cli_tune", "demo.*", "jobs.*"],
]
FENCES = {  # library → who alone imports it
    "ray": ["ray_private", "cluster", "pipeline", "cli", "jobs.*"],
    "peft": ["model.adapter", "model.peft_private", "model.merge"],
    "transformers": ["model.*"],
    "fsspec": ["remote", "storage", "lend"],
    "pyarrow.parquet": ["parquet", "write", "table", "verify", "parquet_file", "export", "index_files"],
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


def layer_of(name: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if is_one_of(name, layer)]
    assert len(found) == 1, f"{name} stands in layers {found} of LAYERS: give a new module its place"
    return found[0]


def is_placed(name: str) -> bool:
    return name != "__init__" and not name.startswith("scripts.")


def test_modules_are_found() -> None:
    assert {"config", "model.adapter", "demo.tour", "jobs.embed"} <= set(MODULES)
    assert own_imports("config") == {"errors", "explain", "hub", "text", "yaml_file"}
    assert {"pipeline", "plan", "schema", "model.build"} <= own_imports("run")
    assert "model.build" not in own_imports("run", at_import=True)
    assert "table" not in own_imports("cli_tables", at_import=True)
    assert "table" in own_imports("cli_options")
    assert {"run", "demo.tour"} <= own_imports("cli")


@pytest.mark.parametrize("name", sorted(filter(is_placed, MODULES)))
def test_imports_go_one_way(name: str) -> None:
    below = {target for target in own_imports(name) if layer_of(target) > layer_of(name)}
    assert not below, f"{name} imports {sorted(below)}, which stand below it"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: own_imports(name) - {name} for name in MODULES if is_placed(name)}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("library", FENCES)
def test_a_library_is_imported_behind_its_fence_alone(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(f"{target}.".startswith(f"{library}.") for target in imported(path))}
    outside = {name for name, libraries in OUTSIDE_THE_FENCES.items() if library in libraries}
    assert {name for name in users if not is_one_of(name, FENCES[library])} == outside


def test_peft_is_not_asked_to_inject_modules() -> None:
    """Its configuration and pure functions only: injection is where merges go silently wrong."""
    used = {target for name in FENCES["peft"] for target in imported(MODULES[name]) if target.startswith("peft")}
    assert used
    assert not {target for target in used if target.endswith(("get_peft_model", "PeftModel", "inject_adapter_in_model"))}


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        *((module, set()) for module in ("lora_embed", "lora_embed.decode", "lora_embed.isolate", "lora_embed.cli")),
        ("lora_embed.write", set()),
        ("lora_embed.outlook", {"ray"}),
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
