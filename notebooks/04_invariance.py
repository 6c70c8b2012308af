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
# # Invariance, said exactly
#
# Train in other coordinates $\psi$ of the same params, $\theta = \varphi(\psi)$. Does the method
# take the same step? The paper calls M-SAM invariant to reparameterisation. That is so for its
# metric *pulled back*, $J^\top J + g g^\top$, and to first order. It is not so for the formula
# $I + g g^\top$ applied afresh in the new coordinates, which is what running M-SAM on $\psi$ does.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from monge_sam_jax import adaptive, euclidean, monge, pullback, worst_case_perturbation
from monge_sam_jax.experiments.common.plots import COLOURS, NOTEBOOK
from monge_sam_jax.experiments.figures.plots import banana_contours, plane
from monge_sam_jax.toy import banana, trajectory

plt.rcParams.update(NOTEBOOK)
MAPS = {
    "θ = (2, ½) ψ": lambda psi: jnp.array([2.0, 0.5]) * psi,
    "θ = ψ³ + ψ": lambda psi: psi**3 + psi,
}


def perturbation(metric, loss, point):
    return worst_case_perturbation(metric, jax.grad(loss)(point), point, rho=0.1)


# %% [markdown]
# We compare $J \delta_\psi$, the perturbation as it appears in $\theta$, with $\delta_\theta$.

# %%
psi = jnp.array([-0.8, 0.6])
for title, phi in MAPS.items():
    print(title)
    theta, J = phi(psi), jax.jacobian(phi)(psi)
    methods = {
        "SAM": (euclidean(), euclidean()),
        "ASAM, eta = 0": (adaptive(0.0), adaptive(0.0)),
        "M-SAM, formula reapplied": (monge(), monge()),
        "M-SAM, metric pulled back": (monge(), monge(pullback(phi, diagonal=True))),
    }
    for name, (in_theta, in_psi) in methods.items():
        expected = perturbation(in_theta, banana, theta)
        actual = J @ perturbation(in_psi, lambda psi, phi=phi: banana(phi(psi)), psi)
        error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
        print(f"  {name:26} differs by {error:8.2%}")

# %% [markdown]
# ASAM with $\eta = 0$ is invariant to scalings of single params, for which it was made, and to
# nothing else. The metric pulled back is invariant under both maps. For a nonlinear map that means
# the tangent step: $\varphi(\psi + \delta)$ differs from $\theta + \delta$ by a term of order
# $\rho^2$.
#
# Descent is another matter. The gradient step itself, $\psi - a \nabla_\psi \ell$, depends on the
# coordinates, so whole trajectories differ whatever the perturbation: here M-SAM's, with the metric
# pulled back. (Along $(J^\top J)^{-1} \nabla_\psi \ell$ they agree: exactly for linear maps,
# otherwise to first order.)

# %%
figure, ax = plt.subplots(figsize=(4.5, 4.2))
plane(ax, (-1.9, -1.8), (2.3, 1.8))
banana_contours(ax)
coordinates = {"θ itself": lambda psi: psi, **MAPS}
for (title, phi), dashes in zip(coordinates.items(), ("-", "--", ":"), strict=True):
    psi0 = theta0 = jnp.array([-1.5, 0.5])
    for _ in range(20):  # Newton's method for phi(psi0) = theta0
        psi0 -= jnp.linalg.solve(jax.jacobian(phi)(psi0), phi(psi0) - theta0)
    path = trajectory(
        lambda psi, phi=phi: banana(phi(psi)),
        psi0,
        metric=monge(pullback(phi, diagonal=True)),
        rho=0.1,
        learning_rate=0.01,
        steps=500,
    )
    ax.plot(*phi(path).T, dashes, color=COLOURS["monge_sam"], label=f"M-SAM, {title}")
ax.plot(*theta0, "ks", markersize=4, label="start")
figure.legend(loc="outside lower center", ncols=2)
