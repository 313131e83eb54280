"""What model.py promises: it is GPT-2 or Qwen3, its cache changes nothing, its optimizer forgets
nothing."""

import copy
import json
import math
import os
import shutil
from dataclasses import asdict, replace

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before Transformers is loaded: else it asks the hub, and waits
)

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

torch.set_num_threads(1)  # models this small are slower on two
ARGS = ModelArgs(
    n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=61, bias=True, dropout=0.0
)
# heads of their own width, shared keys and values, weights of its own for the output layer
QWEN3 = ModelArgs(
    n_layer=2,
    n_head=4,
    n_embd=32,
    block_size=16,
    vocab_size=61,
    bias=False,
    dropout=0.0,
    architecture="qwen3",
    n_kv_head=2,
    head_dim=12,
    n_ff=48,
    rope_theta=100.0,
    tie_embeddings=False,
)
LLAMA = replace(QWEN3, architecture="llama")
each = pytest.mark.parametrize(
    "args",
    [
        ARGS,
        LLAMA,
        QWEN3,
        replace(QWEN3, n_kv_head=0, head_dim=0, n_ff=0, tie_embeddings=True),
    ],
    ids=["gpt2", "llama", "qwen3", "qwen3-tied"],
)
both = pytest.mark.parametrize("args", [ARGS, QWEN3], ids=["gpt2", "qwen3"])
CONV1D = (
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
)  # Transformers keeps these transposed


def wild(args=ARGS, std=0.3):
    """A model whose every parameter is random and large: nothing hides behind a 0 or a 1."""
    torch.manual_seed(0)
    model = build_model(args)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def tokens(*shape, below=ARGS.vocab_size, seed=1):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def agree(ours, theirs, tolerance):
    """Whether two tensors differ by no more than `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance, f"they differ by {error:.1e} of the largest value"


# against Transformers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random GPT-2 of Transformers, in float32, and the folder that it was saved to."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
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
    )
    for p in model.parameters():
        if (
            p.dim() == 1
        ):  # biases and norms start as exact 0 and 1, which would hide a fault
            p.data += 0.2 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("gpt2")
    model.eval().save_pretrained(folder)
    return model, folder


def copy_folder(source, to, **settings):
    """A copy of a folder in Hugging Face's format with other settings in its config.json."""
    shutil.copytree(source, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | settings))
    return to


def loaded(source, vocab_size=101, block_size=32):
    """The model in a file or folder, as train.py builds it."""
    args, state, _ = read_weights(str(source))
    return load_model(*crop_weights(args, state, vocab_size, block_size)).eval()


def test_gpt2_is_that_of_transformers(theirs):
    hf, folder = theirs
    ours, idx = loaded(folder), tokens(4, 32, below=101)
    agree(ours(idx), hf(idx).logits, 1e-5)
    loss, expected = ours(idx[:, :-1], idx[:, 1:]), hf(idx, labels=idx).loss
    agree(loss, expected, 1e-6)
    hf.zero_grad()
    expected.backward()
    loss.backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        agree(
            p.grad,
            gradients[name].t() if name.endswith(CONV1D) else gradients[name],
            2e-5,
        )


def make_qwen3(folder, kind=(Qwen3ForCausalLM, Qwen3Config), **settings):
    """A random Qwen3 of Transformers, or a Llama, saved to a folder."""
    torch.manual_seed(0)
    model_class, config_class = kind
    model = model_class(
        config_class(
            **{
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
            | settings
        )
    )
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.2 * torch.randn_like(p)
    model.eval().save_pretrained(folder, max_shard_size="100KB")  # several files
    return model


@pytest.mark.parametrize(
    "kind",
    [(Qwen3ForCausalLM, Qwen3Config), (LlamaForCausalLM, LlamaConfig)],
    ids=["qwen3", "llama"],
)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
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
    kind, settings, dtype, most, tmp_path, monkeypatch
):
    hf = make_qwen3(tmp_path, kind, **settings).to(dtype)
    ours, idx = loaded(tmp_path).to(dtype), tokens(4, 32, below=101)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if dtype == torch.float64:  # theirs computes norms in float32 also then
        for norm in (Qwen3RMSNorm, LlamaRMSNorm):
            monkeypatch.setattr(
                norm,
                "forward",
                lambda self, x: F.rms_norm(
                    x, self.weight.shape, self.weight, self.variance_epsilon
                ),
            )
    logits = hf(idx).logits
    with torch.no_grad():  # norms take another path
        agree(ours(idx), logits, most)
    loss = ours(idx[:, :-1], idx[:, 1:])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    agree(loss, expected, most)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    assert list(gradients) == [name for name, _ in ours.named_parameters()]
    for name, p in ours.named_parameters():
        agree(p.grad, gradients[name], 2 * most)


