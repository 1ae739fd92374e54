"""The encoder: a headless model with its preprocessing and pooling, and the identity of the space it makes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers import PreTrainedModel

from lora_embed.decode import decode_image, to_rgb
from lora_embed.errors import EncoderError
from lora_embed.fetch import fetch_directory
from lora_embed.model import golden
from lora_embed.model.base import MODEL_FILES, load_headless
from lora_embed.model.pooling import FROM_LAST_HIDDEN_STATE, HiddenState, pooler
from lora_embed.model.preprocess import Pixels, Preprocessing

DESCRIPTION = "encoder.json"
FILES = (*MODEL_FILES, DESCRIPTION, "recipe.yaml", "merge_report.json", f"{golden.FOLDER}/*")
FORMAT = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Parts of a model's configuration that name things or follow the library's version, and do not change its output.
_NAMES_ONLY = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "id2label", "label2id",
    "num_labels", "problem_type", "output_hidden_states", "output_attentions", "return_dict",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Description:
    """What `encoder.json` says: all that an encoder is beside its weights and model configuration."""

    space_id: str
    recipe_id: str
    dimension: int
    pooling: str
    normalize: bool
    tap: str  # module whose output is the hidden state; "" for the final output
    prefix_tokens: int
    preprocessing: Preprocessing


class Encoder:
    """Images → vectors on one device, in fixed-size batches so that a vector does not depend on its neighbours."""

    def __init__(
        self, model: PreTrainedModel, description: Description, *, device: str, precision: str, batch_size: int
    ) -> None:
        self.description = description
        self.device = torch.device(device)
        self.precision = precision
        self.batch_size = batch_size
        self._dtype = _DTYPES[precision]
        torch.nn.Module.to(model, self.device, self._dtype)
        from_end = description.pooling in FROM_LAST_HIDDEN_STATE
        self._hidden_state = HiddenState(model, "" if from_end else description.tap)
        self._pool = pooler(description.pooling, description.prefix_tokens)
        shape = (1, 3, 1, 1)
        self._multiply = torch.tensor(description.preprocessing.multiply, device=self.device).view(shape)
        self._add = torch.tensor(description.preprocessing.add, device=self.device).view(shape)

    @property
    def space_id(self) -> str:
        """12 hex digits; vectors of two space ids never mix."""
        return self.description.space_id

    @property
    def dimension(self) -> int:
        """Length d of a vector."""
        return self.description.dimension

    def embed(self, images: list[Image.Image]) -> NDArray[np.float32]:
        """Images of any size and mode → float32 (n, d)."""
        prepared = [self.description.preprocessing.apply(to_rgb(image)) for image in images]
        height, width = self.description.preprocessing.size
        return self.embed_pixels(np.stack(prepared) if prepared else np.empty((0, height, width, 3), np.uint8))

    @torch.inference_mode()
    def embed_pixels(self, pixels: Pixels) -> NDArray[np.float32]:
        """Prepared uint8 pixels (n, H, W, 3) → float32 (n, d), on the host."""
        vectors = np.empty((len(pixels), self.dimension), dtype=np.float32)
        for start in range(0, len(pixels), self.batch_size):
            batch = pixels[start : start + self.batch_size]
            missing = self.batch_size - len(batch)
            padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)]) if missing else batch
            vectors[start : start + len(batch)] = self._forward(padded)[: len(batch)].cpu().numpy()
        return vectors

    def check_golden(self, folder: Path) -> float:
        """Decode and embed the encoder's golden images here; the largest relative difference from their vectors.

        Raises EncoderError when it is beyond the bound of this precision.
        """
        images, expected = golden.load(folder)
        found = self.embed_pixels(golden_pixels(images, self.description.preprocessing))
        return golden.check(found, expected, self.precision, str(self.device))

    def _forward(self, pixels: Pixels) -> torch.Tensor:
        """uint8 (b, H, W, 3) → float32 (b, d)."""
        batch = torch.tensor(pixels, device=self.device).permute(0, 3, 1, 2)
        values = torch.addcmul(self._add, batch.float(), self._multiply).to(self._dtype)
        vectors = self._pool(self._hidden_state(values.contiguous()).float())
        return functional.normalize(vectors, dim=1) if self.description.normalize else vectors


def golden_pixels(images: dict[str, bytes], preprocessing: Preprocessing) -> Pixels:
    """Golden images, decoded as a run decodes images → uint8 (n, H, W, 3)."""
    return np.stack([decode_image(data, preprocessing).pixels for data in images.values()])


def load_encoder(
    uri: str | Path, *, device: str = "cpu", precision: str = "float32", batch_size: int = 16, check: bool = True
) -> Encoder:
    """Load an encoder's directory and, unless told not to, check it against its golden vectors.

    Raises StorageError or EncoderError when it is not there, not whole or not itself on this device.
    """
    folder = fetch_directory(str(uri), None, FILES)
    description = read_description(folder)
    model = load_headless(folder, str(uri))
    encoder = Encoder(model, description, device=device, precision=precision, batch_size=batch_size)
    if check:
        encoder.check_golden(folder)
    return encoder


def read_description(folder: Path) -> Description:
    """Read `encoder.json`. Raises EncoderError when there is none of this format."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise EncoderError(f"{folder}: is not an encoder: it has no {DESCRIPTION}. Make one with `lora-embed build`.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: is damaged ({error}); build the encoder again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise EncoderError(f"{path}: was written in another format than {FORMAT}; build the encoder again")
    geometry: dict[str, Any] = data.pop("preprocessing")
    tuples = {key: tuple(value) for key, value in geometry.items() if isinstance(value, list)}
    return Description(**data, preprocessing=Preprocessing(**geometry | tuples))


def write_description(folder: Path, description: Description) -> None:
    """Write `encoder.json`."""
    (folder / DESCRIPTION).write_text(json.dumps({"format": FORMAT} | asdict(description), indent=2) + "\n")


def space_id_of(model: PreTrainedModel, preprocessing: Preprocessing, pooling: str, normalize: bool) -> str:
    """12 hex digits of the SHA-256 over all that makes a vector: float32 weights, configuration, pixels, pooling."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NAMES_ONLY}
    digest = hashlib.sha256()
    for part in (config, asdict(preprocessing), pooling, normalize):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    for name, weight in sorted(model.state_dict().items()):
        assert weight.dtype in (torch.float32, torch.int64), (name, weight.dtype)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(_bytes_of(weight))
    return digest.hexdigest()[:12]


def _bytes_of(weight: torch.Tensor) -> Any:
    return weight.detach().contiguous().cpu().numpy().data.cast("B") if weight.numel() else b""
