"""Slow cases that an ordinary run leaves to `make test-all`: each is much like one that stays."""

from pathlib import Path

import pytest

THOROUGH = {
    "patches/test_checkpoint.py": (
        "test_resuming_is_exact[bf16 asynchronous]",
        "test_resuming_is_exact[bf16 data parallel, not fully parallel]",
        "test_resuming_is_exact[bf16 delayed sites in two stages]",
        "test_resuming_is_exact[bf16 distributed optimizer]",
        "test_resuming_is_exact[bf16 latent attention, tensor parallel]",
        "test_resharding_goes_on_where_the_run_was[pipeline-one-None]",
        "test_experts_on_one_rank_or_two_resume_without_the_optimizers_state"
        "[one-expert 2 of 2-RuntimeError: Expected 2 entries in state dict, but got]",
    ),
    "patches/test_hybrid_checkpoint.py": (
        "test_resuming_is_exact[bf16]",
        "test_resuming_is_exact[experts in two stages]",
        "test_resuming_is_exact[tensor and sequence parallel]",
    ),
    "tools/test_convert_hybrid.py": (
        "test_the_hybrid_model_goes_on_digit_for_digit[experts in one layer]",
        "test_an_ordinary_hybrid_model_is_a_start_too[deepseek_v4]",
    ),
    "tools/test_convert.py": (
        "test_a_converted_model_starts_where_the_ordinary_one_is[moe-deepseek_v4-1e-05]",
        "test_the_new_parameters_are_those_of_a_new_model[moe]",
    ),
    "pipeline/test_overlap.py": (
        "test_hosts_that_wait_for_every_message_do_not_lock[6 microbatches]",
    ),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark them; a whole file that lacks one of its names says so."""
    folder = Path(__file__).parent
    for file, names in THOROUGH.items():
        found = {item.name: item for item in items if item.path == folder / file}
        whole = found and not any("::" in argument for argument in config.args)
        if whole and (missing := set(names) - set(found)):
            raise pytest.UsageError(f"{file} has no {', '.join(sorted(missing))}")
        for name in set(names) & set(found):
            found[name].add_marker(pytest.mark.thorough)


def pytest_unconfigure() -> None:
    """No process outlives the run."""
    from tests.megatron.common.launch import end_forks

    end_forks()
