"""The paper's step: the law of its rows, its loss at exact maps and by hand, and what it draws from no one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from mfm_ref import MLP, ExactFlowMap, FlowMap, Watched
from mfm_ref.gaussian import gaussian_posterior, gaussian_velocity
from mfm_ref.paper_recipe import (
    STAGES,
    PaperRows,
    RowLaw,
    by_time,
    draw_rows,
    forward_equivalents,
    paper_loss,
)
from mfm_ref.recipe import LATEST_CONTEXT
from tests.helpers import LIMIT, finite_difference, line, z_scores
from tests.strategies import SEEDS, assert_close, randn, rng

K = 3  # classes; label K is the null class
SCALE = 2.5


def sources(n, seed=0):
    return [rng(1000 * seed + i) for i in range(n)]


def rows_of(stage, x1, y, *, seed=0, times="uniform", **law):
    """Rows and the number of diagonal ones."""
    return draw_rows(RowLaw(stage, times, K, **law), x1, y, sources(len(x1), seed))


# ---- exact maps ------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """Gaussians of one variance for all classes, the null class among them: guided by w, class y is the Gaussian with
    mean m_∅ + w (m_y − m_∅), so that its guided map is in closed form. `rule` makes the map wrong."""

    reads_tx, null_class, shape = True, K, (2,)

    def __init__(self, seed=0, scale=None, rule="right"):
        super().__init__()
        self.means, self.var = randn(K + 1, 2, seed=seed), 0.1 + randn(2, seed=seed + 1).square()
        self.reads_guidance, self.scale, self.rule = scale is None, scale, rule

    def velocity(self, s, u, z, t, context, y, guidance=None):
        s, u, t = (a.unsqueeze(-1) for a in (s, u, t))
        w = self.scale if guidance is None else guidance.unsqueeze(-1)
        w = {"unguided": 1.0, "too much": w + 1}.get(self.rule, w)
        mean = self.means[K] + w * (self.means[y] - self.means[K])
        if self.rule == "blind":
            t, context = 0 * t, 0 * context
        u = {"Euler": s, "one step": torch.ones_like(u)}.get(self.rule, u)
        mean, std, _ = gaussian_posterior(t, context, mean, self.var)
        return gaussian_velocity(s, u, z, mean, std**2)


def teacher_of(network):
    """Its exact drift b_t(x) at scale w, by E2 of a Gaussian: the diagonal of a map is another route to E12."""

    def teacher(t, x, y, w):
        t = t.unsqueeze(-1)
        mean = network.means[K] + w.unsqueeze(-1) * (network.means[y] - network.means[K])
        spread = (1 - t) ** 2 + t**2 * network.var
        return mean + (t * network.var - (1 - t)) / spread * (x - t * mean)

    return teacher


def data_of(network, n, seed=0):
    """Images of random classes."""
    y = torch.randint(K, (n,), generator=rng(seed))
    return network.means[y] + network.var.sqrt() * randn(n, 2, seed=seed + 1), y


@settings(max_examples=12)
@given(SEEDS, st.sampled_from(["map", "mfm"]), st.sampled_from(["uniform", "logit-normal"]), st.booleans())
def test_the_loss_is_zero_at_the_exact_map_of_a_teacher(seed, stage, times, several):
    """Rounding alone, 1e-12 in the mean square of velocities of size 10, of which the adaptive weight 1/(Δ² + 0.01)
    makes a hundred times as much at most."""
    network = Guided(seed % 1000)
    x1, y = data_of(network, 40, seed % 99)
    r, n = rows_of(stage, x1, y, seed=seed % 7, times=times, guidance=SCALE, plain_rate=0.5 * several)
    loss = paper_loss(FlowMap(network), r, n, teacher=teacher_of(network))
    assert loss.terms.keys() == {"diagonal", "consistency"}
    assert all(term < 1e-10 for term in loss.terms.values())


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("unguided", ("diagonal", "consistency")), ("too much", ("diagonal", "consistency")),
        ("blind", ("diagonal", "consistency")), ("Euler", ("consistency",)), ("one step", ("diagonal", "consistency")),
    ],
)  # fmt: skip
def test_other_maps_have_a_loss(rule, wrong):
    network = Guided(rule=rule)
    r, n = rows_of("mfm", *data_of(network, 200), guidance=SCALE)
    terms = paper_loss(FlowMap(network), r, n, teacher=teacher_of(network)).terms
    for name, term in terms.items():
        assert term > 0.01 if name in wrong else term < 1e-10


def test_in_the_empty_context_a_blind_map_is_exact():
    """The map stage asks nothing of the context: x is noise there, and t = 0."""
    network = Guided(rule="blind")
    r, n = rows_of("map", *data_of(network, 100), guidance=SCALE)
    assert (r.t == 0).all() and r.x.std() > 0.5
    assert all(term < 1e-10 for term in paper_loss(FlowMap(network), r, n, teacher=teacher_of(network)).terms.values())


class Oracle(nn.Module):
    """The exact map of a mixture as a network that knows no class apart; moved by θ_i φ in row i, from the last."""

    reads_tx, null_class = True, K

    def __init__(self, p1, theta=None):
        super().__init__()
        self.X, self.shape, self.theta = ExactFlowMap(p1), (p1.dim,), theta

    def velocity(self, s, u, z, t, context, y):
        v = self.X.velocity_from_tx(s, u, z, t, context)
        if self.theta is None:
            return v
        bump = torch.sin(z + context + (s + 2 * u).unsqueeze(-1))
        return v + self.theta[-len(z) :].unsqueeze(-1) * bump


@settings(max_examples=6)
@given(SEEDS, st.sampled_from(["map", "mfm"]))
def test_the_loss_is_zero_at_the_exact_map_of_a_mixture(seed, stage):
    """By quantile transport, whose derivatives the target needs; another law's map has a loss."""
    p1 = line()
    r, n = rows_of(stage, p1.sample(30, generator=rng(seed)), torch.zeros(30).long(), seed=seed % 11)
    early = PaperRows(*(a[r.s < 0.95] for a in r))  # later, the quantiles' tails lose digits
    n = int((r.s[:n] < 0.95).sum())
    teacher = lambda t, x, y, w: p1.drift(t, x)  # noqa: E731
    terms = paper_loss(FlowMap(Oracle(p1)), early, n, teacher=teacher).terms
    assert all(term < 1e-6 for term in terms.values())
    other = p1._from_eigen(p1.log_weights, p1.means + 1, p1.basis, p1.eigenvalues)
    assert all(term > 0.01 for term in paper_loss(FlowMap(Oracle(other)), early, n, teacher=teacher).terms.values())


