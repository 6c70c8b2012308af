"""Gauss-Newton and Fisher products against dense matrices, and means over data sets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from matrices import flatten

from monge_sam_jax.curvature import (
    SymmetricOperator,
    adaptive_worst_case_sharpness,
    fisher_product,
    gauss_newton_product,
    hessian,
    hessian_trace,
    hvp,
    lanczos_eigenvalues,
    lanczos_quadrature,
    mean_over_batches,
    mean_over_data,
    top_eigenvalues,
)

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)
CLASSES, SAMPLES, INPUTS = 3, 11, 4


def classifier():
    """Params (32 of them), inputs and labels of a small network."""
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(INPUTS, 4))),
        "b": jnp.asarray(rng.normal(size=4)),
        "c": jnp.asarray(rng.normal(size=(4, CLASSES))),
    }
    x = jnp.asarray(rng.normal(size=(SAMPLES, INPUTS)))
    return params, x, jnp.asarray(rng.integers(CLASSES, size=SAMPLES))


def logits(params, x):
    return jnp.tanh(x @ params["a"] + params["b"][None]) @ params["c"]


def losses(z, y):
    return -jnp.sum(jax.nn.log_softmax(z) * jax.nn.one_hot(y, CLASSES), axis=-1)


def loss(params, batch):
    return jnp.mean(losses(logits(params, batch["x"]), batch["y"]))


def matrix_of(product, params):
    """Column by column."""
    theta, unravel = ravel_pytree(params)
    column = jax.jit(lambda v: flatten(product(unravel(v))))
    return np.stack([column(v) for v in jnp.eye(theta.size)], axis=1)


def jacobian(function, params):
    theta, unravel = ravel_pytree(params)
    return np.asarray(jax.jacobian(lambda t: function(unravel(t)))(theta))


def gauss_newton():
    """Products with G, and G itself: the outputs' Jacobian around the Hessian of a softmax."""
    params, x, y = classifier()
    product = partial(
        gauss_newton_product,
        partial(logits, x=x),
        lambda z: jnp.mean(losses(z, y)),
        params,
    )
    J = jacobian(partial(logits, x=x), params)  # of shape (samples, classes, n)
    p = np.asarray(jax.nn.softmax(logits(params, x)))
    G = np.zeros((J.shape[-1],) * 2)
    for J_i, p_i in zip(J, p, strict=True):
        G += J_i.T @ (np.diag(p_i) - np.outer(p_i, p_i)) @ J_i / SAMPLES
    return params, product, G


def test_gauss_newton_product_is_that_of_the_dense_matrix():
    params, product, G = gauss_newton()
    np.testing.assert_allclose(matrix_of(product, params), G, atol=1e-13)
    x, y = classifier()[1:]
    H = hessian(lambda p: loss(p, {"x": x, "y": y}), params)
    assert np.max(np.abs(H - G)) > 0.01  # which differs from the Hessian


def test_gauss_newton_of_a_softmax_is_the_expected_fisher():
    """Over labels that the model draws: every one, by its probability."""
    params, _, G = gauss_newton()
    x = classifier()[1]
    p = np.asarray(jax.nn.softmax(logits(params, x)))
    F = np.zeros_like(G)
    for label in range(CLASSES):
        g = jacobian(lambda q: losses(logits(q, x), jnp.full(SAMPLES, label)), params)  # noqa: B023
        F += (g * p[:, [label]]).T @ g / SAMPLES
    np.testing.assert_allclose(F, G, atol=1e-13)


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1), ()])
def test_fisher_product_is_that_of_the_dense_matrix(shape):
    params, x, y = classifier()
    of_samples = lambda p: losses(logits(p, x), y)  # noqa: E731
    losses_fn = (lambda p: jnp.mean(of_samples(p))) if shape == () else of_samples
    g = jacobian(losses_fn, params).reshape(-1, 32)
    F = np.mean(g[:, :, None] * g[:, None, :], axis=0)
    product = partial(fisher_product, lambda p: losses_fn(p).reshape(shape), params)
    np.testing.assert_allclose(matrix_of(product, params), F, atol=1e-13)


def test_nested_outputs():
    params, x, y = classifier()
    model_fn = lambda p: {"z": logits(p, x), "size": [jnp.sum(p["b"] ** 2)]}  # noqa: E731
    loss_fn = lambda out: jnp.mean(losses(out["z"], y)) + out["size"][0] ** 2  # noqa: E731
    J = jacobian(lambda p: flatten(model_fn(p)), params)
    out, unravel = ravel_pytree(model_fn(params))
    H = np.asarray(jax.hessian(lambda o: loss_fn(unravel(o)))(out))
    product = partial(gauss_newton_product, model_fn, loss_fn, params)
    np.testing.assert_allclose(matrix_of(product, params), J.T @ H @ J, atol=1e-12)


