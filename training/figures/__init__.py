"""The paper's figures and tables, made again: ``python -m training.figures``.

A file for each figure (``figure_1`` …), whose docstring holds its claims with their tolerances, ``tables`` for Tables 1
to 4, ``toy_fits`` for the trainings on the one-dimensional toy, ``claims`` for verdicts and files.
"""
