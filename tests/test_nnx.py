"""Flax NNX: running statistics, dropout masks and random counters in a step of two passes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import Mesh, PartitionSpec
from reference import example_batch
from trajectories import cpu_devices

import monge_sam_jax as ms
from monge_sam_jax.nnx import (
    evaluation_model,
    grad_fn,
    refresh_batch_stats,
    sharpness_aware_value_and_grad,
)

RHO = 0.2
STEPS = 20
BATCHES = [example_batch(seed=i) for i in range(STEPS)]
BATCH = BATCHES[0]
KERNELS = nnx.All(nnx.Param, nnx.PathContains("kernel"))


class Network(nnx.Module):
    def __init__(self, rate=0.3, axis_name=None):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.8, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.LoRALinear(3, 2, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def contents(node):
    """All state as a nested dict of NumPy arrays."""
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x),
        nnx.to_pure_dict(nnx.state(node)),
    )


def merge(graphdef, *states):
    """nnx.merge of copies: the model that it makes may be changed."""
    return nnx.merge(graphdef, *jax.tree.map(lambda x: x, states))


def as_function(make, loss_fn=loss_fn, wrt=nnx.Param):
    """The loss as a function of a dict of params, and those of a new model."""
    graphdef, state = nnx.split(make())

    def loss(params, batch):
        model = merge(graphdef, state)
        nnx.update(model, params)
        return loss_fn(model, batch)

    return loss, nnx.to_pure_dict(nnx.state(make(), wrt))


def perturbed(params, g, alpha=1.0):
    """theta + rho g / (|g| sqrt(1 + alpha^2 |g|^2)); alpha = 0 is SAM. Written out: eq. 9."""
    n = jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(g)))
    k = RHO / (n * jnp.sqrt(1 + (alpha * n) ** 2))
    return jax.tree.map(lambda p, x: p + k * jnp.conj(x), params, g)


def by_hand(loss, params, *args):
    """Monge SAM's gradient from jax.grad alone."""
    theta = perturbed(params, jax.grad(loss)(params, *args))
    return jax.grad(loss)(theta, *args)


# Twenty steps against a loop without any of the package


def base_optimizer():
    return optax.sgd(0.1, momentum=0.9)


@functools.cache
def trained_by_hand(alpha):
    graphdef, params, rest = nnx.split(Network(), nnx.Param, ...)
    tx = base_optimizer()

    def pure_loss(params, rest, batch):
        model = merge(graphdef, params, rest)
        return loss_fn(model, batch), nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, opt_state, batch):
        (loss, new_rest), g = jax.value_and_grad(pure_loss, has_aux=True)(params, rest, batch)
        second, _ = jax.grad(pure_loss, has_aux=True)(perturbed(params, g, alpha), rest, batch)
        updates, opt_state = tx.update(second, opt_state, params)
        return optax.apply_updates(params, updates), new_rest, opt_state, loss

    opt_state, losses = tx.init(params), []
    for batch in BATCHES:
        params, rest, opt_state, loss = step(params, rest, opt_state, batch)
        losses.append(float(loss))
    return losses, contents(nnx.merge(graphdef, params, rest))


def in_place_of_value_and_grad(loss_fn, alpha):
    value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(alpha=alpha), rho=RHO)

    def step(model, optimizer, batch):
        loss, grads = value_and_grad(model, batch)
        optimizer.update(model, grads)
        return loss

    return base_optimizer(), step


def step_of_a_chain(model, optimizer, batch, loss_fn=loss_fn):
    second = grad_fn(loss_fn, model, batch)
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=second)
    return loss


def in_the_chain(loss_fn, alpha):
    tx = optax.chain(ms.monge_sam(rho=RHO, alpha=alpha), base_optimizer())
    return tx, functools.partial(step_of_a_chain, loss_fn=loss_fn)


def on_the_live_model(loss_fn, alpha):
    """What goes wrong without a helper."""

    def step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        params = jax.tree.map(jnp.asarray, nnx.state(model, nnx.Param))
        nnx.update(model, perturbed(params, grads, alpha))
        grads = nnx.grad(loss_fn)(model, batch)
        nnx.update(model, params)
        optimizer.update(model, grads)
        return loss

    return base_optimizer(), step


def train(way, alpha):
    """Losses, model and the number of times that the loss was traced."""
    traces = []

    def traced_loss(model, batch):
        traces.append(batch)
        return loss_fn(model, batch)

    tx, step = way(traced_loss, alpha)
    model = Network()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(step, donate_argnums=(0, 1))
    losses = [float(step(model, optimizer, batch)) for batch in BATCHES]
    return losses, model, len(traces)


@pytest.mark.parametrize("alpha", [0.0, 1.0], ids=["sam", "monge"])
@pytest.mark.parametrize("way", [in_place_of_value_and_grad, in_the_chain])
def test_training_equals_a_loop_by_hand(way, alpha):
    """Params, running statistics, random counters and losses; one compilation, with donation."""
    expected_losses, expected = trained_by_hand(alpha)
    losses, model, traces = train(way, alpha)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-6)
    chex.assert_trees_all_close(contents(model), expected, atol=1e-6)
    assert model.dropout.rngs.count[...] == STEPS
    assert traces == 2


def test_a_second_pass_on_the_live_model_differs():
    _, expected = trained_by_hand(1.0)
    _, model, _ = train(on_the_live_model, 1.0)
    actual = contents(model)
    assert actual["dropout"]["rngs"]["count"] == 2 * STEPS
    for path in (("norm", "mean"), ("out", "kernel")):
        part, expected_part = (functools.reduce(dict.get, path, x) for x in (actual, expected))
        assert np.max(np.abs(part - expected_part)) > 1e-2


# The first pass is the one that counts


def eagerly(fn, *nodes):
    return fn(*nodes, BATCH)


def under_nnx_jit(fn, *nodes):
    return nnx.jit(fn)(*nodes, BATCH)


def under_jax_jit(fn, *nodes):
    graphdef, state = nnx.split(nodes)

    @jax.jit
    def pure(state, batch):
        nodes = nnx.merge(graphdef, state)
        return fn(*nodes, batch), nnx.state(nodes)

    output, state = pure(state, BATCH)
    nnx.update(nodes, state)
    return output


def loss_with_everything(model, rngs, metric, batch):
    """Draws from a stream of its own, updates a metric, and leaves an intermediate behind."""
    prediction = model(batch["x"] + jax.random.uniform(rngs.noise()))
    model.prediction = nnx.Intermediate(prediction)
    loss = jnp.mean((prediction - batch["y"]) ** 2)
    metric.update(values=loss)
    return loss, {"prediction": prediction}


def outcome_with_everything(how, fn):
    nodes = (Network(), nnx.Rngs(noise=1), nnx.metrics.Average())
    return how(fn, *nodes), contents(nodes)


@functools.cache
def plain_outcome():
    return outcome_with_everything(eagerly, nnx.value_and_grad(loss_with_everything, has_aux=True))


@pytest.mark.parametrize("how", [eagerly, under_nnx_jit, under_jax_jit])
def test_all_but_the_gradient_is_as_after_value_and_grad(how):
    fn = sharpness_aware_value_and_grad(
        loss_with_everything, metric=ms.monge(), rho=RHO, has_aux=True, diagnostics=True
    )
    (value_and_aux, grads, diagnostics), state = outcome_with_everything(how, fn)
    (expected, plain_grads), expected_state = plain_outcome()
    chex.assert_trees_all_close(value_and_aux, expected, atol=1e-6)
    chex.assert_trees_all_close(state, expected_state, atol=1e-6)
    assert state[1]["noise"]["count"] == state[0]["dropout"]["rngs"]["count"] == 1
    assert state[2]["count"] == 1
    chex.assert_trees_all_equal_structs(grads, plain_grads)
    assert diagnostics.perturbation_norm > 0


def test_grad_fn_keeps_what_was_there_when_it_was_made():
    model, rngs, metric = Network(), nnx.Rngs(noise=1), nnx.metrics.Average()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    second = grad_fn(loss_with_everything, model, rngs, metric=metric, batch=BATCH, has_aux=True)
    _, grads = nnx.value_and_grad(loss_with_everything, has_aux=True)(model, rngs, metric, BATCH)
    after = contents((model, rngs, metric))
    for _ in range(2):
        chex.assert_trees_all_equal(second(params), nnx.to_pure_dict(grads))
    chex.assert_trees_all_equal(contents((model, rngs, metric)), after)
    second_later = grad_fn(loss_with_everything, model, rngs, metric, BATCH, has_aux=True)
    difference = jax.tree.map(jnp.subtract, second_later(params), second(params))
    assert optax.tree.norm(difference) > 1e-2


