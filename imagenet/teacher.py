"""The frozen network that a map is distilled from, at any guidance, in as few passes as algebra allows."""

from collections.abc import Callable

import torch
from torch import Tensor

from mfm_ref import FlowMap
from mfm_ref.checks import check_labels, expand_time
from mfm_ref.flow_map import scales_of


class Teacher:
    """b_w of a network whose conditional drift holds guidance d already: b_w = b_∅ + (w/d) (b_d − b_∅).

    d is 2.5 for the published DMF and 1 for SiT. At w = d this is b_d itself, and for the null class b_∅ at every w:
    where all rows are of these two kinds, one pass gives all. Else labels and null class go through the network in one
    batch. A network that reads guidance gets w as its input, and needs one pass always.

    Args:
        X: the network as a map, frozen; it is read in the empty context, at s = u.
        scale: d > 0; of no meaning where the network reads guidance.
        one_scale: promise that w = d in every row that has a label. Only what is known beforehand can save a pass: a
            look at w would wait for the device, and compiled code has fixed sizes.

    Attributes:
        passes: forward passes for each row, 1 or 2.

    Raises:
        ValueError: a scale that is not positive, a network without a null class; from a call (not in compiled code) a
            row that breaks the promise, or a scale below one.
    """

    def __init__(self, X: FlowMap, scale: float = 1.0, *, one_scale: bool = False):
        if not 0 < scale < float("inf"):
            raise ValueError(f"the teacher's scale must be positive and finite, got {scale}")
        self.X, self.scale, self.one_scale, self.null_class = X, scale, one_scale, X.null_class
        self.passes = 1 if one_scale or X.reads_guidance else 2

    @torch.no_grad()
    def __call__(self, t: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        """b_t(x) of classes y at scales w: times `(B,)`, states `(B, *D)`, labels and scales `(B,)`, to `(B, *D)`."""
        check_labels(y, len(x))
        w, t = scales_of(w, x), expand_time(t, x).flatten()
        if self.X.reads_guidance:
            return self._drift(t, x, y, w)
        if self.one_scale:
            self._check_promise(y, w)
            return self._drift(t, x, y)
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        guided, null = self._drift(torch.cat([t, t]), torch.cat([x, x]), labels).chunk(2)
        return null + (w / self.scale).reshape(-1, *[1] * (x.ndim - 1)) * (guided - null)

    def _drift(self, t: Tensor, x: Tensor, y: Tensor, *scale: Tensor) -> Tensor:
        velocity: Callable[..., Tensor] = self.X.velocity
        return velocity(t, t, x, torch.zeros_like(t), torch.zeros_like(x), y, *scale)

    def _check_promise(self, y: Tensor, w: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        broken = (y != self.null_class) & (w != self.scale)
        if bool(broken.any()):
            raise ValueError(
                f"every row with a label must have w = {self.scale}, the teacher's, got {float(w[broken][0])}"
            )