def test_qwen3_continues_a_padded_batch_as_transformers_does(tmp_path):
    hf = make_qwen3(tmp_path)
    prompts = [tokens(length, below=101, seed=length).tolist() for length in (7, 1, 4)]
    padded = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor(
        [[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    )
    expected = hf.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 7:].tolist()
    assert made(loaded(tmp_path), prompts, 20, temperature=0) == expected
    assert len(set(expected[0])) > 4


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
    ],
)
def test_a_llama_that_cannot_be_represented_is_refused(tmp_path, key, value):
    make_qwen3(tmp_path / "llama", (LlamaForCausalLM, LlamaConfig))
    folder = copy_folder(tmp_path / "llama", tmp_path / "folder", **{key: value})
    with pytest.raises(UserError, match=key):
        read_weights(str(folder))


def test_a_llama_without_optional_sizes_is_read(tmp_path):
    make_qwen3(
        tmp_path / "llama",
        (LlamaForCausalLM, LlamaConfig),
        head_dim=16,
        num_key_value_heads=4,
    )
    folder = copy_folder(
        tmp_path / "llama", tmp_path / "folder", head_dim=None, num_key_value_heads=None
    )
    idx = tokens(2, 9, below=101)
    assert torch.equal(loaded(folder)(idx), loaded(tmp_path / "llama")(idx))


def test_rope_theta_is_read_where_either_version_writes_it(tmp_path):
    make_qwen3(tmp_path / "qwen3")
    path = tmp_path / "qwen3/config.json"
    config = json.loads(path.read_text())
    assert (
        "rope_theta" not in config
        and read_weights(str(path.parent))[0]["rope_theta"] == 500
    )
    del config["rope_parameters"]
    path.write_text(
        json.dumps(config | {"rope_theta": 1000000.0, "rope_scaling": None})
    )
    assert read_weights(str(path.parent))[0]["rope_theta"] == 1e6


