"""The Flax Linen state and training step against loops written by hand."""

import functools
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax import jit
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from reference import example_batch, example_params, network_grad, network_loss
from trajectories import cpu_devices

import monge_sam_jax as ms
from monge_sam_jax.linen import SharpnessAwareTrainState, make_train_step

RHO, LEARNING_RATE, MOMENTUM, STEPS = 0.3, 0.1, 0.9, 20
KEY = jax.random.PRNGKey(7)


class PlainState(TrainState):
    """What a user of Flax writes."""

    batch_stats: Any = None
    dropout_key: Any = None


class Network(nn.Module):
    axis_name: str | None = None
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(3)(x)


def model_loss(model, variables, batch, rngs):
    logits, updated = model.apply(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    correct = jnp.mean(jnp.argmax(logits, axis=-1) == batch["y"])
    return jnp.mean(losses), (updated, {"accuracy": correct})


MODEL = Network()
loss_fn = functools.partial(model_loss, MODEL)


def make_batches(steps=STEPS, n=16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(steps, n, 5)), jnp.float32)
    return {"x": x, "y": jnp.asarray(rng.integers(3, size=(steps, n)))}


BATCHES = make_batches()
VARIABLES = MODEL.init(jax.random.key(1), BATCHES["x"][0], train=False)


def batch_at(i):
    return jax.tree.map(lambda x: x[i], BATCHES)


def copy(tree):
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def sgd():
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def create(kind, tx, **fields):
    """A state of the model; its own, so that a step may donate it."""
    fields = {"batch_stats": VARIABLES["batch_stats"], "dropout_key": KEY, **fields}
    state = kind.create(apply_fn=MODEL.apply, params=VARIABLES["params"], tx=tx, **fields)
    return copy(state)


def run(step, state, steps=STEPS):
    """The states after the steps, and the losses."""
    losses = []
    for i in range(steps):
        state, loss, *_ = step(state, batch_at(i))
        losses.append(loss)
    return state, jnp.stack(losses)


@jit
def step_by_hand(params, stats, momentum, batch, key, rho, alpha, update_twice, other_mask):
    """M-SAM (eq. 9; SAM where alpha = 0) with momentum, from `jax.grad` alone."""

    def loss(params, stats, key):
        variables = {"params": params, "batch_stats": stats}
        value, (updated, _) = loss_fn(variables, batch, {"dropout": jax.random.split(key, 1)[0]})
        return value, (value, updated["batch_stats"])

    choose = functools.partial(jax.tree.map, functools.partial(jnp.where, update_twice))
    g, (value, new_stats) = jax.grad(loss, has_aux=True)(params, stats, key)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    factor = rho / (norm * jnp.sqrt(1 + alpha**2 * norm**2))
    perturbed = jax.tree.map(lambda p, x: p + factor * x, params, g)
    second_key = jnp.where(other_mask, jax.random.fold_in(key, 1), key)
    second_stats = choose(new_stats, stats)
    g, (_, newest_stats) = jax.grad(loss, has_aux=True)(perturbed, second_stats, second_key)
    momentum = jax.tree.map(lambda m, x: MOMENTUM * m + x, momentum, g)
    mean = jnp.mean(batch["x"] @ params["first"]["kernel"], axis=0) + params["first"]["bias"]
    params = jax.tree.map(lambda p, m: p - LEARNING_RATE * m, params, momentum)
    return params, choose(newest_stats, new_stats), momentum, value, mean


@functools.cache
def by_hand(alpha, rho, update_twice=False, other_mask=False):
    """Params, statistics, losses, and the means of the layer before the normalisation."""
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    momentum = jax.tree.map(jnp.zeros_like, params)
    losses, means = [], []
    for i in range(STEPS):
        key = jax.random.fold_in(KEY, i)
        params, stats, momentum, value, mean = step_by_hand(
            params, stats, momentum, batch_at(i), key, rho(i), alpha, update_twice, other_mask
        )
        losses.append(value)
        means.append(mean)
    return params, stats, jnp.stack(losses), np.stack(means)


# --- against the loop by hand ---


def user_step(state, batch):
    """A step by hand around `apply_gradients`."""
    rngs = {"dropout": jax.random.split(jax.random.fold_in(state.dropout_key, state.step), 1)[0]}

    def loss(params):
        return loss_fn({"params": params, "batch_stats": state.batch_stats}, batch, rngs)

    (value, (updated, _)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    grad_fn = lambda p: jax.grad(loss, has_aux=True)(p)[0]  # noqa: E731
    return state.apply_gradients(grads=grads, grad_fn=grad_fn, **updated), value


# The steps donate the state, so everything below is a test of that too.
CHAIN_STEP = jit(make_train_step(loss_fn), donate_argnums=0)
METRIC_STEP = jit(make_train_step(loss_fn, metric=ms.monge(), rho=RHO), donate_argnums=0)


def chain(**options):
    return optax.chain(ms.monge_sam(rho=RHO, **options), sgd())


schedule = optax.linear_schedule(0.5, 0.1, 10)
constant = lambda i: RHO  # noqa: E731
SCHEDULED_STEP = jit(
    make_train_step(loss_fn, metric=ms.euclidean(), rho=schedule), donate_argnums=0
)
FORMS = {
    "apply_gradients": (1.0, constant, jit(user_step), SharpnessAwareTrainState, chain()),
    "chain": (1.0, constant, CHAIN_STEP, SharpnessAwareTrainState, chain()),
    "metric": (1.0, constant, METRIC_STEP, SharpnessAwareTrainState, sgd()),
    "metric, schedule, SAM, Flax's state": (0.0, schedule, SCHEDULED_STEP, PlainState, sgd()),
}


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_equal_the_loop_by_hand(form):
    alpha, rho, step, kind, tx = FORMS[form]
    params, stats, losses, means = by_hand(alpha, rho)
    state, actual_losses = run(step, create(kind, tx))
    chex.assert_trees_all_close(state.params, params, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(state.batch_stats, stats, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(actual_losses, losses, rtol=1e-6)
    assert state.step == STEPS
    running_mean = np.zeros(8)
    for mean in means:
        running_mean = 0.9 * running_mean + 0.1 * mean
    np.testing.assert_allclose(state.batch_stats["BatchNorm_0"]["mean"], running_mean, atol=1e-6)


def farthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)))


