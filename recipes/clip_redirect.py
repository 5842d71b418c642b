"""Redirect unsafe images and captions of a tiny CLIP to the nearest safe ones (SafeR-CLIP, arXiv 2511.16743).

python recipes/clip_redirect.py --seed 0

The world has coloured shapes, each of them also with an unsafe attribute, "burning": a word, and flames in a corner
of the image. A CLIP with random weights is trained on all of it. Then adapters are trained on frozen targets: T0 and V0
are the encoders before, t and v safe captions and images, t* and v* unsafe ones, and ^ marks the nearest safe one,

    t^ = argmax over safe t of cos(T0(t*), T0(t)),    v^ = argmax over safe v of cos(V0(v*), V0(v))

    log(1 + exp(cos(V(v*), T0(t*)) - cos(V(v*), T0(t^))))    relative redirection of images, and of captions likewise
    1 - cos(T(t*), T0(t^)),  1 - cos(V(v*), V0(v^))          redirection within a modality
    1 - cos(T(t), T0(t)),    1 - cos(V(v), V0(v))            preservation

The first epoch has the pairs whose captions are most similar to their targets, the second more, later ones all. The
control replaces the relative redirection by CLIP's own loss (InfoNCE) with the same targets, in which other rows of the
batch are negatives.

<output_dir>/clip_redirect.json   options and numbers

Shapes: N rows, L tokens of a caption, H x W pixels, D width of an embedding.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel

from sails_align.core.errors import CommandParser, InputError, exit_on_input_error
from sails_align.core.files import output_folder, write_json
from sails_align.core.tables import FittedTable
from sails_align.training.losses.redirection import nearest
from sails_align.training.losses.redirection import redirection as relative

COLOURS = {
    **{"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9)},
    **{"yellow": (0.9, 0.9, 0.1), "white": (0.9, 0.9, 0.9), "violet": (0.7, 0.1, 0.9)},
}
SHAPES, SIZES = ("square", "cross", "ring", "bar"), ("small", "large")
WORDS = ("pad", "begin", "a", *SIZES, *COLOURS, *SHAPES, "burning", "end")
THINGS = tuple(product(SIZES, COLOURS, SHAPES))
HELD_OUT = 4
"""One of this number of things is unsafe only in tests."""
SIDE, BATCH, LORA_R, COPIES = 16, 64, 8, 8
METHODS = ("before", "redirected", "control")
RATES = {
    f"{kind} {name}: {what}": n
    for name in ("captions", "images")
    for kind, what, n in (
        ("unsafe", "unsafe found", COPIES * len(THINGS) // HELD_OUT),
        ("unsafe", "their safe twin", COPIES * len(THINGS) // HELD_OUT),
        ("safe", "right one found", COPIES * len(THINGS)),
    )
}
"""Rates that `measure` returns, and of how many queries."""


def captions(things: Tensor, unsafe: Tensor) -> Tensor:
    """Return the tokens of captions. (N, L)"""
    rows = []
    for thing, is_unsafe in zip(things.tolist(), unsafe.tolist(), strict=True):
        words = ["begin", "a", *THINGS[thing], *["burning"] * bool(is_unsafe), "end"]
        rows.append([WORDS.index(word) for word in [*words, *["pad"] * (7 - len(words))]])
    return torch.tensor(rows)


def images(things: Tensor, unsafe: Tensor, generator: torch.Generator) -> Tensor:
    """Draw images: a shape near the middle, noise, and flames in a corner of unsafe ones. (N, 3, H, W)"""
    pixels_N3HW = 0.15 * torch.rand(len(things), 3, SIDE, SIDE, generator=generator)
    moves_N2 = torch.randint(-1, 2, (len(things), 2), generator=generator)
    y_HW, x_HW = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for number, (thing, is_unsafe) in enumerate(zip(things.tolist(), unsafe.tolist(), strict=True)):
        size, colour, shape = THINGS[thing]
        radius = 2 if size == "small" else 5
        down_HW, right_HW = (
            (grid - 8 - int(move)).abs() for grid, move in zip((y_HW, x_HW), moves_N2[number], strict=True)
        )
        inside = {
            "square": (down_HW <= radius) & (right_HW <= radius),
            "cross": ((down_HW <= radius) & (right_HW == 0)) | ((right_HW <= radius) & (down_HW == 0)),
            "ring": torch.maximum(down_HW, right_HW) == radius,
            "bar": (down_HW <= 1) & (right_HW <= radius),
        }[shape]
        pixels_N3HW[number, :, inside] += torch.tensor(COLOURS[colour])[:, None]
        if is_unsafe:
            flames_HW = ((y_HW + x_HW) % 2 == 0) & (y_HW < 4) & (x_HW < 4)
            pixels_N3HW[number, :, flames_HW] += torch.tensor([1.0, 0.5, 0.0])[:, None]
    return pixels_N3HW * 2 - 1


def tiny_clip(seed: int) -> CLIPModel:
    """Make a CLIP with random weights: two layers of width 32 for each modality."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": WORDS.index("end")}
    text = {**shape, "vocab_size": len(WORDS), "max_position_embeddings": 8, "projection_dim": 32, **tokens}
    vision = {**shape, "image_size": SIDE, "patch_size": 4, "projection_dim": 32}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def embed_text(model: Any, ids_NL: Tensor) -> Tensor:
    """Return unit embeddings of captions. (N, D)"""
    return normalize(model.text_projection(model.text_model(input_ids=ids_NL).pooler_output), dim=1)


