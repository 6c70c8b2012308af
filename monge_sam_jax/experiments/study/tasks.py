"""What is learnt in `monge-sam study`: tasks on data that comes with installed packages."""

import functools

from monge_sam_jax.experiments.study.images import (
    FITTING_RATE,
    MLP_ON_DIGITS,
    MLP_ON_MNIST,
    RESNET_ON_DIGITS,
    Setting,
    bad_minimum,
    label_noise,
    large_init,
)
from monge_sam_jax.experiments.study.kinds import Task
from monge_sam_jax.experiments.study.regression import HEAT, heat
from monge_sam_jax.experiments.study.text import LEARNING_RATE, TEXT, forgetting

LONG, SHORT, TINY = (
    (0.05, 0.5, 1.0, 2.0, 4.0),
    (0.05, 0.1, 0.2, 0.5, 1.0),
    (0.001, 0.005, 0.02, 0.05),
)
OF_TEXT = (0.02, 0.05, 0.15, 0.4)
# Of the tasks that take longest.
FEWER = (
    *("plain", "average", "sam", "late_sam", "monge_sam"),
    *("one_pass_monge", "annealed_one_pass_monge"),
)

WIDTH, TEXT_SIZE = ("width", "epochs"), ("text_width", "text_layers", "text_steps")


def _from_a_bad_minimum(setting: Setting, methods: tuple[str, ...] | None = None) -> Task:
    make = functools.partial(bad_minimum, setting)
    sizes = (setting.size, "epochs", "confusion_epochs")
    return Task(make, setting.kind, FITTING_RATE, LONG, sizes, setting.epochs, methods)


def _with_label_noise(fraction: float) -> Task:
    make = functools.partial(label_noise, fraction, MLP_ON_DIGITS)
    return Task(make, MLP_ON_DIGITS.kind, 0.05, SHORT, WIDTH)


TASKS = {
    "bad-minimum": _from_a_bad_minimum(MLP_ON_DIGITS),
    "bad-minimum-mnist": _from_a_bad_minimum(MLP_ON_MNIST, FEWER),
    "bad-minimum-resnet": _from_a_bad_minimum(RESNET_ON_DIGITS, FEWER),
    "large-init": Task(
        functools.partial(large_init, MLP_ON_DIGITS), MLP_ON_DIGITS.kind, FITTING_RATE, LONG, WIDTH
    ),
    "label-noise-0": _with_label_noise(0.0),
    "label-noise-30": _with_label_noise(0.3),
    "label-noise-60": _with_label_noise(0.6),
    "regression": Task(heat, HEAT, 2e-3, TINY, WIDTH),
    "forgetting": Task(forgetting, TEXT, LEARNING_RATE, OF_TEXT, TEXT_SIZE, lambda size: 1, FEWER),
}
