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
import errno   # optional: generate
import fcntl
import functools
import glob
import hashlib
import importlib   # optional: generate
import itertools
import json
import math
import os
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
import time
import traceback
import urllib.parse   # optional: generate
import urllib.request   # optional: generate
import warnings   # optional: generate
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

from config import (
    Config,
    UserError,
    demo_knobs,   # optional: demo
    knobs_of,
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
import huggingface_hub   # optional: demo
import numpy as np
import safetensors.numpy   # optional: cache
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    get_scheduler,
    masking_utils,
)


# --------------------------------------------------------------------------------------------------
# Runtime: who am I, on which device. One process is rank 0 of 1 and takes the same path as many.


RANK = int(os.environ.get("RANK", 0))               # torchrun sets all four
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))   # on this node
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
HOST = None    # the group of all ranks' hosts, beside that of their devices: see process_group
STORE = None   # what a rank says there every other rank can read, without a collective


def print0(*words):
    if RANK == 0:
        with contextlib.suppress(OSError):   # the terminal is gone: the run goes on, and saves
            tqdm.write(" ".join(map(str, words)))   # a line never tears the bar


@contextlib.contextmanager
def phase(doing):
    """Around each thing that is done before the first step: says so, and whatever goes wrong in it
    becomes one `error:` line (its traceback goes to error.log). Later on an exception is a bug."""
    print0(f"{doing} ...")
    try:
        yield
    except (UserError, torch.OutOfMemoryError):   # of an inner phase, or in words of our own
        raise
    except Exception as e:
        reason = one_line(e, 400)
        if e.__cause__:   # a reader's own message, which `datasets` hides behind another
            reason += f" ({one_line(e.__cause__, 400)})"
        raise UserError(f"while {doing}: {reason}") from e


# ---- ranks


@contextlib.contextmanager
def process_group():
    """gloo beside NCCL: counts and flags travel between hosts without making the GPU wait. There
    ranks wait, for hours if need be, for one that downloads or tokenises; in a collective on GPUs
    whoever waits for a quarter of an hour waits for a rank that is gone."""
    global HOST, STORE
    patience = dict(timeout=datetime.timedelta(minutes=15))
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")   # TF32
    else:
        keep_freed_memory()
    STORE = dist.HashStore()   # alone, without opening a port
    if "RANK" in os.environ:
        with phase("joining the other ranks"):
            STORE, _, _ = next(rendezvous("env://", **patience))
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", store=STORE, rank=RANK,
                            world_size=WORLD, **patience)
    HOST = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    try:
        yield
        all_sum(0)   # the store goes with its host: nobody leaves before all are done
    finally:
        if WORLD == 1:   # else it might wait for ranks that are gone: they just exit
            dist.destroy_process_group()


def first_to_fail():
    """Whether this rank fails first. It speaks for all: what breaks on the others from here on is
    their connection to it."""
    try:
        return STORE is None or STORE.add("failed", 1) == 1
    except RuntimeError:   # the store went with the rank that was first
        return False


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
    dist.all_reduce(total, group=HOST)
    return total.tolist()


def from_rank0(value):
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, group=HOST)
    return box[0]


# ---- files


def digest(*things):
    """16 characters that differ when anything in these things does."""
    text = json.dumps(things, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path, default=None):
    """default: where there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def write_json(value, path):
    """The file is the old one or the new one, never half of it."""
    aside = Path(f"{path}.{os.getpid()}.tmp")   # workers of a cache may write at the same moment
    aside.write_text(json.dumps(value, indent=2))
    aside.replace(path)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8", errors="replace") as f:   # half a surrogate pair
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def sync(*paths):
    """Files or folders to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def table(header, rows):
    """Lists of strings -> markdown that is aligned, so that a terminal can show it too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * width for width in widths]
    lines = [map(str.rjust, line, widths) for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- whose folder, and how to stop what is at work there

MARK = ".simple_distill"   # in a folder of ours: the mode that writes there; locked by who is at it
WRITES = {   # mode: what it writes, names that must be free in a folder without our mark
    "train": ("config.json", "log.jsonl", "checkpoints", "final"),
    "eval": ("report.md", "report.json", "report.png"),   # optional: eval
    "cache": ("config.json", "manifest.json", "index.json", "tokenizer"),   # optional: cache
    "generate": (   # optional: generate
        "config.json", "replies.jsonl", "train.jsonl", "rejected.jsonl", "summary.json"),
    "demo": ("corpus", "tokenizer", "student", "teacher", "teacher-shape"),   # optional: demo
}


@contextlib.contextmanager
def claim(folder, mode, wait=False):
    """Makes a folder ours for as long as this lasts: what stands there under our names may be
    replaced. One run a folder; wait: until another one is done. The kernel drops the lock with its
    process."""
    words = f"{mode} {from_rank0(time.time_ns())}"
    with contextlib.ExitStack() as stack:
        with phase(f"taking {folder} for this run alone"):
            if RANK == 0:   # a second handle of this process, closed, would drop the lock
                file = stack.enter_context(mark_folder(folder, mode))
                fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(words)
                file.flush()
                os.fsync(file)   # a shared disk shows it to whoever opens it from here on
            all_sum(0)
            # a node's own disk under that name would get checkpoints without a part
            if RANK > 0 and Path(folder, MARK).read_text() != words:
                raise UserError(f"rank {RANK} does not see what rank 0 writes in {folder!r}: it "
                                "has to lie on a disk that all share")
        yield


def mark_folder(folder, mode):
    """-> the mark of a folder, open. Refused: one without a mark that holds a name which this mode
    writes, and one of another mode."""
    path = Path(folder, MARK)
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = [name for name in WRITES[mode] if Path(folder, name).exists()]
    if taken and not path.exists():
        raise UserError(f"{folder!r} holds {taken[0]!r} and no {MARK}: it is not ours, or of a "
                        f"version before; choose another folder, or make it ours: touch {path}")
    file = path.open("a+")
    file.seek(0)
    there = file.read().split(" ")[0]
    if there not in ("", mode):
        raise UserError(f"{folder!r} is of mode {there}; choose another folder")
    return file


@contextlib.contextmanager
def stop_signals():
    """SIGTERM, Ctrl-C, or a terminal that closes: finish the step, save, exit 0. Yields
    stop_requests, empty so far."""
    stop_requests = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before[number] = signal.signal(number, lambda *_: stop_requests.append(1))
    try:
        yield stop_requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Losses: alpha * CE + (1 - alpha) * T^2 * KL over chunks of tokens, gradient formed on the spot.
# Hands on distillation_loss, Head, DenseTarget and SparseTarget. Change the objective in
# chunk_terms: it takes the logits of a chunk and hands on two losses a token and the gradient of
# the logits.

# bytes of both heads' outputs at once; the fp32 terms come on top; see chunk_size
LOGITS_BUDGET = 512 * 2**20
COMPILED_VOCAB = 16384   # from this size on the compiler's 10 seconds are worth it


class Head(NamedTuple):
    """Hidden states -> logits: softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""
    weight: torch.Tensor                   # [V, D]
    bias: Optional[torch.Tensor] = None    # [V]
    scale: float = 1.0                     # Cohere, Granite
    softcap: Optional[float] = None        # Gemma


class DenseTarget(NamedTuple):
    """A teacher that is here: its head is applied to a chunk of tokens at a time."""
    hidden: torch.Tensor   # [N, Dt]
    head: Head


class SparseTarget(NamedTuple):
    """A teacher from the cache: some tokens with their probabilities, all others as one bucket."""
    ids: torch.Tensor       # [N, K] distinct in a row; repeated where rest is 0: their probs add up
    probs: torch.Tensor     # [N, K]
    rest: torch.Tensor      # [N] mass not listed: 0 for method sample, complete in expectation
    entropy: torch.Tensor   # [N] of the distribution that KL is measured to


def tokens_of(target, where):
    """The same tokens of a DenseTarget, of a SparseTarget or of None."""
    if target is None:
        return None
    if isinstance(target, DenseTarget):
        return DenseTarget(target.hidden[where], target.head)
    return SparseTarget(*[tensor[where] for tensor in target])


def as_head(head):
    """nn.Linear, or what else has its attributes -> Head."""
    return Head(
        head.weight, head.bias, getattr(head, "scale", 1.0), getattr(head, "softcap", None))


def raw_logits(hidden, head, vocabulary=None):
    """-> [.., V] of the first ids, before scale and softcap."""
    bias = None if head.bias is None else head.bias[:vocabulary]
    return nn.functional.linear(hidden, head.weight[:vocabulary], bias)


def scale_and_softcap(raw, scale, softcap):
    """-> logits in fp32 (a bf16 log-softmax has a floor of 0.02 nats), d logits / d raw."""
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
    if p_weight_from_ce == 0:   # always so where T is not 1; exactly 0 where p equals q
        return kl, p.sub_(q).mul_(kl_weight)
    if p_weight_from_ce + kl_weight != 1:   # never so, but in a fork that weighs otherwise
        p.mul_(p_weight_from_ce + kl_weight)
    return kl, p.sub_(q, alpha=kl_weight)


def pulled_terms(p, pull, p_weight_from_ce, kl_weight):
    """Of a divergence with the derivative pull [C, V] by p, but for a constant a token: the sum of
    p * pull [C], and the gradient through the softmax."""
    mean = torch.linalg.vecdot(p, pull)
    # gradient: p * (kl_weight * (pull - mean) + p_weight_from_ce)
    grad = p.mul_(pull.sub_(mean[:, None]).mul_(kl_weight).add_(p_weight_from_ce))
    return mean, grad


def jsd_terms(p, log_q_over_p, q, *weights):
    """(KL(p || m) + KL(q || m)) / 2 with their middle m = (p + q) / 2."""
    # r = log(q / p):  -log(p / m) = log((1 + exp(r)) / 2) = max(r, 0) + log(1 + expm1(-|r|) / 2)
    pull = log_q_over_p.clamp_min(0) + (torch.expm1(-log_q_over_p.abs()) / 2).log1p_()
    pull = pull.mul_(-0.5)                             # log(p / m) / 2
    teacher_pull = log_q_over_p.mul_(0.5).add_(pull)   # log(q / m) / 2
    teacher_part = torch.linalg.vecdot(q, teacher_pull)
    student_part, grad = pulled_terms(p, pull, *weights)
    return student_part + teacher_part, grad


def sparse_kl_terms(z, p, total, target, p_weight_from_ce, kl_weight):
    """Forward KL to a SparseTarget, the rest of the mass as one bucket on both sides.

    KL = -sum of q * log(p) - rest * log(rest_p) - entropy, with sums over the listed entries and
    rest_p = 1 - sum of p.
    """
    ids, q, rest, entropy = target   # [C, K], as all that is listed; [C, K], [C], [C]
    listed_logp = z.gather(-1, ids) - total.log()
    # 1 - sum of the listed would cancel: below 1e-7 nothing of the rest would be left
    listed_p = p.gather(-1, ids)
    unlisted_p = p.scatter_(-1, ids, 0.0)   # [C, V]
    rest_p = unlisted_p.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
    kl = -(q * listed_logp).sum(-1) - entropy
    kl = kl - torch.where(rest > 0, rest * rest_p.log(), 0.0)
    # d KL / d u = p - q on listed entries, keep * p on the others. Method sample: rest 0, keep 1,
    # and ids that repeat add up their q.
    keep = (1 - rest / rest_p)[:, None]
    grad = unlisted_p.mul_(kl_weight * keep + p_weight_from_ce)
    grad.scatter_(-1, ids, (kl_weight + p_weight_from_ce) * listed_p)
    grad.scatter_add_(-1, ids, -kl_weight * q)
    return kl, grad


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
    elif divergence == "mse":   # optional: blockwise
        # in KL's place the mean square of the difference between the logits; T is 1
        error = logits - scale_and_softcap(target, *teacher_scaling)[0]
        kl = error.square().mean(-1)
        grad = p.mul_(p_weight_from_ce).add_(error, alpha=2 * kl_weight / error.shape[-1])
    else:
        y, exp_y, teacher_total = exponentials(
            scale_and_softcap(target, *teacher_scaling)[0], temperature)
        difference = y.sub_(z)                  # log(q / p) = difference + shift, [C, V] + [C, 1]:
        shift = (total / teacher_total).log()   # exactly 0 where student and teacher agree
        if divergence == "forward":
            kl, grad = forward_kl_terms(
                p, exp_y, teacher_total, difference, shift, p_weight_from_ce, kl_weight)
        elif divergence == "reverse":
            # KL(p || q) = sum of p * log(p / q)
            log_p_over_q = difference.add_(shift).neg_()
            kl, grad = pulled_terms(p, log_p_over_q, p_weight_from_ce, kl_weight)
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


@functools.cache   # so that nothing is compiled twice
def chunk_kernel(worth_compiling, **options):
    """chunk_terms with its options fixed, compiled where that pays and can be done: it takes about
    10 s once, and a C++ compiler on CPU, Triton on CUDA."""
    eager = functools.partial(chunk_terms, **options)
    if not worth_compiling:
        return eager
    compiled = torch.compile(eager)

    def run(student_CV, labels_C, target):
        nonlocal compiled
        inputs = [student_CV, labels_C]
        if isinstance(target, SparseTarget):
            inputs.extend(target)
        elif target is not None:
            inputs.append(target)
        for tensor in inputs:   # one compilation for any number of tokens
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(student_CV, labels_C, target)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            print0(f"loss: no working compiler ({type(e).__name__}), its element-wise part runs "
                   "eagerly, slower and with more memory")
            compiled = eager
            return eager(student_CV, labels_C, target)

    return run


def chunk_size(device, itemsize, vocab):
    """How many tokens are projected to the vocabulary at once. On a GPU, where the loss is
    compiled, up to four times as many: every chunk passes the head's whole gradient through memory
    once. A share of the card, not of what is free: another chunk rounds otherwise, and a resumed
    run is to be the same."""
    budget = LOGITS_BUDGET
    if device.type == "cuda" and vocab >= COMPILED_VOCAB:
        share = torch.cuda.get_device_properties(device).total_memory // 40
        budget = min(max(share, budget), 4 * budget)
    return max(1, budget // (2 * itemsize * vocab))


def add_product(total, a, b):
    """total += a @ b, summed in the type of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":   # 16-bit factors, fp32 sums, no temporary between
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class FusedDistillation(torch.autograd.Function):
    """Sums over tokens of loss, ce and kl, their gradients formed chunk by chunk.

    All matmuls, forward and backward, happen in forward; backward only scales. From id `vocab` on
    the head is padding: not used, gradient 0.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, teacher, kernel, alpha, chunk, vocab,
                training):
        # what needs a gradient is said whether or not gradients are on
        need_hidden, need_weight, need_bias = [
            training and needed for needed in ctx.needs_input_grad[:3]]
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if need_bias else None
        student = Head(weight_VD, bias_V)
        ce = kl = hidden_ND.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD = hidden_ND[part]
            target = tokens_of(teacher, part)
            if isinstance(target, DenseTarget):
                target = raw_logits(*target, vocab)
            ce_C, kl_C, grad_CV = kernel(raw_logits(h_CD, student, vocab), labels_N[part], target)
            del target   # [C, V]: its memory is wanted below
            ce = ce + ce_C.sum(dtype=torch.float64)
            kl = kl + kl_C.sum(dtype=torch.float64)
            if need_bias:
                grad_bias[:vocab] += grad_CV.sum(0, dtype=exact)
            if need_hidden:
                torch.mm(grad_CV, weight_VD[:vocab], out=grad_hidden[part])
            if need_weight:
                add_product(grad_weight[:vocab], grad_CV.T, h_CD)
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
        return (*scaled, *[None] * 7)   # forward's other arguments have none


