"""Errors that advise: each test meets the error, does what it says, and compares the result."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import euclidean_matrix, flat

import monge_sam_jax as ms

PARAMS = {"w": jnp.array([1.0, 2.0]), "v": jnp.array([1.0, 3.0])}
B = jnp.array([0.5, -1.0])
RHO = 0.1


def loss(params, b):
    return jnp.sum((params["w"] - b) ** 2 * jnp.array([1.0, 4.0])) + jnp.sum(params["v"] ** 4)


grad = jax.grad(loss)
FIRST = grad(PARAMS, B)


def expected(scale=1.0):
    """SAM's gradient of scale * loss, by hand in float64."""
    w, v, b = (np.asarray(x, float) for x in (PARAMS["w"], PARAMS["v"], B))
    g = np.concatenate([scale * 2 * (w - b) * [1, 4], scale * 4 * v**3])
    moved = np.concatenate([w, v]) + RHO * g / np.sqrt(g @ euclidean_matrix(g, g) @ g)
    return {
        "w": scale * 2 * (moved[:2] - b) * [1, 4],
        "v": scale * 4 * moved[2:] ** 3,
    }


def update(tx, first=FIRST, **extra):
    return tx.update(first, tx.init(PARAMS), PARAMS, **extra)[0]


def assert_right(updates, scale=1.0):
    for name, value in expected(scale).items():
        np.testing.assert_allclose(updates[name], value, rtol=1e-5)


DOUBLE = jax.tree.map(lambda g: 2 * g, FIRST)


# --- arguments of the gradient function ---


@pytest.mark.parametrize("name", ["state", "updates", "grad_fn"])
def test_a_loss_with_an_argument_that_update_has_itself(name):
    """`state` of a model, say: no extra argument of update can be called so."""
    scope = {"grad": grad}
    exec(f"def fn(p, b, {name}): return scaled(grad(p, b), {name})", scope)
    scope["scaled"] = lambda g, s: jax.tree.map(lambda x: s * x, g)
    grad_fn = scope["fn"]
    tx = ms.sam(grad_fn, rho=RHO)
    with pytest.raises(ValueError, match=f"update has an argument {name} of its own.*fill it in"):
        update(tx, DOUBLE, b=B)
    filled_in = lambda params: grad_fn(params, B, 2.0)  # noqa: E731
    assert_right(update(tx, DOUBLE, grad_fn=filled_in), scale=2.0)
    renamed = lambda p, b, other: grad_fn(p, b, other)  # noqa: E731
    assert_right(update(ms.sam(renamed, rho=RHO), DOUBLE, b=B, other=2.0), scale=2.0)


def test_params_that_are_not_the_first_argument():
    other_order = lambda b, params: loss(params, b)  # noqa: E731
    tx = ms.sam(jax.grad(other_order, argnums=1), rho=RHO)
    with pytest.raises(ValueError, match=r"first argument has to be the params, whatever argnums"):
        tx.update(FIRST, tx.init(PARAMS), params=PARAMS, b=B)
    first = jax.grad(lambda params, b: other_order(b, params))
    assert_right(update(ms.sam(first, rho=RHO), b=B))


def test_positional_only_arguments():
    tx = ms.sam(lambda p, b, /: grad(p, b), rho=RHO)
    with pytest.raises(ValueError, match=r"needs b.*by position only: fill them in"):
        update(tx, b=B)
    assert_right(update(tx, grad_fn=lambda params: grad(params, B)))


def test_a_missing_argument():
    tx = ms.sam(grad, rho=RHO)
    with pytest.raises(ValueError, match=r"needs b.*tx.update\(grads, state, params, b=...\)"):
        update(tx)
    assert_right(update(tx, b=B))
    assert_right(update(tx, grad_fn=lambda params: grad(params, B)))


def test_a_gradient_function_of_optax_contrib_sam():
    """It is called with the params and the number of the step there."""
    grad_fn = lambda params, i: grad(params, B)  # noqa: E731
    tx = ms.sam(rho=RHO)
    with pytest.raises(ValueError, match=r"needs i.*lambda params: grad_fn\(params, 0\)"):
        update(tx, grad_fn=grad_fn)
    assert_right(update(tx, grad_fn=lambda params: grad_fn(params, 0)))


