#!/usr/bin/env python
"""Distil a large language model into a small one: the whole trainer, top to bottom, to be read, copied and changed.

    python simple_distill.py                                                     # the demo: no download, no GPU
    python simple_distill.py --teacher T --student S --dataset D                 # online distillation
    python simple_distill.py --mode cache --teacher T --dataset D --cache_dir C  # run the teacher once ...
    python simple_distill.py --student S --cache_dir C                           # ... and train from disk
    python simple_distill.py --teacher T --student S --dataset D --blockwise     # match hidden states block by block
    python simple_distill.py --mode generate --api_model M                       # a dataset from an API teacher
    python simple_distill.py --mode eval --student out/final --teacher T         # what was lost, what was gained
    ./launch.sh ...                                                              # the same on many devices

Rooms, in order: runtime, losses, data, demo, teacher cache, teacher signal, models and FSDP, optimiser, checkpoints,
block-wise, API data, evaluation, train, main. Shape suffixes: B sequences, T positions, N counted tokens, C those of a
chunk, D width, V vocabulary, K kept teacher entries a token.
"""
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
import datasets
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler

from config import (DEMO_STUDENT, DEMO_TEACHER, DEMO_TEACHER_RUN, DEMO_VOCAB, Config, UserError, parse_config,
                    parse_multipliers, refuse_changes, save_config, scheduler_kwargs, shapes_result)

# ---------------------------------------------------------------------------------------------------------------------
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
    store = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=datetime.timedelta(hours=1), **store)
    try:
        yield
    finally:
        dist.destroy_process_group()

@contextlib.contextmanager
def node_first():
    """The first rank of each node goes ahead (downloads, dataset caches), the others find its work done."""
    if LOCAL_RANK > 0:
        all_sum(0)
    yield
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
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:16]

# ---------------------------------------------------------------------------------------------------------------------
# Losses: alpha * CE + (1 - alpha) * T^2 * KL over chunks of tokens, gradient formed on the spot. Change the objective
# in chunk_terms: it takes logits and hands on two losses a token and the gradient of the logits.

LOGITS_BUDGET = 512 * 2**20   # bytes of student and teacher logits that exist at once; larger is hardly faster

class Head(NamedTuple):
    """What turns hidden states into logits: softcap * tanh(scale * (h @ weight.T + bias) / softcap)."""
    weight: torch.Tensor                   # [V, D]
    bias: Optional[torch.Tensor] = None    # [V]
    scale: float = 1.0                     # Cohere, Granite
    softcap: Optional[float] = None        # Gemma

class SparseTarget(NamedTuple):
    """A teacher from the cache: some tokens with their probabilities, and the mass of all others as one bucket."""
    ids: torch.Tensor       # [N, K] distinct in a row; unused places hold the row's first id and probability 0
    probs: torch.Tensor     # [N, K]
    rest: torch.Tensor      # [N] mass that is not listed: 0 for method sample, which is complete in expectation
    entropy: torch.Tensor   # [N] of the distribution that KL is measured to

def finish_logits(raw, scale, softcap):
    """Head output -> fp32 logits (a bf16 log-softmax has a floor of 0.02 nats), and d(logits)/d(raw), number or tensor."""
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    if softcap is None:
        return logits, scale
    bent = torch.tanh(logits / softcap)
    return bent * softcap, (1 - bent * bent) * scale

def chunk_terms(student_CV, labels_C, target, *, alpha, temperature, divergence, student_bend, teacher_bend):
    """Head outputs of a chunk -> ce [C], kl [C] (with its T^2), and d(alpha*ce + (1-alpha)*kl)/d(student_CV).

    target: None, the teacher's head outputs [C, V], or a SparseTarget. In place where it can be: without a compiler
    each pass over [C, V] counts; with one they fuse into three.
    """
    z, slope = finish_logits(student_CV, *student_bend)
    own_C1 = labels_C[:, None]
    logp = torch.log_softmax(z, -1)
    ce, label_grad = -logp.gather(-1, own_C1)[:, 0], None
    share = alpha                        # of p that belongs to CE: at T 1 both terms share one softmax
    weight = (1 - alpha) * temperature   # the term's T^2 times the 1/T of its softmax
    if temperature != 1 and target is not None:
        label_grad, share = logp.exp_().mul_(alpha), 0.0
        logp = torch.log_softmax(z / temperature, -1)
    if target is None:
        kl, grad = torch.zeros_like(ce), logp.exp_().mul_(alpha)
    elif isinstance(target, SparseTarget):   # -sum q log p - H, the rest of the mass as one bucket on both sides
        p, q = logp.exp(), target.probs
        listed_p = p.gather(-1, target.ids)
        rest_p = (1 - listed_p.sum(-1)).clamp_min(1e-7)
        kl = -(q * logp.gather(-1, target.ids)).sum(-1) - target.entropy
        kl = kl - torch.where(target.rest > 0, target.rest * rest_p.log(), 0.0)
        keep = (1 - target.rest / rest_p)[:, None]   # method sample: 1, and repeated ids add nothing but their q
        grad = p.mul_(weight * keep + share).scatter_add_(-1, target.ids, weight * ((1 - keep) * listed_p - q))
    else:
        logq = torch.log_softmax(finish_logits(target, *teacher_bend)[0] / temperature, -1)
        if divergence == "forward":
            q = logq.exp()
            kl = torch.linalg.vecdot(q, logq.sub_(logp))
            p = logp.exp_()
            grad = p.sub_(q, alpha=weight) if share + weight == 1 else p.sub_(q).mul_(weight) if share == 0 else \
                p.mul_(share + weight).sub_(q, alpha=weight)
        else:
            middle = logq if divergence == "reverse" else torch.logaddexp(logp, logq).sub_(math.log(2))
            half = 1.0 if divergence == "reverse" else 0.5
            pull = (logp - middle).mul_(half)   # dKL/dp, up to a constant that the softmax removes
            other = 0.0 if divergence == "reverse" else torch.linalg.vecdot(logq.exp(), logq - middle) * half
            p = logp.exp_()
            mean = torch.linalg.vecdot(p, pull)
            kl, grad = mean + other, p.mul_(pull.sub_(mean[:, None]).mul_(weight).add_(share))
    if label_grad is not None:
        grad.add_(label_grad)
    grad.scatter_add_(-1, own_C1, grad.new_full(own_C1.shape, -alpha))
    return ce, kl * temperature ** 2, grad if isinstance(slope, float) and slope == 1.0 else grad * slope

@functools.cache
def chunk_kernel(device_type, dtype, vocab, sparse, **terms):
    """chunk_terms, compiled where that pays (about 10 s once) and can be done: C++ compiler on CPU, Triton on CUDA."""
    eager = functools.partial(chunk_terms, **terms)
    if vocab < 16384:
        return eager
    state = {"run": torch.compile(eager, dynamic=True)}

    def kernel(*args):
        try:
            return state["run"](*args)
        except Exception as e:
            if state["run"] is eager:
                raise
            print0(f"loss: no working compiler ({type(e).__name__}), its element-wise part runs eagerly")
            state["run"] = eager
            return eager(*args)
    return kernel

