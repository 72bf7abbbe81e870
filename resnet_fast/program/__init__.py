"""What ``python -m resnet_fast.train`` and ``python -m resnet_fast.predict`` are made of; needs the extra ``train``."""