def test_an_optional_argument_that_is_misspelt():
    """Its default would be used in silence, and the second pass be another loss."""

    def grad_fn(params, b, weights=1.0):
        return jax.tree.map(lambda g: weights * g, grad(params, b))

    tx = ms.sam(grad_fn, rho=RHO)
    with pytest.raises(ValueError, match=r"got weigths.*not its weights.*misspelt"):
        update(tx, DOUBLE, b=B, weigths=2.0)
    assert_right(update(tx, DOUBLE, b=B, weights=2.0), scale=2.0)
    assert_right(update(tx, DOUBLE, b=B, weights=2.0, weigths=None), scale=2.0)  # both: no mistake
    for others in ({"value": 1.0}, {"grad": FIRST, "value_fn": loss}, {"epoch": 3}):
        assert_right(update(tx, b=B, **others))  # for the other links


def test_optional_arguments_named_like_those_of_optax():
    """`values` is close to `value`, which Optax's own transformations take."""
    tx = ms.sam(lambda params, b, values=None: grad(params, b), rho=RHO)
    assert_right(update(tx, b=B, value=1.0))


# --- masks, groups, wrappers ---

MASK = {"w": True, "v": False}


def two_balls(radii):
    """Gradient at a perturbation of w and v, each in a ball of its own."""
    moved = {
        k: p + radii.get(k, 0.0) * FIRST[k] / np.linalg.norm(FIRST[k]) for k, p in PARAMS.items()
    }
    return grad(moved, B)


LINKS = {
    "side by side": lambda a, b: optax.chain(a, b, optax.scale(0.5)),
    "clipped between": lambda a, b: optax.chain(a, optax.clip(1e3), b, optax.scale(0.5)),
    "nested": lambda a, b: optax.chain(optax.chain(optax.identity(), a), b, optax.scale(0.5)),
}


@pytest.mark.parametrize("link", LINKS)
def test_two_links(link):
    """The second would throw away the first one's gradient: w would never be perturbed."""
    other = {"w": False, "v": True}
    tx = LINKS[link](ms.sam(grad, rho=0.5, mask=MASK), ms.sam(grad, rho=0.05, mask=other))
    for function in (update, jax.jit(update, static_argnums=0)):
        with pytest.raises(ValueError, match=r"more than one.*metric=grouped\(.*mask="):
            function(tx, b=B)
    metric = ms.grouped({"a": ms.euclidean(), "b": ms.scaled(ms.euclidean(), 0.1)}, PARAMS_LABELS)
    tx = optax.chain(ms.sharpness_aware(grad, metric=metric, rho=0.5), optax.scale(0.5))
    right = jax.tree.map(lambda g: 0.5 * g, two_balls({"w": 0.5, "v": 0.05}))
    chex.assert_trees_all_close(update(tx, b=B), right, rtol=1e-5)


PARAMS_LABELS = {"w": "a", "v": "b"}


def test_one_transformation_for_each_part():
    """Which `optax.partition` hands masked params."""
    each = {"a": ms.sam(grad, rho=0.5), "b": ms.sam(grad, rho=0.05)}
    with pytest.raises(ValueError, match=r"more than one.*metric=grouped\("):
        update(optax.partition(each, PARAMS_LABELS), b=B)
    each["b"] = optax.scale(1.0)
    with pytest.raises(ValueError, match=r"MaskedNode.*mask=.*grouped\(.*not by a second"):
        update(optax.partition(each, PARAMS_LABELS), b=B)
    metric = ms.grouped({"a": ms.euclidean(), "b": ms.scaled(ms.euclidean(), 0.1)}, PARAMS_LABELS)
    tx = ms.sharpness_aware(grad, metric=metric, rho=0.5)
    chex.assert_trees_all_close(update(tx, b=B), two_balls({"w": 0.5, "v": 0.05}), rtol=1e-5)
    tx = ms.sam(grad, rho=0.5, mask=MASK)
    chex.assert_trees_all_close(update(tx, b=B), two_balls({"w": 0.5}), rtol=1e-5)


def test_a_mask_of_path_and_leaf():
    def choose(path, leaf):
        return path[-1].key == "w"

    for build in (
        lambda mask: ms.sam(grad, rho=0.5, mask=mask),
        lambda mask: ms.one_pass_sam(optax.sgd(0.1), mask=mask),
    ):
        with pytest.raises(TypeError, match="map_with_path"):
            build(choose).init(PARAMS)
    mask = lambda params: jax.tree.map_with_path(choose, params)  # noqa: E731
    tx = ms.sam(grad, rho=0.5, mask=mask)
    chex.assert_trees_all_close(update(tx, b=B), two_balls({"w": 0.5}), rtol=1e-5)


