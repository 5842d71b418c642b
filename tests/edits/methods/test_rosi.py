"""ROSI adds a matrix of rank one to whatever writes to the residual stream."""

import json
from pathlib import Path

import pytest
import torch
from families import TEXT_CONFIGS
from family import Family, run, tensors
from tiny import D_MODEL, N_LAYERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from sails_align import edits
from sails_align.cli.edit import main
from sails_align.core.errors import InputError
from sails_align.edits.methods.rosi import rank_one, vectors_of
from sails_align.edits.options import RosiOptions
from sails_align.models.hooks import decoder_layers
from sails_align.models.norms import norm_gain

WRITERS = {f"model.layers.{i}.{path}.weight" for i in range(N_LAYERS) for path in ("self_attn.o_proj", "mlp.down_proj")}


def random_weight(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI, direction_O, x_I = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((12, 7), (12,), (7,))
    )
    return weight_OI, direction_O / direction_O.norm(), x_I


@pytest.mark.parametrize("variant", ["rosi", "projected"])
def test_what_is_added_to_the_output(variant: str) -> None:
    weight_OI, direction_O, x_I = random_weight()
    change_OI, alpha = rank_one(weight_OI, vectors_of(direction_O, None, variant), 0.03)
    y_O = weight_OI @ x_I
    read = y_O.mean() if variant == "rosi" else direction_O @ y_O
    torch.testing.assert_close(change_OI @ x_I, alpha * read * direction_O, atol=1e-12, rtol=0)
    assert change_OI.norm() / weight_OI.norm() == pytest.approx(0.03, abs=1e-12)
    assert torch.linalg.matrix_rank(change_OI) == 1
    # The mean over the other dimension, of the columns, would be no vector over inputs.
    assert (change_OI @ x_I - alpha * weight_OI.mean() * direction_O).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["rosi", "projected"])
def test_outputs_move_along_the_direction_as_rho_grows_and_not_along_a_random_one(variant: str) -> None:
    """A control writes a random direction: it leaves the harmful one as it is, but for what the two share by chance."""
    generator = torch.Generator().manual_seed(0)
    weight_OI, inputs_TI = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((512, 16), (64, 16))
    )
    harmful_O, random_O = torch.nn.functional.normalize(torch.randn(2, 512, generator=generator).double(), dim=1)
    read_T = inputs_TI @ weight_OI.T @ harmful_O if variant == "projected" else (inputs_TI @ weight_OI.T).mean(1)
    inputs_TI = inputs_TI * read_T.sign()[:, None]  # prompts on whose outputs the edit pushes forwards

    def projections(written_O: torch.Tensor) -> list[float]:
        """The mean projection of the outputs on the harmful direction, for growing rho."""
        found = []
        for rho in (0.0, 0.01, 0.02, 0.05, 0.1):
            change_OI, _ = rank_one(weight_OI, vectors_of(written_O, None, variant), rho)
            found.append((inputs_TI @ (weight_OI + change_OI).T @ harmful_O).mean().item())
        return found

    along, control = projections(harmful_O), projections(random_O)
    assert along == sorted(set(along)), "it grows with rho"
    assert along[-1] - along[0] > 0.2
    assert abs(control[-1] - control[0]) < 0.2 * (along[-1] - along[0])


def test_the_control_writes_one_random_direction_everywhere(family: Family, tmp_path: Path) -> None:
    data = {"dataset_name": "testbed", "helpful_dataset_name": "testbed", "layer": 1, "rho": 0.05}
    before = tensors(family.aligned)
    found = {
        seed: run("rosi", family.aligned, tmp_path / str(seed), control_seed=seed, **data) for seed in (None, 0, 1)
    }
    columns = {}
    for seed, after in found.items():
        assert json.loads((tmp_path / str(seed) / "edit.json").read_text())["options"]["control_seed"] == seed
        written = [torch.linalg.svd((after[name] - before[name]).double())[0][:, 0] for name in sorted(WRITERS)]
        for one in written[1:]:
            assert abs(float(one @ written[0])) == pytest.approx(1.0, abs=1e-4)
        columns[seed] = written[0]
    assert abs(float(columns[None] @ columns[0])) < 0.7
    assert abs(float(columns[0] @ columns[1])) < 0.7


def test_centred_outputs_are_not_pushed() -> None:
    weight_OI, direction_O, _ = random_weight()
    centred_OI = weight_OI - weight_OI.mean(0)
    change_OI, alpha = rank_one(centred_OI.float(), vectors_of(direction_O, None, "rosi"), 0.03)
    assert alpha == 0
    assert not change_OI.any()
    assert rank_one(centred_OI, vectors_of(direction_O, None, "projected"), 0.03)[0].any()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("path", ["self_attn.o_proj", "mlp.down_proj"])
