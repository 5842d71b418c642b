"""The paper's table on one model: the plan, its cost, checks before a GPU-hour is spent, and the runs themselves.

python recipes/reproduce.py --model gemma-2-9b --dry-run     # the plan and the checks
python recipes/reproduce.py --model gemma-2-9b               # all of it; started again, it goes on
"""

from sails_align.errors import exit_on_input_error
from sails_align.reproducing import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
