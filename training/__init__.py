"""The programs of scorematch: ``python -m training.run``, ``compare``, ``evaluate`` and ``score``."""
