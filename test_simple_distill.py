"""Tests of simple_distill: pure functions against independent float64 references, and runs through
the real command line. They stand in the chapters' order, under the same banners; a test is named
test_<chapter>_<what is promised>, so that `-k cache` finds all of the cache's.

    pytest                                   # the ordinary run: tiny random models, CPU, no network
    pytest -m campaign                       # what takes long
    python test_simple_distill.py --bench    # tables of speed and memory
    python test_simple_distill.py --fork DIR --without cache ...   # the package less some chapters
"""
import argparse
import ast
import atexit
import collections
import contextlib
import fcntl
import functools
import gc   # optional: generate
import hashlib
import http.server   # optional: generate
import importlib   # optional: generate
import io
import itertools
import json
import math
import os
import pickle
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
# models are tiny: a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "HF_DATASETS_CACHE" not in os.environ:
    # tokenised rows and model code go to a folder of our own, which subprocesses share
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="simple-distill-test-")
    os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_DATASETS_CACHE"], "modules")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import datasets
import numpy as np

try:
    import pytest
except ImportError:   # it is not among the requirements of a run
    sys.exit("error: the tests, --fork and --bench need pytest: pip install pytest")
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import config
import simple_distill as sd

transformers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------------
# Helpers: the command line in this process and in others, tiny models, what a run leaves behind.


class Result(NamedTuple):
    rc: int
    out: str
    err: str


def words_of(args):
    """Arguments as words; --use_wandb false unless the test says otherwise."""
    words = [str(arg) for arg in args]
    if "--mode" not in words and not any("use_wandb" in word for word in words):
        words += ["--use_wandb", "false"]
    return words


def cli(*args, rc=0):
    """The command line in this process -> Result; the exit code is asserted."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sd.main(words_of(args))
        except SystemExit as e:
            code = e.code or 0
    result = Result(code, out.getvalue(), err.getvalue())
    assert code == rc, (shlex.join(words_of(args)), result)
    if rc == 2:
        assert len(re.findall("^error: ", result.err, re.MULTILINE)) == 1, result.err
        assert "Traceback" not in result.err, result.err
    return result


def flags(**fields):
    """Fields of Config as command-line words; None leaves a field out."""
    words = []
    for name, value in fields.items():
        if value is None:
            continue
        words.append(f"--{name}")
        for x in value if isinstance(value, (list, tuple)) else [value]:
            words.append(str(x).lower() if isinstance(x, bool) else str(x))
    return words


# Everything that would blur a comparison is off: what a test is about, it turns on.
PLAIN = dict(
    dtype="fp32", seq_len=32, lr_scheduler="constant", warmup_ratio=0, weight_decay=0,
    learning_rate=1e-3, log_steps=1, save_steps=0, eval_steps=0, gradient_checkpointing=False)
STILL = 1e-30   # a learning rate that moves no weight in fp32


def distil(out, rc=0, **fields):
    """A plain run into `out`, in this process."""
    return cli(*flags(**{**PLAIN, "output_dir": out, **fields}), rc=rc)


# ---- processes


def spawn(*args, nproc=1, env=None, **popen):
    """The real thing as a process, in a session of its own: a signal reaches all of its ranks."""
    command = [sys.executable, HERE / "simple_distill.py"]
    if nproc > 1:
        command = [HERE / "launch.sh"]
    env = {**os.environ, "NPROC": str(nproc), **(env or {})}
    popen = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                 text=True) | popen
    return subprocess.Popen([*command, *words_of(args)], env=env, start_new_session=True, **popen)


# A process that has imported everything once; each run is a fork of it and starts in no time.
MOTHER = """
import json, os, resource, signal, sys, traceback
import torch, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor
import datasets, tqdm, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

def child(job):
    os.setsid()
    os.environ.update(job["env"])
    sys.path.insert(0, job["package"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        torch.set_num_threads(1)
        if job["limit"]:   # of a file's size
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        import simple_distill
        exec(job["change"], vars(simple_distill))
        code = simple_distill.main(job["args"])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        child(job)
    print(pid, flush=True)
"""


class Fork:
    """A run in processes of its own, one a rank. change: code that the package meets first."""
    mother = None

    def __init__(self, log, *args, ranks=1, limit=0, package=HERE, change=""):
        if Fork.mother is None:
            Fork.mother = subprocess.Popen(
                [sys.executable, "-c", MOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True)
            atexit.register(Fork.mother.kill)
        self.log = str(log)
        Path(log).touch()   # a run may be killed before it opens it
        self.pids = []
        port = free_port()
        for rank in range(ranks):
            env = rank_environment(rank, ranks, port) if ranks > 1 else {}
            job = {"args": words_of(args), "env": env, "log": self.log, "limit": limit,
                   "package": str(package), "change": change}
            Fork.mother.stdin.write(json.dumps(job) + "\n")
            Fork.mother.stdin.flush()
            self.pids.append(int(Fork.mother.stdout.readline()))

    def poll(self):
        """None while any of it runs, as of a Popen."""
        return None if any(map(is_alive, self.pids)) else 0

    def signal(self, number):
        for pid in filter(is_alive, self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return self

    def wait(self, seconds=180):
        """-> what it printed, once all of it has ended."""
        end = time.time() + seconds
        while self.poll() is None:
            assert time.time() < end, Path(self.log).read_text()[-3000:]
            time.sleep(0.02)
        return Path(self.log).read_text()


def distil_apart(out, ranks=1, change="", **fields):
    """A plain run into `out`, in processes of its own, which print into out.txt -> Fork"""
    words = flags(**{**PLAIN, "output_dir": out, **fields})
    return Fork(f"{out}.txt", *words, ranks=ranks, change=change)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank, ranks, port):
    """What torchrun would set."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def is_alive(pid):
    """A child of the mother that nobody has waited for is a zombie; its threads may outlive it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def wait_for_log(out, process, seconds=120):
    """Until a process (a Popen, a Fork) has logged its first step."""
    end = time.time() + seconds
    while not (os.path.exists(f"{out}/log.jsonl") and log(out, "train")):
        assert process.poll() is None and time.time() < end, "it ended, or is too slow"
        time.sleep(0.05)


# ---- what a run leaves behind


def read_lines(path):
    """The rows of a .jsonl file."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def log(out, kind=None):
    """The lines of log.jsonl; kind train, eval or block: only those."""
    entries = read_lines(os.path.join(out, "log.jsonl"))
    return [entry for entry in entries if kind is None or f"{kind}/step" in entry]


def quiet_log(out):
    """The log without speeds: what two equal runs have in common."""
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in log(out)]


def column(out, key):
    return [entry[key] for entry in log(out) if key in entry]


def weights(path):
    return load_file(os.path.join(path, "model.safetensors"))


def final_weights(out):
    return weights(os.path.join(out, "final"))


def checkpoint(out, step):
    """All tensors of a checkpoint by name."""
    path = os.path.join(out, "checkpoints", f"step-{step:08d}")
    reader = dcp.HuggingFaceStorageReader(path)
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def gradients(out):
    """Of the first step: AdamW's first moment is a tenth of it (max_grad_norm 0)."""
    tensors = checkpoint(out, 1)
    return {k: 10 * v for k, v in tensors.items() if re.search(r"exp_avg(?!_sq)", k)}


def distance(a, b):
    """Relative to the size of b, over all tensors."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in b)
    size = sum(b[k].double().square().sum() for k in b)
    return math.sqrt(difference / size)


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- tiny tokenizers, models and texts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>"]


def tiny_tokenizer(chat_template=None, *, roll=0, merges=(), bos=False):
    """A byte is a token (263 with the special ones): what a text encodes to can be seen.

    roll: the same tokens under other ids. merges: "t h" adds the token th. bos: encoding plain text
    starts with <|begin|>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = letters[roll:] + letters[:roll] + [m.replace(" ", "") for m in sorted(merges)]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + letters)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split()) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|begin|>",
        pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(vocab=None, hidden=32, layers=2, cls="LlamaConfig", **overrides):
    shape = dict(
        vocab_size=vocab or len(tiny_tokenizer()), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=2 * hidden, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2)   # logits far from uniform
    if "GPT2" not in cls and "NeoX" not in cls:
        shape["num_key_value_heads"] = 2
    return getattr(transformers, cls)(**{**shape, **overrides})


def tiny_model(path, vocab=None, hidden=32, layers=2, seed=0, cls="LlamaConfig", tokenizer=None,
               **overrides):
    """A random model and its tokenizer (False: none) in a directory -> its path."""
    config_ = tiny_config(vocab, hidden, layers, cls, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config_).save_pretrained(path)
    if tokenizer is not False:
        (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def edit_weights(path, change):
    """change(dict of tensors) in place, and save."""
    tensors = weights(path)
    change(tensors)
    save_file(tensors, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})


def padded(path, source, rows):
    """The same model with more vocabulary rows, and loud ones: unless they are cut, they take all
    of the probability."""
    model = load(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.data[-rows:] = 50 * torch.randn(rows, module.weight.shape[1])
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def break_letter(source, path):
    """A copy of a model in which the letter Z, and only it, makes everything infinite."""
    shutil.copytree(source, path)
    z = tiny_tokenizer().encode("Z")[0]

    def change(tensors):
        tensors["model.embed_tokens.weight"][z] = math.inf

    edit_weights(path, change)
    return str(path)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_splits(folder, train, validation):
    """A directory of two splits, as on the hub: what is trained on does not depend on how a slice
    is held out."""
    os.makedirs(folder)
    write_jsonl(os.path.join(folder, "train.jsonl"), train)
    write_jsonl(os.path.join(folder, "validation.jsonl"), validation)
    return str(folder)


WORDS = "one two three red green blue sun moon star tree river stone".split()


def prose(n, seed=0):
    """n words with some structure."""
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(n))


def talk(n, seed=0):
    """n questions with answers of very different length."""
    rows = []
    for i in range(n):
        question = prose(1 + i % 3, seed + i)
        rows.append({"prompt": question, "response": prose(1 + (5 * i) % 16, seed + 100 + i)})
    return rows


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small take twice as long on two, and longer still beside other work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", hidden=32, seed=1)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "student", hidden=16, seed=2)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """40 rows of plain text, some 70 blocks of 32 tokens."""
    rows = [{"text": prose(8 + i % 9, i)} for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "text.jsonl", rows)


@pytest.fixture(scope="session")
def chat(tmp_path_factory):
    """8 conversations to train on, 4 held out."""
    return write_splits(tmp_path_factory.mktemp("data") / "chat", talk(8), talk(4, seed=50))


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


# ---- the objective as a textbook writes it


def divergence_of(logp, logq, divergence):
    """Sum over tokens, of student log-probabilities logp and teacher's logq."""
    if divergence == "forward":
        return kl_sum(logq, logp)
    if divergence == "reverse":
        return kl_sum(logp, logq)
    middle = torch.log((logp.exp() + logq.exp()) / 2)
    return (kl_sum(logp, middle) + kl_sum(logq, middle)) / 2


def kl_sum(loga, logb):
    """KL(a || b)."""
    return F.kl_div(logb, loga, reduction="sum", log_target=True)


def dense_losses(student_logits, teacher_logits, labels, alpha, temperature,
                 divergence="forward"):
    """Full logits, [N] labels with -100 -> loss, ce, kl."""
    counted = labels != -100
    n = counted.sum().clamp_min(1)
    logits = student_logits[counted]
    ce = F.cross_entropy(logits, labels[counted], reduction="sum") / n
    kl = torch.zeros(())
    if teacher_logits is not None:
        logp = F.log_softmax(logits / temperature, -1)
        logq = F.log_softmax(teacher_logits[counted] / temperature, -1)
        kl = divergence_of(logp, logq, divergence) * temperature ** 2 / n
    return alpha * ce + (1 - alpha) * kl, ce, kl


def chatml_rows(rows):
    """Prompt and response rows -> (ids, labels already shifted), written out by hand; labels count
    the answer and its end mark."""
    encode = tiny_tokenizer().encode
    coded = []
    for row in rows:
        before = encode(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        answer = encode(f"{row['response']}<|im_end|>")
        ids = before + answer + encode("\n")
        labels = [-100] * len(ids)
        for i in range(len(before), len(before) + len(answer)):
            labels[i - 1] = ids[i]
        coded.append((torch.tensor(ids), torch.tensor(labels)))
    return coded


def model_losses(student, teacher, coded, alpha, temperature=1.0, divergence="forward"):
    """The same through whole models, one row at a time: no padding, no packing, no chunks."""
    labels = torch.cat([labels for _, labels in coded])
    with torch.no_grad():
        teacher_logits = None if teacher is None else logits_of_rows(teacher, coded)
    student_logits = logits_of_rows(student, coded)
    return dense_losses(student_logits, teacher_logits, labels, alpha, temperature, divergence)


def logits_of_rows(model, coded):
    rows = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in coded]
    return torch.cat(rows)


# --------------------------------------------------------------------------------------------------
# Config: flags, files, their checks; bad input is one or two lines and exit code 2.


def parse(*words):
    return config.parse_config([str(word) for word in words])


def refused(*words):
    """-> the message."""
    with pytest.raises(config.UserError) as caught:
        parse(*words)
    return str(caught.value)


def read_config(out):
    return json.loads(Path(out, "config.json").read_text())


def test_config_json_repeats_the_run(tmp_path, out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=3, alpha=0.3,
           lr_multipliers=["embed=0.5", "norm=0"], seed=3, lr_scheduler="cosine", weight_decay=0.1,
           eval_steps=1)
    again = str(tmp_path / "again")
    cli("--config", f"{out}/config.json", "--output_dir", again)
    assert same(final_weights(out), final_weights(again))
    first = read_config(out)
    second = read_config(again)
    assert first.keys() == second.keys() == config.FIELDS.keys()
    assert {name for name in first if first[name] != second[name]} == {"output_dir"}
    assert quiet_log(out) == quiet_log(again)


# A file, and what it says: yaml's own idea of a value, `no` a False and 010 an 8, is not asked for.
FILES = {
    "a.yaml": ("resume: no\nmax_steps: 010\nalpha: 1e-1\ntokenizer: null\nuse_wandb: no\n"
               "wandb_run_name: '--x'\nlr_multipliers: [a=1, 'b=0.5']\nstudent:\n",
               dict(resume="no", max_steps=10, alpha=0.1, use_wandb=False, wandb_run_name="--x",
                    lr_multipliers=["a=1", "b=0.5"])),
    "one.yaml": ("lr_multipliers: a=1\nseed: 2\nseq_len: 64", dict(lr_multipliers=["a=1"], seed=2)),
    "a.json": ('{\t"output_dir": "\\ud83d\\ude00", "learning_rate": 1e-05,\n\t"max_steps": null,'
               ' "lr_multipliers": [], "use_wandb": false}',
               dict(output_dir="\U0001f600", learning_rate=1e-5, use_wandb=False)),
}


@pytest.mark.parametrize("name", FILES)
def test_config_a_file_is_as_if_typed_and_the_command_line_wins(tmp_path, name):
    body, fields = FILES[name]
    (tmp_path / name).write_text(body)
    cfg = parse("--config", tmp_path / name, "--seq_len", 32)
    assert {field: getattr(cfg, field) for field in fields} == fields
    assert cfg.seq_len == 32
    assert cfg.given - {"seq_len"} == set(fields)


@pytest.mark.parametrize("words, unknown, nearest", [
    (["--temprature", "2"], "--temprature", "temperature"),
    (["--learning-rat", "1"], "--learning-rat", "learning_rate"),
    (["--studnt=x"], "--studnt", "student"),
    (["--alpha", "0.5", "--lr_multiplier", "a=1"], "--lr_multiplier", "lr_multipliers"),
    (["--no_gradient_checkpoint"], "--no_gradient_checkpoint", "gradient_checkpointing"),
    (["--config", "a.yaml"], "'temprature'", "temperature"),
    (["--config", "a.json"], "'temprature'", "temperature"),
])
def test_config_what_is_unknown_names_the_nearest(tmp_path, monkeypatch, words, unknown, nearest):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("temprature: 2\n")
    Path("a.json").write_text('{"temprature": 2}')
    message = refused(*words)
    assert unknown in message and f"did you mean {nearest}?" in message


# What a train run on a file of plain text does not read, with values that are no defaults.
IDLE = {
    "dataset_config": "foo",
    "shuffle_buffer": 3,             # optional: streaming
    "cache_samples": 20,             # optional: cache
    "force_regenerate": True,        # optional: cache
    "lm_head_lr": 0.5,               # optional: blockwise
    "on_policy_temperature": 0.5,    # optional: on_policy
    "max_tokens": 20,                # optional: generate
    "api_model": "some-model",       # optional: generate
    "generate_comparisons": False,   # optional: eval
}


def test_config_a_file_may_hold_what_other_modes_read(tmp_path, capsys, student, text):
    """One file serves all modes; a line says what of it this one passes over."""
    fields = dict(student=student, dataset=text, alpha=1.0, max_steps=1)
    (tmp_path / "run.json").write_text(json.dumps({**fields, **IDLE}))
    cfg = parse("--config", tmp_path / "run.json")
    line, = capsys.readouterr().out.splitlines()
    assert line.rpartition(": ")[2].split(", ") == list(IDLE)
    assert cfg.given == set(fields)
    assert [getattr(cfg, name) for name in IDLE] == [config.default_of(name) for name in IDLE]


@pytest.mark.parametrize("name", IDLE)
def test_config_a_flag_that_the_mode_does_not_read_is_refused(name, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0)
    assert name in refused(*flags(**fields, **{name: IDLE[name]}))
    parse(*flags(**fields, **{name: config.default_of(name) or None}))   # as it is anyway


def test_config_every_field_is_read():
    """By name, somewhere in the code: a flag that does nothing is worse than none."""
    source = Path(sd.__file__).read_text() + Path(config.__file__).read_text()
    unread = [name for name in config.FIELDS if not re.search(rf"\bcfg\.{name}\b", source)]
    assert unread == []


# The arguments are those of simple_distill.py, which comes first.
RUN_AND_LOOK = """
import runpy
import sys

sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    print("exit code", e.code)
print("torch imported:", "torch" in sys.modules)
"""


def run_and_look(word, code):
    """-> what it says without importing torch, which takes seconds."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN_AND_LOOK, HERE / "simple_distill.py", word], cwd=HERE,
        capture_output=True, text=True)
    assert f"exit code {code}\ntorch imported: False\n" in ran.stdout, ran.stderr
    return ran.stdout + ran.stderr


def test_config_a_typo_answers_without_torch():
    assert "error: cannot make sense of '--seeed'" in run_and_look("--seeed", code=2)


def test_config_help_is_grouped_by_chapter():
    """The name and purpose of each section are a title, and its knobs stand below it."""
    lines = run_and_look("--help", code=0).splitlines()
    starts = []
    for section in config.SECTIONS:
        starts.append(lines.index(f"{section.section} ({section.purpose}):"))
    ends = starts[1:] + [len(lines)]
    for section, start, end in zip(config.SECTIONS, starts, ends):
        below = "\n".join(lines[start:end])
        shown = re.findall(r"^  --(?!no_)(\w+)", below, re.MULTILINE)
        assert shown == config.knobs_in(section.section)
    assert all(field.metadata["help"] for field in config.FIELDS.values())


NUMBERS = [name for name, field in config.FIELDS.items()
           if re.search(r"\b(int|float)\b", str(field.type))]


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_config_a_number_has_a_range(name, value):
    with pytest.raises(config.UserError, match=f"^{name} is "):
        config.check_value(name, [1, value] if "list" in str(config.FIELDS[name].type) else value)


@pytest.mark.parametrize("name, inside, outside", [
    ("alpha", [0, 1], [-0.1, 1.1]),
    ("temperature", [1e-9], [0]),
    ("seq_len", [2], [1]),
    ("batch_size", [1], [0]),
    ("save_steps", [0], [-1]),
    ("seed", [0, 2**28], [2**28 + 1]),
])
def test_config_a_range_holds_its_ends(name, inside, outside):
    for value in inside:
        config.check_value(name, value)
    for value in outside:
        with pytest.raises(config.UserError, match=f"^{name} is {value}; it must be"):
            config.check_value(name, value)


# words of a command line -> what the message says
REFUSED = [
    # no value of that kind
    ("--temperature warm", "temperature 'warm'"),
    ("--batch_size 1.5", "batch_size '1.5'"),
    ("--lr_scheduler step", "lr_scheduler cosine"),
    ("--mode learn", "mode train"),
    ("--gradient_checkpointing perhaps", "gradient_checkpointing perhaps"),
    ("--lr_multipliers (=1", "lr_multipliers '(=1'"),
    ("--lr_multipliers =1", "lr_multipliers '=1'"),
    ("--lr_multipliers a=-1", "lr_multipliers 'a=-1'"),
    ("--student layers:0", "layers:N"),
    ("--student layers:²", "layers:N"),

    # flags
    ("--alpha 0.1 --alpha 0.2", "alpha once"),
    ("--batch-size 1 --batch_size=2", "batch_size once"),
    ("train", "'train' --"),
    ("--alpha", "alpha"),
    ("--no_seed 3", "--no_seed"),
    # nothing where a name should be, as from "$UNSET"
    ("--tokenizer=\t", "tokenizer"),
    ("--output_dir=", "output_dir"),
    ("--lr_multipliers=", "lr_multipliers"),

    # what does nothing beside the others
    ("--cache_dir c --alpha 1", "cache_dir --alpha"),   # optional: cache
    ("--cache_dir c --divergence jsd", "divergence --cache_dir"),   # optional: cache
    ("--cache_dir c --dataset d", "dataset --cache_dir"),   # optional: cache
    *[   # optional: cache
        ("--cache_dir c --streaming", "streaming --cache_dir"),   # optional: streaming
        ("--cache_dir c --blockwise", "blockwise --cache_dir"),   # optional: blockwise
        ("--cache_dir c --on_policy 1", "on_policy --cache_dir"),   # optional: on_policy
    ],
    ("--mode cache --cache_dir c --cache_top_k 3", "--cache_method topk"),   # optional: cache
    ("--blockwise --alpha 1", "blockwise --alpha"),   # optional: blockwise
    ("--block_input teacher --lr_per_block 1",   # optional: blockwise
     "block_input lr_per_block --blockwise true"),
    ("--blockwise --block_input teacher --no_freeze_previous_blocks",   # optional: blockwise
     "freeze_previous_blocks --block_input student"),
    ("--blockwise --logit_loss_type ce --logit_loss_weight 0.3",   # optional: blockwise
     "logit_loss_weight --logit_loss_type kl_div or mse"),
    ("--blockwise --no_train_lm_head --logit_loss_type ce",   # optional: blockwise
     "logit_loss_type --train_lm_head true"),
    ("--on_policy 1 --alpha 1", "on_policy --alpha"),   # optional: on_policy
    ("--on_policy 1 --packing documents", "on_policy --packing rows"),   # optional: on_policy
    ("--max_new_tokens 9", "max_new_tokens --on_policy above 0"),   # optional: on_policy
    ("--mode generate --teacher t", "teacher --provider local"),   # optional: generate
    ("--lr_scheduler_kwargs {} --lr_scheduler constant", "lr_scheduler_kwargs constant"),
    ("--warmup_ratio 0.1 --lr_scheduler constant", "warmup_ratio --lr_scheduler"),

    # what cannot be done
    ("--teacher t", "student"),
    ("--max_steps 0", "max_steps"),
    ("--num_epochs 0", "num_epochs"),
    ("--streaming --teacher t --student s", "--max_steps"),   # optional: streaming
    ("--mode cache", "--cache_dir"),   # optional: cache
    *[   # optional: blockwise
        ("--blockwise --streaming --max_steps 2", "blockwise --streaming"),   # optional: streaming
    ],
    ("--blockwise --block_input teacher --wd_per_block 1 2",   # optional: blockwise
     "block_input wd_per_block"),
    ("--on_policy 1 --on_policy_prompt 128", "128 seq_len"),   # optional: on_policy

    # files
    ("--config /nowhere", "/nowhere FileNotFoundError"),
    ("--config list.yaml", "list.yaml mapping"),
    ("--config broken.yaml", "broken.yaml ParserError"),
    ("--config broken.json", "broken.json JSONDecodeError"),
    ("--config twice.yaml", "seed once"),
    ("--config nested.yaml", "nested.yaml line 2"),   # and no bomb of aliases
    ("--config several.yaml", "'16'"),
    ("--config itself.yaml", "'config'"),
]


@pytest.mark.parametrize("words, told", REFUSED)
def test_config_refuses(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("broken.json").write_text('{"seed": ')
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    Path("nested.yaml").write_text("lr_multipliers: &a [x=1]\nlr_per_block: [*a, *a]\n")
    Path("several.yaml").write_text("batch_size: [8, 16]\n")
    Path("itself.yaml").write_text("config: list.yaml\n")
    message = refused(*words.split(" "))
    missing = [word for word in told.split() if word not in message]
    assert not missing, (missing, message)


# What goes together although one of it may not stand alone.
@pytest.mark.parametrize("words", [
    "--blockwise --max_steps 0",   # optional: blockwise
    "--cache_dir c --seq_len 9 --packing rows --eval_samples 9 --temperature 2",   # optional: cache
    "--cache_dir c --mode cache --dataset d --divergence forward",   # optional: cache
    "--on_policy 1 --max_new_tokens 9 --on_policy_prompt 127",   # optional: on_policy
    "--mode generate --provider local --teacher t --attention eager",   # optional: generate
    "--teacher t --alpha 1",
    "--lr_scheduler constant --warmup_ratio 0",
])
def test_config_takes(words):
    parse(*words.split())


# ---- bad input as a run meets it


GOOD_LINE = '{"text": "one two three four five"}\n'


def with_file(name, body):
    """A dataset file of this text or these bytes."""
    def make(folder):
        (folder / name).write_bytes(body if isinstance(body, bytes) else body.encode())
        return dict(dataset=folder / name)
    return make


def broken_model(role, change):
    """change(its directory) damages the model of that role."""
    def make(folder):
        path = tiny_model(folder / "model")
        change(Path(path))
        return {role: path}
    return make


def edit_config(**fields):
    def change(path):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return change


def truncate(name, size=0):
    def change(path):
        os.truncate(path / name, size)
    return change


def output_is_a_file(folder):
    (folder / "file").write_text("mine")
    return dict(output_dir=folder / "file")


# what is wrong -> (fields, or a function of a folder that makes fields; words of the message)
BAD_INPUT = {
    "flag": (dict(alpha=1.2), "alpha"),
    "output is a file": (output_is_a_file, "file"),
    "resume nowhere": (dict(resume="/nowhere"), "/nowhere"),
    "schedule lacks": (dict(lr_scheduler="cosine_with_min_lr"), "min_lr"),
    "schedule knows not": (
        dict(lr_scheduler="cosine", lr_scheduler_kwargs='{"num_cycle": 2}'), "num_cycle"),
    "schedule of no json": (dict(lr_scheduler="cosine", lr_scheduler_kwargs="{"), "cosine JSON"),
    "matches nothing": (dict(lr_multipliers="zzz=1"), "zzz"),
    "all frozen": (dict(default_lr_multiplier=0), "frozen"),
    "teacher nowhere": (dict(teacher="/nowhere"), "teacher /nowhere"),
    "student nowhere": (dict(student="no/where"), "no/where"),
    "attention unknown": (dict(attention="sideways"), "sideways"),
    "too many layers": (dict(student="layers:9"), "layers:9 2"),
    "config of no json": (broken_model("teacher", truncate("config.json", 9)), "teacher"),
    "weights cut off": (broken_model("teacher", truncate("model.safetensors", 999)), "teacher"),
    "weights missing": (broken_model("teacher", edit_config(num_hidden_layers=3)), "layers.2"),
    "architecture": (broken_model("student", edit_config(model_type="novel")), "student novel"),
    "dataset nowhere": (dict(dataset="/nowhere.jsonl"), "/nowhere.jsonl"),
    "split nowhere": (dict(train_split="tarin"), "tarin"),
    "empty file": (with_file("a.jsonl", ""), "a.jsonl"),
    "binary file": (with_file("a.jsonl", bytes(range(256)) * 9), "a.jsonl"),
    "one bad line": (with_file("a.jsonl", GOOD_LINE * 4 + "{bad\n" + GOOD_LINE * 4), "a.jsonl"),
    "no parquet": (with_file("a.parquet", "PAR"), "a.parquet"),
    "no known column": (with_file("a.jsonl", '{"body": "one two", "id": 3}\n' * 9), "text"),
    "no target": (with_file("a.jsonl", '{"prompt": "", "response": ""}\n' * 9), "target"),
}


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_config_bad_input_is_a_line_or_two(case, tmp_path, teacher, student, text):
    """And nothing is changed, or left behind but the traceback."""
    fields, told = BAD_INPUT[case]
    folder = tmp_path / "given"
    folder.mkdir()
    if callable(fields):
        fields = fields(folder)
    usual = dict(teacher=teacher, student=student, dataset=text, output_dir=tmp_path / "out")
    before = files_in(folder)
    err = cli(*flags(**{**PLAIN, **usual, **fields}), rc=2).err.strip()
    line = err[err.index("error: "):]
    assert len(line.splitlines()) <= 2 and len(line) < 1000, err
    missing = [word for word in told.split() if word not in line]
    assert not missing, (missing, line)
    left = {path.name for path in (tmp_path / "out").rglob("*")}
    assert left <= {".simple_distill", "error.log"}
    assert files_in(folder) == before


# --------------------------------------------------------------------------------------------------
# Runtime: one run a directory, digests.


def test_runtime_a_digest_sees_the_middle_of_a_long_array():
    other = np.arange(5000)
    other[2500] = 0
    assert sd.digest([np.arange(5000)]) != sd.digest([other])


def test_runtime_one_run_a_directory(out, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0)
    distil(out, **fields, max_steps=1)
    with sd.process_group(), sd.lock(out):
        pass   # it was left free
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)   # as another run would hold it
    try:
        assert "another run" in distil(out, rc=2, **fields, max_steps=2).err
    finally:
        os.close(handle)


def test_runtime_control_characters_never_reach_the_terminal(capsys):
    sd.print0("name\x1b[31m\n")
    assert capsys.readouterr().out == "name\\x1b[31m\n\n"
    assert str(config.UserError("a\x1b]0;b\x07")) == "a\\x1b]0;b\\x07"


def test_runtime_a_traceback_goes_to_error_log_or_by_debug_to_the_terminal(tmp_path, student):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": \n')
    out = tmp_path / "out"
    out.mkdir()
    fields = dict(student=student, alpha=1.0, dataset=bad, max_steps=1)
    assert "Traceback" not in distil(out, rc=2, **fields).err
    assert "Traceback" in (out / "error.log").read_text()
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        words = flags(**{**PLAIN, **fields}, output_dir=tmp_path / "other", debug=True)
        assert sd.main(words_of(words)) == 2
    assert err.getvalue().startswith("error: ") and "Traceback" in err.getvalue()


TWO_DISKS = """
import os, sys
rank = int(os.environ["RANK"])
os.makedirs(f"node{rank}", exist_ok=True)
os.chdir(f"node{rank}")   # each rank has an `out` of its own
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
from config import UserError
with sd.process_group():
    try:
        with sd.lock("out"):
            print("went on")
    except UserError as e:
        print(e)
"""


def run_ranks(source, folder, *args, ranks=2):
    """A script in one process a rank -> what each printed."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = {**os.environ, **rank_environment(rank, ranks, port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", source, str(HERE), *map(str, args)], cwd=folder, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return [process.communicate(timeout=120)[0] for process in processes]


def test_runtime_more_processes_than_gpus_are_refused(monkeypatch):
    """NCCL would say "invalid device ordinal", or hang, a rank."""
    monkeypatch.setattr(sd, "CUDA", True)
    monkeypatch.setattr(sd, "LOCAL_WORLD", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(config.UserError, match="8 processes .* 2 GPUs: use NPROC=2"):
        with sd.process_group():
            pass


def test_runtime_a_node_with_a_disk_of_its_own_is_refused(tmp_path):
    for shown in run_ranks(TWO_DISKS, tmp_path):
        assert "1 of 2 ranks do not see what rank 0 writes in 'out'" in shown, shown
        assert "went on" not in shown


STUCK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
with sd.process_group():
    if sd.RANK == 1:   # rank 0 holds the store, and would take it along
        {failure}
    time.sleep(1000)   # as in a collective on a GPU, which nothing interrupts
"""


@pytest.mark.campaign
@pytest.mark.parametrize("failure", [
    "sd.fail_first(); os._exit(2)",   # as explain() and the end of the file do
    "raise ZeroDivisionError",        # a bug
])
def test_runtime_a_rank_that_is_stuck_when_another_fails_ends(tmp_path, failure):
    start = time.time()
    run_ranks(STUCK.format(failure=failure), tmp_path)
    assert time.time() - start < 90


TOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
with sd.process_group():
    if sd.RANK == 1:   # rank 0 holds the store, and would take it along
        raise ZeroDivisionError
    while not sd.some_rank_failed():
        time.sleep(0.1)
    print("was told")
"""


def test_runtime_a_bug_on_one_rank_is_told_to_the_others(tmp_path):
    """They would wait for it in their next collective; and its own end waits for nobody."""
    told, failed = run_ranks(TOLD, tmp_path)
    assert "ZeroDivisionError" in failed
    assert "was told" in told


LATE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
with sd.process_group():
    if sd.RANK == 1:
        time.sleep(3)
        print("failed" if sd.some_rank_failed() else "all is well")
"""


def test_runtime_rank_0_does_not_leave_with_the_store_before_all_are_done(tmp_path):
    assert "all is well" in run_ranks(LATE, tmp_path)[1]


def test_runtime_only_the_host_waits_for_a_day(monkeypatch):
    """A collective on GPUs, where a rank is gone, ends after minutes: its time-out is the group's
    first."""
    timeouts = []
    init = torch.distributed.init_process_group

    def noting(backend, timeout, **options):
        timeouts.append(timeout)
        init(backend, timeout=timeout, **options)

    monkeypatch.setattr(torch.distributed, "init_process_group", noting)
    with sd.process_group():
        host = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        timeouts.append(host.options._timeout)
    assert [timeout.total_seconds() / 60 for timeout in timeouts] == [15, 24 * 60]


def test_runtime_a_child_keeps_no_lock_and_ends_with_its_parent(tmp_path):
    """As a worker that tokenises: its parent is killed, and the folder is free at once."""
    source = f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import simple_distill as sd
with sd.process_group(), sd.lock({str(tmp_path / "out")!r}):
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    print(child, flush=True)
    time.sleep(1000)
"""
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    end = time.time() + 5
    while is_alive(child) and time.time() < end:
        time.sleep(0.02)
    assert not is_alive(child)
    with sd.process_group(), sd.lock(tmp_path / "out"):
        pass


def test_runtime_a_hub_that_is_not_there_is_asked_once(monkeypatch, capsys):
    """For a name of the hub only; from then on libraries take what is on this machine."""
    hub = sd.huggingface_hub.constants
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with sd.process_group():
        sd.check_hub(["demo", "layers:4", "/some/path", "shape.json", None, str(HERE)])
        assert not hub.HF_HUB_OFFLINE
        sd.check_hub(["demo", "owner/name"])
    assert hub.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert "only what is on this machine is used" in capsys.readouterr().out


def test_runtime_what_takes_a_while_says_so_and_what_does_not_is_silent(capsys):
    """Also where nothing else is written meanwhile, and where something is."""
    with sd.progress("a moment", 7):
        print("a word")
        sd.print0("another")
    assert capsys.readouterr() == ("a word\nanother\n", "")
    for total, shown in ((None, "a while ... 00:"), (7, "a while:  43%")):
        seen = ""
        with sd.progress("a while", total) as bar:
            bar.update(3)
            end = time.time() + 60
            while shown not in seen and time.time() < end:
                time.sleep(0.05)
                seen += capsys.readouterr().err
        assert shown in seen
        assert capsys.readouterr().err.endswith(" \r")   # it is cleared


def test_runtime_output_that_nobody_reads_costs_nothing(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)   # as `| head` does
    full = open("/dev/full", "w")
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", full)
        with sd.lasting_output():
            for _ in range(3):
                print("x" * 100_000, flush=True)
                print("y" * 100_000, file=sys.stderr, flush=True)
    full.close()


# --------------------------------------------------------------------------------------------------
# Losses: distillation_loss against float64.

DIVERGENCES = ["forward", "reverse", "jsd"]
HEADS = [{}, dict(bias=True), dict(scale=0.25), dict(softcap=3.0),
         dict(bias=True, scale=1.7, softcap=5.0)]


class Case(NamedTuple):
    """What distillation_loss takes, at random."""
    hidden: torch.Tensor   # [N, D]
    head: sd.Head
    labels: torch.Tensor   # [N], -100: not counted
    teacher: sd.DenseTarget


def case(n=23, vocab=97, d=16, dt=24, *, seed=0, dtype=torch.float32, bias=False, scale=1.0,
         softcap=None, masked=0.3, size=2.0):
    torch.manual_seed(seed)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape)).to(dtype).requires_grad_()

    def head(width):
        weight = normal(vocab, width, std=size / math.sqrt(width))
        return sd.Head(weight, normal(vocab) if bias else None, scale, softcap)

    labels = torch.where(torch.rand(n) < masked, -100, torch.randint(vocab, (n,)))
    return Case(normal(n, d), head(d), labels, sd.DenseTarget(normal(n, dt).detach(), head(dt)))


def apply_head(hidden, head):
    """-> logits in float64."""
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias) * head.scale
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


def with_gradients(losses, case):
    """(loss, ce, kl) and the gradients of loss to hidden, weight and bias, in float64."""
    leaves = [x for x in (case.hidden, *case.head[:2]) if x is not None and x.requires_grad]
    gradients_ = torch.autograd.grad(losses[0], leaves)
    return [x.detach().double() for x in (*losses, *gradients_)]


def exact(case, *, alpha, temperature=1.0, divergence="forward", vocabulary=None):
    """Through full logits in float64."""
    logits = apply_head(case.hidden, case.head)[:, :vocabulary]
    teacher_logits = None
    if alpha < 1:
        teacher_logits = apply_head(*case.teacher)[:, :vocabulary].detach()
    losses = dense_losses(logits, teacher_logits, case.labels, alpha, temperature, divergence)
    return with_gradients(losses, case)


def fused(case, *, temperature=1.0, **options):
    """Through distillation_loss."""
    losses = sd.distillation_loss(*case, temperature=temperature, **options)
    return with_gradients(losses, case)


def off(got, want, floor=1e-300):
    """Largest relative deviation; floor: the size below which a number counts as rounding."""
    return max(((a - b).norm() / b.norm().clamp_min(floor)).item()
               for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_and_gradients_match_float64(head, divergence, temperature, alpha):
    """At alpha 1 the teacher is not asked."""
    options = dict(alpha=alpha, temperature=temperature, divergence=divergence)
    inputs = case(**head)
    want = exact(inputs, **options)
    for chunk in (None, 1, 7):
        assert off(fused(inputs, chunk=chunk, **options), want, floor=1e-3) < 2e-6


def test_losses_take_a_linear_layer_and_a_plain_pair():
    layer = nn.Linear(16, 97)
    inputs = case()._replace(head=sd.Head(layer.weight, layer.bias))
    hidden, head = inputs.teacher
    pair = (hidden, types.SimpleNamespace(weight=head.weight, bias=None))
    losses = sd.distillation_loss(inputs.hidden, layer, inputs.labels, pair, alpha=0.3,
                                  temperature=1.0)
    assert off(with_gradients(losses, inputs), fused(inputs, alpha=0.3)) == 0


@pytest.mark.parametrize("device, vocab, size, budgets", [
    ("cpu", 16384, 2**37, 1), ("cuda", 16383, 2**37, 1), ("cuda", 16384, 2**37, 4),
    ("cuda", 16384, 2**35, 1.6), ("cuda", 16384, 2**33, 1)])
def test_losses_a_large_gpu_takes_larger_chunks(monkeypatch, device, vocab, size, budgets):
    card = types.SimpleNamespace(total_memory=size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    chunk = sd.chunk_size(torch.device(device), 2, vocab)
    assert chunk * 2 * 2 * vocab == pytest.approx(budgets * 2**29, rel=1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_losses_in_bf16_are_within_its_rounding(divergence):
    inputs = case(n=64, vocab=500, d=64, dt=96, dtype=torch.bfloat16)
    options = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    got = fused(inputs, **options, chunk=30)
    want = exact(inputs, **options)
    assert off(got, want) < 2e-2
    assert off(got[:3], want[:3]) < 4e-3   # reductions are in fp32


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_all_masked_are_zero_with_zero_gradients(alpha):
    for value in fused(case(bias=True, masked=1.1), alpha=alpha):
        assert (value == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_of_logits_of_ten_thousand_stay_finite(divergence, temperature):
    inputs = case(size=2e4)
    options = dict(alpha=0.3, temperature=temperature, divergence=divergence)
    got = fused(inputs, **options)
    assert all(value.isfinite().all() for value in got)
    if divergence == "forward":   # reverse and jsd reach log 0 in the reference
        assert off(got, exact(inputs, **options)) < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("nudge", [0.0, 1e-6, 1e-4, 1e-2])
def test_losses_kl_to_almost_oneself_is_never_negative(divergence, temperature, nudge):
    """To oneself it is nothing, and has no gradient."""
    for seed in range(10):
        inputs = case(seed=seed, bias=True)
        near = inputs.hidden.detach() + nudge * torch.randn_like(inputs.hidden)
        _, _, kl, *grads = fused(inputs._replace(teacher=(near, inputs.head)), alpha=0.0,
                                 temperature=temperature, divergence=divergence)
        assert kl > -1e-6
        if nudge == 0:
            assert kl < 1e-6
            assert all((grad == 0).all() for grad in grads)


def test_losses_are_divided_by_the_denominator():
    inputs = case()
    counted = (inputs.labels != -100).sum()
    by_seven = fused(inputs, alpha=0.3, denominator=7.0)
    assert off(by_seven, [value * counted / 7 for value in fused(inputs, alpha=0.3)]) < 1e-6


def test_losses_frozen_parts_get_no_gradient_and_change_nothing_else():
    inputs = case(bias=True)
    whole = fused(inputs, alpha=0.3)   # loss, ce, kl, gradients of hidden, weight, bias
    for i, part in enumerate((inputs.hidden, *inputs.head[:2]), 3):
        part.requires_grad_(False)
        assert off(fused(inputs, alpha=0.3), whole[:i] + whole[i + 1:]) == 0
        part.requires_grad_(True)


def test_losses_an_evaluation_forms_no_gradient(monkeypatch):
    """Whether a weight would need one says nothing under no_grad."""
    inputs = case()
    want = fused(inputs, alpha=0.3)[:3]
    monkeypatch.delattr(sd, "add_product")
    with torch.no_grad():
        losses = sd.distillation_loss(*inputs, alpha=0.3, temperature=1.0)
    assert off(losses, want) == 0


@pytest.mark.parametrize("student, teacher, vocabulary", [(97, 97, 80), (80, 97, None),
                                                          (97, 80, None), (90, 85, 80)])
def test_losses_beyond_the_common_vocabulary_heads_are_cut(student, teacher, vocabulary):
    options = dict(alpha=0.3, temperature=2.0)
    inputs = case(bias=True)
    inputs.labels.clamp_(max=79)

    def cut(head, rows):
        return head._replace(weight=head.weight[:rows], bias=head.bias[:rows])

    losses = sd.distillation_loss(
        inputs.hidden, cut(inputs.head, student), inputs.labels,
        (inputs.teacher.hidden, cut(inputs.teacher.head, teacher)), vocabulary=vocabulary,
        **options)
    assert off(with_gradients(losses, inputs), exact(inputs, vocabulary=80, **options)) < 1e-6


def with_rest(listed_logp, whole):
    """-> log-probabilities of what is listed and, unless that is all, of the rest as one bucket."""
    if whole:
        return listed_logp
    rest = (1 - listed_logp.exp().sum(-1, keepdim=True)).log()
    return torch.cat([listed_logp, rest], -1)


@pytest.mark.parametrize("k", [1, 8, 97])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_sparse_teacher_is_the_dense_one_with_the_rest_as_one_bucket(k, temperature):
    inputs = case(masked=0)
    whole = k == 97   # of the vocabulary
    logq, ids = F.log_softmax(apply_head(*inputs.teacher) / temperature, -1).detach().topk(k)
    logits = apply_head(inputs.hidden, inputs.head)
    logp = F.log_softmax(logits / temperature, -1).gather(-1, ids)
    q = with_rest(logq, whole).exp()
    kl = (q * (q.log() - with_rest(logp, whole))).sum(-1).mean() * temperature ** 2
    ce = F.cross_entropy(logits, inputs.labels)
    want = with_gradients((0.3 * ce + 0.7 * kl, ce, kl), inputs)
    if whole:   # what is listed twice adds up
        ids = ids.repeat(1, 2)
        logq = logq.repeat(1, 2) - math.log(2)
    target = sd.SparseTarget(ids, logq.exp().float(), q[:, k:].sum(-1).float(),
                             -(q * q.log()).sum(-1).float())
    got = fused(inputs._replace(teacher=target), alpha=0.3, temperature=temperature, chunk=9)
    assert off(got, want) < 2e-6


@pytest.mark.parametrize("gap", [20.0, 40.0, 60.0])
def test_losses_a_student_without_unlisted_mass_is_still_pulled_to_it(gap):
    """The teacher leaves 5 % to what it does not list, where the student has exp(-gap) of its
    mass: its gradient there is -0.05, however little that mass is."""
    logits = torch.tensor([gap, gap + 0.1, 0.2, 0.3, 0.4]).double().requires_grad_()
    q = torch.tensor([[0.6, 0.35]])
    logp = logits.log_softmax(-1)
    kl = -(q * logp[:2]).sum() - 0.05 * logp[2:].logsumexp(-1)
    want, = torch.autograd.grad(kl, logits)
    weight = logits.detach().float()[:, None].requires_grad_()
    target = sd.SparseTarget(torch.tensor([[0, 1]]), q, torch.tensor([0.05]), torch.zeros(1))
    inputs = Case(torch.ones(1, 1), sd.Head(weight), torch.tensor([0]), target)
    loss, _, _, grad = fused(inputs, alpha=0.0)
    assert loss.item() == pytest.approx(kl.item(), rel=1e-5)
    torch.testing.assert_close(grad[:, 0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.campaign
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_compiled_loss_matches_float64(divergence, temperature):
    options = dict(alpha=0.3, temperature=temperature, divergence=divergence)
    for n in (50, 7):   # of a vocabulary that is large enough for the compiler to be called
        inputs = case(n=n, vocab=20000)
        assert off(fused(inputs, **options), exact(inputs, **options)) < 2e-6


WITHOUT_COMPILER = """
import test_simple_distill as t
for n in (5, 9):
    inputs = t.case(n=n, vocab=20000)
    assert t.off(t.fused(inputs, alpha=0.3), t.exact(inputs, alpha=0.3)) < 2e-6
"""


@pytest.mark.campaign
def test_losses_without_a_compiler_the_loss_says_so_once_and_is_right(tmp_path):
    env = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], cwd=HERE, env=env,
                          capture_output=True, text=True, timeout=300)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert shown.count("no working compiler") == 1, shown


# --------------------------------------------------------------------------------------------------
# Data: formats, splits, targets, tokenizers, batches.


def test_data_longer_prompts_change_nothing_but_the_context(tmp_path, student):
    """In a model whose attention adds nothing a token sees only itself: then only counted tokens
    can make a difference."""
    blind = tiny_model(tmp_path / "blind", tokenizer=tiny_tokenizer(CHATML))
    teacher = tiny_model(tmp_path / "teacher", seed=5)

    def silence(tensors):
        for name in tensors:
            if "o_proj" in name:
                tensors[name].zero_()

    edit_weights(blind, silence)
    grads = []
    losses = []
    for name, prompt in (("short", "a"), ("long", prose(30))):
        rows = [{**row, "prompt": prompt} for row in talk(8)]
        out = str(tmp_path / name)
        distil(out, student=blind, teacher=teacher, alpha=1.0, batch_size=8, max_steps=1,
               seq_len=400, dataset=write_splits(tmp_path / f"{name}-data", rows, rows[:2]),
               max_grad_norm=0)
        losses.append(column(out, "train/loss"))
        grads.append({k: v for k, v in gradients(out).items() if "o_proj" not in k})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert distance(grads[0], grads[1]) < 1e-6


def test_data_the_label_is_the_next_token(tmp_path, out):
    """A model that knows a -> b -> ... -> h -> end -> a by heart has no loss left, unless the shift
    is missing or doubled."""
    path = tiny_model(tmp_path / "abc", hidden=264, layers=1)
    order = tiny_tokenizer().encode("abcdefgh<|endoftext|>")

    def learn_by_heart(tensors):
        for name in tensors:
            tensors[name].fill_(1 if "norm" in name else 0)
        for token, following in zip(order, order[1:] + order[:1]):
            tensors["model.embed_tokens.weight"][token, token] = 1
            tensors["lm_head.weight"][following, token] = 2

    edit_weights(path, learn_by_heart)
    dataset = write_jsonl(tmp_path / "d.jsonl", [{"text": "abcdefgh"}] * 40)
    distil(out, student=path, dataset=dataset, alpha=1.0, max_steps=1, learning_rate=STILL)
    assert column(out, "train/ce_loss")[0] < 1e-6
    assert column(out, "eval/ce_loss")[0] < 1e-6


def test_data_collate_shifts_before_it_masks():
    rows = [
        {"input_ids": [5, 6, 7, 8], "targets": [False, False, True, True]},
        {"input_ids": [9, 10], "targets": None},
    ]
    batch = sd.collate(rows)
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 8, 10]


def test_data_another_tokenizer_of_equal_size_is_refused(tmp_path, out, teacher, text):
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(roll=1))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    err = distil(out, rc=2, teacher=teacher, student=other, dataset=text, max_steps=1).err
    assert f"token {len(SPECIAL)} " in err   # the first that differs, and what both make of it
    assert repr(letters[0]) in err
    assert repr(letters[1]) in err
    assert not os.path.exists(out)


def test_data_same_tokens_but_other_merges_are_refused(tmp_path, out, text):
    one = tiny_tokenizer(merges=("t u", "u r"))
    two = tiny_tokenizer(merges=("u r", "t u"))
    assert one.get_vocab() == two.get_vocab()
    teacher = tiny_model(tmp_path / "t", vocab=len(one), tokenizer=one)
    student = tiny_model(tmp_path / "s", vocab=len(two), tokenizer=two)
    distil(out, rc=2, teacher=teacher, student=student, dataset=text, max_steps=1)


# ---- which tokens are targets


def target_runs(row, tokenizer):
    """Each contiguous run of targets as text."""
    targets = row["targets"]
    if targets is None:
        targets = [True] * len(row["input_ids"])
    runs = []
    pairs = zip(targets, row["input_ids"])
    for is_target, run in itertools.groupby(pairs, key=lambda pair: bool(pair[0])):
        if is_target:
            runs.append(tokenizer.decode([int(token) for _, token in run]))
    return runs


def encode(rows, tokenizer, seq_len=512, packing="auto"):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return sd.rows_from_columns(sd.encode(columns, tokenizer, "text", seq_len, packing))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    user("hello there"), assistant("hello there"),
    user("2+2?"), assistant("It is 4.\nTruly."),
]
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    " {{ m['content'] }}{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]"
    "{% endif %}{% endfor %}")
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1].strip() }}{% endif %}<|im_end|>\n{% endfor %}")
NO_END = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"


@pytest.mark.parametrize("template, end_mark", [
    pytest.param(CHATML, "<|im_end|>", id="chatml"),
    pytest.param(LLAMA3, "<|eot_id|>", id="llama3"),
    pytest.param(MARKED, "<|im_end|>", id="marked"),
    pytest.param(MISTRAL, "<|endoftext|>", id="mistral"),
    pytest.param(NO_END, "", id="no_end"),
    pytest.param(None, "<|endoftext|>", id="none"),
])
@pytest.mark.parametrize("bos", [False, True])
def test_data_only_the_assistants_tokens_and_their_end_mark_are_targets(template, end_mark, bos):
    tokenizer = tiny_tokenizer(template, bos=bos)
    row, = encode([{"messages": TWO_TURNS}], tokenizer)
    assert target_runs(row, tokenizer) == ["hello there" + end_mark, "It is 4.\nTruly." + end_mark]
    if template:   # and the ids are those that the template makes, with no second <|begin|>
        ids = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
        assert row["input_ids"] == ids


@pytest.mark.parametrize("said, shown", [
    ("  spaced out \n", "spaced out"),
    ("x", "x"),
    ("<|im", "<|im"),
    ("user", "user"),
    ("é日本🙂", "é日本🙂"),
    ("<|eot_id|>", "<|eot_id|>"),
    ("assistant", "assistant"),
])
def test_data_odd_answers_are_found_exactly(said, shown):
    tokenizer = tiny_tokenizer(LLAMA3)
    row, = encode([{"messages": [user(said), assistant(said)] * 2}], tokenizer)
    runs = target_runs(row, tokenizer)
    if shown in SPECIAL:
        # an answer that is itself an end mark: nothing can tell them apart, and nothing else may
        # be counted
        assert all(set(run) <= set("<|eot_id|>") for run in runs)
    else:
        assert runs == [shown + "<|eot_id|>"] * 2


def test_data_templates_that_rewrite_earlier_turns():
    tokenizer = tiny_tokenizer(THINKING)
    turns = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>so</think>d")]
    row, = encode([{"messages": turns}], tokenizer)
    assert target_runs(row, tokenizer) == ["b<|im_end|>", "<think>so</think>d<|im_end|>"]


# ---- thoughts and calls of tools, by the templates of those models, shortened

QWEN3 = """
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for m in messages[::-1] %}
{%- if ns.searching and m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.searching = false %}
{%- set ns.last_query = messages|length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or m.role == 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}
{%- set thought = '' %}
{%- if m.reasoning_content is defined and m.reasoning_content is not none %}
{%- set thought = m.reasoning_content %}
{%- elif '</think>' in m.content %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if loop.index0 > ns.last_query and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- content }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
{%- set call = call.function or call %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA31 = """{{- bos_token }}
{%- for m in messages %}
{%- if not (m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}
{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
{{- '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GLM = """[gMASK]<sop>
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' -%}
<|assistant|>
{%- if loop.index0 > ns.last_user and m.reasoning_content is string -%}
{{ '\\n<think>' + m.reasoning_content.strip() + '</think>' }}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if m.content.strip() -%}{{ '\\n' + m.content.strip() }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{ '\\n<tool_call>' + call.function.name }}
{%- for name, value in call.function.arguments.items() -%}
{{ '\\n<arg_key>' + name + '</arg_key>\\n<arg_value>' + value + '</arg_value>' }}
{%- endfor -%}
{{ '\\n</tool_call>' }}
{%- endfor -%}
{%- elif m.role == 'tool' -%}
<|observation|>{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else -%}
<|{{ m.role }}|>{{ '\\n' + m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
MISTRAL_TOOLS = """
{%- for m in messages | rejectattr('role', 'equalto', 'tool')
                      | selectattr('tool_calls', 'undefined') %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- else %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""
CALL = {"type": "function", "id": "abcdefghi",
        "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL_TURNS = [
    user("how is it?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "grey", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Dull.", "reasoning_content": "grey is dull"},
]


@pytest.mark.parametrize("template, targets", [
    pytest.param(QWEN3, [
        '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>',
        "<think>\ngrey is dull\n</think>\n\nDull.<|im_end|>"], id="qwen3"),
    pytest.param(LLAMA31, [
        '{"name": "look", "parameters": {"at": "sky"}}<|eot_id|>', "Dull.<|eot_id|>"],
        id="llama3.1"),
    pytest.param(GLM, [
        "\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>sky</arg_value>\n"
        "</tool_call><|observation|>",
        "\n<think>grey is dull</think>\nDull."], id="glm"),
    pytest.param(MISTRAL_TOOLS, [
        '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "sky"}, "id": "abcdefghi"}]'
        "<|endoftext|>", "Dull.<|endoftext|>"], id="mistral"),
])
def test_data_calls_of_tools_and_thoughts_are_targets(tmp_path, template, targets):
    """Read from a file, so that each message has the fields of all others, as nulls; arguments come
    as an object or, as APIs give them, as JSON in a string."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": [
        "<|user|>", "<|assistant|>", "<|observation|>"]})
    for i, arguments in enumerate(({"at": "sky"}, '{"at": "sky"}')):
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        turns = [TOOL_TURNS[0], {**TOOL_TURNS[1], "tool_calls": [call]}, *TOOL_TURNS[2:]]
        rows = [{"messages": turns}, {"messages": turns[:2]}]   # the second is only a call
        train, _ = rows_of(write_splits(tmp_path / str(i), rows, rows), tokenizer, seq_len=512)
        assert target_runs(train[0], tokenizer) == targets
        mark = targets[0].replace("<|observation|>", "")   # which is the next turn's
        assert target_runs(train[1], tokenizer) in (
            [targets[0]], [mark],
            ["<think>\n\n</think>\n\n" + targets[0]])   # Qwen's last turn always thinks


def test_data_the_thoughts_of_qwen3_are_targets_where_its_template_keeps_them():
    tokenizer = tiny_tokenizer(QWEN3)
    turns = [
        user("a"), assistant("<think>\nhm\n</think>\n\nb"),
        user("c"), {"role": "assistant", "content": "", "reasoning_content": "look",
                    "tool_calls": [CALL]},
        {"role": "tool", "content": "blue"}, assistant("<think>\nso\n</think>\n\nd"),
    ]
    row, = encode([{"messages": turns}], tokenizer)
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'
    assert target_runs(row, tokenizer) == [
        "b<|im_end|>", "<think>\nlook\n</think>\n\n" + call,
        "<think>\nso\n</think>\n\nd<|im_end|>"]
    row, = encode([{"messages": [*turns, user("e"), assistant("f")]}], tokenizer)
    assert target_runs(row, tokenizer) == [
        "b<|im_end|>", call, "d<|im_end|>", "<think>\n\n</think>\n\nf<|im_end|>"]
    assert not encode([{"messages": [user("a"), assistant("")]}], tokenizer)   # says nothing


# ---- from files to rows


def rows_of(dataset, tokenizer=None, **fields):
    """What load_data hands on, as lists: (train rows, held-out rows)."""
    usual = {"dataset": str(dataset), "teacher": "t", "student": "s", "seq_len": 64}
    cfg = config.Config(**{**usual, **fields})
    with contextlib.redirect_stdout(io.StringIO()), sd.process_group():
        train, held_out = sd.load_data(cfg, tokenizer or tiny_tokenizer())
        return [dict(row) for row in train], [dict(row) for row in held_out]


def ids_of(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


def decoded(rows):
    return [tiny_tokenizer().decode(ids) for ids in ids_of(rows)]


STYLES = {
    "messages": {"messages": [user("why?"), assistant("so")]},
    "response": {"prompt": "why?", "response": "so"},
    "completion": {"prompt": "why?", "completion": "so"},
    "answer": {"question": "why?", "answer": "so"},
    "output": {"instruction": "why?", "output": "so"},
    "empty_input": {"instruction": "why?", "input": "", "output": "so"},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_data_conversation_columns(tmp_path, style, suffix):
    rows = [STYLES[style]] * 4
    path = str(tmp_path / f"d.{suffix}")
    if suffix == "jsonl":
        write_jsonl(path, rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    tokenizer = tiny_tokenizer(CHATML)
    train, held_out = rows_of(path, tokenizer)
    for row in train + held_out:
        assert target_runs(row, tokenizer) == ["so<|im_end|>"]
        shown = tokenizer.decode(row["input_ids"])
        assert shown.startswith("<|im_start|>user\nwhy?<|im_end|>")


def test_data_instruction_with_input_shows_both(tmp_path):
    tokenizer = tiny_tokenizer(CHATML)
    row, = encode([{"instruction": "add", "input": "1 and 2", "output": "3"}], tokenizer)
    shown = tokenizer.decode(row["input_ids"])
    assert shown.index("add") < shown.index("1 and 2") < shown.index("assistant")
    assert target_runs(row, tokenizer) == ["3<|im_end|>"]


def test_data_one_conversation_a_row_cut_to_seq_len_and_dropped_without_targets(tmp_path, out,
                                                                                student):
    sizes = [(2, 10), (3, 10), (4, 100), (16, 10), (500, 10)]   # of prompt and response
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in sizes]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    train, _ = rows_of(path, seq_len=16)
    assert [len(row["input_ids"]) for row in train] == [14, 15, 16]
    assert [sum(row["targets"]) for row in train] == [11, 11, 11]
    shown = distil(out, student=student, dataset=path, alpha=1.0, max_steps=1, seq_len=16)
    assert "dropped 2 of 5" in shown.out + shown.err


def test_data_text_is_joined_with_eos_and_cut_into_blocks(tmp_path):
    docs = [prose(5 + i, i) for i in range(6)]
    path = write_splits(
        tmp_path / "d", [{"text": doc} for doc in docs], [{"text": "held out text here"}])
    train, held_out = rows_of(path, seq_len=16)
    stream = tiny_tokenizer().encode("".join(doc + "<|endoftext|>" for doc in docs))
    assert ids_of(train) == [stream[i:i + 16] for i in range(0, len(stream), 16)]
    for row in train:
        assert row["targets"] is None or all(row["targets"])
    assert decoded(held_out)[0] == "held out text he"


def llama_tokenizer(**fields):
    """One letter a token, a "▁" for each blank and before the text."""
    tokens = ["<unk>", "<s>", "</s>", *string.ascii_letters, ".", ",", "▁"]
    return transformers.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], **fields)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_data_blocks_of_text_begin_with_the_tokenizers_bos(tmp_path, kind):
    """As part of seq_len, and nowhere else, though a text has it written out: no label is one."""
    tokenizer = tiny_tokenizer(bos=True) if kind == "gemma" else llama_tokenizer(add_bos_token=True)
    bos = tokenizer.bos_token_id
    assert tokenizer("one")["input_ids"][0] == bos
    docs = [prose(5 + i, i) for i in range(6)] + [tokenizer.bos_token + "one two"]
    path = write_splits(tmp_path / "d", [{"text": doc} for doc in docs], [{"text": "held out"}])
    train, held_out = rows_of(path, tokenizer, seq_len=16)
    stream = []
    for doc in docs:
        ids = tokenizer(doc, add_special_tokens=False)["input_ids"]
        stream += [i for i in ids if i != bos] + [tokenizer.eos_token_id]
    assert ids_of(train) == [[bos, *stream[i:i + 15]] for i in range(0, len(stream), 15)]
    for row in train + held_out:
        assert row["targets"] is None
        assert row["input_ids"][0] == bos
        assert bos not in sd.collate([row]).labels
        assert len(sd.collate([row]).labels) == len(row["input_ids"]) - 1


@pytest.mark.parametrize("kind, expected", [
    ("gpt", "d5359dc494097716"),
    ("llama", "da49177e39b83bc4"),
])
def test_data_blocks_without_bos_are_those_of_old(tmp_path, kind, expected):
    """Of tokenizers that add none, also where one has the token; by the digest of the version
    before."""
    tokenizer = tiny_tokenizer() if kind == "gpt" else llama_tokenizer(add_bos_token=False)
    rows = encode([{"text": prose(5 + i, i)} for i in range(6)], tokenizer, seq_len=16)
    assert sd.rows_digest(datasets.Dataset.from_list(rows, features=sd.TOKEN_FEATURES)) == expected


def test_data_every_local_format_gives_the_same_rows(tmp_path):
    docs = [prose(6 + i, i) + "\n" + prose(3, i) for i in range(25)]
    rows = [{"text": doc} for doc in docs]
    table = datasets.Dataset.from_dict({"text": docs, "other": list(range(25))})
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table.to_csv(str(tmp_path / "d.csv"))
    table.to_parquet(str(tmp_path / "d.parquet"))
    (tmp_path / "d.txt").write_text("\n\n".join(docs))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "saved_dict"))
    want = [ids_of(rows) for rows in rows_of(tmp_path / "d.jsonl")]
    assert len(want[0]) > 20
    assert len(want[1]) >= 1
    for name in ("d.json", "d.csv", "d.parquet", "d.txt", "saved", "saved_dict"):
        assert [ids_of(rows) for rows in rows_of(tmp_path / name)] == want, name


def test_data_tokenising_in_several_processes_gives_the_same_rows(tmp_path, student, chat):
    """In a process of its own: forking with threads about, a deadlock would take the other tests
    along."""
    fields = dict(student=student, dataset=chat, alpha=1.0, batch_size=8, max_steps=1, seq_len=256)
    one = tmp_path / "one"
    two = tmp_path / "two"
    distil(one, **fields)
    process = spawn(*flags(**PLAIN | fields, output_dir=two, num_proc=2))
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert column(two, "train/loss") == pytest.approx(column(one, "train/loss"), rel=1e-6)


def kept_files():
    """Of tokenised rows."""
    return set(Path(os.environ["HF_DATASETS_CACHE"]).glob("simple_distill/*"))


def test_data_tokenised_rows_are_kept_for_the_next_run(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": prose(20, i)} for i in range(30)])
    before = kept_files()
    first = ids_of(rows_of(path)[0])
    after_first = kept_files()
    assert after_first != before
    assert ids_of(rows_of(path)[0]) == first
    assert kept_files() == after_first
    assert ids_of(rows_of(path, seq_len=32)[0]) != first
    assert kept_files() != after_first


def test_data_formats_run_through_the_command_line(tmp_path, student, text):
    table = datasets.load_dataset("json", data_files=text, split="train")
    table.to_parquet(str(tmp_path / "d.parquet"))
    fields = dict(student=student, alpha=1.0, max_steps=2)
    distil(tmp_path / "jsonl", dataset=text, **fields)
    distil(tmp_path / "parquet", dataset=tmp_path / "d.parquet", **fields)
    assert same(final_weights(tmp_path / "jsonl"), final_weights(tmp_path / "parquet"))


def test_data_text_column_and_unknown_columns(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"body": prose(20, i), "id": i} for i in range(10)])
    fields = dict(student=student, dataset=path, alpha=1.0, max_steps=1)
    err = distil(out, rc=2, **fields).err
    assert "'text'" in err
    assert "body" in err
    assert "id" in err
    distil(out, **fields, text_column="body")


# ---- packing


def documents_of(rows):
    """-> {(ids, which are targets) of a document: how often}, of rows that hold one or several."""
    documents = collections.Counter()
    for row in rows:
        ids = list(map(int, row["input_ids"]))
        targets = [True] * len(ids)   # None: all are
        if row["targets"] is not None:
            targets = list(map(bool, row["targets"]))
        starts = list(map(int, row.get("starts", [0])))
        for start, end in itertools.pairwise([*starts, len(ids)]):
            # the first is no target whatever it says: nothing comes before it
            documents[tuple(ids[start:end]), tuple(targets[start + 1:end])] += 1
    return documents


def padding_by_hand(lengths, batch_size, seed=0):
    """Of an epoch, batch after batch."""
    order = sd.shuffled(len(lengths), seed, 0).tolist()
    places = 0
    for i in range(0, len(order), batch_size):
        batch = [lengths[k] for k in order[i:i + batch_size]]
        places += max(batch) * len(batch)
    return 1 - sum(lengths) / places


@pytest.mark.parametrize("kind", ["talk", "text", "text after bos"])
def test_data_packed_documents_are_whole_and_each_is_there_once(tmp_path, kind):
    """Those of packing rows, several a row; an epoch counts each of their targets once, and no
    label crosses from one into the next."""
    tokenizer = tiny_tokenizer(CHATML, bos=kind == "text after bos")
    rows = talk(150) if kind == "talk" else [{"text": prose(1 + i % 40, i)} for i in range(150)]
    path = write_splits(tmp_path / "d", rows, rows[:9])
    apart, held_out = rows_of(path, tokenizer, seq_len=128, packing="rows")
    packed, packed_held_out = rows_of(path, tokenizer, seq_len=128, packing="documents")
    assert documents_of(packed) == documents_of(apart)
    assert len(apart) >= len(rows)
    if kind != "talk":   # a long text goes on in another document: all of its tokens are predicted
        predicted = [i for row in apart for i in row["input_ids"][1:]]
        expected = []
        for row in rows:
            ids = tokenizer.encode(row["text"] + "<|endoftext|>", add_special_tokens=False)
            expected += ids if tokenizer("a")["input_ids"][0] == 1 else ids[1:]
        assert predicted == expected
    assert len(packed) < len(apart) / 1.3
    assert max(len(row["input_ids"]) for row in packed) <= 128
    for row in packed:
        assert row["starts"][0] == 0
        assert not any(row["targets"][start] for start in row["starts"])
    # held-out documents stand alone: what is measured on them does not depend on the packing
    assert ids_of(packed_held_out) == ids_of(held_out)
    assert not any("starts" in row for row in packed_held_out)

    labels = {}
    for name, rows_here in (("apart", apart), ("packed", packed)):
        batches = sd.indexed_batches(rows_here, 0, 4, 0)
        counted = collections.Counter()
        for numbers, _ in itertools.islice(batches, math.ceil(len(rows_here) / 4)):
            batch = sd.collate([rows_here[i] for i in numbers])
            before = batch.input_ids.flatten()[batch.positions].tolist()
            counted.update(zip(before, batch.labels.tolist(), strict=True))
        labels[name] = counted
    assert labels["packed"] == labels["apart"]


def test_data_documents_begin_at_position_0_and_so_does_padding():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "targets": [False, True, False, True, True],
         "starts": [0, 2]},
        {"input_ids": [1, 2, 3], "targets": [False, False, True], "starts": [0, 1]},
    ]
    batch = sd.collate(rows)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert batch.labels.tolist() == [6, 8, 9, 3]
    assert sd.collate([{**row, "starts": [0]} for row in rows]).position_ids.tolist() == [
        [0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert sd.collate([{"input_ids": [5, 6], "targets": None}]).position_ids is None


def test_data_as_few_rows_as_the_documents_need():
    pick = random.Random(0)
    for _ in range(50):
        lengths = [pick.randint(2, 64) for _ in range(pick.randint(1, 200))]
        rows = sd.fit_into_rows(lengths, 64)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
        # what is proven of it: 11/9 of the best, and a little
        assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 64) + 1 + len(lengths) / 12
    assert sd.fit_into_rows([3, 5, 2, 6], 8) == [[0, 1], [2, 3]]


def test_data_totals_and_padding_are_said(tmp_path, student, out):
    rows = talk(30)
    path = write_splits(tmp_path / "d", rows, rows[:2])
    fields = dict(student=student, dataset=path, alpha=1.0, max_steps=1, seq_len=128, batch_size=4)
    apart, _ = rows_of(path, seq_len=128)
    packed, _ = rows_of(path, seq_len=128, packing="documents")
    lengths = [len(row["input_ids"]) for row in apart]
    tokens = sum(lengths)
    targets = sum(sum(row["targets"][1:]) for row in apart)
    share = padding_by_hand(lengths, 4)
    totals = f"{tokens:,} tokens, {targets:,} targets"
    shown = distil(f"{out}-rows", **fields).out
    assert f"train: 30 rows, {totals}; {share:.1%} of 4 rows together is padding\n" in shown
    packed_share = padding_by_hand([len(row["input_ids"]) for row in packed], 4)
    assert packed_share < share / 2
    share = padding_by_hand([len(ids) for ids, _ in documents_of(packed).elements()], 4)
    shown = distil(f"{out}-documents", **fields, packing="documents").out
    assert (f"train: 30 documents in {len(packed)} rows, {totals}; {packed_share:.1%} of 4 rows "
            f"together is padding, with one document a row {share:.1%}\n") in shown
    text = write_splits(tmp_path / "text", [{"text": "abcdef"}] * 8, [TEXT_ROW])
    shown = distil(f"{out}-text", **{**fields, "dataset": text, "seq_len": 16}).out
    assert "train: 4 rows, 56 tokens, 52 targets; 12.5% of 4 rows" in shown


def test_data_blocks_are_of_text_alone(tmp_path, out, student, chat):
    err = distil(out, rc=2, student=student, dataset=chat, alpha=1.0, packing="blocks").err
    assert "row 1: a conversation; blocks are of plain text: use --packing rows or" in err
    text = [{"text": prose(5 + i, i)} for i in range(9)]
    assert encode(text, tiny_tokenizer(), 16, "blocks") == encode(text, tiny_tokenizer(), 16)


def test_data_a_dry_run_shows_where_documents_begin(tmp_path, out, student):
    rows = [{"prompt": "a", "response": "bc"}, {"prompt": "d", "response": "ef"}]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    shown = distil(out, student=student, dataset=path, alpha=1.0, packing="documents", dry_run=True)
    first = "'a\\n[[bc<|endoftext|>]] || d\\n[[ef<|endoftext|>]]'"
    assert first in shown.out, shown.out


# ---- splits


def test_data_held_out_rows_are_never_trained_on(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": f"answer {i:03d}"} for i in range(100)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    train, held_out = rows_of(path)
    assert held_out
    assert len(train) + len(held_out) == 100
    assert len(set(decoded(train + held_out))) == 100   # so that none is in both
    assert [ids_of(rows) for rows in rows_of(path)] == [ids_of(train), ids_of(held_out)]
    assert len(rows_of(path, eval_samples=2)[1]) <= 2


def numbers_in(rows):
    return set(re.findall(r"<(\d{3})>", "".join(decoded(rows))))


def test_data_text_that_is_held_out_is_in_no_block_of_train(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    train, held_out = rows_of(path)
    assert numbers_in(held_out)
    assert not numbers_in(train) & numbers_in(held_out)


def test_data_eval_split_is_used_where_there_is_one(tmp_path, out, student, chat):
    assert [len(rows) for rows in rows_of(chat, seq_len=256)] == [8, 4]
    five = datasets.Dataset.from_list(talk(5))
    three = datasets.Dataset.from_list(talk(3))
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=five, other=three).save_to_disk(str(saved))
    named = rows_of(saved, eval_split="other", seq_len=256)
    assert [len(rows) for rows in named] == [5, 3]
    swapped = rows_of(saved, train_split="other", eval_split="train", seq_len=256)
    assert [len(rows) for rows in swapped] == [3, 5]
    fields = dict(student=student, dataset=saved, alpha=1.0, max_steps=1)
    assert "absent" in distil(out, rc=2, **fields, eval_split="absent").err
    assert "absent" in distil(out, rc=2, **fields, train_split="absent").err


def test_data_max_samples_takes_the_first_rows(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": "a"} for i in range(40)]
    train, _ = rows_of(write_splits(tmp_path / "d", rows, rows[:1]), max_samples=7)
    numbers = [re.search(r"\d+", shown)[0] for shown in decoded(train)]
    assert numbers == [f"{i:03d}" for i in range(7)]


def test_data_one_long_document_keeps_its_end_for_evaluation(tmp_path):
    (tmp_path / "d.txt").write_text(prose(2000))
    train, held_out = rows_of(tmp_path / "d.txt")
    assert len(held_out) >= 1
    assert "".join(decoded(train + held_out)) == prose(2000) + "<|endoftext|>"


def splits_of(**fields):
    return sd.load_splits(config.Config(**fields))


def test_data_splits_by_their_role(tmp_path, text):
    """One file has one split, train; asked for by its own name it is all evaluated, and a name it
    has not is refused by that name."""
    with pytest.raises(config.UserError, match="no split 'validation'"):
        splits_of(dataset=text, train_split="validation")
    with pytest.raises(config.UserError, match="no split 'test'"):
        splits_of(dataset=text, eval_split="test")
    train, held_out = splits_of(dataset=text, eval_split="train")
    assert len(train) + len(held_out) == 40
    assert len(held_out) == 2
    _, whole = splits_of(mode="eval", dataset=text, eval_split="train")   # optional: eval
    assert len(whole) == 40   # optional: eval


TEXT_ROW = {"text": "one two"}
PROMPT_ROW = {"prompt": "c", "response": "d"}
SHAREGPT_ROW = {"conversations": [{"role": "user", "value": "a"},
                                  {"role": "assistant", "value": "b"}]}
TURNS_ROW = {"prompt": [user("a")], "response": "b"}


@pytest.mark.parametrize("first, other, sequences", [
    ({"messages": "hi", "text": "one two"}, TEXT_ROW, 1),   # texts share a block
    ({"text": None}, TEXT_ROW, 1),
    ({"prompt": "a", "response": None}, PROMPT_ROW, 2),
    (SHAREGPT_ROW, SHAREGPT_ROW, 3),
    (TURNS_ROW, TURNS_ROW, 3),
])
def test_data_odd_rows_are_read_as_they_are_meant(tmp_path, student, first, other, sequences):
    """Columns in another's style, and rows without a value at the beginning."""
    path = write_jsonl(tmp_path / "data.jsonl", [first, other, other])
    table = datasets.load_dataset(
        "json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    encoded = sd.encode(table[:], tiny_tokenizer(), "text", 99, "auto")
    splits_of(dataset=path)   # does not refuse it
    assert len(encoded["input_ids"]) == sequences


# ---- order and size


def test_data_an_epoch_sees_every_row_once_in_an_order_of_its_own(tmp_path, out, student):
    """Rows of equal length and a student that stands still: the mean of the steps, weighted by
    rows, is the mean of the rows."""
    rows = [{"prompt": prose(2, i), "response": f"{prose(9, i):.9}"} for i in range(10)]
    dataset = write_splits(tmp_path / "d", rows, rows)
    distil(out, student=student, dataset=dataset, seq_len=256, alpha=1.0, batch_size=4,
           num_epochs=2, learning_rate=STILL)
    losses = column(out, "train/loss")
    first_epoch = losses[:3]
    second_epoch = losses[3:]
    mean = column(out, "eval/loss")[-1]
    for epoch in (first_epoch, second_epoch):
        assert (4 * epoch[0] + 4 * epoch[1] + 2 * epoch[2]) / 10 == pytest.approx(mean, rel=1e-6)
    assert first_epoch != second_epoch


def test_data_a_line_of_10_mb_is_read_or_named(tmp_path, out, student):
    long_line = json.dumps({"text": "word " * 2_000_000}) + "\n"
    (tmp_path / "a.jsonl").write_text(long_line + GOOD_LINE * 9)
    distil(out, student=student, alpha=1, dataset=tmp_path / "a.jsonl", max_steps=1, eval_samples=4)
    assert len(column(out, "train/loss")) == 1


# ---- what a row is worth: digests, and what encode depends on


def train_rows_of(dataset, tokenizer=None, **fields):
    """What load_data hands on to train on, as it is."""
    usual = {"dataset": str(dataset), "teacher": "t", "student": "s", "seq_len": 64}
    cfg = config.Config(**{**usual, **fields})
    with contextlib.redirect_stdout(io.StringIO()), sd.process_group():
        return sd.load_data(cfg, tokenizer or tiny_tokenizer())[0]


def test_data_rows_digest_is_of_every_row_and_of_nothing_else(tmp_path):
    """Not of the file's name, size or age: resume compares it."""
    rows = talk(300)
    train = train_rows_of(write_splits(tmp_path / "d", rows, rows[:1]))
    before = sd.rows_digest(train)
    assert re.fullmatch("[0-9a-f]{16}", before)
    moved = train_rows_of(write_splits(tmp_path / "other", rows, rows[:1]))
    assert sd.rows_digest(moved) == before
    text = train_rows_of(write_splits(tmp_path / "text", [{"text": prose(99)}], [TEXT_ROW]))
    assert sd.rows_digest(text) != before   # no targets, which is: all of them
    for i in (0, 150, 299):
        edited = [*rows]
        edited[i] = {**rows[i], "response": rows[i]["response"].swapcase()}   # as long as before
        path = write_splits(tmp_path / f"edited-{i}", edited, rows[:1])
        assert sd.rows_digest(train_rows_of(path)) != before, i
    half = train_rows_of(write_splits(tmp_path / "half", rows[:150], rows[:1]))
    assert sd.rows_digest(half) == sd.rows_digest(train.take(150)) != before
    assert sd.rows_digest(train.to_iterable_dataset()) is None


def test_data_everything_that_encode_depends_on_is_in_the_fingerprint(tmp_path, monkeypatch):
    """What is changed without changing the vocabulary: the marks, the templates, the tables, the
    code, also of a helper that a fork has added."""
    raw = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])

    def fingerprint(tokenizer):
        return sd.fingerprint_rows(raw, tokenizer, "text", 64, "rows")

    seen = [fingerprint(tiny_tokenizer())]
    assert fingerprint(tiny_tokenizer()) == seen[0]
    assert sd.fingerprint_rows(raw, tiny_tokenizer(), "text", 64, "documents") != seen[0]

    def is_new(tokenizer=None):
        seen.append(fingerprint(tokenizer or tiny_tokenizer()))
        return seen[-1] not in seen[:-1]

    other_end = tiny_tokenizer()
    other_end.eos_token = "<|im_end|>"
    assert is_new(other_end)
    other_added = tiny_tokenizer()
    other_added.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    assert is_new(other_added)
    assert is_new(tiny_tokenizer(CHATML))
    monkeypatch.setattr(sd, "PLAIN_TEMPLATE", NO_END)
    assert is_new()
    monkeypatch.setattr(sd, "CONVERSATIONS", (("ask", "say"),))
    assert is_new()
    monkeypatch.setattr(sd, "ROWS_AT_ONCE", 10)
    assert is_new()
    assert "difference" in sd.code_of(sd.encode_rows)   # called by what encode_rows calls
    assert "RANK" not in sd.code_of(sd.encode_rows)   # of which every rank would find another
    raw = raw.rename_column("prompt", "question")
    assert is_new()


def test_data_blocks_of_text_do_not_depend_on_the_number_of_processes(tmp_path):
    """Rows are packed by the thousand, whoever does it. In a process of its own, for the forks."""
    rows = [{"text": prose(1 + i % 5, i)} for i in range(2500)]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import datasets, test_simple_distill as t, simple_distill as sd\n"
        "for n in (None, 2, 3):\n"
        "    datasets.config.HF_DATASETS_CACHE = f'{sys.argv[2]}/{n}'\n"
        "    train = t.train_rows_of(sys.argv[1], num_proc=n)\n"
        "    print('rows:', len(train), sd.rows_digest(train))\n")
    ran = subprocess.run([sys.executable, script, path, tmp_path], text=True, capture_output=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("rows:")]
    assert len(found) == 3, ran.stderr
    assert len(set(found)) == 1, found


# ---- rows of every kind, beside each other

PARTS = [{"type": "text", "text": "by "}, {"type": "text", "text": "parts"}]
PICTURE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
MIXED = [
    {"text": "plain one"},
    {"messages": [user("q"), assistant("a")]},
    {"messages": [user("q"), {"content": "nobody said this"}]},   # line 3
    {"messages": [user(PARTS), assistant(PARTS)]},
    {"messages": [user(PICTURE), assistant("a picture")]},        # line 5
    {"text": "plain two"},
    {"id": 7},                                                    # line 7
    {"messages": [user("only asked")]},                           # line 8
    {"messages": ["no message"]},                                 # line 9
    {"messages": [{"role": "user"}, assistant("b")]},             # line 10
    {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": "look"}]},
    {"text": None},                                               # line 12
]
DROPPED = [
    "1 with a message without a role", "line 3", "1 with a content part of type 'image_url'",
    "line 5", "2 with no text and no conversation", "line 7", "1 with no target within seq_len 64",
    "line 8", "1 with a message that is no object", "line 9", "1 with a message without content",
    "line 10", "1 with tool_calls that are no list", "line 11",
]


def test_data_each_row_is_read_by_its_own_kind_and_dropped_ones_are_counted(tmp_path, out, student):
    """And none that is bad is all there is to evaluate on."""
    path = write_jsonl(tmp_path / "mixed.jsonl", MIXED)
    fields = dict(student=student, dataset=path, alpha=1.0, max_steps=2, seq_len=64)
    run = distil(out, **fields)
    for words in DROPPED:
        assert words in run.out, (words, run.out)
    again = distil(out, **fields, resume="never")   # from the rows that were kept
    said = [line for line in run.out.splitlines() if "dropped" in line]
    assert said[0].startswith("train: dropped 8 of 11 rows: ")
    assert [line for line in again.out.splitlines() if "dropped" in line] == said


def test_data_texts_beside_conversations_are_kept():
    tokenizer = tiny_tokenizer(CHATML)
    names = ("text", "messages", "id")
    rows = [{"text": ""}, *MIXED]   # an empty text, as wikitext has many, is no document
    columns = {name: [row.get(name) for row in rows] for name in names}
    rows = sd.rows_from_columns(sd.encode(columns, tokenizer, "text", 64, "auto"))
    texts = [tokenizer.decode(row["input_ids"]) for row in rows if row["targets"] is None]
    assert texts == ["plain one<|endoftext|>plain two<|endoftext|>"]
    talks = [target_runs(row, tokenizer) for row in rows if row["targets"] is not None]
    assert talks == [["a<|im_end|>"], ["by parts<|im_end|>"]]


def test_data_a_file_with_nothing_usable_is_refused_by_its_name(tmp_path):
    for row in ({"messages": [{"content": "x"}]}, {"text": 3}, {"text": None, "id": 3}):
        path = write_jsonl(tmp_path / "useless.jsonl", [row] * 9)
        with pytest.raises(config.UserError, match="useless.jsonl.*none of .* rows"):
            rows_of(path)


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
SYSTEM_ROW = {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]}


def test_data_a_row_that_the_template_refuses_is_named(tmp_path):
    """By its line in the file, though blank lines and held-out rows stand before it."""
    rows = [{"messages": [user("q"), assistant("a")]}] * 40
    path = write_jsonl(tmp_path / "d.jsonl", rows[:30])
    with open(path, "a") as file:
        file.write("\n\n" + json.dumps(SYSTEM_ROW) + "\n")
    write_jsonl(tmp_path / "rest.jsonl", rows[30:])
    with open(path, "a") as file:
        file.write(Path(tmp_path / "rest.jsonl").read_text())
    with pytest.raises(config.UserError, match="d.jsonl', line 33: .*no system role"):
        rows_of(path, tiny_tokenizer(NO_SYSTEM + CHATML))


# ---- what can be wrong with a dataset's file


@pytest.mark.parametrize("name", ["data[1].jsonl", "data*.jsonl", "data?.jsonl", "[!x]ata1.jsonl"])
def test_data_names_are_names_and_no_patterns(tmp_path, name):
    write_jsonl(tmp_path / "data1.jsonl", [{"text": "another file"}] * 3)
    path = write_jsonl(tmp_path / name, [{"text": "this file"}] * 3)
    train, _ = rows_of(path)
    assert "this file" in decoded(train)[0]
    (tmp_path / "d[1]").mkdir()
    write_splits(tmp_path / "d1", [TEXT_ROW], [TEXT_ROW])
    with pytest.raises(config.UserError, match="pattern"):
        rows_of(tmp_path / "d[1]")


def unreadable_files(folder):
    """-> names of datasets that cannot be read, each in another way."""
    (folder / "empty").mkdir()
    (folder / "folder.jsonl").mkdir()
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("[]")
    (folder / "odd.csv").write_text('a,b\n1,2,3,4\n"')
    (folder / "deep.jsonl").write_text('{"text": ' + "[" * 3000 + "]" * 3000 + "}\n")
    (folder / "odd.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (folder / "half.parquet").write_bytes(b"PAR1")
    os.symlink(folder / "loop.jsonl", folder / "loop.jsonl")
    names = [str(path) for path in folder.iterdir()]
    return [*names, "a\0b", "a\0b.jsonl", "x" * 5000, "y" * 5000 + ".jsonl", "s3://x/y", "~no/x"]


def test_data_whatever_cannot_be_read_is_one_error(tmp_path, monkeypatch):
    for name in unreadable_files(tmp_path):
        with pytest.raises(config.UserError, match="dataset") as caught:
            sd.load_splits(config.Config(dataset=name))
        assert len(str(caught.value).splitlines()) == 1

    def forbidden(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    path = write_jsonl(tmp_path / "closed.jsonl", [TEXT_ROW])
    monkeypatch.setattr(datasets, "load_dataset", forbidden)
    monkeypatch.setattr(sd, "open", forbidden, raising=False)   # root may read everything
    with pytest.raises(config.UserError, match="closed.jsonl.*Permission denied"):
        sd.load_splits(config.Config(dataset=path))


def test_data_a_long_conversation_is_encoded_no_further_than_it_is_used(monkeypatch):
    encode_all = sd.patiently
    sizes = []

    def spy(tokenizer, texts, **options):
        sizes.append(sum(map(len, texts)))
        return encode_all(tokenizer, texts, **options)

    monkeypatch.setattr(sd, "patiently", spy)
    # runs of blanks are a token each, as in some vocabularies
    tokenizer = tiny_tokenizer(CHATML, merges=[f"{'Ġ' * 2**k} {'Ġ' * 2**k}" for k in range(12)])
    row, = encode([{"messages": [user("q"), assistant("ab" * 10_000_000)]}], tokenizer, seq_len=64)
    assert sizes == [1_000_000]
    assert len(row["input_ids"]) == 64
    blanks = [{"messages": [user("q"), assistant(" " * 1_200_000 + "!")]}]
    row, = encode(blanks, tokenizer, seq_len=512)
    assert sizes[2] > 1_200_000   # the head was too short
    assert target_runs(row, tokenizer)[0].endswith("!<|im_end|>")


class Alarm(Exception):
    pass


def test_data_a_signal_is_heard_while_a_long_text_is_encoded():
    """And something is said of it."""
    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    threads = set(threading.enumerate())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Alarm):
            sd.encode_texts(["word " * 300_000], tiny_tokenizer(), 64, join=True)
        at_work, = set(threading.enumerate()) - threads
        assert at_work.daemon   # nobody waits for it at the end
        at_work.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        sd.warn_of_long_rows([{"text": "x" * 11_000_000}])
    assert "11,000,000 characters" in shown.getvalue()


# --------------------------------------------------------------------------------------------------
# Models and FSDP: architectures, heads, layers:N, precision.


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_models_padded_vocabulary_trains_as_the_unpadded_one(tmp_path, teacher, student, text, who):
    even = tmp_path / "even"
    odd = tmp_path / "odd"
    pair = dict(teacher=teacher, student=student)
    fields = dict(dataset=text, alpha=0.3, temperature=2.0, max_steps=3)
    distil(even, **pair, **fields)
    pair[who] = padded(tmp_path / "padded", pair[who], 128)
    distil(odd, **pair, **fields)
    for key in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/loss"):
        assert column(odd, key) == pytest.approx(column(even, key), rel=1e-6)
    expected = final_weights(even)
    cut = {name: x[:len(expected[name])] for name, x in final_weights(odd).items()}
    assert distance(cut, expected) < 1e-6


def test_models_padding_on_both_sides_is_no_vocabulary(tmp_path, teacher, student, text):
    """Both are cut to the ids that the tokenizer has, online and from a cache."""
    pairs = {
        "even": dict(teacher=teacher, student=student),
        "odd": dict(teacher=padded(tmp_path / "teacher", teacher, 96),
                    student=padded(tmp_path / "student", student, 128))}
    fields = dict(dataset=text, alpha=0.3, max_steps=2, eval_samples=8)
    runs = []
    for name, pair in pairs.items():
        distil(tmp_path / name, **pair, **fields)
        runs.append(tmp_path / name)
    for key in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/loss"):
        assert column(runs[1], key) == pytest.approx(column(runs[0], key), rel=1e-5), key


def test_models_padding_is_cut_with_a_cache_too(   # optional: cache
        tmp_path, teacher, student, text):
    cache = str(tmp_path / "cache")
    odd = padded(tmp_path / "student", student, 128)
    cli(*flags(mode="cache", teacher=padded(tmp_path / "teacher", teacher, 96), dataset=text,
               seq_len=32, cache_dir=cache, dtype="fp32", eval_samples=8))
    losses = []
    for i, name in enumerate((student, odd)):
        distil(tmp_path / str(i), student=name, cache_dir=cache, alpha=0.3, max_steps=2)
        losses.append(column(tmp_path / str(i), "train/loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_models_labels_alone_are_transformers_own_loss_over_the_whole_head(
        tmp_path, student, text):
    odd = padded(tmp_path / "student", student, 128)
    distil(tmp_path / "out", student=odd, dataset=text, alpha=1.0, max_steps=1, eval_samples=8,
           learning_rate=STILL)
    with sd.process_group():
        _, rows = sd.load_data(config.Config(dataset=text, seq_len=32, eval_samples=8),
                               tiny_tokenizer())
    model = load(odd)
    total = 0
    tokens = 0
    for row in rows:
        ids = torch.as_tensor(row["input_ids"])[None]
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert column(tmp_path / "out", "eval/ce_loss")[0] == pytest.approx(total / tokens, rel=1e-5)


def test_models_tokenizer_larger_than_the_model_is_refused(tmp_path, out, text):
    small = tiny_model(tmp_path / "small", vocab=200)
    distil(out, rc=2, student=small, dataset=text, alpha=1.0, max_steps=1)


MODELS = {
    "llama": dict(cls="LlamaConfig"),
    "llama_tied": dict(cls="LlamaConfig", tie_word_embeddings=True),
    "qwen2": dict(cls="Qwen2Config"),
    "qwen3": dict(cls="Qwen3Config", head_dim=16),
    "qwen3_moe": dict(cls="Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=16),
    "gpt2": dict(cls="GPT2Config", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": dict(cls="GPTNeoXConfig"),
    "gemma2": dict(cls="Gemma2Config", head_dim=16, final_logit_softcapping=2.0,
                   query_pre_attn_scalar=16),
    "cohere": dict(cls="CohereConfig", logit_scale=0.3),
    "granite": dict(cls="GraniteConfig", logits_scaling=3.0),
    "phi": dict(cls="PhiConfig", tie_word_embeddings=False),   # a head with a bias
}


def every_second_layer(tensors):
    """Those of layers 0, 2, 4 under the numbers 0, 1, 2, and what is of no layer."""
    kept = {}
    for name, x in tensors.items():
        layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if layer is None:
            kept[name] = x
        elif int(layer[1]) % 2 == 0:
            kept[name[:layer.start(1)] + str(int(layer[1]) // 2) + name[layer.end(1):]] = x
    return kept


def fill_head_bias(tensors):
    tensors["lm_head.bias"].normal_(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_models_layers_n_of_every_architecture_with_its_own_head(tmp_path, out, chat, name):
    """layers:3 of 5 keeps 0, 2, 4 with their weights; its losses are those of the model's own
    logits."""
    path = tiny_model(tmp_path / "teacher", layers=5, seed=3, tokenizer=tiny_tokenizer(CHATML),
                      **MODELS[name])
    if name == "phi":
        edit_weights(path, fill_head_bias)
    distil(out, teacher=path, student="layers:3", dataset=chat, seq_len=256, batch_size=8,
           max_steps=1, alpha=0.3, temperature=2.0, learning_rate=STILL)
    got = final_weights(out)
    want = every_second_layer(weights(path))
    assert got.keys() == want.keys()
    for key in want:
        assert torch.allclose(got[key], want[key], rtol=0, atol=1e-20), key

    student = load(f"{out}/final")
    teacher = load(path)
    assert student.config.num_hidden_layers == 3
    if getattr(teacher.config, "layer_types", None):
        assert student.config.layer_types == teacher.config.layer_types[::2]
    rows = chatml_rows(talk(8))
    losses = model_losses(student.eval(), teacher.eval(), rows, alpha=0.3, temperature=2.0)
    first = log(out)[0]
    logged = [first["train/loss"], first["train/ce_loss"], first["train/kl_loss"]]
    assert logged == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    assert losses[2] > 1e-3


def test_models_layers_n_without_a_teacher_in_the_loss(tmp_path, out, text):
    path = tiny_model(tmp_path / "teacher", layers=4)
    distil(out, teacher=path, student="layers:2", dataset=text, alpha=1.0, max_steps=1)
    assert load(f"{out}/final").config.num_hidden_layers == 2
    for wrong in ("layers:0", "layers:5", "layers:x", "layers:"):
        distil(tmp_path / "no", rc=2, teacher=path, student=wrong, dataset=text, max_steps=1)


@pytest.mark.parametrize("special", [
    dict(mlp_only_layers=[4]),
    dict(decoder_sparse_step=2),
], ids=str)
def test_models_layers_n_of_a_mixture_with_some_dense_layers(tmp_path, out, text, special):
    """Thinned rightly, or refused: never a traceback."""
    path = tiny_model(tmp_path / "teacher", layers=5, **MODELS["qwen3_moe"], **special)
    words = flags(**PLAIN, output_dir=out, teacher=path, student="layers:3", dataset=text,
                  max_steps=1)
    assert sd.main(words_of(words)) in (0, 2)


def test_models_layers_of_a_nested_text_model_are_refused():
    with pytest.raises(config.UserError, match="text model is part of a larger one"):
        sd.cut_layers(transformers.Gemma3Config(), "layers:2", "x")


def test_models_student_from_a_config_file_starts_random_by_seed(tmp_path, teacher, text):
    """And brings no tokenizer: it takes the teacher's."""
    shape = str(tmp_path / "shape.json")
    tiny_config(hidden=16, layers=1).to_json_file(shape)
    results = []
    for i, seed in enumerate((1, 1, 2)):
        distil(tmp_path / str(i), teacher=teacher, student=shape, dataset=text, max_steps=1,
               seed=seed, learning_rate=STILL)
        results.append(final_weights(tmp_path / str(i)))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "0" / "final")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    distil(tmp_path / "named", student=shape, tokenizer=teacher, dataset=text, alpha=1.0,
           max_steps=1)


ODD_MODEL = """
import transformers

class Odd(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.02
        return out
"""


def test_models_a_head_that_the_loss_would_not_reproduce_is_refused(tmp_path, out, text):
    """A model with code of its own that scales its logits in a way nobody knows: its distribution
    is not the loss's."""
    path = tiny_model(tmp_path / "odd")
    Path(path, "modeling_odd.py").write_text(ODD_MODEL)
    config_file = Path(path, "config.json")
    shape = json.loads(config_file.read_text())
    shape["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    config_file.write_text(json.dumps(shape))
    err = distil(out, rc=2, student=path, dataset=text, alpha=1.0, max_steps=1,
                 trust_remote_code=True).err
    assert "Odd" in err and "head" in err


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_models_missing_models_are_one_line(out, teacher, student, text, role):
    for name in ("/nowhere/model", "nobody/no-such-model", "/nowhere/shape.json"):
        pair = {**dict(teacher=teacher, student=student), role: name}
        err = distil(out, rc=2, **pair, dataset=text, max_steps=1).err
        assert name in err
        assert len(err.strip().splitlines()) <= 2
        assert not os.path.exists(out)


def test_models_final_loads_with_the_auto_classes_and_generates(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2)
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]
    model = AutoModelForCausalLM.from_pretrained(f"{out}/final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    assert tokenizer("one two")["input_ids"] == tiny_tokenizer()("one two")["input_ids"]
    prompt = tokenizer("one two", return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[1] == len("one two") + 4
    assert not same(final_weights(out), weights(student))


def test_models_gradient_checkpointing_changes_nothing(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=3,
               gradient_checkpointing=on)
    assert distance(final_weights(tmp_path / "on"), final_weights(tmp_path / "off")) < 1e-6


def test_models_checkpointing_does_not_recompute_what_is_frozen(student):
    """transformers makes embeddings ask for a gradient; without it nothing below the first trained
    layer is kept or run again."""
    calls = []
    with sd.process_group():
        root = sd.load_student(config.Config(student=student, teacher=student, alpha=0.0))
        _, layers = sd.layers_of(root.model)
        for name, p in root.model.named_parameters():
            p.requires_grad_("layers.1." in name)
        layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
        layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
        ids = torch.arange(8)[None]
        root(lambda model: sd.hidden_states(model, ids).sum()).backward()
    assert calls == [0, 1, 1]


def test_models_what_begins_frozen_reduces_in_fp32_when_it_is_trained(student):
    """As block after block does in bf16, without any forward before the first one is frozen."""
    cfg = config.Config(student=student, teacher=student, dtype="bf16")
    with sd.process_group():
        root = sd.load_student(cfg)
        layers = sd.layers_of(root.model)[1]
        for trained in (0, 1):
            root.requires_grad_(False)
            layers[trained].requires_grad_(True)
            root(lambda model: sd.hidden_states(model, torch.arange(8)[None]).sum()).backward()
            gradients = [sd.local_tensor(p.grad) for p in layers[trained].parameters()]
            assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_mixed_precision_stays_close_and_keeps_fp32_masters(tmp_path, teacher, student, text,
                                                                   dtype):
    full = tmp_path / "fp32"
    mixed = tmp_path / dtype
    for out in (full, mixed):
        distil(out, teacher=teacher, student=student, dataset=text, max_steps=3, dtype=out.name)
    for key, tolerance in (("train/loss", 2e-2), ("train/grad_norm", 5e-2)):
        assert column(mixed, key) == pytest.approx(column(full, key), rel=tolerance)
    assert column(mixed, "train/skipped_steps") == [0, 0, 0]
    for name, x in checkpoint(mixed, 3).items():
        if "weight" in name:
            assert x.dtype == torch.float32, name
    rounded = {name: x.float() for name, x in final_weights(mixed).items()}
    assert distance(rounded, final_weights(full)) < 2e-2


CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"


def number_correction(tensors):
    tensors[CORRECTION].copy_(torch.tensor([1., 2., 3., 4.]))


def test_models_a_model_with_persistent_buffers_is_saved(tmp_path, text):
    path = tiny_model(
        tmp_path / "model", cls="DeepseekV3Config", n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        head_dim=8)
    edit_weights(path, number_correction)
    distil(tmp_path / "out", teacher=path, student=path, dataset=text, max_steps=1)
    assert final_weights(tmp_path / "out")[CORRECTION].tolist() == [1, 2, 3, 4]


@pytest.mark.campaign
def test_models_compile_changes_nothing_but_rounding(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=2,
               compile=on)
    losses = column(tmp_path / "on", "train/loss")
    assert losses == pytest.approx(column(tmp_path / "off", "train/loss"), rel=1e-4)


@pytest.mark.parametrize("cls, rope", [
    ("LlamaConfig", dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)),
    ("Phi3Config", dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8,
                        long_factor=[4.0] * 8)),
])
def test_models_rope_that_depends_on_length_does_not_depend_on_the_padding(tmp_path, cls, rope):
    """A row of 12 gives the same alone as in a batch of 48, of a model made for 16."""
    fields = dict(max_position_embeddings=16)
    if cls == "Phi3Config":
        fields = dict(max_position_embeddings=64, original_max_position_embeddings=16)
    path = tiny_model(tmp_path / "model", cls=cls, rope_parameters=rope, **fields)
    cfg = config.Config(student=path, teacher=path, seq_len=48, gradient_checkpointing=False)
    short = torch.arange(12)[None]
    wide = F.pad(short, (0, 36))
    with sd.process_group(), torch.no_grad():
        for root in (sd.load_student(cfg), sd.load_teacher(cfg)):
            whole = [root(sd.hidden_states, ids)[:, :12] for ids in (short, wide, short)]
            torch.testing.assert_close(whole[0], whole[1])
            torch.testing.assert_close(whole[0], whole[2])
            # what transformers gives for rows of seq_len
            model = load(path).base_model
            torch.testing.assert_close(model(wide).last_hidden_state[:, :12], whole[0])


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: a number of a tensor that Python asks for."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


DENSE = {name: MODELS[name] for name in ("llama", "qwen3", "gemma2")}
DENSE["gpt2"] = MODELS["gpt2"] | dict(pad_token_id=None)   # it looks for padding, to warn of it


@pytest.mark.parametrize("name", DENSE)
def test_models_a_micro_step_does_not_wait_for_the_gpu(tmp_path, name):
    """transformers looks into position_ids for packed documents, in Python, once a model."""
    path = tiny_model(tmp_path / "model", **DENSE[name])
    cfg = config.Config(student=path, teacher=path, gradient_checkpointing=True)
    rows = [{"input_ids": list(range(9))}, {"input_ids": list(range(20, 26))}]
    with sd.process_group():
        student = sd.load_student(cfg)
        get_teacher_targets = sd.teacher_targets(sd.load_teacher(cfg))
        batch = sd.collate(rows)
        with Waits() as waits:
            loss, *_ = student(functools.partial(sd.distil_loss, alpha=0.5, temperature=1.0),
                               batch, get_teacher_targets(batch), 13)
            loss.backward()
    assert waits.count == 0
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("name", DENSE)
def test_models_known_documents_keep_attention_inside_of_each(tmp_path, name):
    """Two documents in a row and one in the next give what each gives alone, and nothing waits."""
    model = load(tiny_model(tmp_path / "model", **DENSE[name])).base_model.eval()
    documents = [torch.arange(10, 15), torch.arange(30, 37), torch.arange(60, 72)]
    ids = torch.stack([torch.cat(documents[:2]), documents[2]])
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])
    with torch.no_grad():
        apart = [model(document[None], use_cache=False)[0][0] for document in documents]
        with sd.known_documents(positions), Waits() as waits:
            packed = model(ids, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(packed[0], torch.cat(apart[:2]))
    torch.testing.assert_close(packed[1], apart[2])
    assert waits.count == 0


@pytest.mark.parametrize("family", ["llama", "gemma 3", "gpt2"])
def test_models_attention_of_packed_rows_is_a_document_at_a_time(tmp_path, family, monkeypatch):
    """Which computes less on a CPU; and gives what one mask over the row gives."""
    shape = dict(PACKED_FAMILIES[family], layers=2, hidden=16)
    model = load(tiny_model(tmp_path / "model", **shape)).eval()
    lengths = [[5, 20, 7], [32]]   # some of them longer than a sliding window
    ids = torch.arange(64).view(2, 32)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    seen = []
    attend = F.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        seen.append(tuple(query.shape[::2]))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    transformers.AttentionInterface.register("sdpa", sd.transformers_sdpa)
    with torch.no_grad():
        by_row = model.base_model(ids, position_ids=positions, use_cache=False)[0]
        assert seen == 2 * [(2, 32)]
        seen.clear()
        by_document = sd.hidden_states(model, ids, positions)
    assert seen == 2 * [(1, 5), (1, 20), (1, 7), (1, 32)]
    torch.testing.assert_close(by_document, by_row)
    # generating goes on as before: with padding on the left, then by single tokens
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    options = dict(attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0,
                   do_sample=False, output_logits=True, return_dict_in_generate=True)
    after = model.generate(ids[:, :5], **options).logits
    transformers.AttentionInterface.register("sdpa", sd.transformers_sdpa)
    torch.testing.assert_close(after, model.generate(ids[:, :5], **options).logits)


def test_models_any_mask_is_kept_when_a_row_is_cut():
    """Also one in which a token does not see the one before, but others."""
    torch.manual_seed(0)
    T = 12
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    number = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3])
    documents = causal & (number[:, None] == number)
    two_ways = number[:, None] == number
    window = documents & ~causal.tril(-2)
    strided = causal & ((torch.arange(T)[:, None] - torch.arange(T)) % 2 == 0)
    first_seen_by_all = documents.clone()
    first_seen_by_all[:, 0] = True
    without_pairs = torch.eye(T, dtype=torch.bool)
    without_pairs[9, 4] = True
    masks = [causal, causal.T, documents, two_ways, window, strided, first_seen_by_all,
             without_pairs]
    parts = [1, 1, 4, 4, 4, 1, 1, 7]
    query, key, value = torch.randn(3, len(masks), 2, T, 4)
    masks_B1TT = torch.stack(masks)[:, None]
    begins = sd.parts_begin(masks_B1TT[:, 0])
    assert begins.sum(-1).tolist() == parts
    assert begins[2].nonzero()[:, 0].tolist() == [0, 3, 5, 10]
    layer = nn.Module()
    whole, _ = sd.transformers_sdpa(layer, query, key, value, masks_B1TT)
    cut, _ = sd.attend_by_document(layer, query, key, value, attention_mask=masks_B1TT)
    torch.testing.assert_close(cut, whole)


def test_models_that_choose_what_they_see_are_not_disturbed():
    """DeepSeek-V3.2's attention sees the 4 keys that it finds best, maybe not the one before."""
    torch.manual_seed(0)
    shape = transformers.AutoConfig.for_model(
        "deepseek_v32", vocab_size=263, hidden_size=32, intermediate_size=64,
        moe_intermediate_size=16, num_hidden_layers=2, mlp_layer_types=["dense", "dense"],
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, index_topk=4, index_head_dim=16, index_n_heads=2,
        max_position_embeddings=64, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(shape).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        transformers.AttentionInterface.register("sdpa", sd.transformers_sdpa)
        expected = model(ids, use_cache=False).logits
        transformers.AttentionInterface.register("sdpa", sd.attend_by_document)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_models_positions_of_a_models_own_are_looked_at(tmp_path):
    """Where a model makes them of each row's tokens (here they restart at token 7) nobody knows."""
    model = load(tiny_model(tmp_path / "model")).base_model.eval()

    def restart_at_7(module, args, kwargs):
        positions = [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]]
        kwargs["position_ids"] = torch.tensor(positions)
        return args, kwargs

    model.register_forward_pre_hook(restart_at_7, with_kwargs=True)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 7, 4, 5, 6]])
    own = transformers.masking_utils.find_packed_sequence_indices
    with torch.no_grad():
        expected = model(ids, use_cache=False)[0]
        with sd.known_documents():
            got = model(ids, use_cache=False)[0]
    assert torch.equal(got, expected)
    assert transformers.masking_utils.find_packed_sequence_indices is own


def test_models_another_transformers_may_ask_in_another_way(tmp_path, monkeypatch):
    monkeypatch.delattr(transformers.masking_utils, "find_packed_sequence_indices")
    with sd.known_documents():
        assert not hasattr(transformers.masking_utils, "find_packed_sequence_indices")


def test_models_layers_n_cuts_only_lists_of_one_a_layer(tmp_path):
    """Mamba2's time_step_limit has two items, as it has layers."""
    shape = transformers.Mamba2Config(
        vocab_size=263, hidden_size=16, num_hidden_layers=2, head_dim=8, num_heads=4, n_groups=1,
        state_size=4)
    cut, kept = sd.cut_layers(shape, "layers:1", "x")
    assert cut.num_hidden_layers == 1 and kept == [0]
    assert tuple(cut.time_step_limit) == tuple(shape.time_step_limit)
    smol = transformers.SmolLM3Config(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    cut, kept = sd.cut_layers(smol, "layers:2", "x")
    assert kept == [0, 3]
    assert cut.no_rope_layers == [1, 0] and len(cut.layer_types) == 2


def test_models_the_folder_of_a_run_in_place_of_its_model_says_where_it_is(
        out, tmp_path, teacher, student, text):
    """Mistaken easily: --teacher out for --teacher out/final."""
    shutil.copytree(teacher, tmp_path / "run/final")
    inside = repr(str(tmp_path / "run/final"))
    for fields in (dict(teacher=tmp_path / "run", student="layers:1"),
                   dict(teacher=tmp_path / "run", student=student)):
        shown = cli(*flags(**fields, dataset=text, output_dir=out), rc=2).err
        assert shown.startswith("error: ") and f"(a model is in {inside})" in shown


@pytest.mark.parametrize("cls", ["GPT2Config", "OPTConfig", "CTRLConfig"])
def test_models_fewer_positions_than_seq_len_are_refused_before_weights(tmp_path, out, text, cls):
    fields = dict(max_position_embeddings=32)
    if cls == "OPTConfig":
        fields |= dict(ffn_dim=64, word_embed_proj_dim=32)
    path = tiny_model(tmp_path / "model", cls=cls, **fields)
    shutil.move(f"{path}/model.safetensors", tmp_path / "aside")
    run = dict(student=path, dataset=text, alpha=1.0, max_steps=1, eval_samples=2)
    err = distil(out, rc=2, **run, seq_len=33).err
    assert "has 32 positions, seq_len is 33" in err and path in err
    shutil.move(tmp_path / "aside", f"{path}/model.safetensors")
    assert "sample: " in distil(out, **run, seq_len=32).out   # which ends with the positions


def test_models_rope_may_go_beyond_its_positions(tmp_path, out, text):
    path = tiny_model(tmp_path / "model", max_position_embeddings=16)
    distil(out, student=path, dataset=text, alpha=1.0, max_steps=1, eval_samples=2)


@pytest.mark.parametrize("cls, fields", [
    ("XLNetConfig", dict(d_inner=64, n_head=2, d_head=16)),
    ("Gemma3TextConfig", dict(head_dim=16, intermediate_size=64, num_key_value_heads=2,
                              use_bidirectional_attention=True)),
    ("BertConfig", dict(intermediate_size=64)),
])
def test_models_that_see_later_tokens_are_refused_by_name(tmp_path, cls, fields):
    shape = dict(vocab_size=263, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    path = str(tmp_path / "shape.json")
    getattr(transformers, cls)(**shape, **fields).to_json_file(path)
    cfg = config.Config(student=path, teacher=path, gradient_checkpointing=False)
    with sd.process_group(), pytest.raises(config.UserError) as caught:
        sd.load_checked_student(cfg, tiny_tokenizer())
    assert re.search(f"{path}.*{cls[:4]}.*no causal .* later tokens", str(caught.value))


PACKED_FAMILIES = {
    "llama": {},
    "qwen3": dict(cls="Qwen3Config", head_dim=8),
    "gemma 2": dict(cls="Gemma2Config", head_dim=8, final_logit_softcapping=5.0,
                    query_pre_attn_scalar=8, sliding_window=8),
    "gemma 3": dict(cls="Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                    layer_types=["sliding_attention", "full_attention"]),
    "gpt2": dict(cls="GPT2Config", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "mixtral": dict(cls="MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3 moe": dict(cls="Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=16, head_dim=8),
}


@pytest.mark.parametrize("family, recompute, ranks", [
    *[(family, False, 1) for family in PACKED_FAMILIES],
    *[(family, True, 1) for family in ("llama", "gemma 3", "gpt2")],
    ("llama", False, 2),
    ("qwen3 moe", True, 2),
])
def test_models_packed_documents_are_as_each_alone(tmp_path, out, family, recompute, ranks):
    """Loss, KL and gradients of a step; documents longer than a sliding window."""
    shape = dict(PACKED_FAMILIES[family], layers=2, hidden=16, tokenizer=tiny_tokenizer(CHATML))
    teacher = tiny_model(tmp_path / "teacher", seed=1, **shape)
    student = tiny_model(tmp_path / "student", seed=2, **shape)
    rows = talk(9)
    data = write_splits(tmp_path / "d", rows, rows[:3])
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": data, "alpha": 0.4,
              "temperature": 2.0, "packing": "documents", "seq_len": 256, "batch_size": 8 // ranks,
              "learning_rate": STILL, "max_steps": 1, "save_steps": 1, "max_grad_norm": 0,
              "gradient_checkpointing": recompute, "output_dir": out}
    shown = Fork(f"{out}.txt", *flags(**fields), ranks=ranks).wait()
    assert "train: 9 documents in 3 rows" in shown, shown
    student_model = load(student)
    want = model_losses(student_model, load(teacher), chatml_rows(rows), 0.4, 2.0)
    logged = [column(out, f"train/{name}")[0] for name in ("loss", "ce_loss", "kl_loss")]
    assert logged == pytest.approx([x.item() for x in want], rel=1e-5)
    want[0].backward()
    grads = {name: p.grad for name, p in student_model.named_parameters()}
    found = {}
    for key, tensor in gradients(out).items():
        name, = [name for name in grads if name in key]
        found[name] = tensor
    assert distance(found, grads) < 1e-5
    held_out = model_losses(load(student), None, chatml_rows(rows[:3]), 1.0)[1].item()
    assert column(out, "eval/ce_loss")[-1] == pytest.approx(held_out, rel=1e-5)


@pytest.mark.parametrize("shape", [
    dict(cls="MambaConfig", state_size=4),   # a state that runs on
    dict(cls="BloomConfig"),                 # distances in place of positions
    dict(cls="OPTConfig", ffn_dim=32),       # positions that it counts itself
    dict(cls="Qwen3NextConfig", head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
         linear_num_key_heads=2, linear_num_value_heads=2, num_experts=2, num_experts_per_tok=1,
         moe_intermediate_size=16, shared_expert_intermediate_size=16,
         layer_types=["linear_attention", "full_attention"]),
])
def test_models_that_let_documents_see_each_other_are_refused(tmp_path, out, chat, shape):
    path = tiny_model(tmp_path / "model", hidden=16, **shape)
    fields = dict(student=path, dataset=chat, alpha=1.0, max_steps=1)
    err = distil(out, rc=2, packing="documents", **fields).err
    assert path in err and "see each other" in err and "--packing rows" in err, err
    assert load(path).__class__.__name__ in err
    distil(out, **fields)


# fields of config.json -> an error, whatever it is that fails
ODD_CONFIGS = [
    {name: value}
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads",
                 "intermediate_size")
    for value in (0, -1, 10**12, "many", None, [2], 1.5)
] + [
    dict(rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[1.0] * 3,
        original_max_position_embeddings=16)),
    dict(num_hidden_layers=10**7), dict(model_type=[]), dict(model_type=None),
    dict(model_type="bert2"), dict(hidden_act="none of ours"), dict(rms_norm_eps="small"),
    dict(rope_parameters={"rope_type": "spiral"}), dict(rope_parameters=3), dict(dtype="float9"),
    dict(num_key_value_heads=0), dict(num_key_value_heads=7), dict(head_dim=-4),
    dict(max_position_embeddings="all"), dict(quantization_config={"quant_method": "mine"}),
    dict(tie_word_embeddings="x", num_hidden_layers={}), dict(layer_types=["mine"]),
]


def test_models_whatever_a_config_holds_is_an_error_or_runs(tmp_path):
    """Student with weights, and as a config alone; nothing but UserError comes out."""
    path = Path(tiny_model(tmp_path / "model"))
    good = json.loads((path / "config.json").read_text())
    refused = 0
    with sd.process_group():
        for odd in ODD_CONFIGS:
            text = json.dumps(good | odd)
            (path / "config.json").write_text(text)
            (tmp_path / "shape.json").write_text(text)
            for name in (path, tmp_path / "shape.json"):
                cfg = config.Config(student=str(name), teacher=str(path),
                                    gradient_checkpointing=False)
                try:
                    sd.load_checked_student(cfg, tiny_tokenizer())
                except config.UserError as e:
                    assert str(name) in str(e), (odd, e)
                    refused += 1
    assert refused > len(ODD_CONFIGS)


def test_models_whatever_is_wrong_with_the_files_is_an_error(tmp_path):
    whole = Path(tiny_model(tmp_path / "whole"))
    content = (whole / "model.safetensors").read_bytes()
    other = weights(tiny_model(tmp_path / "other", hidden=48))
    save_file(other, tmp_path / "other.safetensors", metadata={"format": "pt"})
    damages = {
        "config.json": [b"", b"[]", b"3", b"null", b"{", bytes(9), b"\xff\xfe{}"],
        "model.safetensors": [b"", bytes(9), content[:-9], content[:99], b"\xff" * 99,
                              (tmp_path / "other.safetensors").read_bytes()],
        "generation_config.json": [b"[]", b"{"],
    }
    names = ["a\0b", "x" * 5000, str(whole / "config.json" / "under"), "/dev/null", "~nobody/x"]
    for file, bodies in damages.items():
        for body in bodies:
            folder = tmp_path / f"damaged{len(names)}"
            shutil.copytree(whole, folder)
            (folder / file).write_bytes(body)
            names.append(str(folder))
    folder = tmp_path / "folder"   # in place of a file
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    names.append(str(folder))
    with sd.process_group():
        for name in names:
            cfg = config.Config(student=name, gradient_checkpointing=False)
            try:
                sd.load_checked_student(cfg, tiny_tokenizer())
            except config.UserError as e:
                assert len(str(e)) < 6000
            else:
                assert os.path.exists(f"{name}/generation_config.json"), name


def test_models_code_of_a_model_runs_only_with_the_flag(tmp_path, out, text, monkeypatch):
    """It is not asked for: the flag decides, and the error names it."""
    path = tiny_model(tmp_path / "odd")
    ran = tmp_path / "ran"
    Path(path, "modeling_odd.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nimport transformers\n\n"
        "class OddConfig(transformers.LlamaConfig):\n    model_type = 'odd'\n\n"
        "class Odd(transformers.LlamaForCausalLM):\n    config_class = OddConfig\n")
    edit_config(model_type="odd", auto_map={
        "AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.Odd"},
    )(Path(path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    run = dict(student=path, dataset=text, tokenizer=path, alpha=1.0, max_steps=1, eval_samples=2)
    err = distil(out, rc=2, **run).err
    assert "--trust_remote_code true" in err and path in err
    assert not ran.exists()


@pytest.mark.campaign
@pytest.mark.parametrize("case", [
    dict(lr_multipliers=["embed=0", r"layers\.0\.=0"], max_steps=1),
    dict(blockwise=True, block_input="teacher", num_epochs=0),   # optional: blockwise
], ids=str)
def test_models_compile_with_recompute_where_nothing_below_a_layer_is_trained(
        tmp_path, text, case):
    path = tiny_model(tmp_path / "model", hidden=16)
    distil(tmp_path / "out", teacher=path, student=path, dataset=text, batch_size=64,
           eval_samples=1, compile=True, gradient_checkpointing=True, **case)


@pytest.mark.campaign
def test_models_compile_shares_code_among_more_than_8_kinds_of_layer(tmp_path, text):
    """Sliding and full attention, student and teacher, training and not: none falls back to eager
    code."""
    path = tiny_model(tmp_path / "model", cls="Gemma3TextConfig", head_dim=16, sliding_window=16,
                      layer_types=["sliding_attention", "full_attention"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        distil(tmp_path / "out", teacher=path, student=path, dataset=text, compile=True,
               gradient_checkpointing=True, max_steps=2)


# --------------------------------------------------------------------------------------------------
# Optimiser: rates, groups, schedules.


def multiplier(name):
    """What the patterns of the next test say, by hand."""
    if "embed" in name:
        return 0
    if re.search(r"layers\.0\..*proj", name):
        return 0.5
    return 3 if "layers" in name else 2


def test_optimiser_lr_multipliers_freeze_scale_and_say_so(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=1,
                   learning_rate=1e-3, default_lr_multiplier=2,
                   lr_multipliers=["embed=0", r"layers\.0\..*proj=0.5", r"layers=3"]).out
    before = weights(student)
    after = final_weights(out)
    sizes = {}
    for name in before:   # AdamW's first step is the rate, in the direction of the sign
        factor = multiplier(name)
        change = (after[name] - before[name]).abs().max().item()
        assert change == pytest.approx(factor * 1e-3, rel=0.02), name
        sizes[factor] = sizes.get(factor, 0) + before[name].numel()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    moments = [name for name in checkpoint(out, 1) if "exp_avg" in name]
    assert moments
    assert not any("embed" in name for name in moments)
    for factor in (0.5, 3, 2):
        assert re.search(rf"{sizes[factor]:,}\D+{factor * 1e-3:g}\b", shown), (factor, shown)
    assert re.search(rf"{sizes[0]:,} frozen", shown)


def test_optimiser_a_pattern_that_matches_nothing_is_named(out, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, max_steps=1)
    err = distil(out, rc=2, **fields, lr_multipliers=["embed=0.5", "no_such_layer=0"]).err
    assert "no_such_layer" in err
    assert not os.path.exists(out)
    for wrong in ("embed", "embed=x", "embed=-1", "(=1"):
        pattern = wrong.partition("=")[0]
        assert pattern in distil(out, rc=2, **fields, lr_multipliers=[wrong]).err
    distil(out, rc=2, **fields, default_lr_multiplier=0)


def test_optimiser_a_pattern_that_matches_only_a_tied_head_says_so(out, text, tmp_path):
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    fields = dict(student=tied, alpha=1.0, dataset=text, max_steps=1)
    err = distil(out, rc=2, **fields, lr_multipliers=["layers=0.5", "lm_head=0"]).err
    assert "lm_head" in err and "tied to model.embed_tokens.weight" in err
    assert not os.path.exists(out)
    distil(out, **fields, lr_multipliers=["embed|lm_head=0"])
    name = "model.embed_tokens.weight"
    assert torch.equal(final_weights(out)[name], weights(tied)[name])


def test_optimiser_norms_and_biases_do_not_decay(tmp_path, text):
    path = tiny_model(tmp_path / "gpt2", **MODELS["gpt2"])
    distil(tmp_path / "out", student=path, teacher=path, dataset=text, alpha=0.0, max_steps=1,
           weight_decay=0.5, learning_rate=0.1)
    before = weights(path)
    after = final_weights(tmp_path / "out")   # no gradient: all that moves is decay
    for name in before:
        want = before[name]
        if want.ndim >= 2:
            want = want * (1 - 0.1 * 0.5)
        assert torch.allclose(after[name], want, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("name", [
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "warmup_stable_decay", "cosine_with_min_lr",
])
def test_optimiser_schedulers(out, student, text, name):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=3, lr_scheduler=name,
           warmup_ratio=0 if name == "constant" else 0.4,
           lr_scheduler_kwargs='{"min_lr": 1e-5}' if "min" in name else None)
    for rate in column(out, "train/learning_rate"):
        assert 0 <= rate <= 1e-3


# --------------------------------------------------------------------------------------------------
# Checkpoints: save, find, resume, damage, full disks.


def test_checkpoints_resume_goes_on_as_if_it_had_not_stopped(tmp_path, teacher, student, text):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    fields = dict(teacher=teacher, student=student, dataset=text, batch_size=4,
                  gradient_accumulation_steps=2, alpha=0.3)
    distil(whole, **fields, max_steps=12)   # a pass is 9 or so
    distil(parts, **fields, max_steps=5)
    shown = distil(parts, **fields, max_steps=12).out
    assert "resumes" in shown and "step-00000005" in shown
    assert same(final_weights(whole), final_weights(parts))
    assert column(parts, "train/step") == list(range(1, 13))
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert same(checkpoint(whole, 12), checkpoint(parts, 12))


def test_checkpoints_a_batch_divided_anew_is_accepted_again():
    """From one rank to three, and on three once more: the typed batch stays what it was."""
    cfg = config.Config(batch_size=8)
    _, _, global_batch = sd.plan_batch(cfg, None, 1)
    state = {"global_batch": global_batch, "batch": [8, 1]}
    assert sd.plan_batch(cfg, state, 3) == (3, 1, 8)
    assert sd.plan_batch(cfg, state | {"global_batch": 8}, 3) == (3, 1, 8)
    with pytest.raises(config.UserError, match="sequences a step"):
        sd.plan_batch(config.Config(batch_size=4), state, 3)


def test_checkpoints_resume_never_and_by_path(tmp_path, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=1)
    out = str(tmp_path / "out")
    distil(out, **fields, max_steps=3)
    done = final_weights(out)
    distil(out, **fields, max_steps=3, resume="never")
    assert same(final_weights(out), done)
    assert column(out, "train/step") == [1, 2, 3]
    distil(out, **fields, max_steps=4, resume=f"{out}/checkpoints/step-00000002")
    assert column(out, "train/step") == [1, 2, 3, 4]
    distil(tmp_path / "other", **fields, max_steps=4)
    assert same(final_weights(out), final_weights(tmp_path / "other"))
    refused = distil(tmp_path / "x", rc=2, **fields, max_steps=4, resume="/nowhere/step-00000002")
    assert "nowhere" in refused.err


def test_checkpoints_keep_checkpoints(out, student, text):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=5, save_steps=1,
           keep_checkpoints=2)
    assert sorted(os.listdir(f"{out}/checkpoints")) == ["step-00000004", "step-00000005"]
    state = json.loads(Path(out, "checkpoints", "step-00000005", "state.json").read_text())
    assert state["step"] == 5
    assert state["epoch"] == pytest.approx(column(out, "train/epoch")[-1])


def truncated(content):
    """Known by its size."""
    return content[:100]


def overwritten(content):
    """Of the right size: known when it is loaded."""
    return bytes(100) + content[100:]


@pytest.mark.parametrize("damage", [truncated, overwritten])
def test_checkpoints_an_unreadable_newest_checkpoint_is_passed_over(tmp_path, out, student, text,
                                                                    damage):
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=4)
    for file in Path(out, "checkpoints", "step-00000004").glob("*.distcp"):
        file.write_bytes(damage(file.read_bytes()))
    shown = distil(out, **fields, max_steps=6)
    assert re.search("step-00000004 .*passed over", shown.out + shown.err)
    distil(tmp_path / "whole", **fields, max_steps=6)
    assert same(final_weights(out), final_weights(tmp_path / "whole"))
    assert column(out, "train/step") == [1, 2, 3, 4, 5, 6]


def test_checkpoints_a_changed_config_is_refused_by_field(out, teacher, student, text):
    fields = dict(teacher=teacher, student=student, dataset=text)
    distil(out, **fields, max_steps=2)
    err = distil(out, rc=2, **fields, max_steps=4, learning_rate=5e-4, temperature=2.0).err
    assert "learning_rate" in err and "0.0005" in err and "temperature" in err
    assert "alpha" not in err
    assert column(out, "train/step") == [1, 2]


def test_checkpoints_each_truncated_file_makes_it_fall_back(tmp_path, teacher, student, text):
    fields = dict(teacher=teacher, student=student, dataset=text, save_steps=2, batch_size=4)
    whole = tmp_path / "whole"
    newest = Path("checkpoints", "step-00000004")
    distil(whole, **fields, max_steps=4)
    files = sorted(path.name for path in (whole / newest).iterdir())
    assert "state.json" in files and ".metadata" in files
    for file in files:
        run = tmp_path / f"run{file}"
        shutil.copytree(whole, run)
        knobs = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(knobs | {"output_dir": str(run)}))
        shutil.rmtree(run / "final")
        os.truncate(run / newest / file, os.path.getsize(run / newest / file) // 2)
        shown = distil(run, **fields, max_steps=4).out
        assert "step-00000004 is not readable" in shown
        assert re.search("resumes from .*step-00000002", shown)
        assert same(final_weights(run), final_weights(whole))
        assert quiet_log(run) == quiet_log(whole)
    shutil.rmtree(run / newest)
    os.truncate(run / "checkpoints" / "step-00000002" / "state.json", 3)
    assert "no readable checkpoint" in distil(run, **fields, max_steps=6, rc=2).err


def test_checkpoints_a_full_disk_loses_nothing_old(tmp_path, teacher, student, text):
    """A file-size limit makes every larger write fail as a full disk does: the run goes on, says
    so, and ends with an error."""
    run = tmp_path / "run"
    fields = dict(PLAIN, teacher=teacher, student=student, dataset=text, save_steps=2,
                  output_dir=run)
    Fork(tmp_path / "a.txt", *flags(**fields, max_steps=2)).wait()
    before = checkpoint(run, 2)
    shown = Fork(tmp_path / "b.txt", *flags(**fields, max_steps=6), limit=20_000).wait()
    assert shown.count("could not be saved") >= 2, shown
    assert "error: the run could not be saved" in shown, shown
    assert "Traceback" not in shown, shown
    assert same(checkpoint(run, 2), before)
    assert "done in" in Fork(tmp_path / "c.txt", *flags(**fields, max_steps=6)).wait()
    assert not list((run / "checkpoints").glob("tmp*"))


def test_checkpoints_a_full_tmpfs(tmp_path, teacher, student, text):
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        shown = distil(disk / "run", teacher=teacher, student=student, dataset=text, save_steps=1,
                       keep_checkpoints=9, max_steps=6, rc=2)
        assert "could not be saved" in shown.out + shown.err
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").glob("step-*"))
        assert kept[0] == "step-00000001"
        assert len(checkpoint(disk / "run", 1)) > 3
    finally:
        subprocess.run(["umount", disk], check=True)


def flip(path, at=0.5):
    """One bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[int(at * len(content))] ^= 1
    Path(path).write_bytes(content)


def test_checkpoints_a_flipped_bit_in_any_file_makes_it_fall_back(tmp_path, student, text):
    """Also where the file can still be read: a digit of state.json, a weight."""
    out = tmp_path / "out"
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=4, save_steps=2)
    newest = out / "checkpoints" / "step-00000004"
    files = sorted(os.listdir(newest))
    assert len(files) == 3
    with sd.process_group():
        assert sd.find_checkpoint("auto", str(out))[0] == str(newest)
        for file in files:
            for at in (0.1, 0.5, 0.9):
                flip(newest / file, at)
                assert sd.find_checkpoint("auto", str(out))[0].endswith("step-00000002"), file
                flip(newest / file, at)
        assert sd.find_checkpoint("auto", str(out))[0] == str(newest)


def test_checkpoints_what_is_damaged_is_set_aside_and_counts_as_none(tmp_path, student, text):
    """With one to keep, the step after a resume must not push out the good one."""
    out = tmp_path / "out"
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=6)
    flip(next((out / "checkpoints" / "step-00000006").glob("*.distcp")))
    shown = distil(out, **fields, max_steps=7, keep_checkpoints=1).out
    assert "passed over" in shown and "resumes from" in shown and "set aside" in shown
    assert sorted(os.listdir(out / "checkpoints")) == ["aside-00000006", "step-00000007"]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def replant(folder, change):
    """Change a checkpoint's .metadata, with checksums that fit: as a stranger would."""
    path = Path(folder, ".metadata")
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata)))
    state = json.loads(Path(folder, "state.json").read_text())
    del state["digest"]
    state["files"][".metadata"] = sd.checksum(path)
    state["digest"] = sd.digest(state)
    Path(folder, "state.json").write_text(json.dumps(state))


def test_checkpoints_run_no_code(tmp_path, student, text):
    """A pickle in .metadata, and bytes in place of a tensor, which dcp unpickles when it loads."""
    victim = tmp_path / "victim"

    def payload(metadata):
        return Payload(victim)

    def bytes_for_a_tensor(metadata):
        name = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
        return metadata

    fields = dict(student=student, dataset=text, alpha=1.0)
    for i, change in enumerate([payload, bytes_for_a_tensor]):
        out = tmp_path / f"out{i}"
        distil(out, **fields, max_steps=2)
        replant(out / "checkpoints" / "step-00000002", change)
        shown = distil(out, rc=2, **fields, max_steps=3)
        assert "which a checkpoint does not need" in shown.err
        assert not victim.exists()


def test_checkpoints_a_stale_final_is_not_called_done(tmp_path, student, text):
    """Of a shorter run, or of one before: the longer one writes its own."""
    out = tmp_path / "out"
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=2)
    shutil.copytree(out / "final", tmp_path / "stale")
    distil(out, **fields, max_steps=4)
    shutil.rmtree(out / "final")
    shutil.copytree(tmp_path / "stale", out / "final")   # as if killed after the last checkpoint
    shown = distil(out, **fields, max_steps=4).out
    assert "finished" not in shown
    distil(tmp_path / "whole", **fields, max_steps=4)
    assert same(final_weights(out), final_weights(tmp_path / "whole"))
    assert "finished" in distil(out, **fields, max_steps=4).out


def test_checkpoints_a_final_that_could_not_be_written_is_written_by_the_next_run(tmp_path, student,
                                                                                  text):
    out = tmp_path / "out"
    fields = dict(student=student, dataset=text, alpha=1.0)
    distil(out, **fields, max_steps=1)
    stale = digests_below(out / "final")
    blocked = out / "final.tmp"
    blocked.write_text("in the way")
    shown = distil(out, rc=2, **fields, max_steps=2)
    assert "could not be saved" in shown.err and "final.tmp" in shown.err
    assert digests_below(out / "final") == stale
    blocked.unlink()
    assert "finished" not in distil(out, **fields, max_steps=2).out
    assert "finished" in distil(out, **fields, max_steps=2).out
    assert digests_below(out / "final") != stale


def test_checkpoints_resume_from_an_older_one_sets_the_newer_aside(tmp_path, student, text):
    out = tmp_path / "out"
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=6)
    old = checkpoint(out, 6)
    older = f"{out}/checkpoints/step-00000002"
    shown = distil(out, **fields, max_steps=4, resume=older).out
    assert "set aside" in shown and "step-00000004, step-00000006" in shown.replace(
        "step-00000006, step-00000004", "step-00000004, step-00000006")
    kept = sorted(os.listdir(out / "checkpoints"))
    assert kept == ["aside-00000004", "aside-00000006", "step-00000002", "step-00000004"]
    os.rename(out / "checkpoints" / "aside-00000006", out / "checkpoints" / "step-00000006")
    assert same(checkpoint(out, 6), old)


def test_checkpoints_resume_by_path_into_another_run_is_refused(tmp_path, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, max_steps=2)
    one = tmp_path / "one"
    other = tmp_path / "other"
    distil(one, **fields)
    distil(other, **fields, seed=7)
    before = digests_below(other)
    path = one / "checkpoints" / "step-00000002"
    refused = distil(other, rc=2, **{**fields, "max_steps": 4}, resume=path)
    assert "seed 7 there, 0 here" in refused.err
    assert digests_below(other) == before


def digests_below(folder):
    """{path: digest of its content} of all files; error.log left out."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name != "error.log":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_checkpoints_other_files_under_the_same_names_are_refused(tmp_path, teacher, student):
    """A teacher trained on, a dataset that grew or was halved: none goes on silently."""
    other_teacher = shutil.copytree(teacher, tmp_path / "teacher")
    rows = [{"text": prose(12, i)} for i in range(30)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    out = tmp_path / "out"
    fields = dict(teacher=other_teacher, student=student, dataset=data)
    distil(out, **fields, max_steps=2)
    before = digests_below(out)

    def double(tensors):
        tensors["model.norm.weight"] *= 2

    kept = digests_below(other_teacher)
    edit_weights(other_teacher, double)
    assert "teacher's weights" in distil(out, rc=2, **fields, max_steps=3).err
    shutil.rmtree(other_teacher)
    shutil.copytree(teacher, other_teacher)
    assert digests_below(other_teacher) == kept
    for changed in (rows[:15], rows + rows[:1]):
        write_jsonl(data, changed)
        assert "rows to train on" in distil(out, rc=2, **fields, max_steps=3).err
    assert digests_below(out) == before
    write_jsonl(data, rows)
    distil(out, **fields, max_steps=3, num_proc=2)   # which has no say in what the rows are


def test_checkpoints_somebody_elses_files_are_refused_and_kept(tmp_path, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, max_steps=1)
    model = shutil.copytree(student, tmp_path / "model")
    shutil.rmtree(model / "final", ignore_errors=True)
    thesis = tmp_path / "thesis"
    (thesis / "final").mkdir(parents=True)
    (thesis / "final" / "thesis.txt").write_text("years")
    notes = tmp_path / "notes"
    (notes / "checkpoints" / "step-00000001").mkdir(parents=True)
    (notes / "checkpoints" / "step-00000001" / "weights.pt").write_text("theirs")
    mine = tmp_path / "mine"
    distil(mine, **fields)
    (mine / "final" / "thesis.txt").write_text("years")
    spelled = tmp_path / "thesis" / ".." / "model"
    for out, named in [(model, "config.json"), (spelled, "config.json"), (thesis, "final"),
                       (notes, "step-00000001"), (mine, "final")]:
        for resume in ("auto", "never"):
            before = digests_below(out)
            refused = distil(out, rc=2, **fields, seed=3, resume=resume)
            assert named in refused.err and "not written by simple_distill" in refused.err
            assert digests_below(out) == before


def test_checkpoints_a_run_keeps_the_final_that_is_its_student(tmp_path, student, text):
    """Until its own is whole: killed before that, it can be started again."""
    out = tmp_path / "out"
    fields = dict(dataset=text, alpha=1.0, resume="never")
    distil(out, **fields, student=student, max_steps=1)
    before = digests_below(out / "final")
    endless = {**PLAIN, **fields, "student": out / "final", "output_dir": out,
               "max_steps": 100_000, "save_steps": 1}
    run = Fork(tmp_path / "log.txt", *flags(**endless))
    end = time.time() + 60
    while not list((out / "checkpoints").glob("step-*[2-9]")):
        assert run.running() and time.time() < end, Path(run.log).read_text()
        time.sleep(0.02)
    run.signal(signal.SIGKILL).wait()
    assert digests_below(out / "final") == before


def test_checkpoints_fewer_steps_than_the_checkpoint_has_change_nothing(tmp_path, student, text):
    out = tmp_path / "out"
    fields = dict(student=student, dataset=text, alpha=1.0)
    distil(out, **fields, max_steps=4)
    before = digests_below(out)
    refused = distil(out, rc=2, **fields, max_steps=2)
    assert "step 4" in refused.err and "end at 2" in refused.err
    assert digests_below(out) == before


# --------------------------------------------------------------------------------------------------
# Train: the command line against an independent reference; what a run leaves behind.


def with_chatml(folder, *paths):
    """Copies of models that bring a chat template -> their paths."""
    copies = []
    for path in paths:
        copy = folder / Path(path).name
        shutil.copytree(path, copy)
        tiny_tokenizer(CHATML).save_pretrained(copy)
        copies.append(copy)
    return copies


def logged_losses(entry, kind="train"):
    return [entry[f"{kind}/loss"], entry[f"{kind}/ce_loss"], entry[f"{kind}/kl_loss"]]


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_train_five_steps_match_plain_pytorch(tmp_path, teacher, student, out, divergence):
    teacher_copy, student_copy = with_chatml(tmp_path, teacher, student)
    rows = talk(8)
    distil(out, teacher=teacher_copy, student=student_copy, seq_len=256, num_epochs=5,
           dataset=write_splits(tmp_path / "data", rows, rows[:2]), batch_size=4,
           gradient_accumulation_steps=2, alpha=0.3, temperature=2.0, divergence=divergence,
           max_grad_norm=0.5)

    torch.manual_seed(0)
    model = load(student)
    teacher_model = load(teacher)
    coded = chatml_rows(rows)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0)
    logged = log(out, "train")
    assert len(logged) == 5
    for entry in logged:
        losses = model_losses(model, teacher_model, coded, 0.3, 2.0, divergence)
        losses[0].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5   # clipping is at work
        optimizer.step()
        optimizer.zero_grad()
        assert logged_losses(entry) == pytest.approx([loss.item() for loss in losses], rel=1e-5)
        assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    after = model.state_dict()
    assert distance(final_weights(out), after) < 1e-5
    moved = {name: after[name] - before[name] for name in before}
    our_move = {name: x - before[name] for name, x in final_weights(out).items()}
    assert distance(our_move, moved) < 1e-3
    assert same(weights(teacher_copy), weights(teacher))


def test_train_batch_and_accumulation_are_interchangeable(tmp_path, teacher, student, chat):
    """8x1, 2x4 and 1x8 give the same gradient."""
    results = []
    for batch_size, micro_steps in ((8, 1), (2, 4), (1, 8)):
        out = str(tmp_path / f"{batch_size}x{micro_steps}")
        distil(out, teacher=teacher, student=student, dataset=chat, seq_len=256, max_steps=1,
               batch_size=batch_size, gradient_accumulation_steps=micro_steps, max_grad_norm=0,
               alpha=0.3, temperature=2.0)
        first = log(out, "train")[0]
        results.append((gradients(out), [*logged_losses(first), first["train/grad_norm"]]))
    expected_gradients, expected_values = results[0]
    for found_gradients, values in results[1:]:
        assert values == pytest.approx(expected_values, rel=1e-6)
        assert distance(found_gradients, expected_gradients) < 1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_train_student_that_is_the_teacher_does_not_move(out, teacher, text, divergence):
    distil(out, teacher=teacher, student=teacher, dataset=text, alpha=0.0, temperature=2.0,
           max_steps=3, divergence=divergence)
    assert all(abs(kl) < 1e-6 for kl in column(out, "train/kl_loss"))
    assert same(final_weights(out), weights(teacher))


def test_train_alpha_1_never_touches_the_teacher(out, student, text):
    for teacher in ("/nowhere/teacher", None):
        distil(out, teacher=teacher, student=student, dataset=text, alpha=1.0, max_steps=2,
               resume="never")
        assert column(out, "train/kl_loss") == [0, 0]
        assert column(out, "train/loss") == column(out, "train/ce_loss")
        assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]


# ---- lengths, schedules, seeds


def cosine_rates(warmup, steps):
    """As transformers' own scheduler gives them, one a step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1e-3)
    scheduler = transformers.get_scheduler("cosine", optimizer, warmup, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_train_epochs_steps_and_schedule_agree(tmp_path, student):
    """10 rows, 4 a step: 3 steps a pass, the last one ragged; two passes are six steps, however
    they are asked for."""
    data = write_splits(tmp_path / "data", talk(10), talk(2))
    fields = dict(student=student, dataset=data, seq_len=256, alpha=1.0, lr_scheduler="cosine",
                  warmup_ratio=0.34)
    variants = {
        "epochs": dict(num_epochs=2, batch_size=4),
        "steps": dict(max_steps=6, batch_size=4),
        "accumulated": dict(num_epochs=2, batch_size=2, gradient_accumulation_steps=2),
    }
    for name, variant in variants.items():
        out = tmp_path / name
        distil(out, **fields, **variant)
        assert column(out, "train/learning_rate") == pytest.approx(cosine_rates(2, 6))
        assert column(out, "train/epoch") == pytest.approx([k / 3 for k in range(1, 7)])
    epochs = final_weights(tmp_path / "epochs")
    assert same(epochs, final_weights(tmp_path / "steps"))
    # accumulated has a micro-batch without any row in each ragged step
    accumulated = column(tmp_path / "accumulated", "train/loss")
    assert accumulated == pytest.approx(column(tmp_path / "epochs", "train/loss"), rel=1e-6)
    assert distance(final_weights(tmp_path / "accumulated"), epochs) < 1e-5


@pytest.mark.parametrize("num_epochs, steps", [(0.1, 1), (1, 3), (1.5, 5)])
def test_train_part_of_an_epoch(tmp_path, out, student, num_epochs, steps):
    data = write_splits(tmp_path / "data", talk(10), talk(2))
    distil(out, student=student, dataset=data, seq_len=256, alpha=1.0, batch_size=4,
           num_epochs=num_epochs)
    assert column(out, "train/step") == list(range(1, steps + 1))


def test_train_seed_decides(tmp_path, student, text):
    results = []
    for i, seed in enumerate((0, 0, 1)):
        distil(tmp_path / str(i), student=student, dataset=text, alpha=1.0, max_steps=2, seed=seed)
        results.append(final_weights(tmp_path / str(i)))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


# ---- what is not finite, and what is not there


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_train_ten_steps_that_are_not_finite_stop_the_run_with_a_checkpoint(tmp_path, out, teacher,
                                                                            student, role):
    pair = dict(teacher=teacher, student=student)
    pair[role] = break_letter(pair[role], tmp_path / "broken")
    rows = []
    for i in range(40):
        rows.append({"prompt": "a" if i < 3 else "Z", "response": prose(3, i)})
    data = write_splits(tmp_path / "data", rows, rows[:2])
    err = distil(out, rc=2, **pair, dataset=data, seq_len=64, batch_size=1, max_steps=40).err
    assert "finite" in err
    skipped = column(out, "train/skipped_steps")
    assert skipped == sorted(skipped)
    assert 9 <= skipped[-1] <= 13
    assert not os.path.exists(f"{out}/final")
    saved, = os.listdir(f"{out}/checkpoints")
    saved_step = int(saved.removeprefix("step-"))
    last_step = max(column(out, "train/step"))
    assert last_step <= saved_step <= last_step + 1
    moments = {name: x for name, x in checkpoint(out, saved_step).items() if "exp_avg" in name}
    assert moments
    assert all(x.isfinite().all() for x in moments.values())   # of the last good step


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_train_a_row_that_breaks_the_loss_skips_its_step_only(tmp_path, out, teacher, student,
                                                              role):
    pair = dict(teacher=teacher, student=student)
    pair[role] = break_letter(pair[role], tmp_path / "broken")
    rows = []
    for i in range(12):
        rows.append({"prompt": "Z" if i % 4 == 0 else "a", "response": prose(3, i)})
    data = write_splits(tmp_path / "data", rows, rows[1:3])
    distil(out, **pair, dataset=data, seq_len=64, batch_size=1, num_epochs=1, weight_decay=0.1)
    assert column(out, "train/skipped_steps")[-1] == 3
    losses = column(out, "train/loss")
    assert len(losses) - losses.count(None) == 9   # null: JSON knows no NaN
    before = weights(pair["student"])
    after = final_weights(out)
    assert not same(before, after)
    for name, x in after.items():
        assert "embed" in name or x.isfinite().all(), name


def test_train_weights_that_are_not_finite_are_never_final(tmp_path, out, student, text):
    """Fewer than ten steps: nothing else would notice."""
    fields = dict(student=student, dataset=text, alpha=1.0, max_steps=4, learning_rate=1e38,
                  max_grad_norm=0)
    shown = distil(out, rc=2, **fields)
    assert "not finite" in shown.err and "no final/" in shown.err
    assert not os.path.exists(f"{out}/final")
    assert "last good weights" not in shown.err


def test_train_the_advice_after_bad_steps_is_a_command_that_works(tmp_path, out, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0, max_grad_norm=0)
    err = distil(out, rc=2, **fields, max_steps=20, learning_rate=1e38).err
    assert "10 steps in a row" in err and "not finite themselves" in err
    advice = re.search(r"(--resume never) and (--learning_rate \S+),", err)
    rate = float(advice[2].split()[1])
    assert rate < 1e38
    distil(out, **fields, max_steps=2, resume="never", learning_rate=1e-3)


def test_train_a_log_that_cannot_be_written_costs_no_step(tmp_path, out, student, text,
                                                          monkeypatch):
    """The disk fills at step 3, and has room again at 5."""
    path = Path(out, "log.jsonl")
    seed_step = sd.seed_step

    def fill_disk(seed, step):
        if step == 2:
            path.rename(path.with_suffix(".kept"))
            path.symlink_to("/dev/full")
        if step == 4:
            path.unlink()
            path.with_suffix(".kept").rename(path)
        seed_step(seed, step)

    monkeypatch.setattr(sd, "seed_step", fill_disk)
    shown = distil(out, student=student, dataset=text, alpha=1.0, max_steps=6).out
    assert shown.count("log.jsonl cannot be written") == 1
    assert column(out, "train/step") == [1, 2, 5, 6]
    assert os.path.isdir(f"{out}/final")


def break_norm(tensors):
    tensors["model.norm.weight"][0] = math.inf


def test_train_a_model_that_is_broken_throughout_is_called_that(tmp_path, out, teacher, student,
                                                                text):
    """And not a model whose head nobody knows."""
    broken = shutil.copytree(teacher, tmp_path / "broken")
    edit_weights(broken, break_norm)
    err = distil(out, rc=2, teacher=broken, student=student, dataset=text, max_steps=20).err
    assert "finite" in err.lower()


def test_train_a_batch_without_any_target_changes_nothing_and_is_reported(tmp_path, monkeypatch,
                                                                          student, text):
    """The trainer makes no such batch by itself: one is made here by taking the targets of the
    second step away."""
    fields = dict(student=student, dataset=text, alpha=1.0, batch_size=4, weight_decay=0.1)
    distil(tmp_path / "one", **fields, max_steps=1)
    micro_batches = sd.micro_batches

    def second_is_blank(*args):
        for step, (micro, position) in enumerate(micro_batches(*args)):
            if step == 1:
                for batch in micro:
                    batch.positions = batch.positions[:0]
                    batch.labels = batch.labels[:0]
            yield micro, position

    monkeypatch.setattr(sd, "micro_batches", second_is_blank)
    shown = distil(tmp_path / "two", **fields, max_steps=2)
    assert same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"))
    assert "step 2" in shown.out + shown.err
    second = log(tmp_path / "two", "train")[1]
    assert all(math.isfinite(value) for value in second.values())


def test_train_log_is_strict_json(out, student, tmp_path):
    """A loss that is not finite is null; its step has a gradient norm of null too."""
    rows = [{"prompt": "Z" if i % 2 else "a", "response": "one two"} for i in range(4)]
    broken = break_letter(student, tmp_path / "broken")
    data = write_splits(tmp_path / "data", rows, rows[:2])
    distil(out, student=broken, alpha=1.0, dataset=data, batch_size=1)
    with open(f"{out}/log.jsonl") as f:
        # parse_constant is called for NaN and Infinity only
        entries = [json.loads(line, parse_constant=pytest.fail) for line in f]
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert None in losses
    for entry in entries:
        if entry.get("train/loss"):
            assert entry["train/grad_norm"]


# ---- what a run says and leaves

TRAIN_KEYS = {"train/loss", "train/ce_loss", "train/kl_loss", "train/learning_rate",
              "train/grad_norm", "train/epoch", "train/step", "train/tokens_per_second",
              "train/skipped_steps"}
EVAL_KEYS = {"eval/loss", "eval/ce_loss", "eval/kl_loss", "eval/perplexity", "eval/min_loss",
             "eval/epoch", "eval/step"}


def test_train_log_has_exactly_the_keys_of_the_contract(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=5, log_steps=2,
           eval_steps=2, alpha=0.3, learning_rate=0.3)
    for entry in log(out):
        assert entry.keys() in (TRAIN_KEYS, EVAL_KEYS)
    assert column(out, "train/step") == [2, 4, 5]
    assert column(out, "eval/step") == [2, 4, 5]
    for entry in log(out, "train"):
        loss, ce, kl = logged_losses(entry)
        assert loss == pytest.approx(0.3 * ce + 0.7 * kl, rel=1e-6)
        assert entry["train/tokens_per_second"] > 0
        assert entry["train/grad_norm"] > 0
    lowest = math.inf
    for entry in log(out, "eval"):
        lowest = min(lowest, entry["eval/loss"])
        assert entry["eval/min_loss"] == lowest
        assert entry["eval/perplexity"] == pytest.approx(math.exp(entry["eval/ce_loss"]))


def test_train_evaluation_is_the_mean_over_held_out_tokens(out, tmp_path, teacher, student):
    rows = talk(7)
    teacher_copy, student_copy = with_chatml(tmp_path, teacher, student)
    distil(out, teacher=teacher_copy, student=student_copy, seq_len=256, batch_size=3, max_steps=1,
           dataset=write_splits(tmp_path / "data", talk(3), rows), alpha=0.3, temperature=2.0,
           learning_rate=STILL)
    losses = model_losses(load(student), load(teacher), chatml_rows(rows), 0.3, 2.0)
    logged = logged_losses(log(out, "eval")[-1], "eval")
    assert logged == pytest.approx([loss.item() for loss in losses], rel=1e-5)


def count_parameters(path):
    return sum(x.numel() for x in weights(path).values())


def test_train_closing_table_and_sample(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=2).out
    lines = {"teacher": teacher, "student before": student, "student after": student}
    for name, path in lines.items():
        size = f"{count_parameters(path):,}"
        assert re.search(rf"^{name}\s.*\d.*{size}", shown, re.MULTILINE), shown
    assert f"{column(out, 'eval/perplexity')[-1]:.2f}" in shown
    assert "sample" in shown


def test_train_the_first_evaluation_is_short_and_says_of_how_much(out, tmp_path, student):
    """Of a few held-out rows, evenly spaced, also after a resume; the last one is of all."""
    rows = talk(11)
    fields = dict(student=with_chatml(tmp_path, student)[0], seq_len=256, batch_size=1,
                  dataset=write_splits(tmp_path / "data", talk(3), rows), alpha=1.0,
                  learning_rate=STILL)
    spaced = chatml_rows([rows[i] for i in (0, 2, 5, 8)])
    expected = []
    for some in (spaced, chatml_rows(rows)):
        ce = model_losses(load(student), load(student), some, 1.0, 1.0)[1]
        expected.append(f"{math.exp(ce.item()):.2f}")
    for max_steps in (1, 2):
        shown = distil(out, max_steps=max_steps, **fields).out
        before, = re.findall(r"student before \(4 of 11\) +(\S+)", shown)
        after, = re.findall(r"student after +(\S+)", shown)
        assert [before, after] == expected
    assert "student before  " in distil(f"{out}-4", max_steps=1, eval_samples=4, **fields).out


def read_card(out):
    import huggingface_hub
    return huggingface_hub.ModelCard.load(os.path.join(out, "final", "README.md"))


def test_train_final_has_a_model_card(out, teacher, student, text):
    """It says what the run was, with the table that it printed and no path of ours, and is a file
    of final/ like the others."""
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=2, batch_size=3,
                   alpha=0.25, temperature=2.0, divergence="reverse").out
    card = read_card(out)
    about = card.data.to_dict()
    assert about["base_model"] == [Path(teacher).name, Path(student).name]
    assert about["library_name"] == "transformers" and about["pipeline_tag"] == "text-generation"
    assert "distillation" in about["tags"]
    assert "datasets" not in about   # a file of ours is no dataset of the hub
    written = Path(out, "final", "README.md").read_text()
    assert "\nlicense:   # fill in" in written and not about.get("license")
    table = shown[shown.index("held out   "):shown.index("\n\nsample")]
    assert table in card.text
    for fact in (
        f"| teacher | {Path(teacher).name} |",
        f"{count_parameters(student):,} parameters, begun from {Path(student).name} |",
        f"| data | {Path(text).name}, split train, at most 32 tokens a sequence |",
        "0.25 x cross-entropy + 0.75 x T^2 x KL(student, teacher), T 2 |",
        "| steps | distil 2; 3 sequences a step",
    ):
        assert fact in card.text, card.text
    for path in (teacher, text, out):
        assert str(Path(path).parent) not in written
    assert "README.md" in json.loads(Path(out, "final", sd.FINAL_MARK).read_text())["files"]
    assert load(f"{out}/final").num_parameters() == count_parameters(student)


def test_train_model_card_names_hub_models_and_no_folders(tmp_path):
    assert sd.name_for_strangers("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "my run" / "final").mkdir(parents=True)
    assert sd.name_for_strangers(str(tmp_path / "my run" / "final")) == "my run"
    assert sd.name_for_strangers(str(tmp_path / "my run") + "/") == "my run"


def test_train_model_card_of_labels_only_names_no_teacher(out, teacher, text):
    distil(out, teacher=teacher, student="layers:1", dataset=text, max_steps=1, alpha=1)
    card = read_card(out)
    assert card.data.base_model == [Path(teacher).name]
    assert "| teacher | none, labels only |" in card.text
    assert f"begun from 1 layers of {Path(teacher).name} |" in card.text
    assert "| objective | cross-entropy to the labels |" in card.text
    assert "distillation" not in card.data.tags


# ---- Weights & Biases


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)


class FakeWandb:
    """A stand-in for the service, not for our code."""

    def __init__(self):
        self.id = "abc"
        self.config = None
        self.entries = []
        self.exit_codes = []

    def login(self, **_):
        return True

    def Settings(self, **_):
        return None

    def init(self, config, **_):
        self.config = config
        return self

    def log(self, entry, step):
        self.entries.append(entry)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_train_wandb_missing(out, student, text, monkeypatch, no_wandb_settings):
    monkeypatch.setitem(sys.modules, "wandb", None)   # importing it fails
    shown = distil(out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True)
    assert len(re.findall("^wandb.*", shown.out + shown.err, re.MULTILINE)) == 1


def read_terminal(terminal, process, seconds):
    """What a process writes to a terminal, until it ends or the time is over."""
    shown = b""
    deadline = time.time() + seconds
    try:
        while time.time() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65536)
            elif process.poll() is not None:
                break
    except OSError:   # the other end is closed
        pass
    return shown


def test_train_wandb_not_logged_in_never_waits_at_a_prompt(tmp_path, out, student, text,
                                                           no_wandb_settings):
    """On a terminal, where wandb would ask."""
    terminal, other_end = pty.openpty()
    words = flags(**PLAIN, output_dir=out, student=student, dataset=text, alpha=1.0, max_steps=1,
                  use_wandb=True)
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    process = spawn(*words, env=env, stdin=other_end, stdout=other_end, stderr=other_end)
    os.close(other_end)
    try:
        shown = read_terminal(terminal, process, seconds=120)
    finally:
        os.close(terminal)
    try:
        code = process.wait(10)
    finally:
        process.kill()
    assert code == 0, shown.decode()
    assert shown.count(b"wandb: ") == 1 and b"logged in" in shown
    assert os.path.exists(f"{out}/final")


def test_train_wandb_gets_the_same_keys_and_the_whole_config(out, teacher, student, text,
                                                             monkeypatch, no_wandb_settings):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2, use_wandb=True)
    assert wandb.entries == log(out)
    assert wandb.exit_codes == [0]
    assert wandb.config.keys() == config.FIELDS.keys()
    assert "key" not in json.dumps(wandb.config).split()


def test_train_wandb_is_finished_when_training_fails(out, student, tmp_path, monkeypatch,
                                                     no_wandb_settings):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    broken = break_letter(student, tmp_path / "broken")
    rows = [{"prompt": "Z", "response": "one two"}] * 12
    data = write_splits(tmp_path / "data", rows, rows[:2])
    distil(out, rc=2, student=broken, alpha=1.0, dataset=data, batch_size=1, use_wandb=True)
    assert wandb.exit_codes == [1]


@pytest.mark.campaign
def test_train_wandb_offline(out, student, text):
    words = flags(**PLAIN, output_dir=out, student=student, dataset=text, alpha=1.0, max_steps=1,
                  use_wandb=True)
    process = spawn(*words, env={"WANDB_MODE": "offline"})
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert list(Path(out, "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("blockwise", [
    False,
    True,   # optional: blockwise
])
def test_train_dry_run_says_what_a_run_would_and_leaves_nothing(
        out, tmp_path, teacher, student, blockwise):
    """The targets of a conversation are the assistant's words and its end, nothing else."""
    tokenized = with_chatml(tmp_path, student)[0]
    fields = dict(teacher=teacher, student=tokenized, dataset=write_splits(
        tmp_path / "data", talk(8), talk(4)), seq_len=128, batch_size=2, max_steps=7, dry_run=True)
    if blockwise:
        fields |= dict(blockwise=True, max_steps=None, num_epochs=1.0)
    shown = distil(out, tokenizer=tokenized, **fields).out
    assert "memory a device, estimated" in shown
    assert re.search(r"a step\S* ?.* takes \S+ s .* steps about \S+ hours", shown), shown
    example, = re.findall(r"its targets in \[\[ \]\]: (.*)", shown)
    targets = re.findall(r"\[\[(.*?)\]\]", example)
    answers = [row["response"].strip() + "<|im_end|>" for row in talk(8)]
    assert len(targets) == 1 and targets[0] in answers, example
    assert "perplexity" not in shown
    assert not os.path.exists(out)


def test_train_memory_counts_whole_gradients_under_accumulation(student, monkeypatch):
    """Under shard_grad_op each rank holds all gradients between micro-steps, 4 bytes a parameter;
    full_shard reduces them after each."""
    with sd.process_group():
        root = sd.load_student(config.Config(student=student, teacher=student))
    parameters = root.model.num_parameters()
    stage = types.SimpleNamespace(rates=dict.fromkeys(root.parameters(), 1e-3))
    monkeypatch.setattr(sd, "WORLD", 4)
    sizes = {}
    for fsdp, micro_steps in [("full_shard", 8), ("shard_grad_op", 8)]:
        run = types.SimpleNamespace(
            cfg=config.Config(fsdp=fsdp), student=root, teacher=None, stages=[stage], batch_size=2,
            micro_steps=micro_steps)
        sizes[fsdp, micro_steps] = sd.estimate_memory(run)["gradients"] / parameters
    assert sizes == {("full_shard", 8): 1.0, ("shard_grad_op", 8): 4.0}


def test_train_memory_on_a_cpu_is_about_what_was_estimated(tmp_path, teacher, student, text):
    """Of models as small as these nearly all is the process itself."""
    words = flags(**PLAIN, output_dir=tmp_path / "out", teacher=teacher, student=student,
                  dataset=text, max_steps=2)
    shown = Fork(tmp_path / "log.txt", *words).wait()
    estimated = float(re.search(r"estimated: (\S+) GB", shown)[1])
    measured = float(re.search(r"at most (\S+) GB of memory", shown)[1])
    assert 0.7 < measured / estimated < 1.4


# ---- a step on GPUs that exist in name only

# Enough of a CUDA device, for a torch without it, that autograd carries fake tensors of one.
GPU_IN_NAME = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)

struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
"""


class DoneAtOnce:
    """A stream or an event of that device."""
    device = torch.device("cuda", 0)

    def __init__(self, *_, **__):
        pass

    def is_capturing(self):
        return False

    def __getattr__(self, name):
        return lambda *_, **__: self


def pretend_cuda(monkeypatch):
    """One of the 8 GPUs of a node, as torch.cuda and simple_distill see it."""
    card = types.SimpleNamespace(total_memory=85_000_000_000, major=9, minor=0)
    current = DoneAtOnce()
    answers = dict(
        is_available=True, device_count=8, is_initialized=True, current_device=0,
        is_bf16_supported=True, get_device_capability=(9, 0), get_device_properties=card,
        current_stream=current, stream=contextlib.nullcontext(), set_device=None, _lazy_init=None,
        manual_seed_all=None, is_current_stream_capturing=False)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(torch.cuda, "Stream", DoneAtOnce)
    monkeypatch.setattr(torch.cuda, "Event", DoneAtOnce)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    monkeypatch.setattr(sd, "CUDA", True)
    monkeypatch.setattr(sd, "DEVICE", torch.device("cuda", 0))


def fake_flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """What scaled_dot_product_attention runs on a real GPU, and only without a mask."""
    assert attn_mask is None and is_causal
    options.pop("enable_gqa", None)
    return torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, dropout_p, True, False, **options)[0]


def fake_compile(function):
    """As the code that inductor writes for chunk_terms: nothing [C, V] but the gradient."""
    def run(student_CV, labels_C, target):
        ce, kl = student_CV.new_empty(2, len(labels_C), dtype=torch.float32)
        return ce, kl, torch.empty_like(student_CV)
    return run


def stand_in(monkeypatch):
    """For what fake tensors, which hold no numbers, cannot do."""
    mesh = sd.init_device_mesh
    nonzero = torch.Tensor.nonzero

    def real_mesh(*args, **options):
        with unset_fake_temporarily():
            return mesh(*args, **options)

    def all_of_them(tensor):   # labels, all of which are counted
        if not isinstance(tensor, FakeTensor):
            return nonzero(tensor)
        return torch.arange(len(tensor), device=tensor.device)[:, None]

    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", True)
    monkeypatch.setattr(sd, "init_device_mesh", real_mesh)
    monkeypatch.setattr(sd, "all_sum", lambda *values: list(values))
    monkeypatch.setattr(torch.Tensor, "nonzero", all_of_them)
    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fake_flash)
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *_: False)


class GpuInName(TorchDispatchMode):
    """Bytes of all storages on the device, the most of them, collectives, waits of the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.sizes = {}
        self.now = 0
        self.begin_step()
        resize = torch.UntypedStorage.resize_

        def resize_(storage, size):   # so FSDP frees and gathers
            resize(storage, size)
            if id(storage) in self.sizes:
                self.hold(id(storage), size)

        monkeypatch.setattr(torch.UntypedStorage, "resize_", resize_)

    def begin_step(self):
        self.peak = self.now
        self.calls = collections.Counter(wait=0)

    def hold(self, key, size):
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def release(self, key):
        self.now -= self.sizes.pop(key)

    def see(self, tensor):
        storage = sd.local_tensor(tensor).untyped_storage()
        key = id(storage)
        if tensor.device.type == "cuda" and key not in self.sizes:
            self.hold(key, storage.nbytes())
            weakref.finalize(storage, self.release, key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.calls["wait"] += 1   # .item(), or an `if` on a tensor
            return 1
        result = function(*args, **kwargs)
        if function is aten._to_copy.default and args[0].device != result.device:
            self.calls["wait"] += not kwargs.get("non_blocking", False)
        if function.namespace == "c10d":
            self.calls[function.overloadpacket.__name__] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result


def simulated_run(cfg):
    """A Run of student and teacher as start_run would make it."""
    student = sd.load_student(cfg)
    teacher = sd.load_teacher(cfg)
    batch_size, micro_steps, global_batch = sd.plan_batch(cfg, None, sd.WORLD)
    run = sd.Run(
        cfg=cfg, result_knobs={}, inputs={}, tokenizer=None, rows=range(10**6), eval_rows=[],
        student=student, teacher=teacher, batch_size=batch_size, micro_steps=micro_steps,
        global_batch=global_batch, checkpoint=None, started=0.0, free_memory=0, broken_weights=0,
        loss_fn=functools.partial(sd.distil_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                                  divergence=cfg.divergence, vocabulary=151669),
        get_teacher_targets=sd.teacher_targets(teacher), scale_state=sd.new_scale_state(False))
    run.stages = [sd.distillation_stage(run)]
    sd.start_stage(run, run.stages[0])
    return run


SIMULATION = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])   # before torch looks what there is
import test_simple_distill
test_simple_distill.simulate(sys.argv[2])
"""


def simulate(folder):
    """In a process of its own: two steps -> figures of the second, in figures.json."""
    monkeypatch = pytest.MonkeyPatch()
    pretend_cuda(monkeypatch)
    stand_in(monkeypatch)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=sd.RANK, world_size=sd.WORLD)
    cfg = config.parse_config(flags(
        student=f"{folder}/student.json", teacher=f"{folder}/teacher.json", dataset=folder,
        max_steps=2, gradient_accumulation_steps=2, use_wandb=False))
    gpu = GpuInName(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True), gpu:
        run = simulated_run(cfg)
        tokens = run.batch_size * (cfg.seq_len - 1)
        batch = sd.Batch(
            input_ids=torch.zeros(run.batch_size, cfg.seq_len, dtype=torch.long, device="cuda"),
            positions=torch.zeros(tokens, dtype=torch.long, device="cuda"),
            labels=torch.zeros(tokens, dtype=torch.long), real=None)
        for _ in range(2):
            gpu.begin_step()
            run.set_rates(0)
            sd.add_gradients(run, run.stages[0], [batch] * run.micro_steps, 1000)
            norm = sd.optimizer_step(run.optimizer, cfg.max_grad_norm, run.scale_state, False)
            run.optimizer.zero_grad()
        assert norm.device.type == "cuda" and norm.dtype == torch.float32
    figures = dict(gpu.calls, peak=gpu.peak, estimated=sum(sd.estimate_memory(run).values()))
    Path(folder, "figures.json").write_text(json.dumps(figures))


@pytest.mark.campaign
def test_train_a_step_on_eight_gpus_that_exist_in_name_only(tmp_path):
    """0.6B <- 4B under full_shard with fake tensors: whatever is on the wrong device or of the
    wrong type raises. FSDP gathers and reduces as often as it should, nothing waits for the GPU,
    and the peak is the estimate's."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "gpu.cpp").write_text(GPU_IN_NAME)
    torch_folder = os.path.dirname(torch.__file__)
    library = str(tmp_path / "gpu.so")
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", tmp_path / "gpu.cpp", "-o", library,
         f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include",
         f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-lc10", "-ltorch_cpu"],
        check=True)
    layers = {}
    for name, hidden, inner, heads, depth in [("student", 1024, 3072, 16, 28),
                                              ("teacher", 2560, 9728, 32, 36)]:
        layers[name] = depth
        transformers.Qwen3Config(
            vocab_size=151936, hidden_size=hidden, intermediate_size=inner, head_dim=128,
            num_attention_heads=heads, num_key_value_heads=8, num_hidden_layers=depth,
            tie_word_embeddings=True).to_json_file(tmp_path / f"{name}.json")
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", SIMULATION, library, str(tmp_path)], cwd=HERE, env=env,
        capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    # a micro-step: student's root, its layers forward and backward, the teacher's layers
    gathers = 1 + 2 * layers["student"] + layers["teacher"]
    assert figures["wait"] == 0
    assert figures["_allgather_base_"] == 2 * gathers
    assert figures["_reduce_scatter_base_"] == 2 * (1 + layers["student"])
    assert figures["peak"] == pytest.approx(figures["estimated"], rel=0.1)


# --------------------------------------------------------------------------------------------------
# Optional: streaming: the same rows from a stream.


def batches_of(path, position=None, global_batch=4, stream=None, **fields):
    """What a run gets of a stream: endless (rows of a global batch, position after it)."""
    cfg = config.Config(**{"dataset": path, "streaming": True, "max_steps": 99, "seq_len": 64,
                           "eval_samples": 1, **fields})
    if stream is None:
        with sd.process_group():
            stream, _ = sd.load_data(cfg, tiny_tokenizer())
    return sd.batches_of_stream(types.SimpleNamespace(
        cfg=cfg, tokenizer=tiny_tokenizer(), rows=stream, global_batch=global_batch,
        progress=types.SimpleNamespace(position=position), student=None, teacher=None))


def epoch_of(path, **fields):
    """All rows of the first epoch."""
    rows = []
    for batch, position in batches_of(path, global_batch=1, **fields):
        if position["epoch"]:
            return rows
        rows += batch


@pytest.mark.parametrize("words", [50, 500])
def test_streaming_reads_the_head_of_its_eval_split(tmp_path, words):
    """Nothing is prepared whole, and no more is read than eval_samples sequences need: so many
    rows, with 8 characters a token."""
    rows = [{"text": prose(words, i)} for i in range(100)]
    folder = write_splits(tmp_path / "data", rows[:50], rows)
    cfg = config.Config(dataset=folder, streaming=True, eval_samples=5, seq_len=32)
    stream, held_out = sd.split_stream(cfg)
    assert not isinstance(stream, datasets.Dataset)
    assert list(stream) == rows[:50]
    enough = next(n for n in range(5, 100) if sum(len(str(row)) for row in rows[:n]) > 8 * 5 * 32)
    assert list(held_out) == rows[:enough]


@pytest.mark.parametrize("count, max_samples, held_out", [
    (60, None, 10), (8, None, 1), (40, 39, 10), (60, 11, 10), (60, 10, 1)])
def test_streaming_holds_the_first_rows_out(tmp_path, count, max_samples, held_out):
    """As many as eval_samples, of a short stream a twentieth."""
    rows = [{"text": prose(5, i)} for i in range(count)]
    cfg = config.Config(dataset=write_jsonl(tmp_path / "d.jsonl", rows), streaming=True,
                        eval_samples=10, max_samples=max_samples)
    stream, eval_raw = sd.split_stream(cfg)
    assert list(eval_raw) == rows[:held_out]
    assert list(stream) == rows[held_out:max_samples]


def test_streaming_trains_on_the_same_rows(tmp_path, teacher, student, chat):
    """Three passes over eight rows, eight a step: in whatever order they come, each step is all of
    them."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=256, batch_size=8,
                  max_steps=3, alpha=0.3)
    table = tmp_path / "table"
    stream = tmp_path / "stream"
    distil(table, **fields)
    distil(stream, **fields, streaming=True, shuffle_buffer=3)
    for key in ("train/loss", "eval/loss"):
        assert column(stream, key) == pytest.approx(column(table, key), rel=1e-6)
    assert distance(final_weights(stream), final_weights(table)) < 1e-5


def test_streaming_of_text_unshuffled_is_the_same_blocks(tmp_path):
    rows = [{"text": prose(5 + i % 7, i)} for i in range(30)]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    assert ids_of(epoch_of(path, shuffle_buffer=0)) == ids_of(rows_of(path)[0])


def test_streaming_shuffles_within_windows_each_in_an_order_of_its_own(tmp_path):
    rows = talk(28)
    path = write_splits(tmp_path / "d", rows, rows[:1])
    plain = ids_of(epoch_of(path, shuffle_buffer=0))
    batches = batches_of(path, global_batch=7, shuffle_buffer=7)
    orders = set()
    for window in [plain[i:i + 7] for i in range(0, 28, 7)] * 2:   # two epochs
        found = ids_of(next(batches)[0])
        assert sorted(found) == sorted(window)
        orders.add(tuple(window.index(ids) for ids in found))
    assert len(orders) == 8


def test_streaming_a_resume_finds_the_same_rows(tmp_path):
    """Within a window, at its end, in the second epoch."""
    path = write_jsonl(tmp_path / "d.jsonl", talk(30))
    batches = batches_of(path, shuffle_buffer=7)
    whole = [next(batches) for _ in range(20)]
    for first in (3, 7, 11):
        again = batches_of(path, whole[first - 1][1], shuffle_buffer=7)
        for rows, position in whole[first:first + 5]:
            same_rows, same_position = next(again)
            assert ids_of(same_rows) == ids_of(rows)
            assert same_position == position


def test_streaming_a_reader_that_fails_is_an_error(tmp_path):
    def rows_that_break():
        yield from talk(50)
        raise ValueError("JSON parse error in row 50")

    stream = datasets.IterableDataset.from_generator(rows_that_break)
    batches = batches_of("d", stream=stream, shuffle_buffer=20)
    assert len([next(batches) for _ in range(10)]) == 10
    with pytest.raises(config.UserError, match="while reading window 2 .* error in row 50"):
        next(batches)


def test_streaming_bad_rows_are_dropped_until_an_epoch_has_no_other(tmp_path, capsys):
    good = talk(9)
    bad = [{"id": 1}] * 20
    path = write_jsonl(tmp_path / "d.jsonl", [*good, *bad])
    batches = batches_of(path, shuffle_buffer=10)
    first, second, third = [next(batches) for _ in range(3)]
    assert third[1]["epoch"] == 1
    told = capsys.readouterr().out
    assert re.search("of the first 10 rows dropped: {.*text.*: 2}", told), told
    again = batches_of(path, second[1], shuffle_buffer=10)   # nothing good is left of that epoch
    assert ids_of(next(again)[0]) == ids_of(third[0])
    useless = write_jsonl(tmp_path / "useless.jsonl", [good[0], *bad])
    with pytest.raises(config.UserError, match="no row of the stream .* holds a target"):
        next(batches_of(useless, shuffle_buffer=10))


def test_streaming_refuses_an_id_that_the_head_has_not(tmp_path, out):
    """Where a row holds one: the last byte of an eszett is number 260."""
    student = tiny_model(tmp_path / "student", vocab=250)
    rows = [{"text": prose(9, i)} for i in range(20)]
    path = write_splits(tmp_path / "d", [*rows, {"text": "ß"}], rows[:2])
    err = distil(out, rc=2, student=student, dataset=path, alpha=1, streaming=True, max_steps=2).err
    assert "token 260" in err


def test_streaming_documents_are_packed_within_a_window(tmp_path):
    rows = talk(60)
    path = write_splits(tmp_path / "d", rows, rows[:4])
    apart, _ = rows_of(path, seq_len=128)
    packed = epoch_of(path, seq_len=128, packing="documents", shuffle_buffer=20)
    assert documents_of(packed) == documents_of(apart)
    assert len(packed) < len(apart) / 1.3


# --------------------------------------------------------------------------------------------------
# Optional: demo: from nothing to a better student.


@pytest.mark.parametrize("words, max_steps, seq_len", [
    ("", 500, 128),
    ("--max_steps 7 --num_epochs 2", 7, 128),
    ("--num_epochs 2", None, 128),
    ("--blockwise --num_epochs 0", None, 128),   # optional: blockwise
    ("--lr_scheduler constant", 500, 128),
    ("--teacher t --student s --dataset d", None, 512),
    ("--mode eval", None, 128),   # optional: eval
    ("--mode eval --student s", None, 128),   # optional: eval
    ("--mode eval --teacher t --dataset d", None, 512),   # optional: eval
    ("--mode cache --cache_dir c", None, 128),   # optional: cache
])
def test_demo_decides_only_what_is_left_open(tmp_path, words, max_steps, seq_len):
    """Its defaults fill in for the demo alone, never beside a flag that rules them out; and what
    config.json says of such a run is that run."""
    cfg = config.parse_config(words.split())
    assert (cfg.max_steps, cfg.seq_len) == (max_steps, seq_len)
    path = str(tmp_path / "config.json")
    sd.write_json(config.knobs_of(cfg), path)
    assert config.knobs_of(config.parse_config(["--config", path])) == config.knobs_of(cfg)


@pytest.mark.parametrize("words, made, whole", [
    ("", "teacher student dataset", True),
    ("--alpha 0.1 --max_steps 2", "teacher student dataset", True),
    ("--tokenizer mine", "teacher student dataset", True),
    ("--dry_run", "teacher student dataset", False),
    ("--alpha 1", "student dataset", False),
    ("--dataset d", "teacher student", False),
    ("--student s --dataset d", "teacher", False),
    ("--student s --dataset d --alpha 1", "", False),
    ("--student layers:1 --alpha 1", "teacher dataset", False),
    ("--mode eval", "teacher dataset", False),   # optional: eval
    ("--cache_dir c", "student", False),   # optional: cache
    ("--mode cache --cache_dir c", "teacher student dataset", False),   # optional: cache
    ("--blockwise", "teacher student dataset", False),   # optional: blockwise
    ("--on_policy 0.5", "teacher student dataset", False),   # optional: on_policy
])
def test_demo_stands_in_for_what_is_needed(tmp_path, monkeypatch, capsys, words, made, whole):
    """Here all is there already. The whole demo is answered."""
    monkeypatch.setattr(sd.huggingface_hub.constants, "HF_HOME", str(tmp_path))
    cfg = config.parse_config(words.split())
    assert sd.is_whole_demo(cfg) == whole   # optional: eval
    folder = sd.demo_folder(cfg)
    paths = {"teacher": f"{folder}/teacher/final", "dataset": f"{folder}/corpus",
             "student": f"{folder}/student/config.json"}
    for path in paths.values():
        os.makedirs(path)
    Path(folder, ".simple_distill").write_text("demo 1")
    with sd.process_group():
        resolved = sd.resolve_demo(cfg)
    expected = {role: paths[role] for role in made.split()}
    shown = capsys.readouterr().out
    assert re.findall(r"--(\w+) (\S+)", shown) == list(expected.items())
    if "student" in made:
        expected["tokenizer"] = cfg.tokenizer or f"{folder}/tokenizer"
    assert config.knobs_of(resolved) == config.knobs_of(cfg) | expected
    assert resolved.given == cfg.given


def test_demo_is_made_of_the_modules_of_a_library(tmp_path, monkeypatch):
    """In an order that no package leads, each in one split; also where a kill left half of it."""
    library = tmp_path / "lib"
    library.mkdir()
    names = sorted([f"m{i}.py" for i in range(60)], key=sd.digest)
    for name in names:
        (library / name).write_text(f"x = {name!r}\n")
    (library / "empty.py").write_text("\n")
    monkeypatch.setattr(sd.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    splits = {"train": [], "validation": []}
    for name in names:
        split = "validation" if int(sd.digest(name), 16) % 20 == 0 else "train"
        splits[split].append({"text": f"x = {name!r}\n"})
    folder = str(tmp_path / "demo")
    for _ in range(2):
        sd.write_demo_files(folder)
        for split, rows in splits.items():
            assert len(rows) > 1 and read_lines(f"{folder}/corpus/{split}.jsonl") == rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    assert tokenizer.encode("<|end|>") == [tokenizer.eos_token_id] == [0]
    assert len(tokenizer.encode("x = 'm")) < 6   # it has learnt from them
    for name in ("student", "teacher-shape"):
        assert transformers.AutoConfig.from_pretrained(f"{folder}/{name}").vocab_size == 1024


def test_demo_trains_the_same_on_labels_alone_and_says_whether_the_teacher_paid(   # optional: eval
        tmp_path, out, teacher, student, text):
    """The control is the run with --alpha 1, and what is done is not trained again."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "max_steps": 4,
              "save_steps": 4}
    distil(out, **fields)
    distil(tmp_path / "alone", **fields, alpha=1)
    control = f"{out}/labels-only"
    lines = []
    for resume in ("auto", f"{out}/checkpoints/step-00000004"):   # that of the other student
        cfg = config.Config(**fields, output_dir=out, use_wandb=False, resume=resume)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), sd.process_group():
            assert sd.answer_demo(cfg)
        assert ("done in" in shown.getvalue()) == (resume == "auto")
        lines.append(shown.getvalue().strip().splitlines()[-1])
        assert same(final_weights(control), final_weights(tmp_path / "alone"))
        assert quiet_log(control) == quiet_log(tmp_path / "alone")
    assert lines[0] == lines[1]
    models = json.loads(Path(out, "report.json").read_text())["models"]
    assert list(models) == ["teacher", "student", "labels-only"]
    with_teacher, alone = [column(folder, "eval/perplexity")[-1] for folder in (out, control)]
    assert f"perplexity {with_teacher:.2f}, on labels alone {alone:.2f} " in lines[0]


@pytest.mark.parametrize("verdict, says", [
    ("better", "The teacher paid:"),
    ("worse", "The teacher did not pay:"),
    ("no significant difference", "Whether the teacher paid, this run cannot tell:"),
])
def test_demo_says_truthfully_whether_the_teacher_paid(verdict, says):   # optional: eval
    against = dict(verdict=verdict, difference=-0.2, interval=[-0.31, 0.04])
    line = sd.did_teacher_pay({"perplexity": 40}, {"perplexity": 50, "student_against_it": against})
    assert line == (f"{says} held-out perplexity 40.00, on labels alone 50.00 after the same steps;"
                    " -0.2000 bits a byte (95 %: -0.3100 to +0.0400)")


def run_the_demo(out, home, *words):
    """What a newcomer types, in a fresh process with a home of its own -> what it shows."""
    env = {"HF_HOME": str(home), "OMP_NUM_THREADS": str(os.cpu_count())}
    process = spawn("--output_dir", out, *words, env=env)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    return shown


@pytest.mark.campaign
def test_demo_labels_only_needs_no_teacher(out, tmp_path):
    run_the_demo(out, tmp_path / "home", "--alpha", 1, "--max_steps", 3)
    assert os.path.exists(f"{out}/final")
    made = {path.name for path in tmp_path.glob("home/simple_distill/demo-*/[a-z]*")}
    assert made == {"corpus", "tokenizer", "student", "teacher-shape"}


@pytest.mark.campaign
def test_demo_from_nothing_to_a_better_student(out, tmp_path):
    """Distilling beats labels alone at the same steps; output_dir holds only what the run made, and
    a second demo finds files and teacher of the first."""
    home = tmp_path / "home"
    shown = run_the_demo(out, home)
    assert "first the teacher" in shown
    assert shown.splitlines()[-1].startswith("The teacher paid: ")   # optional: eval
    knobs = json.loads(Path(out, "config.json").read_text())
    assert all(knobs[name].startswith(str(home)) for name in ("teacher", "student", "dataset"))
    assert not os.path.exists(f"{out}/demo")
    again = run_the_demo(out, home)
    assert "first the teacher" not in again
    assert "done in" not in again   # optional: eval
    assert again.splitlines()[-1] == shown.splitlines()[-1]   # optional: eval
    run_the_demo(f"{out}-labels", home, "--alpha", 1)
    assert column(out, "eval/perplexity")[-1] < column(f"{out}-labels", "eval/perplexity")[-1]
    sampled, top = angles_of_draws(f"{out}/final", knobs)
    print(f"{sampled:.1f} degrees from 50 draws, {top:.1f} from the top 12")
    assert sampled < 15 < 30 < top


def angles_of_draws(name, knobs):
    """Between gradients of the student's KL, on 64 held-out sequences of the demo: of 50 draws, and
    of the top 12 renormalised, from that of the whole teacher. Measured: 12.3 and 62 degrees."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    rows, _ = rows_of(f"{knobs['dataset']}/validation.jsonl", tokenizer, seq_len=128)
    ids = torch.tensor(ids_of(rows)[:64])
    teacher = load(knobs["teacher"])
    with torch.no_grad():
        hidden = teacher.base_model(ids)[0][:, :-1].flatten(0, 1)
        probs = teacher.lm_head(hidden).softmax(-1)
        draws = probs.multinomial(50, replacement=True, generator=torch.Generator().manual_seed(0))
        largest, top = probs.topk(12)
        nothing = torch.zeros(len(probs))
    student = load(name)
    found = []
    for target in (
        sd.DenseTarget(hidden, sd.head_of(teacher)),
        sd.SparseTarget(draws, torch.full(draws.shape, 1 / 50), nothing, nothing),
        sd.SparseTarget(top, largest / largest.sum(-1, keepdim=True), nothing, nothing),
    ):
        states = student.base_model(ids)[0][:, :-1].flatten(0, 1)
        loss, _, _ = sd.distillation_loss(states, sd.head_of(student), ids[:, 1:].flatten(), target,
                                          alpha=0.0, temperature=1.0)
        gradients_ = torch.autograd.grad(loss, list(student.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients_]))
    whole, *others = found
    return [math.degrees(math.acos(F.cosine_similarity(whole, other, dim=0))) for other in others]


# --------------------------------------------------------------------------------------------------
# Optional: cache: what it holds, who may fill it, what damages it, what it costs.


def cache_rows(n):
    return [{"text": prose(8 + i % 9, i)} for i in range(n)]


@pytest.fixture(scope="session")
def cache_text(tmp_path_factory):
    """Text of about 180 sequences of 32 tokens: a dozen chunks of 16."""
    return write_jsonl(tmp_path_factory.mktemp("cache") / "text.jsonl", cache_rows(100))


def cache_words(teacher, dataset, cache_dir, **fields):
    """The command that fills a cache, as words."""
    command = dict(mode="cache", teacher=teacher, dataset=dataset, cache_dir=cache_dir,
                   seq_len=32, cache_chunk=16)
    return flags(**{**command, **fields})


def fill_cache(teacher, dataset, cache_dir, rc=0, **fields):
    return cli(*cache_words(teacher, dataset, cache_dir, **fields), rc=rc)


def train_from_cache(student, cache_dir, out, rc=0, **fields):
    """Six steps; with cache_dir None, a teacher and a dataset: the same run without a cache."""
    run = dict(student=student, cache_dir=cache_dir, alpha=0.3, max_steps=6, batch_size=8)
    return distil(out, rc, **{**run, **fields})


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory, teacher, cache_text):
    """Not to be changed: see copy_of."""
    cache = tmp_path_factory.mktemp("cache") / "full"
    fill_cache(teacher, cache_text, cache)
    return cache


@pytest.fixture
def copy_of(full_cache, tmp_path):
    return Path(shutil.copytree(full_cache, tmp_path / "a copy"))


def chunk_files(cache_dir):
    """The bytes of every chunk by its name."""
    return {path.name: path.read_bytes() for path in sorted(Path(cache_dir).glob("*.safetensors"))}


def facts_of_cache(cache_dir):
    """-> manifest and index"""
    names = ("manifest.json", "index.json")
    return [json.loads(Path(cache_dir, name).read_text()) for name in names]


def rows_of_cache(cache_dir, split="train"):
    rows = sd.CacheRows(str(cache_dir), split, *facts_of_cache(cache_dir))
    return [rows[i] for i in range(len(rows))]


# ---- what is kept of a token


def made_up_teacher(vocab, tokens, seed=0, sharp=3.0):
    """-> hidden states, head, and the distribution that they make [N, V], in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 24, generator=generator)
    weight = torch.randn(vocab, 24, generator=generator) * sharp / 24 ** 0.5
    probs = (hidden.double() @ weight.double().T).softmax(-1)
    return hidden, sd.Head(weight), probs


def cache_manifest(vocab, method, size, seed=0, temperature=1.0):
    """What of a manifest the content of a row depends on."""
    return dict(vocabulary=vocab, method=method, size=size, seed=seed, temperature=temperature,
                codes=256 if method == "topk" else size)


def text_row(vocab, tokens):
    return {"input_ids": np.arange(tokens) % vocab, "targets": np.arange(tokens) > 0,
            "starts": np.array([0])}


def keep_and_read(hidden, head, *what, **more):
    """A row of plain text, through its bytes and back -> SparseTarget, bytes, what was kept."""
    manifest = cache_manifest(len(head.weight), *what, **more)
    row = text_row(len(head.weight), len(hidden) + 1)
    kept = sd.keep(hidden, head, 7, manifest)
    data = sd.compress(sd.pack_row(row, kept))
    there = sd.unpack_row(sd.decompress(data), manifest)
    for name in row:
        assert (there[name] == row[name]).all(), name
    return sd.SparseTarget(*map(torch.from_numpy, there["sparse"])), data, kept


@pytest.mark.parametrize("vocab", [2, 300, 32000, 151936])
def test_cache_topk_is_what_the_teacher_says(vocab):
    for size in {min(64, vocab), min(300, vocab)}:
        hidden, head, probs = made_up_teacher(vocab, 40)
        sparse, data, kept = keep_and_read(hidden, head, "topk", size)
        top = probs.topk(size).values
        assert (probs.gather(-1, sparse.ids) - top).abs().max() < 1e-6
        # the common rescaling at most doubles the rounding
        bound = 2 * (0.0193 * (-top.log()).sqrt() + 1e-4)
        close = (sparse.probs.double().log() - top.log()).abs() < bound
        assert close[top > 1e-9].all()
        assert (sparse.probs.sum(-1) + sparse.rest - 1).abs().max() < 1e-5
        assert (sparse.rest - (1 - top.sum(-1))).abs().max() < 0.02
        assert kept.mass == pytest.approx(float(top.sum()), rel=1e-4)
        assert len(data) / 41 <= 4 * (size + 2)
        listed = sparse.probs.double()
        entropy = -(listed * listed.log()).nansum(-1)
        entropy -= torch.special.xlogy(sparse.rest, sparse.rest)
        assert (sparse.entropy - entropy).abs().max() < 1e-5


@pytest.mark.parametrize("vocab,size", [
    (2, 1), (300, 50), (32000, 50), (151936, 50), (151936, 255)])
def test_cache_samples_are_counted_and_small(vocab, size):
    hidden, head, probs = made_up_teacher(vocab, 200, sharp=5.0)
    sparse, data, kept = keep_and_read(hidden, head, "sample", size)
    # an id stands as often as it was drawn
    assert torch.allclose(sparse.probs, torch.full((200, size), 1 / size))
    assert (sparse.rest == 0).all()
    distinct = [torch.unique(ids) for ids in sparse.ids]
    assert sum(map(len, distinct)) == len(kept.entries)
    held = sum(of_token[ids].sum() for of_token, ids in zip(probs, distinct))
    assert kept.mass == pytest.approx(held.item(), rel=1e-4)
    entropy_of_draws = -(sparse.probs * probs.gather(-1, sparse.ids).log()).sum(-1)
    assert (sparse.entropy - entropy_of_draws).abs().max() < 0.0021   # half of 1/256 nat
    # ... which is the teacher's entropy on average
    entropy = -(probs * probs.log()).sum(-1)
    assert abs(entropy_of_draws.mean() - entropy.mean()) < 4 / size ** 0.5
    bits = len(kept.entries) * (vocab * size).bit_length() + 200 * (12 + vocab.bit_length())
    if vocab >= 32000:   # as if nothing took a whole byte
        assert len(data) < 1.02 * bits / 8


@torch.no_grad()
def test_cache_draws_from_the_plain_models_distribution(teacher, cache_text, tmp_path):
    """... by the seed and the number of the row: the same whoever fills the cache."""
    fill_cache(teacher, cache_text, tmp_path, temperature=2, seed=5)
    model = load(teacher)
    for split, first, i in (("eval", 0, 3), ("train", 2**60, 0), ("train", 2**60, 39)):
        row = rows_of_cache(tmp_path, split)[i]
        ids_1T = torch.from_numpy(row["input_ids"])[None]
        cdf = (model(ids_1T).logits[0, :-1].double() / 2).softmax(-1).cumsum(-1)
        generator = torch.Generator().manual_seed(int(sd.digest(5, first + i), 16) >> 1)
        numbers = torch.rand(len(cdf), 50, dtype=torch.float64, generator=generator)
        draws = torch.searchsorted(cdf, numbers).sort(-1).values.numpy()
        assert (draws == row["sparse"].ids).mean() > 0.99


def test_cache_same_model_logs_no_kl():
    hidden, head, _ = made_up_teacher(300, 200)
    labels = torch.zeros(200, dtype=torch.long)
    for method, size in (("sample", 50), ("topk", 12), ("topk", 300)):
        sparse, *_ = keep_and_read(hidden, head, method, size)
        _, _, kl = sd.distillation_loss(hidden, head, labels, sparse, alpha=0.0, temperature=1.0)
        assert abs(kl) < 1e-3, (method, size, kl)
    # nor is the KL of what is listed and the rest ever negative, whatever the student says
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    other_head = sd.Head(head.weight + 0.3 * noise)
    for size, i in itertools.product((1, 12, 64), range(0, 200, 4)):
        sparse, *_ = keep_and_read(hidden[i:i + 1], head, "topk", size)
        _, _, kl = sd.distillation_loss(
            hidden[i:i + 1], other_head, labels[:1], sparse, alpha=0.0, temperature=1.0)
        assert kl > -1e-5


# ---- training from it


@pytest.mark.parametrize("packing", ["rows", "documents"])
def test_cache_topk_of_everything_trains_like_online(teacher, student, tmp_path, packing):
    """Also where documents share rows: it knows where each begins."""
    data = write_splits(tmp_path / "data", talk(60), talk(8))
    how = dict(seq_len=128, packing=packing)
    cache, cached, online = tmp_path / "cache", tmp_path / "cached", tmp_path / "online"
    fill_cache(teacher, data, cache, cache_method="topk", cache_top_k=9999, **how)
    there, held_out = rows_of(data, **how)
    for split, rows in (("train", there), ("eval", held_out)):
        for kept, row in zip(rows_of_cache(cache, split), rows, strict=True):
            for name in ("input_ids", "targets", "starts"):
                assert kept[name].tolist() == row[name].tolist(), name
    train_from_cache(student, cache, cached, seq_len=None)
    train_from_cache(student, None, online, teacher=teacher, dataset=data, **how)
    for entry, expected in zip(log(cached), log(online), strict=True):
        kind = "train" if "train/loss" in entry else "eval"
        assert abs(entry[f"{kind}/kl_loss"] - expected[f"{kind}/kl_loss"]) < 1e-3
        assert abs(entry[f"{kind}/ce_loss"] - expected[f"{kind}/ce_loss"]) < 5e-3
    moved = distance(weights(student), final_weights(online))
    assert distance(final_weights(cached), final_weights(online)) < 0.05 * moved


def test_cache_is_the_dataset(teacher, student, chat, tmp_path):
    """What is not typed is the cache's own, also the teacher of layers:N. Teacher and data are
    gone, the cache moves: a run goes on all the same."""
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    data = shutil.copytree(chat, tmp_path / "chat")
    cache, out, again = tmp_path / "cache", tmp_path / "out", tmp_path / "again"
    shown = fill_cache(teacher, data, cache, cache_chunk=4, temperature=2).out
    assert re.search(r"[\d.]+ bytes a token, which hold [\d.]+% of .* GB in all, .* GB free", shown)
    _, index = facts_of_cache(cache)
    every_row = rows_of_cache(cache) + rows_of_cache(cache, "eval")
    size = sum(map(len, chunk_files(cache).values()))
    tokens = sum(len(row["input_ids"]) for row in every_row)
    assert index == dict(
        rows=12, tokens=tokens, bytes_per_token=size / tokens,
        chunks={"train": [4, 4], "eval": [4]},
        biggest_id=max(row["input_ids"].max() for row in every_row))
    train_from_cache("layers:1", cache, tmp_path / "cut", seq_len=None, max_steps=1)
    shutil.rmtree(teacher)
    shutil.rmtree(data)
    shown = train_from_cache(student, cache, out, seq_len=None, save_steps=3, eval_samples=3).out
    assert "'seq_len': 32, 'temperature': 2.0" in shown and "3 held out" in shown
    saved = json.loads((out / "config.json").read_text())
    assert (saved["seq_len"], saved["temperature"], saved["teacher"]) == (32, 2.0, str(teacher))
    before = quiet_log(out)
    moved = shutil.move(cache, tmp_path / "moved")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-00000006")
    cli("--config", out / "config.json", "--cache_dir", moved)
    assert quiet_log(out) == before
    train_from_cache(student, moved, again, temperature=2, eval_samples=3)
    assert quiet_log(again) == before


def test_cache_refuses_what_does_not_fit(full_cache, teacher, student, cache_text, tmp_path):
    other_tokenizer = tiny_tokenizer(roll=1)
    other_teacher = tiny_model(tmp_path / "other_teacher", tokenizer=other_tokenizer)
    other_student = tiny_model(tmp_path / "other_student", hidden=16, tokenizer=other_tokenizer)
    small = tiny_model(tmp_path / "small", vocab=200, hidden=16, tokenizer=False)
    training = [
        (dict(temperature=3), "temperature 1.0 there, 3.0 here"),
        (dict(seq_len=64), "seq_len 32 there, 64 here"),
        (dict(packing="rows"), "packing 'auto' there, 'rows' here"),
        (dict(teacher=other_teacher), "teacher .* there, .*other_teacher"),
        (dict(student=other_student), "different tokenizers: token"),
        (dict(student=small), "holds token 2.*has 200"),
        (dict(cache_dir=tmp_path / "none"), "no cache"),
    ]
    for fields, message in training:
        fields = {"student": student, "cache_dir": full_cache, **fields}
        refused = train_from_cache(out=tmp_path / "out", rc=2, **fields)
        assert re.search(message, refused.err), (fields, message, refused.err)
    rows = cache_rows(100)
    rows[51]["text"] = rows[51]["text"][:-1] + "Q"
    edited = write_jsonl(tmp_path / "edited.jsonl", rows)
    filling = [
        (dict(temperature=2), "temperature 1.0 there, 2.0 here"),
        (dict(cache_samples=9), "size 50 there, 9 here"),
        (dict(seed=1), "seed 0 there, 1 here"),
        (dict(teacher=student), "weights .* there"),
        (dict(dataset=edited), "dataset_fingerprint .* there"),
        (dict(teacher=small, tokenizer=teacher, cache_dir=tmp_path / "new"), "has 200"),
    ]
    before = chunk_files(full_cache)
    for fields, message in filling:
        command = dict(teacher=teacher, dataset=cache_text, cache_dir=full_cache)
        refused = fill_cache(**(command | fields), rc=2)
        assert re.search(message, refused.err), (fields, message, refused.err)
    assert chunk_files(full_cache) == before


def test_cache_is_begun_anew_by_force_alone(copy_of, teacher, student, cache_text, tmp_path):
    """One of an older version is refused with the way out; what else lies there stays."""
    manifest, _ = facts_of_cache(copy_of)
    del manifest["format"]
    (copy_of / "manifest.json").write_text(json.dumps(manifest))
    thesis = copy_of / "thesis.txt"
    thesis.write_text("mine")
    for refused in (train_from_cache(student, copy_of, tmp_path / "out", 2),
                    fill_cache(teacher, cache_text, copy_of, 2)):
        assert "older version" in refused.err and "--force_regenerate" in refused.err
    templated = tiny_model(tmp_path / "templated", seed=1, tokenizer=tiny_tokenizer(CHATML))
    forced = dict(cache_chunk=64, force_regenerate=True)
    fill_cache(templated, cache_text, copy_of, **forced)
    assert len(chunk_files(copy_of)) == 4
    fill_cache(teacher, cache_text, copy_of, **forced)   # no template is left of the one before
    assert facts_of_cache(copy_of)[1]["chunks"] == {"train": [64, 64, 51], "eval": [9]}
    train_from_cache(student, copy_of, tmp_path / "out")
    assert not json.loads((copy_of / "config.json").read_text())["force_regenerate"]
    assert thesis.exists()

    model = Path(shutil.copytree(teacher, tmp_path / "model"))   # not a folder of ours
    refused = fill_cache(teacher, cache_text, model, 2, force_regenerate=True)
    assert "'config.json' and no .simple_distill" in refused.err
    assert (model / "model.safetensors").exists()


# ---- damage, full disks, many workers


def is_refused(cache_dir, split, path):
    try:
        rows_of_cache(cache_dir, split)
    except sd.UserError as e:
        return str(path) in str(e)
    return False


def test_cache_damage_is_found_and_mended(copy_of, teacher, student, cache_text, tmp_path):
    """A chunk cut short, or with a single bit flipped anywhere, is refused by name, by training and
    where mode cache finishes; the command that is named makes it, and only it, again."""
    whole = chunk_files(copy_of)
    path = copy_of / "train-00000001.safetensors"
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert is_refused(copy_of, "train", path)
    body = 8 + int.from_bytes(data[:8], "little")   # where safetensors' header ends
    draw = np.random.default_rng(0)
    for position in [*draw.integers(0, body, 20), *draw.integers(body, len(data), 40)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        assert is_refused(copy_of, "train", path), position

    damaged = bytearray(data)
    damaged[-100] ^= 1
    refusing = [
        functools.partial(train_from_cache, student, copy_of, tmp_path / "out", max_steps=23),
        functools.partial(fill_cache, teacher, cache_text, copy_of)]
    for refuse in refusing:   # 23 steps read every row
        path.write_bytes(damaged)
        message = refuse(rc=2).err
        assert f"cache chunk '{path}' is damaged" in message
        remove, again = re.search("again: (.*)", message)[1].split("; ")
        os.remove(shlex.split(remove)[1])
        assert sd.main(shlex.split(again)[2:]) == 0   # less `python simple_distill.py`
        assert chunk_files(copy_of) == whole


def test_cache_a_foreign_chunk_is_refused(copy_of, teacher, cache_text, tmp_path):
    """Of another temperature, one twice, two swapped, train in place of eval."""
    warm = tmp_path / "warm"
    fill_cache(teacher, cache_text, warm, temperature=2)
    chunks = chunk_files(copy_of)
    first, second, third = "train-00000000", "train-00000001", "eval-00000000"
    content = {name.split(".")[0]: data for name, data in chunks.items()}
    of_warm = chunk_files(warm)[f"{second}.safetensors"]
    for name, foreign in ((second, of_warm), (second, content[first]), (first, content[second]),
                          (third, content[first])):
        path = copy_of / f"{name}.safetensors"
        path.write_bytes(foreign)
        assert is_refused(copy_of, name.split("-")[0], path)
        refused = fill_cache(teacher, cache_text, copy_of, 2)
        assert f"{path}' is damaged or of another cache" in refused.err
        path.write_bytes(content[name])
    manifest, _ = facts_of_cache(copy_of)   # what is said of all rows cannot be edited
    (copy_of / "manifest.json").write_text(json.dumps(manifest | {"temperature": 2.0}))
    assert is_refused(copy_of, "train", copy_of / f"{first}.safetensors")


@pytest.mark.parametrize("name,damaged", [
    ("manifest.json", ""), ("manifest.json", "[]"), ("manifest.json", "{}"),
    ("manifest.json", '{"format": 2}'), ("index.json", ""), ("index.json", "{}"),
    ("index.json", "[1]"), ("tokenizer/tokenizer.json", ""), ("tokenizer/tokenizer.json", "{}")])
def test_cache_damage_beside_the_chunks_is_one_error(copy_of, student, tmp_path, name, damaged):
    (copy_of / name).write_text(damaged)
    refused = train_from_cache(student, copy_of, tmp_path / "out", 2)
    assert refused.err.count("\n") == 1


def test_cache_another_tokenizer_than_its_own_is_refused(copy_of, student, tmp_path):
    tiny_tokenizer(CHATML).save_pretrained(copy_of / "tokenizer")
    refused = train_from_cache(student, copy_of, tmp_path / "out", 2)
    assert "tokenizer' is not what was written" in refused.err


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_cache_on_a_full_disk(teacher, tmp_path, ranks):
    """Files longer than a limit fail as on a full disk; the chunks that were finished go into the
    cache when there is room."""
    data = write_jsonl(tmp_path / "text.jsonl", cache_rows(800))
    cache = tmp_path / "cache"
    fill_cache(teacher, data, tmp_path / "whole", cache_chunk=64)
    whole = chunk_files(tmp_path / "whole")
    # one chunk is larger, and nothing else that is written
    limit = sorted(len(content) for content in whole.values())[-2]
    words = cache_words(teacher, data, cache, cache_chunk=64)
    shown = Fork(tmp_path / "log.txt", *words, ranks=ranks, limit=limit).wait()
    assert shown.count("error: ") == 1 and "Traceback" not in shown, shown
    kept = chunk_files(cache)
    assert 0 < len(kept) < len(whole)
    assert all(whole[name] == content for name, content in kept.items())
    Fork(tmp_path / "log2.txt", *words, ranks=ranks).wait()
    assert chunk_files(cache) == whole


@pytest.mark.parametrize("fields", [
    {},
    dict(streaming=True),   # optional: streaming
])
def test_cache_is_the_same_in_pieces(teacher, cache_text, tmp_path, fields):
    """Also by several ranks, of a sharded teacher."""
    whole = tmp_path / "whole"
    pieces = tmp_path / "pieces"
    fill_cache(teacher, cache_text, whole, **fields)
    chunks = chunk_files(whole)
    assert len(chunks) > 4
    shutil.copytree(whole, pieces)
    for name in list(chunks)[::2]:
        os.remove(pieces / name)
    first = list(chunks)[0]
    (pieces / first).with_suffix(".tmp").write_bytes(b"half")   # what a dead worker left
    words = cache_words(teacher, cache_text, pieces, **fields)
    shown = Fork(tmp_path / "log.txt", *words, ranks=2).wait()
    assert "error: " not in shown
    assert chunk_files(pieces) == chunks
    assert facts_of_cache(pieces) == facts_of_cache(whole)


def test_cache_waits_for_a_chunk_that_another_worker_has(copy_of, teacher, cache_text, tmp_path):
    """... until that is gone, and stops on a signal meanwhile."""
    whole = chunk_files(copy_of)
    os.remove(copy_of / "train-00000002.safetensors")
    log_path = tmp_path / "log.txt"
    log_path.touch()
    words = cache_words(teacher, cache_text, copy_of)
    with open(copy_of / "claims", "a") as claims:
        fcntl.lockf(claims, fcntl.LOCK_EX, 1, 2**60 + 2)
        run = Fork(log_path, *words)
        while "row/s]" not in log_path.read_text():
            time.sleep(0.1)
        run.signal(signal.SIGTERM)
        assert "stopped" in run.wait()
        run = Fork(log_path, *words)
        while log_path.read_text().count("opening cache") < 2:
            time.sleep(0.1)
        assert run.running()
    assert "is full" in run.wait()
    assert chunk_files(copy_of) == whole


def test_cache_of_a_stream_with_an_empty_block(teacher, student, tmp_path):   # optional: streaming
    """A chunk whose conversations all lose their targets to seq_len holds no row, and is in
    nobody's way."""
    rows = []
    for i in range(48):
        prompt = "fox " * 100 if 8 <= i < 24 else "fox "
        rows.append({"prompt": prompt, "response": "jumps over"})
    data = write_jsonl(tmp_path / "gap.jsonl", rows)
    cache = tmp_path / "cache"
    for _ in range(2):
        fill_cache(teacher, data, cache, streaming=True, eval_samples=8)
    assert facts_of_cache(cache)[1]["chunks"] == {"train": [0, 16, 8], "eval": [8]}
    rows = rows_of_cache(cache)
    assert len(rows) == 24
    assert all(len(row["input_ids"]) < 20 for row in rows)
    train_from_cache(student, cache, tmp_path / "out")
    write_jsonl(data, read_lines(data)[:-1])   # among the first, by which a stream is known
    assert "dataset_fingerprint" in fill_cache(teacher, data, cache, 2, streaming=True,
                                               eval_samples=8).err


@pytest.mark.campaign
def test_cache_survives_a_killed_worker(teacher, tmp_path):
    """Two workers, one killed with a claim in its hands; three more come. The same files as from
    one that was left alone, and as from several ranks."""
    data = write_jsonl(tmp_path / "text.jsonl", cache_rows(3000))
    cache = tmp_path / "cache"
    whole = tmp_path / "whole"
    fill_cache(teacher, data, whole)
    words = cache_words(teacher, data, cache)
    workers = [spawn(*words), spawn(*words)]
    while len(list(cache.glob("train*.safetensors"))) < 10:
        assert workers[1].poll() is None, workers[1].stdout.read()
        time.sleep(0.01)
    workers[1].send_signal(signal.SIGKILL)
    for _ in range(3):
        workers.append(spawn(*words))
    shown = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL, 0, 0, 0], shown
    assert chunk_files(cache) == chunk_files(whole)
    assert facts_of_cache(cache) == facts_of_cache(whole)


# The peak of a process is not that of the one that started it, as resource's would be.
PEAK_MEMORY = """
import re, sys
import simple_distill
assert simple_distill.main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.campaign
@pytest.mark.parametrize("fields", [
    {},
    dict(streaming=True),   # optional: streaming
])
def test_cache_memory_is_constant(teacher, tmp_path, fields):
    """Ten times the rows are filled in the same memory."""
    peaks = []
    for n in (300, 3000):
        data = write_jsonl(tmp_path / f"{n}.jsonl", cache_rows(n))
        words = cache_words(teacher, data, tmp_path / f"cache{n}", **fields)
        process = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY, *words], cwd=HERE, capture_output=True, text=True,
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        peaks.append(int(process.stdout.split()[-1]))
    assert peaks[1] < 1.05 * peaks[0], peaks


# ---- what it costs


def bench_cache():
    """Tables: bytes a token, rows a second on one core, and a training step from the cache beside
    one on labels only, with the allocator as a run sets it."""
    torch.set_num_threads(1)
    sd.keep_freed_memory()
    print(f"{'V':>8} {'method':>10} {'ids':>6} {'bytes/token':>12} {'raw fp32+int64':>15} "
          f"{'fp16+int32':>11} {'write ms a row':>15} {'read':>6}")
    for vocab in (32000, 151936):
        for method, size in (("sample", 50), ("topk", 64)):
            bench_packing(vocab, method, size)
    print(f"\n{'V':>8} {'labels only':>12} {'from cache':>11} {'ratio':>6}   "
          "(seconds a step of 4 x 256 tokens, forward and backward)")
    for vocab in (32000, 151936):
        bench_cached_step(vocab)


def bench_packing(vocab, method, size):
    """Of a row of 512 tokens."""
    hidden, head, _ = made_up_teacher(vocab, 511, sharp=5.0)
    _, _, kept = keep_and_read(hidden, head, method, size)
    manifest = cache_manifest(vocab, method, size)
    ids = np.random.default_rng(0).integers(0, vocab, 512)
    row = text_row(vocab, 512) | {"input_ids": ids}
    data = sd.compress(sd.pack_row(row, kept))
    writing = best_seconds(lambda: sd.compress(sd.pack_row(row, kept)))
    reading = best_seconds(lambda: sd.unpack_row(sd.decompress(data), manifest))
    print(f"{vocab:8} {method + str(size):>10} {len(kept.entries) / 511:6.1f} "
          f"{len(data) / 512:12.1f} {64 * 12:15} {64 * 6:11} "
          f"{writing * 1e3:15.2f} {reading * 1e3:6.2f}")


def bench_cached_step(vocab):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True))
    hidden, head, _ = made_up_teacher(vocab, 255, sharp=5.0)
    sparse, _, _ = keep_and_read(hidden, head, "sample", 50)
    row = text_row(vocab, 256) | {"sparse": [field.numpy() for field in sparse]}
    batch = sd.collate(4 * [row])

    def step(alpha, target):
        loss = sd.distil_loss(model, batch, target, 1020, alpha=alpha, temperature=1.0,
                              divergence="forward")[0]
        loss.backward()

    works = (functools.partial(step, 1.0, None), functools.partial(step, 0.1, batch.sparse))
    seconds = [[], []]
    for _ in range(6):   # alternating: a noisy machine is noisy for both; the first compiles
        for work, taken in zip(works, seconds):
            taken.append(best_seconds(work, times=1))
    labels, cached = map(min, seconds)
    print(f"{vocab:8} {labels:12.3f} {cached:11.3f} {cached / labels:6.2f}")


def best_seconds(work, times=9):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --------------------------------------------------------------------------------------------------
# Optional: blockwise: hidden states, stitches, heads, against plain models run layer by layer.


BLOCKWISE = dict(blockwise=True, batch_size=4, num_epochs=0, lr_per_block=3e-3, lm_head_lr=3e-3,
                 wd_per_block=0, max_grad_norm_per_block=1.0)
NO_HEAD = dict(train_lm_head=False, lm_head_lr=None, initialize_head_from_teacher=False)


@pytest.fixture(scope="session")
def block(tmp_path_factory):
    """Teacher 32 x 5, student 16 x 3, talks of unequal length (so that there is padding) in 5 steps
    of 4 an epoch."""
    folder = tmp_path_factory.mktemp("block")
    return types.SimpleNamespace(
        teacher=tiny_model(folder / "teacher", hidden=32, layers=5, seed=1),
        student=tiny_model(folder / "student", hidden=16, layers=3, seed=2,
                           tie_word_embeddings=True),
        data=write_splits(folder / "data", talk(20), talk(6, seed=50)))


TEACHER_BLOCK = (1, 2, 4)   # which the student's block i learns from


def distil_blocks(block, out, rc=0, **fields):
    run = dict(teacher=block.teacher, student=block.student, dataset=block.data)
    return distil(out, rc, **{**BLOCKWISE, **run, **fields})


def rows_of_trainer(data, student):
    """-> train and eval rows, as the trainer has them (tested elsewhere)."""
    with sd.process_group():
        return sd.load_data(config.Config(dataset=data, seq_len=32),
                            transformers.AutoTokenizer.from_pretrained(student))


def plain_run(student, teacher, **fields):
    """-> what a run works with at its start, of plain models: stitches beside the student."""
    cfg = config.Config(student=str(student), teacher=str(teacher), blockwise=True, **fields)
    model = load(student)
    make_root = sd.stitching(cfg, model.config)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return types.SimpleNamespace(cfg=cfg, student=make_root(model), steps_per_epoch=1,
                                 teacher=sd.ShardedRoot(load(teacher).requires_grad_(False)))


def layer_states(model, ids, fed):
    """A plain Llama -> what goes into each layer and what comes out, [B, T, D] each. fed: {layer:
    what it is given in place of the output of the one before}."""
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    inputs = []
    outputs = []
    for i, layer in enumerate(model.model.layers):
        inputs.append(fed.get(i, hidden))
        hidden = layer(inputs[i], position_embeddings=rotary)
        outputs.append(hidden)
    return inputs, outputs


def states_of_blocks(run, batch):
    """-> (the student's states at the end of its block, stitched, the teacher's), a block each."""
    def real(hidden_BTD):
        return hidden_BTD.flatten(0, 1)[batch.real]

    stitches = run.student.stitches
    teacher_inputs, teacher_outputs = layer_states(run.teacher.model, batch.input_ids, {})
    fed = {}
    if run.cfg.block_input == "teacher":
        fed = {i: stitches[f"down{i}"](teacher_inputs[j]) for i, j in enumerate(TEACHER_BLOCK)}
    _, outputs = layer_states(run.student.model, batch.input_ids, fed)
    return [(stitches[f"up{i}"](real(outputs[i])), real(teacher_outputs[j]))
            for i, j in enumerate(TEACHER_BLOCK)]


def reference_loss(kind, student_ND, teacher_ND, temperature):
    if kind == "mse":
        return F.mse_loss(student_ND, teacher_ND)
    if kind == "relative":
        missed_N = (student_ND - teacher_ND).square().sum(-1)
        return (missed_N / teacher_ND.square().sum(-1)).mean()
    if kind == "cosine":
        return (1 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)).mean()
    logp = F.log_softmax(student_ND / temperature, -1)
    q = F.softmax(teacher_ND / temperature, -1)
    return temperature ** 2 * F.kl_div(logp, q, reduction="batchmean")


def loss_of_blocks(run, blocks, batch):
    cfg = run.cfg
    pairs = states_of_blocks(run, batch)
    return sum(reference_loss(cfg.distill_loss_type, *pairs[i], cfg.distill_loss_temperature)
               for i in blocks)


def loss_of_head(run, batch):
    kind = run.cfg.logit_loss_type
    weight = run.cfg.logit_loss_weight
    logits, teacher_logits = [
        root.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions]
        for root in (run.student, run.teacher)]
    ce = F.cross_entropy(logits, batch.labels)
    if kind == "ce":
        return ce
    return weight * reference_loss(kind, logits, teacher_logits, 1.0) + (1 - weight) * ce


def learner(modules, lr, decay, max_norm):
    """-> a function: a step of AdamW on their parameters, which are clipped together. Norms and
    biases do not decay."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW([
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=decay),
        dict(params=[p for p in parameters if p.ndim == 1], weight_decay=0)], lr=lr)

    def step():
        nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        optimizer.step()

    return step


def learner_of_block(run, i):
    cfg = run.cfg
    body = run.student.model.model
    stitches = run.student.stitches
    modules = [body.layers[i], stitches[f"up{i}"]]
    if cfg.block_input == "teacher":
        modules.append(stitches[f"down{i}"])
    elif i == 0 or not cfg.freeze_previous_blocks:
        modules += [body.embed_tokens, *body.layers[:i]]
    return learner(modules, cfg.lr_per_block[i], cfg.wd_per_block[i % len(cfg.wd_per_block)],
                   cfg.max_grad_norm_per_block[i])


# a value a block
ONE_BY_ONE = dict(epochs_per_block=[0.4, 0.5, 0.8], wd_per_block=[0.3, 0.0, 0.1])
AT_ONCE = dict(block_input="teacher", epochs_per_block=[0.8], wd_per_block=[0.3])


@pytest.mark.parametrize("fields", [
    dict(**ONE_BY_ONE, logit_loss_weight=0.3),
    dict(**AT_ONCE),
    dict(**ONE_BY_ONE, distill_loss_type="mse", freeze_previous_blocks=False,
         logit_loss_type="mse", logit_loss_weight=0.5),
    dict(**AT_ONCE, distill_loss_type="mse", **NO_HEAD),
    dict(**ONE_BY_ONE, distill_loss_type="cosine", logit_loss_type="ce"),
    dict(**ONE_BY_ONE, distill_loss_type="kl_div", distill_loss_temperature=1.5, **NO_HEAD),
    dict(**AT_ONCE, distill_loss_type="kl_div", logit_loss_type="mse"),
], ids=str)
def test_blockwise_trains_as_plain_models_do(block, out, fields):
    """Every step of every phase: what is trained, how far, on which loss; the rest stands still."""
    fields = dict(lr_per_block=[1e-3, 3e-3, 2e-3], max_grad_norm_per_block=[0.0, 0.5, 0.1],
                  initialize_head_from_teacher=False) | fields
    head_fields = dict(lm_head_epochs=0.4, lm_head_wd=0.1, lm_head_max_grad_norm=0.2)
    run = plain_run(block.student, block.teacher, **fields)
    cfg = run.cfg
    distil_blocks(block, out, gradient_checkpointing=True, **fields,
                  **(head_fields if cfg.train_lm_head else {}))
    rows, _ = rows_of_trainer(block.data, block.student)
    losses = []

    def take_steps(count, learners, loss_of):
        for _ in range(count):
            numbers = sd.batch_of_step(len(rows), 0, 4, len(losses))
            loss = loss_of(sd.collate([rows[i] for i in numbers]))
            losses.append(loss.item())
            run.student.zero_grad()
            loss.backward()
            for step in learners:
                step()

    phases = {(0,): 2, (1,): 3, (2,): 4}   # blocks: steps
    if cfg.block_input == "teacher":
        phases = {(0, 1, 2): 4}
    for blocks, steps in phases.items():
        take_steps(steps, [learner_of_block(run, i) for i in blocks],
                   functools.partial(loss_of_blocks, run, blocks))
    model = run.student.model
    expected = dict(model.state_dict())
    if cfg.train_lm_head:
        step = learner([model.lm_head, model.model.norm], 3e-3, 0.1, 0.2)
        take_steps(2, [step], functools.partial(loss_of_head, run))
    else:   # it stays tied
        del expected["lm_head.weight"]
    assert column(out, "train/loss") == pytest.approx(losses, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(final_weights(out), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, source", [
    ("relative", "teacher"), ("mse", "teacher"), ("cosine", "student"), ("kl_div", "student")])
def test_blockwise_student_equal_to_teacher_stays_equal(block, out, kind, source):
    distil_blocks(block, out, student=block.teacher, distill_loss_type=kind, block_input=source,
                  use_stitching_layers=kind != "mse", epochs_per_block=0.4, lm_head_epochs=0.4)
    assert set(column(out, "train/loss")) == {0.0}
    for i in range(5):
        assert column(out, f"block/{i}/loss") == [0, 0]
        assert column(out, f"block/{i}/explained") == [1, 1]
    assert same(final_weights(out), weights(block.teacher))


def test_blockwise_a_state_of_zeros_counts_nothing():
    """Of the teacher, which has no size to be relative to."""
    student = torch.randn(6, 8, requires_grad=True)
    teacher = torch.randn(6, 8)
    teacher[2] = 0
    error = sd.hidden_error(student, teacher, "relative", 1.0)
    error.sum().backward()
    assert (error == 0).tolist() == [False, False, True, False, False, False]
    assert student.grad.isfinite().all() and not student.grad[2].any()


def test_blockwise_clips_what_the_loss_scale_magnified():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 2.0 ** 14)
    sd.clip_blocks([([p], 0.5)], {"scale": torch.tensor(2.0 ** 14)})   # the norm is 2
    torch.testing.assert_close(p.grad, torch.full((4,), 2.0 ** 12))


def test_blockwise_figures_leave_sinks_out(block, out, tmp_path):
    """Every row begins with a token whose state is 300 times as large in the teacher: what is
    explained is of the others. All rows in one batch, as the mean is a batch's."""
    _, rows = rows_of_trainer(block.data, block.student)
    batch = sd.collate(list(rows))
    sink = rows[0]["input_ids"][0]
    ordinary = batch.input_ids.flatten()[batch.real] != sink
    loud = shutil.copytree(block.teacher, tmp_path / "teacher")

    def make_sink(tensors):
        tensors["model.embed_tokens.weight"][sink] *= 300

    edit_weights(loud, make_sink)
    shown = distil_blocks(block, out, teacher=loud, batch_size=8, lr_per_block=STILL, **NO_HEAD).out
    with torch.no_grad():
        pairs = states_of_blocks(plain_run(block.student, loud, train_lm_head=False,
                                           initialize_head_from_teacher=False), batch)
    for i, (x, y) in enumerate(pairs):
        error = reference_loss("relative", x, y, 1.0).item()
        x, y = x[ordinary], y[ordinary]
        explained = 1 - ((x - y).square().sum() / (y - y.mean(0)).square().sum()).item()
        assert column(out, f"block/{i}/loss") == pytest.approx([error] * 2, rel=1e-4)
        assert column(out, f"block/{i}/explained") == pytest.approx([explained] * 2, rel=1e-3)
        figures = f"| {error:.4g} | {explained:.1%} "
        assert f"| {i} | {TEACHER_BLOCK[i]} {2 * figures}|" in re.sub(" +", " ", shown)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("cls, of_teacher, offset", [
    ("LlamaConfig", {}, 0),
    ("PhiConfig", {}, 0),   # a LayerNorm, a bias in the head
    ("Gemma2Config", dict(head_dim=16), 1),   # its norm multiplies by 1 + weight
    ("GraniteConfig", dict(logits_scaling=4.0), 0),
])
def test_blockwise_head_begins_as_the_teachers_on_stitched_states(
        tmp_path, width, cls, of_teacher, offset):
    """And as it was where any of it is frozen. The student's vocabulary has 7 ids more."""
    run = plain_run(
        tiny_model(tmp_path / "student", vocab=270, hidden=width, seed=2, cls=cls),
        tiny_model(tmp_path / "teacher", hidden=32, seed=1, cls=cls, **of_teacher))
    head = run.student.model.lm_head
    teacher_head = run.teacher.model.lm_head
    gain, student_gain = [sd.final_norm(root.model).weight for root in (run.teacher, run.student)]
    with torch.no_grad():   # trained norms are not all ones
        gain += torch.rand(32)
        student_gain += torch.rand(width)
    before = head.weight.clone()
    # what the last one added would be lost
    no_bias = [stitch.bias is None for stitch in run.student.stitches.values()]
    assert no_bias == [False, width == 16]
    with sd.process_group():
        sd.initialize_head(run, {head.weight: 1.0, student_gain: 0.0})
        assert torch.equal(head.weight, before)
        sd.initialize_head(run, {head.weight: 1.0, student_gain: 1.0})
    hidden = torch.randn(50, width)
    if width == 32:
        expected = teacher_head(hidden)
        expected_gain = gain
    else:
        stitch = run.student.stitches["up1"]
        expected = teacher_head(stitch(hidden) * (gain + offset))
        expected_gain = (32 ** 0.5 / stitch.weight.norm()).expand(16) - offset
    expected = expected / of_teacher.get("logits_scaling", 1.0)
    assert (head(hidden)[:, :263] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(head.weight[263:], before[263:])
    torch.testing.assert_close(student_gain, expected_gain)


def test_blockwise_a_head_that_is_tied_in_spite_of_its_config_stays(block):
    run = plain_run(block.student, block.teacher, train_lm_head=False,
                    initialize_head_from_teacher=False)   # which is not looked at here
    model = run.student.model
    parts = sd.parameters_by_part(run)
    assert list(parts["head"]) == [model.model.norm.weight]
    assert list(parts["embeddings"]) == [model.lm_head.weight]
    sd.initialize_head(run, parts["head"])
    assert same(model.state_dict(), load(block.student).state_dict())


def errors_fell(out, blocks, below=1.0):
    """Each block's on held-out rows, to less than that part of what it was."""
    errors = [column(out, f"block/{i}/loss") for i in range(blocks)]
    return all(after < below * before for before, after in errors)


def test_blockwise_packed_documents_are_as_each_alone(block, tmp_path):
    """The first step of each phase, of the same tokens."""
    losses = {}
    for packing in ("rows", "documents"):
        out = tmp_path / packing
        distil_blocks(block, out, packing=packing, seq_len=128, batch_size=20, lr_per_block=STILL,
                      lm_head_lr=STILL, learning_rate=STILL, max_steps=1, num_epochs=None)
        losses[packing] = column(out, "train/loss") + column(out, "block/2/loss")
    assert losses["documents"] == pytest.approx(losses["rows"], rel=1e-5)
    assert len(losses["rows"]) == 3 + 1 + 1 + 2


@pytest.mark.parametrize("source, steps", [("student", 19), ("teacher", 11)])
def test_blockwise_resume_is_exact_in_every_phase(block, tmp_path, source, steps):
    """From checkpoints where a phase begins, ends, and in the middle. A phase is 4 steps: three
    blocks or all at once, then the head; then 3 steps of distillation."""
    fields = dict(epochs_per_block=0.8, lm_head_epochs=0.8, max_steps=3, save_steps=2,
                  keep_checkpoints=30, block_input=source)
    whole = str(tmp_path / "whole")
    distil_blocks(block, whole, **fields)
    assert len(log(whole, "train")) == steps
    for step in {2, 4, steps - 7, steps - 5, steps - 3}:
        out = str(tmp_path / f"from{step}")   # as it was just after that checkpoint
        shutil.copytree(whole, out)
        shutil.rmtree(os.path.join(out, "final"))
        for folder in Path(out, "checkpoints").iterdir():
            if folder.name > f"step-{step:08d}":
                shutil.rmtree(folder)
        assert "passed over" not in distil_blocks(block, out, **fields).out
        assert quiet_log(out) == quiet_log(whole), step
        assert same(final_weights(out), final_weights(whole)), step


def test_blockwise_refusals_name_numbers(block, out):
    for fields, message in [
        (dict(use_stitching_layers=False), "student width 16 and teacher width 32"),
        (dict(student=block.teacher, teacher=block.student), "has 5 layers, the teacher only 3"),
        (dict(lr_per_block=[1e-3, 1e-4]), "lr_per_block has 2 values"),
        (dict(block_input="teacher", epochs_per_block=[1, 1, 2]), "one value"),
        (dict(lr_multipliers=["lm_head=0", "model.norm=0"]), "--train_lm_head false"),
    ]:
        assert message in distil_blocks(block, out, 2, **fields).err


# ---- other architectures

CUSTOM_STUDENT = '''
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MixConfig(PretrainedConfig):
    model_type = "mix"

    def __init__(self, vocab_size=263, hidden_size=16, num_hidden_layers=2, **others):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**{**others, "use_cache": False})


class Layer(nn.Module):   # no attention: a running mean of what came before

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, 3 * width)
        self.outer = nn.Linear(3 * width, width)

    def forward(self, hidden_states):
        normed = self.norm(hidden_states)
        counts = torch.arange(1, normed.shape[1] + 1, device=normed.device)
        mean = (normed.cumsum(1) / counts[:, None]).to(normed.dtype)
        inner = self.inner(torch.cat([normed, mean], -1))
        return hidden_states + self.outer(torch.relu(inner))


class Body(nn.Module):   # the norm stands beside the layers

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(config.num_hidden_layers)])

    def forward(self, input_ids, use_cache=None):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return (self.norm(hidden),)


class MixForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MixConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids, attention_mask=None, use_cache=None, **others):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))


MixConfig.register_for_auto_class()
MixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
'''


def test_blockwise_student_class_of_ones_own(block, out, tmp_path, monkeypatch):
    """A class in a local directory (auto_map), without attention, another family than the
    teacher's."""
    student = str(tmp_path / "mix")
    (tmp_path / "mixlib.py").write_text(CUSTOM_STUDENT)
    monkeypatch.syspath_prepend(tmp_path)
    import mixlib
    torch.manual_seed(0)
    mixlib.MixForCausalLM(mixlib.MixConfig()).save_pretrained(student)
    tiny_tokenizer().save_pretrained(student)
    fields = dict(student=student, trust_remote_code=True, epochs_per_block=4, lm_head_epochs=2)
    for refused, named in ((dict(gradient_checkpointing=True), "MixForCausalLM"),
                           (dict(packing="documents"), "position_ids")):
        assert named in distil_blocks(block, out, 2, **fields, **refused).err
    distil_blocks(block, out, **fields)
    assert errors_fell(out, 2)
    final = AutoModelForCausalLM.from_pretrained(f"{out}/final", trust_remote_code=True)
    assert type(final).__name__ == "MixForCausalLM"
    assert not same(final.state_dict(), weights(student))


@pytest.mark.parametrize("cls, model_type, fields", [
    ("GPT2Config", "gpt2", {}),
    ("Gemma2Config", "gemma2", dict(head_dim=8)),
    ("GPTNeoXConfig", "gpt_neox", {}),
])
def test_blockwise_student_of_another_family(block, out, tmp_path, cls, model_type, fields):
    """Other norms, learned positions, a capped head."""
    student = tiny_model(tmp_path / "student", hidden=16, layers=2, seed=3, cls=cls, **fields)
    distil_blocks(block, out, student=student, epochs_per_block=6, lm_head_epochs=4)
    assert errors_fell(out, 2, below=0.9)
    assert load(f"{out}/final").config.model_type == model_type


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_blockwise_a_row_that_is_not_finite_skips_its_step_only(block, out, tmp_path, source):
    """One row in five has the letter that the teacher cannot bear."""
    rows = [{"prompt": "a" if i % 5 else "Z", "response": "one two three"} for i in range(10)]
    data = write_splits(tmp_path / "data", rows, rows[1:3])
    broken = break_letter(block.teacher, tmp_path / "broken")
    distil_blocks(block, out, teacher=broken, dataset=data, batch_size=1, block_input=source,
                  lm_head_epochs=0.1, initialize_head_from_teacher=False)
    losses = column(out, "train/loss")
    skipped = column(out, "train/skipped_steps")[-1]
    assert len(losses) // 6 <= skipped < len(losses)
    assert skipped == losses.count(None)
    assert all(tensor.isfinite().all() for tensor in final_weights(out).values())


@pytest.mark.parametrize("fields, tolerance", [
    (dict(), 2e-5),
    (dict(block_input="teacher"), 2e-5),
    (dict(dtype="bf16"), 0.02),
])
def test_blockwise_an_empty_share_counts_nothing(block, tmp_path, fields, tolerance):
    """5 sequences as 8 x 1 and on two ranks as 4 of 1 each: micro-batches have none, and a rank of
    the held-out rows."""
    fields = dict(
        teacher=block.teacher, student=block.student, epochs_per_block=2, lm_head_epochs=1,
        dataset=write_splits(tmp_path / "data", talk(5), talk(1)), **fields)
    whole = tmp_path / "whole"
    ranks = tmp_path / "ranks"
    distil_blocks(block, whole, **fields, batch_size=8)
    words = {**PLAIN, **BLOCKWISE, **fields, "batch_size": 1, "gradient_accumulation_steps": 4}
    shown = Fork(tmp_path / "log.txt", *flags(**words, output_dir=ranks), ranks=2).wait()
    for key in ("train/loss", "block/0/loss", "block/2/explained", "eval/loss"):
        expected = pytest.approx(column(whole, key), rel=tolerance)
        assert column(ranks, key) == expected, (key, shown)


def test_blockwise_lr_multipliers_hold_in_every_phase(block, out):
    """Frozen stays frozen, what is multiplied moves so much further, stitches have their block's
    rate."""
    shown = distil_blocks(
        block, out, epochs_per_block=0.1, lm_head_epochs=0.1, max_grad_norm_per_block=0,
        lr_multipliers=["embed=0", r"layers\.0\.=2", r"layers\.1\.=0", "model.norm=0"]).out
    before = weights(block.student)
    before["lm_head.weight"] = before["model.embed_tokens.weight"]   # untied from here on
    after = final_weights(out)
    rates = {}
    for name, x in after.items():   # AdamW's first step is the rate, in the direction of the sign
        change = (x - before[name]).abs().max().item() / 3e-3
        rates[re.sub(r"\.(self_attn|mlp|input|post).*", "", name)] = round(change, 1)
    assert rates == {
        "model.embed_tokens.weight": 0, "model.layers.0": 2, "model.layers.1": 0,
        "model.layers.2": 1, "model.norm.weight": 0, "lm_head.weight": 1}
    assert "norm or head is frozen" in shown


# ---- what it costs


def bench_block(layers=8, width=256):
    """Cost of the block phase of S equal layers, over running both models whole for each block:
    about a half."""
    with tempfile.TemporaryDirectory() as folder:
        run = plain_run(*[tiny_model(f"{folder}/{seed}", hidden=width, layers=layers, seed=seed)
                          for seed in (0, 1)])
    row = {"input_ids": np.arange(128), "targets": np.arange(128) > 0, "starts": np.array([0])}
    batch = sd.collate([row] * 8)
    parts = sd.parameters_by_part(run)
    costs = []
    for i, j in run.student.pairs.items():
        stage = sd.stage_of_blocks(run, parts, {i: j}, 0)
        with contextlib.redirect_stdout(io.StringIO()):
            sd.make_optimizer(run.student.parameters(), stage.rates, 0.0)   # freezes the others
        times = []
        for _ in range(5):
            start = time.process_time()
            targets = stage.get_teacher_targets(batch)
            run.student(stage.loss_fn, batch, targets, 1.0)[0].backward()
            times.append(time.process_time() - start)
        costs.append(min(times))
    milliseconds = ", ".join(f"{1e3 * cost:.0f}" for cost in costs)
    print(f"\nCPU ms a step of each block: {milliseconds}; all of them: "
          f"{sum(costs) / (layers * costs[-1]):.2f} of running both models whole for each, as the "
          "last one does")


# --------------------------------------------------------------------------------------------------
# Optional: on_policy: the student writes, the teacher corrects.

WRITING = dict(on_policy=1, max_new_tokens=6, on_policy_prompt=5)
GREEDY = 1e-4   # a temperature at which nothing is left to chance


def greedy_text(model, prompt, new, ends=(0,)):
    """What a model writes, from whole forwards of one row: no padding, no cache."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor(ids)[None], use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt):]


def coded_texts(model, prompts):
    """Greedy texts of 6 tokens -> (ids, labels already shifted) as for model_losses: what was
    written counts alone."""
    coded = []
    for prompt in prompts:
        ids = torch.tensor(prompt + greedy_text(model, prompt, 6))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[:len(prompt) - 1] = -100
        coded.append((ids, labels))
    return coded


def biased(path, bias, **fields):
    """A tiny model whose head has a bias: {token: value}, 0 for all others."""
    tiny_model(path, cls="PhiConfig", resid_pdrop=0.0, embd_pdrop=0.0, **fields)

    def set_bias(tensors):
        tensors["lm_head.bias"].zero_()
        for token, value in bias.items():
            tensors["lm_head.bias"][token] = value

    edit_weights(path, set_bias)
    return str(path)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_policy_a_step_is_the_divergence_on_the_students_texts(
        tmp_path, out, teacher, student, text, divergence):
    """Loss and gradients against float64 on full logits, the texts written by hand; whatever alpha
    is, labels count for nothing."""
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, max_steps=1,
           on_policy_temperature=GREEDY, divergence=divergence, temperature=2.0, alpha=0.3,
           max_grad_norm=0, learning_rate=STILL, batch_size=4, gradient_accumulation_steps=2)
    rows, _ = rows_of(text, seq_len=32)
    prompts = [ids_of(rows)[i][:5] for i in sd.batch_of_step(len(rows), 0, 8, 0)]
    model = load(student)
    coded = coded_texts(model, prompts)
    _, ce, kl = model_losses(model.double(), load(teacher).double(), coded, 0.0, 2.0, divergence)
    kl.backward()
    logged = logged_losses(log(out, "train")[0])
    assert logged == pytest.approx([kl.item(), ce.item(), kl.item()], rel=1e-6)
    expected = {f"exp_avg.model.{name}": p.grad for name, p in model.named_parameters()}
    assert distance(gradients(out), expected) < 1e-6


def test_on_policy_the_student_writes_as_it_is_at_that_step(tmp_path, out, text):
    """A first step makes it sure of one letter: the texts of the second consist of it. Written any
    earlier, they would be the most unlikely."""
    q = tiny_tokenizer().encode("q")[0]
    teacher = biased(tmp_path / "teacher", {q: 100}, seed=1)
    student = biased(tmp_path / "student", {}, seed=2)
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, max_steps=2,
           learning_rate=30, default_lr_multiplier=0, lr_multipliers=["lm_head.bias=1"])
    first, second = column(out, "train/ce_loss")
    assert first > 2
    assert second < 1e-3


def written(name, prompts, seeds, room=12, temperature=1.0, ends=(0,), **fields):
    """What a student writes after prompts, with as much room after each; afterwards it is as it
    was, in training."""
    cfg = config.Config(student=name, teacher=name, **fields)
    with sd.process_group():
        root, _ = sd.load_model(cfg, "student")
        texts = sd.write_texts(root, prompts, seeds, [room] * len(prompts), temperature, set(ends),
                               len(tiny_tokenizer()))
        assert root.training and root.model.training
    return texts


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_on_policy_what_is_written_is_drawn_from_the_softmax(tmp_path, student, temperature):
    """2,000 first tokens after one prompt, beside longer prompts; padding of the vocabulary is
    never drawn."""
    wide = padded(tmp_path / "wide", student, 9)
    prompts = [[40, 50, 60], [70, 80, 90, 100, 110]] * 2000
    texts = written(wide, prompts, range(4000), 1, temperature)
    for i in range(2):
        logits = load(student)(torch.tensor(prompts[i])[None]).logits[0, -1].double()
        expected = 2000 * (logits / temperature).softmax(-1).detach()
        counts = torch.bincount(torch.tensor(texts[i::2])[:, 0], minlength=len(expected))
        assert len(counts) == len(tiny_tokenizer())
        common = expected > 5
        squares = ((counts - expected).square() / expected)[common].sum()
        freedom = int(common.sum())
        assert freedom > 20
        assert squares < freedom + 4 * math.sqrt(2 * freedom)
        rare = counts[~common].sum() - expected[~common].sum()
        assert abs(rare) < 4 * math.sqrt(expected[~common].sum())


def test_on_policy_a_text_does_not_depend_on_the_rows_beside_it(student):
    prompts = [list(range(40, 40 + n)) for n in (3, 9, 5, 12, 7)]
    together = written(student, prompts, range(5))
    for i in (0, 3, 4):
        assert written(student, [prompts[i]], [i]) == [together[i]]
    assert written(student, prompts, range(5, 10)) != together


@pytest.mark.parametrize("temperature", [0, GREEDY])
@pytest.mark.parametrize("recompute", [False, True])
def test_on_policy_dropout_and_recomputing_are_off_while_it_writes(
        tmp_path, temperature, recompute):
    """A text ends with an end mark, or where its room does."""
    student = tiny_model(tmp_path / "dropout", **DROPOUT, seed=3)
    model = load(student).eval()
    prompts = [list(range(40, 50)), [33, 200]]
    texts = [greedy_text(model, prompt, 9, ends=()) for prompt in prompts]
    ends = {texts[0][4]}
    texts = [greedy_text(model, prompt, 9, ends) for prompt in prompts]
    assert len(texts[0]) < len(texts[1]) == 9
    assert written(student, prompts, [0, 1], 9, temperature, ends,
                   gradient_checkpointing=recompute) == texts


@pytest.mark.parametrize("targets, length", [
    ("..##.###.", 5),   # a conversation: all before the last turn of the assistant
    ("..##", 2),
    (".########", 4),   # plain text
    (".##", 2),         # which is shorter than a prompt
    (".##.#", 4),
])
def test_on_policy_the_prompt_of_a_row(targets, length):
    row = {"input_ids": np.arange(len(targets)), "targets": np.array([c == "#" for c in targets])}
    cfg = config.Config(on_policy=0.5, on_policy_prompt=4)
    assert sd.prompt_of(row, cfg) == list(range(length))


def test_on_policy_what_is_written_counts_alone(student):
    """After each prompt, up to an end mark or max_new_tokens, and within seq_len."""
    cfg = config.Config(student=student, teacher=student, on_policy=1, on_policy_prompt=5,
                        max_new_tokens=6, seq_len=12)
    rows = [{"input_ids": np.arange(10), "targets": np.arange(10) >= begin} for begin in (1, 7, 9)]
    with sd.process_group():
        root, _ = sd.load_model(cfg, "student")
        texts, other = [sd.rows_by_student(cfg, root, rows, step, range(3), {0}, 263)
                        for step in (3, 4)]
    assert ids_of(texts) != ids_of(other)
    for row, prompt in zip(texts, (5, 7, 9)):
        ids = row["input_ids"].tolist()
        assert ids[:prompt] == list(range(prompt))
        assert len(ids) == min(prompt + 6, 12) or ids[-1] == 0
        assert row["targets"].tolist() == [i >= prompt for i in range(len(ids))]


def test_on_policy_the_log_says_how_long_texts_are(out, teacher, student, text):
    """Also where a resume comes between two lines of it."""
    fields = dict(teacher=teacher, student=student, dataset=text, on_policy=1, max_steps=4,
                  log_steps=4, save_steps=2, on_policy_prompt=30, max_new_tokens=6)
    distil(out, **fields)
    whole = quiet_log(out)
    entry, = log(out, "train")
    assert entry.keys() == TRAIN_KEYS | {"train/rollout_length", "train/rollout_cut"}
    assert 1 < entry["train/rollout_length"] < 3   # rows that are shorter themselves have room
    assert 0.5 < entry["train/rollout_cut"] <= 1
    distil(out, **fields, resume=f"{out}/checkpoints/step-00000002")
    assert quiet_log(out) == whole


def test_on_policy_steps_alternate_by_a_seeded_draw(tmp_path, teacher, student, chat):
    """The others are as ever; the end marks that the student writes end its texts."""
    drawn = [sd.is_on_policy(0.5, 3, step) for step in range(400)]
    assert 160 < sum(drawn) < 240
    assert drawn != [sd.is_on_policy(0.5, 4, step) for step in range(400)]
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=128, seed=3, max_steps=8,
                  learning_rate=STILL)
    distil(tmp_path / "mixed", **fields, on_policy=0.5, max_new_tokens=4)
    distil(tmp_path / "plain", **fields)
    both = zip(log(tmp_path / "mixed", "train"), log(tmp_path / "plain", "train"), strict=True)
    for (entry, usual), by_student in zip(both, drawn):
        assert ("train/rollout_cut" in entry) == by_student
        if by_student:
            assert entry["train/loss"] == entry["train/kl_loss"]
        else:
            assert logged_losses(entry) == logged_losses(usual)


def test_on_policy_texts_end_where_those_of_student_or_teacher_end(
        tmp_path, out, teacher, student, text):
    """By generation_config.json and by the tokenizer; final/ says so too."""
    tokenizer = tiny_tokenizer()
    for role, source, ends in (("teacher", teacher, [3, 70]), ("student", student, 80)):
        model = load(source)
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        tokenizer.eos_token = "<|im_start|>"   # 2: the student's
    distil(out, teacher=tmp_path / "teacher", student=tmp_path / "student", dataset=text,
           max_steps=1, **WRITING)
    kept = json.loads(Path(out, "final", "generation_config.json").read_text())["eos_token_id"]
    assert kept == [0, 2, 3, 70, 80]


def test_on_policy_a_student_that_takes_padding_for_text_is_refused(   # optional: blockwise
        tmp_path, out, teacher, text, monkeypatch):
    """A class of one's own that looks at no mask and keeps no cache."""
    (tmp_path / "mixlib.py").write_text(CUSTOM_STUDENT)
    monkeypatch.syspath_prepend(tmp_path)
    import mixlib
    student = str(tmp_path / "mix")
    mixlib.MixForCausalLM(mixlib.MixConfig()).save_pretrained(student)
    tiny_tokenizer().save_pretrained(student)
    err = distil(out, teacher=teacher, student=student, dataset=text, trust_remote_code=True,
                 **WRITING, max_steps=1, rc=2).err
    assert "MixForCausalLM" in err and "on_policy needs another" in err


@pytest.mark.parametrize("positions, rc", [(131, 0), (130, 2)])
def test_on_policy_a_table_of_positions_has_to_hold_a_long_prompt_and_new_tokens(
        tmp_path, out, teacher, text, positions, rc):
    """seq_len 32 and 100 more: a long row goes on beside a short one; the last is not looked up."""
    student = tiny_model(tmp_path / "student", cls="GPT2Config", max_position_embeddings=positions)
    shown = distil(out, rc, teacher=teacher, student=student, dataset=text, on_policy=1,
                   max_new_tokens=100, max_steps=1)
    assert ("as a writer, at up to 131 positions" in shown.err) == (rc == 2)


@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op"])
def test_on_policy_two_ranks_write_what_one_writes(tmp_path, teacher, student, chat, fsdp):
    """And end with the same weights; a rank without a row of its own takes part."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=128, on_policy=0.7,
                  max_new_tokens=20, max_steps=6, max_samples=7, gradient_checkpointing=True)
    one = tmp_path / "one"
    two = tmp_path / "two"
    distil(one, **fields, batch_size=6)
    words = flags(**{**PLAIN, **fields, "fsdp": fsdp, "output_dir": two, "batch_size": 3})
    shown = Fork(tmp_path / "shown.txt", *words, ranks=2).wait()
    assert_close(two, one, shown)
    for key in ("train/rollout_length", "train/rollout_cut"):
        assert column(two, key) == column(one, key)


def test_on_policy_a_rank_whose_texts_end_at_once_waits_for_the_other(tmp_path, text):
    """Half of the first tokens are the end: of one text a rank, each often ends long before the
    other's."""
    ended = math.log(263)
    teacher = biased(tmp_path / "teacher", {0: ended}, seed=1, initializer_range=0.02)
    student = biased(tmp_path / "student", {0: ended}, seed=2, initializer_range=0.02)
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "on_policy": 1,
              "max_new_tokens": 24, "max_steps": 12, "batch_size": 1}
    shown = Fork(tmp_path / "log.txt", *flags(**fields, output_dir=tmp_path / "out"),
                 ranks=2).wait()
    assert "done in" in shown, shown
    lengths = column(tmp_path / "out", "train/rollout_length")
    assert min(lengths) == 1 and max(lengths) > 2, lengths
    assert column(tmp_path / "out", "train/rollout_cut")[lengths.index(1)] == 0   # all have ended
    assert len({length % 1 for length in lengths}) == 2   # an odd sum: they were not as long


def test_on_policy_comes_after_the_blocks(out, teacher, text):   # optional: blockwise
    student = tiny_model(f"{out}-student", hidden=16, seed=2, tie_word_embeddings=False)
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, blockwise=True,
           epochs_per_block=0.2, lm_head_epochs=0.2, max_steps=2)
    by_student = ["train/rollout_cut" in entry for entry in log(out, "train")]
    assert by_student == [False] * (len(by_student) - 2) + [True, True] and len(by_student) > 4


@pytest.mark.parametrize("fields", [
    dict(packing="rows"),   # some documents are shorter than the prompt
    dict(streaming=True),   # optional: streaming
])
def test_on_policy_of_rows_of_any_kind(out, teacher, student, text, fields):
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, **fields, max_steps=1)
    assert 1 <= column(out, "train/rollout_length")[0] <= 6


def test_on_policy_dry_run_shows_what_the_student_writes(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, on_policy=0.5,
                   max_new_tokens=6, on_policy_prompt=5, max_steps=2, dry_run=True).out
    assert re.search(r"the student wrote: .*\[\[.+\]\]", shown)
    assert re.search(r"a step on policy takes \S+ s, \S+ of them to write", shown)
    assert not os.path.exists(out)


def test_on_policy_eval_scores_the_students_own_texts(   # optional: eval
        out, teacher, student, text):
    """Against whole forwards of what it writes by hand."""
    fields = {**WRITING, "on_policy": None, "on_policy_temperature": GREEDY}
    cli(*flags(**fields, mode="eval", teacher=teacher, student=student, dataset=text, seq_len=32,
               dtype="fp32", temperature=2.0, divergence="reverse", output_dir=out))
    found = json.loads(Path(out, "report.json").read_text())["models"]
    _, held_out = rows_of(text, seq_len=32)
    model = load(student)
    coded = coded_texts(model, [ids[:5] for ids in ids_of(held_out)])
    _, _, kl = model_losses(model, load(teacher), coded, 0.0, 2.0, "reverse")
    assert found["student"]["own"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["teacher"]["own"] == 0


# ---- what it costs


def bench_on_policy():
    """Writing against transformers' own generate, same model and prompts."""
    shape, _, sequences, tokens = step_shapes()
    vocab = shape["vocab_size"]
    new = tokens // 2
    prompts = torch.randint(0, vocab, (sequences, tokens // 4)).tolist()
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        transformers.Qwen3Config(**shape).save_pretrained(folder)
        cfg = sd.Config(student=f"{folder}/config.json", alpha=1.0, use_wandb=False)
        root, _ = sd.load_model(cfg, "student")
        model = AutoModelForCausalLM.from_config(
            root.model.config, dtype=sd.compute_dtype(cfg)).to(sd.DEVICE).eval()
        ids_BT = torch.tensor(prompts, device=sd.DEVICE)

        def plain():
            model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new,
                           do_sample=True, top_k=0, pad_token_id=0)

        def ours():
            sd.write_texts(root, prompts, range(sequences), [new] * sequences, 1.0, set(), vocab)

        found = interleaved({"plain generate": plain, "ours": ours}, rounds=5)
    print(f"\nwriting {sequences} x {new} tokens after {tokens // 4}, V {vocab:,}")
    for name in ("plain generate", "ours"):
        speed = sequences * new / found[name]
        print(f"  {name:<20}{speed:>12,.0f} tokens/s"
              f"{found['plain generate'] / found[name]:>8.2f} x plain")


# --------------------------------------------------------------------------------------------------
# Optional: generate: against the real SDKs and a server of our own that misbehaves.


def random_words(seed, count=40):
    """The same for the same seed; two texts of 40 are no duplicates."""
    stems = "list map tree queue sort find merge split read write open close".split()
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(stems)}{rng.randrange(1000)}" for _ in range(count))


FAULTY_TEXTS = {   # what a server says where a fault is one of the text alone
    "refusal": "I'm sorry, but I can't help with that: it is against my rules.",
    "loop": "and so on " * 99,
    "duplicate": random_words("same"),
    "empty": "",
    "code": "Here it is for you:\n```python\ndef f(:\n    pass\n```",
}
PRICES = dict(price_in=20, price_out=100)   # USD a million tokens
REPLY_COST = 0.022                          # of 100 tokens in and 200 out


def answer_of(provider, content, is_whole=True, **more):
    """The JSON of a reply; more: in place of its keys."""
    if provider == "anthropic":
        answer = {
            "content": [{"type": "text", "text": content}],
            "stop_reason": "end_turn" if is_whole else "max_tokens",
            "usage": {"input_tokens": 100, "output_tokens": 200},
        }
    else:
        answer = {
            "choices": [{
                "finish_reason": "stop" if is_whole else "length",
                "message": {"role": "assistant", "content": content},
            }],
            "usage": {"prompt_tokens": 100, "completion_tokens": 200},
        }
    return json.dumps(answer | more).encode()


def no_fault(prompt, attempt):
    return None


class ApiServer(http.server.ThreadingHTTPServer):
    """OpenAI and Anthropic on loopback, while it is entered. It would send a bill for all but
    statuses below 500.

    fault(prompt, attempt): how this attempt misbehaves. None: not at all; a number: the status of
    an error; bytes: the whole answer; a name: see ApiHandler and FAULTY_TEXTS. reply(prompt): what
    is said otherwise. jitter: seconds before an answer, at most. summary: the file that must tell
    of at least as much as was billed, and of at most 1 USD, at any moment."""
    daemon_threads = True
    request_queue_size = 200

    def __init__(self, fault=no_fault, reply=random_words, jitter=0):
        super().__init__(("127.0.0.1", 0), ApiHandler)
        self.fault = fault
        self.reply = reply
        self.jitter = jitter
        self.summary = None
        self.reply_cost = REPLY_COST
        self.lock = threading.Lock()
        self.tries = collections.Counter()    # prompt -> requests
        self.billed = collections.Counter()   # prompt -> requests that a provider would bill
        self.seen = []                        # (body, key) of each request
        self.unpaid = []                      # (bill, spent_usd) where they are not as they should
        self.at_work = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Silent: clients get killed."""

    def check(self):
        if self.summary and self.billed:
            bill = self.billed.total() * self.reply_cost
            spent = json.loads(self.summary.read_text())["spent_usd"]
            if not bill <= spent + 1e-9 <= 1 + 2e-9:
                self.unpaid.append((bill, spent))


class ApiHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1   # an answer in one piece, unless it is flushed

    def log_message(self, *args):
        """Silent."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        key = (self.headers["authorization"] or self.headers["x-api-key"]).split()[-1]
        with server.lock:
            server.at_work += 1
            server.seen.append((body, key))
            server.tries[prompt] += 1
            fault = server.fault(prompt, server.tries[prompt])
            server.billed[prompt] += not (isinstance(fault, int) and fault < 500)
            server.check()
        time.sleep(server.jitter * random.random())
        try:
            self.answer(prompt, fault, key)
        finally:
            with server.lock:
                server.at_work -= 1

    def answer(self, prompt, fault, key):
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(fault, int):
            self.send(fault, json.dumps({"error": {"message": f"{fault} for {key}"}}).encode())
        elif isinstance(fault, bytes):
            self.send(200, fault)
        else:
            text = FAULTY_TEXTS[fault] if fault in FAULTY_TEXTS else self.server.reply(prompt)
            provider = "anthropic" if self.path == "/v1/messages" else "openai"
            more = {"usage": None} if fault == "no usage" else {}
            data = answer_of(provider, text, fault != "length", **more)
            self.send(200, data, pause=0.1 if fault == "slow" else 0)

    def send(self, status, data, pause=0):
        """pause: seconds after each 20 bytes."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        for start in range(0, len(data), 20):
            self.wfile.write(data[start:start + 20])
            if pause:
                self.wfile.flush()
                time.sleep(pause)


def generate_fields(folder, server, questions, provider="openai", **more):
    """Writes a file of so many questions -> the flags of a run that asks the server all of them,
    output_dir folder/out; `more` replaces and adds flags."""
    folder.mkdir(exist_ok=True)
    lines = [f"Question {i}: what is {random_words(i, 4)}?\n" for i in range(questions)]
    (folder / "prompts.txt").write_text("".join(lines))
    api_base = f"http://127.0.0.1:{server.server_port}"
    if provider == "openai":
        api_base += "/v1"
    fields = dict(
        mode="generate", provider=provider, api_model="m", api_base=api_base, max_tokens=300,
        prompts_file=folder / "prompts.txt", output_dir=folder / "out")
    return {**fields, **more}


def run_generate(fields, rc=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "PAUSES", (0.01,) * len(sd.PAUSES))
        return cli(*flags(**fields), rc=rc)


def one_error(named, fields, **more):
    """The run fails with one line of error, which names this -> Result."""
    result = run_generate({**fields, **more}, rc=2)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert named in errors[0], errors
    return result


def rows_of_run(folder, name):
    return read_lines(folder / f"out/{name}.jsonl")


def replies_of(folder, out="out"):
    """The rows of replies.jsonl, but for what a kill has left of one."""
    rows = []
    for line in (folder / out / "replies.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def spent_of(folder):
    return json.loads((folder / "out/summary.json").read_text())["spent_usd"]


def question_of(row):
    """"Question 7: what is ...?" -> 7"""
    return number_of(row["messages"][0]["content"])


def number_of(prompt):
    return int(prompt.split()[1].removesuffix(":"))


def reasons_of(rejected):
    """{number of a question: why}, without what "failed: ..." goes on to say"""
    return {question_of(row): row["reason"].split(":")[0] for row in rejected}


def faults_by_number(faults):
    """{number of a question: how it misbehaves at every attempt} -> fault of a server"""
    def fault(prompt, attempt):
        return faults.get(number_of(prompt))
    return fault


PASSING_FAULTS = (429, 500, 502, 503, 529, "drop")
LASTING_FAULTS = (
    b'{"choices": [{"mess', "no usage", "length", "refusal", "duplicate", "code", "empty", "loop")


def faults_by_chance(share):
    """-> fault of a server: this share of the prompts misbehaves, half of them at the first
    attempt, half of them at every attempt; which one it is hangs on the prompt alone."""
    def fault(prompt, attempt):
        chance = int(hashlib.md5(prompt.encode()).hexdigest(), 16) / 2**128   # even from 0 to 1
        if chance < share / 2:
            i = int(2 * chance / share * len(PASSING_FAULTS))
            return PASSING_FAULTS[i] if attempt == 1 else None
        if chance < share:
            i = int((2 * chance / share - 1) * len(LASTING_FAULTS))
            return LASTING_FAULTS[i]
        return None
    return fault


# ---- prompts and filters


def first_prompts(count, categories=(), seed=0):
    return list(itertools.islice(sd.compose_prompts(list(categories), seed), count))


def count_categories(prompts):
    return collections.Counter(category for category, _ in prompts)


def test_generate_prompts():
    """Distinct and balanced; asking for more only adds to them; weights are kept; a category that
    runs out says so."""
    prompts = first_prompts(20_000)
    assert len({messages[0]["content"] for _, messages in prompts}) == 20_000
    assert count_categories(prompts) == dict.fromkeys(sd.TASKS, 20_000 // 8)
    assert first_prompts(50) == prompts[:50]
    assert first_prompts(50, seed=1) != prompts[:50]
    weighted = first_prompts(60, ["implement=2.0", "debug=.5e0", "explain"])
    assert count_categories(weighted) == {"implement": 35, "debug": 8, "explain": 17}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "stdlib_functions", lambda rng: ["def f():\n    return 1\n"])
        with pytest.raises(sd.UserError, match="few more"):
            first_prompts(100_000, ["explain"])


BLOCK = "Here:\n```python\ndef f(x):\n    return x\n```\nThat is all."
IN_LIST = "- ```py\n  x = 1\n  y = 2\n  ```\n- that is it"
VERDICTS = {   # a filter, None: none, and replies
    None: [
        "```python\n>>> 1 + 1\n2\n```\nA session.",
        "````md\n```python\nx = (\n```\n````\nFences in a fence.",
        "I can't assist but so:\n```python\nx = 1\n```",
        "   ```python\n   x = 1\n   ```\nindented, as in a list",
        "```js\nfoo(() => {\n```\nis no Python",
        Path(__file__).read_text(),
        BLOCK, IN_LIST, BLOCK.replace("\n", "\r\n"), IN_LIST.replace("\n", "\r\n"),
        "```print(1)```",
        "```print(1)```\nprints it",
        "1. so:\n   ```python3\n   x = 1\n   ```",
        "```python2\nprint 1\n```\nis no Python 3",
        "Sorry is a word of five letters.",
        "I can't help but notice that your loop is quadratic: use a set.",
        "I can't see a bug: it is right.",
        "Unable to open the file: that is what the exception says.",
        "Sorry if I repeat what you know: a trie",
        "Sorry I missed the import; here it is: import os",
        "As an AI pipeline, the function has three stages.",
        "Unfortunately, the function is quadratic.",
        "Sorry, the loop I wrote above is off by one.",
        "I'm sorting the list first.",
        "Not able to connect: I would check the port.",
        "Declining is fine.",
        "give that",          # what the prompt asks to give back, but not half of it
        "ab " * 20,           # short: deflate needs some bytes itself
    ],
    "refusal": [
        "I’m sorry, but I cannot help with this.",
        "As an AI model, I do not.",
        "I apologize, but I cannot help with that.",
        "I can't provide that code, it is not mine to give.",
        "I cannot fulfill this request.",
        "I won't be able to help with this task.",
        "I must decline.",
        "Unfortunately, I can't do that for you today.",
        "I'm sorry, but I can’t assist with that request.",
        "I am very sorry, I am not able to write malware.",
        "I’m afraid I can not comply with this request.",
        "I apologise for the inconvenience, but I am unable to provide it.",
        "I have to decline this one.",
        "As an AI language model, I have no opinion.",
        "Sorry, as an AI assistant made by X, I will not.",
    ],
    "code does not parse": [
        "Here:\n```python3\ndef f(:\n```",
        "Here:\r\n```py\r\ndef f(:\r\n```",
        "Here:\n```python\nx = 1",
        "Here:\n```Python3\nprint 1\n```",
        "- ```py\n  x = (\n  ```",
        "- ```py\n  x = 1",
        "```print(1)```\n```js\nf()",
    ],
    "repetition loop": ["and so on " * 99, random_words(0, 400) + " so on" * 400],
    "empty or too short": ["", " \n", "```\n```"],
    "repeats the prompt": ["Give this back, all of it.", "this back, all of"],
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_generate_filters(verdict):
    for reply in VERDICTS[verdict]:
        assert sd.find_flaw("Give this back, all of it.", reply, "stop") == verdict, reply


def test_generate_filters_by_what_the_server_says():
    for finish_reason in ("length", "max_tokens", "model_context_window_exceeded"):
        assert sd.find_flaw("Why?", "So it is.", finish_reason) == "cut off"
    for finish_reason in ("refusal", "content_filter"):
        assert sd.find_flaw("Why?", "So it is.", finish_reason) == "refusal"
    assert sd.find_flaw("Why?", "x" * 20, "stop", min_chars=20) is None
    assert sd.find_flaw("Why?", "x" * 19, "stop", min_chars=20) == "empty or too short"


def test_generate_duplicates():
    """What a sign tells apart is no duplicate, nor is a label that fits many prompts, though they
    begin alike; what says little new is one."""
    code = "for (i = 0; i {} n; i++) {{ total += table[i]; }} return total; "
    code += random_words("code", 6)
    words = random_words("near", 400)
    seen = set()
    dialogues = [(f"Here is a long question, and always the same, is {i} prime?", "yes")
                 for i in range(9)]
    for prompt, reply, expected in [
        *((prompt, reply, None) for prompt, reply in dialogues),
        (dialogues[8][0], "Yes", "duplicate"),
        ("more", "return a < b", None),
        ("more", "return a >= b", None),
        ("more", code.format("<"), None),
        ("other", code.format("<"), "duplicate"),
        ("more", code.format(">="), None),
        ("more", words, None),
        ("more", words + " and nothing else", "duplicate"),
        ("more", words + random_words("end", 60), None),
        ("more", " ".join(words.split()[:19]), None),   # as short, a reply is one with its prompt
        ("more", " ".join(words.split()[:20]), "duplicate"),
    ]:
        assert sd.find_duplicate(prompt, reply, seen) == expected, (prompt, reply)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "system", "content": [{"type": "text", "text": "Be "}, {"text": "kind."}]},
    {"role": "user", "content": "What is a trie?"},
]
OWN_ROWS = [{"prompt": "What is a heap?"}] * 2 + [
    {"messages": CONVERSATION, "category": "explain", "more": 1}]


@pytest.mark.parametrize("provider, name, text, temperature, system", [
    ("openai", "own.jsonl", "\n\n".join(map(json.dumps, OWN_ROWS)), 0.3, None),
    ("anthropic", "own.json", json.dumps(OWN_ROWS), None, "Be brief.\n\nBe kind."),
])
def test_generate_own_rows(tmp_path, provider, name, text, temperature, system):
    """Texts or conversations reach each provider in its form, in all kinds of files."""
    (tmp_path / name).write_text("\ufeff" + text)
    with ApiServer() as server:
        fields = generate_fields(tmp_path, server, 0, provider, prompts_file=tmp_path / name,
                                 api_temperature=temperature)
        run_generate(fields)
    kept = rows_of_run(tmp_path, "train")
    turns = [[turn["content"] for turn in row["messages"][:-1]] for row in kept]
    assert turns == [["What is a heap?"], ["Be brief.", "Be kind.", "What is a trie?"]]
    assert [row["category"] for row in kept] == ["own", "explain"]
    body, _ = server.seen[-1]
    assert body.get("temperature") == temperature
    assert body["max_tokens"] == 300
    assert body["model"] == "m"
    assert body.get("system") == system
    assert len(body["messages"]) == (1 if system else 3)


def test_generate_own_lines(tmp_path):
    """All of a .txt unless num_examples says less; a short reply may be what it wants, to a task of
    ours it is none."""
    with ApiServer(reply=lambda prompt: "```yes```") as server:
        fields = generate_fields(tmp_path, server, 9)
        (tmp_path / "prompts.txt").write_text("\ufeffIs 1 odd?\n\nIs 2?\r\nIs 3?\nIs 1 odd?\n")
        run_generate({**fields, "num_examples": 2})
        assert len(server.tries) == 2
        run_generate(fields)
        assert list(server.tries) == ["Is 1 odd?", "Is 2?", "Is 3?"]
        assert set(server.tries.values()) == {1}
        asked = [row["messages"][0]["content"] for row in rows_of_run(tmp_path, "train")]
        assert asked == list(server.tries)
        run_generate({**fields, "num_examples": 1, "prompts_file": None,
                      "categories": ["implement=1.0"], "output_dir": tmp_path / "ours/out"})
    rejected, = rows_of_run(tmp_path / "ours", "rejected")
    assert (rejected["reason"], rejected["category"]) == ("empty or too short", "implement")


@pytest.mark.parametrize("line", [
    '{"prompt": 3}', '{"prompt": null}', "[]", "7", "nonsense", '{"question": 1}',
    '{"messages": "hi"}', '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    '{"messages": [{"role": "assistant", "content": "x"}]}',
    '{"n": ' + "9" * 5000 + "}", "[" * 99999])
def test_generate_bad_prompt(tmp_path, line):
    """Nobody is asked, and the row is named."""
    with ApiServer() as server:
        fields = generate_fields(tmp_path, server, 0, prompts_file=tmp_path / "p.jsonl")
        (tmp_path / "p.jsonl").write_text('{"prompt": "ok"}\n' + line + "\n")
        one_error("p.jsonl', row 2: ", fields)
        assert not server.seen


# ---- replies


@pytest.mark.parametrize("provider", [
    "openai",
    pytest.param("anthropic", marks=pytest.mark.campaign),
])
def test_generate_faults(tmp_path, provider):
    """30 % faults: all prompts answered or accounted for, none twice, and the order of arrival
    changes nothing."""
    fault = faults_by_chance(0.3)
    results = []
    for concurrency, jitter in ((16, 0.0), (40, 0.03)):
        folder = tmp_path / str(concurrency)
        with ApiServer(fault, jitter=jitter) as server:
            out = run_generate(
                generate_fields(folder, server, 300, provider, concurrency=concurrency)).out
        kept = rows_of_run(folder, "train")
        rejected = rows_of_run(folder, "rejected")
        assert sorted(map(question_of, kept + rejected)) == list(range(300))
        fates = collections.Counter(reasons_of(rejected).values())
        assert set(fates) == {"cut off", "refusal", "empty or too short", "duplicate",
                              "repetition loop", "code does not parse", "failed"}
        for name, count in {**fates, "kept": len(kept)}.items():
            assert re.search(rf"\| *{name} *\| *{count} *\|", out), out
        for prompt, tries in server.tries.items():
            first = fault(prompt, 1)
            assert tries == 1 + (first in PASSING_FAULTS), (prompt, first)
        results.append((kept, reasons_of(rejected)))
    assert results[0] == results[1]
    assert set(kept[0]) == {
        "messages", "category", "model", "usage", "cost", "finish_reason", "prompt_id"}
    assert kept[0]["usage"] == {"prompt_tokens": 100, "completion_tokens": 200}


def test_generate_concurrency(tmp_path):
    """So many are in flight at once, and no more."""
    barrier = threading.Barrier(8, timeout=60)
    at_once = []

    def reply(prompt):
        barrier.wait()
        at_once.append(server.at_work)
        return random_words(prompt)

    with ApiServer(reply=reply) as server:
        run_generate(generate_fields(tmp_path, server, 16, concurrency=8))
    assert len(rows_of_run(tmp_path, "train")) == 16
    assert max(at_once) == 8


def test_generate_filters_can_change(tmp_path, monkeypatch):
    """Old replies are judged again, and nobody is asked."""
    with ApiServer() as server:
        fields = generate_fields(tmp_path, server, 5)
        run_generate(fields)
    monkeypatch.setattr(sd, "is_loop", lambda reply: True)
    run_generate(fields)
    assert rows_of_run(tmp_path, "train") == []
    assert set(reasons_of(rows_of_run(tmp_path, "rejected")).values()) == {"repetition loop"}


TEXT = {"type": "text", "text": random_words("text")}


@pytest.mark.parametrize("content, reply", [
    ([{"text": "a" + TEXT["text"]}, TEXT], "a" + 2 * TEXT["text"]),
    ([{"type": "thinking", "thinking": "Hm."}, TEXT], TEXT["text"]),
    (None, ""),
])
def test_generate_parts(tmp_path, content, reply):
    """Parts of text are one text; what a model thought is no part of it."""
    with ApiServer(lambda *_: answer_of("openai", content)) as server:
        run_generate(generate_fields(tmp_path, server, 1))
    row, = replies_of(tmp_path)
    assert row["messages"][1] == {"role": "assistant", "content": reply}


@pytest.mark.parametrize("usage", [
    None, *({"prompt_tokens": n, "completion_tokens": 5} for n in (-1, 10**30, "10", None))])
def test_generate_odd_usage(tmp_path, usage):
    """Who says nonsense of tokens is believed to have sent the longest reply; it is kept."""
    with ApiServer(lambda *_: answer_of("openai", TEXT["text"], usage=usage)) as server:
        run_generate(generate_fields(tmp_path, server, 1, **PRICES))
    kept, = rows_of_run(tmp_path, "train")
    assert kept["usage"] is None
    assert kept["cost"] > 300 * 100 / 1e6


# ---- money


def worst_of(prompt):
    return ((64 + len(prompt)) * 20 + 300 * 100) / 1e6


@pytest.mark.parametrize("faults, max_cost, worst, replies, failed", [
    # how the attempts at one prompt end; what is spent: so many worst cases, and replies
    ([None], 1, 0, 1, False),
    ([429, 429, None], 1, 0, 1, False),
    (["drop", 429, None], 1, 1, 1, False),       # a refusal gives back one try, not all
    ([500, 502, "drop", None], 1, 3, 1, False),  # whoever stands before a model may say 502
    (["slow", None], 1, 1, 1, False),
    (["no usage"], 1, 1, 0, False),
    ([429] * 8, 1, 0, 0, True),
    ([503] * 8, 1, 8, 0, True),
    ([400], 1, 0, 0, True),
    ([b"{"], 1, 1, 0, True),
    (["drop"], 0.05, 1, 0, None),                # no money for another: nothing is known
    ([None], 0.03, 0, 0, None),
])
def test_generate_spends(tmp_path, faults, max_cost, worst, replies, failed):
    """What is on the bill, or may be, is in spent_usd and in the row; what was refused is not."""
    with ApiServer(lambda prompt, attempt: faults[attempt - 1]) as server:
        fields = generate_fields(tmp_path, server, 1, **PRICES, max_cost=max_cost,
                                 request_timeout=0.5)
        run_generate(fields, rc=2 if failed else 0)
    prompt = (tmp_path / "prompts.txt").read_text().strip()
    expected = pytest.approx(worst * worst_of(prompt) + replies * REPLY_COST)
    assert spent_of(tmp_path) == expected if worst + replies else spent_of(tmp_path) < 1e-9
    rows = replies_of(tmp_path)
    if failed is None:
        assert rows == []
    else:
        assert [("reason" in row, row["cost"]) for row in rows] == [(failed, expected)]
    assert server.tries.total() == (len(faults) if max_cost > 0.04 else 0)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_cap(tmp_path, provider):
    """At every moment: the server's bill <= spent_usd on disk <= 1.00 USD, whatever goes wrong, and
    most of it is used."""
    with ApiServer(faults_by_chance(0.5)) as server:
        server.summary = tmp_path / "out/summary.json"
        fields = generate_fields(tmp_path, server, 200, provider, concurrency=16, max_cost=1,
                                 **PRICES)
        out = run_generate(fields).out
        assert server.unpaid == []
        bill = server.billed.total() * REPLY_COST
        assert "max_cost 1" in out
        assert 0.7 < bill <= spent_of(tmp_path) <= 1
        answered = {row["messages"][0]["content"] for row in replies_of(tmp_path)}
        assert 20 < len(answered) < 60
        tries = server.tries.copy()
        run_generate(fields)   # what late answers gave back buys some more
        assert server.unpaid == []
        assert (server.tries - tries).total() <= 3
        assert not answered & set(server.tries - tries)


def test_generate_failed(tmp_path):
    """What failed is asked again by the same command, its cost is not forgotten, and what fails
    always stops no later run."""
    lasting = {number: 400 for number in range(4, 61, 5)}   # a dozen, in the second run in a row
    passing = {5: b"{", 7: b'{"error": "x"}'}
    with ApiServer(faults_by_number(lasting | passing)) as server:
        fields = generate_fields(tmp_path, server, 60, concurrency=1, **PRICES)
        run_generate(fields)
        spent = spent_of(tmp_path)
        tries = server.tries.copy()
        assert reasons_of(rows_of_run(tmp_path, "rejected")) == dict.fromkeys(
            lasting | passing, "failed")
        server.fault = faults_by_number(lasting)
        run_generate(generate_fields(tmp_path, server, 61, concurrency=1, **PRICES))
    asked = sorted(map(number_of, server.tries - tries))
    assert asked == sorted([*lasting, *passing, 60])
    assert reasons_of(rows_of_run(tmp_path, "rejected")) == dict.fromkeys(lasting, "failed")
    assert spent_of(tmp_path) == pytest.approx(spent + 3 * REPLY_COST)


@pytest.mark.parametrize("provider, fault, answers, named", [
    ("openai", 401, 0, "401"),
    ("anthropic", 404, 0, "404"),
    ("openai", b'{"error": {"message": "your credits are used up"}}', 0, "credits are used up"),
    ("anthropic", b'{"error": {"message": "no credits"}}', 0, "no credits"),
    ("openai", 400, 9, "400"),
])
def test_generate_stops(tmp_path, provider, fault, answers, named):
    """Where nobody was ever answered, or ten in a row are not, the run ends; what came is kept; and
    after that another setting may be tried."""
    def refuse(prompt, attempt):
        return fault if server.tries.total() > answers else None

    with ApiServer(refuse) as server:
        fields = generate_fields(tmp_path, server, 50, provider, concurrency=3)
        one_error(named, fields)
        assert len(rows_of_run(tmp_path, "train")) == answers
        tries = server.tries.total() - answers
        assert 10 <= tries <= 12 if answers else tries <= 3
        server.fault = no_fault
        if not answers:
            fields["api_model"] = "other"
        run_generate(fields)
    assert len(rows_of_run(tmp_path, "train")) == 50


def test_generate_time_out(tmp_path):
    """An answer that trickles is given up like one that does not come, in words."""
    with ApiServer(lambda prompt, attempt: "slow") as server:
        one_error("no reply (a try has 0.4 s): TimeoutError",
                  generate_fields(tmp_path, server, 1, request_timeout=0.2))
    assert server.tries.total() == 8


@pytest.mark.parametrize("status", [None, 429])
def test_generate_signal(tmp_path, status):
    """SIGTERM: what is in flight arrives, nothing new is asked, exit 0, also between two tries; the
    same command goes on."""
    def stop(prompt, attempt):
        if server.tries.total() == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            return status
        return None

    with ApiServer(stop, jitter=0.05) as server:
        fields = generate_fields(tmp_path, server, 40, concurrency=3)
        run_generate(fields)
        kept = len(rows_of_run(tmp_path, "train"))
        assert 5 <= kept <= 8
        run_generate(fields)
        assert len(rows_of_run(tmp_path, "train")) == 40
        assert set(server.billed.values()) == {1}


# The loop of tries, and what writes the money and the replies.
LOOP = (sd.ask, sd.Asking.hold, sd.Asking.change, sd.Asking.record, sd.read_answer,
        sd.write_json, sd.append_jsonl, sd.read_replies, sd.write_jsonl)


def kill_at(fields, line):
    """Fork; the child runs the command and is killed when it first comes to this (code, number of
    a line) -> whether it came there."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def trace(frame, event, _):
        if (frame.f_code, frame.f_lineno) == line and event == "line":
            os.kill(os.getpid(), signal.SIGKILL)
        return trace if frame.f_code is line[0] else None

    sys.settrace(trace)
    try:
        run_generate(fields)
    finally:
        os._exit(0)


@pytest.mark.campaign
def test_generate_kill_at_every_line(tmp_path):
    """kill -9 at each line of the loop of tries, with all kinds of faults: at any moment billed <=
    spent_usd <= max_cost; the same command goes on, and asks nothing twice that was answered."""
    lines = []
    for function in LOOP:
        numbers = {number for *_, number in function.__code__.co_lines() if number}
        lines += [(function.__code__, number) for number in sorted(numbers)[1:]]
    kinds = [None, 429, 500, "drop", "no usage", b"{", 400, 502, None, None]

    def fault(prompt, attempt):
        return kinds[server.tries.total() % len(kinds)]

    tries_of_answered = {}   # as they were when the answer was there
    missed = []   # lines to which no run came
    importlib.import_module("openai")   # once, for all children
    with ApiServer(fault) as server:
        server.summary = tmp_path / "out/summary.json"
        server.reply_cost = 1.1e-4
        fields = generate_fields(tmp_path, server, 600, concurrency=3, max_cost=1, price_in=0.1,
                                 price_out=0.5)
        for line in lines:
            count = len(tries_of_answered) + 40
            if not kill_at({**fields, "num_examples": count}, line):
                missed.append(f"{line[0].co_name} {line[1]}")
            while server.at_work:
                time.sleep(0.01)
            server.check()
            for row in replies_of(tmp_path):
                prompt = row["messages"][0]["content"]
                if "reason" not in row:
                    tries_of_answered.setdefault(prompt, server.tries[prompt])
        server.fault = no_fault
        run_generate(fields)
    assert server.unpaid == []
    assert len(rows_of_run(tmp_path, "train")) == 600
    assert len(tries_of_answered) > 50
    assert tries_of_answered == {prompt: server.tries[prompt] for prompt in tries_of_answered}
    # an outage of all eight tries, and a cap that is met, are other tests'
    assert len(missed) < 8, missed


# ---- what stands in the folder


def test_generate_half_rows(tmp_path):
    """What a kill leaves of a row is passed over, and spoils none that is written after it."""
    path = tmp_path / "replies.jsonl"
    for tail, ids in ((b'{"prompt_id": "b"}', ["a", "b"]), (b'{"prompt_id": "\xc3', ["a"]),
                      (b"", ["a"]), (b'{"prompt_id": "a", "n": 2}\n', ["a"])):
        path.write_bytes(b'{"prompt_id": "a", "n": 1}\n' + tail)
        assert list(sd.read_replies(path)) == ids
        sd.append_jsonl(path, {"prompt_id": "c"})
        rows = sd.read_replies(path)
        assert list(rows) == [*ids, "c"]
        assert rows["a"]["n"] == 1 + tail.endswith(b"\n")   # the last one counts


def test_generate_file_limit(tmp_path):
    """As on a full disk: one line, all that is there is whole, and the same command goes on."""
    with ApiServer(reply=lambda prompt: random_words(prompt, 400)) as server:
        server.summary = tmp_path / "out/summary.json"
        fields = generate_fields(tmp_path, server, 30, concurrency=4, max_cost=1, price_in=1,
                                 price_out=1)
        shown = Fork(tmp_path / "log", *flags(**fields), limit=60_000).wait()
        assert "error: OSError: [Errno 27]" in shown, shown
        assert "Traceback" not in shown, shown
        answered = {row["messages"][0]["content"]: 1 for row in replies_of(tmp_path)}
        assert 5 < len(answered) < 30
        run_generate(fields)
        assert len(rows_of_run(tmp_path, "train")) == 30
        assert answered.items() <= server.tries.items()


def test_generate_other_settings(tmp_path):
    """What decides the rows is the same for all of a folder; where the server stands, how many are
    asked and how much may be spent is not of that kind."""
    with ApiServer() as server:
        run_generate(generate_fields(tmp_path, server, 2))
    with ApiServer() as server:   # at another port
        fields = generate_fields(tmp_path, server, 3)
        for name, value, there in (
            ("api_model", "other", "api_model 'm' there, 'other' here"),
            ("seed", 7, "seed 0 there, 7 here"),
            ("api_temperature", 0.5, "api_temperature None there, 0.5 here"),
            ("max_tokens", 301, "max_tokens 300 there, 301 here"),
        ):
            one_error(there, fields, **{name: value})
        assert not server.tries
        run_generate({**fields, "concurrency": 2, "price_in": 1, "price_out": 1, "max_cost": 1})
        assert server.tries.total() == 1
    assert len(rows_of_run(tmp_path, "train")) == 3


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_secrets(tmp_path, monkeypatch, provider):
    """The key, and the password of a proxy, stand in no file and no output, wherever in a reply or
    an error a server repeats it; no escape sequence reaches the terminal."""
    key = "sk-test-0123456789abcdef"
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:proxy-word@127.0.0.1:1")
    odd = {"choices": [{"message": {"content": key + TEXT["text"]}, "finish_reason": key}]}
    words = [json.dumps(f"\x1b[31m{key}").encode(), 400, json.dumps(odd).encode(),
             answer_of(provider, key + random_words("key"))]

    with ApiServer(lambda prompt, attempt: words[number_of(prompt) % 5 - 1]
                   if number_of(prompt) % 5 else None) as server:
        fields = generate_fields(tmp_path, server, 20, provider, concurrency=1)
        results = [run_generate(fields)]
        assert server.seen[0][1] == key
        server.fault = lambda prompt, attempt: 401
        results.append(one_error("401 for ***", fields, output_dir=tmp_path / "refused/out"))
    assert len(replies_of(tmp_path)) == 20
    monkeypatch.setenv("ALL_PROXY", "socks9://someone:proxy-word@127.0.0.1:1")
    left_over = []
    monkeypatch.setattr(sys, "unraisablehook", left_over.append)
    results.append(one_error("making a client", fields, output_dir=tmp_path / "proxy/out"))
    gc.collect()
    assert left_over == []   # no traceback of a client that was never whole
    shown = "".join(result.out + result.err for result in results)
    for path in tmp_path.glob("**/out/*"):
        shown += path.read_text()
    assert "***" in shown
    for secret in (key, "proxy-word", "\x1b[31m"):
        assert secret not in shown


@pytest.mark.parametrize("named, more", [
    *(("categories", dict(categories=item)) for item in ("poetry", "debug=0", "test=nan")),
    ("could not convert", dict(categories="test=x")),
    ("none.txt", dict(prompts_file="none.txt")),
    ("holds no prompt", dict(prompts_file=os.devnull)),
    ("Connection error", {}),
    ("--teacher", dict(provider="local", api_model=None, api_base=None)),
])
def test_generate_errors(tmp_path, named, more):
    """What no request would survive is one `error:` line."""
    fields = dict(mode="generate", api_model="m", output_dir=tmp_path / "out", num_examples=2,
                  api_base="http://127.0.0.1:9/v1")
    one_error(named, {**fields, **more})


# ---- a model of one's own


def local_run(out, model, questions=11, rc=0, **more):
    """-> {number of a question: (reply, usage, finish_reason)}"""
    prompts_file = Path(out).parent / "prompts.txt"
    prompts_file.write_text("".join(f"Question {i}: what?{'?' * i}\n" for i in range(questions)))
    fields = dict(mode="generate", provider="local", teacher=model, max_tokens=8,
                  prompts_file=prompts_file, output_dir=out)
    if rc:
        return one_error("", {**fields, **more}).err
    run_generate({**fields, **more})
    return {
        question_of(row): (row["messages"][1]["content"], row["usage"], row["finish_reason"])
        for row in replies_of(out.parent, out.name)}


def test_generate_local(tmp_path, teacher):
    """The same seed gives the same replies, whatever is beside them, after a stop, and with the
    weights on the host; another seed gives others; the end of a reply is told from a cut."""
    whole = local_run(tmp_path / "whole", teacher, seed=3, concurrency=4)
    assert len(set(reply for reply, *_ in whole.values())) > 5
    for number, (_, usage, finish_reason) in whole.items():
        assert usage["prompt_tokens"] == 1 + len(f"Question {number}: what?\n\n") + number
        if finish_reason == "length":
            assert usage["completion_tokens"] == 8
        assert finish_reason in ("stop", "length")
    parts = tmp_path / "parts"
    assert len(local_run(parts, teacher, questions=6, seed=3, concurrency=5, cpu_offload=True)) == 6
    assert local_run(parts, teacher, seed=3, concurrency=3) == whole
    assert local_run(tmp_path / "other", teacher, seed=4) != whole
    likeliest = [local_run(tmp_path / name, teacher, seed=seed, api_temperature=0)
                 for seed, name in enumerate("ab")]
    assert likeliest[0] == likeliest[1] != whole


def test_generate_local_temperature(tmp_path, teacher):
    """Unset, it is that of the model's generation_config.json."""
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    sharp = transformers.GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=0)
    sharp.save_pretrained(model)
    unset = local_run(tmp_path / "unset", model)
    assert unset == local_run(tmp_path / "half", teacher, api_temperature=0.5)
    assert unset != local_run(tmp_path / "one", teacher)


def gpt2(folder):
    return tiny_model(folder / "gpt2", cls="GPT2Config", max_position_embeddings=48)


def without_ends(folder):
    """No eos, no pad: a reply goes on to its last token."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.pad_token = None
    return tiny_model(folder / "endless", tokenizer=tokenizer, eos_token_id=None, pad_token_id=None)


def nan_weights(folder):
    path = tiny_model(folder / "nan")
    edit_weights(path, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    return path


def no_tokenizer(folder):
    return tiny_model(folder / "mute", tokenizer=False)


@pytest.mark.parametrize("make, named", [
    (gpt2, "49 positions"), (nan_weights, "nan"), (no_tokenizer, "no tokenizer")])
def test_generate_local_bad_models(tmp_path, make, named):
    """One line before anything is written; what fits into the positions is answered."""
    model = make(tmp_path)
    error = local_run(tmp_path / "out", model, questions=10, rc=2, max_tokens=20)
    assert named in error, error
    if make is gpt2:
        assert len(local_run(tmp_path / "out", model, questions=10, max_tokens=19)) == 10


def test_generate_local_without_an_end(tmp_path):
    replies = local_run(tmp_path / "out", without_ends(tmp_path), questions=2)
    assert [(usage["completion_tokens"], end) for _, usage, end in replies.values()] == [
        (8, "length")] * 2


def test_generate_then_train(tmp_path, student):
    """generate -> --dataset out/train.jsonl --alpha 1 -> final/"""
    with ApiServer() as server:
        run_generate(generate_fields(tmp_path, server, 60))
    cli(*flags(dataset=tmp_path / "out/train.jsonl", alpha=1, student=student, max_steps=4,
               eval_samples=4, seq_len=128, output_dir=tmp_path / "run"))
    assert (tmp_path / "run/final/model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# Optional: eval: how good is the student.


EVAL_VOCAB = 320   # of the teacher's tokenizer
QUICK = dict(generate_comparisons=False, dtype="fp32")


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    """data.jsonl with text in many scripts; teacher (with a padded head), student, wide (as wide as
    the teacher, another padded head) and stranger (with another tokenizer), all random; the runs
    run (a student of the teacher) and labels (a student of labels only)."""
    folder = tmp_path_factory.mktemp("eval")
    words = ("the quick brown fox jumps größer über 日本語 naïve 🙂 wizards boil strange soup "
             "in green pots and sleep").split()
    pick = np.random.default_rng(0)
    texts = [" ".join(pick.choice(words, pick.integers(5, 60))) + "." for _ in range(300)]
    write_jsonl(folder / "data.jsonl", [{"text": text} for text in texts])
    tokenizer = trained_tokenizer(texts, EVAL_VOCAB)
    eval_model(folder / "teacher", tokenizer, 0, hidden=32, layers=4, vocab=EVAL_VOCAB + 7)
    eval_model(folder / "student", tokenizer, 1)
    eval_model(folder / "wide", tokenizer, 2, hidden=32, vocab=EVAL_VOCAB + 3)
    eval_model(folder / "stranger", trained_tokenizer(texts[::3], 290), 3)

    training = dict(
        student=folder / "student", dataset=folder / "data.jsonl", seq_len=48, batch_size=3,
        max_steps=12, save_steps=6, eval_steps=4, learning_rate=3e-3)
    distil(folder / "run", teacher=folder / "teacher", **training)
    distil(folder / "labels", alpha=1, **training)
    return folder


def trained_tokenizer(texts, vocab):
    """A token may end within a character, as with real ones."""
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def eval_model(path, tokenizer, seed, hidden=16, layers=2, vocab=None):
    """So loud that its predictions, and those of another seed, are far from even and from alike."""
    tiny_model(
        path, vocab or len(tokenizer), hidden, layers, seed, tokenizer=tokenizer,
        num_attention_heads=4, bos_token_id=None, tie_word_embeddings=True, initializer_range=0.6)


def report_fields(folder, out, student, **more):
    fields = dict(
        mode="eval", teacher=folder / "teacher", student=folder / student,
        output_dir=folder / out, dataset=folder / "data.jsonl", seq_len=48, batch_size=3)
    return fields | more


def run_report(folder, out, student, **more):
    """-> report.json"""
    cli(*flags(**report_fields(folder, out, student, **more)))
    return json.loads((folder / out / "report.json").read_text())


def compared_models(folder):
    return [folder / "labels/final", folder / "wide", folder / "stranger"]


@pytest.fixture(scope="module")
def full_report(eval_folder):
    """report.json about all models, at temperature 2; seven tokens are scored at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "LOGITS_BUDGET", 7 * 24 * EVAL_VOCAB)
        return run_report(eval_folder, "found", "run/final", temperature=2,
                          compare=compared_models(eval_folder))


# ---- the same figures by hand


def held_out_rows(folder):
    """Cut here once more by hand: every 20th text, joined with EOS, blocks of 48."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    ids = []
    for row in read_lines(folder / "data.jsonl")[19::20]:
        ids += tokenizer(row["text"])["input_ids"] + [0]
    blocks = [ids[i:i + 48] for i in range(0, len(ids), 48)]
    return [block for block in blocks if len(block) > 1]


def logits_by_hand(model, rows):
    """[tokens, vocabulary without padding], of all but the first of each row, and their labels"""
    with torch.no_grad():
        logits = [model(torch.tensor(row)[None]).logits[0, :-1, :EVAL_VOCAB] for row in rows]
    return torch.cat(logits), torch.cat([torch.tensor(row[1:]) for row in rows])


def nats_of_rows(model, rows):
    losses = [F.cross_entropy(*logits_by_hand(model, [row]), reduction="sum") for row in rows]
    return torch.stack(losses).numpy()


def reference_figures(model, teacher, rows):
    """Full logits in float64; KL at temperature 2, times its square."""
    logits, labels = logits_by_hand(model, rows)
    teacher_logits, _ = logits_by_hand(teacher, rows)
    confidence, top = logits.softmax(-1).max(-1)
    right = (top == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = bins.bincount(right - confidence)   # of the calibration, weighted by tokens
    kl = kl_sum((teacher_logits / 2).log_softmax(-1), (logits / 2).log_softmax(-1))
    return dict(
        tokens=len(labels), accuracy=right.mean().item(),
        agreement=(top == teacher_logits.argmax(-1)).double().mean().item(),
        kl=4 * kl.item() / len(labels), ece=gaps.abs().sum().item() / len(labels))


def states_by_layer(path, rows):
    """-> [tokens, width] after each layer, of every token but the last of a row"""
    model = load(path).double()
    with torch.no_grad():
        outputs = [model(torch.tensor(row)[None], output_hidden_states=True) for row in rows]
    by_row = [[states[0, :-1] for states in output.hidden_states[1:]] for output in outputs]
    return [torch.cat(layer) for layer in zip(*by_row)]


# ---- figures


@pytest.mark.parametrize("label, name", [
    ("student", "run/final"), ("labels", "labels/final"), ("wide", "wide"), ("teacher", "teacher"),
])
def test_eval_numbers_equal_full_float64_logits(eval_folder, full_report, label, name):
    rows = held_out_rows(eval_folder)
    model, teacher, student = [
        load(eval_folder / path).double() for path in (name, "teacher", "run/final")]
    figures = full_report["models"][label]
    for key, value in reference_figures(model, teacher, rows).items():
        assert figures[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    tokenizer = transformers.AutoTokenizer.from_pretrained(eval_folder / "teacher")
    tokens = np.array([len(row) - 1 for row in rows])
    sizes = np.array([
        len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows])
    nats = nats_of_rows(model, rows)
    bits = nats / math.log(2)
    lead = nats_of_rows(student, rows) / math.log(2) - bits
    against = figures["student_against_it"]
    low, high = against["interval"]
    for found, expected in (
        (np.log([figures["perplexity"], *figures["perplexity_95"]]), sd.interval(nats, tokens, 0)),
        ([figures["bits"], *figures["bits_95"]], sd.interval(bits, sizes, 0)),
        ([against["difference"], low, high], sd.interval(lead, sizes, 0)),
    ):
        assert list(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (against["verdict"] == "better") == (high < 0)


def test_eval_teacher_against_itself_and_a_worse_student(eval_folder):
    models = run_report(eval_folder, "self", "teacher", compare=eval_folder / "run/final",
                        **QUICK)["models"]
    assert models["student"]["kl"] == 0
    assert models["student"]["agreement"] == 1
    assert models["student"]["perplexity"] == models["teacher"]["perplexity"]
    assert models["teacher"]["student_against_it"] == {
        "difference": 0, "interval": [0, 0], "verdict": "no significant difference"}
    assert models["run"]["student_against_it"]["verdict"] == "worse"
    assert [layer["teacher"] for layer in models["student"]["layers"]] == [1, 2, 3, 4]
    for layer in models["student"]["layers"]:
        assert layer["cka"] == pytest.approx(1, abs=1e-9)
        assert layer["share"] < 1e-12


def test_eval_layers_equal_a_direct_computation(eval_folder, full_report):
    """CKA; the share that the best affine map leaves, without the tokens that it explains."""
    rows = held_out_rows(eval_folder)
    teacher_states = states_by_layer(eval_folder / "teacher", rows)
    states = states_by_layer(eval_folder / "run/final", rows)
    layers = full_report["models"]["student"]["layers"]
    assert [(layer["student"], layer["teacher"]) for layer in layers] == [(1, 2), (2, 4)]
    for layer, x, y in zip(layers, states, teacher_states[1::2], strict=True):
        with_ones = torch.cat([x, torch.ones(len(x), 1)], 1)
        missed = y - with_ones @ torch.linalg.lstsq(with_ones, y).solution
        x = x - x.mean(0)
        y = y - y.mean(0)
        share = missed.square().sum() / (len(x) - x.shape[1] - 1) / y.square().sum() * len(x)
        assert layer["share"] == pytest.approx(share.item(), rel=1e-4)
        cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
        assert layer["cka"] == pytest.approx(cka.item(), rel=1e-4)
    few = torch.randn(9, 8)   # a map of 8 rows and a bias explains 9 tokens, whatever they are
    assert sd.compare_states(few, few)[0] is None
    assert sd.compare_states(few[:, :7], few)[0] > 0


@pytest.mark.parametrize("own_bos, other_bos", [(True, False), (False, True)])
def test_eval_each_model_has_the_bos_of_its_own_tokenizer(tmp_path, own_bos, other_bos):
    tokenizer = tiny_tokenizer(bos=own_bos)
    tiny_tokenizer(bos=other_bos).save_pretrained(tmp_path / "other")
    ids = np.array([1 if own_bos else 5, *tokenizer(prose(20))["input_ids"][own_bos:]])
    rows = [{"input_ids": ids, "targets": np.arange(len(ids)) > 0}]
    (row,), _ = sd.rows_for(sd.Config(), str(tmp_path / "other"), tokenizer, rows)
    assert row["input_ids"].tolist() == [1 if other_bos else 0, *ids[1:]]
    assert row["targets"].tolist() == [False] + [True] * (len(ids) - 1)
    same_rows, same = sd.rows_for(sd.Config(), str(tmp_path / "none.json"), tokenizer, rows)
    assert same_rows is rows and same is tokenizer


def test_eval_bits_of_two_tokenizers_are_of_the_same_bytes(eval_folder, full_report):
    tokenizer = transformers.AutoTokenizer.from_pretrained(eval_folder / "teacher")
    rows = held_out_rows(eval_folder)
    token_rows = [{"input_ids": np.array(row), "targets": np.arange(len(row)) > 0} for row in rows]
    path = eval_folder / "stranger"
    other_rows, other = sd.rows_for(sd.Config(), str(path), tokenizer, token_rows)
    other_rows = [row["input_ids"].tolist() for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        assert other.decode(other_row[1:]) == tokenizer.decode(row[1:])
        assert other_row[1:].count(0) == row[1:].count(0)
    nats = nats_of_rows(load(path).double(), other_rows)
    bits = nats.sum() / math.log(2) / full_report["setting"]["bytes"]
    figures = full_report["models"]["stranger"]
    assert figures["bits"] == pytest.approx(bits, rel=1e-5)
    assert figures["kl"] is figures["agreement"] is None
    assert figures["layers"] == []


def test_eval_intervals_cover():
    """95 % of the intervals hold the true mean, as far as 200 trials can tell."""
    n = 12
    draw = torch.Generator().manual_seed(n)
    covered = 0
    for trial in range(200):
        # sequences of many lengths, skewed losses that hang together within one
        lengths = torch.randint(20, 60, (n,), generator=draw).double()
        noise = 0.4 * torch.randn(n, generator=draw, dtype=torch.float64)
        sums = lengths * 2 * (noise - 0.08).exp()   # 0.08: the mean of exp stays 1
        _, low, high = sd.interval(sums.numpy(), lengths.numpy(), trial)
        covered += low <= 2 <= high
    assert 180 <= covered <= 198


def test_eval_continuations(eval_folder, full_report):
    """Greedy, then sampled, after the beginnings of three rows; within the length of a row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(eval_folder / "teacher")
    rows = held_out_rows(eval_folder)
    third = math.ceil(len(rows) / 3)
    model = load(eval_folder / "run/final")
    shown = (eval_folder / "found/report.md").read_text()
    for row, prompt, texts in zip(rows[::third], full_report["prompts"],
                                  full_report["models"]["student"]["texts"], strict=True):
        assert prompt == tokenizer.decode(row[:32])
        ids = torch.tensor(row[:32])[None]
        new = model.generate(ids, do_sample=False, max_new_tokens=17)[0, 32:]
        assert texts[0] == tokenizer.decode(new).split("<|end|>")[0] != texts[1]
        assert f"    {prompt!r}\n" in shown and f"    student: {texts[1]!r}\n" in shown
    chat_row = {"input_ids": np.arange(60), "targets": np.arange(60) > 39}
    assert sd.beginnings([chat_row]) == [list(range(40))]


# ---- files


def test_eval_report_files(eval_folder, full_report):
    """report.md shows the figures of report.json; report.png has the third model's colour in each
    of its four panels."""
    models = full_report["models"]
    text = (eval_folder / "found/report.md").read_text()
    _, _, *lines = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    cells = {title.strip(): row for title, *row in lines}
    for key, title in sd.METRICS.items():
        for figures, cell in zip(models.values(), cells[title], strict=True):
            shown = cell.replace(", ", " ").split()[0].replace(",", "")
            value = figures[key]
            assert shown == "-" if value is None else float(shown) == pytest.approx(value, rel=6e-4)
    ratio = models["student"]["bits"] / models["teacher"]["bits"]
    assert f"), {ratio:.4g} x" in cells["bits a byte"][1]
    against = models["wide"]["student_against_it"]
    low, high = against["interval"]
    assert (f"wide: {against['difference']:+.4f} bits a byte ({low:+.4f} to {high:+.4f}): "
            f"{against['verdict']}\n") in text
    for key, points in {"train/ce_loss": 12, "train/kl_loss": 12, "eval/ce_loss": 3}.items():
        assert len(models["student"]["curves"][key]) == points

    from matplotlib import image
    pixels = image.imread(eval_folder / "found/report.png")[..., :3]
    orange = np.abs(pixels - np.array([0xd5, 0x5e, 0x00]) / 255).max(-1) < 0.05
    for half in np.array_split(orange, 2):
        for panel in np.array_split(half, 2, axis=1):
            assert panel.sum() > 100


def test_eval_what_cannot_be_written_is_one_error_and_the_picture_comes_last(
        eval_folder, monkeypatch):
    out = eval_folder / "unwritable"
    (out / "report.png").mkdir(parents=True)
    fields = report_fields(eval_folder, out, "run/final", **QUICK)
    assert "no .simple_distill" in cli(*flags(**fields), rc=2).err   # nobody's file is replaced
    (out / ".simple_distill").touch()
    assert "report.png" in cli(*flags(**fields), rc=2).err
    assert {"report.md", "report.json"} <= {*os.listdir(out)}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in cli(*flags(**fields)).out


# ---- what may be reported on


def test_eval_takes_a_checkpoint_of_a_run_and_leaves_its_folder_as_it_is(eval_folder):
    """The last checkpoint is final/; an earlier one is another model; a broken one is refused."""
    before = (eval_folder / "run/config.json").read_text()
    final = eval_folder / "run/final"
    perplexities = []
    for step in (6, 12):
        models = run_report(eval_folder, "run", f"run/checkpoints/step-{step:08d}", compare=final,
                            **QUICK)["models"]
        perplexities.append(models["student"]["perplexity"])
    final_perplexity = pytest.approx(models["run"]["perplexity"], rel=1e-5)
    assert [perplexity == final_perplexity for perplexity in perplexities] == [False, True]
    assert models["student"]["disk"] == 4 * models["run"]["parameters"]   # its files hold more
    assert models["run"]["disk"] == os.path.getsize(final / "model.safetensors")
    assert len(models["student"]["curves"]["train/loss"]) == 12
    assert (eval_folder / "run/config.json").read_text() == before

    broken = eval_folder / "broken/step-00000099"
    shutil.copytree(eval_folder / "run/checkpoints/step-00000012", broken)
    state = json.loads((broken / "state.json").read_text())
    state["config"]["unheard_of"] = 1
    del state["digest"]
    for content in (json.dumps(state | {"digest": sd.digest(state)}), "{"):
        (broken / "state.json").write_text(content)
        cli(*flags(**report_fields(eval_folder, "refused", broken)), rc=2)


def test_eval_same_numbers_on_two_ranks(eval_folder, full_report):
    fields = report_fields(
        eval_folder, "two", "run/final", compare=compared_models(eval_folder), temperature=2,
        **QUICK)
    process = spawn(*flags(**fields), nproc=2)
    out, _ = process.communicate()
    assert process.returncode == 0, out[-2000:]
    models = json.loads((eval_folder / "two/report.json").read_text())["models"]
    for label, expected in full_report["models"].items():
        figures = models[label]
        for key in ("tokens", "perplexity", "bits", "accuracy", "agreement", "kl", "ece",
                    "parameters", "disk"):
            near = expected[key] and pytest.approx(expected[key], rel=1e-5)
            assert figures[key] == near, (label, key)
        for layer, expected_layer in zip(figures["layers"], expected["layers"], strict=True):
            assert layer == pytest.approx(expected_layer, rel=1e-4)
        assert figures["texts"] == expected["texts"]


def test_eval_refusals(eval_folder, tmp_path):
    """Each names what is wrong: a student that is no model, damaged weights, a damaged log, prompts
    that another tokenizer would count, a held-out part of one row."""
    model = Path(shutil.copytree(eval_folder / "student", tmp_path / "model"))
    (tmp_path / "log.jsonl").write_text('{"train/loss": 1.5}\n')
    talks = write_jsonl(tmp_path / "talk.jsonl", talk(40))
    damaged = Path(shutil.copytree(eval_folder / "student", tmp_path / "of/damaged"))
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:len(content) // 2])
    for student, more, said in (
        ("nowhere", {}, "while looking for student "),
        ("data.jsonl", {}, "while looking for student "),
        (damaged, {}, f"while reading student {damaged}"),
        (model, {}, f"while reading student {model}: KeyError"),
        ("stranger", dict(dataset=talks), "plain text"),
        ("run/final", dict(eval_samples=1), "one held-out sequence"),
    ):
        fields = report_fields(eval_folder, tmp_path / "out", student, **more, **QUICK)
        assert said in cli(*flags(**fields), rc=2).err


def test_eval_of_a_split_by_name_is_of_its_first_eval_samples(eval_folder):
    """Also of train: eval_samples of it, as --help says, and no more; a batch is what there is."""
    report = run_report(eval_folder, "train", "run/final", eval_split="train", eval_samples=5,
                        batch_size=10**12, **QUICK)
    assert report["setting"]["sequences"] == 5
    assert report["prompts"] == []


# --------------------------------------------------------------------------------------------------
# Runs: killed anywhere, on many ranks, a week of every mode: as processes.

DROPOUT = dict(cls="GPT2Config", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
KILLED = {   # what the run is besides plain: (ranks, fields)
    "map": (1, {}),
    "stream": (1, dict(streaming=True, shuffle_buffer=7)),   # optional: streaming
    "accumulation 3": (1, dict(batch_size=2, gradient_accumulation_steps=3)),
    "dropout": (1, {}),
    "2 ranks": (2, dict(batch_size=2)),
    "documents": (1, dict(packing="documents", seq_len=128)),
    "on policy": (1, dict(on_policy=0.5, max_new_tokens=6)),   # optional: on_policy
}


def assert_same_run(out, other):
    assert same(final_weights(out), final_weights(other))
    assert quiet_log(out) == quiet_log(other)


def damage(newest, draw):
    """What a disk does to a checkpoint: a bit turned, a file lost, a file too many."""
    path = draw.choice(sorted(newest.iterdir()))
    how = draw.choice(["turn", "lose", "add"])
    if how == "turn":
        flip(path, draw.random())
    elif how == "lose":
        path.unlink()
    else:
        shutil.copy(path, newest / "stale.safetensors")


def saves_since(start, out):
    """How many checkpoints are newer than that."""
    count = 0
    for path in out.glob("checkpoints/step-*"):
        with contextlib.suppress(FileNotFoundError):   # deleted just now
            count += path.stat().st_mtime > start
    return count


@pytest.mark.parametrize("kills, damaged", [
    (2, False),
    pytest.param(12, False, marks=pytest.mark.campaign),
    pytest.param(12, True, marks=pytest.mark.campaign),
])
@pytest.mark.parametrize("kind", KILLED)
def test_runs_a_killed_run_ends_as_if_it_had_not_been(
        tmp_path, teacher, student, text, kind, kills, damaged):
    """Killed again and again, at random. damaged: each time the newest checkpoint of two is."""
    ranks, more = KILLED[kind]
    if kind == "dropout":
        student = tiny_model(tmp_path / "dropout", **DROPOUT)
    fields = dict(teacher=teacher, student=student, dataset=text, batch_size=4, max_steps=12,
                  save_steps=2, eval_steps=5, eval_samples=8, alpha=0.4, lr_scheduler="cosine")
    fields = dict(ranks=ranks) | fields | more
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    draw = random.Random(kills)
    assert "done in" in distil_apart(whole, **fields).wait()
    unfinished = 0
    for _ in range(kills):
        start = time.time()
        run = distil_apart(broken, **fields)
        saves = 2 if damaged else draw.randrange(3)
        while run.poll() is None and saves_since(start, broken) < saves:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        run.signal(signal.SIGKILL).wait()
        unfinished += not (broken / "final").is_dir()
        if damaged:
            damage(max(broken.glob("checkpoints/step-*")), draw)
    shown = distil_apart(broken, **fields).wait()
    assert unfinished or damaged, "no kill came before the end"
    assert damaged == ("passed over" in shown), shown
    assert_same_run(broken, whole)


# Rank 0 dies when it comes to the nth line of those that a save runs through: ours and torch's.
DIES = """
import sys
lines = set()

def watch(frame, event, value):
    if frame.f_code.co_filename.endswith({files}):
        lines.add((frame.f_code, frame.f_lineno))
        if len(lines) == {line} and RANK == 0:
            os.kill(os.getpid(), 9)
        return watch

def save_watched(*args, unwatched=save_checkpoint):
    sys.settrace(watch)
    try:
        return unwatched(*args)
    finally:
        sys.settrace(None)

save_checkpoint = save_watched
"""
OURS = ("simple_distill.py",)
TORCHS = ("checkpoint/hf_storage.py", "checkpoint/filesystem.py", *OURS)


@pytest.mark.parametrize("ranks, files, every", [
    (1, OURS, 6),
    pytest.param(1, TORCHS, 1, marks=pytest.mark.campaign),
    pytest.param(2, TORCHS, 5, marks=pytest.mark.campaign),
])
def test_runs_killed_at_every_line_of_a_save(tmp_path, teacher, student, text, ranks, files, every):
    """While files are written, between checksums, rename and the deletion of the one before; each
    run finds what the last one left. The other ranks end by themselves."""
    fields = dict(teacher=teacher, student=student, dataset=text, batch_size=2, save_steps=1,
                  keep_checkpoints=1, max_steps=300 // every, ranks=ranks)
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    for line in range(every, 999, every):
        shown = distil_apart(broken, **fields, change=DIES.format(files=files, line=line)).wait()
        assert (broken / "checkpoints").is_dir(), shown
        if "done in" in shown:
            break
    assert line > 20   # or it never died
    distil_apart(whole, **fields).wait()
    assert_same_run(broken, whole)


@pytest.mark.parametrize("world_sizes, packing", [
    ([2, 1, 2], {}),
    ([2, 1, 2], dict(packing="documents", seq_len=128)),
    ([4, 1, 3, 2], {}),
])
def test_runs_ranks_come_and_go(tmp_path, teacher, student, text, world_sizes, packing):
    """Another number of ranks goes on with the same global batches, optimiser state included."""
    fields = dict(teacher=teacher, student=student, dataset=text, batch_size=3, save_steps=2)
    fields |= packing
    straight = tmp_path / "straight"
    moved = tmp_path / "moved"
    for i, ranks in enumerate(world_sizes, 1):
        shown = distil_apart(moved, ranks, **fields, max_steps=2 * i).wait()
        assert (moved / f"checkpoints/step-{2 * i:08d}").is_dir(), shown
    distil_apart(straight, world_sizes[0], **fields, max_steps=2 * i).wait()
    assert_close(moved, straight, shown)
    refused = distil(moved, rc=2, **fields | dict(batch_size=5, max_steps=99))
    assert f"{3 * world_sizes[0]} sequences a step" in refused.err


def test_runs_a_second_process_on_a_folder_is_refused(out, student, text):
    fields = dict(student=student, dataset=text, alpha=1.0)
    first = distil_apart(out, **fields, max_steps=100_000)
    wait_for_log(out, first)
    assert "run alone" in distil(out, rc=2, **fields, max_steps=1).err
    assert "stopped at step" in first.signal(signal.SIGTERM).wait()
    step = log(out, "train")[-1]["train/step"]
    assert f"step-{step:08d}" in distil(out, **fields, max_steps=step + 1).out


FAILS_ALONE = """
if RANK == 1:
    def load_model(*args):
        raise ValueError("on this rank only")
"""


def test_runs_a_rank_that_fails_alone_is_the_one_that_speaks(out, teacher, student, text):
    run = distil_apart(out, 3, FAILS_ALONE, teacher=teacher, student=student, dataset=text)
    shown = run.wait(seconds=60)
    assert shown.count("error: ") == 1 and "Traceback" not in shown, shown
    assert "ValueError: on this rank only" in shown


@pytest.mark.parametrize("number, stream", [
    (signal.SIGTERM, {"streaming": True, "shuffle_buffer": 7}),   # optional: streaming
    (signal.SIGINT, {}),
    (signal.SIGHUP, {}),
])
def test_runs_a_signal_saves_and_exits_0(tmp_path, teacher, student, text, number, stream):
    """Though the terminal has gone; the same command goes on with the next batch."""
    fields = dict(PLAIN, teacher=teacher, student=student, dataset=text, **stream)
    stopped_run = tmp_path / "run"
    terminal, inside = pty.openpty()
    process = spawn(*flags(**fields, max_steps=100_000, output_dir=stopped_run), stdout=inside,
                    stderr=inside)
    os.close(inside)
    wait_for_log(stopped_run, process)
    os.close(terminal)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    stopped = log(stopped_run, "train")[-1]["train/step"]
    assert (stopped_run / f"checkpoints/step-{stopped:08d}").is_dir()
    for out in (stopped_run, tmp_path / "whole"):
        cli(*flags(**fields, max_steps=stopped + 3, output_dir=out))
    assert same(final_weights(stopped_run), final_weights(tmp_path / "whole"))


# ---- many ranks, as processes over gloo


def assert_close(out, other, shown):
    assert os.path.isdir(f"{out}/final"), shown
    losses = zip(column(out, "train/loss"), column(other, "train/loss"), strict=True)
    for loss, other_loss in losses:
        assert abs(loss - other_loss) <= 1e-5 * abs(other_loss)
    assert distance(final_weights(out), final_weights(other)) < 1e-5


FAMILIES = {
    "llama": {},
    "qwen3 moe": dict(cls="Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=16, head_dim=8),
    "gemma2": dict(cls="Gemma2Config", head_dim=8, final_logit_softcapping=5.0,
                   query_pre_attn_scalar=8),
    "gpt2": dict(cls="GPT2Config", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}


@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"])
@pytest.mark.parametrize("family, shard_teacher", [
    ("llama", True),
    ("llama", False),
    ("qwen3 moe", True),
    pytest.param("gemma2", True, marks=pytest.mark.campaign),
    pytest.param("gpt2", True, marks=pytest.mark.campaign),
])
def test_runs_two_ranks_are_one(tmp_path, chat, family, shard_teacher, fsdp):
    shape = dict(hidden=16, **FAMILIES[family])
    fields = dict(
        teacher=tiny_model(tmp_path / "teacher", layers=3, seed=1, **shape),
        student=tiny_model(tmp_path / "student", seed=2, **shape),
        dataset=chat, max_steps=3, alpha=0.3, temperature=2.0)
    one = tmp_path / "one"
    two = tmp_path / "two"
    distil(one, **fields, batch_size=8)
    fields |= dict(batch_size=2, gradient_accumulation_steps=2, fsdp=fsdp)
    shown = distil_apart(two, 2, **fields, shard_teacher=shard_teacher).wait()
    assert_close(two, one, shown)
    load(two / "final")


LOADING = """
import resource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def main(args):
    with process_group():
        load_model(Config(student={first!r}), "student")   # imports the model's code
        before = peak()
        root, _ = load_model(Config(student={wide!r}), "student")
        whole = 4 * root.model.num_parameters()
        shard = sum(4 * p.to_local().numel() for p in root.parameters())
        print("RANK", RANK, (peak() - before - shard) / whole, flush=True)
    return 0
"""


def test_runs_loading_costs_other_ranks_their_shard_only(tmp_path):
    wide = tiny_model(tmp_path / "wide", hidden=512, layers=16, intermediate_size=1536)
    change = LOADING.format(first=tiny_model(tmp_path / "first"), wide=wide)
    shown = Fork(tmp_path / "log.txt", ranks=2, change=change).wait()
    extra = dict(re.findall(r"RANK (\d) (\S+)", shown))
    assert float(extra["1"]) < 0.2, shown


@pytest.mark.parametrize("nodes, processes", [(1, 2), (2, 1)])
def test_runs_launcher_is_one_process(tmp_path, teacher, student, chat, nodes, processes):
    fields = dict(teacher=teacher, student=student, dataset=chat, max_steps=4, alpha=0.3)
    distil(tmp_path / "one", **fields, batch_size=8)
    words = flags(**PLAIN, **fields, output_dir=tmp_path / "two", batch_size=4)
    env = {"NNODES": str(nodes), "NPROC": str(processes), "MASTER_PORT": str(free_port())}
    launched = [spawn(*words, nproc=2, env={**env, "NODE_RANK": str(rank)})
                for rank in range(nodes)]
    shown = [process.communicate(timeout=180)[0] for process in launched]
    assert {process.returncode for process in launched} == {0}, shown
    assert_close(tmp_path / "two", tmp_path / "one", shown)
    assert "".join(shown).count("done in") == 1   # only rank 0 prints


def test_runs_a_rank_that_dies_takes_the_job_down(out, student, text):
    words = flags(**PLAIN, student=student, dataset=text, alpha=1.0, batch_size=4, output_dir=out,
                  max_steps=100_000)
    process = spawn(*words, nproc=2)
    wait_for_log(out, process)
    workers = pids_of(f"simple_distill.py.*{out}")
    rank_1, = [pid for pid in workers if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(int(rank_1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


def pids_of(pattern):
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return found.stdout.split()


def test_runs_launcher_explains_itself():
    shown = subprocess.run([HERE / "launch.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "NNODES" in shown.stdout and "--learning_rate" in shown.stdout


def test_runs_launcher_passes_a_users_mistake_on(tmp_path):
    """Two ranks make it, one line says it, the exit code is that of one process."""
    words = flags(alpha=1, dataset="/nowhere.jsonl", student="/nowhere",
                  output_dir=tmp_path / "out")
    process = spawn(*words, nproc=2, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.count("error: ") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("name, value", [("NPROC", "0"), ("NPROC", "abc"), ("NODE_RANK", "1")])
def test_runs_launcher_names_a_wrong_number(name, value):
    shown = subprocess.run([HERE / "launch.sh"], capture_output=True, text=True,
                           env={**os.environ, "NPROC": "1", name: value})
    assert shown.returncode == 2
    assert re.match(rf"error: .*{name} (is )?{value}\b", shown.stderr)


def test_runs_launcher_that_waits_for_a_node_hears_a_signal(tmp_path):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": str(free_port())}
    process = spawn("--output_dir", tmp_path / "out", nproc=2, env=env)
    assert "waits for all nodes" in process.stdout.readline()
    while not pids_of(f"node-rank=0 .*{tmp_path}"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert not pids_of(str(tmp_path))


# As a shell: it hears that its terminal was closed, tells its jobs, and here sees how they end.
SESSION = """
import os, signal, subprocess, sys

def hang_up(number, frame):
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, number)

signal.signal(signal.SIGHUP, hang_up)
signal.signal(signal.SIGINT, lambda *_: None)
process = subprocess.Popen(sys.argv[2:])
with open(sys.argv[1], "w") as f:
    print(process.wait(), file=f)
"""


@pytest.mark.parametrize("program", ["simple_distill.py", "launch.sh"])
@pytest.mark.parametrize("closes", [False, True], ids=["ctrl-c", "closed"])
def test_runs_a_terminal_that_stops_a_run(tmp_path, student, text, program, closes):
    """Ctrl-C reaches all of its processes at once; a closed one takes its readers along."""
    out = tmp_path / "run"
    words = flags(**{**PLAIN, "student": student, "dataset": text, "alpha": 1.0, "batch_size": 2,
                     "output_dir": out, "max_steps": 100_000})
    terminal, other_end = pty.openpty()
    command = [HERE / program, *words_of(words)]
    if program.endswith(".py"):
        command.insert(0, sys.executable)
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", SESSION, tmp_path / "code", *command],
        stdin=other_end, stdout=other_end, stderr=other_end, env={**os.environ, "NPROC": "2"})
    os.close(other_end)

    def read_on():
        if select.select([terminal], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):   # nobody is there to write any more
                os.read(terminal, 65536)

    while not (os.path.exists(f"{out}/log.jsonl") and log(out, "train")):
        assert process.poll() is None
        read_on()
    if closes:
        os.close(terminal)
        process.wait(timeout=120)
    else:
        os.write(terminal, b"\x03")
    while process.poll() is None:
        read_on()
    assert (tmp_path / "code").read_text() == "0\n"
    stopped = log(out, "train")[-1]["train/step"]
    assert Path(out, "checkpoints", f"step-{stopped:08d}").is_dir()
    assert not pids_of(str(out))


# ---- code that nobody allowed


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plant_code(folder, marks):
    """Config and tokenizer of a model get code of their own, which leaves a mark."""
    bases = {"configuration": ("EvilConfig", "LlamaConfig"),
             "modeling": ("EvilModel", "LlamaForCausalLM"),
             "tokenization": ("EvilTokenizer", "PreTrainedTokenizerFast")}
    for file, (name, base) in bases.items():
        (folder / f"{file}_evil.py").write_text(
            f"open({str(marks / file)!r}, 'w')\nfrom transformers import {base}\n"
            f"class {name}({base}):\n    model_type = 'evil'\n")
    edit_json(folder / "config.json", model_type="evil", auto_map={
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel"})
    edit_json(folder / "tokenizer_config.json", **EVIL_TOKENIZER)


EVIL_TOKENIZER = dict(tokenizer_class="EvilTokenizer",
                      auto_map={"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]})


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """A folder in which code that ran leaves a file."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))   # nobody asks, nobody is answered
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def evil(tmp_path, student, marks):
    """A model that brings code of its own."""
    shutil.copytree(student, tmp_path / "evil")
    plant_code(tmp_path / "evil", marks)
    return tmp_path / "evil"


def test_runs_no_code_that_nobody_allowed(tmp_path, student, text, marks, evil):
    """Files of strangers that carry code, in each place where one may stand, under every mode."""
    run = dict(PLAIN, student=student, dataset=text, max_steps=1, alpha=1.0)
    pickled = Path(shutil.copytree(student, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(marks / "bin")}, pickled / "pytorch_model.bin")
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"open({str(marks / 'script')!r}, 'w')\n")
    yaml_file = tmp_path / "run.yaml"
    yaml_file.write_text(
        f"student: !!python/object/apply:builtins.open [{str(marks / 'yaml')!r}, w]\n")
    # a run of a stranger, which says of itself that its student's code may run
    obeyed = tmp_path / "obeyed"
    cli(*flags(**run, output_dir=obeyed))
    edit_json(obeyed / "config.json", trust_remote_code=True, student=str(evil),
              tokenizer=str(evil))
    judged = dict(   # optional: eval
        mode="eval", student=student, tokenizer=student, dataset=text)
    commands = [
        run | dict(student=evil),
        run | dict(tokenizer=evil),
        run | dict(teacher=evil, alpha=0.5),
        run | dict(student=pickled),
        run | dict(dataset=script),
        dict(config=yaml_file),
        dict(student=student, teacher=evil, blockwise=True, dataset=text),   # optional: blockwise
        dict(mode="cache", teacher=evil, cache_dir=tmp_path / "c",   # optional: cache
             dataset=text),
        dict(mode="generate", provider="local", teacher=evil,   # optional: generate
             num_examples=1),
        judged | dict(student=evil),   # optional: eval
        judged | dict(compare=[evil]),   # optional: eval
        judged | dict(   # optional: eval
            student=obeyed / "checkpoints" / "step-00000001"),
    ]
    for i, command in enumerate(commands):
        result = cli(*flags(**command, output_dir=tmp_path / f"out{i}"), rc=2)
        assert not os.listdir(marks), (command, result)
        if str(evil) in str(command):
            assert "trust_remote_code" in result.err, result.err


def test_runs_a_caches_tokenizer_runs_no_code(   # optional: cache
        tmp_path, student, text, marks, evil):
    cache = tmp_path / "cache"
    cli(*flags(mode="cache", teacher=student, dataset=text, cache_dir=cache, seq_len=32))
    for path in list(cache.rglob("tokenizer_config.json")):
        shutil.copy(evil / "tokenization_evil.py", path.parent)
        edit_json(path, **EVIL_TOKENIZER)
    cli(*flags(student=student, cache_dir=cache, max_steps=1, output_dir=tmp_path / "out"), rc=2)
    assert not os.listdir(marks)


# ---- fuzz: whatever a user brings, there is an answer. Each case draws one thing and breaks it.

ODD = ["", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 5000, "0x10", "1.5", "true", "null",
       "[]", "{}", "[1", "a\0b", "\x1b[31m", "größe", "\ud800", "/", "/dev/null", "/nowhere/x", "~",
       "..", "--", "-x", "%s", "a b", "=", "*", "(", "$(id)", "x" * 4000, "layers:", "layers:-1",
       "layers:99", "demo ", "https://h/", "http://[", "1,2", "a=b=c", "(=1", ".*=x"]
ODD_JSON = [None, True, -1, 0, 1.5, 1e308, 10**30, "", "x", "\0", "nan", [], {}, [None], {"a": 1},
            [[1]], "x" * 4000]


def break_json(value, draw):
    """A copy with one entry, at any depth, replaced, left out or renamed."""
    if not value or not isinstance(value, (dict, list)):
        return draw.choice(ODD_JSON)
    broken = value.copy()
    key = draw.choice(list(broken) if isinstance(broken, dict) else range(len(broken)))
    how = draw.random()
    if how < 0.6:
        broken[key] = break_json(broken[key], draw)
    elif how < 0.8:
        broken[key] = draw.choice(ODD_JSON)
    elif how < 0.9 or isinstance(broken, list):
        del broken[key]
    else:
        broken[f"{key} "] = broken.pop(key)
    return broken


def break_bytes(content, draw):
    """Cut, with a byte changed, or with something in its middle."""
    at = draw.randrange(len(content) + 1)
    return draw.choice([
        content[:at],
        content[:at] + bytes([draw.randrange(256)]) + content[at + 1:],
        content[:at] + draw.choice([b"\0", b"\xff\xfe", b"{", b'"', b"\n", b"]"]) + content[at:],
        draw.choice([b"", b"\0" * 100, b"[]", b"{}", b"null", b"\xef\xbb\xbf" + content]),
    ])


def break_file(path, draw):
    """As json where it is json, half of the time; else as bytes."""
    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl") or not content or draw.random() < 0.4:
        path.write_bytes(break_bytes(content, draw))
        return
    lines = [content] if path.suffix == ".json" else content.splitlines()
    i = draw.randrange(len(lines))
    lines[i] = json.dumps(break_json(json.loads(lines[i]), draw)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def files_below(*folders):
    return {path: path.read_bytes()
            for folder in folders for path in folder.rglob("*") if path.is_file()}


class Fuzz:
    """Good things in a folder, of which each case breaks a copy: case_x(folder, draw) -> flags of
    a run into folder/out; what is of the user lies in folder/user."""

    def __init__(self, folder, student, text):
        self.folder = folder
        self.student = student
        self.good = folder / "good"
        self.good.mkdir()
        self.text = self.good / "text.jsonl"
        shutil.copy(text, self.text)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "river one"}]
        rows = [{"messages": turns * (1 + i // 6)} for i in range(12)]
        write_jsonl(self.good / "chat.jsonl", rows)
        self.train = dict(PLAIN, student=student, dataset=self.text, alpha=1.0, max_steps=1)
        self.cache = dict(mode="cache", teacher=student, dataset=self.text, seq_len=32,
                          cache_chunk=16)
        self.generate = dict(mode="generate", provider="local", teacher=student, num_examples=2,
                             max_tokens=4)

    def copy_broken(self, name, to, draw, **fields):
        """A copy of what a good run has left, one file of it broken."""
        if not (self.folder / name).exists():
            cli(*flags(**fields))
        shutil.copytree(self.folder / name, to)
        break_file(draw.choice(sorted(path for path in to.rglob("*") if path.is_file())), draw)

    def case_flags(self, case, draw):
        modes = {
            "train": dict(student=self.student, dataset=self.text, alpha=1, max_steps=1),
            "cache": self.cache | dict(cache_dir=case / "cache"),   # optional: cache
            "generate": self.generate,   # optional: generate
            "eval": dict(mode="eval", student=self.student,   # optional: eval
                         dataset=self.text, eval_samples=1),
        }
        mode = modes[draw.choice(["train", *modes])]
        skipped = {"output_dir", "max_steps", "cpu_offload", "mode", "config", *mode}
        name = draw.choice([name for name in config.FIELDS if name not in skipped])
        return mode | {name: draw.choice(ODD)}

    def case_file(self, case, draw):
        good = {"alpha": 1.0, "student": self.student, "dataset": str(self.text),
                "max_steps": 1, "lr_multipliers": ["norm=0.5"], "seq_len": 32, "use_wandb": False}
        path = case / "user" / f"run.{draw.choice(['json', 'yaml'])}"
        path.write_text(json.dumps(good))   # which is yaml too
        break_file(path, draw)
        if draw.random() < 0.2:
            path.write_bytes(b"student: " + draw.choice(ODD).encode(errors="ignore"))
        return dict(config=path, student=self.student, dataset=self.text, max_steps=1, alpha=1)

    def case_rows(self, case, draw):
        path = case / "user" / draw.choice(["text.jsonl", "chat.jsonl"])
        shutil.copy(self.good / path.name, path)
        for _ in range(draw.randrange(1, 4)):
            with contextlib.suppress(ValueError):   # broken beyond that already
                break_file(path, draw)
        if draw.random() < 0.15:
            path = path.rename(
                path.parent / draw.choice(["a.csv", "a.parquet", "a.json", "a.txt"]))
        more = {}
        more = draw.choice([{}, {"streaming": True}])   # optional: streaming
        return self.train | dict(dataset=path) | more

    def case_model(self, case, draw):
        model = case / "user" / "model"
        shutil.copytree(self.student, model)
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
                 "num_attention_heads", "num_key_value_heads", "head_dim")
        path = model / draw.choice([
            "config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
            "model.safetensors", "generation_config.json"])
        if path.name == "config.json" and draw.random() < 0.5:
            size = draw.choice([0, -1, 3, None, "8", 1.5, [], {}, True])
            edit_json(path, **{draw.choice(sizes): size})
        else:
            break_file(path, draw)
        if draw.random() < 0.1:
            path.unlink()
        return self.train | draw.choice([dict(student=model), dict(teacher=model, alpha=0.5)])

    def case_output(self, case, draw):
        """What an earlier run left; without its mark it is a folder of the user's."""
        fields = self.train | dict(max_steps=2, save_steps=1)
        self.copy_broken("finished", case / "out", draw, output_dir=self.folder / "finished",
                         **fields)
        if draw.random() < 0.2:
            (case / "out" / sd.MARK).unlink(missing_ok=True)
        return self.train | dict(max_steps=3)

    def case_cache(self, case, draw):   # optional: cache
        self.copy_broken("cache", case / "cache", draw, cache_dir=self.folder / "cache",
                         **self.cache)
        if draw.random() < 0.3:
            return self.cache | dict(cache_dir=case / "cache")
        return self.train | dict(cache_dir=case / "cache", dataset=None, alpha=0.5, seq_len=None)

    def case_leftovers(self, case, draw):   # optional: generate
        self.copy_broken("generated", case / "out", draw, output_dir=self.folder / "generated",
                         **self.generate)
        if draw.random() < 0.3:
            prompts = case / "user" / "prompts.jsonl"
            write_jsonl(prompts, [{"prompt": "a"}, {"prompt": "b"}])
            break_file(prompts, draw)
            return self.generate | dict(prompts_file=prompts)
        return self.generate


@pytest.mark.campaign
@pytest.mark.parametrize("kind, cases", [
    ("flags", 110), ("file", 60), ("rows", 60), ("model", 60), ("output", 40),
    ("cache", 50),       # optional: cache
    ("leftovers", 30),   # optional: generate
])
def test_runs_fuzz(tmp_path, student, text, monkeypatch, kind, cases):
    """No traceback, no exit code but 0 and 2, nothing changed outside the run's own folders."""
    fuzz = Fuzz(tmp_path, student, text)
    monkeypatch.chdir(tmp_path)
    failures = []
    first = int(os.environ.get("FUZZ_FROM", 0))
    for number in range(first, first + cases):
        case = tmp_path / f"{kind}-{number}"
        (case / "user").mkdir(parents=True)
        fields = getattr(fuzz, f"case_{kind}")(case, random.Random(f"{kind} {number}"))
        watched = [fuzz.good, Path(student), case / "user"]
        if (case / "out").exists() and not (case / "out" / sd.MARK).exists():
            watched.append(case / "out")
        before = files_below(*watched)
        words = words_of(flags(**fields, output_dir=case / "out"))
        problem = problem_of(words)
        if files_below(*watched) != before:
            problem = f"changed what is not its own; {problem}"
        if problem:
            failures.append(f"{kind} {number}: {shlex.join(words)[:400]}\n    {problem}")
        shutil.rmtree(case)
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n".join(failures)


def give_up(number, frame):
    raise TimeoutError("more than a minute")


def problem_of(words):
    """What is wrong with the answer to a command line, None where nothing is."""
    out = io.StringIO()
    err = io.StringIO()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = sd.main(words)
    except SystemExit as e:
        code = e.code
    except BaseException:
        return traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)
        if sd.dist.is_initialized():
            sd.dist.destroy_process_group()
    errors = re.findall("^error: .*", err.getvalue(), re.MULTILINE)
    if code in (0, None) and not errors:
        return None
    if code == 2 and len(errors) == 1 and len(errors[0]) < 2000 and "Trace" not in err.getvalue():
        return None
    return f"exit code {code}: {err.getvalue()[-600:]!r}"


@pytest.mark.campaign
def test_runs_fuzz_of_the_environment(tmp_path, student, text):
    """In processes of their own, since it is read when the package is imported."""
    names = ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE HTTP_PROXY HTTPS_PROXY ALL_PROXY HF_HOME "
             "HF_ENDPOINT HF_HUB_OFFLINE WANDB_MODE OMP_NUM_THREADS TOKENIZERS_PARALLELISM COLUMNS "
             "TMPDIR HOME TERM").split()
    values = [value for value in ODD if "\0" not in value and "\ud800" not in value]
    fields = Fuzz(tmp_path, student, text).train
    failures = []
    for number in range(30):
        draw = random.Random(f"environment {number}")
        env = {draw.choice(names): draw.choice(values)}
        fields["student"] = draw.choice([student, student, "owner/name"])
        process = spawn(*flags(**fields, output_dir=tmp_path / f"out{number}"), env=env)
        shown, _ = process.communicate(timeout=120)
        if process.returncode not in (0, 2) or "Traceback" in shown:
            failures.append(f"{env}: exit code {process.returncode}\n{shown[-600:]}")
    assert not failures, "\n".join(failures)


# ---- a week of runs, one after the other, as a user types them

WEEK = [   # (processes, flags)
    (2, dict(fsdp="shard_grad_op", gradient_checkpointing=True, num_epochs=1, max_steps=None)),
    (2, dict(fsdp="hybrid_shard", shard_teacher=False, divergence="reverse", temperature=2)),
    (2, dict(fsdp="no_shard", cpu_offload=True, divergence="jsd")),
    (2, dict(output_dir="three", eval_steps=1, save_steps=2)),
    (2, dict(output_dir="three", eval_steps=1, save_steps=2, max_steps=6)),
    (1, dict(output_dir="three", eval_steps=1, save_steps=2, max_steps=8)),
    (1, dict(alpha=1, student="layers:1", lr_multipliers=["mlp=0", "embed=0.1"])),
    (1, dict(dtype="bf16", compile=True, gradient_accumulation_steps=2)),
    (1, dict(dtype="fp16", packing="documents", attention="sdpa")),
    (2, dict(streaming=True)),   # optional: streaming
    (2, dict(mode="cache", cache_dir="cache")),   # optional: cache
    (2, dict(   # optional: cache
        cache_dir="cache", teacher=None, dataset=None, seq_len=None)),
    (2, dict(blockwise=True)),   # optional: blockwise
    (1, dict(on_policy=0.5, max_new_tokens=4)),   # optional: on_policy
    (1, dict(   # optional: generate
        mode="generate", provider="local", num_examples=3, max_tokens=8)),
    (2, dict(   # optional: eval
        mode="eval", student="three/final", compare=["three/final"])),
]


@pytest.mark.campaign
def test_runs_a_week_of_runs(tmp_path, teacher, student, text):
    """No warning, no leftover process, no file but in output_dir and cache_dir."""
    folders = {"cache"}
    for i, (nproc, fields) in enumerate(WEEK):
        fields = dict(PLAIN, teacher=teacher, student=student, dataset=text, max_steps=4,
                      output_dir=f"out{i}") | fields
        folders.add(fields["output_dir"])
        words = flags(**{name: value for name, value in fields.items() if is_read(name, fields)})
        process = spawn(*words, nproc=nproc, cwd=tmp_path, env={"PYTHONWARNINGS": "default"})
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, (fields, shown)
        assert not re.search(r"(simple_distill|config)\.py:\d+: \w*Warning", shown), shown
        assert "Traceback" not in shown, (fields, shown)
    assert {path.name for path in tmp_path.iterdir()} <= folders
    assert pids_of(str(tmp_path)) == []


def is_read(name, fields):
    """Whether the mode reads the knob: PLAIN holds those of train."""
    return fields.get("mode", "train") in config.FIELDS[name].metadata["read_by"].split()


# --------------------------------------------------------------------------------------------------
# Freeze: the same runs by this package and by a commit before it give the same batches, weights,
# logs and reports, bit for bit, and what a cache holds is read the same. REFERENCE=COMMIT names
# another commit; move it where a result is meant to change.
#
# Meant to differ from 58e7ff4, and left out: the files of checkpoints and caches; of blocks the
# share explained (by batches: the last digit) and the median token (gone); layers' direct errors
# (gone); texts that provider local draws (by the one writer); the order of packed rows.

REFERENCE = os.environ.get("REFERENCE", "58e7ff4")   # before the house was halved

TEXT_RUN = dict(teacher="teacher", student="student", dataset="text", max_steps=4, eval_samples=8)
CHAT_RUN = TEXT_RUN | dict(dataset="chat", max_steps=3)
CACHE = dict(mode="cache", teacher="teacher", dataset="text", cache_dir="cache", seq_len=32)
CACHED_RUN = TEXT_RUN | dict(teacher=None, dataset=None, seq_len=None, cache_dir="cache")
BLOCKS = CHAT_RUN | dict(blockwise=True, epochs_per_block=0.4, lm_head_epochs=0.4, max_steps=2)
STREAMED = {}
STREAMED = dict(streaming=True)   # optional: streaming
FROZEN = {   # {name: [(ranks, fields), ...]}: commands one after the other, into the same folders
    "forward": [(1, TEXT_RUN)],
    "reverse": [(1, TEXT_RUN | dict(divergence="reverse"))],
    "jsd": [(1, TEXT_RUN | dict(divergence="jsd"))],
    "T 2": [(1, TEXT_RUN | dict(temperature=2.0, alpha=0.3))],
    "labels only": [(1, TEXT_RUN | dict(alpha=1.0))],
    "accumulation": [(1, CHAT_RUN | dict(batch_size=3, gradient_accumulation_steps=3))],
    "multipliers": [(1, TEXT_RUN | dict(lr_multipliers=["embed=0", "mlp=0.5"]))],
    "cosine": [(1, TEXT_RUN | dict(
        max_steps=None, num_epochs=1.5, lr_scheduler="cosine", warmup_ratio=0.2, weight_decay=0.1,
        eval_steps=3, save_steps=4))],
    "bf16": [(1, TEXT_RUN | dict(dtype="bf16", gradient_checkpointing=True))],
    "fp16": [(1, TEXT_RUN | dict(dtype="fp16"))],
    "layers": [(1, TEXT_RUN | dict(student="layers:1"))],
    "2 ranks": [(2, CHAT_RUN | dict(batch_size=2))],
    "2 ranks, no_shard": [(2, TEXT_RUN | dict(fsdp="no_shard", shard_teacher=False))],
    "3 ranks, then 2": [
        (3, TEXT_RUN | dict(batch_size=2, max_steps=2)), (2, TEXT_RUN | dict(batch_size=2))],
    "killed": [(1, TEXT_RUN | dict(save_steps=1, max_steps=9, killed=True)),
               (1, TEXT_RUN | dict(save_steps=1, max_steps=9, killed=False))],
    "stream": [   # optional: streaming
        (2, TEXT_RUN | STREAMED | dict(max_steps=9, eval_steps=3))],
    "cache, sample": [   # optional: cache
        (1, CACHE | dict(dataset="chat")), (1, CACHED_RUN)],
    "cache, topk": [   # optional: cache
        (2, CACHE | dict(cache_method="topk", cache_top_k=9, temperature=2.0)), (1, CACHED_RUN)],
    "cache of a stream": [   # optional: cache
        (1, CACHE | STREAMED), (2, CACHED_RUN)],
    "blocks, student": [   # optional: blockwise
        (1, BLOCKS | dict(save_steps=2, eval_steps=2))],
    "blocks, teacher": [   # optional: blockwise
        (1, BLOCKS | dict(block_input="teacher", distill_loss_type="cosine"))],
    "blocks alone": [   # optional: blockwise
        (1, BLOCKS | dict(max_steps=None, num_epochs=0, train_lm_head=False, lm_head_epochs=None,
                          distill_loss_type="mse"))],
    "on policy": [   # optional: on_policy
        (2, CHAT_RUN | dict(on_policy=0.7, max_new_tokens=9, max_steps=6, batch_size=2))],
    "eval": [   # optional: eval
        (1, TEXT_RUN),
        (1, dict(mode="eval", teacher="teacher", student="final", compare="student",
                 dataset="text", seq_len=32, batch_size=4, dtype="fp32"))],
}

FIGURES = ("perplexity", "bits", "perplexity_95", "bits_95", "tokens", "accuracy", "agreement",
           "kl", "ece", "parameters", "disk")
# What each rank computes the loss of: ids, labels, and of a cache what was decoded from it.
RECORD = """
import hashlib

def loss_recorded(model, batch, targets, *args, unrecorded=distil_loss, **objective):
    tensors = [batch.input_ids, batch.labels, *(batch.sparse or ())]
    content = b"".join(tensor.double().numpy().tobytes() for tensor in tensors)
    with open({path!r} + str(RANK), "a") as f:
        f.write(hashlib.sha256(content).hexdigest() + chr(10))
    return unrecorded(model, batch, targets, *args, **objective)

distil_loss = loss_recorded
"""


@pytest.fixture(scope="module")
def reference_package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    found = subprocess.run(["git", "archive", REFERENCE], cwd=HERE, capture_output=True)
    if found.returncode != 0:
        pytest.skip(f"no commit {REFERENCE} in this checkout")
    subprocess.run(["tar", "-x", "-C", folder], input=found.stdout, check=True)
    return folder


def run_frozen(package, commands, inputs, folder):
    """Run commands of the package one after the other; what they leave is in folder."""
    for ranks, fields in commands:
        train = fields.get("mode", "train") == "train"
        fields = (PLAIN if train else {}) | fields | {"output_dir": folder / "out"}
        for name in ("teacher", "student", "dataset", "compare"):
            fields[name] = inputs.get(fields.get(name), fields.get(name))
        if fields["student"] == "final":
            fields["student"] = folder / "out" / "final"
        if "cache_dir" in fields:
            fields["cache_dir"] = folder / "cache"
        change = ""
        if train and "killed" not in fields:
            change = RECORD.format(path=str(folder / "batches"))
        killed = fields.pop("killed", False)
        run = Fork(folder / "log.txt", *flags(**fields), ranks=ranks, package=package,
                   change=change)
        if killed:
            wait_for_log(folder / "out", run)
            run.signal(signal.SIGKILL)
        shown = run.wait()
        assert "error:" not in shown and "Traceback" not in shown, shown[-3000:]


def figures_of(entry):
    """Of a line of the log: without speeds, and what is meant to differ."""
    return {k: v for k, v in entry.items() if not re.search("second|explained|median", k)}


def digest_of(folder):
    """-> {file: what two equal runs have in common of it}"""
    digests = {"log": [figures_of(entry) for entry in log(folder / "out")]}
    for path in sorted(folder.glob("batches*")):
        digests[path.name] = path.read_text().split()
    if (folder / "out" / "final").exists():
        for name, tensor in final_weights(folder / "out").items():
            content = tensor.view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(content).hexdigest()
    if (folder / "out" / "report.json").exists():
        report = json.loads((folder / "out" / "report.json").read_text())
        for label, figures in report["models"].items():
            digests[label] = {name: figures[name] for name in FIGURES}
            digests[f"layers of {label}"] = [
                (layer["student"], layer["teacher"], layer["share"], layer["cka"])
                for layer in figures["layers"]]
    return digests


@pytest.mark.campaign
@pytest.mark.parametrize("name", FROZEN)
def test_freeze_results_are_those_of_the_reference(name, tmp_path, reference_package, teacher,
                                                   student, text, chat):
    inputs = dict(teacher=teacher, student=student, text=text, chat=chat)
    results = []
    for package in (reference_package, HERE):
        folder = tmp_path / f"by{len(results)}"
        folder.mkdir()
        run_frozen(package, FROZEN[name], inputs, folder)
        results.append(digest_of(folder))
    reference, ours = results
    assert len(reference) > 5   # log, batches, weights
    assert ours.keys() == reference.keys()
    for part in reference:
        assert ours[part] == reference[part], part


def fault_of_a_try(prompt, attempt):   # optional: generate
    """Each prompt meets another one first."""
    faults = [500, 429, "drop", None, "loop", "empty", "length", "no usage", "refusal"]
    return faults[len(prompt) % len(faults)] if attempt == 1 else None


@pytest.mark.campaign   # optional: generate
@pytest.mark.parametrize("provider", ["openai", "anthropic", "local"])   # optional: generate
def test_freeze_replies_are_those_of_the_reference(   # optional: generate
        provider, tmp_path, reference_package, teacher):
    """local: greedy, since draws are meant to differ."""
    results = []
    for package in (reference_package, HERE):
        folder = tmp_path / f"by{len(results)}"
        with ApiServer(fault=fault_of_a_try) as server:
            fields = generate_fields(folder, server, 24, provider)
            if provider == "local":
                fields |= dict(teacher=teacher, api_temperature=0, max_tokens=30, api_model=None,
                               api_base=None)
            shown = Fork(folder / "log.txt", *flags(**fields), package=package).wait()
        results.append({})
        for name in ("train.jsonl", "rejected.jsonl"):
            rows = read_lines(folder / "out" / name)
            results[-1][name] = sorted(json.dumps(row["messages"]) for row in rows)
    reference, ours = results
    assert sum(map(len, reference.values())) == 24, shown
    assert ours == reference


# --------------------------------------------------------------------------------------------------
# Forks: python test_simple_distill.py --fork DIR --without cache generate ... writes the package
# less those chapters. A chapter is what stands under its banner, the lines that are marked
# `# optional: NAME` with what is indented under them, its knobs, its tests, its README section. A
# line that is marked with several names goes when all of them go.

OPTIONAL = ("streaming", "demo", "cache", "blockwise", "on_policy", "generate", "eval")
PACKAGE = ("simple_distill.py", "config.py", "launch.sh", "test_simple_distill.py",
           "requirements.txt", "README.md", ".ci/run", ".gitignore", ".pytest.ini", ".ruff.toml")
BANNER = re.compile(r"(\s*)# -----")
MARK = re.compile(r"(?:#|<!--) optional: ([\w ]+?)\s*(?:-->.*)?$", re.IGNORECASE)


def fork(folder, without):
    """Write the package less the chapters named."""
    unknown = set(without) - set(OPTIONAL)
    if unknown:
        sys.exit(f"error: no optional chapter {', '.join(sorted(unknown))}; "
                 f"there are {', '.join(OPTIONAL)}")
    if os.path.isdir(folder) and os.listdir(folder):
        sys.exit(f"error: {folder!r} is not empty; name a new folder")
    for name in PACKAGE:
        text = (HERE / name).read_text()
        if name.endswith(".py"):
            text = without_chapters(text, set(without))
        elif name.endswith(".md"):
            text = without_sections(text, set(without))
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        shutil.copymode(HERE / name, path)


def indentation(line):
    return len(line) - len(line.lstrip())


def marked(line):
    """-> the names of the mark at the end of a line, none where there is no mark."""
    mark = MARK.search(line)
    return set(mark[1].lower().split()) if mark else set()


def without_chapters(text, without):
    """Python source less what is marked with names that are all in `without`."""
    lines = text.split("\n")
    kept = []
    i = 0
    while i < len(lines):
        banner = BANNER.match(lines[i])
        if banner and banner_names(lines, i) & without:
            i = end_of_chapter(lines, i, len(banner[1]))
        elif marked(lines[i]) and marked(lines[i]) <= without:
            i = end_of_block(lines, i)
        else:
            kept.append(lines[i])
            i += 1
    text = "\n".join(kept).rstrip("\n") + "\n"
    return re.sub(r"\n{4,}", "\n\n\n", text)   # where something stood between blank lines


def banner_names(lines, i):
    """A banner is a line of dashes; its title ends that line or begins the next one."""
    title = re.search(r"optional: (\w+)", " ".join(lines[i:i + 2]), re.IGNORECASE)
    return {title[1]} if title else set()


def end_of_chapter(lines, i, depth):
    """The line of the next banner that is indented no deeper."""
    for j in range(i + 1, len(lines)):
        banner = BANNER.match(lines[j])
        if banner and len(banner[1]) <= depth:
            return j
        if lines[j].strip() and indentation(lines[j]) < depth:
            return j
    return len(lines)


def end_of_block(lines, i):
    """Past a line and what is indented deeper, a closing bracket included."""
    depth = indentation(lines[i])
    j = i + 1
    while j < len(lines) and (not lines[j].strip() or indentation(lines[j]) > depth):
        j += 1
    while not lines[j - 1].strip():   # blank lines belong to what follows
        j -= 1
    if j < len(lines) and indentation(lines[j]) == depth and lines[j].lstrip()[:1] in ")]}":
        j += 1
    return j


def without_sections(text, without):
    """Markdown less its marked lines and, where a heading is marked, all to the next heading."""
    kept = []
    skipping = False
    for line in text.split("\n"):
        gone = bool(marked(line)) and marked(line) <= without
        if line.startswith("#"):
            skipping = gone
        if not skipping and not gone:
            kept.append(line)
    return "\n".join(kept)

FORKS = [[name] for name in OPTIONAL] + [list(OPTIONAL)]


@pytest.mark.parametrize("without", FORKS, ids=" ".join)
def test_forks_run_with_nothing_dangling(without, tmp_path, out, teacher, student, text):
    """No name undefined or imported in vain, no knob that nothing reads, and two steps train."""
    folder = tmp_path / "my_trainer"
    fork(folder, without)
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--select", "F", "."],
                             cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    knobs = (folder / "config.py").read_text()
    source = (folder / "simple_distill.py").read_text() + knobs
    names = re.findall(r"^    (\w+): (?:Literal\[$|.*= knob\()", knobs, re.MULTILINE)
    assert "learning_rate" in names
    assert [name for name in names if not re.search(rf"\bcfg\.{name}\b", source)] == []
    for name in without:
        assert f"# Optional: {name}:" not in source
    words = flags(**PLAIN, teacher=teacher, student=student, dataset=text, max_steps=2,
                  output_dir=out)
    shown = Fork(tmp_path / "log.txt", *words, package=folder).wait()
    assert "done in" in shown, shown
    assert len(log(out, "train")) == 2


@pytest.mark.parametrize("words", [
    ["-k", "losses or optimiser or data_conversation"],
    pytest.param([], marks=pytest.mark.campaign),
], ids=["quick", "all"])
def test_forks_smallest_passes_its_tests(tmp_path, words):
    """As its owner would run them; that there are some, pytest sees to."""
    fork(tmp_path / "smallest", OPTIONAL)
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *words],
                         cwd=tmp_path / "smallest", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


def test_forks_refuse_an_unknown_chapter_and_a_folder_in_use(tmp_path):
    with pytest.raises(SystemExit, match="no optional chapter cahce"):
        fork(tmp_path / "a", ["cahce"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        fork(tmp_path / "b", ["cache"])


def test_forks_cut_a_marked_line_with_what_is_under_it():
    text = "\n".join([
        "a = 1",
        "if x:   # optional: cache",
        "    b = 2",
        "",
        "    c = 3",
        "d = knob(   # optional: cache eval",
        "    4",
        ")",
        "e = 5   # optional: cache",
        "# ----- optional: eval",
        "f = 6",
        "# ----- core",
        "g = 7",
    ])
    kept = without_chapters(text, {"cache"}).split()
    assert "b" not in kept and "e" not in kept
    assert "d" in kept and "f" in kept   # marked for two, of which one stays
    assert without_chapters(text, {"cache", "eval"}) == "a = 1\n# ----- core\ng = 7\n"


# --------------------------------------------------------------------------------------------------
# Package: six files, five requirements, a README that is true.


def test_package_the_top_level_is_six_files_and_five_requirements():
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    names = listed.stdout.split() or os.listdir(HERE)
    visible = {name for name in names if not name.startswith(".")}
    assert visible <= {"simple_distill.py", "config.py", "launch.sh", "test_simple_distill.py",
                       "requirements.txt", "README.md", "__pycache__"}
    required = []
    for line in (HERE / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            required.append(re.match(r"[\w-]+", line)[0])
    assert sorted(required) == ["datasets", "torch", "tqdm", "transformers", "wandb"]


def test_package_config_is_the_configuration_and_nothing_else():
    tree = ast.parse((HERE / "config.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    names = {name.split(".")[0] for name in imported}
    assert names.isdisjoint({"asyncio", "matplotlib", "safetensors", "zlib", "torch", "datasets"})


def test_package_an_optional_chapter_borrows_from_none():
    """No function of an optional chapter is used by another one, but on a marked line."""
    chapters = re.split(r"\n# -{60,}\n", (HERE / "simple_distill.py").read_text())
    optional = {}
    for chapter in chapters:
        title = re.match(r"# Optional: (\w+):", chapter)
        if title:
            optional[title[1]] = chapter
    for name, chapter in optional.items():
        defined = re.findall(r"^(?:async )?(?:def|class) (\w+)", chapter, re.MULTILINE)
        for other, text in optional.items():
            if other == name:
                continue
            text = without_chapters(text, {name})
            borrowed = [word for word in defined if re.search(rf"(?<![.\w]){word}\(", text)]
            assert borrowed == [], f"{other} uses {borrowed} of {name}"


def readme_commands():
    """Every command of the trainer in the README, as lists of words; all but the bare one (the
    demo)."""
    readme = (HERE / "README.md").read_text().replace("\\\n", " ")
    pattern = (r"(?:^ {4,}|`|&& )(?:[A-Z_]+=\S+ )*"
               r"(?:python simple_distill\.py|\./launch\.sh) (--[^`\n]*)")
    commands = []
    for line in re.findall(pattern, readme, re.MULTILINE):
        words = [word for word in shlex.split(line, comments=True) if word[:1] != "$"]
        if "..." not in words and "--help" not in words and words not in commands:
            commands.append(words)
    return commands


def read_flags(words):
    """['--a', '1', '--b', '--c', '2', '3'] -> {'--a': ['1'], '--b': [], '--c': ['2', '3']}"""
    given = {}
    for word in words:
        if word.startswith("--"):
            values = given[word] = []
        else:
            values.append(word)
    return given


@pytest.mark.parametrize("command", readme_commands(), ids=shlex.join)
def test_package_readme_commands_run(command, tmp_path, monkeypatch, teacher, student, text):
    """As they stand there, on tiny models: names of models and data are replaced, lengths cut
    short, nothing else."""
    given = read_flags(command)
    mode = given.get("--mode", ["train"])[0]
    if mode == "generate":
        pytest.skip("mode generate has tests of its own, with a server")
    monkeypatch.chdir(tmp_path)
    replaced = {"--teacher": teacher, "--student": student, "--dataset": text,
                "--tokenizer": teacher, "--compare": student}
    for name in replaced.keys() & given.keys():
        if not given[name][0].startswith(("layers:", "demo")):
            given[name] = [replaced[name]]
    if "--config" in given:
        Path(given["--config"][0]).write_text(f"teacher: {teacher}\nstudent: {student}\n")
    given |= {"--seq_len": ["32"], "--output_dir": ["out"]}
    given.pop("--dataset_config", None)
    if mode == "train":
        given |= {"--max_steps": ["2"], "--log_steps": ["1"]}
    if mode == "train" and "--cache_dir" in given:   # its other half comes first
        cli(*flags(mode="cache", teacher=teacher, dataset=text, seq_len=32,
                   cache_dir=given["--cache_dir"]))
    else:
        given["--dataset"] = [text]
    cli(*[word for name, values in given.items() for word in (name, *values)])


SKEWED = """
import torch
import simple_distill as sd

z = torch.randn(5, 9, dtype=torch.float64)
y = torch.randn(5, 9, dtype=torch.float64)
labels = torch.tensor([1, 2, 3, 4, 8])
for T in (1.0, 2.0):
    leaf = z.clone().requires_grad_()
    q = torch.softmax(y / T, -1)
    p = torch.softmax(leaf / T, -1)
    ce = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    kl = T * T * (q * (q / (0.9 * p + 0.1 * q)).log()).sum(-1)
    (0.3 * ce + 0.7 * kl).sum().backward()
    ours = sd.chunk_terms(
        z.clone(), labels, y.clone(), alpha=0.3, temperature=T, divergence="skew",
        student_scaling=(1.0, None), teacher_scaling=(1.0, None))
    for got, wanted in zip(ours, (ce, kl, leaf.grad)):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-12)
"""


def test_package_the_readmes_own_loss(tmp_path, teacher, student, text):
    """A fork that adds it as the README says: its gradient is that of autograd, and the command
    line trains with it."""
    readme = (HERE / "README.md").read_text()
    lines = re.search(r"( +elif divergence == \"skew\":\n(?: {12}.*\n)+)", readme)[1]
    assert len(lines.splitlines()) <= 10
    source = (HERE / "simple_distill.py").read_text()
    anchor = '        elif divergence == "reverse":\n'
    assert source.count(anchor) == 1
    (tmp_path / "simple_distill.py").write_text(source.replace(anchor, lines + anchor))
    choices = 'Literal["forward", "reverse", "jsd"'
    knobs = (HERE / "config.py").read_text()
    assert choices in knobs
    (tmp_path / "config.py").write_text(knobs.replace(choices, choices + ', "skew"'))
    checked = subprocess.run([sys.executable, "-c", SKEWED], cwd=tmp_path, capture_output=True,
                             text=True)
    assert checked.returncode == 0, checked.stderr
    words = flags(**PLAIN, teacher=teacher, student=student, dataset=text, divergence="skew",
                  max_steps=2, use_wandb=False, output_dir="out")
    trained = subprocess.run([sys.executable, "simple_distill.py", *words], cwd=tmp_path,
                             capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    assert all(0 < kl < 99 for kl in column(tmp_path / "out", "train/kl_loss"))


# --------------------------------------------------------------------------------------------------
# Bench: python test_simple_distill.py --bench

ON_GPU = torch.cuda.is_available()


def interleaved(cases, rounds=7):
    """{name: function} -> {name: median seconds}: the rounds alternate, so that a noisy machine is
    noisy for all."""
    times = {name: [] for name in cases}
    for n in range(rounds + 1):
        for name, work in cases.items():
            start = time.perf_counter()
            work()
            if ON_GPU:
                torch.cuda.synchronize()
            if n > 0:   # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds)[len(seconds) // 2] for name, seconds in times.items()}


class LossCase(NamedTuple):
    hidden: torch.Tensor           # [N, D]
    weight: torch.Tensor           # [V, D]
    teacher_hidden: torch.Tensor   # [N, Dt]
    teacher_weight: torch.Tensor   # [V, Dt]
    labels: torch.Tensor           # [N]


def loss_case(V, N, D, Dt, counted=1.0):
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    torch.manual_seed(0)

    def make(rows, columns):
        return torch.randn(rows, columns, device=device, dtype=torch.float32).to(dtype)

    hidden = make(N, D)
    teacher_hidden = make(N, Dt)
    weight = make(V, D) / D ** 0.5
    teacher_weight = make(V, Dt) / Dt ** 0.5
    labels = torch.randint(0, V, (N,), device=device)
    labels[torch.arange(N, device=device) >= counted * N] = -100
    return LossCase(hidden, weight, teacher_hidden, teacher_weight, labels)


def plain_loss(case):
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_()
    counted = case.labels != -100
    logits = (hidden @ weight.T).float()
    teacher_logits = (case.teacher_hidden @ case.teacher_weight.T).float()
    ce = F.cross_entropy(logits, case.labels)
    kl = plain_kl(logits[counted], teacher_logits[counted])
    (0.5 * ce + 0.5 * kl).backward()


def plain_kl(logits, teacher_logits):
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher_logits, -1), log_target=True,
                    reduction="batchmean")


def our_loss(case):
    hidden = case.hidden.detach().requires_grad_()
    head = sd.Head(case.weight.detach().requires_grad_())
    teacher = (case.teacher_hidden, sd.Head(case.teacher_weight))
    loss, _, _ = sd.distillation_loss(hidden, head, case.labels, teacher, alpha=0.5,
                                      temperature=1.0)
    loss.backward()


def our_eager_loss(case):
    """The same with the element-wise part as it runs where there is no compiler."""
    with torch.compiler.set_stance("force_eager"):
        our_loss(case)


def its_matmuls(case):
    """What no implementation can leave out."""
    counted = case.labels != -100
    hidden = case.hidden[counted]
    teacher_hidden = case.teacher_hidden[counted]
    grad_weight = torch.zeros_like(case.weight)
    chunk = max(1, sd.LOGITS_BUDGET // (2 * hidden.element_size() * len(case.weight)))
    for start in range(0, len(hidden), chunk):
        h = hidden[start:start + chunk]
        logits = h @ case.weight.T
        teacher_hidden[start:start + chunk] @ case.teacher_weight.T   # noqa: B018
        logits @ case.weight   # noqa: B018
        grad_weight.addmm_(logits.T, h)


def bench_loss(vocab=32000):
    if ON_GPU:
        tokens, width, teacher_width = 8192, 2048, 4096
    else:
        tokens, width, teacher_width = 1024 if vocab == 32000 else 512, 256, 512
    case = loss_case(vocab, tokens, width, teacher_width, counted=7 / 8)
    half = loss_case(vocab, tokens, width, teacher_width, counted=0.5)
    small = loss_case(vocab, 64, width, teacher_width)
    found = interleaved({
        "its matmuls": functools.partial(its_matmuls, case),
        "ours": functools.partial(our_loss, case),
        "ours, eager": functools.partial(our_eager_loss, case),
        "plain PyTorch": functools.partial(plain_loss, case),
        "ours, half masked": functools.partial(our_loss, half),
        "ours, 64 tokens": functools.partial(our_loss, small),
        "plain, 64 tokens": functools.partial(plain_loss, small),
    })
    print(f"\nloss, V {vocab:,}, {tokens:,} tokens, 7 of 8 counted, D {width}, Dt {teacher_width}")
    for name, seconds in found.items():
        ratio = seconds / found["its matmuls"]
        print(f"  {name:<20}{seconds:>9.3f} s{ratio:>8.2f} x its matmuls")


LOSSES = {"ours": our_loss, "ours, eager": our_eager_loss, "plain": plain_loss}


def print_peak_memory(name):
    """In a process of its own: bytes above the inputs, once everything is compiled and warm."""
    work = LOSSES[name]
    work(loss_case(151936, 8, 256, 512))
    case = loss_case(151936, 4096, 256, 512)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(case)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")   # the peak starts again
        before = resident_bytes("VmRSS")
        work(case)
        print(resident_bytes("VmHWM") - before)


def resident_bytes(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def bench_memory():
    found = {}
    for name in LOSSES:
        shown = subprocess.run([sys.executable, __file__, "--peak-memory", name],
                               capture_output=True, text=True)
        found[name] = math.nan   # killed: it did not fit
        if shown.returncode == 0:
            found[name] = int(shown.stdout.split()[-1])
    print("\npeak memory of the loss above its inputs, V 151,936, 4,096 tokens")
    for name, size in found.items():
        print(f"  {name:<20}{size / 2**30:>9.2f} GiB{size / found['plain']:>8.1%} of plain")


# ---- a whole optimiser step, random weights


def step_shapes():
    """-> shapes of student and teacher, sequences, tokens: 0.6B and 4B on a GPU, tiny ones here."""
    student = dict(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=2048)
    teacher = student | dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)
    if ON_GPU:
        return student, teacher, 8, 1024
    small = dict(vocab_size=32000, head_dim=32, num_key_value_heads=4, num_hidden_layers=4,
                 max_position_embeddings=512)
    student |= small | dict(hidden_size=128, intermediate_size=384, num_attention_heads=4)
    teacher |= small | dict(hidden_size=256, intermediate_size=768, num_attention_heads=8)
    return student, teacher, 4, 256


def our_step(folder, batches, alpha, **fields):
    """-> a function that makes one step of ours on each of the batches."""
    cfg = sd.Config(
        student=f"{folder}/student/config.json", teacher=f"{folder}/teacher/config.json",
        alpha=alpha, use_wandb=False, **{"gradient_checkpointing": False} | fields)
    student, _ = sd.load_model(cfg, "student")
    teacher = None
    if alpha < 1:
        teacher, _ = sd.load_model(cfg, "teacher")
    rates = dict.fromkeys(student.parameters(), 1e-4)
    optimizer = sd.make_optimizer(student.parameters(), rates, 0.0)
    scale_state = sd.new_scale_state(False)
    get_teacher_targets = sd.teacher_targets(teacher)
    loss_fn = functools.partial(sd.distil_loss, alpha=alpha, temperature=1.0, divergence="forward")

    def step():
        for batch in batches:
            loss, _, _ = student(loss_fn, batch, get_teacher_targets(batch), len(batch.labels))
            loss.backward()
            sd.optimizer_step(optimizer, 1.0, scale_state, False)
            optimizer.zero_grad()

    return step


def token_row(ids, targets):
    return {"input_ids": ids, "targets": targets, "starts": np.array([0])}


def plain_step(student_shape, teacher_shape, ids_BT, loss_of):
    """-> a function that makes one step as a plain script would; loss_of(student, teacher)."""
    dtype, device = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")
    student_config = transformers.Qwen3Config(**student_shape)
    teacher_config = transformers.Qwen3Config(**teacher_shape)
    student = AutoModelForCausalLM.from_config(student_config).to(device)
    teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=dtype).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device, dtype, enabled=ON_GPU):
            loss = loss_of(student, teacher, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step_loss(student, teacher, ids_BT):
    with torch.no_grad():
        teacher_logits = teacher(ids_BT).logits[:, :-1].flatten(0, 1)
    logits = student(ids_BT).logits[:, :-1].flatten(0, 1).float()
    ce = F.cross_entropy(logits, ids_BT[:, 1:].flatten())
    return 0.5 * ce + 0.5 * plain_kl(logits, teacher_logits.float())


def trl_step_loss(student, teacher, ids_BT):
    """TRL's own compute_loss at lmbda 0: no sampling, no label loss."""
    from trl.experimental.gkd import GKDTrainer
    trainer = types.SimpleNamespace(
        teacher_model=teacher, beta=0.0, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    inputs = dict(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT)
    return GKDTrainer.compute_loss(trainer, student, inputs)


def bench_step():
    student_shape, teacher_shape, sequences, tokens = step_shapes()
    vocab = student_shape["vocab_size"]
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        transformers.Qwen3Config(**student_shape).save_pretrained(f"{folder}/student")
        transformers.Qwen3Config(**teacher_shape).save_pretrained(f"{folder}/teacher")
        ids = np.random.default_rng(0).integers(0, vocab, (sequences, tokens))
        batch = sd.collate([token_row(row, np.arange(tokens) > 0) for row in ids])
        cases = {
            "labels only": our_step(folder, [batch], alpha=1.0),
            "online": our_step(folder, [batch], alpha=0.5),
            "online, compile": our_step(folder, [batch], alpha=0.5, compile=True),
            "plain PyTorch": plain_step(student_shape, teacher_shape, batch.input_ids,
                                        plain_step_loss),
        }
        with contextlib.suppress(ImportError):
            os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
            import trl   # noqa: F401
            cases["TRL's GKDTrainer"] = plain_step(student_shape, teacher_shape, batch.input_ids,
                                                   trl_step_loss)
        found = interleaved(cases, rounds=5)
    print(f"\nwhole step, {sequences} x {tokens} tokens, V {vocab:,}")
    for name, seconds in found.items():
        speed = sequences * tokens / seconds
        ratio = found["plain PyTorch"] / seconds
        print(f"  {name:<20}{speed:>12,.0f} tokens/s{ratio:>8.2f} x plain")


def smollm2_135m():
    return transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True)


def bench_documents(batch_size=8, seq_len=512, count=3):
    """Conversations as long as GSM8K's are under SmolLM2's tokenizer (217 tokens, 126 of them
    targets), one a row and packed, for a student of SmolLM2-135M's shape."""
    pick = random.Random(0)
    documents = []
    for _ in range(1000):
        length = min(seq_len, round(pick.lognormvariate(5.32, 0.33)))
        documents.append(token_row(np.full(length, 7), np.arange(length) > 0.42 * length))
    rows = datasets.Dataset.from_list(documents).with_format("numpy")
    kinds = {"one a row": rows, "packed": sd.PackedRows(rows, seq_len)}
    cases = {}
    targets = {}
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        smollm2_135m().save_pretrained(f"{folder}/student")
        for kind, rows in kinds.items():
            batches = []
            for i in range(count):
                numbers = range(i * batch_size, (i + 1) * batch_size)
                batches.append(sd.collate([rows[k] for k in numbers]))
            targets[kind] = sum(len(batch.labels) for batch in batches)
            cases[kind] = our_step(folder, batches, alpha=1.0, gradient_checkpointing=True)
        found = interleaved(cases, rounds=3)
    print(f"\nSmolLM2-135M's shape on labels, conversations in {batch_size} rows of {seq_len}")
    speeds = {kind: targets[kind] / seconds for kind, seconds in found.items()}
    for kind, speed in speeds.items():
        print(f"  {kind:<20}{speed:>12,.0f} targets/s{speed / speeds['one a row']:>8.2f} x")


BENCHES = {
    "memory": bench_memory,
    "loss": bench_loss,
    "loss, V 151,936": functools.partial(bench_loss, 151936),
    "step": bench_step,
    "documents": bench_documents,
    "cache": bench_cache,   # optional: cache
    "block": bench_block,   # optional: blockwise
    "on_policy": bench_on_policy,   # optional: on_policy
}


def bench(names):
    """Tables of speed and memory, each in a process of its own, so that none finds another's
    memory -> exit code."""
    if names:
        torch.set_num_threads(os.cpu_count())
        sd.keep_freed_memory()   # as a run does
        for name in names:
            BENCHES[name]()
        return 0
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {device}", flush=True)
    codes = []
    for name in BENCHES:
        codes.append(subprocess.run([sys.executable, __file__, "--bench", name]).returncode)
    return max(codes)


# --------------------------------------------------------------------------------------------------
# Main: as a script.


def main(argv):
    if argv[:1] == ["--peak-memory"]:
        print_peak_memory(argv[1])
        return 0
    if argv[:1] == ["--bench"]:
        return bench(argv[1:])
    if argv[:1] == ["--fork"]:
        return fork_command(argv[1:])
    return pytest.main([__file__, *argv])


def fork_command(argv):
    parser = argparse.ArgumentParser(prog="test_simple_distill.py --fork")
    parser.add_argument("folder")
    parser.add_argument("--without", nargs="+", required=True, metavar="CHAPTER",
                        help=f"of {', '.join(OPTIONAL)}")
    words = parser.parse_args(argv)
    fork(words.folder, words.without)
    print(f"{words.folder}: the package without {', '.join(words.without)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
