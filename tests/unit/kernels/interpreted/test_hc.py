"""`hc_coefficients` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation_tests import Operation


class TestHcCoefficients(Operation):
    """What holds for every operation; its results have no bound, so no logit saturates."""

    operation = "hc_coefficients"
