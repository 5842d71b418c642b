"""Align a model by supervised fine-tuning of adapters that start in its SAE safety subspace.

    accelerate launch recipes/sft_sails.py                                  # the testbed
    accelerate launch recipes/sft_sails.py \
        --model_name_or_path google/gemma-2-2b \
        --sae_release gemma-scope-2b-pt-res-canonical \
        --sae_ids layer_5/width_16k/canonical layer_10/width_16k/canonical \
        --dataset_name Anthropic/hh-rlhf --on_bad_rows skip \
        --chat_template_path recipes/templates/human_assistant.jinja
"""

from sails_align.errors import exit_on_input_error
from sails_align.sft import main

if __name__ == "__main__":
    with exit_on_input_error():
        main()
