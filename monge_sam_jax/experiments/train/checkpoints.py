"""Checkpoints of a comparison of optimizers, from which an interrupted one goes on."""

import dataclasses
import math
import shutil
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.data import Dataset
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.train.options import PROCESS_OPTIONS, Train, flag
from monge_sam_jax.experiments.train.training import Optimizer, Run, begin

KEPT = 2
FOLDER = "checkpoints"
OPTIONS = "options.json"  # beside the checkpoints, what they have in common
PREFIX = "epoch"
LARGEST_SHARE = 0.05  # of the time, where the user does not say how often

# Options that a resumed run may change: they do not decide what is computed.
FREE = {
    "output",
    "tensorboard",
    "overwrite",
    "checkpoint_every",
    "resume",
    "distributed",
    "sharding",
    *PROCESS_OPTIONS,
}

# By optimizer, and for each seed: its final metrics, its curves and its times.
Records: TypeAlias = dict[str, list[dict[str, Any]]]


class Stage(NamedTuple):
    """How far a comparison is.

    Attributes:
      seed: the present one.
      runs: its runs, by optimizer.
      records: of the seeds before it.
    """

    seed: int
    runs: Mapping[str, Run]
    records: Records

    def logged(self, name: str) -> dict[str, Any]:
        """What the run of that optimizer has logged, for the records."""
        run = self.runs[name]
        return {"seed": self.seed, "curves": run.curves, "seconds_per_step": run.seconds_per_step}


def refuse_others(options: Train, dataset: Dataset) -> None:
    """Raises an InputError if a run that is not resumed would delete checkpoints of another."""
    if options.overwrite or options.resume or not any(options.output.glob(f"{FOLDER}/{PREFIX}_*")):
        return
    present = fingerprint(options, dataset)
    report.refuse_others(options.output, present, f"{FOLDER}/{OPTIONS}", name_of=str)


class Checkpoints:
    """The last stages of a comparison, in a folder that all processes share.

    Orbax writes a checkpoint under another name and renames it when it is complete, so an
    interrupted write leaves the one before.
    """

    def __init__(self, options: Train, dataset: Dataset) -> None:
        """Opens the folder; unless the run is resumed, deletes what an earlier one left there."""
        folder = (options.output / FOLDER).absolute()
        self._options = options
        self._fingerprint = fingerprint(options, dataset)
        if jax.process_index() == 0:
            for path in () if options.resume else folder.glob(f"{PREFIX}_*"):
                shutil.rmtree(path)
            folder.mkdir(exist_ok=True)
            report.write_json(folder / OPTIONS, {"configuration": self._fingerprint})
        multihost_utils.sync_global_devices("the checkpoints of an earlier run are deleted")
        self._not_before = -math.inf
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT, step_prefix=PREFIX, enable_async_checkpointing=False
            ),
        )

    def close(self) -> None:
        """Ends the threads of Orbax."""
        self._manager.close()

    def epochs_behind(self, stage: Stage) -> int:
        """Over all seeds; the number of the checkpoint."""
        complete = (stage.seed - self._options.seed) * self._options.epochs
        return complete + min(len(run.seconds_per_step) for run in stage.runs.values())

    def first_stage(self, optimizers: Mapping[str, Optimizer]) -> Stage:
        """The stage at which a run begins: that of the last checkpoint if the run is resumed.

        Raises:
          InputError: there is no checkpoint, or it is of other options.
        """
        if self._options.resume:
            return self._restore(optimizers)
        seed = self._options.seed
        return Stage(seed, begin(optimizers, seed), {name: [] for name in optimizers})

    def _restore(self, optimizers: Mapping[str, Optimizer]) -> Stage:
        number = self._manager.latest_step()
        if number is None:
            raise InputError(
                f"--resume: there is no checkpoint in {self._manager.directory}; without --resume "
                "the run begins anew"
            )
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        progress = self._manager.restore(number, args=args)["progress"]
        check_fingerprint(progress["fingerprint"], self._fingerprint)

        fresh = {name: optimizer.init(progress["seed"]) for name, optimizer in optimizers.items()}
        like_fresh = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        args = ocp.args.Composite(states=ocp.args.StandardRestore(like_fresh))
        states = self._manager.restore(number, args=args)["states"]
        runs = {name: Run(states[name], **progress["runs"][name]) for name in optimizers}
        return Stage(progress["seed"], runs, progress["records"])

    def save_if_due(self, stage: Stage) -> None:
        """Writes a checkpoint, if it is time for one, and deletes the last but one.

        To be called after every epoch. Without --checkpoint-every some are passed over, so that the
        checkpoints take no more than `LARGEST_SHARE` of the time.
        """
        number = self.epochs_behind(stage)
        if not self._is_due(number):
            return
        start = time.monotonic()
        progress = {
            "fingerprint": self._fingerprint,
            "seed": stage.seed,
            "records": stage.records,
            "runs": {
                name: {"curves": run.curves, "seconds_per_step": run.seconds_per_step}
                for name, run in stage.runs.items()
            },
        }
        # As NumPy arrays, what every device has whole is written once. Orbax 0.12 would divide the
        # writing among the devices, and fails at that with JAX 0.7.
        states = jax.tree.map(
            lambda x: np.asarray(x) if x.is_fully_replicated else x,
            {name: run.state for name, run in stage.runs.items()},
        )
        self._manager.save(
            number,
            args=ocp.args.Composite(
                states=ocp.args.StandardSave(states), progress=ocp.args.JsonSave(progress)
            ),
        )
        end = time.monotonic()
        self._not_before = end + (end - start) / LARGEST_SHARE

    def _is_due(self, number: int) -> bool:
        every = self._options.checkpoint_every
        if every is not None:
            return every > 0 and number % every == 0
        # The first process decides for all: they must write together.
        due = np.array(time.monotonic() >= self._not_before)
        return bool(multihost_utils.broadcast_one_to_all(due))


def fingerprint(options: Train, dataset: Dataset) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on with, by name."""
    fixed = dataclasses.asdict(options) | {"learning_rate": options.base_learning_rate}
    named = {flag(name): value for name, value in fixed.items() if name not in FREE}
    samples = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(dataset))
    named["the checksum of the data"] = zlib.crc32(samples)
    if options.perturbation == "per-shard":
        named["the number of devices"] = jax.device_count()
    return report.jsonable(named)


def check_fingerprint(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raises an InputError that names what differs."""
    for name, value in present.items():
        if saved.get(name) != value:
            raise InputError(
                f"--resume: the checkpoint is of a run with other options: {name} was "
                f"{_text(saved.get(name))}, and is {_text(value)} now"
            )


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
