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
# # Which published method is which line here?
#
# A sharpness-aware step takes a first gradient $g = \nabla \ell(\theta)$, a perturbation $\delta$,
# a second gradient $g' = \nabla \ell(\theta + \delta)$, and hands an optimizer what is followed,
# $d$. Methods differ in four choices, the slots of `sharpness_aware` and of the named builders:
#
# | slot | what it says | without it |
# |---|---|---|
# | `ascent` | which way is up: a vector $a$ in place of $g$, an Optax transformation | $a = g$ |
# | `metric` | what a ball is: $\delta$ maximises $a^\top \delta$ in a ball of radius $\rho$ | |
# | `descent` | what is followed, given both gradients | $d = g'$ |
# | `when`, `period` | at which steps; the others take one gradient | every step |
#
# `mask` says which leaves of the params are perturbed. Where a row does not say otherwise,
# $\delta = \rho \, a / \lVert a \rVert$, $a = g$ and $d = g'$. A line is the first link of a chain,
# `optax.chain(LINE, optax.sgd(0.1))`, unless it has a learning rate of its own. Every row is a
# test: six steps in 64 bits, against a loop in NumPy that says the formula literally; the gradients
# of the last column are counted. What is called by a bare name is written out below the table.

# %% [markdown]
# | method | year | reference | formula | line | gradients per step |
# |---|---|---|---|---|---|
# | SAM | 2020 | Foret et al. | $\delta = \rho g / \lVert g \rVert$ | `ms.sam(grad_fn, rho=0.3)` | 2 |
# | Monge SAM | | Jacobsen, Arvanitidis | $\delta = \rho g / (\lVert g \rVert \sqrt{1 + \alpha^2 \lVert g \rVert^2})$ | `ms.monge_sam(grad_fn, rho=0.3, alpha=2.0)` | 2 |
# | Monge SAM, loss budget | | this package | $\lVert \delta \rVert^{-2} = \rho^{-2} + (\lVert g \rVert / \sigma)^2$, along $g$ | `ms.monge_sam(grad_fn, rho=0.3, loss_budget=0.1)` | 2 |
# | Monge SAM, averaged | | Jacobsen, Arvanitidis, section 6 | $G = I + \frac{1}{r} \sum_i g_i g_i^\top$ over the last $r$ steps | `ms.sharpness_aware(grad_fn, metric=ms.averaged_monge(history=2), rho=0.3)` | 2 |
# | Monge SAM over ASAM | | Jacobsen, Arvanitidis, eq. 7 | $G = T^{-2} + \alpha^2 g g^\top$ | `ms.sharpness_aware(grad_fn, metric=ms.monge(ms.adaptive(eta=0.01), alpha=1.0), rho=0.3)` | 2 |
# | SAM in other coordinates | | Jacobsen, Arvanitidis, section 3.1 | $G = J^\top J$, $J$ the Jacobian of $\phi$ | `ms.sharpness_aware(grad_fn, metric=ms.pullback(lambda p: jax.tree.map(jnp.sinh, p), diagonal=True), rho=0.3)` | 2 |
# | ASAM | 2021 | Kwon et al. | $\delta = \rho T^2 g / \lVert T g \rVert$, $T = \mathrm{abs}(\theta) + \eta$ | `ms.adaptive_sam(grad_fn, rho=0.3, eta=0.01)` | 2 |
# | Fisher SAM | 2022 | Kim et al. | $\delta = \rho F^{-1} g / \sqrt{g^\top F^{-1} g}$, $F = 1 + \eta g^2$ | `ms.fisher_sam(grad_fn, rho=0.3, eta=1.0)` | 2 |
# | SAM, p = infinity | 2020 | Foret et al., eq. 2 | $\delta = \rho \, \mathrm{sign}(g)$ | `ms.sharpness_aware(grad_fn, metric=ms.supremum(), rho=0.1)` | 2 |
# | SAM, layer by layer | | this package | $\delta_l = \rho g_l / \lVert g_l \rVert$ in every leaf $l$ | `ms.sharpness_aware(grad_fn, metric=ms.layerwise(ms.euclidean()), rho=0.3)` | 2 |
# | SAM, spectral ball | | this package; Jordan et al. 2024 (Muon) | $\delta_l = \rho U V^\top$, $g_l = U \Sigma V^\top$ | `ms.sharpness_aware(grad_fn, metric=ms.spectral(), rho=0.3)` | 2 |
# | LayerSAM | 2022 | Liu et al. (LookSAM) | $a_l = \lVert \theta_l \rVert g_l / \lVert g_l \rVert$ | `ms.sam(grad_fn, rho=0.3, ascent=optax.scale_by_trust_ratio())` | 2 |
# | Preconditioned SAM | 2025 | Zhang et al. | $\delta = \rho P g / \sqrt{g^\top P g}$, $P$ the optimizer's | `ms.sharpness_aware(grad_fn, metric=ms.preconditioned(optax.scale_by_rms(0.9)), rho=0.3)` | 2 |
# | USAM | 2022 | Andriushchenko, Flammarion | $\delta = \rho g$ | `ms.sharpness_aware(grad_fn, metric=resized(lambda n: n), rho=0.05)` | 2 |
# | LE-SAM | 2026 | Wang et al. | $\delta = \min(\rho, \sigma / \lVert g \rVert) \, g / \lVert g \rVert$ | `ms.sharpness_aware(grad_fn, metric=lambda rho: resized(lambda n: jnp.minimum(1.0, 0.1 / (rho * n))), rho=0.3)` | 2 |
# | SAGM | 2023 | Wang et al. | $\delta = (\rho / \lVert g \rVert - \alpha) g$, $d = g + g'$ | `ms.sharpness_aware(grad_fn, metric=lambda rho: resized(lambda n: 1 - 0.05 * n / rho), rho=0.3, descent=both())` | 2 |
# | VaSSO | 2023 | Li, Giannakis | $a_t = (1 - \lambda) a_{t-1} + \lambda g_t$ | `ms.sam(grad_fn, rho=0.3, ascent=optax.ema(0.6, debias=False))` | 2 |
# | Friendly SAM | 2024 | Li et al. | $a_t = g_t - \sigma m_t$, $m_t = \lambda m_{t-1} + (1 - \lambda) g_t$ | `ms.sam(grad_fn, rho=0.3, ascent=ascent.friendly(decay=0.6, weight=0.8))` | 2 |
# | ZSharp | 2025 | Yun | $a$ is $g$ where $\mathrm{abs}(z) \geq q$, else 0; $z = (g_l - \bar g_l) / s_l$ | `ms.sam(grad_fn, rho=0.3, ascent=ascent.z_score(top=0.4))` | 2 |
# | SAM along Adam's step | | this package | $a = \hat m / (\sqrt{\hat v} + \epsilon)$, Adam's averages of $g$ | `ms.sam(grad_fn, rho=0.3, ascent=optax.scale_by_adam())` | 2 |
# | GCSAM | 2025 | Hassan et al. | $a_l = g_l$ less its mean over all axes but the first | `ms.sam(grad_fn, rho=0.3, ascent=optax.centralize())` | 2 |
# | RWP | 2022 | Li et al. | $\delta = \rho \xi$, $\xi$ normal | `ms.sharpness_aware(grad_fn, metric=resized(lambda n: n), rho=0.1, ascent=noise(key))` | 2 |
# | m-RWP | 2024 | Li et al. | $\delta = \rho \xi$, $d = \lambda g' + (1 - \lambda) g$ | `ms.sharpness_aware(grad_fn, metric=resized(lambda n: n), rho=0.1, ascent=noise(key), descent=descent.weighted(gamma=1 / 3))` | 2 |
# | ESAM, weight perturbation | 2022 | Du et al. | $\delta = \rho \, b \odot g / (\beta \lVert g \rVert)$, $b$ is 1 with probability $\beta$, else 0 | `ms.sharpness_aware(grad_fn, metric=sparse(0.5, key), rho=0.3)` | 2 |
# | SAM-ON | 2023 | Mueller et al. | $\delta$ of the normalisation layers alone | `ms.sam(grad_fn, rho=0.3, mask={"kernel": False, "scale": True, "temperature": False})` | 2 |
# | GSAM | 2022 | Zhuang et al. | $d = g' - \alpha g_\perp$, $g_\perp$ what $g$ has across $g'$ | `ms.sam(grad_fn, rho=0.3, descent=descent.surrogate_gap(alpha=0.3))` | 2 |
# | WSAM | 2023 | Yue et al. | $d = g + \frac{\gamma}{1 - \gamma} (g' - g)$ | `ms.sam(grad_fn, rho=0.3, descent=descent.weighted(gamma=0.8))` | 2 |
# | Gradient norm penalty | 2022 | Zhao et al. | $d = (1 - \alpha) g + \alpha g'$, $\alpha = \gamma / (1 - \gamma)$, penalty $\alpha \rho \lVert g \rVert$ | `ms.sam(grad_fn, rho=0.3, descent=descent.weighted(gamma=1 / 6))` | 2 |
# | Stable SAM | 2024 | Tan et al. | $d = \lVert g \rVert g' / \lVert g' \rVert$ | `ms.sam(grad_fn, rho=0.3, descent=descent.stable())` | 2 |
# | LookSAM | 2022 | Liu et al. | between: $d = g + \alpha \lVert g \rVert v / \lVert v \rVert$, $v$ what the last $g'$ had across $g$ | `ms.sam(grad_fn, rho=0.3, descent=descent.look(alpha=0.4), period=3)` | 1 + 1/3 |
# | SAM late in training | 2024 | Zhou et al. | $\delta = 0$ before step $T$ | `ms.sam(grad_fn, rho=0.3, when=lambda count: count >= 3)` | 1 + 1/2 |
# | RST | 2022 | Zhao et al. | $\delta = 0$ with probability $1 - p$ | `ms.sam(grad_fn, rho=0.3, when=lambda count: jax.random.bernoulli(jax.random.fold_in(key, count), 0.5))` | 1 to 2 |
# | AE-SAM | 2023 | Jiang et al. | $\delta = 0$ unless $\lVert g \rVert^2 \geq \mu_t + c_t \sigma_t$ | `ms.sam(grad_fn, rho=0.3, when=when.gradient_is_large(0.3, decay=0.8))` | 1 to 2 |
# | AE-LookSAM | 2023 | Jiang et al. | both of the above | `ms.sam(grad_fn, rho=0.3, descent=descent.look(0.4), when=when.gradient_is_large(0.3, decay=0.8))` | 1 to 2 |
# | m-sharpness | 2020 | Foret et al.; mSAM of Behdin et al. | $d = \frac{1}{k} \sum_i g_i'$, each micro-batch with a $\delta_i$ | `ms.m_sharpness(ms.sharpness_aware_value_and_grad(loss_fn, metric=ms.euclidean(), rho=0.3), 2)` | 2 |
# | SAM with AdamW | 2021 | Chen et al. | $d$ goes through AdamW | `optax.chain(ms.sam(grad_fn, rho=0.3), optax.adamw(0.1, weight_decay=0.05))` | 2 |
# | S2-SAM | 2024 | Ji et al. | $\delta_{t+1} = \rho d_t / \lVert d_t \rVert$, $d_t = \nabla \ell(\theta_t + \delta_t)$ | `ms.one_pass_sam(optax.sgd(0.1), metric=ms.euclidean(), rho=0.3)` | 1 |
# | Monge SAM in one pass | | this package | the same with $G = I + d_t d_t^\top$ | `ms.one_pass_sam(optax.sgd(0.1), metric=ms.monge(), rho=0.3)` | 1 |
# | Momentum-SAM | 2024 | Becker et al. | $\delta_t = - \rho m_t / \lVert m_t \rVert$, down the momentum $m_t$ | `ms.one_pass_sam(optax.sgd(0.1, momentum=0.9), metric=ms.euclidean(), rho=0.3, direction="momentum", ascent=optax.scale(-1.0))` | 1 |
# | bSAM | 2023 | Moellenhoff, Khan | $\delta = \rho g / s$; $m \leftarrow b_1 m + (1 - b_1)(g' + \lambda \theta)$; $\theta \leftarrow \theta - \epsilon m / s$; $s \leftarrow b_2 s + (1 - b_2)(\sqrt{s} \, \mathrm{abs}(g) + \lambda)$ | `bsam(grad_fn, learning_rate=0.1, rho=0.1)` | 2 |

