"""Worst rises against brute force, and slices against the loss itself."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import flatten, small_network, symmetric

from monge_sam_jax.curvature import (
    adaptive_worst_case_sharpness,
    filter_normalized_directions,
    loss_slice,
)

KEY = jax.random.key(0)


def corners(loss, x, rho):
    """The largest rise over all corners of the box."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=x.size)))
    return max(loss(x + rho * np.abs(x) * s) for s in signs) - loss(x)


@jax.jit
def climb(S, b, x, rho):
    loss_fn = lambda p: 0.5 * flatten(p) @ S @ flatten(p) + b @ flatten(p)  # noqa: E731
    params = {"a": x[:4].reshape(2, 2), "b": [x[4:]]}
    rise = partial(adaptive_worst_case_sharpness, loss_fn, params, rho=rho)
    return rise(num_steps=1), rise(), rise(num_steps=60)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("rho", "most"), [(0.01, 19), (0.3, 15), (2.0, 7)])
def test_rises_of_convex_losses_are_those_of_the_worst_corner(rho, most):
    """A convex loss is worst at a corner; steps may end at another that is a local maximum."""
    exact = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        S, b, x = (
            symmetric(rng.uniform(0.1, 5, size=8), seed),
            rng.normal(size=8),
            rng.normal(size=8),
        )
        loss = lambda y: 0.5 * y @ S @ y + b @ y  # noqa: B023, E731
        worst = corners(loss, x, rho)
        once, found, longer = climb(S, b, x, rho)
        corner = x + rho * np.abs(x) * np.sign(S @ x + b)
        assert once >= max(loss(corner) - loss(x), 0) - 1e-12
        assert once <= found + 1e-12
        assert longer <= worst * (1 + 1e-12)
        assert found > 0.6 * worst
        exact += found > worst * (1 - 1e-9)
    assert exact >= most


def auto_pgd(loss, gradient, x, rho, num_steps):
    """The highest rise of auto-PGD as the code of Croce and Hein has it, and its halvings."""
    clip = lambda y: np.clip(y, x - rho * np.abs(x), x + rho * np.abs(x))  # noqa: E731
    interval, least = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
    fewer = max(int(0.03 * num_steps), 1)
    now, old, best, values = x, x, x, [loss(x)]
    rate, halved, before, since, halvings = 2.0, True, loss(x), 0, 0
    for k in range(num_steps):
        a = 0.75 if k else 1.0
        target = clip(now + rate * rho * np.abs(x) * np.sign(gradient(now)))
        now, old = clip(now + a * (target - now) + (1 - a) * (now - old)), now
        values.append(loss(now))
        best = now if values[-1] > loss(best) else best
        since += 1
        if since == interval:
            rises = np.sum(np.diff(values[-interval - 1 :]) > 0)
            halved = rises <= 0.75 * interval or (not halved and loss(best) <= before)
            if halved:
                rate, now, old, halvings = rate / 2, best, best, halvings + 1
                values[-1] = loss(best)
            before, since, interval = loss(best), 0, max(interval - fewer, least)
    return loss(best) - loss(x), halvings


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_steps", [1, 7, 20, 60])
def test_steps_are_those_of_auto_pgd(num_steps):
    """On a loss with many maxima."""
    halvings = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        S, x = rng.normal(size=(6, 6)), rng.normal(size=6)
        loss = lambda y: np.sum(np.sin(3 * S @ y)) - 0.1 * y @ y  # noqa: B023, E731
        gradient = lambda y: 3 * S.T @ np.cos(3 * S @ y) - 0.2 * y  # noqa: B023, E731
        loss_fn = lambda y: jnp.sum(jnp.sin(3 * S @ y)) - 0.1 * y @ y  # noqa: B023, E731
        expected, times = auto_pgd(loss, gradient, x, 0.7, num_steps)
        found = adaptive_worst_case_sharpness(loss_fn, jnp.asarray(x), rho=0.7, num_steps=num_steps)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        halvings += times
    assert num_steps < 7 or halvings > 5


@pytest.mark.usefixtures("x64")
def test_a_maximum_inside_of_the_box_is_found():
    """Only a rate that falls gets there; signed steps of one length jump over it."""
    x, top = jnp.array([1.0, -2.0, 0.5]), np.array([1.03, -2.1, 0.47])
    loss_fn = lambda p: -jnp.sum((p - top) ** 2)  # noqa: E731
    rise = adaptive_worst_case_sharpness(loss_fn, x, rho=0.3, num_steps=100)
    np.testing.assert_allclose(rise, np.sum((x - top) ** 2), rtol=1e-3)
    ten = adaptive_worst_case_sharpness(loss_fn, x, rho=0.3, num_steps=10)
    assert 0 <= ten <= rise


