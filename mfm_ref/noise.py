"""Where noise comes from, and the noises ε of posterior draws: independent, antithetic, or quasi-Monte Carlo."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from mfm_ref.checks import check_count

# One generator for all rows of a batch, one for each row, or torch's own.
Source = torch.Generator | Sequence[torch.Generator] | None

_BITS = SobolEngine.MAXBIT  # of torch's Sobol points


def normal(shape: tuple[int, ...], like: Tensor, generator: Source = None, *, rows: int = 0) -> Tensor:
    """Standard normal numbers with the dtype and the device of `like`.

    From a sequence of generators row i is drawn from generator i alone, on that generator's device: it is the same
    whatever batch it is in.

    Args:
        shape: of the result.
        like: gives dtype and device.
        generator: source of the numbers.
        rows: the dimension of the shape that counts the rows of the batch, one for each generator of a sequence.

    Raises:
        ValueError: a sequence that has not one generator for each row.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    if len(generator) != shape[rows]:
        raise ValueError(f"generators must be one for each of {shape[rows]} rows, got {len(generator)}")
    result = torch.empty(shape, dtype=like.dtype, device=like.device)
    for row, source in zip(result.unbind(rows), generator, strict=True):
        row.copy_(torch.randn(row.shape, generator=source, dtype=like.dtype, device=source.device))
    return result


def posterior_noise(n: int, x: Tensor, kind: str = "sobol", *, generator: Source = None) -> Tensor:
    """n standard normal noises for each row of x, `(n, B, *D)`. Each ε_i alone is exactly N(0, I), for every kind.

    - "independent": what the name says.
    - "antithetic": pairs ε, −ε, so that the mean of an odd function has no error, and that of an even one √2 times
      the error of independent draws; the last one of an odd n has no partner.
    - "sobol": n points of a Sobol sequence, scrambled anew at each call and shifted anew for each row, through the
      normal quantile function. They fill the space evenly, best for n a power of two. Where few directions matter,
      the mean of a smooth function has an error that falls faster than 1/n. For a function of the sum of many
      coordinates it is that of independent draws, or less, or (an even function) up to 1.2 times that.

    Rows are independent of each other (for "sobol" from one generator, given the scrambling that they share).

    Args:
        n: draws per row, >= 1.
        x: states `(B, *D)`; gives shape, dtype and device.
        kind: as above. Coordinates beyond the 21201st, where torch's Sobol sequence ends, are independent.
        generator: source of randomness; of a sequence, generator b gives all of row b, whatever batch it is in.

    Raises:
        ValueError: n below one, an unknown kind, or a sequence that has not one generator for each row.
    """
    check_count(n, "n")
    if kind == "independent":
        return normal((n, *x.shape), x, generator, rows=1)
    if kind == "antithetic":
        half = normal(((n + 1) // 2, *x.shape), x, generator, rows=1)
        return torch.stack([half, -half], 1).flatten(0, 1)[:n]
    if kind == "sobol":
        flat = x.reshape(len(x), -1)
        few, rest = flat[:, : SobolEngine.MAXDIM], flat[:, SobolEngine.MAXDIM :]
        beyond = normal((n, *rest.shape), rest, generator, rows=1)
        return torch.cat([_sobol(n, few, generator), beyond], -1).reshape(n, *x.shape)
    raise ValueError(f'noise must be "independent", "antithetic" or "sobol", got {kind!r}')


def _sobol(n: int, x: Tensor, generator: Source) -> Tensor:
    """Sobol points, shifted by an own exclusive or for each row of x `(B, D)`; `(n, B, D)`.

    They have one random scrambling for all rows, or one for each where each has its generator.
    """
    shift = _integers(2**_BITS, x.shape, x, generator)
    shared = generator is None or isinstance(generator, torch.Generator)
    digits = _scrambled(n, x, x.shape[1:] if shared else x.shape, generator)
    result = torch.empty((n, *x.shape), dtype=x.dtype, device=x.device)
    for point, row in zip(digits, result, strict=True):  # one by one: in double precision all of them take much memory
        uniform = (point ^ shift).double().add_(0.5).div_(2**_BITS)  # never 0 or 1
        row.copy_(torch.special.ndtri(uniform))
    return result


def _scrambled(n: int, x: Tensor, shape: tuple[int, ...], generator: Source) -> Tensor:
    """Digits of the points, times random matrices of bits: lower triangular, ones on their diagonals; `(n, *shape)`.

    Bit j of a point, counted from the highest, adds column j: that bit, and random ones below it.
    """
    points = _sobol_digits(n, shape[-1]).to(x.device).reshape(n, *[1] * (len(shape) - 1), shape[-1])
    result = points.new_zeros((n, *shape))
    for j in range((n - 1).bit_length()):  # bits beyond are 0 in all n points
        below = _BITS - 1 - j
        result ^= (points >> below & 1) * (_integers(2**below, shape, x, generator) + 2**below)
    return result


def _integers(high: int, shape: tuple[int, ...], x: Tensor, generator: Source) -> Tensor:
    """Random integers below `high`, int32, on the device of x; of a sequence, generator b gives those of row b."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randint(high, shape, generator=generator, dtype=torch.int32, device=device).to(x.device)
    return torch.stack([_integers(high, shape[1:], x, one) for one in generator])


@lru_cache(maxsize=4)
def _sobol_digits(n: int, dim: int) -> Tensor:
    """The first n points of the Sobol sequence, not scrambled, as integers below 2^_BITS; `(n, D)`, on the CPU."""
    points = SobolEngine(dim).draw(n, dtype=torch.float64)
    return (points * 2**_BITS).int()
