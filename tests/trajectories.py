"""Twenty steps on a small problem, by hand in NumPy and as the package takes them.

Tests spread the second over devices and processes and compare it with the first.
"""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import CASES

import monge_sam_jax as ms

STEPS, RHO, RATE, DECAY = 20, 0.1, 0.02, 0.9
NAMES = ["sam", "monge_sam", "adaptive_sam", "fisher_sam"]
NORMS = [0.1, 1.0, 30.0]  # of the first gradient; a sum in place of a mean shows in Monge's length


def initial_params():
    rng = np.random.default_rng(0)
    return {
        "bias": 0.1 * rng.normal(size=8).astype(np.float32),
        "temperature": np.array(1.2, np.float32),
        "weights": 0.5 * rng.normal(size=(16, 8)).astype(np.float32),
    }


@functools.cache
def batch_of(norm):
    """A batch at which the first gradient is of that norm."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(32, 16)), rng.normal(size=(32, 8))
    gradient = gradient_by_hand(initial_params(), {"x": x, "y": y, "weight": np.ones(32)})
    weight = np.full(32, norm / length(gradient))
    return jax.tree.map(np.float32, {"x": x, "y": y, "weight": weight})


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["weights"] + params["bias"].reshape(1, -1))
    errors = params["temperature"] * hidden - batch["y"]
    return jnp.mean(batch["weight"].reshape(-1, 1) * errors**2)


def gradient_by_hand(params, batch):
    x, y, weight = batch["x"], batch["y"], batch["weight"].reshape(-1, 1)
    hidden = np.tanh(x @ params["weights"] + params["bias"])
    by_output = 2 * weight * (params["temperature"] * hidden - y) / y.size
    by_input = by_output * params["temperature"] * (1 - hidden**2)
    return {
        "bias": np.sum(by_input, axis=0),
        "temperature": np.sum(by_output * hidden),
        "weights": x.T @ by_input,
    }


def perturbation_by_hand(name, g, theta):
    """Eqs. 3, 5 and 9."""
    eta = CASES[name].options.get("eta")
    if name == "sam":
        v, factor = g, RHO / length(g)
    elif name == "monge_sam":
        v, factor = g, RHO / length(g) / np.sqrt(1 + dot(g, g))
    elif name == "adaptive_sam":
        v = jax.tree.map(lambda g, p: (np.abs(p) + eta) ** 2 * g, g, theta)
        factor = RHO / np.sqrt(dot(g, v))
    else:
        v = jax.tree.map(lambda g: g / (1 + eta * g**2), g)
        factor = RHO / np.sqrt(dot(g, v))
    return jax.tree.map(lambda x: factor * x, v)


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.sum(x * y), a, b)))


def length(tree):
    return np.sqrt(dot(tree, tree))


class Expected(NamedTuple):
    """Params and momentum in the end, and means over the shards at the last perturbation."""

    params: Any
    trace: Any
    grad_norm: Any
    perturbation_norm: Any


@functools.cache
def by_hand(name, norm, shards, period=1):
    """Every shard of the batch perturbs for itself, in float64."""

    def wide(tree):
        return jax.tree.map(np.float64, tree)

    pieces = jax.tree.map(lambda x: np.split(x, shards), wide(batch_of(norm)))
    batches = [
        dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)
    ]
    theta = wide(initial_params())
    trace = jax.tree.map(np.zeros_like, theta)
    for step in range(STEPS):
        grads = [gradient_by_hand(theta, batch) for batch in batches]
        if step % period == 0:
            deltas = [perturbation_by_hand(name, g, theta) for g in grads]
            norms = np.mean([length(g) for g in grads]), np.mean([length(d) for d in deltas])
            points = [jax.tree.map(np.add, theta, delta) for delta in deltas]
            grads = [gradient_by_hand(*pair) for pair in zip(points, batches, strict=True)]
        mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *grads)
        trace = jax.tree.map(lambda t, g: DECAY * t + g, trace, mean)
        theta = jax.tree.map(lambda p, t: p - RATE / norm * t, theta, trace)
    return Expected(theta, trace, *norms)


class Run(NamedTuple):
    """A run with the chain; at its params, what the functional form gives."""

    params: Any
    opt_state: Any
    trace: Any  # momentum of the functional form's gradients
    diagnostics: Any  # of the functional form


def chain(name, **options):
    case = CASES[name]
    transformation = case.builder(jax.grad(loss), rho=RHO, **case.options, **options)
    return optax.chain(transformation, optax.trace(DECAY))


def functional_form(name, **options):
    metric = CASES[name].metric(**CASES[name].options)
    return ms.sharpness_aware_value_and_grad(
        loss, metric=metric, rho=RHO, diagnostics=True, **options
    )


def start(params, init):
    """A run of every name, with states by init(tx, params)."""
    runs = {}
    for name in NAMES:
        opt_state = init(chain(name), params)
        zeros = opt_state[1].trace
        runs[name] = Run(params, opt_state, zeros, ms.get_diagnostics(opt_state))
    return runs


def unchanged(params):
    return params


def vary(params):
    """The params, so that `shard_map` does not sum their gradient over devices."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(params, "data", to="varying")
    return jax.lax.pvary(params, "data")  # JAX before 0.9