def test_bfloat16_files_load_as_float32(tmp_path):
    make_qwen3(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    model = loaded(tmp_path, vocab_size=90, block_size=8)  # 11 rows are padding
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.shape == model.embedding.weight.shape == (90, 64)
    assert model(tokens(2, 8, below=90)).shape == (2, 8, 90)


def test_a_shorter_block_changes_nothing_for_short_inputs(theirs):
    hf, folder = theirs
    ours, idx = loaded(folder, block_size=8), tokens(4, 8, below=101)
    assert ours.transformer.wpe.weight.shape == (8, 64) and ours.args.block_size == 8
    agree(ours(idx), hf(idx).logits, 1e-5)


def test_the_hubs_files_with_causal_masks_are_read(theirs, tmp_path):
    state = load_file(theirs[1] / "model.safetensors")
    state = {
        name.removeprefix("transformer."): tensor for name, tensor in state.items()
    }
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((theirs[1] / "config.json").read_bytes())
    expected = loaded(theirs[1]).state_dict()
    got = loaded(tmp_path).state_dict()
    assert got.keys() == expected.keys() and all(
        torch.equal(got[k], expected[k]) for k in got
    )


@pytest.mark.parametrize(
    "config, weights, says",
    [
        (None, None, "config.json"),
        ("{", None, "config.json"),
        ("{}", None, "config.json"),
        ("[]", None, "config.json"),
        ("good", None, "safetensors"),
        ("good", b"no weights", "safetensors"),
    ],
)
def test_a_folder_that_lacks_or_spoils_a_file_is_refused(
    theirs, tmp_path, config, weights, says
):
    if config:
        good = (theirs[1] / "config.json").read_text()
        (tmp_path / "config.json").write_text(good if config == "good" else config)
    if weights:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=says):
        read_weights(str(tmp_path))


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
def test_wrong_sizes_in_config_json_are_refused(theirs, tmp_path, settings):
    folder = copy_folder(theirs[1], tmp_path / "folder", **settings)
    with pytest.raises(UserError):
        args, state, _ = read_weights(str(folder))
        load_model(*crop_weights(args, state, args["vocab_size"], args["block_size"]))


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
    make_qwen3(tmp_path / "qwen3")
    folder = copy_folder(tmp_path / "qwen3", tmp_path / "folder", **settings)
    with pytest.raises(UserError):
        args, state, _ = read_weights(str(folder))
        state = state | {"lm_head.weight": torch.zeros(1)}
        load_model(*crop_weights(args, state, args["vocab_size"], args["block_size"]))


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_model_bin_is_read(theirs, tmp_path, shards):
    folder, state = copy_folder(theirs[1], tmp_path / "folder"), theirs[0].state_dict()
    (folder / "model.safetensors").unlink()
    torch.save({"lr": 1e-3}, folder / "optimizer.bin")  # ignored: not a weight
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names, files = (
            list(state),
            [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)],
        )
        for i, file in enumerate(files):
            torch.save({name: state[name] for name in names[i::2]}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps(
                {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
            )
        )
    idx = tokens(2, 32, below=101)
    agree(loaded(folder)(idx), theirs[0](idx).logits, 1e-5)


def test_a_corrupt_pytorch_model_bin_is_refused(theirs, tmp_path):
    folder = copy_folder(theirs[1], tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(theirs[0].state_dict(), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    torch.save({"state_dict": theirs[0].state_dict()}, tmp_path / "nested.pt")
    nested = (tmp_path / "nested.pt").read_bytes()
    for bad in (content, content[:-100], b"", b"no weights", nested):
        file.write_bytes(bad)
        with pytest.raises(UserError, match="pytorch_model.bin") as refused:
            read_weights(str(folder))
        assert "\n" not in str(refused.value)


def test_a_pytorch_model_bin_never_runs_code(theirs, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    folder = copy_folder(theirs[1], tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Trap()}, folder / "pytorch_model.bin")
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
)
def test_a_spoiled_tokenizer_is_refused(theirs, tmp_path, name, content):
    folder = copy_folder(theirs[1], tmp_path / "folder")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        read_weights(str(folder))


# checkpoint files


def nanogpt_checkpoint(model, path, prefix="_orig_mod.", rows=64, **more):
    """What nanoGPT saves of a compiled model whose vocabulary it has padded."""
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    wte = f"{prefix}transformer.wte.weight"
    state[wte] = torch.cat(
        [state[wte], torch.zeros(rows - len(state[wte]), state[wte].size(1))]
    )
    state[f"{prefix}lm_head.weight"] = state[wte]
    torch.save(
        {
            "model": state | more,
            "model_args": asdict(model.args) | {"vocab_size": rows},
            "iter_num": 7,
            "best_val_loss": torch.tensor(1.0),
            "config": {"n_layer": 2},
        },
        path,
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_a_checkpoint_of_nanogpt_is_read(tmp_path, prefix):
    model, path = wild(), tmp_path / "ckpt.pt"
    nanogpt_checkpoint(model, path, prefix)
    got = loaded(path, vocab_size=61, block_size=16)
    assert got.args == model.args
    assert torch.equal(got(tokens(2, 16)), model(tokens(2, 16)))


def test_a_checkpoint_of_nanogpt_with_causal_masks_is_read(tmp_path):
    model, path = wild(), tmp_path / "ckpt.pt"
    masks = {
        f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril()
        for i in range(2)
    }
    nanogpt_checkpoint(model, path, prefix="", **masks)
    assert torch.equal(loaded(path, 61, 16)(tokens(2, 16)), model(tokens(2, 16)))


def test_a_checkpoint_describes_its_data(tmp_path):
    model, path = wild(), tmp_path / "ckpt.pt"
    weights, description = model.state_dict(), {"name": "x"}
    torch.save(
        {"model": weights, "model_args": asdict(ARGS), "data": description}, path
    )
    args, state, data = read_weights(str(path))
    assert args == asdict(ARGS) and data == description
    assert state.keys() == weights.keys() and all(
        torch.equal(state[k], weights[k]) for k in state
    )


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
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(UserError, match=f"Try: --init_from={tmp_path}/ckpt.pt"):
        read_weights(str(tmp_path))


def test_a_checkpoint_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"model": Trap(), "model_args": asdict(ARGS)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError):
        read_weights(str(tmp_path / "ckpt.pt"))
    assert not (tmp_path / "trapped").exists()


# the network


def test_the_parameters_have_gpt2s_names(
    theirs,
):
    names = [name for name, _ in theirs[0].named_parameters()]
    assert [name for name, _ in loaded(theirs[1]).named_parameters()] == names
    assert not any("lm_head" in name for name in names)


def test_the_embedding_and_the_output_layer_are_one():
    model, idx = wild(), tokens(2, 16)
    before = model(idx)
    with torch.no_grad():
        model.transformer.wte.weight[60] += 1  # a token that idx must not hold
    assert not (idx == 60).any()
    changed = model(idx) != before
    assert changed[..., 60].all() and not changed[..., :60].any()


def test_qwen3_starts_as_the_identity_and_a_uniform_guess():
    torch.manual_seed(0)
    model, idx = build_model(replace(QWEN3, n_embd=128)), tokens(4, 16)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            assert not p.any(), name
        else:
            assert abs(p.std() - 0.02) < 0.0012, name
    agree(model(idx, idx), torch.tensor(61.0).log(), 1e-6)


@pytest.mark.parametrize(
    "settings, says",
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
)
def test_a_setting_that_the_architecture_lacks_is_refused(settings, says):
    with pytest.raises(UserError, match=says):
        replace(ARGS, **settings)


def test_flops_count_the_matrix_products():
    for args in (ARGS, QWEN3, replace(QWEN3, tie_embeddings=True)):
        gpt2 = args.architecture == "gpt2"
        H, K, D, C, F_ = (
            args.n_head,
            args.K,
            args.D,
            args.n_embd,
            128 if gpt2 else args.ff_width,
        )
        matrices = (
            args.n_layer * (2 * C * D * (H + K) + (2 if gpt2 else 3) * C * F_) + 61 * C
        )
        vectors = sum(p.numel() for p in build_model(args).parameters() if p.dim() == 1)
        attention = 12 * args.n_layer * H * D * args.block_size
        assert (
            build_model(args).flops_per_token() == 6 * (matrices + vectors) + attention
        )


def test_without_bias_there_are_none():
    names = [
        name for name, _ in build_model(replace(ARGS, bias=False)).named_parameters()
    ]
    assert len(names) == 2 + 6 * ARGS.n_layer + 1
    assert not any(name.endswith("bias") for name in names)


def test_the_weights_begin_as_gpt2_s():
    torch.manual_seed(0)
    for name, p in build_model(replace(ARGS, n_layer=3, n_embd=128)).named_parameters():
        std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert abs(p.std() - std) < 0.06 * std and abs(p.mean()) < 0.1 * std, name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


@each
def test_a_token_sees_those_before_it_only(args):
    model, idx = wild(args), tokens(1, 16)
    for changed in range(16):
        other = idx.clone()
        other[0, changed] = (idx[0, changed] + 1) % 61
        differs = (model(idx) - model(other)).abs().amax((0, 2)) > 1e-4
        assert not differs[:changed].any() and differs[changed:].all()


@both
def test_dropout_acts_in_training_and_repeats_with_its_seed(args):
    model, idx = wild(replace(args, dropout=0.5)), tokens(4, 16)
    assert torch.equal(model(idx), wild(args)(idx)) and torch.equal(
        model(idx), model(idx)
    )
    model.train()
    torch.manual_seed(1)
    one, two = model(idx), model(idx)
    torch.manual_seed(1)
    assert not torch.equal(one, two) and torch.equal(one, model(idx))


@both
def test_dropout_acts_on_embedding_attention_and_branches(args, monkeypatch):
    calls = []
    model = build_model(replace(args, dropout=0.5)).train()

    def record(owner, name):
        function = getattr(owner, name)

        def record_call(*inputs):
            calls.append((name, inputs[-1]))
            return function(*inputs)

        monkeypatch.setattr(owner, name, record_call)

    record(model_module.F, "dropout")
    record(model_module, "attend")
    model(tokens(4, 16))
    block = [("attend", 0.5), ("dropout", 0.5), ("dropout", 0.5)]
    assert calls == [("dropout", 0.5)] + block * args.n_layer
    calls.clear()
    model.eval()(tokens(4, 16))
    assert {p for _, p in calls} == {0.0}


@each
def test_a_batch_is_learned_by_heart(args):
    torch.manual_seed(0)
    model, idx = build_model(args), tokens(4, 17)
    optimizer = make_optimizer(
        model, TrainConfig(learning_rate=1e-2, weight_decay=0.0, decay_lr=False)
    )
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


@both
def test_bfloat16_agrees_with_float64_as_far_as_it_can(args):
    model = wild(replace(args, n_embd=64, n_layer=3), std=0.15)
    exact, x, y = copy.deepcopy(model).double(), tokens(8, 16), tokens(8, 16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x), model(x, y)
    agree(logits.double(), exact(x), 0.02)
    agree(loss.double(), exact(x, y), 0.002)
    loss.backward()
    exact(x, y).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        error = ((p.grad - q.grad).norm() / q.grad.norm()).item()
        assert error < 0.02, f"{name}: {error:.3f}"


def padded_output(model):
    """What `GPT.output_weight` gives on CUDA."""
    return F.pad((model.lm_head or model.embedding).weight, (0, 0, 0, 3))


@each
def test_padding_the_vocabulary_changes_nothing(args, monkeypatch):
    plain, x, y = wild(args), tokens(4, 16), tokens(4, 16, seed=2)
    padded = copy.deepcopy(plain)
    loss = plain(x, y)
    loss.backward()
    monkeypatch.setattr(GPT, "output_weight", padded_output)
    assert padded.output_weight().shape == (64, 32)
    agree(padded(x, y), loss, 1e-6)
    padded(x, y).backward()
    for p, q in zip(padded.parameters(), plain.parameters()):
        agree(p.grad, q.grad, 1e-5)


@each
def test_a_step_moves_every_parameter(args):
    model = wild(args)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2, decay_lr=False))
    model(tokens(4, 16), tokens(4, 16, seed=2)).backward()
    optimizer.step()
    assert all(
        (tensor != before[name]).any() for name, tensor in model.state_dict().items()
    )


