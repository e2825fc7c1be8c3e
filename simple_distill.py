#!/usr/bin/env python
"""Distil a large language model into a small one: the whole trainer, to be read and changed.

    python simple_distill.py   # no download, no GPU   # optional: demo
    python simple_distill.py --teacher T --student S --dataset D              # online distillation
    python simple_distill.py --mode cache --teacher T --dataset D --cache_dir C   # optional: cache
    python simple_distill.py --student S --cache_dir C   # ... then from disk   # optional: cache
    python simple_distill.py --teacher T --student S --teacher_url U   # optional: served
    python simple_distill.py --teacher T --student S --dataset D --blockwise   # optional: blockwise
    python simple_distill.py --teacher T --student S --on_policy 0.5   # optional: on_policy
    python simple_distill.py --mode generate --api_model M   # optional: generate
    python simple_distill.py --mode eval --student out/final --teacher T   # optional: eval
    ./launch.sh ...                                           # the same on many devices

First the core, which every fork needs: Runtime, Losses, Data, Models and FSDP, Optimiser,
Checkpoints, Train. Whoever wants to understand or change plain distillation can stop there. Then
the optional chapters, each of which can be deleted (README, "Changing it"). The knobs are
config.py's.

Shapes, as suffixes: B sequences, T positions, N counted tokens, C those of a chunk, D width, V
vocabulary, K kept teacher entries a token.
"""
import ast   # optional: generate
import asyncio   # optional: generate
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import glob
import hashlib
import importlib   # optional: generate
import inspect   # optional: demo
import itertools
import json
import math
import operator
import os
import random   # optional: generate
import re
import resource
import shlex   # optional: cache
import shutil
import signal
import socket
import sys
import sysconfig   # optional: demo generate
import tempfile
import textwrap   # optional: generate
import time
import traceback
import warnings   # optional: generate
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional
from unittest.mock import patch

from config import (
    Config,
    UserError,
    demo_knobs,   # optional: demo
    knobs_of,
    one_line,
    parse_multipliers,
    parse_or_exit,
    result_knobs,
)

if __name__ == "__main__":   # --help and a typo are answered before the slow imports below
    CONFIG = parse_or_exit(sys.argv[1:])
    ON_INTERRUPT = signal.signal(signal.SIGINT, signal.SIG_DFL)   # in those: a quiet end

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
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if CUDA else "cpu")
HOST = None    # the group of all ranks' hosts, beside that of their devices: see process_group
STORE = None   # what a rank says there every other rank can read, without a collective


class Suppress(contextlib.suppress, contextlib.ContextDecorator):
    """Around a function. Whoever reads what it writes may go away (`| tee`, a closed terminal): the
    run goes on, and saves."""


@Suppress(OSError)
def print0(*words):
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))   # a line never tears the bar


class Bar(tqdm):
    display = Suppress(OSError)(tqdm.display)
    close = Suppress(OSError)(tqdm.close)


@contextlib.contextmanager
def phase(doing):
    """Around each thing that is done before the first step: says so, and whatever goes wrong in it
    becomes one `error:` line (its traceback goes to error.log). Later on an exception is a bug, but
    for disks and memory."""
    print0(f"{doing} ...")
    try:
        yield
    except (UserError, torch.OutOfMemoryError):   # of an inner phase, or in words of our own
        raise
    except Exception as e:
        reason = one_line(e, 600)
        if e.__cause__:   # a reader's own message, which `datasets` hides behind another
            reason += f" ({one_line(e.__cause__, 600)})"
        raise UserError(f"while {doing}: {reason}") from e


# ---- ranks


@contextlib.contextmanager
def process_group():
    """gloo beside NCCL: counts and flags travel between hosts without making the GPU wait. There
    ranks wait, for hours if need be, for one that downloads or tokenises; in a collective on GPUs
    whoever waits for a quarter of an hour waits for a rank that is gone."""
    global HOST, STORE
    patience = dict(timeout=datetime.timedelta(minutes=15))
    STORE = dist.HashStore()   # alone, without opening a port
    address = os.environ.get("MASTER_ADDR", "localhost")
    with phase(f"starting rank {RANK} of {WORLD}, which meet at {address}"):
        if CUDA:
            torch.cuda.set_device(DEVICE)
            torch.set_float32_matmul_precision("high")   # TF32
        else:
            keep_freed_memory()
        if not RANK < WORLD:   # it would wait for a rank 0
            raise UserError(f"there is no rank {RANK} of {WORLD}: see RANK and WORLD_SIZE")
        if os.environ.keys() & {"RANK", "WORLD_SIZE"}:
            # at once; the rendezvous asks for a quarter of an hour
            socket.getaddrinfo(address, None)
            STORE = next(rendezvous("env://", **patience))[0]
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
    except RuntimeError:   # the store is gone: another rank was first
        return False


def keep_freed_memory():
    """By default glibc gives large blocks back at once, and page-faults them in anew for the next
    tensor: a quarter of a step's time on a CPU."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)            # M_MMAP_MAX, as malloc.h numbers it
        libc.mallopt(-1, 2**31 - 1)    # M_TRIM_THRESHOLD


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
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:16]


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
    # eval writes its report there too
    "train": "config.json log.jsonl checkpoints final report.md report.json report.png",
    "cache": "config.json manifest.json index.json tokenizer",   # optional: cache
    "generate": (   # optional: generate
        "config.json replies.jsonl train.jsonl rejected.jsonl summary.json"),
    "demo": "corpus tokenizer student teacher teacher-shape",   # optional: demo
}


@contextlib.contextmanager
def claim(folder, mode, wait=False):
    """Makes a folder ours for as long as this lasts: what stands there under our names may be
    replaced. One run a folder; wait: until another one is done. The kernel drops the lock with its
    process."""
    words = f"{mode} {from_rank0(time.time_ns())}"
    with contextlib.ExitStack() as stack:
        with phase(f"making sure that no other run is at work in {folder}"):
            if RANK == 0:   # a second handle of this process, closed, would drop the lock
                file = stack.enter_context(mark_folder(folder, mode))
                fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(words)
                file.flush()
                os.fsync(file)   # a shared disk shows it to whoever opens it from here on
            all_sum(0)
            # a node's own disk under that name would get checkpoints without a part
            mark = Path(folder, MARK)
            if RANK > 0 and not (mark.exists() and mark.read_text() == words):
                raise UserError(f"rank {RANK} does not see what rank 0 writes in {folder!r}: it "
                                "has to lie on a disk that all share")
        yield


def mark_folder(folder, mode):
    """-> the mark of a folder, open. Refused: one without a mark that holds a name which this mode
    writes, and one of another mode."""
    path = Path(folder, MARK)
    os.makedirs(folder, exist_ok=True)
    taken = [name for name in WRITES[mode].split() if Path(folder, name).exists()]
    if taken and not path.exists():
        raise UserError(f"{folder!r} holds {taken[0]!r} and no {MARK}: it is not ours, or of a "
                        f"version before; choose another, or have its files replaced: touch {path}")
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
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:   # as under nohup
                before = signal.signal(number, lambda *_: stop_requests.append(1))
                stack.callback(signal.signal, number, before)
        yield stop_requests


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


class SparseTarget(NamedTuple):   # optional: cache
    """A teacher from the cache: some tokens with their probabilities, all others as one bucket."""
    ids: torch.Tensor       # [N, K] distinct in a row; repeated where rest is 0: their probs add up
    probs: torch.Tensor     # [N, K]
    rest: torch.Tensor      # [N] mass not listed: 0 for method sample, complete in expectation
    entropy: torch.Tensor   # [N] of the distribution that KL is measured to


def tokens_of(target, where):
    """The same tokens of a DenseTarget, of a SparseTarget or of None."""
    if isinstance(target, SparseTarget):   # optional: cache
        return SparseTarget(*[tensor[where] for tensor in target])
    return target and target._replace(hidden=target.hidden[where])


def as_head(head):
    """nn.Linear, or what else has its attributes -> Head."""
    return head if isinstance(head, Head) else Head(head.weight, head.bias)


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
        z.div_(temperature)
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


def sparse_kl_terms(   # optional: cache
        z, p, total, target, p_weight_from_ce, kl_weight):
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
    kl = -(q * listed_logp).sum(-1) - entropy - rest * rest_p.log()
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
    elif isinstance(target, SparseTarget):   # optional: cache
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
        grad.add_(is_label_CV, alpha=-alpha)
    else:
        grad.scatter_add_(-1, labels_C1, grad.new_full(labels_C1.shape, -alpha))
    if student_scaling != (1.0, None):
        grad.mul_(slope)
    return ce, kl * temperature ** 2, grad.to(student_CV.dtype)


@functools.cache   # so that nothing is compiled twice
def chunk_kernel(worth_compiling, **options):
    """chunk_terms with its options fixed, compiled where that pays and can be done: it takes about
    10 s once, and a C++ compiler on CPU, Triton on CUDA."""
    eager = functools.partial(chunk_terms, **options)
    if not worth_compiling:
        return eager
    compiled = torch.compile(eager)

    def run(*inputs):
        nonlocal compiled
        for tensor in torch.utils._pytree.tree_leaves(inputs):
            if tensor is not None:   # one compilation for any number of tokens
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            print0(f"loss: no working compiler ({type(e).__name__}), its element-wise part runs "
                   "eagerly, slower and with more memory")
            compiled = eager
            return eager(*inputs)

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
        sums = hidden_ND.new_zeros(2, dtype=torch.float64)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD = hidden_ND[part]
            target = tokens_of(teacher, part)
            if isinstance(target, DenseTarget):
                target = raw_logits(*target, vocab)
            ce_C, kl_C, grad_CV = kernel(raw_logits(h_CD, student, vocab), labels_N[part], target)
            del target   # [C, V]: its memory is wanted below
            sums += torch.stack([ce_C, kl_C]).sum(1, dtype=torch.float64)
            if need_bias:
                grad_bias[:vocab] += grad_CV.sum(0, dtype=exact)
            if need_hidden:
                torch.mm(grad_CV, weight_VD[:vocab], out=grad_hidden[part])
            if need_weight:
                add_product(grad_weight[:vocab], grad_CV.T, h_CD)
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtype = hidden_ND.dtype
        ce, kl = sums.to(exact)
        ctx.mark_non_differentiable(ce, kl)
        return alpha * ce + (1 - alpha) * kl, ce, kl

    @staticmethod
    def backward(ctx, grad_loss, *_):
        scaled = [None] * 10   # an argument of forward; most have none
        for i, grad in enumerate(ctx.grads):
            if grad is not None:
                scaled[i] = torch.mul(
                    grad, grad_loss, out=torch.empty_like(grad, dtype=ctx.dtype))
        return tuple(scaled)


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
    teacher_scaling = None
    if teacher and len(teacher) == 2:   # hidden states and head
        teacher = DenseTarget(teacher[0], as_head(teacher[1]))
        teacher_scaling = teacher.head[2:]
        vocab = len(teacher.head.weight[:vocab])
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
    chunk = chunk or chunk_size(device, student_hidden.element_size(), len(student.weight))
    kernel = chunk_kernel(
        vocab >= COMPILED_VOCAB, alpha=alpha, temperature=temperature, divergence=divergence,
        student_scaling=student[2:], teacher_scaling=teacher_scaling)
    sums = FusedDistillation.apply(
        student_hidden, *student[:2], labels.to(device, non_blocking=True), teacher, kernel, alpha,
        chunk, vocab, torch.is_grad_enabled())
    return [value / denominator for value in sums]


# --------------------------------------------------------------------------------------------------
# Data: any dataset -> rows of token ids (and which of them are targets) -> global batches that do
# not depend on the number of ranks. Hands on load_data (rows that can be indexed) and Batch.


# ---- tokenizers


def load_tokenizer(cfg, *candidates):
    """That of the first candidate that may have one, or is --tokenizer, else None. A folder shows
    it; layers:N, a config .json and demo (no name was given) have none."""
    for name in filter(None, candidates):
        may_have_one = not re.fullmatch(r"demo|layers:.*|.*\.json", name)
        if os.path.isdir(name):
            may_have_one = any(Path(name).glob("tokenizer*"))
        if may_have_one or name == cfg.tokenizer:
            with phase(f"reading the tokenizer of {name}"):
                return AutoTokenizer.from_pretrained(
                    name, trust_remote_code=cfg.trust_remote_code)


def compare_tokenizers(student, teacher, student_name, teacher_name):
    """By what they encode, not by size: an id that both use must mean the same token."""
    ours = student.get_vocab()
    theirs = dict(map(reversed, teacher.get_vocab().items()))   # id -> token
    problems = [f"token {i} is {token!r} in one, {theirs[i]!r} in the other"
                for i, token in sorted(zip(ours.values(), ours)) if theirs.get(i, token) != token]
    probe = "def f(x):\n    return x+1  # Größe 12345 résumé 日本"
    if student(probe)["input_ids"] != teacher(probe)["input_ids"]:
        problems.append("they cut text differently")
    if problems:
        raise UserError(
            f"student {student_name!r} and teacher {teacher_name!r} have different tokenizers: "
            f"{problems[0]}. Distil within one, or train on text of the teacher's (--alpha 1)")


def vocabulary_of(tokenizer):
    """How many ids it has: what a head has beyond them is padding."""
    return max(tokenizer.get_vocab().values()) + 1


# ---- datasets: raw rows of text or conversations


def load_data(cfg, tokenizer):
    """-> train rows, eval rows, which can be indexed. A row is {"input_ids": [...], "targets":
    which of them are, "starts": where each of its documents begins}."""
    if not tokenizer:
        raise UserError(f"neither student {cfg.student!r} nor teacher {cfg.teacher!r} has a "
                        "tokenizer; name one with --tokenizer")
    if cfg.streaming:   # optional: streaming
        return load_stream(cfg, tokenizer)
    with phase(f"reading dataset {cfg.dataset}"), node_first():
        train_raw, eval_raw = read_raw(cfg)
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
    elif len(rows) > 1:   # of one long document
        rows, eval_rows = hold_out_rows(rows, cfg.eval_samples)
    else:
        raise UserError(f"dataset {cfg.dataset!r} is a single sequence of {cfg.seq_len} tokens or "
                        "less; nothing is left to evaluate on: bring more text or lower --seq_len")
    if cfg.packing == "documents":   # a held-out document stands alone
        rows = PackedRows(rows, cfg.seq_len)
    return rows, take_first(eval_rows, cfg.eval_samples)


def take_first(rows, count):
    """All where there are less, or where count is None."""
    return rows.select(range(len(rows))[:count])


FILE_KINDS = {   # ending -> the reader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read_raw(cfg, streaming=False):
    """A file, a save_to_disk folder or a hub dataset -> raw rows of train, raw rows of eval; None
    where a slice of train has to do."""
    path = Path(cfg.dataset)
    kind = FILE_KINDS.get(path.suffix.lower())
    options = {"sample_by": "paragraph"} if kind == "text" else {}   # a blank line ends one

    def read(split):
        if (path / "dataset_dict.json").exists():   # of save_to_disk
            return datasets.load_from_disk(path)[split]
        if (path / "state.json").exists():   # the same, saved without splits
            return {"train": datasets.load_from_disk(path)}[split]
        return datasets.load_dataset(   # a name would be taken for a pattern
            kind or cfg.dataset, cfg.dataset_config, data_files=kind and glob.escape(cfg.dataset),
            split=split, streaming=streaming, **options)

    eval_raw = None
    if cfg.eval_split != cfg.train_split:
        try:
            eval_raw = read(cfg.eval_split)
        except (KeyError, ValueError):
            if cfg.eval_split != Config.eval_split:   # where only the default is absent, no harm
                raise
    return read(cfg.train_split), eval_raw


def hold_out_rows(rows, eval_samples):
    """-> the rows to train on, and evenly spaced ones to evaluate on: a twentieth, or about
    eval_samples where that is less, but at least one."""
    count = len(rows)
    gap = count // min(eval_samples, max(1, count // 20))
    # arrays: select makes a fingerprint of them, a generator has none that another run finds again
    numbers = np.arange(count)
    held_out = numbers[gap - 1::gap]
    return rows.select(np.delete(numbers, held_out)), rows.select(held_out)


def teacher_layer(i, depth, teacher_depth):   # optional: blockwise eval
    """The layer of a teacher that stands as deep in it as layer i of a student in that."""
    return round((i + 1) * teacher_depth / depth) - 1


def stdlib_sources():   # optional: demo generate
    """(name, text) of every module of Python's own library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = set("test tests idlelib idle_test lib2to3 site-packages dist-packages turtledemo "
                  "pydoc_data".split())
    # of each folder first its files, then its folders
    for path in sorted(root.rglob("*.py"), key=lambda path: (path.parent.parts, path.name)):
        name = path.relative_to(root)
        if not skipped & set(name.parts) and not path.name.startswith("_sysconfigdata"):
            yield str(name), path.read_text(encoding="utf-8", errors="ignore")


# ---- rows of token ids, kept in the datasets cache

def tokenize(cfg, raw, tokenizer, split):
    """Raw rows -> token rows on disk: the same rows are not tokenised twice."""
    encode = row_encoder(cfg, tokenizer)

    def encode_from(starts):   # the same thousand rows together, whoever takes them
        for start in starts:
            yield from encode(rows_from_columns(raw[start:start + ROWS_AT_ONCE]))

    def sums():
        return {str(path): checksum(path) for path in folder.rglob("*.arrow")}

    fingerprint = fingerprint_rows(raw, encode)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "simple_distill", fingerprint)
    with phase(f"tokenising {split}"), node_first():
        written = read_json(folder / "sums.json")
        if written and written != sums():   # half a file, as a full disk leaves it
            print0(f"{folder} is damaged, and made anew")
            shutil.rmtree(folder)
            written = None
        rows, dropped = kept_rows(datasets.Dataset.from_generator(
            encode_from, FEATURES, cache_dir=str(folder), num_proc=cfg.num_proc,
            fingerprint=fingerprint,
            gen_kwargs={"starts": list(range(0, len(raw), ROWS_AT_ONCE))}))
        if not written:
            write_json(sums(), folder / "sums.json")
    reasons = dict(dropped.most_common(5))
    if not rows:
        raise UserError(f"{split}: none of the {len(raw)} rows of {cfg.dataset!r} has a target "
                        f"token: {reasons}")
    if dropped:
        print0(f"{split}: of {len(raw)} raw rows dropped {dropped.total()}: {reasons}")
    return rows


def kept_rows(rows):
    """-> token rows less those that were dropped, and a Counter of why they were."""
    reasons = rows["dropped"][:]
    rows = rows.select(np.flatnonzero(np.array(reasons) == "")).remove_columns("dropped")
    return rows.with_format("numpy"), collections.Counter(filter(None, reasons))


def fingerprint_rows(raw, encode):
    """Of all that shapes token rows: the tokenizer as it would be saved, and the code, so that a
    fork that edits it gets what it wrote and not what an older version left in the cache."""
    tokenizer, *options = encode.args
    with tempfile.TemporaryDirectory() as folder:
        saved = [checksum(Path(path)) for path in tokenizer.save_pretrained(folder)]
    code = Path(__file__).read_text(encoding="utf-8").split(
        "\n# ---- between raw rows and token rows")[1]
    return digest(raw._fingerprint, saved, code, options)


def row_encoder(cfg, tokenizer):
    """-> a function of raw rows alone."""
    return functools.partial(encode_rows, tokenizer, cfg.text_column, cfg.seq_len, cfg.packing)


def encode_window(cfg, tokenizer, raw_rows):   # optional: streaming cache
    """Some raw rows of a stream, packed on their own -> token rows, maybe none, and a Counter of
    why others were dropped."""
    encoded = row_encoder(cfg, tokenizer)(raw_rows)
    columns = {name: [row.get(name) for row in encoded] for name in FEATURES}
    rows, dropped = kept_rows(datasets.Dataset.from_dict(columns, features=FEATURES))
    if cfg.packing == "documents":
        rows = PackedRows(rows, cfg.seq_len)
    return rows, dropped


# ---- between raw rows and token rows: this text is part of the fingerprint of the latter

FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")),
    targets=datasets.List(datasets.Value("bool")),
    starts=datasets.List(datasets.Value("int32")),
    dropped=datasets.Value("string"))   # why; "": it is not
ROWS_AT_ONCE = 1000   # texts among them are joined, however many processes share the work


def encode_rows(tokenizer, text_column, seq_len, packing, raw_rows):
    """Raw rows -> token rows: first those that are dropped, which only say why; then the
    conversations, one a row, then the texts, joined in blocks or each in rows of its own."""
    encode_chat = chat_encoder(tokenizer, seq_len)
    encoded = []
    texts = []
    rows = []
    for row in raw_rows:
        try:
            conversation = packing != "blocks" and conversation_of(row)
            if conversation:
                encoded.append(encode_chat(conversation))
            else:   # an empty one is read as well, and says nothing
                texts += filter(None, [text_of(row[text_column] or "")])
        except Exception as e:   # whatever is strange about it, or not to the template's liking
            rows.append(dict(dropped=f"{one_line(e)} among {', '.join(row)}"[:300]))
    if texts:   # a tokenizer takes no empty list
        encoded += encode_texts(texts, tokenizer, seq_len, packing in ("auto", "blocks"))
    for ids, targets in encoded:
        targets = [False, *targets[1:]]   # the first is predicted from nothing
        rows.append(dict(
            input_ids=ids, targets=targets, starts=[0],
            dropped="" if any(targets) else f"no target in {seq_len} tokens"))
    return rows


