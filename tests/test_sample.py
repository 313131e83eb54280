"""Text out of a checkpoint."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, load, make_command, read_error, run
from small_tokenizers import save, train_sentencepiece, train_unigram, train_wordpiece

import sample
import train as train_script
from keepgpt.tokenizer import describe_tokenizer, from_meta
from model import ModelArgs, build_model


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """Return the folder of a tiny trained model, without a dataset beside it."""
    folder = tmp_path_factory.mktemp("trained")
    # enough steps that its samples differ with the seed and the checkpoint
    flags = TINY | {"max_iters": 50, "lr_decay_iters": 50, "learning_rate": 1e-2}
    run("train.py", out_dir=folder, dataset=dataset, **flags)
    return folder


def test_it_needs_only_the_checkpoint(trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path / "best.pt")
    done = run(
        "sample.py",
        out_dir=tmp_path,
        start="Ham",
        num_samples=2,
        max_new_tokens=50,
        cwd=tmp_path,
    )
    first, second = split_samples(done.stdout)
    assert "step 50" in done.stderr
    # the prompt and 50 characters
    assert first != second
    for text in (first, second):
        assert text.startswith("Ham")
        assert len(text) == 53


def test_the_step_of_an_older_loss_is_named(train, tmp_path):
    # checkpoints at 7, 14 and 20, evaluations at 10 and 20
    flags = {"checkpoint_interval": 7, "keep_checkpoints": 9}
    train(max_iters=20, **flags)
    saved = tmp_path / "out"
    assert load(saved / "ckpt.pt")["evaluation"]["step"] == 20
    for step, printed in ((14, " at step 10"), (20, "")):
        folder = tmp_path / str(step)
        folder.mkdir()
        shutil.copy(saved / f"ckpt-{step:08}.pt", folder / "ckpt.pt")
        flags = {"init_from": "resume", "max_new_tokens": 0}
        done = run("sample.py", out_dir=folder, **flags)
        assert f"step {step}, " in done.stderr
        assert done.stderr.endswith(f"{printed}\n")


def split_samples(text: str) -> list[str]:
    """Return the samples that sample.py printed."""
    return text.removesuffix("\n").split("\n---------------\n")


def test_a_seed_repeats_and_another_does_not(trained):
    def sample(**flags):
        flags |= {"out_dir": trained, "num_samples": 1, "max_new_tokens": 60}
        return split_samples(run("sample.py", **flags).stdout)

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    # both take the likeliest token
    assert sample(seed=1, temperature=0) == sample(seed=2, top_k=1)
    assert len(sample(dtype="bfloat16")[0]) == len(sample()[0])


def test_the_newest_or_the_best_or_any_file(trained, tmp_path):
    flags = {"num_samples": 1, "max_new_tokens": 40, "temperature": 0}
    older = next(trained.glob("ckpt-*40.pt"))
    file = run("sample.py", out_dir=trained, init_from=older, **flags)
    # a run whose best checkpoint is not its newest
    shutil.copy(older, tmp_path / "best.pt")
    shutil.copy(trained / "ckpt.pt", tmp_path / "ckpt.pt")
    best = run("sample.py", out_dir=tmp_path, **flags)
    assert "step 40" in best.stderr
    assert best.stdout == file.stdout
    newest = run("sample.py", out_dir=tmp_path, init_from="resume", **flags)
    assert "step 50" in newest.stderr


def test_a_prompt_from_a_file_longer_than_the_block(trained, play, tmp_path):
    # the block has 32 tokens
    prompt = play.read_text()[:200]
    (tmp_path / "prompt.txt").write_text(prompt)
    done = run(
        "sample.py",
        out_dir=trained,
        start=f"FILE:{tmp_path / 'prompt.txt'}",
        num_samples=1,
        max_new_tokens=80,
    )
    (text,) = split_samples(done.stdout)
    assert text.startswith(prompt)
    assert len(text) == 200 + 80


@pytest.mark.parametrize(
    "flags, shown",
    [
        ({"start": "naïve 你好"}, "你"),
        ({"start": "FILE:nosuch.txt"}, "nosuch.txt"),
        ({"out_dir": "nosuch"}, "python train.py"),
        ({"init_from": "nosuch"}, "no such file, folder or model"),
        ({"num_samples": 0}, "num_samples"),
        ({"temprature": 1}, "did you mean temperature?"),
        ({"device": "cuda:9"}, "device=auto"),
        ({"stop_at_eot": True}, "no end-of-text token"),
        ({"max_new_tokens": 1e13}, "max_new_tokens"),
    ],
)
def test_a_mistake_is_answered_with_one_line(trained, flags, shown):
    flags = {"out_dir": trained} | flags
    assert shown in read_error(run("sample.py", code=None, **flags))


def test_samples_larger_than_memory_exit_1(trained):
    # 100 billion tokens
    done = run(
        "sample.py",
        out_dir=trained,
        num_samples=10_000,
        max_new_tokens=10_000_000,
        code=1,
    )
    assert "--num_samples" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_temperature_near_zero_takes_the_likeliest(trained):
    # below float32's smallest number: logits divided by it would be infinite
    flags = {"out_dir": trained, "max_new_tokens": 20}
    cold = run("sample.py", temperature=1e-46, **flags)
    zero = run("sample.py", temperature=0, **flags)
    assert cold.stdout == zero.stdout


def test_a_full_stdout_is_one_line(trained):
    # each write to /dev/full fails
    flags = {"out_dir": trained, "max_new_tokens": 2}
    done = run("sample.py", code=1, stdout="/dev/full", **flags)
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_it(trained):
    process = subprocess.Popen(
        make_command("sample.py", out_dir=trained, max_new_tokens=100_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # as `| head -c 5` does
    process.stdout.read(5)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=180) == 1


def test_a_truncated_best_checkpoint_is_named(trained, tmp_path):
    # as after a full disk or an interrupted copy
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes()[:-100])
    assert "best.pt" in run("sample.py", code=2, out_dir=tmp_path).stderr


def test_a_nanogpt_checkpoint_is_loaded_safely(trained, tmp_path):
    # nanoGPT's names are those of a compiled model, and it has no tokenizer
    bundle = load(trained / "best.pt")
    state = {f"_orig_mod.{name}": tensor for name, tensor in bundle["model"].items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    torch.save(
        {"model": state, "model_args": bundle["model_args"], "iter_num": 100},
        tmp_path / "ckpt.pt",
    )
    line = read_error(run("sample.py", code=None, init_from=tmp_path / "ckpt.pt"))
    assert "--dataset=" in line
    # a function stands for code that a pickle would run
    torch.save({"model": print}, tmp_path / "ckpt.pt")
    done = run("sample.py", code=None, init_from=tmp_path / "ckpt.pt")
    assert "expected only plain values" in read_error(done)


@pytest.mark.parametrize("make", [train_sentencepiece, train_wordpiece, train_unigram])
def test_a_space_after_the_prompt_is_printed(make, play, tmp_path, monkeypatch, capsys):
    folder = save(make(play.read_text()), tmp_path / "own")
    description = describe_tokenizer(str(folder))
    vocabulary = from_meta({"tokenizer": description})
    prompt = "The king"
    text = "The king and the queen"
    ids = vocabulary.encode(text)
    size = len(vocabulary.encode(prompt))
    assert ids[:size] == vocabulary.encode(prompt)
    # a model that continues with the rest of the text: these tokenizers drop a space at the start
    # of what they decode, so the rest alone would lack one
    model = build_model(ModelArgs(1, 2, 16, 32, vocabulary.vocab_size, True, 0.0))
    monkeypatch.setattr(sample, "load", lambda config: (model, vocabulary, ""))

    def generate(model, prompts, *args, **kwargs):
        for i in ids[size:]:
            yield [i] * len(prompts)

    for script in (sample, train_script):
        monkeypatch.setattr(script, "generate", generate)
    sample.main(sample.SampleConfig(start=prompt, num_samples=2))
    assert split_samples(capsys.readouterr().out) == [text, text]
    # the sample that training prints starts after the first token
    made = train_script.generate_sample(
        SimpleNamespace(
            data={"tokenizer": description},
            state=SimpleNamespace(model=model),
            config=SimpleNamespace(sample_tokens=9),
        )
    )
    assert made == " and the queen"


def test_a_run_prints_samples_with_any_tokenizer(play, tmp_path):
    folder = save(train_sentencepiece(play.read_text()), tmp_path / "own")
    run("prepare.py", play, name="x", tokenizer=folder, data_dir=tmp_path)
    flags = TINY | {"max_iters": 2, "eval_interval": 1, "eval_iters": 1}
    done = run(
        "train.py",
        out_dir=tmp_path / "out",
        dataset=tmp_path / "x",
        sample_tokens=40,
        **flags,
    )
    assert "step 2" in done.stdout
    flags = {"num_samples": 2, "max_new_tokens": 60}
    done = run("sample.py", out_dir=tmp_path / "out", **flags)
    assert len(split_samples(done.stdout)) == 2