# sampling


def talker(args=ARGS):
    """A wild model whose likeliest next token depends on the place and the text."""
    model = wild(args, std=0.5)
    if args.architecture == "gpt2":
        with torch.no_grad():
            model.transformer.wpe.weight.mul_(10)
            model.transformer.ln_f.bias.zero_()
    return model


def made(model, prompts, n, **how):
    """What `generate` gives for each prompt, without the pauses."""
    steps = list(generate(model, prompts, n, **how))
    return [
        [step[i] for step in steps if step[i] is not None] for i in range(len(prompts))
    ]


def made_without_cache(
    model, prompt, n, temperature=1.0, top_k=0, top_p=1.0, seed=1337
):
    """The same for one prompt, by a forward pass over the whole window for each token."""
    rng, text = torch.Generator().manual_seed(seed), list(prompt)
    size = model.args.block_size
    start = max(0, len(text) - size)
    for _ in range(n):
        if len(text) - start > size:
            start = len(text) - (size - size // 4)
        logits = model(torch.tensor([text[start:]]))[:, -1]
        text.append(sample_token(logits, temperature, top_k, top_p, rng).item())
    return text[len(prompt) :]


@each
def test_the_cache_gives_the_logits_of_the_whole(args):
    model, idx = talker(args), tokens(3, 16)
    whole = model(idx)
    for start in (1, 5, 16):
        cache = model.make_cache(3)
        parts = [model(idx[:, :start], cache=cache)]
        parts += [model(idx[:, i : i + 1], cache=cache) for i in range(start, 16)]
        assert cache.length == 16
        agree(torch.cat(parts, 1), whole[:, start - 1 :], 1e-5)
    # several tokens at a time
    cache = model.make_cache(3)
    parts = [model(idx[:, i : i + 5], cache=cache) for i in (0, 5, 10)]
    agree(torch.cat(parts, 1), whole[:, 4:15:5], 1e-5)


@both
@pytest.mark.parametrize("length", [1, 16, 30])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 3},
    ],
    ids=["greedy", "sampled"],
)
def test_cached_generation_equals_uncached(args, length, how):
    model, prompt = talker(args), tokens(length, seed=length).tolist()
    expected = made_without_cache(model, prompt, 50, **how)
    assert made(model, [prompt], 50, **how) == [expected]
    assert len(set(expected)) > 4  # not a loop over a few tokens


