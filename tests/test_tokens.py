"""Weights from elsewhere are only used with the tokens that they were trained on."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_error, run

import sample
from keepgpt.errors import UserError
from keepgpt.same_tokens import check_tokenizer
from keepgpt.tokenizer import from_meta

# what matters here is whether a run starts
ONE_STEP = TINY | {
    "max_iters": 1,
    "eval_iters": 1,
    "warmup_iters": 0,
    "lr_decay_iters": 1,
}


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one step on characters."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    run("train.py", out_dir=folder, dataset=dataset, **ONE_STEP)
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Return its weights as a foreign folder in Hugging Face's format, with a tokenizer.json."""
    folder = trained.parent / "exported"
    run("tools.export", out_dir=trained, to=folder)
    # it has the dataset's own description of the tokens
    (folder / "keepgpt.json").unlink()
    return folder


@pytest.fixture(scope="module")
def nanogpt(trained: Path, dataset: Path) -> Path:
    """Return its weights as nanoGPT leaves them in its out_dir, of a compiled model."""
    bundle = torch.load(trained / "ckpt.pt", weights_only=True)
    state = {f"_orig_mod.{name}": tensor for name, tensor in bundle["model"].items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    folder = trained.parent / "nanogpt"
    folder.mkdir()
    torch.save(
        {
            "model": state,
            "optimizer": bundle["optimizer"],
            "model_args": bundle["model_args"],
            "iter_num": 1,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": str(dataset)},
        },
        folder / "ckpt.pt",
    )
    return folder


@pytest.fixture(scope="module")
def ciphered(play: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of that text in other letters: as many characters, each with another id."""
    folder = tmp_path_factory.mktemp("cipher")
    text = play.read_text(encoding="utf-8")
    # letters of the Cyrillic block
    letters = [c if c.isspace() else chr(ord(c) + 0x400) for c in text]
    file = folder / "text.txt"
    file.write_text("".join(letters), encoding="utf-8")
    run("prepare.py", file, name="set", tokenizer="char", data_dir=folder)
    return folder / "set"


def swap_two_ids(folder: Path, to: Path, name: str) -> Path:
    """Return a copy of an exported folder with another tokenizer of that size, in a file called
    `name`."""
    shutil.copytree(folder, to)
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (to / "tokenizer.json").unlink()
    # vocab.json, of older folders, has the vocabulary alone
    content = tokenizer if name == "tokenizer.json" else vocabulary
    (to / name).write_text(json.dumps(content))
    return to


def train(source: Path, dataset: Path, out_dir: Path, **flags):
    """Train one step from the weights of `source`."""
    # the block of the weights is kept
    settings = {key: ONE_STEP[key] for key in ONE_STEP if key != "block_size"}
    return run(
        "train.py",
        init_from=source,
        dataset=dataset,
        out_dir=out_dir,
        **settings,
        **flags,
    )


def test_a_folder_with_the_dataset_s_tokenizer_is_trained_on(
    exported, dataset, tmp_path
):
    assert not train(exported, dataset, tmp_path).stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_folder_with_another_tokenizer_is_refused(name, exported, dataset, tmp_path):
    other = swap_two_ids(exported, tmp_path / "other", name)
    expected = "'b' as token" if name == "tokenizer.json" else "merges.txt"
    line = read_error(train(other, dataset, tmp_path / "out", code=None))
    assert expected in line
    line = read_error(run("sample.py", init_from=other, dataset=dataset, code=None))
    assert expected in line


def test_a_folder_without_a_tokenizer_is_noted(exported, dataset, tmp_path):
    shutil.copytree(exported, tmp_path / "other")
    (tmp_path / "other/tokenizer.json").unlink()
    done = train(tmp_path / "other", dataset, tmp_path / "out")
    assert done.stderr.startswith("note: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_is_sampled_with_its_own_tokens(exported, trained, dataset):
    how = {"temperature": 0, "num_samples": 1, "max_new_tokens": 20, "start": "Ham"}
    expected = run("sample.py", out_dir=trained, **how).stdout
    # a dataset with the same tokens changes nothing
    for flags in ({}, {"dataset": dataset}):
        done = run("sample.py", init_from=exported, **flags, **how)
        assert "note" not in done.stderr
        assert done.stdout == expected


def test_a_prompt_is_read_as_prepare_reads_text(tmp_path):
    vocabulary = from_meta({"tokenizer": {"kind": "gpt2"}})
    text = "To be,\nor not\n\nto be"
    # the line ends of three systems, a byte-order mark, and gzip
    for i, content in enumerate(
        (
            text.encode(),
            text.replace("\n", "\r\n").encode(),
            text.replace("\n", "\r").encode(),
            b"\xef\xbb\xbf" + text.encode(),
            gzip.compress(text.encode()),
        )
    ):
        (tmp_path / str(i)).write_bytes(content)
        ids = sample.read_prompt(f"FILE:{tmp_path / str(i)}", vocabulary)
        assert vocabulary.decode(ids) == text
    # Latin-1, UTF-16 with and without its mark, and a zip archive
    for content in (
        b"\xe9t\xe9",
        text.encode("utf-16"),
        text.encode("utf-16-le"),
        b"PK\x03\x04\xff",
    ):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="--start: .*bad: expected text in UTF-8"):
            sample.read_prompt(f"FILE:{tmp_path / 'bad'}", vocabulary)


def test_as_many_other_characters_are_refused(trained, dataset, ciphered, tmp_path):
    # the size alone does not tell them apart
    meta = json.loads((dataset / "meta.json").read_text())
    other_meta = json.loads((ciphered / "meta.json").read_text())
    assert meta["vocab_size"] == other_meta["vocab_size"]
    line = read_error(train(trained / "ckpt.pt", ciphered, tmp_path, code=None))
    assert "--dataset=" in line
    assert read_error(run("sample.py", out_dir=trained, dataset=ciphered, code=None))


@pytest.mark.parametrize(
    "size, passes",
    [(50257, True), (50304, True), (50256, False), (50321, False)],
    # 50304 is 50257 rounded up to a multiple of 64
    ids=["equal", "padded", "a row less", "a row too much"],
)
def test_gpt_2_s_padded_vocabulary_is_gpt_2_s(size, passes, capsys):
    # weights that say nothing about their tokens
    meta = {"name": "x", "vocab_size": 50257, "tokenizer": {"kind": "gpt2"}}
    # it passes with a note
    if passes:
        check_tokenizer("out/ckpt.pt", size, {}, meta)
        assert capsys.readouterr().err.count("\n") == 1
    else:
        with pytest.raises(UserError):
            check_tokenizer("out/ckpt.pt", size, {}, meta)


# nanoGPT's folder


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_nanogpt_s_folder_is_answered_with_the_command(
    init_from, nanogpt, dataset, tmp_path
):
    # a resume would need keepGPT's own format; a new folder keeps nanoGPT's file
    before = (nanogpt / "ckpt.pt").read_bytes()
    flags = ONE_STEP | {"init_from": init_from}
    done = run("train.py", out_dir=nanogpt, dataset=dataset, code=2, **flags)
    assert f"--init_from={nanogpt}/ckpt.pt --out_dir=" in done.stderr.splitlines()[-1]
    assert (nanogpt / "ckpt.pt").read_bytes() == before


def test_nanogpt_s_checkpoint_is_trained_on_with_a_note(nanogpt, dataset, tmp_path):
    done = train(nanogpt / "ckpt.pt", dataset, tmp_path)
    assert done.stderr.startswith("note: ")
    assert done.stderr.count("\n") == 1
    # a new run, from step 0
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 1


def test_nanogpt_s_checkpoint_is_sampled_as_nanogpt_does(nanogpt, trained):
    how = {"temperature": 0, "num_samples": 1, "max_new_tokens": 20, "start": "Ham"}
    done = run("sample.py", init_from=nanogpt / "ckpt.pt", **how)
    assert done.stdout == run("sample.py", out_dir=trained, **how).stdout
    assert "note: " in done.stderr
