"""Errors of safetensors that can be recognised only by their text."""

import re

from safetensors import SafetensorError


def number_of_system_error(error: SafetensorError) -> int | None:
    """The number (errno) of the system's error that safetensors met, such as a full disk; None for its own errors."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number is not None else None