@pytest.mark.skipif(
    pick_dtype("auto", torch.device("cpu")) != torch.bfloat16,
    reason="this CPU has no bfloat16 instructions",
)
@pytest.mark.parametrize(
    "args",
    [ARGS, replace(ARGS, bias=False), QWEN3, replace(QWEN3, tie_embeddings=True)],
)
def test_packed_weights_generate_the_same(args):
    plain = wild(args).bfloat16()
    packed = copy.deepcopy(plain)
    pack_linear_layers(packed)
    x = tokens(3, ARGS.block_size)
    with torch.inference_mode():
        agree(packed(x), plain(x), 2**-6)
    assert made(packed, [[1], [2, 3]], 40, temperature=0) == made(
        plain, [[1], [2, 3]], 40, temperature=0
    )


@both
def test_prompts_in_a_batch_are_continued_as_each_alone(args):
    model = talker(args)
    prompts = [tokens(length, seed=length).tolist() for length in (7, 1, 4, 4)]
    alone = [made(model, [prompt], 40, temperature=0)[0] for prompt in prompts]
    assert made(model, prompts, 40, temperature=0) == alone
    assert all(len(text) == 40 for text in alone)


def test_each_sequence_gets_max_new_tokens_after_its_prompt():
    for n in (0, 1, 7):
        assert [len(text) for text in made(talker(), [[1, 2, 3], [4]], n)] == [n, n]
    silent = [
        [token is None for token in step]
        for step in generate(talker(), [[1, 2, 3], [4]], 2)
    ]
    assert silent == [[True, False], [True, False], [False, True], [False, True]]


