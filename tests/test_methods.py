"""The guide's table of methods: every line against a loop in NumPy that says its formula literally.

The lines are read from the guide itself, `notebooks/07_methods.py`, and its code is run for what
they call by a bare name. A new row there needs a loop here.
"""

import re
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import numpy as np
import optax
import pytest
from numpy.linalg import norm
from reference import flat

import monge_sam_jax as ms

GUIDE = Path(__file__).parent.parent / "notebooks" / "07_methods.py"
CELLS = jupytext.read(GUIDE).cells
RHO, RATE, STEPS = 0.3, 0.1, 6

# --- the guide ---


def rows():
    """Name, year, reference, formula, line and gradients per step."""
    (table,) = (cell.source for cell in CELLS if cell.source.startswith("| method | year"))
    cells = [re.split(r" ?\| ?", row)[1:-1] for row in table.splitlines()[2:]]
    assert {len(row) for row in cells} == {6}
    return {row[0]: row[1:] for row in cells}


ROWS = rows()


def names(**more):
    """What the guide's code defines, but for the last cell, which draws."""
    defined = {}
    for cell in [cell for cell in CELLS if cell.cell_type == "code"][:-1]:
        exec(cell.source, defined)
    return defined | more


def built(name, **more):
    return eval(ROWS[name][3].strip("`"), names(**more))


# --- a loss of a network with a layer like a normalisation's ---

START = {
    "kernel": np.array([[0.8, -1.1, 0.3], [0.5, 0.9, -1.4]]),
    "scale": np.array([1.2, -0.7, 0.9]),
    "temperature": np.array(1.3),
}
KERNEL, SCALE, TEMPERATURE = slice(0, 6), slice(6, 9), slice(9, 10)
LEAVES = (KERNEL, SCALE, TEMPERATURE)
X = np.array([[0.5, -1.0], [1.5, 0.3], [-0.8, 1.1], [0.2, 0.7]])
Y = np.array([1.0, -0.5, 0.7, -1.2])


class Counter:
    """Gradients of the whole batch, of a loss in JAX."""

    def __init__(self):
        self.gradients = 0

    def add(self, share):
        self.gradients += float(share)

    def loss(self, params, batch):
        jax.debug.callback(self.add, len(batch["y"]) / len(Y))
        hidden = jnp.tanh(batch["x"] @ params["kernel"])
        return jnp.mean((params["temperature"] * (hidden @ params["scale"]) - batch["y"]) ** 2)


class Gradient:
    """The same by hand, in NumPy."""

    def __init__(self):
        self.calls = 0

    def __call__(self, p, samples=slice(None)):
        x, y = X[samples], Y[samples]
        self.calls += len(y) / len(Y)
        scale, t = p[SCALE], p[9]
        hidden = np.tanh(x @ p[KERNEL].reshape(2, 3))
        error = 2 * (t * (hidden @ scale) - y) / len(y)
        kernel = x.T @ (error[:, None] * t * scale * (1 - hidden**2))
        return np.concatenate([kernel.ravel(), error @ (t * hidden), [error @ (hidden @ scale)]])


