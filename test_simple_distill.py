"""Tests of simple_distill: pure functions against independent float64 references, and runs through the real command line.

    pytest                                   # the ordinary run: tiny random models made on the spot, CPU, no network
    pytest -m campaign                       # what takes long
    python test_simple_distill.py --bench    # tables of speed and memory
"""
import ast
import atexit
import contextlib
import io
import itertools
import json
import math
import os
import pty
import random
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
if "HF_DATASETS_CACHE" not in os.environ:   # tokenised rows and model code go to a place of our own, which subprocesses share
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="simple-distill-test-")
    os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_DATASETS_CACHE"], "modules")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import datasets
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import config
import simple_distill as sd

transformers.utils.logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------------------------------
# Helpers: the command line in this process and in another, tiny models, what a run leaves behind.
# ---------------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    rc: int
    out: str
    err: str


def words_of(args):
    """Arguments as words; --use_wandb false unless the test says otherwise."""
    args = [str(a) for a in args]
    mode = args[args.index("--mode") + 1] if "--mode" in args else "train"
    return args + ([] if mode != "train" or any("use_wandb" in a for a in args) else ["--use_wandb", "false"])


def cli(*args, rc=0):
    """The command line in this process -> Result; the exit code is asserted."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            got = sd.main(words_of(args))
        except SystemExit as e:
            got = e.code or 0
    result = Result(got, out.getvalue(), err.getvalue())
    assert got == rc, f"exit code {got}, expected {rc}: {shlex.join(words_of(args))}\n{result.out}\n{result.err}"
    if rc == 2:
        lines = result.err.strip().splitlines()
        assert any(line.startswith("error: ") for line in lines) and "Traceback" not in result.err, result.err
    return result


def spawn(*args, nproc=1, env=None, **popen):
    """The real thing as a process of its own (and a session of its own, so that a signal reaches all of its ranks)."""
    command = [sys.executable, str(HERE / "simple_distill.py")] if nproc == 1 else [str(HERE / "launch.sh")]
    env = {**os.environ, "NPROC": str(nproc), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **(env or {})}
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True, **popen}
    return subprocess.Popen([*command, *words_of(args)], env=env, start_new_session=True, **popen)


def flags(**fields):
    """Fields of Config as command-line words; None leaves a field out."""
    words = []
    for name, value in fields.items():
        if value is not None:
            value = str(value).lower() if isinstance(value, bool) else value
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


# Everything that would blur a comparison is off: what a test is about, it turns on.
PLAIN = dict(dtype="fp32", seq_len=32, lr_scheduler="constant", warmup_ratio=0, weight_decay=0, learning_rate=1e-3, log_steps=1,
             save_steps=0, eval_steps=0, gradient_checkpointing=False)
STILL = 1e-30   # a learning rate that moves no weight in fp32


def distil(out, rc=0, **fields):
    return cli(*flags(**{**PLAIN, "output_dir": out, **fields}), rc=rc)


def log(out, kind=None):
    """The lines of log.jsonl; kind train or eval: only those."""
    with open(os.path.join(out, "log.jsonl")) as f:
        return [entry for entry in map(json.loads, f) if kind is None or f"{kind}/step" in entry]


def column(out, key):
    return [entry[key] for entry in log(out) if key in entry]


def weights(path):
    return load_file(os.path.join(path, "model.safetensors"))


def final_weights(out):
    return weights(os.path.join(out, "final"))


def checkpoint(out, step):
    """All tensors of a checkpoint by name."""
    path = os.path.join(out, "checkpoints", f"step-{step:08d}")
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "properties")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def gradients(out):
    """What the first step's gradient was: AdamW's first moment is a tenth of it (max_grad_norm 0)."""
    return {k: 10 * v for k, v in checkpoint(out, 1).items() if re.search(r"exp_avg(?!_sq)", k)}


def distance(a, b):
    """Relative to the size of b, over all tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return math.sqrt(sum((a[k].double() - b[k].double()).square().sum() for k in b) / sum(b[k].double().square().sum() for k in b))


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
          "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tiny_tokenizer(chat_template=None, *, roll=0, merges=(), bos=False):
    """A byte is a token (263 with the special ones): what a text encodes to can be seen with the naked eye.

    roll: the same tokens under other ids. merges: "t h" adds the token th. bos: encoding plain text starts with <|begin|>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = letters[roll:] + letters[:roll] + [m.replace(" ", "") for m in sorted(merges)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + letters)}, merges=[tuple(m.split()) for m in merges]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|begin|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(vocab=None, hidden=32, layers=2, cls="LlamaConfig", **overrides):
    shape = dict(vocab_size=vocab or len(tiny_tokenizer()), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
                 intermediate_size=2 * hidden, max_position_embeddings=512, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    if "GPT2" not in cls and "NeoX" not in cls:
        shape["num_key_value_heads"] = 2
    return getattr(transformers, cls)(**{**shape, "initializer_range": 0.2, **overrides})   # logits far from uniform


def tiny_model(path, vocab=None, hidden=32, layers=2, seed=0, cls="LlamaConfig", tokenizer=None, **overrides):
    """A random model and its tokenizer (False: none) in a directory -> its path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(tiny_config(vocab, hidden, layers, cls, **overrides)).save_pretrained(path)
    if tokenizer is not False:
        (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)


def edit_weights(path, change):
    """change(dict of tensors) in place, and save."""
    tensors = weights(path)
    change(tensors)
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_splits(folder, train, validation):
    """A directory of two splits, as on the hub: what is trained on does not depend on how a slice is held out."""
    os.makedirs(folder)
    write_jsonl(os.path.join(folder, "train.jsonl"), train)
    write_jsonl(os.path.join(folder, "validation.jsonl"), validation)
    return str(folder)


def prose(n, seed=0):
    """n words with some structure."""
    pick = random.Random(seed)
    return " ".join(pick.choice("one two three red green blue sun moon star tree river stone".split()) for _ in range(n))


def talk(n, seed=0):
    """n questions with answers of very different length."""
    return [{"prompt": prose(1 + i % 3, seed + i), "response": prose(1 + (5 * i) % 16, seed + 100 + i)} for i in range(n)]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)   # models this small take twice as long on two, and longer still beside other work


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", hidden=32, seed=1)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "student", hidden=16, seed=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """40 rows of plain text, some 70 blocks of 32 tokens."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "text.jsonl", [{"text": prose(8 + i % 9, i)} for i in range(40)])


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """8 conversations to train on, 4 held out."""
    return write_splits(tmp_path_factory.mktemp("data") / "chat", talk(8), talk(4, seed=50))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def dense_losses(student_logits, teacher_logits, labels, alpha, temperature, divergence="forward"):
    """The objective as a textbook writes it: full logits, [N] labels with -100 -> loss, ce, kl."""
    keep = labels != -100
    n, z, kl = keep.sum().clamp_min(1), student_logits[keep], torch.zeros(())
    ce = F.cross_entropy(z, labels[keep], reduction="sum") / n
    if teacher_logits is not None:
        logp, logq = F.log_softmax(z / temperature, -1), F.log_softmax(teacher_logits[keep] / temperature, -1)
        middle = torch.log((logp.exp() + logq.exp()) / 2)
        div = lambda a, b: F.kl_div(b, a, reduction="sum", log_target=True)   # KL(a || b)
        kl = {"forward": lambda: div(logq, logp), "reverse": lambda: div(logp, logq),
              "jsd": lambda: (div(logp, middle) + div(logq, middle)) / 2}[divergence]() * temperature ** 2 / n
    return alpha * ce + (1 - alpha) * kl, ce, kl


def chatml_rows(rows):
    """Prompt and response rows -> (ids, labels already shifted), written out by hand; labels count the answer and its end mark."""
    encode, coded = tiny_tokenizer().encode, []
    for row in rows:
        before, answer = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", f"{row['response']}<|im_end|>"
        ids = encode(before) + encode(answer) + encode("\n")
        first, last = len(encode(before)), len(encode(before)) + len(encode(answer))
        coded.append((torch.tensor(ids), torch.tensor([ids[i + 1] if first <= i + 1 < last else -100 for i in range(len(ids))])))
    return coded


def model_losses(student, teacher, coded, alpha, temperature=1.0, divergence="forward"):
    """The same through whole models, one row at a time: no padding, no packing, no chunks."""
    logits = lambda model: torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in coded])
    with torch.no_grad():
        teacher_logits = None if teacher is None else logits(teacher)
    return dense_losses(logits(student), teacher_logits, torch.cat([labels for _, labels in coded]), alpha, temperature, divergence)


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: distillation_loss against float64.
# ---------------------------------------------------------------------------------------------------------------------


def case(n=23, vocab=97, d=16, dt=24, *, seed=0, dtype=torch.float32, bias=False, scale=None, softcap=None, masked=0.3, size=2.0):
    """Random hidden states, heads and labels: (student_hidden, student_head, labels, teacher_hidden, teacher_head)."""
    torch.manual_seed(seed)

    def head(width):
        linear = nn.Linear(width, vocab, bias=bias).to(dtype)
        nn.init.normal_(linear.weight, std=size / math.sqrt(width))
        linear.scale, linear.softcap = scale, softcap
        return linear
    labels = torch.where(torch.rand(n) < masked, -100, torch.randint(vocab, (n,)))
    return torch.randn(n, d, dtype=dtype, requires_grad=True), head(d), labels, torch.randn(n, dt, dtype=dtype), head(dt)


