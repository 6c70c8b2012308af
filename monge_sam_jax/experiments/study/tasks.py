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
    (0.05, 0.5, 2.0, 8.0),
    (0.05, 0.2, 0.6, 2.0),
    (0.001, 0.005, 0.02, 0.05),
)
OF_TEXT = (0.02, 0.05, 0.15, 0.4)
# What is compared where no methods are named, the fewer, the longer a task takes.
FEWEST = (
    *("plain", "sam", "monge_sam"),
    *("one_pass_monge", "warm_annealed_one_pass_monge"),
)
FEWER = (
    *("plain", "plain_half", "average", "sam", "late_sam", "adaptive_sam", "monge_sam"),
    *("one_pass_monge", "warm_annealed_one_pass_monge"),
)
MOST = (
    *("plain", "plain_half", "average", "sam", "late_sam", "adaptive_sam", "monge_sam"),
    *("budget", "friendly", "one_pass_sam", "one_pass_monge", "annealed_one_pass_sam"),
    *("annealed_one_pass_monge", "warm_annealed_one_pass_monge"),
)

WIDTH, TEXT_SIZE = ("width", "epochs"), ("text_width", "text_layers", "text_steps")


def _from_a_bad_minimum(setting: Setting, methods: tuple[str, ...]) -> Task:
    make = functools.partial(bad_minimum, setting)
    sizes = (setting.size, "epochs", "confusion_epochs")
    return Task(make, setting.kind, FITTING_RATE, LONG, sizes, methods, setting.epochs)


def _with_label_noise(fraction: float, methods: tuple[str, ...]) -> Task:
    make = functools.partial(label_noise, fraction, MLP_ON_DIGITS)
    return Task(make, MLP_ON_DIGITS.kind, 0.05, SHORT, WIDTH, methods)


TASKS = {
    "bad-minimum": _from_a_bad_minimum(MLP_ON_DIGITS, MOST),
    "bad-minimum-mnist": _from_a_bad_minimum(MLP_ON_MNIST, FEWER),
    "bad-minimum-resnet": _from_a_bad_minimum(RESNET_ON_DIGITS, FEWEST),
    "large-init": Task(
        functools.partial(large_init, MLP_ON_DIGITS),
        *(MLP_ON_DIGITS.kind, FITTING_RATE, LONG, WIDTH, MOST),
    ),
    "label-noise-0": _with_label_noise(0.0, FEWER),
    "label-noise-30": _with_label_noise(0.3, MOST),
    "label-noise-60": _with_label_noise(0.6, MOST),
    "regression": Task(heat, HEAT, 2e-3, TINY, WIDTH, MOST),
    "forgetting": Task(forgetting, TEXT, LEARNING_RATE, OF_TEXT, TEXT_SIZE, FEWER, lambda size: 1),
}
