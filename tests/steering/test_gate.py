"""The gate of steering: the states that a sequence of readings leads to, and what is steered in each of them."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from sails_align.core.errors import InputError
from sails_align.guards.guard import Guard
from sails_align.models.load import load_spec_tokenizer
from sails_align.models.resolve import resolve_model
from sails_align.steering import hook_of, prefix_of
from sails_align.steering.gate import Gate, GateState, Level, gated
from sails_align.steering.hook import Steering
from sails_align.steering.options import SteeringOptions
from sails_align.subspace.basis import Subspace

D, IDS = 32, torch.arange(1, 13).reshape(2, 6)
SUBSPACE = Subspace({layer: torch.eye(D)[:, :2] for layer in (0, 2)}, {0: torch.ones(2), 2: torch.ones(2)}, {})


class Fed:
    """A projector that gives the probabilities it is fed, one list for the batch at each reading."""

    def __init__(self, readings: Iterable[list[float]]) -> None:
        self.readings, self.n = list(readings), 0

    def scores(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        assert hidden_BD.shape == (len(self.readings[self.n]), D)
        self.n += 1
        return torch.tensor(self.readings[self.n - 1], dtype=torch.float64).logit()


def guard(readings: Iterable[list[float]]) -> Guard:
    projector: Any = Fed(readings)
    return Guard(Path("guard"), projector, torch.zeros(1), {"layer": 1}, None)


def options(**changes: Any) -> SteeringOptions:
    return SteeringOptions(**{"steer": "add", "steer_subspace": "x", "steer_strength": 0.5, "gate": "x", **changes})


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=D, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=16
    )
    return AutoModelForCausalLM.from_config(config).eval()


def generated(model: Any, n: int = 6) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Tokens, and the scores (B, V) of each new one."""
    asked = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
    found = model.generate(input_ids=IDS, **asked, output_scores=True, return_dict_in_generate=True)
    return found.sequences, found.scores


def test_states_by_hand() -> None:
    fed = [0.95, 0.95, 0.8, 0.95, 0.95, 0.92, 0.7, 0.75, 0.1, 0.7, 0.6, 0.2, 0.2, 0.2, 0.9]
    state, found = GateState(fired=False), []
    for p in fed:
        state = state.after(p, options(gate_high_steps=3, gate_low_steps=2))
        found.append(state.level.name[0])
    assert "".join(found) == "EEEEELLLLEENNNE"
    assert state.n_high == 1


def test_the_defaults_are_those_of_the_authors_pipeline() -> None:
    state = GateState(fired=True)
    levels = [(state := state.after(p, options())).level for p in [0.9] * 6 + [0.7] * 8]
    assert levels == [Level.ELEVATED] * 5 + [Level.LOCKDOWN] * 4 + [Level.ELEVATED] * 4 + [Level.NORMAL]
    assert options().gate_prompt == 0.75


def test_factors() -> None:
    assert [GateState(fired, level).factor for fired in (False, True) for level in Level] == [0, 1.5, 2, 1, 1.5, 2]


def test_low_probabilities_leave_generation_as_it_is(model: Any) -> None:
    plain = generated(model)
    for strength in (0.5, 100.0):
        given = guard([[0.7, 0.01]] * 6)
        with Steering(options(steer_strength=strength, gate_every=1, gate_clamp=0.01), SUBSPACE, given)(model):
            found = generated(model)
        assert given.projector.n == 6  # pyright: ignore
        assert torch.equal(found[0], plain[0])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1], plain[1], strict=True))
    with Steering(options(), SUBSPACE)(model):  # the control: without the gate it changes
        assert not torch.equal(generated(model)[1][1], plain[1][1])


def test_only_the_response_to_the_harmful_prompt_is_steered_and_from_its_second_pass_on(model: Any) -> None:
    _, plain = generated(model)
    with Steering(options(), SUBSPACE, guard([[0.76, 0.74]] * 2))(model):
        _, found = generated(model)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1][0], plain[1][0])
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(found, plain, strict=True))
    assert torch.equal(generated(model)[1][5], plain[5])  # nothing is left behind


def test_a_reading_works_from_the_next_token_on(model: Any) -> None:
    _, plain = generated(model)
    with Steering(options(gate_every=2), SUBSPACE, guard([[0.1, 0.1], [0.95, 0.1], [0.95, 0.1]]))(model):
        _, found = generated(model)
    same = [torch.equal(ours[0], theirs[0]) for ours, theirs in zip(found, plain, strict=True)]
    assert same[:4] == [True, True, True, False]  # read in the third pass, that of the second new token
    given = guard([[0.1, 0.1]] * 3)
    with Steering(options(gate_every=4), SUBSPACE, given)(model):
        generated(model, 9)
    assert given.projector.n == 3  # pyright: ignore -- the prompt, and new tokens 4 and 8


