"""What the runner prints as a sentence: a traceback says nothing to who typed the command."""

from megatron_mhc.patches import PatchError
from megatron_mhc.patches.supported_versions import UnsupportedMegatronError


class FlagsError(ValueError):
    """mHC refuses a run's flags, its backend what they describe, or Megatron a dry run's flags."""


class DenseModelError(RuntimeError):
    """mHC was asked for and a model came out with ordinary residual connections."""


class NotMegatronError(RuntimeError):
    """The script ended without asking Megatron for its arguments, or without a layer with mHC."""


REFUSALS = (FlagsError, DenseModelError, NotMegatronError, PatchError, UnsupportedMegatronError)
