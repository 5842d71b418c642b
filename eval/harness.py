"""Measure a model's capability with lm-eval-harness, and its difference from the base model.

python eval/harness.py --model runs/sft-sails-testbed --tasks testbed   # an adapter and its base, offline
python eval/harness.py --model google/gemma-2-2b-it --base google/gemma-2-2b --tasks mmlu,gsm8k --backend vllm
"""

import sys

from sails_align.cli import main

if __name__ == "__main__":
    main(["eval", "harness", *sys.argv[1:]])
