"""Other kinds of processor: the switches by which numeric libraries compute as on one of those, and the tests that compute.

`python tests/processors.py` runs those tests once for each kind (`make processors`); arguments after `--` go to pytest.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
Switches = dict[str, str]
# torch's own kernels, oneDNN's and MKL's below them, and the OpenBLAS of numpy. Where a library does not know a switch, as
# on Arm, it computes as it does without.
KINDS: dict[str, Switches] = {
    "without AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
# What computes with torch or numpy, without a whole cluster.
NUMERIC = (
    "actors", "adapter", "adapter_places", "all_families", "assess", "batch_norm", "changes", "checks", "cka", "cost",
    "crooked", "decode", "demo_parts", "device", "digits", "drift", "encoder", "encoder_page", "errors", "evaluate_command",
    "export", "families", "features", "figures", "gpu_benchmark", "guard", "head", "health", "image_processors",
    "kept_encoders", "labelled", "locate", "merge", "mistakes", "nightly", "no_code", "parts", "plan", "preprocess",
    "preview", "private", "processors", "proof", "propose", "rank", "real_gates", "real_merge", "real_vectors", "refusals",
    "resume", "rows", "search", "space", "stale", "strange_bases", "strange_encoders", "table_read", "trials", "tune",
    "unreadable", "upgrades", "versions", "wrapped",
)  # fmt: skip


def files_of(names: tuple[str, ...]) -> list[Path]:
    """The files of tests of these names, in whichever folder they are."""
    return [path for name in names for path in TESTS.rglob(f"test_{name}.py")]


def single_switches() -> dict[str, Switches]:
    """Each switch of each kind alone, by its name and value."""
    return {f"{name}={value}": {name: value} for kind in KINDS.values() for name, value in kind.items()}


def without_switches() -> dict[str, str]:
    """This process's environment less all switches."""
    known = {name for kind in KINDS.values() for name in kind}
    return {name: value for name, value in os.environ.items() if name not in known}


def main() -> int:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", action="store_true", help="each switch alone, too")
    arguments, given = parser.parse_args(own), sys.argv[len(own) + 2 :]
    kinds = KINDS | (single_switches() if arguments.each else {})
    command = [sys.executable, "-m", "pytest", "-m", "not long", *map(str, files_of(NUMERIC)), *given]
    ended = {}
    for kind, switches in kinds.items():
        print(f"== as a processor of the kind {kind}: {switches}", flush=True)
        ended[kind] = subprocess.run(command, env=without_switches() | switches, check=False).returncode
    for kind, code in ended.items():
        print(f"{kind}: {'passed' if code == 0 else f'failed, pytest ended with {code}'}")
    return 1 if any(ended.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
