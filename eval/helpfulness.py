"""How helpful a model's answers are, by themselves and against a reference's.

python eval/helpfulness.py --model testbed                          # or runs/mine, a model's folder, a hub id
python eval/helpfulness.py --config FILE.yaml                       # options in a file: docs/evaluation.md
"""

from sails_align.core.errors import exit_on_input_error
from sails_align.evaluation.helpfulness import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
