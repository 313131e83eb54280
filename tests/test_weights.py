"""The fine-tuning and evaluation configs with every kind of source, GPT-2's names included."""
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before Transformers is loaded: else it asks the hub, and waits

import pytest
import torch
from conftest import bits, complaint, rows, run
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from keepgpt.pretrained import read_weights

SMALL = {"batch_size": 2, "block_size": 32, "gradient_accumulation_steps": 2, "eval_iters": 2}


@pytest.fixture(scope="module")
def dataset(play: Path) -> Path:
    """Hamlet in GPT-2's tokens."""
    run("prepare.py", play, name="hamlet_gpt2", data_dir=play.parent)
    return play.parent / "hamlet_gpt2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 as Transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64,
                               initializer_range=0.2)).save_pretrained(folder)
    return folder


def test_fine_tuning_goes_on_from_every_kind_of_source(folder, dataset, tmp_path):
    args, state, _ = read_weights(str(folder))
    nanogpt = tmp_path / "ckpt.pt"
    torch.save({"model": {"_orig_mod." + name: tensor for name, tensor in state.items()},
                "model_args": args, "iter_num": 5, "config": {}}, nanogpt)

    def tune(name: str, source: Path, steps: int) -> Path:
        run("train.py", "config/finetune_shakespeare.py", out_dir=tmp_path / name, dataset=dataset,
            init_from=source, max_iters=steps, eval_interval=2, learning_rate=1e-2, **SMALL)
        return tmp_path / name

    first, second = tune("folder", folder, 2), tune("nanogpt", nanogpt, 2)
    assert bits(first / "ckpt.pt") == bits(second / "ckpt.pt")
    losses = [row["val_loss"] for row in rows(first, "val_loss")]
    assert losses[1] < losses[0]
    third = tune("bundle", first / "ckpt.pt", 2)
    losses.append(rows(third, "val_loss")[0]["val_loss"])
    assert losses[2] == losses[1]  # its first loss is the other's last


@pytest.fixture(scope="module")
def evaluated(folder: Path, dataset: Path) -> str:
    """What an evaluation of that folder prints."""
    return run("train.py", "config/eval_gpt2.py", dataset=dataset, init_from=folder, **SMALL).stdout


@pytest.mark.parametrize("size", ["", "-medium", "-large", "-xl"])
def test_gpt_2_is_evaluated_from_the_local_cache_without_a_network(size, folder, dataset, evaluated,
                                                                     tmp_path):
    repository = tmp_path / f"models--openai-community--gpt2{size}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    done = run("train.py", f"config/eval_gpt2{size.replace('-', '_')}.py", dataset=dataset,
               env={"HF_HUB_CACHE": str(tmp_path)}, **SMALL)
    assert "val loss" in done.stdout and done.stdout == evaluated
    assert not done.stderr


def test_a_qwen3_is_read_from_the_local_cache_by_its_name(dataset, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "cache/models--Someone--Qwen3-0.0B/snapshots" / ("0" * 40)
    Qwen3ForCausalLM(Qwen3Config(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        hidden_size=16, intermediate_size=32, max_position_embeddings=64, vocab_size=50304,
        tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(folder)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    settings = {"out_dir": tmp_path / "out", "dataset": dataset, "init_from": "Someone/Qwen3-0.0B",
                "env": {"HF_HUB_CACHE": str(tmp_path / "cache")}, "eval_interval": 2, **SMALL}
    run("train.py", max_iters=2, **settings)
    run("train.py", max_iters=4, **settings | {"init_from": "resume"})
    saved = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert saved["step"] == 4 and saved["model"]["lm_head.weight"].shape == (50257, 16)
    sizes = {key: saved["model_args"][key] for key in ("architecture", "n_kv_head", "head_dim",
                                                       "n_ff", "tie_embeddings", "block_size")}
    assert sizes == {"architecture": "qwen3", "n_kv_head": 1, "head_dim": 8, "n_ff": 32,
                     "tie_embeddings": False, "block_size": 32}
    assert {key: saved["config"][key] for key in sizes} == sizes
    done = run("train.py", code=2, **settings | {"out_dir": tmp_path / "other"}, head_dim=16)
    assert "head_dim=8" in complaint(done)


@pytest.mark.parametrize("source", ["out/ckpt.pt", "tests/Qwen3", "a/b/c", "nothing"])
def test_a_path_that_does_not_exist_is_not_looked_up(source, dataset):
    done = run("train.py", "config/eval_gpt2.py", dataset=dataset, init_from=source, code=2,
               env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "no such file" in complaint(done)


def test_gpt_2_without_network_and_cache_is_one_line_at_once(dataset, tmp_path):
    done = run("train.py", "config/eval_gpt2.py", dataset=dataset, code=2,
               env={"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0",
                    "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "gpt2: can't be downloaded" in complaint(done) and "--init_from=FOLDER" in done.stderr
