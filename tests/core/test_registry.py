import pytest

from sails_align.core.errors import InputError
from sails_align.core.registry import Entry, Registry

SQRT = Entry("math:sqrt", "Take the square root.")


def test_an_entry_imports_its_object_when_loaded():
    registry = Registry("function", {"sqrt": SQRT, "broken": Entry("no_such_module:thing", "Cannot be imported.")})
    assert registry.names() == ("sqrt", "broken")
    assert registry.get("sqrt").load()(9.0) == 3.0
    with pytest.raises(ModuleNotFoundError):
        registry.get("broken").load()


def test_an_unknown_name_is_refused_with_the_closest():
    registry = Registry("judge", {"rules": SQRT, "llm": SQRT})
    with pytest.raises(InputError, match=r"there is no judge 'ruls'; did you mean 'rules'\?"):
        registry.get("ruls")
    with pytest.raises(InputError, match="there is no judge 'zzzz'; choose one of rules, llm"):
        registry.get("zzzz")


def test_layers_above_add_entries():
    registry = Registry("judge", {"rules": SQRT})
    registry.register("oracle", SQRT)
    assert "oracle" in registry
    assert dict(registry.items())["oracle"] is SQRT


def test_a_target_names_a_module_and_an_object():
    with pytest.raises(AssertionError, match="not of the form"):
        Entry("math", "No object.")
