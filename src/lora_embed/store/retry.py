"""Transient errors of object stores: which errors are transient, and repeating a request with jittered back-off."""

import contextlib
import http.client
import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto  # type: ignore[import-untyped]

from lora_embed.errors import StorageError, StoreUnavailable, with_remedy
from lora_embed.text import number_of, redacted, whole_sentences

LONGEST_PAUSE_S = 15.0
SAY_AFTER_S = 3.0  # shorter waits are not logged
NO_NAME_S = 5.0  # how long a request is repeated to a host whose name has no address, which is mostly a typing error
PRECONDITION_FAILED, STORE_IS_FULL = 412, 507  # HTTP
_MAKE_ROOM = "Free space in that store, or have its quota raised."
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
# The hub's library raises this ConnectionError where HF_HUB_OFFLINE is set. It is known by its name, since importing that
# library takes long.
_REFUSED_HERE = "OfflineModeIsEnabled"
_NO_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # not EAI_AGAIN: no name server answered
# Answers with a status 4xx that may not come again: the upload arrived damaged, or two conditional PUTs met.
_TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown",
    "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch",
}  # fmt: skip


_learnt: list[type[Exception]] = []


def learn(errors: type[Exception]) -> None:
    """Count these errors of another library too as errors of a store. Those without an answer are transient."""
    if errors not in _learnt:
        _learnt.append(errors)


def retried(operation: Callable[[], R], where: str, limit_s: float) -> R:
    """The operation's result. It is repeated for up to `limit_s` seconds as long as its errors are transient.

    An error is logged once, however often it comes. Raises StoreUnavailable when the time is over, StorageError for a host
    whose name has no address, and every permanent error immediately.
    """
    started, logged = time.monotonic(), ""
    for tries in itertools.count(1):
        try:
            return operation()
        except (OSError, *LIBRARY_ERRORS, *_learnt) as error:
            waited = time.monotonic() - started
            if not is_transient(error):
                raise
            is_unknown = has_no_address(error)
            most_s = min(limit_s, NO_NAME_S) if is_unknown else limit_s
            if waited >= most_s and is_unknown:
                raise StorageError(
                    f"{where}: no address is known for the name of its host ({describe(error)}). Correct the name, or check "
                    "this machine's name server."
                ) from error
            if waited >= most_s:
                raise StoreUnavailable(
                    f"{where}: no usable answer in {waited:.0f} s and {number_of(tries, 'try')}; last error: "
                    f"{describe(error)}. What was "
                    "committed is kept. Run the same command again when the store answers."
                ) from error
            _count_retry()
            pause = min(LONGEST_PAUSE_S, 0.1 * 2**tries) * random.uniform(0.5, 1.0)
            if waited + pause > SAY_AFTER_S and (reason := describe(error)) != logged:
                logged = reason
                logging.getLogger(__name__).warning("%s: %s; trying again for up to %g s", redacted(where), reason, most_s)
            time.sleep(min(pause, max(0.0, most_s - waited)))
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
    causes = list(_causes(error))
    within = [cause.kwargs.get("error") for cause in causes if isinstance(cause, boto.HTTPClientError)]
    if any(type(cause).__name__ == _REFUSED_HERE for cause in causes) or any(isinstance(e, TypeError) for e in within):
        return False
    return any(_is_transient(cause) for cause in causes)


def _is_transient(error: BaseException) -> bool:
    is_learnt = isinstance(error, tuple(_learnt)) and not hasattr(error, "response")
    return (
        is_learnt or isinstance(error, _TRANSIENT) or _is_transient_status(_status(error)) or _code(error) in _TRANSIENT_CODES
    )


def _is_transient_status(status: int) -> bool:
    return status == 429 or (status >= 500 and status not in (501, STORE_IS_FULL))  # 501: not implemented


def is_refused_create(error: BaseException) -> bool:
    """True if the store refused a conditional PUT since the object exists. The status decides, not the message."""
    return any(_status(cause) == PRECONDITION_FAILED for cause in _causes(error))


