"""The Meta Flow Map of one Gaussian, in closed form: the oracle's simplest case and the toys' preconditioner.

Everything here is elementwise, for coordinates that are independent under p₁ (the principal axes of the data).
"""

import torch
from torch import Tensor


def gaussian_posterior(t: Tensor, tx: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E3 for N(mean, var), from the product t·x: the posterior's mean m and standard deviation c, and the evidence ξ.

    With den = t² var + (1−t)², the variance of x: ξ = (t x − t² mean)/√den, which is t times a standard normal; then
    m = mean + var/√den ξ and c = (1−t) √(var/den).

    Args:
        t: time, in [0, 1]; tx: the product t·x; mean, var: of p₁, var > 0. Shapes broadcast.
    """
    std = var.sqrt()
    root = torch.hypot(t * std, 1 - t)
    evidence = (tx - t * t * mean) / root
    return mean + var / root * evidence, (1 - t) * std / root, evidence


def posterior_std(t: Tensor, var: Tensor | float) -> Tensor:
    """c_t = (1−t) √(var/(t² var + (1−t)²)): the size of one posterior of data of variance `var` per coordinate."""
    std = var**0.5
    return (1 - t) * std / torch.hypot(t * std, 1 - t)


def gaussian_std(s: Tensor, std: Tensor) -> Tensor:
    """S_s = √((1−s)² + s² std²): the standard deviation of Ī_s (E9) when x₁ has standard deviation `std`."""
    return torch.hypot(1 - s, s * std)


def gaussian_velocity(s: Tensor, u: Tensor, z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """E11 for N(mean, var): v_{s,u}(z), so that z + (u−s) v = u mean + (S_u/S_s)(z − s mean).

    (S_u − S_s)/(u − s) = ((1+var)(s+u) − 2)/(S_s + S_u) needs no division by u − s, so s = u is no special
    case. Where S_s = 0 (s = 1, var = 0) the state is the mean itself and v = mean.

    Args:
        s, u: internal times in [0, 1]; z: the state at s; mean, var: of the target, var >= 0. Shapes broadcast.
    """
    std_s, std_u = gaussian_std(s, var.sqrt()), gaussian_std(u, var.sqrt())
    regular = std_s > 0
    slope = ((1 + var) * (s + u) - 2) / torch.where(regular, std_s * (std_s + std_u), 1.0)
    return mean + torch.where(regular, slope, 0.0) * (z - s * mean)


def angle_of_time(s: Tensor, std: Tensor) -> Tensor:
    """θ = atan2(s c, 1−s) in [0, π/2]: (Ī_s − s m)/S_s = cos θ x̄₀ + sin θ (x₁ − m)/c, for x₁ of mean m, std c."""
    return torch.atan2(s * std, 1 - s)


def time_of_angle(angle: Tensor, std: Tensor) -> Tensor:
    """s = sin θ/(sin θ + c cos θ), the inverse of `angle_of_time`; angles beyond π/2 give 1."""
    angle = angle.clamp(0, torch.pi / 2)
    return torch.where(angle < torch.pi / 2, angle.sin() / (angle.sin() + std * angle.cos()), 1.0)
