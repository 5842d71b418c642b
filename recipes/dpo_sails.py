"""Align a model by direct preference optimization (DPO) of adapters that start in its SAE safety subspace.

accelerate launch recipes/dpo_sails.py --config FILE.yaml               # several GPUs: docs/distributed.md

It is `sails train dpo`, which is enough for one GPU.
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["train", "dpo", *sys.argv[1:]])
