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
# # Which points attract (eqs. 10 and 11, figure 4)
#
# Around a point $\theta$ the sharpness-aware flow is governed by
# $A = (H(\theta + \delta) [I + \tilde\rho H(\theta)])^\top$ (eq. 10), with the effective radius
# $\tilde\rho = \|\delta\| / \|g\|$, and the point attracts if all eigenvalues of $A$ have positive
# real part. At an equilibrium they are $\lambda + \tilde\rho \lambda^2$, so that a large enough
# radius makes any saddle or maximum attract: above $-1 / \lambda$ (eq. 11).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from monge_sam_jax import euclidean, monge
from monge_sam_jax.curvature import hessian
from monge_sam_jax.experiments.common.plots import LABELS, NOTEBOOK, WIDTH
from monge_sam_jax.experiments.figures.plots import banana_contours, plane
from monge_sam_jax.stability import critical_radius, stability_eigenvalues
from monge_sam_jax.toy import banana

plt.rcParams.update(NOTEBOOK)
at_saddle = jnp.linalg.eigvalsh(hessian(banana, jnp.zeros(2)))
print("Hessian at the saddle:", at_saddle, "critical radius:", critical_radius(at_saddle))

# %% [markdown]
# The smaller eigenvalue $\lambda_2$ over the plane, for the banana, on a grid of 200 x 200: red
# attracts. We count the points that do around the saddle, and around the flattest minima.

# %%
axis = (jnp.arange(200) + 0.5) / 50 - 2  # none is the saddle or a minimum: A is undefined there
points = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)


def smaller_eigenvalue(metric, rho):
    at = lambda t: stability_eigenvalues(banana, t, metric=metric, rho=rho).real.min()
    return np.asarray(jax.jit(jax.vmap(jax.vmap(at)))(points))


def share(smaller, centres, half_side):
    near = [np.all(np.abs(points - c) < half_side, axis=-1) for c in centres]
    return f"{np.mean(smaller[np.any(near, axis=0)] > 0):4.0%}"


metrics = {"sam": euclidean(), "monge_sam": monge()}
figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5), sharex=True, sharey=True)
print("attracting, within    1/4, 1/2 of the saddle; 1/4, 1/2 of a flattest minimum")
for column, rho in zip(axes.T, (0.25, 0.5, 1.0), strict=True):
    for ax, (name, metric) in zip(column, metrics.items(), strict=True):
        smaller, extent = smaller_eigenvalue(metric, rho), (-2, 2, -2, 2)
        image = ax.imshow(smaller, cmap="RdBu_r", vmin=-4, vmax=4, origin="lower", extent=extent)
        plane(ax, (-2, -2), (2, 2))
        banana_contours(ax)
        ax.set_title(rf"{LABELS[name]}, $\rho$ = {rho}")
        ax.label_outer()
        shares = [share(smaller, at, side) for at in ([0], [-1, 1]) for side in (0.25, 0.5)]
        print(f"rho = {rho:4}, {LABELS[name]:8}", *shares)
figure.colorbar(image, ax=axes, extend="both", label=r"smaller eigenvalue $\lambda_2$ of $A$")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

# %% [markdown]
# Within half a unit of the saddle M-SAM attracts from fewer points than SAM, and near the flat
# minima from more, at $\rho = 0.25$ and $0.5$. At $\rho = 1$ the claim no longer holds everywhere:
# within a quarter of the saddle M-SAM's area is the larger one, and neither attracts near the flat
# minima.
