"""Suppress the SAE features of harmful answers in an adapter, and keep what the model is in harmless ones.

CRISP (arXiv 2508.13650) picks SAE features that are often active in texts to unlearn and seldom in others, and trains a
LoRA adapter that suppresses them. Here, over the layers with an SAE:

    mean of sum_i a_i(x_forget) / frozen mean of it  +  w mean |h(x_retain) - h_frozen|^2 / frozen mean |h|^2

a_i are the activations of the layer's chosen features, and h are hidden states: of these layers, and of the last one,
so that what the model says of harmless requests is kept, too. Both terms are relative, which is ours: the first is 1 at
the start, and 0 once no chosen feature is active.

Features are ranked by how much more often they are active in harmful answers, among those whose mean activation there
is at least `crisp_ratio` times that in harmless ones. The texts are those of `sspu`.

Shapes: T tokens, F d_sae, K features.
"""

from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, SFTConfig

from sails_align.core.errors import InputError
from sails_align.core.log import say
from sails_align.models.hooks import decoder_layers
from sails_align.saes.load import ResidualSAE
from sails_align.subspace.selection import FeatureFitter
from sails_align.subspace.statistics import TokenStats
from sails_align.training.dataset import TrainingSource
from sails_align.training.losses.compose import LossStep, check_cross_entropy, check_not_compiled
from sails_align.training.losses.options import CrispOptions
from sails_align.training.losses.side_batches import SideBatches
from sails_align.training.losses.unlearning import UnlearningData, answer_states, frozen
from sails_align.training.plan import TrainingPlan


class CRISP:
    """Make chosen features inactive in harmful answers, and keep the hidden states of harmless ones."""

    def __init__(self, options: CrispOptions, training: SFTConfig | DPOConfig) -> None:
        """Take the options; raise `InputError` for DPO, and with torch_compile, which does not run hooks."""
        check_cross_entropy("crisp", training)
        check_not_compiled("crisp", training)
        self._options = options
        self.features: dict[int, list[int]] = {}
        "Layer -> chosen latents, best first."
        self._usual: dict[int, float] = {}

    def prepare(self, trainer: Any, plan: TrainingPlan, source: TrainingSource) -> None:
        """Choose the features; raise `InputError` if the SAEs or the data do not serve."""
        data = UnlearningData.of("crisp", plan, source)
        fitter = FeatureFitter(data.saes)
        data.fit(trainer.model, fitter, list(data.saes))
        self.saes, stats = fitter.saes, fitter.result()
        n, ratio = self._options.crisp_features, self._options.crisp_ratio
        chosen = {layer: salient_features(stats, layer, n, ratio) for layer in data.saes}
        if (seed := self._options.crisp_control_seed) is not None:
            chosen = {layer: random_features(stats, layer, len(ids), seed) for layer, ids in chosen.items()}
        self.features = {layer: ids for layer, ids in chosen.items() if ids}
        if not self.features:
            raise InputError(
                f"loss is crisp, but no SAE feature is {ratio:g} times more active in harmful answers than in harmless "
                "ones;\ncheck the data, choose a smaller --crisp_ratio, or use SAEs of other layers"
            )
        for layer, ids in self.features.items():
            _, harmful = stats.pair("prompt", layer)
            self._usual[layer] = harmful.mean[ids].sum().item()
        self._forget, self._retain = data.forget, data.retain
        size, seed = trainer.args.per_device_train_batch_size, trainer.args.seed
        self._forgotten = SideBatches(len(data.forget), size, seed)
        self._retained = SideBatches(len(data.retain), size, seed)
        say(f"    crisp: {', '.join(f'{len(ids)} features in layer {layer}' for layer, ids in self.features.items())}")

    def begin(self, trainer: Any) -> None:
        """Do nothing."""

    def __call__(self, step: LossStep) -> Tensor:
        """Return the loss, and log its terms."""
        turn, model = self._forgotten.turn(step.trainer), step.trainer.accelerator.unwrap_model(step.model)
        retained = [self._retain[i] for i in self._retained.indices(turn)]
        layers = sorted({*self.features, len(decoder_layers(model)) - 1})
        with frozen(model):
            kept = answer_states(model, layers, retained)
        now = answer_states(model, layers, retained)
        changes = [(now[layer] - kept[layer]).square().mean() / kept[layer].square().mean() for layer in layers]
        states = answer_states(model, list(self.features), [self._forget[i] for i in self._forgotten.indices(turn)])
        active = [self._activity(layer, states[layer]) for layer in self.features]
        suppress, retain = (torch.stack([each.to(step.loss) for each in terms]).mean() for terms in (active, changes))
        step.log("crisp_active", suppress)
        step.log("crisp_retain", retain)
        return step.batch_share * (suppress + self._options.crisp_retain_weight * retain)

    def _activity(self, layer: int, hidden_TD: Tensor) -> Tensor:
        """Return the chosen features' mean sum of activations, over what it is in the frozen model. ()"""
        return activations(self.saes[layer], hidden_TD, self.features[layer]).sum(1).mean() / self._usual[layer]


def activations(sae: ResidualSAE, hidden_TD: Tensor, features: list[int]) -> Tensor:
    """Return the activations of some latents, with gradients to the hidden states. (T, K)"""
    return sae.sae.encode(hidden_TD.to(sae.sae.W_dec.device))[:, features]


def salient_features(stats: TokenStats, layer: int, n: int, ratio: float) -> list[int]:
    """Return up to n latents that are active more often on the unaligned side, `ratio` times as much, best first."""
    aligned, unaligned = stats.pair("prompt", layer)
    more_often_F = unaligned.rate - aligned.rate
    is_salient_F = (more_often_F > 0) & (unaligned.mean >= ratio * aligned.mean)
    order_F = more_often_F.argsort(descending=True, stable=True)
    return order_F[is_salient_F[order_F]][:n].tolist()


def random_features(stats: TokenStats, layer: int, n: int, seed: int) -> list[int]:
    """Return n latents drawn from those that are active on the unaligned side."""
    _, unaligned = stats.pair("prompt", layer)
    active = unaligned.mean.nonzero()[:, 0]
    return active[torch.randperm(len(active), generator=torch.Generator().manual_seed(seed))][:n].tolist()
