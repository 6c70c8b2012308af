"""`monge-sam train`, in this process or in one of several."""

from monge_sam_jax.experiments.train.options import Train


def run(options: Train) -> None:
    """Trains, writes the results and prints them as a table.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option or the data cannot be used.
      LostProcessError: another process of a distributed run is gone.
    """
    options.check()
    # Imported where they are needed: the parent of a distributed run does without what trains.
    if options.distributed:
        from monge_sam_jax.experiments.train import distributed

        distributed.supervise(options)
    else:
        from monge_sam_jax.experiments.train import comparison

        comparison.run(options)
