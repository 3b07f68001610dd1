"""The patch registry: once, undone in full, turned off one by one, loud where a target is gone."""

import sys
import types
from collections.abc import Iterator

import pytest

from megatron_mhc.patches import Patch, PatchError, Registry
from megatron_mhc.patches.registry import is_there
from megatron_mhc.patches.supported_versions import SUPPORTED

REGISTRY_MODULE = sys.modules[Registry.__module__]


def double(original):
    return lambda x: 2 * original(x)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module with a function and a class to patch."""
    module = types.ModuleType("patch_target")

    class Thing:
        @staticmethod
        def make(x):
            return x + 2

    module.function = lambda x: x + 1
    module.Thing = Thing
    monkeypatch.setitem(sys.modules, "patch_target", module)
    monkeypatch.setattr(REGISTRY_MODULE, "megatron_core_version", lambda: "0.19.2")
    yield module


def patch(**changes) -> Patch:
    settings = {"id": "twice", "target": "patch_target:function", "replace": double, "why": "tests"}
    return Patch(**(settings | changes))


def test_applying_twice_is_applying_once_and_undo_is_complete(target: types.ModuleType) -> None:
    registry, original = Registry(), target.function
    registry.apply(patch())
    registry.apply(patch())
    assert target.function(1) == 4
    assert registry.status(patch())[0].state == "applied"
    registry.undo()
    assert target.function is original
    registry.undo("twice")
    assert registry.status(patch())[0].state == "not asked for"


def test_static_methods_come_back_as_they_were(target: types.ModuleType) -> None:
    registry, original = Registry(), vars(target.Thing)["make"]

    def replace(held):
        return staticmethod(double(held.__func__))

    registry.apply(patch(target="patch_target:Thing.make", replace=replace))
    assert target.Thing.make(1) == target.Thing().make(1) == 6
    registry.undo("twice")
    assert vars(target.Thing)["make"] is original


def test_two_patches_of_one_symbol_unwind(target: types.ModuleType) -> None:
    registry, original = Registry(), target.function
    registry.apply(patch(), patch(id="again"))
    assert target.function(1) == 8
    registry.undo()
    assert target.function is original


@pytest.mark.parametrize("first, second", [("twice", "plus"), ("plus", "twice")])
def test_two_patches_of_one_symbol_go_one_by_one_in_any_order(
    target: types.ModuleType, first: str, second: str
) -> None:
    registry, original = Registry(), target.function

    def plus(held):
        return lambda x: held(x) + 10

    registry.apply(patch(), patch(id="plus", replace=plus), patch(id="last"))
    assert target.function(1) == 28
    registry.undo(first)
    assert target.function(1) == {"twice": 24, "plus": 8}[first]
    assert [s.state for s in registry.status(patch(id="last"), patch(id=first))] == [
        "applied",
        "not asked for",
    ]
    registry.undo(second, "last")
    assert target.function is original
    registry.apply(patch(), patch(id="plus", replace=plus))
    registry.undo(first, second)
    assert target.function is original


def test_what_is_only_inherited_is_inherited_again(target: types.ModuleType) -> None:
    class Heir(target.Thing):
        pass

    target.Heir, registry = Heir, Registry()
    patches = [patch(id=name, target="patch_target:Heir.make") for name in ("one", "two")]
    registry.apply(*patches)
    assert Heir.make(1) == 12
    registry.undo("one")
    assert Heir.make(1) == 6
    registry.undo("two")
    assert "make" not in vars(Heir) and Heir.make(1) == 3


def test_a_missing_target_names_everything_and_leaves_nothing(target: types.ModuleType) -> None:
    registry, original = Registry(), target.function
    with pytest.raises(PatchError) as error:
        registry.apply(patch(), patch(id="gone", target="patch_target:nothing"))
    for part in ("'gone'", "patch_target:nothing", "0.19.2", SUPPORTED):
        assert part in str(error.value)
    assert target.function is original
    assert registry.status(patch(target="patch_target:nothing"))[0].state == "missing"


def test_what_is_no_class_any_more_is_missing(target: types.ModuleType) -> None:
    """A function that took a class's name has an `__init__` too: nobody would call the patch."""
    registry = Registry()
    with pytest.raises(PatchError, match=r"did not find .* function in patch_target is no class"):
        registry.apply(patch(target="patch_target:function.__init__"))
    assert not is_there("patch_target:function.__init__")
    assert is_there("patch_target:Thing.make")


def test_a_failure_leaves_what_stood_before(target: types.ModuleType) -> None:
    registry = Registry()
    registry.apply(patch())
    with pytest.raises(PatchError):
        registry.apply(patch(id="gone", target="patch_target:nothing"))
    assert target.function(1) == 4


def test_an_optional_target_may_be_missing(target: types.ModuleType) -> None:
    registry = Registry()
    registry.apply(patch(target="patch_target:nothing", optional=True))
    assert registry.status(patch(target="no_such_module:x"))[0].state == "missing"


@pytest.mark.parametrize("version", ["0.17.1", "0.99.0", None])
def test_another_version_is_refused_by_name(
    target: types.ModuleType, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setattr(REGISTRY_MODULE, "megatron_core_version", lambda: version)
    with pytest.raises(
        PatchError, match=f"knows Megatron-Core {SUPPORTED}; installed is {version or 'none'}"
    ):
        Registry().apply(patch())


def test_the_environment_turns_single_patches_off(
    target: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_MHC_PATCHES", "-other, -twice")
    registry = Registry()
    registry.apply(patch())
    assert target.function(1) == 2
    status = registry.status(patch())[0]
    assert (status.state, status.reason) == ("off", "by MEGATRON_MHC_PATCHES")
    monkeypatch.setenv("MEGATRON_MHC_PATCHES", "twice")
    with pytest.raises(PatchError, match="expected ids with a minus"):
        registry.apply(patch())
