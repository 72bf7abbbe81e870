"""Random trials of the whole: ``make test`` runs some, ``python -m tests.fuzz`` as many as time allows.

A trial is a number: the seed of all that it draws. It raises where something is wrong.
"""
