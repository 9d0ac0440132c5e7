"""Hostile and unsupported sources of mobius-onnx's families end in one sentence, run nothing and leave nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_export.__main__ import main
from tests.families.families import FAMILIES
from tests.families.oracle import make

pytestmark = pytest.mark.families

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A valid source of a family, made once."""
    folder = tmp_path_factory.mktemp("whole")

    def source(name: str) -> Path:
        if not (folder / name).exists():
            make(next(family for family in FAMILIES if family.name == name), folder / name)
        return folder / name

    return source


def config(**changes: Any) -> Change:
    """Entries of config.json."""

    def change(path: Path) -> None:
        settings = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(settings))

    return change


def text_config(**changes: Any) -> Change:
    """Entries of the part of config.json that is about text."""

    def change(path: Path) -> None:
        settings = json.loads((path / "config.json").read_text())
        settings["text_config"] |= changes
        (path / "config.json").write_text(json.dumps(settings))

    return change


def third(change: Callable[[np.ndarray], np.ndarray | None]) -> Change:
    """Other values of some tensor, always the same; None removes it."""

    def rewrite(path: Path) -> None:
        held = load_file(path / WEIGHTS)
        name = sorted(held)[2]
        if (changed := change(held.pop(name))) is not None:
            held[name] = changed
        save_file(held, path / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def added(name: str, values: np.ndarray) -> Change:
    """One more tensor."""
    return lambda path: save_file(
        {**load_file(path / WEIGHTS), name: values}, path / WEIGHTS, metadata={"format": "pt"}
    )


def nan(values: np.ndarray) -> np.ndarray:
    values.flat[0] = np.nan
    return values


def infinite(values: np.ndarray) -> np.ndarray:
    values.flat[0] = np.inf
    return values


def removed(values: np.ndarray) -> None:
    return None


def doubled(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values] * 2)


def integers(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int8)


def linked(path: Path) -> None:
    """The weights are a link out of the directory."""
    outside = path.parent.parent / "outside.safetensors"
    shutil.copy(path / WEIGHTS, outside)
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(outside)


def linked_beside_an_index(path: Path) -> None:
    """An index names a valid file, but the file that transformers would read is a link out of the directory."""
    shutil.copy(path / WEIGHTS, path / "shard.safetensors")
    names = dict.fromkeys(load_file(path / WEIGHTS), "shard.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    linked(path)


def two_forms(path: Path) -> None:
    """Both one file of weights and an index of several."""
    linked_beside_an_index(path)
    (path / WEIGHTS).unlink()
    shutil.copy(path / "shard.safetensors", path / WEIGHTS)


def unnamed_link(path: Path) -> None:
    """A link out of the directory that the configuration names."""
    (path / "other.safetensors").symlink_to("/etc/passwd")


def pickled(path: Path) -> None:
    """The configuration names a pickle beside the weights."""
    import torch

    torch.save(load_file(path / WEIGHTS), path / "weights.bin")
    config(transformers_weights="weights.bin")(path)


def cut(path: Path) -> None:
    """The file of weights ends too early."""
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 100)


def adapter(path: Path) -> None:
    """An adapter that names another model."""
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b", "peft_type": "LORA"}')


