# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
# ---

# %% [markdown]
# # What did each method find?
#
# Sharpness-aware training is meant to end in flatter minima. Here are four measures of flatness at
# the minima of SGD, SAM, M-SAM and one-pass M-SAM on scikit-learn's handwritten digits, over ten
# seeds, and test accuracy beside them: flatter need not be better.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

from monge_sam_jax import monge, one_pass_sam, sharpness_aware, unperturbed_params
from monge_sam_jax.curvature import (
    adaptive_worst_case_sharpness,
    filter_normalized_directions,
    lanczos_quadrature,
)
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits
from monge_sam_jax.experiments.common.models import MLP
from monge_sam_jax.experiments.common.plots import COLOURS, NOTEBOOK, WIDTH

plt.rcParams.update(NOTEBOOK)
digits, model, SEEDS, STEPS = handwritten_digits(), MLP(10, 24), 10, 500
train, test = digits.train, digits.test
# One vector of params compiles much faster than a tree.
tree_of = ravel_pytree(model.init(jax.random.key(0), train.x[:1]))[1]


def loss_fn(theta, batch):
    logits = model.apply(tree_of(theta), batch.x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.y))


# %% [markdown]
# All seeds of a method are trained at once. M-SAM with $\alpha = 0$ is SAM, and with $\rho = 0$ it
# is SGD, so that one compiled function trains all forms of two passes.


# %%
def train_from(seed, rho, alpha, one_pass):
    key, base = jax.random.key(seed), optax.sgd(0.05, momentum=0.9)
    params, _ = ravel_pytree(model.init(key, train.x[:1]))
    tx = one_pass_sam(base, metric=monge(alpha=alpha), rho=rho)
    if not one_pass:
        tx = optax.chain(sharpness_aware(metric=monge(alpha=alpha), rho=rho), base)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(train.y))
        grad_fn = partial(jax.grad(loss_fn), batch=Batch(train.x[rows], train.y[rows]))
        more = {} if one_pass else {"grad_fn": grad_fn}
        updates, state = tx.update(grad_fn(params), state, params, **more)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, STEPS))
    return unperturbed_params(state, params) if one_pass else params


@partial(jax.jit, static_argnames="one_pass")
def train_all(rho, alpha, one_pass=False):
    return jax.vmap(lambda seed: train_from(seed, rho, alpha, one_pass))(jnp.arange(SEEDS))


MINIMA = {"SGD": train_all(0.0, 0.0)}
for rho in (0.05, 0.5):
    MINIMA[f"SAM, {rho}"] = train_all(rho, 0.0)
    MINIMA[f"M-SAM, {rho}"] = train_all(rho, 1.0)
    MINIMA[f"one-pass M-SAM, {rho}"] = train_all(rho, 1.0, one_pass=True)

# %% [markdown]
# The measures, of the loss on all training samples: the Hessian's spectrum by Lanczos quadrature,
# and its two largest eigenvalues; the worst rise of the loss in a box of $\pm 0.05 |\theta_i|$
# (adaptive sharpness, Kwon et al. 2021); and the loss along a random direction in which every
# filter is as long as that of the params (Li et al. 2018).

# %%
on_train = partial(loss_fn, batch=train)
AWAY = jnp.linspace(-1, 1, 13)


@jax.jit
@jax.vmap
def measure(theta):
    right = jnp.argmax(model.apply(tree_of(theta), test.x), -1) == test.y
    quadrature = lanczos_quadrature(on_train, theta, jax.random.key(0), num_samples=1, num_steps=15)
    (direction,) = filter_normalized_directions(tree_of(theta), jax.random.key(1), 1)
    d, _ = ravel_pytree(direction)
    return {
        "test accuracy": 100 * jnp.mean(right),
        "training loss": on_train(theta),
        "eigenvalues": quadrature.nodes[0, -2:][::-1],
        "adaptive": adaptive_worst_case_sharpness(on_train, theta, rho=0.05, num_steps=5),
        "slice": jax.lax.map(lambda a: on_train(theta + a * d), AWAY),
        "quadrature": quadrature,
    }


found = {name: jax.tree.map(np.asarray, measure(params)) for name, params in MINIMA.items()}


def text(x, digits):
    return f"{np.mean(x):.{digits}f} ± {np.std(x, ddof=1) / len(x) ** 0.5:.{digits}f}"


