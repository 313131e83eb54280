"""The fine-tuning and evaluation configs with every kind of source, GPT-2's names included."""

import json
import os
from collections.abc import Callable
from pathlib import Path

# before Transformers is loaded: else it asks the hub, and waits
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from conftest import hash_state, read_error, read_rows, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keepgpt.errors import UserError
from keepgpt.huggingface import read_weights
from model import GPT, load_model

# batches of a second, instead of those of a GPU
SMALL = {
    "batch_size": 2,
    "block_size": 32,
    "gradient_accumulation_steps": 2,
    "eval_iters": 2,
}
# nothing listens at this port
NO_NETWORK = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def dataset(play: Path) -> Path:
    """Prepare Hamlet in GPT-2's tokens. Return its folder."""
    run("prepare.py", play, name="hamlet_gpt2", data_dir=play.parent)
    return play.parent / "hamlet_gpt2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small random GPT-2 as Transformers does. Return its folder."""
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=64,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("hub") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load_folder(path: Path) -> GPT:
    """Return the model in a folder or file of weights."""
    args, state, _ = read_weights(str(path))
    return load_model(args, state)


@pytest.mark.slow
def test_fine_tuning_goes_on_from_every_kind_of_source(folder, dataset, tmp_path):
    # a checkpoint of nanoGPT, of a compiled model
    args, state, _ = read_weights(str(folder))
    compiled = {"_orig_mod." + name: tensor for name, tensor in state.items()}
    nanogpt = tmp_path / "ckpt.pt"
    bundle = {"model": compiled, "model_args": args, "iter_num": 5, "config": {}}
    torch.save(bundle, nanogpt)

    def tune(name: str, source: Path) -> Path:
        run(
            "train.py",
            "config/finetune_shakespeare.py",
            out_dir=tmp_path / name,
            dataset=dataset,
            init_from=source,
            max_iters=2,
            eval_interval=2,
            learning_rate=1e-2,
            **SMALL,
        )
        return tmp_path / name

    # the same weights from both
    first = tune("folder", folder)
    second = tune("nanogpt", nanogpt)
    assert hash_state(first / "ckpt.pt") == hash_state(second / "ckpt.pt")
    # it learns from there
    before, after = [row["val_loss"] for row in read_rows(first, "val_loss")]
    assert after < before
    # the first loss of the next run is the last one of that run
    third = tune("bundle", first / "ckpt.pt")
    assert read_rows(third, "val_loss")[0]["val_loss"] == after


@pytest.fixture(scope="module")
def printed(folder: Path, dataset: Path) -> str:
    """Return what an evaluation of that folder prints."""
    flags = {"dataset": dataset, "init_from": folder}
    done = run("train.py", "config/eval_gpt2.py", **flags, **SMALL)
    return done.stdout


@pytest.mark.parametrize("size", ["", "-xl"], ids=["gpt2", "gpt2-xl"])
def test_gpt2_is_evaluated_from_the_local_cache(
    size, folder, dataset, printed, tmp_path
):
    # the hub's cache: a name, a commit, and its files
    repository = tmp_path / f"models--openai-community--gpt2{size}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(folder)
    # the small model under both names: what counts is where it is found
    config = f"config/eval_gpt2{size.replace('-', '_')}.py"
    env = {"HF_HUB_CACHE": str(tmp_path)}
    done = run("train.py", config, dataset=dataset, env=env, **SMALL)
    assert "val loss" in done.stdout
    assert done.stdout == printed
    assert not done.stderr