# Faults of the directory's files, and the expected messages.
FILES = [
    ("linked weights", linked, "leads out of"),
    ("linked weights beside an index", linked_beside_an_index, "leads out of"),
    ("two forms of weights", two_forms, f"holds both {WEIGHTS} and {INDEX}"),
    ("another link", unnamed_link, "other.safetensors leads out of"),
    ("pickle by name", pickled, "transformers_weights is 'weights.bin', which may name other files or code"),
    ("adapter", adapter, "holds an adapter (adapter_config.json)"),
    ("cut off", cut, "is not a complete safetensors file"),
]
# Entries of config.json.
NONSENSE = dict.fromkeys(("hidden_activation", "hidden_act", "activation_function"), "nonsense")
ENTRIES = [
    ("weights by name", {"transformers_weights": "../x.safetensors"}, "transformers_weights is '../x.safetensors'"),
    ("kernel of a hub", {"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation is 'kernels-"),
    ("flash attention", {"_attn_implementation": "flash_attention_2"}, "_attn_implementation is 'flash_attention_2'"),
    ("kernels of parts", {"attn_implementation": {"": "a/b"}}, "attn_implementation is {'': 'a/b'}"),
    ("experts of a hub", {"_experts_implementation": "a/b"}, "_experts_implementation is 'a/b'"),
    ("activation", NONSENSE, "cannot be loaded: "),
]
# Changes of a tensor.
TENSORS = [
    ("NaN", nan, "holds a weight that is not finite"),
    ("infinite", infinite, "holds a weight that is not finite"),
    ("missing tensor", removed, "weights, but its files hold "),
    ("misshapen", doubled, "expected ["),
    ("integers", integers, "holds I8, so it is already quantized"),
]
ADDED = [
    ("tensor too many", "model.evil\n.weight", np.zeros(3, np.float32), "has a tensor that its family does not have, ")
]
HOSTILE: dict[str, tuple[Change, str]] = {
    **{what: (change, message) for what, change, message in FILES},
    **{what: (config(**entries), message) for what, entries, message in ENTRIES},
    **{what: (third(change), message) for what, change, message in TENSORS},
    **{what: (added(name, values), message) for what, name, values, message in ADDED},
}
LAYERS = {"gpt2": "n_layer"}
WIDTH = {"gpt2": {"n_embd": 1 << 17, "n_inner": 1 << 20}}
FAR_WIDER = {"hidden_size": 1 << 17, "intermediate_size": 1 << 20}


@pytest.fixture
def refused(
    sources: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[str, Change], str]:
    """The error message for a changed source; no code was run, little memory was used, and nothing was left behind."""

    def refusal(family: str, change: Change) -> str:
        source, target, marker = tmp_path / "source" / "Tiny", tmp_path / "target", tmp_path / "ran"
        shutil.copytree(sources(family), source)
        target.mkdir()
        code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
        config(auto_map=code, trust_remote_code=True)(source)
        (source / "evil.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
        change(source)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        capfd.readouterr()
        assert main([str(source), str(target / "out" / "model"), "--quantization", "float32"]) == 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
        out, error = capfd.readouterr()
        assert out == ""
        assert error.startswith("model_export: ")
        assert error.count("\n") == 1
        assert error.rstrip("\n").isprintable()
        assert "Tiny" in error
        assert not marker.exists()
        assert list(target.iterdir()) == []
        return error

    return refusal


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gemma3-with-images"])
def test_one_sentence(refused: Callable[[str, Change], str], family: str, case: str) -> None:
    """Each bad source is refused by one sentence that says what is wrong."""
    change, message = HOSTILE[case]
    if family == "gemma3-with-images" and case == "activation":
        change = text_config(hidden_activation="nonsense")
    assert message in refused(family, change)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_lies_cost_no_memory(refused: Callable[[str, Change], str], family: str) -> None:
    """A configuration that claims far more than the files hold is refused before anything is allocated."""
    claims = WIDTH.get(family, FAR_WIDER) | {LAYERS.get(family, "num_hidden_layers"): 40, "layer_types": None}
    assert "weights, but its files hold " in refused(family, config(**claims))


def test_tables_cost_no_memory(refused: Callable[[str, Change], str]) -> None:
    """The tables that a decoder computes for itself are bounded too; here one has the square of the context length."""
    assert "its configuration needs tables of " in refused("gpt_bigcode", config(n_positions=1 << 22))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, "text_config is None, expected an object"),
        (5, "text_config is 5, expected an object"),
        ([1], "text_config is [1], expected an object"),
    ],
)
def test_text_config(refused: Callable[[str, Change], str], part: object, message: str) -> None:
    """The part about text is an object."""
    assert message in refused("gemma3-with-images", config(text_config=part))


def test_sizes_of_images_are_bounded(refused: Callable[[str, Change], str]) -> None:
    """The part about images, which is not exported, is checked too."""
    assert "num_hidden_layers is 1000000000" in refused(
        "gemma3-with-images", config(vision_config={"num_hidden_layers": 10**9})
    )


LONG = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("arcee", {"mlp_bias": True}, "mlp_bias is True, supported with arcee is False"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual is False, supported with gpt_neox is True"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
    ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads is 2, supported with gpt_neox is 4"),
    ("gpt2", {"num_key_value_heads": 2}, "num_key_value_heads is 2, supported with gpt2 is 4"),
    ("granite", {"mlp_bias": True}, "mlp_bias is True"),
    ("nemotron", {"mlp_bias": True}, "mlp_bias is True"),
    ("olmo", {"clip_qkv": 0.5}, "clip_qkv is 0.5, supported with olmo is null"),
    ("olmo2", {"rope_parameters": LONG}, "rope_parameters's type is 'dynamic'"),
    ("olmo2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling's type is 'dynamic'"),
    ("gemma3", {"rope_parameters": {"full_attention": LONG}}, "rope_parameters's type is 'dynamic'"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("phi", {"partial_rotary_factor": 0.3}, "numbers is not supported, only all or multiples of 16"),
    ("gpt2", {"n_head": 16}, "the head size is 4, supported are multiples of 8"),
    ("olmo2", {"num_attention_heads": 8}, "the head size is 8, supported are multiples of 16"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True"),
    ("stablelm", {"attention_bias": True}, "attention_bias is True"),
]


@pytest.mark.parametrize(("family", "entries", "message"), VARIANTS, ids=lambda value: str(value)[:40])
def test_variants(refused: Callable[[str, Change], str], family: str, entries: dict[str, Any], message: str) -> None:
    """A variant that would be built wrongly is refused for its configuration, and no larger bound is offered."""
    error = refused(family, config(**entries))
    assert message in error
    assert "--max-kl" not in error


def test_whole_sources_export(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """The sources that the bad ones are made from can be exported."""
    for name in ("gemma2", "gpt2", "gemma3-with-images"):
        assert main([str(sources(name)), str(tmp_path / name), "--quantization", "float32"]) == 0


def test_tables_of_old_files(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Tables in old files beside the weights, of any type, are ignored."""
    source = tmp_path / "Tiny"
    shutil.copytree(sources("gpt_neox"), source)
    mask = np.ones((1, 1, 8, 8), bool)
    added("gpt_neox.layers.0.attention.bias", mask)(source)
    assert main([str(source), str(tmp_path / "model"), "--quantization", "float32"]) == 0
