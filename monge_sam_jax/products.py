r"""Products of a curvature matrix and a vector, and their means over a data set.

What the tools of `monge_sam_jax.curvature` need of a matrix is its product with a vector, a tree of
the form of the params. They take a loss, and mean its Hessian, or any other symmetric matrix:

.. code-block:: python

    ggn = SymmetricOperator(partial(gauss_newton_product, model_fn, loss_fn, params))
    lanczos_eigenvalues(ggn, params, key)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax._core.checks import check_at_least
from monge_sam_jax.metrics import Params

__all__ = [
    "LossFn",
    "SymmetricOperator",
    "fisher_product",
    "gauss_newton_product",
    "hvp",
    "mean_over_batches",
    "mean_over_data",
]
__dir__ = __all__.copy

LossFn: TypeAlias = Callable[[Params], jax.Array]
PyTree: TypeAlias = Any


class SymmetricOperator(NamedTuple):
    """A symmetric matrix by its products, in place of a loss whose Hessian would be taken.

    Attributes:
      product: v -> A v, linear, between trees of the form of the params. It is called as it is:
        compile it with `jax.jit` yourself, unless all is called under `jax.jit`.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.curvature import top_eigenvalues
    >>> operator = SymmetricOperator(lambda v: jnp.arange(100.0) * v)
    >>> jnp.round(top_eigenvalues(operator, jnp.zeros(100), tol=1e-4))
    Array([99.], dtype=float32)
    """

    product: Callable[[Params], Params]


def hvp(loss_fn: LossFn, params: Params, vector: Params) -> Params:
    r"""The Hessian of a loss times a vector, forward over reverse; about the cost of two gradients.

    .. math:: H v = \frac{d}{dt} \nabla \ell(\theta + t v) \Big|_{t = 0}

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays.
      vector: v, a tree of the structure, shapes and dtypes of the params.

    Returns:
      H v, a tree of the same form.

    Raises:
      TypeError: a param is no real float, or params and vector differ in form.

    >>> import jax.numpy as jnp
    >>> hvp(lambda p: p[0] ** 2 * p[1], jnp.array([3.0, 2.0]), jnp.array([1.0, 0.0]))
    Array([4., 6.], dtype=float32)
    """
    check_real(params)
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


def gauss_newton_product(
    model_fn: Callable[[Params], PyTree],
    loss_fn: Callable[[PyTree], jax.Array],
    params: Params,
    vector: Params,
) -> Params:
    r"""The generalised Gauss-Newton matrix of a loss of a model's outputs, times a vector.

    .. math::
        G v = J^\top H_f J v, \qquad J = \frac{\partial f}{\partial \theta}, \quad
        H_f = \nabla_f^2 \ell(f)

    It is the Hessian of :math:`\ell(f(\theta))` less the part with second derivatives of the model,
    and positive semidefinite if the loss is convex in the outputs. For the cross-entropy of a
    softmax, and for half the squared error (a Gaussian of unit variance), it is the Fisher
    information, with the expectation over labels that the model draws. `fisher_product` has the
    labels of the data in their place, and is another matrix.

    Args:
      model_fn: params -> outputs f, a tree of real arrays, of a whole batch.
      loss_fn: outputs -> loss, a scalar; its mean over the batch gives the mean matrix.
      params: theta, a tree of real arrays.
      vector: v, a tree of the structure, shapes and dtypes of the params.

    Returns:
      G v, a tree of the same form.

    Raises:
      TypeError: a param is no real float, or params and vector differ in form.

    References:
      Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002;
      Martens, New insights and perspectives on the natural gradient method, 2020.

    >>> import jax.numpy as jnp
    >>> X, y = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.zeros(2)
    >>> squared_error = lambda f: 0.5 * jnp.sum((f - y) ** 2)
    >>> gauss_newton_product(lambda p: X @ p, squared_error, jnp.ones(2), jnp.array([1.0, 0.0]))
    Array([1., 2.], dtype=float32)
    """
    check_real(params)
    outputs, tangent = jax.jvp(model_fn, (params,), (vector,))
    _, pullback = jax.vjp(model_fn, params)
    return pullback(jax.jvp(jax.grad(loss_fn), (outputs,), (tangent,))[1])[0]


def fisher_product(
    losses_fn: Callable[[Params], jax.Array], params: Params, vector: Params
) -> Params:
    r"""The empirical Fisher matrix, the mean over samples of their gradients' squares, times v.

    .. math::
        F v = \frac{1}{N} \sum_{i=1}^N g_i (g_i^\top v), \qquad g_i = \nabla \ell_i(\theta)

    No gradient of a single sample is formed: it is a product with the Jacobian of the losses, and
    one with its transpose. With the labels of the data this is the empirical Fisher. The Fisher
    information itself has labels that the model draws: then F is an unbiased estimate of it, and
    `gauss_newton_product` is exact for the usual losses.

    Args:
      losses_fn: params -> losses of the N samples, an array of any shape; negative log-likelihoods.
      params: theta, a tree of real arrays.
      vector: v, a tree of the structure, shapes and dtypes of the params.

    Returns:
      F v, a tree of the same form.

    Raises:
      TypeError: a param is no real float, or params and vector differ in form.

    References:
      Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation for natural
      gradient descent, 2019.

    >>> import jax.numpy as jnp
    >>> losses = lambda p: jnp.array([p[0], 2 * p[1]])  # gradients (1, 0) and (0, 2)
    >>> fisher_product(losses, jnp.ones(2), jnp.array([1.0, 1.0]))
    Array([0.5, 2. ], dtype=float32)
    """
    check_real(params)
    slopes = jax.jvp(losses_fn, (params,), (vector,))[1]
    _, pullback = jax.vjp(losses_fn, params)
    return pullback(slopes / slopes.size)[0]


def mean_over_data(
    function: Callable[..., PyTree], data: PyTree, batch_size: int
) -> Callable[..., PyTree]:
    r"""The mean over a data set of a function of a batch, in a loop that is compiled.

    .. math:: \bar f(x) = \frac{1}{N} \sum_b n_b f(x, \text{batch}_b)

    One of :math:`n_b` samples counts as many, so that the last batch may be smaller, and f should
    be a mean over its batch: a loss, a gradient, a curvature product, a sharpness. Curvature is
    averaged product by product: the Hessian product of a mean loss would keep the activations of
    all batches.

    With K whole batches, batch b has the samples b, b + K, ...: data that are sharded along their
    samples stay where they are, as long as the batch size is a multiple of the shards.

    Args:
      function: (\*x, batch) -> f, a tree of arrays.
      data: a tree of arrays of N samples, along their first axes.
      batch_size: samples to a batch.

    Returns:
      \*x -> the mean of f. It can be called under `jax.jit`, and differentiated.

    Raises:
      ValueError: the arrays differ in N, or batch_size is less than one.

    >>> import jax.numpy as jnp
    >>> from functools import partial
    >>> loss_fn = lambda p, batch: jnp.mean(batch) * jnp.sum(p**2)
    >>> mean_hvp = mean_over_data(
    ...     lambda p, v, batch: hvp(lambda p: loss_fn(p, batch), p, v), jnp.arange(7.0), 3
    ... )
    >>> hessian_of_mean = SymmetricOperator(partial(mean_hvp, jnp.ones(2)))
    >>> hessian_of_mean.product(jnp.array([1.0, 2.0]))
    Array([ 6., 12.], dtype=float32)
    """
    check_at_least("batch_size", batch_size, 1)
    N = num_samples(data)
    batch_size = min(batch_size, N)
    K = N // batch_size

    def batch(b: chex.Numeric, x: jax.Array) -> jax.Array:
        whole = jnp.reshape(x[: K * batch_size], (batch_size, K, *x.shape[1:]))
        return jax.lax.dynamic_index_in_dim(whole, b, axis=1, keepdims=False)

    def mean(*x: PyTree) -> PyTree:
        def add(b: jax.Array, total: PyTree) -> PyTree:
            return optax.tree.add(total, function(*x, jax.tree.map(partial(batch, b), data)))

        first = function(*x, jax.tree.map(partial(batch, 0), data))
        total = jax.lax.fori_loop(1, K, add, first)
        average = jax.tree.map(lambda t: t / K, total)
        if K * batch_size == N:
            return average
        rest = function(*x, jax.tree.map(lambda a: a[K * batch_size :], data))
        share = 1 - K * batch_size / N
        return jax.tree.map(lambda m, r: m + (r - m) * share, average, rest)

    return mean


def mean_over_batches(
    function: Callable[..., PyTree], batches: Iterable[PyTree]
) -> Callable[..., PyTree]:
    r"""The mean over batches of a function of a batch, in a loop on the host.

    As `mean_over_data`, for data that do not fit the device, or come from a loader: at each call
    the batches are gone through once, and the compiled function called with each.

    Args:
      function: (\*x, batch) -> f, a tree of arrays. It is compiled once for each shape of a batch;
        let it take what it needs, such as params, as x, since it keeps what it closes over.
      batches: trees of arrays, each of its number of samples along their first axes; to be gone
        through again and again, as a list or a data loader can, and a generator cannot.

    Returns:
      \*x -> the mean of f, weighted by the number of samples. Under `jax.jit` the loop is unrolled.

    Raises:
      ValueError: on a call: the arrays of a batch differ in the number of samples, or there are no
        batches.

    >>> import jax.numpy as jnp
    >>> batches = [jnp.ones(3), jnp.full(1, 5.0)]
    >>> mean = mean_over_batches(lambda p, batch: p * jnp.mean(batch), batches)
    >>> mean(jnp.array(2.0))
    Array(4., dtype=float32)
    """
    compiled = jax.jit(function)
    update = jax.jit(lambda share, mean, f: jax.tree.map(lambda m, x: m + (x - m) * share, mean, f))

    def mean(*x: PyTree) -> PyTree:
        average, seen = None, 0
        for batch in batches:
            size = num_samples(batch)
            seen += size
            f = compiled(*x, batch)
            average = f if average is None else update(size / seen, average, f)
        if not seen:
            raise ValueError(
                "batches had nothing to give: pass a list, or another iterable that can be gone "
                "through again and again; a generator is empty after the first product"
            )
        return average

    return mean


def num_samples(batch: PyTree) -> int:
    """The length of all arrays' first axes; ValueError if they differ."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
        raise ValueError(
            f"the arrays of a batch must have one number of samples along their first axes, got "
            f"shapes {shapes}; what is needed whole is an argument before the batch"
        )
    return sizes.pop()[0]


def product_with(loss_fn: LossFn | SymmetricOperator, params: Params) -> Callable[[Params], Params]:
    """The map v -> A v, by a compiled function if the matrix is the Hessian of a loss."""
    check_real(params)
    if isinstance(loss_fn, SymmetricOperator):
        return loss_fn.product
    return partial(jax.jit(partial(hvp, loss_fn)), params)


def check_real(params: Params) -> None:
    """Raises TypeError unless all params are real floats."""
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"params must be real floats, got dtype {jnp.result_type(leaf)}")
