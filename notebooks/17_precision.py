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
# # What about float16 and bfloat16?
#
# Norms are accumulated in float32 or wider and neither overflow nor underflow, from the smallest normal
# number to the largest, in float16 and bfloat16 too. A gradient that is not finite makes the whole
# update not finite, so that a guard after it sees it. The perturbed params are rounded to the params'
# dtype: in bfloat16, a perturbation of 0.05 over many weights of size one vanishes entirely. `measure=True` logs
# the length that was left (`realised_norm`), and `widen_params=True` hands `grad_fn` float32 params.

# %%
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

import monge_sam_jax as ms

half = {"w": jnp.ones(10_000, jnp.bfloat16)}
for widen_params in (False, True):
    tx = ms.sam(lambda p: p, rho=0.05, measure=True, widen_params=widen_params)
    _, state = tx.update(half, tx.init(half), half)
    left = ms.get_diagnostics(state).realised_norm
    print(f"widen_params={widen_params}: {left:.3f} of 0.050")

# %% [markdown]
# ## Float16
#
# Float16: scale the loss by `loss_scaled(scale)` in both passes, which unscales both gradients before
# they are used, and update Flax's `DynamicScale` once. A robust gradient is not finite if either
# gradient was not, so one look is enough. `make_train_step` does all of it for a state with a
# `dynamic_scale`.


# %%
def loss_fn(params, x):
    y = x.astype(jnp.float16) @ params["w"].astype(jnp.float16)
    return jnp.mean(y.astype(jnp.float32) ** 2)


params, x = {"w": jnp.ones(3)}, jnp.eye(3)
dynamic_scale = DynamicScale()
fn = ms.sharpness_aware_value_and_grad(
    loss_fn, metric=ms.monge(), rho=0.05, value_and_grad=ms.loss_scaled(dynamic_scale.scale)
)
loss, grads = fn(params, x)
dynamic_scale, is_finite = ms.update_dynamic_scale(dynamic_scale, grads)
print(f"finite: {is_finite}, scale {dynamic_scale.scale:g}, loss {loss:.2f}")

# %% [markdown]
# A scale that is left in the gradient is no error, and destroys the perturbation of Monge SAM, whose length goes by the
# gradient's: a scale of 512 made 7e-5 of $\lVert \delta \rVert = 0.038$.
#
# A chain takes the two steps by hand: `updates` unscaled, and a `grad_fn` that unscales. With bfloat16 params and
# `optax.inject_hyperparams`, add `hyperparam_dtype=jnp.float32`.
