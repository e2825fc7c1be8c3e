"""Tests of simple_distill: pure functions against independent float64 references, and runs through the real command line.

    pytest                                   # the ordinary run: tiny random models made on the spot, CPU, no network
    pytest -m campaign                       # what takes long
    python test_simple_distill.py --bench    # tables of speed and memory
"""
import ast
import atexit
import collections
import hashlib
import http.server
import threading
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import pty
import random
import re
import resource   # optional: cache
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")   # tiny models: a second thread costs more than it brings
if "HF_DATASETS_CACHE" not in os.environ:   # tokenised rows and model code go to a place of our own, which subprocesses share
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="simple-distill-test-")
    os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_DATASETS_CACHE"], "modules")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import datasets
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, pipeline
import multiprocessing

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
    """A directory of two splits, as on the hub: what is trained on does not depend on how a slice is
    held out."""
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


def test_config_command_line_wins_over_the_file(tmp_path, out, student, text):
    (tmp_path / "run.yaml").write_text(f"student: {student}\ndataset: {text}\nalpha: 1.0\nmax_steps: 7\nlearning_rate: 2e-4\nlr_multipliers: [embed=0]\n")
    cli("--config", tmp_path / "run.yaml", *flags(output_dir=out, max_steps=2, seq_len=32))
    written = json.loads(Path(out, "config.json").read_text())
    assert (written["max_steps"], written["learning_rate"], written["lr_multipliers"], len(log(out, "train"))) == (2, 2e-4, ["embed=0"], 1)


@pytest.mark.parametrize("words, nearest", [(["--temprature", "2"], "temperature"), (["--learning-rat", "1"], "learning_rate"),
                                            (["--studnt=x"], "student"), (["--alpha", "0.5", "--lr_multiplier", "a=1"], "lr_multipliers")])
def test_config_an_unknown_flag_names_the_nearest(words, nearest):
    err = cli(*words, rc=2).err
    unknown = [w for w in words if w.startswith("--")][-1].partition("=")[0]
    assert unknown.replace("-", "_") in err.replace("-", "_") and nearest in err and len(err.strip().splitlines()) <= 2


def test_config_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    for name, body in (("a.yaml", "temprature: 2\n"), ("a.json", '{"temprature": 2}')):
        (tmp_path / name).write_text(body)
        err = cli("--config", tmp_path / name, rc=2).err
        assert "temprature" in err and "temperature" in err


def test_config_every_field_is_read():
    """By name, somewhere in the code: a flag that does nothing is worse than none."""
    source = Path(sd.__file__).read_text() + Path(config.__file__).read_text()
    unread = [name for name in config.FIELDS if not re.search(rf"\bcfg\.{name}\b", source)]
    assert unread == []


def test_config_every_field_has_one_line_of_help():
    shown = cli("--help").out
    for name, field in config.FIELDS.items():
        assert f"--{name}" in shown and field.metadata["help"] and "\n" not in field.metadata["help"]


def with_file(name, body, **fields):
    """A dataset file with these bytes."""
    def make(folder):
        (folder / name).write_bytes(body if isinstance(body, bytes) else body.encode())
        return dict(dataset=folder / name, **fields)
    return make


def broken_model(role, change):
    """A copy of the model of that role, damaged."""
    def make(folder):
        path = tiny_model(folder / "model")
        change(Path(path))
        return {role: path}
    return make


def edit_config(**fields):
    return lambda path: (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **fields}))


def encoder_decoder(folder):
    transformers.T5Config(vocab_size=300, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16).save_pretrained(folder / "t5")
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


GOOD_LINE = '{"text": "one two three four five"}\n'
# what is wrong -> (fields, or a function of a folder that makes them; words that the message has to hold)
BAD_INPUT = {
    "temperature 0": (dict(temperature=0), "temperature"), "temperature negative": (dict(temperature=-1), "temperature"),
    "temperature infinite": (dict(temperature="inf"), "temperature"), "temperature no number": (dict(temperature="warm"), "temperature warm"),
    "alpha 1.2": (dict(alpha=1.2), "alpha 1.2 between"), "alpha -0.1": (dict(alpha=-0.1), "alpha"), "alpha nan": (dict(alpha="nan"), "alpha"),
    "batch 0": (dict(batch_size=0), "batch_size"), "batch 1.5": (dict(batch_size=1.5), "batch_size 1.5"), "seq_len 1": (dict(seq_len=1), "seq_len at least 2"),
    "max_steps negative": (dict(max_steps=-5), "max_steps"), "max_steps 0": (dict(max_steps=0), "max_steps"),
    "epochs 0": (dict(num_epochs=0), "num_epochs"), "rate 0": (dict(learning_rate=0), "learning_rate"), "rate nan": (dict(learning_rate="nan"), "learning_rate"),
    "warmup 2": (dict(warmup_ratio=2), "warmup_ratio"), "decay negative": (dict(weight_decay=-1), "weight_decay"),
    "clip negative": (dict(max_grad_norm=-1), "max_grad_norm"), "accumulation 0": (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps"),
    "keep 0": (dict(keep_checkpoints=0), "keep_checkpoints"), "log 0": (dict(log_steps=0), "log_steps"), "save negative": (dict(save_steps=-1), "save_steps"),
    "eval negative": (dict(eval_steps=-1), "eval_steps"), "eval_samples 0": (dict(eval_samples=0), "eval_samples"), "max_samples 0": (dict(max_samples=0), "max_samples"),
    "seed negative": (dict(seed=-1), "seed"), "buffer negative": (dict(streaming=True, max_steps=1, shuffle_buffer=-1), "shuffle_buffer"),
    "num_proc 0": (dict(num_proc=0), "num_proc"), "multiplier negative": (dict(default_lr_multiplier=-1), "default_lr_multiplier"),
    "multiplier pattern": (dict(lr_multipliers="(=1"), "lr_multipliers"), "multiplier matches nothing": (dict(lr_multipliers="zzz=1"), "zzz names"),
    "everything frozen": (dict(default_lr_multiplier=0), "frozen"),
    "scheduler unknown": (dict(lr_scheduler="step"), "lr_scheduler cosine"), "divergence unknown": (dict(divergence="tv"), "divergence"),
    "mode unknown": (dict(mode="learn"), "mode"), "fsdp unknown": (dict(fsdp="zero3"), "fsdp"), "dtype unknown": (dict(dtype="int8"), "dtype"),
    "bool": (dict(streaming="perhaps"), "streaming"), "empty name": (dict(output_dir=" "), "output_dir"),
    "flag twice": (["--alpha", "0.1", "--alpha", "0.2"], "alpha once"), "flag unknown": (["--alhpa", "1"], "alhpa alpha"), "stray word": (["train"], "train"),
    "flag without value": (["--alpha"], "alpha"),
    "cache with alpha 1": (dict(alpha=1, cache_dir="c"), "alpha cache_dir"), "cache and reverse": (dict(cache_dir="c", divergence="reverse"), "divergence"),
    "cache that is not there": (dict(cache_dir="/nowhere"), "/nowhere mode"), "mode cache without dir": (dict(mode="cache", student=None), "cache_dir"),
    "k 0": (lambda folder: dict(mode="cache", student=None, cache_dir=folder / "c", cache_method="topk", cache_top_k=0), "cache_top_k"),
    "k above the vocabulary": (lambda folder: dict(mode="cache", student=None, cache_dir=folder / "c", cache_method="topk", cache_top_k=264), "cache_top_k 264 263"),
    "draws 0": (lambda folder: dict(mode="cache", student=None, cache_dir=folder / "c", cache_samples=0), "cache_samples"),
    "a mode's unread field": (dict(api_model="x"), "api_model train"), "stream without steps": (dict(streaming=True), "max_steps"),
    "layers 0": (dict(student="layers:0"), "layers:N"), "layers too many": (dict(student="layers:9"), "layers:N 2"), "layers x": (dict(student="layers:x"), "layers:N"),
    "layers of a cache, whose": (dict(cache_dir="c", teacher="demo", student="layers:1"), "layers:1 --teacher"),
    "no such path": (dict(teacher="/nowhere/at/all", student="layers:1"), "/nowhere/at/all path"),
    "cache begun": (lambda folder: (folder.joinpath("c").mkdir(parents=True), [(folder / "c" / f).write_text("{}") for f in ("manifest.json", "config.json")],
                                    dict(cache_dir=folder / "c"))[-1], "begun finished"),
    "resume nowhere": (dict(resume="/nowhere"), "/nowhere"), "no student": (dict(student=None), "student"),
    "teacher nowhere": (dict(teacher="/nowhere"), "teacher /nowhere"), "student nowhere": (dict(student="no/where"), "no/where name"),
    "teacher without config": (broken_model("teacher", lambda path: (path / "config.json").unlink()), "teacher config"),
    "teacher config is no json": (broken_model("teacher", lambda path: (path / "config.json").write_text("{")), "teacher config"),
    "teacher without weights": (broken_model("teacher", lambda path: (path / "model.safetensors").unlink()), "teacher"),
    "truncated safetensors": (broken_model("teacher", lambda path: os.truncate(path / "model.safetensors", 999)), "teacher"),
    "weights missing": (broken_model("teacher", edit_config(num_hidden_layers=3)), "teacher lacks"),
    "encoder-decoder": (encoder_decoder, "student t5"), "unknown architecture": (broken_model("student", edit_config(model_type="novel")), "student"),
    "tokenizer nowhere": (dict(tokenizer="/nowhere"), "tokenizer"), "dataset nowhere": (dict(dataset="/nowhere.jsonl"), "/nowhere.jsonl exist"),
    "dataset name nowhere": (dict(dataset="no/where"), "no/where"), "split nowhere": (dict(train_split="tarin"), "tarin"),
    "empty file": (with_file("a.jsonl", ""), "a.jsonl empty"), "blank file": (with_file("a.jsonl", "\n\n"), "a.jsonl"),
    "binary file": (with_file("a.jsonl", bytes(range(256)) * 9), "a.jsonl line 1"), "binary text": (with_file("a.txt", bytes(range(256)) * 9), "a.txt line"),
    "wrong encoding": (with_file("a.jsonl", (GOOD_LINE * 3 + '{"text": "Größe"}\n').encode("latin-1")), "line 4"),
    "one bad line": (with_file("a.jsonl", GOOD_LINE * 4 + "{bad\n" + GOOD_LINE * 4), "line 5"),
    "a line that is no object": (with_file("a.jsonl", GOOD_LINE * 2 + "3\n" + GOOD_LINE), "line 3"),
    "no known column": (with_file("a.jsonl", '{"body": "one two three", "id": 3}\n' * 9), "text body id"),
    "text that is no text": (with_file("a.jsonl", '{"text": 3}\n' * 9), "text"), "csv without text": (with_file("a.csv", "a,b\n1,2\n3,4\n"), "text a b"),
    "rows of one token": (with_file("a.jsonl", '{"prompt": "", "response": ""}\n' * 9), "target"),
    "no assistant": (with_file("a.jsonl", '{"messages": [{"role": "user", "content": "hi"}]}\n' * 9), "target"),
    "a single short row": (with_file("a.jsonl", '{"text": "one"}\n'), "seq_len"), "parquet that is none": (with_file("a.parquet", "PAR"), "a.parquet"),
    "yaml that is a list": (yaml_file("- 1\n- 2\n"), "mapping"),
    "yaml that is broken": (yaml_file("a: [1\n"), "YAML"), "yaml key unknown": (yaml_file("alhpa: 1\n"), "alpha"),
    "config nowhere": (dict(config="/nowhere.yaml"), "/nowhere.yaml"), "output is a file": (output_is_a_file, "directory file"),
    # flags that would do nothing
    "k of draws": (dict(mode="cache", student=None, cache_dir="c", cache_top_k=32), "cache_top_k --cache_method topk"),
    "draws of k": (dict(mode="cache", student=None, cache_dir="c", cache_method="topk", cache_samples=10), "cache_samples --cache_method sample"),
    "weight of labels": (dict(blockwise=True, logit_loss_type="ce", logit_loss_weight=0.3), "logit_loss_weight --logit_loss_type"),
    "temperature of labels": (dict(blockwise=True, logit_loss_type="ce", logit_loss_temperature=2), "logit_loss_temperature --logit_loss_type kl_div"),
    "no head phase": (dict(blockwise=True, train_lm_head=False, lm_head_lr=1, logit_loss_type="mse"), "lm_head_lr, logit_loss_type --train_lm_head true"),
    "no stitches": (dict(blockwise=True, use_stitching_layers=False, stitching_layer_bias=False), "stitching_layer_bias --use_stitching_layers true"),
    "all blocks at once": (dict(blockwise=True, block_input="teacher", freeze_previous_blocks=False), "freeze_previous_blocks --block_input student"),
    "blocks without blockwise": (dict(block_input="teacher", lr_per_block=1), "block_input, lr_per_block --blockwise"),
    "buffer without stream": (dict(shuffle_buffer=3), "shuffle_buffer --streaming"),
    "buffer in eval": (dict(mode="eval", shuffle_buffer=3), "eval shuffle_buffer"),
    "constant with kwargs": (dict(lr_scheduler_kwargs='{"num_cycles": 2}'), "lr_scheduler_kwargs constant"),
    "warmup and kwargs": (dict(lr_scheduler="constant_with_warmup", lr_scheduler_kwargs='{"a": 2}'), "lr_scheduler_kwargs constant"),
    "constant with warmup": (dict(warmup_ratio=0.1), "warmup_ratio: read only with --lr_scheduler linear"),
    "a file's configuration": (dict(dataset_config="foo"), "dataset_config hub"),
    # nothing where a name should be, as from "$UNSET"
    **{f"empty {name}": (dict({name: value}), f"{name} empty") for name, value in dict(cache_dir="", tokenizer="", resume="", eval_split=" ",
                                                                                      lr_multipliers="", wandb_project="\t").items()},
    "empty config": (dict(config=""), "--config No such file"),
    "seed of 29 bits": (dict(seed=2**28 + 1), "seed 268,435,456"), "seed below 0": (dict(seed=-1), "between 0 and 268,435,456"),
    "half of nothing": (dict(blockwise=True, wd_per_block=-1), "wd_per_block at least 0"),
    "head epochs 0": (dict(blockwise=True, lm_head_epochs=0), "lm_head_epochs greater than 0"),
    "cache and stream": (dict(cache_dir="c", streaming=True, max_steps=1), "cache_dir streaming length"),
    # before any model is loaded
    "stream without steps, early": (dict(streaming=True, teacher="/nowhere"), "max_steps"),
    "layers ²": (dict(student="layers:²", teacher="/nowhere"), "layers:N"),
    "layers in eval": (dict(mode="eval", student="layers:4", teacher="/nowhere"), "layers:4"),
    "layers 0, early": (dict(student="layers:0", teacher="/nowhere"), "layers:N"),
    "min_lr missing": (dict(lr_scheduler="cosine_with_min_lr", teacher="/nowhere"), "min_lr_rate lr_scheduler_kwargs"),
    "min_lr twice": (dict(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 0, "min_lr_rate": 0}', teacher="/nowhere"), "min_lr_rate one"),
    "kwargs unknown": (dict(lr_scheduler="cosine", lr_scheduler_kwargs='{"num_cycle": 2}', teacher="/nowhere"), "num_cycle num_cycles"),
    "kwargs of ours": (dict(lr_scheduler="cosine", lr_scheduler_kwargs='{"num_warmup_steps": 2}', teacher="/nowhere"), "num_warmup_steps num_cycles"),
    "kwargs a list": (dict(lr_scheduler="cosine", lr_scheduler_kwargs="[2]"), "lr_scheduler_kwargs JSON"),
    # what yaml makes of it
    "yaml key true": (yaml_file("true: 1\n"), "True"), "yaml key no": (yaml_file("no: 1\n"), "False"), "yaml key 5": (yaml_file("5: 1\n"), "5"),
    "yaml list for one": (yaml_file("batch_size: [8, 16]\n"), "batch_size one value"), "yaml null in a list": (yaml_file("compare: [null]\n"), "compare None"),
    "yaml -x": (yaml_file("lr_multipliers: [a=1, '-x=1']\n"), "lr_multipliers -x=1"), "yaml resume no": (yaml_file("resume: no\n"), "resume quotes"),
    "yaml list of lists": (yaml_file("compare: [[a]]\n"), "compare"), "yaml no value a block": (yaml_file("lr_per_block: []\n"), "lr_per_block at least one"),
    # a no_ that no flag has
    "no_blockwise": (["--no_blockwise"], "--no_blockwise --blockwise false"), "no-streaming": (["--no-streaming"], "--streaming false"),
    "no_seed": (["--no_seed", "3"], "--no_seed --seed"), "no_alhpa": (["--no_alhpa"], "alpha"),
}


if os.geteuid():
    BAD_INPUT["no permission"] = (no_permission, "closed")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_config_bad_input_is_named_in_a_line_or_two(case, tmp_path, teacher, student, text, monkeypatch):
    fields, words = BAD_INPUT[case]
    (tmp_path / "given").mkdir()
    monkeypatch.chdir(tmp_path / "given")
    given = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "output_dir": tmp_path / "out"}
    if isinstance(fields, list):
        given, more = flags(**given), fields
    else:
        fields, more = fields(tmp_path / "given") if callable(fields) else fields, []
        given = flags(**{k: v for k, v in {**given, **fields}.items() if fields.get("mode", "train") == "train" or k not in PLAIN or k in ("dtype", "seq_len") or k in fields})
    before = {path: path.read_bytes() for path in (tmp_path / "given").rglob("*") if path.is_file()}
    err = cli(*given, *more, rc=2).err.strip()
    assert err.startswith("error: ") and len(err.splitlines()) <= 2 and len(err) < 600, err
    assert all(word in err for word in words.split()), (words, err)
    assert not (tmp_path / "out").exists(), sorted((tmp_path / "out").rglob("*"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "given").rglob("*") if path.is_file()}


def test_config_a_stray_word_is_no_item_of_a_list_in_the_file(tmp_path):
    (tmp_path / "f.yaml").write_text("max_steps: 2\ncompare: [a]\n")
    assert "make sense of 'junk'" in cli("junk", "--config", tmp_path / "f.yaml", rc=2).err


def test_config_no_check_vanishes_under_python_O():
    assert not [node for node in ast.walk(ast.parse(Path(config.__file__).read_text())) if isinstance(node, ast.Assert)]


# --------------------------------------------------------------------------------------------------
# Runtime: one run a directory, digests.


def test_runtime_a_digest_sees_the_middle_of_a_long_array():
    other = np.arange(5000)
    other[2500] = 0
    assert sd.digest([np.arange(5000)]) != sd.digest([other])


def test_runtime_one_run_a_directory(out, student, text):
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


# --------------------------------------------------------------------------------------------------
# Losses: distillation_loss against float64.


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
def test_losses_and_gradients_match_float64(divergence, temperature, alpha):
    for seed in range(3):
        inputs, options = case(seed=seed), dict(alpha=alpha, temperature=temperature, divergence=divergence)
        want = exact(*inputs, **options)
        if alpha == 1:
            want[2] = want[2] * 0   # no teacher is asked
            inputs = (*inputs[:3], None, None)
        assert off(fused(*inputs, **options), want, floor=1e-3) < 1e-6


@pytest.mark.parametrize("head", [dict(bias=True), dict(scale=0.25), dict(softcap=3.0), dict(bias=True, scale=1.7, softcap=5.0)], ids=str)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_losses_honours_bias_scale_and_softcap(head, divergence):
    options = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    assert off(fused(*case(**head), **options), exact(*case(**head), **options)) < 2e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_losses_does_not_depend_on_the_chunk(divergence):
    inputs = case(n=37, bias=True, softcap=5.0, masked=0)
    options = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    whole = fused(*inputs, **options)
    for chunk in (1, 7, 36, 37, 100):
        assert off(fused(*inputs, **options, chunk=chunk), whole) < 1e-6


def test_losses_in_bf16_is_within_its_rounding():
    for seed, divergence in enumerate(("forward", "reverse", "jsd")):
        inputs = case(n=64, vocab=500, d=64, dt=96, seed=seed, dtype=torch.bfloat16)
        got, want = (f(*inputs, alpha=0.3, temperature=2.0, divergence=divergence) for f in (fused, exact))
        assert off(got, want) < 2e-2
        assert off(got[:3], want[:3]) < 4e-3   # reductions are in fp32


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_losses_gradcheck(divergence, alpha):
    hidden, head, labels, teacher_hidden, teacher_head = case(n=5, vocab=11, d=3, dt=4, bias=True, softcap=4.0, dtype=torch.float64)

    def loss(hidden, weight, bias):
        student_head = types.SimpleNamespace(weight=weight, bias=bias, scale=1.5, softcap=4.0)
        teacher = None if alpha == 1 else (teacher_hidden, teacher_head)
        return sd.distillation_loss(hidden, student_head, labels, teacher, alpha=alpha, temperature=2.0, divergence=divergence, chunk=2)[0]
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_losses_all_masked_is_zero_with_zero_gradients():
    hidden, head, labels, *teacher = case(bias=True)
    for alpha in (0.0, 0.3, 1.0):
        got = fused(hidden, head, torch.full_like(labels, -100), *(teacher if alpha < 1 else (None, None)), alpha=alpha)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_logits_of_ten_thousand_stay_finite(divergence, temperature):
    hidden, head, labels, teacher_hidden, teacher_head = case(masked=0)
    for p in (head.weight, teacher_head.weight):
        p.data.mul_(1e4)
    got = fused(hidden, head, labels, teacher_hidden, teacher_head, alpha=0.3, temperature=temperature, divergence=divergence)
    want = exact(hidden, head, labels, teacher_hidden, teacher_head, alpha=0.3, temperature=temperature, divergence=divergence)
    assert all(x.isfinite().all() for x in got)
    if divergence == "forward":   # reverse and jsd reach log 0 in the reference
        assert off(got, want) < 1e-4


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_losses_kl_is_never_negative(divergence):
    for seed in range(5):   # a teacher that is almost the student: where rounding could take it below zero
        hidden, head, labels, *_ = case(n=200, seed=seed, masked=0)
        for nudge in (0.0, 1e-6, 1e-4, 1e-2):
            near = hidden.detach() + nudge * torch.randn_like(hidden)
            for i in range(0, 200, 20):
                part = slice(i, i + 20)
                assert fused(hidden[part], head, labels[part], near[part], head, alpha=0.0, divergence=divergence, temperature=2.0)[2] > -1e-6


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_student_that_is_the_teacher_has_no_kl_gradient(divergence, temperature):
    hidden, head, labels, *_ = case(bias=True)
    _, _, kl, *grads = fused(hidden, head, labels, hidden.detach(), head, alpha=0.0, temperature=temperature, divergence=divergence)
    assert abs(kl) < 1e-6
    assert all((g == 0).all() for g in grads)


def test_losses_is_divided_by_the_denominator_and_composed_of_its_parts():
    inputs = case()
    options = dict(alpha=0.3, temperature=2.0)
    own, given = fused(*inputs, **options), fused(*inputs, **options, denominator=7.0)
    counted = (inputs[2] != -100).sum()
    assert off(given, [x * counted / 7 for x in own]) < 1e-6
    assert own[0].item() == pytest.approx(0.3 * own[1].item() + 0.7 * own[2].item(), rel=1e-6)


def test_losses_frozen_parts_get_no_gradient_and_change_nothing_else():
    hidden, head, labels, *teacher = case(bias=True)
    whole = fused(hidden, head, labels, *teacher, alpha=0.3)
    head.requires_grad_(False)
    assert off(fused(hidden, head, labels, *teacher, alpha=0.3), whole[:4]) == 0
    head.requires_grad_(True)
    assert off(fused(hidden.detach(), head, labels, *teacher, alpha=0.3), [*whole[:3], *whole[4:]]) == 0


def test_losses_larger_vocabulary_of_either_side_is_cut():
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
def test_losses_sparse_teacher_is_the_dense_one_with_the_rest_as_one_bucket(k, temperature):
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
def test_losses_compiled_loss_matches_float64(divergence, temperature):
    for n in (50, 7):   # of a vocabulary that is large enough for the compiler to be called
        inputs = case(n=n, vocab=20000)
        got, want = (f(*inputs, alpha=0.3, temperature=temperature, divergence=divergence) for f in (fused, exact))
        assert off(got, want) < 2e-6


@pytest.mark.campaign
def test_losses_without_a_compiler_the_loss_says_so_once_and_is_right(tmp_path):
    code = ("import test_simple_distill as t\nfor n in (5, 9):\n    x = t.case(n=n, vocab=20000)\n"
            "    print('off', t.off(t.fused(*x, alpha=0.3), t.exact(*x, alpha=0.3)))")
    env = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True, timeout=300)
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and shown.count("no working compiler") == 1, shown
    assert all(float(x) < 2e-6 for x in re.findall(r"^off (\S+)", done.stdout, re.M)) and done.stdout.count("off ") == 2


