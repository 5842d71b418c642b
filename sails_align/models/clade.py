"""Norms whose gain and bias depend on the category of the request: CLADE (arXiv 2012.04644) for language models.

CLADE normalizes an image and then scales and shifts each pixel by the gain and the bias of its class. Here each token
has weights w over classes of requests, and an RMSNorm with the gain g returns

    y = x / rms(x) * (g + sum_c w_c dg_c) + sum_c w_c b_c

dg and b are zero at the start. In training w is the label of the request. At inference it is predicted, token by token,
from the hidden state that the frozen base has after block `layer`: w = softmax(W h / rms(h) + v). Only norms of deeper
blocks are conditional, so that h is the base's, one forward pass suffices, and the model stays causal.

The change depends on the input, so it cannot be merged into weights, and vLLM cannot serve it.

<folder>/clade.safetensors   gain and bias, each (M, C, D), and the probe's weight (C, D) and bias (C,)
<folder>/clade.json          the base model, the classes, the block that the probe reads, and the paths of the norms

Shapes: B batch, S sequence, M norms, C classes, D d_model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sails_align.core.errors import InputError
from sails_align.core.files import write_json
from sails_align.models.hooks import check_layers

CONFIG, WEIGHTS = "clade.json", "clade.safetensors"
CLASS_IDS = "clade_class"
"""Name of the forward pass's argument with the class of each row, (B,)."""
NONE = "none"
"""The class of harmless requests, and of those whose category is not known."""


@dataclass(frozen=True)
class CladeConfig:
    """What `clade.json` holds."""

    base_model: str
    """What `from_pretrained` takes."""
    revision: str | None
    classes: tuple[str, ...]
    layer: int
    """The block whose output the probe reads."""
    norms: tuple[str, ...]
    """Paths of the conditional norms in the decoder."""
    probe_accuracy: float | None = None
    """Share of response tokens of training requests, left out of its fit, whose class it predicts; None of one class"""


