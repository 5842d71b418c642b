"""The whole comparison of methods, and its report.

python recipes/compare.py                      # the testbed: eight methods, five seeds
python recipes/compare.py --n_seeds 20 --output_dir runs/twenty
"""

from sails_align.cli.compare import main
from sails_align.core.errors import exit_on_input_error

if __name__ == "__main__":
    with exit_on_input_error():
        main()