# %% [markdown]
# Where a line differs from its paper or from the authors' code:
#
# - Fisher SAM: the square of the batch's mean gradient (section 2.2 of the Monge SAM paper), and not
#   the mean over samples of the square.
# - LayerSAM: the direction is scaled layer by layer, and then to the length $\rho$ as a whole.
# - GCSAM: `optax.centralize` takes the first axis for the outputs, as in PyTorch; kernels of Flax
#   have it last. Where the second gradient is centred too, `optax.centralize()` follows in the chain.
# - SAGM: the sum, as in the paper; the authors' code follows the mean.
# - VaSSO, Friendly SAM: the averages begin at zero; authors' codes begin them at the first gradient.
# - ESAM: every entry is drawn; the authors' code draws whole tensors.
# - WSAM: the coupled form. The paper adds the second term to the step of the base optimizer, past
#   its preconditioner; with plain SGD this is the same.
# - GSAM, LE-SAM and AE-SAM let radius, budget and threshold follow schedules: `rho` and the
#   threshold take a schedule, of a budget there is none. `loss_budget` is the smooth minimum of
#   LE-SAM's two lengths.
# - LookSAM: lengths are those of all leaves together; some codes decompose every tensor by itself.
# - Momentum-SAM perturbs down the slope, against the momentum of gradients, as Nesterov's method
#   looks ahead; without `optax.scale(-1.0)` the line climbs. The momentum is one step old there and
#   here.
# - RWP would do with one gradient: hand zeros to `update` for the first. Its noise is of the same
#   size everywhere here, and both gradients of m-RWP are of one batch; in the authors' code noise
#   follows the sizes of filters, and the second gradient is of the next batch.
# - bSAM takes its first gradient at $\theta + \xi / \sqrt{N s}$, $\xi$ normal, which the training
#   loop does: `state[0].metric_state` is $s$. The line takes it where the loop does, and the loop of
#   the table at $\theta$. The authors' damping is part of the last $\lambda$.
# - m-sharpness is a function in place of `jax.value_and_grad`, with the optimizer after it.

