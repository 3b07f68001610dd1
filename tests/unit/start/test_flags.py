"""MHCConfig, its flags and its environment variables."""

import argparse
import dataclasses
import re

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.patches import PatchError
from megatron_mhc.start.environment import config_from_environment
from megatron_mhc.start.flags import (
    SPEC,
    active_config,
    add_mhc_arguments,
    config_from_arguments,
    prepare_arguments,
    refuse_yaml,
    take_from_checkpoint,
)
from megatron_mhc.start.settings import SETTINGS
from megatron_mhc.start.suggestions import suggest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0; expected an int, at least 1"),
        ({"num_streams": 4.0}, "num_streams is 4.0; expected an int"),
        ({"num_streams": True}, "num_streams is True; expected an int"),
        ({"num_streams": "4"}, "num_streams is '4'; expected an int"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations is 0; expected an int, at least 1"),
        ({"sinkhorn_iterations": 2.5}, "sinkhorn_iterations is 2.5; expected an int"),
        ({"convention": "v4"}, "convention is 'v4'; expected one of paper, deepseek_v4, deeps"),
        ({"norm_eps": 0}, "norm_eps is 0; expected a number, above 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan; expected a number"),
        ({"pre_eps": -1e-6}, "pre_eps is -1e-06; expected a number, at least 0"),
        ({"sinkhorn_eps": "1e-6"}, "sinkhorn_eps is '1e-6'; expected a number"),
        ({"norm_form": "inside"}, "norm_form is 'inside'; expected one of inside_root, outside"),
        ({"sinkhorn_order": "rows"}, "sinkhorn_order is 'rows'; expected one of columns_first"),
        ({"end": "first"}, "end is 'first'; expected one of mean, head, last_pre"),
        ({"end": "last_pre"}, "end is 'last_pre', .* turn delayed on"),
        ({"convention": "deepseek_v4_1", "delayed": False}, "end is 'last_pre', .* or end with"),
        ({"delayed": 1}, "delayed is 1; expected True or False"),
        ({"head_eps": 1e-5}, "head_eps is 1e-05, but no learned head ends the model"),
        ({"variant": "hc", "pre_eps": 1e-6}, "pre_eps given, which variant 'hc' has no use for"),
        ({"init": "random"}, "init is 'random'; expected one of residual, zero"),
        ({"variant": "HC"}, "variant is 'HC'; expected one of mhc, hc"),
        ({"backend": "triton", "num_streams": 3}, "'triton', which has kernels for 1, 2, 4, 8 str"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of auto, triton, torch"),
        ({"variant": "hc", "sinkhorn_iterations": 5}, "sinkhorn_iterations is 5, .* default, 20"),
        ({"variant": "hc", "convention": "deepseek_v4"}, "is 'deepseek_v4', which variant 'hc'"),
        ({"variant": "hc", "init": "zero"}, "init is 'zero', .* leave it at its default, 'resid"),
        (
            {"recompute": 0},
            r"recompute is 0; expected a number of layers, .* None \(--mhc-recompute off\)",
        ),
        ({"recompute": True}, "recompute is True; expected"),
        ({"recompute": "full"}, "recompute is 'full'; expected"),
        ({"recompute": 2.0}, "recompute is 2.0; expected"),
        (
            {"recompute": 2, "variant": "hc"},
            "recompute is 2, but variant 'hc', which is there to compare",
        ),
        ({"overlap_p2p": "0"}, "overlap_p2p is '0'; expected True or False"),
        ({"overlap_p2p": True, "overlap_in_flight": 3}, "overlap_in_flight is 3; expected 1 or 2"),
        ({"overlap_in_flight": True}, "overlap_in_flight is True; expected 1 or 2"),
        ({"overlap_in_flight": 2}, "overlap_in_flight is 2 without overlap_p2p"),
    ],
)
def test_refused_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHCConfig(**settings)


def parse(*flags: str) -> argparse.Namespace:
    """The flags as Megatron's parser would have them, `--spec` included."""
    parser = add_mhc_arguments(argparse.ArgumentParser())
    parser.add_argument("--spec", nargs="*")
    return parser.parse_args(flags)


def test_flags_become_the_config() -> None:
    flags = ["--mhc-num-streams", "2", "--mhc-convention", "deepseek_v4", "--mhc-backend", "torch"]
    args = parse("--mhc", *flags)
    prepare_arguments(args)
    want = MHCConfig(num_streams=2, convention="deepseek_v4", backend="torch")
    assert config_from_arguments(args) == want
    assert args.spec == ["megatron_mhc.spec", "gpt_layer_spec"]
    # Megatron prints and stores its arguments: the defaults that apply stand among them
    assert args.mhc_sinkhorn_iterations == 20


def megatrons(flag: str, **settings) -> argparse.ArgumentParser:
    """A parser in which Megatron has a flag already."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--enable-mhc-connections", action="store_true")
    parser.add_argument(flag, **settings)
    return parser


SHARED = ("--mhc-sinkhorn-iterations", {"type": int, "default": 20, "help": "Megatron's own"})


def parse_shared(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    """The flags beside a native one, as the process's own command line."""
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    flag, settings = SHARED
    return add_mhc_arguments(megatrons(flag, **settings)).parse_args()


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [((), 20), (("--mhc-sinkhorn-iterations", "5"), 5), (("--mhc-sinkhorn-iterations=5",), 5)],
)
def test_a_flag_that_megatron_has_too_is_shared(
    flags: tuple[str, ...], iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse_shared(monkeypatch, "--mhc", *flags)
    prepare_arguments(args)
    assert config_from_arguments(args) == MHCConfig(sinkhorn_iterations=iterations)
    assert (
        add_mhc_arguments(megatrons(SHARED[0], **SHARED[1])).format_help().count("Megatron's own")
    )


@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--mhc-num-streams", {"type": int}),  # not listed
        ("--mhc-log-interval", {"type": int, "default": 0}),
        ("--mhc", {"action": "store_true"}),
        (SHARED[0], {**SHARED[1], "type": float}),
        (SHARED[0], {**SHARED[1], "default": 10}),
        (SHARED[0], {**SHARED[1], "dest": "steps"}),
    ],
    ids=str,
)
def test_another_clash_names_the_flag(flag: str, settings: dict) -> None:
    with pytest.raises(PatchError, match=f"a flag of its own .*: conflicting .*string: {flag}\\."):
        add_mhc_arguments(megatrons(flag, **settings))


def test_a_native_default_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no native run could start, and no checkpoint's number would be taken."""
    plain = parse_shared(monkeypatch)
    before = vars(plain).copy()
    prepare_arguments(plain)
    assert vars(plain) == before
    stored = argparse.Namespace(spec=SPEC, mhc_sinkhorn_iterations=7)
    for flags, iterations in (((), 7), (("--mhc-sinkhorn-iterations", "20"), 20)):
        args = parse_shared(monkeypatch, "--mhc", *flags)
        take_from_checkpoint(args, None, stored)
        prepare_arguments(args)
        assert config_from_arguments(args).sinkhorn_iterations == iterations


def test_a_shared_flag_without_mhc_is_megatrons_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--mhc-sinkhorn-iterations", "5"]
    with pytest.raises(ValueError, match="--mhc-sinkhorn-iterations given without --mhc"):
        prepare_arguments(parse_shared(monkeypatch, *given))
    native = parse_shared(monkeypatch, *given, "--enable-mhc-connections")
    before = vars(native).copy()
    prepare_arguments(native)
    assert vars(native) == before


def test_where_megatron_alone_reads_a_shared_flag_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the `--spec` route it would set nothing of ours."""
    monkeypatch.setattr("sys.argv", ["train.py", *SPEC])
    monkeypatch.setenv("MHC_SINKHORN_ITERATIONS", "5")
    assert active_config() == (MHCConfig(sinkhorn_iterations=5), "environment")
    monkeypatch.setattr("sys.argv", ["train.py", *SPEC, "--mhc-sinkhorn-iterations", "5"])
    with pytest.raises(ValueError, match="set MHC_SINKHORN_ITERATIONS in the environment"):
        active_config()


@pytest.mark.parametrize("flag", ["--mhc", "--mhc-delayed", "--no-mhc-delayed"])
def test_a_flag_of_ours_beside_a_yaml_file_is_refused(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--yaml-cfg", "run.yaml", flag])
    with pytest.raises(ValueError, match=rf"^{flag} beside --yaml-cfg run.yaml"):
        refuse_yaml(argparse.Namespace(yaml_cfg="run.yaml"))


def test_a_yaml_file_may_set_native_mhc_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of ours, no check would see."""
    monkeypatch.setattr("sys.argv", ["train.py", "--yaml-cfg", "run.yaml"])
    native = {"mhc_num_residual_streams": 4, "mhc_sinkhorn_iterations": 5}
    file = argparse.Namespace(yaml_cfg="run.yaml", **native)
    with pytest.raises(ValueError, match=r"^mhc_sinkhorn_iterations in the file beside"):
        refuse_yaml(file)
    file.enable_mhc_connections = True
    refuse_yaml(file)
    file.mhc_num_streams = 4
    with pytest.raises(ValueError, match=r"^mhc_num_streams in the file beside"):
        refuse_yaml(file)
    monkeypatch.setattr("sys.argv", ["train.py", "--mhc", "--mhc-num-residual-streams=4"])
    with pytest.raises(ValueError, match=r"^--mhc, mhc_num_streams in the file beside"):
        refuse_yaml(file)


