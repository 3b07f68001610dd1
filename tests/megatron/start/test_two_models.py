"""Which model of a process gets mHC, which may stay ordinary, and which stops the run."""

import pytest

from tests.megatron.common.flags import BANNER, TINY, losses
from tests.megatron.common.launch import forked_run

LLAVA = "tests/megatron/start/train_llava.py"
TWO_MODELS = "tests/megatron/start/train_two_models.py"


def test_llava_trains_by_flags_with_an_ordinary_vision_tower() -> None:
    """Step 0 is that of the ordinary LLaVA."""
    (status, printed), (status_too, ordinary) = (
        forked_run(1, LLAVA, *TINY, *flags) for flags in (["--mhc"], [])
    )
    assert status == status_too == 0, printed[-3000:] + ordinary[-3000:]
    assert BANNER in printed
    assert len(losses(printed)) == 3 and losses(printed)[0] == losses(ordinary)[0]
    assert losses(printed)[2] != losses(ordinary)[2]


@pytest.mark.parametrize("models", ["teacher, student", "student, teacher", "student, critic"])
def test_an_ordinary_model_beside_one_with_mhc(models: str) -> None:
    """Built with Megatron's own functions, it stays as it is; so does the student's step 0."""
    (status, printed), (status_too, ordinary) = (
        forked_run(1, TWO_MODELS, *TINY, *flags, MODELS=models) for flags in (["--mhc"], [])
    )
    assert status == status_too == 0, printed[-3000:] + ordinary[-3000:]
    assert printed.count("mHC is on") == 1 and BANNER in printed
    assert "> built an ordinary model" in printed
    assert len(losses(printed)) == 3 and losses(printed)[0] == losses(ordinary)[0]
    assert losses(printed)[2] != losses(ordinary)[2]


REFUSED = {
    "dense student": "these layers have none: decoder.layers.0, decoder.layers.1, and no other",
    "teacher, dense student": "these layers have none: decoder.layers.0, decoder.layers.1, and no",
    "critic, student": "build the one with mHC first",
    "part of a student": "in a network that has it these layers have none: decoder.layers.1. Put",
}


@pytest.mark.parametrize("models", REFUSED)
def test_what_would_train_ordinary_layers_by_accident_is_refused(models: str) -> None:
    status, printed = forked_run(1, TWO_MODELS, *TINY, "--mhc", MODELS=models)
    assert status != 0 and not losses(printed)
    message = printed.split("megatron_mhc.run: mHC was asked for, but ")[-1].replace("module.", "")
    assert REFUSED[models] in message, printed[-3000:]