@pytest.mark.parametrize("mask", [False, np.False_, 1, jnp.array(True)])
def test_a_mask_that_chooses_nothing(mask):
    """As where a function was taken for a schedule, and called with the count."""
    with pytest.raises(ValueError, match=r"leaves nothing to perturb.*static_args"):
        ms.sam(grad, mask=mask)


def test_micro_batches_accumulated_around_it():
    """The first gradient would be the mean of all, the second that of the last one alone."""
    batches = [B, 3 * B]
    around = optax.MultiSteps(optax.chain(ms.sam(grad, rho=RHO), optax.sgd(0.1)), 2)
    state = around.init(PARAMS)
    with pytest.raises(ValueError, match=r"MultiSteps is around.*first, optax.chain.*accumulated"):
        around.update(FIRST, state, PARAMS, b=B)

    rest = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    tx = optax.chain(ms.sam(grad, rho=RHO), rest)
    state = tx.init(PARAMS)
    seconds = []
    for b in batches:
        g = grad(PARAMS, b)
        updates, state = tx.update(g, state, PARAMS, b=b)
        delta = ms.worst_case_perturbation(ms.euclidean(), g, PARAMS, RHO)
        seconds.append(grad(jax.tree.map(jnp.add, PARAMS, delta), b))
    right = jax.tree.map(lambda *g: -0.1 * sum(g) / 2, *seconds)
    chex.assert_trees_all_close(updates, right, rtol=1e-5)

    fn = ms.sharpness_aware_value_and_grad(
        lambda p, bs: jnp.mean(jax.vmap(loss, (None, 0))(p, bs)),
        metric=ms.euclidean(),
        rho=RHO,
        value_and_grad=ms.accumulated(2),
    )
    _, actual = fn(PARAMS, jnp.stack(batches))
    mean = lambda p: jax.tree.map(lambda *g: sum(g) / 2, *(grad(p, b) for b in batches))  # noqa: E731
    delta = ms.worst_case_perturbation(ms.euclidean(), mean(PARAMS), PARAMS, RHO)
    right = mean(jax.tree.map(jnp.add, PARAMS, delta))
    chex.assert_trees_all_close(actual, right, rtol=1e-5)


def test_one_micro_batch_around_it_is_right():
    around = optax.MultiSteps(optax.chain(ms.sam(grad, rho=RHO), optax.scale(1.0)), 1)
    assert_right(around.update(FIRST, around.init(PARAMS), PARAMS, b=B)[0])


def test_flattened_around_it():
    with pytest.raises(ValueError, match=r"optax.flatten is around.*put the transformation first"):
        update(optax.flatten(ms.sam(grad, rho=RHO)), b=B)
    assert_right(update(optax.chain(ms.sam(grad, rho=RHO), optax.flatten(optax.scale(1.0))), b=B))


def test_complex_params_split_around_it():
    params = {"z": jnp.array([1.0 + 2.0j])}
    grad_fn = lambda p: {"z": 2 * p["z"]}  # noqa: E731
    g = grad_fn(params)
    split = optax.contrib.split_real_and_imaginary
    around = split(ms.sam(grad_fn, rho=RHO))
    with pytest.raises(ValueError, match=r"split_real_and_imaginary is.*transformation first"):
        around.update(g, around.init(params), params)
    tx = optax.chain(ms.sam(grad_fn, rho=RHO), split(optax.scale(1.0)))
    updates, _ = tx.update(g, tx.init(params), params)
    z = np.asarray(params["z"])
    np.testing.assert_allclose(updates["z"], 2 * z * (1 + RHO / np.abs(z)), rtol=1e-6)


# --- what is differentiated ---