def distillation_loss(student_hidden, student_head, labels, teacher, *, alpha, temperature,
                      divergence="forward", denominator=None, chunk=None, vocabulary=None):
    """-> loss, ce, kl: loss = alpha * ce + (1 - alpha) * kl, kl with its T^2, each / denominator.

    student_hidden [N, D]. student_head: Head or nn.Linear. labels [N], -100 is not counted: where
    they lie on the host, dropping those positions does not make the GPU wait. teacher: DenseTarget
    or a plain (hidden [N, Dt], head), SparseTarget, or None at alpha 1. denominator: by default
    the tokens counted here. chunk: tokens projected to the vocabulary at once. vocabulary: from
    this id on both heads are padding, which is cut.
    """
    device = student_hidden.device
    student = as_head(student_head)
    vocab = len(student.weight[:vocabulary])
    teacher_scaling = (1.0, None)
    if teacher is not None and not isinstance(teacher, SparseTarget):
        hidden, head = teacher
        head = as_head(head)
        teacher = DenseTarget(hidden, head)
        teacher_scaling = (head.scale, head.softcap)
        vocab = len(head.weight[:vocab])
    if alpha >= 1:
        teacher = None
    counted = (labels != -100).nonzero()[:, 0]
    if denominator is None:
        denominator = max(len(counted), 1)
    if len(counted) < len(labels):   # collate has dropped them already, others may not
        labels = labels[counted]
        counted = counted.to(device)
        student_hidden = student_hidden[counted]
        teacher = tokens_of(teacher, counted)
    if chunk is None:
        chunk = chunk_size(device, student_hidden.element_size(), len(student.weight))
    kernel = chunk_kernel(
        vocab >= COMPILED_VOCAB, alpha=alpha, temperature=temperature, divergence=divergence,
        student_scaling=(student.scale, student.softcap), teacher_scaling=teacher_scaling)
    loss, ce, kl = FusedDistillation.apply(
        student_hidden, student.weight, student.bias, labels.to(device, non_blocking=True),
        teacher, kernel, alpha, chunk, vocab, torch.is_grad_enabled())
    return loss / denominator, ce / denominator, kl / denominator


# --------------------------------------------------------------------------------------------------
# Data: any dataset -> rows of token ids (and which of them are targets) -> global batches that do
# not depend on the number of ranks. Hands on load_data (rows that can be indexed) and Batch.


# ---- tokenizers


def load_tokenizer(cfg, *candidates):
    """--tokenizer, else that of the first candidate that may have one, else None. A folder shows
    it; layers:N, a config .json and demo (no name was given) have none."""
    names = [cfg.tokenizer] if cfg.tokenizer else []
    for name in candidates:
        has_none = name == "demo" or name.endswith(".json") or name.startswith("layers:")
        if os.path.isdir(name):
            has_none = not list(Path(name).glob("tokenizer*"))
        if not has_none:
            names.append(name)
    if not names:
        return None
    with phase(f"reading the tokenizer of {names[0]}"):
        return AutoTokenizer.from_pretrained(names[0], trust_remote_code=cfg.trust_remote_code)


def compare_tokenizers(student, teacher, student_name, teacher_name):
    """By what they encode, not by size: an id that both use must mean the same token."""
    ours = {i: token for token, i in student.get_vocab().items()}
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    clashing = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    probe = "def f(x):\n    return x+1  # Größe 12345 résumé 日本"
    problem = "they cut text differently"
    if clashing:
        i = clashing[0]
        problem = f"token {i} is {ours[i]!r} in one, {theirs[i]!r} in the other"
    elif student(probe)["input_ids"] == teacher(probe)["input_ids"]:
        return
    raise UserError(
        f"student {student_name!r} and teacher {teacher_name!r} have different tokenizers: "
        f"{problem}. Distil within one, or train on text that the teacher wrote (--alpha 1)")


def vocabulary_of(tokenizer):
    """How many ids it has: what a head has beyond them is padding."""
    return max(tokenizer.get_vocab().values()) + 1


def bos_of(tokenizer):
    """The id that this tokenizer puts before every text; None where it puts none. A model that
    learned with it (Gemma, Llama) is lost without."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return bos
    return None


# ---- datasets: raw rows of text or conversations


def load_data(cfg, tokenizer):
    """-> train rows, eval rows, which can be indexed. A row is {"input_ids": [...], "targets":
    which of them are, "starts": where each of its documents begins}."""
    if tokenizer is None:
        raise UserError(f"neither student {cfg.student!r} nor teacher {cfg.teacher!r} has a "
                        "tokenizer; name one with --tokenizer")
    if cfg.streaming:   # optional: streaming
        return load_stream(cfg, tokenizer)
    with phase(f"reading dataset {cfg.dataset}"), node_first():
        train_raw, eval_raw = read_raw(cfg)
        if cfg.max_samples is not None:
            train_raw = take_first(train_raw, cfg.max_samples)
        if cfg.mode == "eval" and cfg.eval_split == cfg.train_split:   # optional: eval
            eval_raw = train_raw   # asked for by its name: nothing is held out of it
        if eval_raw is None and len(train_raw) > 1:
            train_raw, eval_raw = hold_out_rows(train_raw, cfg.eval_samples)
    if cfg.mode == "eval" and eval_raw is not None:   # optional: eval
        return None, take_first(tokenize(cfg, eval_raw, tokenizer, "eval"), cfg.eval_samples)
    rows = tokenize(cfg, train_raw, tokenizer, "train")
    if eval_raw is not None:
        eval_rows = tokenize(cfg, eval_raw, tokenizer, "eval")
    elif len(rows) > 1:   # one long document
        rows, eval_rows = hold_out_rows(rows, cfg.eval_samples)
    else:
        raise UserError(f"dataset {cfg.dataset!r} is a single sequence of {cfg.seq_len} tokens or "
                        "less; nothing is left to evaluate on: bring more text or lower --seq_len")
    if cfg.packing == "documents":   # a held-out document stands alone
        rows = PackedRows(rows, cfg.seq_len)
    return rows, take_first(eval_rows, cfg.eval_samples)


def take_first(rows, count):
    return rows.take(min(count, len(rows)))   # a dataset refuses to take more than it has


def read_raw(cfg, streaming=False):
    """-> raw rows of train, raw rows of eval; None where a slice of train has to do."""
    train_raw = read_split(cfg, cfg.train_split, streaming)
    eval_raw = None
    if cfg.eval_split != cfg.train_split:
        eval_raw = read_split(cfg, cfg.eval_split, streaming)
        # where only the default is absent, no harm
        if eval_raw is None and cfg.eval_split != Config.eval_split:
            raise UserError(f"dataset {cfg.dataset!r} has no split {cfg.eval_split!r}; leave "
                            "eval_split out to hold out a slice of train")
    if train_raw is None:
        raise UserError(f"dataset {cfg.dataset!r} has no split {cfg.train_split!r}")
    return train_raw, eval_raw


FILE_KINDS = {   # ending -> the reader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_split(cfg, split, streaming=False):
    """Raw rows of a file, a save_to_disk folder or a hub dataset; None where it has no such split.
    """
    path = Path(cfg.dataset)
    kind = FILE_KINDS.get(path.suffix.lower())
    if kind and split != "train":   # a file has no other
        return None
    if kind:
        options = {"sample_by": "paragraph"} if kind == "text" else {}   # a blank line ends one
        # a name would be taken for a pattern
        return datasets.load_dataset(kind, data_files=glob.escape(cfg.dataset), split=split,
                                     streaming=streaming, **options)
    if (path / "dataset_dict.json").exists():   # of save_to_disk
        return datasets.load_from_disk(path).get(split)
    if (path / "state.json").exists():   # the same, saved without splits
        return {"train": datasets.load_from_disk(path)}.get(split)
    try:
        return datasets.load_dataset(cfg.dataset, cfg.dataset_config, split=split,
                                     streaming=streaming)
    except ValueError as e:
        if "Unknown split" in str(e) or "Bad split" in str(e):
            return None
        raise


def hold_out_rows(raw, eval_samples):
    """-> the rows to train on, and evenly spaced ones to evaluate on: a twentieth, or about
    eval_samples where that is less, but at least one."""
    wanted = min(eval_samples, max(1, len(raw) // 20))
    gap = max(2, len(raw) // wanted)
    held_out = raw.select(range(gap - 1, len(raw), gap))
    # an array: select makes a fingerprint of it, a generator has none that another run finds again
    kept = np.flatnonzero(np.arange(len(raw)) % gap != gap - 1)
    return raw.select(kept), held_out


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


# ---- rows of token ids, kept in the datasets cache

FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")),
    targets=datasets.List(datasets.Value("bool")),
    starts=datasets.List(datasets.Value("int32")),
    dropped=datasets.Value("string"))   # why; "": it is not
ROWS_AT_ONCE = 1000   # texts among them are joined, however many processes share the work


def tokenize(cfg, raw, tokenizer, split):
    """Raw rows -> token rows on disk: the same rows are not tokenised twice."""
    encode = row_encoder(cfg, tokenizer)

    def encode_from(batch):   # the same thousand rows together, whoever takes them
        start, = batch["start"]
        rows = encode(rows_from_columns(raw[start:start + ROWS_AT_ONCE]))
        return token_rows(rows).with_format("arrow")[:]

    # a tokenizer's own threads do not survive the fork of a worker
    os.environ["TOKENIZERS_PARALLELISM"] = str(not cfg.num_proc)
    file = Path(datasets.config.HF_DATASETS_CACHE, "simple_distill",
                f"{fingerprint_rows(cfg, raw, tokenizer)}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    starts = datasets.Dataset.from_dict({"start": list(range(0, len(raw), ROWS_AT_ONCE))})
    with phase(f"tokenising {split}"), node_first():
        rows, dropped = kept_rows(starts.map(
            encode_from, batched=True, batch_size=1, remove_columns="start", features=FEATURES,
            num_proc=cfg.num_proc, new_fingerprint=file.stem, cache_file_name=str(file),
            desc=split))
    reasons = "; ".join(f"{count} x {why}" for why, count in dropped.most_common(5))
    if len(rows) == 0:
        raise UserError(f"{split}: none of the {len(raw)} rows of {cfg.dataset!r} has a target "
                        f"token: {reasons}")
    if dropped:
        print0(f"{split}: dropped {dropped.total()} of {len(raw)} rows: {reasons}")
    return rows


def token_rows(rows):
    """What row_encoder gives -> a dataset as tokenize has on disk."""
    return datasets.Dataset.from_list(rows, features=FEATURES)


def kept_rows(rows):
    """-> token rows less those that were dropped, and a Counter of why they were."""
    reasons = rows["dropped"][:]
    kept = [i for i, why in enumerate(reasons) if not why]
    rows = rows.select(kept).remove_columns("dropped").with_format("numpy")
    return rows, collections.Counter(filter(None, reasons))


def fingerprint_rows(cfg, raw, tokenizer):
    """Of all that shapes token rows: the tokenizer as it would be saved, and the code, so that a
    fork that edits it gets what it wrote and not what an older version left in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = [checksum(path) for path in sorted(Path(folder).rglob("*"))]
    text = Path(__file__).read_text(encoding="utf-8")
    code = text.split("\n# ---- between raw rows and token rows")[1]
    packing = cfg.packing.replace("documents", "rows")   # which PackedRows puts together
    return digest(raw._fingerprint, str(raw.features), saved, code, cfg.text_column, cfg.seq_len,
                  packing)


def row_encoder(cfg, tokenizer):
    """-> a function of raw rows alone."""
    return functools.partial(encode_rows, tokenizer=tokenizer, text_column=cfg.text_column,
                             seq_len=cfg.seq_len, packing=cfg.packing)


# ---- between raw rows and token rows: this text is part of the fingerprint of the latter


def encode_rows(raw_rows, tokenizer, text_column, seq_len, packing):
    """Raw rows -> token rows: first the conversations, one a row, then the texts, joined in blocks
    or each in rows of its own, then what was dropped: a row too, that says why."""
    conversations = []
    texts = []
    dropped = []
    for row in raw_rows:
        try:
            conversation = conversation_of(row)
            if conversation is None:
                texts.append(text_of(row[text_column] or ""))
            elif packing == "blocks":
                raise ValueError("a conversation; blocks are of text: use --packing rows")
            else:
                conversations.append(conversation)
        except Exception as e:   # whatever is strange about it
            dropped.append(f"{one_line(e)} among {', '.join(row)}"[:300])
    texts = list(filter(None, texts))   # an empty one is read as well, and says nothing
    encoded = encode_conversations(conversations, tokenizer, seq_len, dropped)
    encoded += encode_texts(texts, tokenizer, seq_len, join=packing in ("auto", "blocks"))
    rows = []
    for ids, targets in encoded:
        targets[0] = False   # it is predicted from nothing
        why = "" if any(targets) else f"no target in {seq_len} tokens"
        rows.append({"input_ids": ids, "targets": targets, "starts": [0], "dropped": why})
    for why in dropped:
        rows.append({"input_ids": [], "targets": [], "starts": [], "dropped": why})
    return rows


def rows_from_columns(columns):
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]"""
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def encode_texts(texts, tokenizer, seq_len, join):
    """-> [(ids, which are targets)]. Each text ends with EOS. Joined, or each by itself, they are
    cut into blocks of seq_len; the last one may be shorter. A BOS begins each block, not each text:
    so it is predicted nowhere."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    bos = bos_of(tokenizer)
    begin = [] if bos is None else [bos]
    room = seq_len - len(begin)
    documents = []
    for ids in encode_all(tokenizer, texts, add_special_tokens=False)["input_ids"]:
        documents.append(ids if ids[-1:] == end else ids + end)
    if join:
        documents = [list(itertools.chain(*documents))]
    blocks = []
    for ids in documents:
        for i in range(0, len(ids), room):
            block = begin + ids[i:i + room]
            blocks.append((block, [True] * len(block)))
    return blocks


def encode_all(tokenizer, texts, **options):
    """All at once, on the tokenizer's own threads; it does not take an empty list."""
    if not texts:
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(texts, verbose=False, **options)


def encode_conversations(conversations, tokenizer, seq_len, dropped):
    """-> [(ids, which are targets)], cut at seq_len. Targets are the assistant's tokens with their
    end marks. What the chat template does not take is added to dropped."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special_tokens = {*tokenizer.all_special_tokens, *added}
    end_marks = sorted(special_tokens, key=len, reverse=True)   # one may begin with another
    write = functools.partial(
        tokenizer.apply_chat_template, tokenize=False,
        chat_template=tokenizer.chat_template or PLAIN_TEMPLATE)
    prompt = generation_prompt(write)
    spans_of = []
    texts = []
    for messages in conversations:
        try:
            text, spans = render(messages, write, prompt, end_marks)
        except Exception as e:
            dropped.append(f"the chat template: {one_line(e)}")
            continue
        texts.append(text)
        spans_of.append(spans)
    # a template has written the special tokens already
    encoded = encode_all(tokenizer, texts, add_special_tokens=not tokenizer.chat_template,
                         return_offsets_mapping=True)
    return [(ids[:seq_len], find_targets(offsets[:seq_len], spans)) for ids, offsets, spans in
            zip(encoded["input_ids"], encoded["offset_mapping"], spans_of)]


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
    return len(os.path.commonprefix([a, b]))


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
    message = without_nulls(turn)
    if "value" in message and "content" not in message:
        sender = message["from"]
        message = {"role": SHAREGPT_ROLES.get(sender, sender), "content": message["value"]}
    calls = message.pop("tool_calls", None)
    if calls:   # some templates ask only whether there is such a list
        message["tool_calls"] = [call_of(call) for call in calls]
    return {**message, "role": message["role"], "content": text_of(message.get("content", ""))}


def call_of(call):
    """The arguments of a tool as the object that templates expect; APIs give them as its JSON."""
    function = call.get("function", call)
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
    """Text, or the content of a message, which may come in parts; anything else is an error."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


# ---- between raw rows and token rows: up to here


class PackedRows:
    """Rows of several documents each, put together when they are asked for."""

    def __init__(self, documents, seq_len):
        self.documents = documents
        self.members = []   # of each row: numbers of documents
        lengths = row_lengths(documents)
        for start in range(0, len(lengths), 10_000):
            for row in fit_into_rows(lengths[start:start + 10_000].tolist(), seq_len):
                self.members.append([start + i for i in row])

    def __len__(self):
        return len(self.members)

    def __getitem__(self, i):
        return packed_row(self.documents[self.members[i]])   # at once: one look into the file


