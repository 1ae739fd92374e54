"""Listed objects in little memory: what goes in comes out."""

import pickle
import sys

from hypothesis import given
from hypothesis import strategies as st

from lora_embed.entries import Entries, Entry

names = st.text(st.characters(codec=None, exclude_categories=()), min_size=0, max_size=20)  # halves of surrogate pairs too
entries = st.builds(Entry, path=names, size=st.integers(0, 2**63), etag=names, broken=st.just("") | names)


@given(st.lists(entries) | st.lists(entries, min_size=60, max_size=70))
def test_what_goes_in_comes_out(given: list[Entry]) -> None:
    packed = Entries(entry.state for entry in given)
    assert list(packed) == given
    assert (len(packed), packed.size) == (len(given), sum(entry.size for entry in given))
    assert pickle.loads(pickle.dumps(packed)) == packed == Entries(packed.states())
    assert packed != Entries([*packed.states(), ("one more", 1, "1", "")])


def test_a_thousand_take_little_more_than_their_names() -> None:
    given = [Entry(f"folder/{number:08d}.jpg", number, f"{number:019d}") for number in range(1000)]
    names = sum(len(entry.path) + len(entry.etag) for entry in given)
    assert len(pickle.dumps(Entries(entry.state for entry in given))) < names + 30 * len(given)
    assert sys.getsizeof(given[0]) + sys.getsizeof(given[0].path) + sys.getsizeof(given[0].etag) > 200  # one by itself
