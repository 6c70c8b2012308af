"""Kernels, temporaries and moved data of steps over many leaves, beside steps written by hand.

A launch costs a GPU a few microseconds whatever the kernel does, so small steps are bound by their
number. The CPU's compiler fuses by other rules, but what is reduced together is so there too.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trajectories import make_mesh

import monge_sam_jax as ms
from monge_sam_jax._core.numerics import LAUNCH_BYTES, euclidean_norm, inner_product, scaled_norm
from monge_sam_jax.experiments.bench.models import MLP, Transformer

pytestmark = pytest.mark.usefixtures("on_cpu")

RHO = 0.05
MOMENTUM, ADAMW = optax.sgd(0.01, momentum=0.9), optax.adamw(1e-3)
# Network, shape of a batch, optimizer, and fusions that a plain step has at least.
MODELS = {
    "mlp of 30": (MLP(width=16, layers=30, classes=10), (8, 16), MOMENTUM, 200),
    "mlp of 8": (MLP(width=64, layers=8, classes=10), (16, 64), optax.sgd(0.01), 0),
    "mlp of 120": (MLP(width=16, layers=120, classes=10), (8, 16), MOMENTUM, 800),
    "transformer of 12": (
        *(Transformer(width=16, layers=12, heads=2, vocabulary=32), (2, 8), ADAMW),
        800,
    ),
}
MANY = [
    "mlp of 30",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp of 120", "transformer of 12")),
]


def loss_of(model, params, x):
    logits = model.apply({"params": params}, x)
    return -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32))[..., 0])


@functools.cache
def compiled(model, method):
    """A training step, compiled, and the bytes of the params."""
    network, shape, base, _ = MODELS[model]
    is_text = isinstance(network, Transformer)
    x = jax.ShapeDtypeStruct(shape, jnp.int32 if is_text else jnp.float32)
    grad_fn = jax.grad(functools.partial(loss_of, network))
    params = jax.eval_shape(network.init, jax.random.key(0), x)["params"]

    def descend(grads, state, params):
        updates, state = base.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def factor(g):
        n = optax.tree.norm(g)
        return RHO / (n * jnp.sqrt(1 + n**2))

    def plain(params, state, x):
        return descend(grad_fn(params, x), state, params)

    def by_hand(params, state, x):
        g = grad_fn(params, x)
        k = factor(g)
        perturbed = jax.tree.map(lambda p, g: p + k * g, params, g)
        return descend(grad_fn(perturbed, x), state, params)

    def one_pass_by_hand(y, carry, x):
        theta, state = carry
        g = grad_fn(y, x)
        k = factor(g)
        theta, state = descend(g, state, theta)
        return jax.tree.map(lambda t, g: t + k * g, theta, g), (theta, state)

    def with_package(tx, params, state, x):
        updates, state = tx.update(grad_fn(params, x), state, params, x=x)
        return optax.apply_updates(params, updates), state

    chain = optax.chain(ms.monge_sam(grad_fn, rho=RHO), base)
    one_pass = ms.one_pass_sam(base, rho=RHO)
    step, init = {
        "plain": (plain, base.init),
        "by hand": (by_hand, base.init),
        "one pass by hand": (one_pass_by_hand, lambda p: (p, base.init(p))),
        "monge_sam": (functools.partial(with_package, chain), chain.init),
        "one pass": (functools.partial(with_package, one_pass), one_pass.init),
    }[method]
    state = jax.eval_shape(init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    return lowered.compile(), size


def fusions(model, method):
    return compiled(model, method)[0].as_text().count(" fusion(")


def temporaries(model, method):
    """In params."""
    program, size = compiled(model, method)
    return program.memory_analysis().temp_size_in_bytes / size


@pytest.mark.parametrize("model", MANY)
def test_fusions_of_a_step(model):
    assert fusions(model, "plain") > MODELS[model][-1]
    assert fusions(model, "monge_sam") <= fusions(model, "by hand")
    assert fusions(model, "one pass") <= 1.6 * fusions(model, "plain")


@pytest.mark.parametrize("model", ["mlp of 8", *MANY])
def test_temporaries_are_those_of_the_step_by_hand(model):
    """The scaled gradient, which the safe norm is of, is no array."""
    by_hand = temporaries(model, "by hand")
    assert temporaries(model, "monge_sam") <= by_hand + 0.15


# --- what is reduced together ---


def many(rng, dtype=np.float32):
    """Leaves of few types, several of each, and one of its own."""
    shapes = [(3, 4), (4, 3), (), (5,)] * 6 + [(2, 2, 2)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex64])
def test_reductions_by_type(dtype):
    """One maximum and one sum for each type of leaves, and the numbers of NumPy in float64."""
    tree = many(np.random.default_rng(0), dtype)
    jaxpr = str(jax.make_jaxpr(scaled_norm)(tree))
    assert [jaxpr.count(f"= {kind}[") for kind in ("reduce_max", "reduce_sum")] == [5, 5]
    exact = np.sqrt(sum(np.sum(np.abs(np.asarray(x, complex)) ** 2) for x in tree))
    np.testing.assert_allclose(float(scaled_norm(tree).norm), exact, rtol=1e-6)
    np.testing.assert_allclose(float(euclidean_norm(tree, jnp.float32)), exact, rtol=1e-6)


def test_a_large_leaf_stays_by_itself():
    """One of one launch's bytes is reduced with others of its shape, a larger one is not."""
    small = LAUNCH_BYTES // 4
    for size, sums in ((small, 1), (small + 1, 2)):
        tree = [jax.ShapeDtypeStruct((size,), jnp.float32)] * 2
        jaxpr = str(jax.make_jaxpr(lambda t: inner_product(t, t, jnp.float32))(tree))
        assert jaxpr.count("= reduce_sum[") == sums


KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def moved_sizes(text):
    """Number of elements of every result of a collective of a compiled program."""
    types = re.findall(rf"= (.*?) (?:{KINDS})(?:-start)?\(", text)
    shapes = [dims.split(",") for kind in types for dims in re.findall(r"\[([\d,]*)\]", kind)]
    return [int(np.prod([int(n) for n in dims if n])) for dims in shapes]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_large_leaves_of_one_shape_sharded_differently_are_not_moved(kind):
    """Nor are small ones where the shardings are part of the types; else those alone."""
    mesh = make_mesh(kind, data=4, model=2)
    specs = [P("data"), P(None, "data"), P("model", "data"), P()]
    side = 2 * int(np.sqrt(LAUNCH_BYTES / 4))
    for n, may_move in ((side, False), (64, kind == AxisType.Auto)):
        tree = [
            jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, spec))
            for spec in specs
        ]
        function = lambda t: jnp.sqrt(scaled_norm(t).norm)  # noqa: E731
        moved = moved_sizes(jax.jit(function).lower(tree).compile().as_text())
        assert moved  # the scalars at least
        assert may_move or max(moved) == 1
