"""Files from nanoGPT's first tutorial work here: train.bin, val.bin, meta.pkl, a checkpoint."""
import json
import pickle
import shutil

import pytest
import torch
from conftest import TINY, complaint, rows, run


@pytest.fixture(scope="module")
def place(dataset, tmp_path_factory):
    """Return a folder with a dataset `tutorial` as nanoGPT prepares it."""
    place = tmp_path_factory.mktemp("nanogpt")
    (place / "tutorial").mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(dataset / name, place / "tutorial")
    itos = dict(enumerate(json.loads((dataset / "meta.json").read_text())["tokenizer"]["chars"]))
    (place / "tutorial/meta.pkl").write_bytes(pickle.dumps(
        {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}))
    return place


@pytest.fixture(scope="module")
def checkpoint(place):
    """Return a checkpoint trained on it with nanoGPT's keys: no vocabulary, compiled names."""
    run("train.py", **TINY | {"data_dir": place, "dataset": "tutorial", "out_dir": place / "out"})
    bundle = torch.load(place / "out/ckpt.pt", weights_only=True)
    state = {f"_orig_mod.{name}": tensor for name, tensor in bundle["model"].items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    torch.save({"model": state, "optimizer": bundle["optimizer"], "iter_num": 40,
                "model_args": bundle["model_args"], "best_val_loss": torch.tensor(3.0),
                "config": bundle["config"]}, place / "nanogpt.pt")
    return place / "nanogpt.pt"


def test_both_datasets_train_identically(place, checkpoint, dataset):
    run("train.py", **TINY | {"dataset": dataset, "out_dir": place / "ours"})
    assert rows(place / "ours") == rows(place / "out")


def test_dataset_supplies_a_checkpoints_vocabulary(place, checkpoint):
    told = complaint(run("sample.py", code=None, init_from=checkpoint))
    assert "--dataset" in told
    flags = {"init_from": checkpoint, "dataset": place / "tutorial"}
    sample = {"start": "HAM", "temperature": 0, "num_samples": 1, "max_new_tokens": 20}
    ours = run("sample.py", out_dir=place / "out", **sample)
    assert run("sample.py", **flags, **sample).stdout == ours.stdout
    run("tools.export", **flags, to=place / "exported")
    assert run("sample.py", init_from=place / "exported", **sample).stdout == ours.stdout


def test_a_nanogpt_checkpoint_can_be_fine_tuned(place, checkpoint):
    run("train.py", **TINY | {"data_dir": place, "dataset": "tutorial", "init_from": checkpoint,
                              "out_dir": place / "further"})
    before, after = rows(place / "out", "val_loss")[-1], rows(place / "further", "val_loss")
    assert after[0]["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert after[-1]["val_loss"] < before["val_loss"]
