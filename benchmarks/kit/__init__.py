"""Tests, checks of memory and measurements on a GPU, in one run that needs no compiler: ``make gpu-kit``, ``run.sh``.

Every phase is a file here with ``items(options)``, what it does in turn, and ``run(item, options, emit)``.
"""
