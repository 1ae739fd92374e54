"""Compare recipes on labelled images: `ray job submit -- python jobs/evaluate.py --recipe a.yaml --data … --label …`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # nodes have the dependencies, not this package
# If this process starts a Ray, its workers find the package through this variable:
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

from lora_embed.cli.main import evaluate_job
from lora_embed.monitor.ending import end_process

if __name__ == "__main__":
    end_process(evaluate_job(sys.argv[1:]))