# %% [markdown]
# ## The choices in each slot
#
# A published method is a choice in four slots, and any choice goes with any other, with masks,
# schedules and devices. All metrics are on [their page](20_metrics.ipynb).
#
# | slot | what it is | some choices |
# |---|---|---|
# | `ascent=` | which way is up: an Optax transformation of the first gradient | `optax.ema(0.9)` (VaSSO), `ascent.friendly()`, `ascent.z_score()`, `optax.centralize()`, `optax.scale_by_adam()` |
# | `metric=` | what a ball is | the table of [metrics](20_metrics.ipynb) |
# | `descent=` | what is followed, of both gradients | the second; `descent.surrogate_gap()` (GSAM), `weighted()` (WSAM), `stable()` (SSAM), `look()` (LookSAM) |
# | `when=` | at which steps | a function of the count; `when.gradient_is_large()` (AE-SAM) |
#
# One line that takes all four:
#
# ```py
# tx = optax.chain(
#     ms.sam(grad_fn, rho=0.05, ascent=ascent.friendly(), descent=descent.surrogate_gap(0.1),
#            when=when.gradient_is_large()),
#     optax.adamw(1e-3),
# )
# ```
#
# `one_pass_sam` takes `ascent` and every metric; it has no second gradient for `descent`.
# `functional_sam_value_and_grad` perturbs the model and not the loss of its outputs (Singh et al.
# 2025), and `geodesic_perturbation` follows the geodesic of the Monge metric in place of its tangent.

