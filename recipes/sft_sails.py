"""Align a model by supervised fine-tuning of adapters that start in its SAE safety subspace.

accelerate launch recipes/sft_sails.py                                  # the testbed
accelerate launch recipes/sft_sails.py --config FILE.yaml               # your own model and data: docs/recipes.md
"""

from sails_align.core.errors import exit_on_input_error
from sails_align.training.run import main

if __name__ == "__main__":
    with exit_on_input_error():
        main("sft")
