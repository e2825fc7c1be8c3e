"""Tests of simple_distill: pure functions against independent float64 references, and runs through
the real command line. They stand in the chapters' order, under the same banners; a test is named
test_<chapter>_<what is promised>, so that `-k cache` finds all of the cache's.

    pytest                                   # the ordinary run: tiny random models, CPU, no network
    pytest -m campaign                       # what takes long
    python test_simple_distill.py --bench    # tables of speed and memory
    python test_simple_distill.py --fork DIR --without cache ...   # the package less some chapters
"""
import argparse
import atexit
import collections
import contextlib
import fcntl   # optional: cache
import datetime
import functools
import gc   # optional: generate
import hashlib
import http.server   # optional: generate served
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
import subprocess
import sys
import tempfile
import threading
import time
import timeit   # optional: cache
import traceback
import types
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

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
        if value is not None:
            items = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, items)]
    return words


# Everything that would blur a comparison is off: what a test is about, it turns on.
PLAIN = dict(
    dtype="fp32", seq_len=32, lr_scheduler="constant", warmup_ratio=0, weight_decay=0,
    learning_rate=1e-3, log_steps=1, save_steps=0, eval_steps=0, gradient_checkpointing=False)
STILL = 1e-30   # a learning rate that moves no weight in fp32


def distil(out, rc=0, words="", **fields):
    """A plain run into `out`, in this process. words: of its command line, over the fields."""
    fields = {**PLAIN, "output_dir": out, **fields}
    given = {name: value for name, value in fields.items() if f"--{name} " not in words}
    return cli(*flags(**given), *words.split(), rc=rc)


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
            print(json.dumps(job), file=Fork.mother.stdin, flush=True)
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


# ---- servers


class Loopback(http.server.ThreadingHTTPServer):   # optional: generate served
    """On a port of this machine, while it is entered."""
    request_queue_size = 200

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Silent: clients get killed."""


class LoopbackHandler(http.server.BaseHTTPRequestHandler):   # optional: generate served
    protocol_version = "HTTP/1.1"
    wbufsize = -1   # an answer in one piece, unless it is flushed

    def log_message(self, *args):
        """Silent."""


# ---- what a run leaves behind


def read_lines(path):
    """The rows of a .jsonl file."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def log(out, kind=None):
    """The lines of log.jsonl; kind train, eval or block: only those."""
    entries = read_lines(f"{out}/log.jsonl")
    return [entry for entry in entries if kind is None or f"{kind}/step" in entry]


def quiet_log(out):
    """The log without speeds: what two equal runs have in common."""
    return [{k: v for k, v in entry.items() if "second" not in k} for entry in log(out)]


def column(out, key):
    return [entry[key] for entry in log(out) if key in entry]


def weights(path):
    return load_file(f"{path}/model.safetensors")


def final_weights(out):
    return weights(f"{out}/final")


def checkpoint(out, step):
    """All tensors of a checkpoint by name."""
    reader = dcp.HuggingFaceStorageReader(f"{out}/checkpoints/step-{step:08d}")
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
    assert a.keys() == b.keys()
    flat_a, flat_b = [torch.cat([x[k].double().flatten() for k in b]) for x in (a, b)]
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


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
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=2 * hidden,
        max_position_embeddings=512,
        bos_token_id=1, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2)   # logits far from uniform
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
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})


