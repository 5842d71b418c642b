"""Scores of channels: against whole tensors, in parts, and inside real models."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from sails_align.core.errors import InputError
from sails_align.data.tokens import TokenizedSide
from sails_align.models.hooks import decoder_layers
from sails_align.units.layout import columns_and_rows, n_channels, rows_of
from sails_align.units.scores import ChannelStats, channel_scores, channel_stats, unit_scores

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def made(config_class: type[PreTrainedConfig], **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SIZES, **more)).eval()


def test_the_scores_of_three_channels() -> None:
    """Variances 1, 0 and 4, times the squared norms of the columns, 5, 100 and 9."""
    x_TC = torch.tensor([[1, 5, 2], [3, 5, 0], [2, 5, 4]]).double()
    weight_OC = torch.tensor([[1, 10, 0], [2, 0, 3]]).double()
    variance_C = ChannelStats.of(x_TC).variance
    assert variance_C.tolist() == [1, 0, 4]
    assert channel_scores(variance_C, [weight_OC]).tolist() == [5, 0, 36]
    assert channel_scores(variance_C, [weight_OC, weight_OC]).tolist() == [10, 0, 72], "what reads one channel is added"
    assert ChannelStats.of(x_TC * 0 + 1e6).variance.tolist() == [0, 0, 0], "a constant channel, however large it is"


@pytest.mark.parametrize("sizes", [(1, 1, 298), (100, 100, 100), (299, 1)])
def test_parts_are_summed_to_the_variance_of_the_whole(sizes: tuple[int, ...]) -> None:
    """Also far from zero, where the difference of two large sums (the control) has no digits left."""
    torch.manual_seed(0)
    x_TC = 1e8 + torch.randn(300, 5, dtype=torch.float64)
    first, *others = (ChannelStats.of(part) for part in x_TC.split(sizes))
    stats = sum(others, start=first)
    torch.testing.assert_close(stats.variance, x_TC.var(0), atol=1e-10, rtol=1e-8)
    naive = (x_TC.square().mean(0) - x_TC.mean(0).square()) * 300 / 299
    assert (naive - x_TC.var(0)).abs().max() > 1e-2


def test_one_token_has_no_variance() -> None:
    with pytest.raises(InputError, match="there are 1 tokens"):
        ChannelStats.of(torch.ones(1, 3)).variance  # noqa: B018


@pytest.mark.parametrize("config", [LlamaConfig, Gemma2Config])
def test_channels_are_what_the_modules_of_a_model_read(config: type[PreTrainedConfig]) -> None:
    model = made(config, attn_implementation="eager")
    ids = [[3, 7, 9, 11, 2], [5, 4, 8]]
    masks = [[False, True, True, False, True], [False, True, True]]
    stats = channel_stats(model, [TokenizedSide(*both) for both in zip(ids, masks, strict=True)])
    inputs: dict[str, list[torch.Tensor]] = {}
    block = decoder_layers(model)[1]
    readers = {"attention_input": "self_attn.k_proj", "heads": "self_attn.o_proj"}
    readers |= {"mlp_input": "mlp.up_proj", "mlp_hidden": "mlp.down_proj"}
    for name, path in readers.items():
        hook = lambda module, given, name=name: inputs.setdefault(name, []).append(given[0][0])  # noqa: E731
        block.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    assert n_channels(model) == {f"{b}.{name}": stats[f"{b}.{name}"].mean.numel() for b in (0, 1) for name in readers}
    scores = unit_scores(model, stats)
    for name, found in inputs.items():
        x_TC = torch.cat([of[torch.tensor(mask)] for of, mask in zip(found, masks, strict=True)]).double()
        torch.testing.assert_close(stats[f"1.{name}"].variance, x_TC.var(0), atol=1e-6, rtol=1e-4)
        assert stats[f"1.{name}"].n == 5
    weights = [block.get_submodule(path).weight.double() for path in ("mlp.gate_proj", "mlp.up_proj")]
    expected_C = stats["1.mlp_input"].variance * sum(weight.square().sum(0) for weight in weights)
    torch.testing.assert_close(scores["1.mlp_input"], expected_C.detach())


def test_a_row_of_v_is_written_for_all_heads_that_share_it() -> None:
    """Four heads of width 6 over two of v: the row of a channel is where a change of it changes the channel."""
    model = made(LlamaConfig, attn_implementation="eager")
    block, seen = decoder_layers(model)[0], []
    block.self_attn.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].detach()))
    ids_BS = torch.tensor([[3, 7, 9]])
    model(input_ids=ids_BS)
    for row in (0, 4, 7):
        weight = block.self_attn.v_proj.weight.data[row]
        weight += 1
        model(input_ids=ids_BS)
        weight -= 1
        chosen_C = (seen[-1] - seen[0]).abs().amax(0) > 1e-6
        assert chosen_C.sum() == 2
        rows_O = rows_of(chosen_C, 12, 6)
        assert rows_O.nonzero().tolist() == [[row]]
        one_C = torch.zeros_like(chosen_C)
        one_C[chosen_C.nonzero()[1]] = True
        assert torch.equal(rows_of(one_C, 12, 6), rows_O), "frozen with any of its channels"


def test_columns_and_rows_of_a_block() -> None:
    block = decoder_layers(made(LlamaConfig))[0]
    chosen = {name: torch.arange(n) == 3 for name, n in (("attention_input", 16), ("heads", 24), ("mlp_input", 16))}
    chosen["mlp_hidden"] = torch.arange(24) == 20
    found = {}
    for path in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        columns_C, rows_O = columns_and_rows(block, path, chosen)
        found[path] = (columns_C.nonzero().flatten().tolist(), None if rows_O is None else rows_O.nonzero().tolist())
    assert found == {
        "self_attn.q_proj": ([3], None),
        "self_attn.v_proj": ([3], [[3]]),
        "self_attn.o_proj": ([3], None),
        "mlp.gate_proj": ([3], [[20]]),
        "mlp.down_proj": ([20], None),
    }


def test_models_whose_units_are_not_known() -> None:
    with pytest.raises(InputError, match=r"no linear module mlp.gate_proj, so its units are not known"):
        n_channels(made(MixtralConfig, num_local_experts=2))
    with pytest.raises(InputError, match="no tokens to look at"):
        channel_stats(made(LlamaConfig), [TokenizedSide([3, 4], [False, False])])
