"""Batch normalisation's statistics, taken anew over batches."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import monge_sam_jax as ms
from monge_sam_jax.nnx import refresh_batch_stats

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.normal(3.0 + i, 2.0, size=(16, 5)), jnp.float32) for i in range(4)]


class TwoLayers(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x, train=True):
        norm = {"use_running_average": not train, "momentum": self.momentum}
        x = nn.BatchNorm(name="first", **norm)(x)
        return nn.BatchNorm(name="second", **norm)(nn.relu(nn.Dense(3, name="dense")(x)))


def setup(momentum=0.9):
    model = TwoLayers(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0])

    def update_fn(params, statistics, batch):
        inputs = {"params": params, "batch_stats": statistics}
        return model.apply(inputs, batch, mutable=["batch_stats"])[1]["batch_stats"]

    return update_fn, variables["params"], variables["batch_stats"]


def statistics_by_hand(params):
    """Mean over batches of each batch's mean and variance, layer by layer, in NumPy."""
    found = {name: {"mean": [], "var": []} for name in ("first", "second")}
    p = jax.tree.map(lambda x: np.asarray(x, float), params)
    for batch in BATCHES:
        x = np.asarray(batch, float)
        for name in found:
            if name == "second":
                x = np.maximum(x @ p["dense"]["kernel"] + p["dense"]["bias"], 0)
            mean, var = x.mean(axis=0), x.var(axis=0)
            found[name]["mean"].append(mean)
            found[name]["var"].append(var)
            x = (x - mean) / np.sqrt(var + 1e-5) * p[name]["scale"] + p[name]["bias"]
    return jax.tree.map(lambda xs: np.mean(xs, axis=0), found, is_leaf=lambda x: type(x) is list)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_equals_the_mean_of_the_batches_statistics_whatever_the_momentum(momentum):
    update_fn, params, statistics = setup(momentum)
    spoilt = jax.tree.map(lambda s: s + 7.0, statistics)
    actual = ms.refresh_running_statistics(update_fn, params, spoilt, iter(BATCHES))
    expected = statistics_by_hand(params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4), actual, expected
    )
    jax.tree.map(
        lambda a, s: np.testing.assert_equal((a.dtype, a.shape), (s.dtype, s.shape)),
        actual,
        statistics,
    )


def test_half_precision_statistics_are_averaged_in_float32():
    update_fn, params, statistics = setup(0.99)
    half = jax.tree.map(lambda s: s.astype(jnp.bfloat16), statistics)
    actual = ms.refresh_running_statistics(update_fn, params, half, BATCHES)
    expected = statistics_by_hand(params)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a, float), e, rtol=2**-8),
        actual,
        expected,
    )
    assert {s.dtype for s in jax.tree.leaves(actual)} == {jnp.dtype(jnp.bfloat16)}


def test_compiles_once():
    update_fn, params, statistics = setup()
    traces = []

    def counted(*args):
        traces.append(1)
        return update_fn(*args)

    for _ in range(2):
        ms.refresh_running_statistics(counted, params, statistics, BATCHES)
    assert len(traces) == 1


def test_statistics_that_are_no_average_are_an_error():
    update_fn, params, statistics = setup()
    with pytest.raises(ValueError, match="no batch"):
        ms.refresh_running_statistics(update_fn, params, statistics, [])
    with pytest.raises(ValueError, match="Run the model in training mode"):
        ms.refresh_running_statistics(lambda p, s, b: s, params, statistics, BATCHES)
    with pytest.raises(ValueError, match=r"\['count'\] are no running average"):
        ms.refresh_running_statistics(
            lambda p, s, b: {"count": s["count"] * jnp.arange(3.0)},
            params,
            {"count": jnp.ones(3)},
            BATCHES,
        )


def test_what_the_message_advises_works():
    """Linen and NNX; a frozen layer's statistics left out, in NNX by a filter of paths."""
    update_fn, params, statistics = setup()
    model = TwoLayers(0.9)

    def evaluating(params, statistics, batch):
        inputs = {"params": params, "batch_stats": statistics}
        return model.apply(inputs, batch, train=False, mutable=["batch_stats"])[1]["batch_stats"]

    with pytest.raises(ValueError, match="use_running_average=False in Linen"):
        ms.refresh_running_statistics(evaluating, params, statistics, BATCHES)
    ms.refresh_running_statistics(update_fn, params, statistics, BATCHES)

    rngs = nnx.Rngs(0)
    frozen = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
    model = nnx.Sequential(frozen, nnx.BatchNorm(5, rngs=rngs))
    frozen.mean[...] = jnp.full(5, 2.0)
    forward = lambda model, batch: model(batch)  # noqa: E731
    with pytest.raises(ValueError, match="leave out the statistics of frozen layers"):
        refresh_batch_stats(forward, model, BATCHES)
    trained = nnx.All(nnx.BatchStat, lambda path, _: path[:2] == ("layers", 1))
    refresh_batch_stats(forward, model, BATCHES, statistics=trained)
    np.testing.assert_array_equal(frozen.mean[...], 2.0)
    expected = np.mean([(np.asarray(x) - 2.0) / np.sqrt(1 + 1e-5) for x in BATCHES], axis=(0, 1))
    np.testing.assert_allclose(model.layers[1].mean[...], expected, rtol=1e-4)
    model.eval()
    with pytest.raises(ValueError, match=r"model\.train\(\) in NNX"):
        refresh_batch_stats(forward, model, BATCHES, statistics=trained)
    model.layers[1].train()
    refresh_batch_stats(forward, model, BATCHES, statistics=trained)


def test_nnx_model_in_place():
    """Only the statistics change: not the params, the random counters or what the mode is."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.BatchNorm(5, momentum=0.9, rngs=rngs),
        nnx.Linear(5, 3, rngs=rngs),
        nnx.relu,
        nnx.BatchNorm(3, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
    )
    params = {
        "first": {"scale": model.layers[0].scale[...], "bias": model.layers[0].bias[...]},
        "dense": {"kernel": model.layers[1].kernel[...], "bias": model.layers[1].bias[...]},
        "second": {"scale": model.layers[3].scale[...], "bias": model.layers[3].bias[...]},
    }
    expected = statistics_by_hand(params)
    before = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.BatchStat)))
    refresh_batch_stats(lambda model, batch: model(batch), model, BATCHES)
    for layer, name in ((model.layers[0], "first"), (model.layers[3], "second")):
        np.testing.assert_allclose(layer.mean[...], expected[name]["mean"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(layer.var[...], expected[name]["var"], rtol=1e-4)
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.BatchStat)))
    chex.assert_trees_all_equal(jax.tree.map(str, after), jax.tree.map(str, before))
    model.eval()
    with pytest.raises(ValueError, match="training mode"):
        refresh_batch_stats(lambda model, batch: model(batch), model, BATCHES)