def rows_from_columns(columns):
    """{"a": [1, 2], "b": [3, 4]} -> [{"a": 1, "b": 3}, {"a": 2, "b": 4}]"""
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def bos_of(tokenizer):
    """[the id that this tokenizer puts before every text], or []. A model that learned with it
    (Gemma, Llama) is lost without."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode_texts(texts, tokenizer, seq_len, join):
    """-> [(ids, which are targets)]. Each text ends with EOS. Joined, or each by itself, they are
    cut into blocks of seq_len; the last one may be shorter. A BOS begins each block, not each text:
    so it is predicted nowhere."""
    begin = bos_of(tokenizer)
    end = tokenizer.eos_token or ""
    room = seq_len - len(begin)
    documents = tokenizer([text.removesuffix(end) + end for text in texts], verbose=False,
                          add_special_tokens=False)["input_ids"]
    if join:
        documents = [list(itertools.chain(*documents))]
    blocks = [begin + ids[i:i + room] for ids in documents for i in range(0, len(ids), room)]
    return [(block, [True] * len(block)) for block in blocks]


# The text of a conversation where a tokenizer has no chat template of its own.
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.content }}"
                  "{{ eos_token or '\n' if m.role == 'assistant' else '\n' }}{% endfor %}")


def chat_encoder(tokenizer, seq_len):
    """-> a function of a conversation: its first ids, which are targets. These are of what the
    assistant's messages add to its text, with the end mark that follows: all that comes after the
    prompt, be it an answer, a thought or a call of a tool."""
    write = functools.partial(
        tokenizer.apply_chat_template, tokenize=False,
        chat_template=tokenizer.chat_template or PLAIN_TEMPLATE)
    marks = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values()
             if token.special]
    marks.sort(reverse=True)   # one may begin with another, which comes first then
    end_mark = re.compile(rf"(\s*({'|'.join(marks) or '(?!)'}))?")
    question = [{"role": "user", "content": "x"}]
    prompt = ""   # what it writes to have the assistant speak next
    with contextlib.suppress(Exception):   # not without a system role, or so
        asking = write(question, add_generation_prompt=True)
        prompt = asking[difference(asking, write(question))[0]:]

    def encode_chat(messages):
        text = write(messages)
        spans = [(0, 0)]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = find_turn(i, messages, text, write)
            if start == end and not message["content"]:
                continue   # nor anything else that the template knows
            # what all messages of the assistant begin with, such as <think>, is no difference
            header = text.rfind(prompt, spans[-1][1], start)
            if header >= 0:
                start = header + len(prompt)
            spans.append((start, end_mark.match(text, end).end()))
        # a template has written the special tokens already
        encoded = tokenizer(text, verbose=False, return_offsets_mapping=True,
                            add_special_tokens=not tokenizer.chat_template)
        return encoded["input_ids"][:seq_len], [
            any(first < end and start < last for start, end in spans)
            for first, last in encoded["offset_mapping"][:seq_len]]

    return encode_chat


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
    start = len(os.path.commonprefix([text, other]))
    ends = [text[start:][::-1], other[start:][::-1]]
    return start, len(text) - len(os.path.commonprefix(ends))


# Pairs of columns that are a conversation: what the user says, what the assistant answers, each a
# string or a list of messages. To read another format, add its pair here; anything else that is
# not of this kind belongs into conversation_of.
CONVERSATIONS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),   # Alpaca's; what a row has as `input` follows the instruction
)


def conversation_of(row):
    """A raw row -> [{"role": ..., "content": ..., ...}, ...], or None for plain text."""
    messages = row.get("messages") or row.get("conversations")
    if isinstance(messages, list):
        return list(map(message_of, messages))
    for columns in CONVERSATIONS:
        said = [row.get(column) for column in columns]
        if None in said:
            continue
        if "instruction" in columns and row.get("input"):
            said[0] = f"{said[0]}\n\n{row['input']}"
        turns = []
        for role, content in zip(("user", "assistant"), said):
            turns += content if isinstance(content, list) else [dict(role=role, content=content)]
        return list(map(message_of, turns))


def message_of(turn):
    """With a role, and a content that is text. ShareGPT has `from` and `value` for them."""
    message = json.loads(json.dumps(turn, default=str), object_hook=without_nulls)
    if "role" not in message:
        sender = message["from"]
        message = {"role": {"human": "user", "gpt": "assistant"}.get(sender, sender),
                   "content": message["value"]}
    calls = message.pop("tool_calls", None) or []
    if calls:   # some templates ask only whether there is such a list
        message["tool_calls"] = calls
    for call in calls:
        function = call.get("function", call)
        with contextlib.suppress(Exception):   # an object, as templates expect; APIs give its JSON
            function["arguments"] = json.loads(function["arguments"])
    message["content"] = text_of(message.get("content", ""))
    return message


def without_nulls(fields):
    """A table gives every message the fields of all others, as nulls; templates take those for
    something."""
    return {name: value for name, value in fields.items() if value is not None}


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
            self.members += [start + np.array(row) for row in
                             fit_into_rows(lengths[start:][:10_000], seq_len)]

    def __len__(self):
        return len(self.members)

    def __getitem__(self, i):
        return packed_row(self.documents[self.members[i]])   # at once: one look into the file


def packed_row(documents):
    """documents: columns. Each begins with a token that is no target: it would be predicted from
    another document."""
    return {"input_ids": np.concatenate(documents["input_ids"]),
            "targets": np.concatenate(documents["targets"]),
            "starts": np.cumsum([0, *map(len, documents["input_ids"])])[:-1]}


def fit_into_rows(lengths, seq_len):
    """-> the numbers of the documents in each row: the longest first, each where it leaves the
    least room. Rows, and what is in them, stand in the order of the documents."""
    # (room left, the row), in rising order; more than are needed: the others stay empty
    free = [(seq_len, []) for _ in lengths]
    for i in np.argsort(-lengths, kind="stable"):
        room, row = free.pop(bisect.bisect_left(free, (lengths[i],)))
        row.append(i)
        bisect.insort(free, (room - lengths[i], row))
    return sorted(sorted(row) for _, row in free if row)


def row_lengths(rows):
    """In tokens, of a dataset of token rows."""
    return np.array([len(ids) for part in rows.select_columns("input_ids").iter(1000)
                     for ids in part["input_ids"]])


def count_rows(rows):
    """One look at all token rows -> {rows, tokens, targets, biggest (id), digest}; None of a stream
    or a cache, which nobody reads in advance."""
    documents = getattr(rows, "documents", rows)   # of PackedRows
    if not isinstance(documents, datasets.Dataset):
        return None
    tokens = targets = biggest = crc = 0
    for part in documents.iter(1000):
        row = packed_row(part)
        for values in row.values():
            crc = zlib.crc32(values, crc)
        tokens += len(row["input_ids"])
        targets += int(row["targets"].sum())
        biggest = max(biggest, int(row["input_ids"].max()))
    return dict(rows=len(rows), tokens=tokens, targets=targets, biggest=biggest, digest=crc)


# ---- batches


@dataclass
class Batch:
    """A micro-batch of one rank: B sequences, T positions, N counted tokens. Labels stay on the
    host until the loss takes them, so that nothing waits for the GPU to count them."""
    rows: list                # the token rows it is made of
    input_ids: torch.Tensor   # [B, T], padded on the right: under a causal mask no token sees it
    positions: torch.Tensor   # [N] of the counted tokens in the flattened batch
    labels: torch.Tensor      # [N] their next tokens, on the host
    real: torch.Tensor        # those of all tokens but padding: where block-wise compares states
    # of the counted tokens, when training from a cache   # optional: cache
    sparse: Optional[SparseTarget] = None   # optional: cache
    # [B, T] where rows hold several documents: they restart at each, which keeps attention within
    # it (see hidden_states). None: 0, 1, 2, ...
    position_ids: Any = None
    by_student: bool = False  # whether it wrote them: no labels then   # optional: on_policy


def collate(rows):
    """Token rows -> Batch. A position counts where its *next* token, its label, is a target: so the
    one before a target, as no row begins with one."""
    tables = []   # of each token: its id, is it a target, its place in its document: 1, 2, ...
    for row in rows:
        places = np.arange(len(row["input_ids"]))
        for start in row["starts"]:
            places[start:] -= places[start] - 1
        tables.append(torch.tensor(np.stack([row["input_ids"], row["targets"], places], 1)))
    # a rank for whom no row is left takes part all the same, with padding: its place is 0
    ids_BT, targets_BT, places_BT = pad_sequence(
        tables or [torch.zeros(2, 3).long()]).permute(2, 1, 0).contiguous()
    batch = Batch(
        rows=rows, input_ids=to_device(ids_BT),
        positions=to_device(targets_BT.flatten().nonzero().flatten() - 1),
        labels=pin(ids_BT[targets_BT > 0]),
        real=to_device(places_BT.flatten().nonzero().flatten()))
    if any(len(row["starts"]) > 1 for row in rows):
        batch.position_ids = to_device((places_BT - 1).clamp(0))
    if rows and "sparse" in rows[0]:   # optional: cache
        batch.sparse = SparseTarget(*[
            to_device(torch.from_numpy(np.concatenate(arrays)))
            for arrays in zip(*[row["sparse"] for row in rows])])
    return batch


def pin(tensor):
    """Into page-locked memory: from there a copy to the GPU does not make the host wait."""
    return tensor.pin_memory() if CUDA else tensor


def to_device(tensor):
    return pin(tensor).to(DEVICE, non_blocking=True)


@functools.lru_cache(1)
def shuffled(count, seed, part):
    """The numbers below count, in an order that depends on nothing but seed and part: no state."""
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(seed * 1_000_003 + part))


def batch_of_step(count, seed, global_batch, step):
    """-> numbers of the rows, of count, in a global batch. The position *is* the step: a resume
    needs no other state, and has nothing to replay."""
    epoch, place = divmod(step, math.ceil(count / global_batch))
    return shuffled(count, seed, epoch)[place * global_batch:][:global_batch].tolist()


def micro_batches(run, rows, step=None):
    """This rank's rows of a step -> a Batch a micro-step, the last ones maybe without any row.
    step: for which they are read ahead."""
    if run.server:   # optional: served
        wanted = True
        if step is not None and student_writes(run.cfg, step):   # optional: on_policy
            wanted = False   # it takes their prompts alone (and a server has no blocks before)
        if wanted:
            rows = with_answers(*run.server, rows)
    return [collate(rows[start:start + run.batch_size])
            for start in range(0, run.micro_steps * run.batch_size, run.batch_size)]


def prefetch(endless):
    """Run a generator in a thread, two items ahead: the next batch is ready while this one
    computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(next, endless) for _ in range(2)]
        while True:
            ahead.append(pool.submit(next, endless))
            yield ahead.pop(0).result()


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
    has_bf16 = CUDA and torch.cuda.is_bf16_supported(including_emulation=False)
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return named.get(cfg.dtype, torch.bfloat16 if has_bf16 else torch.float32)


# ---- loading


def load_checked(cfg, role, tokenizer):
    """A model that computes what this trainer believes it computes -> root, identity."""
    name = getattr(cfg, role)
    with phase(f"reading {role} {name}"):
        root, identity = load_model(cfg, role)
        check_model(root, f"{role} {name!r}", cfg.seq_len, cfg.packing == "documents")
    if role == "teacher":
        theirs = load_tokenizer(cfg, name)
        if theirs is not None:
            compare_tokenizers(tokenizer, theirs, cfg.tokenizer or cfg.student, name)
    return root, identity


def load_model(cfg, role):
    """student: weights in fp32, spread as --fsdp says; layers and head compute in compute_dtype.
    teacher: frozen, its weights in the type that it computes in. -> root, identity of weights."""
    learns = role == "student"
    cut = re.fullmatch(r"layers:(\d+)", getattr(cfg, role))
    name = cfg.teacher if cut else getattr(cfg, role)
    config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    if learns:   # loaded in full it would still say so
        refuse_quantised(config)
    kept_layers = None
    if cut:
        config, kept_layers = cut_layers(config, int(cut[1]))
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
        # its newer name, and its older one
        getattr(root.model, "activation_checkpointing_enable",
                root.model.gradient_checkpointing_enable)({"use_reentrant": False})
        # transformers makes the embeddings ask for gradients; frozen layers would be recomputed
        root.model.disable_input_require_grads()
    if cfg.compile:
        compile_layers(root.model)
    if learns or cfg.cpu_offload or (cfg.shard_teacher and WORLD > 1):
        shard(root, cfg.fsdp if learns else "full_shard", computes_in, cfg.cpu_offload)
    source = RANK == 0 and make_root(read_model(name, config, kept_layers, cfg.seed, options))
    load_weights(root, source, cfg.cpu_offload)
    # what ends a text may stand in a file of its own
    root.model.generation_config.eos_token_id = from_rank0(
        source and source.model.generation_config.eos_token_id)
    return root, from_rank0(source and identity_of(source))


def read_model(name, config, kept_layers, seed, options):
    """A whole model on the host, memory-mapped until it is cast; a config alone (.json) makes
    random weights. kept_layers: the decoder layers that stay, by number; None: all."""
    if name.endswith(".json"):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **options)
    model, info = AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    refuse_quantised(model.config)
    # transformers would fill them with random numbers
    wrong = sorted(map(str, info["missing_keys"] | info["mismatched_keys"]))
    if wrong:
        raise UserError(f"{name!r} lacks weights, or has them in other shapes than its config: "
                        f"{wrong[0]} among {len(wrong)}; is it whole?")
    if kept_layers:
        path, layers = layers_of(model)
        model.set_submodule(path, nn.ModuleList(layers[i] for i in kept_layers))
    return model


def refuse_quantised(config):
    """Codes are no weights, and would be taken for them."""
    if getattr(config, "quantization_config", None):
        raise ValueError("it is quantised; take a dequantised copy (or, of a teacher, serve it)")


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


def compile_layers(model):
    # a layer that recomputes and has nothing below it to train is refused by this pass (torch 2.13)
    with contextlib.suppress(AttributeError):   # not every torch has it
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
    shape = shapes.get(fsdp, (WORLD,))
    options = dict(
        mesh=init_device_mesh(
            DEVICE.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):]),
        mp_policy=MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False))
    if cpu_offload and CUDA:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in layers_of(root.model)[1]:   # dropped: gathered anew in the backward
        fully_shard(layer, reshard_after_forward=fsdp in REDUCE_EACH, **options)
    fully_shard(root, reshard_after_forward=False, **options)


@torch.no_grad()
def load_weights(root, source, cpu_offload):
    """The tensors of rank 0's source into everybody's shards, one at a time: no other rank ever
    holds a whole model. source is False on the other ranks."""
    all_sum(0)   # rank 0 may have read for an hour, which no GPU waits for
    root.to_empty(device="cpu" if cpu_offload else DEVICE)
    for buffer in root.buffers():   # FSDP's offloading leaves them where they are
        buffer.data = buffer.data.to(DEVICE)
    if not isinstance(root, FSDPModule):   # which keeps ties by itself
        root.model.tie_weights()   # to_empty broke them
    # buffers too: those that are not persistent (of RoPE) are in no state dict
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        if source:   # layers:N fails here where layers differ by number (dense ones, mixtures)
            whole.copy_(operator.attrgetter(name)(source))
        copy_from_rank0(tensor, whole)


def copy_from_rank0(tensor, whole):
    """Fill a tensor, of which this rank may hold a shard, from rank 0's whole one. Every rank
    brings a whole of the right shape on its device; what is in the others' does not matter."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
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
    model = root.model
    saved = model.state_dict()   # without buffers that are not persistent
    full = {}
    kept_on = "cpu" if RANK == 0 else "meta"   # the other ranks drop each tensor at once
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:   # tied ones once
        if name in saved:
            kept_as = dtype if tensor.is_floating_point() else tensor.dtype
            full[name] = full_tensor(tensor).to(kept_on, kept_as)
    if RANK > 0:
        return
    broken = [name for name, tensor in full.items() if not tensor.isfinite().all()]
    if broken:
        print0(f"WARNING: not all weights of the student are finite: {', '.join(broken)[:300]}")
    aside = Path(f"{path}.tmp")
    shutil.rmtree(aside, ignore_errors=True)   # what a killed run left
    model.save_pretrained(aside, state_dict=full)
    model.config.dtype = dtype   # not that of the weights here
    model.config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    write_json({"checkpoint": checkpoint}, aside / FINAL_MARK)
    sync(*aside.iterdir(), aside)
    if path.exists():
        shutil.rmtree(f"{path}.old", ignore_errors=True)
        path.rename(f"{path}.old")
    aside.rename(path)


# ---- what a model says of a batch: functions that run inside a root


def hidden_states(model, input_ids_BT, position_ids_BT=None):
    """-> [B, T, D] after the final norm, without the head. position_ids restart at each document,
    which keeps attention inside of it.

    Without attention mask and cache transformers looks at the positions whether a row holds several
    documents: a number that the host needs at once, so that it waits for the GPU twice a
    micro-step. We know: without position_ids a row is one document.
    """
    positions = {}
    documents_BT = None   # for each token the number of its document; None: one a row
    if position_ids_BT is not None:
        positions["position_ids"] = position_ids_BT
        steps_BT = torch.diff(position_ids_BT, prepend=position_ids_BT[:, :1] - 1)
        documents_BT = (steps_BT != 1).cumsum(-1)
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda _: documents_BT,
                      create=True):
        return model.base_model(input_ids=input_ids_BT, use_cache=False, **positions)[0]


def counted_hidden(model, batch):
    """-> hidden states of the counted tokens [N, D], and the head to apply to them by chunks."""
    hidden_ND = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)
    return DenseTarget(hidden_ND[batch.positions], head_of(model))


def head_of(model):
    """A new way of scaling logits is added here; check_model tells whether one is missing."""
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None)   # Cohere
             or 1.0 / (getattr(config, "logits_scaling", None) or 1.0))   # Granite
    return Head(output.weight, getattr(output, "bias", None), float(scale),
                getattr(config, "final_logit_softcapping", None))   # Gemma


def head_logits(hidden, head, vocabulary=None):
    """-> logits in fp32, of the first `vocabulary` ids."""
    return scale_and_softcap(raw_logits(hidden, head)[..., :vocabulary], *head[2:])[0]


def distil_loss(model, batch, targets, denominator, **objective):
    """Runs inside the student: -> loss, ce, kl. targets: see teacher_targets."""
    return distillation_loss(*counted_hidden(model, batch), batch.labels, targets,
                             denominator=denominator, **objective)


def teacher_targets(teacher):
    """-> a function batch -> what the loss takes from the teacher: hidden states and head of a
    model, a SparseTarget where rows come from a cache, None at alpha 1."""
    @torch.no_grad()
    def targets_of(batch):
        if teacher:
            return teacher(counted_hidden, batch)
        return batch.sparse   # optional: cache

    return targets_of


# ---- is what we compute with a model what the model computes?


def check_model(root, what, seq_len, packed):
    """Refuse a model that sees later tokens, whose logits head_of does not reproduce, that has no
    seq_len positions or, packed, lets documents see each other. what: role and name."""
    what = f"{what} ({type(root.model).__name__})"
    vocab = root.model.config.get_text_config().vocab_size
    ids_1T = torch.arange(seq_len, device=DEVICE)[None] % vocab
    with phase(f"running {what} on {seq_len} positions"):
        probe(root, f"{what} is no causal language model: its states change with later tokens",
              before_other_tokens, ids_1T)
    probe(root, f"{what}: hidden states times head miss its own logits; is it damaged, does it "
          "need --dtype fp32, or head_of() in simple_distill.py to know its scaling?",
          logits_two_ways, ids_1T[:, :8], allowed=0.05)
    if packed:
        probe(root, f"{what} lets packed documents see each other; use --packing rows or blocks",
              documents_first_and_second, vocab)


def probe(root, what, function, *args, allowed=0.1):
    """function(model, *args) -> states or logits [.., D], got in two ways. Between them lies what
    rounding does, in standard deviations within a token: no more than `allowed` in 16 bits."""
    with evaluating(root):
        got, expected = root(function, *args)
    error = ((got - expected).float().std(-1) / expected.float().std(-1).clamp_min(1e-6)).max()
    if expected.dtype == torch.float32:
        allowed = 1e-3
    if not error <= allowed:   # also nan
        raise UserError(f"{what} (off by {error:.2g}, {allowed:g} is allowed)")


def before_other_tokens(model, ids_1T):
    """The states of the same tokens before this one and before another one."""
    hidden_states(model, ids_1T)   # a table of positions that is too short fails here
    ids_2T = ids_1T[:, :8].repeat(2, 1)
    ids_2T[1, -1] = ids_2T[0, 0]
    return hidden_states(model, ids_2T)[:, :-1]


def logits_two_ways(model, ids_1T):
    """Hidden states times head_of, and the model's own."""
    hidden = hidden_states(model, ids_1T)
    model_logits = model(input_ids=ids_1T, use_cache=False).logits
    return head_logits(hidden, head_of(model)), model_logits.to(hidden.dtype)


def documents_first_and_second(model, vocab):
    """The states of two documents, of 3 and of 5 tokens, that share a row: in one order, and in the
    other. The first in a row sees no other. Two rows: some kinds of attention look at positions
    only where a batch is one row."""
    row_T = torch.arange(8, device=DEVICE)
    rows_2T = torch.stack([row_T, row_T.roll(5)])   # 0 1 2, 3 4 5 6 7 and 3 4 5 6 7, 0 1 2
    states_2TD = hidden_states(model, rows_2T % vocab, rows_2T - 3 * (rows_2T > 2))
    return states_2TD[0], states_2TD[1].roll(3, 0)


# ---- the writer of texts   # optional: on_policy generate eval


