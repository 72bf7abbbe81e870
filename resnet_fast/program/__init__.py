"""The modules behind ``python -m resnet_fast.train`` and ``resnet_fast.predict``; needs the extra ``train``."""