@pytest.mark.slow
def test_a_qwen3_is_read_from_the_local_cache_by_its_name(dataset, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "cache/models--Someone--Qwen3-0.0B"
    config = Qwen3Config(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=64,
        # GPT-2's 50,257 tokens and rows for no token
        vocab_size=50304,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    network = Qwen3ForCausalLM(config).to(torch.bfloat16)
    network.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    settings = SMALL | {
        "out_dir": tmp_path / "out",
        "dataset": dataset,
        "init_from": "Someone/Qwen3-0.0B",
        "env": {"HF_HUB_CACHE": str(tmp_path / "cache")},
        "eval_interval": 2,
    }
    run("train.py", max_iters=2, **settings)
    # the second start resumes the first one
    run("train.py", max_iters=4, **settings | {"init_from": "resume"})
    bundle = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert bundle["step"] == 4
    # without the padding of the vocabulary
    assert bundle["model"]["lm_head.weight"].shape == (50257, 16)
    # the sizes are the folder's, but for block_size
    for key, value in {
        "architecture": "qwen3",
        "n_kv_head": 1,
        "head_dim": 8,
        "n_ff": 32,
        "tie_embeddings": False,
        "block_size": 32,
    }.items():
        assert bundle["model_args"][key] == value
        assert bundle["config"][key] == value
    # a flag that says another size is refused
    settings["out_dir"] = tmp_path / "other"
    done = run("train.py", code=2, head_dim=16, **settings)
    assert "head_dim=8" in read_error(done)


@pytest.mark.parametrize("source", ["out/ckpt.pt", "tests/Qwen3", "a/b/c", "nothing"])
def test_a_path_that_does_not_exist_is_not_looked_up(source, dataset):
    done = run(
        "train.py",
        "config/eval_gpt2.py",
        dataset=dataset,
        init_from=source,
        code=2,
        env=NO_NETWORK,
    )
    # a look at the hub would end in another error
    assert "no such file" in read_error(done)


def test_gpt_2_without_network_and_cache_is_one_line_at_once(dataset, tmp_path):
    # an empty cache
    done = run(
        "train.py",
        "config/eval_gpt2.py",
        dataset=dataset,
        code=2,
        env=NO_NETWORK | {"HF_HUB_CACHE": str(tmp_path)},
    )
    assert "gpt2: can't be downloaded" in read_error(done)
    assert "--init_from=FOLDER" in done.stderr


# --- config.json ---------------------------------------------------------------------------------


def save_gpt2(folder: Path) -> Path:
    """Save a tiny GPT-2 as Transformers does."""
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_positions=16,
        vocab_size=50,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path, tied: bool = False) -> Path:
    """Save a tiny Qwen3 as Transformers does."""
    config = Qwen3Config(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=16,
        vocab_size=50,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


SAVE = {"gpt2": save_gpt2, "qwen3": save_qwen3}


def change_config(folder: Path, changes: dict) -> Path:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    return folder


# activations, norms, attention, positions and layers that model.py does not have
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
        ("gpt2", {"n_inner": 32}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"pruned_heads": {"0": [1]}}),
        ("gpt2", {"rope_scaling": {"rope_type": "default"}}),
        ("gpt2", {"is_encoder_decoder": True}),
        ("gpt2", {"auto_map": {"AutoModelForCausalLM": "x.X"}}),
        ("gpt2", {"is_causal": False}),
        (
            "qwen3",
            {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        ),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                }
            },
        ),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 500.0}
                }
            },
        ),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500.0,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
        ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("qwen3", {"rope_theta": 10_000.0}),
        ("qwen3", {"partial_rotary_factor": 0.5}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        ),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"hidden_act": "gelu"}),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}),
        ("qwen3", {"quantization": {"bits": 4}}),
        ("qwen3", {"num_experts": 8}),
        ("qwen3", {"per_layer_config": {"0": {"sliding_window": 4}}}),
        ("qwen3", {"final_logit_softcapping": 30.0}),
        ("qwen3", {"rms_norm_eps": None}),
        ("qwen3", {"model_type": "qwen3_moe"}),
    ],
    ids=str,
)
def test_a_key_that_changes_the_network_is_refused(kind, changes, tmp_path):
    # without the change it is read
    folder = SAVE[kind](tmp_path / "folder")
    read_weights(str(folder))
    change_config(folder, changes)
    with pytest.raises(UserError) as error:
        read_weights(str(folder))
    assert str(folder / "config.json") in str(error.value)
    # of a size that is not a number only its type is named
    if None not in changes.values():
        key = next(iter(changes))
        assert key in str(error.value)


# other names for what model.py has, and keys that change nothing
@pytest.mark.parametrize(
    "kind, changes",
    [
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("gpt2", {"n_inner": 64}),
        (
            "gpt2",
            {
                "n_ctx": 16,
                "task_specific_params": {"text-generation": {"do_sample": True}},
            },
        ),
        (
            "gpt2",
            {
                "torch_dtype": "float32",
                "gradient_checkpointing": False,
                "pruned_heads": {},
            },
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}),
        (
            "qwen3",
            {
                "rope_scaling": {"type": "default"},
                "rope_parameters": None,
                "rope_theta": 500,
            },
        ),
        ("qwen3", {"rope_scaling": None, "rope_theta": 500.0, "rope_parameters": None}),
        ("qwen3", {"layer_types": None, "sliding_window": 4, "max_window_layers": 0}),
        (
            "qwen3",
            {"hidden_act": "swish", "quantization_config": None, "temperature": 0.6},
        ),
    ],
    ids=str,
)
def test_a_harmless_spelling_gives_transformers_logits(kind, changes, tmp_path):
    folder = change_config(SAVE[kind](tmp_path / "folder"), changes)
    model = load_folder(folder).eval()
    # the plain formulas, without a fused kernel
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    network.eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids)[0]
        expected = network(ids).logits[0]
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_another_output_layer_than_the_tied_one_is_refused(kind, tmp_path):
    folder = tmp_path / "folder"
    if kind == "gpt2":
        save_gpt2(folder)
        name = "transformer.wte.weight"
    else:
        save_qwen3(folder, tied=True)
        name = "model.embed_tokens.weight"
    # the same matrix by both names
    path = folder / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state[name].clone()
    write_safetensors(state, path)
    expected = load_folder(folder).state_dict()
    # only by the name of the output layer
    untied = {key: tensor for key, tensor in state.items() if key != name}
    write_safetensors(untied, path)
    model = load_folder(folder)
    assert torch.equal(model.state_dict()[name], expected[name])
    # two matrices that differ in one number
    state["lm_head.weight"][3, 3] += 1
    write_safetensors(state, path)
    with pytest.raises(UserError, match="lm_head.weight"):
        load_folder(folder)


