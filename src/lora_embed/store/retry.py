"""Transient errors of object stores: which ones they are, and trying again with jittered back-off up to a limit."""

import contextlib
import http.client
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]

from lora_embed.errors import StorageError, StoreUnavailable
from lora_embed.text import in_one_line, redacted

LONGEST_PAUSE_S = 15.0
SAY_AFTER_S = 3.0  # what is over sooner needs no word
PRECONDITION_FAILED = 412  # HTTP
R = TypeVar("R")
_counting = threading.Lock()
_retries = 0  # of this process, since they were taken

# What fsspec lets through of its libraries besides OSError, of which most are.
LIBRARY_ERRORS = (boto.BotoCoreError, boto.ClientError, aiohttp.ClientError, http.client.HTTPException)
CONNECTION_ERRORS = (boto.EndpointConnectionError, boto.ConnectTimeoutError, aiohttp.ClientConnectorError)
_TRANSIENT = (
    ConnectionError, TimeoutError, boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError,
    boto.ResponseStreamingError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, http.client.IncompleteRead,
)  # fmt: skip
# Answers in 4xx that a second try may not get: an upload that arrived damaged, and a conditional PUT that met another.
_TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown",
    "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def retried(operation: Callable[[], R], what: str, limit_s: float) -> R:
    """The operation's result, tried again for up to `limit_s` seconds as long as its errors are transient.

    Raises StoreUnavailable when the time is up, and every other error at once.
    """
    started = time.monotonic()
    for tries in itertools.count(1):
        try:
            return operation()
        except (OSError, *LIBRARY_ERRORS) as error:
            waited = time.monotonic() - started
            if not is_transient(error):
                raise
            if waited >= limit_s:
                raise StoreUnavailable(
                    f"{what}: no proper answer for {waited:.0f} s, {tries} tries; the last: {describe(error)}. What is "
                    "committed stays; run the same command again once the store answers."
                ) from error
            _count_retry()
            pause = min(LONGEST_PAUSE_S, 0.1 * 2**tries) * random.uniform(0.5, 1.0)
            if waited + pause > SAY_AFTER_S:
                logging.getLogger(__name__).warning(
                    "%s: %s; trying again for up to %g s", redacted(what), describe(error), limit_s
                )
            time.sleep(min(pause, max(0.0, limit_s - waited)))
    raise AssertionError("unreachable")


def _count_retry() -> None:
    global _retries
    with _counting:
        _retries += 1


def take_retries() -> int:
    """How often this process has tried a request again since the last call; counting begins anew."""
    global _retries
    with _counting:
        taken, _retries = _retries, 0
    return taken


def is_transient(error: BaseException) -> bool:
    """Connection lost, time out, body cut short, too many requests, or the server's own fault: may differ next time."""
    return any(_is_transient(cause) for cause in _causes(error))


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, _TRANSIENT) or _is_transient_status(_status(error)) or _code(error) in _TRANSIENT_CODES


def _is_transient_status(status: int) -> bool:
    return status == 429 or (status >= 500 and status not in (501, 507))  # not implemented; no room left


def is_refused_create(error: BaseException) -> bool:
    """A conditional PUT that the store refused, since the object is there: by its status, whatever the store says."""
    return any(_status(cause) == PRECONDITION_FAILED for cause in _causes(error))


def is_no_connection(error: BaseException) -> bool:
    """Nobody listens at the endpoint, or it has no address: a wrong setting as likely as an outage."""
    return any(isinstance(cause, CONNECTION_ERRORS) for cause in _causes(error))


def _status(error: BaseException) -> int:
    """The HTTP status that an error stands for; 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # a botocore ClientError
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    status = getattr(error, "status", getattr(error, "code", None))  # aiohttp's and gcsfs's
    return status if isinstance(status, int) else 0


def _code(error: BaseException) -> str:
    """What S3 calls the error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def describe(error: BaseException) -> str:
    """An error in one line."""
    return in_one_line(redacted(str(error))) or type(error).__name__


@contextlib.contextmanager
def explained(where: str, options: dict[str, Any], *, writes: bool = False) -> Iterator[None]:
    """Turn what a store refuses into one message that names the object, `where`, of a store with these options.

    When reading, absent objects stay FileNotFoundError.
    """
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{where}: access denied ({error.strerror or error}). Check its permissions or keys.") from None
    except (NotADirectoryError, FileExistsError):
        raise StorageError(f"{where}: a file stands where a directory is expected") from None
    except IsADirectoryError:
        raise StorageError(f"{where}: a directory stands where a file is expected") from None
    except FileNotFoundError as error:
        if not writes:
            raise
        raise StorageError(f"{where}: cannot be written, what should hold it is not there ({error})") from None
    except OSError as error:
        raise StorageError(f"{where}: {error.strerror or error}") from None
    except LIBRARY_ERRORS as error:
        raise StorageError(f"{where}: cannot be reached: {error}. Check network, endpoint and keys.") from None
    except TypeError as error:  # file systems take their options late, and say only this of one they do not know
        if not options or not is_unknown_option(error):
            raise
        raise StorageError(f"{where}: a storage option is not known: {error}; given are {sorted(options)}") from None


def is_unknown_option(error: TypeError) -> bool:
    """An option that a library's function does not take: Python tells that from other mistakes in its words alone."""
    return "unexpected keyword argument" in str(error)
