"""What goes wrong by no fault of the program."""


def installing(extras: str) -> str:
    """The command that installs the package with these extras, from anywhere and in a clone."""
    return f"pip install 'monge_sam_jax[{extras}]', or in a clone: pip install -e '.[{extras}]'"


class InputError(ValueError):
    """What the user gave cannot be used; the command line shows the message and nothing else."""


class LostProcessError(RuntimeError):
    """A process of the run was ended from outside; the command line shows the message alone."""
