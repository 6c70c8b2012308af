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
# # Quickstart: Monge SAM in an Optax chain
#
# A network on handwritten digits. The sharpness-aware step goes first in the chain; what follows
# sees an ordinary gradient.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from monge_sam_jax import get_diagnostics, monge_sam, sam
from monge_sam_jax.experiments.common.plots import COLOURS, LABELS, NOTEBOOK, WIDTH

digits = load_digits()
x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
keys = jax.random.split(jax.random.key(0), 2)
params = {
    "hidden": jax.random.normal(keys[0], (64, 128)) / 8,
    "out": jax.random.normal(keys[1], (128, 10)) / 11,
}


def loss_fn(params, x, y):
    logits = jax.nn.relu(x @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# %% [markdown]
# `update` takes the gradient at the params, calls `grad_fn` at the perturbed ones, and returns the
# gradient there. `grad_fn` gets the arguments of `update` that it names: here `x` and `y`.


# %%
def train(builder, rho, steps=400):
    grad_fn = jax.grad(loss_fn)
    tx = optax.chain(builder(grad_fn, rho=rho), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(grad_fn(params, x, y), state, params, x=x, y=y)
        return optax.apply_updates(params, updates), state

    p, state, log = params, tx.init(params), []
    for rows in np.random.default_rng(0).integers(0, len(y), (steps, 64)):
        p, state = step(p, state, x[rows], y[rows])
        log.append(get_diagnostics(state))
    return p, jax.tree.map(lambda *values: np.array(values), *log)


# %% [markdown]
# The diagnostics come with the norm that the step needs anyway. SAM's perturbation has length
# $\rho$ at every step; M-SAM's is $\rho / \sqrt{1 + \|g\|^2}$, shorter as long as the gradient is
# large.

# %%
plt.rcParams.update(NOTEBOOK)
PANELS = {
    "grad_norm": r"gradient's norm $\|g\|$ (nats)",
    "perturbation_norm": r"perturbation's length $\|\delta\|$",
    "effective_radius": r"radius $\|\delta\| / \|g\|$ (1/nats)",
}
figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6))
for name, builder in {"sam": sam, "monge_sam": monge_sam}.items():
    p, log = train(builder, rho=0.05)
    print(f"{LABELS[name]:5} ends at a loss of {loss_fn(p, x, y):.2e} nats")
    for ax, (quantity, label) in zip(axes, PANELS.items(), strict=True):
        values = getattr(log, quantity)
        ax.plot(values, color=COLOURS[name], label=LABELS[name], linewidth=0.8, alpha=0.7)
        ax.set(xlabel="step", ylabel=label, yscale="log")
axes[1].set(yscale="linear", ylim=0)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