def step_with_chain(runs, batch, rate, *, cast=unchanged, **options):
    def step(name, run):
        grads = jax.grad(loss)(cast(run.params), batch)
        updates, opt_state = chain(name, **options).update(
            grads, run.opt_state, run.params, batch=batch
        )
        return run._replace(params=descend(run.params, rate, updates), opt_state=opt_state)

    return {name: step(name, run) for name, run in runs.items()}


def step_with_both(runs, batch, rate, *, cast=unchanged, **options):
    """A step with the chain, and the functional form beside it."""

    def beside(name, run, moved):
        _, grads, diagnostics = functional_form(name, **options)(cast(run.params), batch)
        return moved._replace(trace=decay(run.trace, grads), diagnostics=diagnostics)

    moved = step_with_chain(runs, batch, rate, cast=cast, **options)
    return {name: beside(name, run, moved[name]) for name, run in runs.items()}


def map_over_shards(step, mesh, check_vma, **options):
    """The step as every device takes it, with its share of the batch."""
    if check_vma:
        options["cast"] = vary
    return jax.shard_map(
        functools.partial(step, **options),
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )


def step_per_shard(runs, batch, rate, **options):
    """A step with the gradient of `per_shard` alone."""

    def step(name, run):
        value_and_grad = ms.per_shard(functional_form(name), "data", **options)
        _, grads, diagnostics = value_and_grad(run.params, batch)
        trace = decay(run.trace, grads)
        return Run(descend(run.params, rate, trace), run.opt_state, trace, diagnostics)

    return {name: step(name, run) for name, run in runs.items()}


def decay(trace, grads):
    return jax.tree.map(lambda t, g: DECAY * t + g, trace, grads)


def descend(params, rate, updates):
    return jax.tree.map(lambda p, u: p - rate * u, params, updates)


def follow(step, runs, place, fetch=jax.device_get, norms=NORMS):
    """Where runs end, as (name, norm of the first gradient) -> Run."""
    ends = {}
    for norm in norms:
        now, batch = runs, place(batch_of(norm))
        for _ in range(STEPS):  # one at a time: on CPU, steps in flight can lock each other out
            now = jax.block_until_ready(step(now, batch, RATE / norm))
        ends |= {(name, norm): run for name, run in fetch(now).items()}
    return ends


def assert_functional_form(ends, shards, mode=""):
    for (name, norm), run in ends.items():
        expected = by_hand(name, norm, shards)
        where = f"{mode} {name}, first gradient of norm {norm}"
        assert_close(run.params, expected.params, where)
        assert_close(run.trace, expected.trace, where, scale=norm)
        assert_diagnostics(run.diagnostics, expected, where)


def assert_chain(ends, shards, period=1, mode=""):
    for (name, norm), run in ends.items():
        expected = by_hand(name, norm, shards, period)
        where = f"{mode} {name}, first gradient of norm {norm}"
        assert_close(run.params, expected.params, where)
        assert_close(run.opt_state[1].trace, expected.trace, where, scale=norm)
        assert_diagnostics(ms.get_diagnostics(run.opt_state), expected, where)


def assert_close(actual, expected, where, scale=1.0):
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, actual),
        expected,
        rtol=1e-5,
        atol=1e-5 * scale,
        custom_message=where,
    )


def assert_diagnostics(actual, expected, where):
    norms = actual.grad_norm, actual.perturbation_norm
    np.testing.assert_allclose(
        norms, (expected.grad_norm, expected.perturbation_norm), rtol=1e-4, err_msg=where
    )


def cpu_devices(count):
    """Virtual devices, of one process or several."""
    devices = jax.devices("cpu")
    told = f"of {count} CPU devices there are {len(devices)}: xla_flags.py makes eight"
    assert len(devices) >= count, told
    return devices[:count]


def make_mesh(axis_type, **sizes):
    """A mesh of virtual devices."""
    shape = tuple(sizes.values())
    devices = np.array(cpu_devices(math.prod(shape))).reshape(shape)
    return Mesh(devices, tuple(sizes), axis_types=(axis_type,) * len(sizes))


def use_mesh(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)


def spread(mesh, tree, specs):
    """The tree on the mesh by a tree of specs, or by one for all leaves."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)