def write_texts(   # optional: on_policy generate eval
        root, prompts, seeds, rooms, temperature, ends, vocabulary):
    """-> [ids that the model writes after each prompt, with the end mark]: at most rooms[i] of
    them; at temperature 0 the likeliest, else by random numbers of its own (seeds[i]). What a row
    says depends neither on the rows beside it nor on how many ranks there are. Each rank comes with
    its own prompts, maybe none: all weights are gathered once, so that nothing inside waits for
    another rank (no synced_gpus)."""
    with evaluating(root), gathered(root), torch.compiler.set_stance("force_eager"):
        if not prompts:
            return []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw = functools.partial(draw_ids, generators, temperature, vocabulary)
        written_BN = root(generate_ids, *pad_left(prompts), max(rooms), ends, draw)
    texts = []
    for ids, room in zip(written_BN.tolist(), rooms, strict=True):
        ended = [i for i, token in enumerate(ids, 1) if token in ends]
        texts.append(ids[:min([room, *ended])])
    return texts


def pad_left(prompts):   # optional: on_policy generate eval
    """-> ids, attention mask, both [B, T]: all texts begin in the same column."""
    ids_BT = pad_sequence([torch.as_tensor(ids) for ids in prompts], True, -1, "left").long()
    return to_device(ids_BT.clamp(0)), to_device((ids_BT >= 0).long())


def draw_ids(   # optional: on_policy generate eval
        generators, temperature, vocabulary, _, logits_BV):
    """A logits processor that leaves one id a row, drawn from softmax(logits / temperature): the
    one at which the sum of probabilities passes a number from (0, 1]."""
    logits_BV = logits_BV[:, :vocabulary]   # from there on it is padding
    if temperature == 0:
        return logits_BV
    numbers_B1 = torch.stack([1 - torch.rand(1, generator=generator) for generator in generators])
    sums_BV = (logits_BV / temperature).softmax(-1).cumsum(-1)
    passed_B1 = to_device(numbers_B1) * sums_BV[:, -1:]   # rounding: it is not quite 1
    ids_B1 = torch.searchsorted(sums_BV, passed_B1)
    return torch.zeros_like(sums_BV).scatter_(-1, ids_B1, 1.0)


def generate_ids(   # optional: on_policy generate eval
        model, ids_BT, mask_BT, new, ends, draw):
    """Runs inside a root: -> new ids [B, N]. Rows that have ended are padded."""
    # no top_k or penalty of its own
    with patch.object(model, "generation_config", transformers.GenerationConfig()):
        return model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=new, eos_token_id=sorted(ends) or None,
            pad_token_id=0, synced_gpus=False, logits_processor=[draw])[:, ids_BT.shape[1]:]


def end_ids(model, tokenizer):   # optional: on_policy generate eval
    """Of generation config (one, several, or None) and tokenizer."""
    ends = np.ravel(model.generation_config.eos_token_id)
    return {*ends.tolist(), tokenizer.eos_token_id} - {None}


@contextlib.contextmanager   # optional: on_policy generate eval
def gathered(root):   # optional: on_policy generate eval
    """All parameters gathered once, for as long as this lasts. Meanwhile FSDP's hooks, which would
    gather and drop each layer at each token, are off: without gradients they do nothing else."""
    with contextlib.ExitStack() as hooks_off:
        for module in root.modules():   # the root comes first
            if isinstance(module, FSDPModule):
                module.unshard()
                hooks_off.enter_context(
                    patch.multiple(module, _forward_pre_hooks={}, _forward_hooks={}))
        yield


# --------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning rate, a schedule without state, and one step that clips,
# unscales and skips without asking the GPU.


def learning_rates(named_parameters, rules, default_multiplier, learning_rate):
    """-> {parameter: rate}. The first rule that matches its first name decides; 0 freezes.

    named_parameters: (name, parameter), a tied one under its first name. rules: of
    parse_multipliers.
    """
    names = {parameter: name for name, parameter in named_parameters}
    rates = dict.fromkeys(names, learning_rate * default_multiplier)
    for pattern, multiplier in reversed(rules):   # an earlier one has the last word
        matched = [parameter for parameter, name in names.items() if pattern.search(name)]
        if not matched:
            raise UserError(f"lr_multipliers: {pattern.pattern!r} matches no parameter (of tied "
                            f"ones the first name counts) among {', '.join(names.values())}")
        rates |= dict.fromkeys(matched, learning_rate * multiplier)
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
                                weight_decay=weight_decay * decays))
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
    with phase(f"making the schedule {cfg.lr_scheduler} {cfg.lr_scheduler_kwargs or ''}"):
        multiplier_at = get_scheduler(
            cfg.lr_scheduler,
            torch.optim.SGD([torch.zeros(1)], cfg.learning_rate),   # unused, but min_lr is of it
            round(cfg.warmup_ratio * steps), steps,
            json.loads(cfg.lr_scheduler_kwargs or "{}")).lr_lambdas[0]
        values = [multiplier_at(int(step)) for step in np.linspace(0, steps - 1, 10_000)]
        low, high = np.min(values), np.max(values)
        if not (low >= 0 and 0 < high < math.inf):   # also nan
            raise ValueError(f"of {steps} steps the rate is {low:g} to {high:g} times its peak")
        return multiplier_at


def set_rates(optimizer, multiplier):
    """-> the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
    return max(group["lr"] for group in optimizer.param_groups)


def new_scale_state(fp16):
    """Scalars on the device: the fp16 loss scale, good steps in a row, skipped in all, in a row."""
    values = {"scale": 16384.0 if fp16 else 1.0, "good": 0.0, "skipped": 0.0, "streak": 0.0}
    return {name: torch.tensor(value, device=DEVICE) for name, value in values.items()}


def optimizer_step(optimizer, max_grad_norm, scale_state, fp16):
    """One step on the gradients of scale * loss -> their norm, unscaled, before clipping;
    max_grad_norm 0 clips nothing.

    Fused AdamW divides gradients by its grad_scale and changes nothing where its found_inf is 1, so
    both carry tensors: clipping and unscaling are one division inside its kernel, a step that is
    not finite is skipped there, and the host never waits for a number.
    """
    gradients = [p.grad for p in optimizer.state if p.grad is not None]
    scale = scale_state["scale"]
    norm = full_tensor(nn.utils.get_total_norm(gradients)) / scale
    divisor = scale
    if max_grad_norm:
        divisor = divisor * (norm / max_grad_norm).clamp_min(1.0)
    bad = (~norm.isfinite()).float()   # 1 or 0
    # offloaded parameters live on the host: AdamW itself would not wait for the copies
    device = gradients[0].device
    optimizer.grad_scale = divisor.to(device)
    optimizer.found_inf = bad.to(device)
    optimizer.step()
    scale_state["skipped"] += bad
    scale_state["streak"].add_(bad).mul_(bad)
    scale_state["good"].add_(1 - bad).mul_(1 - bad)
    if fp16:   # about every 2000 good steps in a row twice the scale, after a bad one half of it
        grow = (scale_state["good"] % 2000 == 1999).float()
        scale.mul_((1 + grow) * (1 - bad / 2))
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
    if RANK == 0:   # what a kill or a full disk left would be read as ours, and takes room
        for left in folder.glob("tmp-*"):
            shutil.rmtree(left, ignore_errors=True)
    all_sum(0)
    # a file is put together in host memory: 16 tensors a file
    file_of = {name: 1 + i // 16 for i, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(aside, file_of, save_distributed=True)
    with plain_errors():
        dcp.save(tensors, storage_writer=writer, process_group=HOST)   # syncs each file
    files = checksums(aside, from_rank0(RANK == 0 and sorted(os.listdir(aside))))
    if None in files.values():
        raise OSError(f"{aside} cannot be read back")
    state = json.loads(json.dumps(state | {"files": files}))   # what a reader will see
    state["digest"] = digest(state)
    if RANK == 0:
        write_json(state, aside / "state.json")
        sync(aside / "state.json", aside)
        aside.rename(folder / f"step-{step:08d}")   # fails where there is one
        sync(folder)
        for old in checkpoints_in(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return state["digest"]


def checksums(folder, files):
    """{file: CRC-32, None where it cannot be read}. Each rank reads its share."""
    mine = {file: checksum(folder / file) for file in files[RANK::WORLD]}
    shares = [None] * WORLD
    dist.all_gather_object(shares, mine, group=HOST)
    return {file: crc for share in shares for file, crc in share.items()}


def checksum(path):
    try:
        return zlib.crc32(path.read_bytes())   # of a checkpoint or of token rows: half a GB or so
    except OSError:
        return None


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
        if paths and Path(resume).resolve().parent != paths[0].resolve().parent:
            raise UserError(f"{output_dir!r} holds another run than {resume!r}; choose another "
                            "--output_dir")
        paths = [Path(resume)]
    for path in paths:
        state = from_rank0(RANK == 0 and read_state(path))
        if state and checksums(path, sorted(state["files"])) == state["files"]:
            return path, state
        print0(f"checkpoint {path} is not what was written, passed over")
    if paths:
        raise UserError(f"'{paths[0]}' is no readable checkpoint: take another, or start over with "
                        "--resume never")
    return None, None


def read_state(path):
    """-> state.json of a checkpoint whose files are exactly those it lists (else None: another file
    would be read too, and a missing one be missed by nobody)."""
    try:
        state = read_json(path / "state.json")
        written = state.pop("digest")
        if digest(state) != written or {*os.listdir(path)} != {"state.json", *state["files"]}:
            raise ValueError("other files, or another state.json")
        # a run from before there was some knob had it at its default
        state["config"] = result_knobs(Config()) | state["config"]
        return state | {"digest": written}
    except Exception as e:   # whatever stands there
        print0(one_line(e))
        return None


def load_checkpoint(path, tensors):
    """In place, where `tensors` says, named as by tensors_of."""
    with plain_errors():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(path), process_group=HOST)
    print0(f"resumes from {path}")


@contextlib.contextmanager
def plain_errors():
    """dcp raises what is no Exception, on all ranks, with those of all that failed in it."""
    try:
        yield
    except dcp.api.CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise error from e


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
    global_batch = size * micro_steps * world
    if state and state["global_batch"] != global_batch:
        global_batch = state["global_batch"]
        if [size, micro_steps] != state["batch"]:
            raise UserError(f"{cfg.output_dir!r} holds a run of {global_batch} sequences a step, "
                            f"not of {size} x {micro_steps} x {world} ranks; keep the product, or "
                            "start over with --resume never or elsewhere")
        size = min(size, math.ceil(global_batch / world))
        micro_steps = math.ceil(global_batch / (world * size))
    return size, micro_steps, global_batch


def prepare_output(cfg, step):
    """output_dir as of `step`: nothing left of a run that starts over, no log of steps to come, no
    checkpoint of them either. final/ stays until the next one is whole: it may be the student."""
    folder = Path(cfg.output_dir, "checkpoints")
    if cfg.resume == "never":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoints_in(folder):
        if int(path.name[5:]) > step:   # never to be continued from by itself
            aside = path.rename(folder / f"aside-{time.time_ns()}-{path.name}")
            print0(f"{path} is set aside as {aside}")
    # --config on it repeats the run, not what was done with one before
    write_json(knobs_of(cfg) | {"resume": "auto"}, folder.parent / "config.json")
    cut_log(folder.parent / "log.jsonl", step)


def cut_log(path, step):
    """Drop the lines of steps that are about to be repeated, and half a line that a kill left. A
    line is an object of numbers, of which one is named .../step."""
    text = path.read_text() if step and path.exists() else ""
    rows = re.findall(r'(\{[^{]*/step": (\d+)[^{]*}\n)', text)
    aside = Path(f"{path}.tmp")
    aside.write_text("".join(row for row, row_step in rows if int(row_step) <= step))
    aside.replace(path)


# --------------------------------------------------------------------------------------------------
# Train: a run is put together, begun, trained stage by stage and finished. train() says it in a few
# lines; train_stage() is the loop. Optional modes compose the same pieces. run_config(), at the end
# of the file, has opened the process group and claimed output_dir.


@dataclass
class Stage:
    """A stretch of training with a loss, rates, clipping and a length. Plain distillation is one
    stage; block-wise training puts others before it."""
    name: str
    steps: int
    loss_fn: Any               # (model, batch, targets, denominator) -> loss, ce, kl; what else it
                               # hands on is for its own chapter: the loop logs these three
    get_teacher_targets: Any   # batch -> the targets that loss_fn takes
    rates: dict                # {parameter: peak learning rate}; the others are frozen
    weight_decay: float
    max_grad_norm: float       # of all gradients together; 0: no clipping
    # the field of Batch that the loss is a mean over: labels, or, where blocks are matched, real
    mean_over: str = "labels"
    first_step: int = 0
    # [(parameters, max norm), ...] before that   # optional: blockwise
    clipped_alone: list = dataclasses.field(default_factory=list)   # optional: blockwise

    @property
    def end(self):
        return self.first_step + self.steps


@dataclass
class Progress:
    """Where a run is: what a checkpoint keeps beside the tensors."""
    step: int = 0
    tokens: int = 0                         # trained on so far ...
    seconds: float = 0.0                    # ... in this time: evaluations and saves do not count
    position: Any = None                    # of a stream
    best_loss: float = math.inf
    first_scores: dict = None               # held-out scores before training
    wandb_id: str = None
    # what a mode of its own wants to keep   # optional: on_policy
    notes: dict = dataclasses.field(default_factory=dict)   # optional: on_policy


@dataclass
class Run:
    """What a run works with."""
    cfg: Config
    setup: dict                # what each checkpoint says of the run beside its progress
    tokenizer: Any
    rows: Any                  # token rows to train on, or a stream of raw rows
    eval_rows: Any
    student: ShardedRoot
    teacher: ShardedRoot       # None: at alpha 1, or with a cache
    batch_size: int            # sequences a rank and micro-step
    micro_steps: int
    global_batch: int          # sequences an optimiser step, whatever the number of ranks
    checkpoint: Path           # to continue from, or None
    saved_digest: str          # of the newest checkpoint, or None
    vocabulary: int            # from this id on heads are padding; None: nowhere
    loss_fn: Any               # of plain distillation: what held-out rows are judged by ...
    get_teacher_targets: Any   # ... and what it takes from the teacher
    scale_state: dict          # see new_scale_state
    progress: Progress

    server: Any = None            # of the teacher: see open_server   # optional: served
    stages: list = None
    stage: Stage = None           # whose optimiser this is
    optimizer: Any = None
    batches: Any = None           # endless (micro-batches of this rank, position after the step)
    wandb: Any = None
    bar: Any = None
    stop_requests: list = None    # filled by a signal
    saved_step: int = None
    save_problem: str = None      # why the last checkpoint could not be saved
    last_scores: dict = None      # of the newest evaluation
    clock: float = 0.0            # up to when progress.seconds counts
    logged: tuple = (0, 0.0)      # its tokens and seconds at the last line of the log

    @property
    def steps(self):
        return self.stages[-1].end

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.rows) / self.global_batch)

    @property
    def epoch(self):
        if self.cfg.streaming:   # optional: streaming
            return self.progress.position["epoch"]
        return self.progress.step / self.steps_per_epoch


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
    tokenizer = load_tokenizer(cfg, cfg.tokenizer, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    student, _ = load_checked(cfg, "student", tokenizer)
    teacher, identity = None, None
    is_here = cfg.alpha < 1
    if cfg.teacher_url:   # optional: served
        is_here = False
    if is_here:
        teacher, identity = load_checked(cfg, "teacher", tokenizer)
    return tokenizer, rows, eval_rows, student, teacher, identity


def start_run(cfg):
    """Load everything and check that it belongs together -> Run; None where it is finished."""
    make_schedule(cfg, cfg.max_steps or 1000)   # would it? Before any model is loaded
    load = load_everything
    if cfg.cache_dir:   # optional: cache
        cfg = take_from_cache(cfg)
        load = load_with_cache
    knobs = result_knobs(cfg)
    if cfg.cache_dir:   # optional: cache
        knobs["cache"] = digest(read_manifest(cfg.cache_dir))   # which one, wherever it lies
    with phase("looking for a checkpoint"):
        path, state = find_checkpoint(cfg.resume, cfg.output_dir)
        if state:
            refuse_changes(state["config"], knobs, path)
            if is_finished(cfg, state):
                print0(f"{cfg.output_dir} holds this run, finished: see its final/ (teacher and "
                       "data were not looked at again; --resume never trains anew)")
                return None
    tokenizer, rows, eval_rows, student, teacher, identity = load(cfg)
    inputs = {"teacher's weights": identity, "dtype": str(compute_dtype(cfg))}   # auto: by device
    with phase("reading all token rows once"):
        for split, split_rows in ("train", rows), ("held out", eval_rows):
            facts = from_rank0(RANK == 0 and count_rows(split_rows))
            if facts:   # a stream is checked as it comes
                print0(f"{split}: {facts}")
                inputs[split] = facts["digest"]
                for root in filter(None, (student, teacher)):
                    check_ids(root, tokenizer, facts["biggest"])
    server = None   # optional: served
    if cfg.teacher_url:   # optional: served
        server = open_server(eval_rows[0], cfg, tokenizer)
        inputs["teacher's weights"] = server[1]
        eval_rows = from_rank0(with_answers(*server, eval_rows) if RANK == 0 else None)
    if state:
        refuse_changes(state["inputs"], inputs, path)
    if cfg.on_policy:   # optional: on_policy
        check_writer(cfg, student, teacher, tokenizer)
    *plan, global_batch = plan_batch(cfg, state, WORLD)
    setup = {
        "config": knobs, "inputs": inputs, "global_batch": global_batch,
        "batch": [cfg.batch_size, cfg.gradient_accumulation_steps],
        "length": [cfg.max_steps, cfg.num_epochs]}
    # Student and teacher are compared over the ids that the tokenizer has, and then CE is of the
    # same distribution. Labels alone keep transformers' own loss, which is over the whole head.
    vocabulary = vocabulary_of(tokenizer) if cfg.alpha < 1 else None
    return Run(
        cfg, setup, tokenizer, rows, eval_rows, student, teacher, *plan, global_batch,
        checkpoint=path, saved_digest=state and state["digest"],
        progress=Progress(**state["progress"]) if state else Progress(),
        vocabulary=vocabulary,
        loss_fn=functools.partial(distil_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                                  divergence=cfg.divergence, vocabulary=vocabulary),
        get_teacher_targets=teacher_targets(teacher),
        server=server,   # optional: served
        scale_state=new_scale_state(compute_dtype(cfg) == torch.float16))


def check_ids(root, tokenizer, biggest):
    """A tokenizer may have ids that a head has not: they matter where a row holds one."""
    rows = root.model.config.get_text_config().vocab_size
    if biggest >= rows:
        raise UserError(f"the data holds token {biggest}, {tokenizer.decode([biggest])!r}, beyond "
                        f"the {rows} ids of {type(root.model).__name__}: take it out")


def is_finished(cfg, state):
    """final/ has to be of this very checkpoint, not of a shorter run before it."""
    final = read_json(Path(cfg.output_dir, "final", FINAL_MARK))
    return (final == {"checkpoint": state["digest"]}
            and state["length"] == [cfg.max_steps, cfg.num_epochs])


def distillation_stage(run):
    """Plain distillation. After other stages it may be of no steps."""
    cfg = run.cfg
    steps = cfg.max_steps
    if steps is None:
        steps = math.ceil(cfg.num_epochs * run.steps_per_epoch)
    loss_fn = run.loss_fn
    if cfg.on_policy:   # optional: on_policy
        loss_fn = functools.partial(loss_by_writer, run.loss_fn)
    return Stage(
        name="distil", steps=steps, loss_fn=loss_fn,
        get_teacher_targets=run.get_teacher_targets,
        rates=learning_rates(
            run.student.model.named_parameters(), parse_multipliers(cfg.lr_multipliers),
            cfg.default_lr_multiplier, cfg.learning_rate),
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
    print0(facts_of(run))
    with stop_signals() as run.stop_requests, contextlib.ExitStack() as stack:
        resume(run)
        with phase(f"preparing {cfg.output_dir}"):
            if RANK == 0:
                prepare_output(cfg, progress.step)
            all_sum(0)   # nobody goes on before that is done
        run.wandb = start_wandb(cfg, progress.wandb_id)
        if run.wandb:   # its own __exit__ prints a traceback
            progress.wandb_id = run.wandb.id
            stack.push(lambda kind, *_: run.wandb.finish(exit_code=int(kind is not None)))
        if not progress.first_scores:
            progress.first_scores = scores(run, run.student, rows_before_training(run))
        run.batches = prefetch(my_batches(run))
        if cfg.on_policy:   # optional: on_policy
            run.batches = batches_by_student(run, run.batches)
        if cfg.teacher_url:   # optional: served
            run.batches = until_server_fails(run, run.batches)
        stack.enter_context(contextlib.closing(run.batches))
        run.bar = stack.enter_context(Bar(
            total=run.steps, initial=progress.step, disable=RANK > 0, dynamic_ncols=True,
            mininterval=0.5))
        run.clock = time.time()
        run.logged = progress.tokens, progress.seconds
        yield


def my_batches(run):
    """-> endless (this rank's micro-batches of a step, position after it), from where the run is
    on. Rank r takes every WORLD-th sequence of a global batch."""
    if run.cfg.streaming:   # optional: streaming
        for step, (rows, position) in enumerate(batches_of_stream(run), run.progress.step):
            yield micro_batches(run, rows[RANK::WORLD], step), position
    for step in itertools.count(run.progress.step):
        numbers = batch_of_step(len(run.rows), run.cfg.seed, run.global_batch, step)
        rows = [run.rows[i] for i in numbers[RANK::WORLD]]
        yield micro_batches(run, rows, step), None


def resume(run):
    """Start the stage that goes on, fill its tensors from the checkpoint, where there is one."""
    step = run.progress.step
    stage = next((stage for stage in run.stages if step < stage.end), run.stages[-1])
    start_stage(run, stage)
    if run.checkpoint:
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


# ---- the loop


def train_stage(run, stage):
    """Train what is left of a stage -> True at its end, False when a signal stopped it. What is due
    after its last step is the caller's: something may have to be done before it is saved."""
    progress = run.progress
    if run.stage is not stage:   # begin() may have started it
        start_stage(run, stage)
    multiplier_at = make_schedule(run.cfg, stage.steps)
    while progress.step < stage.end:
        micro, position = next(run.batches)
        # all ranks agree
        tokens, stopping = all_sum(count_tokens(stage, micro), len(run.stop_requests))
        if stopping:
            save(run)
            return False
        progress.position = position
        # dropout follows from the step: a resumed run draws the same, and no state has to be kept
        torch.manual_seed((run.cfg.seed * 1_000_003 + progress.step) * 65_536 + RANK)
        rate = set_rates(run.optimizer, multiplier_at(progress.step - stage.first_step))
        sums, grad_norm = one_step(run, stage, micro, tokens)
        progress.step += 1
        progress.tokens += int(tokens)
        count_time(run)
        run.bar.update()
        stop_after_bad_steps(run)
        if progress.step % run.cfg.log_steps == 0 or progress.step == stage.end:
            log_step(run, stage, sums, grad_norm, rate)
        if progress.step < stage.end:
            evaluate_and_save(run, stage)
    return True


def count_tokens(stage, micro):
    return sum(len(getattr(batch, stage.mean_over)) for batch in micro)


def one_step(run, stage, micro, tokens):
    """Forward and backward of the micro-batches, with `tokens` counted on all ranks, and a step of
    the optimiser -> this rank's shares of loss, ce and kl, norm of the gradient."""
    sums = torch.zeros(3, device=DEVICE)
    for batch in micro:
        run.student.set_requires_gradient_sync(
            run.cfg.fsdp in REDUCE_EACH or batch is micro[-1])
        targets = stage.get_teacher_targets(batch)
        loss, ce, kl, *_ = run.student(stage.loss_fn, batch, targets, max(tokens, 1))
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
    count_time(run)   # a GPU has only now done what it was told
    progress = run.progress
    tokens, seconds = run.logged
    run.logged = progress.tokens, progress.seconds
    speed = (progress.tokens - tokens) / (progress.seconds - seconds)
    skipped = int(run.scale_state["skipped"].item())
    entry = {
        "train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
        "train/grad_norm": grad_norm.item(), "train/epoch": run.epoch,
        "train/step": progress.step, "train/tokens_per_second": speed,
        "train/seconds": progress.seconds, "train/skipped_steps": skipped}
    if run.cfg.on_policy:   # optional: on_policy
        entry |= take_rollout_figures(run)
    log(run, entry)
    run.bar.set_postfix_str(f"{stage.name} loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} "
                            f"{speed:,.0f} tok/s skipped {skipped}")


def count_time(run):
    """What passed since it was counted last was training."""
    now = time.time()
    run.progress.seconds += now - run.clock
    run.clock = now


def log(run, entry):
    """To log.jsonl, as strict JSON (no NaN), and to wandb."""
    if RANK > 0:
        return
    finite = {k: v if math.isfinite(v) else None for k, v in entry.items()}
    with contextlib.suppress(OSError):   # a full disk: the next checkpoint says so
        append_jsonl(Path(run.cfg.output_dir, "log.jsonl"), finite)
    if run.wandb:
        run.wandb.log(entry, step=run.progress.step)


def evaluate_and_save(run, stage):
    """What is due after a step; after the last one of the run, both."""
    progress = run.progress
    if run.saved_step == progress.step:   # resumed here: it was done before it was saved
        return
    last = progress.step == run.steps
    judged = stage.mean_over == "labels"   # while blocks are matched there is nothing to see
    if last or (judged and is_due(progress.step, run.cfg.eval_steps)):
        run.last_scores = scores(run, run.student, run.eval_rows)
        progress.best_loss = min(progress.best_loss, run.last_scores["loss"])
        entry = run.last_scores | {
            "min_loss": progress.best_loss, "epoch": run.epoch, "step": progress.step}
        log(run, {f"eval/{key}": value for key, value in entry.items()})
        print0(f"step {progress.step}: held-out",
               *[f"{key} {value:.4f}" for key, value in run.last_scores.items()])
    if last or is_due(progress.step, run.cfg.save_steps):
        save(run)
    run.clock = time.time()   # the speed is of training alone


def is_due(step, every):
    return every and step % every == 0


def save(run):
    """A checkpoint of this moment, once. What goes wrong is said; the run goes on."""
    if run.saved_step == run.progress.step:
        return
    run.saved_step = run.progress.step
    with saving(run):
        run.saved_digest = save_checkpoint(
            Path(run.cfg.output_dir, "checkpoints"), run.saved_step,
            tensors_of(run.student, run.optimizer.state, run.scale_state),
            run.setup | {"progress": dataclasses.asdict(run.progress)}, run.cfg.keep_checkpoints)
    if run.save_problem:
        print0(f"WARNING: checkpoint {run.saved_step} could not be saved ({run.save_problem}); the "
               "run goes on, older ones stay")


@contextlib.contextmanager
def saving(run):
    """What goes wrong in it is kept in run.save_problem: a full disk comes as OSError, as
    SafetensorError, or as others."""
    problem = None
    try:
        yield
    except Exception as e:
        problem = one_line(e, 300)
    run.save_problem = from_rank0(problem)


# ---- evaluating


def scores(run, root, rows):
    """Student or teacher on held-out rows -> {loss, ce_loss, kl_loss, perplexity}: means over their
    counted tokens. Every token counts once, whatever the number of ranks."""
    loss, ce, kl, *_ = mean_over_rows(root, run.loss_fn, run.get_teacher_targets, rows,
                                      run.batch_size, "labels", "evaluating")
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}


