#!/usr/bin/env python
"""Distil a large language model into a small one: the whole trainer, to be read and changed.

    python simple_distill.py                                  # the demo: no download, no GPU
    python simple_distill.py --teacher T --student S --dataset D              # online distillation
    python simple_distill.py --mode cache --teacher T --dataset D --cache_dir C   # the teacher once
    python simple_distill.py --student S --cache_dir C                        # ... then from disk
    python simple_distill.py --teacher T --student S --dataset D --blockwise  # block by block
    python simple_distill.py --teacher T --student S --dataset D --on_policy 0.5   # own texts too
    python simple_distill.py --mode generate --api_model M             # a dataset from an API
    python simple_distill.py --mode eval --student out/final --teacher T --dataset D --compare OTHER
    ./launch.sh ...                                           # the same on many devices

First the core, which every fork needs: Runtime, Losses, Data, Models and FSDP, Optimiser,
Checkpoints, Train. Whoever wants to understand or change plain distillation can stop there. Then
the optional chapters, each of which can be deleted (README, "Changing it"): streaming, demo, cache,
blockwise, on_policy, generate, eval. The knobs are config.py's.

Shapes, as suffixes: B sequences, T positions, N counted tokens, C those of a chunk, D width, V
vocabulary, K kept teacher entries a token.
"""
import ast   # optional: generate
import asyncio   # optional: generate
import base64   # optional: generate
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import email.utils   # optional: generate
import errno   # optional: generate
import fcntl
import functools
import glob
import hashlib
import importlib   # optional: generate
import inspect
import itertools
import json
import math
import os
import pickle
import queue
import random   # optional: generate
import re
import resource
import shlex   # optional: cache
import shutil
import signal
import sys
import sysconfig   # optional: demo generate
import tempfile
import textwrap   # optional: generate
import threading
import time
import traceback
import urllib.parse   # optional: generate
import urllib.request   # optional: generate
import warnings   # optional: generate
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from config import (
    Config,
    UserError,
    demo_knobs,   # optional: demo
    knobs_in,   # optional: cache generate
    one_line,
    parse_config,
    parse_multipliers,
    parse_or_exit,
    result_knobs,
)

if __name__ == "__main__":   # --help and a typo are answered before the slow imports below
    CONFIG = parse_or_exit(sys.argv[1:])

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import datasets
import huggingface_hub
import numpy as np
import safetensors.numpy   # optional: cache
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_scheduler,
    masking_utils,
)


# --------------------------------------------------------------------------------------------------
# Runtime: who am I, on which device. One process is rank 0 of 1 and takes the same path as many.


def launcher_number(name, default):
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        print(f"error: {name} is {text!r} in the environment, not a number; torchrun and launch.sh "
              "set it", file=sys.stderr)
        sys.exit(2)
    return int(text)


RANK = launcher_number("RANK", 0)               # torchrun sets all four
WORLD = launcher_number("WORLD_SIZE", 1)
LOCAL_RANK = launcher_number("LOCAL_RANK", 0)   # on this node
LOCAL_WORLD = launcher_number("LOCAL_WORLD_SIZE", WORLD)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")


def print0(*words):
    if RANK == 0:   # through tqdm, so that a line never tears the bar
        tqdm.write(printable(" ".join(map(str, words))))


def printable(text):
    """Control characters as their escapes: names and answers of strangers reach the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


# ---- what takes a while


class LateBar(tqdm):
    """A bar that nobody sees, nor what clears it, before its delay is set to 0: see progress."""

    def display(self, *args, **kwargs):
        return self.delay or super().display(*args, **kwargs)

    def clear(self, *args, **kwargs):
        return self.delay or super().clear(*args, **kwargs)


@contextlib.contextmanager
def progress(what, total=None, unit="it"):
    """Around whatever may take longer than two seconds: from then on rank 0 shows what it is, with
    a bar where the total is known, else with the time. Yields the bar, to update()."""
    words = None if total else "{desc} ... {elapsed}"
    done = threading.Event()
    with LateBar(desc=what, total=total, unit=unit, bar_format=words, disable=RANK > 0,
                 delay=math.inf, leave=False, dynamic_ncols=True, mininterval=0.5) as bar:
        thread = threading.Thread(target=show_late, args=[bar, done], daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            done.set()
            thread.join()


def show_late(bar, done):
    """A thread: the work may not come to update the bar for minutes."""
    seconds = 2.0
    while RANK == 0 and not done.wait(seconds):
        bar.delay = 0
        bar.refresh()
        seconds = 5.0


# ---- what the user brings, and what is whose


@contextlib.contextmanager
def reading(what, way_out=""):
    """What goes wrong while a thing of the user's is read is the user's to mend: one `error:` line
    that names it. The whole traceback goes along (see explain). Our own computation does not
    belong inside: what goes wrong there is a bug, and shows itself as one."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        reason = one_line(e)
        if "trust_remote_code" in str(e):   # at the end of a long message, which would be cut
            reason = "it brings code of its own, which runs only with --trust_remote_code true"
        raise UserError(f"{what}: {reason}{way_out}") from e


def refuse_foreign(path, is_ours, way_out="choose another folder, or move it away"):
    """A file that stands where we would write, and that is_ours(path) does not know, is somebody
    else's: we never replace it."""
    if not os.path.lexists(path):
        return
    try:
        known = is_ours(path)
    except Exception:   # not even readable as one of ours
        known = False
    if not known:
        raise UserError(f"{path!r} was not written by simple_distill and would be replaced; "
                        + way_out)


def remove_files(folder, names):
    """Delete these files, and the folder where nothing else is in it."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    with contextlib.suppress(OSError):   # somebody else's file is in it
        os.rmdir(folder)


# ---- ranks


@contextlib.contextmanager
def process_group():
    """gloo beside NCCL: counts and flags travel between hosts without making the GPU wait."""
    if CUDA:
        gpus = torch.cuda.device_count()
        if LOCAL_WORLD > gpus:
            raise UserError(f"{LOCAL_WORLD} processes on this node, which shows {gpus} GPUs: use "
                            f"NPROC={gpus} ./launch.sh, or CUDA_VISIBLE_DEVICES= for its CPUs")
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")   # TF32
    else:
        keep_freed_memory()
    options = {}
    if "RANK" not in os.environ:   # not under torchrun: alone, without opening a port
        options = dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    with reading(f"rank {RANK} of {WORLD} cannot join the others (RANK, WORLD_SIZE, MASTER_ADDR "
                 "and MASTER_PORT are the launcher's)"):
        # for all to come, and of a collective on GPUs. There ranks are seconds apart, minutes while
        # they compile: whoever waits longer waits for a rank that is gone.
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=15), **options)
    wait_patiently_on_the_host()
    over = threading.Event()
    if WORLD > 1:
        threading.Thread(target=leave_after_failure, args=[over], daemon=True).start()
    try:
        yield
        if WORLD > 1 and not some_rank_failed():
            # the store goes with its host: nobody leaves before all are done, or one has failed
            with contextlib.suppress(RuntimeError):
                all_sum(0)
    except BaseException:
        fail_first()   # a bug, but the others are not to wait for this rank
        raise
    finally:
        if WORLD == 1 or not some_rank_failed():   # tearing down NCCL waits for those that are gone
            dist.destroy_process_group()
        over.set()


def wait_patiently_on_the_host():
    """There, before each long stretch of GPU work, ranks wait for one that downloads, tokenises
    or reads a model: that may take hours. One that has failed has closed its connection, which
    gloo finds at once."""
    host = dist.group.WORLD._get_backend(torch.device("cpu"))
    host._set_default_timeout(datetime.timedelta(minutes=24 * 60))


def leave_after_failure(over):
    """A thread: where another rank has failed, this one may wait for it in a collective on a GPU,
    which nothing interrupts. It gets half a minute to end by itself."""
    while not over.wait(5):
        if some_rank_failed() and not over.wait(30):
            os._exit(2)


def fail_first():
    """Whether this rank is the first to fail. It speaks for all: what breaks on the others from
    here on is their connection to it."""
    if not dist.is_initialized():
        return LOCAL_RANK == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:   # the store itself went with its host
        return False


def some_rank_failed():
    try:
        return dist.distributed_c10d._get_default_store().check(["failed"])
    except RuntimeError:   # the store itself went with its host
        return True


def keep_freed_memory():
    """By default glibc gives large blocks back at once, and page-faults them in anew for the next
    tensor: a quarter of a step's time on a CPU."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4   # as malloc.h numbers them
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def node_first():
    """The first rank of each node goes ahead (downloads, dataset caches); the others find its work
    done."""
    if LOCAL_RANK > 0:
        all_sum(0)   # waits until the first ranks are here, below
    try:
        yield
    finally:   # also after an error, which the others then meet themselves
        if LOCAL_RANK == 0:
            all_sum(0)


def all_sum(*values):
    """Sum Python numbers over ranks, on the host. No rank gets past it before all have come."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_rank0(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


# ---- the hub


def check_hub(names):
    """One short look whether the hub answers, before libraries ask it for each file and try again
    for minutes. Where it does not, they take what they have kept."""
    if not any(map(is_hub_name, names)) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    problem = None
    if RANK == 0:
        try:
            with progress(f"asking the hub {huggingface_hub.constants.ENDPOINT}"):
                session = huggingface_hub.utils.get_session()
                session.head(huggingface_hub.constants.ENDPOINT, timeout=10)
        except Exception as e:
            problem = one_line(e)
    problem = from_rank0(problem)
    if problem:
        print0(f"the hub {huggingface_hub.constants.ENDPOINT} cannot be reached ({problem}): only "
               "what is on this machine is used")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def is_hub_name(name):
    """name or owner/name, no path that is there, and none of our own words."""
    if not name or name == "demo" or os.path.exists(name):
        return False
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.endswith(".json")


# ---- files


def digest(*things):
    """16 characters that differ when anything in these things does."""
    text = json.dumps(things, sort_keys=True, default=plain_value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain_value(thing):
    """What json cannot write; str would leave out the middle of a long array."""
    return thing.tolist() if hasattr(thing, "tolist") else str(thing)


def write_json(value, path):
    """A dict or a dataclass; the file is the old one or the new one, never half of it."""
    if not isinstance(value, dict):
        value = dataclasses.asdict(value)
    aside = f"{path}.{os.getpid()}.tmp"   # workers of a cache may write at the same moment
    with open(aside, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
    os.replace(aside, path)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8", errors="replace") as f:   # half a surrogate pair
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path):
    """The rows of a .jsonl, none where there is no file. Half a last line, as a kill leaves it, is
    removed from the file: the next row must not be appended to it."""
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as f:
        content = f.read()
        end = content.rfind(b"\n") + 1   # of the last line that is surely whole
        try:
            json.loads(content[end:])
        except ValueError:
            f.truncate(end)
            content = content[:end]
        else:
            f.write(b"\n")   # whole after all, only its newline was missing
    try:
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError:
        explain_bad_file(path)
        raise


def sync(*paths):
    """Files or folders to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# ---- one run a directory, and how to stop it


@contextlib.contextmanager
def lock(folder, wait=False):
    """One run a directory; wait: until the other is done. The kernel drops the lock with its
    process, so that a killed run leaves none. A folder made for a refused run goes again."""
    made = not os.path.isdir(folder)
    handle = None    # rank 0 holds the lock for all
    problem = None
    try:
        if RANK == 0:
            try:
                os.makedirs(folder, exist_ok=True)
                handle = os.open(folder, os.O_RDONLY)
                NOT_FOR_CHILDREN.add(handle)
                if wait:
                    with progress(f"waiting for another run in {folder}"):
                        fcntl.flock(handle, fcntl.LOCK_EX)
                else:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.access(folder, os.W_OK):
                    problem = f"{folder!r} is not writable"
            except BlockingIOError:
                problem = f"another run is at work in {folder!r}"
            except (OSError, ValueError) as e:   # ValueError: a null byte in the path
                problem = f"cannot use {folder!r} as a directory ({one_line(e)})"
        problem = from_rank0(problem)
        if problem:
            raise UserError(f"{problem}; choose another --output_dir")
        check_shared(folder)
        yield
    finally:
        if handle is not None:
            NOT_FOR_CHILDREN.discard(handle)
            os.close(handle)
            if made and not os.listdir(folder):
                os.rmdir(folder)


def check_shared(folder):
    """Every rank must see what rank 0 writes: a node with a disk of its own under this name would
    write checkpoints that lack a part."""
    probe = os.path.join(folder, f".probe-{from_rank0(os.getpid())}-{from_rank0(time.time_ns())}")
    problem = None
    if RANK == 0:
        try:
            with open(probe, "w"):
                pass
        except OSError as e:
            problem = f"{folder!r} cannot be written ({e.strerror})"
    problem = from_rank0(problem)
    if problem is None:
        blind = all_sum(not os.path.exists(probe))[0]
        if RANK == 0:
            os.remove(probe)
        if blind:
            problem = (f"{blind:.0f} of {WORLD} ranks do not see what rank 0 writes in {folder!r}: "
                       "it has to lie on a disk that all nodes share")
    if problem:
        raise UserError(problem)


# What a forked child (a worker that tokenises) must not keep: a lock would outlive its run.
NOT_FOR_CHILDREN = set()


def begin_child():
    """A child ends with its parent, also where that is killed."""
    for handle in NOT_FOR_CHILDREN:
        os.close(handle)
    tqdm.set_lock(threading.RLock())   # a thread that shows progress may have held the parent's
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:   # Linux
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL)


os.register_at_fork(after_in_child=begin_child)


@contextlib.contextmanager
def stop_signals():
    """SIGTERM, one Ctrl-C, or a terminal that closes: finish the step, save, exit 0. A second one
    stops at once. Yields stop_requests: the times at which a stop was asked for, empty so far."""
    stop_requests = []
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def request_stop(number, frame):
        if stop_requests and number != signal.SIGHUP:   # a closing terminal may send two
            # torchrun repeats what the terminal has sent to everybody already
            repeated = under_torchrun and time.time() - stop_requests[-1] < 2
            if not repeated:
                raise KeyboardInterrupt
        stop_requests.append(time.time())

    handlers_before = {number: signal.signal(number, request_stop)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield stop_requests
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lasting_output():
    with contextlib.redirect_stdout(LastingOutput(sys.stdout)):
        with contextlib.redirect_stderr(LastingOutput(sys.stderr)):
            yield


class LastingOutput:
    """stdout or stderr, whose reader may go away (`| head`, a closed terminal) or whose disk may
    fill: what nobody can read any more is dropped, and the run goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.unless_gone(self.stream.write, text)

    def flush(self):
        self.unless_gone(self.stream.flush)

    def unless_gone(self, do, *args):
        try:
            return do(*args)
        except (OSError, ValueError):   # ValueError: closed
            with contextlib.suppress(OSError, ValueError):   # Python flushes once more at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# --------------------------------------------------------------------------------------------------
# Losses: alpha * CE + (1 - alpha) * T^2 * KL over chunks of tokens, gradient formed on the spot.
# Hands on distillation_loss, Head and SparseTarget. Change the objective in chunk_terms: it takes
# the logits of a chunk and hands on two losses a token and the gradient of the logits.

# bytes of both heads' outputs at once; the fp32 terms come on top; see chunk_size
LOGITS_BUDGET = 512 * 2**20
COMPILED_VOCAB = 16384   # from this size on the compiler's 10 seconds are worth it


class Head(NamedTuple):
    """Hidden states -> logits: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""
    weight: torch.Tensor                   # [V, D]
    bias: Optional[torch.Tensor] = None    # [V]
    scale: float = 1.0                     # Cohere, Granite
    softcap: Optional[float] = None        # Gemma


class SparseTarget(NamedTuple):
    """A teacher from the cache: some tokens with their probabilities, all others as one bucket."""
    ids: torch.Tensor       # [N, K] distinct in a row; repeated where rest is 0: their probs add up
    probs: torch.Tensor     # [N, K]
    rest: torch.Tensor      # [N] mass not listed: 0 for method sample, complete in expectation
    entropy: torch.Tensor   # [N] of the distribution that KL is measured to


def as_head(head):
    """Head or nn.Linear, with or without scale and softcap -> Head."""
    scale = getattr(head, "scale", None)
    return Head(
        weight=head.weight, bias=getattr(head, "bias", None), scale=float(scale or 1.0),
        softcap=getattr(head, "softcap", None))


def scale_and_softcap(raw, scale, softcap):
    """-> logits in fp32 (a bf16 log-softmax has a floor of 0.02 nats), d logits / d raw.

    raw: what a head's matmul and bias give.
    """
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, scale
    bent = torch.tanh(logits / softcap)
    return bent * softcap, (1 - bent * bent) * scale


def exponentials(x, temperature=1.0):
    """A softmax before its division -> z = (x - max) / T, exp(z), and the sum of that [C, 1]."""
    z = x - x.amax(-1, keepdim=True)
    del x   # where it was the caller's temporary, its [C, V] is free again
    if temperature != 1:
        z = z.div_(temperature)
    exp_z = z.exp()
    return z, exp_z, exp_z.sum(-1, keepdim=True)


# A chunk's two losses and their gradient. With p the student's softmax at temperature T and q the
# teacher's, both [C, V], and u = logits / T:
#
#     d loss / d logits = p_weight_from_ce * p - alpha * onehot(label) + kl_weight * d KL / d u
#
# At T 1, and without a teacher, p is CE's softmax too, and p_weight_from_ce is alpha. Otherwise it
# is 0, and chunk_terms adds CE's own softmax, as it always does the onehot. What is left is formed
# by one *_terms function a kind of target: -> KL [C] without its T^2, gradient [C, V]. They
# overwrite the [C, V] tensors given to them: without a compiler each line over [C, V] is a pass
# through memory; with one they fuse into five passes.


def forward_kl_terms(p, exp_y, teacher_total, difference, shift, p_weight_from_ce, kl_weight):
    """KL(q || p) = sum of q * log(q / p): q = exp_y / teacher_total, log = difference + shift."""
    weighted = difference.mul_(exp_y).sum(-1, keepdim=True)
    kl = (weighted / teacher_total + shift)[:, 0]
    # gradient: (p_weight_from_ce + kl_weight) * p - kl_weight * q
    q = exp_y.div_(teacher_total)
    if p_weight_from_ce + kl_weight == 1:   # always so at T 1
        grad = p.sub_(q, alpha=kl_weight)
    elif p_weight_from_ce == 0:             # always so at other T; exactly 0 where p equals q
        grad = p.sub_(q).mul_(kl_weight)
    else:                                   # for a fork that weighs otherwise
        grad = p.mul_(p_weight_from_ce + kl_weight).sub_(q, alpha=kl_weight)
    return kl, grad


def reverse_kl_terms(p, log_q_over_p, p_weight_from_ce, kl_weight):
    """KL(p || q) = sum of p * log(p / q)."""
    pull = -log_q_over_p   # log(p / q)
    kl = torch.linalg.vecdot(p, pull)
    # gradient: p * (kl_weight * (log(p / q) - KL) + p_weight_from_ce)
    grad = p.mul_(pull.sub_(kl[:, None]).mul_(kl_weight).add_(p_weight_from_ce))
    return kl, grad


def jsd_terms(p, log_q_over_p, q, p_weight_from_ce, kl_weight):
    """(KL(p || m) + KL(q || m)) / 2 with their middle m = (p + q) / 2."""
    # r = log(q / p):  -log(p / m) = log((1 + exp(r)) / 2) = max(r, 0) + log(1 + expm1(-|r|) / 2)
    pull = log_q_over_p.clamp_min(0) + (torch.expm1(-log_q_over_p.abs()) / 2).log1p_()
    pull = pull.mul_(-0.5)                             # log(p / m) / 2
    teacher_pull = log_q_over_p.mul_(0.5).add_(pull)   # log(q / m) / 2
    teacher_part = torch.linalg.vecdot(q, teacher_pull)
    student_part = torch.linalg.vecdot(p, pull)
    # gradient: p * (kl_weight * (log(p / m) / 2 - student_part) + p_weight_from_ce)
    grad = p.mul_(pull.sub_(student_part[:, None]).mul_(kl_weight).add_(p_weight_from_ce))
    return student_part + teacher_part, grad


def sparse_kl_terms(z, p, total, target, p_weight_from_ce, kl_weight):
    """Forward KL to a SparseTarget, the rest of the mass as one bucket on both sides.

    KL = -sum of q * log(p) - rest * log(rest_p) - entropy, with sums over the listed entries and
    rest_p = 1 - sum of p.
    """
    q = target.probs                                             # [C, K], as all that is listed
    listed_logp = z.gather(-1, target.ids) - total.log()
    # 1 - sum of the listed would cancel: below 1e-7 nothing of the rest would be left
    listed_p = p.gather(-1, target.ids)
    unlisted_p = p.scatter_(-1, target.ids, 0.0)                 # [C, V]
    rest_p = unlisted_p.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
    kl = -(q * listed_logp).sum(-1) - target.entropy
    kl = kl - torch.where(target.rest > 0, target.rest * rest_p.log(), 0.0)
    # d KL / d u = p - q on listed entries, keep * p on the others. Method sample: rest 0, keep 1,
    # and ids that repeat add up their q.
    keep = (1 - target.rest / rest_p)[:, None]
    grad = unlisted_p.mul_(kl_weight * keep + p_weight_from_ce)
    grad.scatter_(-1, target.ids, (kl_weight + p_weight_from_ce) * listed_p)
    grad.scatter_add_(-1, target.ids, -kl_weight * q)
    return kl, grad


def logit_mse_terms(p, error, p_weight_from_ce, kl_weight):
    """In KL's place the mean square of error [C, V], student minus teacher logits. T is 1."""
    mse = error.square().mean(-1)
    # gradient: p_weight_from_ce * p + kl_weight * 2 * error / V
    grad = p.mul_(p_weight_from_ce).add_(error, alpha=2 * kl_weight / error.shape[-1])
    return mse, grad


def chunk_terms(student_CV, labels_C, target, *, alpha, temperature, divergence, student_scaling,
                teacher_scaling):
    """-> ce [C], kl [C] with its T^2, and d (alpha * ce + (1 - alpha) * kl) / d student_CV.

    student_CV: head outputs. target: the teacher's head outputs [C, V], a SparseTarget, or None for
    labels only. student_scaling, teacher_scaling: (scale, softcap) of their heads.
    """
    logits, slope = scale_and_softcap(student_CV, *student_scaling)
    z, exp_z, total = exponentials(logits)   # log p = z - log(total)
    labels_C1 = labels_C[:, None]
    ce = (total.log() - z.gather(-1, labels_C1))[:, 0]
    kl_weight = (1 - alpha) * temperature    # the term's T^2 times the 1/T of its softmax
    p_weight_from_ce = alpha
    ce_grad = None
    if temperature != 1 and target is not None:   # then KL has a softmax of its own
        p_weight_from_ce = 0.0
        ce_grad = exp_z.mul_(alpha / total)   # alpha * softmax, in the memory of exp_z
        z, exp_z, total = exponentials(z, temperature)
    p = exp_z.div_(total)   # in its memory; total stays, for log p = z - log(total)

    if target is None:
        kl = torch.zeros_like(ce)
        grad = p.mul_(p_weight_from_ce)
    elif isinstance(target, SparseTarget):
        kl, grad = sparse_kl_terms(z, p, total, target, p_weight_from_ce, kl_weight)
    elif divergence == "mse":   # a choice of the block-wise head phase
        error = logits - scale_and_softcap(target, *teacher_scaling)[0]
        kl, grad = logit_mse_terms(p, error, p_weight_from_ce, kl_weight)
    else:
        y, exp_y, teacher_total = exponentials(
            scale_and_softcap(target, *teacher_scaling)[0], temperature)
        difference = y.sub_(z)                  # log(q / p) = difference + shift, [C, V] + [C, 1]:
        shift = (total / teacher_total).log()   # exactly 0 where student and teacher agree
        if divergence == "forward":
            kl, grad = forward_kl_terms(
                p, exp_y, teacher_total, difference, shift, p_weight_from_ce, kl_weight)
        elif divergence == "reverse":
            kl, grad = reverse_kl_terms(p, difference.add_(shift), p_weight_from_ce, kl_weight)
        elif divergence == "jsd":
            kl, grad = jsd_terms(
                p, difference.add_(shift), exp_y.div_(teacher_total), p_weight_from_ce, kl_weight)
        else:
            raise ValueError(f"no terms for divergence {divergence!r}")

    if ce_grad is not None:
        grad.add_(ce_grad)
    if torch.compiler.is_compiling():   # a scatter would force a [C, V] in fp32 and three kernels
        is_label_CV = torch.arange(grad.shape[-1], device=grad.device) == labels_C1
        grad = torch.where(is_label_CV, grad - alpha, grad)
    else:
        grad.scatter_add_(-1, labels_C1, grad.new_full(labels_C1.shape, -alpha))
    if student_scaling != (1.0, None):
        grad = grad * slope
    return ce, kl * temperature ** 2, grad.to(student_CV.dtype)


class ChunkKernel:
    """chunk_terms with its options fixed, compiled where that pays and can be done.

    It takes about 10 s once, and a C++ compiler on CPU, Triton on CUDA.
    """

    def __init__(self, worth_compiling, **options):
        self.eager = functools.partial(chunk_terms, **options)
        self.compiled = torch.compile(self.eager) if worth_compiling else None

    def __call__(self, student_CV, labels_C, target):
        if self.compiled is None:
            return self.run_eagerly(student_CV, labels_C, target)
        inputs = [student_CV, labels_C]
        if isinstance(target, SparseTarget):
            inputs.extend(target)
        elif target is not None:
            inputs.append(target)
        for tensor in inputs:   # one compilation for any number of tokens
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self.compiled(student_CV, labels_C, target)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            print0(f"loss: no working compiler ({type(e).__name__}), its element-wise part runs "
                   "eagerly")
            self.compiled = None
            return self.run_eagerly(student_CV, labels_C, target)

    def run_eagerly(self, student_CV, labels_C, target):
        """No more tokens at once than fit the smaller budget: a chunk made for compiled code would
        hold 14 GB of [C, V] terms on a large GPU. The gradient takes the logits' place."""
        tokens = len(student_CV)
        at_once = tokens_within(LOGITS_BUDGET, student_CV.element_size(), student_CV.shape[1])
        if tokens <= at_once:
            return self.eager(student_CV, labels_C, target)
        losses = []
        for start in range(0, tokens, at_once):
            part = slice(start, start + at_once)
            ce, kl, student_CV[part] = self.eager(
                student_CV[part], labels_C[part], select_tokens(target, part))
            losses.append(torch.stack([ce, kl]))
        ce, kl = torch.cat(losses, 1)
        return ce, kl, student_CV


@functools.cache
def chunk_kernel(worth_compiling, **options):
    """One ChunkKernel for each set of options, so that nothing is compiled twice."""
    return ChunkKernel(worth_compiling, **options)


def select_tokens(teacher, where):
    """The same tokens of (hidden states, head), of logits, of a SparseTarget or of None."""
    if teacher is None:
        return None
    if isinstance(teacher, SparseTarget):
        return SparseTarget(*(tensor[where] for tensor in teacher))
    if isinstance(teacher, torch.Tensor):
        return teacher[where]
    hidden_ND, head = teacher
    return hidden_ND[where], head


def tokens_within(budget, itemsize, vocab):
    return max(1, budget // (2 * max(itemsize, 2) * vocab))


def chunk_size(device, itemsize, vocab):
    """How many tokens are projected to the vocabulary at once. On a GPU, where the loss is
    compiled, up to four times as many: every chunk passes the head's whole gradient through memory
    once. A share of the card, not of what is free: another chunk rounds otherwise, and a resumed
    run is to be the same."""
    budget = LOGITS_BUDGET
    if device.type == "cuda" and vocab >= COMPILED_VOCAB:
        share = torch.cuda.get_device_properties(device).total_memory // 40
        budget = min(max(share, budget), 4 * budget)
    return tokens_within(budget, itemsize, vocab)


def add_product(total, a, b, first):
    """total += a @ b, summed in the type of total; the first overwrites it, unread."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=float(not first))
    elif total.device.type == "cuda":   # 16-bit factors, fp32 sums, no temporary between
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=float(not first), out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


class FusedDistillation(torch.autograd.Function):
    """Sums over tokens of loss, ce and kl, their gradients formed chunk by chunk.

    All matmuls, forward and backward, happen in forward; backward only scales. From id `vocab` on
    the head is padding: not used, gradient 0.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, teacher, student_scaling, alpha,
                temperature, divergence, chunk, vocab):
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if need_bias else None
        grad_weight = None
        if need_weight:
            grad_weight = torch.empty_like(weight_VD, dtype=exact)
            unwritten = vocab if len(hidden_ND) else 0
            grad_weight[unwritten:] = 0
        weight_VD = weight_VD[:vocab]
        if bias_V is not None:
            bias_V = bias_V[:vocab]

        dense_teacher = teacher is not None and not isinstance(teacher, SparseTarget)
        teacher_scaling = (1.0, None)
        if dense_teacher:
            teacher_scaling = (teacher[1].scale, teacher[1].softcap)
        kernel = chunk_kernel(
            vocab >= COMPILED_VOCAB, alpha=alpha, temperature=temperature,
            divergence=divergence, student_scaling=student_scaling,
            teacher_scaling=teacher_scaling)
        ce = hidden_ND.new_zeros((), dtype=torch.float64)
        kl = hidden_ND.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD = hidden_ND[part]
            target = select_tokens(teacher, part)
            if dense_teacher:
                teacher_h_CD, head = target
                target = nn.functional.linear(teacher_h_CD, head.weight, head.bias)
            ce_C, kl_C, grad_CV = kernel(
                nn.functional.linear(h_CD, weight_VD, bias_V), labels_N[part], target)
            del target   # [C, V]: its memory is wanted below
            ce = ce + ce_C.sum(dtype=torch.float64)
            kl = kl + kl_C.sum(dtype=torch.float64)
            if need_bias:
                grad_bias[:vocab] += grad_CV.sum(0, dtype=exact)
            if need_hidden:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[part])
            if need_weight:
                add_product(grad_weight[:vocab], grad_CV.T, h_CD, first=start == 0)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden_ND.dtype
        ce = ce.to(exact)
        kl = kl.to(exact)
        ctx.mark_non_differentiable(ce, kl)
        return alpha * ce + (1 - alpha) * kl, ce, kl

    @staticmethod
    def backward(ctx, grad_loss, *_):
        scaled = []
        for grad in ctx.grads:
            if grad is not None:
                into = torch.empty_like(grad, dtype=ctx.dtype)
                grad = torch.mul(grad, grad_loss, out=into)
            scaled.append(grad)
        return (*scaled, *[None] * 8)   # forward's other arguments have none


def distillation_loss(student_hidden, student_head, labels, teacher, *, alpha, temperature,
                      divergence="forward", denominator=None, chunk=None, vocabulary=None):
    """-> loss, ce, kl: loss = alpha * ce + (1 - alpha) * kl, kl with its T^2, each / denominator.

    student_hidden [N, D]. student_head: Head or nn.Linear. labels [N], -100 is not counted: where
    they lie on the host, dropping those positions does not make the GPU wait. teacher:
    (teacher_hidden [N, Dt], teacher_head), a SparseTarget, or None at alpha 1. denominator: by
    default the tokens counted here. chunk: tokens projected to the vocabulary at once. vocabulary:
    from this id on both heads are padding, which is cut.
    """
    student = as_head(student_head)
    if not torch.is_grad_enabled():   # needs_input_grad does not know of no_grad
        student_hidden = student_hidden.detach()
        bias = None if student.bias is None else student.bias.detach()
        student = student._replace(weight=student.weight.detach(), bias=bias)
    counted = (labels != -100).nonzero()[:, 0]
    if denominator is None:
        denominator = max(len(counted), 1)
    if len(counted) < len(labels):   # collate has dropped them already, others may not
        labels = labels[counted]
        counted = counted.to(student_hidden.device)
        student_hidden = student_hidden[counted]
        teacher = select_tokens(teacher, counted)
    labels = labels.to(student_hidden.device, non_blocking=True)
    vocab = len(student.weight)
    if vocabulary is not None:
        vocab = min(vocab, vocabulary)
    if teacher is not None and not isinstance(teacher, SparseTarget):
        teacher_hidden, teacher_head = teacher
        teacher_head = as_head(teacher_head)
        vocab = min(vocab, len(teacher_head.weight))
        bias = None if teacher_head.bias is None else teacher_head.bias[:vocab]
        teacher = (teacher_hidden,
                   teacher_head._replace(weight=teacher_head.weight[:vocab], bias=bias))
    if alpha >= 1:
        teacher = None
    if chunk is None:
        chunk = chunk_size(
            student_hidden.device, student_hidden.element_size(), len(student.weight))
    loss, ce, kl = FusedDistillation.apply(
        student_hidden, student.weight, student.bias, labels, teacher,
        (student.scale, student.softcap), alpha, temperature, divergence, chunk, vocab)
    return loss / denominator, ce / denominator, kl / denominator


# --------------------------------------------------------------------------------------------------
# Data: any dataset -> rows of token ids (and which of them are targets) -> global batches that do
# not depend on the number of ranks. Hands on load_data (rows that can be indexed) and Batch.


# ---- tokenizers


def load_tokenizer(cfg, *candidates):
    """--tokenizer, else that of the first candidate that has one, else None."""
    if cfg.tokenizer:
        names = [cfg.tokenizer]
    else:
        names = [name for name in candidates if may_have_tokenizer(name)]
    if not names:
        return None
    name = names[0]
    missing = name.startswith(("/", ".", "~")) and not os.path.exists(name)
    problem = ": no such path" if missing else " that can be read"
    with reading(f"{name!r} has no tokenizer{problem}",
                 "; is the name right? --tokenizer names another"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)


def may_have_tokenizer(name):
    """layers:N and a config .json have none, a directory may; of a hub name nobody knows yet.
    demo: no name was given, see run_demo."""
    if name == "demo" or name.startswith("layers:") or name.endswith(".json"):
        return False
    if os.path.isdir(name):
        return bool(glob.glob(os.path.join(glob.escape(name), "tokenizer*")))
    return True


def compare_tokenizers(student, teacher, student_name, teacher_name):
    """By what they encode, not by size: an id that both use must mean the same token."""
    student_tokens = tokens_by_id(student)
    teacher_tokens = tokens_by_id(teacher)
    shared_ids = sorted(student_tokens.keys() & teacher_tokens.keys())
    clashing = [i for i in shared_ids if student_tokens[i] != teacher_tokens[i]]
    probe = "def f(x):\n    return x+1  # Größe 12345 résumé 日本"
    if clashing:
        i = clashing[0]
        problem = f"token {i} is {student_tokens[i]!r} in one, {teacher_tokens[i]!r} in the other"
    elif len(shared_ids) < 2 or student(probe)["input_ids"] != teacher(probe)["input_ids"]:
        problem = "they share a vocabulary but cut text differently"
    else:
        return
    raise UserError(
        f"student {student_name!r} and teacher {teacher_name!r} have different tokenizers: "
        f"{problem}. Distil within one, or train on text that the teacher wrote (--mode generate, "
        "then --alpha 1)")


def tokens_by_id(tokenizer):
    return {i: token for token, i in tokenizer.get_vocab().items()}


# ---- datasets: raw rows of text or conversations


