"""What the command line runs."""


class InputError(ValueError):
    """What the user gave cannot be used; the command line shows the message and nothing else."""
