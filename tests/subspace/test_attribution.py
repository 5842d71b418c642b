"""Effects are what a removed latent costs the margin: exactly in a linear model, to first order in any."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tiny import Project, make_project
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sails_align.core.errors import InputError
from sails_align.models.hooks import capture_with_graph, decoder_layers, edited
from sails_align.saes.load import residual_sae
from sails_align.subspace.attribution import EffectFitter, attribute, states_and_gradients
from sails_align.subspace.basis import Subspace
from sails_align.subspace.inputs import DiscoveryData, margin_data
from sails_align.subspace.margin import SIGNS, BegunResponse, margin_term
from sails_align.subspace.options import DiscoveryOptions
from sails_align.subspace.selection import FeatureFitter, select_features
from sails_align.subspace.statistics import TokenStats
from sails_align.training import run as align
from sails_align.training.dataset import TrainingSource
from sails_align.training.plan import TrainingPlan
from sails_align.training.subspace import find_subspace, saes_of

D, F, VOCABULARY, YES, NO = 10, 14, 30, 28, 29
CONTRASTS = ("prompt", "response")


class Dictionary:
    """Latents in float64; `W_dec_FD` is all that a test may want to choose."""

    info = SimpleNamespace(d_sae=F)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.W_enc_DF, self.W_dec_FD = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((D, F), (F, D))
        )

    def encode(self, hidden_TD: Tensor) -> Tensor:
        return (hidden_TD.double() @ self.W_enc_DF).relu()

    def decode_gradient(self, acts_TF: Tensor, gradient_TD: Tensor) -> Tensor:
        return gradient_TD.double() @ self.W_dec_FD.T


class LinearBlock(nn.Module):
    """Mixes dimensions, and each token with the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.mixed = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        counts_S = torch.arange(1, hidden_BSD.shape[1] + 1, dtype=hidden_BSD.dtype)
        return hidden_BSD + self.own(hidden_BSD) + self.mixed(hidden_BSD.cumsum(1) / counts_S[:, None])


class LinearModel(nn.Module):
    """A causal language model whose logits are linear in every hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(LinearBlock() for _ in range(3))
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor, use_cache: bool) -> Any:
        hidden_BSD = self.embed(input_ids)
        for block in self.layers:
            hidden_BSD = block(hidden_BSD)
        return SimpleNamespace(logits=self.head(hidden_BSD[:, logits_to_keep]))


@pytest.fixture(scope="module")
def linear() -> LinearModel:
    torch.manual_seed(1)
    return LinearModel().double()


def sequence(rng: random.Random, answer: list[int], n_looked_at: int = 3, vocabulary: int = 28) -> BegunResponse:
    """A random prompt with a response; the last tokens of the prompt are looked at."""
    prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(n_looked_at, 9))]
    length, n = len(prompt) + len(answer), len(prompt)
    asked = [n - n_looked_at <= place < n for place in range(length)]
    begun = [place >= n for place in range(length)]
    return BegunResponse(prompt + answer, begun, {"prompt": asked, "response": begun})


def sides_of(n: int, seed: int = 0, chosen: list[int] | None = None, rejected: list[int] | None = None, **how: Any):
    """The same prompts with two responses; by default of one token, so that the margin is linear in the logits."""
    answers = {"aligned": chosen or [YES], "unaligned": rejected or [NO]}
    return {
        side: [sequence(random.Random(f"{seed} {i}"), answer, **how) for i in range(n)]
        for side, answer in answers.items()
    }


def effects(model: nn.Module, sides: dict[str, list[BegunResponse]], saes: dict[int, Any], **options: Any):
    fitter = EffectFitter(saes)
    attribute(model, sides, CONTRASTS, fitter, list(saes), **options)
    return fitter.result()


def effect_of(stats: TokenStats, layer: int, contrast: str = "prompt") -> Tensor:
    return sum((term.mean for term in stats.pair(contrast, layer)), torch.zeros(()))


def margins(model: nn.Module, sides: dict[str, list[BegunResponse]], changed: Callable[[BegunResponse], Any]) -> float:
    """The mean margin, one sequence at a time, with a model changed for each."""
    total = 0.0
    for side, sequences in sides.items():
        for one in sequences:
            with torch.no_grad(), changed(one):
                total += margin_term(model, [one], SIGNS[side]).item() / len(sequences)
    return total


def acts_of(model: nn.Module, layer: int, sae: Any, one: BegunResponse) -> Tensor:
    with torch.no_grad(), capture_with_graph(model, [layer]) as hidden_states:
        margin_term(model, [one], 1.0)
    return sae.encode(hidden_states[layer].detach()[0]) * torch.tensor(one.looked_at["prompt"])[:, None]


def without(model: nn.Module, layer: int, sae: Any, latent: int, share: float, one: BegunResponse):
    """Take a share of a latent's contribution out of the tokens that are looked at."""
    acts_SF = acts_of(model, layer, sae, one)
    removed_SD = share * torch.outer(acts_SF[:, latent], sae.W_dec_FD[latent])
    return edited(model, {layer: lambda hidden_BSD: hidden_BSD - removed_SD})


