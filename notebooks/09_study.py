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
# `monge-sam study` compares sharpness-aware methods with plain training that takes as many
# gradients, or as much time, and whose learning rate was tried as often as their radii were. This
# page shows what it wrote (`summary.json`, kept beside it as `study.json`).

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown

from monge_sam_jax.experiments.common.plots import NOTEBOOK, band
from monge_sam_jax.experiments.study.plots import draw_frontier, draw_gains
from monge_sam_jax.experiments.study.report import forgetting, overview, protocol

# %matplotlib inline
plt.rcParams.update(NOTEBOOK)
summary = json.loads(Path("study.json").read_text())

Markdown(protocol(summary))

# %% [markdown]
# ## Verdicts
#
# At equal gradients:

# %%
Markdown("\n".join(overview(summary)))

# %% [markdown]
# At equal time:

# %%
Markdown("\n".join(overview(summary, "equal_time")))

# %% [markdown]
# And where both stop when their validation score is best, as practitioners do:

# %%
Markdown("\n".join(overview(summary, "stopped")))

# %% [markdown]
# ## By radius
#
# Gains over plain training on test samples, over the seeds that chose, at equal gradients.


# %%
def figure_of(task, draw, others=()):
    figure, axes = plt.subplots(figsize=(6, 2.6))
    draw(axes, summary["tasks"][task])
    axes.set_title(task)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *others], loc="outside right upper")
    return axes


for task, entry in summary["tasks"].items():
    axes = figure_of(task, draw_gains, [band()])
    axes.set_xlabel(r"radius $\rho$")
    axes.set_ylabel(f"gain ({entry['unit']})")
    plt.show()

# %% [markdown]
# ## Forgetting
#
# A language model learns code by each method, and then English by AdamW: loss on held-out text of
# both, from the start of fine-tuning (right) to its end (the dots).

# %%
axes = figure_of("forgetting", draw_frontier)
axes.set_xlabel("loss on English (nats per byte)")
axes.set_ylabel("loss on code")
plt.show()

# %%
Markdown("\n".join(forgetting(summary)))