def test_a_naive_second_pass_would_be_seen():
    params, stats, *_ = by_hand(1.0, constant)
    assert farthest(by_hand(1.0, constant, update_twice=True)[1], stats) > 0.01
    assert farthest(by_hand(1.0, constant, other_mask=True)[0], params) > 0.01
    assert farthest(by_hand(0.0, constant)[0], params) > 0.01


# --- the state ---


def test_apply_gradients_without_grad_fn_is_that_of_flax():
    tx = optax.adamw(1e-2)
    grads = jax.tree.map(jnp.cos, VARIABLES["params"])
    stats = jax.tree.map(lambda x: x + 1, VARIABLES["batch_stats"])
    ours, flax = create(SharpnessAwareTrainState, tx), create(PlainState, tx)
    for _ in range(3):
        ours = ours.apply_gradients(grads=grads, batch_stats=stats)
        flax = flax.apply_gradients(grads=grads, batch_stats=stats)
    assert type(ours) is SharpnessAwareTrainState
    assert ours.tx is tx
    for name in ("step", "params", "opt_state", "batch_stats", "dropout_key"):
        chex.assert_trees_all_equal(getattr(ours, name), getattr(flax, name))


def test_extra_arguments_reach_the_transformation():
    """A gradient function given to the builder names `batch`; the plateau wants `value`."""
    grad_fn = lambda params, batch: {"w": batch * params["w"]}  # noqa: E731
    tx = optax.chain(
        ms.sam(grad_fn, rho=0.5), optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    )
    params = {"w": jnp.array([3.0, 4.0])}
    state = SharpnessAwareTrainState.create(apply_fn=None, params=params, tx=tx)

    @jit
    def apply(state, batch, value):
        return state.apply_gradients(
            grads=grad_fn(state.params, batch), extra_args={"batch": batch, "value": value}
        )

    new = apply(state, 2.0, 7.0)
    expected = np.array([3.0, 4.0]) - 0.1 * 2 * np.array([3.3, 4.4])
    np.testing.assert_allclose(new.params["w"], expected, rtol=1e-6)
    assert new.opt_state[-1].best_value == 7.0


def test_grad_fn_goes_to_any_optimizer():
    params = example_params()
    state = SharpnessAwareTrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    new = state.apply_gradients(grads=params, grad_fn=network_grad)
    chex.assert_trees_all_close(new.params, jax.tree.map(lambda p: 0.9 * p, params), rtol=1e-6)


def test_a_forgotten_extra_args_is_an_error_that_names_it():
    state = create(SharpnessAwareTrainState, chain())
    with pytest.raises(TypeError, match=r"batch is no field.*extra_args=\{'batch': \.\.\.\}"):
        state.apply_gradients(grads=state.params, batch=batch_at(0))


def test_a_subclass_may_have_fields_of_its_own():
    class Larger(SharpnessAwareTrainState):
        ema: Any

    state = create(Larger, optax.sgd(0.1), ema=jnp.zeros(2))
    new = state.apply_gradients(grads=state.params, ema=jnp.ones(2))
    np.testing.assert_array_equal(new.ema, 1)


FP8 = {"params": {"w": jnp.array([3.0, 4.0])}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.array(2.0)}}


def fp8_loss(params, target):
    """Its derivative by scale, 5 |w|^2 at the params, takes the place of scale."""
    w, scale = params["params"]["w"], params[OVERWRITE_WITH_GRADIENT]["scale"]
    return 5 * (scale - 2.0) * jnp.sum(w**2) + jnp.sum((w - target) ** 2)


def fp8_by_state(state):
    grad_fn = jax.grad(fp8_loss)
    return state.apply_gradients(
        grads=grad_fn(state.params, 1.0), grad_fn=grad_fn, extra_args={"target": 1.0}
    )


def fp8_by_step(state):
    step = make_train_step(lambda v, batch, rngs: (fp8_loss(v, batch), ({}, None)))
    return step(state, 1.0)[0]


def test_what_searches_along_a_line_does_not_see_what_flax_overwrites():
    def loss(w):
        return jnp.sum((w - 1.0) ** 2)

    tx = optax.chain(ms.sam(rho=0.5), optax.sgd(1.0), optax.scale_by_zoom_linesearch(10))
    state = SharpnessAwareTrainState.create(apply_fn=None, params=FP8, tx=tx)
    new, w = fp8_by_step(state).params, FP8["params"]["w"]
    g = {"w": jax.grad(loss)(w)}
    grad_fn = lambda p: {"w": jax.grad(loss)(p["w"])}  # noqa: E731
    updates, _ = tx.update(
        g,
        tx.init(FP8["params"]),
        FP8["params"],
        value=loss(w),
        grad=g,
        value_fn=lambda p, grad_fn: loss(p["w"]),
        grad_fn=grad_fn,
    )
    np.testing.assert_allclose(new["params"]["w"], w + updates["w"], rtol=1e-5)
    np.testing.assert_allclose(new[OVERWRITE_WITH_GRADIENT]["scale"], 5 * 25, rtol=1e-6)


@pytest.mark.parametrize("update", [fp8_by_state, fp8_by_step])
def test_what_flax_overwrites_with_its_gradient_is_not_perturbed(update):
    tx = optax.chain(ms.sam(rho=0.5), optax.sgd(0.1))
    state = SharpnessAwareTrainState.create(apply_fn=None, params=FP8, tx=tx)
    new = update(state).params
    w, g = np.array([3.0, 4.0]), 2 * np.array([2.0, 3.0])
    perturbed = w + 0.5 * g / np.linalg.norm(g)
    np.testing.assert_allclose(new["params"]["w"], w - 0.1 * 2 * (perturbed - 1), rtol=1e-6)
    np.testing.assert_allclose(new[OVERWRITE_WITH_GRADIENT]["scale"], 5 * 25, rtol=1e-6)


# --- the step in JAX ---


def simple(loss):
    """A loss of params and batch as `make_train_step` wants it."""
    return lambda variables, batch, rngs: (loss(variables["params"], batch), ({}, None))


def make(mode, loss, *, tail=sgd, alpha=1.0, kind=SharpnessAwareTrainState, fields=None, **options):
    """A jitted step and a state, with the transformation in the chain or a metric."""
    if mode == "chain":
        tx = optax.chain(ms.monge_sam(rho=RHO, alpha=alpha), tail())
    else:
        tx, options = tail(), {"metric": ms.monge(alpha=alpha), "rho": RHO, **options}
    fields = {"apply_fn": None, "params": example_params(), **(fields or {})}
    return jit(make_train_step(loss, **options)), kind.create(tx=tx, **fields)


MODES = ["chain", "metric"]


def test_random_keys():
    """Split from the key of the step; two streams differ, and two steps. Keys are typed ones."""
    seen = make_train_step(
        lambda variables, batch, rngs: (jnp.sum(variables["params"]["b"]), ({}, rngs)),
        rng_streams=("dropout", "noise"),
    )
    params = {"b": jnp.ones(2)}
    state = SharpnessAwareTrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1), dropout_key=KEY
    )
    for i in range(2):
        state, _, rngs = seen(state, None)
        expected = jax.random.split(jax.random.fold_in(KEY, i), 2)
        actual = [jax.random.key_data(rngs[name]) for name in ("dropout", "noise")]
        np.testing.assert_array_equal(actual, expected)
    typed = state.replace(dropout_key=jax.random.wrap_key_data(KEY), step=1)
    chex.assert_trees_all_equal(seen(typed, None)[2], rngs)
    np.testing.assert_array_equal(state.dropout_key, KEY)
    assert seen(state.replace(dropout_key=None), None)[2] == {}
    assert seen(TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1)), None)[2] == {}


def test_a_plain_optimizer_goes_through_the_same_builder():
    """And is told the loss as `value`, for those that want it."""
    batch, params = example_batch(), example_params()
    tx = optax.chain(optax.sgd(LEARNING_RATE), optax.contrib.reduce_on_plateau(patience=3))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    new, loss, metrics = jit(make_train_step(simple(network_loss)))(state, batch)
    value, grads = jax.value_and_grad(network_loss)(params, batch)
    expected = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    chex.assert_trees_all_close(new.params, expected, rtol=1e-5)
    assert float(loss) == pytest.approx(float(value), rel=1e-6)
    assert new.opt_state[-1].best_value == loss
    assert metrics is None


@pytest.mark.parametrize("mode", MODES)
def test_diagnostics_are_the_fourth_part(mode):
    step, state = make(mode, simple(network_loss), diagnostics=True)
    _, _, _, diagnostics = step(state, example_batch())
    norm = float(optax.tree.norm(network_grad(state.params, example_batch())))
    assert float(diagnostics.grad_norm) == pytest.approx(norm, rel=1e-6)
    length = RHO / np.hypot(1, norm)
    assert float(diagnostics.perturbation_norm) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_over_microbatches_equals_the_whole_batch(mode):
    def loss(variables, batch, rngs):
        return network_loss(variables["params"], batch), ({}, jnp.asarray(len(batch["x"]), float))

    batch = example_batch(16)
    step, state = make(mode, loss)
    accumulating, _ = make(mode, loss, value_and_grad=ms.accumulated(4, axis=(None, 0, None)))
    actual, value, size = accumulating(state, batch)
    expected, expected_value, whole_size = step(state, batch)
    assert (size, whole_size) == (4, 16)
    chex.assert_trees_all_close(actual.params, expected.params, rtol=1e-5, atol=1e-6)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)


# What an optimizer that searches along a line is given, in loops by hand.

LINES = {
    "lbfgs": lambda: optax.lbfgs(memory_size=3),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
    ),
}


def losses_of_model(state, batch, k):
    """The mean over k micro-batches, each with its own mask, as a function of the params."""
    key = jax.random.split(jax.random.fold_in(state.dropout_key, state.step), 1)[0]

    def loss(params):
        losses, updated = [], []
        for i in range(k):
            some = jax.tree.map(lambda x, i=i: x[i::k], batch)
            rngs = {"dropout": jax.random.fold_in(key, i) if k > 1 else key}
            variables = {"params": params, "batch_stats": state.batch_stats}
            value, (changed, _) = loss_fn(variables, some, rngs)
            losses.append(value)
            updated.append(changed["batch_stats"])
        return sum(losses) / k, jax.tree.map(lambda *xs: sum(xs) / k, *updated)

    return loss