class Clade(nn.Module):
    """Gains and biases for each class, and the probe that predicts classes.

    Args:
        config: of the adapter.
        d_model: width of the norms.
    """

    def __init__(self, config: CladeConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        shape = len(config.norms), len(config.classes), d_model
        self.gain, self.bias = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.probe = nn.Linear(d_model, len(config.classes)).requires_grad_(False)
        self._weights: Tensor | None = None
        self._is_on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the base model as it is within the block."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the classes of a forward pass out of its arguments. Evaluations are never told a class."""
        ids_B = kwargs.pop(CLASS_IDS, None)
        n_classes = len(self.config.classes)
        self._weights = None
        if n_classes == 1 and self._is_on:
            self._weights = self.gain.new_ones(1, 1, 1)
        elif ids_B is not None and model.training and self._is_on:
            self._weights = nn.functional.one_hot(ids_B, n_classes).to(self.gain.dtype)[:, None, :]
        return args, kwargs

    def use(self, weights_BSC: Tensor) -> None:
        """Take other weights of classes for the forward pass that has begun, in place of predicted ones."""
        if self._is_on:
            self._weights = weights_BSC.to(self.gain)

    def predict(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Read the output of the probe's block, unless the classes are known."""
        if self._weights is None and self._is_on:
            hidden_BSD = output[0] if isinstance(output, tuple) else output
            self._weights = self.predicted(hidden_BSD)

    def predicted(self, hidden_BSD: Tensor) -> Tensor:
        """Return the weights of classes at each token. (B, S, C)"""
        return self.probe(unit_rms(hidden_BSD).to(self.probe.weight)).softmax(-1)

    def condition(self, index: int, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add to a norm's output what the classes change of it."""
        if self._weights is None:
            return output
        unit_BSD = unit_rms(args[0], _epsilon(norm))
        of_class = (each.to(unit_BSD) for each in (self._weights, self.gain[index], self.bias[index]))
        return output + class_affine(unit_BSD, *of_class).to(output.dtype)


def class_affine(x_BSD: Tensor, weights_BSC: Tensor, gain_CD: Tensor, bias_CD: Tensor) -> Tensor:
    """Scale and shift each token by the gain and the bias of its classes. (B, S, D)"""
    return x_BSD * (weights_BSC @ gain_CD) + weights_BSC @ bias_CD


def unit_rms(x_BSD: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide by the root mean square, in float32 at least."""
    x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))
    return x_BSD * torch.rsqrt(x_BSD.pow(2).mean(-1, keepdim=True) + epsilon)


def _epsilon(norm: nn.Module) -> float:
    """Return an RMSNorm's epsilon: Gemma's `eps`, or `variance_epsilon` of Llama, Qwen and Mistral."""
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)  # pyright: ignore[reportArgumentType]


def norms_after(model: nn.Module, layer: int) -> tuple[str, ...]:
    """Return the paths, in the decoder, of the norms over d_model in the blocks behind a block.

    Raises `InputError` if there is no block behind it, or a norm is no RMSNorm.
    """
    blocks = check_layers(model, [layer])
    found = {
        f"layers.{index}.{name}": norm
        for index, block in enumerate(blocks)
        for name, norm in block.named_children()
        if index > layer and name.endswith("norm")
    }
    if not found:
        raise InputError(f"clade_layer is {layer}, but no block comes after it; choose 0 to {len(blocks) - 2}")
    for norm in found.values():
        if not (hasattr(norm, "eps") or hasattr(norm, "variance_epsilon")) or getattr(norm, "bias", None) is not None:
            raise InputError(
                f"clade needs RMSNorms, and {type(norm).__name__} is none; use a Gemma, Llama or Qwen model"
            )
    return tuple(found)


def attach(model: PreTrainedModel, clade: Clade) -> None:
    """Make the norms of a model conditional, for good. The adapter becomes its module `clade`.

    Raises `InputError` if the model lacks one of the norms, or has another width.
    """
    modules = dict(model.get_decoder().named_modules())
    blocks = check_layers(model, [clade.config.layer])
    for path in clade.config.norms:
        norm = modules.get(path)
        if norm is None or next(norm.parameters()).numel() != clade.gain.shape[-1]:
            raise InputError(
                f"the CLADE adapter does not fit the model {model.name_or_path}, which has no norm {path} of width "
                f"{clade.gain.shape[-1]};\ngive the model that it was trained on with --base_model"
            )
    model.clade = clade.to(next(blocks.parameters()).device)
    model.disable_adapter = clade.off  # pyright: ignore[reportArgumentType] -- what evaluations ask PEFT's for
    model.register_forward_pre_hook(clade.begin, with_kwargs=True)
    blocks[clade.config.layer].register_forward_hook(clade.predict)
    for index, path in enumerate(clade.config.norms):
        modules[path].register_forward_hook(partial(clade.condition, index))


def save_clade(clade: Clade, folder: Path) -> None:
    """Write the adapter's two files."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in clade.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, vars(clade.config))


def read_config(folder: Path) -> CladeConfig:
    """Read `clade.json`; raise `InputError` if it is damaged."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        lists = {name: tuple(values[name]) for name in ("classes", "norms")}
        config = CladeConfig(**{**values, **lists})
        if not (isinstance(config.base_model, str) and config.classes and config.norms):
            raise ValueError("a value is empty or of another type")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / CONFIG} is damaged ({error}); copy the folder again, or train again") from error
    return config


def load_clade(folder: Path) -> Clade:
    """Load an adapter; raise `InputError` if its files are damaged or do not fit each other."""
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        clade = Clade(config, tensors["gain"].shape[-1])
        clade.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(f"{folder / WEIGHTS} is damaged ({cause}); copy the folder again, or train again") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise InputError(
            f"{folder / WEIGHTS} has values that are not finite; train again with a smaller --learning_rate"
        )
    return clade


def fit_probe(states_TD: Tensor, ids_T: Tensor, n_classes: int, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Fit a linear classifier of hidden states by multinomial logistic regression.

    Args:
        states_TD: hidden states, as `unit_rms` makes them.
        ids_T: their classes.
        n_classes: how many there are.
        ridge: weight of half the squared norm of W; the problem is convex, so it has one solution.

    Returns:
        W (C, D) and v (C,).
    """
    parameters = [states_TD.new_zeros(n_classes, states_TD.shape[1]), states_TD.new_zeros(n_classes)]
    weight_CD, bias_C = (each.requires_grad_() for each in parameters)
    optimizer = torch.optim.LBFGS([weight_CD, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_TC = states_TD @ weight_CD.T + bias_C
        value = nn.functional.cross_entropy(logits_TC, ids_T) + ridge / 2 * weight_CD.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return weight_CD.detach(), bias_C.detach()


def clade_of(model: nn.Module) -> Clade:
    """Return the adapter that `attach` has put on a model."""
    return model.get_submodule("clade")  # pyright: ignore[reportReturnType]