def is_no_connection(error: BaseException) -> bool:
    """True if no server listens at the endpoint, or the name has no address: a wrong setting, or an outage."""
    return any(isinstance(cause, CONNECTION_ERRORS) for cause in _causes(error))


def has_no_address(error: BaseException) -> bool:
    """True if the name of the host has no address. That does not pass by itself, or only after minutes."""
    return any(isinstance(cause, socket.gaierror) and cause.errno in _NO_NAME for cause in _all_causes(error))


def _all_causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, also where a library does not say so, as botocore."""
    waiting: list[Any] = [error]
    seen = set[int]()
    while waiting:
        cause = waiting.pop()
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [cause.__cause__, cause.__context__, getattr(cause, "kwargs", {}).get("error")]


def is_full(error: BaseException) -> bool:
    """True if an object store refused to write since it, or a quota, is full: MinIO with status 507, Ceph with 403."""
    return any(_status(cause) == STORE_IS_FULL or "quota" in _code(cause).lower() for cause in _causes(error))


def _status(error: BaseException) -> int:
    """The HTTP status of an error; 0 if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # a botocore ClientError
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    status = getattr(error, "status", getattr(error, "code", getattr(response, "status_code", None)))  # aiohttp, gcsfs, the hub
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
    """An error in one line, which is cut only after a sentence or a word."""
    return whole_sentences(redacted(str(error))) or type(error).__name__


@contextlib.contextmanager
def explained(where: str, options: dict[str, Any], *, writes: bool = False) -> Iterator[None]:
    """Turn a store's errors into StorageError with one message that names the object, `where`. `options` are the store's.

    FileNotFoundError stays as it is, unless `writes`.
    """
    try:
        yield
    except PermissionError as error:
        if is_full(error):
            raise StorageError(f"{where}: {error.strerror or error}. {_MAKE_ROOM}") from None
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
        reason = str(error.strerror or error)
        if is_full(error):
            raise StorageError(f"{where}: {reason.rstrip('.')}. {_MAKE_ROOM}") from None
        raise StorageError(f"{where}: {reason if '://' in where else with_remedy(reason, error.errno)}") from None
    except (*LIBRARY_ERRORS, *_learnt) as error:
        raise StorageError(f"{where}: cannot be reached: {error}. Check network, endpoint and keys.") from None
    except ValueError as error:  # of the libraries, for example for an endpoint that is no URL
        if "://" not in where:
            raise
        raise _unfit(where, options, error) from None
    except TypeError as error:  # file systems look at their options late, and raise this for an unknown one
        if not options or not is_unknown_option(error):
            raise
        raise StorageError(
            f"{where}: unknown storage option: {error}. Options given: {sorted(options)}. Correct them."
        ) from None


@contextlib.contextmanager
def first_contact(where: str, options: dict[str, Any]) -> Iterator[None]:
    """For the first contact with a store: an endpoint where no server listens, and what libraries raise for an option of
    another type, become StorageError.
    """
    try:
        yield
    except StoreUnavailable as error:
        if error.__cause__ is None or not is_no_connection(error.__cause__):
            raise
        raise StorageError(
            f"{where}: cannot be reached: {describe(error.__cause__)}. Check network, endpoint and keys."
        ) from None
    except (TypeError, AttributeError, KeyError) as error:
        if not options:
            raise
        raise _unfit(where, options, error) from None


def _unfit(where: str, options: dict[str, Any], error: Exception) -> StorageError:
    """The error for a URI or storage options that a library could not use. The options are named without their values."""
    given = ", ".join(sorted(map(str, options))) or "none"
    return StorageError(
        f"{where}: cannot be reached with this URI and these storage options ({given}): {describe(error)}. Correct them."
    )


def is_unknown_option(error: TypeError) -> bool:
    """True if a function was given an option that it does not take. Only the message shows that in Python."""
    return "unexpected keyword argument" in str(error)
