"""Equinox and Haiku: what the guide shows, against loops written by hand."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import flat, relative_error

import monge_sam_jax as ms

RHO = 0.05
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(16, 2)), jnp.float32)
STEPS = 4


def perturbed(params, grads):
    """theta + delta* of eq. 9, in NumPy; None stays None."""
    n = np.linalg.norm(flat(grads).astype(float))
    factor = RHO / (n * np.sqrt(1 + n**2))
    return jax.tree.map(
        lambda p, g: (np.asarray(p) + factor * np.asarray(g)).astype(p.dtype), params, grads
    )


def loop_by_hand(grad_fn, params, optimizer):
    """grad_fn: (params, step) -> gradient of that step's loss."""
    state, first_passes = optimizer.init(params), []
    for i in range(STEPS):
        first_passes.append(params)
        second = grad_fn(perturbed(params, grad_fn(params, i)), i)
        updates, state = optimizer.update(second, state, params)
        params = optax.apply_updates(params, updates)
    return params, first_passes


# --- Equinox ---


class Network(eqx.Module):
    """With a leaf that is no array, a frozen one of integers, and BatchNorm's statistics."""

    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear
    activation: object
    steps: jax.Array

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(3, 8, key=first)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", momentum=0.9, mode="batch")
        self.out = eqx.nn.Linear(8, 2, key=second)
        self.activation = jax.nn.tanh
        self.steps = jnp.arange(3)

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.out(self.activation(x)), state


def forward(model, state, x):
    vectorised = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    return vectorised(x, state)


def equinox_functional(model, state, optimizer):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, state, x, y):
        predictions, state = forward(eqx.combine(params, static), state, x)
        return jnp.mean((predictions - y) ** 2), state

    value_and_grad = ms.sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=0.05, has_aux=True
    )

    @jax.jit
    def step(params, state, opt_state, x, y):
        (loss, state), grads = value_and_grad(params, state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), state, opt_state, loss

    opt_state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, opt_state, _ = step(params, state, opt_state, X, Y)
    return eqx.combine(params, static), state


def equinox_chain(model, state, optimizer):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @functools.partial(jax.grad, has_aux=True)
    def grad_fn(params, state, x, y):
        predictions, state = forward(eqx.combine(params, static), state, x)
        return jnp.mean((predictions - y) ** 2), state

    tx = optax.chain(ms.monge_sam(rho=0.05), optimizer)

    @jax.jit
    def step(params, state, opt_state, x, y):
        grads, new_state = grad_fn(params, state, x, y)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=lambda p: grad_fn(p, state, x, y)[0]
        )
        return eqx.apply_updates(params, updates), new_state, opt_state

    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, state, opt_state = step(params, state, opt_state, X, Y)
    return eqx.combine(params, static), state


@pytest.mark.parametrize("train", [equinox_functional, equinox_chain])
def test_equinox(train):
    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    optimizer = optax.sgd(0.1, momentum=0.9)
    trained, actual_state = train(model, state, optimizer)

    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss_at = jax.jit(
        lambda p, s: jnp.mean((forward(eqx.combine(p, static), s, X)[0] - Y) ** 2),
    )
    grad_fn = jax.jit(jax.grad(loss_at))
    expected, first_passes = loop_by_hand(lambda p, _: grad_fn(p, state), params, optimizer)
    assert eqx.tree_equal(
        eqx.partition(trained, eqx.is_inexact_array)[1], static
    )  # activation, integers
    actual = eqx.filter(trained, eqx.is_inexact_array)
    assert relative_error(flat(actual), flat(expected)) < 1e-5
    assert relative_error(flat(actual), flat(params)) > 1e-2
    assert float(loss_at(expected, state)) < float(loss_at(params, state))

    for first in first_passes:  # statistics of the unperturbed params
        _, state = forward(eqx.combine(first, static), state, X)
    assert relative_error(flat(actual_state), flat(state)) < 1e-5


# --- Haiku ---


def network(x, is_training):
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(
        hk.Linear(8)(x), is_training
    )
    x = hk.dropout(hk.next_rng_key(), 0.2, jnp.tanh(x)) if is_training else jnp.tanh(x)
    return hk.Linear(2)(x)


NET = hk.transform_with_state(network)
KEYS = jax.random.split(jax.random.key(1), STEPS)


def haiku_functional(params, state, optimizer):
    def loss_fn(params, state, key, x, y):
        predictions, state = NET.apply(params, state, key, x, is_training=True)
        return jnp.mean((predictions - y) ** 2), state

    value_and_grad = ms.sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=0.05, has_aux=True
    )

    @jax.jit
    def step(params, state, opt_state, key, x, y):
        (loss, state), grads = value_and_grad(params, state, key, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    opt_state = optimizer.init(params)
    for key in KEYS:
        params, state, opt_state, _ = step(params, state, opt_state, key, X, Y)
    return params, state


def haiku_chain(params, state, optimizer):
    def loss_fn(params, state, key, x, y):
        predictions, state = NET.apply(params, state, key, x, is_training=True)
        return jnp.mean((predictions - y) ** 2), state

    def grad_fn(params, state, key, x, y):
        return jax.grad(loss_fn, has_aux=True)(params, state, key, x, y)

    tx = optax.chain(ms.monge_sam(lambda p, args: grad_fn(p, *args)[0], rho=0.05), optimizer)

    @jax.jit
    def step(params, state, opt_state, *batch):
        grads, new_state = grad_fn(params, state, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, args=(state, *batch))
        return optax.apply_updates(params, updates), new_state, opt_state

    opt_state = tx.init(params)
    for key in KEYS:
        params, state, opt_state = step(params, state, opt_state, key, X, Y)
    return params, state


@pytest.mark.parametrize("train", [haiku_functional, haiku_chain])
def test_haiku(train):
    params, state = NET.init(jax.random.key(0), X, is_training=True)
    optimizer = optax.sgd(0.1, momentum=0.9)
    actual, actual_state = train(params, state, optimizer)

    apply = jax.jit(NET.apply, static_argnames="is_training")
    loss_at = lambda p, i: jnp.mean(  # noqa: E731
        (apply(p, state, KEYS[i], X, is_training=True)[0] - Y) ** 2
    )
    grad_fn = jax.jit(jax.grad(loss_at))
    expected, first_passes = loop_by_hand(grad_fn, params, optimizer)
    assert relative_error(flat(actual), flat(expected)) < 1e-5
    assert relative_error(flat(actual), flat(params)) > 1e-2

    for first, key in zip(first_passes, KEYS, strict=True):
        _, state = apply(first, state, key, X, is_training=True)
    assert relative_error(flat(actual_state), flat(state)) < 1e-5
    assert jax.tree.map(jnp.result_type, actual_state) == jax.tree.map(jnp.result_type, state)
    loss = lambda p: jnp.mean((apply(p, state, None, X, is_training=False)[0] - Y) ** 2)  # noqa: E731
    assert float(loss(actual)) < float(loss(params))