print(
    f"{'':20} {'test accuracy':>14} {'training loss':>17} {'largest':>13} {'second':>13}  adaptive"
)
for name, m in found.items():
    first, second = m["eigenvalues"].T
    cells = [
        text(x, digits)
        for x, digits in (
            *((m["test accuracy"], 2), (m["training loss"], 4), (first, 2), (second, 2)),
            (m["adaptive"], 3),
        )
    ]
    print(f"{name:20} {cells[0]:>14} {cells[1]:>17} {cells[2]:>13} {cells[3]:>13}  {cells[4]}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3))
kinds = {"SGD": "sgd", "SAM": "sam", "M-SAM": "monge_sam", "one-pass M-SAM": "monge_sam"}
grid = np.geomspace(1e-4, 1e2, 200)
for name, m in found.items():
    kind, _, rho = name.partition(", ")
    style = {"color": COLOURS[kinds[kind]], "linestyle": ":" if "one-pass" in kind else "-"}
    style |= {"linewidth": 0.8 if rho == "0.05" else 1.6, "label": rf"{kind}, $\rho$ = {rho}"}
    if kind == "SGD":
        style["label"] = kind
    nodes, weights = m["quadrature"]
    above = [np.mean(np.sum(weights * (nodes > t), axis=(1, 2))) for t in grid]
    left.plot(grid, above, **style)
    right.plot(AWAY, np.mean(m["slice"], axis=0), **style)
left.set(xscale="log", yscale="log", ylim=(1e-4, 1), xlabel="eigenvalue", ylabel="share above it")
right.set(yscale="log", xlabel="distance, in lengths of the filters", ylabel="training loss")
handles, names = left.get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=4)

# %% [markdown]
# ## Flatter need not be better
#
# Dinh et al. (2017): with ReLU units the weights of a layer can be multiplied by $c$, and those of
# the next divided by it, without any change of the function. So eigenvalues can be made as large
# as one likes, and accuracy cannot see them. Adaptive sharpness and filter-normalised slices do not
# change. Andriushchenko et al. (2023) found that adaptive sharpness too says little about accuracy,
# and that what it says may have the wrong sign. Here are both: the minimum of the first seed of
# SGD, rescaled, and the rank correlation of each measure with test accuracy over all minima.


# %%
def rescaled(theta, c):
    first, second, third = (tree_of(theta)["params"][f"Dense_{i}"] for i in range(3))
    first = {"kernel": c * first["kernel"], "bias": c * first["bias"]}
    second = {"kernel": second["kernel"] / c, "bias": second["bias"]}
    return ravel_pytree({"Dense_0": first, "Dense_1": second, "Dense_2": third})[0]


factors = np.geomspace(0.1, 10, SEEDS + 1)[1::2]
again = measure(jnp.stack([rescaled(MINIMA["SGD"][0], c) for c in np.repeat(factors, 2)]))
again = {name: again[name][::2] for name in ("test accuracy", "eigenvalues", "adaptive", "slice")}
for i, c in enumerate(factors):
    print(
        f"c = {c:5.2f}: test accuracy {again['test accuracy'][i]:.2f}, "
        f"largest eigenvalue {again['eigenvalues'][i, 0]:7.2f}, "
        f"adaptive sharpness {again['adaptive'][i]:.4f}, "
        f"loss half a filter away {again['slice'][i, 15]:.3f}"
    )

measures = {
    "largest eigenvalue": lambda m: m["eigenvalues"][:, 0],
    "adaptive sharpness": lambda m: m["adaptive"],
    "loss half a filter away": lambda m: m["slice"][:, 9],
}
rng = np.random.default_rng(0)
for name, of in measures.items():
    x = np.array([of(m) for m in found.values()])
    y = np.array([m["test accuracy"] for m in found.values()])
    draws = [rng.integers(SEEDS, size=SEEDS) for _ in range(500)]  # whole seeds, with all methods
    spread = np.percentile(
        [spearmanr(x[:, d].ravel(), y[:, d].ravel()).statistic for d in draws], [2.5, 97.5]
    )
    within = np.mean([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    overall = spearmanr(x.ravel(), y.ravel()).statistic
    print(
        f"{name:24} with test accuracy: {overall:+.2f} ({spread[0]:+.2f} to {spread[1]:+.2f}) over "
        f"all minima, {within:+.2f} among those of one method"
    )

# %% [markdown]
# What the numbers say, in the order of their certainty:
#
# - Rescaling moves the largest eigenvalue by a factor of more than twenty at the same function, so
#   that eigenvalues of two networks compare only as far as both were trained in the same way.
# - At the same small radius every sharpness-aware method ends at a smaller adaptive sharpness than
#   SGD, and at a Hessian whose second eigenvalue is smaller; test accuracy is higher by about 0.3
#   points, which is no more than two standard errors.
# - At $\rho = 0.5$ the adaptive sharpness is a fraction of that, and test accuracy is the lowest:
#   some seeds have collapsed to where there is little loss to gain and little curvature.
# - Over all minima a *larger* adaptive sharpness goes with *better* accuracy, as those that collapsed
#   are the flattest; among the minima of one method the correlation has the opposite sign. The other
#   two measures say nothing over all minima.
#
# So flatness tells what a method did, and not whether it was good: look at accuracy on samples that
# were not trained on, and choose the radius by that.
