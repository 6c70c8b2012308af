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
# # How do I train a Flax Linen model?
#
# With `make_train_step`, which writes the step that gets running statistics, dropout, loss scaling and
# several devices right, for any `TrainState`.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax import monge, monge_sam
from monge_sam_jax.linen import SharpnessAwareTrainState, make_train_step

batch = {"x": jnp.linspace(-1.0, 1.0, 24).reshape(8, 3), "y": jnp.linspace(0.0, 1.0, 8)}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))[:, 0]


def loss_fn(variables, batch, rngs):
    y, updated = model.apply(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
    return jnp.mean((y - batch["y"]) ** 2), (updated, {"mean": jnp.mean(y)})


model = Model()


def new_state(tx):
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, batch["x"])
    options = {"apply_fn": model.apply, "tx": tx, "dropout_key": jax.random.key(1)}
    return SharpnessAwareTrainState.create(**options, **variables)


# No gradient function is given to the builder: the step has it.
state = new_state(optax.chain(monge_sam(rho=0.05), optax.adamw(1e-2)))
train_step = jax.jit(make_train_step(loss_fn, diagnostics=True), donate_argnums=0)
for _ in range(20):
    state, loss, metrics, seen = train_step(state, batch)
print(f"loss {loss:.3f}, mean {metrics['mean']:.2f}, |delta| {seen.perturbation_norm:.4f}")

# %% [markdown]
# The loss is a function of the variables, the batch and the random numbers, and returns beside the loss
# the collections that `model.apply` changed, and metrics of any form. Both passes see the same batch,
# running statistics, dropout masks and loss scale. Loss, metrics and the new running statistics are
# those of the first pass, at the params.
#
# ## With the perturbation in the step
#
# `make_train_step(loss_fn, metric=monge(), rho=0.05)` goes with any optimizer. Options are those of
# `sharpness_aware_value_and_grad`, and `rho` may be a schedule of the step.

# %%
plain = new_state(optax.adamw(1e-2))
robust_step = jax.jit(make_train_step(loss_fn, metric=monge(), rho=0.05))
for _ in range(20):
    plain, other_loss, _ = robust_step(plain, batch)
print(f"loss {other_loss:.3f}")

# %% [markdown]
# What searches along a line, such as `optax.lbfgs()`, gets `value`, `grad` and `value_fn` of the step's batch and random
# numbers.
#
# ## A step of your own
#
# `state.apply_gradients(grads=grads, grad_fn=grad_fn, batch_stats=...)` of a `SharpnessAwareTrainState` hands the gradient
# function on, which Flax's `TrainState` does not: that sends its keyword arguments to `replace`.


# %%
def loss_of_params(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    return loss_fn(variables, batch, {"dropout": jax.random.fold_in(jax.random.key(1), state.step)})


(loss, (updated, _)), grads = jax.value_and_grad(loss_of_params, has_aux=True)(state.params)
state = state.apply_gradients(
    grads=grads,
    grad_fn=lambda params: jax.grad(loss_of_params, has_aux=True)(params)[0],
    batch_stats=updated["batch_stats"],
)

# %% [markdown]
# ## Evaluate and save
#
# After two passes evaluate `state.params` with `state.batch_stats` as ever; in
# [one pass](15_one_pass.ipynb) take the unperturbed params and fresh statistics.

# %%
y = model.apply({"params": state.params, "batch_stats": state.batch_stats}, batch["x"], train=False)
print(f"evaluated: {jnp.mean((y - batch['y']) ** 2):.3f}")

# %% [markdown]
# All states are saved and restored exactly by Orbax and `flax.serialization` (which takes
# `jax.random.PRNGKey` keys alone). [Micro-batches](16_microbatches.ipynb), [float16](17_precision.ipynb)
# and [devices](18_devices.ipynb) are options of the same function. For a command that trains and keeps params, see
# [the commands](commands.md).
