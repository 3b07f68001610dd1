"""`import megatron_mhc.auto` at the top of a training script adds the --mhc flags to Megatron."""

from .start.activate import activate

activate()
