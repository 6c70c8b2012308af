"""What the options of several commands have in common."""

from monge_sam_jax.experiments.common.errors import InputError

LARGEST_SEED = 2**31 - 1


def flag(name: str) -> str:
    """The option as it is typed."""
    return "--" + name.replace("_", "-")


def check_seed(seed: int) -> None:
    """Raises an InputError unless random numbers can be had from the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"--seed must be from 0 to {LARGEST_SEED}, got {seed}")
