"""What is installed: versions of this package and of the libraries under it, and how to add an extra of this package."""

import json
import platform
import shlex
from importlib.metadata import PackageNotFoundError, distributions, version
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "lora-embed"
SHOWN = ("torch", "transformers", "peft", "ray")  # the libraries on which results and clusters depend most


def release() -> str:
    """This release's number."""
    return _version_of(NAME)


def versions() -> str:
    """One line for a report of a problem. It reads the installed packages' metadata and imports none of them."""
    libraries = ", ".join(f"{name} {_version_of(name)}" for name in SHOWN)
    return f"{NAME} {release()} (Python {platform.python_version()}, {libraries}; {platform.system()} {platform.machine()})"


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this package, from where the package itself was installed.

    pip records that place (PEP 610): the folder of the repository, which may be installed as editable, or a wheel. Only a
    package that came from an index can be named by its name, since another project may have that name before it is published.
    """
    records = [found.read_text("direct_url.json") for found in distributions(name=NAME)]  # a source tree may have one too
    if not records:  # only the package's files are there
        return f"pip install -e '.[{extra}]' in the folder of the repository"
    record = next(filter(None, records), None)
    if record is None:
        return f"pip install '{NAME}[{extra}]'"
    origin = json.loads(record)
    place = origin["url"]
    if urlsplit(place).scheme != "file":
        return f"pip install {shlex.quote(f'{NAME}[{extra}] @ {place}')}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {editable}{shlex.quote(f'{url2pathname(urlsplit(place).path)}[{extra}]')}"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on a cluster's node, to which only the package's files were copied
        return "not installed"
