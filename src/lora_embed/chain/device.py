"""The device that an actor computes on: what `auto` is resolved from, and making a process ready for it."""

import os
from dataclasses import dataclass

from lora_embed.images.isolate import keep_freed_memory

CPU_BATCH, GPU_BATCH = 16, 256  # at 256 an H100 is within 10 % of its best rate with ViT-S and ViT-B


@dataclass(frozen=True, kw_only=True)
class Device:
    """What `auto` is resolved from: the device that an actor will run on."""

    kind: str  # "cuda" or "cpu"
    has_native_bfloat16: bool

    @property
    def precision(self) -> str:
        return "bfloat16" if self.has_native_bfloat16 else "float32"

    @property
    def batch_size(self) -> int:
        return GPU_BATCH if self.kind == "cuda" else CPU_BATCH


def inspect_device(kind: str) -> Device:
    """The device of the process that calls it: to be called where actors run, not on the driver.

    Of a CPU its flags tell all; to import torch for that would take longer than the rest of a small run's start.
    """
    if kind == "cpu":
        return Device(kind=kind, has_native_bfloat16=bool({"avx512_bf16", "amx_bf16"} & _cpu_flags()))
    import torch

    if not torch.cuda.is_available():  # a GPU that is declared and not there
        return inspect_device("cpu")
    return Device(kind=kind, has_native_bfloat16=torch.cuda.get_device_capability() >= (8, 0))


def _cpu_flags() -> set[str]:
    if not os.path.exists("/proc/cpuinfo"):
        return set()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((set(line.split(":", 1)[1].split()) for line in file if line.startswith("flags")), set())


def take_device(kind: str) -> str:
    """Make an actor's process ready for its device; the name of the one that is really there."""
    import torch  # here, not above: drivers and those who ask for a device can do without

    device = kind if kind == "cpu" or torch.cuda.is_available() else "cpu"  # a declared GPU need not be there
    if device == "cpu":
        keep_freed_memory()
        torch.set_num_threads(1)  # one actor per core; two threads on contended cores fall to a quarter
    return device
