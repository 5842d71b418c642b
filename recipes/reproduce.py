"""Reproduce the paper's table on one model: show the plan and its cost, check it, and run it.

python recipes/reproduce.py --model gemma-2-9b --dry-run     # the plan and the checks
python recipes/reproduce.py --model gemma-2-9b               # run everything; run it again to resume
"""

from sails_align.cli.reproduce import main
from sails_align.core.errors import exit_on_input_error

if __name__ == "__main__":
    with exit_on_input_error():
        main()
