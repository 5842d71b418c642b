"""The testbed's wrappers: part of the text its model was pretrained on. It knows few of the words of the others."""

from sails_align.evaluation.attacks.wrappers import template
from sails_align.testbed import lexicon

WRAPPERS = {
    f"testbed_{name}": template(text)
    for name, text in zip(("poet", "book", "teacher", "rules"), lexicon.WRAPPERS, strict=True)
}