def embed_images(model: Any, pixels_N3HW: Tensor) -> Tensor:
    """Return unit embeddings of images. (N, D)"""
    return normalize(model.visual_projection(model.vision_model(pixel_values=pixels_N3HW).pooler_output), dim=1)


def info_nce(moved_ND: Tensor, unsafe_ND: Tensor, safe_ND: Tensor) -> Tensor:
    """Return the control's loss: of all targets in the batch, each row's own. (N,)"""
    logits_NN = normalize(moved_ND, dim=1) @ normalize(safe_ND, dim=1).T / 0.07
    return cross_entropy(logits_NN, torch.arange(len(moved_ND)), reduction="none")


def pretrain(model: CLIPModel, n_steps: int, generator: torch.Generator) -> None:
    """Train on captions and images of all things, safe and unsafe, with CLIP's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, n_steps) if n_steps > 0 else None
    for _ in range(n_steps):
        drawn = torch.randperm(2 * len(THINGS), generator=generator)[:BATCH]  # no caption occurs twice
        things, unsafe = drawn // 2, drawn % 2
        text_ND = embed_text(model, captions(things, unsafe))
        logits_NN = (
            model.logit_scale.exp().clamp(max=100) * text_ND @ embed_images(model, images(things, unsafe, generator)).T
        )
        own = torch.arange(len(drawn))
        optimizer.zero_grad()
        (cross_entropy(logits_NN, own) + cross_entropy(logits_NN.T, own)).backward()
        optimizer.step()
        assert schedule is not None
        schedule.step()


@dataclass(frozen=True)
class Pairs:
    """Captions (N, L) and images (N, 3, H, W), their frozen embeddings (N, D), and those of their targets."""

    ids: Tensor
    pixels: Tensor
    text: Tensor
    images: Tensor
    safe_text: Tensor
    safe_images: Tensor

    def take(self, rows: Tensor) -> "Pairs":
        """Return some of the pairs."""
        return Pairs(**{name: tensor[rows] for name, tensor in vars(self).items()})


@torch.no_grad()
def make_pairs(frozen: CLIPModel, generator: torch.Generator, copies: int = COPIES) -> tuple[Pairs, Pairs]:
    """Make the unsafe pairs with their nearest safe targets, and safe pairs, which are their own targets."""
    things = torch.arange(len(THINGS)).repeat(copies)
    safe_ids_NL, safe_pixels = (
        captions(things, torch.zeros_like(things)),
        images(things, torch.zeros_like(things), generator),
    )
    safe_text_ND, safe_images_ND = embed_text(frozen, safe_ids_NL), embed_images(frozen, safe_pixels)
    safe = Pairs(safe_ids_NL, safe_pixels, safe_text_ND, safe_images_ND, safe_text_ND, safe_images_ND)
    trained = things[things % HELD_OUT != 0]
    ids_NL, pixels = captions(trained, torch.ones_like(trained)), images(trained, torch.ones_like(trained), generator)
    text_ND, images_ND = embed_text(frozen, ids_NL), embed_images(frozen, pixels)
    targets = safe_text_ND[nearest(text_ND, safe_text_ND)], safe_images_ND[nearest(images_ND, safe_images_ND)]
    return Pairs(ids_NL, pixels, text_ND, images_ND, *targets), safe


def losses(model: Any, unsafe: Pairs, safe: Pairs, between: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Return the losses of redirection, with `between` modalities and within them, and that of preservation."""
    text_ND, images_ND = embed_text(model, unsafe.ids), embed_images(model, unsafe.pixels)
    redirection = between(images_ND, unsafe.text, unsafe.safe_text).mean()
    redirection = redirection + between(text_ND, unsafe.images, unsafe.safe_images).mean()
    redirection = redirection + (1 - cosine_similarity(text_ND, unsafe.safe_text)).mean()
    redirection = redirection + (1 - cosine_similarity(images_ND, unsafe.safe_images)).mean()
    kept = (1 - cosine_similarity(embed_text(model, safe.ids), safe.text)).mean()
    return redirection, kept + (1 - cosine_similarity(embed_images(model, safe.pixels), safe.images)).mean()


