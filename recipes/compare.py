"""The whole comparison of methods, and its report.

python recipes/compare.py                      # the testbed: eight methods, five seeds
python recipes/compare.py --n_seeds 20 --output_dir runs/twenty
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