# What is differentiated, and by what


def sgd_step(model, tx, wrt, second, grads):
    """What an optimizer with learning rate one took away from the model's params."""
    before = nnx.to_pure_dict(nnx.state(model, wrt))
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(1.0)), wrt=wrt)
    optimizer.update(model, grads, grad_fn=second)
    return jax.tree.map(jnp.subtract, before, nnx.to_pure_dict(nnx.state(model, wrt)))


@pytest.mark.parametrize(
    ("make", "wrt"),
    [
        (Network, nnx.Param),
        (Network, KERNELS),
        (Network, nnx.Any(nnx.PathContains("bias"), nnx.PathContains("scale"))),
        (lambda: (Network(), Network(0.1)), nnx.PathContains("out")),
        (Network, nnx.LoRAParam),
    ],
    ids=["params", "all of", "any of", "tuple of models", "lora"],
)
def test_filters(make, wrt):
    def loss_fn(model, batch):
        models = model if isinstance(model, tuple) else (model,)
        prediction = sum(one(batch["x"]) for one in models)
        return jnp.mean((prediction - batch["y"]) ** 2)

    expected = by_hand(*as_function(make, loss_fn, wrt), BATCH)
    model = make()
    fn = sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO, wrt=wrt)
    _, grads = fn(model, BATCH)
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(grads)), expected, atol=1e-6)

    model = make()
    second = grad_fn(loss_fn, model, BATCH, wrt=wrt)
    _, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, BATCH)
    taken = sgd_step(model, ms.monge_sam(rho=RHO), wrt, second, grads)
    chex.assert_trees_all_close(taken, expected, atol=1e-6)
    unchanged = nnx.Not(nnx.Any(wrt, nnx.BatchStat, nnx.RngState))
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(model, unchanged)),
        nnx.to_pure_dict(nnx.state(make(), unchanged)),
    )


class Tied(nnx.Module):
    """One kernel under two names, and one layer in two places."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        self.second.kernel = self.first.kernel
        self.last = self.first

    def __call__(self, x):
        for layer in (self.first, self.second, self.last):
            x = jnp.tanh(layer(x))
        return x[:, :2]


@pytest.mark.parametrize(
    "make",
    [
        nnx.grad,
        nnx.value_and_grad,
        lambda loss: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param)),
        lambda loss: nnx.jit(nnx.grad(loss)),
        lambda loss: functools.partial(nnx.grad(loss), batch=BATCH),
        lambda loss: nnx.grad(loss_fn),
    ],
    ids=["grad", "value_and_grad", "of a state", "jit", "partial", "batch missing"],
)
@pytest.mark.parametrize("in_builder", [True, False], ids=["builder", "update"])
def test_a_gradient_of_the_model_in_place_of_one_of_the_params(make, in_builder):
    """An error that names `grad_fn`, which takes the batch as well."""

    def loss(model, batch=BATCH):
        return loss_fn(model, batch)

    model, wrong = Network(), make(loss)
    tx = optax.chain(ms.sam(wrong if in_builder else None, rho=RHO), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    second, grads = grad_fn(loss, model, BATCH), nnx.grad(loss)(model)
    with pytest.raises(Exception, match=r"monge_sam_jax\.nnx\.grad_fn"):
        optimizer.update(model, grads, **({} if in_builder else {"grad_fn": wrong}))
    optimizer.update(model, grads, grad_fn=second)


def test_a_gradient_by_nnx_of_a_function_of_the_params():
    """It needs no helper, and is not mistaken for one of a model."""
    graphdef, params = nnx.split(Plain(), nnx.Param)
    loss = lambda params: loss_fn_of_x(nnx.merge(graphdef, params))  # noqa: E731
    loss_fn_of_x = lambda model: jnp.mean((model(BATCH["x"]) - BATCH["y"]) ** 2)  # noqa: E731
    g = nnx.grad(loss)(params)
    tx = ms.monge_sam(nnx.grad(loss), rho=RHO)
    actual, _ = tx.update(g, tx.init(params), params)
    of_dict = as_function(Plain, lambda model, _: loss_fn_of_x(model))
    expected = by_hand(*of_dict, BATCH)
    chex.assert_trees_all_close(nnx.to_pure_dict(actual), expected, atol=1e-6)


def test_tied_params_are_perturbed_once():
    def loss(params, batch):
        x = batch["x"]
        for b in (params["a"], params["b"], params["a"]):
            x = jnp.tanh(x @ params["kernel"] + b.reshape(1, -1))
        return jnp.mean((x[:, :2] - batch["y"]) ** 2)

    model = Tied()
    kernel, a, b = (x[...] for x in (model.first.kernel, model.first.bias, model.second.bias))
    expected = by_hand(loss, {"kernel": kernel, "a": a, "b": b}, BATCH)
    second = grad_fn(loss_fn, model, BATCH)
    value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO)
    _, plain = nnx.value_and_grad(loss_fn)(model, BATCH)
    _, grads = value_and_grad(model, BATCH)
    for actual in (
        nnx.to_pure_dict(grads),
        sgd_step(model, ms.monge_sam(rho=RHO), nnx.Param, second, plain),
    ):
        np.testing.assert_allclose(actual["first"]["kernel"], expected["kernel"], atol=1e-6)
        np.testing.assert_allclose(actual["first"]["bias"], expected["a"], atol=1e-6)
        np.testing.assert_allclose(actual["second"]["bias"], expected["b"], atol=1e-6)


class Weights(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)


def test_complex_params():
    """The functional form returns what nnx.value_and_grad would, the other Optax's conjugate."""
    loss = lambda z: jnp.sum(jnp.abs(z - 1.0) ** 4)  # noqa: E731
    z = jnp.array([0.3 - 0.1j, 0.2 + 0.7j])
    expected = by_hand(loss, z)
    model, model_loss = Weights(z), lambda model: loss(model.w[...])
    fn = sharpness_aware_value_and_grad(model_loss, metric=ms.monge(), rho=RHO)
    np.testing.assert_allclose(fn(model)[1]["w"][...], expected, rtol=1e-5)
    second = grad_fn(model_loss, model)
    grads = jax.tree.map(jnp.conj, nnx.grad(model_loss)(model))
    taken = sgd_step(model, ms.monge_sam(rho=RHO), nnx.Param, second, grads)
    np.testing.assert_allclose(taken["w"], jnp.conj(expected), rtol=1e-5)


