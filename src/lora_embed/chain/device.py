"""The device that an actor computes on: inspect it to resolve `auto`, and prepare a process for it."""

import os
from dataclasses import dataclass

from lora_embed.images.isolate import keep_freed_memory

CPU_BATCH, GPU_BATCH = 16, 256  # at 256 an H100 reaches over 90 % of its best rate with ViT-S and ViT-B


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that an actor will run on; `auto` settings are resolved from it."""

    kind: str  # "cuda" or "cpu"
    has_native_bfloat16: bool

    @property
    def precision(self) -> str:
        return "bfloat16" if self.has_native_bfloat16 else "float32"

    @property
    def batch_size(self) -> int:
        return GPU_BATCH if self.kind == "cuda" else CPU_BATCH


def inspect_device(kind: str) -> Device:
    """The device of the calling process. Call it where actors run, not on the driver.

    For a CPU, /proc/cpuinfo is enough; to import torch would take longer than the rest of a small run's start.
    """
    if kind == "cpu":
        return Device(kind=kind, has_native_bfloat16=bool({"avx512_bf16", "amx_bf16"} & _cpu_flags()))
    import torch

    if not torch.cuda.is_available():  # Ray was told of a GPU that does not exist
        return inspect_device("cpu")
    return Device(kind=kind, has_native_bfloat16=torch.cuda.get_device_capability() >= (8, 0))


def _cpu_flags() -> set[str]:
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((set(line.split(":", 1)[1].split()) for line in file if line.startswith("flags")), set())


def take_device(kind: str) -> str:
    """Prepare an actor's process for its device; returns the name of the device that really exists."""
    import torch  # here, because drivers do not need torch

    device = kind if kind == "cpu" or torch.cuda.is_available() else "cpu"  # Ray may have been told of a GPU wrongly
    if device == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1)  # one actor per core; with two threads on a busy core the speed falls to a quarter
    return device