def test_a_sequence_ends_before_its_stop_token():
    model, prompts = talker(), [[1], [2], [3, 4]]
    free = made(model, prompts, 30, seed=5)
    stop = free[0][12]
    until = [text[: text.index(stop)] if stop in text else text for text in free]
    assert len(until[0]) <= 12 and max(map(len, until)) > 12
    assert made(model, prompts, 30, seed=5, stop=stop) == until
    [[first]] = made(model, [[1]], 1, seed=5)
    assert list(generate(model, [[1]], 30, seed=5, stop=first)) == [[None]]


def test_a_stop_token_in_the_prompt_stops_nothing():
    model = talker()
    prompts = [[9, 9, 1], [5]]
    assert made(model, prompts, 1, seed=5, stop=9) == made(model, prompts, 1, seed=5)


def test_a_seed_repeats_and_another_differs():
    model = talker()
    one, again, other = (made(model, [[1]] * 3, 40, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other and len(set(map(tuple, one))) == 3


def test_generation_leaves_the_random_numbers_of_training_alone():
    model, before = talker(), torch.get_rng_state()
    made(model, [[1]], 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_cold_or_narrow_sampling_takes_the_likeliest():
    model, text = talker(), [1]
    while len(text) < 16:
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    for how in (
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1e-9},
        {"temperature": 1e-6},
    ):
        assert made(model, [[1]], 15, **how) == [text[1:]], how


# picking a token


SHARES = torch.tensor(
    [0.05, 0.4, 0.1, 0.3, 0.15]
)  # in an order that is not that of the ranks


def drawn(n=20000, **how):
    """Return how often each of five tokens is drawn; SHARES are the probabilities."""
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    picked = sample_token(
        (SHARES.log() + 7).expand(n, -1), rng=torch.Generator().manual_seed(0), **how
    )
    return torch.bincount(picked, minlength=5) / n


def same(shares, expected, n=20000):
    """Whether shares of n draws are the expected ones, to five sigma; 0 where those are 0."""
    expected = torch.as_tensor(expected) / sum(expected)
    return bool(
        ((shares - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    )


def test_tokens_are_drawn_by_their_probability():
    assert same(drawn(), SHARES)
    assert same(drawn(temperature=0.5), SHARES**2) and same(
        drawn(temperature=2.0), SHARES**0.5
    )


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
)
def test_top_k_keeps_the_k_likeliest_and_their_proportions(k, kept):
    assert same(drawn(top_k=k), [SHARES[i] * (i in kept) for i in range(5)])


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
)
def test_top_p_keeps_the_fewest_tokens_that_hold_p(p, kept):
    assert same(drawn(top_p=p), [SHARES[i] * (i in kept) for i in range(5)])


def test_top_p_looks_at_what_temperature_and_top_k_have_left():
    assert same(drawn(top_k=2, top_p=0.56), [0, 1, 0, 0, 0])  # 0.4 of 0.7 is 0.57
    assert same(
        drawn(temperature=0.5, top_p=0.56), [0, 1, 0, 0, 0]
    )  # 0.16 of 0.285 is 0.56


def test_each_row_is_cut_by_its_own_probabilities():
    rows = torch.stack([SHARES.log(), SHARES.roll(1).log() - 5]).repeat(500, 1)
    for how in ({"top_k": 2, "top_p": 1.0}, {"top_k": 0, "top_p": 0.69}):
        picked = sample_token(
            rows, 1.0, rng=torch.Generator().manual_seed(0), **how
        ).view(500, 2)
        assert [set(column.tolist()) for column in picked.T] == [{1, 3}, {2, 4}]


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_the_fast_rms_norm_agrees_with_pytorch(dtype, most):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 4, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 20, 4, 24, dtype=dtype)
    y = RMSNormFunction.apply(x, weight, 1e-2)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(exact[0], weight.shape, exact[1], 1e-2)
    agree(y.double(), expected, most)
    for ours, right in zip(
        torch.autograd.grad(y, (x, weight), dy),
        torch.autograd.grad(expected, exact, dy.double()),
    ):
        agree(ours.double(), right, most)


def test_a_norm_is_the_fast_one_only_in_eager_training_on_a_cpu():
    x = torch.randn(2, 8)
    norm = RMSNorm(8, 1e-6)
    assert "RMSNormFunction" in type(norm(x).grad_fn).__name__
    with torch.no_grad():
        assert not has_fast_norm(x)
    assert not has_fast_norm(x.to("meta"))


def test_rotation_multiplies_by_complex_numbers():
    x = torch.randn(3, 4, 20, 24, dtype=torch.float64)
    angles = torch.randn(20, 12, dtype=torch.float64)
    rotated = torch.complex(*x.chunk(2, -1)) * torch.polar(
        torch.ones(()).double(), angles
    )
    expected = torch.cat((rotated.real, rotated.imag), -1)
    agree(rotate(x, angles.cos(), angles.sin()), expected, 1e-13)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share_keys_attend_as_with_copies_of_them(p, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 16).to(dtype) for heads in (6, 2, 2))
    torch.manual_seed(1)
    y = attend(q, k, v, p)
    torch.manual_seed(1)
    copies = [t[:, [0, 0, 0, 1, 1, 1]] for t in (k, v)]
    assert torch.equal(y, attend(q, *copies, p))