def train(name):
    """The training loop's params after each step of a line, and the gradients that it took."""
    counter = Counter()
    params, batch = jax.tree.map(jnp.asarray, START), {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    grad_fn = lambda p: jax.grad(counter.loss)(p, batch)  # noqa: E731
    tx = built(name, grad_fn=grad_fn, loss_fn=counter.loss)
    if not isinstance(tx, optax.GradientTransformation):
        grad_fn, tx = lambda p, of=tx: of(p, batch)[1], optax.sgd(RATE)
    elif isinstance(tx.init(params), ms.SharpnessAwareState):
        tx = optax.chain(tx, optax.sgd(RATE))
    state, path = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(STEPS):
        updates, state = update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(flat(params))
    jax.effects_barrier()
    return np.array(path), counter.gradients


# --- the loops ---

LOOPS = {}


def loop(name):
    """Keeps a generator of params for the row of that name."""
    return lambda function: LOOPS.setdefault(name, function)


def draws(t, draw):
    """The guide's random numbers at step t, flat."""
    key = jax.random.fold_in(jax.random.key(0), t)
    return flat(optax.tree.random_like(key, jax.tree.map(jnp.asarray, START), draw))


def by_leaf(function, *vectors):
    return np.concatenate([function(*(v[leaf] for v in vectors)) for leaf in LEAVES])


def across(a, b):
    return a - (a @ b) / (b @ b) * b


@loop("SAM")
def sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * grad(p + RHO * g / norm(g))
        yield p


@loop("Monge SAM")
def monge_sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * grad(p + RHO * g / (norm(g) * np.sqrt(1 + 2.0**2 * norm(g) ** 2)))
        yield p


@loop("Monge SAM, loss budget")
def monge_sam_with_budget(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        length = (RHO**-2 + (norm(g) / 0.1) ** 2) ** -0.5
        p = p - RATE * grad(p + length * g / norm(g))
        yield p


@loop("Monge SAM, averaged")
def averaged_monge_sam(grad, p):
    seen = []
    for _ in range(STEPS):
        g = grad(p)
        seen = [g, *seen][:2]
        h = np.linalg.solve(np.eye(10) + sum(np.outer(s, s) for s in seen) / len(seen), g)
        p = p - RATE * grad(p + RHO * h / np.sqrt(g @ h))
        yield p


@loop("Monge SAM over ASAM")
def monge_sam_over_asam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        h = np.linalg.solve(np.diag(1 / (np.abs(p) + 0.01) ** 2) + np.outer(g, g), g)
        p = p - RATE * grad(p + RHO * h / np.sqrt(g @ h))
        yield p


@loop("SAM in other coordinates")
def sam_in_other_coordinates(grad, p):
    for _ in range(STEPS):
        g, jacobian = grad(p), np.diag(np.cosh(p))
        h = np.linalg.solve(jacobian.T @ jacobian, g)
        p = p - RATE * grad(p + RHO * h / np.sqrt(g @ h))
        yield p


@loop("ASAM")
def adaptive_sam(grad, p):
    for _ in range(STEPS):
        g, T = grad(p), np.abs(p) + 0.01
        p = p - RATE * grad(p + RHO * T**2 * g / norm(T * g))
        yield p


@loop("Fisher SAM")
def fisher_sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        h = g / (1 + g**2)
        p = p - RATE * grad(p + RHO * h / np.sqrt(g @ h))
        yield p


@loop("SAM, p = infinity")
def sam_of_signs(grad, p):
    for _ in range(STEPS):
        p = p - RATE * grad(p + 0.1 * np.sign(grad(p)))
        yield p


@loop("SAM, layer by layer")
def layerwise_sam(grad, p):
    for _ in range(STEPS):
        p = p - RATE * grad(p + RHO * by_leaf(lambda g: g / norm(g), grad(p)))
        yield p


@loop("SAM, spectral ball")
def spectral_sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        u, _, vt = np.linalg.svd(g[KERNEL].reshape(2, 3), full_matrices=False)
        unit = by_leaf(lambda g: g / norm(g), g)
        unit[KERNEL] = (u @ vt).ravel()
        p = p - RATE * grad(p + RHO * unit)
        yield p


@loop("LayerSAM")
def layer_sam(grad, p):
    for _ in range(STEPS):
        a = by_leaf(lambda p, g: norm(p) * g / norm(g), p, grad(p))
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("Preconditioned SAM")
def preconditioned_sam(grad, p):
    square = np.zeros(10)
    for _ in range(STEPS):
        g = grad(p)
        square = 0.9 * square + 0.1 * g**2
        h = g / np.sqrt(square + 1e-8)
        p = p - RATE * grad(p + RHO * h / np.sqrt(g @ h))
        yield p


@loop("USAM")
def usam(grad, p):
    for _ in range(STEPS):
        p = p - RATE * grad(p + 0.05 * grad(p))
        yield p


@loop("LE-SAM")
def le_sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * grad(p + min(RHO, 0.1 / norm(g)) * g / norm(g))
        yield p


@loop("SAGM")
def sagm(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * (g + grad(p + RHO * g / norm(g) - 0.05 * g))
        yield p


@loop("VaSSO")
def vasso(grad, p):
    a = np.zeros(10)
    for _ in range(STEPS):
        a = 0.6 * a + 0.4 * grad(p)
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("Friendly SAM")
def friendly_sam(grad, p):
    m = np.zeros(10)
    for _ in range(STEPS):
        g = grad(p)
        m = 0.6 * m + 0.4 * g
        a = g - 0.8 * m
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("ZSharp")
def z_sharp(grad, p):
    def filtered(g):
        if g.size == 1:  # of which there is no standard deviation
            return g
        z = np.abs((g - g.mean()) / g.std())
        return np.where(z >= np.quantile(z, 0.6, method="higher") - 1e-9, g, 0)

    for _ in range(STEPS):
        a = by_leaf(filtered, grad(p))
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("SAM along Adam's step")
def sam_along_adam(grad, p):
    m, square = np.zeros(10), np.zeros(10)
    for t in range(1, STEPS + 1):
        g = grad(p)
        m, square = 0.9 * m + 0.1 * g, 0.999 * square + 0.001 * g**2
        a = m / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("GCSAM")
def gcsam(grad, p):
    for _ in range(STEPS):
        a = grad(p)
        kernel = a[KERNEL].reshape(2, 3)
        a[KERNEL] = (kernel - kernel.mean(1, keepdims=True)).ravel()
        p = p - RATE * grad(p + RHO * a / norm(a))
        yield p


@loop("RWP")
def rwp(grad, p):
    for t in range(STEPS):
        grad(p)  # which is not looked at
        p = p - RATE * grad(p + 0.1 * draws(t, jax.random.normal))
        yield p


@loop("m-RWP")
def mixed_rwp(grad, p):
    for t in range(STEPS):
        second = grad(p + 0.1 * draws(t, jax.random.normal))
        p = p - RATE * (0.5 * second + 0.5 * grad(p))
        yield p


@loop("ESAM, weight perturbation")
def esam(grad, p):
    for t in range(STEPS):
        g = grad(p)
        b = draws(t, jax.random.uniform) < 0.5
        p = p - RATE * grad(p + RHO * b * g / (0.5 * norm(g)))
        yield p


@loop("SAM-ON")
def sam_on(grad, p):
    for _ in range(STEPS):
        g = np.where(np.isin(np.arange(10), np.arange(10)[SCALE]), grad(p), 0)
        p = p - RATE * grad(p + RHO * g / norm(g))
        yield p


@loop("GSAM")
def gsam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        second = grad(p + RHO * g / norm(g))
        p = p - RATE * (second - 0.3 * across(g, second))
        yield p


@loop("WSAM")
def wsam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * (g + 0.8 / (1 - 0.8) * (grad(p + RHO * g / norm(g)) - g))
        yield p


@loop("Gradient norm penalty")
def gradient_norm_penalty(grad, p):
    alpha = 0.2
    for _ in range(STEPS):
        g = grad(p)
        p = p - RATE * ((1 - alpha) * g + alpha * grad(p + RHO * g / norm(g)))
        yield p


@loop("Stable SAM")
def stable_sam(grad, p):
    for _ in range(STEPS):
        g = grad(p)
        second = grad(p + RHO * g / norm(g))
        p = p - RATE * norm(g) / norm(second) * second
        yield p


@loop("LookSAM")
def look_sam(grad, p):
    for t in range(STEPS):
        g = grad(p)
        if t % 3 == 0:
            d = grad(p + RHO * g / norm(g))
            v = across(d, g)
        else:
            d = g + 0.4 * norm(g) / norm(v) * v
        p = p - RATE * d
        yield p


@loop("SAM late in training")
def late_sam(grad, p):
    for t in range(STEPS):
        g = grad(p)
        p = p - RATE * (grad(p + RHO * g / norm(g)) if t >= 3 else g)
        yield p


@loop("RST")
def rst(grad, p):
    for t in range(STEPS):
        g = grad(p)
        heads = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), t), 0.5)
        p = p - RATE * (grad(p + RHO * g / norm(g)) if heads else g)
        yield p


