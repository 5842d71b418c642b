"""The memory a training needs: against DeepSpeed's estimators, what autograd keeps, and what is written to disk."""

import weakref
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, LlamaConfig, PreTrainedConfig

from sails_align.training.memory import MAX_LIVE, SUB_GROUP, activations, checkpoint_bytes, estimate
from sails_align.training.run import parse
from sails_align.training.shapes import Setup, Shape, setup_of, shape_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
GEMMA_9B = Gemma2Config(
    num_hidden_layers=42,
    hidden_size=3584,
    intermediate_size=14336,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    vocab_size=256000,
)
GEMMA_2B = Gemma2Config(
    num_hidden_layers=26,
    hidden_size=2304,
    intermediate_size=9216,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=256000,
)
LLAMA_8B = LlamaConfig(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
BF16 = Setup(
    rows=4,
    length=1024,
    weight_bytes=2,
    compute_bytes=2,
    adapter=False,
    checkpointing=True,
    stores_scores=True,
    reference="none",
)


def tiny(kind: str, n_layers: int = 2, tie: bool = True) -> PreTrainedConfig:
    options: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512}
    options |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": n_layers}
    config_class = Gemma2Config if kind == "gemma" else LlamaConfig
    return config_class(**options, tie_word_embeddings=tie)


def made(config: PreTrainedConfig, adapter: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if not adapter:
        return model
    return get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))


def on_meta(config: PreTrainedConfig, adapter: bool = False) -> Shape:
    with torch.device("meta"):
        return shape_of(made(config, adapter))


# Counting


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_those_of_a_real_model(adapter: bool, tie: bool) -> None:
    model = made(tiny("llama", tie=tie), adapter)
    shape = shape_of(model)
    assert on_meta(tiny("llama", tie=tie), adapter) == shape
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert shape.n_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.embeddings == 512 * 256 * (1 if tie else 2)
    assert shape.head == (0 if adapter else 512 * 256)
    assert (shape.n_trainable == shape.n_parameters) == (not adapter)
    assert shape.trained_inputs == ((3 * 256 + 256 + 4 * 8) if adapter else (5 * 256 + 256 + 1024))


# Weights, gradients, optimizer: against DeepSpeed


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (2, 8)])
@pytest.mark.parametrize("config", [GEMMA_9B, LLAMA_8B])
def test_model_states_are_deepspeeds(config: PreTrainedConfig, nodes: int, gpus: int) -> None:
    shape, n = on_meta(config), nodes * gpus
    P = shape.n_parameters
    memory = {e: estimate(e, shape, BF16, n, gpus) for e in ("zero1", "zero2", "zero3", "zero3_offload")}
    states = {e: m.weights + m.gradients + m.optimizer for e, m in memory.items()}

    _, theirs = estimate_zero2_model_states_mem_needs(P, gpus, nodes, cpu_offload=False)
    assert states["zero2"] == pytest.approx(theirs, rel=1e-6)
    assert (states["zero1"] > 1.3 * theirs) == (n > 1)  # all of the gradients: another number

    # Theirs has the fp32 copies of all gradients in a step, and forgets the bfloat16 ones; stage 3 makes these copies
    # for a sub-group at a time. Theirs has the largest module's weights and gradients whole at a time, and so have we,
    # but weights stay whole until there are `stage3_max_live_parameters` of them.
    _, theirs, largest = estimate_zero3_model_states_mem_needs(P, shape.largest_module, gpus, nodes, cpu_offload=False)
    forgotten, too_much = 2 * P / n, 4 * max(0, P / n - SUB_GROUP)
    assert largest == 4 * shape.largest_module
    assert states["zero3"] == pytest.approx(theirs - largest + forgotten - too_much, rel=1e-6)
    whole = memory["zero3"].buffers - memory["zero2"].buffers
    assert whole - 2 * (MAX_LIVE - shape.largest_module) == largest

    # Theirs multiplies by 1.5 for buffers unless it is told not to, and again forgets the bfloat16 gradients.
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
        P, shape.largest_module, gpus, nodes, cpu_offload=True, additional_buffer_factor=1.0
    )
    offloaded = memory["zero3_offload"]
    assert states["zero3_offload"] == 0
    assert gpu == largest
    assert estimate("zero3_offload", shape, replace(BF16, weight_bytes=0), n, gpus).cpu == pytest.approx(
        cpu + 2 * P / nodes, rel=1e-6
    )
    assert offloaded.buffers == memory["zero3"].buffers


