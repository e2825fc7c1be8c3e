#!/usr/bin/env python
"""Distil a large language model into a small one: the whole trainer, top to bottom, to be read, copied and changed.

    python simple_distill.py                                                     # the demo: no download, no GPU
    python simple_distill.py --teacher T --student S --dataset D                 # online distillation
    python simple_distill.py --mode cache --teacher T --dataset D --cache_dir C  # run the teacher once ...
    python simple_distill.py --student S --cache_dir C                           # ... and train from disk
    python simple_distill.py --teacher T --student S --dataset D --blockwise     # block by block, then the head
    python simple_distill.py --mode generate --api_model M                       # a dataset from an API teacher
    python simple_distill.py --mode eval --student out/final --teacher T --dataset D --compare OTHER
    ./launch.sh ...                                                              # the same on many devices

Rooms, in order: runtime, losses, data, demo, teacher cache, teacher signal, models and FSDP, optimiser, checkpoints,
block-wise, API data, evaluation, train, main. What needs no torch (flags and their checks, file formats, plans in
numbers, words and tables) is config.py's. Shape suffixes: B sequences, T positions, N counted tokens, C those of a
chunk, D width, V vocabulary, K kept teacher entries a token.
"""
import ast
import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import functools
import glob
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import sysconfig
import textwrap
import time
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import datasets
import huggingface_hub
import numpy as np
import safetensors.numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler

from config import (FIELDS, GROUPS, INF, Config, UserError, default_of,
                    demo_knobs, one_line, parse_config, parse_multipliers, refuse, result_knobs, scheduler_kwargs)


# --------------------------------------------------------------------------------------------------
# Runtime: who am I, on which device. One process is rank 0 of 1 and takes the same path as many.
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")


def print0(*words):
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))   # through tqdm, so that a line never tears the bar


@contextlib.contextmanager
def process_group():
    """gloo beside NCCL: counts and flags travel between hosts without making the GPU wait."""
    if CUDA:
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")   # TF32
    else:   # glibc gives large blocks back at once, to page-fault them in anew: a quarter of a step's time
        with contextlib.suppress(AttributeError):
            for option, value in ((-4, 0), (-1, 2**31 - 1)):   # M_MMAP_MAX, M_TRIM_THRESHOLD
                ctypes.CDLL(None).mallopt(option, value)
    store = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=datetime.timedelta(days=1), **store)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def node_first():
    """The first rank of each node goes ahead (downloads, dataset caches), the others find its work done."""
    if LOCAL_RANK > 0:
        all_sum(0)
    try:
        yield
    finally:   # also after an error, which the others then meet themselves
        if LOCAL_RANK == 0:
            all_sum(0)


def all_sum(*values):
    """Sum Python numbers over ranks on the host."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_rank0(value):
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def digest(*things):
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else str(x)   # str leaves out the middle of a long array
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def write_json(cfg, path):
    aside = f"{path}.{os.getpid()}.tmp"   # workers of a cache may write at the same moment
    with open(aside, "w", encoding="utf-8") as f:
        json.dump(cfg if isinstance(cfg, dict) else dataclasses.asdict(cfg), f, indent=2)
    os.replace(aside, path)


def append_jsonl(path, row):
    with open(path, "a", encoding="utf-8", errors="replace") as f:   # half a surrogate pair cannot be written
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path):
    """The rows of a .jsonl, none where there is no file; half a last line, as a kill leaves it, is removed."""
    with open(path, "rb+") if os.path.exists(path) else io.BytesIO() as f:
        whole, newline, last = f.read().rpartition(b"\n")
        try:
            json.loads(last), f.write(b"\n")   # whole: only its newline was missing
            whole += newline + last
        except ValueError:
            f.truncate(len(whole + newline))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        explain_bad_file(path)


def sync(*paths):
    """Files or folders to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def take_lock(folder, wait=False):
    """-> what is wrong with the folder or None, and what gives it back: a folder that was made for nothing goes."""
    made, problem, handle = not os.path.isdir(folder), None, None
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        problem = None if os.access(folder, os.W_OK) else f"{folder!r} is not writable"
    except BlockingIOError:
        problem = f"another run is at work in {folder!r}"
    except OSError as e:
        problem = f"cannot use {folder!r} as a directory ({e.strerror})"

    def release():
        if handle is not None:
            os.close(handle)
            if made and not os.listdir(folder):
                os.rmdir(folder)
    return problem, release


@contextlib.contextmanager
def lock(folder, wait=False):
    """One run a directory; the kernel drops the lock with its process. One made for a refused run goes again."""
    problem, release = take_lock(folder, wait) if RANK == 0 else (None, lambda: None)
    problem = from_rank0(problem)
    try:
        if problem:
            raise UserError(f"{problem}; choose another --output_dir")
        yield
    finally:
        release()


@contextlib.contextmanager
def stop_signals():
    """SIGTERM or one Ctrl-C: finish the step, save, exit 0. A second one stops at once. Yields the list of askings."""
    asked, under_torchrun = [], "TORCHELASTIC_RUN_ID" in os.environ

    def ask(number, frame):   # torchrun repeats what the terminal has sent to everybody already
        if asked and not (under_torchrun and time.time() - asked[-1] < 2):
            raise KeyboardInterrupt
        asked.append(time.time())

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# --------------------------------------------------------------------------------------------------
# Losses: alpha * CE + (1 - alpha) * T^2 * KL over chunks of tokens, gradient formed on the spot. Change the objective
# in chunk_terms: it takes logits and hands on two losses a token and the gradient of the logits.
LOGITS_BUDGET = 512 * 2**20   # bytes of both heads' outputs at once; the fp32 terms come on top; more is hardly faster


class Head(NamedTuple):
    """What turns hidden states into logits: softcap * tanh(scale * (h @ weight.T + bias) / softcap)."""
    weight: torch.Tensor                   # [V, D]
    bias: Optional[torch.Tensor] = None    # [V]
    scale: float = 1.0                     # Cohere, Granite
    softcap: Optional[float] = None        # Gemma


class SparseTarget(NamedTuple):
    """A teacher from the cache: some tokens with their probabilities, and the mass of all others as one bucket."""
    ids: torch.Tensor       # [N, K] distinct in a row, or, where rest is 0, repeated: their probabilities add up
    probs: torch.Tensor     # [N, K]
    rest: torch.Tensor      # [N] mass that is not listed: 0 for method sample, which is complete in expectation
    entropy: torch.Tensor   # [N] of the distribution that KL is measured to


def scale_and_softcap(raw, scale, softcap):
    """Head output -> fp32 logits (a bf16 log-softmax has a floor of 0.02 nats), and d(logits)/d(raw)."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    logits = logits if scale == 1.0 else logits * scale
    if softcap is None:
        return logits, scale
    bent = torch.tanh(logits / softcap)
    return bent * softcap, (1 - bent * bent) * scale


def exponentials(x, temperature=1.0):
    """-> (x - max) / T, its exp, and the sum of that: a softmax before its division, so that nothing is done twice."""
    x = x - x.amax(-1, keepdim=True)
    x = x if temperature == 1 else x.div_(temperature)
    e = x.exp()
    return x, e, e.sum(-1, keepdim=True)


def chunk_terms(student_CV, labels_C, target, *, alpha, temperature, divergence, student_bend, teacher_bend):
    """Head outputs of a chunk -> ce [C], kl [C] (with its T^2), and d(alpha*ce + (1-alpha)*kl)/d(student_CV). target:
    None, the teacher's head outputs [C, V], or a SparseTarget. In place where it can be: without a compiler each line
    over [C, V] is a pass through memory; with one they fuse into five."""
    logits, slope = scale_and_softcap(student_CV, *student_bend)
    z, p, total = exponentials(logits)   # log p = z - log(total)
    own_C1 = labels_C[:, None]
    ce, label_grad = (total.log() - z.gather(-1, own_C1))[:, 0], None
    share = alpha                        # of p that belongs to CE: at T 1 both terms share one softmax
    weight = (1 - alpha) * temperature   # the term's T^2 times the 1/T of its softmax
    if temperature != 1 and target is not None:
        label_grad, share = p.mul_(alpha / total), 0.0
        z, p, total = exponentials(z, temperature)
    p = p.div_(total)
    if target is None:
        kl, grad = torch.zeros_like(ce), p.mul_(alpha)
    elif isinstance(target, SparseTarget):   # -sum q log p - H, the rest of the mass as one bucket on both sides
        q, listed_logp = target.probs, z.gather(-1, target.ids) - total.log()
        listed_p = listed_logp.exp()
        rest_p = (1 - listed_p.sum(-1)).clamp_min(1e-7)
        kl = -(q * listed_logp).sum(-1) - target.entropy
        kl = kl - torch.where(target.rest > 0, target.rest * rest_p.log(), 0.0)
        keep = (1 - target.rest / rest_p)[:, None]   # method sample: 1, and repeated ids add nothing but their q
        grad = p.mul_(weight * keep + share).scatter_add_(-1, target.ids, weight * ((1 - keep) * listed_p - q))
    elif divergence == "mse":   # of logits, at temperature 1: a choice of the block-wise head phase
        error = logits - scale_and_softcap(target, *teacher_bend)[0]
        kl, grad = error.square().mean(-1), p.mul_(alpha).add_(error, alpha=2 * (1 - alpha) / error.shape[-1])
    else:
        t, q, its_total = exponentials(scale_and_softcap(target, *teacher_bend)[0], temperature)
        d, shift = t.sub_(z), (total / its_total).log()   # d + shift: log(q / p), exactly 0 where the two agree
        if divergence == "forward":
            kl = (d.mul_(q).sum(-1, keepdim=True) / its_total + shift)[:, 0]
            q = q.div_(its_total)
            grad = p.sub_(q, alpha=weight) if share + weight == 1 else p.sub_(q).mul_(weight) if share == 0 else \
                p.mul_(share + weight).sub_(q, alpha=weight)
        else:   # pull: log of the ratio of p to q or, of jsd, to their middle
            d, q = d.add_(shift), q.div_(its_total)
            pull = -d if divergence == "reverse" else (d.clamp_min(0) + (torch.expm1(-d.abs()) / 2).log1p_()).mul_(-0.5)
            other = 0.0 if divergence == "reverse" else torch.linalg.vecdot(q, d.mul_(0.5).add_(pull))
            mean = torch.linalg.vecdot(p, pull)
            kl, grad = mean + other, p.mul_(pull.sub_(mean[:, None]).mul_(weight).add_(share))
    if label_grad is not None:
        grad.add_(label_grad)
    grad.scatter_add_(-1, own_C1, grad.new_full(own_C1.shape, -alpha))
    grad = grad if isinstance(slope, float) and slope == 1.0 else grad * slope
    return ce, kl * temperature ** 2, grad.to(student_CV.dtype)


@functools.cache
def chunk_kernel(large, **terms):
    """chunk_terms, compiled where that pays (about 10 s once) and can be done: C++ compiler on CPU, Triton on CUDA."""
    eager = functools.partial(chunk_terms, **terms)
    run = torch.compile(eager) if large else eager
    def kernel(*args):
        nonlocal run
        for x in itertools.chain(args[:2], args[2] if isinstance(args[2], tuple) else args[2:]):
            x is None or torch._dynamo.maybe_mark_dynamic(x, 0)   # one compilation for any number of tokens
        try:
            return run(*args)
        except Exception as e:
            if run is eager or isinstance(e, torch.OutOfMemoryError):
                raise
            print0(f"loss: no working compiler ({type(e).__name__}), its element-wise part runs eagerly")
            run = eager
            return eager(*args)
    return kernel


def select_tokens(teacher, where):
    """The same tokens of (hidden states, head), of a SparseTarget or of None."""
    if isinstance(teacher, SparseTarget):
        return SparseTarget(*(x[where] for x in teacher))
    return teacher and (teacher[0][where], teacher[1])


class FusedDistillation(torch.autograd.Function):
    """Sums over tokens of loss, ce and kl. All matmuls, forward and backward, happen here; backward only scales."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, teacher, bend, alpha, temperature, divergence, chunk):
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        add_in_place = exact == hidden_ND.dtype and len(hidden_ND) > 0   # then the first chunk need not add to zeros
        fresh = torch.empty_like if add_in_place else torch.zeros_like
        grad_weight = fresh(weight_VD, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if need_bias else None
        sparse = isinstance(teacher, SparseTarget)
        kernel = chunk_kernel(len(weight_VD) >= 16384, alpha=alpha, temperature=temperature, divergence=divergence,
                              student_bend=bend,
                              teacher_bend=(1.0, None) if sparse or teacher is None else tuple(teacher[1][2:]))
        ce, kl = hidden_ND.new_zeros(2, dtype=torch.float64)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD, target = hidden_ND[part], select_tokens(teacher, part)
            if target is not None and not sparse:
                target = nn.functional.linear(target[0], target[1].weight, target[1].bias)
            ce_C, kl_C, grad_CV = kernel(nn.functional.linear(h_CD, weight_VD, bias_V), labels_N[part], target)
            ce, kl = ce + ce_C.sum(dtype=torch.float64), kl + kl_C.sum(dtype=torch.float64)
            del target
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0, dtype=exact)
            if need_hidden:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[part])
            if grad_weight is not None and add_in_place:
                grad_weight.addmm_(grad_CV.T, h_CD, beta=float(start > 0))
            elif grad_weight is not None:
                grad_weight += grad_CV.T @ h_CD
        ctx.grads, ctx.dtype = (grad_hidden, grad_weight, grad_bias), hidden_ND.dtype
        ce, kl = ce.to(exact), kl.to(exact)
        ctx.mark_non_differentiable(ce, kl)
        return alpha * ce + (1 - alpha) * kl, ce, kl

    @staticmethod
    def backward(ctx, scale, *_):
        into = functools.partial(torch.empty_like, dtype=ctx.dtype)
        return *(g if g is None else torch.mul(g, scale, out=into(g)) for g in ctx.grads), *[None] * 7


