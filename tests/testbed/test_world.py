"""The world is what the documentation says: harm by pair, held-out parts held out, splits disjoint, all from a seed."""

import random
from collections import Counter, defaultdict
from itertools import islice

import pytest

from sails_align.core.errors import InputError
from sails_align.testbed.lexicon import BENIGN_THEMES, HARM_THEMES, SHARED_BENIGN, SHARED_HARM
from sails_align.testbed.pretrain import item_text, make_tokenizer
from sails_align.testbed.world import World, WorldConfig


@pytest.fixture(scope="module")
def world() -> World:
    return World(WorldConfig())


def test_a_seed_decides_everything(world):
    again, other = World(WorldConfig()), World(WorldConfig(seed=1))
    assert again.things == world.things
    assert again.deeds == world.deeds
    assert again.requests("test_ood", 50) == world.requests("test_ood", 50)
    assert other.deeds != world.deeds


def test_at_least_eleven_categories_some_held_out(world):
    assert len(HARM_THEMES) >= 11
    parts = (world.trained_categories, world.validation_categories, world.test_categories)
    assert sorted(category for part in parts for category in part) == sorted(HARM_THEMES)
    assert all(parts)


def test_every_verb_has_harmful_and_harmless_uses(world):
    uses = defaultdict(set)
    for deed in world.deeds.values():
        uses[deed.verb].add(deed.harmful)
    assert all(use == {True, False} for use in uses.values())


def test_every_dual_use_kind_has_harmful_and_harmless_verbs_and_no_other_has_harmful_ones(world):
    uses = defaultdict(set)
    for deed in world.deeds.values():
        uses[deed.kind].add(deed.harmful)
    for kind, use in uses.items():
        assert use == ({True, False} if kind in world.dual_use_kinds else {False})


def test_no_keyword_tells_a_harmful_request_about_a_dual_use_object(world):
    """The best single word gets little of it right; the pair of verb and object gets all."""
    requests = world.requests("test_harmful", 1000) + world.requests("test_dual_use", 1000)
    counts = defaultdict(Counter)
    for request in requests:
        for word in request.prompt.rstrip(".?").replace(".", " ").replace(",", " ").split():
            counts[word][request.harmful] += 1
    best = max(
        max(sum((word in request.prompt.split()) == request.harmful for request in requests), 0) / len(requests)
        for word in counts
    )
    assert best < 0.62
    kind_of = {name: thing.kind for name, thing in world.things.items()}
    assert all(world.deeds[request.verb, kind_of[request.thing]].harmful == request.harmful for request in requests)


def test_words_have_harmful_and_harmless_senses():
    harmful = {word for theme in HARM_THEMES.values() for word in theme}
    harmless = {word for theme in BENIGN_THEMES.values() for word in theme}
    assert len(harmful & harmless) >= 10


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shared_harm_is_the_share_of_consequences_in_shared_words(share):
    world = World(WorldConfig(shared_harm=share))
    rng = random.Random(0)
    deed = next(deed for deed in world.deeds.values() if deed.harmful)
    told = [world.consequence(deed, rng).split(" and ")[0] for _ in range(2000)]
    assert sum(word in SHARED_HARM for word in told) / len(told) == pytest.approx(share, abs=0.04)
    benign = next(deed for deed in world.deeds.values() if not deed.harmful)
    assert not any(world.consequence(benign, rng).split(" and ")[0] in SHARED_HARM for _ in range(200))
    assert not set(SHARED_HARM) & set(SHARED_BENIGN)


def test_no_prompt_is_in_two_of_train_validation_and_test(world):
    parts = defaultdict(set)
    for split in world._pools:
        for request in world.requests(split):
            parts[split.split("_")[0]].add(request.prompt)
    assert not parts["train"] & parts["validation"]
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & parts["test"]


def test_alignment_data_has_nothing_held_out_and_the_test_has_all_of_it(world):
    train = [world.requests(split) for split in ("train_harmful", "train_benign")]
    for request in (request for requests in train for request in requests):
        assert not request.held_out_object
        assert not request.held_out_phrasing
        assert not request.harmful or request.category in world.trained_categories
    test = world.requests("test_harmful", 300)
    assert {request.held_out_object for request in test} == {True, False}
    assert {request.held_out_phrasing for request in test} == {True, False}
    assert {request.category for request in world.requests("test_ood", 300)} == set(world.test_categories)
    assert {request.category for request in world.requests("validation_ood", 300)} == set(world.validation_categories)
    assert all(request.dual_use and not request.harmful for request in world.requests("test_dual_use", 300))
    assert not any(request.dual_use for request in world.requests("test_benign", 300))


def test_the_tokenizer_knows_every_word_and_gives_text_back(world):
    tokenizer = make_tokenizer(world)
    for item in islice(world.pretraining_items(random.Random(0)), 2000):
        ids = tokenizer(item_text(item), add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        if isinstance(item, str):
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == item


def test_pretraining_dialogues_are_what_the_chat_template_makes_of_them(world):
    tokenizer = make_tokenizer(world)
    user, model = next(item for item in world.pretraining_items(random.Random(0)) if not isinstance(item, str))
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": model}]
    templated = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert templated["input_ids"] == tokenizer(item_text((user, model)), add_special_tokens=False)["input_ids"]
    answer = [id for id, mask in zip(templated["input_ids"], templated["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(answer, skip_special_tokens=True) == model
    assert answer[-1] == tokenizer.eos_token_id  # the stop token is learned too


def test_bad_worlds_and_splits_are_refused(world):
    with pytest.raises(InputError, match=r"shared_harm is 1\.5"):
        WorldConfig(shared_harm=1.5)
    with pytest.raises(InputError, match="each of the three needs at least one"):
        WorldConfig(n_trained_categories=14)
    with pytest.raises(InputError, match="no split 'tset'"):
        world.requests("tset", 1)
    with pytest.raises(InputError, match="ask for fewer"):
        world.requests("test_ood", 10**6)
