"""Parts of libraries that are not public: looked up before they are needed, and one message where such a part has changed."""

import inspect
import pkgutil
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from lora_embed.errors import LibraryMismatch


def part(package: str, name: str, purpose: str, *, takes: tuple[str, ...] = ()) -> Any:
    """The object of this name, `module:attribute.attribute`, of an installed package.

    `purpose` completes "it is needed to …". Raises LibraryMismatch where the object is not there, or is a function or a
    record without one of the parameters in `takes`.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        raise mismatch(package, f"{name} is not there", purpose) from None
    has = inspect.signature(inspect.unwrap(found)).parameters if takes else {}
    if lacking := [parameter for parameter in takes if parameter not in has]:
        raise mismatch(package, f"{name} does not take {', '.join(lacking)}", purpose)
    return found


def check(package: str, is_as_expected: bool, finding: str, purpose: str) -> None:
    """Raises LibraryMismatch with this finding unless the package is as expected."""
    if not is_as_expected:
        raise mismatch(package, finding, purpose)


def mismatch(package: str, finding: str, purpose: str) -> LibraryMismatch:
    """The error for an installed package whose inner parts are not those that this version of lora-embed was written for."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "of unknown version"
    return LibraryMismatch(
        f"{package} {installed} does not fit this version of lora-embed: {finding}, and it is needed to {purpose}. "
        f"Known to work: {_known_to_work(package)}. Install that, or a newer lora-embed."
    )


def _known_to_work(package: str) -> str:
    """The versions, by the requirements that came with this package; a cluster's nodes have its source alone."""
    try:
        needed = requires("lora-embed") or []
    except PackageNotFoundError:
        needed = []
    for requirement in needed:
        if re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower() == package:
            return requirement.partition(";")[0].strip()
    return f"the version of {package} in constraints.txt of lora-embed"