def rows_before_training(run):
    """A few of the held-out rows, evenly spaced: training is to start at once, and what these say
    of the student before it is only where it comes from."""
    count = min(4 * run.global_batch, len(run.eval_rows))
    return [run.eval_rows[i * len(run.eval_rows) // count] for i in range(count)]


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
    for start in Bar(starts, what, disable=RANK > 0, leave=False, dynamic_ncols=True):
        numbers = range(start + RANK, min(start + at_once, len(rows)), WORLD)
        yield numbers, collate([rows[i] for i in numbers])


# ---- finishing


def finish(run):
    """Write final/, say how it ended -> True when the run is done, False when it was stopped."""
    final = Path(run.cfg.output_dir, "final")
    done = run.progress.step == run.steps
    if not done:
        print0(f"stopped at step {run.progress.step} of {run.steps}; the same command, without "
               "--resume, goes on from what is saved")
    elif not run.save_problem:
        run.last_scores = run.last_scores or scores(run, run.student, run.eval_rows)
        results = closing_table(run)
        print0(f"writing {final} ...")
        with saving(run):
            save_model(run.student, run.tokenizer, final, compute_dtype(run.cfg),
                       model_card(run, results), run.saved_digest)
        print0(f"\n{results}\n")
        print0(sample_in_words(run))   # optional: on_policy generate eval
    if run.save_problem:
        raise UserError(f"the run could not be saved in {run.cfg.output_dir!r}: "
                        f"{run.save_problem}; mend that, then run it again without --resume")
    if done:
        print0(f"\ndone in {run.steps} steps, {describe_peak()}: {final}")
    return done


def closing_table(run):
    scored = {}
    if run.teacher is not None:
        scored["teacher"] = scores(run, run.teacher, run.eval_rows)
    seen = f"{len(rows_before_training(run))} sequences"
    scored[f"student before ({seen})"] = run.progress.first_scores
    scored[f"student after ({len(run.eval_rows)})"] = run.last_scores
    rows = []
    for name, values in scored.items():   # rounded, the teacher's own KL is a little below 0
        kl = "-" if run.cfg.alpha == 1 else f"{max(values['kl_loss'], 0):.4f}"
        rows.append([name, f"{values['perplexity']:.2f}", kl])
    return table(["held out", "perplexity", "KL to teacher"], rows)


def sample_in_words(run):   # optional: on_policy generate eval
    room = min(48, run.cfg.seq_len // 2)   # a table of positions may end there
    ids = run.eval_rows[0]["input_ids"][:room].tolist()
    text, = write_texts(run.student, [ids], [0], [room], 0,
                        end_ids(run.student.model, run.tokenizer), run.vocabulary)
    return f"sample: {run.tokenizer.decode(ids)!r}\n     -> {run.tokenizer.decode(text)!r}"


def model_card(run, results):
    """README.md of final/, as transformers writes them; a license is left to fill in."""
    cfg = run.cfg
    bases = [cfg.student] if cfg.alpha == 1 else [cfg.student, cfg.teacher]
    bases = [name for name in bases if not os.path.exists(name) and ":" not in name]
    hardware = torch.cuda.get_device_name() if CUDA else "CPU"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [simple_distill, distillation]
base_model: {json.dumps(bases)}
license:   # fill in, for example apache-2.0
---

# A student of simple_distill

{facts_of(run)}
- trained: {run.progress.tokens:,} targets in {run.progress.seconds:,.0f} s on {WORLD} x {hardware}

On what was held out:

{results}

    model = AutoModelForCausalLM.from_pretrained("NAME")
    tokenizer = AutoTokenizer.from_pretrained("NAME")
"""


def facts_of(run):
    """The plan before a run, and what the model card says of it. Of a path the last parts: where it
    lay is nobody's business."""
    cfg = run.cfg
    student, teacher, dataset = [Path(*Path(name).parts[-2:])
                                 for name in (cfg.student, cfg.teacher, cfg.dataset)]
    objective = (f"{cfg.alpha:g} x cross-entropy + {1 - cfg.alpha:g} x T^2 x KL "
                 f"({cfg.divergence}), T {cfg.temperature:g}")
    if cfg.alpha == 1:
        teacher, objective = "none", "cross-entropy to the labels"
    if cfg.cache_dir:   # optional: cache
        teacher = f"{teacher}, {describe_cache_use(cfg)}"
    if cfg.on_policy:   # optional: on_policy
        objective += f"; KL alone on {cfg.on_policy:.0%} of the steps, on texts of the student"
    stages = ", ".join(f"{stage.name} {stage.steps} steps" for stage in run.stages)
    return (
        f"- student: {student}, {run.student.model.num_parameters():,} parameters\n"
        f"- teacher: {teacher}\n"
        f"- data: {dataset}, split {cfg.train_split}, at most {cfg.seq_len} tokens a sequence, "
        f"packing {cfg.packing}, {len(run.eval_rows)} held out\n"
        f"- objective: {objective}\n"
        f"- training: {stages} of {run.global_batch} sequences ({run.batch_size} x "
        f"{run.micro_steps} x {WORLD}), learning rate {cfg.learning_rate:g}, seed {cfg.seed}, "
        f"{DEVICE.type}, {compute_dtype(cfg)}")


# ---- what a run says before it begins


def rehearse(run, stages):
    """--dry_run: the plan, one example as the model meets it, and what a step takes on the longest
    rows. Nothing is written -> False, since nothing is done."""
    run.stages = stages
    stage = stages[0]
    print0(facts_of(run))
    start_stage(run, stage)
    left = run.steps - run.progress.step
    if isinstance(run.rows, datasets.Dataset):   # the longest: a batch of them takes most memory
        longest = np.argsort(-row_lengths(run.rows), kind="stable")[:run.global_batch]
        run.rows = run.rows.select(longest)
    micro, _ = next(my_batches(run))
    for example in micro[0].rows[:1]:   # rank 0 has one
        print0("an example, its targets in [[ ]]: " + show_targets(example, run.tokenizer))
    for _ in range(2):   # the first warms up, and compiles
        seconds, tokens = time_step(run, stage, micro)
    average = seconds
    if run.cfg.on_policy:   # optional: on_policy
        average = rehearse_writing(run, stage, micro, seconds)
    print0(f"a step of the longest rows takes {seconds:.2f} s ({tokens / seconds:,.0f} tokens/s), "
           f"{left} steps at most {left * average / 3600:.2f} hours, without evaluations; "
           f"{describe_peak()}. --dry_run: nothing was written")
    return False


def time_step(run, stage, micro):
    """A real step, at the peak rate: of no use but -> its seconds, its target tokens."""
    tokens, = all_sum(count_tokens(stage, micro))
    start = time.time()
    sums, _ = one_step(run, stage, micro, tokens)
    sums.tolist()   # waits for the GPU
    return time.time() - start, tokens


def show_targets(row, tokenizer):
    """A row as text; what the student learns to say stands in [[ ]]."""
    cuts = np.flatnonzero(np.diff(row["targets"])) + 1
    texts = tokenizer.batch_decode(np.split(row["input_ids"], cuts))
    texts[1::2] = [f"[[{text}]]" for text in texts[1::2]]   # the first token is never a target
    return repr("".join(texts))


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
# length. Hands on load_stream (in place of load_data) and batches_of_stream (of batch_of_step).


def load_stream(cfg, tokenizer):
    """-> (train stream of raw rows, eval rows)."""
    with phase(f"reading the beginning of dataset {cfg.dataset}"), node_first():
        stream, eval_raw = split_stream(cfg)
        # not every row of a stream has every column; from_list takes those of the first
        blank = dict.fromkeys(itertools.chain(*eval_raw))
        eval_raw = datasets.Dataset.from_list(
            [blank | row for row in eval_raw], on_mixed_types="use_json")
    eval_rows = tokenize(cfg, eval_raw, tokenizer, "eval")
    return stream, take_first(eval_rows, cfg.eval_samples)


def split_stream(cfg):
    """-> stream of train, raw rows of eval (a list): the head of their own split, else that of
    train."""
    stream, eval_stream = read_raw(cfg, streaming=True)
    if cfg.max_samples is not None:
        stream = stream.take(cfg.max_samples)
    if eval_stream is not None:
        return stream, read_head(eval_stream, cfg.eval_samples, cfg.seq_len)
    wanted = min(cfg.eval_samples, 256)
    first_rows = list(stream.take(wanted + 1))   # a look at the stream itself would move it
    if len(first_rows) <= wanted:   # that was the whole stream: a twentieth of it
        wanted = max(1, len(first_rows) // 20)
    return stream.skip(wanted), first_rows[:wanted]


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
    return first_rows


def batches_of_stream(run):
    """-> endless (rows of a global batch, position after it), from where the run is.

    A resume is exact. The stream is cut into windows of shuffle_buffer raw rows, and each window is
    encoded and shuffled whole, in an order that its number decides. So all there is to remember is
    where the window began in the stream and how many of its sequences are used: a resume encodes
    that one window again and goes on, as quick at step 100,000 as at 10. (The shuffle buffer that
    `datasets` has is refilled at a resume, and then holds other rows.)"""
    cfg = run.cfg
    stream = run.rows
    size = cfg.shuffle_buffer or 1000   # unshuffled, a window is just what is encoded at once
    beginning = stream.state_dict()
    # used: how many rows of this window; found: how many there were in this epoch before it
    position = dict(epoch=0, window=0, used=0, found=0, source=beginning)
    position |= run.progress.position or {}
    stream.load_state_dict(position["source"])
    raw_rows = iter(stream)
    pending = []
    while True:
        with phase(f"reading window {position['window']} of dataset {cfg.dataset}"):
            raw = list(itertools.islice(raw_rows, size))
            rows, dropped = encode_window(cfg, run.tokenizer, raw)
            for root in filter(None, [run.student, run.teacher]):
                check_ids(root, run.tokenizer, count_rows(rows)["biggest"])
        if dropped and position["window"] == 0:   # not at each window
            print0(f"of the first {len(raw)} rows dropped: {dict(dropped.most_common(5))}")
        order = range(len(rows))
        if cfg.shuffle_buffer:
            order = shuffled(len(rows), cfg.seed, position["window"]).tolist()
        for number in order[position["used"]:]:
            pending.append(rows[number])
            position["used"] += 1
            if len(pending) == run.global_batch:   # what is left over no position has to keep
                yield pending, dict(position)
                pending = []
        position |= dict(window=position["window"] + 1, used=0,
                         found=position["found"] + len(rows), source=stream.state_dict())
        if len(raw) < size:   # the end
            if position["found"] == 0:
                raise UserError(f"no row of the stream {cfg.dataset} holds a target token")
            position |= dict(epoch=position["epoch"] + 1, found=0, source=beginning)
            stream.load_state_dict(beginning)
            raw_rows = iter(stream)


# --------------------------------------------------------------------------------------------------
# Optional: demo: text, tokenizer, model shapes and a teacher made from what every machine has,
# once, as ordinary files in a cache folder of the user. From there on the demo is a run like any
# other.

DEMO_SHAPE = dict(   # of both models
    vocab_size=1024, num_hidden_layers=2, initializer_range=0.05,
    max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    pad_token_id=0)
DEMO_SHAPES = {   # what else each has, by the name of its folder
    "teacher-shape": dict(hidden_size=192, intermediate_size=512, num_attention_heads=6),
    "student": dict(hidden_size=64, intermediate_size=192, num_attention_heads=4),
}


def run_demo(run_mode, cfg):
    """A mode with a file for each `demo`, made where it is missing. The whole demo ends with the
    report of what it made. -> False when a signal stopped it: the next run goes on where this one
    was."""
    folder = demo_folder(cfg)
    files = demo_files(cfg, folder)
    if files and not make_demo(cfg, folder, files):
        return False
    resolved = dataclasses.replace(cfg, **files)
    if "student" in files:
        resolved.tokenizer = cfg.tokenizer or f"{folder}/tokenizer"
    done = run_mode(resolved)
    if done and is_whole_demo(cfg, files):   # optional: eval
        return answer_demo(resolved)
    return done


def is_whole_demo(cfg, files):   # optional: eval
    """Whether labels alone would be a control: everything is the demo's, also a teacher."""
    others = [
        cfg.mode != "train",
        cfg.teacher_url,   # optional: served
        cfg.blockwise,   # optional: blockwise
        cfg.on_policy,   # optional: on_policy
    ]
    return {*files} == {"teacher", "student", "dataset"} and not any(others)


CONTROLS = {   # of the demo, by the names of their folders   # optional: eval
    "labels-only": "the same steps", "labels-longer": "the same time"}


def answer_demo(cfg):   # optional: eval
    """Was the teacher worth it? Two students of the same start and data learn from the labels
    alone, one for as many steps, one for as long. The report compares all, and a line for each
    says how that came out. -> False when a signal stopped it: the next run goes on where this one
    was."""
    steps, seconds = trained(cfg.output_dir)
    wanted = steps
    for name in CONTROLS:
        control = f"{cfg.output_dir}/{name}"
        resume = "never" if cfg.resume == "never" else "auto"   # a PATH is of the other student
        print0(f"\ndemo: and now the same student on labels alone, {wanted} steps, in {control}")
        with claim(control, "train"):
            if not train(dataclasses.replace(cfg, alpha=1.0, max_steps=wanted, output_dir=control,
                                             resume=resume, use_wandb=False)):
                return False
        # for the next one: in steps as long as these, as many as take the student's time
        wanted = math.ceil(steps * seconds / trained(control)[1])
    figures = report(dataclasses.replace(
        cfg, mode="eval", student=f"{cfg.output_dir}/final",
        compare=[f"{cfg.output_dir}/{name}/final" for name in CONTROLS]))
    if RANK == 0:
        print0(did_teacher_pay(figures))
    return True


def trained(output_dir):   # optional: eval
    """-> steps and seconds of a run that is done. The disk is shared."""
    with phase(f"looking for train/seconds in {output_dir}/log.jsonl (--resume never writes it)"):
        return read_curves(f"{output_dir}/final")["train/seconds"][-1]


def did_teacher_pay(figures):   # optional: eval
    """From the report's figures."""
    sentences = []
    for name, measure in CONTROLS.items():
        ours, control = figures["student"], figures[name]
        verdict = control["student_against_it"]
        low, high = verdict["interval"]
        answer = {"better": "The teacher paid", "worse": "The teacher did not pay"}.get(
            verdict["verdict"], "Whether the teacher paid, this run cannot tell")
        sentences.append(
            f"{answer}: held-out perplexity {ours['perplexity']:.2f}, on labels alone "
            f"{control['perplexity']:.2f} after {measure} ({ours['seconds']:.0f} and "
            f"{control['seconds']:.0f} s); {verdict['difference']:+.4f} bits a byte (95 %: "
            f"{low:+.4f} to {high:+.4f})")
    return "\n".join(sentences)


def demo_files(cfg, folder):
    """-> {role: file or folder} of what this run takes from the demo."""
    places = {
        "teacher": f"{folder}/teacher/final",
        "student": f"{folder}/student/config.json",
        "dataset": f"{folder}/corpus",
    }
    if cfg.mode == "eval":   # there the student is what output_dir holds
        del places["student"]
    if cfg.mode == "train" and cfg.alpha == 1 and not cfg.student.startswith("layers:"):
        del places["teacher"]
    if cfg.mode == "train" and cfg.cache_dir:   # optional: cache
        places = {"student": places["student"]}   # a cache is teacher and dataset
    return {role: path for role, path in places.items() if getattr(cfg, role) == "demo"}


def demo_folder(cfg):
    """Beside other caches of Hugging Face libraries, named by all that the files depend on."""
    depends = digest(sys.version, DEMO_SHAPE, DEMO_SHAPES, demo_knobs(), str(compute_dtype(cfg)),
                     inspect.getsource(write_demo_files))
    return f"{huggingface_hub.constants.HF_HOME}/simple_distill/demo-{depends}"


def make_demo(cfg, folder, files):
    """Make what is missing; another run that does so already is waited for. -> False when a signal
    stopped it."""
    print0("the demo's: " + " ".join(f"--{role} {path}" for role, path in files.items()))
    with claim(folder, "demo", wait=True):
        with phase("preparing the demo's text and tokenizer"):
            if RANK == 0 and not os.path.exists(f"{folder}/student/config.json"):
                write_demo_files(folder)
            all_sum(0)   # nobody goes on before that is done
        if "teacher" not in files or os.path.exists(f"{folder}/teacher/final"):
            return True
        teacher_cfg = Config(**demo_knobs() | dict(
            dataset=f"{folder}/corpus", tokenizer=f"{folder}/tokenizer",
            student=f"{folder}/teacher-shape/config.json", output_dir=f"{folder}/teacher",
            dtype=cfg.dtype, use_wandb=False, alpha=1.0, eval_steps=0))
        print0(f"demo: first the teacher, {teacher_cfg.max_steps} steps, kept in {folder}")
        return train(teacher_cfg)


def write_demo_files(folder):
    """Corpus, tokenizer and model shapes; every twentieth module is held out whole."""
    texts = {"train": [], "validation": []}
    for name, text in sorted(stdlib_sources(), key=lambda source: digest(source[0])):
        if text.strip():
            split = "validation" if int(digest(name), 16) % 20 == 0 else "train"
            texts[split].append(text)
    for split in texts:
        rows = datasets.Dataset.from_dict({"text": texts[split]})
        rows.to_json(f"{folder}/corpus/{split}.jsonl")
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["train"], DEMO_SHAPE["vocab_size"], special_tokens=["<|end|>"],
                            show_progress=False)   # it writes to stdout
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    for name, shape in DEMO_SHAPES.items():   # the student's last: it says that all is there
        transformers.LlamaConfig(**DEMO_SHAPE, **shape).save_pretrained(f"{folder}/{name}")


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


DECIDED = ("teacher", "dataset", "seq_len", "temperature", "packing")   # for all who train from it


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
    if cfg.streaming:   # optional: streaming
        raw_rows = list(splits["train"].take(64))   # nobody has seen all of it
    return identity | dict(
        format=2,
        vocabulary=vocabulary,
        tokenizer=identify_tokenizer(tokenizer),
        **{name: getattr(cfg, name) for name in DECIDED},
        dataset_fingerprint=digest(
            count_rows(splits["train"]), count_rows(splits["eval"]), str(raw_rows)),
        eval_samples=cfg.eval_samples,
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


def pack_row(row, kept):
    text = 4 * np.asarray(row["input_ids"]) + row["targets"]
    text[row["starts"]] += 2
    counts = [len(text), len(kept.entries), text.max() // 4]
    return np.concatenate([counts, text, kept.entries, kept.extra])


def unpack_row(numbers, manifest):
    """-> a row like those of load_data, with its SparseTarget in arrays: manifest["size"] ids a
    target."""
    size = manifest["size"]
    text, listed, extra = np.split(numbers[3:], np.cumsum(numbers[:2]))
    ids, codes = np.divmod(listed, manifest["codes"])
    if manifest["method"] == "sample":   # an id as often as it was drawn, each time 1 / size
        ids = np.repeat(ids, codes + 1).reshape(-1, size)
        probs = np.full(ids.shape, 1 / size)
        rest = np.zeros(len(ids))
        entropy = extra / 256
    else:   # the entropy is that of what is listed and the rest, so that the KL is never below 0
        probs = np.exp(-24 * (codes / 255) ** 2) * (codes < 255)
        probs = probs.reshape(-1, size + 1)
        probs /= probs.sum(1, keepdims=True)   # takes out what all roundings have in common
        entropy = -(probs * np.log(probs + 1e-30)).sum(1)
        rest = probs[:, -1]
        probs = probs[:, :-1]
        ids = ids.reshape(-1, size + 1)[:, :-1]
    floats = [part.astype(np.float32) for part in (probs, rest, entropy)]
    return {"input_ids": text // 4, "targets": text % 2 == 1,
            "starts": np.flatnonzero(text & 2), "sparse": SparseTarget(ids, *floats)}


def compress(numbers):
    """-> bytes. The lowest byte of all numbers first, the highest last: like stands beside like,
    and takes a little less than every number in the fewest bits."""
    bytes_N4 = np.asarray(numbers, "<u4").view(np.uint8).reshape(-1, 4)
    return zlib.compress(bytes_N4.T.tobytes(), 1)


def decompress(data):
    bytes_4N = np.frombuffer(zlib.decompress(data), np.uint8).reshape(4, -1)
    return 256 ** np.arange(4) @ bytes_4N


# ---- filling


def fill_cache(cfg):
    """Fill what is missing of cache_dir. Any number of workers may, at any time, each of any number
    of ranks; the same command goes on where it was stopped."""
    if RANK == 0:
        with mark_folder(cfg.cache_dir, "cache") as mark:   # no lock: there may be many workers
            mark.write("cache ")
    tokenizer = load_tokenizer(cfg, cfg.tokenizer, cfg.student, cfg.teacher)
    rows, eval_rows = load_data(cfg, tokenizer)
    splits = {"train": rows, "eval": eval_rows}
    open_it = open_teacher
    if cfg.teacher_url:   # optional: served
        open_it = functools.partial(open_server, eval_rows[0])
    ask, identity = open_it(cfg, tokenizer)
    with phase(f"opening cache {cfg.cache_dir}"):
        manifest = describe_cache(cfg, tokenizer, splits, identity)
        begin_cache(cfg, tokenizer, manifest)
        if cfg.teacher_url:   # optional: served
            ask_again(cfg.cache_dir, manifest, ask)
    with stop_signals() as stop_requests:
        paths = fill_chunks(cfg, tokenizer, splits, manifest, ask, stop_requests)
    if paths and RANK == 0:
        finish_cache(cfg.cache_dir, manifest, paths)


def open_teacher(cfg, tokenizer):
    """-> ask, and what a manifest says of the teacher. Another teacher is another such function:
    ask(rows, first, manifest) gives a Kept a row. first: the number of the first row, by which its
    draws are the same whoever makes them. All ranks ask together, also one that has no rows left,
    since a sharded teacher needs them all."""
    teacher, weights = load_checked(cfg, "teacher", tokenizer)
    def ask(rows, first, manifest):
        batch = collate(rows)
        check_ids(teacher, tokenizer, int(batch.input_ids.max()))
        hidden_ND, head = teacher_targets(teacher)(batch)   # N: the targets of all rows
        parts = hidden_ND.split([int(row["targets"].sum()) for row in rows])
        return [keep(part, head, number, manifest) for number, part in enumerate(parts, first)]

    return ask, dict(
        weights=weights, dtype=str(compute_dtype(cfg)),
        revision=getattr(teacher.model.config, "_commit_hash", None))   # None: a directory


def begin_cache(cfg, tokenizer, manifest):
    """A new cache gets all but its chunks; one that is there must be of the same content."""
    folder = cfg.cache_dir
    if os.path.exists(f"{folder}/manifest.json") and not cfg.force_regenerate:
        there = read_manifest(folder)
        refuse_changes(there, manifest, folder, "empty it: --force_regenerate")
    elif RANK == 0:
        write_json({}, f"{folder}/index.json")
        if cfg.force_regenerate:
            shutil.rmtree(f"{folder}/tokenizer", ignore_errors=True)
            for path in Path(folder).glob("*.safetensors"):
                path.unlink()
        write_json(knobs_of(cfg) | {"force_regenerate": False}, f"{folder}/config.json")
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        write_json(manifest, f"{folder}/manifest.json")   # last: from here on there is a cache
    all_sum(0)   # nobody goes on before that


def fill_chunks(cfg, tokenizer, splits, manifest, ask, stop_requests):
    """-> the paths of all chunks, once they are there; None where a signal stopped it. Ranks go
    from one forward to the next together: see open_teacher."""
    total = math.inf   # a stream has no length
    if not isinstance(splits["train"], datasets.IterableDataset):
        total = sum(map(len, splits.values()))
    with tqdm(total=total, unit="row", disable=RANK > 0) as bar:
        while True:
            paths = []
            forwards = write_chunks(cfg, tokenizer, splits, manifest, ask, total, paths)
            all_rows = True
            while all_rows:
                rows = next(forwards, 0)
                if not rows:
                    ask([], 0, manifest)
                all_rows, stop = all_sum(rows, len(stop_requests))
                if stop:
                    print0("stopped; the same command goes on")
                    return None
                bar.update(int(all_rows))
            missing, = all_sum(sum(not path.exists() for path in paths))
            if not missing:
                return paths
            time.sleep(1)   # another worker has a chunk; it may die with it


def write_chunks(cfg, tokenizer, splits, manifest, ask, total, paths):
    """Claim the chunks that are not there and that no living worker has, one after the other, and
    write them: yields after each forward, its number of rows. The paths of all chunks are added to
    paths. The first chunk tells what all will take; total: rows of all splits, inf for a stream.

    A stream is cut into blocks of raw rows, each packed on its own, so that nobody has to tokenise
    what another worker does. As a block may hold any number of rows, theirs begin 2^32 apart."""
    size = manifest["chunk"]
    numbers = {"eval": 0, "train": 2**60}   # where those of chunks, and of rows, begin
    said = False
    with open(f"{cfg.cache_dir}/claims", "a") as claims:
        for split, rows in splits.items():
            is_stream = isinstance(rows, datasets.IterableDataset)
            blocks = rows.iter(size) if is_stream else range(0, len(rows), size)
            for chunk, block in enumerate(blocks):
                path = Path(f"{cfg.cache_dir}/{split}-{chunk:08d}.safetensors")
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
                    block_rows = [rows[i] for i in range(len(rows))[block:block + size]]
                yield from write_chunk(path, block_rows, first, manifest, ask)
                if block_rows and not said:
                    say_size(path, block_rows, total)
                    said = True


def encode_block(cfg, tokenizer, columns):
    rows, _ = encode_window(cfg, tokenizer, rows_from_columns(columns))
    return [rows[i] for i in range(len(rows))]


def write_chunk(path, rows, first, manifest, ask):
    """A chunk appears whole or not at all. Safetensors: mapped into memory, sliced, no code in it.

    rows   the rows, end to end: 4 bytes of checksum_at, then its numbers, compressed
    ends   where each begins and ends
    """
    parts = []
    size = manifest["group"]
    for start in range(0, len(rows), size):
        group = rows[start:start + size]
        for row, kept in zip(group, ask(group, first + start, manifest), strict=True):
            data = compress(pack_row(row, kept))
            parts.append(checksum_at(path, len(parts), data, manifest) + data)
        yield len(group)
    tensors = {"rows": np.frombuffer(b"".join(parts), np.uint8),
               "ends": np.cumsum([0, *map(len, parts)])}
    aside = path.with_suffix(".tmp")
    aside.write_bytes(safetensors.numpy.save(tensors))
    sync(aside)
    aside.rename(path)


def say_size(path, rows, total):
    size = path.stat().st_size
    tokens = sum(len(row["input_ids"]) for row in rows)
    print0(f"cache: {size / tokens:.1f} bytes a token; about {size / len(rows) * total / 1e9:.3f} "
           f"GB in all, {shutil.disk_usage(path).free / 1e9:.1f} GB free")


def checksum_at(path, line, data, manifest):
    """Of a row's bytes and of where they belong."""
    place = f"{digest(manifest)} {path.name} {line}"
    return zlib.crc32(data, zlib.crc32(place.encode())).to_bytes(4, "little")


def keep(hidden_ND, head, number, manifest):
    """Of the teacher, at the targets of the row of this number -> Kept"""
    # draws of its own, the same on any device
    generator = torch.Generator().manual_seed(int(digest(manifest["seed"], number), 16) >> 1)
    # 16 bytes an entry of [C, V]: log p, p, and the running sum of p in fp64
    at_once = max(1, LOGITS_BUDGET // (16 * manifest["vocabulary"]))
    parts = []
    for hidden_CD in hidden_ND.split(at_once):
        logits_CV = head_logits(hidden_CD, head, manifest["vocabulary"])   # without the padding
        logp_CV = torch.log_softmax(logits_CV / manifest["temperature"], -1)
        if manifest["method"] == "sample":
            parts.append(sample_entries(logp_CV, manifest["size"], generator))
        else:
            parts.append(topk_entries(*logp_CV.topk(manifest["size"])))
    return Kept(*(torch.cat(part).cpu().numpy() for part in zip(*parts)))


def sample_entries(logp_CV, size, generator):
    """S = size draws a token -> an entry for each distinct id [E], extra [C]"""
    count, vocabulary = logp_CV.shape
    # one after the other: the same in any pieces
    uniform_CS = torch.rand(count, size, dtype=torch.float64, generator=generator).to(DEVICE)
    cdf_CV = logp_CV.exp().cumsum(-1, dtype=torch.float64)
    heights_CS = uniform_CS.sort(-1)[0] * cdf_CV[:, -1:]   # which is not exactly 1
    draws_CS = torch.searchsorted(cdf_CV, heights_CS, right=True).clamp_max(vocabulary - 1)
    # the entropy as these draws show it: student = teacher logs a KL of 0, not of noise around 0
    entropy_C = -logp_CV.gather(-1, draws_CS).mean(-1)
    extra_C = (entropy_C * 256).round().clamp_max(4095).long()
    line_C1 = torch.arange(count, device=DEVICE)[:, None]
    # places in [C, V] end to end: what two tokens have drawn stays apart
    places_E, times_E = torch.unique_consecutive(
        draws_CS + vocabulary * line_C1, return_counts=True)
    return places_E % vocabulary * size + times_E - 1, extra_C


def topk_entries(logp_CK, ids_CK):
    """The likeliest K ids a token, and the rest -> entries [C * (K + 1)], nothing"""
    rest_C1 = (1 - logp_CK.exp().sum(-1, keepdim=True)).clamp_min(0)
    logp_CE = torch.cat([logp_CK, rest_C1.log()], -1)
    codes_CE = logp_CE.div(-24).sqrt().mul(255).round().clamp_max(255).long()
    entries_CE = 256 * nn.functional.pad(ids_CK, (0, 1)) + codes_CE
    return entries_CE.flatten(), ids_CK.new_empty(0)


def finish_cache(cache_dir, manifest, paths):
    """Read every row of all workers' chunks back; with their numbers the cache is full."""
    chunks = {"train": [], "eval": []}
    tokens = biggest_id = size = 0
    for path in tqdm(paths, desc="reading the cache back", unit="chunk"):
        rows = read_chunk(path, manifest)
        split, _ = path.name.split("-")
        chunks[split].append(len(rows))
        size += path.stat().st_size
        for numbers in rows:
            tokens += int(numbers[0])
            biggest_id = max(biggest_id, int(numbers[2]))
    index = dict(chunks=chunks, rows=sum(map(sum, chunks.values())), tokens=tokens,
                 bytes_per_token=size / tokens, biggest_id=biggest_id)
    write_json(index, f"{cache_dir}/index.json")
    print0(f"cache {cache_dir} is full: {index['rows']:,} sequences, {tokens:,} tokens of "
           f"{size / tokens:.1f} bytes")


# ---- reading


def take_from_cache(cfg):
    """-> cfg of a training run, with what the cache has decided; refused where something else was
    typed."""
    with phase(f"opening cache {cfg.cache_dir}"):
        manifest = read_manifest(cfg.cache_dir)
        decided = {name: manifest[name] for name in DECIDED}
        typed = {name: getattr(cfg, name) for name in DECIDED if name in cfg.given}
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
        index = read_json(f"{cfg.cache_dir}/index.json")
        if not index:
            raise UserError(f"{cfg.cache_dir!r} holds no finished cache (it was begun, not "
                            "finished); the same mode cache command finishes it")
        folder = f"{cfg.cache_dir}/tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
        if identify_tokenizer(tokenizer) != manifest["tokenizer"]:
            raise UserError(f"cache tokenizer {folder!r} is not what was written; fill the cache "
                            "again with --force_regenerate")
        theirs = load_tokenizer(cfg, cfg.tokenizer, cfg.student) or tokenizer
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
        self.starts = np.cumsum([0, *index["chunks"][split]])   # of chunks; the last: the end
        self.length = int(min(self.starts[-1], at_most))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        chunk = np.searchsorted(self.starts, i, "right") - 1
        line = i - self.starts[chunk]
        path = Path(f"{self.prefix}-{chunk:08d}.safetensors")
        numbers, = read_chunk(path, self.manifest, [line])
        return unpack_row(numbers, self.manifest)


def read_chunk(path, manifest, lines=None):
    """-> the numbers of each of its rows, or of some, as they were written. Mapped anew each time,
    20 us: nothing has to be kept."""
    try:
        rows = []
        with safetensors.safe_open(path, "numpy") as file:
            ends = file.get_tensor("ends").tolist()
            for line in lines or range(len(ends) - 1):
                written = file.get_slice("rows")[ends[line]:ends[line + 1]].tobytes()
                if written[:4] != checksum_at(path, line, written[4:], manifest):
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
    manifest = read_json(f"{cache_dir}/manifest.json", {})
    if manifest.get("format") != 2:
        raise UserError(f"{cache_dir!r} holds no cache, or one of an older version; mode cache "
                        "fills it, an older one with --force_regenerate")
    return manifest


# --------------------------------------------------------------------------------------------------
# Optional: served: a teacher behind a vLLM or SGLang server, which tells of each token of a text
# what was likeliest there. To a cache it is another teacher (see open_teacher: this chapter needs
# that one). Online a row gets what a row of a cache of method topk has: when its batch is
# prefetched, when the student has written it, and, where it is held out, once at the start.

PATIENCE = 120   # seconds in which what goes wrong is tried again
SILENCE = 60     # seconds that an answer may take; the client itself tries three times


def open_server(row, cfg, tokenizer):
    """-> ask, as of open_teacher, and a manifest: what is to be said of the teacher, and what its
    rows depend on. row: to try it on."""
    import openai
    client = openai.OpenAI(base_url=cfg.teacher_url, timeout=SILENCE,
                           api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none")
    advice = (f"at each token but the first it has to list {cfg.cache_top_k} and the token itself "
              f"(vllm serve MODEL --max-logprobs {cfg.cache_top_k} --no-enable-prefix-caching; "
              "sglang's --disable-radix-cache)")
    with phase(f"trying --teacher {cfg.teacher}, or the only model, at {cfg.teacher_url}; "
               f"{advice}"):
        models = client.models.list().data
        model, = [model for model in models if cfg.teacher in (model.id, model.root)] or models
        manifest = {"served": [model.id, model.root], "vocabulary": vocabulary_of(tokenizer),
                    "method": "topk", "size": cfg.cache_top_k, "codes": 256}
        ask_row(client, model, manifest, row, tokenizer)

    def ask(rows, first, manifest):
        deadline = time.time() + PATIENCE
        while True:
            try:
                with ThreadPoolExecutor(16) as pool:   # so many requests are in flight
                    return [*pool.map(functools.partial(ask_row, client, model, manifest), rows)]
            except Exception as e:
                if time.time() > deadline:
                    raise UserError(f"teacher {model.id} at {cfg.teacher_url}: {one_line(e, 600)}; "
                                    f"{advice}") from e
                print0(f"asking {cfg.teacher_url} again: {one_line(e)}")
                time.sleep(5)

    return ask, manifest


def ask_row(client, model, manifest, row, tokenizer=None):
    """-> Kept. What shares the row is asked one by one. tokenizer: ours, to be compared."""
    size = manifest["size"]
    answers = []
    for ids in np.split(row["input_ids"], row["starts"][1:]):
        answers += ask_ids(client, model, size, ids.tolist(), texts=tokenizer is not None)
    # there is none for the first token of a document, which is no target
    labels, targets = (np.delete(row[name], row["starts"]) for name in ("input_ids", "targets"))
    table = []
    for label, entries in zip(labels, answers, strict=True):
        if len(entries) < size or label not in [i for _, i, _ in entries]:
            raise ValueError(f"for token {label} came {len(entries)}: {entries}")
        table.append(sorted({(logp, i) for logp, i, _ in entries}, reverse=True)[:size])
    logp_NK, ids_NK = torch.tensor(np.array(table)[targets]).unbind(-1)
    total = logp_NK.exp().sum(-1).max()
    if not (total <= 1.01 and ids_NK.max() < manifest["vocabulary"]):
        raise ValueError(f"probabilities add up to {total:.2f}, ids to {ids_NK.max():.0f} of "
                         f"{manifest['vocabulary']}")
    if tokenizer:
        # of a piece of a character vLLM says "", or what it completes
        same = np.mean([tokenizer.decode([i]) == text
                        for entries in answers for _, i, text in entries if text])
        if not same >= 0.9:
            raise ValueError(f"{same:.0%} of the ids read as in our tokenizer; --tokenizer names "
                             "another")
    return Kept(*map(np.asarray, topk_entries(logp_NK, ids_NK.long())))


def ask_ids(client, model, size, ids, texts):
    """-> [(log-probability, id, text), ...] for each id but the first."""
    if model.owned_by == "sglang":   # whose /v1/completions gives no ids
        answer = client.post(f"{client.base_url}".replace("/v1/", "/generate"), cast_to=object,
                             body={"input_ids": ids, "sampling_params": {"max_new_tokens": 1},
                                   "return_logprob": True, "logprob_start_len": 0,
                                   "top_logprobs_num": size, "return_text_in_logprobs": texts})
        facts = answer["meta_info"]
        return [[label, *likeliest] for label, likeliest in zip(
            facts["input_token_logprobs"][1:], facts["input_top_logprobs"][1:])]
    answer = client.post("/completions", cast_to=object, body={
        "model": model.id, "prompt": ids, "max_tokens": 1, "prompt_logprobs": size})
    return [[(entry["logprob"], int(i), entry["decoded_token"]) for i, entry in entries.items()]
            for entries in answer["choices"][0]["prompt_logprobs"][1:]]


def with_answers(ask, manifest, rows):
    """Token rows -> the same with their SparseTarget, by the way that it takes through a cache."""
    return [unpack_row(pack_row(row, kept), manifest)
            for row, kept in zip(rows, ask(rows, 0, manifest))]


def until_server_fails(run, batches):
    """The same batches. Where one cannot be had, all ranks save and stop, as for a signal; then
    begin closes this, and the run ends in an error."""
    try:
        yield from batches
    except UserError as e:
        run.stop_requests.append(1)
        try:
            yield [], None
        finally:
            raise e


def ask_again(cache_dir, manifest, ask):
    """Names say little: of a cache that goes on, a row has to come out as it did."""
    for path in sorted(Path(cache_dir).glob("*.safetensors"))[:1]:
        row = unpack_row(read_chunk(path, manifest)[0], manifest)
        again, = with_answers(ask, manifest, [row])
        same = np.mean(row["sparse"].ids[:, 0] == again["sparse"].ids[:, 0])
        if same < 0.98:
            raise UserError(f"of {path} {same:.0%} of the likeliest tokens are what the server "
                            "says now: serve the model it was, or --force_regenerate")


# --------------------------------------------------------------------------------------------------
# Optional: blockwise: block i of the student learns to end where its teacher block ends, seen
# through a linear stitch to the teacher's width; then norm and head learn the teacher's logits;
# then plain distillation follows. train_blockwise() is a sibling of train(), with several stages.


def train_blockwise(cfg):
    """Block by block, then the head, then as usual -> True when done, False when stopped."""
    # start_run has run the student by then, while all of it could be trained: FSDP notes at the
    # first forward, once for all, in which type a unit reduces gradients
    run = start_run(cfg)
    if run is None:
        return True
    parts = parameters_by_part(run)
    stages = block_stages(run, parts)
    *_, last_block = (stage for stage in stages if stage.mean_over == "real")
    if cfg.dry_run:
        return rehearse(run, stages)
    with begin(run, stages):
        if not run.checkpoint:   # a resume needs not to
            measure_blocks(run)
        for stage in stages:
            if run.progress.step >= stage.end:   # done before a resume
                continue
            if not train_stage(run, stage):
                break
            if stage is last_block:
                measure_blocks(run)
                if cfg.initialize_head_from_teacher:
                    initialize_head(run, parts["head"])
            evaluate_and_save(run, stage)
    return finish(run)


# ---- which block learns from which, and when

PER_BLOCK = ("epochs_per_block", "lr_per_block", "wd_per_block", "max_grad_norm_per_block")


def match_blocks(cfg, student_shape, teacher_shape):
    """-> {block of the student: block of the teacher}, refused where they cannot be matched."""
    depth = student_shape.num_hidden_layers
    teacher_depth = teacher_shape.num_hidden_layers
    if depth > teacher_depth:
        raise UserError(f"blockwise: the student has {depth} layers, the teacher only "
                        f"{teacher_depth}; take a shallower student")
    if student_shape.hidden_size != teacher_shape.hidden_size and not cfg.use_stitching_layers:
        raise UserError(f"blockwise: student width {student_shape.hidden_size} and teacher width "
                        f"{teacher_shape.hidden_size} differ, that needs use_stitching_layers")
    for name in PER_BLOCK:   # one value for all blocks, or one a block
        count = len(getattr(cfg, name))
        if count not in (1, depth):
            raise UserError(f"{name} has {count} values; give one, or {depth}: one a block")
    return {i: teacher_layer(i, depth, teacher_depth) for i in range(depth)}


def parameters_by_part(run):
    """-> {block number, "head" or "embeddings": {parameter: multiplier of its rate, 0: frozen}}. A
    block's stitches belong to it, the final norm to the head, a tied head to the embeddings."""
    model = run.student.model
    multipliers = learning_rates(
        model.named_parameters(), parse_multipliers(run.cfg.lr_multipliers),
        run.cfg.default_lr_multiplier, 1.0)
    path, _ = layers_of(model)
    head = {*model.get_output_embeddings().parameters(), *final_norm(model).parameters()} - {
        model.get_input_embeddings().weight}
    parts = collections.defaultdict(dict)
    for name, p in run.student.named_parameters():
        block = re.match(rf"(?:model\.{path}\.|stitches\.\D+)(\d+)\.", name)
        part = "head" if p in head else "embeddings"
        if block:
            part = int(block[1])
        parts[part][p] = multipliers.get(p, 1.0)   # a stitch has the rate of its block
    return parts


def block_stages(run, parts):
    """-> [Stage, ...]: one a block, or one for all of them (block_input teacher), then norm and
    head, then plain distillation."""
    pairs = run.student.pairs
    groups = [{i: j} for i, j in pairs.items()]
    if run.cfg.block_input == "teacher":
        groups = [pairs]
    stages = [stage_of_blocks(run, parts, group) for group in groups]
    if run.cfg.train_lm_head:
        stages.append(stage_of_head(run, parts["head"]))
    for stage in stages:
        if not any(stage.rates.values()):
            raise UserError(f"lr_multipliers freeze all that stage {stage.name!r} would train; "
                            "leave something of it free, or for the head --train_lm_head false")
    stages.append(distillation_stage(run))
    for before, stage in itertools.pairwise(stages):
        stage.first_step = before.end
    return stages


def stage_of_blocks(run, parts, pairs):
    """A block on the student's own stream; the first one also learns the embeddings, and with
    freeze_previous_blocks false each goes on with what stands before it. Or all blocks at once,
    each fed by the teacher: none sees another, each is clipped alone."""
    cfg = run.cfg
    fed_by_teacher = cfg.block_input == "teacher"
    rates = {}
    clipped_alone = []
    for i in pairs:
        trained = [i]
        if not fed_by_teacher and (i == 0 or not cfg.freeze_previous_blocks):
            trained += ["embeddings", *range(i)]
        epochs, rate, decay, max_norm = [
            values[i % len(values)] for values in map(vars(cfg).get, PER_BLOCK)]
        rates |= {p: rate * times for part in trained for p, times in parts[part].items()}
        if fed_by_teacher and max_norm:
            clipped_alone.append((parts[i], max_norm))
    return Stage(
        name="blocks" if fed_by_teacher else f"block {i}",
        steps=math.ceil(epochs * run.steps_per_epoch),
        loss_fn=functools.partial(block_loss, run, pairs),
        get_teacher_targets=functools.partial(run.teacher, around_blocks, pairs.values(), {}),
        rates=rates, weight_decay=decay, max_grad_norm=0 if fed_by_teacher else max_norm,
        clipped_alone=clipped_alone, mean_over="real")


def stage_of_head(run, head):
    """Norm and head learn the teacher's logits, or the labels, on top of finished blocks."""
    cfg = run.cfg
    alpha = 1.0 if cfg.logit_loss_type == "ce" else 1 - cfg.logit_loss_weight
    return Stage(
        name="head", steps=math.ceil(cfg.lm_head_epochs * run.steps_per_epoch),
        loss_fn=functools.partial(
            distil_loss, alpha=alpha, temperature=cfg.logit_loss_temperature,
            divergence="mse" if cfg.logit_loss_type == "mse" else "forward",
            vocabulary=run.vocabulary),
        get_teacher_targets=teacher_targets(alpha < 1 and run.teacher),
        rates={p: cfg.lm_head_lr * multiplier for p, multiplier in head.items()},
        weight_decay=cfg.lm_head_wd, max_grad_norm=cfg.lm_head_max_grad_norm)


def clip_blocks(clipped_alone, scale_state):
    """[(parameters, max norm), ...]: gradients of scale * loss, each group's by itself, without
    asking the GPU."""
    for parameters, max_norm in clipped_alone:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = full_tensor(norm) / scale_state["scale"]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


# ---- hidden states at both ends of a block


@dataclass
class RecordedLayer:
    """Stands in place of a decoder layer: feeds it another input if there is one, and keeps both
    ends, also when activations are recomputed, as hooks would not."""
    layer: nn.Module
    other_input: Any

    def __getattr__(self, name):   # models ask their layers for attention_type and the like
        return getattr(self.layer, name)

    def __call__(self, hidden_states, *args, **kwargs):
        self.before = hidden_states if self.other_input is None else self.other_input
        output = self.layer(self.before, *args, **kwargs)
        self.after = output[0] if isinstance(output, tuple) else output
        return output


def around_blocks(model, blocks, other_inputs, batch):
    """Runs inside either root: -> its layers up to the last of these blocks; each block's has kept
    the hidden states before and after it, [B, T, D]. other_inputs: {block: those that it is fed}.
    Later layers do not run."""
    path, layers = layers_of(model)
    parent_path, _, name = path.rpartition(".")
    recorded = [*layers[:max(blocks) + 1]]
    for i in blocks:
        recorded[i] = RecordedLayer(layers[i], other_inputs.get(i))
    # an entry in __dict__ hides the registered layers for the time of one forward
    attributes = vars(model.get_submodule(parent_path))
    attributes[name] = recorded
    hidden_states(model, batch.input_ids, batch.position_ids)
    del attributes[name]
    return recorded


def block_errors(run, pairs, model, batch, teacher_layers):
    """Runs inside the student: yields, for one block after the other, the error [N], the student's
    states, stitched to the teacher's width, and the teacher's, [N, D] each, without padding."""
    cfg = run.cfg
    stitches = run.student.stitches
    dtype = compute_dtype(cfg)
    inputs = {}
    if cfg.block_input == "teacher":
        inputs = {i: stitches[f"down{i}"](teacher_layers[j].before.to(dtype))
                  for i, j in pairs.items()}
    student_layers = around_blocks(model, pairs, inputs, batch)
    for i, j in pairs.items():
        student_ND = stitches[f"up{i}"](
            student_layers[i].after.flatten(0, 1)[batch.real].to(dtype)).float()
        teacher_ND = teacher_layers[j].after.flatten(0, 1)[batch.real].float()
        error_N = hidden_error(
            student_ND, teacher_ND, cfg.distill_loss_type, cfg.distill_loss_temperature)
        yield error_N, student_ND, teacher_ND


def hidden_error(student_ND, teacher_ND, kind, temperature):
    """-> [N]. The gradient is exactly 0 where both agree: Adam makes whole steps of noise."""
    if kind == "kl_div":   # over the width; the last two terms cancel, but for rounding
        logp = torch.log_softmax(student_ND / temperature, -1)
        logq = torch.log_softmax(teacher_ND / temperature, -1)
        return temperature ** 2 * (
            logq.exp() * (logq - logp) - logq.exp() + logp.exp()).sum(-1)
    if kind == "cosine":   # 1 - cos, as half the squared distance of unit vectors
        student_ND = nn.functional.normalize(student_ND)
        teacher_ND = nn.functional.normalize(teacher_ND)
        return (student_ND - teacher_ND).square().sum(-1) / 2
    error_N = (student_ND - teacher_ND).square().mean(-1)
    if kind == "relative":   # |s - t|^2 / |t|^2: a sink, 100 times as large, weighs as any token
        size_N = teacher_ND.square().mean(-1)
        # a state of zeros (padding_idx) has no size: it counts nothing
        error_N = error_N / size_N.masked_fill(size_N < 1e-8, math.inf)
    return error_N


def block_loss(run, pairs, model, batch, teacher_layers, denominator):
    """-> the sum of the blocks' mean errors; ce and kl, which are 0."""
    loss = sum(error_N.sum() / denominator for error_N, *_ in
               block_errors(run, pairs, model, batch, teacher_layers))
    return loss, *loss.new_zeros(2)


# ---- how near the blocks are


ORDINARY = 3   # times the median |t| of its batch: a state above that is a sink's


def measure_blocks(run):
    """How far every block is on held-out rows, now: shown and logged.
    loss: the mean error of a token. explained: the share of the teacher's variance that the student
    has, below 0 where the mean of t would be nearer."""
    pairs = run.student.pairs
    means = iter(mean_over_rows(
        run.student, functools.partial(sums_of_blocks, run),
        functools.partial(run.teacher, around_blocks, pairs.values(), {}), run.eval_rows,
        run.batch_size, "real", "measuring the blocks"))
    figures = {"block/step": run.progress.step}
    rows = []
    for i, error, missed, variance in zip(pairs, means, means, means):
        explained = 1 - missed / max(variance, 1e-30)
        figures |= {f"block/{i}/loss": error, f"block/{i}/explained": explained}
        rows.append([f"{i}", f"{pairs[i]}", f"{error:.4g}", f"{explained:.1%}"])
    shown = table(["block", "teacher block", run.cfg.distill_loss_type, "explained"], rows)
    print0(f"\n{shown}\nexplained: of the variance of the teacher's states t, where |t| is at most "
           f"{ORDINARY} times its median")
    log(run, figures)


def sums_of_blocks(run, model, batch, teacher_layers, _):
    """Runs inside the student: -> for each block the sum of its errors, and over the ordinary
    positions those of |s - t|^2 and |t - mean|^2 (mean: of this batch). 0 of a batch of nothing."""
    sums = []
    for error_N, student_ND, teacher_ND in block_errors(
            run, run.student.pairs, model, batch, teacher_layers):
        size_N = teacher_ND.norm(dim=-1)
        ordinary_N = size_N <= ORDINARY * size_N.median()
        teacher_ND = teacher_ND[ordinary_N].double()
        sums += [error_N.sum(), (student_ND[ordinary_N] - teacher_ND).square().sum(),
                 (teacher_ND - teacher_ND.mean(0)).square().sum()]
    return sums


# ---- stitches, and the head


def stitching(cfg, config):
    """-> the function that makes a root of the student, which has beside the model root.pairs,
    {block of the student: block of the teacher}, and root.stitches, the linear maps between the
    widths: up<i> from its block i to the teacher's width, down<i> (block_input teacher) the other
    way. A checkpoint keeps them, final/ does not. A head that is to be trained is untied in its
    config from the embeddings, which the blocks build on."""
    shape = config.get_text_config()
    if getattr(shape, "tie_word_embeddings", False) and (
            cfg.train_lm_head or cfg.initialize_head_from_teacher):
        config.tie_word_embeddings = shape.tie_word_embeddings = False
        print0("blockwise: the student's head is untied from the embeddings, on which blocks build")
    teacher_shape = AutoConfig.from_pretrained(
        cfg.teacher, trust_remote_code=cfg.trust_remote_code).get_text_config()
    pairs = match_blocks(cfg, shape, teacher_shape)
    width = shape.hidden_size
    teacher_width = teacher_shape.hidden_size
    stitch = nn.Linear if cfg.use_stitching_layers else nn.Identity

    def make_root(model):
        root = ShardedRoot(model)
        root.pairs = pairs
        root.stitches = nn.ModuleDict()
        torch.manual_seed(cfg.seed)
        for i in pairs:
            # the last one becomes a part of the head, which mostly has no place for a bias
            folded = (i + 1 == len(pairs) and width != teacher_width
                      and cfg.initialize_head_from_teacher)
            root.stitches[f"up{i}"] = stitch(
                width, teacher_width, cfg.stitching_layer_bias and not folded)
        if cfg.block_input == "teacher":
            for i in pairs:
                root.stitches[f"down{i}"] = stitch(teacher_width, width, cfg.stitching_layer_bias)
        for p in root.stitches.parameters():
            if p.ndim == 1:
                nn.init.zeros_(p)
            elif width == teacher_width:
                nn.init.eye_(p)
            else:
                nn.init.xavier_uniform_(p)
        return root

    return make_root


def final_norm(model):
    """The last module beside the decoder layers with a weight of one dimension; Identity where
    there is none."""
    path, _ = layers_of(model)
    norm = nn.Identity()
    for module in model.get_submodule(path.rpartition(".")[0]).children():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            norm = module
    return norm


def head_and_gain(model):
    """Runs inside a root -> the head, and what the final norm multiplies by [D]. That shows on
    states of size 1, whatever its weight means (Gemma's is off by one)."""
    head = head_of(model)
    norm = final_norm(model)
    probe = torch.ones_like(head.weight[0])
    probe[1::2] = -1
    return head, (norm(probe).float() - norm(-probe).float()) / 2 * probe


@torch.no_grad()
def initialize_head(run, multipliers):
    """The teacher's norm and head at equal width. Else the head is weight * gain * stitch, on top
    of a norm that undoes the stitch's scale. What a LayerNorm adds is left to the head phase."""
    student = run.student
    output = student.model.get_output_embeddings()
    if output.weight not in multipliers or not all(multipliers.values()):
        print0("blockwise: the student's norm or head is frozen or still tied: both stay its own")
        return
    head, gain = run.teacher(head_and_gain)
    student_head, student_gain = student(head_and_gain)
    student.release()
    weight = head.weight.float()
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.float()
    if len(gain) != len(student_gain):
        stitch = full_tensor(student.stitches[f"up{max(student.pairs)}"].weight)
        weight = weight * gain @ stitch
        gain = len(gain) ** 0.5 / stitch.norm()
    scale = head.scale / student_head.scale
    for p, new in zip(output.parameters(), (weight, bias)):
        copy_from_rank0(p, torch.cat([new[:len(p)] * scale, full_tensor(p)[len(new):]]))
    # the norm's weight is moved by the difference, since what it means is not known
    for p, change in zip(final_norm(student.model).parameters(), [gain - student_gain]):
        copy_from_rank0(p, full_tensor(p) + change)


# --------------------------------------------------------------------------------------------------
# Optional: on_policy: in some of the steps the student writes the texts itself, after prompts out
# of that step's rows, and the teacher corrects them token by token: T^2 * divergence alone, since
# its own words are no labels. Hands on batches_by_student, which stands between batches and loop.


def batches_by_student(run, batches):
    """The same endless batches, but a share of on_policy of them, drawn by seed and step alone,
    holds what the student writes after their prompts. It writes when the loop asks for the batch:
    by the weights that it has then, not ahead, as rows are read. Block-wise phases before the last
    one keep their rows."""
    for micro, position in batches:
        if student_writes(run.cfg, run.progress.step) and run.stage is run.stages[-1]:
            micro = write_batches(run, micro)
        yield micro, position


def student_writes(cfg, step):
    return int(digest("on policy", cfg.seed, step), 16) < cfg.on_policy * 2**64   # of 64 bits


def write_batches(run, micro):
    """This rank's micro-batches of a step -> the same with the student's texts. What there was to
    see is added to the notes of the progress, so that a resumed run logs the same."""
    rows = [row for batch in micro for row in batch.rows]
    numbers = range(RANK, WORLD * len(rows), WORLD)   # in the global batch
    rows = rows_by_student(run.cfg, run.student, run.tokenizer, rows, run.progress.step, numbers)
    ends = end_ids(run.student.model, run.tokenizer)
    tokens = sum(row["targets"].sum() for row in rows)
    cut = sum(row["input_ids"][-1] not in ends for row in rows)
    run.progress.notes.setdefault("rollouts", []).append(all_sum(len(rows), tokens, cut))
    micro = micro_batches(run, rows)
    for batch in micro:
        batch.by_student = True
    return micro


def rows_by_student(cfg, root, tokenizer, rows, step, numbers):
    """Token rows -> token rows of which the targets are what a model writes after their prompts.
    They stay within seq_len; what is drawn follows from step and number."""
    prompts = [prompt_of(row, cfg) for row in rows]
    rooms = [min(cfg.max_new_tokens, cfg.seq_len - len(prompt)) for prompt in prompts]
    seeds = [int(digest("text", cfg.seed, step, number), 16) for number in numbers]
    texts = write_texts(root, prompts, seeds, rooms, cfg.on_policy_temperature,
                        end_ids(root.model, tokenizer), vocabulary_of(tokenizer))
    return [{"input_ids": np.array(prompt + text),
             "targets": np.repeat([False, True], [len(prompt), len(text)]),
             "starts": [0]} for prompt, text in zip(prompts, texts)]


def prompt_of(row, cfg):
    """The first tokens of plain text; of a conversation all before its last run of targets."""
    targets = row["targets"]
    begin = np.flatnonzero(targets[1:] > targets[:-1])[-1] + 1
    if begin == 1:   # all of it are targets: the first token never is
        begin = min(cfg.on_policy_prompt or max(1, cfg.seq_len // 4), len(targets) - 1)
    return row["input_ids"][:begin].tolist()


def take_rollout_figures(run):
    """Of what was written since the last line of the log; nothing where nothing was."""
    steps = run.progress.notes.pop("rollouts", [])
    if not steps:
        return {}
    texts, tokens, cut = map(sum, zip(*steps))
    return {"train/rollout_length": tokens / texts, "train/rollout_cut": cut / texts}


def loss_by_writer(loss_fn, model, batch, targets, denominator):
    """distil_loss, less its label term where the student wrote the batch."""
    if batch.by_student:
        loss_fn = functools.partial(loss_fn, alpha=0.0)
    return loss_fn(model, batch, targets, denominator)


OWN_TEXTS = 64   # of so many held-out rows, evenly spaced


def score_own_texts(cfg, root, teacher, tokenizer, rows):   # optional: eval
    """-> the mean divergence a token from the teacher on what a model writes after held-out
    prompts. teacher None: they have no vocabulary in common."""
    if teacher is None:
        return None
    if teacher is root:
        return 0.0
    count = min(OWN_TEXTS, len(rows))
    rows = {i: rows[i * len(rows) // count] for i in range(count)}
    # each rank writes in place of its rows of them, and reads no others
    for numbers, batch in held_out(rows, cfg.batch_size, "writing after held-out prompts"):
        written = rows_by_student(cfg, root, tokenizer, batch.rows, "held out", numbers)
        rows.update(zip(numbers, written))
    loss_fn = functools.partial(
        distil_loss, alpha=0.0, temperature=cfg.temperature, divergence=cfg.divergence,
        vocabulary=vocabulary_of(tokenizer))
    return mean_over_rows(root, loss_fn, teacher_targets(teacher), rows, cfg.batch_size, "labels",
                          "evaluating own texts")[0]


def check_writer(cfg, student, teacher, tokenizer):
    """Refuse a student that would not write what it believes. Its texts end where its own or the
    teacher's end: else it would learn ends at which it does not stop, and write on and on."""
    # beside a short prompt a long one goes on beyond seq_len; the last token is not looked up
    longest = cfg.seq_len + cfg.max_new_tokens - 1
    ids_1T = torch.arange(longest, device=DEVICE)[None] % vocabulary_of(tokenizer)
    with phase(f"trying student {cfg.student} as a writer, at up to {longest} positions"):
        probe(student, f"student {cfg.student!r} ({type(student.model).__name__}) writes something "
              "else beside a longer prompt, with a KV cache, than alone; on_policy needs another",
              writing_error, ids_1T)
    if cfg.teacher_url:   # optional: served
        return   # nobody knows its ends
    theirs = end_ids(teacher.model, load_tokenizer(cfg, cfg.teacher) or tokenizer)
    ends = end_ids(student.model, tokenizer) | theirs
    student.model.generation_config.eos_token_id = sorted(ends) or None   # final/ says so too


def writing_error(model, ids_1T):
    """Runs inside a root: the logits that a text is drawn from, after a prompt beside a longer one,
    and those of the same ids alone."""
    hidden_states(model, ids_1T)   # a table of positions that is too short fails here
    drawn_from = []

    def record(_, logits_BV):
        drawn_from.append(logits_BV)
        return logits_BV

    prompts = pad_left([range(3), range(8)])   # on the host, as texts are
    new = generate_ids(model, *prompts, 3, set(), record)
    alone_1T = torch.cat([ids_1T[:, :3], new[:1]], 1)   # 0 1 2 and what was written
    alone = model(input_ids=alone_1T, use_cache=False).logits[0, 2:-1]
    return torch.stack(drawn_from)[:, 0], alone


def rehearse_writing(run, stage, micro, seconds):
    """--dry_run: time a step whose texts the student writes -> seconds of a step on average."""
    if stage is not run.stages[-1]:
        return seconds
    for _ in range(2):   # the first warms up
        start = time.time()
        written = write_batches(run, micro)
        writing = time.time() - start
        learning, _ = time_step(run, stage, written)
    print0("the student wrote: " + show_targets(written[0].rows[0], run.tokenizer))
    print0(f"a step on policy takes {writing + learning:.2f} s, {writing:.2f} of them to write")
    return seconds + run.cfg.on_policy * (writing + learning - seconds)


# --------------------------------------------------------------------------------------------------
# Optional: generate: a model behind an API, or one of our own, answers prompts; filters judge the
# replies. replies.jsonl grows as they come; at the end of each run train.jsonl and rejected.jsonl
# are made of it anew: --dataset output_dir/train.jsonl --alpha 1 trains on the former. Prompts and
# filters stand first: they are made to be edited, and old replies are judged again for nothing.
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
THINGS = (
    "LRU cache, trie, tokenizer, diff tool, job scheduler, "
    "web crawler, state machine, CSV reader, URL router"
).split(", ")
TRAITS = (
    "thread-safe memory-bounded streaming resumable strict pluggable lazy minimal configurable"
).split()
LANGUAGES = "Python C C++ C# Go Java JavaScript Kotlin PHP Ruby Rust Swift TypeScript".split()
LEVELS = [
    "I am new to programming.", "I program every day.", "I am an expert, so go deep.",
]
LIMITS = [
    "Keep it short.", "Name the edge cases.", "State its cost.",
    "Give an example.", "Say why.", "Say what could fail.",
]
BUGS = {   # what stands in the code: what is put in its place
    " <= ": " < ",
    " >= ": " > ",
    " == ": " != ",
    " < ": " > ",
    " + ": " - ",
    " += ": " -= ",
    "[0]": "[1]",
}


@dataclass
class Job:
    """A prompt to ask."""
    messages: list       # [{"role": ..., "content": ...}, ...], the assistant's turn is next
    category: str
    prompt_id: str       # digest of the messages: the same in every run
    worst_usd: float     # the most that one try can cost
    cost: float = 0.0    # USD of its tries in this run, at their worst where nobody said


def stdlib_functions(rng):
    """Yields functions without a docstring, 7 to 30 lines long, of Python's own library."""
    sources = list(stdlib_sources())
    for _, text in rng.sample(sources, len(sources) // 3):   # parsing all takes 5 s
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                function = lines[node.lineno - 1:node.end_lineno]
                if 6 < len(function) <= 30:
                    yield textwrap.dedent("\n".join(function))


def compose_prompt(category, function, rng):
    """-> the text of a prompt, about this function where the task is about code; None: no fit."""
    # All is drawn, needed or not, in this order: another order gives other prompts, and a run that
    # is extended would not find its own again.
    bugs = [right for right in BUGS if right in function]
    bug = rng.choice(bugs) if bugs else None
    language = rng.choice(LANGUAGES[category == "translate":])   # not to the first, Python
    trait, thing, form, level, limit = map(rng.choice, (TRAITS, THINGS, FORMS, LEVELS, LIMITS))

    code = function
    if category == "complete":
        code = function[:len(function) // 2].rpartition("\n")[0]
    elif category == "debug":
        code = bug and function.replace(bug, BUGS[bug], 1)
    if not code:
        return None
    text = form.format(TASKS[category].format(language=language, thing=f"a {trait} {thing}"))
    if category != "implement":
        text += f"\n\n```python\n{code}\n```"
    return f"{text}\n\n{level} {limit}"


def compose_prompts(categories, seed):
    """Yields distinct (category, messages): asking for more only adds, so a run can be extended.
    categories: ["implement=3", "debug"]; none: all tasks alike."""
    weights = {}
    for item in categories or TASKS:
        name, _, weight = item.partition("=")
        weights[name] = float(weight or 1)
        if name not in TASKS or not 0 < weights[name] < math.inf:
            raise UserError(f"categories {item}: write NAME or NAME=WEIGHT, of {', '.join(TASKS)}")
    rng = random.Random(seed)
    functions = itertools.cycle(stdlib_functions(rng))
    asked = collections.Counter()
    seen = {None}   # which is no prompt
    misses = 0
    while misses < 1000:
        misses += 1
        # the category that is most behind its share
        name = min(weights, key=lambda category: (asked[category] + 1) / weights[category])
        function = next(itertools.islice(functions, rng.randrange(20), None))
        text = compose_prompt(name, function, rng)
        if text not in seen:
            misses = 0
            seen.add(text)
            asked[name] += 1
            yield name, [{"role": "user", "content": text}]
    raise UserError(f"category {name} has few more than {asked[name]:,} prompts; "
                    "lower num_examples or its weight")


def read_prompts(path):
    """Yields (category, messages) of the user's own prompts: lines of a .txt, rows of a .jsonl, or
    a list of rows in a .json; a row: {"prompt": TEXT} or {"messages": [...]}."""
    kind = Path(path).suffix
    with open(path, encoding="utf-8-sig") as f:
        lines = list(map(json.dumps, json.load(f)) if kind == ".json" else filter(str.strip, f))
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if ".json" in kind else {"prompt": line.strip()}
            turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            messages = [{"role": turn["role"], "content": text_of(turn["content"])}
                        for turn in turns]
            if messages[-1]["role"] == "assistant":
                raise ValueError("it ends with a reply")
            yield str(row.get("category", "own")), messages
        except Exception as e:
            raise UserError(f"{path!r}, row {number}: {one_line(e)}") from e


def usd(cfg, prompt_tokens, completion_tokens):
    """The prices are those of a million tokens."""
    return (prompt_tokens * (cfg.price_in or 0) + completion_tokens * (cfg.price_out or 0)) / 1e6


def all_prompts(cfg):
    """-> {prompt_id: Job} of num_examples different prompts, in the order they are asked."""
    count = cfg.num_examples or 100
    prompts = compose_prompts(cfg.categories, cfg.seed)
    if cfg.prompts_file:
        count = cfg.num_examples
        prompts = read_prompts(cfg.prompts_file)
    jobs = {}
    for category, messages in prompts:
        # each token is a byte or more, and as JSON a text has no fewer characters than bytes; the
        # chat format takes less than 64 a turn
        most_tokens = 64 * len(messages) + len(json.dumps(messages))
        worst_usd = usd(cfg, most_tokens, cfg.max_tokens)
        job = Job(messages, category, digest(messages), worst_usd)
        jobs[job.prompt_id] = job
        if len(jobs) == count:
            break
    if not jobs:
        raise UserError(f"prompts_file {cfg.prompts_file!r} holds no prompt")
    return jobs


# Filters: find_flaw lists them, in order.

CODE_BLOCK = re.compile(r"""(?xms)
    ^[ \t]* (?: [-*+][ ]+ | \d+[.)][ ]+ )?   # begins a line, or an item of a list
    (```+) [ \t]* (\w*) [^\n`]* \n           # the fence and its language
    (.*?)                                    # the code
    ^[ \t]* \1 `* [ \t]* $                   # closed by a fence at least as long
    """)

OPEN_FENCE = re.compile(r"""(?xm)
    ^[ \t]* ( [-*+][ ]+ | \d+[.)][ ]+ )?     # begins a line, or an item of a list
    ```+ [^`\n]* $                           # and nothing but its language beside it
    """)

REFUSAL = re.compile(r"""(?xi)
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
    """)


def plain_words(text):
    """The text in one line, without the marks of code blocks."""
    return " ".join(re.sub(r"(?m)```(\w*\s*$)?", " ", text).split())


def is_loop(reply):
    """A loop deflates to an eighth, code to a third."""
    data = reply.encode(errors="replace")
    # the end shows a reply that only ended in one
    return any(len(zlib.compress(part)) < len(part) / 8 - 40 for part in (data, data[-1000:]))


def is_broken_code(reply):
    """A code block that is never closed, or whose Python does not parse."""
    if OPEN_FENCE.search(CODE_BLOCK.sub("", reply)):
        return True
    for _, language, code in CODE_BLOCK.findall(reply):
        if not re.fullmatch("(?i)py(thon)?3?", language) or ">>>" in code:
            continue   # another language, or a session with its output
        try:
            with warnings.catch_warnings(action="ignore"):   # about odd escapes in the reply
                ast.parse(textwrap.dedent(code))
        except Exception:   # SyntaxError, ValueError, RecursionError, MemoryError
            return True
    return False


def find_flaw(prompt, reply, finish_reason, min_chars=1):
    """-> the first filter that rejects the reply, None: it passes"""
    reply = reply.replace("\r\n", "\n")
    asked = plain_words(prompt)
    said = plain_words(reply)
    # a short piece of the prompt may be just what it asks for
    is_as_long = len(asked) / 2 < len(said) < 1.2 * len(asked)
    refused = "```" not in reply and REFUSAL.match(said)
    flaws = {
        "cut off": finish_reason in ("length", "max_tokens", "model_context_window_exceeded"),
        "empty or too short": len(said) < min_chars,
        "repetition loop": is_loop(reply),
        "code does not parse": is_broken_code(reply),
        "refusal": refused or finish_reason in ("refusal", "content_filter"),
        "repeats the prompt": is_as_long and (said in asked or asked in said),
    }
    return next((name for name, found in flaws.items() if found), None)


def find_duplicate(prompt, reply, seen):
    """-> "duplicate" where more than 0.9 of the runs of 5 words stand in earlier replies, else None
    and they are seen (60 bytes a run)."""
    words = re.findall(r"\w+|[^\w\s]", reply.lower())
    runs = {hash(tuple(words[i:i + 5])) for i in range(len(words) - 4)}
    if len(words) < 20:   # a label answers many prompts, and each pair is an example of its own
        runs = {hash((prompt, *words))}
    if len(runs & seen) > 0.9 * len(runs):
        return "duplicate"
    seen |= runs


# Asking. spent_usd in summary.json is raised by the worst case before a try leaves, and lowered
# only by an answer or by a refusal. So at any moment, kill -9 included, what was billed <= what
# stands there <= max_cost. What a kill leaves in flight stays counted at its worst.

PAUSE = 1           # seconds between the first two tries of a request; each next one is doubled
MAX_COUNT = 10_000_000   # tokens: who says that a reply had more says nothing


@dataclass
class Asking:
    """What was spent, and what may make the run stop."""
    cfg: Config
    rows: dict            # by prompt_id, of earlier runs; none where nobody was ever answered
    spent_usd: float      # of all runs, with what is set aside for tries in flight
    stop_requests: list   # of stop_signals
    bar: tqdm
    patience: int         # more prompts that may fail in a row

    def change(self, job, change_usd):
        job.cost += change_usd
        self.spent_usd += change_usd
        write_json({"spent_usd": self.spent_usd}, f"{self.cfg.output_dir}/summary.json")

    def record(self, job, said):
        """said: {"reply", "finish_reason", "usage"}, or {"reason": why there is none}"""
        if said.get("usage"):   # else nobody knows, and the worst case stays
            self.change(job, usd(self.cfg, *said["usage"].values()) - job.worst_usd)
        if "reply" in said:
            self.patience = 9
            job.messages.append({"role": "assistant", "content": said.pop("reply")})
        else:   # what failed in an earlier run may always fail: it must not stop each later one
            self.patience -= job.prompt_id not in self.rows
        row = vars(job) | {"model": self.cfg.api_model or self.cfg.teacher} | said
        del row["worst_usd"]
        append_jsonl(f"{self.cfg.output_dir}/replies.jsonl", row)
        self.bar.update()
        if self.patience < 0:   # no other request would fare better
            self.stop_requests.append(1)
            raise UserError(f"{self.cfg.provider}, model {row['model']}: {row['reason']}")


def api_key(cfg):
    return os.environ.get(f"{cfg.provider.upper()}_API_KEY", "").strip() or "none"


def hide_key(cfg, text):
    """Some servers repeat what they are sent, in errors and in replies. A short one (none, EMPTY)
    is a word."""
    key = api_key(cfg)
    return text.replace(key, "***") if len(key) >= 8 else text


def request_body(cfg, messages):
    """-> what the provider's API takes for one conversation"""
    # OpenAI itself renamed it
    longest = "max_tokens" if cfg.api_base or cfg.provider != "openai" else "max_completion_tokens"
    body = {"model": cfg.api_model, "messages": messages, longest: cfg.max_tokens}
    if cfg.api_temperature is not None:
        body["temperature"] = cfg.api_temperature
    system = [turn["content"] for turn in messages if turn["role"] == "system"]
    if cfg.provider == "anthropic" and system:
        body["messages"] = [turn for turn in messages if turn["role"] != "system"]
        body["system"] = "\n\n".join(system)
    return body


def read_answer(cfg, text):
    """The JSON of an answer -> what record takes. Of a list of parts those that are text: what a
    model thought is not what it said. usage None: the server says nothing of it, or nonsense."""
    answer = json.loads(text)
    usage = answer.get("usage") or {}
    names = "input_tokens", "output_tokens"
    if cfg.provider == "openai":
        names = "prompt_tokens", "completion_tokens"
        answer = answer["choices"][0]
        answer |= answer["message"]
    usage = dict(zip(("prompt_tokens", "completion_tokens"), map(usage.get, names)))
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in usage.values()):
        usage = None
    content = answer["content"] or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if "text" in part)
    return {
        "reply": content,
        "finish_reason": answer.get("finish_reason") or answer.get("stop_reason"),
        "usage": usage,
    }


async def ask_api(asking, sdk, client, to_ask):
    """A worker. to_ask: what all of them take their jobs from; each is tried until there is an
    answer."""
    cfg = asking.cfg
    path = "/chat/completions" if cfg.provider == "openai" else "/v1/messages"
    for job in to_ask:
        for number in range(8):
            # after 0, 1, 2, 4, ..., 64 seconds, and not all at once
            await asyncio.sleep(PAUSE * (2**number // 2) * random.uniform(0.7, 1))
            too_much = asking.spent_usd + job.worst_usd > (cfg.max_cost or math.inf)
            if asking.stop_requests or too_much:
                return
            asking.change(job, job.worst_usd)
            answer = ""
            try:
                # as text: a server may say what the SDK's types would hide. Its own time-out is
                # one of each read, which a trickle never meets
                request = client.post(path, cast_to=str, body=request_body(cfg, job.messages))
                answer = hide_key(cfg, await asyncio.wait_for(request, cfg.request_timeout))
                said = read_answer(cfg, answer)
                break
            except Exception as e:   # read_answer's: paid for, as where "your credits are used up"
                if isinstance(e, sdk.APIStatusError) and e.status_code < 500:
                    asking.change(job, -job.worst_usd)   # free. All else may be on the bill
                words = hide_key(cfg, f"no reply (a try has {cfg.request_timeout:g} s): "
                                      f"{one_line(e, MAX_COUNT)} {answer}")[:340]
                said = {"reason": f"failed: {UserError(words)}"}   # as a terminal may show it
                asking.bar.set_postfix_str(said["reason"])
                if not isinstance(e, (TimeoutError, sdk.APIConnectionError, sdk.RateLimitError,
                                      sdk.InternalServerError)):
                    break   # it would not pass
        asking.record(job, said)


async def ask_all_api(asking, jobs):
    """In this order, cfg.concurrency at a time, until all is answered, a stop, or max_cost."""
    cfg = asking.cfg
    sdk = importlib.import_module(cfg.provider)
    with phase(f"making a client of {cfg.provider}"):   # by the environment: proxies, certificates
        client = sdk.AsyncClient(
            api_key=api_key(cfg), base_url=cfg.api_base, timeout=None,
            max_retries=0,   # ask_api tries again, because it knows about money
            # of its own making, it has a destructor that fails where its making failed
            http_client=sdk.DefaultAsyncHttpxClient())
    to_ask = iter(jobs)
    async with client:
        workers = [ask_api(asking, sdk, client, to_ask) for _ in jobs[:cfg.concurrency]]
        # all that is paid is kept, also where one of them fails
        for error in filter(None, await asyncio.gather(*workers, return_exceptions=True)):
            raise error


def ask_all_local(asking, jobs):
    """In this order, cfg.concurrency at a time, until all is answered or a stop."""
    cfg = asking.cfg
    with phase(f"reading teacher {cfg.teacher}"):
        tokenizer = load_tokenizer(cfg, cfg.tokenizer, cfg.teacher)
        if tokenizer is None:
            raise UserError(f"teacher {cfg.teacher!r} has no tokenizer: another --teacher, or "
                            "--tokenizer")
        tokenizer.chat_template = tokenizer.chat_template or (
            "{{bos_token}}{%for m in messages%}{{m.content}}\n\n{%endfor%}")
        prompts = [
            tokenizer.apply_chat_template(
                job.messages, add_generation_prompt=True, return_dict=False)
            for job in jobs]
        teacher, _ = load_model(cfg, "teacher")
        check_model(teacher, f"teacher {cfg.teacher!r}", max(map(len, prompts)) + cfg.max_tokens,
                    False)
    ends = end_ids(teacher.model, tokenizer)
    temperature = cfg.api_temperature
    if temperature is None:
        temperature = 1.0
        with contextlib.suppress(OSError):   # there is no generation_config.json
            usual = transformers.GenerationConfig.from_pretrained(cfg.teacher)
            temperature = usual.temperature or 1.0
    to_ask = zip(jobs, prompts)
    while some := list(itertools.islice(to_ask, cfg.concurrency)):
        if asking.stop_requests:
            break
        texts = write_texts(
            teacher, [prompt for _, prompt in some],
            # what it says hangs on seed and prompt alone: a resumed run draws the same
            [cfg.seed ^ int(job.prompt_id, 16) for job, _ in some],
            [cfg.max_tokens] * len(some), temperature, ends, vocabulary_of(tokenizer))
        for (job, prompt), ids in zip(some, texts):
            asking.record(job, {
                "reply": tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "finish_reason": "stop" if ids[-1] in ends else "length",
                "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
            })


# Files


def read_replies(path):
    """-> {prompt_id: its last row}. Half a row, as a kill leaves it, is none."""
    rows = {}
    with open(path, "a+b") as f:
        f.write(b"\n")   # so that what comes is no part of it
        f.seek(0)
        for line in f:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows[row["prompt_id"]] = row
    return rows


def sort_out(asking, jobs):
    """Judge all replies anew -> train.jsonl and rejected.jsonl, in the order of the prompts, and
    say what became of them."""
    cfg = asking.cfg
    rows = dict.fromkeys(jobs) | read_replies(f"{cfg.output_dir}/replies.jsonl")
    fates = collections.Counter()
    lines = {"train": [], "rejected": []}
    seen = set()
    for row in filter(None, rows.values()):
        if "reason" not in row:
            *_, prompt, reply = [turn["content"] for turn in row["messages"]]
            # own prompts may want a word or a label
            flaw = (find_flaw(prompt, reply, row["finish_reason"], 1 if cfg.prompts_file else 20)
                    or find_duplicate(prompt, reply, seen))
            if flaw:
                row["reason"] = flaw
        fates[row.get("reason", "kept").partition(":")[0]] += 1
        name = "rejected" if "reason" in row else "train"
        lines[name].append(json.dumps(row, ensure_ascii=False) + "\n")
    for name in lines:
        aside = Path(f"{cfg.output_dir}/{name}.tmp")
        aside.write_text("".join(lines[name]), encoding="utf-8", errors="replace")
        aside.replace(f"{cfg.output_dir}/{name}.jsonl")
    write_json({"spent_usd": asking.spent_usd, **fates}, f"{cfg.output_dir}/summary.json")
    print0(table(["what became of it", "prompts"], [[name, f"{fates[name]:,}"] for name in fates]))
    print0(f"asked {fates.total():,} of {len(jobs):,} prompts, in all for {asking.spent_usd:.4f} "
           f"USD at the prices given (max_cost {cfg.max_cost}); the same command goes on; "
           f"--dataset {cfg.output_dir}/train.jsonl trains on what is kept")


def generate(cfg):
    """Ask what has no reply yet; leave replies.jsonl, and what is made of it, in output_dir."""
    with phase(f"reading {cfg.prompts_file or 'functions to ask about'} and {cfg.output_dir}"):
        jobs = all_prompts(cfg)
        rows = read_replies(f"{cfg.output_dir}/replies.jsonl")
        config_there = read_json(f"{cfg.output_dir}/config.json", {})
        spent_usd = read_json(f"{cfg.output_dir}/summary.json", {"spent_usd": 0.0})["spent_usd"]
        done = {name for name in rows if "reason" not in rows[name]}
        if done:
            refuse_changes(config_there, config_there | result_knobs(cfg), cfg.output_dir,
                           way_out="choose another --output_dir")
    write_json(knobs_of(cfg), f"{cfg.output_dir}/config.json")

    to_ask = [job for job in jobs.values() if job.prompt_id not in done]
    print0(f"{len(to_ask):,} of {len(jobs):,} prompts to ask, for at most "
           f"{sum(job.worst_usd for job in to_ask):.2f} USD at the prices given; a stop waits for "
           "what is in flight, which may be paid for")
    with tqdm(total=len(to_ask), unit="prompt") as bar, stop_signals() as stop_requests:
        asking = Asking(
            cfg, rows if done else {}, spent_usd, stop_requests, bar, 9 if done else 0)
        try:
            if cfg.provider != "local":
                asyncio.run(ask_all_api(asking, to_ask))
            elif to_ask:
                ask_all_local(asking, to_ask)
        finally:
            sort_out(asking, jobs)


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
    seconds="seconds of training", parameters="parameters", disk="bytes on disk",
    prefill="prefill tokens/s", generation="generation tokens/s", memory="peak memory, bytes",
)
LEGEND = (
    "In brackets 95 % (bootstrap over sequences); x: of the teacher. Prefill: a batch of "
    "sequences; generation: batch 1; memory: while generating, GPUs only. A checkpoint is as large "
    "as its final/ will be. Layers (in report.png): the share of the teacher's variance that the "
    "best linear map from a layer leaves unexplained, and linear CKA. A model with another "
    "tokenizer continues a beginning that ends a few bytes elsewhere."
)
AGAINST = "- student against {}: {difference:+.4f} bits a byte ({:+.4f} to {:+.4f}): {verdict}"
PANELS = {   # of the picture: title, x
    "Training\nnats a token: CE, KL (dotted), held-out CE (markers)": "step",
    "Layers against the teacher's\nshare unexplained, CKA (dotted)": "layer",
    "Quality against size\nbits a byte, held out, and 95 %": "parameters",
    "Reliability\nshare right": "confidence",
}
CURVES = {   # panel, line; o is the model's marker
    "train/ce_loss": (0, "-"), "train/kl_loss": (0, ":"), "eval/ce_loss": (0, "o"),
    "unexplained": (1, "o-"), "CKA": (1, "o:"), "reliability": (3, "o-"),
}


# ---- which models, and the rows of each


def is_checkpoint(name):
    return Path(name, "state.json").exists()


def load_any(cfg, name):
    """A model, or checkpoints/step-... of a run in progress: its student, as that run builds it.
    Whether code of strangers runs is for this run to say."""
    if not is_checkpoint(name):
        return load_model(dataclasses.replace(cfg, teacher=name), "teacher")[0]
    path, state = find_checkpoint(name, name)
    knobs = state["config"] | dict(dtype=cfg.dtype, trust_remote_code=cfg.trust_remote_code)
    knobs.pop("cache", None)   # optional: cache
    root, _ = load_model(Config(**knobs), "student")
    load_checkpoint(path, tensors_of(root, {}, {}))
    return root


def read_curves(name):
    """{key: [(step, value), ...]}, losses and seconds, from log.jsonl of the run that a model
    directory or a checkpoint is of; nothing where there is none."""
    path = Path(name, "../.." if is_checkpoint(name) else "..", "log.jsonl")
    text = path.read_text("utf-8") if path.is_file() else ""
    curves = collections.defaultdict(list)
    for entry in map(json.loads, text.split("\n")[:-1]):   # a run may be writing its last one
        for key, value in entry.items():
            # 0: there is no such term; None: not finite
            if key.endswith(("loss", "/seconds")) and value:
                curves[key].append((entry[f"{key.split('/')[0]}/step"], value))
    return curves


def rows_for(cfg, name, tokenizer, rows):
    """-> the rows as a model reads them, its tokenizer. Where that cuts like `tokenizer` it is that
    one; else the rows are the same bytes, after its BOS, or EOS where it has none, in place of the
    first token, which is never counted."""
    other = load_tokenizer(cfg, name) or tokenizer
    try:
        compare_tokenizers(other, tokenizer, name, cfg.teacher)
        return rows, tokenizer
    except UserError:
        if not all(row["targets"][1:].all() for row in rows):
            raise UserError(f"{name!r} has another tokenizer than the teacher: they are compared "
                            "on plain text; here prompts are masked")
    eos = tokenizer.eos_token or "\0"
    begin = bos_of(other) or [other.eos_token_id or 0]
    retokenized = []
    for row in rows:
        text = tokenizer.decode(row["input_ids"][1:]).replace(eos, other.eos_token or "")
        ids = np.array([*begin, *other.encode(text, add_special_tokens=False)])
        retokenized.append(dict(input_ids=ids, targets=np.arange(len(ids)) > 0, starts=[0]))
    return retokenized, other


def beginnings(rows):
    """Of three rows (fewer where there are fewer): up to the first target, and at least 32 ids."""
    return [row["input_ids"][:max(32, row["targets"].argmax())].tolist()
            for row in rows[::math.ceil(len(rows) / 3)]]


# ---- one model: scores, layers, speed


def score(cfg, root, reference, rows, vocabulary, what):
    """One pass over the rows of all ranks, over the ids below vocabulary: padded tails are cut. As
    compare_layers, it is called within evaluating().
    -> sums a sequence [rows, 6]: tokens, -log p, top-1 right, top-1 the reference's, KL to it (with
    its T^2), confidence (p of the top-1); and sums a bin of that [BINS, 3]: tokens, hits, it."""
    sums = torch.zeros(len(rows) + BINS, 6, dtype=torch.float64)   # of sequences, then of bins
    for numbers, batch in held_out(rows, cfg.batch_size, what):
        said = root(counted_hidden, batch)
        reference_said = reference(counted_hidden, batch)
        row_N = numbers.start + WORLD * (batch.positions.cpu() // batch.input_ids.shape[1])
        # six fp32 [C, V] at a time
        for part_C in torch.arange(len(row_N)).split(max(1, LOGITS_BUDGET // (24 * vocabulary))):
            logits_CV = head_logits(*tokens_of(said, part_C), vocabulary)
            reference_CV = head_logits(*tokens_of(reference_said, part_C), vocabulary)
            labels_C = batch.labels[part_C].to(DEVICE)
            best, top = logits_CV.max(-1)
            log_total = logits_CV.logsumexp(-1)
            logp, logq = [torch.log_softmax(z_CV / cfg.temperature, -1)
                          for z_CV in (logits_CV, reference_CV)]
            terms_C6 = torch.stack([
                torch.ones_like(best),
                log_total - logits_CV.gather(1, labels_C[:, None])[:, 0],
                top == labels_C,
                top == reference_CV.argmax(-1),
                torch.linalg.vecdot(logq.exp(), logq.sub_(logp)) * cfg.temperature**2,
                (best - log_total).exp(),
            ], 1).double().cpu()
            sums.index_add_(0, row_N[part_C], terms_C6)
            bin_C = (terms_C6[:, 5] * BINS).long().clamp(max=BINS - 1)
            sums.index_add_(0, len(rows) + bin_C, terms_C6)
    dist.all_reduce(sums, group=HOST)
    return sums[:-BINS].numpy(), sums[-BINS:, [0, 2, 5]].tolist()


def layer_outputs(model, batch):
    """Runs inside a root: [N, D] of the counted tokens after each layer."""
    _, *states = model.base_model(   # the first is of the embeddings
        batch.input_ids, use_cache=False, output_hidden_states=True).hidden_states
    return [state_BTD.flatten(0, 1)[batch.positions] for state_BTD in states]


def compare_layers(root, teacher, batch):
    """How much each layer of a student tells of the teacher's layer at its depth."""
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
    x_ND = x_ND.double()
    y_NE = y_NE.double()
    x_ND -= x_ND.mean(0)
    y_NE -= y_NE.mean(0)
    xx = x_ND.T @ x_ND
    xy = x_ND.T @ y_NE
    cka = (xy.norm() ** 2 / xx.norm() / (y_NE.T @ y_NE).norm()).item()
    # Fitted on the tokens that it is judged on: each row of the map and its bias explain one token
    # for nothing, and those are left out of the average.
    tokens, width = x_ND.shape
    if tokens <= width + 1:
        return None, cka
    missed = y_NE - x_ND @ torch.linalg.pinv(xx, hermitian=True) @ xy
    missed *= math.sqrt(tokens / (tokens - width - 1))
    return (missed.square().mean() / y_NE.square().mean()).item(), cka


def try_out(root, tokenizer, rows, batch_size, limit):
    """-> tokens a second, and [greedy, sampled] continuations of each beginning. limit: how long a
    row may become."""
    def write(prompts, new, temperature=0.0):
        """-> seconds, ids: in full, whatever ends in them."""
        rooms = [min(new, limit + 1 - len(prompt)) for prompt in prompts]   # the last is not read
        start = time.time()
        ids = write_texts(root, prompts, range(len(prompts)), rooms, temperature, set(),
                          vocabulary_of(tokenizer))
        return time.time() - start, ids

    prompts = beginnings(rows)
    _, greedy = write(prompts, NEW_TOKENS)
    _, sampled = write(prompts, NEW_TOKENS, temperature=1.0)
    eos = tokenizer.eos_token or "\0"
    texts = [[text.split(eos)[0] for text in tokenizer.batch_decode(pair)]
             for pair in zip(greedy, sampled)]
    batch = [row["input_ids"] for row in rows[:batch_size]]
    reading, _ = min(write(batch, 1) for _ in range(3))
    writing, _ = min(write(prompts[:1], NEW_TOKENS) for _ in range(3))
    return dict(prefill=sum(map(len, batch)) / reading, generation=len(greedy[0]) / writing,
                texts=texts)


def measure_model(cfg, label, name, teacher, tokenizer, rows):
    """-> root, figures. teacher: None where this is the teacher."""
    allocated = torch.cuda.memory_allocated()
    with phase(f"reading {label} {name}"):
        root = load_any(cfg, name)
        curves = read_curves(name) if teacher else {}   # its own are of another run
        rows, own_tokenizer = rows_for(cfg, name, tokenizer, rows)
        limit = max(len(row["input_ids"]) for row in rows)
        check_model(root, f"{label} {name!r}", limit, packed=False)
    same = own_tokenizer is tokenizer or None   # None: what needs one vocabulary is unknown
    teacher = teacher or root
    reference = teacher if same else root
    layers = []
    with evaluating(teacher), evaluating(root):
        sums, bins = score(
            cfg, root, reference, rows, vocabulary_of(own_tokenizer), f"evaluating {label}")
        print0(f"layers of {label}, then what it writes, by the clock ...")
        if reference is not root:   # on the same rows on every rank
            layers = compare_layers(root, teacher, collate(rows[:8192 // cfg.seq_len + 1]))
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    trial = try_out(root, own_tokenizer, rows, cfg.batch_size, limit)
    parameters = root.model.num_parameters()
    # a hub name, or a checkpoint, whose files hold more than the weights: as saved
    disk = sum(file.stat().st_size for file in Path(name).glob("model*.safetensors"))
    figures = dict(name=name, same_tokenizer=same, parameters=parameters,
                   disk=disk or parameters * compute_dtype(cfg).itemsize,
                   memory=torch.cuda.max_memory_allocated() - allocated or None,
                   layers=layers, sums=sums, bins=bins, curves=curves, **trial)
    figures["own"] = score_own_texts(   # optional: on_policy
        cfg, root, same and teacher, tokenizer, rows)
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
        picks = rng.choice(n, n)
        off.append(top[picks].sum() / bottom[picks].sum() - middle)
    # The bootstrap's variance is (n - 1) / n of what it estimates; t's 97.5 % point with n - 1
    # degrees of freedom is about 1 + 1.21 / (n - 1) times the normal's.
    widen = math.sqrt(n / (n - 1)) * (1 + 1.21 / (n - 1))
    return middle, *(middle + widen * np.quantile(off, (0.025, 0.975)))


def judge_models(models, sizes, seed):
    """Adds to the figures of each model those of its sums a sequence (see score) and of the bytes
    of each, the student's lead over it, and the points of its curves."""
    student_nats = models["student"]["sums"][:, 1]
    for figures in models.values():
        sums = figures.pop("sums")
        counts, nats, *_ = sums.T
        tokens, _, right, agreed, kl, _ = sums.sum(0).tolist()
        figures["perplexity"], *figures["perplexity_95"] = [
            math.exp(min(x, 700)) for x in interval(nats, counts, seed)]
        figures["bits"], *figures["bits_95"] = interval(nats / math.log(2), sizes, seed)
        difference, low, high = interval((student_nats - nats) / math.log(2), sizes, seed)
        verdict = "no significant difference"
        if high < 0:
            verdict = "better"
        elif low > 0:
            verdict = "worse"
        _, figures["seconds"] = figures["curves"].get("train/seconds", [(0, None)])[-1]
        same = figures.pop("same_tokenizer")
        bins = figures["bins"]
        layers = figures["layers"]
        figures.update(
            tokens=int(tokens), accuracy=right / tokens,
            agreement=same and agreed / tokens, kl=same and kl / tokens,
            ece=sum(abs(hits - p) for _, hits, p in bins) / tokens,
            student_against_it=dict(difference=difference, interval=[low, high], verdict=verdict))
        figures["curves"].update(
            unexplained=[(layer["student"], layer["share"]) for layer in layers],
            CKA=[(layer["student"], layer["cka"]) for layer in layers],
            reliability=[(p / n, hits / n) for n, hits, p in bins if n])


# ---- the report


def draw_report(path, models):
    """Markers tell models apart in grey too."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for panel, (title, x) in zip(panels, PANELS.items()):
        panel.set(title=title, xlabel=x)
    _, layers, quality, reliability = panels
    layers.locator_params("x", integer=True)
    reliability.plot([0, 1], "0.85")
    for i, (label, figures) in enumerate(models.items()):
        marker = "sD^o"[i % 4]
        for key, (panel, line) in CURVES.items():
            points = figures["curves"].get(key)
            if points:
                panels[panel].plot(*zip(*points), line.replace("o", marker), color=f"C{i}")
        size = figures["parameters"] * 1.05**i   # aside a little: models of one size are common
        quality.semilogx([size] * 3, [*figures["bits_95"], figures["bits"]], marker + "-",
                         color=f"C{i}", label=label)
    figure.legend(loc="outside lower center", ncols=len(models))
    figure.savefig(path)


def show_number(x):
    if x is None:
        return "-"
    return f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"


def show_figure(figures, teacher, key):
    """The cell of a model in the table: value (low to high), so many x of the teacher's."""
    value = figures[key]
    shown = show_number(value)
    if key + "_95" in figures:
        low, high = map(show_number, figures[key + "_95"])
        shown += f" ({low} to {high})"
    if figures is not teacher and teacher[key] and value:   # the teacher's KL is 0
        shown += f", {show_number(value / teacher[key])} x"
    return shown


def write_report(folder, setting, models, prompts):
    """The beginning of report.md, verdicts and the table, is printed too. The picture comes last:
    what it is made from stands by then."""
    lines = [f"# {models['student']['name']}: the report\n"]
    for label, figures in models.items():
        against = figures["student_against_it"]
        if label != "student":
            lines.append(AGAINST.format(label, *against["interval"], **against))
    rows = [[title, *[show_figure(figures, models["teacher"], key) for figures in models.values()]]
            for key, title in METRICS.items()]
    lines += ["", table(["", *models], rows), f"\nOf {setting}. {LEGEND}\n"]
    print0("\n".join(lines))
    lines.append("![report.png: training, layers, quality against size, reliability](report.png)")
    for i, prompt in enumerate(prompts):   # indented is code: nothing to escape
        lines.append(f"\n## Greedy, then sampled, after\n\n    {prompt!r}\n")
        for label, figures in models.items():
            lines += [f"    {label}: {text!r}" for text in figures["texts"][i]]
    Path(folder, "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    write_json(dict(setting=setting, models=models, prompts=prompts), f"{folder}/report.json")
    try:
        draw_report(f"{folder}/report.png", models)
    except ImportError:
        print0("No report.png: pip install matplotlib")


def report(cfg):
    """-> {label: figures}, which are in output_dir's report.md, report.json and report.png."""
    names = {"teacher": cfg.teacher, "student": cfg.student}
    if cfg.student == "demo":   # none was named
        names["student"] = f"{cfg.output_dir}/final"
    for path in cfg.compare:   # under the names of their folders
        label = Path(path.rstrip("/").removesuffix("/final")).name
        names[path if label in names else label] = path
    for label, name in names.items():   # a name that is no model is refused before any work
        if not is_checkpoint(name):
            with phase(f"looking for {label} {name}"):
                AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    tokenizer = load_tokenizer(cfg, cfg.tokenizer, cfg.teacher, names["student"])
    rows = list(load_data(cfg, tokenizer)[1])
    if len(rows) < 2:
        raise UserError(f"{cfg.dataset!r}: one held-out sequence has no interval; bring more text "
                        "or lower --seq_len")
    models = {}
    teacher = None
    for label, name in names.items():
        root, models[label] = measure_model(cfg, label, name, teacher, tokenizer, rows)
        teacher = teacher or root   # which comes first, and stays
        del root   # before the next one is read
    sizes = [   # of the counted text of each row, in UTF-8
        len(tokenizer.decode(row["input_ids"][row["targets"]], skip_special_tokens=True).encode())
        for row in rows]
    judge_models(models, np.array(sizes), cfg.seed)
    setting = dict(
        dataset=cfg.dataset, sequences=len(rows), bytes=sum(sizes), ranks=WORLD,
        device=DEVICE.type, dtype=str(compute_dtype(cfg)),
        temperature=cfg.temperature, batch_size=cfg.batch_size,
        own_texts=f"{cfg.divergence}, {cfg.max_new_tokens} tokens",   # optional: on_policy
    )
    prompts = tokenizer.batch_decode(beginnings(rows) if cfg.generate_comparisons else [])
    if RANK == 0:
        write_report(cfg.output_dir, setting, models, prompts)
    return models


# --------------------------------------------------------------------------------------------------
# Main: one mode, one function.


def main(argv=None):
    """The command line in this process -> the exit code."""
    return run_config(parse_or_exit(sys.argv[1:] if argv is None else argv))


def run_config(cfg):
    """Run what cfg asks for -> 0: done, or saved after a signal; 2: something the user can mend."""
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity_error()
        if RANK > 0:
            library.utils.logging.disable_progress_bar()
    try:
        with process_group(), contextlib.ExitStack() as stack:
            if from_rank0(knobs_of(cfg)) != knobs_of(cfg):
                raise UserError(f"rank {RANK} was started with other flags than rank 0")
            if not (cfg.dry_run or cfg.mode == "cache"):   # which marks its cache_dir
                mode = cfg.mode.replace("eval", "train")   # a report lies beside its run
                stack.enter_context(claim(cfg.output_dir, mode))
            choose_mode(cfg)(cfg)
        return 0
    except UserError as e:
        return explain(cfg, e, f"{e}")
    except torch.OutOfMemoryError as e:
        return explain(cfg, e, f"rank {RANK} ran out of memory; turn {MEMORY_ADVICE}")
    except OSError as e:   # a full disk, or one that went away
        return explain(cfg, e, f"{one_line(e, 300)}; what was finished stays, the same command "
                       "without --resume goes on")
    except KeyboardInterrupt:   # before there was anything to save, or all of it is
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
        with contextlib.suppress(OSError):
            print(f"\nerror: {words}", file=sys.stderr)   # not behind a bar
        if cfg.debug:
            traceback.print_exception(error)
        elif (folder / MARK).exists():
            with contextlib.suppress(OSError), open(folder / "error.log", "a") as f:
                traceback.print_exception(error, file=f)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, ON_INTERRUPT)
    code = run_config(CONFIG)
    for stream in filter(None, (sys.stdout, sys.stderr)):   # None: it was never open
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)   # an orderly end waits for ranks that are gone, and once crashed in a library
