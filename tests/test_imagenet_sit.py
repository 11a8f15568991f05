"""The network itself: sizes, attention both ways, derivatives, checkpointing, and what it must and must not see.

That it computes what the published networks compute is tested in test_imagenet_checkpoints.py.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from imagenet import sit
from imagenet.sit import SIZES, SiT, build, explicit_attention
from mfm_ref import FlowMap
from mfm_ref.forward_mode import derivative, differentiating
from tests.imagenet_tiny import tiny_sit

KINDS = {
    "sit": {"learn_sigma": True},
    "dmf": {"noise_times": True, "qk_norm": True},
    "mfm": {"noise_times": True},
    "mfm, blank start": {"blank_start": True},
    "mfm, reads tx": {"reads_tx": True, "qk_norm": True},
}


def network(name, **options):
    """A tiny network of a kind in which every weight counts, in double precision."""
    return tiny_sit(name.split(",")[0], **(KINDS[name] | options)).double()


fixed = cache(network)  # for those who do not change it


def inputs(seed=0, n=4, shape=(4, 8, 8), n_classes=2):
    """Times s <= u, a state, a context, labels with the null one, scales near 1 and near 2.5."""
    rng = torch.Generator().manual_seed(seed)
    s, u = torch.rand(2, n, generator=rng, dtype=torch.float64).sort(0).values
    z, x = torch.randn(2, n, *shape, generator=rng, dtype=torch.float64)
    t, w = torch.rand(n, generator=rng, dtype=torch.float64), torch.tensor([1.0, 2.5]).double().repeat(n)[:n]
    return s, u, z, t, x, torch.randint(n_classes + 1, (n,), generator=rng), w


# ---- sizes ---------------------------------------------------------------------------------------------


def millions(size, kind, **options):
    with torch.device("meta"):
        made = build(size, kind, **options)
    return sum(p.numel() for p in made.parameters()) / 1e6


@pytest.mark.parametrize(
    ("size", "kind", "number"),
    [("S/2", "sit", 33), ("B/2", "sit", 131), ("L/2", "sit", 458), ("B/2", "dmf", 131), ("B/2", "mfm", 134)],
)
def test_the_sizes_are_those_of_the_literature(size, kind, number):
    """In millions, rounded or cut off: the papers do both."""
    assert number in (round(millions(size, kind)), int(millions(size, kind)))


def linear(n, m):
    return n * m + m


@pytest.mark.parametrize("size", SIZES)
def test_the_number_of_parameters_is_that_of_its_parts(size):
    """Counted from the shapes alone: positions, patches, times, labels, blocks, outlet."""
    d, depth = SIZES[size]["width"], SIZES[size]["depth"]
    embedder, block = linear(256, d) + linear(d, d), linear(d, 6 * d) + linear(d, 3 * d) + linear(d, d)
    block += linear(d, 4 * d) + linear(4 * d, d)
    common = 256 * d + linear(16, d) + 1001 * d + depth * block + linear(d, 2 * d) + linear(d, 16)
    context = linear(16, d) + linear(d, 2 * d) + 4 * embedder
    assert millions(size, "sit") == (common + embedder) / 1e6
    assert millions(size, "sit", learn_sigma=True) == (common + embedder + linear(d, 16)) / 1e6
    assert millions(size, "dmf") == (common + embedder) / 1e6
    assert millions(size, "mfm") == (common + embedder + context) / 1e6
    assert millions(size, "mfm", guidance=[1.0, 2.0, 3.0]) == (common + embedder + context + 3 * d) / 1e6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 5}, r"width must be a multiple of heads = 5 and of 4, got 48"),
        ({"width": 42, "heads": 3}, r"width must be a multiple of heads = 3 and of 4, got 42"),
        ({"patch": 3}, r"multiples of patch 3, got \[4, 8, 8\]"),
        ({"shape": [8, 8]}, r"shape must be channels, height and width"),
        ({"depth": 0}, r"depth must be an integer >= 1"),
        ({"n_classes": 0}, r"n_classes must be an integer >= 1"),
        ({"encoder_depth": 4}, r"encoder_depth must be below depth = 4, got 4"),
        ({"encoder_depth": 0}, r"encoder_depth must be an integer >= 1"),
        ({"encoder_depth": None}, r"a context branch needs an encoder_depth"),
        ({"guidance": [1.5]}, r"scales that rise from 1, got \[1.5\]"),
        ({"guidance": [1.0, 3.0, 2.0]}, r"scales that rise from 1"),
        ({"guidance": [1.0], "context": False}, r"guidance needs a context branch"),
        ({"reads_tx": True, "context": False}, r"reads_tx and blank_start need a context branch"),
        ({"blank_start": True, "context": False}, r"reads_tx and blank_start need a context branch"),
    ],
)
def test_what_makes_no_network_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        build("tiny", "mfm", **({"shape": [4, 8, 8]} | options))


def test_sizes_and_kinds_that_are_unknown_are_refused():
    for size, kind in (("M/2", "sit"), ("tiny", "dit")):
        with pytest.raises(
            ValueError, match=rf"size must be one of .*tiny.* and kind one of .*dmf.*, got '{size}' and"
        ):
            build(size, kind)


@pytest.mark.parametrize("name", KINDS)
def test_a_config_makes_the_network_again(name, tmp_path):
    made = network(name)
    again = SiT(**made.config)
    assert again.config == made.config
    again.double().load_state_dict(made.state_dict())
    FlowMap(made).save_pretrained(tmp_path)
    loaded = FlowMap.from_pretrained(tmp_path, network=SiT)
    v = made.velocity(*inputs())
    assert torch.equal(again.velocity(*inputs()), v)
    assert torch.equal(loaded.network.velocity(*inputs()), v)


# ---- patches and positions -----------------------------------------------------------------------------


def test_a_patch_of_the_output_is_that_of_the_input():
    """As it begins, blocks pass tokens on as they are: each patch of the output depends on the same patch alone."""
    made = build("tiny", "sit", shape=[3, 6, 8], n_classes=1).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(made.outlet.weight)
    z = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    one = torch.zeros(1, dtype=torch.float64)
    v = made.velocity(one, one, z, one, 0 * z)
    assert v.shape == z.shape
    for row in range(3):
        for column in range(4):
            changed = z.clone()
            changed[:, 1, 2 * row + 1, 2 * column] += 1.0
            moved = (made.velocity(one, one, changed, one, 0 * z) - v).abs() > 1e-9
            assert moved[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].all()
            assert moved.sum() == 12


def test_positions_are_sines_and_cosines_of_column_and_row():
    position = sit.sine_cosine(3, 5, 8)
    for row in range(3):
        for column in range(5):
            a, b = (torch.tensor(float(place)) * torch.tensor([1.0, 0.01]) for place in (column, row))
            wanted = torch.cat([a.sin(), a.cos(), b.sin(), b.cos()])
            assert torch.allclose(position[5 * row + column], wanted, atol=1e-6)


# ---- what it sees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_rows_do_not_see_one_another(name, seed):
    made, order = fixed(name), torch.tensor([2, 0, 3, 1])
    call = inputs(seed)
    with torch.no_grad():
        v = made.velocity(*call)
        assert torch.allclose(made.velocity(*(a[order] for a in call)), v[order], rtol=1e-9, atol=1e-9)
        assert torch.allclose(made.velocity(*(a[:1] for a in call)), v[:1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_sees_what_it_should(name):
    """Every input moves the velocity but those that a kind ignores; no label is the null class, no scale is 1."""
    made = network(name)
    s, u, z, t, x, y, w = inputs()
    v = made.velocity(s, u, z, t, x, y, w)
    moves = {
        "s": made.velocity(s / 2, u, z, t, x, y, w),
        "u": made.velocity(s, (1 + u) / 2, z, t, x, y, w),
        "z": made.velocity(s, u, z + 1, t, x, y, w),
        "t": made.velocity(s, u, z, t / 2, x, y, w),
        "x": made.velocity(s, u, z, t, x + 1, y, w),
        "y": made.velocity(s, u, z, t, x, (y + 1) % 3, w),
        "w": made.velocity(s, u, z, t, x, y, w.flip(0)),
    }
    seen = {key for key, moved in moves.items() if (moved - v).abs().max() > 1e-4}
    blind = {key for key, moved in moves.items() if torch.equal(moved, v)}
    assert blind == {"sit": set("utxw"), "dmf": set("txw")}.get(name, set())
    assert seen | blind == set("suztxyw")
    null, ones = torch.full_like(y, made.null_class), torch.ones_like(w)
    assert torch.equal(made.velocity(s, u, z, t, x), made.velocity(s, u, z, t, x, null, ones))


def test_an_encoder_sees_the_start_and_a_decoder_the_end():
    """Of a DMF, tokens within the encoder do not depend on u, and those after it do."""
    made, seen = network("dmf"), []
    for block in made.blocks:
        block.register_forward_hook(lambda *call: seen.append(call[2]))
    s, u, *others = inputs()
    made.velocity(s, u, *others)
    made.velocity(s, (1 + u) / 2, *others)
    same = [torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True)]
    assert same == [True, True, True, False]


def test_at_t_0_a_blank_start_and_a_product_see_no_context():
    s, u, z, _, x, y, w = inputs()
    for name, blind in (("mfm, blank start", True), ("mfm, reads tx", True), ("mfm", False)):
        X = FlowMap(network(name))
        assert torch.equal(X.velocity(s, u, z, 0.0, x, y, w), X.velocity(s, u, z, 0.0, 0 * x, y, w)) == blind
    X = FlowMap(network("mfm, reads tx"))
    assert torch.equal(X.velocity(s, u, z, 0.4, x, y, w), X.velocity_from_tx(s, u, z, 0.4, 0.4 * x, y, w))


@pytest.mark.parametrize("name", ["mfm", "mfm, blank start", "mfm, reads tx"])
def test_a_silent_context_is_not_seen(name):
    """Nor is guidance, of which the rows are zero at the beginning, nor u in the encoder and s in the decoder."""
    made = network(name)
    s, u, z, t, x, y, w = inputs()
    made.silence_context()
    torch.nn.init.zeros_(made.scales.weight)
    v = made.velocity(s, u, z, t, x, y, w)
    assert torch.equal(made.velocity(s, u, z, t.flip(0), x.flip(0), y, w.flip(0)), v)
    encoder, decoder, _ = made.conditions(s, u, t, y, w)
    assert torch.equal(made.conditions(s, u.flip(0), t, y, w)[0], encoder)
    assert torch.equal(made.conditions(s.flip(0), u, t, y, w)[1], decoder)


def test_every_kind_begins_at_zero():
    for kind in sit.KINDS:
        made = build("tiny", kind, shape=[4, 8, 8], n_classes=2)
        assert not made.velocity(*(a.float() if a.is_floating_point() else a for a in inputs())).any()


def test_times_keep_full_precision_under_autocast():
    """bfloat16 has 8 bits: 0.999 is 1 there."""
    made = network("mfm").float()
    time = torch.tensor([0.999, 1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = made.encoder_s(time)
        assert made.blocks[0].attention.qkv(embedding).dtype == torch.bfloat16
        v = made.velocity(*(a.float() if a.is_floating_point() else a for a in inputs()))
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, made.encoder_s(time))
    exact = made.velocity(*(a.float() if a.is_floating_point() else a for a in inputs()))
    assert 0 < (v - exact).abs().max() < 0.1 * exact.abs().max()


# ---- attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_fused_and_explicit_attention_give_the_same(name, seed):
    made, call = fixed(name), inputs(seed)
    with torch.no_grad():
        fused = made.velocity(*call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sit, "scaled_dot_product_attention", explicit_attention)
            assert torch.allclose(made.velocity(*call), fused, rtol=1e-10, atol=1e-10)
        with dual_level():
            assert torch.allclose(made.velocity(*call), fused, rtol=1e-10, atol=1e-10)


def test_fused_attention_is_used_but_where_a_derivative_is_taken(monkeypatch):
    calls = []
    for name in ("scaled_dot_product_attention", "explicit_attention"):
        function = getattr(sit, name)
        monkeypatch.setattr(
            sit, name, lambda *call, name=name, function=function: calls.append(name) or function(*call)
        )
    made, (s, u, z, t, x, y, w) = network("mfm"), inputs()
    made.velocity(s, u, z, t, x, y, w)
    assert calls == ["scaled_dot_product_attention"] * 4
    calls.clear()
    derivative(lambda z: made.velocity(s, u, z, t, x, y, w), (z,), (z,))
    torch.func.jvp(lambda z: made.velocity(s, u, z, t, x, y, w), (z,), (z,))
    assert calls == ["explicit_attention"] * 8
    assert not differentiating()


# ---- derivatives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31))
def test_forward_mode_is_finite_differences(name, seed):
    """Along all of s, u, z, t and x together; central differences of step h are off by O(h²) and rounding / h."""
    made = fixed(name)
    s, u, z, t, x, y, w = inputs(seed, n=2)
    rng = torch.Generator().manual_seed(seed)
    along = tuple(torch.randn(a.shape, generator=rng, dtype=torch.float64) for a in (s, u, z, t, x))

    def f(s, u, z, t, x):
        return made.velocity(s, u, z, t, x, y, w)

    with torch.no_grad():
        value, slope = derivative(f, (s, u, z, t, x), along)
        torchs = torch.func.jvp(f, (s, u, z, t, x), along)
        ahead, behind = (f(*(a + h * d for a, d in zip((s, u, z, t, x), along, strict=True))) for h in (1e-5, -1e-5))
        differences = (ahead - behind) / 2e-5
        assert torch.allclose(value, f(s, u, z, t, x), rtol=1e-10, atol=1e-10)
    assert torch.allclose(torchs[1], slope, rtol=1e-8, atol=1e-8)
    assert torch.allclose(differences, slope, rtol=1e-5, atol=1e-5)
    assert slope.abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_no_gradient(name):
    """Each block is computed twice, once more for the backward pass."""
    made, call = network(name), inputs()
    counts, gradients = [], []
    for checkpointing in (False, True):
        made.checkpointing, calls = checkpointing, []
        hook = made.blocks[2].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.zero_grad()
        made.velocity(*call).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in made.named_parameters() if p.grad is not None})
        hook.remove()
        counts.append(len(calls))
    assert counts == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    assert all(gradient.any() for key, gradient in gradients[0].items())


def test_checkpointing_stands_back_where_a_derivative_is_taken():
    made, (s, u, z, t, x, y, w) = network("mfm"), inputs()
    slopes = []
    for made.checkpointing in (False, True):
        with dual_level():
            slopes.append(unpack_dual(made.velocity(s, u, make_dual(z, x), t, x, y, w)).tangent)
    assert torch.equal(*slopes)


@pytest.mark.parametrize("y", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_labels_that_have_no_embedding_are_refused(y):
    network = build("tiny", "sit", shape=[4, 4, 4], n_classes=3)
    z, time = torch.zeros(2, 4, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"labels y must be integers from 0 to 3, got torch\.\w+ from"):
        network.velocity(time, time, z, time, z, y)
    network.velocity(time, time, z, time, z, torch.tensor([0, 3]))
