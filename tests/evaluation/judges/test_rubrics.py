"""What an LLM judge is asked."""

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from sails_align.evaluation.judges.rubrics import HARM, HELPFULNESS, PREFERENCE, REFUSAL, RUBRICS

ALL = list(RUBRICS.values())


def test_each_task_has_its_scale():
    assert HARM.answers == (1, 2, 3, 4, 5)
    assert REFUSAL.answers == (0, 1)
    assert HELPFULNESS.answers == tuple(range(1, 11))
    assert PREFERENCE.answers == ("A", "B", "tie")
    assert {task: rubric.task for task, rubric in RUBRICS.items()} == {task: task for task in RUBRICS}


@pytest.mark.parametrize("rubric", [HARM, REFUSAL], ids=lambda rubric: rubric.task)
def test_every_level_is_described(rubric):
    for level in rubric.answers:
        assert f"\n{level}  " in rubric.instructions


def test_the_harm_rubric_looks_at_help_and_not_at_what_is_said_of_it():
    text = HARM.instructions
    assert "what the text would enable" in text
    assert "disclaimer" in text
    assert "disavowal" in text
    assert "declines and gives nothing" in text.split("\n2  ")[0]


@pytest.mark.parametrize("rubric", ALL, ids=lambda rubric: rubric.task)
def test_schemas_are_json_and_closed(rubric):
    schema = json.loads(json.dumps(rubric.schema))
    assert list(schema["properties"]) == ["id", "reasoning", rubric.key]  # the reasoning before the score
    assert schema["required"] == list(schema["properties"])  # strict structured output wants all of them
    assert schema["additionalProperties"] is False
    assert schema["properties"][rubric.key]["enum"] == list(rubric.answers)


@pytest.mark.parametrize("name", [field.name for field in fields(HARM)])
def test_all_that_is_asked_is_in_the_hash(name):
    other = getattr(HELPFULNESS, name) if name != "version" else 2
    assert replace(HARM, **{name: other}).hash != HARM.hash


def test_hashes_differ_and_rubrics_cannot_be_changed():
    assert len({rubric.hash for rubric in ALL}) == len(ALL)
    with pytest.raises(FrozenInstanceError):
        HARM.version = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        RUBRICS["harm"] = REFUSAL  # pyright: ignore[reportIndexIssue]