@pytest.mark.usefixtures("x64")
def test_the_box_holds_for_a_network():
    """No point that the loss is asked for is outside, and the box of zeros is empty."""
    loss_fn, params, _ = small_network()
    theta, farthest = flatten(params), []

    def watched(p):
        outside = jnp.max(jnp.abs(flatten(p) - theta) - 0.2 * jnp.abs(theta))
        jax.debug.callback(lambda d: farthest.append(float(d)), outside)
        return loss_fn(p)

    rise = adaptive_worst_case_sharpness(watched, params, rho=0.2, num_steps=10)
    jax.effects_barrier()
    assert len(farthest) == 11  # a loss and a gradient for each step, and at the params
    assert max(farthest) < 1e-12
    # Better than the corner and than chance.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(200, theta.size))
    corner = theta + 0.2 * jnp.abs(theta) * jnp.sign(flatten(jax.grad(loss_fn)(params)))
    losses = jax.jit(jax.vmap(lambda t: loss_fn(jax.flatten_util.ravel_pytree(params)[1](t))))
    others = losses(
        jnp.concatenate([theta[None] + 0.2 * jnp.abs(theta)[None] * signs, corner[None]])
    )
    assert rise >= np.max(others) - loss_fn(params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rises_in_other_dtypes(dtype):
    loss_fn = lambda p: jnp.sum(p["w"] ** 2)  # noqa: E731
    params = {"w": jnp.array([3.0, 4.0], dtype), "none": None}
    rise = adaptive_worst_case_sharpness(loss_fn, params, rho=jnp.float32(0.5))
    assert rise.dtype == dtype
    np.testing.assert_allclose(rise, 31.25, rtol=1e-2)


def test_rises_at_the_ends():
    rise = adaptive_worst_case_sharpness
    assert rise(lambda p: jnp.sum(p**2), jnp.ones(3), rho=0.0) == 0
    assert rise(lambda p: jnp.sum(p**2), jnp.zeros(3), rho=1.0) == 0
    assert rise(lambda p: -jnp.sum(p**2), jnp.full(3, 1e-3), rho=0.1, num_steps=5) > 0
    assert jnp.isnan(rise(lambda p: -jnp.sum(jnp.log(1.05 - p)), jnp.ones(3), rho=0.2))
    with pytest.raises(ValueError, match="num_steps must be an integer, 1 or more, got 0"):
        rise(jnp.sum, jnp.ones(3), rho=0.1, num_steps=0)
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        rise(jnp.sum, jnp.ones(3), rho=-1.0)


def kernels():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 5), "dense": (6, 7), "bias": (7,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_filters_are_as_long_as_those_of_the_params(axis):
    params = kernels() | {"none": None}
    first, second = filter_normalized_directions(params, KEY, output_axis=axis)
    for direction in (first, second):
        for name in ("conv", "dense"):
            for o in range(params[name].shape[axis]):
                d, p = (jnp.take(tree[name], o, axis) for tree in (direction, params))
                np.testing.assert_allclose(jnp.linalg.norm(d), jnp.linalg.norm(p), rtol=1e-5)
        assert np.all(direction["bias"] == 0)
        assert direction["scale"] == 0
    cosine = np.corrcoef(first["conv"].ravel(), second["conv"].ravel())[0, 1]
    assert abs(cosine) < 0.3


def test_directions_of_vectors_and_of_zeros():
    params = kernels()
    params["dense"] = params["dense"].at[:, 2].set(0.0)
    (direction,) = filter_normalized_directions(params, KEY, 1, vectors=True)
    np.testing.assert_array_equal(jnp.abs(direction["bias"]), jnp.abs(params["bias"]))
    assert 0 < np.sum(direction["bias"] == params["bias"]) < 7
    assert abs(direction["scale"]) == abs(params["scale"])
    assert np.all(direction["dense"][:, 2] == 0)
    with pytest.raises(ValueError, match=r"output_axis .* got 2 for one of shape \(6, 7\)"):
        filter_normalized_directions(params, KEY, output_axis=2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_size", [None, 7])
def test_slices_are_the_losses_point_by_point(batch_size):
    loss_fn, params, _ = small_network()
    directions = filter_normalized_directions(params, KEY)
    slices = partial(loss_slice, loss_fn, radius=0.7, num_points=5, batch_size=batch_size)
    for function in (slices, jax.jit(slices)):
        a, losses = function(params, directions)
        np.testing.assert_allclose(a, np.linspace(-0.7, 0.7, 5))
        for i, j in itertools.product(range(5), repeat=2):
            point = jax.tree.map(lambda p, d, e: p + a[i] * d + a[j] * e, params, *directions)  # noqa: B023
            np.testing.assert_allclose(losses[i, j], loss_fn(point), rtol=1e-12)
    np.testing.assert_allclose(losses[2, 2], loss_fn(params), rtol=1e-12)


def test_slices_say_what_is_wrong():
    d = jnp.ones(3)
    with pytest.raises(ValueError, match="num_points must be an integer, 2 or more, got 1"):
        loss_slice(jnp.sum, d, (d, d), num_points=1)
    with pytest.raises(ValueError, match="directions must be two, got 3"):
        loss_slice(jnp.sum, d, (d, d, d))


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": 1j}, np.arange(3)])
def test_params_must_be_real(params):
    loss_fn = lambda p: jnp.sum(jnp.abs(flatten(p)))  # noqa: E731
    for function in (
        lambda: adaptive_worst_case_sharpness(loss_fn, params, rho=0.1),
        lambda: filter_normalized_directions(params, KEY),
        lambda: loss_slice(loss_fn, params, (params, params)),
    ):
        with pytest.raises(TypeError, match=r"params must be real floats, got dtype (complex|int)"):
            function()
