"""Triton kernels and their launchers; installed as ``resnet_fast._triton`` and imported where a GPU wants them.

A file names an operator and holds its kernels, the geometry of its launches (pure functions of shapes) and the function
that launches them through :mod:`resnet_fast.backends.launch`. What decides between them is in :mod:`resnet_fast.gpu`.
"""