@loop("AE-SAM")
def ae_sam(grad, p):
    mean = variance = 0.0
    for _ in range(STEPS):
        g = grad(p)
        mean = 0.8 * mean + 0.2 * norm(g) ** 2
        variance = 0.8 * variance + 0.2 * (norm(g) ** 2 - mean) ** 2
        sharp = norm(g) ** 2 >= mean + 0.3 * np.sqrt(variance)
        p = p - RATE * (grad(p + RHO * g / norm(g)) if sharp else g)
        yield p


@loop("AE-LookSAM")
def ae_look_sam(grad, p):
    mean = variance = 0.0
    for _ in range(STEPS):
        g = grad(p)
        mean = 0.8 * mean + 0.2 * norm(g) ** 2
        variance = 0.8 * variance + 0.2 * (norm(g) ** 2 - mean) ** 2
        if norm(g) ** 2 >= mean + 0.3 * np.sqrt(variance):
            d = grad(p + RHO * g / norm(g))
            v = across(d, g)
        else:
            d = g + 0.4 * norm(g) / norm(v) * v
        p = p - RATE * d
        yield p


@loop("m-sharpness")
def m_sharpness(grad, p):
    for _ in range(STEPS):
        d = np.zeros(10)
        for samples in ([0, 2], [1, 3]):
            g = grad(p, samples)
            d += grad(p + RHO * g / norm(g), samples) / 2
        p = p - RATE * d
        yield p


@loop("SAM with AdamW")
def sam_with_adamw(grad, p):
    m, square = np.zeros(10), np.zeros(10)
    for t in range(1, STEPS + 1):
        g = grad(p)
        d = grad(p + RHO * g / norm(g))
        m, square = 0.9 * m + 0.1 * d, 0.999 * square + 0.001 * d**2
        step = m / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        p = p - RATE * (step + 0.05 * p)
        yield p


@loop("S2-SAM")
def s2_sam(grad, p):
    delta = np.zeros(10)
    for _ in range(STEPS):
        d = grad(p + delta)
        p, delta = p - RATE * d, RHO * d / norm(d)
        yield p + delta