def test_how_much_is_steered(model: Any) -> None:
    gate, hidden_BSD = Gate(guard([]), options(gate_clamp=3.0)), torch.randn(4, 1, D)
    gate.states = [GateState(False), GateState(True), GateState(True, Level.ELEVATED), GateState(False, Level.LOCKDOWN)]
    gate.begin(model.model.layers[0], (hidden_BSD,), {})
    found = gate.steer(lambda hidden_BSD: hidden_BSD + 1, hidden_BSD)
    assert torch.equal(found[0], hidden_BSD[0])
    for row, factor in ((1, 1.0), (2, 1.5), (3, 2.0)):
        torch.testing.assert_close(found[row], (hidden_BSD[row] + factor).clamp(-3, 3))
    gate.begin(model.model.layers[0], (torch.randn(4, 7, D),), {})  # a prompt
    assert gate.steer(lambda hidden_BSD: hidden_BSD + 1, hidden_BSD) is hidden_BSD


def test_an_error_stays_an_error(model: Any) -> None:
    with (
        pytest.raises(InputError, match="gave a score that is no number"),
        Steering(options(), SUBSPACE, guard([[float("nan"), 0.1]]))(model),
    ):
        generated(model)

    def fails(hidden_BSD: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"), gated(model, {0: fails}, guard([[0.9, 0.9]]), options()):
        generated(model)
    assert not model.model.layers[0]._forward_pre_hooks


def test_a_prefix_begins_the_response_to_the_harmful_prompt_only(model: Any) -> None:
    tokens, plain = generated(model)
    prefix = (7, 3, 9)
    alone = options(steer_strength=0.0)
    with Steering(alone, SUBSPACE, guard([[0.76, 0.74]] * 2), prefix)(model):
        found, scores = generated(model)
    assert found[0, 6:9].tolist() == [*prefix]
    assert torch.equal(found[1], tokens[1])
    assert all(torch.equal(ours[1], theirs[1]) for ours, theirs in zip(scores, plain, strict=True))
    # The rest is what the model itself says after this beginning.
    begun = torch.cat([IDS[:1], torch.tensor([prefix])], dim=1)
    asked = {"attention_mask": torch.ones_like(begun), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(input_ids=begun, **asked)[0], found[0])
    assert found[0, 6:9].tolist() != tokens[0, 6:9].tolist()  # the control: it would have begun otherwise
    assert torch.equal(generated(model)[0], tokens)  # nothing is left behind


def test_a_prefix_begins_the_response_of_an_adapters_model(model: Any) -> None:
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    with Steering(options(), SUBSPACE, guard([[0.9, 0.9]] * 2), (5,))(adapted):
        assert generated(adapted)[0][:, 6].tolist() == [5, 5]


def test_a_prefix_of_words_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    asked = {"steer": "add", "steer_subspace": str(tmp_path / "subspace"), "gate": str(tmp_path / "guard")}
    spec = resolve_model("testbed")
    known = SteeringOptions(**asked, gate_prefix="sorry, i can not help you")
    tokenizer = load_spec_tokenizer(spec)
    assert tokenizer.decode(prefix_of(known, spec)) == "sorry, i can not help you"
    with pytest.raises(InputError, match="has words that the tokenizer of testbed lacks"):
        prefix_of(SteeringOptions(**asked, gate_prefix="Zounds!"), spec)
    with pytest.raises(InputError, match="gate_prefix is empty"):
        SteeringOptions(**asked, gate_prefix=" ")


def test_generation_without_a_cache_is_refused(model: Any) -> None:
    """Each pass would have all tokens, be taken for a prompt, and never be steered."""
    asked = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False}
    with (
        pytest.raises(InputError, match=r"needs the cache of keys and values.*;\nremove use_cache=False"),
        Steering(options(), SUBSPACE, guard([[0.9, 0.9]] * 3))(model),
    ):
        model.generate(input_ids=IDS, **asked, use_cache=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steer": None, "steer_subspace": None}, "gate is given, but there is no steering that it could gate"),
        ({"gate_prompt": 1.5}, "gate_prompt is 1.5, but it is a probability"),
        ({"gate_low": 0.9}, "gate_low is 0.9; choose a value below gate_high"),
        ({"gate_every": 0}, "gate_every is 0"),
        ({"gate_clamp": 0.0}, "gate_clamp is 0.0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        options(**changes)


def test_a_gate_counts_in_the_identity_and_its_options_are_refused_without_one(tmp_path: Path) -> None:
    SUBSPACE.save(tmp_path / "subspace", "hash")
    made: dict[str, Any] = {"steer": "add", "steer_subspace": str(tmp_path / "subspace")}
    plain = hook_of(SteeringOptions(**made))
    assert plain is not None
    with pytest.raises(InputError, match="gate_every is given without gate"):
        SteeringOptions(**made, gate_every=9)
    assert not any("gate" in name for name in plain.identity())
    with pytest.raises(InputError, match="holds no guard"):
        hook_of(SteeringOptions(**made, gate=str(tmp_path / "none")))
