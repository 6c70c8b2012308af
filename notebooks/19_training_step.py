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
# # Where does it go in my training step?
#
# First in the chain, with the gradient of the mean loss, unscaled, of the same batch in both passes.

# %%
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax import get_diagnostics, monge, monge_sam, sharpness_aware_value_and_grad

params, batch = {"w": jnp.ones(3)}, {"x": jnp.eye(3), "y": jnp.zeros(3)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


grad_fn = jax.grad(loss_fn)
tx = optax.chain(monge_sam(grad_fn, rho=0.05), optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@jax.jit
def step(params, opt_state, batch):
    updates, opt_state = tx.update(grad_fn(params, batch), opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state


opt_state = tx.init(params)
params, opt_state = step(params, opt_state, batch)
print(get_diagnostics(opt_state).perturbation_norm)

# %% [markdown]
# `update` takes the gradient at the params and returns the one at the perturbed params. `grad_fn` is
# given those extra arguments of `update` that its signature names; a `grad_fn=` that is given to `update` overrides the builder's.
# `rho` is a number, an array or an Optax schedule. For
# a loop that takes plain optimizers too, `optax.with_extra_args_support(optax.sgd(0.1))` accepts and ignores such arguments. The state holds a step count and a few scalars, no copy of the params.
#
# ## Without an Optax chain
#
# `sharpness_aware_value_and_grad` takes the place of `jax.value_and_grad` in any training loop. Value
# and auxiliary output are those of the first pass, at the params.

# %%
value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.05)
loss, grads = value_and_grad(params, batch)

# %% [markdown]
# ## At some steps alone
#
# With `period=5` every fifth step perturbs, with `when=lambda count: count >= 9000` the end of training, which is reported
# to keep most of what SAM gains (Zhou et al.); the other steps cost one gradient. The functional form takes
# `when=step >= 9000`. Where convolutions train on CPU, whose gradients are many times slower in a
# conditional, take turns between two jitted steps, one with the transformation and one without.
#
# In a `scan` with a schedule and logged diagnostics, all of it is an ordinary Optax state:

# %%
radius = optax.linear_schedule(0.1, 0.02, 50)
tx = optax.chain(monge_sam(grad_fn, rho=radius, when=lambda count: count >= 10), optax.sgd(0.1))


def body(carry, _):
    params, opt_state = carry
    updates, opt_state = tx.update(grad_fn(params, batch), opt_state, params, batch=batch)
    return (optax.apply_updates(params, updates), opt_state), get_diagnostics(opt_state)


carry, log = jax.lax.scan(body, (params, tx.init(params)), length=50)
print(log.perturbation_norm[::10])  # of the last perturbation; none before step 10

# %% [markdown]
# ## The scale of the loss
#
# SAM's perturbation does not depend on the scale of the loss; Monge SAM's does, on purpose: its length
# is `rho / sqrt(1 + alpha² ‖g‖²)`. So give it the gradient of the loss that you mean:
#
# - the mean over the batch, not the sum;
# - unscaled: divide out a loss scale before `update`, and inside `grad_fn` as well;
# - before clipping: `chain(monge_sam(...), clip, ...)`, not the other way round;
# - averaged over devices, not summed (see below);
# - if the loss is `c` times what `alpha` was tuned for, `alpha / c` gives the same perturbation.
#
# ## Around the transformation
#
# What follows it (clipping, weight decay, Adam, `masked`, `partition`, `MultiSteps`,
# `apply_if_finite`, `schedule_free`, `muon`) sees an ordinary gradient at the ordinary params. Around
# the transformation these do not work:
#
# | instead of | write |
# |---|---|
# | `optax.masked(monge_sam(...), mask)` | `monge_sam(..., mask=mask)`; the other is an error |
# | `optax.partition` around it | the mask, and `partition` after it; the other is an error |
# | two of them, `chain(sam(mask=a), sam(mask=b))` (the second throws the first one's gradient away) | one, `sharpness_aware(metric=grouped(...))`; the other is an error |
# | `optax.MultiSteps(chain(monge_sam(...), rest), k)` (would descend on the last micro-batch alone) | `chain(monge_sam(...), MultiSteps(rest, k).gradient_transformation())`: each micro-batch perturbs for itself; the other is an error |
# | `optax.apply_if_finite(chain(monge_sam(...), rest), n)` (looks at the first gradient alone) | `chain(monge_sam(...), apply_if_finite(rest, n))` |
# | `optax.flatten` around it (hands `grad_fn` a vector) | `chain(monge_sam(...), optax.flatten(rest))`; the other is an error |
# | `optax.lookahead` around it (takes no extra arguments) | a `grad_fn` of the params alone, or `sharpness_aware_value_and_grad` and the optimizer without the transformation |
# | `tx.update(..., grad_fn=...)` with a line search or `optax.lbfgs` after it (which refuses arguments that `value_fn` does not name) | `monge_sam(grad_fn)`, or `value_fn=lambda params, grad_fn=None: loss(params)` |
# | `chain(freeze, monge_sam(...))` (moves frozen params) | `mask=`, and `freeze` after it |
# | Flax's `TrainState.apply_gradients` (drops extra arguments) | `make_train_step`, or `SharpnessAwareTrainState` of `monge_sam_jax.linen` |
#
# `optax.inject_hyperparams(monge_sam, static_args="period")(grad_fn, rho=0.05, alpha=1.0)`
# puts `rho` and `alpha` into the state. With bfloat16 params add `hyperparam_dtype=jnp.float32`.
