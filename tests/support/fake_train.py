"""Stands for `hybridlm train` where only the sweep is tested: a point that ends as its seed says, in no time.

Seed 0 finishes; 1 fails with an error; 2 is killed; 3 waits to be stopped, and finishes when it is started again.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

folder = Path(sys.argv[1]).parent
config = yaml.safe_load(Path(sys.argv[1]).read_text())
seed, steps = config["training"]["seed"], config["training"]["steps"]
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()}\n")
result = {"status": "finished", "step": steps, "validation": {"validation_loss": 2.0}, "bigram_bits_per_byte": None,
          "checkpoint": None}
if seed == 1 and not (folder / "mended").exists():
    print("going well", file=sys.stderr)
    sys.exit("error: the disk is full; make room")
if seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 3 and len((folder / "starts").read_text().split()) == 1:
    def stop(*_):
        (folder / "stopped").touch()
        print(json.dumps({**result, "status": "interrupted", "step": 1}))
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    (folder / "listening").touch()
    time.sleep(60)
    sys.exit(1)
layers = config["model"]["schedule"]["ratio"]
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        file.write(json.dumps({"step": step, "loss": 10.0 - step + seed, "tokens_per_second": 100.0 * step,
                               "peak_memory_bytes": step % 7, "stage": "pretrain", "skipped": False}) + "\n")
    file.write(json.dumps({"step": steps, "seconds": 2.0 * steps, "validation_loss": 2.0 + seed + layers}) + "\n")
print(json.dumps(result))
