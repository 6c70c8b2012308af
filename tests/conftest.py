import jax
import pytest
import xla_flags
from hypothesis import settings

xla_flags.put_in_environment()  # which JAX reads with its first computation

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")


@pytest.fixture
def x64():
    """64-bit types for the length of a test."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield
