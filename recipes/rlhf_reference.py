"""Train the testbed's RLHF reference: reinforcement learning of all weights from the oracle's reward.

accelerate launch recipes/rlhf_reference.py                             # the shipped testbed
accelerate launch recipes/rlhf_reference.py --model_name_or_path testbed:1 --config FILE.yaml

For a real model the reference is the id of its aligned version, such as google/gemma-2-9b-it: docs/rlhf.md.
"""

from sails_align.core.errors import exit_on_input_error
from sails_align.training.rlhf.run import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
