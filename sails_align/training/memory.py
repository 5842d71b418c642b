"""Compute the memory that a training needs on each GPU from the shapes of its model, before it is started.

Letters in comments: P parameters of the model, T of them trained, N GPUs; w bytes of a weight as it is loaded, c of a
number in matrix products (2 in bfloat16). All results are bytes. Not counted: PyTorch itself and its kernels, buffers
of communication, fragmentation (together a few GiB); dense models only.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from sails_align.training.shapes import Setup, Shape

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
WHOLE_WEIGHTS: tuple[Engine, ...] = ("single", "ddp")
"""The engines with all weights on each GPU, as a quantized base and an average of the weights need them."""
FP32 = 4
ADAM = 2 * FP32
"""AdamW's two moments."""
# DeepSpeed's defaults, in numbers (deepspeed/runtime/zero/config.py); accelerate's configuration cannot set them.
REDUCE_BUCKET, MAX_LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
# TRL's head computes logits in tiles of so many tokens and words (trl/kernels/chunked_logprob.py).
HEAD_TOKENS, HEAD_WORDS = 4096, 32768


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU, and in a machine's own memory."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    buffers: int
    activations: int
    cpu: int
    """Of one machine: copies of the weights while they are loaded, or what is offloaded, whichever is more."""

    @property
    def total(self) -> int:
        """Return the bytes on each GPU."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.buffers + self.activations


def activations(shape: Shape, setup: Setup, residual_bytes: int) -> int:
    """Return the peak bytes of activations: those kept for the backward pass, and those that it computes.

    After Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, which counts the tensors that a transformer layer
    keeps. Here for transformers' layers with grouped queries, gated MLPs, norms in fp32 and no dropout. A block keeps

        tokens * (4 or 8 * norms + c * trained inputs + 3 c * heads + 3 c * MLP) + (2 c + 4) * heads * length^2

    the norms' inputs in fp32 (and outputs, if the norms are trained); the inputs of trained modules; queries, and keys
    and values repeated for each query head; gate, activation and up projection; and, with eager attention, the scores
    as the soft-capping, the softmax (in fp32) and the product with the values have them. With checkpointing only the
    blocks' inputs stay, and one block at a time is computed again.

    Args:
        shape: of the model.
        setup: of the training.
        residual_bytes: of a number in the residual stream.
    """
    tokens, c = setup.rows * setup.length, setup.compute_bytes
    norm_bytes = FP32 if setup.adapter else 2 * FP32
    per_token = norm_bytes * shape.norm_width + c * (shape.trained_inputs + 3 * shape.head_width + 3 * shape.mlp_width)
    scores = (2 * c + FP32) * setup.rows * shape.n_heads * setup.length**2 if setup.stores_scores else 0
    block = tokens * per_token + scores
    block_gradients = tokens * (2 * c * shape.mlp_width + FP32 * shape.d_model)
    tile = min(tokens, HEAD_TOKENS) * HEAD_WORDS * c
    head = tile + tokens * shape.d_model * (FP32 + c) + FP32 * shape.head  # gradients of both are summed in fp32
    if setup.checkpointing:
        inputs = shape.n_layers * tokens * shape.d_model * residual_bytes
        return inputs + max(block + block_gradients, head)
    return shape.n_layers * block + max(block_gradients, head)


def estimate(engine: Engine, shape: Shape, setup: Setup, num_gpus: int, gpus_per_node: int) -> Memory:
    """Estimate the memory of a training with one of the configurations in `accelerate_configs/`."""
    n = 1 if engine == "single" else num_gpus
    on_node = min(n, gpus_per_node)
    if engine == "fsdp2":
        return _fsdp2(shape, setup, n)
    if engine in WHOLE_WEIGHTS:
        return _replicated(shape, setup, n, on_node)
    return _zero(engine, shape, setup, n, on_node)


def _replicated(shape: Shape, setup: Setup, n: int, on_node: int) -> Memory:
    """Estimate one GPU, or DDP: autocast to bfloat16, AdamW in the type of the weights it trains."""
    P, T, w, c = shape.n_parameters, shape.n_trainable, setup.weight_bytes, setup.compute_bytes
    trained = T * (FP32 if setup.adapter else w)  # PEFT casts adapters to fp32
    copies = 0
    if setup.quantized_bytes is not None:  # of the module that is computed, as it is dequantized and as it is used
        copies = (w + c) * shape.d_model * shape.mlp_width
    elif c < w:  # autocast's: of trained weights until the forward pass ends, of frozen ones while a block needs them
        all_blocks = not (setup.adapter and setup.checkpointing)
        copies = c * shape.block * (shape.n_layers if all_blocks else 1)
    return Memory(
        weights=_frozen(shape, setup, w) + trained,
        gradients=trained,
        optimizer=2 * trained + (FP32 * T if setup.averaged else 0),
        reference={"none": 0, "adapter": trained, "model": _frozen(shape, setup, w) + T * w}[setup.reference],
        buffers=copies + (trained if n > 1 else 0),  # DDP's buckets hold all gradients once more
        activations=activations(shape, setup, w),
        cpu=on_node * P * w * (2 if setup.reference == "model" else 1),
    )


def _frozen(shape: Shape, setup: Setup, weight_bytes: int) -> int:
    """Return the bytes of the weights that are not trained; those of linear modules may be quantized."""
    quantized = 0 if setup.quantized_bytes is None else shape.linear
    others = shape.n_parameters - shape.n_trainable - quantized
    return others * weight_bytes + ceil(quantized * (setup.quantized_bytes or 0))


def _zero(engine: Engine, shape: Shape, setup: Setup, n: int, on_node: int) -> Memory:
    """Estimate DeepSpeed: all weights in bfloat16, and fp32 copies of the trained ones, divided."""
    P, T, c = shape.n_parameters, shape.n_trainable, setup.compute_bytes
    stage, offload = int(engine[4]), engine.endswith("offload")
    part = ceil(T / n)
    gradients = {
        1: c * T + FP32 * part,  # the part that is stepped is copied to fp32
        2: (c + FP32) * part,
        3: c * part + FP32 * min(part, SUB_GROUP),  # which stage 3 does piece by piece
    }
    divided = 1 if stage < 3 else n
    reference = {"none": 0, "adapter": c * T, "model": c * P}[setup.reference] // divided
    weights, buffers = c * P // divided, c * REDUCE_BUCKET
    if stage == 3:  # weights that are whole while they are used, and the largest gradient until it is divided
        buffers += c * min(P, max(MAX_LIVE, shape.largest_module)) + (0 if setup.adapter else c * shape.largest_module)
    loading = on_node * P * setup.weight_bytes * (2 if setup.reference == "model" else 1)
    # fp32 weights and gradients, AdamW's moments, gradients and weights as they are computed
    offloaded = on_node * (weights + reference + (2 * FP32 + ADAM + c) * part)
    return Memory(
        weights=0 if offload else weights,
        gradients=0 if offload else gradients[stage],
        optimizer=0 if offload else (FP32 + ADAM) * part,
        reference=0 if offload else reference,
        buffers=buffers,
        activations=activations(shape, setup, c),
        cpu=max(loading, offloaded) if offload else loading,
    )


def _fsdp2(shape: Shape, setup: Setup, n: int) -> Memory:
    """Estimate FSDP2 as accelerate sets it up: trained weights in fp32, computed in bfloat16, all divided."""
    P, T, w, c = shape.n_parameters, shape.n_trainable, setup.weight_bytes, setup.compute_bytes
    trained = T * (FP32 if setup.adapter or c < FP32 else w)
    # Whole at once: a block and the one fetched ahead, the embeddings and the head; and a block's gradients.
    whole = c * (2 * shape.block + shape.embeddings) + (0 if setup.adapter else 2 * c * shape.block)
    return Memory(
        weights=((P - T) * w + trained) // n,
        gradients=trained // n,
        optimizer=2 * trained // n,
        reference={"none": 0, "adapter": trained, "model": P * w}[setup.reference] // n,
        buffers=whole,
        activations=activations(shape, setup, c),
        cpu=P * w * (2 if setup.reference == "model" else 1),  # one process of a machine reads the weights
    )


def checkpoint_bytes(engine: Engine, shape: Shape, setup: Setup) -> dict[str, int]:
    """Return the bytes on disk of the model that is saved at the end, and of each checkpoint.

    An adapter's file holds the adapter; that of full fine-tuning all weights.
    """
    T, c, saved = shape.n_trainable, setup.compute_bytes, shape.n_saved
    if not engine.startswith("zero"):
        number = FP32 if setup.adapter or (engine == "fsdp2" and c < FP32) else setup.weight_bytes
        average = FP32 * T if setup.averaged else 0
        return {"model": number * saved, "checkpoint": number * (saved + 2 * T) + average}
    # DeepSpeed keeps the fp32 weights with the moments; up to stage 2 the weights are there once more
    again = c * saved if engine in ("zero1", "zero2") else 0
    return {"model": c * saved, "checkpoint": c * saved + again + (FP32 + ADAM) * T}
