"""Etags of objects that a list names: pages of a listing give what asking for each object gives."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import s3fs

from lora_embed.schema import Rows
from lora_embed.shards import etags
from lora_embed.shards.etags import etags_of
from lora_embed.shards.references import reach_of
from lora_embed.store.objects import look
from lora_embed.store.place import locate, place_of
from lora_embed.store.store import Store
from s3 import Faults, Proxy, Refusal, S3Server
from samples import png

COUNT = 1100  # more than a page


@pytest.fixture(scope="module")
def filled(server: S3Server) -> S3Server:
    server.make_bucket("many")
    fs = s3fs.S3FileSystem(**server.options(), skip_instance_cache=True)
    fs.pipe({f"many/{'b' if number % 2 else 'a'}/{number:05d} ü.png": png(number % 7) for number in range(COUNT)})
    return server


def references(count: int = COUNT) -> list[str | None]:
    return [f"{'b' if number % 2 else 'a'}/{number:05d} ü.png" for number in range(count)]


@contextmanager
def requests_of(server: S3Server) -> Iterator[tuple[Proxy, Rows, dict[str, object]]]:
    with Proxy(server.endpoint) as proxy:
        yield proxy, Rows(folder="s3://many"), server.options(proxy.endpoint)


def test_a_thousand_etags_take_one_request_and_are_those_of_the_objects(filled: S3Server) -> None:
    named = [*references(), "a/gone.png", None, "..", references()[3]]
    with requests_of(filled) as (proxy, rows, options):
        reach, folder = reach_of(rows, options), place_of(rows.folder)
        found = etags_of(named, folder, reach)
        assert len(proxy.requests) < 20
        each = [look(locate(reference, folder), reach) for reference in references(60) if reference]
    assert found[:60] == [entry.etag for entry in each if entry]
    assert len({*found[:COUNT]}) == 7
    assert found[COUNT:] == ["", "", "", found[3]]


def test_few_objects_among_many_others_are_asked_for_one_by_one(filled: S3Server) -> None:
    """Two pages show that listing does not pay."""
    named = references()[::50]
    with requests_of(filled) as (proxy, rows, options):
        found = etags_of(named, place_of(rows.folder), reach_of(rows, options))
        listed = [request for request in proxy.requests if "list-type=2" in request.query]
    assert all(found)
    assert len(listed) <= etags.POOR_PAGES


def test_without_the_right_to_list_each_object_is_asked_for_and_that_is_said(
    filled: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    with requests_of(filled) as (proxy, rows, options):
        denied = Refusal(403, "AccessDenied", "Access Denied.")
        proxy.faults = Faults(only=lambda request: "list-type" in request.query, answer=denied, error=1.0)
        found = etags_of(references(40), place_of(rows.folder), reach_of(rows, options))
    assert all(found)
    assert len(set(found)) == 7
    said = capsys.readouterr().err
    assert re.search(
        r"check_references: cannot list s3://many \(.*ccess denied.*\), so 40 objects are asked for one by one", said
    )


def test_to_tell_whether_a_folder_exists_takes_one_small_answer(filled: S3Server) -> None:
    with Proxy(filled.endpoint) as proxy:
        store = Store("s3://many", filled.options(proxy.endpoint))
        assert [store.is_directory(path) for path in ("a", "gone", "a/00000 ü.png", "")] == [True, False, False, True]
        assert not Store("s3://no-bucket", filled.options(proxy.endpoint)).is_directory("a")
        assert [request.query.count("max-keys=1") for request in proxy.requests] == [1] * 5
