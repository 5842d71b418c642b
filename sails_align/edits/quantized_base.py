"""How far a merged model is from the one that was trained, where that had a quantized base (QLoRA).

An adapter learns on top of rounded weights, and makes up for some of their errors. It is merged into the weights that
are not rounded, which is another model.

Shapes: B batch, S sequence, V vocabulary.
"""

import torch
from peft import PeftModel
from transformers.utils import is_bitsandbytes_available

from sails_align.models.adapters import AdapterFiles, load_base_config, read_json
from sails_align.models.load import load_causal_lm
from sails_align.models.quantized import quantization_of, use_one_layout


def quantized_logits(adapter: AdapterFiles, base_model: str | None, ids_BS: torch.Tensor) -> torch.Tensor | None:
    """Logits (B, S, V) of the model as it was trained, in float32 on the CPU.

    It is computed where bitsandbytes puts the model: on the GPU if there is one.

    None, if the base model was not quantized, or there is no bitsandbytes.
    """
    options = read_json(adapter.folder / "run.json").get("options", {}).get("model", {})
    quantization = quantization_of(options)
    if quantization is None or not is_bitsandbytes_available():
        return None
    name, _ = load_base_config(adapter, base_model)
    revision = None if base_model else adapter.revision
    base = load_causal_lm(name, dtype=options.get("dtype"), revision=revision, quantization=quantization)
    use_one_layout(base)
    model = PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    with torch.no_grad():
        return model(input_ids=ids_BS.to(model.device)).logits.float().cpu()
