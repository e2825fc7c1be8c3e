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
import base64   # optional: generate
import collections
import contextlib
import ctypes
import fcntl
import functools
import gc   # optional: generate
import hashlib
import http.server   # optional: generate
import io
import itertools
import json
import math
import multiprocessing   # optional: generate
import os
import pickle
import pty
import random
import re
import resource   # optional: cache
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
    mode = words[words.index("--mode") + 1] if "--mode" in words else "train"
    if mode == "train" and not any("use_wandb" in word for word in words):
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
    command = shlex.join(words_of(args))
    assert code == rc, f"exit code {code}, not {rc}: {command}\n{result.out}\n{result.err}"
    if rc == 2:
        lines = result.err.strip().splitlines()
        assert any(line.startswith("error: ") for line in lines), result.err
        assert "Traceback" not in result.err, result.err
    return result


def flags(**fields):
    """Fields of Config as command-line words; None leaves a field out."""
    words = []
    for name, value in fields.items():
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words.append(f"--{name}")
        for x in values:
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
    command = [sys.executable, str(HERE / "simple_distill.py")]
    if nproc > 1:
        command = [str(HERE / "launch.sh")]
    env = {**os.environ, "NPROC": str(nproc), **(env or {})}
    env.setdefault("OMP_NUM_THREADS", "1")
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
        code = simple_distill.main(job["args"])
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
    if job["wait"]:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Fork:
    """A run in processes of its own, one a rank."""
    mother = None

    def __init__(self, log, *args, ranks=1, limit=0, package=HERE):
        if Fork.mother is None:
            Fork.mother = subprocess.Popen(
                [sys.executable, "-c", MOTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            atexit.register(Fork.mother.kill)
        self.log = str(log)
        self.pids = []
        port = free_port()
        for rank in range(ranks):
            env = rank_environment(rank, ranks, port) if ranks > 1 else {}
            job = {"args": words_of(args), "env": env, "log": self.log, "wait": False,
                   "limit": limit, "package": str(package)}
            Fork.mother.stdin.write(json.dumps(job) + "\n")
            Fork.mother.stdin.flush()
            self.pids.append(int(Fork.mother.stdout.readline()))

    def running(self):
        return [pid for pid in self.pids if is_alive(pid)]

    def signal(self, number):
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return self

    def wait(self, seconds=180):
        """-> what it printed, once all of it has ended."""
        end = time.time() + seconds
        while self.running():
            assert time.time() < end, Path(self.log).read_text()[-3000:]
            time.sleep(0.02)
        return Path(self.log).read_text()


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
    """Until a process has logged its first step."""
    end = time.time() + seconds
    while not (os.path.exists(f"{out}/log.jsonl") and log(out, "train")):
        assert process.poll() is None and time.time() < end, process.communicate(timeout=5)
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
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in metadata.items():
        if hasattr(entry, "properties"):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
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
    assert "finished" in cli("--config", f"{out}/config.json").out   # as it stands, it is done


def test_config_command_line_wins_over_the_file(tmp_path, out, student, text):
    lines = [f"student: {student}", f"dataset: {text}", "alpha: 1.0", "max_steps: 7",
             "learning_rate: 2e-4", "lr_multipliers: [embed=0]"]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    cli("--config", tmp_path / "run.yaml", *flags(output_dir=out, max_steps=2, seq_len=32))
    written = read_config(out)
    assert written["max_steps"] == 2
    assert written["learning_rate"] == 2e-4
    assert written["lr_multipliers"] == ["embed=0"]
    assert len(log(out, "train")) == 1


@pytest.mark.parametrize("words, unknown, nearest", [
    (["--temprature", "2"], "temprature", "temperature"),
    (["--learning-rat", "1"], "learning_rat", "learning_rate"),
    (["--studnt=x"], "studnt", "student"),
    (["--alpha", "0.5", "--lr_multiplier", "a=1"], "lr_multiplier", "lr_multipliers"),
])
def test_config_an_unknown_flag_names_the_nearest(words, unknown, nearest):
    err = cli(*words, rc=2).err
    assert f"--{unknown}" in err
    assert nearest in err
    assert len(err.strip().splitlines()) <= 2


def test_config_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    for name, body in (("a.yaml", "temprature: 2\n"), ("a.json", '{"temprature": 2}')):
        (tmp_path / name).write_text(body)
        err = cli("--config", tmp_path / name, rc=2).err
        assert "temprature" in err
        assert "temperature" in err


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


def test_config_a_file_may_hold_what_other_modes_read(tmp_path, out, student, text):
    """One file serves all modes; a line says what of it this one passes over."""
    fields = {**PLAIN, "student": student, "dataset": text, "alpha": 1.0, "max_steps": 1}
    (tmp_path / "run.json").write_text(json.dumps({**fields, **IDLE}))
    shown = cli("--config", tmp_path / "run.json", "--output_dir", out).out
    line, = [line for line in shown.splitlines() if "passed over" in line]
    assert line.rpartition(": ")[2].split(", ") == list(IDLE)
    assert len(column(out, "train/loss")) == 1


@pytest.mark.parametrize("name", IDLE)
def test_config_a_flag_that_the_mode_does_not_read_is_refused(name, out, student, text):
    err = distil(out, rc=2, student=student, dataset=text, alpha=1.0, **{name: IDLE[name]}).err
    assert name in err
    assert not os.path.exists(out)


def test_config_every_field_is_read():
    """By name, somewhere in the code: a flag that does nothing is worse than none."""
    source = Path(sd.__file__).read_text() + Path(config.__file__).read_text()
    unread = [name for name in config.FIELDS if not re.search(rf"\bcfg\.{name}\b", source)]
    assert unread == []


def test_config_every_field_has_one_line_of_help():
    shown = cli("--help").out
    for name, field in config.FIELDS.items():
        assert f"--{name}" in shown
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]


def test_config_help_is_grouped_by_chapter():
    """The name and purpose of each section are a title, and its knobs stand below it."""
    lines = cli("--help").out.splitlines()
    starts = []
    for section in config.SECTIONS:
        titles = [line for line in lines if line.startswith(section.name)]
        title, = [line for line in titles if section.purpose in line]
        starts.append(lines.index(title))
    ends = starts[1:] + [len(lines)]
    for section, start, end in zip(config.SECTIONS, starts, ends):
        below = "\n".join(lines[start:end])
        shown = re.findall(r"^  --(?!no_)(\w+)", below, re.MULTILINE)
        assert shown == config.knobs_in(section.name)


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


@pytest.mark.parametrize("word, code, shown", [
    ("--help", 0, "--learning_rate"),
    ("--learning_rat", 2, "did you mean learning_rate?"),
])
def test_config_help_and_a_typo_answer_without_torch(word, code, shown):
    """Importing it takes seconds."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN_AND_LOOK, HERE / "simple_distill.py", word], cwd=HERE,
        capture_output=True, text=True)
    assert shown in ran.stdout + ran.stderr
    assert f"exit code {code}\n" in ran.stdout, ran.stderr
    assert "torch imported: False\n" in ran.stdout


# ---- bad input: what its cases are made of


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


def encoder_decoder(folder):
    shape = dict(vocab_size=300, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    transformers.T5Config(**shape).save_pretrained(folder / "t5")
    return dict(student=folder / "t5" / "config.json")


def no_permission(folder):
    (folder / "closed").mkdir(mode=0o555)
    return dict(output_dir=folder / "closed" / "out")


def yaml_file(body):
    def make(folder):
        (folder / "run.yaml").write_text(body)
        return dict(config=folder / "run.yaml")
    return make


def output_is_a_file(folder):
    (folder / "file").write_text("mine")
    return dict(output_dir=folder / "file")


def begun_cache(folder):   # optional: cache
    (folder / "c").mkdir()
    sd.write_manifest({}, folder / "c")
    return dict(cache_dir=folder / "c")


GOOD_LINE = '{"text": "one two three four five"}\n'
BINARY = bytes(range(256)) * 9
LATIN = (GOOD_LINE * 3 + '{"text": "Größe"}\n').encode("latin-1")
FILL = dict(mode="cache", student=None, cache_dir="c")   # optional: cache
FILL_TOPK = dict(**FILL, cache_method="topk")   # optional: cache
MIN_LR_TWICE = '{"min_lr": 0, "min_lr_rate": 0}'

# what is wrong -> (fields, or words, or a function of a folder that makes fields;
#                   the words that the message has to hold)
BAD_INPUT = {
    # values out of range
    "temperature 0": (dict(temperature=0), "temperature"),
    "temperature negative": (dict(temperature=-1), "temperature"),
    "temperature infinite": (dict(temperature="inf"), "temperature"),
    "temperature no number": (dict(temperature="warm"), "temperature warm"),
    "alpha 1.2": (dict(alpha=1.2), "alpha 1.2 between"),
    "alpha -0.1": (dict(alpha=-0.1), "alpha"),
    "alpha nan": (dict(alpha="nan"), "alpha"),
    "batch 0": (dict(batch_size=0), "batch_size"),
    "batch 1.5": (dict(batch_size=1.5), "batch_size 1.5"),
    "seq_len 1": (dict(seq_len=1), "seq_len at least 2"),
    "max_steps negative": (dict(max_steps=-5), "max_steps"),
    "max_steps 0": (dict(max_steps=0), "max_steps"),
    "epochs 0": (dict(num_epochs=0), "num_epochs"),
    "rate 0": (dict(learning_rate=0), "learning_rate"),
    "rate nan": (dict(learning_rate="nan"), "learning_rate"),
    "warmup 2": (dict(warmup_ratio=2), "warmup_ratio"),
    "decay negative": (dict(weight_decay=-1), "weight_decay"),
    "clip negative": (dict(max_grad_norm=-1), "max_grad_norm"),
    "accumulation 0": (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps"),
    "keep 0": (dict(keep_checkpoints=0), "keep_checkpoints"),
    "log 0": (dict(log_steps=0), "log_steps"),
    "save negative": (dict(save_steps=-1), "save_steps"),
    "eval negative": (dict(eval_steps=-1), "eval_steps"),
    "eval_samples 0": (dict(eval_samples=0), "eval_samples"),
    "max_samples 0": (dict(max_samples=0), "max_samples"),
    "seed negative": (dict(seed=-1), "seed"),
    "seed below 0": (dict(seed=-1), "between 0 and 268,435,456"),
    "seed of 29 bits": (dict(seed=2**28 + 1), "seed 268,435,456"),
    "buffer negative": (   # optional: streaming
        dict(streaming=True, max_steps=1, shuffle_buffer=-1), "shuffle_buffer"),
    "num_proc 0": (dict(num_proc=0), "num_proc"),
    "multiplier negative": (dict(default_lr_multiplier=-1), "default_lr_multiplier"),
    "multiplier pattern": (dict(lr_multipliers="(=1"), "lr_multipliers"),
    "multiplier matches nothing": (dict(lr_multipliers="zzz=1"), "zzz names"),
    "everything frozen": (dict(default_lr_multiplier=0), "frozen"),
    "half of nothing": (   # optional: blockwise
        dict(blockwise=True, wd_per_block=-1), "wd_per_block at least 0"),
    "head epochs 0": (   # optional: blockwise
        dict(blockwise=True, lm_head_epochs=0), "lm_head_epochs greater than 0"),

    # no such choice
    "scheduler unknown": (dict(lr_scheduler="step"), "lr_scheduler cosine"),
    "divergence unknown": (dict(divergence="tv"), "divergence"),
    "mode unknown": (dict(mode="learn"), "mode"),
    "fsdp unknown": (dict(fsdp="zero3"), "fsdp"),
    "dtype unknown": (dict(dtype="int8"), "dtype"),
    "bool": (dict(streaming="perhaps"), "streaming"),   # optional: streaming
    "empty name": (dict(output_dir=" "), "output_dir"),

    # flags
    "flag twice": (["--alpha", "0.1", "--alpha", "0.2"], "alpha once"),
    "flag unknown": (["--alhpa", "1"], "alhpa alpha"),
    "stray word": (["train"], "train"),
    "flag without value": (["--alpha"], "alpha"),
    # a no_ that no flag has
    "no_blockwise": (   # optional: blockwise
        ["--no_blockwise"], "--no_blockwise --blockwise false"),
    "no-streaming": (["--no-streaming"], "--streaming false"),   # optional: streaming
    "no_seed": (["--no_seed", "3"], "--no_seed --seed"),
    "no_alhpa": (["--no_alhpa"], "alpha"),

    # what does not go together
    "cache with alpha 1": (dict(alpha=1, cache_dir="c"), "alpha cache_dir"),   # optional: cache
    "cache and reverse": (   # optional: cache
        dict(cache_dir="c", divergence="reverse"), "divergence"),
    "cache that is not there": (dict(cache_dir="/nowhere"), "/nowhere mode"),   # optional: cache
    "mode cache without dir": (dict(mode="cache", student=None), "cache_dir"),   # optional: cache
    "cache begun": (begun_cache, "begun finished"),   # optional: cache
    **{   # optional: cache
        "cache and stream": (   # optional: streaming
            dict(cache_dir="c", streaming=True, max_steps=1), "cache_dir streaming length"),
    },
    "k 0": (dict(**FILL_TOPK, cache_top_k=0), "cache_top_k"),   # optional: cache
    "k above the vocabulary": (   # optional: cache
        dict(**FILL_TOPK, cache_top_k=264), "cache_top_k 264 263"),
    "draws 0": (dict(**FILL, cache_samples=0), "cache_samples"),   # optional: cache
    "no teacher to correct": (   # optional: on_policy
        dict(on_policy=1, alpha=1), "on_policy alpha"),
    **{   # optional: on_policy
        "student from a cache": (   # optional: cache
            dict(cache_dir="c", on_policy=0.5), "on_policy 0.5 cache_dir 'c'"),
        "student after the blocks": (   # optional: blockwise
            dict(blockwise=True, on_policy=1, num_epochs=0), "on_policy --num_epochs"),
    },
    "prompts side by side": (   # optional: on_policy
        dict(on_policy=1, packing="documents"), "on_policy --packing rows"),
    "a prompt of all": (   # optional: on_policy
        dict(on_policy=1, on_policy_prompt=32), "on_policy_prompt 32 seq_len 32"),
    "more than all steps": (dict(on_policy=1.5), "on_policy between"),   # optional: on_policy
    "texts that nobody writes": (   # optional: on_policy
        dict(max_new_tokens=9), "max_new_tokens --on_policy"),
    "a mode's unread field": (dict(api_model="x"), "api_model train"),   # optional: generate
    "stream without steps": (dict(streaming=True), "max_steps"),   # optional: streaming

    # models
    "layers 0": (dict(student="layers:0"), "layers:N"),
    "layers too many": (dict(student="layers:9"), "layers:N 2"),
    "layers x": (dict(student="layers:x"), "layers:N"),
    "layers of a cache, whose": (   # optional: cache
        dict(cache_dir="c", teacher="demo", student="layers:1"), "layers:1 --teacher"),
    "no such path": (dict(teacher="/nowhere/at/all", student="layers:1"), "/nowhere/at/all path"),
    "resume nowhere": (dict(resume="/nowhere"), "/nowhere"),
    "no student": (dict(student=None), "student"),
    "teacher nowhere": (dict(teacher="/nowhere"), "teacher /nowhere"),
    "student nowhere": (dict(student="no/where"), "no/where name"),
    "teacher without config": (
        broken_model("teacher", lambda path: (path / "config.json").unlink()), "teacher config"),
    "teacher config is no json": (
        broken_model("teacher", lambda path: (path / "config.json").write_text("{")),
        "teacher config"),
    "teacher without weights": (
        broken_model("teacher", lambda path: (path / "model.safetensors").unlink()), "teacher"),
    "truncated safetensors": (
        broken_model("teacher", lambda path: os.truncate(path / "model.safetensors", 999)),
        "teacher"),
    "weights missing": (
        broken_model("teacher", edit_config(num_hidden_layers=3)), "teacher lacks"),
    "encoder-decoder": (encoder_decoder, "student t5"),
    "unknown architecture": (broken_model("student", edit_config(model_type="novel")), "student"),
    "tokenizer nowhere": (dict(tokenizer="/nowhere"), "tokenizer"),

    # data
    "dataset nowhere": (dict(dataset="/nowhere.jsonl"), "/nowhere.jsonl exist"),
    "dataset name nowhere": (dict(dataset="no/where"), "no/where"),
    "split nowhere": (dict(train_split="tarin"), "tarin"),
    "empty file": (with_file("a.jsonl", ""), "a.jsonl empty"),
    "blank file": (with_file("a.jsonl", "\n\n"), "a.jsonl"),
    "binary file": (with_file("a.jsonl", BINARY), "a.jsonl line 1"),
    "binary text": (with_file("a.txt", BINARY), "a.txt line"),
    "wrong encoding": (with_file("a.jsonl", LATIN), "line 4"),
    "one bad line": (with_file("a.jsonl", GOOD_LINE * 4 + "{bad\n" + GOOD_LINE * 4), "line 5"),
    "a line that is no object": (
        with_file("a.jsonl", GOOD_LINE * 2 + "3\n" + GOOD_LINE), "line 3"),
    "no known column": (
        with_file("a.jsonl", '{"body": "one two three", "id": 3}\n' * 9), "text body id"),
    "text that is no text": (with_file("a.jsonl", '{"text": 3}\n' * 9), "text"),
    "csv without text": (with_file("a.csv", "a,b\n1,2\n3,4\n"), "text a b"),
    "rows of one token": (with_file("a.jsonl", '{"prompt": "", "response": ""}\n' * 9), "target"),
    "no assistant": (
        with_file("a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n' * 9), "target"),
    "a single short row": (with_file("a.jsonl", '{"text": "one"}\n'), "seq_len"),
    "parquet that is none": (with_file("a.parquet", "PAR"), "a.parquet"),

    # files and folders
    "yaml that is a list": (yaml_file("- 1\n- 2\n"), "mapping"),
    "yaml that is broken": (yaml_file("a: [1\n"), "YAML"),
    "yaml key unknown": (yaml_file("alhpa: 1\n"), "alpha"),
    "config nowhere": (dict(config="/nowhere.yaml"), "/nowhere.yaml"),
    "output is a file": (output_is_a_file, "directory file"),
    # what yaml makes of it
    "yaml key true": (yaml_file("true: 1\n"), "True"),
    "yaml key no": (yaml_file("no: 1\n"), "False"),
    "yaml key 5": (yaml_file("5: 1\n"), "5"),
    "yaml list for one": (yaml_file("batch_size: [8, 16]\n"), "batch_size one value"),
    "yaml null in a list": (yaml_file("compare: [null]\n"), "compare None"),   # optional: eval
    "yaml list of lists": (yaml_file("compare: [[a]]\n"), "compare"),   # optional: eval
    "yaml -x": (yaml_file("lr_multipliers: [a=1, '-x=1']\n"), "lr_multipliers -x=1"),
    "yaml resume no": (yaml_file("resume: no\n"), "resume quotes"),
    "yaml no value a block": (   # optional: blockwise
        yaml_file("lr_per_block: []\n"), "lr_per_block at least one"),

    # flags that would do nothing
    "k of draws": (   # optional: cache
        dict(**FILL, cache_top_k=32), "cache_top_k --cache_method topk"),
    "draws of k": (   # optional: cache
        dict(**FILL_TOPK, cache_samples=10), "cache_samples --cache_method sample"),
    "weight of labels": (   # optional: blockwise
        dict(blockwise=True, logit_loss_type="ce", logit_loss_weight=0.3),
        "logit_loss_weight --logit_loss_type"),
    "temperature of labels": (   # optional: blockwise
        dict(blockwise=True, logit_loss_type="ce", logit_loss_temperature=2),
        "logit_loss_temperature --logit_loss_type kl_div"),
    "no head phase": (   # optional: blockwise
        dict(blockwise=True, train_lm_head=False, lm_head_lr=1, logit_loss_type="mse"),
        "lm_head_lr, logit_loss_type --train_lm_head true"),
    "no stitches": (   # optional: blockwise
        dict(blockwise=True, use_stitching_layers=False, stitching_layer_bias=False),
        "stitching_layer_bias --use_stitching_layers true"),
    "all blocks at once": (   # optional: blockwise
        dict(blockwise=True, block_input="teacher", freeze_previous_blocks=False),
        "freeze_previous_blocks --block_input student"),
    "blocks without blockwise": (   # optional: blockwise
        dict(block_input="teacher", lr_per_block=1), "block_input, lr_per_block --blockwise"),
    "buffer without stream": (   # optional: streaming
        dict(shuffle_buffer=3), "shuffle_buffer --streaming"),
    **{   # optional: eval
        "buffer in eval": (   # optional: streaming
            dict(mode="eval", shuffle_buffer=3), "eval shuffle_buffer"),
    },
    "constant with kwargs": (
        dict(lr_scheduler_kwargs='{"num_cycles": 2}'), "lr_scheduler_kwargs constant"),
    "warmup and kwargs": (
        dict(lr_scheduler="constant_with_warmup", lr_scheduler_kwargs='{"a": 2}'),
        "lr_scheduler_kwargs constant"),
    "constant with warmup": (
        dict(warmup_ratio=0.1), "warmup_ratio: read only with --lr_scheduler linear"),
    "a file's configuration": (dict(dataset_config="foo"), "dataset_config hub"),

    # nothing where a name should be, as from "$UNSET"
    "empty cache_dir": (dict(cache_dir=""), "cache_dir empty"),   # optional: cache
    "empty tokenizer": (dict(tokenizer=""), "tokenizer empty"),
    "empty resume": (dict(resume=""), "resume empty"),
    "empty eval_split": (dict(eval_split=" "), "eval_split empty"),
    "empty lr_multipliers": (dict(lr_multipliers=""), "lr_multipliers empty"),
    "empty wandb_project": (dict(wandb_project="\t"), "wandb_project empty"),
    "empty config": (dict(config=""), "--config No such file"),

    # before any model is loaded
    "stream without steps, early": (   # optional: streaming
        dict(streaming=True, teacher="/nowhere"), "max_steps"),
    "layers ²": (dict(student="layers:²", teacher="/nowhere"), "layers:N"),
    "layers in eval": (   # optional: eval
        dict(mode="eval", student="layers:4", teacher="/nowhere"), "layers:4"),
    "layers 0, early": (dict(student="layers:0", teacher="/nowhere"), "layers:N"),
    "min_lr missing": (
        dict(lr_scheduler="cosine_with_min_lr", teacher="/nowhere"),
        "min_lr_rate lr_scheduler_kwargs"),
    "min_lr twice": (
        dict(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs=MIN_LR_TWICE,
             teacher="/nowhere"),
        "min_lr_rate one"),
    "kwargs unknown": (
        dict(lr_scheduler="cosine", lr_scheduler_kwargs='{"num_cycle": 2}', teacher="/nowhere"),
        "num_cycle num_cycles"),
    "kwargs of ours": (
        dict(lr_scheduler="cosine", lr_scheduler_kwargs='{"num_warmup_steps": 2}',
             teacher="/nowhere"),
        "num_warmup_steps num_cycles"),
    "kwargs a list": (
        dict(lr_scheduler="cosine", lr_scheduler_kwargs="[2]"), "lr_scheduler_kwargs JSON"),
}
if os.geteuid():   # root may write anywhere
    BAD_INPUT["no permission"] = (no_permission, "closed")


def command_of(fields, folder, **usual):
    """A sound run, but for what a case of BAD_INPUT says -> command-line words."""
    usual = {**PLAIN, **usual}
    if isinstance(fields, list):
        return [*flags(**usual), *fields]
    if callable(fields):
        fields = fields(folder)
    if fields.get("mode", "train") != "train":   # which reads little of PLAIN
        for name in set(PLAIN) - {"dtype", "seq_len"}:
            del usual[name]
    return flags(**{**usual, **fields})


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_config_bad_input_is_named_in_a_line_or_two(case, tmp_path, teacher, student, text,
                                                    monkeypatch):
    """And nothing is left behind or changed."""
    fields, words = BAD_INPUT[case]
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command = command_of(fields, folder, teacher=teacher, student=student, dataset=text,
                         output_dir=tmp_path / "out")
    before = files_in(folder)
    err = cli(*command, rc=2).err.strip()
    assert err.startswith("error: "), err
    assert len(err.splitlines()) <= 2 and len(err) < 600, err
    missing = [word for word in words.split() if word not in err]
    assert not missing, (missing, err)
    assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").rglob("*"))
    assert files_in(folder) == before


def test_config_a_stray_word_is_no_item_of_a_list_in_the_file(tmp_path):
    (tmp_path / "f.yaml").write_text("max_steps: 2\nlr_multipliers: [a=1]\n")
    assert "make sense of 'junk'" in cli("junk", "--config", tmp_path / "f.yaml", rc=2).err


def test_config_no_check_vanishes_under_python_O():
    tree = ast.parse(Path(config.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


# --------------------------------------------------------------------------------------------------
# Runtime: phases, files, one run a folder, ranks, signals.


@pytest.mark.parametrize("error, shown", [
    (ValueError("a\nb"), "while reading x: ValueError: a b (KeyError: 'row 17')"),
    (config.UserError("in our words"), "in our words"),
    (torch.OutOfMemoryError("full"), "full"),
])
def test_runtime_a_phase_says_what_it_does_and_why_it_failed(capsys, error, shown):
    known = (config.UserError, torch.OutOfMemoryError)
    with pytest.raises(known) as caught, sd.phase("reading x"):
        raise error from KeyError("row 17")
    assert str(caught.value) == shown
    assert capsys.readouterr().out == "reading x ...\n"


@pytest.mark.parametrize("debug", [False, True])
def test_runtime_a_traceback_goes_to_error_log_or_by_debug_to_the_terminal(tmp_path, student,
                                                                           debug):
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    words = flags(student=student, alpha=1.0, dataset=tmp_path / "bad.jsonl", debug=debug,
                  output_dir=tmp_path / "out")
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        assert sd.main(words) == 2
    assert shown.getvalue().count("error: while reading dataset") == 1
    assert ("Traceback" in shown.getvalue()) == debug
    assert (tmp_path / "out" / "error.log").exists() != debug


def test_runtime_rank_0_speaks_and_survives_a_terminal_that_has_gone(monkeypatch, capsys):
    for rank in (1, 0):
        monkeypatch.setattr(sd, "RANK", rank)
        sd.print0("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"

    def gone(words):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sd.tqdm, "write", gone)
    sd.print0("nobody reads it")


# ---- files


def test_runtime_a_digest_is_of_all_that_it_is_given():
    digests = {sd.digest(*things) for things in ((1, 2), (2, 1), ([1, 2],), ("1", 2))}
    assert len(digests) == 4
    assert sd.digest({"a": 1, "b": 2}) == sd.digest({"b": 2, "a": 1})
    with pytest.raises(TypeError):   # its str leaves out the middle
        sd.digest(np.arange(5000))


def test_runtime_a_json_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    assert sd.read_json(path, 7) == 7
    sd.write_json({"a": [1, "é"]}, path)
    assert list(tmp_path.iterdir()) == [path]

    def fill_the_disk(path, text):
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError):
        sd.write_json({"b": 2}, path)
    assert sd.read_json(path) == {"a": [1, "é"]}


def test_runtime_lines_are_appended_whatever_they_hold(tmp_path):
    for word in ("é\n", "half \ud800"):
        sd.append_jsonl(tmp_path / "a.jsonl", {"a": word})
    assert read_lines(tmp_path / "a.jsonl") == [{"a": "é\n"}, {"a": "half ?"}]


def test_runtime_a_table_is_aligned():
    lines = sd.table(["model", "loss"], [["a", "1.25"], ["longer", "10"]]).split("\n")
    assert [line.replace(" ", "") for line in lines] == [
        "|model|loss|", "|------|----|", "|a|1.25|", "|longer|10|"]
    assert {len(line) for line in lines} == {17}


# ---- one run a folder


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_text()
            for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("files, refusal", [
    ({"notes.txt": "mine"}, None),
    ({"config.json": "{}"}, "holds 'config.json'"),   # as every model's folder
    ({"final/notes.txt": "mine"}, "holds 'final'"),
    ({sd.MARK: "", "final/notes.txt": "mine"}, None),   # touched by its owner, or half written
    ({sd.MARK: "train 12345", "config.json": "{}"}, None),
    ({sd.MARK: "trains 12345"}, "of mode trains"),
])
def test_runtime_a_folder_is_ours_by_its_mark_and_another_one_stays_as_it_is(out, files, refusal):
    for name, content in files.items():
        Path(out, name).parent.mkdir(parents=True, exist_ok=True)
        Path(out, name).write_text(content)
    expected = contextlib.nullcontext()
    if refusal:
        expected = pytest.raises(config.UserError, match=refusal)
    with expected, sd.process_group(), sd.claim(out, "train"):
        mark = Path(out, sd.MARK).read_text()
        assert re.fullmatch(r"train \d{6,}", mark)
        files = {**files, sd.MARK: mark}
    assert files_in(out) == files


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
with sd.process_group(), sd.claim(sys.argv[2], "train"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_runtime_one_run_a_folder_until_it_ends_or_is_killed(out, student, text):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(HERE), out], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while "held" not in holder.stdout.readline():
        assert holder.poll() is None
    mark = files_in(out)[sd.MARK]
    err = distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1).err
    assert f"taking {out} for this run alone" in err
    assert files_in(out)[sd.MARK] == mark
    threading.Timer(0.5, holder.kill).start()
    with sd.process_group(), sd.claim(out, "train", wait=True):
        assert holder.wait(60) < 0


# ---- ranks

RANKS = """
import contextlib, json, os, sys, time
sys.path.insert(0, sys.argv[1])
import simple_distill as sd
with sd.process_group():
    seen = [sd.all_sum(sd.RANK, 2), sd.from_rank0(sd.RANK + 5)]
    with contextlib.suppress(ValueError), sd.node_first():
        if sd.RANK == 0:
            time.sleep(1)
            open("done", "w").close()
            raise ValueError   # which the others then meet themselves
        seen.append(os.path.exists("done"))
    with sd.claim("shared", "train"):
        pass
    os.makedirs(f"node{sd.RANK}/out")   # a disk of its own, with the mark of an older run
    os.chdir(f"node{sd.RANK}")
    open("out/.simple_distill", "w").write("train 12345")
    try:
        with sd.claim("out", "train"):
            seen.append("went on")
    except sd.UserError as e:
        seen.append(str(e))
    print(json.dumps(seen), flush=True)
    if sd.RANK == 1:   # rank 0, with the store, may not be gone yet
        time.sleep(2)
        print(sd.first_to_fail(), sd.first_to_fail())
"""


def test_runtime_ranks_agree_wait_for_each_other_and_share_a_disk(tmp_path):
    port = free_port()
    processes = []
    for rank in range(2):
        processes.append(subprocess.Popen(
            [sys.executable, "-c", RANKS, str(HERE)], cwd=tmp_path, text=True,
            env={**os.environ, **rank_environment(rank, 2, port)}, stdout=subprocess.PIPE))
    try:
        first, second = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert json.loads(first.splitlines()[-1]) == [[1, 4], 5, "went on"], first
    seen, failed = second.splitlines()[-2:]
    assert json.loads(seen)[:3] == [[1, 4], 5, True]
    assert "rank 1 does not see what rank 0 writes in 'out'" in seen
    assert failed == "True False"   # it speaks for all, once


def test_runtime_only_the_host_waits_for_a_day():
    """A collective on GPUs, where a rank is gone, ends after minutes."""
    with sd.process_group():
        groups = [torch.distributed.group.WORLD, sd.HOST]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
    minutes = [backend.options._timeout.total_seconds() / 60 for backend in backends]
    assert minutes == [15, 24 * 60]


def test_runtime_any_number_of_signals_only_asks_to_stop():
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    with sd.stop_signals() as requests:
        assert not requests
        for count, number in enumerate(numbers * 2, 1):
            signal.raise_signal(number)
            assert len(requests) == count
    assert [signal.getsignal(number) for number in numbers] == before


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
# Data: tokenizers, formats, splits, targets, packing, batches.


# ---- tokenizers


@pytest.mark.parametrize("ours, theirs, problem", [
    (dict(roll=1), {}, f"token {len(SPECIAL)} is "),   # the first that differs
    (dict(merges=("t u", "u r")), dict(merges=("u r", "t u")), "they cut text differently"),
])
def test_data_another_tokenizer_of_equal_size_is_refused(tmp_path, out, text, ours, theirs,
                                                         problem):
    names = []
    for name, options in (("student", ours), ("teacher", theirs)):
        tokenizer = tiny_tokenizer(**options)
        names.append(tiny_model(tmp_path / name, len(tokenizer), tokenizer=tokenizer))
    err = distil(out, rc=2, student=names[0], teacher=names[1], dataset=text, max_steps=1).err
    assert problem in err


@pytest.mark.parametrize("named, candidates, found", [
    (None, ["demo", "layers:2", "shape.json", "bare", "a", "b"], "a"),
    ("b", ["a"], "b"),
    (None, ["bare", "demo"], None),
])
def test_data_whose_tokenizer(tmp_path, monkeypatch, named, candidates, found):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "broken"):
        tiny_tokenizer().save_pretrained(name)
    os.mkdir("bare")
    tokenizer = sd.load_tokenizer(config.Config(tokenizer=named), *candidates)
    assert (tokenizer and tokenizer.name_or_path) == found
    Path("broken", "tokenizer.json").write_text("{")
    with pytest.raises(config.UserError, match="tokenizer of broken"):   # and no other is taken
        sd.load_tokenizer(config.Config(), "broken", "a")
    with pytest.raises(config.UserError, match="name one with --tokenizer"):
        sd.load_data(config.Config(), None)


# ---- which tokens are targets


def target_runs(row, tokenizer):
    """Each contiguous run of targets as text."""
    runs = []
    pairs = zip(row["targets"], row["input_ids"], strict=True)
    for is_target, run in itertools.groupby(pairs, key=lambda pair: bool(pair[0])):
        if is_target:
            runs.append(tokenizer.decode([int(token) for _, token in run]))
    return runs


def encode(rows, tokenizer, seq_len=512, packing="auto"):
    return sd.row_encoder(config.Config(seq_len=seq_len, packing=packing), tokenizer)(rows)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    user("hello there"), assistant("hello there"),
    user("2+2?"), assistant("It is 4.\nTruly."),
]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    " {{ m['content'] }}{{ eos_token }}{% else %}[INST] {{ m['content'] }} [/INST]"
    "{% endif %}{% endfor %}")
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1].strip() }}{% endif %}<|im_end|>\n{% endfor %}")
NO_END = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"

NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('who am I') }}{% endif %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")


@pytest.mark.parametrize("template, end_mark", [
    pytest.param(CHATML, "<|im_end|>", id="chatml"),
    pytest.param(NEEDS_SYSTEM + CHATML, "<|im_end|>", id="needs_system"),
    pytest.param(LLAMA3, "<|eot_id|>", id="llama3"),
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
    ("  spaced out \n", "spaced out"), ("x", "x"), ("<|im", "<|im"), ("user", "user"),
    ("é日本🙂", "é日本🙂"), ("assistant", "assistant"),
])
def test_data_odd_answers_are_found_exactly(said, shown):
    tokenizer = tiny_tokenizer(LLAMA3)
    row, = encode([{"messages": [user(said), assistant(said)] * 2}], tokenizer)
    assert target_runs(row, tokenizer) == [shown + "<|eot_id|>"] * 2


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
SHOWN_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("template, targets", [
    pytest.param(
        QWEN3, [SHOWN_CALL, "<think>\ngrey is dull\n</think>\n\nDull.<|im_end|>"], id="qwen3"),
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
@pytest.mark.parametrize("arguments", [{"at": "sky"}, '{"at": "sky"}'])
def test_data_calls_of_tools_and_thoughts_are_targets(tmp_path, template, targets, arguments):
    """Read from a file, so that each message has the fields of all others, as nulls; arguments come
    as an object or, as APIs give them, as JSON in a string."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": [
        "<|user|>", "<|assistant|>", "<|observation|>"]})
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    turns = [TOOL_TURNS[0], {**TOOL_TURNS[1], "tool_calls": [call]}, *TOOL_TURNS[2:]]
    rows = [{"messages": turns}, {"messages": turns[:2]}]   # the second is only a call
    train, _ = rows_of(write_splits(tmp_path / "d", rows, rows), tokenizer, seq_len=512)
    assert target_runs(train[0], tokenizer) == targets
    mark = targets[0].replace("<|observation|>", "")   # which is the next turn's
    assert target_runs(train[1], tokenizer) in (
        [targets[0]], [mark],
        ["<think>\n\n</think>\n\n" + targets[0]])   # Qwen's last turn always thinks


