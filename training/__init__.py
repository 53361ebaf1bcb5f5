"""The programs of scorematch, such as ``python -m training.run``; docs/reference/programs.md lists them all."""
