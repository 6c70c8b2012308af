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
# # Coming from `optax.contrib.sam`, PyTorch's SAM, or a Flax example
#
# What changes in code that trains already? All of these are the same step, and the lines that change stand side by side.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

import monge_sam_jax as ms
from monge_sam_jax.linen import SharpnessAwareTrainState, make_train_step

batch = {"x": jnp.linspace(-1.0, 1.0, 24).reshape(8, 3), "y": jnp.arange(8.0) / 8}
params = {"w": jnp.ones(3), "b": jnp.zeros(())}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


# %% [markdown]
# ## From `optax.contrib.sam`
#
# | | `optax.contrib.sam` | here |
# |---|---|---|
# | builder | `contrib.sam(optimizer=sgd(0.1), adv_optimizer=chain(contrib.normalize(), sgd(rho)), sync_period=2, opaque_mode=True)` | `chain(sam(grad_fn, rho=rho), sgd(0.1))` |
# | gradient of the second pass | `grad_fn(params, step)` at `update`, which closes over the batch | a function of the params, and of those arguments of `update` that its signature names |
# | the batch | in the closure: a new function at each step | `update(..., batch=batch)` |
# | transparent mode | two calls of the optimizer for each step; every other batch only perturbs | there is none: one call is one step |
# | the state | a copy of the params | a step count and a few scalars |
# | the norm in float16 and bfloat16 | may overflow or be zero, which makes the perturbation zero or NaN | neither; a zero gradient has a zero perturbation |


# %%
def theirs(learning_rate, rho):
    inner = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    return optax.contrib.sam(
        optax.sgd(learning_rate), inner, sync_period=2, reset_state=True, opaque_mode=True
    )


their_tx = theirs(0.1, 0.05)
updates, _ = their_tx.update(
    jax.grad(loss_fn)(params, batch),
    their_tx.init(params),
    params,
    grad_fn=lambda p, _: jax.grad(loss_fn)(p, batch),
)

tx = optax.chain(ms.sam(jax.grad(loss_fn), rho=0.05), optax.sgd(0.1))
same, _ = tx.update(jax.grad(loss_fn)(params, batch), tx.init(params), params, batch=batch)
difference = optax.tree.norm(optax.tree.sub(updates, same)) / optax.tree.norm(same)
print(f"relative difference of the updates: {difference:.0e}")
assert difference < 1e-5

# %% [markdown]
# ## From PyTorch (`davda54/sam`)
#
# | PyTorch | here |
# |---|---|
# | `SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)` | `chain(sam(grad_fn, rho=0.05), sgd(0.1, momentum=0.9))` |
# | `adaptive=True, rho=2.0` | `adaptive_sam(grad_fn, rho=2.0, eta=0.0)` |
# | `loss.backward()`, `first_step`, a second forward pass, `second_step` | one `tx.update` |
# | the closure of `optimizer.step(closure)` | `grad_fn` |
# | `enable_running_stats`, `disable_running_stats` | nothing: running statistics come from the first pass |
# | `model.no_sync()` in the first pass (each device perturbs for itself) | `sync_perturbation=False`, or `per_shard` ([many devices](18_devices.ipynb)) |
# | `CosineAnnealingLR(optimizer.base_optimizer, ...)` | a schedule, `sgd(optax.cosine_decay_schedule(...))` |
# | parameter groups with a `rho` of their own | `metric=grouped({...}, labels)` ([metrics](20_metrics.ipynb)) |
#
# A formula to know: their ASAM scales the gradient by $\theta^2$, the paper's by $(|\theta| + \eta)^2$; with
# `eta=0` the two are the same, and what is zero then stays unperturbed. Two more things that their loop leaves to you and that are done here: both passes
# draw the same dropout mask, and gradients that the loss scaler has not unscaled are not
# used for the norm. In the whole loop,
#
# ```py
# for input, output in data:                       # PyTorch
#     loss_function(output, model(input)).backward()
#     optimizer.first_step(zero_grad=True)
#     loss_function(output, model(input)).backward()
#     optimizer.second_step(zero_grad=True)
# ```
#
# becomes a function that is compiled once:

