"""Trajectories, the paper's banana, optax.contrib.sam, and life inside and outside Optax chains."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    CASES,
    EACH_CASE,
    banana,
    banana_gradient,
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    network_grad,
)

import monge_sam_jax as ms

BATCH = example_batch()


@pytest.fixture(params=EACH_CASE)
def case(request):
    return CASES[request.param]


def run(tx, params, steps, grad_fn, **extra):
    @jax.jit
    def update(params, state):
        updates, state = tx.update(grad_fn(params, **extra), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = update(params, state)
    return params, state


# --- against plain NumPy loops ---


def numpy_banana_loop(case, t, rho, learning_rate, momentum, steps):
    velocity = np.zeros(2)
    for _ in range(steps):
        g = banana_gradient(t)
        delta = dense_perturbation(case.matrix(t, g, **case.options), g, rho)
        velocity = momentum * velocity + banana_gradient(t + delta)
        t = t - learning_rate * velocity
    return t


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_trajectory_is_that_of_a_numpy_loop(x64, case, momentum):
    start = np.array([-1.5, 0.5])
    tx = optax.chain(
        case.builder(jax.grad(banana), rho=0.3, **case.options),
        optax.sgd(0.01, momentum=momentum),
    )
    end, _ = run(tx, jnp.asarray(start), 60, jax.grad(banana))
    expected = numpy_banana_loop(case, start, 0.3, 0.01, momentum, 60)
    np.testing.assert_allclose(end, expected, rtol=1e-10)


def test_where_the_banana_leads():
    """Figure 1: rho = 1, learning rate 0.01, 200 steps from (-3/2, 1/2)."""
    start = jnp.array([-1.5, 0.5])
    ends = {}
    for name, link in {
        "monge": ms.monge_sam(jax.grad(banana), rho=1.0),
        "sam": ms.sam(jax.grad(banana), rho=1.0),
        "descent": optax.identity(),
    }.items():
        tx = optax.chain(link, optax.sgd(0.01))
        ends[name], _ = run(tx, start, 200, jax.grad(banana))
    np.testing.assert_allclose(ends["monge"], [-0.945, -0.941], atol=2e-3)
    np.testing.assert_allclose(ends["sam"], [0, 0], atol=0.05)
    np.testing.assert_allclose(ends["descent"], [-1.546, -0.647], atol=2e-3)


@pytest.mark.parametrize("tail", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-2)])
def test_sam_is_opaque_optax_contrib_sam(tail):
    """Where the gradient's norm is in float32's middle range, so that theirs is accurate."""
    theirs = optax.contrib.sam(
        tail,
        optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        sync_period=2,
        opaque_mode=True,
    )

    @jax.jit
    def update(params, state):
        grads = network_grad(params, BATCH)
        updates, state = theirs.update(
            grads, state, params, grad_fn=lambda p, _: network_grad(p, BATCH)
        )
        return optax.apply_updates(params, updates), state

    params = example_params()
    state = theirs.init(params)
    for _ in range(20):
        params, state = update(params, state)
    ours, _ = run(
        optax.chain(ms.sam(network_grad, rho=0.1), tail),
        example_params(),
        20,
        network_grad,
        batch=BATCH,
    )
    chex.assert_trees_all_close(ours, params, rtol=1e-4, atol=1e-5)


# --- inside chains, before other transformations ---


def by_hand(case, tail, steps, rho=lambda i: 0.1, grads_at=None):
    """A loop that perturbs first and hands the second gradient to `tail`."""
    params = example_params()
    state = tail.init(params)
    metric = case.metric(**case.options)
    for i in range(steps):
        grad_fn = lambda p: network_grad(p, BATCH if grads_at is None else grads_at(i))  # noqa: E731, B023
        delta = ms.worst_case_perturbation(metric, grad_fn(params), params, rho(i))
        second = grad_fn(jax.tree.map(jnp.add, params, delta))
        updates, state = tail.update(second, state, params)
        params = optax.apply_updates(params, updates)
    return params


LABELS = {"hidden": "a", "out": "b", "temperature": "b"}
TAILS = {
    "nested chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "weight decay": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "masked": lambda: optax.chain(
        optax.masked(optax.scale(0.5), {"hidden": True, "out": False, "temperature": False}),
        optax.sgd(0.1),
    ),
    "partition": lambda: optax.partition({"a": optax.sgd(0.1), "b": optax.adam(1e-2)}, LABELS),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "schedule_free": lambda: optax.contrib.schedule_free_sgd(0.1),
    "muon": lambda: optax.contrib.muon(1e-2),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
}


@pytest.mark.parametrize(
    "name", ["monge_sam", pytest.param("adaptive_sam", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tail", TAILS)
def test_before_other_transformations(name, tail):
    case, tail = CASES[name], TAILS[tail]()
    tx = optax.chain(case.builder(network_grad, rho=0.1, **case.options), tail)
    actual, _ = run(tx, example_params(), 6, network_grad, batch=BATCH)
    chex.assert_trees_all_close(actual, by_hand(case, tail, 6), rtol=1e-4, atol=1e-5)


WRAPPERS = {
    "chain in chain": lambda tx: optax.chain(optax.chain(tx)),
    "named_chain": lambda tx: optax.named_chain(("sharp", tx)),
    "with_extra_args_support": optax.with_extra_args_support,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_chains(case, wrapper):
    sharp = WRAPPERS[wrapper](case.builder(network_grad, rho=0.1, **case.options))
    tx = optax.chain(sharp, optax.adam(1e-2))
    actual, state = run(tx, example_params(), 6, network_grad, batch=BATCH)
    expected = by_hand(case, optax.adam(1e-2), 6)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert ms.get_diagnostics(state).grad_norm > 0


def test_reduce_on_plateau_gets_its_value(case):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=0, accumulation_size=1)
    tx = optax.chain(case.builder(network_grad, rho=0.1, **case.options), optax.sgd(0.1), plateau)
    _, state = run(tx, example_params(), 4, network_grad_with_value, batch=BATCH, value=1.0)
    assert float(state[2].scale) < 1


def network_grad_with_value(params, batch, value):
    del value
    return network_grad(params, batch)


def test_conditionally_transform(case):
    sharp = case.builder(network_grad, rho=0.1, **case.options)
    early = optax.conditionally_transform(sharp, lambda step: step < 3)
    tx = optax.chain(early, optax.sgd(0.1))
    actual, _ = run(tx, example_params(), 6, network_grad, batch=BATCH)
    expected = by_hand(case, optax.sgd(0.1), 6, rho=lambda i: 0.1 if i < 3 else 0.0)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_rho_schedule(case):
    schedule = optax.linear_schedule(0.3, 0.05, 5)
    tx = optax.chain(case.builder(network_grad, rho=schedule, **case.options), optax.sgd(0.1))
    actual, _ = run(tx, example_params(), 6, network_grad, batch=BATCH)
    expected = by_hand(case, optax.sgd(0.1), 6, rho=lambda i: float(schedule(i)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_inject_hyperparams(case):
    """rho, and the metric's numbers, become part of the state; changing them changes the step."""
    options = {"rho": 0.1, **case.options}
    tx = optax.chain(
        optax.inject_hyperparams(case.builder, static_args=("grad_fn", "period"))(
            network_grad, **options
        ),
        optax.sgd(0.1),
    )
    actual, state = run(tx, example_params(), 6, network_grad, batch=BATCH)
    expected = by_hand(case, optax.sgd(0.1), 6)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(options) <= set(state[0].hyperparams)
    grads = network_grad(actual, BATCH)
    before = ms.get_diagnostics(tx.update(grads, state, actual, batch=BATCH)[1])
    for name in options:
        changed = state[0]._replace(hyperparams={**state[0].hyperparams, name: jnp.array(0.7)})
        _, after = tx.update(grads, (changed, *state[1:]), actual, batch=BATCH)
        assert ms.get_diagnostics(after).perturbation_norm != before.perturbation_norm


