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
# # How do I train a Flax NNX model?
#
# Two lines change. Model and arguments are copied before the first pass (the variables are, their arrays are shared), so that both passes
# see the same dropout mask, random streams advance once, and statistics come from the first pass.

# %%
import jax.numpy as jnp
import optax
from flax import nnx

from monge_sam_jax import get_diagnostics, monge, monge_sam
from monge_sam_jax import nnx as ms_nnx

x = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
y = jnp.linspace(0.0, 1.0, 8)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))[:, 0]


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


# %% [markdown]
# ## In place of `nnx.value_and_grad`

# %%
model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def functional_step(model, optimizer, x, y):
    value_and_grad = ms_nnx.sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.05)
    loss, grads = value_and_grad(model, x, y)  # in place of nnx.value_and_grad(loss_fn)
    optimizer.update(model, grads)
    return loss


for _ in range(20):
    loss = functional_step(model, optimizer, x, y)
print(f"loss {loss:.3f}, draws of dropout: {model.dropout.rngs.count[...]}")

# %% [markdown]
# ## In an Optax chain
#
# `nnx.grad(loss_fn)` is a function of a model, so it cannot be the gradient function of a chain:
# `ms_nnx.grad_fn` makes one. It must be called before the first pass, since that is when it copies the model.

# %%
model = Model(nnx.Rngs(0))
tx = optax.chain(monge_sam(rho=0.05), optax.adamw(1e-2))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def chain_step(model, optimizer, x, y):
    second = ms_nnx.grad_fn(loss_fn, model, x, y)  # before the first pass
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads, grad_fn=second)
    return loss


for _ in range(20):
    loss = chain_step(model, optimizer, x, y)
print(f"loss {loss:.3f}, draws of dropout: {model.dropout.rngs.count[...]}")
print(f"|delta| {get_diagnostics(optimizer.opt_state).perturbation_norm[...]:.4f}")

# %% [markdown]
# Both give the same numbers. `nnx.Optimizer` keeps its state in variables, of which `[...]` is the array.
#
# ## Evaluate and save
#
# `model.eval()` as ever. In [one pass](15_one_pass.ipynb) the model holds the perturbed params:
# `ms_nnx.evaluation_model(model, optimizer, batches=...)` is a copy with the unperturbed ones and fresh running statistics.

# %%
model.eval()
print(f"evaluated: {loss_fn(model, x, y):.3f}")
model.train()

# %% [markdown]
# States are saved and restored exactly by Orbax: `nnx.state(optimizer)` has everything.
