"""What goes wrong by no fault of the program."""


class InputError(ValueError):
    """What the user gave cannot be used; the command line shows the message and nothing else."""


class LostProcessError(RuntimeError):
    """A process of the run was ended from outside; the command line shows the message alone."""
