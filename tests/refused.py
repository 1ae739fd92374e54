"""The page of all bases, image processors and adapters that are refused, with the cases that cause the messages."""

from jobs import ROOT
from refused_adapters import CONFIG_CASES, FOLDER_CASES, MERGE_CASES, TENSOR_CASES
from refused_bases import FILE_CASES, MODEL_CASES, PROCESSOR_CASES, SIZE_CASES
from user_errors import Page

PAGE = Page(
    ROOT / "docs" / "refusals.md",
    {
        "The base's folder and files": FILE_CASES,
        "The base's configuration and weights": MODEL_CASES,
        "The image processor": PROCESSOR_CASES,
        "Pooling and image size": SIZE_CASES,
        "The adapter's folder and files": FOLDER_CASES,
        "The adapter's configuration": CONFIG_CASES,
        "The adapter's tensors": TENSOR_CASES,
        "The merge": MERGE_CASES,
    },
)