def test_in_a_linear_model_it_is_exactly_what_removing_the_latent_costs(linear: LinearModel):
    sides, saes = sides_of(6), {0: Dictionary(0), 1: Dictionary(1), 2: Dictionary(2)}
    stats = effects(linear, sides, saes)
    for layer, sae in saes.items():
        whole = margins(linear, sides, lambda one: edited(linear, {}))
        for latent in range(F):
            left = margins(linear, sides, partial(without, linear, layer, sae, latent, 1.0))
            assert effect_of(stats, layer)[latent].item() == pytest.approx(whole - left, abs=1e-10)
        assert effect_of(stats, layer).abs().max() > 0.01, "not all zero"


def test_in_a_linear_model_it_is_the_closed_form(linear: LinearModel):
    """At the last prompt token of the last block the margin's gradient is the difference of two rows of the head."""
    sides, sae = sides_of(5, n_looked_at=1), Dictionary(0)
    acts_BF = torch.stack([acts_of(linear, 2, sae, one)[-2] for one in sides["aligned"]])
    gradient_D = linear.head.weight[YES] - linear.head.weight[NO]
    expected_F = acts_BF.mean(0) * (sae.W_dec_FD @ gradient_D)
    assert torch.allclose(effect_of(effects(linear, sides, {2: sae}), 2), expected_F, atol=1e-10, rtol=0)


def test_a_latent_without_effect_ranks_last_though_it_differs_most(linear: LinearModel):
    """The control: by the difference of mean activations it ranks first."""
    sides, sae, idle = sides_of(8, n_looked_at=1), Dictionary(0), 3
    with torch.no_grad(), capture_with_graph(linear, [2]) as hidden_states:
        harmful = []
        for one in sides["aligned"]:
            margin_term(linear, [one], 1.0)
            harmful.append(hidden_states[2].detach()[0, -2])
    harmful_TD = torch.stack(harmful)
    gradient_D = nn.functional.normalize((linear.head.weight[YES] - linear.head.weight[NO]).detach(), dim=0)
    sae.W_dec_FD[idle] -= (sae.W_dec_FD[idle] @ gradient_D) * gradient_D  # written where the margin does not read
    sae.W_enc_DF[:, idle] = 20 * harmful_TD.mean(0)
    features = FeatureFitter({2: sae})
    features.update("prompt", "aligned", 2, torch.zeros_like(harmful_TD))
    features.update("prompt", "unaligned", 2, harmful_TD)
    options = {"contrast": "prompt", "top_k": F, "effects": effects(linear, sides, {2: sae})}
    by_difference = select_features(features.result(), score="mean_diff", **options).layers[2]
    by_effect = select_features(features.result(), score="attribution", **options).layers[2]
    assert by_difference.ids[0] == idle
    assert by_effect.ids[-1] == idle
    assert by_effect.score[-1] < 1e-10 < 0.01 < by_effect.score[0]
    assert by_effect.effect is not None
    assert torch.equal(by_effect.score, by_effect.effect.abs())


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    shape = {"hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, initializer_range=0.3, **shape)
    model = LlamaForCausalLM(config).double().eval()
    for block in decoder_layers(model):  # transformers' norms compute in float32
        block.input_layernorm, block.post_attention_layernorm = (nn.RMSNorm(D).double() for _ in range(2))
    model.model.norm = nn.RMSNorm(D).double()
    return model


LONG = {"chosen": [YES, 3, 4, 5], "rejected": [NO, 7]}


def test_in_a_real_model_it_is_the_derivative(llama: LlamaForCausalLM):
    """Against central differences in float64, with several tokens of the response in the margin."""
    sides, saes, step = sides_of(4, **LONG), {0: Dictionary(0), 1: Dictionary(1)}, 1e-5
    stats = effects(llama, sides, saes)
    for layer, sae in saes.items():
        found_F = effect_of(stats, layer)
        for latent in range(0, F, 3):
            more, less = (
                margins(llama, sides, partial(without, llama, layer, sae, latent, share)) for share in (-step, step)
            )
            assert found_F[latent].item() == pytest.approx((more - less) / (2 * step), abs=1e-7)
        assert found_F.abs().max() > 1e-3


def test_gradients_of_all_layers_are_those_of_each_alone(llama: LlamaForCausalLM):
    batch = sides_of(3, **LONG)["aligned"]
    together = states_and_gradients(llama, [0, 1, 2], batch, 1.0)
    for layer, (hidden_BSD, gradient_BSD) in together.items():
        alone = states_and_gradients(llama, [layer], batch, 1.0)[layer]
        assert torch.equal(hidden_BSD, alone[0])
        assert torch.allclose(gradient_BSD, alone[1], atol=1e-12)


def test_tokens_that_the_margin_does_not_depend_on_have_no_gradient(llama: LlamaForCausalLM):
    batch = sides_of(3, **LONG)["aligned"]
    (_, gradient_BSD) = states_and_gradients(llama, [1], batch, 1.0)[1]
    for row, one in enumerate(batch):
        assert not gradient_BSD[row, len(one.mask) - 1 :].any(), "the last scored token, and padding"
        assert gradient_BSD[row, len(one.mask) - 2].any()


@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(1, 5), max_tokens=st.integers(1, 60), order=st.randoms(use_true_random=False))
def test_batching_and_order_change_nothing(llama: LlamaForCausalLM, batch_size: int, max_tokens: int, order) -> None:
    sides, saes = sides_of(5, **LONG), {1: Dictionary(1)}
    expected = effects(llama, sides, saes)
    for sequences in sides.values():
        order.shuffle(sequences)
    found = effects(llama, sides, saes, batch_size=batch_size, max_tokens_per_batch=max_tokens)
    for key, sums in expected.sums.items():
        assert sums.n_tokens == found.sums[key].n_tokens == 5
        assert torch.allclose(sums.sum, found.sums[key].sum, atol=1e-10)


