"""Tables bent at random: a few here, many with `make test-long`, see `hostile_tables.py`."""

from pathlib import Path

import pytest

from hostile_tables import campaign


@pytest.mark.slow
def test_bent_tables_lead_nowhere(tmp_path: Path) -> None:
    ended, wrong = campaign(seed=7, count=40, folder=tmp_path)
    assert not wrong, wrong[0]
    assert {name.rpartition(": ")[2] for name in ended} >= {"0", "2"}, "none is read, or none is refused"


@pytest.mark.long
def test_many_bent_tables_lead_nowhere(tmp_path: Path) -> None:
    _, wrong = campaign(seed=8, count=2000, folder=tmp_path)
    assert not wrong, wrong[:5]
