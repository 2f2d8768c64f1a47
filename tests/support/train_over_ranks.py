"""What each of several processes runs for test_equality.py and test_zero.py: `train_over_ranks.py RUNS`.

RUNS is a file with a JSON list; each item are the words of one `hybridlm train`. One process group serves them all:
starting it is most of the time.
"""

import json
import sys
from pathlib import Path

import torch

from hybridlm.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        code = main(["train", *words])
        assert code == 0, (words, code)
    torch.distributed.destroy_process_group()