def apply_head(hidden, head):
    z = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double()) * (head.scale or 1.0)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def with_gradients(losses, hidden, head):
    """(loss, ce, kl) and the gradients of loss -> six tensors in float64."""
    wanted = [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(losses[0], wanted) if wanted else []
    return [x.detach().double() for x in (*losses, *grads)]


def exact(hidden, head, labels, teacher_hidden, teacher_head, *, alpha, temperature=1.0, divergence="forward"):
    with torch.no_grad():
        teacher_logits = None if teacher_hidden is None else apply_head(teacher_hidden, teacher_head)
    return with_gradients(dense_losses(apply_head(hidden, head), teacher_logits, labels, alpha, temperature, divergence), hidden, head)


def fused(hidden, head, labels, teacher_hidden, teacher_head, **options):
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_head)
    return with_gradients(sd.distillation_loss(hidden, head, labels, teacher, **{"temperature": 1.0, **options}), hidden, head)


def off(got, want, floor=0.0):
    """Largest relative deviation; floor: the size below which a number counts as rounding."""
    assert len(got) == len(want)
    return max(((a - b).norm() / b.norm().clamp_min(max(floor, 1e-300))).item() for a, b in zip(got, want))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradients_match_float64(divergence, temperature, alpha):
    for seed in range(3):
        inputs, options = case(seed=seed), dict(alpha=alpha, temperature=temperature, divergence=divergence)
        want = exact(*inputs, **options)
        if alpha == 1:
            want[2] = want[2] * 0   # no teacher is asked
            inputs = (*inputs[:3], None, None)
        assert off(fused(*inputs, **options), want, floor=1e-3) < 1e-6


@pytest.mark.parametrize("head", [dict(bias=True), dict(scale=0.25), dict(softcap=3.0), dict(bias=True, scale=1.7, softcap=5.0)], ids=str)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_loss_honours_bias_scale_and_softcap(head, divergence):
    options = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    assert off(fused(*case(**head), **options), exact(*case(**head), **options)) < 2e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_loss_does_not_depend_on_the_chunk(divergence):
    inputs = case(n=37, bias=True, softcap=5.0, masked=0)
    options = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    whole = fused(*inputs, **options)
    for chunk in (1, 7, 36, 37, 100):
        assert off(fused(*inputs, **options, chunk=chunk), whole) < 1e-6


def test_loss_in_bf16_is_within_its_rounding():
    for seed, divergence in enumerate(("forward", "reverse", "jsd")):
        inputs = case(n=64, vocab=500, d=64, dt=96, seed=seed, dtype=torch.bfloat16)
        got, want = (f(*inputs, alpha=0.3, temperature=2.0, divergence=divergence) for f in (fused, exact))
        assert off(got, want) < 2e-2
        assert off(got[:3], want[:3]) < 4e-3   # reductions are in fp32


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(divergence, alpha):
    hidden, head, labels, teacher_hidden, teacher_head = case(n=5, vocab=11, d=3, dt=4, bias=True, softcap=4.0, dtype=torch.float64)

    def loss(hidden, weight, bias):
        student_head = types.SimpleNamespace(weight=weight, bias=bias, scale=1.5, softcap=4.0)
        teacher = None if alpha == 1 else (teacher_hidden, teacher_head)
        return sd.distillation_loss(hidden, student_head, labels, teacher, alpha=alpha, temperature=2.0, divergence=divergence, chunk=2)[0]
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_all_masked_is_zero_with_zero_gradients():
    hidden, head, labels, *teacher = case(bias=True)
    for alpha in (0.0, 0.3, 1.0):
        got = fused(hidden, head, torch.full_like(labels, -100), *(teacher if alpha < 1 else (None, None)), alpha=alpha)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_of_ten_thousand_stay_finite(divergence, temperature):
    hidden, head, labels, teacher_hidden, teacher_head = case(masked=0)
    for p in (head.weight, teacher_head.weight):
        p.data.mul_(1e4)
    got = fused(hidden, head, labels, teacher_hidden, teacher_head, alpha=0.3, temperature=temperature, divergence=divergence)
    want = exact(hidden, head, labels, teacher_hidden, teacher_head, alpha=0.3, temperature=temperature, divergence=divergence)
    assert all(x.isfinite().all() for x in got)
    if divergence == "forward":   # reverse and jsd reach log 0 in the reference
        assert off(got, want) < 1e-4


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_kl_is_never_negative(divergence):
    for seed in range(5):   # a teacher that is almost the student: where rounding could take it below zero
        hidden, head, labels, *_ = case(n=200, seed=seed, masked=0)
        for nudge in (0.0, 1e-6, 1e-4, 1e-2):
            near = hidden.detach() + nudge * torch.randn_like(hidden)
            for i in range(0, 200, 20):
                part = slice(i, i + 20)
                assert fused(hidden[part], head, labels[part], near[part], head, alpha=0.0, divergence=divergence, temperature=2.0)[2] > -1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_that_is_the_teacher_has_no_kl_gradient(divergence, temperature):
    hidden, head, labels, *_ = case(bias=True)
    _, _, kl, *grads = fused(hidden, head, labels, hidden.detach(), head, alpha=0.0, temperature=temperature, divergence=divergence)
    assert abs(kl) < 1e-6
    assert all((g == 0).all() for g in grads)


def test_loss_is_divided_by_the_denominator_and_composed_of_its_parts():
    inputs = case()
    options = dict(alpha=0.3, temperature=2.0)
    own, given = fused(*inputs, **options), fused(*inputs, **options, denominator=7.0)
    counted = (inputs[2] != -100).sum()
    assert off(given, [x * counted / 7 for x in own]) < 1e-6
    assert own[0].item() == pytest.approx(0.3 * own[1].item() + 0.7 * own[2].item(), rel=1e-6)


def test_frozen_parts_get_no_gradient_and_change_nothing_else():
    hidden, head, labels, *teacher = case(bias=True)
    whole = fused(hidden, head, labels, *teacher, alpha=0.3)
    head.requires_grad_(False)
    assert off(fused(hidden, head, labels, *teacher, alpha=0.3), whole[:4]) == 0
    head.requires_grad_(True)
    assert off(fused(hidden.detach(), head, labels, *teacher, alpha=0.3), [*whole[:3], *whole[4:]]) == 0


def test_larger_vocabulary_of_either_side_is_cut():
    hidden, head, labels, teacher_hidden, teacher_head = case(masked=0)
    labels = labels % 80
    cut = nn.Linear(24, 80, bias=False)
    cut.weight.data = teacher_head.weight.data[:80]
    cut.scale = cut.softcap = None
    small = nn.Linear(16, 80, bias=False)
    small.weight.data = head.weight.data[:80]
    small.scale = small.softcap = None
    want = exact(hidden, small, labels, teacher_hidden, cut, alpha=0.3, temperature=2.0)
    assert off(fused(hidden, small, labels, teacher_hidden, teacher_head, alpha=0.3, temperature=2.0), want) < 1e-6
    got = fused(hidden, head, labels, teacher_hidden, cut, alpha=0.3, temperature=2.0)
    assert (got[4][80:] == 0).all() and off([*got[:4], got[4][:80]], want) < 1e-6


@pytest.mark.parametrize("k", [1, 8, 97])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_teacher_is_the_dense_one_with_the_rest_as_one_bucket(k, temperature):
    hidden, head, labels, teacher_hidden, teacher_head = case(masked=0)
    alpha = 0.3
    logq = F.log_softmax(apply_head(teacher_hidden, teacher_head) / temperature, -1).detach()
    ids = logq.topk(k).indices
    rest = (1 - logq.gather(-1, ids).exp().sum(-1)).clamp_min(0) if k < 97 else torch.zeros(len(ids))
    pad = lambda x: F.pad(x, (0, 1), value=1.0) if k == 97 else x   # nothing is left for the bucket: 1 log 1 on both sides
    bucket = lambda logp: torch.cat([logp.gather(-1, ids), pad((1 - logp.gather(-1, ids).exp().sum(-1, keepdim=True)).log()[:, :k < 97])], -1)
    z = apply_head(hidden, head)
    b, a = bucket(logq), bucket(F.log_softmax(z / temperature, -1))
    entropy = -(b[:, :k + (k < 97)].exp() * b[:, :k + (k < 97)]).sum(-1)
    ce = F.cross_entropy(z, labels)
    kl = (b.exp() * (b - a))[:, :k + (k < 97)].sum(-1).mean() * temperature ** 2
    want = with_gradients((alpha * ce + (1 - alpha) * kl, ce, kl), hidden, head)
    target = sd.SparseTarget(ids, logq.gather(-1, ids).exp().float(), rest.float(), entropy.float())
    got = with_gradients(sd.distillation_loss(hidden, head, labels, target, alpha=alpha, temperature=temperature), hidden, head)
    assert off(got, want) < 2e-6