def test_an_unfiltered_equinox_model():
    model = eqx.nn.MLP(2, 1, width_size=4, depth=1, key=jax.random.key(0))
    model_loss = lambda model: jnp.mean(jax.vmap(model)(jnp.eye(2)) ** 2)  # noqa: E731
    tx = ms.sam(eqx.filter_grad(model_loss), rho=RHO)
    with pytest.raises(TypeError, match=r"activation is a .* and no array.*eqx.partition"):
        tx.update(eqx.filter_grad(model_loss)(model), tx.init(model), model)
    with pytest.raises(TypeError, match=r"activation is a .* and no array"):
        ms.one_pass_sam(optax.sgd(0.1)).init(model)

    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    grad_fn = jax.grad(lambda arrays: model_loss(eqx.combine(arrays, static)))
    first = grad_fn(arrays)
    tx = ms.sam(grad_fn, rho=RHO)
    updates, _ = tx.update(first, tx.init(arrays), arrays)
    n = np.linalg.norm(flat(first))
    moved = jax.tree.map(lambda p, g: p + RHO * g / n, arrays, first)
    chex.assert_trees_all_close(updates, grad_fn(moved), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_integer_leaves(direction):
    tx = ms.one_pass_sam(optax.sgd(0.1, momentum=0.9), direction=direction)
    params = {"net": {"w": jnp.ones(2), "step": jnp.arange(2)}}
    with pytest.raises(TypeError, match=r"params\['net'\]\['step'\] has dtype int32.*float leaves"):
        tx.init(params)
    floats = {"net": {"w": jnp.ones(2)}}
    updates, _ = tx.update(floats, tx.init(floats), floats)
    assert np.all(np.isfinite(flat(updates)))


# --- functions among the options, where Optax takes functions for schedules ---


def test_inject_hyperparams_needs_no_static_args():
    mask = lambda params: {"w": True, "v": False}  # noqa: E731
    tx = optax.inject_hyperparams(ms.sam)(grad, rho=0.5, mask=mask)
    state = tx.init(PARAMS)
    updates, state = tx.update(FIRST, state, PARAMS, b=B)
    chex.assert_trees_all_close(updates, two_balls({"w": 0.5}), rtol=1e-5)
    assert set(state.hyperparams) == {"rho", "period"}
    state.hyperparams["rho"] = jnp.asarray(0.05)
    updates, _ = tx.update(FIRST, state, PARAMS, b=B)
    chex.assert_trees_all_close(updates, two_balls({"w": 0.05}), rtol=1e-5)

    tx = optax.inject_hyperparams(ms.one_pass_sam)(optax.sgd(0.1), rho=0.5, mask=mask)
    updates, _ = tx.update(FIRST, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["v"], -0.1 * FIRST["v"], rtol=1e-6)


def test_a_function_that_was_taken_for_a_schedule():
    """In a builder of one's own, whose arguments Optax cannot tell apart."""

    def build(grad_fn, rho):
        return ms.sam(grad_fn, rho=rho)

    grad_fn = lambda params: 2 * params  # noqa: E731  of the count, a number
    with pytest.raises(TypeError, match=r"static_args=\(\"grad_fn\", \"mask\"\)"):
        optax.inject_hyperparams(build)(grad_fn, rho=RHO).init(jnp.ones(2))
    tx = optax.inject_hyperparams(build, static_args=("grad_fn", "mask")[:1])(grad_fn, rho=RHO)
    p = jnp.array([3.0, 4.0])
    updates, _ = tx.update(2 * p, tx.init(p), p)
    np.testing.assert_allclose(updates, 2 * (p + RHO * p / 5), rtol=1e-6)


# --- states ---


def descend(tx, params, state, steps=2):
    for _ in range(steps):
        updates, state = tx.update(grad(params, B), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OTHERS = {
    "direction": {"direction": "momentum"},
    "mask": {"mask": MASK},
    "metric": {"direction": "momentum", "metric": ms.adaptive()},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_one_pass_state_of_other_options(other):
    """Theta goes on from where it was, with the momentum that it had."""
    base = optax.sgd(0.01, momentum=0.9)
    old = ms.one_pass_sam(base, rho=RHO, **OTHERS[other])
    new = ms.one_pass_sam(base, rho=RHO, direction="momentum" if other == "metric" else "gradient")
    y, old_state = descend(old, PARAMS, old.init(PARAMS))
    with pytest.raises(
        ValueError, match=r"another mask, direction, ascent or kind.*_replace\(base_state"
    ):
        new.update(grad(y, B), old_state, y)

    theta = ms.unperturbed_params(old_state, y)
    state = new.init(theta)._replace(base_state=old_state.base_state)
    y, state = descend(new, theta, state, steps=1)
    right, _ = base.update(grad(theta, B), old_state.base_state, theta)
    right = optax.apply_updates(theta, right)
    chex.assert_trees_all_close(ms.unperturbed_params(state, y), right, rtol=1e-6)


@pytest.mark.parametrize(
    "tx", [ms.sam(grad, rho=RHO), ms.one_pass_sam(optax.adam(0.1))], ids=["two", "one"]
)
def test_the_state_of_another_optimizer(tx):
    wrong = optax.adam(0.1).init(PARAMS)
    with pytest.raises(TypeError, match=r"a tuple of ScaleByAdamState, .*tx.init\(params\)"):
        tx.update(FIRST, wrong, PARAMS, b=B)
    with pytest.raises(TypeError, match=r"was given a dict in place of its state"):
        tx.update(FIRST, {"count": 0}, PARAMS, b=B)
    tx.update(FIRST, tx.init(PARAMS), PARAMS, b=B)


@pytest.mark.parametrize(
    "chain",
    [
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.named_chain(("sharp", tx), ("scale", optax.scale(0.5))),
        lambda tx: optax.chain(optax.chain(optax.clip(1e3), tx), optax.scale(0.5)),
    ],
    ids=["chain", "named", "nested"],
)
def test_what_comes_after_a_one_pass_link(chain):
    sgd = optax.sgd(0.1)
    tx = chain(ms.one_pass_sam(sgd, rho=RHO))
    for function in (update, jax.jit(update, static_argnums=0)):
        with pytest.raises(ValueError, match=r"comes after one_pass_sam.*put it inside"):
            function(tx)
    inside = ms.one_pass_sam(optax.chain(sgd, optax.scale(0.5)), rho=RHO)
    y, state = descend(inside, PARAMS, inside.init(PARAMS), steps=1)
    right = jax.tree.map(lambda p, g: p - 0.05 * g, PARAMS, FIRST)
    chex.assert_trees_all_close(ms.unperturbed_params(state, y), right, rtol=1e-6)


def test_one_pass_around_a_perturbing_chain():
    with pytest.raises(ValueError, match=r"sharpness-aware itself.*what comes after it"):
        ms.one_pass_sam(optax.chain(ms.sam(grad), optax.sgd(0.1))).init(PARAMS)
    ms.one_pass_sam(optax.chain(optax.sgd(0.1))).init(PARAMS)
    both = optax.chain(ms.sam(grad), ms.one_pass_sam(optax.sgd(0.1)))
    with pytest.raises(ValueError, match="more than one"):
        update(both, b=B)


def test_separate_optimizers_on_the_same_params_are_no_second_link():
    """Side by side in one function, and one inside the loss of another."""
    tx = optax.chain(ms.sam(grad, rho=RHO), optax.scale(1.0))
    states = {"one": tx.init(PARAMS), "other": tx.init(PARAMS)}
    results = [tx.update(FIRST, states[name], PARAMS, b=B)[0] for name in states]
    for updates in results:
        assert_right(updates)

    def after_a_step(params):
        updates, _ = tx.update(grad(params, B), tx.init(params), params, b=B)
        return loss(optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates)), B)

    outer_grad = jax.grad(after_a_step)
    outer = optax.chain(ms.sam(outer_grad, rho=RHO), optax.scale(1.0))
    first = outer_grad(PARAMS)
    updates, _ = outer.update(first, outer.init(PARAMS), PARAMS)
    delta = ms.worst_case_perturbation(ms.euclidean(), first, PARAMS, RHO)
    right = outer_grad(jax.tree.map(jnp.add, PARAMS, delta))
    chex.assert_trees_all_close(updates, right, rtol=1e-5)


# --- line searches ---


def test_a_line_search_after_it():
    """It refuses arguments of update that no function of it names, such as grad_fn."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10, decrease_factor=0.5)
    value_fn = functools.partial(loss, b=B)
    tx = optax.chain(ms.sam(rho=RHO), optax.sgd(1.0), search)
    state = tx.init(PARAMS)
    given = {"value": loss(PARAMS, B), "grad": FIRST}
    grad_fn = lambda params: grad(params, B)  # noqa: E731
    if tuple(map(int, optax.__version__.split(".")[:3])) > (0, 2, 5):  # that let them pass
        with pytest.raises(TypeError, match="grad_fn"):
            tx.update(FIRST, state, PARAMS, grad_fn=grad_fn, value_fn=value_fn, **given)

    accepting = lambda params, grad_fn=None: loss(params, B)  # noqa: E731  named, and not used
    actual, _ = tx.update(FIRST, state, PARAMS, grad_fn=grad_fn, value_fn=accepting, **given)
    tx = optax.chain(ms.sam(grad_fn, rho=RHO), optax.sgd(1.0), search)
    other, _ = tx.update(FIRST, state, PARAMS, value_fn=value_fn, **given)
    chex.assert_trees_all_equal(actual, other)

    plain = optax.chain(optax.sgd(1.0), search)  # by hand: the same search along SAM's gradient
    robust = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), expected())
    right, _ = plain.update(robust, plain.init(PARAMS), PARAMS, value_fn=value_fn, **given)
    chex.assert_trees_all_close(actual, right, rtol=1e-4)
    assert loss(optax.apply_updates(PARAMS, actual), B) < loss(PARAMS, B)
