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
# # What is a ball, and how do I write one of my own?
#
# Every method here is one formula (eqs. 5 and 8 of the Monge SAM paper) for a metric $G$:
#
# $$
# \delta^* = \operatorname{argmax}_{\delta^\top G \delta \le \rho^2} g^\top \delta
# = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}
# $$
#
# | builder | metric | G | delta* | when |
# |---|---|---|---|---|
# | `sam` | `euclidean()` | I | rho g / ‖g‖ | the default; large gradients do not shorten the step, so a large rho can be drawn to saddle points |
# | `monge_sam` | `monge(base, alpha)` | M + alpha² g gᵀ | the base's, divided by sqrt(1 + alpha² n²), n = ‖g‖ in M⁻¹ | fine-tuning, large rho, learning rates you have not tuned: conservative where the loss is steep, SAM where it is flat |
# | `adaptive_sam` | `adaptive(eta)` | diag(1 / (\|theta\| + eta)²) | rho T² g / ‖T g‖, T = \|theta\| + eta | networks whose weights differ much in size; rho is relative, ten times SAM's |
# | `fisher_sam` | `diagonal_fisher(eta)` | diag(1 + eta g²) | rho h / sqrt(gᵀ h), h = g / (1 + eta g²) | log-likelihoods; damps the coordinates with large gradients |
# | `sharpness_aware` | `pullback(phi)` | JᵀJ, J the Jacobian of phi | SAM's, in the coordinates phi(params) | steps that do not depend on the coordinates, to first order: `monge(pullback(phi))` |
# | `sharpness_aware` | `grouped(metrics, labels)` | each group of leaves its own | the group's | layers with radii of their own, or metrics of their own |
# | `sharpness_aware` | `scaled(base, c)` | M / c² | c times the base's | the radius of a group, as a multiple of rho |
# | `sharpness_aware` | `layerwise(base)` | each leaf its own | the leaf's | no leaf goes without a perturbation because the gradients of others are larger |
# | `sharpness_aware` | `supremum()` | the norm max \|delta\| | rho sign(g) | all entries alike; rho is the move of each |
# | `sharpness_aware` | `spectral()` | the largest singular value of each matrix | rho U Vᵀ, of g = U S Vᵀ | the ball of Muon; 30 products of matrices a leaf |
# | `sharpness_aware` | `averaged_monge(r, alpha)` | M + alpha² / r sum of g_i g_iᵀ, the last r steps | a combination of r gradients | keeps r - 1 gradients; `averaged_monge_over(gradients)` for those of micro-batches |
# | `sharpness_aware` | `preconditioned(tx)` | what an Optax preconditioner divides by | rho P g / sqrt(gᵀ P g) | the ball of an optimizer, `preconditioned(optax.scale_by_rms())` |
# | `sharpness_aware` | your own | | | |
#
# `monge` lifts any of them by one scalar, norms too: `sharpness_aware(grad_fn, metric=monge(adaptive()))`.
# `alpha` is the height of the loss surface: 0 is the base, 1 the paper's M-SAM, and the larger, the closer
# to gradient descent. `monge_sam(grad_fn, rho=0.05, loss_budget=0.5)` says it in units of the loss: no
# perturbation raises it by more than the budget, to first order.
#
# ## A radius for each group of leaves
#
# An optimizer holds one such transformation. A radius for each group of leaves is its metric's; labels are
# a tree that is a prefix of the params, or a function of them, as for `optax.partition`:

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import monge_sam_jax as ms

layers = {"hidden": jnp.ones((3, 2)), "out": jnp.ones(2)}
labels = {"hidden": "slow", "out": "fast"}
metric = ms.grouped({"slow": ms.monge(), "fast": ms.scaled(ms.monge(), 0.1)}, labels)
delta = ms.worst_case_perturbation(metric, layers, layers, rho=0.05)
print(jax.tree.map(lambda d: f"{jnp.linalg.norm(d):.4f}", delta))

tx = optax.chain(ms.sharpness_aware(metric=metric, rho=0.05), optax.adamw(1e-3))
updates, _ = tx.update(layers, tx.init(layers), layers, grad_fn=lambda params: params)

# %% [markdown]
# ## One of your own
#
# A metric is a pair of pure functions: `init(params)` makes its state, `ascent(grads, params, state)` says where $\delta$
# points (`tangent`, any positive multiple of $G^{-1} g$), how long that is in the metric (`length`), and the
# rise $\sqrt{g^\top G^{-1} g}$ of the loss at $\rho = 1$, to first order (`dual_norm`). One that shrinks some coordinates:


# %%
def weighted(weights):
    """G = diag(weights)."""

    def ascent(grads, params, state):
        v = jax.tree.map(lambda g, w: g / w, grads, weights)
        dual_norm = jnp.sqrt(optax.tree.vdot(grads, v))
        return ms.Ascent(v, dual_norm, length=dual_norm), state

    return ms.Metric(init=lambda params: (), ascent=ascent)


params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([2.0, 1.0, -1.0])}
metric = weighted({"w": jnp.array([1.0, 4.0, 9.0])})
delta = ms.worst_case_perturbation(metric, grads, params, rho=0.05)
tx = ms.sharpness_aware(lambda params: params, metric=ms.monge(metric), rho=0.05)

# %% [markdown]
# What a test of it asks, with the matrix written out:

# %%
G, g = np.diag([1.0, 4.0, 9.0]), np.array([2.0, 1.0, -1.0])
expected = 0.05 * np.linalg.solve(G, g) / np.sqrt(g @ np.linalg.solve(G, g))
np.testing.assert_allclose(delta["w"], expected, rtol=1e-6)

lifted = ms.worst_case_perturbation(ms.monge(metric), grads, params, rho=0.05)
G = G + np.outer(g, g)  # eq. 7
expected = 0.05 * np.linalg.solve(G, g) / np.sqrt(g @ np.linalg.solve(G, g))
np.testing.assert_allclose(lifted["w"], expected, rtol=1e-6)
print(lifted["w"])

# %% [markdown]
# - It works under `jit`, `vmap`, masks, devices and schedules as the others do, since it is only
#   asked for a direction.
# - A zero gradient must give a zero `tangent` and a `dual_norm` and `length` that are no cause of a NaN. The easiest way is to build on
#   `euclidean()`, whose norms are guarded and neither overflow nor underflow; `jnp.sqrt` as above has an
#   infinite derivative at zero.
# - What it keeps from step to step is its state: arrays in a NamedTuple. A stateless metric goes with the functional form too.
# - If it depends on rho, give `metric=` a function of rho.
# - Pulling back the Euclidean metric along a map is `pullback(phi)`; a preconditioner of Optax is `preconditioned(tx)`.
#
# [The table of methods](07_methods.ipynb) shows metrics, ascents and descents that are written by hand.
