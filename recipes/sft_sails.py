"""Align a model by supervised fine-tuning of adapters that start in its SAE safety subspace.

accelerate launch recipes/sft_sails.py --config FILE.yaml               # several GPUs: docs/distributed.md

It is `sails train sft`, which is enough for one GPU.
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["train", "sft", *sys.argv[1:]])
