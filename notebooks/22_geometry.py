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
# # How flat is my minimum, and where does the theory say it should be?
#
#
# `monge_sam_jax.curvature` has Hessian, Gauss-Newton and Fisher products, spectral densities and top
# eigenvalues under `jit` and of sharded params, traces, sharpness and slices of the loss on any tree of
# params; `monge_sam_jax.stability` the theory of eqs. 10 and 11, edges of stability for two passes and one,
# and the circle on which one pass moves; `monge_sam_jax.toy` the toy losses.

# %%
import jax
import jax.numpy as jnp
import numpy as np

from monge_sam_jax import (
    euclidean,
    functional_sam_value_and_grad,
    geodesic_perturbation,
    monge,
    worst_case_perturbation,
)
from monge_sam_jax.curvature import (
    hessian,
    hessian_trace,
    lanczos_eigenvalues,
    sharpness,
    spectral_density,
    top_eigenvalues,
)
from monge_sam_jax.stability import (
    critical_radius,
    edge_of_stability,
    is_attractor,
    one_pass_edge_of_stability,
    stability_eigenvalues,
)
from monge_sam_jax.toy import banana, trajectory

key = jax.random.key(0)
x = jax.random.normal(key, (32, 4))
params = {"w": jax.random.normal(key, (4, 8)) / 2, "v": jnp.ones(8) / 8}


def loss_fn(params):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - x[:, 0]) ** 2)


# %% [markdown]
# ## Curvature
#
# Nothing here forms the Hessian, but for `hessian`, which is for small problems and here the check.

# %%
exact = np.linalg.eigvalsh(np.asarray(hessian(loss_fn, params)))
(largest,) = top_eigenvalues(loss_fn, params, tol=1e-5)
inside_jit, error = jax.jit(lambda p: lanczos_eigenvalues(loss_fn, p, key))(params)
trace, standard_error = hessian_trace(loss_fn, params, key)
print(f"largest eigenvalue {largest:.4f}, under jit {inside_jit[0]:.4f}, exactly {exact[-1]:.4f}")
print(f"trace {trace:.2f} ± {standard_error:.2f}, exactly {exact.sum():.2f}")
print(f"rise of the loss within 0.1: {sharpness(loss_fn, params, metric=euclidean(), rho=0.1):.4f}")
points, density = spectral_density(loss_fn, params, key)

# %% [markdown]
# For a loss over a data set, `mean_over_data(function, data, batch_size)` is the mean over batches in a loop that is
# compiled, `mean_over_batches` one on the host.
#
# ## Stability
#
# Near an equilibrium a step along the gradient at $\theta + \delta$ is attracted by what
# $A_\rho = (I + \tilde\rho H) H$ attracts (eqs. 10 and 11): saddles and maxima too, from a critical radius on.

# %%
saddle = np.linalg.eigvalsh(np.asarray(hessian(banana, jnp.zeros(2))))
print("saddle of the banana: eigenvalues", saddle, "critical radius", critical_radius(saddle))
for rho in (0.0, 0.5):
    eigenvalues = stability_eigenvalues(banana, jnp.array([0.1, 0.1]), metric=euclidean(), rho=rho)
    print(f"rho {rho}: near it attracted, {is_attractor(eigenvalues)}")

rate, radius = 0.1, 0.025  # the learning rate, and |delta| / |g|
print(f"sharpness settles at {edge_of_stability(rate):.1f} in gradient descent,")
print(f"at {edge_of_stability(rate, radius):.1f} in two passes,")
print(f"at {one_pass_edge_of_stability(rate, radius):.1f} in one")

# %% [markdown]
# [Edges of stability](claims.md) compares that with trained networks.
#
# ## Beyond the formula
#
# `geodesic_perturbation` follows the geodesic of the Monge metric in place of its tangent; it costs more gradients, and differs
# in length alone to first order. `functional_sam_value_and_grad` perturbs the model and not the loss of its outputs
# (Singh et al. 2025).

# %%
start = jnp.array([-1.5, 0.5])
tangent = worst_case_perturbation(monge(), jax.grad(banana)(start), start, rho=0.3)
print("geodesic", geodesic_perturbation(banana, start, rho=0.3), "tangent", tangent)

robust = functional_sam_value_and_grad(
    lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
    lambda outputs, x: jnp.mean((outputs - x[:, 0]) ** 2),
    metric=euclidean(),
    rho=0.05,
)
loss, grads = robust(params, x)

path = trajectory(banana, start, metric=monge(), rho=1.0, learning_rate=0.01, steps=200)
print("M-SAM on the banana ends at", path[-1])

# %% [markdown]
# The stories behind these tools are told with pictures: [the banana](01_banana.ipynb), [maxima and
# cycles](02_maxima_and_cycles.ipynb), [stability](03_stability.ipynb), [invariance](04_invariance.ipynb).