def test_states_of_the_others() -> None:
    """Bytes for each parameter, as the docstrings of the engines say."""
    shape = replace(on_meta(tiny("llama")), n_parameters=1000, n_trainable=1000)
    fp32 = replace(BF16, weight_bytes=4)
    full = {e: estimate(e, shape, fp32, 2, 2) for e in ("single", "ddp", "fsdp2")}
    assert [full["single"].weights, full["single"].gradients, full["single"].optimizer] == [4000, 4000, 8000]
    assert full["ddp"].buffers - full["single"].buffers == 4000
    assert [full["fsdp2"].weights, full["fsdp2"].gradients, full["fsdp2"].optimizer] == [2000, 2000, 4000]
    adapter = replace(BF16, adapter=True)
    lora = {e: estimate(e, replace(shape, n_trainable=100), adapter, 2, 2) for e in ("single", "zero2", "fsdp2")}
    assert [lora["single"].weights, lora["single"].optimizer] == [2 * 900 + 4 * 100, 800]  # PEFT: adapters in fp32
    assert [lora["zero2"].weights, lora["zero2"].optimizer] == [2000, 600]  # DeepSpeed: all in bfloat16
    assert lora["fsdp2"].weights == (2 * 900 + 4 * 100) // 2


@pytest.mark.parametrize(
    ("option", "bytes_of_weight"),
    [
        ({"load_in_4bit": True}, 0.5 + 4 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ({"load_in_8bit": True}, 1.0),
    ],
)
def test_quantized_weights_have_the_bytes_of_real_ones(
    option: dict[str, bool], bytes_of_weight: float, tmp_path: Path
) -> None:
    """Within 2%: 8 bits have a scale for each row, too."""
    made(tiny("llama"), adapter=False).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**option)  # pyright: ignore[reportArgumentType]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    real = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    tied = model.lm_head.weight.numel() * 4
    shape = replace(on_meta(tiny("llama")), n_trainable=0)
    setup = replace(BF16, weight_bytes=4, adapter=True, quantized_bytes=bytes_of_weight)
    memory = estimate("single", shape, setup, 1, 1)
    assert memory.weights == pytest.approx(real - tied, rel=0.02)
    assert estimate("single", shape, replace(setup, quantized_bytes=None), 1, 1).weights > 3 * memory.weights