@loop("Monge SAM in one pass")
def monge_sam_in_one_pass(grad, p):
    delta = np.zeros(10)
    for _ in range(STEPS):
        d = grad(p + delta)
        h = np.linalg.solve(np.eye(10) + np.outer(d, d), d)
        p, delta = p - RATE * d, RHO * h / np.sqrt(d @ h)
        yield p + delta


@loop("Momentum-SAM")
def momentum_sam(grad, p):
    m, perturbed = np.zeros(10), p
    for _ in range(STEPS):
        m = 0.9 * m + grad(perturbed)
        p = p - RATE * m
        perturbed = p - RHO * m / norm(m)
        yield perturbed


@loop("bSAM")
def bsam(grad, p, noise=0.0):
    m, s = np.zeros(10), np.ones(10)
    for t in range(STEPS):
        g = grad(p + noise * draws(t, jax.random.normal) / np.sqrt(s))
        m = 0.9 * m + 0.1 * (grad(p + 0.1 * g / s) + 0.05 * p)
        p = p - RATE * m / s
        s = 0.8 * s + 0.2 * (np.sqrt(s) * np.abs(g) + 0.05)
        yield p


# --- the table is true ---

TOLERANCES = {"SAM, spectral ball": 1e-3}  # whose singular values are within one per cent


def test_every_row_has_a_loop():
    assert list(LOOPS) == sorted(LOOPS, key=list(ROWS).index)
    assert set(LOOPS) == set(ROWS)
    assert len(ROWS) >= 20


def test_the_gradient_by_hand(x64):
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    expected = jax.grad(Counter().loss)(jax.tree.map(jnp.asarray, START), batch)
    np.testing.assert_allclose(Gradient()(flat(START)), flat(expected), rtol=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_the_line_is_the_method(name, x64):
    """The params after every step, and the gradients that are taken."""
    gradient = Gradient()
    expected = np.array(list(LOOPS[name](gradient, flat(START))))
    path, gradients = train(name)
    tolerance = TOLERANCES.get(name, 1e-10)
    np.testing.assert_allclose(path, expected, rtol=tolerance, atol=tolerance)
    assert gradients == gradient.calls
    per_step = ROWS[name][-1]
    if per_step == "1 to 2":
        assert STEPS < gradients < 2 * STEPS
    else:
        assert gradients == STEPS * sum(map(Fraction, per_step.split(" + ")))


def test_rows_differ(x64):
    """No loop could be another one's by mistake."""
    ends = np.array([list(loop(Gradient(), flat(START)))[-1] for loop in LOOPS.values()])
    distance = norm(ends[:, None] - ends, axis=-1) + np.eye(len(ends))
    assert distance.min() > 1e-4


def test_bsam_with_its_noise(x64):
    """The loop takes the first gradient elsewhere, by the s in the state."""
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    grad_fn = lambda p: jax.grad(Counter().loss)(p, batch)  # noqa: E731
    tx = built("bSAM", grad_fn=grad_fn)
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    for t, expected in enumerate(bsam(Gradient(), flat(START), noise=0.2)):
        xi = optax.tree.random_like(jax.random.fold_in(jax.random.key(0), t), params)
        noisy = jax.tree.map(
            lambda p, n, s: p + 0.2 * n / jnp.sqrt(s), params, xi, state[0].metric_state
        )
        updates, state = tx.update(grad_fn(noisy), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(flat(params), expected, rtol=1e-10)


def test_a_rule_of_the_guide(x64):
    above = names()["above"]
    grad_fn = lambda p: {"w": 2 * p["w"]}  # noqa: E731
    tx = ms.sam(grad_fn, rho=RHO, when=above(1.0))
    for size in (0.4, 0.6):
        params = {"w": jnp.array([size, 0.0])}
        d, _ = tx.update(grad_fn(params), tx.init(params), params)
        np.testing.assert_allclose(d["w"][0], 2 * (size + RHO * (2 * size > 1)))


@pytest.mark.parametrize("factor", [lambda n: n, lambda n: jnp.minimum(1.0, 0.1 / n)])
def test_a_resized_ball_has_the_dual_norm_of_its_perturbation(factor, x64):
    """What the guide says of length and dual norm, at a gradient of zero too."""
    metric = names()["resized"](factor)
    g = jnp.array([3.0, 4.0])
    delta = ms.worst_case_perturbation(metric, g, g, rho=0.5)
    steepest, _ = metric.ascent(g, g, ())
    np.testing.assert_allclose(0.5 * steepest.dual_norm, g @ delta)
    np.testing.assert_allclose(norm(delta), 0.5 * factor(5.0))
    zero = ms.worst_case_perturbation(metric, 0 * g, g, rho=0.5)
    np.testing.assert_array_equal(zero, 0)
