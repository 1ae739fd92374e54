"""With this folder on PYTHONPATH, a process does harm at the images that `samples.poisoned` names, for real.

They stand in for an image that crashes Pillow, fills the memory or never ends: none is known that is not mended one day.
"""

import ctypes
import hashlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

DECODE = "lora_embed.images.decode"
HARM = dict(entry.split(":") for entry in os.environ.get("POISONED_IMAGES", "").split(",") if entry)


class PoisonDecode(MetaPathFinder):
    """Finds the module that decodes as it is, and gives it a harmful `_decode` once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != DECODE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_poisoned(module: Any) -> None:
            load(module)
            module._decode = harmful(module._decode)

        spec.loader.exec_module = load_poisoned
        return spec


def harmful(decode: Callable[..., Any]) -> Callable[..., Any]:
    def do_harm(data: bytes, *arguments: Any) -> Any:
        kind = HARM.get(hashlib.sha256(data).hexdigest())
        if kind == "segfault":
            ctypes.string_at(0)
        while kind == "hang":
            time.sleep(1)
        taken = []
        while kind == "memory":
            import numpy as np

            taken.append(np.empty(2**28, np.uint8))  # address space, never touched: other processes keep their memory
        return decode(data, *arguments)

    return do_harm


sys.meta_path.insert(0, PoisonDecode())
