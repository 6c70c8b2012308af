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
# # The banana: saddles and flat minima (figures 1 and 5)
#
# The loss $(1 - \theta_1 \theta_2)^2$ has a valley of minima at $\theta_1 \theta_2 = 1$, flattest
# at $(1, 1)$ and $(-1, -1)$, and a saddle at $(0, 0)$. From the same start, with $\rho = 1$,
# gradient descent stops where it meets the valley, SAM is drawn to the saddle, and M-SAM walks
# along the valley to the flattest minimum.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from monge_sam_jax import adaptive, diagonal_fisher, euclidean, monge
from monge_sam_jax.experiments.common.plots import COLOURS, NOTEBOOK, WIDTH
from monge_sam_jax.experiments.figures.plots import LABELS, banana_contours, plane
from monge_sam_jax.toy import banana, trajectory

plt.rcParams.update(NOTEBOOK)
METHODS = {
    "sgd": None,  # the whole gradient here
    "sam": euclidean(),
    "monge_sam": monge(),
    "fisher_sam": diagonal_fisher(),
    "adaptive_sam": adaptive(),
}


def run(name, starts, steps=200):
    options = {"rho": 1.0, "learning_rate": 0.01, "steps": steps}
    return np.asarray(trajectory(banana, starts, metric=METHODS[name], **options))


# %%
figure, ax = plt.subplots(figsize=(WIDTH / 2, 4))
plane(ax, (-2.7, -1.8), (0.9, 1.8))
banana_contours(ax)
for name in ("sgd", "sam", "monge_sam"):
    path = run(name, jnp.array([-1.5, 0.5]))
    ax.plot(*path.T, color=COLOURS[name], label=LABELS[name])
    (t1, t2), loss = path[-1], banana(path[-1])
    print(f"{LABELS[name]:5} ends at ({t1:.3f}, {t2:.3f}) with a loss of {loss:.2g}")
ax.plot(-1.5, 0.5, "ks", markersize=4, label="start")
figure.legend(loc="outside lower center", ncols=2)

# %% [markdown]
# M-SAM ends at a much lower loss than SAM, but not as low as gradient descent: it goes on hopping
# across the valley.
#
# Figure 5: a grid of starts, and where they end after 200 steps: within 0.3 of the saddle, or of
# one of the two flattest minima. Ten of the hundred lie on the line $\theta_2 = -\theta_1$, from
# which gradient descent itself runs into the saddle: that is the floor.

# %%
axis = jnp.linspace(-3, 3, 10)
starts = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def shares(ends):
    to_flattest = np.minimum(*(np.linalg.norm(ends - c, axis=-1) for c in (-1, 1)))
    at_saddle = np.linalg.norm(ends, axis=-1) < 0.3
    return f"{at_saddle.mean():.0%} at the saddle, {np.mean(to_flattest < 0.3):.0%} at a flattest"


figure, axes = plt.subplots(1, 5, figsize=(WIDTH, 2.2), sharey=True)
for ax, name in zip(axes, METHODS, strict=True):
    plane(ax, (-3.3, -3.3), (3.3, 3.3))
    banana_contours(ax)
    paths = run(name, starts)
    ax.plot(*paths.T.swapaxes(1, 2), color=COLOURS[name], linewidth=0.3, alpha=0.6)
    style = {"color": COLOURS[name], "markersize": 3, "zorder": 7}  # above saddle and minima
    ax.plot(*paths[-1].T, "o", **style, label="in colour: ends")
    ax.set_title(LABELS[name])
    ax.label_outer()
    print(f"{LABELS[name]:10} {shares(paths[-1])}")
print(f"ASAM, 5000 steps: {shares(run('adaptive_sam', starts, steps=5000)[-1])}")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)

# %% [markdown]
# SAM goes to the saddle twice as often as M-SAM, and M-SAM and Fisher SAM agree, as the paper says.
# That ASAM "does generally not find one of the flattest solutions" is an effect of stopping after
# 200 steps: after 5000 it is there from 90 % of the starts, more often than any other.
