"""The four sets of units, parts of them, how stable they are, and their files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sails_align.core.errors import InputError
from sails_align.units.options import SETS, UnitOptions
from sails_align.units.sets import Units, overlap

OPTIONS = UnitOptions(scu_share=0.1, ucu_share=0.2, ru_share=0.3)


def scores(seed: int, n: int = 50) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{b}.{name}": torch.rand(n, generator=generator).double() for b in range(3) for name in ("heads", "mlp_input")
    }


def test_the_sets_partition_the_units_in_the_shares_that_are_asked_for() -> None:
    units = Units.of(scores(0), scores(1), OPTIONS)
    assert len(units) == 300
    assert [units.count(name) for name in SETS] == [30, 60, 90, 120]
    chosen = [units.chosen([name]) for name in SETS]
    for key in units.sets:
        assert torch.equal(sum(each[key].long() for each in chosen), torch.ones(50, dtype=torch.long))
    everything = units.chosen(list(SETS))
    assert all(chosen_C.all() for chosen_C in everything.values())


def test_each_set_is_where_its_name_says() -> None:
    safety, utility = scores(0), scores(1)
    units = Units.of(safety, utility, OPTIONS)
    mean = {}
    for name in SETS:
        chosen = units.chosen([name])
        mean[name] = [
            torch.cat([of[key].argsort().argsort()[chosen[key]] / 49 for key in of]).mean() for of in (safety, utility)
        ]
    assert mean["scu"][0] > 0.8 > 0.2 > mean["scu"][1]
    assert mean["ucu"][0] < 0.3 < 0.7 < mean["ucu"][1]
    assert max(mean["ru"]) < 0.5 < min(mean["cu"])


def test_ranks_are_of_a_group_and_not_of_the_size_of_its_scores() -> None:
    safety, utility = scores(0), scores(1)
    scaled = {key: value * (1000 if key.startswith("1.") else 1) for key, value in safety.items()}
    one, other = Units.of(safety, utility, OPTIONS), Units.of(scaled, utility, OPTIONS)
    assert all(torch.equal(one.sets[key], other.sets[key]) for key in one.sets)


def test_swapped_data_swaps_safety_and_utility() -> None:
    options = UnitOptions(scu_share=0.2, ucu_share=0.2, ru_share=0.3)
    one, other = Units.of(scores(0), scores(1), options), Units.of(scores(1), scores(0), options)
    assert overlap(one, other, "scu") == 0
    for key in one.sets:
        assert torch.equal(one.sets[key] == SETS.index("ru"), other.sets[key] == SETS.index("ru"))
        assert torch.equal(one.sets[key] == SETS.index("scu"), other.sets[key] == SETS.index("ucu"))


def test_a_part_of_a_set_is_what_scores_highest_on_safety_data() -> None:
    units = Units.of(scores(0, n=1000), scores(1, n=1000), OPTIONS)
    part, whole = units.chosen(["cu:0.06"]), units.chosen(["cu"])
    assert sum(chosen_C.sum() for chosen_C in part.values()) == round(0.06 * len(units))
    for key, part_C in part.items():
        assert not (part_C & ~whole[key]).any()
        others = whole[key] & ~part_C
        assert units.safety[key][part_C].min() > units.safety[key][others].max()
    both = units.chosen(["scu", "cu:0.06"])
    assert sum(chosen_C.sum() for chosen_C in both.values()) == units.count("scu") + round(0.06 * len(units))


def test_equal_scores_are_no_difference() -> None:
    """Channels that are dead on both kinds of data are redundant, whatever their place."""
    safety, utility = ({"0.heads": torch.cat([torch.zeros(10), of["0.heads"]])} for of in (scores(0), scores(1)))
    units = Units.of(safety, utility, UnitOptions(scu_share=0.1, ucu_share=0.1, ru_share=0.2))
    assert (units.sets["0.heads"][:10] == SETS.index("ru")).all()


def test_files(tmp_path: Path) -> None:
    keys = [f"{b}.{name}" for b in range(11) for name in ("attention_input", "heads", "mlp_input", "mlp_hidden")]
    safety, utility = ({key: torch.rand(7) for key in keys} for _ in range(2))
    units = Units.of(safety, utility, OPTIONS)
    units.save(tmp_path / "units")
    loaded = Units.load(tmp_path / "units")
    assert list(loaded.sets) == keys, "in the order of the model, which decides between equal units"
    for part in ("safety", "utility", "sets"):
        assert all(torch.equal(getattr(loaded, part)[key], getattr(units, part)[key]) for key in keys)
    path = tmp_path / "units" / "units.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="corrupted"):
        Units.load(tmp_path / "units")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("scp", "no set of units 'scp'; did you mean 'scu'"),
        ("cu:", "no share of the units"),
        ("cu:0", "no share of the units"),
        ("cu:1.5", "no share of the units"),
        ("scu:0.5", "asks for 150 units, but scu has 30 of 300;\nchoose at most 0.1, or scu"),
    ],
)
def test_sets_that_there_are_not(wanted: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Units.of(scores(0), scores(1), OPTIONS).chosen([wanted])


def test_shares_of_more_than_all() -> None:
    with pytest.raises(InputError, match=r"are 1.2 together; choose at most 1"):
        UnitOptions(scu_share=0.4, ucu_share=0.4, ru_share=0.4)
    with pytest.raises(InputError, match="calibration_examples is 1"):
        UnitOptions(calibration_examples=1)
