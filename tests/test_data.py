"""Endless batches: what an epoch holds, what each process gets, and going back to a position."""

import itertools

import pytest
import torch

from mfm_ref import (
    MLP,
    FlowMap,
    RandomBatches,
    TensorBatches,
    TrainConfig,
    WithProgress,
    meta_flow_map_loss,
    train,
)
from mfm_ref.data import Resumable, stream_seed
from mfm_ref.times import annealed_times


def first(data, n):
    return list(itertools.islice(data, n))


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    rows = torch.arange(12)
    data = TensorBatches(rows, rows**2, batch=4, seed=1)
    epochs = [first(data, 3) for _ in range(3)]
    for epoch in epochs:
        assert sorted(torch.cat([x for x, _ in epoch]).tolist()) == list(range(12))
        assert all(torch.equal(square, x**2) for x, square in epoch)
    orders = [torch.cat([x for x, _ in epoch]).tolist() for epoch in epochs]
    assert len({tuple(order) for order in [*orders, list(range(12))]}) == 4
    other = torch.cat([x for x, _ in first(TensorBatches(rows, rows, batch=4, seed=2), 3)])
    assert other.tolist() != orders[0]


def test_rows_that_fill_no_batch_wait_for_another_epoch():
    data = TensorBatches(torch.arange(11), batch=4)
    counts = torch.bincount(torch.cat([x for (x,) in first(data, 2 * 200)]), minlength=11)
    assert counts.sum() == 8 * 200
    assert int(counts.min()) > 0.5 * 8 * 200 / 11  # no row is always left out: it has 8/11 of a chance an epoch


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(world):
    """Rank by rank, their parts are the rows of one process with the joint batch, in order."""
    rows = torch.arange(50)
    joint = first(TensorBatches(rows, batch=4 * world, seed=5), 20)
    parts = [first(TensorBatches(rows, batch=4, seed=5, rank=r, world=world), 20) for r in range(world)]
    for k, (whole,) in enumerate(joint):
        assert torch.equal(torch.cat([part[k][0] for part in parts]), whole)


@pytest.mark.parametrize("n", [0, 2, 3, 7])
def test_a_position_is_gone_back_to(n):
    """Within an epoch of three batches, at its end, and later."""

    def makers():
        yield lambda: TensorBatches(torch.arange(13.0), batch=4, seed=3)
        yield lambda: RandomBatches(lambda g: (torch.rand(4, generator=g),), torch.Generator().manual_seed(0))

    for make in makers():
        data = make()
        assert isinstance(data, Resumable)
        first(data, n)
        state = data.state_dict()
        rest = first(data, 8)
        again = make()
        again.load_state_dict(state)
        assert all(torch.equal(a, b) for (a,), (b,) in zip(rest, first(again, 8), strict=True))


