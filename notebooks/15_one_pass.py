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
# # Can a step cost one gradient, and what do I evaluate then?
#
# `one_pass_sam` perturbs along the gradient of the step before, so that a step costs one gradient. The
# params of the training loop are the perturbed ones, $y = \theta + \delta$; an ordinary loop needs no other change.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from monge_sam_jax import nnx as ms_nnx
from monge_sam_jax import one_pass_sam, refresh_running_statistics, unperturbed_params

batch = {"x": jnp.linspace(-1.0, 1.0, 24).reshape(8, 3), "y": jnp.linspace(0.0, 1.0, 8)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


params = {"w": jnp.ones(3)}
tx = one_pass_sam(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), rho=0.05)
opt_state = tx.init(params)
for _ in range(3):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, batch), opt_state, params)
    params = optax.apply_updates(params, updates)
evaluated = unperturbed_params(opt_state, params)  # evaluate and save these
distance = optax.tree.norm(optax.tree.sub(params, evaluated))
print(f"the loop's params are {distance:.3f} away from those to evaluate")

# %% [markdown]
# The base optimizer, its weight decay and its schedules see the unperturbed params; the state holds the
# perturbation, of the size of one copy of the params, so that what changes the params from outside
# (loading, pruning, `optax.lookahead`) is respected. `direction="momentum"` perturbs along the optimizer's
# own momentum and keeps nothing for params of 32 bits. It takes `ascent` and every metric; it has no second gradient for
# `descent`.
#
# ## Running statistics
#
# Running statistics belong to the perturbed params: before evaluation take them anew with
# `refresh_running_statistics`, over some tens of training batches of one size.


# %%
class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(1)(nn.relu(x))[:, 0]


model = Model()
variables = model.init(jax.random.key(0), batch["x"])


def update_fn(params, batch_stats, batch):
    variables = {"params": params, "batch_stats": batch_stats}
    return model.apply(variables, batch["x"], mutable=["batch_stats"])[1]["batch_stats"]


batch_stats = refresh_running_statistics(
    update_fn, variables["params"], variables["batch_stats"], [batch]
)
y = model.apply({**variables, "batch_stats": batch_stats}, batch["x"], train=False)

# %% [markdown]
# The model runs in the mode in which it is trained; with dropout give it `rngs` there. For NNX
# `evaluation_model` does both, on a copy, and training goes on.

# %%
net = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
optimizer = nnx.Optimizer(net, one_pass_sam(optax.adamw(1e-2), rho=0.05), wrt=nnx.Param)


@nnx.jit
def step(net, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda net, x: jnp.mean((net(x) - 1.0) ** 2))(net, x)
    optimizer.update(net, grads)
    return loss


for _ in range(20):
    step(net, optimizer, batch["x"])
evaluated_net = ms_nnx.evaluation_model(net, optimizer, batches=[batch["x"]])
print(f"loss {jnp.mean((evaluated_net(batch['x']) - 1.0) ** 2):.3f}")

# %% [markdown]
# ## What one pass does near a minimum
#
# With learning rate $\eta$, Hessian eigenvalue $\lambda$ and radius $r = \lVert \delta \rVert / \lVert g \rVert$, a step is stable where
# $0 < \lambda$, $r \lambda < 1$ and $\lambda (\eta - 2 r) < 2$: maxima and saddles repel it at every r, where two
# passes are drawn to them. Minima repel it where $\lVert g \rVert \sqrt{1 + \alpha^2 \lVert g \rVert^2} < \rho \lambda$, so that at a
# fixed `rho` it circles around them for ever ([edges of stability](claims.md)). Hence a radius that falls to zero:
# `rho=optax.linear_schedule(0.3, 0.0, steps)`. With M-SAM, the default metric, that is the most robust of the one-pass
# forms [at a learning rate that nobody tuned](study.md#radius-of-one-pass); where it is tuned, all of them come to
# [much the same](study.md).
