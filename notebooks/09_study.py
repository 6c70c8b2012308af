# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
# ---

# %% [markdown]
# # Does it help, when plain training is given the same?
#
# In the [larger study](study.md) plain training has the task's own learning rate and trains to the end, and
# sharpness-aware training wins by far from bad minima and with wrong labels. A sceptic objects: of the two only
# one was tuned. Here both are: plain training and averaged weights try as many learning rates, from a tenth to ten
# times the task's, as the others try radii. What follows is what `monge-sam study` wrote (`summary.json`), with
# seven methods: `--methods plain average sam late_sam monge_sam one_pass_monge annealed_one_pass_monge`, on
# images with `--tasks label-noise-0 label-noise-30 bad-minimum-mnist`, and once more on text with
# `--tasks forgetting --rates 1 3.16 --tuning-seeds 1`, where both learning rate and radius are chosen.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from monge_sam_jax.experiments.common.plots import NOTEBOOK, band
from monge_sam_jax.experiments.study.plots import draw_frontier, draw_gains
from monge_sam_jax.experiments.study.report import forgetting, overview, protocol

# %matplotlib inline
plt.rcParams.update(NOTEBOOK)
IMAGES, TEXT = json.loads(Path("study.json").read_text(encoding="utf-8"))


def show(*lines):
    display(Markdown("\n".join(lines)))


show(protocol(IMAGES))

# %% [markdown]
# ## Images
#
# At equal gradients:

# %%
show(*overview(IMAGES))

# %% [markdown]
# At equal time:

# %%
show(*overview(IMAGES, "equal_time"))

# %% [markdown]
# Where both stop when their validation score is best:

# %%
show(*overview(IMAGES, "stopped"))

# %% [markdown]
# By radius, on test samples, over the seeds that chose, at equal gradients:


# %%
def figure_of(summary, task, draw, others=()):
    figure, axes = plt.subplots(figsize=(6, 2.6))
    draw(axes, summary["tasks"][task])
    axes.set_title(task)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *others], loc="outside right upper")
    return axes


for task, entry in IMAGES["tasks"].items():
    axes = figure_of(IMAGES, task, draw_gains, [band()])
    axes.set_xlabel(r"radius $\rho$")
    axes.set_ylabel(f"gain ({entry['unit']})")
    plt.show()

# %% [markdown]
# ## Forgetting
#
# A language model learns code by each method, and then English by AdamW. Sharpness-aware training is said to
# forget less of the first, and to bear rounding better. In the figure fine-tuning starts at the right, and ends at
# the dots; further left and lower is better.

# %%
show(*forgetting(TEXT))

# %%
axes = figure_of(TEXT, "forgetting", draw_frontier)
axes.set_xlabel("loss on English (nats per byte)")
axes.set_ylabel("loss on code")
plt.show()

# %% [markdown]
# ## What was believed, and what came out
#
# OUT
