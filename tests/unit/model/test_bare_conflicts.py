"""What a pipeline stage without layers does not go with, from Megatron's flags alone."""

from argparse import Namespace

import pytest

from megatron_mhc.model.bare_conflicts import check_placement, kinds_of_chunks


def placed(layout: str | None = None, pattern: str | None = None, overlap: bool = False) -> object:
    """The arguments that say where layers are."""
    return Namespace(
        pipeline_model_parallel_layout=layout,
        pipeline_model_parallel_size=2,
        hybrid_layer_pattern=pattern,
        overlap_moe_expert_parallel_comm=overlap,
    )


def test_every_chunk_is_known_in_order_of_stages() -> None:
    found = kinds_of_chunks(placed("E|tt|t|mL"))
    assert found == [{"embedding"}, {"decoder"}, {"decoder"}, {"mtp", "loss"}]
    assert kinds_of_chunks(placed(pattern="*-|/*-")) == [{"decoder"}, set()]
    assert kinds_of_chunks(placed()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (placed("E|tt|tt|L", overlap=True), "--overlap-moe-expert-parallel-comm .* no layers"),
        (placed("Et|tt|t|mL", overlap=True), "--overlap-moe-expert-parallel-comm .* no layers"),
        (placed(pattern="*-|", overlap=True), "--overlap-moe-expert-parallel-comm .* no layers"),
        (placed("Et|tt|tm|L"), "without the loss"),
    ],
)
def test_what_does_not_go_with_one_is_refused(args: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_placement(args)


@pytest.mark.parametrize(
    "args",
    [placed(overlap=True), placed("Et|tt|t|tL", overlap=True), placed("E|tt|tt|mL"), placed()],
)
def test_what_does_go_is_not(args: object) -> None:
    check_placement(args)