def test_from_data_the_exact_map_is_stationary_without_adaptation():
    """p = 0: the gradients of rows, for the oracle moved by θ_i φ in row i, have mean zero at θ = 0 in both terms,
    6e-7 each; not at θ = 0.5, nor for jumps whose velocity is turned round."""
    p1, n = line(), 6_000
    x1 = p1.sample(n, generator=rng(0))
    r, _ = rows_of("mfm", x1, torch.zeros(n).long())
    r = r._replace(t=0.5 * r.t)  # late contexts, with their large velocities, would drown the rest
    x0 = (r.x - 2 * r.t.unsqueeze(-1) * x1.repeat(2, 1)) / (1 - 2 * r.t).unsqueeze(-1)
    r = r._replace(x=(1 - r.t).unsqueeze(-1) * x0 + r.t.unsqueeze(-1) * x1.repeat(2, 1))

    def scores(rows, theta=0.0):
        parameters = torch.full((2 * n,), theta, dtype=torch.float64, requires_grad=True)
        loss = paper_loss(FlowMap(Oracle(p1, parameters)), rows, n, p=0, p_consistency=0)
        (gradient,) = torch.autograd.grad(sum(loss.terms.values()), parameters)
        return [float(z_scores(half, 0.0)) for half in gradient.split(n)]

    assert max(map(abs, scores(r))) < LIMIT
    assert min(scores(r, theta=0.5)) > LIMIT
    sign = torch.cat([torch.ones(n), -torch.ones(n)]).unsqueeze(-1)
    assert abs(scores(r._replace(velocity=sign * r.velocity))[1]) > LIMIT


# ---- by hand -----------------------------------------------------------------------------------------------


def mlp(reads_guidance):
    """A small network with all weights random."""
    torch.manual_seed(1)
    network = MLP(
        torch.zeros(2).double(), torch.eye(2).double(), hidden=16, depth=2, n_classes=K, reads_guidance=reads_guidance
    )
    nn.init.normal_(network.outlet.weight, std=0.3)
    return network