def test_all_that_takes_a_loss_takes_an_operator():
    params, product, G = gauss_newton()
    operator = SymmetricOperator(jax.jit(product))
    expected = np.linalg.eigvalsh(G)[::-1]
    for k in (3, 20):  # by ARPACK, and densely
        found, vectors = top_eigenvalues(operator, params, k, tol=1e-10, return_eigenvectors=True)
        np.testing.assert_allclose(found, expected[:k], atol=1e-10)
        V = np.asarray(jax.vmap(flatten)(vectors))
        np.testing.assert_allclose(V @ G, found[:, None] * V, atol=1e-9)
    values, _ = lanczos_eigenvalues(operator, params, KEY, 3)
    np.testing.assert_allclose(values, expected[:3], atol=1e-10)
    estimate, error = hessian_trace(operator, params, KEY, 200)
    assert abs(estimate - np.trace(G)) < 4 * error
    nodes, weights = lanczos_quadrature(operator, params, KEY, num_samples=20)
    np.testing.assert_allclose(32 * np.sum(nodes * weights), np.trace(G), rtol=0.2)
    with pytest.raises(ValueError, match="must not contain infs or NaNs"):
        top_eigenvalues(SymmetricOperator(lambda v: v * jnp.nan), jnp.ones(5))


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": 1j}, np.arange(3)])
def test_params_must_be_real(params):
    total = lambda p: jnp.sum(jnp.abs(flatten(p)))  # noqa: E731
    for function in (
        lambda: gauss_newton_product(total, jnp.sum, params, params),
        lambda: fisher_product(total, params, params),
        lambda: lanczos_eigenvalues(SymmetricOperator(lambda v: v), params, KEY),
        lambda: top_eigenvalues(SymmetricOperator(lambda v: v), params),
    ):
        with pytest.raises(TypeError, match=r"params must be real floats, got dtype (complex|int)"):
            function()


def data():
    _, x, y = classifier()
    return {"x": x, "y": y}


def host_batches(size):
    x, y = (np.asarray(leaf) for leaf in (data()["x"], data()["y"]))
    return [{"x": x[i : i + size], "y": y[i : i + size]} for i in range(0, SAMPLES, size)]


def product_of_batch(params, v, batch):
    return hvp(lambda p: loss(p, batch), params, v)


MEANS = {
    "data": lambda function, size: mean_over_data(function, data(), size),
    "batches": lambda function, size: mean_over_batches(function, host_batches(size)),
}


# 11 samples: three left, none, one batch alone.
@pytest.mark.parametrize(
    "size",
    [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(11, marks=pytest.mark.slow), 50],
)
@pytest.mark.parametrize("how", MEANS)
def test_means_are_those_of_the_whole_data(how, size):
    params = classifier()[0]
    v = jax.tree.map(jnp.ones_like, params)
    mean = MEANS[how](product_of_batch, size)
    expected = product_of_batch(params, v, data())
    for function in (mean, jax.jit(mean)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11), function(params, v), expected)
    mean_loss = MEANS[how](loss, size)
    gradient, direct = jax.grad(mean_loss)(params), jax.grad(loss)(params, data())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11), gradient, direct)


@pytest.mark.parametrize("how", [pytest.param("data", marks=pytest.mark.slow), "batches"])
def test_eigenvalues_over_a_data_set(how):
    params = classifier()[0]
    mean = partial(MEANS[how](product_of_batch, 4), params)
    H = np.asarray(hessian(lambda p: loss(p, data()), params))
    values, _ = lanczos_eigenvalues(SymmetricOperator(mean), params, KEY, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(H)[::-1][:2], rtol=1e-9)


def test_sharpness_of_batches_is_averaged():
    params = classifier()[0]
    rise = lambda p, batch: adaptive_worst_case_sharpness(  # noqa: E731
        lambda q: loss(q, batch), p, rho=0.1, num_steps=3
    )
    each = [(rise(params, batch), len(batch["y"])) for batch in host_batches(4)]
    expected = sum(value * size for value, size in each) / SAMPLES
    np.testing.assert_allclose(
        mean_over_batches(rise, host_batches(4))(params), expected, rtol=1e-12
    )


def test_batches_are_gone_through_again_at_each_call_and_compiled_once():
    traced, seen = [], []

    class Loader:
        def __iter__(self):
            for batch in host_batches(4):
                seen.append(len(batch["y"]))
                yield batch

    def function(p, batch):
        traced.append(1)
        return loss(p, batch)

    mean = mean_over_batches(function, Loader())
    params = classifier()[0]
    for _ in range(3):
        mean(params)
    assert seen == [4, 4, 3] * 3
    assert len(traced) == 2


def test_batches_say_what_is_wrong():
    mean = mean_over_batches(lambda batch: jnp.mean(batch), iter([jnp.ones(3)]))
    assert mean() == 1
    with pytest.raises(ValueError, match="a generator is empty after the first"):
        mean()
    for wrong in ({"x": np.ones((3, 2)), "y": np.ones(2)}, np.ones(()), {}):
        with pytest.raises(ValueError, match="one number of samples along their first axes"):
            mean_over_data(lambda batch: 0.0, wrong, 2)
        with pytest.raises(ValueError, match="one number of samples along their first axes"):
            mean_over_batches(lambda batch: 0.0, [wrong])()
    with pytest.raises(ValueError, match="batch_size must be an integer, 1 or more, got 0"):
        mean_over_data(lambda batch: 0.0, np.ones(3), 0)
