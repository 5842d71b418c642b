"""Compare all methods over seeds, and make the report.

python recipes/compare.py                      # the testbed: eight methods, five seeds
python recipes/compare.py --n_seeds 20 --output_dir runs/twenty
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