def test_the_options_give_these_bytes(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    argv = ["--model_name_or_path", str(tmp_path), "--init", "default"]
    more = {0.5625: ["--load_in_4bit", "true"], 1.0: ["--load_in_8bit", "true"], None: []}
    more[0.5 + 1 / 64 + 4 / (64 * 256)] = ["--load_in_4bit", "true", "--use_bnb_nested_quant", "true"]
    for expected, options in more.items():
        assert setup_of(parse("sft", [*argv, *options]), tiny("llama")).quantized_bytes == expected


def test_the_reference_of_dpo() -> None:
    shape = on_meta(tiny("llama"))
    P = shape.n_parameters
    copy = replace(BF16, reference="model", weight_bytes=4)
    assert estimate("single", shape, copy, 1, 1).reference == 4 * P
    assert estimate("zero2", shape, copy, 8, 8).reference == 2 * P  # whole on each GPU
    assert estimate("zero3", shape, copy, 8, 8).reference == 2 * P // 8
    assert estimate("zero2", shape, BF16, 8, 8).reference == 0


# Activations: against what autograd keeps


def kept(kind: str, n_layers: int, adapter: bool, dtype: torch.dtype) -> int:
    """Bytes of all tensors that a forward pass of one row of 128 tokens keeps for the backward pass."""
    attention = "eager" if kind == "gemma" else "sdpa"
    model = made(tiny(kind, n_layers), adapter, dtype, attn_implementation=attention).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    decoder = (model.get_base_model() if adapter else model).model
    ids_BS = torch.zeros((1, 128), dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        output = decoder(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
    assert output is not None  # alive until here, and with it all that was kept
    return sum(found.values())


@pytest.mark.parametrize("kind", ["gemma", "llama"])
@pytest.mark.parametrize(("adapter", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_block_keeps_what_the_formula_says(kind: str, adapter: bool, dtype: torch.dtype) -> None:
    """Within 5%, at bfloat16 autocast: of full fine-tuning with fp32 weights, of adapters with bfloat16 ones."""
    measured = kept(kind, 3, adapter, dtype) - kept(kind, 2, adapter, dtype)
    shape = on_meta(tiny(kind), adapter)
    if dtype == torch.float32:  # autocast's copies of the weights, which `estimate` has in the buffers
        measured -= 2 * shape.block
    setup = replace(BF16, rows=1, length=128, adapter=adapter, checkpointing=False, stores_scores=kind == "gemma")
    of_two, of_three = (activations(replace(shape, n_layers=n), setup, residual_bytes=2) for n in (2, 3))
    assert of_three - of_two == pytest.approx(measured, rel=0.05)
    other = replace(setup, stores_scores=kind != "gemma")
    wrong = activations(replace(shape, n_layers=3), other, 2) - activations(replace(shape, n_layers=2), other, 2)
    assert wrong != pytest.approx(measured, rel=0.05)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it hold at a time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live = dict.fromkeys(known, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._live:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return outputs

    def _free(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def peak_at_real_widths(config: PreTrainedConfig, adapter: bool, checkpointing: bool, attention: str) -> int:
    """What a forward and backward pass of 4 rows of 1024 tokens needs besides weights and gradients, without its head.

    Tensors are fake: they have shapes and no data.
    """
    with FakeTensorMode():
        model = made(config, adapter, torch.bfloat16, attn_implementation=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if adapter:
            model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        own = [*model.parameters(), *model.buffers(), *(p.grad for p in trained)]
        ids_BS = torch.zeros((4, 1024), dtype=torch.long)
        decoder = (model.get_base_model() if adapter else model).model
        with Peak({tensor.untyped_storage()._cdata for tensor in own}) as peak:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = decoder(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)).last_hidden_state
            torch.autograd.backward(hidden, torch.ones_like(hidden))
        return peak.peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("config", "adapter"), [(GEMMA_2B, True), (LLAMA_8B, True), (GEMMA_2B, False)])
def test_the_peak_at_real_widths(
    config: PreTrainedConfig, adapter: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 15%; with 8 of the blocks, to be quick."""
    config = deepcopy(config)
    config.num_hidden_layers = 8
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)  # fake parameters cannot be swapped
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    measured = peak_at_real_widths(config, adapter, checkpointing, attention)
    monkeypatch.undo()
    shape = replace(on_meta(config, adapter), head=0)
    setup = replace(BF16, adapter=adapter, checkpointing=checkpointing, stores_scores=attention == "eager")
    assert activations(shape, setup, residual_bytes=2) == pytest.approx(measured, rel=0.15)
    wrong = replace(setup, checkpointing=not checkpointing)
    assert activations(shape, wrong, residual_bytes=2) != pytest.approx(measured, rel=0.5)


# What is written to disk


@pytest.mark.parametrize("adapter", [True, False])
def test_checkpoints_are_as_large_as_real_ones(adapter: bool, tmp_path: Path) -> None:
    model = made(tiny("llama"), adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids_BS = torch.zeros((1, 4), dtype=torch.long)
    model(input_ids=ids_BS, labels=ids_BS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    setup = replace(BF16, adapter=adapter, weight_bytes=4)
    written = checkpoint_bytes("single", shape_of(model), setup)
    weights = tmp_path / ("adapter_model.safetensors" if adapter else "model.safetensors")
    assert written["model"] == sum(t.numel() * t.itemsize for t in load_file(weights).values())
    real = weights.stat().st_size + (tmp_path / "optimizer.pt").stat().st_size
    assert written["checkpoint"] < real < 1.1 * written["checkpoint"]
    zero = checkpoint_bytes("zero2", shape_of(model), setup)
    T = shape_of(model).n_trainable
    assert (zero["model"], zero["checkpoint"]) == (2 * T, 16 * T)


def test_an_average_of_the_weights_is_kept_in_fp32(tmp_path: Path) -> None:
    """Also of weights in bfloat16; `test_checkpoints_are_as_large_as_real_ones` has the rest."""
    tiny("llama").save_pretrained(tmp_path)
    argv = ["--model_name_or_path", str(tmp_path), "--use_peft", "false", "--dtype", "bfloat16"]
    plain, averaged = (setup_of(parse("sft", [*argv, *more]), tiny("llama")) for more in ([], ["--ema_half_life", "5"]))
    assert averaged == replace(plain, averaged=True)
    shape = on_meta(tiny("llama"))
    memory = [estimate("single", shape, setup, 1, 1).total for setup in (plain, averaged)]
    written = [checkpoint_bytes("single", shape, setup)["checkpoint"] for setup in (plain, averaged)]
    assert memory[1] - memory[0] == written[1] - written[0] == 4 * shape.n_trainable
