"""What a run says while it goes on: metrics.jsonl, a line of JSON a logged step, and TensorBoard where asked for."""

import json
from pathlib import Path
from typing import Any

from mfm_ref.files import atomic_path


class RunLog:
    """Numbers of a run, one dictionary a logged step.

    Args:
        folder: holds metrics.jsonl; None to log nothing.
        step: the first step to come; what a killed run logged from there on is removed.
        tensorboard: also write events to `folder`/tensorboard.

    Raises:
        ImportError: TensorBoard asked for and not installed.
    """

    def __init__(self, folder: Path | None, step: int, *, tensorboard: bool = False):
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.events: Any = None
        if folder is not None and tensorboard:
            self.events = _summary_writer(folder / "tensorboard", step)
        if self.path is not None:
            kept = [line for line in self._lines() if _step(line) < step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(kept))

    def write(self, numbers: dict[str, float]) -> None:
        """Add one line; `numbers` has the key "step"."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(numbers) + "\n")
        if self.events is not None:
            for name, value in numbers.items():
                if name != "step":
                    self.events.add_scalar(name, value, int(numbers["step"]))

    def close(self) -> None:
        """Finish the events of TensorBoard."""
        if self.events is not None:
            self.events.close()

    def _lines(self) -> list[str]:
        assert self.path is not None
        return self.path.read_text().splitlines(keepends=True) if self.path.exists() else []


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=True needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step)