# %% [markdown]
# ## What the table calls by a bare name, and how to add a row
#
# A row is a line of the table, a loop of about five lines in `tests/test_methods.py`, and, where a
# slot has no such part yet, some ten lines for it. The test reads the line and the code here, and
# fails for a row without a loop and for a loop without a row. An ascent is any `optax.GradientTransformation`. This one draws, and
# counts its draws:

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import monge_sam_jax as ms
from monge_sam_jax import ascent, descent, when
from monge_sam_jax.experiments.common.plots import COLOURS, NOTEBOOK, WIDTH
from monge_sam_jax.toy import banana

key = jax.random.key(0)


def noise(key):
    """Normal numbers in place of the gradient."""

    def update(g, count, params=None):
        return optax.tree.random_like(jax.random.fold_in(key, count), g), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


# %% [markdown]
# A descent is a `Descent` of one function, of two if the steps that do not perturb do something
# else than follow their gradient, of three if it keeps something:


# %%
def both():
    """SAGM: the sum of both gradients."""
    return descent.Descent(lambda g, second, state: (jax.tree.map(jnp.add, g, second), state))


# %% [markdown]
# A rule of when is a function of the number of the step, as in RST's row, or a `WhenRule` if it
# looks at the gradient:


# %%
def above(threshold):
    """Perturbs where the gradient is longer than that."""
    return when.WhenRule(
        lambda: (), lambda count, g, state: (optax.tree.norm(g) > threshold, state)
    )


