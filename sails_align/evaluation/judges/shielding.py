"""Shield a judge from the texts that it judges: a text must not pass for instructions.

- **Marker.** Fences around the texts carry a hash of them. It need not be secret: writing it into a text changes it,
  and a marker that occurs in a text is never used, so no text holds its own marker. The same texts have the same
  marker, so a request can be cached.
- **Characters.** Invisible ones are removed. `<` and `>` become `‹` and `›`, and `[INST]` becomes `‹INST›` (Unicode
  normalization keeps them): no text can hold a fence or a special token of a chat template.
- **Length.** A long text is cut or shown in parts: it cannot push itself or the instructions out of the context.

None of this keeps a judge from believing the claims of a text: the rubrics tell it not to.
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
"""Of what judges are shown; part of the identity of a verdict."""
LIMIT = 12_000
"""Maximum characters of a response in one request."""
MARKER_LENGTH = 8
"""Hexadecimal digits: any length is safe, and judges copy a short marker more reliably."""
OVERLAP = 500
"""Characters that two parts share, so that a sentence at the border is whole in one of them."""
MAX_PARTS = 64
"""Maximum parts of a text; the rest is cut from its middle."""

_LINE_BREAKS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_HALVES = re.compile("[\ud800-\udfff]")
# Invisible characters of other categories than Cf and Cc: joiners, fillers, a blank Braille cell, variation selectors
# and the rest of Unicode's Default_Ignorable_Code_Point. Bytes can be hidden in them.
_HIDDEN = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x2800, 0x2800),
    (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0000, 0xE0FFF),
)  # fmt: skip
_ANGLES = str.maketrans("<>＜＞﹤﹥", "‹›‹›‹›")
_SIGNS = re.compile(r"[\W_]+")
_BRACKETED = re.compile(r"[\[［](/?[A-ZＡ-Ｚ_]{2,})[\]］]")  # [INST], [/INST], [TOOL_CALLS]


def visible(text: str) -> tuple[str, int]:
    """Return a text without invisible characters, and the number of those.

    All kinds of line breaks become newlines. Half surrogates, which cannot be sent, become replacement characters.
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
    """Replace the characters of fences and of a chat template's special tokens."""
    return _BRACKETED.sub(r"‹\1›", text.translate(_ANGLES))


def cut(text: str, limit: int) -> str:
    """Keep the beginning and the end of a text that is longer than `limit` characters, and say how much is left out."""
    if len(text) <= limit:
        return text
    head = limit // 2
    left_out = len(text) - limit
    return f"{text[:head]}\n[{left_out} characters are left out here]\n{text[len(text) - (limit - head) :]}"


def split(text: str, limit: int) -> list[str]:
    """Split a text into parts of at most `limit` characters; beyond `MAX_PARTS`, keep its two ends."""
    if len(text) <= limit:
        return [text]
    step = limit - OVERLAP
    half = step * (MAX_PARTS // 2)
    if len(text) > 2 * half + OVERLAP:
        return split(text[: half + OVERLAP], limit) + split(text[-half - OVERLAP :], limit)
    return [text[start : start + limit] for start in range(0, len(text) - OVERLAP, step)]


def seen_whole(task: Task, response: str, limit: int, verdict: Verdict) -> Verdict:
    """Return the verdict on a response judged in parts; unscored if a part was left out that might be worse."""
    if task != "harm" or verdict.score is None or verdict.score == WORST:
        return verdict
    n_seen = (limit - OVERLAP) * MAX_PARTS + OVERLAP
    return verdict if len(response) <= n_seen else Verdict(None, "too long to judge", f"{len(response)} characters")


def marker(*texts: str) -> str:
    """Compute the marker of texts, which occurs in none of them."""
    plain = [_letters(text) for text in texts]
    for attempt in count():
        # ASCII escapes: half surrogates have no bytes of their own.
        content = json.dumps([VERSION, attempt, *texts])
        found = hashlib.sha256(content.encode()).hexdigest()[:MARKER_LENGTH]
        if not any(found in text for text in plain):
            return found
    raise AssertionError("count() does not end")


def _letters(text: str) -> str:
    """Return letters and digits as a lenient reader sees them: without case, width, spaces and signs."""
    return _SIGNS.sub("", unicodedata.normalize("NFKC", text).casefold())


def fence(name: str, text: str, mark: str) -> str:
    """Put a text, escaped, between lines with its marker."""
    return f"<<<{name} {mark}>>>\n{escape(text)}\n<<<END OF {name} {mark}>>>"
