import pytest
import torch


@pytest.fixture
def exact_float32(monkeypatch):
    """float32 means float32, but where a test asks for TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
