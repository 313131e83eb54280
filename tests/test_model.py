"""What model.py promises: it is GPT-2, Llama or Qwen3, its cache changes nothing, and its
optimizer forgets nothing."""

import copy
import json
import math
import os
import shutil
from dataclasses import asdict, replace

# set before Transformers is loaded: otherwise it asks the hub, and waits
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import model as model_module
from keepgpt import kernels
from keepgpt.config import TrainConfig
from keepgpt.device import pick_dtype
from keepgpt.errors import UserError
from keepgpt.huggingface import read_weights
from keepgpt.kernels import (
    LinearCrossEntropy,
    RMSNormFunction,
    has_fast_norm,
    pack_linear_layers,
)
from keepgpt.optim import make_optimizer
from model import (
    ARCHITECTURES,
    GPT,
    ModelArgs,
    RMSNorm,
    attend,
    build_model,
    crop_weights,
    generate,
    load_model,
    rotate,
    sample_token,
)

# models this small are slower on two threads
torch.set_num_threads(1)
# settings that only some architectures have. Each differs from its default: heads with a width of
# their own, keys and values that several heads of queries share, an output layer with weights of
# its own.
SETTINGS = {
    "bias": True,
    "n_kv_head": 2,
    "head_dim": 12,
    "n_ff": 48,
    "rope_theta": 100.0,
    "tie_embeddings": False,
}


def make_args(architecture):
    """Return small sizes of an architecture, and the settings that it has."""
    existing = SETTINGS.keys() & set(ARCHITECTURES[architecture].settings)
    settings = {key: SETTINGS[key] for key in existing}
    return ModelArgs(
        n_layer=2,
        n_head=4,
        n_embd=32,
        block_size=16,
        vocab_size=61,
        dropout=0.0,
        architecture=architecture,
        **{"bias": False} | settings,
    )


ARGS = make_args("gpt2")
LLAMA = make_args("llama")
QWEN3 = make_args("qwen3")
QWEN3_DEFAULTS = replace(QWEN3, n_kv_head=0, head_dim=0, n_ff=0, tie_embeddings=True)
ALL_ARGS = {name: make_args(name) for name in ARCHITECTURES}


def parametrize_args(**more):
    """Return a mark that runs a test with each architecture's args, and with `more`."""
    every = ALL_ARGS | more
    return pytest.mark.parametrize("args", every.values(), ids=every)


