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
# # Out of a bad minimum (figure 6)
#
# A network is fitted to spoilt copies of its training images with random labels, and then to the
# true ones, until it is right on all of them: a global minimum that generalises badly (Liu et al.
# 2020). From there SGD, SAM and M-SAM go on. Can they leave it, or move along its valley to a
# better one?
#
# These are the settings of the tests, which take seconds: 100 images, a small network, 20 epochs.
# `monge-sam bad-minimum`, or `run(BadMinimum())`, is the real thing, in minutes.

# %%
import tempfile
from pathlib import Path

from IPython.display import Image

from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.bad_minimum.run import run

output = Path(tempfile.mkdtemp())
run(BadMinimum(preset="smoke", seeds=2, rho=(0.1, 0.5, 2.0), output=output))

# %%
Image(output / "figure6.png", width=700)

# %% [markdown]
# At the smallest radius SAM and M-SAM are alike and a little ahead of SGD. At the largest SAM
# forgets what was learnt: its training accuracy falls, and the test accuracy with it. M-SAM is held
# back, and this is why:

# %%
Image(output / "mechanism.png", width=700)

# %% [markdown]
# SAM's perturbation is $\rho$ long whatever the gradient is. M-SAM's,
# $\rho / \sqrt{1 + \|g\|^2}$, is shorter where the gradient is large, which is where SAM is thrown
# out, and widens as the gradient falls. At small radii the gradient stays small, and nothing tells
# the two apart.
#
# Two seeds and 20 epochs settle little; the verdicts of the real run are among the
# [claims](claims.md).