# %%
grad_fn = jax.grad(loss_fn)
tx = optax.chain(ms.sam(grad_fn, rho=0.05), optax.sgd(0.1, momentum=0.9))


@jax.jit
def step(params, opt_state, batch):
    updates, opt_state = tx.update(grad_fn(params, batch), opt_state, params, batch=batch)
    return optax.apply_updates(params, updates), opt_state


opt_state = tx.init(params)
for _ in range(3):
    params, opt_state = step(params, opt_state, batch)

# %% [markdown]
# ## From a Flax example
#
# Flax's ImageNet example writes the whole step by hand: a loss closure over the state, a branch with
# `DynamicScale` and one without, the mean of the gradients over devices in one branch and inside
# `DynamicScale` in the other, and at the end a selection between old and new params and optimizer state. A second pass
# would double all that. `make_train_step` has it inside. What stays is the loss, whose state and
# random numbers become arguments, and the metrics:
#
# | in the example's `train_step` | with `make_train_step` |
# |---|---|
# | `def loss_fn(params):` | `def loss_fn(variables, batch, rngs):` |
# | `state.apply_fn({"params": params, "batch_stats": state.batch_stats}, batch["image"], mutable=["batch_stats"])` | `model.apply(variables, batch["image"], mutable=["batch_stats"])` |
# | cross-entropy and the weight penalty over `params` | the same, over `variables["params"]` |
# | `return loss, (new_model_state, logits)` | `return loss, (updated, compute_metrics(logits, batch["label"]))` |
# | `if dynamic_scale: dynamic_scale.value_and_grad(loss_fn, has_aux=True, axis_name="batch")` and the call | out |
# | `else: jax.value_and_grad(loss_fn, has_aux=True)`, the call, `lax.pmean(grads, "batch")` | out |
# | `state.apply_gradients(grads=grads, batch_stats=...)` | out |
# | `jnp.where(is_fin, ...)` over `opt_state` and `params`, `state.replace(...)` | out |
# | `functools.partial(train_step, learning_rate_fn=...)` | `make_train_step(loss_fn, metric=monge(), rho=0.05, axis_name="batch")` |
#
# The learning rate of a step is `learning_rate_fn(state.step)` as before. A step that overflows differs:
# the example takes the new running statistics, which after an overflow in the forward pass are never finite again;
# here all but the step count and the scale stay.


# %%
class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8, dtype=jnp.float16)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=jnp.float16)(x)
        return nn.Dense(1, dtype=jnp.float16)(nn.relu(x))[:, 0].astype(jnp.float32)


def linen_loss(variables, batch, rngs):
    prediction, updated = model.apply(variables, batch["x"], mutable=["batch_stats"])
    loss = jnp.mean((prediction - batch["y"]) ** 2)
    penalty = sum(jnp.sum(w**2) for w in jax.tree.leaves(variables["params"]) if w.ndim > 1)
    return loss + 5e-5 * penalty, (updated, {"mse": loss})


model = Model()
variables = model.init(jax.random.key(0), batch["x"])
state = SharpnessAwareTrainState.create(
    apply_fn=model.apply, tx=optax.sgd(0.1), dynamic_scale=DynamicScale(), **variables
)
train_step = jax.jit(make_train_step(linen_loss, metric=ms.monge(), rho=0.05), donate_argnums=0)
for _ in range(10):
    state, loss, metrics = train_step(state, batch)
print(f"step {state.step}, loss scale {state.dynamic_scale.scale:g}, finite: {jnp.isfinite(loss)}")

# %% [markdown]
# Flax's MNIST example keeps its own short step: `jax.value_and_grad(loss_fn, has_aux=True)` becomes
# `sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.05, has_aux=True)`, and nothing
# else changes. NNX examples change [two lines](13_nnx.ipynb).