@pytest.mark.parametrize("widen", [False, True])
def test_bfloat16_params(widen):
    seen = []

    def loss(model):
        seen.append(model.w[...].dtype)
        return jnp.sum(jnp.square(model.w[...].astype(jnp.float32)))

    model = Weights(jnp.ones(1000, jnp.bfloat16))
    fn = sharpness_aware_value_and_grad(
        loss, metric=ms.euclidean(), rho=0.05, widen_params=widen, measure=True, diagnostics=True
    )
    _, grads, diagnostics = fn(model)
    assert seen == [jnp.bfloat16, jnp.float32 if widen else jnp.bfloat16]
    assert grads["w"][...].dtype == model.w[...].dtype == jnp.bfloat16
    assert float(diagnostics.realised_norm) == pytest.approx(0.05 if widen else 0.0, rel=1e-3)


@pytest.mark.parametrize(
    "mask",
    [
        lambda params: nnx.map_state(lambda path, _: path[-1] == "kernel", params),
        nnx.State(
            {
                "hidden": True,
                "norm": False,
                "out": {"bias": False, "kernel": True, "lora": False},
            }
        ),
    ],
    ids=["by path", "tree"],
)
def test_mask(mask):
    loss, params = as_function(Network)
    g = jax.grad(loss)(params, BATCH)
    g = jax.tree.map_with_path(lambda path, x: x if "kernel" in str(path) else 0 * x, g)
    expected = jax.grad(loss)(perturbed(params, g), BATCH)
    fn = sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO, mask=mask)
    chex.assert_trees_all_close(nnx.to_pure_dict(fn(Network(), BATCH)[1]), expected, atol=1e-6)
    model = Network()
    second = grad_fn(loss_fn, model, BATCH)
    _, grads = nnx.value_and_grad(loss_fn)(model, BATCH)
    taken = sgd_step(model, ms.monge_sam(rho=RHO, mask=mask), nnx.Param, second, grads)
    chex.assert_trees_all_close(taken, expected, atol=1e-6)


def doubling(fun, *, argnums, has_aux):
    """nnx.value_and_grad of twice the loss."""
    return nnx.value_and_grad(lambda *args: 2 * fun(*args), argnums=argnums, has_aux=has_aux)


