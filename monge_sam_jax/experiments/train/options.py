"""The options of `monge-sam train`; light to import, so that the command line's help is quick."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import (
    check_counts,
    check_list,
    check_numbers,
    check_seed,
    flag,
)

LEARNING_RATES = {"sgd": 0.05, "adam": 0.001, "adamw": 0.001}
PROCESS_OPTIONS = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a small network with several optimizers and compare them.

    The data are scikit-learn's handwritten digits (1797 images of 8 x 8 pixels, scaled to [0, 1]),
    or your own. Half of them, every class in proportion, are the test set; the split is the same
    for all seeds.

    One model is trained on one device, on all devices of this process (--sharding), or on those of
    several processes (--distributed): start the same command once per process, with --process-id
    0, 1, ... and the address of process 0, and with a folder for --output that all of them share.
    Process 0 prints and writes the results. When a process is lost, the others end within half a
    minute, and the same commands with --resume go on from the last checkpoint.

    Attributes:
      optimizers: What to compare. sgd is the base optimizer alone, whichever that is; the others
        hand it the gradient at the worst-case perturbation.
      base: Base optimizer: sgd (with momentum 0.9), adam or adamw.
      learning_rate: Learning rate of the base optimizer. By default 0.05 for sgd, 0.001 for adam
        and adamw.
      rho: Radius of the perturbation, for all methods. By default each method's own: 0.5 for
        adaptive_sam, 0.05 for the others.
      alpha: Height of the loss surface, for monge_sam: 0 is SAM, 1 the paper's M-SAM.
      model: mlp has two hidden layers of 128 units, cnn two convolutions with BatchNorm.
      dtype: Of params, data and computation. Losses are float32 in either.
      widen_params: With bfloat16, hand over the perturbed params in float32, so that the second
        gradient is computed in that. Rounded to bfloat16, half of a perturbation of 0.01 is lost on
        the mlp, three quarters of one of 0.005.
      epochs: Passes over the training set.
      batch_size: Samples in a step.
      seeds: Number of seeds: of the initial params and the order of the batches.
      seed: The first of them; the others follow it.
      sharpness_rho: Distance from the final params, along the gradient of the training loss, at
        which the sharpness of all methods is measured.
      data: An .npz file with data of your own: numbers x of shape (n, ...) and integer labels y of
        shape (n,). The cnn needs images, (n, height, width) or (n, height, width, channels). x is
        shifted and scaled to mean zero and variance one on the training set: each feature of a
        table (n, features), each channel of (n, height, width, channels), and all values together
        of (n, height, width).
      output: Folder for results.json, training.png, epochs.csv (all that was logged, by epoch), the
        final params of every run (params/OPTIMIZER_seedN.msgpack, for Flax) and the last two
        checkpoints. Those of an earlier run with the same options are overwritten.
      overwrite: Write over the results and delete the checkpoints of other options, if the output
        folder has some.
      tensorboard: Write all of epochs.csv for TensorBoard too, after each epoch, into the folder
        tensorboard. Needs the package tensorboardX, or PyTorch.
      checkpoint_every: Epochs from one checkpoint to the next, 0 for none. By default there is one
        after each epoch, but no more than take a twentieth of the time.
      resume: Go on from the last checkpoint in the output folder. The results are those of a run
        that was not interrupted.
      sharding: Train on all devices, each with its part of the batch. data: all params on every
        device; fsdp: params and optimizer state divided among the devices too. By default one
        device does everything; with --distributed it is data.
      perturbation: synchronised: one for all devices, from the gradient of the whole batch.
        per-shard: each device its own, from the gradient of its part (m-sharpness).
      distributed: Train with several processes.
      coordinator_address: Host and port of process 0, such as 10.0.0.1:1234. By default
        $JAX_COORDINATOR_ADDRESS, like the next two, or what Slurm or Open MPI say.
      num_processes: How many processes there are; by default $JAX_NUM_PROCESSES.
      process_id: The number of this one, from 0; by default $JAX_PROCESS_ID.
    """

    optimizers: tuple[Literal["sgd", "sam", "monge_sam", "adaptive_sam", "fisher_sam"], ...] = (
        "sgd",
        "sam",
        "monge_sam",
        "adaptive_sam",
        "fisher_sam",
    )
    base: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float | None = None
    rho: float | None = None
    alpha: float = 1.0
    model: Literal["mlp", "cnn"] = "mlp"
    dtype: Literal["float32", "bfloat16"] = "float32"
    widen_params: bool = True
    epochs: int = 60
    batch_size: int = 32
    seeds: int = 5
    seed: int = 0
    sharpness_rho: float = 0.1
    data: Path | None = None
    output: Path = Path("runs/digits")
    overwrite: bool = False
    tensorboard: bool = False
    checkpoint_every: int | None = None
    resume: bool = False
    sharding: Literal["data", "fsdp"] | None = None
    perturbation: Literal["synchronised", "per-shard"] = "synchronised"
    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    @property
    def base_learning_rate(self) -> float:
        """The learning rate, or the base optimizer's default."""
        if self.learning_rate is None:
            return LEARNING_RATES[self.base]
        return self.learning_rate

    @property
    def layout(self) -> Literal["data", "fsdp"] | None:
        """How params are laid out on all devices; None for one device that does everything."""
        return self.sharding or ("data" if self.distributed else None)

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_list("optimizers", self.optimizers)
        check_counts({name: getattr(self, name) for name in ("epochs", "batch_size", "seeds")})
        check_seed(self.seed)
        check_numbers({"learning_rate": self.learning_rate}, positive=True)
        check_numbers({name: getattr(self, name) for name in ("rho", "alpha", "sharpness_rho")})
        if self.checkpoint_every is not None and self.checkpoint_every < 0:
            raise InputError(f"--checkpoint-every must be at least 0, got {self.checkpoint_every}")
        if self.perturbation == "per-shard" and self.layout is None:
            raise InputError("--perturbation per-shard needs --sharding data or fsdp")
        self._check_processes()

    def _check_processes(self) -> None:
        given = [name for name in PROCESS_OPTIONS if getattr(self, name) is not None]
        if given and not self.distributed:
            raise InputError(f"{flag(given[0])} needs --distributed")
        address, count, number = (getattr(self, name) for name in PROCESS_OPTIONS)
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise InputError(f"--coordinator-address must be host:port, got {address}")
        check_counts({"num_processes": count})
        if number is not None and not 0 <= number < (count or math.inf):
            raise InputError(f"--process-id must be from 0 to --num-processes - 1, got {number}")
