"""What makes pixels is part of the encoder: where a library decodes or resizes otherwise, it makes no vector."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, WebPImagePlugin
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from jobs import job_of, run_here, tiny_recipe, write_tars
from lora_embed import load_encoder
from lora_embed.chain.chunks import decode_blocks
from lora_embed.config.models import load_recipe
from lora_embed.errors import EncoderError
from lora_embed.images.arithmetic import IMAGES, check_arithmetic, check_once, known_paths, known_pixels, name_arithmetic
from lora_embed.images.preprocess import PILLOW_13, Arithmetic, Joint
from lora_embed.model.build import build_encoder
from lora_embed.model.description import DESCRIPTION, read_description
from lora_embed.model.ingredients import gather
from lora_embed.run.job import run_job
from old_pillow import install, path_with, resize_columns_first
from samples import PREPROCESSING, layout

OTHERS = ("11.0.0", "12.1.0", "12.3.0")
FILES = "51477b895ae4"  # of the hash over all test images
Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that decodes exactly, and one that decodes fast."""
    folder = tmp_path_factory.mktemp("encoders")
    recipe = load_recipe(tiny_recipe(folder))
    for decode in ("exact", "fast"):
        build_encoder(gather(recipe.model_copy(update={"decode": decode})), folder / decode, lambda line: None)
    return {decode: folder / decode for decode in ("exact", "fast")}


def as_built_before(encoder: Path, out: Path) -> Path:
    """The same without what says how its pixels are made, as all encoders were."""
    about = json.loads((encoder / DESCRIPTION).read_text())
    del about["arithmetic"], about["space_version"]
    shutil.copytree(encoder, out)
    (out / DESCRIPTION).write_text(json.dumps(about))
    return out


