"""What a search has tried, a line each in a file that only grows: read again, it spares every evaluation in it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_embed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What trials are scored on: images with their labels and groups, and the splits of them."""

    data: str  # fingerprint of the images
    seed: int  # of the splits
    splits: int


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One recipe in one exam: its accuracies, which depend on no objective, and the seconds that they took."""

    recipe_id: str
    exam: Exam
    per_split: dict[str, list[float]]  # task → kNN accuracies
    seconds: float

    @property
    def scores(self) -> dict[str, float]:
        """Task → mean over the splits."""
        return {task: sum(figures) / len(figures) for task, figures in self.per_split.items()}


class TrialLog:
    """A JSONL file of `Tried`, found by recipe id and exam.

    A line is on the disk before the next trial starts, so a kill costs the trial that it hits. Half a last line, which it
    may leave, is cut off.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is no such log."""
        self._path = path
        self._known: dict[tuple[str, Exam], Tried] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                fields = json.loads(line)
                tried = Tried(**fields | {"exam": Exam(**fields["exam"])})
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{path}: line {number} is no trial of a search. Remove that line, or the file to evaluate anew."
                ) from None
            self._known[tried.recipe_id, tried.exam] = tried

    def find(self, recipe_id: str, exam: Exam) -> Tried | None:
        """What was written of this recipe in this exam."""
        return self._known.get((recipe_id, exam))

    def add(self, tried: Tried) -> None:
        """Write it down, to stay."""
        with self._path.open("ab") as file:
            file.write(json.dumps(asdict(tried)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[tried.recipe_id, tried.exam] = tried


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a work folder, made where there is none; the hold ends with the process. Raises ConfigError where another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror}). Name another folder with --work.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another search is at work in this folder. Wait for it, or name another one with --work."
            ) from None
        yield