# %% [markdown]
# A metric says for a vector $a$, called $g$ here, where $\delta$ points (`tangent`, any positive
# multiple), how long that is in the metric (`length`), so that $\delta = \rho$ tangent / length,
# and the rise $g^\top \delta$ of the loss at $\rho = 1$, to first order (`dual_norm`). Guards for a gradient of
# zero come with `euclidean`, on which the first one builds; the others are without.


# %%
def resized(factor):
    """The Euclidean ball factor(n) times as large, where n is the length of the gradient."""
    base = ms.euclidean()

    def steepest(g, params, state):
        a, state = base.ascent(g, params, state)
        c = factor(a.dual_norm)
        return a._replace(dual_norm=c * a.dual_norm, length=a.length / c), state

    return ms.Metric(base.init, steepest)


def sparse(share, key):
    """ESAM: a random share of the entries, so many times longer that the mean is SAM's."""

    def steepest(g, params, count):
        draws = optax.tree.random_like(jax.random.fold_in(key, count), g, jax.random.uniform)
        v = jax.tree.map(lambda g, u: jnp.where(u < share, g, 0), g, draws)
        length = share * optax.tree.norm(g)
        return ms.Ascent(v, optax.tree.vdot(g, v) / length, length), count + 1

    return ms.Metric(lambda params: jnp.zeros((), jnp.int32), steepest)


# %% [markdown]
# The state of a metric may follow the gradients. bSAM's ball follows the first one, and its step
# divides by the same $s$, which is read from the state of the transformation:


# %%
def posterior(s, decay, prior):
    """bSAM's ball: the variance of a Gaussian posterior is 1 / s."""

    def steepest(g, params, s):
        def follow(s, g):
            return decay * s + (1 - decay) * (jnp.sqrt(s) * jnp.abs(g) + prior)

        v = jax.tree.map(jnp.divide, g, s)
        return ms.Ascent(v, dual_norm=optax.tree.vdot(g, v)), jax.tree.map(follow, s, g)

    return ms.Metric(lambda params: jax.tree.map(lambda p: jnp.full_like(p, s), params), steepest)


def bsam(grad_fn, learning_rate, rho, s=1.0, b1=0.9, b2=0.8, prior=0.05):
    """bSAM, whose optimizer divides by the s of the ball."""
    perturb = ms.sharpness_aware(grad_fn, metric=posterior(s, b2, prior), rho=rho)

    def init(params):
        return perturb.init(params), optax.tree.zeros_like(params)

    def update(g, state, params, **extra_args):
        s, m = state[0].metric_state, state[1]
        second, inner = perturb.update(g, state[0], params, **extra_args)
        m = jax.tree.map(lambda m, d, p: b1 * m + (1 - b1) * (d + prior * p), m, second, params)
        return jax.tree.map(lambda m, s: -learning_rate * m / s, m, s), (inner, m)

    return optax.GradientTransformationExtraArgs(init, update)


