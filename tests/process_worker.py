"""One of several processes that train together; the first writes where every run ended.

python process_worker.py PORT PROCESSES PROCESS OUTPUT MODE...
"""

import functools
import pickle
import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from trajectories import (
    follow,
    initial_params,
    make_mesh,
    map_over_shards,
    spread,
    start,
    step_per_shard,
    step_with_both,
    step_with_chain,
)

import monge_sam_jax as ms

REPLICATED = {"bias": P(), "temperature": P(), "weights": P()}
SHARDED = REPLICATED | {"bias": P("data"), "weights": P(None, "data")}


def main(port: str, processes: str, process: str, output: str, *chosen: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    mesh = make_mesh(AxisType.Auto, data=8)
    each_its_own = map_over_shards(
        step_with_both, mesh, check_vma=True, axis_name="data", sync_perturbation=False
    )
    modes = {
        "data parallel": (step_with_chain, REPLICATED),
        "fully sharded": (step_with_chain, SHARDED),
        "per_shard": (
            functools.partial(step_per_shard, mesh=mesh, params_specs=SHARDED),
            SHARDED,
        ),
        "shard_map": (each_its_own, REPLICATED),
    }
    place = functools.partial(spread, mesh, specs=P("data"))
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    ends = {}
    for mode in chosen:
        step, specs = modes[mode]
        runs = start(spread(mesh, initial_params(), specs), ms.init_sharded)
        ends[mode] = follow(jax.jit(step), runs, place, gather, norms=[1.0])
        monge = {"monge_sam": runs["monge_sam"]}  # whose length depends on the scale of the loss
        ends[mode] |= follow(jax.jit(step), monge, place, gather, norms=[0.1, 30.0])
    if jax.process_index() == 0:
        Path(output).write_bytes(pickle.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
