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
# # Is it working? What to log, and what to look at
#
# Every state has scalars that come with the norm that the step needs anyway; `measure=True` adds three that take another pass
# over params and gradients, and no other gradient.
#
# | name | what | look for |
# |---|---|---|
# | `grad_norm` | $\lVert g \rVert$ of the first gradient | M-SAM differs from SAM where it is above one |
# | `dual_norm` | $\lVert g \rVert_{G^{-1}}$, in the metric | |
# | `perturbation_norm` | $\lVert \delta \rVert$, before rounding | M-SAM: well below rho means that the loss is steep, or summed or scaled by mistake |
# | `effective_radius` | $\lVert \delta \rVert / \lVert g \rVert$, the paper's $\tilde \rho$ | times the largest eigenvalue of the Hessian near one: at the edge of stability ([geometry](22_geometry.ipynb)) |
# | `predicted_sharpness` | $g^\top \delta$, the rise of the loss to first order | a small part of the loss: rho hardly matters yet |
# | `cosine` | of the two gradients | near 1: the second gradient says nothing new; below 0: the slope has turned over within rho |
# | `curvature` | $\delta^\top (g' - g) / \lVert \delta \rVert^2$ | the sharpness along the gradient; should fall |
# | `realised_norm` | what rounding left of $\delta$ | far below `perturbation_norm`: `widen_params=True` ([precision](17_precision.ipynb)) |

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from monge_sam_jax import get_diagnostics, monge_sam, sam
from monge_sam_jax.experiments.common.plots import COLOURS, LABELS, NOTEBOOK, WIDTH

x = jax.random.normal(jax.random.key(0), (64, 10))
y = jnp.sign(x[:, 0] * x[:, 1])
params = {
    "hidden": jax.random.normal(jax.random.key(1), (10, 32)),
    "out": jax.random.normal(jax.random.key(2), (32,)) / 4,
}


def loss_fn(params):
    margins = y * (jax.nn.relu(x @ params["hidden"]) @ params["out"])
    return jnp.mean(jax.nn.softplus(-margins))


def train(builder, steps=300):
    tx = optax.chain(builder(jax.grad(loss_fn), rho=0.5, measure=True), optax.sgd(0.2))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), get_diagnostics(state)

    return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]


plt.rcParams.update(NOTEBOOK)
PANELS = {
    "perturbation_norm": r"length $\|\delta\|$",
    "cosine": "cosine of the gradients",
    "curvature": r"curvature along $\delta$",
}
figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6))
for name, builder in {"sam": sam, "monge_sam": monge_sam}.items():
    log = train(builder)
    for ax, (quantity, label) in zip(axes, PANELS.items(), strict=True):
        ax.plot(getattr(log, quantity), color=COLOURS[name], label=LABELS[name])
        ax.set(xlabel="step", ylabel=label)
    print(f"{LABELS[name]:5} curvature {log.curvature[0]:.3f}, at the end {log.curvature[-1]:.3f}")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)

# %% [markdown]
# With `make_train_step(..., diagnostics=True)` and `sharpness_aware_value_and_grad(..., diagnostics=True)`
# they are returned. `get_diagnostics` finds them at any depth of an Optax state. On steps that do not perturb they are those of
# the last perturbation.
#
# What the sharpness of a trained network is, and where it must settle, is [another page](22_geometry.ipynb).