@pytest.mark.parametrize("source", ["data", "guided", "guided late", "teacher"])
@pytest.mark.parametrize("reads_guidance", [False, True])
def test_the_loss_and_its_gradient_by_hand(source, reads_guidance):
    """v̇, the derivative of a jump by finite differences along the flow, weights and bins, each written out; the
    gradient is that of the residual with target and weight frozen, by finite differences of one weight."""
    X = FlowMap(mlp(reads_guidance))
    r, n = rows_of("mfm", randn(9, 2, seed=3), torch.arange(9) % K, guidance=3.0, drop=0.3, plain_rate=0.2, seed=2)
    w = (r.guidance,) if reads_guidance else ()
    start = {"guided": 0.0, "guided late": 0.4}.get(source)
    gaussians = Guided()
    teacher = teacher_of(gaussians) if source == "teacher" else None
    null = torch.full_like(r.y, K)
    with torch.no_grad():
        velocity = r.velocity
        if start is not None:
            plain = (torch.ones_like(r.guidance),) if reads_guidance else ()
            excess = X.velocity(r.s, r.s, r.z, r.t, r.x, r.y, *w) - X.velocity(r.s, r.s, r.z, r.t, r.x, null, *plain)
            omega = (1 - 1 / r.guidance) * (r.s >= start)
            velocity = velocity + omega.unsqueeze(-1) * excess
        if teacher:
            velocity = FlowMap(gaussians).velocity(r.s, r.s, r.z, r.t, r.x, r.y, r.guidance)
        h = 1e-5
        along = lambda a: X.velocity(  # noqa: E731
            r.s + a * (r.u > r.s), r.u, r.z + a * velocity, r.t, r.x, r.y, *w
        )
        target = velocity + (r.u - r.s).unsqueeze(-1) * finite_difference(along, 0.0, h)
        residual = X.velocity(r.s, r.u, r.z, r.t, r.x, r.y, *w) - target
    squared = residual.square().sum(1)
    weight = (squared + 0.02) ** -torch.tensor([0.25] * n + [0.75] * n, dtype=torch.float64) / n
    loss = paper_loss(X, r, n, teacher=teacher, guided_from=start, p=0.25, p_consistency=0.75, c=0.02)
    assert isinstance(loss, Watched)
    for name, part in (("diagonal", slice(n)), ("consistency", slice(n, None))):
        assert_close(loss.terms[name].detach(), (weight * squared)[part].sum(), 1e-6)
        for k in range(5):
            inside = (r.s[part] >= k / 5) & (r.s[part] < (k + 1) / 5)
            pair = torch.stack([squared[part][inside].sum() / 2, inside.sum()])
            assert_close(loss.watched[f"{name}_s{k / 5:.1f}"], pair.double(), 1e-6, 1 + pair)
    assert len(loss.watched) == 10 and not any(pair.requires_grad for pair in loss.watched.values())

    bias = X.network.outlet.bias

    def frozen(a):
        with torch.no_grad():
            bias[0] += a
            found = (weight * (X.velocity(r.s, r.u, r.z, r.t, r.x, r.y, *w) - target).square().sum(1)).sum()
            bias[0] -= a
        return found

    sum(loss.terms.values()).backward()
    assert_close(bias.grad[0], finite_difference(frozen, 0.0), 1e-6, 1 + bias.grad[0].abs())
    if source == "guided late":
        assert ((r.s < 0.4) & (r.guidance > 1)).any()


class Table(nn.Module):
    """The exact map of Gaussians whose means are weights, one for each class and scale."""

    shape, reads_tx, reads_guidance, null_class = (2,), True, True, K

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.full((K + 1, 2, 2), 2.0, dtype=torch.float64))

    def velocity(self, s, u, z, t, context, y, guidance):
        s, u, t = (a.unsqueeze(-1) for a in (s, u, t))
        law = gaussian_posterior(t, context, self.mean[y, (guidance > 1).long()], torch.full((2,), 0.3).double())
        return gaussian_velocity(s, u, z, law[0], law[1] ** 2)


