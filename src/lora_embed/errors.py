"""What can go wrong, by what the user has to do about it; the command line turns each into an exit code."""

import base64
import errno
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from lora_embed.text import redacted

_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip


class LoraEmbedError(Exception):
    """Base of all errors meant for a user: one message that says what, where, found, expected and what to do.

    Messages go to logs, records and reports, so they are `text.redacted`.
    """

    exit_code = 1
    advice = "run the same command again"  # a few words, for whoever reads the last line alone

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class ConfigError(LoraEmbedError):
    """The recipe, the job or its input is wrong; nothing was started."""

    exit_code = 2
    advice = "mend it, then run it again"


class AdapterMismatch(ConfigError):
    """An adapter would do nothing, something else than it was trained for, or cannot be folded exactly."""


class EncoderError(ConfigError):
    """An encoder cannot be built or loaded, or does not reproduce its own golden vectors."""


class StorageError(ConfigError):
    """A location does not exist, cannot be read or cannot be written."""


class TableError(ConfigError):
    """A table holds something else than the job would write to it."""


class ShardError(LoraEmbedError):
    """A shard cannot be read to a proven end, or changed under the run; its chunks are not complete."""


class ChangedMeanwhile(LoraEmbedError):
    """Files of a base, an adapter or an encoder changed while they were read; the same command reads them anew."""


class ResourcesError(ConfigError):
    """The cluster can never schedule what the job asks for."""


class LibraryMismatch(ConfigError):
    """An installed library lacks a part, none of its public ones, that this package cannot do without."""


class StoreUnavailable(LoraEmbedError):
    """A store gave no proper answer for as long as its `retry_s` allows; everything committed stays."""


class IncompleteRun(LoraEmbedError):
    """Some shards are not complete; everything committed stays and the same command goes on."""


class WorkersLost(IncompleteRun):
    """Workers died more often than they are replaced; what is missing can be tried again."""


class VerificationFailed(LoraEmbedError):
    """Stored files contradict their own counts, sums or identity."""

    advice = "look at it before a next run"


class GateFailed(LoraEmbedError):
    """A check before publication failed; the staged work stays."""

    advice = "a person must decide"


def lack_of_machine(error: OSError | MemoryError) -> str | None:
    """What this machine ran out of or cannot do any more; None for an error that is a bug's."""
    if isinstance(error, MemoryError):
        return "this machine has no memory left"
    if isinstance(error, ChildProcessError):
        return str(error)
    if error.errno not in _OF_THE_MACHINE:
        return None
    where = error.filename or f"a file of this machine, such as those in {tempfile.gettempdir()}"
    return f"{where}: {error.strerror}"


@contextmanager
def once_started() -> Iterator[None]:
    """What a store refuses from here on is no mistake of the job's, but a permission that expired or a server that left.

    Raises IncompleteRun for StorageError and StoreUnavailable.
    """
    try:
        yield
    except (StorageError, StoreUnavailable) as error:
        raise IncompleteRun(f"{error}\nWhat was embedded is kept, and the same command goes on.") from None


# An error where only the text of its traceback travels: packed in a note of it, or else as Python ends a traceback.
_PACKED = re.compile(r"lora-embed-error:([A-Za-z0-9+/=]+);")
_RAISED = re.compile(r"^lora_embed\.errors\.(\w+): (.+?)(?=\n\n(?:During handling of|The above exception)|\s*\Z)", re.M | re.S)
Constructor = TypeVar("Constructor", bound=Callable[..., None])


def carries_errors(constructor: Constructor) -> Constructor:
    """For the constructor of an actor: of what it raises, Ray hands on the text of the traceback alone."""

    @functools.wraps(constructor)
    def construct(*arguments: Any, **named: Any) -> None:
        try:
            constructor(*arguments, **named)
        except LoraEmbedError as error:
            packed = json.dumps([type(error).__name__, str(error)]).encode()
            error.add_note(f"lora-embed-error:{base64.b64encode(packed).decode()};")
            error.add_note(_PACKED.sub("", str(error)).partition("\n")[0])  # the last line, which is what logs show
            raise

    return cast(Constructor, construct)


def carried_error(text: str) -> LoraEmbedError | None:
    """The error of this package that a traceback ends with, whole; None where it tells of none."""
    name, message = _unpacked(text) or next(iter(_RAISED.findall(text)[-1:]), ("", ""))
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, LoraEmbedError):
        return kind(message)
    return IncompleteRun(message) if name else None  # of another release, on another node


def _unpacked(text: str) -> tuple[str, str] | None:
    for packed in reversed(_PACKED.findall(text)):
        with suppress(ValueError, TypeError):  # a message may hold anything
            name, message = json.loads(base64.b64decode(packed))
            return str(name), str(message)
    return None