def test_every_setting_has_a_flag() -> None:
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(MHCConfig)]
    help_text = add_mhc_arguments(argparse.ArgumentParser()).format_help()
    for name in SETTINGS:
        assert "--mhc-" + name.replace("_", "-") in help_text


def test_a_spec_of_the_users_own_is_kept_for_mhc_to_go_around() -> None:
    args = parse("--mhc", "--spec", "mine", "layer")
    prepare_arguments(args)
    assert args.mhc_base_spec == ["mine", "layer"]


def test_naming_our_spec_turns_mhc_on() -> None:
    args = parse("--spec", "megatron_mhc.spec", "gpt_layer_spec", "--mhc-num-streams", "8")
    prepare_arguments(args)
    assert args.mhc and config_from_arguments(args).num_streams == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--spec megatron_mhc.specs gpt_layer_spec",
            "names nothing: give --spec megatron_mhc.spec",
        ),
        ("--mhc --spec megatron_mhc.spec gpt_layer_specs", "gpt_layer_specs names nothing: give"),
        ("--spec megatron_mhc.spec hybrid_stack_spec", "no --hybrid-layer-pattern says which"),
    ],
)
def test_a_spec_of_ours_that_makes_no_model_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_arguments(parse(*flags.split()))


def test_an_unknown_flag_is_told_from_one_that_it_is_near(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = add_mhc_arguments(argparse.ArgumentParser(allow_abbrev=False))
    suggest(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--mhc", "--mhc-num-stream=2", "--mhc-quux", "4"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"--mhc-num-stream=2 --mhc-quux 4; near are --mhc-num-streams\b", last), last


def test_settings_without_mhc_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--mhc-num-streams, --mhc-overlap-p2p given without --mhc"
    ):
        prepare_arguments(parse("--mhc-num-streams", "4", "--mhc-overlap-p2p"))


def test_without_mhc_nothing_changes() -> None:
    args = parse("--spec", "mine", "layer")
    before = vars(args).copy()
    prepare_arguments(args)
    assert vars(args) == before


def test_environment_variables_become_the_config() -> None:
    environ = {"MHC_NUM_STREAMS": "8", "MHC_INIT": "zero", "PATH": "/bin"}
    assert config_from_environment(environ) == MHCConfig(num_streams=8, init="zero")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MHC_STREAMS": "4"}, "MHC_STREAMS is set; known are MHC_BACKEND, "),
        ({"MHC_NUM_STREAMS": "four"}, "MHC_NUM_STREAMS is 'four'; expected a whole number"),
        (
            {"MHC_RECOMPUTE": "none"},
            "MHC_RECOMPUTE is 'none'; expected off, auto or a number of layers",
        ),
        ({"MHC_NORM_EPS": "small"}, "MHC_NORM_EPS is 'small'; expected a number"),
        ({"MHC_OVERLAP_P2P": "maybe"}, "MHC_OVERLAP_P2P is 'maybe'; expected 0 or 1"),
        ({"MHC_NUM_STREAMS": "-1"}, "num_streams is -1"),
    ],
)
def test_refused_environment(environ: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_environment(environ)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mhc-recompute none", "recompute: 'none'; expected off, auto or a number of layers"),
        ("--mhc-num-streams four", "--mhc-num-streams: 'four'; expected a whole number"),
    ],
)
def test_refused_flags(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--mhc", *flags.split())
    assert message in capsys.readouterr().err


def test_a_variable_beside_the_flags_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would read it: `MHC_NUM_STREAMS=8 ... --mhc` would train with four streams."""
    monkeypatch.setenv("MHC_NUM_STREAMS", "8")
    with pytest.raises(ValueError, match=r"MHC_NUM_STREAMS set .* give --mhc-num-streams"):
        prepare_arguments(parse("--mhc"))
    # of a run without mHC the variable says nothing
    prepare_arguments(parse())
    monkeypatch.delenv("MHC_NUM_STREAMS")
    monkeypatch.setenv("MHC_NUM_STREAM", "8")
    with pytest.raises(ValueError, match=r"MHC_NUM_STREAM set .* give --mhc-num-streams"):
        prepare_arguments(parse("--mhc"))
    monkeypatch.delenv("MHC_NUM_STREAM")
    monkeypatch.setenv("MHC_HOME", "/not/of/ours")
    prepare_arguments(parse("--mhc"))


@pytest.mark.parametrize(
    ("given", "value"), [("auto", "auto"), ("3", 3), ("off", None), (None, None)]
)
def test_recompute_from_flag_and_environment(given: str | None, value: int | str | None) -> None:
    args = parse("--mhc", *(() if given is None else ("--mhc-recompute", given)))
    prepare_arguments(args)
    assert config_from_arguments(args).recompute == value
    environ = {} if given is None else {"MHC_RECOMPUTE": given}
    assert config_from_environment(environ).recompute == value