def test_model_guidance_has_its_fixed_point_by_the_rows_that_are_drawn():
    """In the empty context means are at μ(∅) + w (μ(y) − μ(∅)); a null class that no row trains would stay put."""
    torch.manual_seed(0)
    X, law = FlowMap(Table()), RowLaw("map", "uniform", K, drop=0.3, guidance=2.5)
    true = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]][:K], dtype=torch.float64)
    optimizer = torch.optim.Adam(X.parameters(), lr=0.2)
    steps, n = 200, 96
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - k / steps)
        y = torch.arange(n) % K
        x1 = true[y] + 0.3**0.5 * torch.randn(n, 2, dtype=torch.float64)
        r, half = draw_rows(law, x1, y, [torch.Generator().manual_seed(k * n + i) for i in range(n)])
        optimizer.zero_grad()
        sum(paper_loss(X, r, half, guided_from=0.0, p=0.0, p_consistency=0.0).terms.values()).backward()
        optimizer.step()
    mean = X.network.mean.detach()
    null = true.mean(0)
    assert (mean[K, 0] - null).abs().max() < 0.15
    assert (mean[:K, 1] - (null + 2.5 * (true - null))).abs().max() < 0.4


def test_a_flow_has_diagonal_rows_alone_and_its_loss_is_the_sum_of_squares():
    X = FlowMap(mlp(False))
    r, n = rows_of("flow", randn(9, 2, seed=3), torch.arange(9) % K)
    loss = paper_loss(X, r, n, p=0.0)
    assert n == len(r.s) == 9 and loss.terms.keys() == {"diagonal"} and len(loss.watched) == 5
    right = (X.velocity(r.s, r.s, r.z, 0.0, r.x, r.y) - r.velocity).square().sum() / 9
    assert_close(loss.terms["diagonal"], right, 1e-12)


