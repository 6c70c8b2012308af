"""Micro-batches: m-sharpness, accumulation before the perturbation, and Optax's MultiSteps."""

import ast
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import CASES, dense_perturbation, example_batch, flat, relative_error
from trajectories import cpu_devices

import monge_sam_jax as ms

HOWS = ["scan", "vmap", "unroll"]
RHO = 0.1


def params_in(dtype):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(3, 2)), dtype), "scale": jnp.asarray(1.5, dtype)}


def loss_fn(params, batch):
    return jnp.mean((params["scale"] * jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)


PARAMS = params_in(jnp.float32)
value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
monge_value_and_grad = ms.sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=RHO)


@pytest.fixture(params=["scan", "vmap", pytest.param("unroll", marks=pytest.mark.slow)])
def how(request):
    return request.param


def pieces(tree, k, axis=0):
    """Sample j goes to micro-batch j modulo k."""

    def piece(i):
        return lambda x: np.moveaxis(np.moveaxis(np.asarray(x), axis, 0)[i::k], 0, axis)

    return [jax.tree.map(piece(i), tree) for i in range(k)]


def mean(trees):
    """Of equal trees, in float64."""
    return jax.tree.map(lambda *xs: np.mean([np.asarray(x, float) for x in xs], axis=0), *trees)


def perturbed(params, grads):
    """theta + delta* of eq. 9, in NumPy."""
    n = np.linalg.norm(flat(grads).astype(float))
    factor = RHO / (n * np.sqrt(1 + n**2))
    return jax.tree.map(
        lambda p, g: (np.asarray(p) + factor * np.asarray(g)).astype(p.dtype), params, grads
    )


def gradient(params, batch):
    return value_and_grad(params, batch)[1]


# --- each micro-batch perturbs for itself ---


@pytest.mark.parametrize(
    ("name", "scale", "how"),
    [(name, 1.0, "scan") for name in CASES]
    + [("monge_sam", scale, how) for scale in (0.1, 30.0) for how in HOWS],
)
def test_mean_of_the_gradients_at_each_micro_batches_own_perturbation(x64, name, scale, how):
    """The formula by hand: value, gradient and diagnostics."""
    case, batch, params = CASES[name], example_batch(16), params_in(jnp.float64)
    loss = lambda p, b: scale * loss_fn(p, b)  # noqa: E731
    theta, unravel = ravel_pytree(params)
    at_vector = jax.jit(jax.value_and_grad(lambda t, b: loss(unravel(t), b)))
    by_hand = []
    for piece in pieces(batch, 4):
        value, g = at_vector(theta, piece)
        matrix = case.matrix(np.asarray(theta), np.asarray(g), **case.options)
        delta = dense_perturbation(matrix, np.asarray(g), RHO)
        by_hand.append((value, at_vector(theta + delta, piece)[1], np.linalg.norm(delta)))
    expected_value, expected_grads, expected_norm = mean(by_hand)
    fn = ms.sharpness_aware_value_and_grad(
        loss, metric=case.metric(**case.options), rho=RHO, diagnostics=True
    )
    value, grads, diagnostics = jax.jit(ms.m_sharpness(fn, 4, how=how))(params, batch)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-9)
    assert relative_error(flat(grads), expected_grads) < 1e-9
    assert float(diagnostics.perturbation_norm) == pytest.approx(float(expected_norm), rel=1e-6)


def m_sharpness_by_hand(batch, k):
    by_hand = []
    for piece in pieces(batch, k):
        value, first = value_and_grad(PARAMS, piece)
        by_hand.append((value, gradient(perturbed(PARAMS, first), piece)))
    return mean(by_hand)


def test_in_float32(how):
    batch = example_batch(16)
    value, grads = jax.jit(ms.m_sharpness(monge_value_and_grad, 4, how=how))(PARAMS, batch)
    expected_value, expected_grads = m_sharpness_by_hand(batch, 4)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    assert relative_error(flat(grads), flat(expected_grads)) < 1e-6


def noisy_loss(params, x, y, key):
    """Samples along the last axis of x and the first of y; the noise is that of the key."""
    noise = 0.1 * jax.random.normal(key, params["w"].shape)
    prediction = (params["w"] + noise) @ x
    return jnp.mean((jnp.tanh(prediction.T) - y) ** 2)


@pytest.mark.parametrize(("how", "by_name"), [*((how, False) for how in HOWS), ("scan", True)])
def test_axes_of_the_arguments(how, by_name):
    """One axis for each argument; keyword arguments along the first; each its number in the key."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}
    x, y = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    key = jax.random.key(0)
    loss = (lambda p, x, key, y: noisy_loss(p, x, y, key)) if by_name else noisy_loss
    fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=RHO)
    if by_name:
        fn = jax.jit(ms.m_sharpness(fn, 2, axis=(-1, None), how=how))
        _, grads = fn(params, x, key, y=y)
    else:
        fn = jax.jit(ms.m_sharpness(fn, 2, axis=[1, 0, None], how=how))
        _, grads = fn(params, x, y, key)
    noisy_grad = jax.jit(jax.grad(noisy_loss))
    by_hand = []
    for i, some in enumerate(zip(pieces(x, 2, axis=1), pieces(y, 2), strict=True)):
        inputs = (*some, jax.random.fold_in(key, i))
        nearby = perturbed(params, noisy_grad(params, *inputs))
        by_hand.append(noisy_grad(nearby, *inputs))
    assert relative_error(flat(grads), flat(mean(by_hand))) < 1e-6


def dropout_loss(params, x, keys):
    """A mask of each of two layers, by a stack of keys."""
    for i in range(2):
        kept = jax.random.bernoulli(keys["layers"][i], 0.5, x.shape)
        x = jnp.tanh(jnp.where(kept, 2 * x, 0.0) @ params["w"])
    return jnp.mean(x**2)


@pytest.mark.parametrize(
    "together",
    [
        pytest.param(True, id="accumulated", marks=pytest.mark.slow),
        pytest.param(False, id="each its own"),
    ],
)
def test_each_micro_batch_has_a_dropout_mask_of_its_own_in_both_passes(how, together):
    """Unless the key is closed over, or is a raw one, which looks like data."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    layers = jax.random.split(jax.random.key(1), 2)
    gradient = jax.jit(jax.grad(dropout_loss))
    options = {"axis": (0, None), "how": how}

    def build(loss):
        if together:
            differentiate = ms.accumulated(4, **options)
            return ms.sharpness_aware_value_and_grad(
                loss, metric=ms.monge(), rho=RHO, value_and_grad=differentiate
            )
        fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=RHO)
        return ms.m_sharpness(fn, 4, **options)

    def by_hand(number):
        keys = [
            {"layers": jnp.stack([jax.random.fold_in(key, number(i)) for key in layers])}
            if number
            else {"layers": layers}
            for i in range(4)
        ]
        inputs = list(zip(pieces(x, 4), keys, strict=True))
        first = [gradient(params, *some) for some in inputs]
        if together:
            first = [mean(first)] * 4
        nearby = [perturbed(params, g) for g in first]
        return mean([gradient(p, *some) for p, some in zip(nearby, inputs, strict=True)])

    actual = jax.jit(build(dropout_loss))(params, x, {"layers": layers})[1]
    own, shared = by_hand(lambda i: i), by_hand(None)
    assert relative_error(flat(actual), flat(own)) < 1e-6
    assert relative_error(flat(own), flat(shared)) > 1e-2
    closed = build(lambda p, x, _: dropout_loss(p, x, {"layers": layers}))
    raw = build(lambda p, x, data: dropout_loss(p, x, {"layers": jax.random.wrap_key_data(data)}))
    for fn, given in ((closed, None), (raw, jax.random.key_data(layers))):
        actual = jax.jit(fn)(params, x, given)[1]
        assert relative_error(flat(actual), flat(shared)) < 1e-6


def test_a_key_for_each_sample_is_cut_with_the_samples(how):
    keys = jax.random.split(jax.random.key(0), 8)
    fn = ms.m_sharpness(lambda p, keys: p * jax.vmap(jax.random.normal)(keys)[0], 4, how=how)
    expected = np.mean([jax.random.normal(key) for key in keys[:4]])
    assert float(fn(jnp.ones(()), keys)) == pytest.approx(float(expected), rel=1e-6)


def test_one_axis_for_all_arguments(how):
    """Also by name, for trees of NumPy arrays, beside an argument without arrays."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(3, 8)), {"a": rng.normal(size=(2, 8)), "b": None}

    def fn(params, x, nothing, weights):
        assert nothing is None
        assert weights["b"] is None
        return params @ x * weights["a"][0]

    fn = jax.jit(ms.m_sharpness(fn, 4, axis=1, how=how))
    actual = fn(jnp.ones(3), x, None, weights=weights)
    by_hand = mean(pieces(np.sum(x, axis=0) * weights["a"][0], 4))
    np.testing.assert_allclose(actual, by_hand, rtol=1e-5)


def test_auxiliary_outputs_and_diagnostics_are_averaged(how):
    """Statistics of the first pass in their dtype; integers, bools and numbers as floats."""
    batch = example_batch(16)

    def loss(params, batch):
        x = batch["x"]
        aux = {
            "statistics": params["scale"] * jnp.mean(x, axis=0),
            "half": jnp.mean(x).astype(jnp.bfloat16),
            "correct": jnp.sum(x > 0),
            "bools": x[0] > 0,
            "number": 3,
            "none": None,
        }
        return loss_fn(params, batch), aux

    fn = ms.sharpness_aware_value_and_grad(
        loss, metric=ms.monge(), rho=RHO, has_aux=True, diagnostics=True
    )
    (value, aux), _, diagnostics = jax.jit(ms.m_sharpness(fn, 4, how=how))(PARAMS, batch)
    fn = jax.jit(fn)
    parts = [fn(PARAMS, piece) for piece in pieces(batch, 4)]
    assert float(value) == pytest.approx(float(loss_fn(PARAMS, batch)), rel=1e-6)
    np.testing.assert_allclose(aux["statistics"], 1.5 * np.mean(batch["x"], axis=0), rtol=1e-5)
    assert float(aux["correct"]) == np.sum(np.asarray(batch["x"]) > 0) / 4
    assert aux["half"].dtype == jnp.bfloat16
    for name in ("correct", "bools", "number"):
        assert aux[name].dtype == jnp.float32
    chex.assert_trees_all_close(aux, mean([part[0][1] for part in parts]), rtol=5e-3)
    chex.assert_trees_all_close(diagnostics, mean([part[2] for part in parts]), rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "samples"),
    [
        (jnp.bfloat16, [256.0, *[1.0] * 8]),  # in bfloat16, 256 + 1 = 256
        (jnp.float16, [3e4, 2e4, 3e4]),  # in float16, the sum is infinite
        (jnp.complex64, [1.0, 2.0j, 4.0, 1.0]),
    ],
)
def test_accumulated_in_float32_and_returned_in_the_dtype_of_the_gradient(how, dtype, samples):
    of_a_sample = lambda params, batch: (batch[0].real, {"w": params * batch[0]})  # noqa: E731
    fn = jax.jit(ms.m_sharpness(of_a_sample, len(samples), how=how))
    value, grads = fn(jnp.ones((), dtype), jnp.asarray(samples, dtype))
    exact = np.mean(samples)
    np.testing.assert_array_equal(grads["w"], jnp.asarray(exact, dtype))
    np.testing.assert_array_equal(value, jnp.asarray(exact.real, value.dtype))
    assert grads["w"].dtype == dtype
    assert value.dtype == jnp.zeros((), dtype).real.dtype


def test_compiles_once_with_an_optimizer(how):
    traces = []

    def counted_loss(params, batch):
        traces.append(None)
        return loss_fn(params, batch)

    fn = ms.sharpness_aware_value_and_grad(counted_loss, metric=ms.monge(), rho=RHO)
    fn, tx = ms.m_sharpness(fn, 4, how=how), optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch):
        value, grads = fn(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, values, counts = PARAMS, [], []
    state = tx.init(params)
    for seed in range(12):
        params, state, value = step(params, state, example_batch(16, seed % 2))
        values.append(float(value))
        counts.append(len(traces))
    assert len(set(counts)) == 1
    assert values[-1] < values[1]


def each_perturbs(loss, k, how):
    fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=RHO)
    return ms.m_sharpness(fn, k, how=how)


def accumulates(loss, k, how):
    return ms.sharpness_aware_value_and_grad(
        loss, metric=ms.monge(), rho=RHO, value_and_grad=ms.accumulated(k, how=how)
    )


@pytest.mark.parametrize("build", [each_perturbs, accumulates])
def test_the_program_of_a_loop_does_not_grow(build, how):
    """Calls of the loss in Python, and the size of the program, for 2 and for 8 micro-batches."""
    calls, sizes, programs = [], [], []
    for k in (2, 8):
        count = []

        def counted_loss(params, batch, count=count):
            count.append(None)
            return loss_fn(params, batch)

        # A micro-batch is of two samples, whose program is the same for every k.
        jaxpr = jax.make_jaxpr(build(counted_loss, k, how))(PARAMS, example_batch(2 * k))
        programs.append(str(jaxpr))
        calls.append(len(count))
        sizes.append(str(jaxpr).count(" = "))
    has_loop = ["scan[" in program or "while[" in program for program in programs]
    assert has_loop == [how == "scan"] * 2
    if how == "unroll":
        assert calls == [2 * 2, 2 * 8]
        assert sizes[1] > 2 * sizes[0]
    else:
        assert calls[0] == calls[1] <= 4
        assert sizes[0] == sizes[1]


def test_unrolled_micro_batches_are_added_one_by_one():
    """No list of gradients: an eager loop holds the sum, one of them, and the params."""
    alive = []

    def fn(params, batch):
        alive.append(sum(x.shape == params.shape for x in jax.live_arrays()))
        return params * batch[0]

    ms.m_sharpness(fn, 16, how="unroll")(jnp.ones(1237), jnp.arange(16.0))
    assert max(alive) <= 5


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("how", "axis_name"), [*((how, None) for how in HOWS), ("scan", "data")])
def test_inside_shard_map(on_cpu, how, check_vma, axis_name):
    """Eight devices, two micro-batches each; outputs that vary over devices, and that do not."""
    mesh = jax.sharding.Mesh(np.array(cpu_devices(8)), ("data",))
    batch = example_batch(64)

    def loss(params, batch):
        aux = {"constant": jnp.ones(3), "statistics": jnp.mean(batch["x"], axis=0)}
        return loss_fn(params, batch), aux

    fn = ms.sharpness_aware_value_and_grad(
        loss, metric=ms.monge(), rho=RHO, has_aux=True, axis_name=axis_name, sync_perturbation=False
    )

    def local(params, batch):
        if check_vma and hasattr(jax.lax, "pcast"):
            params = jax.lax.pcast(params, "data", to="varying")
        elif check_vma:
            params = jax.lax.pvary(params, "data")
        (value, aux), grads = ms.m_sharpness(fn, 2, how=how)(params, batch)
        constant = aux.pop("constant")
        value, aux = jax.lax.pmean((value, aux), "data")
        return value, constant, aux, grads if axis_name else jax.lax.pmean(grads, "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    value, constant, aux, grads = jax.jit(mapped)(PARAMS, batch)
    shards = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], batch) for i in range(8)]
    _, expected = mean([m_sharpness_by_hand(shard, 2) for shard in shards])
    assert relative_error(flat(grads), flat(expected)) < 1e-6
    assert float(value) == pytest.approx(float(loss_fn(PARAMS, batch)), rel=1e-6)
    np.testing.assert_allclose(aux["statistics"], np.mean(batch["x"], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(constant, np.ones(3))


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_batches_stay_where_they_are(on_cpu, how, explicit):
    """Under jit over eight devices: equal to one device, and nobody gathers the batch."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = np.array(cpu_devices(8))
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(kind,))
    fn = jax.jit(ms.m_sharpness(monge_value_and_grad, 4, how=how))
    batch = example_batch(64)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        placed = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        split = jax.device_put(batch, NamedSharding(mesh, P("data")))
        compiled = fn.lower(placed, split).compile()
        value, grads = jax.device_get(compiled(placed, split))
    expected_value, expected_grads = m_sharpness_by_hand(batch, 4)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    assert relative_error(flat(grads), flat(expected_grads)) < 1e-6
    program = compiled.as_text()
    assert "all-gather" not in program
    assert "collective-permute" not in program


def test_derivatives_of_the_mean(x64, how):
    """Second derivatives of the loss, against finite differences."""
    params, batch = params_in(jnp.float64), example_batch(4)

    @jax.jit
    @jax.value_and_grad
    def outcome(at):
        rho, scale = at
        fn = ms.sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=rho)
        value, grads = ms.m_sharpness(fn, 2, how=how)({**params, "scale": scale}, batch)
        return value + jnp.sum(jnp.sin(grads["w"]))

    at, h = np.array([0.1, 1.5]), 1e-6
    numeric = [(outcome(at + h * e)[0] - outcome(at - h * e)[0]) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(outcome(at)[1], numeric, rtol=1e-6)


@pytest.mark.parametrize("build", [functools.partial(ms.m_sharpness, print), ms.accumulated])
@pytest.mark.parametrize(
    ("k", "options", "error", "message"),
    [
        (2.0, {}, TypeError, "must be an integer, got 2.0"),
        (True, {}, TypeError, "must be an integer, got True"),
        (0, {}, ValueError, "at least one, got 0"),
        (2, {"how": "loop"}, ValueError, "one of 'scan', 'vmap', 'unroll', got 'loop'"),
        (2, {"axis": None}, TypeError, "axis must be an integer.* got None"),
        (2, {"axis": (0, "x")}, TypeError, r"axis must be an integer.* got \(0, 'x'\)"),
    ],
)
def test_bad_arguments(build, k, options, error, message):
    with pytest.raises(error, match=message):
        build(k, **options)


@pytest.mark.parametrize(
    ("axis", "args", "kwargs", "message"),
    [
        (0, [np.ones(6)], {}, r"shape \(6,\) cannot be cut into 4 micro-batches along axis 0"),
        (0, [{"x": np.ones((6, 2))}], {}, r"args\[0\]\['x'\] of shape \(6, 2\)"),
        (1, [np.ones(8)], {}, r"shape \(8,\) has no axis 1"),
        (-2, [np.ones(8)], {}, r"shape \(8,\) has no axis -2"),
        (0, [np.ones(8), 1.0], {}, r"shape \(\) has no axis 0.*None in its place"),
        (0, [np.ones(8)], {"train": True}, r"shape \(\) has no axis 0.*by position"),
        ((0,), [np.ones(8), 1.0], {}, r"each of the 2 positional .* got \(0,\)"),
        (0, [], {}, "no array to cut"),
        ((None,), [np.ones(8)], {}, "no array to cut"),
    ],
)
def test_what_cannot_be_cut(how, axis, args, kwargs, message):
    fn = ms.m_sharpness(lambda *args, **kwargs: args[0], 4, axis=axis, how=how)
    with pytest.raises(ValueError, match=message):
        fn(jnp.ones(2), *args, **kwargs)


def sum_of_means(params, *args, **kwargs):
    return params * sum(jnp.mean(jnp.asarray(x, float)) for x in jax.tree.leaves((args, kwargs)))


def by_shards(axis):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    return ms.per_shard(jax.value_and_grad(sum_of_means), "data", axis=axis, mesh=mesh)


DIVIDERS = {
    "m_sharpness": (
        "axis",
        lambda axis: ms.m_sharpness(jax.value_and_grad(sum_of_means), 2, axis=axis),
    ),
    "accumulated": ("axis", lambda axis: ms.accumulated(2, axis=axis)(sum_of_means)),
    "per_shard": ("axis", by_shards),
    "ascent_batch_fraction": (
        "batch_axis",
        lambda axis: ms.sharpness_aware_value_and_grad(
            sum_of_means,
            metric=ms.euclidean(),
            rho=0.0,
            ascent_batch_fraction=0.5,
            batch_axis=axis,
        ),
    ),
}
ONES, RAW_KEY, FEW = np.ones(4, np.float32), jax.random.PRNGKey(3), np.arange(3.0)
OF_FOUR = np.array([0, 1, 2, 3], np.uint32)
# What was passed, what is wrong with it, and what the message says to pass in its place.
ADVICE = {
    "number": ((ONES, 2.0), {}, "no axis 0", (ONES, 2.0), (0, None)),
    "number between": ((ONES, 2.0, ONES), {}, "no axis 0", (ONES, 2.0, ONES), (0, None, 0)),
    "number by name": ((ONES,), {"t": 2.0}, "no axis 0", (ONES, 2.0), (0, None)),
    "number beside": (({"x": ONES, "t": 2.0},), {}, "no axis 0", ({"x": ONES}, 2.0), (0, None)),
    "two numbers": (
        (ONES, {"t": 2.0, "s": 1.0}),
        {},
        "no axis",
        (ONES, {"t": 2.0, "s": 1.0}),
        (0, None),
    ),
    "key": ((RAW_KEY, ONES), {}, "a random key", (RAW_KEY, ONES), (None, 0)),
    "rbg key": ((ONES, OF_FOUR), {}, "a random key", (ONES, OF_FOUR), (0, None)),
    "key by name": ((ONES,), {"key": RAW_KEY}, "a random key", (ONES, RAW_KEY), (0, None)),
    "key beside": (({"x": ONES, "key": RAW_KEY},), {}, "key", ({"x": ONES}, RAW_KEY), (0, None)),
    "fewer": (
        (ONES, FEW),
        {},
        r"args\[0\] of shape \(4,\) has 4 .*args\[1\] of shape \(3,\) has 3",
        (ONES, FEW),
        (0, None),
    ),
    "fewer first": ((FEW, ONES), {}, "has 3 .* has 4", (FEW, ONES), (None, 0)),
    "fewer by name": ((ONES,), {"t": FEW}, r"kwargs\['t'\] .*has 3", (ONES, FEW), (0, None)),
    "fewer beside": (({"x": ONES, "z": FEW},), {}, "has 3", ({"x": ONES}, FEW), (0, None)),
    "one axis": ((ONES, ONES), {}, "got [(]0,[)]", (ONES, ONES), (0, 0)),
}


@pytest.mark.parametrize("case", ADVICE)
@pytest.mark.parametrize("divider", DIVIDERS)
def test_what_cannot_be_divided_is_an_error_whose_advice_works(divider, case):
    option, build = DIVIDERS[divider]
    args, kwargs, message, advised_args, advised_axis = ADVICE[case]
    with pytest.raises(ValueError, match=message) as error:
        jax.jit(build((0,) if case == "one axis" else 0))(jnp.array(2.0), *args, **kwargs)
    advised = re.findall(rf"[ (]{option}=(\(.*?\))", str(error.value))
    assert advised_axis in map(ast.literal_eval, advised)
    value, grads = jax.jit(build(advised_axis))(jnp.array(2.0), *advised_args)
    means = sum(np.mean(np.asarray(x, float)) for x in jax.tree.leaves((args, kwargs)))
    assert float(value) == pytest.approx(2 * means)
    assert float(grads) == pytest.approx(means)


@pytest.mark.parametrize("divider", DIVIDERS)
def test_samples_that_look_like_a_key_may_be_cast(divider):
    """As the message says."""
    _, build = DIVIDERS[divider]
    labels = np.array([5, 5], np.uint32)
    with pytest.raises(ValueError, match="cast them to another type of integer, such as int32"):
        build(0)(jnp.array(2.0), labels)
    assert float(build(0)(jnp.array(2.0), labels.astype(np.int32))[0]) == 10.0


# --- one perturbation, from the accumulated gradient ---

BATCHES = [example_batch(16, seed) for seed in range(6)]
TAIL = optax.sgd(0.05, momentum=0.9)


def functional_step(differentiate):
    fn = ms.sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=RHO, value_and_grad=differentiate
    )

    def step(params, state, batch):
        _, grads = fn(params, batch)
        updates, state = TAIL.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return TAIL, step


def chain_step(differentiate):
    grad_fn = lambda params, batch: differentiate(loss_fn)(params, batch)[1]  # noqa: E731
    return step_of(optax.chain(ms.monge_sam(grad_fn, rho=RHO), TAIL), grad_fn)


def step_of(tx, grad_fn):
    def step(params, state, batch):
        updates, state = tx.update(grad_fn(params, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return tx, step


def train(tx, step, batches):
    params, state, step = PARAMS, tx.init(PARAMS), jax.jit(step)
    for batch in batches:
        params, state = step(params, state, batch)
    return params


@functools.cache
def accumulated_by_hand():
    """A loop: accumulate, perturb by eq. 9, accumulate again; SGD with momentum."""

    def accumulate(params, batch):
        return mean([gradient(params, piece) for piece in pieces(batch, 4)])

    params, velocity = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for batch in BATCHES:
        second = accumulate(perturbed(params, accumulate(params, batch)), batch)
        velocity = add(second, velocity, 0.9)
        params = add(params, velocity, -0.05)
    return params


def add(a, b, factor):
    return jax.tree.map(
        lambda x, y: (np.asarray(x, float) + factor * np.asarray(y, float)).astype(np.float32), a, b
    )


@functools.cache
def whole_batches():
    return train(*functional_step(jax.value_and_grad), BATCHES)


@pytest.mark.parametrize(
    ("entry_point", "how"), [*((functional_step, how) for how in HOWS), (chain_step, "scan")]
)
def test_accumulate_then_perturb(entry_point, how):
    actual = train(*entry_point(ms.accumulated(4, how=how)), BATCHES)
    chex.assert_trees_all_close(actual, accumulated_by_hand(), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(actual, whole_batches(), rtol=1e-6, atol=1e-6)


def test_accumulation_is_not_m_sharpness():
    each_its_own = jax.jit(ms.m_sharpness(monge_value_and_grad, 4))(PARAMS, BATCHES[0])[1]
    together = jax.jit(monge_value_and_grad)(PARAMS, BATCHES[0])[1]
    assert relative_error(flat(each_its_own), flat(together)) > 1e-3


def test_accumulated_is_jax_value_and_grad(how):
    """With auxiliary output and keyword arguments; axes as for m_sharpness."""

    def loss(params, factor, batch):
        return factor * loss_fn(params, batch), jnp.mean(batch["x"], axis=0)

    differentiate = ms.accumulated(4, axis=(None,), how=how)
    actual = jax.jit(differentiate(loss, has_aux=True))(PARAMS, 3.0, batch=BATCHES[0])
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, 3.0, batch=BATCHES[0])
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="first argument, got argnums=1"):
        differentiate(loss, argnums=1)


# --- Optax's MultiSteps ---

MICRO_BATCHES = [example_batch(4, seed) for seed in range(9)]
ADAM = optax.adam(1e-2)


def every_third(second_gradients):
    """Adam by hand: a step every three micro-batches, all gradients at the params of its start."""
    m, v = jax.tree.map(np.zeros_like, (PARAMS, PARAMS))
    params = PARAMS
    for t in range(1, 4):
        group = MICRO_BATCHES[3 * t - 3 : 3 * t]
        g = mean(second_gradients(params, group))
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, g)
        update = jax.tree.map(
            lambda m, v, t=t: (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), m, v
        )
        params = add(params, update, -1e-2)
    return params


def each_its_own_perturbation(params, group):
    return [gradient(perturbed(params, gradient(params, batch)), batch) for batch in group]


def one_perturbation(params, group):
    nearby = perturbed(params, mean([gradient(params, batch) for batch in group]))
    return [gradient(nearby, batch) for batch in group]


def one_perturbation_and_the_last_micro_batch(params, group):
    return one_perturbation(params, group)[-1:]


def test_multisteps_after_the_transformation_is_m_sharpness():
    inside = optax.MultiSteps(ADAM, 3).gradient_transformation()
    tx = optax.chain(ms.monge_sam(gradient, rho=RHO), inside)
    actual = train(*step_of(tx, gradient), MICRO_BATCHES)
    by_hand = every_third(each_its_own_perturbation)
    chex.assert_trees_all_close(actual, by_hand, rtol=1e-5, atol=1e-6)


def test_multisteps_around_the_transformation_is_refused():
    """It would be neither m-sharpness nor accumulation before the perturbation."""
    tx = optax.MultiSteps(optax.chain(ms.monge_sam(gradient, rho=RHO), ADAM), 3)
    with pytest.raises(ValueError, match=r"MultiSteps is around.*the second that of the last one"):
        train(*step_of(tx, gradient), MICRO_BATCHES)
    as_a_link = optax.chain(tx.gradient_transformation())
    with pytest.raises(ValueError, match=r"MultiSteps is around"):
        train(*step_of(as_a_link, gradient), MICRO_BATCHES)


def test_without_a_radius_update_returns_what_it_was_given_where_the_two_gradients_agree():
    """A check that sees a sum for a mean, and a loss scale left in."""
    sharp = ms.monge_sam(gradient, rho=0.0)
    batch = MICRO_BATCHES[0]
    first = gradient(PARAMS, batch)
    checked, _ = jax.jit(sharp.update)(first, sharp.init(PARAMS), PARAMS, batch=batch)
    chex.assert_trees_all_equal(checked, first)
    scaled = jax.tree.map(lambda g: 512 * g, first)
    checked, _ = jax.jit(sharp.update)(scaled, sharp.init(PARAMS), PARAMS, batch=batch)
    assert relative_error(flat(checked), flat(scaled)) > 0.9
