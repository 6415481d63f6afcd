"""Both directions of conversion beside the numbers: memory, what is refused, what is safe."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import build_hf
from transformers import AutoTokenizer

from nemo_lrpo.planning.parameters import layer_parameters
from nemo_lrpo.planning.shapes import ModelShape, from_huggingface
from tools import hf_to_nemo, nemo_to_hf
from tools.conversion.errors import ConversionError
from tools.conversion.huggingface import TensorPlan, write_weights
from tools.conversion.mapping import entries

WORKER = str(Path(__file__).with_name("conversion_memory_worker.py"))
MIB = 2**20


def large_hf(directory: Path, shard: int) -> int:
    """A bfloat16 Llama of 20 layers in files of `shard` bytes, never in memory as a whole; its bytes."""
    build_hf(directory)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "num_hidden_layers": 20, "hidden_size": 768, "intermediate_size": 2304}
    path.write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    plans = [
        TensorPlan(name, part, torch.bfloat16)
        for entry in entries(from_huggingface(config), config["vocab_size"])
        for name, part in zip(entry.names, entry.parts)
    ]
    write_weights(plans, (torch.randn(entry.shape, dtype=entry.dtype) for entry in plans), directory, shard)
    return sum(entry.size for entry in plans)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc to measure resident memory by")
def test_memory_stays_below_one_file_of_a_model_of_many(tmp_path: Path) -> None:
    shard = 24 * MIB
    total = large_hf(tmp_path / "large", shard)
    assert total > 8 * shard
    arguments = [WORKER, str(tmp_path / "large"), str(tmp_path), str(build_hf(tmp_path / "small"))]
    # Tensors of real sizes are given back to the system when they are freed; so let these be.
    done = run(arguments, cwd=tmp_path, environment={"MALLOC_MMAP_THRESHOLD_": "65536"})
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["to_nemo"] < shard and facts["to_hf"] < shard, facts
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 8 and index["metadata"]["total_size"] == total
    assert all((tmp_path / "back" / name).stat().st_size < shard + MIB for name in files)
    for name, file in index["weight_map"].items():
        with (
            safe_open(tmp_path / "back" / file, "pt") as back,
            safe_open(find(tmp_path / "large", name), "pt") as large,
        ):
            assert torch.equal(back.get_tensor(name), large.get_tensor(name)), name


def find(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


SHAPES = st.builds(
    lambda layers, hidden, ffn, groups, share, dim, rows, tied, bias, gemma: ModelShape(
        layers, hidden, ffn, groups * share, groups, dim, rows, tied, bias, gemma
    ),
    *(st.integers(1, high) for high in (3, 9, 9, 4, 3, 5, 40)),
    *[st.booleans()] * 3,
)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 7))
def test_taking_apart_undoes_putting_together(shape: ModelShape, padding: int) -> None:
    padded = shape.vocabulary + padding
    parameters = 0
    for entry in entries(shape, padded):
        parts = [torch.randn(part) for part in entry.parts]
        joined = entry.join(parts)
        assert tuple(joined.shape) == entry.shape
        back = entry.split(joined)
        assert len(back) == len(parts) and all(torch.equal(a, b) for a, b in zip(parts, back))
        parameters += joined.numel()
    tables = padded * shape.hidden * (1 if shape.tied else 2)
    assert parameters == tables + shape.layers * layer_parameters(shape) + shape.hidden


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 60))
def test_files_of_weights_are_safetensors(tmp_path_factory: pytest.TempPathFactory, shapes, max_shard: int) -> None:
    directory = tmp_path_factory.mktemp("weights")
    tensors = {f"t{number}": torch.randn(shape).to(torch.bfloat16) for number, shape in enumerate(shapes)}
    plans = [TensorPlan(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in tensors.items()]
    write_weights(plans, tensors.values(), directory, max_shard)
    read = {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    return hf_to_nemo.convert(build_hf(root / "hf"), root / "model.nemo")


def unpack(packed: Path, directory: Path) -> Path:
    with tarfile.open(packed) as archive:
        archive.extractall(directory, filter="data")
    return directory


def test_a_directory_serves_as_well_as_an_archive(packed: Path, tmp_path: Path) -> None:
    opened = hf_to_nemo.convert(packed.with_name("hf"), tmp_path / "opened")
    assert (opened / "model_config.yaml").is_file()
    one, other = (nemo_to_hf.convert(source, tmp_path / source.stem / "hf") for source in (packed, opened))
    weights = [load_file(directory / "model.safetensors") for directory in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert (one / "generation_config.json").read_text() == (other / "generation_config.json").read_text()


def test_precision_is_kept_unless_asked_for(packed: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("keep", "bf16"):
        out = nemo_to_hf.convert(packed, tmp_path / precision, precision)
        dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
        found[precision] = (dtypes, json.loads((out / "config.json").read_text())["torch_dtype"])
    assert found == {"keep": ({torch.float32}, "float32"), "bf16": ({torch.bfloat16}, "bfloat16")}


def test_a_model_that_brought_no_hugging_face_section_gets_a_full_configuration(packed: Path, tmp_path: Path) -> None:
    opened = unpack(packed, tmp_path / "opened")
    change(opened, lambda config: config.pop("huggingface"))
    out = nemo_to_hf.convert(opened, tmp_path / "hf")
    config = json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(packed.with_name("hf")))
    assert (config["model_type"], config["vocab_size"]) == ("llama", len(tokenizer))
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert load_file(out / "model.safetensors")["lm_head.weight"].size(0) == len(tokenizer)


def change(opened: Path, edit: Callable[[dict], object]) -> None:
    path = opened / "model_config.yaml"
    config = yaml.safe_load(path.read_text())
    edit(config)
    path.write_text(yaml.safe_dump(config))


def zarr(opened: Path) -> None:
    (opened / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')


class Trap:
    """A pickle that runs what it names."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("sprung",)