every_architecture = parametrize_args()
# also with shared embeddings and default sizes
every_variant = parametrize_args(qwen3_tied=QWEN3_DEFAULTS)
# Transformers stores these matrices transposed
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def build_random_model(args=ARGS, std=0.3):
    """Return a model whose every parameter is random and large: nothing hides behind a 0 or 1."""
    torch.manual_seed(0)
    model = build_model(args)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def make_tokens(*shape, below=ARGS.vocab_size, seed=1):
    """Return random token ids."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(below, shape, generator=rng)


def assert_close(actual, expected, tolerance):
    """Raise AssertionError if two tensors differ by more than `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max()
    error = (difference / expected.abs().max()).item()
    assert error < tolerance, f"they differ by {error:.1e} of the largest value"


def compute_relative_error(actual, expected):
    """Return the norm of the difference, as a share of the norm of the expected tensor."""
    return ((actual - expected).norm() / expected.norm()).item()


# against Transformers


def randomize_vectors(model):
    """Add noise to biases and norms: they start as exact 0 and 1, which would hide a fault."""
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)


@pytest.fixture(scope="module")
def hf_gpt2(tmp_path_factory):
    """Return a random GPT-2 of Transformers, in float32, and the folder that it was saved to."""
    # large weights, no dropout, and the plain formulas of attention
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=64,
        n_positions=32,
        vocab_size=101,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config)
    randomize_vectors(model)
    folder = tmp_path_factory.mktemp("gpt2")
    model.eval().save_pretrained(folder)
    return model, folder


def copy_folder(source, to, **settings):
    """Copy a folder in Hugging Face's format, with other settings in its config.json."""
    shutil.copytree(source, to)
    path = to / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | settings))
    return to


def load_source(source, vocab_size=101, block_size=32):
    """Return the model in a file or folder, as train.py builds it."""
    args, state, _ = read_weights(str(source))
    args, state = crop_weights(args, state, vocab_size, block_size)
    return load_model(args, state).eval()


def test_gpt2_is_that_of_transformers(hf_gpt2):
    hf_model, folder = hf_gpt2
    model = load_source(folder)
    idx = make_tokens(4, 32, below=101)
    assert_close(model(idx), hf_model(idx).logits, 1e-5)

    # Transformers shifts the labels itself
    loss = model(idx[:, :-1], idx[:, 1:])
    expected_loss = hf_model(idx, labels=idx).loss
    assert_close(loss, expected_loss, 1e-6)

    # other tests use the same model
    hf_model.zero_grad()
    expected_loss.backward()
    loss.backward()
    gradients = {name: p.grad for name, p in hf_model.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        expected = gradients[name]
        if name.endswith(CONV1D):
            expected = expected.t()
        assert_close(p.grad, expected, 2e-5)


HF_QWEN3 = (Qwen3ForCausalLM, Qwen3Config)
HF_LLAMA = (LlamaForCausalLM, LlamaConfig)
# sizes that differ from each other: a mix-up of two would not fit
HF_SETTINGS = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "vocab_size": 101,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "attn_implementation": "sdpa",
}


def save_hf_model(folder, kind=HF_QWEN3, **settings):
    """Save a random Qwen3 of Transformers, or a Llama, to a folder. Return it."""
    torch.manual_seed(0)
    model_class, config_class = kind
    config = config_class(**(HF_SETTINGS | settings))
    model = model_class(config)
    randomize_vectors(model)
    # shards this small make several files
    model.eval().save_pretrained(folder, max_shard_size="100KB")
    return model


def norm_in_its_own_dtype(self, x):
    """Compute the RMSNorm of Transformers without its detour through float32."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.mark.parametrize("kind", [HF_QWEN3, HF_LLAMA], ids=["qwen3", "llama"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 1e-5), (torch.float64, 1e-10)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16},
        {"num_key_value_heads": 1, "head_dim": 8},
        {"rms_norm_eps": 0.1, "head_dim": 128},
    ],
    ids=["grouped", "tied", "one-key", "eps"],
)
def test_llama_and_qwen3_are_those_of_transformers(
    kind, settings, dtype, tolerance, tmp_path, monkeypatch
):
    hf_model = save_hf_model(tmp_path, kind, **settings).to(dtype)
    model = load_source(tmp_path).to(dtype)
    idx = make_tokens(4, 32, below=101)
    # the index of several files is read, too
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    # Transformers computes norms in float32 even in a model of float64
    if dtype == torch.float64:
        monkeypatch.setattr(Qwen3RMSNorm, "forward", norm_in_its_own_dtype)
        monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_its_own_dtype)

    # without gradients, norms take another path
    hf_logits = hf_model(idx).logits
    with torch.no_grad():
        assert_close(model(idx), hf_logits, tolerance)

    inputs = idx[:, :-1]
    targets = idx[:, 1:]
    loss = model(inputs, targets)
    flat_logits = hf_logits[:, :-1].flatten(0, 1)
    expected_loss = F.cross_entropy(flat_logits, targets.flatten())
    assert_close(loss, expected_loss, tolerance)

    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in hf_model.named_parameters()}
    assert list(gradients) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert_close(p.grad, gradients[name], 2 * tolerance)


def test_qwen3_continues_a_padded_batch_as_transformers_does(tmp_path):
    hf_model = save_hf_model(tmp_path)
    # Transformers pads on the left and needs a mask; keepGPT takes prompts of several lengths
    prompts = []
    padded = []
    mask = []
    for length in (7, 1, 4):
        prompt = make_tokens(length, below=101, seed=length).tolist()
        padding = [0] * (7 - length)
        prompts.append(prompt)
        padded.append(padding + prompt)
        mask.append(padding + [1] * length)
    texts = hf_model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = texts[:, 7:].tolist()
    model = load_source(tmp_path)
    assert continue_prompts(model, prompts, 20, temperature=0) == expected
    # not a loop over a few tokens
    assert len(set(expected[0])) > 4


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
    ],
    ids=["rope_scaling", "mlp_bias", "rope_parameters"],
)
def test_a_llama_that_cannot_be_represented_is_refused(tmp_path, key, value):
    # positions that are scaled, and biases in the MLP
    save_hf_model(tmp_path / "llama", HF_LLAMA)
    folder = copy_folder(tmp_path / "llama", tmp_path / "folder", **{key: value})
    with pytest.raises(UserError, match=key):
        read_weights(str(folder))


def test_a_llama_without_optional_sizes_is_read(tmp_path):
    original = tmp_path / "llama"
    # the sizes that follow from the others: one key per query, heads that share the width
    save_hf_model(original, HF_LLAMA, head_dim=16, num_key_value_heads=4)
    optional = {"head_dim": None, "num_key_value_heads": None}
    folder = copy_folder(original, tmp_path / "folder", **optional)
    idx = make_tokens(2, 9, below=101)
    assert torch.equal(load_source(folder)(idx), load_source(original)(idx))


def test_rope_theta_is_read_where_either_version_writes_it(tmp_path):
    save_hf_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # Transformers 5 writes it inside rope_parameters
    assert "rope_theta" not in config
    args, _, _ = read_weights(str(tmp_path))
    assert args["rope_theta"] == 500

    # Transformers 4 writes it at the top
    del config["rope_parameters"]
    config |= {"rope_theta": 1000000.0, "rope_scaling": None}
    path.write_text(json.dumps(config))
    args, _, _ = read_weights(str(tmp_path))
    assert args["rope_theta"] == 1e6


def test_bfloat16_files_load_as_float32(tmp_path):
    save_hf_model(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    # 90 of 101 rows: the others are padding
    model = load_source(tmp_path, vocab_size=90, block_size=8)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.shape == (90, 64)
    assert model.embedding.weight.shape == (90, 64)
    idx = make_tokens(2, 8, below=90)
    assert model(idx).shape == (2, 8, 90)


def test_a_shorter_block_changes_nothing_for_short_inputs(hf_gpt2):
    hf_model, folder = hf_gpt2
    # the position embedding has 32 rows: keep the first eight
    model = load_source(folder, block_size=8)
    assert model.transformer.wpe.weight.shape == (8, 64)
    assert model.args.block_size == 8
    idx = make_tokens(4, 8, below=101)
    assert_close(model(idx), hf_model(idx).logits, 1e-5)


def test_the_hubs_files_with_causal_masks_are_read(hf_gpt2, tmp_path):
    _, folder = hf_gpt2
    # names without a prefix, the masks of old versions, and the tied weights stored twice
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        state[name.removeprefix("transformer.")] = tensor
    mask = torch.ones(1, 1, 32, 32).tril()
    for i in range(3):
        state[f"h.{i}.attn.bias"] = mask.clone()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)

    assert_same_tensors(
        load_source(tmp_path).state_dict(), load_source(folder).state_dict()
    )


def assert_same_tensors(actual, expected):
    """Raise AssertionError unless two dicts hold the same tensors, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "config, weights, file",
    [
        (None, None, "config.json"),
        ("{", None, "config.json"),
        ("{}", None, "config.json"),
        ("[]", None, "config.json"),
        ("good", None, "safetensors"),
        ("good", b"no weights", "safetensors"),
    ],
    ids=[
        "empty-folder",
        "cut-config",
        "empty-config",
        "list-as-config",
        "no-weights",
        "text-as-weights",
    ],
)
def test_a_folder_that_lacks_or_spoils_a_file_is_refused(
    hf_gpt2, tmp_path, config, weights, file
):
    _, folder = hf_gpt2
    if config == "good":
        config = (folder / "config.json").read_text()
    if config:
        (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=file):
        read_weights(str(tmp_path))


# impossible sizes, wrong types, and sizes that the weights do not have
@pytest.mark.parametrize(
    "settings",
    [
        {"n_head": 3},
        {"n_head": "four"},
        {"n_head": None},
        {"n_head": True},
        {"n_embd": "64", "n_inner": 256},
        {"n_layer": 2},
        {"n_positions": 1000},
        {"vocab_size": 1000},
    ],
    ids=str,
)
def test_wrong_sizes_in_config_json_are_refused(hf_gpt2, tmp_path, settings):
    folder = copy_folder(hf_gpt2[1], tmp_path / "folder", **settings)
    with pytest.raises(UserError):
        args, state, _ = read_weights(str(folder))
        crop = (args["vocab_size"], args["block_size"])
        args, state = crop_weights(args, state, *crop)
        load_model(args, state)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": "two"},
        {"head_dim": 7},
        {"intermediate_size": 100},
        {"hidden_size": 32},
        {"num_hidden_layers": 30},
        {"vocab_size": 1000},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_wrong_sizes_of_a_qwen3_are_refused(tmp_path, settings):
    save_hf_model(tmp_path / "qwen3")
    folder = copy_folder(tmp_path / "qwen3", tmp_path / "folder", **settings)
    with pytest.raises(UserError):
        args, state, _ = read_weights(str(folder))
        # a head that equals no embedding: tied weights must be compared
        state = state | {"lm_head.weight": torch.zeros(1)}
        crop = (args["vocab_size"], args["block_size"])
        args, state = crop_weights(args, state, *crop)
        load_model(args, state)


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_model_bin_is_read(hf_gpt2, tmp_path, shards):
    hf_model, original = hf_gpt2
    folder = copy_folder(original, tmp_path / "folder")
    state = hf_model.state_dict()
    (folder / "model.safetensors").unlink()
    # ignored: it holds no weights
    torch.save({"lr": 1e-3}, folder / "optimizer.bin")

    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        # every second name goes to the second file
        weight_map = {}
        for i in range(2):
            file = f"pytorch_model-0000{i + 1}-of-00002.bin"
            names = list(state)[i::2]
            torch.save({name: state[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = json.dumps({"weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)

    idx = make_tokens(2, 32, below=101)
    assert_close(load_source(folder)(idx), hf_model(idx).logits, 1e-5)


def test_a_corrupt_pytorch_model_bin_is_refused(hf_gpt2, tmp_path):
    hf_model, original = hf_gpt2
    folder = copy_folder(original, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    state = hf_model.state_dict()
    torch.save(state, file)
    whole = file.read_bytes()
    # one bit, in the middle
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    # a checkpoint of a trainer, not the weights alone
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    nested = (tmp_path / "nested.pt").read_bytes()

    for content in (flipped, flipped[:-100], b"", b"no weights", nested):
        file.write_bytes(content)
        with pytest.raises(UserError, match="pytorch_model.bin") as refused:
            read_weights(str(folder))
        assert "\n" not in str(refused.value)


class Trap:
    """An object whose unpickling creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pytorch_model_bin_never_runs_code(hf_gpt2, tmp_path):
    folder = copy_folder(hf_gpt2[1], tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    trap = Trap(tmp_path / "trapped")
    # a name that the loader asks for
    torch.save({"wte.weight": trap}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        read_weights(str(folder))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {}}'),
        ("tokenizer.json", '{"model": {"vocab": [3]}}'),
        ("vocab.json", '{"a": [1]}'),
        ("vocab.json", "3"),
        ("keepgpt.json", "[]"),
    ],
    ids=[
        "cut",
        "list",
        "no-vocabulary",
        "list-as-vocabulary",
        "list-as-id",
        "number",
        "keepgpt",
    ],
)
def test_a_spoiled_tokenizer_is_refused(hf_gpt2, tmp_path, name, content):
    folder = copy_folder(hf_gpt2[1], tmp_path / "folder")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        read_weights(str(folder))


# checkpoint files


def save_nanogpt_checkpoint(model, path, prefix="_orig_mod.", rows=64, **more):
    """Save a checkpoint as nanoGPT does: of a compiled model whose vocabulary is padded."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    # the embedding and the output layer are one tensor with two names
    wte = state[f"{prefix}transformer.wte.weight"]
    padding = torch.zeros(rows - len(wte), wte.size(1))
    padded = torch.cat([wte, padding])
    state[f"{prefix}transformer.wte.weight"] = padded
    state[f"{prefix}lm_head.weight"] = padded
    checkpoint = {
        "model": state | more,
        "model_args": asdict(model.args) | {"vocab_size": rows},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.0),
        "config": {"n_layer": 2},
    }
    torch.save(checkpoint, path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""], ids=["compiled", "plain"])
def test_a_checkpoint_of_nanogpt_is_read(tmp_path, prefix):
    model = build_random_model()
    path = tmp_path / "ckpt.pt"
    save_nanogpt_checkpoint(model, path, prefix)
    loaded_model = load_source(path, vocab_size=61, block_size=16)
    assert loaded_model.args == model.args
    idx = make_tokens(2, 16)
    assert torch.equal(loaded_model(idx), model(idx))


def test_a_checkpoint_of_nanogpt_with_causal_masks_is_read(tmp_path):
    model = build_random_model()
    path = tmp_path / "ckpt.pt"
    # nanoGPT stores them where flash attention is missing
    mask = torch.ones(1, 1, 16, 16).tril()
    masks = {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
    save_nanogpt_checkpoint(model, path, prefix="", **masks)
    loaded_model = load_source(path, vocab_size=61, block_size=16)
    idx = make_tokens(2, 16)
    assert torch.equal(loaded_model(idx), model(idx))


def test_a_checkpoint_describes_its_data(tmp_path):
    path = tmp_path / "ckpt.pt"
    weights = build_random_model().state_dict()
    checkpoint = {
        "model": weights,
        "model_args": asdict(ARGS),
        "data": {"name": "x"},
    }
    torch.save(checkpoint, path)
    args, state, data = read_weights(str(path))
    assert args == asdict(ARGS)
    assert data == {"name": "x"}
    assert_same_tensors(state, weights)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not a checkpoint",
        {"model": {}},
        {"model_args": asdict(ARGS)},
        [1, 2],
        {"model": {}, "model_args": {"n_layer": 1}},
        {"model": [1], "model_args": asdict(ARGS)},
    ],
    ids=[
        "missing",
        "empty",
        "text",
        "no-args",
        "no-model",
        "list",
        "few-args",
        "no-names",
    ],
)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match="ckpt.pt") as refused:
        read_weights(str(path))
    assert "\n" not in str(refused.value)


def test_a_runs_folder_is_answered_with_its_checkpoint(tmp_path):
    # a run's folder holds checkpoints, not a config.json
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(UserError, match=f"Try: --init_from={tmp_path}/ckpt.pt"):
        read_weights(str(tmp_path))


def test_a_checkpoint_never_runs_code(tmp_path):
    trap = Trap(tmp_path / "trapped")
    torch.save({"model": trap, "model_args": asdict(ARGS)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        read_weights(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "trapped").exists()


# the network


def test_the_parameters_have_gpt2s_names(hf_gpt2):
    hf_model, folder = hf_gpt2
    model = load_source(folder)
    names = [name for name, _ in hf_model.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert not any("lm_head" in name for name in names)


def test_the_embedding_and_the_output_layer_are_one():
    model = build_random_model()
    idx = make_tokens(2, 16)
    before = model(idx)
    # a token that is not in the text: its row can only act through the output layer
    assert not (idx == 60).any()
    with torch.no_grad():
        model.transformer.wte.weight[60] += 1
    changed = model(idx) != before
    assert changed[..., 60].all()
    assert not changed[..., :60].any()


def test_qwen3_starts_as_the_identity_and_a_uniform_guess():
    torch.manual_seed(0)
    model = build_model(replace(QWEN3, n_embd=128))
    # the last matrix of each branch is 0, so the branch adds nothing to the residual stream
    zeros = ("o_proj.weight", "down_proj.weight", "lm_head.weight")
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        elif name.endswith(zeros):
            assert not p.any(), name
        else:
            assert abs(p.std() - 0.02) < 0.0012, name
    # logits of 0: each of 61 tokens has the same probability
    idx = make_tokens(4, 16)
    assert_close(model(idx, idx), torch.tensor(61.0).log(), 1e-6)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"n_kv_head": 2}, "n_kv_head"),
        ({"head_dim": 16}, "head_dim"),
        ({"n_ff": 64}, "n_ff"),
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"architecture": "mamba"}, "architecture"),
        ({"architecture": "qwen3", "bias": True}, "bias"),
        ({"architecture": "qwen3", "n_kv_head": 3, "bias": False}, "n_kv_head"),
        ({"architecture": "qwen3", "head_dim": 9, "bias": False}, "head_dim"),
    ],
    ids=[
        "n_kv_head",
        "head_dim",
        "n_ff",
        "rope_theta",
        "norm_eps",
        "tie_embeddings",
        "architecture",
        "qwen3-bias",
        "qwen3-n_kv_head",
        "qwen3-head_dim",
    ],
)
def test_a_setting_that_the_architecture_lacks_is_refused(settings, name):
    with pytest.raises(UserError, match=name):
        replace(ARGS, **settings)


@parametrize_args(qwen3_tied=replace(QWEN3, tie_embeddings=True))
def test_flops_count_the_matrix_products(args):
    H = args.n_head
    K = args.K
    D = args.D
    C = args.n_embd
    # the MLP of GPT-2 has two matrices, a SwiGLU has three
    mlp = 3 * C * args.ff_width
    if args.architecture == "gpt2":
        mlp = 2 * C * 128
    # queries, keys, values and the projection back
    attention = 2 * C * D * (H + K)
    # the output layer has 61 tokens; an embedding that it does not share is looked up for free
    matrices = args.n_layer * (attention + mlp) + 61 * C

    # forward and backward: 6 per parameter (PaLM, appendix B); tokens attend to a whole block
    model = build_model(args)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    products = 12 * args.n_layer * H * D * args.block_size
    assert model.flops_per_token() == 6 * (matrices + vectors) + products


def test_without_bias_there_are_none():
    model = build_model(replace(ARGS, bias=False))
    names = [name for name, _ in model.named_parameters()]
    # two embeddings, six weights per block, one norm
    assert len(names) == 2 + 6 * ARGS.n_layer + 1
    assert not any(name.endswith("bias") for name in names)


def test_the_weights_begin_as_gpt2_s():
    torch.manual_seed(0)
    model = build_model(replace(ARGS, n_layer=3, n_embd=128))
    for name, p in model.named_parameters():
        # two branches per layer add to the residual stream
        std = 0.02
        if name.endswith("c_proj.weight"):
            std = 0.02 / math.sqrt(2 * 3)

        if p.dim() == 2:
            assert abs(p.std() - std) < 0.06 * std, name
            assert abs(p.mean()) < 0.1 * std, name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            assert (p == 1).all(), name


@every_variant
def test_a_token_sees_those_before_it_only(args):
    model = build_random_model(args)
    idx = make_tokens(1, 16)
    # change one token: no logits before it may change, and all after it must
    for position in range(16):
        other = idx.clone()
        other[0, position] = (idx[0, position] + 1) % 61
        change = (model(idx) - model(other)).abs().amax((0, 2))
        differs = change > 1e-4
        assert not differs[:position].any()
        assert differs[position:].all()


@every_architecture
def test_dropout_acts_in_training_and_repeats_with_its_seed(args):
    model = build_random_model(replace(args, dropout=0.5))
    idx = make_tokens(4, 16)
    # in evaluation there is none
    assert torch.equal(model(idx), build_random_model(args)(idx))
    assert torch.equal(model(idx), model(idx))

    model.train()
    torch.manual_seed(1)
    first = model(idx)
    second = model(idx)
    assert not torch.equal(first, second)
    # the same seed drops the same numbers
    torch.manual_seed(1)
    assert torch.equal(first, model(idx))


@every_architecture
def test_dropout_acts_on_embedding_attention_and_branches(args, monkeypatch):
    calls = []

    def record(owner, name):
        """Add the name and the last input of each call to `calls`: it is the probability."""
        function = getattr(owner, name)

        def record_call(*inputs):
            calls.append((name, inputs[-1]))
            return function(*inputs)

        monkeypatch.setattr(owner, name, record_call)

    record(model_module.F, "dropout")
    record(model_module, "attend")
    model = build_model(replace(args, dropout=0.5)).train()
    model(make_tokens(4, 16))
    # the attention weights, then the output of each branch
    block = [("attend", 0.5), ("dropout", 0.5), ("dropout", 0.5)]
    assert calls == [("dropout", 0.5)] + block * args.n_layer

    # an evaluation calls them with a probability of 0
    calls.clear()
    model.eval()(make_tokens(4, 16))
    assert {p for _, p in calls} == {0.0}


@every_variant
def test_a_batch_is_learned_by_heart(args):
    torch.manual_seed(0)
    model = build_model(args)
    idx = make_tokens(4, 17)
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.0, decay_lr=False)
    optimizer = make_optimizer(model, config)
    # four texts of 17 tokens fit into the weights
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # a guess among 61 tokens has a loss of 4.1
    assert loss.item() < 0.02


@every_architecture
def test_bfloat16_agrees_with_float64_as_far_as_it_can(args):
    # logits that are all alike, or one-hot, would hide rounding
    model = build_random_model(replace(args, n_embd=64, n_layer=3), std=0.15)
    exact = copy.deepcopy(model).double()
    x = make_tokens(8, 16)
    y = make_tokens(8, 16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = model(x, y)
    assert_close(logits.double(), exact(x), 0.02)
    assert_close(loss.double(), exact(x, y), 0.002)

    loss.backward()
    exact(x, y).backward()
    for (name, p), exact_p in zip(model.named_parameters(), exact.parameters()):
        error = compute_relative_error(p.grad, exact_p.grad)
        assert error < 0.02, f"{name}: {error:.3f}"


def pad_output_weight(model):
    """Return the weight that `GPT.output_weight` returns on CUDA: padded to a multiple of 64."""
    weight = (model.lm_head or model.embedding).weight
    return F.pad(weight, (0, 0, 0, 3))


@every_variant
def test_padding_the_vocabulary_changes_nothing(args, monkeypatch):
    plain = build_random_model(args)
    padded = copy.deepcopy(plain)
    x = make_tokens(4, 16)
    y = make_tokens(4, 16, seed=2)
    loss = plain(x, y)
    loss.backward()

    # the padding has no logits, so it has no gradient
    monkeypatch.setattr(GPT, "output_weight", pad_output_weight)
    # 61 tokens and three rows
    assert padded.output_weight().shape == (64, 32)
    assert_close(padded(x, y), loss, 1e-6)
    padded(x, y).backward()
    for padded_p, p in zip(padded.parameters(), plain.parameters()):
        assert_close(padded_p.grad, p.grad, 1e-5)


@every_variant
def test_a_step_moves_every_parameter(args):
    model = build_random_model(args)
    before = copy.deepcopy(model.state_dict())
    # one that the optimizer or the gradient misses would stay
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2, decay_lr=False))
    x = make_tokens(4, 16)
    y = make_tokens(4, 16, seed=2)
    model(x, y).backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert (tensor != before[name]).any(), name


# sampling


def build_varied_model(args=ARGS):
    """Return a model whose likeliest next token depends on the position and the text."""
    model = build_random_model(args, std=0.5)
    # GPT-2's positions would be lost among its tokens; the others rotate queries and keys
    if args.architecture == "gpt2":
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(10)
            model.transformer.ln_f.bias.zero_()
    return model


def continue_prompts(model, prompts, n, **settings):
    """Return the tokens that `generate` yields for each prompt, without the pauses."""
    texts = [[] for _ in prompts]
    for step in generate(model, prompts, n, **settings):
        for text, token in zip(texts, step):
            if token is not None:
                text.append(token)
    return texts


def continue_without_cache(
    model, prompt, n, temperature=1.0, top_k=0, top_p=1.0, seed=1337
):
    """Return the tokens after one prompt, by a forward pass over the whole window for each."""
    rng = torch.Generator().manual_seed(seed)
    text = list(prompt)
    size = model.args.block_size
    start = max(0, len(text) - size)
    for _ in range(n):
        # a full window slides by a quarter of its size
        if len(text) - start > size:
            start = len(text) - (size - size // 4)
        logits = model(torch.tensor([text[start:]]))[:, -1]
        token = sample_token(logits, temperature, top_k, top_p, rng)
        text.append(token.item())
    return text[len(prompt) :]


@every_variant
def test_the_cache_gives_the_logits_of_the_whole(args):
    model = build_varied_model(args)
    idx = make_tokens(3, 16)
    logits = model(idx)
    # some tokens at once, then one at a time
    for start in (1, 5, 16):
        cache = model.make_cache(3)
        parts = [model(idx[:, :start], cache=cache)]
        for i in range(start, 16):
            parts.append(model(idx[:, i : i + 1], cache=cache))
        assert cache.length == 16
        assert_close(torch.cat(parts, 1), logits[:, start - 1 :], 1e-5)

    # several tokens at a time
    cache = model.make_cache(3)
    parts = []
    for i in (0, 5, 10):
        parts.append(model(idx[:, i : i + 5], cache=cache))
    assert_close(torch.cat(parts, 1), logits[:, 4:15:5], 1e-5)


# a prompt of one token, of a whole block, and of more than that
@every_architecture
@pytest.mark.parametrize("length", [1, 16, 30])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3},
    ],
    ids=["greedy", "sampled"],
)
def test_cached_generation_equals_uncached(args, length, settings):
    model = build_varied_model(args)
    prompt = make_tokens(length, seed=length).tolist()
    expected = continue_without_cache(model, prompt, 50, **settings)
    assert continue_prompts(model, [prompt], 50, **settings) == [expected]
    # not a loop over a few tokens
    assert len(set(expected)) > 4


@pytest.mark.skipif(
    pick_dtype("auto", torch.device("cpu")) != torch.bfloat16,
    reason="this CPU has no bfloat16 instructions",
)
@parametrize_args(
    gpt2_no_bias=replace(ARGS, bias=False),
    qwen3_tied=replace(QWEN3, tie_embeddings=True),
)
def test_packed_weights_generate_the_same(args):
    # weights are packed for bfloat16 on a CPU only
    plain = build_random_model(args).bfloat16()
    packed = copy.deepcopy(plain)
    pack_linear_layers(packed)
    x = make_tokens(3, ARGS.block_size)
    # bfloat16 rounds to 2^-8, and the sums are made in another order
    with torch.inference_mode():
        assert_close(packed(x), plain(x), 2**-6)
    prompts = [[1], [2, 3]]
    expected = continue_prompts(plain, prompts, 40, temperature=0)
    assert continue_prompts(packed, prompts, 40, temperature=0) == expected


@every_architecture
def test_prompts_in_a_batch_are_continued_as_each_alone(args):
    model = build_varied_model(args)
    prompts = []
    alone = []
    # different lengths, and two that are equal
    for length in (7, 1, 4, 4):
        prompt = make_tokens(length, seed=length).tolist()
        prompts.append(prompt)
        alone += continue_prompts(model, [prompt], 40, temperature=0)
    assert continue_prompts(model, prompts, 40, temperature=0) == alone
    assert [len(text) for text in alone] == [40] * 4


def test_each_sequence_gets_max_new_tokens_after_its_prompt():
    model = build_varied_model()
    prompts = [[1, 2, 3], [4]]
    for n in (0, 1, 7):
        texts = continue_prompts(model, prompts, n)
        assert [len(text) for text in texts] == [n, n]

    # the first sequence is silent while its longer prompt is read, the second once it has finished
    steps = list(generate(model, prompts, 2))
    silent = [[token is None for token in step] for step in steps]
    assert silent == [
        [True, False],
        [True, False],
        [False, True],
        [False, True],
    ]


def test_a_sequence_ends_before_its_stop_token():
    model = build_varied_model()
    prompts = [[1], [2], [3, 4]]
    free = continue_prompts(model, prompts, 30, seed=5)
    # a token that the first sequence produces
    stop = free[0][12]
    expected = []
    for text in free:
        end = text.index(stop) if stop in text else None
        expected.append(text[:end])
    # the token stops the first sequence, but not all of them at once
    assert len(expected[0]) <= 12
    assert max(len(text) for text in expected) > 12
    assert continue_prompts(model, prompts, 30, seed=5, stop=stop) == expected

    # the very first token stops it
    [[first]] = continue_prompts(model, [[1]], 1, seed=5)
    steps = generate(model, [[1]], 30, seed=5, stop=first)
    assert list(steps) == [[None]]


def test_a_stop_token_in_the_prompt_stops_nothing():
    model = build_varied_model()
    # the longer prompt is read token by token, and holds the stop token
    prompts = [[9, 9, 1], [5]]
    expected = continue_prompts(model, prompts, 1, seed=5)
    assert continue_prompts(model, prompts, 1, seed=5, stop=9) == expected


def test_a_seed_repeats_and_another_differs():
    model = build_varied_model()
    prompts = [[1]] * 3
    texts = continue_prompts(model, prompts, 40, seed=1)
    assert continue_prompts(model, prompts, 40, seed=1) == texts
    assert continue_prompts(model, prompts, 40, seed=2) != texts
    # the same prompt, but each sequence draws its own numbers
    assert len({tuple(text) for text in texts}) == 3


def test_generation_leaves_the_random_numbers_of_training_alone():
    model = build_varied_model()
    # a sample during training must not change the run
    before = torch.get_rng_state()
    continue_prompts(model, [[1]], 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_cold_or_narrow_sampling_takes_the_likeliest():
    model = build_varied_model()
    text = [1]
    while len(text) < 16:
        logits = model(torch.tensor([text]))[0, -1]
        text.append(int(logits.argmax()))
    # each of these leaves one candidate
    for settings in (
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 1e-6},
    ):
        [continued] = continue_prompts(model, [[1]], 15, **settings)
        assert continued == text[1:], settings


# picking a token


# not sorted, so a rank can't pass for a token
SHARES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
# enough that a wrong share is off by many sigma
DRAWS = 20000


def measure_shares(temperature=1.0, top_k=0, top_p=1.0):
    """Return how often each of five tokens is drawn; SHARES are the probabilities."""
    # logits are probabilities up to a constant
    logits = (SHARES.log() + 7).expand(DRAWS, -1)
    rng = torch.Generator().manual_seed(0)
    picked = sample_token(logits, temperature, top_k, top_p, rng)
    return torch.bincount(picked, minlength=5) / DRAWS


def assert_shares(shares, weights):
    """Raise AssertionError if a share is over five sigma from its weight's; 0 allows only 0."""
    weights = torch.as_tensor(weights)
    expected = weights / sum(weights)
    sigma = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((shares - expected).abs() <= 5 * sigma).all()


def keep_shares(kept):
    """Return SHARES with 0 for the tokens that are not kept."""
    return [SHARES[i] * (i in kept) for i in range(5)]


def test_tokens_are_drawn_by_their_probability():
    assert_shares(measure_shares(), SHARES)
    assert_shares(measure_shares(temperature=0.5), SHARES**2)
    assert_shares(measure_shares(temperature=2.0), SHARES**0.5)


@pytest.mark.parametrize(
    "k, kept",
    [
        (0, range(5)),
        (1, [1]),
        (2, [1, 3]),
        (4, [1, 2, 3, 4]),
        (5, range(5)),
        (9, range(5)),
    ],
    ids=["all", "1", "2", "4", "5", "9"],
)
def test_top_k_keeps_the_k_likeliest_and_their_proportions(k, kept):
    assert_shares(measure_shares(top_k=k), keep_shares(kept))


@pytest.mark.parametrize(
    "p, kept",
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.84, [1, 3, 4]),
        (0.86, [1, 2, 3, 4]),
        (0.96, range(5)),
        (1.0, range(5)),
    ],
    ids=["0.01", "0.39", "0.41", "0.69", "0.71", "0.84", "0.86", "0.96", "all"],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_p(p, kept):
    assert_shares(measure_shares(top_p=p), keep_shares(kept))


def test_top_p_looks_at_what_temperature_and_top_k_have_left():
    # 0.4 of the 0.7 that top_k leaves is 0.57
    shares = measure_shares(top_k=2, top_p=0.56)
    assert_shares(shares, [0, 1, 0, 0, 0])
    # squared, 0.16 of 0.285 is 0.56
    shares = measure_shares(temperature=0.5, top_p=0.56)
    assert_shares(shares, [0, 1, 0, 0, 0])


def test_each_row_is_cut_by_its_own_probabilities():
    # two rows that differ in their order and in the constant that is added
    logits = SHARES.log()
    rolled = SHARES.roll(1).log() - 5
    logits = torch.stack([logits, rolled]).repeat(500, 1)
    for top_k, top_p in ((2, 1.0), (0, 0.69)):
        rng = torch.Generator().manual_seed(0)
        picked = sample_token(logits, 1.0, top_k, top_p, rng).view(500, 2)
        assert set(picked[:, 0].tolist()) == {1, 3}
        assert set(picked[:, 1].tolist()) == {2, 4}


# kernels: fast twins against the plain formulas


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-13), (torch.float32, 3e-6)],
    ids=["float64", "float32"],
)
def test_the_fast_rms_norm_agrees_with_pytorch(dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 4, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 20, 4, 24, dtype=dtype)
    # an eps this large shows if it is missing
    y = RMSNormFunction.apply(x, weight, 1e-2)
    gradients = torch.autograd.grad(y, (x, weight), dy)

    # PyTorch's own, in float64
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], weight.shape, exact[1], 1e-2)
    expected_gradients = torch.autograd.grad(expected, exact, dy.double())
    assert_close(y.double(), expected, tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert_close(gradient.double(), expected_gradient, tolerance)


def test_a_norm_is_the_fast_one_only_in_eager_training_on_a_cpu():
    x = torch.randn(2, 8)
    norm = RMSNorm(8, 1e-6)
    # the node of the backward pass tells which one was used
    assert "RMSNormFunction" in type(norm(x).grad_fn).__name__
    with torch.no_grad():
        assert not has_fast_norm(x)
    assert not has_fast_norm(x.to("meta"))


def test_rotation_multiplies_by_complex_numbers():
    x = torch.randn(3, 4, 20, 24, dtype=torch.float64)
    angles = torch.randn(20, 12, dtype=torch.float64)
    # the first and the second half of a head are the real and the imaginary parts
    real, imaginary = x.chunk(2, -1)
    one = torch.ones(()).double()
    rotated = torch.complex(real, imaginary) * torch.polar(one, angles)
    expected = torch.cat((rotated.real, rotated.imag), -1)
    assert_close(rotate(x, angles.cos(), angles.sin()), expected, 1e-13)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
def test_heads_that_share_keys_attend_as_with_copies_of_them(p, dtype):
    torch.manual_seed(0)
    q = torch.randn(2, 6, 40, 16).to(dtype)
    k = torch.randn(2, 2, 40, 16).to(dtype)
    v = torch.randn(2, 2, 40, 16).to(dtype)
    # dropout must draw the same numbers both times
    torch.manual_seed(1)
    y = attend(q, k, v, p)
    torch.manual_seed(1)
    # six heads of queries share two of keys and values
    heads = [0, 0, 0, 1, 1, 1]
    expected = attend(q, k[:, heads], v[:, heads], p)
    assert torch.equal(y, expected)


# the kernel takes 256 rows at a time
@pytest.mark.parametrize("T", [300, 256, 7])
def test_attention_in_bfloat16_agrees_with_float64(T):
    torch.manual_seed(0)
    # queries, keys and values
    randoms = [torch.randn(2, 3, T, 16) for _ in range(3)]
    inputs = [t.bfloat16().requires_grad_() for t in randoms]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(2, 3, T, 16).bfloat16()
    attend(*inputs, 0.0).backward(dy)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    expected.backward(dy.double())
    error = attend(*inputs, 0.0) - expected
    assert error.abs().max() < 0.03
    for tensor, exact_tensor in zip(inputs, exact):
        error = compute_relative_error(tensor.grad, exact_tensor.grad)
        assert error < 0.01, error


def test_attention_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q = torch.zeros(8, 4, 64, 16)
    k = torch.zeros(8, 4, 64, 16)
    # with the identity as values, the result is the attention weights
    v = torch.eye(64).expand(8, 4, 64, 64)
    weights = attend(q, k, v, 0.25)
    # without dropout each weight of the last row would be 1 / 64
    row = weights[..., -1, :] * 64
    assert row.unique().allclose(torch.tensor([0, 4 / 3]))
    assert abs(row.mean() - 1) < 0.05
    assert not weights.triu(1).any()


# without padding of the vocabulary and with it
@pytest.mark.parametrize("columns", [50, 64])
def test_the_loss_by_parts_is_the_cross_entropy(columns, monkeypatch):
    # 20 rows at a time, of 70: the last part is shorter
    monkeypatch.setattr(kernels, "MAX_LOGITS", 20 * columns)
    torch.manual_seed(0)
    x = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(columns, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (70,))
    loss = LinearCrossEntropy.apply(x, weight, targets, 50)
    logits = (x @ weight.T)[:, :50]
    expected = F.cross_entropy(logits, targets)
    assert torch.allclose(loss, expected, rtol=1e-12)

    # times 3: a gradient of the loss other than 1 must reach the inputs
    gradients = torch.autograd.grad(3 * loss, (x, weight))
    expected_gradients = torch.autograd.grad(3 * expected, (x, weight))
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)

    # without gradients the loss takes a shorter path
    with torch.no_grad():
        loss = LinearCrossEntropy.apply(x, weight, targets, 50)
    assert torch.allclose(loss, expected, rtol=1e-12)


def test_the_loss_by_parts_in_bfloat16_agrees_with_float64(monkeypatch):
    # 20 rows at a time, of 4,000: rounding would add up if sums were kept in bfloat16
    monkeypatch.setattr(kernels, "MAX_LOGITS", 20 * 50)
    torch.manual_seed(0)
    x = torch.randn(4000, 64).bfloat16().float()
    weight = (torch.randn(50, 64) / 8).bfloat16().float()
    inputs = (x.requires_grad_(), weight.requires_grad_())
    targets = torch.randint(50, (4000,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy.apply(*inputs, targets, 50)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    assert abs(loss / expected - 1) < 1e-3

    gradients = torch.autograd.grad(loss, inputs)
    expected_gradients = torch.autograd.grad(expected, exact)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.dtype == torch.float32
        assert compute_relative_error(gradient, expected_gradient) < 3e-3


def test_a_frequent_token_does_not_overflow_float16():
    # one token 20,000 times: the sum of its gradients exceeds float16's 65,504
    x = torch.full((20_000, 8), 6.0, requires_grad=True)
    weight = torch.zeros(65, 8, requires_grad=True)
    targets = torch.zeros(20_000, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        loss = LinearCrossEntropy.apply(x, weight, targets, 65)
    (dweight,) = torch.autograd.grad(loss, weight)
    expected = torch.full((8,), -6 * 64 / 65)
    assert torch.allclose(dweight[0], expected, rtol=1e-3)


def test_an_evaluation_makes_no_gradients(monkeypatch):
    needs_gradient = []

    def record_need(ctx, x, weight, targets, V):
        needs_gradient.append(ctx.needs_input_grad[0])
        return x.sum()

    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(record_need))
    model = build_random_model()
    x = make_tokens(4, 16)
    model(x, x)
    with torch.no_grad():
        model(x, x)
    assert needs_gradient == [True, False]
