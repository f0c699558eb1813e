"""Checkpoints: ours round-trip, other code bases' load, and nothing wrong gets in."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from models.weights import load_weights, read_metadata, save_weights, weights_hash
from models.zoo import create_model

RECORD = {"classes": ["a", "b", "c"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}


def small(classes=3, name="cifar_resnet8", **kwargs):
    return create_model(name, classes, **kwargs)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_round_trip_with_adapter_and_record(tmp_path):
    model, other = small(adapter_dim=4), small(adapter_dim=4)
    assert not same(model, other)
    save_weights(model, tmp_path / "s.safetensors", RECORD)
    record = load_weights(other, tmp_path / "s.safetensors", expect=RECORD)
    assert same(model, other)
    made = {"architecture": "cifar_resnet8", "num_classes": 3, "small_input": True, "feature_dim": 64}
    assert record == {**made, **RECORD} == read_metadata(tmp_path / "s.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["s.safetensors"]


def test_an_adapter_is_loaded_only_where_both_have_one(tmp_path):
    path = tmp_path / "s.safetensors"
    model, bare, fresh = small(adapter_dim=4), small(), small(adapter_dim=4)
    save_weights(model, path, {})
    load_weights(bare, path)
    assert same(bare.net, model.net)
    save_weights(bare, path, {})
    before = weights_hash(fresh.distillation_adapter)
    load_weights(fresh, path)
    assert same(fresh.net, model.net)
    assert weights_hash(fresh.distillation_adapter) == before


def test_channels_last_and_tied_weights_are_saved_in_plain_layout(tmp_path):
    model, other = small().to(memory_format=torch.channels_last), small()
    model.net.layer1[0].bn1.weight = model.net.layer1[0].bn2.weight
    save_weights(model, tmp_path / "s.safetensors", {})
    load_weights(other, tmp_path / "s.safetensors")
    assert same(model, other)


def refused(model, path, match, **kwargs):
    before = weights_hash(model)
    with pytest.raises(ValueError, match=match) as caught:
        load_weights(model, path, **kwargs)
    assert "\n" not in str(caught.value)
    assert weights_hash(model) == before


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model, path = small(), tmp_path / "s.safetensors"
    refused(model, path, "no checkpoint at")
    save_weights(model, path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(model, path, "is it whole")
    for name, content in (("a.pt", whole[:99]), ("b.pth", b""), ("c.pt", pickle.dumps({"x": Path("y")}, protocol=2))):
        (tmp_path / name).write_bytes(content)
        refused(model, tmp_path / name, "cannot be read")
    (tmp_path / "d.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(model, tmp_path / "d.pth", r"not a torch\.save or safetensors file; it begins with b'version http")
    torch.save({"epoch": 3}, tmp_path / "e.pt")
    refused(model, tmp_path / "e.pt", "no state dict")
    torch.save(model, tmp_path / "f.pt")
    refused(
        model,
        tmp_path / "f.pt",
        r"holds an object \(models\.features\.FeatureNet\), not a state dict; save its state_dict",
    )


def test_pickled_code_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "boom",))

    torch.save({"state_dict": Bomb()}, tmp_path / "x.pth")
    refused(small(), tmp_path / "x.pth", "holds an object")
    assert not (tmp_path / "boom").exists()


def test_another_class_count_is_named_first(tmp_path):
    save_weights(small(5, "cifar_wrn_16_1"), tmp_path / "s.safetensors", {})
    refused(small(3), tmp_path / "s.safetensors", "num_classes is 5 in the checkpoint, 3 here")
    torch.save(small(5).net.state_dict(), tmp_path / "t.pt")
    refused(small(3), tmp_path / "t.pt", "num_classes is 5 in the checkpoint, 3 here")
    torch.save({"model": small(5, "cifar_mobilenetv2_half").net.state_dict()}, tmp_path / "u.pt")
    refused(small(3, "cifar_mobilenetv2_half"), tmp_path / "u.pt", "num_classes is 5")


def test_another_architecture_is_refused(tmp_path):
    save_weights(small(name="cifar_resnet14"), tmp_path / "s.safetensors", {})
    refused(small(), tmp_path / "s.safetensors", "architecture is 'cifar_resnet14' in the checkpoint, 'cifar_resnet8'")
    torch.save(small(name="cifar_resnet14").net.state_dict(), tmp_path / "t.pt")
    refused(small(), tmp_path / "t.pt", r"not a checkpoint of cifar_resnet8: 36 unexpected \(layer1\.1\.")
    torch.save(small(name="cifar_resnet8x4").net.state_dict(), tmp_path / "u.pt")
    refused(small(), tmp_path / "u.pt", r"mis-shaped \(conv1\.weight \(32, 3, 3, 3\) instead of \(16, 3, 3, 3\)")
    torch.save({"conv9.weight": torch.ones(1)}, tmp_path / "v.pt")
    refused(small(), tmp_path / "v.pt", r"47 missing \(.*, …\); 1 unexpected \(conv9\.weight\)")


def test_another_stem_is_refused_though_the_shapes_agree(tmp_path):
    save_weights(create_model("test_resnet", 3, small_input=False), tmp_path / "s.safetensors", {})
    model = create_model("test_resnet", 3)
    refused(model, tmp_path / "s.safetensors", "small_input is False in the checkpoint, True here")


def test_other_expectations_and_adapters_are_checked(tmp_path):
    path = tmp_path / "s.safetensors"
    save_weights(small(adapter_dim=4), path, RECORD)
    refused(small(), path, "classes is", expect={"classes": ["a", "b", "d"]})
    refused(small(adapter_dim=5), path, "distillation adapter does not fit: .*mis-shaped")
    load_weights(small(), path, expect={"not_recorded": 1})


def test_classes_in_another_order_are_put_in_the_asked_one(tmp_path, caplog):
    """The same images then get the same logits, each where its class is; a vision transformer's head likewise."""
    for name, classifier in (("cifar_resnet8", "fc"), ("test_vit", "head")):
        model, other = small(name=name, adapter_dim=4), small(name=name, adapter_dim=4)
        with torch.no_grad():
            getattr(model.net, classifier).bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        save_weights(model, tmp_path / "s.safetensors", RECORD)
        with caplog.at_level("INFO", "asib"):
            record = load_weights(other, tmp_path / "s.safetensors", classes=("c", "a", "b"))
        assert record["classes"] == ["a", "b", "c"]
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(other.eval()(x).logits, model.eval()(x).logits[:, [2, 0, 1]])
        assert weights_hash(other.distillation_adapter) == weights_hash(model.distillation_adapter)
    assert ["its classes are in another order" in r.getMessage() for r in caplog.records] == [True, True]
    for classes in (("a", "b", "d"), ("x", "y", "z")):
        refused(other, tmp_path / "s.safetensors", "it was trained on other classes", classes=classes)


def test_hash_is_sha256_of_names_dtypes_shapes_and_bytes():
    module = torch.nn.BatchNorm1d(2)
    expected = hashlib.sha256()
    values = {"bias": [0, 0], "num_batches_tracked": 0, "running_mean": [0, 0], "running_var": [1, 1], "weight": [1, 1]}
    for name, value in values.items():
        array = np.array(value, dtype="<i8" if name == "num_batches_tracked" else "<f4")
        expected.update(f"{name}\0torch.{array.dtype}\0{array.shape}\0".encode() + array.tobytes())
    assert weights_hash(module) == expected.hexdigest()


def test_hash_sees_weights_and_not_memory_format():
    model = small()
    first = weights_hash(model)
    assert weights_hash(model.to(memory_format=torch.channels_last)) == first
    with torch.no_grad():
        model.net.bn1.bias[0] += 1e-6
    assert weights_hash(model) != first
    assert weights_hash(small().bfloat16()) != first
