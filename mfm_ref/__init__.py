"""Meta Flow Maps: one-step, differentiable samples of p(x₁ | x_t), and what they are for.

Conventions: noise at time 0, data at time 1. States are `(B, *D)`, times `()` or `(B,)`, and the arguments of a
map always come in the order `(s, u, z, t, x, y)`. Docstrings cite the equations E1–E21 listed in README.md.
"""

from mfm_ref.alignment import denoiser, doob_drift, dps_drift, guidance, rows_within, value, value_gradient
from mfm_ref.baselines import GlassRollout, Particles, best_of_n, glass_rollout, sde_rollout, smc
from mfm_ref.collect import collect
from mfm_ref.cost import Cost, evaluations
from mfm_ref.data import RandomBatches, TensorBatches, WithProgress
from mfm_ref.estimators import controlled_guidance, gradient_guidance, stein_guidance
from mfm_ref.exact import ExactFlowMap
from mfm_ref.finetuning import finetune_loss, regression_loss
from mfm_ref.flow_map import ClassifierFree, FlowMap, Guided, MetaFlowMap, Network
from mfm_ref.interpolant import (
    coupled_interpolants,
    denoiser_to_drift,
    denoiser_to_score,
    drift_to_denoiser,
    drift_to_score,
    glass_drift,
    interpolate,
    noise_scale,
    score_to_denoiser,
    score_to_drift,
)
from mfm_ref.metrics import (
    FeatureStatistics,
    coverage,
    frechet_distance,
    frechet_gaussian,
    mmd,
    sliced_wasserstein,
    vendi_score,
)
from mfm_ref.mixture import GaussianMixture
from mfm_ref.networks import MLP
from mfm_ref.noise import posterior_noise
from mfm_ref.objectives import (
    adaptive_weight,
    diagonal_loss,
    eulerian_loss,
    eulerian_target,
    guided_target,
    lagrangian_loss,
    lagrangian_target,
    mean_flow_loss,
    mean_flow_target,
    semigroup_loss,
    semigroup_target,
    velocity_loss,
)
from mfm_ref.paper_recipe import paper_loss
from mfm_ref.recipe import meta_flow_map_loss, no_context
from mfm_ref.rewards import GaussianLikelihood, LinearReward
from mfm_ref.run_state import TrainConfig
from mfm_ref.sampling import integrate, log_snr_grid, sample, sample_posterior, time_grid
from mfm_ref.search import search
from mfm_ref.steering import early_draws, steer
from mfm_ref.tilted import tilted_map_loss, tilted_target
from mfm_ref.training import Watched, train
from mfm_ref.unet import UNet

__version__ = "0.8.0"

__all__ = [
    "MLP",
    "ClassifierFree",
    "Cost",
    "ExactFlowMap",
    "FeatureStatistics",
    "FlowMap",
    "GaussianLikelihood",
    "GaussianMixture",
    "GlassRollout",
    "Guided",
    "LinearReward",
    "MetaFlowMap",
    "Network",
    "Particles",
    "RandomBatches",
    "TensorBatches",
    "TrainConfig",
    "UNet",
    "Watched",
    "WithProgress",
    "adaptive_weight",
    "best_of_n",
    "collect",
    "controlled_guidance",
    "coupled_interpolants",
    "coverage",
    "denoiser",
    "denoiser_to_drift",
    "denoiser_to_score",
    "diagonal_loss",
    "doob_drift",
    "dps_drift",
    "drift_to_denoiser",
    "drift_to_score",
    "early_draws",
    "eulerian_loss",
    "eulerian_target",
    "evaluations",
    "finetune_loss",
    "frechet_distance",
    "frechet_gaussian",
    "glass_drift",
    "glass_rollout",
    "gradient_guidance",
    "guidance",
    "guided_target",
    "integrate",
    "interpolate",
    "lagrangian_loss",
    "lagrangian_target",
    "log_snr_grid",
    "mean_flow_loss",
    "mean_flow_target",
    "meta_flow_map_loss",
    "mmd",
    "no_context",
    "noise_scale",
    "paper_loss",
    "posterior_noise",
    "regression_loss",
    "rows_within",
    "sample",
    "sample_posterior",
    "score_to_denoiser",
    "score_to_drift",
    "sde_rollout",
    "search",
    "semigroup_loss",
    "semigroup_target",
    "sliced_wasserstein",
    "smc",
    "steer",
    "stein_guidance",
    "tilted_map_loss",
    "tilted_target",
    "time_grid",
    "train",
    "value",
    "value_gradient",
    "velocity_loss",
    "vendi_score",
]
