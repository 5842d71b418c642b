# %% [markdown]
# # A tour of SAILS on the testbed
#
# This tour discovers features, inspects them and steers the model with them. Then it initializes an adapter in the
# subspace they span, trains it, and shows what changed. Run it as a script (about a minute on two cores)
#
#     python recipes/tour.py
#
# or cell by cell in an editor that supports `# %%` cells. Each step ends with what to notice (`->`), computed from the
# results of this run. Pictures and numbers are saved in `runs/tour`. docs/testbed.md describes the testbed.

# %%
"""A tour of the method on the testbed: discover, inspect, steer, initialize, train, compare.

python recipes/tour.py --seed 1

<output_dir>/tour.json     the numbers
<output_dir>/steering.svg  the effect of steering, by strength
<output_dir>/run/          the run directory of the training, as of recipes/sft_sails.py
"""

import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize
from transformers import logging

from sails_align.cli import features as explaining
from sails_align.core.errors import CommandParser, exit_on_input_error
from sails_align.core.files import output_folder, write_json
from sails_align.core.tables import FittedTable
from sails_align.evaluation.metrics import SAFE
from sails_align.initializers.random_basis import random_basis
from sails_align.models.hooks import edited
from sails_align.models.load import load_causal_lm, load_model
from sails_align.models.resolve import resolve_model
from sails_align.reporting.drawing import GREY, Picture, ink, legend
from sails_align.saes.explain import Context, meanings
from sails_align.steering.ablate import remove
from sails_align.subspace.concepts import last_token_states
from sails_align.testbed import prompts as requests
from sails_align.testbed.lexicon import BENIGN_THEMES, HARM_THEMES, SHARED_BENIGN, SHARED_HARM
from sails_align.training import run as align
from sails_align.training.earlier import check_folder
from sails_align.training.features import texts_of
from sails_align.training.subspace import find_subspace, saes_of
from sails_align.training.trainer import build_trainer

