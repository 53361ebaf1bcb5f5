"""The experiments that compare direct SCORE with its surrogates: ``python -m training.experiments NAME``.

``problems`` says what is known and drawn, ``estimators`` how p_d is estimated, ``students`` what is trained;
``mixtures`` and its like are the experiments, each with its hypotheses; ``page`` writes docs/direct-score.md from what
they have stored.
"""