# %% [markdown]
# ## Names that collide
#
# | name | is | and also |
# |---|---|---|
# | M-SAM, MSAM, mSAM | Monge SAM (M-SAM in its paper) | Momentum-SAM (MSAM), Modality-Aware SAM (M-SAM), micro-batch SAM (mSAM, m-sharpness): write Monge SAM |
# | SSAM | Stable SAM (Tan et al.) | Sparse SAM (Mi et al.); SS-SAM is a name of RST |
# | FSAM | Friendly SAM (F-SAM) | Fisher SAM, Functional SAM |
# | RSAM | Random SAM (R-SAM, Liu et al.) | Riemannian SAM; RST is neither |
# | ESAM | Efficient SAM (Du et al.) | EfficientSAM, a model that segments images, like SAM itself |
# | gamma | WSAM's weight | $\alpha = \gamma / (1 - \gamma)$ of the gradient norm penalty, $\lambda$ of m-RWP |
#
# ## What is no row
#
# | method | why |
# |---|---|
# | SAM of several ascent steps (Foret et al., appendix), GAM (Zhang et al. 2023) | a third gradient |
# | penalties on curvature by Hessian products, CR-SAM (Wu et al. 2024) | a third gradient |
# | ESAM's selection of samples (Du et al. 2022) | needs the losses of single samples between the gradients |
# | Functional SAM (Singh et al. 2025) | cuts the second gradient at the outputs of the model, which a function of the params does not show: it is `functional_sam_value_and_grad(model_fn, loss_fn, ...)` |
# | SAMPa (Xie et al. 2024), R-SAM (Liu et al. 2022), bSAM's noise | the first gradient is taken at other params: `update` follows what it is given, so the training loop has to take it there, and to keep those params |
# | decoupled WSAM before Adam | a second step beside the optimizer's own |
# | Sparse SAM (Mi et al. 2022) | its mask comes from squared gradients of many batches: a metric with a state, refilled from outside |

# %% [markdown]
# ## Some rows on one loss
#
# The loss with banana-shaped minima, $(1 - \theta_1 \theta_2)^2$, whose flattest one is at (1, 1):
# forty steps of each line from one start. SGD stays where it meets the valley. Perturbations that
# do not vanish with the gradient go on along it; those that do (USAM), or that end with it (the
# rule above), go as far as the gradient is long.

# %%
plt.rcParams.update(NOTEBOOK)
grad_fn = jax.grad(banana)
LINES = {
    "SGD": optax.identity(),
    "SAM": ms.sam(grad_fn, rho=0.5),
    "Monge SAM": ms.monge_sam(grad_fn, rho=0.5),
    "VaSSO": ms.sam(grad_fn, rho=0.5, ascent=optax.ema(0.6)),
    "Friendly SAM": ms.sam(grad_fn, rho=0.5, ascent=ascent.friendly(0.6, 0.8)),
    "USAM": ms.sharpness_aware(grad_fn, metric=resized(lambda n: n), rho=0.1),
    "GSAM": ms.sam(grad_fn, rho=0.5, descent=descent.surrogate_gap(0.4)),
    "above(1.0)": ms.sam(grad_fn, rho=0.5, when=above(1.0)),
}


def path(link, start, steps=40):
    tx = optax.chain(link, optax.sgd(0.05))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jnp.vstack([start, jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]])


figure, axes = plt.subplots(2, 4, figsize=(WIDTH, 3.8), sharex=True, sharey=True)
x, y = jnp.meshgrid(jnp.linspace(-0.3, 2.6, 80), jnp.linspace(-0.3, 2.6, 80))
colours = {"SAM": COLOURS["sam"], "Monge SAM": COLOURS["monge_sam"], "SGD": COLOURS["sgd"]}
for ax, (name, link) in zip(axes.flat, LINES.items(), strict=True):
    points = path(link, jnp.array([2.3, 0.8]))
    ax.contour(x, y, banana(jnp.stack([x, y], -1)), levels=[0.01, 0.1, 1, 4], colors="lightgrey")
    ax.plot(*points.T, ".-", color=colours.get(name, COLOURS["adaptive_sam"]), markersize=3)
    ax.set_title(name)
    print(f"{name:14} ends at ({points[-1][0]:.2f}, {points[-1][1]:.2f})")
for ax in axes[:, 0]:
    ax.set_ylabel(r"$\theta_2$")
for ax in axes[1]:
    ax.set_xlabel(r"$\theta_1$")