def test_shares_of_the_requests_add_up(llama: LlamaForCausalLM):
    sides, saes = sides_of(5, **LONG), {1: Dictionary(1)}
    parts = [{side: of[start::2] for side, of in sides.items()} for start in (0, 1)]
    whole, added = effects(llama, sides, saes), effects(llama, parts[0], saes) + effects(llama, parts[1], saes)
    assert torch.allclose(effect_of(whole, 1), effect_of(added, 1), atol=1e-10)


def test_low_precision_models_are_summed_in_float32(llama: LlamaForCausalLM):
    class Strict(Dictionary):
        def encode(self, hidden_TD: Tensor) -> Tensor:
            assert hidden_TD.dtype == torch.float32
            return super().encode(hidden_TD)

        def decode_gradient(self, acts_TF: Tensor, gradient_TD: Tensor) -> Tensor:
            assert gradient_TD.dtype == torch.float32
            return super().decode_gradient(acts_TF, gradient_TD)

    half = LlamaForCausalLM(llama.config)
    half.load_state_dict(llama.state_dict())
    sides = sides_of(6, **LONG)
    exact_F = effect_of(effects(llama, sides, {1: Dictionary(1)}), 1)
    found_F = effect_of(effects(half.bfloat16(), sides, {1: Strict(1)}), 1)
    assert (found_F - exact_F).norm() < 0.1 * exact_F.norm()
    assert found_F.dtype == torch.float64


def test_the_model_is_left_as_it_was(llama: LlamaForCausalLM):
    hooks = [dict(block._forward_hooks) for block in decoder_layers(llama)]
    frozen = llama.lm_head.weight.requires_grad_(False)
    llama.train()
    effects(llama, sides_of(2), {1: Dictionary(1)})
    assert llama.training
    llama.eval()
    assert [parameter.requires_grad for parameter in llama.parameters()].count(False) == 1
    frozen.requires_grad_(True)
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert [dict(block._forward_hooks) for block in decoder_layers(llama)] == hooks


