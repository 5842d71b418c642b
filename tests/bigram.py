"""A model whose next token is decided by the last one alone, so that a test can say what it writes."""

from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = ["\n\n", "Human", "Assistant", ":", " Yes", ".", " Hi", " ", "\n", "user", "assistant", "model"]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def bigram_tokenizer(template: str | None, specials: Sequence[str] = SPECIALS) -> PreTrainedTokenizerFast:
    """Each of the pieces above is a token; `<s>` and `</s>` are BOS and EOS."""
    backend = Tokenizer(models.WordLevel({token: place for place, token in enumerate(specials)}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(specials))
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def bigram_model(tokenizer: PreTrainedTokenizerFast, following: Mapping[str, str]) -> LlamaForCausalLM:
    """After each token of `following` comes the one it names."""
    n = 32
    assert len(tokenizer) <= n
    config = LlamaConfig(
        vocab_size=n, hidden_size=n, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(n))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, after in following.items():
            ids = tokenizer.convert_tokens_to_ids([after, token])
            model.lm_head.weight[ids[0], ids[1]] = 1.0
    return model.eval()
