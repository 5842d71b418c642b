"""Tell a CLADE adapter the true category of each prompt, in place of its probe's prediction (`--clade_oracle`).

It shows how much the probe's errors cost. Shapes: B batch, S sequence, C classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sails_align.core.artifacts import content_hash
from sails_align.core.errors import InputError
from sails_align.evaluation.backends.local_model import encode
from sails_align.evaluation.records import Prompt
from sails_align.models import clade
from sails_align.models.generation import context_length
from sails_align.models.load import load_config, load_spec_tokenizer
from sails_align.models.spec import ModelSpec


@dataclass(frozen=True)
class KnownClasses:
    """Weights of classes by the tokens of a prompt (`records.InferenceHook`)."""

    weights: Mapping[tuple[int, ...], tuple[float, ...]]

    def identity(self) -> dict[str, Any]:
        """Return the hash of the weights."""
        return {"clade_oracle": content_hash(sorted(self.weights.items()))}

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Give the model's norms the classes of its prompts within the block."""
        adapter, known_B1C = clade.clade_of(model), torch.empty(0)

        def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal known_B1C
            ids_BS = kwargs["input_ids"]
            if ids_BS.shape[1] > 1:  # the prompts; later passes have one token of each response
                found = [self._of_prompt(row) for row in ids_BS.tolist()]
                known_B1C = torch.tensor(found, device=ids_BS.device)[:, None, :]
            adapter.use(known_B1C)

        handle = model.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _of_prompt(self, row: list[int]) -> tuple[float, ...]:
        """Return the weights of a row, which is padded on the left; the mask is not always there to tell where."""
        ends = (tuple(row[start:]) for start in range(len(row)))
        return next(self.weights[end] for end in ends if end in self.weights)


def known_classes(spec: ModelSpec | None, prompts: Sequence[Prompt]) -> KnownClasses:
    """Return the hook for some prompts.

    A harmful prompt of a category without a class has the mean of all harmful ones, a harmless one the class `none`.
    Raises `InputError` if the model is no CLADE adapter that predicts classes.
    """
    folder = None if spec is None or spec.adapter is None else Path(spec.adapter)
    classes = clade.read_config(folder).classes if folder and (folder / clade.CONFIG).is_file() else ()
    if len(classes) < 2 or spec is None:
        raise InputError(
            "clade_oracle is true, but the model is no run with --clade categories (in this process); leave it out"
        )
    config = load_config(spec.base, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    encoded = encode(load_spec_tokenizer(spec), [prompt.conversation for prompt in prompts], context_length(config))
    pairs = zip(encoded, prompts, strict=True)
    return KnownClasses({tuple(ids): _weights(classes, prompt) for ids, prompt in pairs if isinstance(ids, list)})


def _weights(classes: Sequence[str], prompt: Prompt) -> tuple[float, ...]:
    wanted = [prompt.category] if prompt.kind == "harmful" else [clade.NONE]
    if wanted[0] not in classes:
        wanted = [name for name in classes if name != clade.NONE]
    return tuple((name in wanted) / len(wanted) for name in classes)