@functools.partial(jit, static_argnums=(2, 3))
def line_step_by_hand(state, batch, tail, k):
    """M-SAM (eq. 9) before an optimizer that gets value, gradient and function of the params."""
    loss = losses_of_model(state, batch, k)
    (value, stats), g = jax.value_and_grad(loss, has_aux=True)(state.params)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
    factor = RHO / (norm * jnp.sqrt(1 + norm**2))
    nearby = jax.tree.map(lambda p, x: p + factor * x, state.params, g)
    second, _ = jax.grad(loss, has_aux=True)(nearby)
    updates, opt_state = tail.update(
        second,
        state.opt_state,
        state.params,
        value=value,
        grad=g,
        value_fn=lambda params: loss(params)[0],
    )
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    return state.replace(step=step, params=params, opt_state=opt_state, batch_stats=stats), value


def line_state(tail, **fields):
    return create(SharpnessAwareTrainState, tail, **fields)


@pytest.mark.parametrize(
    ("line", "mode", "k", "scaled"),
    [
        ("zoom", "metric", 1, False),
        pytest.param("backtracking", "chain", 2, True, marks=pytest.mark.slow),
        pytest.param("lbfgs", "chain", 1, False, marks=pytest.mark.slow),
        pytest.param("lbfgs", "metric", 2, True, marks=pytest.mark.slow),
    ],
)
def test_searches_along_a_line_equal_a_loop_by_hand(line, mode, k, scaled):
    """With dropout, running statistics, micro-batches and a loss scale."""
    tail = LINES[line]()
    options = {"metric": ms.monge(), "rho": RHO} if mode == "metric" else {}
    if k > 1:
        options["value_and_grad"] = ms.accumulated(k, axis=(None, 0, None))
    tx = tail if mode == "metric" else optax.chain(ms.monge_sam(rho=RHO), tail)
    dynamic_scale = DynamicScale(scale=2.0**10) if scaled else None
    step = jit(make_train_step(loss_fn, **options))
    actual, losses = run(step, line_state(tx, dynamic_scale=dynamic_scale), steps=3)
    step = functools.partial(line_step_by_hand, tail=tail, k=k)
    expected, expected_losses = run(step, line_state(tail), steps=3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(actual.params, expected.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [pytest.param("chain", marks=pytest.mark.slow), "metric"])
def test_micro_batches_have_masks_of_their_own_in_both_passes(mode):
    """Accumulated steps, of a raw key, against a loop by hand; and the masks themselves."""
    tail = optax.sgd(LEARNING_RATE)
    tx = tail if mode == "metric" else optax.chain(ms.monge_sam(rho=RHO), tail)
    options = {"metric": ms.monge(), "rho": RHO} if mode == "metric" else {}
    accumulating = {"value_and_grad": ms.accumulated(4, axis=(None, 0, None))}
    step = jit(make_train_step(loss_fn, **accumulating, **options))
    actual, losses = run(step, line_state(tx), steps=3)
    by_hand = functools.partial(line_step_by_hand, tail=optax.with_extra_args_support(tail), k=4)
    expected, expected_losses = run(by_hand, line_state(tail), steps=3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(actual.params, expected.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(actual.batch_stats, expected.batch_stats, rtol=1e-5, atol=1e-6)

    def showing_its_mask(variables, batch, rngs):
        loss, (updated, _) = loss_fn(variables, batch, rngs)
        return loss, (updated, jax.random.bernoulli(rngs["dropout"], 0.5, (1000,)))

    shown = jit(make_train_step(showing_its_mask, **accumulating, **options))
    _, _, metrics = shown(line_state(tx), batch_at(0))
    assert set(np.unique(metrics)) == {0.0, 0.25, 0.5, 0.75, 1.0}  # means over four masks


def test_what_a_transformation_gets_beside_the_gradient():
    """At all depths; and what the state's own `apply_gradients` adds goes with it."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    class Marking(SharpnessAwareTrainState):
        def apply_gradients(self, *, grads, **changes):
            return super().apply_gradients(grads=grads, extra_args={"mark": 7}, **changes)

    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    search = optax.scale_by_zoom_linesearch(5)
    tx = optax.chain(ms.sam(rho=RHO), spy, optax.sgd(1.0), search)
    params, batch = example_params(), example_batch()
    state = Marking.create(apply_fn=None, params=params, tx=tx)
    new, loss, _ = make_train_step(simple(network_loss))(state, batch)
    assert seen.keys() == {"mark", "value", "grad", "value_fn", "grad_fn"}
    assert (seen["mark"], seen["value"]) == (7, loss)
    chex.assert_trees_all_close(seen["grad"], network_grad(params, batch), rtol=1e-5)
    other = jax.tree.map(lambda p: p + 0.1, params)
    for more in ({}, {"anything": 1}):
        value = seen["value_fn"](other, **more)
        assert float(value) == pytest.approx(float(network_loss(other, batch)), rel=1e-6)
    chex.assert_trees_all_equal_structs(new, state)


def test_line_searches_in_a_step_of_ones_own():
    """`value_fn` names what it takes of `extra_args`; Optax refuses the others."""
    tx = optax.chain(ms.sam(network_grad, rho=RHO), optax.lbfgs())
    params, batch = example_params(), example_batch()
    state = SharpnessAwareTrainState.create(apply_fn=None, params=params, tx=tx)
    value, grads = jax.value_and_grad(network_loss)(params, batch)
    extra_args = {"value": value, "grad": grads, "value_fn": network_loss, "batch": batch}
    new = state.apply_gradients(grads=grads, extra_args={**extra_args, "other": 1})
    updates, _ = tx.update(grads, tx.init(params), params, **extra_args)
    chex.assert_trees_all_close(new.params, optax.apply_updates(params, updates), rtol=1e-6)


def test_a_plain_optimizer_pays_for_no_search():
    """The loss is traced once, and the program is that of a step by hand."""
    traces = []

    def counted(params, batch):
        traces.append(None)
        return network_loss(params, batch)

    @jax.jit
    def by_hand(state, batch):
        value, grads = jax.value_and_grad(network_loss)(state.params, batch)
        return state.apply_gradients(grads=grads), value, None

    state = TrainState.create(apply_fn=None, params=example_params(), tx=optax.sgd(LEARNING_RATE))
    step = jax.jit(make_train_step(simple(counted)))
    programs = [f.lower(state, example_batch()).compile().as_text() for f in (step, by_hand)]
    assert len(traces) == 1
    assert programs[0].count(" = ") == programs[1].count(" = ")


@pytest.mark.parametrize("mode", MODES)
def test_complex_params_descend(mode):
    """The loss is the sum of |z - i|^4 / 2, and 2 |z - i|^2 (z - i) its direction of ascent."""
    gradient = lambda z: 2 * np.abs(z - 1j) ** 2 * (z - 1j)  # noqa: E731
    loss = lambda params, batch: jnp.sum(jnp.abs(params["z"] - 1j) ** 4) / 2  # noqa: E731
    z = np.array([1.0 + 2.0j, -0.5j])
    tail = lambda: optax.sgd(0.1)  # noqa: E731
    step, state = make(
        mode, simple(loss), tail=tail, kind=TrainState, fields={"params": {"z": jnp.array(z)}}
    )
    for _ in range(3):
        state, *_ = step(state, None)
        norm = np.linalg.norm(gradient(z))
        perturbed = z + RHO * gradient(z) / (norm * np.sqrt(1 + norm**2))
        z = z - 0.1 * gradient(perturbed)
    np.testing.assert_allclose(state.params["z"], z, rtol=1e-5)


# --- loss scaling ---


def half_loss(params, batch, dtype=jnp.float16):
    """`network_loss` at a twentieth, computed in float16, with derivatives below 2."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    hidden = jnp.tanh(batch["x"].astype(dtype) @ params["hidden"]["w"])
    prediction = params["temperature"] * (hidden @ params["out"])
    return 0.05 * jnp.mean((prediction.astype(jnp.float32) - batch["y"]) ** 2)


def run_half(step, state):
    for seed in range(10):
        state, *_ = step(state, example_batch(seed=seed))
    return state


# Powers of two change what float16 rounds only where numbers are subnormal. That is worth units in
# the last place, 2^-11 of params of order one; computing in float32 changes the run by as much.
FLOAT16_ROUNDING = 4 * 2.0**-11


def half_tail():
    return optax.sgd(2.0, momentum=0.9)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_scale_does_not_matter(mode):
    step, state = make(mode, simple(half_loss), alpha=3.0, tail=half_tail)
    unscaled = run_half(step, state).params
    for scale in (1.0, 2.0**7, 2.0**15):
        scaled = run_half(step, state.replace(dynamic_scale=DynamicScale(scale=scale)))
        assert (scaled.dynamic_scale.scale, scaled.dynamic_scale.fin_steps) == (scale, 10)
        assert farthest(scaled.params, unscaled) < FLOAT16_ROUNDING


def test_a_scale_left_in_would_be_seen():
    """Left in where the params are perturbed, and divided out afterwards."""
    unscaled = run_half(*make("chain", simple(half_loss), alpha=3.0, tail=half_tail)).params
    in_float32 = simple(functools.partial(half_loss, dtype=jnp.float32))
    exact = run_half(*make("chain", in_float32, alpha=3.0, tail=half_tail)).params
    assert 1e-4 < farthest(exact, unscaled) < FLOAT16_ROUNDING
    tail = lambda: optax.chain(optax.scale(2.0**-7), half_tail())  # noqa: E731
    naive = simple(lambda params, batch: 2.0**7 * half_loss(params, batch))
    naively_scaled = run_half(*make("chain", naive, alpha=3.0, tail=tail)).params
    assert farthest(naively_scaled, unscaled) > 100 * FLOAT16_ROUNDING


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_scale_saves_small_gradients(mode):
    """1e-9 is zero in float16; scaled it is not, and no scale is left in what the metric sees."""
    loss = lambda p, b: jnp.sum(1e-9 * p["w"].astype(jnp.float16).astype(jnp.float32))  # noqa: E731
    tail = lambda: optax.sgd(1e8)  # noqa: E731
    fields = {"params": {"w": jnp.zeros(2)}, "dynamic_scale": DynamicScale(scale=2.0**15)}
    step, state = make(mode, simple(loss), tail=tail, fields=fields, diagnostics=True)
    new, value, _, diagnostics = step(state, None)
    np.testing.assert_allclose(new.params["w"], -0.1, rtol=2e-3)
    assert float(diagnostics.grad_norm) == pytest.approx(np.sqrt(2) * 1e-9, rel=2e-3)
    assert value == 0.0
    lost, *_ = step(state.replace(dynamic_scale=None), None)
    np.testing.assert_array_equal(lost.params["w"], 0)


def flax_scales(dynamic_scale, finite):
    """What Flax makes of a sequence of gradients that are finite or not."""
    states = []
    for is_finite in finite:
        differentiate = dynamic_scale.value_and_grad(lambda p, y: p * y)
        dynamic_scale, seen, *_ = differentiate(1.0, 1.0 if is_finite else jnp.inf)
        assert seen == is_finite
        states.append((dynamic_scale.scale, dynamic_scale.fin_steps))
    return states


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_moves_as_in_flax_and_overflows_are_skipped(mode):
    finite = [True, False, True, True, True, True, False, False, True, True, True, True]
    start = DynamicScale(scale=2.0**10, growth_interval=2)
    fields = {"dynamic_scale": start, "dropout_key": jax.random.key(0)}
    traces = []
    counted = lambda params, batch: traces.append(mode) or half_loss(params, batch)  # noqa: E731
    step, state = make(mode, simple(counted), fields=fields)
    states = []
    for is_finite in finite:
        batch = example_batch()
        batch["y"] = batch["y"] if is_finite else 1e9 * batch["y"]
        before, (state, *_) = state, step(state, batch)
        states.append((state.dynamic_scale.scale, state.dynamic_scale.fin_steps))
        kept = farthest(state.params, before.params) == 0
        assert kept is not is_finite
        if kept:
            chex.assert_trees_all_equal(state.opt_state, before.opt_state)
    assert states == flax_scales(start, finite)
    assert state.step == len(finite)
    assert len(traces) == 2  # the two passes of the only compilation


TAILS = {
    "sgd": lambda: optax.sgd(0.1),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.sgd(0.1)),
    "multisteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=5)
    ),
}


def cliff(params, slope):
    """Finite where w <= 1.01; beyond, its derivative by w alone overflows if the slope is large."""
    beyond = jax.nn.relu(params["w"] - 1.01)
    return jnp.sum(params["v"] ** 2) + params["w"] + jnp.exp(slope * beyond)


@pytest.mark.parametrize(
    ("mode", "tail"), [*(("chain", tail) for tail in TAILS), ("metric", "clip")]
)
def test_an_overflow_at_the_perturbed_params_alone_is_skipped(mode, tail):
    params = {"w": jnp.array(1.0), "v": jnp.array([0.1, -0.2])}
    assert np.isfinite(jax.grad(cliff)(params, 1e3)["w"])
    fields = {"params": params, "dynamic_scale": DynamicScale(scale=4.0)}
    step, state = make(mode, simple(cliff), tail=TAILS[tail], alpha=0.0, fields=fields)
    skipped, *_ = step(state, 1e3)
    assert (skipped.dynamic_scale.scale, skipped.dynamic_scale.fin_steps) == (2.0, 0)
    chex.assert_trees_all_equal((skipped.params, skipped.opt_state), (params, state.opt_state))
    taken, *_ = step(skipped, 0.0)
    expected, *_ = step(state, 0.0)
    chex.assert_trees_all_equal(
        (taken.params, taken.opt_state), (expected.params, expected.opt_state)
    )
    assert (taken.dynamic_scale.scale, taken.dynamic_scale.fin_steps, taken.step) == (2.0, 1, 2)
    chex.assert_tree_all_finite(taken.params)


def test_an_overflow_at_the_params_alone_is_skipped():
    """In a step that hands the first gradient on, to a clip that hides it."""
    tx = optax.chain(ms.sam(rho=0.1, period=2), optax.clip(0.1), optax.sgd(0.1))
    state = SharpnessAwareTrainState.create(
        apply_fn=None, params={"w": jnp.array(1.0)}, tx=tx, dynamic_scale=DynamicScale(scale=4.0)
    )
    step = jit(make_train_step(simple(lambda params, slope: jnp.exp(slope * params["w"]))))
    taken, *_ = step(state, 0.5)
    skipped, *_ = step(taken, 1e3)
    assert (taken.dynamic_scale.scale, skipped.dynamic_scale.scale) == (4.0, 2.0)
    assert skipped.params["w"] == taken.params["w"] < 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widen_params", [False, True])
def test_bfloat16_params_lose_small_perturbations_unless_widened(mode, widen_params):
    params = {"w": jnp.ones(10_000, jnp.bfloat16)}
    loss = simple(lambda p, b: 0.5 * jnp.sum(p["w"] ** 2, dtype=jnp.float32))
    options = {"rho": 0.05, "measure": True, "widen_params": widen_params}
    if mode == "chain":
        step, tx = make_train_step(loss, diagnostics=True), optax.chain(ms.sam(**options), sgd())
    else:
        step = make_train_step(loss, metric=ms.euclidean(), diagnostics=True, **options)
        tx = sgd()
    state = SharpnessAwareTrainState.create(apply_fn=None, params=params, tx=tx)
    state, *_, diagnostics = jit(step)(state, None)
    assert float(diagnostics.perturbation_norm) == pytest.approx(0.05, rel=1e-3)
    realised = 0.05 if widen_params else 0.0
    assert float(diagnostics.realised_norm) == pytest.approx(realised, rel=1e-3)
    assert state.params["w"].dtype == jnp.bfloat16


# --- checkpoints ---


def with_flax(state, fresh, folder):
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def with_orbax(state, fresh, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", fresh)


INJECTED = optax.chain(
    optax.inject_hyperparams(ms.monge_sam, static_args=("grad_fn", "period"))(
        rho=optax.linear_schedule(0.5, 0.1, 6)
    ),
    optax.sgd(optax.cosine_decay_schedule(0.1, 6), momentum=0.9),
)


def injected_state(scaled):
    dynamic_scale = DynamicScale(scale=2.0**10, growth_interval=2) if scaled else None
    return create(SharpnessAwareTrainState, INJECTED, dynamic_scale=dynamic_scale)


@functools.cache
def uninterrupted(scaled):
    """The states before and after six steps."""
    states = [injected_state(scaled)]
    for i in range(6):
        states.append(CHAIN_STEP(copy(states[-1]), batch_at(i))[0])
    return states


@pytest.mark.parametrize(
    ("save_and_restore", "scaled"),
    [
        (with_flax, True),
        (with_orbax, False),
        pytest.param(with_flax, False, marks=pytest.mark.slow),
        pytest.param(with_orbax, True, marks=pytest.mark.slow),
    ],
)
def test_resumed_training_is_bit_equal(save_and_restore, scaled, tmp_path):
    states = uninterrupted(scaled)
    resumed = save_and_restore(states[3], jax.tree.map(jnp.zeros_like, states[3]), tmp_path)
    chex.assert_trees_all_equal(resumed, states[3])
    for i in range(3, 6):
        resumed, *_ = CHAIN_STEP(resumed, batch_at(i))
    chex.assert_trees_all_equal(resumed, states[6])
    hyperparams = states[6].opt_state[0].hyperparams
    assert float(hyperparams["rho"]) == pytest.approx(0.5 - 5 / 6 * 0.4, rel=1e-6)


def test_a_too_large_scale_skips_the_whole_step_and_is_halved_once():
    """Its statistics stay too; number, momentum and schedules are in the state that is compared."""
    state = uninterrupted(scaled=True)[3]
    state = state.replace(dynamic_scale=state.dynamic_scale.replace(scale=jnp.array(2.0**127)))
    skipped, *_ = CHAIN_STEP(copy(state), {"x": 1e3 * BATCHES["x"][3], "y": BATCHES["y"][3]})
    dynamic_scale = state.dynamic_scale.replace(scale=2.0**126, fin_steps=0)
    chex.assert_trees_all_equal(skipped, state.replace(step=4, dynamic_scale=dynamic_scale))


def test_a_loop_of_xla_takes_the_same_steps():
    state, states = injected_state(scaled=True), uninterrupted(scaled=True)
    step = make_train_step(loss_fn)
    scan = jit(lambda s, b: jax.lax.scan(lambda s, b: step(s, b)[:2], s, b))
    six, _ = scan(state, jax.tree.map(lambda x: x[:6], BATCHES))
    chex.assert_trees_all_close(six, states[6], rtol=1e-5, atol=1e-6)


def test_orbax_keeps_a_new_style_key(tmp_path):
    state = create(SharpnessAwareTrainState, chain(), dropout_key=jax.random.key(3))
    fresh = state.replace(dropout_key=jax.random.key(0))
    restored = with_orbax(state, fresh, tmp_path)
    np.testing.assert_array_equal(*(jax.random.key_data(s.dropout_key) for s in (restored, state)))


# --- many devices ---


@functools.cache
def on_one_device():
    """Three steps, with statistics of the whole batch and no dropout."""
    loss = functools.partial(model_loss, Network(dropout=0.0))
    step = jit(make_train_step(loss, metric=ms.monge(), rho=RHO))
    return run(step, create(SharpnessAwareTrainState, sgd()), steps=3)


@pytest.mark.parametrize("mode", [pytest.param("chain", marks=pytest.mark.slow), "metric"])
def test_two_devices_equal_one(on_cpu, mode):
    """Under shard_map, which knows what varies over devices and sums gradients by itself."""
    loss = functools.partial(model_loss, Network("data", dropout=0.0))
    options = {} if mode == "chain" else {"metric": ms.monge(), "rho": RHO}
    step = make_train_step(loss, axis_name="data", **options)
    mapped = jax.shard_map(
        lambda state, batch: step(state, batch)[:2],
        mesh=Mesh(np.array(cpu_devices(2)), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    dynamic_scale = DynamicScale(scale=2.0**4)
    tx = chain() if mode == "chain" else sgd()
    state = create(SharpnessAwareTrainState, tx, dynamic_scale=dynamic_scale)
    state, losses = run(jit(mapped), state, steps=3)
    expected, expected_losses = on_one_device()
    for name in ("params", "batch_stats"):
        actual = getattr(state, name)
        chex.assert_trees_all_close(actual, getattr(expected, name), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert state.dynamic_scale.fin_steps == 3


def by_shard_map(step, state, batch, check_vma):
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:2]), ("data",))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    return jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs)(state, batch)


def by_vmap(step, state, batch):
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    return jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="data")(state, halves)