@pytest.mark.parametrize(
    ("value_and_grad", "factor"),
    [(doubling, 2), (ms.loss_scaled(512.0, nnx.value_and_grad), 1)],
    ids=["doubled", "scaled"],
)
def test_both_passes_use_value_and_grad(value_and_grad, factor):
    loss, params = as_function(Network)
    expected = by_hand(lambda params: factor * loss(params, BATCH), params)
    fn = sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=RHO, value_and_grad=value_and_grad
    )
    grads = nnx.to_pure_dict(fn(Network(), BATCH)[1])
    chex.assert_trees_all_close(grads, expected, atol=1e-6)
    second = grad_fn(loss_fn, Network(), BATCH, value_and_grad=value_and_grad)
    expected = jax.tree.map(lambda x: factor * x, jax.grad(loss)(params, BATCH))
    chex.assert_trees_all_close(second(params), expected, atol=1e-6)


def test_period_diagnostics_and_plain_optax():
    """The second pass inside the conditional of period=2, at every other update."""
    loss, params = as_function(Network)
    g = jax.grad(loss)(params, BATCH)
    tx = ms.monge_sam(rho=RHO, period=2)

    @nnx.jit
    def updates(model, opt_state):
        second = grad_fn(loss_fn, model, BATCH)
        _, grads = nnx.value_and_grad(loss_fn)(model, BATCH)
        return tx.update(grads, opt_state, nnx.state(model, nnx.Param), grad_fn=second)

    opt_state = tx.init(nnx.state(Network(), nnx.Param))
    for expected in (by_hand(loss, params, BATCH), g, by_hand(loss, params, BATCH)):
        update, opt_state = updates(Network(), opt_state)
        chex.assert_trees_all_close(nnx.to_pure_dict(update), expected, atol=1e-6)
    optimizer = nnx.Optimizer(Network(), tx, wrt=nnx.Param)
    assert float(ms.get_diagnostics(optimizer.opt_state).grad_norm) == 0
    n = optax.tree.norm(g)
    assert ms.get_diagnostics(opt_state).perturbation_norm == pytest.approx(
        float(RHO / jnp.sqrt(1 + n**2)), rel=1e-5
    )


# Evaluated after one-pass steps


class Plain(nnx.Module):
    """Without running statistics, and without dropout that `eval` would have to turn off."""

    def __init__(self):
        self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


def unperturbed_by_hand(make, steps):
    """One-pass Monge SAM (eq. 9) with SGD: the params between the perturbations."""
    loss, theta = as_function(make)
    y = theta
    for batch in BATCHES[:steps]:
        g = jax.grad(loss)(y, batch)
        theta = jax.tree.map(lambda p, x: p - 0.1 * x, theta, g)
        n = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(g)))
        y = jax.tree.map(lambda p, x, n=n: p + RHO * x / (n * jnp.sqrt(1 + n**2)), theta, g)
    return theta, y


def one_pass_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


def one_pass(make, steps=5, donate=()):
    model = make()
    optimizer = nnx.Optimizer(model, ms.one_pass_sam(optax.sgd(0.1), rho=RHO), wrt=nnx.Param)
    step = nnx.jit(one_pass_step, donate_argnums=donate)
    for batch in BATCHES[:steps]:
        step(model, optimizer, batch)
    return model, optimizer, step


def without_dropout():
    return Network(rate=0.0)


def predicted_by_hand(theta, x):
    """Of `Network`, with the mean of all batches' statistics at theta, and without dropout."""
    theta, x = jax.tree.map(np.asarray, (theta, x))
    hidden = [np.asarray(batch["x"]) @ theta["hidden"]["kernel"] for batch in BATCHES]
    mean = np.mean([np.mean(h, axis=0) for h in hidden], axis=0)
    var = np.mean([np.var(h, axis=0) for h in hidden], axis=0)
    normed = (x @ theta["hidden"]["kernel"] - mean) / np.sqrt(var + 1e-5)
    out, norm = theta["out"], theta["norm"]
    kernel = out["kernel"] + out["lora"]["lora_a"] @ out["lora"]["lora_b"]
    return np.tanh(normed * norm["scale"] + norm["bias"]) @ kernel + out["bias"]


