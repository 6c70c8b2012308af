"""What every builder promises on ordinary, bad and extreme input: one suite over all of them."""

import functools
import re
from typing import Any, NamedTuple

import chex
import flax
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, serialization
from reference import (
    CASES,
    EACH_CASE,
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    network_grad,
    network_loss,
    relative_error,
)

import monge_sam_jax as ms

RHO = 0.1
BATCH = example_batch()


@pytest.fixture(params=EACH_CASE)
def case(request):
    return CASES[request.param]


def build(case, grad_fn=None, **options):
    return case.builder(grad_fn, **{"rho": RHO, **case.options, **options})


def quadratic(params):
    return sum(jnp.sum(jnp.abs(p) ** 2) for p in jax.tree.leaves(params))


def quadratic_grad(params):
    return jax.tree.map(lambda p: 2 * p, params)


def step(tx, params, state, grad_fn, **extra):
    updates, state = tx.update(grad_fn(params, **extra), state, params, **extra)
    return optax.apply_updates(params, updates), state


def descend(case, steps, tail=None, **options):
    tx = optax.chain(build(case, network_grad, **options), tail or optax.sgd(0.1))
    params = example_params()
    state = tx.init(params)
    update = jax.jit(lambda p, s: step(tx, p, s, network_grad, batch=BATCH))
    for _ in range(steps):
        params, state = update(params, state)
    return params, state


# --- the gradient ---


def test_update_is_the_gradient_at_the_dense_perturbation(case):
    params = example_params()
    first = network_grad(params, BATCH)
    tx = build(case, network_grad)
    actual, _ = tx.update(first, tx.init(params), params, batch=BATCH)
    p, g = flat(params).astype(float), flat(first).astype(float)
    delta = dense_perturbation(case.matrix(p, g, **case.options), g, RHO)
    unravel = jax.flatten_util.ravel_pytree(params)[1]
    expected = network_grad(unravel(jnp.asarray(p + delta, jnp.float32)), BATCH)
    assert relative_error(flat(actual), flat(expected)) < 1e-5
    assert relative_error(flat(first), flat(expected)) > 1e-3  # the perturbation matters


def test_zero_gradient_gives_zero_perturbation(case):
    params = example_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = build(case, quadratic_grad, measure=True)
    updates, state = tx.update(zeros, tx.init(params), params)
    chex.assert_trees_all_equal(updates, quadratic_grad(params))
    assert flat(state.diagnostics).tolist()[:5] == [0] * 5
    assert np.all(np.isfinite(flat(state.diagnostics)))


def test_derivatives_at_a_zero_gradient_are_finite(case):
    params = {"a": jnp.zeros(3), "b": jnp.array([1.0, 2.0])}

    def outcome(params, rho):
        tx = build(case, quadratic_grad, rho=rho)
        zeros = jax.tree.map(lambda p: 0 * p, params)
        return quadratic(tx.update(zeros, tx.init(params), params)[0])

    first = jax.grad(outcome, argnums=(0, 1))
    for derivatives in (first, jax.jacfwd(first, argnums=(0, 1))):
        assert np.all(np.isfinite(flat(jax.jit(derivatives)(params, RHO))))


def test_zero_on_part_of_the_tree_is_ordinary(case):
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    grads = {"a": jnp.zeros(2), "b": jnp.array([2.0])}
    tx = build(case, quadratic_grad)
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(updates["a"], 2 * params["a"])
    assert updates["b"][0] > 6.01


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_non_finite_first_gradient_is_never_hidden(case, bad):
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": jnp.ones(())}}
    grads = {"a": jnp.array([1.0, bad, 1.0]), "b": {"c": jnp.ones(2), "d": jnp.ones(())}}
    constant = lambda params: jax.tree.map(jnp.ones_like, params)  # noqa: E731  finite at NaN
    tx = build(case, constant)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(grads, tx.init(params), params)
        assert not np.any(np.isfinite(flat(updates)))
    delta = ms.worst_case_perturbation(case.metric(**case.options), grads, params, RHO)
    assert not np.any(np.isfinite(flat(delta)))


