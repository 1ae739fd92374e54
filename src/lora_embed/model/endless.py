"""Check that matching a stranger's regular expressions ends: try it in a child process with limited processor time.

Python's `re` backtracks, so an expression of a few characters can keep it busy for ever, and another thread cannot interrupt
it. The text alone does not show which expressions do so; therefore all but plain names are tried. The child runs only this
file, which imports nothing of the package.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence

CPU_S = 1  # for all expressions of an adapter; those of real adapters take a millisecond
MEMORY_BYTES = 2**30
_PLAIN = re.compile(r"(?:[\w-]|\\?[.-])*")  # a name, escaped or not, which `re` can match in one way only
_MOST_PLAIN, _MOST_PAIRS = 256, 100_000  # plain expressions, and pairs with names, that take well under a second
Expression = tuple[str, str, str]  # `match` or `fullmatch`, the whole expression, and the stranger's part of it


def problem_with(ladders: Sequence[Sequence[Expression]], names: Sequence[str]) -> str | None:
    """What is wrong with some expressions, or None. Each ladder is matched with each name, in order, up to the first match.

    After None, matching them in the same way is sure to end.
    """
    written = [text for ladder in ladders for _, _, text in ladder]
    pairs = len(written) * len(names)
    if len(written) <= _MOST_PLAIN and pairs <= _MOST_PAIRS and all(_PLAIN.fullmatch(text) for text in written):
        return None
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__],
        input=json.dumps([ladders, names]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout or None
    return f"matching its pattern takes more than {CPU_S} s of processor time, or more than {MEMORY_BYTES >> 20:,} MB of memory"


def _try_all() -> None:
    """The child: match all expressions, and print the first that cannot be read. It prints nothing if all matching ends."""
    for limit, most in ((resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    ladders, names = json.load(sys.stdin)
    for ladder in ladders:
        for name in names:
            for how, expression, text in ladder:
                try:
                    if getattr(re, how)(expression, name):
                        break
                except (re.error, RecursionError, OverflowError) as error:
                    sys.stdout.write(f"the pattern {text[:100]!a} cannot be read ({str(error)[:200]})")
                    return


if __name__ == "__main__":
    _try_all()
