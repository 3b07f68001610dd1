"""`coefficients` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation_tests import Projecting


class TestCoefficients(Projecting):
    """What holds for every operation that projects."""

    operation = "coefficients"