def test_non_finite_second_gradient_is_caught_by_a_guard_after_it(case):
    params = {"a": jnp.ones(3)}
    broken = lambda params: {"a": jnp.array([1.0, jnp.nan, 1.0])}  # noqa: E731
    tx = optax.chain(build(case, broken), optax.apply_if_finite(optax.sgd(0.1), 3))
    updates, state = tx.update({"a": jnp.ones(3)}, tx.init(params), params)
    chex.assert_trees_all_equal(updates, {"a": jnp.zeros(3)})
    assert state[1].total_notfinite == 1


def test_rho_zero_is_the_base_optimizer_bit_for_bit(case):
    """Both call the same compiled gradient; within one program XLA may fuse the two differently."""
    grad_fn = jax.jit(network_grad)
    results = []
    for tx in (optax.chain(build(case, grad_fn, rho=0.0), optax.adam(1e-2)), optax.adam(1e-2)):
        params = example_params()
        state = tx.init(params)
        for _ in range(10):
            params, state = step(tx, params, state, grad_fn, batch=BATCH)
        results.append(params)
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_through_update_agree_with_finite_differences(x64, case, order):
    batch = {k: v.astype(jnp.float64) for k, v in BATCH.items()}
    params = example_params(jnp.float64)
    direction = jax.tree.map(lambda p: jnp.ones_like(p) / 3, params)

    def outcome(t):
        moved = jax.tree.map(lambda p, d: p + t * d, params, direction)
        tx = build(case, network_grad, rho=0.2 + t)
        updates, _ = tx.update(network_grad(moved, batch), tx.init(moved), moved, batch=batch)
        return quadratic(updates)

    function = jax.jit(outcome if order == 1 else jax.grad(outcome))
    h = 1e-5
    numeric = (function(h) - function(-h)) / (2 * h)
    assert float(jax.jit(jax.grad(function))(0.0)) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize("tangent", [1.0, 3.0, 1e3])
@pytest.mark.parametrize(
    "metric",
    [
        lambda a: ms.monge(alpha=a),
        ms.adaptive,
        ms.diagonal_fisher,
        lambda a: ms.scaled(ms.monge(), a),
    ],
    ids=["monge", "adaptive", "fisher", "scaled"],
)
def test_forward_derivatives_are_linear_in_the_tangent(metric, tangent):
    """The bounds by the largest number do not overflow in them."""
    g, params = jnp.array([1.0, 2.0]), jnp.array([0.5, -0.5])
    perturbation = lambda a: ms.worst_case_perturbation(metric(a), g, params, 0.1)  # noqa: E731
    h = 1e-2
    numeric = (perturbation(1.3 + h) - perturbation(1.3 - h)) / (2 * h)
    _, found = jax.jvp(perturbation, (1.3,), (tangent,))
    np.testing.assert_allclose(found, tangent * numeric, rtol=1e-3)


def test_second_derivative_at_unit_gradient(x64):
    """Where the Monge lift changes branch: alpha n = 1."""
    outcome = lambda g: jnp.sum(ms.worst_case_perturbation(ms.monge(), g, g, 1.0))  # noqa: E731
    exact = lambda g: (1 + g**2) ** -0.5  # noqa: E731
    for x in (1.0, 0.5, 2.0):
        g = jnp.asarray(x)
        for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f))):
            expected = derivative(exact)(g)
            assert float(derivative(outcome)(g)) == pytest.approx(float(expected), rel=1e-12)


# --- precision ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_params(case, dtype):
    params = {"a": jnp.full((40,), 1.0, dtype), "b": jnp.full((), 0.25, dtype)}
    grads = jax.tree.map(lambda p: p / 8, params)
    seen = []

    def grad_fn(params):
        seen.append(params)
        return quadratic_grad(params)

    tx = build(case, grad_fn, measure=True)
    updates, state = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    delta = ms.worst_case_perturbation(case.metric(**case.options), wide[1], wide[0], RHO)
    rounded = jax.tree.map(lambda p, d: (p + d).astype(dtype), wide[0], delta)
    chex.assert_trees_all_equal(seen[0], rounded)
    realised = flat(rounded).astype(float) - flat(params).astype(float)
    diagnostics = ms.get_diagnostics(state)
    assert float(diagnostics.realised_norm) == pytest.approx(np.linalg.norm(realised), rel=1e-5)
    assert abs(diagnostics.realised_norm / diagnostics.perturbation_norm - 1) > 1e-4

    tx = build(case, grad_fn, measure=True, widen_params=True)
    updates, state = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    chex.assert_trees_all_equal_dtypes(seen[1], wide[0])
    np.testing.assert_allclose(flat(seen[1]), flat(wide[0]) + flat(delta), rtol=1e-6)
    assert float(state.diagnostics.realised_norm) == pytest.approx(
        float(state.diagnostics.perturbation_norm), rel=1e-5
    )