@pytest.mark.parametrize(
    "by_devices",
    [
        functools.partial(by_shard_map, check_vma=True),
        functools.partial(by_shard_map, check_vma=False),
        by_vmap,
    ],
    ids=["shard_map", "shard_map unchecked", "vmap"],
)
def test_the_function_that_is_searched_is_of_the_whole_batch(by_devices):
    """Its value, its derivatives in both directions, and the gradient that goes with it."""

    def update(updates, state, params=None, *, value, grad, value_fn, grad_fn):
        tangent = jax.tree.map(jnp.ones_like, params)
        _, slope = jax.jvp(value_fn, (params,), (tangent,))
        return jax.grad(value_fn)(params), (value, value_fn(params), slope, grad)

    seen = (0.0, 0.0, 0.0, example_params())
    tx = optax.GradientTransformationExtraArgs(lambda params: seen, update)
    state = TrainState.create(apply_fn=None, params=example_params(), tx=tx)
    step = make_train_step(simple(network_loss), axis_name="data")
    new = jit(functools.partial(by_devices, lambda *args: step(*args)[0]))(state, example_batch(16))
    value, grads = jax.value_and_grad(network_loss)(state.params, example_batch(16))
    slope = sum(jnp.sum(g) for g in jax.tree.leaves(grads))
    expected = (jax.tree.map(jnp.add, state.params, grads), (value, value, slope, grads))
    chex.assert_trees_all_close((new.params, new.opt_state), expected, rtol=1e-5, atol=1e-6)