THOUGHTS = [
    user("a"), assistant("<think>\nhm\n</think>\n\nb"),
    user("c"),
    {**assistant(""), "reasoning_content": "look", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"}, assistant("<think>\nso\n</think>\n\nd"),
]


@pytest.mark.parametrize("template, turns, targets", [
    (THINKING, [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>d")],
     ["b<|im_end|>", "<think>d<|im_end|>"]),
    (QWEN3, THOUGHTS, ["b<|im_end|>", "<think>\nlook\n</think>\n\n" + SHOWN_CALL,
                       "<think>\nso\n</think>\n\nd<|im_end|>"]),
    (QWEN3, [*THOUGHTS, user("e"), assistant("f")],
     ["b<|im_end|>", SHOWN_CALL, "d<|im_end|>", "<think>\n\n</think>\n\nf<|im_end|>"]),
    (QWEN3, [user("a"), assistant("")], []),   # says nothing
    (None, [assistant("abc")], ["bc<|endoftext|>"]),   # its first token follows nothing
])
def test_data_templates_that_change_earlier_turns(template, turns, targets):
    tokenizer = tiny_tokenizer(template)
    row, = encode([{"messages": turns}], tokenizer)
    assert target_runs(row, tokenizer) == targets


# ---- from raw rows to token rows


def rows_of(dataset, tokenizer=None, **fields):
    """What load_data hands on, as lists: (train rows, held-out rows)."""
    cfg = config.Config(**{"dataset": str(dataset), "seq_len": 64, **fields})
    with sd.process_group():
        train, held_out = sd.load_data(cfg, tokenizer or tiny_tokenizer())
    train = train or []
    return [train[i] for i in range(len(train))], list(held_out)


def ids_of(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


def decoded(rows):
    return [tiny_tokenizer().decode(ids) for ids in ids_of(rows)]


WHY_SO = [user("why?"), assistant("so")]
PARTS = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]
NULLS = {"name": None, "tool_calls": None}


@pytest.mark.parametrize("row, messages", [
    ({"messages": WHY_SO}, WHY_SO),
    ({"messages": [{**user(PARTS), **NULLS}, {**assistant("so"), "tool_calls": []}]}, WHY_SO),
    ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
     WHY_SO),
    ({"prompt": "why?", "response": "so", "text": "unread"}, WHY_SO),
    ({"prompt": "why?", "completion": "so"}, WHY_SO),
    ({"prompt": [user("why?")], "completion": [assistant("so")]}, WHY_SO),
    ({"messages": None, "prompt": None, "question": "why?", "answer": "so"}, WHY_SO),
    ({"instruction": "why?", "input": "", "output": "so"}, WHY_SO),
    ({"instruction": "add", "input": "1, 2", "output": "3"},
     [user("add\n\n1, 2"), assistant("3")]),
    ({"messages": [], "prompt": "why?", "response": None, "text": "one"}, None),
    ({"messages": "why?", "text": "one"}, None),
])
def test_data_conversations_of_every_format(row, messages):
    assert sd.conversation_of(row) == messages


PICTURE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
MIXED = [
    {"text": "plain one"},
    {"messages": WHY_SO},
    {"text": "", "id": 1},   # neither said nor wrong
    {"text": None},
    {"text": "plain two"},
    {"messages": [user("q"), {"content": "nobody said this"}]},
    {"messages": [user(PICTURE), assistant("a picture")]},
    {"id": 7},
    {"messages": [user("only asked")]},
    {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]},
]
REASONS = ["KeyError: 'role' among messages", "KeyError: 'text' among messages",
           "KeyError: 'text' among id", "no target in 64 tokens", "no system role"]


def test_data_each_row_is_read_by_its_own_kind_or_dropped_with_a_reason():
    tokenizer = tiny_tokenizer(NO_SYSTEM + CHATML)
    rows, dropped = sd.kept_rows(sd.token_rows(encode(MIXED, tokenizer, 64)))
    assert [target_runs(row, tokenizer) for row in rows] == [
        ["so<|im_end|>"], ["lain one<|endoftext|>plain two<|endoftext|>"]]
    assert dropped.total() == len(REASONS)
    for reason in REASONS:
        assert sum(reason in why for why in dropped) == 1, (reason, dropped)


def test_data_one_conversation_a_row_cut_to_seq_len(tmp_path, capsys):
    sizes = [(2, 10), (3, 10), (4, 100), (16, 10), (500, 10)]   # of prompt and response
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in sizes]
    train, _ = rows_of(write_splits(tmp_path / "d", rows, rows[:1]), seq_len=16)
    assert [len(row["input_ids"]) for row in train] == [14, 15, 16]
    assert [sum(row["targets"]) for row in train] == [11, 11, 11]
    shown = capsys.readouterr().out
    assert "train: dropped 2 of 5 rows: 2 x no target in 16 tokens" in shown
    assert "eval: dropped" not in shown


def llama_tokenizer(**fields):
    """One letter a token, a "▁" for each blank and before the text."""
    tokens = ["<unk>", "<s>", "</s>", *string.ascii_letters, ".", ",", "▁"]
    return transformers.LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], **fields)


@pytest.mark.parametrize("packing", ["blocks", "rows"])
@pytest.mark.parametrize("tokenizer, begin", [
    pytest.param(tiny_tokenizer(), [], id="gpt"),   # it has a BOS, and puts it nowhere
    pytest.param(tiny_tokenizer(bos=True), [1], id="gemma"),
    pytest.param(llama_tokenizer(add_bos_token=True), [1], id="llama"),
])
def test_data_a_text_ends_with_eos_and_a_block_begins_with_bos(tokenizer, begin, packing):
    docs = [prose(5 + i, i) for i in range(6)]
    streams = tokenizer(docs, add_special_tokens=False)["input_ids"]
    for ids in streams:
        ids.append(tokenizer.eos_token_id)
    docs[-1] += tokenizer.eos_token   # it ends so already
    if packing == "blocks":
        streams = [list(itertools.chain(*streams))]
    room = 16 - len(begin)
    expected = [begin + ids[i:i + room] for ids in streams for i in range(0, len(ids), room)]
    rows = encode([{"text": doc} for doc in docs], tokenizer, 16, packing)
    assert [row["input_ids"] for row in rows] == expected
    for row in rows:
        assert row["starts"] == [0]
        assert row["targets"] == [False] + [True] * (len(row["input_ids"]) - 1)
        assert bool(row["dropped"]) == (len(row["input_ids"]) == 1)


@pytest.mark.parametrize("template, packing, why", [
    pytest.param(None, "blocks", "use --packing rows", id="blocks"),
    # which writes nothing of a single message
    pytest.param("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", "auto",
                 "no target in 16 tokens", id="template"),
])
def test_data_dropped_as_it_has_to_be(template, packing, why):
    rows = [{"messages": WHY_SO[1:]}, {"text": "abc"}]
    encoded = encode(rows, tiny_tokenizer(template), 16, packing)
    kept, dropped = sd.kept_rows(sd.token_rows(encoded))
    assert len(kept) == 1
    [reason] = dropped.elements()
    assert why in reason


def test_data_every_local_format_gives_the_same_rows(tmp_path):
    docs = [prose(6 + i, i) + "\n" + prose(3, i) for i in range(25)]
    rows = [{"text": doc} for doc in docs]
    table = datasets.Dataset.from_list(rows)
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table.to_csv(str(tmp_path / "d.csv"))
    table.to_parquet(str(tmp_path / "d.parquet"))
    (tmp_path / "d.txt").write_text("\n\n".join(docs))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=table).save_to_disk(str(tmp_path / "saved_dict"))
    want = [ids_of(rows) for rows in rows_of(tmp_path / "d.jsonl")]
    assert len(want[0]) > 20
    for name in ("d.json", "d.csv", "d.parquet", "d.txt", "saved", "saved_dict"):
        assert [ids_of(rows) for rows in rows_of(tmp_path / name)] == want, name


# ---- what is kept of them


SEVERAL = """
import contextlib, io, sys
sys.path.insert(0, sys.argv[1])
import datasets, test_simple_distill as t, simple_distill as sd

def broken(*args, **options):
    raise ZeroDivisionError

for run, processes in (("one", None), ("two", 2), ("two", 2), ("two", None)):
    datasets.config.HF_DATASETS_CACHE = f"{sys.argv[3]}/{run}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), sd.process_group():
        cfg = t.config.Config(dataset=sys.argv[2], seq_len=64, num_proc=processes)
        train, _ = sd.load_data(cfg, t.tiny_tokenizer())
    dropped = [line for line in said.getvalue().split("\\n") if "train: dropped" in line]
    print("rows:", sd.count_rows(train), dropped)
    if run == "two":
        sd.encode_rows = broken   # from here on they come from the disk
"""


def test_data_several_processes_and_the_disk_give_the_same_rows(tmp_path):
    """Joined by the thousand, whoever does it, and what was dropped with them. In a process of its
    own, for the forks."""
    rows = [{"text": prose(1 + i % 5, i)} for i in range(2500)]
    rows[::500] = [{"messages": [{"content": "nobody said this"}]}] * 5
    path = write_splits(tmp_path / "d", rows, rows[1:2])
    ran = subprocess.run([sys.executable, "-c", SEVERAL, str(HERE), path, str(tmp_path)],
                         text=True, capture_output=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("rows:")]
    assert len(found) == 4, ran.stderr
    assert len(set(found)) == 1, found
    assert "train: dropped 5 of 2500 rows: 5 x KeyError: 'role' among" in found[0]


def test_data_rows_are_made_anew_where_what_shapes_them_has_changed(tmp_path, monkeypatch):
    raw = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])

    def fingerprint(tokenizer=None, raw=raw, **fields):
        cfg = config.Config(**{"packing": "rows", **fields})
        return sd.fingerprint_rows(cfg, raw, tokenizer or tiny_tokenizer())

    other_end = tiny_tokenizer()
    other_end.eos_token = "<|im_end|>"
    same = {fingerprint(), fingerprint(packing="documents")}
    other = [
        fingerprint(other_end), fingerprint(tiny_tokenizer(CHATML)),
        fingerprint(raw=raw.rename_column("prompt", "question")), fingerprint(packing="auto"),
        fingerprint(packing="blocks"), fingerprint(seq_len=64), fingerprint(text_column="body")]
    marker = "\n# ---- between raw rows and token rows"
    parts = Path(sd.__file__).read_text().split(marker)
    assert len(parts) == 3
    monkeypatch.setattr(sd, "__file__", str(tmp_path / "edited.py"))
    for i, found in enumerate((same.add, other.append, same.add)):
        edited = [*parts]
        edited[i] += "# an edit"
        Path(sd.__file__).write_text(marker.join(edited))
        found(fingerprint())
    assert len(same) == 1
    assert len({*same, *other}) == 9


# ---- packing


def documents_of(rows):
    """-> {((id, is it a target), ...) of a document: how often}; a row holds one or several."""
    documents = collections.Counter()
    for row in rows:
        tokens = list(zip(row["input_ids"], row["targets"], strict=True))
        for start, end in itertools.pairwise([*row["starts"], len(tokens)]):
            documents[tuple(tokens[start:end])] += 1
    return documents


def test_data_packed_documents_are_whole_and_each_is_there_once(tmp_path):
    rows = talk(150)
    path = write_splits(tmp_path / "d", rows, rows[:9])
    tokenizer = tiny_tokenizer(CHATML)
    apart, held_out = rows_of(path, tokenizer, seq_len=128, packing="rows")
    packed, packed_held_out = rows_of(path, tokenizer, seq_len=128, packing="documents")
    assert documents_of(packed) == documents_of(apart)
    assert len(apart) == 150
    assert len(packed) < len(apart) / 1.3
    assert max(len(row["input_ids"]) for row in packed) <= 128
    # held-out documents stand alone: what is measured on them does not depend on the packing
    assert ids_of(packed_held_out) == ids_of(held_out)


def token_dataset(documents):
    """Of [(ids, targets)], as it lies on disk."""
    rows = [{"input_ids": ids, "targets": targets, "starts": [0], "dropped": ""}
            for ids, targets in documents]
    return sd.kept_rows(sd.token_rows(rows))[0]


def test_data_packed_rows_are_a_view_of_any_number_of_documents():
    """They are put together ten thousand at a time."""
    documents = token_dataset(([i] * (1 + i % 4), [False] + [True] * (i % 4))
                              for i in range(10_050))
    packed = sd.PackedRows(documents, 64)
    rows = [packed[i] for i in range(len(packed))]
    assert documents_of(rows) == documents_of(documents.with_format(None))
    assert max(len(row["input_ids"]) for row in rows) == 64
    assert len(rows) <= math.ceil(10_050 * 2.5 / 64) + 1


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


def test_data_rows_are_counted_and_known_by_their_content():
    """By all of it, and by nothing else: a resume compares it."""
    documents = [([i % 50, 7, 8], [False, True, True]) for i in range(1500)]
    rows = token_dataset(documents)
    found = sd.count_rows(rows)
    digest = found.pop("digest")
    assert found == dict(rows=1500, tokens=4500, targets=3000, biggest=49)
    for edit in (
        [([48, 9, 8], [False, True, True]), documents[-1]],    # another id
        [documents[-2], ([49, 7, 8], [False, True, False])],   # another target
        [([48, 7], [False, True]), ([8, 49, 7, 8], [True, False, True, True])],   # cut elsewhere
    ):
        assert sd.count_rows(token_dataset(documents[:-2] + edit))["digest"] != digest, edit
    packed = sd.count_rows(sd.PackedRows(rows, 30))
    assert packed == dict(rows=150, tokens=4500, targets=3000, biggest=49, digest=digest)
    assert sd.count_rows(rows.to_iterable_dataset()) is None


# ---- splits


@pytest.mark.parametrize("length, wanted, expected", [
    (2, 256, [1]), (39, 256, [38]), (40, 256, [19, 39]), (100, 3, [32, 65, 98]),
])
def test_data_held_out_rows_are_evenly_spaced_and_never_trained_on(length, wanted, expected):
    raw = datasets.Dataset.from_dict({"n": list(range(length))})
    train, held_out = sd.hold_out_rows(raw, wanted)
    assert held_out["n"][:] == expected
    assert train["n"][:] == [i for i in range(length) if i not in expected]


@pytest.mark.parametrize("fields, expected", [
    ({}, (38, 2)),   # there is no validation
    (dict(eval_split="test", eval_samples=4), (40, 4)),
    (dict(eval_split="test", max_samples=7), (7, 6)),
    (dict(max_samples=7), (6, 1)),
    (dict(train_split="test", eval_split="train"), (6, 40)),
    (dict(eval_split="train"), (38, 2)),
    (dict(mode="eval", eval_split="train", eval_samples=5), (0, 5)),   # optional: eval
])
def test_data_splits_by_their_role(tmp_path, fields, expected):
    write_jsonl(tmp_path / "train.jsonl", talk(40))
    write_jsonl(tmp_path / "test.jsonl", talk(6))
    train, held_out = rows_of(tmp_path, seq_len=256, **fields)
    assert (len(train), len(held_out)) == expected


@pytest.mark.parametrize("role", ["train_split", "eval_split"])
@pytest.mark.parametrize("kind", ["folder", "file", "saved"])
def test_data_a_split_that_is_not_there_is_refused_by_its_name(tmp_path, role, kind):
    path = tmp_path
    write_jsonl(tmp_path / "train.jsonl", talk(2))
    if kind == "file":
        path = tmp_path / "train.jsonl"
    if kind == "saved":
        path = tmp_path / "saved"
        datasets.DatasetDict(train=datasets.Dataset.from_list(talk(2))).save_to_disk(path)
    with pytest.raises(config.UserError, match="no split 'test'"):
        rows_of(path, **{role: "test"})


def test_data_one_long_document_is_evaluated_on_blocks_of_its_own(tmp_path):
    (tmp_path / "d.txt").write_text(prose(2000))
    train, held_out = rows_of(tmp_path / "d.txt")
    ids = tiny_tokenizer().encode(prose(2000) + "<|endoftext|>")
    blocks = [ids[i:i + 64] for i in range(0, len(ids), 64)]
    assert sorted(ids_of(train + held_out)) == sorted(blocks)
    assert len(held_out) == len(blocks) // 20
    (tmp_path / "d.txt").write_text("a" * 70)
    assert [len(rows) for rows in rows_of(tmp_path / "d.txt")] == [1, 1]
    (tmp_path / "d.txt").write_text("a" * 60)
    with pytest.raises(config.UserError, match="nothing is left to evaluate on"):
        rows_of(tmp_path / "d.txt")


# ---- what can be wrong with a dataset


@pytest.mark.parametrize("row", [
    {"messages": [{"content": "x"}]}, {"text": 3}, {"text": None, "id": 3}, {"body": "no text"}])
def test_data_a_file_with_nothing_usable_is_refused_by_its_name(tmp_path, row):
    path = write_jsonl(tmp_path / "useless.jsonl", [row] * 9)
    with pytest.raises(config.UserError, match="none of the 8 rows of .*useless.jsonl"):
        rows_of(path)
    if "body" in row:
        assert rows_of(path, text_column="body")[0]


@pytest.mark.parametrize("name, content", [
    ("broken.jsonl", '{"text": \n'), ("empty.jsonl", ""), ("half.parquet", "PAR1"),
    ("saved/state.json", "[]"), ("absent.jsonl", None), ("absent", None),
])
def test_data_whatever_cannot_be_read_is_one_error(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    dataset = tmp_path / Path(name).parts[0] if "/" in name else path
    with pytest.raises(config.UserError, match=f"reading dataset {dataset}: ") as caught:
        rows_of(dataset)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["data[1].jsonl", "data*.jsonl"])
def test_data_names_are_names_and_no_patterns(tmp_path, name):
    write_jsonl(tmp_path / "data1.jsonl", [{"text": "another file"}] * 3)
    train, _ = rows_of(write_jsonl(tmp_path / name, [{"text": "this file"}] * 3))
    assert "this file" in decoded(train)[0]


# ---- batches


@pytest.mark.parametrize("kind", [list, np.array])
def test_data_collate_shifts_before_it_masks_and_positions_restart(kind):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "targets": [False, True, False, True, True],
         "starts": [0, 2]},
        {"input_ids": [1, 2, 3], "targets": [False, False, True], "starts": [0]},
    ]
    rows = [{name: kind(values) for name, values in row.items()} for row in rows]
    batch = sd.collate(rows)
    assert batch.rows is rows
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    assert batch.positions.tolist() == [0, 2, 3, 6]
    assert batch.labels.tolist() == [6, 8, 9, 3]
    assert batch.real.tolist() == list(range(8))
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 2]
    assert batch.position_ids[1, :3].tolist() == [0, 1, 2]
    assert sd.collate(rows[1:]).position_ids is None


def test_data_a_rank_without_rows_gets_a_batch_that_counts_nothing():
    batch = sd.collate([])
    assert batch.rows == []
    assert batch.input_ids.numel() > 0
    assert batch.positions.numel() == batch.labels.numel() == batch.real.numel() == 0


@pytest.mark.parametrize("count, size", [(10, 4), (8, 4), (3, 5)])
def test_data_a_step_knows_its_rows(count, size):
    """An epoch has every row once, in an order of its own."""
    steps = math.ceil(count / size)
    for epoch in (0, 1, 2):
        plain = torch.Generator().manual_seed(7 * 1_000_003 + epoch)
        order = torch.randperm(count, generator=plain).tolist()
        found = [sd.batch_of_step(count, 7, size, epoch * steps + i) for i in range(steps)]
        assert found == [order[i:i + size] for i in range(0, count, size)]


def test_data_ranks_share_the_rows_of_a_step(monkeypatch):
    rows = [{"input_ids": [i, 50], "targets": [False, True], "starts": [0]} for i in range(13)]
    run = types.SimpleNamespace(
        cfg=config.Config(), rows=rows, global_batch=8, micro_steps=2, batch_size=2)
    monkeypatch.setattr(sd, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(sd, "RANK", rank)
        run.progress = types.SimpleNamespace(step=1)   # of a resume: five rows are left there
        batches = sd.my_batches(run)
        for step in (1, 2):
            mine = sd.batch_of_step(13, 0, 8, step)[rank::2]
            micro, _ = next(batches)
            found = [[row["input_ids"][0] for row in batch.rows] for batch in micro]
            assert found == [mine[:2], mine[2:]]


def test_data_prefetch_is_two_ahead_and_in_order():
    made = []

    def numbers():
        for i in range(7):
            made.append(i)
            yield i
        raise ZeroDivisionError

    ahead = sd.prefetch(numbers())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert made == [0, 1, 2, 3, 4]
    assert [next(ahead) for _ in range(4)] == [3, 4, 5, 6]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


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


def test_streaming_a_stream_reads_the_head_of_its_eval_split(tmp_path, monkeypatch):
    """Nothing is prepared whole on disk, and no more is read than eval_samples sequences need."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    train = [{"text": prose(50, i)} for i in range(50)]
    validation = [{"text": prose(50, i)} for i in range(3000)]
    folder = write_splits(tmp_path / "data", train, validation)
    cfg = config.Config(dataset=folder, streaming=True, max_steps=1, eval_samples=5, seq_len=32)
    stream, held_out = sd.split_stream(cfg)
    assert not isinstance(stream, datasets.Dataset)
    assert 5 <= len(held_out) < 20
    assert held_out[0]["text"] == prose(50, 0)
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 5000


def test_streaming_a_short_stream_is_not_held_out_whole(out, student, text):
    """Of its 40 rows, 256 would be held out."""
    distil(out, student=student, dataset=text, alpha=1, streaming=True, max_steps=2)
    assert len(column(out, "train/loss")) == 2


@pytest.mark.parametrize("shuffle_buffer", [0, 3])
def test_streaming_a_stream_trains_on_the_same_rows(tmp_path, teacher, student, chat,
                                                    shuffle_buffer):
    """Three passes over eight rows, eight a step: in whatever order they come, each step is all of
    them."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=256, batch_size=8,
                  max_steps=3, alpha=0.3)
    table = tmp_path / "table"
    stream = tmp_path / "stream"
    distil(table, **fields)
    distil(stream, **fields, streaming=True, shuffle_buffer=shuffle_buffer)
    for key in ("train/loss", "eval/loss"):
        assert column(stream, key) == pytest.approx(column(table, key), rel=1e-6)
    assert distance(final_weights(stream), final_weights(table)) < 1e-5


def test_streaming_a_stream_holds_rows_out_and_needs_max_steps(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    fields = dict(student=student, dataset=path, alpha=1.0, streaming=True)
    assert "max_steps" in distil(out, rc=2, **fields).err
    train, held_out = rows_of(path, streaming=True, eval_samples=10)   # train: raw rows
    trained_on = {re.search(r"<(\d{3})>", row["text"])[1] for row in train}
    assert trained_on
    assert numbers_in(held_out)
    assert not trained_on & numbers_in(held_out)
    distil(out, **fields, eval_samples=10, max_steps=2)


@pytest.mark.parametrize("bos", [False, True])
def test_streaming_stream_of_text_is_the_same_blocks(tmp_path, bos):
    """Unshuffled, the sequences of a stream are those of the table, also across the windows it is
    read in."""
    student = tiny_model(tmp_path / "student", tokenizer=tiny_tokenizer(bos=bos))
    docs = [{"text": prose(5 + i % 7, i)} for i in range(30)]
    path = write_splits(tmp_path / "d", docs, docs[:1])
    every_row = len(rows_of(path, tiny_tokenizer(bos=bos), seq_len=32)[0])
    fields = dict(student=student, dataset=path, alpha=1.0, batch_size=every_row, max_steps=1,
                  learning_rate=STILL)
    table = tmp_path / "table"
    stream = tmp_path / "stream"
    distil(table, **fields)
    distil(stream, **fields, streaming=True, shuffle_buffer=0)
    assert column(table, "train/loss") == pytest.approx(column(stream, "train/loss"), rel=1e-6)


def test_streaming_rows_are_read_by_their_kind_dropped_and_counted(tmp_path, out, student):
    """Also where not every row has every column, and over several windows."""
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "held out"}, *MIXED[1:], MIXED[0]])
    run = distil(out, student=student, dataset=path, alpha=1.0, max_steps=6, seq_len=64,
                 streaming=True, shuffle_buffer=4, eval_samples=1)
    assert "dropped 2 of the first 4 rows" in run.out, run.out
    assert "a message without a role (first '" + path + "', line 3)" in run.out
    assert "type 'image_url' (first '" + path + "', line 5)" in run.out
    assert "no text and no conversation (first '" + path + "', line 7)" in run.out


def bad_streams(folder):
    """-> [(file, the words that its error has to hold)]; all is well with the first 300 rows."""
    good = [{"messages": [user("q"), assistant("a")]}] * 300
    refused = write_jsonl(folder / "refused.jsonl", [*good, SYSTEM_ROW])
    broken = write_jsonl(folder / "broken.jsonl", good)
    with open(broken, "a") as file:
        file.write("{bad\n")
    useless = write_jsonl(folder / "useless.jsonl", [good[0], *[{"id": 1}] * 50])
    return [(refused, "refused.jsonl', line 301: .*no system role"),
            (broken, "broken.jsonl', line 301: "),
            (useless, "useless.jsonl.*no row .* 50 with no text and no conversation")]


def test_streaming_a_bad_row_deep_in_a_stream_is_an_error_that_names_it(tmp_path):
    tokenizer = tiny_tokenizer(NO_SYSTEM + CHATML)
    for path, words in bad_streams(tmp_path):
        cfg = config.Config(dataset=path, streaming=True, max_steps=99, eval_samples=1, seq_len=64)
        with pytest.raises(config.UserError, match=words):
            with contextlib.redirect_stdout(io.StringIO()), sd.process_group():
                stream, _ = sd.load_data(cfg, tokenizer)
                encode_here = sd.make_row_encoder(cfg, tokenizer)
                batches = sd.streamed_batches(stream, path, encode_here, 0, 20, 8, None)
                for _ in range(60):   # more than an epoch
                    next(batches)


