"""The teacher: guidance by algebra on what its weights hold, in as few passes as that allows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imagenet.run import Passes
from imagenet.teacher import Teacher
from mfm_ref import MLP, ClassifierFree, FlowMap, Guided
from mfm_ref.flow_map import unconditional_drift
from tests import test_paper_recipe as exact
from tests.imagenet_tiny import tiny_sit
from tests.strategies import SEEDS, assert_close, randn, rng

N, NULL = 7, 2  # rows, and the null class
DISTILLED = 2.5


def network(kind):
    """A tiny network in double precision, and rows for it: t, x, y with the null class among them, w."""
    options = {"noise_times": True} if kind == "dmf" else {}
    X = FlowMap(tiny_sit(kind, **options).double()).requires_grad_(False)
    y, g = torch.arange(N) % (NULL + 1), rng(0)
    return X, torch.rand(N, generator=g, dtype=torch.float64), randn(N, *X.shape, seed=1), y


def guidance(y, w=DISTILLED):
    return torch.where(y == NULL, 1.0, w).double()


def test_at_the_distilled_scale_one_pass_is_the_teacher():
    """To the bit; rows of the null class too, whatever their w is."""
    X, t, x, y = network("dmf")
    expected, passes = X.drift(t, x, y), Passes(X)
    teacher = Teacher(X, DISTILLED, one_scale=True)
    for w in (guidance(y), torch.full((N,), DISTILLED, dtype=torch.float64)):
        assert torch.equal(teacher(t, x, y, w), expected)
    assert passes.rows == 2 * N and teacher.passes == 1


def test_other_scales_are_those_of_the_published_algebra():
    """v_c = 0.4 v_d + 0.6 v_∅, then v_∅ + w (v_c − v_∅), and v_d where w is d; in one batch of two passes a row."""
    X, t, x, y = network("dmf")
    w = torch.linspace(1, 4, N, dtype=torch.float64)
    w[3] = DISTILLED
    distilled, null = X.drift(t, x, y), X.drift(t, x, torch.full_like(y, NULL))
    conditional = 0.4 * distilled + 0.6 * null
    expected = null + w.reshape(-1, 1, 1, 1) * (conditional - null)
    assert torch.equal(null, X.drift(t, x))
    passes, teacher = Passes(X), Teacher(X, DISTILLED)
    found = teacher(t, x, y, w)
    assert passes.rows == 2 * N and teacher.passes == 2
    assert_close(found, expected, 1e-12, 10)
    assert_close(found[3], distilled[3], 1e-12, 10)
    assert_close(found[y == NULL], null[y == NULL], 1e-12, 10)
    for wrong in (w, w / DISTILLED**2):  # d left out, and twice
        other = null + wrong.reshape(-1, 1, 1, 1) * (distilled - null)
        assert (found - other).abs().max() > 0.1


@given(SEEDS, st.floats(1, 6), st.lists(st.floats(1, 6), min_size=5, max_size=5))
def test_exact_drifts_of_gaussians_at_every_scale(seed, d, scales):
    """A network that holds d exactly gives the exact drift at any w, where labels are dropped too."""
    held = exact.Guided(seed % 1000, scale=d)
    teacher, right = Teacher(FlowMap(held), d), exact.teacher_of(held)
    t, w = torch.linspace(0, 1, 5, dtype=torch.float64), torch.tensor(scales, dtype=torch.float64)
    x, y = randn(5, 2, seed=seed % 99), torch.tensor([0, 1, exact.K, 2, 0])
    assert_close(teacher(t, x, y, w), right(t, x, y, w), 1e-10, 1 + right(t, x, y, w).abs())


def test_a_sit_holds_no_guidance_and_is_guided_classifier_free():
    X, t, x, y = network("sit")
    w = torch.linspace(1, 4, N, dtype=torch.float64)
    expected = unconditional_drift(ClassifierFree(X, w), t, x, y)
    assert_close(Teacher(X)(t, x, y, w), expected, 1e-12, 10)
    assert torch.equal(Teacher(X, one_scale=True)(t, x, y, torch.ones_like(t)), X.drift(t, x, y))


def test_a_network_that_reads_guidance_gets_it():
    X, t, x, y = network("mfm")
    w = guidance(y)
    expected, passes = unconditional_drift(Guided(X, w), t, x, y), Passes(X)
    teacher = Teacher(X, 3.0)
    assert torch.equal(teacher(t, x, y, w), expected)
    assert passes.rows == N and teacher.passes == 1
    assert not torch.equal(teacher(t, x, y, torch.ones_like(w)), expected)


def test_no_graph_is_kept():
    X, t, x, y = network("dmf")
    X.requires_grad_(True)
    assert not Teacher(X, DISTILLED)(t, x.requires_grad_(), y, guidance(y)).requires_grad


def test_broken_promises_and_what_is_out_of_range_are_refused():
    X, t, x, y = network("dmf")
    teacher = Teacher(X, DISTILLED, one_scale=True)
    with pytest.raises(ValueError, match=r"every row with a label must have w = 2.5, the teacher's, got 1.0"):
        teacher(t, x, y, torch.ones_like(t))
    with pytest.raises(ValueError, match=r"guidance must be at least 1, got 0\.5"):
        Teacher(X)(t, x, y, torch.full_like(t, 0.5))
    with pytest.raises(ValueError, match=r"labels y must have shape \(7,\), got \(3,\)"):
        teacher(t, x, y[:3], guidance(y))
    for scale in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="the teacher's scale must be positive and finite"):
            Teacher(X, scale)
    with pytest.raises(ValueError, match="guidance needs a network with a null_class"):
        Teacher(FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8)))
