"""What names a layer with mHC in a file finds it again: pickle, and Megatron's yaml of a config."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core.models.gpt import gpt_layer_specs as specs
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.config.instantiate_utils import _locate
from megatron.training.config.yaml_utils import safe_yaml_representers

from megatron_mhc import MHCConfig, with_mhc
from megatron_mhc.patches import registry
from tests.megatron.common.launch import forked_python


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """What `with_mhc` applies is undone again."""
    yield
    registry.undo()


class OwnLayer(TransformerLayer):
    """A user's own layer."""


class Holder:
    """Where a layer's class has a name of two parts."""

    class Inner(TransformerLayer):
        """Such a layer."""


MHC = MHCConfig(num_streams=2, recompute="auto")
LAYERS = [TransformerLayer, OwnLayer, Holder.Inner]


def wide_spec(layer: type) -> Any:
    """A spec of this layer with mHC."""
    spec = specs.get_gpt_layer_local_spec()
    spec.module = layer
    return with_mhc(spec, MHC)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_spec_comes_back_from_pickle_in_another_process(layer: type, tmp_path: Path) -> None:
    spec = wide_spec(layer)
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(pickle.dumps(spec))
    program = (
        "import pickle, sys\n"
        "spec = pickle.load(open(sys.argv[1], 'rb'))\n"
        "pickle.dump((spec, spec.module.__bases__[1], spec.params), open(sys.argv[2], 'wb'))\n"
    )
    # one that has not imported Megatron, and (as that takes seconds) two that have
    stage = "torch" if layer is TransformerLayer else "megatron"
    done = forked_python("-c", program, str(there), str(back), stage=stage)
    assert done.returncode == 0, done.stdout[-2000:]
    again, base, params = pickle.loads(back.read_bytes())
    assert again.module is spec.module and base is layer
    assert again.params == params == spec.params
    assert again.submodules.input_layernorm is spec.submodules.input_layernorm


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_of_a_spec_has_the_same_layer(layer: type) -> None:
    spec = wide_spec(layer)
    again = copy.deepcopy(spec)
    assert again.module is spec.module and again.params == spec.params


@pytest.mark.parametrize("layer", LAYERS)
def test_megatrons_yaml_finds_layer_and_settings_again(layer: type) -> None:
    """Read as its `instantiate` does (which wants omegaconf): a name is located, and called."""
    spec = wide_spec(layer)
    with safe_yaml_representers():
        text = yaml.safe_dump({"module": spec.module, "params": spec.params})
    read = yaml.safe_load(text)
    assert read["module"].pop("_call_") is False
    assert _locate(read["module"]["_target_"]) is spec.module
    settings = read["params"]["mhc"]
    assert _locate(settings.pop("_target_"))(**settings) == MHC


def test_a_name_of_nothing_is_refused_as_megatron_does() -> None:
    from megatron_mhc.model import layer_classes

    for name in ("nothing", "megatron.nothing", "megatron.core.transformer.module.Nothing"):
        with pytest.raises(ImportError, match="Error loading"):
            _locate(f"{layer_classes.__name__}.of.{name}")
