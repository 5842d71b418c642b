"""Order the training examples in stages, the safety examples that are most similar to their targets first.

SafeR-CLIP (arXiv 2511.16743) trains in its first epoch on the easy pairs, in the second on easy and medium ones, and
then on all. Stage s of n holds the share s / n of the safety examples with the largest similarity (of
`nearest_refusal`), and the same share of the others, so that the ratio of helpful examples is that of the data. Each
stage is shuffled. The stages follow each other in the data, which one epoch in its order goes through.
"""

from dataclasses import replace

import numpy as np

from sails_align.data.options import CurriculumOptions
from sails_align.data.pairs import AlignmentExamples
from sails_align.data.transforms.nearest_refusal import SIMILARITY


def transform(examples: AlignmentExamples, options: CurriculumOptions, seed: int) -> AlignmentExamples:
    """Repeat and order the training examples."""
    n_stages = options.refusal_stages
    if n_stages is None:
        return examples
    rng = np.random.default_rng([seed, 2])  # not the draws of other transforms
    similarities = list(examples.train[SIMILARITY])
    compared = [index for index, similarity in enumerate(similarities) if similarity is not None]
    compared.sort(key=lambda index: -similarities[index])
    others = rng.permutation([index for index, similarity in enumerate(similarities) if similarity is None]).tolist()
    rows: list[int] = []
    for stage in range(1, n_stages + 1):
        parts = [part[: round(stage / n_stages * len(part))] for part in (compared, others)]
        rows += rng.permutation(np.array(parts[0] + parts[1], dtype=np.int64)).tolist()
    return replace(examples, train=examples.train.select(rows, keep_in_memory=True))
