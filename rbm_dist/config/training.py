"""What teacher and students are trained by."""

from typing import Literal

from pydantic import Field

from rbm_dist.config.fields import Count, Rate, Section


class TrainingConfig(Section):
    """What all training loops have, each over its own steps."""

    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: the learning rate falls to 0 along half a cosine by the last of all epochs"
    )
    warmup_steps: Count = Field(0, description="steps over which the learning rate rises from 0, before all else")
    clip_norm: Rate | None = Field(None, description="largest norm of a step's gradient, over all parameters and ranks")
