"""Listings of S3: their dates are read in little time, and are those that botocore reads."""

from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

from lora_embed.store.remote import _parse_date
from lora_embed.store.store import Store
from s3 import S3Server


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-30T10:16:32.123Z", "2026-11-30T10:16:32Z", "2026-11-30T10:16:32.123456Z", "2024-02-29T23:59:59.000Z",
        "2026-11-30T10:16:32+02:00", "Mon, 30 Nov 2026 10:16:32 GMT", "20261130T101632Z", "1700000000", "1700000000.5",
        1700000000, 0.25,
    ],
)  # fmt: skip
def test_a_date_is_the_one_that_botocore_reads(text: Any) -> None:
    assert _parse_date(text).timestamp() == parse_timestamp(text).timestamp()


@pytest.mark.parametrize("text", ["Z", "yesterdayZ", "2026-13-01T00:00:00Z", ""])
def test_what_is_no_date_is_refused_as_botocore_refuses_it(text: str) -> None:
    with pytest.raises(ValueError, match="Invalid timestamp"):
        parse_timestamp(text)
    with pytest.raises(ValueError, match="Invalid timestamp"):
        _parse_date(text)


def test_dates_of_a_listing_need_no_general_parser(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.1 ms for each, two thirds of the time in which a million objects are listed."""
    monkeypatch.setattr("dateutil.parser.parse", lambda *_, **__: pytest.fail("a date was read by the general parser"))
    store, began = Store("s3://images/dates", server.options()), datetime.now(UTC).timestamp()
    for name in ("a.jpg", "b.jpg"):
        store.replace(name, b"x")
    assert list(store.list_input(follows=False)[0].paths()) == ["a.jpg", "b.jpg"]
    assert [entry.path for entry in store.page_behind("a.jpg", "")] == ["b.jpg"]
    assert all(abs(entry.modified - began) < 60 for entry in store.list_files())
