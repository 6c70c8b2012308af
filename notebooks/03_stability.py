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
# Around a point theta the sharpness-aware flow is governed by
# A = (H(theta + delta) [I + rho_tilde H(theta)])^T (eq. 10), with the effective radius
# rho_tilde = |delta| / |g|, and the point attracts if all eigenvalues of A have positive real part.
# At an equilibrium they are lambda + rho_tilde lambda^2, so that a large enough radius makes any
# saddle or maximum attract: above -1 / lambda (eq. 11).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from monge_sam_jax import euclidean, monge
from monge_sam_jax.curvature import hessian
from monge_sam_jax.stability import critical_radius, stability_eigenvalues
from monge_sam_jax.toy import banana

at_saddle = jnp.linalg.eigvalsh(hessian(banana, jnp.zeros(2)))
print("Hessian at the saddle:", at_saddle, "critical radius:", critical_radius(at_saddle))

# %% [markdown]
# The smaller eigenvalue over the plane, for the banana: red attracts.

# %%
axis = jnp.linspace(-2, 2, 120)  # an even number leaves out the saddle, where A is undefined
points = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)


def smaller_eigenvalue(metric, rho):
    at = lambda t: stability_eigenvalues(banana, t, metric=metric, rho=rho).real.min()
    return np.asarray(jax.jit(jax.vmap(jax.vmap(at)))(points))


near = {"saddle": np.abs(points).max(-1) < 0.5, "flat": np.abs(np.abs(points) - 1).max(-1) < 0.5}
near["flat"] &= np.asarray(points[..., 0] * points[..., 1] > 0)
figure, axes = plt.subplots(2, 3, figsize=(8, 5), layout="constrained", sharex=True, sharey=True)
for row, (name, metric) in zip(axes, {"SAM": euclidean(), "M-SAM": monge()}.items(), strict=True):
    for ax, rho in zip(row, (0.25, 0.5, 1.0), strict=True):
        smaller = smaller_eigenvalue(metric, rho)
        ax.imshow(smaller, cmap="RdBu_r", vmin=-4, vmax=4, origin="lower", extent=(-2, 2, -2, 2))
        ax.set(title=f"{name}, rho = {rho}")
        shares = ", ".join(f"{np.mean(smaller[at] > 0):.0%} {place}" for place, at in near.items())
        print(f"{name:5} rho = {rho:4}: attracting near {shares}")

# %% [markdown]
# Within half a unit of the saddle M-SAM attracts from fewer points than SAM, and near the flat
# minima from more, at rho = 0.25 and 0.5. At rho = 1 the claim no longer holds everywhere: within a
# quarter of the saddle M-SAM's area is the larger one, and neither attracts near the flat minima.
