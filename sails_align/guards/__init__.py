"""Guards: small classifiers of prompts on a model's own hidden states, with a bound on what they let pass.

`fit` makes one, `calibrate` chooses its threshold on other prompts, and `guard` applies it.
"""
