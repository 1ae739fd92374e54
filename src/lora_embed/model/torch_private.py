"""What torch tells in words alone."""

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Has a device no memory left? Of a GPU, torch raises an error of its own class; of the CPU, any RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
