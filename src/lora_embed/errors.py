"""The errors that are meant for a user: one class for each thing that the user has to do, with the command's exit code."""

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

# What helps with a file of an input that is damaged, be it on its way or where it was made.
MAKE_AGAIN = "Upload it again, or make it again if the original has the same fault"
_REMEDIES = {  # what helps with errors of the machine, which are none of the program
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space there, or have your quota raised",
    errno.EROFS: "It is mounted for reading only: name another folder",
    errno.EIO: "Check that disk or its connection",
    errno.EMFILE: "Raise this process's limit of open files (ulimit -n)",
    errno.ENFILE: "Close programs that hold many files open, or raise the machine's limit (fs.file-max)",
    errno.ENOMEM: "Free memory on this machine, or use fewer actors",
}


class LoraEmbedError(Exception):
    """Base of all errors meant for a user: one message that says what, where, found, expected and what to do.

    Messages go to logs, records and reports, so they are `text.redacted`.
    """

    exit_code = 1
    advice = "run the same command again"  # a few words for the last line of a run

    def __init__(self, message: str = "") -> None:
        super().__init__(redacted(message))


class ConfigError(LoraEmbedError):
    """The recipe, the job or its input is wrong. Nothing was started."""

    exit_code = 2
    advice = "correct it, then run it again"


class AdapterMismatch(ConfigError):
    """An adapter has no effect, does not fit the base, or cannot be folded exactly."""


class EncoderError(ConfigError):
    """An encoder cannot be built or loaded, or does not reproduce its golden vectors."""


class ProcessorRefused(EncoderError):
    """An image processor is not supported. `reason` leaves out what to do, for a processor that no build depends on."""

    def __init__(self, message: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.reason = redacted(reason or message)


class StorageError(ConfigError):
    """A location does not exist, cannot be read or cannot be written."""


class TableError(ConfigError):
    """A table is damaged, or holds data that must not be mixed with what the job would write."""


class ShardError(LoraEmbedError):
    """A shard cannot be read to its end, or changed during the run. Not all of its images are embedded."""


class ColumnError(ShardError):
    """A Parquet file does not have the columns that the job asks for, or the usual ones."""


class ChangedMeanwhile(LoraEmbedError):
    """Files of a base, an adapter or an encoder changed while they were read. The same command reads them again."""


class ResourcesError(ConfigError):
    """The cluster can never provide the resources that the job asks for."""


class LibraryMismatch(ConfigError):
    """An installed library lacks a private part that this package needs."""


class StoreUnavailable(LoraEmbedError):
    """A store gave no usable answer within its `retry_s` seconds. Everything that was committed is kept."""


class IncompleteRun(LoraEmbedError):
    """Some shards are not complete. Everything that was committed is kept, and the same command continues."""


class WorkersLost(IncompleteRun):
    """Workers died more often than Ray replaces them. The missing chunks can be tried again."""


class VerificationFailed(LoraEmbedError):
    """Stored files do not match their recorded counts, checksums or space id."""

    advice = "find the cause before the next run"


class GateFailed(LoraEmbedError):
    """A check before publication failed. The staged parts are kept. `gates` are those that were judged, as in a manifest."""

    advice = "a person must decide"

    def __init__(self, message: str = "", gates: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.gates = gates or {}


def with_remedy(reason: str, number: int | None) -> str:
    """An error's reason, and what to do about it if its errno is one of the machine."""
    remedy = _REMEDIES.get(number or 0)
    return f"{reason.rstrip('.')}. {remedy}." if remedy else reason


def lack_of_machine(error: OSError | MemoryError) -> str | None:
    """What this machine ran out of or cannot do any more, and what helps, as text for a message. None for a bug."""
    if isinstance(error, MemoryError):
        return f"this machine has no memory left. {_REMEDIES[errno.ENOMEM]}."
    if isinstance(error, ChildProcessError):
        return str(error)
    if error.errno not in _REMEDIES:
        return None
    where = error.filename or f"a file on this machine, for example in {tempfile.gettempdir()}"
    return with_remedy(f"{where}: {error.strerror}", error.errno)


@contextmanager
def once_started() -> Iterator[None]:
    """Turn StorageError and StoreUnavailable into IncompleteRun, once a run has started.

    By then the job itself is right: a permission has expired, or a server does not answer any more.
    """
    try:
        yield
    except (StorageError, StoreUnavailable) as error:
        raise IncompleteRun(f"{error}\nWhat was embedded is kept. Run the same command again to continue.") from None


# Ray may hand on only the text of a traceback. The error is then read from its packed note, or from the traceback's last lines.
_PACKED = re.compile(r"lora-embed-error:([A-Za-z0-9+/=]+);")
_RAISED = re.compile(r"^lora_embed\.errors\.(\w+): (.+?)(?=\n\n(?:During handling of|The above exception)|\s*\Z)", re.M | re.S)
Constructor = TypeVar("Constructor", bound=Callable[..., None])


def carries_errors(constructor: Constructor) -> Constructor:
    """Decorate the constructor of an actor: Ray hands on only the traceback's text, so the error is packed into it."""

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
    """The error of this package that a traceback's text ends with. None where the text holds no such error."""
    name, message = _unpacked(text) or next(iter(_RAISED.findall(text)[-1:]), ("", ""))
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, LoraEmbedError):
        return kind(message)
    return IncompleteRun(message) if name else None  # a class of another release, on another node


def _unpacked(text: str) -> tuple[str, str] | None:
    for packed in reversed(_PACKED.findall(text)):
        with suppress(ValueError, TypeError):  # a message may hold any text, also text that looks packed
            name, message = json.loads(base64.b64decode(packed))
            return str(name), str(message)
    return None