def test_streaming_a_resume_finds_the_same_rows_also_of_a_position_without_row_numbers(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", talk(30))
    cfg = config.Config(dataset=path, streaming=True, max_steps=9, seq_len=64)

    def batches(position):
        stream = sd.load_raw(path, None, "train", streaming=True)
        encode_here = sd.make_row_encoder(cfg, tiny_tokenizer())
        return sd.streamed_batches(stream, path, encode_here, 0, 7, 4, position)

    whole = [next(b) for b in [batches(None)] for _ in range(20)]
    for first in (3, 11):
        _, position = whole[first - 1]
        older = {name: value for name, value in position.items() if name != "first_row"}
        for start in (position, older):
            again = batches(start)
            assert [next(again)[0] for _ in range(5)] == [
                rows for rows, _ in whole[first:first + 5]]


def test_streaming_documents_are_packed_within_a_window(tmp_path):
    rows = talk(60)
    path = write_splits(tmp_path / "d", rows, rows[:4])
    apart, held_out = rows_of(path, seq_len=128)
    fields = dict(dataset=path, streaming=True, max_steps=9, seq_len=128, packing="documents")
    cfg = config.Config(**fields)
    with contextlib.redirect_stdout(io.StringIO()), sd.process_group():
        stream, eval_rows = sd.load_data(cfg, tiny_tokenizer())
    assert ids_of(eval_rows) == ids_of(held_out)
    encode_here = sd.make_row_encoder(cfg, tiny_tokenizer())
    seen = []
    for batch, position in sd.streamed_batches(stream, path, encode_here, 0, 20, 1, None):
        if position["epoch"]:
            break
        seen += batch
    assert documents_of(seen) == documents_of(apart)
    assert len(seen) < len(apart) / 1.3


# --------------------------------------------------------------------------------------------------
# Optional: demo: from nothing to a better student.


OTHER_MODELS = ["--teacher", "t", "--student", "s", "--dataset", "d"]


def test_demo_the_demo_decides_only_what_is_left_open(tmp_path):
    """Its defaults fill in for the demo alone, never beside a flag that rules them out."""
    parse = config.parse_config
    assert parse([]).max_steps == 500
    assert parse(["--max_steps", "7", "--num_epochs", "2"]).max_steps == 7
    (tmp_path / "run.yaml").write_text("num_epochs: 2\n")
    for words in (
        ["--num_epochs", "2"],
        ["--num-epochs=1"],
        ["--config", str(tmp_path / "run.yaml")],
        ["--blockwise", "--num_epochs", "0"],   # optional: blockwise
    ):
        assert parse(words).max_steps is None, words
    assert parse(OTHER_MODELS).seq_len == 512
    eval_words = ["--mode", "eval"]   # optional: eval
    assert parse(eval_words).seq_len == 128   # optional: eval
    assert parse([*eval_words, "--student", "s"]).seq_len == 128   # optional: eval
    with_others = [*eval_words, "--teacher", "t", "--dataset", "d"]   # optional: eval
    assert parse(with_others).seq_len == 512   # optional: eval
    config_json_says_it_again(tmp_path)


def config_json_says_it_again(folder):
    path = str(folder / "config.json")
    for words in (
        [],
        ["--num_epochs", "2"],
        ["--blockwise", "--train_lm_head", "false"],   # optional: blockwise
        ["--blockwise", "--num_epochs", "0"],   # optional: blockwise
        ["--lr_scheduler", "constant"],
        ["--mode", "cache", "--cache_dir", "c", "--cache_method", "topk"],   # optional: cache
        ["--mode", "eval"],   # optional: eval
        [   # optional: streaming
            *OTHER_MODELS, "--streaming", "--max_steps", "2", "--shuffle_buffer", "3"],
    ):
        cfg = config.parse_config(words)
        sd.write_json(cfg, path)
        assert config.parse_config(["--config", path]) == cfg, words
        if cfg.mode == "train":   # as mode eval does with a checkpoint: nothing in it is refused
            config.Config(**config.result_knobs(cfg))


def test_demo_is_not_named_where_nobody_typed_it(tmp_path, text):
    """Labels only, with a student that brings no tokenizer: there is no teacher that could."""
    shape = tmp_path / "shape.json"
    shape.write_text(tiny_config().to_json_string())
    refused = distil(tmp_path / "out", rc=2, student=shape, dataset=text, alpha=1).err
    assert f"no tokenizer comes with student '{shape}'; use --tokenizer" in refused
    assert "demo" not in refused.replace(str(tmp_path), "")


def test_demo_says_for_what_it_stands_in(capsys):
    """Where one model was named and the other left out; the demo itself says nothing of it."""
    files = dict(teacher="/demo/teacher", student="/demo/student", dataset="/demo/corpus")
    sd.say_what_is_the_demos(config.parse_config([]), files)
    assert capsys.readouterr().out == ""
    cfg = config.parse_config(["--student", "s", "--dataset", "d"])
    sd.say_what_is_the_demos(cfg, {"teacher": "/demo/teacher"})
    assert capsys.readouterr().out == "no --teacher given: it is the demo's, /demo/teacher\n"


@pytest.mark.parametrize("words, answered", [
    ([], True),
    (["--seed", "3", "--save_steps", "7", "--output_dir", "o"], True),
    (["--max_steps", "2"], False),
    (["--alpha", "0.1"], False),
    (["--batch_size", "4"], False),
    (["--blockwise"], False),   # optional: blockwise
], ids=str)
def test_demo_only_the_demo_itself_is_answered(words, answered):   # optional: eval
    cfg = config.parse_config(words)
    assert sd.is_whole_demo(cfg)
    assert sd.has_demo_knobs(cfg) == answered
    assert not sd.is_whole_demo(config.parse_config([*words, "--dry_run"]))


def test_demo_trains_the_same_on_labels_alone_and_says_whether_the_teacher_paid(   # optional: eval
        tmp_path, teacher, student, text):
    """The control is the run with --alpha 1, and what is done is not trained again."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "max_steps": 4,
              "eval_steps": 2, "seed": 5}
    out = str(tmp_path / "out")
    control = f"{out}/labels-only"
    distil(out, **fields)
    distil(tmp_path / "alone", **fields, alpha=1)
    cfg = config.Config(**fields, output_dir=out, use_wandb=False)
    answers = []
    for _ in range(2):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), sd.process_group():
            assert sd.answer_demo(cfg)
        answers.append(shown.getvalue())
    assert same(final_weights(control), final_weights(tmp_path / "alone"))
    assert quiet_log(control) == quiet_log(tmp_path / "alone")
    assert "done in" in answers[0]
    assert "done in" not in answers[1] and "finished at step 4" in answers[1]
    models = json.loads(Path(out, "report.json").read_text())["models"]
    assert list(models) == ["teacher", "student", "labels-only"]
    with_teacher, alone = [column(folder, "eval/perplexity")[-1] for folder in (out, control)]
    line = answers[0].strip().splitlines()[-1]
    assert line == answers[1].strip().splitlines()[-1]
    low, high = models["labels-only"]["student_against_it"]["interval"]
    for figure in (f"perplexity {with_teacher:.2f}, on labels alone {alone:.2f} ",
                   "after the same 4 steps", f"95 %: {low:+.4f} to {high:+.4f}"):
        assert figure in line, line


def test_demo_says_truthfully_whether_the_teacher_paid():   # optional: eval
    """Two students' bits a byte on 50 sequences, judged as mode eval does."""
    rng = np.random.default_rng(0)
    sizes = np.full(50, 100.0)
    for lead, says in ((-20, "The teacher paid:"), (20, "The teacher did not pay:"),
                       (0, "Whether the teacher paid, this run cannot tell:")):
        bits = rng.normal(lead, 5, 50)
        bits += lead - bits.mean()
        verdict = sd.judge_difference(bits, sizes, seed=0)
        line = sd.did_teacher_pay(
            {"perplexity": 40.0}, {"perplexity": 50.0, "student_against_it": verdict}, 500)
        assert line.startswith(says)
        assert f" {lead / 100:+.4f} bits a byte" in line
        assert "\n" not in line


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
    made = {path.name for path in tmp_path.glob("home/simple_distill/demo-*/*")}
    assert made == {"corpus", "tokenizer", "student", "teacher-shape"}


@pytest.mark.campaign
def test_demo_from_nothing_to_a_better_student(out, tmp_path):
    """Distilling beats labels alone at the same steps; output_dir holds only what the run made, and
    a second demo finds files and teacher of the first."""
    shown = run_the_demo(out, tmp_path / "home")
    assert "first the teacher" in shown
    assert shown.strip().splitlines()[-1].startswith("The teacher paid: ")   # optional: eval
    knobs = json.loads(Path(out, "config.json").read_text())
    for name in ("teacher", "student", "dataset"):
        assert knobs[name].startswith(str(tmp_path / "home"))
    assert not os.path.exists(f"{out}/demo")
    assert os.path.exists(f"{out}/report.png")   # optional: eval
    again = run_the_demo(out, tmp_path / "home")   # optional: eval
    assert "done in" not in again   # optional: eval
    assert again.splitlines()[-1] == shown.splitlines()[-1]   # optional: eval
    short = run_the_demo(f"{out}-again", tmp_path / "home", "--max_steps", 2)
    assert "first the teacher" not in short
    assert "The teacher paid" not in short   # optional: eval
    run_the_demo(f"{out}-labels", tmp_path / "home", "--alpha", 1)
    assert column(out, "eval/perplexity")[-1] < column(f"{out}-labels", "eval/perplexity")[-1]
    draws_point_the_right_way(out)   # optional: cache


def draws_point_the_right_way(out):   # optional: cache
    """Measured: 7.6 and 12.3 degrees (at the end there is little gradient left); top 12: 44, 62."""
    for step, limit in ((250, 10), (500, 15)):
        full, sampled, top = gradients_of_a_cache(out, step)
        print(f"step {step}: {angle(full, sampled):.1f} degrees from 50 draws, "
              f"{angle(full, top):.1f} from the top 12")
        assert angle(full, sampled) < limit < 30 < angle(full, top)


def angle(a, b):   # optional: cache
    cosine = float(a @ b / a.norm() / b.norm())
    return math.degrees(math.acos(min(1.0, cosine)))


def gradients_of_a_cache(out, step):   # optional: cache
    """Gradients of the student's KL at a checkpoint, on 64 held-out sequences of the demo (8,128
    targets): from the whole teacher, from 50 draws, from the top 12 renormalised."""
    knobs = json.loads(Path(out, "config.json").read_text())
    teacher = load(knobs["teacher"])
    student = load(f"{out}/final")
    trained = {name.removeprefix("model.model."): tensor
               for name, tensor in checkpoint(out, step).items() if name.startswith("model.model.")}
    student.load_state_dict(trained, strict=False)   # the tied head is not among them
    validation = os.path.join(knobs["dataset"], "validation.jsonl")
    ids = first_sequences(out, validation, count=64, length=128)
    rows = [{"input_ids": sequence.numpy(), "targets": None} for sequence in ids]
    positions = sd.collate(rows).positions
    with torch.no_grad():
        hidden = teacher.base_model(ids)[0].flatten(0, 1)[positions]
        head = sd.head_of(teacher)
    gradients_found = []
    for targets in ((hidden, head), targets_of_draws(hidden, head, rows), top_12(hidden, head)):
        student.zero_grad()
        states = student.base_model(ids)[0].flatten(0, 1)[positions]
        labels = ids.flatten()[positions + 1]
        loss = sd.distillation_loss(
            states, sd.head_of(student), labels, targets, alpha=0.0, temperature=1.0)[0]
        loss.backward()
        flat = [parameter.grad.flatten() for parameter in student.parameters()]
        gradients_found.append(torch.cat(flat).double())
    return gradients_found


def first_sequences(out, path, count, length):   # optional: cache
    """The first held-out documents of the demo that are long enough -> ids [count, length]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    sequences = []
    for row in read_lines(path):
        ids = tokenizer(row["text"])["input_ids"][:length]
        if len(ids) == length:
            sequences.append(ids)
    return torch.tensor(sequences[:count])


def targets_of_draws(hidden, head, rows):   # optional: cache
    """50 draws a target, through the cache's bytes and back."""
    manifest = _cache_manifest(len(head.weight), "sample", 50)
    packed = sd.pack_teacher(lambda batch: (hidden, head), rows, 0, manifest)
    sparse = []
    for data, counts in packed:
        row = sd.unpack_row(data, counts.tokens, counts.targets, counts.entries, manifest)
        sparse.append(row["sparse"])
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*sparse)]
    return sd.SparseTarget(*columns)


def top_12(hidden, head):   # optional: cache
    """Of the whole distribution, renormalised: nothing is left for all other tokens."""
    with torch.no_grad():
        logp = torch.log_softmax(hidden @ head.weight.T, -1)
        largest, ids = logp.topk(12)
        nothing = torch.zeros(len(ids))
        return sd.SparseTarget(ids, torch.softmax(largest, -1), nothing, nothing.clone())


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


def test_cache_of_blocks_without_the_tokenizers_bos_is_refused(tmp_path, text):
    """A cache has them, one of a version before is neither filled on nor trained from; where the
    tokenizer has no BOS, the manifest is that of old."""
    cache = tmp_path / "cache"
    model = tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer(bos=True))
    fill_cache(model, text, cache)
    train_from_cache(model, cache, tmp_path / "out")
    manifest = sd.read_manifest(str(cache))
    rows = sd.CacheRows(str(cache), "train", manifest)
    for i in range(len(rows)):
        assert rows[i]["input_ids"][0] == manifest["bos"] == 1
    del manifest["bos"]
    sd.write_manifest(manifest, str(cache))
    refused = train_from_cache(model, cache, tmp_path / "late", 2).err
    assert "BOS" in refused and "--force_regenerate" in refused
    refused = fill_cache(model, text, cache, 2).err
    assert "bos" in refused and "--force_regenerate" in refused
    fill_cache(model, text, cache, force_regenerate=True)
    train_from_cache(model, cache, tmp_path / "again")

    plain = tiny_model(tmp_path / "plain")
    fill_cache(plain, text, tmp_path / "plain_cache")
    assert "bos" not in sd.read_manifest(str(tmp_path / "plain_cache"))


def parse_cache_run(student, cache_dir):
    return sd.parse_config(flags(student=student, cache_dir=cache_dir, seq_len=32))


def chunk_files(cache_dir):
    """The bytes of every chunk by its name."""
    paths = sorted(Path(cache_dir).glob("*.safetensors"))
    return {path.name: path.read_bytes() for path in paths}


def read_manifest(cache_dir):
    return json.loads(Path(cache_dir, "manifest.json").read_text())


# ---- what is kept of a token


def made_up_teacher(vocab, tokens, seed=0, sharp=3.0):
    """-> hidden states, head, and the distribution that they make [N, V], in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 24, generator=generator)
    weight = torch.randn(vocab, 24, generator=generator) * sharp / 24 ** 0.5
    probs = (hidden.double() @ weight.double().T).softmax(-1)
    return hidden, sd.Head(weight), probs


def _cache_manifest(vocab, method, size, seed=0, temperature=1.0):
    """What of a manifest packing depends on."""
    id_bits = (vocab - 1).bit_length()
    if method == "topk":
        bits = [id_bits, 8, 0]
    else:
        bits = [id_bits, (size - 1).bit_length(), 12]
    return dict(vocabulary=vocab, method=method, size=size, seed=seed, temperature=temperature,
                bits=bits)


def pack_and_unpack(hidden, head, method, size, seed=0, temperature=1.0):
    """One row, through its bytes and back -> SparseTarget, number of bytes, RowCounts."""
    vocab = len(head.weight)
    manifest = _cache_manifest(vocab, method, size, seed, temperature)
    row = {"input_ids": np.arange(len(hidden) + 1) % vocab, "targets": None}
    [(data, counts)] = sd.pack_teacher(lambda batch: (hidden, head), [row], 7, manifest)
    unpacked = sd.unpack_row(data, counts.tokens, counts.targets, counts.entries, manifest)
    assert (unpacked["input_ids"] == row["input_ids"]).all()
    assert unpacked["targets"].all()
    assert counts.targets == len(hidden)
    sparse = sd.SparseTarget(*[torch.from_numpy(array) for array in unpacked["sparse"]])
    return sparse, len(data), counts


@pytest.mark.parametrize("vocab", [2, 300, 32000, 151936])
def test_cache_topk_is_what_the_teacher_says(vocab):
    for size in {min(64, vocab), min(300, vocab)}:
        hidden, head, probs = made_up_teacher(vocab, 40)
        sparse, length, _ = pack_and_unpack(hidden, head, "topk", size)
        top = probs.topk(size).values
        assert len(set(sparse.ids[3].tolist())) == size
        assert (probs.gather(-1, sparse.ids) - top).abs().max() < 1e-6
        # the common rescaling at most doubles the rounding
        bound = 2 * (0.0193 * (-top.log()).sqrt() + 1e-4)
        close = (sparse.probs.double().log() - top.log()).abs() < bound
        assert close[top > 1e-9].all()
        assert (sparse.probs.sum(-1) + sparse.rest - 1).abs().max() < 1e-5
        assert (sparse.rest - (1 - top.sum(-1))).abs().max() < 0.02
        if vocab == 151936 and size == 64:
            assert length / 41 <= 230   # bytes a token
        listed = sparse.probs.double()
        entropy = -(listed * listed.log()).nansum(-1)
        entropy -= torch.special.xlogy(sparse.rest, sparse.rest)
        assert (sparse.entropy - entropy).abs().max() < 1e-5


@pytest.mark.parametrize("vocab,size", [
    (2, 1), (300, 50), (32000, 64), (151936, 50), (151936, 255)])
def test_cache_samples_are_counted_and_small(vocab, size):
    hidden, head, probs = made_up_teacher(vocab, 200)
    sparse, length, counts = pack_and_unpack(hidden, head, "sample", size)
    # an id stands as often as it was drawn
    assert torch.allclose(sparse.probs, torch.full((200, size), 1 / size))
    assert (sparse.rest == 0).all()
    assert sum(len(set(ids.tolist())) for ids in sparse.ids) == counts.entries
    entropy_of_draws = -(sparse.probs * probs.gather(-1, sparse.ids).log()).sum(-1)
    assert (sparse.entropy - entropy_of_draws).abs().max() < 0.0021   # half of 1/256 nat
    # ... which is the teacher's entropy on average
    entropy = -(probs * probs.log()).sum(-1)
    assert abs(entropy_of_draws.mean() - entropy.mean()) < 4 / size ** 0.5
    if (vocab, size) == (151936, 50):
        assert length <= 3 * counts.entries + 4 * 201


def test_cache_same_model_logs_no_kl():
    hidden, head, _ = made_up_teacher(300, 200)
    labels = torch.zeros(200, dtype=torch.long)
    for method, size in (("sample", 50), ("topk", 12), ("topk", 300)):
        sparse, _, _ = pack_and_unpack(hidden, head, method, size)
        _, _, kl = sd.distillation_loss(hidden, head, labels, sparse, alpha=0.0, temperature=1.0)
        assert abs(kl) < 1e-3, (method, size, kl)
    # nor is the KL of what is listed and the rest ever negative, whatever the student says
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    student_logits = hidden @ (head.weight + 0.3 * noise).T
    for size in (1, 12, 64):
        sparse, _, _ = pack_and_unpack(hidden, head, "topk", size)
        _, kl_of_tokens, *_ = sd.chunk_terms(
            student_logits.clone(), labels, sparse, alpha=0.0, temperature=1.0,
            divergence="forward", student_scaling=(1.0, None), teacher_scaling=(1.0, None))
        assert (kl_of_tokens > -1e-5).all()


def kl_gradient(hidden, student_weight, target, temperature):
    """Of the student's head."""
    weight = student_weight.clone().requires_grad_()
    labels = torch.zeros(len(hidden), dtype=torch.long)
    loss, _, _ = sd.distillation_loss(
        hidden, sd.Head(weight), labels, target, alpha=0.0, temperature=temperature)
    loss.backward()
    return weight.grad.double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cache_sample_gradient_is_unbiased(temperature):
    """The mean of n comes nearer to the whole teacher's as 1/sqrt(n); a bias would stay."""
    hidden, head, _ = made_up_teacher(300, 60)
    student_weight = torch.randn(300, 24, generator=torch.Generator().manual_seed(5)) * 0.3
    whole = kl_gradient(hidden, student_weight, (hidden, head), temperature)
    sampled = []
    for seed in range(256):
        sparse, _, _ = pack_and_unpack(hidden, head, "sample", 20, seed, temperature)
        sampled.append(kl_gradient(hidden, student_weight, sparse, temperature))
    errors = {}
    for n in (1, 4, 16, 64):
        means = torch.stack(sampled).view(256 // n, n, *whole.shape).mean(1)
        errors[n] = float((means - whole).norm(dim=(1, 2)).mean() / whole.norm())
    for n in (4, 16, 64):
        assert abs(errors[n] / errors[1] * n ** 0.5 - 1) < 0.25, errors


# ---- training from it


def test_cache_topk_of_everything_trains_like_online(teacher, student, cache_text, tmp_path):
    vocab = len(tiny_tokenizer())
    cache = tmp_path / "cache"
    cached = tmp_path / "cached"
    online = tmp_path / "online"
    fill_cache(teacher, cache_text, cache, cache_method="topk", cache_top_k=vocab)
    train_from_cache(student, cache, cached)
    train_from_cache(student, None, online, teacher=teacher, dataset=cache_text)
    for entry, expected in zip(log(cached), log(online), strict=True):
        kind = "train" if "train/loss" in entry else "eval"
        assert abs(entry[f"{kind}/kl_loss"] - expected[f"{kind}/kl_loss"]) < 1e-3
        assert abs(entry[f"{kind}/ce_loss"] - expected[f"{kind}/ce_loss"]) < 5e-3
    moved = distance(weights(student), final_weights(online))
    apart = distance(final_weights(cached), final_weights(online))
    assert apart < 0.05 * moved, (apart, moved)


def test_cache_of_packed_documents_trains_like_online(teacher, student, tmp_path):
    """It knows where each begins. The packing of a cache is its own: another is refused."""
    rows = talk(60)
    data = write_splits(tmp_path / "d", rows, rows[:8])
    packed = dict(seq_len=128, packing="documents")
    cache = tmp_path / "cache"
    cached = tmp_path / "cached"
    online = tmp_path / "online"
    shown = fill_cache(teacher, data, cache, cache_method="topk",
                       cache_top_k=len(tiny_tokenizer()), **packed).out
    manifest = sd.read_manifest(str(cache))
    assert manifest["packing"] == "documents"
    projected = re.search(r"([\d.]+) GB to write", shown)[1]
    written = sum(path.stat().st_size for path in cache.glob("*.safetensors"))
    assert float(projected) == pytest.approx(written / 1e9, rel=0.2, abs=6e-4)
    kept = sd.CacheRows(str(cache), "train", manifest)
    there, held_out = rows_of(data, **packed)
    for i, row in enumerate(there):
        for name in ("input_ids", "targets", "starts"):
            assert (kept[i][name] == row[name]).all(), name
    assert "starts" not in sd.CacheRows(str(cache), "eval", manifest)[0]

    shown = train_from_cache(student, cache, cached, seq_len=None).out
    assert "which sets seq_len 128 and temperature 1.0 and packing documents" in shown
    assert ", whole documents packed |" in read_card(cached).text
    train_from_cache(student, None, online, teacher=teacher, dataset=data, **packed)
    for entry, expected in zip(log(cached), log(online), strict=True):
        kind = "train" if "train/loss" in entry else "eval"
        assert abs(entry[f"{kind}/kl_loss"] - expected[f"{kind}/kl_loss"]) < 1e-3
        assert abs(entry[f"{kind}/ce_loss"] - expected[f"{kind}/ce_loss"]) < 5e-3
    moved = distance(weights(student), final_weights(online))
    assert distance(final_weights(cached), final_weights(online)) < 0.05 * moved

    refused = train_from_cache(student, cache, tmp_path / "out", 2, seq_len=128, packing="rows")
    assert "packing 'documents' there, 'rows' here" in refused.err
    for packing in ("rows", "auto"):
        refused = fill_cache(teacher, data, cache, 2, seq_len=128, packing=packing,
                             cache_method="topk", cache_top_k=len(tiny_tokenizer()))
        assert f"packing 'documents' there, '{packing}' here" in refused.err
    other = tmp_path / "other"
    fill_cache(teacher, data, other, seq_len=128)
    assert "packing" not in read_manifest(other)   # as those of before
    refused = train_from_cache(student, other, tmp_path / "out", 2, **packed)
    assert "packing 'auto' there, 'documents' here" in refused.err


def test_cache_is_the_dataset(teacher, student, chat, tmp_path):
    """Teacher and data are gone; a mask of assistant tokens, resume and a final tokenizer work all
    the same."""
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    data = shutil.copytree(chat, tmp_path / "chat")
    cache = tmp_path / "cache"
    out = tmp_path / "out"
    fill_cache(teacher, data, cache, cache_chunk=4)
    shutil.rmtree(teacher)
    shutil.rmtree(data)
    rows, eval_rows, _, manifest = sd.open_cache(parse_cache_run(student, cache))
    assert len(rows) + len(eval_rows) == manifest["rows"]
    assert 0 < manifest["mass_kept"] <= 1
    first_targets = rows[0]["targets"][1:].sum()
    for i in (0, 3, 4, len(rows) - 1):   # both sides of a chunk's end
        batch = sd.collate([rows[i], rows[0]])
        targets = rows[i]["targets"][1:].sum() + first_targets
        assert len(batch.sparse.ids) == len(batch.labels) == targets > 0
        assert not rows[i]["targets"].all()
    train_from_cache(student, cache, out, save_steps=3)
    assert (out / "final/tokenizer.json").exists()
    before = quiet_log(out)
    moved = shutil.move(cache, tmp_path / "moved")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-00000006")
    train_from_cache(student, moved, out, save_steps=3)
    assert quiet_log(out) == before


def test_cache_refuses_what_does_not_fit(teacher, student, cache_text, tmp_path):
    cache = tmp_path / "cache"
    fill_cache(teacher, cache_text, cache)
    other_tokenizer = tiny_tokenizer(roll=1)
    other_teacher = tiny_model(tmp_path / "other_teacher", tokenizer=other_tokenizer)
    other_student = tiny_model(tmp_path / "other_student", hidden=16, tokenizer=other_tokenizer)
    small = tiny_model(tmp_path / "small", vocab=260, hidden=16, tokenizer=False)
    training = [
        (dict(temperature=2), "1.0 .*2.0"),
        (dict(seq_len=64), "32 .*64"),
        (dict(teacher=other_teacher), "cache.*other_teacher"),
        (dict(student=other_student), "different tokenizers: token"),
        (dict(student=small), "262.*260"),
        (dict(cache_dir=tmp_path / "none"), "none"),
    ]
    for fields, message in training:
        fields = {"student": student, "cache_dir": cache, **fields}
        refused = train_from_cache(out=tmp_path / "out", rc=2, **fields)
        assert re.search(message, refused.err), (fields, message, refused.err)
    filling = [
        (dict(temperature=2), "1.0 .*2.0"),
        (dict(cache_samples=9), "50 .*9"),
        (dict(teacher=student), "weights"),
    ]
    for fields, message in filling:
        fields = {"teacher": teacher, **fields}
        refused = fill_cache(dataset=cache_text, cache_dir=cache, rc=2, **fields)
        assert re.search(message, refused.err), (fields, message, refused.err)
    forced = fill_cache(teacher, cache_text, cache, temperature=2, force_regenerate=True)
    assert "WARNING" in forced.out
    assert read_manifest(cache)["temperature"] == 2


def test_cache_has_decided_the_data(teacher, student, cache_text, tmp_path):
    """What it has decided may be said again, not otherwise."""
    cache = tmp_path / "cache"
    out = tmp_path / "out"
    fill_cache(teacher, cache_text, cache)
    other = f"{cache_text}.other.jsonl"
    for name, value in (("dataset", other), ("text_column", "body"), ("max_samples", 3)):
        refused = train_from_cache(student, cache, out, rc=2, **{name: value})
        message = f"error: .*{name} .* there, .*{value}.* here"
        assert re.search(message, refused.err, re.IGNORECASE), refused.err
    refused = train_from_cache(student, cache, out, 2, streaming=True)   # optional: streaming
    message = "error: cache_dir .* drop --streaming"   # optional: streaming
    assert re.search(message, refused.err)   # optional: streaming
    decided = json.loads((cache / "config.json").read_text())["dataset"]
    shown = train_from_cache(student, cache, out, eval_samples=3, dataset=decided).out
    assert "; 3 held out" in shown
    assert not (out / "demo").exists()
    again = tmp_path / "again"
    cli("--config", out / "config.json", "--output_dir", again)
    assert column(again, "train/loss") == column(out, "train/loss")


def test_cache_stands_in_the_model_card(teacher, student, cache_text, tmp_path):
    """Whose targets they are, and what is kept of them."""
    cache = tmp_path / "cache"
    out = tmp_path / "out"
    fill_cache(teacher, cache_text, cache, cache_method="topk", cache_top_k=7)
    train_from_cache(student, cache, out)
    card = read_card(out)
    assert f"| teacher | {Path(teacher).name}, kept as its 7 likeliest tokens |" in card.text
    assert f"| data | {Path(cache_text).name}, split train" in card.text
    assert str(tmp_path) not in card.content


def test_cache_sets_what_is_not_typed(teacher, student, cache_text, tmp_path):
    """seq_len and temperature are the cache's, the plan says so, and the run is that of both
    typed."""
    cache = tmp_path / "cache"
    typed = tmp_path / "typed"
    untyped = tmp_path / "untyped"
    again = tmp_path / "again"
    fill_cache(teacher, cache_text, cache, temperature=2)
    shown = train_from_cache(student, cache, typed, temperature=2).out
    assert f"teacher: cache {cache}\n" in shown
    shown = train_from_cache(student, cache, untyped, seq_len=None).out
    assert f"teacher: cache {cache}, which sets seq_len 32 and temperature 2.0\n" in shown
    saved = json.loads((untyped / "config.json").read_text())
    assert (saved["seq_len"], saved["temperature"]) == (32, 2.0)
    cli("--config", untyped / "config.json", "--output_dir", again)
    losses = column(typed, "train/loss")
    assert len(losses) == 6
    assert column(untyped, "train/loss") == losses
    assert column(again, "train/loss") == losses


def test_cache_leaves_what_is_typed(teacher, student, cache_text, tmp_path):
    """A default that is typed is typed."""
    cache = tmp_path / "cache"
    fill_cache(teacher, cache_text, cache, temperature=2)
    words = flags(student=student, cache_dir=cache, temperature=3)
    for given, seq_len in (({"seq_len", "temperature"}, 512), ({"temperature"}, 32)):
        cfg = sd.parse_config(words)
        cfg.given = frozenset(given)
        taken = sd.take_from_cache(cfg)
        assert (taken.seq_len, taken.temperature) == (seq_len, 3.0)
        assert taken.given == given
        with pytest.raises(sd.UserError, match="temperature 2.0 there, 3.0 here"):
            sd.open_cache(taken)


# ---- damage, full disks, many workers


def unreadable_rows(cfg):
    """How many rows of the second chunk are refused, with its name."""
    rows = sd.open_cache(cfg)[0]
    refused = 0
    for i in range(16, 32):
        try:
            rows[i]
        except sd.UserError as e:
            refused += "train-00000001" in str(e)
    return refused


def test_cache_damage_is_found_and_mended(teacher, student, cache_text, tmp_path):
    """A chunk cut short, or with a single bit flipped anywhere, is refused by name; the command
    that the message gives makes it, and only it, again."""
    cache = tmp_path / "a cache"
    fill_cache(teacher, cache_text, cache)
    whole = chunk_files(cache)
    path = cache / "train-00000001.safetensors"
    data = path.read_bytes()
    cfg = parse_cache_run(student, cache)
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(sd.UserError, match="train-00000001"):
            sd.open_cache(cfg)[0][16]

    body = 8 + int.from_bytes(data[:8], "little")   # where safetensors' header ends
    header = json.loads(data[8:body])
    table_begin, table_end = header["table"]["data_offsets"]
    draw = np.random.default_rng(0)
    positions = [
        *draw.integers(0, body, 20),
        *draw.integers(body + table_begin, body + table_end, 20),
        *draw.integers(body, len(data), 20)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        assert unreadable_rows(cfg) > 0, position

    epoch = math.ceil(len(sd.open_cache(cfg)[0]) / 8)   # every row is read
    refused = train_from_cache(student, cache, tmp_path / "out", rc=2, max_steps=epoch)
    remove, again = re.search("again: (.*)", refused.err)[1].split("; ")
    os.remove(shlex.split(remove)[1])
    assert sd.main(shlex.split(again)[2:]) == 0   # less `python simple_distill.py`
    assert chunk_files(cache) == whole


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

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = cache_words(teacher, data, cache, cache_chunk=64)
    process = spawn(*words, nproc=ranks, preexec_fn=limit_files)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 2, shown
    assert "error: cache_dir" in shown
    assert "Traceback" not in shown
    kept = chunk_files(cache)
    assert 0 < len(kept) < len(whole)
    assert all(whole[name] == content for name, content in kept.items())
    process = spawn(*words, nproc=ranks)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert chunk_files(cache) == whole


@pytest.mark.parametrize("fields", [
    {},
    dict(streaming=True),   # optional: streaming
])
def test_cache_is_the_same_in_pieces(teacher, cache_text, tmp_path, fields):
    whole = tmp_path / "whole"
    pieces = tmp_path / "pieces"
    fill_cache(teacher, cache_text, whole, **fields)
    chunks = chunk_files(whole)
    assert len(chunks) > 4
    shutil.copytree(whole, pieces)
    for name in list(chunks)[::2]:
        os.remove(pieces / name)
    first = list(chunks)[0]
    (pieces / f"{first}.tmp").write_bytes(b"half")   # what a dead worker left
    fill_cache(teacher, cache_text, pieces, **fields)
    assert chunk_files(pieces) == chunks
    assert read_manifest(pieces) == read_manifest(whole)


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
    assert read_manifest(cache)["chunks"] == {"train": [0, 16, 8], "eval": [8]}
    rows = sd.open_cache(parse_cache_run(student, cache))[0]
    assert len(rows) == 24
    assert all(len(rows[i]["input_ids"]) < 20 for i in range(24))
    train_from_cache(student, cache, tmp_path / "out")


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
    assert read_manifest(cache) == read_manifest(whole)
    for ranks in (2, 3):
        by_ranks = tmp_path / f"ranks{ranks}"
        process = spawn(*cache_words(teacher, data, by_ranks), nproc=ranks)
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, shown
        assert chunk_files(by_ranks) == chunk_files(whole)


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


# ---- whose it is, and what of it is damaged


def cache_of(source, path, manifest=None):
    """A copy of a cache; manifest: what its manifest.json holds instead, as text."""
    shutil.copytree(source, path)
    if manifest is not None:
        (path / "manifest.json").write_text(manifest)
    return path


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory, teacher, cache_text):
    """Not to be changed: see cache_of."""
    cache = tmp_path_factory.mktemp("cache") / "full"
    fill_cache(teacher, cache_text, cache)
    return cache


def mend(message):
    """Does what the message says."""
    remove, command = re.search("again: (.*)", message)[1].split("; ")
    os.remove(shlex.split(remove)[1])
    assert sd.main(shlex.split(command)[2:]) == 0   # less `python simple_distill.py`


def test_cache_a_foreign_chunk_is_refused(full_cache, teacher, student, cache_text, tmp_path):
    """Of another temperature, one twice, two swapped, train in place of eval: by who reads it, and
    by mode cache, which would take it for its own; the command that is named mends it."""
    warm = tmp_path / "warm"
    fill_cache(teacher, cache_text, warm, temperature=2)
    chunks = chunk_files(full_cache)
    first, second, *_ = [name for name in chunks if name.startswith("train")]
    cases = {
        "temperature": {second: chunk_files(warm)[second]},
        "twice": {second: chunks[first]},
        "swapped": {first: chunks[second], second: chunks[first]},
        "eval": {"eval-00000000.safetensors": chunks[first]},
    }
    for case, files in cases.items():
        cache = cache_of(full_cache, tmp_path / case)
        for name, content in files.items():
            (cache / name).write_bytes(content)
        rows, eval_rows, *_ = sd.open_cache(parse_cache_run(student, cache))
        read = eval_rows if case == "eval" else rows
        with pytest.raises(sd.UserError, match="it is .* of cache .*, not .* of cache .*again: rm"):
            read[0 if case in ("eval", "swapped") else 16]
        for _ in files:   # mode cache names them one after the other
            refused = fill_cache(teacher, cache_text, cache, rc=2).err
            mend_by_hand = re.search("again: rm ([^;]*);", refused)[1]
            assert os.path.basename(mend_by_hand) in files
            os.remove(mend_by_hand)
        fill_cache(teacher, cache_text, cache)
        assert chunk_files(cache) == chunks


def test_cache_knows_every_row_and_every_kind_of_weights(full_cache, teacher, cache_text, tmp_path):
    """One letter of one row in the middle; one weight of a teacher that has only .bin files."""
    cache = cache_of(full_cache, tmp_path / "cache")
    for i in (50, 51, 52):
        rows = cache_rows(100)
        rows[i]["text"] = rows[i]["text"][:-1] + "Q"
        edited = write_jsonl(tmp_path / f"{i}.jsonl", rows)
        refused = fill_cache(teacher, edited, cache, rc=2).err
        assert "dataset_fingerprint" in refused

    digests = set()
    for seed in (0, 1):
        folder = tmp_path / f"bin{seed}"
        path = tiny_model(folder, seed=seed)
        torch.save(weights(path), folder / "pytorch_model.bin")
        os.remove(folder / "model.safetensors")
        digests.add(sd.identify_weights(path))
    assert len(digests) == 2


CODE_IN_TOKENIZER = """
import os
open(os.environ["TOKENIZER_CODE_RAN"], "w").close()
from transformers import PreTrainedTokenizerFast
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_cache_runs_no_code_of_a_tokenizer_unless_allowed(full_cache, student, tmp_path,
                                                          monkeypatch):
    """Nothing prompts; the flag of this run decides."""
    ran = tmp_path / "ran"
    monkeypatch.setenv("TOKENIZER_CODE_RAN", str(ran))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it prompts"))
    cache = cache_of(full_cache, tmp_path / "cache")
    settings = cache / "tokenizer/tokenizer_config.json"
    values = json.loads(settings.read_text())
    values |= dict(auto_map={"AutoTokenizer": [None, "code.Tokenizer"]},
                   tokenizer_class="Tokenizer")
    settings.write_text(json.dumps(values))
    (cache / "tokenizer/code.py").write_text(CODE_IN_TOKENIZER)
    refused = train_from_cache(student, cache, tmp_path / "out", rc=2)
    assert "tokenizer_config.json is not what was written" in refused.err
    manifest = read_manifest(cache)   # as a stranger would make it fit
    del manifest["digest"]
    manifest["tokenizer_files"]["tokenizer_config.json"] = sd.checksum(settings)
    sd.write_manifest(manifest, cache)
    refused = train_from_cache(student, cache, tmp_path / "out", rc=2)
    assert "--trust_remote_code" in refused.err
    assert not ran.exists()
    sd.open_cache(sd.parse_config(flags(
        student=student, cache_dir=cache, seq_len=32, trust_remote_code=True)))
    assert ran.exists()


def contents(folder):
    """{path: bytes} of all files below."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_cache_touches_nothing_of_others(full_cache, teacher, cache_text, tmp_path):
    """A model's directory, also by another spelling, and one whose weights are named like a chunk;
    --force_regenerate deletes chunks, and no other file."""
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    os.symlink(model, tmp_path / "link")
    named_alike = Path(shutil.copytree(teacher, tmp_path / "alike"))
    os.remove(named_alike / "config.json")
    shutil.move(named_alike / "model.safetensors", named_alike / "train-00000000.safetensors")
    a_tokenizer = tmp_path / "a_tokenizer"
    tiny_tokenizer(roll=1).save_pretrained(a_tokenizer / "tokenizer")
    before = contents(tmp_path)
    for folder, name in (
        (model, "config.json"), (tmp_path / "x/../link/", "config.json"),
        (named_alike, "train-00000000.safetensors"), (a_tokenizer, "tokenizer"),
    ):
        for force in (False, True):
            refused = fill_cache(teacher, cache_text, folder, rc=2, force_regenerate=force)
            assert f"{name}' was not written by simple_distill" in refused.err
    assert contents(tmp_path) == before

    cache = cache_of(full_cache, tmp_path / "cache")
    foreign = cache / "train-00000099.safetensors"
    shutil.copy(model / "model.safetensors", foreign)
    before = contents(cache)
    refused = fill_cache(teacher, cache_text, cache, rc=2, temperature=2, force_regenerate=True)
    assert "train-00000099.safetensors' was not written by simple_distill" in refused.err
    assert contents(cache) == before
    kept = [cache / "model.safetensors", cache / "tokenizer/thesis.txt"]
    shutil.move(foreign, kept[0])
    kept[1].write_text("mine")
    fill_cache(teacher, cache_text, cache, temperature=2, force_regenerate=True)
    assert all(path.exists() for path in kept)
    assert read_manifest(cache)["temperature"] == 2


def damaged_manifests(text):
    """-> what may become of one, as text."""
    yield ""
    yield text[:len(text) // 2]
    yield "[]"
    yield "{}"
    manifest = json.loads(text)
    for name, value in manifest.items():
        left_out = {key: manifest[key] for key in manifest if key != name}
        yield json.dumps(left_out)
        for other in (None, "x", -1, [], {}, [value]):
            if other != value:
                yield json.dumps({**manifest, name: other})


def test_cache_a_damaged_manifest_or_tokenizer_is_one_error(full_cache, student, tmp_path):
    cache = cache_of(full_cache, tmp_path / "cache")
    cfg = parse_cache_run(student, cache)
    sd.take_from_cache(cfg)
    manifest = cache / "manifest.json"
    text = manifest.read_text()
    for damaged in damaged_manifests(text):
        manifest.write_text(damaged)
        for read in (sd.take_from_cache, sd.open_cache):
            with pytest.raises(sd.UserError, match="manifest.json' is damaged.*again: rm"):
                read(cfg)
    manifest.write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = cache / "tokenizer" / name
        whole = path.read_text()
        for damaged in ("", whole[:len(whole) // 2], "[]", "{}", whole + " "):
            path.write_text(damaged)
            with pytest.raises(sd.UserError, match="tokenizer' is damaged.*again: rm"):
                sd.open_cache(cfg)
        path.write_text(whole)
    cfg.given |= {"dataset"}
    cfg.dataset = "other"
    for damaged in ("", "[1]", '{"a"'):
        (cache / "config.json").write_text(damaged)
        with pytest.raises(sd.UserError, match="config.json' is damaged"):
            sd.open_cache(cfg)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json"])
def test_cache_the_repair_of_a_copy_acts_on_the_copy(full_cache, teacher, student, cache_text,
                                                     tmp_path, name):
    cache = cache_of(full_cache, tmp_path / "a copy")
    whole = contents(cache)
    original = contents(full_cache)
    (cache / name).write_text('{"half":')
    if name != "manifest.json":   # to fill it once more does not make the damage right
        fill_cache(teacher, cache_text, cache)
    refused = train_from_cache(student, cache, tmp_path / "out", rc=2)
    mend(refused.err)
    del whole[f"{cache}/config.json"]   # it now names the copy
    assert {path: contents(cache)[path] for path in whole} == whole
    assert contents(full_cache) == original
    train_from_cache(student, cache, tmp_path / "out")


def test_cache_damage_that_one_rank_meets_is_said(full_cache, student, tmp_path):
    """A row that rank 1 alone reads."""
    cache = cache_of(full_cache, tmp_path / "cache")
    rows = sd.open_cache(parse_cache_run(student, cache))[0]
    of_rank_1 = int(sd.shuffled(len(rows), 0, 0)[1])
    chunk = of_rank_1 // 16
    path = cache / f"train-{chunk:08d}.safetensors"
    line = of_rank_1 % 16 + 1
    table, data = sd.read_chunk(str(path), rows.content, line)
    content = path.read_bytes()
    assert content.count(data) == 1
    path.write_bytes(content.replace(data, bytes([data[0] ^ 1]) + data[1:]))
    words = flags(**PLAIN, student=student, cache_dir=cache, alpha=0.3, max_steps=6, batch_size=4,
                  output_dir=tmp_path / "out")
    shown = Fork(tmp_path / "log.txt", *words, ranks=2).wait()
    assert shown.count("error: ") == 1
    assert re.search(f"error: cache chunk '{path}' is damaged.*again: rm {path}; python", shown)
    assert "Traceback" not in shown


# ---- what it costs


def bench_cache():
    """Tables: entries a second on one core, bytes a token, and a training step from the cache
    beside one on labels only, with the allocator as a run sets it."""
    torch.set_num_threads(1)
    sd.keep_freed_memory()
    print(f"{'V':>8} {'method':>10} {'ids':>6} {'bytes/token':>12} {'raw fp32+int64':>15} "
          f"{'fp16+int32':>11} {'pack M/s':>9} {'unpack M/s':>11}")
    for vocab in (32000, 151936):
        for method, size in (("sample", 50), ("topk", 64)):
            bench_packing(vocab, method, size)
    print(f"\n{'V':>8} {'labels only':>12} {'from cache':>11} {'ratio':>6}   "
          "(seconds a step of 4 x 256 tokens, forward and backward)")
    for vocab in (32000, 151936):
        bench_cached_step(vocab)


def bench_packing(vocab, method, size):
    hidden, head, _ = made_up_teacher(vocab, 511, sharp=5.0)
    manifest = _cache_manifest(vocab, method, size)
    row = {"input_ids": np.arange(512), "targets": None}
    [(data, counts)] = sd.pack_teacher(lambda batch: (hidden, head), [row], 0, manifest)
    id_bits, code_bits, _ = manifest["bits"]
    entries = np.random.default_rng(0).integers(0, vocab << code_bits, counts.entries)
    numbers = counts.tokens, counts.targets, counts.entries
    packing = best_seconds(lambda: sd.pack((entries, id_bits + code_bits)))
    unpacking = best_seconds(lambda: sd.unpack_row(data, *numbers, manifest))
    print(f"{vocab:8} {method + str(size):>10} {counts.entries / 511:6.1f} "
          f"{len(data) / 512:12.1f} {64 * 12:15} {64 * 6:11} "
          f"{counts.entries / packing / 1e6:9.1f} {counts.entries / unpacking / 1e6:11.1f}")


def bench_cached_step(vocab):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True))
    hidden, head, _ = made_up_teacher(vocab, 255, sharp=5.0)
    manifest = _cache_manifest(vocab, "sample", 50)
    rows = []
    for i in range(4):
        row = {"input_ids": np.arange(i, i + 256), "targets": None}
        [(data, counts)] = sd.pack_teacher(lambda batch: (hidden, head), [row], i, manifest)
        rows.append(sd.unpack_row(data, counts.tokens, counts.targets, counts.entries, manifest))
    batch = sd.collate(rows)

    def step(alpha, target):
        loss = sd.distil_loss(model, batch, target, 1020, alpha=alpha, temperature=1.0,
                              divergence="forward")[0]
        loss.backward()

    def labels_only():
        step(1.0, None)

    def from_cache():
        step(0.1, batch.sparse)

    labels_only()   # compiles
    from_cache()
    labels_seconds = []
    cache_seconds = []
    for _ in range(5):   # alternating: a noisy machine is noisy for both
        labels_seconds.append(best_seconds(labels_only, times=1))
        cache_seconds.append(best_seconds(from_cache, times=1))
    labels = min(labels_seconds)
    cached = min(cache_seconds)
    print(f"{vocab:8} {labels:12.3f} {cached:11.3f} {cached / labels:6.2f}")


def best_seconds(work, times=9):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --------------------------------------------------------------------------------------------------
# Optional: blockwise: hidden states, stitches, heads, against plain models with hooks.


BLOCKWISE = dict(blockwise=True, batch_size=4, num_epochs=0, lr_per_block=3e-3, lm_head_lr=3e-3,
                 wd_per_block=0, max_grad_norm_per_block=1.0)


class BlockPair(NamedTuple):
    """Paths."""
    teacher: str
    student: str
    data: str


@pytest.fixture(scope="session")
def block(tmp_path_factory):
    """Teacher 32 x 5, student 16 x 3, talks of unequal length (so that there is padding) in 5 steps
    of 4 an epoch."""
    folder = tmp_path_factory.mktemp("block")
    return BlockPair(
        teacher=tiny_model(folder / "teacher", hidden=32, layers=5, seed=1),
        student=tiny_model(folder / "student", hidden=16, layers=3, seed=2,
                           tie_word_embeddings=True),
        data=write_splits(folder / "data", talk(20), talk(6, seed=50)))


def teacher_block(i):
    """The block of the teacher that the student's block i learns from."""
    return round((i + 1) * 5 / 3) - 1


def distil_blocks(block, out, rc=0, **fields):
    run = dict(teacher=block.teacher, student=block.student, dataset=block.data)
    return distil(out, rc, **{**BLOCKWISE, **run, **fields})


def rows_of_steps(block, first, last):
    """The rows of steps first + 1 ... last, as the trainer deals them (tested elsewhere)."""
    cfg = config.Config(dataset=block.data, seq_len=32)
    with sd.process_group():
        rows, _ = sd.load_data(cfg, transformers.AutoTokenizer.from_pretrained(block.student))
    batches = sd.indexed_batches(rows, 0, 4, first)
    for numbers, _ in itertools.islice(batches, last - first):
        yield [rows[i] for i in numbers]


def pad_rows(rows):
    """-> ids and the mask of real tokens, [B, T] each."""
    sequences = [torch.as_tensor(row["input_ids"]) for row in rows]
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def layer_states(model, ids, fed=None):
    """Hooks on every layer of a plain model -> its inputs, its outputs, {layer: [B, T, D]} each.
    fed: {layer: what it is given in place of the output of the one before}."""
    fed = fed or {}
    inputs = {}
    outputs = {}

    def keep_input(i, module, args, kwargs):
        hidden, *others = args
        inputs[i] = fed.get(i, hidden)
        return (inputs[i], *others), kwargs

    def keep_output(i, module, args, result):
        outputs[i] = result[0] if isinstance(result, tuple) else result

    hooks = []
    for i, layer in enumerate(model.model.layers):
        before = functools.partial(keep_input, i)
        after = functools.partial(keep_output, i)
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after))
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs, outputs


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