def test_mixed_precision_trees_keep_their_dtypes(x64, case):
    params = {
        "half": jnp.ones(2, jnp.float16),
        "brain": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones(2, jnp.float32),
        "double": jnp.ones(2, jnp.float64),
    }
    tx = build(case, quadratic_grad)
    updates, state = tx.update(quadratic_grad(params), tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert all(d.dtype == jnp.float32 for d in state.diagnostics)


def test_grad_fn_in_another_precision_is_cast(case):
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    tx = build(case, lambda p: {"a": p["a"].astype(jnp.float32)})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["a"].dtype == jnp.bfloat16


def test_complex_params_ascend(case):
    """Optax's convention: gradients conjugated by the caller, so that p - lr g descends."""
    center = jnp.array([1.0 + 2.0j, -0.5j])
    loss = lambda p: jnp.sum(jnp.abs(p["z"] - center) ** 2) + jnp.sum(p["x"] ** 2)  # noqa: E731
    descent = lambda p: jax.tree.map(jnp.conj, jax.grad(loss)(p))  # noqa: E731
    params = {"z": jnp.array([0.3 - 0.1j, 0.2 + 0.7j]), "x": jnp.array([0.5])}
    seen = []

    def grad_fn(p):
        seen.append(p)
        return descent(p)

    tx = build(case, grad_fn)
    updates, state = tx.update(descent(params), tx.init(params), params)
    assert loss(seen[0]) > loss(params) + 1e-3
    rise = float(loss(seen[0]) - loss(params))
    assert float(state.diagnostics.predicted_sharpness) == pytest.approx(rise, rel=0.1)
    assert loss(jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)) < loss(params)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_complex_perturbation_is_that_of_the_real_and_imaginary_parts(case):
    g = np.array([1.0 - 2.0j, 0.5j])
    parts = np.array([[1.0, -2.0], [0.0, 0.5]])
    if case.matrix.__name__ in ("adaptive_matrix", "fisher_matrix"):
        weights = {"adaptive_matrix": (np.array([5.0, 1.0]) + 0.1) ** 2}.get(
            case.matrix.__name__, 1 / (1 + 2.0 * np.abs(g) ** 2)
        )
        h = weights[:, None] * parts
        expected = RHO * h / np.sqrt(np.sum(parts * h))
    else:
        G = case.matrix(parts.ravel(), parts.ravel(), **case.options)
        expected = dense_perturbation(G, parts.ravel(), RHO).reshape(2, 2)
    params = jnp.array([3.0 + 4.0j, -1.0j])
    delta = ms.worst_case_perturbation(
        case.metric(**case.options), jnp.asarray(g, jnp.complex64), params, RHO
    )
    np.testing.assert_allclose(np.stack([delta.real, delta.imag], -1), expected, rtol=1e-5)


# --- arguments ---


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), np.float32(-2), jnp.ones(2)])
def test_bad_rho(case, value):
    with pytest.raises(ValueError, match="rho must be"):
        build(case, rho=value)


@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_rho_of_a_wrong_type(case, value):
    with pytest.raises(TypeError, match="rho must be a real number"):
        build(case, rho=value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"period": 0}, ValueError, "period must be at least one, got 0"),
        ({"period": 1.5}, TypeError, "period must be an integer, got 1.5"),
        ({"period": True}, TypeError, "period must be an integer"),
        ({"mask": {"a": 1}}, TypeError, "leaves of mask must be bools, got 1"),
        ({"mask": {"b": True}}, ValueError, "mask must be .* a prefix of the params"),
    ],
)
def test_bad_options(case, options, error, message):
    params = {"a": jnp.ones(2)}
    with pytest.raises(error, match=message):
        build(case, quadratic_grad, **options).update(params, build(case).init(params), params)


def test_grad_fn_and_metric_of_wrong_types():
    with pytest.raises(TypeError, match="grad_fn must be a function"):
        ms.sam(0.05)
    with pytest.raises(TypeError, match="metric must be a Metric"):
        ms.sharpness_aware(metric="monge")
    with pytest.raises(TypeError, match="metric must be a Metric"):
        ms.sharpness_aware(metric=ms.monge)


