"""Train the testbed's RLHF reference: reinforcement learning of all weights from the oracle's reward.

accelerate launch recipes/rlhf_reference.py                             # the shipped testbed
accelerate launch recipes/rlhf_reference.py --model_name_or_path testbed:1 --config FILE.yaml

For a real model the reference is the id of its aligned version, such as google/gemma-2-9b-it: docs/rlhf.md.
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["train", "rlhf", *sys.argv[1:]])
