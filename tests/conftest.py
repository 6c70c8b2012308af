import ctypes
import itertools

import jax
import pytest
import xla_flags
from hypothesis import settings
from trajectories import cpu_devices

xla_flags.put_in_environment()  # which JAX reads with its first computation
if jax.config.jax_platforms and "cpu" not in jax.config.jax_platforms:
    jax.config.update("jax_platforms", f"{jax.config.jax_platforms},cpu")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # no TF32 on a GPU
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("fixed")


FINISHED = itertools.count(1)


@pytest.fixture(autouse=True)
def _free_programs():
    """Compiled programs and traces take gigabytes in the end, and few are of use to later tests."""
    yield
    if next(FINISHED) % 150 == 0:
        jax.clear_caches()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc does not give back by itself what was freed
            libc.malloc_trim(0)


@pytest.fixture
def x64():
    """64-bit types for the length of a test."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield


@pytest.fixture
def on_cpu():
    """For what is counted in programs compiled for a CPU, and for meshes of virtual devices."""
    with jax.default_device(cpu_devices(1)[0]):
        yield


@pytest.fixture
def eight_devices():
    """For code that takes all devices of the default backend by itself."""
    if jax.device_count() < 8:
        assert jax.default_backend() != "cpu", "xla_flags.py makes eight of the CPU"
        pytest.skip(f"needs eight devices, {jax.default_backend()} has {jax.device_count()}")
