"""Private parts of libraries: each is looked up before it is needed, and a part that has changed gives one clear message."""

import inspect
import pkgutil
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from lora_embed.errors import LibraryMismatch


def part(package: str, name: str, purpose: str, *, takes: tuple[str, ...] = ()) -> Any:
    """The object `module:attribute.attribute` of an installed package.

    `purpose` completes the sentence "it is needed to …". Raises LibraryMismatch where the object does not exist, or
    does not take one of the parameters in `takes`.
    """
    try:
        target = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        raise mismatch(package, f"{name} is not there", purpose) from None
    parameters = inspect.signature(inspect.unwrap(target)).parameters if takes else {}
    if lacking := [parameter for parameter in takes if parameter not in parameters]:
        raise mismatch(package, f"{name} does not take {', '.join(lacking)}", purpose)
    return target


def check(package: str, is_as_expected: bool, finding: str, purpose: str) -> None:
    """Raises LibraryMismatch with this finding, unless the package is as expected."""
    if not is_as_expected:
        raise mismatch(package, finding, purpose)


def mismatch(package: str, finding: str, purpose: str) -> LibraryMismatch:
    """The error for an installed package whose private parts are not those that this version of lora-embed uses."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "of unknown version"
    return LibraryMismatch(
        f"{package} {installed} does not fit this version of lora-embed: {finding}, and it is needed to {purpose}. "
        f"Known to work: {_known_to_work(package)}. Install that, or a newer lora-embed."
    )


def _known_to_work(package: str) -> str:
    """The working versions of a package, by this package's own requirements (not known where only its source is there)."""
    try:
        requirements = requires("lora-embed") or []
    except PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        if re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower() == package:
            return requirement.partition(";")[0].strip()
    return f"the version of {package} in constraints.txt of lora-embed"