@pytest.mark.campaign
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_compiled_loss_matches_float64(divergence, temperature):
    for n in (50, 7):   # of a vocabulary that is large enough for the compiler to be called
        inputs = case(n=n, vocab=20000)
        got, want = (f(*inputs, alpha=0.3, temperature=temperature, divergence=divergence) for f in (fused, exact))
        assert off(got, want) < 2e-6


@pytest.mark.campaign
def test_without_a_compiler_the_loss_says_so_once_and_is_right(tmp_path):
    code = ("import test_simple_distill as t\nfor n in (5, 9):\n    x = t.case(n=n, vocab=20000)\n"
            "    print('off', t.off(t.fused(*x, alpha=0.3), t.exact(*x, alpha=0.3)))")
    env = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and shown.count("no working compiler") == 1, shown
    assert all(float(x) < 2e-6 for x in re.findall(r"^off (\S+)", done.stdout, re.M)) and done.stdout.count("off ") == 2


# ---------------------------------------------------------------------------------------------------------------------
# The command line against an independent reference.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_five_steps_match_plain_pytorch(tmp_path, teacher, student, out, divergence):
    for path in (teacher, student):
        shutil.copytree(path, tmp_path / Path(path).name)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / Path(path).name)
    rows = talk(8)
    distil(out, teacher=tmp_path / "teacher", student=tmp_path / "student", dataset=write_splits(tmp_path / "data", rows, rows[:2]),
           seq_len=256, batch_size=4, gradient_accumulation_steps=2, num_epochs=5, alpha=0.3, temperature=2.0, divergence=divergence,
           max_grad_norm=0.5)

    torch.manual_seed(0)
    ours, theirs, coded = load(student), load(teacher), chatml_rows(rows)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    logged = log(out, "train")
    assert len(logged) == 5
    for entry in logged:
        loss, ce, kl = model_losses(ours, theirs, coded, 0.3, 2.0, divergence)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        assert norm > 0.5   # clipping is at work
        optimizer.step()
        optimizer.zero_grad()
        assert [entry["train/" + k] for k in ("loss", "ce_loss", "kl_loss", "grad_norm")] == pytest.approx(
            [loss.item(), ce.item(), kl.item(), norm.item()], rel=1e-5)
    after = ours.state_dict()
    assert distance(final_weights(out), after) < 1e-5
    moved = {k: after[k] - before[k] for k in before}
    assert distance({k: v - before[k] for k, v in final_weights(out).items()}, moved) < 1e-3   # the movement itself, too
    assert same(weights(tmp_path / "teacher"), weights(teacher))


def test_batch_and_accumulation_are_interchangeable(tmp_path, teacher, student, chat):
    results = []
    for batch_size, micro_steps in ((8, 1), (2, 4), (1, 8)):
        out = str(tmp_path / f"{batch_size}x{micro_steps}")
        distil(out, teacher=teacher, student=student, dataset=chat, seq_len=256, batch_size=batch_size, max_steps=1, max_grad_norm=0,
               gradient_accumulation_steps=micro_steps, alpha=0.3, temperature=2.0)
        results.append((gradients(out), [log(out, "train")[0]["train/" + k] for k in ("loss", "ce_loss", "kl_loss", "grad_norm")]))
    for grads, losses in results[1:]:
        assert losses == pytest.approx(results[0][1], rel=1e-6)
        assert distance(grads, results[0][0]) < 1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_student_that_is_the_teacher_does_not_move(out, teacher, text, divergence):
    distil(out, teacher=teacher, student=teacher, dataset=text, alpha=0.0, temperature=2.0, max_steps=3, divergence=divergence)
    assert all(abs(kl) < 1e-6 for kl in column(out, "train/kl_loss"))
    assert same(final_weights(out), weights(teacher))


def test_longer_prompts_change_nothing_but_the_context(tmp_path, student):
    """In a model whose attention adds nothing a token sees only itself: then only counted tokens can make a difference."""
    path = tiny_model(tmp_path / "blind", tokenizer=tiny_tokenizer(CHATML))
    edit_weights(path, lambda w: [w[k].zero_() for k in w if "o_proj" in k])
    grads, losses = [], []
    for name, prompt in (("short", "a"), ("long", prose(30))):
        rows = [{**row, "prompt": prompt} for row in talk(8)]
        out = str(tmp_path / name)
        distil(out, student=path, teacher=tiny_model(tmp_path / f"{name}-teacher", seed=5), alpha=1.0, batch_size=8, max_steps=1, seq_len=400,
               dataset=write_splits(tmp_path / f"{name}-data", rows, rows[:2]), max_grad_norm=0)
        losses.append(column(out, "train/loss"))
        grads.append({k: v for k, v in gradients(out).items() if "o_proj" not in k})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert distance(*grads) < 1e-6


def test_the_label_is_the_next_token(tmp_path, out):
    """A model that knows a -> b -> ... -> h -> end -> a by heart has no loss left, unless the shift is missing or doubled."""
    path = tiny_model(tmp_path / "abc", hidden=264, layers=1)
    order = tiny_tokenizer().encode("abcdefgh<|endoftext|>")

    def by_heart(w):
        for k in w:
            w[k].zero_() if "norm" not in k else w[k].fill_(1)
        for now, following in zip(order, order[1:] + order[:1]):
            w["model.embed_tokens.weight"][now, now] = 1
            w["lm_head.weight"][following, now] = 2
    edit_weights(path, by_heart)
    distil(out, student=path, dataset=write_jsonl(tmp_path / "d.jsonl", [{"text": "abcdefgh"}] * 40), alpha=1.0, max_steps=1, learning_rate=STILL)
    assert column(out, "train/ce_loss")[0] < 1e-6 and column(out, "eval/ce_loss")[0] < 1e-6


def test_collate_shifts_before_it_masks():
    rows = [{"input_ids": [5, 6, 7, 8], "targets": [False, False, True, True]}, {"input_ids": [9, 10], "targets": None}]
    for pad_to in (1, 16):
        batch = sd.collate(rows, pad_to)
        width = batch.input_ids.shape[1]
        assert batch.positions.tolist() == [1, 2, width] and batch.labels.tolist() == [7, 8, 10]


def test_alpha_1_never_touches_the_teacher(out, student, text):
    for teacher in ("/nowhere/teacher", None):
        distil(out, teacher=teacher, student=student, dataset=text, alpha=1.0, max_steps=2, resume="never")
        assert column(out, "train/kl_loss") == [0, 0] and column(out, "train/loss") == column(out, "train/ce_loss")
        assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]   # nothing of the demo either


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies.
# ---------------------------------------------------------------------------------------------------------------------


def padded(path, source, rows):
    """The same model with more vocabulary rows, and loud ones: unless they are cut, they take all of the probability."""
    model = load(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table.data[-rows:] = 50 * torch.randn(rows, table.shape[1])
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_padded_vocabulary_trains_as_the_unpadded_one(tmp_path, teacher, student, text, who):
    pair = dict(teacher=teacher, student=student)
    fields = dict(dataset=text, alpha=0.3, temperature=2.0, max_steps=3)
    distil(tmp_path / "even", **pair, **fields)
    pair[who] = padded(tmp_path / "padded", pair[who], 128)
    distil(tmp_path / "odd", **pair, **fields)
    for key in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/loss"):
        assert column(tmp_path / "odd", key) == pytest.approx(column(tmp_path / "even", key), rel=1e-6)
    even, odd = final_weights(tmp_path / "even"), final_weights(tmp_path / "odd")
    assert distance({k: v[:len(even[k])] for k, v in odd.items()}, even) < 1e-6


def test_another_tokenizer_of_equal_size_is_refused(tmp_path, out, teacher, text):
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(roll=1))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    err = distil(out, rc=2, teacher=teacher, student=other, dataset=text, max_steps=1).err
    assert f"token {len(SPECIAL)} " in err and repr(letters[0]) in err and repr(letters[1]) in err
    assert not os.path.exists(out)


def test_same_tokens_but_other_merges_are_refused(tmp_path, out, text):
    one, two = (tiny_tokenizer(merges=merges) for merges in (("t u", "u r"), ("u r", "t u")))
    assert one.get_vocab() == two.get_vocab()
    pair = dict(teacher=tiny_model(tmp_path / "t", vocab=len(one), tokenizer=one), student=tiny_model(tmp_path / "s", vocab=len(two), tokenizer=two))
    distil(out, rc=2, **pair, dataset=text, max_steps=1)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path, out, text):
    distil(out, rc=2, student=tiny_model(tmp_path / "s", vocab=200), dataset=text, alpha=1.0, max_steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations: what exactly is a target.
# ---------------------------------------------------------------------------------------------------------------------


def target_runs(row, tokenizer):
    """Each contiguous run of targets as text."""
    marked = zip(row["input_ids"], [True] * len(row["input_ids"]) if row["targets"] is None else row["targets"])
    return [tokenizer.decode([int(i) for i, _ in run]) for keep, run in itertools.groupby(marked, key=lambda x: bool(x[1])) if keep]


def encode(rows, tokenizer, seq_len=512):
    return list(sd.encode(rows, tokenizer, "text", seq_len, []))


TWO_TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello there"},
             {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4.\nTruly."}]
MARKED = CHATML.replace("{{ m['content'] }}<|im_end|>", "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
                        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}[INST] {{ m['content'] }} "
           "[/INST]{% endif %}{% endfor %}")
THINKING = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last %}{{ m['content'] }}{% else %}"
            "{{ m['content'].split('</think>')[-1].strip() }}{% endif %}<|im_end|>\n{% endfor %}")