def test_inject_hyperparams_without_static_arguments(case):
    """With grad_fn given to update; the period is then a traced number, and still right."""
    tx = optax.chain(
        optax.inject_hyperparams(case.builder)(rho=0.1, **case.options), optax.sgd(0.1)
    )

    @jax.jit
    def update(params, state):
        grad_fn = lambda p: network_grad(p, BATCH)  # noqa: E731
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = example_params()
    state = tx.init(params)
    for _ in range(6):
        params, state = update(params, state)
    expected = by_hand(case, optax.sgd(0.1), 6)
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)


def test_inject_hyperparams_with_a_schedule_of_rho():
    schedule = optax.linear_schedule(0.3, 0.05, 5)
    tx = optax.chain(
        optax.inject_hyperparams(ms.monge_sam, static_args=("grad_fn", "period"))(
            network_grad, rho=schedule
        ),
        optax.sgd(0.1),
    )
    actual, _ = run(tx, example_params(), 6, network_grad, batch=BATCH)
    expected = by_hand(CASES["monge_sam"], optax.sgd(0.1), 6, rho=lambda i: float(schedule(i)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_multisteps_after_the_transformation_is_m_sharpness(case):
    """Each micro-batch perturbs for itself; the second gradients are averaged."""
    batches = [example_batch(4, seed) for seed in range(4)]
    tail = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    tx = optax.chain(case.builder(network_grad, rho=0.1, **case.options), tail)
    params = example_params()
    state = tx.init(params)
    current = params
    for batch in batches:
        updates, state = tx.update(network_grad(current, batch), state, current, batch=batch)
        current = optax.apply_updates(current, updates)
    metric = case.metric(**case.options)
    seconds = []
    for batch in batches:
        delta = ms.worst_case_perturbation(metric, network_grad(params, batch), params, 0.1)
        seconds.append(network_grad(jax.tree.map(jnp.add, params, delta), batch))
    expected = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 4, params, *seconds)
    chex.assert_trees_all_close(current, expected, rtol=1e-5, atol=1e-6)


def test_why_the_readme_warns_of_some_wrappers():
    """What goes wrong around the transformation, so that the warnings stay true."""
    params = {"w": jnp.array([1.0, 2.0])}
    grad_fn = lambda p, b: {"w": 2 * (p["w"] - b)}  # noqa: E731
    broken = optax.chain(ms.sam(lambda p: {"w": p["w"] / 0 * 0}), optax.sgd(0.1))
    around = optax.apply_if_finite(broken, 3)
    updates, _ = around.update(params, around.init(params), params)
    assert not np.any(np.isfinite(updates["w"]))  # the guard saw the first gradient alone

    sharp = optax.chain(ms.sam(grad_fn), optax.sgd(0.1))
    pair = optax.LookaheadParams.init_synced(params)
    around = optax.lookahead(sharp, 2, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'b'"):
        around.update(params, around.init(pair), pair, b=jnp.zeros(2))


def test_weight_decay_after_the_perturbation_sees_the_params(case):
    """`optax.chain` hands every link the unperturbed params."""
    decay = optax.add_decayed_weights(0.5)
    zero_grad = lambda p: jax.tree.map(jnp.zeros_like, p)  # noqa: E731
    tx = optax.chain(case.builder(zero_grad, rho=0.1, **case.options), decay)
    params = example_params()
    updates, _ = tx.update(network_grad(params, BATCH), tx.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: 0.5 * p, params))


# --- signatures ---


@pytest.mark.parametrize("builder", [ms.sam, ms.monge_sam, ms.adaptive_sam, ms.fisher_sam])
def test_builders_spell_out_their_options(builder):
    options = {"mask", "axis_name", "sync_perturbation", "period", "measure", "widen_params"}
    parameters = inspect.signature(builder).parameters
    assert options <= set(parameters)
    general = inspect.signature(ms.sharpness_aware).parameters
    assert all(parameters[name] == general[name] for name in options)
    with pytest.raises(TypeError, match="radius"):
        builder(radius=0.1)


def test_a_grad_fn_given_to_update_overrides_the_builders():
    params = jnp.array([3.0, 4.0])
    tx = ms.sam(lambda p: p, rho=0.5)
    updates, _ = tx.update(params, tx.init(params), params, grad_fn=lambda p: 10 * p)
    np.testing.assert_allclose(updates, [33.0, 44.0], rtol=1e-6)


def test_scale_of_the_loss():
    """SAM does not see it; M-SAM does, in the way that alpha says: alpha * loss is what counts."""
    params = example_params()
    g = network_grad(params, BATCH)
    perturb = lambda metric, s: flat(  # noqa: E731
        ms.worst_case_perturbation(metric, jax.tree.map(lambda x: s * x, g), params, 0.1)
    )
    sam, monge, lower = ms.euclidean(), ms.monge(), ms.monge(alpha=1 / 512)
    np.testing.assert_allclose(perturb(sam, 512.0), perturb(sam, 1.0), rtol=1e-6)
    np.testing.assert_allclose(perturb(lower, 512.0), perturb(monge, 1.0), rtol=1e-6)
    shrunk = np.linalg.norm(perturb(monge, 512.0)) / np.linalg.norm(perturb(monge, 1.0))
    n = np.linalg.norm(flat(g).astype(float))
    assert shrunk == pytest.approx(np.sqrt((1 + n**2) / (1 + (512 * n) ** 2)), rel=1e-5)