def test_schedule_advances_once_per_update_and_survives_save_and_restore(case):
    def seen_by(steps, state=None):
        tx = build(case, quadratic_grad, rho=lambda count: 0.1 / (1 + count))
        params = {"a": jnp.array([3.0, 4.0])}
        state = tx.init(params) if state is None else state
        lengths = []
        for _ in range(steps):
            _, state = tx.update(quadratic_grad(params), state, params)
            lengths.append(float(state.diagnostics.perturbation_norm))
        return lengths, state

    all_lengths, _ = seen_by(6)
    first, state = seen_by(3)
    empty = build(case).init({"a": jnp.ones(2)})
    restored = serialization.from_bytes(empty, serialization.to_bytes(state))
    assert first + seen_by(3, restored)[0] == all_lengths
    expected = all_lengths[0] / np.arange(1, 7)
    np.testing.assert_allclose(all_lengths, expected, rtol=1e-6)


def test_missing_params_and_missing_gradient_function(case):
    params = {"a": jnp.ones(2)}
    tx = build(case)
    causes = "TrainState.*MultiSteps.*lookahead"
    with pytest.raises(ValueError, match=f"needs the params.*{causes}"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=f"needs a gradient function.*{causes}"):
        tx.update(params, tx.init(params), params)
    tx = build(case, network_grad)
    with pytest.raises(ValueError, match=f"grad_fn needs batch, .*batch=.*{causes}"):
        tx.update(params, tx.init(params), params, x=1)


class Pair(NamedTuple):
    a: Any
    b: Any


WRONG_GRADIENTS = {
    "value and grad": (lambda g: (1.0, g), r"\(value, grad\); use jax.grad"),
    "grad and aux": (lambda g: (g, {"logits": 1.0}), r"\(grad, aux\); drop"),
    "none": (lambda g: None, "returned None"),
    "missing": (lambda g: {"a": g["a"]}, r"nothing at params\['b'\]\['c'\]"),
    "additional": (lambda g: g | {"d": g["a"]}, r"additional at params\['d'\]"),
    "broadcast": (lambda g: g | {"a": g["a"][0]}, r"at params\['a'\] its shape is \(\)"),
    "batch axis": (lambda g: g | {"a": g["a"][None]}, r"batch, device or ensemble axis"),
    "complex": (lambda g: g | {"a": g["a"] + 0j}, r"params\['a'\] its dtype is complex64"),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_what_grad_fn_must_not_return(case, wrong):
    change, message = WRONG_GRADIENTS[wrong]
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(())}}
    tx = build(case, lambda p: change(quadratic_grad(p)))
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params)


def test_real_gradient_of_complex_params(case):
    params = {"a": jnp.ones(2, jnp.complex64)}
    tx = build(case, lambda p: {"a": p["a"].real})
    with pytest.raises(ValueError, match="its dtype is float32 in place of complex64"):
        tx.update(params, tx.init(params), params)


def test_params_and_gradient_that_do_not_fit(case):
    params = {"a": jnp.ones(2)}
    tx = build(case, quadratic_grad)
    with pytest.raises(ValueError, match=r"the gradient does not have the form of the params"):
        tx.update({"a": jnp.ones(3)}, tx.init(params), params)
    with pytest.raises(ValueError, match=r"nothing at params\['a'\]"):
        tx.update({"b": jnp.ones(2)}, tx.init(params), params)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"a": True, "b": False}),
        lambda tx: optax.partition({"x": tx, "y": optax.sgd(1.0)}, {"a": "x", "b": "y"}),
    ],
)
def test_masked_node_names_the_mask_argument(case, wrap):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = wrap(build(case, quadratic_grad))
    with pytest.raises(ValueError, match=r"at params\['b'\] is a MaskedNode.*mask="):
        tx.update(params, tx.init(params), params)


@flax.struct.dataclass
class DataclassParams:
    w: Any
    skip: Any = None


