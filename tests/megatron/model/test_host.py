"""What a site costs the host, counted: a launch or a call that creeps in makes these fail."""

import json

from tests.megatron.common.launch import forked_python

CALLS = 61
"""Calls of our own Python functions, forward and backward, of a site inside a model: 60.5. Lower it
where a change needs fewer."""
CALLS_OF_OTHERS = 19
"""What they call of others' Python: 18, and one that a release may add."""


def test_a_site_launches_seven_kernels_and_calls_few_functions() -> None:
    done = forked_python("benchmarks/model/host.py", "--cpu", "--inside", stage="megatron")
    assert done.returncode == 0, done.stdout[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("calls") <= CALLS
    assert counts.pop("calls_of_others") <= CALLS_OF_OTHERS
    assert counts == {
        # forward
        "combine_and_project_kernel": 1,
        "coefficients_kernel": 1,
        "aggregate_kernel": 1,
        # backward
        "coefficient_gradients_kernel": 1,
        "stream_gradients_kernel": 1,
        "phi_gradient_kernel": 1,
        "add_up_kernel": 1,
        # the last site's alone
        "combine_gradients_kernel": 0,
        # y; gradients of x, f, h_post, h_res, alpha, bias
        "made_like_another": 7,
        # a microsecond more where the shape comes as one: u, h_post, h_res, h_pre, normed, partial
        # projections; phi's gradient, and four that are added up or handed on
        "made_of_a_shape": 11,
    }