def test_losses_an_evaluation_forms_no_gradient():
    """Whether a weight would need one says nothing under no_grad."""
    weight, hidden, labels = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4), torch.arange(5)
    seen, real = [], torch.Tensor.addmm_
    try:
        torch.Tensor.addmm_ = lambda *args, **more: seen.append(1) or real(*args, **more)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                sd.distillation_loss(hidden, sd.Head(weight), labels, None, alpha=1.0, temperature=1.0)
    finally:
        torch.Tensor.addmm_ = real
    assert len(seen) == 1


# --------------------------------------------------------------------------------------------------
# Data: formats, splits, targets, tokenizers, batches.


def test_data_longer_prompts_change_nothing_but_the_context(tmp_path, student):
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


def test_data_the_label_is_the_next_token(tmp_path, out):
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


def test_data_collate_shifts_before_it_masks():
    rows = [{"input_ids": [5, 6, 7, 8], "targets": [False, False, True, True]}, {"input_ids": [9, 10], "targets": None}]
    batch = sd.collate(rows)
    assert batch.positions.tolist() == [1, 2, 4] and batch.labels.tolist() == [7, 8, 10]


def test_data_another_tokenizer_of_equal_size_is_refused(tmp_path, out, teacher, text):
    other = tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(roll=1))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    err = distil(out, rc=2, teacher=teacher, student=other, dataset=text, max_steps=1).err
    assert f"token {len(SPECIAL)} " in err and repr(letters[0]) in err and repr(letters[1]) in err
    assert not os.path.exists(out)


def test_data_same_tokens_but_other_merges_are_refused(tmp_path, out, text):
    one, two = (tiny_tokenizer(merges=merges) for merges in (("t u", "u r"), ("u r", "t u")))
    assert one.get_vocab() == two.get_vocab()
    pair = dict(teacher=tiny_model(tmp_path / "t", vocab=len(one), tokenizer=one), student=tiny_model(tmp_path / "s", vocab=len(two), tokenizer=two))
    distil(out, rc=2, **pair, dataset=text, max_steps=1)


def target_runs(row, tokenizer):
    """Each contiguous run of targets as text."""
    marked = zip(row["input_ids"], [True] * len(row["input_ids"]) if row["targets"] is None else row["targets"])
    return [tokenizer.decode([int(i) for i, _ in run]) for keep, run in itertools.groupby(marked, key=lambda x: bool(x[1])) if keep]


def encode(rows, tokenizer, seq_len=512):
    return sd.rows_from_columns(sd.encode({k: [row[k] for row in rows] for k in rows[0]}, tokenizer, "text", seq_len))


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
def test_data_only_the_assistants_tokens_and_their_end_mark_are_targets(template, want, bos):
    tokenizer = tiny_tokenizer(template, bos=bos)
    row, = encode([{"messages": TWO_TURNS}], tokenizer)
    assert target_runs(row, tokenizer) == want
    if template:   # and the ids are those that the template makes, with no second <|begin|>
        assert row["input_ids"] == tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)


@pytest.mark.parametrize("said, shown", [("  spaced out \n", "spaced out"), ("x", "x"), ("<|im", "<|im"), ("user", "user"), ("é日本🙂", "é日本🙂"),
                                         ("<|eot_id|>", "<|eot_id|>"), ("assistant", "assistant")])
def test_data_odd_answers_are_found_exactly(said, shown):
    tokenizer = tiny_tokenizer(LLAMA3)
    row, = encode([{"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": said}] * 2}], tokenizer)
    if shown in SPECIAL:   # an answer that is itself an end mark: nothing can tell them apart, nothing else may be counted
        shown = ""
        assert all(set(run) <= set("<|eot_id|>") for run in target_runs(row, tokenizer))
    else:
        assert target_runs(row, tokenizer) == [shown + "<|eot_id|>"] * 2


def test_data_templates_that_rewrite_earlier_turns():
    tokenizer = tiny_tokenizer(THINKING)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>hm</think>b"},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>so</think>d"}]
    row, = encode([{"messages": turns}], tokenizer)
    assert target_runs(row, tokenizer) == ["b<|im_end|>", "<think>so</think>d<|im_end|>"]


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
def test_data_conversation_columns(tmp_path, style, suffix):
    rows, path, tokenizer = [STYLES[style]] * 4, str(tmp_path / f"d.{suffix}"), tiny_tokenizer(CHATML)
    write_jsonl(path, rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    for row in sum(rows_of(path, tokenizer), []):
        assert target_runs(row, tokenizer) == ["so<|im_end|>"]
        assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\nwhy?<|im_end|>")


def test_data_instruction_with_input_shows_both(tmp_path):
    tokenizer = tiny_tokenizer(CHATML)
    row, = encode([{"instruction": "add", "input": "1 and 2", "output": "3"}], tokenizer)
    shown = tokenizer.decode(row["input_ids"])
    assert shown.index("add") < shown.index("1 and 2") < shown.index("assistant") and target_runs(row, tokenizer) == ["3<|im_end|>"]


def test_data_one_conversation_a_row_cut_to_seq_len_and_dropped_without_targets(tmp_path, out, student):
    rows = [{"prompt": "p" * n, "response": "r" * m} for n, m in ((2, 10), (3, 10), (4, 100), (16, 10), (500, 10))]
    path = write_splits(tmp_path / "d", rows, rows[:1])
    train, _ = rows_of(path, seq_len=16)
    assert [len(row["input_ids"]) for row in train] == [14, 15, 16] and [sum(row["targets"]) for row in train] == [11, 11, 11]
    shown = distil(out, student=student, dataset=path, alpha=1.0, max_steps=1, seq_len=16)
    assert "dropped 2 of 5" in shown.out + shown.err


def test_data_text_is_joined_with_eos_and_cut_into_blocks(tmp_path):
    docs = [prose(5 + i, i) for i in range(6)]
    train, held = rows_of(write_splits(tmp_path / "d", [{"text": t} for t in docs], [{"text": "held out text here"}]), seq_len=16)
    stream = tiny_tokenizer().encode("".join(t + "<|endoftext|>" for t in docs))
    want = [stream[i:i + 16] for i in range(0, len(stream), 16)]
    assert ids_of(train) == want and all(row["targets"] is None or all(row["targets"]) for row in train)
    assert decoded(held)[0] == "held out text he"


def test_data_every_local_format_gives_the_same_rows(tmp_path):
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


def test_data_tokenising_in_several_processes_gives_the_same_rows(tmp_path, student, chat):
    """In a process of its own: forking with threads about, a deadlock would take the other tests along."""
    fields = dict(student=student, dataset=chat, alpha=1.0, batch_size=8, max_steps=1, seq_len=256)
    distil(tmp_path / "one", **fields)
    process = spawn(*flags(**PLAIN | fields, output_dir=tmp_path / "two", num_proc=2))
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert column(tmp_path / "two", "train/loss") == pytest.approx(column(tmp_path / "one", "train/loss"), rel=1e-6)


def test_data_tokenised_rows_are_kept_for_the_next_run(tmp_path):
    kept = lambda: set(Path(os.environ["HF_DATASETS_CACHE"]).glob("simple_distill/*"))
    path, before = write_jsonl(tmp_path / "d.jsonl", [{"text": prose(20, i)} for i in range(30)]), kept()
    first, after_one = rows_of(path), kept()
    assert ids_of(rows_of(path)[0]) == ids_of(first[0]) and kept() == after_one != before
    assert ids_of(rows_of(path, seq_len=32)[0]) != ids_of(first[0]) and kept() != after_one


def test_data_formats_run_through_the_command_line(tmp_path, student, text):
    table = datasets.load_dataset("json", data_files=text, split="train")
    table.to_parquet(str(tmp_path / "d.parquet"))
    results = []
    for name in (text, str(tmp_path / "d.parquet")):
        distil(tmp_path / str(len(results)), student=student, dataset=name, alpha=1.0, max_steps=2)
        results.append(final_weights(tmp_path / str(len(results))))
    assert same(*results)


def test_data_text_column_and_unknown_columns(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"body": prose(20, i), "id": i} for i in range(10)])
    err = distil(out, rc=2, student=student, dataset=path, alpha=1.0, max_steps=1).err
    assert "'text'" in err and "body" in err and "id" in err
    distil(out, student=student, dataset=path, alpha=1.0, max_steps=1, text_column="body")


def test_data_held_out_rows_are_never_trained_on(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": f"answer {i:03d}"} for i in range(100)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    train, held = (decoded(x) for x in rows_of(path))
    assert held and not set(train) & set(held) and len(set(train) | set(held)) == len(train) + len(held) == 100
    assert (train, held) == tuple(decoded(x) for x in rows_of(path))
    assert len(rows_of(path, eval_samples=2)[1]) <= 2


def test_data_text_that_is_held_out_is_in_no_block_of_train(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    train, held = ("".join(decoded(x)) for x in rows_of(path))
    numbers = lambda s: set(re.findall(r"<(\d{3})>", s))
    assert numbers(held) and not numbers(train) & numbers(held)


def test_data_eval_split_is_used_where_there_is_one(tmp_path, out, student, chat):
    train, held = rows_of(chat, seq_len=256)
    assert (len(train), len(held)) == (8, 4)
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(talk(5)), other=datasets.Dataset.from_list(talk(3)))
    both.save_to_disk(str(tmp_path / "saved"))
    assert [len(x) for x in rows_of(tmp_path / "saved", eval_split="other", seq_len=256)] == [5, 3]
    assert [len(x) for x in rows_of(tmp_path / "saved", train_split="other", eval_split="train", seq_len=256)] == [3, 5]
    err = distil(out, rc=2, student=student, dataset=tmp_path / "saved", eval_split="absent", alpha=1.0, max_steps=1).err
    assert "absent" in err
    assert "absent" in distil(out, rc=2, student=student, dataset=tmp_path / "saved", train_split="absent", alpha=1.0, max_steps=1).err


def test_data_max_samples_takes_the_first_rows(tmp_path):
    rows = [{"prompt": f"question {i:03d}", "response": "a"} for i in range(40)]
    train, held = rows_of(write_splits(tmp_path / "d", rows, rows[:1]), max_samples=7)
    assert [re.search(r"\d+", x)[0] for x in decoded(train)] == [f"{i:03d}" for i in range(7)]


def test_data_one_long_document_keeps_its_end_for_evaluation(tmp_path):
    (tmp_path / "d.txt").write_text(prose(2000))
    train, held = (decoded(x) for x in rows_of(tmp_path / "d.txt"))
    assert len(held) >= 1 and "".join(train + held) == prose(2000) + "<|endoftext|>"


def splits_of(**fields):
    return sd.load_splits(config.Config(**fields))


def test_data_splits_by_their_role(tmp_path, text):
    """One file has one split, train; asked for by its own name it is all evaluated, and a name it has not is refused by that name."""
    with pytest.raises(config.UserError, match="no split 'validation'"):
        splits_of(dataset=text, train_split="validation")
    with pytest.raises(config.UserError, match="no split 'test'"):
        splits_of(dataset=text, eval_split="test")
    raw, held = splits_of(dataset=text, eval_split="train")
    assert len(raw) + len(held) == 40 and len(held) == 2
    _, held = splits_of(mode="eval", dataset=text, eval_split="train")
    assert len(held) == 40


@pytest.mark.parametrize("first, rows", [
    ({"messages": "hi", "text": "one two"}, 3), ({"text": None}, 2), ({"prompt": "a", "response": None}, 2),
    ({"conversations": [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}]}, 3),
    ({"prompt": [{"role": "user", "content": "a"}], "response": "b"}, 3)])
