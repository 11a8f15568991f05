"""One thread and fixed examples: a test that passed once passes again."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("mfm_ref", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("mfm_ref")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Let torch.func.jvp load: on its first call torch compiles rules of its own by a function it deprecates."""
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")