def load_data(cfg, tokenizer):
    """-> (train rows, eval rows), which can be indexed. A row is {"input_ids": [...], "targets":
    which of them are, or None where all are}; one that holds several documents (packing documents)
    has "starts" too: where each begins."""
    if tokenizer is None:
        asked = f"student {cfg.student!r}"
        if cfg.teacher != "demo":   # the default: none was named
            asked += f" and teacher {cfg.teacher!r}"
        way_out = "use --tokenizer" + model_inside(cfg.student) + model_inside(cfg.teacher)
        raise UserError(f"no tokenizer comes with {asked}; {way_out}")
    if cfg.streaming:   # optional: streaming
        return load_stream(cfg, tokenizer)
    with progress(f"reading dataset {cfg.dataset}"), node_first():
        train_raw, eval_raw = load_splits(cfg)
    if cfg.mode == "eval" and eval_raw is not None:   # optional: eval
        eval_rows = tokenize(cfg, eval_raw, tokenizer, "eval")
        return train_raw, take_first(eval_rows, cfg.eval_samples)   # nobody reads the former
    train_rows = tokenize(cfg, train_raw, tokenizer, "train")
    if eval_raw is not None:
        eval_rows = tokenize(cfg, eval_raw, tokenizer, "eval")
    elif len(train_rows) > 1:   # one long document: its last twentieth
        eval_size = max(1, len(train_rows) // 20)
        eval_rows = train_rows.skip(len(train_rows) - eval_size)
        train_rows = train_rows.take(len(train_rows) - eval_size)
    else:
        raise UserError(f"dataset {cfg.dataset!r} is a single sequence of {cfg.seq_len} tokens or "
                        "less; nothing is left to evaluate on: bring more text or lower --seq_len")
    if RANK == 0:   # it reads all rows once: not on every rank
        print0(describe_rows(train_rows, cfg.batch_size, cfg.seed))
    return train_rows, take_first(eval_rows, cfg.eval_samples)


def take_first(rows, count):
    return rows.take(min(count, len(rows)))   # a dataset refuses to take more than it has


def load_splits(cfg):
    """-> raw rows of train, raw rows of eval: their own split, else a slice of train; None where
    train is a single row, one long document."""
    train_raw, eval_raw = read_splits(cfg)
    check_columns(train_raw, cfg.dataset, cfg.text_column)
    if cfg.max_samples is not None:
        train_raw = take_first(train_raw, cfg.max_samples)
    if eval_raw is not None:
        return train_raw, eval_raw
    if cfg.mode == "eval" and cfg.eval_split == cfg.train_split:   # optional: eval
        return train_raw, train_raw   # asked for by its name: nothing is held out of it
    if len(train_raw) == 1:
        return train_raw, None
    with reading_rows(cfg.dataset, f"dataset {cfg.dataset!r}: a row cannot be read"):
        return hold_out_rows(train_raw, cfg.eval_samples, cfg.text_column)


def read_splits(cfg, streaming=False):
    """-> raw rows of train, raw rows of eval; None where a slice of train has to do."""
    train_raw = load_raw(cfg.dataset, cfg.dataset_config, cfg.train_split, streaming)
    eval_raw = None
    if cfg.eval_split != cfg.train_split:
        eval_raw = load_raw(cfg.dataset, cfg.dataset_config, cfg.eval_split, streaming)
    missing = None
    if train_raw is None:
        missing = cfg.train_split
    elif eval_raw is None and cfg.eval_split not in (cfg.train_split, Config.eval_split):
        missing = cfg.eval_split   # asked for by name; where only the default is absent, no harm
    if missing is not None:
        raise UserError(f"dataset {cfg.dataset!r} has no split {missing!r}; name another, or leave "
                        "eval_split out to hold out a slice of train")
    return train_raw, eval_raw


FILE_KINDS = {   # ending -> the reader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
SAVED_BY_DATASETS = ("dataset_dict.json", "state.json")   # one of these is in a save_to_disk folder


def load_raw(dataset, dataset_config, split, streaming=False):
    """One split of a file, a save_to_disk folder or a hub dataset; None where it has no such."""
    kind = FILE_KINDS.get(os.path.splitext(dataset)[1].lower())
    what = f"{kind} file"
    if not kind:
        what = "hub dataset (no network, no access?), data file or save_to_disk directory"
    with reading_rows(dataset, f"dataset {dataset!r} could not be read as {what}"):
        if kind:
            return load_file(dataset, kind, split, streaming)
        if any(os.path.exists(os.path.join(dataset, name)) for name in SAVED_BY_DATASETS):
            return load_saved(dataset, split, streaming)
        if os.path.isdir(dataset) and dataset != glob.escape(dataset):
            raise UserError(f"dataset folder {dataset!r}: [, * and ? are read as a pattern of "
                            "names; rename it")
        try:
            return datasets.load_dataset(dataset, dataset_config, split=split, streaming=streaming)
        except ValueError as e:
            if "Unknown split" in str(e) or "Bad split" in str(e):
                return None
            raise


def load_file(path, kind, split, streaming):
    if not os.path.isfile(path):
        problem = "is no file" if os.path.exists(path) else "does not exist"
        raise UserError(f"dataset file {path!r} {problem}")
    if os.path.getsize(path) == 0:
        raise UserError(f"dataset file {path!r} is empty")
    if kind == "json" and holds_no_object(path):   # a file of nulls kills the process in pyarrow
        raise UserError(f"dataset file {path!r} holds no object with columns")
    if split != "train":   # a file has no other
        return None
    options = {}
    if kind == "text":
        options["sample_by"] = "paragraph"   # a blank line ends a document
    return datasets.load_dataset(   # which takes a name for a pattern
        kind, data_files={"train": glob.escape(path)}, split="train", streaming=streaming,
        **options)


def holds_no_object(path):
    with open(path, "rb") as f:
        return not any(b"{" in block for block in iter(functools.partial(f.read, 2**20), b""))


def load_saved(folder, split, streaming):
    saved = datasets.load_from_disk(folder)
    if isinstance(saved, dict):
        saved = saved.get(split)
    elif split != "train":   # saved without splits
        saved = None
    if streaming and saved is not None:
        return saved.to_iterable_dataset()
    return saved


def check_columns(rows, dataset, text_column):
    """There must be a column of text, or those of a conversation."""
    with reading_rows(dataset, f"dataset {dataset!r}: a row cannot be read"):
        first_rows = list(itertools.islice(rows, 100))
    if not first_rows:
        raise UserError(f"dataset {dataset!r} has no rows")
    columns = {name for row in first_rows for name in row}
    if columns & {text_column, *CONVERSATION_COLUMNS}:
        return
    if any(set(pair) <= columns for pair in CONVERSATIONS):
        return
    raise UserError(
        f"dataset {dataset!r} has no text in column {text_column!r} and no known conversation "
        f"columns; it has {', '.join(first_rows[0])}: name one with --text_column")


def hold_out_rows(raw, eval_samples, text_column):
    """-> the rows to train on, and evenly spaced ones to evaluate on: a twentieth, or about
    eval_samples where that is less, but at least one."""
    wanted = min(eval_samples, max(1, len(raw) // 20))
    gap = max(2, len(raw) // wanted)
    for first in reversed(range(gap)):   # gap - 1, unless bad rows stand there
        held_out = raw.select(range(first, len(raw), gap))
        if any(is_usable(row, text_column) for row in held_out):
            break
    # an array: select makes a fingerprint of it, a generator has none that another run finds again
    kept = np.flatnonzero(np.arange(len(raw)) % gap != first)
    return raw.select(kept), held_out


def is_usable(row, text_column):
    """Whether it holds something to learn, as far as that can be seen before it is tokens."""
    try:
        conversation = conversation_of(row)
    except BadRow:
        return False
    if conversation:
        return any(message["role"] == "assistant" for message in conversation)
    return isinstance(row.get(text_column), str) and row[text_column] != ""


def stdlib_sources():   # optional: demo generate
    """(name, text) of every module of Python's own library, tests left out."""
    root = sysconfig.get_paths()["stdlib"]
    skipped = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages",
               "dist-packages", "turtledemo", "pydoc_data"}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped)   # in place: what os.walk goes on with
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                with open(path, encoding="utf-8", errors="ignore") as f:
                    yield os.path.relpath(path, root), f.read()


# ---- rows of token ids


ROWS_AT_ONCE = 1000   # texts among them are packed together, however many processes share the work


def tokenize(cfg, raw, tokenizer, split):
    """-> a memory-mapped dataset of token rows, kept in the datasets cache: the same rows are not
    tokenised twice. Beside it stands what was dropped."""
    if split == "eval" and cfg.packing == "documents":
        # a held-out document stands alone: the figures are those of packing rows, the intervals of
        # mode eval over documents
        cfg = dataclasses.replace(cfg, packing="rows")
    features = TOKEN_FEATURES
    if cfg.packing == "documents":
        features = PACKED_FEATURES
    fingerprint = fingerprint_rows(raw, tokenizer, cfg.text_column, cfg.seq_len, cfg.packing)
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "simple_distill")
    os.makedirs(folder, exist_ok=True)
    dropped_path = os.path.join(folder, f"{fingerprint}.dropped")
    batches = datasets.Dataset.from_dict({"start": list(range(0, len(raw), ROWS_AT_ONCE))})
    workers = min(cfg.num_proc or 1, len(batches))
    # a tokenizer's own threads do not survive the fork of a worker
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers <= 1 else "false"
    bad_row = f"dataset {cfg.dataset!r}, {split}: a row cannot be turned into tokens"
    # only a process that works alone can say how far it is
    total = len(raw) if workers <= 1 else None
    showing = progress(f"tokenising {split}", total, unit="row")
    with reading_rows(cfg.dataset, bad_row), showing as bar, node_first():
        rows = batches.map(
            functools.partial(
                encode_batch, raw=raw, dataset=cfg.dataset, dropped_path=dropped_path,
                encode_here=make_row_encoder(cfg, tokenizer),
                update=bar.update if total else None),
            batched=True, batch_size=1, remove_columns=["start"],
            num_proc=workers if workers > 1 else None, new_fingerprint=fingerprint,
            cache_file_name=os.path.join(folder, f"{fingerprint}.arrow"), features=features)
        dropped = read_dropped(dropped_path)
    reasons = in_words(dropped, lambda i: place_of(cfg.dataset, source_row(raw, i)))
    if len(rows) == 0:
        raise UserError(f"dataset {cfg.dataset!r}, {split}: none of {len(raw)} rows has a target "
                        f"token: {reasons or 'they are one token long'}")
    if dropped:
        print0(f"{split}: dropped {count_dropped(dropped)} of {len(raw)} rows: {reasons}")
    return rows.with_format("numpy")


TOKEN_FEATURES = datasets.Features(input_ids=datasets.List(datasets.Value("int32")),
                                   targets=datasets.List(datasets.Value("bool")))
PACKED_FEATURES = datasets.Features(**TOKEN_FEATURES, starts=datasets.List(datasets.Value("int32")))


def encode_batch(batch, raw, dataset, encode_here, dropped_path, update):
    """The rows of raw from one start on -> token rows, as columns. update: told how many."""
    start, = batch["start"]
    rows = rows_from_columns(raw[start:start + ROWS_AT_ONCE])
    warn_of_long_rows(rows)
    columns, dropped = encode_here(
        rows, lambda i: place_of(dataset, source_row(raw, start + i)))
    if dropped:   # each process has a file of its own, or their lines would mix
        append_jsonl(f"{dropped_path}-{os.getpid()}.jsonl", {"start": start, "dropped": dropped})
    if update is not None:
        update(len(rows))
    return columns


def read_dropped(path):
    """What encode_batch wrote, in whatever processes -> {why: [how many, which first]}"""
    by_start = {}   # a batch that was begun twice stands there twice
    for file in glob.glob(f"{glob.escape(path)}-*.jsonl"):
        by_start |= {entry["start"]: entry["dropped"] for entry in read_jsonl(file)}
    dropped = {}
    for start in sorted(by_start):
        add_dropped(dropped, start, by_start[start])
    return dropped


def add_dropped(dropped, start, some):
    """[(i, why)] of rows from start on into {why: [how many, which first]}"""
    for i, why in some:
        count_and_first = dropped.setdefault(why, [0, start + i])
        count_and_first[0] += 1


def count_dropped(dropped):
    return sum(count for count, _ in dropped.values())


def in_words(dropped, place):
    return "; ".join(f"{count} with {why} (first {place(row)})"
                     for why, (count, row) in dropped.items())


def source_row(raw, i):
    """Which row of its source the row i of a selection is."""
    if raw._indices is None:
        return i
    return raw._indices.column(0)[i].as_py()


def place_of(dataset, row):
    """In words: the line of a .jsonl file, else the number of the row, from 1 on."""
    if dataset.lower().endswith(".jsonl") and os.path.isfile(dataset):
        with open(dataset, "rb") as file:
            lines = (number for number, line in enumerate(file, 1) if line.strip())
            line = next(itertools.islice(lines, row, None), None)
        if line is not None:
            return f"{dataset!r}, line {line}"
    return f"{dataset!r}, row {row + 1}"


def warn_of_long_rows(rows):
    longest = max((len(value) for row in rows for value in row.values() if isinstance(value, str)),
                  default=0)
    if longest > 10_000_000:
        print0(f"a row of {longest:,} characters; a tokenizer takes a second or more for a million")


def fingerprint_rows(raw, tokenizer, text_column, seq_len, packing):
    """Of all that shapes token rows: the tokenizer as it would be saved, and the code. A fork that
    edits `encode_rows`, or anything it calls, gets what it wrote and not what an older version left
    in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {}
        for path in sorted(glob.glob(os.path.join(folder, "**"), recursive=True)):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    name = os.path.relpath(path, folder)
                    saved[name] = hashlib.sha256(file.read()).hexdigest()
    return digest(raw._fingerprint, str(raw.features), saved, code_of(encode_rows),
                  ROWS_AT_ONCE, text_column, seq_len, packing)


def code_of(function):
    """{name: source or value} of a function of this file and of all of this file that it uses."""
    code = {}
    found = [function.__name__]
    while found:
        name = found.pop()
        thing = inspect.unwrap(globals().get(name))
        if name in code or name.startswith("__"):   # __name__ depends on how the file is run
            continue
        if getattr(thing, "__module__", None) == __name__:
            code[name] = inspect.getsource(thing)
            found += names_in(getattr(thing, "__code__", None))
        elif isinstance(thing, (str, int, float, tuple, list, dict)):   # a table
            code[name] = repr(thing)
    return code


def names_in(code):
    """Globals that compiled code mentions, also within its inner functions."""
    if not inspect.iscode(code):
        return []
    inner = [name for constant in code.co_consts for name in names_in(constant)]
    return [*code.co_names, *inner]


def rows_digest(rows):
    """16 characters that differ when any token row does, wherever the rows came from; None of a
    stream, whose rows nobody has seen."""
    if not isinstance(rows, datasets.Dataset):
        return None
    content = hashlib.sha256()
    columns = [name for name in PACKED_FEATURES if name in rows.column_names]
    for table in rows.with_format("arrow").iter(1000):
        for name in columns:
            lists = table[name].combine_chunks()
            # as numbers: a bitmap is padded with bits of the rows that follow
            content.update(lists.value_lengths().fill_null(-1).to_numpy())
            content.update(lists.flatten().cast("int32").to_numpy())
    return content.hexdigest()[:16]


def describe_rows(rows, batch_size, seed):
    """How much there is to train on, and how much of a batch is padding."""
    lengths = []     # of the rows
    documents = []   # of each document in rows of several
    targets = 0
    for table in rows.with_format("arrow").iter(1000):
        row_lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy()
        lengths.append(row_lengths)
        targets += count_targets(table["targets"].combine_chunks(), row_lengths)
        if "starts" in rows.column_names:
            documents.append(document_lengths(table["starts"].combine_chunks(), row_lengths))
    lengths = np.concatenate(lengths)
    share = share_of_padding(lengths, batch_size, seed)
    padding = f"{share:.1%} of {batch_size} rows together is padding"
    what = f"{len(lengths):,} rows"
    if documents:
        documents = np.concatenate(documents)
        share = share_of_padding(documents, batch_size, seed)
        padding += f", with one document a row {share:.1%}"
        what = f"{len(documents):,} documents in {what}"
    return f"train: {what}, {lengths.sum():,} tokens, {targets:,} targets; {padding}"


def count_targets(lists, row_lengths):
    """Of token rows, as lists of arrow. The first token of a row is predicted from nothing."""
    is_target = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = lists.value_lengths().fill_null(0).to_numpy()   # null: all are targets
    firsts = np.cumsum(lengths) - lengths
    counted = is_target.sum() - is_target[firsts[lengths > 0]].sum()
    return int(counted) + int((row_lengths[lengths == 0] - 1).sum())


def document_lengths(lists, row_lengths):
    """lists: where documents begin in each row, as lists of arrow."""
    row_ends = np.cumsum(row_lengths)
    row_begins = np.repeat(row_ends - row_lengths, lists.value_lengths().to_numpy())
    return np.diff(row_begins + lists.flatten().to_numpy(), append=row_ends[-1])


def share_of_padding(lengths, batch_size, seed):
    """Of rows of these lengths in batches of an epoch, each as wide as its longest."""
    lengths = lengths[shuffled(len(lengths), seed, 0).numpy()]
    begins = np.arange(0, len(lengths), batch_size)
    rows_in_batch = np.diff(begins, append=len(lengths))
    return 1 - lengths.sum() / (np.maximum.reduceat(lengths, begins) * rows_in_batch).sum()


def make_encoder(cfg, tokenizer):
    """-> a function of the columns alone."""
    return functools.partial(encode, tokenizer=tokenizer, text_column=cfg.text_column,
                             seq_len=cfg.seq_len, packing=cfg.packing)


def encode(columns, tokenizer, text_column, seq_len, packing):
    """Raw rows -> token rows, both as columns: {"input_ids": [...], "targets": [...]}."""
    rows = rows_from_columns(columns)

    def place(i):
        return f"a row that begins {str(rows[i])[:80]!r}"

    columns, _ = encode_rows(rows, place, tokenizer, text_column, seq_len, packing)
    return columns


def make_row_encoder(cfg, tokenizer):
    return functools.partial(encode_rows, tokenizer=tokenizer, text_column=cfg.text_column,
                             seq_len=cfg.seq_len, packing=cfg.packing)


def encode_rows(rows, place, tokenizer, text_column, seq_len, packing):
    """Raw rows -> token rows as columns, and [(i, why)] of those that were dropped. First come the
    conversations, one a row, then the texts, joined in blocks or each in rows of its own; packing
    documents puts them together. place(i): in words, where row i is."""
    conversations = {}
    texts = []
    dropped = []
    for i, row in enumerate(rows):
        try:
            conversation = conversation_of(row)
        except BadRow as e:
            dropped.append((i, str(e)))
            continue
        if conversation:
            conversations[i] = conversation
        elif isinstance(row.get(text_column), str):
            if row[text_column]:   # else it is read as well, and says nothing
                texts.append(row[text_column])
        else:
            dropped.append((i, "no text and no conversation"))
    if packing == "blocks" and conversations:
        raise UserError(f"{place(min(conversations))}: a conversation; blocks are of plain text: "
                        "use --packing rows or documents")
    columns = encode_texts(texts, tokenizer, seq_len, join=packing in ("auto", "blocks"))
    talks = encode_conversations(conversations, tokenizer, seq_len, place)
    kept = {"input_ids": [], "targets": []}
    for i, (ids, targets) in talks.items():
        if any(targets[1:]):   # the first token has nothing to be predicted from
            kept["input_ids"].append(ids)
            kept["targets"].append(targets)
        else:
            dropped.append((i, f"no target within seq_len {seq_len}"))
    columns = {name: kept[name] + columns[name] for name in kept}
    if packing == "documents":
        columns = pack_documents(rows_from_columns(columns), seq_len)
    return columns, sorted(dropped)


def rows_from_columns(columns):
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]"""
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def encode_texts(texts, tokenizer, seq_len, join):
    """Each ends with EOS. Joined, or each by itself, they are cut into blocks of seq_len; the last
    block may be shorter. A BOS begins each block, not each text: so it is predicted nowhere. Where
    there is none, the blocks of a long text begin with the last token of the one before, or their
    first would be predicted nowhere."""
    eos = tokenizer.eos_token_id
    bos = bos_of(tokenizer)
    encoded = patiently(tokenizer, texts, verbose=False)["input_ids"] if texts else []
    documents = []
    for ids in encoded:
        if bos is not None:   # the tokenizer's, and what stands written out in a text
            ids = [i for i in ids[1:] if i != bos or i == eos]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        documents.append(ids)
    if join:
        documents = [list(itertools.chain(*documents))]
    begin = [] if bos is None else [bos]
    room = seq_len - len(begin)
    overlap = 0 if begin or join else 1
    blocks = []
    for ids in documents:
        for i in range(0, len(ids) - overlap, room - overlap):
            block = begin + ids[i:i + room]
            if len(block) > 1:   # one token would predict nothing
                blocks.append(block)
    return {"input_ids": blocks, "targets": [None] * len(blocks)}


def pack_documents(documents, seq_len):
    """Token rows of a document each -> rows of several, as columns. `starts`: where in its row each
    begins. The first token of a document is no target: it would be predicted from another."""
    packed = {"input_ids": [], "targets": [], "starts": []}
    lengths = [len(document["input_ids"]) for document in documents]
    for members in fit_into_rows(lengths, seq_len):
        ids = []
        targets = []
        starts = []
        for i in members:
            starts.append(len(ids))
            ids += documents[i]["input_ids"]
            is_target = documents[i]["targets"] or [True] * lengths[i]   # None: all
            targets += [False, *is_target[1:]]
        packed["input_ids"].append(ids)
        packed["targets"].append(targets)
        packed["starts"].append(starts)
    return packed


def fit_into_rows(lengths, seq_len):
    """-> the numbers of the documents in each row: the longest first, each where it leaves the
    least room. Rows, and what is in them, stand in the order of the documents."""
    rows = []
    free = []   # (room left, row), in rising order
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], 0))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def bos_of(tokenizer):
    """The id that this tokenizer puts before every text; None where it puts none. A model that
    learned with it (Gemma, Llama) is lost without."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return bos
    return None


def patiently(tokenizer, texts, **options):
    """tokenizer(texts), from which nothing gets through to Python, no signal either, for as long as
    it takes: a minute for one text of 60 MB. So that works in a thread while this one waits."""
    if sum(map(len, texts)) < 1_000_000:
        return tokenizer(texts, **options)
    done = queue.Queue()

    def work():
        try:
            done.put((tokenizer(texts, **options), None))
        except BaseException as e:
            done.put((None, e))

    threading.Thread(target=work, daemon=True).start()   # a second Ctrl-C does not wait for it
    encoded, error = done.get()
    if error is not None:
        raise error
    return encoded


def encode_conversations(conversations, tokenizer, seq_len, place):
    """{i: messages} -> {i: (ids, targets)}, cut at seq_len. Targets are the assistant's tokens with
    their end marks."""
    if not conversations:
        return {}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special_tokens = {*tokenizer.all_special_tokens, *added}
    end_marks = sorted(special_tokens, key=len, reverse=True)   # one may begin with another
    write = functools.partial(
        tokenizer.apply_chat_template, tokenize=False,
        chat_template=tokenizer.chat_template or PLAIN_TEMPLATE)
    prompt = generation_prompt(write)
    rendered = {}
    for i, messages in conversations.items():
        with reading(f"{place(i)}: the chat template does not take it"):
            rendered[i] = render(messages, write, prompt, end_marks)
    encode_some = functools.partial(
        patiently, tokenizer,
        add_special_tokens=not tokenizer.chat_template,   # a template has written them already
        return_offsets_mapping=True, verbose=False)
    enough = max(1_000_000, 64 * seq_len)   # characters, of a text that is cut at seq_len anyway
    encoded = encode_some([text[:enough] for text, _ in rendered.values()])
    talks = {}
    for k, (i, (text, spans)) in enumerate(rendered.items()):
        ids, offsets = encoded["input_ids"][k], encoded["offset_mapping"][k]
        if len(text) > enough and len(ids) <= 2 * seq_len:   # runs of blanks, which are one token
            whole = encode_some([text])
            ids, offsets = whole["input_ids"][0], whole["offset_mapping"][0]
        talks[i] = (ids[:seq_len], find_targets(offsets[:seq_len], spans))
    return talks


def find_targets(offsets, spans):
    """Which tokens, by the characters that each covers, overlap one of the spans."""
    return [any(first < end and start < last for start, end in spans) for first, last in offsets]


# The text of a conversation where a tokenizer has no chat template of its own.
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.content }}"
                  "{{ eos_token or '\n' if m.role == 'assistant' else '\n' }}{% endfor %}")


def generation_prompt(write):
    """What a template writes to have the assistant speak next; "" where it has nothing of the kind.
    """
    question = [{"role": "user", "content": "x"}]
    try:
        text = write(question)
        asking = write(question, add_generation_prompt=True)
    except Exception:   # not without a system role, or so
        return ""
    return asking[common_length(text, asking):]


def render(messages, write, prompt, end_marks):
    """-> a conversation as text, and the spans of characters that the assistant's messages add to
    it, with the end mark that follows: all that comes after the prompt, be it an answer, a thought
    or a call of a tool."""
    text = write(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = find_turn(i, messages, text, write)
        if start == end and not message["content"]:   # nor anything else that the template knows
            continue
        # what every message of the assistant begins with, such as <think>, is no difference
        last_end = spans[-1][1] if spans else 0
        header = text.rfind(prompt, last_end, start)
        if prompt and header >= 0:
            start = header + len(prompt)
        following = text[end:end + 1000].lstrip()
        for mark in end_marks:
            if following.startswith(mark):
                end = text.index(mark, end) + len(mark)
                break
        spans.append((start, end))
    return text, spans


def find_turn(i, messages, text, write):
    """-> the span of text that differs when it is written again with another message i: so any
    template will do, also one that changes earlier turns. What follows a call of a tool may make no
    sense after another message; there the text that ends with the call is compared, unless it has
    become another one in the whole."""
    other = {"role": "assistant", "content": "\ue000"}   # a character that nobody uses
    if "tool_calls" in messages[i]:
        until_here = write(messages[:i + 1])
        start, end = difference(until_here, write([*messages[:i], other]))
        if text.startswith(until_here[:end]):
            return start, end
    return difference(text, write([*messages[:i], other, *messages[i + 1:]]))


def difference(text, other):
    """-> the span of text between what both begin with and what both end with."""
    start = common_length(text, other)
    same_end = common_length(text[start:][::-1], other[start:][::-1])
    return start, len(text) - same_end


def common_length(a, b):
    """How many characters both begin with. By halves: a loop over characters takes seconds for some
    MB."""
    known = 0
    possible = min(len(a), len(b))
    while known < possible:
        half = (known + possible + 1) // 2
        if a[known:half] == b[known:half]:
            known = half
        else:
            possible = half - 1
    return known


class BadRow(Exception):
    """A row that cannot be read as what it seems to be: it is dropped, and counted by this."""


# Columns that hold a conversation each, as a list of messages.
CONVERSATION_COLUMNS = ("messages", "conversations")
# Pairs of columns that are a conversation: what the user says, what the assistant answers, each a
# string or a list of messages. To read another format, add its pair here; anything else that is
# not of this kind belongs into conversation_of.
CONVERSATIONS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),   # Alpaca's; what a row has as `input` follows the instruction
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def conversation_of(row):
    """A raw row -> [{"role": ..., "content": ..., ...}, ...], or None for plain text."""
    for column in CONVERSATION_COLUMNS:
        if isinstance(row.get(column), list) and row[column]:
            return as_messages("", row[column])
    for user_column, assistant_column in CONVERSATIONS:
        prompt = row.get(user_column)
        answer = row.get(assistant_column)
        if not isinstance(prompt, (str, list)) or not isinstance(answer, (str, list)):
            continue
        if user_column == "instruction" and row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
        return as_messages("user", prompt) + as_messages("assistant", answer)
    return None


def as_messages(role, content):
    if isinstance(content, list):   # of messages
        return [message_of(turn) for turn in content]
    return [{"role": role, "content": content}]


def message_of(turn):
    """With a role, and a content that is text. ShareGPT has `from` and `value` for them."""
    if not isinstance(turn, dict):
        raise BadRow("a message that is no object")
    message = without_nulls(turn)
    if "content" not in message and "value" in message:
        sender = message.get("from")
        role = SHAREGPT_ROLES.get(str(sender), message.get("role", sender))
        message = {"role": role, "content": message["value"]}
    if not isinstance(message.get("role"), str):
        raise BadRow("a message without a role")
    if set(message) == {"role"}:
        raise BadRow("a message without content")
    calls = message.pop("tool_calls", None)
    if calls and not isinstance(calls, list):
        raise BadRow("tool_calls that are no list")
    if calls:   # some templates ask only whether there is such a list
        message["tool_calls"] = [call_of(call) for call in calls]
    return {**message, "content": text_of(message.get("content", ""))}


def call_of(call):
    """The arguments of a tool as the object that templates expect; APIs give them as its JSON."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise BadRow("a call of a tool that is no object")
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"])
    return call


def without_nulls(value):
    """A table gives every message the fields of all others, as nulls; templates take those for
    something."""
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    if isinstance(value, list):
        return [without_nulls(x) for x in value]
    return value


def text_of(content):
    """The content of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"a content that is {type(content).__name__}, not text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRow(f"a content part of type {str(kind)[:40]!r}")
        texts.append(part["text"])
    return "".join(texts)


# ---- batches


@dataclass
class Batch:
    """A micro-batch of one rank: B sequences, T positions, N counted tokens. Only host code looks
    at labels, so that nothing waits for the GPU to count them."""
    input_ids: torch.Tensor   # [B, T], padded on the right: under a causal mask no token sees it
    positions: torch.Tensor   # [N] of the counted tokens in the flattened batch
    labels: torch.Tensor      # [N] their next tokens, on the host
    real: torch.Tensor        # those of all tokens but padding: where block-wise compares states
    sparse: Any = None        # SparseTarget of the counted tokens, when training from a cache
    by_student: bool = False  # whether it wrote them: no labels then   # optional: on_policy
    # [B, T] where rows hold several documents: they restart at each, which keeps attention within
    # it (see hidden_states). None: 0, 1, 2, ...
    position_ids: Any = None


def collate(rows):
    """Token rows -> Batch. The label of a position is the *next* token; shifting comes before
    masking: a position counts where its next token is a target, not where it is one itself."""
    is_stand_in = not rows
    if is_stand_in:   # nothing left for this rank, which takes part all the same: padding alone
        rows = [{"input_ids": [0, 0], "targets": [False, False]}]
    width = max(len(row["input_ids"]) for row in rows)
    input_ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT = torch.full((len(rows), width), -100)
    is_real_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
        next_ids = ids[1:]
        if row.get("targets") is not None:
            next_is_target = torch.as_tensor(row["targets"])[1:]
            next_ids = torch.where(next_is_target, next_ids, -100)
        input_ids_BT[i, :len(ids)] = ids
        labels_BT[i, :len(next_ids)] = next_ids   # the last position has no next token
        is_real_BT[i, :len(ids)] = not is_stand_in
    position_ids = None
    if any("starts" in row for row in rows):
        position_ids = to_device(torch.stack([positions_in(row, width) for row in rows]))
    labels = labels_BT.flatten()
    positions = (labels != -100).nonzero()[:, 0]
    return Batch(
        input_ids=to_device(input_ids_BT), positions=to_device(positions),
        labels=pin(labels[positions]),
        real=to_device(is_real_BT.flatten().nonzero()[:, 0]),
        sparse=collate_sparse(rows), position_ids=position_ids)


def positions_in(row, width):
    """-> [width]: each token's position in its document; padding is one more document."""
    starts = [*row.get("starts", [0]), len(row["input_ids"])]
    begin = torch.zeros(width + 1, dtype=torch.long)
    begin[starts] = torch.as_tensor(starts)
    return (torch.arange(width + 1) - begin.cummax(0)[0])[:width]


def collate_sparse(rows):
    """The rows' SparseTargets as one, in the order of the batch's labels; None online."""
    sparse = [row["sparse"] for row in rows if "sparse" in row]   # tuples of arrays
    if not sparse:
        return None
    fields = [torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*sparse, strict=True)]
    return SparseTarget(*[to_device(tensor) for tensor in fields])


def pin(tensor):
    """Into page-locked memory: from there a copy to the GPU does not make the host wait."""
    return tensor.pin_memory() if CUDA else tensor


def to_device(tensor):
    return pin(tensor).to(DEVICE, non_blocking=True)


def shuffled(count, seed, part):
    """The numbers below count, in an order that depends on nothing but seed and part: no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + part)
    return torch.randperm(count, generator=generator)


def indexed_batches(rows, seed, global_batch, step):
    """Endless (row numbers of a global batch, None) from `step` on. The position *is* the step: a
    resume needs no other state, and has nothing to replay."""
    steps_per_epoch = math.ceil(len(rows) / global_batch)
    first = step % steps_per_epoch * global_batch
    for epoch in itertools.count(step // steps_per_epoch):
        order = shuffled(len(rows), seed, epoch)
        for start in range(first, len(rows), global_batch):
            yield order[start:start + global_batch].tolist(), None
        first = 0   # only the first epoch may begin in its middle


def micro_batches(global_batches, rows, micro_steps, batch_size):
    """Global batches -> (this rank's micro-batches, position after the step). Rank r takes every
    WORLD-th sequence. A global batch holds row numbers; where rows is None, the rows themselves."""
    for batch, position in global_batches:
        mine = batch[RANK::WORLD]
        if rows is not None:
            mine = [rows[i] for i in mine]
        starts = range(0, micro_steps * batch_size, batch_size)
        yield [collate(mine[start:start + batch_size]) for start in starts], position


def prefetch(endless, depth=2):
    """Run a generator in a thread, `depth` items ahead: the next batch is ready while this one
    computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(next, endless) for _ in range(depth))
        while True:
            ahead.append(pool.submit(next, endless))
            yield ahead.popleft().result()


# ---- where in a file an error is


@contextlib.contextmanager
def reading_rows(dataset, what):
    """reading(what), or the line of a file where that is what is wrong."""
    with reading(what):
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            explain_bad_file(dataset)
            if isinstance(e, datasets.exceptions.DatasetGenerationError):   # says no reason itself
                raise (e.__cause__ or e) from None
            raise


def explain_bad_file(path):
    """A reader's message does not say where: name the first bad line. Returns if there is none."""
    if not os.path.isfile(path) or not path.lower().endswith((".jsonl", ".json", ".csv", ".txt")):
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").strip()
                if text and path.endswith(".jsonl") and not isinstance(json.loads(text), dict):
                    raise ValueError("not an object with columns")
            except (ValueError, RecursionError) as e:   # UnicodeDecodeError is the former
                raise UserError(f"dataset file {path!r}, line {number}: {one_line(e, 100)}; mend "
                                "or delete that line") from e


# --------------------------------------------------------------------------------------------------
# Models and FSDP: every rank begins with shapes alone and receives its shard of what rank 0 reads.
# Hands on student and teacher as ShardedRoot, and what a model says of a batch.


class ShardedRoot(nn.Module):
    """The outermost FSDP unit around a model. FSDP gathers a unit's parameters in its forward and
    leaves each rank a shard outside of it. Decoder layers are units of their own; embeddings, final
    norm and head belong to this one, and the loss needs the head without the model's own forward,
    which would make all logits at once. So whatever touches weights is a function(model, *args)
    that this forward runs: root(function, *args). Calling root.model itself meets shards."""

    def __init__(self, model, build_stitches=None):
        super().__init__()
        self.model = model
        # modules that block-wise trains beside the model: kept in checkpoints, not in final/
        self.stitches = nn.ModuleDict()
        if build_stitches is not None:
            self.stitches = build_stitches(model)

    def forward(self, function, *args):
        return function(self.model, *args)

    def release(self):
        """Back to shards after forwards without a backward, which does it otherwise: until then
        the next forward would not see what was written into the shards, such as a checkpoint."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def compute_dtype(cfg):
    """auto: bf16 on GPUs that have it, fp32 elsewhere (CPUs without AMX emulate bf16 slowly)."""
    if cfg.dtype != "auto":
        named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return named[cfg.dtype]
    if CUDA and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


# ---- reading: whatever is wrong with a model's config, shapes or weights becomes one `error:`

# above these the meta model alone would be made for hours
LARGEST_SIZES = {"num_hidden_layers": 10_000, "hidden_size": 10**6, "vocab_size": 10**8}
# lists in a config that hold one item a layer
ONE_A_LAYER = (
    "activation_sparsity_pattern", "attention_layers", "indexer_types", "intermediate_size",
    "layer_rope_theta", "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer")


def model_config(name, cfg, role):
    """Of a decoder-only model. role: what messages call it, student or teacher."""
    where = where_it_was_sought(name)
    with reading(f"{role} {name!r}: no model config could be read {where}"):
        with node_first():
            config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
        is_decoder_only = not getattr(config, "is_encoder_decoder", False) and (
            type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map"))
        shape = config.get_text_config()
        for size, most in LARGEST_SIZES.items():
            value = getattr(shape, size)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{size} is {value!r}")
    if not is_decoder_only:
        raise UserError(f"{role} {name!r} is a {config.model_type} model, not a decoder-only "
                        "language model")
    return config


def where_it_was_sought(name):
    if name.endswith(".json"):
        return "as a file"
    if os.path.isdir(name):
        return "in that directory" + model_inside(name)
    return ("as a local directory (there is none) or on the hub (no network, no access, or "
            "HF_HUB_OFFLINE is set)")


def model_inside(name):
    """What to say of a run's folder that was named in the place of its model."""
    inside = os.path.join(name or "", "final")
    return f" (a model is in {inside!r})" if os.path.isfile(f"{inside}/config.json") else ""


def read_model(name, config, cfg, role, dtype, kept_layers=None):
    """A whole model on the host, memory-mapped until it is cast; a config alone (.json) makes
    random weights. kept_layers: the decoder layers that stay, by number."""
    options = dict(dtype=dtype, trust_remote_code=cfg.trust_remote_code)
    with reading(f"{role} {name!r} could not be loaded"):
        if name.endswith(".json"):
            torch.manual_seed(cfg.seed)
            return AutoModelForCausalLM.from_config(config, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **options)
    if info["missing_keys"]:   # transformers would fill them with random numbers
        raise UserError(f"{role} {name!r} lacks weights, {sorted(info['missing_keys'])[0]} among "
                        "them; is it whole?")
    if kept_layers is not None:
        path, layers = layers_of(model)
        model.set_submodule(path, nn.ModuleList(layers[i] for i in kept_layers))
    return model


def layers_of(model):
    """(path, ModuleList) of the decoder layers: the outermost list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise UserError(f"{type(model).__name__} keeps its {depth} decoder layers in no ModuleList; "
                    "choose another model")


def cut_layers(teacher_config, student, teacher):
    """student layers:N of a teacher -> the student's config, and the numbers of the N evenly spaced
    layers that it takes, the first and the last among them."""
    depth = teacher_config.get_text_config().num_hidden_layers
    wanted = student.removeprefix("layers:")
    if teacher_config.get_text_config() is not teacher_config:
        raise UserError(f"{student} cannot be cut from {teacher!r}: its text model is part of a "
                        "larger one; bring a checkpoint of the text model alone")
    if not wanted.isdigit() or not 1 <= int(wanted) <= depth:
        raise UserError(f"student {student!r}: write layers:N with N from 1 to the teacher's "
                        f"{depth}")
    count = int(wanted)
    kept_layers = [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]
    values = teacher_config.to_dict()
    for key in ONE_A_LAYER:
        value = values.get(key)
        if isinstance(value, list) and len(value) == depth:
            values[key] = [value[i] for i in kept_layers]
    depth_key = teacher_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[depth_key] = count
    with reading(f"{student} cannot be cut from {teacher!r}"):
        return type(teacher_config).from_dict(values), kept_layers


def identify_weights(name):
    """-> revision (None: a directory), fingerprint of the weights: about 16,384 bytes of each file,
    since to hash all of a 70B model takes minutes."""
    revision = None
    if os.path.isfile(name):   # a config alone: random weights
        paths = [name]
    else:
        folder = os.path.dirname(transformers.utils.cached_file(name, "config.json"))
        paths = weight_files(folder)
        if not os.path.exists(name):
            revision = os.path.basename(folder)
    checksums = []
    for path in paths:
        content = np.memmap(path, np.uint8, "r")
        every = content.size // 16384 | 1   # odd, so that it meets each byte of a number in turn
        checksums.append(zlib.crc32(content[::every].tobytes()))
    return revision, digest(checksums)


def weight_files(folder):
    """As transformers chooses them."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
        if paths:
            return paths
    return []   # the hub may keep converted weights elsewhere; there the revision tells


