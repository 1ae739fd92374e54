"""Transient errors of object stores: which errors are transient, and repeating a request with jittered back-off."""

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
from lora_embed.text import in_one_line, number_of, redacted

LONGEST_PAUSE_S = 15.0
SAY_AFTER_S = 3.0  # shorter waits are not logged
PRECONDITION_FAILED = 412  # HTTP
R = TypeVar("R")
_counting = threading.Lock()
_retries = 0  # of this process, since the last `take_retries`

# Errors of fsspec's libraries that are not OSError; most of them are.
LIBRARY_ERRORS = (boto.BotoCoreError, boto.ClientError, aiohttp.ClientError, http.client.HTTPException)
CONNECTION_ERRORS = (boto.EndpointConnectionError, boto.ConnectTimeoutError, aiohttp.ClientConnectorError)
_TRANSIENT = (
    ConnectionError, TimeoutError, boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError,
    boto.ResponseStreamingError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, http.client.IncompleteRead,
)  # fmt: skip
# Answers with a status 4xx that may not come again: the upload arrived damaged, or two conditional PUTs met.
_TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown",
    "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch",
}  # fmt: skip


def retried(operation: Callable[[], R], where: str, limit_s: float) -> R:
    """The operation's result. It is repeated for up to `limit_s` seconds as long as its errors are transient.

    Raises StoreUnavailable when the time is over, and every permanent error immediately.
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
                    f"{where}: no usable answer in {waited:.0f} s and {number_of(tries, 'try')}; last error: "
                    f"{describe(error)}. What was "
                    "committed is kept. Run the same command again when the store answers."
                ) from error
            _count_retry()
            pause = min(LONGEST_PAUSE_S, 0.1 * 2**tries) * random.uniform(0.5, 1.0)
            if waited + pause > SAY_AFTER_S:
                logging.getLogger(__name__).warning(
                    "%s: %s; trying again for up to %g s", redacted(where), describe(error), limit_s
                )
            time.sleep(min(pause, max(0.0, limit_s - waited)))
    raise AssertionError("unreachable")


def _count_retry() -> None:
    global _retries
    with _counting:
        _retries += 1


def take_retries() -> int:
    """How many requests this process has repeated since the last call of this function."""
    global _retries
    with _counting:
        count, _retries = _retries, 0
    return count


def is_transient(error: BaseException) -> bool:
    """True if the next try may succeed: connection lost, time-out, body cut short, too many requests, or a server error."""
    return any(_is_transient(cause) for cause in _causes(error))


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, _TRANSIENT) or _is_transient_status(_status(error)) or _code(error) in _TRANSIENT_CODES


def _is_transient_status(status: int) -> bool:
    return status == 429 or (status >= 500 and status not in (501, 507))  # 501: not implemented; 507: storage is full


def is_refused_create(error: BaseException) -> bool:
    """True if the store refused a conditional PUT since the object exists. The status decides, not the message."""
    return any(_status(cause) == PRECONDITION_FAILED for cause in _causes(error))


def is_no_connection(error: BaseException) -> bool:
    """True if no server listens at the endpoint, or the name has no address: a wrong setting, or an outage."""
    return any(isinstance(cause, CONNECTION_ERRORS) for cause in _causes(error))


def _status(error: BaseException) -> int:
    """The HTTP status of an error; 0 if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # a botocore ClientError
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    status = getattr(error, "status", getattr(error, "code", None))  # aiohttp's and gcsfs's
    return status if isinstance(status, int) else 0


def _code(error: BaseException) -> str:
    """S3's code for the error, such as `SlowDown`; empty if it has none."""
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
    """Turn a store's errors into StorageError with one message that names the object, `where`. `options` are the store's.

    FileNotFoundError stays as it is, unless `writes`.
    """
    try:
        yield
    except PermissionError as error:
        raise StorageError(f"{where}: access denied ({error.strerror or error}). Check its permissions or keys.") from None
    except (NotADirectoryError, FileExistsError):
        raise StorageError(f"{where}: expected a directory, found a file. Remove it, or use another path.") from None
    except IsADirectoryError:
        raise StorageError(f"{where}: expected a file, found a directory. Remove it, or use another path.") from None
    except FileNotFoundError as error:
        if not writes:
            raise
        raise StorageError(
            f"{where}: cannot be written, since its bucket or folder does not exist ({error}). Create it, or correct the path."
        ) from None
    except OSError as error:
        raise StorageError(f"{where}: {error.strerror or error}") from None
    except LIBRARY_ERRORS as error:
        raise StorageError(f"{where}: cannot be reached: {error}. Check network, endpoint and keys.") from None
    except TypeError as error:  # file systems look at their options late, and raise this for an unknown one
        if not options or not is_unknown_option(error):
            raise
        raise StorageError(
            f"{where}: unknown storage option: {error}. Options given: {sorted(options)}. Correct them."
        ) from None


def is_unknown_option(error: TypeError) -> bool:
    """True if a function was given an option that it does not take. Only the message shows that in Python."""
    return "unexpected keyword argument" in str(error)
