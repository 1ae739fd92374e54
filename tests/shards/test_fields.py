"""Any text is a label or a carried value, or none: nothing that samples say ends a run, and classes have one order."""

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lora_embed.chain.chunks import decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.evaluate.figures import classes_of, head_order
from lora_embed.evaluate.request import LabelledInput
from lora_embed.gates.checks import accuracy_change
from lora_embed.model.head import class_names
from lora_embed.shards.fields import typed
from lora_embed.store.store import Store
from lora_embed.table.versions import listed_versions
from lora_embed.tune.labelled import Wanted, read_labelled
from lora_embed.vectors.metrics import split_by_name
from samples import PREPROCESSING, layout, parquet_of, png, shard_at, tar_of

ODD = (
    "--5", "-", "", "-5", "5", "05", "+5", "1e5", "1_000", "nan", "inf", "²", "٣", "-٣", "½", " 7", "a\0", "a", "9" * 5000,
    "-" + "9" * 700, "é", "\U0001f600", "x" * 100_000, "None", "true", "1.5", "0x10",
)  # fmt: skip


def test_classes_of_any_texts_have_one_order() -> None:
    for some in [*itertools.combinations(ODD, 2), ODD]:
        values: list[str | None] = [*some, None, *some]
        names, classes = classes_of(values)
        random.Random(1).shuffle(values)
        assert classes_of(values)[0] == names
        assert sorted(names) == sorted(some)
        assert [names[number] for number in classes if number >= 0] == [*some, *some]


def test_numbers_are_in_their_order_and_equal_ones_by_text() -> None:
    assert classes_of(["10", "9", "-1", "٣"])[0] == ("-1", "٣", "9", "10")
    assert classes_of(["5", "05", "005", "4"])[0] == ("4", "005", "05", "5")
    assert classes_of(["10", "9", "--5"])[0] == ("--5", "10", "9")


def test_labels_are_a_head_s_numbers_only_as_those_are_written() -> None:
    assert head_order(("0", "2"), 3, None) == ["0", "1", "2"]
    assert head_order(("0", "02"), 3, None) is None  # which is not output 2's name
    assert head_order(("9" * 5000, "a"), 3, None) is None
    assert head_order(("٠", "٢"), 3, None) is None
    assert head_order(("--5", "²"), 2, None) == ["--5", "²"]


@pytest.mark.parametrize("names", [{"--5": "a"}, {"²": "a"}, {"": "a"}, ["a", "b"], {"9" * 5000: "a"}, 3])
def test_outputs_that_are_not_numbered_have_no_names(tmp_path: Path, names: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}))
    assert class_names(tmp_path) == {}


@pytest.mark.parametrize(
    ("value", "whole", "number", "flag"),
    [
        ("5", 5, 5.0, None), ("٣", 3, 3.0, None), ("-5", -5, -5.0, None), ("1e5", None, 1e5, None), ("--5", None, None, None),
        ("1_000", None, None, None), ("", None, None, None), ("²", None, None, None), ("9" * 5000, None, float("inf"), None),
        ("x" * 100_000, None, None, None), (b"7", 7, 7.0, None), (b"1_0", None, None, None), (1.5, None, 1.5, None),
        (2.0, 2, 2.0, None), (float("nan"), None, float("nan"), None), (True, 1, 1.0, True), (10**400, None, None, None),
        ([1], None, None, None), ({"a": 1}, None, None, None), ("TRUE", None, None, True), (None, None, None, None),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_a_value_that_is_none_of_its_type_is_null(
    value: object, whole: int | None, number: float | None, flag: bool | None
) -> None:
    found = typed(value, "float64")
    assert found == number or (found is not None and np.isnan(found) and np.isnan(number or 0.0))
    assert (typed(value, "int64"), typed(value, "bool")) == (whole, flag)
    assert (typed(value, "string") is None) == (value is None)


def test_odd_labels_of_a_shard_are_classes_and_columns(tmp_path: Path) -> None:
    deep = '{"label": ' + "[" * 980 + "]" * 980 + "}"
    texts = [*(json.dumps({"label": odd}) for odd in (*ODD, "\ud800", 3, 1.5, None, [1], float("nan"))), deep]
    members = [(f"{n:03d}.{kind}", data) for n, text in enumerate(texts) for kind, data in
               (("json", text.encode()), ("png", png(n)))]  # fmt: skip
    data = tar_of(members)
    shard = shard_at(tmp_path / "a.tar", data)
    for kind in ("string", "int64", "float64", "bool"):
        chunks = decode_shard(WorkItem(shard=shard), layout(carry=(("label", kind),)), PREPROCESSING, {})
        assert sum(chunk.samples.num_rows for chunk in chunks) == len(texts)
    wanted = Wanted(fields=("label",), group="label", most=1000, seed=0)
    found = read_labelled(LabelledInput(inputs=(str(tmp_path / "a.tar"),)), wanted, PREPROCESSING, tmp_path / "work")
    assert {"--5", "²", "1_000", "\\ud800", "3", "[1]"} <= set(found.classes["label"])
    "".join(found.classes["label"]).encode()  # what is written of them is UTF-8


def test_days_that_python_does_not_know_are_null(tmp_path: Path) -> None:
    days = pa.array([10**7, 0], pa.date32())
    shard = shard_at(tmp_path / "a.parquet", parquet_of({"key": days, "image": [png(1), png(2)], "day": days}))
    (chunk,) = decode_shard(WorkItem(shard=shard), layout(carry=(("day", "string"),)), PREPROCESSING, {})
    assert chunk.samples.column("day").to_pylist() == [None, "1970-01-01"]
    assert chunk.samples.column("key").to_pylist() == ["0000000000", "1970-01-01"]


def test_a_long_name_takes_its_own_room_and_not_that_of_all() -> None:
    names = [*(f"{number:04d}" for number in range(300)), "x" * 2_000_000]
    vectors = np.random.default_rng(0).normal(size=(301, 4)).astype(np.float32)
    tracemalloc.start()
    assert split_by_name(names, 0.5, 0).sum() == round(0.5 * 301)
    assert accuracy_change(names, vectors, vectors, ["a", "b", "x" * 2_000_000] * 100 + ["a"]) is not None
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_files_that_are_named_in_other_digits_are_no_versions(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("00000002", "٠٠٠٠٠٠٩٩", "²0000000"):
        store.create(f"versions/{name}.json", b"{}")
    assert listed_versions(store) == [2]