NO_END = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"


@pytest.mark.parametrize("template, want", [
    (CHATML, ["hello there<|im_end|>", "It is 4.\nTruly.<|im_end|>"]),
    (LLAMA3, ["hello there<|eot_id|>", "It is 4.\nTruly.<|eot_id|>"]),
    (MARKED, ["hello there<|im_end|>", "It is 4.\nTruly.<|im_end|>"]),
    (MISTRAL, ["hello there<|endoftext|>", "It is 4.\nTruly.<|endoftext|>"]),
    (NO_END, ["hello there", "It is 4.\nTruly."]),
    (None, ["hello there<|endoftext|>", "It is 4.\nTruly.<|endoftext|>"]),
], ids="chatml llama3 marked mistral no_end none".split())
@pytest.mark.parametrize("bos", [False, True])
def test_only_the_assistants_tokens_and_their_end_mark_are_targets(template, want, bos):
    tokenizer = tiny_tokenizer(template, bos=bos)
    row, = encode([{"messages": TWO_TURNS}], tokenizer)
    assert target_runs(row, tokenizer) == want
    if template:   # and the ids are those that the template makes, with no second <|begin|>
        assert row["input_ids"] == tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)


@pytest.mark.parametrize("said, shown", [("  spaced out \n", "spaced out"), ("x", "x"), ("<|im", "<|im"), ("user", "user"), ("é日本🙂", "é日本🙂"),
                                         ("<|eot_id|>", "<|eot_id|>"), ("assistant", "assistant")])
def test_odd_answers_are_found_exactly(said, shown):
    tokenizer = tiny_tokenizer(LLAMA3)
    row, = encode([{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}] * 2}], tokenizer)
    if shown in SPECIAL:   # an answer that is itself an end mark: nothing can tell them apart, nothing else may be counted
        shown = ""
        assert all(set(run) <= set("<|eot_id|>") for run in target_runs(row, tokenizer))
    else:
        assert target_runs(row, tokenizer) == [shown + "<|eot_id|>"] * 2


def test_templates_that_rewrite_earlier_turns():
    tokenizer = tiny_tokenizer(THINKING)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>hm</think>b"},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>so</think>d"}]
    row, = encode([{"messages": turns}], tokenizer)
    assert target_runs(row, tokenizer) == ["b<|im_end|>", "<think>so</think>d<|im_end|>"]


# ---------------------------------------------------------------------------------------------------------------------
# Data: formats, splits, streams.
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(dataset, tokenizer=None, **fields):
    """What load_data hands on, as lists: (train rows, held-out rows)."""
    cfg = config.Config(**{"dataset": str(dataset), "teacher": "t", "student": "s", "seq_len": 64, **fields})
    with contextlib.redirect_stdout(io.StringIO()), sd.process_group():
        return tuple([dict(row) for row in rows] for rows in sd.load_data(cfg, tokenizer or tiny_tokenizer()))


