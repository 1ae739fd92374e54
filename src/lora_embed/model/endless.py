"""Does matching some regular expressions come to an end? Tried in a child process whose processor time the kernel limits.

Python's `re` goes back over what it has matched, and a few characters of a stranger's can keep it busy for ever; it cannot be
interrupted from another thread. Which expressions do so cannot be told from their text alone, so all but plain names are tried.
The child is this file alone: it imports nothing of the package.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence

CPU_S = 1  # for all expressions of an adapter; real ones take a millisecond
MEMORY_BYTES = 2**30
_PLAIN = re.compile(r"(?:[\w-]|\\?[.-])*")  # a name, escaped or not: it has one way to match
_MOST_PLAIN, _MOST_PAIRS = 256, 100_000  # of which matching takes well under a second; `re` keeps 512 compiled
Expression = tuple[str, str, str]  # `match` or `fullmatch`, the expression, what of it somebody else wrote


def problem_with(ladders: Sequence[Sequence[Expression]], names: Sequence[str]) -> str | None:
    """What is wrong with expressions that are tried on each name, each ladder in its order up to the first that matches.

    None where all is well: whoever then matches them in this way comes to an end as well.
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
    return f"matching it takes more than {CPU_S} s of processor time, or more than {MEMORY_BYTES >> 20:,} MB"


def _try_all() -> None:
    """What the child does: say which expression cannot be read; it says nothing where all end."""
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
                    sys.stdout.write(f"{text[:100]!a} cannot be read: {str(error)[:200]}")
                    return


if __name__ == "__main__":
    _try_all()
