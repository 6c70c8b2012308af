"""Where the arrays of a training run are: on one device, or on all devices of all processes."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import chex
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monge_sam_jax.experiments.common.data import Batch

AXIS = "data"  # the one axis of the mesh, over which batches are sharded


class Placement(NamedTuple):
    """A mesh of devices, and whether the params are divided among them.

    Attributes:
      mesh: with the axis `AXIS` alone.
      fully_sharded: whether the params are, each along its largest dimension that the devices
        divide; otherwise, and where they divide none, all of it is on every device.
    """

    mesh: Mesh
    fully_sharded: bool = False

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of_params(self, params: chex.ArrayTree) -> Any:
        """The shardings of the params, of which the shapes are looked at alone."""
        return jax.tree.map(lambda x: self._of_param(x.shape), params)

    def _of_param(self, shape: tuple[int, ...]) -> NamedSharding:
        dividable = [i for i, size in enumerate(shape) if size and size % self.mesh.size == 0]
        if not (self.fully_sharded and dividable):
            return self.everywhere
        largest = max(dividable, key=lambda i: shape[i])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * largest, AXIS))

    def place_batch(self, samples: Batch, rows: Any) -> Batch:
        """Those rows of the samples, in equal parts on the devices, which must divide them."""
        return _place(samples, rows, NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def place_all(self, samples: Batch, largest_chunk: int) -> Iterator[Batch]:
        """All samples in chunks, of at most that many on a device.

        What the devices do not divide is a chunk of its own that every one of them has.
        """
        count = len(samples.y)
        shared = count // self.mesh.size * self.mesh.size
        step = largest_chunk * self.mesh.size
        for start in range(0, shared, step):
            yield self.place_batch(samples, slice(start, min(start + step, shared)))
        if shared < count:
            yield _place(samples, slice(shared, None), self.everywhere)


def _place(samples: Batch, rows: Any, sharding: NamedSharding) -> Batch:
    # Unlike `jax.device_put` this needs no communication: every process has all samples.
    parts = [np.asarray(x)[rows] for x in samples]
    return Batch(*(jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in parts))


def make_placement(sharding: Literal["data", "fsdp"] | None = None) -> Placement:
    """On all devices of all processes, or on the first one if `sharding` is None."""
    devices = jax.devices()[: None if sharding else 1]
    return Placement(Mesh(np.array(devices), (AXIS,)), fully_sharded=sharding == "fsdp")
