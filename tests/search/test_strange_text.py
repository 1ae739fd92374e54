"""Index folders, states and configurations bent at random: a few here, many with `make test-long`, see `strangers.py`."""

from pathlib import Path

import pytest

from lora_embed.config.yaml import read_yaml
from lora_embed.errors import ConfigError
from strangers import campaign


@pytest.mark.slow
def test_bent_indexes_states_and_configurations_lead_nowhere(tmp_path: Path) -> None:
    ended, wrong = campaign(seed=3, count=30, folder=tmp_path)
    assert not wrong, wrong[0]
    assert {name.rpartition(": ")[2] for name in ended} >= {"0", "2"}, "none is read, or none is refused"


@pytest.mark.long
def test_many_bent_indexes_states_and_configurations_lead_nowhere(tmp_path: Path) -> None:
    _, wrong = campaign(seed=4, count=2000, folder=tmp_path)
    assert not wrong, wrong[:5]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("text", ["{" * 5000, "a: " + "[" * 5000, BOMB, "a: &a [*a]", "a: &a {b: *a}", "- " * 5000])
def test_yaml_without_end_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml: (its values are nested|an alias contains itself|is not valid|is \[)"):
        read_yaml(tmp_path / "job.yaml", "a job")