@pytest.mark.parametrize("T", [300, 256, 7])
def test_attention_in_bfloat16_agrees_with_float64(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 16).bfloat16().requires_grad_() for _ in range(3))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    dy = torch.randn(2, 3, T, 16).bfloat16()
    attend(q, k, v, 0.0).backward(dy)
    right = F.scaled_dot_product_attention(*exact, is_causal=True)
    right.backward(dy.double())
    assert (attend(q, k, v, 0.0) - right).abs().max() < 0.03
    for ours, exactly in zip((q, k, v), exact):
        error = (ours.grad - exactly.grad).norm() / exactly.grad.norm()
        assert error < 0.01, error


def test_attention_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.zeros(8, 4, 64, 16), torch.zeros(8, 4, 64, 16)
    v = torch.eye(64).expand(8, 4, 64, 64)  # the rows that come out are the weights
    weights = attend(q, k, v, 0.25)
    row = weights[..., -1, :] * 64  # each was 1 before some were dropped
    assert (
        row.unique().allclose(torch.tensor([0, 4 / 3])) and abs(row.mean() - 1) < 0.05
    )
    assert not weights.triu(1).any()


@pytest.mark.parametrize("columns", [50, 64])
def test_the_loss_by_parts_is_the_cross_entropy(columns, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_LOGITS", 20 * columns)  # 20 rows at a time, of 70
    torch.manual_seed(0)
    x = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(columns, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (70,))
    loss = LinearCrossEntropy.apply(x, weight, targets, 50)
    right = F.cross_entropy((x @ weight.T)[:, :50], targets)
    assert torch.allclose(loss, right, rtol=1e-12)
    for ours, exactly in zip(
        torch.autograd.grad(3 * loss, (x, weight)),
        torch.autograd.grad(3 * right, (x, weight)),
    ):
        assert torch.allclose(ours, exactly, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(
            LinearCrossEntropy.apply(x, weight, targets, 50), right, rtol=1e-12
        )


def test_the_loss_by_parts_in_bfloat16_agrees_with_float64(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_LOGITS", 20 * 50)  # 20 rows at a time, of 4,000
    torch.manual_seed(0)
    x, weight = torch.randn(4000, 64), torch.randn(50, 64) / 8
    x, weight = (
        x.bfloat16().float().requires_grad_(),
        weight.bfloat16().float().requires_grad_(),
    )
    targets = torch.randint(50, (4000,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy.apply(x, weight, targets, 50)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    right = F.cross_entropy(exact[0] @ exact[1].T, targets)
    assert abs(loss / right - 1) < 1e-3
    for ours, exactly in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(right, exact)
    ):
        assert (
            ours.dtype == torch.float32
            and (ours - exactly).norm() / exactly.norm() < 3e-3
        )


def test_a_frequent_token_does_not_overflow_float16():
    x = torch.full((20_000, 8), 6.0, requires_grad=True)
    weight = torch.zeros(65, 8, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = LinearCrossEntropy.apply(
            x, weight, torch.zeros(20_000, dtype=torch.long), 65
        )
    (dweight,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(dweight[0], torch.full((8,), -6 * 64 / 65), rtol=1e-3)


def test_an_evaluation_makes_no_gradients(monkeypatch):
    asked = []

    def loss_of(ctx, x, weight, targets, V):
        asked.append(ctx.needs_input_grad[0])
        return x.sum()

    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(loss_of))
    model, x = wild(), tokens(4, 16)
    model(x, x)
    with torch.no_grad():
        model(x, x)
    assert asked == [True, False]
