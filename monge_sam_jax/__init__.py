"""Sharpness-aware training in JAX: SAM, Monge SAM, ASAM, Fisher SAM, and metrics of your own.

The builders `monge_sam`, `sam`, `adaptive_sam` and `fisher_sam` go first in an `optax.chain`;
`sharpness_aware_value_and_grad` takes the place of `jax.value_and_grad` in any training loop.
"""

import monge_sam_jax._core.interruption  # noqa: F401 - first: Ctrl-C while the rest is loaded
from monge_sam_jax import ascent as ascent
from monge_sam_jax import descent as descent
from monge_sam_jax import when as when
from monge_sam_jax.averaged import averaged_monge as averaged_monge
from monge_sam_jax.averaged import averaged_monge_over as averaged_monge_over
from monge_sam_jax.composite import grouped as grouped
from monge_sam_jax.composite import layerwise as layerwise
from monge_sam_jax.composite import scaled as scaled
from monge_sam_jax.diagnostics import Diagnostics as Diagnostics
from monge_sam_jax.diagnostics import MeasuredDiagnostics as MeasuredDiagnostics
from monge_sam_jax.diagnostics import get_diagnostics as get_diagnostics
from monge_sam_jax.functional import (
    functional_sam_value_and_grad as functional_sam_value_and_grad,
)
from monge_sam_jax.geodesic import geodesic_perturbation as geodesic_perturbation
from monge_sam_jax.gradients import sharpness_aware_value_and_grad as sharpness_aware_value_and_grad
from monge_sam_jax.loss_scaling import loss_scaled as loss_scaled
from monge_sam_jax.loss_scaling import update_dynamic_scale as update_dynamic_scale
from monge_sam_jax.metrics import Ascent as Ascent
from monge_sam_jax.metrics import Metric as Metric
from monge_sam_jax.metrics import adaptive as adaptive
from monge_sam_jax.metrics import diagonal_fisher as diagonal_fisher
from monge_sam_jax.metrics import euclidean as euclidean
from monge_sam_jax.metrics import monge as monge
from monge_sam_jax.metrics import pullback as pullback
from monge_sam_jax.norms import spectral as spectral
from monge_sam_jax.norms import supremum as supremum
from monge_sam_jax.one_pass import one_pass_sam as one_pass_sam
from monge_sam_jax.one_pass import unperturbed_params as unperturbed_params
from monge_sam_jax.parallel import accumulated as accumulated
from monge_sam_jax.parallel import m_sharpness as m_sharpness
from monge_sam_jax.parallel import per_shard as per_shard
from monge_sam_jax.perturbation import worst_case_perturbation as worst_case_perturbation
from monge_sam_jax.preconditioning import preconditioned as preconditioned
from monge_sam_jax.running_statistics import (
    refresh_running_statistics as refresh_running_statistics,
)
from monge_sam_jax.sharding import init_sharded as init_sharded
from monge_sam_jax.transforms import SharpnessAwareState as SharpnessAwareState
from monge_sam_jax.transforms import adaptive_sam as adaptive_sam
from monge_sam_jax.transforms import fisher_sam as fisher_sam
from monge_sam_jax.transforms import monge_sam as monge_sam
from monge_sam_jax.transforms import sam as sam
from monge_sam_jax.transforms import sharpness_aware as sharpness_aware

__version__ = "0.1.0"
