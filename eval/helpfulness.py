"""Measure how helpful a model's answers are, by themselves and against a reference's.

python eval/helpfulness.py --model testbed                          # or runs/mine, a model's folder, a hub id
python eval/helpfulness.py --config FILE.yaml                       # options in a file: docs/evaluation.md
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["eval", "helpfulness", *sys.argv[1:]])
