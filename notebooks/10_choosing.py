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
# # Which method, and which radius?
#
# A sharpness-aware step takes the gradient not at the params $\theta$ but at the worst point $\theta + \delta$ of a small ball
# around them; the methods differ in what a ball is, and in how many gradients they take. Start with one of these:
#
# | method | first `rho`, then | gradients a step | take it | leave it |
# |---|---|---|---|---|
# | `monge_sam` | 0.05, then 0.2, 1 | 2 | fine-tuning, a large rho, learning rates that are not tuned | where the loss is a sum or scaled: its length depends on the scale |
# | `sam` | 0.05, then 0.2, 1 | 2 | to compare with what is published | with a rho so large that training falls apart: `monge_sam` bears more |
# | `adaptive_sam` | 0.5, then 2, 10 | 2 | wrong labels; weights that differ much in size | where weights begin at zero, as in new adapters: they are hardly perturbed |
# | `one_pass_sam` | 0.05, then 0.2, 1; rising over a tenth of training, then falling to 0 | 1 | where two gradients a step are too many | at a constant rho to the end: it circles around minima, and falls apart sooner |
# | `sam`, `when=` the last tenth | 0.05, then 0.2, 1 | 1.1 | training that is long already | from a bad minimum: it gains less there |
#
# None of them pays where the test error is not one of generalising: where training losses are tiny, as in
# regressions to high accuracy, or where the data are fresh at every step (one pass over a text), two
# gradients a step cost more than flatness gives. [What it is worth](study.md) has the numbers.
#
# Tune the learning rate first, and stop early: with wrong labels most of what a sharpness-aware method gains over plain
# training that is not tuned, a smaller rate or fewer steps gain as well. Then try radii at that rate.
#
# ## The radius
#
# `rho` is the length of $\delta$ in the units of the params: their Euclidean length, all together. For
# `adaptive_sam` it is relative to the weights, for `supremum` the move of each entry. Published values are for networks
# of millions of params: 0.05 for SAM, ten times that for ASAM. Where the network is small and the
# labels are wrong, the best radii were far larger, and were often the largest that was tried: at 0.05
# next to nothing was gained. So try a line of them on validation samples, a factor of three to five apart, until
# training falls apart. As training goes on M-SAM's length approaches rho, where SAM's is rho from the start, so both have the
# same line.
#
# A radius may change with time; every builder takes an Optax schedule of the step count. In one pass that is worth the
# most: [of what was tried](study.md#radius-of-one-pass) the best rises over a tenth of training, and then falls to zero.

# %%
import jax
import jax.numpy as jnp
import optax

import monge_sam_jax as ms


def loss_fn(params):
    return jnp.sum((params["w"] ** 2 - 1) ** 2) / 4


steps = 200


def radius(count):
    return 0.3 * jnp.minimum(1, 10 * count / steps) * jnp.maximum(0, 1 - count / steps)


tx = ms.one_pass_sam(optax.sgd(0.05), rho=radius)
params = {"w": jnp.array([0.3, -2.0])}
opt_state = tx.init(params)
update = jax.jit(tx.update)
for _ in range(steps):
    updates, opt_state = update(jax.grad(loss_fn)(params), opt_state, params)
    params = optax.apply_updates(params, updates)
print(loss_fn(ms.unperturbed_params(opt_state, params)))

# %% [markdown]
# ## Where its methods come from
#
# Every method is one formula (eqs. 5 and 8 of the Monge SAM paper) for a metric $G$, and [writing a metric](20_metrics.ipynb) has
# the whole table of balls:
#
# $$
# \delta^* = \operatorname{argmax}_{\delta^\top G \delta \le \rho^2} g^\top \delta
# = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}
# $$
#
# SAM ($G = I$) has steps as long as ever where the gradient is large, so that a large rho can be drawn to saddle points.
# Monge SAM ($G = I + g g^\top$, the metric of the loss surface) divides them by $\sqrt{1 + \lVert g \rVert^2}$:
# conservative where the loss is steep, SAM where it is flat. `alpha` is the height of the loss surface:
# 0 is SAM, 1 the paper's M-SAM, and the larger, the closer to gradient descent.
# `monge_sam(grad_fn, rho=0.05, loss_budget=0.5)` says it in units of the loss: no perturbation raises it by
# more than the budget, to first order. [Some forty published methods](07_methods.ipynb) are one line each.
#
# ## Before you judge
#
# - Compare at equal gradients: plain training may take twice the steps.
# - Several seeds, and intervals of differences over pairs of equal seeds.
# - Choose radii on validation samples, for every method of as many.
# - Look at the [diagnostics](21_diagnostics.ipynb): a radius that is lost to rounding, or that never bites, is no
#   result about the method.