def test_data_odd_rows_are_read_as_they_are_meant(tmp_path, student, first, rows):
    """Columns in another's style, and rows without a value at the beginning."""
    whole = {"text": "one two"} if "text" in first else {"prompt": "c", "response": "d"} if first.get("response", 1) is None else first
    path = write_jsonl(tmp_path / "data.jsonl", [first, whole, whole])
    made = sd.encode(datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))[:], tiny_tokenizer(), "text", 99)
    splits_of(dataset=path)
    assert len(made["input_ids"]) == (1 if "text" in first else rows)


def test_data_an_epoch_sees_every_row_once_in_an_order_of_its_own(tmp_path, out, student):
    """Rows of equal length and a student that stands still: the mean of the steps, weighted by rows, is the mean of the rows."""
    rows = [{"prompt": prose(2, i), "response": f"{prose(9, i):.9}"} for i in range(10)]
    distil(out, student=student, dataset=write_splits(tmp_path / "d", rows, rows), seq_len=256, alpha=1.0, batch_size=4, num_epochs=2, learning_rate=STILL)
    losses = column(out, "train/loss")
    for epoch in (losses[:3], losses[3:]):
        assert (4 * epoch[0] + 4 * epoch[1] + 2 * epoch[2]) / 10 == pytest.approx(column(out, "eval/loss")[-1], rel=1e-6)
    assert losses[:3] != losses[3:]


def test_data_a_line_of_10_mb_is_read_or_named(tmp_path, out, student):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 2_000_000}) + "\n" + GOOD_LINE * 9)
    distil(out, student=student, alpha=1, dataset=tmp_path / "a.jsonl", max_steps=1, eval_samples=4)
    assert len(column(out, "train/loss")) == 1


# --------------------------------------------------------------------------------------------------
# Models and FSDP: architectures, heads, layers:N, precision.


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_models_padded_vocabulary_trains_as_the_unpadded_one(tmp_path, teacher, student, text, who):
    pair = dict(teacher=teacher, student=student)
    fields = dict(dataset=text, alpha=0.3, temperature=2.0, max_steps=3)
    distil(tmp_path / "even", **pair, **fields)
    pair[who] = padded(tmp_path / "padded", pair[who], 128)
    distil(tmp_path / "odd", **pair, **fields)
    for key in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/loss"):
        assert column(tmp_path / "odd", key) == pytest.approx(column(tmp_path / "even", key), rel=1e-6)
    even, odd = final_weights(tmp_path / "even"), final_weights(tmp_path / "odd")
    assert distance({k: v[:len(even[k])] for k, v in odd.items()}, even) < 1e-6


def test_models_tokenizer_larger_than_the_model_is_refused(tmp_path, out, text):
    distil(out, rc=2, student=tiny_model(tmp_path / "s", vocab=200), dataset=text, alpha=1.0, max_steps=1)


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
def test_models_layers_n_of_every_architecture_with_its_own_head(tmp_path, out, chat, name):
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


def test_models_layers_n_without_a_teacher_in_the_loss(tmp_path, out, text):
    path = tiny_model(tmp_path / "teacher", layers=4)
    distil(out, teacher=path, student="layers:2", dataset=text, alpha=1.0, max_steps=1)
    assert load(f"{out}/final").config.num_hidden_layers == 2
    for wrong in ("layers:0", "layers:5", "layers:x", "layers:"):
        distil(tmp_path / "no", rc=2, teacher=path, student=wrong, dataset=text, max_steps=1)


@pytest.mark.parametrize("special", [dict(mlp_only_layers=[4]), dict(decoder_sparse_step=2)], ids=str)
def test_models_layers_n_of_a_mixture_with_some_dense_layers(tmp_path, out, text, special):
    path = tiny_model(tmp_path / "teacher", layers=5, **MODELS["qwen3_moe"], **special)
    done = sd.main(words_of(flags(**PLAIN, output_dir=out, teacher=path, student="layers:3", dataset=text, max_steps=1)))
    assert done in (0, 2)   # thinned rightly, or refused: never a traceback


def test_models_student_from_a_config_file_starts_random_by_seed(tmp_path, teacher, text):
    shape = str(tmp_path / "shape.json")
    tiny_config(hidden=16, layers=1).to_json_file(shape)
    got = []
    for i, seed in enumerate((1, 1, 2)):
        distil(tmp_path / str(i), teacher=teacher, student=shape, dataset=text, max_steps=1, seed=seed, learning_rate=STILL)
        got.append(final_weights(tmp_path / str(i)))
    assert same(got[0], got[1]) and not same(got[0], got[2])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "0" / "final").get_vocab() == tiny_tokenizer().get_vocab()   # the teacher's
    distil(tmp_path / "own", student=shape, tokenizer=teacher, dataset=text, alpha=1.0, max_steps=1)


def test_models_a_head_that_the_loss_would_not_reproduce_is_refused(tmp_path, out, text):
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
def test_models_missing_models_are_one_line(out, teacher, student, text, role):
    for name in ("/nowhere/model", "nobody/no-such-model", "/nowhere/shape.json"):
        err = distil(out, rc=2, **{**dict(teacher=teacher, student=student), role: name}, dataset=text, max_steps=1).err
        assert name in err and len(err.strip().splitlines()) <= 2
        assert not os.path.exists(out)


def test_models_final_loads_with_the_auto_classes_and_generates(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2)
    assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(f"{out}/final"), transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    ids = model.generate(**tokenizer("one two", return_tensors="pt", return_token_type_ids=False), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape[1] == len("one two") + 4 and tokenizer("one two")["input_ids"] == tiny_tokenizer()("one two")["input_ids"]
    assert not same(final_weights(out), weights(student))


def test_models_gradient_checkpointing_changes_nothing(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=3, gradient_checkpointing=on)
    assert distance(final_weights(tmp_path / "on"), final_weights(tmp_path / "off")) < 1e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_mixed_precision_stays_close_and_keeps_fp32_masters(tmp_path, teacher, student, text, dtype):
    for name in ("fp32", dtype):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=3, dtype=name)
    assert column(tmp_path / dtype, "train/loss") == pytest.approx(column(tmp_path / "fp32", "train/loss"), rel=2e-2)
    assert column(tmp_path / dtype, "train/grad_norm") == pytest.approx(column(tmp_path / "fp32", "train/grad_norm"), rel=5e-2)
    assert column(tmp_path / dtype, "train/skipped_steps") == [0, 0, 0]
    tensors = checkpoint(tmp_path / dtype, 3)
    assert all(v.dtype == torch.float32 for k, v in tensors.items() if "weight" in k)
    assert distance({k: v.float() for k, v in final_weights(tmp_path / dtype).items()}, final_weights(tmp_path / "fp32")) < 2e-2


def test_models_checkpointing_does_not_recompute_what_is_frozen(student):
    """transformers makes embeddings ask for a gradient; without it nothing below the first trained layer is kept or run again."""
    with sd.process_group():
        root = sd.load_student(config.Config(student=student, teacher=student, alpha=0.0))
        calls, layers = [], sd.layers_of(root.model)[1]
        for name, p in root.model.named_parameters():
            p.requires_grad_("layers.1." in name)
        layers[0].self_attn.register_forward_hook(lambda *_: calls.append(0))
        layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
        root(lambda model: sd.hidden_states(model, torch.arange(8)[None]).sum()).backward()
    assert calls == [0, 1, 1]


def test_models_a_model_with_persistent_buffers_is_saved(tmp_path, text):
    shape = dict(cls="DeepseekV3Config", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
                 first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
    path = tiny_model(tmp_path / "model", **shape)
    edit_weights(path, lambda tensors: tensors["model.layers.1.mlp.gate.e_score_correction_bias"].copy_(torch.tensor([1., 2., 3., 4.])))
    distil(tmp_path / "out", teacher=path, student=path, dataset=text, max_steps=1)
    assert final_weights(tmp_path / "out")["model.layers.1.mlp.gate.e_score_correction_bias"].tolist() == [1, 2, 3, 4]


@pytest.mark.campaign
def test_models_compile_changes_nothing_but_rounding(tmp_path, teacher, student, text):
    for name, on in (("on", True), ("off", False)):
        distil(tmp_path / name, teacher=teacher, student=student, dataset=text, max_steps=2, compile=on)
    assert column(tmp_path / "on", "train/loss") == pytest.approx(column(tmp_path / "off", "train/loss"), rel=1e-4)


def test_models_layers_of_a_nested_text_model_are_refused():
    with pytest.raises(config.UserError, match="text model is part of a larger one"):
        sd.cut_layers(transformers.Gemma3Config(), "layers:2", "x")


# --------------------------------------------------------------------------------------------------
# Optimiser: rates, groups, schedules.


def test_optimiser_lr_multipliers_freeze_scale_and_say_so(out, teacher, student, text):
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


def test_optimiser_a_pattern_that_matches_nothing_is_named(out, student, text):
    err = distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, lr_multipliers=["embed=0.5", "no_such_layer=0"]).err
    assert "no_such_layer" in err and not os.path.exists(out)
    for wrong in ("embed", "embed=x", "embed=-1", "(=1"):
        assert wrong.partition("=")[0] in distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, lr_multipliers=[wrong]).err
    distil(out, rc=2, student=student, dataset=text, alpha=1.0, max_steps=1, default_lr_multiplier=0)


def test_optimiser_norms_and_biases_do_not_decay(tmp_path, text):
    path = tiny_model(tmp_path / "gpt2", **MODELS["gpt2"])
    distil(tmp_path / "a", student=path, teacher=path, dataset=text, alpha=0.0, max_steps=1, weight_decay=0.5, learning_rate=0.1)
    before, after = weights(path), final_weights(tmp_path / "a")   # no gradient: all that moves is decay
    for name in before:
        want = before[name] * (1 - 0.1 * 0.5) if before[name].ndim >= 2 else before[name]
        assert torch.allclose(after[name], want, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
                                  "warmup_stable_decay", "cosine_with_min_lr"])
def test_optimiser_schedulers(out, student, text, name):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=3, lr_scheduler=name, warmup_ratio=0 if name == "constant" else 0.4,
           lr_scheduler_kwargs='{"min_lr": 1e-5}' if "min" in name else None)
    assert all(0 <= rate <= 1e-3 for rate in column(out, "train/learning_rate"))


def test_optimiser_a_pattern_that_matches_only_a_tied_head_says_so(out, text, tmp_path):
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    fields = dict(student=tied, alpha=1.0, dataset=text, max_steps=1)
    err = distil(out, rc=2, **fields, lr_multipliers=["layers=0.5", "lm_head=0"]).err
    assert "lm_head" in err and "tied to model.embed_tokens.weight" in err and not os.path.exists(out)
    distil(out, **fields, lr_multipliers=["embed|lm_head=0"])
    assert torch.equal(final_weights(out)["model.embed_tokens.weight"], weights(tied)["model.embed_tokens.weight"])


# --------------------------------------------------------------------------------------------------
# Checkpoints: save, find, resume, damage, full disks.


def test_checkpoints_resume_goes_on_as_if_it_had_not_stopped(tmp_path, teacher, student, text):
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


def test_checkpoints_a_batch_divided_anew_is_accepted_again(tmp_path):
    """From one rank to three, and on three once more: the typed batch stays what it was."""
    cfg = config.Config(batch_size=8)
    first = sd.plan_batch(cfg, None, 1)
    state = {"global_batch": first[2], "batch": [8, 1]}
    assert sd.plan_batch(cfg, state, 3) == (3, 1, 8) == sd.plan_batch(cfg, {**state, "global_batch": 8}, 3)
    with pytest.raises(config.UserError, match="sequences a step"):
        sd.plan_batch(config.Config(batch_size=4), state, 3)


def test_checkpoints_resume_never_and_by_path(tmp_path, student, text):
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


def test_checkpoints_keep_checkpoints(out, student, text):
    distil(out, student=student, dataset=text, alpha=1.0, max_steps=5, save_steps=1, keep_checkpoints=2)
    assert sorted(os.listdir(f"{out}/checkpoints")) == ["step-00000004", "step-00000005"]
    state = json.loads(Path(out, "checkpoints", "step-00000005", "state.json").read_text())
    assert state["step"] == 5 and state["epoch"] == pytest.approx(column(out, "train/epoch")[-1])


@pytest.mark.parametrize("damage", [
    lambda content: content[:100],                        # truncated: known by its size
    lambda content: bytes(100) + content[100:],           # of the right size: known when it is loaded
], ids=["truncated", "overwritten"])
def test_checkpoints_an_unreadable_newest_checkpoint_is_passed_over(tmp_path, out, student, text, damage):
    fields = dict(student=student, dataset=text, alpha=1.0, save_steps=2)
    distil(out, **fields, max_steps=4)
    for file in Path(out, "checkpoints", "step-00000004").glob("*.distcp"):
        file.write_bytes(damage(file.read_bytes()))
    shown = distil(out, **fields, max_steps=6)
    assert re.search("step-00000004 .*passed over", shown.out + shown.err)
    distil(tmp_path / "whole", **fields, max_steps=6)
    assert same(final_weights(out), final_weights(tmp_path / "whole")) and column(out, "train/step") == [1, 2, 3, 4, 5, 6]


def test_checkpoints_a_changed_config_is_refused_by_field(out, teacher, student, text):
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2)
    err = distil(out, rc=2, teacher=teacher, student=student, dataset=text, max_steps=4, learning_rate=5e-4, temperature=2.0).err
    assert "learning_rate" in err and "temperature" in err and "0.0005" in err and "alpha" not in err
    assert column(out, "train/step") == [1, 2]


