"""Train the demo's LoRA adapters on the real parts: `category10` and `group27` on emoji, `digits10` on handwritten digits."""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from torch.nn import functional

import lora_embed.demo
from digits import Digit, fetch_digits
from lora_embed.demo.parts import BASE_MODEL_NAME, LabelledImage, fetch_base_model, fetch_images
from lora_embed.store.fetch import cache_root

TASKS = {"category10": "category", "group27": "group", "digits10": "digit"}  # adapter: the label it is trained on
EPOCHS = {"category10": 12, "group27": 12, "digits10": 4}
PIXELS = 56  # 4x4 patches: the centre of a 64-pixel image
MARGIN = 64 - PIXELS
BATCH_SIZE = 32
LEARNING_RATE = 1.5e-3
NEIGHBOURS = 10
SEED = 7
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


Picture = LabelledImage | Digit


def main() -> None:
    """Fetch the parts, train the asked adapters, print how good they are on images they never saw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(lora_embed.demo.__path__[0]) / "adapters")
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--half", type=int, choices=[0, 1], help="train on one half of the images alone, named NAME-half0")
    parser.add_argument("--epochs", type=int, help="12 on emoji, 4 on digits")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order: the same machine gives the same adapter
    transformers.logging.set_verbosity_error()
    base = fetch_base_model(cache_root(), print)
    emoji, digits = fetch_images(cache_root(), print), fetch_digits(cache_root(), print)
    for adapter in TASKS if arguments.task == "all" else [arguments.task]:
        images: Sequence[Picture] = digits if adapter == "digits10" else emoji
        labelled = [image for image in images if label_of(image, TASKS[adapter]) is not None]
        seen = labelled if arguments.half is None else half_of(labelled, arguments.half)
        model = train(base, seen, TASKS[adapter], arguments.epochs or EPOCHS[adapter])
        print_quality(model, labelled, images, TASKS[adapter])
        save(model, arguments.out / (adapter if arguments.half is None else f"{adapter}-half{arguments.half}"))


def half_of(images: Sequence[Picture], half: int) -> list[Picture]:
    """Return one of two halves that share no emoji: one task split in two."""
    names = [image.key.rpartition("-")[2] if isinstance(image, Digit) else image.key.partition("-")[2] for image in images]
    return [image for image, name in zip(images, names, strict=True) if hashlib.sha256(name.encode()).digest()[9] % 2 == half]


def train(base: Path, images: Sequence[Picture], label: str, epochs: int) -> PeftModel:
    """Return the base model with a trained LoRA and head. Uses the train split of `images` only, float32, seeded."""
    torch.manual_seed(SEED)
    images = [image for image in images if image.split == "train"]
    pixels = load_pixels(images)
    labels = torch.tensor([label_of(image, label) for image in images])
    model = peft_model(base, int(labels.max()) + 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH_SIZE)[: steps // epochs]:
            logits = model(pixel_values=augmented(pixels[batch], mirrors=label != "digit")).logits
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        print(f"{label}: epoch {epoch + 1}/{epochs}, loss {np.mean(losses):.3f}, {seconds:.0f} s", flush=True)
    return model.eval()


def peft_model(base: Path, classes: int) -> PeftModel:
    """Return the base model with a new head and a new LoRA on attention (q, v) and both MLP layers."""
    model = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=classes)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "fc1", "fc2"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


def print_quality(model: PeftModel, labelled: Sequence[Picture], images: Sequence[Picture], label: str) -> None:
    """Print held-out accuracy of the trained head, then of nearest neighbours with the adapter and without it."""
    test = [image for image in labelled if image.split == "test"]
    logits, _ = predict(model, load_pixels(test))
    truth = torch.tensor([label_of(image, label) for image in test])
    print(f"{label}: held-out accuracy {(logits.argmax(1) == truth).float().mean():.3f} ({len(test)} images)")
    pixels = load_pixels(images)
    _, with_adapter = predict(model, pixels)
    with model.disable_adapter():
        _, without = predict(model, pixels)
    for other in [task for task in TASKS.values() if rows_of(images, task, "test")]:
        base, adapted = (neighbour_accuracy(vectors, images, other) for vectors in (without, with_adapter))
        print(f"{label}: kNN accuracy on {other}: base {base:.3f}, with the adapter {adapted:.3f}", flush=True)


def predict(model: PeftModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and vectors (mean over all tokens of the last hidden state) of uint8 images (n, 3, 64, 64)."""
    logits, vectors = [], []
    centre = pixels[:, :, MARGIN // 2 : MARGIN // 2 + PIXELS, MARGIN // 2 : MARGIN // 2 + PIXELS]
    with torch.inference_mode():
        for batch in centre.split(64):
            output = model(pixel_values=normalised(batch / 255), output_hidden_states=True)
            logits.append(output.logits)
            vectors.append(output.hidden_states[-1].mean(dim=1))
    return torch.cat(logits), torch.cat(vectors)


def neighbour_accuracy(vectors: Tensor, images: Sequence[Picture], label: str) -> float:
    """Classify each test image by its nearest train images: votes weighted by cosine similarity."""
    unit = functional.normalize(vectors, dim=1)
    bank, queries = rows_of(images, label, "train"), rows_of(images, label, "test")
    bank_labels = torch.tensor([label_of(images[row], label) for row in bank])
    truth = torch.tensor([label_of(images[row], label) for row in queries])
    similarity, nearest = (unit[queries] @ unit[bank].T).topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[nearest], similarity)
    return (votes.argmax(1) == truth).float().mean().item()


def rows_of(images: Sequence[Picture], label: str, split: str) -> list[int]:
    """Return the positions of the images of one split that carry the label."""
    return [row for row, image in enumerate(images) if image.split == split and label_of(image, label) is not None]


def label_of(image: Picture, label: str) -> int | None:
    """Return the image's class for `category`, `group` or `digit`, None where it has none."""
    found: int | None = getattr(image, label, None)
    return found


def load_pixels(images: Sequence[Picture]) -> Tensor:
    """Return uint8 (n, 3, 64, 64). Transparent pixels become white, as transformers' processors make them."""
    return torch.stack([torch.from_numpy(on_white(image.path)) for image in images]).permute(0, 3, 1, 2)


def on_white(path: Path) -> np.ndarray:
    """Return an image as uint8 (64, 64, 3) on a white ground."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


def augmented(pixels: Tensor, mirrors: bool) -> Tensor:
    """Return a random window of each uint8 image, half of them mirrored if asked, with brightness and colours shifted."""
    count = len(pixels)
    offsets = torch.randint(0, MARGIN + 1, (count, 2)).tolist()
    windows = [image[:, y : y + PIXELS, x : x + PIXELS] for image, (y, x) in zip(pixels, offsets, strict=True)]
    batch = torch.stack(windows) / 255
    mirrored = torch.rand(count) < (0.5 if mirrors else 0.0)
    batch[mirrored] = batch[mirrored].flip(-1)
    gain = 1 + 0.2 * (2 * torch.rand(count, 3, 1, 1) - 1) + 0.1 * (2 * torch.rand(count, 1, 1, 1) - 1)
    return normalised((batch * gain).clamp(0, 1))


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels in 0..1 by ImageNet's mean and deviation."""
    return (pixels - MEAN) / STD


def save(model: PeftModel, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; the base is named, not located."""
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL_NAME
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "adapter_model.safetensors").chmod(0o644)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # a set in PEFT, in any order
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print(f"saved {folder}", flush=True)


if __name__ == "__main__":
    main()
