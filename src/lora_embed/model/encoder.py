"""The encoder: a headless model with its preprocessing and pooling, and the id of the space of its vectors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers import PreTrainedModel

from lora_embed.errors import ConfigError, EncoderError, IncompleteRun
from lora_embed.images.arithmetic import check_arithmetic, check_golden_pixels
from lora_embed.images.decode import BadImage, decode_image, to_rgb
from lora_embed.images.isolate import IsolatedDecoder
from lora_embed.images.preprocess import Pixels, Preprocessing
from lora_embed.model import golden
from lora_embed.model.base import load_headless
from lora_embed.model.base_files import Base, find_base, is_base
from lora_embed.model.description import FILES, BaseReference, Description, check_files, read_description
from lora_embed.model.follow import may_ask_hub, refuse_elsewhere
from lora_embed.model.pooling import LAST, HiddenState, pooler
from lora_embed.model.space import VERSION, space_id_of
from lora_embed.model.torch_private import is_out_of_memory
from lora_embed.store.fetch import fetch_directory
from lora_embed.text import in_one_line

cuda: Any = torch.cuda  # partly untyped
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder:
    """Images → vectors on one device, in batches of fixed size, so that a vector does not depend on the other images.

    If there are several models, all of one architecture, their vectors are concatenated.
    """

    def __init__(
        self, models: list[PreTrainedModel], description: Description, *, device: str, precision: str, batch_size: int
    ) -> None:
        self.description = description
        self.models = models
        self.device = torch.device(device)
        self.precision = precision
        self.batch_size = batch_size
        self._dtype = DTYPES[precision]
        if self.device.type == "cuda" and precision == "float32":  # TF32 keeps 10 bits, too few for the golden vectors' bound
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for model in models:
            torch.nn.Module.to(model, self.device, self._dtype)
            if device == "cpu" and precision == "bfloat16":
                model.set_attn_implementation("eager")  # torch's fused attention takes 1.5 times as long here
        tap = "" if description.pooling.startswith(LAST) else description.tap
        self._hidden_states = [HiddenState(model, tap, channels_last=description.channels_last) for model in models]
        self._pool = pooler(description.pooling, description.form)
        shape = (1, 3, 1, 1)
        self._multiply = torch.tensor(description.preprocessing.multiply, device=self.device).view(shape)
        self._add = torch.tensor(description.preprocessing.add, device=self.device).view(shape)
        self._copying: Any = cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def space_id(self) -> str:
        """12 hex digits; vectors of two space ids never mix."""
        return self.description.space_id

    @property
    def dimension(self) -> int:
        """Length d of a vector."""
        return self.description.dimension

    def embed(self, images: Sequence[Image.Image | bytes | str | Path | NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Images of any size and mode → float32 (n, d).

        An image is a Pillow image, the bytes or the path of a file, or an array of pixels, uint8 (H, W) or (H, W, 3). Bytes of
        a file are decoded like in a run, in a child process that a hostile image may kill; each call starts a new
        child. An opened Pillow image is decoded in this process. Raises BadImage, with a reason such as `decoder_crashed`,
        for bytes that cannot be decoded, ConfigError for what is no list of images.
        """
        if isinstance(images, Image.Image | bytes | str | Path | np.ndarray):
            raise ConfigError(f"embed takes a list of images, found one {type(images).__name__}. Write embed([image]).")
        with IsolatedDecoder() as decode:
            prepared = [self._prepared(image, decode) for image in images]
        shape = self.description.preprocessing.shape
        return self.embed_pixels(np.stack(prepared) if prepared else np.empty((0, *shape), np.uint8))

    def _prepared(self, image: Any, decode: IsolatedDecoder) -> Pixels:
        preprocessing = self.description.preprocessing
        if isinstance(image, str | Path):
            image = _bytes_of(image)
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image | bytes):
            kind = f"an array of {image.dtype}, {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ConfigError(
                f"embed takes Pillow images, bytes or paths of image files, or uint8 arrays (H, W, 3); found {kind}."
            )
        return decode(image, preprocessing).pixels if isinstance(image, bytes) else preprocessing.apply(to_rgb(image))

    @torch.inference_mode()
    def embed_pixels(self, pixels: Pixels) -> NDArray[np.float32]:
        """Prepared uint8 pixels (n, *shape) → float32 (n, d), on the host. Raises IncompleteRun if memory is too small."""
        try:
            vectors = [self._forward(batch) for batch in self._batches(pixels)]
            return torch.cat(vectors)[: len(pixels)].cpu().numpy() if vectors else np.empty((0, self.dimension), np.float32)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise IncompleteRun(
                f"{self.device}: there is not enough memory for batches of {self.batch_size} images in {self.precision} "
                f"({in_one_line(error, 160)}). Set a smaller batch_size, or free memory on that device."
            ) from None

    def check_golden(self, folder: Path) -> float:
        """Decode and embed the golden images on this device. Returns the largest relative difference from their vectors.

        Raises EncoderError if it exceeds the bound of this precision, or if test images have other pixels here than on the
        machine that built the encoder.
        """
        preprocessing = self.description.preprocessing
        check_arithmetic(preprocessing)
        images, expected = golden.load(folder)
        try:
            pixels = golden_pixels(images, preprocessing)
        except BadImage as bad:
            raise EncoderError(f"{folder}: a golden image is damaged ({bad.reason}: {bad}). Build the encoder again.") from None
        check_golden_pixels(preprocessing, dict(zip(images, pixels, strict=True)))
        return golden.check(self.embed_pixels(pixels), expected, self.precision, str(self.device))

    def _batches(self, pixels: Pixels) -> Iterator[torch.Tensor]:
        """Batches of `batch_size` on the device; the last one is padded.

        For a GPU, batches are copied from pinned memory by a separate stream, while the GPU computes the one before.
        """
        on_gpu = self.device.type == "cuda"
        for start in range(0, len(pixels), self.batch_size):
            rows = pixels[start : start + self.batch_size]
            batch = torch.empty((self.batch_size, *rows.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
            batch.numpy()[: len(rows)] = rows
            batch[len(rows) :] = 0
            yield self._copy_aside(batch) if on_gpu else batch

    def _copy_aside(self, batch: torch.Tensor) -> torch.Tensor:
        copying, computing = self._copying, cuda.current_stream(self.device)
        with cuda.stream(copying):
            copied = batch.to(self.device, non_blocking=True)
        computing.wait_stream(copying)
        copied.record_stream(computing)  # so that its memory is not used again while it is still read
        return copied

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 pixels (b, *shape) on the device → float32 (b, d) there."""
        values = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.description.preprocessing.pad is None:
            values = torch.addcmul(self._add, values, self._multiply, out=values)
        else:
            values = torch.addcmul(self._add, values[:, :3], self._multiply) * values[:, 3:]  # 0 in the padding
        values = values.to(self._dtype)
        vectors = torch.cat([self._pool(state(values).float()) for state in self._hidden_states], dim=1)
        return functional.normalize(vectors, dim=1) if self.description.normalize else vectors


def _bytes_of(path: str | Path) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as an image file ({error.strerror or error}). Correct the path.") from None


def golden_pixels(images: dict[str, bytes], preprocessing: Preprocessing) -> Pixels:
    """Golden images, decoded like in a run → uint8 (n, *shape)."""
    return np.stack([decode_image(data, preprocessing).pixels for data in images.values()])


def load_encoder(
    uri: str | Path,
    *,
    device: str = "cpu",
    precision: str = "float32",
    batch_size: int = 16,
    check: bool = True,
    storage_options: dict[str, Any] | None = None,
    base: str | None = None,
) -> Encoder:
    """Load an encoder's directory and, if `check`, check its space id and its golden vectors.

    `uri`: a directory, an fsspec URI with its storage options, or `hf://owner/name`. `base`: where to find the base of an
    encoder that is stored as an adapter. Without it, the base that the encoder names is used if it is on the encoder's own
    store, in the hub's cache, or below a place in the environment variable `LORA_EMBED_FOLLOW`. Raises StorageError or
    EncoderError if the encoder is missing, incomplete, not the one of its space id, or computes other vectors on this device.
    """
    where = str(uri)
    folder = fetch_directory(where, None, FILES, storage_options)
    description = read_description(folder)
    if description.base is not None:
        check_files(folder, description, where)
    models = load_members(folder, description, where, base)
    if check:
        check_space(models, description, where)
    encoder = Encoder(models, description, device=device, precision=precision, batch_size=batch_size)
    if check:
        encoder.check_golden(folder)
    return encoder


def check_space(models: list[PreTrainedModel], description: Description, where: str) -> None:
    """Raises EncoderError, naming `where`, if the models do not have the space id in `encoder.json`.

    The id of an earlier version cannot be computed any more, since it depended on the release of transformers.
    """
    if description.space_version != VERSION:
        return
    space_id = space_id_of(models, description.preprocessing, description.pooling, description.normalize, description.form)
    if space_id != description.space_id:
        raise EncoderError(
            f"{where}: its files make vectors of space {space_id}, but encoder.json says {description.space_id}. The files "
            "were changed after the build, or not all were copied. Restore them, or build the encoder again."
        )


def load_members(folder: Path, description: Description, where: str, base: str | None = None) -> list[PreTrainedModel]:
    """An encoder's models: either saved whole, or each rebuilt from the base and an adapter.

    Raises EncoderError, naming `where`, if the base has changed, or lies on a store that must not be used.
    """
    if description.base is None:
        return [load_headless(folder / member, where) for member in description.members]
    from lora_embed.model.adapter import read_adapter  # imports peft, which takes seconds and which other encoders do not need
    from lora_embed.model.fold import Merge, fold
    from lora_embed.model.match import match_adapter, target_of

    base_files = _find_base(description.base, where, base)
    target = target_of(base_files)
    models = []
    for member in description.members:
        adapter = match_adapter(read_adapter(str(folder / member)), target)
        model = load_headless(base_files.folder, base_files.uri)
        for _ in fold(model, Merge(adapters=(adapter,), weights=(1.0,), options={})):
            pass
        models.append(model)
    return models


def _find_base(reference: BaseReference, where: str, named_uri: str | None) -> Base:
    """The base of an encoder stored as an adapter: at the place that the user named, else at the one that the encoder names."""
    asks_hub = True
    if named_uri is None:
        refuse_elsewhere(reference.uri, where)
        asks_hub = may_ask_hub(reference.uri, where)
    uri = named_uri or reference.uri
    base = find_base(uri, reference.revision if uri == reference.uri else None, asks_hub=asks_hub)
    if not is_base(base, reference.content_hash):
        raise EncoderError(
            f"{where}: is stored as an adapter of {uri}, whose files have changed since. Restore the files of the base, or "
            "build the encoder again."
        )
    return base