def test_evaluation_model_equals_one_by_hand():
    """Params, statistics and predictions; dropout is off although it is on in training."""
    theta, y = unperturbed_by_hand(without_dropout, 5)
    model, optimizer, _ = one_pass(without_dropout)
    model.dropout.rate = 0.9
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), y, atol=1e-5)
    before = contents((model, optimizer))
    evaluated = evaluation_model(
        model, optimizer, forward=lambda m, b: m(b["x"]), batches=iter(BATCHES)
    )
    actual = nnx.to_pure_dict(nnx.state(evaluated, nnx.Param))
    chex.assert_trees_all_close(actual, theta, atol=1e-5)
    expected = predicted_by_hand(theta, BATCH["x"])
    np.testing.assert_allclose(evaluated(BATCH["x"]), expected, atol=1e-4)
    chex.assert_trees_all_equal(contents((model, optimizer)), before)
    assert not model.dropout.deterministic
    assert not model.norm.use_running_average
    assert np.max(np.abs(model(BATCH["x"]) - expected)) > 0.1


@pytest.mark.parametrize("donate", [(), (0, 1)], ids=["", "donated"])
def test_training_goes_on_and_leaves_the_evaluation_model_alone(donate):
    """Also where the steps give away the arrays of model and optimizer."""
    options = {"forward": loss_fn, "batches": BATCHES}
    model, optimizer, step = one_pass(Network, donate=donate)
    evaluated = evaluation_model(model, optimizer, **options)
    losses = [float(step(model, optimizer, batch)) for batch in BATCHES[5:8]]
    # Not looked at before the steps: a view of an array would keep it from being given away.
    before = evaluation_model(*one_pass(Network)[:2], **options)
    chex.assert_trees_all_equal(contents(evaluated), contents(before))
    expected, expected_optimizer, step = one_pass(Network, donate=donate)
    expected_losses = [float(step(expected, expected_optimizer, b)) for b in BATCHES[5:8]]
    assert losses == expected_losses
    chex.assert_trees_all_equal(contents(model), contents(expected))


def test_a_model_without_statistics_needs_no_batches():
    theta, _ = unperturbed_by_hand(Plain, 3)
    model, optimizer, _ = one_pass(Plain, steps=3)
    for options in ({}, {"batches": BATCHES}):
        evaluated = evaluation_model(model, optimizer, **options)
        assert type(evaluated) is Plain
        actual = nnx.to_pure_dict(nnx.state(evaluated, nnx.Param))
        chex.assert_trees_all_close(actual, theta, atol=1e-6)


def test_the_optimizer_knows_which_params_are_its_own():
    """Of a tuple of models; the others' params are as they were."""

    def loss(models, batch):
        return jnp.mean((models[0](batch["x"]) + models[1](batch["x"]) - batch["y"]) ** 2)

    models, wrt = (Plain(), without_dropout()), nnx.All(nnx.Param, nnx.PathContains("layer"))
    tx = ms.one_pass_sam(optax.sgd(0.1), rho=RHO)
    optimizer = nnx.Optimizer(models, tx, wrt=wrt)
    kernel = models[0].layer.kernel[...]
    g = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(models, BATCH)
    optimizer.update(models, g)
    evaluated = evaluation_model(models, optimizer, statistics=False)
    step = jax.tree.leaves(g, is_leaf=lambda x: isinstance(x, nnx.Variable))
    step = next(x[...] for x in step if x[...].shape == (3, 2))
    np.testing.assert_allclose(evaluated[0].layer.kernel[...], kernel - 0.1 * step, rtol=1e-5)
    chex.assert_trees_all_equal(contents(evaluated[1]), contents(models[1]))
    assert evaluated[1].norm.use_running_average
    assert not models[1].norm.use_running_average


def test_statistics_without_batches_are_an_error_whose_advice_works():
    model, optimizer, _ = one_pass(Network)
    message = r"evaluation_model\(model, optimizer, batches=\.\.\.\), or statistics=False"
    with pytest.raises(ValueError, match=message):
        evaluation_model(model, optimizer)
    kept = evaluation_model(model, optimizer, statistics=False)
    np.testing.assert_array_equal(kept.norm.mean[...], model.norm.mean[...])
    with pytest.raises(ValueError, match="no batch"):
        evaluation_model(model, optimizer, batches=[])
    taken = evaluation_model(model, optimizer, forward=loss_fn, batches=BATCHES[:2])
    assert np.max(np.abs(taken.norm.mean[...] - model.norm.mean[...])) > 1e-3