def test_checkpoints_each_truncated_file_makes_it_fall_back(tmp_path, teacher, student, text):
    fields = dict(teacher=teacher, student=student, dataset=text, save_steps=2, batch_size=4)
    distil(tmp_path / "whole", **fields, max_steps=4)
    newest = Path("checkpoints", "step-00000004")
    files = sorted(f.name for f in (tmp_path / "whole" / newest).iterdir())
    assert "state.json" in files and ".metadata" in files
    for file in files:
        run = tmp_path / f"run{file}"
        shutil.copytree(tmp_path / "whole", run)
        config_file = json.loads((run / "config.json").read_text()) | {"output_dir": str(run)}
        (run / "config.json").write_text(json.dumps(config_file))
        shutil.rmtree(run / "final")
        with open(run / newest / file, "r+b") as f:
            f.truncate(os.path.getsize(f.name) // 2)
        shown = distil(run, **fields, max_steps=4).out
        assert "step-00000004 is not readable" in shown and "resumes from" in shown and "step-00000002" in shown
        assert same(final_weights(run), final_weights(tmp_path / "whole")) and quiet_log(run) == quiet_log(tmp_path / "whole")
    shutil.rmtree(run / newest)
    os.truncate(run / "checkpoints" / "step-00000002" / "state.json", 3)
    assert "no readable checkpoint" in distil(run, **fields, max_steps=6, rc=2).err


def test_checkpoints_a_full_disk_loses_nothing_old(tmp_path, teacher, student, text):
    """A file-size limit makes every larger write fail as a full disk does: the run goes on, says so, and ends with an error."""
    fields = dict(PLAIN, teacher=teacher, student=student, dataset=text, save_steps=2, output_dir=tmp_path / "run")
    Fork(tmp_path / "a.txt", *flags(**fields, max_steps=2)).wait()
    before = checkpoint(tmp_path / "run", 2)
    shown = Fork(tmp_path / "b.txt", *flags(**fields, max_steps=6), limit=20_000).wait()
    assert shown.count("could not be saved") >= 2 and "error: the run could not be saved" in shown and "Traceback" not in shown, shown
    assert same(checkpoint(tmp_path / "run", 2), before)
    assert "done in" in Fork(tmp_path / "c.txt", *flags(**fields, max_steps=6)).wait()
    assert not list(Path(tmp_path, "run", "checkpoints").glob("tmp*"))


def test_checkpoints_a_full_tmpfs(tmp_path, teacher, student, text):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        shown = distil(place / "run", teacher=teacher, student=student, dataset=text, save_steps=1, keep_checkpoints=9, max_steps=6, rc=2)
        assert "could not be saved" in shown.out + shown.err
        kept = sorted(p.name for p in (place / "run" / "checkpoints").glob("step-*"))
        assert kept[0] == "step-00000001" and len(checkpoint(place / "run", 1)) > 3
    finally:
        subprocess.run(["umount", place], check=True)


# --------------------------------------------------------------------------------------------------
# Train: the command line against an independent reference; what a run leaves behind.


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_train_five_steps_match_plain_pytorch(tmp_path, teacher, student, out, divergence):
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


def test_train_batch_and_accumulation_are_interchangeable(tmp_path, teacher, student, chat):
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
def test_train_student_that_is_the_teacher_does_not_move(out, teacher, text, divergence):
    distil(out, teacher=teacher, student=teacher, dataset=text, alpha=0.0, temperature=2.0, max_steps=3, divergence=divergence)
    assert all(abs(kl) < 1e-6 for kl in column(out, "train/kl_loss"))
    assert same(final_weights(out), weights(teacher))


def test_train_alpha_1_never_touches_the_teacher(out, student, text):
    for teacher in ("/nowhere/teacher", None):
        distil(out, teacher=teacher, student=student, dataset=text, alpha=1.0, max_steps=2, resume="never")
        assert column(out, "train/kl_loss") == [0, 0] and column(out, "train/loss") == column(out, "train/ce_loss")
        assert sorted(os.listdir(out)) == ["checkpoints", "config.json", "final", "log.jsonl"]   # nothing of the demo either


def test_train_epochs_steps_and_schedule_agree(tmp_path, student):
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
def test_train_part_of_an_epoch(tmp_path, out, student, num_epochs, steps):
    distil(out, student=student, dataset=write_splits(tmp_path / "d", talk(10), talk(2)), seq_len=256, alpha=1.0, batch_size=4, num_epochs=num_epochs)
    assert column(out, "train/step") == list(range(1, steps + 1))


def test_train_seed_decides(tmp_path, student, text):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distil(tmp_path / name, student=student, dataset=text, alpha=1.0, max_steps=2, seed=seed)
    assert same(final_weights(tmp_path / "a"), final_weights(tmp_path / "b")) and not same(final_weights(tmp_path / "a"), final_weights(tmp_path / "c"))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_train_ten_steps_that_are_not_finite_stop_the_run_with_a_checkpoint(tmp_path, out, teacher, student, role):
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
def test_train_a_row_that_breaks_the_loss_skips_its_step_only(tmp_path, out, teacher, student, role):
    pair = dict(teacher=teacher, student=student)
    pair[role] = break_letter(pair[role], tmp_path / "broken")
    rows = [{"prompt": "Z" if i % 4 == 0 else "a", "response": prose(3, i)} for i in range(12)]
    distil(out, **pair, dataset=write_splits(tmp_path / "d", rows, rows[1:3]), seq_len=64, batch_size=1, num_epochs=1, weight_decay=0.1)
    assert column(out, "train/skipped_steps")[-1] == 3
    assert sum(x is not None for x in column(out, "train/loss")) == 9   # null: JSON knows no NaN
    before, after = weights(pair["student"]), final_weights(out)
    assert not same(before, after) and all(after[k].isfinite().all() for k in after if "embed" not in k)


def test_train_a_model_that_is_broken_throughout_is_called_that(tmp_path, out, teacher, student, text):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    edit_weights(broken, lambda w: w["model.norm.weight"][0].fill_(math.inf))
    err = distil(out, rc=2, teacher=broken, student=student, dataset=text, max_steps=20).err
    assert "finite" in err.lower()   # not: a head that nobody knows


def test_train_a_batch_without_any_target_changes_nothing_and_is_reported(tmp_path, monkeypatch, student, text):
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


TRAIN_KEYS = {"train/" + k for k in "loss ce_loss kl_loss learning_rate grad_norm epoch step tokens_per_second skipped_steps".split()}
EVAL_KEYS = {"eval/" + k for k in "loss ce_loss kl_loss perplexity min_loss epoch step".split()}


def test_train_log_has_exactly_the_keys_of_the_contract(out, teacher, student, text):
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


def test_train_evaluation_is_the_mean_over_held_out_tokens(out, tmp_path, teacher, student):
    rows = talk(7)
    for path in (teacher, student):
        shutil.copytree(path, tmp_path / Path(path).name)
        tiny_tokenizer(CHATML).save_pretrained(tmp_path / Path(path).name)
    distil(out, teacher=tmp_path / "teacher", student=tmp_path / "student", dataset=write_splits(tmp_path / "d", talk(3), rows), seq_len=256,
           batch_size=3, max_steps=1, alpha=0.3, temperature=2.0, learning_rate=STILL)
    want = model_losses(load(student), load(teacher), chatml_rows(rows), 0.3, 2.0)
    assert [log(out, "eval")[-1]["eval/" + k] for k in ("loss", "ce_loss", "kl_loss")] == pytest.approx([x.item() for x in want], rel=1e-5)


def test_train_closing_table_and_sample(out, teacher, student, text):
    shown = distil(out, teacher=teacher, student=student, dataset=text, max_steps=2).out
    sizes = [f"{sum(v.numel() for v in weights(path).values()):,}" for path in (teacher, student)]
    for who, size in (("teacher", sizes[0]), ("student before", sizes[1]), ("student after", sizes[1])):
        assert re.search(rf"^{who}\s.*\d.*{size}", shown, re.M), shown
    assert f"{column(out, 'eval/perplexity')[-1]:.2f}" in shown and "sample" in shown


@pytest.fixture
def no_wandb_settings(monkeypatch):
    for name in [k for k in os.environ if k.startswith("WANDB")]:
        monkeypatch.delenv(name)


def test_train_wandb_missing(out, student, text, monkeypatch, no_wandb_settings):
    monkeypatch.setitem(sys.modules, "wandb", None)   # importing it fails
    shown = distil(out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True)
    assert len(re.findall("^wandb.*", shown.out + shown.err, re.M)) == 1


def test_train_wandb_not_logged_in_never_waits_at_a_prompt(tmp_path, out, student, text, no_wandb_settings):
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


def test_train_wandb_gets_the_same_keys_and_the_whole_config(out, teacher, student, text, monkeypatch, no_wandb_settings):
    """A stand-in for the service, not for our code."""
    seen = types.SimpleNamespace(config=None, entries=[], finished=False)

    def init(config, **_):
        seen.config = config
        return types.SimpleNamespace(id="abc", log=lambda entry, step=None: seen.entries.append(entry), finish=lambda exit_code: setattr(seen, "finished", exit_code == 0))
    fake = types.SimpleNamespace(login=lambda **_: True, init=init, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    distil(out, teacher=teacher, student=student, dataset=text, max_steps=2, use_wandb=True)
    assert seen.entries == log(out) and seen.finished
    assert {k for k in config.FIELDS if k not in seen.config} == set() and "key" not in json.dumps(seen.config).split()


@pytest.mark.campaign
def test_train_wandb_offline(out, student, text):
    process = spawn(*flags(**PLAIN, output_dir=out, student=student, dataset=text, alpha=1.0, max_steps=1, use_wandb=True), env={"WANDB_MODE": "offline"})
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and list(Path(out, "wandb").glob("offline-run-*")), shown


def test_train_log_is_strict_json(out, teacher, student, tmp_path):
    rows = [{"prompt": "Z" if i % 2 else "a", "response": "one two"} for i in range(4)]
    broken = break_letter(student, tmp_path / "broken")
    distil(out, student=broken, alpha=1.0, dataset=write_splits(tmp_path / "d", rows, rows[:2]), batch_size=1)
    refuse = lambda word: pytest.fail(word)
    with open(f"{out}/log.jsonl") as f:
        entries = [json.loads(line, parse_constant=refuse) for line in f]
    assert any(e.get("train/loss", 0) is None for e in entries) and all(e["train/grad_norm"] for e in entries if e.get("train/loss"))


def test_train_wandb_is_finished_when_training_fails(out, teacher, student, tmp_path, monkeypatch):
    """A stand-in for the service, not for our code."""
    ended = []
    run = types.SimpleNamespace(id="abc", log=lambda entry, step=None: None, finish=lambda exit_code: ended.append(exit_code))
    fake = types.SimpleNamespace(login=lambda **_: True, init=lambda **_: run, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    broken = break_letter(student, tmp_path / "broken")
    rows = [{"prompt": "Z", "response": "one two"}] * 12
    distil(out, rc=2, student=broken, alpha=1.0, dataset=write_splits(tmp_path / "d", rows, rows[:2]), batch_size=1, use_wandb=True)
    assert ended == [1]


# --------------------------------------------------------------------------------------------------
# Optional: streaming: the same rows from a stream.


def test_streaming_a_stream_reads_the_head_of_its_eval_split(tmp_path, monkeypatch):
    """Nothing is prepared whole on disk, and no more is read than eval_samples sequences need."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_splits(tmp_path / "data", [{"text": prose(50, i)} for i in range(50)], [{"text": prose(50, i)} for i in range(3000)])
    cfg = config.Config(dataset=folder, streaming=True, max_steps=1, eval_samples=5, seq_len=32)
    raw, held = sd.split_stream(cfg)
    assert not isinstance(raw, datasets.Dataset) and 5 <= len(held) < 20 and held[0]["text"] == prose(50, 0)
    assert sum(p.stat().st_size for p in Path(tmp_path, "cache").rglob("*") if p.is_file()) < 5000


def test_streaming_a_short_stream_is_not_held_out_whole(out, student, text):
    distil(out, student=student, dataset=text, alpha=1, streaming=True, max_steps=2)   # 40 rows, 256 would be held out
    assert len(column(out, "train/loss")) == 2


@pytest.mark.parametrize("shuffle_buffer", [0, 3])
def test_streaming_a_stream_trains_on_the_same_rows(tmp_path, teacher, student, chat, shuffle_buffer):
    """Three passes over eight rows, eight a step: in whatever order they come, each step is all of them."""
    fields = dict(teacher=teacher, student=student, dataset=chat, seq_len=256, batch_size=8, max_steps=3, alpha=0.3)
    distil(tmp_path / "table", **fields)
    distil(tmp_path / "stream", **fields, streaming=True, shuffle_buffer=shuffle_buffer)
    assert column(tmp_path / "stream", "train/loss") == pytest.approx(column(tmp_path / "table", "train/loss"), rel=1e-6)
    assert column(tmp_path / "stream", "eval/loss") == pytest.approx(column(tmp_path / "table", "eval/loss"), rel=1e-6)
    assert distance(final_weights(tmp_path / "stream"), final_weights(tmp_path / "table")) < 1e-5


def test_streaming_a_stream_holds_rows_out_and_needs_max_steps(tmp_path, out, student):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"<{i:03d}>" * 6} for i in range(60)])
    err = distil(out, rc=2, student=student, dataset=path, alpha=1.0, streaming=True).err
    assert "max_steps" in err
    train, held = rows_of(path, streaming=True, eval_samples=10)
    seen = {re.search(r"<(\d{3})>", row["text"])[1] for row in train}
    numbers = set(re.findall(r"<(\d{3})>", "".join(decoded(held))))
    assert numbers and seen and not seen & numbers
    distil(out, student=student, dataset=path, alpha=1.0, streaming=True, eval_samples=10, max_steps=2)


def test_streaming_stream_of_text_is_the_same_blocks(tmp_path, student):
    """Unshuffled, the sequences of a stream are those of the table, also across the windows it is read in."""
    docs = [{"text": prose(5 + i % 7, i)} for i in range(30)]
    path = write_splits(tmp_path / "d", docs, docs[:1])
    for name, fields in (("a", {}), ("b", dict(streaming=True, shuffle_buffer=0, max_steps=1))):
        size = len(rows_of(path, seq_len=32)[0])
        distil(tmp_path / name, student=student, dataset=path, alpha=1.0, batch_size=size, **{"max_steps": 1, **fields}, learning_rate=STILL)
    assert column(tmp_path / "a", "train/loss") == pytest.approx(column(tmp_path / "b", "train/loss"), rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Optional: demo: from nothing to a better student.


def test_demo_the_demo_decides_only_what_is_left_open(tmp_path):
    """Its defaults fill in for the demo alone, never beside a flag that rules them out; and config.json says it all again."""
    assert config.parse_config([]).max_steps == 500 and config.parse_config(["--max_steps", "7", "--num_epochs", "2"]).max_steps == 7
    (tmp_path / "run.yaml").write_text("num_epochs: 2\n")
    for words in (["--num_epochs", "2"], ["--num-epochs=1"], ["--config", str(tmp_path / "run.yaml")], ["--blockwise", "--num_epochs", "0"]):
        assert config.parse_config(words).max_steps is None, words
    assert config.parse_config(["--mode", "eval"]).seq_len == 128 == config.parse_config(["--mode", "eval", "--student", "s"]).seq_len
    assert config.parse_config(["--mode", "eval", "--teacher", "t", "--dataset", "d"]).seq_len == 512
    assert config.parse_config(["--teacher", "t", "--student", "s", "--dataset", "d"]).seq_len == 512
    for i, words in enumerate(([], ["--num_epochs", "2"], ["--blockwise", "--train_lm_head", "false"], ["--blockwise", "--num_epochs", "0"],
                               ["--lr_scheduler", "constant"], ["--mode", "cache", "--cache_dir", "c", "--cache_method", "topk"], ["--mode", "eval"],
                               ["--teacher", "t", "--student", "s", "--dataset", "d", "--streaming", "--max_steps", "2", "--shuffle_buffer", "3"])):
        cfg = config.parse_config(words)
        sd.write_json(cfg, tmp_path / f"{i}.json")
        assert config.parse_config(["--config", str(tmp_path / f"{i}.json")]) == cfg, words
        assert cfg.mode != "train" or config.Config(**config.result_knobs(cfg))   # as mode eval does with a checkpoint


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
    for step, most in ((250, 10), (500, 15)):   # measured: 7.6 and 12.3 degrees, at the end there is little gradient left; top 12: 44, 62
        full, sampled, topk = gradients_of_a_cache(out, step)
        print(f"step {step}: {angle(full, sampled):.1f} degrees from 50 draws, {angle(full, topk):.1f} from the top 12")
        assert angle(full, sampled) < most < 30 < angle(full, topk)


def angle(a, b):
    return math.degrees(math.acos(min(1.0, float(a @ b / a.norm() / b.norm()))))


def gradients_of_a_cache(out, step):
    """Gradients of the student's KL at a checkpoint, on 64 held-out sequences (8,128 tokens) of the demo: whole teacher, 50 draws, top 12
    renormalised."""
    teacher, student = load(f"{out}/demo/teacher/final"), load(f"{out}/final")
    weights = {k.removeprefix("model.model."): v for k, v in checkpoint(out, step).items() if k.startswith("model.model.")}
    student.load_state_dict(weights, strict=False)   # the tied head is not among them
    row = lambda text: torch.tensor(tokenizer(text)["input_ids"][:128])
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{out}/final")
    with open(f"{out}/demo/corpus/validation.jsonl") as f:
        ids = torch.stack([x for x in (row(json.loads(line)["text"]) for line in f) if len(x) == 128][:64])
    with torch.no_grad():
        hidden, head = teacher.base_model(ids)[0].flatten(0, 1), sd.head_of(teacher)
        logp = torch.log_softmax(hidden @ head.weight.T, -1)
    m = _cache_manifest(len(head.weight), "sample", 50)
    rows = [{"input_ids": x.numpy(), "targets": None} for x in ids]
    kept = sd.pack_teacher(lambda batch: (hidden[batch.positions], head), rows, 0, m)
    sampled = [sd.unpack_row(data, *map(int, counts[1:4]), m)["sparse"] for data, counts in kept]
    sampled = sd.SparseTarget(*(torch.from_numpy(np.concatenate(x)) for x in zip(*sampled)))
    where = sd.collate(rows).positions
    top, listed = logp[where].topk(12)
    top = torch.softmax(top, -1)
    found = []
    for signal_ in ((hidden[where], head), sampled, sd.SparseTarget(listed, top, torch.zeros(len(top)), torch.zeros(len(top)))):
        student.zero_grad()
        states = student.base_model(ids)[0].flatten(0, 1)[where]
        sd.distillation_loss(states, sd.head_of(student), ids.flatten()[where + 1], signal_, alpha=0.0, temperature=1.0)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]).double())
    return found


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


# ---- what it costs


def bench_cache():
    """Tables: entries a second on one core, bytes a token, and a training step from the cache
    beside one on labels only."""
    torch.set_num_threads(1)
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
    model = transformers.LlamaForCausalLM(LlamaConfig(
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
                 wd_per_block=0)


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
        rows, _ = sd.load_data(cfg, AutoTokenizer.from_pretrained(block.student))
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
# Optional: generate: against the real SDKs and a server of our own that misbehaves.


def _gen_words(seed, count=40):
    rng, stems = random.Random(seed), "list map tree queue sort find merge split read write open close".split()
    return " ".join(f"{rng.choice(stems)}{rng.randrange(1000)}" for _ in range(count))


class _GenServer(http.server.ThreadingHTTPServer):
    """OpenAI and Anthropic on loopback; `fault(prompt, nth)` says how the nth try of a prompt misbehaves."""
    daemon_threads, request_queue_size, handle_error = True, 200, lambda *_: None   # clients get killed

    def __init__(self, fault=lambda prompt, nth: None, reply=_gen_words, delay=lambda: 0, runner=threading.Thread):
        self.fault, self.reply, self.delay, self.lock = fault, reply, delay, threading.Lock()
        self.tries, self.billed, self.seen = collections.Counter(), collections.Counter(), []
        super().__init__(("127.0.0.1", 0), _GenHandler)
        self.runner = runner(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.runner.start()
        return self

    def __exit__(self, *_):
        self.shutdown() if isinstance(self.runner, threading.Thread) else self.runner.kill()
        self.server_close()


class _GenHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, log_message, wbufsize = "HTTP/1.1", lambda *_: None, -1

    def answer(self, status, body, pause=0, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        for i in range(0, len(data), 200):
            self.wfile.write(data[i:i + 200])
            if pause:
                self.wfile.flush()
                time.sleep(pause)

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, key = body["messages"][-1]["content"], self.headers["authorization"] or self.headers["x-api-key"]
        key = key.split()[-1]
        with s.lock:
            s.seen.append((body, key))
            s.tries[prompt] += 1
            fault = s.fault(prompt, s.tries[prompt])
        time.sleep(s.delay())
        if isinstance(fault, int):
            wait = {"retry_after": "0.02"} if fault == 429 else {"retry_after_ms": 10}
            return self.answer(fault, {"error": {"message": f"{fault} for {key}", "type": "x"}}, **wait)
        with s.lock:   # from here on a provider sends a bill, whatever becomes of the reply
            s.billed[prompt] += 1
        if fault in ("drop", "hang"):
            time.sleep(5 * (fault == "hang"))
            return self.connection.shutdown(2)
        said = {"refusal": "I'm sorry, but I can't help with that: it is against my rules.", "loop": "and so on " * 99,
                "duplicate": _gen_words("same"), "echo": prompt, "key": key + _gen_words(prompt), "empty": "",
                "fence": "Here it is for you:\n```python\nx = 1",
                "code": "Here it is for you:\n```python\ndef f(:\n    pass\n```"}.get(fault)
        said, end = s.reply(prompt) if said is None else said, "length" if fault == "length" else "stop"
        data = {"choices": [{"finish_reason": end, "message": {"role": "assistant", "content": said}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 200}}
        if self.path == "/v1/messages":
            data = {"content": [{"type": "text", "text": said}], "usage": {"input_tokens": 100, "output_tokens": 200},
                    "stop_reason": {"length": "max_tokens", "stop": "end_turn"}[end]}
        if fault == "no usage":
            del data["usage"]
        self.answer(200, b'{"choices": [{"mess' if fault == "bad json" else data, 0.02 * (fault == "slow"))


def _gen_args(folder, server, n, *more, provider="openai"):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"Question {i}: what is {_gen_words(i, 4)}?\n" for i in range(n)))
    base = f"http://127.0.0.1:{server.server_port}" + "/v1" * (provider == "openai")
    return ["--mode", "generate", "--provider", provider, "--api_model", "m", "--api_base", base, "--max_tokens", 300,
            "--num_examples", n, "--prompts_file", folder / "prompts.txt", "--output_dir", folder / "out", *more]


def _gen_rows(folder):
    files = [folder / "out" / name for name in ("train.jsonl", "rejected.jsonl")]
    return [[json.loads(line) for line in f.read_text().splitlines()] if f.exists() else [] for f in files]


def _gen_errors(*args):
    return [line for line in cli(*args, rc=2).err.splitlines() if line.startswith("error: ")]


def _gen_number(text):
    return int(text.split()[1][:-1])


def _gen_faulty(prompt, nth, share=0.3):
    """This share of the prompts misbehaves: half of them at the first try, half of them at every try."""
    x = int(hashlib.md5(prompt.encode()).hexdigest(), 16) / 2**128 / share
    passing = (429, 500, 503, "drop", "slow", 529)
    lasting = ("bad json", "no usage", "length", "refusal", "duplicate", "code", "empty", "loop")
    return (passing[int(x * 12)] if nth == 1 else None) if x < 0.5 else lasting[int(x * 16) - 8] if x < 1 else None


@pytest.mark.parametrize("provider", ["openai", pytest.param("anthropic", marks=pytest.mark.campaign)])
def test_generate_faults(tmp_path, provider):
    """500 prompts, 30 % faults: all answered or accounted for, none twice, and the order of arrival changes nothing."""
    results = []
    for width, wait in ((16, 0.0), (40, 0.03)):
        with _GenServer(_gen_faulty, delay=lambda: wait * random.random()) as server:
            folder, more = tmp_path / str(width), ("--concurrency", width)
            _, out, err = cli(*_gen_args(folder, server, 500, *more, provider=provider))
        kept, rejected = _gen_rows(folder)
        assert len(kept + rejected) == len({row["prompt_id"] for row in kept + rejected}) == 500
        reasons = collections.Counter(row["reason"].split(":")[0] for row in rejected)
        assert set(reasons) == {"cut off", "refusal", "empty or too short", "exact duplicate", "repetition loop",
                                "code does not parse", "failed"}
        assert all(f"{name:20}{count:8,}" in out for name, count in {**reasons, "kept": len(kept)}.items())
        passing = [p for p in server.tries if isinstance(_gen_faulty(p, 1), int)]
        assert passing and all(server.tries[p] == 2 and server.billed[p] == 1 for p in passing)   # refused, paid once
        results.append((kept, sorted((row["prompt_id"], row["reason"]) for row in rejected)))
    assert results[0] == results[1]


def test_generate_prompts():
    """100,000 distinct prompts, balanced, in less than 10 s of CPU; more only adds to fewer; weights are kept."""
    start, first = time.process_time(), lambda n, *args: list(itertools.islice(sd.compose_prompts(*args), n))
    prompts = first(100_000, [], 0)
    assert time.process_time() - start < 10
    assert len({messages[0]["content"] for _, messages in prompts}) == 100_000
    assert collections.Counter(name for name, _ in prompts) == dict.fromkeys(sd.TASKS, 100_000 // 8)
    assert first(50, [], 0) == prompts[:50] != first(50, [], 1)
    some = collections.Counter(name for name, _ in first(400, ["implement=3", "debug"], 0))
    assert some == {"implement": 300, "debug": 100}
    some = collections.Counter(name for name, _ in first(60, ["implement=2.0", "debug=.5e0", "explain=05"], 0))
    assert some == {"implement": 16, "debug": 4, "explain": 40}
    assert all(re.fullmatch(" [-+<=>!]+ ", side) or "index" in sd.TASKS["debug"] for pair in sd.BUGS for side in pair)


def test_generate_filters(tmp_path):
    """Each filter by name through the whole path, and replies that none may reject."""
    faults = dict(enumerate(("length", "refusal", "empty", "echo", "loop", "fence", "code", "duplicate", "duplicate")))
    reply = lambda p: _gen_words("near", 400) + p[-20:] if _gen_number(p) in (20, 21) else \
        _gen_words(p) + "\ud800" * (_gen_number(p) == 12)   # half a pair, as some models cut it
    with _GenServer(lambda p, nth: faults.get(_gen_number(p)), reply) as server:
        cli(*_gen_args(tmp_path, server, 22))
    kept, rejected = _gen_rows(tmp_path)
    assert {_gen_number(row["messages"][0]["content"]): row["reason"] for row in rejected} == {
        0: "cut off", 1: "refusal", 2: "empty or too short", 3: "repeats the prompt", 4: "repetition loop",
        5: "code does not parse", 6: "code does not parse", 8: "exact duplicate", 21: "near duplicate"}
    assert [_gen_number(row["messages"][0]["content"]) for row in kept] == [7, *range(9, 21)]
    assert set(kept[0]) == {"messages", "category", "model", "usage", "cost", "finish_reason", "prompt_id"}
    for reply in ("```python\n>>> 1 + 1\n2\n```\nA session.", "````md\n```python\nx = (\n```\n````\nFences in a fence.",
                  "I can't assist but so:\n```python\nx = 1\n```", "   ```python\n   x = 1\n   ```\nindented, as in a list",
                  "```js\nfoo(() => {\n```\nis no Python", "Sorry is a word of five letters.", open(__file__).read()):
        assert not any(sd.find_flaws("What is it?", reply, "stop").values()), reply
    for reply in ("I’m sorry, but I cannot help with this.", "As an AI model, I do not.", "I can't help you."):
        assert sd.find_flaws("What is it?", reply, "stop")["refusal"], reply


def test_generate_refusals():
    """A refusal teaches nothing; a reply that only begins like one is paid for, and kept."""
    for reply in ("I apologize, but I cannot help with that.", "I can't provide that code, it is not mine to give.",
                  "I cannot fulfill this request.", "I won't be able to help with this task.", "I must decline.",
                  "Unfortunately, I can't do that for you today.", "I'm sorry, but I can’t assist with that request.",
                  "I am very sorry, I am not able to write malware.", "I’m afraid I can not comply with this request.",
                  "I apologise for the inconvenience, but I am unable to provide it.", "I have to decline this one.",
                  "As an AI language model, I have no opinion.", "Sorry, as an AI assistant made by X, I will not."):
        assert sd.find_flaws("What is it?", reply, "stop")["refusal"], reply
    for reply in ("I can't help but notice that your loop is quadratic: use a set.", "I can't see a bug: it is right.",
                  "Unable to open the file: that is what the exception says.", "Sorry if I repeat what you know: a trie",
                  "Sorry I missed the import; here it is: import os", "As an AI pipeline, the function has three stages.",
                  "Unfortunately, the function is quadratic.", "Sorry, the loop I wrote above is off by one.",
                  "I'm sorting the list first.", "Not able to connect: I would check the port.", "Declining is fine."):
        assert not any(sd.find_flaws("What is it?", reply, "stop").values()), reply


def test_generate_fences():
    """Fences as models write them: \\r\\n, one line, in a list, python3; and code that is broken in them."""
    good = "Here:\n```python\ndef f(x):\n    return x\n```\nThat is all.", "- ```py\n  x = 1\n  y = 2\n  ```\n- that is it"
    for reply in (*good, *(text.replace("\n", "\r\n") for text in good), "```print(1)```", "```print(1)```\nprints it",
                  "1. so:\n   ```python3\n   x = 1\n   ```", "```python2\nprint 1\n```\nis no Python 3"):
        assert not any(sd.find_flaws("What is it?", reply, "stop").values()), reply
    for reply in ("Here:\n```python3\ndef f(:\n```", "Here:\r\n```py\r\ndef f(:\r\n```", "Here:\n```python\nx = 1",
                  "Here:\n```Python3\nprint 1\n```", "- ```py\n  x = (\n  ```", "- ```py\n  x = 1", "```print(1)```\n```js\nf()"):
        assert sd.find_flaws("What is it?", reply, "stop")["code does not parse"], reply


def test_generate_duplicates(tmp_path):
    """What a sign tells apart is no duplicate, nor is a label that fits many prompts."""
    code = "for (i = 0; i {} n; i++) {{ total += table[i]; }} return total; " + _gen_words("code", 6)
    said = ["yes"] * 10 + ["return a < b", "return a >= b", code.format("<"), code.format("<"), code.format(">=")]
    asked = [f"Is {i} prime?" for i in range(9)] + ["Is  8 prime?"] + ["more"] * 5
    for i, (prompt, reply) in enumerate(zip(asked, said)):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        sd.append_jsonl(tmp_path / "train", {"messages": messages, "prompt_id": i, "cost": 0, "finish_reason": "stop"})
    fates = sd.drop_duplicates(str(tmp_path / "train"), str(tmp_path / "rejected"), range(15))
    assert fates["kept"] == 13 and fates["exact duplicate"] == 2, fates
    assert [row["prompt_id"] for row in sd.read_jsonl(tmp_path / "rejected")] == [9, 13]
    assert not list(tmp_path.glob("*.tmp"))


def test_generate_own_prompts(tmp_path):
    """All of the file unless told otherwise, BOM or not; a short reply or a piece of the prompt may be what it wants."""
    mail = "Which address is in this: write to ann@example.org or ring 555 12 34, any day but Sunday?"
    prompts = ["What is 2+2?", mail, "Say no more.", "Give this back, all of it."]
    prompts += [f"Question {i}: is {i} even?" for i in range(146)]
    special = dict(zip(prompts, ("4", "ann@example.org", " \n", "give this back, all of it.")))
    with _GenServer(reply=lambda p: special.get(p, "```yes```")) as server:
        args = _gen_args(tmp_path, server, 1)
        (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8-sig")
        _, out, err = cli(*(arg for arg in args if arg not in ("--num_examples", 1)))
        kept, rejected = _gen_rows(tmp_path)
        assert len(kept) == 149 and [row["messages"][0]["content"] for row in kept[:2]] == prompts[:2]
        assert [row["reason"] for row in rejected] == ["empty or too short"]
        assert "USD" not in out.splitlines()[-1] + err   # nobody said what it costs: it is not free
        at = args.index("--prompts_file")   # and to a task of ours that is no answer
        args[at:at + 2] = ["--categories", "implement=1.0"]
        args[args.index("--output_dir") + 1] = tmp_path / "ours" / "out"
        cli(*args)
    assert [row["reason"] for row in _gen_rows(tmp_path / "ours")[1]] == ["empty or too short"]
    assert not sd.find_flaws("Give this back.", "give that", "stop")["repeats the prompt"]
    assert sd.find_flaws("Give this back, all.", "this back, all.", "stop")["repeats the prompt"]


def test_generate_failed(tmp_path):
    """What failed is asked again by the same command, its cost is not forgotten, and one that always fails stops nothing."""
    faults = {0: 400, 3: "bad json", 4: 400, 7: "bad json", 9: 500, 11: "duplicate", 12: "duplicate", 20: "length"}
    down, prices = [True], ("--price_in", 1, "--price_out", 10)
    fault = lambda p, nth: faults.get(_gen_number(p)) if down or _gen_number(p) in (0, 11, 12, 20) else None
    with _GenServer(lambda p, nth: fault(p, nth) if server.billed else None) as server:
        args = _gen_args(tmp_path, server, 30, "--concurrency", 1, *prices)
        (tmp_path / "prompts.txt").write_text("Question 99: who?\n" + (tmp_path / "prompts.txt").read_text())
        faults.pop(9)
        cli(*args)
        kept, rejected = _gen_rows(tmp_path)
        assert collections.Counter(row["reason"].split(":")[0] for row in rejected) == {
            "failed": 4, "exact duplicate": 1, "cut off": 1}
        before = json.load(open(tmp_path / "out/summary.json"))["spent_usd"]
        tries, at = server.tries.copy(), args.index("--num_examples") + 1
        down.clear()
        args[at] = 31   # the one at the front fails again, the last one is new
        _, out, err = cli(*args)
    again = {_gen_number(p) for p in server.tries if server.tries[p] > tries[p]}
    assert again == {0, 3, 4, 7, 29}, again
    kept, rejected = _gen_rows(tmp_path)
    rows = {_gen_number(row["messages"][0]["content"]): row for row in kept + rejected}
    assert len(rows) == len(kept + rejected) == 31 and len(kept) == 28
    assert {n: row["reason"].split(":")[0] for n, row in rows.items() if "reason" in row} == {
        0: "failed", 12: "exact duplicate", 20: "cut off"}
    summary = json.load(open(tmp_path / "out/summary.json"))
    assert summary["failed"] == 1 and summary["kept"] == 28
    assert summary["spent_usd"] == pytest.approx(before + 4 * 0.0021) == pytest.approx(sum(row["cost"] for row in rows.values()))
    assert rows[3]["cost"] > rows[4]["cost"] == pytest.approx(0.0021)   # what failed there may have been billed


def test_generate_failed_for_good(tmp_path):
    """A dozen prompts that the server never takes, a fifth of all: they stop no later run before it asks what is new."""
    with _GenServer(lambda p, _: 400 if _gen_number(p) % 5 == 4 else None) as server:
        for n in (60, 61):
            cli(*_gen_args(tmp_path, server, n, "--concurrency", 1))
            assert len(_gen_rows(tmp_path)[0]) == n - 12 and len(_gen_rows(tmp_path)[1]) == 12
    assert set(server.billed.values()) == {1}


def test_generate_rows(tmp_path):
    """A last row that is whole is kept, whatever came after it; half a row goes; reading makes no file."""
    path = tmp_path / "rows.jsonl"
    assert sd.read_jsonl(path) == [] and not path.exists()
    for tail, rows in ((b'{"b": 2}', [{"a": 1}, {"b": 2}]), (b'{"b": "\xc3', [{"a": 1}]), (b"", [{"a": 1}])):
        path.write_bytes(b'{"a": 1}\n' + tail)
        assert sd.read_jsonl(path) == rows
        sd.append_jsonl(path, {"c": 3})
        assert sd.read_jsonl(path) == [*rows, {"c": 3}]
    path.write_bytes(b'{"a": 1}')
    assert sd.read_jsonl(path) == [{"a": 1}] and path.read_bytes() == b'{"a": 1}\n'


def test_generate_local_seed(tmp_path, teacher):
    """The same seed gives the same replies, after a kill too; another seed gives others."""
    def said(folder, seed, n=11):
        cli("--mode", "generate", "--provider", "local", "--teacher", teacher, "--num_examples", n, "--max_tokens", 8,
            "--concurrency", 4, "--api_temperature", 1, "--seed", seed, "--output_dir", tmp_path / folder / "out",
            "--prompts_file", tmp_path / "prompts.txt")
        rows = sum(_gen_rows(tmp_path / folder), [])
        return {_gen_number(row["messages"][0]["content"]): row["messages"][1]["content"] for row in rows}
    (tmp_path / "prompts.txt").write_text("".join(f"Question {i}: what?\n" for i in range(11)))
    whole = said("whole", 3)
    said("parts", 3, 8)
    for name in ("train.jsonl", "rejected.jsonl"):   # a kill in the midst of the second batch
        path = tmp_path / "parts/out" / name
        rows = [row for row in sd.read_jsonl(path) if _gen_number(row["messages"][0]["content"]) < 6]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = said("parts", 3)
    assert len(whole) == len(parts) == 11 and len(set(whole.values())) > 5
    assert {i: text for i, text in parts.items() if i not in (6, 7)} == {i: text for i, text in whole.items() if i not in (6, 7)}
    assert said("other", 4) != whole


def _gen_spawn(args, server, count):
    """The real command in a process of its own, when the server has billed `count` replies."""
    process = spawn(*args)
    while sum(server.billed.values()) < count and process.poll() is None:
        time.sleep(0.002)
    return process


@pytest.mark.campaign
def test_generate_kill(tmp_path):
    """kill -9 at five moments, then a run to the end: only what was in flight is paid twice, and the cap knows."""
    width, n = 4, 60
    with _GenServer(delay=lambda: 0.03) as server:
        prices = ("--price_in", 1, "--price_out", 2, "--max_cost", 1)
        args = _gen_args(tmp_path, server, n, "--concurrency", width, *prices)
        for moment in (1, 9, 20, 33, 47):
            process = _gen_spawn(args, server, moment)
            process.kill()
            process.communicate()
            with open(tmp_path / "out/train.jsonl", "a") as f:
                f.write('{"messages": [{"role": "us')   # what a full disk leaves
        cli(*args)
        rows = sum(_gen_rows(tmp_path), [])
        assert len({row["prompt_id"] for row in rows}) == len(rows) == n == len(server.billed)
        assert 0 < sum(server.billed.values()) - n <= 5 * width
        spent = json.load(open(tmp_path / "out/summary.json"))["spent_usd"]
        assert sum(server.billed.values()) * 5e-4 <= spent + 1e-9
        tries = server.tries.copy()
        cli(*args)
        assert server.tries == tries   # everything is there: nothing is asked


def test_generate_signal(tmp_path):
    """SIGINT: what is in flight arrives, nothing new is asked, exit 0; the same command goes on."""
    with _GenServer(delay=lambda: 0.05) as server:
        args = _gen_args(tmp_path, server, 40, "--concurrency", 3)
        process = _gen_spawn(args, server, 6)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
        assert process.returncode == 0 and "stopped by a signal" in out and 6 <= len(server.billed) < 40, out
        assert len(_gen_rows(tmp_path)[0]) == len(server.billed)
        cli(*args)
        assert len(_gen_rows(tmp_path)[0]) == 40 and set(server.billed.values()) == {1}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_cap(tmp_path, provider):
    """The server's own bill stays below 1.00 USD whatever goes wrong, and most of it is used."""
    prices = ("--price_in", 20, "--price_out", 100, "--max_cost", 1)   # a reply costs 0.022, and 0.033 at worst
    with _GenServer(lambda p, nth: _gen_faulty(p, nth, 0.5)) as server:
        args = _gen_args(tmp_path, server, 200, "--concurrency", 16, *prices, provider=provider)
        _, out, err = cli(*args)
        rows = sum(_gen_rows(tmp_path), [])
        bill, spent = sum(server.billed.values()) * 0.022, json.load(open(tmp_path / "out/summary.json"))["spent_usd"]
        assert "max_cost" in out and 0.7 < bill <= spent <= 1, (err, bill, spent)
        assert spent == pytest.approx(sum(row["cost"] for row in rows))
        tries = sum(server.tries.values())
        cli(*args)
        assert sum(server.tries.values()) - tries <= 1   # nothing is left to spend
    unknown = [row["cost"] for row in rows if row["usage"]["prompt_tokens"] is None]
    assert unknown and min(unknown) > 0.03   # nobody said what it cost: the worst case
    assert "price" in cli(*(arg for arg in args if arg not in ("--price_in", 20)), rc=2).err


def test_generate_key(tmp_path, monkeypatch):
    """The key is nowhere, though the server repeats it in its errors and replies."""
    for provider, secret in (("openai", "sk-test-0123456789abcdef"), ("anthropic", "sk-ant-fedcba9876543210")):
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", secret)
        with _GenServer(lambda p, _: 400 if _gen_number(p) % 4 == 3 else "key") as server:
            _, out, err = cli(*_gen_args(tmp_path / provider, server, 40, provider=provider))
        files = "".join(f.read_text() for f in (tmp_path / provider / "out").iterdir())
        assert server.seen[0][1] == secret and "failed: " in files and "***" in files
        assert secret not in files + out + err
        with _GenServer(lambda p, _: 401) as server:
            _, out, err = cli(*_gen_args(tmp_path / "refused", server, 40, provider=provider), rc=2)
        assert "***" in err and secret not in out + err


def test_generate_errors(tmp_path, monkeypatch):
    """What no request would survive is one `error:` line at once, and costs as little."""
    for i, (status, since) in enumerate(((401, 1), (404, 1), (401, 9), (400, 1))):
        folder, provider = tmp_path / str(i), ("openai", "anthropic")[i % 2]
        with _GenServer(lambda p, _: status if sum(server.tries.values()) >= since else None) as server:
            errors = _gen_errors(*_gen_args(folder, server, 50, provider=provider))
        assert len(errors) == 1 and str(status) in errors[0]
        kept, rejected = _gen_rows(folder)
        assert len(kept) == len(server.billed) >= since - 1 and not rejected and sum(server.tries.values()) < since + 8
    plain, gone = ["--mode", "generate", "--output_dir", tmp_path / "o"], _gen_args(tmp_path / "p", server, 50)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    wrong = [(name, "--categories", name) for name in ("poetry", "debug=0", "test=x", "test=", "test=inf", "test=nan", "test=-1")]
    wrong += [("price_out", name, 1) for name in ("--price_in", "--price_out")]
    wrong += [("none.txt", "--prompts_file", tmp_path / "none.txt")]
    cases = [("onnect", gone), ("--teacher", [*plain, "--provider", "local"]), ("_API_KEY", [*plain, "--api_model", "m"]), ("pip install openai", gone)]
    for named, args in [(named, [*plain, "--api_model", "m", *more]) for named, *more in wrong] + cases:
        if "KEY" in named:
            monkeypatch.delenv("OPENAI_API_KEY")
        if "pip" in named:
            monkeypatch.setitem(sys.modules, "openai", None)
        errors = _gen_errors(*args)
        assert len(errors) == 1 and named in errors[0], errors


def test_generate_slow_server(tmp_path):
    """A server that admits 50 a second slows the run down; one that hangs is asked again after request_timeout."""
    times = collections.deque([0.0] * 5, maxlen=5)

    def limited(prompt, nth):
        if _gen_number(prompt) == 7 and nth == 1:
            return "hang"
        return 429 if time.monotonic() - times[0] < 0.1 else times.append(time.monotonic())
    with _GenServer(limited) as server:
        cli(*_gen_args(tmp_path, server, 100, "--concurrency", 30, "--request_timeout", 2))
    assert len(_gen_rows(tmp_path)[0]) == 100, _gen_rows(tmp_path)[1]
    assert sum(server.tries.values()) > 120


def test_generate_stops(tmp_path):
    """More than 20 % of failures in the last 50: the run stops, keeps what it has and says so."""
    with _GenServer(lambda p, _: 400 if sum(server.tries.values()) > 60 and _gen_number(p) % 2 else None) as server:
        _, out, err = cli(*_gen_args(tmp_path, server, 400), rc=2)
    kept, rejected = _gen_rows(tmp_path)
    assert "11 of the last" in err and len(kept) > 60 and 11 <= len(rejected) < 30
    assert sum(server.tries.values()) < 120


def test_generate_prompts_file(tmp_path):
    talk = [{"role": role, "content": text} for role, text in (
        ("system", "Be brief."), ("system", "Be kind."), ("user", "What is a trie?"))]
    own = [{"prompt": "What is a heap?"}] * 2 + [{"messages": talk, "category": "explain", "more": 1}]
    for provider, sent in (("openai", (0.3, 300, None)), ("anthropic", (None, 300, "Be brief.\n\nBe kind."))):
        with _GenServer() as server:
            args = _gen_args(tmp_path / provider, server, 9, provider=provider)
            args += ["--api_temperature", 0.3] if provider == "openai" else []
            path = args[args.index("--prompts_file") + 1] = tmp_path / "own.jsonl"
            path.write_text("\n\n".join(map(json.dumps, own)))
            cli(*args)
        kept, _ = _gen_rows(tmp_path / provider)
        assert [row["messages"][:-1] for row in kept] == [[{"role": "user", "content": "What is a heap?"}], talk]
        assert [row["category"] for row in kept] == ["own", "explain"]
        assert tuple(server.seen[-1][0].get(k) for k in ("temperature", "max_tokens", "system")) == sent
    for row in (json.dumps({"messages": kept[-1]["messages"]}), "nonsense", '{"question": 1}', '{"messages": [{"role": "user"}]}', "[]", '{"prompt": 3}'):
        path.write_text('{"prompt": "What is a heap?"}\n' + row)
        assert "own.jsonl" in cli(*args, rc=2).err


@pytest.mark.campaign
def test_generate_throughput(tmp_path):
    """32 in flight are at least 20 x as fast as one at a time, against 100 ms of latency."""
    rates, fork = [], multiprocessing.get_context("fork").Process   # a process of its own: it must not share our core
    with _GenServer(delay=lambda: 0.1, runner=fork) as server:
        for width, n in ((1, 3), (1, 20), (32, 1000)):   # the first one loads the SDK
            start = time.perf_counter()
            cli(*_gen_args(tmp_path / f"{width}.{n}", server, n, "--concurrency", width))
            rates.append(n / (time.perf_counter() - start))
    if rates[2] < 20 * rates[1] and os.getloadavg()[0] > os.cpu_count():
        pytest.skip(f"the machine is busy: {rates[2] / rates[1]:.1f} x")
    assert rates[2] >= 20 * rates[1], rates


def test_generate_local(tmp_path, teacher):
    args = ["--mode", "generate", "--provider", "local", "--teacher", teacher, "--num_examples", 11, "--max_tokens", 12]
    cli(*args, "--concurrency", 4, "--api_temperature", 1, "--output_dir", tmp_path / "out")
    rows = sum(_gen_rows(tmp_path), [])
    assert len(rows) == 11 and {row["finish_reason"] for row in rows} <= {"stop", "length"}
    for row in rows:
        count = row["usage"]["completion_tokens"]
        assert count == 12 if row["finish_reason"] == "length" else count < 12
        assert row["usage"]["prompt_tokens"] == len((row["messages"][0]["content"] + "\n\n").encode()) + 1   # <|begin|>
    for more in (("--api_model", "x"), ("--price_in", 1)):
        cli(*args, *more, "--output_dir", tmp_path / "other", rc=2)
    (tmp_path / "out/train.jsonl").write_text('{"messages": [\n{}\n')
    assert "train.jsonl" in (err := cli(*args, "--output_dir", tmp_path / "out", rc=2).err) and "line 1" in err


def test_generate_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in cli("--mode", "generate", "--api_model", "m", "--output_dir", tmp_path / "out", rc=2).err


def test_generate_then_train(tmp_path, student):
    """generate -> --dataset out/train.jsonl --alpha 1 -> final/"""
    with _GenServer() as server:
        cli(*_gen_args(tmp_path, server, 60))
    cli("--dataset", tmp_path / "out/train.jsonl", "--alpha", 1, "--student", student, "--max_steps", 4, "--eval_samples", 4,
        "--seq_len", 128, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run/final/model.safetensors").exists()


# --------------------------------------------------------------------------------------------------
# Optional: eval: how good is the student.


_EVAL_QUICK = ("--generate_comparisons", "false", "--dtype", "fp32")


def _eval_tokenizer(texts, size, folder):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def _eval_model(folder, seed, width, layers, vocab=320, padding=0):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=vocab + padding, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.6)).save_pretrained(folder)


@pytest.fixture(scope="module")
def _eval_world(tmp_path_factory):
    """A teacher, two runs of its students (wide ones, and one with a padded vocabulary), a stranger, and text in many scripts."""
    folder = tmp_path_factory.mktemp("eval")
    pick = np.random.default_rng(0)
    words = "the quick brown fox jumps größer über 日本語 naïve 🙂 wizards boil strange soup in green pots and sleep".split()
    texts = [" ".join(pick.choice(words, pick.integers(5, 60))) + "." for _ in range(300)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name, *shape in (("teacher", 0, 32, 4), ("student", 1, 16, 2), ("padded", 2, 32, 2, 320, 7)):
        _eval_model(folder / name, *shape)
        _eval_tokenizer(texts, 320, folder / name)
    _eval_model(folder / "stranger", 3, 16, 2, 290)
    _eval_tokenizer(texts[::3], 290, folder / "stranger")
    for out, more in (("run", ()), ("labels", ("--alpha", "1"))):
        teacher = ("--teacher", str(folder / "teacher")) if not more else more
        cli(*teacher, "--student", folder / "student", "--output_dir", folder / out, "--max_steps", 12, "--save_steps", 6, "--eval_steps", 4,
            "--log_steps", 1, "--learning_rate", 3e-3, *_eval_data(folder))
    return folder


def _eval_data(folder):
    return ["--dataset", str(folder / "data.jsonl"), "--seq_len", "48", "--batch_size", "3"]


def _eval_words(folder, out, student, *more):
    return ["--mode", "eval", "--teacher", str(folder / "teacher"), "--student", str(folder / student), "--output_dir", str(folder / out),
            *_eval_data(folder), *map(str, more)]


def _eval_report(folder, out, student, *more):
    cli(*_eval_words(folder, out, student, *more))
    return json.loads((folder / out / "report.json").read_text())


def _eval_rows(folder, tokenizer):
    """The held-out rows, cut here once more by hand: every 20th text, joined with EOS, blocks of 48."""
    texts = [json.loads(line)["text"] for line in open(folder / "data.jsonl")]
    gap = max(2, len(texts) // min(256, len(texts) // 20))
    ids = [i for t in texts[gap - 1::gap] for i in tokenizer(t)["input_ids"] + [0]]
    return [ids[i:i + 48] for i in range(0, len(ids), 48) if len(ids[i:i + 48]) > 1]


def _eval_reference(model, teacher, rows, vocab):
    """Full logits in float64, one row at a time."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(p).double() for p in (model, teacher))
    nll, kl, agree, right, confidence = [], [], [], [], []
    for row in rows:
        ids = torch.tensor(row)[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1, :vocab].log_softmax(-1) for m in (model, teacher))
        nll.append(-p.gather(1, ids[0, 1:, None])[:, 0])
        kl.append((q.exp() * (q - p)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        right.append(p.argmax(-1) == ids[0, 1:])
        confidence.append(p.max(-1)[0].exp())
    rowwise = torch.stack([x.sum() for x in nll])
    nll, kl, agree, right, confidence = (torch.cat(x).double() for x in (nll, kl, agree, right, confidence))
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        ece += (right[inside].sum() - confidence[inside].sum()).abs().item() / len(right)
    return {"perplexity": nll.mean().exp().item(), "kl": kl.mean().item(), "agreement": agree.mean().item(), "accuracy": right.mean().item(),
            "ece": ece, "nll": nll.sum().item(), "tokens": len(nll), "rows": rowwise}


@pytest.fixture(scope="module")
def _eval_found(_eval_world):
    return _eval_report(_eval_world, "found", "run/final", "--compare", _eval_world / "labels/final", _eval_world / "padded", _eval_world / "stranger")


def test_eval_numbers_equal_full_float64_logits(_eval_world, _eval_found):
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    for label, name in (("student", "run/final"), ("labels", "labels/final"), ("padded", "padded"), ("teacher", "teacher")):
        want, got = _eval_reference(_eval_world / name, _eval_world / "teacher", rows, 320), _eval_found["models"][label]
        assert got["tokens"] == want["tokens"]
        _, *around = sd.interval(want["rows"].numpy(), np.array([len(r) - 1 for r in rows]), 0)
        assert got["perplexity_95"] == pytest.approx([math.exp(x) for x in around], rel=1e-5)
        for key in ("perplexity", "kl", "agreement", "accuracy", "ece"):
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-6), (label, key)


def test_eval_temperature_is_that_of_training(_eval_world, _eval_found):
    hot = _eval_report(_eval_world, "hot", "run/final", "--temperature", 2, *_EVAL_QUICK)["models"]["student"]
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    model, teacher = (AutoModelForCausalLM.from_pretrained(_eval_world / n).double() for n in ("run/final", "teacher"))
    with torch.no_grad():
        pairs = [[(m(torch.tensor(r)[None]).logits[0, :-1] / 2).log_softmax(-1) for m in (model, teacher)] for r in rows]
    kl = torch.cat([(q.exp() * (q - p)).sum(-1) for p, q in pairs]).mean().item() * 4
    assert hot["kl"] == pytest.approx(kl, rel=1e-5) and hot["perplexity"] == _eval_found["models"]["student"]["perplexity"]


def test_eval_teacher_against_itself(_eval_world):
    found = _eval_report(_eval_world, "self", "teacher", *_EVAL_QUICK)
    student = found["models"]["student"]
    assert student["kl"] == 0 and student["agreement"] == 1 and student["perplexity"] == found["models"]["teacher"]["perplexity"]
    assert [x["teacher"] for x in student["layers"]] == [1, 2, 3, 4]
    assert all(x["cka"] == pytest.approx(1, abs=1e-9) and x["mse"] < 1e-12 for x in student["layers"])
    assert found["models"]["teacher"]["student_against_it"] == {"difference": 0, "interval": [0, 0], "verdict": "no significant difference"}


def test_eval_layers_equal_a_direct_computation(_eval_world, _eval_found):
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    for label, name in (("student", "run/final"), ("padded", "padded")):
        states = []
        for path in (name, "teacher"):
            model = AutoModelForCausalLM.from_pretrained(_eval_world / path).double()
            with torch.no_grad():
                per_row = [model.model(torch.tensor(r)[None], output_hidden_states=True).hidden_states[1:] for r in rows]
            states.append([torch.cat([x[i][0, :-1] for x in per_row]) for i in range(len(per_row[0]))])
        for got, (s, t) in zip(_eval_found["models"][label]["layers"], ((0, 1), (1, 3))):
            x, y = states[0][s], states[1][t]
            assert (got["student"], got["teacher"]) == (s + 1, t + 1)
            xc, yc = x - x.mean(0), y - y.mean(0)
            cka = (xc.T @ yc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
            ones = torch.cat([x, torch.ones(len(x), 1)], 1)
            fitted = ones @ torch.linalg.lstsq(ones, y).solution
            mse = (x - y).square().mean() if x.shape == y.shape else (fitted - y).square().sum() / y.shape[1] / (len(x) - x.shape[1] - 1)
            assert got["cka"] == pytest.approx(cka.item(), rel=1e-4) and got["mse"] == pytest.approx(mse.item(), rel=1e-4)


def test_eval_bits_of_two_tokenizers_are_of_the_same_bytes(_eval_world, _eval_found):
    base, other = (AutoTokenizer.from_pretrained(_eval_world / n) for n in ("teacher", "stranger"))
    ids = _eval_rows(_eval_world, base)
    told = sd.retokenize([{"input_ids": np.array(r), "targets": None} for r in ids], base, other)
    sizes = [len(base.decode(r[1:], skip_special_tokens=True).encode()) for r in ids]
    for row, new, size in zip(ids, told, sizes, strict=True):
        new = new["input_ids"]
        assert new[0] == 0 and other.decode(new[1:]) == base.decode(row[1:]) and new[1:].count(0) == row[1:].count(0)
        assert len(other.decode(new[1:], skip_special_tokens=True).encode()) == size
    stranger = AutoModelForCausalLM.from_pretrained(_eval_world / "stranger").double()
    bits = 0.0
    for new in told:
        new = torch.tensor(new["input_ids"])
        with torch.no_grad():
            bits -= stranger(new[None]).logits[0, :-1].log_softmax(-1).gather(1, new[1:, None]).sum().item() / math.log(2)
    got = _eval_found["models"]["stranger"]
    assert got["bits"] == pytest.approx(bits / sum(sizes), rel=1e-5) and got["kl"] is None and got["agreement"] is None
    want = _eval_reference(_eval_world / "run/final", _eval_world / "teacher", ids, 320)["nll"]
    assert _eval_found["models"]["student"]["bits"] == pytest.approx(want / math.log(2) / sum(sizes), rel=1e-5)


def test_eval_another_tokenizer_and_masked_prompts_are_refused(_eval_world, tmp_path):
    rows = [{"prompt": "the quick brown", "response": "fox jumps"}] * 40
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["--mode", "eval", "--teacher", _eval_world / "teacher", "--student", _eval_world / "stranger", "--dataset", tmp_path / "talk.jsonl",
             "--seq_len", 48, "--output_dir", tmp_path / "out"]
    assert "plain text" in cli(*words, rc=2).err


@pytest.mark.parametrize("n", [12, 60])
def test_eval_intervals_cover(n):
    draw, inside = torch.Generator().manual_seed(n), 0
    for trial in range(200):   # sequences of many lengths, skewed losses that hang together within one; true mean 2
        bottom = torch.randint(20, 60, (n,), generator=draw).double()
        top = bottom * 2 * (0.4 * torch.randn(n, generator=draw, dtype=torch.float64) - 0.08).exp()
        _, low, high = sd.interval(top.numpy(), bottom.numpy(), trial)
        inside += low <= 2 <= high
    assert 180 <= inside <= 198


def test_eval_report_files(_eval_world, _eval_found):
    folder = _eval_world / "found"
    text = (folder / "report.md").read_text()
    table = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines() if line.startswith("| "))}
    labels = table[""]
    assert labels == list(_eval_found["models"]) == ["teacher", "student", "labels", "padded", "stranger"]
    for key, title in sd.METRICS.items():
        for label, cell in zip(labels, table[title]):
            value, shown = _eval_found["models"][label][key], cell.split(", ")[0].split()[0].replace(",", "")
            if value is None:
                assert shown == "-"
            else:
                assert float(shown) == pytest.approx(value, rel=6e-4)
    for x in (m["student_against_it"] for label, m in _eval_found["models"].items() if label != "student"):
        assert f"{x['difference']:+.4f} bits a byte ({x['interval'][0]:+.4f} to {x['interval'][1]:+.4f})" in text and x["verdict"] in text
    curves = _eval_found["models"]["student"]["curves"]
    assert "report.png" in text and [len(curves[k]) for k in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/ce_loss")] == [12, 12, 12, 3]
    assert len(_eval_found["models"]["student"]["texts"]) == 3
    from matplotlib import image
    picture = image.imread(folder / "report.png")[..., :3]
    assert min(picture.shape[:2]) > 800
    height, width = (x // 2 for x in picture.shape[:2])
    for panel in (picture[:height, :width], picture[:height, width:], picture[height:, :width], picture[height:, width:]):
        assert (np.abs(panel - [0xd5 / 255, 0x5e / 255, 0]).max(-1) < 0.05).sum() > 100   # the third model is in every panel


def test_eval_without_matplotlib(_eval_world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = cli(*_eval_words(_eval_world, "plain", "run/final", *_EVAL_QUICK)).out
    assert not (_eval_world / "plain/report.png").exists()
    assert "pip install matplotlib" in said and "report.png)" not in (_eval_world / "plain/report.md").read_text()


def test_eval_takes_a_checkpoint_of_a_run(_eval_world):
    """The last checkpoint is final/; an earlier one is another model; a broken one is refused."""
    last, earlier = (_eval_report(_eval_world, f"at{n}", f"run/checkpoints/step-{n:08d}", *_EVAL_QUICK) for n in (12, 6))
    final = _eval_reference(_eval_world / "run/final", _eval_world / "teacher", _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher")), 320)
    assert last["models"]["student"]["perplexity"] == pytest.approx(final["perplexity"], rel=1e-5)
    assert earlier["models"]["student"]["perplexity"] != pytest.approx(final["perplexity"], rel=1e-3)
    broken = _eval_world / "run/checkpoints/step-00000099"
    broken.mkdir()
    (broken / "state.json").write_text("{")
    cli(*_eval_words(_eval_world, "broken", "run/checkpoints/step-00000099"), rc=2)
    (broken / "state.json").unlink(), broken.rmdir()


def test_eval_same_numbers_on_two_ranks(_eval_world, _eval_found):
    words = _eval_words(_eval_world, "two", "run/final", "--compare", _eval_world / "labels/final", _eval_world / "padded", _eval_world / "stranger", *_EVAL_QUICK)
    two = spawn(*words, nproc=2)
    said, _ = two.communicate()
    assert two.returncode == 0, said[-2000:]
    two = json.loads((_eval_world / "two/report.json").read_text())
    for label, one in _eval_found["models"].items():
        for key in ("tokens", "perplexity", "bits", "accuracy", "agreement", "kl", "ece", "parameters", "disk", "perplexity_95"):
            assert one[key] is None or two["models"][label][key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), (label, key)
        for a, b in zip(one["layers"], two["models"][label]["layers"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    for label, one in _eval_found["models"].items():
        a, b = one["student_against_it"], two["models"][label]["student_against_it"]
        assert a["verdict"] == b["verdict"] and a["interval"] == pytest.approx(b["interval"], rel=1e-4, abs=1e-7)


def test_eval_refusals(_eval_world):
    for student in ("nowhere", "data.jsonl"):
        assert cli(*_eval_words(_eval_world, "refused", student), rc=2).err.startswith("error: student ")


def test_eval_final_loads_as_in_lm_evaluation_harness(_eval_world):
    model = AutoModelForCausalLM.from_pretrained(_eval_world / "run/final", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(_eval_world / "run/final")
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)("the quick", max_new_tokens=8, do_sample=False)
    assert said[0]["generated_text"].startswith("the quick")


# --------------------------------------------------------------------------------------------------
# Runs: killed anywhere, on many ranks, a week of every mode, as processes.


DROPOUT = dict(cls="GPT2Config", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
KILLED = {"map": {}, "stream": dict(streaming=True, shuffle_buffer=7), "accumulation 3": dict(batch_size=2, gradient_accumulation_steps=3),
          "dropout": dict(student="dropout"), "2 ranks": dict(ranks=2, batch_size=2)}


def killed_run(tmp_path, teacher, student, text, kind, kills, seed):
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "batch_size": 4, "max_steps": 12, "save_steps": 2,
              "eval_steps": 5, "eval_samples": 8, "alpha": 0.4, "lr_scheduler": "cosine", **KILLED[kind]}
    ranks, random_ = fields.pop("ranks", 1), random.Random(seed)
    if fields["student"] == "dropout":
        fields["student"] = tiny_model(tmp_path / "dropout", **DROPOUT)
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    start = time.time()
    assert "done in" in Fork(tmp_path / "whole.txt", *flags(**{**fields, "output_dir": whole}), ranks=ranks).wait()
    usual, inside = time.time() - start, 0
    half_saved = lambda: bool(list(Path(broken, "checkpoints").glob("tmp-*")))
    for n in range(kills):
        run = Fork(tmp_path / "broken.txt", *flags(**{**fields, "output_dir": broken}), ranks=ranks)
        if n % 2 == 0:   # in the middle of a save
            end = time.time() + 30
            while not half_saved() and time.time() < end and not os.path.isdir(f"{broken}/final"):
                pass
        else:
            time.sleep(usual * random_.uniform(0.3, 0.9))
        run.signal(signal.SIGKILL).wait()
        inside += half_saved()
    shown = Fork(tmp_path / "broken.txt", *flags(**{**fields, "output_dir": broken}), ranks=ranks).wait()
    assert os.path.isdir(f"{broken}/final"), shown[-3000:]
    assert same(final_weights(whole), final_weights(broken)), shown
    assert quiet_log(whole) == quiet_log(broken)
    assert kills < 2 or inside, "no kill fell into a save"


@pytest.mark.parametrize("kind", KILLED)
def test_runs_a_killed_run_ends_as_if_it_had_not_been(tmp_path, teacher, student, text, kind):
    killed_run(tmp_path, teacher, student, text, kind, kills=3, seed=len(kind))


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KILLED)
def test_runs_twelve_kills(tmp_path, teacher, student, text, kind):
    killed_run(tmp_path, teacher, student, text, kind, kills=12, seed=1)


def test_runs_two_ranks_one_two_again(tmp_path, teacher, student, text):
    """Another number of ranks goes on with the same global batches, optimiser state included."""
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, "batch_size": 3, "save_steps": 2}
    Fork(tmp_path / "a.txt", *flags(**fields, max_steps=6, output_dir=tmp_path / "a"), ranks=2).wait()
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        shown = Fork(tmp_path / "b.txt", *flags(**fields, max_steps=steps, output_dir=tmp_path / "b"), ranks=ranks).wait()
        assert Path(tmp_path, "b", "checkpoints", f"step-{steps:08d}").is_dir(), shown
    assert distance(final_weights(tmp_path / "b"), final_weights(tmp_path / "a")) < 1e-5
    pairs = zip(column(tmp_path / "a", "train/loss"), column(tmp_path / "b", "train/loss"), strict=True)
    assert all(abs(x - y) < 1e-5 * abs(x) for x, y in pairs)
    refused = distil(tmp_path / "b", teacher=teacher, student=student, dataset=text, batch_size=5, max_steps=8, rc=2)
    assert "6 sequences a step" in refused.err


@pytest.mark.parametrize("number, stream", [(signal.SIGTERM, {"streaming": True, "shuffle_buffer": 7}), (signal.SIGINT, {})])
def test_runs_a_signal_saves_and_exits_0(tmp_path, teacher, student, text, number, stream):
    fields = {**PLAIN, "teacher": teacher, "student": student, "dataset": text, **stream}
    process = spawn(*flags(**fields, max_steps=100_000, output_dir=tmp_path / "run"))
    wait_for_log(tmp_path / "run", process)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "saved; the same command continues" in shown, shown
    stopped = log(tmp_path / "run", "train")[-1]["train/step"]
    assert Path(tmp_path, "run", "checkpoints", f"step-{stopped:08d}").is_dir()
    for out in ("run", "whole"):   # what is resumed goes on with the batch after the last one it was trained on
        cli(*flags(**fields, max_steps=stopped + 3, output_dir=tmp_path / out))
    assert same(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher, student, chat):
    """Rows of very different lengths, so that ranks count different numbers of tokens."""
    out = tmp_path_factory.mktemp("alone") / "run"
    fields = dict(teacher=teacher, student=student, dataset=chat, max_steps=4, alpha=0.3, temperature=2.0)
    distil(out, **fields, batch_size=8)
    return out, fields


def close_to(out, other, shown):
    assert os.path.isdir(f"{out}/final"), shown
    pairs = list(zip(column(out, "train/loss"), column(other, "train/loss"), strict=True))
    assert all(abs(x - y) <= 1e-5 * abs(y) for x, y in pairs), pairs
    assert distance(final_weights(out), final_weights(other)) < 1e-5


@pytest.mark.parametrize("shard_teacher", [True, False])
@pytest.mark.parametrize("fsdp", ["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"])
def test_runs_two_ranks_are_one(tmp_path, alone, fsdp, shard_teacher):
    other, fields = alone
    fields = {**PLAIN, **fields, "fsdp": fsdp, "shard_teacher": shard_teacher, "output_dir": tmp_path / "run", "batch_size": 2,
              "gradient_accumulation_steps": 2}
    close_to(tmp_path / "run", other, Fork(tmp_path / "log.txt", *flags(**fields), ranks=2).wait())


FAMILIES = {"qwen3 moe": dict(cls="Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
            "gemma2": dict(cls="Gemma2Config", head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
            "gpt2": dict(cls="GPT2Config", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)}


@pytest.mark.parametrize("fsdp", ["full_shard", pytest.param("shard_grad_op", marks=pytest.mark.campaign),
                                  pytest.param("hybrid_shard", marks=pytest.mark.campaign), "no_shard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_families_under_sharding(tmp_path, text, family, fsdp):
    fields = {**PLAIN, "teacher": tiny_model(tmp_path / "teacher", hidden=16, layers=3, seed=1, **FAMILIES[family]),
              "student": tiny_model(tmp_path / "student", hidden=16, layers=2, seed=2, **FAMILIES[family]), "dataset": text,
              "max_steps": 3, "alpha": 0.5}
    distil(tmp_path / "one", **{**fields, "batch_size": 4})
    shown = Fork(tmp_path / "log.txt", *flags(**fields, fsdp=fsdp, batch_size=2, output_dir=tmp_path / "two"), ranks=2).wait()
    close_to(tmp_path / "two", tmp_path / "one", shown)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final")


def test_runs_loading_costs_other_ranks_their_shard_only(tmp_path):
    path = tiny_model(tmp_path / "wide", hidden=512, layers=16, intermediate_size=1536)
    script = (f"import sys, resource; sys.path.insert(0, {str(HERE)!r})\nimport simple_distill as sd\n"
              "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
              f"with sd.process_group():\n    cfg = sd.Config(student={path!r}, use_wandb=False)\n"
              f"    sd.load_student(sd.Config(student={tiny_model(tmp_path / 'first')!r}))   # imports the model's code\n"
              "    before = peak()\n    root = sd.load_student(cfg)\n    whole = 4 * root.model.num_parameters()\n"
              "    shard = sum(4 * p.to_local().numel() for p in root.parameters())\n"
              "    print('RANK', sd.RANK, (peak() - before - shard) / whole, flush=True)\n")
    Path(tmp_path, "load.py").write_text(script)
    shown = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "load.py"],
                           capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    extra = dict(re.findall(r"RANK (\d) (\S+)", shown.stdout))
    assert float(extra["1"]) < 0.2, shown.stdout + shown.stderr


def test_runs_launcher_with_two_processes_and_sigterm(tmp_path, alone):
    other, fields = alone
    process = spawn(*flags(**{**PLAIN, **fields, "output_dir": tmp_path / "run", "batch_size": 4}), nproc=2)
    shown, _ = process.communicate(timeout=180)
    assert process.returncode == 0, shown
    close_to(tmp_path / "run", other, shown)
    process = spawn(*flags(**{**PLAIN, **fields, "output_dir": tmp_path / "long", "batch_size": 4, "max_steps": 100_000}), nproc=2)
    wait_for_log(tmp_path / "long", process)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "saved; the same command continues" in shown, shown
    assert list(Path(tmp_path, "long", "checkpoints").glob("step-*"))


def test_runs_two_nodes_of_one_process(tmp_path, alone):
    other, fields = alone
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    words = words_of(flags(**{**PLAIN, **fields, "output_dir": tmp_path / "run", "batch_size": 4}))
    env = {**os.environ, "NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [subprocess.Popen([HERE / "launch.sh", *words], env={**env, "NODE_RANK": str(n)}, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for n in (0, 1)]
    shown = [n.communicate(timeout=180)[0] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], shown
    close_to(tmp_path / "run", other, shown)
    assert "done in" in shown[0] and "done in" not in shown[1]   # only rank 0 prints


def test_runs_a_rank_that_dies_takes_the_job_down(tmp_path, alone):
    process = spawn(*flags(**{**PLAIN, **alone[1], "output_dir": tmp_path / "run", "batch_size": 4, "max_steps": 100_000}), nproc=2)
    wait_for_log(tmp_path / "run", process)
    workers = subprocess.run(["pgrep", "-f", f"simple_distill.py.*{tmp_path}/run"], capture_output=True, text=True).stdout.split()
    ranks = [p for p in workers if "RANK=1" in Path(f"/proc/{p}/environ").read_text().split("\0")]
    start = time.time()
    os.kill(int(ranks[0]), signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0 and time.time() - start < 60


def test_runs_launcher_explains_itself():
    shown = subprocess.run([HERE / "launch.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "NNODES" in shown.stdout and "--learning_rate" in shown.stdout


def test_runs_launcher_passes_a_users_mistake_on(tmp_path):
    """Two ranks make it, one line says it, the exit code is that of one process."""
    process = spawn(*flags(alpha=1, dataset="/nowhere.jsonl", student="/nowhere", output_dir=tmp_path / "out"), nproc=2, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: ") and len(err.strip().splitlines()) <= 2, err


SHARDINGS = [dict(fsdp=fsdp, shard_teacher=teacher, cpu_offload=offload) for fsdp, teacher, offload in
             (("full_shard", True, False), ("shard_grad_op", True, False), ("hybrid_shard", False, False), ("no_shard", True, True))]
WEEK = [(2, dict(max_steps=4, save_steps=2, **sharding)) for sharding in SHARDINGS] + [
    (2, dict(max_steps=6)), (1, dict(max_steps=8, fsdp="full_shard")),   # the last of those goes on, on two ranks and on one
    (1, dict(alpha=1, max_steps=3)), (1, dict(divergence="reverse", temperature=2, max_steps=3)), (1, dict(divergence="jsd", max_steps=3)),
    (1, dict(student="layers:1", max_steps=3)), (1, dict(dtype="bf16", gradient_checkpointing=True, max_steps=3)),
    (1, dict(dtype="fp16", max_steps=3)), (1, dict(compile=True, max_steps=3)), (2, dict(streaming=True, max_steps=4)),
    (1, dict(lr_multipliers=["mlp=0", "embed=0.1"], max_steps=3)), (1, dict(num_epochs=2, eval_steps=5, gradient_accumulation_steps=2)),
    (2, dict(mode="cache", cache_dir="cache")), (2, dict(cache_dir="cache", max_steps=4)), (1, dict(cache_dir="cache", max_steps=3)),
    (1, dict(mode="cache", cache_dir="topk", cache_method="topk", cache_top_k=8)), (1, dict(cache_dir="topk", max_steps=3)),
    (2, dict(blockwise=True, max_steps=2)), (1, dict(blockwise=True, block_input="teacher", num_epochs=0)),
    (1, dict(mode="generate", provider="local", num_examples=3, max_tokens=8, concurrency=3)),
    (2, dict(mode="eval", student="final")), (1, dict(mode="eval", student="final", compare=["final"], generate_comparisons=False))]


@pytest.mark.campaign
def test_runs_a_week_of_runs(tmp_path, teacher, student, text):
    """No warning, no leftover process, no file but in output_dir and cache_dir."""
    (tmp_path / "here").mkdir()
    base, last = dict(teacher=teacher, student=student, dataset=text), None
    for i, (nproc, fields) in enumerate(WEEK):
        mode = fields.get("mode", "train")
        same_place = i in (len(SHARDINGS), len(SHARDINGS) + 1)   # those go on in the output_dir of the run before
        last = last if same_place else f"out{i}"
        reads = [k for k in config.FIELDS if mode in config.FIELDS[k].metadata["read_by"].split()]
        given = {k: v for k, v in {**PLAIN, **base, **fields, "output_dir": last}.items() if k in reads}
        if mode == "eval":
            final = str(tmp_path / "here" / "out0" / "final")
            given |= {k: [final] if k == "compare" else final for k in ("student", "compare") if k in fields}
        if same_place:
            given |= dict(fsdp="full_shard", save_steps=2)
        if fields.get("cache_dir"):
            given["cache_dir"] = str(tmp_path / "here" / fields["cache_dir"])
        process = spawn(*flags(**given), nproc=nproc, cwd=tmp_path / "here", env={"PYTHONWARNINGS": "default"})
        shown = process.communicate(timeout=600)[0]
        assert process.returncode == 0, (fields, shown)
        ours = [line for line in shown.splitlines() if re.search(r"(simple_distill|config)\.py:\d+: \w*Warning", line)]
        assert not ours and "Traceback" not in shown, (fields, shown)
    assert {p.name for p in (tmp_path / "here").iterdir()} <= {f"out{i}" for i in range(len(WEEK))} | {"cache", "topk"}
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.strip()


# --------------------------------------------------------------------------------------------------
# Package: six files, small, documented, its README true.


def test_package_the_top_level_is_six_files_and_five_requirements():
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
def test_package_readme_commands_run(command, tmp_path, monkeypatch, teacher, student, text):
    """As they stand there, on tiny models: names of models and data are replaced, lengths cut short, nothing else."""
    mode = command[command.index("--mode") + 1] if "--mode" in command else "train"
    if mode == "generate":
        pytest.skip(f"mode {mode} has tests of its own, with a server")
    words = command[1 if command[0].endswith("launch.sh") else 2:]
    ours = {"--teacher": teacher, "--student": student, "--dataset": text, "--tokenizer": teacher, "--compare": student}
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


def test_package_the_readmes_own_loss(tmp_path, teacher, student, text):
    """A fork that adds it as the README says: its gradient is that of autograd, and the command line trains with it."""
    lines = re.search(r"( +elif divergence == \"skew\":\n(?: {12}.*\n)+)", (HERE / "README.md").read_text())[1]
    source, anchor = (HERE / "simple_distill.py").read_text(), "        elif divergence == \"reverse\":\n"
    assert source.count(anchor) == 1 and len(lines.splitlines()) <= 10
    (tmp_path / "simple_distill.py").write_text(source.replace(anchor, lines + anchor))
    choices = 'Literal["forward", "reverse", "jsd"]'
    (tmp_path / "config.py").write_text((HERE / "config.py").read_text().replace(choices, choices[:-1] + ', "skew"]'))
    code = """
import torch, simple_distill as sd
z, y, labels = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64), torch.tensor([1, 2, 3, 4, 8])
for T in (1.0, 2.0):
    a = z.clone().requires_grad_()
    q, p = torch.softmax(y / T, -1), torch.softmax(a / T, -1)
    ce, kl = torch.nn.functional.cross_entropy(a, labels, reduction="none"), T * T * (q * (q / (0.9 * p + 0.1 * q)).log()).sum(-1)
    (0.3 * ce + 0.7 * kl).sum().backward()
    ours = sd.chunk_terms(z.clone(), labels, y.clone(), alpha=0.3, temperature=T, divergence="skew", student_scaling=(1.0, None), teacher_scaling=(1.0, None))
    for mine, its in zip(ours, (ce, kl, a.grad)):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-9, atol=1e-12)
"""
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    checked = run([sys.executable, "-c", code])
    assert checked.returncode == 0, checked.stderr
    words = flags(**PLAIN, teacher=teacher, student=student, dataset=text, divergence="skew", max_steps=2, use_wandb=False, output_dir="out")
    trained = run([sys.executable, "simple_distill.py", *words])
    assert trained.returncode == 0 and all(0 < x < 99 for x in column(tmp_path / "out", "train/kl_loss")), trained.stderr


# --------------------------------------------------------------------------------------------------
# Bench: python test_simple_distill.py --bench


def interleaved(cases, rounds=7):
    """{name: function} -> {name: median seconds}: the rounds alternate, so that a noisy machine is noisy for all."""
    times = {name: [] for name in cases}
    for n in range(rounds + 1):
        for name, work in cases.items():
            start = time.perf_counter()
            work()
            if DEVICE_SYNC:
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] * (n > 0)   # the first round warms up
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


DEVICE_SYNC = torch.cuda.is_available()


def loss_case(V, N, D, Dt, counted=1.0):
    device, dtype = ("cuda", torch.bfloat16) if DEVICE_SYNC else ("cpu", torch.float32)
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)
    h, th, w, tw = make(N, D), make(N, Dt), make(V, D) / D ** 0.5, make(V, Dt) / Dt ** 0.5
    labels = torch.randint(0, V, (N,), device=device)
    labels[torch.arange(N, device=device) >= counted * N] = -100
    return h, w, th, tw, labels


def plain_loss(h, w, th, tw, labels):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    keep = labels != -100
    s, t = (h @ w.T).float(), (th @ tw.T).float()
    (0.5 * F.cross_entropy(s, labels) + 0.5 * F.kl_div(F.log_softmax(s[keep], -1), F.log_softmax(t[keep], -1), log_target=True,
                                                       reduction="batchmean")).backward()


def our_loss(h, w, th, tw, labels):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    sd.distillation_loss(h, sd.Head(w), labels, (th, sd.Head(tw)), alpha=0.5, temperature=1.0)[0].backward()


def its_matmuls(h, w, th, tw, labels):
    keep, grad_w = labels != -100, torch.zeros_like(w)
    h, th = h[keep], th[keep]
    step = max(1, sd.LOGITS_BUDGET // (2 * h.element_size() * len(w)))
    for i in range(0, len(h), step):
        s, _ = h[i:i + step] @ w.T, th[i:i + step] @ tw.T
        s @ w
        grad_w.addmm_(s.T, h[i:i + step])


def eager(work, *case):
    """The same with the element-wise part as it runs where there is no compiler."""
    compiled, sd.torch.compile = sd.torch.compile, lambda f, **_: f
    kernels, sd.chunk_kernel = sd.chunk_kernel, sd.chunk_kernel.__wrapped__
    try:
        work(*case)
    finally:
        sd.torch.compile, sd.chunk_kernel = compiled, kernels


def allocators():
    """On a CPU everything is measured twice: with glibc's allocator as it comes, and as process_group() sets it for a run."""
    for name, settings in (("glibc as it comes", ((-4, 65536), (-1, 131072))), ("glibc as the trainer sets it", ((-4, 0), (-1, 2**31 - 1)))):
        if not DEVICE_SYNC:
            for option, value in settings:
                ctypes.CDLL(None).mallopt(option, value)
            yield name
    if DEVICE_SYNC:
        yield "PyTorch's allocator"


def bench_loss(vocab=32000):
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        LigerFusedLinearJSDLoss = None
    shapes = ((vocab, 8192, 2048, 4096),) if DEVICE_SYNC else ((vocab, 1024 if vocab == 32000 else 512, 256, 512),)
    for V, N, D, Dt in shapes:
        case, half, small = loss_case(V, N, D, Dt, 7 / 8), loss_case(V, N, D, Dt, 0.5), loss_case(V, 64, D, Dt)
        full = loss_case(V, N, D, Dt)
        cases = {"its matmuls": lambda: its_matmuls(*case), "ours": lambda: our_loss(*case), "ours, eager": lambda: eager(our_loss, *case),
                 "plain PyTorch": lambda: plain_loss(*case), "ours, none masked": lambda: our_loss(*full), "ours, half masked": lambda: our_loss(*half),
                 "ours, 64 tokens": lambda: our_loss(*small), "plain, 64 tokens": lambda: plain_loss(*small)}
        if LigerFusedLinearJSDLoss:
            liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=DEVICE_SYNC, temperature=1.0)

            def run_liger():
                h, w, th, tw, labels = case
                liger(h.detach().requires_grad_(), w.detach().requires_grad_(), th, tw, labels).backward()
            cases["Liger fused JSD"] = run_liger
        for allocator in allocators():
            found = interleaved(cases)
            print(f"\nloss, V {V:,}, {N:,} tokens, 7 of 8 counted, D {D}, Dt {Dt}, {'bf16 cuda' if DEVICE_SYNC else 'fp32 cpu'}, {allocator}")
            for name, seconds in found.items():
                print(f"  {name:<20}{seconds:>9.3f} s{seconds / found['its matmuls']:>8.2f} x its matmuls")


def peak_memory(which):
    """In a process of its own: bytes above the inputs, once everything is compiled and warm."""
    work = {"ours": our_loss, "ours, eager": functools.partial(eager, our_loss), "plain": plain_loss}[which]
    work(*loss_case(151936, 8, 256, 512))
    case = loss_case(151936, 4096, 256, 512)
    if DEVICE_SYNC:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")   # the peak of the resident set starts again
        before = resident("VmRSS")
    work(*case)
    print((torch.cuda.max_memory_allocated() if DEVICE_SYNC else resident("VmHWM")) - before)


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def bench_memory():
    found = {}
    for which in ("ours", "ours, eager", "plain"):
        shown = subprocess.run([sys.executable, __file__, "--peak-memory", which], capture_output=True, text=True)
        found[which] = int(shown.stdout.split()[-1]) if shown.returncode == 0 else math.nan   # killed: did not fit
    print("\npeak memory of the loss above its inputs, V 151,936, 4,096 tokens")
    for which, size in found.items():
        print(f"  {which:<20}{size / 2**30:>9.2f} GiB{size / found['plain']:>8.1%} of plain")


def bench_step():
    """Tokens a second of a whole optimiser step, random weights: a 0.6B student and a 4B teacher's shapes on a GPU, tiny ones here."""
    shape = dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=2048)
    big = dict(shape, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)
    B, T = 8, 1024
    if not DEVICE_SYNC:
        small = dict(vocab_size=32000, head_dim=32, num_key_value_heads=4, max_position_embeddings=512)
        shape = dict(shape, **small, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
        big = dict(big, **small, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8)
        B, T = 4, 256
    with tempfile.TemporaryDirectory() as folder, sd.process_group():
        for name, fields in (("student", shape), ("teacher", big)):
            transformers.Qwen3Config(**fields).save_pretrained(f"{folder}/{name}")
        tokens = torch.randint(0, shape["vocab_size"], (B, T))
        batch = sd.collate([{"input_ids": row, "targets": None} for row in tokens])

        def stepper(alpha, compile=False):
            cfg = sd.Config(student=f"{folder}/student/config.json", teacher=f"{folder}/teacher/config.json", compile=compile, alpha=alpha,
                            gradient_checkpointing=False, use_wandb=False)
            student, teacher = sd.load_student(cfg), sd.load_teacher(cfg) if alpha < 1 else None
            optimizer = sd.make_optimizer(student.parameters(), dict.fromkeys(student.parameters(), 1e-4), 0.0)
            health, signal_of = sd.new_scale_state(False), sd.teacher_targets(teacher)
            work = functools.partial(sd.distil_loss, alpha=alpha, temperature=1.0, divergence="forward")

            def step():
                student(work, batch, signal_of(batch), len(batch.labels))[0].backward()
                sd.optimizer_step(optimizer, 1.0, health, False)
                optimizer.zero_grad()
            return step

        def plain(divergence, trl=None):
            dtype, device = (torch.bfloat16, "cuda") if DEVICE_SYNC else (torch.float32, "cpu")
            student = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**shape)).to(device)
            teacher = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**big), dtype=dtype).to(device)
            optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
            ids = batch.input_ids

            if trl:   # its own compute_loss at lmbda 0: no sampling, no label loss
                its = types.SimpleNamespace(teacher_model=teacher, beta=0.0, generalized_jsd_loss=trl.generalized_jsd_loss)
                inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)

            def trl_step():
                with torch.autocast(device, dtype, enabled=DEVICE_SYNC):
                    trl.compute_loss(its, student, inputs).backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            def step():
                with torch.no_grad():
                    t = teacher(ids).logits[:, :-1].flatten(0, 1)
                with torch.autocast(device, dtype, enabled=DEVICE_SYNC):
                    s = student(ids).logits[:, :-1].flatten(0, 1).float()
                (0.5 * F.cross_entropy(s, ids[:, 1:].flatten()) + 0.5 * divergence(s, t.float())).backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            return trl_step if trl else step
        kl = lambda s, t: F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), log_target=True, reduction="batchmean")
        cases = {"labels only": stepper(1.0), "online": stepper(0.5), "online, compile": stepper(0.5, True), "plain PyTorch": plain(kl)}
        with contextlib.suppress(ImportError):
            os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
            from trl.experimental.gkd import GKDTrainer
            cases["TRL's GKDTrainer"] = plain(None, GKDTrainer)
        for allocator in allocators():
            found = interleaved(cases, rounds=5)
            print(f"\nwhole step, {B} x {T} tokens, V {shape['vocab_size']:,}, {allocator}")
            for name, seconds in found.items():
                print(f"  {name:<20}{B * T / seconds:>12,.0f} tokens/s{found['plain PyTorch'] / seconds:>8.2f} x plain")


PARTS = {
    "memory": bench_memory,
    "loss": bench_loss,
    "loss, V 151,936": lambda: bench_loss(151936),
    "step": bench_step,
    "cache": bench_cache,   # optional: cache
    "block": bench_block,   # optional: blockwise
}


def bench(parts):
    """Tables of speed and memory, interleaved rounds, medians, ratios; each in a process of its own, so that none finds another's memory."""
    if parts:
        torch.set_num_threads(os.cpu_count())
        return [PARTS[part]() for part in parts] and 0
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if DEVICE_SYNC else 'CPU'}", flush=True)
    return max(subprocess.run([sys.executable, __file__, "--bench", part]).returncode for part in PARTS)


if __name__ == "__main__":
    if "--peak-memory" in sys.argv:
        peak_memory(sys.argv[-1])
    else:
        sys.exit(bench(sys.argv[2:]) if "--bench" in sys.argv else pytest.main([__file__, *sys.argv[1:]]))
