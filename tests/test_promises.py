"""What Optax's own tests ask of any optimizer, and debugging flags: one suite over every form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import flat

import monge_sam_jax as ms

RHO, LEARNING_RATE, DECAY = 0.05, 0.1, 0.5


def start(dtype=jnp.float32):
    return {"v": jnp.asarray(2.0, dtype), "w": jnp.array([0.5, -1.5], dtype)}


def loss(params):
    """Sum of |p - 1|^2 / 2 + |p|^4 / 40: every leaf for itself."""
    squares = jax.tree.map(lambda p: (p * jnp.conj(p)).real, params)
    distances = jax.tree.map(lambda p: ((p - 1) * jnp.conj(p - 1)).real, params)
    terms = jax.tree.map(lambda d, s: jnp.sum(d / 2 + s * s / 40), distances, squares)
    return sum(jax.tree.leaves(terms))


def gradient(params):
    """Of `loss`, in Optax's convention."""
    return jax.tree.map(lambda p: p - 1 + p * (p * jnp.conj(p)).real / 10, params)


def base(learning_rate=LEARNING_RATE, **options):
    return optax.sgd(learning_rate, momentum=DECAY, **options)


# --- the forms ---


def by_ndim(params):
    return jax.tree.map(lambda p: "matrices" if np.ndim(p) else "scalars", params)


def groups(factor=0.5):
    parts = {"matrices": ms.monge(), "scalars": ms.scaled(ms.adaptive(0.1), factor)}
    return ms.grouped(parts, by_ndim)


def averaged_squares():
    """A metric with a state: G from the gradients so far."""

    def ascent(grads, params, state):
        squares = jax.tree.map(lambda s, g: s / 2 + jnp.abs(g) ** 2 / 2, state, grads)
        unit, _ = ms.euclidean().ascent(grads, params, ())
        weighted = jax.tree.map(lambda x, s: x / (1 + s).astype(x.dtype), unit.tangent, squares)
        found, _ = ms.euclidean().ascent(weighted, params, ())
        return found, squares

    def init(params):
        real = lambda p: jnp.promote_types(jnp.float32, jnp.finfo(p.dtype).dtype)  # noqa: E731
        return jax.tree.map(lambda p: jnp.zeros(p.shape, real(p)), params)

    return ms.Metric(init, ascent)


METRICS = {
    "euclidean": ms.euclidean(),
    "monge": ms.monge(),
    "adaptive": ms.adaptive(),
    "fisher": ms.diagonal_fisher(),
    "monge adaptive": ms.monge(ms.adaptive(0.1)),
    "scaled": ms.scaled(ms.monge(), 2.0),
    "grouped": groups(),
    "with a state": averaged_squares(),
    "layerwise": ms.layerwise(ms.adaptive(0.1)),
    "layerwise with a state": ms.monge(ms.layerwise(averaged_squares())),
    "supremum": ms.supremum(),
    "spectral": ms.spectral(),
    "averaged with a state": ms.averaged_monge(3, base=ms.adaptive(0.1)),
    "preconditioned": ms.preconditioned(optax.identity()),
    "preconditioned with a state": ms.preconditioned(optax.scale_by_rms(eps=0.1)),
}


def two_pass(builder, **own):
    def build(optimizer, grad_fn=gradient, **options):
        return optax.chain(builder(grad_fn, **{"rho": RHO, **own, **options}), optimizer)

    return build


def one_pass(direction, metric="monge"):
    def build(optimizer, grad_fn=None, **options):
        options = {"metric": METRICS[metric], "rho": RHO, "direction": direction, **options}
        return ms.one_pass_sam(optimizer, **options)

    return build


def functional(optimizer, grad_fn=None, rho=RHO, mask=None):
    """`sharpness_aware_value_and_grad` before a plain optimizer, in the form of one."""
    value_and_grad = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=rho, mask=mask)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params, **extra):
        del updates
        grads = jax.tree.map(jnp.conj, value_and_grad(params)[1])
        return optimizer.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


TWO_PASS = {
    "sam": two_pass(ms.sam),
    "monge_sam": two_pass(ms.monge_sam),
    "adaptive_sam": two_pass(ms.adaptive_sam),
    "fisher_sam": two_pass(ms.fisher_sam),
    "monge adaptive": two_pass(ms.sharpness_aware, metric=METRICS["monge adaptive"]),
    "measured": two_pass(ms.monge_sam, measure=True),
    "scaled": two_pass(ms.sharpness_aware, metric=METRICS["scaled"]),
    "grouped": two_pass(ms.sharpness_aware, metric=METRICS["grouped"]),
    "with a state": two_pass(ms.sharpness_aware, metric=METRICS["with a state"]),
    **{
        name: two_pass(ms.sharpness_aware, metric=METRICS[name])
        for name in METRICS
        if name == "spectral" or name.endswith(" with a state")
    },
}
ONE_PASS = {
    "one pass, gradient": one_pass("gradient"),
    "one pass, momentum": one_pass("momentum"),
    "one pass, momentum, adaptive": one_pass("momentum", "adaptive"),
    "one pass, gradient, grouped": one_pass("gradient", "grouped"),
    "one pass, momentum, with a state": one_pass("momentum", "with a state"),
    "one pass, gradient, averaged with a state": one_pass("gradient", "averaged with a state"),
}
FORMS = {**TWO_PASS, **ONE_PASS, "functional": functional}
# The others are made of parts that are in these too.
QUICK_FORMS = (
    *("grouped", "with a state", "spectral"),
    *("one pass, gradient", "one pass, momentum, with a state"),
    "functional",
)
EACH_FORM = [
    name if name in QUICK_FORMS else pytest.param(name, marks=pytest.mark.slow) for name in FORMS
]


@pytest.fixture(params=EACH_FORM)
def form(request):
    return FORMS[request.param]


def step(tx, params, state, **extra):
    updates, state = tx.update(gradient(params), state, params, **extra)
    return optax.apply_updates(params, updates), state


def run(tx, steps, params=None, state=None, **extra):
    params = start() if params is None else params
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, state = step(tx, params, state, **extra)
    return params, state


def trained(state, params):
    """What the base optimizer trains."""
    holds = optax.tree.get_all_with_path(state, "OnePassState")
    return ms.unperturbed_params(state, params) if holds else params


# --- types, compilation ---


def describe(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree))


DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_do_not_change(x64, form, dtype):
    tx = form(base())
    params = start(dtype)
    state = tx.init(params)

    def both(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return updates, optax.apply_updates(params, updates), state

    updates, moved, after = jax.eval_shape(both, params, state)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(
        lambda p: (p.shape, p.dtype), params
    )
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    assert types((moved, after)) == describe((params, state))


def test_compiled_once_and_as_without_compilation(form):
    """Over steps and beside extra arguments that nobody takes."""
    tx = form(base())
    compiled = jax.jit(functools.partial(step, tx))
    params = start()
    state = tx.init(params)
    for i in range(4):
        params, state = compiled(params, state, unexpected=jnp.asarray(i))
    assert compiled._cache_size() == 1
    expected = run(tx, 4)
    chex.assert_trees_all_close((params, state), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(flat(params) - flat(run(base(), 4)[0])).max() > 1e-3  # it does perturb


def test_extra_arguments_are_forwarded(form):
    got = []

    def update(updates, state, params=None, **extra):
        got.append(extra)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda params: (), update)
    with_recorder = run(form(optax.chain(base(), recorder)), 2, value=1.0, unexpected=None)
    chex.assert_trees_all_equal(with_recorder[0], run(form(base()), 2)[0])
    assert got == [{"value": 1.0, "unexpected": None}] * 2


def test_init_on_shapes(form):
    """On `ShapeDtypeStruct`, and under `eval_shape`, as on arrays."""
    tx = form(base())
    params = start(jnp.bfloat16)
    shapes = jax.eval_shape(lambda: params)
    expected = describe(tx.init(params))
    assert describe(tx.init(shapes)) == expected
    assert jax.eval_shape(tx.init, shapes) == jax.eval_shape(lambda: tx.init(params))


@pytest.mark.parametrize("value", [2.0, 0.5 - 1.5j])
def test_python_numbers_as_params(form, value):
    """As `jax.value_and_grad` takes them: eagerly and compiled."""
    numbers = {"v": value, "w": 0.5 * value}
    arrays = jax.tree.map(jnp.asarray, numbers)
    tx = form(base())
    expected = run(tx, 2, arrays)
    actual = run(tx, 2, numbers)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    chex.assert_trees_all_equal_dtypes(actual[0], arrays)
    if value == 2.0:
        compiled = jax.jit(functools.partial(step, tx))(numbers, tx.init(numbers))
        chex.assert_trees_all_close(compiled, run(tx, 1, arrays), rtol=1e-5)


# --- map_params ---

map_params = optax.tree.map_params
# MaskedNode where one pass keeps nothing of a leaf, None where a metric does not.
is_left_out = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731

STATES = {
    "plain": (base(), {}),
    "momentum in bfloat16": (base(accumulator_dtype=jnp.bfloat16), {}),
    "adam in bfloat16": (optax.adam(0.1, mu_dtype=jnp.bfloat16), {}),
    "mask": (base(), {"mask": {"v": False, "w": True}}),
    "mask of a function": (base(), {"mask": lambda p: jax.tree.map(lambda x: np.ndim(x) > 0, p)}),
}


@pytest.mark.parametrize("states", STATES)
def test_map_params(form, states):
    optimizer, options = STATES[states]
    tx = form(optimizer, **options)
    _, state = run(tx, 1)
    chex.assert_trees_all_equal(map_params(tx, lambda x: x, state), state)

    # By a tree of labels: all leaves that are like the params, and no others, get their own.
    labelled = map_params(
        tx,
        lambda leaf, label: leaf if is_left_out(leaf) else (leaf.shape, label),
        state,
        {"v": "v", "w": "w"},
        transform_non_params=lambda leaf: None,
        is_leaf=is_left_out,
    )
    found = jax.tree.leaves(labelled, is_leaf=lambda x: isinstance(x, tuple) and x[1:] in LABELS)
    found = [x for x in found if not is_left_out(x)]
    like_params = {(): "v", (2,): "w"}
    expected = [x for x in jax.tree.leaves(state) if x.shape or state_of_v(state, x)]
    assert sorted(found) == sorted((x.shape, like_params[x.shape]) for x in expected)


LABELS = [("v",), ("w",)]


def state_of_v(state, leaf):
    """Whether a scalar of the state is v's in a tree of the form of the params."""
    trees = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict) and "v" in x)
    return any(isinstance(t, dict) and t["v"] is leaf for t in trees)


# --- options ---


@pytest.mark.parametrize("name", [*TWO_PASS, *ONE_PASS])
def test_schedule_of_rho(name):
    """As constants, one after the other; one pass perturbs for the update to come."""
    schedule = optax.linear_schedule(0.3, 0.1, 3)
    actual = run(FORMS[name](base(), rho=schedule), 3)
    expected = (start(), None)
    for t in range(3):
        rho = float(schedule(t + (name in ONE_PASS)))
        expected = run(FORMS[name](base(), rho=rho), 1, *expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def some(params):
    return jax.tree.map(lambda p: np.ndim(p) > 0, params)


INJECTED = {
    "sam": (lambda **k: optax.inject_hyperparams(ms.sam)(gradient, **k), {}),
    "monge_sam": (
        lambda **k: optax.inject_hyperparams(ms.monge_sam)(gradient, **k),
        {"alpha": 2.0},
    ),
    "adaptive_sam": (
        lambda **k: optax.inject_hyperparams(ms.adaptive_sam)(gradient, **k),
        {"eta": 0.1},
    ),
    "fisher_sam": (
        lambda **k: optax.inject_hyperparams(ms.fisher_sam)(gradient, **k),
        {"eta": 1.0},
    ),
    "sharpness_aware": (
        lambda **k: optax.inject_hyperparams(ms.sharpness_aware)(gradient, metric=groups(), **k),
        {},
    ),
    "factory": (
        lambda **k: optax.inject_hyperparams(
            lambda rho, factor: ms.sharpness_aware(gradient, metric=groups(factor), rho=rho)
        )(**k),
        {"factor": 0.5},
    ),
    "one pass": (
        lambda **k: optax.inject_hyperparams(ms.one_pass_sam)(base(), direction="momentum", **k),
        {},
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams(name):
    """Functions pass as they are; every number may change between two steps."""
    build, numbers = INJECTED[name]
    numbers = {"rho": 0.1, **numbers}
    options = {} if name == "factory" else {"mask": some}
    tx = build(**numbers, **options)
    params = start()
    with jax.disable_jit():  # a period that is injected takes jax.lax.cond
        _, state = tx.update(gradient(params), tx.init(params), params)
        for changed in numbers:
            hyperparams = {**state.hyperparams, changed: jnp.asarray(0.7)}
            grads = gradient(params)
            actual, _ = tx.update(grads, state._replace(hyperparams=hyperparams), params)
            other = build(**{**numbers, changed: 0.7}, **options)
            plain = other.init(params)._replace(inner_state=state.inner_state)
            expected, _ = other.update(grads, plain, params)
            chex.assert_trees_all_close(actual, expected, rtol=1e-6)
            before, _ = tx.update(grads, state, params)
            assert np.abs(flat(actual) - flat(before)).max() > 1e-4


def test_learning_rate_of_zero(form):
    params, state = run(form(base(0.0)), 5)
    chex.assert_trees_all_close(trained(state, params), start(), rtol=2e-7)


def test_leaves_that_are_left_out(form):
    """Masked ones go with the base optimizer, None stays None; the others are as if alone."""
    alone = run(form(base()), 3, {"w": start()["w"]})[0]
    params, state = run(form(base()), 3, {"v": None, "w": start()["w"]})
    chex.assert_trees_all_equal(params, {"v": None, **alone})

    params, state = run(form(base(), mask={"v": False, "w": True}), 3)
    chex.assert_trees_all_close(params["w"], alone["w"], rtol=1e-6)
    plain = run(base(), 3)[0]
    chex.assert_trees_all_equal(params["v"], plain["v"])
    chex.assert_trees_all_equal(trained(state, params)["v"], plain["v"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_accumulation(form, dtype):
    """Micro-batches change nothing before the last, in the dtype of the params."""
    multisteps = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()  # noqa: E731
    params = start(dtype)
    txs = [form(multisteps(base()))]
    if isinstance(form(base()).init(params), ms.one_pass.OnePassState):
        txs = [multisteps(form(base()))]
    with jax.disable_jit():
        for tx in txs:
            state = tx.init(params)
            updates, state = tx.update(gradient(params), state, params)
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
            updates, _ = tx.update(gradient(params), state, params)
            chex.assert_trees_all_equal_dtypes(updates, params)
            # The second micro-batch is the first again; a metric with a state has seen it twice.
            if form not in (FORMS[name] for name in FORMS if name.endswith("state")):
                alone = form(base())
                expected, _ = alone.update(gradient(params), alone.init(params), params)
                rtol = 1e-6 if dtype == jnp.float32 else 2e-2
                chex.assert_trees_all_close(updates, expected, rtol=rtol)


def test_convergence(form):
    """In a scan; to the minimum of the loss, where p - 1 + p^3 / 10 = 0."""
    tx = form(base(), rho=1e-3)
    state = tx.init(start())
    train = lambda carry, _: (step(tx, *carry), None)  # noqa: E731
    (params, state), _ = jax.lax.scan(train, (start(), state), length=200)
    minimum = np.roots([0.1, 0, 1, -1])
    minimum = minimum[np.isreal(minimum)].real
    np.testing.assert_allclose(flat(trained(state, params)), minimum[0], rtol=3e-3)


def test_ensemble(form):
    """Under `vmap`, and the unperturbed params of its state without."""
    tx = form(base())
    members = [jax.tree.map(lambda p: s * p, start()) for s in (0.5, 1.0, -2.0)]  # noqa: B023
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    params = stack(*members)
    state = jax.vmap(tx.init)(params)
    for _ in range(2):
        params, state = jax.vmap(functools.partial(step, tx))(params, state)
    alone = [run(tx, 2, member) for member in members]
    chex.assert_trees_all_close((params, state), stack(*alone), rtol=1e-5, atol=1e-7)
    theta = stack(*(trained(s, p) for p, s in alone))
    chex.assert_trees_all_close(trained(state, params), theta, rtol=1e-5, atol=1e-7)


# --- states of others ---


@pytest.mark.parametrize("name", [*TWO_PASS, *ONE_PASS])
def test_the_state_of_a_plain_optimizer(name):
    params = start()
    other = optax.adam(0.1).init(params)
    tx = FORMS[name](base())
    other = other if name in ONE_PASS else (other[0], *tx.init(params)[1:])
    with pytest.raises(TypeError, match=r"ScaleByAdamState.*in place of its state.*tx.init\(p"):
        tx.update(gradient(params), other, params)
    tx.update(gradient(params), tx.init(params), params)


CHANGES = {
    "direction": (one_pass("momentum"), one_pass("gradient"), {}, {}),
    "other direction": (one_pass("gradient"), one_pass("momentum"), {}, {}),
    "mask": (one_pass("gradient"), one_pass("gradient"), {"mask": {"v": False, "w": True}}, {}),
    "kind of metric": (one_pass("momentum"), one_pass("momentum", "adaptive"), {}, {}),
    "state of the metric": (one_pass("gradient"), one_pass("gradient", "with a state"), {}, {}),
    "groups": (one_pass("gradient"), one_pass("gradient", "grouped"), {}, {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_state_of_another_one_pass(name):
    """The advice: start at the unperturbed params, with the base optimizer's state."""
    old, new, old_options, new_options = CHANGES[name]
    params, state = run(old(base(), **old_options), 3)
    tx = new(base(), **new_options)
    with pytest.raises(
        ValueError, match=r"another mask, direction, ascent or kind of metric.*base_state"
    ):
        tx.update(gradient(params), state, params)
    theta = ms.unperturbed_params(state, params)
    fresh = tx.init(theta)._replace(base_state=state.base_state)
    y, after = step(tx, theta, fresh)
    # The base optimizer goes on from theta, where nothing is perturbed yet.
    expected, _ = step(base(), theta, state.base_state)
    chex.assert_trees_all_close(ms.unperturbed_params(after, y), expected, rtol=1e-6)
    assert np.abs(flat(y) - flat(expected)).max() > 1e-3


@pytest.mark.parametrize(("old", "new"), [("sam", "grouped"), ("sam", "with a state")])
def test_the_state_of_another_metric(old, new):
    """Of a two-pass transformation, whose state holds nothing but the metric's."""
    params = start()
    state = FORMS[old](base()).init(params)
    with pytest.raises((TypeError, ValueError), match=r"metric.*tx.init\(params\)"):
        FORMS[new](base()).update(gradient(params), state, params)


# --- from the smallest numbers to the largest ---

SIZES = [1.2e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30, 3e38]
DIRECTION = {"v": -0.5, "w": np.array([1.0, 0.25])}


@pytest.fixture(scope="module")
def forgetful():
    """Divisions compiled for an eager `vmap` no longer look at the flags."""
    jax.clear_caches()


@pytest.fixture
def debugging(forgetful):
    flags = ("jax_debug_nans", "jax_debug_infs")
    before = [getattr(jax.config, flag) for flag in flags]
    try:
        for flag in flags:
            jax.config.update(flag, True)
        # That the flags are looked at; after `vmap` it takes a first error for that.
        large, small = jnp.float32(1e30), jnp.float32(1e-30)
        for overflow in (lambda: large / small, lambda: large * large):
            with pytest.raises(FloatingPointError):
                overflow()
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            jax.config.update(flag, value)


LIFTED = ("monge", "monge adaptive", "scaled", "averaged with a state")  # of the first gradient


def exact(metric, g, p):
    """The perturbation in NumPy, at float64, of leaves laid end to end: v, then w."""
    if metric == "grouped":
        size = np.abs(p[:1]) + 0.1
        v = 0.5 * size * np.sign(g[:1])
        n = np.linalg.norm(g[1:])
        return RHO * np.concatenate([v, g[1:] / n / np.hypot(1, n)])
    if metric == "supremum":
        return RHO * np.sign(g)
    if metric in ("layerwise", "spectral"):
        size = np.abs(p) + 0.1 if metric == "layerwise" else np.ones(3)
        norms = [np.linalg.norm((size * g)[part]) for part in (slice(0, 1), slice(1, 3))]
        return RHO * size**2 * g / np.repeat(np.maximum(norms, 1e-300), (1, 2))
    root = {  # of the inverse of the metric, which is diagonal
        "adaptive": np.abs(p) + 0.01,
        "monge adaptive": np.abs(p) + 0.1,
        "averaged with a state": np.abs(p) + 0.1,
        "fisher": 1 / np.hypot(1, g),
    }.get(metric, np.ones(3))
    n = np.linalg.norm(root * g)
    lift = np.hypot(1, n) if metric in LIFTED else 1
    return (2 if metric == "scaled" else 1) * RHO * root * (root * g / n) / lift


# The metric with a state is not written for it, and the functional form takes no gradient.
NOT_OF_ANY_SIZE = (
    "with a state",
    "one pass, momentum, with a state",
    "layerwise with a state",
    "preconditioned with a state",
    "functional",
)


@pytest.mark.parametrize(
    "size_of_params", [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0)), 1e38]
)
@pytest.mark.parametrize("metric", [name for name in METRICS if name not in NOT_OF_ANY_SIZE])
def test_perturbations_of_any_gradient_at_any_params(debugging, metric, size_of_params):
    """Eagerly, where every intermediate result is looked at."""
    p = np.float32(size_of_params) * np.array([1.0, -1.0, 0.5], np.float32)
    params = {"v": jnp.asarray(p[0]), "w": jnp.asarray(p[1:])}
    for size in SIZES:
        g = np.concatenate([[DIRECTION["v"]], DIRECTION["w"]]) * size
        g = g.astype(np.float32)
        g = np.where(np.abs(g) < np.finfo(np.float32).tiny, 0, g)  # subnormals count as zero
        grads = {"v": jnp.asarray(g[0]), "w": jnp.asarray(g[1:])}
        if (
            metric in ("monge adaptive", "averaged with a state")
            and np.linalg.norm((np.abs(p) + 0.1) * g.astype(float)) > 3e38
        ):
            continue  # the dual norm is out of range, and so counts as its largest number
        delta = flat(ms.worst_case_perturbation(METRICS[metric], grads, params, RHO))
        expected = exact(metric, g.astype(float), p.astype(float))
        # What is subnormal beside the largest entry may count as zero.
        atol = 1.2e-38 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(delta, expected, rtol=3e-6, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_FORMS else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMS
        if name not in NOT_OF_ANY_SIZE
    ],
)
def test_steps_of_any_gradient_at_any_params(debugging, name):
    """Of a base optimizer with momentum that stands still, and a second gradient of order one."""
    ones = functools.partial(jax.tree.map, jnp.ones_like)
    for size_of_params in (0.0, 1.0, 1e38):
        params = jax.tree.map(lambda p: size_of_params * jnp.sign(p), start())  # noqa: B023
        for size in SIZES:
            grads = jax.tree.map(lambda d: jnp.asarray(size * d, jnp.float32), DIRECTION)  # noqa: B023
            tx = FORMS[name](optax.chain(optax.trace(DECAY), optax.set_to_zero()), ones)
            updates, state = tx.update(grads, tx.init(params), params)
            y = optax.apply_updates(params, updates)
            chex.assert_tree_all_finite((y, state))
            theta = trained(state, y)
            chex.assert_trees_all_close(theta, params, rtol=1e-6, atol=1e-6)