def ids_of(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


def decoded(rows):
    return [tiny_tokenizer().decode(ids) for ids in ids_of(rows)]


STYLES = {
    "messages": {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
    "response": {"prompt": "why?", "response": "so"},
    "completion": {"prompt": "why?", "completion": "so"},
    "answer": {"question": "why?", "answer": "so"},
    "output": {"instruction": "why?", "output": "so"},
    "empty_input": {"instruction": "why?", "input": "", "output": "so"},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversation_columns(tmp_path, style, suffix):
    rows, path, tokenizer = [STYLES[style]] * 4, str(tmp_path / f"d.{suffix}"), tiny_tokenizer(CHATML)
    write_jsonl(path, rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    for row in sum(rows_of(path, tokenizer), []):
        assert target_runs(row, tokenizer) == ["so<|im_end|>"]
        assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\nwhy?<|im_end|>")


def test_instruction_with_input_shows_both(tmp_path):
    tokenizer = tiny_tokenizer(CHATML)
    row, = encode([{"instruction": "add", "input": "1 and 2", "output": "3"}], tokenizer)
    shown = tokenizer.decode(row["input_ids"])
    assert shown.index("add") < shown.index("1 and 2") < shown.index("assistant") and target_runs(row, tokenizer) == ["3<|im_end|>"]


def test_one_conversation_a_row_cut_to_seq_len_and_dropped_without_targets(tmp_path, out, student):
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in ((2, 10), (3, 10), (4, 100), (16, 10), (500, 10))]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    train, _ = rows_of(path, seq_len=16)
    assert [len(row["input_ids"]) for row in train] == [14, 15, 16] and [sum(row["targets"]) for row in train] == [11, 11, 11]
    shown = distil(out, student=student, dataset=path, alpha=1.0, max_steps=1, seq_len=16)
    assert "dropped 2 of 5" in shown.out + shown.err


def test_text_is_joined_with_eos_and_cut_into_blocks(tmp_path):
    docs = [prose(5 + i, i) for i in range(6)]
    train, held = rows_of(write_splits(tmp_path / "d", [{"text": t} for t in docs], [{"text": "held out text here"}]), seq_len=16)
    stream = tiny_tokenizer().encode("".join(t + "<|endoftext|>" for t in docs))
    want = [stream[i:i + 16] for i in range(0, len(stream), 16)]
    assert ids_of(train) == want and all(row["targets"] is None or all(row["targets"]) for row in train)
    assert decoded(held)[0] == "held out text he"


def test_every_local_format_gives_the_same_rows(tmp_path):
    docs = [prose(6 + i, i) + "\n" + prose(3, i) for i in range(25)]
    table = datasets.Dataset.from_dict({"text": docs, "other": list(range(25))})
    place = lambda name: str(tmp_path / name)
    write_jsonl(place("d.jsonl"), [{"text": t} for t in docs])
    Path(place("d.json")).write_text(json.dumps([{"text": t} for t in docs]))
    table.to_csv(place("d.csv"))
    table.to_parquet(place("d.parquet"))
    Path(place("d.txt")).write_text("\n\n".join(docs))
    table.save_to_disk(place("saved"))
    datasets.DatasetDict(train=table).save_to_disk(place("saved_dict"))
    want = [ids_of(rows) for rows in rows_of(place("d.jsonl"))]
    assert len(want[0]) > 20 and len(want[1]) >= 1
    for name in ("d.json", "d.csv", "d.parquet", "d.txt", "saved", "saved_dict"):
        assert [ids_of(rows) for rows in rows_of(place(name))] == want, name


def test_tokenising_in_several_processes_gives_the_same_rows(tmp_path, student, chat):
    """In a process of its own: forking with threads about, a deadlock would take the other tests along."""
    fields = dict(student=student, dataset=chat, alpha=1.0, batch_size=8, max_steps=1, seq_len=256)
    distil(tmp_path / "one", **fields)
    process = spawn(*flags(**PLAIN | fields, output_dir=tmp_path / "two", num_proc=2))
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert column(tmp_path / "two", "train/loss") == pytest.approx(column(tmp_path / "one", "train/loss"), rel=1e-6)


def test_tokenised_rows_are_kept_for_the_next_run(tmp_path):
    kept = lambda: set(Path(os.environ["HF_DATASETS_CACHE"]).glob("generator/*"))
    path, before = write_jsonl(tmp_path / "d.jsonl", [{"text": prose(20, i)} for i in range(30)]), kept()
    first, after_one = rows_of(path), kept()
    assert ids_of(rows_of(path)[0]) == ids_of(first[0]) and kept() == after_one != before
    assert ids_of(rows_of(path, seq_len=32)[0]) != ids_of(first[0]) and kept() != after_one


def test_formats_run_through_the_command_line(tmp_path, student, text):
    table = datasets.load_dataset("json", data_files=text, split="train")
    table.to_parquet(str(tmp_path / "d.parquet"))
    results = []
    for name in (text, str(tmp_path / "d.parquet")):
        distil(tmp_path / str(len(results)), student=student, dataset=name, alpha=1.0, max_steps=2)
        results.append(final_weights(tmp_path / str(len(results))))
    assert same(*results)


def test_text_column_and_unknown_columns(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"body": prose(20, i), "id": i} for i in range(10)])
    err = distil(out, rc=2, student=student, dataset=path, alpha=1.0, max_steps=1).err
    assert "'text'" in err and "body" in err and "id" in err
    distil(out, student=student, dataset=path, alpha=1.0, max_steps=1, text_column="body")


def test_held_out_rows_are_never_trained_on(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": f"answer {i:03d}"} for i in range(100)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    train, held = (decoded(x) for x in rows_of(path))
    assert held and not set(train) & set(held) and len(set(train) | set(held)) == len(train) + len(held) == 100
    assert (train, held) == tuple(decoded(x) for x in rows_of(path))
    assert len(rows_of(path, eval_samples=2)[1]) <= 2


def test_text_that_is_held_out_is_in_no_block_of_train(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    train, held = ("".join(decoded(x)) for x in rows_of(path))
    numbers = lambda s: set(re.findall(r"<(\d{3})>", s))
    assert numbers(held) and not numbers(train) & numbers(held)


def test_eval_split_is_used_where_there_is_one(tmp_path, out, student, chat):
    train, held = rows_of(chat, seq_len=256)
    assert (len(train), len(held)) == (8, 4)
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(talk(5)), other=datasets.Dataset.from_list(talk(3)))
    both.save_to_disk(str(tmp_path / "saved"))
    assert [len(x) for x in rows_of(tmp_path / "saved", eval_split="other", seq_len=256)] == [5, 3]
    assert [len(x) for x in rows_of(tmp_path / "saved", train_split="other", eval_split="train", seq_len=256)] == [3, 5]
    err = distil(out, rc=2, student=student, dataset=tmp_path / "saved", eval_split="absent", alpha=1.0, max_steps=1).err
    assert "absent" in err
    assert "absent" in distil(out, rc=2, student=student, dataset=tmp_path / "saved", train_split="absent", alpha=1.0, max_steps=1).err


def test_max_samples_takes_the_first_rows(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": "a"} for i in range(40)]
    train, held = rows_of(write_splits(tmp_path / "d", rows, rows[:1]), max_samples=7)
    assert [re.search(r"\d+", x)[0] for x in decoded(train)] == [f"{i:03d}" for i in range(7)]


def test_one_long_document_keeps_its_end_for_evaluation(tmp_path):
    (tmp_path / "d.txt").write_text(prose(2000))
    train, held = (decoded(x) for x in rows_of(tmp_path / "d.txt"))
    assert len(held) >= 1 and "".join(train + held) == prose(2000) + "<|endoftext|>"


@pytest.mark.parametrize("shuffle_buffer", [0, 3])
def test_a_stream_trains_on_the_same_rows(tmp_path, teacher, student, chat, shuffle_buffer):
    """Three passes over eight rows, eight a step: in whatever order they come, each step is all of them."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=256, batch_size=8, max_steps=3, alpha=0.3)
    distil(tmp_path / "table", **fields)
    distil(tmp_path / "stream", **fields, streaming=True, shuffle_buffer=shuffle_buffer)
    assert column(tmp_path / "stream", "train/loss") == pytest.approx(column(tmp_path / "table", "train/loss"), rel=1e-6)
    assert column(tmp_path / "stream", "eval/loss") == pytest.approx(column(tmp_path / "table", "eval/loss"), rel=1e-6)
    assert distance(final_weights(tmp_path / "stream"), final_weights(tmp_path / "table")) < 1e-5


def test_a_stream_holds_rows_out_and_needs_max_steps(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    err = distil(out, rc=2, student=student, dataset=path, alpha=1.0, streaming=True).err
    assert "max_steps" in err
    train, held = rows_of(path, streaming=True, eval_samples=10)
    seen = {re.search(r"<(\d{3})>", row["text"])[1] for row in train}
    numbers = set(re.findall(r"<(\d{3})>", "".join(decoded(held))))
    assert numbers and seen and not seen & numbers
    distil(out, student=student, dataset=path, alpha=1.0, streaming=True, eval_samples=10, max_steps=2)


def test_stream_of_text_is_the_same_blocks(tmp_path, student):
    """Unshuffled, the sequences of a stream are those of the table, also across the windows it is read in."""
    docs = [{"text": prose(5 + i % 7, i)} for i in range(30)]
    path = write_splits(tmp_path / "d", docs, docs[:1])
    for name, fields in (("a", {}), ("b", dict(streaming=True, shuffle_buffer=0, max_steps=1))):
        size = len(rows_of(path, seq_len=32)[0])
        distil(tmp_path / name, student=student, dataset=path, alpha=1.0, batch_size=size, **{"max_steps": 1, **fields}, learning_rate=STILL)
    assert column(tmp_path / "a", "train/loss") == pytest.approx(column(tmp_path / "b", "train/loss"), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Models: architectures, heads, layers:N, configs.
# ---------------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama": dict(cls="LlamaConfig"),
    "llama_tied": dict(cls="LlamaConfig", tie_word_embeddings=True),
    "qwen2": dict(cls="Qwen2Config"),
    "qwen3": dict(cls="Qwen3Config", head_dim=16),
    "qwen3_moe": dict(cls="Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gpt2": dict(cls="GPT2Config", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": dict(cls="GPTNeoXConfig"),
    "gemma2": dict(cls="Gemma2Config", head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "cohere": dict(cls="CohereConfig", logit_scale=0.3),
    "granite": dict(cls="GraniteConfig", logits_scaling=3.0),
    "phi": dict(cls="PhiConfig", tie_word_embeddings=False),   # a head with a bias
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_n_of_every_architecture_with_its_own_head(tmp_path, out, chat, name):
    """layers:3 of 5 keeps 0, 2, 4 with their weights; its losses are those of the model's own logits."""
    path = tiny_model(tmp_path / "teacher", layers=5, seed=3, tokenizer=tiny_tokenizer(CHATML), **MODELS[name])
    if name == "phi":
        edit_weights(path, lambda w: w["lm_head.bias"].normal_(generator=torch.Generator().manual_seed(0)))
    distil(out, teacher=path, student="layers:3", dataset=chat, seq_len=256, batch_size=8, max_steps=1, alpha=0.3, temperature=2.0, learning_rate=STILL)

    kept = lambda k: (m := re.search(r"\.(?:layers|h)\.(\d+)\.", k)) is None or (int(m[1]) % 2 == 0)
    rename = lambda k: re.sub(r"\.(layers|h)\.(\d+)\.", lambda m: f".{m[1]}.{int(m[2]) // 2}.", k)
    want = {rename(k): v for k, v in weights(path).items() if kept(k)}
    got = final_weights(out)
    assert got.keys() == want.keys() and all(torch.allclose(got[k], want[k], rtol=0, atol=1e-20) for k in want)

    thin, whole = load(f"{out}/final"), load(path)
    assert thin.config.num_hidden_layers == 3
    if getattr(whole.config, "layer_types", None):
        assert thin.config.layer_types == whole.config.layer_types[::2]
    losses = model_losses(thin.eval(), whole.eval(), chatml_rows(talk(8)), 0.3, 2.0)
    assert [log(out)[0]["train/" + k] for k in ("loss", "ce_loss", "kl_loss")] == pytest.approx([x.item() for x in losses], rel=1e-5)
    assert losses[2] > 1e-3


def test_layers_n_without_a_teacher_in_the_loss(tmp_path, out, text):
    path = tiny_model(tmp_path / "teacher", layers=4)
    distil(out, teacher=path, student="layers:2", dataset=text, alpha=1.0, max_steps=1)
    assert load(f"{out}/final").config.num_hidden_layers == 2
    for wrong in ("layers:0", "layers:5", "layers:x", "layers:"):
        distil(tmp_path / "no", rc=2, teacher=path, student=wrong, dataset=text, max_steps=1)


@pytest.mark.parametrize("special", [dict(mlp_only_layers=[4]), dict(decoder_sparse_step=2)], ids=str)
def test_layers_n_of_a_mixture_with_some_dense_layers(tmp_path, out, text, special):
    path = tiny_model(tmp_path / "teacher", layers=5, **MODELS["qwen3_moe"], **special)
    done = sd.main(words_of(flags(**PLAIN, output_dir=out, teacher=path, student="layers:3", dataset=text, max_steps=1)))
    assert done in (0, 2)   # thinned rightly, or refused: never a traceback


def test_student_from_a_config_file_starts_random_by_seed(tmp_path, teacher, text):
    shape = str(tmp_path / "shape.json")
    tiny_config(hidden=16, layers=1).to_json_file(shape)
    got = []
    for i, seed in enumerate((1, 1, 2)):
        distil(tmp_path / str(i), teacher=teacher, student=shape, dataset=text, max_steps=1, seed=seed, learning_rate=STILL)
        got.append(final_weights(tmp_path / str(i)))
    assert same(got[0], got[1]) and not same(got[0], got[2])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "0" / "final").get_vocab() == tiny_tokenizer().get_vocab()   # the teacher's
    distil(tmp_path / "own", student=shape, tokenizer=teacher, dataset=text, alpha=1.0, max_steps=1)


def test_a_head_that_the_loss_would_not_reproduce_is_refused(tmp_path, out, text):
    """A model with code of its own that scales its logits in a way nobody knows: its distribution is not the loss's."""
    path = tiny_model(tmp_path / "odd")
    Path(path, "modeling_odd.py").write_text(
        "import transformers\n\n\nclass Odd(transformers.LlamaForCausalLM):\n    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n        out.logits = out.logits * 1.02\n        return out\n")
    shape = json.loads(Path(path, "config.json").read_text())
    Path(path, "config.json").write_text(json.dumps({**shape, "auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}}))
    err = distil(out, rc=2, student=path, dataset=text, alpha=1.0, max_steps=1, trust_remote_code=True).err
    assert "Odd" in err and "head" in err


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_missing_models_are_one_line(out, teacher, student, text, role):
    for name in ("/nowhere/model", "nobody/no-such-model", "/nowhere/shape.json"):
        err = distil(out, rc=2, **{**dict(teacher=teacher, student=student), role: name}, dataset=text, max_steps=1).err
        assert name in err and len(err.strip().splitlines()) <= 2
        assert not os.path.exists(out)


def test_final_loads_with_the_auto_classes_and_generates(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2)
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/final"), transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    ids = model.generate(**tokenizer("one two", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[1] == len("one two") + 4 and tokenizer("one two")["input_ids"] == tiny_tokenizer()("one two")["input_ids"]
    assert not same(final_weights(out), weights(student))


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser, schedule, precision.
# ---------------------------------------------------------------------------------------------------------------------


def test_lr_multipliers_freeze_scale_and_say_so(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=1, learning_rate=1e-3,
                   lr_multipliers=["embed=0", r"layers\.0\..*proj=0.5", r"layers=3"], default_lr_multiplier=2).out
    before, after = weights(student), final_weights(out)
    moved = {k: (after[k] - before[k]).abs().max().item() for k in before}
    for name, change in moved.items():   # AdamW's first step is the learning rate, in the direction of the sign
        rate = 0 if "embed" in name else 0.5 if re.search(r"layers\.0\..*proj", name) else 3 if "layers" in name else 2
        assert change == 0 if rate == 0 else change == pytest.approx(rate * 1e-3, rel=0.02), name
    state = [k for k in checkpoint(out, 1) if "exp_avg" in k]
    assert state and not any("embed" in k for k in state)
    for rate, part in ((0.5, r"layers\.0\..*proj"), (3, r"layers\.(1|0.*norm)"), (2, r"^(?!.*(embed|layers))")):
        size = sum(v.numel() for k, v in before.items() if re.search(part, k))
        assert re.search(rf"{size:,}\D+{rate * 1e-3:g}\b", shown), (size, rate)
    assert re.search(rf"{before['model.embed_tokens.weight'].numel():,} frozen", shown)


def test_a_pattern_that_matches_nothing_is_named(out, student, text):
    err = distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, lr_multipliers=["embed=0.5", "no_such_layer=0"]).err
    assert "no_such_layer" in err and not os.path.exists(out)
    for wrong in ("embed", "embed=x", "embed=-1", "(=1"):
        assert wrong.partition("=")[0] in distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, lr_multipliers=[wrong]).err
    distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, default_lr_multiplier=0)


def test_norms_and_biases_do_not_decay(tmp_path, text):
    path = tiny_model(tmp_path / "gpt2", **MODELS["gpt2"])
    distil(tmp_path / "a", student=path, teacher=path, dataset=text, alpha=0.0, max_steps=1, weight_decay=0.5, learning_rate=0.1)
    before, after = weights(path), final_weights(tmp_path / "a")   # no gradient: all that moves is decay
    for name in before:
        want = before[name] * (1 - 0.1 * 0.5) if before[name].ndim >= 2 else before[name]
        assert torch.allclose(after[name], want, rtol=1e-6, atol=1e-9), name


def test_epochs_steps_and_schedule_agree(tmp_path, student):
    """10 rows, 4 a step: 3 steps a pass, the last one ragged; two passes are six steps, however they are asked for."""
    data = write_splits(tmp_path / "d", talk(10), talk(2))
    fields = dict(student=student, dataset=data, seq_len=256, alpha=1.0, lr_scheduler="cosine", warmup_ratio=0.34)
    variants = [dict(num_epochs=2, batch_size=4), dict(max_steps=6, batch_size=4), dict(num_epochs=2, batch_size=2, gradient_accumulation_steps=2)]
    for i, variant in enumerate(variants):
        distil(tmp_path / str(i), **fields, **variant)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-3)
    scheduler, rates = transformers.get_scheduler("cosine", optimizer, 2, 6), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for i in range(3):
        assert column(tmp_path / str(i), "train/learning_rate") == pytest.approx(rates)
        assert column(tmp_path / str(i), "train/epoch") == pytest.approx([k / 3 for k in range(1, 7)])
    assert same(final_weights(tmp_path / "0"), final_weights(tmp_path / "1"))
    # the third has a micro-batch without any row in each ragged step
    assert column(tmp_path / "2", "train/loss") == pytest.approx(column(tmp_path / "0", "train/loss"), rel=1e-6)
    assert distance(final_weights(tmp_path / "2"), final_weights(tmp_path / "0")) < 1e-5


@pytest.mark.parametrize("num_epochs, steps", [(0.1, 1), (1, 3), (1.5, 5)])
def test_part_of_an_epoch(tmp_path, out, student, num_epochs, steps):
    distil(out, student=student, dataset=write_splits(tmp_path / "d", talk(10), talk(2)), seq_len=256, alpha=1.0, batch_size=4, num_epochs=num_epochs)
    assert column(out, "train/step") == list(range(1, steps + 1))


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(tmp_path, out, student):
    """Rows of equal length and a student that stands still: the mean of the steps, weighted by rows, is the mean of the rows."""
    rows = [{"prompt": prose(2, i), "response": f"{prose(9, i):.9}"} for i in range(10)]
    distil(out, student=student, dataset=write_splits(tmp_path / "d", rows, rows), seq_len=256, alpha=1.0, batch_size=4, num_epochs=2, learning_rate=STILL)
    losses = column(out, "train/loss")
    for epoch in (losses[:3], losses[3:]):
        assert (4 * epoch[0] + 4 * epoch[1] + 2 * epoch[2]) / 10 == pytest.approx(column(out, "eval/loss")[-1], rel=1e-6)
    assert losses[:3] != losses[3:]


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
                                  "warmup_stable_decay", "cosine_with_min_lr"])
