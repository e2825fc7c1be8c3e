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
import asyncio, collections, contextlib, ctypes, dataclasses, datetime, fcntl, functools, glob, inspect, itertools
import json, math, os, re, resource, shutil, sys, time, types, zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
import datasets, safetensors.numpy, torch, transformers
import numpy as np
import torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_scheduler

from config import (MEMORY_ADVICE, CacheRows, Config, UserError, all_prompts, api_teacher, append_row, ask_all,
                    begin_cache, block_table, checkpoints_in, close_files, closing_table, compare_tokenizers, derive,
                    describe_run, digest, explain_bad_disk, explain_bad_file, explain_bad_rows, explain_no_config,
                    finish_cache, in_mode, judge, learning_rates, make_demo, one_line, pack, parse_config, plan_batch,
                    plan_blocks, plan_cache, plan_demo, plan_layers, plan_phases, plan_stitches, prepare_output,
                    read_chunk, read_manifest, read_replies, read_states, refuse, refuse_changes, retell, save_config,
                    scheduler_kwargs, shapes_result, start_wandb, stop_signals, sync, take_lock, usd, write_report)

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

# ---------------------------------------------------------------------------------------------------------------------
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

def finish_logits(raw, scale, softcap):
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
    logits, slope = finish_logits(student_CV, *student_bend)
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
        error = logits - finish_logits(target, *teacher_bend)[0]
        kl, grad = error.square().mean(-1), p.mul_(alpha).add_(error, alpha=2 * (1 - alpha) / error.shape[-1])
    else:
        t, q, its_total = exponentials(finish_logits(target, *teacher_bend)[0], temperature)
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

def take(teacher, where):
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
            h_CD, target = hidden_ND[part], take(teacher, part)
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
        student_hidden, teacher = student_hidden[counted], take(teacher, counted)
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

def hidden_error(ours_ND, theirs_ND, kind, temperature):
    """-> [N], of hidden states. The gradient is exactly 0 where both agree: Adam makes whole steps of noise."""
    if kind == "kl_div":   # the last two terms cancel, but for rounding
        logp, logq = (torch.log_softmax(x.float() / temperature, -1) for x in (ours_ND, theirs_ND))
        return temperature ** 2 * (logq.exp() * (logq - logp) - logq.exp() + logp.exp()).sum(-1)
    if kind == "mse":
        return (ours_ND.float() - theirs_ND.float()).square().mean(-1)
    ours_ND, theirs_ND = (nn.functional.normalize(x.float(), dim=-1) for x in (ours_ND, theirs_ND))
    return (ours_ND - theirs_ND).square().sum(-1) / 2   # of unit vectors: 1 - cos

# ---------------------------------------------------------------------------------------------------------------------
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
    take = lambda n: raw.take(n if cfg.streaming else min(n, len(raw)))
    with explain_bad_rows(cfg.dataset, f"dataset {cfg.dataset!r}: a row cannot be read"):
        few = list(take(100))   # a look at the stream itself would move it
    if not any(conversation_of(row) or isinstance(row.get(cfg.text_column), str) for row in few):
        raise UserError(f"dataset {cfg.dataset!r} has " + (
            f"no text in column {cfg.text_column!r} and no known conversation columns; it has {', '.join(few[0])}: "
            "name one with --text_column" if few else "no rows"))
    if cfg.max_samples:
        raw = take(cfg.max_samples)
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

# ---------------------------------------------------------------------------------------------------------------------
# Demo: text, tokenizer and model shapes made from what every machine has. Hands on ordinary files; from there on the
# demo is a run like any other.

def resolve_demo(cfg):
    """-> run: cfg with files for each `demo`; what is saved stays cfg, as typed. This trainer trains the demo's teacher
    the first time. None: a signal stopped that."""
    run, teacher_run = plan_demo(cfg)
    if run is not cfg and RANK == 0:
        make_demo(cfg.output_dir)
    all_sum(0)
    if teacher_run is not None:
        print0(f"demo: first the teacher, {teacher_run.max_steps} steps, kept in {teacher_run.output_dir}")
        if not train(teacher_run):
            return None
    return run

# ---------------------------------------------------------------------------------------------------------------------
# Teacher cache: what the teacher says of each token, a few bits an entry, on disk beside the token itself. Any number
# of workers fill it in mode cache; open_cache hands on rows like those of load_data that carry their SparseTarget.