def test_each_device_its_own_mask_and_perturbation():
    """m-sharpness by hand; loss and statistics are means, metrics are not."""
    step = make_train_step(
        loss_fn, metric=ms.monge(), rho=RHO, axis_name="data", sync_perturbation=False
    )
    state = create(SharpnessAwareTrainState, optax.sgd(LEARNING_RATE))
    pieces = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch_at(0))
    new, loss, metrics = jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))(state, pieces)

    @functools.partial(jax.vmap, in_axes=(0, 0))
    def by_hand(batch, device):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 0), device)
        rngs = {"dropout": jax.random.split(key, 1)[0]}

        def loss(params):
            return loss_fn({"params": params, "batch_stats": state.batch_stats}, batch, rngs)

        (value, aux), g = jax.value_and_grad(loss, has_aux=True)(state.params)
        norm = optax.tree.norm(g)
        factor = RHO / (norm * jnp.sqrt(1 + norm**2))
        perturbed = jax.tree.map(lambda p, x: p + factor * x, state.params, g)
        return value, aux, jax.grad(loss, has_aux=True)(perturbed)[0]

    value, (updated, accuracy), grads = jit(by_hand)(pieces, jnp.arange(4))
    expected = jax.tree.map(
        lambda p, g: p - LEARNING_RATE * jnp.mean(g, axis=0), state.params, grads
    )
    stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), updated["batch_stats"])
    for device in (0, 3):
        here = jax.tree.map(lambda x, i=device: x[i], new)
        chex.assert_trees_all_close(here.params, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(here.batch_stats, stats, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, jnp.full(4, jnp.mean(value)), rtol=1e-5)
    chex.assert_trees_all_close(metrics, accuracy)


# --- what is wrong, and what to write instead ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.1}, TypeError, r"rho given without a metric.*monge_sam\(rho=\.\.\.\)"),
        ({"metric": "monge"}, TypeError, "must be a Metric"),
        ({"metric": ms.monge(), "rho": -1.0}, ValueError, "rho must be finite and not negative"),
        ({"metric": ms.monge(), "rhoo": 1.0}, TypeError, "rhoo"),
        ({"mutable": "batch_stats"}, TypeError, r"\('batch_stats',\)"),
        ({"rng_streams": "dropout"}, TypeError, r"\('dropout',\)"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        make_train_step(loss_fn, **options)


def trace(loss, kind=SharpnessAwareTrainState, tx=None, fields=None, **options):
    state = create(kind, sgd() if tx is None else tx, **(fields or {}))
    return jax.eval_shape(make_train_step(loss, **options), state, batch_at(0))


@pytest.mark.parametrize(
    "output",
    [lambda x: x, lambda x: (x, {}), lambda x: (x, ({}, {}, {})), lambda x: (x, (None, {}))],
)
@pytest.mark.parametrize("options", [{}, {"metric": ms.monge()}], ids=MODES)
def test_a_loss_that_returns_something_else(output, options):
    with pytest.raises(ValueError, match=r"loss_fn must return \(loss, \(updated, metrics\)\)"):
        trace(
            lambda variables, batch, rngs: output(jnp.sum(variables["params"]["first"]["bias"])),
            **options,
        )


def test_a_collection_without_a_place():
    with pytest.raises(ValueError, match=r"'batch_stats', which is not in mutable=\('cache',\)"):
        trace(loss_fn, mutable=("cache",))
    with pytest.raises(ValueError, match=r"create it with batch_stats=variables\['batch_stats'\]"):
        trace(loss_fn, fields={"batch_stats": None})


def test_a_metric_and_a_transformation_would_perturb_twice():
    with pytest.raises(ValueError, match="twice"):
        trace(loss_fn, tx=chain(), metric=ms.monge())


@pytest.mark.parametrize("options", [{}, {"metric": ms.monge()}], ids=MODES)
def test_two_transformations_are_refused(options):
    masks = [jax.tree.map(lambda p, i=i: p.ndim == i, VARIABLES["params"]) for i in (1, 2)]
    links = [ms.sam(rho=rho, mask=mask) for rho, mask in zip((0.5, 0.05), masks, strict=True)]
    message = r"2 sharpness-aware .* metric=grouped\(\{\.\.\.\}, labels\)"
    with pytest.raises(ValueError, match=message):
        trace(loss_fn, tx=optax.chain(*links, sgd()), **options)


def test_diagnostics_of_a_plain_optimizer_are_an_error():
    with pytest.raises(ValueError, match="found 0"):
        trace(loss_fn, diagnostics=True)


@pytest.mark.parametrize(
    ("options", "scaled"), [({"metric": ms.monge()}, False), ({}, True)], ids=["metric", "scale"]
)
def test_what_flax_overwrites_is_an_error_elsewhere(options, scaled):
    dynamic_scale = DynamicScale() if scaled else None
    state = SharpnessAwareTrainState.create(
        apply_fn=None, params=FP8, tx=optax.sgd(0.1), dynamic_scale=dynamic_scale
    )
    step = make_train_step(simple(fp8_loss), **options)
    with pytest.raises(ValueError, match="fp8"):
        step(state, 1.0)