def test_schedulers(out, student, text, name):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=3, lr_scheduler=name, warmup_ratio=0.4,
           lr_scheduler_kwargs='{"min_lr": 1e-5}' if "min" in name else None)
    assert all(0 <= rate <= 1e-3 for rate in column(out, "train/learning_rate"))


def test_seed_decides(tmp_path, student, text):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distil(tmp_path / name, student=student, dataset=text, alpha=1.0, max_steps=2, seed=seed)
    assert same(final_weights(tmp_path / "a"), final_weights(tmp_path / "b")) and not same(final_weights(tmp_path / "a"), final_weights(tmp_path / "c"))


def test_gradient_checkpointing_changes_nothing(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=3, gradient_checkpointing=on)
    assert distance(final_weights(tmp_path / "on"), final_weights(tmp_path / "off")) < 1e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_stays_close_and_keeps_fp32_masters(tmp_path, teacher, student, text, dtype):
    for name in ("fp32", dtype):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=3, dtype=name)
    assert column(tmp_path / dtype, "train/loss") == pytest.approx(column(tmp_path / "fp32", "train/loss"), rel=2e-2)
    assert column(tmp_path / dtype, "train/grad_norm") == pytest.approx(column(tmp_path / "fp32", "train/grad_norm"), rel=5e-2)
    assert column(tmp_path / dtype, "train/skipped_steps") == [0, 0, 0]
    tensors = checkpoint(tmp_path / dtype, 3)
    assert all(v.dtype == torch.float32 for k, v in tensors.items() if "weight" in k)
    assert distance({k: v.float() for k, v in final_weights(tmp_path / dtype).items()}, final_weights(tmp_path / "fp32")) < 2e-2