def student_at(block, out, step):
    """Student and stitches, as plain modules, with the weights of a checkpoint."""
    tensors = checkpoint(out, step)
    student = load(block.student)
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.clone())   # untied
    prefix = "model.model."
    in_student = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                  if name.startswith(prefix)}
    missing = student.load_state_dict(in_student, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])   # a head that stays tied
    prefix = "model.stitches."
    in_stitches = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                   if name.startswith(prefix)}
    stitches = nn.ModuleDict()
    for name, tensor in in_stitches.items():
        if name.endswith(".weight"):
            stitch = name.removesuffix(".weight")
            width_out, width_in = tensor.shape
            has_bias = f"{stitch}.bias" in in_stitches
            stitches[stitch] = nn.Linear(width_in, width_out, bias=has_bias)
    stitches.load_state_dict(in_stitches)
    return student, stitches


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.campaign)


def parameters_of_block(student, stitches, i, how):
    """What learns while block i does -> {name in a checkpoint, without "model.": parameter}."""
    trained = {}
    for name, p in student.named_parameters():
        before_it = "layers." in name or "embed" in name
        if f"layers.{i}." in name or (how == "free" and before_it):
            trained[f"model.{name}"] = p
    for name, p in stitches.named_parameters():
        if name.startswith((f"up{i}.", f"down{i}.")):
            trained[f"stitches.{name}"] = p
    return trained


def restore_moments(optimizer, trained, tensors):
    """AdamW's state, from the tensors of a checkpoint."""
    for name, p in trained.items():
        optimizer.state[p] = {
            "step": tensors[f"step.{name}"],
            "exp_avg": tensors[f"exp_avg.{name}"],
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
        }


def reference_block_losses(block, out, i, begin, end, *, how, kind, temperature):
    """Block i trained on plain models from the checkpoint of step begin on -> losses [steps]."""
    j = teacher_block(i)
    teacher = load(block.teacher)
    student, stitches = student_at(block, out, begin)
    trained = parameters_of_block(student, stitches, i, how)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0)
    if how == "teacher":   # its first step lies before the first checkpoint
        restore_moments(optimizer, trained, checkpoint(out, begin))
    losses = []
    for rows in rows_of_steps(block, begin, end):
        ids, real = pad_rows(rows)
        with torch.no_grad():
            teacher_inputs, teacher_outputs = layer_states(teacher, ids)
        fed = {}
        if how == "teacher":
            fed[i] = stitches[f"down{i}"](teacher_inputs[j])
        _, student_outputs = layer_states(student, ids, fed)
        loss = reference_loss(kind, stitches[f"up{i}"](student_outputs[i][real]),
                              teacher_outputs[j][real], temperature)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return torch.tensor(losses)


@pytest.mark.parametrize("kind, how", [
    ("relative", "frozen"),
    ("relative", "teacher"),
    ("mse", "frozen"),
    ("mse", "free"),
    ("mse", "teacher"),
    ("cosine", "frozen"),
    ("kl_div", "frozen"),
    ("kl_div", "teacher"),
    slow_case("cosine", "free"),
    slow_case("cosine", "teacher"),
    slow_case("kl_div", "free"),
])
def test_blockwise_losses_match_a_plain_reference(block, out, kind, how):
    """Ten steps of block 2 (block_input teacher: of all, each alone), full computation on plain
    models with hooks."""
    temperature = 1.5 if kind == "kl_div" else 1.0
    if how == "teacher":
        epochs = [2.0]
        blocks = [0, 1, 2]
        begin = 1   # the first checkpoint there is
        end = 10
    else:
        epochs = [0.1, 0.1, 2.0]
        blocks = [2]
        begin = 2   # a step for block 0, a step for block 1
        end = 12
    distil_blocks(
        block, out, distill_loss_type=kind, distill_loss_temperature=temperature,
        epochs_per_block=epochs, train_lm_head=False, lm_head_lr=None, save_steps=1,
        keep_checkpoints=20, block_input="teacher" if how == "teacher" else "student",
        freeze_previous_blocks=how != "free", initialize_head_from_teacher=False,
        gradient_checkpointing=True)
    total = torch.zeros(end - begin)
    for i in blocks:
        total += reference_block_losses(
            block, out, i, begin, end, how=how, kind=kind, temperature=temperature)
    logged = {entry["train/step"]: entry["train/loss"] for entry in log(out, "train")}
    losses = torch.tensor([logged[step] for step in range(begin + 1, end + 1)])
    torch.testing.assert_close(total, losses, rtol=1e-5, atol=1e-6)
    assert abs(total[0] - total[-1]) > 1e-4   # something was learned


@pytest.mark.parametrize("kind, source", [
    ("relative", "teacher"),
    ("mse", "teacher"),
    ("cosine", "student"),
    ("kl_div", "student"),
    slow_case("mse", "student"),
    slow_case("cosine", "teacher"),
    slow_case("kl_div", "teacher"),
])
def test_blockwise_student_equal_to_teacher_stays_equal(block, out, kind, source):
    distil_blocks(block, out, student=block.teacher, distill_loss_type=kind, block_input=source,
                  epochs_per_block=0.4, lm_head_epochs=0.4)
    assert set(column(out, "train/loss")) == {0.0}
    measured = log(out, "block")
    assert len(measured) == 2
    for entry in measured:
        assert [entry[f"block/{i}/loss"] for i in range(5)] == [0, 0, 0, 0, 0]
    assert same(final_weights(out), weights(block.teacher))


def test_blockwise_a_sink_weighs_as_any_token():
    """Both states of a token a thousand times as large: the same error; where the teacher's state
    is zero there is none."""
    student = torch.randn(6, 8)
    teacher = torch.randn(6, 8)
    plain = sd.hidden_error(student, teacher, "relative", 1.0)
    times = torch.tensor([1000, 1, 1, 1, 1, 0.01])[:, None]
    scaled = sd.hidden_error(student * times, teacher * times, "relative", 1.0)
    torch.testing.assert_close(scaled, plain)
    teacher[2] = 0
    student.requires_grad_()
    error = sd.hidden_error(student, teacher, "relative", 1.0)
    error.sum().backward()
    assert (error == 0).tolist() == [False, False, True, False, False, False]
    assert student.grad.isfinite().all() and not student.grad[2].any()


def test_blockwise_figures_show_the_ordinary_token(block, out, tmp_path):
    """Every question begins with Z, whose state is 300 times as large in the teacher: the table and
    the log show what a direct computation without it does."""
    def begin_with_z(rows):
        return [row | {"prompt": "Z" + row["prompt"]} for row in rows]

    held_out = begin_with_z(talk(6, seed=50))
    data = write_splits(tmp_path / "data", begin_with_z(talk(20)), held_out)
    shutil.copytree(block.teacher, tmp_path / "teacher")
    z = tiny_tokenizer().encode("Z")[0]

    def make_sink(tensors):
        tensors["model.embed_tokens.weight"][z] *= 300

    edit_weights(tmp_path / "teacher", make_sink)
    shown = distil_blocks(block, out, teacher=tmp_path / "teacher", dataset=data, save_steps=0,
                          epochs_per_block=1, train_lm_head=False, lm_head_lr=None,
                          initialize_head_from_teacher=False).out
    student, stitches = student_at(block, out, 15)
    teacher = load(tmp_path / "teacher")
    tokenizer = tiny_tokenizer()
    rows = encode(held_out, tokenizer, seq_len=32)
    errors = {i: [] for i in range(3)}
    wanted = {i: [] for i in range(3)}
    missed = {i: [] for i in range(3)}
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            _, student_outputs = layer_states(student, ids)
            _, teacher_outputs = layer_states(teacher, ids)
            for i in range(3):
                x = stitches[f"up{i}"](student_outputs[i])[0]
                y = teacher_outputs[teacher_block(i)][0]
                errors[i].append((x - y).square().sum(-1) / y.square().sum(-1))
                ordinary = ids[0] != z
                wanted[i].append(y[ordinary])
                missed[i].append((x - y)[ordinary])
    after = log(out, "block")[-1]
    for i in range(3):
        error = torch.cat(errors[i])
        states = torch.cat(wanted[i])
        variance = (states - states.mean(0)).square().sum()
        explained = 1 - torch.cat(missed[i]).square().sum() / variance
        assert after[f"block/{i}/loss"] == pytest.approx(error.mean().item(), rel=1e-4)
        assert after[f"block/{i}/median"] == pytest.approx(error.median().item(), rel=1e-4)
        assert after[f"block/{i}/explained"] == pytest.approx(explained.item(), rel=1e-3)
    line = next(line for line in shown.splitlines()[::-1] if re.match(r"2 +4 ", line))
    assert line.split()[-2:] == [f"{after['block/2/median']:.4g}",
                                 f"{after['block/2/explained']:.1%}"]


def test_blockwise_only_its_own_parameters_move(block, out):
    """Block i and its stitch, block 0 the embeddings too; in the head phase norm and head. Bit for
    bit."""
    distil_blocks(block, out, epochs_per_block=0.4, lm_head_epochs=0.4, save_steps=2,
                  initialize_head_from_teacher=False, keep_checkpoints=9, resume="never")
    groups = {4: r"layers\.1\.|up1", 6: r"layers\.2\.|up2", 8: r"lm_head|model\.norm\."}
    for step, group in groups.items():   # at its end; a phase is 2 steps
        before = checkpoint(out, step - 2)
        after = checkpoint(out, step)
        names = [name for name in before if name.startswith("model.")]
        assert "model.stitches.up0.weight" in names
        moved = [name for name in names if not torch.equal(before[name], after[name])]
        assert moved == [name for name in names if re.search(group, name)], (step, moved)
    names = final_weights(out).keys()
    assert not [name for name in names if "stitch" in name]
    assert "lm_head.weight" in names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [
    "LlamaConfig",
    "PhiConfig",   # a LayerNorm, a bias in norm and head
])
def test_blockwise_projected_head_is_the_teachers_on_stitched_states(
        block, out, tmp_path, cls, bias):
    teacher = tiny_model(tmp_path / "teacher", hidden=32, layers=3, seed=32, cls=cls)
    student = tiny_model(tmp_path / "student", hidden=16, layers=2, seed=16, cls=cls)
    norm = "model.final_layernorm" if cls == "PhiConfig" else "model.norm"

    def stir(tensors):   # a trained norm is not all ones, a trained bias not all zeros
        for name in (f"{norm}.weight", f"{norm}.bias", "lm_head.bias"):
            if name in tensors:
                tensors[name] += torch.rand(tensors[name].shape)

    edit_weights(teacher, stir)
    distil_blocks(block, out, teacher=teacher, student=student, stitching_layer_bias=bias,
                  epochs_per_block=1, train_lm_head=False, lm_head_lr=None)
    tensors = checkpoint(out, 10)
    assert ("model.stitches.up0.bias" in tensors) == bias
    # the last stitch is folded into the head: it has a bias where that has one too
    assert ("model.stitches.up1.bias" in tensors) == (bias and cls == "PhiConfig")
    hidden = torch.randn(50, 16)
    stitched = F.linear(hidden, tensors["model.stitches.up1.weight"],
                        tensors.get("model.stitches.up1.bias"))
    gain = weights(teacher)[f"{norm}.weight"]
    shift = weights(teacher).get(f"{norm}.bias", 0)
    # what the final norm does, but for dividing by the size
    expected = load(teacher).lm_head(stitched * gain + shift)
    logits = load(os.path.join(out, "final")).lm_head(hidden)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def block_errors(out, blocks):
    """Held-out errors -> before training, after it, a value a block each."""
    before, after = log(out, "block")
    return ([before[f"block/{i}/loss"] for i in range(blocks)],
            [after[f"block/{i}/loss"] for i in range(blocks)])


def all_below(after, before, part=1.0):
    return all(b < part * a for a, b in zip(before, after, strict=True))


def test_blockwise_packed_documents_are_as_each_alone(block, tmp_path):
    """The first step of each phase, of the same tokens."""
    losses = {}
    for packing in ("rows", "documents"):
        out = tmp_path / packing
        distil_blocks(block, out, packing=packing, seq_len=128, batch_size=20, lr_per_block=STILL,
                      lm_head_lr=STILL, learning_rate=STILL, max_steps=1, num_epochs=None)
        losses[packing] = column(out, "train/loss")
        held_out = block_errors(out, 3)[0]
        losses[packing] += held_out
    assert losses["documents"] == pytest.approx(losses["rows"], rel=1e-5)
    assert len(losses["rows"]) == 3 + 1 + 1 + 3


def test_blockwise_errors_fall_and_beat_the_head_alone(block, tmp_path):
    """At unequal width; the head alone gets as many steps as blocks and head together."""
    whole = str(tmp_path / "whole")
    alone = str(tmp_path / "alone")
    distil_blocks(block, whole, epochs_per_block=10, lm_head_epochs=6)
    distil_blocks(block, alone, epochs_per_block=0.2, lr_per_block=STILL, lm_head_epochs=35.4,
                  initialize_head_from_teacher=False)
    before, after = block_errors(whole, 3)
    assert all_below(after, before, 0.9), (before, after)
    assert column(whole, "eval/step")[-1] == column(alone, "eval/step")[-1]
    assert column(whole, "eval/kl_loss")[-1] < column(alone, "eval/kl_loss")[-1]


# argv: the number of the optimiser step before which this process dies, then the command.
DIE_BEFORE_STEP = """
import os, signal, sys
import simple_distill

steps_left = int(sys.argv.pop(1))
optimizer_step = simple_distill.optimizer_step

def step_or_die(*args):
    global steps_left
    steps_left -= 1
    if steps_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return optimizer_step(*args)

simple_distill.optimizer_step = step_or_die
sys.exit(simple_distill.main())
"""