def test_a_model_out_of_training_mode_is_an_error_whose_advice_works():
    model, optimizer, _ = one_pass(Network)
    options = {"forward": loss_fn, "batches": BATCHES[:2]}
    expected = contents(evaluation_model(model, optimizer, **options))
    model.eval()
    with pytest.raises(ValueError, match=r"model\.train\(\) in NNX"):
        evaluation_model(model, optimizer, **options)
    model.train()
    chex.assert_trees_all_equal(contents(evaluation_model(model, optimizer, **options)), expected)


def test_unperturbed_params_of_an_nnx_optimizer_as_it_stands():
    """What `refresh_batch_stats` says to do, on a copy."""
    model, optimizer, _ = one_pass(without_dropout)
    copy = nnx.clone(model)
    params = ms.unperturbed_params(optimizer.opt_state, nnx.state(copy, nnx.Param))
    chex.assert_trees_all_equal_structs(params, nnx.state(copy, nnx.Param))
    nnx.update(copy, params)
    refresh_batch_stats(loss_fn, copy, BATCHES)
    copy.eval()
    theta, _ = unperturbed_by_hand(without_dropout, 5)
    expected = predicted_by_hand(theta, BATCH["x"])
    np.testing.assert_allclose(copy(BATCH["x"]), expected, atol=1e-4)


# Saved and restored

INJECTED = optax.inject_hyperparams(ms.monge_sam, static_args=("grad_fn", "period"))
SCHEDULED = optax.chain(
    INJECTED(rho=optax.linear_schedule(0.0, RHO, 5), alpha=2.0),
    optax.adam(optax.cosine_decay_schedule(0.1, 8)),
)
scheduled_step = nnx.jit(step_of_a_chain)


def save_with_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)


def restore_with_orbax(path, state):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, state)


def save_with_flax(path, state):
    path.write_bytes(serialization.to_bytes(contents(state)))


def restore_with_flax(path, state):
    template = nnx.to_pure_dict(state)
    restored = serialization.from_bytes(template, path.read_bytes())
    return jax.tree.map(
        lambda x, new: jax.random.wrap_key_data(new) if is_key(x) else jnp.asarray(new),
        template,
        restored,
    )


@pytest.mark.parametrize(
    ("save", "restore"),
    [(save_with_orbax, restore_with_orbax), (save_with_flax, restore_with_flax)],
    ids=["orbax", "flax.serialization"],
)
def test_resumed_training_is_bit_equal(save, restore, tmp_path):
    """With running statistics, dropout, schedules and injected hyperparameters."""

    def new():
        model = Network()
        return model, nnx.Optimizer(model, SCHEDULED, wrt=nnx.Param)

    nodes = new()
    for batch in BATCHES[:3]:
        scheduled_step(*nodes, batch)
    save(tmp_path / "state", nnx.state(nodes))
    resumed = new()
    nnx.update(resumed, restore(tmp_path / "state", nnx.state(resumed)))
    for batch in BATCHES[3:6]:
        assert scheduled_step(*nodes, batch) == scheduled_step(*resumed, batch)
    chex.assert_trees_all_equal(contents(resumed), contents(nodes))
    assert contents(resumed)[1]["opt_state"][0]["hyperparams"]["rho"] == RHO


# Several devices

REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")


def four_devices():
    return Mesh(np.array(cpu_devices(4)), ("data",))


def under_jax_shard_map(fn, model):
    graphdef, state = nnx.split(model)
    specs = {"in_specs": (REPLICATED, SPLIT), "out_specs": REPLICATED}

    @jax.jit
    @functools.partial(jax.shard_map, mesh=four_devices(), **specs)
    def step(state, batch):
        model = merge(graphdef, state)
        return fn(model, batch), nnx.state(model)

    output, state = step(state, BATCH)
    nnx.update(model, state)
    return output


def under_nnx_shard_map(fn, model):
    specs = {"in_specs": (REPLICATED, SPLIT), "out_specs": REPLICATED}
    step = nnx.shard_map(fn, mesh=four_devices(), **specs)
    return nnx.jit(step)(model, BATCH)


def mapped(fn, model, transform):
    step = transform(fn, in_axes=(None, 0), out_axes=0, axis_name="data")
    shards = jax.tree.map(lambda x: x.reshape(4, 4, -1), BATCH)
    outputs = step(model, shards)
    chex.assert_trees_all_equal(outputs, jax.tree.map(lambda x: x[::-1], outputs))
    return jax.tree.map(lambda x: x[0], outputs)


WAYS = {
    "jax.shard_map": under_jax_shard_map,
    "nnx.shard_map": under_nnx_shard_map,
    "nnx.pmap": functools.partial(
        mapped, transform=lambda *a, **k: nnx.pmap(*a, devices=cpu_devices(4), **k)
    ),
    "nnx.vmap": functools.partial(mapped, transform=lambda *a, **k: nnx.jit(nnx.vmap(*a, **k))),
}


@pytest.mark.parametrize(
    "way",
    [way if way.startswith("nnx.") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS],
)
def test_devices_that_share_a_batch_equal_one(on_cpu, way):
    """BatchNorm gathers its statistics over the devices, so that they too equal one device's."""
    fn = sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO, axis_name="data")

    def step(model, batch):
        loss, grads = fn(model, batch)
        return jax.lax.pmean(loss, "data"), nnx.to_pure_dict(grads)

    one_device = Network(rate=0.0)
    expected_loss = nnx.value_and_grad(loss_fn)(one_device, BATCH)[0]
    model = Network(rate=0.0, axis_name="data")
    loss, grads = WAYS[way](step, model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    expected = by_hand(*as_function(functools.partial(Network, rate=0.0)), BATCH)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)
    chex.assert_trees_all_close(contents(model), contents(one_device), atol=1e-6)


def test_each_device_perturbs_for_itself(on_cpu):
    fn = sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=RHO, axis_name="data", sync_perturbation=False
    )
    grads = under_nnx_shard_map(lambda *args: nnx.to_pure_dict(fn(*args)[1]), Tied())
    loss, params = as_function(Tied)
    shards = jax.tree.map(lambda x: x.reshape(4, 4, -1), BATCH)
    each = jax.jit(jax.vmap(functools.partial(by_hand, loss), in_axes=(None, 0)))(params, shards)
    expected = jax.tree.map(lambda x: jnp.mean(x, axis=0), each)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)


def averaged_loss(model, batch):
    return jax.lax.pmean(loss_fn(model, batch), "data")


def test_a_loss_that_is_averaged_already_needs_no_axis_name(on_cpu):
    fn = sharpness_aware_value_and_grad(averaged_loss, metric=ms.monge(), rho=RHO)
    grads = under_nnx_shard_map(lambda *args: nnx.to_pure_dict(fn(*args)[1]), Tied())
    chex.assert_trees_all_close(grads, by_hand(*as_function(Tied), BATCH), atol=1e-6)


def test_a_loss_that_is_averaged_already_with_axis_name(on_cpu):
    fn = sharpness_aware_value_and_grad(averaged_loss, metric=ms.monge(), rho=RHO, axis_name="data")
    with pytest.raises(ValueError, match="leave axis_name out"):
        under_nnx_shard_map(lambda *args: fn(*args)[0], Tied())


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"rho": optax.constant_schedule(0.1)}, TypeError, "a schedule needs"),
        ({"metric": ms.monge}, TypeError, "metric must be a Metric"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        sharpness_aware_value_and_grad(loss_fn, **{"metric": ms.monge(), "rho": 0.1, **options})


@pytest.mark.parametrize(
    "call",
    [
        lambda: sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO, wrt=nnx.Cache)(
            Network(), BATCH
        ),
        lambda: grad_fn(loss_fn, Network(), BATCH, wrt=nnx.Cache),
    ],
    ids=["value_and_grad", "grad_fn"],
)
def test_nothing_matches_wrt(call):
    message = (
        "no state that matches wrt=.*Cache.* types BatchStat, LoRAParam, Param, RngCount, RngKey"
    )
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("optimizer_wrt", "wrt", "message"),
    [
        (KERNELS, nnx.Param, "lack .'norm'..'bias'.; give nnx.Optimizer and grad_fn the same wrt"),
        (nnx.Param, KERNELS, "have .'norm'..'bias'."),
    ],
)
def test_grad_fn_of_other_params(optimizer_wrt, wrt, message):
    model = Network()
    second = grad_fn(loss_fn, model, BATCH, wrt=wrt)
    _, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer_wrt))(model, BATCH)
    with pytest.raises(ValueError, match=message):
        sgd_step(model, ms.monge_sam(rho=RHO), optimizer_wrt, second, grads)
