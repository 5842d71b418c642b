"""Weights are read as PEFT and transformers compute with them, and written as they were stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import edit_weights, save_adapter
from family import Family, tensors
from peft import PeftModel
from tiny import save_model
from transformers import AutoModelForCausalLM

from sails_align.core.errors import InputError
from sails_align.edits.weights import check_same_shapes, open_aligned, open_weights, write_adapter, write_model
from sails_align.models.spec import identity_of


def test_a_model_is_read_as_it_is_stored(family: Family) -> None:
    weights, stored = open_weights(family.aligned), tensors(family.aligned)
    assert set(weights.names) == set(stored)
    assert all(torch.equal(weights.get(name), stored[name]) for name in stored)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"o_proj": 2}}]
)
def test_an_adapter_is_read_merged_as_peft_merges_it(family: Family, tmp_path: Path, options: dict) -> None:
    folder = save_adapter(tmp_path / "adapter", family.base, **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family.base), str(folder))
    merged = model.merge_and_unload().state_dict()
    weights = open_weights(folder)
    for name in weights.names:
        torch.testing.assert_close(weights.get(name), merged[name], atol=1e-6, rtol=1e-6)


def test_what_is_not_edited_is_written_bit_for_bit_in_its_own_type(family: Family, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half", max_shard_size="20KB"
    )
    save_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((family.base / name).read_bytes())
    (tmp_path / "written").mkdir()
    write_model(open_weights(tmp_path / "half"), lambda name, weight: None, tmp_path / "written")
    assert len(list((tmp_path / "written").glob("*.safetensors"))) > 1
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "written").state_dict()
    assert all(torch.equal(written[name], value) for name, value in save_tokenizer.items())
    assert written["model.norm.weight"].dtype == torch.bfloat16


def test_an_adapter_that_is_not_edited_is_written_bit_for_bit(family: Family, tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    write_adapter(open_weights(family.adapter), lambda name, update: None, tmp_path / "written")
    before, after = tensors(family.adapter), tensors(tmp_path / "written")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_aligned_model_is_the_adapters_base_or_another(family: Family) -> None:
    assert open_aligned(family.tuned_adapter, None, None)[1] is None
    assert open_aligned(family.tuned_adapter, None, str(family.aligned))[1] is None
    other = open_aligned(family.tuned_adapter, None, str(family.base))[1]
    assert other is not None
    assert other.folder == family.base
    with pytest.raises(InputError, match="--aligned_model"):
        open_aligned(family.tuned, None, None)


def test_the_aligned_model_of_a_continued_adapter_has_the_earlier_adapter(family: Family, tmp_path: Path) -> None:
    """After SFT, an adapter is trained further with DPO: its base has no alignment at all."""
    earlier = Path(shutil.copytree(family.adapter, tmp_path / "sft"))
    continued = save_adapter(tmp_path / "dpo", family.base)
    edit_weights(continued, lambda tensors: tensors.update({name: value * 1.5 for name, value in tensors.items()}))

    def write_record(adapter_path: str) -> None:
        record = {
            "identity": {"adapter": identity_of(str(earlier))},
            "options": {"sails": {"adapter_path": adapter_path}},
        }
        (continued / "run.json").write_text(json.dumps(record))

    for path in (str(earlier), "sft"):  # a relative path begins above the run
        write_record(path)
        aligned = open_aligned(continued, None, None)[1]
        assert aligned is not None
        expected = open_weights(earlier)
        assert all(torch.equal(aligned.get(name), expected.get(name)) for name in expected.names)
    assert open_aligned(continued, None, str(family.base))[1] is None  # as the user says
    (continued / "run.json").write_text(json.dumps({"identity": {"adapter": identity_of(str(earlier))}, "files": {}}))
    with pytest.raises(InputError, match=r"continued from another adapter, sft, .*\n.*--aligned_model"):
        open_aligned(continued, None, None)  # a checkpoint
    write_record(str(earlier))
    edit_weights(earlier, lambda tensors: tensors.update({name: value * 2 for name, value in tensors.items()}))
    with pytest.raises(InputError, match="has changed"):
        open_aligned(continued, None, None)
    write_record(str(tmp_path / "moved"))
    with pytest.raises(InputError, match="is not there"):
        open_aligned(continued, None, None)


def test_other_shapes_are_refused(family: Family, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family.base)
    model.resize_token_embeddings(model.config.vocab_size + 1)
    save_model(tmp_path / "wider")
    model.save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match="not of one architecture"):
        check_same_shapes(open_weights(family.base), open_weights(tmp_path / "wider"))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_adapters_that_are_not_plain_lora_are_refused(family: Family, tmp_path: Path, options: dict) -> None:
    folder = save_adapter(tmp_path / "adapter", family.base, **options)
    with pytest.raises(InputError, match="sails merge"):
        open_weights(folder)
