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
# The diagnostics come with the norm that the step needs anyway. SAM's perturbation has length rho
# at every step; M-SAM's is rho / sqrt(1 + |g|^2), shorter as long as the gradient is large.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for builder in (sam, monge_sam):
    p, log = train(builder, rho=0.05)
    print(f"{builder.__name__}: loss {loss_fn(p, x, y):.2e}")
    for ax, name in zip(axes, ["grad_norm", "perturbation_norm", "effective_radius"], strict=True):
        ax.semilogy(getattr(log, name), label=builder.__name__, linewidth=1)
        ax.set(xlabel="step", title=name)
axes[0].legend()
