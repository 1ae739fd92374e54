"""Embed images into a table: `ray job submit -- python jobs/embed.py --config job.yaml`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # a cluster has the dependencies, not the package

from lora_embed.cli import embed_job

if __name__ == "__main__":
    sys.exit(embed_job(sys.argv[1:]))
