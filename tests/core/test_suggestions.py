import pytest

from sails_align.core.suggestions import closest, did_you_mean, did_you_mean_path, suggestion

NAMES = ("sails", "random_basis", "mean_diff", "layer_12/width_16k/canonical")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sail", "sails"),
        ("SAILS", "sails"),
        ("mean-diff", "mean_diff"),
        ("random", "random_basis"),
        ("layer_12", "layer_12/width_16k/canonical"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_closest_name(written, meant):
    assert closest(written, NAMES) == meant


def test_messages():
    assert did_you_mean("sail", NAMES) == "; did you mean 'sails'?"
    assert did_you_mean("zzz", ["a", "b"]) == "; choose one of a, b"
    assert suggestion("zzz", ["a", "b"]) == ""


def test_the_closest_file_beside_a_path_that_is_not_there(tmp_path):
    for name in ("pairs.jsonl", "prompts.csv", ".pairs.lock"):
        (tmp_path / name).touch()
    assert did_you_mean_path(f"{tmp_path}/pair.jsonl") == f"; did you mean '{tmp_path}/pairs.jsonl'?"
    assert did_you_mean_path(f"{tmp_path}/zzz") == ""
    assert did_you_mean_path(f"{tmp_path}/no/such/folder") == ""
    assert did_you_mean_path("testbd", "testbed") == "; did you mean 'testbed'?"
