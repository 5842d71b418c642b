"""The attention implementation that computes what a model was trained to."""

from transformers import PreTrainedConfig


def exact_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention implementation that computes what the model was trained with; None: the default.

    transformers' default for Gemma 2, SDPA, leaves out the soft-capping of the attention logits without a word
    (`integrations/sdpa_attention.py` takes no `softcap`, as of 5.17), so hidden states would not be those that the
    SAEs were trained on.
    """
    return "eager" if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) else None
