"""What runs chains of convolutions on a GPU, in inference and in training, and which kernel runs a layer of them."""

from . import register as _register  # noqa: F401