@pytest.mark.campaign
def test_compile_changes_nothing_but_rounding(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=2, compile=on)
    assert column(tmp_path / "on", "train/loss") == pytest.approx(column(tmp_path / "off", "train/loss"), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite, and what is not there.
# ---------------------------------------------------------------------------------------------------------------------


def break_letter(source, path):
    """A copy of a model in which the letter Z, and only it, makes everything infinite."""
    shutil.copytree(source, path)
    edit_weights(path, lambda w: w["model.embed_tokens.weight"][tiny_tokenizer().encode("Z")[0]].fill_(math.inf))
    return str(path)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_ten_steps_that_are_not_finite_stop_the_run_with_a_checkpoint(tmp_path, out, teacher, student, role):
    pair = dict(teacher=teacher, student=student)
    pair[role] = break_letter(pair[role], tmp_path / "broken")
    rows = [{"prompt": "a" if i < 3 else "Z", "response": prose(3, i)} for i in range(40)]
    err = distil(out, rc=2, **pair, dataset=write_splits(tmp_path / "d", rows, rows[:2]), seq_len=64, batch_size=1, max_steps=40).err
    assert "finite" in err
    skipped, last = column(out, "train/skipped_steps"), max(column(out, "train/step"))
    assert skipped == sorted(skipped) and 9 <= skipped[-1] <= 13 and not os.path.exists(f"{out}/final")
    saved, = os.listdir(f"{out}/checkpoints")
    assert last <= int(saved[-8:]) <= last + 1
    moments = [v for k, v in checkpoint(out, int(saved[-8:])).items() if "exp_avg" in k]
    assert moments and all(v.isfinite().all() for v in moments)   # of the last good step


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_row_that_breaks_the_loss_skips_its_step_only(tmp_path, out, teacher, student, role):
    pair = dict(teacher=teacher, student=student)
    pair[role] = break_letter(pair[role], tmp_path / "broken")
    rows = [{"prompt": "Z" if i % 4 == 0 else "a", "response": prose(3, i)} for i in range(12)]
    distil(out, **pair, dataset=write_splits(tmp_path / "d", rows, rows[1:3]), seq_len=64, batch_size=1, num_epochs=1, weight_decay=0.1)
    assert column(out, "train/skipped_steps")[-1] == 3
    assert sum(math.isfinite(x) for x in column(out, "train/loss")) == 9
    before, after = weights(pair["student"]), final_weights(out)
    assert not same(before, after) and all(after[k].isfinite().all() for k in after if "embed" not in k)


def test_a_model_that_is_broken_throughout_is_called_that(tmp_path, out, teacher, student, text):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    edit_weights(broken, lambda w: w["model.norm.weight"][0].fill_(math.inf))
    err = distil(out, rc=2, teacher=broken, student=student, dataset=text, max_steps=20).err
    assert "finite" in err.lower()   # not: a head that nobody knows


def test_a_batch_without_any_target_changes_nothing_and_is_reported(tmp_path, monkeypatch, student, text):
    """The trainer makes no such batch by itself: one is made here by taking the targets of the second step away."""
    fields, real = dict(student=student, dataset=text, alpha=1.0, batch_size=4, weight_decay=0.1), sd.micro_batches
    distil(tmp_path / "one", **fields, max_steps=1)

    def second_is_blank(*args):
        for step, (micro, position) in enumerate(real(*args)):
            for batch in micro if step == 1 else []:
                batch.positions, batch.labels = batch.positions[:0], batch.labels[:0]
            yield micro, position
    monkeypatch.setattr(sd, "micro_batches", second_is_blank)
    shown = distil(tmp_path / "two", **fields, max_steps=2)
    assert same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"))
    assert "step 2" in shown.out + shown.err and all(math.isfinite(v) for v in log(tmp_path / "two", "train")[1].values())


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind: log, config, checkpoints.
# ---------------------------------------------------------------------------------------------------------------------

TRAIN_KEYS = {"train/" + k for k in "loss ce_loss kl_loss learning_rate grad_norm epoch step tokens_per_second skipped_steps".split()}
EVAL_KEYS = {"eval/" + k for k in "loss ce_loss kl_loss perplexity min_loss epoch step".split()}


def test_log_has_exactly_the_keys_of_the_contract(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=5, log_steps=2, eval_steps=2, alpha=0.3, learning_rate=0.3)
    assert all(entry.keys() in (TRAIN_KEYS, EVAL_KEYS) for entry in log(out))
    assert column(out, "train/step") == column(out, "eval/step") == [2, 4, 5]
    for entry in log(out, "train"):
        assert entry["train/loss"] == pytest.approx(0.3 * entry["train/ce_loss"] + 0.7 * entry["train/kl_loss"], rel=1e-6)
        assert entry["train/tokens_per_second"] > 0 and entry["train/grad_norm"] > 0
    lowest = math.inf
    for entry in log(out, "eval"):
        lowest = min(lowest, entry["eval/loss"])
        assert entry["eval/min_loss"] == lowest and entry["eval/perplexity"] == pytest.approx(math.exp(entry["eval/ce_loss"]))


def test_evaluation_is_the_mean_over_held_out_tokens(out, tmp_path, teacher, student):
    rows = talk(7)
    for path in (teacher, student):
        shutil.copytree(path, tmp_path / Path(path).name)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / Path(path).name)
    distil(out, teacher=tmp_path / "teacher", student=tmp_path / "student", dataset=write_splits(tmp_path / "d", talk(3), rows), seq_len=256,
           batch_size=3, max_steps=1, alpha=0.3, temperature=2.0, learning_rate=STILL)
    want = model_losses(load(student), load(teacher), chatml_rows(rows), 0.3, 2.0)
    assert [log(out, "eval")[-1]["eval/" + k] for k in ("loss", "ce_loss", "kl_loss")] == pytest.approx([x.item() for x in want], rel=1e-5)


def test_closing_table_and_sample(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=2).out
    sizes = [f"{sum(v.numel() for v in weights(path).values()):,}" for path in (teacher, student)]
    for who, size in (("teacher", sizes[0]), ("student before", sizes[1]), ("student after", sizes[1])):
        assert re.search(rf"^{who}\s.*\d.*{size}", shown, re.M), shown
    assert f"{column(out, 'eval/perplexity')[-1]:.2f}" in shown and "sample" in shown


def test_config_json_repeats_the_run(tmp_path, out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=3, alpha=0.3, lr_multipliers=["embed=0.5", "norm=0"], seed=3,
           lr_scheduler="cosine", weight_decay=0.1, eval_steps=1)
    again = str(tmp_path / "again")
    cli("--config", f"{out}/config.json", "--output_dir", again)
    assert same(final_weights(out), final_weights(again))
    first, second = (json.loads(Path(p, "config.json").read_text()) for p in (out, again))
    assert first.keys() == second.keys() == config.FIELDS.keys()
    assert {k for k in first if first[k] != second[k]} == {"output_dir"}
    timeless = lambda entries: [{k: v for k, v in e.items() if k != "train/tokens_per_second"} for e in entries]
    assert timeless(log(out)) == timeless(log(again))
    assert "finished" in cli("--config", f"{out}/config.json").out   # as it stands, it is done


def test_command_line_wins_over_the_file(tmp_path, out, student, text):
    (tmp_path / "run.yaml").write_text(f"student: {student}\ndataset: {text}\nalpha: 1.0\nmax_steps: 7\nlearning_rate: 2e-4\nlr_multipliers: [embed=0]\n")
    cli("--config", tmp_path / "run.yaml", *flags(output_dir=out, max_steps=2, seq_len=32))
    written = json.loads(Path(out, "config.json").read_text())
    assert (written["max_steps"], written["learning_rate"], written["lr_multipliers"], len(log(out, "train"))) == (2, 2e-4, ["embed=0"], 1)


def test_resume_goes_on_as_if_it_had_not_stopped(tmp_path, teacher, student, text):
    fields = dict(teacher=teacher, student=student, dataset=text, batch_size=4, gradient_accumulation_steps=2, alpha=0.3)
    distil(tmp_path / "whole", **fields, max_steps=12)   # a pass is 9 or so
    distil(tmp_path / "parts", **fields, max_steps=5)
    shown = distil(tmp_path / "parts", **fields, max_steps=12).out
    assert "resumes" in shown and "step-00000005" in shown
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))
    assert column(tmp_path / "parts", "train/step") == list(range(1, 13))
    assert column(tmp_path / "parts", "train/loss") == column(tmp_path / "whole", "train/loss")
    whole, parts = (checkpoint(tmp_path / name, 12) for name in ("whole", "parts"))
    assert same({k: v for k, v in whole.items()}, parts)


def test_resume_never_and_by_path(tmp_path, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=1)
    out = str(tmp_path / "out")
    distil(out, **fields, max_steps=3)
    done = final_weights(out)
    distil(out, **fields, max_steps=3, resume="never")
    assert same(final_weights(out), done) and column(out, "train/step") == [1, 2, 3]
    distil(out, **fields, max_steps=4, resume=f"{out}/checkpoints/step-00000002")
    assert column(out, "train/step") == [1, 2, 3, 4]
    distil(tmp_path / "other", **fields, max_steps=4)
    assert same(final_weights(out), final_weights(tmp_path / "other"))
    assert "nowhere" in distil(tmp_path / "x", rc=2, **fields, max_steps=4, resume="/nowhere/step-00000002").err


def test_keep_checkpoints(out, student, text):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=5, save_steps=1, keep_checkpoints=2)
    assert sorted(os.listdir(f"{out}/checkpoints")) == ["step-00000004", "step-00000005"]
    state = json.loads(Path(out, "checkpoints", "step-00000005", "state.json").read_text())
    assert state["step"] == 5 and state["epoch"] == pytest.approx(column(out, "train/epoch")[-1])


def test_an_unreadable_newest_checkpoint_is_passed_over(tmp_path, out, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=4)
    for file in Path(out, "checkpoints", "step-00000004").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    shown = distil(out, **fields, max_steps=6)
    assert re.search("step-00000004 .*passed over", shown.out + shown.err)
    distil(tmp_path / "whole", **fields, max_steps=6)
    assert same(final_weights(out), final_weights(tmp_path / "whole")) and column(out, "train/step") == [1, 2, 3, 4, 5, 6]


def test_a_changed_config_is_refused_by_field(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2)
    err = distil(out, rc=2, teacher=teacher, student=student, dataset=text, max_steps=4, learning_rate=5e-4, temperature=2.0).err
    assert "learning_rate" in err and "temperature" in err and "0.0005" in err and "alpha" not in err
    assert column(out, "train/step") == [1, 2]


def test_one_run_a_directory(out, student, text):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=1)
    with sd.process_group(), sd.lock(out):
        pass
    import fcntl
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)   # as another run would hold it
    try:
        assert "another run" in distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=2).err
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Flags and fields.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, nearest", [(["--temprature", "2"], "temperature"), (["--learning-rat", "1"], "learning_rate"),
                                            (["--studnt=x"], "student"), (["--alpha", "0.5", "--lr_multiplier", "a=1"], "lr_multipliers")])
