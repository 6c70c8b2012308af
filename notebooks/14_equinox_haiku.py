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
# # How do I train an Equinox or a Haiku model?
#
# They need nothing special: differentiate the arrays, and return the state as aux. Value and auxiliary output are those of the
# first pass.
#
# ## Equinox

# %%
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax import monge, monge_sam, sharpness_aware_value_and_grad

batch = {"x": jnp.linspace(-1.0, 1.0, 24).reshape(8, 3), "y": jnp.linspace(0.0, 1.0, 8)}
model = eqx.nn.MLP(3, 1, width_size=8, depth=1, key=jax.random.key(0))
arrays, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(arrays, batch):
    prediction = jax.vmap(eqx.combine(arrays, static))(batch["x"])[:, 0]
    return jnp.mean((prediction - batch["y"]) ** 2)


tx = optax.adamw(1e-2)
opt_state = tx.init(arrays)


@jax.jit
def step(arrays, opt_state, batch):
    value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.05)
    loss, grads = value_and_grad(arrays, batch)
    updates, opt_state = tx.update(grads, opt_state, arrays)
    return optax.apply_updates(arrays, updates), opt_state, loss


for _ in range(20):
    arrays, opt_state, loss = step(arrays, opt_state, batch)
model = eqx.combine(arrays, static)  # evaluate and save this one
print(f"loss {loss:.3f}")

# %% [markdown]
# In a chain, the gradient function is one of the arrays too; `static` may be closed over, or handed to
# `update` by name.

# %%
grad_fn = jax.grad(loss_fn)
tx = optax.chain(monge_sam(grad_fn, rho=0.05), optax.adamw(1e-2))
opt_state = tx.init(arrays)
updates, opt_state = tx.update(grad_fn(arrays, batch), opt_state, arrays, batch=batch)
arrays = eqx.apply_updates(arrays, updates)

# %% [markdown]
# A model with state (`eqx.nn.BatchNorm`) returns it as aux, as Haiku's does below. Keys of dropout are arguments:
# give both passes the same, which is what arguments of `value_and_grad` and of `update` are.
#
# ## Haiku

# %%
net = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), True))
params, state = net.init(jax.random.key(0), batch["x"])


def hk_loss(params, state, key, batch):
    y, state = net.apply(params, state, key, batch["x"])
    return jnp.mean((y - 1.0) ** 2), state


fn = sharpness_aware_value_and_grad(hk_loss, metric=monge(), rho=0.05, has_aux=True)
(loss, state), grads = fn(params, state, jax.random.key(1), batch)
print(f"loss {loss:.3f}")
