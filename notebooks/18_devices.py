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
# # What changes on many devices?
#
# Under `jit` with sharded arrays there is nothing to do: gradients and norms are global, and against
# two plain gradients a step adds at most two all-reduces of scalars (counted on the compiled program in
# the tests; ASAM's adds three). `init_sharded(tx, params)` makes the optimizer's state with the
# shardings of the params, which `jax.jit(tx.init)` loses.
#
# Devices can share one perturbation, or each have its own (m-sharpness):
#
# | | one perturbation, from the averaged gradient | each device its own |
# |---|---|---|
# | `jit` with sharded arrays | as on one device | `per_shard(sharpness_aware_value_and_grad(...), "data")` |
# | `shard_map`, `pmap` | `axis_name="data"` | `axis_name="data", sync_perturbation=False` |
#
# `shard_map` sums the gradient of replicated params over devices by itself. That leaves SAM's direction
# right and Monge's length silently wrong, so here it is an error: differentiate with respect to
# `jax.lax.pcast(params, "data", to="varying")`.

# %%
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import monge_sam_jax as ms

params, batch = {"w": jnp.ones(3)}, {"x": jnp.linspace(0, 1, 24).reshape(8, 3), "y": jnp.zeros(8)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


robust = ms.sharpness_aware_value_and_grad(loss_fn, metric=ms.monge(), rho=0.05)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
replicated = jax.device_put(params, NamedSharding(mesh, P()))
opt_state = ms.init_sharded(optax.adamw(1e-3), replicated)
loss, shared = jax.jit(robust)(replicated, sharded)
loss, own = jax.jit(ms.per_shard(robust, "data", mesh=mesh))(replicated, sharded)

# %% [markdown]
# Under `shard_map`, with the params cast to varying ones:


# %%
def step(params, batch):
    params = jax.lax.pcast(params, "data", to="varying")
    averaging = ms.sharpness_aware_value_and_grad(
        loss_fn, metric=ms.monge(), rho=0.05, axis_name="data"
    )
    _, grads = averaging(params, batch)
    return grads


manual = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
print(shared["w"], jax.jit(manual)(replicated, sharded)["w"])

# %% [markdown]
# ## The radius goes with the samples per device
#
# With m-sharpness a device perturbs along the gradient of its own samples, and that of m samples is
# longer: its square is about ‖g‖² + sigma² / m. On digits (MLP, batch 64, rho = 0.5), means over an
# epoch:
#
# | devices (samples each) | ‖g‖ at the start | SAM's radius ‖delta‖ / ‖g‖ | M-SAM's ‖delta‖ | M-SAM's radius | M-SAM's ‖g‖ and ‖delta‖, last epoch |
# |---|---|---|---|---|---|
# | 1 (64) | 0.79 | 0.65 | 0.393 | 0.52 | 0.041, 0.499 |
# | 2 (32) | 0.95 | 0.53 | 0.362 | 0.39 | 0.056, 0.498 |
# | 4 (16) | 1.21 | 0.42 | 0.320 | 0.27 | 0.074, 0.496 |
# | 8 (8) | 1.62 | 0.32 | 0.266 | 0.17 | 0.094, 0.491 |
#
# So rho belongs to the samples per device: keep those when devices change, by `per_shard` over
# `m_sharpness`, and rho stays. Do not rescale rho for the start alone: near the end M-SAM's length is rho
# on any number of devices. Where results must not depend on the devices, share one perturbation.
#
#
# ## Several processes
#
# `monge-sam train` runs on several processes too, with the environment variables that
# `jax.distributed.initialize` reads or the options of the same meaning; one of these per process:
#
# ```sh
# monge-sam train --distributed --coordinator-address HOST:PORT --num-processes 2 --process-id 0
# ```
#
# `--sharding fsdp` shards params and optimizer state, `--perturbation per-shard` is m-sharpness. Process
# 0 alone writes and shows progress. If a process is gone, the others end with one line that says so
# within about half a minute, and `--resume` goes on from the last checkpoint (Orbax; every epoch by
# default), as an interrupted run of one process does. Ctrl-C ends any command with one line that says
# what is kept and how to go on, and exit code 130; where standard error is no terminal, progress is a
# line for every epoch or run, with what is left. `--dtype bfloat16` trains in bfloat16 with the
# perturbed params widened, `--model cnn` has batch normalisation.
#
# `monge-sam study --devices 8` trains eight runs at once, each whole on a device of its own, since its runs
# are small and many; what comes out is the same. On a CPU, parts by `--tasks` that run at once use its cores better.
