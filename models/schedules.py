"""Noise schedules of the published animators. A pipeline folder carries its own, so sampling uses the right one."""

from diffusers import DDIMScheduler

# What each family's inference uses. AnimateAnyone (Moore) and MusePose were trained with scaled_linear betas and
# sample with linear ones; their released weights are used as released.
VELOCITY = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULES = {
    "animate_anyone": {"beta_schedule": "linear", **VELOCITY},
    "musepose": {"beta_schedule": "linear", **VELOCITY},
    "magic_animate": {
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "leading",
    },
    # The last step goes to the cleanest level that was trained, as in Stable Diffusion's own configuration.
    "dreampose": {
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
    },
    "disco": {
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
    },
    # What training from Stable Diffusion starts with; the training configuration replaces it by its own.
    "stable_diffusion": {"beta_schedule": "scaled_linear", **VELOCITY},
}


def published_scheduler(family: str) -> DDIMScheduler:
    """DDIM with the betas, prediction type and spacing of a family of `SCHEDULES`."""
    if family not in SCHEDULES:
        raise ValueError(f"family must be one of {', '.join(SCHEDULES)}, got {family!r}")
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        **SCHEDULES[family],
    )