CONTAINERS = {
    "none leaf": {"a": jnp.ones(2), "b": None},
    "zero size": {"a": jnp.ones(2), "b": jnp.ones((0, 3))},
    "scalar": jnp.asarray(2.0),
    "named tuple": Pair(jnp.ones(2), [jnp.ones(())]),
    "dataclass": DataclassParams(jnp.ones(3)),
    "frozen dict": flax.core.freeze({"a": {"b": jnp.ones(2)}}),
    "nnx state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_keep_their_structure(case, container):
    params = CONTAINERS[container]
    tx = build(case, quadratic_grad)
    updates, _ = jax.jit(tx.update)(quadratic_grad(params), tx.init(params), params)
    chex.assert_trees_all_equal_structs(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    p, u = flat(params).astype(float), flat(updates).astype(float)
    G = case.matrix(p, 2 * p, **case.options)
    np.testing.assert_allclose(u, 2 * (p + dense_perturbation(G, 2 * p, RHO)), rtol=1e-5)


def test_empty_tree(case):
    tx = build(case, quadratic_grad, measure=True)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.count == 1


def test_integer_and_float0_gradients(case):
    params = {"a": jnp.ones(2), "n": {"k": jnp.arange(2)}}
    float0 = {"a": jnp.ones(2), "n": {"k": np.zeros(2, jax.dtypes.float0)}}
    tx = build(case, quadratic_grad)
    with pytest.raises(TypeError, match=r"at params\['n'\]\['k'\] has dtype float0"):
        tx.update(float0, tx.init(params), params)
    with pytest.raises(TypeError, match=r"at params\['n'\]\['k'\] has dtype int32"):
        tx.update(params, tx.init(params), params)


def test_extra_arguments(case):
    """Unknown ones are forwarded; grad_fn gets those that it names, or all by **kwargs."""
    params = {"a": jnp.ones(2)}
    got = {}

    def named(p, batch, *, scale=1.0):
        got["named"] = (batch, scale)
        return quadratic_grad(p)

    def keywords(p, **extra):
        got["keywords"] = extra
        return quadratic_grad(p)

    tx = optax.chain(build(case, named), optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    tx.update(params, tx.init(params), params, batch=7, value=1.0, unknown=None)
    assert got["named"] == (7, 1.0)
    tx.update(params, tx.init(params), params, grad_fn=keywords, batch=7, value=1.0)
    assert got["keywords"] == {"batch": 7, "value": 1.0}
    partial = functools.partial(named, scale=3.0)
    tx.update(params, tx.init(params), params, grad_fn=partial, batch=8, value=1.0)
    assert got["named"] == (8, 3.0)


def test_an_exception_in_grad_fn_leaves_the_state_usable(case):
    class CustomError(Exception):
        pass

    def broken(params):
        raise CustomError("mine")

    params = {"a": jnp.ones(2)}
    tx = build(case, quadratic_grad)
    state = tx.init(params)
    with pytest.raises(CustomError, match=r"^mine$"):
        tx.update(params, state, params, grad_fn=broken)
    _, state = tx.update(params, state, params)
    assert state.count == 1


# --- JAX ---


def test_resume_is_bit_equal_and_donation_is_safe(case):
    tx = optax.chain(
        build(case, network_grad, rho=optax.linear_schedule(0.2, 0.05, 10)), optax.adam(1e-2)
    )
    update = jax.jit(lambda p, s: step(tx, p, s, network_grad, batch=BATCH), donate_argnums=(0, 1))
    params = example_params()
    state = tx.init(params)
    for i in range(10):
        if i == 5:
            saved = jax.tree.map(np.asarray, jax.device_get((params, state)))
        params, state = update(params, state)
    resumed = jax.tree.map(jnp.asarray, saved)
    for _ in range(5):
        resumed = update(*resumed)
    chex.assert_trees_all_equal((params, state), resumed)


def test_orbax_restores_the_state_exactly(case, tmp_path):
    params, state = descend(case, 3, optax.adam(1e-2), measure=True)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", (params, state))
        checkpointer.wait_until_finished()
        fresh = jax.tree.map(jnp.zeros_like, (params, state))
        restored = checkpointer.restore(tmp_path / "state", fresh)
    chex.assert_trees_all_equal(restored, (params, state))
    chex.assert_trees_all_equal_structs(restored, (params, state))


def test_one_compilation_in_a_hundred_steps(case):
    tx = optax.chain(build(case, network_grad, period=3, measure=True), optax.adam(1e-2))
    update = jax.jit(lambda p, s: step(tx, p, s, network_grad, batch=BATCH))
    params = example_params()
    state = tx.init(params)
    for _ in range(100):
        params, state = update(params, state)
    assert update._cache_size() == 1


def test_types_do_not_change_so_scan_accepts_the_state(case):
    tx = optax.chain(build(case, network_grad, measure=True), optax.adam(1e-2))
    params = example_params()
    state = tx.init(params)
    after = jax.eval_shape(lambda p, s: step(tx, p, s, network_grad, batch=BATCH), params, state)
    describe = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))  # noqa: E731
    before = jax.tree.map(describe, jax.eval_shape(lambda x: x, (params, state)))
    assert before == jax.tree.map(describe, after)
    final, _ = jax.lax.scan(
        lambda c, _: (step(tx, *c, network_grad, batch=BATCH), None), (params, state), length=5
    )
    expected, _ = descend(case, 5, optax.adam(1e-2), measure=True)
    chex.assert_trees_all_close(final[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        {"jax_debug_nans": True, "jax_debug_infs": True},
        {"jax_numpy_dtype_promotion": "strict"},
        {"jax_numpy_rank_promotion": "raise"},
        {"jax_check_tracer_leaks": True},
    ],
    ids=lambda flags: "+".join(flags),
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"measure": True, "period": 2}, id="all"),
    ],
)
def test_clean_under_strict_flags(case, flags, options):
    before = {flag: getattr(jax.config, flag) for flag in flags}
    for flag, value in flags.items():
        jax.config.update(flag, value)
    try:
        tx = build(case, quadratic_grad, **options)
        for params in (
            {"a": jnp.array([1.0, -2.0]), "b": jnp.asarray(0.5, jnp.bfloat16)},
            {"a": jnp.zeros(2)},  # a zero gradient
        ):
            state = tx.init(params)
            for update in (tx.update, jax.jit(tx.update)):
                updates, state = update(quadratic_grad(params), state, params)
        chex.assert_tree_all_finite(updates)
    finally:
        for flag, value in before.items():
            jax.config.update(flag, value)


