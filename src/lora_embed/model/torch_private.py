"""Errors of torch that can be recognised only by their text."""

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a device has no memory left. For a GPU, torch has its own class of error; for the CPU, a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
