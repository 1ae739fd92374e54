"""Every package that comes along when this one is installed has a licence that allows that, and stands in docs/licences.md."""

import os
import re
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement

from jobs import ROOT

DOCS = ROOT / "docs" / "licences.md"
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python",
    "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
}  # fmt: skip
SPDX = {  # what packages wrote before there were expressions
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def installed() -> dict[str, Distribution]:
    """This package's dependencies and theirs, extras left out, by their normal names; what no platform here needs is absent."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("lora-embed", frozenset())]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if (normal, extras) in seen:
            continue
        seen.add((normal, extras))
        found[normal] = distribution(name)
        for line in found[normal].requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((needed.name, frozenset(needed.extras)))
    del found["lora-embed"]
    return dict(sorted(found.items()))


def licence_of(package: Distribution) -> str:
    """As an SPDX expression: what the package declares, else what its classifiers or its old licence field say."""
    about = package.metadata
    classified = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier", []) if one.startswith("License :: ")]
    said = about.get("License-Expression") or " AND ".join(SPDX.get(one, one) for one in classified) or about.get("License", "")
    return SPDX.get(said, said)


def parts_of(expression: str) -> list[str]:
    return re.split(r" AND | OR ", expression.replace("(", "").replace(")", ""))


def table() -> str:
    rows = [f"| {name} | {licence_of(package)} |" for name, package in installed().items()]
    return "\n".join(["| package | licence |", "| --- | --- |", *rows])


def test_all_that_is_installed_may_be_used_and_passed_on() -> None:
    others = {name: said for name, package in installed().items() if not set(parts_of(said := licence_of(package))) <= ALLOWED}
    assert not others
    assert len(installed()) > 50


def test_the_docs_list_what_is_installed() -> None:
    """Set LORA_EMBED_WRITE_DOCS to write them."""
    text = DOCS.read_text()
    head, tail = text[: text.index("| package")], text[text.rindex("|\n") + 2 :]
    if os.environ.get("LORA_EMBED_WRITE_DOCS"):
        DOCS.write_text(f"{head}{table()}\n{tail}")
    assert table() in DOCS.read_text()
