"""Self-contained HTML reports: of an evaluation, and of a run."""

from lora_embed.report.evaluation import write_report

__all__ = ["write_report"]