def rewind(source, out, step):
    """A copy of a finished run as it was just after the checkpoint of that step."""
    shutil.copytree(source, out)
    shutil.rmtree(os.path.join(out, "final"))
    for folder in Path(out, "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("source", ["student", slow_case("teacher")])
def test_blockwise_resume_is_exact_in_every_phase(block, tmp_path, source):
    """Killed in a block and in the head phase; and from checkpoints where a phase begins, ends, and
    in the middle."""
    fields = dict(epochs_per_block=0.8, lm_head_epochs=0.8, max_steps=3, save_steps=2,
                  keep_checkpoints=30, block_input=source)
    whole = str(tmp_path / "whole")
    killed = str(tmp_path / "killed")
    distil_blocks(block, whole, **fields)
    steps = len(log(whole, "train"))
    # a phase is 4 steps: three blocks or all at once, then the head; then 3 steps of distillation
    if source == "student":
        assert steps == 19
        kills = (4, steps - 6)   # the second process begins at step 2 and dies in the head phase
        checkpoints = (4, 12, 14, 16)
    else:
        assert steps == 11
        kills = (4,)
        checkpoints = (2, 4, 6, 8)
    run = dict(teacher=block.teacher, student=block.student, dataset=block.data,
               output_dir=killed, use_wandb=False)
    words = flags(**{**PLAIN, **BLOCKWISE, **run, **fields})
    for count in kills:
        process = subprocess.run([sys.executable, "-c", DIE_BEFORE_STEP, str(count), *words],
                                 cwd=HERE, capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    distil_blocks(block, killed, **fields)
    assert quiet_log(killed) == quiet_log(whole)
    assert same(final_weights(killed), final_weights(whole))
    for step in checkpoints:
        again = str(tmp_path / f"from{step}")
        rewind(whole, again, step)
        assert "passed over" not in distil_blocks(block, again, **fields).out
        assert quiet_log(again) == quiet_log(whole), step
        assert same(final_weights(again), final_weights(whole)), step


def test_blockwise_refusals_name_numbers(block, out):
    refused = [
        (dict(use_stitching_layers=False, stitching_layer_bias=True),
         "student width 16 and teacher width 32"),
        (dict(student=block.teacher, teacher=block.student),
         "has 5 layers, the teacher only 3"),
        (dict(lr_per_block=[1e-3, 1e-4]),
         "lr_per_block has 2 values"),
        (dict(block_input="teacher", epochs_per_block=[1, 1, 2]),
         "one value"),
        (dict(distill_loss_temperature=2),
         "distill_loss_temperature: read only with --distill_loss_type kl_div"),
    ]
    for fields, message in refused:
        assert message in distil_blocks(block, out, 2, **fields).err, fields


@pytest.mark.parametrize("kind, weight", [
    ("mse", 1.0), ("mse", 0.5), ("kl_div", 0.3), ("ce", 1.0)])
def test_blockwise_head_losses(block, out, kind, weight):
    """The first step of the head phase against logits of the plain models."""
    distil_blocks(block, out, epochs_per_block=0.2, lm_head_epochs=0.2, logit_loss_type=kind,
                  logit_loss_weight=weight, save_steps=3)
    student, _ = student_at(block, out, 3)
    [rows] = rows_of_steps(block, 3, 4)
    batch = sd.collate(rows)

    def logits_of(model):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits
        return logits.flatten(0, 1)[batch.positions]

    student_logits = logits_of(student)
    teacher_logits = logits_of(load(block.teacher))
    ce = F.cross_entropy(student_logits, batch.labels)
    if kind == "ce":
        term = ce
    else:
        term = reference_loss(kind, student_logits, teacher_logits, 1.0)
    expected = weight * term + (1 - weight) * ce
    [loss] = [entry["train/loss"] for entry in log(out, "train") if entry["train/step"] == 4]
    assert loss == pytest.approx(expected.item(), rel=1e-5)


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
    refused = distil_blocks(block, out, 2, **fields, gradient_checkpointing=True)
    assert "--gradient_checkpointing false" in refused.err
    refused = distil_blocks(block, out, 2, **fields, packing="documents")
    assert f"{student!r} (MixForCausalLM) does not run with documents packed" in refused.err
    assert "use --packing rows" in refused.err
    distil_blocks(block, out, **fields)
    before, after = block_errors(out, 2)
    assert all_below(after, before)
    final = AutoModelForCausalLM.from_pretrained(f"{out}/final", trust_remote_code=True)
    assert type(final).__name__ == "MixForCausalLM"
    assert not same(final.state_dict(), weights(student))


@pytest.mark.parametrize("cls, model_type, fields", [
    ("GPT2Config", "gpt2", {}),
    ("Gemma2Config", "gemma2", dict(head_dim=8)),
    ("GPTNeoXConfig", "gpt_neox", {}),
])
def test_blockwise_student_of_another_family(block, out, tmp_path, cls, model_type, fields):
    """Other norms, learned positions, a capped head: errors fall, and the head starts from the
    teacher's."""
    student = tiny_model(tmp_path / "student", hidden=16, layers=2, seed=3, cls=cls, **fields)
    distil_blocks(block, out, student=student, epochs_per_block=6, lm_head_epochs=4)
    before, after = block_errors(out, 2)
    assert all_below(after, before, 0.9)
    assert load(f"{out}/final").config.model_type == model_type


@pytest.mark.parametrize("phase", ["block", "head"])
def test_blockwise_a_row_that_is_not_finite_skips_its_step_only(block, out, tmp_path, phase):
    """One row in five has the letter that the teacher cannot bear."""
    rows = []
    for i in range(10):
        rows.append({"prompt": "Z" if i % 5 == 0 else "a", "response": "one two three"})
    data = write_splits(tmp_path / "data", rows, rows[1:3])
    broken = break_letter(block.teacher, tmp_path / "broken")
    if phase == "block":   # 10 steps each
        epochs = dict(epochs_per_block=1, lm_head_epochs=0.1)
        least = 6
    else:
        epochs = dict(epochs_per_block=0.1, lm_head_epochs=1)
        least = 2
    distil_blocks(block, out, teacher=broken, dataset=data, batch_size=1, save_steps=0,
                  initialize_head_from_teacher=False, **epochs)
    losses = column(out, "train/loss")
    skipped = column(out, "train/skipped_steps")[-1]
    assert least <= skipped < len(losses)
    assert skipped == losses.count(None)
    for tensor in checkpoint(out, len(losses)).values():
        assert tensor.isfinite().all()


@pytest.mark.campaign   # optional: demo
def test_blockwise_demo(tmp_path):   # optional: demo
    """Every block's held-out error falls, and blocks and head end nearer to the teacher than the
    head alone."""
    whole = str(tmp_path / "whole")
    alone = str(tmp_path / "alone")
    fields = dict(blockwise=True, use_wandb=False, max_steps=0)
    shown = cli(*flags(**fields, output_dir=whole)).out
    assert "teacher block" in shown
    before, after = block_errors(whole, 2)
    assert all_below(after, before)
    last_eval = log(whole, "eval")[-1]
    steps = last_eval["eval/step"]
    head_epochs = last_eval["eval/epoch"] * (steps - 2) / steps   # a step for each block
    cli(*flags(**fields, output_dir=alone, epochs_per_block=1e-6, lr_per_block=STILL,
               lm_head_epochs=head_epochs, initialize_head_from_teacher=False))
    assert column(alone, "eval/step")[-1] == steps
    assert column(whole, "eval/kl_loss")[-1] < column(alone, "eval/kl_loss")[-1]


@pytest.mark.campaign
def test_blockwise_two_ranks_bf16_and_accumulation(block, tmp_path):
    """Two ranks, and accumulation, give the losses of one; bf16 runs through and errors fall."""
    epochs = dict(epochs_per_block=1, lm_head_epochs=1)

    def one_rank(name, **fields):
        out = str(tmp_path / name)
        distil_blocks(block, out, **epochs, **fields)
        return out

    def two_ranks(name, **fields):
        out = str(tmp_path / name)
        run = dict(teacher=block.teacher, student=block.student, dataset=block.data,
                   batch_size=2, output_dir=out)
        words = flags(**{**PLAIN, **BLOCKWISE, **epochs, **run, **fields})
        process = spawn(*words, nproc=2)
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, shown[-3000:]
        return out

    one = one_rank("one")
    accumulated = one_rank("accumulated", batch_size=1, gradient_accumulation_steps=4)
    ranks = two_ranks("ranks")
    fed = one_rank("fed", block_input="teacher")
    fed_ranks = two_ranks("fed_ranks", block_input="teacher")
    for out, expected in ((accumulated, one), (ranks, one), (fed_ranks, fed)):
        losses = column(expected, "train/loss")
        assert column(out, "train/loss") == pytest.approx(losses, rel=2e-5)
    before, after = block_errors(two_ranks("half", dtype="bf16"), 3)
    assert all_below(after, before)


def test_blockwise_an_empty_share_counts_nothing(block, tmp_path):
    """5 sequences as 8 x 1, as 1 x 8 and on two ranks: some micro-batches, and a rank of the held
    out rows, have none."""
    rows = talk(5)
    fields = dict(teacher=block.teacher, student=block.student, epochs_per_block=1,
                  lm_head_epochs=1, distill_loss_type="mse",
                  dataset=write_splits(tmp_path / "data", rows, rows[:1]))
    whole = tmp_path / "whole"
    single = tmp_path / "single"
    ranks = tmp_path / "ranks"
    distil_blocks(block, whole, **fields, batch_size=8)
    distil_blocks(block, single, **fields, batch_size=1, gradient_accumulation_steps=8)
    words = {**PLAIN, **BLOCKWISE, **fields, "batch_size": 1, "gradient_accumulation_steps": 4}
    shown = Fork(tmp_path / "log.txt", *flags(**words, output_dir=ranks), ranks=2).wait()
    assert "done in" in shown, shown
    for key in ("train/loss", "block/0/loss", "block/2/loss", "eval/loss"):
        expected = pytest.approx(column(whole, key), rel=2e-5)
        assert column(single, key) == expected, key
        assert column(ranks, key) == expected, key


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
    assert "freeze the student's norm or head" in shown


def test_blockwise_a_phase_without_anything_to_train_is_refused(block, out):
    err = distil_blocks(block, out, rc=2, lr_multipliers=["lm_head=0", "model.norm=0"]).err
    assert "'head'" in err and "--train_lm_head false" in err
    assert not os.path.exists(out)


# ---- what it costs


def bench_block(layers=8, width=256, tokens=1024):
    """Cost of the block phase of S equal layers, over running both models whole for each block:
    about a half."""
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        cfg = config.Config(
            teacher=tiny_model(f"{folder}/teacher", hidden=width, layers=layers, seed=0),
            student=tiny_model(f"{folder}/student", hidden=width, layers=layers, seed=1),
            blockwise=True, gradient_checkpointing=False, dtype="fp32")
        student = sd.load_student(cfg)
        teacher = sd.load_teacher(cfg)
        row = {"input_ids": torch.arange(128) % 263, "targets": None}
        batch = sd.collate([row] * (tokens // 128))

        def seconds(loss_fn, get_teacher_targets, repeat=5):
            times = []
            for _ in range(repeat):
                start = time.process_time()
                student(loss_fn, batch, get_teacher_targets(batch), 1.0)[0].backward()
                times.append(time.process_time() - start)
            return min(times)

        distil_loss = functools.partial(sd.distil_loss, alpha=0.0, temperature=1.0)
        whole = seconds(distil_loss, sd.teacher_targets(teacher))
        print("\nCPU ms a step; both models whole, everything trained on the logits "
              f"(vocabulary 263): {1e3 * whole:.0f}")
        run = types.SimpleNamespace(cfg=cfg, student=student, teacher=teacher, steps_per_epoch=1)
        pairs = sd.match_blocks(cfg, student.model.config, teacher.model.config)
        costs = []
        for i in pairs:
            stage = sd.stage_of_block(run, pairs, sd.parameters_by_part(student), i, 0)
            with contextlib.redirect_stdout(io.StringIO()):
                sd.make_optimizer(student.parameters(), stage.rates, 0.0)   # freezes the others
            costs.append(seconds(stage.loss_fn, stage.get_teacher_targets))
        numbers = ", ".join(str(i) for i in range(layers))
        milliseconds = ", ".join(f"{1e3 * cost:.0f}" for cost in costs)
        print(f"block {numbers}: {milliseconds}")
        print(f"all {layers} blocks: {sum(costs) / (layers * costs[-1]):.2f} of running both "
              "models whole for each block (as the last one does), "
              f"{sum(costs) / (layers * whole):.2f} of training the whole student that often")


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


def coded_texts(prompts, texts):
    """-> (ids, labels already shifted) as for model_losses: what was written counts alone."""
    coded = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor(prompt + text)
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
    numbers, _ = next(sd.indexed_batches(rows, 0, 8, 0))
    prompts = [ids[:5] for ids in ids_of([rows[i] for i in numbers])]
    model = load(student)
    coded = coded_texts(prompts, [greedy_text(model, prompt, 6) for prompt in prompts])
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


def test_on_policy_what_is_written_is_drawn_from_the_softmax(tmp_path, student):
    """2,000 first tokens after one prompt, beside longer prompts; at two temperatures; padding of
    the vocabulary is never drawn."""
    wide = padded(tmp_path / "wide", student, 9)
    tokenizer = tiny_tokenizer()
    vocab = len(tokenizer)
    prompts = [[40, 50, 60], [70, 80, 90, 100, 110]] * 2000
    for temperature in (1.0, 2.0):
        with sd.process_group():
            root = sd.load_student(config.Config(student=wide, teacher=wide))
            texts, cut = sd.write_texts(
                root, tokenizer, prompts, list(range(4000)), 1, temperature, 32)
            assert root.training
        assert cut == 4000 - sum(first == 0 for first, in texts)
        for i in range(2):
            counts = torch.bincount(torch.tensor(texts[i::2])[:, 0], minlength=vocab).double()
            logits = load(student)(torch.tensor(prompts[i])[None]).logits[0, -1].double()
            expected = 2000 * (logits / temperature).softmax(-1).detach()
            assert len(counts) == vocab
            common = expected > 5
            squares = ((counts - expected).square() / expected)[common].sum()
            freedom = int(common.sum())
            assert freedom > 20
            assert squares < freedom + 4 * math.sqrt(2 * freedom), (temperature, i)
            rare = counts[~common].sum() - expected[~common].sum()
            assert abs(rare) < 4 * math.sqrt(expected[~common].sum())


def test_on_policy_a_text_does_not_depend_on_the_rows_beside_it(student):
    tokenizer = tiny_tokenizer()
    prompts = [list(range(40, 40 + n)) for n in (3, 9, 5, 12, 7)]
    with sd.process_group():
        root = sd.load_student(config.Config(student=student, teacher=student))
        together, _ = sd.write_texts(root, tokenizer, prompts, [0, 1, 2, 3, 4], 12, 1.0, 64)
        for i in (0, 3, 4):
            alone, _ = sd.write_texts(root, tokenizer, prompts[i:i + 1], [i], 12, 1.0, 64)
            assert alone == [together[i]]
        assert sd.write_texts(root, tokenizer, prompts, [9, 8, 7, 6, 5], 12, 1.0, 64)[0] != together


def test_on_policy_a_short_prompt_is_not_cut_by_a_long_one_beside_it(tmp_path):
    """Where positions stand in a table, which ends for the long one first."""
    prompts = [[10, 11, 12], list(range(20, 80)), [30] * 40, [13, 14]]
    assert sd.side_by_side(prompts, [30, 4, 24, 30], math.inf) == [[0, 1, 2, 3]]
    assert sd.side_by_side(prompts, [30, 4, 24, 30], 64) == [[1], [2], [0, 3]]
    assert sd.side_by_side(prompts, [5, 4, 5, 5], 64) == [[0, 1, 2, 3]]
    assert sd.side_by_side([], [], 64) == []
    name = tiny_model(tmp_path / "gpt2", cls="GPT2Config", max_position_embeddings=64)
    tokenizer = tiny_tokenizer()
    cfg = config.Config(student=name, teacher=name, seq_len=64, gradient_checkpointing=False)
    with sd.process_group():
        root = sd.load_checked_student(cfg, tokenizer)
        together, _ = sd.write_texts(root, tokenizer, prompts, [0, 1, 2, 3], 30, 1.0, 64)
        for i in range(4):
            alone, _ = sd.write_texts(root, tokenizer, prompts[i:i + 1], [i], 30, 1.0, 64)
            assert alone == together[i:i + 1]
    assert max(map(len, together)) > 24


def test_on_policy_prompts_and_padding_never_count(tmp_path):
    """A conversation is continued where the assistant's last turn begins, plain text after its
    first tokens; the end mark is learnt, what follows it is not."""
    tokenizer = tiny_tokenizer(CHATML)
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    rows = [*encode([{"messages": turns}], tokenizer), *encode([{"text": prose(9)}], tokenizer)]
    prompts = []
    for (ids, is_target), row in zip(sd.rows_of(sd.collate(rows)), rows, strict=True):
        assert ids == list(row["input_ids"])
        prompts.append(sd.prompt_of(ids, is_target, 7))
    shown = tokenizer.decode(prompts[0])
    assert shown.endswith("b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[1] == list(rows[1]["input_ids"][:7])
    assert sd.prompt_of([5, 6, 0], [False, True, True], 7) == [5, 6]   # shorter than a prompt

    texts = [sd.cut_text([70, 3, 0, 0], 9, {3}), sd.cut_text([71, 72, 73, 3], 3, {3})]
    assert texts == [[70, 3], [71, 72, 73]]
    batch = sd.collate(sd.as_rows(prompts, texts))
    assert batch.labels.tolist() == [70, 3, 71, 72, 73]
    counted = batch.input_ids.flatten()[batch.positions].tolist()
    assert counted == [prompts[0][-1], 70, prompts[1][-1], 71, 72]


def test_on_policy_texts_stay_within_seq_len_and_the_log_says_how_long_they_are(
        out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, on_policy=1, max_steps=2,
           log_steps=2, on_policy_prompt=30, max_new_tokens=6)
    entry, = log(out, "train")
    rollouts = {"train/rollout_length", "train/rollout_cut", "train/rollout_tokens_per_second"}
    assert entry.keys() == TRAIN_KEYS | rollouts
    assert 1 < entry["train/rollout_length"] < 3   # rows that are shorter themselves have room
    assert entry["train/rollout_cut"] > 0.5
    assert entry["train/rollout_tokens_per_second"] > 0


def test_on_policy_a_resume_between_lines_of_the_log_logs_the_same(out, teacher, student, text):
    fields = dict(teacher=teacher, student=student, dataset=text, **WRITING, max_steps=4,
                  log_steps=4, save_steps=1, keep_checkpoints=4)
    distil(out, **fields)
    whole = quiet_log(out)
    distil(out, **fields, resume=f"{out}/checkpoints/step-00000002")
    assert quiet_log(out) == whole
    assert "train/rollout_length" in whole[0]


def test_on_policy_steps_alternate_by_a_seeded_draw(tmp_path, teacher, student, chat):
    """The others are as ever; the end marks that the student writes end its texts."""
    drawn = [sd.is_on_policy(0.5, 3, step) for step in range(400)]
    assert 160 < sum(drawn) < 240
    assert drawn != [sd.is_on_policy(0.5, 4, step) for step in range(400)]
    assert all(sd.is_on_policy(1.0, 3, step) for step in range(400))
    out = tmp_path / "mixed"
    distil(out, teacher=teacher, student=student, dataset=chat, seq_len=128, on_policy=0.5, seed=3,
           max_new_tokens=4, max_steps=8, learning_rate=STILL)
    assert ["train/rollout_cut" in entry for entry in log(out, "train")] == drawn[:8]
    plain = tmp_path / "plain"
    distil(plain, teacher=teacher, student=student, dataset=chat, seq_len=128, seed=3, max_steps=8,
           learning_rate=STILL)
    for entry, usual, is_written in zip(log(out, "train"), log(plain, "train"), drawn):
        if is_written:
            assert entry["train/loss"] == entry["train/kl_loss"]
        else:
            assert logged_losses(entry) == logged_losses(usual)


def test_on_policy_dropout_and_recomputing_are_off_while_it_writes(tmp_path, teacher, text):
    student = tiny_model(tmp_path / "dropout", **DROPOUT, seed=3)
    for recompute in (False, True):
        with sd.process_group():
            cfg = config.Config(student=student, teacher=student, seq_len=64,
                                gradient_checkpointing=recompute)
            root = sd.load_student(cfg)
            prompt = list(range(40, 50))
            texts, _ = sd.write_texts(root, tiny_tokenizer(), [prompt], [0], 9, GREEDY, 64)
            assert texts == [greedy_text(load(student).eval(), prompt, 9)]
            assert root.training and root.model.training


@pytest.mark.parametrize("change, ends", [
    (dict(generation=[3, 0]), "3 '<|im_end|>' 0 '<|endoftext|>'"),
    (dict(tokenizer="<|im_end|>"), "3 '<|im_end|>'"),
])
def test_on_policy_a_pair_that_ends_its_texts_differently_is_refused(
        tmp_path, out, teacher, student, text, change, ends):
    """With both values; a pair that has the same list is none."""
    for role, source in (("teacher", teacher), ("student", student)):
        shutil.copytree(source, tmp_path / role)
    fields = dict(teacher=tmp_path / "teacher", student=tmp_path / "student", dataset=text,
                  max_steps=1, **WRITING)
    for role in ("teacher", "student"):
        if "generation" in change:
            path = tmp_path / role / "generation_config.json"
            path.write_text(json.dumps(
                json.loads(path.read_text()) | {"eos_token_id": change["generation"]}))
        else:
            tokenizer = tiny_tokenizer()
            tokenizer.eos_token = change["tokenizer"]
            tokenizer.save_pretrained(tmp_path / role)
        if role == "teacher":
            err = distil(out, **fields, rc=2).err
            assert f"student '{tmp_path}/student' ends its texts with 0 '<|endoftext|>'," in err
            assert all(word in err for word in ends.split()), err
            assert not os.path.exists(out)
    distil(out, **fields)
    kept = json.loads(Path(out, "final", "generation_config.json").read_text())["eos_token_id"]
    assert kept == change.get("generation", 0)


def test_on_policy_an_end_mark_that_ends_nothing_is_told(tmp_path, out, teacher, student, chat):
    fields = dict(dataset=chat, seq_len=256, max_steps=1, **WRITING)
    for role, source in (("teacher", teacher), ("student", student)):
        shutil.copytree(source, tmp_path / role)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / role)
        fields[role] = tmp_path / role
    told = ("WARNING: conversations end with 3 '<|im_end|>', the student's texts with "
            "0 '<|endoftext|>': it will write on")
    assert told in distil(f"{out}-told", **fields).out
    for role in ("teacher", "student"):
        path = tmp_path / role / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, 0]}))
    assert "WARNING" not in distil(out, **fields).out


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
    assert "MixForCausalLM" in err and "on_policy needs another student" in err


def test_on_policy_two_ranks_write_what_one_writes(tmp_path, teacher, student, chat):
    """And end with the same weights; a rank without a row of its own takes part."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=128, on_policy=0.7,
                  max_new_tokens=20, max_steps=6, max_samples=7, gradient_checkpointing=True)
    one = tmp_path / "one"
    distil(one, **fields, batch_size=6)
    assert {0, 1} < {round(cut) for cut in column(one, "train/rollout_cut")} | {0, 1, 2}
    for fsdp in ("full_shard", "shard_grad_op"):
        two = tmp_path / fsdp
        words = flags(**{**PLAIN, **fields, "fsdp": fsdp, "output_dir": two, "batch_size": 3})
        shown = Fork(tmp_path / f"{fsdp}.txt", *words, ranks=2).wait()
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
    assert len({length % 1 for length in lengths}) == 2   # an odd sum: they were not as long


def test_on_policy_comes_after_the_blocks(out, teacher, text):   # optional: blockwise
    student = tiny_model(f"{out}-student", hidden=16, seed=2, tie_word_embeddings=False)
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, blockwise=True,
           epochs_per_block=0.2, lm_head_epochs=0.2, max_steps=2)
    written = ["train/rollout_cut" in entry for entry in log(out, "train")]
    assert written == [False] * (len(written) - 2) + [True, True] and len(written) > 4


def test_on_policy_every_document_is_a_prompt(out, teacher, student, text):
    """Of packing rows; some are shorter than the prompt."""
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, packing="rows",
           max_steps=1)
    assert 1 <= column(out, "train/rollout_length")[0] <= 6


def test_on_policy_of_a_stream(tmp_path, teacher, student, chat):   # optional: streaming
    """The same prompts as of rows that are read at once, in another order."""
    out = tmp_path / "out"
    distil(out, teacher=teacher, student=student, dataset=chat, seq_len=128, **WRITING,
           streaming=True, max_steps=2)
    assert len(column(out, "train/rollout_length")) == 2


def test_on_policy_dry_run_shows_what_the_student_writes(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, on_policy=0.5,
                   max_new_tokens=6, on_policy_prompt=5, max_steps=2, dry_run=True).out
    example, = re.findall(r"an example that the student wrote: (.*)", shown)
    assert len(re.findall(r"\[\[.+\]\]", example)) == 1
    assert re.search(r"a step on policy takes \S+ s, \S+ of them to write", shown), shown
    assert not os.path.exists(out)


def test_on_policy_stands_in_the_model_card(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, **WRITING, max_steps=1,
           divergence="reverse")
    card = Path(out, "final", "README.md").read_text()
    assert "that the student wrote (on_policy), there T^2 x KL(student, teacher) alone" in card


def test_on_policy_eval_scores_the_students_own_texts(   # optional: eval
        tmp_path, teacher, student, text):
    """Against whole forwards of what it writes by hand; seeded."""
    fields = dict(mode="eval", teacher=teacher, student=student, dataset=text, seq_len=32,
                  dtype="fp32", max_new_tokens=6, on_policy_prompt=5, temperature=2.0)

    def own(name, **more):
        cli(*flags(**fields, **more, output_dir=tmp_path / name))
        models_ = json.loads((tmp_path / name / "report.json").read_text())["models"]
        assert models_["teacher"]["own"] == 0
        return models_["student"]["own"]

    _, held_out = rows_of(text, seq_len=32)
    prompts = [ids[:5] for ids in ids_of(held_out)]
    model = load(student)
    coded = coded_texts(prompts, [greedy_text(model, prompt, 6) for prompt in prompts])
    for divergence in ("forward", "reverse"):
        _, _, kl = model_losses(model, load(teacher), coded, 0.0, 2.0, divergence)
        found = own(divergence, on_policy_temperature=GREEDY, divergence=divergence)
        assert found == pytest.approx(kl.item(), rel=1e-5)
    assert own("a") == own("b") != own("c", seed=1)


# ---- what it costs


def bench_on_policy():
    """Writing against transformers' own generate, same model and prompts; and what share of a step
    it is."""
    student_shape, teacher_shape, sequences, tokens = step_shapes()
    vocab = student_shape["vocab_size"]
    new = tokens // 2
    tokenizer = types.SimpleNamespace(eos_token_id=None, get_vocab=lambda: {"last": vocab - 1})
    rows = torch.randint(0, vocab, (sequences, tokens)).tolist()
    prompts = [row[:tokens // 4] for row in rows]
    texts = [row[tokens // 4:tokens // 4 + new] for row in rows]
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        transformers.Qwen3Config(**student_shape).save_pretrained(f"{folder}/student")
        transformers.Qwen3Config(**teacher_shape).save_pretrained(f"{folder}/teacher")
        cfg = sd.Config(student=f"{folder}/student/config.json", alpha=1.0, use_wandb=False)
        root = sd.load_student(cfg)
        model = AutoModelForCausalLM.from_config(
            root.model.config, dtype=sd.compute_dtype(cfg)).to(sd.DEVICE).eval()
        ids_BT = torch.tensor(prompts, device=sd.DEVICE)

        def plain():
            model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new,
                           do_sample=True, top_k=0, pad_token_id=0)

        def ours():
            sd.write_texts(root, tokenizer, prompts, list(range(sequences)), new, 1.0, tokens)

        batch = sd.collate(sd.as_rows(prompts, texts))
        found = interleaved({
            "plain generate": plain, "ours": ours,
            "a step on the texts": our_step(folder, [batch], alpha=0.0)}, rounds=5)
    print(f"\nwriting {sequences} x {new} tokens after {tokens // 4}, V {vocab:,}")
    for name in ("plain generate", "ours"):
        speed = sequences * new / found[name]
        print(f"  {name:<20}{speed:>12,.0f} tokens/s"
              f"{found['plain generate'] / found[name]:>8.2f} x plain")
    share = found["ours"] / (found["ours"] + found["a step on the texts"])
    print(f"  writing is {share:.0%} of a step on policy")


# --------------------------------------------------------------------------------------------------
# Optional: generate: against the real SDKs and a server of our own that misbehaves.


def random_words(seed, count=40):
    """The same for the same seed; two texts of 40 are no near duplicates."""
    stems = "list map tree queue sort find merge split read write open close".split()
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(stems)}{rng.randrange(1000)}" for _ in range(count))


# What a server says where a fault, by its name, is one of the text alone.
FAULTY_TEXTS = {
    "refusal": "I'm sorry, but I can't help with that: it is against my rules.",
    "loop": "and so on " * 99,
    "duplicate": random_words("same"),
    "empty": "",
    "fence": "Here it is for you:\n```python\nx = 1",
    "code": "Here it is for you:\n```python\ndef f(:\n    pass\n```",
}


def no_fault(prompt, attempt):
    return None


class ApiServer(http.server.ThreadingHTTPServer):
    """OpenAI and Anthropic on loopback, while it is entered.

    fault(prompt, attempt): how this attempt misbehaves. None: not at all; a number: the status of
    an error; (status, seconds): with Retry-After; a name: see ApiHandler and FAULTY_TEXTS; a dict:
    what the answer says in place of its own keys. reply(prompt): what is said otherwise. delay,
    jitter: seconds before an answer, always and at most on top. runner: a thread or a process."""
    daemon_threads = True
    request_queue_size = 200

    def __init__(self, fault=no_fault, reply=random_words, delay=0, jitter=0,
                 runner=threading.Thread):
        super().__init__(("127.0.0.1", 0), ApiHandler)
        self.fault = fault
        self.reply = reply
        self.delay = delay
        self.jitter = jitter
        self.lock = threading.Lock()
        self.tries = collections.Counter()    # prompt -> requests
        self.billed = collections.Counter()   # prompt -> requests that a provider would bill
        self.seen = []                        # (body, key) of each request
        self.runner = runner(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.runner.start()
        return self

    def __exit__(self, *exception):
        if isinstance(self.runner, threading.Thread):
            self.shutdown()
        else:
            self.runner.kill()
        self.server_close()

    def handle_error(self, request, client_address):
        """Silent: clients get killed."""


class ApiHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1   # an answer in one piece, unless it is flushed

    def log_message(self, *args):
        """Silent."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        key = self.headers["authorization"] or self.headers["x-api-key"]
        key = key.split()[-1]   # "Bearer KEY"
        with server.lock:
            server.seen.append((body, key))
            server.tries[prompt] += 1
            fault = server.fault(prompt, server.tries[prompt])
        time.sleep(server.delay + server.jitter * random.random())
        if isinstance(fault, int):
            self.send_error_status(fault, key)
            return
        if isinstance(fault, tuple):
            self.send(fault[0], b"{}", header=("retry-after", str(fault[1])))
            return
        with server.lock:   # from here on a provider sends a bill, whatever becomes of the reply
            server.billed[prompt] += 1
        if fault == "hang":
            time.sleep(5)   # longer than request_timeout in the test that hangs
        if fault in ("drop", "hang"):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "bad json":
            self.send(200, b'{"choices": [{"mess')
            return
        text = self.text_for(prompt, fault, key)
        data = self.reply_data(text, cut_off=fault == "length")
        if fault == "no usage":
            del data["usage"]
        if isinstance(fault, dict):
            data.update(fault)
        pause = 0.02 if fault == "slow" else 0
        self.send(200, json.dumps(data).encode(), pause)

    def text_for(self, prompt, fault, key):
        if fault == "echo":
            return prompt
        if fault == "key":
            return key + random_words(prompt)
        if isinstance(fault, str) and fault in FAULTY_TEXTS:
            return FAULTY_TEXTS[fault]
        return self.server.reply(prompt)

    def reply_data(self, text, cut_off):
        """A reply of 100 + 200 tokens, in the form of the provider that the path belongs to."""
        if self.path == "/v1/messages":
            return {
                "content": [{"type": "text", "text": text}],
                "stop_reason": "max_tokens" if cut_off else "end_turn",
                "usage": {"input_tokens": 100, "output_tokens": 200},
            }
        return {
            "choices": [{
                "finish_reason": "length" if cut_off else "stop",
                "message": {"role": "assistant", "content": text},
            }],
            "usage": {"prompt_tokens": 100, "completion_tokens": 200},
        }

    def send_error_status(self, status, key):
        """With one of the two headers by which servers ask for patience, and with the key."""
        data = json.dumps({"error": {"message": f"{status} for {key}", "type": "x"}}).encode()
        if status == 429:
            patience = ("retry-after", "0.02")
        else:
            patience = ("retry-after-ms", "10")
        self.send(status, data, header=patience)

    def send(self, status, data, pause=0, header=None):
        """pause: seconds after each 200 bytes."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if header:
            self.send_header(*header)
        self.end_headers()
        for start in range(0, len(data), 200):
            self.wfile.write(data[start:start + 200])
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
        num_examples=questions, prompts_file=folder / "prompts.txt", output_dir=folder / "out")
    return {**fields, **more}


def run_generate(fields, rc=0):
    return cli(*flags(**fields), rc=rc)


def kept_and_rejected(folder):
    """-> the rows of train.jsonl, those of rejected.jsonl"""
    kept = []
    rejected = []
    if (folder / "out/train.jsonl").exists():
        kept = read_lines(folder / "out/train.jsonl")
    if (folder / "out/rejected.jsonl").exists():
        rejected = read_lines(folder / "out/rejected.jsonl")
    return kept, rejected


def all_rows(folder):
    kept, rejected = kept_and_rejected(folder)
    return kept + rejected


def summary_of(folder):
    return json.loads((folder / "out/summary.json").read_text())


def prompt_of(row):
    return row["messages"][0]["content"]


def number_of(prompt):
    """"Question 7: what is ...?" -> 7"""
    return int(prompt.split()[1].removesuffix(":"))


def count_reasons(rejected):
    """Without what the reason "failed: ..." goes on to say."""
    return collections.Counter(row["reason"].split(":")[0] for row in rejected)


def faults_by_number(faults):
    """{number of a question: how it misbehaves at every attempt} -> fault of a server"""
    def fault(prompt, attempt):
        return faults.get(number_of(prompt))
    return fault


PASSING_FAULTS = (429, 500, 503, "drop", "slow", 529)
LASTING_FAULTS = (
    "bad json", "no usage", "length", "refusal", "duplicate", "code", "empty", "loop")


def faults_by_chance(share):
    """-> fault of a server: this share of the prompts misbehaves, half of them at the first
    attempt, half of them at every attempt; which one it is hangs on the prompt alone."""
    def fault(prompt, attempt):
        digest = hashlib.md5(prompt.encode()).hexdigest()
        chance = int(digest, 16) / 2**128   # even from 0 to 1
        if chance < share / 2:
            i = int(2 * chance / share * len(PASSING_FAULTS))
            return PASSING_FAULTS[i] if attempt == 1 else None
        if chance < share:
            i = int((2 * chance / share - 1) * len(LASTING_FAULTS))
            return LASTING_FAULTS[i]
        return None
    return fault


@pytest.mark.parametrize("provider", [
    "openai",
    pytest.param("anthropic", marks=pytest.mark.campaign),
])
def test_generate_faults(tmp_path, provider):
    """500 prompts, 30 % faults: all answered or accounted for, none twice, and the order of arrival
    changes nothing."""
    fault = faults_by_chance(0.3)
    results = []
    for concurrency, jitter in ((16, 0.0), (40, 0.03)):
        folder = tmp_path / str(concurrency)
        with ApiServer(fault, jitter=jitter) as server:
            fields = generate_fields(folder, server, 500, provider, concurrency=concurrency)
            out = run_generate(fields).out
        kept, rejected = kept_and_rejected(folder)
        check_all_accounted_for(kept, rejected, out)
        refused_once = [prompt for prompt in server.tries if isinstance(fault(prompt, 1), int)]
        assert refused_once
        for prompt in refused_once:
            assert server.tries[prompt] == 2
            assert server.billed[prompt] == 1
        results.append((kept, sorted((row["prompt_id"], row["reason"]) for row in rejected)))
    assert results[0] == results[1]


def check_all_accounted_for(kept, rejected, out):
    """Each of 500 prompts once, each fault under its name, and the printed table says the same."""
    rows = kept + rejected
    assert len(rows) == 500
    assert len({row["prompt_id"] for row in rows}) == 500
    fates = count_reasons(rejected)
    assert set(fates) == {
        "cut off", "refusal", "empty or too short", "exact duplicate", "repetition loop",
        "code does not parse", "failed"}
    fates["kept"] = len(kept)
    for name, count in fates.items():
        assert f"{name:20}{count:8,}" in out


def test_generate_prompts():
    """100,000 distinct prompts, balanced, in less than 10 s of CPU; asking for more only adds to
    them; weights are kept."""
    start = time.process_time()
    prompts = first_prompts(100_000)
    assert time.process_time() - start < 10
    assert len({messages[0]["content"] for _, messages in prompts}) == 100_000
    assert count_categories(prompts) == dict.fromkeys(sd.TASKS, 100_000 // 8)

    assert first_prompts(50) == prompts[:50]
    assert first_prompts(50, seed=1) != prompts[:50]

    weighted = first_prompts(400, ["implement=3", "debug"])
    assert count_categories(weighted) == {"implement": 300, "debug": 100}
    weighted = first_prompts(60, ["implement=2.0", "debug=.5e0", "explain=05"])
    assert count_categories(weighted) == {"implement": 16, "debug": 4, "explain": 40}

    for correct, wrong in sd.BUGS:   # the prompt must say what may be wrong
        if not (is_operator(correct) and is_operator(wrong)):
            assert "index" in sd.TASKS["debug"]


def first_prompts(count, categories=(), seed=0):
    return list(itertools.islice(sd.compose_prompts(list(categories), seed), count))


def count_categories(prompts):
    return collections.Counter(category for category, _ in prompts)


def is_operator(text):
    return re.fullmatch(" [-+<=>!]+ ", text) is not None


def flaws_of(reply, prompt="What is it?"):
    """The filters that reject it."""
    flaws = sd.find_flaws(prompt, reply, "stop")
    return [name for name, found in flaws.items() if found]


def test_generate_filters(tmp_path):
    """Each filter by name through the whole path, and replies that none may reject."""
    faults = [
        "length", "refusal", "empty", "echo", "loop", "fence", "code", "duplicate", "duplicate"]

    def reply(prompt):
        number = number_of(prompt)
        if number == 12:
            return random_words(prompt) + "\ud800"   # half a pair, as some models cut it
        if number in (20, 21):
            return random_words("near", 400) + prompt[-20:]
        return random_words(prompt)

    with ApiServer(faults_by_number(dict(enumerate(faults))), reply) as server:
        run_generate(generate_fields(tmp_path, server, 22))
    kept, rejected = kept_and_rejected(tmp_path)
    assert {number_of(prompt_of(row)): row["reason"] for row in rejected} == {
        0: "cut off",
        1: "refusal",
        2: "empty or too short",
        3: "repeats the prompt",
        4: "repetition loop",
        5: "code does not parse",
        6: "code does not parse",
        8: "exact duplicate",
        21: "near duplicate",
    }
    assert [number_of(prompt_of(row)) for row in kept] == [7, *range(9, 21)]
    assert set(kept[0]) == {
        "messages", "category", "model", "usage", "cost", "finish_reason", "prompt_id"}

    for good in (
        "```python\n>>> 1 + 1\n2\n```\nA session.",
        "````md\n```python\nx = (\n```\n````\nFences in a fence.",
        "I can't assist but so:\n```python\nx = 1\n```",
        "   ```python\n   x = 1\n   ```\nindented, as in a list",
        "```js\nfoo(() => {\n```\nis no Python",
        "Sorry is a word of five letters.",
        Path(__file__).read_text(),
    ):
        assert flaws_of(good) == [], good
    for refusal in (
        "I’m sorry, but I cannot help with this.",
        "As an AI model, I do not.",
        "I can't help you.",
    ):
        assert "refusal" in flaws_of(refusal), refusal


def test_generate_refusals():
    """A refusal teaches nothing; a reply that only begins like one is paid for, and kept."""
    for refusal in (
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
    ):
        assert "refusal" in flaws_of(refusal), refusal
    for good in (
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
    ):
        assert flaws_of(good) == [], good


def test_generate_fences():
    """Fences as models write them: \\r\\n, one line, in a list, python3; broken code in them."""
    block = "Here:\n```python\ndef f(x):\n    return x\n```\nThat is all."
    in_list = "- ```py\n  x = 1\n  y = 2\n  ```\n- that is it"
    for good in (
        block,
        in_list,
        block.replace("\n", "\r\n"),
        in_list.replace("\n", "\r\n"),
        "```print(1)```",
        "```print(1)```\nprints it",
        "1. so:\n   ```python3\n   x = 1\n   ```",
        "```python2\nprint 1\n```\nis no Python 3",
    ):
        assert flaws_of(good) == [], good
    for broken in (
        "Here:\n```python3\ndef f(:\n```",
        "Here:\r\n```py\r\ndef f(:\r\n```",
        "Here:\n```python\nx = 1",
        "Here:\n```Python3\nprint 1\n```",
        "- ```py\n  x = (\n  ```",
        "- ```py\n  x = 1",
        "```print(1)```\n```js\nf()",
    ):
        assert "code does not parse" in flaws_of(broken), broken


def test_generate_duplicates(tmp_path):
    """What a sign tells apart is no duplicate, nor is a label that fits many prompts."""
    code = "for (i = 0; i {} n; i++) {{ total += table[i]; }} return total; "
    code += random_words("code", 6)
    dialogues = [(f"Is {i} prime?", "yes") for i in range(9)]
    dialogues += [
        ("Is  8 prime?", "yes"),            # 9: a copy of 8
        ("more", "return a < b"),
        ("more", "return a >= b"),
        ("more", code.format("<")),
        ("more", code.format("<")),         # 13: a copy of 12
        ("more", code.format(">=")),
    ]
    for i, (prompt, reply) in enumerate(dialogues):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        row = {"messages": messages, "prompt_id": i, "cost": 0, "finish_reason": "stop"}
        sd.append_jsonl(tmp_path / "train", row)
    fates = sd.drop_duplicates(str(tmp_path / "train"), str(tmp_path / "rejected"), range(15))
    assert fates["kept"] == 13, fates
    assert fates["exact duplicate"] == 2, fates
    assert [row["prompt_id"] for row in sd.read_jsonl(tmp_path / "rejected")] == [9, 13]
    assert not list(tmp_path.glob("*.tmp"))


def test_generate_own_prompts(tmp_path):
    """All of the file unless num_examples says less, BOM or not; a short reply or a piece of the
    prompt may be what it wants."""
    mail = "write to ann@example.org or ring 555 12 34, any day but Sunday"
    replies = {
        "What is 2+2?": "4",
        f"Which address is in this: {mail}?": "ann@example.org",
        "Say no more.": " \n",
        "Give this back, all of it.": "give this back, all of it.",
    }
    prompts = [*replies, *(f"Question {i}: is {i} even?" for i in range(146))]

    def reply(prompt):
        return replies.get(prompt, "```yes```")

    with ApiServer(reply=reply) as server:
        fields = generate_fields(tmp_path, server, 1, num_examples=None)
        (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8-sig")
        result = run_generate(fields)
        kept, rejected = kept_and_rejected(tmp_path)
        assert len(kept) == 149
        assert [prompt_of(row) for row in kept[:2]] == prompts[:2]
        assert [row["reason"] for row in rejected] == ["empty or too short"]
        # nobody said what it costs: it is not free
        assert "USD" not in result.out.splitlines()[-1]
        assert "USD" not in result.err

        # "yes" is an answer to a prompt of the user's; to a task of ours it is none
        ours = dict(num_examples=1, prompts_file=None, categories=["implement=1.0"],
                    output_dir=tmp_path / "ours/out")
        run_generate({**fields, **ours})
    _, rejected = kept_and_rejected(tmp_path / "ours")
    assert [row["reason"] for row in rejected] == ["empty or too short"]

    assert "repeats the prompt" not in flaws_of("give that", prompt="Give this back.")
    assert "repeats the prompt" in flaws_of("this back, all.", prompt="Give this back, all.")


def test_generate_failed(tmp_path):
    """What failed is asked again by the same command, its cost is not forgotten, and one that
    always fails stops nothing."""
    lasting = {0: 400, 11: "duplicate", 12: "duplicate", 20: "length"}
    passing = {3: "bad json", 4: 400, 7: "bad json"}
    prompts_file = tmp_path / "prompts.txt"
    with ApiServer(faults_by_number({**lasting, **passing})) as server:
        fields = generate_fields(tmp_path, server, 30, concurrency=1, price_in=1, price_out=10)
        # the first one is answered: an error of the very first would stop the run
        prompts_file.write_text("Question 99: who?\n" + prompts_file.read_text())
        run_generate(fields)
        _, rejected = kept_and_rejected(tmp_path)
        assert count_reasons(rejected) == {"failed": 4, "exact duplicate": 1, "cut off": 1}
        spent_before = summary_of(tmp_path)["spent_usd"]
        tries_before = server.tries.copy()

        server.fault = faults_by_number(lasting)
        fields["num_examples"] = 31   # Question 29 is new
        run_generate(fields)
    asked_again = {number_of(prompt) for prompt in server.tries - tries_before}
    assert asked_again == {0, 3, 4, 7, 29}, asked_again

    kept, rejected = kept_and_rejected(tmp_path)
    assert len(kept) == 28
    rows = {number_of(prompt_of(row)): row for row in kept + rejected}
    assert len(rows) == len(kept + rejected) == 31
    reasons = {number_of(prompt_of(row)): row["reason"].split(":")[0] for row in rejected}
    assert reasons == {0: "failed", 12: "exact duplicate", 20: "cut off"}

    summary = summary_of(tmp_path)
    assert summary["failed"] == 1
    assert summary["kept"] == 28
    reply_cost = 0.0021   # 100 tokens in, 200 out
    assert summary["spent_usd"] == pytest.approx(spent_before + 4 * reply_cost)
    assert summary["spent_usd"] == pytest.approx(sum(row["cost"] for row in rows.values()))
    assert rows[4]["cost"] == pytest.approx(reply_cost)
    assert rows[3]["cost"] > rows[4]["cost"]   # the one that had no form may have been billed


def test_generate_failed_for_good(tmp_path):
    """A dozen prompts that the server never takes, a fifth of all: they stop no later run before it
    asks what is new."""
    faults = {number: 400 for number in range(4, 61, 5)}
    with ApiServer(faults_by_number(faults)) as server:
        for questions in (60, 61):
            run_generate(generate_fields(tmp_path, server, questions, concurrency=1))
            kept, rejected = kept_and_rejected(tmp_path)
            assert len(kept) == questions - 12
            assert len(rejected) == 12
    assert set(server.billed.values()) == {1}


def test_generate_rows(tmp_path):
    """A last row that is whole is kept, whatever came after it; half a row goes; reading makes no
    file."""
    path = tmp_path / "rows.jsonl"
    assert sd.read_jsonl(path) == []
    assert not path.exists()
    for tail, rows in (
        (b'{"b": 2}', [{"a": 1}, {"b": 2}]),
        (b'{"b": "\xc3', [{"a": 1}]),
        (b"", [{"a": 1}]),
    ):
        path.write_bytes(b'{"a": 1}\n' + tail)
        assert sd.read_jsonl(path) == rows
        sd.append_jsonl(path, {"c": 3})
        assert sd.read_jsonl(path) == [*rows, {"c": 3}]
    path.write_bytes(b'{"a": 1}')
    assert sd.read_jsonl(path) == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n'


def test_generate_local_seed(tmp_path, teacher):
    """The same seed gives the same replies, after a kill too; another seed gives others."""
    (tmp_path / "prompts.txt").write_text("".join(f"Question {i}: what?\n" for i in range(11)))

    def replies_of_run(name, seed, num_examples=11):
        run_generate(dict(
            mode="generate", provider="local", teacher=teacher, num_examples=num_examples,
            max_tokens=8, concurrency=4, api_temperature=1, seed=seed,
            prompts_file=tmp_path / "prompts.txt", output_dir=tmp_path / name / "out"))
        rows = all_rows(tmp_path / name)
        return {number_of(prompt_of(row)): row["messages"][1]["content"] for row in rows}

    whole = replies_of_run("whole", seed=3)
    replies_of_run("parts", seed=3, num_examples=8)
    for name in ("train.jsonl", "rejected.jsonl"):   # a kill in the midst of the second batch
        path = tmp_path / "parts/out" / name
        rows = [row for row in sd.read_jsonl(path) if number_of(prompt_of(row)) < 6]
        write_jsonl(path, rows)
    parts = replies_of_run("parts", seed=3)
    assert len(whole) == len(parts) == 11
    assert len(set(whole.values())) > 5
    assert replies_of_run("other", seed=4) != whole
    for number in (6, 7):   # what is left of a batch is a batch of its own
        del whole[number]
        del parts[number]
    assert parts == whole


def spawn_until_billed(fields, server, count):
    """The real command in a process of its own, at the moment when the server has billed `count`
    replies."""
    process = spawn(*flags(**fields))
    while server.billed.total() < count and process.poll() is None:
        time.sleep(0.002)
    return process


@pytest.mark.campaign
def test_generate_kill(tmp_path):
    """kill -9 at five moments, then a run to the end: only what was in flight is paid twice, and
    the cap knows."""
    concurrency = 4
    reply_cost = 5e-4   # 100 tokens in, 200 out
    with ApiServer(delay=0.03) as server:
        fields = generate_fields(tmp_path, server, 60, concurrency=concurrency, price_in=1,
                                 price_out=2, max_cost=1)
        moments = (1, 9, 20, 33, 47)
        for moment in moments:
            process = spawn_until_billed(fields, server, moment)
            process.kill()
            process.communicate()
            with open(tmp_path / "out/train.jsonl", "a") as f:
                f.write('{"messages": [{"role": "us')   # what a full disk leaves
        run_generate(fields)
        rows = all_rows(tmp_path)
        assert len(rows) == len(server.billed) == 60
        assert len({row["prompt_id"] for row in rows}) == 60
        assert 0 < server.billed.total() - 60 <= len(moments) * concurrency
        assert server.billed.total() * reply_cost <= summary_of(tmp_path)["spent_usd"] + 1e-9

        tries = server.tries.copy()
        run_generate(fields)
        assert server.tries == tries   # everything is there: nothing is asked


def test_generate_signal(tmp_path):
    """SIGINT: what is in flight arrives, nothing new is asked, exit 0; the same command goes on."""
    with ApiServer(delay=0.05) as server:
        fields = generate_fields(tmp_path, server, 40, concurrency=3)
        process = spawn_until_billed(fields, server, 6)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert "stopped by a signal" in out
        assert 6 <= len(server.billed) < 40, out
        assert len(kept_and_rejected(tmp_path)[0]) == len(server.billed)
        run_generate(fields)
        assert len(kept_and_rejected(tmp_path)[0]) == 40
        assert set(server.billed.values()) == {1}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_cap(tmp_path, provider):
    """The server's own bill stays below 1.00 USD whatever goes wrong, and most of it is used."""
    reply_cost = 0.022   # 0.033 at worst
    with ApiServer(faults_by_chance(0.5)) as server:
        fields = generate_fields(tmp_path, server, 200, provider, concurrency=16, price_in=20,
                                 price_out=100, max_cost=1)
        result = run_generate(fields)
        rows = all_rows(tmp_path)
        bill = server.billed.total() * reply_cost
        spent = summary_of(tmp_path)["spent_usd"]
        assert "max_cost" in result.out
        assert 0.7 < bill <= spent <= 1, (result.err, bill, spent)
        assert spent == pytest.approx(sum(row["cost"] for row in rows))

        tries = server.tries.total()
        run_generate(fields)
        assert server.tries.total() - tries <= 1   # nothing is left to spend
    # where nobody said what it cost, it is the worst case
    unknown = [row["cost"] for row in rows if row["usage"]["prompt_tokens"] is None]
    assert unknown
    assert min(unknown) > 0.03
    assert "price" in run_generate({**fields, "price_in": None}, rc=2).err