# ---- student and teacher, sharded


def load_student(cfg):
    """Weights in fp32, sharded as --fsdp says; layers and head compute in compute_dtype."""
    if cfg.student.startswith("layers:"):
        name = cfg.teacher
        role = "teacher"
        source_config = model_config(name, cfg, role)
        config, kept_layers = cut_layers(source_config, cfg.student, name)
        print0(f"student: layers {', '.join(map(str, kept_layers))} of the "
               f"{source_config.num_hidden_layers} of teacher {name}")
    else:
        name = cfg.student
        role = "student"
        source_config = model_config(name, cfg, role)
        config = source_config
        kept_layers = None
    build_stitches = None
    if cfg.blockwise:   # optional: blockwise
        build_stitches = stitching(cfg, config)
    root = empty_root(name, config, cfg, role, torch.float32, build_stitches)
    root.train()
    root.requires_grad_()
    if cfg.gradient_checkpointing:
        recompute_activations(root.model)
    if cfg.compile:
        compile_layers(root.model)
    source = None
    if RANK == 0:
        model = read_model(name, source_config, cfg, role, torch.float32, kept_layers)
        source = ShardedRoot(model, build_stitches)
    # full: gathered layers are dropped after the forward and gathered anew in the backward
    drop_layers = cfg.fsdp in REDUCE_EACH
    shard(root, plan_mesh(cfg.fsdp), compute_dtype(cfg), drop_layers, cfg.cpu_offload)
    load_weights(root, source, cfg.cpu_offload)
    settle_types(root)
    with reading(f"{role} {name!r} does not run"):
        fix_rope(root.model, cfg.seq_len)
    return root


def load_teacher(cfg, role="teacher"):
    """Frozen, its weights in the type that it computes in."""
    config = model_config(cfg.teacher, cfg, role)
    dtype = compute_dtype(cfg)
    if dtype == torch.float16 and config.dtype != torch.float16:
        dtype = torch.float32   # models trained in bf16 overflow in fp16
    root = empty_root(cfg.teacher, config, cfg, role, dtype)
    root.eval()
    root.requires_grad_(False)
    if cfg.compile:
        compile_layers(root.model)
    source = None
    if RANK == 0:
        source = ShardedRoot(read_model(cfg.teacher, config, cfg, role, dtype))
    if cfg.cpu_offload or (cfg.shard_teacher and WORLD > 1):
        shard(root, (WORLD,), dtype, drop_layers=True, cpu_offload=cfg.cpu_offload)
    load_weights(root, source, cfg.cpu_offload)
    with reading(f"teacher {cfg.teacher!r} does not run"):
        fix_rope(root.model, cfg.seq_len)
    return root


