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
# # What if the batch does not fit into memory?
#
# Three things are called SAM with accumulation, and they differ:
#
# | what perturbs | write |
# |---|---|
# | each micro-batch for itself (m-sharpness), gradients averaged | `m_sharpness(sharpness_aware_value_and_grad(...), k)`, or `chain(monge_sam(...), MultiSteps(rest, k).gradient_transformation())` |
# | the whole batch, once (what SAM would do with enough memory) | `value_and_grad=accumulated(k)`, or in a chain `accumulated(k)` for both gradients |
# | along the whole batch, descent on the last micro-batch alone (a mistake) | `MultiSteps(chain(monge_sam(...), rest), k)`, which is an error |

# %%
import jax
import jax.numpy as jnp
import optax

import monge_sam_jax as ms

params, micro = {"w": jnp.ones(3)}, {"x": jnp.linspace(0, 1, 24).reshape(8, 3), "y": jnp.zeros(8)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


robust = ms.sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=0.05)
loss, grads = ms.m_sharpness(robust, 4)(params, micro)  # how="scan", "vmap" or "unroll"
print("each micro-batch for itself", grads["w"])

accumulating = ms.accumulated(4)
whole = ms.sharpness_aware_value_and_grad(
    loss_fn, metric=ms.monge(), rho=0.05, value_and_grad=accumulating
)
loss, grads = whole(params, micro)
print("the whole batch, once      ", grads["w"])
print("without micro-batches      ", robust(params, micro)[1]["w"])

# %% [markdown]
# The loss must be a mean over samples, and all arrays that are cut as long as one another; what each
# micro-batch needs whole goes by position, with None in its place: `axis=(0, None)`. A random key
# among that (`jax.random.key`) gets the number of the micro-batch folded in, the same in both passes,
# so that each has a dropout mask of its own. With `make_train_step` it is
# `value_and_grad=accumulated(k, axis=(None, 0, None))`. On CPU use `how="unroll"` for convolutions, whose gradients are
# many times slower in a loop.
#
# ## In a chain
#
# Accumulate both gradients, or put `MultiSteps` after the transformation, which is m-sharpness. Around
# the transformation it would descend on the last micro-batch alone, and is an error.


# %%
def accumulated_grad(params, batch):
    return accumulating(loss_fn)(params, batch)[1]


tx = optax.chain(ms.monge_sam(accumulated_grad, rho=0.05), optax.sgd(0.1))
updates, _ = tx.update(accumulated_grad(params, micro), tx.init(params), params, batch=micro)

inner = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
tx = optax.chain(ms.monge_sam(jax.grad(loss_fn), rho=0.05), inner)
opt_state = tx.init(params)
for rows in range(0, 8, 2):
    batch = jax.tree.map(lambda a, i=rows: a[i : i + 2], micro)
    grads = jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch=batch)  # zero but at the fourth

# %% [markdown]
# The Monge metric of several gradients, `averaged_monge_over(gradients)`, is a metric of its own: see
# [metrics](20_metrics.ipynb). To save time and not memory, `ascent_batch_fraction=1/4` takes the first gradient of a
# quarter of the batch: 1.25 gradients a step.