def test_a_side_without_a_response_is_refused(llama: LlamaForCausalLM):
    sides = {**sides_of(2), "unaligned": [BegunResponse([], [], {})]}
    with pytest.raises(InputError, match=r"no unaligned response .* within max_length"):
        effects(llama, sides, {1: Dictionary(1)})


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_the_gradient_of_an_sae_s_decoder(kind: str, normalize: str):
    """With inputs normalized by token, the decoder's directions are scaled by token, too."""
    torch.manual_seed(0)
    common = {"d_in": D, "d_sae": F, "normalize_activations": normalize}
    common["metadata"] = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    made = StandardSAE(StandardSAEConfig(**common)) if kind == "standard" else TopKSAE(TopKSAEConfig(k=4, **common))
    nn.init.normal_(made.W_dec)
    sae = residual_sae("random", made)
    hidden_TD, gradient_TD, latent = 5 * torch.randn(6, D) + 1, torch.randn(6, D), 2
    found_TF = sae.decode_gradient(acts_TF := sae.encode(hidden_TD), gradient_TD)
    if normalize == "none":
        assert torch.allclose(found_TF, gradient_TD @ sae.W_dec_FD.T, atol=1e-5)
    sae.encode(hidden_TD)
    decoded_TD = sae.decode(acts_TF)
    sae.encode(hidden_TD)
    with_more_TD = sae.decode(acts_TF + nn.functional.one_hot(torch.tensor(latent), F))
    assert torch.allclose(found_TF[:, latent], ((with_more_TD - decoded_TD) * gradient_TD).sum(1), atol=1e-3)


# The whole of discovery


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("attribution"))


def subspace_of(argv: list[str]) -> tuple[Subspace, TrainingPlan, TrainingSource]:
    """Find a subspace as the training with these options does."""
    args, testbed = align.resolved(align.parse("sft", argv))
    source = align.load_source(args, testbed)
    return find_subspace(args, source, Path(str(args.training.output_dir)) / "subspace"), args, source


def found(project: Project, folder: Path, *more: str) -> Subspace:
    return subspace_of(project.argv(folder, "--score", "attribution", *more))[0]


def test_discovery_repeats_itself_and_is_kept(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, again = found(project, tmp_path / "a"), found(project, tmp_path / "b")
    assert first.provenance["features"] == again.provenance["features"]
    assert first.provenance["features"]["score"] == first.provenance["options"]["score"] == "attribution"
    for row in first.feature_rows():
        assert row["score"] == abs(row["effect"])
    for layer, basis_DR in first.bases.items():
        assert torch.equal(basis_DR, again.bases[layer])
    capsys.readouterr()
    kept = found(project, tmp_path / "a")
    assert "discovery is skipped" in capsys.readouterr().err
    assert kept.provenance["features"] == first.provenance["features"]


def test_another_score_is_another_subspace(project: Project, tmp_path: Path):
    found(project, tmp_path)
    with pytest.raises(InputError, match="score"):
        subspace_of(project.argv(tmp_path))


def test_directions_point_to_what_makes_refusal_likelier(project: Project, tmp_path: Path):
    subspace, args, source = subspace_of(project.argv(tmp_path, "--score", "attribution", "--top_k", "4"))
    saes = saes_of(args, source)
    assert subspace.writers is not None
    for layer, basis_DR in subspace.writers.items():
        of = subspace.provenance["writers"]["features"]["layers"][str(layer)]
        rows_KD = nn.functional.normalize(saes[layer].W_dec_FD[of["ids"]], dim=1)
        assert (basis_DR.T @ rows_KD.T @ torch.tensor(of["effect"]) >= -1e-6).all()


@pytest.mark.parametrize("contrast", ["response", "both"])
def test_one_sae_at_a_time(project: Project, tmp_path: Path, contrast: str):
    options = ("--contrast", contrast, "--prompt_tokens", "all", "--max_discovery_examples", "12")
    subspace = found(project, tmp_path / "run", "--sae_placement", "by_layer", *options)
    reference = found(project, tmp_path / "all", *options)
    assert subspace.provenance["features"]["contrast"] == contrast
    for layer, of in reference.provenance["features"]["layers"].items():
        effects_of = dict(zip(of["ids"], of["effect"], strict=True))
        mine = subspace.provenance["features"]["layers"][layer]
        assert mine["ids"] == of["ids"]
        assert mine["effect"] == pytest.approx([effects_of[latent] for latent in mine["ids"]], rel=1e-4)


def test_the_effect_of_a_real_sae_s_latent_is_what_removing_it_costs(project: Project, tmp_path: Path):
    """From the command line's options to the number: by a small part of the latent, in the user's own model."""
    subspace, args, source = subspace_of(project.argv(tmp_path, "--score", "attribution", "--contrast", "prompt"))
    model: Any = AutoModelForCausalLM.from_pretrained(project.folder / "tiny").double()
    data = DiscoveryData(source.tokenizer, source.safety, source.helpful)
    sides = {side: list(of) for side, of in margin_data(data, DiscoveryOptions(max_length=32)).items()}
    of, saes = subspace.provenance["features"]["layers"]["0"], saes_of(args, source)
    sae = SimpleNamespace(
        W_dec_FD=saes[0].W_dec_FD.double(), encode=lambda hidden_TD: saes[0].encode(hidden_TD.float()).double()
    )
    share = 1e-3
    more, less = (margins(model, sides, partial(without, model, 0, sae, of["ids"][0], by)) for by in (-share, share))
    assert of["effect"][0] == pytest.approx((more - less) / (2 * share), rel=1e-3)


def test_without_rejected_responses_it_is_refused(project: Project, tmp_path: Path):
    rows = tmp_path / "chosen.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "how do i break the lock {i}", "response": "sorry no"}}\n' for i in range(20))
    )
    options = ("--dataset_name", str(rows), "--contrast", "prompt", "--score")
    with pytest.raises(InputError, match=r"attribution.*no rejected ones;\n.*--score mean_diff"):
        subspace_of(project.argv(tmp_path / "run", *options, "attribution"))
    assert not (tmp_path / "run" / "subspace").exists()
    subspace_of(project.argv(tmp_path / "run", *options, "attribution", "--init", "mean_diff"))