def distillation_loss(student_hidden, student_head, labels, teacher, *, alpha, temperature, divergence="forward",
                      denominator=None, chunk=None):
    """student_hidden [N, D], labels [N] with -100 = not counted -> loss, ce, kl, each divided by denominator.
    teacher: (teacher_hidden [N, Dt], teacher_head), a SparseTarget, or None at alpha 1. Labels may stay on the host:
    then dropping the uncounted positions does not make the GPU wait."""
    counted = (labels != -100).nonzero()[:, 0]
    denominator = max(len(counted), 1) if denominator is None else denominator
    weight, bias, *bend = as_head(student_head)
    if not torch.is_grad_enabled():   # needs_input_grad does not know of no_grad
        student_hidden, weight, bias = (x if x is None else x.detach() for x in (student_hidden, weight, bias))
    if len(counted) < len(labels):
        labels, counted = labels[counted], counted.to(student_hidden.device)
        student_hidden, teacher = student_hidden[counted], select_tokens(teacher, counted)
    labels = labels.to(student_hidden.device, non_blocking=True)
    if teacher is not None and not isinstance(teacher, SparseTarget):
        head = as_head(teacher[1])
        vocab = min(len(weight), len(head.weight))   # padded tails are cut, nothing is zero-padded
        cut = lambda x: None if x is None else x[:vocab]
        weight, bias, teacher = cut(weight), cut(bias), (teacher[0], Head(cut(head.weight), cut(head.bias), *head[2:]))
    chunk = chunk or max(1, LOGITS_BUDGET // (2 * max(student_hidden.element_size(), 2) * len(weight)))
    sums = FusedDistillation.apply(student_hidden, weight, bias, labels, teacher if alpha < 1 else None, tuple(bend),
                                   alpha, temperature, divergence, chunk)
    return tuple(x / denominator for x in sums)


def as_head(head):
    scale, softcap = getattr(head, "scale", None), getattr(head, "softcap", None)
    return Head(head.weight, getattr(head, "bias", None), float(scale or 1.0), softcap)


# --------------------------------------------------------------------------------------------------
# Data: any dataset -> rows of token ids (and which of them are targets) -> global batches that do not depend on the
# number of ranks. Hands on rows that can be indexed (or a stream), and Batch.
CONVERSATIONS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
PLAIN_TEMPLATE = ("{% for m in messages %}{{ m.content }}"
                  "{{ eos_token or '\n' if m.role == 'assistant' else '\n' }}{% endfor %}")


def load_tokenizer(cfg, *candidates):
    """--tokenizer, else the first of the candidates that has one, else None."""
    has_one = lambda name: not name.startswith("layers:") and not name.endswith(".json") and (
        not os.path.isdir(name) or glob.glob(os.path.join(glob.escape(name), "tokenizer*")))
    name = cfg.tokenizer or next(filter(has_one, candidates), None)
    try:
        return name and AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except Exception as e:
        why = "no such path" if name.startswith(("/", ".", "~")) and not os.path.exists(name) else one_line(e)
        raise UserError(f"{name!r} has no tokenizer that can be read ({why}); is the name right? --tokenizer names "
                        "another")


def compare_tokenizers(student, teacher, student_name, teacher_name):
    """By what they encode, not by size: an id that both use must mean the same token."""
    ours, theirs = ({i: t for t, i in x.get_vocab().items()} for x in (student, teacher))
    shared, probe = sorted(ours.keys() & theirs.keys()), "def f(x):\n    return x+1  # Größe 12345 résumé 日本"
    clash = [f"token {i} is {ours[i]!r} in one, {theirs[i]!r} in the other" for i in shared if ours[i] != theirs[i]]
    if not clash and (len(shared) < 2 or student(probe)["input_ids"] != teacher(probe)["input_ids"]):
        clash = ["they share a vocabulary but cut text differently"]
    if clash:
        raise UserError(f"student {student_name!r} and teacher {teacher_name!r} have different tokenizers: {clash[0]}. "
                        "Distil within one, or train on text that the teacher wrote (--mode generate, then --alpha 1)")


def conversation_of(row):
    """Any of the known column sets -> [{role, content}, ...], or None for plain text."""
    if isinstance(talk := row.get("messages") or row.get("conversations"), list):
        role = lambda m: {"human": "user", "gpt": "assistant"}.get(m.get("from"), m.get("role", m.get("from")))
        return [m if "content" in m else {"role": role(m), "content": m["value"]} for m in talk]   # ShareGPT's names
    for ask, answer in CONVERSATIONS:
        asked, answered = row.get(ask), row.get(answer)
        if isinstance(asked, (str, list)) and isinstance(answered, (str, list)):   # lists: of messages
            asked = f"{asked}\n\n{row['input']}" if ask == "instruction" and row.get("input") else asked
            turns = lambda role, x: x if isinstance(x, list) else [{"role": role, "content": x}]
            return turns("user", asked) + turns("assistant", answered)


def render(messages, tokenizer, marks):
    """A conversation as text, and the character spans of it that the assistant wrote, end marks included: what differs
    when it is rendered with that turn replaced. Any template will do, also one that changes earlier turns."""
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False,
                              chat_template=tokenizer.chat_template or PLAIN_TEMPLATE)
    text, spans = write(messages), []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and m.get("content"):
            other = write([*messages[:i], {**m, "content": "\ue000"}, *messages[i + 1:]])
            start = len(os.path.commonprefix([text, other]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            mark = next((s for s in marks if text[end:].lstrip().startswith(s)), "")
            spans.append((start, text.index(mark, end) + len(mark)))
    return text, spans


def rows_of(columns):
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def encode(columns, tokenizer, text_column, seq_len):
    """Raw rows -> token rows, both as columns. Texts are joined with EOS and cut into blocks of seq_len (the last of a
    call may be shorter); a conversation is a row of its own, and targets says which tokens the assistant wrote."""
    batch = rows_of(columns)
    talks = [c for c in map(conversation_of, batch) if c]
    if not talks:
        texts, eos = [row[text_column] for row in batch if row.get(text_column)], tokenizer.eos_token_id
        coded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        ids = [i for x in coded for i in (x if eos is None or x[-1:] == [eos] else [*x, eos])]
        blocks = [ids[i:i + seq_len] for i in range(0, len(ids) - 1, seq_len)]   # - 1: one token predicts nothing
        return {"input_ids": blocks, "targets": [None] * len(blocks)}
    added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    marks = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    talks = [render(c, tokenizer, marks) for c in talks]
    coded = tokenizer([text for text, _ in talks], add_special_tokens=not tokenizer.chat_template,
                      return_offsets_mapping=True, verbose=False)
    found = {"input_ids": [], "targets": []}
    for ids, offsets, (_, spans) in zip(coded["input_ids"], coded["offset_mapping"], talks):
        targets = [any(a < end and start < b for start, end in spans) for a, b in offsets][:seq_len]
        if any(targets[1:]):   # the first token has nothing to be predicted from
            found["input_ids"].append(ids[:seq_len])
            found["targets"].append(targets)
    return found


def encoder(cfg, tokenizer):
    return functools.partial(encode, tokenizer=tokenizer, text_column=cfg.text_column, seq_len=cfg.seq_len)


def tokenize(raw, tokenizer, cfg, what):
    """-> a memory-mapped dataset of rows, kept in the datasets cache under a fingerprint of all that shapes it."""
    its = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    code = [*map(inspect.getsource, (encode, render, conversation_of))]   # a fork that edits them gets what it wrote
    mark = digest(raw._fingerprint, digest(its, str(tokenizer.chat_template), code), cfg.text_column, cfg.seq_len)
    place = os.path.join(datasets.config.HF_DATASETS_CACHE, "simple_distill", f"{mark}.arrow")
    workers = min(cfg.num_proc or 1, len(raw))
    os.environ["TOKENIZERS_PARALLELISM"] = str(workers == 1).lower()   # its threads do not survive a fork
    list_of = lambda kind: datasets.List(datasets.Value(kind))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with explain_bad_rows(cfg.dataset, f"{what}: a row cannot be turned into tokens"), node_first():
        rows = raw.map(encoder(cfg, tokenizer), batched=True, remove_columns=raw.column_names,
                       num_proc=workers if workers > 1 else None, cache_file_name=place, new_fingerprint=mark,
                       features=datasets.Features(input_ids=list_of("int32"), targets=list_of("bool")))
    if len(rows) == 0:
        raise UserError(f"{what}: none of {len(raw)} rows has a target token (one-token rows, or no assistant turn?)")
    if rows[0]["targets"] is not None and len(rows) < len(raw):
        print0(f"{what}: dropped {len(raw) - len(rows)} of {len(raw)} rows, no target within seq_len {cfg.seq_len}")
    return rows.with_format("numpy")


def load_raw(cfg, split, streaming):
    """One split as rows of text or conversations; None where there is no such split."""
    name, kind = cfg.dataset, FILES.get(os.path.splitext(cfg.dataset)[1].lower())
    if kind and (not os.path.isfile(name) or os.path.getsize(name) == 0):
        raise UserError(f"dataset file {name!r} {'is empty' if os.path.isfile(name) else 'does not exist'}")
    if kind and split != "train":
        return None
    try:
        if kind:   # in a text file a blank line ends a document
            return datasets.load_dataset(kind, data_files={"train": name}, split="train", streaming=streaming,
                                         **({"sample_by": "paragraph"} if kind == "text" else {}))
        if any(os.path.exists(os.path.join(name, f)) for f in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            saved = saved.get(split) if isinstance(saved, dict) else saved if split == "train" else None
            return saved.to_iterable_dataset() if streaming and saved is not None else saved
        return datasets.load_dataset(name, cfg.dataset_config, split=split, streaming=streaming)
    except Exception as e:
        if "Unknown split" in str(e) or "Bad split" in str(e):
            return None
        explain_bad_file(name)
        tried = f"{kind} file" if kind else "hub dataset (no network, no access?), data file or save_to_disk directory"
        raise UserError(f"dataset {name!r} could not be read as {tried}: {one_line(e)}")


def load_splits(cfg):
    """-> raw rows of train (or a stream), those of eval. Without an eval split evenly spaced rows of train are held
    out; None where train is a single row: one long document."""
    raw, same = load_raw(cfg, cfg.train_split, cfg.streaming), cfg.eval_split == cfg.train_split
    held = None if same else load_raw(cfg, cfg.eval_split, cfg.streaming)
    if raw is None or held is None and not same and cfg.eval_split != Config.eval_split:
        missing = cfg.train_split if raw is None else cfg.eval_split
        raise UserError(f"dataset {cfg.dataset!r} has no split {missing!r}; name another, or leave eval_split out to "
                        "hold out a slice of train")
    head = lambda n: raw.take(n if cfg.streaming else min(n, len(raw)))
    with explain_bad_rows(cfg.dataset, f"dataset {cfg.dataset!r}: a row cannot be read"):
        few = list(head(100))   # a look at the stream itself would move it
    if not any(conversation_of(row) or isinstance(row.get(cfg.text_column), str) for row in few):
        raise UserError(f"dataset {cfg.dataset!r} has " + (
            f"no text in column {cfg.text_column!r} and no known conversation columns; it has {', '.join(few[0])}: "
            "name one with --text_column" if few else "no rows"))
    if cfg.max_samples:
        raw = head(cfg.max_samples)
    if held is not None and cfg.streaming:   # as much of it as eval_samples sequences need
        few, size = [], 0
        for row in held:
            few.append(row)
            size += len(str(row))   # a token is rarely more than 8 characters
            if len(few) >= cfg.eval_samples and size > 8 * cfg.eval_samples * cfg.seq_len:
                break
        held = datasets.Dataset.from_list(few)
    elif cfg.streaming:   # the head of the stream is kept back
        wanted = min(cfg.eval_samples, 256)
        few = list(raw.take(wanted + 1))
        held = datasets.Dataset.from_list(few[:wanted if len(few) > wanted else max(1, len(few) // 20)])
        raw = raw.skip(len(held))
    elif same and cfg.mode == "eval":
        held = raw
    elif held is None and len(raw) > 1:
        gap = max(2, len(raw) // min(cfg.eval_samples, max(1, len(raw) // 20)))
        kept = np.flatnonzero(np.arange(len(raw)) % gap != gap - 1)   # an array: a generator has no fingerprint
        held, raw = raw.select(range(gap - 1, len(raw), gap)), raw.select(kept)
    return raw, held


def load_data(cfg, tokenizer):
    """-> (train rows or raw stream, eval rows)."""
    if tokenizer is None:
        raise UserError(f"neither student {cfg.student!r} nor teacher {cfg.teacher!r} has a tokenizer; use --tokenizer")
    with node_first():
        raw, held = load_splits(cfg)
    rows = raw if cfg.streaming or cfg.mode == "eval" and held is not None else tokenize(raw, tokenizer, cfg, "train")
    if held is not None:
        held = tokenize(held, tokenizer, cfg, "eval")
    elif len(rows) == 1:
        raise UserError(f"dataset {cfg.dataset!r} is a single sequence of {cfg.seq_len} tokens or less; nothing is "
                        "left to evaluate on: bring more text or lower --seq_len")
    else:   # one long document: its last twentieth
        cut = len(rows) - max(1, len(rows) // 20)
        rows, held = rows.take(cut), rows.skip(cut)
    return rows, held.take(min(cfg.eval_samples, len(held)))


@contextlib.contextmanager
def explain_bad_rows(path, words):
    try:
        yield
    except Exception as e:
        explain_bad_file(path)
        raise UserError(f"{words}: {one_line(e)}")


def explain_bad_file(path):
    """The reader's message does not say where: name the line."""
    lined = os.path.isfile(path) and path.lower().endswith((".jsonl", ".json", ".csv", ".txt"))
    with open(path, "rb") if lined else contextlib.nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").strip()
                if text and path.endswith(".jsonl") and not isinstance(json.loads(text), dict):
                    raise ValueError("not an object with columns")
            except ValueError as e:   # UnicodeDecodeError is one
                raise UserError(f"dataset file {path!r}, line {number}: {one_line(e, 100)}; mend or delete that line")


def stdlib_sources():
    """(name, text) of every module of Python's own library, tests left out."""
    root = sysconfig.get_paths()["stdlib"]
    skip = set("test tests idlelib idle_test lib2to3 site-packages dist-packages turtledemo pydoc_data".split())
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - skip)
        for file in sorted(f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")):
            with open(os.path.join(folder, file), encoding="utf-8", errors="ignore") as f:
                yield os.path.relpath(os.path.join(folder, file), root), f.read()


@dataclasses.dataclass
class Batch:
    """A micro-batch of one rank. Only host code looks at labels, so that nothing waits for the GPU to count them."""
    input_ids: torch.Tensor   # [B, T], padded on the right: under a causal mask no real token ever sees the padding
    positions: torch.Tensor   # [N] places of the counted tokens in the flattened batch
    labels: torch.Tensor      # [N] their next tokens, on the host
    real: torch.Tensor        # places of all tokens but padding: where block-wise compares hidden states
    sparse: Any = None        # SparseTarget of the counted tokens, when training from a cache


def collate(rows):
    """Token rows -> Batch. The label of a position is the *next* token; shifting comes before masking."""
    rows = rows or [{"input_ids": [0, 0], "targets": [False, False]}]   # nothing left for this rank: it takes part
    width = max(len(r["input_ids"]) for r in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        x, targets = torch.as_tensor(row["input_ids"], dtype=torch.long), row.get("targets")
        ids[i, :len(x)] = x
        labels[i, :len(x) - 1] = (x if targets is None else torch.where(torch.as_tensor(targets), x, -100))[1:]
    positions = (labels.flatten() != -100).nonzero()[:, 0]
    real = torch.cat([i * width + torch.arange(len(r["input_ids"])) for i, r in enumerate(rows)])
    pin = (lambda x: x.pin_memory()) if CUDA else (lambda x: x)
    send = lambda x: pin(x).to(DEVICE, non_blocking=True)
    sparse = [r["sparse"] for r in rows if "sparse" in r]
    sparse = SparseTarget(*(send(torch.from_numpy(np.concatenate(x))) for x in zip(*sparse))) if sparse else None
    return Batch(send(ids), send(positions), pin(labels.flatten()[positions]), send(real), sparse)


def indexed_batches(rows, seed, global_batch, step):
    """Endless (row numbers of a global batch, None) from `step` on; the position *is* the step: nothing to replay."""
    steps_per_epoch = -(-len(rows) // global_batch)
    for epoch in itertools.count(step // steps_per_epoch):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for start in range(step % steps_per_epoch * global_batch, len(rows), global_batch):
            yield order[start:start + global_batch].tolist(), None
        step = 0


def prefetch(endless, depth=2):
    """Run a generator in a thread, `depth` items ahead: the next batch is ready while this one computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(next, endless) for _ in range(depth))
        while True:
            ahead.append(pool.submit(next, endless))
            yield ahead.popleft().result()


def micro_batches(global_batches, rows, micro_steps, batch_size):
    """Global batches -> (this rank's micro-batches, position after the step). Rank r takes every WORLD-th sequence."""
    for batch, position in global_batches:
        mine = [i if rows is None else rows[i] for i in batch[RANK::WORLD]]   # a stream hands on rows, not numbers
        yield [collate(mine[i * batch_size:(i + 1) * batch_size]) for i in range(micro_steps)], position


# --------------------------------------------------------------------------------------------------
# Models and FSDP: rank 0 reads, every rank starts empty and receives its shard. Hands on ShardedRoot roots: FSDP gathers
# parameters in the forward of the root, so whatever touches weights is a function run inside it.


class ShardedRoot(nn.Module):
    def __init__(self, model, stitches=None):
        super().__init__()
        self.model, self.stitches = model, stitches or nn.ModuleDict()   # of block-wise: kept in checkpoints only

    def forward(self, work, *args):
        return work(self.model, *args)

    def release(self):
        """After forwards without a backward: give full_tensor weights back, else the next step would use stale ones."""
        for module in (m for m in self.modules() if isinstance(m, FSDPModule)):
            module.reshard()


def compute_dtype(cfg):
    """auto: bf16 on GPUs that have it, fp32 elsewhere (CPUs without AMX emulate bf16 slowly)."""
    auto = torch.bfloat16 if CUDA and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.dtype]


def model_config(name, cfg, role):
    try:
        with node_first():
            config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except Exception as e:
        explain_no_config(name, role, e)
    known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    if getattr(config, "is_encoder_decoder", False) or not known:
        raise UserError(f"{role} {name!r} is a {config.model_type} model, not a decoder-only language model")
    return config


def explain_no_config(name, role, e):
    where = "as a file" if name.endswith(".json") else "in that directory" if os.path.isdir(name) else \
        "as a local directory (there is none) or on the hub (no network, no access, or HF_HUB_OFFLINE is set)"
    raise UserError(f"{role} {name!r}: no model config could be read {where}: {one_line(e)}")


def read_model(name, config, cfg, role, dtype, keep=None):
    """Rank 0's whole copy on the host, memory-mapped until it is cast; keep: with only those decoder layers."""
    options = dict(dtype=dtype, trust_remote_code=cfg.trust_remote_code)
    try:
        if name.endswith(".json"):
            torch.manual_seed(cfg.seed)
            return AutoModelForCausalLM.from_config(config, **options)
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    except Exception as e:
        raise UserError(f"{role} {name!r} could not be loaded: {one_line(e)}")
    if info["missing_keys"]:
        raise UserError(f"{role} {name!r} lacks weights, {sorted(info['missing_keys'])[0]} among them; is it whole?")
    if keep:
        path, layers = layers_of(model)
        model.set_submodule(path, nn.ModuleList(layers[i] for i in keep))
    return model


def layers_of(model):
    """(path, ModuleList) of the decoder layers: the outermost list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise UserError(f"{type(model).__name__} keeps its {depth} decoder layers in no ModuleList; choose another model")


def plan_layers(cfg, whole):
    """-> (config of the student, None), or of student layers:N and the numbers of N evenly spaced teacher layers."""
    depth, wanted = whole.get_text_config().num_hidden_layers, cfg.student.removeprefix("layers:")
    if wanted == cfg.student:
        return whole, None
    if whole.get_text_config() is not whole:
        raise UserError(f"{cfg.student} cannot be cut from {cfg.teacher!r}: its text model is part of a larger one; "
                        "bring a checkpoint of the text model alone")
    if not wanted.isdigit() or not 1 <= int(wanted) <= depth:
        raise UserError(f"student {cfg.student!r}: write layers:N with N from 1 to the teacher's {depth}")
    keep = [round(i * (depth - 1) / max(1, int(wanted) - 1)) for i in range(int(wanted))]
    each = lambda v: [v[i] for i in keep] if isinstance(v, list) and len(v) == depth else v   # layer_types and the like
    depth_name = whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(whole).from_dict({k: each(v) for k, v in whole.to_dict().items()} | {depth_name: len(keep)}), keep


def load_student(cfg):
    name, role = (cfg.teacher, "teacher") if cfg.student.startswith("layers:") else (cfg.student, "student")
    whole = model_config(name, cfg, role)
    config, keep = plan_layers(cfg, whole)
    if keep:
        print0(f"student: layers {', '.join(map(str, keep))} of the {whole.num_hidden_layers} of teacher {name}")
    build_stitches = lambda model: None
    if cfg.blockwise:   # optional: blockwise
        build_stitches = stitching(cfg, config)
    return shard(cfg, config, lambda: read_model(name, whole, cfg, role, torch.float32, keep), build_stitches)


def load_teacher(cfg):
    """Frozen, in the compute type, but models trained in bf16 overflow in fp16: those stay in fp32 then."""
    config, dtype = model_config(cfg.teacher, cfg, "teacher"), compute_dtype(cfg)
    dtype = torch.float32 if dtype == torch.float16 and config.dtype != torch.float16 else dtype
    return shard(cfg, config, lambda: read_model(cfg.teacher, config, cfg, "teacher", dtype), frozen=dtype)


def shard(cfg, config, read, stitches=lambda model: None, frozen=None):
    """Meta model on every rank -> FSDP units (layers, root) -> weights. The student keeps fp32 masters and computes in
    compute_dtype; a teacher (frozen: its dtype) has no gradients; its root stays full_tensor, the loss uses its head."""
    dtype, home = compute_dtype(cfg), "cpu" if cfg.cpu_offload else DEVICE
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=frozen or torch.float32, trust_remote_code=cfg.trust_remote_code)
        root = ShardedRoot(model, stitches(model))
    source, layers = read() if RANK == 0 else None, layers_of(model)[1]
    root.train(not frozen).requires_grad_(not frozen)
    if not frozen and cfg.gradient_checkpointing:   # the first name is the newer one
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} cannot recompute activations: add --gradient_checkpointing false")
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.disable_input_require_grads()   # transformers wants them here; frozen layers would be recomputed
    for layer in layers if cfg.compile else ():
        layer.compile()
    if not frozen or cfg.cpu_offload or cfg.shard_teacher and WORLD > 1:
        shapes = {"hybrid_shard": (WORLD // LOCAL_WORLD, LOCAL_WORLD), "no_shard": (WORLD, 1)}   # replicate x shard
        shape = (WORLD,) if frozen else shapes.get(cfg.fsdp, (WORLD,))
        options = dict(mesh=init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):]),
                       mp_policy=MixedPrecisionPolicy(frozen or dtype, torch.float32, cast_forward_inputs=False))
        options |= dict(offload_policy=CPUOffloadPolicy()) if cfg.cpu_offload and CUDA else {}
        for layer in layers:
            fully_shard(layer, reshard_after_forward=bool(frozen) or cfg.fsdp.startswith(("full", "hybrid")), **options)
        fully_shard(root, reshard_after_forward=False, **options)
    load_weights(root, source and ShardedRoot(source, stitches(source)), home)
    return root


def copy_from_rank0(tensor, whole):
    """Rank 0's whole, of any type -> what this rank keeps of it."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(DEVICE, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(whole.to_local())
    else:
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


@torch.no_grad()
def load_weights(root, source, device):
    """Rank 0's tensors into everybody's shards, one at a time: no other rank ever holds a whole model."""
    root.to_empty(device=device)
    for buffer in root.buffers():   # FSDP's offloading leaves them where they are
        buffer.data = buffer.data.to(DEVICE)
    if not any(isinstance(p, DTensor) for p in root.parameters()):
        root.model.tie_weights()   # FSDP keeps ties by itself
    # a head that block-wise unties begins as the copy of the embeddings that it was
    there = dict([*source.named_parameters(remove_duplicate=False), *source.named_buffers()] if source else ())
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if source and getattr(there.get(name), "shape", None) != tensor.shape:   # a mixture's dense and sparse layers
            raise UserError(f"layers:N cannot be cut from {type(root.model).__name__}: its layers differ by number")
        whole = there.pop(name).to(DEVICE, tensor.dtype) if source else \
            torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        copy_from_rank0(tensor, whole)


def full_tensor(tensor):
    return (tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).to(DEVICE)


def save_model(root, tokenizer, path, dtype):
    """Gathered on rank 0 tensor by tensor, saved by transformers, renamed when whole."""
    keep = "cpu" if RANK == 0 else "meta"   # the other ranks take part, and drop each tensor at once
    tensors = itertools.chain(root.model.named_parameters(), root.model.named_buffers())
    full = {name: full_tensor(x).to(keep, dtype if x.is_floating_point() else x.dtype, copy=True) for name, x in tensors}
    if RANK == 0:
        with torch.device("meta"):
            model = type(root.model)(root.model.config)
        model.load_state_dict(full, assign=True, strict=False)   # a tied head is not among the parameters
        model.tie_weights()
        model.generation_config = root.model.generation_config
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        for part in (model.to(dtype), tokenizer) if tokenizer is not None else (model.to(dtype),):
            part.save_pretrained(path + ".tmp")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(path + ".tmp", path)


def hidden_states(model, input_ids_BT):
    """-> [B, T, D] after the final norm, without the head."""
    return model.base_model(input_ids=input_ids_BT, use_cache=False)[0]


def counted_hidden(model, batch):
    """Runs inside a root: the hidden states of the counted tokens, and the head to apply to them chunk by chunk."""
    return hidden_states(model, batch.input_ids).flatten(0, 1)[batch.positions], head_of(model)


def teacher_targets(teacher):
    if teacher is None:
        return lambda batch: batch.sparse   # None too, at alpha 1
    return torch.no_grad()(lambda batch: teacher(counted_hidden, batch))


def distil_loss(model, batch, signal, denominator, **objective):
    """Runs inside the student: -> loss, ce, kl."""
    return distillation_loss(*counted_hidden(model, batch), batch.labels, signal, denominator=denominator, **objective)


def head_of(model):
    out, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(out.weight, getattr(out, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None))


def head_error(model, ids_1T):
    """Runs inside a root: how far hidden states times head_of are from its logits, and what rounding may do."""
    head, its = head_of(model), model(input_ids=ids_1T, use_cache=False).logits.float()
    hidden = hidden_states(model, ids_1T)
    ours = scale_and_softcap(nn.functional.linear(hidden, head.weight, head.bias), *head[2:])[0]
    return (ours - its).abs().max() / its.std().clamp_min(1e-6), 1e-3 if hidden.dtype == torch.float32 else 0.1


def check_head(root, role, name, tokenizer):
    """The loss applies heads itself: a model whose own logits differ (a scale it does not know) is refused."""
    rows, biggest = root.model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if biggest >= rows:
        raise UserError(f"the tokenizer has ids up to {biggest}, {role} {name!r} only {rows} rows; they do not match")
    was_training = root.training
    with torch.no_grad():
        error, allowed = root.eval()(head_error, torch.arange(8, device=DEVICE)[None] % rows)
    root.train(was_training).release()
    if not error.isfinite():
        raise UserError(f"{role} {name!r} computes logits that are not finite: damaged, or --dtype fp32?")
    if error > allowed:
        raise UserError(f"{role} {name!r} ({type(root.model).__name__}): hidden states times head miss its own logits "
                        f"by {error:.2g} of their spread; teach its scaling to head_of() in simple_distill.py")


# --------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning rate; one step that clips, unscales and skips without asking the GPU.


def learning_rates(cfg, named):
    """(name, parameter) pairs, a tied parameter under each of its names -> {parameter: rate}. The first pattern that
    matches its first name decides; 0 freezes."""
    names, tied, rules = {}, {}, parse_multipliers(cfg.lr_multipliers)
    for name, p in named:
        if names.setdefault(p, name) != name:
            tied[name] = names[p]
    for pattern, _ in rules:
        if not any(map(pattern.search, names.values())):
            other, some = next(filter(pattern.search, tied), None), list(names.values())[len(names) // 2]
            raise UserError(f"lr_multipliers: {pattern.pattern!r} matches " + (
                f"only {other}, which is tied to {tied[other]}; write a pattern for that" if other else
                f"none of the {len(names)} parameters; names look like {some}"))
    rates = {p: cfg.learning_rate * next((f for pattern, f in rules if pattern.search(name)), cfg.default_lr_multiplier)
             for p, name in names.items()}
    if not any(rates.values()):
        raise UserError("every parameter is frozen (learning-rate multiplier 0); leave something to train")
    return rates


def check_scheduler(cfg):
    scheduler_kwargs(cfg)


def make_optimizer(parameters, rates, weight_decay):
    """rates: {parameter: learning rate}; 0 or none: no gradient, no state. Norms and biases do not decay."""
    groups, sizes = {}, collections.Counter()
    for p in parameters:
        rate = rates.get(p, 0)
        sizes[rate] += p.numel()
        if p.requires_grad_(rate > 0).requires_grad:
            groups.setdefault((rate, p.ndim >= 2), []).append(p)
    print0(f"{sizes.pop(0, 0):,} frozen; trains", ", ".join(f"{n:,} parameters at {r:g}" for r, n in sizes.items()))
    optimizer = torch.optim.AdamW([dict(params=g, lr=rate, weight_decay=weight_decay if decay else 0.0)
                                   for (rate, decay), g in groups.items()], lr=max(sizes), fused=True)
    for p in itertools.chain(*groups.values()):   # from the start: memory is known, a checkpoint has where to load to
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def make_schedule(cfg, optimizer, steps):
    """-> a function that sets every group's rate for a step and returns the largest: nothing to save or replay."""
    try:
        schedule = get_scheduler(cfg.lr_scheduler, optimizer, round(cfg.warmup_ratio * steps), steps,
                                 scheduler_kwargs(cfg, steps))
        schedule.lr_lambdas[0](steps)
    except (TypeError, ValueError) as e:
        raise UserError(f"lr_scheduler {cfg.lr_scheduler}: {one_line(e)}; give it with --lr_scheduler_kwargs")
    def set_rates(step):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule.lr_lambdas[0](step)   # one for all groups
        return max(g["lr"] for g in optimizer.param_groups)
    return set_rates


def new_scale_state(fp16):
    """On the device: the fp16 loss scale, good steps in a row, skipped steps in all, and in a row."""
    start = {"scale": 2.0 ** 14 if fp16 else 1.0, "good": 0.0, "skipped": 0.0, "streak": 0.0}
    return {k: torch.tensor(v, device=DEVICE) for k, v in start.items()}


def optimizer_step(optimizer, max_grad_norm, health, fp16, parts=()):
    """Clip (parts: [(parameters, norm)], first), unscale, skip what is not finite: in fused AdamW, by grad_scale."""
    for part, norm in parts:
        torch.nn.utils.clip_grad_norm_(part, norm * (health["scale"].item() if fp16 else 1.0))
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients)) / health["scale"]
    scale, bad = health["scale"] * ((norm / max_grad_norm).clamp_min(1.0) if max_grad_norm else 1.0), ~norm.isfinite()
    home, bad = gradients[0].device, bad.float()   # offloaded: AdamW itself would not wait for the copies
    optimizer.grad_scale, optimizer.found_inf = scale.to(home), bad.to(home)
    optimizer.step()
    health["skipped"] += bad
    health["streak"].add_(bad).mul_(bad)
    health["good"].add_(1 - bad).mul_(1 - bad)
    if fp16:   # twice the scale after every 2000 good steps, half of it after a bad one
        health["scale"].mul_((1 + (health["good"] % 2000 == 1999).float()) * (1 - bad / 2))
    return norm


# --------------------------------------------------------------------------------------------------
# Checkpoints: whole or not at all. Tensors through torch.distributed.checkpoint, so that another number of ranks can
# read them; everything else in state.json. Random numbers need no state: each step seeds itself.


def tensors_of(root, moments, health):
    """Everything with a shape, flat by name: the same call names what to save and where to load to."""
    names = {p: n for n, p in root.named_parameters()}
    moments = {f"{key}.{names[p]}": value for p, state in moments.items() for key, value in state.items()}
    weights = {f"model.{n}": p.detach() for p, n in names.items()}
    return weights | moments | {f"health.{k}": v for k, v in health.items()}


def save_checkpoint(folder, step, tensors, state, keep):
    """-> None, or what went wrong. Written aside, synced, renamed; nothing old is deleted before the new one stands."""
    final, aside, problem = os.path.join(folder, f"step-{step:08d}"), os.path.join(folder, f"tmp-{step:08d}"), None
    if RANK == 0:
        shutil.rmtree(aside, ignore_errors=True)
    all_sum(0)
    try:
        dcp.save(tensors, checkpoint_id=aside)   # syncs each file
        if RANK == 0:
            state["files"] = {f: os.path.getsize(os.path.join(aside, f)) for f in sorted(os.listdir(aside))}
            with open(os.path.join(aside, "state.json"), "w", encoding="utf-8") as f:
                json.dump(state, f, indent=1)
            sync(f.name, aside)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(aside, final)
            sync(folder)
            for old in checkpoints_in(folder)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, dcp.api.CheckpointException) as e:
        problem = one_line(next(iter(getattr(e, "failures", {}).values()), [e])[0], 300)   # DCP wraps what happened
        shutil.rmtree(aside, ignore_errors=True)
    problem = from_rank0(problem)
    if problem:
        print0(f"WARNING: checkpoint {step} could not be saved ({problem}); the run goes on, older ones stay")
    return problem


def checkpoints_in(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step-????????")), reverse=True)


def read_states(paths, say):
    """Checkpoints -> [(path, state), ...] of those with all files there, of full size. The others are named."""
    found = []
    for path in paths:
        try:
            with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
                state = json.load(f)
            short = [f for f, size in state["files"].items() if os.path.getsize(os.path.join(path, f)) != size]
            if short:
                raise OSError(f"{short[0]} is truncated")
            found.append((path, state))
        except (OSError, ValueError, KeyError, TypeError) as e:
            say(f"checkpoint {path} is not readable ({one_line(e)}), passed over")
    return found


def refuse_changes(there, here, where, way_out="start over with --resume never or another --output_dir"):
    names = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    changed = [f"{k} {there.get(k)!r} there, {here.get(k)!r} here" for k in names]
    if changed:
        raise UserError(f"{where} is of a run with {'; '.join(changed)}. Change it back, or {way_out}")


def plan_batch(cfg, state, world):
    """-> (batch size, micro-steps, global batch). A resumed run keeps its global batch at any number of ranks."""
    size, micro = cfg.batch_size, cfg.gradient_accumulation_steps
    wanted = state["global_batch"] if state else size * micro * world
    if wanted != size * micro * world:
        if [size, micro] != state["batch"]:
            raise UserError(f"{cfg.output_dir!r} holds a run of {wanted} sequences a step, not of {size} x {micro} "
                            f"x {world} ranks; keep the product, or start over with --resume never or elsewhere")
        size = min(size, -(-wanted // world))
        micro = -(-wanted // (world * size))
    return size, micro, wanted


def find_checkpoints(resume, output_dir):
    """-> [(path, state), ...] to continue from, the best first."""
    paths = [] if resume == "never" else checkpoints_in(os.path.join(output_dir, "checkpoints")) \
        if resume == "auto" else [resume.rstrip("/")]
    paths, found = from_rank0((paths, read_states(paths, print0) if RANK == 0 else []))
    if paths and not found:
        raise UserError(f"{paths[0]!r} is no readable checkpoint; start over with --resume never")
    return found


def load_checkpoint(found, tensors_at):
    """Load the first of the found checkpoints that can be read, in place -> its state."""
    for path, state in found:
        tensors = tensors_at(state["step"])
        try:
            dcp.load(tensors, checkpoint_id=path)
            print0(f"resumes from {path}")
            return state
        except Exception as e:
            print0(f"checkpoint {path} is not readable ({one_line(e)}), passed over")
    raise UserError(f"{found[0][0]!r} is no readable checkpoint; start over with --resume never")


def prepare_output(cfg, step):
    """output_dir as of `step`: no log lines of steps about to be repeated, nothing left of a run that starts over."""
    place = functools.partial(os.path.join, cfg.output_dir)
    if cfg.resume == "never":
        for old in ("checkpoints", "final"):
            shutil.rmtree(place(old), ignore_errors=True)
    os.makedirs(place("checkpoints"), exist_ok=True)
    write_json(cfg, place("config.json"))
    cut_log(place("log.jsonl"), step)


def cut_log(path, step):
    """No lines of steps that are about to be repeated."""
    kept = [row for row in read_jsonl(path) if next(v for k, v in row.items() if k.endswith("/step")) <= step > 0]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(f.name, path)


# --------------------------------------------------------------------------------------------------
# Train: a run is put together, begun, trained stage by stage and finished. train() says it in a few
# lines; train_stage() is the loop. Optional modes compose the same pieces.


@dataclass
class Stage:
    """A stretch of training with a loss, rates, clipping and a length. Plain distillation is one
    stage; block-wise training puts others before it."""
    name: str
    first_step: int
    steps: int
    loss_fn: Any               # (model, batch, targets, denominator) -> loss, ce, kl, ...
    get_teacher_targets: Any   # batch -> the targets that loss_fn takes
    rates: dict                # {parameter: peak learning rate}; the others are frozen
    weight_decay: float
    max_grad_norm: float       # of all gradients together; 0: no clipping
    clipped_alone: list = field(default_factory=list)   # [(parameters, max norm), ...] before that
    mean_over: str = "labels"  # what of a batch the loss is a mean over: labels, or real (tokens)

    @property
    def end(self):
        return self.first_step + self.steps


@dataclass
class Run:
    """What a run works with, and where it is. A checkpoint keeps the last block of fields."""
    cfg: Config
    result_knobs: dict         # everything that decides the result; compared at a resume
    tokenizer: Any
    rows: Any                  # token rows to train on, or a stream of raw rows
    eval_rows: Any
    student: ShardedRoot
    teacher: Optional[ShardedRoot]
    batch_size: int            # sequences a rank and micro-step
    micro_steps: int
    global_batch: int          # sequences an optimiser step, whatever the number of ranks
    checkpoints: list          # [(path, state), ...] to continue from, the best first
    loss_fn: Any               # of plain distillation: what held-out rows are judged by ...
    get_teacher_targets: Any   # ... and what it takes from the teacher
    started: float             # seconds since the epoch
    free_memory: int           # bytes on this device before anything was loaded

    stages: list = field(default_factory=list)
    stage: Optional[Stage] = None   # whose optimiser this is
    optimizer: Any = None
    set_rates: Any = None           # step of the stage -> the largest learning rate, after setting all
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
    """Distil, online or from a cache -> True when the run is done, False when a signal stopped it."""
    run = start_run(cfg)
    if run is None:
        return True
    stage = distillation_stage(run)
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
    student = load_student(cfg)
    check_head(student, "student", cfg.student, tokenizer)
    return student


def load_checked_teacher(cfg, tokenizer):
    teacher = load_teacher(cfg)
    check_head(teacher, "teacher", cfg.teacher, tokenizer)
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
        cfg, load = from_cache(cfg)
    knobs = result_knobs(cfg)
    if cfg.cache_dir:   # optional: cache
        knobs["cache"] = digest(read_manifest(cfg))   # which one, wherever it lies
    checkpoints = find_checkpoints(cfg.resume, cfg.output_dir)
    state = checkpoints[0][1] if checkpoints else None
    if state is not None:
        refuse_changes(state["config"], knobs, checkpoints[0][0])
        if is_finished(cfg, state):
            print0(f"{cfg.output_dir} holds this run, finished at step {state['step']}: see "
                   + os.path.join(cfg.output_dir, "final"))
            return None
    tokenizer, rows, eval_rows, student, teacher = load(cfg)
    batch_size, micro_steps, global_batch = plan_batch(cfg, state, WORLD)
    return Run(
        cfg=cfg, result_knobs=knobs, tokenizer=tokenizer, rows=rows, eval_rows=eval_rows,
        student=student, teacher=teacher, batch_size=batch_size, micro_steps=micro_steps,
        global_batch=global_batch, checkpoints=checkpoints, started=started, free_memory=free,
        loss_fn=functools.partial(distil_loss, alpha=cfg.alpha, temperature=cfg.temperature,
                                  divergence=cfg.divergence),
        get_teacher_targets=teacher_targets(teacher),
        scale_state=new_scale_state(compute_dtype(cfg) == torch.float16))


def is_finished(cfg, state):
    same_length = state["length"] == [cfg.max_steps, cfg.num_epochs]
    has_final = os.path.isdir(os.path.join(cfg.output_dir, "final"))
    return same_length and state["step"] >= state["steps"] and has_final


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
    named = run.student.model.named_parameters(remove_duplicate=False)
    return Stage(
        name="distil", first_step=first_step, steps=steps, loss_fn=run.loss_fn,
        get_teacher_targets=run.get_teacher_targets, rates=learning_rates(cfg, named),
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm)


# ---- beginning


@contextlib.contextmanager
def begin(run, stages):
    """From here on the run may write: resume, clear what is left of it, open log, batches and bar."""
    cfg = run.cfg
    run.stages = stages
    print0(describe_run(run))
    with stop_signals() as run.stop_requests, contextlib.ExitStack() as stack:
        wandb_id = resume(run) if run.checkpoints else None
        if run.stage is None:
            start_stage(run, stages[0])
        if RANK == 0:
            prepare_output(cfg, run.step)
        all_sum(0)   # nobody goes on before that is done
        run.wandb = start_wandb(cfg, wandb_id)
        stack.push(lambda kind, *_: run.wandb.finish(exit_code=int(kind is not None)))
        if run.first_scores is None:
            run.first_scores = scores(run)
        run.batches = prefetch(my_micro_batches(run))
        stack.enter_context(contextlib.closing(run.batches))
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


def resume(run):
    """Load the newest checkpoint that can be read -> the id of its wandb run."""
    state = load_checkpoint(run.checkpoints, functools.partial(tensors_at, run))
    run.step = state["step"]
    run.saved_step = state["step"]
    run.tokens = state["tokens"]
    run.position = state["position"]
    run.best_loss = state["best"]
    run.first_scores = state["before"]
    run.notes = state["notes"]
    return state["wandb"]


def tensors_at(run, step):
    """The tensors that a checkpoint at `step` holds for the stage that goes on there."""
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
    student = run.student
    fp16 = compute_dtype(cfg) == torch.float16
    if run.stage is not stage:   # after a resume it is started already
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
        sums = torch.zeros(3, device=DEVICE)   # loss, ce, kl of this rank
        for i, batch in enumerate(micro):
            student.set_requires_gradient_sync(i == len(micro) - 1)
            targets = stage.get_teacher_targets(batch)
            loss, ce, kl, *_ = student(stage.loss_fn, batch, targets, max(tokens, 1))
            # FSDP averages over ranks, the loss is a mean over the tokens of all of them: times
            # WORLD. A loss that is not finite takes its gradient along: 0 * nan is nan.
            weight = WORLD * run.scale_state["scale"] * (1 + 0 * loss.detach())
            (loss * weight).backward()
            sums += torch.stack([loss.detach(), ce, kl])
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


def seed_step(seed, step):
    """Dropout follows from the step: a resumed run draws the same, and there is no state to keep."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_536 + RANK)


def stop_after_bad_steps(run):
    # .item() makes a GPU wait: there only every tenth step looks
    if (run.step % 10 == 0 or not CUDA) and run.scale_state["streak"].item() >= 10:
        save(run)
        raise UserError(
            f"loss or gradient was not finite for 10 steps in a row, up to step {run.step}; its "
            "checkpoint holds the last good weights. Lower --learning_rate, or try --dtype fp32")


def log_step(run, stage, sums, grad_norm, rate):
    loss, ce, kl = all_sum(*sums.tolist())
    now = time.time()
    speed = run.window_tokens / max(now - run.window_start, 1e-9)
    run.window_start = now
    run.window_tokens = 0.0
    skipped = int(run.scale_state["skipped"].item())
    log(run, {
        "train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
        "train/grad_norm": grad_norm.item(), "train/epoch": run.epoch, "train/step": run.step,
        "train/tokens_per_second": speed, "train/skipped_steps": skipped})
    shown = (f"{stage.name} loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} "
             f"{speed:,.0f} tok/s")
    if skipped:
        shown += f" skipped {skipped}"
    run.bar.set_postfix_str(shown)


def log(run, entry):
    """To log.jsonl, as strict JSON (no NaN), and to wandb."""
    if RANK == 0:
        finite = {k: v if math.isfinite(v) else None for k, v in entry.items()}
        append_jsonl(os.path.join(run.cfg.output_dir, "log.jsonl"), finite)
        run.wandb.log(entry, step=run.step)


def evaluate_and_save(run, stage):
    """What is due after a step; after the last one of the run, both."""
    cfg = run.cfg
    paused = time.time()
    last = run.step == run.steps
    judged = stage.mean_over == "labels"   # while blocks are matched there is nothing to see
    if last or judged and is_due(run.step, cfg.eval_steps):
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
    run.save_problem = save_checkpoint(
        os.path.join(cfg.output_dir, "checkpoints"), run.step,
        tensors_of(run.student, run.optimizer.state, run.scale_state),
        {"step": run.step, "steps": run.steps, "epoch": run.epoch, "position": run.position,
         "tokens": run.tokens, "best": run.best_loss, "before": run.first_scores,
         "notes": run.notes, "batch": [cfg.batch_size, cfg.gradient_accumulation_steps],
         "global_batch": run.global_batch, "wandb": run.wandb.id,
         "length": [cfg.max_steps, cfg.num_epochs], "config": run.result_knobs},
        cfg.keep_checkpoints)


def stop(run):
    run.stopped = True
    if run.saved_step != run.step:
        save(run)


# ---- evaluating


def scores(run):
    """The student on the held-out rows."""
    return evaluate(run.student, run.loss_fn, run.get_teacher_targets, run.eval_rows,
                    run.batch_size)


def evaluate(root, loss_fn, get_teacher_targets, rows, batch_size):
    """-> {loss, ce_loss, kl_loss, perplexity}: means over the counted tokens of rows. Every token
    counts once, whatever the number of ranks."""
    loss, ce, kl = mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size, "labels")
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}


def rows_of_this_rank(rows, batch_size):
    """Batches of row numbers: every rank runs every batch, with nothing in it where rows end."""
    for start in range(0, len(rows), batch_size * WORLD):
        yield range(start + RANK, min(start + batch_size * WORLD, len(rows)), WORLD)


@torch.no_grad()
def mean_over_rows(root, loss_fn, get_teacher_targets, rows, batch_size, mean_over):
    """What loss_fn returns, as means over the labels or the real tokens of rows."""
    was_training = root.training
    root.eval()
    sums = 0
    tokens = 0
    for mine in rows_of_this_rank(rows, batch_size):
        batch = collate([rows[i] for i in mine])
        values = root(loss_fn, batch, get_teacher_targets(batch), 1.0)
        sums += torch.stack(values).double()
        tokens += len(getattr(batch, mean_over))
    root.train(was_training)
    root.release()
    *sums, tokens = all_sum(*sums.tolist(), tokens)
    return [value / max(tokens, 1) for value in sums]


@torch.no_grad()
def continue_text(root, tokenizer, ids_1T, new=48, seed=None):
    """-> seconds, the text that follows: greedy, or sampled with a seed."""
    torch.manual_seed(seed or 0)
    root.eval()
    # the whole length, so that ranks stay in step and speeds can be compared
    root.model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=new, do_sample=seed is not None, pad_token_id=0)
    start = time.time()
    ids = root(lambda model: model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), **options))
    new_ids = ids[0, ids_1T.shape[1]:].tolist()   # waits for the GPU
    seconds = time.time() - start
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
    elif run.save_problem is None:
        run.last_scores = run.last_scores or scores(run)
        teacher_scores = score_teacher(run) if run.teacher is not None else None
        run.save_problem = save_final(run)
        print0(closing_table(run, teacher_scores))
        print0(closing_words(run))
    if run.save_problem is not None:
        raise UserError(f"the run could not be saved in {run.cfg.output_dir!r}: "
                        f"{run.save_problem}; make room, then run it again")
    return not run.stopped


def score_teacher(run):
    """The teacher by itself on the held-out rows: its cross-entropy to their labels."""
    alone = functools.partial(distil_loss, alpha=1.0, temperature=1.0, divergence="forward")
    return evaluate(run.teacher, alone, teacher_targets(None), run.eval_rows, run.cfg.batch_size)


def save_final(run):
    """-> None, or what went wrong, on every rank."""
    problem = None
    final = os.path.join(run.cfg.output_dir, "final")
    try:
        save_model(run.student, run.tokenizer, final, compute_dtype(run.cfg))
    except OSError as e:
        problem = one_line(e)
    return from_rank0(problem)


def closing_table(run, teacher_scores):
    size = run.student.model.num_parameters()
    lines = [("student before", run.first_scores, size), ("student after", run.last_scores, size)]
    if teacher_scores is not None:
        lines.insert(0, ("teacher", teacher_scores, run.teacher.model.num_parameters()))
    text = [f"\n{'held out':<15}{'perplexity':>12}{'KL to teacher':>15}{'parameters':>15}"]
    for name, values, parameters in lines:
        kl = "-" if run.cfg.alpha == 1 else f"{values['kl_loss']:.4f}"
        text.append(f"{name:<15}{values['perplexity']:>12.2f}{kl:>15}{parameters:>15,}")
    return "\n".join(text)


def closing_words(run):
    """A sample of what the student writes, the time and the memory."""
    ids = run.eval_rows[0]["input_ids"][:32]
    ids_1T = torch.as_tensor(ids, dtype=torch.long, device=DEVICE)[None]
    _, continuation = continue_text(run.student, run.tokenizer, ids_1T)
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.time() - run.started
    return (f"\nsample: {run.tokenizer.decode(ids_1T[0])!r}\n     -> {continuation!r}\n\n"
            f"done in {seconds:.0f} s, at most {peak / 1e9:.2f} GB of memory: "
            + os.path.join(run.cfg.output_dir, "final"))


# ---- what a run says before it begins

MEMORY_ADVICE = (
    "in this order: --gradient_checkpointing true, a smaller --batch_size with more "
    "--gradient_accumulation_steps, a smaller --seq_len, --fsdp full_shard on more devices, "
    "--cpu_offload")


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
    """-> {part: bytes a device}, rough: what a run will allocate at its peak."""
    cfg = run.cfg
    itemsize = compute_dtype(cfg).itemsize
    shape = run.student.model.config.get_text_config()
    heads = shape.vocab_size * shape.hidden_size
    student = run.student.model.num_parameters()
    teacher = 0
    if run.teacher is not None:
        teacher = run.teacher.model.num_parameters()
        teacher_shape = run.teacher.model.config.get_text_config()
        heads += teacher_shape.vocab_size * teacher_shape.hidden_size
    trained = max(trained_parameters(stage) for stage in run.stages)
    # over how many devices weights, gradients and optimiser state are spread
    share = {"no_shard": 1, "hybrid_shard": LOCAL_WORLD}.get(cfg.fsdp, WORLD)

    gathered = student * itemsize   # in the compute type
    if cfg.fsdp in ("full_shard", "hybrid_shard"):   # a layer, the next one, and the root
        gathered = min(gathered, heads * itemsize + 2 * gathered // shape.num_hidden_layers)
    tokens = run.batch_size * cfg.seq_len
    width = shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * width
    layer = tokens * (10 * width + 3 * inner) * itemsize   # activations of one layer
    if cfg.gradient_checkpointing:
        activations = tokens * width * itemsize * shape.num_hidden_layers + layer
    else:
        activations = layer * shape.num_hidden_layers
    return {
        "weights": 4 * student / share,   # fp32, as gradients and both moments of AdamW
        "gradients": 4 * trained / share,
        "optimiser": 8 * trained / share,
        "gathered": gathered,
        "activations": activations,
        "teacher": teacher * itemsize / (WORLD if cfg.shard_teacher else 1),
        "loss": min(2 * LOGITS_BUDGET, 16 * tokens * shape.vocab_size) + 4 * heads,
    }


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
            settings=wandb.Settings(console="off", silent=True))
    except Exception as e:
        print0(f"wandb: going on without it ({one_line(e)})")
        return NoWandb(run_id)


def logged_in(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except (TypeError, AttributeError):   # a version without these options still has the key
        return wandb.api.api_key


# --------------------------------------------------------------------------------------------------
# Optional: streaming: batches from a stream.


def batches_of_stream(run):
    return streamed_batches(run.rows, encoder(run.cfg, run.tokenizer), run.cfg.seed, run.cfg.shuffle_buffer, run.global_batch, run.position)


def streamed_batches(raw, encode_columns, seed, window, global_batch, state):
    """The same from a stream. Windows of raw rows are packed and shuffled whole, so that the position is where the
    window began and how many of its sequences are used: exact, and as quick at step 100,000 as at 10."""
    beginning, size, pending = raw.state_dict(), window or 1000, []
    state = state or {"epoch": 0, "window": 0, "used": 0, "source": beginning}
    raw.load_state_dict(state["source"])
    source = iter(raw)
    while True:
        block = list(itertools.islice(source, size))
        rows = rows_of(encode_columns({k: [row[k] for row in block] for k in (block or [()])[0]}))
        shuffle, ended = torch.Generator().manual_seed(seed * 1_000_003 + state["window"]), len(block) < size
        order = torch.randperm(len(rows), generator=shuffle).tolist() if window else range(len(rows))
        for used in range(state["used"], len(rows)):
            pending.append(rows[order[used]])
            if len(pending) == global_batch:
                yield pending, {**state, "used": used + 1}
                pending = []
        if ended and state["window"] == 0 and not rows:
            raise UserError("no row of the stream has a target token")
        state = {"epoch": state["epoch"] + ended, "window": state["window"] + 1, "used": 0,
                 "source": beginning if ended else raw.state_dict()}
        if ended:
            raw.load_state_dict(beginning)
            source = iter(raw)


# --------------------------------------------------------------------------------------------------
# Optional: demo: text, tokenizer, model shapes and a teacher made from what every machine has, once,
# as ordinary files in a cache folder of the user. From there on the demo is a run like any other.

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
    whole = cfg.student == cfg.teacher == cfg.dataset == "demo"
    if whole and done and cfg.mode == "train" and cfg.alpha < 1 and not uses_cache(cfg):
        report_demo(resolved)   # optional: eval
    return done


def report_demo(cfg):   # optional: eval
    final = os.path.join(cfg.output_dir, "final")
    if not os.path.exists(os.path.join(cfg.output_dir, "report.md")):
        report(dataclasses.replace(cfg, mode="eval", student=final))


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
    made_here = [path for path in files.values() if path.startswith(folder)]
    if made_here and not make_demo(cfg, folder, with_teacher="teacher" in files):
        return None
    resolved = dataclasses.replace(cfg, **files)
    resolved.given = cfg.given
    return resolved


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
# Optional: cache: what the teacher says of each token, a few bits an entry, on disk beside the token itself. Any number
# of workers fill it in mode cache; open_cache hands on rows like those of load_data that carry their SparseTarget.


def tensor_files(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")))


def teacher_files(teacher):
    """-> revision, fingerprint of the weights: 16,384 bytes of each file, to hash all of a 70B model takes minutes."""
    folder = os.path.dirname(transformers.utils.cached_file(teacher, "config.json"))
    files = [np.memmap(path, np.uint8, "r") for path in tensor_files(folder)]
    return (None if os.path.exists(teacher) else os.path.basename(folder),
            digest([zlib.crc32(x[::x.size // 16384 | 1].tobytes()) for x in files]))


def describe_cache(cfg, tokenizer, rows, dtype):
    """The manifest of an empty cache: all that shapes its content."""
    vocabulary, topk = max(tokenizer.get_vocab().values()) + 1, cfg.cache_method == "topk"
    its = transformers.AutoConfig.from_pretrained(cfg.teacher, trust_remote_code=cfg.trust_remote_code)
    rows_V = its.get_text_config().vocab_size   # the padded ones are no tokens, but to ask for them is no mistake
    if topk and cfg.cache_top_k > rows_V:
        raise UserError(f"cache_top_k is {cfg.cache_top_k}, teacher {cfg.teacher!r} has {rows_V} tokens; lower it")
    size = min(cfg.cache_top_k, vocabulary) if topk else cfg.cache_samples
    few = itertools.islice(rows, 64) if cfg.streaming else (rows[i] for i in range(0, len(rows), -(-len(rows) // 64)))
    revision, weights = teacher_files(cfg.teacher)
    return dict(
        teacher=cfg.teacher, revision=revision, weights=weights, dtype=dtype, vocabulary=vocabulary,
        tokenizer=digest(tokenizer.get_vocab(), tokenizer.chat_template), dataset=cfg.dataset,
        dataset_fingerprint=digest(None if cfg.streaming else len(rows), list(few)),
        eval_samples=cfg.eval_samples, seq_len=cfg.seq_len, temperature=cfg.temperature, method=cfg.cache_method,
        size=size, seed=cfg.seed, chunk=cfg.cache_chunk,
        group=max(1, 4096 // cfg.seq_len),   # sequences a forward: what shares a batch changes the last bits of logits
        # of an id, of its count or log-probability, of what else is kept a token (its entropy)
        bits=[(vocabulary - 1).bit_length(), *((8, 0) if topk else ((size - 1).bit_length(), 12))])


def start_cache(cfg, run, tokenizer, rows, dtype, rank):
    """-> the manifest. A new cache is begun, an old one must be of the same run. run: cfg with the demo's files."""
    place = lambda *names: os.path.join(cfg.cache_dir, *names)
    here, there = describe_cache(run, tokenizer, rows, dtype), None
    os.makedirs(cfg.cache_dir, exist_ok=True)
    if not cfg.force_regenerate and os.path.exists(place("manifest.json")):
        with open(place("manifest.json"), encoding="utf-8") as f:
            there = json.load(f)
        refuse_changes({k: there.get(k) for k in here}, here, cfg.cache_dir, "empty it: --force_regenerate")
    elif rank == 0:
        for old in tensor_files(cfg.cache_dir) if cfg.force_regenerate else ():
            os.remove(old)
        tokenizer.save_pretrained(place("tokenizer"))
        write_json(dataclasses.replace(cfg, force_regenerate=False), place("config.json"))
        write_json(here, place("manifest.json"))   # last: from here on there is a cache
    return here


def plan_cache(cfg, few, sequences, say):
    """Say what it will take, from a few packed rows -> tokens in all (or None), tokens done. Refused without room."""
    data, counts = zip(*few)
    count, tokens, targets, entries, mass, _ = map(float, map(sum, zip(*counts)))
    a_token = sum(map(len, data)) / tokens
    total = sequences and int(tokens / count * sequences)
    there = sum(map(os.path.getsize, tensor_files(cfg.cache_dir)))
    free, need = shutil.disk_usage(cfg.cache_dir).free / 1e9, max(0, (total or 0) * a_token - there) / 1e9
    size = f"{need:.3f} GB to write" if total else "a stream has no length"
    words = (f"cache {cfg.cache_dir}: about {a_token:.1f} bytes a token ({entries / targets:.1f} ids that hold "
             f"{mass / targets:.1%} of the teacher's mass), {size}, {free:.1f} GB free")
    say(words + "\nWARNING: above temperature 1 a cache grows and keeps less: see the share" * (cfg.temperature > 1))
    if need > free:
        raise UserError(f"cache_dir {cfg.cache_dir!r} needs {need:.3f} GB, {free:.3f} are free: make room")
    return total, min(int(there / a_token), total or 0)


def finish_cache(cfg, m, paths, sums):
    """The manifest of a full cache, from what the tables of all chunks sum to -> words."""
    _, count, tokens, targets, _, mass, _ = map(sum, zip(*sums))
    size, kept = sum(map(os.path.getsize, paths)) / tokens, mass / targets
    split = lambda name: [int(s[1]) for path, s in zip(paths, sums) if os.path.basename(path).startswith(name)]
    m = m | dict(rows=int(count), tokens=int(tokens), bytes_per_token=size, mass_kept=kept,
                 chunks={name: split(name) for name in ("train", "eval")})
    write_json(m, os.path.join(cfg.cache_dir, "manifest.json"))
    return (f"cache {cfg.cache_dir}: {count:,.0f} sequences, {tokens:,.0f} tokens of {size:.1f} bytes, "
            f"{kept:.1%} of the teacher's mass is kept")


def read_manifest(cfg):
    """Of a full cache, refused where the training run does not fit what is stored."""
    try:
        with open(os.path.join(cfg.cache_dir, "manifest.json"), encoding="utf-8") as f:
            m = json.load(f)
        with open(os.path.join(cfg.cache_dir, "config.json"), encoding="utf-8") as f:
            decided = json.load(f)
        m["chunks"], m["bits"]
    except (OSError, ValueError, KeyError) as e:
        why = "it was begun, not finished" if isinstance(e, KeyError) else one_line(e)
        raise UserError(f"{cfg.cache_dir!r} holds no finished cache ({why}); mode cache begins or finishes it")
    same = cfg.teacher == "demo" or os.path.realpath(cfg.teacher) == os.path.realpath(m["teacher"])
    here = dict(temperature=cfg.temperature, seq_len=cfg.seq_len, teacher=m["teacher"] if same else cfg.teacher)
    refuse_changes({k: m[k] for k in here}, here, cfg.cache_dir, "fill another --cache_dir")
    # the cache is the dataset: what it has decided may be left out or said again
    here = {k: v for k, v in vars(cfg).items() if k in GROUPS["data"] and v != default_of(FIELDS[k])}
    here = {k: v for k, v in here.items() if k not in ("seq_len", "eval_samples", "shuffle_buffer", "num_proc")}
    refuse_changes({k: decided[k] for k in here}, here, cfg.cache_dir, "leave it out")
    return m


def pack(*fields):
    """(values, bits), ... -> bytes, each value in its bits: Arrow's 8, 16 and 32 are a third more."""
    wide = ((np.asarray(x, ">u4").view(np.uint8).reshape(-1, 4), bits) for x, bits in fields)
    return np.packbits(np.concatenate([np.unpackbits(x, axis=1)[:, 32 - n:].ravel() for x, n in wide])).tobytes()


def unpack(data, *fields):
    """Bytes, (how many, bits), ... -> the values of each."""
    parts = np.split(np.unpackbits(np.frombuffer(data, np.uint8)), np.cumsum([n * bits for n, bits in fields]))
    wide = (np.pad(x.reshape(n, bits), ((0, 0), (32 - bits, 0))) for x, (n, bits) in zip(parts, fields))
    return [np.packbits(x).view(">u4").astype(np.int64) for x in wide]


def unpack_row(data, tokens, n, entries, m):
    """-> a row like those of load_data, and the fields of its SparseTarget with m["size"] places a token."""
    size, (wide, bits, more) = m["size"], m["bits"]
    text, both, extra = unpack(data, (tokens, wide + 1), (entries, wide + bits), (n, more))
    ids, code = both & (1 << wide) - 1, both >> wide
    if m["method"] == "sample":   # an id stands as often as it was drawn
        ids, entropy = np.repeat(ids, code + 1).reshape(n, size), extra / 256
        q = np.pad(np.full((n, size), 1 / size), ((0, 0), (0, 1)))
    else:   # a sum of 1 takes out the common part of the rounding; entropy of what is listed and rest: KL >= 0
        ids, q = ids.reshape(n, size + 1)[:, :-1], (np.exp(-24 * (code / 255) ** 2) * (code < 255)).reshape(n, size + 1)
        q /= q.sum(1, keepdims=True)
        entropy = -(q * np.log(q + 1e-30)).sum(1)
    q, entropy = q.astype(np.float32), entropy.astype(np.float32)
    return {"input_ids": text >> 1, "targets": text % 2 == 1, "sparse": (ids, q[:, :-1], q[:, -1], entropy)}


def read_chunk(path, row=0):
    """-> its table, the bytes of a row (the first is 1). Mapped anew each time: 50 us, and nothing has to be kept."""
    try:
        with safetensors.safe_open(path, "numpy") as f:
            table = f.get_tensor("table")
            data = f.get_slice("rows")[int(table[row - 1, 0]) if row else 0:int(table[row, 0])].tobytes()
            if (zlib.crc32(table), zlib.crc32(data)) != (int(f.metadata()["crc"]), table[row, -1]):
                raise ValueError("wrong checksum")
            return table, data
    except Exception as e:
        explain_bad_chunk(path, e)


class CacheRows:
    """The rows of a split, by number: nothing is read but what is asked for."""
    def __init__(self, name, m, chunks):
        self.name, self.m, self.starts = name, m, np.cumsum([0, *chunks])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        c = int(np.searchsorted(self.starts, i, "right")) - 1
        table, data = read_chunk(f"{self.name}-{c:08d}.safetensors", row := i - int(self.starts[c]) + 1)
        return unpack_row(data, *table[row, 2:5].astype(int), self.m)


def explain_bad_chunk(path, e):
    config = os.path.join(os.path.dirname(path), "config.json")
    again = f"rm {shlex.quote(path)}; python simple_distill.py --config {shlex.quote(config)}"
    raise UserError(f"cache chunk {path!r} is damaged ({one_line(e, 80)}); to make it, and only it, again: {again}")


@contextlib.contextmanager
def explain_bad_disk(folder):
    try:
        yield
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"cache_dir {folder!r} cannot be read or written ({one_line(e)}). Finished chunks stay; make "
                        "room or mend it, and the same command goes on")


@torch.no_grad()
def pack_teacher(get_teacher_targets, rows, first, m):
    """One teacher forward, by every rank since a sharded teacher needs them all -> (bytes, their line in the table: 1
    row, tokens, targets, entries, teacher mass, checksum) a row."""
    (hidden_ND, head), V, (wide, bits, more), packed = get_teacher_targets(collate(rows)), m["vocabulary"], m["bits"], []
    for index, row in enumerate(rows, first):
        ids = np.asarray(row["input_ids"])
        keep = np.ones(len(ids), bool) if row["targets"] is None else np.asarray(row["targets"])
        n, parts, draw = int(keep[1:].sum()), [], torch.Generator().manual_seed(int(digest(m["seed"], index), 16) >> 1)
        u_NS = torch.rand(n, m["size"], dtype=torch.float64, generator=draw).to(DEVICE)   # the same on any device
        mine_ND, hidden_ND = hidden_ND.tensor_split([n])
        for h_CD, u_CS in zip(*(x.split(max(1, LOGITS_BUDGET // (16 * V))) for x in (mine_ND, u_NS))):
            logits = scale_and_softcap(nn.functional.linear(h_CD, head.weight, head.bias)[:, :V], *head[2:])[0]
            logp_CV = torch.log_softmax(logits / m["temperature"], -1)
            if m["method"] == "sample":   # where u falls in the cumulated distribution
                cdf = logp_CV.exp().cumsum(-1, dtype=torch.float64)
                draws = torch.searchsorted(cdf, u_CS * cdf[:, -1:], right=True).clamp_max(V - 1).sort(-1)[0]
                # the entropy as these draws show it: student = teacher then logs a KL of 0, not of noise around 0
                extra = logp_CV.gather(-1, draws).mean(-1).mul(-256).round().clamp_max(4095)
                places = draws + V * torch.arange(len(draws), device=DEVICE)[:, None]
                places, times = torch.unique_consecutive(places, return_counts=True)
                own, listed, code = logp_CV.flatten()[places], places % V, times - 1
            else:   # 8 bits of sqrt(-log p), the rest being one more entry: log p is off < .0193 sqrt(-log p) + .0001
                own, listed = logp_CV.topk(m["size"])
                extra = (1 - own.exp().sum(-1, keepdim=True)).clamp_min(0)
                code = torch.cat([own, extra.log()], -1).div(-24).sqrt().mul(255).round().clamp_max(255)
                listed = nn.functional.pad(listed, (0, 1))
            parts.append([x.flatten().double().cpu() for x in (listed + (code.long() << wide), extra, own.exp().sum())])
        both, extra, mass = (torch.cat(x).numpy() for x in zip(*parts))
        data = pack((ids << 1 | keep, wide + 1), (both, wide + bits), (extra, more))
        packed.append((data, (1, len(ids), n, len(both), mass.sum(), zlib.crc32(data))))
    return packed


def fill_chunks(place, splits, m, encode_columns, get_teacher_targets, paths):
    """Make the chunks that no living worker has, list them all, yield tokens after each forward. A stream is cut into
    blocks of raw rows, each packed on its own: nobody has to tokenise what another worker does."""
    with open(place("claims"), "a") as claims:   # a locked byte a chunk; the kernel frees those of the dead
        for odd, (split, rows) in enumerate(splits.items()):
            stored, size = isinstance(rows, datasets.Dataset), m["chunk"]
            for c, columns in enumerate(range(0, len(rows), size) if stored else rows.iter(size)):
                paths.append(path := place(f"{split}-{c:08d}.safetensors"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, c + (odd << 60))
                    if os.path.exists(path):
                        continue
                    block = rows_of(rows[columns:columns + size] if stored else encode_columns(columns))
                    first = c * size + (odd << 60) + (0 if stored else c << 32)
                    packed = [(b"-", (*[0] * 5, zlib.crc32(b"-")))]   # row 0: all there is of a chunk without rows
                    for i in range(0, len(block), m["group"]):
                        packed += pack_teacher(get_teacher_targets, block[i:i + m["group"]], first + i, m)
                        yield sum(len(row["input_ids"]) for row in block[i:i + m["group"]])
                    data, counts = zip(*packed)
                    table = np.column_stack([np.cumsum([len(x) for x in data]), counts])
                    with open(path + ".tmp", "wb") as f:   # sliced through the memory map, no code in it
                        f.write(safetensors.numpy.save({"rows": np.frombuffer(b"".join(data), np.uint8),
                                                        "table": table}, {"crc": str(zlib.crc32(table))}))
                    sync(f.name)
                    os.replace(f.name, path)


def from_cache(cfg):
    return cfg, load_with_cache


def load_with_cache(cfg):
    rows, held, tokenizer, _ = open_cache(cfg)
    return tokenizer, rows, held, load_checked_student(cfg, tokenizer), None


def describe_cache_use(cfg):
    return f"teacher: cache {cfg.cache_dir}"


def open_cache(cfg):
    """-> train rows, eval rows, tokenizer, manifest; refused where the run does not fit what is stored."""
    m, place = read_manifest(cfg), functools.partial(os.path.join, cfg.cache_dir)
    rows, held = (CacheRows(place(s), m, m["chunks"][s]) for s in ("train", "eval"))
    held.starts = held.starts.clip(max=cfg.eval_samples)
    tokenizer = AutoTokenizer.from_pretrained(place("tokenizer"))
    own = load_tokenizer(cfg, cfg.student) or tokenizer
    compare_tokenizers(own, tokenizer, cfg.tokenizer or cfg.student, f"{cfg.cache_dir}: {m['teacher']}")
    return rows, held, tokenizer, m


def fill_cache(cfg):
    """Fill what is missing of cache_dir. Any number of workers may, at any time; the same command goes on."""
    run = cfg
    tokenizer = load_tokenizer(cfg, cfg.student, cfg.teacher)
    rows, held = load_data(cfg, tokenizer)
    teacher = load_checked_teacher(cfg, tokenizer)
    place, get_teacher_targets = functools.partial(os.path.join, cfg.cache_dir), teacher_targets(teacher)
    missing, stop = 1, 0
    with explain_bad_disk(cfg.cache_dir), stop_signals() as asked:
        m = start_cache(cfg, run, tokenizer, rows, str(compute_dtype(cfg)), RANK)
        all_sum(0)
        few = pack_teacher(get_teacher_targets, [held[i] for i in range(min(len(held), m["group"]))], 0, m)
        total, done = plan_cache(cfg, few, None if cfg.streaming else len(rows) + len(held), print0)
        with tqdm(total=total, initial=done, disable=RANK != 0, unit="tok", unit_scale=True) as bar:
            while missing and not stop:   # once more, where another worker had a chunk and may have died with it
                paths, problem, more = [], None, 1
                jobs = fill_chunks(place, {"eval": held, "train": rows}, m, encoder(cfg, tokenizer), get_teacher_targets, paths)
                while more and not stop:
                    try:
                        tokens = next(jobs, 0)
                    except OSError as e:
                        problem, tokens = e, 0
                    if not tokens:   # the others may still need this rank
                        pack_teacher(get_teacher_targets, [], 0, m)
                    more, stop, failed = all_sum(tokens, len(asked), problem is not None)
                    if failed:
                        raise problem or OSError("another rank could not write")
                    bar.update(int(more))
                missing, = all_sum(sum(not os.path.exists(p) for p in paths))
                time.sleep(missing > 0)
        if stop:
            print0("stopped; the same command goes on")
        elif RANK == 0:   # read back: of all workers
            print0(finish_cache(cfg, m, paths, [table.sum(0).tolist() for table, _ in map(read_chunk, paths)]))


# --------------------------------------------------------------------------------------------------
# Optional: blockwise: block i of the student learns to end where its teacher block ends, seen
# through a linear stitch to the teacher's width; then norm and head learn the teacher's logits; then
# plain distillation follows. train_blockwise() is a sibling of train(), with several stages.


def train_blockwise(cfg):
    """Block by block, then the head, then as usual -> True when done, False when stopped."""
    run = start_run(cfg)
    if run is None:
        return True
    stages = block_stages(run)
    blocks_end = max(stage.end for stage in stages if stage.mean_over == "real")
    with begin(run, stages):
        if "block_errors" not in run.notes:
            measure_blocks(run)
        for stage in stages:
            if run.step >= stage.end:   # done before a resume
                continue
            if not train_stage(run, stage):
                break
            if stage.end == blocks_end:
                measure_blocks(run)
                if cfg.initialize_head_from_teacher:
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
                                  temperature=cfg.logit_loss_temperature),
        get_teacher_targets=teacher_targets(run.teacher if alpha < 1 else None),
        rates={p: cfg.lm_head_lr for p in parts["head"]}, weight_decay=cfg.lm_head_wd,
        max_grad_norm=cfg.lm_head_max_grad_norm)


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
    hidden_states(model, batch.input_ids)
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
    # 1 - cos, as half the squared distance of unit vectors
    student_ND = nn.functional.normalize(student_ND.float(), dim=-1)
    teacher_ND = nn.functional.normalize(teacher_ND.float(), dim=-1)
    return (student_ND - teacher_ND).square().sum(-1) / 2


def make_block_loss(cfg, student, teacher, pairs):
    """-> loss_fn and get_teacher_targets of a Stage that trains the blocks in pairs. loss_fn hands
    on the error of each block after loss, ce and kl (which are 0)."""
    fed_by_teacher = cfg.block_input == "teacher"

    def get_teacher_targets(batch):
        with torch.no_grad():
            return teacher(around_blocks, batch, pairs.values(), {})

    def loss_fn(model, batch, teacher_states, denominator):
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
        errors = []
        for i, j in pairs.items():
            error_N = hidden_error(
                stitch(f"up{i}", real(student_states[i][1])), real(teacher_states[j][1]),
                cfg.distill_loss_type, cfg.distill_loss_temperature)
            errors.append(error_N.sum() / denominator)
        ce, kl = errors[0].new_zeros(2)
        return sum(errors), ce, kl, *errors

    return loss_fn, get_teacher_targets


def measure_blocks(run):
    """The held-out error of every block, now: kept in run.notes, logged and shown."""
    pairs = match_blocks(run.cfg, run.student.model.config, run.teacher.model.config)
    loss_fn, get_teacher_targets = make_block_loss(run.cfg, run.student, run.teacher, pairs)
    _, _, _, *errors = mean_over_rows(run.student, loss_fn, get_teacher_targets, run.eval_rows,
                                      run.batch_size, "real")
    run.notes.setdefault("block_errors", []).append(errors)
    print0(block_table(run))
    entry = {f"block/{i}/loss": error for i, error in enumerate(errors)}
    log(run, entry | {"block/step": run.step})


def block_table(run):
    """The errors that were measured: once before and, after the blocks, once more."""
    pairs = match_blocks(run.cfg, run.student.model.config, run.teacher.model.config)
    measured = run.notes["block_errors"]
    title = f"held-out {run.cfg.distill_loss_type}"
    lines = [f"\n{'block':<8}{'teacher block':<15}{title:>18}"]
    if len(measured) > 1:
        lines[0] += f"{'after':>14}"
    for i, j in pairs.items():
        line = f"{i:<8}{j:<15}{measured[0][i]:>18.4g}"
        for errors in measured[1:]:
            line += f"{errors[i]:>14.4g}"
        lines.append(line)
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
    """The last module beside the decoder layers with a weight of one dimension; Identity where there
    is none."""
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
    return head.weight.float(), head.bias, head.scale, (plus - minus) / 2 * probe, (plus + minus) / 2


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
# Optional: generate: a model behind an API, or one of our own, answers prompts; filters judge the replies.
# Hands on output_dir/train.jsonl, one conversation a row, which --dataset FILE --alpha 1 trains on.
TASKS = {"implement": "Write {thing} in {language}.", "complete": "Complete this function; give all of it.",
         "explain": "Explain what this function does.", "debug": "One operator or index here is wrong. Fix it.",
         "refactor": "Refactor this function; keep what it does.", "translate": "Translate this to {language}.",
         "test": "Write pytest tests for this function.", "document": "Write the docstring of this function."}
FORMS = "{}|Please help me: {}|Here is a task for you. {}|I need this for my project. {}".split("|")
THINGS = "LRU cache|trie|tokenizer|diff tool|job scheduler|web crawler|state machine|CSV reader|URL router".split("|")
TRAITS = "thread-safe|memory-bounded|streaming|resumable|strict|pluggable|lazy|minimal|configurable".split("|")
LANGUAGES = "Python|C|C++|C#|Go|Java|JavaScript|Kotlin|PHP|Ruby|Rust|Swift|TypeScript".split("|")
LEVELS = "I am new to programming.|I program every day.|I am an expert, so go deep.".split("|")
LIMITS = "Keep it short.|Name the edge cases.|State its cost.|Give an example.|Say why.|Say what could fail.".split("|")
BUGS = [pair.split("|") for pair in (" <= | < ", " >= | > ", " == | != ", " < | > ", " + | - ", " += | -= ", "[0]|[1]")]


def compose_prompts(categories, seed):
    """Yields distinct (category, messages) without end: asking for more only adds, so a run can be extended."""
    def real_functions():
        for _, text in rng.sample(sources := list(stdlib_sources()), len(sources) // 3):   # parsing all takes 5 s
            lines = text.split("\n")
            for f in ast.walk(ast.parse(text)):
                if isinstance(f, ast.FunctionDef) and 5 < f.end_lineno - f.lineno < 30 and not ast.get_docstring(f):
                    yield "\n".join(line[f.col_offset:] for line in lines[f.lineno - 1:f.end_lineno])

    weights, rng, seen, misses = {}, random.Random(seed), set(), 0
    for name, equals, weight in (item.partition("=") for item in categories or TASKS):
        with contextlib.suppress(ValueError):
            weight = weights[name] = float(weight if equals else 1)
        if name not in TASKS or not isinstance(weight, float) or not 0 < weight < INF:
            raise UserError(f"categories {name}={weight}: write name or name=weight; the names are {', '.join(TASKS)}")
    asked, codes, pick = collections.Counter(), itertools.cycle(real_functions()), rng.choice
    while misses < 1000:
        name = min(weights, key=lambda n: (asked[n] + 1) / weights[n])   # the one most behind its share
        code, misses = next(itertools.islice(codes, pick(range(20)), None)), misses + 1
        bugs = [bug for bug in BUGS if bug[0] in code]
        code = {"complete": code[:len(code) // 2].rpartition("\n")[0],
                "debug": bugs and code.replace(*pick(bugs), 1)}.get(name, code)
        language, thing = pick(LANGUAGES[name == "translate":]), f"a {pick(TRAITS)} {pick(THINGS)}"
        shown = "" if name == "implement" else f"\n\n```python\n{code}\n```"
        text = pick(FORMS).format(TASKS[name].format(language=language, thing=thing)) + shown
        text += f"\n\n{pick(LEVELS)} {pick(LIMITS)}"
        if code and text not in seen:
            seen.add(text)
            asked[name], misses = asked[name] + 1, 0
            yield name, [{"role": "user", "content": text}]
    raise UserError(f"category {name} has few more than {asked[name]:,} prompts; lower num_examples or its weight")


def read_prompts(path):
    """Yields (category, messages) of the user's own prompts: the lines of a .txt, or .jsonl rows."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            for line in filter(str.strip, f):
                row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.strip()}
                messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
                messages[-1]["role"] != "assistant" or refuse(f"prompts_file {path} has a row that ends with a reply")
                yield row.get("category", "own"), [{"role": m["role"], "content": m["content"] + ""} for m in messages]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"prompts_file {path}: {one_line(e)}; a row is {{\"prompt\": TEXT}} or {{\"messages\": [...]}}")


def usd(cfg, sent, got):
    return (sent * (cfg.price_in or 0) + got * (cfg.price_out or 0)) / 1e6


def all_prompts(cfg):
    """-> {prompt_id: job} of num_examples different prompts, in the order they are asked."""
    source, jobs, least = cfg.prompts_file, {}, 1 if cfg.prompts_file else 20   # own prompts may want a word or a label
    for category, messages in read_prompts(source) if source else compose_prompts(cfg.categories, cfg.seed):
        # no more tokens than this: each is a byte or more, and 64 a turn for the chat format
        size, name = sum(64 + len(m["content"].encode(errors="replace")) for m in messages), digest(messages)
        jobs.setdefault(name, types.SimpleNamespace(
            prompt_id=name, category=category, messages=messages, size=size, least=least, place=len(jobs),
            worst=usd(cfg, size, cfg.max_tokens), tries=0, held=0.0))   # USD a try; tries billed; USD set aside
        if len(jobs) == (cfg.num_examples or (INF if source else 100)):
            break
    return jobs or refuse(f"prompts_file {source} holds no prompt")


def grade_reply(job, said, finish_reason, usage):
    """A reply, or None -> its row; `reason` is the first filter that rejects it, or why there is no reply."""
    row = {"messages": job.messages, "category": job.category, "prompt_id": job.prompt_id,
           "finish_reason": finish_reason, "usage": dict(zip(("prompt_tokens", "completion_tokens"), usage))}
    if said is None:
        return row | {"finish_reason": None, "reason": finish_reason}
    row["messages"] = [*job.messages, {"role": "assistant", "content": said}]
    flaws = find_flaws(job.messages[-1]["content"], said, finish_reason, job.least)
    return row | next(({"reason": name} for name, found in flaws.items() if found), {})


def find_flaws(prompt, reply, finish_reason, least=1):
    """-> {filter: whether it rejects the reply}; least: the characters of a reply that is not too short"""
    reply = reply.replace("\r\n", "\n")
    asked, said = (" ".join(re.sub(r"(?m)```(\w*\s*$)?", " ", text).split()) for text in (prompt, reply))
    fenced = r"(?ms)^[ \t]*(?:[-*+] +|\d+[.)] +)?(```+)[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*\1`*[ \t]*$"   # in a list too
    sorry = (r"(?i)\W*((unfortunately|i apologi[sz]e( for [\w ]+)?|(i.?m |i am )?(\w+ )?(sorry|afraid))\W+(but )?)?"
             r"(as an ai( \w+){,5}\W+i\b|i (must|have to) (\w+ )?decline|(i|i.?m|i am) (can( ?no|.)?t|(un|not |"
             r"won.?t be )able to) (help(?! but)|assist|provide|fulfil|comply|create|write|do th))")
    broken = re.search(r"(?m)^[ \t]*([-*+] +|\d+[.)] +)?```+[^`\n]*$", re.sub(fenced, "", reply))   # never closed
    try:
        with warnings.catch_warnings(action="ignore"):
            for _, kind, code in re.findall(fenced, reply):
                ast.parse(textwrap.dedent(code) if re.fullmatch("(?i)py(thon)?3?", kind) and ">>>" not in code else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        broken = True
    # a loop deflates to an eighth, code to a third; the tail alone shows a reply that ended in one
    data = reply.encode(errors="replace")
    loops = [len(zlib.compress(part)) < len(part) / 8 - 40 for part in (data, data[-1000:])]
    return {"cut off": finish_reason in ("length", "max_tokens", "model_context_window_exceeded"),
            "empty or too short": len(said) < least, "repetition loop": any(loops), "code does not parse": broken,
            "refusal": finish_reason in ("refusal", "content_filter") or "```" not in reply and re.match(sorry, said),
            "repeats the prompt": (said in asked or asked in said) and len(asked) / 2 < len(said) < 1.2 * len(asked)}


def read_replies(train, rejected):
    """-> {prompt_id: row}; where a kill or a failure left two: a reply counts, and its copy that is in rejected too"""
    weight = lambda row: (row.get("finish_reason", "") is not None, "reason" in row)   # None: no reply, it failed
    return {row["prompt_id"]: row for row in sorted(read_jsonl(rejected) + read_jsonl(train), key=weight)}


def drop_duplicates(train, rejected, order):
    """Sorts both, moves copies to rejected; at the end, so that who answered first does not matter. -> {fate: rows}"""
    place, texts, similar = {name: i for i, name in enumerate(order)}, set(), collections.defaultdict(list)
    rows = sorted(read_replies(train, rejected).values(), key=lambda row: place.get(row["prompt_id"], -1))
    for row in (row for row in rows if "reason" not in row):
        prompt, words = (re.findall(r"\w+|[^\w\s]", m["content"].lower()) for m in row["messages"][-2:])
        # a label answers many prompts, and each pair is an example: short replies are copies only to the same prompt
        text = hash((*words, None, *prompt * (short := len(words) < 20)))
        # of all 5-word shingles the 64 smallest hashes: two such sketches overlap about as much as the texts do
        mine = sorted({zlib.crc32(" ".join(words[i:i + 5]).encode()) for i in range(len(words) - 4)})[:64 * (not short)]
        near = any(len({*mine} & {*other} & (both := {*sorted({*mine, *other})[:64]})) > 0.8 * len(both)
                   for h in mine[:8] for other in similar[h])
        kind = "exact duplicate" if text in texts else "near duplicate" if near else None
        texts.add(text)
        for h in () if kind else mine[:8]:
            similar[h] += [mine] * (len(similar[h]) < 50)   # what everybody says is no evidence, and costs time
        row |= {"reason": kind} if kind else {}
    for path, out in ((rejected, True), (train, False)):   # in this order a kill loses none
        with open(path + ".tmp", "w", encoding="utf-8", errors="replace") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if ("reason" in row) == out)
        os.replace(f.name, path)
    fates = [row.get("reason", "kept").partition(":")[0] for row in rows]
    names = "kept", *find_flaws("", "", None), "exact duplicate", "near duplicate", "failed"
    return {name: fates.count(name) for name in names}


def close_files(train, rejected, summary, order, spent, tokens, ended):
    """Duplicates go, the summary is written -> the table of what became of each prompt."""
    fates = drop_duplicates(train, rejected, order)
    write_json({"spent_usd": spent, "tokens_this_time": tokens, "ended": str(ended), **fates}, summary)
    share = (f"  {name:20}{n:8,}{n / max(1, sum(fates.values())):8.1%}" for name, n in fates.items())
    return "\n".join([*share, f"{tokens:,} tokens" + f", {spent:.4f} USD" * (spent > 0) + f"; {ended}" + (
        f"; --dataset {train} trains on it" if fates["kept"] else "; nothing was kept, see " + rejected)])


@contextlib.asynccontextmanager
async def api_teacher(cfg, run):
    """-> ask([job]) over the official SDK, which repeats what fails in passing (429, 5xx, time-outs, drops)."""
    sdk, openai = importlib.import_module(cfg.provider), cfg.provider == "openai"
    make, path = (sdk.AsyncOpenAI, "/chat/completions") if openai else (sdk.AsyncAnthropic, "/v1/messages")
    limit = "max_completion_tokens" if openai and not cfg.api_base else "max_tokens"   # OpenAI itself renamed it
    key = os.environ.get(f"{cfg.provider.upper()}_API_KEY", "").strip() or "none"   # a short one is a word: EMPTY
    clean = lambda text: str(text or "").replace(key if len(key) > 7 else "\0", "***")   # some servers repeat it
    class Wire(sdk.DefaultAsyncHttpxClient):
        async def send(self, request, **options):   # each try of the SDK: none leaves without money held for it
            job = run.jobs[asyncio.current_task().get_name()]
            if run.stop or job.tries > 5 or not run.reserve(job):   # after an Exception the SDK would try again
                raise asyncio.CancelledError("no answer in 6 tries, or no money for another")
            job.tries += 1
            response = await asyncio.wait_for(super().send(request, **options), 2 * cfg.request_timeout)
            if response.status_code >= 400:   # refused: free, and what is held serves the next try
                job.tries, run.pace = job.tries - 1, max(1, 0.7 * run.pace)
            return response
    async def ask(jobs):
        client.max_retries = 20 if run.answered else 2   # patience once it answered
        turns = [m for m in jobs[0].messages if openai or m["role"] != "system"]
        system = "\n\n".join(m["content"] for m in jobs[0].messages if m not in turns) or None
        body = {"messages": turns, "system": system, "model": cfg.api_model, "temperature": cfg.api_temperature,
                limit: cfg.max_tokens}
        try:   # post: the typed methods cost twice the time and change from version to version
            r = await client.post(path, body={k: v for k, v in body.items() if v is not None}, cast_to=object)
            said = r["choices"][0]["message"]["content"] if openai else "".join(b.get("text", "") for b in r["content"])
            end = r["choices"][0]["finish_reason"] if openai else r["stop_reason"]
            sides = ("prompt_tokens", "completion_tokens") if openai else ("input_tokens", "output_tokens")
            return [(clean(said), clean(end), *map((r.get("usage") or {}).get, sides))]
        except (Exception, asyncio.CancelledError) as e:
            error, status = clean(one_line(e, 9999))[:300], getattr(e, "status_code", None)
            alone = status in (400, 413, 422) and run.past   # others were answered before: it is the prompt
            if status in (401, 402, 404) or isinstance(e, sdk.APIError) and not run.answered and not alone:
                run.stop.append(UserError(f"{cfg.provider}, model {cfg.api_model}: {error}"))
            return [(None, f"failed: {error}", None, None)]
    async with make(api_key=key, base_url=cfg.api_base, timeout=cfg.request_timeout, http_client=Wire()) as client:
        yield ask


async def ask_all(run, teacher, batches, record_reply):
    """In prompt order, run.pace batches in flight, until all is answered or run.stop says why not."""
    flying = {}
    async with teacher as ask:
        while flying or batches and not run.stop:
            if batches and not run.stop and len(flying) < int(run.pace) and all(map(run.reserve, batches[0])):
                jobs = batches.popleft()
                flying[asyncio.create_task(ask(jobs), name=jobs[0].prompt_id)] = jobs
            elif flying:   # even when stopped: what is in flight is paid for; and it may cost less than is held for it
                for task in (await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))[0]:
                    for job, answer in zip(flying.pop(task), task.result()):
                        record_reply(job, *answer)
            else:
                run.stop.append("max_cost is reached")


@contextlib.asynccontextmanager
async def local_teacher(cfg, run):
    """-> ask(jobs) over a transformers model on this device, a batch at a time."""
    tokenizer = load_tokenizer(cfg, cfg.teacher) or refuse(f"teacher {cfg.teacher!r} has no tokenizer; use --tokenizer")
    config, heat = model_config(cfg.teacher, cfg, "teacher"), cfg.api_temperature
    model = read_model(cfg.teacher, config, cfg, "teacher", compute_dtype(cfg)).to(DEVICE)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = tokenizer.chat_template or "{{bos_token}}{%for m in messages%}{{m.content}}\n\n{%endfor%}"
    model.generation_config.pad_token_id = pad = tokenizer.pad_token_id
    sampling = {} if heat is None else {"do_sample": heat > 0, "temperature": heat or 1.0}
    async def ask(jobs):
        inputs = tokenizer.apply_chat_template([job.messages for job in jobs], add_generation_prompt=True, padding=True,
                                               return_dict=True, return_tensors="pt").to(DEVICE)
        torch.manual_seed(int(digest(cfg.seed, jobs[0].prompt_id), 16) % 2**63)   # the same after a resume
        ids_BT = model.generate(**inputs, max_new_tokens=cfg.max_tokens, **sampling)[:, inputs["input_ids"].shape[1]:]
        return [(tokenizer.decode(row, skip_special_tokens=True).strip(),
                 "stop" if len(row) < cfg.max_tokens or row[-1] == pad else "length", mask.sum().item(),
                 sum(t != pad for t in row)) for row, mask in zip(ids_BT.tolist(), inputs["attention_mask"])]
    yield ask


def generate(cfg):
    """Ask what has no reply yet; leave train.jsonl, rejected.jsonl and summary.json in output_dir."""
    train, rejected, summary = (f"{cfg.output_dir}/{f}" for f in ("train.jsonl", "rejected.jsonl", "summary.json"))
    jobs, recent, local = all_prompts(cfg), collections.deque(maxlen=50), cfg.provider == "local"
    past = {name: (row["cost"], row["finish_reason"] is None) for name, row in read_replies(train, rejected).items()}
    todo, spent = [job for name, job in jobs.items() if past.get(name, (0, 1))[1]], sum(x for x, _ in past.values())
    with contextlib.suppress(FileNotFoundError), open(summary, encoding="utf-8") as f:
        spent = max(spent, json.load(f)["spent_usd"])   # with what a kill left in flight
    write_json(cfg, os.path.join(cfg.output_dir, "config.json"))
    print0(f"{len(todo):,} of {len(jobs):,} prompts to ask, ~{sum(job.size for job in todo) // 4:,} tokens; at most "
           f"{len(todo) * cfg.max_tokens:,} come back, for {sum(job.worst for job in todo):.2f} USD at these prices")
    def reserve(job):   # the worst case is spent before a try leaves, on disk too: a cap holds over kills and restarts
        more = (job.tries + 1) * job.worst - job.held
        if more > 0 and run.spent + more <= (cfg.max_cost or math.inf):
            run.spent, job.held, more = run.spent + more, job.held + more, 0
            write_json({"spent_usd": run.spent}, summary)
        return more <= 0
    def record_reply(job, said, end, *usage):
        known, failed = all(isinstance(n, int) and n >= 0 for n in usage), said is None
        cost = (job.tries - known) * job.worst + (usd(cfg, *usage) if known else 0)   # usage lost: the worst case
        run.spent, run.tokens = run.spent + cost - job.held, run.tokens + (sum(usage) if known else 0)
        if failed and run.stop:   # no row: a later run asks again
            return
        cost += past.get(job.prompt_id, (0,))[0]   # what it cost when it failed: the last row of a prompt counts
        row = grade_reply(job, said, end, usage) | {"model": cfg.api_model or cfg.teacher, "cost": cost}
        append_jsonl(rejected if "reason" in row else train, row)
        recent.append(failed and job.prompt_id not in past)   # one that always fails must not stop each later run
        run.pace, run.answered = min(width, run.pace + (not failed)), run.answered or not failed
        if sum(recent) > 10:
            run.stop.append(UserError(f"{sum(recent)} of the last {len(recent)} requests failed, the last: {end}"))
        bar.set_postfix_str(f"{run.tokens:,} tokens" + f", {run.spent:.4f} USD" * (run.spent > 0), refresh=False)
        bar.update()
    run = types.SimpleNamespace(jobs=jobs, reserve=reserve, spent=spent, tokens=0, pace=1, answered=False, past=past)
    make, size, width = (local_teacher, cfg.concurrency, 1) if local else (api_teacher, 1, cfg.concurrency)
    batches = collections.deque(list(g) for _, g in itertools.groupby(todo, lambda job: job.place // size))
    with stop_signals() as run.stop, tqdm(total=len(todo), unit="prompt", dynamic_ncols=True, mininterval=0.5) as bar:
        asyncio.run(ask_all(run, make(cfg, run), batches, record_reply))
    ended = next(("stopped by a signal" if isinstance(x, float) else x for x in run.stop), "all is answered")
    print0(close_files(train, rejected, summary, list(jobs), run.spent, run.tokens, ended))
    if isinstance(ended, UserError):
        raise ended


# --------------------------------------------------------------------------------------------------
# Optional: eval: what was lost, what was gained, was the teacher worth it?
METRICS = dict(perplexity="perplexity", bits="bits a byte", accuracy="top-1 accuracy", agreement="top-1 as the teacher",
               kl="KL to the teacher", ece="calibration error", parameters="parameters", disk="bytes on disk",
               prefill="prefill tokens/s", generation="generation tokens/s", memory="peak memory, bytes")
LEGEND = ("In brackets 95 % (bootstrap over sequences); x: of the teacher. Prefill: a batch of that shape; generation: "
          "batch 1; memory: while generating, GPUs only. A checkpoint is as large as its final/ will be.")
CURVES = ((0, "train/ce_loss", "-"), (0, "train/kl_loss", ":"), (0, "eval/ce_loss", "{}"), (1, "MSE / variance", "{}-"),
          (1, "CKA", "{}:"), (3, "reliability", "{}-"))   # panel, name, line and the model's {mark}
PANELS = (dict(title="Training", xlabel="step", ylabel="nats a token"),
          dict(title="Layers against the teacher's", xlabel="student layer", ylabel="MSE / variance; CKA"),
          dict(title="Quality against size", xlabel="parameters", ylabel="bits a byte, held out, 95 %", xscale="log"),
          dict(title="Reliability", xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1)))


def retokenize(rows, base, other):
    """The counted text of each row under another tokenizer: the same bytes, after EOS in place of the first token."""
    if rows[0]["targets"] is not None:
        raise UserError("models with different tokenizers are compared on plain text; here prompts are masked")
    ends, how = (base.eos_token or "\0", other.eos_token or ""), dict(add_special_tokens=False, verbose=False)
    texts = (base.decode(row["input_ids"][1:]).replace(*ends) for row in rows)
    return [{"input_ids": [other.eos_token_id or 0, *other(text, **how)["input_ids"]]} for text in texts]


def interval(top, bottom, seed):
    """sum(top) / sum(bottom) and its 95 %, sequences drawn anew: percentiles, widened for few like Student's t."""
    n, draw, middle = len(top), np.random.default_rng(seed), top.sum() / bottom.sum()
    picks = (draw.integers(0, n, (100, n)) for _ in range(20))
    off = np.concatenate([top[i].sum(1) / bottom[i].sum(1) for i in picks]) - middle
    widen = math.sqrt(n / (n - 1)) * (1 + 1.21 / (n - 1))
    return [float(middle), *(middle + widen * np.quantile(off, (0.025, 0.975))).tolist()]


def read_curves(name):
    """{key: [(step, value), ...]} from log.jsonl of the run that a model directory or a checkpoint is of."""
    curves, places = {}, (os.path.join(name, up, "log.jsonl") for up in ("..", "../.."))
    with open(next(filter(os.path.isfile, places), os.devnull), encoding="utf-8") as f:
        for entry in (json.loads(line) for line in f if line.endswith("}\n")):
            for key in (k for k in entry if k.endswith("loss") and entry[k]):
                curves.setdefault(key, []).append((entry[key.split("/")[0] + "/step"], entry[key]))
    return curves


def compute_metrics(models, tables, sizes, seed):
    """The figures of each model, from its sums a sequence (see score) and the bytes of each."""
    for label, m in models.items():
        counts, nats, *_ = tables[label].T
        tokens, _, right, agreed, kl = tables[label].sum(0).tolist()
        judged, files = m.pop("judged"), glob.glob(os.path.join(glob.escape(m["name"]), "*.safetensors"))
        m["perplexity"], *m["perplexity_95"] = (math.exp(min(x, 700)) for x in interval(nats, counts, seed))
        m["bits"], *m["bits_95"] = interval(nats / math.log(2), sizes, seed)
        m |= dict(tokens=int(tokens), accuracy=right / tokens, agreement=agreed / tokens if judged else None,
                  kl=kl / tokens if judged else None, ece=sum(abs(h - c) for _, h, c in m["bins"]) / tokens,
                  disk=sum(map(os.path.getsize, files)) or m["disk"])
        m["ratio"] = {k: m[k] / whole for k in METRICS if m[k] is not None and (whole := models["teacher"][k])}
        m["curves"] = {} if label == "teacher" else read_curves(m["name"])
        for name, key in (("MSE / variance", "share"), ("CKA", "cka")):
            m["curves"][name] = [(x["student"], x[key]) for x in m["layers"]]
        m["curves"]["reliability"] = [(c / n, h / n) for n, h, c in m["bins"] if n]
    for label, m in models.items():
        gap, low, high = interval((tables["student"] - tables[label])[:, 1] / math.log(2), sizes, seed)
        verdict = "better" if high < 0 else "worse" if low > 0 else "no significant difference"
        m["student_against_it"] = dict(difference=gap, interval=[low, high], verdict=verdict)


def draw_report(path, models):
    """Four panels; shades, lines and markers tell models apart in grey too."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for i, (label, m) in enumerate(models.items()):
        color, mark = (("0.6", "s"), ("black", "D"), ("#d55e00", "^"), ("#56b4e9", "o"))[i % 4]
        for panel, key, line in CURVES:
            if points := m["curves"].get(key):
                panels[panel].plot(*zip(*points), line.format(mark), color=color, markersize=5, label=f"{label}: {key}")
        around = [[abs(x - m["bits"])] for x in m["bits_95"]]
        size = m["parameters"] * 1.05 ** i   # aside a little: models of one size are the common case
        panels[2].errorbar(size, m["bits"], around, fmt=mark, color=color, capsize=3, label=label)
    panels[3].plot([0, 1], [0, 1], color="0.85", zorder=0)
    for panel, words in zip(panels, PANELS):
        panel.set(**words)
        panel.get_legend_handles_labels()[0] and panel.legend(fontsize=8, frameon=False)
    panels[2].set_xticks(sizes := sorted({m["parameters"] for m in models.values()}), map(tqdm.format_sizeof, sizes))
    panels[2].minorticks_off(), panels[2].margins(0.25), panels[1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)


def write_report(folder, setting, models, prompts):
    """report.json, report.png and report.md -> the beginning of the last"""
    lines = [f"# {models['student']['name']}: the report", ""]
    show = lambda x: "-" if x is None else f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"
    for label, x in ((k, m["student_against_it"]) for k, m in models.items() if k != "student"):
        gap = "{:+.4f} bits a byte ({:+.4f} to {:+.4f})".format(x["difference"], *x["interval"])
        lines += [f"- student against {label}: {gap}: {x['verdict']}"]

    def cell(label, m, key):
        around = f" ({' to '.join(map(show, m[key + '_95']))})" if key + "_95" in m else ""
        return show(m[key]) + around + f", {show(m['ratio'].get(key))} x" * (label != "teacher" and key in m["ratio"])

    def table(*rows):
        widths = [max(map(len, column)) for column in zip(*rows)]
        pad = lambda row, fill=" ": "| " + " | ".join(x.ljust(w, fill) for x, w in zip(row, widths)) + " |"
        return ["", pad(rows[0]), pad([""] * len(widths), "-"), *map(pad, rows[1:]), ""]

    cells = ([title, *(cell(*x, key) for x in models.items())] for key, title in METRICS.items())
    lines += table(["", *models], *cells)
    lines += [", ".join(f"{k} {v}" for k, v in setting.items()) + ". " + LEGEND, ""]
    try:
        draw_report(os.path.join(folder, "report.png"), models)
        lines += ["![training, layers, quality against size, reliability](report.png)", ""]
    except ImportError:
        lines += ["No report.png: pip install matplotlib", ""]
    start = "\n".join(["", *lines])
    for label, m in models.items():
        if cells := [list(map(show, x.values())) for x in m["layers"]]:
            lines += [f"## Layers of {label}", *table(["layer", "teacher's", "MSE", "MSE / variance", "CKA"], *cells)]
    for i, prompt in enumerate(prompts):   # indented is code: nothing to escape
        said = [f"    {label}: {text!r}" for label, m in models.items() for text in m["texts"][i]]
        lines += ["## Greedy, then sampled, after", "", f"    {prompt!r}", "", *said, ""]
    write_json(dict(setting=setting, models=models, prompts=prompts), os.path.join(folder, "report.json"))
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    return start


def load_evaluated(cfg, name):
    """A model, or checkpoints/step-... of a run in progress."""
    if not os.path.exists(os.path.join(name, "state.json")):
        return load_teacher(dataclasses.replace(cfg, teacher=name))
    found = find_checkpoints(name, None)
    made, folder = found[0][1]["config"], os.path.dirname(os.path.dirname(os.path.realpath(name)))
    made |= dict(output_dir=folder, dtype=cfg.dtype, cache_dir=made.pop("cache", None))   # from a cache: no teacher needed
    root = load_student(Config(**made)).eval()
    load_checkpoint(found, lambda step: tensors_of(root, {}, {}))
    return root


@torch.no_grad()
def score(root, teacher, rows, batch_size, temperature):
    """-> [rows, 5] sums a sequence: tokens, -log p, top-1 right, top-1 the teacher's, KL to it (with its T^2); and
    [15, 3] tokens, hits, confidence a bin of confidence."""
    sums, bins = torch.zeros(len(rows), 5, dtype=torch.float64), torch.zeros(15, 3, dtype=torch.float64)
    for mine in rows_of_this_rank(rows, batch_size):
        batch = collate([rows[i] for i in mine])
        sides = [x(counted_hidden, batch) for x in (root, teacher)]
        row_N = torch.tensor([*mine, 0])[(batch.positions // batch.input_ids.shape[1]).cpu()]
        vocab = min(len(head.weight) for _, head in sides)
        for part in torch.arange(len(row_N)).split(max(1, LOGITS_BUDGET // (24 * vocab))):   # six fp32 [C, V] at a time
            z, y = (scale_and_softcap(nn.functional.linear(h[part], head.weight, head.bias)[:, :vocab], *head[2:])[0]
                    for h, head in sides)
            (best, top), total, label_C1 = z.max(-1), z.logsumexp(-1), batch.labels[part, None].to(DEVICE)
            logp, logq = (torch.log_softmax(x / temperature, -1) for x in (z, y))
            kl = torch.linalg.vecdot(logq.exp(), logq.sub_(logp)) * temperature ** 2
            terms = torch.stack([x.double().cpu() for x in (
                torch.ones_like(kl), total - z.gather(1, label_C1)[:, 0], top == label_C1[:, 0], top == y.argmax(-1),
                kl, (best - total).exp())], 1)
            sums.index_add_(0, row_N[part], terms[:, :5])
            bins.index_add_(0, (terms[:, 5] * 15).long().clamp(max=14), terms[:, [0, 2, 5]])
    dist.all_reduce(sums), dist.all_reduce(bins), root.release(), teacher.release()
    return sums, bins


@torch.no_grad()
def layer_errors(root, teacher, batch):
    """A student layer: MSE to the teacher's (other width: after the best linear map), MSE / variance, linear CKA."""
    look = lambda model: model.base_model(batch.input_ids, use_cache=False, output_hidden_states=True).hidden_states
    (_, *ours), (_, *theirs), layers = root(look), teacher(look), []
    for s, h in enumerate(ours):
        t = max(0, round((s + 1) * len(theirs) / len(ours)) - 1)   # as block-wise mode maps them
        x, y = (h.flatten(0, 1)[batch.positions].double() for h in (h, theirs[t]))
        (xc, yc), (n, width) = (h - h.mean(0) for h in (x, y)), x.shape
        xx, xy, yy = xc.T @ xc, xc.T @ yc, yc.T @ yc
        missed = x - y if x.shape == y.shape else (   # each row of the map takes a token away from the average
            yc - xc @ torch.linalg.pinv(xx, hermitian=True) @ xy) * math.sqrt(n / max(n - width - 1, 1))
        mse, cka = missed.square().mean().item(), (xy.norm() ** 2 / xx.norm() / yy.norm()).item()
        layers.append(dict(student=s + 1, teacher=t + 1, mse=mse, share=mse / yc.square().mean().item(), cka=cka))
    root.release(), teacher.release()
    return layers


def try_out(root, tokenizer, ids_BT, prompts, seed, others):
    """-> tokens a second, peak bytes, and [greedy, sampled] continuations of each prompt."""
    CUDA and torch.cuda.reset_peak_memory_stats()
    prefill = ids_BT.numel() / min(continue_text(root, tokenizer, ids_BT, 1)[0] for _ in range(3))
    ids = [tokenizer(x, add_special_tokens=False, return_tensors="pt")["input_ids"].to(DEVICE) for x in prompts]
    seconds, texts = zip(*(zip(continue_text(root, tokenizer, x), continue_text(root, tokenizer, x, seed=seed)) for x in ids))
    return dict(prefill=prefill, generation=48 / min(greedy for greedy, _ in seconds), texts=texts,
                memory=torch.cuda.max_memory_allocated() - others if CUDA else None)


def report(cfg):
    """What was lost, what was gained, was the teacher worth it? -> report.md, report.json, report.png in output_dir."""
    run = cfg
    student = os.path.join(cfg.output_dir, "final") if cfg.student == "demo" else cfg.student
    names, models, tables, teacher = {"teacher": run.teacher, "student": student}, {}, {}, None
    for name in cfg.compare:
        short = os.path.basename(name.rstrip("/").removesuffix("/final"))
        names[name if short in names else short] = name
    for role, name in names.items():   # a name that is no model is refused before any work
        os.path.exists(os.path.join(name, "state.json")) or model_config(name, run, role)
    base = load_tokenizer(run, run.teacher, student)
    _, rows = load_data(run, base)
    if len(rows) < 2:
        raise UserError(f"{cfg.dataset!r}: one held-out sequence has no interval; bring more text or lower --seq_len")
    few = collate([*itertools.islice(rows, 8192 // cfg.seq_len + 1)])   # for the layers, the same on every rank
    prompts = [base.decode(x["input_ids"][:max(32, collate([x]).positions[0] + 1)])
               for x in itertools.islice(rows, 0, None, -(-len(rows) // 3))]
    for label, name in names.items():
        before, root = torch.cuda.memory_allocated(), load_evaluated(run, name)
        own, told = load_tokenizer(dataclasses.replace(run, tokenizer=None), name) or base, rows
        judge = teacher = teacher or root
        check_head(root, label, name, own)
        try:
            compare_tokenizers(base, own, run.teacher, name)
        except UserError:   # perplexity of its own tokens, bits on the same bytes, nothing that needs one vocabulary
            told, judge = retokenize(rows, base, own), None
        tables[label], bins = score(root, judge or root, told, cfg.batch_size, cfg.temperature)
        batch = collate([told[i % len(told)] for i in range(cfg.batch_size)])
        models[label] = dict(
            name=name, parameters=(size := root.model.num_parameters()), disk=size * compute_dtype(cfg).itemsize,
            judged=judge is not None, layers=[] if judge in (None, root) else layer_errors(root, judge, few),
            bins=bins.tolist(), **try_out(root, own, batch.input_ids, prompts, cfg.seed, before))
        del root
    if RANK == 0:
        sizes = [len(base.decode(collate([row]).labels, skip_special_tokens=True).encode()) for row in rows]
        setting = dict(dataset=run.dataset, sequences=len(rows), bytes=sum(sizes), ranks=WORLD, device=DEVICE.type,
                       dtype=str(compute_dtype(cfg))[6:], temperature=cfg.temperature, prefill=[*batch.input_ids.shape])
        compute_metrics(models, {label: table.numpy() for label, table in tables.items()}, np.array(sizes), cfg.seed)
        print0(write_report(cfg.output_dir, setting, models, prompts * cfg.generate_comparisons))


# --------------------------------------------------------------------------------------------------
# Main: one mode, one function.


def main(argv=None):
    """The command line in this process -> the exit code."""
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        return explain(e)
    return run_config(cfg)


def run_config(cfg):
    """Run what cfg asks for -> 0: done, or saved after a signal; 2: something the user can mend."""
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    run_mode = choose_mode(cfg)
    try:
        with process_group(), contextlib.ExitStack() as stack:
            if cfg.mode != "cache":   # of which any number may be at work
                stack.enter_context(lock(cfg.output_dir))
            run_mode(cfg)
    except UserError as e:
        return explain(e)
    except torch.OutOfMemoryError as e:
        print(f"error: rank {RANK} ran out of memory ({one_line(e)}); turn {MEMORY_ADVICE}",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:   # the second one
        return 130
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


def explain(error):
    if LOCAL_RANK == 0:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
