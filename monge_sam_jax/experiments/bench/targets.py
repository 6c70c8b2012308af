"""Accelerators to compile for that this machine need not have.

XLA compiles for a device that is described: kernels, collectives and memory are those of the
device. Times are not known, and what would be tuned by trying it on the device, such as the sizes
of tiles, is left at its default.
"""

import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from monge_sam_jax.experiments.common.errors import InputError, installing
from monge_sam_jax.experiments.common.placement import AXIS

GPU = re.compile(r"(h100)(?::(\d+))?")
TPU = re.compile(r"\w+:\d+(x\d+)+")

# What XLA parses a GPU's description from: a GpuTargetConfigProto, as text. From NVIDIA's data
# sheet of the H100 SXM5: 132 multiprocessors of 128 lanes at 1.98 GHz, 50 MiB of L2 cache, 80 GB
# at 3.35 TB/s (of which the driver offers 79.1 GiB). From the CUDA programming guide's table of
# compute capability 9.0: threads, registers and shared memory.
GPUS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        dnn_version_info { major: 9 minor: 8 }
        gpu_device_info {
            cuda_compute_capability { major: 9 minor: 0 }
            core_count: 132
            fpus_per_core: 128
            clock_rate_ghz: 1.98
            l2_cache_size: 52428800
            device_memory_size: 84978434048
            memory_bandwidth: 3352320000000
            threads_per_warp: 32
            threads_per_block_limit: 1024
            threads_per_core_limit: 2048
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
            registers_per_core_limit: 65536
            registers_per_block_limit: 65536
            shared_memory_per_core: 233472
            shared_memory_per_block: 49152
            shared_memory_per_block_optin: 232448
        }
    """
}

# JAX's plugins would look for their devices: on no driver one gives up, and libtpu asks the cloud
# which slice it is on.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def mesh_of(target: str) -> Mesh:
    """The devices of a target, described, on a mesh with the axis `AXIS`.

    To be called before anything else makes JAX look for devices: it is to compute on the CPU.

    Args:
      target: h100, h100:8 (eight of them), or a slice of TPUs as libtpu names it, v5e:2x4.

    Raises:
      InputError: there is no such target, or what compiles for it is not installed.
    """
    gpu = GPU.fullmatch(target)
    if not (gpu or TPU.fullmatch(target)):
        raise InputError(
            f"--compile-for must be h100, h100:8, or a TPU slice such as v5e:2x4, got {target}"
        )
    _check_installed("cuda" if gpu else "tpu")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        if gpu:
            found = topologies.get_topology_desc(
                platform="cuda", target_config=GPUS[gpu[1]], topology=f"1x1x{gpu[2] or 1}"
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"--compile-for {target}: {error}") from error
    devices: list[Any] = found.devices
    return Mesh(np.array(devices), (AXIS,))


def _check_installed(extra: str) -> None:
    modules = {
        "cuda": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
        "tpu": ("libtpu",),
    }[extra]
    if not any(map(_is_installed, modules)):
        raise InputError(
            f"--compile-for needs JAX's compiler for it (no driver and no device): "
            f"{installing(f'cli,{extra}')}"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is not
        return False
