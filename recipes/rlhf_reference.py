"""Train the testbed's RLHF reference: reinforcement learning of all weights from the oracle's reward.

accelerate launch recipes/rlhf_reference.py                             # several processes

It is `sails train rlhf`, which is enough for one process.

For a real model the reference is the id of its aligned version, such as google/gemma-2-9b-it: docs/rlhf.md.
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["train", "rlhf", *sys.argv[1:]])
