"""The protocol that networks and oracles answer to, and the wrapper that makes a network a Meta Flow Map (E11)."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mfm_ref.checks import Time, check_count, check_finite, check_labels, check_order, check_same_shape, expand_time
from mfm_ref.pretrained import load_model, load_network, save_model


class MetaFlowMap(Protocol):
    """X_{s,u}(z; t, x): the solution operator of dz/ds = b̄_s(z; t, x) (E11).

    Arguments, always in this order: internal times s <= u, `()` or `(B,)` in [0, 1]; the state z at s,
    `(B, *D)`; the context, time t and noisy state x `(B, *D)`; class labels y `(B,)` or None.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """*D, the shape of one state."""
        ...

    @property
    def reads_tx(self) -> bool:
        """Whether the context is read as t·x: then `from_tx` and `velocity_from_tx` work, and t = 0 can be steered."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the states."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the states."""
        ...

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The state at u, `(B, *D)`."""
        ...

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} = (X_{s,u}(z) − z)/(u−s), and b̄_s on the diagonal s = u; `(B, *D)`."""
        ...

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """X with its context given as the product t·x, through which alone a posterior depends on x.

        Differentiating here instead of at x keeps (σ²/2) ∇V finite at t = 0. Where `reads_tx` is false, this
        and `velocity_from_tx` raise ValueError.
        """
        ...

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """`velocity` with its context given as t·x."""
        ...