def test_generate_key(tmp_path, monkeypatch):
    """The key is nowhere, though the server repeats it in its errors and replies."""
    def reject_or_repeat(prompt, attempt):
        return 400 if number_of(prompt) % 4 == 3 else "key"

    def reject(prompt, attempt):
        return 401

    for provider, secret in (
        ("openai", "sk-test-0123456789abcdef"),
        ("anthropic", "sk-ant-fedcba9876543210"),
    ):
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", secret)
        with ApiServer(reject_or_repeat) as server:
            result = run_generate(generate_fields(tmp_path / provider, server, 40, provider))
        assert server.seen[0][1] == secret
        files = "".join(path.read_text() for path in (tmp_path / provider / "out").iterdir())
        assert "failed: " in files
        assert "***" in files
        assert secret not in files + result.out + result.err

        with ApiServer(reject) as server:
            fields = generate_fields(tmp_path / "refused", server, 40, provider)
            result = run_generate(fields, rc=2)
        assert "***" in result.err
        assert secret not in result.out + result.err


def test_generate_errors(tmp_path, monkeypatch):
    """What no request would survive is one `error:` line at once, and costs as little."""
    check_fatal_status(tmp_path / "0", "openai", status=401)
    check_fatal_status(tmp_path / "1", "anthropic", status=404)
    check_fatal_status(tmp_path / "2", "openai", status=401, first_refused=9)
    check_fatal_status(tmp_path / "3", "anthropic", status=400)

    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    plain = dict(mode="generate", output_dir=tmp_path / "o")
    for category in ("poetry", "debug=0", "test=x", "test=", "test=inf", "test=nan", "test=-1"):
        check_one_error(category, plain, api_model="m", categories=category)
    check_one_error("price_out", plain, api_model="m", price_in=1)
    check_one_error("price_out", plain, api_model="m", price_out=1)
    check_one_error("none.txt", plain, api_model="m", prompts_file=tmp_path / "none.txt")
    with ApiServer() as server:
        nobody_there = generate_fields(tmp_path / "p", server, 50)
    check_one_error("onnect", nobody_there)
    check_one_error("--teacher", plain, provider="local")
    monkeypatch.delenv("OPENAI_API_KEY")
    check_one_error("_API_KEY", plain, api_model="m")
    monkeypatch.setitem(sys.modules, "openai", None)
    check_one_error("pip install openai", nobody_there)


def check_fatal_status(folder, provider, status, first_refused=1):
    """From this request on the server refuses all; few more are asked, no paid reply is lost."""
    def refuse(prompt, attempt):
        return status if server.tries.total() >= first_refused else None

    with ApiServer(refuse) as server:
        check_one_error(str(status), generate_fields(folder, server, 50, provider))
    kept, rejected = kept_and_rejected(folder)
    assert len(kept) == len(server.billed) >= first_refused - 1
    assert not rejected
    assert server.tries.total() < first_refused + 8


def check_one_error(named, fields, **more):
    """The run fails with one line of error, which names this."""
    lines = run_generate({**fields, **more}, rc=2).err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert named in errors[0], errors


def test_generate_slow_server(tmp_path):
    """A server that admits 50 a second slows the run down; one that hangs is asked again after
    request_timeout."""
    admitted = collections.deque([0.0] * 5, maxlen=5)   # the moments of the last five

    def limit(prompt, attempt):
        if number_of(prompt) == 7 and attempt == 1:
            return "hang"
        now = time.monotonic()
        if now - admitted[0] < 0.1:
            return 429
        admitted.append(now)
        return None

    with ApiServer(limit) as server:
        run_generate(generate_fields(tmp_path, server, 100, concurrency=30, request_timeout=2))
    kept, rejected = kept_and_rejected(tmp_path)
    assert len(kept) == 100, rejected
    assert server.tries.total() > 120


def test_generate_stops(tmp_path):
    """More than 20 % of failures in the last 50: the run stops, keeps what it has and says so."""
    def go_bad(prompt, attempt):
        if server.tries.total() > 60 and number_of(prompt) % 2:
            return 400
        return None

    with ApiServer(go_bad) as server:
        result = run_generate(generate_fields(tmp_path, server, 400), rc=2)
    kept, rejected = kept_and_rejected(tmp_path)
    assert "11 of the last" in result.err
    assert len(kept) > 60
    assert 11 <= len(rejected) < 30
    assert server.tries.total() < 120


def test_generate_prompts_file(tmp_path):
    """Own rows, texts or conversations, reach each provider in its form; a bad row is named."""
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is a trie?"},
    ]
    heap = {"prompt": "What is a heap?"}
    rows = [heap, heap, {"messages": conversation, "category": "explain", "more": 1}]
    path = tmp_path / "own.jsonl"
    own_text = "\n\n".join(json.dumps(row) for row in rows)
    for provider, temperature, system in (
        ("openai", 0.3, None),
        ("anthropic", None, "Be brief.\n\nBe kind."),
    ):
        path.write_text(own_text)
        with ApiServer() as server:
            fields = generate_fields(tmp_path / provider, server, 9, provider, prompts_file=path,
                                     api_temperature=temperature)
            run_generate(fields)
        kept, _ = kept_and_rejected(tmp_path / provider)
        asked = [row["messages"][:-1] for row in kept]
        assert asked == [[{"role": "user", "content": "What is a heap?"}], conversation]
        assert [row["category"] for row in kept] == ["own", "explain"]
        body, _ = server.seen[-1]
        assert body.get("temperature") == temperature
        assert body.get("max_tokens") == 300
        assert body.get("system") == system

    for bad_row in (
        json.dumps({"messages": kept[-1]["messages"]}),   # it has its reply already
        "nonsense",
        '{"question": 1}',
        '{"messages": [{"role": "user"}]}',
        "[]",
        '{"prompt": 3}',
    ):
        path.write_text('{"prompt": "What is a heap?"}\n' + bad_row)
        assert "own.jsonl" in run_generate(fields, rc=2).err


@pytest.mark.campaign
def test_generate_throughput(tmp_path):
    """32 in flight are at least 20 x as fast as one at a time, against 100 ms of latency."""
    # the server in a process of its own: it must not share our core
    process = multiprocessing.get_context("fork").Process
    rates = []
    with ApiServer(delay=0.1, runner=process) as server:
        for concurrency, questions in ((1, 3), (1, 20), (32, 1000)):   # the first loads the SDK
            folder = tmp_path / f"{concurrency}.{questions}"
            fields = generate_fields(folder, server, questions, concurrency=concurrency)
            start = time.perf_counter()
            run_generate(fields)
            rates.append(questions / (time.perf_counter() - start))
    gain = rates[2] / rates[1]
    if gain < 20 and os.getloadavg()[0] > os.cpu_count():
        pytest.skip(f"the machine is busy: {gain:.1f} x")
    assert gain >= 20, rates


def test_generate_local(tmp_path, teacher):
    """A model of one's own answers: tokens are counted, the end of a reply is told from a cut; a
    price or an API's model beside it is refused, and so is a damaged file."""
    fields = dict(mode="generate", provider="local", teacher=teacher, num_examples=11,
                  max_tokens=12, output_dir=tmp_path / "out")
    run_generate({**fields, "concurrency": 4, "api_temperature": 1})
    rows = all_rows(tmp_path)
    assert len(rows) == 11
    for row in rows:
        assert row["finish_reason"] in ("stop", "length")
        completion_tokens = row["usage"]["completion_tokens"]
        if row["finish_reason"] == "length":
            assert completion_tokens == 12
        else:
            assert completion_tokens < 12
        prompt_bytes = (prompt_of(row) + "\n\n").encode()
        assert row["usage"]["prompt_tokens"] == 1 + len(prompt_bytes)   # <|begin|>
    for more in (dict(api_model="x"), dict(price_in=1)):
        run_generate({**fields, **more, "output_dir": tmp_path / "other"}, rc=2)
    (tmp_path / "out/train.jsonl").write_text('{"messages": [\n{}\n')
    error = run_generate(fields, rc=2).err
    assert "train.jsonl" in error
    assert "line 1" in error


def test_generate_says_what_to_raise_and_no_price_where_there_is_none(tmp_path, teacher):
    """Replies that are cut off are rejected: where many are, a line says what would mend it."""
    fields = dict(mode="generate", provider="local", teacher=teacher, num_examples=4,
                  max_tokens=2, output_dir=tmp_path / "out")
    shown = run_generate(fields).out
    assert "USD" not in shown
    cut = sum(row.get("reason") == "cut off" for row in all_rows(tmp_path))
    assert cut > 1
    assert f"{cut / 4:.0%} of the replies did not end within max_tokens 2: --max_tokens 8" in shown


def test_generate_local_moves_within_a_batch(tmp_path, teacher, monkeypatch):
    """Beside the bar stands how many tokens the replies of this batch have."""
    clock = itertools.count()   # a second passes each time that somebody looks
    monkeypatch.setattr(sd.time, "monotonic", lambda: float(next(clock)))
    fields = dict(mode="generate", provider="local", teacher=teacher, num_examples=2,
                  max_tokens=30, output_dir=tmp_path / "out")
    shown = run_generate(fields).err
    assert "this batch: token 1 of at most 30" in shown


def test_generate_local_with_weights_on_the_host(tmp_path, teacher):
    """--cpu_offload gathers a layer at a time; the replies are the same."""
    texts = []
    for offload in (False, True):
        folder = tmp_path / str(offload)
        run_generate(dict(mode="generate", provider="local", teacher=teacher, num_examples=3,
                          max_tokens=8, output_dir=folder / "out", cpu_offload=offload))
        texts.append([row["messages"] for row in all_rows(folder)])
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]


def test_generate_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    fields = dict(mode="generate", api_model="m", output_dir=tmp_path / "out")
    assert "torchrun" in run_generate(fields, rc=2).err


def test_generate_then_train(tmp_path, student):
    """generate -> --dataset out/train.jsonl --alpha 1 -> final/"""
    with ApiServer() as server:
        run_generate(generate_fields(tmp_path, server, 60))
    cli(*flags(dataset=tmp_path / "out/train.jsonl", alpha=1, student=student, max_steps=4,
               eval_samples=4, seq_len=128, output_dir=tmp_path / "run"))
    assert (tmp_path / "run/final/model.safetensors").exists()

# ---- what an independent reading broke


def contents_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def our_row(**more):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, a row."}]
    row = dict(messages=messages, category="own", prompt_id="0123", finish_reason="stop",
               usage={}, model="m", cost=0)
    return {**row, **more}


# (file, what stands in it, what the error names)
FOREIGN_FILES = [
    ("train.jsonl", '{"text": "mine"}', "line 1"),                         # no newline at its end
    ("train.jsonl", '{"text": "mine"}\n{"text": "half a l', "line 1"),
    ("train.jsonl", "only a note", "line 1"),
    ("rejected.jsonl", json.dumps({"messages": our_row()["messages"]}), "prompt_id"),
    ("train.jsonl", json.dumps(our_row()) + "\n" + json.dumps(our_row(cost="much")), "line 2"),
    ("train.jsonl", json.dumps(our_row()) + '\n[]\n{"messages": [{"ro', "line 2"),
    ("summary.json", "", "summary.json"),
    ("summary.json", '["mine"]', "summary.json"),
    ("summary.json", '{"spent_usd": "a lot"}', "summary.json"),
    ("config.json", '{"model_type": "llama"}', "config.json"),
]


def test_generate_leaves_foreign_files_alone(tmp_path):
    """Whose rows these are is known before their last line is mended, and before anything else is
    written; nobody is asked."""
    with ApiServer() as server:
        for i, (name, text, named) in enumerate(FOREIGN_FILES):
            fields = generate_fields(tmp_path / str(i), server, 2)
            out = tmp_path / str(i) / "out"
            out.mkdir()
            (out / name).write_text(text)
            before = contents_of(out)
            check_one_error(name, fields)
            check_one_error(named, fields)
            assert contents_of(out) == before, name
        assert not server.tries

        fields = generate_fields(tmp_path / "ours", server, 2)
        run_generate(fields)
        with open(tmp_path / "ours/out/train.jsonl", "a") as f:
            f.write('{"messages": [{"role": "us')   # what a kill leaves is ours, and goes
        run_generate(fields)
        assert len(all_rows(tmp_path / "ours")) == 2
        assert server.tries.total() == 2


def test_generate_other_settings(tmp_path):
    """What decides the rows is the same for all of a folder; where the server stands, how many are
    asked and how much may be spent is not of that kind."""
    with ApiServer() as server:
        run_generate(generate_fields(tmp_path, server, 2))
    before = contents_of(tmp_path / "out")
    with ApiServer() as server:   # at another port
        fields = generate_fields(tmp_path, server, 3)
        for name, value, there in (
            ("api_model", "other", "api_model 'm' there, 'other' here"),
            ("seed", 7, "seed 0 there, 7 here"),
            ("api_temperature", 0.5, "api_temperature None there, 0.5 here"),
            ("max_tokens", 301, "max_tokens 300 there, 301 here"),
        ):
            error = run_generate({**fields, name: value}, rc=2).err
            assert there in error
            assert "--output_dir" in error
        assert contents_of(tmp_path / "out") == before
        assert not server.tries
        run_generate({**fields, "concurrency": 2, "price_in": 1, "price_out": 1, "max_cost": 1})
        assert server.tries.total() == 1
    assert len(all_rows(tmp_path)) == 3


def test_generate_secrets(tmp_path, monkeypatch):
    """Keys, and passwords in URLs, of proxies too, stand in no file and in no error, wherever in a
    reply or an error a server repeats them; no escape sequence reaches the terminal."""
    key = "sk-test-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HTTP_PROXY", "http://someone:pass@127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxyuser:proxy%21word@127.0.0.1:1")
    password = "hunter2hunter2"
    basic = base64.b64encode(f"someone:{password}".encode()).decode()
    secrets = [key, password, "proxy%21word", "proxy!word", basic]

    def repeat(prompt, attempt):
        number = number_of(prompt)
        if number == 0:
            text = " ".join([*secrets, "pass", *random_words(0).split()])
            parts = [{"text": key[:9]}, {"text": key[9:] + text}]
            return {
                "id": key, "model": key, "usage": {"prompt_tokens": key, key: [key]},
                "choices": [{"message": {"content": parts}, "finish_reason": key}]}
        return {"choices": [f"\x1b[31m{key} {password}"]} if number == 1 else 400

    with ApiServer(repeat) as server:
        base = f"http://someone:{password}@127.0.0.1:{server.server_port}/v1"
        result = run_generate(generate_fields(tmp_path, server, 9, api_base=base))
        assert server.seen[0][1] == basic   # it still is what the server gets
    check_no_secret(secrets, tmp_path, result)
    kept, _ = kept_and_rejected(tmp_path)
    assert kept[0]["messages"][1]["content"].startswith("****** *** *** *** *** pass ")
    assert json.loads((tmp_path / "out/config.json").read_text())["api_base"].startswith(
        "http://***@127.0.0.1")

    with ApiServer(lambda prompt, attempt: 401) as server:
        base = f"http://someone:{password}@127.0.0.1:{server.server_port}/v1"
        fields = generate_fields(tmp_path / "refused", server, 9, api_base=base)
        check_no_secret(secrets, tmp_path / "refused", run_generate(fields, rc=2))
    for base in (
        "http://someone:hunter2@127.0.0.1:port/v1",
        "http://someone:hun/ter2@127.0.0.1/v1",
        "ftp://someone:hunter2@127.0.0.1/v1",
        "someone:hunter2@127.0.0.1:80/v1",
        "http://127.0.0.1/v1?key=hunter2",
        "http://127.0.0.1/v1#hunter2",
        "http://[::1/v1",
        "http:///v1",
        "http://127.0.0.1:99999999/v1",
        "http://a\nb/v1",
        "nonsense",
    ):
        fields = generate_fields(tmp_path / "form", server, 1, api_base=base)
        check_one_error("api_base", fields)
        result = run_generate(fields, rc=2)
        check_no_secret([*secrets, "hunter2", "ter2"], tmp_path / "form", result)

    fields = generate_fields(tmp_path / "proxy", server, 1)
    monkeypatch.setenv("ALL_PROXY", "socks9://proxyuser:proxy%21word@127.0.0.1:1")
    left_over = []
    monkeypatch.setattr(sys, "unraisablehook", left_over.append)
    check_one_error("proxies", fields, provider="anthropic")
    gc.collect()
    assert left_over == []   # no traceback of a client that was never whole
    check_no_secret(secrets, tmp_path / "proxy", run_generate(fields, rc=2))


def check_no_secret(secrets, folder, result):
    shown = result.out + result.err
    assert "\x1b[31m" not in shown
    for path in (folder / "out").glob("*"):
        shown += path.read_text()
    assert [secret for secret in secrets if secret in shown] == []


def test_generate_reply_in_parts(tmp_path):
    """Parts of text are one text, thoughts are no part of it, other parts are named."""
    words = random_words("parts")

    def say(*parts):
        return {"choices": [{"finish_reason": "stop", "message": {"content": list(parts)}}]}

    def text(words):
        return {"type": "text", "text": words}

    answers = [
        say(text(words[:9]), text(words[9:])),
        say({"type": "thinking", "thinking": "Hm."}, text(random_words("answer"))),
        say(text(random_words("image")), {"type": "image_url", "image_url": {"url": "x"}}),
        say(text(3)),
    ]
    with ApiServer(faults_by_number(dict(enumerate(answers)))) as server:
        run_generate(generate_fields(tmp_path, server, 4))
    kept, rejected = kept_and_rejected(tmp_path)
    assert [row["messages"][1]["content"] for row in kept] == [words, random_words("answer")]
    assert rejected[0]["reason"] == "not text: image_url"
    assert rejected[1]["reason"].startswith("failed: ")
    assert summary_of(tmp_path)["not text"] == 1