def test_an_unknown_argument_of_a_checkpoint_s_model_is_refused(tmp_path):
    args, state, _ = read_weights(str(save_gpt2(tmp_path / "folder")))
    # intact, as nanoGPT writes it
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": args}, path)
    read_weights(str(path))
    # an argument that would change the network
    torch.save({"model": state, "model_args": args | {"softcap": 30.0}}, path)
    with pytest.raises(UserError, match="softcap"):
        read_weights(str(path))
    # another output layer
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    torch.save({"model": state, "model_args": args}, path)
    with pytest.raises(UserError, match="lm_head.weight"):
        load_folder(path)


# --- the files with a folder's weights -----------------------------------------------------------


def write_pt(state: dict, path: Path) -> None:
    torch.save(state, path)


def write_safetensors(state: dict, path: Path) -> None:
    save_file(state, path, {"format": "pt"})


@pytest.fixture(
    params=[
        ("model", ".safetensors", write_safetensors),
        ("pytorch_model", ".bin", write_pt),
    ],
    ids=["safetensors", "bin"],
)
def parts(request, tmp_path) -> tuple[Path, str, str, Callable, dict]:
    """Return a folder with a config.json and no weights; the stem and the suffix of its weights,
    the function that writes them, and the tensors."""
    folder = save_qwen3(tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return folder, *request.param, state


def write_shards(
    folder: Path, stem: str, suffix: str, write: Callable, state: dict
) -> list[str]:
    """Write the weights in two files and their index. Return the names of the files."""
    # the names that Transformers gives
    names = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    keys = sorted(state)
    weight_map = {}
    for name, half in zip(names, (keys[::2], keys[1::2])):
        write({key: state[key] for key in half}, folder / name)
        weight_map |= dict.fromkeys(half, name)
    index = json.dumps({"weight_map": weight_map})
    (folder / f"{stem}{suffix}.index.json").write_text(index)
    return names


def test_a_stray_file_is_named_and_not_read(parts, capsys):
    folder, stem, suffix, write, state = parts
    # other numbers, which must not be in what is read below
    other = {name: tensor + 1 for name, tensor in state.items()}
    head = state["lm_head.weight"]
    stray = f"{stem}_ema{suffix}"
    # the only file
    write(state, folder / stray)
    _, only, _ = read_weights(str(folder))
    assert torch.equal(only["lm_head.weight"], head)
    # beside the usual one
    write(other, folder / stray)
    write(state, folder / f"{stem}{suffix}")
    _, expected, _ = read_weights(str(folder))
    assert torch.equal(expected["lm_head.weight"], head)
    assert stray in capsys.readouterr().err
    # beside an index, which lists the shards
    write(other, folder / f"{stem}{suffix}")
    write_shards(folder, stem, suffix, write, state)
    _, actual, _ = read_weights(str(folder))
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name])
    assert stray in capsys.readouterr().err


def test_files_that_contradict_each_other_are_refused(parts):
    folder, stem, suffix, write, state = parts
    first, second = write_shards(folder, stem, suffix, write, state)
    read_weights(str(folder))
    half = {name: state[name] for name in sorted(state)[1::2]}
    # a tensor in two files, with other numbers in the second
    head = {"lm_head.weight": state["lm_head.weight"] + 1}
    write(half | head, folder / second)
    with pytest.raises(UserError, match="lm_head.weight"):
        load_folder(folder)
    # a tensor in none
    missing = next(iter(half))
    rest = {name: half[name] for name in half if name != missing}
    write(rest, folder / second)
    with pytest.raises(UserError, match=missing):
        read_weights(str(folder))
    # a missing file
    (folder / second).unlink()
    with pytest.raises(UserError, match=second):
        read_weights(str(folder))
    # two files without an index
    (folder / f"{stem}{suffix}.index.json").unlink()
    write(half, folder / second)
    with pytest.raises(UserError, match=first):
        read_weights(str(folder))
    # one tensor by two names
    (folder / first).unlink()
    (folder / second).unlink()
    embedding = {"embed_tokens.weight": state["model.embed_tokens.weight"] + 1}
    write(state | embedding, folder / f"{stem}{suffix}")
    with pytest.raises(UserError, match="embed_tokens.weight"):
        read_weights(str(folder))


def test_training_from_a_folder_without_a_shard_is_one_line(dataset, tmp_path):
    folder = save_qwen3(tmp_path / "folder")
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    shards = write_shards(folder, "model", ".safetensors", write_safetensors, state)
    # as after an interrupted download
    (folder / shards[1]).unlink()
    flags = {"out_dir": tmp_path / "out", "dataset": dataset, "init_from": folder}
    done = run("train.py", code=2, **flags)
    assert shards[1] in read_error(done)