def test_vmap_over_an_ensemble(case):
    tx = optax.chain(build(case, network_grad), optax.sgd(0.1))
    members = [jax.tree.map(lambda p: p * s, example_params()) for s in (0.5, 1.0, 2.0)]  # noqa: B023
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    one = jax.jit(lambda p: step(tx, p, tx.init(p), network_grad, batch=BATCH))
    together, state = jax.jit(jax.vmap(one))(stacked)
    alone = [one(p) for p in members]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close((together, state), expected, rtol=1e-5, atol=1e-6)


def test_under_checkpoint_and_grad(case):
    """Differentiating the loss after a step, with respect to the params before it."""
    tx = optax.chain(build(case, network_grad), optax.sgd(0.1))

    def after(params):
        params, _ = step(tx, params, tx.init(params), network_grad, batch=BATCH)
        return network_loss(params, BATCH)

    plain = jax.jit(jax.grad(after))(example_params())
    rematerialised = jax.jit(jax.grad(jax.checkpoint(after)))(example_params())
    chex.assert_trees_all_close(plain, rematerialised, rtol=1e-5, atol=1e-6)


# --- mask, period, diagnostics ---


@pytest.mark.parametrize(
    "mask",
    [
        {"hidden": {"w": True, "b": False}, "out": True, "temperature": False},
        {"hidden": {"w": np.True_, "b": np.False_}, "out": True, "temperature": False},
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ],
    ids=["tree", "numpy", "callable"],
)
def test_masked_leaves_are_not_perturbed_and_do_not_enter_the_norm(case, mask):
    params = example_params()
    seen = []

    def grad_fn(p, batch):
        seen.append(p)
        return network_grad(p, batch)

    grads = network_grad(params, BATCH)
    tx = build(case, grad_fn, mask=mask, measure=True)
    updates, state = tx.update(grads, tx.init(params), params, batch=BATCH)
    matrices = lambda tree: [tree["hidden"]["w"], tree["out"]]  # noqa: E731
    delta = ms.worst_case_perturbation(
        case.metric(**case.options), matrices(grads), matrices(params), RHO
    )
    np.testing.assert_allclose(
        flat(matrices(seen[0])), flat(matrices(params)) + flat(delta), rtol=1e-6
    )
    chex.assert_trees_all_equal(seen[0]["hidden"]["b"], params["hidden"]["b"])
    chex.assert_trees_all_equal(seen[0]["temperature"], params["temperature"])
    chex.assert_trees_all_equal(updates, network_grad(seen[0], BATCH))
    norm = np.linalg.norm(flat(matrices(grads)))
    assert float(state.diagnostics.grad_norm) == pytest.approx(norm, rel=1e-6)