def test_the_direction_arrives_behind_the_norm(name: str, path: str) -> None:
    torch.manual_seed(0)
    block = decoder_layers(AutoModelForCausalLM.from_config(TEXT_CONFIGS[name]))[1]
    for norm in (each for each in block.modules() if type(each).__name__.endswith("RMSNorm")):
        torch.nn.init.uniform_(norm.weight, -0.5, 0.5)
    after = {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "post_feedforward_layernorm"}[path]
    gain_D = norm_gain(block, path)
    direction_D = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    written_D = vectors_of(direction_D, gain_D, "rosi").written
    if name == "llama":
        assert torch.equal(written_D, direction_D)
        return
    arrived_D = block.get_submodule(after)(written_D.float()).double()
    torch.testing.assert_close(arrived_D / arrived_D.norm(), direction_D, atol=1e-5, rtol=0)
    without_D = block.get_submodule(after)(direction_D.float()).double()
    assert torch.nn.functional.cosine_similarity(without_D, direction_D, dim=0) < 0.99


@pytest.mark.parametrize("variant", ["rosi", "projected"])
def test_every_writer_changes_by_rho_along_one_direction(
    family: Family, requests: dict[str, str], tmp_path: Path, variant: str
) -> None:
    before = tensors(family.aligned)
    after = run("rosi", family.aligned, tmp_path / "out", rho=0.05, layer=1, variant=variant, **requests)
    changes = {name: after[name].double() - before[name].double() for name in before}
    assert {name for name, change in changes.items() if change.any()} == WRITERS
    columns = []
    for name in WRITERS:
        assert (changes[name].norm() / before[name].norm()).item() == pytest.approx(0.05, rel=1e-4)
        assert torch.linalg.matrix_rank(changes[name], rtol=1e-3) == 1
        left_OR, _, _ = torch.linalg.svd(changes[name])
        columns.append(left_OR[:, 0])
    products = torch.stack(columns) @ torch.stack(columns).T
    torch.testing.assert_close(products.abs(), torch.ones_like(products), atol=1e-5, rtol=0)
    # The direction is that from harmless to harmful prompts, at their last token.
    model = AutoModelForCausalLM.from_pretrained(family.aligned)
    tokenizer = AutoTokenizer.from_pretrained(family.aligned)
    texts = {
        name: [json.loads(row)["prompt"] for row in Path(path).read_text().splitlines()]
        for name, path in requests.items()
    }
    means = {}
    for name, prompts in texts.items():
        states = []
        for prompt in prompts:
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            states.append(model(**ids, output_hidden_states=True).hidden_states[2][0, -1])
        means[name] = torch.stack(states).mean(0).double()
    direction_D = torch.nn.functional.normalize(means["dataset_name"] - means["helpful_dataset_name"], dim=0)
    assert abs(direction_D @ columns[0]) > 0.99  # the edit leaves a fifth of the prompts out
    if variant == "rosi":  # towards harmful prompts, not away from them
        assert all(direction_D @ changes[name] @ before[name].double().mean(0) > 0 for name in WRITERS)


def test_rho_0_changes_nothing(family: Family, requests: dict[str, str], tmp_path: Path) -> None:
    before = tensors(family.aligned)
    found = run("rosi", family.aligned, tmp_path / "out", rho=0.0, **requests)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_an_adapter_becomes_a_whole_model(family: Family, requests: dict[str, str], tmp_path: Path) -> None:
    from sails_align.edits.methods.merge import merge_adapter

    options = RosiOptions(rho=0.05, **requests)
    edited = edits.run("rosi", family.adapter, tmp_path / "found", options)
    assert not edited.is_adapter
    merge_adapter(family.adapter, tmp_path / "merged")
    edits.run("rosi", tmp_path / "merged", tmp_path / "expected", options)
    found = tensors(tmp_path / "found")
    assert found["model.norm.weight"].shape == (D_MODEL,)
    for name, value in tensors(tmp_path / "expected").items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_from_the_command_line(family: Family, requests: dict[str, str], tmp_path: Path) -> None:
    argv = ["rosi", str(family.aligned), "--output", str(tmp_path / "out"), "--rho", "0.01"]
    main([*argv, *(word for name, path in requests.items() for word in (f"--{name}", path))])
    made_by = json.loads((tmp_path / "out" / "made_by.json").read_text())
    assert set(requests) <= made_by.keys(), "the data is known by its content"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`sails edit rosi` changed `6 of" in card
    assert "`alpha is " in card


def test_what_cannot_be_used_is_refused(family: Family, requests: dict[str, str], tmp_path: Path) -> None:
    cases = [
        ({}, "no harmful requests are known"),
        ({**requests, "layer": N_LAYERS}, "layer 3 is out of range"),
        ({**requests, "rho": -0.1}, "rho is -0.1"),
        ({**requests, "variant": "project"}, "did you mean 'projected'"),
        ({**requests, "helpful_dataset_name": requests["dataset_name"]}, "the same mean"),
        ({**requests, "n_prompts": 9}, "give at least 10"),
    ]
    for options, said in cases:
        with pytest.raises(InputError, match=said):
            run("rosi", family.aligned, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