def empty_root(name, config, cfg, role, dtype, build_stitches=None):
    """Shapes without memory; refused where they cannot hold seq_len positions."""
    with reading(f"{role} {name!r}: its config makes no model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=cfg.trust_remote_code)
        positions = position_limit(model)
        for parameter, tensor in model.named_parameters():
            if not tensor.numel():   # some size in the config is 0
                raise ValueError(f"{parameter} would be of shape {list(tensor.shape)}")
    if cfg.seq_len > positions:
        raise UserError(f"{role} {name!r} ({type(model).__name__}) has {positions} positions, "
                        f"seq_len is {cfg.seq_len}; use --seq_len {positions} or less")
    if model.can_generate():   # else its config's alone would stand in final/
        with reading(f"{role} {name!r}: its generation_config.json"), node_first():
            model.generation_config.eos_token_id = read_ends(name, config)
    with torch.device("meta"):
        return ShardedRoot(model, build_stitches)


def read_ends(name, config):
    """Ids that end a text: of generation_config.json, else of the model's config."""
    if not name.endswith(".json"):   # which is a config alone
        with contextlib.suppress(OSError):   # there is none
            return transformers.GenerationConfig.from_pretrained(name).eos_token_id
    return config.get_text_config().eos_token_id


def position_limit(model):
    """How many positions a model keeps in a table, learned or fixed: it has no more of them.
    Infinite where they are computed, as by RoPE and ALiBi."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_table = any(word in name for word in ("position", "pos_e", "wpe"))
        # OPT's begins with two rows of no use
        if is_table and tensor.ndim == 2 and tensor.shape[0] in (limit, limit + 2):
            return limit
    return math.inf


def fix_rope(model, seq_len):
    """Some models change their rotary frequencies with the longest row of a batch (dynamic,
    longrope): what a row gives would depend on what it is padded to. From here on theirs are those
    of seq_len, whatever the batch."""
    positions_1T = torch.arange(seq_len, device=DEVICE)[None]
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)   # a string, or {type of layer: string}
        if isinstance(kinds, str) and depends_on_length(kinds):
            module(positions_1T.float(), positions_1T)
            module.rope_type = "default"
        elif isinstance(kinds, dict) and any(map(depends_on_length, kinds.values())):
            for layer_type in kinds:
                module(positions_1T.float(), positions_1T, layer_type)
            module.rope_type = dict.fromkeys(kinds, "default")


def depends_on_length(rope_type):
    return rope_type == "longrope" or "dynamic" in rope_type


def recompute_activations(model):
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute activations: add "
                        "--gradient_checkpointing false")
    if hasattr(model, "activation_checkpointing_enable"):   # its name in newer transformers
        enable = model.activation_checkpointing_enable
    else:
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers makes the embeddings ask for gradients here; frozen layers would be recomputed
    model.disable_input_require_grads()


def compile_layers(model):
    # a layer that recomputes and has nothing below it to train is refused by this pass (torch 2.13)
    if hasattr(torch._functorch.config, "remat_using_tags_for_fwd_loss_bwd_graph"):
        torch._functorch.config.remat_using_tags_for_fwd_loss_bwd_graph = False
    # by default after 8 kinds of layer, input and mode the next ones run eagerly: sliding and full
    # attention of student and teacher, training and not, are as many
    torch._dynamo.config.recompile_limit = 64
    for layer in layers_of(model)[1]:
        layer.compile()


# These keep nothing whole between micro-steps: each one's gradients are reduced to shards at once.
# The others add them up where they are and reduce them once a step: less traffic, more memory.
REDUCE_EACH = ("full_shard", "hybrid_shard")


def plan_mesh(fsdp):
    """(ranks to shard over), or (copies, ranks to shard each over)."""
    if fsdp == "hybrid_shard":   # a copy a node
        return WORLD // LOCAL_WORLD, LOCAL_WORLD
    if fsdp == "no_shard":
        return WORLD, 1
    return (WORLD,)


def shard(root, mesh_shape, dtype, drop_layers, cpu_offload):
    """Make FSDP units of the decoder layers, and of the root for what is left. They compute in
    dtype and reduce gradients in fp32. The root stays gathered after a forward: the backward begins
    with it, and the loss uses a teacher's head outside of the teacher's forward."""
    names = ("shard",) if len(mesh_shape) == 1 else ("replicate", "shard")
    options = dict(
        mesh=init_device_mesh(DEVICE.type, mesh_shape, mesh_dim_names=names),
        mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    if cpu_offload and CUDA:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in layers_of(root.model)[1]:
        fully_shard(layer, reshard_after_forward=drop_layers, **options)
    fully_shard(root, reshard_after_forward=False, **options)


@torch.no_grad()
def settle_types(root):
    """At its first forward FSDP notes once for all in which type a unit reduces gradients: that of
    the parameters which can be trained by then. A block that is frozen at that moment, and trained
    later, would have none. So an empty forward comes first, while all of them can be."""
    root(lambda model: None)
    root.release()


@torch.no_grad()
def load_weights(root, source, cpu_offload):
    """The tensors of rank 0's source into everybody's shards, one at a time: no other rank ever
    holds a whole model. source is None on the other ranks."""
    all_sum(0)   # rank 0 may have read for an hour, which no GPU waits for
    root.to_empty(device="cpu" if cpu_offload else DEVICE)
    for buffer in root.buffers():   # FSDP's offloading leaves them where they are
        buffer.data = buffer.data.to(DEVICE)
    if not any(isinstance(p, DTensor) for p in root.parameters()):
        root.model.tie_weights()   # to_empty broke the ties; FSDP keeps them by itself
    source_tensors = {}
    if source is not None:
        # tied ones under both names: a head that block-wise unties begins as a copy of the
        # embeddings
        source_tensors.update(source.named_parameters(remove_duplicate=False))
        source_tensors.update(source.named_buffers())
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if source is None:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        elif name in source_tensors and source_tensors[name].shape == tensor.shape:
            whole = source_tensors[name].to(DEVICE, tensor.dtype)
        else:   # as a mixture's dense and sparse layers
            raise UserError(f"layers:N cannot be cut from {type(root.model).__name__}: its layers "
                            "differ by number")
        copy_from_rank0(tensor, whole)


def copy_from_rank0(tensor, whole):
    """Fill a tensor, of which this rank may hold a shard, from rank 0's whole one. Every rank
    brings a whole of the right shape; what is in the others' does not matter."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(
            whole.to(DEVICE, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(whole.to_local())
    else:
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def full_tensor(tensor):
    """All of a tensor of which this rank may hold a shard; every rank has to ask."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to(DEVICE)


FINAL_MARK = ".simple_distill.json"   # in final/: which files of it are ours, and of which step


def save_model(root, tokenizer, path, dtype, card, mark):
    """Gathered on rank 0 tensor by tensor, saved by transformers, renamed when whole -> None, or
    what went wrong, on every rank. card: its README.md."""
    full = {}
    kept_on = "cpu" if RANK == 0 else "meta"   # the other ranks drop each tensor at once
    for name, tensor in [*root.model.named_parameters(), *root.model.named_buffers()]:
        kept_as = dtype if tensor.is_floating_point() else tensor.dtype
        full[name] = full_tensor(tensor).to(kept_on, kept_as, copy=True)
    problem = None
    if RANK == 0:
        aside = path + ".tmp"
        remove_saved(aside)   # what a killed run left
        try:
            os.mkdir(aside)
            write_json({"files": []}, os.path.join(aside, FINAL_MARK))
            model = with_tensors(root.model, full)
            model.to(dtype).save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            with open(os.path.join(aside, "README.md"), "w", encoding="utf-8") as f:
                f.write(card)
            write_json(mark | {"files": os.listdir(aside)}, os.path.join(aside, FINAL_MARK))
            remove_saved(path)
            os.rename(aside, path)
        except Exception as e:   # a full disk comes as SafetensorError, or as others
            problem = one_line(e)
            remove_saved(aside)
    return from_rank0(problem)


def with_tensors(model, full):
    """A model of the same kind and config on these tensors, without initialising any."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(full, assign=True, strict=False)   # not strict: tied heads are not listed
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy


def remove_saved(path):
    """A model that save_model wrote, or began to write; nothing else."""
    if not os.path.exists(os.path.join(path, FINAL_MARK)):
        return
    files = read_final_mark(path).get("files")
    others = set(os.listdir(path)) - {FINAL_MARK, *files}
    if files and others:
        raise FileExistsError(f"{path} holds {sorted(others)[0]}, which is not ours")
    shutil.rmtree(path)


def read_final_mark(path):
    """{} where there is none."""
    try:
        with open(os.path.join(path, FINAL_MARK), encoding="utf-8") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


@torch.no_grad()
def count_not_finite(root):
    """Of all weights, those that are infinite or not a number."""
    here = [local_tensor(p).isfinite().logical_not().sum() for p in root.parameters()]
    return int(all_sum(int(torch.stack(here).sum()))[0])


def local_tensor(tensor):
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- what a model says of a batch: functions that run inside a root


@contextlib.contextmanager
def known_documents(position_ids_BT=None):
    """Around a forward without attention mask and cache. There transformers looks at the positions,
    its own or ours, whether a row holds several documents: a number that the host needs at once, so
    that it waits for the GPU twice a micro-step. We know the answer. Without position_ids a row is
    one document; with them (they restart at each) the attention stays inside of documents.
    -> what a model is called with besides."""
    positions = {}
    if position_ids_BT is not None:
        positions["position_ids"] = position_ids_BT
        # it stays: layers that recompute look it up in the backward, after this
        if DEVICE.type == "cpu":
            AttentionInterface.register("sdpa", attend_by_document)
    own = getattr(masking_utils, "find_packed_sequence_indices", None)

    def number_documents(positions_BT):
        """-> [B, T], for each token the number of its document; None: one a row."""
        if position_ids_BT is not None:
            before_B1 = positions_BT[:, :1] - 1
            steps_BT = torch.diff(positions_BT, prepend=before_B1, dim=-1)
            return (steps_BT != 1).cumsum(-1)
        # positions that a model counts are one row for all; what it makes of each row's tokens
        # (code of its own) has to be looked at
        if len(positions_BT) > 1 and positions_BT.stride(0) > 0:
            return own(positions_BT)
        return None

    if own is None:   # another version asks in another way: it may wait, the answer is its own
        yield positions
        return
    masking_utils.find_packed_sequence_indices = number_documents
    try:
        yield positions
    finally:
        masking_utils.find_packed_sequence_indices = own


transformers_sdpa = AttentionInterface()["sdpa"]


def attend_by_document(module, query, key, value, attention_mask, **options):
    """What transformers_sdpa gives, on a CPU in less time: over a row of several documents it
    computes mostly what the mask then hides. The row is cut wherever the mask (True: seen) lets
    nothing through between what is before and after, so that any mask is kept. Names as the models
    call it; query, key, value [B, heads, T, width]."""
    rows, _, length, _ = query.shape
    one_mask_a_row = (
        attention_mask is not None and attention_mask.dtype == torch.bool
        and attention_mask.shape == (rows, 1, length, length)
        and options.get("position_bias") is None and not torch.compiler.is_compiling())
    if not one_mask_a_row:
        return transformers_sdpa(module, query, key, value, attention_mask, **options)
    cuts_BT = parts_begin(attention_mask[:, 0])
    attended = []
    for row in range(rows):
        parts = []
        begins = torch.nonzero(cuts_BT[row])[:, 0].tolist()
        for begin, end in itertools.pairwise([*begins, length]):
            own = slice(row, row + 1), slice(None), slice(begin, end)
            mask = attention_mask[own][..., begin:end]
            states, _ = transformers_sdpa(module, query[own], key[own], value[own], mask, **options)
            parts.append(states)
        attended.append(torch.cat(parts, dim=1))
    return torch.cat(attended), None


def parts_begin(sees_BTT):
    """sees_BTT: [row, query, key] -> [B, T], True where nothing from here on sees or is seen by
    anything before."""
    here_T = torch.arange(sees_BTT.shape[-1], device=sees_BTT.device)
    linked_BTT = sees_BTT | sees_BTT.mT | (here_T[:, None] == here_T)
    first_linked_BT = linked_BTT.int().argmax(-1)
    first_of_all_from_here_BT = first_linked_BT.flip(-1).cummin(-1).values.flip(-1)
    return first_of_all_from_here_BT == here_T


def hidden_states(model, input_ids_BT, position_ids_BT=None):
    """-> [B, T, D] after the final norm, without the head."""
    with known_documents(position_ids_BT) as positions:
        return model.base_model(input_ids=input_ids_BT, use_cache=False, **positions)[0]


def counted_hidden(model, batch):
    """-> hidden states of the counted tokens [N, D], and the head to apply to them by chunks."""
    hidden_BTD = hidden_states(model, batch.input_ids, batch.position_ids)
    return hidden_BTD.flatten(0, 1)[batch.positions], head_of(model)


def head_of(model):
    """A new way of scaling logits is added here; check_head tells whether one is missing."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)   # Cohere
    if not scale:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)   # Granite
    softcap = getattr(config, "final_logit_softcapping", None)   # Gemma
    return Head(output.weight, getattr(output, "bias", None), float(scale), softcap)


def distil_loss(model, batch, targets, denominator, **objective):
    """Runs inside the student: -> loss, ce, kl. targets: see teacher_targets."""
    hidden_ND, head = counted_hidden(model, batch)
    return distillation_loss(
        hidden_ND, head, batch.labels, targets, denominator=denominator, **objective)


def teacher_targets(teacher):
    """-> a function batch -> what the loss takes from the teacher: hidden states and head of a
    model, a SparseTarget where rows come from a cache, None at alpha 1."""
    def from_batch(batch):
        return batch.sparse   # None too, at alpha 1

    @torch.no_grad()
    def from_model(batch):
        return teacher(counted_hidden, batch)

    return from_batch if teacher is None else from_model


# ---- the loss applies heads itself: is what it computes what the model computes?


def head_error(model, ids_1T):
    """Runs inside a root: how far hidden states times head_of are from the model's own logits, in
    their standard deviations, and how far rounding may bring them."""
    head = head_of(model)
    model_logits = model(input_ids=ids_1T, use_cache=False).logits.float()
    hidden = hidden_states(model, ids_1T)
    raw = nn.functional.linear(hidden, head.weight, head.bias)
    logits, _ = scale_and_softcap(raw, head.scale, head.softcap)
    error = (logits - model_logits).abs().max() / model_logits.std().clamp_min(1e-6)
    allowed = 1e-3 if hidden.dtype == torch.float32 else 0.1
    return error, allowed


def look_ahead(model, ids_1T):
    """Runs inside a root: how far the states of earlier tokens move with the last one, in units of
    how far its own does."""
    other_1T = ids_1T.clone()
    other_1T[0, -1] = ids_1T[0, 0]
    moved_TD = (hidden_states(model, other_1T) - hidden_states(model, ids_1T))[0].abs().float()
    return moved_TD[:-1].max() / moved_TD[-1].max().clamp_min(1e-6)


def vocabulary_of(tokenizer):
    """How many ids it has: what a head has beyond them is padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_head(root, role, name, tokenizer):
    """Refuse a model whose vocabulary is too small, that sees later tokens, or whose logits head_of
    does not reproduce."""
    rows = root.model.config.get_text_config().vocab_size
    biggest = vocabulary_of(tokenizer) - 1
    if biggest >= rows:
        raise UserError(f"the tokenizer has ids up to {biggest}, {role} {name!r} only {rows} rows; "
                        "they do not match")
    ids_1T = torch.arange(8, device=DEVICE)[None] % rows
    was_training = root.training
    root.eval()
    # its first forward: here a config shows that makes a model, but none that runs
    with torch.no_grad(), reading(f"{role} {name!r} does not run"):
        error, allowed = root(head_error, ids_1T)
        seen = root(look_ahead, ids_1T)
    root.train(was_training)
    root.release()
    if not error.isfinite():
        raise UserError(f"{role} {name!r} computes logits that are not finite: damaged, or "
                        "--dtype fp32?")
    if seen > allowed:
        raise UserError(f"{role} {name!r} ({type(root.model).__name__}) is no causal language "
                        "model: its states change with later tokens")
    if error > allowed:
        raise UserError(f"{role} {name!r} ({type(root.model).__name__}): hidden states times head "
                        f"miss its own logits by {error:.2g} of their spread; teach its scaling to "
                        "head_of() in simple_distill.py")


def packing_error(model, packed, alone):
    """Runs inside a root: how far the states of documents that share rows are from those of each
    alone, as a part of these, at the token where that is most; and how far rounding may bring them.
    Two batches of the same tokens in the same order."""
    states = []
    for batch in (packed, alone):
        hidden_BTD = hidden_states(model, batch.input_ids, batch.position_ids)
        states.append(hidden_BTD.flatten(0, 1)[batch.real])
    packed_ND, alone_ND = states
    missed_N = (packed_ND - alone_ND).float().norm(dim=-1)
    error = (missed_N / alone_ND.float().norm(dim=-1).clamp_min(1e-6)).max()
    allowed = 1e-3 if packed_ND.dtype == torch.float32 else 0.1
    return error, allowed


def check_packing(root, role, name):
    """Refuse a model that lets a document see the one before it: by a state that runs on from token
    to token, by attention of its own kind, or by positions that it counts itself."""
    vocab = root.model.config.get_text_config().vocab_size
    lengths = [3, 5, 2, 4, 1]
    documents = []
    for i, length in enumerate(lengths):
        ids = [(sum(lengths[:i]) + k) % vocab for k in range(length)]
        documents.append({"input_ids": ids, "targets": [True] * length})
    rows = rows_from_columns(pack_documents(documents[:2], 8))
    rows += rows_from_columns(pack_documents(documents[2:], 8))   # shorter: with padding
    was_training = root.training
    root.eval()
    what = f"{role} {name!r} ({type(root.model).__name__})"
    way_out = "use --packing rows, or blocks for plain text"
    with torch.no_grad(), reading(f"{what} does not run with documents packed", f"; {way_out}"):
        error, allowed = root(packing_error, collate(rows), collate(documents))
    root.train(was_training)
    root.release()
    if not error <= allowed:
        raise UserError(f"{what} lets packed documents see each other: states are off by "
                        f"{error:.2g} of their size; {way_out}")


# --------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning rate, a schedule without state, and one step that clips,
# unscales and skips without asking the GPU.


def learning_rates(named_parameters, rules, default_multiplier, learning_rate):
    """-> {parameter: rate}. The first rule that matches its first name decides; 0 freezes.

    named_parameters: (name, parameter), a tied parameter under each of its names. rules: as
    parse_multipliers makes them.
    """
    names = {}   # parameter: its first name
    tied = {}    # further name: the first one
    for name, parameter in named_parameters:
        if parameter in names:
            tied[name] = names[parameter]
        else:
            names[parameter] = name
    for pattern, _ in rules:
        if not any(pattern.search(name) for name in names.values()):
            raise UserError(f"lr_multipliers: {pattern.pattern!r} matches "
                            + what_matches_instead(pattern, list(names.values()), tied))
    rates = {}
    for parameter, name in names.items():
        rates[parameter] = learning_rate * multiplier_of(name, rules, default_multiplier)
    if not any(rates.values()):
        raise UserError("every parameter is frozen (learning-rate multiplier 0); "
                        "leave something to train")
    return rates


def multiplier_of(name, rules, default_multiplier):
    for pattern, multiplier in rules:
        if pattern.search(name):
            return multiplier
    return default_multiplier


def what_matches_instead(pattern, names, tied):
    for name, first_name in tied.items():
        if pattern.search(name):
            return f"only {name}, which is tied to {first_name}; write a pattern for that"
    return f"none of the {len(names)} parameters; names look like {names[len(names) // 2]}"


def make_optimizer(parameters, rates, weight_decay):
    """rates: {parameter: learning rate}; 0 or none: no gradient, no state.

    Norms and biases, all that has one dimension, do not decay.
    """
    groups = {}                     # (rate, decays): parameters
    sizes = collections.Counter()   # rate: numbers in its parameters
    for parameter in parameters:
        rate = rates.get(parameter, 0)
        sizes[rate] += parameter.numel()
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            groups.setdefault((rate, parameter.ndim >= 2), []).append(parameter)
    frozen = sizes.pop(0, 0)
    trained = ", ".join(f"{size:,} parameters at {rate:g}" for rate, size in sizes.items())
    print0(f"{frozen:,} frozen; trains {trained}")
    optimizer = torch.optim.AdamW(
        [dict(params=group, lr=rate, weight_decay=weight_decay if decays else 0.0)
         for (rate, decays), group in groups.items()],
        lr=max(sizes), fused=True)
    # the moments from the start: memory is known, and a checkpoint has where to load to
    for group in groups.values():
        for parameter in group:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def scheduler_options(name, given_json, steps):
    """lr_scheduler_kwargs, a JSON object or None -> what scheduler `name` takes besides lengths."""
    given = json.loads(given_json or "{}")
    function = transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION[name]
    takes = set(inspect.signature(function).parameters)
    takes -= {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    alternatives = takes & {"min_lr", "min_lr_rate"}   # one is needed; all others have defaults
    unknown = set(given) - takes
    if unknown or (alternatives and len(alternatives & set(given)) != 1):
        what_it_takes = ", ".join(sorted(takes)) or "nothing"
        if alternatives:
            what_it_takes += ", one of min_lr and min_lr_rate"
        raise UserError(f"lr_scheduler_kwargs gives {', '.join(given) or 'nothing'}; "
                        f"{name} takes {what_it_takes}")
    if name == "warmup_stable_decay":
        return {"num_decay_steps": max(1, steps // 5)} | given
    return given


def check_scheduler(cfg):
    """Before any model is loaded: the length of the run does not matter yet."""
    scheduler_options(cfg.lr_scheduler, cfg.lr_scheduler_kwargs, steps=1)


def make_schedule(cfg, optimizer, steps):
    """-> set_rates(step), which sets every group's rate for that step and returns the largest.

    The rate follows from the step alone: there is nothing to save or to replay.
    """
    options = scheduler_options(cfg.lr_scheduler, cfg.lr_scheduler_kwargs, steps)
    warmup_steps = round(cfg.warmup_ratio * steps)
    try:
        schedule = get_scheduler(cfg.lr_scheduler, optimizer, warmup_steps, steps, options)
        multiplier_at = schedule.lr_lambdas[0]   # one for all groups
        multiplier_at(steps)
    except (TypeError, ValueError) as e:
        raise UserError(f"lr_scheduler {cfg.lr_scheduler}: {one_line(e)}; "
                        "give it with --lr_scheduler_kwargs") from None

    def set_rates(step):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier_at(step)
        return max(group["lr"] for group in optimizer.param_groups)
    return set_rates


def new_scale_state(fp16):
    """Scalars on the device: the fp16 loss scale, good steps in a row, skipped in all, in a row."""
    return {
        "scale": torch.tensor(2.0 ** 14 if fp16 else 1.0, device=DEVICE),
        "good": torch.tensor(0.0, device=DEVICE),
        "skipped": torch.tensor(0.0, device=DEVICE),
        "streak": torch.tensor(0.0, device=DEVICE),
    }


def optimizer_step(optimizer, max_grad_norm, scale_state, fp16, clipped_alone=()):
    """One step on the gradients of scale * loss -> their norm, unscaled, before clipping.

    clipped_alone: [(parameters, max norm), ...], each clipped by itself before the whole is; 0 for
    max_grad_norm clips nothing.

    Fused AdamW divides gradients by its grad_scale and changes nothing where its found_inf is 1, so
    both carry tensors: clipping and unscaling are one division inside its kernel, a step that is
    not finite is skipped there, and the host never waits for a number.
    """
    for parameters, max_norm in clipped_alone:
        loss_scale = scale_state["scale"].item() if fp16 else 1.0
        torch.nn.utils.clip_grad_norm_(parameters, max_norm * loss_scale)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]
                 if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients)) / scale_state["scale"]
    divisor = scale_state["scale"]
    if max_grad_norm:
        divisor = divisor * (norm / max_grad_norm).clamp_min(1.0)
    bad = (~norm.isfinite()).float()   # 1 or 0
    # offloaded parameters live on the host: AdamW itself would not wait for the copies
    optimizer.grad_scale = divisor.to(gradients[0].device)
    optimizer.found_inf = bad.to(gradients[0].device)
    optimizer.step()
    scale_state["skipped"] += bad
    scale_state["streak"].add_(bad).mul_(bad)
    scale_state["good"].add_(1 - bad).mul_(1 - bad)
    if fp16:   # about every 2000 good steps in a row twice the scale, after a bad one half of it
        grow = (scale_state["good"] % 2000 == 1999).float()
        scale_state["scale"].mul_((1 + grow) * (1 - bad / 2))
    return norm


# --------------------------------------------------------------------------------------------------
# Checkpoints: whole or not at all. Tensors go through torch.distributed.checkpoint, so that another
# number of ranks can read them; everything else stands in state.json. Random numbers need no state:
# each step seeds itself.


def tensors_of(root, moments, scale_state):
    """{name: tensor}, flat: the same call names what to save and where to load to. Shards stay
    shards. moments: an optimiser's state, or {} where there is nothing of it to keep."""
    names = {p: name for name, p in root.named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for p, state in moments.items():
        for key, value in state.items():
            tensors[f"{key}.{names[p]}"] = value
    for key, value in scale_state.items():
        tensors[f"health.{key}"] = value
    return tensors


def save_checkpoint(folder, step, tensors, state, keep):
    """-> what went wrong (or None), the checkpoint's digest, on every rank. Written aside, synced,
    renamed; nothing old is deleted before the new one stands. keep: how many stay."""
    aside = os.path.join(folder, f"tmp-{step:08d}")
    problem = None
    if RANK == 0:
        remove_checkpoint(aside)
    all_sum(0)   # nobody writes before that is done
    try:
        dcp.save(tensors, checkpoint_id=aside)   # syncs each file
        files = from_rank0(sorted(os.listdir(aside)))
        state = json.loads(json.dumps(state | {"files": checksums(aside, files)}))
        state["digest"] = digest(state)   # of what a reader will see
        if RANK == 0:
            write_state(aside, state)
            final = os.path.join(folder, f"step-{step:08d}")
            remove_checkpoint(final)
            os.rename(aside, final)
            sync(folder)
            for old in checkpoints_in(folder)[keep:]:
                remove_checkpoint(old)
    except (OSError, dcp.api.CheckpointException) as e:
        problem = one_line(unwrapped(e), 300)
    problem = from_rank0(problem)
    if problem:
        if RANK == 0:
            remove_checkpoint(aside)
        print0(f"WARNING: checkpoint {step} could not be saved ({problem}); the run goes on, older "
               "ones stay")
    return problem, state.get("digest")


def unwrapped(error):
    """What went wrong on the first rank that failed, where it comes wrapped by dcp."""
    if isinstance(error, dcp.api.CheckpointException):
        error, _ = next(iter(error.failures.values()))   # of a rank: its error, its traceback
    return error


def write_state(folder, state):
    """state.json beside the tensors: with a checksum of each file, and one of itself, by which a
    checkpoint is known that the disk has lost or changed a part of."""
    path = os.path.join(folder, "state.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(state, f, indent=1)
    sync(path, folder)


def checksums(folder, files):
    """{file: CRC-32, None where it cannot be read}. Each rank reads its share."""
    mine = {file: checksum(os.path.join(folder, file)) for file in files[RANK::WORLD]}
    shares = [None] * WORLD
    dist.all_gather_object(shares, mine)
    return {file: crc for share in shares for file, crc in share.items()}


def checksum(path):
    crc = 0
    try:
        with open(path, "rb") as f:
            while block := f.read(2**24):
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return crc


def checkpoints_in(folder):
    """Paths, the newest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step-" + 8 * "[0-9]"))
    return sorted(paths, reverse=True)


def is_checkpoint_file(name):
    return name.endswith(".distcp") or name in (".metadata", ".metadata.tmp", "state.json")


def remove_checkpoint(folder):
    """File by file, and only what a checkpoint is made of."""
    if os.path.isdir(folder):
        remove_files(folder, [name for name in os.listdir(folder) if is_checkpoint_file(name)])


def find_checkpoint(resume, output_dir):
    """-> (path, state) of the newest checkpoint that is whole, or None. resume: auto, never or a
    path. What is damaged is named and passed over."""
    if resume == "never":
        return None
    if resume == "auto":
        paths = checkpoints_in(os.path.join(output_dir, "checkpoints"))
    else:
        paths = [resume.rstrip("/")]
    paths = from_rank0(paths)   # on a shared disk others may not see yet what rank 0 sees
    for path in paths:
        state, problem = from_rank0(read_state(path) if RANK == 0 else None)
        if state is not None:
            there = checksums(path, list(state["files"]))
            damaged = [file for file, crc in state["files"].items() if there[file] != crc]
            if not damaged:
                return path, state
            problem = f"{damaged[0]} is not what was written"
        print0(f"checkpoint {path} is not readable ({problem}), passed over")
    if paths:
        raise UserError(f"{paths[0]!r} is no readable checkpoint; start over with --resume never")
    return None


def read_state(path):
    """-> the state.json of a checkpoint (or None), what is wrong with it (or None)."""
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
            state = json.load(f)
        written = state.pop("digest")
        if digest(state) != written or not isinstance(state["files"], dict):
            raise ValueError("state.json is not what was written")
        # a run from before there was some knob had it at its default
        state["config"] = result_knobs(Config()) | state["config"]
        return state | {"digest": written}, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return None, one_line(e)


def load_checkpoint(path, tensors):
    """In place, where `tensors` says, named as by tensors_of."""
    try:
        dcp.load(tensors, storage_reader=TensorReader(path))
    except (Exception, dcp.api.CheckpointException) as e:   # the latter is no Exception
        raise UserError(f"{path!r} is no checkpoint of this run: {one_line(unwrapped(e))}") from e
    print0(f"resumes from {path}")


class TensorReader(dcp.FileSystemReader):
    """dcp's reader, but a stranger's checkpoint cannot run code: dcp unpickles whatever .metadata
    names."""

    def __init__(self, path):
        super().__init__(path)
        with open(os.path.join(path, ".metadata"), "rb") as f:
            self.metadata = MetadataUnpickler(f).load()

    def read_metadata(self, *args, **kwargs):
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and no other. Not BytesStorageMetadata: what is
    stored so is unpickled too."""
    HARMLESS = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "bool"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module, name):
        if name not in self.HARMLESS.get(module, ()):
            raise ValueError(f".metadata names {module}.{name}, which a checkpoint does not need")
        return super().find_class(module, name)


def refuse_changes(there, here, where,
                   way_out="start over with --resume never or another --output_dir"):
    """Two dicts of what decides a result: that of the run in `where`, and that of this one."""
    changed = []
    for name in {**there, **here}:   # in the order of their rows
        if there.get(name) != here.get(name):
            changed.append(f"{name} {there.get(name)!r} there, {here.get(name)!r} here")
    if changed:
        raise UserError(f"{where} is of a run with {'; '.join(changed)}. Change it back, or "
                        f"{way_out}")


def plan_batch(cfg, state, world):
    """-> batch size (of a rank and micro-step), micro-steps, global batch. A resumed run (state: of
    its checkpoint) keeps its global batch at any number of ranks: it is divided among them anew,
    in micro-steps of at most the batch size that was typed."""
    size = cfg.batch_size
    micro_steps = cfg.gradient_accumulation_steps
    typed = size * micro_steps * world
    if state is None or state["global_batch"] == typed:
        return size, micro_steps, typed
    global_batch = state["global_batch"]
    if [size, micro_steps] != state["batch"]:
        raise UserError(f"{cfg.output_dir!r} holds a run of {global_batch} sequences a step, not "
                        f"of {size} x {micro_steps} x {world} ranks; keep the product, or start "
                        "over with --resume never or elsewhere")
    size = min(size, math.ceil(global_batch / world))
    micro_steps = math.ceil(global_batch / (world * size))
    return size, micro_steps, global_batch


def check_output(output_dir):
    """Before anything is written: what stands under our names has to be ours."""
    def has_our_knobs(path):
        with open(path, encoding="utf-8") as f:
            knobs = json.load(f)
        return {"student", "alpha", "output_dir"} <= knobs.keys() and knobs["mode"] != "cache"

    def is_our_log(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            first = f.readline()
        return not first.endswith("\n") or step_of(json.loads(first)) is not None

    def is_our_final(path):
        return set(os.listdir(path)) <= {FINAL_MARK, *read_final_mark(path).get("files", [])}

    def is_our_checkpoint(path):
        return all(is_checkpoint_file(name) for name in os.listdir(path))

    refuse_foreign(os.path.join(output_dir, "config.json"), has_our_knobs)
    refuse_foreign(os.path.join(output_dir, "log.jsonl"), is_our_log)
    refuse_foreign(os.path.join(output_dir, "final"), is_our_final)
    for path in checkpoints_in(os.path.join(output_dir, "checkpoints")):
        refuse_foreign(path, is_our_checkpoint)


def prepare_output(cfg, step):
    """output_dir as of `step`: nothing left of a run that starts over, no log of steps to come, no
    checkpoint of them either. final/ stays until the next one is whole: it may be the student."""
    folder = os.path.join(cfg.output_dir, "checkpoints")
    os.makedirs(folder, exist_ok=True)
    newer = [path for path in checkpoints_in(folder) if int(path[-8:]) > step]
    if cfg.resume == "never":
        for name in ("step", "tmp", "aside"):
            for path in glob.glob(os.path.join(glob.escape(folder), f"{name}-????????*")):
                remove_checkpoint(path)
    elif newer:
        set_aside(newer)
    write_json(cfg, os.path.join(cfg.output_dir, "config.json"))
    cut_log(os.path.join(cfg.output_dir, "log.jsonl"), step)


def set_aside(checkpoints):
    """They are of steps that are about to be trained again, or damaged: never to be continued from
    by themselves, and not ours to delete."""
    for path in checkpoints:
        folder, name = os.path.split(path)
        aside = os.path.join(folder, name.replace("step", "aside"))
        taken = itertools.count(2)
        while os.path.exists(aside):
            aside = os.path.join(folder, f"{name.replace('step', 'aside')}-{next(taken)}")
        os.rename(path, aside)
    names = ", ".join(os.path.basename(path) for path in checkpoints)
    print0(f"set aside as aside-... in {os.path.dirname(checkpoints[0])}: {names}")


def cut_log(path, step):
    """Drop the lines of steps that are about to be repeated: at step 0, all."""
    kept = [row for row in read_jsonl(path) if step > 0 and step_of(row) <= step]
    aside = path + ".tmp"
    with open(aside, "w", encoding="utf-8") as f:
        for row in kept:
            f.write(json.dumps(row) + "\n")
    os.replace(aside, path)


def step_of(row):
    """Of a line of the log: its train/step, eval/step or block/step."""
    return next((value for key, value in row.items() if key.endswith("/step")), None)


# --------------------------------------------------------------------------------------------------
# Train: a run is put together, begun, trained stage by stage and finished. train() says it in a few
# lines; train_stage() is the loop. Optional modes compose the same pieces. main(), at the end of
# the file, has opened the process group and locked output_dir, and each `demo` names files by then.


@dataclass
class Stage:
    """A stretch of training with a loss, rates, clipping and a length. Plain distillation is one
    stage; block-wise training puts others before it."""
    name: str
    first_step: int
    steps: int
    loss_fn: Any               # (model, batch, targets, denominator) -> loss, ce, kl; what else it
                               # hands on is for its own chapter: the loop logs these three
    get_teacher_targets: Any   # batch -> the targets that loss_fn takes
    rates: dict                # {parameter: peak learning rate}; the others are frozen
    weight_decay: float
    max_grad_norm: float       # of all gradients together; 0: no clipping
    clipped_alone: list = field(default_factory=list)   # [(parameters, max norm), ...] before that
    # the field of Batch that the loss is a mean over: labels, or, where blocks are matched, real
    mean_over: str = "labels"

    @property
    def end(self):
        return self.first_step + self.steps


@dataclass
class Run:
    """What a run works with, and where it is. A checkpoint keeps the last block of fields, beside
    the student's weights and the optimiser's moments; save() and resume() are each other's mirror.
    """
    cfg: Config
    result_knobs: dict         # all knobs that decide the result; compared at a resume ...
    inputs: dict               # ... as is what the files that they name held
    tokenizer: Any
    rows: Any                  # token rows to train on, or a stream of raw rows
    eval_rows: Any
    student: ShardedRoot
    teacher: Optional[ShardedRoot]
    batch_size: int            # sequences a rank and micro-step
    micro_steps: int
    global_batch: int          # sequences an optimiser step, whatever the number of ranks
    checkpoint: Optional[tuple]   # (path, state) to continue from
    loss_fn: Any               # of plain distillation: what held-out rows are judged by ...
    get_teacher_targets: Any   # ... and what it takes from the teacher
    started: float             # seconds since the epoch
    free_memory: int           # bytes on this device before anything was loaded
    broken_weights: int        # not finite from the beginning, as unused rows sometimes are

    stages: list = field(default_factory=list)
    stage: Optional[Stage] = None   # whose optimiser this is
    optimizer: Any = None
    set_rates: Any = None           # step of the stage -> the largest rate, when all are set
    batches: Any = None             # endless (micro-batches of this rank, position after the step)
    wandb: Any = None
    bar: Any = None
    stop_requests: list = field(default_factory=list)   # filled by a signal
    stopped: bool = False
    saved_step: Optional[int] = None
    saved_digest: Optional[str] = None      # of the newest checkpoint
    save_problem: Optional[str] = None      # why the last checkpoint could not be saved
    log_problem: Optional[str] = None       # why nothing can be logged any more
    last_scores: Optional[dict] = None      # of the newest evaluation
    window_start: float = 0.0               # since when the tokens below are counted, for the speed
    window_tokens: float = 0.0

    scale_state: dict = None                # see new_scale_state
    step: int = 0
    tokens: int = 0                         # trained on so far
    position: Any = None                    # of a stream
    best_loss: float = math.inf
    first_scores: Optional[dict] = None     # held-out scores before training
    notes: dict = field(default_factory=dict)   # what a mode of its own wants to keep

    @property
    def steps(self):
        return self.stages[-1].end

    @property
    def steps_per_epoch(self):
        """None for a stream, which has no length."""
        if self.cfg.streaming:   # optional: streaming
            return None
        return math.ceil(len(self.rows) / self.global_batch)

    @property
    def epoch(self):
        if self.steps_per_epoch:
            return self.step / self.steps_per_epoch
        return (self.position or {}).get("epoch", 0)


def train(cfg):
    """Distil, online or from a cache -> True when it is done, False when a signal stopped it."""
    run = start_run(cfg)
    if run is None:
        return True
    stage = distillation_stage(run)
    if cfg.dry_run:
        return rehearse(run, [stage])
    with begin(run, [stage]):
        if train_stage(run, stage):
            evaluate_and_save(run, stage)
    return finish(run)


# ---- putting a run together


def load_everything(cfg):
    """-> tokenizer, train rows (or a raw stream), eval rows, student, teacher (None at alpha 1)."""
    tokenizer = load_tokenizer(cfg, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    student = load_checked_student(cfg, tokenizer)
    teacher = load_checked_teacher(cfg, tokenizer) if cfg.alpha < 1 else None
    return tokenizer, rows, eval_rows, student, teacher


def load_checked_student(cfg, tokenizer):
    with progress(f"reading student {cfg.student}"):
        student = load_student(cfg)
        check_head(student, "student", cfg.student, tokenizer)
        if cfg.packing == "documents":
            check_packing(student, "student", cfg.student)
    return student


def load_checked_teacher(cfg, tokenizer):
    with progress(f"reading teacher {cfg.teacher}"):
        teacher = load_teacher(cfg)
        check_head(teacher, "teacher", cfg.teacher, tokenizer)
        if cfg.packing == "documents":
            check_packing(teacher, "teacher", cfg.teacher)
    teacher_tokenizer = load_tokenizer(dataclasses.replace(cfg, tokenizer=None), cfg.teacher)
    if teacher_tokenizer is not None:
        compare_tokenizers(
            tokenizer, teacher_tokenizer, cfg.tokenizer or cfg.student, cfg.teacher)
    return teacher


def start_run(cfg):
    """Load everything and check that it belongs together -> Run; None where it is finished."""
    started = time.time()
    free = free_memory()
    check_scheduler(cfg)
    load = load_everything
    if cfg.cache_dir:   # optional: cache
        cfg = take_from_cache(cfg)
        load = load_with_cache
    knobs = result_knobs(cfg)
    if cfg.cache_dir:   # optional: cache
        knobs["cache"] = digest(read_manifest(cfg.cache_dir))   # which one, wherever it lies
    with progress("looking for a checkpoint, and whether it is whole"):
        checkpoint = find_checkpoint(cfg.resume, cfg.output_dir)
    state = None
    if checkpoint is not None:
        path, state = checkpoint
        refuse_changes(state["config"], knobs, path)
        refuse_other_run(cfg, knobs)
        if is_finished(cfg, state):
            print0(f"{cfg.output_dir} holds this run, finished at step {state['step']}: see "
                   + os.path.join(cfg.output_dir, "final"))
            return None
    tokenizer, rows, eval_rows, student, teacher = load(cfg)
    with progress("taking checksums of teacher and rows"):
        inputs = from_rank0(identify_inputs(cfg, rows, eval_rows, teacher) if RANK == 0 else None)
    if state is not None:
        refuse_changes(state["inputs"], inputs, checkpoint[0])
    if cfg.on_policy:   # optional: on_policy
        check_writer(cfg, student, teacher, tokenizer)
        warn_of_another_end(eval_rows, cfg.seq_len, student, tokenizer)
    batch_size, micro_steps, global_batch = plan_batch(cfg, state, WORLD)
    broken_weights = count_not_finite(student)
    if broken_weights:
        print0(f"WARNING: {broken_weights} weights of student {cfg.student!r} are not finite")
    # Student and teacher are compared over the ids that the tokenizer has, and then CE is of the
    # same distribution. Labels alone keep transformers' own loss, which is over the whole head.
    vocabulary = vocabulary_of(tokenizer) if cfg.alpha < 1 else None
    return Run(
        cfg=cfg, result_knobs=knobs, inputs=inputs, tokenizer=tokenizer, rows=rows,
        eval_rows=eval_rows, student=student, teacher=teacher, batch_size=batch_size,
        micro_steps=micro_steps,
        global_batch=global_batch, checkpoint=checkpoint, started=started, free_memory=free,
        broken_weights=broken_weights,
        loss_fn=functools.partial(distil_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                                  divergence=cfg.divergence, vocabulary=vocabulary),
        get_teacher_targets=teacher_targets(teacher),
        scale_state=new_scale_state(compute_dtype(cfg) == torch.float16))


def identify_inputs(cfg, rows, eval_rows, teacher):
    """Digests of what a resume has to find unchanged, wherever it lies by then."""
    weights = None
    if teacher is not None:
        _, weights = identify_weights(cfg.teacher)
    return {"teacher's weights": weights, "rows to train on": rows_digest(rows),
            "rows held out": rows_digest(eval_rows)}


def refuse_other_run(cfg, knobs):
    """--resume PATH may lead from elsewhere into this output_dir; the run in it stays one run."""
    for path in checkpoints_in(os.path.join(cfg.output_dir, "checkpoints")):
        state, _ = read_state(path)
        if state is not None:
            refuse_changes(state["config"], knobs, path, "choose another --output_dir")


def is_finished(cfg, state):
    """final/ has to be of this very checkpoint, not of a shorter run before it."""
    same_length = state["length"] == [cfg.max_steps, cfg.num_epochs]
    final = read_final_mark(os.path.join(cfg.output_dir, "final"))
    return (same_length and state["step"] >= state["steps"]
            and final.get("checkpoint") == state["digest"])


def free_memory():
    """Bytes that this device, or this host, has left."""
    if CUDA:
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def distillation_stage(run, first_step=0):
    """Plain distillation. After other stages it may be of no steps."""
    cfg = run.cfg
    steps = cfg.max_steps
    if steps is None:
        steps = math.ceil(cfg.num_epochs * run.steps_per_epoch)
    rates = learning_rates(
        run.student.model.named_parameters(remove_duplicate=False),
        parse_multipliers(cfg.lr_multipliers), cfg.default_lr_multiplier, cfg.learning_rate)
    loss_fn = run.loss_fn
    if cfg.on_policy:   # optional: on_policy
        loss_fn = functools.partial(loss_by_writer, run.loss_fn)
    return Stage(
        name="distil", first_step=first_step, steps=steps, loss_fn=loss_fn,
        get_teacher_targets=run.get_teacher_targets, rates=rates,
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


# ---- beginning


@contextlib.contextmanager
def begin(run, stages):
    """From here on the run may write: resume, clear what is left of it, open log, batches, bar."""
    cfg = run.cfg
    run.stages = stages
    if run.checkpoint and run.checkpoint[1]["step"] > run.steps:
        path, state = run.checkpoint
        raise UserError(
            f"{path!r} is of step {state['step']}, this run would end at {run.steps}. Raise "
            "--max_steps or --num_epochs, or start over with --resume never")
    print0(describe_run(run))
    with stop_signals() as run.stop_requests, contextlib.ExitStack() as stack:
        wandb_id = None
        if run.checkpoint:
            wandb_id = resume(run)   # which starts the stage that it is in
        else:
            start_stage(run, stages[0])
        if RANK == 0:
            with reading(f"output folder {cfg.output_dir!r} cannot be written"):
                prepare_output(cfg, run.step)
        all_sum(0)   # nobody goes on before that is done
        run.wandb = start_wandb(cfg, wandb_id)
        stack.push(lambda kind, *_: run.wandb.finish(exit_code=int(kind is not None)))
        if run.first_scores is None:
            run.first_scores = scores(run, rows_before_training(run))
        run.batches = prefetch(my_micro_batches(run))
        stack.enter_context(contextlib.closing(run.batches))
        if cfg.on_policy:   # optional: on_policy
            run.batches = batches_by_student(run, run.batches)
        run.bar = stack.enter_context(tqdm(
            total=run.steps, initial=run.step, disable=RANK > 0, dynamic_ncols=True,
            mininterval=0.5))
        run.window_start = time.time()
        yield


def my_micro_batches(run):
    """-> endless (this rank's micro-batches of a step, position after it), from run.step on."""
    if run.cfg.streaming:   # optional: streaming
        return micro_batches(batches_of_stream(run), None, run.micro_steps, run.batch_size)
    global_batches = indexed_batches(run.rows, run.cfg.seed, run.global_batch, run.step)
    return micro_batches(global_batches, run.rows, run.micro_steps, run.batch_size)


def start_stage_at(run, step):
    """Start the stage that goes on at `step` -> the tensors that a checkpoint of then holds for it:
    load_checkpoint fills them in place."""
    unfinished = [stage for stage in run.stages if step < stage.end]
    stage = unfinished[0] if unfinished else run.stages[-1]
    start_stage(run, stage)
    # where a stage begins, the moments that were saved are of the stage before
    moments = {} if step == stage.first_step else run.optimizer.state
    return tensors_of(run.student, moments, run.scale_state)


def start_stage(run, stage):
    print0(f"{stage.name}: {stage.steps} steps")
    run.stage = stage
    run.optimizer = None   # its moments go before the next ones come
    run.optimizer = make_optimizer(run.student.parameters(), stage.rates, stage.weight_decay)
    run.set_rates = make_schedule(run.cfg, run.optimizer, stage.steps)


# ---- the loop


def train_stage(run, stage):
    """Train what is left of a stage -> True at its end, False when a signal stopped it. What is due
    after its last step is the caller's: something may have to be done before it is saved."""
    cfg = run.cfg
    fp16 = compute_dtype(cfg) == torch.float16
    if run.stage is not stage:   # begin() or a resume may have started it
        start_stage(run, stage)
    while run.step < stage.end:
        micro, position = next(run.batches)
        counted = sum(len(getattr(batch, stage.mean_over)) for batch in micro)
        tokens, stopping = all_sum(counted, len(run.stop_requests))   # all ranks agree
        if stopping:
            stop(run)
            return False
        run.position = position
        seed_step(cfg.seed, run.step)
        rate = run.set_rates(run.step - stage.first_step)
        sums = add_gradients(run, stage, micro, tokens)
        grad_norm = torch.zeros(())
        if tokens:
            grad_norm = optimizer_step(run.optimizer, stage.max_grad_norm, run.scale_state, fp16,
                                       stage.clipped_alone)
        else:
            print0(f"step {run.step + 1}: not one valid target token in the whole batch; "
                   "nothing changed")
        run.optimizer.zero_grad()
        run.step += 1
        run.tokens += int(tokens)
        run.window_tokens += tokens
        run.bar.update()
        stop_after_bad_steps(run)
        if run.step % cfg.log_steps == 0 or run.step == stage.end:
            log_step(run, stage, sums, grad_norm, rate)
        if run.step < stage.end:
            evaluate_and_save(run, stage)
    return True


def add_gradients(run, stage, micro, tokens):
    """Forward and backward of a step's micro-batches, `tokens` of them on all ranks -> loss, ce and
    kl of this rank."""
    student = run.student
    sums = torch.zeros(3, device=DEVICE)
    for i, batch in enumerate(micro):
        student.set_requires_gradient_sync(
            run.cfg.fsdp in REDUCE_EACH or i == len(micro) - 1)
        targets = stage.get_teacher_targets(batch)
        loss, ce, kl, *_ = student(stage.loss_fn, batch, targets, max(tokens, 1))
        # FSDP averages over ranks, the loss is a mean over the tokens of all of them: times
        # WORLD. A loss that is not finite takes its gradient along: 0 * nan is nan.
        weight = WORLD * run.scale_state["scale"] * (1 + 0 * loss.detach())
        (loss * weight).backward()
        sums += torch.stack([loss.detach(), ce, kl])
        del loss, targets   # its graph holds the head's gradient in fp32
    return sums


def seed_step(seed, step):
    """Dropout follows from the step: a resumed run draws the same, and no state has to be kept."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_536 + RANK)


def stop_after_bad_steps(run):
    # .item() makes a GPU wait: there only every tenth step looks
    if (run.step % 10 == 0 or not CUDA) and run.scale_state["streak"].item() >= 10:
        save(run)
        kept = "its checkpoint could not be saved"
        if run.save_problem is None:
            kept = "its checkpoint holds the last good weights"
            if count_not_finite(run.student) > run.broken_weights:
                kept = "weights of the student are not finite themselves"
        raise UserError(
            f"loss or gradient was not finite for 10 steps in a row, up to step {run.step}; "
            f"{kept}. Start over with --resume never and --learning_rate "
            f"{run.cfg.learning_rate / 4:g}, or with --dtype fp32")


def log_step(run, stage, sums, grad_norm, rate):
    loss, ce, kl = all_sum(*sums.tolist())
    now = time.time()
    speed = run.window_tokens / max(now - run.window_start, 1e-9)
    run.window_start = now
    run.window_tokens = 0.0
    skipped = int(run.scale_state["skipped"].item())
    entry = {
        "train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
        "train/grad_norm": grad_norm.item(), "train/epoch": run.epoch, "train/step": run.step,
        "train/tokens_per_second": speed, "train/skipped_steps": skipped}
    if run.cfg.on_policy:   # optional: on_policy
        entry |= take_rollout_figures(run)
    log(run, entry)
    shown = (f"{stage.name} loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} "
             f"{speed:,.0f} tok/s")
    if skipped:
        shown += f" skipped {skipped}"
    run.bar.set_postfix_str(shown)


def log(run, entry):
    """To log.jsonl, as strict JSON (no NaN), and to wandb. A full disk never costs the run."""
    if RANK > 0:
        return
    finite = {k: v if math.isfinite(v) else None for k, v in entry.items()}
    try:
        append_jsonl(os.path.join(run.cfg.output_dir, "log.jsonl"), finite)
        run.log_problem = None
    except OSError as e:
        if run.log_problem is None:
            print0(f"WARNING: log.jsonl cannot be written ({one_line(e)}); the run goes on")
        run.log_problem = one_line(e)
    run.wandb.log(entry, step=run.step)


def evaluate_and_save(run, stage):
    """What is due after a step; after the last one of the run, both."""
    cfg = run.cfg
    paused = time.time()
    last = run.step == run.steps
    judged = stage.mean_over == "labels"   # while blocks are matched there is nothing to see
    if last or (judged and is_due(run.step, cfg.eval_steps)):
        run.last_scores = scores(run)
        run.best_loss = min(run.best_loss, run.last_scores["loss"])
        entry = run.last_scores | {
            "min_loss": run.best_loss, "epoch": run.epoch, "step": run.step}
        log(run, {f"eval/{key}": value for key, value in entry.items()})
        shown = ", ".join(f"{key} {value:.4f}" for key, value in run.last_scores.items())
        print0(f"step {run.step}: held-out {shown}")
    if last or is_due(run.step, cfg.save_steps):
        save(run)
    run.window_start += time.time() - paused   # the speed is of training alone


def is_due(step, every):
    return every > 0 and step % every == 0


def save(run):
    """A checkpoint of this moment. What goes wrong is said, and kept in run.save_problem."""
    cfg = run.cfg
    run.saved_step = run.step
    state = {
        "step": run.step, "steps": run.steps, "epoch": run.epoch, "position": run.position,
        "tokens": run.tokens, "best": run.best_loss, "before": run.first_scores,
        "notes": run.notes, "batch": [cfg.batch_size, cfg.gradient_accumulation_steps],
        "global_batch": run.global_batch, "wandb": run.wandb.id,
        "length": [cfg.max_steps, cfg.num_epochs], "config": run.result_knobs,
        "inputs": run.inputs}
    with progress(f"writing checkpoint {run.step}"):
        run.save_problem, run.saved_digest = save_checkpoint(
            os.path.join(cfg.output_dir, "checkpoints"), run.step,
            tensors_of(run.student, run.optimizer.state, run.scale_state), state,
            cfg.keep_checkpoints)


def resume(run):
    """Load the checkpoint to continue from -> the id of its wandb run."""
    path, state = run.checkpoint
    with progress(f"reading {path}"):
        load_checkpoint(path, start_stage_at(run, state["step"]))
    run.step = state["step"]
    run.saved_step = state["step"]
    run.saved_digest = state["digest"]
    run.tokens = state["tokens"]
    run.position = state["position"]
    run.best_loss = state["best"]
    run.first_scores = state["before"]
    run.notes = state["notes"]
    return state["wandb"]


def stop(run):
    run.stopped = True
    if run.saved_step != run.step:
        save(run)


# ---- evaluating


def scores(run, rows=None):
    """The student on the held-out rows."""
    if rows is None:
        rows = run.eval_rows
    return evaluate(run.student, run.loss_fn, run.get_teacher_targets, rows, run.batch_size)


def rows_before_training(run):
    """A few of the held-out rows, evenly spaced: training is to start at once, and what these say
    of the student before it is only where it comes from."""
    held_out = len(run.eval_rows)
    count = min(4 * run.global_batch, held_out)
    return [run.eval_rows[i * held_out // count] for i in range(count)]


def evaluate(root, loss_fn, get_teacher_targets, rows, batch_size, what="evaluating the student"):
    """-> {loss, ce_loss, kl_loss, perplexity}: means over the counted tokens of rows. Every token
    counts once, whatever the number of ranks."""
    loss, ce, kl, *_ = mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size,
                                      "labels", what)
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}


def rows_of_this_rank(rows, batch_size):
    """Batches of row numbers: every rank runs every batch, with nothing in it where rows end."""
    for start in range(0, len(rows), batch_size * WORLD):
        yield range(start + RANK, min(start + batch_size * WORLD, len(rows)), WORLD)


@torch.no_grad()
def mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size, mean_over, what):
    """What loss_fn returns, as means over the labels or the real tokens of rows. what: in words."""
    was_training = root.training
    root.eval()
    sums = 0
    tokens = 0
    with progress(what, len(rows), unit="seq") as bar:
        for mine in rows_of_this_rank(rows, batch_size):
            batch = collate([rows[i] for i in mine])
            values = root(loss_fn, batch, get_teacher_targets(batch), 1.0)
            sums += torch.stack(values).double()
            tokens += len(getattr(batch, mean_over))
            bar.update(WORLD * len(mine))
    root.train(was_training)
    root.release()
    *sums, tokens = all_sum(*sums.tolist(), tokens)
    return [value / max(tokens, 1) for value in sums]


@torch.no_grad()
def continue_text(root, tokenizer, ids_1T, new=48, seed=None):
    """-> seconds, the text that follows: greedy, or sampled with a seed."""
    torch.manual_seed(seed or 0)
    root.eval()
    # the last token is never looked up
    new = min(new, position_limit(root.model) + 1 - ids_1T.shape[1])
    # the whole length, so that ranks stay in step and speeds can be compared
    ends = root.model.generation_config.eos_token_id
    root.model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=new, do_sample=seed is not None, pad_token_id=0)
    start = time.time()
    ids = root(lambda model: model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), **options))
    new_ids = ids[0, ids_1T.shape[1]:].tolist()   # waits for the GPU
    seconds = time.time() - start
    root.model.generation_config.eos_token_id = ends
    root.release()
    if tokenizer.eos_token_id in new_ids:
        new_ids = new_ids[:new_ids.index(tokenizer.eos_token_id)]
    return seconds, tokenizer.decode(new_ids)


# ---- finishing


def finish(run):
    """Write final/, say how it ended -> True when the run is done, False when it was stopped."""
    if run.stopped:
        saved = "" if run.save_problem else ", saved; the same command continues"
        print0(f"stopped at step {run.step} of {run.steps}{saved}")
    elif count_not_finite(run.student) > run.broken_weights:
        raise UserError(
            f"at step {run.step} weights of the student are not finite: no final/ is written. "
            "Start over with --resume never and a lower --learning_rate, or with --dtype fp32")
    elif run.save_problem is None:
        run.last_scores = run.last_scores or scores(run)
        teacher_scores = score_teacher(run) if run.teacher is not None else None
        table = closing_table(run, teacher_scores)
        run.save_problem = save_final(run, table)
        print0(table)
        print0(closing_words(run))
    if run.save_problem is not None:
        raise UserError(f"the run could not be saved in {run.cfg.output_dir!r}: "
                        f"{run.save_problem}; make room, then run it again")
    return not run.stopped


def score_teacher(run):
    """The teacher by itself on the held-out rows: its cross-entropy to their labels."""
    alone = functools.partial(distil_loss, alpha=1.0, temperature=1.0,
                              vocabulary=vocabulary_of(run.tokenizer))
    return evaluate(run.teacher, alone, teacher_targets(None), run.eval_rows, run.cfg.batch_size,
                    "evaluating the teacher")


def save_final(run, table):
    """-> None, or what went wrong, on every rank."""
    final = os.path.join(run.cfg.output_dir, "final")
    mark = {"step": run.step, "checkpoint": run.saved_digest}
    with progress(f"writing {final}"):
        return save_model(run.student, run.tokenizer, final, compute_dtype(run.cfg),
                          model_card(run, table), mark)


MODEL_CARD = """\
---
{front_matter}
license:   # fill in, for example apache-2.0
---

# {title}

| | |
|---|---|
{facts}

On what was held out ({held_out} sequences):

```
{table}
```

How to load it, from the hub or from a folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("NAME"{load_option})
tokenizer = AutoTokenizer.from_pretrained("NAME"{load_option})
```
"""


def model_card(run, table):
    """README.md of final/, as transformers writes them. Only the license is left to fill in."""
    cfg = run.cfg
    teacher, dataset = sources_of(cfg)
    size = f"{run.student.model.num_parameters():,} parameters"
    tags = ["simple_distill"]
    title = f"{size}, trained on labels alone"
    base_models = []
    if teacher is not None:
        tags.append("distillation")
        title = f"{name_for_strangers(teacher)}, distilled into {size}"
        base_models.append(name_for_strangers(teacher))
    if cfg.student.startswith("layers:"):
        base_models = [name_for_strangers(cfg.teacher)]
    elif not cfg.student.endswith(".json"):
        base_models.append(name_for_strangers(cfg.student))
    front_matter = huggingface_hub.ModelCardData(
        base_model=base_models or None, datasets=[dataset] if is_hub_name(dataset) else None,
        library_name="transformers", pipeline_tag="text-generation", tags=tags)
    facts = []
    for name, fact in card_facts(run, teacher, dataset).items():
        facts.append(f"| {name} | {printable(fact).replace('|', '/')} |")
    brings_code = hasattr(run.student.model.config, "auto_map")
    return MODEL_CARD.format(
        front_matter=front_matter.to_yaml(), title=printable(title), facts="\n".join(facts),
        held_out=len(run.eval_rows), table=table.strip("\n"),
        load_option=", trust_remote_code=True" if brings_code else "")


def sources_of(cfg):
    """-> teacher (None: labels only) and dataset, as they were named"""
    if cfg.cache_dir:   # optional: cache
        manifest = read_manifest(cfg.cache_dir)
        return manifest["teacher"], manifest["dataset"]
    return cfg.teacher if cfg.alpha < 1 else None, cfg.dataset


def card_facts(run, teacher, dataset):
    """-> {row of the model card: what it says}"""
    cfg = run.cfg
    student = run.student.model
    begun_from = name_for_strangers(cfg.student)
    if cfg.student.startswith("layers:"):
        count = cfg.student.removeprefix("layers:")
        begun_from = f"{count} layers of {name_for_strangers(cfg.teacher)}"
    elif cfg.student.endswith(".json"):
        begun_from = "random weights"

    targets = "none, labels only"
    objective = "cross-entropy to the labels"
    if teacher is not None:
        targets = name_for_strangers(teacher)
        kl = {"forward": "KL(teacher, student)", "reverse": "KL(student, teacher)"}.get(
            cfg.divergence, f"{cfg.divergence.upper()}(teacher, student)")
        objective = (f"{cfg.alpha:g} x cross-entropy + {1 - cfg.alpha:g} x T^2 x {kl}, "
                     f"T {cfg.temperature:g}")
        if cfg.cache_dir:   # optional: cache
            targets += f", {describe_targets(cfg)}"
        if cfg.on_policy:   # optional: on_policy
            objective += (f"; a share of {cfg.on_policy:g} of the steps on texts that the student "
                          f"wrote (on_policy), there T^2 x {kl} alone")
        if cfg.blockwise:   # optional: blockwise
            objective = f"hidden states by blocks and the head first, then {objective}"

    data = name_for_strangers(dataset)
    if cfg.dataset_config:
        data += f" ({cfg.dataset_config})"
    stages = ", ".join(f"{stage.name} {stage.steps}" for stage in run.stages)
    return {
        "teacher": targets,
        "student": f"{type(student).__name__}, {student.num_parameters():,} parameters, "
                   f"begun from {begun_from}",
        "data": f"{data}, split {cfg.train_split}, at most {cfg.seq_len} tokens a sequence"
                + (", whole documents packed" if cfg.packing == "documents" else ""),
        "objective": objective,
        "steps": f"{stages}; {run.global_batch} sequences a step, {run.tokens:,} tokens learnt "
                 f"from; peak learning rate {cfg.learning_rate:g}, seed {cfg.seed}",
    }


def name_for_strangers(name):
    """A hub name, or the last part of a path: where it lay is nobody's business."""
    if is_hub_name(name):
        return name
    return os.path.basename(os.path.abspath(name).removesuffix("/final"))


def closing_table(run, teacher_scores):
    size = run.student.model.num_parameters()
    before = "student before"
    seen = len(rows_before_training(run))
    if seen < len(run.eval_rows):
        before += f" ({seen} of {len(run.eval_rows)})"
    lines = [(before, run.first_scores, size), ("student after", run.last_scores, size)]
    if teacher_scores is not None:
        lines.insert(0, ("teacher", teacher_scores, run.teacher.model.num_parameters()))
    width = len(before) + 1
    text = [f"\n{'held out':<{width}}{'perplexity':>12}{'KL to teacher':>15}{'parameters':>15}"]
    for name, values, parameters in lines:
        kl = "-" if run.cfg.alpha == 1 else f"{values['kl_loss']:.4f}"
        text.append(f"{name:<{width}}{values['perplexity']:>12.2f}{kl:>15}{parameters:>15,}")
    return "\n".join(text)


def closing_words(run):
    """A sample of what the student writes, the time and the memory."""
    ids = run.eval_rows[0]["input_ids"][:32]
    ids_1T = torch.as_tensor(ids, dtype=torch.long, device=DEVICE)[None]
    with progress("the student writes a sample"):
        _, continuation = continue_text(run.student, run.tokenizer, ids_1T)
    seconds = time.time() - run.started
    return (f"\nsample: {run.tokenizer.decode(ids_1T[0])!r}\n     -> {continuation!r}\n\n"
            f"done in {seconds:.0f} s, {describe_peak()}: "
            + os.path.join(run.cfg.output_dir, "final"))


# ---- what a run says before it begins


def rehearse(run, stages):
    """--dry_run: the plan, one example as the model meets it, and what a step takes. Nothing is
    written -> False, since nothing is done."""
    run.stages = stages
    stage = stages[0]
    print0(describe_run(run))
    start_stage(run, stage)
    batches = my_micro_batches(run)
    for number in range(2):   # the first warms up, and compiles
        micro, _ = next(batches)
        if number == 0:
            print0("an example, its targets in [[ ]]: " + show_targets(micro[0], run.tokenizer))
        with progress("one step" if number else "a first step, which warms up"):
            tokens, seconds = time_step(run, stage, micro)
    done = run.checkpoint[1]["step"] if run.checkpoint else 0
    left = run.steps - done
    of = "" if len(stages) == 1 else f" of stage {stage.name}"
    average = seconds
    if run.cfg.on_policy:   # optional: on_policy
        average = rehearse_writing(run, stage, micro, seconds)
    print0(f"a step{of} takes {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s): {left} steps "
           f"about {left * average / 3600:.2f} hours, without evaluations; {describe_peak()}. "
           "--dry_run: nothing was written")
    return False


def time_step(run, stage, micro):
    """-> target tokens of a step that is made and comes to nothing, its seconds."""
    tokens, = all_sum(sum(len(getattr(batch, stage.mean_over)) for batch in micro))
    start = time.time()
    sums = add_gradients(run, stage, micro, max(tokens, 1))
    optimizer_step(run.optimizer, stage.max_grad_norm, run.scale_state,
                   compute_dtype(run.cfg) == torch.float16, stage.clipped_alone)
    sums.tolist()   # waits for the GPU
    run.optimizer.zero_grad()
    return tokens, time.time() - start


def show_targets(batch, tokenizer):
    """The first row of a batch as text; what the student learns to say stands in [[ ]], between
    documents ||."""
    width = batch.input_ids.shape[1]
    # a position counts where its next token is a target
    targets = {position + 1 for position in batch.positions.tolist() if position < width - 1}
    begins = set()
    if batch.position_ids is not None:
        begins = set((batch.position_ids[0] == 0).nonzero()[1:, 0].tolist())
    shown = []
    ids = batch.input_ids[0].tolist()
    parts = itertools.groupby(range(width), key=lambda i: (i in targets, i in begins))
    for (is_target, is_first), group in parts:
        text = tokenizer.decode([ids[i] for i in group])
        if is_first:
            shown.append(" || ")
        shown.append(f"[[{text}]]" if is_target else text)
    return repr("".join(shown))


def describe_peak():
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"at most {peak / 1e9:.2f} GB of memory"


MEMORY_ADVICE = (
    "in this order: --gradient_checkpointing true, a smaller --batch_size, a smaller --seq_len, "
    "--fsdp full_shard on more devices, --cpu_offload. More --gradient_accumulation_steps make up "
    "for a smaller --batch_size; under shard_grad_op on several devices they cost 4 bytes a "
    "parameter, for gradients that are whole until the last of them")


def describe_run(run):
    """The plan: who learns from whom, how much of what, and whether it fits."""
    cfg = run.cfg
    dtype = str(compute_dtype(cfg)).removeprefix("torch.")
    rows = "a stream"
    if run.steps_per_epoch:
        rows = f"{len(run.rows):,}"
    steps = f"{run.steps} steps"
    if len(run.stages) > 1:
        steps += f" ({', '.join(f'{stage.name}: {stage.steps}' for stage in run.stages)})"
    student_size = run.student.model.num_parameters()
    parts = estimate_memory(run)
    need = sum(parts.values())
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    memory = (f"memory a device, estimated: {need / 1e9:.2f} GB ({listed}), "
              f"{run.free_memory / 1e9:.1f} free")
    if need > run.free_memory:
        memory += f"; if it runs out, turn {MEMORY_ADVICE}"
    return (
        f"student {cfg.student}: {student_size:,} parameters; {describe_teacher(run)}\n"
        f"{WORLD} x {DEVICE.type}, {dtype}; {run.global_batch} sequences a step "
        f"({run.batch_size} x {run.micro_steps} x {WORLD}) of {rows}, {steps}; "
        f"{len(run.eval_rows)} held out; all goes to {cfg.output_dir}\n{memory}")


def describe_teacher(run):
    cfg = run.cfg
    if cfg.alpha == 1:
        return "no teacher (alpha 1)"
    if cfg.cache_dir:   # optional: cache
        return describe_cache_use(cfg)
    return f"teacher {cfg.teacher}: {run.teacher.model.num_parameters():,}"


def estimate_memory(run):
    """-> {part: bytes a device} at the fuller of two moments: while the loss is formed, and where
    the backward ends with the gradients of the student's root. (Within 10 % of a simulated H100.)
    """
    cfg = run.cfg
    itemsize = compute_dtype(cfg).itemsize
    shape = run.student.model.config.get_text_config()
    student, student_root, layer = sizes(run.student)
    # over how many devices weights, gradients and optimiser state are spread
    share = {"no_shard": 1, "hybrid_shard": LOCAL_WORLD}.get(cfg.fsdp, WORLD)
    trained = max(trained_parameters(stage) for stage in run.stages)
    parts = {
        "weights": 4 * student / share,   # fp32, as gradients and both moments of AdamW
        "optimiser": 8 * trained / share,
        "teacher": 0.0,
    }
    # roots stay gathered in the compute type, under some --fsdp the layers too
    gathered = student_root * itemsize
    dropped = cfg.fsdp in REDUCE_EACH
    if not dropped:
        gathered = student * itemsize
    if run.teacher is not None:
        teacher, teacher_root, _ = sizes(run.teacher)
        teacher_itemsize = next(run.teacher.parameters()).element_size()
        spread = cfg.shard_teacher and WORLD > 1
        parts["teacher"] = teacher * teacher_itemsize / (WORLD if spread else 1)
        if spread or cfg.cpu_offload:
            gathered += teacher_root * teacher_itemsize
    if cfg.cpu_offload and CUDA:   # in host memory
        parts = dict.fromkeys(parts, 0.0)

    one_layer, kept = activations_of(run, itemsize)
    head = shape.vocab_size * shape.hidden_size
    loss = loss_memory(run, shape.vocab_size, itemsize) + 4 * head
    gradients = 4 * trained / share
    before = gradients if run.micro_steps > 1 else 0.0   # of the micro-steps that went before
    if run.micro_steps > 1 and not dropped:   # whole until the last micro-step
        gradients = before = 4 * trained
    in_loss = parts | {
        "gradients": before, "gathered": gathered, "activations": kept, "loss": loss}
    # the head's gradient: fp32 out of the loss, in the compute type, and to be reduced
    in_backward = parts | {
        "gradients": gradients, "gathered": gathered + 2 * layer * itemsize * dropped,
        "activations": kept if cfg.gradient_checkpointing else one_layer,
        "loss": (4 + 3 * itemsize) * head}
    moments = [in_loss, in_backward]
    if cfg.on_policy:   # optional: on_policy
        moments.append(parts | memory_of_writing(run, itemsize))
    parts = max(moments, key=lambda moment: sum(moment.values()))
    if not CUDA:
        add_host_memory(parts, shape.vocab_size >= COMPILED_VOCAB)
    return parts


def sizes(root):
    """-> parameters of a model, those outside its layers, those of one layer."""
    whole = root.model.num_parameters()
    layers = layers_of(root.model)[1]
    inside = sum(p.numel() for p in layers.parameters())
    return whole, whole - inside, inside // len(layers)


def activations_of(run, itemsize):
    """-> bytes that the backward of one layer needs, and that all keep until their backward."""
    shape = run.student.model.config.get_text_config()
    tokens = run.batch_size * run.cfg.seq_len
    width = shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * width
    if isinstance(inner, list):   # one a layer
        inner = max(inner)
    # queries, keys and values, where the config says how wide they are
    heads = getattr(shape, "num_attention_heads", None)
    kv_heads = getattr(shape, "num_key_value_heads", None)
    attention = 10 * width
    if isinstance(heads, int) and isinstance(kv_heads or heads, int):
        head_width = getattr(shape, "head_dim", None) or width // heads
        attention = head_width * (4 * heads + 6 * (kv_heads or heads))
    one_layer = tokens * (8 * width + 4 * inner + attention) * itemsize
    if run.cfg.gradient_checkpointing:
        return one_layer, tokens * width * itemsize * shape.num_hidden_layers
    return one_layer, one_layer * shape.num_hidden_layers


def loss_memory(run, vocab, itemsize):
    """Bytes of a chunk of logits, and of what is formed from them."""
    tokens = run.batch_size * run.cfg.seq_len
    compiled = vocab >= COMPILED_VOCAB
    chunk = min(tokens, chunk_size(DEVICE, itemsize, vocab))
    a_logit = 2 * itemsize   # the student's logit and its gradient
    if run.teacher is not None:
        a_logit += next(run.teacher.parameters()).element_size()
    if run.cfg.divergence != "forward":
        a_logit += 4 if compiled else 14
    if not compiled:
        a_logit += 22
    return chunk * vocab * a_logit


def add_host_memory(parts, compiled):
    """What a CPU needs besides, measured: the libraries, with the compiler, and the gaps of a heap
    that gives nothing back (see keep_freed_memory)."""
    parts["process"] = 0.6e9 if compiled else 0.45e9
    parts["gaps"] = 0.2 * sum(parts.values())


def trained_parameters(stage):
    return sum(p.numel() for p, rate in stage.rates.items() if rate)


# ---- Weights & Biases


class NoWandb:
    """Swallows what a wandb run would be told."""

    def __init__(self, run_id):
        self.id = run_id   # kept in checkpoints: a resume elsewhere may have wandb again

    def log(self, entry, step):
        pass

    def finish(self, exit_code):
        pass


def start_wandb(cfg, run_id):
    """-> a run to log to, or one that swallows everything: nothing ever waits at a prompt."""
    mode = os.environ.get("WANDB_MODE", "online")
    if RANK > 0 or not cfg.use_wandb or mode == "disabled":
        return NoWandb(run_id)
    try:
        import wandb
        if mode == "online" and not logged_in(wandb):
            print0("wandb: going on without it (not logged in; run `wandb login`, or pass "
                   "--no_use_wandb to silence this)")
            return NoWandb(run_id)
        return wandb.init(
            project=cfg.wandb_project, entity=cfg.wandb_entity, name=cfg.wandb_run_name, id=run_id,
            resume="allow", config=dataclasses.asdict(cfg), dir=cfg.output_dir,
            settings=wandb.Settings(console="off", silent=True, init_timeout=20))
    except Exception as e:
        print0(f"wandb: going on without it ({one_line(e)})")
        return NoWandb(run_id)


def logged_in(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except (TypeError, AttributeError):   # a version without these options still has the key
        return wandb.api.api_key


# --------------------------------------------------------------------------------------------------
# Optional: streaming: a dataset that is read as it comes, in constant memory and disk. It has no
# length. Hands on load_stream (in place of load_data) and batches_of_stream (of indexed_batches).


def load_stream(cfg, tokenizer):
    """-> (train stream of raw rows, eval rows)."""
    with progress(f"reading dataset {cfg.dataset}"), node_first():
        stream, eval_raw = split_stream(cfg)
    eval_rows = tokenize(cfg, eval_raw, tokenizer, "eval")
    return stream, take_first(eval_rows, cfg.eval_samples)


def split_stream(cfg):
    """-> stream of train, raw rows of eval: the head of their own split, else that of train."""
    stream, eval_stream = read_splits(cfg, streaming=True)
    first_rows = stream.take(100)   # a look at the stream itself would move it
    check_columns(first_rows, cfg.dataset, cfg.text_column)
    if cfg.max_samples is not None:
        stream = stream.take(cfg.max_samples)
    with reading_rows(cfg.dataset, f"dataset {cfg.dataset!r}: a row cannot be read"):
        if eval_stream is not None:
            return stream, read_head(eval_stream, cfg.eval_samples, cfg.seq_len)
        return hold_out_head(stream, cfg.eval_samples)


def read_head(stream, eval_samples, seq_len):
    """As many raw rows as eval_samples sequences need, and no more of a split that may be huge."""
    first_rows = []
    characters = 0
    for row in stream:
        first_rows.append(row)
        characters += len(str(row))
        # a token is rarely more than 8 characters
        if len(first_rows) >= eval_samples and characters > 8 * eval_samples * seq_len:
            break
    return table_of(first_rows)


def hold_out_head(stream, eval_samples):
    """-> what follows, and the first rows to evaluate on; of a short stream a twentieth, at least
    one."""
    wanted = min(eval_samples, 256)
    first_rows = list(stream.take(wanted + 1))
    if len(first_rows) <= wanted:   # that was the whole stream
        wanted = max(1, len(first_rows) // 20)
    eval_raw = table_of(first_rows[:wanted])
    rest = stream.skip(len(eval_raw))
    rest.rows_before = len(eval_raw)   # for the place of a row that is named
    return rest, eval_raw


def columns_of(rows):
    """Not every row of a stream has every column."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def table_of(rows):
    return datasets.Dataset.from_dict(columns_of(rows), on_mixed_types="use_json")


def batches_of_stream(run):
    """-> endless (rows of a global batch, position after it), from run.position on."""
    encode_here = make_row_encoder(run.cfg, run.tokenizer)
    return streamed_batches(
        run.rows, run.cfg.dataset, encode_here, run.cfg.seed, run.cfg.shuffle_buffer,
        run.global_batch, run.position)


def streamed_batches(stream, dataset, encode_here, seed, shuffle_buffer, global_batch, position):
    """Endless (rows of a global batch, position after it); position None is the beginning.

    A resume is exact. The stream is cut into windows of shuffle_buffer raw rows, and each window is
    encoded and shuffled whole, in an order that its number decides. So all there is to remember is
    where the window began in the stream and how many of its sequences are used: a resume encodes
    that one window again and goes on, as quick at step 100,000 as at 10. (The shuffle buffer that
    `datasets` has is refilled at a resume, and then holds other rows.)"""
    size = shuffle_buffer or 1000   # unshuffled, a window is just what is encoded at once
    beginning = stream.state_dict()
    if position is None:
        position = {"epoch": 0, "window": 0, "used": 0, "source": beginning}
    position = {"first_row": 0, **position}   # of the window, in its epoch
    rows_before = getattr(stream, "rows_before", 0)

    def place(row):
        return place_of(dataset, rows_before + row)

    stream.load_state_dict(position["source"])
    raw_rows = iter(stream)
    pending = []
    dropped = {}
    said = 0
    is_barren = position["first_row"] == 0   # whether nothing of this epoch was of use so far
    while True:
        window = read_window(raw_rows, size, dataset, position["first_row"])
        ended = len(window) < size
        rows = encode_window(window, position["first_row"], place, encode_here, dropped)
        is_barren = is_barren and not rows
        if position["epoch"] == 0 and count_dropped(dropped) > 2 * said:   # not at each window
            said = count_dropped(dropped)
            print0(f"dropped {said} of the first {position['first_row'] + len(window)} rows: "
                   + in_words(dropped, place))
        if shuffle_buffer:
            order = shuffled(len(rows), seed, position["window"]).tolist()
        else:
            order = list(range(len(rows)))
        for used in range(position["used"], len(rows)):
            pending.append(rows[order[used]])
            if len(pending) == global_batch:   # nothing is left over that a position had to keep
                yield pending, {**position, "used": used + 1}
                pending = []
        if ended and is_barren:
            reasons = in_words(dropped, place) or "they are one token long"
            raise UserError(f"dataset {dataset!r}: no row of the stream has a target token: "
                            + reasons)
        position = {
            "epoch": position["epoch"] + int(ended), "window": position["window"] + 1, "used": 0,
            "source": beginning if ended else stream.state_dict(),
            "first_row": 0 if ended else position["first_row"] + len(window)}
        if ended:
            is_barren = True
            dropped = {}
            stream.load_state_dict(beginning)
            raw_rows = iter(stream)


def read_window(raw_rows, size, dataset, first_row):
    with reading_rows(dataset, f"dataset {dataset!r}: a row after row {first_row} cannot be read"):
        return list(itertools.islice(raw_rows, size))


def encode_window(raw_rows, first_row, place, encode_here, dropped):
    """-> token rows; what is dropped is added to dropped."""
    warn_of_long_rows(raw_rows)
    columns, dropped_here = encode_here(raw_rows, lambda i: place(first_row + i))
    add_dropped(dropped, first_row, dropped_here)
    return rows_from_columns(columns)


# --------------------------------------------------------------------------------------------------
# Optional: demo: text, tokenizer, model shapes and a teacher made from what every machine has,
# once, as ordinary files in a cache folder of the user. From there on the demo is a run like any
# other.

DEMO_VOCAB = 1024
DEMO_SHAPE = dict(   # of both models
    vocab_size=DEMO_VOCAB, num_hidden_layers=2, initializer_range=0.05,
    max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    pad_token_id=0)
DEMO_STUDENT = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4)
DEMO_TEACHER = dict(hidden_size=192, intermediate_size=512, num_attention_heads=6)


def run_demo(run_mode, cfg):
    """A mode with a file for each `demo`. The whole demo ends with the report of what it made."""
    if "demo" not in (cfg.teacher, cfg.student, cfg.dataset):
        return run_mode(cfg)
    resolved = resolve_demo(cfg)
    if resolved is None:   # a signal stopped the training of the teacher
        return False
    done = run_mode(resolved)
    if done and is_whole_demo(cfg):   # optional: eval
        if has_demo_knobs(cfg):
            return answer_demo(resolved)
        report_demo(resolved)
    return done


def is_whole_demo(cfg):   # optional: eval
    if cfg.mode != "train" or cfg.dry_run:   # a finished run is "done" on a dry run too
        return False
    names = {cfg.teacher, cfg.student, cfg.dataset}
    return names == {"demo"} and cfg.alpha < 1 and not uses_cache(cfg)


def has_demo_knobs(cfg):   # optional: eval
    """Whether all that decides the result is as the demo has it; any seed will do."""
    demo = Config(**demo_knobs(), seed=cfg.seed)
    lengths = ("max_steps", "batch_size", "gradient_accumulation_steps")
    same_length = all(getattr(cfg, name) == getattr(demo, name) for name in lengths)
    return same_length and result_knobs(cfg) == result_knobs(demo)


def answer_demo(cfg):   # optional: eval
    """Was the teacher worth it? A student of the same start, data and steps learns from the labels
    alone, the report compares both, and one line says how that came out. -> False when a signal
    stopped it: the next run goes on where this one was."""
    control = os.path.join(cfg.output_dir, "labels-only")
    control_cfg = dataclasses.replace(cfg, alpha=1.0, output_dir=control, use_wandb=False)
    if cfg.resume != "never":
        control_cfg.resume = "auto"   # --resume PATH is a checkpoint of the other student
    print0(f"\ndemo: and now the same student on labels alone, in {control}")
    with lock(control):
        check_output(control)
        if not train(control_cfg):
            return False
    report_demo(cfg, compare=[os.path.join(control, "final")])
    if RANK == 0:
        with open(os.path.join(cfg.output_dir, "report.json"), encoding="utf-8") as f:
            models = json.load(f)["models"]
        print0(did_teacher_pay(models["student"], models["labels-only"], cfg.max_steps))
    return True


def did_teacher_pay(student, control, steps):   # optional: eval
    """From the report's figures of both."""
    verdict = control["student_against_it"]
    low, high = verdict["interval"]
    answer = {"better": "The teacher paid", "worse": "The teacher did not pay"}.get(
        verdict["verdict"], "Whether the teacher paid, this run cannot tell")
    return (f"{answer}: held-out perplexity {student['perplexity']:.2f}, on labels alone "
            f"{control['perplexity']:.2f} after the same {steps} steps; "
            f"{verdict['difference']:+.4f} bits a byte (95 %: {low:+.4f} to {high:+.4f})")


def report_demo(cfg, compare=()):   # optional: eval
    final = os.path.join(cfg.output_dir, "final")
    report(dataclasses.replace(cfg, mode="eval", student=final, compare=list(compare)))


def uses_cache(cfg):
    """Whether a cache stands in for teacher and dataset."""
    if cfg.cache_dir:   # optional: cache
        return cfg.mode == "train"
    return False


def resolve_demo(cfg):
    """-> cfg with a file for each `demo`, made where it is missing; None where a signal stopped it.
    """
    training = cfg.mode == "train"
    online = cfg.alpha < 1 and not uses_cache(cfg)
    needs_teacher = not training or online or cfg.student.startswith("layers:")
    folder = demo_folder(cfg)
    files = {}
    if cfg.dataset == "demo" and not uses_cache(cfg):
        files["dataset"] = os.path.join(folder, "corpus")
    if cfg.student == "demo" and cfg.mode != "eval":   # there it is what output_dir holds
        files["student"] = os.path.join(folder, "student", "config.json")
        files["tokenizer"] = cfg.tokenizer or os.path.join(folder, "tokenizer")
    if cfg.teacher == "demo" and needs_teacher:
        files["teacher"] = os.path.join(folder, "teacher", "final")
    say_what_is_the_demos(cfg, files)
    made_here = [path for path in files.values() if path.startswith(folder)]
    if made_here and not make_demo(cfg, folder, with_teacher="teacher" in files):
        return None
    resolved = dataclasses.replace(cfg, **files)
    resolved.given = cfg.given
    return resolved


def say_what_is_the_demos(cfg, files):
    """Where some was named, and the demo stands in for the rest: not what everybody expects."""
    roles = ("teacher", "student", "dataset")
    if not uses_cache(cfg) and not any(role in cfg.given for role in roles):
        return   # the demo itself
    for role in roles:
        if role in files and role not in cfg.given:
            print0(f"no --{role} given: it is the demo's, {files[role]}")


def demo_folder(cfg):
    """Beside other caches of Hugging Face libraries, named by all that the files depend on."""
    depends = digest(sys.version, DEMO_SHAPE, DEMO_STUDENT, DEMO_TEACHER, demo_knobs(),
                     str(compute_dtype(cfg)), inspect.getsource(write_demo_files))
    home = huggingface_hub.constants.HF_HOME
    return os.path.join(home, "simple_distill", f"demo-{depends}")


def make_demo(cfg, folder, with_teacher):
    """Make what is missing; another run that does so already is waited for. -> False when a signal
    stopped it: the next run goes on where this one was."""
    with lock(folder, wait=True):
        if RANK == 0:
            with progress("demo: writing its text and a tokenizer"):
                write_demo_files(folder)
        all_sum(0)   # nobody goes on before that is done
        final = os.path.join(folder, "teacher", "final")
        if not with_teacher or os.path.exists(final):
            return True
        knobs = demo_knobs() | dict(alpha=1.0, eval_steps=0)
        teacher_cfg = Config(
            dataset=os.path.join(folder, "corpus"), tokenizer=os.path.join(folder, "tokenizer"),
            student=os.path.join(folder, "teacher-shape", "config.json"), use_wandb=False,
            output_dir=os.path.join(folder, "teacher"), dtype=cfg.dtype, log_steps=cfg.log_steps,
            **knobs)
        print0(f"demo: first the teacher, {teacher_cfg.max_steps} steps, kept in {folder}")
        return train(teacher_cfg)


def write_demo_files(folder):
    """Corpus, tokenizer and model shapes, once; every twentieth module is held out whole."""
    done = os.path.join(folder, "student", "config.json")   # written last
    if os.path.exists(done):
        return
    corpus = os.path.join(folder, "corpus")
    os.makedirs(corpus, exist_ok=True)
    texts = {"train": [], "validation": []}
    for name, text in sorted(stdlib_sources(), key=name_digest):   # no package stands first
        if text.strip():
            split = "validation" if int(digest(name), 16) % 20 == 0 else "train"
            texts[split].append(text)
    for split in texts:
        with open(os.path.join(corpus, f"{split}.jsonl"), "w", encoding="utf-8") as f:
            for text in texts[split]:
                f.write(json.dumps({"text": text}) + "\n")
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["train"], vocab_size=DEMO_VOCAB, special_tokens=["<|end|>"],
                            show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
    for name, shape in (("teacher-shape", DEMO_TEACHER), ("student", DEMO_STUDENT)):
        config = transformers.LlamaConfig(**DEMO_SHAPE, **shape)
        config.save_pretrained(os.path.join(folder, name))


def name_digest(source):
    name, _ = source
    return digest(name)


# --------------------------------------------------------------------------------------------------
# Optional: cache: what the teacher says of each token, a few bits an entry, on disk beside the
# token itself, so that training needs neither teacher nor dataset. Any number of workers fill a
# cache in mode cache; open_cache hands on rows like those of load_data, with their SparseTarget.
#
#     config.json                  the config that began it: the same command again is --config this
#     tokenizer/
#     manifest.json                all that shapes the content; once the cache is full, its size too
#     claims                       a locked byte for each chunk that somebody is at work on
#     train-00000000.safetensors   a chunk: a fixed range of sequences
#     eval-00000000.safetensors
#
# What is read is what was written, or is refused with the command that makes it again: a manifest
# has its digest, a chunk checksums of its rows and its table, and a mark of its cache and place.


# ---- what the manifest says


def describe_cache(cfg, tokenizer, splits, dtype):
    """The manifest of an empty cache. splits: the rows of each; those of train may be a stream."""
    vocabulary = vocabulary_of(tokenizer)
    if cfg.cache_method == "topk":
        check_top_k(cfg)
        size = min(cfg.cache_top_k, vocabulary)
        code_bits = 8
        extra_bits = 0
    else:
        size = cfg.cache_samples
        code_bits = (size - 1).bit_length()
        extra_bits = 12
    raw_rows = []
    if isinstance(splits["train"], datasets.IterableDataset):   # nobody has seen all of a stream
        raw_rows = list(itertools.islice(splits["train"], 64))
    rows_of_splits = [rows_digest(splits["train"]), rows_digest(splits["eval"])]
    revision, weights = identify_weights(cfg.teacher)
    begin = {}
    if bos_of(tokenizer) is not None:   # caches of tokenizers without one have no such entry
        begin["bos"] = bos_of(tokenizer)
    if cfg.packing != Config.packing:   # nor have caches from before there was the knob
        begin["packing"] = cfg.packing
    return begin | dict(
        teacher=cfg.teacher,
        revision=revision,
        weights=weights,
        dtype=dtype,
        vocabulary=vocabulary,
        tokenizer=digest(tokenizer.get_vocab(), tokenizer.chat_template),
        dataset=cfg.dataset,
        dataset_fingerprint=digest(rows_of_splits, raw_rows),
        eval_samples=cfg.eval_samples,
        seq_len=cfg.seq_len,
        temperature=cfg.temperature,
        method=cfg.cache_method,
        size=size,               # draws a token, or the likeliest tokens that are kept
        seed=cfg.seed,           # of the draws
        chunk=cfg.cache_chunk,   # sequences a file
        # sequences a forward: what shares a batch changes the last bits of logits
        group=max(1, 4096 // cfg.seq_len),
        bits=[(vocabulary - 1).bit_length(), code_bits, extra_bits])   # see below


def with_packing(manifest):
    """A manifest names it only where it is not the default."""
    return {"packing": Config.packing} | manifest


def check_top_k(cfg):
    """Ids of the model's padding are no tokens, but to ask for that many is no mistake."""
    entries = model_config(cfg.teacher, cfg, "teacher").get_text_config().vocab_size
    if cfg.cache_top_k > entries:
        raise UserError(f"cache_top_k is {cfg.cache_top_k}, teacher {cfg.teacher!r} has {entries} "
                        "tokens; lower it")


def content_digest(manifest):
    """Of what decides the content of a cache, which chunks bear; not of what it came out to."""
    return digest({name: manifest[name] for name in manifest if name not in NO_CONTENT})


# ---- what a row looks like on disk
#
# A row is three fields of numbers of fixed width, end to end, without a gap:
#
#     text      a token: its id and, in the lowest bit, whether it is a target     id_bits + 1
#               (packing documents: below that another, whether a document begins with it)
#     entries   an id that the teacher lists and, above it, a code               id_bits + code_bits
#     extra     a target: what else is kept of it                                      extra_bits
#
# A target is predicted from the token before it, so the first token of a row is never one.
#
# method sample: an entry for each distinct id that was drawn, in rising order, target after target;
#     code = times drawn - 1. extra = 256 * entropy, rounded, at most 4095.
# method topk: size + 1 entries a target, the likeliest first; the last, its id 0, is the mass of
#     all that are not listed. code = round(255 * sqrt(-log(p) / 24)), so that
#     p = exp(-24 * (code / 255)^2), but 0 for 255 (it would be 4e-11). log p is off by less than
#     0.0193 * sqrt(-log p) + 0.0001. extra: nothing.


class RowCounts(NamedTuple):
    """A line of a chunk's table, but for where the row ends; the sums of many."""
    rows: int       # 1; 0 for the filler
    tokens: int
    targets: int
    entries: int
    mass: float     # of the teacher's distribution that the entries hold, summed over targets
    checksum: int   # of the row's bytes


def holds_starts(manifest):
    """Whether each token has a bit for whether a document begins with it."""
    return manifest.get("packing") == "documents"


def pack_row(ids, is_target, starts, entries, extra, manifest):
    id_bits, code_bits, extra_bits = manifest["bits"]
    text = ids << 1 | is_target
    text_bits = id_bits + 1
    if holds_starts(manifest):
        text <<= 1
        text[starts] |= 1
        text_bits += 1
    return pack((text, text_bits), (entries, id_bits + code_bits), (extra, extra_bits))


def unpack_row(data, tokens, targets, entries, manifest):
    """Bytes, and how many numbers they hold -> a row like those of load_data, with its SparseTarget
    in arrays: manifest["size"] ids a target."""
    id_bits, code_bits, extra_bits = manifest["bits"]
    text_bits = id_bits + 1 + holds_starts(manifest)
    text, listed, extra = unpack(
        data, (tokens, text_bits), (entries, id_bits + code_bits), (targets, extra_bits))
    ids = listed & ((1 << id_bits) - 1)
    codes = listed >> id_bits
    if manifest["method"] == "sample":
        sparse = decode_samples(ids, codes, extra, manifest["size"])
    else:
        sparse = decode_topk(ids, codes, manifest["size"])
    row = {}
    if holds_starts(manifest):
        starts = np.flatnonzero(text % 2)
        if len(starts):   # rows that are held out have none
            row["starts"] = starts
        text >>= 1
    return row | {"input_ids": text >> 1, "targets": text % 2 == 1, "sparse": sparse}


def decode_samples(ids, codes, extra, size):
    """An id stands as often as it was drawn, each time with probability 1 / size."""
    targets = len(extra)
    return SparseTarget(
        ids=np.repeat(ids, codes + 1).reshape(targets, size),
        probs=np.full((targets, size), 1 / size, np.float32),
        rest=np.zeros(targets, np.float32),
        entropy=(extra / 256).astype(np.float32))


def decode_topk(ids, codes, size):
    """The entropy is that of what is listed and the rest, so that the KL is never below 0."""
    probs = np.exp(-24 * (codes / 255) ** 2) * (codes < 255)
    probs = probs.reshape(-1, size + 1)
    probs /= probs.sum(1, keepdims=True)   # takes out what all roundings of a target have in common
    entropy = -(probs * np.log(probs + 1e-30)).sum(1)
    probs = probs.astype(np.float32)
    return SparseTarget(
        ids=ids.reshape(-1, size + 1)[:, :-1],
        probs=probs[:, :-1],
        rest=probs[:, -1],
        entropy=entropy.astype(np.float32))


def pack(*fields):
    """(values, bits), ... -> bytes, each value in its bits, the highest first. Arrow's widths of 8,
    16 and 32 would take a third more."""
    parts = []
    for values, bits in fields:
        value_bytes = np.asarray(values, ">u4").view(np.uint8).reshape(-1, 4)
        value_bits = np.unpackbits(value_bytes, axis=1)   # [values, 32]
        parts.append(value_bits[:, 32 - bits:].ravel())
    return np.packbits(np.concatenate(parts)).tobytes()


def unpack(data, *fields):
    """Bytes, (how many values, bits), ... -> the values of each field."""
    ends = np.cumsum([count * bits for count, bits in fields])
    parts = np.split(np.unpackbits(np.frombuffer(data, np.uint8)), ends)   # one more: filler bits
    found = []
    for part, (count, bits) in zip(parts, fields):
        value_bits = np.pad(part.reshape(count, bits), ((0, 0), (32 - bits, 0)))
        found.append(np.packbits(value_bits).view(">u4").astype(np.int64))
    return found


# ---- filling


def fill_cache(cfg):
    """Fill what is missing of cache_dir. Any number of workers may, at any time, each of any number
    of ranks; the same command goes on where it was stopped."""
    refuse_foreign_folder(cfg.cache_dir)
    tokenizer = load_tokenizer(cfg, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    teacher = load_checked_teacher(cfg, tokenizer)
    get_teacher_targets = teacher_targets(teacher)
    splits = {"eval": eval_rows, "train": rows}
    sequences = None   # a stream has no length
    if isinstance(rows, datasets.Dataset):
        sequences = len(rows) + len(eval_rows)
    with explain_bad_disk(cfg.cache_dir), stop_signals() as stop_requests:
        manifest = begin_cache(cfg, tokenizer, splits)
        all_sum(0)   # nobody goes on before there is a cache
        probed = eval_rows
        if sequences and holds_starts(manifest):   # whose rows are longer than those held out
            probed = rows
        probe = [probed[i] for i in range(min(len(probed), manifest["group"]))]
        with progress("judging the size of the cache by a few sequences"):
            packed = pack_teacher(get_teacher_targets, probe, 0, manifest)
        total, done = plan_cache(cfg, packed, sequences)
        with tqdm(total=total, initial=done, disable=RANK != 0, unit="tok", unit_scale=True) as bar:
            while True:
                paths = []
                chunks = missing_chunks(
                    cfg.cache_dir, splits, manifest, make_encoder(cfg, tokenizer), paths)
                forwards = write_chunks(chunks, get_teacher_targets, manifest)
                stopped = write_in_step(forwards, get_teacher_targets, manifest, stop_requests, bar)
                missing, = all_sum(sum(not os.path.exists(path) for path in paths))
                if stopped or not missing:
                    break
                time.sleep(1)   # another worker has a chunk; it may die with it
        if stopped:
            print0("stopped; the same command goes on")
        elif RANK == 0:
            finish_cache(cfg, manifest, paths)


def refuse_foreign_folder(cache_dir):
    """A folder that holds something else under our names, such as a model's, is not touched."""
    config = os.path.join(cache_dir, "config.json")   # what a cache begins with
    refuse_foreign(config, is_cache_config)
    names = [os.path.join(cache_dir, name) for name in ("tokenizer", "manifest.json")]
    for path in [*names, *chunks_in(cache_dir)]:
        refuse_foreign(path, lambda _: os.path.exists(config))


def is_cache_config(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)["mode"] == "cache"


def chunks_in(cache_dir):
    """Paths of what is named like a chunk."""
    paths = []
    for split in ("eval", "train"):
        name = f"{split}-" + 8 * "[0-9]" + ".safetensors"
        paths += sorted(glob.glob(os.path.join(glob.escape(cache_dir), name)))
    return paths


def is_chunk(path):
    """Of any cache."""
    with safetensors.safe_open(path, "numpy") as file:
        return "chunk" in file.metadata()


def begin_cache(cfg, tokenizer, splits):
    """-> the manifest. A new cache is begun; one that is there must be of the same content."""
    manifest = describe_cache(cfg, tokenizer, splits, str(compute_dtype(cfg)))
    os.makedirs(cfg.cache_dir, exist_ok=True)
    refuse_foreign_folder(cfg.cache_dir)   # new/../model leads to model only where new is
    manifest_path = os.path.join(cfg.cache_dir, "manifest.json")
    if os.path.exists(manifest_path) and not cfg.force_regenerate:
        here = with_packing(manifest)
        old = with_packing(read_any_manifest(cfg.cache_dir))
        old = {name: old.get(name) for name in here}   # less what finish_cache added
        refuse_changes(old, here, cfg.cache_dir, "empty it: --force_regenerate")
    elif RANK == 0:
        if cfg.force_regenerate:
            empty_cache(cfg.cache_dir)
        write_json(dataclasses.replace(cfg, force_regenerate=False),
                   os.path.join(cfg.cache_dir, "config.json"))
        folder = os.path.join(cfg.cache_dir, "tokenizer")
        # what the tokenizer of a cache before may have had, and this one has not
        remove_files(folder, ["chat_template.jinja", "added_tokens.json",
                              "special_tokens_map.json"])
        tokenizer.save_pretrained(folder)
        begun = manifest | {"tokenizer_files": tokenizer_checksums(folder)}
        write_manifest(begun, cfg.cache_dir)   # last: from here on there is a cache
    return manifest


def empty_cache(cache_dir):
    """Of its chunks; of no other file, whatever its name."""
    paths = chunks_in(cache_dir)
    for path in paths:
        refuse_foreign(path, is_chunk)
    for path in paths:
        os.remove(path)


def tokenizer_checksums(folder):
    """{file: CRC-32} of what is kept of the tokenizer."""
    return {name: checksum(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


def write_manifest(manifest, cache_dir):
    marked = manifest | {"digest": digest(manifest)}   # by which a change is known
    write_json(marked, os.path.join(cache_dir, "manifest.json"))


def plan_cache(cfg, packed, sequences):
    """Say what it will take, judged by a few packed rows; refused without room. sequences: of all
    splits, None for a stream. -> tokens in all (None for a stream), tokens done."""
    counts = sum_counts([row_counts for _, row_counts in packed])
    bytes_per_token = sum(len(data) for data, _ in packed) / counts.tokens
    total = None
    if sequences is not None:
        total = int(counts.tokens / counts.rows * sequences)
    written = sum(os.path.getsize(path) for path in chunks_in(cfg.cache_dir))
    need = max(0, (total or 0) * bytes_per_token - written) / 1e9
    free = shutil.disk_usage(cfg.cache_dir).free / 1e9
    to_write = f"{need:.3f} GB to write" if total else "a stream has no length"
    print0(f"cache {cfg.cache_dir}: about {bytes_per_token:.1f} bytes a token "
           f"({counts.entries / counts.targets:.1f} ids that hold "
           f"{counts.mass / counts.targets:.1%} of the teacher's mass), {to_write}, "
           f"{free:.1f} GB free")
    if cfg.temperature > 1:
        print0("WARNING: above temperature 1 a cache grows and keeps less: see the share")
    if need > free:
        raise UserError(f"cache_dir {cfg.cache_dir!r} needs {need:.3f} GB, {free:.3f} are free: "
                        "make room")
    return total, min(int(written / bytes_per_token), total or 0)


def sum_counts(many):
    return RowCounts(*(sum(column) for column in zip(*many)))


def write_in_step(forwards, get_teacher_targets, manifest, stop_requests, bar):
    """Go through forwards until no rank has any left, every rank one at a time: a sharded teacher
    needs them all. -> whether a signal stopped it."""
    while True:
        tokens = 0
        problem = None
        try:
            tokens = next(forwards, 0)
        except OSError as e:
            problem = e
        if not tokens:   # the others may still need this rank
            pack_teacher(get_teacher_targets, [], 0, manifest)
        all_tokens, stop, failed = all_sum(tokens, len(stop_requests), problem is not None)
        if failed:
            raise problem or OSError("another rank could not write")
        bar.update(int(all_tokens))
        if stop:
            return True
        if not all_tokens:
            return False


def missing_chunks(cache_dir, splits, manifest, encode_columns, paths):
    """Claim the chunks that are not there and that no living worker has, one after the other
    -> (path, rows, number of the first row), ...; the paths of all chunks are added to paths.

    A stream is cut into blocks of raw rows, each packed on its own, so that nobody has to tokenise
    what another worker does. Numbers only have to be the same for every worker: those of train
    begin at 2^60, and those of a stream's blocks, which hold any number of rows, 2^32 apart."""
    chunk_size = manifest["chunk"]
    content = content_digest(manifest)
    with open(os.path.join(cache_dir, "claims"), "a") as claims:
        for split_number, (split, rows) in enumerate(splits.items()):
            split_start = split_number << 60
            stored = isinstance(rows, datasets.Dataset)
            blocks = range(0, len(rows), chunk_size) if stored else rows.iter(chunk_size)
            for chunk, block in enumerate(blocks):
                path = os.path.join(cache_dir, f"{split}-{chunk:08d}.safetensors")
                paths.append(path)
                if not claim(claims, split_start + chunk):
                    continue
                if os.path.exists(path):
                    read_chunk(path, content)   # refused where it is another
                    continue
                first = split_start + chunk * chunk_size
                if stored:
                    columns = rows[block:block + chunk_size]
                else:
                    columns = encode_columns(block)
                    first += chunk << 32
                yield path, rows_from_columns(columns), first


def claim(claims, byte):
    """Lock one byte of an open file, which need not be that long -> whether no other process has.
    Closing the file gives it back, and so does the kernel when a process dies."""
    try:
        fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except BlockingIOError:
        return False
    return True


def write_chunks(chunks, get_teacher_targets, manifest):
    """Write the chunks of missing_chunks; yields after each forward, its number of tokens."""
    for path, rows, first in chunks:
        packed = []
        for start in range(0, len(rows), manifest["group"]):
            group = rows[start:start + manifest["group"]]
            packed += pack_teacher(get_teacher_targets, group, first + start, manifest)
            yield sum(len(row["input_ids"]) for row in group)
        write_chunk(path, packed, content_digest(manifest))


def write_chunk(path, packed, content):
    """A chunk appears whole or not at all. Safetensors: mapped into memory, sliced, no code in it.

    rows     the bytes of all rows, end to end
    table    a line a row: where it ends in rows, then its RowCounts
    metadata which chunk of which cache this is, and the checksum of the table
    """
    filler = b"-"   # line 0: all there is of a chunk without rows, and where the first row begins
    packed = [(filler, RowCounts(0, 0, 0, 0, 0, zlib.crc32(filler))), *packed]
    ends = np.cumsum([len(data) for data, _ in packed])
    table = np.column_stack([ends, [counts for _, counts in packed]])
    row_bytes = b"".join(data for data, _ in packed)
    tensors = {"rows": np.frombuffer(row_bytes, np.uint8), "table": table}
    # one value: safetensors writes several in any order
    metadata = {"chunk": f"{chunk_mark(path, content)} {zlib.crc32(table)}"}
    with open(path + ".tmp", "wb") as f:
        f.write(safetensors.numpy.save(tensors, metadata))
    sync(f.name)
    os.replace(f.name, path)


def chunk_mark(path, content):
    """Its split and number, as it is named, and the content_digest of its cache."""
    return f"{os.path.basename(path).removesuffix('.safetensors')} of cache {content}"


@torch.no_grad()
def pack_teacher(get_teacher_targets, rows, first, manifest):
    """One teacher forward -> (bytes, RowCounts) a row. first: the number of the first row, by which
    its draws are the same whoever makes them. Without rows: only takes part in the forward."""
    hidden_ND, head = get_teacher_targets(collate(rows))   # N: the targets of all rows
    packed = []
    for number, row in enumerate(rows, first):
        ids = np.asarray(row["input_ids"])
        is_target = np.ones(len(ids), bool)   # of plain text, every token
        if row["targets"] is not None:
            is_target = np.asarray(row["targets"])
        targets = int(is_target[1:].sum())
        row_hidden_ND, hidden_ND = hidden_ND.tensor_split([targets])
        uniform_NS = draw_uniform(targets, manifest["size"], manifest["seed"], number)
        entries, extra, mass = teacher_entries(row_hidden_ND, head, uniform_NS, manifest)
        data = pack_row(ids, is_target, row.get("starts", []), entries, extra, manifest)
        counts = RowCounts(1, len(ids), targets, len(entries), mass, zlib.crc32(data))
        packed.append((data, counts))
    return packed


def draw_uniform(targets, size, seed, number):
    """-> [targets, size] in [0, 1), the same for a row of this number on any device."""
    generator = torch.Generator().manual_seed(int(digest(seed, number), 16) >> 1)
    return torch.rand(targets, size, dtype=torch.float64, generator=generator).to(DEVICE)


def teacher_entries(hidden_ND, head, uniform_NS, manifest):
    """What is kept of the teacher at the targets of a row -> entries, extra (see above), mass."""
    id_bits, _, _ = manifest["bits"]
    # 16 bytes an entry of [C, V]: log p, p, and the running sum of p in fp64
    tokens_at_once = max(1, LOGITS_BUDGET // (16 * manifest["vocabulary"]))
    entries = []
    extra = []
    masses = []
    hidden_parts = hidden_ND.split(tokens_at_once)
    for hidden_CD, uniform_CS in zip(hidden_parts, uniform_NS.split(tokens_at_once)):
        raw_CV = nn.functional.linear(hidden_CD, head.weight, head.bias)
        raw_CV = raw_CV[:, :manifest["vocabulary"]]   # without the padding
        logits_CV, _ = scale_and_softcap(raw_CV, head.scale, head.softcap)
        logp_CV = torch.log_softmax(logits_CV / manifest["temperature"], -1)
        if manifest["method"] == "sample":
            ids, codes, part_extra, mass = sample_entries(logp_CV, uniform_CS)
        else:
            ids, codes, part_extra, mass = topk_entries(logp_CV, manifest["size"])
        entries.append((ids + (codes.long() << id_bits)).cpu().numpy())
        extra.append(part_extra.cpu().numpy())
        masses.append(mass.item())
    return np.concatenate(entries), np.concatenate(extra), np.sum(masses)


def sample_entries(logp_CV, uniform_CS):
    """S draws a token -> distinct ids [E] and their codes [E], entropy code [C], their mass."""
    vocabulary = logp_CV.shape[1]
    cdf_CV = logp_CV.exp().cumsum(-1, dtype=torch.float64)
    heights_CS = uniform_CS * cdf_CV[:, -1:]   # which is not exactly 1
    draws_CS = torch.searchsorted(cdf_CV, heights_CS, right=True).clamp_max(vocabulary - 1)
    draws_CS = draws_CS.sort(-1)[0]
    # the entropy as these draws show it: student = teacher logs a KL of 0, not of noise around 0
    entropy_C = -logp_CV.gather(-1, draws_CS).mean(-1)
    extra_C = (entropy_C * 256).round().clamp_max(4095)
    line_C1 = torch.arange(len(draws_CS), device=draws_CS.device)[:, None]
    # places in [C, V] end to end: what two tokens have drawn stays apart
    places_E, times_E = torch.unique_consecutive(
        draws_CS + vocabulary * line_C1, return_counts=True)
    mass = logp_CV.flatten()[places_E].exp().sum()
    return places_E % vocabulary, times_E - 1, extra_C, mass


def topk_entries(logp_CV, size):
    """The likeliest K = size ids a token and the rest -> ids and codes [C * (K + 1)], nothing, the
    mass without the rest."""
    logp_CK, ids_CK = logp_CV.topk(size)
    rest_C1 = (1 - logp_CK.exp().sum(-1, keepdim=True)).clamp_min(0)
    logp_CE = torch.cat([logp_CK, rest_C1.log()], -1)
    codes_CE = logp_CE.div(-24).sqrt().mul(255).round().clamp_max(255)
    ids_CE = nn.functional.pad(ids_CK, (0, 1))
    nothing_C = torch.zeros(len(logp_CV))   # of 0 bits
    return ids_CE.flatten(), codes_CE.flatten(), nothing_C, logp_CK.exp().sum()


NO_CONTENT = ("tokenizer_files", "rows", "tokens", "bytes_per_token", "mass_kept", "chunks")


def finish_cache(cfg, manifest, paths):
    """Read back the tables of all workers' chunks; with their sums the manifest is complete."""
    chunk_counts = []
    content = content_digest(manifest)
    with progress("reading the cache back", len(paths), unit="chunk") as bar:
        for path in paths:
            table, _ = read_chunk(path, content)
            chunk_counts.append(RowCounts(*table[:, 1:].sum(0).tolist()))
            bar.update()
    counts = sum_counts(chunk_counts)
    rows_per_chunk = {"train": [], "eval": []}
    for path, in_chunk in zip(paths, chunk_counts):
        split, _ = os.path.basename(path).split("-")
        rows_per_chunk[split].append(int(in_chunk.rows))
    bytes_per_token = sum(os.path.getsize(path) for path in paths) / counts.tokens
    mass_kept = counts.mass / counts.targets
    complete = read_any_manifest(cfg.cache_dir) | dict(
        rows=int(counts.rows), tokens=int(counts.tokens), bytes_per_token=bytes_per_token,
        mass_kept=mass_kept, chunks=rows_per_chunk)
    write_manifest(complete, cfg.cache_dir)
    print0(f"cache {cfg.cache_dir}: {counts.rows:,.0f} sequences, {counts.tokens:,.0f} tokens of "
           f"{bytes_per_token:.1f} bytes, {mass_kept:.1%} of the teacher's mass is kept")


# ---- reading

TAKEN_FROM_CACHE = ("seq_len", "temperature", "packing")


def take_from_cache(cfg):
    """-> cfg of a training run with the cache's value of what was not typed."""
    manifest = with_packing(read_manifest(cfg.cache_dir))
    taken = {name: manifest[name] for name in TAKEN_FROM_CACHE if name not in cfg.given}
    resolved = dataclasses.replace(cfg, **taken)
    resolved.given = cfg.given   # is no field, which replace would carry over
    return resolved


def describe_cache_use(cfg):
    """What the plan of a training run says of its teacher."""
    words = f"teacher: cache {cfg.cache_dir}"
    taken = [name for name in TAKEN_FROM_CACHE if name not in cfg.given]
    if "packing" in taken and cfg.packing == Config.packing:
        taken.remove("packing")
    if taken:
        values = " and ".join(f"{name} {getattr(cfg, name)}" for name in taken)
        words += f", which sets {values}"
    return words


def describe_targets(cfg):
    """What a model card says of them."""
    manifest = read_manifest(cfg.cache_dir)
    if manifest["method"] == "topk":
        return f"kept as its {manifest['size']} likeliest tokens"
    return f"kept as {manifest['size']} draws a token"


def open_cache(cfg):
    """-> train rows, eval rows, tokenizer, manifest; refused where the run does not fit what is
    stored."""
    manifest = read_manifest(cfg.cache_dir)
    refuse_other_targets(cfg, manifest)
    refuse_other_data(cfg)
    tokenizer = read_tokenizer(cfg, manifest)
    if manifest.get("bos") != bos_of(tokenizer):
        raise UserError(f"cache_dir {cfg.cache_dir!r} was filled by a version whose blocks "
                        "of text do not begin with the tokenizer's BOS; its mode cache command "
                        "with --force_regenerate fills it again")
    student_tokenizer = load_tokenizer(cfg, cfg.student) or tokenizer
    compare_tokenizers(student_tokenizer, tokenizer, cfg.tokenizer or cfg.student,
                       f"{cfg.cache_dir}: {manifest['teacher']}")
    rows = CacheRows(cfg.cache_dir, "train", manifest)
    eval_rows = CacheRows(cfg.cache_dir, "eval", manifest, at_most=cfg.eval_samples)
    return rows, eval_rows, tokenizer, manifest


def load_with_cache(cfg):
    """load_everything, where the cache is the dataset and the teacher."""
    rows, eval_rows, tokenizer, _ = open_cache(cfg)
    student = load_checked_student(cfg, tokenizer)
    return tokenizer, rows, eval_rows, student, None


class CacheRows:
    """The rows of a split, by number: nothing is read but what is asked for."""

    def __init__(self, cache_dir, split, manifest, at_most=math.inf):
        self.prefix = os.path.join(cache_dir, split)
        self.manifest = manifest
        self.content = content_digest(manifest)
        self.starts = np.cumsum([0, *manifest["chunks"][split]])   # of chunks; the last: the end
        self.length = int(min(self.starts[-1], at_most))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        chunk = int(np.searchsorted(self.starts, i, "right")) - 1
        line = i - int(self.starts[chunk]) + 1   # of its table, which begins with the filler
        table, data = read_chunk(f"{self.prefix}-{chunk:08d}.safetensors", self.content, line)
        counts = RowCounts(*table[line, 1:])
        return unpack_row(
            data, int(counts.tokens), int(counts.targets), int(counts.entries), self.manifest)


def read_chunk(path, content, line=0):
    """-> its table, the bytes of the row of that line (0: the filler); both as they were written.
    content: content_digest of the cache. Mapped anew each time, 50 us: nothing has to be kept."""
    cache_dir = os.path.dirname(path)
    with reading(f"cache chunk {path!r} is damaged or another", again(cache_dir, path)):
        with safetensors.safe_open(path, "numpy") as file:
            mark, _, table_checksum = file.metadata()["chunk"].rpartition(" ")
            if mark != chunk_mark(path, content):
                raise ValueError(f"it is {mark}, not {chunk_mark(path, content)}")
            table = file.get_tensor("table")
            start = int(table[line - 1, 0]) if line > 0 else 0
            data = file.get_slice("rows")[start:int(table[line, 0])].tobytes()
            if zlib.crc32(table) != int(table_checksum) or zlib.crc32(data) != table[line, -1]:
                raise ValueError("wrong checksum")
    return table, data


def again(cache_dir, path):
    """The command that mends a file of a cache: of the cache as it lies here, whatever folder its
    config names, since it may be a copy."""
    config = os.path.join(cache_dir, "config.json")
    return (f"; to make it, and only it, again: rm {shlex.quote(path)}; python simple_distill.py "
            f"--config {shlex.quote(config)} --cache_dir {shlex.quote(cache_dir)}")


def read_manifest(cache_dir):
    """Of a full cache."""
    if not os.path.exists(os.path.join(cache_dir, "manifest.json")):
        raise UserError(f"{cache_dir!r} holds no cache; mode cache begins one")
    manifest = read_any_manifest(cache_dir)
    if "chunks" not in manifest:
        raise UserError(f"{cache_dir!r} holds no finished cache (it was begun, not finished); the "
                        "same mode cache command finishes it")
    return manifest


def read_any_manifest(cache_dir):
    """Of a cache that was begun, at least. Its values are as they were written, all of them."""
    path = os.path.join(cache_dir, "manifest.json")
    with reading(f"cache manifest {path!r} is damaged or edited", again(cache_dir, path)):
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        written = manifest.pop("digest")
        if digest(manifest) != written:
            raise ValueError("it is not what was written")
    return manifest


def read_tokenizer(cfg, manifest):
    """As it was when the cache was filled; code in it runs only where this run allows it."""
    folder = os.path.join(cfg.cache_dir, "tokenizer")
    what = f"cache tokenizer {folder!r} is damaged, edited or not allowed"
    # without a manifest the cache is begun anew: its tokenizer is saved, its chunks are kept
    with reading(what, again(cfg.cache_dir, os.path.join(cfg.cache_dir, "manifest.json"))):
        for name, crc in manifest["tokenizer_files"].items():
            if checksum(os.path.join(folder, name)) != crc:
                raise ValueError(f"{name} is not what was written")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)


def read_cache_config(cache_dir):
    path = os.path.join(cache_dir, "config.json")
    with reading(f"cache config {path!r} is damaged", "; choose another --cache_dir"):
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))


# ---- refusals


def refuse_other_targets(cfg, manifest):
    """What is stored was computed by one teacher, at one temperature, on rows of one length."""
    here = dict(temperature=cfg.temperature, seq_len=cfg.seq_len, packing=cfg.packing,
                teacher=cfg.teacher)
    same_path = os.path.realpath(cfg.teacher) == os.path.realpath(manifest["teacher"])
    if cfg.teacher == "demo" or same_path:   # demo: the default, none was named
        here["teacher"] = manifest["teacher"]
    there = {name: with_packing(manifest)[name] for name in here}
    refuse_changes(there, here, cfg.cache_dir, "fill another --cache_dir")


def refuse_other_data(cfg):
    """The cache is the dataset: what it has decided may be left out or said again."""
    # the first two are compared above; the others do not decide what the rows hold
    passed_over = ("seq_len", "packing", "eval_samples", "shuffle_buffer", "num_proc")
    here = {}
    for name in knobs_in("data"):
        if name in passed_over:
            continue
        # a config.json names every knob: one that has its default decides nothing
        if name in cfg.given and getattr(cfg, name) != getattr(Config, name):
            here[name] = getattr(cfg, name)
    decided = read_cache_config(cfg.cache_dir)
    there = {name: decided.get(name) for name in here}
    refuse_changes(there, here, cfg.cache_dir, "leave it out")


@contextlib.contextmanager
def explain_bad_disk(folder):
    try:
        yield
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"cache_dir {folder!r} cannot be read or written ({one_line(e)}). Finished "
                        "chunks stay; make room or mend it, and the same command goes on") from e


# --------------------------------------------------------------------------------------------------
# Optional: blockwise: block i of the student learns to end where its teacher block ends, seen
# through a linear stitch to the teacher's width; then norm and head learn the teacher's logits;
# then plain distillation follows. train_blockwise() is a sibling of train(), with several stages.


def train_blockwise(cfg):
    """Block by block, then the head, then as usual -> True when done, False when stopped."""
    run = start_run(cfg)
    if run is None:
        return True
    stages = block_stages(run)
    blocks_end = max(stage.end for stage in stages if stage.mean_over == "real")
    if cfg.dry_run:
        return rehearse(run, stages)
    with begin(run, stages):
        if "block_figures" not in run.notes:
            measure_blocks(run)
        for stage in stages:
            if run.step >= stage.end:   # done before a resume
                continue
            if not train_stage(run, stage):
                break
            if stage.end == blocks_end:
                measure_blocks(run)
                if cfg.initialize_head_from_teacher and head_may_change(run):
                    initialize_head(run.student, run.teacher)
            evaluate_and_save(run, stage)
    if not run.stopped:
        print0(block_table(run))
    return finish(run)


# ---- which block learns from which, and when


def match_blocks(cfg, student_config, teacher_config):
    """-> {block of the student: block of the teacher}, refused where they cannot be matched."""
    student_shape = student_config.get_text_config()
    teacher_shape = teacher_config.get_text_config()
    depth = student_shape.num_hidden_layers
    teacher_depth = teacher_shape.num_hidden_layers
    if depth > teacher_depth:
        raise UserError(f"blockwise: the student has {depth} layers, the teacher only "
                        f"{teacher_depth}; take a shallower student")
    if student_shape.hidden_size != teacher_shape.hidden_size and not cfg.use_stitching_layers:
        raise UserError(f"blockwise: student width {student_shape.hidden_size} and teacher width "
                        f"{teacher_shape.hidden_size} differ, that needs use_stitching_layers")
    for name in ("epochs_per_block", "lr_per_block", "wd_per_block", "max_grad_norm_per_block"):
        count = len(getattr(cfg, name))
        if count not in (1, depth):
            raise UserError(f"{name} has {count} values; give one, or one for each of the "
                            f"student's {depth} blocks")
    return {i: round((i + 1) * teacher_depth / depth) - 1 for i in range(depth)}


def block_stages(run):
    """-> [Stage, ...]: one a block, or one for all of them (block_input teacher), then norm and
    head, then plain distillation."""
    cfg = run.cfg
    pairs = match_blocks(cfg, run.student.model.config, run.teacher.model.config)
    check_head_is_free(cfg, run.student.model)
    parts = parameters_by_part(run.student)
    if cfg.block_input == "teacher":
        stages = [stage_of_all_blocks(run, pairs, parts)]
    else:
        stages = []
        for block in pairs:
            first_step = stages[-1].end if stages else 0
            stages.append(stage_of_block(run, pairs, parts, block, first_step))
    if cfg.train_lm_head:
        stages.append(stage_of_head(run, parts, first_step=stages[-1].end))
    multiply_rates(stages, multipliers_of_student(run))
    distillation = distillation_stage(run, first_step=stages[-1].end)
    if distillation.steps:
        stages.append(distillation)
    return stages


def parameters_by_part(student):
    """-> {block number, "head" or "embeddings": [parameters]}. A block's stitches belong to it, the
    final norm to the head, a head that is tied to the embeddings to them."""
    model = student.model
    path, _ = layers_of(model)
    head = {*model.get_output_embeddings().parameters(), *final_norm(model).parameters()}
    head.discard(model.get_input_embeddings().weight)
    parts = collections.defaultdict(list)
    for name, p in student.named_parameters():
        block = re.match(rf"(?:model\.{path}\.|stitches\.\D+)(\d+)\.", name)
        if block:
            parts[int(block[1])].append(p)
        elif p in head:
            parts["head"].append(p)
        else:
            parts["embeddings"].append(p)
    return parts


def check_head_is_free(cfg, model):
    """A head that is to be trained must not be the embeddings: the blocks build on those."""
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied and (cfg.train_lm_head or cfg.initialize_head_from_teacher):
        raise UserError(f"{type(model).__name__} ties its head whatever its config says: "
                        "--train_lm_head false --initialize_head_from_teacher false")


def stage_of_block(run, pairs, parts, block, first_step):
    """A block alone on the student's own stream; the first one also learns the embeddings, and with
    freeze_previous_blocks false each also goes on with what stands before it."""
    cfg = run.cfg
    trained = [block]
    if block == 0 or not cfg.freeze_previous_blocks:
        trained += ["embeddings", *range(block)]
    rate = one_of(cfg.lr_per_block, block)
    loss_fn, get_teacher_targets = make_block_loss(cfg, run.student, run.teacher,
                                                   {block: pairs[block]})
    return Stage(
        name=f"block {block}", first_step=first_step,
        steps=steps_of_epochs(run, one_of(cfg.epochs_per_block, block)), loss_fn=loss_fn,
        get_teacher_targets=get_teacher_targets,
        rates={p: rate for part in trained for p in parts[part]},
        weight_decay=one_of(cfg.wd_per_block, block),
        max_grad_norm=one_of(cfg.max_grad_norm_per_block, block), mean_over="real")


def stage_of_all_blocks(run, pairs, parts):
    """All blocks at once, each fed by the teacher: none sees another, each is clipped alone."""
    cfg = run.cfg
    rates = {}
    clipped_alone = []
    for block in pairs:
        rate = one_of(cfg.lr_per_block, block)
        rates |= {p: rate for p in parts[block]}
        max_norm = one_of(cfg.max_grad_norm_per_block, block)
        if max_norm:
            clipped_alone.append((parts[block], max_norm))
    loss_fn, get_teacher_targets = make_block_loss(cfg, run.student, run.teacher, pairs)
    return Stage(
        name="blocks", first_step=0, steps=steps_of_epochs(run, cfg.epochs_per_block[0]),
        loss_fn=loss_fn, get_teacher_targets=get_teacher_targets, rates=rates,
        weight_decay=cfg.wd_per_block[0], max_grad_norm=0, clipped_alone=clipped_alone,
        mean_over="real")


def stage_of_head(run, parts, first_step):
    """Norm and head learn the teacher's logits, or the labels, on top of finished blocks."""
    cfg = run.cfg
    alpha = 1 - cfg.logit_loss_weight
    divergence = cfg.logit_loss_type
    if cfg.logit_loss_type == "ce":
        alpha = 1.0
    if cfg.logit_loss_type == "kl_div":
        divergence = "forward"
    return Stage(
        name="head", first_step=first_step, steps=steps_of_epochs(run, cfg.lm_head_epochs),
        loss_fn=functools.partial(distil_loss, alpha=alpha, divergence=divergence,
                                  temperature=cfg.logit_loss_temperature,
                                  vocabulary=vocabulary_of(run.tokenizer)),
        get_teacher_targets=teacher_targets(run.teacher if alpha < 1 else None),
        rates={p: cfg.lm_head_lr for p in parts["head"]}, weight_decay=cfg.lm_head_wd,
        max_grad_norm=cfg.lm_head_max_grad_norm)


def multipliers_of_student(run):
    """{parameter: learning-rate multiplier}, 0: frozen. Stitches are no part of the student."""
    return learning_rates(
        run.student.model.named_parameters(remove_duplicate=False),
        parse_multipliers(run.cfg.lr_multipliers), run.cfg.default_lr_multiplier,
        learning_rate=1.0)


def multiply_rates(stages, multipliers):
    """What is frozen is frozen in every phase; a stitch has the rate of its block."""
    for stage in stages:
        stage.rates = {p: rate * multipliers.get(p, 1.0) for p, rate in stage.rates.items()}
        if not any(stage.rates.values()):
            raise UserError(f"lr_multipliers freeze all that the stage {stage.name!r} of blockwise "
                            "would train; leave something of it free, or for the head "
                            "--train_lm_head false")


def head_may_change(run):
    multipliers = multipliers_of_student(run)
    if all(multipliers[p] for p in parameters_by_part(run.student)["head"]):
        return True
    print0("blockwise: lr_multipliers freeze the student's norm or head, which stay as they are in "
           "place of the teacher's")
    return False


def one_of(values, block):
    """One value for all blocks, or one a block."""
    return values[block] if len(values) > 1 else values[0]


def steps_of_epochs(run, epochs):
    return max(1, math.ceil(epochs * run.steps_per_epoch))


# ---- hidden states at both ends of a block


class RecordedLayer:
    """Stands in place of a decoder layer: feeds it another input if there is one, and keeps both
    ends, also when activations are recomputed, as hooks would not."""

    def __init__(self, layer, other_input):
        self.layer = layer
        self.other_input = other_input

    def __getattr__(self, name):   # models ask their layers for attention_type and the like
        return getattr(self.layer, name)

    def __call__(self, hidden_states, *args, **kwargs):
        layer_input = hidden_states if self.other_input is None else self.other_input
        output = self.layer(layer_input, *args, **kwargs)
        self.recorded = layer_input, output[0] if isinstance(output, tuple) else output
        return output


def around_blocks(model, batch, blocks, other_inputs):
    """Runs inside either root: -> {block: (hidden before it, hidden after it)}, [B, T, D] each.
    other_inputs: {block: hidden states that it is fed}. Layers after the last block do not run."""
    path, layers = layers_of(model)
    parent_path, _, name = path.rpartition(".")
    recorded = []
    for i, layer in enumerate(layers[:max(blocks) + 1]):
        recorded.append(RecordedLayer(layer, other_inputs.get(i)))
    # an entry in __dict__ hides the registered layers for the time of one forward
    attributes = vars(model.get_submodule(parent_path))
    attributes[name] = recorded
    hidden_states(model, batch.input_ids, batch.position_ids)
    del attributes[name]
    return {i: recorded[i].recorded for i in blocks}


def hidden_error(student_ND, teacher_ND, kind, temperature):
    """-> [N]. The gradient is exactly 0 where both agree: Adam makes whole steps of noise."""
    if kind == "kl_div":   # over the width; the last two terms cancel, but for rounding
        logp = torch.log_softmax(student_ND.float() / temperature, -1)
        logq = torch.log_softmax(teacher_ND.float() / temperature, -1)
        terms = logq.exp() * (logq - logp) - logq.exp() + logp.exp()
        return temperature ** 2 * terms.sum(-1)
    if kind == "mse":
        return (student_ND.float() - teacher_ND.float()).square().mean(-1)
    if kind == "relative":   # |s - t|^2 / |t|^2: a sink, 100 times as large, weighs as any token
        missed_N = (student_ND.float() - teacher_ND.float()).square().mean(-1)
        size_N = teacher_ND.float().square().mean(-1)
        # a state of zeros (padding_idx) has no size: it counts nothing
        return (missed_N / size_N.clamp_min(1e-8)).masked_fill(size_N < 1e-8, 0.0)
    # 1 - cos, as half the squared distance of unit vectors
    student_ND = nn.functional.normalize(student_ND.float(), dim=-1)
    teacher_ND = nn.functional.normalize(teacher_ND.float(), dim=-1)
    return (student_ND - teacher_ND).square().sum(-1) / 2


def make_block_states(cfg, student, teacher, pairs):
    """-> block_states and get_teacher_targets: block_states yields, for one block after the other,
    the student's states, stitched to the teacher's width, and the teacher's: [N, D] each, without
    padding."""
    fed_by_teacher = cfg.block_input == "teacher"

    def get_teacher_targets(batch):
        with torch.no_grad():
            return teacher(around_blocks, batch, pairs.values(), {})

    def block_states(model, batch, teacher_states):
        dtype = model.get_input_embeddings().weight.dtype

        def stitch(name, hidden):
            hidden = hidden.to(dtype)
            if name in student.stitches:
                hidden = student.stitches[name](hidden)
            return hidden

        def real(hidden_BTD):   # without padding
            return hidden_BTD.flatten(0, 1)[batch.real]

        inputs = {}
        if fed_by_teacher:
            for i, j in pairs.items():
                inputs[i] = stitch(f"down{i}", teacher_states[j][0])
        student_states = around_blocks(model, batch, pairs, inputs)
        for i, j in pairs.items():
            yield stitch(f"up{i}", real(student_states[i][1])), real(teacher_states[j][1])

    return block_states, get_teacher_targets


def make_block_loss(cfg, student, teacher, pairs):
    """-> loss_fn and get_teacher_targets of a Stage that trains the blocks in pairs. loss_fn hands
    on the error of each block after loss, ce and kl (which are 0)."""
    block_states, get_teacher_targets = make_block_states(cfg, student, teacher, pairs)

    def loss_fn(model, batch, teacher_states, denominator):
        errors = []
        for student_ND, teacher_ND in block_states(model, batch, teacher_states):
            error_N = hidden_error(student_ND, teacher_ND, cfg.distill_loss_type,
                                   cfg.distill_loss_temperature)
            errors.append(error_N.sum() / denominator)
        ce, kl = errors[0].new_zeros(2)
        return sum(errors), ce, kl, *errors

    return loss_fn, get_teacher_targets


# ---- how near the blocks are


ORDINARY = 3   # times the median |t| of its batch: a state above that is a sink's


def measure_blocks(run):
    """How far every block is on held-out rows, now: kept in run.notes, logged and shown."""
    figures = judge_blocks(run)
    run.notes.setdefault("block_figures", []).append(figures)
    print0(block_table(run))
    entry = {}
    for i, of_block in enumerate(figures):
        entry |= {f"block/{i}/{name}": value for name, value in of_block.items()}
    log(run, entry | {"block/step": run.step})


@torch.no_grad()
def judge_blocks(run):
    """-> a dict a block: loss, the mean error of a token; median, that of the median token;
    explained, the share of the teacher's variance that the student has at ordinary positions."""
    cfg = run.cfg
    pairs = match_blocks(cfg, run.student.model.config, run.teacher.model.config)
    block_states, get_teacher_targets = make_block_states(cfg, run.student, run.teacher, pairs)

    def judge(model, batch, teacher_states):
        errors = []
        sums = []
        for student_ND, teacher_ND in block_states(model, batch, teacher_states):
            error_N = hidden_error(student_ND, teacher_ND, cfg.distill_loss_type,
                                   cfg.distill_loss_temperature)
            errors.append(error_N.cpu())
            sums.append(sums_of_ordinary(student_ND, teacher_ND))
        return errors, torch.stack(sums).cpu()

    was_training = run.student.training
    run.student.eval()
    ordinary_sums = 0
    my_errors = [[] for _ in pairs]
    totals = [0.0] * len(pairs)
    with progress("measuring the blocks", len(run.eval_rows), unit="seq") as bar:
        for mine in rows_of_this_rank(run.eval_rows, run.batch_size):
            batch = collate([run.eval_rows[k] for k in mine])
            errors, sums = run.student(judge, batch, get_teacher_targets(batch))
            ordinary_sums += sums
            for i, error_N in enumerate(errors):
                my_errors[i].append(error_N)
                totals[i] += error_N.sum().item()
            bar.update(WORLD * len(mine))
    run.student.train(was_training)
    run.student.release()
    dist.all_reduce(ordinary_sums)
    totals = all_sum(*totals)

    figures = []
    for i in pairs:
        of_ranks = [None] * WORLD
        dist.all_gather_object(of_ranks, torch.cat(my_errors[i]))
        error_N = torch.cat(of_ranks)
        figures.append(dict(
            loss=totals[i] / len(error_N), median=error_N.median().item(),
            explained=share_explained(ordinary_sums[i])))
    return figures


def sums_of_ordinary(student_ND, teacher_ND):
    """Over the ordinary positions of a batch -> [3 + D] in fp64: how many they are, the sums of
    |s - t|^2 and |t|^2, and that of t."""
    size_N = teacher_ND.float().norm(dim=-1)
    is_ordinary_N = size_N <= ORDINARY * size_N.median()
    teacher_ND = teacher_ND[is_ordinary_N].double()
    missed_ND = student_ND[is_ordinary_N].double() - teacher_ND
    scalars = [is_ordinary_N.sum(), missed_ND.square().sum(), teacher_ND.square().sum()]
    return torch.cat([torch.stack(scalars), teacher_ND.sum(0)])


def share_explained(sums):
    """1 - sum |s - t|^2 / sum |t - mean|^2; below 0 where the mean of t would be nearer."""
    count, missed, squares, *total = sums.tolist()
    variance = squares - sum(x * x for x in total) / count
    return 1 - missed / variance if variance > 0 else 0.0


def block_table(run):
    """The errors that were measured: once before and, after the blocks, once more."""
    pairs = match_blocks(run.cfg, run.student.model.config, run.teacher.model.config)
    measured = run.notes["block_figures"]
    columns = f"{run.cfg.distill_loss_type:>12}{'median token':>14}{'explained':>11}"
    lines = [f"\n{'held out':<22}{'before':>12}", f"{'block':<7}{'teacher block':<15}{columns}"]
    if len(measured) > 1:
        lines[0] += f"{'after':>37}"
        lines[1] += columns
    for i, j in pairs.items():
        line = f"{i:<7}{j:<15}"
        for figures in measured:
            of_block = figures[i]
            line += (f"{of_block['loss']:>12.4g}{of_block['median']:>14.4g}"
                     f"{of_block['explained']:>11.1%}")
        lines.append(line)
    lines.append("explained: of the variance of the teacher's states t, where |t| is at most "
                 f"{ORDINARY} times its median")
    return "\n".join(lines)


# ---- stitches, and the head


def stitching(cfg, config):
    teacher_config = model_config(cfg.teacher, cfg, "teacher")
    untie_head(cfg, config)

    def build(model):
        return make_stitches(cfg, config, teacher_config,
                             model.get_output_embeddings().bias is not None)
    return build


def untie_head(cfg, student_config):
    """A head that is to be trained is untied from the embeddings, which the blocks build on."""
    shape = student_config.get_text_config()
    learns_head = cfg.train_lm_head or cfg.initialize_head_from_teacher
    if getattr(shape, "tie_word_embeddings", False) and learns_head:
        student_config.tie_word_embeddings = False
        shape.tie_word_embeddings = False
        print0("blockwise: the student's head is untied from its embeddings, which the blocks "
               "build on")


def make_stitches(cfg, student_config, teacher_config, head_has_bias):
    """-> the linear maps between the widths: up<i> from block i of the student to the teacher's
    width, down<i> (block_input teacher) the other way."""
    made = nn.ModuleDict()
    if not cfg.use_stitching_layers:
        return made
    pairs = match_blocks(cfg, student_config, teacher_config)
    width = student_config.get_text_config().hidden_size
    teacher_width = teacher_config.get_text_config().hidden_size
    # the last stitch is folded into the head: where that has no bias, a stitch's would not fit
    folded = (width != teacher_width and cfg.initialize_head_from_teacher and not head_has_bias)
    torch.manual_seed(cfg.seed)
    for i in pairs:
        last = i + 1 == len(pairs)
        bias = cfg.stitching_layer_bias and not (folded and last)
        made[f"up{i}"] = nn.Linear(width, teacher_width, bias)
    if cfg.block_input == "teacher":
        for i in pairs:
            made[f"down{i}"] = nn.Linear(teacher_width, width, cfg.stitching_layer_bias)
    for p in made.parameters():
        if p.ndim == 1:
            nn.init.zeros_(p)
        elif width == teacher_width:
            nn.init.eye_(p)
        else:
            nn.init.xavier_uniform_(p)
    return made


def final_norm(model):
    """The last module beside the decoder layers with a weight of one dimension; Identity where
    there is none."""
    path, _ = layers_of(model)
    norm = nn.Identity()
    for module in model.get_submodule(path.rpartition(".")[0]).children():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 1:
            norm = module
    return norm


def head_and_norm(model):
    """Runs inside a root -> the head's weight [V, D], bias [V] or None and scale; what the final
    norm multiplies by and adds [D]. That shows on states of size 1, whatever its weight means
    (Gemma's is off by one)."""
    head = head_of(model)
    norm = final_norm(model)
    probe = 1 - 2 * (torch.arange(head.weight.shape[1], device=DEVICE) % 2).to(head.weight)
    plus = norm(probe).float()
    minus = norm(-probe).float()
    gain = (plus - minus) / 2 * probe
    shift = (plus + minus) / 2
    return head.weight.float(), head.bias, head.scale, gain, shift


@torch.no_grad()
def initialize_head(student, teacher):
    """The teacher's norm and head at equal width. Else what they make of stitched states, folded
    into the student's: weight * gain * stitch as the weight, the shifts as the bias."""
    weight, bias, scale, gain, shift = teacher(head_and_norm)
    _, _, student_scale, student_gain, student_shift = student(head_and_norm)
    student.release()
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.float()
    if len(gain) != len(student_gain):
        last = len(layers_of(student.model)[1]) - 1
        stitch = student.stitches[f"up{last}"]
        stitch_weight = full_tensor(stitch.weight)
        if stitch.bias is not None:
            shift = shift + gain * full_tensor(stitch.bias)
        bias = bias + weight @ shift
        weight = weight * gain @ stitch_weight
        shift = student_shift
        gain = len(gain) ** 0.5 / stitch_weight.norm()   # the norm undoes the stitch's scale
    head = student.model.get_output_embeddings()
    for p, new in zip(head.parameters(), (weight, bias)):
        padded_tail = full_tensor(p)[len(new):]
        copy_from_rank0(p, torch.cat([new[:len(p)] * (scale / student_scale), padded_tail]))
    # norms are moved by the difference, since what their weight means is not known
    for p, change in zip(final_norm(student.model).parameters(),
                         (gain - student_gain, shift - student_shift)):
        copy_from_rank0(p, full_tensor(p) + change)


# --------------------------------------------------------------------------------------------------
# Optional: on_policy: in some of the steps the student writes the texts itself, after prompts out
# of that step's rows, and the teacher corrects them token by token: T^2 * divergence alone, since
# its own words are no labels. Hands on batches_by_student, which stands between batches and loop.


def batches_by_student(run, batches):
    """The same endless batches, but a share of on_policy of them holds what the student writes
    after their prompts. It writes when the loop asks for the batch: by the weights that it has
    then, not ahead, as rows are read. Block-wise phases before the last one keep their rows."""
    for micro, position in batches:
        is_last_stage = run.stage is run.stages[-1]
        if is_last_stage and is_on_policy(run.cfg.on_policy, run.cfg.seed, run.step):
            micro = write_batches(run, micro)
        yield micro, position


def is_on_policy(share, seed, step):
    """A draw that depends on seed and step alone."""
    return int(digest("on policy", seed, step), 16) < share * 16**16


def write_batches(run, micro):
    """This rank's micro-batches of a step -> the same with the student's texts. What there was to
    see is added to run.notes, so that a resumed run logs the same."""
    start = time.time()
    rows = [rows_of(batch) for batch in micro]
    prompts = [prompt_of(ids, is_target, prompt_tokens(run.cfg))
               for some in rows for ids, is_target in some]
    seeds = [seed_of_text(run.cfg.seed, run.step, RANK + WORLD * i) for i in range(len(prompts))]
    with progress("the student writes"):
        texts, cut = write_texts(
            run.student, run.tokenizer, prompts, seeds, run.cfg.max_new_tokens,
            run.cfg.on_policy_temperature, run.cfg.seq_len)
    written = iter(as_rows(prompts, texts))
    micro = [collate(list(itertools.islice(written, len(some)))) for some in rows]
    for batch in micro:
        batch.by_student = True
    figures = all_sum(len(texts), sum(map(len, texts)), cut)   # of all ranks, once all are done
    figures.append(time.time() - start)
    before = run.notes.get("rollouts", [0, 0, 0, 0])
    run.notes["rollouts"] = [a + b for a, b in zip(before, figures, strict=True)]
    return micro


def take_rollout_figures(run):
    """Of what was written since the last line of the log; nothing where nothing was."""
    texts, tokens, cut, seconds = run.notes.pop("rollouts", [0, 0, 0, 0])
    if not texts:
        return {}
    return {"train/rollout_length": tokens / texts, "train/rollout_cut": cut / texts,
            "train/rollout_tokens_per_second": tokens / seconds}


def loss_by_writer(loss_fn, model, batch, targets, denominator):
    """distil_loss, less its label term where the student wrote the batch."""
    if batch.by_student:
        loss_fn = functools.partial(loss_fn, alpha=0.0)
    return loss_fn(model, batch, targets, denominator)


# ---- prompts


def rows_of(batch):
    """-> [(ids, which of them are targets)] of a Batch, less its padding."""
    rows, width = batch.input_ids.shape
    lengths = torch.bincount(batch.real.cpu() // width, minlength=rows).tolist()
    is_target = torch.zeros(rows * width, dtype=torch.bool)
    is_target[batch.positions.cpu() + 1] = True   # a position counts where its next token is one
    is_target_BT = is_target.view(rows, width).tolist()
    ids_BT = batch.input_ids.tolist()
    return [(ids_BT[i][:length], is_target_BT[i][:length])
            for i, length in enumerate(lengths) if length]


def prompt_of(ids, is_target, prompt_tokens):
    """The first tokens of plain text; of a conversation all before its last run of targets."""
    begin = max(i for i, counted in enumerate(is_target) if counted)
    while begin > 1 and is_target[begin - 1]:
        begin -= 1
    if begin == 1:   # all of it are targets: the first token never is
        return ids[:min(prompt_tokens, len(ids) - 1)]
    return ids[:begin]


def prompt_tokens(cfg):
    return cfg.on_policy_prompt or max(1, cfg.seq_len // 4)


def seed_of_text(seed, step, number):
    """number: of the sequence in the global batch, whatever rank writes it."""
    return int(digest("text", seed, step, number), 16)


def as_rows(prompts, texts):
    """Token rows of which the texts are the targets."""
    return [{"input_ids": prompt + text,
             "targets": [False] * len(prompt) + [True] * len(text)}
            for prompt, text in zip(prompts, texts, strict=True)]


# ---- writing


@torch.no_grad()
def write_texts(root, tokenizer, prompts, seeds, max_new_tokens, temperature, seq_len):
    """-> [ids that the model writes after each prompt, with the end mark], how many of them have
    none. A row stays within seq_len. Each rank comes with its own prompts, maybe none: all weights
    are gathered once, so that nothing inside waits for another rank (no synced_gpus)."""
    ends = end_ids(root.model, tokenizer)
    rooms = [min(max_new_tokens, seq_len - len(prompt)) for prompt in prompts]
    draw_of = functools.partial(
        make_draw, temperature=temperature, vocabulary=vocabulary_of(tokenizer), new=max_new_tokens)
    was_training = root.training
    root.eval()   # no dropout; and layers that recompute would drop the KV cache
    written = [None] * len(prompts)
    with gathered(root), torch.compiler.set_stance("force_eager"):   # lengths change all the time
        for group in side_by_side(prompts, rooms, position_limit(root.model)):
            ids_BT, mask_BT = pad_left([prompts[i] for i in group])
            draw = draw_of([seeds[i] for i in group])
            most = max(rooms[i] for i in group)
            ids = root(generate_ids, ids_BT, mask_BT, most, ends, draw).tolist()
            for i, text in zip(group, ids, strict=True):
                written[i] = text
    root.train(was_training)
    texts = [cut_text(ids, room, ends) for ids, room in zip(written, rooms, strict=True)]
    return texts, sum(text[-1] not in ends for text in texts)


def side_by_side(prompts, rooms, limit):
    """-> lists of numbers of prompts to write after at once: all, but where positions stand in a
    table, a long prompt must not come to its end while a short one has room left."""
    groups = [[]]
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        group = [*groups[-1], i]
        longest = len(prompts[group[0]])
        if longest + max(rooms[k] for k in group) <= limit + 1:   # the last token is not looked up
            groups[-1] = group
        else:
            groups.append([i])
    return [sorted(group) for group in groups if group]


def pad_left(prompts):
    """-> ids, attention mask, both [B, T]: all texts begin in the same column."""
    width = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for i, prompt in enumerate(prompts):
        ids_BT[i, width - len(prompt):] = torch.as_tensor(prompt)
        mask_BT[i, width - len(prompt):] = 1
    return to_device(ids_BT), to_device(mask_BT)


def make_draw(seeds, temperature, vocabulary, new):
    """-> a logits processor that leaves one id a row, drawn from softmax(logits / temperature): the
    one at which the sum of probabilities passes a number from (0, 1]. Every row has numbers of its
    own: what it says depends neither on the rows beside it nor on how many ranks there are."""
    numbers_BN = torch.stack([
        1 - torch.rand(new, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    numbers = iter(to_device(numbers_BN).unbind(1))

    def draw(_, logits_BV):
        logits_BV = logits_BV[:, :vocabulary]   # from there on it is padding
        sums_BV = (logits_BV / temperature).softmax(-1).cumsum(-1)
        passed_B1 = next(numbers)[:, None] * sums_BV[:, -1:]   # rounding: it is not quite 1
        ids_B1 = torch.searchsorted(sums_BV, passed_B1)
        return torch.zeros_like(sums_BV).scatter_(-1, ids_B1, 1.0)
    return draw


def generate_ids(model, ids_BT, mask_BT, new, ends, draw):
    """Runs inside a root: -> new ids [B, N]. Rows that have ended are padded."""
    usual = model.generation_config
    model.generation_config = transformers.GenerationConfig()   # no top_k or penalty of its own
    try:
        ids = model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, use_cache=True,
            eos_token_id=sorted(ends) or None, pad_token_id=0, synced_gpus=False,
            logits_processor=[draw])
    finally:
        model.generation_config = usual
    return ids[:, ids_BT.shape[1]:]


def cut_text(ids, room, ends):
    """Up to the first end mark, which belongs to it."""
    ids = ids[:room]
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i + 1]
    return ids


@contextlib.contextmanager
def gathered(root):
    """All parameters gathered once, for as long as this lasts. Meanwhile FSDP's hooks, which would
    gather and drop each layer at each token, are off: without gradients they do nothing else."""
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    hooks = []
    for unit in units:   # the root comes first
        unit.unshard()
        hooks.append((unit._forward_pre_hooks, unit._forward_hooks))
        unit._forward_pre_hooks = collections.OrderedDict()
        unit._forward_hooks = collections.OrderedDict()
    try:
        yield
    finally:
        for unit, (before, after) in zip(units, hooks, strict=True):
            unit._forward_pre_hooks = before
            unit._forward_hooks = after
        root.release()


# ---- mode eval: what training on policy moves

OWN_TEXTS = 64   # of so many held-out rows, evenly spaced


def score_own_texts(cfg, root, teacher, tokenizer, rows):
    """-> the mean divergence a token from the teacher on what a model writes after held-out
    prompts. teacher None: they have no vocabulary in common."""
    if teacher is None:
        return None
    if teacher is root:
        return 0.0
    count = min(OWN_TEXTS, len(rows))
    numbers = [i * len(rows) // count for i in range(count)]
    shares = [None] * WORLD
    mine = []
    with progress("writing after held-out prompts", count, unit="text") as bar:
        for some in rows_of_this_rank(numbers, cfg.batch_size):
            prompts = []
            for i in some:
                (ids, is_target), = rows_of(collate([rows[numbers[i]]]))
                prompts.append(prompt_of(ids, is_target, prompt_tokens(cfg)))
            seeds = [seed_of_text(cfg.seed, "held out", i) for i in some]
            texts, _ = write_texts(root, tokenizer, prompts, seeds, cfg.max_new_tokens,
                                   cfg.on_policy_temperature, cfg.seq_len)
            mine += as_rows(prompts, texts)
            bar.update(WORLD * len(some))
    dist.all_gather_object(shares, mine)
    written = [row for share in shares for row in share]
    loss_fn = functools.partial(
        distil_loss, alpha=0.0, temperature=cfg.temperature, divergence=cfg.divergence,
        vocabulary=vocabulary_of(tokenizer))
    divergence, *_ = mean_over_rows(root, loss_fn, teacher_targets(teacher), written,
                                    cfg.batch_size, "labels", "evaluating own texts")
    return divergence


# ---- where texts end


def end_ids(model, tokenizer):
    """Of generation config and tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return (ends | {tokenizer.eos_token_id}) - {None}


def check_writer(cfg, student, teacher, tokenizer):
    """Refuse a student that would not write what it believes; and a pair that does not end its
    texts alike: the student would learn ends at which it does not stop, and its texts would grow
    from step to step."""
    ids_1T = torch.arange(8, device=DEVICE)[None] % vocabulary_of(tokenizer)
    student.eval()
    with torch.no_grad(), reading(f"student {cfg.student!r} cannot write"):
        error, allowed = student(writing_error, ids_1T)
    student.train()
    student.release()
    if not error <= allowed:
        raise UserError(
            f"student {cfg.student!r} ({type(student.model).__name__}) writes something else beside"
            f" a longer prompt, with a KV cache, than alone: its logits are off by {error:.2g} of "
            "their spread; on_policy needs another student")
    teacher_tokenizer = load_tokenizer(dataclasses.replace(cfg, tokenizer=None), cfg.teacher)
    ends = end_ids(student.model, tokenizer)
    teacher_ends = end_ids(teacher.model, teacher_tokenizer or tokenizer)
    if ends != teacher_ends:
        raise UserError(
            f"on_policy: student {cfg.student!r} ends its texts with {name_ids(ends, tokenizer)}, "
            f"teacher {cfg.teacher!r} with {name_ids(teacher_ends, tokenizer)}. Give both the same "
            "eos_token_id in generation_config.json (a config .json: in it) and the same eos_token "
            "in the tokenizer")


def warn_of_another_end(rows, seq_len, student, tokenizer):
    """Conversations whose end mark ends nothing: the student would write on after it."""
    ends = end_ids(student.model, tokenizer)
    last = set()   # of the targets of a whole conversation
    for row in rows:
        (ids, is_target), = rows_of(collate([row]))
        if len(ids) < seq_len and not all(is_target[1:]):
            last.add([token for token, counted in zip(ids, is_target) if counted][-1])
    if len(last) == 1 and not last & ends:   # else they have no end mark of their own
        print0(f"WARNING: conversations end with {name_ids(last, tokenizer)}, the student's texts "
               f"with {name_ids(ends, tokenizer)}: it will write on after the former. Add it to "
               "eos_token_id in generation_config.json, of the teacher too")


def writing_error(model, ids_1T):
    """Runs inside a root: how far the logits that a text is drawn from, after a prompt beside a
    longer one, are from those of the same ids alone, in their standard deviations, and how far
    rounding may bring them."""
    prompts = [ids_1T[0, :3].tolist(), ids_1T[0].tolist()]
    drawn_from = []

    def keep(_, logits_BV):
        drawn_from.append(logits_BV.clone())
        return logits_BV

    new = generate_ids(model, *pad_left(prompts), 3, set(), keep)
    alone_1T = torch.cat([ids_1T[:, :3], new[:1]], 1)
    alone = model(input_ids=alone_1T, use_cache=False).logits[0, 2:-1]
    error = (torch.stack(drawn_from)[:, 0] - alone.float()).abs().max() / alone.float().std()
    return error, 1e-3 if alone.dtype == torch.float32 else 0.5


def name_ids(ids, tokenizer):
    return ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in sorted(ids)) or "none"


# ---- what it takes


def memory_of_writing(run, itemsize):
    """{part: bytes a device} while the student writes, beside what is always held."""
    shape = run.student.model.config.get_text_config()
    rows = run.batch_size * run.micro_steps
    heads = getattr(shape, "num_attention_heads", None) or 1
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    head_width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    cache = 2 * kv_heads * head_width * shape.num_hidden_layers * run.cfg.seq_len
    return {"gathered": sizes(run.student)[0] * itemsize, "KV cache": rows * cache * itemsize,
            "logits": rows * shape.vocab_size * (itemsize + 12)}


def rehearse_writing(run, stage, micro, seconds):
    """--dry_run: time a step whose texts the student writes -> seconds of a step on average."""
    if stage is not run.stages[-1]:
        return seconds
    for number in range(2):   # the first warms up
        start = time.time()
        written = write_batches(run, micro)
        if number == 0:
            print0("an example that the student wrote: "
                   + show_targets(written[0], run.tokenizer))
        writing = time.time() - start
        _, learning = time_step(run, stage, written)
    figures = take_rollout_figures(run)
    share = run.cfg.on_policy
    print0(f"a step on policy takes {writing + learning:.2f} s, {writing:.2f} of them to write "
           f"({figures['train/rollout_tokens_per_second']:,.0f} tokens/s, "
           f"{figures['train/rollout_length']:.0f} a text)")
    return (1 - share) * seconds + share * (writing + learning)


# --------------------------------------------------------------------------------------------------
# Optional: generate: a model behind an API, or one of our own, answers prompts; filters judge the
# replies. Hands on output_dir/train.jsonl, one conversation a row, which --dataset FILE --alpha 1
# trains on. Prompts and filters stand first: they are made to be edited.
TASKS = {
    "implement": "Write {thing} in {language}.",
    "complete": "Complete this function; give all of it.",
    "explain": "Explain what this function does.",
    "debug": "One operator or index here is wrong. Fix it.",
    "refactor": "Refactor this function; keep what it does.",
    "translate": "Translate this to {language}.",
    "test": "Write pytest tests for this function.",
    "document": "Write the docstring of this function.",
}
FORMS = [
    "{}", "Please help me: {}", "Here is a task for you. {}", "I need this for my project. {}",
]
THINGS = [
    "LRU cache", "trie", "tokenizer", "diff tool", "job scheduler",
    "web crawler", "state machine", "CSV reader", "URL router",
]
TRAITS = [
    "thread-safe", "memory-bounded", "streaming", "resumable", "strict",
    "pluggable", "lazy", "minimal", "configurable",
]
LANGUAGES = [
    "Python",   # the first: the code shown is Python, so nothing is translated to it
    "C", "C++", "C#", "Go", "Java", "JavaScript",
    "Kotlin", "PHP", "Ruby", "Rust", "Swift", "TypeScript",
]
LEVELS = [
    "I am new to programming.", "I program every day.", "I am an expert, so go deep.",
]
LIMITS = [
    "Keep it short.", "Name the edge cases.", "State its cost.",
    "Give an example.", "Say why.", "Say what could fail.",
]
BUGS = [   # (what stands in the code, what is put in its place)
    (" <= ", " < "),
    (" >= ", " > "),
    (" == ", " != "),
    (" < ", " > "),
    (" + ", " - "),
    (" += ", " -= "),
    ("[0]", "[1]"),
]


@dataclass
class Job:
    """A prompt to ask, and what asking it has cost so far."""
    prompt_id: str           # digest of the messages: the same in every run
    category: str
    messages: list           # [{"role": ..., "content": ...}, ...], the assistant's turn is next
    number: int              # its place among all prompts, asked already or not
    min_chars: int           # a shorter reply is rejected
    max_prompt_tokens: int   # an upper bound
    worst_usd: float         # the most that one try can cost
    billed_tries: int = 0    # tries that the provider may send a bill for
    held_usd: float = 0.0    # what is set aside for these tries and the next one
    held_bytes: int = 0      # room on the disk that is kept for its row


@dataclass
class Reply:
    text: Optional[str]   # None: there is none, and finish_reason says why
    finish_reason: str
    prompt_tokens: Optional[int] = None       # None: the provider did not say
    completion_tokens: Optional[int] = None
    other_parts: str = ""   # kinds of what it says that is no text


def parse_categories(items):
    """["implement=3", "debug"] -> {"implement": 3.0, "debug": 1.0}; none: all tasks alike."""
    weights = {}
    for item in items or TASKS:
        name, equals, text = item.partition("=")
        try:
            weights[name] = float(text) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if name not in TASKS or not 0 < weights[name] < math.inf:
            names = ", ".join(TASKS)
            raise UserError(f"categories {item}: write name or name=weight; the names are {names}")
    return weights


def stdlib_functions(rng):
    """Yields functions without a docstring, 7 to 30 lines long, of Python's own library."""
    sources = list(stdlib_sources())
    for _, text in rng.sample(sources, len(sources) // 3):   # parsing all takes 5 s
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node):
                continue
            if 5 < node.end_lineno - node.lineno < 30:
                function = lines[node.lineno - 1:node.end_lineno]
                yield "\n".join(line[node.col_offset:] for line in function)


def compose_prompt(category, function, rng):
    """-> the text of a prompt, about this function where the task is about code; None: no fit."""
    # All is drawn, needed or not, in this order: another order gives other prompts, and a run that
    # is extended would not find its own again.
    bugs = [bug for bug in BUGS if bug[0] in function]
    bug = rng.choice(bugs) if bugs else None
    language = rng.choice(LANGUAGES[1:] if category == "translate" else LANGUAGES)
    trait = rng.choice(TRAITS)
    thing = rng.choice(THINGS)
    form = rng.choice(FORMS)
    level = rng.choice(LEVELS)
    limit = rng.choice(LIMITS)

    code = function
    if category == "complete":
        code = function[:len(function) // 2].rpartition("\n")[0]
    elif category == "debug":
        code = function.replace(*bug, 1) if bug else ""
    if not code:
        return None
    text = form.format(TASKS[category].format(language=language, thing=f"a {trait} {thing}"))
    if category != "implement":
        text += f"\n\n```python\n{code}\n```"
    return f"{text}\n\n{level} {limit}"


def compose_prompts(categories, seed):
    """Yields distinct (category, messages): asking for more only adds, so a run can be extended."""
    weights = parse_categories(categories)
    rng = random.Random(seed)
    functions = itertools.cycle(stdlib_functions(rng))
    asked = collections.Counter()
    seen = set()
    misses = 0
    while misses < 1000:
        misses += 1
        # the category that is most behind its share
        name = min(weights, key=lambda category: (asked[category] + 1) / weights[category])
        skipped = rng.choice(range(20))
        function = next(itertools.islice(functions, skipped, None))
        text = compose_prompt(name, function, rng)
        if text is None or text in seen:
            continue
        seen.add(text)
        asked[name] += 1
        misses = 0
        yield name, [{"role": "user", "content": text}]
    raise UserError(f"category {name} has few more than {asked[name]:,} prompts; "
                    "lower num_examples or its weight")


def join_parts(content):
    """A turn's content, text or [{"type": "text", "text": ...}, ...] -> its text, and the kinds of
    the parts that are none. What a model thought is not what it said, and is passed over."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise TypeError(f"content {content!r} is no text")
    texts = []
    others = []
    for part in content:
        kind = part.get("type", "text")
        if kind in ("text", "output_text"):
            texts.append(part["text"])
        elif kind not in ("thinking", "redacted_thinking", "reasoning"):
            others.append(str(kind))
    return "".join(texts), others


def parse_prompt_row(row):
    """{"prompt": TEXT} or {"messages": [...]} -> (category, messages)"""
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    messages = []
    for turn in turns:
        text, others = join_parts(turn["content"])
        if others or turn["content"] is None or not isinstance(turn["role"], str):
            raise TypeError(f"{turn!r} has no role, or content that is no text")
        messages.append({"role": turn["role"], "content": text})
    if messages[-1]["role"] == "assistant":
        raise ValueError("it ends with a reply")
    category = row.get("category", "own")
    if not isinstance(category, str):
        raise TypeError(f"category {category!r} is no text")
    return category, messages


def read_prompts(path):
    """Yields (category, messages) of the user's own prompts: lines of a .txt, or .jsonl rows."""
    with reading(f"prompts_file {path!r} cannot be read"):
        lines = open(path, "rb")
    with lines:
        for number, line in enumerate(lines, 1):
            with reading(f"prompts_file {path!r}, line {number}, is no UTF-8 text, or no row "
                         'like {"prompt": TEXT} or {"messages": [...]}'):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if "\0" in text:
                    raise ValueError("it holds a null byte")
                if not text:
                    continue
                row = json.loads(text) if path.endswith(".jsonl") else {"prompt": text}
                prompt = parse_prompt_row(row)
            yield prompt


def usd(cfg, prompt_tokens, completion_tokens):
    price_in = cfg.price_in or 0   # USD a million tokens
    price_out = cfg.price_out or 0
    return (prompt_tokens * price_in + completion_tokens * price_out) / 1e6


def all_prompts(cfg):
    """-> {prompt_id: Job} of num_examples different prompts, in the order they are asked."""
    if cfg.prompts_file:
        prompts = read_prompts(cfg.prompts_file)
        min_chars = 1   # own prompts may want a word or a label
        count = cfg.num_examples or math.inf
    else:
        prompts = compose_prompts(cfg.categories, cfg.seed)
        min_chars = 20
        count = cfg.num_examples or 100
    jobs = {}
    for category, messages in prompts:
        prompt_id = digest(messages)
        if prompt_id not in jobs:
            # each token is a byte or more, and the chat format takes less than 64 a turn
            texts = [message["content"].encode(errors="replace") for message in messages]
            max_prompt_tokens = sum(64 + len(text) for text in texts)
            worst_usd = usd(cfg, max_prompt_tokens, cfg.max_tokens)
            jobs[prompt_id] = Job(prompt_id, category, messages, len(jobs), min_chars,
                                  max_prompt_tokens, worst_usd)
        if len(jobs) == count:
            break
    if not jobs:
        raise UserError(f"prompts_file {cfg.prompts_file} holds no prompt")
    return jobs


# Filters: each says whether it rejects a reply. find_flaws lists them, in order.

CODE_BLOCK = re.compile(r"""
    ^[ \t]* (?: [-*+][ ]+ | \d+[.)][ ]+ )?   # begins a line, or an item of a list
    (```+) [ \t]* (\w*) [^\n`]* \n           # the fence and its language
    (.*?)                                    # the code
    ^[ \t]* \1 `* [ \t]* $                   # closed by a fence at least as long
    """, re.VERBOSE | re.MULTILINE | re.DOTALL)

OPEN_FENCE = re.compile(r"""
    ^[ \t]* ( [-*+][ ]+ | \d+[.)][ ]+ )?     # begins a line, or an item of a list
    ```+ [^`\n]* $                           # and nothing but its language beside it
    """, re.VERBOSE | re.MULTILINE)

REFUSAL = re.compile(r"""
    \W*
    (
        (   unfortunately
        |   i[ ]apologi[sz]e ([ ]for[ ][\w ]+)?           # I apologize for the inconvenience
        |   (i.?m[ ]|i[ ]am[ ])? (\w+[ ])? (sorry|afraid)   # I'm very sorry
        )
        \W+ (but[ ])?
    )?
    (
        as[ ]an[ ]ai ([ ]\w+){,5} \W+ i\b                 # As an AI language model, I
    |
        i[ ](must|have[ ]to)[ ] (\w+[ ])? decline         # I must respectfully decline
    |
        (i|i.?m|i[ ]am)[ ]
        ( can([ ]?no|.)?t | (un|not[ ]|won.?t[ ]be[ ])able[ ]to )   # cannot, can't, am not able to
        [ ]
        ( help(?![ ]but) | assist | provide | fulfil | comply | create | write | do[ ]th )
    )
    """, re.VERBOSE | re.IGNORECASE)


def plain_words(text):
    """The text in one line, without the marks of code blocks."""
    return " ".join(re.sub(r"(?m)```(\w*\s*$)?", " ", text).split())


def is_cut_off(finish_reason):
    return finish_reason in ("length", "max_tokens", "model_context_window_exceeded")


def is_too_short(reply, min_chars):
    return len(plain_words(reply)) < min_chars


def is_loop(reply):
    """A loop deflates to an eighth, code to a third."""
    data = reply.encode(errors="replace")
    tail = data[-1000:]   # shows a reply that only ended in one
    return any(len(zlib.compress(part)) < len(part) / 8 - 40 for part in (data, tail))


def is_broken_code(reply):
    """A code block that is never closed, or whose Python does not parse."""
    if OPEN_FENCE.search(CODE_BLOCK.sub("", reply)):
        return True
    for _, language, code in CODE_BLOCK.findall(reply):
        if not re.fullmatch("py(thon)?3?", language, re.IGNORECASE) or ">>>" in code:
            continue   # another language, or a session with its output
        try:
            with warnings.catch_warnings(action="ignore"):   # about odd escapes in the reply
                ast.parse(textwrap.dedent(code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return True
    return False


def is_refusal(reply, finish_reason):
    if finish_reason in ("refusal", "content_filter"):
        return True
    return "```" not in reply and REFUSAL.match(plain_words(reply)) is not None


def repeats_prompt(prompt, reply):
    asked = plain_words(prompt)
    said = plain_words(reply)
    if not len(asked) / 2 < len(said) < 1.2 * len(asked):
        return False   # a short piece of the prompt may be just what it asks for
    return said in asked or asked in said


def find_flaws(prompt, reply, finish_reason, min_chars=1):
    """-> {filter: whether it rejects the reply}; the first that does is the reason that is kept"""
    reply = reply.replace("\r\n", "\n")
    return {
        "cut off": is_cut_off(finish_reason),
        "empty or too short": is_too_short(reply, min_chars),
        "repetition loop": is_loop(reply),
        "code does not parse": is_broken_code(reply),
        "refusal": is_refusal(reply, finish_reason),
        "repeats the prompt": repeats_prompt(prompt, reply),
    }


def grade_reply(job, reply):
    """-> the row to write; its `reason` is the filter that rejects it, or why there is no reply"""
    row = {
        "messages": job.messages,
        "category": job.category,
        "prompt_id": job.prompt_id,
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
        },
    }
    if reply.text is None:
        row["finish_reason"] = None
        row["reason"] = reply.finish_reason
        return row
    row["messages"] = [*job.messages, {"role": "assistant", "content": reply.text}]
    prompt = job.messages[-1]["content"]
    flaws = find_flaws(prompt, reply.text, reply.finish_reason, job.min_chars)
    reasons = [name for name, found in flaws.items() if found]
    if reply.other_parts:
        reasons.insert(0, f"not text: {reply.other_parts}")
    if reasons:
        row["reason"] = reasons[0]
    return row


# Files: train.jsonl and rejected.jsonl grow a row at a time; duplicates are found at the end.


class Paths(NamedTuple):
    folder: str
    train: str
    rejected: str
    summary: str
    config: str


def paths_in(folder):
    names = ("train.jsonl", "rejected.jsonl", "summary.json", "config.json")
    return Paths(folder, *[os.path.join(folder, name) for name in names])


def read_replies(train_path, rejected_path):
    """-> {prompt_id: row}. Where a kill or a failure left two rows, a reply counts more than a
    failure, and a copy in rejected more than the one in train."""
    def precedence(row):
        answered = row.get("finish_reason", "") is not None
        return answered, "reason" in row

    rows = read_jsonl(rejected_path) + read_jsonl(train_path)
    return {row["prompt_id"]: row for row in sorted(rows, key=precedence)}   # the last one stays


def is_config(path):
    """Whether a run of ours has written it."""
    with open(path, encoding="utf-8") as f:
        return {"mode", "output_dir", "seed"} <= set(json.load(f))


def is_summary(path):
    with open(path, encoding="utf-8") as f:
        summary = json.load(f)
    spent = summary["spent_usd"]
    settings = summary.get("settings", {})   # there were none before they were compared
    return type(spent) in (int, float) and 0 <= spent < math.inf and isinstance(settings, dict)


def check_row(row):
    """Raises where it has another form than grade_reply and record_reply give it."""
    forms = {"messages": list, "prompt_id": str, "usage": dict, "cost": (int, float)}
    for name, form in forms.items():
        if not isinstance(row[name], form):
            raise TypeError(f"{name} is {row[name]!r}")
    if not 0 <= row["cost"] < math.inf:
        raise ValueError(f"cost is {row['cost']}")
    for message in row["messages"]:
        if not isinstance(message["content"], str):
            raise TypeError(f"content {message['content']!r} is no text")
    if row["finish_reason"] is None and "reason" not in row:
        raise ValueError("there is no reply, and no reason why")


def is_half_row(line):
    """Whether it is what a kill leaves at the end of a file of ours."""
    start = b'{"messages": ['
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return start.startswith(line[:len(start)])
    return False


def refuse_foreign_rows(path):
    """Before read_jsonl, which mends the end of the file."""
    if not os.path.lexists(path):
        return
    with reading(f"{path!r} cannot be read"), open(path, "rb") as f:
        lines = f.read().split(b"\n")
    if is_half_row(lines[-1]):   # or nothing
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                check_row(json.loads(line))
        except Exception as e:
            raise UserError(
                f"{path!r}, line {number}, is no row of mode generate ({one_line(e, 100)}); "
                "nothing was changed: choose another --output_dir, or move that file away"
            ) from None   # with a cause, error.log would be written beside it


def read_past(paths, settings):
    """Earlier runs in this folder -> {prompt_id: USD}, the prompt_ids that have a reply, USD spent
    in all. Refuses what is not ours, and what was written with other settings."""
    refuse_foreign_rows(paths.train)
    refuse_foreign_rows(paths.rejected)
    refuse_foreign(paths.summary, is_summary)
    refuse_foreign(paths.config, is_config)
    with reading(f"the rows in {paths.folder!r} cannot be read and mended"):
        rows = read_replies(paths.train, paths.rejected)
    cost = {prompt_id: row["cost"] for prompt_id, row in rows.items()}
    answered = {prompt_id for prompt_id, row in rows.items() if row["finish_reason"] is not None}
    spent = sum(cost.values())
    if os.path.exists(paths.summary):
        with open(paths.summary, encoding="utf-8") as f:
            summary = json.load(f)
        spent = max(spent, summary["spent_usd"])   # with what a kill left in flight
        if rows and "settings" in summary:
            refuse_changes(summary["settings"], settings, paths.folder,
                           way_out="choose another --output_dir")
    return cost, answered, spent


def write_rows(path, rows):
    aside = path + ".tmp"
    try:
        with open(aside, "w", encoding="utf-8", errors="replace") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(aside, path)
    except OSError:   # a full disk needs its room back
        os.remove(aside)
        raise


def words_and_signs(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def sketch_words(words):
    """The 64 smallest hashes of all runs of 5 words: two sketches overlap about as the texts do."""
    runs = [" ".join(words[i:i + 5]) for i in range(len(words) - 4)]
    return sorted({zlib.crc32(run.encode()) for run in runs})[:64]


def are_near(sketch, other):
    """More than 0.8 of the smallest hashes of the two together are in both."""
    smallest = sorted({*sketch, *other})[:64]
    in_both = set(sketch) & set(other) & set(smallest)
    return len(in_both) > 0.8 * len(smallest)


def mark_duplicates(rows):
    """Give each kept row that says what an earlier one says a reason to be rejected."""
    seen = set()   # hashes: the words themselves would fill gigabytes
    sketches = collections.defaultdict(list)   # one of a sketch's first hashes -> such sketches
    for row in rows:
        if "reason" in row:
            continue
        prompt = words_and_signs(row["messages"][-2]["content"])
        reply = words_and_signs(row["messages"][-1]["content"])
        if len(reply) < 20:
            # a label answers many prompts, and each pair is an example of its own
            text = hash((*reply, None, *prompt))
            sketch = []
        else:
            text = hash(tuple(reply))
            sketch = sketch_words(reply)
        candidates = [other for first in sketch[:8] for other in sketches[first]]
        if text in seen:
            row["reason"] = "exact duplicate"
        elif any(are_near(sketch, other) for other in candidates):
            row["reason"] = "near duplicate"
        else:
            for first in sketch[:8]:
                if len(sketches[first]) < 50:   # what everybody says is no evidence, and costs time
                    sketches[first].append(sketch)
        seen.add(text)


def drop_duplicates(train_path, rejected_path, order):
    """Sort both files by order (of prompt_ids) and move copies to rejected -> {fate: rows}.

    At the end of a run, so that it does not matter who answered first.
    """
    numbers = {prompt_id: number for number, prompt_id in enumerate(order)}
    rows = list(read_replies(train_path, rejected_path).values())
    rows.sort(key=lambda row: numbers.get(row["prompt_id"], -1))
    mark_duplicates(rows)
    # rejected first: a kill between the two leaves a row in both, never in none
    write_rows(rejected_path, [row for row in rows if "reason" in row])
    write_rows(train_path, [row for row in rows if "reason" not in row])
    fates = collections.Counter(row.get("reason", "kept").partition(":")[0] for row in rows)
    filters = find_flaws("", "", "stop")   # for their names
    names = ["kept", "not text", *filters, "exact duplicate", "near duplicate", "failed"]
    return {name: fates[name] for name in names}


# Asking: money is set aside before a try leaves, and what it did cost is written when it is over.

MAX_SILENCE = 120     # seconds that a server may turn everything away before a request is given up
MAX_COUNT = 10**7     # tokens: a server that says more than this of a reply says nothing


@dataclass
class Ledger:
    """What this run may spend, has spent and has seen, and why it should stop."""
    cfg: Config
    paths: Paths
    settings: dict        # what decides the rows of this folder
    past_cost: dict       # prompt_id -> USD of its row of an earlier run
    spent: float          # USD of all runs, with what is set aside for requests in flight
    stop_requests: list   # of stop_signals
    bar: tqdm
    secrets: list            # which no file and no error may show
    disk_room: Any           # a file of nothing: its bytes are kept for the rows in flight
    held_bytes: int = 0      # so many, for so many requests
    tokens: int = 0          # of this run
    answered: bool = False   # the teacher has answered once in this run
    out_of_money: bool = False
    stop_error: Optional[UserError] = None
    first_failure: Optional[str] = None
    refused_since: Optional[float] = None   # the first refusal after the last answer
    trouble: str = "none"                   # the last refusal
    # of the last requests, whether each failed
    recent: collections.deque = field(default_factory=lambda: collections.deque(maxlen=50))

    def stopping(self):
        return bool(self.stop_requests or self.stop_error)

    def stop(self, message):
        if not self.stopping():   # what came first counts
            self.stop_error = UserError(message)

    def ended(self):
        if self.stop_error:
            return str(self.stop_error)
        if self.stop_requests:
            return "stopped by a signal"
        if self.out_of_money:
            return "max_cost is reached"
        if self.first_failure:
            return "all is asked; the same command asks again what failed"
        return "all is answered"

    def write_summary(self, spent, **more):
        write_json({"spent_usd": spent, "settings": self.settings, **more}, self.paths.summary)

    def reserve(self, job):
        """Set the worst case of one more try aside -> whether max_cost and the disk allow it.

        It is spent before the try leaves, on disk too: the cap holds over kills and restarts.
        """
        needed = (job.billed_tries + 1) * job.worst_usd
        # none: no prices, or the try before was refused and cost nothing
        missing = max(0, needed - job.held_usd)
        if missing and self.spent + missing > (self.cfg.max_cost or math.inf):
            return False
        try:
            self.hold_room(job)
            if missing:
                self.write_summary(self.spent + missing)
        except OSError as e:
            self.stop_without_room(e)
            return False
        self.spent += missing
        job.held_usd = max(job.held_usd, needed)
        return True

    def hold_room(self, job):
        """Keep room on the disk for the row of a request before it leaves: what is paid for can be
        written. A token is about 4 bytes; this is for 16."""
        if job.held_bytes:
            return
        size = 4096 + 2 * job.max_prompt_tokens + min(16 * self.cfg.max_tokens, 2**24)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]   # of one file: ulimit -f
        rows_size = max(file_size(self.paths.train), file_size(self.paths.rejected))
        if limit != resource.RLIM_INFINITY and rows_size + self.held_bytes + size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        handle = self.disk_room.fileno()
        try:
            if os.fstat(handle).st_size < self.held_bytes + size:
                os.posix_fallocate(handle, 0, self.held_bytes + size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise   # anything else: a file system on which nothing can be kept
        self.held_bytes += size
        job.held_bytes = size

    def stop_without_room(self, e):
        self.stop(f"{self.paths.folder!r} has no room for another reply ({e.strerror}); make room, "
                  "and the same command goes on")

    def write_row(self, path, row):
        """-> whether it is written. A full disk gets back what was held for this row, and for those
        that are written already."""
        size = file_size(path)
        for _ in range(2):
            try:
                append_jsonl(path, row)
                return True
            except OSError as e:
                self.stop_without_room(e)
                self.disk_room.truncate(self.held_bytes)
                if file_size(path) > size:
                    os.truncate(path, size)   # half a row
        return False

    def record_reply(self, job, reply):
        """Replace what was set aside by what it cost, write the row, stop where too many fail."""
        usage = (reply.prompt_tokens, reply.completion_tokens)
        if None not in usage:
            cost = (job.billed_tries - 1) * job.worst_usd + usd(self.cfg, *usage)
            self.tokens += sum(usage)
        else:
            cost = job.billed_tries * job.worst_usd   # nobody said: the worst case
        self.spent = self.spent + cost - job.held_usd
        self.held_bytes -= job.held_bytes
        failed = reply.text is None
        if failed and self.stopping():
            return   # no row: a later run asks again

        row = grade_reply(job, reply)
        row["model"] = self.cfg.api_model or self.cfg.teacher
        # with what it cost when it failed: only the last row of a prompt counts
        row["cost"] = cost + self.past_cost.get(job.prompt_id, 0)
        if not self.write_row(self.paths.rejected if "reason" in row else self.paths.train, row):
            return   # it is longer than what was held
        if failed:
            self.first_failure = self.first_failure or reply.finish_reason
        else:
            self.answered = True
            self.refused_since = None
        # what failed in an earlier run may always fail; it must not stop each later run
        self.recent.append(failed and job.prompt_id not in self.past_cost)
        if sum(self.recent) > 10:
            self.stop(f"{sum(self.recent)} of the last {len(self.recent)} requests failed, "
                      f"the last: {reply.finish_reason}")
        progress = f"{self.tokens:,} tokens"
        if self.spent > 0:
            progress += f", {self.spent:.4f} USD"
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update()


def file_size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def api_key(cfg):
    return os.environ.get(f"{cfg.provider.upper()}_API_KEY", "").strip() or "none"


def find_secrets(cfg):
    """The key, and what the URLs of servers and proxies say before their @, in each of its forms;
    the longest first."""
    provider = cfg.provider.upper()
    secrets = {os.environ.get(f"{provider}_API_KEY", "").strip()}
    base = cfg.api_base or os.environ.get(f"{provider}_BASE_URL", "")
    for url in (base, *urllib.request.getproxies().values()):
        login = url.rpartition("@")[0].rpartition("://")[2]
        password = login.partition(":")[2] or login
        plain = urllib.parse.unquote(login)
        basic = base64.b64encode(plain.encode()).decode()   # as it travels
        secrets |= {login, password, plain, urllib.parse.unquote(password), basic}
    return sorted(secrets, key=len, reverse=True)


def hide_secrets(secrets, text, shortest=4):
    """Some servers repeat what they are sent, in errors and in replies. There a short one is a
    word: a reply that says `pass` does not give a password away."""
    for secret in secrets:
        if len(secret) >= shortest:
            text = text.replace(secret, "***")
    return text


def request_body(cfg, messages):
    """-> what the provider's API takes for one conversation"""
    body = {"messages": messages, "model": cfg.api_model}
    if cfg.api_temperature is not None:
        body["temperature"] = cfg.api_temperature
    if cfg.provider == "openai" and not cfg.api_base:   # OpenAI itself renamed it
        body["max_completion_tokens"] = cfg.max_tokens
    else:
        body["max_tokens"] = cfg.max_tokens
    if cfg.provider == "anthropic":
        system = [message["content"] for message in messages if message["role"] == "system"]
        body["messages"] = [message for message in messages if message["role"] != "system"]
        if system:
            body["system"] = "\n\n".join(system)
    return body


def token_count(usage, name):
    """-> what a server says of tokens; None where that is no count"""
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count <= MAX_COUNT else None


def read_response(cfg, response, secrets):
    """The JSON of an answer -> Reply; raises where it has another form."""
    usage = response.get("usage")
    if cfg.provider == "openai":
        choice = response["choices"][0]
        content = choice["message"].get("content")
        finish_reason = choice.get("finish_reason")
        counts = token_count(usage, "prompt_tokens"), token_count(usage, "completion_tokens")
    else:
        content = response["content"]
        finish_reason = response.get("stop_reason")
        counts = token_count(usage, "input_tokens"), token_count(usage, "output_tokens")
    text, others = join_parts(content)
    # all of an answer that is kept
    strings = text, str(finish_reason or ""), ", ".join(others)
    text, finish_reason, other_parts = [hide_secrets(secrets, string, 8) for string in strings]
    return Reply(text, finish_reason, *counts, other_parts)


def http_status(error):
    return getattr(error, "status_code", None) or 0


def may_pass(sdk, error):
    """Whether the same request may succeed later: rate limits, overload, time-outs, drops."""
    status = http_status(error)
    if status < 400:
        return isinstance(error, (sdk.APIConnectionError, TimeoutError))
    advice = error.response.headers.get("x-should-retry")   # both providers send it
    if advice in ("true", "false"):
        return advice == "true"
    return status in (408, 409, 429) or status >= 500


def retry_after(error):
    """-> the seconds that a server wants to be left alone, 0: it does not say"""
    response = getattr(error, "response", None)
    headers = {} if response is None else response.headers
    with contextlib.suppress(ValueError, TypeError):
        return float(headers.get("retry-after-ms")) / 1000
    with contextlib.suppress(ValueError, TypeError):
        return float(headers.get("retry-after"))
    with contextlib.suppress(ValueError, TypeError, OverflowError):   # a date
        moment = email.utils.parsedate_to_datetime(headers.get("retry-after"))
        return moment.timestamp() - time.time()
    return 0.0


def give_up(ledger, sdk, error):
    """An error that stays -> Reply; it stops the run where no other request would fare better."""
    cfg = ledger.cfg
    status = http_status(error)
    message = hide_secrets(ledger.secrets, one_line(error, 9999))[:300]
    # an earlier run has left rows: then it is the prompt that is not accepted
    is_the_prompt = status in (400, 413, 422) and len(ledger.past_cost) > 0
    never_worked = isinstance(error, (sdk.APIError, TimeoutError)) and not ledger.answered
    if status in (401, 402, 404) or (never_worked and not is_the_prompt):
        ledger.stop(f"{cfg.provider}, model {cfg.api_model}: {message}")
    return Reply(None, f"failed: {message}")


async def ask_api(ledger, client, job):
    """Ask until there is an answer, or patience or money ends -> Reply."""
    cfg = ledger.cfg
    sdk = importlib.import_module(cfg.provider)
    path = "/chat/completions" if cfg.provider == "openai" else "/v1/messages"
    body = request_body(cfg, job.messages)
    for retry in itertools.count():
        if ledger.stopping() or job.billed_tries == 6 or not ledger.reserve(job):
            return Reply(None, "failed: no answer in 6 tries, or no money for another")
        job.billed_tries += 1
        try:
            # post: the typed methods cost twice the time and change from version to version
            request = client.post(path, body=body, cast_to=object)
            # the SDK's time-out is one of each read: a server that trickles never meets it
            response = await asyncio.wait_for(request, 2 * cfg.request_timeout)
            return read_response(cfg, response, ledger.secrets)
        except Exception as e:   # the SDK's own, or an answer of another form
            error = e
        if http_status(error) >= 400:   # refused: free, and what is set aside serves the next try
            job.billed_tries -= 1
        # At least as long as the server says, and longer each time: with only the former all
        # requests that a busy server turned away come back at the same moment.
        backoff = min(0.5 * 2**retry, 8) * random.uniform(0.75, 1)
        seconds = max(backoff, retry_after(error))
        now = time.monotonic()
        ledger.refused_since = ledger.refused_since or now
        ledger.trouble = hide_secrets(ledger.secrets, one_line(error))
        silence = now + seconds - ledger.refused_since   # by the next try, if nobody is answered
        patience = 20 if ledger.answered else 2
        if retry >= patience or silence > MAX_SILENCE or not may_pass(sdk, error):
            return give_up(ledger, sdk, error)
        while time.monotonic() < now + seconds and not ledger.stopping():
            await asyncio.sleep(min(0.2, seconds))


def make_client(cfg, secrets):
    """The provider's own client. It reads the environment too: proxies, certificates."""
    sdk = importlib.import_module(cfg.provider)
    make = sdk.AsyncOpenAI if cfg.provider == "openai" else sdk.AsyncAnthropic
    try:
        with reading(f"provider {cfg.provider}: no client with this api_base, and the proxies and "
                     "certificates of the environment"):
            return make(
                api_key=api_key(cfg), base_url=cfg.api_base, timeout=cfg.request_timeout,
                max_retries=0,   # ask_api tries again, because it knows about money
                # of its own making, it has a destructor that fails where its making failed
                http_client=sdk.DefaultAsyncHttpxClient())
    except UserError as e:   # without its traceback, which may show a password
        raise UserError(hide_secrets(secrets, str(e))) from None


class Heartbeat:
    """A word when nothing comes for 10 s, 20 s, 40 s, ..., and when a stop is heard."""

    def __init__(self):
        self.since = time.monotonic()   # of the last answer
        self.next_word = 10             # seconds after it
        self.stop_said = False

    def answered(self):
        self.since = time.monotonic()
        self.next_word = 10

    def speak(self, ledger, in_flight):
        seconds = time.monotonic() - self.since
        if in_flight and ledger.stopping() and not self.stop_said:
            self.stop_said = True
            print0(f"stopping; {in_flight} requests in flight may be paid for and are awaited, at "
                   f"most {2 * ledger.cfg.request_timeout:g} s; a second signal stops at once")
        if seconds > self.next_word:
            self.next_word *= 2
            print0(f"no answer for {seconds:.0f} s, {in_flight} requests in flight; the last "
                   f"refusal: {ledger.trouble}")


async def ask_all_api(ledger, jobs):
    """In prompt order, cfg.concurrency at a time, until all is answered or the ledger says stop."""
    cfg = ledger.cfg
    heartbeat = Heartbeat()
    waiting = collections.deque(jobs)
    in_flight = {}   # task -> job
    async with make_client(cfg, ledger.secrets) as client:
        while True:
            width = cfg.concurrency if ledger.answered else 1   # a wrong key costs one request
            while waiting and len(in_flight) < width and not ledger.stopping():
                if not ledger.reserve(waiting[0]):
                    break   # what is in flight may cost less than is set aside for it
                job = waiting.popleft()
                in_flight[asyncio.create_task(ask_api(ledger, client, job))] = job
            if not in_flight:
                break
            # even when stopping: what is in flight is paid for
            done, _ = await asyncio.wait(
                in_flight, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                ledger.record_reply(in_flight.pop(task), task.result())
                heartbeat.answered()
            heartbeat.speak(ledger, len(in_flight))
    ledger.out_of_money = len(waiting) > 0 and not ledger.stopping()


def load_local_teacher(cfg):
    tokenizer = load_tokenizer(cfg, cfg.teacher)
    if tokenizer is None:
        raise UserError(f"teacher {cfg.teacher!r} has no tokenizer; use --tokenizer")
    teacher_config = model_config(cfg.teacher, cfg, "teacher")
    dtype = compute_dtype(cfg)
    with progress(f"reading teacher {cfg.teacher}"):
        model = read_model(cfg.teacher, teacher_config, cfg, "teacher", dtype)
    tokenizer.padding_side = "left"   # a reply continues its prompt
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = "{{bos_token}}{%for m in messages%}{{m.content}}\n\n{%endfor%}"
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    teacher = ShardedRoot(model).eval()
    teacher.requires_grad_(False)
    if cfg.cpu_offload:   # a layer at a time comes to the device, where ids and cache are
        shard(teacher, (WORLD,), dtype, drop_layers=True, cpu_offload=True)
    else:
        teacher.to(DEVICE)
    return tokenizer, teacher


class ReplyProgress:
    """What generate() calls a streamer: it hears of each token of a batch, which may take minutes,
    and shows beside the bar how many there are."""

    def __init__(self, bar, max_tokens):
        self.bar = bar
        self.max_tokens = max_tokens
        self.tokens = -1   # the first that it hears of is the prompt
        self.shown = time.monotonic()

    def put(self, _):
        self.tokens += 1
        if time.monotonic() - self.shown > 0.5:
            self.shown = time.monotonic()
            self.bar.set_postfix_str(
                f"this batch: token {self.tokens:,} of at most {self.max_tokens:,}")

    def end(self):
        pass


def generate_replies(cfg, tokenizer, teacher, jobs, bar):
    """-> [Reply] of one batch; the same after a resume, if the batch is the same."""
    inputs = tokenizer.apply_chat_template(
        [job.messages for job in jobs], add_generation_prompt=True, padding=True,
        return_dict=True, return_tensors="pt").to(DEVICE)
    sampling = {}   # the model's own
    if cfg.api_temperature is not None:
        sampling["do_sample"] = cfg.api_temperature > 0
        sampling["temperature"] = cfg.api_temperature or 1.0
    torch.manual_seed(int(digest(cfg.seed, jobs[0].prompt_id), 16) % 2**63)
    streamer = ReplyProgress(bar, cfg.max_tokens)
    ids_BT = teacher(lambda model: model.generate(
        **inputs, max_new_tokens=cfg.max_tokens, streamer=streamer, **sampling))
    replies_BT = ids_BT[:, inputs["input_ids"].shape[1]:]

    replies = []
    for ids, mask in zip(replies_BT.tolist(), inputs["attention_mask"], strict=True):
        ended = len(ids) < cfg.max_tokens or ids[-1] == tokenizer.pad_token_id
        replies.append(Reply(
            text=tokenizer.decode(ids, skip_special_tokens=True).strip(),
            finish_reason="stop" if ended else "length",
            prompt_tokens=mask.sum().item(),
            completion_tokens=sum(token != tokenizer.pad_token_id for token in ids)))
    return replies


def ask_all_local(ledger, jobs):
    """In prompt order, a batch at a time, until all is answered or the ledger says stop."""
    cfg = ledger.cfg
    tokenizer, teacher = load_local_teacher(cfg)
    # batches of all prompts, not of those that are left: a resumed run then draws the same
    for _, group in itertools.groupby(jobs, lambda job: job.number // cfg.concurrency):
        if ledger.stopping():
            break
        batch = list(group)
        replies = generate_replies(cfg, tokenizer, teacher, batch, ledger.bar)
        for job, reply in zip(batch, replies, strict=True):
            ledger.record_reply(job, reply)


def finish_files(ledger, order):
    """Duplicates go, the summary is written -> the table of what became of each prompt."""
    paths = ledger.paths
    fates = drop_duplicates(paths.train, paths.rejected, order)
    if ledger.first_failure and not fates["kept"]:
        ledger.stop(f"nothing was kept, {fates['failed']} prompts failed, the first: "
                    f"{ledger.first_failure.removeprefix('failed: ')}; see {paths.rejected!r}")
    ledger.write_summary(ledger.spent, tokens_this_time=ledger.tokens, ended=ledger.ended(),
                         **fates)
    total = max(1, sum(fates.values()))
    lines = [f"  {name:20}{count:8,}{count / total:8.1%}" for name, count in fates.items()]
    last = f"{ledger.tokens:,} tokens"
    if ledger.spent > 0:
        last += f", {ledger.spent:.4f} USD"
    last += f"; {ledger.ended()}"
    if fates["kept"]:
        last += f"; --dataset {paths.train} trains on it"
    else:
        last += f"; nothing was kept, see {paths.rejected}"
    lines.append(last)
    if fates["cut off"] > 0.1 * total:
        max_tokens = ledger.cfg.max_tokens
        lines.append(f"{fates['cut off'] / total:.0%} of the replies did not end within max_tokens "
                     f"{max_tokens}: --max_tokens {4 * max_tokens}, in another --output_dir")
    return "\n".join(lines)


def generate(cfg):
    """Ask what has no reply yet; leave train.jsonl, rejected.jsonl, summary.json in output_dir."""
    paths = paths_in(cfg.output_dir)
    # what decides the rows; not where the server stands: it may move
    deciding = {*knobs_in("generate"), *knobs_in("api"), "seed", "teacher", "tokenizer", "dtype"}
    settings = {name: value for name, value in result_knobs(cfg).items() if name in deciding}
    jobs = all_prompts(cfg)
    past_cost, answered, spent = read_past(paths, settings)
    todo = [job for job in jobs.values() if job.prompt_id not in answered]
    prompt_tokens = sum(job.max_prompt_tokens for job in todo) // 4   # about 4 bytes a token
    worst_usd = sum(job.worst_usd for job in todo)
    plan = (f"{len(todo):,} of {len(jobs):,} prompts to ask, ~{prompt_tokens:,} tokens; at most "
            f"{len(todo) * cfg.max_tokens:,} come back")
    if cfg.price_in is not None:
        plan += f", for {worst_usd:.2f} USD at these prices"
    print0(plan)

    bar = tqdm(total=len(todo), unit="prompt", dynamic_ncols=True, mininterval=0.5)
    with reading(f"cannot write into {cfg.output_dir!r}"):
        # without a name: a kill leaves nothing of it
        disk_room = tempfile.TemporaryFile(dir=cfg.output_dir)
    with disk_room, stop_signals() as stop_requests, bar:
        ledger = Ledger(cfg, paths, settings, past_cost, spent, stop_requests, bar,
                        find_secrets(cfg), disk_room)
        with reading(f"cannot write into {cfg.output_dir!r}"):
            write_json(cfg.public(), paths.config)
            ledger.write_summary(spent)
        if cfg.provider == "local":
            ask_all_local(ledger, todo)
        else:
            asyncio.run(ask_all_api(ledger, todo))
    try:   # the room that was held is free again
        print0(finish_files(ledger, list(jobs)))
    except OSError as e:   # all rows are there, in the order of their arrival, copies among them
        ledger.stop_without_room(e)
    if ledger.stop_error:
        raise ledger.stop_error


# --------------------------------------------------------------------------------------------------
# Optional: eval: what was lost, what was gained, was the teacher worth it? Each model is loaded,
# scored, compared with the teacher layer by layer and tried out (measure_model); that becomes
# figures with intervals (judge_models), and these report.md, report.json and report.png.
BINS = 15   # of confidence, for the calibration error and the reliability curve
NEW_TOKENS = 48   # of a continuation
METRICS = dict(   # as the table names them, in its order
    perplexity="perplexity", bits="bits a byte", accuracy="top-1 accuracy",
    agreement="top-1 as the teacher", kl="KL to the teacher",
    own="divergence on own texts",   # optional: on_policy
    ece="calibration error",
    parameters="parameters", disk="bytes on disk",
    prefill="prefill tokens/s", generation="generation tokens/s", memory="peak memory, bytes",
)
LEGEND = (
    "In brackets 95 % (bootstrap over sequences); x: of the teacher. Prefill: a batch of "
    "sequences; generation: batch 1; memory: while generating, GPUs only. A checkpoint is as large "
    "as its final/ will be. Layers: the share of the teacher's variance that the best linear map "
    "from a layer leaves unexplained, and linear CKA. A model with another tokenizer continues a "
    "beginning that ends a few bytes elsewhere."
)
PANELS = (   # of the picture: title, x, y
    ("Training", "step", "nats a token: CE, KL (dotted), held-out CE (markers)"),
    ("Layers against the teacher's", "layer", "share unexplained, CKA (dotted)"),
    ("Quality against size", "parameters", "bits a byte, held out, and 95 %"),
    ("Reliability", "confidence", "share right"),
)
CURVES = {   # panel, line; o is the model's marker
    "train/ce_loss": (0, "-"), "train/kl_loss": (0, ":"), "eval/ce_loss": (0, "o"),
    "unexplained": (1, "o-"), "CKA": (1, "o:"), "reliability": (3, "o-"),
}
STYLES = (("0.6", "s"), ("black", "D"), ("#d55e00", "^"), ("#56b4e9", "o"))   # of models


# ---- which models, and the rows of each


def name_models(cfg):
    """-> {label: what it is loaded from}: the teacher, the student, and each of --compare under
    the name of its folder."""
    student = cfg.student
    if student == "demo":   # none was named
        student = os.path.join(cfg.output_dir, "final")
    names = {"teacher": cfg.teacher, "student": student}
    for path in cfg.compare:
        label = os.path.basename(path.rstrip("/").removesuffix("/final"))
        if label in names:
            label = path
        names[label] = path
    return names


def is_checkpoint(name):
    return os.path.exists(os.path.join(name, "state.json"))


def load_any(cfg, name):
    """A model, or checkpoints/step-... of a run in progress: its student, as that run builds it.
    Whether code of strangers runs is for this run to say."""
    if not is_checkpoint(name):
        root, _ = load_model(dataclasses.replace(cfg, teacher=name), "teacher")
        return root
    path, _ = find_checkpoint(name, cfg.output_dir)
    here = dict(dtype=cfg.dtype, trust_remote_code=cfg.trust_remote_code)
    run = Config(**read_json(os.path.join(path, "../../config.json"), {}) | here)
    root, _ = load_model(run, "student")
    load_checkpoint(path, tensors_of(root, {}, {}))
    return root


def read_losses(name):
    """{key: [(step, value), ...]} from log.jsonl of the run that a model directory or a checkpoint
    is of; nothing where there is none."""
    path = os.path.join(name, "../.." if is_checkpoint(name) else "..", "log.jsonl")
    losses = collections.defaultdict(list)
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:   # a run may be writing its last line
            entries = [json.loads(line) for line in f if line.endswith("}\n")]
        for entry in entries:
            for key, value in entry.items():
                if key.endswith("loss") and value:   # 0: there is no such term; None: not finite
                    step = entry[f"{key.split('/')[0]}/step"]
                    losses[key].append((int(step), float(value)))
    return losses


def rows_for(cfg, name, tokenizer, rows):
    """-> the rows as a model reads them, its tokenizer. Where that cuts like `tokenizer` it is that
    one; else the rows are the same bytes, after its BOS, or EOS where it has none, in place of the
    first token, which is never counted."""
    other = load_tokenizer(dataclasses.replace(cfg, tokenizer=None), name) or tokenizer
    try:
        compare_tokenizers(tokenizer, other, cfg.teacher, name)
        return rows, tokenizer
    except UserError as e:
        if not all(row["targets"][1:].all() for row in rows):
            raise UserError(f"{e}. They are compared on plain text; here prompts are masked") from e
    eos = tokenizer.eos_token or "\0"
    other_eos = other.eos_token or ""
    begin = bos_of(other)
    if begin is None:
        begin = other.eos_token_id or 0
    retokenized = []
    for row in rows:
        text = tokenizer.decode(row["input_ids"][1:]).replace(eos, other_eos)
        ids = np.array([begin, *other(text, add_special_tokens=False, verbose=False)["input_ids"]])
        targets = np.arange(len(ids)) > 0
        retokenized.append({"input_ids": ids, "targets": targets, "starts": np.array([0])})
    return retokenized, other


def beginnings(rows):
    """Of three rows (fewer where there are fewer): up to the first target, and at least 32 ids."""
    prompts = []
    for i in range(0, len(rows), -(-len(rows) // 3)):
        width = max(32, rows[i]["targets"].argmax())
        prompts.append(rows[i]["input_ids"][:width].tolist())
    return prompts


# ---- one model: scores, layers, speed


def score(cfg, root, reference, rows, tokenizer, what):
    """One pass over the rows of all ranks, over the ids of the tokenizer. -> sums a sequence
    [rows, 5]: tokens, -log p, top-1 right, top-1 the reference's, KL to it (with its T^2); and sums
    a bin of confidence [BINS, 3]: tokens, hits, confidence."""
    sums = torch.zeros(len(rows), 5, dtype=torch.float64)
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    with evaluating(reference):
        for numbers, batch in held_out(root, rows, cfg.batch_size, what):
            hidden_ND, head = root(counted_hidden, batch)
            reference_ND, reference_head = reference(counted_hidden, batch)
            # padded tails are cut
            vocab = min(vocabulary_of(tokenizer), len(head.weight), len(reference_head.weight))
            row_N = torch.tensor(numbers)[batch.positions.cpu() // batch.input_ids.shape[1]]
            chunk = max(1, LOGITS_BUDGET // (24 * vocab))   # six fp32 [C, V] at a time
            for part_C in torch.arange(len(row_N)).split(chunk):
                terms_C6 = score_tokens(
                    head_logits(hidden_ND[part_C], head, vocab),
                    head_logits(reference_ND[part_C], reference_head, vocab),
                    batch.labels[part_C].to(DEVICE),
                    cfg.temperature,
                )
                sums.index_add_(0, row_N[part_C], terms_C6[:, :5])
                bin_C = (terms_C6[:, 5] * BINS).long().clamp(max=BINS - 1)
                bins.index_add_(0, bin_C, terms_C6[:, [0, 2, 5]])
    dist.all_reduce(sums, group=HOST)
    dist.all_reduce(bins, group=HOST)
    return sums.numpy(), bins.tolist()


def score_tokens(logits_CV, reference_CV, labels_C, temperature):
    """-> [C, 6] on the host: what score sums a sequence, and the confidence: p of the top-1."""
    best, top = logits_CV.max(-1)
    log_total = logits_CV.logsumexp(-1)
    label_logit = logits_CV.gather(1, labels_C[:, None])[:, 0]
    logp = torch.log_softmax(logits_CV / temperature, -1)
    logq = torch.log_softmax(reference_CV / temperature, -1)
    kl = torch.linalg.vecdot(logq.exp(), logq.sub_(logp)) * temperature**2
    terms = [
        torch.ones_like(kl),
        log_total - label_logit,
        top == labels_C,
        top == reference_CV.argmax(-1),
        kl,
        (best - log_total).exp(),
    ]
    return torch.stack([x.double().cpu() for x in terms], 1)


def layer_outputs(model, batch):
    """Runs inside a root: [N, D] of the counted tokens after each layer."""
    outputs = model.base_model(batch.input_ids, use_cache=False, output_hidden_states=True)
    states = outputs.hidden_states[1:]   # the first is of the embeddings
    return [state_BTD.flatten(0, 1)[batch.positions].double() for state_BTD in states]


def compare_layers(root, teacher, batch):
    """How much each layer of a student tells of the teacher's layer at its depth."""
    with evaluating(teacher), evaluating(root):
        states = root(layer_outputs, batch)
        teacher_states = teacher(layer_outputs, batch)
    layers = []
    for i, x_ND in enumerate(states):   # a student may be the deeper one here
        j = max(0, teacher_layer(i, len(states), len(teacher_states)))
        share, cka = compare_states(x_ND, teacher_states[j])
        layers.append(dict(student=i + 1, teacher=j + 1, share=share, cka=cka))
    return layers


def compare_states(x_ND, y_NE):
    """-> the share of y's variance that the best linear map from x leaves unexplained (None: too
    few tokens), linear CKA."""
    x_ND = x_ND - x_ND.mean(0)
    y_NE = y_NE - y_NE.mean(0)
    xx = x_ND.T @ x_ND
    xy = x_ND.T @ y_NE
    yy = y_NE.T @ y_NE
    cka = (xy.norm() ** 2 / xx.norm() / yy.norm()).item()
    # Fitted on the tokens that it is judged on: each row of the map and its bias explain one token
    # for nothing, and those are left out of the average.
    tokens, width = x_ND.shape
    if tokens <= width + 1:
        return None, cka
    missed = y_NE - x_ND @ torch.linalg.pinv(xx, hermitian=True) @ xy
    share = missed.square().sum() / y_NE.square().sum() * tokens / (tokens - width - 1)
    return share.item(), cka


def try_out(root, tokenizer, rows, batch_size, limit):
    """-> tokens a second, and [greedy, sampled] continuations of each beginning. limit: how long a
    row may become."""
    def write(prompts, new, temperature=0.0):
        """-> seconds for `new` tokens after each prompt, the texts up to the end mark."""
        start = time.time()
        ids = write_texts(root, prompts, range(len(prompts)), [new] * len(prompts), temperature,
                          set(), vocabulary_of(tokenizer))
        seconds = time.time() - start
        eos = tokenizer.eos_token or "\0"
        return seconds, [text.split(eos)[0] for text in tokenizer.batch_decode(ids)]

    prompts = beginnings(rows)
    new = min(NEW_TOKENS, limit + 1 - max(map(len, prompts)))   # the last is never looked up
    _, greedy = write(prompts, new)
    _, sampled = write(prompts, new, temperature=1.0)
    batch = [row["input_ids"] for row in itertools.islice(rows, batch_size)]
    prefill, _ = min(write(batch, 1) for _ in range(3))
    generation, _ = write(prompts[:1], new)
    return dict(prefill=sum(map(len, batch)) / prefill, generation=new / generation,
                texts=list(zip(greedy, sampled, strict=True)))


def measure_model(cfg, label, name, teacher, tokenizer, rows):
    """-> root, figures. teacher: None where this is the teacher."""
    allocated = torch.cuda.memory_allocated()
    with phase(f"reading {label} {name}"):
        root = load_any(cfg, name)
        curves = read_losses(name) if teacher else {}   # its own are of another run
        rows, own_tokenizer = rows_for(cfg, name, tokenizer, rows)
        limit = max(len(row["input_ids"]) for row in rows)
        check_model(root, label, name, own_tokenizer, limit)
    same = own_tokenizer is tokenizer
    teacher = teacher or root
    reference = teacher if same else root   # itself: nothing that needs one vocabulary counts
    sums, bins = score(cfg, root, reference, rows, own_tokenizer, f"evaluating {label}")
    print0(f"layers of {label}, then what it writes, by the clock ...")
    layers = []
    if reference is not root:   # on the same rows on every rank
        probe = list(itertools.islice(rows, 8192 // cfg.seq_len + 1))
        layers = compare_layers(root, teacher, collate(probe))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trial = try_out(root, own_tokenizer, rows, cfg.batch_size, limit)
    memory = torch.cuda.max_memory_allocated() - allocated if CUDA else None
    parameters = root.model.num_parameters()
    # a hub name, or a checkpoint, whose files hold more than the weights: as saved
    files = glob.glob(f"{glob.escape(name)}/model*.safetensors")
    disk = sum(map(os.path.getsize, files)) or parameters * compute_dtype(cfg).itemsize
    figures = dict(name=name, same_tokenizer=same, parameters=parameters, disk=disk, memory=memory,
                   layers=layers, sums=sums, bins=bins, curves=curves, **trial)
    figures["own"] = score_own_texts(   # optional: on_policy
        cfg, root, teacher if same else None, tokenizer, rows)
    return root, figures


# ---- figures with intervals


def interval(top, bottom, seed):
    """-> [sum(top) / sum(bottom), low, high]: 95 % of it when sequences are drawn anew: percentiles
    of the bootstrap, widened for few sequences like Student's t."""
    n = len(top)
    rng = np.random.default_rng(seed)
    middle = top.sum() / bottom.sum()
    off = []
    for _ in range(2000):
        picks = rng.integers(0, n, n)
        off.append(top[picks].sum() / bottom[picks].sum() - middle)
    # The bootstrap's variance is (n - 1) / n of what it estimates; t's 97.5 % point with n - 1
    # degrees of freedom is about 1 + 1.21 / (n - 1) times the normal's.
    widen = math.sqrt(n / (n - 1)) * (1 + 1.21 / (n - 1))
    low, high = middle + widen * np.quantile(off, (0.025, 0.975))
    return [float(middle), float(low), float(high)]


def judge_models(models, sizes, seed):
    """Adds to the figures of each model those of its sums a sequence (see score) and of the bytes
    of each, the student's lead over it, and the points of its curves."""
    student_nats = models["student"]["sums"][:, 1]
    for figures in models.values():
        sums = figures.pop("sums")
        counts, nats, *_ = sums.T
        tokens, _, right, agreed, kl = sums.sum(0).tolist()
        around = [math.exp(min(x, 700)) for x in interval(nats, counts, seed)]
        figures["perplexity"], *figures["perplexity_95"] = around
        figures["bits"], *figures["bits_95"] = interval(nats / math.log(2), sizes, seed)
        figures["tokens"] = int(tokens)
        figures["accuracy"] = right / tokens
        same = figures.pop("same_tokenizer")   # these need one vocabulary
        figures["agreement"] = agreed / tokens if same else None
        figures["kl"] = kl / tokens if same else None
        bins = figures["bins"]
        figures["ece"] = sum(abs(hits - p) for _, hits, p in bins) / tokens
        difference, low, high = interval((student_nats - nats) / math.log(2), sizes, seed)
        verdict = "no significant difference"
        if high < 0:
            verdict = "better"
        elif low > 0:
            verdict = "worse"
        figures["student_against_it"] = dict(
            difference=difference, interval=[low, high], verdict=verdict)
        layers = figures["layers"]
        figures["curves"] |= {
            "unexplained": [(layer["student"], layer["share"]) for layer in layers],
            "CKA": [(layer["student"], layer["cka"]) for layer in layers],
            "reliability": [(p / n, hits / n) for n, hits, p in bins if n],
        }


# ---- the report


def draw_report(path, models):
    """Shades and markers tell models apart in grey too."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for panel, (title, x, y) in zip(panels, PANELS, strict=True):
        panel.set(title=title, xlabel=x, ylabel=y)
    _, layers, quality, reliability = panels
    layers.xaxis.get_major_locator().set_params(integer=True)
    quality.set_xscale("log")
    reliability.plot([0, 1], [0, 1], color="0.85", zorder=0)
    for i, (label, figures) in enumerate(models.items()):
        color, marker = STYLES[i % len(STYLES)]
        for key, (panel, line) in CURVES.items():
            points = figures["curves"].get(key)
            if points:
                xs, ys = zip(*points, strict=True)
                panels[panel].plot(xs, ys, line.replace("o", marker), color=color, markersize=5)
        size = figures["parameters"] * 1.05**i   # aside a little: models of one size are common
        bits = [*figures["bits_95"], figures["bits"]]
        quality.plot([size] * 3, bits, marker + "-", color=color, label=label)
    figure.legend(loc="outside lower center", ncols=len(models), frameon=False)
    figure.savefig(path, dpi=130)


def show_number(x):
    if x is None:
        return "-"
    if abs(x) < 1e4:
        return f"{x:.4g}"
    return f"{x:,.0f}"


def show_figure(models, label, key):
    """The cell of a model in the table: value (low to high), so many x of the teacher's."""
    value = models[label][key]
    shown = show_number(value)
    if key + "_95" in models[label]:
        low, high = map(show_number, models[label][key + "_95"])
        shown += f" ({low} to {high})"
    whole = models["teacher"][key]
    if label != "teacher" and whole and value is not None:   # the teacher's KL is 0
        shown += f", {show_number(value / whole)} x"
    return shown


def write_report(folder, setting, models, prompts):
    """The beginning of report.md, verdicts and the table, is printed too. The picture comes last:
    what it is made from stands by then."""
    lines = [f"# {models['student']['name']}: the report", ""]
    for label, figures in models.items():
        against = figures["student_against_it"]
        low, high = against["interval"]
        if label != "student":
            lines.append(
                f"- student against {label}: {against['difference']:+.4f} bits a byte "
                f"({low:+.4f} to {high:+.4f}): {against['verdict']}"
            )
    rows = []
    for key, title in METRICS.items():
        rows.append([title, *[show_figure(models, label, key) for label in models]])
    settings = ", ".join(f"{key} {value}" for key, value in setting.items())
    lines += ["", table(["", *models], rows), "", f"{settings}. {LEGEND}", ""]
    print0("\n".join(lines))
    lines += ["![report.png: training, layers, quality against size, reliability](report.png)", ""]
    for label, figures in models.items():
        rows = [[show_number(x) for x in layer.values()] for layer in figures["layers"]]
        if rows:
            header = ["layer", "teacher's", "unexplained", "CKA"]
            lines += [f"## Layers of {label}", "", table(header, rows), ""]
    for i, prompt in enumerate(prompts):   # indented is code: nothing to escape
        lines += ["## Greedy, then sampled, after", "", f"    {prompt!r}", ""]
        for label, figures in models.items():
            lines += [f"    {label}: {text!r}" for text in figures["texts"][i]]
        lines.append("")
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    everything = dict(setting=setting, models=models, prompts=prompts)
    write_json(everything, os.path.join(folder, "report.json"))
    try:
        draw_report(os.path.join(folder, "report.png"), models)
    except ImportError:
        print0("No report.png: pip install matplotlib")


def report(cfg):
    """-> {label: figures}, which are in output_dir's report.md, report.json and report.png."""
    names = name_models(cfg)
    for label, name in names.items():   # a name that is no model is refused before any work
        if not is_checkpoint(name):
            with phase(f"looking for {label} {name}"), node_first():
                AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    tokenizer = load_tokenizer(cfg, cfg.teacher, names["student"])
    _, rows = load_data(cfg, tokenizer)
    if len(rows) < 2:
        raise UserError(f"{cfg.dataset!r}: one held-out sequence has no interval; bring more text "
                        "or lower --seq_len")
    models = {}
    teacher = None
    for label, name in names.items():
        root, models[label] = measure_model(cfg, label, name, teacher, tokenizer, rows)
        teacher = teacher or root   # which comes first, and stays
        del root   # before the next one is read
    sizes = []   # of the counted text of each row, in UTF-8
    for row in rows:
        text = tokenizer.decode(row["input_ids"][row["targets"]], skip_special_tokens=True)
        sizes.append(len(text.encode()))
    judge_models(models, np.array(sizes), cfg.seed)
    setting = dict(
        dataset=cfg.dataset, sequences=len(rows), bytes=sum(sizes), ranks=WORLD,
        device=DEVICE.type, dtype=str(compute_dtype(cfg)),
        temperature=cfg.temperature, batch_size=cfg.batch_size,
        own_texts=f"{cfg.divergence}, {cfg.max_new_tokens} tokens",   # optional: on_policy
    )
    prompts = []
    if cfg.generate_comparisons:
        prompts = [tokenizer.decode(ids) for ids in beginnings(rows)]
    if RANK == 0:
        write_report(cfg.output_dir, setting, models, prompts)
    return models


# --------------------------------------------------------------------------------------------------
# Main: one mode, one function.


def main(argv=None):
    """The command line in this process -> the exit code."""
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return run_config(cfg)


def run_config(cfg):
    """Run what cfg asks for -> 0: done, or saved after a signal; 2: something the user can mend."""
    with lasting_output():
        try:
            with process_group():
                return run_in_group(cfg)
        except UserError as e:   # there is no group
            return explain(e, cfg)


def run_in_group(cfg):
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    run_mode = choose_mode(cfg)
    try:
        with contextlib.ExitStack() as stack:
            if cfg.mode != "cache":   # of which any number may be at work
                stack.enter_context(lock(cfg.output_dir))
            if cfg.mode == "train":
                check_output(cfg.output_dir)
            names = [cfg.teacher, cfg.student, cfg.tokenizer, cfg.dataset]
            names += cfg.compare   # optional: eval
            check_hub(names)
            run_mode(cfg)
    except UserError as e:
        return explain(e, cfg)
    except torch.OutOfMemoryError as e:
        return explain(UserError(
            f"rank {RANK} ran out of memory ({one_line(e)}); turn {MEMORY_ADVICE}"), cfg)
    except KeyboardInterrupt:   # the second one
        fail_first()
        return 130
    except Exception:
        if WORLD > 1 and some_rank_failed():
            return 2   # it has said why; what broke here is the connection to it
        raise
    return 0


def choose_mode(cfg):
    run_mode = train
    if cfg.blockwise:   # optional: blockwise
        run_mode = train_blockwise
    if cfg.mode == "cache":   # optional: cache
        run_mode = fill_cache
    if cfg.mode == "generate":   # optional: generate
        run_mode = generate
    if cfg.mode == "eval":   # optional: eval
        run_mode = report
    if cfg.mode != "generate":   # optional: demo
        run_mode = functools.partial(run_demo, run_mode)
    return run_mode


def explain(error, cfg):
    """One `error:` line, once for all ranks -> the exit code. Where a reader failed, its traceback
    goes to output_dir/error.log, or to the terminal with --debug."""
    if not fail_first():
        return 2
    print(f"error: {error}", file=sys.stderr)
    if error.__cause__ is not None:
        trace = "".join(traceback.format_exception(error.__cause__))
        if cfg.debug:
            print(trace, file=sys.stderr)
        elif os.path.isdir(cfg.output_dir):   # it goes away with a run that was refused
            with contextlib.suppress(OSError), open(
                    os.path.join(cfg.output_dir, "error.log"), "a", encoding="utf-8") as f:
                f.write(f"error: {error}\n{trace}\n")
    return 2


if __name__ == "__main__":
    try:
        code = run_config(CONFIG)
    except Exception:
        if WORLD == 1:
            raise
        traceback.print_exc()
        code = 1
    if code and WORLD > 1:   # an orderly end would wait for ranks that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