def test_mask_of_a_whole_subtree(case):
    params = example_params()
    grads = network_grad(params, BATCH)
    prefix = {"hidden": False, "out": True, "temperature": True}
    full = {"hidden": {"w": False, "b": False}, "out": True, "temperature": True}
    results = [
        (tx := build(case, network_grad, mask=mask)).update(
            grads, tx.init(params), params, batch=BATCH
        )
        for mask in (prefix, full)
    ]
    chex.assert_trees_all_equal(*results)


def test_period(case):
    params = {"a": jnp.array([1.0, 2.0])}
    tx = build(case, quadratic_grad, period=3)
    update = jax.jit(tx.update)
    state = tx.init(params)
    perturbed = []
    for i in range(7):
        scale = 1.0 + i
        grads = jax.tree.map(lambda p: scale * 2 * p, params)  # noqa: B023
        updates, state = update(grads, state, params)
        perturbed.append(not np.array_equal(updates["a"], grads["a"]))
        expected_norm = (1 + 3 * (i // 3)) * np.sqrt(20)  # kept from the last perturbation
        assert float(state.diagnostics.grad_norm) == pytest.approx(expected_norm, rel=1e-6)
    assert perturbed == [True, False, False, True, False, False, True]
    assert state.count == 7


def test_period_skips_the_second_gradient(case):
    """The other steps take a branch that does not contain it."""
    calls = []

    def grad_fn(p):
        jax.debug.callback(lambda: calls.append(1))
        return quadratic_grad(p)

    params = {"a": jnp.ones(2)}
    tx = build(case, grad_fn, period=4)
    state = tx.init(params)
    for _ in range(8):
        _, state = jax.jit(tx.update)(params, state, params)
    jax.effects_barrier()
    assert len(calls) == 2


def test_diagnostics(case):
    params = example_params()
    grads = network_grad(params, BATCH)
    tx = build(case, network_grad, measure=True)
    second, state = tx.update(grads, tx.init(params), params, batch=BATCH)
    actual = ms.get_diagnostics((None, {"nested": [state]}))
    p, g, g2 = (flat(x).astype(float) for x in (params, grads, second))
    G = case.matrix(p, g, **case.options)
    delta = dense_perturbation(G, g, RHO)
    expected = ms.MeasuredDiagnostics(
        grad_norm=np.linalg.norm(g),
        dual_norm=np.sqrt(g @ np.linalg.solve(G, g)),
        perturbation_norm=np.linalg.norm(delta),
        effective_radius=np.linalg.norm(delta) / np.linalg.norm(g),
        predicted_sharpness=g @ delta,
        cosine=g @ g2 / np.linalg.norm(g) / np.linalg.norm(g2),
        curvature=delta @ (g2 - g) / (delta @ delta),
        realised_norm=np.linalg.norm(delta),
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-4)
    plain = build(case, network_grad)
    _, state = plain.update(grads, plain.init(params), params, batch=BATCH)
    assert isinstance(state.diagnostics, ms.Diagnostics)
    chex.assert_trees_all_close(tuple(state.diagnostics), tuple(actual)[:5], rtol=1e-6)


def test_get_diagnostics_needs_one_state():
    with pytest.raises(ValueError, match="found 0"):
        ms.get_diagnostics(optax.adam(1e-3).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="found 2"):
        ms.get_diagnostics(optax.chain(ms.sam(), ms.sam()).init(jnp.ones(2)))


def test_state_holds_no_copy_of_the_params(case):
    params = {"w": jnp.ones((1000, 100))}
    state = build(case, measure=True).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 9
    mapped = optax.tree_map_params(build(case), lambda x: x + 1, build(case).init(params))
    chex.assert_trees_all_equal(mapped, build(case).init(params))  # nothing is params-like


def test_every_error_text_quotes_no_internals():
    """Messages are about the user's arguments: no private names of this package in them."""
    params = {"a": jnp.ones(2)}
    tx = ms.monge_sam()
    with pytest.raises(ValueError, match=r"monge_sam\(jax.grad\(loss_fn\)\)") as error:
        tx.update(params, tx.init(params), params)
    assert not re.search(r"\b_[a-z]+", str(error.value))
