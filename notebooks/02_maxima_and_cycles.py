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
# # Attraction to a maximum, and limit cycles (figures 2 and 3)
#
# SAM can be drawn to any equilibrium, maxima included. On $5 \sin(r) / r$, $r = \theta_1^2 +
# \theta_2^2$, with its maximum at the origin, we count how many of 200 starts end within 0.2 of it.
# The paper's "centered unit square" can be read in two ways.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq

from monge_sam_jax import euclidean, monge
from monge_sam_jax.experiments.common.plots import COLOURS, LABELS, NOTEBOOK, WIDTH
from monge_sam_jax.toy import paraboloid, sinc, trajectory

plt.rcParams.update(NOTEBOOK)
METHODS = {"sam": euclidean(), "monge_sam": monge()}

unit = np.random.default_rng(0).uniform(-1, 1, (200, 2))
for side in (0.5, 1.0):
    for rho in (0.2, 1.0):
        for name, metric in METHODS.items():
            starts = jnp.asarray(side * unit)
            options = {"rho": rho, "learning_rate": 0.05, "steps": 200}
            ends = trajectory(sinc, starts, metric=metric, **options)[-1]
            share = np.mean(np.linalg.norm(ends, axis=-1) < 0.2)
            print(
                f"[-{side}, {side}]^2, rho = {rho}: at the maximum {share:4.0%} of {LABELS[name]}'s"
            )

# %% [markdown]
# A larger $\rho$ makes the maximum attract more, and M-SAM is drawn to it less: clearly so from
# $[-1, 1]^2$, hardly from $[-1/2, 1/2]^2$, and not at all at $\rho = 0.2$.
#
# Figure 3: one dimension, $\theta^2$, $\rho = 0.3$. With learning rate $a$, SAM steps to
# $\theta - 2 a (\theta + \rho \operatorname{sign} \theta)$, which jumps between
# $\pm a \rho / (1 - a)$ forever. M-SAM's cycle solves
# $(1 - a) |\theta| \sqrt{1 + 4 \theta^2} = a \rho$, and lies lower.

# %%
figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8), sharey=True)
for ax, a in zip(axes, (0.66, 0.74), strict=True):
    cycles = {
        "sam": a * 0.3 / (1 - a),
        "monge_sam": brentq(lambda t, a=a: (1 - a) * t * np.sqrt(1 + 4 * t**2) - a * 0.3, 0, 1),
    }
    for name, metric in METHODS.items():
        start, options = jnp.array([0.5]), {"rho": 0.3, "learning_rate": a, "steps": 11}
        size = jnp.abs(trajectory(paraboloid, start, metric=metric, **options))[:, 0]
        color, label = COLOURS[name], LABELS[name]
        ax.plot(size, "o-", color=color, label=label, markersize=3)
        ax.axhline(cycles[name], color=color, linestyle="--", label=f"limit cycle of {label}")
        print(f"a = {a}: {label:5} at {size[-1]:.4f} after 11 steps, cycle at {cycles[name]:.4f}")
    ax.set(title=f"learning rate $a$ = {a}", xlabel="step")
axes[0].set_ylabel(r"distance from the minimum $|\theta|$")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

# %% [markdown]
# So neither method diverges at 0.74, as the paper has it: both climb to a cycle that attracts.
