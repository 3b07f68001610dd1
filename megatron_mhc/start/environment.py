"""MHC_* environment variables, and MHCConfig from them."""

import argparse
import difflib
import os
from collections.abc import Mapping

from megatron_mhc.config import MHCConfig

from .settings import SETTINGS, VARIABLES


def settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are settings, or are spelled much like one's, with the setting's name."""
    found = {}
    for variable in sorted(v for v in environ if v.startswith("MHC_")):
        for meant in difflib.get_close_matches(variable, VARIABLES, 1, 0.85):
            found[variable] = VARIABLES[meant]
    return found


def config_from_environment(environ: Mapping[str, str] = os.environ) -> MHCConfig:
    """MHCConfig from MHC_NUM_STREAMS, MHC_CONVENTION, ...; what is not set has its default.

    Raises:
        ValueError: an MHC_* variable that does not exist, or a value that does not fit.
    """
    values = {}
    for variable in sorted(v for v in environ if v.startswith("MHC_")):
        if variable not in VARIABLES:
            raise ValueError(
                f"{variable} is set; known are {', '.join(sorted(VARIABLES))}: unset it, or set the"
                " one that is meant (metrics and guard have flags alone)"
            )
        name = VARIABLES[variable]
        try:
            values[name] = SETTINGS[name].parse(environ[variable])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{variable} is {error}") from error
    return MHCConfig(**values)
