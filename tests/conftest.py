"""One thread and fixed examples: a test that passed once passes again. And quick pictures."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from matplotlib.layout_engine import ConstrainedLayoutEngine

settings.register_profile("mfm_ref", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("mfm_ref")
torch.set_num_threads(1)
PLACE = ConstrainedLayoutEngine.execute


def pytest_configure(config: pytest.Config) -> None:
    """Let torch.func.jvp load: on its first call torch compiles rules of its own by a function it deprecates."""
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(scope="session", autouse=True)
def quick_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw without placing the text, which takes longer than all that a fast run computes; `-m slow` places it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.markexpr == "not slow":
            patch.setattr(ConstrainedLayoutEngine, "execute", lambda engine, figure: None)
        yield


@pytest.fixture(scope="module")
def placed_text() -> Iterator[None]:
    """Place the text of a file's pictures all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConstrainedLayoutEngine, "execute", PLACE)
        yield
