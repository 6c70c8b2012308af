"""Flags for XLA, as far as the installed one knows them: it ends the process on any other."""

import os
import subprocess
import sys

WANTED = (
    # Virtual devices for the tests of parallel training.
    "--xla_force_host_platform_device_count=8",
    # Quick compilation, which is most of the time that small models take.
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    # The same results in every run on a GPU.
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_autotune_level=0",
)

# A fork costs 20 ms, where an interpreter of its own for every flag would take 0.3 s to start.
PROBE = """
import os, sys
from jaxlib import xla_client

for flag in sys.argv[1:]:
    if not os.fork():
        os.environ["XLA_FLAGS"] = flag
        xla_client.make_cpu_client()
        os._exit(0)
    if os.wait()[1] == 0:
        print(flag)
"""


def known(flags):
    """Those with which XLA starts."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return probe.stdout.decode().split()


def name(flag):
    return flag.partition("=")[0]


def put_in_environment():
    """To be called before JAX starts. What the environment says already stays as it is.

    Workers of pytest-xdist inherit what the process that starts them has found out.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {name(flag) for flag in given}
    added = known(flag for flag in WANTED if name(flag) not in names)
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def with_devices(count):
    """The flags of this process, for one with another number of virtual devices."""
    devices = "--xla_force_host_platform_device_count"
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if name(flag) != devices]
    return " ".join([*others, f"{devices}={count}"])