def test_progress_rises_from_zero_to_one_and_is_gone_back_to():
    def make():
        return WithProgress(TensorBatches(torch.arange(13.0), batch=4, seed=3), 5)

    data = make()
    whole = first(data, 7)
    assert [progress for _, progress in whole] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    plain = first(TensorBatches(torch.arange(13.0), batch=4, seed=3), 7)
    assert all(torch.equal(x, y) for ((x,), _), (y,) in zip(whole, plain, strict=True))
    assert next(iter(WithProgress(make().data, 1)))[1] == 0
    data = make()
    first(data, 2)
    again = make()
    again.load_state_dict(data.state_dict())
    for ((x,), progress), ((y,), expected) in zip(first(again, 5), whole[2:], strict=True):
        assert torch.equal(x, y) and progress == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_jumps_grow_with_the_progress_of_a_run_that_was_stopped(tmp_path, accumulate):
    """Annealed pairs in the whole loss: no gap beyond the progress, all of it used, and so in the run that goes on."""
    steps, gaps = 10, []

    def loss(X, batch, generator):
        x1, progress = batch

        def times(t, std, generator):
            s, u = annealed_times(len(t), progress, generator=generator)
            gaps.append((progress, float((u - s).max())))
            if len(gaps) == 7 * accumulate:
                raise KeyboardInterrupt
            return torch.stack([s, u])

        return meta_flow_map_loss(X, x1, times=times, generator=generator)

    def run():
        draw = RandomBatches(lambda g: torch.randn(256, 2, generator=g), torch.Generator().manual_seed(0))
        X = FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8))
        config = TrainConfig(steps=steps, accumulate=accumulate, checkpoint_every=3)
        train(X, loss, WithProgress(draw, steps * accumulate), config, folder=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        run()
    stopped = len(gaps)
    run()
    expected = [k / (steps * accumulate - 1) for k in range(steps * accumulate)]
    assert [progress for progress, _ in gaps[:stopped]] == expected[:stopped]
    assert [progress for progress, _ in gaps[stopped:]] == expected[6 * accumulate :]
    assert all(0.8 * progress <= gap <= progress for progress, gap in gaps)  # the largest of 256 gaps


def test_progress_needs_a_position():
    with pytest.raises(ValueError, match=r"needs an iterator with state_dict .* got list"):
        WithProgress([torch.zeros(3)], 5)
    with pytest.raises(ValueError, match="total must be an integer >= 1"):
        WithProgress(TensorBatches(torch.zeros(3), batch=1), 0)


def test_no_stream_is_drawn_twice():
    """The order of TensorBatches, the noise of the loss and a user's own data have one seed, but no stream, in
    common: whole permutations and first draws would agree."""
    seeds = []

    def loss(X, batch, generator):
        seeds.append((generator.initial_seed(), torch.initial_seed()))
        return meta_flow_map_loss(X, batch[0], generator=generator)

    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(9))
    data = TensorBatches(rows, batch=64, seed=0)
    (first_batch,) = next(data)
    config = TrainConfig(steps=1, seed=0)
    train(FlowMap(MLP(torch.zeros(2), torch.eye(2), hidden=8)), loss, data, config)
    noise, source = seeds[0]
    own = {stream_seed(0, rank) for rank in range(10)}
    assert noise != source and not own & {noise, source}
    for seed in (*own, noise, source):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        assert not torch.equal(rows[order], first_batch)


def test_positions_of_other_data_are_refused():
    rows = torch.arange(12.0)
    position = TensorBatches(rows, batch=4, seed=3).state_dict()
    for other in (
        TensorBatches(rows, batch=3, seed=3),
        TensorBatches(rows, batch=4, seed=2),
        TensorBatches(rows[:8], batch=4, seed=3),
        TensorBatches(rows, batch=4, seed=3, world=2),
    ):
        with pytest.raises(ValueError, match="the position must be one of data with"):
            other.load_state_dict(position)
    drawn = RandomBatches(lambda g: torch.rand(3, generator=g), torch.Generator())
    with pytest.raises(ValueError, match="must be a generator's state, got"):
        drawn.load_state_dict(position)
    with pytest.raises(ValueError, match="the position must be one of data with"):
        TensorBatches(rows, batch=4).load_state_dict(drawn.state_dict())


def test_streams_are_apart():
    """Neighbouring numbers, their order and their count all matter; standard normal draws do not correlate."""
    keys = [(0, 0), (0, 1), (1, 0), (0,), (0, 0, 1), (1, 1), (2**40, 0)]
    assert len({stream_seed(*key) for key in keys}) == len(keys)
    draws = torch.stack([torch.randn(10_000, generator=torch.Generator().manual_seed(stream_seed(*k))) for k in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 0.05  # five standard errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be an integer >= 1"),
        ({"batch": 2, "seed": -1}, "seed must be an integer >= 0"),
        ({"batch": 2, "rank": 2, "world": 2}, "rank must be below world, got 2 and 2"),
        ({"batch": 4, "world": 3}, "3 batches of 4 need 12 rows at least, got 10"),
    ],
)
def test_tensor_batches_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        TensorBatches(torch.zeros(10), **options)


def test_tensor_batches_refuse_unequal_lengths():
    with pytest.raises(ValueError, match=r"must have one length, got \[3, 4\]"):
        TensorBatches(torch.zeros(3), torch.zeros(4), batch=1)
    with pytest.raises(ValueError, match=r"must have one length, got \[\]"):
        TensorBatches(batch=1)
