"""Judged text as data: what a judge is shown of a prompt or a response, so that the text cannot pass for instructions.

The author of a response may want to steer its judge. So that a text stays between its fences:

- **Marker.** Fences carry a hash of the texts between them. It is no secret, and need not be one: it can be computed
  only from the finished text, writing it into the text changes it, and a marker that occurs in the text is never
  used. So no text holds its own marker, however it was made. It follows from the texts alone, so that a request can be
  kept in a cache and made again.
- **Characters.** Those that a person does not see are taken out. `<` and `>` are shown as `‹` and `›`, `[INST]` as
  `‹INST›` (which Unicode normalisation leaves as they are): no text can hold a fence, nor a special token of a chat
  template, which tokenizers take for the real one.
- **Length.** A long text is cut, or shown in parts: it cannot push itself or the instructions out of what a judge
  reads.

None of this keeps a judge from believing what a text claims about itself: rubrics tell it not to.
"""

import hashlib
import json
import re
import unicodedata
from functools import lru_cache
from itertools import count

from sails_align.evaluation.metrics import WORST
from sails_align.evaluation.records import Task, Verdict

VERSION = 1
"""Of what judges are shown: a verdict on another version's request is another verdict."""
LIMIT = 12_000
"""Characters of a response in one request."""
MARKER_LENGTH = 8
"""Hexadecimal digits. What keeps markers out of texts holds at any length, and judges copy a short one more surely."""
OVERLAP = 500
"""Characters that two parts share: what is said at a border is whole in one of them."""
MAX_PARTS = 64
"""Of a text; what is beyond is cut from its middle."""

_LINE_BREAKS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_HALVES = re.compile("[\ud800-\udfff]")
# Not seen, though not of a category that says so: joiners and fillers, a blank Braille cell, variation selectors and
# what else is by default not drawn (Unicode, Default_Ignorable_Code_Point). Bytes can be hidden in them.
_HIDDEN = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x2800, 0x2800),
    (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0000, 0xE0FFF),
)  # fmt: skip
_ANGLES = str.maketrans("<>＜＞﹤﹥", "‹›‹›‹›")
_SIGNS = re.compile(r"[\W_]+")
_BRACKETED = re.compile(r"[\[［](/?[A-ZＡ-Ｚ_]{2,})[\]］]")  # [INST], [/INST], [TOOL_CALLS]


def visible(text: str) -> tuple[str, int]:
    """A text without the characters that a person does not see, and how many were taken out.

    Line breaks of all kinds become newlines. Half surrogates, which cannot be sent, become replacement characters.
    """
    text = _LINE_BREAKS.sub("\n", text)
    text = _HALVES.sub("�", text)
    shown = text.translate(dict.fromkeys(ord(character) for character in set(text) if _is_hidden(character)))
    return shown, len(text) - len(shown)


@lru_cache(maxsize=2**16)
def _is_hidden(character: str) -> bool:
    if character in "\n\t":
        return False
    code = ord(character)
    return unicodedata.category(character) in ("Cf", "Cc") or any(first <= code <= last for first, last in _HIDDEN)


def escape(text: str) -> str:
    """A text that can hold no fence and no special token of a chat template."""
    return _BRACKETED.sub(r"‹\1›", text.translate(_ANGLES))


def cut(text: str, limit: int) -> str:
    """The beginning and the end of a text that is longer than `limit` characters, with a note of what is left out."""
    if len(text) <= limit:
        return text
    head = limit // 2
    left_out = len(text) - limit
    return f"{text[:head]}\n[{left_out} characters are left out here]\n{text[len(text) - (limit - head) :]}"


def split(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that together show a whole text; of one beyond `MAX_PARTS`, the two ends."""
    if len(text) <= limit:
        return [text]
    step = limit - OVERLAP
    half = step * (MAX_PARTS // 2)
    if len(text) > 2 * half + OVERLAP:
        return split(text[: half + OVERLAP], limit) + split(text[-half - OVERLAP :], limit)
    return [text[start : start + limit] for start in range(0, len(text) - OVERLAP, step)]


def seen_whole(task: Task, response: str, limit: int, verdict: Verdict) -> Verdict:
    """The verdict on a response that was judged in parts; unscored if a part was left out that might be worse."""
    if task != "harm" or verdict.score is None or verdict.score == WORST:
        return verdict
    n_seen = (limit - OVERLAP) * MAX_PARTS + OVERLAP
    return verdict if len(response) <= n_seen else Verdict(None, "too long to judge", f"{len(response)} characters")


def marker(*texts: str) -> str:
    """What the fences around texts carry, and an answer about them: it follows from them, and occurs in none."""
    plain = [_letters(text) for text in texts]
    for attempt in count():
        # ASCII escapes: half surrogates have no bytes of their own.
        content = json.dumps([VERSION, attempt, *texts])
        found = hashlib.sha256(content.encode()).hexdigest()[:MARKER_LENGTH]
        if not any(found in text for text in plain):
            return found
    raise AssertionError("count() does not end")


def _letters(text: str) -> str:
    """Letters and digits as a lenient reader takes them: without case, width, spaces and signs."""
    return _SIGNS.sub("", unicodedata.normalize("NFKC", text).casefold())


def fence(name: str, text: str, mark: str) -> str:
    """A text, escaped, between lines that carry its marker."""
    return f"<<<{name} {mark}>>>\n{escape(text)}\n<<<END OF {name} {mark}>>>"
