"""The log of a search's trials, one line each, so that a search that continues does not repeat them."""

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
    """What trials are scored on: images with their labels and groups, and their splits."""

    data: str  # fingerprint of the images
    seed: int  # of the splits
    splits: int


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One recipe's accuracies in one exam, which do not depend on the objective, and the seconds that they took."""

    recipe_id: str
    exam: Exam
    per_split: dict[str, list[float]]  # task → kNN accuracies
    seconds: float

    @property
    def scores(self) -> dict[str, float]:
        """Task → mean over the splits."""
        return {task: sum(figures) / len(figures) for task, figures in self.per_split.items()}


class TrialLog:
    """A JSONL file of `Tried`, to be looked up by recipe id and exam.

    Each line is on disk before the next trial starts, so a killed process loses one trial at most. An incomplete last line
    is removed.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is not a log of trials."""
        self._path = path
        self._known: dict[tuple[str, Exam], Tried] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole_lines = data[: data.rfind(b"\n") + 1]
        if len(whole_lines) != len(data):
            os.truncate(path, len(whole_lines))
        for number, line in enumerate(whole_lines.splitlines(), 1):
            try:
                fields = json.loads(line)
                tried = Tried(**fields | {"exam": Exam(**fields["exam"])})
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{path}: line {number} is not a trial of a search. Remove that line, or the file to repeat all trials."
                ) from None
            self._known[tried.recipe_id, tried.exam] = tried

    def find(self, recipe_id: str, exam: Exam) -> Tried | None:
        """The trial of this recipe in this exam; None if it was not tried."""
        return self._known.get((recipe_id, exam))

    def add(self, tried: Tried) -> None:
        """Append a trial and flush it to disk."""
        with self._path.open("ab") as file:
            file.write(json.dumps(asdict(tried)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[tried.recipe_id, tried.exam] = tried


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock a work folder, which is made if needed, until the process ends. Raises ConfigError if another process has it."""
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
                f"{folder}: another search is using this folder. Wait for it, or name another folder with --work."
            ) from None
        yield
