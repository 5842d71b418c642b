"""Align a model by supervised fine-tuning of adapters that start in its SAE safety subspace.

accelerate launch recipes/sft_sails.py                                  # the testbed
accelerate launch recipes/sft_sails.py --config FILE.yaml               # your own model and data: docs/recipes.md
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["train", "sft", *sys.argv[1:]])