logging.disable_progress_bar()
disable_progress_bars()
torch.set_num_threads(1)  # the model is tiny: threads would wait for each other
N_VALIDATION, N_TEST = 32, 64
"""Prompts of each of the four sets: to choose a steering strength, and to report."""
N_DRAWS = 5
"""Number of random directions, and of random subspaces, that each control averages over."""
STRENGTHS = (-1.0, -0.8, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Norms of the added direction, as shares of the mean norm of the residual stream at that layer."""
console = Console(highlight=False)
tour: dict[str, Any] = {}

parser = CommandParser(
    description="Run the whole method on the testbed: discover, inspect, steer, initialize, train, compare."
)
parser.add_argument("--seed", type=int, default=0, help="seed of the data and the training (default 0)")
parser.add_argument("--output_dir", type=Path, default=Path("runs/tour"), help="output folder (default runs/tour)")
with exit_on_input_error():
    given = parser.parse_args([] if "ipykernel" in sys.modules else None)
    options = ["--seed", str(given.seed), "--output_dir", str(given.output_dir / "run"), "--disable_tqdm", "true"]
    options += ["--max_train_examples", "256", "--eval_examples", str(N_TEST), "--save_strategy", "no"]
    options += ["--logging_steps", "64"]
    args = align.parse("sft", options, prog="recipes/tour.py")
    with output_folder(given.output_dir):
        args, testbed = align.resolved(args)
        source = align.load_source(args, testbed)
        check_folder(args, source, given.output_dir / "run")
assert testbed is not None
bed, world = testbed, testbed.world


def notice(text: str) -> None:
    """Print what a person should notice."""
    console.print(f"-> {text}\n", style="bold", soft_wrap=True)


def percent(value: float) -> str:
    """Return a share as it is printed."""
    return f"{100 * value:.0f}%"


# %% [markdown]
# ## 1. Discover
#
# The model reads harmful and harmless requests, and the SAEs turn its residual stream into features. In each layer, the
# features that differ most between the two are kept. PCA reduces their decoder vectors to a few directions.

# %%
subspace = find_subspace(args, source, given.output_dir / "run" / "subspace")
onset = subspace.onset
assert onset is not None
about = subspace.provenance["features"]["layers"][str(onset)]
headings = ("feature", "delta", "active in harmless requests", "active in harmful requests")
title = (
    f"layer {onset}: {len(about['ids'])} features -> {subspace.bases[onset].shape[1]} PCA directions; the best features"
)
table = FittedTable(title, headings)
for of in [row for row in subspace.feature_rows() if (row["layer"], row["used_by"]) == (onset, "readers")][:10]:
    table.add_row(str(of["id"]), f"{of['delta']:+.3f}", percent(of["rate_aligned"]), percent(of["rate_unaligned"]))
console.print(table)
separations = {int(layer): value for layer, value in subspace.provenance["separation"].items()}
best = about["ids"][0]
tour["discovered"] = {
    "onset": onset,
    "separation": separations,
    "n_directions": {layer: basis_DR.shape[1] for layer, basis_DR in subspace.bases.items()},
    "best_feature": best,
}
apart = ", ".join(f"{value:.1f} at layer {layer}" for layer, value in separations.items())
notice(
    f"Harmful and harmless requests are {apart} standard deviations apart. From layer {onset} on (the onset) the model "
    f"separates them almost as well as in its best layer. Feature {best} of that layer is active in "
    f"{percent(about['rate_unaligned'][0])} of harmful requests and {percent(about['rate_aligned'][0])} of harmless "
    "ones."
)

# %% [markdown]
# ## 2. Inspect the features
#
# Two things show the meaning of a feature: the words that its decoder direction promotes (the logit lens), and the
# texts in which it is active. The testbed knows which words describe harm.

# %%
base: Any = load_causal_lm(source.model_name, dtype=torch.float32)
saes = saes_of(args, source)
HARM_WORDS = {word for theme in HARM_THEMES.values() for word in theme} | set(SHARED_HARM)
HARM_WORDS -= {word for theme in BENIGN_THEMES.values() for word in theme} | set(SHARED_BENIGN)
texts = list(texts_of(source, 128, args.training.max_length or 1024))
told = meanings(base, source.tokenizer, saes, {onset: about["ids"][:6]}, texts)
headings = ("feature", "promotes", "text with the highest activation, up to that token")
table = FittedTable(f"the features of layer {onset} with the highest scores", headings, n_texts=3)


def up_to_peak(context: Context) -> str:
    """Return a text up to the token with the highest activation."""
    end = context.activations.index(max(context.activations)) + 1
    return " ".join(token.strip() for token in context.tokens[:end])


for meaning in told:
    table.add_row(str(meaning.id), " ".join(meaning.promoted), up_to_peak(meaning.contexts[0]))
console.print(table)
n_harm = {meaning.id: len(HARM_WORDS & {word.strip() for word in meaning.promoted}) for meaning in told}
tour["harm_words_promoted"] = n_harm
notice(
    f"Harm words among the six that each promotes: {', '.join(f'{n} (feature {of})' for of, n in n_harm.items())}. "
    f"For {sum(n >= 3 for n in n_harm.values())} of these {len(told)} features, at least half of the words are harm "
    "words."
)

# %% [markdown]
# ## 3. Steer with them
#
# Steering adds a multiple of a feature's decoder direction to the residual stream at its layer while the model answers.
# The base answers everything except requests that need hands ("please split the lamp for me"). So the tour tries two
# kinds of features: the best feature for harm, and in each layer the feature that best separates the requests that the
# base refuses from those it answers. A random direction of the same norm is the control.

# %%
HANDS = 128
rng = random.Random(f"tour {given.seed}")
dialogues = (item for item in world.pretraining_items(rng) if isinstance(item, tuple))
refused_prompts: list[str] = []
answered_prompts: list[str] = []
while min(len(refused_prompts), len(answered_prompts)) < HANDS:
    prompt, answer = next(dialogues)
    (refused_prompts if "can not" in answer else answered_prompts).append(prompt)


def states(prompts: Sequence[str]) -> dict[int, Tensor]:
    """Return hidden states of the base at the end of the prompts: layer -> (N, D)."""
    asked: Any = [[{"role": "user", "content": prompt}] for prompt in prompts[:HANDS]]
    return dict(last_token_states(base, source.tokenizer, list(saes), asked))


of_refused, of_answered = states(refused_prompts), states(answered_prompts)
norms = {layer: of_answered[layer].norm(dim=1).mean().item() for layer in saes}
directions = {f"harm, layer {onset}, feature {best}": (onset, saes[onset].W_dec_FD[best])}
for layer, sae in saes.items():
    difference = sae.encode(of_refused[layer]).mean(0) - sae.encode(of_answered[layer]).mean(0)
    feature = int(difference.argmax())
    directions[f"refusal, layer {layer}, feature {feature}"] = (layer, sae.W_dec_FD[feature])
draws = torch.randn(N_DRAWS, base.config.hidden_size, generator=torch.Generator().manual_seed(given.seed))


def shares(judged: Sequence[dict[str, Any]], *splits: str) -> dict[str, float]:
    """Return shares of the answers to requests of some sets: refused, not helpful to a harmful request, correct."""
    rows = pandas.DataFrame([row for row in judged if row["split"] in splits])
    rows["not_helped"] = rows["score"].isna() | (rows["score"].astype(float) <= SAFE)
    return rows[["refused", "not_helped", "correct"]].mean().to_dict()


def answers(
    model: Any, editing: AbstractContextManager[None], part: str = "test", n: int = N_TEST
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return shares of refusals, unhelpful answers, correct answers and harm words; and the judged answers."""
    with editing:
        result = requests.measure(model, source.tokenizer, bed, n, part=part)
    judged = requests.judged_rows(result, world)
    of_harmful, of_harmless = shares(judged, *requests.HARMFUL), shares(judged, *requests.HARMLESS)
    told_of_harm = [
        bool(HARM_WORDS & set(row["response"].replace(".", "").split()))
        for row in judged
        if row["split"] in requests.HARMFUL
    ]
    numbers = {
        "harmful_refused": of_harmful["refused"],
        "harmful_not_helped": of_harmful["not_helped"],
        "harm_named": sum(told_of_harm) / len(told_of_harm),
        "harmless_refused": of_harmless["refused"],
        "harmless_correct": of_harmless["correct"],
    }
    return numbers, judged


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each share."""
    return pandas.DataFrame(rows).mean().to_dict()


def steered(layer: int, direction_D: Tensor, strength: float) -> AbstractContextManager[None]:
    """Add a direction to the base's residual stream within the block, at a share of the stream's norm."""
    added_D = strength * norms[layer] * normalize(direction_D, dim=0)
    return edited(base, {layer: lambda hidden_BSD: hidden_BSD + added_D.to(hidden_BSD)})


def on_validation(layer: int, direction_D: Tensor) -> dict[float, dict[str, float]]:
    """Return the shares by strength."""
    return {of: answers(base, steered(layer, direction_D, of), "validation", N_VALIDATION)[0] for of in STRENGTHS}


def selectivity(numbers: dict[str, float]) -> float:
    """Return the refusal rate of harmful requests minus that of harmless ones."""
    return numbers["harmful_refused"] - numbers["harmless_refused"]


unsteered = answers(base, nullcontext(), "validation", N_VALIDATION)[0]
sweep = {name: on_validation(*where) for name, where in directions.items()}
chosen = max(sweep, key=lambda name: max(map(selectivity, sweep[name].values())))
strength = max(STRENGTHS, key=lambda strength: selectivity(sweep[chosen][strength]))
layer = directions[chosen][0]
control = f"random, layer {layer}"
sweep[control] = on_validation(layer, draws[0])

# %% [markdown]
# Direction and strength were chosen on validation prompts, by the refusal rate of harmful requests minus that of
# harmless ones. The table is for test prompts.

# %%
COLUMNS = {
    "harmful_refused": "harmful refused",
    "harmful_not_helped": "harmful not helped",
    "harm_named": "answers with harm words",
    "harmless_refused": "harmless refused",
    "harmless_correct": "harmless correct",
}


def table_of(rows: dict[str, dict[str, float]], title: str) -> FittedTable:
    """Show the shares, a row for each model."""
    table = FittedTable(title, ("", *COLUMNS.values()))
    for name, numbers in rows.items():
        table.add_row(name, *(percent(numbers[column]) for column in COLUMNS))
    return table


harm_feature = next(iter(directions))
plain, plain_judged = answers(base, nullcontext())
with_it, with_it_judged = answers(base, steered(*directions[chosen], strength))
by_control = mean_of([answers(base, steered(layer, draw, strength))[0] for draw in draws])
less, more = (answers(base, steered(*directions[harm_feature], of))[0] for of in (-0.4, 0.4))
rows = {
    "not steered": plain,
    f"{chosen}, {strength:+}": with_it,
    f"{control}, {strength:+} (mean of {N_DRAWS})": by_control,
    f"{harm_feature}, -0.4": less,
    f"{harm_feature}, +0.4": more,
}
console.print(table_of(rows, f"steering the base: {2 * N_TEST} harmful and {2 * N_TEST} harmless test requests"))
tour["steering"] = {
    "validation": {name: {str(of): numbers for of, numbers in found.items()} for name, found in sweep.items()},
    "unsteered_validation": unsteered,
    "chosen": chosen,
    "strength": strength,
    "control": control,
    "test": rows,
}
worth, worth_plain = ((of["harmful_not_helped"] + of["harmless_correct"]) / 2 for of in (with_it, plain))
notice(
    f"With {chosen} added at {strength:+} of the residual stream's norm, the model refuses "
    f"{percent(with_it['harmful_refused'])} of harmful requests and {percent(with_it['harmless_refused'])} of harmless "
    f"ones. With random directions of the same norm it refuses {percent(by_control['harmful_refused'])} and "
    f"{percent(by_control['harmless_refused'])}. Correct answers to harmless requests: "
    f"{percent(plain['harmless_correct'])} without steering, {percent(with_it['harmless_correct'])} with it, "
    f"{percent(by_control['harmless_correct'])} with random directions. By the mean of harmful requests not helped "
    f"with and harmless requests answered correctly, this is {'better' if worth > worth_plain else 'no better'} "
    f"than no steering ({percent(worth)} against {percent(worth_plain)})."
)
notice(
    f"With the feature for harm subtracted, {percent(less['harmful_refused'])} of harmful requests are refused, and "
    f"with it added {percent(more['harmful_refused'])}. It changes the content of answers: "
    f"{percent(less['harm_named'])} and {percent(more['harm_named'])} of them contain harm words (without "
    f"steering {percent(plain['harm_named'])})."
)


def draw(figure: Figure) -> None:
    """Draw a panel for each direction: shares by strength. Black and grey are not the colours of any method."""
    shown = {
        "harmful_refused": ("harmful refused, better ↑", dict(color=ink(), linestyle="-", marker="o")),
        "harmless_refused": ("harmless refused, better ↓", dict(color=ink(), linestyle="--", marker="v", mfc="none")),
        "harmless_correct": ("harmless correct, better ↑", dict(color=GREY, linestyle=":", marker="s")),
    }
    panels = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(panels, (harm_feature, chosen, control), strict=True):
        found = dict(sorted({0.0: unsteered, **sweep[name]}.items()))
        for column, (label, look) in shown.items():
            values = [100 * numbers[column] for numbers in found.values()]
            axes.plot(list(found), values, **look, markersize=5, label=label, clip_on=False)
        axes.set_title(name, fontsize=9, pad=8)
        axes.grid(visible=True)
    panels[0].set_ylim(0, 100)
    panels[0].set_ylabel("share of requests (%)", fontsize=9)
    figure.supxlabel("added norm, as a share of the residual stream's norm", fontsize=9)
    legend(figure, panels, loc="outside upper center", ncols=3)


Picture("steering", "Refusals and correct answers by strength of steering", (10.0, 3.4), draw).write(given.output_dir)
console.print(f"picture   {given.output_dir}/steering.svg\n", soft_wrap=True)

# %% [markdown]
# ## 4. Initialize
#
# LoRA adapters take the subspace's directions: as rows of `lora_A` in modules that read the residual stream, and as
# columns of `lora_B` in modules that write to it. The other factor is zero, so nothing changes yet. (If the subspace
# has fewer directions than the rank, random ones orthogonal to it are added.)

# %%
built = build_trainer(args, source, subspace)
trainer, init = built.trainer, built.init
assert init is not None
adapted: Any = trainer.model
asked = source.tokenizer([row["prompt"] for row in plain_judged], return_tensors="pt", padding=True)
with torch.no_grad():
    first = (adapted.eval()(**asked).logits - base.eval()(**asked).logits).abs().max().item()
    in_span, n_filled = sum(of.n_directions for of in init.modules), sum(of.rank for of in init.modules)
    delta = max(adapted.get_submodule(of.name).get_delta_weight("default").abs().max().item() for of in init.modules)
n_trainable, n_all = align.count_parameters(adapted)
tour["initialized"] = {
    "largest_logit_difference": first,
    "largest_delta_weight": delta,
    "n_modules": len(init.modules),
    "trainable_parameters": n_trainable,
}
notice(
    f"The first forward pass is {'exactly' if first == 0 else 'not'} the base's: over {len(plain_judged)} prompts the "
    f"largest difference of logits is {first:g}; the largest entry of B A is {delta:g}. {len(init.modules)} modules "
    f"have adapters; {in_span} of their {n_filled} directions are from the subspace. {n_trainable:,} of {n_all:,} "
    "parameters are trainable."
)
del trainer, adapted

# %% [markdown]
# ## 5. Train
#
# This runs the recipe `recipes/sft_sails.py` on 256 harmful requests with refusals and 256 harmless ones with correct
# answers. It finds the subspace of step 1 in its folder and uses it.

# %%
with exit_on_input_error():
    metrics = align.main("sft", options)
before, after = metrics["base"], metrics["trained"]
tour["trained"] = {"base": before, "trained": after, "seconds": metrics["cost"]["seconds"]}
safer = after["safety_rate"]["value"] - before["safety_rate"]["value"]
gained = after["correct_answer_rate"]["value"] - before["correct_answer_rate"]["value"]
notice(
    f"Training changed the safety rate by {100 * safer:+.0f} points and correct answers by {100 * gained:+.0f}. "
    f"Steering (step 3) changed them by "
    f"{100 * (with_it['harmful_not_helped'] - plain['harmful_not_helped']):+.0f} and "
    f"{100 * (with_it['harmless_correct'] - plain['harmless_correct']):+.0f}."
)

# %% [markdown]
# ## 6. Compare
#
# This step shows the features before and after training, how far the adapter left the subspace, and some answers side
# by side. It also tests whether the trained model's refusals depend on the initial directions of the adapters: it
# removes these from the residual stream, and, for comparison, as many random ones.

# %%
found = explaining.main(["--run", str(given.output_dir / "run"), "--n_texts", "128"])
drift = metrics["drift"]
changed = {
    feature["id"]: feature["harmful_after"] - feature["harmful_before"]
    for feature in found["layers"][str(max(saes))]["features"]
}
most = max(changed, key=lambda feature: abs(changed[feature]))
tour["changed"] = {"drift": drift, "layer": max(saes), "activation_on_harmful": changed}
notice(
    f"{percent(drift['adapter_energy_inside'])} of the adapter's update lies in the subspace; its directions turned by "
    f"at most {drift['adapter_largest_angle'] * 180 / torch.pi:.0f} degrees. Of the listed features of layer "
    f"{max(saes)}, the activation of feature {most} on harmful requests changed most, by {changed[most]:+.2f}."
)

# %%
trained: Any = load_model(resolve_model(str(given.output_dir / "run")))
rank = args.model.lora_r
deep = {layer: basis_DR[:, :rank] for layer, basis_DR in subspace.bases.items() if layer >= onset}


def removed(model: Any, bases: Mapping[int, Tensor]) -> AbstractContextManager[None]:
    """Take a subspace out of the residual stream within the block."""
    return edited(model, {layer: partial(remove, basis_DR) for layer, basis_DR in bases.items()})


others = [random_basis(base.config.hidden_size, list(deep), rank, seed, provenance={}).bases for seed in range(N_DRAWS)]
now, now_judged = answers(trained, nullcontext())
without = {
    "base": plain,
    "base, subspace removed": answers(base, removed(base, deep))[0],
    "trained": now,
    "trained, subspace removed": answers(trained, removed(trained, deep))[0],
    f"trained, random directions removed (mean of {N_DRAWS})": mean_of(
        [answers(trained, removed(trained, bases))[0] for bases in others]
    ),
}
n_out = ", ".join(f"{basis_DR.shape[1]} of {len(basis_DR)} at layer {layer}" for layer, basis_DR in deep.items())
console.print(table_of(without, f"directions removed from the residual stream ({n_out})"))
tour["ablation"] = without
subspace_out, random_out = list(without.values())[3:]
fall = now["harmful_refused"] - subspace_out["harmful_refused"]
random_fall = now["harmful_refused"] - random_out["harmful_refused"]
notice(
    f"The trained model refuses {percent(now['harmful_refused'])} of harmful requests; with the subspace removed "
    f"{percent(subspace_out['harmful_refused'])}; with as many random directions removed "
    f"{percent(random_out['harmful_refused'])}. Its refusals "
    f"{'depend' if fall > random_fall + 0.05 else 'do not depend'} on the subspace more than on random directions."
    f" Correct answers to harmless requests: {percent(now['harmless_correct'])}, "
    f"{percent(subspace_out['harmless_correct'])} and {percent(random_out['harmless_correct'])}."
)

# %%
title = "answers of the base, the steered base and the trained model to the same requests"
table = FittedTable(title, ("request", "base", "steered", "trained"), n_texts=4)
for split in (*requests.HARMFUL, *requests.HARMLESS):
    place = next(place for place, row in enumerate(plain_judged) if row["split"] == split)
    columns = (plain_judged[place], with_it_judged[place], now_judged[place])
    table.add_row(f"{plain_judged[place]['prompt']} ({split})", *(row["response"] for row in columns))
console.print(table)
table = FittedTable(
    f"base -> trained on the four test sets, {N_TEST} requests each", ("set", "refused", "not helped", "correct")
)
by_set = {
    split: [shares(judged, split) for judged in (plain_judged, now_judged)]
    for split in (*requests.HARMFUL, *requests.HARMLESS)
}
for split, (of_base, of_trained) in by_set.items():
    table.add_row(split, *(f"{percent(of_base[name])} -> {percent(of_trained[name])}" for name in of_base))
console.print(table)
tour["by_set"] = by_set
notice(
    f"The trained model refuses {percent(by_set['harmful'][1]['refused'])} of harmful requests in trained categories "
    f"and {percent(by_set['ood'][1]['refused'])} in held-out categories. Of harmless requests it refuses "
    f"{percent(by_set['benign'][1]['refused'])} about harmless objects and {percent(by_set['dual_use'][1]['refused'])} "
    "about dual-use objects."
)
write_json(given.output_dir / "tour.json", tour)
console.print(f"numbers   {given.output_dir}/tour.json", soft_wrap=True, markup=False)