class FusedDistillation(torch.autograd.Function):
    """Sums over tokens of loss, ce and kl. All matmuls, forward and backward, happen here; backward only scales."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, teacher, bend, alpha, temperature, divergence, chunk):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=exact) if need_bias else None
        sparse = isinstance(teacher, SparseTarget)
        kernel = chunk_kernel(hidden_ND.device.type, hidden_ND.dtype, len(weight_VD), sparse, alpha=alpha,
                              temperature=temperature, divergence=divergence, student_bend=bend,
                              teacher_bend=(1.0, None) if sparse or teacher is None else tuple(teacher[1][2:]))
        ce, kl = hidden_ND.new_zeros(2, dtype=torch.float64)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            h_CD, target = hidden_ND[part], None
            if sparse:
                target = SparseTarget(*(x[part] for x in teacher))
            elif teacher is not None:
                target = nn.functional.linear(teacher[0][part], teacher[1].weight, teacher[1].bias)
            ce_C, kl_C, grad_CV = kernel(nn.functional.linear(h_CD, weight_VD, bias_V), labels_N[part], target)
            ce, kl = ce + ce_C.sum(dtype=torch.float64), kl + kl_C.sum(dtype=torch.float64)
            del target
            if need_bias:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(h_CD.dtype)
            if need_hidden:
                torch.mm(grad_CV, weight_VD, out=grad_hidden[part])
            if need_weight and exact == h_CD.dtype:
                grad_weight.addmm_(grad_CV.T, h_CD)
            elif need_weight:
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
    then dropping the uncounted positions does not make the GPU wait.
    """
    counted = (labels != -100).nonzero()[:, 0]
    denominator = max(len(counted), 1) if denominator is None else denominator
    student_head, weight, bias = as_head(student_head), student_head.weight, student_head.bias
    if len(counted) < len(labels):
        labels, counted = labels[counted], counted.to(student_hidden.device)
        student_hidden = student_hidden[counted]
        if isinstance(teacher, SparseTarget):
            teacher = SparseTarget(*(x[counted] for x in teacher))
        elif teacher is not None:
            teacher = (teacher[0][counted], teacher[1])
    labels = labels.to(student_hidden.device, non_blocking=True)
    if teacher is not None and not isinstance(teacher, SparseTarget):
        head = as_head(teacher[1])
        vocab = min(len(weight), len(head.weight))   # padded tails are cut, nothing is zero-padded
        cut = lambda x: None if x is None else x[:vocab]
        weight, bias, teacher = cut(weight), cut(bias), (teacher[0], Head(cut(head.weight), cut(head.bias), *head[2:]))
    chunk = chunk or max(1, LOGITS_BUDGET // (2 * max(student_hidden.element_size(), 2) * len(weight)))
    sums = FusedDistillation.apply(student_hidden, weight, bias, labels, teacher if alpha < 1 else None,
                                   tuple(student_head[2:]), alpha, temperature, divergence, chunk)
    return tuple(x / denominator for x in sums)

def as_head(head):
    scale, softcap = getattr(head, "scale", None), getattr(head, "softcap", None)
    return Head(head.weight, getattr(head, "bias", None), float(scale or 1.0), softcap)

# ---------------------------------------------------------------------------------------------------------------------
# Data: any dataset -> rows of token ids (and which of them are targets) -> global batches that do not depend on the
# number of ranks. Hands on rows that can be indexed (or a stream), and Batch.

CONVERSATIONS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

def one_line(e, limit=160):
    return " ".join(f"{type(e).__name__}: {e}".split())[:limit]

def load_tokenizer(cfg, *candidates):
    """--tokenizer, else the first of the candidates that has one, else None."""
    for name in [cfg.tokenizer] if cfg.tokenizer else candidates:
        if cfg.tokenizer or not os.path.isdir(name) or glob.glob(os.path.join(glob.escape(name), "tokenizer*")):
            try:
                return AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
            except Exception as e:
                raise UserError(f"no tokenizer in {name!r} ({one_line(e)}); name one with --tokenizer")

def load_raw(cfg, split, streaming):
    """One split as rows of text or conversations; None where there is no such split."""
    name, kind = cfg.dataset, FILES.get(os.path.splitext(cfg.dataset)[1].lower())
    if kind and (not os.path.isfile(name) or os.path.getsize(name) == 0):
        raise UserError(f"dataset file {name!r} {'is empty' if os.path.isfile(name) else 'does not exist'}")
    if kind and split != "train":
        return None
    try:
        if kind:   # in a text file a blank line ends a document
            extra = {"sample_by": "paragraph"} if kind == "text" else {}
            return datasets.load_dataset(kind, data_files={"train": name}, split="train", streaming=streaming, **extra)
        if any(os.path.exists(os.path.join(name, f)) for f in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            saved = saved.get(split) if isinstance(saved, dict) else saved if split == "train" else None
            return saved.to_iterable_dataset() if streaming and saved is not None else saved
        return datasets.load_dataset(name, cfg.dataset_config, split=split, streaming=streaming)
    except Exception as e:
        if "Unknown split" in str(e) or "Bad split" in str(e):
            return None
        explain_bad_file(name, kind)
        tried = f"{kind} file" if kind else "hub dataset (no network, no access?), data file or save_to_disk directory"
        raise UserError(f"dataset {name!r} could not be read as {tried}: {one_line(e)}")

def explain_bad_file(path, kind):
    """The reader's message does not say where: name the line."""
    with open(path, "rb") if kind in ("json", "csv", "text") else contextlib.nullcontext(()) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8").strip()
                if text and path.endswith(".jsonl") and not isinstance(json.loads(text), dict):
                    raise ValueError("not an object with columns")
            except ValueError as e:   # UnicodeDecodeError is one
                raise UserError(f"dataset file {path!r}, line {number}: {one_line(e, 100)}; mend or delete that line")

def conversation_of(row):
    """Any of the known column sets -> [{role, content}, ...], or None for plain text."""
    if row.get("messages") or row.get("conversations"):
        alias = {"human": "user", "gpt": "assistant"}   # ShareGPT's names
        return [m if "content" in m else {"role": alias.get(m["from"], m["from"]), "content": m["value"]}
                for m in row.get("messages") or row["conversations"]]
    for ask, answer in CONVERSATIONS:
        if row.get(ask) is not None and row.get(answer) is not None:
            if isinstance(row[answer], list):   # prompt and completion as message lists
                return [*row[ask], *row[answer]]
            more = f"\n\n{row['input']}" if ask == "instruction" and row.get("input") else ""
            return [{"role": "user", "content": row[ask] + more}, {"role": "assistant", "content": row[answer]}]
    return None

def render(messages, tokenizer, marks):
    """A conversation as text, and the character spans of it that the assistant wrote, end marks included.

    The spans are found by rendering once more with one assistant turn replaced: what differs is that turn. This holds
    for any template, with generation markers or not, also for those that treat earlier turns differently.
    """
    text, spans = "", []
    if not tokenizer.chat_template:
        for m in messages:
            start, ours = len(text), m["role"] == "assistant"
            text += m["content"] + ((tokenizer.eos_token or "") if ours else "\n")
            spans += [(start, len(text))] if ours else []
        return text, spans
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and m.get("content"):
            changed = [*messages[:i], {**m, "content": "\ue000"}, *messages[i + 1:]]
            other = tokenizer.apply_chat_template(changed, tokenize=False)
            start = len(os.path.commonprefix([text, other]))
            end = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            mark = next((s for s in marks if text[end:].lstrip().startswith(s)), "")
            spans.append((start, text.index(mark, end) + len(mark)))
    return text, spans

def encode(batch, tokenizer, text_column, seq_len, carry):
    """Raw rows -> token rows. Text joins what is in carry and leaves it in blocks of seq_len; a conversation is a row."""
    talks = [c for c in map(conversation_of, batch) if c]
    plain = [row[text_column] for row in batch if row.get(text_column)] if not talks else []
    if plain:
        eos = tokenizer.eos_token_id
        for ids in tokenizer(plain, verbose=False)["input_ids"]:
            carry += ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        whole = len(carry) // seq_len * seq_len
        yield from ({"input_ids": carry[i:i + seq_len], "targets": None} for i in range(0, whole, seq_len))
        del carry[:whole]
    if talks:
        added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        marks = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        talks = [render(c, tokenizer, marks) for c in talks]
        coded = tokenizer([text for text, _ in talks], add_special_tokens=not tokenizer.chat_template,
                          return_offsets_mapping=True, verbose=False)
        for ids, offsets, (_, spans) in zip(coded["input_ids"], coded["offset_mapping"], talks):
            targets = [any(a < end and start < b for start, end in spans) for a, b in offsets][:seq_len]
            if any(targets[1:]):   # the first token has nothing to be predicted from
                yield {"input_ids": ids[:seq_len], "targets": targets}

def encode_all(raws, tokenizer, text_column, seq_len):
    for raw in raws:
        carry = []
        for batch in raw.iter(1000):
            batch = [dict(zip(batch, values)) for values in zip(*batch.values())]
            yield from encode(batch, tokenizer, text_column, seq_len, carry)
        if len(carry) > 1:
            yield {"input_ids": carry, "targets": None}

def tokenize(raw, tokenizer, cfg, what):
    """-> a memory-mapped dataset of rows, kept in the datasets cache under a fingerprint of all that shapes it."""
    a_list = lambda kind: datasets.List(datasets.Value(kind))
    features = datasets.Features(input_ids=a_list("int32"), targets=a_list("bool"))
    mark = digest(raw._fingerprint, tokenizer_digest(tokenizer), cfg.text_column, cfg.seq_len)
    workers = min(cfg.num_proc or 1, len(raw))
    raws = [raw.shard(workers, i, contiguous=True) for i in range(workers)]
    kwargs = dict(raws=raws, tokenizer=tokenizer, text_column=cfg.text_column, seq_len=cfg.seq_len)
    try:
        with node_first():
            rows = datasets.Dataset.from_generator(encode_all, features=features, fingerprint=mark, gen_kwargs=kwargs,
                                                   num_proc=workers if workers > 1 else None)
    except datasets.exceptions.DatasetGenerationError as e:
        raise UserError(f"{what}: a row cannot be turned into tokens: {one_line(e.__cause__ or e)}")
    if len(rows) == 0:
        raise UserError(f"{what}: none of {len(raw)} rows has a target token (rows of one token, or no assistant turn?)")
    if rows[0]["targets"] is not None and len(rows) < len(raw):
        print0(f"{what}: dropped {len(raw) - len(rows)} of {len(raw)} conversations, no target within seq_len {cfg.seq_len}")
    return rows.with_format("numpy")

def tokenizer_digest(tokenizer):
    code = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    return digest(code, str(tokenizer.chat_template))

def load_data(cfg, tokenizer):
    """-> (train rows or stream, eval rows). Without an eval split, evenly spaced raw rows of train are held out."""
    if tokenizer is None:
        raise UserError(f"student {cfg.student!r} and teacher {cfg.teacher!r} have no tokenizer; name one with --tokenizer")
    with node_first():
        raw = load_raw(cfg, cfg.train_split, cfg.streaming)
        held = load_raw(cfg, cfg.eval_split, False) if cfg.eval_split != cfg.train_split else None
    for split, found in ((cfg.train_split, raw), (cfg.eval_split, held)):
        if found is None and split != Config.eval_split:
            raise UserError(f"dataset {cfg.dataset!r} has no split {split!r}; name another, or leave eval_split out to "
                            "hold out a slice of train")
    row = next(iter(raw), None)
    if row is None or conversation_of(row) is None and not isinstance(row.get(cfg.text_column), str):
        raise UserError(f"dataset {cfg.dataset!r} has " + ("no rows" if row is None else f"no text in column {cfg.text_column!r} "
                        f"and no known conversation columns; it has {', '.join(row)}: name one with --text_column"))
    if cfg.streaming:
        if held is None:   # the head of the stream is kept back
            held = datasets.Dataset.from_list(list(raw.take(min(cfg.eval_samples, 256))))
            raw = raw.skip(len(held))
        held = tokenize(held, tokenizer, cfg, "eval")
        return raw.take(cfg.max_samples) if cfg.max_samples else raw, held.take(min(cfg.eval_samples, len(held)))
    raw = raw.take(min(cfg.max_samples or len(raw), len(raw)))
    if held is None and len(raw) > 1:
        gap = max(2, len(raw) // min(cfg.eval_samples, max(1, len(raw) // 20)))
        held, kept = raw.select(range(gap - 1, len(raw), gap)), (i for i in range(len(raw)) if i % gap != gap - 1)
        raw = raw.select(kept)
    rows = tokenize(raw, tokenizer, cfg, "train") if held is None or cfg.mode != "eval" else None
    held = tokenize(held, tokenizer, cfg, "eval") if held is not None else None
    if held is None:   # one long document: its last twentieth
        cut = len(rows) - max(1, len(rows) // 20)
        if cut == 0:
            raise UserError(f"dataset {cfg.dataset!r} is a single sequence of {cfg.seq_len} tokens or less; nothing is left "
                            "to evaluate on: bring more text or lower --seq_len")
        rows, held = rows.take(cut), rows.skip(cut)
    return rows, held.take(min(cfg.eval_samples, len(held)))

@dataclasses.dataclass
class Batch:
    """A micro-batch of one rank. Only host code looks at labels, so that nothing waits for the GPU to count them."""
    input_ids: torch.Tensor   # [B, T], padded on the right: under a causal mask no real token ever sees the padding
    positions: torch.Tensor   # [N] places of the counted tokens in the flattened batch
    labels: torch.Tensor      # [N] their next tokens, on the host
    sparse: Any = None        # SparseTarget of the counted tokens, when training from a cache

def collate(rows, pad_to=1):
    """Token rows -> Batch. The label of a position is the *next* token; shifting comes before masking."""
    rows = rows or [{"input_ids": [0, 0], "targets": [False, False]}]   # nothing left for this rank: takes part, uncounted
    width = -(-max(len(r["input_ids"]) for r in rows) // pad_to) * pad_to
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        x = torch.as_tensor(row["input_ids"], dtype=torch.long)
        ids[i, :len(x)] = x
        targets = row.get("targets")
        labels[i, :len(x) - 1] = (x if targets is None else torch.where(torch.as_tensor(targets), x, -100))[1:]
    positions = (labels.flatten() != -100).nonzero()[:, 0]
    sparse = [r["sparse"] for r in rows if "sparse" in r]
    sparse = SparseTarget(*map(torch.cat, zip(*sparse))) if sparse else None
    pin = (lambda x: x.pin_memory()) if CUDA else (lambda x: x)
    send = lambda x: pin(x).to(DEVICE, non_blocking=True)
    sparse = sparse and SparseTarget(*map(send, sparse))
    return Batch(send(ids), send(positions), pin(labels.flatten()[positions]), sparse)

def indexed_batches(rows, seed, global_batch, step):
    """Endless (row numbers of a global batch, None) from `step` on; the position *is* the step: nothing to replay."""
    steps_per_epoch, order, epoch = -(-len(rows) // global_batch), None, None
    for step in itertools.count(step):
        if epoch != step // steps_per_epoch:
            epoch = step // steps_per_epoch
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        start = step % steps_per_epoch * global_batch
        yield order[start:start + global_batch].tolist(), None

def streamed_batches(raw, encode_rows, seed, window, global_batch, state):
    """The same from a stream. Windows of raw rows are shuffled whole, so that the position is where the window began,
    what was carried into it and how many of its sequences are used: exact, and as quick at step 100,000 as at 10."""
    beginning, size, pending = raw.state_dict(), window or 1000, []
    state = state or {"epoch": 0, "window": 0, "used": 0, "carry": [], "source": beginning}
    raw.load_state_dict(state["source"])
    source = iter(raw)
    while True:
        block, carry = list(itertools.islice(source, size)), list(state["carry"])
        rows, ended = list(encode_rows(block, carry=carry)), len(block) < size
        if ended:
            rows += [{"input_ids": carry, "targets": None}] if len(carry) > 1 else []
            carry = []
        order = torch.Generator().manual_seed(seed * 1_000_003 + state["window"])
        order = torch.randperm(len(rows), generator=order).tolist() if window else range(len(rows))
        for used in range(state["used"], len(rows)):
            pending.append(rows[order[used]])
            if len(pending) == global_batch:
                yield pending, {**state, "used": used + 1}
                pending = []
        if ended and state["window"] == 0 and not rows:
            raise UserError("no row of the stream has a target token")
        state = {"epoch": state["epoch"] + ended, "window": state["window"] + 1, "used": 0, "carry": carry,
                 "source": beginning if ended else raw.state_dict()}
        if ended:
            raw.load_state_dict(beginning)
            source = iter(raw)

def prefetch(endless, depth=2):
    """Run a generator in a thread, `depth` items ahead: the next batch is ready while this one computes."""
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque(pool.submit(next, endless) for _ in range(depth))
        while True:
            item = ahead.popleft().result()
            ahead.append(pool.submit(next, endless))
            yield item

def micro_batches(global_batches, rows, micro_steps, batch_size):
    """Global batches -> (this rank's micro-batches, position after the step). Rank r takes every WORLD-th sequence."""
    fetch = (lambda i: i) if rows is None else rows.__getitem__
    for batch, position in global_batches:
        mine = [fetch(i) for i in batch[RANK::WORLD]]
        yield [collate(mine[i * batch_size:(i + 1) * batch_size]) for i in range(micro_steps)], position

# ---------------------------------------------------------------------------------------------------------------------
# Demo: text, tokenizer and model shapes made from what every machine has. Hands on ordinary files; from there on the
# demo is a run like any other.

def stdlib_sources():
    """(name, text) of every module of Python's own library, tests left out."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "turtledemo", "pydoc_data"}
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - skip)
        for file in sorted(f for f in files if f.endswith(".py")):
            with open(os.path.join(folder, file), encoding="utf-8", errors="ignore") as f:
                yield os.path.relpath(os.path.join(folder, file), root), f.read()

def make_demo(path):
    """Write corpus, tokenizer and model shapes, once; every twentieth module is held out whole."""
    from tokenizers import ByteLevelBPETokenizer
    for name in ("corpus", "tokenizer", "student", "teacher-shape"):
        os.makedirs(path(name), exist_ok=True)
    parts = {"train": [], "validation": []}
    for name, text in stdlib_sources():
        parts["validation" if int(digest(name), 16) % 20 == 0 else "train"].append(text)
    for split, texts in parts.items():
        with open(path("corpus", f"{split}.jsonl"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": t}) + "\n" for t in texts if t.strip())
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(parts["train"], vocab_size=DEMO_VOCAB, special_tokens=["<|end|>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
                                         ).save_pretrained(path("tokenizer"))
    for name, shape in (("teacher-shape", DEMO_TEACHER), ("student", DEMO_STUDENT)):
        transformers.LlamaConfig(vocab_size=DEMO_VOCAB, max_position_embeddings=1024, tie_word_embeddings=True,
                                 bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape).save_pretrained(path(name))

def resolve_demo(cfg):
    """Each `demo` becomes the files it stands for; this very trainer trains the teacher the first time. None: stopped."""
    if "demo" not in (cfg.teacher, cfg.student, cfg.dataset):
        return cfg
    path = functools.partial(os.path.join, cfg.output_dir, "demo")
    if RANK == 0 and not os.path.exists(path("student", "config.json")):   # the last thing that make_demo writes
        make_demo(path)
    all_sum(0)
    places = {"dataset": path("corpus")} if cfg.dataset == "demo" else {}
    if cfg.student == "demo":
        places |= {"student": path("student", "config.json"), "tokenizer": cfg.tokenizer or path("tokenizer")}
    online = cfg.alpha < 1 and not cfg.cache_dir
    if cfg.teacher == "demo" and (cfg.mode != "train" or online or cfg.student.startswith("layers:")):
        places["teacher"] = path("teacher", "final")
        if not os.path.exists(places["teacher"]):
            print0(f"demo: first the teacher, {DEMO_TEACHER_RUN['max_steps']} steps, kept in {path('teacher')}")
            if not train(Config(dataset=path("corpus"), student=path("teacher-shape", "config.json"), use_wandb=False,
                                tokenizer=path("tokenizer"), output_dir=path("teacher"), dtype=cfg.dtype,
                                log_steps=cfg.log_steps, **DEMO_TEACHER_RUN)):
                return None
    return dataclasses.replace(cfg, **places)


# ---------------------------------------------------------------------------------------------------------------------
# Teacher signal: what distillation_loss takes as its teacher, online or from the cache, so that the loop has no fork.

def hidden_states(model, input_ids_BT):
    """-> [B, T, D] after the final norm, without the head."""
    return model.base_model(input_ids=input_ids_BT, use_cache=False)[0]

def counted_hidden(model, batch):
    """Runs inside a root: the hidden states of the counted tokens, and the head to apply to them chunk by chunk."""
    return hidden_states(model, batch.input_ids).flatten(0, 1)[batch.positions], head_of(model)

def teacher_signal(teacher):
    if teacher is None:
        return lambda batch: batch.sparse   # None too, at alpha 1
    return torch.no_grad()(lambda batch: teacher(counted_hidden, batch))

def distil(model, batch, signal, denominator, **objective):
    """Runs inside the student: -> loss, ce, kl."""
    hidden_ND, head = counted_hidden(model, batch)
    return distillation_loss(hidden_ND, head, batch.labels, signal, denominator=denominator, **objective)

def head_of(model):
    out, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(out.weight, getattr(out, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None))

def head_error(model, ids_1T):
    """Runs inside a root: how far hidden states times head_of are from the model's own logits, by their spread."""
    head = head_of(model)
    ours = finish_logits(nn.functional.linear(hidden_states(model, ids_1T), head.weight, head.bias), *head[2:])[0]
    its = model(input_ids=ids_1T, use_cache=False).logits.float()
    return (ours - its).abs().max() / its.std().clamp_min(1e-6)

def check_head(root, role, name, tokenizer):
    """The loss applies heads itself: a model whose own logits differ (a scale it does not know) is refused."""
    rows, biggest = root.model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    was_training = root.training
    if biggest >= rows:
        raise UserError(f"the tokenizer has ids up to {biggest}, {role} {name!r} only {rows} rows; they do not belong together")
    root.eval()
    with torch.no_grad():
        error = root(head_error, torch.arange(8, device=DEVICE)[None] % rows).item()
    root.train(was_training)
    root.release()
    if not error < 0.1:   # bf16 logits are off by 0.02
        raise UserError(f"{role} {name!r} ({type(root.model).__name__}): hidden states times head are off its own logits by "
                        f"{error:.2g} of their spread; teach its scaling to head_of() in simple_distill.py")

def compare_tokenizers(student, teacher, student_name, teacher_name):
    """By what they encode, not by size: an id that both use must mean the same token."""
    ours, theirs = ({i: t for t, i in x.get_vocab().items()} for x in (student, teacher))
    shared, probe = sorted(ours.keys() & theirs.keys()), "def f(x):\n    return x+1  # Größe 12345 résumé 日本"
    clash = [f"token {i} is {ours[i]!r} in one, {theirs[i]!r} in the other" for i in shared if ours[i] != theirs[i]][:1]
    if not clash and (len(shared) < 2 or student(probe)["input_ids"] != teacher(probe)["input_ids"]):
        clash = ["they share a vocabulary but cut text differently"]
    if clash:
        raise UserError(f"student {student_name!r} and teacher {teacher_name!r} have different tokenizers: {clash[0]}. "
                        "Distil within one, or train on text that the teacher wrote (--mode generate, then --alpha 1)")


# ---------------------------------------------------------------------------------------------------------------------
# Models and FSDP: rank 0 reads, every rank starts empty and receives its shard. Hands on Inside roots: FSDP gathers
# parameters in the forward of the root, so whatever touches weights is a function run inside it.

class Inside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, work, *args):
        return work(self.model, *args)

    def release(self):
        """After forwards without a backward: give gathered weights back, else the next step would use stale ones."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

def compute_dtype(cfg):
    """auto: bf16 on GPUs that have it, fp32 elsewhere (CPUs without AMX emulate bf16 slowly)."""
    native = CUDA and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = torch.bfloat16 if native else torch.float32
    return {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.dtype]

def model_config(name, cfg, role):
    try:
        if name.endswith(".json"):
            with open(name, encoding="utf-8") as f:
                values = json.load(f)
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            with node_first():
                config = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except Exception as e:
        where = "as a file" if name.endswith(".json") else "in that directory" if os.path.isdir(name) else \
            "as a local directory (there is none) or on the hub (no network, no access, or HF_HUB_OFFLINE is set)"
        raise UserError(f"{role} {name!r}: no model config could be read {where}: {one_line(e)}")
    known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    if getattr(config, "is_encoder_decoder", False) or not known:
        raise UserError(f"{role} {name!r} is a {config.model_type} model, not a decoder-only language model")
    return config

def read_model(name, config, cfg, role, dtype):
    """Rank 0's whole copy on the host, memory-mapped until it is cast."""
    try:
        if name.endswith(".json"):
            torch.manual_seed(cfg.seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=cfg.trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=cfg.trust_remote_code,
                                                           output_loading_info=True)
    except Exception as e:
        raise UserError(f"{role} {name!r} could not be loaded: {one_line(e)}")
    if info["missing_keys"]:
        raise UserError(f"{role} {name!r} lacks weights, {sorted(info['missing_keys'])[0]} among them; is it whole?")
    return model

def layers_of(model):
    """(path, ModuleList) of the decoder layers: the outermost list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return path, module
    raise UserError(f"{type(model).__name__} keeps its {depth} decoder layers in no ModuleList; choose another model")

def thin(whole, config, keep):
    """The kept layers of a model as a model of their own."""
    path, source = layers_of(whole)[0], whole.state_dict()
    model = AutoModelForCausalLM.from_config(config, dtype=next(whole.parameters()).dtype)
    kept = {k: v for k, v in source.items() if not k.startswith(path + ".")}
    for new, old in enumerate(keep):
        prefix = f"{path}.{old}."
        kept |= {f"{path}.{new}.{k[len(prefix):]}": v for k, v in source.items() if k.startswith(prefix)}
    model.load_state_dict(kept)
    return model

def load_student(cfg):
    if not cfg.student.startswith("layers:"):
        config = model_config(cfg.student, cfg, "student")
        return spread(cfg, config, lambda: read_model(cfg.student, config, cfg, "student", torch.float32))
    whole, wanted = model_config(cfg.teacher, cfg, "teacher"), cfg.student[7:]
    depth = whole.num_hidden_layers
    if not wanted.isdigit() or not 1 <= int(wanted) <= depth:
        raise UserError(f"student {cfg.student!r}: write layers:N with N from 1 to the teacher's {depth}")
    keep = [round(i) for i in torch.linspace(0, depth - 1, int(wanted)).tolist()]
    each = lambda v: [v[i] for i in keep] if isinstance(v, list) and len(v) == depth else v   # layer_types and the like
    values = {k: each(v) for k, v in whole.to_dict().items()}
    values[whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    config = type(whole).from_dict(values)
    print0(f"student: layers {', '.join(map(str, keep))} of the {depth} of teacher {cfg.teacher}")
    read = lambda: read_model(cfg.teacher, whole, cfg, "teacher", torch.float32)
    return spread(cfg, config, lambda: thin(read(), config, keep))

def load_teacher(cfg, name=None, role="teacher"):
    """Frozen, in the compute type, but models trained in bf16 overflow in fp16: those stay in fp32 then."""
    name, dtype = name or cfg.teacher, compute_dtype(cfg)
    config = model_config(name, cfg, role)
    dtype = torch.float32 if dtype == torch.float16 and config.dtype != torch.float16 else dtype
    return spread(cfg, config, lambda: read_model(name, config, cfg, role, dtype), frozen=dtype)

def spread(cfg, config, read, frozen=None):
    """Meta model on every rank -> FSDP units (layers, root) -> weights. The student keeps fp32 masters and computes in
    compute_dtype; a teacher (frozen: its dtype) has no gradients, its root stays gathered for the loss to use its head."""
    trust, dtype = dict(trust_remote_code=cfg.trust_remote_code), compute_dtype(cfg)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=frozen or torch.float32, **trust)
    source, root, layers = read() if RANK == 0 else None, Inside(model), layers_of(model)[1]
    model.train(not frozen).requires_grad_(not frozen)
    if not frozen and cfg.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)   # newer name
        enable({"use_reentrant": False})
    if cfg.compile:
        for layer in layers:
            layer.compile()
    if not frozen or cfg.cpu_offload or cfg.shard_teacher and WORLD > 1:
        shapes = {"hybrid_shard": (WORLD // LOCAL_WORLD, LOCAL_WORLD), "no_shard": (WORLD, 1)}   # replicate x shard
        shape = (WORLD,) if frozen else shapes.get(cfg.fsdp, (WORLD,))
        cast = None if frozen or dtype == torch.float32 else dtype
        options = dict(mesh=init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):]),
                       mp_policy=MixedPrecisionPolicy(cast, torch.float32, cast_forward_inputs=False))
        if cfg.cpu_offload and CUDA:
            options["offload_policy"] = CPUOffloadPolicy()
        for layer in layers:
            fully_shard(layer, reshard_after_forward=bool(frozen) or cfg.fsdp.startswith(("full", "hybrid")), **options)
        fully_shard(root, reshard_after_forward=False, **options)
    tensors = dict([*source.named_parameters(), *source.named_buffers()]) if source else {}
    fill(model, tensors, "cpu" if cfg.cpu_offload else DEVICE)
    return root

@torch.no_grad()
def fill(model, source, device):
    """Rank 0's tensors into everybody's shards, one at a time: no other rank ever holds a whole model."""
    model.to_empty(device=device)
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        model.tie_weights()   # FSDP keeps ties by itself
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = source.pop(name).to(DEVICE, tensor.dtype) if RANK == 0 else torch.empty_like(tensor, device=DEVICE) \
            if not isinstance(tensor, DTensor) else torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local())
        else:
            dist.broadcast(whole, 0)
            tensor.copy_(whole)

def count(model):
    return sum(p.numel() for p in model.parameters())

def save_model(root, tokenizer, path, dtype):
    """Gathered on rank 0 tensor by tensor, saved by transformers, renamed when whole."""
    full = {}
    for name, tensor in root.model.named_parameters():
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if RANK == 0:
            full[name] = whole.to("cpu", dtype, copy=True)
    if RANK == 0:
        with torch.device("meta"):
            model = type(root.model)(root.model.config)
        model.load_state_dict(full, assign=True, strict=False)   # a tied head is not among the parameters
        model.tie_weights()
        model.generation_config = root.model.generation_config
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        model.to(dtype).save_pretrained(path + ".tmp")
        if tokenizer is not None:
            tokenizer.save_pretrained(path + ".tmp")
        shutil.rmtree(path, ignore_errors=True)
        os.rename(path + ".tmp", path)
    all_sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning-rate multiplier, and one step that clips, unscales and skips without asking the
# GPU.

def make_optimizer(named_parameters, rules, default_multiplier, learning_rate, weight_decay):
    """The first matching pattern gives the multiplier; 0 freezes: no gradient, no state. Norms and biases do not decay."""
    groups, hits, named = {}, [0] * len(rules), list(named_parameters)
    for name, p in named:
        matches = [i for i, (pattern, _) in enumerate(rules) if pattern.search(name)]
        for i in matches:
            hits[i] += 1
        multiplier = rules[matches[0]][1] if matches else default_multiplier
        p.requires_grad_(multiplier > 0)
        if multiplier > 0:
            groups.setdefault((multiplier, p.ndim >= 2), []).append(p)
    for (pattern, _), n in zip(rules, hits):
        if n == 0:
            raise UserError(f"lr_multipliers: {pattern.pattern!r} matches none of the {len(named)} parameters; names look "
                            f"like {named[len(named) // 2][0]}")
    if not groups:
        raise UserError("every parameter is frozen (learning-rate multiplier 0); leave something to train")
    frozen = sum(p.numel() for _, p in named if not p.requires_grad)
    rates = {m: sum(p.numel() for (m2, _), g in groups.items() if m2 == m for p in g) for m, _ in groups}
    print0("trains " + ", ".join(f"{n:,} parameters at {learning_rate * m:g}" for m, n in rates.items()) + f"; {frozen:,} frozen")
    optimizer = torch.optim.AdamW([dict(params=g, lr=learning_rate * m, weight_decay=weight_decay if decay else 0.0)
                                   for (m, decay), g in groups.items()], fused=True)
    for group in optimizer.param_groups:   # from the start: the memory is known, and a checkpoint has where to load to
        for p in group["params"]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer

def make_schedule(cfg, optimizer, steps):
    """-> a function that sets every group's rate for a step and returns the largest: nothing to save or replay."""
    kwargs = scheduler_kwargs(cfg)
    if cfg.lr_scheduler == "warmup_stable_decay":
        kwargs.setdefault("num_decay_steps", max(1, steps // 5))
    try:
        schedule = get_scheduler(cfg.lr_scheduler, optimizer, round(cfg.warmup_ratio * steps), steps, kwargs)
        schedule.lr_lambdas[0](steps)
    except (TypeError, ValueError) as e:
        raise UserError(f"lr_scheduler {cfg.lr_scheduler}: {one_line(e)}; give it with --lr_scheduler_kwargs")

    def set_rates(step):
        for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = base * factor(step)
        return max(g["lr"] for g in optimizer.param_groups)
    return set_rates

def new_health(fp16):
    """On the device: the fp16 loss scale, good steps since it changed, skipped steps in all, and in a row."""
    start = {"scale": 2.0 ** 14 if fp16 else 1.0, "good": 0.0, "skipped": 0.0, "streak": 0.0}
    return {k: torch.tensor(v, device=DEVICE) for k, v in start.items()}

def optimizer_step(optimizer, max_grad_norm, health, fp16):
    """Clip, unscale, skip what is not finite: all inside fused AdamW, which divides by grad_scale and heeds found_inf."""
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(DEVICE) / health["scale"]
    bad = (~norm.isfinite()).float()
    optimizer.grad_scale = health["scale"] * ((norm / max_grad_norm).clamp_min(1.0) if max_grad_norm else 1.0)
    optimizer.found_inf = bad
    optimizer.step()
    optimizer.zero_grad()
    health["skipped"] += bad
    health["streak"].add_(bad).mul_(bad)
    if fp16:
        health["good"].add_(1 - bad).mul_(1 - bad)
        grow = (health["good"] >= 2000).float()
        health["scale"].mul_((1 + grow) * (1 - bad / 2))
        health["good"].mul_(1 - grow)
    return norm

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: whole or not at all. Tensors through torch.distributed.checkpoint, so that another number of ranks can
# read them; everything else in state.json. Random numbers need no state: each step seeds itself.

@contextlib.contextmanager
def lock(folder):
    """One run a directory; the kernel drops the lock with its process. A directory made for a refused run goes again."""
    made, problem, handle = not os.path.isdir(folder), None, None
    if RANK == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            problem = None if os.access(folder, os.W_OK) else f"{folder!r} is not writable; choose another --output_dir"
        except BlockingIOError:
            problem = f"another run is at work in {folder!r}; wait for it or choose another --output_dir"
        except OSError as e:
            problem = f"cannot use {folder!r} as a directory ({e.strerror}); choose another --output_dir"
    problem = from_rank0(problem)
    try:
        if problem:
            raise UserError(problem)
        yield
    finally:
        if handle is not None:
            os.close(handle)
            if made and not os.listdir(folder):
                os.rmdir(folder)

def tensors_of(root, optimizer, health):
    """Everything with a shape, flat by name: the same call names what to save and where to load to."""
    names = {p: n for n, p in root.named_parameters()}
    moments = {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return {f"model.{n}": p.detach() for p, n in names.items()} | moments | {f"health.{k}": v for k, v in health.items()}

def save_checkpoint(folder, step, tensors, state, keep):
    """-> None, or what went wrong. Written aside, synced, renamed; nothing old is deleted before the new one stands."""
    final, aside, problem = os.path.join(folder, f"step-{step:08d}"), os.path.join(folder, f"tmp-{step:08d}"), None
    try:
        if RANK == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(aside)
        all_sum(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # DCP speaks about its own defaults
            dcp.save(tensors, checkpoint_id=aside)   # syncs each file
        if RANK == 0:
            state["files"] = {f: os.path.getsize(os.path.join(aside, f)) for f in sorted(os.listdir(aside))}
            with open(os.path.join(aside, "state.json"), "w", encoding="utf-8") as f:
                json.dump(state, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            sync(aside)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(aside, final)
            sync(folder)
            for old in checkpoints_in(folder)[keep:]:
                shutil.rmtree(old)
    except (OSError, dcp.api.CheckpointException) as e:
        problem = one_line(e, 300)
        shutil.rmtree(aside, ignore_errors=True)
    problem = from_rank0(problem)
    if problem:
        print0(f"WARNING: the checkpoint of step {step} could not be saved ({problem}); the run goes on, older ones stay")
    return problem

def sync(folder):
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)

def checkpoints_in(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step-????????")), reverse=True)

def find_checkpoints(cfg):
    """-> [(path, state), ...] to continue from, the best first: all files there, of their full size. Others are named."""
    paths = [] if cfg.resume == "never" else [cfg.resume.rstrip("/")]
    paths = checkpoints_in(os.path.join(cfg.output_dir, "checkpoints")) if cfg.resume == "auto" else paths
    found = []
    for path in paths if RANK == 0 else []:
        try:
            with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
                state = json.load(f)
            short = [f for f, size in state["files"].items() if os.path.getsize(os.path.join(path, f)) != size]
            if short:
                raise OSError(f"{short[0]} is truncated")
            found.append((path, state))
        except (OSError, ValueError, KeyError, TypeError) as e:
            print0(f"checkpoint {path} is not readable ({one_line(e)}), passed over")
    found = from_rank0(found)
    if paths and not found:
        raise UserError(f"no readable checkpoint in {os.path.dirname(paths[0])!r}; start over with --resume never")
    return found

def load_checkpoint(found, tensors):
    """Load the first of the found checkpoints that can be read, in place -> its path and state."""
    for path, state in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(tensors, checkpoint_id=path)
            print0(f"resumes from {path}")
            return state
        except Exception as e:
            print0(f"checkpoint {path} is not readable ({one_line(e)}), passed over")
    raise UserError(f"no readable checkpoint in {os.path.dirname(found[0][0])!r}; start over with --resume never")

def prepare_output(cfg, step):
    """output_dir as of `step`: no log lines of steps about to be repeated, nothing left of a run that starts over."""
    place = functools.partial(os.path.join, cfg.output_dir)
    if RANK == 0:
        if cfg.resume == "never":
            for old in ("checkpoints", "final"):
                shutil.rmtree(place(old), ignore_errors=True)
        os.makedirs(place("checkpoints"), exist_ok=True)
        save_config(cfg, place("config.json"))
        kept = []
        with open(place("log.jsonl"), "a+", encoding="utf-8") as f:
            f.seek(0)
            for line in f:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    kept += [line] if entry.get("train/step", entry.get("eval/step", 0)) <= step else []
        with open(place("log.jsonl.tmp"), "w", encoding="utf-8") as f:
            f.writelines(kept)
        os.replace(place("log.jsonl.tmp"), place("log.jsonl"))
    all_sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: the training loss on held-out rows, each token counted once whatever the number of ranks.

@torch.no_grad()
def evaluate(root, work, signal_of, rows, batch_size):
    """-> {loss, ce_loss, kl_loss, perplexity}: means over the counted tokens of rows."""
    was_training, sums = root.training, torch.zeros(4, dtype=torch.float64, device=DEVICE)
    root.eval()
    for start in range(0, len(rows), batch_size * WORLD):   # every rank runs every batch, uncounted where rows end
        batch = collate([rows[i] for i in range(start + RANK, min(start + batch_size * WORLD, len(rows)), WORLD)])
        sums[:3] += torch.stack(root(work, batch, signal_of(batch), 1.0)).double()
        sums[3] += len(batch.labels)
    root.train(was_training)
    root.release()
    *means, tokens = all_sum(*sums.tolist())
    loss, ce, kl = (x / max(tokens, 1) for x in means)
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}

def load_evaluated(cfg, name, role):
    """A model, or checkpoints/step-XXXXXXXX of a run in progress -> root, its tokenizer or None, folder of its run."""
    folder = os.path.dirname(os.path.abspath(name))
    if not os.path.exists(os.path.join(name, "state.json")):
        return load_teacher(cfg, name, role), load_tokenizer(dataclasses.replace(cfg, tokenizer=None), name), folder
    found, folder = find_checkpoints(types.SimpleNamespace(resume=name)), os.path.dirname(folder)
    made = resolve_demo(Config(**{**found[0][1]["config"], "output_dir": folder, "dtype": cfg.dtype}))
    root = load_student(made)
    load_checkpoint(found, {"model." + n: p.detach() for n, p in root.named_parameters()})
    named = [n for n in (made.student, made.teacher) if not n.startswith("layers:") and not n.endswith(".json")]
    return root.eval(), load_tokenizer(made, *named), folder

def retell(rows, base, other):
    """Rows under another tokenizer, and the counted bytes of each. Text is cut where counting begins and ends, and each
    piece encoded by itself: both count the same bytes. Special tokens are no text, they become the other's EOS."""
    decode = functools.partial(base.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special, eos = {i for i, t in base.added_tokens_decoder.items() if t.special}, other.eos_token_id or 0
    told, sizes = [], []
    for row in rows:
        ids, counted = row["input_ids"].tolist(), {*(collate([row]).positions + 1).tolist()}
        whole, new, size, start = decode(ids), [], 0, 0
        for (counts, mark), place in itertools.groupby(range(len(ids)), lambda i: (i in counted, ids[i] in special)):
            *_, last = place   # decoded from the start, for SentencePiece's spaces; a character that is cut goes right
            end = len(os.path.commonprefix([whole, decode(ids[:last + 1])]))
            piece, start = whole[start:end], end
            new += [] if new or not counts else [(eos, False)]   # the first token needs something to be predicted from
            code = [eos] if mark else other(piece, add_special_tokens=False, verbose=False)["input_ids"]
            new, size = new + [(x, counts) for x in code], size + counts * len(piece.encode())
        told.append(dict(zip(("input_ids", "targets"), zip(*new))))
        sizes.append(size)
    return told, torch.tensor(sizes, dtype=torch.float64)

def token_terms(hidden_ND, own, labels_N, teacher, temperature):
    """-> [N, 6] on the host: 1, -log p, top-1 right, top-1 the teacher's, KL to it (with its T^2), confidence."""
    vocab = min(len(head.weight) for _, head in [(None, own), *teacher])
    head = lambda h, of: nn.functional.linear(h, of.weight[:vocab], of.bias if of.bias is None else of.bias[:vocab])
    chunk, found = max(1, LOGITS_BUDGET // (20 * vocab)), [torch.zeros(0, 6)]   # five fp32 [chunk, V] at a time
    for part in (slice(i, i + chunk) for i in range(0, len(labels_N), chunk)):
        raw, target = head(hidden_ND[part], own), [head(h[part], of) for h, of in teacher] or [None]
        ce, kl, _ = chunk_terms(raw, labels_N[part], *target, alpha=0.0, temperature=temperature, divergence="forward",
                                student_bend=own[2:], teacher_bend=teacher and teacher[0][1][2:])
        z = finish_logits(raw, *own[2:])[0]
        best, top = z.max(-1)
        agree = top == target[0].argmax(-1) if teacher else torch.zeros_like(ce)
        terms = torch.ones_like(ce), ce, top == labels_N[part], agree, kl, (best - z.logsumexp(-1)).exp()
        found.append(torch.stack([x.double() for x in terms], 1).cpu())
    return torch.cat(found).double()

@torch.no_grad()
def score(root, teacher, rows, batch_size, temperature, layer_rows):
    """-> [rows, 5] sums of token_terms a sequence, [15, 3] tokens, hits, confidence a bin of confidence; a layer, of
    the first rows: MSE to the teacher's (other width: after the best linear map), share of its variance, linear CKA."""
    def look(model, batch):   # hidden states after each layer, the last one after the final norm
        out = model.base_model(input_ids=batch.input_ids, use_cache=False, output_hidden_states=True)
        return [h.flatten(0, 1)[batch.positions] for h in (*out.hidden_states[1:-1], out[0])], head_of(model)
    sums, bins = torch.zeros(len(rows), 5, dtype=torch.float64), torch.zeros(15, 3, dtype=torch.float64)
    moments, layers = {}, []   # second moments of [student, teacher, 1]: all that the layers' figures need
    for start in range(0, len(rows), batch_size * WORLD):
        mine = range(start + RANK, min(start + batch_size * WORLD, len(rows)), WORLD)
        batch = collate([rows[i] for i in mine])
        (ours, head), (theirs, its) = root(look, batch), teacher(look, batch) if teacher else ([None], None)
        terms = token_terms(ours[-1], head, batch.labels.to(DEVICE), [(theirs[-1], its)] * bool(teacher), temperature)
        row_N = torch.tensor([*mine, 0])[(batch.positions // batch.input_ids.shape[1]).cpu()]
        sums.index_add_(0, row_N, terms[:, :5])
        bins.index_add_(0, (terms[:, 5] * 15).long().clamp(max=14), terms[:, [0, 2, 5]])
        for s, x in enumerate(ours if teacher and start < layer_rows else []):
            t = max(0, round((s + 1) * len(theirs) / len(ours)) - 1)   # as block-wise mode maps them
            joint = torch.cat([x, theirs[t], torch.ones_like(x[:, :1])], 1)[row_N.to(DEVICE) < layer_rows].double()
            moments[s, t] = moments.get((s, t), 0) + (joint.T @ joint).cpu()
    for (s, t), moment in moments.items():
        dist.all_reduce(moment)
        n, mean, width = moment[-1, -1], moment[-1, :-1] / moment[-1, -1], ours[0].shape[1]
        both = moment[:-1, :-1] / n - torch.outer(mean, mean)
        xx, xy, yy = both[:width, :width], both[:width, width:], both[width:, width:]
        error = xx.trace() + yy.trace() - 2 * xy.trace() + (mean[:width] - mean[-width:]).square().sum()
        if len(xx) != len(yy):   # each row of the map takes a token away from the average
            missed = yy.trace() - (xy * torch.linalg.lstsq(xx, xy, driver="gelsd").solution).sum()
            error = missed * n / max(n - width - 1, 1)
        error, cka = error.clamp_min(0).item(), (xy.norm() ** 2 / xx.norm() / yy.norm()).item()
        layers.append(dict(student=s + 1, teacher=t + 1, mse=error / len(yy), share=error / yy.trace().item(), cka=cka))
    dist.all_reduce(sums), dist.all_reduce(bins), root.release(), teacher and teacher.release()
    return sums, bins, layers

def interval(top, bottom, seed):
    """95 % of sum(top) / sum(bottom), sequences drawn anew: percentiles, widened for few of them like Student's t."""
    n, draw = len(top), torch.Generator().manual_seed(seed)
    picks = (torch.randint(n, (100, n), generator=draw) for _ in range(20))
    drawn, middle = torch.cat([top[i].sum(1) / bottom[i].sum(1) for i in picks]), top.sum() / bottom.sum()
    widen = math.sqrt(n / (n - 1)) * (1 + 1.21 / (n - 1))
    return (middle + (drawn.quantile(drawn.new_tensor([0.025, 0.975])) - middle) * widen).tolist()

@torch.no_grad()
def try_out(root, tokenizer, ids_BT, prompts, seed):
    """-> tokens a second, peak bytes, and [greedy, sampled] continuations of each prompt."""
    root.model.generation_config.eos_token_id = None   # always the whole length: ranks stay in step, speeds compare
    write = lambda ids, new, sample=False: root(lambda model: model.generate(ids, attention_mask=torch.ones_like(
        ids), max_new_tokens=new, do_sample=sample, pad_token_id=0))[0, ids.shape[1]:].tolist()
    seconds = lambda *how: min(-time.time() + (write(*how), time.time())[1] for _ in range(3))
    torch.cuda.reset_peak_memory_stats() if CUDA else None
    found = {"prefill": ids_BT.numel() / seconds(ids_BT, 1), "generation": 32 / seconds(ids_BT[:1, :32], 32),
             "memory": torch.cuda.max_memory_allocated() if CUDA else None, "texts": []}
    for prompt in prompts:
        ids, eos = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"], tokenizer.eos_token_id
        torch.manual_seed(seed)
        both = (itertools.takewhile(lambda x: x != eos, write(ids.to(DEVICE), 48, sample)) for sample in (False, True))
        found["texts"].append([tokenizer.decode(list(x)) for x in both])
    root.release()
    return found

METRICS = dict(perplexity="perplexity", bits="bits a byte", accuracy="top-1 accuracy", agreement="top-1 as the teacher",
               kl="KL to the teacher", ece="calibration error", parameters="parameters", disk="bytes on disk",
               prefill="prefill tokens/s", generation="generation tokens/s", memory="peak memory, bytes")

def report(cfg):
    """What was lost, what was gained, was the teacher worth it? -> report.md, report.json, report.png in output_dir."""
    run, student = resolve_demo(cfg), os.path.join(cfg.output_dir, "final") if cfg.student == "demo" else cfg.student
    base, models, sums, against = load_tokenizer(run, run.teacher, student), {}, {}, {}
    named = [("teacher", run.teacher), ("student", student), *(("compare", name) for name in cfg.compare)]
    named = [(role, name.rstrip("/")) for role, name in named]
    for role, name in named:   # a name that is no model is refused before any work
        os.path.exists(os.path.join(name, "state.json")) or model_config(name, run, role)
    rows, teacher = load_data(run, base)[1], load_teacher(run)
    if len(rows) < 2:
        raise UserError(f"{cfg.dataset!r}: one held-out sequence has no interval; bring more text or lower --seq_len")
    sizes, shown = retell(rows, base, base)[1], rows.select(range(0, len(rows), -(-len(rows) // 3)))
    prompts = [base.decode(row["input_ids"][:max(32, collate([row]).positions[0] + 1)]) for row in shown]
    prompts = prompts if cfg.generate_comparisons else []
    for role, name in named:
        root, own, folder = (teacher, base, "") if role == "teacher" else load_evaluated(run, name, role)
        own, told, signal = own or base, rows, teacher
        check_head(root, role, name, own)
        label = role if role != "compare" else os.path.basename(folder if name.endswith("final") else name)
        label += f" {len(models)}" * (label in models)
        try:
            compare_tokenizers(base, own, run.teacher, name)
        except UserError:   # perplexity of its own tokens, bits on the same bytes, nothing that needs one vocabulary
            (told, _), signal = retell(rows, base, own), None
        few = max(4096, 8 * root.model.config.get_text_config().hidden_size) // cfg.seq_len + 1   # 8 tokens a fit row
        table, bins, layers = score(root, signal, told, cfg.batch_size, cfg.temperature, few)
        counts, nats, sums[label] = table[:, 0], table[:, 1], table
        tokens, nll, right, agreed, kl = table.sum(0).tolist()
        disk = [os.path.getsize(f) for end in ("safetensors", "bin") for f in glob.glob(f"{glob.escape(name)}/*.{end}")]
        batch = collate([told[i % len(told)] for i in range(cfg.batch_size)]).input_ids
        models[label] = m = dict(
            name=name, tokens=int(tokens), perplexity=math.exp(min(nll / tokens, 700)), accuracy=right / tokens,
            perplexity_95=[math.exp(min(x, 700)) for x in interval(nats, counts, cfg.seed)],
            bits=nll / math.log(2) / sizes.sum().item(), bits_95=interval(nats / math.log(2), sizes, cfg.seed),
            agreement=agreed / tokens if signal else None, kl=kl / tokens if signal else None,
            ece=(bins[:, 1] - bins[:, 2]).abs().sum().item() / tokens, parameters=count(root.model),
            disk=sum(disk) or count(root.model) * compute_dtype(cfg).itemsize, calibration=bins.tolist(),
            layers=layers * (role != "teacher"), curves=[], **try_out(root, own, batch, prompts, cfg.seed))
        m["ratio"] = {k: m[k] / whole for k in METRICS if m[k] is not None and (whole := models["teacher"][k])}
        with contextlib.suppress(OSError), open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            m["curves"] = [json.loads(line) for line in f if line.endswith("}\n")]
        del root
    for other in [k for k in models if k != "student"]:
        gap = (sums["student"] - sums[other])[:, 1] / math.log(2)
        low, high = interval(gap, sizes, cfg.seed)
        verdict = "better" if high < 0 else "worse" if low > 0 else "no significant difference"
        against[other] = dict(difference=(gap.sum() / sizes.sum()).item(), interval=[low, high], verdict=verdict)
    how = (f"{len(rows)} held-out sequences of {run.dataset}: {models['teacher']['tokens']:,} tokens, "
           f"{int(sizes.sum()):,} bytes; {WORLD} x {DEVICE.type}, {compute_dtype(cfg)}; T {cfg.temperature:g}; "
           f"brackets: 95 %, bootstrap; x: of the teacher; prefill {cfg.batch_size} x {cfg.seq_len}; memory: GPUs only")
    if RANK == 0:
        write_report(cfg.output_dir, {"how": how, "against": against, "models": models, "prompts": prompts})
    all_sum(0)

def write_report(folder, found):
    models, lines = found["models"], [f"# {found['models']['student']['name']}: the report", ""]
    show = lambda x: "-" if x is None else f"{x:.4g}" if abs(x) < 1e4 else tqdm.format_sizeof(x)
    cell = lambda m, k: show(m[k]) + f" ({' to '.join(map(show, m.get(k + '_95', [])))})" * (k + "_95" in m) \
        + f", {show(m['ratio'].get(k))} x" * (k in m["ratio"] and m is not models["teacher"])

    def table(*rows):
        widths = [max(map(len, column)) for column in zip(*rows)]
        pad = lambda row, fill=" ": "| " + " | ".join(x.ljust(w, fill) for x, w in zip(row, widths)) + " |"
        return [pad(rows[0]), pad([""] * len(widths), "-"), *map(pad, rows[1:]), ""]
    for other, x in found["against"].items():
        gap = "{:+.4f} bits a byte ({:+.4f} to {:+.4f})".format(x["difference"], *x["interval"])
        lines += [f"- student against {other}: {gap}: {x['verdict']}"]
    cells = ([title, *(cell(m, k) for m in models.values())] for k, title in METRICS.items())
    lines += ["", *table(["", *models], *cells), found["how"], ""]
    print0("\n" + "\n".join(lines))
    try:
        draw(os.path.join(folder, "report.png"), models)
        lines += ["![training, layers, quality against size, reliability](report.png)", ""]
    except ImportError:
        print0("no report.png: pip install matplotlib")
    for label, m in models.items():
        cells = [list(map(show, x.values())) for x in m["layers"]]
        head = ["layer", "teacher's", "MSE", "share of variance", "CKA"]
        lines += [f"## Layers of {label}", "", *table(head, *cells)] if cells else []
    for i, prompt in enumerate(found["prompts"]):   # indented is code: nothing to escape
        lines += ["## Greedy, then sampled, after", "", f"    {prompt!r}", ""]
        lines += [*(f"    {label}: {text!r}" for label, m in models.items() for text in m["texts"][i]), ""]
    for file, text in (("report.md", "\n".join(lines)), ("report.json", json.dumps(found, indent=1))):
        with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
            f.write(text)

def draw(path, models):
    """Four panels; shades, lines and markers tell models apart in grey too."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    (training, layers), (quality, trust) = figure.subplots(2, 2)
    looks = zip(itertools.count(), itertools.cycle(["0.6", "black", "#d55e00", "#56b4e9"]), itertools.cycle("sD^o"))
    for (label, m), (i, color, mark) in zip(models.items(), looks):
        curve = lambda key, at: [(x[at], x[key]) for x in m["curves"] if x.get(key)]
        layer = lambda key: [(x["student"], x[key]) for x in m["layers"]]
        size = m["parameters"] * 1.05 ** i   # aside a little: models of one size are the common case
        for panel, points, line, name in (
                (training, curve("train/ce_loss", "train/step"), "-", ": ce"),
                (training, curve("train/kl_loss", "train/step"), ":", ": KL"),
                (training, curve("eval/ce_loss", "eval/step"), mark, ": ce held out"),
                (layers, layer("share"), mark + "-", ": missed"), (layers, layer("cka"), mark + ":", ": CKA"),
                (quality, [(size, m["bits"])], mark, ""), (quality, [(size, x) for x in m["bits_95"]], "-", None),
                (trust, [(c / n, h / n) for n, h, c in m["calibration"] if n], mark + "-", f": ECE {m['ece']:.3f}")):
            if points:
                panel.plot(*zip(*points), line, color=color, markersize=5, label=name if name is None else label + name)
    training.set(title="Training", xlabel="step", ylabel="nats a token")
    layers.set(title="Layers against the teacher's", xlabel="student layer", ylabel="share of variance missed; CKA")
    quality.set(title="Quality against size", xlabel="parameters", ylabel="bits a byte, held out, 95 %", xscale="log")
    quality.set_xticks(sizes := sorted({m["parameters"] for m in models.values()}), map(tqdm.format_sizeof, sizes))
    trust.set(title="Reliability", xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1))
    trust.plot([0, 1], [0, 1], color="0.85", zorder=0)
    layers.xaxis.get_major_locator().set_params(integer=True)
    quality.minorticks_off(), quality.margins(0.25)
    for panel in (p for p in (training, layers, quality, trust) if p.get_legend_handles_labels()[0]):
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)

# ---------------------------------------------------------------------------------------------------------------------
# Train: schedule, evaluate, save, stop, accumulate, clip, step, log.

@contextlib.contextmanager
def stop_signals():
    """SIGTERM or one Ctrl-C: finish the step, save, exit 0. A second one stops at once. Yields the list of askings."""
    asked = []

    def ask(number, frame):
        echo = "TORCHELASTIC_RUN_ID" in os.environ and asked and time.time() - asked[-1] < 2
        if asked and not echo:   # torchrun repeats what the terminal has sent to everybody already
            raise KeyboardInterrupt
        asked.append(time.time())

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

def start_wandb(cfg, run_id):
    """A run to log to, or one that swallows everything: nothing ever waits at a prompt."""
    silent = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None, id=run_id)
    mode = os.environ.get("WANDB_MODE", "online")
    if RANK != 0 or not cfg.use_wandb or mode == "disabled":
        return silent
    try:
        import wandb
        if mode == "online" and not wandb.api.api_key:
            raise UserError("not logged in; run `wandb login`, or pass --no_use_wandb to silence this")
        return wandb.init(project=cfg.wandb_project, entity=cfg.wandb_entity, name=cfg.wandb_run_name, id=run_id,
                          resume="allow", config=dataclasses.asdict(cfg), dir=cfg.output_dir,
                          settings=wandb.Settings(console="off", silent=True))
    except Exception as e:
        print0(f"wandb: going on without it ({e if isinstance(e, UserError) else one_line(e)})")
        return silent

def plan_batch(cfg, state):
    """-> (batch size, micro-steps, global batch). A resumed run keeps its global batch at any number of ranks."""
    size, micro = cfg.batch_size, cfg.gradient_accumulation_steps
    wanted = state["global_batch"] if state else size * micro * WORLD
    if wanted != size * micro * WORLD:
        if [size, micro] != state["batch"] or WORLD == state["world"]:
            raise UserError(f"{cfg.output_dir!r} holds a run of {wanted} sequences a step, here they are {size} x {micro} x "
                            f"{WORLD} ranks; keep the product, or start over with --resume never or another --output_dir")
        size = min(size, -(-wanted // WORLD))
        micro = -(-wanted // (WORLD * size))
        print0(f"a run of {state['world']} ranks goes on with {WORLD}: {size} x {micro} keep its {wanted} sequences a step")
    return size, micro, wanted

@dataclasses.dataclass
class Phase:
    """A stretch of training with its own loss, parameters and schedule: ordinary distillation is one, block-wise many."""
    name: str
    steps: int
    work: Any       # (model, batch, signal, denominator) -> loss, ce, kl; runs inside the student
    signal: Any     # batch -> what work takes from the teacher
    rules: Any      # [(compiled regex, multiplier)] on parameter names, the first match wins
    default: float  # multiplier of all others
    learning_rate: float
    weight_decay: float
    max_grad_norm: float

def load_all(run):
    """-> tokenizer, train rows (or stream), eval rows, student, teacher or None; all checked to belong together."""
    named = [n for n in (run.student, run.teacher) if not n.startswith("layers:") and not n.endswith(".json")]
    tokenizer = load_tokenizer(run, *named)
    rows, held = load_data(run, tokenizer)
    student = load_student(run)
    check_head(student, "student", run.student, tokenizer)
    teacher = load_teacher(run) if run.alpha < 1 else None
    if teacher is not None:
        check_head(teacher, "teacher", run.teacher, tokenizer)
        its = load_tokenizer(dataclasses.replace(run, tokenizer=None), run.teacher)
        if its is not None:
            compare_tokenizers(tokenizer, its, run.tokenizer or run.student, run.teacher)
    return tokenizer, rows, held, student, teacher

def train(cfg):
    """-> True when the run is done, False when a signal stopped it."""
    begun, run = time.time(), resolve_demo(cfg)
    if run is None:
        return False
    place = functools.partial(os.path.join, cfg.output_dir)
    found = find_checkpoints(cfg)
    state = found[0][1] if found else None
    if state:
        refuse_changes(state["config"], shapes_result(cfg), found[0][0])
        same_length = state["length"] == [cfg.max_steps, cfg.num_epochs]
        if same_length and state["step"] >= state["steps"] and os.path.isdir(place("final")):
            print0(f"{cfg.output_dir} holds this run, finished at step {state['step']}: see {place('final')}")
            return True
    tokenizer, rows, held, student, teacher = load_all(run)
    batch_size, micro_steps, global_batch = plan_batch(cfg, state)
    if cfg.streaming and not cfg.max_steps:
        raise UserError("a stream has no length: give --max_steps")
    steps_per_epoch = None if cfg.streaming else -(-len(rows) // global_batch)
    objective = dict(alpha=cfg.alpha, temperature=cfg.temperature, divergence=cfg.divergence)
    work = functools.partial(distil, **objective)
    signal_of, fp16 = teacher_signal(teacher), compute_dtype(cfg) == torch.float16
    phases = [Phase("distil", cfg.max_steps or max(1, math.ceil(cfg.num_epochs * steps_per_epoch)), work, signal_of,
                    parse_multipliers(cfg.lr_multipliers), cfg.default_lr_multiplier, cfg.learning_rate, cfg.weight_decay,
                    cfg.max_grad_norm)]
    steps, step, best, before, position, tokens_seen = sum(p.steps for p in phases), 0, math.inf, None, None, 0
    health, log_file, wandb_run, now, problem, saved_at = new_health(fp16), None, None, None, None, None

    def epoch():
        return step / steps_per_epoch if steps_per_epoch else (position or {}).get("epoch", 0)

    def log(**entry):
        if RANK == 0:
            log_file.write(json.dumps(entry) + "\n")
            log_file.flush()
            wandb_run.log(entry, step=step)

    def save():
        return save_checkpoint(place("checkpoints"), step, tensors_of(student, optimizer, health), dict(
            step=step, steps=steps, epoch=epoch(), position=position, tokens=tokens_seen, best=best, before=before, world=WORLD,
            batch=[cfg.batch_size, cfg.gradient_accumulation_steps], global_batch=global_batch, wandb=wandb_run.id,
            length=[cfg.max_steps, cfg.num_epochs], config=shapes_result(cfg)), cfg.keep_checkpoints)

    whose = f"teacher {run.teacher}: {count(teacher.model):,}" if teacher else f"teacher: cache {cfg.cache_dir}"
    print0(f"student {run.student}: {count(student.model):,} parameters; {whose if cfg.alpha < 1 else 'no teacher (alpha 1)'}")
    print0(f"{WORLD} x {DEVICE.type}, {str(compute_dtype(cfg))[6:]}; {global_batch} sequences a step ({batch_size} x {micro_steps} x "
           f"{WORLD}) of {'a stream' if cfg.streaming else f'{len(rows):,}'}, {steps} steps; {len(held)} held out; "
           f"all goes to {cfg.output_dir}")
    bar = batches = None
    with stop_signals() as asked:
        for number, phase in enumerate(phases):
            last = sum(p.steps for p in phases[:number + 1])
            if (state["step"] if state else step) >= last < steps:
                continue
            optimizer = make_optimizer(student.model.named_parameters(), phase.rules, phase.default, phase.learning_rate,
                                       phase.weight_decay)
            set_rates = make_schedule(cfg, optimizer, phase.steps)
            if bar is None:   # the first phase that has work left: continue where the checkpoint stands
                if state:
                    state = load_checkpoint(found, tensors_of(student, optimizer, health))
                    saved_at = step = state["step"]
                    best, before, position, tokens_seen = (state[k] for k in ("best", "before", "position", "tokens"))
                prepare_output(cfg, step)
                log_file = open(place("log.jsonl"), "a", encoding="utf-8")
                wandb_run = start_wandb(cfg, state and state["wandb"])
                before = before or evaluate(student, work, signal_of, held, batch_size)
                if cfg.streaming:
                    how = functools.partial(encode, tokenizer=tokenizer, text_column=cfg.text_column, seq_len=cfg.seq_len)
                    batches = streamed_batches(rows, how, cfg.seed, cfg.shuffle_buffer, global_batch, position)
                else:
                    batches = indexed_batches(rows, cfg.seed, global_batch, step)
                batches = prefetch(micro_batches(batches, None if cfg.streaming else rows, micro_steps, batch_size))
                bar = tqdm(total=steps, initial=step, disable=RANK != 0, dynamic_ncols=True, mininterval=0.5)
            bar.set_description(phase.name)
            since, since_tokens = time.time(), 0
            while step < last:
                micro, position = next(batches)
                tokens, stopping = all_sum(sum(len(b.labels) for b in micro), len(asked))   # all ranks agree
                if stopping:
                    break
                torch.manual_seed((cfg.seed * 1_000_003 + step) * 65_536 + RANK)   # dropout: derived, no state to keep
                rate, sums = set_rates(step - last + phase.steps), torch.zeros(3, device=DEVICE)
                grad_norm = torch.zeros(())
                for i, batch in enumerate(micro):
                    student.set_requires_gradient_sync(i == len(micro) - 1)
                    loss, ce, kl = student(phase.work, batch, phase.signal(batch), max(tokens, 1))
                    # FSDP averages over ranks, the mean is over tokens; a loss that is not finite takes its gradient along
                    (loss * (WORLD * health["scale"] * (1 + 0 * loss.detach()))).backward()
                    sums += torch.stack([loss.detach(), ce, kl])
                if tokens:
                    grad_norm = optimizer_step(optimizer, phase.max_grad_norm, health, fp16)
                else:
                    print0(f"step {step + 1}: not one valid target token in the whole batch; nothing changed")
                optimizer.zero_grad()
                step, tokens_seen, since_tokens = step + 1, tokens_seen + int(tokens), since_tokens + tokens
                bar.update()
                if (step % 10 == 0 or not CUDA) and health["streak"].item() >= 10:   # .item() makes a GPU wait
                    save()
                    raise UserError(f"loss or gradient was not finite for 10 steps in a row, up to step {step}; the checkpoint "
                                    "there holds the last good weights. Lower --learning_rate, or try --dtype fp32")
                if step % cfg.log_steps == 0 or step == last:
                    loss, ce, kl = all_sum(*sums.tolist())
                    speed, since, since_tokens = since_tokens / max(time.time() - since, 1e-9), time.time(), 0
                    skipped = int(health["skipped"].item())
                    log(**{"train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
                           "train/grad_norm": grad_norm.item(), "train/epoch": epoch(), "train/step": step,
                           "train/tokens_per_second": speed, "train/skipped_steps": skipped})
                    bar.set_postfix_str(f"loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} {speed:,.0f} tok/s"
                                        + (f" skipped {skipped}" if skipped else ""))
                if cfg.eval_steps and step % cfg.eval_steps == 0 or step == steps:
                    now = evaluate(student, work, signal_of, held, batch_size)
                    best = min(best, now["loss"])
                    entry = {**now, "min_loss": best, "epoch": epoch(), "step": step}
                    log(**{f"eval/{k}": v for k, v in entry.items()})
                    print0(f"step {step}: held out: loss {now['loss']:.4f}, perplexity {now['perplexity']:.2f}, "
                           f"kl {now['kl_loss']:.4f}")
                if cfg.save_steps and step % cfg.save_steps == 0 or step == steps:
                    problem, saved_at = save(), step
        if step < steps and saved_at != step:
            problem = save()
        bar.close()
        batches.close()
    if step < steps:
        print0(f"stopped at step {step} of {steps}" + ("" if problem else ", saved; the same command continues"))
    elif not problem:
        now = now or evaluate(student, work, signal_of, held, batch_size)
        problem = finish(cfg, run, student, teacher, tokenizer, held, before, now, begun)
    wandb_run.finish()
    log_file.close()
    if problem:
        raise UserError(f"the run could not be saved in {cfg.output_dir!r}: {problem}; make room, then the same command again")
    return step >= steps

def finish(cfg, run, student, teacher, tokenizer, held, before, after, begun):
    """final/, the closing table and a sample. -> None, or what went wrong while saving."""
    final, problem, size = os.path.join(cfg.output_dir, "final"), None, count(student.model)
    lines = [("student before", before, size), ("student after", after, size)]
    if teacher is not None:
        alone = functools.partial(distil, alpha=1.0, temperature=1.0, divergence="forward")
        lines = [("teacher", evaluate(teacher, alone, teacher_signal(None), held, cfg.batch_size), count(teacher.model)), *lines]
    try:
        save_model(student, tokenizer, final, compute_dtype(cfg))
    except OSError as e:
        problem = one_line(e)
    print0(f"\n{'held out':<15}{'perplexity':>12}{'KL to teacher':>15}{'parameters':>15}")
    for name, x, size in lines:
        kl = "-" if cfg.alpha == 1 else f"{x['kl_loss']:.4f}"
        print0(f"{name:<15}{x['perplexity']:>12.2f}{kl:>15}{size:>15,}")
    if RANK == 0 and not problem:
        model = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=cfg.trust_remote_code)
        start = torch.as_tensor(held[0]["input_ids"][:32])[None].long()
        ids = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=48, do_sample=False,
                             pad_token_id=0)[0]
        print0(f"\nsample: {tokenizer.decode(start[0])!r}\n     -> {tokenizer.decode(ids[start.shape[1]:])!r}")
    print0(f"\ndone in {time.time() - begun:.0f} s: {final}")
    return problem

# ---------------------------------------------------------------------------------------------------------------------
# Main: one mode, one function.

def main(argv=None):
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        with process_group(), lock(cfg.output_dir):
            {"train": train, "eval": report}[cfg.mode](cfg)
        return 0
    except UserError as e:
        if LOCAL_RANK == 0:
            print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
