"""A GGUF file becomes a folder with the same weights, and with the special tokens that its chat template shows."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sails_align.core.errors import InputError
from sails_align.models import gguf as module
from sails_align.models.gguf import gguf_folder
from sails_align.models.load import load_causal_lm, load_tokenizer
from sails_align.models.resolve import resolve_model

gguf = pytest.importorskip("gguf")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def permuted(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Queries and keys as llama.cpp has them: the two halves of each head interleaved."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM) -> None:
    """A file as converters make them: its BOS and EOS are both the token that opens turns."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    byte_level = ["\u0120", "\u010a", "ab", "cd"]  # space, newline, and what is merged
    characters = [chr(code) for code in range(33, 33 + CONFIG.vocab_size - len(SPECIAL) - len(byte_level))]
    tokens = [*SPECIAL, *byte_level, *characters]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))  # control, normal
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = permuted(weight, CONFIG.num_attention_heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAILS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    write(tmp_path / "tiny.gguf", model)
    model.save_pretrained(tmp_path / "expected")
    return tmp_path / "tiny.gguf"


def test_the_model_is_the_same_and_its_special_tokens_are_the_templates(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = resolve_model(str(file))
    assert "eos_token <|im_start|> -> <|im_end|>" in caplog.text
    model, expected = load_causal_lm(spec.base), load_causal_lm(str(file.parent / "expected"))
    ids_BS = torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(model(ids_BS).logits, expected(ids_BS).logits, atol=1e-5, rtol=1e-4)
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(spec.tokenizer)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert not tokenizer.clean_up_tokenization_spaces
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == 2


def test_it_is_converted_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf_folder(file)
    monkeypatch.setattr(module, "_convert", lambda *_: pytest.fail("converted again"))
    moved = file.rename(file.with_name("moved.gguf"))
    assert gguf_folder(moved) == folder, "it is known by its content"


def test_files_that_cannot_be_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no file"):
        gguf_folder(tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot load the model"):
        gguf_folder(tmp_path / "cut.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sails-align\[gguf\]'"):
        gguf_folder(file)
