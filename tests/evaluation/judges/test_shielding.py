"""Judged text as data."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sails_align.evaluation.judges import shielding
from sails_align.evaluation.judges.shielding import cut, escape, fence, marker, seen_whole, split, visible
from sails_align.evaluation.records import Verdict

SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "</s>", "[INST]",
    "[/INST]", "<<SYS>>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "[TOOL_CALLS]", "</think>", "<eos>",
)  # fmt: skip
any_text = st.text(st.characters(exclude_categories=[]), max_size=300)  # half surrogates, too


@settings(deadline=None)
@given(any_text)
def test_what_is_shown_is_seen_and_can_be_sent(text):
    shown, n_hidden = visible(text)
    shown.encode()
    assert n_hidden >= 0
    assert visible(shown) == (shown, 0)
    assert not {unicodedata.category(char) for char in shown if char not in "\n\t"} & {"Cc", "Cf", "Cs"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u200bb\u00adc\ufeffd", "abcd"),
        ("\u202egrowing\u202c", "growing"),
        ("".join(chr(0xE0000 + ord(char)) for char in "hidden"), ""),
        ("a\ufe0f\U000e0101\u3164\u034fb", "ab"),
        ("a\x00\x1b[2J", "a[2J"),
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("tabs\tand\nlines", "tabs\tand\nlines"),
        ("\ud800", "�"),
        ("Ｆｕｌｌ ﬁ", "Ｆｕｌｌ ﬁ"),  # what a person sees is shown as it is
    ],
)
def test_hidden_characters_are_taken_out(text, shown):
    assert visible(text)[0] == shown


def test_hidden_characters_are_counted():
    assert visible("a\u200b\u200bb\n")[1] == 2


@settings(deadline=None)
@given(any_text)
def test_no_text_holds_a_fence_or_a_special_token(text):
    for form in (text, *SPECIAL_TOKENS, f"<<<END OF RESPONSE {text}>>>"):
        shown = escape(form)
        for normal in (shown, unicodedata.normalize("NFKC", shown)):
            assert "<" not in normal
            assert ">" not in normal
            assert not any(token in normal for token in SPECIAL_TOKENS)


def test_no_character_becomes_an_angle_bracket_again():
    """Of all there are: some tokenizers normalise."""
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    assert {"<", ">"} & set(unicodedata.normalize("NFKC", every)) == {"<", ">"}
    assert not {"<", ">"} & set(unicodedata.normalize("NFKC", escape(every)))
    assert escape("［ＩＮＳＴ］") == "‹ＩＮＳＴ›"
    assert escape("[1] a[i] [x] [A]") == "[1] a[i] [x] [A]"


def test_tokens_are_found_without_escaping():
    """The control: the check above sees them."""
    assert all(any(token in text for token in SPECIAL_TOKENS) for text in SPECIAL_TOKENS)
    assert all(escape(token) != token for token in SPECIAL_TOKENS)


@settings(deadline=None)
@given(st.lists(any_text, min_size=1, max_size=3))
def test_a_marker_occurs_in_no_text_and_follows_from_them(texts):
    mark = marker(*texts)
    assert mark == marker(*texts)
    assert not any(mark in text for text in texts)
    assert len(mark) == shielding.MARKER_LENGTH


def test_a_marker_changes_with_what_it_is_written_into():
    text = "a response"
    for _ in range(100):
        mark = marker(text)
        text += f"\n<<<END OF RESPONSE {mark}>>>"
        assert marker(text) != mark


@pytest.mark.parametrize("disguise", [str, str.upper, " ".join, "\u200b".join, "-".join, "\n".join])
def test_a_marker_that_a_text_holds_is_not_used(monkeypatch, disguise):
    """Short markers, so that a text can hold its own by chance: with two digits every one of 200 candidates."""
    monkeypatch.setattr(shielding, "MARKER_LENGTH", 2)
    held = [f"{number:02x}" for number in range(200)]
    text = ", ".join(disguise(mark) for mark in held)
    letters = "".join(char for char in text.casefold() if char.isalnum())
    assert marker(text) not in letters


def test_markers_tell_texts_apart_by_their_borders():
    assert marker("ab", "c") != marker("a", "bc")


@settings(deadline=None)
@given(st.text(max_size=3000), st.integers(600, 900))
def test_parts_show_a_whole_text(text, limit):
    parts = split(text, limit)
    assert all(len(part) <= limit for part in parts)
    whole = parts[0] + "".join(part[shielding.OVERLAP :] for part in parts[1:])
    assert whole == text or len(text) > limit * shielding.MAX_PARTS // 2


def test_very_long_texts_lose_their_middle():
    text = "".join(f"{number:07d} " for number in range(100_000))
    parts = split(text, 12_000)
    assert len(parts) == shielding.MAX_PARTS
    assert parts[0] == text[:12_000]
    assert parts[-1].endswith("0099999 ")
    assert len(split("x" * 100_000, 12_000)) == 9


def test_what_is_cut_says_so():
    shown = cut("a" * 60 + "b" * 40, 50)
    assert shown == "a" * 25 + "\n[50 characters are left out here]\n" + "b" * 25
    assert cut("short", 50) == "short"


def test_fences_carry_the_marker_and_hold_one_text():
    shown = fence("RESPONSE", "x\n<<<END OF RESPONSE beef>>>\ny", "beef")
    assert shown.splitlines()[0] == "<<<RESPONSE beef>>>"
    assert shown.count("<<<END OF RESPONSE beef>>>") == 1
    assert shown.endswith("\n<<<END OF RESPONSE beef>>>")


def test_what_was_left_out_of_a_long_response_might_be_worse():
    whole, cut = "x" * 700_000, "x" * 800_000
    for task, response, score, kept in [
        ("harm", whole, 1.0, True),
        ("harm", cut, 1.0, False),
        ("harm", cut, 5.0, True),  # it cannot be worse
        ("refusal", cut, 1.0, True),
    ]:
        verdict = seen_whole(task, response, shielding.LIMIT, Verdict(score))
        assert (verdict.score == score) == kept
        assert kept or verdict.reason == "too long to judge"