def test_generate_absurd_usage(tmp_path):
    """A reply that says nonsense of its tokens was paid for: it is kept, at the worst price."""
    nonsense = [
        "300", ["a"], 7, {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": 10**30, "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": True},
        {"prompt_tokens": "10", "completion_tokens": 5}, None]
    faults = {number: {"usage": usage} for number, usage in enumerate(nonsense)}
    with ApiServer(faults_by_number(faults)) as server:
        run_generate(generate_fields(tmp_path, server, 9, price_in=1, price_out=10, max_cost=1))
        assert set(server.tries.values()) == {1}
    kept, _ = kept_and_rejected(tmp_path)
    assert len(kept) == 9
    for row in kept[:-1]:
        assert None in row["usage"].values()
        assert row["cost"] > 300 * 10 / 1e6
    assert kept[-1]["cost"] == pytest.approx(0.0021)


def test_generate_all_fail(tmp_path):
    """Where nothing is kept because requests failed, that is an error which says why."""
    with ApiServer(lambda prompt, attempt: {"choices": []}) as server:
        check_one_error("IndexError", generate_fields(tmp_path, server, 5))
    assert summary_of(tmp_path)["failed"] == 5
    assert "all is answered" not in summary_of(tmp_path)["ended"]


def test_generate_full_disk(tmp_path):
    """Somebody fills the disk while requests are in flight: what is paid for finds the room that
    was kept for it, and no reply is paid for twice."""
    tmp_path = tmp_path / "disk"
    tmp_path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small disk here")

    def reply(prompt):
        if number_of(prompt) == 20:
            with contextlib.suppress(OSError), open(tmp_path / "filler", "wb", 0) as f:
                while True:
                    f.write(b"x" * 1024)
        return random_words(prompt, 400)

    try:
        with ApiServer(reply=reply, delay=0.02) as server:
            fields = generate_fields(tmp_path, server, 30, concurrency=4)
            check_one_error("no room", fields)
            assert 20 < server.billed.total() < 30
            assert len(all_rows(tmp_path)) == server.billed.total()
            assert not list(tmp_path.glob("out/*.jsonl.tmp"))
            (tmp_path / "filler").unlink()
            server.reply = random_words
            run_generate(fields)
            assert set(server.billed.values()) == {1}
        assert len(all_rows(tmp_path)) == 30
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_generate_file_limit(tmp_path):
    """The same where no file may be longer than this."""
    with ApiServer(reply=lambda prompt: random_words(prompt, 400)) as server:
        fields = generate_fields(tmp_path, server, 30, concurrency=4)
        shown = Fork(tmp_path / "log", *flags(**fields), limit=60_000).wait()
        assert "no room" in shown, shown
        assert "Traceback" not in shown, shown
        assert 0 < len(all_rows(tmp_path)) == server.billed.total() < 30
        run_generate(fields)
        assert set(server.billed.values()) == {1}
    assert len(all_rows(tmp_path)) == 30


def test_generate_waits(tmp_path, monkeypatch, capsys):
    """A server that turns everything away is given up, SIGTERM ends a wait that it asked for, and
    who waits is told."""
    monkeypatch.setattr(sd, "MAX_SILENCE", 1)

    def closed(prompt, attempt):
        return 503 if number_of(prompt) > 0 else None

    with ApiServer(closed) as server:
        run_generate(generate_fields(tmp_path / "closed", server, 3))
        assert server.tries.total() < 12
    _, rejected = kept_and_rejected(tmp_path / "closed")
    assert ["503" in row["reason"] for row in rejected] == [True, True]

    monkeypatch.setattr(sd, "MAX_SILENCE", 120)

    def signal_us(prompt, attempt):
        if number_of(prompt) == 0:
            return None
        os.kill(os.getpid(), signal.SIGTERM)
        return (503, 59)

    start = time.monotonic()
    with ApiServer(signal_us) as server:
        fields = generate_fields(tmp_path / "signal", server, 3, concurrency=1)
        shown = run_generate(fields).out
    assert time.monotonic() - start < 30   # not the 59 s that the server wants
    assert "stopped by a signal" in shown
    assert len(all_rows(tmp_path / "signal")) == 1

    heartbeat = sd.Heartbeat()
    heartbeat.since -= 11
    ledger = types.SimpleNamespace(stopping=lambda: False, trouble="503 \x1b[2J")
    for _ in range(5):
        heartbeat.speak(ledger, 8)
    shown = capsys.readouterr().out
    assert shown.count("no answer for 11 s, 8 requests in flight") == 1
    assert "\x1b" not in shown


BAD_PROMPT_LINES = [
    b'{"prompt": 3}', b'{"prompt": null}', b'{"prompt": ["a"]}', b"[]", b"7", b"nonsense",
    b'{"question": 1}', b'{"messages": "hi"}', b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": 3, "content": "x"}]}', b'{"prompt": "x", "category": {"a": 1}}',
    b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    b'{"messages": [{"role": "assistant", "content": "x"}]}',
    b'{"prompt": "\xff\xfe"}', b'{"prompt": "a\0"}', b'{"n": ' + b"9" * 5000 + b"}", b"[" * 99999]


def test_generate_prompt_lines(tmp_path):
    """What is wrong with a prompts file is one line, with the number of its line."""
    with ApiServer() as server:
        fields = generate_fields(tmp_path, server, 1, num_examples=None,
                                 prompts_file=tmp_path / "p.jsonl")
    for line in BAD_PROMPT_LINES:
        (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "ok"}\r\n\n' + line + b"\n")
        check_one_error("p.jsonl', line 3,", fields)
    (tmp_path / "p.txt").write_text("What?\n", encoding="utf-16")
    check_one_error("p.txt', line 1,", fields, prompts_file=tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("What?\n", encoding="utf-16-le")
    check_one_error("p.txt', line 1,", fields, prompts_file=tmp_path / "p.txt")
    check_one_error("prompts_file", fields, prompts_file=tmp_path)
    check_one_error("prompts_file", fields, prompts_file="a\0b")

    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    _, messages = sd.parse_prompt_row({"messages": [{"role": "user", "content": parts}]})
    assert messages == [{"role": "user", "content": "Who are you?"}]


# --------------------------------------------------------------------------------------------------
# Optional: eval: how good is the student.


EVAL_VOCAB = 320   # of the teacher's tokenizer
QUICK = dict(generate_comparisons=False, dtype="fp32")


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    """data.jsonl with text in many scripts; teacher, student, padded (wide, with a longer
    vocabulary) and stranger (with another tokenizer), all random; the runs run (a student of the
    teacher) and labels (a student of labels only)."""
    folder = tmp_path_factory.mktemp("eval")
    texts = text_in_many_scripts(300)
    write_jsonl(folder / "data.jsonl", [{"text": text} for text in texts])
    tokenizer = trained_tokenizer(texts, EVAL_VOCAB)
    eval_model(folder / "teacher", tokenizer, seed=0, hidden=32, layers=4)
    eval_model(folder / "student", tokenizer, seed=1, hidden=16, layers=2)
    eval_model(folder / "padded", tokenizer, seed=2, hidden=32, layers=2, vocab=EVAL_VOCAB + 7)
    other_tokenizer = trained_tokenizer(texts[::3], 290)
    eval_model(folder / "stranger", other_tokenizer, seed=3, hidden=16, layers=2)

    training = dict(
        student=folder / "student", dataset=folder / "data.jsonl", seq_len=48, batch_size=3,
        max_steps=12, save_steps=6, eval_steps=4, learning_rate=3e-3)
    distil(folder / "run", teacher=folder / "teacher", **training)
    distil(folder / "labels", alpha=1, **training)
    return folder


def text_in_many_scripts(rows):
    words = ("the quick brown fox jumps größer über 日本語 naïve 🙂 wizards boil strange soup "
             "in green pots and sleep").split()
    pick = np.random.default_rng(0)
    return [" ".join(pick.choice(words, pick.integers(5, 60))) + "." for _ in range(rows)]


def trained_tokenizer(texts, vocab):
    """A token may end within a character, as with real ones."""
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def eval_model(path, tokenizer, *, seed, hidden, layers, vocab=None):
    """So loud that its predictions, and those of another seed, are far from even and from alike."""
    tiny_model(
        path, vocab or len(tokenizer), hidden, layers, seed, tokenizer=tokenizer,
        num_attention_heads=4, bos_token_id=None, tie_word_embeddings=True, initializer_range=0.6)


def report_fields(folder, out, student, **more):
    return dict(
        mode="eval", teacher=folder / "teacher", student=folder / student,
        output_dir=folder / out, dataset=folder / "data.jsonl", seq_len=48, batch_size=3, **more)


def run_report(folder, out, student, **more):
    """-> report.json"""
    cli(*flags(**report_fields(folder, out, student, **more)))
    return json.loads((folder / out / "report.json").read_text())


def compared_models(folder):
    return [folder / "labels/final", folder / "padded", folder / "stranger"]


@pytest.fixture(scope="module")
def full_report(eval_folder):
    """report.json about all models."""
    return run_report(eval_folder, "found", "run/final", compare=compared_models(eval_folder))


# ---- the same figures by hand


def held_out_rows(folder):
    """Cut here once more by hand: every 20th text, joined with EOS, blocks of 48."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    texts = [row["text"] for row in read_lines(folder / "data.jsonl")]
    gap = max(2, len(texts) // min(256, len(texts) // 20))
    ids = []
    for text in texts[gap - 1::gap]:
        ids += tokenizer(text)["input_ids"] + [0]
    blocks = [ids[i:i + 48] for i in range(0, len(ids), 48)]
    return [block for block in blocks if len(block) > 1]


def log_probabilities(model, row, temperature=1):
    """[T - 1, vocabulary without padding], of the tokens after the first."""
    with torch.no_grad():
        logits = model(torch.tensor(row)[None]).logits[0, :-1, :EVAL_VOCAB]
    return (logits / temperature).log_softmax(-1)


def kl_by_token(logp, logq):
    return (logq.exp() * (logq - logp)).sum(-1)


def token_figures(model, teacher, row):
    """-> {name: a number for each token after the first}"""
    labels = torch.tensor(row[1:])
    logp = log_probabilities(model, row)
    logq = log_probabilities(teacher, row)
    confidence, top = logp.exp().max(-1)
    return dict(
        nll=-logp.gather(1, labels[:, None])[:, 0],
        kl=kl_by_token(logp, logq),
        agreement=(top == logq.argmax(-1)).double(),
        accuracy=(top == labels).double(),
        confidence=confidence)


def calibration_error(confidence, correct):
    """15 bins of confidence: its gaps to the share that is right, weighted by tokens."""
    gaps = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        gaps += (correct[inside].sum() - confidence[inside].sum()).abs().item()
    return gaps / len(correct)


def reference_figures(folder, name, rows):
    """Full logits in float64, one row at a time."""
    model = load(folder / name).double()
    teacher = load(folder / "teacher").double()
    by_row = [token_figures(model, teacher, row) for row in rows]
    tokens = {key: torch.cat([row[key] for row in by_row]) for key in by_row[0]}
    return dict(
        tokens=len(tokens["nll"]),
        nll=tokens["nll"].sum().item(),
        nll_by_row=np.array([row["nll"].sum().item() for row in by_row]),
        perplexity=tokens["nll"].mean().exp().item(),
        kl=tokens["kl"].mean().item(),
        agreement=tokens["agreement"].mean().item(),
        accuracy=tokens["accuracy"].mean().item(),
        ece=calibration_error(tokens["confidence"], tokens["accuracy"]))


def states_by_layer(path, rows):
    """-> [tokens, width] after each layer, of every token but the last of a row"""
    model = load(path).double()
    by_row = []
    for row in rows:
        with torch.no_grad():
            outputs = model.model(torch.tensor(row)[None], output_hidden_states=True)
        by_row.append([states[0, :-1] for states in outputs.hidden_states[1:]])
    return [torch.cat(layer) for layer in zip(*by_row, strict=True)]


def linear_cka(x, y):
    x = x - x.mean(0)
    y = y - y.mean(0)
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def state_mse(x, y):
    """Of other width: after the best affine map, without the tokens that the map explains."""
    if x.shape == y.shape:
        return (x - y).square().mean().item()
    with_ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = with_ones @ torch.linalg.lstsq(with_ones, y).solution
    tokens_left = len(x) - x.shape[1] - 1
    return ((fitted - y).square().sum() / y.shape[1] / tokens_left).item()


# ---- figures


def test_eval_numbers_equal_full_float64_logits(eval_folder, full_report):
    rows = held_out_rows(eval_folder)
    counts = np.array([len(row) - 1 for row in rows])
    for label, name in (
        ("student", "run/final"),
        ("labels", "labels/final"),
        ("padded", "padded"),
        ("teacher", "teacher"),
    ):
        expected = reference_figures(eval_folder, name, rows)
        figures = full_report["models"][label]
        assert figures["tokens"] == expected["tokens"]
        for key in ("perplexity", "kl", "agreement", "accuracy", "ece"):
            assert figures[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (label, key)
        _, low, high = sd.interval(expected["nll_by_row"], counts, 0)
        around = [math.exp(low), math.exp(high)]
        assert figures["perplexity_95"] == pytest.approx(around, rel=1e-5)


def test_eval_padding_is_no_vocabulary(eval_folder, full_report):
    """Nor where it is the teacher that is padded, and its reference is itself."""
    fields = report_fields(eval_folder, "padded_teacher", "padded", **QUICK)
    cli(*flags(**{**fields, "teacher": eval_folder / "padded"}))
    found = json.loads((eval_folder / "padded_teacher/report.json").read_text())["models"]
    expected = full_report["models"]["padded"]
    for label in ("teacher", "student"):
        for key in ("perplexity", "ece"):
            assert found[label][key] == pytest.approx(expected[key], rel=1e-5), (label, key)


def test_eval_temperature_is_that_of_training(eval_folder, full_report):
    """KL at the temperature, times its square; perplexity is without it."""
    report = run_report(eval_folder, "hot", "run/final", temperature=2, **QUICK)
    figures = report["models"]["student"]
    student = load(eval_folder / "run/final").double()
    teacher = load(eval_folder / "teacher").double()
    kl = []
    for row in held_out_rows(eval_folder):
        logp = log_probabilities(student, row, temperature=2)
        logq = log_probabilities(teacher, row, temperature=2)
        kl.append(kl_by_token(logp, logq))
    assert figures["kl"] == pytest.approx(4 * torch.cat(kl).mean().item(), rel=1e-5)
    assert figures["perplexity"] == full_report["models"]["student"]["perplexity"]


def test_eval_teacher_against_itself(eval_folder):
    models = run_report(eval_folder, "self", "teacher", **QUICK)["models"]
    student = models["student"]
    assert student["kl"] == 0
    assert student["agreement"] == 1
    assert student["perplexity"] == models["teacher"]["perplexity"]
    assert [layer["teacher"] for layer in student["layers"]] == [1, 2, 3, 4]
    for layer in student["layers"]:
        assert layer["cka"] == pytest.approx(1, abs=1e-9)
        assert layer["mse"] < 1e-12
    assert models["teacher"]["student_against_it"] == {
        "difference": 0, "interval": [0, 0], "verdict": "no significant difference"}


def test_eval_layers_equal_a_direct_computation(eval_folder, full_report):
    rows = held_out_rows(eval_folder)
    teacher_states = states_by_layer(eval_folder / "teacher", rows)
    for label, name in (("student", "run/final"), ("padded", "padded")):
        states = states_by_layer(eval_folder / name, rows)
        first, second = full_report["models"][label]["layers"]
        for layer, number, teacher_number in ((first, 1, 2), (second, 2, 4)):
            assert layer["student"] == number
            assert layer["teacher"] == teacher_number
            x = states[number - 1]
            y = teacher_states[teacher_number - 1]
            assert layer["cka"] == pytest.approx(linear_cka(x, y), rel=1e-4)
            assert layer["mse"] == pytest.approx(state_mse(x, y), rel=1e-4)
            if x.shape == y.shape:
                size = y.square().sum(-1).clamp_min(1e-30)   # EOS, in the first place
                relative = (x - y).square().sum(-1) / size
                assert layer["median"] == pytest.approx(relative.median().item(), rel=1e-3)


@pytest.mark.parametrize("teacher_bos, compared_bos", [(True, False), (False, True)])
def test_eval_each_model_has_the_bos_of_its_own_tokenizer(tmp_path, teacher_bos, compared_bos):
    """Two models of one vocabulary, of which one learned with BOS: each is judged on the same text
    after what it knows, and continues prompts after it."""
    def eos_or_bos(bos):
        return 1 if bos else 0

    teacher = tiny_model(tmp_path / "teacher", tokenizer=tiny_tokenizer(bos=teacher_bos), seed=1)
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(bos=compared_bos), seed=2)
    data = write_splits(tmp_path / "data", [{"text": "x"}], [{"text": prose(60, 3)}])
    fields = dict(mode="eval", teacher=teacher, student=other, dataset=data, seq_len=32,
                  batch_size=4, dtype="fp32", output_dir=tmp_path / "out")
    cli(*flags(**fields))
    report = json.loads((tmp_path / "out/report.json").read_text())
    ids = tiny_tokenizer()(prose(60, 3))["input_ids"] + [0]
    if teacher_bos:
        texts = [ids[i:i + 31] for i in range(0, len(ids), 31)]
        teacher_rows = [[1, *text] for text in texts]
    else:
        teacher_rows = [ids[i:i + 32] for i in range(0, len(ids), 32)]
        texts = [row[1:] for row in teacher_rows]
    other_rows = [[eos_or_bos(compared_bos), *text] for text in texts]
    for label, path, rows in (("teacher", teacher, teacher_rows), ("student", other, other_rows)):
        nll = []
        for row in rows:
            logp = log_probabilities(load(path), row)
            nll.append(-logp.gather(1, torch.tensor(row[1:])[:, None]))
        expected = torch.cat(nll).mean().exp().item()
        assert report["models"][label]["perplexity"] == pytest.approx(expected, rel=1e-4)
    tokenizers_ = [transformers.AutoTokenizer.from_pretrained(path) for path in (teacher, other)]
    prompts = sd.prompts_for(tokenizers_[1], tokenizers_[0], report["prompts"])
    for prompt, own in zip(report["prompts"], prompts, strict=True):
        assert prompt.startswith("<|begin|>") == teacher_bos
        assert own.startswith("<|begin|>") == compared_bos
        assert own.removeprefix("<|begin|>") == prompt.removeprefix("<|begin|>")


def test_eval_bits_of_two_tokenizers_are_of_the_same_bytes(eval_folder, full_report):
    tokenizer = transformers.AutoTokenizer.from_pretrained(eval_folder / "teacher")
    other = transformers.AutoTokenizer.from_pretrained(eval_folder / "stranger")
    rows = held_out_rows(eval_folder)
    sizes = [len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows]
    data_rows = [{"input_ids": np.array(row), "targets": None} for row in rows]
    retokenized = [row["input_ids"] for row in sd.retokenize(data_rows, tokenizer, other)]
    for row, other_row, size in zip(rows, retokenized, sizes, strict=True):
        assert other_row[0] == 0
        assert other.decode(other_row[1:]) == tokenizer.decode(row[1:])
        assert other_row[1:].count(0) == row[1:].count(0)
        assert len(other.decode(other_row[1:], skip_special_tokens=True).encode()) == size

    stranger = load(eval_folder / "stranger").double()
    nats = 0.0
    for other_row in retokenized:
        labels = torch.tensor(other_row[1:])
        nats -= log_probabilities(stranger, other_row).gather(1, labels[:, None]).sum().item()
    figures = full_report["models"]["stranger"]
    assert figures["bits"] == pytest.approx(nats / math.log(2) / sum(sizes), rel=1e-5)
    assert figures["kl"] is None
    assert figures["agreement"] is None

    nats = reference_figures(eval_folder, "run/final", rows)["nll"]
    figures = full_report["models"]["student"]
    assert figures["bits"] == pytest.approx(nats / math.log(2) / sum(sizes), rel=1e-5)


def test_eval_another_tokenizer_and_masked_prompts_are_refused(eval_folder, tmp_path):
    rows = [{"prompt": "the quick brown", "response": "fox jumps"}] * 40
    fields = report_fields(eval_folder, "refused", "stranger")
    fields["dataset"] = write_jsonl(tmp_path / "talk.jsonl", rows)
    fields["output_dir"] = tmp_path / "out"
    assert "plain text" in cli(*flags(**fields), rc=2).err


@pytest.mark.parametrize("n", [12, 60])
def test_eval_intervals_cover(n):
    """95 % of the intervals hold the true mean, as far as 200 trials can tell."""
    draw = torch.Generator().manual_seed(n)
    true_mean = 2
    covered = 0
    for trial in range(200):
        # sequences of many lengths, skewed losses that hang together within one
        lengths = torch.randint(20, 60, (n,), generator=draw).double()
        noise = 0.4 * torch.randn(n, generator=draw, dtype=torch.float64)
        sums = lengths * true_mean * (noise - 0.08).exp()   # 0.08: the mean of exp stays 1
        _, low, high = sd.interval(sums.numpy(), lengths.numpy(), trial)
        if low <= true_mean <= high:
            covered += 1
    assert 180 <= covered <= 198


# ---- files


def test_eval_report_files(eval_folder, full_report):
    """report.md shows the figures of report.json; report.png has each model in every panel."""
    models = full_report["models"]
    text = (eval_folder / "found/report.md").read_text()
    check_table(text, models)
    for label, figures in models.items():
        if label != "student":
            against = figures["student_against_it"]
            low, high = against["interval"]
            assert f"{against['difference']:+.4f} bits a byte ({low:+.4f} to {high:+.4f})" in text
            assert against["verdict"] in text
    student = models["student"]
    assert len(student["texts"]) == 3
    for key in ("train/loss", "train/ce_loss", "train/kl_loss"):
        assert len(student["curves"][key]) == 12
    assert len(student["curves"]["eval/ce_loss"]) == 3
    assert "report.png" in text
    check_picture(eval_folder / "found/report.png")


def check_table(text, models):
    """Each figure to the digits shown."""
    table = {}
    for line in text.splitlines():
        if line.startswith("| "):
            _, title, *cells, _ = [cell.strip() for cell in line.split("|")]
            table[title] = cells
    labels = table[""]
    assert labels == list(models) == ["teacher", "student", "labels", "padded", "stranger"]
    for key, title in sd.METRICS.items():
        for label, cell in zip(labels, table[title], strict=True):
            shown = cell.split(", ")[0].split()[0].replace(",", "")
            value = models[label][key]
            if value is None:
                assert shown == "-"
            else:
                assert float(shown) == pytest.approx(value, rel=6e-4)


def check_picture(path):
    """The third model's colour is in each of the four panels."""
    from matplotlib import image
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 800
    height = pixels.shape[0] // 2
    width = pixels.shape[1] // 2
    orange = np.array([0xd5, 0x5e, 0x00]) / 255
    for panel in (
        pixels[:height, :width],
        pixels[:height, width:],
        pixels[height:, :width],
        pixels[height:, width:],
    ):
        is_orange = np.abs(panel - orange).max(-1) < 0.05
        assert is_orange.sum() > 100


def test_eval_without_matplotlib(eval_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fields = report_fields(eval_folder, "plain", "run/final", **QUICK)
    out = cli(*flags(**fields)).out
    assert not (eval_folder / "plain/report.png").exists()
    assert "pip install matplotlib" in out
    assert "report.png)" not in (eval_folder / "plain/report.md").read_text()


# ---- what may be reported on


def test_eval_takes_a_checkpoint_of_a_run(eval_folder):
    """The last checkpoint is final/; an earlier one is another model; a broken one is refused."""
    expected = reference_figures(eval_folder, "run/final", held_out_rows(eval_folder))
    perplexity = {}
    for step in (6, 12):
        path = f"run/checkpoints/step-{step:08d}"
        report = run_report(eval_folder, f"at{step}", path, **QUICK)
        perplexity[step] = report["models"]["student"]["perplexity"]
    assert perplexity[12] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert perplexity[6] != pytest.approx(expected["perplexity"], rel=1e-3)

    broken = eval_folder / "run/checkpoints/step-00000099"
    broken.mkdir()
    (broken / "state.json").write_text("{")
    cli(*flags(**report_fields(eval_folder, "broken", broken)), rc=2)
    shutil.rmtree(broken)   # the run is every test's


def test_eval_same_numbers_on_two_ranks(eval_folder, full_report):
    fields = report_fields(
        eval_folder, "two", "run/final", compare=compared_models(eval_folder), **QUICK)
    process = spawn(*flags(**fields), nproc=2)
    out, _ = process.communicate()
    assert process.returncode == 0, out[-2000:]
    models = json.loads((eval_folder / "two/report.json").read_text())["models"]
    for label, expected in full_report["models"].items():
        figures = models[label]
        for key in (
            "tokens", "perplexity", "bits", "accuracy", "agreement", "kl", "ece", "parameters",
            "disk", "perplexity_95",
        ):
            if expected[key] is not None:
                near = pytest.approx(expected[key], rel=1e-5, abs=1e-7)
                assert figures[key] == near, (label, key)
        for layer, expected_layer in zip(figures["layers"], expected["layers"], strict=True):
            assert layer == pytest.approx(expected_layer, rel=1e-4)
        against = figures["student_against_it"]
        expected_against = expected["student_against_it"]
        assert against["verdict"] == expected_against["verdict"]
        near = pytest.approx(expected_against["interval"], rel=1e-4, abs=1e-7)
        assert against["interval"] == near


def test_eval_refusals(eval_folder):
    """A student that is no model is named."""
    for student in ("nowhere", "data.jsonl"):
        fields = report_fields(eval_folder, "refused", student)
        assert cli(*flags(**fields), rc=2).err.startswith("error: student ")


CODE_IN_MODEL = """
import os
open(os.environ["MODEL_CODE_RAN"], "w").close()
from transformers import LlamaConfig
class Config(LlamaConfig):   # transformers marks the class, for all that this process saves
    model_type = "unheard_of"
"""


def test_eval_runs_no_code_that_only_a_state_json_allows(eval_folder, tmp_path, monkeypatch):
    """The flag of this run decides, whatever the checkpoint's run was given."""
    ran = tmp_path / "ran"
    monkeypatch.setenv("MODEL_CODE_RAN", str(ran))
    model = Path(shutil.copytree(eval_folder / "student", tmp_path / "model"))
    settings = json.loads((model / "config.json").read_text())
    settings |= dict(model_type="unheard_of", auto_map={"AutoConfig": "code.Config"})
    (model / "config.json").write_text(json.dumps(settings))
    (model / "code.py").write_text(CODE_IN_MODEL)
    checkpoint_ = Path(shutil.copytree(
        eval_folder / "run/checkpoints/step-00000012", tmp_path / "step-00000012"))
    state = json.loads((checkpoint_ / "state.json").read_text())
    state["config"] |= dict(student=str(model), trust_remote_code=True)
    state.pop("digest")
    (checkpoint_ / "state.json").write_text(json.dumps(state | {"digest": sd.digest(state)}))
    fields = report_fields(eval_folder, "unheard", checkpoint_, **QUICK)
    assert str(model) in cli(*flags(**fields), rc=2).err
    assert not ran.exists()
    with contextlib.suppress(Exception):   # what the code is worth is not the point
        cli(*flags(**fields, trust_remote_code=True))
    assert ran.exists()


def test_eval_a_state_json_of_odd_knobs_is_one_error(eval_folder):
    found = json.loads(
        (eval_folder / "run/checkpoints/step-00000012/state.json").read_text())
    cfg = config.Config(mode="eval", teacher="t", student="s", dataset="d")
    assert sd.config_of_run(cfg, "x", found).student == str(eval_folder / "student")
    for odd in (
        {"unheard_of": 1}, {"temperature": "warm"}, {"temperature": -1}, {"student": ["s"]},
        {"max_samples": "many"}, {"compile": "perhaps"}, {"divergence": 3},
        {"lr_multipliers": {"a": 1}},
    ):
        with pytest.raises(sd.UserError, match="checkpoint 'x': its state.json"):
            sd.config_of_run(cfg, "x", {"config": found["config"] | odd})
    for state in ({}, {"config": None}, {"config": [1]}, {"config": "x"}):
        with pytest.raises(sd.UserError, match="checkpoint 'x': its state.json"):
            sd.config_of_run(cfg, "x", state)


def test_eval_replaces_no_report_of_others(eval_folder, tmp_path):
    """Before anything is loaded; its own it writes again."""
    for name in ("report.json", "report.md", "report.png"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("# my report on simple_distill: the report")
        fields = report_fields(eval_folder, folder, "nowhere", **QUICK)
        refused = cli(*flags(**fields), rc=2)
        assert f"{name}' was not written by simple_distill" in refused.err
        assert (folder / name).read_text() == "# my report on simple_distill: the report"
    for _ in range(2):
        run_report(eval_folder, tmp_path / "mine", "run/final", **QUICK)


def test_eval_a_damaged_model_or_log_is_named(eval_folder, tmp_path):
    model = Path(shutil.copytree(eval_folder / "student", tmp_path / "model"))
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:len(content) // 2])
    fields = report_fields(eval_folder, tmp_path / "out", "run/final", compare=model, **QUICK)
    assert f"error: model '{model}' could not be loaded" in cli(*flags(**fields), rc=2).err

    (model / "model.safetensors").write_bytes(content)
    for line in ("{not json}", '{"train/loss": 1.5}', '{"train/loss": [1.5], "train/step": 1}',
                 '{"train/loss": 1.5, "train/step": "x"}'):
        (tmp_path / "log.jsonl").write_text(line + "\n")
        refused = cli(*flags(**fields), rc=2).err
        assert re.search(f"error: model '{model}': '.*log.jsonl' beside it is damaged", refused)


def test_eval_of_a_split_by_name_is_of_its_first_eval_samples(eval_folder):
    """Also of train: eval_samples of it, as --help says, and no more."""
    report = run_report(eval_folder, "train", "run/final", eval_split="train", eval_samples=5,
                        **QUICK)
    assert report["setting"]["sequences"] == 5
    shown = " ".join(cli("--help").out.split())
    assert "sequences to evaluate on, the first of eval_split" in shown


def test_eval_final_loads_as_in_lm_evaluation_harness(eval_folder):
    path = eval_folder / "run/final"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    generator = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    continued = generator("the quick", max_new_tokens=8, do_sample=False)
    assert continued[0]["generated_text"].startswith("the quick")


# --------------------------------------------------------------------------------------------------
# Runs: killed anywhere, on many ranks, a week of every mode: as processes.

DROPOUT = dict(cls="GPT2Config", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
KILLED = {   # what the run is besides plain; ranks: how many processes
    "map": {},
    "stream": dict(streaming=True, shuffle_buffer=7),   # optional: streaming
    "accumulation 3": dict(batch_size=2, gradient_accumulation_steps=3),
    "dropout": dict(student="dropout"),
    "2 ranks": dict(ranks=2, batch_size=2),
    "documents": dict(packing="documents", seq_len=128),
    "on policy": dict(on_policy=0.5, max_new_tokens=6),   # optional: on_policy
}


def half_saved(out):
    """Whether a checkpoint is being written, or was when the run was killed."""
    return bool(list(Path(out, "checkpoints").glob("tmp-*")))


def killed_run(tmp_path, teacher, student, text, kind, kills, seed, damage=False):
    """A run that is killed again and again against one that is not: every second kill falls into a
    save, the others anywhere. damage: each time the newest checkpoint loses a bit, where an older
    one is left to fall back to."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "batch_size": 4,
              "max_steps": 12, "save_steps": 2, "eval_steps": 5, "eval_samples": 8, "alpha": 0.4,
              "lr_scheduler": "cosine", **KILLED[kind]}
    ranks = fields.pop("ranks", 1)
    if fields["student"] == "dropout":
        fields["student"] = tiny_model(tmp_path / "dropout", **DROPOUT)
    whole = str(tmp_path / "whole")
    broken = str(tmp_path / "broken")
    pick = random.Random(seed)

    def start(out):
        return Fork(f"{out}.txt", *flags(**{**fields, "output_dir": out}), ranks=ranks)

    begun = time.time()
    assert "done in" in start(whole).wait()
    usual_seconds = time.time() - begun
    inside = 0
    damaged = 0
    for n in range(kills):
        run = start(broken)
        saved = Path(broken, "checkpoints")
        if damage:
            end = time.time() + 30
            while time.time() < end and len(list(saved.glob("step-*"))) < 2:
                time.sleep(0.005)
            time.sleep(usual_seconds * pick.uniform(0, 0.1))
        elif n % 2 == 0:
            end = time.time() + 30
            while time.time() < end and not half_saved(broken):
                if os.path.isdir(f"{broken}/final"):
                    break
        else:
            time.sleep(usual_seconds * pick.uniform(0.3, 0.9))
        run.signal(signal.SIGKILL).wait()
        inside += half_saved(broken)
        checkpoints = sorted(saved.glob("step-*"))
        if damage and len(checkpoints) > 1:
            flip(pick.choice(sorted(checkpoints[-1].iterdir())), pick.random())
            damaged += 1
    shown = start(broken).wait()
    assert os.path.isdir(f"{broken}/final"), shown[-3000:]
    assert same(final_weights(whole), final_weights(broken)), shown
    assert quiet_log(whole) == quiet_log(broken)
    assert damage or kills < 2 or inside > 0, "no kill fell into a save"
    assert not damage or damaged == kills


@pytest.mark.parametrize("kind", KILLED)
def test_runs_a_killed_run_ends_as_if_it_had_not_been(tmp_path, teacher, student, text, kind):
    killed_run(tmp_path, teacher, student, text, kind, kills=3, seed=len(kind))


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KILLED)
def test_runs_twelve_kills(tmp_path, teacher, student, text, kind):
    killed_run(tmp_path, teacher, student, text, kind, kills=12, seed=1)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KILLED)
def test_runs_twelve_kills_and_as_many_flipped_bits(tmp_path, teacher, student, text, kind):
    killed_run(tmp_path, teacher, student, text, kind, kills=12, seed=2, damage=True)


@pytest.mark.parametrize("packing", [{}, dict(packing="documents", seq_len=128)])
def test_runs_two_ranks_one_two_again(tmp_path, teacher, student, text, packing):
    """Another number of ranks goes on with the same global batches, optimiser state included."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "batch_size": 3,
              "save_steps": 2, **packing}
    straight = tmp_path / "straight"
    moved = tmp_path / "moved"
    Fork(tmp_path / "a.txt", *flags(**fields, max_steps=6, output_dir=straight), ranks=2).wait()
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        words = flags(**fields, max_steps=steps, output_dir=moved)
        shown = Fork(tmp_path / "b.txt", *words, ranks=ranks).wait()
        assert Path(moved, "checkpoints", f"step-{steps:08d}").is_dir(), shown
    assert distance(final_weights(moved), final_weights(straight)) < 1e-5
    losses = zip(column(straight, "train/loss"), column(moved, "train/loss"), strict=True)
    for loss, moved_loss in losses:
        assert abs(loss - moved_loss) < 1e-5 * abs(loss)
    refused = distil(moved, teacher=teacher, student=student, dataset=text, batch_size=5,
                     max_steps=8, rc=2, **packing)
    assert "6 sequences a step" in refused.err


@pytest.mark.parametrize("number, stream", [
    (signal.SIGTERM, {"streaming": True, "shuffle_buffer": 7}),   # optional: streaming
    (signal.SIGINT, {}),
])
def test_runs_a_signal_saves_and_exits_0(tmp_path, teacher, student, text, number, stream):
    """And the same command goes on with the batch after the last one it was trained on."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, **stream}
    stopped_run = tmp_path / "run"
    process = spawn(*flags(**fields, max_steps=100_000, output_dir=stopped_run))
    wait_for_log(stopped_run, process)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert "saved; the same command continues" in shown
    stopped = log(stopped_run, "train")[-1]["train/step"]
    assert Path(stopped_run, "checkpoints", f"step-{stopped:08d}").is_dir()
    for out in (stopped_run, tmp_path / "whole"):
        cli(*flags(**fields, max_steps=stopped + 3, output_dir=out))
    assert same(final_weights(stopped_run), final_weights(tmp_path / "whole"))


# ---- many ranks, as processes over gloo


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher, student, chat):
    """A run of one process, and its fields. Rows of very different lengths, so that ranks count
    different numbers of tokens."""
    out = tmp_path_factory.mktemp("alone") / "run"
    fields = dict(teacher=teacher, student=student, dataset=chat, max_steps=4, alpha=0.3,
                  temperature=2.0)
    distil(out, **fields, batch_size=8)
    return out, fields


def assert_close(out, other, shown):
    assert os.path.isdir(f"{out}/final"), shown
    losses = zip(column(out, "train/loss"), column(other, "train/loss"), strict=True)
    for loss, other_loss in losses:
        assert abs(loss - other_loss) <= 1e-5 * abs(other_loss)
    assert distance(final_weights(out), final_weights(other)) < 1e-5


@pytest.mark.parametrize("shard_teacher", [True, False])
@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"])
def test_runs_two_ranks_are_one(tmp_path, alone, fsdp, shard_teacher):
    other, fields = alone
    out = tmp_path / "run"
    fields = {**PLAIN, **fields, "fsdp": fsdp, "shard_teacher": shard_teacher, "output_dir": out,
              "batch_size": 2, "gradient_accumulation_steps": 2}
    shown = Fork(tmp_path / "log.txt", *flags(**fields), ranks=2).wait()
    assert_close(out, other, shown)


FAMILIES = {
    "qwen3 moe": dict(cls="Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2,
                      moe_intermediate_size=16, head_dim=8),
    "gemma2": dict(cls="Gemma2Config", head_dim=8, final_logit_softcapping=5.0,
                   query_pre_attn_scalar=8),
    "gpt2": dict(cls="GPT2Config", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}


@pytest.mark.parametrize("fsdp", [
    "full_shard",
    pytest.param("shard_grad_op", marks=pytest.mark.campaign),
    pytest.param("hybrid_shard", marks=pytest.mark.campaign),
    "no_shard",
])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_families_under_sharding(tmp_path, text, family, fsdp):
    shape = FAMILIES[family]
    teacher = tiny_model(tmp_path / "teacher", hidden=16, layers=3, seed=1, **shape)
    student = tiny_model(tmp_path / "student", hidden=16, layers=2, seed=2, **shape)
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "max_steps": 3,
              "alpha": 0.5}
    one = tmp_path / "one"
    two = tmp_path / "two"
    distil(one, **{**fields, "batch_size": 4})
    words = flags(**fields, fsdp=fsdp, batch_size=2, output_dir=two)
    shown = Fork(tmp_path / "log.txt", *words, ranks=2).wait()
    assert_close(two, one, shown)
    AutoModelForCausalLM.from_pretrained(two / "final")


LOADING = """
import resource, sys
sys.path.insert(0, {package!r})
import simple_distill as sd

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with sd.process_group():
    sd.load_student(sd.Config(student={first!r}))   # imports the model's code
    before = peak()
    root = sd.load_student(sd.Config(student={wide!r}, use_wandb=False))
    whole = 4 * root.model.num_parameters()
    shard = sum(4 * p.to_local().numel() for p in root.parameters())
    print("RANK", sd.RANK, (peak() - before - shard) / whole, flush=True)
"""


def test_runs_loading_costs_other_ranks_their_shard_only(tmp_path):
    wide = tiny_model(tmp_path / "wide", hidden=512, layers=16, intermediate_size=1536)
    first = tiny_model(tmp_path / "first")
    script = tmp_path / "load.py"
    script.write_text(LOADING.format(package=str(HERE), wide=wide, first=first))
    shown = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    extra = dict(re.findall(r"RANK (\d) (\S+)", shown.stdout))
    assert float(extra["1"]) < 0.2, shown.stdout + shown.stderr


def test_runs_launcher_with_two_processes_and_sigterm(tmp_path, alone):
    other, fields = alone
    fields = {**PLAIN, **fields, "batch_size": 4}
    process = spawn(*flags(**{**fields, "output_dir": tmp_path / "run"}), nproc=2)
    shown, _ = process.communicate(timeout=180)
    assert process.returncode == 0, shown
    assert_close(tmp_path / "run", other, shown)
    endless = {**fields, "output_dir": tmp_path / "long", "max_steps": 100_000}
    process = spawn(*flags(**endless), nproc=2)
    wait_for_log(tmp_path / "long", process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert "saved; the same command continues" in shown
    assert list(Path(tmp_path, "long", "checkpoints").glob("step-*"))


def test_runs_two_nodes_of_one_process(tmp_path, alone):
    other, fields = alone
    out = tmp_path / "run"
    words = words_of(flags(**{**PLAIN, **fields, "output_dir": out, "batch_size": 4}))
    env = {**os.environ, "NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}
    nodes = []
    for rank in (0, 1):
        nodes.append(subprocess.Popen(
            [HERE / "launch.sh", *words], env={**env, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    shown = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert_close(out, other, shown)
    assert "done in" in shown[0] and "done in" not in shown[1]   # only rank 0 prints


def test_runs_a_rank_that_dies_takes_the_job_down(tmp_path, alone):
    _, fields = alone
    out = tmp_path / "run"
    endless = {**PLAIN, **fields, "output_dir": out, "batch_size": 4, "max_steps": 100_000}
    process = spawn(*flags(**endless), nproc=2)
    wait_for_log(out, process)
    workers = pids_of(f"simple_distill.py.*{out}")
    ranks = [pid for pid in workers if "RANK=1" in environment_of(pid)]
    start = time.time()
    os.kill(int(ranks[0]), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.time() - start < 60


def pids_of(pattern):
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return found.stdout.split()


def environment_of(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


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
    assert err.startswith("error: ") and len(err.strip().splitlines()) <= 2, err


@pytest.mark.parametrize("name, value", [
    ("NPROC", "0"), ("NPROC", "abc"), ("MASTER_PORT", "x"), ("NODE_RANK", "1"),
])
def test_runs_launcher_names_a_wrong_number(name, value):
    shown = subprocess.run([HERE / "launch.sh"], capture_output=True, text=True,
                           env={**os.environ, name: value})
    assert shown.returncode == 2
    assert shown.stderr.startswith(f"error: {name} is ") and value in shown.stderr


def test_runs_launcher_that_waits_for_a_node_hears_a_signal(tmp_path):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [HERE / "launch.sh", "--output_dir", tmp_path / "out"], env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert "waits for the others" in process.stdout.readline()
    end = time.time() + 60
    while not pids_of(f"node-rank 0 .*{tmp_path}") and time.time() < end:
        time.sleep(0.05)
    time.sleep(1)
    start = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert time.time() - start < 3
    assert not pids_of(str(tmp_path))


def test_runs_a_closed_terminal_saves(tmp_path, student, text):
    """SIGHUP, and nobody reads what it says."""
    out = tmp_path / "run"
    fields = {**PLAIN, "student": student, "dataset": text, "alpha": 1.0, "output_dir": out,
              "max_steps": 100_000}
    process = spawn(*flags(**fields))
    wait_for_log(out, process)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    stopped = log(out, "train")[-1]["train/step"]
    assert Path(out, "checkpoints", f"step-{stopped:08d}").is_dir()


# ---- code that nobody allowed


def plant_code(model, marks):
    """A model folder whose config and tokenizer bring code of their own, which leaves a mark."""
    bases = {"configuration": ("EvilConfig", "LlamaConfig"),
             "modeling": ("EvilModel", "LlamaForCausalLM"),
             "tokenization": ("EvilTokenizer", "PreTrainedTokenizerFast")}
    for file, (name, base) in bases.items():
        (model / f"{file}_evil.py").write_text(
            f"open({str(marks / file)!r}, 'w')\nfrom transformers import {base}\n"
            f"class {name}({base}):\n    model_type = 'evil'\n")
    knobs = json.loads((model / "config.json").read_text())
    knobs |= {"model_type": "evil", "auto_map": {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel"}}
    (model / "config.json").write_text(json.dumps(knobs))
    plant_tokenizer(model)


def plant_tokenizer(folder):
    knobs = json.loads((folder / "tokenizer_config.json").read_text())
    knobs |= {"tokenizer_class": "EvilTokenizer", "auto_map": {
        "AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(knobs))


def test_runs_no_code_that_nobody_allowed(tmp_path, teacher, student, text, monkeypatch):
    """Files of strangers that carry code, in each place where one may stand, under every mode."""
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))   # nobody asks, nobody is answered
    fields = dict(dataset=text, max_steps=1, alpha=1.0)
    good = tmp_path / "good"
    distil(good, student=student, **fields)

    evil = Path(shutil.copytree(student, tmp_path / "evil"))
    plant_code(evil, marks)
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
    obeyed = Path(shutil.copytree(good, tmp_path / "obeyed"))
    step = obeyed / "checkpoints" / "step-00000001"
    state = json.loads((step / "state.json").read_text())
    del state["digest"]
    state["config"] |= {"trust_remote_code": True, "student": str(evil), "tokenizer": str(evil)}
    state["digest"] = sd.digest(state)
    (step / "state.json").write_text(json.dumps(state))
    loaded = Path(shutil.copytree(good, tmp_path / "loaded"))
    replant(loaded / "checkpoints" / "step-00000001", lambda _: Payload(marks / "metadata"))

    from_victim = loaded / "checkpoints" / "step-00000001"
    commands = [
        dict(PLAIN, student=evil, **fields),
        dict(PLAIN, student=student, tokenizer=evil, **fields),
        dict(PLAIN, student=student, teacher=evil, **{**fields, "alpha": 0.5}),
        dict(PLAIN, student=pickled, **fields),
        dict(PLAIN, student=student, **{**fields, "dataset": script}),
        dict(PLAIN, student=student, resume=from_victim, **fields),
        dict(config=yaml_file),
    ]
    if hasattr(sd, "train_blockwise"):   # optional: blockwise
        commands.append(dict(student=student, teacher=evil, blockwise=True, dataset=text))
    if hasattr(sd, "fill_cache"):   # optional: cache
        commands.append(dict(mode="cache", teacher=evil, cache_dir=tmp_path / "c", dataset=text))
    if hasattr(sd, "generate"):   # optional: generate
        commands.append(dict(mode="generate", provider="local", teacher=evil, num_examples=1))
    if hasattr(sd, "report"):   # optional: eval
        judged = dict(mode="eval", eval_samples=2, tokenizer=student, dataset=text)
        commands.append({**judged, "student": evil})
        commands.append({**judged, "student": student, "compare": [evil]})
        commands.append({**judged, "student": step})
        commands.append({**judged, "student": from_victim})
    for i, command in enumerate(commands):
        result = cli(*flags(**command, output_dir=tmp_path / f"out{i}"), rc=2)
        assert result.err.count("error: ") == 1, result.err
        assert not os.listdir(marks), (command, result)
        if evil in command.values() or command.get("compare"):
            assert "--trust_remote_code" in result.err, result.err


def test_runs_a_caches_tokenizer_runs_no_code(tmp_path, student, text):   # optional: cache
    marks = tmp_path / "marks"
    marks.mkdir()
    evil = Path(shutil.copytree(student, tmp_path / "evil"))
    plant_code(evil, marks)
    cache = tmp_path / "cache"
    cli(*flags(mode="cache", teacher=student, dataset=text, cache_dir=cache, seq_len=32))
    for folder in [path.parent for path in cache.rglob("tokenizer_config.json")]:
        shutil.copy(evil / "tokenization_evil.py", folder)
        plant_tokenizer(folder)
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
    value = json.loads(json.dumps(value))
    if not isinstance(value, (dict, list)):
        return draw.choice(ODD_JSON)
    here = value
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return draw.choice(ODD_JSON)
        key = draw.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and draw.random() < 0.6:
            here = here[key]
            continue
        how = draw.random()
        if how < 0.75:
            here[key] = draw.choice(ODD_JSON)
        elif how < 0.9:
            del here[key]
        elif isinstance(here, dict):
            here[f"{key} "] = here.pop(key)
        return value


def break_bytes(content, draw):
    """Cut, with a byte changed, or with something in its middle."""
    at = draw.randrange(len(content) + 1)
    how = draw.randrange(4)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + bytes([draw.randrange(256)]) + content[at + 1:]
    if how == 2:
        odd = draw.choice([b"\0", b"\xff\xfe", b"{", b'"', b"\n", b"]"])
        return content[:at] + odd + content[at:]
    return draw.choice([b"", b"\0" * 100, b"[]", b"{}", b"null", b"\xef\xbb\xbf" + content])


def break_file(path, draw):
    """As json where it is json, half of the time; else as bytes."""
    path = Path(path)
    content = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.6:
        content = json.dumps(break_json(json.loads(content), draw)).encode()
    elif path.suffix == ".jsonl" and content and draw.random() < 0.6:
        lines = content.splitlines()
        i = draw.randrange(len(lines))
        lines[i] = json.dumps(break_json(json.loads(lines[i]), draw)).encode()
        content = b"\n".join(lines) + b"\n"
    else:
        content = break_bytes(content, draw)
    path.write_bytes(content)


class Fuzz:
    """Good things in a folder, from which each case takes a copy to break."""

    def __init__(self, folder, student, text):
        self.folder = folder
        self.student = student
        self.good = folder / "good"
        self.good.mkdir()
        shutil.copy(text, self.good / "text.jsonl")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "river one"}]
        rows = [{"messages": turns} for _ in range(6)]
        rows += [{"messages": [*turns, *turns]} for _ in range(6)]
        write_jsonl(self.good / "chat.jsonl", rows)
        self.fields = dict(PLAIN, student=student, dataset=self.good / "text.jsonl", alpha=1.0,
                           max_steps=1)

    def words(self, **fields):
        return flags(**{**self.fields, **fields})

    def case_flags(self, case, draw):
        skipped = ("output_dir", "max_steps", "cpu_offload", "mode", "config")
        name = draw.choice([name for name in config.FIELDS if name not in skipped])
        mode = draw.choice(["train", "train", "cache", "generate", "eval"])
        words = ["--output_dir", case / "out", "--mode", mode, f"--{name}", draw.choice(ODD)]
        if mode == "train":
            words += ["--student", self.student, "--dataset", self.good / "text.jsonl", "--alpha",
                      "1", "--max_steps", "1"]
        elif mode == "cache":
            words += ["--teacher", self.student, "--dataset", self.good / "text.jsonl",
                      "--cache_dir", case / "cache"]
        elif mode == "eval":
            words += ["--student", self.student, "--dataset", self.good / "text.jsonl",
                      "--eval_samples", "1"]
        else:
            words += ["--provider", "local", "--teacher", self.student, "--num_examples", "1",
                      "--max_tokens", "2"]
        return words

    def case_file(self, case, draw):
        kind = draw.choice(["json", "yaml"])
        good = {"alpha": 1.0, "student": self.student, "dataset": str(self.good / "text.jsonl"),
                "max_steps": 1, "lr_multipliers": ["norm=0.5"], "seq_len": 32, "use_wandb": False}
        path = case / f"run.{kind}"
        path.write_text(json.dumps(good))   # which is yaml too
        break_file(path, draw)
        if draw.random() < 0.2:
            path.write_text("student: " + draw.choice(ODD).replace("\0", " ").replace(
                "\ud800", "") + "\nstudent: x\n")
        if draw.random() < 0.05:
            path.chmod(0)
        return ["--config", path, "--output_dir", case / "out", "--student", self.student,
                "--dataset", self.good / "text.jsonl", "--max_steps", "1", "--alpha", "1"]

    def case_rows(self, case, draw):
        name = draw.choice(["text.jsonl", "chat.jsonl"])
        path = case / name
        shutil.copy(self.good / name, path)
        for _ in range(draw.randrange(1, 4)):
            if path.stat().st_size:
                with contextlib.suppress(ValueError, IndexError):   # broken beyond that already
                    break_file(path, draw)
        if draw.random() < 0.15:
            path = path.rename(case / draw.choice(["a.csv", "a.parquet", "a.json", "a.txt"]))
        more = {}
        more = draw.choice([{}, {"streaming": True}])   # optional: streaming
        return self.words(dataset=path, output_dir=case / "out", **more)

    def case_model(self, case, draw):
        model = shutil.copytree(self.student, case / "model")
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
                 "num_attention_heads", "num_key_value_heads", "head_dim")
        file = draw.choice(["config.json", "config.json", "tokenizer.json",
                            "tokenizer_config.json", "model.safetensors",
                            "generation_config.json"])
        if file == "config.json" and draw.random() < 0.5:
            values = json.loads((model / file).read_text())
            values[draw.choice(sizes)] = draw.choice([0, -1, 3, None, "8", 1.5, [], {}, True])
            (model / file).write_text(json.dumps(values))
        else:
            break_file(model / file, draw)
        if draw.random() < 0.1:
            (model / file).unlink()
        role = draw.choice(["student", "teacher"])
        alpha = 1.0 if role == "student" else 0.5
        return self.words(**{role: model}, alpha=alpha, output_dir=case / "out")

    def case_output(self, case, draw):
        """What an earlier run left."""
        out = self.folder / "finished"
        if not out.exists():
            distil(out, **{**self.fields, "max_steps": 2, "save_steps": 1})
        shutil.copytree(out, case / "out")
        files = [path for path in (case / "out").rglob("*") if path.is_file()]
        break_file(draw.choice(files), draw)
        return self.words(max_steps=3, output_dir=case / "out")

    def case_cache(self, case, draw):   # optional: cache
        cache = self.folder / "cache"
        if not cache.exists():
            cli(*flags(mode="cache", teacher=self.student, dataset=self.good / "text.jsonl",
                       cache_dir=cache, seq_len=32, cache_chunk=16))
        shutil.copytree(cache, case / "cache")
        files = [path for path in (case / "cache").rglob("*") if path.is_file()]
        break_file(draw.choice(files), draw)
        if draw.random() < 0.3:
            return flags(mode="cache", teacher=self.student, dataset=self.good / "text.jsonl",
                         cache_dir=case / "cache", seq_len=32, cache_chunk=16,
                         output_dir=case / "out")
        fields = {**self.fields, "dataset": None, "alpha": 0.5, "seq_len": None}
        return flags(**fields, cache_dir=case / "cache", output_dir=case / "out")

    def case_leftovers(self, case, draw):   # optional: generate
        out = self.folder / "generated"
        fields = dict(mode="generate", provider="local", teacher=self.student, num_examples=2,
                      max_tokens=4)
        if not out.exists():
            sd.main(words_of(flags(**fields, output_dir=out)))
        shutil.copytree(out, case / "out")
        files = [path for path in (case / "out").rglob("*") if path.is_file()]
        break_file(draw.choice(files), draw)
        if draw.random() < 0.3:
            prompts = write_jsonl(case / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
            break_file(prompts, draw)
            fields["prompts_file"] = prompts
        return flags(**fields, output_dir=case / "out")

    def case_environment(self, case, draw):
        name = draw.choice([
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HTTP_PROXY", "HTTPS_PROXY",
            "ALL_PROXY", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE",
            "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "COLUMNS", "TMPDIR", "HOME", "TERM"])
        value = draw.choice([text for text in ODD if "\0" not in text and "\ud800" not in text])
        words = self.words(output_dir=case / "out")
        if draw.random() < 0.3:
            words = self.words(output_dir=case / "out", student="owner/name")
        return {name: value}, words


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
    answers = collections.Counter()
    first = int(os.environ.get("FUZZ_FROM", 0))
    for number in range(first, first + cases):
        draw = random.Random(f"{kind} {number}")
        case = tmp_path / f"{kind}-{number}"
        case.mkdir()
        words = words_of(getattr(fuzz, f"case_{kind}")(case, draw))
        watched = [path for path in (fuzz.good, Path(student), *case.iterdir())
                   if path.name not in ("out", "cache")]
        before = [digests_below(path) or path.is_file() and path.read_bytes() for path in watched]
        problem = problem_of(words, answers)
        after = [digests_below(path) or path.is_file() and path.read_bytes() for path in watched]
        if before != after:
            problem = f"changed what is not its own; {problem}"
        if problem:
            failures.append(f"{kind} {number}: {shlex.join(words)[:400]}\n    {problem}")
        shutil.rmtree(case)
    print(answers)
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n".join(failures)


def problem_of(words, answers, seconds=60):
    """What is wrong with the answer to a command line, None where nothing is."""
    out = io.StringIO()
    err = io.StringIO()

    def give_up(number, frame):
        raise TimeoutError(f"more than {seconds} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = sd.main(words)
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        place = traceback.extract_tb(e.__traceback__)
        ours = [frame for frame in place if "simple_distill.py" in frame.filename
                or "config.py" in frame.filename and "work" in frame.filename]
        return (f"{type(e).__name__}: {str(e)[:200]} at "
                + " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(ours[-4:])))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        if sd.dist.is_initialized():
            sd.dist.destroy_process_group()
    answers[code] += 1
    if code not in (0, 2):
        return f"exit code {code}"
    if "Traceback" in err.getvalue() + out.getvalue():
        return f"traceback: {err.getvalue()[-600:]}"
    lines = err.getvalue().strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if code == 2 and len(errors) != 1:
        return f"{len(errors)} error lines: {err.getvalue()[-600:]!r}"
    if code == 2 and len(errors[0]) > 2000:
        return f"an error of {len(errors[0])} characters"
    return None


@pytest.mark.campaign
def test_runs_fuzz_of_the_environment(tmp_path, student, text):
    """In processes of their own, since it is read when the package is imported."""
    fuzz = Fuzz(tmp_path, student, text)
    failures = []
    for number in range(30):
        case = tmp_path / f"environment-{number}"
        case.mkdir()
        env, words = fuzz.case_environment(case, random.Random(f"environment {number}"))
        run = subprocess.run(
            [sys.executable, HERE / "simple_distill.py", *words_of(words)], text=True, cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, capture_output=True, timeout=120)
        if run.returncode not in (0, 2) or "Traceback" in run.stderr:
            failures.append(f"{env}: exit code {run.returncode}\n{run.stderr[-600:]}")
    assert not failures, "\n".join(failures)


# ---- a week of runs, one after the other, as a user types them

SHARDINGS = [
    dict(fsdp="full_shard", shard_teacher=True, cpu_offload=False),
    dict(fsdp="shard_grad_op", shard_teacher=True, cpu_offload=False),
    dict(fsdp="hybrid_shard", shard_teacher=False, cpu_offload=False),
    dict(fsdp="no_shard", shard_teacher=True, cpu_offload=True),
]
WEEK = [   # (processes, flags)
    *[(2, dict(max_steps=4, save_steps=2, **sharding)) for sharding in SHARDINGS],
    (2, dict(max_steps=6, goes_on=True)),   # in the output_dir of the run before
    (1, dict(max_steps=8, goes_on=True)),
    (1, dict(alpha=1, max_steps=3)),
    (1, dict(divergence="reverse", temperature=2, max_steps=3)),
    (1, dict(divergence="jsd", max_steps=3)),
    (1, dict(student="layers:1", max_steps=3)),
    (1, dict(dtype="bf16", gradient_checkpointing=True, max_steps=3)),
    (1, dict(dtype="fp16", max_steps=3)),
    (1, dict(compile=True, max_steps=3)),
    (2, dict(streaming=True, max_steps=4)),   # optional: streaming
    (1, dict(lr_multipliers=["mlp=0", "embed=0.1"], max_steps=3)),
    (1, dict(num_epochs=2, eval_steps=5, gradient_accumulation_steps=2)),
    (2, dict(mode="cache", cache_dir="cache")),   # optional: cache
    (2, dict(cache_dir="cache", max_steps=4)),   # optional: cache
    (1, dict(cache_dir="cache", max_steps=3)),   # optional: cache
    (1, dict(   # optional: cache
        mode="cache", cache_dir="topk", cache_method="topk", cache_top_k=8)),
    (1, dict(cache_dir="topk", max_steps=3)),   # optional: cache
    (2, dict(blockwise=True, max_steps=2)),   # optional: blockwise
    (1, dict(blockwise=True, block_input="teacher", num_epochs=0)),   # optional: blockwise
    (1, dict(   # optional: generate
        mode="generate", provider="local", num_examples=3, max_tokens=8, concurrency=3)),
    (2, dict(mode="eval", student="final")),   # optional: eval
    (1, dict(   # optional: eval
        mode="eval", student="final", compare=["final"], generate_comparisons=False)),
]


@pytest.mark.campaign
def test_runs_a_week_of_runs(tmp_path, teacher, student, text):
    """No warning, no leftover process, no file but in output_dir and cache_dir."""
    here = tmp_path / "here"
    here.mkdir()
    final = str(here / "out0" / "final")
    out = None
    for i, (nproc, fields) in enumerate(WEEK):
        fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, **fields}
        if fields.pop("goes_on", False):
            fields |= dict(fsdp="full_shard", save_steps=2)
        else:
            out = f"out{i}"
        fields["output_dir"] = out
        if fields["student"] == "final":
            fields["student"] = final
        if "compare" in fields:
            fields["compare"] = [final]
        if "cache_dir" in fields:
            fields["cache_dir"] = str(here / fields["cache_dir"])
        words = flags(**{name: value for name, value in fields.items() if is_read(name, fields)})
        process = spawn(*words, nproc=nproc, cwd=here, env={"PYTHONWARNINGS": "default"})
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, (fields, shown)
        assert not re.search(r"(simple_distill|config)\.py:\d+: \w*Warning", shown), shown
        assert "Traceback" not in shown, (fields, shown)
    left = {path.name for path in here.iterdir()}
    assert left <= {f"out{i}" for i in range(len(WEEK))} | {"cache", "topk"}
    assert pids_of(str(tmp_path)) == []


def is_read(name, fields):
    """Whether the mode reads the knob: PLAIN holds those of train."""
    return fields.get("mode", "train") in config.FIELDS[name].metadata["read_by"].split()


# --------------------------------------------------------------------------------------------------
# Freeze: the same runs by this package and by a commit before it give the same weights, caches and
# logs, bit for bit. REFERENCE=COMMIT names another commit; move it where a result is meant to
# change.

REFERENCE = os.environ.get("REFERENCE", "e9529ff")   # before the house was rebuilt

TEXT_RUN = dict(teacher="teacher", student="student", dataset="text", max_steps=4, eval_samples=8)
CHAT_RUN = dict(teacher="teacher", student="student", dataset="chat", max_steps=3, eval_samples=8)
BLOCKS = dict(blockwise=True, epochs_per_block=0.4, lm_head_epochs=0.4, max_steps=2,
              distill_loss_type="mse", max_grad_norm_per_block=1.0)   # as defaults once were
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
    "resumed": [(1, TEXT_RUN | dict(max_steps=2)), (1, TEXT_RUN)],
    "stream": [   # optional: streaming
        (1, TEXT_RUN | dict(streaming=True, shuffle_buffer=5))],
    "cache, sample": [   # optional: cache
        (1, dict(mode="cache", teacher="teacher", dataset="chat", cache_dir="cache", seq_len=32)),
        (1, CHAT_RUN | dict(teacher=None, dataset=None, cache_dir="cache"))],
    # not the training from it: the mass of the bucket is summed another way since issue 16
    "cache, topk": [   # optional: cache
        (2, dict(mode="cache", teacher="teacher", dataset="text", cache_dir="cache", seq_len=32,
                 cache_method="topk", cache_top_k=9))],
    "blocks, student": [   # optional: blockwise
        (1, CHAT_RUN | BLOCKS | dict(save_steps=2, eval_steps=2))],
    "blocks, teacher": [   # optional: blockwise
        (1, CHAT_RUN | BLOCKS | dict(block_input="teacher", distill_loss_type="cosine"))],
    "blocks alone": [   # optional: blockwise
        (1, CHAT_RUN | BLOCKS | dict(max_steps=None, num_epochs=0, train_lm_head=False,
                                     lm_head_epochs=None))],
    "generate": [   # optional: generate
        (1, dict(mode="generate", provider="local", teacher="teacher", num_examples=4,
                 max_tokens=8, concurrency=2))],
    "eval": [   # optional: eval
        (1, TEXT_RUN),
        (1, dict(mode="eval", teacher="teacher", student="final", compare="student",
                 dataset="text", seq_len=32, batch_size=4, dtype="fp32"))],
}


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
            if name in fields:
                fields[name] = inputs.get(fields[name], fields[name])
        if fields.get("student") == "final":
            fields["student"] = folder / "out" / "final"
        if "cache_dir" in fields:
            fields["cache_dir"] = folder / "cache"
        shown = Fork(folder / "log.txt", *flags(**fields), ranks=ranks, package=package).wait()
        assert "error:" not in shown and "Traceback" not in shown, shown[-3000:]


def digest_of(folder):
    """-> {file: what two equal runs have in common of it}"""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "out/log.jsonl":
            digests[name] = log_of_then(folder / "out")
        elif name == "out/report.json":
            digests[name] = timeless_report(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            digests[name] = [row["messages"] for row in read_lines(path)]
        elif path.suffix == ".safetensors":
            digests[name] = {}   # tensors alone: chunks of a cache bear its mark since then
            for key, tensor in load_file(path).items():
                content = tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
                digests[name][key] = hashlib.sha256(content).hexdigest()
    return digests


def log_of_then(out):
    """Without what the reference did not log."""
    later = re.compile(r"block/\d+/(median|explained)")
    return [{k: v for k, v in entry.items() if not later.fullmatch(k)} for entry in quiet_log(out)]


def timeless_report(report):
    """Without speeds, memory and paths, and what the reference did not measure."""
    passing = {"prefill", "generation", "memory", "name", "ratio", "own"}
    models_ = {}
    for label, figures in report["models"].items():
        models_[label] = {k: v for k, v in figures.items() if k not in passing}
        for layer in models_[label]["layers"]:
            layer.pop("median", None)
        for name in ("MSE / variance", "median token"):   # which of them is drawn
            models_[label]["curves"].pop(name, None)
    return models_


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
    assert reference
    assert ours.keys() == reference.keys()
    for file in reference:
        assert ours[file] == reference[file], file


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
    source = (folder / "simple_distill.py").read_text() + (folder / "config.py").read_text()
    shown = subprocess.run(
        [sys.executable, "-c", "import config; config.parse_or_exit(['--help'])"],
        cwd=folder, capture_output=True, text=True).stdout
    knobs = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert "learning_rate" in knobs
    knobs = {name.removeprefix("no_") for name in knobs} - {"config", "help"}
    unread = [name for name in knobs if not re.search(rf"\bcfg\.{name}\b", source)]
    assert unread == []
    for name in without:
        assert f"# Optional: {name}:" not in source
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "max_steps": 2}
    run = Fork(tmp_path / "log.txt", *flags(**fields, output_dir=out), package=folder)
    assert "done in" in run.wait(), Path(run.log).read_text()[-3000:]
    assert len(log(out, "train")) == 2


def run_tests_of(folder, *words):
    """The fork's own tests, as its owner would run them -> pytest's closing lines."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *words], cwd=folder,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_forks_smallest_passes_its_quick_tests(tmp_path):
    fork(tmp_path / "smallest", OPTIONAL)
    shown = run_tests_of(tmp_path / "smallest", "-k", "losses or optimiser or data_conversation")
    assert re.search(r"\d+ passed", shown)


@pytest.mark.campaign
def test_forks_smallest_passes_all_its_tests(tmp_path):
    fork(tmp_path / "smallest", OPTIONAL)
    run_tests_of(tmp_path / "smallest")


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


def test_package_names_are_true():
    """config.py is the configuration and nothing else; few names cross."""
    tree = ast.parse((HERE / "config.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & {"asyncio", "matplotlib", "safetensors", "zlib", "torch"} == set()
    crossing = []
    for node in ast.walk(ast.parse((HERE / "simple_distill.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "config":
            crossing += [alias.name for alias in node.names]
    assert 0 < len(crossing) < 10


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
               r"((?:python simple_distill\.py|\./launch\.sh)\b[^`\n]*)")
    commands = []
    for line in re.findall(pattern, readme, re.MULTILINE):
        words = shlex.split(re.sub(r"\s#.*", "", line))
        if len(words) > 2 and "..." not in words and "--help" not in words:
            if words not in commands:
                commands.append(words)
    return commands


def read_flags(words):
    """['--a', '1', '--b=2', '--c'] -> [('--a', '1'), ('--b', '2'), ('--c', None)]"""
    pairs = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            pairs.append((name, value if equals else None))
        else:
            pairs[-1] = (pairs[-1][0], word)
    return pairs


@pytest.mark.parametrize("command", readme_commands(), ids=shlex.join)
def test_package_readme_commands_run(command, tmp_path, monkeypatch, teacher, student, text):
    """As they stand there, on tiny models: names of models and data are replaced, lengths cut
    short, nothing else."""
    given = dict(read_flags(command[1 if command[0].endswith("launch.sh") else 2:]))
    mode = given.get("--mode", "train")
    if mode == "generate":
        pytest.skip("mode generate has tests of its own, with a server")
    replaced = {"--teacher": teacher, "--student": student, "--dataset": text,
                "--tokenizer": teacher, "--compare": student}
    given.pop("--dataset_config", None)
    for name, value in given.items():
        if name in replaced and not value.startswith(("layers:", "demo")):
            given[name] = replaced[name]
    if "--config" in given:
        (tmp_path / given["--config"]).write_text(
            f"teacher: {teacher}\nstudent: {student}\ndataset: {text}\nmax_steps: 2\n")
    short = {"--seq_len": 32, "--output_dir": tmp_path / "out"}
    if mode == "train":
        short |= {"--max_steps": 2, "--log_steps": 1}
    if "--cache_dir" not in given or mode == "cache":
        short["--dataset"] = text
    monkeypatch.chdir(tmp_path)
    if "--cache_dir" in given and mode == "train":   # its other half comes first
        cli("--mode", "cache", *flags(teacher=teacher, dataset=text, seq_len=32,
                                      cache_dir=given["--cache_dir"], output_dir="out"))
    words = []
    for name, value in (short | given).items():
        words += [name] if value is None else [name, value]
    cli(*words)


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
    compiled = torch.compile
    kernel = sd.chunk_kernel
    sd.torch.compile = uncompiled
    sd.chunk_kernel = kernel.__wrapped__   # which remembers none
    try:
        our_loss(case)
    finally:
        sd.torch.compile = compiled
        sd.chunk_kernel = kernel


def uncompiled(function, **_):
    return function


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


def allocators():
    """On a CPU everything is measured twice: with glibc's allocator as it comes, and as
    process_group() sets it for a run."""
    if ON_GPU:
        yield "PyTorch's allocator"
        return
    mmap_max = -4
    trim_threshold = -1
    for name, most_maps, threshold in (
            ("glibc as it comes", 65536, 131072),
            ("glibc as the trainer sets it", 0, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(mmap_max, most_maps)
        ctypes.CDLL(None).mallopt(trim_threshold, threshold)
        yield name


def bench_loss(vocab=32000):
    if ON_GPU:
        tokens, width, teacher_width = 8192, 2048, 4096
    else:
        tokens, width, teacher_width = 1024 if vocab == 32000 else 512, 256, 512
    case = loss_case(vocab, tokens, width, teacher_width, counted=7 / 8)
    half = loss_case(vocab, tokens, width, teacher_width, counted=0.5)
    full = loss_case(vocab, tokens, width, teacher_width)
    small = loss_case(vocab, 64, width, teacher_width)
    cases = {
        "its matmuls": functools.partial(its_matmuls, case),
        "ours": functools.partial(our_loss, case),
        "ours, eager": functools.partial(our_eager_loss, case),
        "plain PyTorch": functools.partial(plain_loss, case),
        "ours, none masked": functools.partial(our_loss, full),
        "ours, half masked": functools.partial(our_loss, half),
        "ours, 64 tokens": functools.partial(our_loss, small),
        "plain, 64 tokens": functools.partial(plain_loss, small),
    }
    with contextlib.suppress(ImportError):
        cases["Liger fused JSD"] = liger_loss(case)
    where = "bf16 cuda" if ON_GPU else "fp32 cpu"
    for allocator in allocators():
        found = interleaved(cases)
        print(f"\nloss, V {vocab:,}, {tokens:,} tokens, 7 of 8 counted, D {width}, "
              f"Dt {teacher_width}, {where}, {allocator}")
        for name, seconds in found.items():
            ratio = seconds / found["its matmuls"]
            print(f"  {name:<20}{seconds:>9.3f} s{ratio:>8.2f} x its matmuls")


def liger_loss(case):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0,
                                    compiled=ON_GPU, temperature=1.0)

    def run():
        loss = liger(case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_(),
                     case.teacher_hidden, case.teacher_weight, case.labels)
        loss.backward()

    return run


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
    student = sd.load_student(cfg)
    teacher = sd.load_teacher(cfg) if alpha < 1 else None
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
        rows = torch.randint(0, vocab, (sequences, tokens))
        batch = sd.collate([{"input_ids": row, "targets": None} for row in rows])
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
        for allocator in allocators():
            found = interleaved(cases, rounds=5)
            print(f"\nwhole step, {sequences} x {tokens} tokens, V {vocab:,}, {allocator}")
            for name, seconds in found.items():
                speed = sequences * tokens / seconds
                ratio = found["plain PyTorch"] / seconds
                print(f"  {name:<20}{speed:>12,.0f} tokens/s{ratio:>8.2f} x plain")


def smollm2_135m():
    return transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True)


def usual_batches(rows, batch_size, count):
    """Of an epoch's batches those whose share of targets is nearest to that of all."""
    order = sd.shuffled(len(rows), 0, 0).tolist()
    batches = []
    for i in range(len(rows) // batch_size):
        numbers = order[i * batch_size:(i + 1) * batch_size]
        batches.append(sd.collate([rows[k] for k in numbers]))
    targets = sum(len(batch.labels) for batch in batches)
    usual = targets / sum(batch.input_ids.numel() for batch in batches)
    batches.sort(key=lambda batch: abs(len(batch.labels) / batch.input_ids.numel() - usual))
    return batches[:count]


def bench_documents(batch_size=8, seq_len=512, count=2):
    """Conversations as long as GSM8K's are under SmolLM2's tokenizer (217 tokens, 126 of them
    targets), one a row and packed, for a student of SmolLM2-135M's shape."""
    pick = random.Random(0)
    documents = []
    for _ in range(1000):
        length = min(seq_len, round(pick.lognormvariate(5.32, 0.33)))
        targets = [k > 0.42 * length for k in range(length)]
        documents.append({"input_ids": [7] * length, "targets": targets})
    kinds = {"one a row": documents,
             "packed": sd.rows_from_columns(sd.pack_documents(documents, seq_len))}
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        smollm2_135m().save_pretrained(f"{folder}/student")
        cases = {}
        targets = {}
        for kind, rows in kinds.items():
            batches = usual_batches(rows, batch_size, count)
            targets[kind] = sum(len(batch.labels) for batch in batches)
            cases[kind] = our_step(folder, batches, alpha=1.0, gradient_checkpointing=True)
        found = interleaved(cases, rounds=3)
    print(f"\nSmolLM2-135M's shape on labels, conversations in {batch_size} rows of {seq_len}")
    speeds = {kind: targets[kind] / seconds for kind, seconds in found.items()}
    for kind, rows in kinds.items():
        lengths = np.array([len(row["input_ids"]) for row in rows])
        padding = sd.share_of_padding(lengths, batch_size, 0)
        ratio = speeds[kind] / speeds["one a row"]
        print(f"  {kind:<20}{padding:>8.1%} padding{speeds[kind]:>12,.0f} targets/s{ratio:>8.2f} x")


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