@torch.no_grad()
def keep_teacher(signal_of, rows, first, m):
    """One teacher forward, by every rank since a sharded teacher needs them all -> (bytes, their line in the table: 1
    row, tokens, targets, entries, teacher mass, checksum) a row."""
    (hidden_ND, head), V, (wide, bits, more), packed = signal_of(collate(rows)), m["vocabulary"], m["bits"], []
    for index, row in enumerate(rows, first):
        ids = np.asarray(row["input_ids"])
        keep = np.ones(len(ids), bool) if row["targets"] is None else np.asarray(row["targets"])
        n, parts, draw = int(keep[1:].sum()), [], torch.Generator().manual_seed(int(digest(m["seed"], index), 16) >> 1)
        u_NS = torch.rand(n, m["size"], dtype=torch.float64, generator=draw).to(DEVICE)   # the same on any device
        mine_ND, hidden_ND = hidden_ND.tensor_split([n])
        for h_CD, u_CS in zip(*(x.split(max(1, LOGITS_BUDGET // (16 * V))) for x in (mine_ND, u_NS))):
            logits = finish_logits(nn.functional.linear(h_CD, head.weight, head.bias)[:, :V], *head[2:])[0]
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

def fill_chunks(place, splits, m, encode_columns, signal_of, paths):
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
                        packed += keep_teacher(signal_of, block[i:i + m["group"]], first + i, m)
                        yield sum(len(row["input_ids"]) for row in block[i:i + m["group"]])
                    data, counts = zip(*packed)
                    table = np.column_stack([np.cumsum([len(x) for x in data]), counts])
                    with open(path + ".tmp", "wb") as f:   # sliced through the memory map, no code in it
                        f.write(safetensors.numpy.save({"rows": np.frombuffer(b"".join(data), np.uint8),
                                                        "table": table}, {"crc": str(zlib.crc32(table))}))
                    sync(f.name)
                    os.replace(f.name, path)

def open_cache(cfg):
    """-> train rows, eval rows, tokenizer, manifest; refused where the run does not fit what is stored."""
    m, place = read_manifest(cfg), functools.partial(os.path.join, cfg.cache_dir)
    rows, held = (CacheRows(place(s), m, m["chunks"][s]) for s in ("train", "eval"))
    held.starts = held.starts.clip(max=cfg.eval_samples)
    tokenizer = AutoTokenizer.from_pretrained(place("tokenizer"))
    own = load_tokenizer(cfg, cfg.student) or tokenizer
    compare_tokenizers(own, tokenizer, cfg.tokenizer or cfg.student, f"{cfg.cache_dir}: {m['teacher']}")
    return rows, held, tokenizer, m

def cache(cfg):
    """Fill what is missing of cache_dir. Any number of workers may, at any time; the same command goes on."""
    with lock(cfg.output_dir) if "demo" in (cfg.teacher, cfg.dataset) else contextlib.nullcontext():
        run = resolve_demo(cfg)
    if run is None:
        return
    tokenizer, rows, held, _, teacher = load_all(run)
    place, signal_of = functools.partial(os.path.join, cfg.cache_dir), teacher_signal(teacher)
    missing, stop = 1, 0
    with explain_bad_disk(cfg.cache_dir), stop_signals() as asked:
        m = begin_cache(cfg, run, tokenizer, rows, str(compute_dtype(cfg)), RANK)
        all_sum(0)
        few = keep_teacher(signal_of, [held[i] for i in range(min(len(held), m["group"]))], 0, m)
        total, done = plan_cache(cfg, few, None if cfg.streaming else len(rows) + len(held), print0)
        with tqdm(total=total, initial=done, disable=RANK != 0, unit="tok", unit_scale=True) as bar:
            while missing and not stop:   # once more, where another worker had a chunk and may have died with it
                paths, problem, more = [], None, 1
                jobs = fill_chunks(place, {"eval": held, "train": rows}, m, encoder(cfg, tokenizer), signal_of, paths)
                while more and not stop:
                    try:
                        tokens = next(jobs, 0)
                    except OSError as e:
                        problem, tokens = e, 0
                    if not tokens:   # the others may still need this rank
                        keep_teacher(signal_of, [], 0, m)
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
    return distillation_loss(*counted_hidden(model, batch), batch.labels, signal, denominator=denominator, **objective)

def head_of(model):
    out, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(out.weight, getattr(out, "bias", None), float(scale), getattr(config, "final_logit_softcapping", None))

def head_error(model, ids_1T):
    """Runs inside a root: how far hidden states times head_of are from its logits, and what rounding may do."""
    head, its = head_of(model), model(input_ids=ids_1T, use_cache=False).logits.float()
    hidden = hidden_states(model, ids_1T)
    ours = finish_logits(nn.functional.linear(hidden, head.weight, head.bias), *head[2:])[0]
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

# ---------------------------------------------------------------------------------------------------------------------
# Models and FSDP: rank 0 reads, every rank starts empty and receives its shard. Hands on Inside roots: FSDP gathers
# parameters in the forward of the root, so whatever touches weights is a function run inside it.

class Inside(nn.Module):
    def __init__(self, model, stitches=None):
        super().__init__()
        self.model, self.stitches = model, stitches or nn.ModuleDict()   # of block-wise: kept in checkpoints only

    def forward(self, work, *args):
        return work(self.model, *args)

    def release(self):
        """After forwards without a backward: give gathered weights back, else the next step would use stale ones."""
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

def load_student(cfg):
    name, role = (cfg.teacher, "teacher") if cfg.student.startswith("layers:") else (cfg.student, "student")
    whole = model_config(name, cfg, role)
    config, keep = plan_layers(cfg, whole)
    if keep:
        print0(f"student: layers {', '.join(map(str, keep))} of the {whole.num_hidden_layers} of teacher {name}")
    return spread(cfg, config, lambda: read_model(name, whole, cfg, role, torch.float32, keep), stitching(cfg, config))

def load_teacher(cfg):
    """Frozen, in the compute type, but models trained in bf16 overflow in fp16: those stay in fp32 then."""
    config, dtype = model_config(cfg.teacher, cfg, "teacher"), compute_dtype(cfg)
    dtype = torch.float32 if dtype == torch.float16 and config.dtype != torch.float16 else dtype
    return spread(cfg, config, lambda: read_model(cfg.teacher, config, cfg, "teacher", dtype), frozen=dtype)

def spread(cfg, config, read, stitches=lambda model: None, frozen=None):
    """Meta model on every rank -> FSDP units (layers, root) -> weights. The student keeps fp32 masters and computes in
    compute_dtype; a teacher (frozen: its dtype) has no gradients; its root stays gathered, the loss uses its head."""
    dtype, home = compute_dtype(cfg), "cpu" if cfg.cpu_offload else DEVICE
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=frozen or torch.float32, trust_remote_code=cfg.trust_remote_code)
        root = Inside(model, stitches(model))
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
    fill(root, source and Inside(source, stitches(source)), home)
    return root

def scatter(tensor, whole):
    """Rank 0's whole, of any type -> what this rank keeps of it."""
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole.to(DEVICE, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(whole.to_local())
    else:
        dist.broadcast(whole, 0)
        tensor.copy_(whole)

@torch.no_grad()
def fill(root, source, device):
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
        scatter(tensor, whole)

def gathered(tensor):
    return (tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).to(DEVICE)

def save_model(root, tokenizer, path, dtype):
    """Gathered on rank 0 tensor by tensor, saved by transformers, renamed when whole."""
    keep = "cpu" if RANK == 0 else "meta"   # the other ranks take part, and drop each tensor at once
    tensors = itertools.chain(root.model.named_parameters(), root.model.named_buffers())
    full = {name: gathered(x).to(keep, dtype if x.is_floating_point() else x.dtype, copy=True) for name, x in tensors}
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

# ---------------------------------------------------------------------------------------------------------------------
# Optimiser: AdamW groups by learning rate; one step that clips, unscales and skips without asking the GPU.

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

def new_health(fp16):
    """On the device: the fp16 loss scale, good steps in a row, skipped steps in all, and in a row."""
    start = {"scale": 2.0 ** 14 if fp16 else 1.0, "good": 0.0, "skipped": 0.0, "streak": 0.0}
    return {k: torch.tensor(v, device=DEVICE) for k, v in start.items()}

def optimizer_step(optimizer, max_grad_norm, health, fp16, parts=()):
    """Clip (parts: [(parameters, norm)], first), unscale, skip what is not finite: in fused AdamW, by grad_scale."""
    for part, norm in parts:
        torch.nn.utils.clip_grad_norm_(part, norm * (health["scale"].item() if fp16 else 1.0))
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = gathered(torch.nn.utils.get_total_norm(gradients)) / health["scale"]
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

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: whole or not at all. Tensors through torch.distributed.checkpoint, so that another number of ranks can
# read them; everything else in state.json. Random numbers need no state: each step seeds itself.

@contextlib.contextmanager
def lock(folder):
    """One run a directory; the kernel drops the lock with its process. One made for a refused run goes again."""
    problem, release = take_lock(folder) if RANK == 0 else (None, lambda: None)
    problem = from_rank0(problem)
    try:
        if problem:
            raise UserError(f"{problem}; choose another --output_dir")
        yield
    finally:
        release()

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

def find_checkpoints(cfg):
    """-> [(path, state), ...] to continue from, the best first."""
    paths = [] if cfg.resume == "never" else checkpoints_in(os.path.join(cfg.output_dir, "checkpoints")) \
        if cfg.resume == "auto" else [cfg.resume.rstrip("/")]
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

# ---------------------------------------------------------------------------------------------------------------------
# Block-wise: block i of the student learns to end where its teacher block ends, seen through a linear stitch; then norm
# and head learn the teacher's logits. Hands on stitches for the student's root, and the phases that train begins with.

class Tap:
    """In place of a decoder layer: feeds it another input, keeps both ends, also when recomputed, as hooks are not."""
    def __init__(self, layer, feed):
        self.layer, self.feed = layer, feed

    def __getattr__(self, name):   # models ask their layers for attention_type and the like
        return getattr(self.layer, name)

    def __call__(self, hidden_states, *args, **kwargs):
        before = hidden_states if self.feed is None else self.feed
        out = self.layer(before, *args, **kwargs)
        self.kept = before, out[0] if isinstance(out, tuple) else out
        return out

def around_blocks(model, batch, blocks, feeds):
    """Runs inside either root: -> {block: (hidden before, hidden after)}, [B, T, D] each. Later layers do not run."""
    path, layers = layers_of(model)
    parent, name = vars(model.get_submodule(path.rpartition(".")[0])), path.rpartition(".")[2]
    parent[name] = taps = [Tap(layer, feeds.get(i)) for i, layer in enumerate(layers[:max(blocks) + 1])]
    hidden_states(model, batch.input_ids)   # finds them in place of the registered layers, which they hide
    del parent[name]
    return {i: taps[i].kept for i in blocks}

def stitching(cfg, config):
    """Untie the student's head. -> a function that makes the stitches of a model; refuses pairs that do not match."""
    if not cfg.blockwise:
        return lambda model: None
    its, ours = model_config(cfg.teacher, cfg, "teacher"), config.get_text_config()
    if getattr(ours, "tie_word_embeddings", False) and (cfg.train_lm_head or cfg.initialize_head_from_teacher):
        config.tie_word_embeddings = ours.tie_word_embeddings = False
        print0("blockwise: the student's head is untied from its embeddings, which the blocks build on")
    def stitches_of(model):
        torch.manual_seed(cfg.seed)
        shapes = plan_stitches(cfg, config, its, model.get_output_embeddings().bias is not None)
        made = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
        for p in made.parameters():
            nn.init.zeros_(p) if p.ndim == 1 else (nn.init.eye_ if len(p) == len(p.T) else nn.init.xavier_uniform_)(p)
        return made
    return stitches_of

def matching(cfg, student, teacher, blocks):
    """-> work and signal_of of a Phase that trains these blocks; work also returns the error of each."""
    pairs, fed = plan_blocks(cfg, student.model.config, teacher.model.config), cfg.block_input == "teacher"
    pairs = {i: pairs[i] for i in blocks}
    def work(model, batch, states, denominator):
        dtype, real = model.get_input_embeddings().weight.dtype, lambda x: x.flatten(0, 1)[batch.real]
        stitch = lambda name, x: student.stitches[name](x.to(dtype)) if name in student.stitches else x.to(dtype)
        own = around_blocks(model, batch, pairs, {i: stitch(f"down{i}", states[j][0]) for i, j in pairs.items() if fed})
        errors = [hidden_error(stitch(f"up{i}", real(own[i][1])), real(states[j][1]), cfg.distill_loss_type,
                               cfg.distill_loss_temperature).sum() / denominator for i, j in pairs.items()]
        return sum(errors), *errors[0].new_zeros(2), *errors
    return work, torch.no_grad()(lambda batch: teacher(around_blocks, batch, pairs.values(), {}))

def final_norm(model):
    """The last module beside the decoder layers with a weight of one dimension; Identity where there is none."""
    beside = model.get_submodule(layers_of(model)[0].rpartition(".")[0]).children()
    return [nn.Identity(), *(m for m in beside if getattr(m, "weight", None) is not None and m.weight.ndim == 1)][-1]

@torch.no_grad()
def initialize_head(student, teacher):
    """The teacher's norm and head at equal width; else what they make of stitched states, folded into the student's."""
    def parts(model):   # what a norm multiplies by and adds shows on states of size 1, whatever its weight means
        head, norm = head_of(model), final_norm(model)
        probe = 1 - 2 * (torch.arange(head.weight.shape[1], device=DEVICE) % 2).to(head.weight)
        plus, minus = norm(probe).float(), norm(-probe).float()
        return head.weight.float(), head.bias, head.scale, (plus - minus) / 2 * probe, (plus + minus) / 2
    (weight, bias, scale, gain, shift), (*_, own_scale, own_gain, own_shift) = teacher(parts), student(parts)
    student.release()
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias.float()
    if len(gain) != len(own_gain):
        stitch = student.stitches[f"up{len(layers_of(student.model)[1]) - 1}"]
        shift = shift if stitch.bias is None else shift + gain * gathered(stitch.bias)
        bias, weight, shift = bias + weight @ shift, weight * gain @ gathered(stitch.weight), own_shift
        gain = len(gain) ** 0.5 / gathered(stitch.weight).norm()   # the student's norm undoes the stitch's scale
    for p, new in zip(student.model.get_output_embeddings().parameters(), (weight, bias)):
        scatter(p, torch.cat([new[:len(p)] * (scale / own_scale), gathered(p)[len(new):]]))   # a padded tail stays
    for p, more in zip(final_norm(student.model).parameters(), (gain - own_gain, shift - own_shift)):
        scatter(p, gathered(p) + more)

# ---------------------------------------------------------------------------------------------------------------------
# API data: a model behind an API, or one of our own, answers the prompts of config.py; its filters judge the replies.
# Hands on output_dir/train.jsonl, one conversation a row, which --dataset FILE --alpha 1 trains on.

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
    save_config(cfg, os.path.join(cfg.output_dir, "config.json"))
    print0(f"{len(todo):,} of {len(jobs):,} prompts to ask, ~{sum(job.size for job in todo) // 4:,} tokens; at most "
           f"{len(todo) * cfg.max_tokens:,} come back, for {sum(job.worst for job in todo):.2f} USD at these prices")
    def hold(job):   # the worst case is spent before a try leaves, on disk too: a cap holds over kills and restarts
        more = (job.tries + 1) * job.worst - job.held
        if more > 0 and run.spent + more <= (cfg.max_cost or math.inf):
            run.spent, job.held, more = run.spent + more, job.held + more, 0
            save_config({"spent_usd": run.spent}, summary)
        return more <= 0
    def settle(job, said, end, *usage):
        known, failed = all(isinstance(n, int) and n >= 0 for n in usage), said is None
        cost = (job.tries - known) * job.worst + (usd(cfg, *usage) if known else 0)   # usage lost: the worst case
        run.spent, run.tokens = run.spent + cost - job.held, run.tokens + (sum(usage) if known else 0)
        if failed and run.stop:   # no row: a later run asks again
            return
        cost += past.get(job.prompt_id, (0,))[0]   # what it cost when it failed: the last row of a prompt counts
        row = judge(job, said, end, usage) | {"model": cfg.api_model or cfg.teacher, "cost": cost}
        append_row(rejected if "reason" in row else train, row)
        recent.append(failed and job.prompt_id not in past)   # one that always fails must not stop each later run
        run.pace, run.answered = min(width, run.pace + (not failed)), run.answered or not failed
        if sum(recent) > 10:
            run.stop.append(UserError(f"{sum(recent)} of the last {len(recent)} requests failed, the last: {end}"))
        bar.set_postfix_str(f"{run.tokens:,} tokens" + f", {run.spent:.4f} USD" * (run.spent > 0), refresh=False)
        bar.update()
    run = types.SimpleNamespace(jobs=jobs, hold=hold, spent=spent, tokens=0, pace=1, answered=False, past=past)
    make, size, width = (local_teacher, cfg.concurrency, 1) if local else (api_teacher, 1, cfg.concurrency)
    batches = collections.deque(list(g) for _, g in itertools.groupby(todo, lambda job: job.place // size))
    with stop_signals() as run.stop, tqdm(total=len(todo), unit="prompt", dynamic_ncols=True, mininterval=0.5) as bar:
        asyncio.run(ask_all(run, make(cfg, run), batches, settle))
    ended = next(("stopped by a signal" if isinstance(x, float) else x for x in run.stop), "all is answered")
    print0(close_files(train, rejected, summary, list(jobs), run.spent, run.tokens, ended))
    if isinstance(ended, UserError):
        raise ended

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: every token of held-out rows counts once, whatever the number of ranks. The report's words: config.py.

def evaluate(root, work, signal_of, rows, batch_size):
    """-> {loss, ce_loss, kl_loss, perplexity}: means over the counted tokens of rows."""
    loss, ce, kl = means(root, work, signal_of, rows, batch_size, "labels")
    return {"loss": loss, "ce_loss": ce, "kl_loss": kl, "perplexity": math.exp(min(ce, 700))}

def shares(rows, batch_size):
    """Batches of row numbers, of each this rank's: every rank runs every batch, with nothing in it where rows end."""
    for start in range(0, len(rows), batch_size * WORLD):
        yield range(start + RANK, min(start + batch_size * WORLD, len(rows)), WORLD)

@torch.no_grad()
def means(root, work, signal_of, rows, batch_size, over):
    """What work returns, as means over the labels or the real tokens of rows."""
    was_training, sums, tokens = root.training, 0, 0
    root.eval()
    for mine in shares(rows, batch_size):
        batch = collate([rows[i] for i in mine])
        sums += torch.stack(root(work, batch, signal_of(batch), 1.0)).double()
        tokens += len(getattr(batch, over))
    root.train(was_training)
    root.release()
    *sums, tokens = all_sum(*sums.tolist(), tokens)
    return [x / max(tokens, 1) for x in sums]

def load_evaluated(cfg, name):
    """A model, or checkpoints/step-... of a run in progress."""
    if not os.path.exists(os.path.join(name, "state.json")):
        return load_teacher(dataclasses.replace(cfg, teacher=name))
    found = find_checkpoints(types.SimpleNamespace(resume=name))
    made, folder = found[0][1]["config"], os.path.dirname(os.path.dirname(os.path.realpath(name)))
    made |= dict(output_dir=folder, dtype=cfg.dtype, cache_dir=made.pop("cache"))   # from a cache: no teacher needed
    root = load_student(resolve_demo(Config(**made))).eval()
    load_checkpoint(found, lambda step: tensors_of(root, {}, {}))
    return root

@torch.no_grad()
def score(root, teacher, rows, batch_size, temperature):
    """-> [rows, 5] sums a sequence: tokens, -log p, top-1 right, top-1 the teacher's, KL to it (with its T^2); and
    [15, 3] tokens, hits, confidence a bin of confidence."""
    sums, bins = torch.zeros(len(rows), 5, dtype=torch.float64), torch.zeros(15, 3, dtype=torch.float64)
    for mine in shares(rows, batch_size):
        batch = collate([rows[i] for i in mine])
        sides = [x(counted_hidden, batch) for x in (root, teacher)]
        row_N = torch.tensor([*mine, 0])[(batch.positions // batch.input_ids.shape[1]).cpu()]
        vocab = min(len(head.weight) for _, head in sides)
        for part in torch.arange(len(row_N)).split(max(1, LOGITS_BUDGET // (24 * vocab))):   # six fp32 [C, V] at a time
            z, y = (finish_logits(nn.functional.linear(h[part], head.weight, head.bias)[:, :vocab], *head[2:])[0]
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

@torch.no_grad()
def write(root, tokenizer, ids, new=48, seed=None):
    """-> seconds, the continuation of the first row: greedy, or sampled with a seed."""
    torch.manual_seed(seed or 0)
    root.eval().model.generation_config.eos_token_id = None   # the whole length: ranks stay in step, speeds compare
    begun, options = time.time(), dict(max_new_tokens=new, do_sample=seed is not None, pad_token_id=0)
    said = root(lambda model: model.generate(ids, attention_mask=torch.ones_like(ids), **options))[0, ids.shape[1]:]
    said = itertools.takewhile(lambda x: x != tokenizer.eos_token_id, said.tolist())   # tolist waits for the GPU
    root.release()
    return time.time() - begun, tokenizer.decode(list(said))

def try_out(root, tokenizer, ids_BT, prompts, seed, others):
    """-> tokens a second, peak bytes, and [greedy, sampled] continuations of each prompt."""
    CUDA and torch.cuda.reset_peak_memory_stats()
    prefill = ids_BT.numel() / min(write(root, tokenizer, ids_BT, 1)[0] for _ in range(3))
    ids = [tokenizer(x, add_special_tokens=False, return_tensors="pt")["input_ids"].to(DEVICE) for x in prompts]
    seconds, texts = zip(*(zip(write(root, tokenizer, x), write(root, tokenizer, x, seed=seed)) for x in ids))
    return dict(prefill=prefill, generation=48 / min(greedy for greedy, _ in seconds), texts=texts,
                memory=torch.cuda.max_memory_allocated() - others if CUDA else None)

def report(cfg):
    """What was lost, what was gained, was the teacher worth it? -> report.md, report.json, report.png in output_dir."""
    run = resolve_demo(cfg) or sys.exit()   # stopped by a signal
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
            told, judge = retell(rows, base, own), None
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
        derive(models, {label: table.numpy() for label, table in tables.items()}, np.array(sizes), cfg.seed)
        print0(write_report(cfg.output_dir, setting, models, prompts * cfg.generate_comparisons))

# ---------------------------------------------------------------------------------------------------------------------
# Train: schedule, evaluate, save, stop, accumulate, clip, step, log.

def load_all(run, cached=None):
    """-> tokenizer, train rows (or stream), eval rows, student, teacher or None; all checked to belong together."""
    tokenizer = cached[2] if cached else load_tokenizer(run, run.student, run.teacher)
    rows, held = cached[:2] if cached else load_data(run, tokenizer)
    student = load_student(run) if run.mode != "cache" else None
    if student is not None:
        check_head(student, "student", run.student, tokenizer)
    teacher = load_teacher(run) if run.alpha < 1 and not cached else None
    if teacher is not None:
        check_head(teacher, "teacher", run.teacher, tokenizer)
        its = load_tokenizer(dataclasses.replace(run, tokenizer=None), run.teacher)
        if its is not None:
            compare_tokenizers(tokenizer, its, run.tokenizer or run.student, run.teacher)
    return tokenizer, rows, held, student, teacher

def make_phases(cfg, student, teacher, steps_per_epoch):
    """-> [Phase, ...] as planned, with a rate for each parameter and the functions that compute its loss."""
    model, part = student.model, {}
    (path, layers), inner = layers_of(model), model.get_input_embeddings().weight
    outer = {*model.get_output_embeddings().parameters(), *final_norm(model).parameters()}
    if cfg.blockwise and inner in outer and (cfg.train_lm_head or cfg.initialize_head_from_teacher):
        raise UserError(f"{type(model).__name__} ties its head whatever its config says: --train_lm_head false "
                        "--initialize_head_from_teacher false")
    for name, p in student.named_parameters():
        block = re.match(rf"(?:model\.{path}\.|stitches\.\D+)(\d+)\.", name)
        part[p] = int(block[1]) if block else "head" if p in outer - {inner} else "embeddings"
    phases = plan_phases(cfg, len(layers), steps_per_epoch)
    for x in phases:
        x.rates = {p: x.rates[k] for p, k in part.items() if k in x.rates} if x.rates else \
            learning_rates(cfg, model.named_parameters(remove_duplicate=False))   # plain distillation names no parts
        x.block_norms = [([p for p in part if part[p] == i], norm) for i, norm in x.block_norms.items()]
        x.work, x.signal_of = matching(cfg, student, teacher, x.blocks) if x.blocks else (
            functools.partial(distil, **x.objective), teacher_signal(teacher if x.objective["alpha"] < 1 else None))
    return phases

def train(cfg):
    """-> True when the run is done, False when a signal stopped it."""
    begun, run = time.time(), resolve_demo(cfg)
    if run is None:
        return False
    place = functools.partial(os.path.join, cfg.output_dir)
    found = find_checkpoints(cfg)
    state = found[0][1] if found else None
    cached = open_cache(run) if cfg.cache_dir else None
    shape = shapes_result(cfg) | {"cache": cached and digest(cached[3])}   # which one, wherever it lies
    if state:
        refuse_changes(state["config"], shape, found[0][0])
        same_length = state["length"] == [cfg.max_steps, cfg.num_epochs]
        if same_length and state["step"] >= state["steps"] and os.path.isdir(place("final")):
            print0(f"{cfg.output_dir} holds this run, finished at step {state['step']}: see {place('final')}")
            return True
    free = torch.cuda.mem_get_info()[0] if CUDA else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tokenizer, rows, held, student, teacher = load_all(run, cached)
    batch_size, micro_steps, global_batch = batch_plan = plan_batch(cfg, state, WORLD)
    steps_per_epoch = None if cfg.streaming else -(-len(rows) // global_batch)
    work = functools.partial(distil, alpha=cfg.alpha, temperature=cfg.temperature, divergence=cfg.divergence)
    signal_of, fp16 = teacher_signal(teacher), compute_dtype(cfg) == torch.float16
    phases = make_phases(cfg, student, teacher, steps_per_epoch)
    ends = list(itertools.accumulate(p.steps for p in phases))
    steps, health, step, best, before, position, tokens_seen = ends[-1], new_health(fp16), 0, math.inf, None, None, 0
    phase = end = optimizer = set_rates = now = problem = saved_at = None
    blocks_end = sum(p.steps for p in phases if p.over == "real")
    def epoch():
        return step / steps_per_epoch if steps_per_epoch else (position or {}).get("epoch", 0)
    def log(**entry):
        if RANK == 0:
            append_row(place("log.jsonl"), {k: v if math.isfinite(v) else None for k, v in entry.items()})   # no NaN
            wandb_run.log(entry, step=step)
    def begin(step):
        """The phase of the next step. -> the tensors that a checkpoint at `step` holds for it."""
        nonlocal phase, end, optimizer, set_rates
        phase, end = next((p, e) for p, e in zip(phases, ends) if step < e or e == steps)
        print0(f"{phase.name}: {phase.steps} steps")
        optimizer = None   # its moments go before the next ones come
        optimizer = make_optimizer(student.parameters(), phase.rates, phase.weight_decay)
        set_rates = make_schedule(cfg, optimizer, phase.steps)
        # where it begins, the moments that were saved are of the phase before
        return tensors_of(student, {} if step == end - phase.steps else optimizer.state, health)
    def measure_blocks():
        pairs = plan_blocks(cfg, student.model.config, teacher.model.config)
        errors = means(student, *matching(cfg, student, teacher, pairs), held, batch_size, "real")[3:]
        before["blocks"] = before.get("blocks", []) + [errors]
        before["table"] = block_table(pairs, before["blocks"], cfg.distill_loss_type)
        print0(before["table"])
        log(**{f"block/{i}/loss": x for i, x in enumerate(errors)}, **{"block/step": step})
    def save():
        return save_checkpoint(place("checkpoints"), step, tensors_of(student, optimizer.state, health), dict(
            step=step, steps=steps, epoch=epoch(), position=position, tokens=tokens_seen, best=best, before=before,
            batch=[cfg.batch_size, cfg.gradient_accumulation_steps], global_batch=global_batch,
            wandb=wandb_run.id, length=[cfg.max_steps, cfg.num_epochs], config=shape), cfg.keep_checkpoints)

    print0(describe_run(cfg, run, [r.model for r in (student, teacher) if r], phases, batch_plan, rows, held,
                        device=DEVICE.type, dtype=str(compute_dtype(cfg))[6:], world=WORLD, local_world=LOCAL_WORLD,
                        logits_bytes=LOGITS_BUDGET, free=free))
    with stop_signals() as asked, contextlib.ExitStack() as stack:
        if state:
            state = load_checkpoint(found, begin)
            saved_at = step = state["step"]
            best, before, position, tokens_seen = (state[k] for k in ("best", "before", "position", "tokens"))
        else:
            begin(step)
        RANK == 0 and prepare_output(cfg, step)
        all_sum(0)
        wandb_run = start_wandb(cfg, state and state["wandb"], RANK, print0)
        stack.push(lambda kind, *_: wandb_run.finish(exit_code=int(kind is not None)))
        if before is None:
            before = evaluate(student, work, signal_of, held, batch_size)
            if cfg.blockwise:
                measure_blocks()
        if cfg.streaming:
            batches = streamed_batches(rows, encoder(cfg, tokenizer), cfg.seed, cfg.shuffle_buffer, global_batch,
                                       position)
        else:
            batches = indexed_batches(rows, cfg.seed, global_batch, step)
        batches = prefetch(micro_batches(batches, None if cfg.streaming else rows, micro_steps, batch_size))
        stack.enter_context(contextlib.closing(batches))
        bar = stack.enter_context(tqdm(total=steps, initial=step, disable=RANK > 0, dynamic_ncols=True, mininterval=.5))
        since, since_tokens = time.time(), 0
        while step < steps:
            if step == end:
                begin(step)
            micro, position_after = next(batches)
            tokens, stopping = all_sum(sum(len(getattr(b, phase.over)) for b in micro), len(asked))   # all ranks agree
            if stopping:
                break
            position = position_after
            torch.manual_seed((cfg.seed * 1_000_003 + step) * 65_536 + RANK)   # dropout: derived, no state to keep
            rate, sums, grad_norm = set_rates(step - end + phase.steps), torch.zeros(3, device=DEVICE), torch.zeros(())
            for i, batch in enumerate(micro):
                student.set_requires_gradient_sync(i == len(micro) - 1)
                loss, ce, kl, *_ = student(phase.work, batch, phase.signal_of(batch), max(tokens, 1))
                # FSDP averages over ranks, we over tokens; a loss that is not finite takes its gradient along
                (loss * (WORLD * health["scale"] * (1 + 0 * loss.detach()))).backward()
                sums += torch.stack([loss.detach(), ce, kl])
            if tokens:
                grad_norm = optimizer_step(optimizer, phase.max_grad_norm, health, fp16, phase.block_norms)
            else:
                print0(f"step {step + 1}: not one valid target token in the whole batch; nothing changed")
            optimizer.zero_grad()
            step, tokens_seen, since_tokens = step + 1, tokens_seen + int(tokens), since_tokens + tokens
            bar.update()
            if (step % 10 == 0 or not CUDA) and health["streak"].item() >= 10:   # .item() makes a GPU wait
                save()
                raise UserError(f"loss or gradient was not finite for 10 steps in a row, up to step {step}; its "
                                "checkpoint holds the last good weights. Lower --learning_rate, or try --dtype fp32")
            if step % cfg.log_steps == 0 or step == end:
                loss, ce, kl = all_sum(*sums.tolist())
                speed, since, since_tokens = since_tokens / max(time.time() - since, 1e-9), time.time(), 0
                skipped = int(health["skipped"].item())
                log(**{"train/loss": loss, "train/ce_loss": ce, "train/kl_loss": kl, "train/learning_rate": rate,
                       "train/grad_norm": grad_norm.item(), "train/epoch": epoch(), "train/step": step,
                       "train/tokens_per_second": speed, "train/skipped_steps": skipped})
                bar.set_postfix_str(f"{phase.name} loss {loss:.4f} ce {ce:.4f} kl {kl:.4f} lr {rate:.1e} "
                                    f"{speed:,.0f} tok/s" + (f" skipped {skipped}" if skipped else ""))
            paused = time.time()
            if step == blocks_end:
                measure_blocks()
                if cfg.initialize_head_from_teacher:
                    initialize_head(student, teacher)
            if cfg.eval_steps and step % cfg.eval_steps == 0 and phase.over == "labels" or step == steps:
                now = evaluate(student, work, signal_of, held, batch_size)
                best = min(best, now["loss"])
                log(**{f"eval/{k}": v for k, v in dict(now, min_loss=best, epoch=epoch(), step=step).items()})
                print0(f"step {step}: held-out " + ", ".join(f"{k} {v:.4f}" for k, v in now.items()))
            if cfg.save_steps and step % cfg.save_steps == 0 or step == steps:
                problem, saved_at = save(), step
            since += time.time() - paused   # speed is of training alone
        if step < steps and saved_at != step:
            problem = save()
    if step < steps:
        print0(f"stopped at step {step} of {steps}" + ("" if problem else ", saved; the same command continues"))
    elif not problem:
        now = now or evaluate(student, work, signal_of, held, batch_size)
        problem = finish(cfg, run, student, teacher, tokenizer, held, before, now, begun)
    if problem:
        raise UserError(f"the run could not be saved in {cfg.output_dir!r}: {problem}; make room, then run it again")
    return step >= steps

def finish(cfg, run, student, teacher, tokenizer, held, before, after, begun):
    """final/, the closing table and a sample. -> None, or what went wrong while saving."""
    final, problem, size = os.path.join(cfg.output_dir, "final"), None, student.model.num_parameters()
    lines = [("student before", before, size), ("student after", after, size)]
    if teacher is not None:
        alone = functools.partial(distil, alpha=1.0, temperature=1.0, divergence="forward")
        its = evaluate(teacher, alone, teacher_signal(None), held, cfg.batch_size)
        lines = [("teacher", its, teacher.model.num_parameters()), *lines]
    try:
        save_model(student, tokenizer, final, compute_dtype(cfg))
    except OSError as e:
        problem = one_line(e)
    problem = from_rank0(problem)
    print0(closing_table(lines, cfg.alpha, before.get("table")))   # of the blocks
    start = torch.as_tensor(held[0]["input_ids"][:32], dtype=torch.long, device=DEVICE)[None]
    print0(f"\nsample: {tokenizer.decode(start[0])!r}\n     -> {write(student, tokenizer, start)[1]!r}")
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print0(f"\ndone in {time.time() - begun:.0f} s, at most {peak / 1e9:.2f} GB of memory: {final}")
    if teacher is not None and not problem and cfg.student == cfg.teacher == cfg.dataset == "demo":
        report(in_mode("eval", run, student=final))
    return problem

# ---------------------------------------------------------------------------------------------------------------------
# Main: one mode, one function.

def main(argv=None):
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        for library in (transformers, datasets):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        with process_group(), contextlib.nullcontext() if cfg.mode == "cache" else lock(cfg.output_dir):
            {"train": train, "cache": cache, "generate": generate, "eval": report}[cfg.mode](cfg)
        return 0
    except UserError as e:
        if LOCAL_RANK == 0:
            print(f"error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"error: rank {RANK} ran out of memory ({one_line(e)}); turn {MEMORY_ADVICE}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