def redirect(model: Any, pairs: tuple[Pairs, Pairs], between: Callable[..., Tensor], given: Any) -> None:
    """Train a model's adapters, in epochs that begin with the easy pairs."""
    unsafe, safe = pairs
    generator = torch.Generator().manual_seed(given.seed + 1)
    easy_first = cosine_similarity(unsafe.text, unsafe.safe_text).argsort(descending=True, stable=True)
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=given.learning_rate, eps=1e-5
    )
    for epoch in range(given.epochs):
        used = easy_first[: math.ceil(min(epoch + 1, 3) / 3 * len(easy_first))]
        for rows in used[torch.randperm(len(used), generator=generator)].split(BATCH):
            others = torch.randperm(len(safe.ids), generator=generator)[: len(rows)]
            redirection, preservation = losses(model, unsafe.take(rows), safe.take(others), between)
            optimizer.zero_grad()
            (given.strength * redirection + preservation).backward()
            optimizer.step()


@torch.no_grad()
def measure(model: Any, base: CLIPModel, seed: int) -> dict[str, float]:
    """Retrieve among captions and among images of all things, safe and unsafe, which the model before has embedded.

    Unsafe queries are of things that were held out.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    n = len(THINGS)
    things, unsafe = torch.arange(n).repeat(2), torch.arange(2).repeat_interleave(n)
    ids_NL, held_out = captions(things, unsafe), torch.arange(0, n, HELD_OUT) + n
    found: dict[str, list[Tensor]] = {name: [] for name in RATES}
    for _ in range(COPIES):
        pixels = images(things, unsafe, generator)
        first_of = {
            "captions": nearest(embed_text(model, ids_NL), embed_images(base, pixels)),
            "images": nearest(embed_images(model, pixels), embed_text(base, ids_NL)),
        }
        for name, first in first_of.items():
            found[f"unsafe {name}: unsafe found"].append(first[held_out] >= n)
            found[f"unsafe {name}: their safe twin"].append(first[held_out] == held_out - n)
            found[f"safe {name}: right one found"].append(first[:n] == torch.arange(n))
    return {name: torch.cat(each).double().mean().item() for name, each in found.items()}


def run(given: Any) -> dict[str, dict[str, float]]:
    """Pretrain, redirect, train the control, and measure each. Returns rates by method."""
    generator = torch.Generator().manual_seed(given.seed)
    base = tiny_clip(given.seed)
    pretrain(base, given.pretraining_steps, generator)
    base.requires_grad_(False)
    pairs = make_pairs(base, generator)
    rates = {"before": measure(base, base, given.seed)}
    modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    for name, between in (("redirected", relative), ("control", info_nce)):
        torch.manual_seed(given.seed)
        adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=LORA_R, lora_alpha=16, target_modules=modules))
        redirect(adapted, pairs, between, given)
        rates[name] = measure(adapted, base, given.seed)
    return rates


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Read the options, run, print the table, and write the numbers."""
    parser = CommandParser(
        description="Redirect what is unsafe for a tiny CLIP to the nearest safe captions and images."
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the model and the training (default 0)")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="weight of redirection; preservation has 1 (default 1)"
    )
    parser.add_argument("--epochs", type=int, default=9, help="epochs of redirection (default 9)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of redirection (default 0.003)")
    parser.add_argument("--pretraining_steps", type=int, default=250, help="batches of 64 pairs (default 250)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/clip-redirect"), help="default runs/clip-redirect"
    )
    with exit_on_input_error():
        given = parser.parse_args(argv)
        for name, least in (
            ("seed", 0),
            ("strength", 0),
            ("epochs", 0),
            ("learning_rate", 0),
            ("pretraining_steps", 0),
        ):
            if not least <= getattr(given, name) < math.inf:
                raise InputError(f"{name} is {getattr(given, name)}; choose {least} or more")
        with output_folder(given.output_dir):
            rates = run(given)
            options = {name: value for name, value in vars(given).items() if name != "output_dir"}
            write_json(given.output_dir / "clip_redirect.json", {"options": options, "n": RATES, "rates": rates})
    rows = [[name, *(f"{rates[method][name]:.1%}" for method in METHODS), str(n)] for name, n in RATES.items()]
    title = f"Retrieval with seed {given.seed}: what is found first"
    Console(highlight=False).print(FittedTable(title, ["queries", *METHODS, "n"], rows))
    return rates


if __name__ == "__main__":
    main()