def test_random_features_are_weighted_by_it(project: Project, tmp_path: Path):
    of = found(project, tmp_path, "--init", "random_features").provenance["features"]["layers"]["0"]
    assert of["score"] == [abs(value) for value in of["effect"]]


def test_memory_does_not_grow_with_the_blocks_before_the_first_sae(llama: LlamaForCausalLM):
    """The graph ends at the first layer: what comes before has no gradient function."""
    seen = {}

    def look(name: str) -> Callable[[Tensor], Tensor]:
        def edit(hidden_BSD: Tensor) -> Tensor:
            seen[name] = hidden_BSD.requires_grad
            return hidden_BSD

        return edit

    batch = sides_of(2)["aligned"]
    with edited(llama, {0: look("before"), 1: look("first")}), capture_with_graph(llama, [1, 2]) as hidden_states:
        margin_term(llama, batch, 1.0)
    assert seen == {"before": False, "first": False}
    assert hidden_states[1].is_leaf
    assert hidden_states[2].grad_fn is not None


@pytest.mark.gpu
def test_a_gpu_finds_the_same_and_repeats_itself(llama: LlamaForCausalLM):
    sides, on_cpu = sides_of(5, **LONG), Dictionary(1)
    on_gpu = Dictionary(1)
    on_gpu.W_enc_DF, on_gpu.W_dec_FD = on_cpu.W_enc_DF.cuda(), on_cpu.W_dec_FD.cuda()
    expected = effect_of(effects(llama, sides, {1: on_cpu}), 1)
    llama.cuda()
    try:
        first, again = (effect_of(effects(llama, sides, {1: on_gpu}), 1) for _ in range(2))
    finally:
        llama.cpu()
    assert torch.equal(first, again)
    assert torch.allclose(first, expected, atol=1e-9)


def test_the_command_s_features_are_ranked_by_it_and_differ(project: Project, tmp_path: Path):
    """On the tiny model as in `discover`: other latents than by the difference of means, from the same sums."""
    by_effect = found(project, tmp_path / "a")
    by_difference = subspace_of(project.argv(tmp_path / "b"))[0]
    for row in by_difference.feature_rows():
        assert "effect" not in row
    ids = [[row["id"] for row in of.feature_rows()] for of in (by_effect, by_difference)]
    assert ids[0] != ids[1]
    deltas = [
        {(row["layer"], row["used_by"], row["id"]): row["delta"] for row in of.feature_rows()}
        for of in (by_effect, by_difference)
    ]
    shared = deltas[0].keys() & deltas[1].keys()
    assert shared
    for key in shared:
        assert deltas[0][key] == pytest.approx(deltas[1][key], abs=1e-5)
