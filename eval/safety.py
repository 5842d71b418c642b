"""Safety rate, harmfulness, over-refusal and attack success of a model.

python eval/safety.py --model testbed                          # or runs/mine, a model's folder, a hub id
python eval/safety.py --config FILE.yaml                       # options in a file: docs/evaluation.md
"""

from sails_align.core.errors import exit_on_input_error
from sails_align.evaluation.safety import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