def patched(owner: Any, name: str, made: Callable[..., Any]) -> Break:
    """Another result of one function of Pillow: `made` gets the right one, then its arguments."""

    def change(patch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        patch.setattr(owner, name, lambda *given, **named: made(lambda: right(*given, **named), *given, **named))

    return change


def off(image: Image.Image) -> Image.Image:
    """One value of the last pixel, which is all but opaque in images with alpha."""
    values = np.array(image)
    values.reshape(image.height, image.width, -1)[-1, -1, 0] ^= 1
    return Image.fromarray(values)


def decoder(kind: type[ImageFile], concerns: Callable[[Any], bool] = lambda image: True) -> Break:
    """Files of that format come out with another last pixel."""

    def load(right: Callable[[], Any], image: Any) -> Any:
        found = right()
        if not hasattr(image, "is_off") and concerns(image):  # once: an image loads itself again and again
            image.is_off = True
            image.putpixel((image.width - 1, image.height - 1), image.getpixel((0, 0)))
        return found

    return patched(kind, "load", load)


def sampling(image: Any) -> list[tuple[int, int]]:
    return [layer[1:3] for layer in image.layer]


def resized(concerns: Callable[[tuple[int, int], tuple[int, int]], bool]) -> Break:
    def resize(right: Callable[[], Image.Image], image: Image.Image, size: tuple[int, int], *_: Any, **__: Any) -> Image.Image:
        return off(right()) if concerns(image.size, size) else right()

    return patched(Image.Image, "resize", resize)


def converted(mode: str) -> Break:
    def convert(right: Callable[[], Image.Image], image: Image.Image, *_: Any, **__: Any) -> Image.Image:
        return off(right()) if image.mode == mode else right()

    return patched(Image.Image, "convert", convert)


BREAKS: dict[str, tuple[Break, str]] = {
    "pillow 12": (lambda patch: patch.setattr(Image.Image, "resize", resize_columns_first), r"\(resize tall.*, resize narrow"),
    "wide": (resized(lambda was, now: was[0] > 1.7 * was[1] and now[0] < was[0]), "resize wide"),
    "large": (resized(lambda was, now: was[0] > now[0] and was[1] > now[1]), "resize large"),
    "small": (resized(lambda was, now: was[0] < now[0] and was[1] < now[1]), "resize small"),
    "jpeg": (decoder(JpegImageFile), "decode jpeg-420.jpg, .*jpeg-coarse.jpg"),
    "progressive": (
        decoder(JpegImageFile, lambda image: "progressive" in image.info),
        "large-progressive.jpg, decode jpeg-p",
    ),
    "4:4:4": (
        decoder(JpegImageFile, lambda image: image.layer[0][1:3] == (1, 1) and len(image.layer) == 3),
        "decode jpeg-444.jpg",
    ),
    "4:2:2": (decoder(JpegImageFile, lambda image: image.layer[0][1:3] == (2, 1)), "decode jpeg-422.jpg"),
    "grey JPEG": (decoder(JpegImageFile, lambda image: len(image.layer) == 1), "decode jpeg-grey.jpg"),
    "PNG": (decoder(PngImageFile), "decode png-.*, decode png"),
    "interlaced": (decoder(PngImageFile, lambda image: bool(image.info.get("interlace"))), "decode png-interlaced.png"),
    "WebP": (decoder(WebPImageFile), "decode webp-.*, decode webp"),
    "GIF": (decoder(GifImageFile), "decode gif-animated.gif"),
    "CMYK": (converted("CMYK"), "decode jpeg-cmyk.jpg, decode tiff-lzw.tif"),
    "palette": (converted("P"), "decode png-palette.png"),
    "one bit": (converted("1"), "decode png-one-bit.png"),
    "grey with alpha": (converted("LA"), "decode png-grey-alpha.png"),
    "transparency": (patched(Image, "alpha_composite", lambda right, *_: off(right())), "decode .*png-alpha.png"),
    "orientation": (patched(Image.Image, "transpose", lambda right, *_: off(right())), "decode jpeg-turned.jpg"),
}


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    """A process checks each encoder's arithmetic once; here each test is one that has not yet."""
    check_once.cache_clear()


@pytest.mark.parametrize("name", BREAKS)
def test_one_path_that_differs_is_enough(
    name: str, encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for an encoder that was built before this was recorded, and for processes that decode for an actor elsewhere."""
    change, path = BREAKS[name]
    change(monkeypatch)
    says = rf"pixels: on .*, the pixels of \d+ of \d+ test images differ .*{path}"
    with pytest.raises(
        EncoderError, match=rf"{says}.*built with Pillow 13.0.0.*this machine has Pillow .*Install Pillow 13.0.0"
    ):
        load_encoder(encoders["exact"])
    old = as_built_before(encoders["exact"], tmp_path / "old")
    with pytest.raises(EncoderError, match=says):
        load_encoder(old)
    preprocessing = read_description(encoders["exact"]).preprocessing
    for prepare in (preprocessing, Joint(parts=(PREPROCESSING, preprocessing))):
        with pytest.raises(EncoderError, match="pixels: "):
            next(decode_blocks({"block": []}, layout(), prepare, {}, lambda: False))


def test_fast_decoding_is_held_to_its_own_paths(encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    patched(JpegImageFile, "draft", lambda right, *_: None)(monkeypatch)
    load_encoder(encoders["exact"])
    with pytest.raises(EncoderError, match=r"decode jpeg-large.jpg fast to 18 pixels, decode jpeg-large.jpg fast to 72 pixels"):
        load_encoder(encoders["fast"])


def test_a_library_without_a_format_is_another_one(encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WebPImagePlugin, "SUPPORTED", False)
    with pytest.raises(EncoderError, match=r"3 of \d+ test images .*decode webp-alpha.webp, decode webp-lossless.webp"):
        load_encoder(encoders["exact"])


def test_the_test_images_and_what_they_are_known_to_give_never_change() -> None:
    """Encoders hold hashes of what these files give."""
    digest = hashlib.sha256()
    for file in sorted(file for file in IMAGES.iterdir() if file.suffix != ".json"):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    assert digest.hexdigest()[:12] == FILES
    assert known_paths() == known_pixels(PILLOW_13)


def test_the_arithmetic_is_named_and_part_of_the_space_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize_columns_first)
        other = build_encoder(gather(recipe), tmp_path / "other", lambda line: None)
        load_encoder(tmp_path / "other")
    usual = build_encoder(gather(recipe), tmp_path / "usual", lambda line: None)
    assert usual.preprocessing.arithmetic.name == PILLOW_13
    assert other.preprocessing.arithmetic.name.startswith("pixels-")
    assert other.space_id != usual.space_id
    assert other.recipe_id == usual.recipe_id
    with pytest.raises(EncoderError, match="resize tall"):
        load_encoder(tmp_path / "other")
    for description in (usual, other):
        arithmetic = description.preprocessing.arithmetic
        written = json.loads((tmp_path / ("usual" if description is usual else "other") / DESCRIPTION).read_text())
        assert written["arithmetic"]["name"] == arithmetic.name
        assert {"Pillow", "libjpeg-turbo", "libwebp", "transformers"} <= set(written["arithmetic"]["libraries"])
        assert {"golden grey.png", "resize tall", "decode jpeg-420.jpg"} <= set(written["arithmetic"]["pixels"])


def test_an_encoder_of_before_works_where_its_pixels_are_made(encoders: dict[str, Path], tmp_path: Path) -> None:
    for decode, folder in encoders.items():
        old = load_encoder(as_built_before(folder, tmp_path / decode))
        assert old.description.preprocessing.arithmetic == Arithmetic(name=PILLOW_13)
        assert old.space_id == read_description(folder).space_id


@pytest.mark.parametrize("resize", [(8, 8), (224, 224), 20, 256, 518, None])
def test_tall_images_go_the_way_of_tall_images(resize: tuple[int, int] | int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an encoder's size is; where nothing is resized, nothing differs."""
    plain = replace(PREPROCESSING, resize=resize, crop=(8, 8))
    named = name_arithmetic(plain)
    check_arithmetic(named)
    monkeypatch.setattr(Image.Image, "resize", resize_columns_first)
    if resize is None:
        check_arithmetic(named)
        return
    for preprocessing in (named, plain):
        with pytest.raises(EncoderError, match="resize tall"):
            check_arithmetic(preprocessing)


def test_the_check_is_cheap() -> None:
    """A worker's start: measured at 0.035 s; the encoder of 518 pixels, which takes a second to load, 0.11 s."""
    named = name_arithmetic(replace(PREPROCESSING, resize=256, crop=(224, 224)))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        check_arithmetic(named)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.2


def test_a_run_stops_and_writes_no_part(tmp_path: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    job = job_of(tmp_path, encoders["exact"], write_tars(tmp_path / "shards", shards=2, images=3))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize_columns_first)
        with pytest.raises(EncoderError, match=r"pixels: .*resize tall"):
            run_job(job)
    assert not list((tmp_path / "table").rglob("*.parquet"))
    assert run_job(job).published


LOADS = """
import sys, PIL
from lora_embed import load_encoder
from lora_embed.errors import EncoderError
for folder in sys.argv[1:]:
    try:
        print(PIL.__version__, "loads", load_encoder(folder).space_id)
    except EncoderError as error:
        print(PIL.__version__, "refuses", error)
"""


@pytest.mark.long
@pytest.mark.parametrize("version", [*OTHERS, "13.0.0"])
def test_real_releases_of_pillow(version: str, tmp_path: Path, encoders: dict[str, Path]) -> None:
    folders = [str(encoders["exact"]), str(encoders["fast"]), str(as_built_before(encoders["exact"], tmp_path / "old"))]
    environment = os.environ | {"PYTHONPATH": path_with(install("pillow", version))}
    done = subprocess.run([sys.executable, "-c", LOADS, *folders], env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr
    for line, folder in zip(lines, folders, strict=True):
        if version == "13.0.0":
            assert line == f"13.0.0 loads {read_description(Path(folder)).space_id}"
        else:
            assert line.startswith(f"{version} refuses pixels: ")
            assert "resize tall" in line
            assert f"here are Pillow {version}" in line
            assert "decode" not in line.partition("resize tall")[0].partition("built (")[2]
