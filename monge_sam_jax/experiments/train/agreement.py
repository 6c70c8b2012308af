"""What all processes of a run must have in common before it begins."""

import zlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from monge_sam_jax.experiments.common.errors import InputError

T = TypeVar("T")


def agreed(prepare: Callable[[], T], describe: Callable[[T], str]) -> T:
    """What `prepare()` returns, if no process raises an InputError and all describe the same.

    Args:
      prepare: does without the other processes.
      describe: what must be the same in all of them, as a text.

    Returns:
      It.

    Raises:
      InputError: that of this process, or one that says which process differs.
    """
    if jax.process_count() == 1:
        return prepare()
    try:
        result: T | InputError = prepare()
    except InputError as error:
        result = error
    failed = isinstance(result, InputError)
    digest = 0 if isinstance(result, InputError) else zlib.crc32(describe(result).encode())
    answers = multihost_utils.process_allgather(np.array([failed, digest], np.uint32))
    if isinstance(result, InputError):
        raise result
    for process, (process_failed, process_digest) in enumerate(answers):
        if process_failed:
            raise InputError(f"process {process} cannot begin, and says why")
        if process_digest != answers[0, 1]:
            raise InputError(
                f"processes 0 and {process} have not been given the same options or data"
            )
    return result
