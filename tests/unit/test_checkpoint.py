"""Stage-end folders: whole or absent, recorded, verified; and states of other models refused."""

import json

import pytest
import torch

from alignvlm_pl.errors import CheckpointError
from alignvlm_pl.training.checkpoint_metadata import check_contract
from alignvlm_pl.training.export import RECORD, compare_states, export, read_record, verify_parent

CONTRACT = {"tokenizer": "ab12", "tiling": {"rule": "ovis", "max_tiles": 9}, "connector": {"type": "align"}}


class Weights:
    """Writes one file of weights, as a Hugging Face model does."""

    def __init__(self, content: bytes = b"weights", *, fails: bool = False) -> None:
        self.content, self.fails = content, fails

    def save_pretrained(self, folder, **options):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(self.content)
        if self.fails:
            raise OSError(28, "No space left on device")


class Processor:
    def save_pretrained(self, folder):
        (folder / "processor_config.json").write_text("{}")


def exported(folder, content=b"weights"):
    return export(Weights(content), Processor(), folder, {"stage": "one", "processor": CONTRACT})


def test_export_and_record(tmp_path):
    record = exported(tmp_path / "run" / "hf")
    assert read_record(tmp_path / "run" / "hf") == record
    assert record["stage"] == "one"
    # printf weights | sha256sum
    assert record["weights_sha256"].startswith("9a129038d9a0")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["hf"]


def test_a_later_export_replaces_the_folder(tmp_path):
    first, second = exported(tmp_path / "hf"), exported(tmp_path / "hf", b"other")
    assert first["weights_sha256"] != second["weights_sha256"]
    assert read_record(tmp_path / "hf") == second
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failed_export_keeps_the_earlier_folder_and_leaves_nothing_else(tmp_path):
    record = exported(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="No space left on device; free some space or set another run_dir"):
        export(Weights(b"new", fails=True), Processor(), tmp_path / "hf", {})
    assert read_record(tmp_path / "hf") == record
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_without_record_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"has no {RECORD}: expected the hf/ folder"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "one"}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    exported(tmp_path / "hf")
    (tmp_path / "hf" / RECORD).write_text(text)
    with pytest.raises(CheckpointError, match=RECORD):
        read_record(tmp_path / "hf")


def test_changed_weights_are_refused_with_both_sums(tmp_path):
    exported(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(CheckpointError, match=r"have sha256 \w{12}…, its stage.json says 9a129038d9a0…"):
        read_record(tmp_path / "hf")


def test_parent_must_be_the_named_stage_with_the_models_contract(tmp_path):
    record = exported(tmp_path / "hf")
    assert verify_parent(tmp_path / "hf", parent=None, contract=CONTRACT) == record
    assert verify_parent(tmp_path / "hf", parent="one", contract=CONTRACT) == record
    with pytest.raises(CheckpointError, match="written by stage 'one', expected 'two'"):
        verify_parent(tmp_path / "hf", parent="two", contract=CONTRACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "cd34"}, "hf was trained with tokenizer ab12, the model has cd34. Use the model file"),
        (
            {"tiling": {"rule": "ovis", "max_tiles": 4}, "connector": {"type": "mlp"}},
            "with tiling.max_tiles 9, the model has 4; connector.type align, the model has mlp",
        ),
        ({"spell_answers": True}, "with spell_answers none, the model has True"),
    ],
)
def test_a_parent_of_another_contract_is_refused_with_both_values(tmp_path, change, message):
    exported(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message):
        verify_parent(tmp_path / "hf", parent="one", contract={**CONTRACT, **change})


def test_the_record_is_readable_json(tmp_path):
    exported(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / RECORD).read_text())["processor"] == CONTRACT


def test_weights_in_several_files_are_hashed_with_their_index_and_load(tmp_path):
    from alignvlm_pl.models.build import build_model, build_processor, load_weights
    from alignvlm_pl.models.tiny import tiny_spec

    spec = tiny_spec(tmp_path / "tokenizer")
    processor = build_processor(spec)
    model, other = build_model(spec, processor), build_model(spec, processor)
    export(model, processor, tmp_path / "hf", {"stage": "one", "processor": {}}, max_shard_size="200KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    read_record(tmp_path / "hf")
    load_weights(other, tmp_path / "hf")
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    index = tmp_path / "hf" / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("00001-of", "00002-of", 1))
    with pytest.raises(CheckpointError, match="were changed or damaged"):
        read_record(tmp_path / "hf")
    index.write_text(text)
    files[1].unlink()
    with pytest.raises(CheckpointError, match="were changed or damaged"):
        read_record(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, r"x is of another model \(1 differences\): a is missing"),
        ({"c": torch.zeros(1)}, r"\(1 differences\): c is not in the model"),
        ({"a": torch.zeros(3)}, r"a has shape \(3,\), expected \(2,\)"),
        ({"a": None, "b": torch.zeros(9)}, r"\(2 differences\)"),
    ],
)
def test_states_of_other_models_are_refused(change, message):
    model = {"a": torch.zeros(2), "b": torch.zeros(1)}
    compare_states(dict(model), model, source="x")
    found = {name: value for name, value in {**model, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        compare_states(found, model, source="x")


def test_an_option_that_is_younger_than_the_weights_had_its_default():
    old = {"connector": {"type": "mlp", "pixel_shuffle": 1, "layers": 2, "activation": "gelu"}}
    check_contract(old, {"connector": {**old["connector"], "norm": False}}, source="hf")
    with pytest.raises(CheckpointError, match=r"hf was trained with connector\.norm False, the model has True"):
        check_contract(old, {"connector": {**old["connector"], "norm": True}}, source="hf")
    gone = {"connector": {"type": "their.Connector", "size": 3}}
    check_contract(gone, gone, source="hf")
    with pytest.raises(CheckpointError, match=r"connector\.type their\.Connector, the model has mlp"):
        check_contract(gone, old, source="hf")
