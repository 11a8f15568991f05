"""Checkpoints of a run: whole folders or none, the newest two kept, refused with the reason where they do not fit.

step-00000500/model/    the weights; `FlowMap.from_pretrained` reads this folder
step-00000500/ema/      the averaged weights, likewise
step-00000500/state.pt  optimiser, schedule, random sources and data position of every process, losses so far
step-00000500/run.json  which run it belongs to, and the size of each file
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from mfm_ref.files import atomic_folder, fill_weights, load_json, read_weights, remove_folder, save_json
from mfm_ref.pretrained import WEIGHTS, save_model

FORMAT = "mfm_ref checkpoint 2"  # 1, of mfm_ref 0.2, had other streams of random numbers
KEPT = 2
NAME = "step-" + 8 * "[0-9]"  # as a pattern


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        identity: JSON values that say which run they belong to; a checkpoint that says otherwise is refused.
    """

    folder: Path
    identity: dict[str, Any]

    def newest(self) -> Path | None:
        """The checkpoint of the latest step, None where there is none."""
        return max(self.folder.glob(NAME), default=None)

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` updates lies."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, model: nn.Module, average: nn.Module, state: dict[str, Any]) -> Path:
        """Write the checkpoint after `step` updates, then delete all but the newest two.

        Raises:
            OSError: it could not be written (a full disk); the checkpoints before it are as they were.
        """
        path = self.path(step)
        try:
            with atomic_folder(path) as temporary:
                save_model(model, temporary / "model")
                save_model(average, temporary / "ema")
                torch.save(state, temporary / "state.pt")
                files = {str(file.relative_to(temporary)): file.stat().st_size for file in _files(temporary)}
                save_json({"format": FORMAT, "identity": self.identity, "files": files}, temporary / "run.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors hide the OSError
            raise OSError(
                f"the checkpoint {path} could not be written; the last good one is {self.newest()}: {error}"
            ) from error
        for old in sorted(self.folder.glob(NAME))[:-KEPT]:
            remove_folder(old)
        self._clear()
        return path

    def _clear(self) -> None:
        """Delete what processes that died left half written or half deleted."""
        for left in self.folder.glob(f".*.{NAME}"):
            shutil.rmtree(left, ignore_errors=True)

    def load(self, path: Path, model: nn.Module, average: nn.Module) -> dict[str, Any]:
        """Read weights into `model` and `average`, and return the state that was saved with them.

        Raises:
            ValueError: no checkpoint, one that is truncated, or one of another run or another model.
        """
        run = load_json(path / "run.json")
        if run.get("format") != FORMAT:
            raise ValueError(f"{path} must be a checkpoint of the format {FORMAT!r}, got {run.get('format')!r}")
        self._check_identity(path, run.get("identity"))
        for name, size in dict(run.get("files", {"state.pt": "some"})).items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                raise ValueError(
                    f"the checkpoint {path} is damaged: {name} must have {size} bytes, got {found}. "
                    "Remove this folder to go on from the checkpoint before it"
                )
        weights = {part: read_weights(path / part / WEIGHTS) for part in ("model", "ema")}
        try:
            state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways, none of which names the file
            fault = type(error).__name__
            raise ValueError(f"the checkpoint {path} is damaged: state.pt cannot be read ({fault})") from error
        fill_weights(model, weights["model"], path / "model" / WEIGHTS)
        fill_weights(average, weights["ema"], path / "ema" / WEIGHTS)
        self._clear()  # a finished run writes no more
        return state

    def _check_identity(self, path: Path, found: Any) -> None:
        there, here = _flat(found), _flat(self.identity)
        differing = [
            f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
            for name in dict.fromkeys([*here, *there])
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise ValueError(
                f"{path} belongs to a run with other settings; remove it or write elsewhere: {'; '.join(differing)}"
            )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flat(identity: Any) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, tuples as the lists that JSON makes of them."""
    if not isinstance(identity, dict):
        return {"identity": identity}
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": held for inner, held in _flat(value).items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat
