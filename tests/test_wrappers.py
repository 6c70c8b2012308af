"""Optax's wrappers around a sharpness-aware optimizer, and after it.

At rho = 0 against the same wrapper around the base optimizer, elsewhere against loops in NumPy.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import dense_perturbation, flat, monge_matrix

import monge_sam_jax as ms

CURVATURES = np.array([1.0, 4.0], np.float32)
BATCHES = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
LEARNING_RATE, DECAY, RHO = 0.02, 0.9, 0.1


def start(dtype=jnp.float32):
    return {"v": jnp.array([0.5, 1.5], dtype), "w": jnp.array([1.0, -2.0], dtype)}


def gradient(params, batch):
    """Of sum of CURVATURES / 2 |w - batch|^2 + |v|^4 / 4, in Optax's convention if complex."""
    v, w = params["v"], params["w"]
    return {"v": v * jnp.abs(v) ** 2, "w": CURVATURES * (w - batch)}


def at_first_batch(params):
    return gradient(params, BATCHES[0])


def slope(x, batch):
    """`gradient` in NumPy, of v and w laid end to end."""
    return np.concatenate([x[:2] ** 3, CURVATURES * (x[2:] - batch)])


def base():
    return optax.sgd(LEARNING_RATE, momentum=DECAY)


# --- the wrappers ---


class Wrapper(NamedTuple):
    """A wrapper of Optax, and what it wants.

    Attributes:
      wrap: optimizer -> optimizer.
      forwards: whether it forwards extra arguments.
      two, one: what the error says around a two-pass builder, or around `one_pass_sam`.
      conditional: whether it uses `jax.lax.cond`, which compiles at each call outside jit.
      dtype: of the params.
      pair: whether its params are lookahead's.
      examples: whether it takes the gradients of examples.
    """

    wrap: Callable
    forwards: bool = True
    two: str | None = None
    one: str | None = None
    conditional: bool = False
    dtype: type = jnp.float32
    pair: bool = False
    examples: bool = False


def multisteps(every, **options):
    return lambda tx: optax.MultiSteps(tx, every, **options).gradient_transformation()


def injected(inject):
    def wrap(tx):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return inject(lambda factor: optax.chain(optax.scale(1), tx))(factor=1.0)

    return wrap


def monitored(tx):
    """What the monitor measures in place of the update."""
    monitor = optax.monitor({"update": tx})

    def update(updates, state, params=None, **extra):
        _, state = monitor.update(updates, state, params, **extra)
        return state.measurements["update"], state

    return optax.GradientTransformationExtraArgs(monitor.init, update)


def process(accumulation_steps):
    """Optax's `process` of gradients that are not of single examples."""
    forwarding = optax.with_extra_args_support
    aggregating = optax.experimental.aggregating
    accumulate = aggregating.accumulate_avg_updates(accumulation_steps)
    return lambda tx: aggregating.process(
        forwarding(optax.identity()), forwarding(accumulate), optax.with_extra_args_support(tx)
    )


LABELS = {"v": "a", "w": "b"}
CHOSEN, OTHER = {"v": False, "w": True}, {"v": True, "w": False}
MASKED = r"at params\['v'\] is a MaskedNode.*Place it outside, first in the chain"
FOLLOWED = r"after one_pass_sam in optax.chain.*put it inside, one_pass_sam\(optax.chain\(...\)\)"
NO_PARAMS = "needs the params"
AVERAGED = r"optax.MultiSteps.*first, optax.chain\(monge_sam\(grad_fn\), optax.MultiSteps"
early = lambda step: step < 3  # noqa: E731

WRAPPERS = {
    "with_extra_args_support": Wrapper(optax.with_extra_args_support),
    "chain": Wrapper(lambda tx: optax.chain(optax.chain(tx))),
    "chain, first": Wrapper(lambda tx: optax.chain(tx, optax.scale(0.5)), one=FOLLOWED),
    "named_chain": Wrapper(lambda tx: optax.named_chain(("all", tx))),
    "named_chain, first": Wrapper(
        lambda tx: optax.named_chain(("tx", tx), ("half", optax.scale(0.5))), one=FOLLOWED
    ),
    "partition": Wrapper(
        lambda tx: optax.partition({"a": optax.sgd(0.1), "b": tx}, LABELS), two=MASKED
    ),
    "partition, all in one": Wrapper(lambda tx: optax.partition({"a": tx}, "a")),
    "masked": Wrapper(
        lambda tx: optax.chain(optax.masked(tx, CHOSEN), optax.masked(optax.scale(-0.1), OTHER)),
        two=MASKED,
    ),
    "masked, all": Wrapper(lambda tx: optax.masked(tx, True)),
    "selective_transform": Wrapper(
        lambda tx: optax.transforms.selective_transform(tx, freeze_mask={"v": True, "w": False}),
        two=MASKED,
    ),
    "apply_if_finite": Wrapper(lambda tx: optax.apply_if_finite(tx, 2), conditional=True),
    "conditionally_transform": Wrapper(
        lambda tx: optax.conditionally_transform(tx, early), conditional=True
    ),
    "conditionally_mask": Wrapper(lambda tx: optax.conditionally_mask(tx, early), conditional=True),
    "flatten": Wrapper(
        optax.flatten, two=r"optax.flatten.*first, optax.chain\(monge_sam\(grad_fn\), optax.flatten"
    ),
    "lookahead": Wrapper(lambda tx: optax.lookahead(tx, 2, 0.5), forwards=False, pair=True),
    "lookahead, reset": Wrapper(
        lambda tx: optax.lookahead(tx, 2, 0.5, reset_state=True), forwards=False, pair=True
    ),
    "MultiSteps, each": Wrapper(multisteps(1), conditional=True),
    "MultiSteps, each, guarded": Wrapper(
        multisteps(1, should_skip_update_fn=optax.skip_not_finite), conditional=True
    ),
    "MultiSteps": Wrapper(multisteps(2), two=AVERAGED, conditional=True),
    "MultiSteps, more and more": Wrapper(
        multisteps(lambda step: 1 if step < 2 else 2), two=AVERAGED, conditional=True
    ),
    "inject_hyperparams": Wrapper(injected(optax.inject_hyperparams)),
    "inject_stateful_hyperparams": Wrapper(injected(optax.inject_stateful_hyperparams)),
    "split_real_and_imaginary": Wrapper(
        optax.contrib.split_real_and_imaginary,
        forwards=False,
        two=r"split_real_and_imaginary.*first, optax.chain\(monge_sam\(grad_fn\), optax.contrib.sp",
        dtype=jnp.complex64,
    ),
    "split_real_and_imaginary, real": Wrapper(
        optax.contrib.split_real_and_imaginary, forwards=False
    ),
    "mechanize": Wrapper(lambda tx: optax.contrib.mechanize(tx, s_init=0.1)),
    "schedule_free": Wrapper(lambda tx: optax.contrib.schedule_free(tx, LEARNING_RATE)),
}
if hasattr(optax, "monitor"):
    WRAPPERS["monitor"] = Wrapper(monitored)
if hasattr(optax.contrib, "galore"):
    WRAPPERS["galore"] = Wrapper(
        lambda tx: optax.contrib.galore(0.1, 1, base_optimizer=tx),
        forwards=False,
        two=NO_PARAMS,
        one=NO_PARAMS,
    )
    WRAPPERS["scale_by_galore"] = Wrapper(
        lambda tx: optax.contrib.scale_by_galore(1, base_optimizer=tx),
        forwards=False,
        two=NO_PARAMS,
        one=NO_PARAMS,
    )
if hasattr(optax, "experimental"):
    WRAPPERS["process"] = Wrapper(
        lambda tx: optax.experimental.aggregating.process(
            optax.identity(), optax.experimental.aggregating.average_per_element_updates(), tx
        ),
        forwards=False,
        conditional=True,
        examples=True,
    )
    WRAPPERS["process, accumulated"] = Wrapper(
        process(2), two=r"first, optax.chain\(monge_sam\(grad_fn\)", conditional=True
    )
    WRAPPERS["add_mean_variance_to_opt"] = Wrapper(
        optax.experimental.aggregating.add_mean_variance_to_opt,
        forwards=False,
        conditional=True,
        examples=True,
    )

# What takes a transformation that is no optimizer: a line search, a Hessian. And optax.contrib.sam,
# which perturbs itself, see below.
OTHERS = {"lbfgs", "sophia", "sam"}


def public_functions(module, seen):
    """Functions and classes of a package and its public modules."""
    seen.add(module)
    for name, x in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(x, types.ModuleType):
            if x.__name__.startswith("optax.") and "._src" not in x.__name__ and x not in seen:
                yield from public_functions(x, seen)
        elif callable(x):
            yield x


def takes_an_optimizer(function):
    names = {"inner", "inner_factory", "opt", "optimizer", "base_optimizer", "transforms", "tx"}
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any("GradientTransformation" in str(p.annotation) or p.name in names for p in parameters)


def test_all_wrappers_of_optax_are_here():
    found = {f.__name__ for f in public_functions(optax, set()) if takes_an_optimizer(f)}
    assert len(found) > 15
    assert found <= {name.partition(",")[0] for name in WRAPPERS} | OTHERS


# --- at rho = 0 ---


def two_pass(builder):
    return lambda optimizer, grad_fn: optax.chain(builder(grad_fn, rho=0.0), optimizer)


def one_pass(direction, rho=0.0):
    return lambda optimizer, grad_fn=None: ms.one_pass_sam(
        optimizer, metric=ms.euclidean(), rho=rho, direction=direction
    )


FORMS = {
    "sam": two_pass(ms.sam),
    "monge_sam": two_pass(ms.monge_sam),
    "adaptive_sam": two_pass(ms.adaptive_sam),
    "fisher_sam": two_pass(ms.fisher_sam),
    "one pass, gradient": one_pass("gradient"),
    "one pass, momentum": one_pass("momentum"),
}


def train(tx, wrapper, compile_with=lambda f: f):
    """Params after six updates."""

    def step(params, state, batch):
        grads = gradient(params.fast if wrapper.pair else params, batch)
        if wrapper.examples:
            grads = jax.tree.map(lambda g: jnp.stack([0.5 * g, 1.5 * g]), grads)
        extra = {"batch": batch} if wrapper.forwards else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    step = compile_with(step)
    params = start(wrapper.dtype)
    if wrapper.pair:
        params = optax.LookaheadParams.init_synced(params)
    state = tx.init(params)
    for batch in BATCHES:
        params, state = step(params, state, batch if wrapper.forwards else BATCHES[0])
    return params


@functools.cache
def around_the_base_optimizer(name):
    wrapper = WRAPPERS[name]
    with jax.disable_jit(wrapper.conditional):
        return train(wrapper.wrap(base()), wrapper)


QUICK_FORMS = ("monge_sam", "one pass, momentum")


@pytest.mark.parametrize(
    "form", [x if x in QUICK_FORMS else pytest.param(x, marks=pytest.mark.slow) for x in FORMS]
)
@pytest.mark.parametrize("name", WRAPPERS)
def test_at_rho_zero_it_is_the_wrapper_around_the_base_optimizer(name, form):
    """Bit for bit, operation by operation; or an error, whose advice is to change places."""
    wrapper, sharp = WRAPPERS[name], FORMS[form]
    grad_fn = gradient if wrapper.forwards else at_first_batch
    expected = around_the_base_optimizer(name)
    refused = wrapper.one if form.startswith("one pass") else wrapper.two
    with jax.disable_jit(wrapper.conditional):
        around = wrapper.wrap(sharp(base(), grad_fn))
        if refused:
            with pytest.raises(ValueError, match=refused):
                train(around, wrapper)
            around = sharp(wrapper.wrap(base()), grad_fn)
        chex.assert_trees_all_equal(train(around, wrapper), expected)
    chex.assert_tree_all_finite(expected)


@pytest.mark.parametrize("form", ["monge_sam", "one pass, momentum"])
@pytest.mark.parametrize(
    "name", ["apply_if_finite", "conditionally_mask", "MultiSteps, each", "schedule_free"]
)
def test_at_rho_zero_when_compiled(name, form):
    wrapper = WRAPPERS[name]
    actual = train(wrapper.wrap(FORMS[form](base(), gradient)), wrapper, jax.jit)
    chex.assert_trees_all_close(actual, around_the_base_optimizer(name), rtol=1e-6)


def test_lookahead_passes_no_batch_on():
    """The error names it, and what to do instead."""
    pair = optax.LookaheadParams.init_synced(start())
    grads = gradient(pair.fast, BATCHES[0])
    around = optax.lookahead(optax.chain(ms.sam(gradient, rho=RHO), base()), 2, 0.5)
    with pytest.raises(
        ValueError, match=r"grad_fn needs batch.*optax.lookahead around it.*of the params alone"
    ):
        around.update(grads, around.init(pair), pair)
    tx = optax.lookahead(optax.chain(ms.sam(at_first_batch, rho=RHO), base()), 2, 0.5)
    updates, _ = tx.update(grads, tx.init(pair), pair)
    x = flat(pair.fast).astype(float)
    g = slope(x, BATCHES[0])
    expected = -LEARNING_RATE * slope(x + RHO * g / np.linalg.norm(g), BATCHES[0])
    np.testing.assert_allclose(flat(updates.fast), expected, rtol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_around_two_passes(reset):
    """With a gradient function of the params alone; slow params as in its paper."""
    tx = optax.chain(ms.monge_sam(at_first_batch, rho=RHO), base())
    name = "lookahead, reset" if reset else "lookahead"
    actual = train(WRAPPERS[name].wrap(tx), WRAPPERS[name])
    fast = slow = flat(start()).astype(float)
    m = np.zeros(4)
    for t in range(6):
        m = DECAY * m + at_perturbed(fast, BATCHES[0])
        fast = fast - LEARNING_RATE * m
        if t % 2 == 1:
            fast = slow = slow + 0.5 * (fast - slow)
            m = 0 * m if reset else m
    np.testing.assert_allclose(flat(actual.fast), fast, rtol=1e-5)
    np.testing.assert_allclose(flat(actual.slow), slow, rtol=1e-5)


# --- after it ---


def at_perturbed(x, batch):
    """The gradient at Monge SAM's perturbation, by the dense formula."""
    g = slope(x, batch)
    return slope(x + dense_perturbation(monge_matrix(x, g), g, RHO), batch)


AFTER = [
    "named_chain, first",
    "selective_transform",
    "conditionally_transform",
    "conditionally_mask",
    "flatten",
    "MultiSteps, more and more",
    "inject_hyperparams",
    "split_real_and_imaginary, real",
    "mechanize",
    "galore",
    "process, accumulated",
]


@pytest.mark.parametrize("name", [name for name in AFTER if name in WRAPPERS])
def test_after_the_transformation(name):
    """Against the wrapper, given second gradients found in NumPy."""
    tail = WRAPPERS[name].wrap(base())
    tx = optax.chain(ms.monge_sam(gradient, rho=RHO), tail)
    params, expected = start(), start()
    state, tail_state = tx.init(params), tail.init(expected)
    with jax.disable_jit(WRAPPERS[name].conditional):
        for batch in BATCHES[:4]:
            updates, state = tx.update(gradient(params, batch), state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            second = at_perturbed(flat(expected).astype(float), batch).astype(np.float32)
            second = {"v": jnp.asarray(second[:2]), "w": jnp.asarray(second[2:])}
            updates, tail_state = tail.update(second, tail_state, expected)
            expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


def test_multisteps_around_two_passes_is_refused_and_its_advice_is_m_sharpness():
    """Both pieces of advice: a perturbation for each micro-batch, or one for all of them."""
    around = multisteps(2)(optax.chain(ms.monge_sam(gradient, rho=RHO), base()))
    params = start()
    with pytest.raises(ValueError, match=r"optax.MultiSteps.*accumulated\(k\)"):
        around.update(gradient(params, BATCHES[0]), around.init(params), params, batch=BATCHES[0])

    first = optax.chain(ms.monge_sam(gradient, rho=RHO), multisteps(2)(base()))
    actual = train(first, WRAPPERS["MultiSteps"], jax.jit)
    x, m = flat(params).astype(float), np.zeros(4)
    for pair in BATCHES.reshape(3, 2, 2):
        m = DECAY * m + sum(at_perturbed(x, batch) for batch in pair) / 2
        x = x - LEARNING_RATE * m
    np.testing.assert_allclose(flat(actual), x, rtol=1e-5)

    def loss(params, batches):  # whose gradient is the mean over the batches
        w = (params["w"].reshape(1, 2) - batches) ** 2 @ CURVATURES
        return jnp.mean(w) / 2 + jnp.sum(params["v"] ** 4) / 4

    value_and_grad = ms.sharpness_aware_value_and_grad(
        loss, metric=ms.monge(), rho=RHO, value_and_grad=ms.accumulated(2)
    )
    _, both = jax.jit(value_and_grad)(params, jnp.asarray(BATCHES[:2]))
    expected = at_perturbed(flat(params).astype(float), BATCHES[:2].mean(0))
    np.testing.assert_allclose(flat(both), expected, rtol=1e-5)


# --- what moves the params of one pass from outside ---


def project(x):
    return np.clip(x, -1.0, 1.0)


OUTSIDE = {
    "shift": lambda x, t: x + (0.5 if t == 2 else 0.0),
    "load": lambda x, t: np.array([1.0, -1.0, 2.0, 0.5]) if t == 3 else x,
    "prune": lambda x, t: x * np.array([1.0, 0.0, 1.0, 1.0]),
    "project": lambda x, t: project(x),
}


def one_pass_by_hand(direction, outside):
    """(y, theta); what moves y moves theta by as much."""
    theta = y = flat(start()).astype(float)
    m = np.zeros(4)
    for t, batch in enumerate(BATCHES):
        g = slope(y, batch)
        m = DECAY * m + g
        theta = theta - LEARNING_RATE * m
        ahead = g if direction == "gradient" else m
        y = theta + RHO * ahead / np.linalg.norm(ahead)
        moved = outside(y, t)
        y, theta = moved, theta + (moved - y)
    return y, theta


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_moving_the_params_of_one_pass_moves_theta(x64, name, direction):
    tx = one_pass(direction, RHO)(base())
    y = start(jnp.float64)
    state = tx.init(y)
    for t, batch in enumerate(BATCHES):
        updates, state = tx.update(gradient(y, batch), state, y)
        moved = OUTSIDE[name](flat(optax.apply_updates(y, updates)), t)
        y = {"v": jnp.asarray(moved[:2]), "w": jnp.asarray(moved[2:])}
    expected_y, expected_theta = one_pass_by_hand(direction, OUTSIDE[name])
    np.testing.assert_allclose(flat(y), expected_y, rtol=1e-12)
    np.testing.assert_allclose(flat(ms.unperturbed_params(state, y)), expected_theta, rtol=1e-12)
    assert np.linalg.norm(expected_y - expected_theta) == pytest.approx(RHO)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_theta_is_moved_by_as_much_up_to_rounding(dtype, direction):
    tx = one_pass(direction, RHO)(base())
    y = start(dtype)
    state = tx.init(y)
    for batch in BATCHES[:3]:
        updates, state = tx.update(gradient(y, batch.astype(dtype)), state, y)
        y = optax.apply_updates(y, jax.tree.map(lambda u: u.astype(dtype), updates))
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.25, dtype), y)
    thetas = [flat(ms.unperturbed_params(state, at)).astype(float) for at in (y, moved)]
    np.testing.assert_allclose(thetas[1] - thetas[0], 0.25, atol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("reset", [False, True])
def test_lookahead_around_one_pass(reset, direction):
    """What it adds at its sync moves theta too; a state that it has reset holds no perturbation."""
    name = "lookahead, reset" if reset else "lookahead"
    tx = WRAPPERS[name].wrap(one_pass(direction, RHO)(base()))
    actual = train(tx, WRAPPERS[name])
    y = theta = slow = flat(start()).astype(float)
    m = np.zeros(4)
    for t in range(6):
        g = slope(y, BATCHES[0])
        m = DECAY * m + g
        theta = theta - LEARNING_RATE * m
        ahead = g if direction == "gradient" else m
        delta = RHO * ahead / np.linalg.norm(ahead)
        y = theta + delta
        if t % 2 == 1:
            y = slow = slow + 0.5 * (y - slow)
            theta, m = (y, 0 * m) if reset else (y - delta, m)
    np.testing.assert_allclose(flat(actual.fast), y, rtol=1e-5)
    np.testing.assert_allclose(flat(actual.slow), slow, rtol=1e-5)


# --- one sharpness-aware link to an optimizer ---

SMALL = 0.02


def link(mask=None, rho=RHO):
    return ms.sam(at_first_batch, rho=rho, mask=mask)


V, W = OTHER, CHOSEN  # as masks
TWO_LINKS = {
    "chain": lambda: optax.chain(link(V), link(W, SMALL), base()),
    "clipping between": lambda: optax.chain(link(V), optax.clip(1.0), link(W, SMALL), base()),
    "nested chains": lambda: optax.chain(
        optax.chain(link(V), optax.clip(1.0)), optax.chain(link(W, SMALL), base())
    ),
    "named_chain": lambda: optax.named_chain(
        ("v", link(V)), ("w", link(W, SMALL)), ("base", base())
    ),
    "conditional": lambda: optax.chain(
        optax.conditionally_transform(link(V), early), link(W, SMALL), base()
    ),
    "injected": lambda: optax.inject_hyperparams(
        lambda rho: optax.chain(link(V, rho), link(W, rho), base())
    )(rho=RHO),
    "guarded": lambda: optax.apply_if_finite(optax.chain(link(V), link(W, SMALL), base()), 3),
    "two passes, one pass": lambda: optax.chain(link(), one_pass("gradient", RHO)(base())),
    "one pass, two passes": lambda: optax.chain(one_pass("gradient", RHO)(base()), link()),
    "one pass around two": lambda: one_pass("gradient", RHO)(optax.chain(link(), base())),
    "one pass around one pass": lambda: one_pass("gradient")(one_pass("gradient")(base())),
    "one pass after one pass": lambda: optax.chain(
        one_pass("gradient")(base()), one_pass("gradient")(base())
    ),
    "one pass twice on some leaves": lambda: optax.chain(
        *(
            optax.masked(one_pass("gradient", RHO)(base()), mask)
            for mask in (W, {"v": True, "w": True})
        )
    ),
}


@pytest.mark.parametrize("name", TWO_LINKS)
def test_two_links_are_refused(name):
    params = start()
    tx = TWO_LINKS[name]()
    with pytest.raises(ValueError, match=r"grouped\("):
        tx.update(at_first_batch(params), tx.init(params), params)


def test_the_advice_to_two_links():
    """`grouped` with their radii: two balls, in a loop by hand."""
    metric = ms.grouped({"a": ms.euclidean(), "b": ms.scaled(ms.euclidean(), SMALL / RHO)}, LABELS)
    tx = optax.chain(ms.sharpness_aware(gradient, metric=metric, rho=RHO), base())
    actual = train(tx, WRAPPERS["chain"])
    x, m = flat(start()).astype(float), np.zeros(4)
    for batch in BATCHES:
        v, w = np.split(slope(x, batch), 2)
        delta = [RHO * v / np.linalg.norm(v), SMALL * w / np.linalg.norm(w)]
        m = DECAY * m + slope(x + np.concatenate(delta), batch)
        x = x - LEARNING_RATE * m
    np.testing.assert_allclose(flat(actual), x, rtol=1e-5)


def optax_sam(optimizer, **options):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(optimizer, ascent, **options)


WITH_OPTAX_SAM = {
    "around two passes": lambda: optax_sam(optax.chain(link(), base())),
    "around one pass": lambda: optax_sam(one_pass("gradient", RHO)(base())),
    "inside one pass": lambda: one_pass("gradient", RHO)(optax_sam(base())),
    "after two passes": lambda: optax.chain(link(), optax_sam(base())),
}


@pytest.mark.parametrize("name", WITH_OPTAX_SAM)
def test_optax_sam_perturbs_too(name):
    params = start()
    tx = WITH_OPTAX_SAM[name]()
    with pytest.raises(ValueError, match=r"optax.contrib.sam.*one of the two"):
        tx.update(at_first_batch(params), tx.init(params), params)


# --- where there is one link each ---


@pytest.mark.parametrize("compile_with", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_two_optimizers_on_the_same_params_and_gradients(compile_with):
    """Each as if it were alone."""
    txs = [optax.chain(link(rho=rho), base()) for rho in (RHO, SMALL)]
    params = start()

    @compile_with
    def both(params, states):
        grads = at_first_batch(params)
        return [tx.update(grads, state, params)[0] for tx, state in zip(txs, states, strict=True)]

    updates = both(params, [tx.init(params) for tx in txs])
    x = flat(params).astype(float)
    g = slope(x, BATCHES[0])
    for rho, update in zip((RHO, SMALL), updates, strict=True):
        expected = -LEARNING_RATE * slope(x + rho * g / np.linalg.norm(g), BATCHES[0])
        np.testing.assert_allclose(flat(update), expected, rtol=1e-5)


@pytest.mark.parametrize("outer", ["ours", "optax.contrib.sam"])
def test_training_inside_the_loss_of_an_outer_optimizer(outer):
    """Learning the start of an inner training with `sam`, by an outer SAM."""

    def inner_training(params):
        tx = optax.chain(link(), optax.sgd(LEARNING_RATE))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(at_first_batch(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    def loss(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(inner_training(params)))

    tx = optax.chain(ms.sam(rho=RHO), optax.sgd(1.0))
    grad_fn = jax.grad(loss)
    if outer == "optax.contrib.sam":
        tx = optax_sam(optax.sgd(1.0), opaque_mode=True)
        grad_fn = lambda params, _: jax.grad(loss)(params)  # noqa: E731
    params = start()
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    delta = ms.worst_case_perturbation(ms.euclidean(), grads, params, RHO)
    expected = jax.grad(loss)(jax.tree.map(jnp.add, params, delta))
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.negative, expected), rtol=1e-6)
    assert np.abs(flat(expected) / flat(grads) - 1).max() > 1e-2


def test_two_players():
    """Each descends its own loss at its own perturbation, of the other's params as they are."""

    def losses(x, y):
        return jnp.sum(x**2) + x @ y, jnp.sum(y**2) - x @ y

    first = lambda x, y: jax.grad(lambda x: losses(x, y)[0])(x)  # noqa: E731
    second = lambda y, x: jax.grad(lambda y: losses(x, y)[1])(y)  # noqa: E731
    txs = [optax.chain(ms.sam(f, rho=RHO), optax.sgd(0.1)) for f in (first, second)]
    x, y = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.5])
    a, b = np.array(x, float), np.array(y, float)
    states = [tx.init(p) for tx, p in zip(txs, (x, y), strict=True)]
    for _ in range(3):
        u, states[0] = txs[0].update(first(x, y), states[0], x, y=y)
        w, states[1] = txs[1].update(second(y, x), states[1], y, x=x)
        x, y = x + u, y + w
        g, h = 2 * a + b, 2 * b - a
        perturbed = a + RHO * g / np.linalg.norm(g), b + RHO * h / np.linalg.norm(h)
        a, b = a - 0.1 * (2 * perturbed[0] + b), b - 0.1 * (2 * perturbed[1] - a)
    np.testing.assert_allclose([x, y], [a, b], rtol=1e-5)


def test_one_pass_for_each_part_of_the_params():
    """In `partition`, as two optimizers with params of their own would do."""
    parts = {"v": one_pass("gradient", RHO)(base()), "w": one_pass("momentum", SMALL)(base())}
    tx = optax.partition(parts, {"v": "v", "w": "w"})
    actual = train(tx, WRAPPERS["partition"])
    expected = start()
    states = {name: parts[name].init(p) for name, p in expected.items()}
    for batch in BATCHES:
        grads = gradient(expected, batch)
        for name, part in parts.items():
            update, states[name] = part.update(grads[name], states[name], expected[name])
            expected[name] += update
    chex.assert_trees_all_equal(actual, expected)
