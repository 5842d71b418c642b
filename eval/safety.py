"""Measure safety rate, harmfulness, over-refusal and attack success of a model.

python eval/safety.py --model testbed                          # or runs/mine, a model's folder, a hub id
python eval/safety.py --config FILE.yaml                       # options in a file: docs/evaluation.md
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["eval", "safety", *sys.argv[1:]])