def padded(path, source, rows):
    """The same model with more vocabulary rows, and loud ones: unless they are cut, they take all
    of the probability."""
    model = load(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.data[-rows:].normal_(0, 50)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def break_letter(source, path):
    """A copy of a model in which the letter Z, and only it, makes everything infinite."""
    shutil.copytree(source, path)
    z = tiny_tokenizer().encode("Z")[0]
    edit_weights(path, lambda tensors: tensors["model.embed_tokens.weight"][z].fill_(math.inf))
    return str(path)


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_splits(folder, train, validation):
    """A directory of two splits, as on the hub: what is trained on does not depend on how a slice
    is held out."""
    os.makedirs(folder)
    write_jsonl(f"{folder}/train.jsonl", train)
    write_jsonl(f"{folder}/validation.jsonl", validation)
    return str(folder)


WORDS = "one two three red green blue sun moon star tree river stone".split()


def prose(n, seed=0):
    """n words with some structure."""
    pick = random.Random(seed)
    return " ".join(pick.choice(WORDS) for _ in range(n))


def talk(n, seed=0):
    """n questions with answers of very different length."""
    return [{"prompt": prose(1 + i % 3, seed + i),
             "response": prose(1 + (5 * i) % 16, seed + 100 + i)} for i in range(n)]


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
    return write_jsonl(tmp_path_factory.mktemp("data") / "text.jsonl",
                       [{"text": prose(8 + i % 9, i)} for i in range(40)])


@pytest.fixture
def trio(teacher, student, text):
    """Fields of an online run."""
    return dict(teacher=teacher, student=student, dataset=text)


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
        labels = [-100] * (len(before) - 1) + answer + [-100, -100]
        coded.append((torch.tensor(before + answer + encode("\n")), torch.tensor(labels)))
    return coded


def model_losses(student, teacher, coded, alpha, temperature=1.0, divergence="forward"):
    """The same through whole models, one row at a time: no padding, no packing, no chunks."""
    labels = torch.cat([labels for _, labels in coded])
    with torch.no_grad():
        teacher_logits = None if teacher is None else logits_of_rows(teacher, coded)
    return dense_losses(logits_of_rows(student, coded), teacher_logits, labels, alpha, temperature,
                        divergence)


def logits_of_rows(model, coded):
    return torch.cat([model(ids[None], use_cache=False).logits[0] for ids, _ in coded])


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
    return sd.read_json(f"{out}/config.json")


def test_config_json_repeats_the_run(tmp_path, out, trio):
    distil(out, **trio, max_steps=3, alpha=0.3, lr_multipliers=["embed=0.5", "norm=0"], seed=3,
           lr_scheduler="cosine", weight_decay=0.1, eval_steps=1)
    again = f"{tmp_path}/again"
    cli("--config", f"{out}/config.json", "--output_dir", again)
    assert same(final_weights(out), final_weights(again))
    assert read_config(out) | dict(output_dir=again) == read_config(again)
    assert read_config(out).keys() == config.FIELDS.keys()
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
    assert cfg.given == {*fields, "seq_len"}


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


READ = r"\bcfg\.{0}\b|\"{0}\"[,)]"   # the latter in a list of knobs, as block-wise has one


def test_config_every_field_is_read():
    """By name, somewhere in the code: a flag that does nothing is worse than none."""
    source = Path(sd.__file__).read_text() + Path(config.__file__).read_text()
    unread = [name for name in config.FIELDS if not re.search(READ.format(name), source)]
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
    expected = ["  --config"]
    for section in config.SECTIONS:
        expected.append(f"{section.section} ({section.purpose}):")
        expected += [f"  --{name}" for name in config.knobs_in(section.section)]
    shown = run_and_look("--help", code=0)
    assert re.findall(r"^\w+ \(.*\):$|^  --(?!no_)\w+", shown, re.MULTILINE) == expected
    assert all(field.metadata["help"] for field in config.FIELDS.values())


NUMBERS = [name for name, field in config.FIELDS.items()
           if re.search(r"\b(int|float)\b", str(field.type))]


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_config_a_number_has_a_range(name, value):
    with pytest.raises(config.UserError, match=f"^{name} is "):
        config.check_value(name, [1, value] if "list" in str(config.FIELDS[name].type) else value)


# a command line -> words of what is said to it
REFUSED = [
    # no value of that kind
    "--temperature warm -> temperature 'warm'",
    "--batch_size 1.5 -> batch_size '1.5'",
    "--lr_scheduler step -> lr_scheduler cosine",
    "--mode learn -> mode train",
    "--gradient_checkpointing perhaps -> gradient_checkpointing perhaps",
    "--lr_multipliers (=1 -> lr_multipliers '(=1'",
    "--lr_multipliers =1 -> lr_multipliers '=1'",
    "--lr_multipliers a=-1 -> lr_multipliers 'a=-1'",
    "--student layers:0 -> layers:N",
    "--student layers:² -> layers:N",

    # out of range, or nearly a knob
    "--alpha=-0.1 -> alpha is -0.1; it must be",
    "--alpha 1.1 -> alpha is 1.1; it must be",
    "--temperature 0 -> temperature is 0.0; it must be",
    "--seq_len 1 -> seq_len is 1; it must be",
    "--batch_size 0 -> batch_size is 0; it must be",
    "--save_steps=-1 -> save_steps is -1; it must be",
    "--seed 268435457 -> seed is 268435457; it must be",
    "--temprature 2 -> --temprature did you mean temperature?",
    "--learning-rat 1 -> --learning-rat did you mean learning_rate?",
    "--studnt=x -> --studnt did you mean student?",
    "--alpha 0.5 --lr_multiplier a=1 -> --lr_multiplier did you mean lr_multipliers?",
    "--no_gradient_checkpoint -> --no_gradient_checkpoint did you mean gradient_checkpointing?",

    # flags
    "--alpha 0.1 --alpha 0.2 -> alpha once",
    "--batch-size 1 --batch_size=2 -> batch_size once",
    "train -> 'train' --",
    "--alpha -> alpha",
    "--no_seed 3 -> --no_seed",
    # nothing where a name should be, as from "$UNSET"
    "--tokenizer=\t -> tokenizer",
    "--output_dir= -> output_dir",
    "--lr_multipliers= -> lr_multipliers",

    # what does nothing beside the others
    "--cache_dir c --alpha 1 -> cache_dir --alpha",   # optional: cache
    "--cache_dir c --divergence jsd -> divergence --cache_dir",   # optional: cache
    "--cache_dir c --dataset d -> dataset --cache_dir",   # optional: cache
    *[   # optional: cache
        "--cache_dir c --streaming -> streaming --cache_dir",   # optional: streaming
        "--cache_dir c --blockwise -> blockwise --cache_dir",   # optional: blockwise
        "--cache_dir c --on_policy 1 -> on_policy --cache_dir",   # optional: on_policy
    ],
    "--mode cache --cache_dir c --cache_top_k 3 -> --cache_method topk",   # optional: cache
    "--blockwise --alpha 1 -> blockwise --alpha",   # optional: blockwise
    "--block_input teacher --lr_per_block 1"   # optional: blockwise
        " -> block_input lr_per_block --blockwise true",
    "--blockwise --block_input teacher --no_freeze_previous_blocks"   # optional: blockwise
        " -> freeze_previous_blocks --block_input student",
    "--blockwise --logit_loss_type ce --logit_loss_weight 0.3"   # optional: blockwise
        " -> logit_loss_weight --logit_loss_type kl_div or mse",
    "--blockwise --no_train_lm_head --logit_loss_type ce"   # optional: blockwise
        " -> logit_loss_type --train_lm_head true",
    "--on_policy 1 --alpha 1 -> on_policy --alpha",   # optional: on_policy
    "--on_policy 1 --packing documents -> on_policy --packing rows",   # optional: on_policy
    "--max_new_tokens 9 -> max_new_tokens --on_policy above 0",   # optional: on_policy
    "--mode generate --teacher t -> teacher --provider local",   # optional: generate
    "--lr_scheduler_kwargs {} --lr_scheduler constant -> lr_scheduler_kwargs constant",
    "--warmup_ratio 0.1 --lr_scheduler constant -> warmup_ratio --lr_scheduler",

    # what cannot be done
    "--teacher t -> student",
    "--max_steps 0 -> max_steps",
    "--num_epochs 0 -> num_epochs",
    "--streaming --teacher t --student s -> --max_steps",   # optional: streaming
    "--mode cache -> --cache_dir",   # optional: cache
    *[   # optional: blockwise
        "--blockwise --streaming --max_steps 2 -> blockwise --streaming",   # optional: streaming
    ],
    "--blockwise --block_input teacher --wd_per_block 1 2"   # optional: blockwise
        " -> block_input wd_per_block",
    "--on_policy 1 --on_policy_prompt 128 -> 128 seq_len",   # optional: on_policy

    # files
    "--config /nowhere -> /nowhere FileNotFoundError",
    "--config list.yaml -> list.yaml mapping",
    "--config broken.yaml -> broken.yaml ParserError",
    "--config broken.json -> broken.json JSONDecodeError",
    "--config twice.yaml -> seed once",
    "--config nested.yaml -> nested.yaml line 2",   # and no bomb of aliases
    "--config several.yaml -> '16'",
    "--config itself.yaml -> 'config'",
    "--config unknown.yaml -> 'temprature' did you mean temperature?",
    "--config unknown.json -> 'temprature' did you mean temperature?",
]

BROKEN_FILES = {
    "list.yaml": "- 1\n- 2\n",
    "broken.yaml": "a: [1\n",
    "broken.json": '{"seed": ',
    "twice.yaml": "seed: 1\nseed: 2\n",
    "nested.yaml": "lr_multipliers: &a [x=1]\nlr_per_block: [*a, *a]\n",
    "several.yaml": "batch_size: [8, 16]\n",
    "itself.yaml": "config: list.yaml\n",
    "unknown.yaml": "temprature: 2\n",
    "unknown.json": '{"temprature": 2}',
}


@pytest.mark.parametrize("case", REFUSED)
def test_config_refuses(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for name, body in BROKEN_FILES.items():
        Path(name).write_text(body)
    words, told = case.split(" -> ")
    message = refused(*words.split(" "))
    assert [word for word in told.split() if word not in message] == [], message


# What goes together although one of it may not stand alone.
@pytest.mark.parametrize("words", [
    "--blockwise --max_steps 0",   # optional: blockwise
    "--cache_dir c --seq_len 9 --packing rows --eval_samples 9 --temperature 2",   # optional: cache
    "--cache_dir c --mode cache --dataset d --divergence forward",   # optional: cache
    "--on_policy 1 --max_new_tokens 9 --on_policy_prompt 127",   # optional: on_policy
    "--mode generate --provider local --teacher t --attention eager",   # optional: generate
    "--teacher t --alpha 1 --seed 268435456",
    "--alpha 0 --temperature 1e-9 --seq_len 2 --batch_size 1 --save_steps 0 --seed 0",
    "--lr_scheduler constant --warmup_ratio 0",
])
def test_config_takes(words):
    parse(*words.split())


# ---- bad input as a run meets it


BAD_FILES = {
    "mine": b"mine",
    "empty.jsonl": b"",
    "binary.jsonl": bytes(range(256)) * 9,
    "line.jsonl": b'{"text": "one two three"}\n' * 4 + b'{bad\n{"text": "four five six"}\n',
    "a.parquet": b"PAR",
    "column.jsonl": b'{"body": "one two", "id": 3}\n' * 9,
    "target.jsonl": b'{"prompt": "", "response": ""}\n' * 9,
}

# a command line over that of a plain run -> words of the message
BAD_INPUT = [
    "--alpha 1.2 -> alpha",
    "--output_dir mine -> mine",
    "--resume /nowhere -> /nowhere",
    "--lr_scheduler cosine_with_min_lr -> min_lr",
    '--lr_scheduler cosine --lr_scheduler_kwargs {"num_cycle":2} -> num_cycle',
    "--lr_scheduler cosine --lr_scheduler_kwargs { -> cosine JSON",
    '--lr_scheduler cosine --lr_scheduler_kwargs {"num_cycles":NaN} -> cosine peak',
    '--lr_scheduler polynomial --lr_scheduler_kwargs {"lr_end":-5} -> polynomial peak',
    '--lr_scheduler inverse_sqrt --lr_scheduler_kwargs {"timescale":0} -> inverse_sqrt',
    "--lr_scheduler linear --warmup_ratio 1 --max_steps 1 -> linear 0",
    "--lr_multipliers zzz=1 -> zzz",
    "--default_lr_multiplier 0 -> frozen",
    "--teacher /nowhere -> teacher /nowhere",
    "--student no/where -> no/where",
    "--attention sideways -> sideways",
    "--student layers:9 -> layers:9 2",
    "--teacher no_json -> teacher",
    "--teacher cut_off -> teacher",
    "--teacher missing -> layers.2",
    "--teacher shapes -> shapes down_proj torch.Size",
    "--teacher codes -> codes quantised",
    "--student codes -> codes quantised",
    "--teacher codes --student layers:1 -> layers:1 quantised",
    "--student novel -> student novel",
    "--dataset /nowhere.jsonl -> /nowhere.jsonl",
    "--train_split tarin -> tarin",
    "--dataset empty.jsonl -> empty.jsonl",
    "--dataset binary.jsonl -> binary.jsonl",
    "--dataset line.jsonl -> line.jsonl",
    "--dataset a.parquet -> a.parquet",
    "--dataset column.jsonl -> text",
    "--dataset target.jsonl -> target",
]


def edit_config(**fields):
    def change(path):
        sd.write_json(sd.read_json(path / "config.json") | fields, path / "config.json")
    return change


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """The folder of BAD_FILES, and of models that were damaged."""
    folder = tmp_path_factory.mktemp("bad")
    for name, body in BAD_FILES.items():
        (folder / name).write_bytes(body)
    for name in ("no_json", "cut_off", "missing", "novel", "shapes", "codes"):
        tiny_model(folder / name)
    os.truncate(folder / "no_json/config.json", 9)
    os.truncate(folder / "cut_off/model.safetensors", 999)
    edit_config(num_hidden_layers=3)(folder / "missing")
    edit_config(model_type="novel")(folder / "novel")
    edit_config(intermediate_size=60)(folder / "shapes")
    edit_config(quantization_config={"quant_method": "of tomorrow"})(folder / "codes")
    return folder


@pytest.mark.parametrize("case", BAD_INPUT)
def test_config_bad_input_is_a_line_or_two(case, bad_files, monkeypatch, trio, out):
    """And nothing is changed, or left behind but the traceback."""
    words, told = case.split(" -> ")
    monkeypatch.chdir(bad_files)
    before = files_in(bad_files)
    err = distil(out, 2, words, **trio).err.strip()
    line = err[err.index("error: "):]
    assert len(line.splitlines()) <= 2 and len(line) < 1000, err
    assert [word for word in told.split() if word not in line] == [], line
    assert {path.name for path in Path(out).rglob("*")} <= {".simple_distill", "error.log"}
    assert files_in(bad_files) == before


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
def test_runtime_a_traceback_goes_to_error_log_or_by_debug_to_the_terminal(
        tmp_path, out, student, capsys, debug):
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    words = f"--student {student} --alpha 1 --dataset {tmp_path}/bad.jsonl --output_dir {out}"
    assert sd.main([*words.split(), f"--debug={debug}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: while reading dataset") == 1
    assert ("Traceback" in shown) == debug
    assert os.path.exists(f"{out}/error.log") != debug


def test_runtime_rank_0_speaks_and_survives_a_terminal_that_has_gone(monkeypatch, capsys):
    for rank in (1, 0):
        monkeypatch.setattr(sd, "RANK", rank)
        sd.print0("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"

    def gone(words):
        raise OSError

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


@pytest.mark.parametrize("files, refusal", [
    ({"notes.txt": "mine"}, None),
    ({"config.json": "{}"}, "holds 'config.json'"),   # as every model's folder
    ({"final": "mine"}, "holds 'final'"),
    ({sd.MARK: "", "final": "mine"}, None),   # touched by its owner, or half written
    ({sd.MARK: "train 12345", "config.json": "{}"}, None),
    ({sd.MARK: "trains 12345"}, "of mode trains"),
])
def test_runtime_a_folder_is_ours_by_its_mark_and_another_one_stays_as_it_is(out, files, refusal):
    os.mkdir(out)
    for name, content in files.items():
        Path(out, name).write_text(content)
    refused = pytest.raises(config.UserError, match=refusal)
    expected = refused if refusal else contextlib.nullcontext()
    with expected, sd.process_group(), sd.claim(out, "train"):
        mark = Path(out, sd.MARK).read_text()
        assert re.fullmatch(r"train \d{6,}", mark)
        files = {**files, sd.MARK: mark}
    assert {name: Path(out, name).read_text() for name in os.listdir(out)} == files


HOLD = """
def main(args):
    with process_group(), claim(args[0], "train"):
        print("held", flush=True)
        time.sleep(99)
"""


def test_runtime_one_run_a_folder_until_it_ends_or_is_killed(out, labels_only):
    holder = Fork(f"{out}.txt", out, change=HOLD)
    while "held\n" not in Path(holder.log).read_text():
        assert holder.poll() is None
        time.sleep(0.05)
    mark = Path(out, sd.MARK).read_text()
    assert f"no other run is at work in {out}" in distil(out, rc=2, **labels_only).err
    assert Path(out, sd.MARK).read_text() == mark
    threading.Timer(0.5, holder.signal, [signal.SIGKILL]).start()
    with sd.process_group(), sd.claim(out, "train", wait=True):
        holder.wait()


# ---- ranks

RANKS = """
def main(args):
    os.chdir(args[0])
    with process_group():
        seen = [all_sum(RANK, 2), from_rank0(RANK + 5)]
        with contextlib.suppress(ValueError), node_first():
            if RANK == 0:
                time.sleep(1)
                open("done", "w").close()
                raise ValueError   # which the others then meet themselves
            seen.append(os.path.exists("done"))
        with claim("shared", "train"):
            pass
        for folder in ("new", "old"):   # on its own disk, without a mark or with an older run's
            os.makedirs(f"node{RANK}/{folder}")
            if folder == "old":
                open(f"node{RANK}/old/.simple_distill", "w").write("train 12345")
            try:
                with claim(f"node{RANK}/{folder}", "train"):
                    seen.append("went on")
            except UserError as e:
                seen.append(str(e).split(" in ")[0])
        print(RANK, json.dumps(seen), flush=True)
        if RANK == 1:   # rank 0, with the store, may not be gone yet
            time.sleep(2)
            print(first_to_fail(), first_to_fail())
"""


def test_runtime_ranks_agree_wait_for_each_other_and_share_a_disk(tmp_path):
    shown = Fork(tmp_path / "log.txt", tmp_path, ranks=2, change=RANKS).wait()
    refusal = '"rank 1 does not see what rank 0 writes"'
    assert '\n0 [[1.0, 4.0], 5, "went on", "went on"]\n' in shown
    assert f"\n1 [[1.0, 4.0], 5, true, {refusal}, {refusal}]\n" in shown
    assert "\nTrue False\n" in shown   # it speaks for all, once


def test_runtime_a_gpu_that_is_not_there_is_an_error_in_one_line(monkeypatch):
    def set_device(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(sd, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(config.UserError, match="invalid device ordinal"), sd.process_group():
        pass


def test_runtime_only_the_host_waits_for_a_day():
    """A collective on GPUs, where a rank is gone, ends after minutes."""
    limits = []
    with sd.process_group():
        for group in (torch.distributed.group.WORLD, sd.HOST):
            limits.append(group._get_backend(torch.device("cpu")).options._timeout)
    assert limits == [datetime.timedelta(minutes=15), datetime.timedelta(days=1)]


@pytest.mark.parametrize("environment, told", [
    ("RANK=1 WORLD_SIZE=1", "no rank 1 of 1"),
    ("WORLD_SIZE=2", "RANK expected"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=nowhere.invalid MASTER_PORT=1", "nowhere.invalid"),
])
def test_runtime_a_mistake_of_a_launcher_is_said_at_once(monkeypatch, environment, told):
    for name, value in (item.split("=") for item in environment.split()):
        monkeypatch.setenv(name, value)
        if "MASTER" not in name:
            monkeypatch.setattr(sd, name.removesuffix("_SIZE"), int(value))
    with pytest.raises(config.UserError, match=told), sd.process_group():
        pass


def test_runtime_ctrl_c_during_the_imports_is_quiet(tmp_path):
    (tmp_path / "datasets.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)")
    process = spawn(env={"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert (process.returncode, shown) == (-signal.SIGINT, "")   # to a shell that is 130


def test_runtime_a_run_needs_no_open_streams(trio, out):
    """As some schedulers start jobs."""
    words = [sys.executable, HERE / "simple_distill.py", *words_of(
        flags(**PLAIN, **trio, output_dir=out, max_steps=1))]
    ran = subprocess.run(f"{shlex.join(map(str, words))} <&- >&- 2>&-", shell=True)
    assert ran.returncode == 0
    assert os.path.exists(f"{out}/final/config.json")


def test_runtime_any_number_of_signals_only_asks_to_stop():
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]   # not as under nohup
    with sd.stop_signals() as requests:
        assert not requests
        for count, number in enumerate(numbers * 2, 1):
            signal.raise_signal(number)
            assert len(requests) == count
    assert list(map(signal.signal, numbers, before)) == [signal.SIG_DFL] * 3


# --------------------------------------------------------------------------------------------------
# Losses: distillation_loss against float64.

DIVERGENCES = ["forward", "reverse", "jsd"]
CASES = [{}, dict(bias=True), dict(scale=0.25), dict(softcap=3.0),
         dict(bias=True, scale=1.7, softcap=5.0), dict(masked=1.1)]   # the last: all of them


class Case(NamedTuple):
    """What distillation_loss takes, at random."""
    hidden: torch.Tensor   # [N, D]
    head: sd.Head
    labels: torch.Tensor   # [N], -100: not counted
    teacher: sd.DenseTarget


def case(n=23, vocab=97, *, teacher_vocab=None, seed=0, dtype=torch.float32, bias=False, scale=1.0,
         softcap=None, masked=0.3, size=2.0):
    torch.manual_seed(seed)

    def normal(*shape, std=1.0):
        return (std * torch.randn(shape)).to(dtype).requires_grad_()

    def head(rows, width):
        weight = normal(rows, width, std=size / math.sqrt(width))
        return sd.Head(weight, normal(rows) if bias else None, scale, softcap)

    labels = torch.where(torch.rand(n) < masked, -100, torch.randint(vocab, (n,)))
    return Case(normal(n, 16), head(vocab, 16), labels,
                sd.DenseTarget(normal(n, 24).detach(), head(teacher_vocab or vocab, 24)))


def apply_head(hidden, head):
    """-> logits in float64."""
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias) * head.scale
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


def with_gradients(losses, case):
    """(loss, ce, kl) and the gradients of loss to hidden, weight and bias, in float64."""
    leaves = (case.hidden, case.head.weight, case.head.bias)
    leaves = [x for x in leaves if x is not None and x.requires_grad]
    return [x.detach().double() for x in (*losses, *torch.autograd.grad(losses[0], leaves))]


def exact(case, alpha=0.3, temperature=1.0, vocabulary=None, **options):
    """Through full logits in float64."""
    logits, teacher_logits = [
        apply_head(*pair)[:, :vocabulary] for pair in (case[:2], case.teacher)]
    if alpha == 1:
        teacher_logits = None
    losses = dense_losses(logits, teacher_logits, case.labels, alpha, temperature, **options)
    return with_gradients(losses, case)


def fused(case, alpha=0.3, temperature=1.0, **options):
    """Through distillation_loss."""
    losses = sd.distillation_loss(*case, alpha=alpha, temperature=temperature, **options)
    return with_gradients(losses, case)


def off(got, want, floor=1e-300):
    """Largest relative deviation; floor: the size below which a number counts as rounding."""
    return torch.stack([(a - b).norm() / b.norm().clamp_min(floor)
                        for a, b in zip(got, want, strict=True)]).max()


@pytest.fixture(params=itertools.product([1.0, 3.0], DIVERGENCES), ids=str)
def options(request):
    return dict(zip(("temperature", "divergence"), request.param))


@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_and_gradients_match_float64(given, alpha, options):
    """At alpha 1 the teacher is not asked."""
    inputs = case(**given)
    want = exact(inputs, alpha, **options)
    for chunk in (None, 1, 7):
        assert off(fused(inputs, alpha, chunk=chunk, **options), want, floor=1e-3) < 2e-6


def test_losses_take_a_linear_layer_a_plain_pair_and_a_denominator():
    inputs = case(bias=True)
    head, teacher_head = [
        types.SimpleNamespace(weight=head.weight, bias=head.bias)   # as nn.Linear has them
        for head in (inputs.head, inputs.teacher.head)]
    plain = inputs._replace(head=head, teacher=(inputs.teacher.hidden, teacher_head))
    whole = fused(inputs)
    assert off(fused(plain), whole) == 0
    counted = (inputs.labels != -100).sum()
    assert off(fused(inputs, denominator=7.0), [value * counted / 7 for value in whole]) < 1e-6


@pytest.mark.parametrize("device, vocab, size, budgets", [
    ("cpu", 16384, 2**37, 1), ("cuda", 16383, 2**37, 1), ("cuda", 16384, 2**37, 4),
    ("cuda", 16384, 2**35, 1.6), ("cuda", 16384, 2**33, 1)])
def test_losses_a_large_gpu_takes_larger_chunks(monkeypatch, device, vocab, size, budgets):
    card = types.SimpleNamespace(total_memory=size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    chunk = sd.chunk_size(torch.device(device), 2, vocab)
    assert chunk * 2 * 2 * vocab == pytest.approx(budgets * 2**29, rel=1e-2)


def test_losses_in_bf16_are_within_its_rounding(options):
    inputs = case(n=64, vocab=500, dtype=torch.bfloat16)
    got = fused(inputs, chunk=30, **options)
    want = exact(inputs, **options)
    assert off(got, want) < 2e-2
    assert off(got[:3], want[:3]) < 4e-3   # reductions are in fp32


def test_losses_of_logits_of_ten_thousand_stay_finite(options):
    inputs = case(size=2e4)
    got = fused(inputs, **options)
    assert all(value.isfinite().all() for value in got)
    if options["divergence"] == "forward":   # reverse and jsd reach log 0 in the reference
        assert off(got, exact(inputs, **options)) < 1e-4


@pytest.mark.parametrize("nudge", [0.0, 1e-6, 1e-4, 1e-2])
def test_losses_kl_to_almost_oneself_is_never_negative(nudge, options):
    """To oneself it is nothing, and has no gradient."""
    for seed in range(10):
        inputs = case(seed=seed, bias=True)
        near = inputs.hidden.detach() + nudge * torch.randn_like(inputs.hidden)
        _, _, kl, *grads = fused(inputs._replace(teacher=(near, inputs.head)), 0.0, **options)
        assert kl > -1e-6
        if nudge == 0:
            assert kl < 1e-6
            assert not any(map(torch.any, grads))


def test_losses_what_does_not_learn_gets_no_gradient_and_changes_nothing_else(monkeypatch):
    """Whether a weight would need one says nothing under no_grad."""
    inputs = case(bias=True)
    whole = fused(inputs)   # loss, ce, kl, gradients of hidden, weight, bias
    for i, part in enumerate((inputs.hidden, *inputs.head[:2]), 3):
        part.requires_grad_(False)
        assert off(fused(inputs), whole[:i] + whole[i + 1:]) == 0
        part.requires_grad_(True)
    monkeypatch.delattr(sd, "add_product")
    with torch.no_grad():
        losses = sd.distillation_loss(*inputs, alpha=0.3, temperature=1.0)
    assert off(losses, whole[:3]) == 0


@pytest.mark.parametrize("student, teacher, vocabulary", [(97, 97, 80), (80, 97, None),
                                                          (97, 80, None), (90, 85, 80)])
def test_losses_beyond_the_common_vocabulary_heads_are_cut(student, teacher, vocabulary, options):
    inputs = case(vocab=student, teacher_vocab=teacher, bias=True)
    inputs.labels.clamp_(max=79)
    got = fused(inputs, vocabulary=vocabulary, **options)
    assert off(got, exact(inputs, vocabulary=80, **options)) < 2e-6


def in_buckets(logits, ids):   # optional: cache
    """Log-probabilities of ids, and of all others as one bucket."""
    logp = logits.log_softmax(-1)
    rest = logp.scatter(-1, ids, -1e300).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, ids), rest], -1)


@pytest.mark.parametrize("k, repeats, size", [   # optional: cache
    (1, 1, 2), (8, 1, 2), (97, 2, 2),   # what is listed twice adds up
    (40, 1, 20)])   # down to exp(-60) of the student's mass where the teacher has most of its own
@pytest.mark.parametrize("temperature", [1.0, 3.0])   # optional: cache
def test_losses_sparse_teacher_is_the_dense_one_with_the_rest_as_one_bucket(   # optional: cache
        k, repeats, size, temperature):
    """Listed is what the student likes. It is pulled to the rest however little it has there."""
    inputs = case(masked=0, size=size)
    logits = apply_head(*inputs[:2])
    ids = logits.topk(k).indices
    logp = in_buckets(logits / temperature, ids)
    logq = in_buckets(apply_head(*inputs.teacher) / temperature, ids).detach()
    q = logq.exp()
    kl = kl_sum(logq, logp) / len(q) * temperature ** 2
    ce = F.cross_entropy(logits, inputs.labels)
    want = with_gradients((0.3 * ce + 0.7 * kl, ce, kl), inputs)
    target = sd.SparseTarget(
        ids.repeat(1, repeats), (q[:, :k] / repeats).repeat(1, repeats).float(), q[:, k].float(),
        torch.special.entr(q).sum(-1).float())
    got = fused(inputs._replace(teacher=target), temperature=temperature, chunk=9)
    assert off(got, want) < 2e-6


@pytest.mark.campaign
def test_losses_compiled_loss_matches_float64(options):
    for n in (50, 7):   # of a vocabulary that is large enough for the compiler to be called
        inputs = case(n=n, vocab=20000)
        assert off(fused(inputs, **options), exact(inputs, **options)) < 2e-6


WITHOUT_COMPILER = """
import test_simple_distill as t
for n in (5, 9):
    inputs = t.case(n=n, vocab=20000)
    assert t.off(t.fused(inputs), t.exact(inputs)) < 2e-6
"""


@pytest.mark.campaign
def test_losses_without_a_compiler_the_loss_says_so_once_and_is_right(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        timeout=300)
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
    pair = {role: tiny_model(tmp_path / role, 300, tokenizer=tiny_tokenizer(**options))
            for role, options in (("student", ours), ("teacher", theirs))}
    assert problem in distil(out, rc=2, **pair, dataset=text, max_steps=1).err


@pytest.mark.parametrize("named, candidates, found", [
    (None, "demo layers:2 shape.json bare a b", "a"), ("b", "a", "b"), (None, "bare demo", None)])
def test_data_whose_tokenizer(tmp_path, monkeypatch, named, candidates, found):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "broken"):
        tiny_tokenizer().save_pretrained(name)
    os.mkdir("bare")
    tokenizer = sd.load_tokenizer(config.Config(tokenizer=named), named, *candidates.split())
    assert (tokenizer and tokenizer.name_or_path) == found
    Path("broken", "tokenizer.json").write_text("{")
    with pytest.raises(config.UserError, match="tokenizer of broken"):   # and no other is taken
        sd.load_tokenizer(config.Config(), "broken", "a")
    with pytest.raises(config.UserError, match="name one with --tokenizer"):
        sd.load_data(config.Config(), None)


# ---- which tokens are targets


def target_runs(row, tokenizer):
    """Each contiguous run of targets as text."""
    pairs = zip(row["targets"], row["input_ids"], strict=True)
    return [tokenizer.decode([token for _, token in run])
            for is_target, run in itertools.groupby(pairs, lambda pair: pair[0]) if is_target]


def encode(rows, tokenizer, seq_len=512, packing="auto"):
    cfg = config.Config(seq_len=seq_len, packing=packing)
    encoded = sd.row_encoder(cfg, tokenizer)(rows)
    columns = {name: [row.get(name) for row in encoded] for name in sd.FEATURES}
    return datasets.Dataset.from_dict(columns, features=sd.FEATURES)


def turns(*contents):
    """Of user and assistant, one after the other."""
    roles = itertools.cycle(["user", "assistant"])
    return [dict(role=role, content=content) for role, content in zip(roles, contents)]


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

# thoughts and calls of tools, by the templates of those models, shortened
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
WITH_TOOLS = """[
    {"role": "user", "content": "how is it?"},
    {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "id": "abcdefghi",
        "function": {"name": "look", "arguments": %s}}]},
    {"role": "tool", "content": "grey", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Dull.", "reasoning_content": "grey is dull"}]"""
THOUGHTS = json.loads(r"""[
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nd"}]""")
SHOWN_CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("template, messages, targets", [
    *[(template, [dict(role="system", content="be brief"),
                  *turns("hello there", "hello there", "2+2?", "It is 4.\nTruly.")],
       ["hello there" + end, "It is 4.\nTruly." + end]) for template, end in (
           (CHATML, "<|im_end|>"), (NEEDS_SYSTEM + CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"),
           (MISTRAL, "<|endoftext|>"), (NO_END, ""), (None, "<|endoftext|>"))],
    *[(LLAMA3, turns(said, said, said, said), [said.strip() + "<|eot_id|>"] * 2) for said in (
        "  spaced out \n", "x", "<|im", "user", "é日本🙂", "assistant")],
    # templates that change earlier turns
    (THINKING, turns("a", "<think>hm</think>b", "c", "<think>d"),
     ["b<|im_end|>", "<think>d<|im_end|>"]),
    (QWEN3, THOUGHTS, ["b<|im_end|>", "<think>\nlook\n</think>\n\n" + SHOWN_CALL,
                       "<think>\nso\n</think>\n\nd<|im_end|>"]),
    (QWEN3, [*THOUGHTS, *turns("e", "f")],
     ["b<|im_end|>", SHOWN_CALL, "d<|im_end|>", "<think>\n\n</think>\n\nf<|im_end|>"]),
    (QWEN3, turns("a", ""), []),   # says nothing
], ids=itertools.count())
@pytest.mark.parametrize("bos", [False, True])
def test_data_what_the_assistant_says_and_its_end_mark_are_targets(
        template, messages, targets, bos):
    tokenizer = tiny_tokenizer(template, bos=bos)
    row, = encode([{"messages": messages}], tokenizer)
    assert target_runs(row, tokenizer) == targets
    if template:   # and the ids are those that the template makes, with no second <|begin|>
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert row["input_ids"] == ids


@pytest.mark.parametrize("template, targets", [
    (QWEN3, [SHOWN_CALL, "<think>\ngrey is dull\n</think>\n\nDull.<|im_end|>"]),
    (LLAMA31, ['{"name": "look", "parameters": {"at": "sky"}}<|eot_id|>', "Dull.<|eot_id|>"]),
    (GLM, ["\n<think></think>\n<tool_call>look\n<arg_key>at</arg_key>\n"
           "<arg_value>sky</arg_value>\n</tool_call><|observation|>",
           "\n<think>grey is dull</think>\nDull."]),
    (MISTRAL_TOOLS, ['[TOOL_CALLS] [{"name": "look", "arguments": {"at": "sky"}, '
                     '"id": "abcdefghi"}]<|endoftext|>', "Dull.<|endoftext|>"]),
], ids="qwen3 llama3.1 glm mistral".split())
@pytest.mark.parametrize("arguments", ['{"at": "sky"}', r'"{\"at\": \"sky\"}"'])
def test_data_calls_of_tools_and_thoughts_are_targets(tmp_path, template, targets, arguments):
    """Read from a file, so that each message has the fields of all others, as nulls; arguments come
    as an object or, as APIs give them, as JSON in a string."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": [
        "<|user|>", "<|assistant|>", "<|observation|>"]})
    messages = json.loads(WITH_TOOLS % arguments)
    rows = [{"messages": messages}, {"messages": messages[:2]}]   # the second is only a call
    (whole, call), _ = rows_of(write_splits(tmp_path / "d", rows, rows), tokenizer, 512)
    assert target_runs(whole, tokenizer) == targets
    shown, = target_runs(call, tokenizer)
    assert shown in (
        targets[0], targets[0].replace("<|observation|>", ""),   # which is the next turn's
        "<think>\n\n</think>\n\n" + targets[0])   # Qwen's last turn always thinks


# ---- from raw rows to token rows


def rows_of(dataset, tokenizer=None, seq_len=64, **fields):
    """What load_data hands on, as lists: (train rows, held-out rows)."""
    cfg = config.Config(dataset=str(dataset), seq_len=seq_len, **fields)
    with sd.process_group():
        train, held_out = sd.load_data(cfg, tokenizer or tiny_tokenizer())
    return list(train or []), list(held_out)


def in_parts(items, size):
    """Cut, the last part maybe shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def ids_of(rows):
    return [list(map(int, row["input_ids"])) for row in rows]


@pytest.mark.parametrize("row", json.loads("""[
    {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
    {"messages": [{"role": "user", "name": null, "tool_calls": null,
                   "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]},
                  {"role": "assistant", "content": "so", "tool_calls": []}]},
    {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
    {"prompt": "why?", "response": "so", "text": "unread"},
    {"prompt": "why?", "completion": "so"},
    {"prompt": [{"role": "user", "content": "why?"}],
     "completion": [{"role": "assistant", "content": "so"}]},
    {"messages": null, "prompt": null, "question": "why?", "answer": "so"},
    {"instruction": "why?", "input": "", "output": "so"}]"""))
def test_data_conversations_of_every_format(row):
    assert sd.conversation_of(row) == turns("why?", "so")
    assert sd.conversation_of({"instruction": "add", "input": "1, 2", "output": "3"}) == turns(
        "add\n\n1, 2", "3")
    for other in ({"messages": [], "prompt": "why?", "response": None}, {"messages": "why?"}):
        assert sd.conversation_of({**other, "text": "one"}) is None
    when = datetime.datetime(2026, 1, 2)   # as parquet has them
    message = {"role": "user", "content": "a", "calls": [None]}
    assert sd.conversation_of({"messages": [{**message, "when": when}]}) == [
        {**message, "when": str(when)}]


MIXED = json.loads("""[
    {"text": "plain one"},
    {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]},
    {"text": "", "id": 1},
    {"text": null},
    {"text": "plain two"},
    {"messages": [{"role": "user", "content": "q"}, {"content": "nobody said this"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"},
                                               {"type": "image_url", "image_url": {"url": "x"}}]},
                  {"role": "assistant", "content": "a picture"}]},
    {"id": 7},
    {"messages": [{"role": "user", "content": "only asked"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a"}]}]""")


def test_data_each_row_is_read_by_its_own_kind_or_dropped_with_a_reason():
    """Empty text is neither said nor wrong."""
    tokenizer = tiny_tokenizer(NO_SYSTEM + CHATML)
    rows, dropped = sd.kept_rows(encode(MIXED, tokenizer, 64))
    assert [target_runs(row, tokenizer) for row in rows] == [
        ["so<|im_end|>"], ["lain one<|endoftext|>plain two<|endoftext|>"]]
    assert dropped.total() == 5
    for reason in ("KeyError: 'from' among messages", "KeyError: 'text' among messages",
                   "KeyError: 'text' among id", "no target in 64 tokens", "no system role"):
        assert sum(reason in why for why in dropped) == 1, (reason, dropped)


@pytest.mark.parametrize("template, packing, why", [
    (None, "blocks", "KeyError: 'text' among messages"),
    ("{% for m in messages[2:] %}{{ m.content }}{% endfor %}", "auto",   # writes nothing of it
     "no target in 16 tokens")], ids=["blocks", "template"])
def test_data_dropped_as_it_has_to_be(template, packing, why):
    rows = [{"messages": turns("why?", "so")}, {"text": "abc"}]
    kept, dropped = sd.kept_rows(encode(rows, tiny_tokenizer(template), 16, packing))
    assert len(kept) == 1
    reason, = dropped.elements()
    assert why in reason


def test_data_one_conversation_a_row_cut_to_seq_len(tmp_path, capsys):
    rows = [{"prompt": "p" * n, "response": "r" * 10} for n in (2, 3, 9, 16, 500)]
    train, _ = rows_of(write_splits(tmp_path / "d", rows, rows[:1]), seq_len=16)
    assert [len(row["input_ids"]) for row in train] == [14, 15, 16]
    assert [sum(row["targets"]) for row in train] == [11, 11, 6]
    shown = capsys.readouterr().out
    assert "train: of 5 raw rows dropped 2: {'no target in 16 tokens': 2}" in shown
    assert "eval: dropped" not in shown


@pytest.mark.parametrize("packing", ["blocks", "rows"])
@pytest.mark.parametrize("bos", [False, True])
def test_data_a_text_ends_with_eos_and_a_block_begins_with_bos(bos, packing):
    """If that is where the tokenizer puts it."""
    docs = [prose(5 + i, i) for i in range(6)]
    streams = [tiny_tokenizer().encode(doc + "<|endoftext|>") for doc in docs]
    docs[-1] += "<|endoftext|>"   # it ends so already
    if packing == "blocks":
        streams = [list(itertools.chain(*streams))]
    expected = [[1] * bos + part for ids in streams for part in in_parts(ids, 16 - bos)]
    rows = encode([{"text": doc} for doc in docs], tiny_tokenizer(bos=bos), 16, packing)
    for row, ids in zip(rows, expected, strict=True):
        assert row["input_ids"] == ids
        assert row["starts"] == [0]
        assert row["targets"] == [i > 0 for i in range(len(ids))]
        assert bool(row["dropped"]) == (len(ids) == 1)


def test_data_every_local_format_gives_the_same_rows(tmp_path):
    docs = [prose(6 + i, i) + "\n" + prose(3, i) for i in range(25)]
    rows = [{"text": doc} for doc in docs]
    table = datasets.Dataset.from_list(rows)
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table.to_csv(tmp_path / "d.csv")
    table.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.txt").write_text("\n\n".join(docs))
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved_dict")
    want = list(map(ids_of, rows_of(tmp_path / "d.jsonl")))
    assert len(want[0]) > 20
    for name in "d.json d.csv d.parquet d.txt saved saved_dict".split():
        assert list(map(ids_of, rows_of(tmp_path / name))) == want, name


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
    dropped = [line for line in said.getvalue().split("\\n") if "raw rows dropped" in line]
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
    ran = subprocess.run([sys.executable, "-c", SEVERAL, HERE, path, tmp_path],
                         text=True, capture_output=True)
    found = [line for line in ran.stdout.splitlines() if line.startswith("rows:")]
    assert found == found[:1] * 4 != [], (found, ran.stderr)
    assert "KeyError" in found[0].split("of 2500 raw rows dropped 5: {")[1]


@pytest.mark.parametrize("left", [b"", bytes(20_000), b"cut", None])
def test_data_a_damaged_file_of_rows_is_made_anew(tmp_path, monkeypatch, capsys, left):
    """As a full disk leaves it, or whoever cleaned up."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_splits(tmp_path / "d", talk(40), talk(2))
    before = list(map(ids_of, rows_of(path)))
    for file in (tmp_path / "cache").rglob("generator-train.arrow"):
        content = file.read_bytes()
        file.unlink()   # what is mapped stays
        if left is not None:
            file.write_bytes(content[:-200] if left == b"cut" else left)
    capsys.readouterr()
    assert list(map(ids_of, rows_of(path))) == before
    assert capsys.readouterr().out.count("made anew") == 2


def test_data_rows_are_made_anew_where_what_shapes_them_has_changed(tmp_path, monkeypatch):
    code = Path(sd.__file__).read_text()
    raw = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    plain, other_end = tiny_tokenizer(), tiny_tokenizer()
    other_end.eos_token = "<|im_end|>"

    def fingerprint(tokenizer=plain, raw=raw, packing="rows", **fields):
        cfg = config.Config(packing=packing, **fields)
        return sd.fingerprint_rows(raw, sd.row_encoder(cfg, tokenizer))

    def edited(line):
        Path(sd.__file__).write_text(code.replace(f"\n{line}", f"\n# an edit\n{line}"))
        return fingerprint()

    same = {fingerprint()}
    other = {
        fingerprint(packing="documents"),
        fingerprint(other_end), fingerprint(tiny_tokenizer(CHATML)),
        fingerprint(raw=raw.rename_column("prompt", "question")), fingerprint(packing="auto"),
        fingerprint(packing="blocks"), fingerprint(seq_len=64), fingerprint(text_column="body")}
    monkeypatch.setattr(sd, "__file__", tmp_path / "edited.py")
    other.update(map(edited, (
        "ROWS_AT_ONCE =", "FEATURES =", "def encode_rows", "def bos_of", "def text_of")))
    same.update(map(edited, ("def tokenize", "class PackedRows")))
    assert len(same) == 1
    assert len(same | other) == 14


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
    """Held-out ones stand alone: what is measured on them does not depend on the packing."""
    rows = talk(150)
    path = write_splits(tmp_path / "d", rows, rows[:9])
    (apart, held_out), (packed, packed_held_out) = [
        rows_of(path, tiny_tokenizer(CHATML), 128, packing=packing)
        for packing in ("rows", "documents")]
    assert documents_of(packed) == documents_of(apart)
    assert len(apart) == 150
    assert len(packed) < len(apart) / 1.3
    assert max(len(row["input_ids"]) for row in packed) <= 128
    assert ids_of(packed_held_out) == ids_of(held_out)


def marked_row(ids, targets, *starts):
    """targets: a # for each that is one. starts: of all documents but the first."""
    return dict(input_ids=ids, targets=[mark == "#" for mark in targets], starts=[0, *starts])


def token_dataset(documents):
    """Of [(ids, targets)], as it lies on disk."""
    rows = [dict(**marked_row(*document), dropped="") for document in documents]
    return sd.kept_rows(datasets.Dataset.from_list(rows, features=sd.FEATURES))[0]


def test_data_packed_rows_are_a_view_of_any_number_of_documents():
    """They are put together ten thousand at a time."""
    documents = token_dataset(([i] * (1 + i % 4), "." + "#" * (i % 4)) for i in range(10_050))
    rows = list(sd.PackedRows(documents, 64))
    assert documents_of(rows) == documents_of(documents.with_format(None))
    assert max(len(row["input_ids"]) for row in rows) == 64
    assert len(rows) <= math.ceil(10_050 * 2.5 / 64) + 1


def test_data_as_few_rows_as_the_documents_need():
    pick = random.Random(0)
    for _ in range(50):
        lengths = np.array([pick.randint(2, 64) for _ in range(pick.randint(1, 200))])
        rows = sd.fit_into_rows(lengths, 64)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
        # what is proven of it: 11/9 of the best, and a little
        assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 64) + 1 + len(lengths) / 12
    assert sd.fit_into_rows(np.array([3, 5, 2, 6]), 8) == [[0, 1], [2, 3]]


def test_data_rows_are_counted_and_known_by_their_content():
    """By all of it, and by nothing else: a resume compares it."""
    documents = [([i % 50, 7, 8], ".##") for i in range(1500)]
    rows = token_dataset(documents)
    found = sd.count_rows(rows)
    digest = found["digest"]
    assert found == dict(rows=1500, tokens=4500, targets=3000, biggest=49, digest=digest)
    assert sd.count_rows(sd.PackedRows(rows, 30)) == {**found, "rows": 150}
    assert sd.count_rows(rows.to_iterable_dataset()) is None
    for edit in (
        [([48, 9, 8], ".##"), ([49, 7, 8], ".##")],   # another id
        [([48, 7, 8], ".##"), ([49, 7, 8], ".#.")],   # another target
        [([48, 7], ".#"), ([8, 49, 7, 8], "#.##")],   # cut elsewhere
    ):
        assert sd.count_rows(token_dataset(documents[:-2] + edit))["digest"] != digest, edit


# ---- splits


@pytest.mark.parametrize("length, wanted, expected", [
    (2, 256, [1]), (39, 256, [38]), (40, 256, [19, 39]), (100, 3, [32, 65, 98])])
def test_data_held_out_rows_are_evenly_spaced_and_never_trained_on(length, wanted, expected):
    raw = datasets.Dataset.from_dict({"n": range(length)})
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
    assert tuple(map(len, rows_of(tmp_path, seq_len=256, **fields))) == expected


@pytest.mark.parametrize("role", ["train_split", "eval_split"])
@pytest.mark.parametrize("name", ["d", "d/train.jsonl", "saved"])
def test_data_a_split_that_is_not_there_is_refused_by_its_name(tmp_path, role, name):
    write_splits(tmp_path / "d", talk(2), talk(2))
    raw = datasets.Dataset.from_list(talk(2))
    datasets.DatasetDict(train=raw).save_to_disk(tmp_path / "saved")
    with pytest.raises(config.UserError, match="[\"']test[\"']"):
        rows_of(tmp_path / name, **{role: "test"})


def test_data_of_one_long_document_blocks_are_held_out(tmp_path):
    path = tmp_path / "d.txt"
    path.write_text(prose(2000))
    train, held_out = rows_of(path)
    blocks = in_parts(tiny_tokenizer().encode(prose(2000) + "<|endoftext|>"), 64)
    gap = len(blocks) // (len(blocks) // 20)
    assert ids_of(held_out) == blocks[gap - 1::gap]
    assert ids_of(train) == [ids for i, ids in enumerate(blocks, 1) if i % gap]
    path.write_text("a" * 70)
    assert [len(rows) for rows in rows_of(path)] == [1, 1]
    path.write_text("a" * 60)
    with pytest.raises(config.UserError, match="nothing is left to evaluate on"):
        rows_of(path)


# ---- what can be wrong with a dataset


@pytest.mark.parametrize("row", [
    {"messages": [{"content": "x"}]}, {"text": 3}, {"text": None, "id": 3}, {"body": "no text"}])
def test_data_a_file_with_nothing_usable_is_refused_by_its_name(tmp_path, row):
    path = write_jsonl(tmp_path / "useless.jsonl", [row] * 9)
    with pytest.raises(config.UserError, match="none of the 8 rows of .*useless.jsonl|no data"):
        rows_of(path)
    if "body" in row:
        assert rows_of(path, text_column="body")[0]


@pytest.mark.parametrize("name, content", [
    ("broken.jsonl", '{"text": \n'), ("empty.jsonl", ""), ("half.parquet", "PAR1"),
    ("saved/state.json", "[]"), ("absent.jsonl", None), ("absent", None)])
def test_data_whatever_cannot_be_read_is_one_error(tmp_path, name, content):
    dataset = tmp_path / Path(name).parts[0]
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(config.UserError, match=f"reading dataset {dataset}: ") as caught:
        rows_of(dataset)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["data[1].jsonl", "data*.jsonl"])
def test_data_names_are_names_and_no_patterns(tmp_path, name):
    write_jsonl(tmp_path / "data1.jsonl", [{"text": "another file"}] * 3)
    train, _ = rows_of(write_jsonl(tmp_path / name, [{"text": "this file"}] * 3))
    assert "this file" in tiny_tokenizer().decode(train[0]["input_ids"])


# ---- batches


@pytest.mark.parametrize("kind", [list, np.array])
def test_data_collate_shifts_before_it_masks_and_positions_restart(kind):
    rows = [{name: kind(values) for name, values in row.items()} for row in (
        marked_row([5, 6, 7, 8, 9], ".#.##", 2), marked_row([1, 2, 3], "..#"))]
    batch = sd.collate(rows)
    assert batch.rows is rows
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    assert batch.positions.tolist() == [0, 2, 3, 6]
    assert batch.labels.tolist() == [6, 8, 9, 3]
    assert batch.real.tolist() == list(range(8))
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
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
        torch.manual_seed(7 * 1_000_003 + epoch)
        order = torch.randperm(count).tolist()
        found = [sd.batch_of_step(count, 7, size, epoch * steps + i) for i in range(steps)]
        assert found == in_parts(order, size)


def test_data_ranks_share_the_rows_of_a_step(monkeypatch):
    """After a resume, and where only five rows are left."""
    run = types.SimpleNamespace(
        cfg=config.Config(), rows=[marked_row([i, 50], ".#") for i in range(13)],
        global_batch=8, micro_steps=2, batch_size=2, progress=types.SimpleNamespace(step=1),
        server=None,   # optional: served
    )
    monkeypatch.setattr(sd, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(sd, "RANK", rank)
        for step, (micro, _) in zip((1, 2), sd.my_batches(run)):
            mine = sd.batch_of_step(13, 0, 8, step)[rank::2]
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
# Models and FSDP: families, heads, layers:N, precision, shards, probes, the writer.

MODELS = {   # the first word is that of the config's class
    "Llama": {},
    "Llama tied": dict(tie_word_embeddings=True),
    "Qwen2": {},
    "Qwen3Moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "DeepseekV3": dict(   # it has a buffer that is saved
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, first_k_dense_replace=0, q_lora_rank=None, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8),
    "GPT2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "GPTNeoX": {},
    "Gemma2": dict(head_dim=16, final_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "Gemma3Text": dict(head_dim=16, sliding_window=8, layer_types=[
        "sliding_attention", "sliding_attention", "full_attention"]),
    "Cohere": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=3.0),
    "Phi": dict(tie_word_embeddings=False),   # a head with a bias
}


def three_layers(path, name, **fields):
    return tiny_model(
        path, layers=3, cls=f"{name.split()[0]}Config", **MODELS[name], **fields)


@pytest.fixture
def usual(teacher, student, text):
    """Of a short run."""
    return dict(teacher=teacher, student=student, dataset=text, max_steps=3, eval_samples=8)


def two_runs(tmp_path, first, second, **both):
    outs = tmp_path / "first", tmp_path / "second"
    for out, knobs in zip(outs, (first, second)):
        distil(out, **both | knobs)
    return outs


def final_distance(outs):
    return distance(*map(final_weights, outs))


def fill_biases(tensors):
    torch.manual_seed(0)
    for name, x in tensors.items():
        if name.endswith("bias"):
            x.normal_()


def layers_0_and_2(tensors):
    """Those layers, under the numbers 0 and 1, and what is of no layer."""
    return {re.sub(r"\b(layers|h)\.2\.", r"\1.1.", name): x for name, x in tensors.items()
            if not re.search(r"\b(layers|h)\.1\.", name)}


@pytest.mark.parametrize("packing, recompute", [("rows", False), ("documents", True)])
@pytest.mark.parametrize("name", MODELS)
def test_models_a_step_is_that_of_transformers(tmp_path, out, chat, name, packing, recompute):
    """layers:2 of 3 keeps the first and the last with their weights. Loss, KL and gradients are
    those of the model's own logits, a conversation at a time, though conversations share rows and
    are longer than a sliding window."""
    path = three_layers(tmp_path / "teacher", name, seed=3, tokenizer=tiny_tokenizer(CHATML))
    edit_weights(path, fill_biases)
    distil(out, teacher=path, student="layers:2", dataset=chat, seq_len=256, batch_size=8,
           max_steps=1, save_steps=1, alpha=0.3, temperature=2.0, learning_rate=STILL,
           max_grad_norm=0, packing=packing, gradient_checkpointing=recompute)
    assert distance(final_weights(out), layers_0_and_2(weights(path))) < 1e-20
    student = load(f"{out}/final")
    for kind, rows in (("eval", talk(4, seed=50)), ("train", talk(8))):
        losses = model_losses(student, load(path), chatml_rows(rows), 0.3, 2.0)
        assert logged_losses(log(out, kind)[-1], kind) == pytest.approx(
            [loss.item() for loss in losses], rel=1e-5)
        assert losses[2] > 1e-3
    losses[0].backward()
    expected = {f"exp_avg.model.{key}": p.grad for key, p in student.named_parameters()}
    assert distance(gradients(out), expected) < 1e-5


# ---- vocabularies


@pytest.mark.parametrize("who", [
    "teacher", "student", "teacher student",
    "teacher student cached",   # optional: cache
])
def test_models_a_padded_vocabulary_trains_as_one_that_is_not(tmp_path, usual, who):
    odd = {role: padded(tmp_path / role, usual[role], 96 + 32 * i)   # of different lengths
           for i, role in enumerate(who.split()[:2])}
    if "cached" in who:   # optional: cache
        cache = tmp_path / "cache"
        cli(*flags(mode="cache", teacher=odd.pop("teacher"), dataset=usual["dataset"], seq_len=32,
                   dtype="fp32", eval_samples=8, temperature=2.0, cache_dir=cache))
        usual = dict(student=usual["student"], max_steps=3, cache_dir=cache)
    outs = two_runs(tmp_path, odd, {}, alpha=0.3, temperature=2.0, **usual)
    for got, expected in zip(*map(quiet_log, outs), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)
    got, expected = map(final_weights, outs)
    cut = {name: x[:len(expected[name])] for name, x in got.items()}
    assert distance(cut, expected) < 1e-6


def test_models_labels_alone_are_transformers_own_loss_over_the_whole_head(
        tmp_path, out, student):
    rows = [{"text": prose(40)}]
    odd = padded(tmp_path / "student", student, 128)
    distil(out, student=odd, dataset=write_splits(tmp_path / "data", rows, rows), alpha=1.0,
           max_steps=1, packing="rows", seq_len=256, learning_rate=STILL)
    ids = torch.tensor([tiny_tokenizer().encode(prose(40) + "<|endoftext|>")])
    assert column(out, "eval/ce_loss")[-1] == pytest.approx(
        load(odd)(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("missing", [0, 1])
def test_models_ids_beyond_a_head_matter_where_rows_hold_one(tmp_path, out, usual, role, missing):
    """The tokenizer has more ids than either head here."""
    biggest = max(tiny_tokenizer().encode(prose(99)))
    small = tiny_model(tmp_path / "small", vocab=biggest + 1 - missing)
    shown = distil(out, rc=2 * missing, **{**usual, role: small})
    assert (f"token {biggest}" in shown.err) == bool(missing)


# ---- loading


# lists of one item a layer
PER_LAYER = """
    activation_sparsity_pattern attention_layers indexer_types intermediate_size layer_rope_theta
    layer_types layers_block_type mlp_layer_types no_rope_layers num_attention_heads_per_layer
    num_key_value_heads_per_layer""".split()


class AnyConfig(transformers.PretrainedConfig):
    """Takes what it is given."""
    model_type = "any"
    attribute_map = {"num_hidden_layers": "depth"}   # as GPT-2 has n_layer


def test_models_layers_n_cuts_lists_of_one_item_a_layer():
    """And no others."""
    items = "full_attention sliding_attention chunked_attention linear_attention".split()
    shape = AnyConfig(depth=4, eos_token_id=items, **dict.fromkeys(PER_LAYER, items))
    for kept in ([0], [0, 3], [0, 2, 3], [0, 1, 2, 3]):
        cut, numbers = sd.cut_layers(shape, len(kept))
        assert numbers == kept and cut.depth == len(kept) and cut.eos_token_id == items
        lists = dict.fromkeys(PER_LAYER, [items[i] for i in kept])
        assert vars(cut).items() >= lists.items()
    short = dict.fromkeys(PER_LAYER, items[:2])
    other, _ = sd.cut_layers(AnyConfig(depth=4, **short), 2)
    assert vars(other).items() >= short.items()
    with pytest.raises(config.UserError, match="layers:5: .* has 4"):
        sd.cut_layers(shape, 5)


def test_models_layers_n_of_layers_that_differ_by_number_is_refused(tmp_path, out, usual):
    usual["teacher"] = three_layers(tmp_path / "teacher", "Qwen3Moe", mlp_only_layers=[1])
    err = distil(out, rc=2, **{**usual, "student": "layers:2"}).err
    assert "while reading student layers:2: " in err and "Qwen3Moe" in err


def test_models_student_from_a_config_file_starts_random_by_seed(tmp_path, out, usual):
    """And brings no tokenizer: it takes the teacher's."""
    usual["student"] = f"{tmp_path}/shape.json"
    tiny_config(hidden=16, layers=1).to_json_file(usual["student"])
    distil(out, **usual, seed=1, learning_rate=STILL)
    expected = weights(tiny_model(tmp_path / "expected", hidden=16, layers=1, seed=1))
    assert same(final_weights(out), expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("student", ["layers:1", None])
def test_models_final_ends_texts_where_generation_config_says(tmp_path, out, usual, student):
    """Of the teacher, where the student is made of it. The auto classes load it."""
    path = shutil.copytree(usual["teacher"], tmp_path / "model")
    transformers.GenerationConfig(eos_token_id=[0, 70]).save_pretrained(path)
    distil(out, **{**usual, "teacher": path, "student": student or path})
    assert load(f"{out}/final").generation_config.eos_token_id == [0, 70]


@pytest.fixture
def group():
    """In which models can be loaded."""
    with sd.process_group():
        yield


def loaded(path, role="student", **fields):
    fields = dict(gradient_checkpointing=False) | fields
    return sd.load_model(config.Config(student=str(path), teacher=str(path), **fields), role)[0]


def states(root):
    return root(sd.hidden_states, torch.arange(8)[None])


def test_models_weights_are_known_by_their_numbers(group, tmp_path, teacher):
    """In whatever folder, in whatever kind of file."""
    shutil.copy(f"{teacher}/config.json", tmp_path)
    tensors = weights(teacher)
    identities = []
    for path, change in ((teacher, 0), (tmp_path, 0), (tmp_path, 1e-3)):
        tensors["model.norm.weight"][-1] += change
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        cfg = config.Config(student="unused", teacher=str(path))
        identities.append(sd.load_model(cfg, "teacher")[1])
    assert identities[0] == identities[1] != identities[2]


def test_models_tied_embeddings_are_one_tensor(group, tmp_path):
    """Of a teacher. A student of two could not have the checkpoint that it has."""
    root = loaded(tiny_model(tmp_path / "model", cls="GPT2Config"), "teacher")
    assert root.model.lm_head.weight is root.model.transformer.wte.weight


# ---- precision


@pytest.mark.parametrize("dtype, types", [   # what is saved; what student and teacher compute in
    ("fp32", "float32 float32 float32"),
    ("bf16", "float32 bfloat16 bfloat16"),
    ("fp16", "bfloat16 float16 float32"),   # it might overflow
    ("fp16", "float16 float16 float16"),
])
def test_models_types_of_numbers(group, tmp_path, student, dtype, types):
    """A student's weights are kept in fp32."""
    saved_in, *computes_in = [getattr(torch, name) for name in types.split()]
    load(student).to(saved_in).save_pretrained(tmp_path)
    for learns, works_in in zip((True, False), computes_in):
        kept_in = torch.float32 if learns else works_in
        root = loaded(tmp_path, "student" if learns else "teacher", dtype=dtype)
        assert {(p.dtype, p.requires_grad) for p in root.parameters()} == {(kept_in, learns)}
        assert states(root).dtype == works_in
        assert root.training == root.model.training == learns


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_mixed_precision_stays_close_to_fp32(tmp_path, usual, dtype):
    full, mixed = two_runs(tmp_path, {}, dict(dtype=dtype), **usual)
    for key in ("train/loss", "train/grad_norm"):
        assert column(mixed, key) == pytest.approx(column(full, key), rel=2e-2)
    assert column(mixed, "train/skipped_steps") == [0, 0, 0]
    assert {x.dtype for name, x in checkpoint(mixed, 3).items() if "weight" in name} == {
        torch.float32}
    assert {x.dtype for x in final_weights(mixed).values()} == {
        sd.compute_dtype(config.Config(dtype=dtype))}
    assert final_distance([full, mixed]) < 2e-2


def test_models_logits_of_a_head_are_formed_in_fp32():
    hidden, head, *_ = case(dtype=torch.bfloat16, bias=True, scale=0.3, softcap=2.0)
    raw = F.linear(hidden, *head[:2])[:, :5].float()
    got = sd.head_logits(hidden, head, vocabulary=5)
    torch.testing.assert_close(got, 2 * torch.tanh(0.3 * raw / 2))


# ---- shards, and what runs inside of them


@pytest.fixture
def eight_ranks(monkeypatch):
    """Rank 0 of four nodes with two ranks each; the others send nothing."""
    monkeypatch.setattr(sd, "WORLD", 8)
    monkeypatch.setattr(sd, "LOCAL_WORLD", 2)
    monkeypatch.setattr(sd, "HOST", None)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def is_shard(p):
    return isinstance(p, sd.DTensor)


@pytest.mark.parametrize("fsdp, share, dropped", [
    ("full_shard", 8, True),
    ("shard_grad_op", 8, False),
    ("hybrid_shard", 2, True),
    ("no_shard", 1, False),
])
def test_models_shards(eight_ranks, student, fsdp, share, dropped):
    """How much a rank holds, and whether a layer is whole until the backward. The teacher, which
    has none, is always in as many parts as can be, or whole everywhere, unless it is offloaded."""
    for offload in (False, True):
        root = loaded(student, "teacher", shard_teacher=False, cpu_offload=offload)
        assert all(is_shard(p) == offload for p in root.parameters())
    for role in ("student", "teacher"):
        if role == "teacher":
            share, dropped = 8, True
        root = loaded(student, role, fsdp=fsdp)
        norm = root.model.model.layers[0].input_layernorm
        with torch.no_grad():
            assert norm.weight.to_local().numel() * share == norm.weight.numel()
            states(root)
        assert is_shard(norm.weight) == dropped
        assert not is_shard(root.model.lm_head.weight)   # the loss uses it now
        root.release()
        assert all(map(is_shard, root.parameters()))


def test_models_evaluating_leaves_all_as_it_was(group, tmp_path):
    """Neither gradients nor dropout inside; then shards again, and training again, after an error
    too."""
    path = tiny_model(tmp_path / "model", cls="GPT2Config")   # drops a tenth
    root = loaded(path, fsdp="shard_grad_op")
    with pytest.raises(ZeroDivisionError), sd.evaluating(root):
        first = states(root)
        assert torch.equal(states(root), first) and not first.requires_grad
        assert not any(map(is_shard, root.model.transformer.h.parameters()))
        raise ZeroDivisionError
    assert root.training and root.model.transformer.training
    assert all(map(is_shard, root.parameters()))
    assert not torch.equal(states(root), first)
    teacher = loaded(path, "teacher")
    with sd.evaluating(teacher):
        pass
    assert not teacher.training


@pytest.mark.parametrize("fields", [dict(cpu_offload=True), dict(attention="eager")], ids=str)
def test_models_how_it_computes_changes_nothing(tmp_path, usual, fields):
    assert final_distance(two_runs(tmp_path, {}, fields, **usual)) < 1e-6


def test_models_checkpointing_does_not_recompute_what_is_frozen(group, student):
    """transformers makes embeddings ask for a gradient; without it nothing below the first trained
    layer is kept or run again."""
    calls = []
    root = loaded(student, gradient_checkpointing=True)
    root.model.model.embed_tokens.requires_grad_(False)
    layers = root.model.model.layers
    layers[0].requires_grad_(False)
    for i, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    states(root).sum().backward()
    assert calls == [0, 1, 1]


@pytest.mark.parametrize("starts", [[], [4]])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPT2"])
def test_models_a_micro_step_does_not_wait_for_the_gpu(group, tmp_path, name, starts):
    """For a number of a tensor. transformers looks into position_ids for packed documents, in
    Python, once a model."""
    path = three_layers(   # GPT-2 looks for padding, to warn of it
        tmp_path / "model", name, pad_token_id=None)
    student = loaded(path, gradient_checkpointing=True)
    get_teacher_targets = sd.teacher_targets(loaded(path, "teacher"))
    masking = transformers.masking_utils
    own = masking.find_packed_sequence_indices
    batch = sd.collate([marked_row(range(n), "." + "#" * (n - 1), *starts) for n in (9, 6)])
    with torch.profiler.profile() as profile:
        loss, *_ = student(functools.partial(sd.distil_loss, alpha=0.5, temperature=1.0), batch,
                           get_teacher_targets(batch), 13)
        loss.backward()
    calls = [event.name for event in profile.events()]
    assert "aten::mm" in calls and "aten::_local_scalar_dense" not in calls
    assert masking.find_packed_sequence_indices is own
    looking = types.SimpleNamespace(
        base_model=lambda **_: [masking.find_packed_sequence_indices(None)])
    documents = sd.hidden_states(looking, batch.input_ids, batch.position_ids)
    assert (documents is None) == (starts == [])   # then attention needs no mask


@pytest.mark.campaign
def test_models_compile_changes_nothing_but_rounding(tmp_path, text):
    """Sliding and full attention, student and teacher, training and not, are more than 8 kinds of
    layer; below some of them nothing is trained. None falls back to eager code."""
    path = three_layers(tmp_path / "model", "Gemma3Text")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        outs = two_runs(
            tmp_path, dict(compile=True, gradient_checkpointing=True), {}, teacher=path,
            student=path, dataset=text, max_steps=2, lr_multipliers=["embed=0", r"layers\.0\.=0"])
    assert final_distance(outs) < 1e-4


# ---- probes


def test_models_a_probe_refuses_what_is_off_or_not_finite(group, student):
    root = loaded(student)

    def probe(error, dtype, **allowed):
        expected = torch.tensor([[-8.0, 8.0], [-1.0, 1.0]], dtype=dtype)
        got = expected.clone()
        got[1] *= 1 + error
        sd.probe(root, "it bends", lambda model, *tensors: tensors, got, expected, **allowed)

    for dtype, allowed, options in ((torch.float32, 1e-3, {}), (torch.bfloat16, 0.1, {}),
                                    (torch.bfloat16, 0.05, {"allowed": 0.05})):
        probe(0.9 * allowed, dtype, **options)
        for error in (1.1 * allowed, math.nan):
            with pytest.raises(config.UserError, match="^it bends "):
                probe(error, dtype, **options)
    assert root.training


ODD_MODEL = """
import transformers

class Odd(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.02
        return out
"""


def odd_model(path):
    """It scales its logits in a way that nobody knows."""
    tiny_model(path)
    (path / "modeling_odd.py").write_text(ODD_MODEL)
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_odd.Odd"})(path)


def one_row(module, query, key, value, attention_mask, **kwargs):
    """Attention that keeps documents apart only where a batch is one row, as flash attention."""
    mask = attention_mask if len(query) == 1 else None
    return transformers.AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)


transformers.AttentionInterface.register("one_row", one_row)
transformers.AttentionMaskInterface.register(
    "one_row", transformers.AttentionMaskInterface()["sdpa"])

SEES = "later tokens"
MIXES = "see each other"
# model, words of the error or None, knobs; the class of the model is always among the words
WRONG = {
    "beyond its positions": (dict(max_position_embeddings=16), None),
    "two ways": (dict(cls="Gemma3TextConfig", head_dim=16, use_bidirectional_attention=True), SEES),
    "BERT": (dict(cls="BertConfig"), SEES),
    "encoder": (dict(cls="T5Config", d_kv=16), "T5Config"),
    "short table": (dict(cls="GPT2Config", max_position_embeddings=31), "32 positions"),
    "just enough": (dict(cls="GPT2Config", max_position_embeddings=32), None),
    "another head": (odd_model, "Odd head_of()", dict(trust_remote_code=True)),
    "attention of one row": ({}, MIXES, dict(attention="one_row")),
    "state": (dict(cls="MambaConfig", state_size=4), MIXES),
    "distances": (dict(cls="BloomConfig"), MIXES),
    "positions of its own": (dict(cls="OPTConfig", ffn_dim=32), MIXES),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", WRONG)
def test_models_that_compute_something_else_are_refused(group, tmp_path, case, role):
    """Those that mix documents are taken where none share a row."""
    shape, told, *knobs = WRONG[case]
    path = tmp_path / "shape.json"
    if callable(shape):
        path = tmp_path / "model"
        shape(path)
    else:
        tiny_config(**shape).to_json_file(path)
    cfg = config.Config(student=str(path), teacher=str(path), seq_len=32, packing="documents",
                        **dict(*knobs))
    if told:
        with pytest.raises(config.UserError) as caught:
            sd.load_checked(cfg, role, tiny_tokenizer())
        for word in (role, str(path), *told.split()):
            assert word in str(caught.value)
        cfg.packing = "rows"
    if told in (None, MIXES):
        root, _ = sd.load_checked(cfg, role, tiny_tokenizer())
        assert cfg.attention in (None, root.model.config._attn_implementation)


# ---- the writer   # optional: on_policy generate eval


def test_models_a_text_fills_its_room_or_ends(   # optional: on_policy generate eval
        group, student):
    """At temperature 0 as model.generate writes it, with nothing beside it; afterwards FSDP is at
    work again."""
    root = loaded(student)
    prompts = [[40, 50, 60], [70], [90, 91], [40, 50]]
    rooms = [2, 9, 5, 1]
    model = load(student)

    def write(prompt, room, end):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=room, do_sample=False, eos_token_id=end)
        return ids[0, len(prompt):].tolist()

    end = write(prompts[1], 5, end=999)[4]   # at first an id that nobody writes
    expected = [write(prompt, room, end) for prompt, room in zip(prompts, rooms)]
    assert sd.write_texts(root, prompts, range(4), rooms, 0, {end}, 263) == expected
    assert sd.write_texts(root, [], [], [], 0, {end}, 263) == []
    states(root).sum().backward()
    assert all(is_shard(x) for p in root.model.model.parameters() for x in (p, p.grad))


# --------------------------------------------------------------------------------------------------
# Optimiser: rates, groups, schedules.


def factor_of(name):
    """What the patterns of the next test say, by hand."""
    if "embed" in name:
        return 0
    if re.search(r"layers\.0\..*proj", name):
        return 0.5
    return 3 if "layers" in name else 2


def test_optimiser_lr_multipliers_freeze_and_scale(out, online):
    """The first pattern that matches decides; what is frozen has no state."""
    distil(out, **online, max_steps=1, default_lr_multiplier=2,
           lr_multipliers=["embed=0", r"layers\.0\..*proj=0.5", r"layers=3"])
    after = final_weights(out)
    saved = checkpoint(out, 1)
    # AdamW's first step is the rate, in the direction of the sign
    for name, before in weights(online["student"]).items():
        change = (after[name] - before).abs().max().item()
        assert change == pytest.approx(factor_of(name) * 1e-3, rel=0.02), name
        assert (f"exp_avg.model.{name}" in saved) == ("embed" not in name)


def test_optimiser_of_tied_parameters_the_first_name_counts():
    model = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=True))
    named = list(model.named_parameters())
    rules = config.parse_multipliers(["embed=0", "lm_head=1"])
    with pytest.raises(config.UserError, match="lm_head.* matches no parameter"):
        sd.learning_rates(named, rules, 1, 0.1)
    rates = sd.learning_rates(named, rules[:1], 1, 0.1)
    sd.make_optimizer(model.parameters(), rates, 0.0)
    assert [name for name, p in named if not p.requires_grad] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_optimiser_what_has_one_dimension_does_not_decay(out, teacher, text, divergence):
    """The student is the teacher, there is no gradient: all that moves is decay."""
    distil(out, student=teacher, teacher=teacher, dataset=text, alpha=0.0, temperature=2.0,
           max_steps=1, divergence=divergence, weight_decay=0.5, learning_rate=0.1)
    assert abs(column(out, "train/kl_loss")[0]) < 1e-6
    after = final_weights(out)
    for name, want in weights(teacher).items():
        if want.ndim >= 2:
            want = want * (1 - 0.1 * 0.5)
        assert torch.allclose(after[name], want, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("knobs", [
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt",
    'polynomial {"power": 2}', 'cosine_with_restarts {"num_cycles": 2}',
    'warmup_stable_decay {"num_decay_steps": 3}', 'cosine_with_min_lr {"min_lr": 1e-5}'])
def test_optimiser_a_schedule_is_that_of_transformers(knobs):
    name, _, options = knobs.partition(" ")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2e-4)
    theirs = transformers.get_scheduler(name, optimizer, 4, 11, json.loads(options or "{}"))
    cfg = config.Config(lr_scheduler=name, lr_scheduler_kwargs=options or None,
                        learning_rate=2e-4, warmup_ratio=0.4)
    multiplier_at = sd.make_schedule(cfg, 11)
    for step in range(11):
        assert 2e-4 * multiplier_at(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_optimiser_a_wrong_schedule_is_named_before_a_model_is_read(out, labels_only):
    fields = labels_only | dict(student="/nowhere", lr_scheduler="cosine_with_min_lr")
    assert "min_lr" in distil(out, rc=2, **fields).err


@pytest.mark.parametrize("good, gradient, limit, scale", [
    (0, 3.0, 1, 2.0 ** 14), (1998, 3.0, 9, 2.0 ** 15), (1999, 3.0, 0, 2.0 ** 14),
    (7, math.inf, 1, 2.0 ** 13)])
def test_optimiser_a_step_unscales_clips_and_skips(good, gradient, limit, scale):
    """In fp16: the scale doubles after 2000 good steps or so, and is halved by a bad one."""
    weight = nn.Parameter(torch.ones(3, 1))
    optimizer = sd.make_optimizer([weight], {weight: 0.5}, 0.0)
    state = sd.new_scale_state(True)
    state["good"].fill_(good)
    weight.grad = state["scale"] * torch.tensor([[gradient], [4.0], [0.0]])
    assert sd.optimizer_step(optimizer, limit, state, True) == math.hypot(gradient, 4)
    assert state["scale"] == scale
    bad = math.isinf(gradient)
    assert state["streak"] == state["skipped"] == (weight[0] == 1) == bad
    clipped = (1 - bad) * torch.tensor([0.6, 0.8, 0.0]) * (1 if limit == 1 else 5)
    assert torch.allclose(optimizer.state[weight]["exp_avg"][:, 0], 0.1 * clipped)


# --------------------------------------------------------------------------------------------------
# Checkpoints: save, find, resume, damage, full disks.


def saved(out, step):
    return Path(out, f"checkpoints/step-{step:08d}")


def state_of(out, step):
    return json.loads((saved(out, step) / "state.json").read_text())


@pytest.fixture
def labels_only(student, text):
    """Flags of a run without a teacher."""
    return dict(student=student, dataset=text, alpha=1.0)


@pytest.fixture
def online(teacher, student, text):
    """Flags of a run with one."""
    return dict(teacher=teacher, student=student, dataset=text)


def listing(folder):
    """The names in it, as one string."""
    return " ".join(sorted(os.listdir(folder)))


def digests_below(folder):
    """{path: digest of its content} of all files; what each run writes anew left out."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name not in ("error.log", sd.MARK):
            found[str(path.relative_to(folder))] = sd.checksum(path)
    return found


def test_checkpoints_resume_goes_on_as_if_it_had_not_stopped(tmp_path, online):
    """Bit for bit: weights, moments, log, and where the run is."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    fields = online | dict(batch_size=4, eval_steps=1, gradient_accumulation_steps=2, alpha=0.3,
                           learning_rate=0.05, eval_samples=4)
    distil(whole, **fields, max_steps=12)   # a pass is 9 or so
    distil(parts, **fields, max_steps=5)
    assert "step-00000005" in distil(parts, **fields, max_steps=12).out
    assert_same_run(parts, whole)
    assert same(checkpoint(parts, 12), checkpoint(whole, 12))
    progress, of_parts = [state_of(out, 12)["progress"] for out in (whole, parts)]
    seconds = column(parts, "train/seconds")
    assert seconds == sorted(seconds) and seconds[-1] == of_parts.pop("seconds")   # of both parts
    assert 0 < progress.pop("seconds") and of_parts == progress
    assert progress["step"] == 12 and progress["best_loss"] == min(column(whole, "eval/loss"))


@pytest.mark.parametrize("typed, of_save, planned", [   # 8 sequences a step, of one rank
    ("8 x 2 x 3", None, (8, 2, 48)),
    ("8 x 1 x 3", [8, 1], (3, 1, 8)),    # the last rank gets two
    ("2 x 4 x 3", [2, 4], (2, 2, 8)),
    ("4 x 1 x 2", [8, 1], (4, 1, 8)),    # the same product in other words
    ("4 x 1 x 3", [8, 1], None),
    ("4 x 1 x 1", [8, 1], None),
])
def test_checkpoints_keep_their_global_batch_at_any_number_of_ranks(typed, of_save, planned):
    size, steps, ranks = map(int, typed.split(" x "))
    cfg = config.Config(batch_size=size, gradient_accumulation_steps=steps)
    state = of_save and {"global_batch": 8, "batch": of_save}
    refused = pytest.raises(config.UserError, match=f"not of {typed} ranks")
    with contextlib.nullcontext() if planned else refused:
        assert sd.plan_batch(cfg, state, ranks) == planned


def test_checkpoints_are_a_few_safetensors_and_the_newest_stay(out, labels_only):
    """With nothing of what a killed save left."""
    fields = labels_only | dict(save_steps=1, keep_checkpoints=2)
    distil(out, **fields, max_steps=4)
    files = listing(saved(out, 4))
    left = shutil.copytree(saved(out, 4), f"{out}/checkpoints/tmp-00000005")
    add(Path(left, "state.json"))
    distil(out, **fields, max_steps=5)
    assert listing(f"{out}/checkpoints") == "step-00000004 step-00000005"
    assert listing(saved(out, 5)) == files
    tensors = {}
    for path in saved(out, 5).glob("*.safetensors"):   # each is put together in host memory
        some = load_file(path)
        assert 0 < len(some) <= 16
        tensors |= some
    assert files.count(" ") == math.ceil(len(tensors) / 16) > 1   # between them and state.json
    for name, tensor in final_weights(out).items():
        assert torch.equal(tensors[f"model.model.{name}"], tensor)
        assert tensors[f"step.model.{name}"] == 5


# what may become of a file: a bit turned, the end cut off, the file lost, one of another save added


def flip(path, at=0.5):
    """One bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[int(at * len(content))] ^= 1
    Path(path).write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def add(path):
    shutil.copy(path, path.with_name(f"stale-{path.name}"))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def add_pickle(path):
    payload = Payload(path.parents[2] / "victim")
    path.with_name(".metadata").write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("harm", [
    flip, functools.partial(flip, at=0.01), cut, os.unlink, add, add_pickle])
def test_checkpoints_any_harm_to_any_file_makes_it_fall_back(two_saves, tmp_path, harm):
    with sd.process_group():
        for file in os.listdir(saved(two_saves, 4)):
            out = shutil.copytree(two_saves, tmp_path / file)
            assert sd.find_checkpoint("auto", out)[0] == saved(out, 4)
            harm(saved(out, 4) / file)
            path, state = sd.find_checkpoint("auto", out)
            assert path == saved(out, 2) and state["progress"]["step"] == 2, file
            assert not (out / "victim").exists()


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory, student, text):
    out = tmp_path_factory.mktemp("two") / "saves"
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=4, save_steps=2)
    return out


def test_checkpoints_what_is_damaged_is_set_aside_and_counts_as_none(tmp_path, out, labels_only):
    """With one to keep, the step after a resume must not push out the good one."""
    fields = labels_only | dict(save_steps=2)
    distil(out, **fields, max_steps=6)
    flip(next(saved(out, 6).glob("*.safetensors")))
    shown = distil(out, **fields, max_steps=7, keep_checkpoints=1).out
    assert re.search("step-00000006.*passed over", shown)
    assert re.fullmatch(r"aside-\d+-step-00000006 step-00000007", listing(f"{out}/checkpoints"))
    distil(tmp_path / "whole", **fields, max_steps=7)
    assert_same_run(out, tmp_path / "whole")
    cut(saved(out, 7) / "state.json")
    assert "no readable checkpoint" in distil(out, **fields, max_steps=8, rc=2).err


def test_checkpoints_resume_by_path_and_never(tmp_path, two_saves, labels_only):
    fields = labels_only | dict(save_steps=2)
    out = tmp_path / "out"
    elsewhere = tmp_path / "elsewhere"
    before = digests_below(two_saves)
    distil(out, **fields, max_steps=6)
    distil(elsewhere, **fields, max_steps=4, resume=saved(out, 2))
    assert column(elsewhere, "train/step") == [3, 4]
    distil(out, **fields, max_steps=4, resume=saved(out, 2))
    assert re.fullmatch(r"aside-\d+-step-0{7}6 aside-\d+-step-0{7}4 step-0{7}2 step-0{7}4",
                        listing(out / "checkpoints"))
    refused = distil(two_saves, rc=2, **fields, max_steps=6, resume=saved(out, 2))
    assert "another run" in refused.err
    assert digests_below(two_saves) == before
    for resume in ("auto", "never"):
        distil(out, **fields, max_steps=4, resume=resume)
        assert_same_run(out, two_saves)
    assert same(final_weights(elsewhere), final_weights(out))
    assert listing(out / "checkpoints") == "step-00000002 step-00000004"


def test_checkpoints_what_decides_the_result_may_not_change(tmp_path, teacher, student):
    """Knobs, the teacher's weights, rows: refused by name, and nothing is touched."""
    rows = [{"text": prose(12, i)} for i in range(30)]
    out = tmp_path / "out"
    fields = dict(teacher=shutil.copytree(teacher, tmp_path / "teacher"), student=student,
                  dataset=write_splits(tmp_path / "data", rows, rows[:4]), max_steps=3)
    distil(out, **fields | dict(max_steps=2))
    before = digests_below(out)

    def refused(**changes):
        err = distil(out, rc=2, **fields | changes).err
        assert digests_below(out) == before
        return err

    err = refused(learning_rate=5e-4, temperature=2.0)
    assert "learning_rate 0.001 there, 0.0005 here" in err and "temperature" in err
    assert "alpha" not in err
    assert "step 2, this run would end at 1" in refused(max_steps=1)
    for file, told in [("teacher/model.safetensors", "teacher's weights"),
                       ("data/train.jsonl", "train"), ("data/validation.jsonl", "held out")]:
        content = (tmp_path / file).read_bytes()
        flip(tmp_path / file, 1 - 4 / len(content))   # a number's last bit, a word's last letter
        assert f"of a run with {told} " in refused()
        (tmp_path / file).write_bytes(content)
    distil(out, **fields, log_steps=2)   # which has no say in it


def test_checkpoints_of_before_a_knob_had_it_at_its_default(two_saves, tmp_path):
    out = shutil.copytree(two_saves, tmp_path / "out")
    state = state_of(out, 4)
    del state["digest"], state["config"]["attention"]
    sd.write_json(state | {"digest": sd.digest(state)}, saved(out, 4) / "state.json")
    assert sd.read_state(saved(out, 4))["config"]["attention"] is None


def test_checkpoints_a_full_disk_loses_nothing_old(tmp_path, online):
    """A file-size limit makes every larger write fail as a full disk does: the run goes on, says
    so, and ends with an error."""
    run = tmp_path / "run"
    fields = online | PLAIN | dict(save_steps=2, output_dir=run)
    cli(*flags(**fields, max_steps=2))
    old = [saved(run, 2), run / "final"]
    before = [*map(digests_below, old)]
    shown = Fork(tmp_path / "log.txt", *flags(**fields, max_steps=6), limit=20_000).wait()
    assert shown.count("could not be saved") == 3, shown
    assert "error: the run could not be saved" in shown, shown
    assert "Traceback" not in shown, shown
    assert [*map(digests_below, old)] == before
    cli(*flags(**fields, max_steps=6))
    assert listing(run / "checkpoints") == "step-00000002 step-00000004 step-00000006"


def test_checkpoints_a_finished_run_answers_at_once(tmp_path, labels_only):
    """But with its own final/, which a longer run does not take for its own; what stood there
    before stays as final.old."""
    model = shutil.copytree(labels_only["student"], tmp_path / "model")
    out = tmp_path / "out"
    fields = labels_only | dict(student=model)
    distil(out, **fields, max_steps=2)
    model.rename(tmp_path / "away")   # nothing is loaded
    before = digests_below(out)
    assert "finished" in distil(out, **fields, max_steps=2).out
    assert digests_below(out) == before
    (tmp_path / "away").rename(model)
    (out / "final" / "thesis.txt").write_text("years")
    distil(out, **fields, max_steps=4)
    assert (out / "final.old" / "thesis.txt").read_text() == "years"
    done = final_weights(out)
    shutil.rmtree(out / "final")
    (out / "final.old").rename(out / "final")   # as if killed after the last checkpoint
    distil(out, **fields, max_steps=4)
    assert same(final_weights(out), done)


def test_checkpoints_a_final_that_cannot_be_written_leaves_the_one_before(tmp_path, labels_only):
    """Which may be the student; the next run writes it."""
    out = tmp_path / "out"
    distil(out, **labels_only, max_steps=1)
    before = digests_below(out / "final")
    (out / "final.tmp").write_text("in the way")
    fields = labels_only | dict(student=out / "final", max_steps=2)
    assert "could not be saved" in distil(out, rc=2, **fields, resume="never").err
    assert digests_below(out / "final") == before
    (out / "final.tmp").unlink()
    distil(out, **fields)
    assert digests_below(out / "final.old") == before
    assert not same(final_weights(out), weights(out / "final.old"))
    assert column(out, "train/step") == [1, 2]


@pytest.mark.parametrize("step, kept", [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_checkpoints_a_log_is_cut_where_they_go_on(tmp_path, step, kept):
    """Half a line, which a kill left, goes too."""
    path = tmp_path / "log.jsonl"
    lines = ['{"train/step": 1, "x": 9}\n', '{"eval/step": 2}\n', '{"train/step": 3}\n']
    path.write_text("".join(lines) + '{"train/step": 4, "tr')
    sd.cut_log(path, step)
    assert path.read_text() == "".join(lines[:kept])


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


TRAIN_KEYS = set(
    "train/loss train/ce_loss train/kl_loss train/learning_rate train/grad_norm train/epoch "
    "train/step train/tokens_per_second train/seconds train/skipped_steps".split())
EVAL_KEYS = set(
    "eval/loss eval/ce_loss eval/kl_loss eval/perplexity eval/min_loss eval/epoch "
    "eval/step".split())


@pytest.mark.parametrize("divergence, batch_size", [("forward", 8), ("reverse", 4), ("jsd", 1)])
def test_train_five_steps_match_plain_pytorch(
        tmp_path, teacher, student, out, divergence, batch_size):
    """In float64, however a batch is divided: losses, norms, weights; and at the end the means over
    held-out tokens."""
    pair = with_chatml(tmp_path, teacher, student)
    rows = talk(8)
    held_out = talk(7, seed=50)   # the last micro-batch is ragged
    distil(out, teacher=pair[0], student=pair[1], seq_len=256, num_epochs=5,
           dataset=write_splits(tmp_path / "data", rows, held_out), batch_size=batch_size,
           gradient_accumulation_steps=8 // batch_size, alpha=0.3, temperature=2.0,
           divergence=divergence, max_grad_norm=0.5)

    teacher_model = load(teacher).double()
    model = load(student).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    coded = chatml_rows(rows)
    for step, entry in enumerate(log(out, "train"), 1):
        losses = model_losses(model, teacher_model, coded, 0.3, 2.0, divergence)
        losses[0].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5   # clipping is at work
        optimizer.step()
        optimizer.zero_grad()
        assert logged_losses(entry) == pytest.approx([loss.item() for loss in losses], rel=1e-5)
        assert entry["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert entry["train/step"] == entry["train/epoch"] == step
        assert entry["train/skipped_steps"] == 0
    assert step == 5
    before = weights(student)
    assert distance(*[{name: x - before[name] for name, x in tensors.items()}
                      for tensors in (final_weights(out), model.state_dict())]) < 1e-3
    targets = sum((labels != -100).sum().item() for _, labels in coded)
    assert state_of(out, 5)["progress"]["tokens"] == 5 * targets
    losses = model_losses(model, teacher_model, chatml_rows(held_out), 0.3, 2.0, divergence)
    last = log(out, "eval")[-1]
    assert logged_losses(last, "eval") == pytest.approx([x.item() for x in losses], rel=1e-5)
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/ce_loss"]))


def test_train_labels_alone_never_touch_a_teacher(out, labels_only):
    distil(out, teacher="/nowhere", **labels_only, max_steps=2)
    assert column(out, "train/kl_loss") == [0, 0]
    assert column(out, "train/loss") == column(out, "train/ce_loss")
    assert listing(out) == ".simple_distill checkpoints config.json final log.jsonl"


# ---- lengths, schedules, seeds


def test_train_epochs_steps_and_schedule_agree(tmp_path, student):
    """10 rows, 4 a step: 3 steps a pass, the last one ragged; two passes are six steps, however
    they are asked for."""
    data = write_splits(tmp_path / "data", talk(10), talk(2))
    fields = dict(student=student, dataset=data, seq_len=256, alpha=1.0, lr_scheduler="cosine",
                  warmup_ratio=0.34, num_epochs=2, batch_size=4)
    final = []
    for variant in (
            {}, dict(num_epochs=1, max_steps=6),
            # has a micro-batch without any row in each ragged step
            dict(batch_size=2, gradient_accumulation_steps=2), dict(seed=1)):
        out = tmp_path / str(len(final))
        distil(out, **fields | variant)
        assert column(out, "train/learning_rate") == pytest.approx(
            [0, 5e-4, 1e-3, 0.85355339e-3, 5e-4, 0.14644661e-3])
        assert column(out, "train/epoch") == pytest.approx([k / 3 for k in range(1, 7)])
        final.append(final_weights(out))
    by_epochs, by_steps, accumulated, seeded = final
    assert same(by_epochs, by_steps)
    assert distance(accumulated, by_epochs) < 1e-5
    assert distance(seeded, by_epochs) > 1e-4
    for num_epochs, last in (0.1, 1), (1.5, 5):
        distil(out, **fields | dict(num_epochs=num_epochs, resume="never"))
        assert column(out, "train/step")[-1] == last


def test_train_logs_evaluates_and_saves_when_it_should(out, online):
    """And under exactly the keys of the contract."""
    distil(out, **online, max_steps=7, log_steps=3, eval_steps=2, save_steps=4, alpha=0.3,
           learning_rate=1)
    for entry in log(out):
        assert entry.keys() in (TRAIN_KEYS, EVAL_KEYS)
    assert column(out, "train/step") == [3, 6, 7]
    assert column(out, "eval/step") == [2, 4, 6, 7]
    assert listing(f"{out}/checkpoints") == "step-00000004 step-00000007"
    assert min(column(out, "train/tokens_per_second")) > 0
    losses = column(out, "eval/loss")
    assert column(out, "eval/min_loss") == list(itertools.accumulate(losses, min))
    assert losses != sorted(losses, reverse=True)   # or min_loss would be just the last


# ---- what is not finite, and what is not there


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_train_a_row_that_breaks_the_loss_skips_its_step_only(tmp_path, out, online, role):
    """12 of 24, never ten in a row. A loss that is not finite is null: JSON knows no NaN."""
    rows = [{"prompt": "Za"[i % 2], "response": prose(3, i)} for i in range(24)]
    data = write_splits(tmp_path / "data", rows, rows[1:2])
    fields = online | dict(dataset=data, seq_len=64, batch_size=1, num_epochs=1, weight_decay=0.1)
    fields[role] = break_letter(fields[role], tmp_path / "broken")
    distil(out, **fields)
    assert not re.search("NaN|Infinity", Path(out, "log.jsonl").read_text())
    bad = [loss is None for loss in column(out, "train/loss")]
    assert sum(bad) == 12
    assert [norm is None for norm in column(out, "train/grad_norm")] == bad
    assert column(out, "train/skipped_steps") == list(itertools.accumulate(bad))
    after = final_weights(out)
    assert not same(weights(fields["student"]), after)
    for name, x in after.items():
        assert "embed" in name or x.isfinite().all(), name


def test_train_ten_bad_steps_in_a_row_end_the_run_with_a_checkpoint(tmp_path, out, student):
    """Of the weights as they were, with advice that works."""
    broken = break_letter(student, tmp_path / "broken")
    data = write_jsonl(tmp_path / "data.jsonl", 40 * [{"prompt": "Z", "response": "one"}])
    fields = dict(dataset=data, alpha=1.0, seq_len=64, batch_size=1, weight_decay=0.1)
    err = distil(out, rc=2, **fields, student=broken, max_steps=40).err
    assert "not finite for 10 steps in a row" in err
    assert column(out, "train/skipped_steps") == list(range(1, 10))
    assert listing(f"{out}/checkpoints") == "step-00000010"
    assert not os.path.exists(f"{out}/final")
    tensors = checkpoint(out, 10)
    for name, tensor in weights(broken).items():
        assert torch.equal(tensors[f"model.model.{name}"], tensor)
        assert not tensors[f"exp_avg.model.{name}"].any()
    rate, = re.findall(r"--resume never and --learning_rate (\S+),", err)
    assert float(rate) == 1e-3 / 4
    distil(out, **fields, student=student, max_steps=1, resume="never", learning_rate=rate)


def test_train_a_batch_without_any_target_changes_nothing_and_is_reported(
        out, monkeypatch, labels_only):
    """The trainer makes no such batch by itself: one is made here by taking the targets of the
    second step away."""
    micro_batches = sd.micro_batches
    steps = itertools.count(1)

    def second_is_blank(*args):
        micro = micro_batches(*args)
        if next(steps) == 2:
            micro[0].positions = micro[0].positions[:0]
            micro[0].labels = micro[0].labels[:0]
        return micro

    monkeypatch.setattr(sd, "micro_batches", second_is_blank)
    shown = distil(out, **labels_only, max_steps=2, save_steps=1, weight_decay=0.1).out
    assert same(checkpoint(out, 1), checkpoint(out, 2))
    assert "step 2: not one valid target" in shown
    assert logged_losses(log(out, "train")[1]) == [0, 0, 0]


def test_train_a_log_that_cannot_be_written_costs_no_step(out, labels_only, monkeypatch):
    """The disk is full at steps 3 and 4."""
    append = sd.append_jsonl

    def fill_disk(path, row):
        if row.get("train/step") in (3, 4):
            path = "/dev/full"
        append(path, row)

    monkeypatch.setattr(sd, "append_jsonl", fill_disk)
    distil(out, **labels_only, max_steps=6)
    assert column(out, "train/step") == [1, 2, 5, 6]
    assert os.path.isdir(f"{out}/final")


# ---- what a run says and leaves


def test_train_closing_table_and_card_say_what_was_measured(out, tmp_path, teacher, student):
    """The first evaluation is short: of a few held-out rows, evenly spaced, also after a resume.
    The card says what the run was, and no path of ours."""
    import huggingface_hub
    rows = talk(11)
    pair = with_chatml(tmp_path, teacher, student)
    fields = dict(teacher=pair[0], student=pair[1], seq_len=256, batch_size=1, learning_rate=STILL,
                  dataset=write_splits(tmp_path / "data", talk(3), rows), alpha=0.25,
                  temperature=2.0, divergence="reverse")
    expected = []
    for name, model, judge, chosen in [
            ("teacher", teacher, None, range(11)),
            ("student before (4 sequences)", student, load(teacher), (0, 2, 5, 8)),
            ("student after (11)", student, load(teacher), range(11))]:
        coded = chatml_rows([rows[i] for i in chosen])
        _, ce, kl = model_losses(load(model), judge, coded, 0.25, 2.0, "reverse")
        expected.append((name, f"{math.exp(ce.item()):.2f}", f"{kl.item():.4f}"))
    for max_steps in (1, 2):
        shown = distil(out, max_steps=max_steps, **fields).out
        found = re.findall(r"^\| +(\S.*\S) \| +(\S+) \| +(\S+) \|$", shown, re.MULTILINE)
        assert found[1:] == expected
    card = huggingface_hub.ModelCard.load(f"{out}/final/README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert not card.data.base_model and not card.data.license
    parameters = load(f"{out}/final").num_parameters()
    progress = state_of(out, 2)["progress"]
    for fact in (shown[shown.index("|   "):shown.index("\n\nsample: ")],
                 "trained: {tokens} targets in {seconds:.0f} s on 1 x CPU".format(**progress),
                 f"/student, {parameters:,} parameters", "/teacher", "/data, split train",
                 "0.25 x cross-entropy + 0.75 x T^2 x KL (reverse), T 2", "2 steps of 1 sequences"):
        assert fact in card.text, card.text
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("student, teacher, alpha, bases", [
    ("a/b", "c/d", 0.5, ["a/b", "c/d"]),
    ("a/b", "c/d", 1.0, ["a/b"]),
    ("layers:2", "c/d", 0.5, ["c/d"]),
    (HERE, "c/d", 0.5, ["c/d"]),
])
def test_train_model_card_names_what_is_on_the_hub(monkeypatch, student, teacher, alpha, bases):
    monkeypatch.setattr(sd, "facts_of", str)
    cfg = config.Config(student=str(student), teacher=teacher, alpha=alpha)
    card = sd.model_card(types.SimpleNamespace(cfg=cfg, progress=sd.Progress()), "")
    assert f"\nbase_model: {json.dumps(bases)}\n" in card


# ---- Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the service, not for our code."""
    package = mock.Mock()
    package.init.return_value.configure_mock(**{"id": "abc", "finish.return_value": None})
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


@pytest.mark.parametrize("problem, reason", [
    ({"api.api_key": None}, "not logged in"),
    ({"init.side_effect": TimeoutError("no answer")}, "no answer"),
    (None, "wandb"),   # importing it fails
])
def test_train_without_wandb_goes_on_and_says_so(
        out, labels_only, wandb, monkeypatch, problem, reason):
    wandb.configure_mock(**problem or {})
    if not problem:
        monkeypatch.setitem(sys.modules, "wandb", None)
    shown = distil(out, **labels_only, max_steps=1, use_wandb=True).out
    line, = re.findall("^wandb.*", shown, re.MULTILINE)
    assert reason in line
    assert wandb.init.called == ("answer" in reason)   # without a key it would ask at a prompt


def test_train_wandb_gets_the_same_keys_and_the_whole_config(out, labels_only, wandb):
    """A run that goes on is the same there."""
    run = wandb.init.return_value
    for max_steps in (2, 3):
        distil(out, **labels_only, max_steps=max_steps, use_wandb=True)
    assert run.log.mock_calls == [
        mock.call(entry, step=entry.get("train/step", entry.get("eval/step")))
        for entry in log(out)]
    assert [call.kwargs["id"] for call in wandb.init.call_args_list] == [None, "abc"]
    assert wandb.init.call_args.kwargs["config"].keys() == config.FIELDS.keys()
    distil(out, rc=2, **labels_only, max_steps=30, use_wandb=True, resume="never",
           learning_rate=1e38, max_grad_norm=0)
    assert run.finish.mock_calls == [mock.call(exit_code=code) for code in (0, 0, 1)]
    distil(out, **labels_only, max_steps=1, resume="never")
    assert wandb.init.call_count == 3


@pytest.mark.campaign
def test_train_wandb_offline(out, labels_only, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    distil(out, **labels_only, max_steps=1, use_wandb=True)
    assert list(Path(out, "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("blockwise", [
    False,
    True,   # optional: blockwise
])
def test_train_dry_run_says_what_a_run_would_and_leaves_nothing(
        out, tmp_path, teacher, student, monkeypatch, blockwise):
    """On the longest rows. The targets of a conversation are the assistant's words and its end."""
    tokenized = with_chatml(tmp_path, student)[0]
    rows = talk(8)
    seen = []
    time_step = sd.time_step

    def noting(run, stage, micro):
        seen.append([len(row["input_ids"]) for batch in micro for row in batch.rows])
        return time_step(run, stage, micro)

    monkeypatch.setattr(sd, "time_step", noting)
    shown = distil(
        out, teacher=teacher, student=tokenized, tokenizer=tokenized, seq_len=128, batch_size=2,
        dataset=write_splits(tmp_path / "data", rows, talk(4)), num_epochs=2, dry_run=True,
        blockwise=blockwise or None).out
    lengths = sorted(len(ids) for ids, _ in chatml_rows(rows))
    assert seen[-1] == lengths[:-3:-1]
    assert re.search(r"takes \S+ s .* steps at most \S+ hours", shown), shown
    target, = re.findall(r"its targets in \[\[ \]\]: [^[\n]*\[\[(.*?)\]\][^[\n]*\n", shown)
    assert target in [row["response"] + "<|im_end|>" for row in rows]
    assert "perplexity" not in shown
    assert not os.path.exists(out)


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

    def is_capturing(self):
        return False

    def __getattr__(self, name):
        return lambda *_, **__: self


def fake_flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """What scaled_dot_product_attention runs on a real GPU, and only without a mask."""
    assert attn_mask is None and is_causal
    options.pop("enable_gqa", None)
    return torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, dropout_p, True, False, **options)[0]


def pretend_cuda(monkeypatch):
    """One of the 8 GPUs of a node, as torch.cuda and simple_distill see it, and stand-ins for what
    fake tensors, which hold no numbers, cannot do."""
    mesh = sd.init_device_mesh
    nonzero = torch.Tensor.nonzero

    def real_mesh(*args, **options):
        with unset_fake_temporarily():
            return mesh(*args, **options)

    def all_of_them(tensor):   # labels, all of which are counted
        if not isinstance(tensor, FakeTensor):
            return nonzero(tensor)
        return torch.arange(len(tensor), device=tensor.device)[:, None]

    current = DoneAtOnce()
    answers = {
        "cuda.is_available": True, "cuda.device_count": 8, "cuda.current_device": 0,
        "cuda.is_bf16_supported": True, "cuda.get_device_capability": (9, 0),
        "cuda.stream": contextlib.nullcontext(), "cuda._lazy_init": None,
        "cuda.is_current_stream_capturing": False, "cuda.current_stream": current,
        "cuda.Stream": current, "cuda.Event": current, "accelerator.current_stream": current,
        "Tensor.record_stream": None}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.{name}", lambda *_, answer=answer, **__: answer)
    stand_ins = {
        "torch.Tensor.pin_memory": lambda tensor, *_: tensor,
        "torch.Tensor.nonzero": all_of_them,
        "torch.nn.functional.scaled_dot_product_attention": fake_flash,
        "transformers.masking_utils.is_tracing": lambda *_: False,
        "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init": True,
        "simple_distill.init_device_mesh": real_mesh,
        "simple_distill.all_sum": lambda *values: list(values),
        "simple_distill.from_rank0": lambda value: None,
        "simple_distill.identity_of": lambda model: None,
        "simple_distill.CUDA": True,
        "simple_distill.DEVICE": DoneAtOnce.device}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(name, stand_in)


class Calls(TorchDispatchMode):
    """Counts collectives, and where the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter(wait=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.count["wait"] += 1   # .item(), or an `if` on a tensor
            return 1
        result = function(*args, **kwargs)
        if function is aten._to_copy.default and args[0].device != result.device:
            self.count["wait"] += not kwargs.get("non_blocking", False)
        if function.namespace == "c10d":
            self.count[function.overloadpacket.__name__] += 1
        return result


SIMULATION = """
import ctypes, sys
ctypes.CDLL(sys.argv[1] + "/gpu.so")   # before torch looks what there is
import test_simple_distill
test_simple_distill.simulate(sys.argv[1])
"""


def simulate(folder):
    """In a process of its own: two steps, prints the calls of the second."""
    pretend_cuda(pytest.MonkeyPatch())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=sd.WORLD)
    cfg = config.Config(student=f"{folder}/student.json", teacher=f"{folder}/teacher.json",
                        max_steps=2)
    calls = Calls()
    with FakeTensorMode(allow_non_fake_inputs=True), calls:
        student, teacher = [sd.load_model(cfg, role)[0] for role in ("student", "teacher")]
        run = types.SimpleNamespace(
            cfg=cfg, student=student, progress=sd.Progress(),
            loss_fn=functools.partial(sd.distil_loss, alpha=0.5, temperature=1.0),
            get_teacher_targets=sd.teacher_targets(teacher), scale_state=sd.new_scale_state(False))
        stage = sd.distillation_stage(run)
        sd.start_stage(run, stage)
        row = {"input_ids": list(range(9)), "targets": [False] + 8 * [True], "starts": [0]}
        for _ in range(2):
            calls.count = collections.Counter(wait=0)
            _, norm = sd.one_step(run, stage, 2 * [sd.collate([row])], 1000)
        assert norm.device.type == "cuda" and norm.dtype == torch.float32
    print(json.dumps(calls.count))


@pytest.mark.campaign
def test_train_a_step_on_eight_gpus_that_exist_in_name_only(tmp_path):
    """Under full_shard with fake tensors: whatever is on the wrong device or of the wrong type
    raises. FSDP gathers and reduces as often as it should, nothing waits for the GPU."""
    (tmp_path / "gpu.cpp").write_text(GPU_IN_NAME)
    torch_folder = os.path.dirname(torch.__file__)
    subprocess.run(
        ["c++", "-std=c++20", "-shared", "-fPIC", "gpu.cpp", "-o", "gpu.so",
         f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib",
         "-lc10", "-ltorch_cpu"], cwd=tmp_path, check=True)
    for name, depth in ("student", 3), ("teacher", 5):
        shape = tiny_config(cls="Qwen3Config", layers=depth, head_dim=16)
        shape.to_json_file(tmp_path / f"{name}.json")
    done = subprocess.run(
        [sys.executable, "-c", SIMULATION, tmp_path], cwd=HERE, capture_output=True, text=True,
        env={**os.environ, "WORLD_SIZE": "8"})
    assert done.returncode == 0, done.stdout + done.stderr
    # a micro-step gathers the student's root, its layers forward and backward, and the teacher's;
    # reduces the student's root and layers
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "wait": 0, "_allgather_base_": 2 * (1 + 2 * 3 + 5), "_reduce_scatter_base_": 2 * (1 + 3)}


# --------------------------------------------------------------------------------------------------
# Optional: streaming: the same rows from a stream.


def batches_of(path, position=None, global_batch=4, stream=None, **fields):
    """What a run gets of a stream: endless (rows of a global batch, position after it)."""
    cfg = config.Config(dataset=path, streaming=True, max_steps=99, eval_samples=1,
                        **{"seq_len": 64, **fields})
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


def split_of_stream(path, **fields):
    """-> the rows of train, of a stream; the raw rows that are held out."""
    stream, held_out = sd.split_stream(config.Config(dataset=path, streaming=True, **fields))
    assert not isinstance(stream, datasets.Dataset)
    return list(stream), held_out


@pytest.mark.parametrize("words", [50, 500])
def test_streaming_reads_the_head_of_its_eval_split(tmp_path, words):
    """Nothing is prepared whole, and no more is read than eval_samples sequences need: so many
    rows, with 8 characters a token."""
    rows = [{"text": prose(words, i)} for i in range(100)]
    enough = next(n for n in range(5, 100) if len("".join(map(str, rows[:n]))) > 8 * 5 * 32)
    found = split_of_stream(
        write_splits(f"{tmp_path}/data", rows[:50], rows), eval_samples=5, seq_len=32)
    assert found == (rows[:50], rows[:enough])


@pytest.mark.parametrize("count, max_samples, held_out", [
    (60, None, 10), (8, None, 1), (40, 39, 10), (60, 11, 10), (60, 10, 1)])
def test_streaming_holds_the_first_rows_out(tmp_path, count, max_samples, held_out):
    """As many as eval_samples, of a short stream a twentieth."""
    rows = [{"text": prose(5, i)} for i in range(count)]
    found = split_of_stream(write_jsonl(f"{tmp_path}/d.jsonl", rows), eval_samples=10,
                            max_samples=max_samples)
    assert found == (rows[held_out:max_samples], rows[:held_out])


def test_streaming_trains_on_the_same_rows(out, trio, chat):
    """Three passes over eight rows, eight a step: in whatever order they come, each step is all of
    them."""
    fields = trio | dict(dataset=chat, seq_len=256, batch_size=8, max_steps=3, alpha=0.3)
    table = f"{out}-table"
    distil(table, **fields)
    distil(out, **fields, streaming=True, shuffle_buffer=3)
    for key in ("train/loss", "eval/loss"):
        assert column(out, key) == pytest.approx(column(table, key), rel=1e-6)
    assert distance(final_weights(out), final_weights(table)) < 1e-5


def test_streaming_of_text_unshuffled_is_the_same_blocks(tmp_path):
    rows = [{"text": prose(5 + i % 7, i)} for i in range(30)]
    path = write_splits(f"{tmp_path}/d", rows, rows[:1])
    assert ids_of(epoch_of(path, shuffle_buffer=0)) == ids_of(rows_of(path)[0])


def test_streaming_shuffles_within_windows_each_in_an_order_of_its_own(tmp_path):
    rows = talk(28)
    path = write_splits(f"{tmp_path}/d", rows, rows[:1])
    plain = ids_of(epoch_of(path, shuffle_buffer=0))
    batches = batches_of(path, global_batch=7, shuffle_buffer=7)
    orders = set()
    for start in [0, 7, 14, 21] * 2:   # two epochs
        found = [plain.index(ids) - start for ids in ids_of(next(batches)[0])]
        assert sorted(found) == list(range(7))
        orders.add(tuple(found))
    assert len(orders) == 8


def test_streaming_a_resume_finds_the_same_rows(tmp_path):
    """Within a window, at its end, in the second epoch."""
    path = write_jsonl(f"{tmp_path}/d.jsonl", talk(30))
    whole = list(itertools.islice(batches_of(path, shuffle_buffer=7), 20))
    for first in (3, 7, 11):
        again = batches_of(path, whole[first - 1][1], shuffle_buffer=7)
        for (rows, position), found in zip(whole[first:first + 5], again):
            assert ids_of(found[0]) == ids_of(rows)
            assert found[1] == position


def test_streaming_a_reader_that_fails_is_an_error(tmp_path):
    def rows_that_break():
        yield from talk(50)
        raise ValueError("JSON parse error in row 50")

    stream = datasets.IterableDataset.from_generator(rows_that_break)
    batches = batches_of("d", stream=stream, shuffle_buffer=20)
    assert len(list(itertools.islice(batches, 10))) == 10
    with pytest.raises(config.UserError, match="while reading window 2 .* error in row 50"):
        next(batches)


def test_streaming_bad_rows_are_dropped_until_an_epoch_has_no_other(tmp_path, capsys):
    good = talk(9)
    bad = [{"id": 1}] * 20
    path = write_jsonl(f"{tmp_path}/d.jsonl", [*good, *bad])
    _, second, third = itertools.islice(batches_of(path, shuffle_buffer=10), 3)
    assert third[1]["epoch"] == 1
    assert re.search("first 10 rows dropped: {.*text.*: 2}", capsys.readouterr().out)
    again = batches_of(path, second[1], shuffle_buffer=10)   # nothing good is left of that epoch
    assert ids_of(next(again)[0]) == ids_of(third[0])
    write_jsonl(path, [good[0], *bad])   # which is held out
    with pytest.raises(config.UserError, match="no row of the stream .* holds a target"):
        next(batches_of(path, shuffle_buffer=10))


def test_streaming_refuses_an_id_that_the_head_has_not(tmp_path, out):
    """Where a row holds one: the last byte of an eszett is number 260."""
    rows = [{"text": prose(9, i)} for i in range(20)]
    shown = distil(
        out, rc=2, student=tiny_model(f"{tmp_path}/student", vocab=250), alpha=1, streaming=True,
        dataset=write_splits(f"{tmp_path}/d", [*rows, {"text": "ß"}], rows[:2]), max_steps=2)
    assert "token 260" in shown.err


def test_streaming_documents_are_packed_within_a_window(tmp_path):
    rows = talk(60)
    path = write_splits(f"{tmp_path}/d", rows, rows[:4])
    apart, _ = rows_of(path, seq_len=128)
    packed = epoch_of(path, seq_len=128, packing="documents", shuffle_buffer=20)
    assert documents_of(packed) == documents_of(apart)
    assert len(packed) < len(apart) / 1.3


# --------------------------------------------------------------------------------------------------
# Optional: demo: from nothing to a better student.


# a command line -> max_steps, seq_len
@pytest.mark.parametrize("case", [
    " -> 500 128",
    "--max_steps 7 --num_epochs 2 -> 7 128",
    "--num_epochs 2 -> None 128",
    "--blockwise --num_epochs 0 -> None 128",   # optional: blockwise
    "--lr_scheduler constant -> 500 128",
    "--teacher t --student s --dataset d -> None 512",
    "--mode eval -> None 128",   # optional: eval
    "--mode eval --student s -> None 128",   # optional: eval
    "--mode eval --teacher t --dataset d -> None 512",   # optional: eval
    "--mode cache --cache_dir c -> None 128",   # optional: cache
])
def test_demo_decides_only_what_is_left_open(tmp_path, case):
    """Its defaults fill in for the demo alone, never beside a flag that rules them out; and what
    config.json says of such a run is that run."""
    words, decided = case.split(" -> ")
    cfg = config.parse_config(words.split())
    assert f"{cfg.max_steps} {cfg.seq_len}" == decided
    path = f"{tmp_path}/config.json"
    sd.write_json(config.knobs_of(cfg), path)
    assert config.knobs_of(config.parse_config(["--config", path])) == config.knobs_of(cfg)


# a command line -> what of the demo it takes
@pytest.mark.parametrize("case", [
    " -> teacher student dataset, answered",
    "--alpha 0.1 --max_steps 2 -> teacher student dataset, answered",
    "--tokenizer mine -> teacher student dataset, answered",
    "--dry_run -> teacher student dataset",
    "--alpha 1 -> student dataset",
    "--dataset d -> teacher student",
    "--student s --dataset d -> teacher",
    "--student s --dataset d --alpha 1 -> ",
    "--student layers:1 --alpha 1 -> teacher dataset",
    "--mode eval -> teacher dataset",   # optional: eval
    "--cache_dir c -> student",   # optional: cache
    "--mode cache --cache_dir c -> teacher student dataset",   # optional: cache
    "--blockwise -> teacher student dataset",   # optional: blockwise
    "--on_policy 0.5 -> teacher student dataset",   # optional: on_policy
])
def test_demo_stands_in_for_what_is_needed(tmp_path, monkeypatch, capsys, case):
    """Here all is there already. The whole demo is answered."""
    monkeypatch.setattr(sd.huggingface_hub.constants, "HF_HOME", str(tmp_path))
    words, made = case.split(" -> ")
    cfg = config.parse_config(words.split())
    folder = sd.demo_folder(cfg)
    paths = {"teacher": f"{folder}/teacher/final", "dataset": f"{folder}/corpus",
             "student": f"{folder}/student/config.json"}
    for path in paths.values():
        os.makedirs(path)
    Path(folder, ".simple_distill").write_text("demo 1")
    runs = []
    answers = []   # optional: eval
    monkeypatch.setattr(sd, "answer_demo", answers.append)   # optional: eval
    with sd.process_group():
        sd.run_demo(lambda cfg: runs.append(cfg) or not cfg.dry_run, cfg)
    resolved, = runs
    assert answers == runs * ("answered" in made)   # optional: eval
    expected = {role: paths[role] for role in paths if role in made}
    assert dict(re.findall(r"--(\w+) (\S+)", capsys.readouterr().out)) == expected
    if "student" in made:
        expected["tokenizer"] = cfg.tokenizer or f"{folder}/tokenizer"
    assert config.knobs_of(resolved) == config.knobs_of(cfg) | expected
    assert resolved.given == cfg.given


def test_demo_is_made_of_the_modules_of_a_library(tmp_path, monkeypatch):
    """In an order that no package leads, each in one split; also where a kill left half of it."""
    library = tmp_path / "lib"
    library.mkdir()
    splits = {"train": [], "validation": []}
    for name in sorted([f"m{i}.py" for i in range(60)], key=sd.digest):
        row = {"text": f"x = {name!r}\n"}
        (library / name).write_text(row["text"])
        held_out = int(sd.digest(name), 16) % 20 == 0
        splits["validation" if held_out else "train"].append(row)
    (library / "empty.py").write_text("\n")
    monkeypatch.setattr(sd.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    folder = f"{tmp_path}/demo"
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
        out, trio, capsys):
    """The control is the run with --alpha 1, as is one as long, and what is done is not trained
    again."""
    fields = {**PLAIN, **trio, "max_steps": 4, "save_steps": 4}
    alone = f"{out}-alone"
    distil(out, **fields)
    distil(alone, **fields, alpha=1)
    control = f"{out}/labels-only"
    lines = set()
    for resume in ("auto", f"{out}/checkpoints/step-00000004"):   # that of the other student
        cfg = config.Config(**fields, output_dir=out, use_wandb=False, resume=resume)
        with sd.process_group():
            assert sd.answer_demo(cfg)
        shown = capsys.readouterr().out
        assert ("done in" in shown) == (resume == "auto")
        lines.add("\n".join(shown.strip().splitlines()[-2:]))
        assert same(final_weights(control), final_weights(alone))
        assert quiet_log(control) == quiet_log(alone)
    text, = lines
    models = sd.read_json(f"{out}/report.json")["models"]
    assert list(models) == ["teacher", "student", "labels-only", "labels-longer"]
    ours, *controls = [log(out + folder) for folder in ("", "/labels-only", "/labels-longer")]
    seconds, same_steps, same_time = [run[-2]["train/seconds"] for run in (ours, *controls)]
    steps = controls[1][-2]["train/step"]
    assert steps == math.ceil(4 * seconds / same_steps)
    for line, control, shown in zip(text.splitlines(), controls, (same_steps, same_time)):
        ours_, theirs = [run[-1]["eval/perplexity"] for run in (ours, control)]
        assert f"perplexity {ours_:.2f}, on labels alone {theirs:.2f} after" in line
        assert f"({seconds:.0f} and {shown:.0f} s)" in line


@pytest.mark.parametrize("verdict, says", [
    ("better", "The teacher paid:"),
    ("worse", "The teacher did not pay:"),
    ("no significant difference", "Whether the teacher paid, this run cannot tell:"),
])
def test_demo_says_truthfully_whether_the_teacher_paid(verdict, says):   # optional: eval
    against = dict(verdict=verdict, difference=-0.2, interval=[-0.31, 0.04])
    control = dict(perplexity=50, seconds=1.2, student_against_it=against)
    shown = sd.did_teacher_pay({"student": dict(perplexity=40, seconds=2), "labels-only": control,
                                "labels-longer": control})
    for line, measure in zip(shown.splitlines(), ("steps", "time"), strict=True):
        assert line == (f"{says} held-out perplexity 40.00, on labels alone 50.00 after the same "
                        f"{measure} (2 and 1 s); -0.2000 bits a byte (95 %: -0.3100 to +0.0400)")


def run_the_demo(out, home, *words):
    """What a newcomer types, in a fresh process with a home of its own -> what it shows."""
    env = {"HF_HOME": home, "OMP_NUM_THREADS": str(os.cpu_count())}
    process = spawn("--output_dir", out, *words, env=env)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    return shown


@pytest.mark.campaign
def test_demo_from_nothing_to_a_better_student(out, tmp_path):
    """Labels alone need no teacher; distilling beats them at the same steps. output_dir holds only
    what the run made, and a second demo finds files and teacher of the first."""
    home = f"{tmp_path}/home"
    run_the_demo(f"{out}-labels", home, "--alpha", 1)
    made = {path.name for path in tmp_path.glob("home/simple_distill/demo-*/[a-z]*")}
    assert made == {"corpus", "tokenizer", "student", "teacher-shape"}
    shown = run_the_demo(out, home)
    assert "first the teacher" in shown
    steps, seconds = shown.splitlines()[-2:]   # optional: eval
    assert steps.startswith("The teacher paid: ") and "the same steps" in steps   # optional: eval
    assert seconds.startswith("The teacher did not pay: ")   # optional: eval
    knobs = read_config(out)
    assert all(knobs[name].startswith(home) for name in ("teacher", "student", "dataset"))
    assert not os.path.exists(f"{out}/demo")
    again = run_the_demo(out, home)
    assert "first the teacher" not in again
    assert "done in" not in again   # optional: eval
    assert again.splitlines()[-1] == shown.splitlines()[-1]   # optional: eval
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
    student = load(name)
    with torch.no_grad():
        probs = load(knobs["teacher"])(ids).logits[:, :-1].flatten(0, 1).softmax(-1)
    torch.manual_seed(0)
    found = []
    for target in (
        probs,
        torch.distributions.Multinomial(50, probs).sample() / 50,
        F.normalize(torch.where(probs < probs.topk(12).values[:, -1:], 0, probs), p=1),
    ):
        loss = F.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), target)
        gradients_ = torch.autograd.grad(loss, student.parameters())
        found.append(nn.utils.parameters_to_vector(gradients_))
    whole, *others = found
    return [math.degrees(math.acos(F.cosine_similarity(whole, other, dim=0))) for other in others]


# --------------------------------------------------------------------------------------------------
# Optional: cache: what it holds, who may fill it, what damages it, what it costs.


def cache_rows(n):
    return [{"text": prose(8 + i % 9, i)} for i in range(n)]


@pytest.fixture(scope="session")
def cache_words(teacher, text):
    """The command that fills a cache, as words: of some 70 sequences, a dozen chunks."""
    return functools.partial(
        flags, mode="cache", teacher=teacher, dataset=text, seq_len=32, cache_chunk=6)


@pytest.fixture(scope="session")
def fill(cache_words):
    def fill(cache_dir, rc=0, **fields):
        return cli(*cache_words(cache_dir=cache_dir, **fields), rc=rc)

    return fill


@pytest.fixture
def train(student, out):
    """Nine steps, which read all of the text; with a teacher and a dataset: without a cache."""
    return functools.partial(distil, out, student=student, alpha=0.3, max_steps=9, batch_size=8)


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory, fill):
    """Not to be changed: see copy_of."""
    cache = tmp_path_factory.mktemp("cache") / "full"
    fill(cache)
    return cache


@pytest.fixture
def copy_of(full_cache, tmp_path):
    return Path(shutil.copytree(full_cache, tmp_path / "a copy"))


def chunk_files(cache_dir):
    """The bytes of every chunk by its name."""
    return {path.name: path.read_bytes() for path in sorted(cache_dir.glob("*.safetensors"))}


def facts_of_cache(cache_dir):
    """-> manifest and index"""
    return [sd.read_json(f"{cache_dir}/{name}.json") for name in ("manifest", "index")]


def rows_of_cache(cache_dir, split="train"):
    rows = sd.CacheRows(cache_dir, split, *facts_of_cache(cache_dir))
    return [rows[i] for i in range(len(rows))]


# ---- what is kept of a token


def made_up_teacher(vocab, tokens, sharp=3.0):
    """-> hidden states, head, and the distribution that they make [N, V], in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 24, generator=generator)
    weight = torch.randn(vocab, 24, generator=generator) * sharp / 24 ** 0.5
    return hidden, sd.Head(weight), (hidden.double() @ weight.double().T).softmax(-1)


class Keeping:
    """What is kept of a row of plain text, through its bytes and back."""

    def __init__(self, hidden, head, method, size):
        vocab = len(head.weight)
        self.manifest = dict(vocabulary=vocab, method=method, size=size, seed=0, temperature=1.0,
                             codes=256 if method == "topk" else size)
        ids = np.random.default_rng(0).integers(0, vocab, len(hidden) + 1)
        self.row = {"input_ids": ids, "targets": np.arange(len(ids)) > 0, "starts": np.array([0])}
        self.kept = sd.keep(hidden, head, 7, self.manifest)
        self.data = self.write()
        there = self.read()
        self.sparse = sd.SparseTarget(*map(torch.from_numpy, there.pop("sparse")))
        np.testing.assert_equal(there, self.row)

    def write(self):
        return sd.compress(sd.pack_row(self.row, self.kept))

    def read(self):
        return sd.unpack_row(sd.decompress(self.data), self.manifest)


def gap(a, b):
    return (a - b).abs().max()


@pytest.mark.parametrize("vocab", [2, 300, 32000, 151936])
def test_cache_topk_is_what_the_teacher_says(vocab):
    for size in {min(64, vocab), min(300, vocab)}:
        hidden, head, probs = made_up_teacher(vocab, 40)
        kept = Keeping(hidden, head, "topk", size)
        ids, listed, rest, entropy = kept.sparse
        top = probs.topk(size).values
        assert gap(probs.gather(-1, ids), top) < 1e-6
        # the common rescaling at most doubles the rounding
        bound = 2 * (0.0193 * (-top.log()).sqrt() + 1e-4)
        assert ((listed.double().log() - top.log()).abs() < bound)[top > 1e-9].all()
        assert gap(listed.sum(-1) + rest, 1) < 1e-5
        assert gap(rest, 1 - top.sum(-1)) < 0.02
        assert len(kept.data) / 41 <= 4 * (size + 2)
        everything = torch.cat([listed, rest[:, None]], -1)
        assert gap(entropy, -torch.special.xlogy(everything, everything).sum(-1)) < 1e-5


@pytest.mark.parametrize("vocab,size", [
    (2, 1), (300, 50), (32000, 50), (151936, 50), (151936, 255)])
def test_cache_samples_are_counted_and_small(vocab, size):
    hidden, head, probs = made_up_teacher(vocab, 200, sharp=5.0)
    kept = Keeping(hidden, head, "sample", size)
    entries = len(kept.kept.entries)
    # an id stands as often as it was drawn
    ids, shares, rest, entropy = kept.sparse
    assert ids.shape == shares.shape == (200, size)
    assert gap(shares, 1 / size) < 1e-7 and not rest.any()
    assert sum(len(set(line)) for line in ids.tolist()) == entries
    entropy_of_draws = -probs.gather(-1, ids).log().mean(-1)
    assert gap(entropy, entropy_of_draws) < 0.0021   # half of 1/256 nat
    # ... which is the teacher's entropy on average
    assert gap(entropy_of_draws.mean(), -(probs * probs.log()).sum(-1).mean()) < 4 / size ** 0.5
    bits = entries * (vocab * size).bit_length() + 200 * (14 + vocab.bit_length())
    if vocab >= 32000:   # as if nothing took a whole byte
        assert len(kept.data) < 1.022 * bits / 8


@torch.no_grad()
def test_cache_draws_from_the_plain_models_distribution(fill, teacher, tmp_path):
    """... by the seed and the number of the row: the same whoever fills the cache."""
    fill(tmp_path, temperature=2, seed=5)
    model = load(teacher)
    for split, first, i in (("eval", 0, 2), ("train", 2**60, 0), ("train", 2**60, 39)):
        row = rows_of_cache(tmp_path, split)[i]
        logits = model(torch.from_numpy(row["input_ids"])[None]).logits[0, :-1].double()
        cdf = (logits / 2).softmax(-1).cumsum(-1)
        generator = torch.Generator().manual_seed(int(sd.digest(5, first + i), 16) >> 1)
        numbers = torch.rand(len(cdf), 50, dtype=torch.float64, generator=generator)
        draws = torch.searchsorted(cdf, numbers).sort(-1).values.numpy()
        assert (draws == row["sparse"].ids).mean() > 0.99


def test_cache_same_model_logs_no_kl():
    hidden, head, _ = made_up_teacher(300, 200)

    def kl(hidden, student_head, *how):
        labels = torch.zeros(len(hidden), dtype=torch.long)
        sparse = Keeping(hidden, head, *how).sparse
        return sd.distillation_loss(hidden, student_head, labels, sparse,
                                    alpha=0.0, temperature=1.0)[2]

    for how in (("sample", 50), ("topk", 12), ("topk", 300)):
        assert abs(kl(hidden, head, *how)) < 1e-3, how
    # nor is the KL of what is listed and the rest ever negative, whatever the student says
    _, noise, _ = made_up_teacher(300, 201)
    other_head = sd.Head(head.weight + 0.5 * noise.weight)
    for size, one in itertools.product((1, 12, 64), hidden[::4].split(1)):
        assert kl(one, other_head, "topk", size) > -1e-5


# ---- training from it


@pytest.mark.parametrize("packing", ["rows", "documents"])
def test_cache_topk_of_everything_trains_like_online(
        fill, train, teacher, student, tmp_path, packing):
    """Also where documents share rows: it knows where each begins."""
    data = write_splits(tmp_path / "data", talk(60), talk(8))
    how = dict(dataset=data, seq_len=128, packing=packing)
    cache, cached, online = tmp_path / "cache", tmp_path / "cached", tmp_path / "online"
    fill(cache, cache_method="topk", cache_top_k=9999, **how)
    for split, rows in zip(("train", "eval"), rows_of(**how)):
        for kept, row in zip(rows_of_cache(cache, split), rows, strict=True):
            for name in ("input_ids", "targets", "starts"):
                assert kept[name].tolist() == row[name].tolist(), name
    train(cache_dir=cache, output_dir=cached, seq_len=None)
    train(teacher=teacher, output_dir=online, **how)
    for key, most in {"train/kl_loss": 1e-3, "eval/kl_loss": 1e-3, "train/ce_loss": 5e-3,
                      "eval/ce_loss": 5e-3}.items():
        assert column(cached, key) == pytest.approx(column(online, key), rel=0, abs=most)
    moved = distance(weights(student), final_weights(online))
    assert distance(final_weights(cached), final_weights(online)) < 0.05 * moved


def test_cache_is_the_dataset(fill, train, teacher, chat, tmp_path):
    """What is not typed is the cache's own, also the teacher of layers:N. Teacher and data are
    gone, the cache moves: a run goes on all the same."""
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    data = shutil.copytree(chat, tmp_path / "chat")
    cache, out, again = tmp_path / "cache", tmp_path / "out", tmp_path / "again"
    shown = fill(cache, teacher=teacher, dataset=data, cache_chunk=4, temperature=2).out
    ids = [row["input_ids"] for split in ("train", "eval") for row in rows_of_cache(cache, split)]
    tokens = sum(map(len, ids))
    sizes = list(map(len, chunk_files(cache).values()))   # the second is the first of train
    first = sizes[1] / sum(map(len, ids[:4]))
    assert f"cache: {first:.1f} bytes a token; about {sizes[1] * 3e-9:.3f} GB in all, " in shown
    assert facts_of_cache(cache)[1] == dict(
        rows=12, tokens=tokens, bytes_per_token=sum(sizes) / tokens,
        chunks={"train": [4, 4], "eval": [4]}, biggest_id=max(map(max, ids)))
    train(student="layers:1", cache_dir=cache, output_dir=tmp_path / "cut", seq_len=None)
    shutil.rmtree(teacher)
    shutil.rmtree(data)
    shown = train(cache_dir=cache, seq_len=None, save_steps=3, eval_samples=3).out
    assert "'seq_len': 32, 'temperature': 2.0" in shown and "3 held out" in shown
    saved = json.loads((out / "config.json").read_text())
    assert (saved["seq_len"], saved["temperature"], saved["teacher"]) == (32, 2.0, str(teacher))
    before = quiet_log(out)
    moved = shutil.move(cache, tmp_path / "moved")
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-00000009")
    cli("--config", out / "config.json", "--cache_dir", moved)
    train(cache_dir=moved, output_dir=again, temperature=2, eval_samples=3)
    assert quiet_log(out) == quiet_log(again) == before


def test_cache_refuses_what_does_not_fit(full_cache, fill, train, teacher, student, text, tmp_path):
    tokenizer = tiny_tokenizer(roll=1)
    other = tiny_model(tmp_path / "other_teacher", tokenizer=tokenizer)
    small = tiny_model(tmp_path / "small", vocab=200, hidden=16, tokenizer=False)
    edited = tmp_path / "edited.jsonl"
    edited.write_text(Path(text).read_text().replace("moon", "noom", 1))
    before = chunk_files(full_cache)
    for run, words, message in [
        (train, "temperature=3", "temperature 1.0 there, 3.0 here"),
        (train, "seq_len=64", "seq_len 32 there, 64 here"),
        (train, "packing=rows", "packing 'auto' there, 'rows' here"),
        (train, f"teacher={other}", "teacher .* there, .*other_teacher"),
        (train, f"student={other}", "different tokenizers: token"),
        (train, f"student={small}", "token 2.*200"),
        (train, f"cache_dir={tmp_path}/none", "no cache"),
        (fill, "temperature=2", "temperature 1.0 there, 2.0 here"),
        (fill, "cache_samples=9", "size 50 there, 9 here"),
        (fill, "seed=1", "seed 0 there, 1 here"),
        (fill, f"teacher={student}", "weights .* there"),
        (fill, f"dataset={edited}", "dataset_fingerprint .* there"),
        (fill, f"teacher={small} tokenizer={teacher} cache_dir={tmp_path}/new", "token 2.*200"),
    ]:
        fields = dict(cache_dir=full_cache) | dict(word.split("=") for word in words.split())
        refused = run(rc=2, **fields).err
        assert re.search(message, refused), (words, message, refused)
    assert chunk_files(full_cache) == before


def test_cache_is_begun_anew_by_force_alone(copy_of, fill, train, teacher, tmp_path):
    """One of an older version is refused with the way out; what else lies there stays."""
    manifest, _ = facts_of_cache(copy_of)
    sd.write_json(manifest | {"format": 1}, copy_of / "manifest.json")
    thesis = copy_of / "thesis.txt"
    thesis.write_text("mine")
    for run in (train, fill):
        refused = run(cache_dir=copy_of, rc=2).err
        assert re.search("older version.*--force_regenerate", refused)
    templated = tiny_model(tmp_path / "templated", seed=1, tokenizer=tiny_tokenizer(CHATML))
    for model in (templated, teacher):   # no template is left of the one before
        fill(copy_of, teacher=model, cache_chunk=32, force_regenerate=True)
        assert len(chunk_files(copy_of)) == 4
    assert facts_of_cache(copy_of)[1]["chunks"] == {"train": [32, 32, 7], "eval": [3]}
    train(cache_dir=copy_of)
    assert not json.loads((copy_of / "config.json").read_text())["force_regenerate"]
    assert thesis.exists()

    refused = fill(templated, 2, force_regenerate=True)   # not a folder of ours
    assert "'config.json' and no .simple_distill" in refused.err
    assert os.path.exists(f"{templated}/model.safetensors")


# ---- damage, full disks, many workers


def test_cache_damage_is_found_and_mended(copy_of, fill, train, tmp_path):
    """A chunk cut short, with a single bit flipped anywhere, or of another temperature, number or
    split, is refused by name, by training and where mode cache finishes; the command that is named
    makes it, and only it, again."""
    def assert_refused():
        with pytest.raises(sd.UserError, match=re.escape(f"'{path}' is damaged or of another")):
            rows_of_cache(copy_of)

    fill(tmp_path / "warm", temperature=2)
    whole = chunk_files(copy_of)
    name = "train-00000000.safetensors"
    path = copy_of / name
    data = whole[name]
    damages = [data[:length] for length in (0, 7, 100, len(data) // 2, len(data) - 1)]
    damages += [chunk_files(tmp_path / "warm")[name], *list(whole.values())[:3:2]]
    body = 8 + int.from_bytes(data[:8], "little")   # where safetensors' header ends
    draw = np.random.default_rng(0)
    for position in [*draw.integers(0, body, 20), *draw.integers(body, len(data), 40)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.integers(8)
        damages.append(damaged)
    for damaged in damages:
        path.write_bytes(damaged)
        assert_refused()

    for refuse in (train, fill):
        path.write_bytes(damaged)
        message = refuse(cache_dir=copy_of, rc=2).err
        assert f"cache chunk '{path}' is damaged" in message
        remove, again = re.search("again: (.*)", message)[1].split("; ")
        os.remove(shlex.split(remove)[1])
        assert sd.main(shlex.split(again)[2:]) == 0   # less `python simple_distill.py`
        assert chunk_files(copy_of) == whole
    manifest, _ = facts_of_cache(copy_of)   # what is said of all rows cannot be edited
    sd.write_json(manifest | {"temperature": 2.0}, copy_of / "manifest.json")
    assert_refused()


@pytest.mark.parametrize("damaged", [
    "manifest.json ", "manifest.json []", "manifest.json {}", 'manifest.json {"format":2}',
    "index.json ", "index.json {}", "index.json [1]", "tokenizer/tokenizer.json ",
    "tokenizer/tokenizer.json {}", "tokenizer/chat_template.jinja another"])
def test_cache_damage_beside_the_chunks_is_one_error(copy_of, train, damaged):
    name, content = damaged.split(" ")
    (copy_of / name).write_text(content)
    assert train(cache_dir=copy_of, rc=2).err.strip().count("\n") == 0


@pytest.mark.parametrize("fields", [
    {},
    dict(streaming=True),   # optional: streaming
])
def test_cache_is_the_same_in_pieces(fill, cache_words, tmp_path, fields):
    """By two ranks, of a sharded teacher. Files longer than a limit fail as on a full disk; what
    was finished stays, the same command does the rest."""
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    fill(whole, **fields)
    chunks = chunk_files(whole)
    run = functools.partial(
        Fork, tmp_path / "log.txt", *cache_words(cache_dir=cache, **fields), ranks=2)
    # one chunk is larger, and nothing else that is written
    shown = run(limit=sorted(map(len, chunks.values()))[-2]).wait()
    assert shown.count("error: ") == 1 and "Traceback" not in shown, shown
    kept = chunk_files(cache)
    assert 1 < len(kept) < len(chunks) and chunks == chunks | kept
    (cache / min(kept)).unlink()
    assert "is full" in run().wait()
    assert (chunk_files(cache), facts_of_cache(cache)) == (chunks, facts_of_cache(whole))


def test_cache_waits_for_a_chunk_that_another_worker_has(copy_of, cache_words, tmp_path):
    """... until that is gone, and stops on a signal meanwhile."""
    whole = chunk_files(copy_of)
    os.remove(copy_of / "train-00000002.safetensors")
    log_path = tmp_path / "log.txt"
    words = cache_words(cache_dir=copy_of)
    with open(copy_of / "claims", "a") as claims:
        fcntl.lockf(claims, fcntl.LOCK_EX, 1, 2**60 + 2)
        run = Fork(log_path, *words)
        while "row/s]" not in log_path.read_text():
            time.sleep(0.1)
        assert "stopped" in run.signal(signal.SIGTERM).wait()
        run = Fork(log_path, *words)
        while log_path.read_text().count("opening cache") < 2:
            time.sleep(0.1)
        assert run.poll() is None
    assert "is full" in run.wait()
    assert chunk_files(copy_of) == whole


def test_cache_of_a_stream_with_an_empty_block(fill, train, tmp_path):   # optional: streaming
    """A chunk whose conversations all lose their targets to seq_len holds no row, and is in
    nobody's way."""
    prompts = 8 * ["fox "] + 16 * ["fox " * 100] + 24 * ["fox "]
    rows = [{"prompt": prompt, "response": "jumps over"} for prompt in prompts]
    data = write_jsonl(tmp_path / "gap.jsonl", rows)
    cache, packed = tmp_path / "cache", tmp_path / "packed"
    how = dict(dataset=data, streaming=True, eval_samples=8, cache_chunk=16)
    for _ in range(2):
        fill(cache, **how)
    assert facts_of_cache(cache)[1]["chunks"] == {"train": [0, 16, 8], "eval": [8]}
    assert [len(row["input_ids"]) < 20 for row in rows_of_cache(cache)] == 24 * [True]
    train(cache_dir=cache)
    fill(packed, packing="documents", **how)
    assert [len(row["starts"]) for row in rows_of_cache(packed)] == 12 * [2]
    write_jsonl(data, rows[:-1])   # among the first, by which a stream is known
    assert "dataset_fingerprint" in fill(cache, 2, **how).err


@pytest.mark.campaign
def test_cache_survives_a_killed_worker(fill, cache_words, tmp_path):
    """Two workers, one killed with a claim in its hands; three more come. The same files as from
    one that was left alone."""
    data = write_jsonl(tmp_path / "text.jsonl", cache_rows(3000))
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    fill(whole, dataset=data)
    worker = functools.partial(
        Fork, tmp_path / "log.txt", *cache_words(dataset=data, cache_dir=cache))
    workers = [worker(), worker()]
    while len(chunk_files(cache)) < 10:
        assert workers[1].poll() is None
    workers[1].signal(signal.SIGKILL)
    workers += [worker() for _ in range(3)]
    for run in workers:
        shown = run.wait(600)
    assert shown.count("is full") == 4, shown
    assert chunk_files(cache) == chunk_files(whole)
    assert facts_of_cache(cache) == facts_of_cache(whole)


# Around main, which then says what it took at most.
PEAK_MEMORY = """
def main(args, run=main):
    code = run(args)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    return code
"""


@pytest.mark.campaign
@pytest.mark.parametrize("fields", [
    {},
    dict(streaming=True),   # optional: streaming
])
def test_cache_memory_is_constant(cache_words, tmp_path, fields):
    """Ten times the rows are filled in the same memory."""
    peaks = []
    for n in (300, 3000):
        data = write_jsonl(tmp_path / f"{n}.jsonl", cache_rows(n))
        words = cache_words(dataset=data, cache_dir=tmp_path / f"cache{n}", **fields)
        shown = Fork(tmp_path / f"{n}.txt", *words, change=PEAK_MEMORY).wait(600)
        peaks.append(int(shown.split()[-1]))
    assert peaks[1] < peaks[0] + 25_000, peaks   # kB


# ---- what it costs


def bench_cache():
    """A table: bytes a token, and how long a row of 512 takes on one core, with the allocator as a
    run sets it."""
    torch.set_num_threads(1)
    sd.keep_freed_memory()
    print(f"{'V':>8} {'method':>10} {'ids':>6} {'bytes/token':>12} {'raw fp32+int64':>15} "
          f"{'fp16+int32':>11} {'write ms a row':>15} {'read':>6}")
    for vocab, (method, size) in itertools.product(
            (32000, 151936), (("sample", 50), ("topk", 64))):
        hidden, head, _ = made_up_teacher(vocab, 511, sharp=5.0)
        row = Keeping(hidden, head, method, size)
        writing, reading = [
            min(timeit.repeat(run, repeat=9, number=1)) * 1e3 for run in (row.write, row.read)]
        print(f"{vocab:8} {method + str(size):>10} {len(row.kept.entries) / 511:6.1f} "
              f"{len(row.data) / 512:12.1f} {64 * 12:15} {64 * 6:11} {writing:15.2f} "
              f"{reading:6.2f}")


# --------------------------------------------------------------------------------------------------
# Optional: served: a teacher behind a server of our own, which answers as vLLM and SGLang do.

class TeacherServer(Loopback):
    """vLLM or SGLang on loopback, while it is entered, with the log-probabilities of a model.

    fault(number of the request): how that misbehaves. None: not at all; a number: the status of an
    error; a name: see below."""

    def __init__(self, path, kind="vllm", fault=lambda number: None):
        super().__init__(TeacherHandler)
        self.model = load(path)
        self.cards = [{"id": "T", "root": str(path), "owned_by": kind}]
        self.fault = fault
        self.numbers = itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def places(self, ids, top_k, fault):
        """-> [(log-probability, id, text), ...] a position, its own first; None at the first."""
        if fault == "bos":
            ids = [1, *ids]
        if fault == "few":
            top_k -= 2
        tokenizer = tiny_tokenizer(roll=9 * (fault == "tokenizer"))
        places = [None]
        for i, logits_V in zip(ids[1:], self.model(torch.tensor([ids])).logits[0]):
            logp_V = logits_V.log_softmax(-1) + 9 * (fault == "above 1")
            listed = [i, *logp_V.topk(top_k).indices.tolist()]
            places.append([(logp_V[j].item(), j, tokenizer.decode([j]).replace("\ufffd", ""))
                           for j in listed])   # of half a character nothing, as vLLM
        if fault == "beyond":
            places[5][1] = (places[5][1][0], 999, "x")
        if fault == "null":
            places[5] = None
        if fault == "shifted":
            places.insert(1, places.pop())
        return places[:-1] if fault == "cut" else places


class TeacherHandler(LoopbackHandler):
    def do_GET(self):
        self.send({"object": "list", "data": self.server.cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.server.fault(next(self.server.numbers))
        if fault == "drop":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "silence":
            threading.Event().wait(2)   # time.sleep may be none
        if isinstance(fault, int):
            return self.send({"error": {"message": f"{fault} of our own"}}, fault)
        kind = self.server.cards[0]["owned_by"]
        assert self.path == {"vllm": "/v1/completions", "sglang": "/generate"}[kind]
        if kind == "vllm":
            assert body["model"] == "T" and body["max_tokens"] == 1
            places = self.server.places(body["prompt"], body["prompt_logprobs"], fault)
            answer = {"choices": [{"prompt_logprobs": [place and {
                str(i): {"logprob": logp, "decoded_token": text} for logp, i, text in place}
                for place in places]}]}
        else:
            assert body["logprob_start_len"] == 0 and body["sampling_params"]["max_new_tokens"] == 1
            places = self.server.places(body["input_ids"], body["top_logprobs_num"], fault)
            answer = {"meta_info": {
                "input_token_logprobs": [place and place[0] for place in places],
                "input_top_logprobs": [place and place[1:] for place in places]}}
        self.send("<html>" if fault == "html" else answer)

    def send(self, answer, status=200):
        data = answer.encode() if answer == "<html>" else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json"[:20 * (answer != "<html>")])
        self.send_header("content-length", str(len(data)))
        self.send_header("retry-after", "1")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(teacher):
    """No weights of a teacher, but a server with them."""
    with TeacherServer(teacher) as server:
        yield server


def since(first, fault):
    return lambda number: fault if number >= first else None


def served_fields(server, **fields):
    return dict(teacher_url=server.url, teacher="T", cache_top_k=12) | fields


# ---- what comes back


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_served_rows_hold_what_the_model_says(teacher, text, kind):
    """Of each document by itself, also where they share a row."""
    rows, _ = rows_of(text, packing="documents", seq_len=256)
    row = rows[0]
    assert len(row["starts"]) > 1
    cfg = config.Config(cache_top_k=12)
    with TeacherServer(teacher, kind) as server, sd.process_group():
        cfg.teacher_url = server.url
        answered, = sd.with_answers(*sd.open_server(row, cfg, tiny_tokenizer()), [row])
    sparse = sd.SparseTarget(*map(torch.from_numpy, answered["sparse"]))
    documents = torch.tensor(row["input_ids"]).tensor_split(row["starts"][1:].tolist())
    logits = [load(teacher)(ids[None]).logits[0, :-1].detach() for ids in documents]
    top = torch.cat(logits).log_softmax(-1).topk(12)
    assert (sparse.ids == top.indices).float().mean() > 0.999
    bound = 2 * (0.0193 * (-top.values).sqrt() + 1e-4)
    assert ((sparse.probs.log() - top.values).abs() < bound).all()
    assert (sparse.rest - (1 - top.values.exp().sum(-1))).abs().max() < 0.02


def test_served_cache_is_that_of_the_model_here(served, teacher, student, fill, tmp_path):
    """... but for its name; no teacher is loaded. It goes on where the same model answers."""
    here, there = tmp_path / "here", tmp_path / "there"
    fill(here, cache_method="topk", cache_top_k=12)
    fields = served_fields(served, tokenizer=teacher)
    fill(there, **fields)
    assert facts_of_cache(there)[0]["served"] == ["T", teacher]
    for split in ("train", "eval"):
        for a, b in zip(rows_of_cache(here, split), rows_of_cache(there, split), strict=True):
            assert np.mean(a["sparse"].ids == b["sparse"].ids) > 0.95   # after EOS all are alike
            for one, other in zip(a["sparse"][1:], b["sparse"][1:]):
                assert np.abs(one - other).max() < 0.01
    for name, cache in (("a", here), ("b", there)):
        distil(tmp_path / name, student=student, cache_dir=cache, max_steps=6)
    for key in ("train/loss", "eval/kl_loss"):
        assert column(tmp_path / "a", key) == pytest.approx(column(tmp_path / "b", key), rel=1e-3)
    whole = chunk_files(there)
    os.remove(there / "train-00000003.safetensors")
    served.numbers = itertools.count(1)
    fill(there, **fields)
    assert chunk_files(there) == whole
    assert next(served.numbers) == 1 + 1 + 6 + 1   # tried, one row again, what was missing
    served.model = load(student)
    refused = fill(there, rc=2, **fields).err
    assert "of the likeliest tokens are what the server says now" in refused


@pytest.mark.parametrize("data", [{}, dict(packing="documents", seq_len=256)])
def test_served_online_is_like_a_cache(served, teacher, student, text, fill, tmp_path, data):
    """The same losses, to the last digit that a cache keeps."""
    cache, cached, online = tmp_path / "cache", tmp_path / "cached", tmp_path / "online"
    run = dict(student=student, max_steps=6, batch_size=4, gradient_accumulation_steps=2)
    fill(cache, cache_method="topk", cache_top_k=12, **data)
    distil(cached, cache_dir=cache, seq_len=None, **run)
    fields = served_fields(served, dataset=text, **data, **run)
    distil(online, **fields)
    for key in ("train/kl_loss", "train/loss", "eval/kl_loss", "eval/loss"):
        assert column(online, key) == pytest.approx(column(cached, key), rel=1e-3)
    served.cards[0]["root"] = "another"
    assert "teacher's weights" in distil(online, 2, **fields | dict(max_steps=7)).err


@pytest.mark.parametrize("fields", [
    dict(student="layers:1"),
    dict(streaming=True),   # optional: streaming
    dict(on_policy=0.5, max_new_tokens=6, on_policy_prompt=5),   # optional: on_policy
])
def test_served_works_where_a_teacher_does(served, teacher, student, text, tmp_path, fields):
    """With all there is to list: like the model itself. --dry_run asks too."""
    fields = dict(teacher=teacher, student=student, dataset=text, max_steps=4) | fields
    served_here = fields | served_fields(served, teacher=teacher, cache_top_k=263)
    distil(tmp_path / "here", **fields)
    assert "--dry_run: nothing was written" in distil(tmp_path / "dry", **served_here,
                                                      dry_run=True).out
    distil(tmp_path / "served", **served_here)
    for key in ("train/kl_loss", "eval/kl_loss", "train/ce_loss"):
        assert column(tmp_path / "served", key) == pytest.approx(
            column(tmp_path / "here", key), abs=5e-3)


def test_served_is_not_asked_of_rows_that_the_student_rewrites(   # optional: on_policy
        served, student, text, tmp_path):
    fields = served_fields(served, student=student, dataset=text, max_steps=9, batch_size=2,
                           max_new_tokens=6, on_policy_prompt=5)
    asked = []
    for share in (0.001, 1):
        before = next(served.numbers)
        distil(tmp_path / f"{share}", **fields, on_policy=share)
        asked.append(next(served.numbers) - before)
    # two batches of two are read ahead, which the first run asks for, the second does not
    assert asked[0] - asked[1] == 4
    assert "a step on policy takes" in distil(tmp_path / "dry", **fields, on_policy=1,
                                              dry_run=True).out


# ---- what goes wrong


WRONG_ANSWERS = {   # of an answer: what the one line says
    "bos": "for token .* came 13",
    "cut": "argument 2 is shorter",
    "few": "for token .* came 1[01]",
    "null": "NoneType",
    "shifted": "for token .* came 1[23]",
    "above 1": "probabilities add up to",
    "beyond": "ids to 999 of 263",
    "html": "string indices",
    400: "400 of our own",
    429: "429 of our own",
    503: "503 of our own",
    "drop": "Connection error",
    "silence": "timed out",
}


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_served_faults_are_one_error_and_lose_nothing(
        teacher, fill, tmp_path, monkeypatch, kind):
    """At the start and in the middle. What is in the cache then is right."""
    monkeypatch.setattr(sd, "PATIENCE", 0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    with TeacherServer(teacher, kind) as server:
        fields = served_fields(server, tokenizer=teacher)
        fill(whole, **fields)
        for (fault, message), first in itertools.product(WRONG_ANSWERS.items(), (1, 5)):
            server.numbers = itertools.count(1)
            server.fault = since(first, fault)
            monkeypatch.setattr(sd, "SILENCE", 1 if fault == "silence" else 60)
            refused = fill(cache, rc=2, **fields).err
            assert re.search(message, refused), (fault, refused)
            assert "--max-logprobs 12 --no-enable-prefix-caching" in refused
        server.fault = since(0, None)
        fill(cache, **fields)
    assert chunk_files(cache) == chunk_files(whole)


def test_served_refuses_a_teacher_that_is_not_ours(teacher, out, text, student, monkeypatch):
    """Of another tokenizer, one of two unnamed ones, nobody there. No word of the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    fields = dict(student=student, dataset=text, max_steps=1)
    with TeacherServer(teacher, fault=since(1, "tokenizer")) as server:
        fields |= served_fields(server)
        server.cards.append(dict.fromkeys(server.cards[0], "another"))
        assert "of the ids read as in our tokenizer" in distil(out, 2, **fields).err
        refused = distil(out, 2, **fields | dict(teacher="U")).err
        assert "trying --teacher U" in refused and "too many values" in refused
    refused = distil(out, 2, **fields).err
    assert "APIConnectionError" in refused and "sk-secret" not in refused


def test_served_faults_that_pass_are_waited_for(served, student, text, tmp_path, monkeypatch):
    """Once by the client, longer by ourselves, which is said."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fields = served_fields(served, student=student, dataset=text, max_steps=4)
    distil(tmp_path / "a", **fields)
    kinds = {3: 429, 5: 500, 7: "drop", **dict.fromkeys(range(20, 80), "drop")}
    served.numbers = itertools.count(1)
    served.fault = kinds.get
    shown = distil(tmp_path / "b", **fields).out
    assert "/v1 again: APIConnectionError" in shown
    assert same(final_weights(tmp_path / "a"), final_weights(tmp_path / "b"))


@pytest.mark.parametrize("ranks, fields", [
    (1, {}),
    (2, {}),
    (2, dict(on_policy=1, max_new_tokens=6)),   # optional: on_policy
])
def test_served_a_server_that_goes_away(teacher, student, text, tmp_path, ranks, fields):
    """What was trained is saved, one line ends the run, and the same command goes on."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    with TeacherServer(teacher) as server:
        run = served_fields(server, student=student, dataset=text, max_steps=12, batch_size=2,
                            **fields)
        distil_apart(whole, ranks, **run).wait()
        count = next(server.numbers)
        server.numbers = itertools.count(1)
        server.fault = since(count // 2, "drop")
        shown = distil_apart(out, ranks, "PATIENCE = 0", **run).wait()
        assert shown.count("error: teacher T at http") == 1 and "Traceback" not in shown, shown
        saved = sd.checkpoints_in(out / "checkpoints")
        assert len(saved) == 1 and not saved[0].name.endswith("0000")
        server.fault = since(0, None)
        shown = distil_apart(out, ranks, **run).wait()
    assert same(final_weights(out), final_weights(whole))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.campaign)])
def test_served_a_trainer_that_is_killed(served, student, text, tmp_path, kills):
    out, whole = tmp_path / "out", tmp_path / "whole"
    run = served_fields(served, student=student, dataset=text, max_steps=30, save_steps=3)
    distil_apart(whole, **run).wait()
    for i in range(kills):
        process = distil_apart(out, **run)
        wait_for_log(out, process)
        time.sleep(random.Random(i).random())
        process.signal(signal.SIGKILL).wait()
    distil_apart(out, **run).wait()
    assert same(final_weights(out), final_weights(whole))


@pytest.mark.parametrize("kills", [1, pytest.param(9, marks=pytest.mark.campaign)])
def test_served_a_filler_that_is_killed(served, student, fill, cache_words, tmp_path, kills):
    """The same files as from one that was left alone."""
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    fields = served_fields(served, student=student)
    fill(whole, **fields)
    for i in range(kills):
        worker = Fork(tmp_path / "log.txt", *cache_words(cache_dir=cache, **fields))
        while len(chunk_files(cache)) <= i:
            assert worker.poll() is None
        worker.signal(signal.SIGKILL).wait()
    fill(cache, **fields)
    assert chunk_files(cache) == chunk_files(whole)


@pytest.mark.parametrize("words, message", [
    ("--temperature 2", "temperature is 2.0"),
    ("--divergence reverse", "divergence is reverse"),
    ("--mode cache --cache_dir c --cache_method sample", "cache_method is sample"),
    ("--mode cache --cache_dir c --cache_samples 9", "no --teacher_url"),
    ("--cache_dir c", "teacher_url is read only with no --cache_dir"),
    ("--alpha 1", "teacher_url is read only with --alpha below 1"),
    ("--blockwise", "blockwise is read only with no --teacher_url"),   # optional: blockwise
    ("--teacher_url http://user:secret@host/v1", "teacher_url is given more than once"),
])
def test_served_knobs(words, message):
    with pytest.raises(config.UserError, match=message):
        parse("--teacher_url", "http://host:8000/v1", *words.split())


def test_served_teacher_needs_no_name(teacher, student, text, out):
    """... and then none is made for a demo."""
    assert parse("--teacher_url", "http://host", "--student", "s").teacher == "demo"   # the demo's
    with TeacherServer(teacher) as server:
        fields = served_fields(server, student=student, dataset=text, max_steps=1, teacher=None)
        shown = distil(out, **fields).out
    assert "demo" not in shown and "teacher: server:model" in shown


# ---- the real thing


@contextlib.contextmanager
def real_vllm(path, log_path, port):
    """vLLM on CPU cores, out of the virtual environment that VLLM_DIR names -> its process"""
    command = [f"{os.environ['VLLM_DIR']}/bin/vllm", "serve", path, "--served-model-name", "T",
               "--dtype", "float32", "--host", "127.0.0.1", "--port", port,
               "--max-logprobs", "64", "--max-model-len", "300"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log_path, "w") as log_file:
        process = subprocess.Popen([*map(str, command)], env=env, stdout=log_file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.time() + 300
        while "Application startup complete" not in Path(log_path).read_text():
            assert process.poll() is None and time.time() < end, Path(log_path).read_text()[-3000:]
            time.sleep(1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.campaign
@pytest.mark.skipif("VLLM_DIR" not in os.environ, reason="VLLM_DIR names no vLLM: see Tests")
def test_served_by_a_real_vllm(tmp_path, student, text, fill):
    """Its numbers are the model's; a cache, a run online, one on policy; gone in the middle."""
    openai = pytest.importorskip("openai")
    teacher = tiny_model(tmp_path / "teacher", hidden=128, seed=1, initializer_range=0.1)
    port = free_port()
    serve = functools.partial(real_vllm, teacher, tmp_path / "vllm.txt", port)
    fields = dict(teacher_url=f"http://127.0.0.1:{port}/v1", teacher="T", cache_top_k=64,
                  tokenizer=teacher, dataset=text)
    here, there = tmp_path / "here", tmp_path / "there"
    with serve() as process:
        ids = list(range(200))
        client = openai.OpenAI(base_url=fields["teacher_url"], api_key="none")
        answers = sd.ask_ids(client, client.models.list().data[0], 64, ids, False)
        logp = load(teacher)(torch.tensor([ids])).logits[0].log_softmax(-1)
        off = [logp[t, i].item() - said for t, place in enumerate(answers) for said, i, _ in place]
        assert len(off) >= 199 * 64 and max(map(abs, off)) < 1e-5
        fill(here, teacher=teacher, cache_method="topk", cache_top_k=64)
        fill(there, **fields)
        run = dict(student=student, max_steps=6)
        distil(tmp_path / "a", cache_dir=here, **run)
        distil(tmp_path / "b", cache_dir=there, **run)
        run |= fields
        distil(tmp_path / "c", **run)
        for key in ("train/loss", "train/kl_loss", "eval/kl_loss"):
            for out in ("b", "c"):
                assert column(tmp_path / out, key) == pytest.approx(
                    column(tmp_path / "a", key), rel=1e-3)
        distil(tmp_path / "d", on_policy=0.5, max_new_tokens=8, **run)   # optional: on_policy
        out = tmp_path / "e"
        apart = distil_apart(out, change="PATIENCE = 5", **run | dict(max_steps=400))
        wait_for_log(out, apart)
        os.killpg(process.pid, signal.SIGKILL)
        shown = apart.wait()
    assert shown.count("error: teacher T at http") == 1 and "Traceback" not in shown, shown
    step, = (int(path.name[5:]) for path in sd.checkpoints_in(out / "checkpoints"))
    with serve():
        distil(out, **run | dict(max_steps=step + 5))
    assert len(log(out, "train")) == step + 5


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
    return dict(
        teacher=tiny_model(f"{folder}/teacher", layers=5, seed=1),
        student=tiny_model(f"{folder}/student", hidden=16, layers=3, seed=2,
                           tie_word_embeddings=True),
        dataset=write_splits(f"{folder}/data", talk(20), talk(6, seed=50)))


TEACHER_BLOCK = (1, 2, 4)   # which the student's block i learns from


def distil_blocks(block, out, rc=0, words="", **fields):
    return distil(out, rc, words, **{**BLOCKWISE, **block, **fields})


def plain_run(**fields):
    """-> what a run works with at its start, of plain models: stitches beside the student."""
    cfg = config.Config(**{**fields, "blockwise": True})
    model = load(cfg.student)
    make_root = sd.stitching(cfg, model.config)
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    return types.SimpleNamespace(cfg=cfg, student=make_root(model), steps_per_epoch=1,
                                 teacher=sd.ShardedRoot(load(cfg.teacher).requires_grad_(False)))


def layer_states(model, ids, fed):
    """A plain Llama -> what comes out of each layer, [B, T, D]. fed: {layer: what it is given in
    place of the output of the one before}."""
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    states = []
    for i, layer in enumerate(model.model.layers):
        hidden = layer(fed.get(i, hidden), position_embeddings=rotary)
        states.append(hidden)
    return states


def states_of_blocks(run, batch):
    """-> (the student's states at the end of its block, stitched, the teacher's), a block each."""
    stitches = run.student.stitches
    taught = layer_states(run.teacher.model, batch.input_ids, {})
    fed = {}
    if run.cfg.block_input == "teacher":
        fed = {i: stitches[f"down{i}"](taught[j - 1]) for i, j in enumerate(TEACHER_BLOCK)}
    learnt = layer_states(run.student.model, batch.input_ids, fed)
    pairs = []
    for i, j in enumerate(TEACHER_BLOCK):
        x, y = [hidden.flatten(0, 1)[batch.real] for hidden in (learnt[i], taught[j])]
        pairs.append((stitches[f"up{i}"](x), y))
    return pairs


def reference_loss(kind, student_ND, teacher_ND, temperature):
    if kind == "mse":
        return F.mse_loss(student_ND, teacher_ND)
    if kind == "relative":
        return ((student_ND - teacher_ND).norm(dim=-1) / teacher_ND.norm(dim=-1)).square().mean()
    if kind == "cosine":
        return (1 - F.cosine_similarity(student_ND, teacher_ND)).mean()
    logp = F.log_softmax(student_ND / temperature, -1)
    q = F.softmax(teacher_ND / temperature, -1)
    return temperature ** 2 * F.kl_div(logp, q, reduction="batchmean")


def loss_of_blocks(run, blocks, batch):
    states = states_of_blocks(run, batch)
    return sum(reference_loss(run.cfg.distill_loss_type, *states[i],
                              run.cfg.distill_loss_temperature) for i in blocks)


def loss_of_head(run, batch):
    weight = run.cfg.logit_loss_weight
    logits, teacher_logits = [
        root.model(batch.input_ids).logits.flatten(0, 1)[batch.positions]
        for root in (run.student, run.teacher)]
    ce = F.cross_entropy(logits, batch.labels)
    if run.cfg.logit_loss_type == "ce":
        return ce
    kl = reference_loss(run.cfg.logit_loss_type, logits, teacher_logits, 1.0)
    return weight * kl + (1 - weight) * ce


def learner(run, pattern, lr, decay, max_norm):
    """-> a function: a step of AdamW on the parameters of such a name, which are clipped together.
    Norms and biases do not decay."""
    parameters = [p for name, p in run.student.named_parameters() if re.search(pattern, name)]
    optimizer = torch.optim.AdamW([
        dict(params=[p], weight_decay=decay if p.ndim > 1 else 0) for p in parameters], lr=lr)

    def step():
        nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        optimizer.step()

    return step


def learner_of_block(run, i):
    cfg = run.cfg
    pattern = rf"\D{i}\."   # the layer of that number, and its stitches
    if cfg.block_input == "student" and (i == 0 or not cfg.freeze_previous_blocks):
        pattern = rf"embed|layers\.[0-{i}]\.|up{i}\."
    return learner(run, pattern, cfg.lr_per_block[i], cfg.wd_per_block[i % len(cfg.wd_per_block)],
                   cfg.max_grad_norm_per_block[i])


# a value a block
ONE_BY_ONE = "--epochs_per_block 0.4 0.5 0.8 --wd_per_block 0.3 0 0.1"
AT_ONCE = "--block_input teacher --epochs_per_block 0.8 --wd_per_block 0.3"
THEN_HEAD = "--lm_head_epochs 0.4 --lm_head_lr 3e-3 --lm_head_wd 0.1 --lm_head_max_grad_norm 0.2"


@pytest.mark.parametrize("words", [
    f"{ONE_BY_ONE} {THEN_HEAD} --logit_loss_weight 0.3",
    f"{AT_ONCE} {THEN_HEAD}",
    f"{ONE_BY_ONE} {THEN_HEAD} --distill_loss_type mse --freeze_previous_blocks false"
    " --logit_loss_type mse --logit_loss_weight 0.5",
    f"{AT_ONCE} --train_lm_head false --distill_loss_type mse",
    f"{ONE_BY_ONE} {THEN_HEAD} --distill_loss_type cosine --logit_loss_type ce",
    f"{ONE_BY_ONE} --train_lm_head false --distill_loss_type kl_div --distill_loss_temperature 1.5",
    f"{AT_ONCE} {THEN_HEAD} --distill_loss_type kl_div --logit_loss_type mse",
])
def test_blockwise_trains_as_plain_models_do(block, out, words):
    """Every step of every phase: what is trained, how far, on which loss; the rest stands still."""
    distil_blocks(block, out, words=words, lr_per_block=[1e-3, 3e-3, 2e-3], lm_head_lr=None,
                  max_grad_norm_per_block=[0, 0.5, 0.1], initialize_head_from_teacher=False,
                  gradient_checkpointing=True)
    run = plain_run(**read_config(out))
    rows, _ = rows_of(block["dataset"], seq_len=32)
    phases = [(2, [0]), (3, [1]), (4, [2])]   # so many steps, of which blocks
    if run.cfg.block_input == "teacher":
        phases = [(4, [0, 1, 2])]
    plan = []
    for steps, blocks in phases:
        plan += steps * [([learner_of_block(run, i) for i in blocks],
                          functools.partial(loss_of_blocks, run, blocks))]
    if run.cfg.train_lm_head:
        plan += 2 * [([learner(run, r"lm_head|model\.norm", 3e-3, 0.1, 0.2)],
                      functools.partial(loss_of_head, run))]
    losses = []
    for learners, loss_of in plan:
        numbers = sd.batch_of_step(len(rows), 0, 4, len(losses))
        loss = loss_of(sd.collate([rows[i] for i in numbers]))
        losses.append(loss.item())
        run.student.zero_grad()
        loss.backward()
        for learn in learners:
            learn()
    assert column(out, "train/loss") == pytest.approx(losses, rel=1e-5, abs=1e-6)
    run.student.model.save_pretrained(f"{out}/plain")   # a head that is not trained stays tied
    torch.testing.assert_close(final_weights(out), weights(f"{out}/plain"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, source", [
    ("relative", "teacher"), ("mse", "teacher"), ("cosine", "student"), ("kl_div", "student")])
def test_blockwise_student_equal_to_teacher_stays_equal(block, out, kind, source):
    distil_blocks(block, out, student=block["teacher"], distill_loss_type=kind, block_input=source,
                  use_stitching_layers=kind != "mse", epochs_per_block=0.4, lm_head_epochs=0.4)
    assert set(column(out, "train/loss")) == {0.0}
    for i in range(5):
        assert column(out, f"block/{i}/loss") == [0, 0]
    assert same(final_weights(out), weights(block["teacher"]))


def test_blockwise_a_state_of_zeros_counts_nothing():
    """Of the teacher, which has no size to be relative to."""
    student = torch.randn(2, 8, requires_grad=True)
    error = sd.hidden_error(student, torch.tensor([[0.1], [0]]).expand(2, 8), "relative", 1.0)
    error.sum().backward()
    assert error[0] > 0 == error[1]
    assert student.grad.any(-1).tolist() == [True, False]   # nan is any


def test_blockwise_clips_what_the_loss_scale_magnified():
    p = nn.Parameter(torch.zeros(4))
    before = torch.full((4,), 2.0 ** 14)
    p.grad = before.clone()
    sd.clip_blocks([([p], 0.5)], {"scale": before[0]})   # the norm is 2
    torch.testing.assert_close(p.grad, before / 4)


def test_blockwise_figures_leave_sinks_out(block, out, tmp_path):
    """Every row begins with a token whose state is 300 times as large in the teacher: what is
    explained is of the others. All rows in one batch, as the mean is a batch's."""
    _, rows = rows_of(block["dataset"], seq_len=32)
    batch = sd.collate(rows)
    sink = rows[0]["input_ids"][0]
    ordinary = batch.input_ids.flatten()[batch.real] != sink
    loud = block | dict(teacher=shutil.copytree(block["teacher"], f"{tmp_path}/teacher"))
    edit_weights(loud["teacher"],
                 lambda tensors: tensors["model.embed_tokens.weight"][sink].mul_(300))
    shown = distil_blocks(loud, out, batch_size=8, lr_per_block=STILL, **NO_HEAD).out
    with torch.no_grad():
        states = states_of_blocks(plain_run(**read_config(out)), batch)
    for i, (x, y) in enumerate(states):
        error = reference_loss("relative", x, y, 1.0).item()
        variance = y[ordinary].var(0, correction=0).mean()
        explained = 1 - (F.mse_loss(x[ordinary], y[ordinary]) / variance).item()
        assert column(out, f"block/{i}/loss") == pytest.approx([error] * 2, rel=1e-4)
        assert column(out, f"block/{i}/explained") == pytest.approx([explained] * 2, rel=1e-3)
        line = f"| {i} | {TEACHER_BLOCK[i]} | {error:.4g} | {explained:.1%} |"
        assert re.sub(" +", " ", shown).count(line) == 2   # before and after


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("family, offset, scaling", [
    ("Llama", 0, 1.0),
    ("Phi", 0, 1.0),   # a LayerNorm, a bias in the head
    ("Gemma2", 1, 1.0),   # its norm multiplies by 1 + weight
    ("Granite", 0, 4.0),
])
def test_blockwise_head_begins_as_the_teachers_on_stitched_states(
        tmp_path, width, family, offset, scaling):
    """And as it was where any of it is frozen. The student's vocabulary has 7 ids more."""
    cls = f"{family}Config"
    run = plain_run(
        student=tiny_model(f"{tmp_path}/student", vocab=270, hidden=width, seed=2, cls=cls),
        teacher=tiny_model(f"{tmp_path}/teacher", seed=1, cls=cls, logits_scaling=scaling))
    head = run.student.model.lm_head
    gain, student_gain = [sd.final_norm(root.model).weight for root in (run.teacher, run.student)]
    for weight in (gain, student_gain):   # trained ones are not all the same
        weight.data.uniform_(1, 2)
    before = head.weight.clone()
    # what the last one added would be lost
    no_bias = [stitch.bias is None for stitch in run.student.stitches.values()]
    assert no_bias == [False, width == 16]
    with sd.process_group():
        sd.initialize_head(run, {head.weight: 1.0, student_gain: 0.0})
        assert torch.equal(head.weight, before)
        sd.initialize_head(run, {head.weight: 1.0, student_gain: 1.0})
    stitched = hidden = torch.randn(50, width)
    if width == 16:
        stitch = run.student.stitches["up1"]
        stitched = stitch(hidden) * (gain + offset)
        gain = (32 ** 0.5 / stitch.weight.norm()).expand(16) - offset
    expected = run.teacher.model.lm_head(stitched) / scaling
    assert (head(hidden)[:, :263] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(head.weight[263:], before[263:])
    torch.testing.assert_close(student_gain, gain)


def test_blockwise_a_head_that_is_tied_in_spite_of_its_config_stays(block):
    run = plain_run(**block, train_lm_head=False, initialize_head_from_teacher=False)
    model = run.student.model   # its head looks tied because those knobs are off
    parts = sd.parameters_by_part(run)
    assert list(parts["head"]) == [model.model.norm.weight]
    assert list(parts["embeddings"]) == [model.lm_head.weight]
    sd.initialize_head(run, parts["head"])
    assert same(model.state_dict(), load(block["student"]).state_dict())


def test_blockwise_packed_documents_are_as_each_alone(block, tmp_path):
    """The first step of each phase, of the same tokens."""
    losses = []
    for packing in ("rows", "documents"):
        out = tmp_path / packing
        distil_blocks(block, out, packing=packing, seq_len=128, batch_size=20, lr_per_block=STILL,
                      lm_head_lr=STILL, learning_rate=STILL, max_steps=1, num_epochs=None)
        losses.append(column(out, "train/loss") + column(out, "block/2/loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 3 + 1 + 1 + 2


@pytest.mark.parametrize("source, steps", [("student", 19), ("teacher", 11)])
def test_blockwise_resume_is_exact_in_every_phase(block, out, source, steps):
    """From checkpoints where a phase begins, ends, and in the middle. A phase is 4 steps: three
    blocks or all at once, then the head; then 3 steps of distillation."""
    fields = dict(epochs_per_block=0.8, lm_head_epochs=0.8, max_steps=3, save_steps=2,
                  keep_checkpoints=30, block_input=source)
    distil_blocks(block, out, **fields)
    whole = quiet_log(out)
    final = final_weights(out)
    assert len(log(out, "train")) == steps
    for step in {2, 4, steps - 7, steps - 5, steps - 3}:
        shutil.rmtree(f"{out}/final")
        distil_blocks(block, out, **fields, resume=f"{out}/checkpoints/step-{step:08d}")
        assert quiet_log(out) == whole, step
        assert same(final_weights(out), final), step


def test_blockwise_refusals_name_numbers(block, out, mix):
    for case in (
        "--use_stitching_layers false -> student width 16 and teacher width 32",
        f"--teacher {mix} -> has 3 layers, the teacher only 2",
        "--lr_per_block 1e-3 1e-4 -> lr_per_block has 2 values",
        "--block_input teacher --epochs_per_block 1 1 2 -> one value",
        "--lr_multipliers lm_head=0 model.norm=0 -> --train_lm_head false",
        f"--student {mix} --gradient_checkpointing true -> MixForCausalLM",
        f"--student {mix} --packing documents -> position_ids",
    ):
        words, message = case.split(" -> ")
        assert message in distil_blocks(block, out, 2, words, trust_remote_code=True).err


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


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """A class in a local directory (auto_map) that looks at no mask and keeps no cache."""
    (tmp_path / "mixlib.py").write_text(CUSTOM_STUDENT)
    monkeypatch.syspath_prepend(tmp_path)
    import mixlib
    torch.manual_seed(0)
    path = f"{tmp_path}/mix"
    mixlib.MixForCausalLM(mixlib.MixConfig()).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["Mix", "GPT2", "Gemma2", "GPTNeoX"])
def test_blockwise_student_of_another_family(block, out, tmp_path, mix, family):
    """A class of one's own without attention; other norms, learned positions, a capped head: each
    block's error on held-out rows falls."""
    student = mix
    if family != "Mix":
        student = tiny_model(f"{tmp_path}/student", hidden=16, seed=3, cls=f"{family}Config")
    distil_blocks(block, out, student=student, trust_remote_code=True, epochs_per_block=6,
                  lm_head_epochs=4)
    for i in range(2):
        before, after = column(out, f"block/{i}/loss")
        assert after < 0.9 * before
    final = AutoModelForCausalLM.from_pretrained(f"{out}/final", trust_remote_code=True)
    assert type(final).__name__.startswith(family)
    assert not same(final.state_dict(), weights(student))


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_blockwise_a_row_that_is_not_finite_skips_its_step_only(block, out, tmp_path, source):
    """One row in five has the letter that the teacher cannot bear."""
    rows = [{"prompt": "Zaaaa"[i % 5], "response": "one two three"} for i in range(10)]
    distil_blocks(block, out, teacher=break_letter(block["teacher"], f"{tmp_path}/broken"),
                  dataset=write_splits(f"{tmp_path}/data", rows, rows[1:3]), batch_size=1,
                  block_input=source, lm_head_epochs=0.1, initialize_head_from_teacher=False)
    losses = column(out, "train/loss")
    skipped = losses.count(None)
    assert len(losses) // 6 <= skipped == column(out, "train/skipped_steps")[-1] < len(losses)
    assert all(tensor.isfinite().all() for tensor in final_weights(out).values())


@pytest.mark.parametrize("fields, tolerance", [
    (dict(), 2e-5),
    (dict(block_input="teacher"), 2e-5),
    (dict(dtype="bf16"), 0.02),
])
def test_blockwise_an_empty_share_counts_nothing(block, out, fields, tolerance):
    """5 sequences as 8 x 1 and on two ranks as 4 of 1 each: micro-batches have none, and a rank of
    the held-out rows."""
    fields = {**BLOCKWISE, **block, "epochs_per_block": 2, "lm_head_epochs": 1, **fields,
              "dataset": write_splits(f"{out}-data", talk(5), talk(1))}
    distil(out, **fields | dict(batch_size=8))
    fields |= dict(batch_size=1, gradient_accumulation_steps=4)
    apart = f"{out}-apart"
    shown = distil_apart(apart, ranks=2, **fields).wait()
    for key in ("train/loss", "block/0/loss", "block/2/explained", "eval/loss"):
        expected = pytest.approx(column(out, key), rel=tolerance)
        assert column(apart, key) == expected, (key, shown)


def test_blockwise_lr_multipliers_hold_in_every_phase(block, out):
    """Frozen stays frozen, what is multiplied moves so much further, stitches have their block's
    rate."""
    shown = distil_blocks(
        block, out, epochs_per_block=0.1, lm_head_epochs=0.1, max_grad_norm_per_block=0,
        lr_multipliers=["embed=0", r"layers\.0\.=2", r"layers\.1\.=0", "model.norm=0"]).out
    before = weights(block["student"])
    before["lm_head.weight"] = before["model.embed_tokens.weight"]   # untied from here on
    rates = {}
    for name, x in final_weights(out).items():   # AdamW's first step is the rate, times the sign
        change = (x - before[name]).abs().max().item() / 3e-3
        rates[re.sub(r"\.(self_attn|mlp|input|post).*", "", name)] = round(change, 1)
    assert rates == {
        "model.embed_tokens.weight": 0, "model.layers.0": 2, "model.layers.1": 0,
        "model.layers.2": 1, "model.norm.weight": 0, "lm_head.weight": 1}
    assert "norm or head is frozen" in shown


# ---- what it costs


def bench_block(layers=8):
    """Cost of the block phase of S equal layers, over running both models whole for each block:
    about a half."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder, hidden=256, layers=layers)
        run = plain_run(student=model, teacher=model)
    batch = sd.collate([token_row(np.arange(128), np.arange(128) > 0)] * 8)
    parts = sd.parameters_by_part(run)
    costs = []
    for i, j in run.student.pairs.items():
        stage = sd.stage_of_blocks(run, parts, {i: j})
        with contextlib.redirect_stdout(io.StringIO()):
            sd.make_optimizer(run.student.parameters(), stage.rates, 0.0)   # freezes the others
        step = functools.partial(step_of_block, run, stage, batch)
        costs.append(interleaved({"step": step}, rounds=5)["step"])
    print(f"\nms a step of each block: {[round(1e3 * cost) for cost in costs]}; all of them: "
          f"{sum(costs) / (layers * costs[-1]):.2f} of running both models whole for each, as the "
          "last one does")


def step_of_block(run, stage, batch):
    run.student(stage.loss_fn, batch, stage.get_teacher_targets(batch), 1.0)[0].backward()


# --------------------------------------------------------------------------------------------------
# Optional: on_policy: the student writes, the teacher corrects.

WRITING = dict(on_policy=1, max_new_tokens=6, on_policy_prompt=5)
GREEDY = 1e-4   # a temperature at which nothing is left to chance


def greedy_text(model, prompt, new, ends=0):
    """What a model writes, by transformers' own loop: one row, no padding, no cache."""
    ids = torch.tensor([prompt])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                          do_sample=False, use_cache=False, eos_token_id=ends, pad_token_id=0)
    return text[0, len(prompt):].tolist()


def coded_texts(model, prompts):
    """Greedy texts of 6 tokens -> (ids, labels already shifted) as for model_losses: what was
    written counts alone."""
    coded = []
    for prompt in prompts:
        ids = torch.tensor(prompt + greedy_text(model, prompt, 6))
        labels = ids.roll(-1)
        labels[[*range(len(prompt) - 1), -1]] = -100
        coded.append((ids, labels))
    return coded


def biased(path, token, bias, **fields):
    """A tiny model whose head has a bias, which is 0 for all other tokens."""
    tiny_model(path, cls="PhiConfig", resid_pdrop=0.0, embd_pdrop=0.0, **fields)
    edit_weights(path, lambda tensors: tensors["lm_head.bias"][token].fill_(bias))
    return path


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_on_policy_a_step_is_the_divergence_on_the_students_texts(out, trio, divergence):
    """Loss and gradients against float64 on full logits, the texts written by hand; whatever alpha
    is, labels count for nothing."""
    distil(out, **trio, **WRITING, max_steps=1, on_policy_temperature=GREEDY, temperature=2.0,
           divergence=divergence, alpha=0.3, max_grad_norm=0, learning_rate=STILL, batch_size=4,
           gradient_accumulation_steps=2)
    rows, _ = rows_of(trio["dataset"], seq_len=32)
    prompts = [ids_of(rows)[i][:5] for i in sd.batch_of_step(len(rows), 0, 8, 0)]
    model, teacher = [load(trio[role]).double() for role in ("student", "teacher")]
    _, ce, kl = model_losses(model, teacher, coded_texts(model, prompts), 0.0, 2.0, divergence)
    kl.backward()
    assert logged_losses(log(out, "train")[0]) == pytest.approx(
        [kl.item(), ce.item(), kl.item()], rel=1e-6)
    expected = {f"exp_avg.model.{name}": p.grad for name, p in model.named_parameters()}
    assert distance(gradients(out), expected) < 1e-6


def test_on_policy_the_student_writes_as_it_is_at_that_step(tmp_path, out, text):
    """A first step makes it sure of one letter: the texts of the second consist of it. Written any
    earlier, they would be the most unlikely."""
    q = tiny_tokenizer().encode("q")[0]
    distil(out, teacher=biased(f"{tmp_path}/teacher", q, 100, seed=1),
           student=biased(f"{tmp_path}/student", q, 0, seed=2), dataset=text, **WRITING,
           max_steps=2, learning_rate=30, default_lr_multiplier=0,
           lr_multipliers=["lm_head.bias=1"])
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
    wide = padded(f"{tmp_path}/wide", student, 9)
    prompts = [[40, 50, 60], [70, 80, 90, 100, 110]] * 2000
    texts = written(wide, prompts, range(4000), 1, temperature)
    for i in range(2):
        logits = load(student)(torch.tensor([prompts[i]])).logits[0, -1].detach()
        expected = 2000 * (logits.double() / temperature).softmax(-1)
        counts = torch.bincount(torch.tensor(texts[i::2])[:, 0], minlength=len(expected))
        assert len(counts) == len(tiny_tokenizer())
        missed = counts - expected
        rare = expected < 5
        freedom = int((~rare).sum())
        assert freedom > 20
        squares = (missed.square() / expected)[~rare].sum()
        assert squares < freedom + 4 * math.sqrt(2 * freedom)
        assert missed[rare].sum().abs() < 4 * expected[rare].sum().sqrt()


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
    student = tiny_model(f"{tmp_path}/dropout", **DROPOUT, seed=3)
    model = load(student).eval()
    prompts = [list(range(40, 50)), [33, 200]]
    end = greedy_text(model, prompts[0], 9, ends=-1)[4]
    texts = [greedy_text(model, prompt, 9, end) for prompt in prompts]
    assert len(texts[0]) < len(texts[1]) == 9
    assert written(student, prompts, [0, 1], 9, temperature, {end},
                   gradient_checkpointing=recompute) == texts


@pytest.mark.parametrize("row", [
    "..##.|###.",   # a conversation: all before the last turn of the assistant
    "..|##",
    ".###|#####",   # plain text
    ".#|#",         # which is shorter than a prompt
    ".##.|#",
])
def test_on_policy_the_prompt_of_a_row(row):
    targets = np.array([c == "#" for c in row if c != "|"])
    row_of_run = {"input_ids": np.arange(len(targets)), "targets": targets}
    cfg = config.Config(on_policy=0.5, on_policy_prompt=4)
    assert sd.prompt_of(row_of_run, cfg) == list(range(row.index("|")))


def test_on_policy_what_is_written_counts_alone(student):
    """After each prompt, up to an end mark or max_new_tokens, and within seq_len."""
    cfg = config.Config(student=student, teacher=student, **WRITING, seq_len=12)
    rows = [{"input_ids": np.arange(10), "targets": np.arange(10) >= begin} for begin in (1, 7, 9)]
    with sd.process_group():
        root, _ = sd.load_model(cfg, "student")
        texts, other = [sd.rows_by_student(cfg, root, tiny_tokenizer(), rows, step, range(3))
                        for step in (3, 4)]
    assert ids_of(texts) != ids_of(other)
    for row, ids, prompt in zip(texts, ids_of(texts), (5, 7, 9)):
        assert ids[:prompt] == list(range(prompt))
        assert len(ids) == min(prompt + 6, 12) or ids[-1] == 0
        assert row["targets"].tolist() == [i >= prompt for i in range(len(ids))]


def test_on_policy_the_log_says_how_long_texts_are(out, trio):
    """Also where a resume comes between two lines of it."""
    fields = dict(**trio, on_policy=1, max_steps=4, log_steps=4, save_steps=2, on_policy_prompt=30,
                  max_new_tokens=6)
    distil(out, **fields)
    whole = quiet_log(out)
    entry, = log(out, "train")
    assert entry.keys() == TRAIN_KEYS | {"train/rollout_length", "train/rollout_cut"}
    assert 1 < entry["train/rollout_length"] < 3   # rows that are shorter themselves have room
    assert 0.5 < entry["train/rollout_cut"] <= 1
    distil(out, **fields, resume=f"{out}/checkpoints/step-00000002")
    assert quiet_log(out) == whole


def test_on_policy_steps_alternate_by_a_seeded_draw(out, trio, chat):
    """The others are as ever; the end marks that the student writes end its texts."""
    draws = [[int(sd.digest("on policy", seed, step), 16) < 2**63 for step in range(400)]
             for seed in (3, 4)]
    drawn = draws[0]
    assert 160 < sum(drawn) < 240
    assert drawn != draws[1]
    fields = trio | dict(dataset=chat, seq_len=128, seed=3, max_steps=8, learning_rate=STILL)
    plain = f"{out}-plain"
    distil(out, **fields, on_policy=0.5, max_new_tokens=4)
    distil(plain, **fields)
    entries = [log(folder, "train") for folder in (out, plain)]
    for entry, usual, by_student in zip(*entries, drawn[:8], strict=True):
        assert ("train/rollout_cut" in entry) == by_student
        if by_student:
            assert entry["train/loss"] == entry["train/kl_loss"]
        else:
            assert logged_losses(entry) == logged_losses(usual)


def test_on_policy_texts_end_where_those_of_student_or_teacher_end(tmp_path, out, trio):
    """By generation_config.json and by the tokenizer; final/ says so too."""
    tokenizer = tiny_tokenizer()
    for role, ends in (("teacher", [3, 70]), ("student", 80)):
        model = load(trio[role])
        model.generation_config.eos_token_id = ends
        trio[role] = f"{tmp_path}/{role}"
        model.save_pretrained(trio[role])
        tokenizer.save_pretrained(trio[role])
        tokenizer.eos_token = "<|im_start|>"   # 2: the student's
    distil(out, **trio, max_steps=1, **WRITING)
    assert load(f"{out}/final").generation_config.eos_token_id == [0, 2, 3, 70, 80]


def test_on_policy_a_student_that_takes_padding_for_text_is_refused(   # optional: blockwise
        out, trio, mix):
    err = distil(out, 2, **trio | dict(student=mix), **WRITING, trust_remote_code=True).err
    assert "MixForCausalLM" in err and "on_policy needs another" in err


@pytest.mark.parametrize("positions, rc", [(131, 0), (130, 2)])
def test_on_policy_a_table_of_positions_has_to_hold_a_long_prompt_and_new_tokens(
        tmp_path, out, trio, positions, rc):
    """seq_len 32 and 100 more: a long row goes on beside a short one; the last is not looked up."""
    trio["student"] = tiny_model(
        f"{tmp_path}/student", cls="GPT2Config", max_position_embeddings=positions)
    shown = distil(out, rc, **trio, on_policy=1, max_new_tokens=100, max_steps=1)
    assert ("as a writer, at up to 131 positions" in shown.err) == (rc == 2)


@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op"])
def test_on_policy_two_ranks_write_what_one_writes(out, trio, chat, fsdp):
    """And end with the same weights; a rank without a row of its own takes part."""
    fields = trio | dict(dataset=chat, seq_len=128, on_policy=0.7, max_new_tokens=20, max_steps=6,
                         max_samples=7, gradient_checkpointing=True)
    two = f"{out}-two"
    distil(out, **fields, batch_size=6)
    shown = distil_apart(two, ranks=2, **fields, fsdp=fsdp, batch_size=3).wait()
    assert_close(two, out, shown)
    for key in ("train/rollout_length", "train/rollout_cut"):
        assert column(two, key) == column(out, key)


def test_on_policy_a_rank_whose_texts_end_at_once_waits_for_the_other(tmp_path, out, text):
    """Half of the first tokens are the end: of one text a rank, each often ends long before the
    other's."""
    teacher, student = [
        biased(f"{tmp_path}/{seed}", 0, math.log(263), seed=seed, initializer_range=0.02)
        for seed in (1, 2)]
    shown = distil_apart(
        out, ranks=2, teacher=teacher, student=student, dataset=text, on_policy=1,
        max_new_tokens=24, max_steps=12, batch_size=1).wait()
    assert "done in" in shown, shown
    lengths = column(out, "train/rollout_length")
    assert min(lengths) == 1 and max(lengths) > 2, lengths
    assert column(out, "train/rollout_cut")[lengths.index(1)] == 0   # all have ended
    assert len({length % 1 for length in lengths}) == 2   # an odd sum: they were not as long


def test_on_policy_comes_after_the_blocks(out, trio):   # optional: blockwise
    distil(out, **trio, **WRITING, blockwise=True, epochs_per_block=0.2, lm_head_epochs=0.2,
           max_steps=2)
    by_student = ["train/rollout_cut" in entry for entry in log(out, "train")]
    assert by_student == [False] * (len(by_student) - 2) + [True, True] and len(by_student) > 4


@pytest.mark.parametrize("words", [
    "--packing rows",   # some documents are shorter than the prompt
    "--streaming",   # optional: streaming
])
def test_on_policy_of_rows_of_any_kind(out, trio, words):
    distil(out, 0, words, **trio, **WRITING, max_steps=1)
    assert 1 <= column(out, "train/rollout_length")[0] <= 6


def test_on_policy_dry_run_shows_what_the_student_writes(out, trio):
    shown = distil(out, **trio, **WRITING, max_steps=2, dry_run=True).out
    assert re.search(r"the student wrote: .*\[\[.+\]\]", shown)
    assert re.search(r"a step on policy takes \S+ s, \S+ of them to write", shown)
    assert not os.path.exists(out)


def test_on_policy_eval_scores_the_students_own_texts(out, trio):   # optional: eval
    """Against whole forwards of what it writes by hand."""
    cli(*flags(mode="eval", **trio, max_new_tokens=6, on_policy_prompt=5, seq_len=32, dtype="fp32",
               on_policy_temperature=GREEDY, temperature=2.0, divergence="reverse", output_dir=out))
    found = sd.read_json(f"{out}/report.json")["models"]
    _, held_out = rows_of(trio["dataset"], seq_len=32)
    model = load(trio["student"])
    coded = coded_texts(model, [ids[:5] for ids in ids_of(held_out)])
    kl = model_losses(model, load(trio["teacher"]), coded, 0.0, 2.0, "reverse")[2].item()
    assert found["student"]["own"] == pytest.approx(kl, rel=1e-5)
    assert found["teacher"]["own"] == 0


# ---- what it costs


def bench_on_policy():
    """Writing against transformers' own generate, same model and prompts."""
    shape, _, sequences, tokens = step_sizes()
    vocab = shape.vocab_size
    new = tokens // 2
    ids_BT = torch.randint(0, vocab, (sequences, tokens // 4), device=DEVICE)
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        shape.save_pretrained(folder)
        cfg = sd.Config(student=f"{folder}/config.json", alpha=1.0)
        root, _ = sd.load_model(cfg, "student")
        model = AutoModelForCausalLM.from_config(
            root.model.config, dtype=sd.compute_dtype(cfg)).to(DEVICE).eval()

        def plain():
            model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new,
                           do_sample=True, top_k=0, pad_token_id=0)

        def ours():
            sd.write_texts(root, ids_BT.tolist(), range(sequences), [new] * sequences, 1.0, set(),
                           vocab)

        found = interleaved({"plain generate": plain, "ours": ours}, rounds=5)
    print(f"\nwriting {sequences} x {new} tokens after {tokens // 4}, V {vocab:,}")
    print_speeds(found, sequences * new, "tokens/s", "plain generate")


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
sd.PAUSE = 1e-4   # the tests of this process wait for no server
PRICES = dict(price_in=20, price_out=100)   # USD a million tokens
REPLY_COST = 0.022                          # of 100 tokens in and 200 out


ANSWERS = {
    "openai": """{"choices": [{
        "finish_reason": "FINISH", "message": {"role": "assistant", "content": CONTENT}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 200}}""",
    "anthropic": """{
        "content": [{"type": "text", "text": CONTENT}], "stop_reason": "FINISH",
        "usage": {"input_tokens": 100, "output_tokens": 200}}""",
}


def answer_of(provider, content, finish="stop", **more):
    """The JSON of a reply; more: in place of its keys."""
    answer = ANSWERS[provider].replace("CONTENT", json.dumps(content)).replace("FINISH", finish)
    return json.dumps(json.loads(answer) | more)


def no_fault(prompt, attempt):
    return "ok"


class ApiServer(Loopback):
    """OpenAI and Anthropic on loopback, while it is entered. It would send a bill for all but
    statuses below 500.

    fault(prompt, attempt): how this attempt misbehaves, the status of an error, JSON that is the
    whole answer, or a name: see ApiHandler and FAULTY_TEXTS; any other name: not at all.
    reply(prompt): what is said otherwise. jitter: seconds before an answer, at most. reply_cost:
    where it is set out/summary.json must tell of at least as much as was billed, and of at most 1
    USD, at any moment."""
    at_work = jitter = reply_cost = 0

    def __init__(self, fault=no_fault):
        super().__init__(ApiHandler)
        self.fault = fault
        self.reply = random_words
        self.lock = threading.Lock()
        self.tries = collections.Counter()    # prompt -> requests
        self.billed = collections.Counter()   # prompt -> requests that a provider would bill
        self.unpaid = []                      # (bill, spent_usd) where they are not as they should

    def check(self):
        bill = self.billed.total() * self.reply_cost
        if bill and not bill <= spent() + 1e-9 <= 1 + 2e-9:
            self.unpaid.append((bill, spent()))


class ApiHandler(LoopbackHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        key = self.headers["x-api-key"] or self.headers["authorization"].split()[1]
        with server.lock:
            server.at_work += 1
            server.seen = body, key   # the last request
            server.tries[prompt] += 1
            fault = str(server.fault(prompt, server.tries[prompt]))
            server.billed[prompt] += not fault.startswith("4")
            server.check()
        time.sleep(server.jitter * random.random())
        text = FAULTY_TEXTS.get(fault, server.reply(prompt))
        with server.lock:
            server.at_work -= 1
        if fault == "drop":
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(int(fault) if fault.isdigit() else 200)
        data = fault
        if fault.isdigit():
            data = json.dumps({"error": {"message": f"{fault} for {key}"}})
        elif not fault.startswith("{"):
            provider = "anthropic" if self.path == "/v1/messages" else "openai"
            more = {"usage": None} if "usage" in fault else {}
            data = answer_of(provider, text, fault, **more)
        data = data.encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        for start in range(0, len(data), 20):
            self.wfile.write(data[start:start + 20])
            if fault == "slow":
                self.wfile.flush()
                time.sleep(0.1)


def generate_fields(folder, server, questions, provider="openai", **more):
    """Writes a file of so many questions -> the flags of a run that asks the server all of them,
    output_dir folder/out; `more` replaces and adds flags."""
    folder.mkdir(exist_ok=True)
    lines = [f"Question {i}: what is {random_words(i, 4)}?\n" for i in range(questions)]
    (folder / "prompts.txt").write_text("".join(lines))
    return dict(
        mode="generate", provider=provider, api_model="m", max_tokens=300,
        api_base=f"http://127.0.0.1:{server.server_port}",
        prompts_file=folder / "prompts.txt", output_dir=folder / "out") | more


def run_generate(words, named=None):
    """named: what its one line of error names -> Result"""
    result = cli(*words, rc=2 if named else 0)
    assert not named or re.search(f"(?m)^error: .*{re.escape(named)}", result.err)
    return result


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The test runs in tmp_path."""
    monkeypatch.chdir(tmp_path)
    with ApiServer() as server:
        yield server


@pytest.fixture
def ask(tmp_path, server):
    """ask(questions, ...): a run of generate_fields, into out"""
    def ask(*what, named=None, **more):
        return run_generate(flags(**generate_fields(tmp_path, server, *what, **more)), named)

    return ask


def kept(out="out"):
    return read_lines(f"{out}/train.jsonl")


def replies(out="out"):
    """The rows of replies.jsonl, but for what a kill has left of one."""
    rows = []
    for line in Path(out, "replies.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def spent():
    return sd.read_json("out/summary.json")["spent_usd"]


def prompt_of(row):
    return row["messages"][0]["content"]


def number_of(prompt):
    """"Question 7: what is ...?" -> 7"""
    return int(prompt.split()[1].removesuffix(":"))


def reasons():
    """{number of a question: why}, without what "failed: ..." goes on to say"""
    return {number_of(prompt_of(row)): row["reason"].split(":")[0]
            for row in read_lines("out/rejected.jsonl")}


FAULTS = (   # the first 8 pass; 11 meets none of the first 16: else nobody would have been answered
    '429,500,502,503,504,529,drop,drop,'
    'no usage,length,{"choices": [{"mess,refusal,duplicate,code,empty,loop').split(",")


def faults_by_chance(share):
    """-> fault of a server: this share of the prompts misbehaves, half of them at the first
    attempt, half of them at every attempt; which one it is hangs on the prompt alone."""
    def fault(prompt, attempt):
        number = int(hashlib.md5(prompt.encode()).hexdigest(), 16)   # even from 0 to 2**128
        i = int(number / share / 2**124)
        return FAULTS[i] if i < 16 and (i >= 8 or attempt == 1) else "ok"
    return fault


# ---- prompts and filters


def first_prompts(count, *categories, seed=0):
    """-> texts of prompts, {category: how many}"""
    prompts = list(itertools.islice(sd.compose_prompts(categories, seed), count))
    texts = [messages[0]["content"] for _, messages in prompts]
    return texts, collections.Counter(category for category, _ in prompts)


def test_generate_prompts(monkeypatch):
    """Distinct and balanced; asking for more only adds to them; weights are kept; a category that
    runs out says so."""
    texts, counts = first_prompts(20_000)
    assert len(set(texts)) == 20_000
    assert counts == dict.fromkeys(sd.TASKS, 20_000 // 8)
    assert first_prompts(50)[0] == texts[:50]
    assert first_prompts(50, seed=1)[0] != texts[:50]
    _, counts = first_prompts(60, "implement=2.0", "debug=.5e0", "explain")
    assert counts == {"implement": 35, "debug": 8, "explain": 17}
    monkeypatch.setattr(sd, "stdlib_functions", lambda rng: ["def f():\n    return 1\n"])
    with pytest.raises(sd.UserError, match="few more"):
        first_prompts(100_000, "explain")


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
        "give that",   # what the prompt asks to give back, but not half of it
        "ab " * 20,    # short: deflate needs some bytes itself
        *"""Sorry is a word of five letters.
I can't help but notice that your loop is quadratic: use a set.
I can't see a bug: it is right.
Unable to open the file: that is what the exception says.
Sorry if I repeat what you know: a trie
Sorry I missed the import; here it is: import os
As an AI pipeline, the function has three stages.
Unfortunately, the function is quadratic.
Sorry, the loop I wrote above is off by one.
I'm sorting the list first.
Not able to connect: I would check the port.
Declining is fine.""".splitlines(),
    ],
    "refusal": """I’m sorry, but I cannot help with this.
As an AI model, I do not.
I apologize, but I cannot help with that.
I can't provide that code, it is not mine to give.
I cannot fulfill this request.
I won't be able to help with this task.
I must decline.
Unfortunately, I can't do that for you today.
I'm sorry, but I can’t assist with that request.
I am very sorry, I am not able to write malware.
I’m afraid I can not comply with this request.
I apologise for the inconvenience, but I am unable to provide it.
I have to decline this one.
As an AI language model, I have no opinion.
Sorry, as an AI assistant made by X, I will not.""".splitlines(),
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


@pytest.mark.parametrize("finish_reason, verdict", dict(
    stop=None, length="cut off", max_tokens="cut off", model_context_window_exceeded="cut off",
    refusal="refusal", content_filter="refusal").items())
def test_generate_filters_by_what_the_server_says(finish_reason, verdict):
    assert sd.find_flaw("Why?", "x" * 20, finish_reason, min_chars=20) == verdict
    assert sd.find_flaw("Why?", "x" * 19, "stop", min_chars=20) == "empty or too short"


def test_generate_duplicates():
    """What a sign tells apart is no duplicate, nor is a label that fits many prompts, though they
    begin alike; what says little new is one."""
    seen = set()

    def is_new(reply, prompt="more"):
        return not sd.find_duplicate(prompt, reply, seen)

    question = "Here is a long question, and always the same, is {} prime?".format
    for i in range(9):
        assert is_new("yes", question(i))
    assert not is_new("Yes", question(8))
    assert is_new("return a < b")
    assert is_new("return a >= b")
    code = "for (i = 0; i {} n; i++) {{ total += table[i]; }} return total; "
    code += random_words("code", 6)
    assert is_new(code.format("<"))
    assert not is_new(code.format("<"), "other")
    assert is_new(code.format(">="))
    words = random_words("near", 400)
    assert is_new(words)
    assert not is_new(words + " and nothing else")
    assert is_new(words + random_words("end", 60))
    words = words.split()
    assert is_new(" ".join(words[:19]))   # as short, a reply is one with its prompt
    assert not is_new(" ".join(words[:20]))


HEAP = '{"prompt": "What is a heap?"}'
TRIE = (
    '{"category": "explain", "more": 1, "messages": [{"role": "system", "content": "Be brief."}, '
    '{"role": "system", "content": [{"type": "text", "text": "Be "}, {"text": "kind."}]}, '
    '{"role": "user", "content": "What is a trie?"}]}')


@pytest.mark.parametrize("provider, name, text, turns, more", [
    ("openai", "own.jsonl", f"{HEAP}\n\n{HEAP}\n{TRIE}", 3, {"temperature": 0.3}),
    ("anthropic", "own.json", f"[{HEAP}, {HEAP}, {TRIE}]", 1, {"system": "Be brief.\n\nBe kind."}),
])
def test_generate_own_rows(ask, server, provider, name, text, turns, more):
    """Texts or conversations reach each provider in its form, in all kinds of files."""
    Path(name).write_text("\ufeff" + text)
    ask(0, provider, prompts_file=name, api_temperature=more.get("temperature"), concurrency=1)
    assert [[turn["content"] for turn in row["messages"][:-1]] for row in kept()] == [
        ["What is a heap?"], ["Be brief.", "Be kind.", "What is a trie?"]]
    assert [row["category"] for row in kept()] == ["own", "explain"]
    body, _ = server.seen
    assert len(body.pop("messages")) == turns
    assert body == {"model": "m", "max_tokens": 300} | more


def test_generate_own_lines(ask, server):
    """All of a .txt unless num_examples says less; a short reply may be what it wants, to a task of
    ours it is none."""
    server.reply = lambda prompt: "```yes```"
    Path("own.txt").write_text("\ufeffIs 1 odd?\n\nIs 2?\r\nIs 3?\nIs 1 odd?\n")
    ask(0, prompts_file="own.txt", num_examples=2)
    assert len(server.tries) == 2
    ask(0, prompts_file="own.txt")
    asked = list(map(prompt_of, kept()))
    assert asked == ["Is 1 odd?", "Is 2?", "Is 3?"]
    assert server.tries == dict.fromkeys(asked, 1)
    ask(0, num_examples=1, prompts_file=None, categories="implement=1.0", output_dir="ours")
    rejected, = read_lines("ours/rejected.jsonl")
    assert (rejected["reason"], rejected["category"]) == ("empty or too short", "implement")


BAD_PROMPTS = """{"prompt": 3}
{"prompt": null}
[]
7
nonsense
{"question": 1}
{"messages": "hi"}
{"messages": [{"role": "user"}]}
{"messages": [{"role": "user", "content": [{"type": "image"}]}]}
{"messages": [{"role": "assistant", "content": "x"}]}"""


@pytest.mark.parametrize(
    "line", [*BAD_PROMPTS.splitlines(), '{"n": ' + "9" * 5000 + "}", "[" * 99999])
def test_generate_bad_prompt(ask, server, line):
    """Nobody is asked, and the row is named."""
    Path("p.jsonl").write_text('{"prompt": "ok"}\n' + line + "\n")
    ask(0, prompts_file="p.jsonl", named="p.jsonl', row 2: ")
    assert not server.tries


# ---- replies


@pytest.mark.parametrize("provider", [
    "openai",
    pytest.param("anthropic", marks=pytest.mark.campaign),
])
def test_generate_faults(ask, server, provider):
    """30 % faults: all prompts answered or accounted for, none twice, and the order of arrival
    changes nothing."""
    server.fault = faults_by_chance(0.3)
    results = []
    for concurrency in (16, 40):
        server.tries.clear()
        server.jitter = concurrency / 1000
        out = ask(300, provider, concurrency=concurrency).out
        why = reasons()
        assert sorted([*map(number_of, map(prompt_of, kept())), *why]) == list(range(300))
        fates = collections.Counter(why.values())
        assert set(fates) == set("cut off,refusal,empty or too short,duplicate,repetition loop,"
                                 "code does not parse,failed".split(","))
        fates["kept"] = len(kept())
        for name, count in fates.items():
            assert re.search(rf"\| *{name} *\| *{count} *\|", out)
        for prompt, tries in server.tries.items():
            assert tries == 1 + (server.fault(prompt, 1) in FAULTS[:8]), prompt
        results.append((kept(), why))
        shutil.rmtree("out")
    assert results[0] == results[1]
    row = results[0][0][0]
    assert set(row) == set(
        "messages category model usage cost finish_reason prompt_id".split())
    assert row["usage"] == USAGE


def test_generate_concurrency(ask, server):
    """So many are in flight at once, and no more."""
    barrier = threading.Barrier(8, timeout=60)
    at_once = []

    def reply(prompt):
        barrier.wait()
        at_once.append(server.at_work)
        return random_words(prompt)

    server.reply = reply
    ask(16)   # --concurrency is 8
    assert len(kept()) == 16
    assert max(at_once) == 8


USAGE = {"prompt_tokens": 100, "completion_tokens": 200}
CONTENTS = json.loads("""{
    "ab": [{"text": "a"}, {"type": "text", "text": "b"}],
    "b": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "b"}],
    "": null}""")   # what is read of it: what the server sends


@pytest.mark.parametrize("usage", [
    USAGE, None, *({**USAGE, "prompt_tokens": n} for n in (None, -1, 10**30, "10"))])
def test_generate_odd_answers(ask, server, usage):
    """Parts of text are one text; what a model thought is no part of it. Who says nonsense of
    tokens is believed to have sent the longest reply."""
    contents = list(CONTENTS.values())
    server.fault = lambda prompt, _: answer_of("openai", contents[number_of(prompt)], usage=usage)
    ask(3, concurrency=1, **PRICES)
    for row, reply in zip(replies(), CONTENTS, strict=True):
        assert row["messages"][1] == {"role": "assistant", "content": reply}
        assert row["usage"] == (USAGE if usage == USAGE else None)
        assert (row["cost"] > 300 * 100 / 1e6) == (usage != USAGE)


# ---- money


@pytest.mark.parametrize("faults, worst, answers, failed", [
    # how the attempts at one prompt end; what is spent: so many worst cases, and replies
    ("ok", 0, 1, False),
    ("429 429 ok", 0, 1, False),
    ("drop 429 ok", 1, 1, False),       # a refusal gives back one try, not all
    ("500 502 drop ok", 3, 1, False),   # whoever stands before a model may say 502
    ("slow ok", 1, 1, False),
    ("no_usage", 1, 0, False),
    ("429 " * 8, 0, 0, True),
    ("503 " * 8, 8, 0, True),
    ("400", 0, 0, True),
    ("{", 1, 0, True),
    ("drop", 1, 0, None),               # no money for another: nothing is known
    ("", 0, 0, None),
])
def test_generate_spends(ask, server, faults, worst, answers, failed):
    """What is on the bill, or may be, is in spent_usd and in the row; what was refused is not."""
    max_cost = {"drop": 0.05, "": 0.03}.get(faults, 1)   # of one try, and of none
    faults = faults.split()
    server.fault = lambda prompt, attempt: faults[attempt - 1]
    ask(1, **PRICES, max_cost=max_cost, request_timeout=1, named="no reply" if failed else None)
    messages = [{"role": "user", "content": Path("prompts.txt").read_text().strip()}]
    size = 64 + len(json.dumps(messages))
    expected = pytest.approx(
        worst * (size * 20 + 300 * 100) / 1e6 + answers * REPLY_COST, abs=1e-9)
    assert spent() == expected
    rows = [("reason" in row, row["cost"]) for row in replies()]
    assert rows == ([] if failed is None else [(failed, expected)])
    assert server.tries.total() == len(faults)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_cap(ask, server, provider):
    """At every moment: the server's bill <= spent_usd on disk <= 1.00 USD, whatever goes wrong, and
    most of it is used."""
    server.fault = faults_by_chance(0.5)
    server.reply_cost = REPLY_COST
    run = functools.partial(ask, 200, provider, concurrency=16, max_cost=1, **PRICES)
    assert "max_cost 1" in run().out
    assert 0.7 < server.billed.total() * REPLY_COST <= spent() <= 1
    answered = set(map(prompt_of, replies()))
    assert 20 < len(answered) < 60
    server.tries.clear()
    run()   # what late answers gave back buys some more
    assert server.unpaid == []
    assert len(server.tries) <= 3
    assert not answered & set(server.tries)


def test_generate_failed(ask, server):
    """What failed is asked again by the same command, its cost is not forgotten, and what fails
    always stops no later run."""
    lasting = dict.fromkeys(range(4, 61, 5), 400)   # a dozen, in the second run in a row
    faults = lasting | {5: "{", 7: '{"error": "x"}'}
    server.fault = lambda prompt, _: faults.get(number_of(prompt))
    ask(60, concurrency=1, **PRICES)
    before = spent()
    assert reasons() == dict.fromkeys(faults, "failed")
    expected = {*faults, 60}
    faults = lasting
    server.tries.clear()
    ask(61, concurrency=1, **PRICES)
    assert set(map(number_of, server.tries)) == expected
    assert reasons() == dict.fromkeys(lasting, "failed")
    assert spent() == pytest.approx(before + 3 * REPLY_COST)


@pytest.mark.parametrize("provider, fault, answers, named", [
    ("openai", 401, 0, "401"),
    ("anthropic", 404, 0, "404"),
    ("openai", '{"error": {"message": "your credits are used up"}}', 0, "credits are used up"),
    ("anthropic", '{"error": {"message": "no credits"}}', 0, "no credits"),
    ("openai", 400, 9, "400"),
])
def test_generate_stops(ask, server, provider, fault, answers, named):
    """Where nobody was ever answered, or ten in a row are not, the run ends; what came is kept; and
    after that another setting may be tried."""
    server.fault = lambda *_: fault if server.tries.total() > answers else "ok"
    ask(50, provider, concurrency=3, named=named)
    assert len(kept()) == answers
    tries = server.tries.total() - answers
    assert 10 <= tries <= 12 if answers else tries <= 3
    server.fault = no_fault
    ask(50, provider, api_model="m" if answers else "other")
    assert len(kept()) == 50


def test_generate_time_out(ask, server):
    """An answer that trickles is given up like one that does not come, in words."""
    server.fault = lambda *_: "slow"
    ask(1, request_timeout=0.2, named="no reply (a try has 0.2 s): TimeoutError")
    assert server.tries.total() == 8


@pytest.mark.parametrize("status", ["ok", 429])
def test_generate_signal(ask, server, status):
    """SIGTERM: what is in flight arrives, nothing new is asked, exit 0, also between two tries; the
    same command goes on."""
    def stop(*_):
        if server.tries.total() == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            return status

    server.fault = stop
    server.jitter = 0.05
    ask(40, concurrency=3)
    assert 5 <= len(kept()) <= 8
    ask(40, concurrency=3)
    assert len(kept()) == 40
    assert set(server.billed.values()) == {1}


# Dies when it comes to this many different lines of the loop of tries, and of what writes the money
# and the replies.
DIES_ASKING = """
PAUSE = 1e-4
lines = set()
loop = [function.__code__ for function in (
    ask_api, Asking.change, Asking.record, read_answer, write_json, append_jsonl, read_replies,
    sort_out)]

def watch(frame, event, value):
    if frame.f_code in loop:
        lines.add((frame.f_code, frame.f_lineno))
        if len(lines) == {number}:
            os.kill(os.getpid(), 9)
        return watch

sys.settrace(watch)
"""


@pytest.mark.campaign
def test_generate_killed_at_every_line(server, tmp_path):
    """kill -9 at each line of the loop of tries, with all kinds of faults: at any moment billed <=
    spent_usd <= max_cost; the same command goes on, and asks nothing twice that was answered."""
    kinds = "ok,429,500,drop,no usage,{,400,502,ok,ok".split(",")
    tries_of_answered = {}   # as they were when the answer was there
    server.fault = lambda *_: kinds[server.tries.total() % len(kinds)]
    server.reply_cost = 1.1e-4
    fields = generate_fields(
        tmp_path, server, 600, concurrency=3, max_cost=1, price_in=0.1, price_out=0.5)
    for number in itertools.count(4):   # replies.jsonl is there
        words = flags(**fields, num_examples=len(tries_of_answered) + 40)
        change = DIES_ASKING.format(number=number)
        if "what became of it" in Fork(tmp_path / f"{number}.txt", *words, change=change).wait():
            break
        while server.at_work:
            time.sleep(0.01)
        server.check()
        for row in replies():
            if "reason" not in row:
                prompt = prompt_of(row)
                tries_of_answered.setdefault(prompt, server.tries[prompt])
    server.fault = no_fault
    run_generate(flags(**fields))
    assert server.unpaid == []
    assert len(kept()) == 600
    assert len(tries_of_answered) > 50
    assert tries_of_answered.items() <= server.tries.items()
    assert number > 70   # nearly all; an outage of all eight tries is another test's


# ---- what stands in the folder


def test_generate_half_rows(tmp_path):
    """What a kill leaves of a row is passed over, and spoils none that is written after it."""
    path = tmp_path / "replies.jsonl"
    for tail, ids in ((b'{"prompt_id": "b"}', "ab"), (b'{"prompt_id": "\xc3', "a"), (b"", "a"),
                      (b'{"prompt_id": "a", "n": 2}\n', "a")):
        path.write_bytes(b'{"prompt_id": "a", "n": 1}\n' + tail)
        assert "".join(sd.read_replies(path)) == ids
        sd.append_jsonl(path, {"prompt_id": "c"})
        rows = sd.read_replies(path)
        assert "".join(rows) == ids + "c"
        assert rows["a"]["n"] == 1 + tail.endswith(b"\n")   # the last one counts


def test_generate_file_limit(ask, server, tmp_path):
    """As on a full disk: one line, all that is there is whole, and the same command goes on."""
    server.reply = lambda prompt: random_words(prompt, 400)
    server.reply_cost = 3e-4
    words = flags(**generate_fields(
        tmp_path, server, 30, concurrency=4, max_cost=1, price_in=1, price_out=1))
    shown = Fork(tmp_path / "log", *words, limit=60_000).wait()
    assert "error: OSError: [Errno 27]" in shown and "Traceback" not in shown, shown
    answered = dict.fromkeys(map(prompt_of, replies()), 1)
    assert 5 < len(answered) < 30
    run_generate(words)
    assert len(kept()) == 30
    assert answered.items() <= server.tries.items()
    assert server.unpaid == []


def test_generate_other_settings(ask, monkeypatch):
    """What decides the rows is the same for all of a folder; where the server stands, how many are
    asked and how much may be spent is not of that kind; nor are the filters: old replies are judged
    again, and nobody is asked."""
    ask(2)
    with ApiServer() as other:   # at another port
        ask = functools.partial(ask, 3, api_base=f"http://127.0.0.1:{other.server_port}")
        for named in ("api_model 'm' there, 'other' here", "seed 0 there, 7 here",
                      "api_temperature None there, 0.5 here", "max_tokens 300 there, 301 here"):
            name, *_, here, _ = named.replace("'", "").split()
            ask(named=named, **{name: here})
        assert not other.tries
        ask(concurrency=2, price_in=1, price_out=1, max_cost=1)
        assert len(kept()) == 3
        monkeypatch.setattr(sd, "is_loop", lambda reply: True)
        ask()
        assert other.tries.total() == 1
    assert kept() == []
    assert list(reasons().values()) == ["repetition loop"] * 3


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_secrets(ask, server, monkeypatch, provider):
    """The key, and the password of a proxy, stand in no file and no output, wherever in a reply or
    an error a server repeats it; no escape sequence reaches the terminal."""
    key = "sk-test-0123456789abcdef"
    monkeypatch.setenv(f"{provider.upper()}_API_KEY", key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:proxy-word@127.0.0.1:1")
    words = ["ok", '{"\x1b[31m' + key, 400, answer_of(provider, key + random_words("key")),
             f'{{"choices": [{{"message": {{"content": "{key}"}}, "finish_reason": "{key}"}}]}}']
    server.fault = lambda prompt, _: words[number_of(prompt) % 5]
    results = [*ask(20, provider, concurrency=1)]
    assert server.seen[1] == key
    server.fault = lambda *_: 401
    results += ask(1, provider, named="401 for ***", output_dir="out-refused")
    assert len(replies()) == 20
    monkeypatch.setenv("ALL_PROXY", "socks9://someone:proxy-word@127.0.0.1:1")
    left_over = []
    monkeypatch.setattr(sys, "unraisablehook", left_over.append)
    results += ask(1, provider, named="making a client", output_dir="out-proxy")
    gc.collect()
    assert left_over == []   # no traceback of a client that was never whole
    results += [path.read_text() for path in Path().glob("out*/*")]
    shown = "".join(map(str, results))
    assert "***" in shown
    for secret in (key, "proxy-word", "\x1b[31m"):
        assert secret not in shown


@pytest.mark.parametrize("case", [
    "categories: --categories poetry",
    "categories: --categories debug=0",
    "categories: --categories test=nan",
    "could not convert: --categories test=x",
    "none.txt: --prompts_file none.txt",
    "holds no prompt: --prompts_file /dev/null",
    "Connection error: ",
    "--teacher: --provider local",
])
def test_generate_errors(tmp_path, case):
    """What no request would survive is one `error:` line."""
    named, flags_ = case.split(": ")
    words = f"--mode generate --output_dir {tmp_path}/out --num_examples 2 {flags_}"
    if "local" not in case:
        words += " --api_model m --api_base http://127.0.0.1:9/v1"
    run_generate(words.split(), named)


# ---- a model of one's own


@pytest.fixture
def ask_local(ask):
    """ask_local(out, model, ...) -> {prompt: (reply, usage, finish_reason)}"""
    def ask_local(out, model, questions=11, **more):
        ask(questions, "local", teacher=model, api_model=None, api_base=None, output_dir=out,
            **dict(max_tokens=8) | more)
        return {prompt_of(row): (row["messages"][1]["content"], row["usage"], row["finish_reason"])
                for row in replies(out)}

    return ask_local


def test_generate_local(ask_local, teacher):
    """The same seed gives the same replies, whatever is beside them, after a stop, and with the
    weights on the host; another seed gives others; the end of a reply is told from a cut."""
    whole = ask_local("whole", teacher, seed=3, concurrency=4)
    assert len(set(reply for reply, *_ in whole.values())) > 5
    for prompt, (_, usage, finish_reason) in whole.items():
        assert usage["prompt_tokens"] == 1 + len(f"{prompt}\n\n")
        assert finish_reason == "stop" or usage["completion_tokens"] == 8
        assert finish_reason in ("stop", "length")
    assert len(ask_local("parts", teacher, 6, seed=3, concurrency=5, cpu_offload=True)) == 6
    assert ask_local("parts", teacher, seed=3, concurrency=3) == whole
    assert ask_local("other", teacher, seed=4) != whole
    likeliest = [ask_local(f"{seed}", teacher, seed=seed, api_temperature=0) for seed in (0, 1)]
    assert likeliest[0] == likeliest[1] != whole


def test_generate_local_temperature(ask_local, teacher):
    """Unset, it is that of the model's generation_config.json."""
    shutil.copytree(teacher, "model")
    sharp = transformers.GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=0)
    sharp.save_pretrained("model")
    unset = ask_local("unset", "model")
    assert unset == ask_local("half", teacher, api_temperature=0.5)
    assert unset != ask_local("one", teacher)


@pytest.mark.parametrize("named, shape", [
    ("79 positions", dict(cls="GPT2Config", max_position_embeddings=78)),
    ("nan", {}),
    ("no tokenizer", dict(tokenizer=False)),
])
def test_generate_local_bad_models(ask_local, named, shape):
    """One line before anything is written; what fits into the positions is answered."""
    model = tiny_model("model", **shape)
    if named == "nan":
        edit_weights(model, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    assert ask_local("out", model, 10, named=named, max_tokens=20) == {}
    if "cls" in shape:
        assert len(ask_local("out", model, 10, max_tokens=19)) == 10


def test_generate_local_without_an_end(ask_local):
    """No eos, no pad: a reply goes on to its last token."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    tiny_model("endless", tokenizer=tokenizer, eos_token_id=None, pad_token_id=None)
    for _, usage, end in ask_local("out", "endless", 2).values():
        assert (usage["completion_tokens"], end) == (8, "length")


def test_generate_then_train(ask, student):
    """generate -> --dataset out/train.jsonl --alpha 1 -> final/"""
    ask(60)
    distil("run", dataset="out/train.jsonl", alpha=1, student=student, max_steps=4, seq_len=128)
    assert os.path.exists("run/final/model.safetensors")


# --------------------------------------------------------------------------------------------------
# Optional: eval: how good is the student.


EVAL_VOCAB = 320   # of the teacher's tokenizer
# The names are those in eval_folder, where these tests run.
report_words = functools.partial(
    flags, mode="eval", teacher="teacher", dataset="data.jsonl", seq_len=48, batch_size=3)
ALL = dict(student="run/final", compare=["labels/final", "wide", "stranger"], temperature=2)


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    """data.jsonl with text in many scripts; teacher (with a padded head), student, wide (as wide as
    the teacher, another padded head) and stranger (with another tokenizer), all random; the runs
    run (a student of the teacher) and labels (a student of labels only); in found the report about
    all of them: seven tokens are scored at once."""
    folder = tmp_path_factory.mktemp("eval")
    words = ("the quick brown fox jumps größer über 日本語 naïve 🙂 wizards boil strange soup "
             "in green pots and sleep").split()
    pick = np.random.default_rng(0)
    texts = [" ".join(pick.choice(words, pick.integers(5, 60))) + "." for _ in range(300)]
    trained = tiny_tokenizer().train_new_from_iterator   # a token may end within a character
    tokenizer = trained(texts, EVAL_VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("data.jsonl", [{"text": text} for text in texts])
        # So loud that their predictions are far from even and from alike.
        for seed, (name, shape) in enumerate({
            "teacher": dict(hidden=32, layers=4, vocab=EVAL_VOCAB + 7),
            "student": dict(hidden=16, vocab=EVAL_VOCAB),
            "wide": dict(hidden=32, vocab=EVAL_VOCAB + 3),
            "stranger": dict(hidden=16, vocab=290, tokenizer=trained(texts[::3], 290)),
        }.items()):
            tiny_model(name, seed=seed, **dict(tokenizer=tokenizer) | shape,
                       num_attention_heads=4, bos_token_id=None, tie_word_embeddings=True,
                       initializer_range=0.6)
        train = functools.partial(
            distil, student="student", dataset="data.jsonl", seq_len=48, batch_size=3,
            max_steps=12, save_steps=6, eval_steps=4, learning_rate=3e-3)
        train("run", teacher="teacher")
        train("labels", alpha=1)
        patch.setattr(sd, "LOGITS_BUDGET", 7 * 24 * EVAL_VOCAB)
        cli(*report_words(output_dir="found", **ALL))
    return folder


def models_of(out):
    return sd.read_json(f"{out}/report.json")["models"]


@pytest.fixture
def reported(eval_folder, monkeypatch):
    """Of the report about all. The test runs in eval_folder."""
    monkeypatch.chdir(eval_folder)
    return models_of("found")


# ---- the same figures by hand


@pytest.fixture
def held_out(reported):
    """-> tokenizer, ids of the rows, the bytes of each"""
    tokenizer = transformers.AutoTokenizer.from_pretrained("teacher")
    rows = ids_of(rows_of("data.jsonl", tokenizer, seq_len=48)[1])
    texts = tokenizer.batch_decode([row[1:] for row in rows], skip_special_tokens=True)
    return tokenizer, rows, np.array([len(text.encode()) for text in texts])


@torch.no_grad()
def by_hand(path, rows):
    """In float64, of all tokens but the last of a row -> logits without padding [N, V], the states
    after each layer [N, width], the bits of each row"""
    model = load(path).double()
    logits, states, bits = [], [], []
    for row in rows:
        outputs = model(torch.tensor([row[:-1]]), output_hidden_states=True)
        logits.append(outputs.logits[0, :, :EVAL_VOCAB])
        states.append(outputs.hidden_states[1:])
        nats = F.cross_entropy(logits[-1], torch.tensor(row[1:]), reduction="sum")
        bits.append(nats / math.log(2))
    return torch.cat(logits), [torch.cat(layer, 1)[0] for layer in zip(*states)], np.array(bits)


def token_rows(rows):
    return [{"input_ids": np.array(row), "targets": np.arange(len(row)) > 0} for row in rows]


# ---- figures


@pytest.mark.parametrize("label, name", [
    ("student", "run/final"), ("labels", "labels/final"), ("wide", "wide"), ("teacher", "teacher"),
])
def test_eval_numbers_equal_full_float64_logits(reported, held_out, label, name):
    """KL is at temperature 2, times its square."""
    _, rows, sizes = held_out
    logits, _, bits = by_hand(name, rows)
    teacher_logits, _, _ = by_hand("teacher", rows)
    _, _, student_bits = by_hand("run/final", rows)
    labels = torch.tensor([i for row in rows for i in row[1:]])
    confidence, top = logits.softmax(-1).max(-1)
    right = (top == labels).double()
    # of the calibration, weighted by tokens
    gaps = (confidence * 15).long().bincount(right - confidence)
    _, _, kl = dense_losses(logits, teacher_logits, labels, alpha=0, temperature=2)
    figures = reported[label]
    agreed = (top == teacher_logits.argmax(-1)).double()
    expected = [len(labels), right.mean(), agreed.mean(), kl, gaps.abs().sum() / len(labels)]
    found = [figures[key] for key in "tokens accuracy agreement kl ece".split()]
    assert found == pytest.approx(list(map(float, expected)), rel=1e-5, abs=1e-6)
    against = figures["student_against_it"]
    for found, *expected in (
        (np.log2([figures["perplexity"], *figures["perplexity_95"]]), bits,
         np.array([len(row) - 1 for row in rows])),
        ([figures["bits"], *figures["bits_95"]], bits, sizes),
        ([against["difference"], *against["interval"]], student_bits - bits, sizes),
    ):
        assert list(found) == pytest.approx(sd.interval(*expected, 0), rel=1e-4, abs=1e-6)
    assert (against["verdict"] == "better") == (against["interval"][1] < 0)


def test_eval_teacher_against_itself_and_a_worse_student(reported):
    """Also where a batch is more than there is."""
    cli(*report_words(output_dir="self", student="teacher", compare="run/final",
                      batch_size=10**12, generate_comparisons=False))
    assert sd.read_json("self/report.json")["prompts"] == []
    teacher, student, run = models_of("self").values()
    assert (student["kl"], student["agreement"]) == (0, 1)
    assert student["perplexity"] == teacher["perplexity"]
    assert teacher["student_against_it"] == {
        "difference": 0, "interval": [0, 0], "verdict": "no significant difference"}
    assert run["student_against_it"]["verdict"] == "worse"
    for i, layer in zip((1, 2, 3, 4), student["layers"], strict=True):
        assert layer == pytest.approx(dict(student=i, teacher=i, cka=1, share=0), abs=1e-12)


def test_eval_layers_equal_a_direct_computation(reported, held_out):
    """CKA; the share that the best affine map leaves, without the tokens that it explains."""
    _, rows, _ = held_out
    _, teacher_states, _ = by_hand("teacher", rows)
    _, states, _ = by_hand("run/final", rows)
    for i, layer, x, y in zip(
            (1, 2), reported["student"]["layers"], states, teacher_states[1::2], strict=True):
        x = x - x.mean(0)
        y = y - y.mean(0)
        missed = y - x @ torch.linalg.lstsq(x, y).solution
        share = missed.square().sum() / (len(x) - x.shape[1] - 1) / y.square().sum() * len(x)
        cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
        expected = dict(student=i, teacher=2 * i, share=share.item(), cka=cka.item())
        assert layer == pytest.approx(expected, rel=1e-4)
    few = torch.randn(9, 8)   # a map of 8 rows and a bias explains 9 tokens, whatever they are
    assert sd.compare_states(few, few)[0] is None
    assert sd.compare_states(few[:, :7], few)[0] > 0


@pytest.mark.parametrize("bos", [True, False])
def test_eval_each_model_has_the_bos_of_its_own_tokenizer(tmp_path, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    tiny_tokenizer(bos=not bos).save_pretrained(tmp_path / "other")
    rows = token_rows([tokenizer(prose(20))["input_ids"]])
    found, _ = sd.rows_for(sd.Config(), str(tmp_path / "other"), tokenizer, rows)
    ids = [0 if bos else 1, *rows[0]["input_ids"][1:]]
    np.testing.assert_equal(found, [{**rows[0], "input_ids": np.array(ids), "starts": [0]}])
    same_rows, same = sd.rows_for(sd.Config(), str(tmp_path / "none.json"), tokenizer, rows)
    assert same_rows is rows and same is tokenizer


def test_eval_bits_of_two_tokenizers_are_of_the_same_bytes(reported, held_out):
    tokenizer, rows, sizes = held_out
    found, other = sd.rows_for(sd.Config(), "stranger", tokenizer, token_rows(rows))
    other_rows = ids_of(found)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert other.decode(other_row[1:]) == tokenizer.decode(row[1:])
        assert other_row[1:].count(0) == row[1:].count(0)
    *_, bits = by_hand("stranger", other_rows)
    assert sd.read_json("found/report.json")["setting"]["bytes"] == sizes.sum()
    figures = reported["stranger"]
    assert figures["bits"] == pytest.approx(bits.sum() / sizes.sum(), rel=1e-5)
    assert figures["kl"] is figures["agreement"] is None
    assert figures["layers"] == []


def test_eval_intervals_cover():
    """95 % of the intervals hold the true mean, as far as 200 trials can tell."""
    draw = np.random.default_rng(12)
    covered = 0
    for trial in range(200):
        # sequences of many lengths, skewed losses that hang together within one
        lengths = draw.integers(20, 60, 12)
        noise = draw.lognormal(-0.08, 0.4, 12)   # whose mean is 1
        _, low, high = sd.interval(2 * lengths * noise, lengths, trial)
        covered += low <= 2 <= high
    assert 180 <= covered <= 198


def test_eval_continuations(reported, held_out):
    """Greedy, then sampled, after the beginnings of three rows; within the length of a row."""
    tokenizer, rows, _ = held_out
    model = load("run/final")
    shown = Path("found/report.md").read_text()
    for row, prompt, texts in zip(
            rows[::math.ceil(len(rows) / 3)], sd.read_json("found/report.json")["prompts"],
            reported["student"]["texts"], strict=True):
        assert prompt == tokenizer.decode(row[:32])
        new = model.generate(torch.tensor([row[:32]]), do_sample=False, max_new_tokens=17)[0, 32:]
        assert texts[0] == tokenizer.decode(new).split("<|endoftext|>")[0] != texts[1]
        assert f"    {prompt!r}\n" in shown and f"    student: {texts[1]!r}\n" in shown
    a_chat = {"input_ids": np.arange(60), "targets": np.arange(60) > 39}
    assert sd.beginnings([a_chat]) == [list(range(40))]


# ---- files


def test_eval_report_files(reported):
    """report.md shows the figures of report.json; report.png has the third model's colour in each
    of its four panels."""
    text = Path("found/report.md").read_text()
    _, _, *lines = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"]
    cells = {title.strip(): row for title, *row in lines}
    for key, title in sd.METRICS.items():
        for figures, cell in zip(reported.values(), cells[title], strict=True):
            shown, *_ = cell.replace(", ", " ").replace(",", "").split()
            value = figures[key]
            assert shown == "-" if value is None else float(shown) == pytest.approx(value, rel=6e-4)
    ratio = reported["student"]["bits"] / reported["teacher"]["bits"]
    assert f"), {ratio:.4g} x" in cells["bits a byte"][1]
    against = reported["wide"]["student_against_it"]
    assert ("wide: {difference:+.4f} bits a byte ({interval[0]:+.4f} to {interval[1]:+.4f}): "
            "{verdict}\n").format(**against) in text
    curves = reported["student"]["curves"]
    assert [len(curves[key]) for key in list(sd.CURVES)[:5]] == [12, 12, 3, 2, 2]

    from matplotlib import image
    pixels = image.imread("found/report.png")[..., :3]
    green = np.abs(pixels - np.array([0x2c, 0xa0, 0x2c]) / 255).max(-1) < 0.05
    assert (green.reshape(2, 500, 2, 650).sum((1, 3)) > 100).all()


def test_eval_what_cannot_be_written_is_one_error_and_the_picture_comes_last(reported, monkeypatch):
    os.makedirs("unwritable/report.png")
    words = report_words(output_dir="unwritable", student="run/final")
    assert "no .simple_distill" in cli(*words, rc=2).err   # nobody's file is replaced
    Path("unwritable/.simple_distill").touch()
    assert "report.png" in cli(*words, rc=2).err
    assert {"report.md", "report.json"} <= {*os.listdir("unwritable")}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in cli(*words).out


# ---- what may be reported on


def test_eval_takes_a_checkpoint_of_a_run_and_leaves_its_folder_as_it_is(reported):
    """The last checkpoint is final/; an earlier one is another model; a broken one is refused."""
    before = Path("run/config.json").read_text()
    for step in (6, 12):
        path = f"run/checkpoints/step-{step:08d}"
        cli(*report_words(output_dir="run", student=path, compare="run/final"))
        _, student, run = models_of("run").values()
        assert math.isclose(student["perplexity"], run["perplexity"], rel_tol=1e-5) == (step == 12)
    assert student["disk"] == 4 * run["parameters"]   # its files hold more
    assert run["disk"] == os.path.getsize("run/final/model.safetensors")
    assert len(student["curves"]["train/loss"]) == 12
    assert Path("run/config.json").read_text() == before

    shutil.copytree(path, "broken/step-00000099")
    state = Path("broken/step-00000099/state.json")
    content = sd.read_json(state)
    content["config"]["unheard_of"] = 1
    del content["digest"]
    for broken in (json.dumps(content | {"digest": sd.digest(content)}), "{"):
        state.write_text(broken)
        cli(*report_words(output_dir="refused", student="broken/step-00000099"), rc=2)


def test_eval_same_numbers_on_two_ranks(reported):
    process = spawn(*report_words(output_dir="two", **ALL), nproc=2)
    out, _ = process.communicate()
    assert process.returncode == 0, out[-2000:]
    for label, figures in models_of("two").items():
        expected = reported.pop(label)
        for key in "tokens perplexity bits accuracy agreement kl ece parameters disk".split():
            near = expected[key] and pytest.approx(expected[key], rel=1e-5)
            assert figures[key] == near, key
        for layer, expected_layer in zip(figures["layers"], expected["layers"], strict=True):
            assert layer == pytest.approx(expected_layer, rel=1e-4)
        assert figures["texts"] == expected["texts"]
    assert not reported


def test_eval_refusals(reported, tmp_path):
    """Each names what is wrong: a student that is no model, damaged weights, a damaged log, prompts
    that another tokenizer would count, a head that nobody knows, a held-out part of one row."""
    model = shutil.copytree("student", tmp_path / "model")
    (tmp_path / "log.jsonl").write_text('{"train/loss": 1.5}\n')
    talks = write_jsonl(tmp_path / "talk.jsonl", talk(40))
    damaged = shutil.copytree("student", tmp_path / "of/damaged")
    os.truncate(damaged / "model.safetensors", 5000)
    odd_model(tmp_path / "of/odd")
    for student, more, said in (
        ("nowhere", {}, "while looking for student "),
        ("data.jsonl", {}, "while looking for student "),
        (damaged, {}, f"while reading student {damaged}"),
        (model, {}, f"while reading student {model}: KeyError"),
        ("stranger", dict(dataset=talks), "plain text"),
        (tmp_path / "of/odd", dict(trust_remote_code=True), "head_of()"),
        ("run/final", dict(eval_samples=1), "one held-out sequence"),
    ):
        words = report_words(output_dir="refused", student=student, **more)
        assert said in cli(*words, rc=2).err


# --------------------------------------------------------------------------------------------------
# Runs: killed anywhere, on many ranks, under launch.sh, fed with anything: as processes.

DROPOUT = dict(cls="GPT2Config", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
KILLED = {   # what the run is besides plain
    "map": {},
    "stream": dict(streaming=True, shuffle_buffer=7),   # optional: streaming
    "accumulation 3": dict(batch_size=2, gradient_accumulation_steps=3),
    "dropout": {},
    "2 ranks": dict(ranks=2, batch_size=2),
    "documents": dict(packing="documents", seq_len=128),
    "on policy": dict(on_policy=0.5, max_new_tokens=6),   # optional: on_policy
}


def assert_same_run(out, other):
    assert same(final_weights(out), final_weights(other))
    assert quiet_log(out) == quiet_log(other)


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
def test_runs_a_killed_run_ends_as_if_it_had_not_been(tmp_path, online, kind, kills, damaged):
    """Told to stop, or killed, again and again, at random. damaged: each time the newest checkpoint
    of two is."""
    fields = online | dict(batch_size=4, max_steps=12, save_steps=2, eval_steps=5, eval_samples=8,
                           alpha=0.4, lr_scheduler="cosine") | KILLED[kind]
    if kind == "dropout":
        fields["student"] = tiny_model(tmp_path / "dropout", **DROPOUT)
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    draw = random.Random(kills)
    assert "done in" in distil_apart(whole, **fields).wait()
    unfinished = 0
    for i in range(kills):
        start = time.time()
        run = distil_apart(broken, **fields)
        saves = 2 if damaged else 1 - i % 2 + draw.randrange(2)
        while run.poll() is None and saves_since(start, broken) < saves:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        run.signal(signal.SIGKILL if i % 2 else signal.SIGTERM).wait()
        unfinished += not (broken / "final").is_dir()
        if damaged:
            newest = max(broken.glob("checkpoints/step-*"))
            draw.choice([flip, add, os.unlink])(draw.choice(sorted(newest.iterdir())))
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
    (1, OURS, 8),
    pytest.param(1, TORCHS, 1, marks=pytest.mark.campaign),
    pytest.param(2, TORCHS, 5, marks=pytest.mark.campaign),
])
def test_runs_killed_at_every_line_of_a_save(tmp_path, online, ranks, files, every):
    """While files are written, between checksums, rename and the deletion of the one before; each
    run finds what the last one left. The other ranks end by themselves."""
    fields = online | dict(batch_size=2, save_steps=1, keep_checkpoints=1, max_steps=300 // every,
                           ranks=ranks)
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
    ([2, 1, 2], dict(packing="documents", seq_len=128)),
    ([4, 1, 3, 2], {}),
])
def test_runs_ranks_come_and_go(tmp_path, online, world_sizes, packing):
    """Another number of ranks goes on with the same global batches, optimiser state included."""
    fields = online | dict(batch_size=3, save_steps=2) | packing
    straight = tmp_path / "straight"
    moved = tmp_path / "moved"
    for i, ranks in enumerate(world_sizes, 1):
        shown = distil_apart(moved, ranks, **fields, max_steps=2 * i).wait()
        assert saved(moved, 2 * i).is_dir(), shown
    distil_apart(straight, world_sizes[0], **fields, max_steps=2 * i).wait()
    assert_close(moved, straight, shown)


FAILS_ALONE = """
if RANK == 1:
    def load_model(*args):
        raise ValueError("on this rank only")
"""


def test_runs_a_rank_that_fails_alone_is_the_one_that_speaks(out, online):
    shown = distil_apart(out, 3, FAILS_ALONE, **online).wait(seconds=60)
    assert shown.count("error: ") == 1 and "Traceback" not in shown, shown
    assert "ValueError: on this rank only" in shown


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
    assert float(re.search(r"RANK 1 (\S+)", shown)[1]) < 0.2, shown


@pytest.mark.parametrize("nodes, processes", [(1, 2), (2, 1)])
def test_runs_launcher_is_one_process(tmp_path, online, chat, nodes, processes):
    """That warns of nothing and writes nowhere else."""
    fields = online | dict(dataset=chat, max_steps=4, alpha=0.3)
    distil(tmp_path / "one", **fields, batch_size=8)
    words = flags(**PLAIN, **fields, output_dir="two", batch_size=4)
    env = {"NNODES": str(nodes), "NPROC": str(processes), "MASTER_PORT": str(free_port()),
           "PYTHONWARNINGS": "default"}
    launched = [spawn(*words, nproc=2, env={**env, "NODE_RANK": str(rank)}, cwd=tmp_path)
                for rank in range(nodes)]
    shown = "".join([process.communicate(timeout=180)[0] for process in launched])
    assert {process.returncode for process in launched} == {0}, shown
    assert_close(tmp_path / "two", tmp_path / "one", shown)
    assert shown.count("done in") == 1   # only rank 0 prints
    assert not re.search(r"(simple_distill|config)\.py:\d+: \w*Warning", shown), shown
    assert listing(tmp_path) == "one two"


def pids_of(pattern):
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return found.stdout.split()


def test_runs_a_rank_that_dies_takes_the_job_down(out, labels_only):
    words = flags(**PLAIN, **labels_only, batch_size=4, output_dir=out, max_steps=100_000)
    process = spawn(*words, nproc=2)
    wait_for_log(out, process)
    workers = pids_of(f"simple_distill.py.*{out}")
    rank_1, = [pid for pid in workers if "\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(int(rank_1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


@pytest.mark.parametrize("env, words, code, told", [
    ({}, "--help", 0, "NNODES.*--learning_rate"),
    # two ranks make the mistake, one line says it
    ({"NPROC": "2"}, "--alpha 1 --dataset /nowhere.jsonl --student /nowhere", 2, "nowhere"),
    ({"NPROC": "0"}, "", 2, "^error: NPROC is 0,"),
    ({"NPROC": "abc"}, "", 2, "^error: NPROC is abc,"),
    ({"NODE_RANK": "1"}, "", 2, "^error: .*NODE_RANK 1 of NNODES 1"),
])
def test_runs_launcher_explains_itself_and_passes_mistakes_on(tmp_path, env, words, code, told):
    ran = subprocess.run([HERE / "launch.sh", *words.split()], capture_output=True, text=True,
                         cwd=tmp_path, env={**os.environ, "NPROC": "1", **env}, timeout=120)
    assert ran.returncode == code
    assert re.search(told, ran.stderr if code else ran.stdout, re.DOTALL), ran
    assert ran.stderr.count("error: ") == code / 2 and "Traceback" not in ran.stderr, ran


def test_runs_launcher_that_waits_for_a_node_hears_a_signal(out):
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": str(free_port())}
    process = spawn("--output_dir", out, nproc=2, env=env)
    assert "waits for all nodes" in process.stdout.readline()
    while not pids_of(f"node-rank=0 .*{out}"):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert not pids_of(out)


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
def test_runs_a_terminal_that_stops_a_run(tmp_path, labels_only, program, closes):
    """Ctrl-C reaches all of its processes at once; a closed one takes its readers along."""
    out = tmp_path / "run"
    words = flags(**PLAIN, **labels_only, batch_size=2, output_dir=out, max_steps=100_000)
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
    assert saved(out, column(out, "train/step")[-1]).is_dir()
    assert not pids_of(str(out))


# ---- code that nobody allowed


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


EVIL_TOKENIZER = dict(tokenizer_class="EvilTokenizer",
                      auto_map={"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]})


def plant_code(folder):
    """Config and tokenizer of a model get code of their own, which leaves a mark."""
    bases = {"configuration": ("EvilConfig", "LlamaConfig"),
             "modeling": ("EvilModel", "LlamaForCausalLM"),
             "tokenization": ("EvilTokenizer", "PreTrainedTokenizerFast")}
    for file, (name, base) in bases.items():
        Path(folder, f"{file}_evil.py").write_text(
            f"open('marks/{file}', 'w')\nfrom transformers import {base}\n"
            f"class {name}({base}):\n    model_type = 'evil'\n")
    edit_json(Path(folder, "config.json"), model_type="evil", auto_map={
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel"})
    edit_json(Path(folder, "tokenizer_config.json"), **EVIL_TOKENIZER)


def test_runs_no_code_that_nobody_allowed(tmp_path, student, text, monkeypatch):
    """Files of strangers that carry code, in each place where one may stand, under every mode: what
    runs leaves a file in marks/."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))   # nobody asks, nobody is answered
    monkeypatch.chdir(tmp_path)
    os.mkdir("marks")
    for name in ("good", "evil", "pickled"):
        shutil.copytree(student, name)
    plant_code("evil")
    os.unlink("pickled/model.safetensors")
    torch.save({"model.norm.weight": Payload("marks/bin")}, "pickled/pytorch_model.bin")
    os.mkdir("script")
    Path("script/script.py").write_text("open('marks/script', 'w')\n")
    Path("run.yaml").write_text("student: !!python/object/apply:builtins.open [marks/yaml, w]\n")
    # a run of a stranger, which says of itself that its student's code may run
    distil("obeyed", student="good", dataset=text, alpha=1.0, max_steps=1)
    edit_json(Path("obeyed/config.json"), trust_remote_code=True, student="evil", tokenizer="evil")
    made = f"--mode cache --teacher good --dataset {text} --cache_dir cache"   # optional: cache
    cli(*made.split(), "--seq_len", 32)   # optional: cache
    for path in list(Path("cache").rglob("tokenizer_config.json")):   # optional: cache
        shutil.copy("evil/tokenization_evil.py", path.parent)
        edit_json(path, **EVIL_TOKENIZER)
    run = f"--dataset {text} --max_steps 1 --student"
    judged = f"--mode eval --tokenizer good --dataset {text} --student"   # optional: eval
    commands = [
        f"{run} evil --alpha 1",
        f"{run} good --alpha 1 --tokenizer evil",
        f"{run} good --teacher evil",
        f"{run} pickled --alpha 1",
        "--student good --alpha 1 --dataset script",
        "--config run.yaml",
        f"{run} good --teacher evil --blockwise true",   # optional: blockwise
        f"--mode cache --teacher evil --cache_dir c --dataset {text}",   # optional: cache
        "--student good --cache_dir cache",   # optional: cache
        "--mode generate --provider local --teacher evil --num_examples 1",   # optional: generate
        f"{judged} evil",   # optional: eval
        f"{judged} good --compare evil",   # optional: eval
        f"{judged} obeyed/checkpoints/step-00000001",   # optional: eval
    ]
    for i, command in enumerate(commands):
        result = cli(*command.split(), "--output_dir", f"out{i}", rc=2)
        assert not os.listdir("marks"), (command, result)
        assert "evil" not in command or "trust_remote_code" in result.err, result.err


# ---- fuzz: whatever a user brings, there is an answer. Each case draws one thing and breaks it.

ODD = ("| |-1|0|nan|inf|-inf|1e400|0x10|1.5|true|null|[]|{}|[1|a\0b|\x1b[31m|größe|\ud800|/|"
       "/dev/null|/nowhere/x|~|..|--|-x|%s|a b|=|*|(|$(id)|layers:|layers:-1|layers:99|demo |"
       "https://h/|http://[|1,2|a=b=c|(=1|.*=x").split("|")
ODD.insert(8, "9" * 5000)
ODD.insert(33, "x" * 4000)
ODD_JSON = json.loads('[null, true, -1, 0, 1.5, 1e308, 1000000000000000000000000000000, "", "x", '
                      '"\\u0000", "nan", [], {}, [null], {"a": 1}, [[1]]]')
ODD_JSON.append("x" * 4000)


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
    lines = [content] if path.suffix == ".json" else content.strip().splitlines()
    i = draw.randrange(len(lines))
    lines[i] = json.dumps(break_json(json.loads(lines[i]), draw)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


# A case is drawn in a folder of its own, in which user/ holds good things, all of them the user's:
# fuzz_x(draw) breaks one -> the command line of a run into out/.
MODES = {
    "train": "--student user/student --dataset user/text.jsonl --alpha 1 --max_steps 1",
    "cache": (   # optional: cache
        "--mode cache --teacher user/student --dataset user/text.jsonl --seq_len 32 "
        "--cache_chunk 16 --cache_dir cache"),
    "generate": (   # optional: generate
        "--mode generate --provider local --teacher user/student --num_examples 2 --max_tokens 4"),
    "eval": (   # optional: eval
        "--mode eval --student user/student --dataset user/text.jsonl --eval_samples 1"),
}
TRAIN = f"--seq_len 32 {MODES['train']}"


@pytest.fixture
def good(tmp_path, student, text):
    """What becomes user/."""
    good = tmp_path / "good"
    for name in ("student", "model"):
        shutil.copytree(student, good / name)
    shutil.copy(text, good / "text.jsonl")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "river one"}]
    write_jsonl(good / "chat.jsonl", [{"messages": turns * (1 + i // 6)} for i in range(12)])
    return good


def leave_broken(folder, words, draw):
    """What a good run leaves in ../folder: here, with one file of it broken."""
    if not os.path.exists(f"../{folder}"):
        cli(*words.split())
    shutil.copytree(f"../{folder}", folder)
    break_file(draw.choice(sorted(files_in(Path(folder)))), draw)


def fuzz_flags(draw):
    words = MODES[draw.choice(["train", *MODES])]
    skipped = f"{words} --output_dir --max_steps --cpu_offload --mode --config".split()
    name = draw.choice([name for name in config.FIELDS if f"--{name}" not in skipped])
    return f"{words} --{name} {shlex.quote(draw.choice(ODD))}"


def fuzz_file(draw):
    path = Path(f"user/run.{draw.choice(['json', 'yaml'])}")
    path.write_text(   # which is yaml too
        '{"alpha": 1.0, "student": "user/student", "dataset": "user/text.jsonl", "max_steps": 1, '
        '"lr_multipliers": ["norm=0.5"], "seq_len": 32, "use_wandb": false}')
    break_file(path, draw)
    if draw.random() < 0.2:
        path.write_bytes(b"student: " + draw.choice(ODD).encode(errors="ignore"))
    return f"--config {path} {MODES['train']}"


def fuzz_rows(draw):
    path = Path("user", draw.choice(["text.jsonl", "chat.jsonl"]))
    for _ in range(draw.randrange(1, 4)):
        with contextlib.suppress(ValueError):   # broken beyond that already
            break_file(path, draw)
    if draw.random() < 0.15:
        path = path.rename(
            path.with_name(draw.choice(["a.csv", "a.parquet", "a.json", "a.txt"])))
    words = TRAIN.replace("user/text.jsonl", str(path))
    words += draw.choice(["", " --streaming true"])   # optional: streaming
    return words


def fuzz_model(draw):
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
             "num_attention_heads", "num_key_value_heads", "head_dim")
    path = Path("user/model", draw.choice([
        "config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors", "generation_config.json"]))
    if path.name == "config.json" and draw.random() < 0.5:
        size = draw.choice([0, -1, 3, None, "8", 1.5, [], {}, True])
        edit_json(path, **{draw.choice(sizes): size})
    else:
        break_file(path, draw)
    if draw.random() < 0.1:
        path.unlink()
    if draw.choice([True, False]):
        return TRAIN.replace("user/student", "user/model")
    return TRAIN.replace("--alpha 1", "--alpha 0.5 --teacher user/model")


def fuzz_quantised(draw):
    method = draw.choice(["fp8", "gptq", "bitsandbytes", "mxfp4", "awq", *ODD])
    said = draw.choice([{"quant_method": method}, {"bits": 4}, *ODD_JSON])
    edit_json(Path("user/model/config.json"), quantization_config=said)
    return TRAIN + draw.choice([
        " --student user/model", " --alpha 0.5 --teacher user/model",
        " --teacher user/model --student layers:1"])


def fuzz_schedules(draw):
    name = draw.choice(list(transformers.SchedulerType)).value
    knob = draw.choice("num_cycles min_lr min_lr_rate power lr_end timescale num_decay_steps "
                       "min_lr_ratio num_stable_steps decay_type patience".split())
    kwargs = json.dumps({knob: draw.choice([*ODD_JSON[:-1], math.nan, -math.inf])})
    return f"{TRAIN} --lr_scheduler {name} --lr_scheduler_kwargs {shlex.quote(kwargs)}"


def fuzz_kept(draw):
    """Token rows that are half there."""
    cli(*TRAIN.split(), "--dry_run", "true")
    for path in Path("kept").rglob("*.arrow"):
        content = path.read_bytes()
        path.unlink()
        left = content[:draw.randrange(len(content))]
        path.write_bytes(draw.choice([left, left.ljust(len(content), b"\0")]))
    return TRAIN


def fuzz_output(draw):
    """What an earlier run left; without its mark it is a folder of the user's."""
    words = TRAIN.removesuffix("1")
    leave_broken("out", f"{words} 2 --save_steps 1 --output_dir ../out", draw)
    if draw.random() < 0.2:
        Path("out", sd.MARK).unlink(missing_ok=True)
    return f"{words} 3"


def fuzz_cache(draw):   # optional: cache
    leave_broken("cache", MODES["cache"].replace("--cache_dir ", "--cache_dir ../"), draw)
    if draw.random() < 0.3:
        return MODES["cache"]
    return "--student user/student --cache_dir cache --alpha 0.5 --max_steps 1"


def fuzz_leftovers(draw):   # optional: generate
    leave_broken("out", f"{MODES['generate']} --output_dir ../out", draw)
    if draw.random() < 0.3:
        prompts = Path("user/prompts.jsonl")
        write_jsonl(prompts, [{"prompt": "a"}, {"prompt": "b"}])
        break_file(prompts, draw)
        return f"{MODES['generate']} --prompts_file {prompts}"
    return MODES["generate"]


@pytest.mark.campaign
@pytest.mark.parametrize("kind, cases", [
    ("flags", 110), ("file", 60), ("rows", 60), ("model", 60), ("output", 40),
    ("quantised", 30), ("schedules", 40), ("kept", 10),
    ("cache", 50),       # optional: cache
    ("leftovers", 30),   # optional: generate
])
def test_runs_fuzz(tmp_path, good, monkeypatch, kind, cases):
    """No traceback, no exit code but 0 and 2, nothing changed outside the run's own folders."""
    failures = []
    first = int(os.environ.get("FUZZ_FROM", 0))
    for number in range(first, first + cases):
        case = tmp_path / f"{kind}-{number}"
        shutil.copytree(good, case / "user")
        monkeypatch.chdir(case)
        if kind == "kept":
            monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", case / "kept")
        words = globals()[f"fuzz_{kind}"](random.Random(f"{kind} {number}"))
        watched = [Path("user")]
        if os.path.exists("out") and not os.path.exists(f"out/{sd.MARK}"):
            watched.append(Path("out"))
        before = [*map(files_in, watched)]
        problem = problem_of(words_of(shlex.split(f"{words} --output_dir out")))
        if [*map(files_in, watched)] != before:
            problem = f"changed what is not its own; {problem}"
        if problem:
            failures.append(f"{kind} {number}: {words[:400]}\n    {problem}")
        shutil.rmtree(case)
    assert not failures, f"{len(failures)} of {cases}:\n" + "\n".join(failures)


def problem_of(words):
    """What is wrong with the answer to a command line, None where nothing is."""
    err = io.StringIO()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
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
def test_runs_fuzz_of_the_environment(tmp_path, labels_only):
    """In processes of their own, since it is read when the package is imported."""
    names = ("MASTER_ADDR MASTER_PORT HTTP_PROXY HTTPS_PROXY ALL_PROXY HF_HOME HF_ENDPOINT "
             "HF_HUB_OFFLINE WANDB_MODE OMP_NUM_THREADS TOKENIZERS_PARALLELISM COLUMNS TMPDIR HOME "
             "TERM").split()   # those of torchrun are numbers
    values = [value for value in ODD if "\0" not in value and "\ud800" not in value]
    fields = PLAIN | labels_only | dict(max_steps=1)
    for number in range(30):
        draw = random.Random(f"environment {number}")
        env = {draw.choice(names): draw.choice(values)}
        fields["student"] = draw.choice([*2 * [labels_only["student"]], "owner/name"])
        process = spawn(*flags(**fields, output_dir=tmp_path / f"out{number}"), env=env)
        shown, _ = process.communicate(timeout=120)
        assert process.returncode in (0, 2) and "Traceback" not in shown, (env, shown[-600:])


# ---- Gemma 3: a BOS before all, and an id of which the head has no row

GEMMA3 = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
GEMMA3_RUNS = {
    "online": "--max_steps 2",
    "stream": "--max_steps 2 --streaming true",   # optional: streaming
    "cache": "--mode cache --cache_dir {0}",   # optional: cache
    "on_policy": "--max_steps 2 --on_policy 1 --max_new_tokens 8",   # optional: on_policy
    "generate": (   # optional: generate
        "--mode generate --provider local --max_tokens 8 --prompts_file {0}"),
    "eval": "--mode eval",   # optional: eval
}


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    """-> fields of its teacher and its student"""
    tokenizer = tiny_tokenizer(GEMMA3, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [
        "<start_of_turn>", "<end_of_turn>", "<image_soft_token>"]})
    folder = tmp_path_factory.mktemp("gemma3")
    return {role: tiny_model(folder / role, len(tokenizer) - 1, width, tokenizer=tokenizer,
                             cls="Gemma3TextConfig", head_dim=8, eos_token_id=[0, 264])
            for role, width in (("teacher", 32), ("student", 16))}


@pytest.mark.parametrize("mode", GEMMA3_RUNS)
def test_runs_of_gemma_3(out, tmp_path, gemma3, chat, mode):
    there = tmp_path / "there"
    words = GEMMA3_RUNS[mode].format(there).split()
    fields = gemma3 | dict(dataset=chat, seq_len=64)
    if mode == "generate":   # optional: generate
        write_jsonl(there, [{"prompt": "hello"}])
        fields = dict(teacher=gemma3["teacher"])
    cli(*flags(**fields, output_dir=out), *words)
    if mode == "cache":   # optional: cache
        cli(*flags(student=gemma3["student"], cache_dir=there, max_steps=2, output_dir=out))


def test_runs_of_gemma_3_refuse_rows_with_an_id_beyond_the_head(out, tmp_path, gemma3):
    rows = [{"text": "a picture: <image_soft_token> !"}] * 40
    err = distil(out, rc=2, **gemma3, dataset=write_jsonl(tmp_path / "d.jsonl", rows)).err
    assert "token 265, '<image_soft_token>', beyond the 265 ids" in err


# --------------------------------------------------------------------------------------------------
# Freeze: the same runs by this package and by a commit before it give the same batches, weights,
# logs and reports, bit for bit, and what a cache holds is read the same. REFERENCE=COMMIT names
# another commit; move it where a result is meant to change.
#
# Meant to differ from 58e7ff4, and left out: the files of checkpoints and caches; of blocks the
# share explained (by batches: the last digit) and the median token (gone); layers' direct errors
# (gone); texts that provider local draws (by the one writer); the order of packed rows.

REFERENCE = os.environ.get("REFERENCE", "58e7ff4")   # before the house was halved

TEXT = "--seq_len 32 --eval_samples 8 --teacher teacher --student student --dataset text.jsonl"
TEXT_RUN = f"{TEXT} --max_steps 4"
CHAT = "--seq_len 32 --eval_samples 8 --teacher teacher --student student --dataset chat"
CHAT_RUN = f"{CHAT} --max_steps 3"
CACHE = "--mode cache --teacher teacher --dataset text.jsonl --cache_dir cache --seq_len 32"
CACHED_RUN = "--eval_samples 8 --student student --cache_dir cache --max_steps 4"
BLOCKS = f"{CHAT} --blockwise true --epochs_per_block 0.4"
STREAMED = ""
STREAMED = "--streaming true"   # optional: streaming
FROZEN = {   # {name: [(ranks, words), ...]}: commands one after the other, into the same folders
    "forward": [(1, TEXT_RUN)],
    "reverse": [(1, f"{TEXT_RUN} --divergence reverse")],
    "jsd": [(1, f"{TEXT_RUN} --divergence jsd")],
    "T 2": [(1, f"{TEXT_RUN} --temperature 2 --alpha 0.3")],
    "labels only": [(1, f"{TEXT_RUN} --alpha 1")],
    "accumulation": [(1, f"{CHAT_RUN} --batch_size 3 --gradient_accumulation_steps 3")],
    "multipliers": [(1, f"{TEXT_RUN} --lr_multipliers embed=0 mlp=0.5")],
    "cosine": [(1, f"{TEXT} --num_epochs 1.5 --lr_scheduler cosine --warmup_ratio 0.2 "
                   "--weight_decay 0.1 --eval_steps 3 --save_steps 4")],
    "bf16": [(1, f"{TEXT_RUN} --dtype bf16 --gradient_checkpointing true")],
    "fp16": [(1, f"{TEXT_RUN} --dtype fp16")],
    "layers": [(1, TEXT_RUN.replace("--student student", "--student layers:1"))],
    "2 ranks": [(2, f"{CHAT_RUN} --batch_size 2")],
    "2 ranks, no_shard": [(2, f"{TEXT_RUN} --fsdp no_shard --shard_teacher false")],
    "3 ranks, then 2": [(3, f"{TEXT} --batch_size 2 --max_steps 2"),
                        (2, f"{TEXT} --batch_size 2 --max_steps 4")],
    "killed": 2 * [(1, f"{TEXT} --save_steps 1 --max_steps 9")],   # the first one is
    "stream": [   # optional: streaming
        (2, f"{TEXT} {STREAMED} --max_steps 9 --eval_steps 3")],
    "cache, sample": [   # optional: cache
        (1, CACHE.replace("text.jsonl", "chat")), (1, CACHED_RUN)],
    "cache, topk": [   # optional: cache
        (2, f"{CACHE} --cache_method topk --cache_top_k 9 --temperature 2"), (1, CACHED_RUN)],
    "cache of a stream": [   # optional: cache
        (1, f"{CACHE} {STREAMED}"), (2, CACHED_RUN)],
    "blocks, student": [   # optional: blockwise
        (1, f"{BLOCKS} --lm_head_epochs 0.4 --max_steps 2 --save_steps 2 --eval_steps 2")],
    "blocks, teacher": [   # optional: blockwise
        (1, f"{BLOCKS} --lm_head_epochs 0.4 --max_steps 2 --block_input teacher "
            "--distill_loss_type cosine")],
    "blocks alone": [   # optional: blockwise
        (1, f"{BLOCKS} --num_epochs 0 --train_lm_head false --distill_loss_type mse")],
    "on policy": [   # optional: on_policy
        (2, f"{CHAT} --max_steps 6 --batch_size 2 --on_policy 0.7 --max_new_tokens 9")],
    "eval": [   # optional: eval
        (1, TEXT_RUN),
        (1, "--mode eval --teacher teacher --student out/final --compare student "
            "--dataset text.jsonl --seq_len 32 --batch_size 4 --dtype fp32")],
}

FIGURES = ("perplexity bits perplexity_95 bits_95 tokens accuracy agreement kl ece parameters "
           "disk").split()
# What each rank computes the loss of: ids, labels, and of a cache what was decoded from it.
RECORD = """
import hashlib

def loss_recorded(model, batch, targets, *args, unrecorded=distil_loss, **objective):
    tensors = [batch.input_ids, batch.labels]
    tensors += batch.sparse or ()   # optional: cache
    content = b"".join(tensor.double().numpy().tobytes() for tensor in tensors)
    with open(f"batches{RANK}", "a") as f:
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


def run_frozen(package, name, folder):
    """Run the package's commands one after the other, in `folder`."""
    for i, (ranks, words) in enumerate(FROZEN[name]):
        change = f"os.chdir({str(folder)!r})"
        if "--mode" not in words:
            plain = {k: v for k, v in PLAIN.items() if k not in f"{words} seq_len"}
            words = " ".join([*flags(**plain), words])
            change += RECORD * (name != "killed")
        run = Fork(folder / "log.txt", *words.split(), "--output_dir", "out", ranks=ranks,
                   package=package, change=change)
        if name == "killed" and i == 0:
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
    results = []
    for package in (reference_package, HERE):
        folder = tmp_path / f"by{len(results)}"
        folder.mkdir()
        for path in map(Path, (teacher, student, text, chat)):
            (folder / path.name).symlink_to(path)
        run_frozen(package, name, folder)
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

OPTIONAL = ("streaming", "demo", "cache", "served", "blockwise", "on_policy", "generate", "eval")
PACKAGE = ("simple_distill.py", "config.py", "launch.sh", "test_simple_distill.py",
           "requirements.txt", "README.md", ".ci/run", ".gitignore", ".pytest.ini", ".ruff.toml")
NEEDS = {"served": "cache"}   # a chapter that goes with another
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
    without = {*without, *(name for name in NEEDS if NEEDS[name] in without)}
    for name in PACKAGE:
        text = (HERE / name).read_text()
        if name.endswith(".py"):
            text = without_chapters(text, without)
        elif name.endswith(".md"):
            text = without_sections(text, without)
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
def test_forks_run_with_nothing_dangling(without, tmp_path, out, trio):
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
    assert [name for name in names if not re.search(READ.format(name), source)] == []
    for name in without:
        assert f"# Optional: {name}:" not in source
    words = flags(**PLAIN, **trio, max_steps=2, output_dir=out)
    shown = Fork(f"{out}.txt", *words, package=folder).wait()
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
    required = re.findall(r"^[\w-]+", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(required) == ["datasets", "torch", "tqdm", "transformers", "wandb"]


def test_package_config_is_the_configuration_and_nothing_else():
    source = (HERE / "config.py").read_text()
    names = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
    assert {"re", "yaml", "transformers"} < names
    assert names.isdisjoint({"asyncio", "matplotlib", "safetensors", "zlib", "torch", "datasets"})


def test_package_an_optional_chapter_borrows_from_none():
    """No function of an optional chapter is used by another one, but on a marked line."""
    chapters = re.split(r"\n# -{60,}\n", (HERE / "simple_distill.py").read_text())
    optional = {}
    for chapter in chapters:
        title = re.match(r"# Optional: (\w+):", chapter)
        if title:
            optional[title[1]] = chapter
    for (name, chapter), (other, text) in itertools.permutations(optional.items(), 2):
        defined = re.findall(r"^(?:async )?(?:def|class) (\w+)", chapter, re.MULTILINE)
        text = without_chapters(text, {name})
        borrowed = [word for word in defined if re.search(rf"(?<![.\w]){word}\(", text)]
        assert borrowed == [] or NEEDS.get(other) == name, f"{other} uses {borrowed} of {name}"


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
    if "--teacher_url" in given:   # optional: served
        pytest.skip("a served teacher has tests of its own, with a server")
    monkeypatch.chdir(tmp_path)
    replaced = {"--teacher": teacher, "--student": student, "--dataset": text,
                "--tokenizer": teacher, "--compare": student}
    for name in replaced.keys() & given.keys():
        if given[name][0].startswith("layers:"):
            given[name] = ["layers:2"]
        elif given[name][0] != "demo":
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


def test_package_the_readmes_own_loss(tmp_path, out, trio):
    """A fork that adds it as the README says: its gradient is that of autograd, and the command
    line trains with it."""
    readme = (HERE / "README.md").read_text()
    lines = re.search(r"( +elif divergence == \"skew\":\n(?: {12}.*\n)+)", readme)[1]
    assert len(lines.splitlines()) <= 10
    branch = '        elif divergence == "reverse":\n'
    choices = 'Literal["forward", "reverse", "jsd"'
    for name, old, new in (("simple_distill.py", branch, lines + branch),
                           ("config.py", choices, choices + ', "skew"')):
        source = (HERE / name).read_text()
        assert source.count(old) == 1
        (tmp_path / name).write_text(source.replace(old, new))
    checked = subprocess.run([sys.executable, "-c", SKEWED], cwd=tmp_path, capture_output=True,
                             text=True)
    assert checked.returncode == 0, checked.stderr
    words = flags(**PLAIN, **trio, divergence="skew", max_steps=2, output_dir=out)
    shown = Fork(f"{out}.txt", *words, package=tmp_path).wait()
    assert "done in" in shown, shown
    assert all(0 < kl < 99 for kl in column(out, "train/kl_loss"))


# --------------------------------------------------------------------------------------------------
# Bench: python test_simple_distill.py --bench

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


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


def print_speeds(found, count, unit, base):
    for name, seconds in found.items():
        print(f"  {name:<20}{count / seconds:>12,.0f} {unit}{found[base] / seconds:>8.2f} x {base}")


def loss_case(V, N, D, Dt, counted=1.0):
    torch.manual_seed(0)

    def make(rows, columns):
        return torch.randn(rows, columns, device=DEVICE).to(DTYPE)

    labels = torch.randint(0, V, (N,), device=DEVICE)
    labels[math.ceil(counted * N):] = -100
    return types.SimpleNamespace(
        hidden=make(N, D), weight=make(V, D) / D ** 0.5,
        teacher_hidden=make(N, Dt), teacher_weight=make(V, Dt) / Dt ** 0.5, labels=labels)


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
    sd.distillation_loss(
        hidden, head, case.labels, teacher, alpha=0.5, temperature=1.0)[0].backward()


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
    case, half, small = [
        loss_case(vocab, count, width, teacher_width, counted=counted)
        for count, counted in ((tokens, 7 / 8), (tokens, 0.5), (64, 1.0))]
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
    else:
        Path("/proc/self/clear_refs").write_text("5")   # the peak starts again
    before = memory_now()[0]
    work(case)
    print(memory_now()[1] - before)


def memory_now():
    """-> bytes in use, and at their peak."""
    if ON_GPU:
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return [1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1]) for field in ("VmRSS", "VmHWM")]


def bench_memory():
    found = {}
    for name in LOSSES:
        shown = subprocess.run([sys.executable, __file__, "--peak-memory", name],
                               capture_output=True, text=True)
        # killed: it did not fit
        found[name] = math.nan if shown.returncode else int(shown.stdout.split()[-1])
    print("\npeak memory of the loss above its inputs, V 151,936, 4,096 tokens")
    for name, size in found.items():
        print(f"  {name:<20}{size / 2**30:>9.2f} GiB{size / found['plain']:>8.1%} of plain")


# ---- a whole optimiser step, random weights


def step_sizes():
    """-> student, teacher, sequences, tokens: 0.6B and 4B on a GPU, tiny ones here."""
    if ON_GPU:
        shapes = (1024, 3072, 28, 16), (2560, 9728, 36, 32)
        shared = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128)
    else:
        shapes = (128, 384, 4, 4), (256, 768, 4, 8)
        shared = dict(vocab_size=32000, num_key_value_heads=4, head_dim=32)
    student, teacher = [
        transformers.Qwen3Config(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, tie_word_embeddings=True, max_position_embeddings=2048,
            **shared) for hidden, inner, layers, heads in shapes]
    return (student, teacher, 8, 1024) if ON_GPU else (student, teacher, 4, 256)


def our_step(folder, batches, alpha, **fields):
    """-> a function that makes one step of ours on each of the batches."""
    cfg = sd.Config(
        student=f"{folder}/student/config.json", teacher=f"{folder}/teacher/config.json",
        alpha=alpha, **{"gradient_checkpointing": False} | fields)
    student, _ = sd.load_model(cfg, "student")
    teacher = sd.load_model(cfg, "teacher")[0] if alpha < 1 else None
    rates = dict.fromkeys(student.parameters(), 1e-4)
    optimizer = sd.make_optimizer(student.parameters(), rates, 0.0)
    scale_state = sd.new_scale_state(False)
    get_teacher_targets = sd.teacher_targets(teacher)
    loss_fn = functools.partial(sd.distil_loss, alpha=alpha, temperature=1.0, divergence="forward")

    def step():
        for batch in batches:
            student(loss_fn, batch, get_teacher_targets(batch), len(batch.labels))[0].backward()
            sd.optimizer_step(optimizer, 1.0, scale_state, False)
            optimizer.zero_grad()

    return step


def token_row(ids, targets):
    return {"input_ids": ids, "targets": targets, "starts": np.array([0])}


def plain_step(student_config, teacher_config, ids_BT, loss_of):
    """-> a function that makes one step as a plain script would; loss_of(student, teacher)."""
    student = AutoModelForCausalLM.from_config(student_config).to(DEVICE)
    teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=DTYPE).to(DEVICE)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(DEVICE, DTYPE, enabled=ON_GPU):
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
    student, teacher, sequences, tokens = step_sizes()
    vocab = student.vocab_size
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        student.save_pretrained(f"{folder}/student")
        teacher.save_pretrained(f"{folder}/teacher")
        ids = np.random.default_rng(0).integers(0, vocab, (sequences, tokens))
        batch = sd.collate([token_row(row, np.arange(tokens) > 0) for row in ids])
        plain = functools.partial(plain_step, student, teacher, batch.input_ids)
        cases = {
            "labels only": our_step(folder, [batch], alpha=1.0),
            "online": our_step(folder, [batch], alpha=0.5),
            "online, compile": our_step(folder, [batch], alpha=0.5, compile=True),
            "plain PyTorch": plain(plain_step_loss),
        }
        with contextlib.suppress(ImportError):
            os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
            import trl   # noqa: F401
            cases["TRL's GKDTrainer"] = plain(trl_step_loss)
        found = interleaved(cases, rounds=5)
    print(f"\nwhole step, {sequences} x {tokens} tokens, V {vocab:,}")
    print_speeds(found, sequences * tokens, "tokens/s", "plain PyTorch")


def bench_documents(batch_size=8, seq_len=512, count=3):
    """Conversations as long as GSM8K's are under SmolLM2's tokenizer (217 tokens, 126 of them
    targets), one a row and packed, for a student of SmolLM2-135M's shape."""
    pick = random.Random(0)
    documents = []
    for _ in range(1000):
        length = min(seq_len, round(pick.lognormvariate(5.32, 0.33)))
        documents.append(token_row(np.full(length, 7), np.arange(length) > 0.42 * length))
    rows = datasets.Dataset.from_list(documents).with_format("numpy")
    cases = {}
    targets = {}
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
            tie_word_embeddings=True).save_pretrained(f"{folder}/student")
        for kind, table in (("one a row", rows), ("packed", sd.PackedRows(rows, seq_len))):
            batches = sd.micro_batches(
                [table[i] for i in range(count * batch_size)], count, batch_size)
            targets[kind] = sum(len(batch.labels) for batch in batches)
            cases[kind] = our_step(folder, batches, alpha=1.0, gradient_checkpointing=True)
        found = interleaved(cases, rounds=3)
    print(f"\nSmolLM2-135M's shape on labels, conversations in {batch_size} rows of {seq_len}")
    seconds = {kind: found[kind] / targets[kind] for kind in found}   # a target
    print_speeds(seconds, 1, "targets/s", "one a row")


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
    return max(subprocess.run([sys.executable, __file__, "--bench", name]).returncode
               for name in BENCHES)


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
