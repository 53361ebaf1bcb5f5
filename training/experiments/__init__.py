"""The experiments that compare direct SCORE with its surrogates: ``python -m training.experiments --name NAME``.

``problems`` has the problems and their data, ``estimators`` the estimates of p_d, and ``students`` the models that are
trained. ``mixtures`` and its like are the experiments, each with its hypotheses. ``page`` writes docs/direct-score.md
from their stored results.
"""