def packed_row(documents):
    """documents: columns. Each begins with a token that is no target: it would be predicted from
    another document."""
    lengths = [len(ids) for ids in documents["input_ids"]]
    return {"input_ids": np.concatenate(list(documents["input_ids"])),
            "targets": np.concatenate(list(documents["targets"])),
            "starts": np.cumsum([0, *lengths[:-1]])}


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


def row_lengths(rows):
    """In tokens, of a dataset of token rows."""
    tables = rows.with_format("arrow").iter(1000)
    return np.concatenate([table["input_ids"].combine_chunks().value_lengths().to_numpy()
                           for table in tables])


def count_rows(rows):
    """One look at all token rows -> {rows, tokens, targets, biggest (id), digest}; None of a stream
    or a cache, which nobody reads in advance."""
    documents = getattr(rows, "documents", rows)   # of PackedRows
    if not isinstance(documents, datasets.Dataset):
        return None
    tokens = targets = biggest = 0
    content = hashlib.sha256()
    for table in documents.with_format("arrow").iter(1000):
        lists = table["input_ids"].combine_chunks()
        ids = lists.flatten().to_numpy()
        is_target = table["targets"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for part in (lists.value_lengths().to_numpy(), ids, is_target):
            content.update(part)
        tokens += len(ids)
        targets += int(is_target.sum())
        biggest = max(biggest, int(ids.max()))
    return dict(rows=len(rows), tokens=tokens, targets=targets, biggest=biggest,
                digest=content.hexdigest()[:16])


# ---- batches


@dataclass
class Batch:
    """A micro-batch of one rank: B sequences, T positions, N counted tokens. Only host code looks
    at labels, so that nothing waits for the GPU to count them."""
    rows: list                # the token rows it is made of
    input_ids: torch.Tensor   # [B, T], padded on the right: under a causal mask no token sees it
    positions: torch.Tensor   # [N] of the counted tokens in the flattened batch
    labels: torch.Tensor      # [N] their next tokens, on the host
    real: torch.Tensor        # those of all tokens but padding: where block-wise compares states
    sparse: Any = None        # SparseTarget of the counted tokens, when training from a cache
    # [B, T] where rows hold several documents: they restart at each, which keeps attention within
    # it (see hidden_states). None: 0, 1, 2, ...
    position_ids: Any = None
    by_student: bool = False  # whether it wrote them: no labels then   # optional: on_policy


# what a rank gets for whom no row is left: it takes part all the same
STAND_IN = {"input_ids": [0, 0], "targets": [False, False], "starts": [0]}


def collate(rows):
    """Token rows -> Batch. The label of a position is the *next* token; shifting comes before
    masking: a position counts where its next token is a target, not where it is one itself."""
    shown = rows or [STAND_IN]
    ids = []
    next_ids = []
    positions = []   # within documents; those of padding do not matter
    for row in shown:
        ids.append(torch.as_tensor(row["input_ids"], dtype=torch.long))
        labels = torch.where(torch.as_tensor(row["targets"]), ids[-1], -100)
        next_ids.append(nn.functional.pad(labels[1:], (0, 1), value=-100))   # the last has none
        lengths = np.diff(row["starts"], append=len(ids[-1]))
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    position_ids = None
    if any(len(row["starts"]) > 1 for row in shown):
        position_ids = to_device(pad_sequence(positions, True))
    labels = pad_sequence(next_ids, True, padding_value=-100).flatten()
    is_real = pad_sequence([torch.full_like(of_row, bool(rows)) for of_row in ids], True)
    counted = (labels != -100).nonzero()[:, 0]
    return Batch(
        rows=rows, input_ids=to_device(pad_sequence(ids, True)), positions=to_device(counted),
        labels=pin(labels[counted]), real=to_device(is_real.flatten().nonzero()[:, 0]),
        sparse=collate_sparse(rows), position_ids=position_ids)


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


@functools.lru_cache(1)
def shuffled(count, seed, part):
    """The numbers below count, in an order that depends on nothing but seed and part: no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + part)
    return torch.randperm(count, generator=generator)


def batch_of_step(count, seed, global_batch, step):
    """-> numbers of the rows, of count, in a global batch. The position *is* the step: a resume
    needs no other state, and has nothing to replay."""
    epoch, place = divmod(step, math.ceil(count / global_batch))
    order = shuffled(count, seed, epoch)
    return order[place * global_batch:(place + 1) * global_batch].tolist()


def micro_batches(rows, micro_steps, batch_size):
    """This rank's rows of a step -> a Batch a micro-step, the last ones maybe without any row."""
    starts = range(0, micro_steps * batch_size, batch_size)
    return [collate(rows[start:start + batch_size]) for start in starts]


def prefetch(endless, depth=2):
    """Run a generator in a thread, `depth` items ahead: the next batch is ready while this one
    computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(next, endless) for _ in range(depth))
        while True:
            ahead.append(pool.submit(next, endless))
            yield ahead.popleft().result()


# --------------------------------------------------------------------------------------------------
# Models and FSDP: every rank begins with shapes alone and receives its shard of what rank 0 reads.
# Hands on student and teacher as ShardedRoot, what a model says of a batch, and a writer of texts.


class ShardedRoot(nn.Module):
    """The outermost FSDP unit around a model. FSDP gathers a unit's parameters in its forward and
    leaves each rank a shard outside of it. Decoder layers are units of their own; embeddings, final
    norm and head belong to this one, and the loss needs the head without the model's own forward,
    which would make all logits at once. So whatever touches weights is a function(model, *args)
    that this forward runs: root(function, *args). Calling root.model itself meets shards."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(self.model, *args)

    def release(self):
        """Back to shards after forwards without a backward, which does it otherwise: until then
        the next forward would not see what was written into the shards, such as a checkpoint."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextlib.contextmanager
def evaluating(root):
    """Around forwards without gradients: no dropout either."""
    was_training = root.training
    root.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        root.train(was_training)
        root.release()


def compute_dtype(cfg):
    """auto: bf16 on GPUs that have it, fp32 elsewhere (CPUs without AMX emulate bf16 slowly)."""
    if cfg.dtype != "auto":
        named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return named[cfg.dtype]
    if CUDA and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


# ---- loading


def load_checked(cfg, role, tokenizer):
    """A model that computes what this trainer believes it computes -> root, identity."""
    name = cfg.student if role == "student" else cfg.teacher
    with phase(f"reading {role} {name}"):
        root, identity = load_model(cfg, role)
        check_model(root, f"{role} {name!r}", cfg.seq_len, cfg.packing == "documents")
    if role == "teacher":
        theirs = load_tokenizer(dataclasses.replace(cfg, tokenizer=None), name)
        if theirs is not None:
            compare_tokenizers(tokenizer, theirs, cfg.tokenizer or cfg.student, name)
    return root, identity


def load_model(cfg, role):
    """student: weights in fp32, spread as --fsdp says; layers and head compute in compute_dtype.
    teacher: frozen, its weights in the type that it computes in. -> root, identity of weights."""
    learns = role == "student"
    name = cfg.student if learns else cfg.teacher
    cut = re.fullmatch(r"layers:(\d+)", name)
    if cut:
        name = cfg.teacher
    source_config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    config, kept_layers = source_config, None
    if cut:
        config, kept_layers = cut_layers(source_config, int(cut[1]))
    computes_in = compute_dtype(cfg)
    if not learns and computes_in == torch.float16 and config.dtype != torch.float16:
        computes_in = torch.float32   # models trained in bf16 overflow in fp16
    options = dict(dtype=torch.float32 if learns else computes_in,
                   trust_remote_code=cfg.trust_remote_code, attn_implementation=cfg.attention)
    make_root = ShardedRoot
    if learns and cfg.blockwise:   # optional: blockwise
        make_root = stitching(cfg, config)
    with torch.device("meta"):
        root = make_root(AutoModelForCausalLM.from_config(config, **options))
    root.train(learns).requires_grad_(learns)
    if learns and cfg.gradient_checkpointing:
        recompute_activations(root.model)
    if cfg.compile:
        compile_layers(root.model)
    if learns or cfg.cpu_offload or (cfg.shard_teacher and WORLD > 1):
        shard(root, cfg.fsdp if learns else "full_shard", computes_in, cfg.cpu_offload)
    source = None
    if RANK == 0:
        source = make_root(read_model(name, source_config, kept_layers, cfg.seed, options))
    load_weights(root, source, cfg.cpu_offload)
    with contextlib.suppress(OSError):   # what ends a text, where a file of its own says it
        ends = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        root.model.generation_config.eos_token_id = ends
    return root, from_rank0(source and identity_of(source))


def read_model(name, config, kept_layers, seed, options):
    """A whole model on the host, memory-mapped until it is cast; a config alone (.json) makes
    random weights. kept_layers: the decoder layers that stay, by number."""
    if name.endswith(".json"):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **options)
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if info["missing_keys"]:   # transformers would fill them with random numbers
        raise UserError(f"{name!r} lacks weights, {sorted(info['missing_keys'])[0]} among them; is "
                        "it whole?")
    if kept_layers is not None:
        path, layers = layers_of(model)
        model.set_submodule(path, nn.ModuleList(layers[i] for i in kept_layers))
    return model


def identity_of(model):
    """Of the weights as they were loaded, wherever their files lie: every n-th number of each."""
    some = [p.detach().flatten()[::p.numel() // 4096 | 1].float() for p in model.parameters()]
    return zlib.crc32(torch.cat(some).numpy())


def layers_of(model):
    """(path, ModuleList) of the decoder layers: the outermost list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise UserError(f"{type(model).__name__} keeps its {depth} decoder layers in no ModuleList; "
                    "choose another model")


# lists in a config that hold one item a layer
ONE_A_LAYER = (
    "activation_sparsity_pattern", "attention_layers", "indexer_types", "intermediate_size",
    "layer_rope_theta", "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer")


def cut_layers(config, count):
    """-> the config of a student of `count` evenly spaced layers, the first and the last among
    them, and their numbers."""
    depth = config.get_text_config().num_hidden_layers
    if count > depth:
        raise UserError(f"layers:{count}: the teacher has {depth}")
    kept_layers = [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]
    print0(f"student: layers {kept_layers} of the teacher's {depth}")
    values = config.to_dict()
    for key in ONE_A_LAYER:
        value = values.get(key)
        if isinstance(value, list) and len(value) == depth:
            values[key] = [value[i] for i in kept_layers]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    return type(config).from_dict(values), kept_layers


def recompute_activations(model):
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


# ---- shards

# These keep nothing whole between micro-steps: each one's gradients are reduced to shards at once.
# The others add them up where they are and reduce them once a step: less traffic, more memory.
REDUCE_EACH = ("full_shard", "hybrid_shard")


def shard(root, fsdp, dtype, cpu_offload):
    """Make FSDP units of the decoder layers, and of the root for what is left. They compute in
    dtype and reduce gradients in fp32. The root stays gathered after a forward: the backward begins
    with it, and the loss uses a teacher's head outside of the teacher's forward."""
    shapes = {"hybrid_shard": (WORLD // LOCAL_WORLD, LOCAL_WORLD), "no_shard": (WORLD, 1)}
    mesh_shape = shapes.get(fsdp, (WORLD,))
    names = ("replicate", "shard")[-len(mesh_shape):]
    options = dict(
        mesh=init_device_mesh(DEVICE.type, mesh_shape, mesh_dim_names=names),
        mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    if cpu_offload and CUDA:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in layers_of(root.model)[1]:   # dropped: gathered anew in the backward
        fully_shard(layer, reshard_after_forward=fsdp in REDUCE_EACH, **options)
    fully_shard(root, reshard_after_forward=False, **options)


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
    # buffers too: those that are not persistent (of RoPE) are in no state dict
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


FINAL_MARK = ".simple_distill.json"   # in final/: of which checkpoint it is


def save_model(root, tokenizer, path, dtype, card, checkpoint):
    """Gathered on rank 0 tensor by tensor, saved by transformers, renamed when whole; what stood
    there moves to final.old. card: its README.md. checkpoint: its digest."""
    full = {}
    kept_on = "cpu" if RANK == 0 else "meta"   # the other ranks drop each tensor at once
    for name, tensor in [*root.model.named_parameters(), *root.model.named_buffers()]:
        kept_as = dtype if tensor.is_floating_point() else tensor.dtype
        full[name] = full_tensor(tensor).to(kept_on, kept_as, copy=True)
    if RANK > 0:
        return
    broken = [name for name, tensor in full.items() if not tensor.isfinite().all()]
    if broken:
        print0(f"WARNING: not all weights of the student are finite: {', '.join(broken)[:300]}")
    aside = Path(f"{path}.tmp")
    shutil.rmtree(aside, ignore_errors=True)   # what a killed run left
    with_tensors(root.model, full).to(dtype).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    write_json({"checkpoint": checkpoint}, aside / FINAL_MARK)
    if path.exists():
        shutil.rmtree(f"{path}.old", ignore_errors=True)
        path.rename(f"{path}.old")
    aside.rename(path)


def with_tensors(model, full):
    """A model of the same kind and config on these tensors, without initialising any."""
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict(full, assign=True, strict=False)   # not strict: tied heads are not listed
    copy.tie_weights()
    copy.generation_config = model.generation_config
    return copy


# ---- what a model says of a batch: functions that run inside a root


@contextlib.contextmanager
def known_documents(position_ids_BT):
    """Around a forward without attention mask and cache. There transformers looks at the positions
    whether a row holds several documents: a number that the host needs at once, so that it waits
    for the GPU twice a micro-step. We know: without position_ids a row is one document."""
    def number_documents(positions_BT):
        """-> [B, T], for each token the number of its document; None: one a row."""
        if position_ids_BT is None:
            return None
        steps_BT = torch.diff(positions_BT, prepend=positions_BT[:, :1] - 1, dim=-1)
        return (steps_BT != 1).cumsum(-1)

    own = getattr(masking_utils, "find_packed_sequence_indices", None)
    masking_utils.find_packed_sequence_indices = number_documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def hidden_states(model, input_ids_BT, position_ids_BT=None):
    """-> [B, T, D] after the final norm, without the head. position_ids restart at each document,
    which keeps attention inside of it."""
    positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    with known_documents(position_ids_BT):
        return model.base_model(input_ids=input_ids_BT, use_cache=False, **positions)[0]


def counted_hidden(model, batch):
    """-> hidden states of the counted tokens [N, D], and the head to apply to them by chunks."""
    hidden_BTD = hidden_states(model, batch.input_ids, batch.position_ids)
    return DenseTarget(hidden_BTD.flatten(0, 1)[batch.positions], head_of(model))


def head_of(model):
    """A new way of scaling logits is added here; check_model tells whether one is missing."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)   # Cohere
    if not scale:
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)   # Granite
    softcap = getattr(config, "final_logit_softcapping", None)   # Gemma
    return Head(output.weight, getattr(output, "bias", None), float(scale), softcap)


def head_logits(hidden, head, vocabulary=None):
    """-> logits in fp32, of the first `vocabulary` ids."""
    raw = nn.functional.linear(hidden, head.weight, head.bias)[..., :vocabulary]
    return scale_and_softcap(raw, head.scale, head.softcap)[0]


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


# ---- is what we compute with a model what the model computes?


def check_model(root, what, seq_len, packed):
    """Refuse a model that sees later tokens, whose logits head_of does not reproduce, that has no
    seq_len positions or, packed, lets documents see each other. what: role and name."""
    what = f"{what} ({type(root.model).__name__})"
    vocab = root.model.config.get_text_config().vocab_size
    ids_1T = torch.arange(seq_len, device=DEVICE)[None] % vocab
    with phase(f"running {what} on {seq_len} positions"), evaluating(root):
        root(hidden_states, ids_1T)
    probe(root, f"{what} is no causal language model: its states change with later tokens",
          look_ahead, ids_1T[:, :8])
    probe(root, f"{what}: hidden states times head miss its own logits; is it damaged, does it "
          "need --dtype fp32, or head_of() in simple_distill.py to know its scaling?",
          head_error, ids_1T[:, :8])
    if packed:
        documents = []
        for length in (3, 5, 2, 4, 1):
            ids = np.arange(length, 2 * length) % vocab
            documents.append({"input_ids": ids, "targets": ids > vocab, "starts": [0]})
        rows = []   # two: some kinds of attention look at positions only where a batch is one row
        for members in (documents[:2], documents[2:]):
            rows.append(packed_row({key: [row[key] for row in members] for key in STAND_IN}))
        probe(root, f"{what} lets packed documents see each other; use --packing rows or blocks",
              packing_error, collate(rows), collate(documents))


def probe(root, what, function, *args):
    """function(model, *args) -> how far something is off, how far rounding may bring it."""
    with evaluating(root):
        error, allowed = root(function, *args)
    if not error <= allowed:   # also nan
        raise UserError(f"{what} (off by {error:.2g}, {allowed:g} is allowed)")


def look_ahead(model, ids_1T):
    """How far the states of earlier tokens move with the last one, in units of how far its own
    does."""
    other_1T = ids_1T.clone()
    other_1T[0, -1] = ids_1T[0, 0]
    moved_TD = (hidden_states(model, other_1T) - hidden_states(model, ids_1T))[0].abs().float()
    error = moved_TD[:-1].max() / moved_TD[-1].max().clamp_min(1e-6)
    return error, 1e-3 if model.dtype == torch.float32 else 0.1


def head_error(model, ids_1T):
    """How far hidden states times head_of are from the model's own logits, in their standard
    deviations."""
    model_logits = model(input_ids=ids_1T, use_cache=False).logits.float()
    hidden = hidden_states(model, ids_1T)
    logits = head_logits(hidden, head_of(model))
    error = (logits - model_logits).abs().max() / model_logits.std().clamp_min(1e-6)
    return error, 1e-3 if hidden.dtype == torch.float32 else 0.1


def packing_error(model, packed, alone):
    """How far the states of documents that share rows are from those of each alone, as a part of
    these, at the token where that is most. Two batches of the same tokens in the same order."""
    states = []
    for batch in (packed, alone):
        hidden_BTD = hidden_states(model, batch.input_ids, batch.position_ids)
        states.append(hidden_BTD.flatten(0, 1)[batch.real])
    packed_ND, alone_ND = states
    missed_N = (packed_ND - alone_ND).float().norm(dim=-1)
    error = (missed_N / alone_ND.float().norm(dim=-1).clamp_min(1e-6)).max()
    return error, 1e-3 if packed_ND.dtype == torch.float32 else 0.1


# ---- the writer of texts


def write_texts(root, prompts, seeds, rooms, temperature, ends, vocabulary):
    """-> [ids that the model writes after each prompt, with the end mark]: at most rooms[i] of
    them; at temperature 0 the likeliest, else by random numbers of its own (seeds[i]). What a row
    says depends neither on the rows beside it nor on how many ranks there are. Each rank comes with
    its own prompts, maybe none: all weights are gathered once, so that nothing inside waits for
    another rank (no synced_gpus)."""
    with evaluating(root), gathered(root), torch.compiler.set_stance("force_eager"):
        if not prompts:
            return []
        ids_BT, mask_BT = pad_left(prompts)
        draw = make_draw(seeds, temperature, vocabulary, max(rooms))
        written_BN = root(generate_ids, ids_BT, mask_BT, max(rooms), ends, draw).tolist()
    return [cut_text(ids[:room], ends) for ids, room in zip(written_BN, rooms, strict=True)]


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
    one at which the sum of probabilities passes a number from (0, 1]."""
    numbers_BN = torch.stack([
        1 - torch.rand(new, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    numbers = iter(to_device(numbers_BN).unbind(1))

    def draw(_, logits_BV):
        logits_BV = logits_BV[:, :vocabulary]   # from there on it is padding
        if temperature == 0:
            return logits_BV
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


def cut_text(ids, ends):
    """Up to the first end mark, which belongs to it."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i + 1]
    return ids


def end_ids(model, tokenizer):
    """Of generation config and tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return (ends | {tokenizer.eos_token_id}) - {None}


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


# --------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning rate, a schedule without state, and one step that clips,
# unscales and skips without asking the GPU.


def learning_rates(named_parameters, rules, default_multiplier, learning_rate):
    """-> {parameter: rate}. The first rule that matches its first name decides; 0 freezes.

    named_parameters: (name, parameter), a tied parameter under each of its names. rules: as
    parse_multipliers makes them.
    """
    names = {}   # parameter: its first name
    for name, parameter in named_parameters:
        names.setdefault(parameter, name)
    for pattern, _ in rules:
        if not any(map(pattern.search, names.values())):
            raise UserError(f"lr_multipliers: {pattern.pattern!r} matches no parameter (of tied "
                            f"ones the first name counts) among {', '.join(names.values())}")
    rates = {}
    for parameter, name in names.items():
        multipliers = [multiplier for pattern, multiplier in rules if pattern.search(name)]
        rates[parameter] = learning_rate * [*multipliers, default_multiplier][0]
    return rates


def make_optimizer(parameters, rates, weight_decay):
    """rates: {parameter: learning rate}; 0 or none: no gradient, no state.

    Norms and biases, all that has one dimension, do not decay.
    """
    groups = {}   # (rate, decays): parameters
    for parameter in parameters:
        rate = rates.get(parameter, 0)
        parameter.requires_grad_(rate > 0)
        groups.setdefault((rate, parameter.ndim >= 2), []).append(parameter)
    trained = []
    for (rate, decays), group in groups.items():
        print0(f"learning rate {rate:g}, {'with' if decays else 'without'} decay: "
               f"{sum(p.numel() for p in group):,} parameters")
        if rate > 0:
            trained.append(dict(params=group, lr=rate, initial_lr=rate,
                                weight_decay=weight_decay if decays else 0.0))
    if not trained:
        raise UserError("every parameter is frozen (lr_multipliers 0); leave something to train")
    optimizer = torch.optim.AdamW(trained, fused=True)
    # the moments from the start: memory is known, and a checkpoint has where to load to
    for group in trained:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def make_schedule(cfg, steps):
    """-> a function step -> multiplier of all rates. It follows from the step alone: there is
    nothing to save or to replay."""
    options = json.loads(cfg.lr_scheduler_kwargs or "{}")
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with phase(f"making the schedule {cfg.lr_scheduler} ({options})"):
        schedule = get_scheduler(
            cfg.lr_scheduler, unused, round(cfg.warmup_ratio * steps), steps, options)
        return schedule.lr_lambdas[0]


def set_rates(optimizer, multiplier):
    """-> the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return max(group["lr"] for group in optimizer.param_groups)


def new_scale_state(fp16):
    """Scalars on the device: the fp16 loss scale, good steps in a row, skipped in all, in a row."""
    values = {"scale": 2.0 ** 14 if fp16 else 1.0, "good": 0.0, "skipped": 0.0, "streak": 0.0}
    return {name: torch.tensor(value, device=DEVICE) for name, value in values.items()}


def optimizer_step(optimizer, max_grad_norm, scale_state, fp16):
    """One step on the gradients of scale * loss -> their norm, unscaled, before clipping;
    max_grad_norm 0 clips nothing.

    Fused AdamW divides gradients by its grad_scale and changes nothing where its found_inf is 1, so
    both carry tensors: clipping and unscaling are one division inside its kernel, a step that is
    not finite is skipped there, and the host never waits for a number.
    """
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
# Checkpoints: whole or not at all. Tensors go through torch.distributed.checkpoint to safetensors,
# so that another number of ranks can read them; everything else stands in state.json. Random
# numbers need no state: each step seeds itself.


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
    """-> its digest. Written aside, synced, renamed; nothing old is deleted before the new one
    stands. keep: how many stay."""
    aside = folder / f"tmp-{step:08d}"
    if RANK == 0:   # what a kill left there would be read as ours
        shutil.rmtree(aside, ignore_errors=True)
    all_sum(0)
    # a file is put together in host memory: few tensors a file
    file_of = {name: 1 + i // TENSORS_A_FILE for i, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(aside, file_of, save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=HOST)   # syncs each file
    files = checksums(aside, from_rank0(sorted(os.listdir(aside))))
    state = json.loads(json.dumps(state | {"files": files}))   # what a reader will see
    state["digest"] = digest(state)
    if RANK == 0:
        write_json(state, aside / "state.json")
        sync(aside / "state.json", aside)
        final = folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync(folder)
        for old in checkpoints_in(folder)[keep:]:
            shutil.rmtree(old)
    return state["digest"]


TENSORS_A_FILE = 16


def checksums(folder, files):
    """{file: CRC-32, None where it cannot be read}. Each rank reads its share."""
    mine = {file: checksum(folder / file) for file in files[RANK::WORLD]}
    shares = [None] * WORLD
    dist.all_gather_object(shares, mine, group=HOST)
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
    return sorted(Path(folder).glob("step-" + 8 * "[0-9]"), reverse=True)


def find_checkpoint(resume, output_dir):
    """-> path, state of the newest checkpoint that is whole, or None, None. resume: auto, never or
    a path. What is damaged is named and passed over."""
    paths = from_rank0(checkpoints_in(Path(output_dir, "checkpoints")))
    if resume == "never":
        return None, None
    if resume != "auto":
        if paths and Path(resume).resolve() not in [path.resolve() for path in paths]:
            raise UserError(f"{output_dir!r} holds another run than {resume!r}; choose another "
                            "--output_dir")
        paths = [Path(resume)]
    for path in paths:
        state, problem = from_rank0(read_state(path) if RANK == 0 else None)
        if state is not None and checksums(path, sorted(state["files"])) == state["files"]:
            return path, state
        print0(f"checkpoint {path} is not what was written{problem}, passed over")
    if paths:
        raise UserError(f"'{paths[0]}' is no readable checkpoint; start over with --resume never")
    return None, None


def read_state(path):
    """-> state.json of a checkpoint whose files are exactly those it lists (else None: another file
    would be read too, and a missing one be missed by nobody), what is wrong."""
    try:
        state = read_json(path / "state.json")
        written = state.pop("digest")
        if digest(state) != written or {*os.listdir(path)} != {"state.json", *state["files"]}:
            raise ValueError("other files, or another state.json")
        # a run from before there was some knob had it at its default
        state["config"] = result_knobs(Config()) | state["config"]
        return state | {"digest": written}, ""
    except Exception as e:   # whatever stands there
        return None, f" ({one_line(e)})"


def load_checkpoint(path, tensors):
    """In place, where `tensors` says, named as by tensors_of."""
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path), process_group=HOST)
    except dcp.api.CheckpointException as e:   # which is no Exception
        raise UserError(f"'{path}' is no checkpoint of this run: {reason_of(e)}") from e
    print0(f"resumes from {path}")


def reason_of(error):
    """dcp's error holds those of all ranks that failed."""
    if isinstance(error, dcp.api.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return one_line(error, 300)


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


def prepare_output(cfg, step):
    """output_dir as of `step`: nothing left of a run that starts over, no log of steps to come, no
    checkpoint of them either. final/ stays until the next one is whole: it may be the student."""
    folder = Path(cfg.output_dir, "checkpoints")
    if cfg.resume == "never":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    for path in checkpoints_in(folder):
        if int(path.name[5:]) > step:   # never to be continued from by itself
            aside = path.rename(folder / f"aside-{time.time_ns()}-{path.name}")
            print0(f"{path} is set aside as {aside}")
    write_json(knobs_of(cfg), folder.parent / "config.json")
    cut_log(folder.parent / "log.jsonl", step)


def cut_log(path, step):
    """Drop the lines of steps that are about to be repeated, and half a line that a kill left."""
    kept = []
    with open(path, "a+", encoding="utf-8", errors="replace") as f:
        f.seek(0)
        for line in f:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if step and max(row[key] for key in row if key.endswith("/step")) <= step:
                    kept.append(row)
        f.truncate(0)
    for row in kept:
        append_jsonl(path, row)


# --------------------------------------------------------------------------------------------------
# Train: a run is put together, begun, trained stage by stage and finished. train() says it in a few
# lines; train_stage() is the loop. Optional modes compose the same pieces. main(), at the end of
# the file, has opened the process group and claimed output_dir.


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
    # the field of Batch that the loss is a mean over: labels, or, where blocks are matched, real
    mean_over: str = "labels"
    # [(parameters, max norm), ...] before that   # optional: blockwise
    clipped_alone: list = field(default_factory=list)   # optional: blockwise

    @property
    def end(self):
        return self.first_step + self.steps


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside the tensors."""
    step: int = 0
    tokens: int = 0                         # trained on so far
    position: Any = None                    # of a stream
    best_loss: float = math.inf
    first_scores: Optional[dict] = None     # held-out scores before training
    wandb_id: Optional[str] = None
    notes: dict = field(default_factory=dict)   # what a mode of its own wants to keep


@dataclass
class Run:
    """What a run works with."""
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
    checkpoint: Optional[Path]  # to continue from
    saved_digest: Optional[str]   # of the newest checkpoint
    vocabulary: Optional[int]  # from this id on heads are padding
    loss_fn: Any               # of plain distillation: what held-out rows are judged by ...
    get_teacher_targets: Any   # ... and what it takes from the teacher
    scale_state: dict          # see new_scale_state
    progress: Progress
    started: float             # seconds since the epoch

    stages: list = field(default_factory=list)
    stage: Optional[Stage] = None   # whose optimiser this is
    optimizer: Any = None
    multiplier_at: Any = None       # step of the stage -> what its rates are multiplied by
    batches: Any = None             # endless (micro-batches of this rank, position after the step)
    wandb: Any = None
    bar: Any = None
    stop_requests: list = field(default_factory=list)   # filled by a signal
    stopped: bool = False
    saved_step: Optional[int] = None
    save_problem: Optional[str] = None      # why the last checkpoint could not be saved
    last_scores: Optional[dict] = None      # of the newest evaluation
    window_start: float = 0.0               # since when the tokens below are counted, for the speed
    window_tokens: float = 0.0

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
            return self.progress.step / self.steps_per_epoch
        return (self.progress.position or {}).get("epoch", 0)


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
    """-> tokenizer, rows, eval rows, student, teacher (None at alpha 1), identity of its weights"""
    tokenizer = load_tokenizer(cfg, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    student, _ = load_checked(cfg, "student", tokenizer)
    teacher, identity = None, None
    if cfg.alpha < 1:
        teacher, identity = load_checked(cfg, "teacher", tokenizer)
    return tokenizer, rows, eval_rows, student, teacher, identity


def start_run(cfg):
    """Load everything and check that it belongs together -> Run; None where it is finished."""
    started = time.time()
    make_schedule(cfg, steps=1)   # would it? Before any model is loaded
    load = load_everything
    if cfg.cache_dir:   # optional: cache
        cfg = take_from_cache(cfg)
        load = load_with_cache
    knobs = result_knobs(cfg)
    if cfg.cache_dir:   # optional: cache
        knobs["cache"] = digest(read_manifest(cfg.cache_dir))   # which one, wherever it lies
    with phase("looking for a checkpoint"):
        path, state = find_checkpoint(cfg.resume, cfg.output_dir)
    if state is not None:
        refuse_changes(state["config"], knobs, path)
        if is_finished(cfg, state):
            print0(f"{cfg.output_dir} holds this run, finished: see its final/")
            return None
    tokenizer, rows, eval_rows, student, teacher, identity = load(cfg)
    inputs = {"teacher's weights": identity}
    with phase("reading all token rows once"):
        facts = from_rank0([count_rows(rows), count_rows(eval_rows)] if RANK == 0 else None)
    for split, of_split in zip(("train", "held out"), facts):
        if of_split is not None:
            print0(f"{split}: {of_split}")
            inputs[split] = of_split["digest"]
            for root in filter(None, (student, teacher)):
                check_ids(root, tokenizer, of_split["biggest"])
    if state is not None:
        refuse_changes(state["inputs"], inputs, path)
    if cfg.on_policy:   # optional: on_policy
        check_writer(cfg, student, teacher, tokenizer)
    batch_size, micro_steps, global_batch = plan_batch(cfg, state, WORLD)
    # Student and teacher are compared over the ids that the tokenizer has, and then CE is of the
    # same distribution. Labels alone keep transformers' own loss, which is over the whole head.
    vocabulary = vocabulary_of(tokenizer) if cfg.alpha < 1 else None
    return Run(
        cfg=cfg, result_knobs=knobs, inputs=inputs, tokenizer=tokenizer, rows=rows,
        eval_rows=eval_rows, student=student, teacher=teacher, batch_size=batch_size,
        micro_steps=micro_steps, global_batch=global_batch, checkpoint=path,
        saved_digest=state and state["digest"],
        progress=Progress(**state["progress"]) if state else Progress(),
        vocabulary=vocabulary, started=started,
        loss_fn=functools.partial(distil_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                                  divergence=cfg.divergence, vocabulary=vocabulary),
        get_teacher_targets=teacher_targets(teacher),
        scale_state=new_scale_state(compute_dtype(cfg) == torch.float16))


def check_ids(root, tokenizer, biggest):
    """A tokenizer may have ids that a head has not: they matter where a row holds one."""
    rows = root.model.config.get_text_config().vocab_size
    if biggest >= rows:
        raise UserError(f"the data holds token {biggest}, {tokenizer.decode([biggest])!r}, "
                        f"{type(root.model).__name__} has {rows}: take it out, or another tokenizer")


def is_finished(cfg, state):
    """final/ has to be of this very checkpoint, not of a shorter run before it."""
    final = read_json(Path(cfg.output_dir, "final", FINAL_MARK), {})
    same_length = state["length"] == [cfg.max_steps, cfg.num_epochs]
    return (same_length and state["progress"]["step"] >= state["steps"]
            and final.get("checkpoint") == state["digest"])


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
    progress = run.progress
    run.stages = stages
    if progress.step > run.steps:
        raise UserError(
            f"'{run.checkpoint}' is of step {progress.step}, this run would end at {run.steps}. "
            "Raise --max_steps or --num_epochs, or start over with --resume never")
    print0(in_lines(facts_of(run)))
    with stop_signals() as run.stop_requests, contextlib.ExitStack() as stack:
        if run.checkpoint:
            resume(run)   # which starts the stage that it is in
        else:
            start_stage(run, stages[0])
        with phase(f"preparing {cfg.output_dir}"):
            if RANK == 0:
                prepare_output(cfg, progress.step)
            all_sum(0)   # nobody goes on before that is done
        run.wandb = start_wandb(cfg, progress.wandb_id)
        if run.wandb is not None:
            progress.wandb_id = run.wandb.id
            stack.push(lambda kind, *_: run.wandb.finish(exit_code=int(kind is not None)))
        if progress.first_scores is None:
            progress.first_scores = scores(run, rows_before_training(run))
        run.batches = prefetch(my_batches(run))
        stack.enter_context(contextlib.closing(run.batches))
        if cfg.on_policy:   # optional: on_policy
            run.batches = batches_by_student(run, run.batches)
        run.bar = stack.enter_context(tqdm(
            total=run.steps, initial=progress.step, disable=RANK > 0, dynamic_ncols=True,
            mininterval=0.5))
        run.window_start = time.time()
        yield


def my_batches(run):
    """-> endless (this rank's micro-batches of a step, position after it), from where the run is
    on. Rank r takes every WORLD-th sequence of a global batch."""
    if run.cfg.streaming:   # optional: streaming
        for rows, position in batches_of_stream(run):
            yield micro_batches(rows[RANK::WORLD], run.micro_steps, run.batch_size), position
    for step in itertools.count(run.progress.step):
        numbers = batch_of_step(len(run.rows), run.cfg.seed, run.global_batch, step)
        rows = [run.rows[i] for i in numbers[RANK::WORLD]]
        yield micro_batches(rows, run.micro_steps, run.batch_size), None


def resume(run):
    """Start the stage that goes on, fill its tensors from the checkpoint."""
    step = run.progress.step
    unfinished = [stage for stage in run.stages if step < stage.end]
    stage = unfinished[0] if unfinished else run.stages[-1]
    start_stage(run, stage)
    # where a stage begins, the moments that were saved are of the stage before
    moments = {} if step == stage.first_step else run.optimizer.state
    with phase(f"reading {run.checkpoint}"):
        load_checkpoint(run.checkpoint, tensors_of(run.student, moments, run.scale_state))
    run.saved_step = step


def start_stage(run, stage):
    print0(f"{stage.name}: {stage.steps} steps")
    run.stage = stage
    run.optimizer = None   # its moments go before the next ones come
    run.optimizer = make_optimizer(run.student.parameters(), stage.rates, stage.weight_decay)
    run.multiplier_at = make_schedule(run.cfg, stage.steps)


# ---- the loop


def train_stage(run, stage):
    """Train what is left of a stage -> True at its end, False when a signal stopped it. What is due
    after its last step is the caller's: something may have to be done before it is saved."""
    cfg = run.cfg
    progress = run.progress
    if run.stage is not stage:   # begin() or a resume may have started it
        start_stage(run, stage)
    while progress.step < stage.end:
        micro, position = next(run.batches)
        # all ranks agree
        tokens, stopping = all_sum(count_tokens(stage, micro), len(run.stop_requests))
        if stopping:
            run.stopped = True
            if run.saved_step != progress.step:
                save(run)
            return False
        progress.position = position
        seed_step(cfg.seed, progress.step)
        rate = set_rates(run.optimizer, run.multiplier_at(progress.step - stage.first_step))
        sums, grad_norm = one_step(run, stage, micro, tokens)
        progress.step += 1
        progress.tokens += int(tokens)
        run.window_tokens += tokens
        run.bar.update()
        stop_after_bad_steps(run)
        if progress.step % cfg.log_steps == 0 or progress.step == stage.end:
            log_step(run, stage, sums, grad_norm, rate)
        if progress.step < stage.end:
            evaluate_and_save(run, stage)
    return True


def count_tokens(stage, micro):
    return sum(len(getattr(batch, stage.mean_over)) for batch in micro)


def one_step(run, stage, micro, tokens):
    """Forward and backward of the micro-batches, with `tokens` counted on all ranks, and a step of
    the optimiser -> loss, ce and kl of this rank, norm of the gradient."""
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
    grad_norm = torch.zeros(())
    if tokens:
        if stage.clipped_alone:   # optional: blockwise
            clip_blocks(stage.clipped_alone, run.scale_state)
        grad_norm = optimizer_step(run.optimizer, stage.max_grad_norm, run.scale_state,
                                   compute_dtype(run.cfg) == torch.float16)
    else:
        print0(f"step {run.progress.step + 1}: not one valid target token in the whole batch; "
               "nothing changed")
    run.optimizer.zero_grad()
    return sums, grad_norm


def seed_step(seed, step):
    """Dropout follows from the step: a resumed run draws the same, and no state has to be kept."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_536 + RANK)


def stop_after_bad_steps(run):
    # .item() makes a GPU wait: there only every tenth step looks
    step = run.progress.step
    if (step % 10 == 0 or not CUDA) and run.scale_state["streak"].item() >= 10:
        save(run)
        raise UserError(
            f"loss or gradient was not finite for 10 steps in a row, up to step {step}, whose "
            "checkpoint holds the last weights. Start over with --resume never and "
            f"--learning_rate {run.cfg.learning_rate / 4:g}, or with --dtype fp32")


def log_step(run, stage, sums, grad_norm, rate):
    loss, ce, kl = all_sum(*sums.tolist())
    now = time.time()
    speed = run.window_tokens / max(now - run.window_start, 1e-9)
    run.window_start = now
    run.window_tokens = 0.0
    skipped = int(run.scale_state["skipped"].item())
    entry = {
        "train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
        "train/grad_norm": grad_norm.item(), "train/epoch": run.epoch,
        "train/step": run.progress.step, "train/tokens_per_second": speed,
        "train/skipped_steps": skipped}
    if run.cfg.on_policy:   # optional: on_policy
        entry |= take_rollout_figures(run)
    log(run, entry)
    shown = (f"{stage.name} loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} "
             f"{speed:,.0f} tok/s")
    if skipped:
        shown += f" skipped {skipped}"
    run.bar.set_postfix_str(shown)


def log(run, entry):
    """To log.jsonl, as strict JSON (no NaN), and to wandb."""
    if RANK > 0:
        return
    finite = {k: v if math.isfinite(v) else None for k, v in entry.items()}
    with contextlib.suppress(OSError):   # a full disk: the next checkpoint says so
        append_jsonl(Path(run.cfg.output_dir, "log.jsonl"), finite)
    if run.wandb is not None:
        run.wandb.log(entry, step=run.progress.step)


def evaluate_and_save(run, stage):
    """What is due after a step; after the last one of the run, both."""
    cfg = run.cfg
    progress = run.progress
    paused = time.time()
    last = progress.step == run.steps
    judged = stage.mean_over == "labels"   # while blocks are matched there is nothing to see
    if last or (judged and is_due(progress.step, cfg.eval_steps)):
        run.last_scores = scores(run, run.eval_rows)
        progress.best_loss = min(progress.best_loss, run.last_scores["loss"])
        entry = run.last_scores | {
            "min_loss": progress.best_loss, "epoch": run.epoch, "step": progress.step}
        log(run, {f"eval/{key}": value for key, value in entry.items()})
        shown = ", ".join(f"{key} {value:.4f}" for key, value in run.last_scores.items())
        print0(f"step {progress.step}: held-out {shown}")
    if last or is_due(progress.step, cfg.save_steps):
        save(run)
    run.window_start += time.time() - paused   # the speed is of training alone


def is_due(step, every):
    return every > 0 and step % every == 0


def save(run):
    """A checkpoint of this moment. What goes wrong is said, and kept in run.save_problem."""
    cfg = run.cfg
    run.saved_step = run.progress.step
    state = {
        "progress": dataclasses.asdict(run.progress), "steps": run.steps,
        "length": [cfg.max_steps, cfg.num_epochs],
        "batch": [cfg.batch_size, cfg.gradient_accumulation_steps],
        "global_batch": run.global_batch, "config": run.result_knobs, "inputs": run.inputs}
    tensors = tensors_of(run.student, run.optimizer.state, run.scale_state)
    problem = None
    try:
        run.saved_digest = save_checkpoint(
            Path(cfg.output_dir, "checkpoints"), run.saved_step, tensors, state,
            cfg.keep_checkpoints)
    except (OSError, dcp.api.CheckpointException) as e:
        problem = reason_of(e)
    run.save_problem = from_rank0(problem)
    if run.save_problem:
        print0(f"WARNING: checkpoint {run.saved_step} could not be saved ({run.save_problem}); the "
               "run goes on, older ones stay")


# ---- evaluating


def scores(run, rows):
    """The student on held-out rows."""
    return evaluate(run.student, run.loss_fn, run.get_teacher_targets, rows, run.batch_size,
                    "evaluating the student")


def rows_before_training(run):
    """A few of the held-out rows, evenly spaced: training is to start at once, and what these say
    of the student before it is only where it comes from."""
    count = min(4 * run.global_batch, len(run.eval_rows))
    return [run.eval_rows[i * len(run.eval_rows) // count] for i in range(count)]


def evaluate(root, loss_fn, get_teacher_targets, rows, batch_size, what):
    """-> {loss, ce_loss, kl_loss, perplexity}: means over the counted tokens of rows. Every token
    counts once, whatever the number of ranks."""
    loss, ce, kl, *_ = mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size,
                                      "labels", what)
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}


def mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size, mean_over, what):
    """What loss_fn returns, as means over the labels or the real tokens of rows. what: in words."""
    sums = 0
    tokens = 0
    with evaluating(root):
        for _, batch in held_out(rows, batch_size, what):
            values = root(loss_fn, batch, get_teacher_targets(batch), 1.0)
            sums += torch.stack(values).double()
            tokens += len(getattr(batch, mean_over))
    *sums, tokens = all_sum(*sums.tolist(), tokens)
    return [value / max(tokens, 1) for value in sums]


def held_out(rows, batch_size, what):
    """-> (row numbers, Batch) of this rank, one after the other. Every rank gets as many, with
    nothing in the last ones where rows end."""
    at_once = batch_size * WORLD
    starts = range(0, len(rows), at_once)
    for start in tqdm(starts, what, disable=RANK > 0, leave=False, dynamic_ncols=True):
        numbers = range(start + RANK, min(start + at_once, len(rows)), WORLD)
        yield numbers, collate([rows[i] for i in numbers])


# ---- finishing


def finish(run):
    """Write final/, say how it ended -> True when the run is done, False when it was stopped."""
    final = Path(run.cfg.output_dir, "final")
    if run.stopped:
        print0(f"stopped at step {run.progress.step} of {run.steps}; what is saved goes on with "
               "the same command")
    elif run.save_problem is None:
        run.last_scores = run.last_scores or scores(run, run.eval_rows)
        results = closing_table(run)
        print0(f"writing {final} ...")
        problem = None
        try:
            save_model(run.student, run.tokenizer, final, compute_dtype(run.cfg),
                       model_card(run, results), run.saved_digest)
        except Exception as e:   # a full disk comes as SafetensorError, or as others
            problem = one_line(e, 300)
        run.save_problem = from_rank0(problem)
        print0(f"\n{results}\n{sample_in_words(run)}\n\ndone in {time.time() - run.started:.0f} s, "
               f"{describe_peak()}: {final}")
    if run.save_problem is not None:
        raise UserError(f"the run could not be saved in {run.cfg.output_dir!r}: "
                        f"{run.save_problem}; make room, then run it again")
    return not run.stopped


def closing_table(run):
    scored = {}
    if run.teacher is not None:   # by itself: its cross-entropy to the labels
        alone = functools.partial(distil_loss, alpha=1.0, temperature=1.0,
                                  vocabulary=run.vocabulary)
        scored["teacher"] = evaluate(run.teacher, alone, teacher_targets(None), run.eval_rows,
                                     run.cfg.batch_size, "evaluating the teacher")
    seen = len(rows_before_training(run))
    scored[f"student before ({seen} sequences)"] = run.progress.first_scores
    scored[f"student after ({len(run.eval_rows)})"] = run.last_scores
    rows = []
    for name, values in scored.items():
        kl = "-" if run.cfg.alpha == 1 else f"{values['kl_loss']:.4f}"
        rows.append([name, f"{values['perplexity']:.2f}", kl])
    return table(["held out", "perplexity", "KL to teacher"], rows)


def sample_in_words(run):
    ids = run.eval_rows[0]["input_ids"][:32].tolist()
    text, = write_texts(run.student, [ids], [0], [48], 0, end_ids(run.student.model, run.tokenizer),
                        run.vocabulary)
    return f"\nsample: {run.tokenizer.decode(ids)!r}\n     -> {run.tokenizer.decode(text)!r}"


MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [simple_distill, distillation]
base_model: {bases}
license:   # fill in, for example apache-2.0
---

# A student of simple_distill

{facts}

On what was held out:

{results}

    model = AutoModelForCausalLM.from_pretrained("NAME")
    tokenizer = AutoTokenizer.from_pretrained("NAME")
"""


def model_card(run, results):
    """README.md of final/, as transformers writes them; a license is left to fill in."""
    cfg = run.cfg
    bases = [cfg.student] if cfg.alpha == 1 else [cfg.student, cfg.teacher]
    bases = [name for name in bases if not os.path.exists(name) and ":" not in name]
    return MODEL_CARD.format(bases=json.dumps(bases), facts=in_lines(facts_of(run)),
                             results=results)


def in_lines(facts):
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def facts_of(run):
    """-> {what: in words}, for the plan before a run and the model card after it. Of a path the
    last parts: where it lay is nobody's business."""
    cfg = run.cfg
    student, teacher, dataset = [os.sep.join(name.split(os.sep)[-2:])
                                 for name in (cfg.student, cfg.teacher, cfg.dataset)]
    objective = (f"{cfg.alpha:g} x cross-entropy + {1 - cfg.alpha:g} x T^2 x KL "
                 f"({cfg.divergence}), T {cfg.temperature:g}")
    if cfg.alpha == 1:
        teacher, objective = "none", "cross-entropy to the labels"
    if cfg.cache_dir:   # optional: cache
        teacher += f", {describe_cache_use(cfg)}"
    if cfg.on_policy:   # optional: on_policy
        objective += f"; KL alone on {cfg.on_policy:.0%} of the steps, on texts of the student"
    stages = ", ".join(f"{stage.name} {stage.steps} steps" for stage in run.stages)
    return {
        "student": f"{student}, {run.student.model.num_parameters():,} parameters",
        "teacher": teacher,
        "data": f"{dataset}, split {cfg.train_split}, at most {cfg.seq_len} tokens a sequence, "
                f"packing {cfg.packing}, {len(run.eval_rows)} held out",
        "objective": objective,
        "training": f"{stages} of {run.global_batch} sequences ({run.batch_size} x "
                    f"{run.micro_steps} x {WORLD}), learning rate {cfg.learning_rate:g}, seed "
                    f"{cfg.seed}, {DEVICE.type}, {compute_dtype(cfg)}"}


# ---- what a run says before it begins


def rehearse(run, stages):
    """--dry_run: the plan, one example as the model meets it, and what a step takes on the longest
    rows. Nothing is written -> False, since nothing is done."""
    run.stages = stages
    stage = stages[0]
    print0(in_lines(facts_of(run)))
    start_stage(run, stage)
    micro, _ = next(my_batches(run))
    if isinstance(run.rows, datasets.Dataset):   # the longest: a batch of them takes most memory
        longest = np.argsort(-row_lengths(run.rows), kind="stable")[:run.global_batch // WORLD]
        rows = [run.rows[i] for i in longest.tolist()]
        micro = micro_batches(rows, run.micro_steps, run.batch_size)
    print0("an example, its targets in [[ ]]: " + show_targets(micro[0].rows[0], run.tokenizer))
    for _ in range(2):   # the first warms up, and compiles
        seconds, tokens = time_step(run, stage, micro)
    average = seconds
    if run.cfg.on_policy:   # optional: on_policy
        average = rehearse_writing(run, stage, micro, seconds)
    left = run.steps - run.progress.step
    print0(f"a step of the longest rows takes {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s), "
           f"{left} steps at most {left * average / 3600:.2f} hours, without evaluations; "
           f"{describe_peak()}. --dry_run: nothing was written")
    return False


def time_step(run, stage, micro):
    """A step that comes to nothing -> its seconds, its target tokens."""
    tokens, = all_sum(count_tokens(stage, micro))
    start = time.time()
    sums, _ = one_step(run, stage, micro, tokens)
    sums.tolist()   # waits for the GPU
    return time.time() - start, tokens


def show_targets(row, tokenizer):
    """A row as text; what the student learns to say stands in [[ ]]."""
    shown = []
    parts = itertools.groupby(zip(row["input_ids"], row["targets"]), key=lambda pair: pair[1])
    for is_target, pairs in parts:
        text = tokenizer.decode([int(i) for i, _ in pairs])
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


def start_wandb(cfg, run_id):
    """-> a run to log to, or None: nothing ever waits at a prompt."""
    if RANK > 0 or not cfg.use_wandb:
        return None
    try:
        import wandb
        if not (wandb.api.api_key or os.environ.get("WANDB_MODE")):   # offline, disabled
            raise ValueError("not logged in: wandb login, or --no_use_wandb")
        return wandb.init(
            project=cfg.wandb_project, entity=cfg.wandb_entity, name=cfg.wandb_run_name, id=run_id,
            resume="allow", config=knobs_of(cfg), dir=cfg.output_dir,
            settings=wandb.Settings(console="off", silent=True, init_timeout=20))
    except Exception as e:
        print0(f"wandb: going on without it ({one_line(e)})")
        return None


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
# Optional: cache: what the teacher says of each token, a few bytes an entry, on disk beside the
# token itself, so that training needs neither teacher nor dataset. Any number of workers fill a
# cache in mode cache; open_cache hands on rows like those of load_data, with their SparseTarget.
#
#     config.json                  the config that began it: the same command again is --config this
#     tokenizer/
#     manifest.json                all that shapes the content
#     index.json                   rows a chunk and what all of it came to; {} until it is full
#     claims                       a locked byte for each chunk that somebody is at work on
#     train-00000000.safetensors   a chunk: a fixed range of sequences
#     eval-00000000.safetensors
#
# What is read is what was written, or is refused with the command that makes it again: a row has a
# checksum of its bytes and of where they belong, in which cache, chunk and line.


def describe_cache(cfg, tokenizer, splits, identity):
    """The manifest. splits: the rows of each; those of train may be a stream. identity: what is to
    be said of the teacher, see open_teacher."""
    vocabulary = vocabulary_of(tokenizer)
    size = cfg.cache_samples
    codes = size
    if cfg.cache_method == "topk":
        size = min(cfg.cache_top_k, vocabulary)
        codes = 256
    raw_rows = []
    if isinstance(splits["train"], datasets.IterableDataset):   # optional: streaming
        raw_rows = list(splits["train"].take(64))   # nobody has seen all of it
    return identity | dict(
        format=2,
        vocabulary=vocabulary,
        tokenizer=identify_tokenizer(tokenizer),
        dataset=cfg.dataset,
        dataset_fingerprint=digest(
            count_rows(splits["train"]), count_rows(splits["eval"]), str(raw_rows)),
        eval_samples=cfg.eval_samples,
        seq_len=cfg.seq_len,
        packing=cfg.packing,
        temperature=cfg.temperature,
        method=cfg.cache_method,
        size=size,               # draws a token, or the likeliest tokens that are kept
        codes=codes,             # how many there are, see below
        seed=cfg.seed,           # of the draws
        chunk=cfg.cache_chunk,   # sequences a file
        # sequences a forward: what shares a batch changes the last bits of logits
        group=max(1, 4096 // cfg.seq_len))


def identify_tokenizer(tokenizer):
    return digest(tokenizer.get_vocab(), tokenizer.chat_template)


# ---- what a row looks like on disk
#
# A row is whole numbers: how many tokens, how many entries, the largest id, and then
#
#     text      a token: 4 * its id + 2 where a document begins with it + 1 where it is a target
#     entries   codes * an id that the teacher lists + a code
#     extra     a target: what else is kept of it
#
# A target is predicted from the token before it, so the first token of a document is never one.
#
# method sample: an entry for each distinct id that was drawn, in rising order, target after target;
#     code = times drawn - 1. extra = 256 * entropy, rounded, at most 4095.
# method topk: size + 1 entries a target, the likeliest first; the last, its id 0, is the mass of
#     all that are not listed. code = round(255 * sqrt(-log(p) / 24)), so that
#     p = exp(-24 * (code / 255)^2), but 0 for 255 (it would be 4e-11). log p is off by less than
#     0.0193 * sqrt(-log p) + 0.0001. extra: nothing.


class Kept(NamedTuple):
    """Of the teacher, at the targets of a row."""
    entries: np.ndarray
    extra: np.ndarray
    mass: float   # of the teacher's distribution that the entries hold, summed over targets


def pack_row(row, kept):
    text = 4 * np.asarray(row["input_ids"]) + row["targets"]
    text[row["starts"]] += 2
    numbers = [len(text), len(kept.entries), text.max() // 4]
    return np.concatenate([numbers, text, kept.entries, kept.extra])


def unpack_row(numbers, manifest):
    """-> a row like those of load_data, with its SparseTarget in arrays: manifest["size"] ids a
    target."""
    tokens, entries = numbers[:2]
    text, listed, extra = np.split(numbers[3:], [tokens, tokens + entries])
    ids, codes = np.divmod(listed, manifest["codes"])
    if manifest["method"] == "sample":
        sparse = decode_samples(ids, codes, extra, manifest["size"])
    else:
        sparse = decode_topk(ids, codes, manifest["size"])
    return {"input_ids": text // 4, "targets": text % 2 == 1,
            "starts": np.flatnonzero(text & 2), "sparse": sparse}


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


def compress(numbers):
    """-> bytes. The lowest byte of all numbers first, the highest last: like stands beside like,
    and takes a little less than every number in the fewest bits."""
    number_bytes = np.asarray(numbers, "<u4").view(np.uint8).reshape(-1, 4)
    return zlib.compress(number_bytes.T.tobytes(), 1)


def decompress(data):
    bytes_4N = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1)
    return 256 ** np.arange(4) @ bytes_4N


# ---- filling


def fill_cache(cfg):
    """Fill what is missing of cache_dir. Any number of workers may, at any time, each of any number
    of ranks; the same command goes on where it was stopped."""
    if RANK == 0:
        with mark_folder(cfg.cache_dir, "cache") as mark:   # no lock: there may be many workers
            mark.truncate(0)
            mark.write("cache ")
    tokenizer = load_tokenizer(cfg, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    splits = {"train": rows, "eval": eval_rows}
    ask, identity = open_teacher(cfg, tokenizer)
    with phase(f"opening cache {cfg.cache_dir}"):
        manifest = describe_cache(cfg, tokenizer, splits, identity)
        begin_cache(cfg, tokenizer, manifest)
    with stop_signals() as stop_requests:
        paths = fill_chunks(cfg, tokenizer, splits, manifest, ask, stop_requests)
    if paths is None:
        print0("stopped; the same command goes on")
    elif RANK == 0:
        finish_cache(cfg.cache_dir, manifest, paths)


def open_teacher(cfg, tokenizer):
    """-> ask, and what a manifest says of the teacher. Another teacher is another such function:
    ask(rows, first, manifest) gives a Kept a row. first: the number of the first row, by which its
    draws are the same whoever makes them. All ranks ask together, also one that has no rows left,
    since a sharded teacher needs them all."""
    teacher, weights = load_checked(cfg, "teacher", tokenizer)
    get_teacher_targets = teacher_targets(teacher)
    identity = dict(
        teacher=cfg.teacher, weights=weights, dtype=str(compute_dtype(cfg)),
        revision=getattr(teacher.model.config, "_commit_hash", None))   # None: a directory

    def ask(rows, first, manifest):
        for row in rows:
            check_ids(teacher, tokenizer, int(row["input_ids"].max()))
        hidden_ND, head = get_teacher_targets(collate(rows))   # N: the targets of all rows
        kept = []
        for number, row in enumerate(rows, first):
            row_hidden_ND, hidden_ND = hidden_ND.tensor_split([int(row["targets"].sum())])
            kept.append(keep(row_hidden_ND, head, number, manifest))
        return kept

    return ask, identity


def begin_cache(cfg, tokenizer, manifest):
    """A new cache gets all but its chunks; one that is there must be of the same content."""
    folder = Path(cfg.cache_dir)
    manifest_path = folder / "manifest.json"
    if manifest_path.exists() and not cfg.force_regenerate:
        there = read_manifest(cfg.cache_dir)
        refuse_changes(there, manifest, cfg.cache_dir, "empty it: --force_regenerate")
    elif RANK == 0:
        write_json({}, folder / "index.json")
        if cfg.force_regenerate:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            for path in folder.glob("*.safetensors"):
                path.unlink()
        write_json(knobs_of(cfg) | {"force_regenerate": False}, folder / "config.json")
        tokenizer.save_pretrained(folder / "tokenizer")
        write_json(manifest, manifest_path)   # last: from here on there is a cache
    all_sum(0)   # nobody goes on before that


def fill_chunks(cfg, tokenizer, splits, manifest, ask, stop_requests):
    """-> the paths of all chunks, once they are there; None where a signal stopped it. Ranks go
    from one forward to the next together: see open_teacher."""
    total = math.inf   # a stream has no length
    if not isinstance(splits["train"], datasets.IterableDataset):
        total = sum(map(len, splits.values()))
    with tqdm(total=total, unit="row", disable=RANK > 0, leave=False) as bar:
        while True:
            paths = []
            chunks = free_chunks(cfg, tokenizer, splits, manifest, paths)
            forwards = write_chunks(chunks, ask, manifest, total)
            all_rows = True
            while all_rows:
                rows = next(forwards, 0)
                if not rows:
                    ask([], 0, manifest)
                all_rows, stop = all_sum(rows, len(stop_requests))
                if stop:
                    return None
                bar.update(int(all_rows))
            missing, = all_sum(sum(not path.exists() for path in paths))
            if not missing:
                return paths
            time.sleep(1)   # another worker has a chunk; it may die with it


def free_chunks(cfg, tokenizer, splits, manifest, paths):
    """Claim the chunks that are not there and that no living worker has, one after the other
    -> (path, rows, number of the first row), ...; the paths of all chunks are added to paths.

    A stream is cut into blocks of raw rows, each packed on its own, so that nobody has to tokenise
    what another worker does. As a block may hold any number of rows, theirs begin 2^32 apart."""
    size = manifest["chunk"]
    numbers = {"eval": 0, "train": 2**60}   # where those of chunks, and of rows, begin
    with Path(cfg.cache_dir, "claims").open("a") as claims:
        for split, rows in splits.items():
            is_stream = isinstance(rows, datasets.IterableDataset)
            blocks = rows.iter(size) if is_stream else range(0, len(rows), size)
            for chunk, block in enumerate(blocks):
                path = Path(cfg.cache_dir, f"{split}-{chunk:08d}.safetensors")
                paths.append(path)
                try:   # one byte, which the file need not have; given back when a worker dies
                    fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, numbers[split] + chunk)
                except BlockingIOError:   # another worker has it
                    continue
                if path.exists():
                    continue
                first = numbers[split] + chunk * size
                if is_stream:
                    block_rows = encode_block(cfg, tokenizer, block)
                    first += chunk << 32
                else:
                    end = min(block + size, len(rows))
                    block_rows = [rows[i] for i in range(block, end)]
                yield path, block_rows, first


def encode_block(cfg, tokenizer, columns):
    columns = row_encoder(cfg, tokenizer)(rows_from_columns(columns))
    rows, _ = kept_rows(token_rows(columns))
    if cfg.packing == "documents":
        rows = PackedRows(rows, cfg.seq_len)
    return [rows[i] for i in range(len(rows))]


def write_chunks(chunks, ask, manifest, total):
    """Write the chunks of free_chunks; yields after each forward, its number of rows. The first
    chunk tells what all will take. total: rows of all splits, inf for a stream."""
    said = False
    for path, rows, first in chunks:
        kept = []
        for start in range(0, len(rows), manifest["group"]):
            group = rows[start:start + manifest["group"]]
            kept += ask(group, first + start, manifest)
            yield len(group)
        write_chunk(path, rows, kept, digest(manifest))
        if rows and not said:
            say_size(path, rows, kept, total)
            said = True


def say_size(path, rows, kept, total):
    tokens = sum(len(row["input_ids"]) for row in rows)
    targets = sum(row["targets"].sum() for row in rows)
    mass = sum(of_row.mass for of_row in kept)
    size = path.stat().st_size
    print0(f"cache: {size / tokens:.1f} bytes a token, which hold {mass / targets:.1%} of the "
           f"teacher's mass; about {size / len(rows) * total / 1e9:.3f} GB in all, "
           f"{shutil.disk_usage(path).free / 1e9:.1f} GB free")


def write_chunk(path, rows, kept, content):
    """A chunk appears whole or not at all. Safetensors: mapped into memory, sliced, no code in it.

    rows   the rows, end to end: 4 bytes of checksum_at, then its numbers, compressed
    ends   where each begins and ends
    """
    parts = []
    for line, (row, of_row) in enumerate(zip(rows, kept, strict=True)):
        data = compress(pack_row(row, of_row))
        parts.append(checksum_at(path, line, data, content) + data)
    tensors = {"rows": np.frombuffer(b"".join(parts), np.uint8),
               "ends": np.cumsum([0, *map(len, parts)])}
    aside = path.with_suffix(".tmp")
    aside.write_bytes(safetensors.numpy.save(tensors))
    sync(aside)
    aside.rename(path)


def checksum_at(path, line, data, content):
    """Of a row's bytes and of where they belong. content: digest of the manifest."""
    place = f"{content} {path.name} {line}"
    return zlib.crc32(data, zlib.crc32(place.encode())).to_bytes(4, "little")


def keep(hidden_ND, head, number, manifest):
    """Of the teacher, at the targets of the row of this number -> Kept"""
    # draws of its own, the same on any device
    generator = torch.Generator().manual_seed(int(digest(manifest["seed"], number), 16) >> 1)
    shape = len(hidden_ND), manifest["size"]
    uniform_NS = torch.rand(shape, dtype=torch.float64, generator=generator).to(DEVICE)
    # 16 bytes an entry of [C, V]: log p, p, and the running sum of p in fp64
    at_once = max(1, LOGITS_BUDGET // (16 * manifest["vocabulary"]))
    parts = []
    for hidden_CD, uniform_CS in zip(hidden_ND.split(at_once), uniform_NS.split(at_once)):
        logits_CV = head_logits(hidden_CD, head, manifest["vocabulary"])   # without the padding
        logp_CV = torch.log_softmax(logits_CV / manifest["temperature"], -1)
        if manifest["method"] == "sample":
            parts.append(sample_entries(logp_CV, uniform_CS))
        else:
            parts.append(topk_entries(logp_CV, manifest["size"]))
    entries, extra, masses = map(torch.cat, zip(*parts))
    return Kept(entries.cpu().numpy(), extra.cpu().numpy(), masses.sum().item())


def sample_entries(logp_CV, uniform_CS):
    """S draws a token -> an entry for each distinct id [E], extra [C], masses."""
    vocabulary = logp_CV.shape[1]
    cdf_CV = logp_CV.exp().cumsum(-1, dtype=torch.float64)
    heights_CS = uniform_CS * cdf_CV[:, -1:]   # which is not exactly 1
    draws_CS = torch.searchsorted(cdf_CV, heights_CS, right=True).clamp_max(vocabulary - 1)
    draws_CS = draws_CS.sort(-1)[0]
    # the entropy as these draws show it: student = teacher logs a KL of 0, not of noise around 0
    entropy_C = -logp_CV.gather(-1, draws_CS).mean(-1)
    extra_C = (entropy_C * 256).round().clamp_max(4095).long()
    line_C1 = torch.arange(len(draws_CS), device=draws_CS.device)[:, None]
    # places in [C, V] end to end: what two tokens have drawn stays apart
    places_E, times_E = torch.unique_consecutive(
        draws_CS + vocabulary * line_C1, return_counts=True)
    entries_E = places_E % vocabulary * uniform_CS.shape[1] + times_E - 1
    return entries_E, extra_C, logp_CV.flatten()[places_E].exp()


def topk_entries(logp_CV, size):
    """The likeliest K = size ids a token and the rest -> entries [C * (K + 1)], nothing, masses.
    """
    logp_CK, ids_CK = logp_CV.topk(size)
    mass_C1 = logp_CK.exp().sum(-1, keepdim=True)
    rest_C1 = (1 - mass_C1).clamp_min(0)
    logp_CE = torch.cat([logp_CK, rest_C1.log()], -1)
    codes_CE = logp_CE.div(-24).sqrt().mul(255).round().clamp_max(255).long()
    entries_CE = 256 * nn.functional.pad(ids_CK, (0, 1)) + codes_CE
    return entries_CE.flatten(), ids_CK.new_empty(0), mass_C1


def finish_cache(cache_dir, manifest, paths):
    """Read every row of all workers' chunks back; with their numbers the cache is full."""
    chunks = {"train": [], "eval": []}
    tokens = biggest_id = 0
    for path in tqdm(paths, desc="reading the cache back", unit="chunk", leave=False):
        rows = read_chunk(path, digest(manifest))
        tokens += sum(int(numbers[0]) for numbers in rows)
        biggest_id = max([biggest_id, *[int(numbers[2]) for numbers in rows]])
        split, _ = path.name.split("-")
        chunks[split].append(len(rows))
    size = sum(path.stat().st_size for path in paths)
    index = dict(chunks=chunks, rows=sum(map(sum, chunks.values())), tokens=tokens,
                 bytes_per_token=size / tokens, biggest_id=biggest_id)
    write_json(index, Path(cache_dir, "index.json"))
    print0(f"cache {cache_dir} is full: {index['rows']:,} sequences, {tokens:,} tokens of "
           f"{index['bytes_per_token']:.1f} bytes")


# ---- reading


def take_from_cache(cfg):
    """-> cfg of a training run, with what the cache has decided; refused where something else was
    typed."""
    with phase(f"opening cache {cfg.cache_dir}"):
        manifest = read_manifest(cfg.cache_dir)
        names = ("teacher", "dataset", "seq_len", "temperature", "packing")
        decided = {name: manifest[name] for name in names}
        typed = {name: getattr(cfg, name) for name in names if name in cfg.given}
        refuse_changes(decided, decided | typed, cfg.cache_dir, "fill another --cache_dir")
    print0(f"the cache is of {decided}")
    return dataclasses.replace(cfg, **decided)


def describe_cache_use(cfg):
    manifest = read_manifest(cfg.cache_dir)
    return f"of each token {manifest['size']} ids, method {manifest['method']}"


def load_with_cache(cfg):
    """load_everything, where the cache is the dataset and the teacher. Code in its tokenizer runs
    only where this run allows it."""
    with phase(f"reading cache {cfg.cache_dir}"):
        manifest = read_manifest(cfg.cache_dir)
        index = read_json(Path(cfg.cache_dir, "index.json"))
        if not index:
            raise UserError(f"{cfg.cache_dir!r} holds no finished cache (it was begun, not "
                            "finished); the same mode cache command finishes it")
        folder = Path(cfg.cache_dir, "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
        if identify_tokenizer(tokenizer) != manifest["tokenizer"]:
            raise UserError(f"cache tokenizer '{folder}' is not what was written; fill the cache "
                            "again with --force_regenerate")
        theirs = load_tokenizer(cfg, cfg.student) or tokenizer
        compare_tokenizers(theirs, tokenizer, cfg.tokenizer or cfg.student, cfg.cache_dir)
        rows = CacheRows(cfg.cache_dir, "train", manifest, index)
        eval_rows = CacheRows(cfg.cache_dir, "eval", manifest, index, at_most=cfg.eval_samples)
    student, _ = load_checked(cfg, "student", tokenizer)
    check_ids(student, tokenizer, index["biggest_id"])
    return tokenizer, rows, eval_rows, student, None, None


class CacheRows:
    """The rows of a split, by number: nothing is read but what is asked for."""

    def __init__(self, cache_dir, split, manifest, index, at_most=math.inf):
        self.prefix = f"{cache_dir}/{split}"
        self.manifest = manifest
        self.content = digest(manifest)
        self.starts = np.cumsum([0, *index["chunks"][split]])   # of chunks; the last: the end
        self.length = int(min(self.starts[-1], at_most))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        chunk = int(np.searchsorted(self.starts, i, "right")) - 1
        line = i - int(self.starts[chunk])
        path = Path(f"{self.prefix}-{chunk:08d}.safetensors")
        numbers, = read_chunk(path, self.content, [line])
        return unpack_row(numbers, self.manifest)


def read_chunk(path, content, lines=None):
    """-> the numbers of each of its rows, or of some, as they were written. content: digest of the
    manifest. Mapped anew each time, 20 us: nothing has to be kept."""
    try:
        rows = []
        with safetensors.safe_open(path, "numpy") as file:
            ends = file.get_tensor("ends").tolist()
            for line in lines or range(len(ends) - 1):
                written = file.get_slice("rows")[ends[line]:ends[line + 1]].tobytes()
                if written[:4] != checksum_at(path, line, written[4:], content):
                    raise ValueError("wrong checksum")
                rows.append(decompress(written[4:]))
        return rows
    except Exception as e:
        folder = shlex.quote(str(path.parent))   # where the cache lies now: it may be a copy
        raise UserError(
            f"cache chunk '{path}' is damaged or of another cache ({one_line(e)}); to make it, and "
            f"only it, again: rm {shlex.quote(str(path))}; python simple_distill.py --config "
            f"{folder}/config.json --cache_dir {folder}") from e


def read_manifest(cache_dir):
    """Of a cache that was begun, at least."""
    manifest = read_json(Path(cache_dir, "manifest.json"), {})
    if manifest.get("format") != 2:
        raise UserError(f"{cache_dir!r} holds no cache, or one of an older version; mode cache "
                        "fills it, an older one with --force_regenerate")
    return manifest


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
# scored, compared with the teacher layer by layer and tried out (report, at the end, goes through
# them); that becomes figures with intervals, and these report.json, report.md and report.png.
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
    "In brackets 95 % (bootstrap over sequences); x: of the teacher. Prefill: a batch of that "
    "shape; generation: batch 1; memory: while generating, GPUs only. A checkpoint is as large as "
    "its final/ will be."
)


REPORT_MARK = "Written by simple_distill --mode eval"   # stands in each file of a report
REPORT_FILES = ("report.json", "report.md", "report.png")


def is_report(path):
    with open(path, "rb") as f:
        return REPORT_MARK.encode() in f.read()


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


def load_model(cfg, name, label):
    """A model, or checkpoints/step-... of a run in progress: its student, as that run builds it."""
    if not is_checkpoint(name):
        return load_teacher(dataclasses.replace(cfg, teacher=name), label)
    path, state = find_checkpoint(name, cfg.output_dir)
    root = load_student(config_of_run(cfg, name, state))
    load_checkpoint(path, tensors_of(root, {}, {}))
    return root.eval()


def config_of_run(cfg, name, state):
    """The Config of the run that checkpoint `name` is of. A file does not decide what is allowed:
    whether code of strangers runs is for this run to say."""
    with reading(f"checkpoint {name!r}: its state.json tells no run of this version"):
        stored = dict(state["config"])
        if stored.get("cache"):   # optional: cache
            stored["cache_dir"] = stored["cache"]   # a digest, no path: enough to need no teacher
        stored.pop("cache", None)
        stored |= dict(dtype=cfg.dtype, seq_len=cfg.seq_len,
                       trust_remote_code=cfg.trust_remote_code)
        try:
            return Config.from_json(stored)
        except UserError as e:   # names the knob, but not whose it is
            raise ValueError(e) from e


def retokenize(rows, tokenizer, other):
    """The counted text of each row under another tokenizer: the same bytes, after its BOS, or EOS
    where it has none, in place of the first token, which is never counted."""
    if rows[0]["targets"] is not None:
        raise UserError("models with different tokenizers are compared on plain text; here prompts "
                        "are masked")
    eos = tokenizer.eos_token or "\0"
    other_eos = other.eos_token or ""
    begin = bos_of(other)
    if begin is None:
        begin = other.eos_token_id or 0
    retokenized = []
    for row in rows:
        text = tokenizer.decode(row["input_ids"][1:]).replace(eos, other_eos)
        ids = other(text, add_special_tokens=False, verbose=False)["input_ids"]
        retokenized.append({"input_ids": [begin, *ids]})
    return retokenized


def prompts_for(other, tokenizer, prompts):
    """Prompts of plain text, each after the other tokenizer's BOS instead of this one's."""
    bos = "" if bos_of(tokenizer) is None else tokenizer.bos_token
    other_bos = "" if bos_of(other) is None else other.bos_token
    return [other_bos + prompt.removeprefix(bos) for prompt in prompts]


def rows_for(other, tokenizer, rows, name, teacher_name):
    """-> (rows as the other tokenizer cuts them, whether it cuts like the teacher's)"""
    try:
        compare_tokenizers(tokenizer, other, teacher_name, name)
    except UserError:
        return retokenize(rows, tokenizer, other), False
    return rows, True


@torch.no_grad()
def score(root, reference, rows, vocabulary, batch_size, temperature, bar):
    """One pass over the rows of all ranks, over the ids below vocabulary. -> sums a sequence
    [rows, 5]: tokens, -log p, top-1 right, top-1 the reference's, KL to it (with its T^2); and sums
    a bin of confidence [BINS, 3]: tokens, hits, confidence."""
    sums = torch.zeros(len(rows), 5, dtype=torch.float64)
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for mine in rows_of_this_rank(rows, batch_size):
        batch = collate([rows[i] for i in mine])
        hidden_ND, head = root(counted_hidden, batch)
        reference_ND, reference_head = reference(counted_hidden, batch)
        # padded tails are cut
        vocab = min(vocabulary, len(head.weight), len(reference_head.weight))
        width = batch.input_ids.shape[1]
        row_N = torch.tensor(mine, dtype=torch.long)[(batch.positions // width).cpu()]
        chunk = max(1, LOGITS_BUDGET // (24 * vocab))   # six fp32 [C, V] at a time
        for start in range(0, len(row_N), chunk):
            part = slice(start, start + chunk)
            terms = score_tokens(
                head_logits(hidden_ND[part], head, vocab),
                head_logits(reference_ND[part], reference_head, vocab),
                batch.labels[part].to(DEVICE),
                temperature,
            )
            add_terms(terms, row_N[part], sums, bins)
        bar.update(WORLD * len(mine))
    dist.all_reduce(sums)
    dist.all_reduce(bins)
    root.release()
    reference.release()
    return sums, bins


def head_logits(hidden_CD, head, vocab):
    """-> [C, vocab] in fp32"""
    raw = nn.functional.linear(hidden_CD, head.weight, head.bias)[:, :vocab]
    return scale_and_softcap(raw, head.scale, head.softcap)[0]


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


def add_terms(terms_C6, row_C, sums, bins):
    """Adds the terms of each token to its row of sums and to its bin of confidence."""
    sums.index_add_(0, row_C, terms_C6[:, :5])
    confidence = terms_C6[:, 5]
    bin_C = (confidence * BINS).long().clamp(max=BINS - 1)
    bins.index_add_(0, bin_C, terms_C6[:, [0, 2, 5]])


def layer_outputs(model, batch):
    """Runs inside a root: [B, T, D] after each layer."""
    with known_documents(batch.position_ids) as positions:
        outputs = model.base_model(
            batch.input_ids, use_cache=False, output_hidden_states=True, **positions)
    return outputs.hidden_states[1:]   # the first is of the embeddings


@torch.no_grad()
def layer_errors(root, teacher, batch):
    """How far each layer of a student is from the layer of the teacher at the same depth."""
    states = root(layer_outputs, batch)
    teacher_states = teacher(layer_outputs, batch)
    errors = []
    for i in range(len(states)):
        # The same layers as block-wise mode matches, but a student may be the deeper one here.
        j = max(0, round((i + 1) * len(teacher_states) / len(states)) - 1)
        x_ND = states[i].flatten(0, 1)[batch.positions].double()
        y_NE = teacher_states[j].flatten(0, 1)[batch.positions].double()
        errors.append(dict(student=i + 1, teacher=j + 1, **compare_states(x_ND, y_NE)))
    root.release()
    teacher.release()
    return errors


def compare_states(x_ND, y_NE):
    """MSE from x to y (other width: after the best linear map), MSE / variance of y, both of which
    a few huge states decide; |x - y|^2 / |y|^2 of the median token, which they do not; linear CKA.
    """
    tokens, width = x_ND.shape
    xc = x_ND - x_ND.mean(0)
    yc = y_NE - y_NE.mean(0)
    xx = xc.T @ xc
    xy = xc.T @ yc
    yy = yc.T @ yc
    if x_ND.shape == y_NE.shape:
        missed = x_ND - y_NE
    else:
        # Fitted on the tokens that it is judged on: each row of the map and its bias explain one
        # token for nothing, and those are left out of the average.
        fitted = xc @ torch.linalg.pinv(xx, hermitian=True) @ xy
        missed = (yc - fitted) * math.sqrt(tokens / max(tokens - width - 1, 1))
    mse = missed.square().mean().item()
    cka = (xy.norm() ** 2 / xx.norm() / yy.norm()).item()
    size_N = y_NE.square().sum(-1).clamp_min(1e-30)
    median = (missed.square().sum(-1) / size_N).median().item()
    return dict(mse=mse, share=mse / yc.square().mean().item(), median=median, cka=cka)


def try_out(root, tokenizer, input_ids_BT, prompts, seed, allocated):
    """-> tokens a second, peak bytes, and [greedy, sampled] continuations of each prompt.
    allocated: bytes that were in use before the model was loaded."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    prefill_seconds = [continue_text(root, tokenizer, input_ids_BT, 1)[0] for _ in range(3)]
    greedy_seconds = []
    texts = []
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids_1T = encoded["input_ids"].to(DEVICE)
        seconds, greedy = continue_text(root, tokenizer, ids_1T, NEW_TOKENS)
        _, sampled = continue_text(root, tokenizer, ids_1T, NEW_TOKENS, seed=seed)
        greedy_seconds.append(seconds)
        texts.append([greedy, sampled])
    peak = torch.cuda.max_memory_allocated() - allocated if CUDA else None
    prefill = input_ids_BT.numel() / min(prefill_seconds)
    generation = NEW_TOKENS / min(greedy_seconds)
    return dict(prefill=prefill, generation=generation, texts=texts, memory=peak)


def interval(top, bottom, seed):
    """-> [sum(top) / sum(bottom), low, high]: 95 % of it when sequences are drawn anew: percentiles
    of the bootstrap, widened for few sequences like Student's t."""
    n = len(top)
    rng = np.random.default_rng(seed)
    middle = top.sum() / bottom.sum()
    redrawn = []
    for _ in range(20):   # 2,000 samples, 100 at a time to save memory
        picks = rng.integers(0, n, (100, n))
        redrawn.append(top[picks].sum(1) / bottom[picks].sum(1))
    off = np.concatenate(redrawn) - middle
    # The bootstrap's variance is (n - 1) / n of what it estimates; t's 97.5 % point with n - 1
    # degrees of freedom is about 1 + 1.21 / (n - 1) times the normal's.
    widen = math.sqrt(n / (n - 1)) * (1 + 1.21 / (n - 1))
    low, high = middle + widen * np.quantile(off, (0.025, 0.975))
    return [float(middle), float(low), float(high)]


def compute_metrics(models, tables, sizes, seed):
    """Adds to the figures of each model those of its sums a sequence (see score) and of the bytes
    of each, what they are of the teacher's, its curves, and the student's lead over it."""
    for label, figures in models.items():
        figures.update(measure_quality(tables[label], figures["bins"], sizes, seed))
        figures["curves"] |= collect_curves(figures)
        if not figures.pop("same_tokenizer"):   # these need one vocabulary
            figures["agreement"] = None
            figures["kl"] = None
    for label, figures in models.items():
        figures["ratio"] = {}
        for key in METRICS:
            whole = models["teacher"][key]
            if figures[key] is not None and whole:   # the teacher's KL is 0
                figures["ratio"][key] = figures[key] / whole
        ahead = tables["student"][:, 1] - tables[label][:, 1]
        figures["student_against_it"] = judge_difference(ahead / math.log(2), sizes, seed)


def measure_quality(table, bins, sizes, seed):
    counts, nats, *_ = table.T
    tokens, _, right, agreed, kl = table.sum(0).tolist()
    perplexity, *perplexity_95 = [math.exp(min(x, 700)) for x in interval(nats, counts, seed)]
    bits, *bits_95 = interval(nats / math.log(2), sizes, seed)
    ece = sum(abs(hits - confidence) for _, hits, confidence in bins) / tokens
    return dict(
        perplexity=perplexity, perplexity_95=perplexity_95, bits=bits, bits_95=bits_95,
        tokens=int(tokens), accuracy=right / tokens, agreement=agreed / tokens, kl=kl / tokens,
        ece=ece,
    )


def judge_difference(bits, sizes, seed):
    """bits of each sequence, the student's less the other's -> their difference a byte."""
    difference, low, high = interval(bits, sizes, seed)
    if high < 0:
        verdict = "better"
    elif low > 0:
        verdict = "worse"
    else:
        verdict = "no significant difference"
    return dict(difference=difference, interval=[low, high], verdict=verdict)


def collect_curves(figures):
    """-> {name: [(x, y), ...]} for the picture, beside the losses."""
    layers = figures["layers"]
    curves = {}
    curves["median token"] = [(layer["student"], layer["median"]) for layer in layers]
    curves["CKA"] = [(layer["student"], layer["cka"]) for layer in layers]
    curves["reliability"] = [
        (confidence / count, hits / count) for count, hits, confidence in figures["bins"] if count
    ]
    return curves


def read_losses(name):
    """{key: [(step, value), ...]} from log.jsonl of the run that a model directory or a checkpoint
    is of; nothing where there is none."""
    paths = [os.path.join(name, up, "log.jsonl") for up in ("..", "../..")]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        return {}
    losses = {}
    with reading(f"model {name!r}: {paths[0]!r} beside it is damaged"):
        with open(paths[0], encoding="utf-8") as f:
            # Not read_jsonl, which mends the file: the run may be writing its last line.
            entries = [json.loads(line) for line in f if line.endswith("}\n")]
        for entry in entries:
            for key, value in entry.items():
                if key.endswith("loss") and value:   # 0: there is no such term; None: not finite
                    step = entry[key.split("/")[0] + "/step"]
                    losses.setdefault(key, []).append((int(step), float(value)))
    return losses


def disk_bytes(name, parameters, dtype):
    """Of its weights; a hub name or a checkpoint, which has none of its own: as saved in dtype."""
    files = glob.glob(os.path.join(glob.escape(name), "*.safetensors"))
    return sum(os.path.getsize(file) for file in files) or parameters * dtype.itemsize


def draw_report(path, models):
    """Four panels; shades, lines and markers tell models apart in grey too."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    (training, layers), (quality, reliability) = figure.subplots(2, 2)
    styles = (("0.6", "s"), ("black", "D"), ("#d55e00", "^"), ("#56b4e9", "o"))
    for i, (label, figures) in enumerate(models.items()):
        color, marker = styles[i % len(styles)]
        for panel, key, line in (
            (training, "train/ce_loss", "-"),
            (training, "train/kl_loss", ":"),
            (training, "eval/ce_loss", marker),
            (layers, "median token", marker + "-"),
            (layers, "CKA", marker + ":"),
            (reliability, "reliability", marker + "-"),
        ):
            points = figures["curves"].get(key)
            if points:
                xs, ys = zip(*points, strict=True)
                panel.plot(xs, ys, line, color=color, markersize=5, label=f"{label}: {key}")
        size = figures["parameters"] * 1.05**i   # aside a little: models of one size are common
        bits = figures["bits"]
        around = [[abs(x - bits)] for x in figures["bits_95"]]
        quality.errorbar(size, bits, around, fmt=marker, color=color, capsize=3, label=label)
    reliability.plot([0, 1], [0, 1], color="0.85", zorder=0)

    training.set(title="Training", xlabel="step", ylabel="nats a token")
    layers.set(
        title="Layers against the teacher's", xlabel="student layer",
        ylabel="relative error of the median token; CKA",
    )
    layers.xaxis.get_major_locator().set_params(integer=True)
    quality.set(
        title="Quality against size", xlabel="parameters", xscale="log",
        ylabel="bits a byte, held out, 95 %",
    )
    sizes = sorted({figures["parameters"] for figures in models.values()})
    quality.set_xticks(sizes, [tqdm.format_sizeof(size) for size in sizes])
    quality.minorticks_off()
    quality.margins(0.25)
    reliability.set(
        title="Reliability", xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1)
    )
    for panel in (training, layers, quality, reliability):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": REPORT_MARK})


def show_number(x):
    if x is None:
        return "-"
    if abs(x) < 1e4:
        return f"{x:.4g}"
    return f"{x:,.0f}"


def show_figure(label, figures, key):
    """The cell of a model in the table: value (low to high), so many x of the teacher's."""
    shown = show_number(figures[key])
    if key + "_95" in figures:
        low, high = figures[key + "_95"]
        shown += f" ({show_number(low)} to {show_number(high)})"
    if label != "teacher" and key in figures["ratio"]:
        shown += f", {show_number(figures['ratio'][key])} x"
    return shown


def markdown_table(header, rows):
    """-> lines, an empty one before and after."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return ["", *lines, ""]


def summary_lines(setting, models):
    """The beginning of report.md, printed too: verdicts, the table, how it was measured."""
    lines = [f"# {models['student']['name']}: the report", ""]
    for label, figures in models.items():
        if label != "student":
            against = figures["student_against_it"]
            low, high = against["interval"]
            lines.append(
                f"- student against {label}: {against['difference']:+.4f} bits a byte "
                f"({low:+.4f} to {high:+.4f}): {against['verdict']}"
            )
    rows = []
    for key, title in METRICS.items():
        cells = [show_figure(label, figures, key) for label, figures in models.items()]
        rows.append([title, *cells])
    lines += markdown_table(["", *models], rows)
    settings = ", ".join(f"{key} {value}" for key, value in setting.items())
    return [*lines, f"{settings}. {LEGEND}", ""]


def detail_lines(models, prompts):
    """The rest of report.md: the layers of each model, then continuations of the prompts."""
    lines = []
    for label, figures in models.items():
        rows = [[show_number(x) for x in layer.values()] for layer in figures["layers"]]
        if rows:
            header = ["layer", "teacher's", "MSE", "MSE / variance", "median token", "CKA"]
            lines += [f"## Layers of {label}", *markdown_table(header, rows)]
    for i, prompt in enumerate(prompts):   # indented is code: nothing to escape
        lines += ["## Greedy, then sampled, after", "", f"    {prompt!r}", ""]
        for label, figures in models.items():
            lines += [f"    {label}: {text!r}" for text in figures["texts"][i]]
        lines.append("")
    return lines


def write_report(folder, setting, models, prompts):
    """report.json, report.png and report.md -> the beginning of the last"""
    summary = summary_lines(setting, models)
    try:
        draw_report(os.path.join(folder, "report.png"), models)
        summary += ["![training, layers, quality against size, reliability](report.png)", ""]
    except ImportError:
        summary += ["No report.png: pip install matplotlib", ""]
    everything = dict(about=REPORT_MARK, setting=setting, models=models, prompts=prompts)
    write_json(everything, os.path.join(folder, "report.json"))
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join([*summary, *detail_lines(models, prompts), REPORT_MARK + ".", ""]))
    return "\n".join(["", *summary])


def choose_prompts(rows, tokenizer):
    """The beginnings of three rows (fewer where there are fewer): up to the first counted token,
    and at least 32 tokens."""
    prompts = []
    for i in range(0, len(rows), -(-len(rows) // 3)):
        first_counted = int(collate([rows[i]]).positions[0])
        prompts.append(tokenizer.decode(rows[i]["input_ids"][:max(32, first_counted + 1)]))
    return prompts


def counted_bytes(rows, tokenizer):
    """-> the length of the counted text of each row, in UTF-8."""
    sizes = []
    for row in rows:
        text = tokenizer.decode(collate([row]).labels, skip_special_tokens=True)
        sizes.append(len(text.encode()))
    return sizes


def report(cfg):
    """What was lost, what was gained, was the teacher worth it? -> report.md, report.json and
    report.png in output_dir."""
    for file in REPORT_FILES:
        refuse_foreign(os.path.join(cfg.output_dir, file), is_report)
    names = name_models(cfg)
    losses = {"teacher": {}}
    for label, name in names.items():   # a name that is no model is refused before any work
        if not is_checkpoint(name):
            model_config(name, cfg, label)
        if label != "teacher":
            losses[label] = read_losses(name)
    tokenizer = load_tokenizer(cfg, cfg.teacher, names["student"])
    _, rows = load_data(cfg, tokenizer)
    if len(rows) < 2:
        raise UserError(f"{cfg.dataset!r}: one held-out sequence has no interval; bring more text "
                        "or lower --seq_len")
    probe_rows = min(len(rows), 8192 // cfg.seq_len + 1)
    probe_batch = collate([rows[i] for i in range(probe_rows)])   # for layers, same on every rank
    prompts = choose_prompts(rows, tokenizer)
    dtype = compute_dtype(cfg)
    unnamed = dataclasses.replace(cfg, tokenizer=None)   # to find the one that a model brings

    models = {}   # {label: figures}
    tables = {}   # {label: sums a sequence}
    teacher = None
    for label, name in names.items():
        allocated = torch.cuda.memory_allocated()
        with progress(f"reading {label} {name}"):
            root = load_model(cfg, name, label)
            teacher = teacher or root   # which comes first, and stays
            model_tokenizer = load_tokenizer(unnamed, name) or tokenizer
            check_head(root, label, name, model_tokenizer)
        rows_here, same = rows_for(model_tokenizer, tokenizer, rows, name, cfg.teacher)
        reference = teacher if same else root   # itself: nothing that needs one vocabulary counts
        vocabulary = vocabulary_of(tokenizer if same else model_tokenizer)   # of rows_here
        with progress(f"evaluating {label}", len(rows_here), unit="seq") as bar:
            sums, bins = score(root, reference, rows_here, vocabulary, cfg.batch_size,
                               cfg.temperature, bar)
        tables[label] = sums.numpy()
        layers = []
        if reference is not root:
            with progress(f"comparing the layers of {label}"):
                layers = layer_errors(root, teacher, probe_batch)
        numbers = range(cfg.batch_size)   # there may be fewer rows
        prefill_ids = collate([rows_here[i % len(rows_here)] for i in numbers]).input_ids
        parameters = root.model.num_parameters()
        own_prompts = prompts if same else prompts_for(model_tokenizer, tokenizer, prompts)
        with progress(f"{label} writes, by the clock"):
            trial = try_out(root, model_tokenizer, prefill_ids, own_prompts, cfg.seed, allocated)
        models[label] = dict(
            name=name, same_tokenizer=same, parameters=parameters,
            disk=disk_bytes(name, parameters, dtype), layers=layers, bins=bins.tolist(),
            curves=losses[label], **trial,
        )
        models[label]["own"] = score_own_texts(   # optional: on_policy
            cfg, root, teacher if same else None, tokenizer, rows)
        del root   # before the next one is read

    if RANK == 0:
        sizes = counted_bytes(rows, tokenizer)
        setting = dict(
            dataset=cfg.dataset, sequences=len(rows), bytes=sum(sizes), ranks=WORLD,
            device=DEVICE.type, dtype=str(dtype).removeprefix("torch."),
            temperature=cfg.temperature, prefill=list(prefill_ids.shape),
            own_texts=f"{cfg.divergence}, {cfg.max_new_tokens} tokens",   # optional: on_policy
        )
        with progress("writing the report"):
            compute_metrics(models, tables, np.array(sizes), cfg.seed)
            if not cfg.generate_comparisons:
                prompts = []
            summary = write_report(cfg.output_dir, setting, models, prompts)
        print0(summary)


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
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if RANK > 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()
    try:
        with process_group(), contextlib.ExitStack() as stack:
            if not (cfg.dry_run or cfg.mode == "cache"):   # which marks its cache_dir
                stack.enter_context(claim(cfg.output_dir, cfg.mode))
            choose_mode(cfg)(cfg)
        return 0
    except UserError as e:
        return explain(cfg, e, f"{e}")
    except torch.OutOfMemoryError as e:
        return explain(cfg, e, f"rank {RANK} ran out of memory; turn {MEMORY_ADVICE}")
    except OSError as e:   # a full disk, or one that went away
        return explain(cfg, e, f"{one_line(e, 300)}; what was finished stays, the same command "
                       "goes on")
    except KeyboardInterrupt:   # before there was anything to save
        return 130
    except Exception:   # a bug; or another rank's, and what broke here is the connection to it
        if first_to_fail():
            traceback.print_exc()
        return 1


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


def explain(cfg, error, words):
    """One `error:` line, once for all ranks -> the exit code. The traceback goes to
    output_dir/error.log, or to the terminal with --debug."""
    folder = Path(cfg.output_dir)
    if first_to_fail():
        print(f"error: {words}", file=sys.stderr)
        if cfg.debug:
            traceback.print_exception(error)
        elif (folder / MARK).exists():
            with contextlib.suppress(OSError), open(folder / "error.log", "a") as f:
                traceback.print_exception(error, file=f)
    return 2


if __name__ == "__main__":
    code = run_config(CONFIG)
    if WORLD > 1:   # an orderly end would wait for ranks that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