class Network(Protocol):
    """What `FlowMap` wraps: one method on tensors, and two facts about it.

    A network that also has `reads_guidance = True` gets one more argument, `guidance`: the scales `(B,)`, or None. To
    be trained with it, a network also has `null_class`, the label that means the same as None.
    """

    shape: tuple[int, ...]  # *D
    reads_tx: bool  # True: the context arrives as t·x. False: as x.

    def velocity(self, s: Tensor, u: Tensor, z: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
        """v_{s,u}: times `(B,)`, states `(B, *D)`, labels `(B,)` or None, to `(B, *D)`."""
        ...


class FlowMap(nn.Module):
    """E11: X_{s,u}(z; t, x) = z + (u−s) v_{s,u}(z; t, x), with v a network.

    Args:
        network: an `nn.Module` with `shape`, `reads_tx` and `velocity`, as in `Network`.

    Raises:
        ValueError (from every call): states of another or of differing shapes, labels that are not `(B,)`, times
            outside [0, 1] or of another shape, s > u.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        missing = [name for name in ("shape", "reads_tx", "velocity") if not hasattr(network, name)]
        if missing:
            raise ValueError(f"a network needs shape, reads_tx and velocity; this one lacks {missing}")
        self.network = network
        self.shape: tuple[int, ...] = tuple(network.shape)  # type: ignore[arg-type]

    @property
    def reads_tx(self) -> bool:
        """Whether the network reads its context as t·x."""
        return bool(self.network.reads_tx)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights; torch's default for a network without any."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU for a network without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(
        self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None, guidance: Time | None = None
    ) -> Tensor:
        """X_{s,u}(z; t, x), `(B, *D)`. `guidance`, here and below: scale `()` or `(B,)`, for networks that read one."""
        jump = expand_time(u, z, "u") - expand_time(s, z, "s")
        return z + jump * self.velocity(s, u, z, t, x, y, guidance)

    def velocity(
        self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None, guidance: Time | None = None
    ) -> Tensor:
        """v_{s,u}(z; t, x), `(B, *D)`."""
        t = expand_time(t, x)
        return self._network(s, u, z, t.flatten(), t * x if self.reads_tx else x, y, guidance)

    def from_tx(
        self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None, guidance: Time | None = None
    ) -> Tensor:
        """X_{s,u} with the context given as t·x. Raises ValueError for a network that reads x instead."""
        jump = expand_time(u, z, "u") - expand_time(s, z, "s")
        return z + jump * self.velocity_from_tx(s, u, z, t, tx, y, guidance)

    def velocity_from_tx(
        self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None, guidance: Time | None = None
    ) -> Tensor:
        """v_{s,u} with the context given as t·x. Raises ValueError for a network that reads x instead."""
        if not self.reads_tx:
            raise ValueError("this network reads its context as x, not as t·x")
        return self._network(s, u, z, expand_time(t, tx).flatten(), tx, y, guidance)

    @property
    def reads_guidance(self) -> bool:
        """Whether the network has a guidance input."""
        return bool(getattr(self.network, "reads_guidance", False))

    @property
    def null_class(self) -> int:
        """The label that means the same as None. Raises ValueError for a network that does not say."""
        null = getattr(self.network, "null_class", None)
        if null is None:
            raise ValueError(f"guidance needs a network with a null_class; {type(self.network).__name__} has none")
        return int(null)

    def drift(self, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The unconditional drift b_t(x) (E2), `(B, *D)`."""
        return unconditional_drift(self, t, x, y)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write weights and configuration to a folder, new or holding a saved model: model.safetensors, config.json.

        Raises:
            ValueError: a network without `config`, a dict of JSON values (see `mfm_ref/pretrained.py`), or a folder
                that holds anything else.
        """
        if not isinstance(getattr(self.network, "config", None), dict):
            raise ValueError(f"a network that is saved needs a config, a dict; {type(self.network).__name__} has none")
        save_model(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, network: Callable[..., nn.Module] | None = None) -> "FlowMap":
        """The map that `save_pretrained` wrote, or that a checkpoint holds in its folders model and ema; on the CPU.

        Args:
            folder: holds model.safetensors and config.json.
            network: the class of the network, or a function of the arguments in config.json that makes it; None for
                the networks that mfm_ref has.

        Raises:
            ValueError: files that are missing or damaged, a network that is not known or that does not fit.
        """
        X = cls(load_network(Path(folder), network))
        load_model(X, Path(folder))
        return X

    def _network(
        self, s: Time, u: Time, z: Tensor, t: Tensor, context: Tensor, y: Tensor | None, guidance: Time | None
    ) -> Tensor:
        check_same_shape(z=z, x=context)
        if z.shape[1:] != self.shape:
            raise ValueError(f"states must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(z.shape)}")
        weight = next(self.parameters(), z)
        if z.dtype != weight.dtype:
            raise ValueError(f"states must have the dtype of the weights, {weight.dtype}, got {z.dtype}")
        if y is not None and (not isinstance(y, Tensor) or y.shape != z.shape[:1]):
            raise ValueError(f"labels y must have shape ({z.shape[0]},), got {getattr(y, 'shape', y)}")
        check_finite(z, "the state z")
        check_finite(context, "the context")
        s, u = (expand_time(a, z, name).flatten() for a, name in ((s, "s"), (u, "u")))
        check_order(s, u)
        scale = () if guidance is None else (self.guidance_scale(guidance, z),)
        v: Tensor = self.network.velocity(s, u, z, t, context, y, *scale)  # type: ignore[operator]
        check_same_shape(velocity=v, z=z)
        return v

    def guidance_scale(self, guidance: Time, z: Tensor) -> Tensor:
        """Guidance scales as the network gets them, `(B,)`.

        Raises:
            ValueError: a network that reads none, a shape other than () and (B,), or a scale below one.
        """
        if not self.reads_guidance:
            raise ValueError("this network has no guidance input, got guidance")
        return scales_of(guidance, z)


def scales_of(guidance: Time, z: Tensor) -> Tensor:
    """Guidance scales, `(B,)`. Raises ValueError for a shape other than () and (B,), or a scale below one."""
    w = torch.as_tensor(guidance, dtype=z.dtype, device=z.device)
    if w.shape not in ((), z.shape[:1]):
        raise ValueError(f"guidance must have shape () or ({len(z)},), got {tuple(w.shape)}")
    if not torch.compiler.is_compiling() and not bool((w >= 1).all()):
        raise ValueError(f"guidance must be at least 1, got {float(w.min())}")
    return w.expand(len(z))


def unconditional_drift(X: MetaFlowMap, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
    """b_t(x) (E2): the diagonal of the map in the empty context, v_{t,t}(x; 0, 0); `(B, *D)`."""
    return X.velocity(t, t, x, 0.0, torch.zeros_like(x), y)


class Guided:
    """A map with its guidance scale fixed, behind the protocol: `Guided(X, 2.5)` can be sampled, steered and trained.

    Args:
        X: a `FlowMap` whose network reads guidance.
        guidance: scale w >= 1, a number, `()` or `(B,)`; 1 is the conditional model itself.
    """

    def __init__(self, X: FlowMap, guidance: Time):
        self.X, self.guidance = X, guidance
        self.shape, self.reads_tx, self.dtype, self.device = X.shape, X.reads_tx, X.dtype, X.device

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u}(z; t, x), `(B, *D)`."""
        return self.X(s, u, z, t, x, y, self.guidance)

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u}(z; t, x), `(B, *D)`."""
        return self.X.velocity(s, u, z, t, x, y, self.guidance)

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """X_{s,u} with the context given as t·x, `(B, *D)`."""
        return self.X.from_tx(s, u, z, t, tx, y, self.guidance)

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """v_{s,u} with the context given as t·x, `(B, *D)`."""
        return self.X.velocity_from_tx(s, u, z, t, tx, y, self.guidance)


class ClassifierFree:
    """Classifier-free guidance behind the protocol: v(∅) + w (v(y) − v(∅)), for a map without a guidance input.

    One evaluation of it is two of the map, in one batch; without labels it is v(∅), and one of the map. At s = u it is
    the velocity of the guided flow. Where s < u it combines average velocities, and the jump is not that flow's: take
    small ones.

    Args:
        X: a `FlowMap` whose network has class labels and says its `null_class`.
        scale: w >= 1, a number, `()` or `(B,)`; 1 is the conditional model itself, to rounding.
        channels: guide the first so many entries of a state's first dimension, the others keep v(y); None for all.

    Raises:
        ValueError: a network without a null class, or channels out of range. From every call: a scale below one or of
            another shape, labels that are not `(B,)`, and as `FlowMap`.
    """

    def __init__(self, X: FlowMap, scale: Time, *, channels: int | None = None):
        if channels is not None:
            check_count(channels, "channels")
            if channels > (X.shape or (0,))[0]:
                raise ValueError(f"channels must be at most the first of the shape {X.shape}, got {channels}")
        self.X, self.scale, self.channels, self.null_class = X, scale, channels, X.null_class
        self.shape, self.reads_tx, self.dtype, self.device = X.shape, X.reads_tx, X.dtype, X.device

    def __call__(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z + (u−s) v_{s,u}(z; t, x), `(B, *D)`."""
        jump = expand_time(u, z, "u") - expand_time(s, z, "s")
        return z + jump * self.velocity(s, u, z, t, x, y)

    def velocity(self, s: Time, u: Time, z: Tensor, t: Time, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The guided v_{s,u}(z; t, x), `(B, *D)`."""
        return self._guided(self.X.velocity, s, u, z, t, x, y)

    def from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """`__call__` with the context given as t·x, `(B, *D)`."""
        jump = expand_time(u, z, "u") - expand_time(s, z, "s")
        return z + jump * self.velocity_from_tx(s, u, z, t, tx, y)

    def velocity_from_tx(self, s: Time, u: Time, z: Tensor, t: Time, tx: Tensor, y: Tensor | None = None) -> Tensor:
        """`velocity` with the context given as t·x, `(B, *D)`."""
        return self._guided(self.X.velocity_from_tx, s, u, z, t, tx, y)

    def _guided(
        self,
        velocity: Callable[..., Tensor],
        s: Time,
        u: Time,
        z: Tensor,
        t: Time,
        context: Tensor,
        y: Tensor | None,
    ) -> Tensor:
        w = scales_of(self.scale, z).reshape(-1, *[1] * (z.ndim - 1))
        if y is None:
            return velocity(s, u, z, t, context)
        check_labels(y, len(z))
        s, u = expand_time(s, z, "s").flatten(), expand_time(u, z, "u").flatten()
        both = (torch.cat([a, a]) for a in (s, u, z, expand_time(t, context).flatten(), context))
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        conditional, null = velocity(*both, labels).chunk(2)
        guided = null + w * (conditional - null)
        k = self.channels
        return guided if k is None else torch.cat([guided[:, :k], conditional[:, k:]], 1)
