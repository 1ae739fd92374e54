"""Decoding in a child process, with real children: the same pixels and rejects, and what kills a child is one reject."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs import ROOT
from lora_embed.chain.chunks import DecodedChunk, decode_shard
from lora_embed.chain.items import WorkItem
from lora_embed.images.decode import BadImage, Decode, decode_image
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.schema import REASONS, Shard, to_ipc
from samples import PREPROCESSING, encoded, layout, noise, png, poisoned, tar_shard

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's

GOOD = {
    "PNG": png(),
    "JPEG": encoded(noise(60, 40), "JPEG"),
    "CMYK JPEG": encoded(noise().convert("CMYK"), "JPEG"),
    "RGBA PNG": encoded(noise().convert("RGBA")),
    "palette": encoded(noise().convert("P"), transparency=3),
    "16-bit PNG": encoded(Image.fromarray(np.full((9, 12), 700, np.uint16))),
    "WebP": encoded(noise(), "WEBP"),
    "GIF": encoded(noise(), "GIF"),
}
BAD = {
    "empty": b"",
    "not_an_image": b"just text",
    "corrupt_image": png()[:-40],
    "too_many_pixels": encoded(Image.new("1", (1001, 1000))),
}


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "lora_embed.images.isolate" in child.cmdline()]


def ended(pid: int) -> bool:
    """Whether the process is gone, or soon is; a zombie that nobody waits for is gone."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def reject_of(decode: Decode, data: bytes) -> tuple[str, str]:
    with pytest.raises(BadImage) as caught:
        decode(data, PREPROCESSING, 1_000_000)
    return caught.value.reason, str(caught.value)


def chunks_of(shard: Shard, decode: Decode) -> list[DecodedChunk]:
    return list(decode_shard(WorkItem(shard=shard), layout(), PREPROCESSING, {}, decode=decode))


def test_one_child_gives_the_pixels_and_rejects_of_decode_image(tmp_path: Path) -> None:
    decode = IsolatedDecoder()
    assert not children()
    decode(png(), PREPROCESSING)
    (child,) = children()
    for data in GOOD.values():
        here, there = decode_image(data, PREPROCESSING), decode(data, PREPROCESSING)
        np.testing.assert_array_equal(there.pixels, here.pixels)
        assert there.pixels.dtype == here.pixels.dtype
        assert (there.width, there.height) == (here.width, here.height)
    for reason, data in BAD.items():
        assert reject_of(decode, data) == reject_of(decode_image, data)
        assert reject_of(decode, data)[0] == reason
    members = [(f"{name}.png", data) for name, data in (GOOD | BAD).items()]
    shard = tar_shard(tmp_path, members)
    assert_same(chunks_of(shard, decode), chunks_of(shard, decode_image))
    assert children() == [child]

    del decode  # without close: the child sees the end of its pipe
    gc.collect()
    assert child.wait(10) == 0


def assert_same(some: list[DecodedChunk], others: list[DecodedChunk]) -> None:
    assert [chunk.head for chunk in some] == [chunk.head for chunk in others]
    assert [to_ipc(chunk.samples) for chunk in some] == [to_ipc(chunk.samples) for chunk in others]
    assert [chunk.pixels.tobytes() for chunk in some] == [chunk.pixels.tobytes() for chunk in others]


def test_what_kills_a_child_is_one_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, segfault=png(1), memory=png(3), hang=png(5))
    shard = tar_shard(tmp_path, [(f"{number}.png", png(number)) for number in range(7)])
    with IsolatedDecoder(timeout_s=0.5) as decode:
        found = chunks_of(shard, decode)
        assert len(children()) == 1
    assert not children()
    expected = chunks_of(shard, decode_image)  # in this process, which started before the images were poisoned
    rows, sound = ([row for chunk in chunks for row in chunk.samples.to_pylist()] for chunks in (found, expected))
    details = {
        1: "the decoder was killed by signal 11 (SIGSEGV), 2 tries",
        3: "the decoder ran out of memory, 2 tries",
        5: "the decoder gave no answer in 0.5 s, 2 tries",
    }
    for number, detail in details.items():
        sound[number] |= {"width": None, "height": None, "reason": "decoder_crashed", "detail": detail}
    assert rows == sound
    assert "decoder_crashed" in REASONS
    pixels, all_pixels = (np.concatenate([chunk.pixels for chunk in chunks]) for chunks in (found, expected))
    np.testing.assert_array_equal(pixels, all_pixels[[0, 2, 4, 6]])
    assert [chunk.head.good for chunk in found] == [2, 2]


def test_a_child_that_died_of_something_else_costs_no_image() -> None:
    with IsolatedDecoder() as decode:
        decode(png(), PREPROCESSING)
        (child,) = children()
        child.kill()
        np.testing.assert_array_equal(decode(png(1), PREPROCESSING).pixels, decode_image(png(1), PREPROCESSING).pixels)
        (other,) = children()
        assert other != child

        with pytest.raises(TypeError, match="must be str or a tuple of str, not bytes") as caught:  # a bug, not an image
            decode("text", PREPROCESSING)  # type: ignore[arg-type]
        assert "in decode_image" in "".join(caught.value.__notes__)
    assert not children()


def test_a_child_that_cannot_be_started_is_no_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        IsolatedDecoder() as decode,
        pytest.raises(ChildProcessError, match=r"could not be started: .* ended with exit code 1"),
    ):
        decode(png(), PREPROCESSING)


PARENT = """
import sys, psutil
from lora_embed.images.isolate import IsolatedDecoder
from samples import PREPROCESSING, png
decode = IsolatedDecoder()
decode(png(), PREPROCESSING)
print(*[child.pid for child in psutil.Process().children()], flush=True)
decode(png(1), PREPROCESSING)
"""


def test_a_child_that_hangs_dies_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, hang=png(1))
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests") as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.2)  # the image is on its way
        assert psutil.Process(pid).is_running()
        os.kill(parent.pid, signal.SIGKILL)
        assert ended(pid)


HANGING = """
from lora_embed.images import isolate
from samples import PREPROCESSING, png
isolate.IMAGE_S = 0.5
isolate.decode_or_die(png(), PREPROCESSING)
time.sleep(1)
print("lives", flush=True)
isolate.decode_or_die(png(1), PREPROCESSING)
"""


def test_an_image_that_hangs_ends_the_process_that_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that crashes does: what the process was doing is tried again, with a child. No other image is cut off."""
    poisoned(monkeypatch, hang=png(1))
    command = [sys.executable, "-c", f"import time{HANGING}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT / "tests")
    assert done.stdout == "lives\n"
    assert done.returncode == -signal.SIGALRM


LIMITED = """
import numpy, PIL.Image
from lora_embed.images.decode import decode_image
from lora_embed.images.isolate import limit_memory
from samples import PREPROCESSING, encoded
data = encoded(PIL.Image.new("L", (8000, 4000)))
limit_memory(400 * 2**20)
print(decode_image(data, PREPROCESSING).pixels.shape)
limit_memory(100 * 2**20)
decode_image(data, PREPROCESSING)
"""


def test_an_image_that_takes_more_memory_than_there_is_crashes_the_decoder() -> None:
    """The decoder's own allocations, of about 5 bytes for each of 32 million pixels."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=60, cwd=ROOT / "tests")
    assert done.stdout.split("\n")[0] == "(8, 8, 3)"
    assert done.stderr.endswith("BadImage: the decoder ran out of memory\n")
