"""`hc_coefficients` under Triton's interpreter."""

import pytest
import torch

from megatron_mhc.config import MHCConfig
from megatron_mhc.metrics.recorder import h_pre_of
from megatron_mhc.model.connection import HyperConnection
from tests.unit.kernels.interpreted.operation_tests import Operation, Watch


class TestHcCoefficients(Operation):
    """What holds for every operation; its results have no bound, so no logit saturates."""

    operation = "hc_coefficients"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_site_and_its_metrics_run_it_with_the_backend_that_is_asked_for(backend: str) -> None:
    connection = HyperConnection(MHCConfig(variant="hc", backend=backend), 24, 0)
    x = torch.randn(3, 4 * 24)
    for run in (lambda: connection(x), lambda: h_pre_of(connection, x.unflatten(-1, (4, 24)))):
        with Watch() as watch:
            run()
        assert ("megatron_mhc::hc_project" in watch.calls) == (backend == "triton")