def trap(opened: Path) -> None:
    (opened / "model_weights" / ".metadata").write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda opened: change(opened, lambda c: c.update(activation="gelu")), r"activation='gelu'.*'fast-swiglu'"),
        (lambda opened: change(opened, lambda c: c.update(num_moe_experts=8)), r"num_moe_experts=8"),
        (
            lambda opened: change(opened, lambda c: c.update(hidden_size=128)),
            r"weight has shape \(320, 64\), not \(320, 128\)",
        ),
        (lambda opened: change(opened, lambda c: c.update(num_layers=3)), r"has 2 layers, not 3"),
        (lambda opened: change(opened, lambda c: c.pop("num_layers")), r"not that of a Megatron GPT model"),
        (lambda opened: change(opened, lambda c: c["tokenizer"].update(model=None)), r"no tokenizer.json.*--tokenizer"),
        (lambda opened: (opened / "model_config.yaml").unlink(), r"model_config\.yaml is not in it"),
        (lambda opened: shutil.rmtree(opened / "model_weights"), r"no model_weights/metadata\.json"),
        (zarr, r"format 'zarr'; accepted: 'torch_dist'"),
        (trap, r"names posix\.mkdir, which has no place in it"),
    ],
)
def test_what_cannot_be_converted_back_is_named(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    opened = unpack(packed, tmp_path / "opened")
    spoil(opened)
    with pytest.raises(ConversionError, match=message):
        nemo_to_hf.convert(opened, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["opened"]


def test_the_tokenizer_can_come_from_elsewhere(packed: Path, tmp_path: Path) -> None:
    opened = unpack(packed, tmp_path / "opened")
    change(opened, lambda config: config["tokenizer"].update(model=None, merge_file=None))
    out = nemo_to_hf.convert(opened, tmp_path / "hf", tokenizer_dir=packed.with_name("hf"))
    assert AutoTokenizer.from_pretrained(str(out)).chat_template


def other_names(tmp_path: Path) -> Iterator[Path]:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("here")
    file = tmp_path / "file"
    file.write_text("here")
    yield from (full, file)


@pytest.mark.parametrize("convert", [hf_to_nemo.convert, nemo_to_hf.convert])
def test_nothing_else_is_overwritten(packed: Path, tmp_path: Path, convert: Callable[..., Path]) -> None:
    source = packed if convert is nemo_to_hf.convert else packed.with_name("hf")
    for target in other_names(tmp_path):
        with pytest.raises(ConversionError, match="give another name"):
            convert(source, target)
    assert (tmp_path / "full" / "precious").read_text() == (tmp_path / "file").read_text() == "here"


def test_a_compressed_archive_says_what_to_do(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "small.nemo", "w:gz") as archive:
        archive.add(packed.with_name("hf"), arcname=".")
    with pytest.raises(ConversionError, match="not an uncompressed tar.*unpack it"):
        nemo_to_hf.convert(tmp_path / "small.nemo", tmp_path / "hf")


def test_the_command_line_converts_and_says_where(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nemo_to_hf.main(["--nemo", str(packed), "--out", str(tmp_path / "hf"), "--precision", "bf16"])
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'hf'} (")
    with pytest.raises(SystemExit) as stopped:
        nemo_to_hf.main(["--nemo", str(tmp_path / "none.nemo"), "--out", str(tmp_path / "other")])
    assert str(stopped.value).startswith("error: ") and "none.nemo" in str(stopped.value)