def test_an_unknown_flag_names_the_nearest(words, nearest):
    err = cli(*words, rc=2).err
    unknown = [w for w in words if w.startswith("--")][-1].partition("=")[0]
    assert unknown.replace("-", "_") in err.replace("-", "_") and nearest in err and len(err.strip().splitlines()) <= 2


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    for name, body in (("a.yaml", "temprature: 2\n"), ("a.json", '{"temprature": 2}')):
        (tmp_path / name).write_text(body)
        err = cli("--config", tmp_path / name, rc=2).err
        assert "temprature" in err and "temperature" in err


@pytest.mark.parametrize("words", ["--alpha 1.2", "--alpha x", "--temperature 0", "--batch_size 0", "--seq_len 1", "--max_steps 0", "--learning_rate nan",
                                   "--lr_scheduler no", "--divergence kl", "--alpha 0.5 --alpha 0.6", "--api_model x", "--cache_dir c --alpha 1",
                                   "stray", "--config /nowhere.yaml", "--teacher t", "--lr_scheduler_kwargs x"])
def test_wrong_values_are_refused(words, tmp_path):
    cli(*words.split(), "--output_dir", tmp_path / "out", rc=2)
    assert not (tmp_path / "out").exists()


MODES = re.findall(r'"(\w+)": \w+[,}]', re.search(r"\{.*\}(?=\[cfg.mode\])", Path(sd.__file__).read_text())[0])


def test_every_field_is_read():
    """By name, somewhere in the code: a flag that does nothing is worse than none."""
    source, checks = (Path(module.__file__).read_text() for module in (sd, config))
    fields = [name for group, names in config.GROUPS.items() if group in MODES or group not in ("generate", "eval") for name in names]
    assert not [name for name in fields if not re.search(rf"\b(cfg|run)\.{name}\b|[\"']{name}[\"']", source)
                and not re.search(rf"\bcfg\.{name}\b", checks)]


def test_every_field_has_one_line_of_help():
    shown = cli("--help").out
    for name, field in config.FIELDS.items():
        assert f"--{name}" in shown and field.metadata["help"] and "\n" not in field.metadata["help"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in [k for k in os.environ if k.startswith("WANDB")]:
        monkeypatch.delenv(name)


def test_wandb_missing(out, student, text, monkeypatch, no_wandb_settings):
    monkeypatch.setitem(sys.modules, "wandb", None)   # importing it fails
    shown = distil(out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True)
    assert len(re.findall("^wandb.*", shown.out + shown.err, re.M)) == 1


def test_wandb_not_logged_in_never_waits_at_a_prompt(tmp_path, out, student, text, no_wandb_settings):
    """On a terminal, where wandb would ask."""
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    ours, theirs = pty.openpty()
    fields = flags(**PLAIN, output_dir=out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True)
    process, shown, deadline = spawn(*fields, env=env, stdin=theirs, stdout=theirs, stderr=theirs), b"", time.time() + 120
    os.close(theirs)
    try:
        while time.time() < deadline and (select.select([ours], [], [], 1)[0] or process.poll() is None):
            if select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 65536)
    except OSError:   # the other end is closed
        pass
    finally:
        os.close(ours)
        if process.poll() is None and time.time() > deadline:
            process.kill()
    assert process.wait(10) == 0, shown.decode()
    assert shown.count(b"wandb: ") == 1 and b"logged in" in shown and os.path.exists(f"{out}/final")


def test_wandb_gets_the_same_keys_and_the_whole_config(out, teacher, student, text, monkeypatch, no_wandb_settings):
    """A stand-in for the service, not for our code."""
    seen = types.SimpleNamespace(config=None, entries=[], finished=False)

    def init(config, **_):
        seen.config = config
        return types.SimpleNamespace(id="abc", log=lambda entry, step=None: seen.entries.append(entry), finish=lambda: setattr(seen, "finished", True))
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key="key"), init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2, use_wandb=True)
    assert seen.entries == log(out) and seen.finished
    assert {k for k in config.FIELDS if k not in seen.config} == set() and "key" not in json.dumps(seen.config).split()


@pytest.mark.campaign
def test_wandb_offline(out, student, text):
    process = spawn(*flags(**PLAIN, output_dir=out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True), env={"WANDB_MODE": "offline"})
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and list(Path(out, "wandb").glob("offline-run-*")), shown


# ---------------------------------------------------------------------------------------------------------------------
# The package itself: small, documented, and its README true.
# ---------------------------------------------------------------------------------------------------------------------


def test_the_trainer_stays_small():
    source = Path(sd.__file__).read_text()
    assert len(source.splitlines()) < 1500
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert not {name: size for name, size in sizes.items() if size > 70 and name != "train"}


def test_the_top_level_is_six_files_and_five_requirements():
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout.split() or os.listdir(HERE)
    assert {name for name in tracked if not name.startswith(".")} <= {"simple_distill.py", "config.py", "launch.sh", "test_simple_distill.py",
                                                                      "requirements.txt", "README.md", "__pycache__"}
    names = [re.match(r"[\w-]+", line)[0] for line in (HERE / "requirements.txt").read_text().splitlines() if line.strip() and line[0] != "#"]
    assert sorted(names) == ["datasets", "torch", "tqdm", "transformers", "wandb"]


def readme_commands():
    """Every command of the trainer in the README, in a block or in a line, as lists of words; all but the bare one (the demo)."""
    readme = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""
    readme = readme.replace("\\\n", " ")
    found = re.findall(r"(?:^ {4,}|`|&& )(?:[A-Z_]+=\S+ )*((?:python simple_distill\.py|\./launch\.sh)\b[^`\n]*)", readme, re.M)
    found = [shlex.split(re.sub(r"\s#.*", "", line)) for line in found]
    return [c for i, c in enumerate(found) if len(c) > 2 and not {"...", "--help"} & set(c) and c not in found[:i]]


@pytest.mark.parametrize("command", readme_commands(), ids=shlex.join)
def test_readme_commands_run(command, tmp_path, monkeypatch, teacher, student, text):
    """As they stand there, on tiny models: names of models and data are replaced, lengths cut short, nothing else."""
    mode = command[command.index("--mode") + 1] if "--mode" in command else "train"
    if mode == "generate" or mode not in MODES:
        pytest.skip(f"mode {mode} has tests of its own, with a server")
    words = command[1 if command[0].endswith("launch.sh") else 2:]
    ours = {"--teacher": teacher, "--student": student, "--dataset": text, "--tokenizer": teacher}
    result, i = [], 0
    while i < len(words):
        name, _, value = words[i].partition("=") if words[i].startswith("--") else (words[i], "", "")
        if name == "--dataset_config":
            i += 1 if value else 2
            continue
        takes = not value and name.startswith("--") and i + 1 < len(words) and not words[i + 1].startswith("--")
        value = value or (words[i + 1] if takes else None)
        i += 1 + takes
        if name == "--config":
            (tmp_path / value).write_text(f"teacher: {teacher}\nstudent: {student}\ndataset: {text}\nmax_steps: 2\n")
        value = ours[name] if name in ours and not (value or "").startswith(("layers:", "demo")) else value
        result += [name] if value is None else [name, value]
    monkeypatch.chdir(tmp_path)
    short = {"--seq_len": 32, "--output_dir": tmp_path / "out"} | ({"--max_steps": 2, "--log_steps": 1} if mode == "train" else {})
    if "--cache_dir" not in result or mode == "cache":
        short["--dataset"] = text
    elif mode == "train":   # its other half comes first
        fields = dict(teacher=teacher, dataset=text, seq_len=32, cache_dir=result[result.index("--cache_dir") + 1])
        cli("--mode", "cache", *flags(**fields, output_dir=tmp_path / "out"))
    cli(*result, *[x for k, v in short.items() if k not in result for x in (k, v)])


# ---------------------------------------------------------------------------------------------------------------------
# The demo.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_demo_labels_only_needs_no_teacher(out):
    cli(*flags(alpha=1, output_dir=out, max_steps=3))
    assert os.path.exists(f"{out}/final") and not os.path.exists(f"{out}/demo/teacher")


@pytest.mark.campaign
def test_demo_from_nothing_to_a_better_student(out):
    """What a newcomer types, in a fresh process; the teacher is kept, and distilling beats labels alone at the same steps."""
    process = spawn("--output_dir", out, env={"OMP_NUM_THREADS": str(os.cpu_count())})
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    entry = json.loads(Path(out, "config.json").read_text())
    assert (entry["teacher"], entry["student"], entry["dataset"]) == ("demo", "demo", "demo")
    shutil.copytree(f"{out}/demo", f"{out}-labels/demo")
    cli(*flags(alpha=1, output_dir=f"{out}-labels"))
    assert column(out, "eval/perplexity")[-1] < column(f"{out}-labels", "eval/perplexity")[-1]


def bench():
    """Tables of speed and memory, interleaved rounds in one process, medians, ratios."""


if __name__ == "__main__":
    sys.exit(bench() if "--bench" in sys.argv else pytest.main([__file__, *sys.argv[1:]]))