class Counting(nn.Module):
    """Counts the rows of each call, of a network beneath it."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows = network, []
        for name in ("shape", "reads_tx", "reads_guidance", "null_class"):
            setattr(self, name, getattr(network, name, False))

    def velocity(self, s, *rest):
        self.rows.append(len(s))
        return self.network.velocity(s, *rest)


@pytest.mark.parametrize("source", ["data", "guided", "teacher"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_passes_are_as_few_as_the_table_says(stage, source):
    """Rows through the network, and through the teacher: one gradient pass of all (3), a derivative of jumps (2), the
    rest 1; in one call each what can share a batch."""
    if stage == "flow" and source != "data":
        return
    student, called = Counting(mlp(False)), []
    r, n = rows_of(stage, randn(6, 2, seed=3), torch.arange(6) % K, guidance=2.0)

    def teacher(t, x, y, w):
        called.append(len(x))
        return x

    paper_loss(
        FlowMap(student), r, n,
        teacher=teacher if source == "teacher" else None, guided_from=0.0 if source == "guided" else None,
    )  # fmt: skip
    jumps = len(r.s) - n
    guidance = [n, 2 * jumps] if source == "guided" else []
    assert student.rows == [len(r.s), *guidance, *([jumps] if jumps else [])]
    found = forward_equivalents(stage, guided=source == "guided", teacher=int(source == "teacher"))
    assert found.student == (3 * len(r.s) + sum(guidance) + 2 * jumps) / n
    assert called == ([len(r.s)] if source == "teacher" else [])
    assert found.teacher == sum(called) / n
    assert found.floor == found.student + found.teacher - (stage != "flow")


@pytest.mark.parametrize("source", [pytest.param("guided", marks=pytest.mark.slow), "teacher"])
def test_compiled_whole_it_is_the_same(source):
    """In one graph, with the derivative inside; no random numbers are drawn."""
    X, gaussians = FlowMap(mlp(True)), Guided()
    r, n = rows_of("mfm", randn(5, 2, seed=3), torch.arange(5) % K, guidance=2.0)
    options = {"teacher": teacher_of(gaussians)} if source == "teacher" else {"guided_from": 0.3}

    def loss(rows):
        found = paper_loss(X, rows, n, **options)
        return found.terms, found.watched

    before = torch.get_rng_state()
    eager, compiled = loss(r), torch.compile(loss, backend="aot_eager", fullgraph=True)(r)
    assert torch.equal(before, torch.get_rng_state())
    gradients = []
    for terms, watched in (eager, compiled):
        X.zero_grad()
        sum(terms.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in X.parameters()]))
        for name, pair in watched.items():
            assert_close(pair, eager[1][name], 1e-9)
    for name, term in compiled[0].items():
        assert_close(term.detach(), eager[0][name].detach(), 1e-9)
    assert_close(gradients[1], gradients[0], 1e-9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"diagonal": 0}, "the number of diagonal rows must be an integer >= 1"),
        ({"diagonal": 11}, "diagonal rows must be at most all, 10, got 11"),
        ({"diagonal": 7}, "the first 7 rows must have s = u"),
        ({"teacher": lambda t, x, y, w: x, "guided_from": 0.0}, "a teacher brings its own guidance"),
        ({"r": {"velocity": torch.full((10, 2), math.nan)}}, "the data must be finite"),
        ({"p": -1.0}, "p must be >= 0"),
    ],
)
def test_what_makes_no_step_is_refused(change, match):
    r, n = rows_of("mfm", randn(5, 2, seed=3), torch.arange(5) % K)
    options = {"diagonal": n} | change
    rows = r._replace(**options.pop("r", {}))
    with pytest.raises(ValueError, match=match):
        paper_loss(FlowMap(mlp(False)), rows, **options)


def test_bins_hold_their_ends():
    s = torch.tensor([0.0, 0.2, 0.39, 1.0])
    found = by_time(s, torch.tensor([[1.0, 1.0], [0.0, 2.0], [4.0, 0.0], [3.0, 3.0]]))
    assert {name: pair.tolist() for name, pair in found.items()} == {
        "s0.0": [1, 1], "s0.2": [2 + 8, 2], "s0.4": [0, 0], "s0.6": [0, 0], "s0.8": [9, 1],
    }  # fmt: skip


def test_autocast_does_not_round_what_is_watched():
    s, residual = torch.full((257,), 0.5), torch.full((257, 1), 1.001)
    with torch.autocast("cpu", torch.bfloat16):
        total, count = by_time(s, residual)["s0.4"].tolist()
    assert total == pytest.approx(257 * 1.001**2, rel=1e-5) and count == 257


@pytest.mark.parametrize(
    "arguments", [{"stage": "other"}, {"stage": "map", "teacher": 3}, {"stage": "map", "teacher": 1, "guided": True}]
)
def test_costs_of_what_is_no_stage_are_refused(arguments):
    with pytest.raises(ValueError, match="stage must be one of flow, map, mfm, a teacher have 0, 1 or 2 passes"):
        forward_equivalents(**arguments)


# ---- rows --------------------------------------------------------------------------------------------------


N = 6_000


@pytest.fixture(scope="module")
def drawn():
    """Rows of many images for each law; image i is (i, …), far apart in units of the noise."""
    x1 = 100.0 * torch.arange(N, dtype=torch.float64).unsqueeze(-1).expand(N, 2).contiguous()
    y = torch.arange(N) % K
    law = {"guidance": SCALE, "drop": 0.2, "plain_rate": 0.25}
    return (
        {
            (stage, times): rows_of(stage, x1, y, times=times, **law)
            for stage in STAGES
            for times in ("uniform", "logit-normal")
        },
        x1,
        y,
    )


def fits(values, law):
    """Kolmogorov–Smirnov at 1e-6."""
    return stats.kstest(values.numpy(), law).pvalue > 1e-6


def test_times_have_their_laws(drawn):
    """Uniform: s on the diagonal, and two in order; logit-normal: the two of a jump are independent and of different
    means, so that their smaller and larger have 1 − (1−F)(1−G) and FG. Neither law passes for the other."""

    def logit(mean):
        return lambda x: stats.norm.cdf(stats.logistic.ppf(x) - mean)

    first, second = logit(-0.4), logit(1.2)  # DMF's 0.4 and -1.2, whose time runs from data to noise
    laws = {
        "uniform": (lambda x: x, lambda x: 1 - (1 - x) ** 2, lambda x: x**2),
        "logit-normal": (logit(0.0), lambda x: 1 - (1 - first(x)) * (1 - second(x)), lambda x: first(x) * second(x)),
    }
    for (stage, times), (r, n) in drawn[0].items():
        assert n == N and len(r.s) == (N if stage == "flow" else 2 * N)
        assert torch.equal(r.s[:n], r.u[:n]) and (r.u[n:] > r.s[n:]).all()
        for name, (diagonal, low, high) in laws.items():
            found = [fits(r.s[:n], diagonal)]
            if stage != "flow":
                found += [fits(r.s[n:], low), fits(r.u[n:], high)]
            assert all(found) if name == times else not any(found)


def test_context_times_have_theirs(drawn):
    """0 with probability 0.1, else U², at most 0.998; none but in the mfm stage, and one for each row."""
    for (stage, _), (r, n) in drawn[0].items():
        if stage != "mfm":
            assert (r.t == 0).all()
            continue
        for t in (r.t[:n], r.t[n:]):
            assert abs(z_scores((t == 0).double(), 0.1)) < LIMIT
            assert fits(t[t > 0].clamp_max(0.99), _root_law)
            assert t.max() == LATEST_CONTEXT
            assert not fits(t[t > 0].sqrt() ** 4, _root_law)
        assert abs(torch.corrcoef(torch.stack([r.t[:n], r.t[n:]]))[0, 1]) < LIMIT / N**0.5


def _root_law(x):
    """The law of min(U², 0.99)."""
    return (x >= 0.99) + (x < 0.99) * x.clip(0) ** 0.5


def test_states_are_noised_images(drawn):
    """x = (1−t) x₀ + t x₁ and z = (1−s) x̄₀ + s x₁ with four standard normal numbers an image and term, none of them
    used twice; the velocity is x₁ − x̄₀."""
    _, x1, _ = drawn
    for r, n in drawn[0].values():
        image = x1.repeat(len(r.s) // n, 1)
        s, t = r.s.unsqueeze(-1), r.t.unsqueeze(-1)
        eps = image - r.velocity
        assert_close(r.z, (1 - s) * eps + s * image, 1e-9, 1 + image)
        clear = (r.t < 0.9).unsqueeze(-1)
        x0 = torch.where(clear, (r.x - t * image) / (1 - t), 0.0)
        noise = torch.cat([eps, x0], 1).unflatten(0, (-1, n)).transpose(0, 1).flatten(1)
        noise = noise[clear.reshape(-1, n).all(0)]
        assert z_scores(noise, 0.0).abs().max() < LIMIT
        assert z_scores(noise.square(), 1.0).abs().max() < LIMIT
        pairs = torch.corrcoef(noise.T) - torch.eye(noise.shape[1])
        assert pairs.abs().max() < LIMIT / len(noise) ** 0.5


def test_labels_are_dropped_and_scales_drawn(drawn):
    """One draw an image, for both terms: the null class with 0.2, and w = 1 there and for a quarter of the rest."""
    _, _, y = drawn
    for (stage, _), (r, n) in drawn[0].items():
        dropped = r.y[:n] == K
        assert torch.equal(r.y[:n][~dropped], y[~dropped])
        assert abs(z_scores(dropped.double(), 0.2)) < LIMIT
        assert (r.guidance[:n][dropped] == 1).all()
        assert set(r.guidance.tolist()) == {1.0, SCALE}
        assert abs(z_scores((r.guidance[:n][~dropped] == 1).double(), 0.25)) < LIMIT
        if stage != "flow":
            assert torch.equal(r.y[n:], r.y[:n]) and torch.equal(r.guidance[n:], r.guidance[:n])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True), st.sampled_from(STAGES))
def test_an_images_rows_are_its_own(chosen, stage):
    """They depend on the image, its label and its generator, whatever else is in the batch."""
    x1, y, g = randn(9, 2, seed=3), torch.arange(9) % K, sources(9)
    whole, n = rows_of(stage, x1, y)
    part, m = draw_rows(RowLaw(stage, "uniform", K), x1[chosen], y[chosen], [g[i] for i in chosen])
    places = torch.tensor(chosen)
    if stage != "flow":
        places = torch.cat([places, n + places])
    assert m == len(chosen)
    for a, b in zip(part, whole, strict=True):
        assert torch.equal(a, b[places])


@pytest.mark.parametrize(
    ("law", "match"),
    [
        ({"stage": "other"}, "stage must be one of flow, map, mfm, got 'other'"),
        ({"times": "other"}, "times must be one of uniform, logit-normal, got 'other'"),
        ({"drop": 1.1}, r"drop and plain_rate must lie in \[0, 1\], got 1.1 and 0.0"),
        ({"plain_rate": -0.1}, "drop and plain_rate must lie in"),
        ({"guidance": 0.5}, "guidance must be finite and at least 1, got 0.5"),
    ],
)
def test_laws_out_of_range_are_refused(law, match):
    with pytest.raises(ValueError, match=match):
        RowLaw(**({"stage": "mfm", "times": "uniform", "null_class": K} | law)).check()


def test_images_without_a_label_or_a_generator_are_refused():
    law = RowLaw("mfm", "uniform", K)
    with pytest.raises(ValueError, match="each image needs a label and a generator, got 3, 2 and 3"):
        draw_rows(law, torch.zeros(3, 2), torch.zeros(2).long(), sources(3))
    with pytest.raises(ValueError, match="the number of images must be an integer >= 1"):
        draw_rows(law, torch.zeros(0, 2), torch.zeros(0).long(), [])
