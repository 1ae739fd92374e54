"""What can go wrong, by what the user has to do about it; the command line turns each into an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager


class LoraEmbedError(Exception):
    """Base of all errors meant for a user: one message that says what, where, found, expected and what to do."""

    exit_code = 1


class ConfigError(LoraEmbedError):
    """The recipe, the job or its input is wrong; nothing was started."""

    exit_code = 2


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


class ResourcesError(ConfigError):
    """The cluster can never schedule what the job asks for."""


class StoreUnavailable(LoraEmbedError):
    """A store gave no proper answer for as long as its `retry_s` allows; everything committed stays."""


class IncompleteRun(LoraEmbedError):
    """Some shards are not complete; everything committed stays and the same command goes on."""


class WorkersLost(IncompleteRun):
    """Workers died more often than they are replaced; what is missing can be tried again."""


class VerificationFailed(LoraEmbedError):
    """Stored files contradict their own counts, sums or identity."""


class GateFailed(LoraEmbedError):
    """A check before publication failed; the staged work stays."""


@contextmanager
def once_started() -> Iterator[None]:
    """What a store refuses from here on is no mistake of the job's, but a permission that expired or a server that left.

    Raises IncompleteRun for StorageError and StoreUnavailable.
    """
    try:
        yield
    except (StorageError, StoreUnavailable) as error:
        raise IncompleteRun(f"{error}\nWhat was embedded is kept, and the same command goes on.") from None
