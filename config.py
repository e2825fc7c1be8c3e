"""Every knob of simple_distill in one flat dataclass: a default, one line of help, and all cross-field checks.

    cfg = parse_config(sys.argv[1:])     # defaults < demo defaults < --config FILE < command line

The rule: what needs no torch is here, what touches tensors is simple_distill.py's. Sections: knobs and their checks;
the teacher cache on disk; plans (numbers); the demo's files; mode generate; mode eval; earlier runs; the outside world.
"""
import ast
import asyncio
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sysconfig
import textwrap
import time
import types
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import numpy as np
import safetensors.numpy
import transformers
import yaml
from tqdm import tqdm
from transformers import HfArgumentParser, SchedulerType


class UserError(Exception):
    """Anything the user can mend: shown as one `error:` line without a traceback, exit code 2."""


def one_line(e, limit=160):
    return " ".join(f"{type(e).__name__}: {e}".split())[:limit]


def digest(*things):
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else str(x)   # str leaves out the middle of a long array
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=plain).encode()).hexdigest()[:16]


def knob(default, help):
    return field(default_factory=lambda: list(default), metadata={"help": help}) if isinstance(default, list) else \
        field(default=default, metadata={"help": help})


# What the embedded demo sets where the user did not: found by a few dozen runs on 2 CPU cores (see README, Results).
DEMO_VOCAB = 1024
DEMO_STUDENT = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                    initializer_range=0.05)
DEMO_TEACHER = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
                    initializer_range=0.05)
DEMO = dict(seq_len=128, batch_size=16, max_steps=500, learning_rate=4e-3, warmup_ratio=0.05,
            gradient_checkpointing=False, save_steps=250, eval_steps=125)
DEMO_TEACHER_RUN = DEMO | dict(alpha=1.0, eval_steps=0)
DEMO_BLOCKWISE = dict(epochs_per_block=[0.1], lr_per_block=[4e-3], lm_head_epochs=0.1, lm_head_lr=4e-3,
                      max_steps=200)


@dataclass
class Config:
    # run
    mode: Literal["train", "cache", "generate", "eval"] = knob("train", "what to do")
    output_dir: str = knob("out", "where everything of this run goes")
    seed: int = knob(0, "of data order, random weights and dropout")
    resume: str = knob("auto", "auto: newest checkpoint of output_dir; never: start over; or a checkpoint path")
    # models
    teacher: str = knob("demo", "hub name, local directory, or demo")
    student: str = knob("demo", "hub name, local directory, HF config .json (random weights), layers:N, or demo; "
                        "mode eval, unset: output_dir/final")
    tokenizer: Optional[str] = knob(None, "hub name or directory; unset: the student's own, else the teacher's")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = knob("auto", "compute type; auto: bf16 where native, else fp32")
    gradient_checkpointing: bool = knob(True, "recompute student activations in the backward pass to save memory")
    compile: bool = knob(False, "torch.compile student and teacher, a decoder layer at a time")
    trust_remote_code: bool = knob(False, "run model code that comes with a checkpoint")
    # data
    dataset: str = knob("demo", "hub name, .jsonl .json .csv .parquet .txt file, save_to_disk directory, or demo")
    dataset_config: Optional[str] = knob(None, "configuration name of a hub dataset")
    train_split: str = knob("train", "split to train on")
    eval_split: str = knob("validation", "held-out split; where the default is absent, a slice of train is held out")
    text_column: str = knob("text", "column of plain text (conversations are found by their own column names)")
    streaming: bool = knob(False, "read the dataset as a stream: constant memory and disk, no length")
    shuffle_buffer: int = knob(10000, "raw rows shuffled together when streaming; 0: as they come")
    max_samples: Optional[int] = knob(None, "use only the first so many raw rows of train; unset: all")
    eval_samples: int = knob(256, "held-out sequences to evaluate on")
    seq_len: int = knob(512, "tokens a sequence; longer conversations are cut, text is packed into blocks of this")
    num_proc: Optional[int] = knob(None, "processes that tokenise; unset: one")
    # objective
    alpha: float = knob(0.5, "weight of the label loss: 1 labels only, 0 teacher only")
    temperature: float = knob(1.0, "softens both distributions of the KL term, which is scaled by its square")
    divergence: Literal["forward", "reverse", "jsd"] = knob("forward", "KL(teacher||student), the reverse, or JSD")
    # optimiser
    num_epochs: float = knob(1.0, "passes over the training data (max_steps, if set, wins)")
    max_steps: Optional[int] = knob(None, "optimiser steps; unset: num_epochs decides")
    batch_size: int = knob(8, "sequences a device and micro-step")
    gradient_accumulation_steps: int = knob(1, "micro-steps an optimiser step")
    learning_rate: float = knob(1e-4, "peak learning rate of AdamW")
    warmup_ratio: float = knob(0.03, "share of the steps spent warming up")
    lr_scheduler: str = knob("cosine", "any name of transformers' get_scheduler")
    lr_scheduler_kwargs: Optional[str] = knob(None, 'JSON the scheduler wants besides, e.g. {"min_lr_rate": 0.1}')
    weight_decay: float = knob(0.01, "AdamW's, on matrices only (never on norms and biases)")
    max_grad_norm: float = knob(1.0, "clip the global gradient norm to this; 0: no clipping")
    default_lr_multiplier: float = knob(1.0, "learning-rate factor of parameters that no pattern matches; 0 freezes")
    lr_multipliers: list[str] = knob([], "regex=multiplier on parameter names, the first match wins, 0 freezes")
    # cache
    cache_dir: Optional[str] = knob(None, "teacher cache to fill (mode cache) or to train from; unset: online")
    cache_method: Literal["sample", "topk"] = knob("sample", "what is kept of the teacher's distribution")
    cache_samples: int = knob(50, "draws a token (method sample)")
    cache_top_k: int = knob(64, "largest logits a token (method topk)")
    cache_chunk: int = knob(256, "sequences a cache file")
    force_regenerate: bool = knob(False, "empty cache_dir first")
    # block-wise
    blockwise: bool = knob(False, "match hidden states block by block, then the head, then distil as usual")
    block_input: Literal["student", "teacher"] = knob("student", "what feeds block i: its own stream or the teacher's")
    distill_loss_type: Literal["mse", "cosine", "kl_div"] = knob("mse", "loss between hidden states")
    distill_loss_temperature: float = knob(1.0, "temperature of kl_div over the hidden dimension")
    use_stitching_layers: bool = knob(True, "a linear map from student width to teacher width a block")
    stitching_layer_bias: bool = knob(True, "stitching layers have a bias")
    freeze_previous_blocks: bool = knob(True, "block i trains alone (block_input student)")
    epochs_per_block: list[float] = knob([1.0], "passes over the data, one value or one a block")
    lr_per_block: list[float] = knob([1e-3], "learning rate, one value or one a block")
    wd_per_block: list[float] = knob([0.0], "weight decay, one value or one a block")
    max_grad_norm_per_block: list[float] = knob([1.0], "gradient clipping, one value or one a block; 0: none")
    train_lm_head: bool = knob(True, "train norm and head on the teacher's logits after the blocks")
    lm_head_epochs: float = knob(1.0, "passes over the data for the head")
    lm_head_lr: float = knob(1e-3, "learning rate of the head phase")
    lm_head_wd: float = knob(0.0, "weight decay of the head phase")
    lm_head_max_grad_norm: float = knob(1.0, "gradient clipping of the head phase; 0: none")
    logit_loss_type: Literal["kl_div", "mse", "ce"] = knob("kl_div", "of the teacher's logits, or ce on labels")
    logit_loss_temperature: float = knob(1.0, "temperature of the head phase")
    logit_loss_weight: float = knob(1.0, "weight of the teacher term in the head phase; the rest: ce")
    initialize_head_from_teacher: bool = knob(True, "start from the teacher's head, projected through the last stitch")
    # generate
    provider: Literal["openai", "anthropic", "local"] = knob("openai", "who answers: an API, or --teacher's model here")
    api_model: Optional[str] = knob(None, "model name at the provider")
    api_base: Optional[str] = knob(None, "URL of an OpenAI- or Anthropic-compatible server")
    num_examples: Optional[int] = knob(None, "prompts to ask; unset: 100, or all of prompts_file")
    categories: list[str] = knob([], "task categories, name or name=weight; unset: all eight alike")
    prompts_file: Optional[str] = knob(None, "your own prompts: .txt (one a line) or .jsonl (prompt or messages)")
    max_tokens: int = knob(1024, "longest reply in tokens")
    api_temperature: Optional[float] = knob(None, "sampling temperature of the replies; unset: the model's own")
    concurrency: int = knob(8, "requests in flight (provider local: prompts a batch)")
    max_cost: Optional[float] = knob(None, "USD that are never exceeded, requests in flight included; needs prices")
    price_in: Optional[float] = knob(None, "USD a million prompt tokens")
    price_out: Optional[float] = knob(None, "USD a million reply tokens")
    request_timeout: float = knob(120.0, "seconds before a request is given up and tried again")
    # eval
    compare: list[str] = knob([], "more model directories to put beside the student")
    generate_comparisons: bool = knob(True, "show continuations of held-out prompts side by side")
    # saving
    save_steps: int = knob(200, "steps between checkpoints; 0: only at the end")
    eval_steps: int = knob(200, "steps between evaluations; 0: only at the end")
    keep_checkpoints: int = knob(3, "newest checkpoints to keep")
    log_steps: int = knob(10, "steps between log lines")
    # sharding
    fsdp: Literal["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"] = knob(
        "full_shard", "how the student is spread: all of it, not its gathered weights, within a node, or not at all")
    shard_teacher: bool = knob(True, "spread the teacher too (else a whole copy a device)")
    cpu_offload: bool = knob(False, "keep weights and optimiser state in host memory between uses")
    # logging
    use_wandb: bool = knob(True, "log to Weights & Biases when it is installed and logged in")
    wandb_project: str = knob("slm-distillation", "project name there")
    wandb_entity: Optional[str] = knob(None, "team or user there")
    wandb_run_name: Optional[str] = knob(None, "run name there")

    def __post_init__(self):
        need = lambda ok, message: None if ok else refuse(message)
        for f in dataclasses.fields(self):
            value, (low, top) = getattr(self, f.name), RANGES.get(f.name, (0, INF))
            need(value != [] or default_of(f) == [], f"{f.name} is empty; give one value, or one a block")
            span = f"between {low} and {top:,}" if top < INF else "greater than 0" if low == TINY else f"at least {low}"
            for x in value if isinstance(value, list) else [value]:
                need(not isinstance(x, str) or x.strip(), f"{f.name} is empty; give a value, or leave it out")
                need(not isinstance(x, float) or math.isfinite(x), f"{f.name} is {x}; give a finite number")
                need(f.name not in RANGES or x is None or low <= x <= top, f"{f.name} is {x}; it must be {span}")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)]
        unread = [name for name in given if name not in READ_BY[self.mode]]
        need(not unread, f"mode {self.mode} does not read {', '.join(unread)}; leave that out")
        for names, used, where in conditions(self):
            idle = [name for name in given if name in names and not used]
            need(not idle, f"{', '.join(idle)}: read only with {where}; give that, or leave it out")
        known = [s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")]
        need(self.lr_scheduler in known, f"lr_scheduler {self.lr_scheduler!r} is not one of {', '.join(known)}")
        scheduler_kwargs(self), parse_multipliers(self.lr_multipliers)
        if self.mode == "train" and self.cache_dir:
            need(self.alpha < 1, f"alpha {self.alpha:g} uses no teacher, cache_dir {self.cache_dir!r} is one")
            need(not self.blockwise, f"blockwise needs hidden states, cache_dir {self.cache_dir!r} has none; drop one")
            need(not self.streaming, f"cache_dir {self.cache_dir!r} is the dataset and has a length; drop --streaming")
            need(self.divergence == "forward", f"divergence {self.divergence} needs whole distributions; a cache holds "
                 "targets of the forward KL")
        if self.mode == "cache":
            need(self.cache_dir, "mode cache writes cache_dir; name it with --cache_dir DIR")
            if self.student == "demo":   # none named: the teacher's tokenizer
                self.student = self.teacher
        if self.student.startswith("layers:"):
            need(self.mode != "eval", f"student {self.student!r} is not trained yet; name a model or a checkpoint")
            need(re.fullmatch(r"layers:0*[1-9]\d*", self.student), f"student {self.student!r}; write layers:N, N >= 1")
        if self.mode == "train" and self.cache_dir and self.teacher == "demo":
            need(not self.student.startswith("layers:"), f"student {self.student!r}: whose layers? Name the cache's "
                 "teacher with --teacher")
        if self.mode == "train" and self.student == "demo" and self.teacher != "demo":
            need(self.alpha == 1, f"teacher {self.teacher!r} has no student; name one, for example --student layers:4")
        if self.mode == "generate":
            name, local, key = self.provider, self.provider == "local", f"{self.provider.upper()}_API_KEY"
            unread = {*given} & {*(API_ONLY if local else ("teacher", "tokenizer", "dtype", "trust_remote_code"))}
            need(not unread, f"provider {name} does not read {', '.join(sorted(unread))}; leave that out")
            need("RANK" not in os.environ, "mode generate is one process; start it without torchrun or launch.sh")
            need(local or self.api_model, f"provider {name} needs --api_model NAME")
            need(local or importlib.util.find_spec(name), f"provider {name} needs its SDK: pip install {name}")
            need(local or self.api_base or os.environ.get(key), f"provider {name}: set {key} in the environment")
            need(not local or self.teacher != "demo", "provider local needs --teacher, a hub name or a directory")
            need((self.price_in, self.price_out).count(None) in (0, 2 * (self.max_cost is None)), f"max_cost is "
                 f"{self.max_cost}, price_in {self.price_in}, price_out {self.price_out}; give both prices, or none")
            need(not (self.categories and self.prompts_file), "prompts_file brings its own prompts; drop categories")
        for name in ("max_steps", "num_epochs"):
            need(getattr(self, name) != 0 or self.blockwise, f"{name} is 0: that is for --blockwise, to end after it")
        if self.blockwise:
            need(self.alpha < 1, "alpha 1 never loads a teacher, blockwise learns from one; choose alpha below 1")
            need(not self.streaming, "blockwise counts in epochs, a stream has no length; drop --streaming")
            need(self.block_input == "student" or len(self.epochs_per_block) == len(self.wd_per_block) == 1,
                 "block_input teacher trains all blocks at once; one value for epochs_per_block and wd_per_block each")


def refuse(message):
    raise UserError(message)


INF, TINY = math.inf, math.nextafter(0, 1)   # at least TINY: greater than 0
RANGES = {name: (low, high) for low, high, names in (
    (0, 1, "alpha warmup_ratio logit_loss_weight"), (0, 2, "api_temperature"), (1, 255, "cache_samples"),
    (2, INF, "seq_len"), (0, 2**28, "seed"),   # above, what a step derives from it does not fit into torch's 64 bits
    (0, INF, "weight_decay max_grad_norm default_lr_multiplier shuffle_buffer max_steps num_epochs wd_per_block "
             "max_grad_norm_per_block lm_head_wd lm_head_max_grad_norm price_in price_out save_steps eval_steps"),
    (TINY, INF, "temperature learning_rate distill_loss_temperature epochs_per_block lr_per_block lm_head_epochs "
                "lm_head_lr logit_loss_temperature max_cost request_timeout"),
    (1, INF, "batch_size gradient_accumulation_steps max_samples eval_samples num_proc cache_top_k cache_chunk "
             "num_examples max_tokens concurrency keep_checkpoints log_steps")) for name in names.split()}
API_ONLY = ("api_model", "api_base", "request_timeout", "max_cost", "price_in", "price_out")

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
GROUPS, names = {}, list(FIELDS)
starts = dict(run="mode", models="teacher", data="dataset", objective="alpha", optimiser="num_epochs",
              cache="cache_dir", blockwise="blockwise", generate="provider", eval="compare", saving="save_steps",
              sharding="fsdp", logging="use_wandb")
for group, after in zip(starts, [*list(starts)[1:], None]):   # the groups are the runs of fields between these names
    GROUPS[group] = names[names.index(starts[group]):names.index(starts[after]) if after else None]
READ_BY = {
    "train": {n for g in GROUPS if g not in ("generate", "eval", "cache") for n in GROUPS[g]} | {"cache_dir"},
    "cache": {n for g in ("models", "data", "cache", "sharding") for n in GROUPS[g]}
             - {"gradient_checkpointing", "fsdp", "shuffle_buffer"} | {"mode", "output_dir", "seed", "temperature"},
    "generate": {*GROUPS["generate"], "mode", "output_dir", "seed", "teacher", "tokenizer", "dtype",
                 "trust_remote_code"},
    "eval": {*GROUPS["eval"], *GROUPS["data"], "mode", "output_dir", "seed", "teacher", "student", "tokenizer", "dtype",
             "compile", "trust_remote_code", "temperature", "batch_size", "shard_teacher", "cpu_offload"} - {
                 "shuffle_buffer"},
}


def conditions(cfg):
    """-> [(fields that are read only beside another setting, whether they are so here, that setting), ...]"""
    beside = lambda key, value, *names: (names, getattr(cfg, key) == value, f"--{key} {str(value).lower()}")
    marks = [os.path.join(cfg.dataset, name) for name in ("state.json", "dataset_dict.json")]   # of save_to_disk
    local = cfg.dataset == "demo" or any(map(os.path.isfile, [cfg.dataset, *marks]))
    return [beside("blockwise", True, *GROUPS["blockwise"][1:]), beside("cache_method", "sample", "cache_samples"),
            beside("train_lm_head", True, *(n for n in GROUPS["blockwise"] if re.match("lm_head_|logit_loss_", n))),
            (["logit_loss_weight"], cfg.logit_loss_type != "ce", "--logit_loss_type kl_div or mse"),
            beside("logit_loss_type", "kl_div", "logit_loss_temperature"),
            beside("distill_loss_type", "kl_div", "distill_loss_temperature"),
            beside("use_stitching_layers", True, "stitching_layer_bias"), beside("cache_method", "topk", "cache_top_k"),
            beside("block_input", "student", "freeze_previous_blocks"), beside("streaming", True, "shuffle_buffer"),
            (["dataset_config"], not local or cfg.mode == "train" and cfg.cache_dir, "a --dataset of the hub"),
            (["lr_scheduler_kwargs"], not cfg.lr_scheduler.startswith("constant"), "an --lr_scheduler but constant"),
            (["warmup_ratio"], cfg.lr_scheduler != "constant" or not cfg.warmup_ratio, "--lr_scheduler linear or so")]


def default_of(f):
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()


# What may differ between the run that a checkpoint is of and the one that continues it. batch_size and accumulation
# may, as long as the sequences a step stay the same: the trainer compares those.
NO_EFFECT = {"mode", "output_dir", "resume", "num_proc", "max_steps", "num_epochs", "batch_size",
             "gradient_accumulation_steps", "gradient_checkpointing", "cache_dir",
             *GROUPS["saving"], *GROUPS["sharding"], *GROUPS["logging"]}


def shapes_result(cfg):
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NO_EFFECT}


def refuse_changes(there, here, where, way_out="start over with --resume never or another --output_dir"):
    names = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    changed = [f"{k} {there.get(k)!r} there, {here.get(k)!r} here" for k in names]
    if changed:
        raise UserError(f"{where} is of a run with {'; '.join(changed)}. Change it back, or {way_out}")


def parse_multipliers(items):
    """['regex=0.1', ...] -> [(compiled regex, 0.1), ...]"""
    rules = []
    for item in items:
        pattern, _, factor = item.rpartition("=")
        try:
            rules.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise UserError(f"lr_multipliers {item!r}: {e}; write regex=multiplier, for example 'lm_head=0.1'")
        if not pattern or not 0 <= rules[-1][1] < INF:
            raise UserError(f"lr_multipliers {item!r}: write regex=multiplier with a multiplier of 0 or more")
    return rules


def scheduler_kwargs(cfg, steps=1):
    try:
        given = {**json.loads(cfg.lr_scheduler_kwargs or "{}")}
    except (ValueError, TypeError):
        raise UserError(f"lr_scheduler_kwargs {cfg.lr_scheduler_kwargs!r} is no JSON object")
    takes = {*inspect.signature(transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION[cfg.lr_scheduler]).parameters}
    takes -= {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    either = {"min_lr", "min_lr_rate"} & takes   # all others have defaults
    if {*given} - takes or either and len(either & {*given}) != 1:
        raise UserError(f"lr_scheduler_kwargs gives {', '.join(given) or 'nothing'}; {cfg.lr_scheduler} takes "
                        f"{', '.join(sorted(takes)) or 'nothing'}{', one of min_lr and min_lr_rate' * bool(either)}")
    return ({"num_decay_steps": max(1, steps // 5)} if cfg.lr_scheduler == "warmup_stable_decay" else {}) | given


class Parser(HfArgumentParser):
    def error(self, message):   # argparse prints its whole usage; one line is enough
        raise UserError(message)


def read_config_file(path):
    """A yaml or json mapping of field names -> the same as command-line words, so that both pass the same checks."""
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f) if path.endswith(".json") else yaml.safe_load(f)
    except OSError as e:
        raise UserError(f"--config {path!r}: {e.strerror}")
    except Exception as e:
        raise UserError(f"--config {path} is no valid {'JSON' if path.endswith('.json') else 'YAML'}: {one_line(e)}")
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds a {type(values).__name__}, not a mapping of field: value")
    words = []
    for name, value in values.items():
        if name not in FIELDS:
            raise UserError(f"--config {path}: unknown key {name!r}{nearest(str(name))}")
        kind, many = type(default_of(FIELDS[name])), isinstance(value, list)
        odd = [x for x in value if x is None or isinstance(x, (bool, list, dict)) or str(x)[:1] == "-"] if many else []
        if odd or many and kind is not list or isinstance(value, bool) and kind is not bool:
            raise UserError(f"--config {path}: {name} is {value}; it takes " + (
                "numbers or texts that do not begin with -" if kind is list else "one value, a yes or no in quotes"))
        if many:
            words += [f"--{name}", *map(str, value)] if value or default_of(FIELDS[name]) else []
        elif value is not None:
            value = json.dumps(value, default=str) if isinstance(value, (bool, dict)) else value
            words.append(f"--{name}={value}")
    return words


def nearest(name):
    close = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def parse_config(argv):
    parser = Parser(Config, allow_abbrev=False, prog="simple_distill.py", description="Distils language models.")
    parser.add_argument("--config", help="yaml or json file of these fields; the command line wins over it")
    flags_in = lambda words: [w[2:].split("=")[0].replace("-", "_") for w in words if w.startswith("--")]
    names = [flag.removeprefix("no_") for flag in flags_in(argv)]
    for flag, name in zip(flags_in(argv), names):   # before argparse: it would take an unknown word for a value
        if name not in FIELDS and name not in ("config", "help"):
            raise UserError(f"unknown flag --{flag}{nearest(name)}")
        if names.count(name) > 1:
            raise UserError(f"--{name} is given more than once; keep one")
        if flag != name and (default := getattr(Config, name, None)) is not True:
            raise UserError(f"there is no --{flag}; write --{name} {'false' if default is False else 'VALUE'}")
    known, left = parser.parse_known_args(argv)
    if left:
        raise UserError(f"cannot make sense of {' '.join(left)!r}; flags start with --")
    given = (read_config_file(known.config) if known.config is not None else []) + argv
    values = parser.parse_args(given)
    if "demo" in ([values.student] if values.mode == "train" else [values.teacher, values.dataset]):
        idle = {name for names, used, _ in conditions(values) if not used for name in names}
        idle |= {"max_steps"} if "num_epochs" in flags_in(given) else set()   # which would win
        defaults = DEMO | (DEMO_BLOCKWISE if values.blockwise else {})
        parser.set_defaults(**{k: v for k, v in defaults.items() if k in READ_BY[values.mode] - idle})
        values = parser.parse_args(given)   # a second time: now with those defaults
    cfg = Config(**{k: v for k, v in vars(values).items() if k != "config"})
    if cfg.mode == "train" and cfg.streaming and cfg.max_steps is None:   # not in Config: mode eval makes one of what a
        raise UserError("a stream has no length: give --max_steps")       # checkpoint says, and that leaves it out
    return cfg


def in_mode(mode, cfg, **changes):
    """The same of all that this mode reads, with changes; the rest is default."""
    return Config(**{k: v for k, v in vars(cfg).items() if k in READ_BY[mode]} | changes | dict(mode=mode))


def save_config(cfg, path):
    aside = f"{path}.{os.getpid()}.tmp"   # workers of a cache may write at the same moment
    with open(aside, "w", encoding="utf-8") as f:
        json.dump(cfg if isinstance(cfg, dict) else dataclasses.asdict(cfg), f, indent=2)
    os.replace(aside, path)


def append_row(path, row):
    with open(path, "a", encoding="utf-8", errors="replace") as f:   # half a surrogate pair cannot be written
        f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path):
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


# ----- the teacher cache on disk: its manifest, rows packed into bits, and what may be wrong with either

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


def begin_cache(cfg, run, tokenizer, rows, dtype, rank):
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
        save_config(dataclasses.replace(cfg, force_regenerate=False), place("config.json"))
        save_config(here, place("manifest.json"))   # last: from here on there is a cache
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
    save_config(m, os.path.join(cfg.cache_dir, "manifest.json"))
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


def explain_no_config(name, role, e):
    where = "as a file" if name.endswith(".json") else "in that directory" if os.path.isdir(name) else \
        "as a local directory (there is none) or on the hub (no network, no access, or HF_HUB_OFFLINE is set)"
    raise UserError(f"{role} {name!r}: no model config could be read {where}: {one_line(e)}")


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


# ----- plans: numbers that follow from the config, the models' shapes and the number of ranks

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


def plan_blocks(cfg, student, teacher):
    """Two model configs -> {block of the student: block of the teacher}, refused where they cannot be matched."""
    ours, theirs = student.get_text_config(), teacher.get_text_config()
    depth, its_depth = ours.num_hidden_layers, theirs.num_hidden_layers
    if depth > its_depth:
        raise UserError(f"blockwise: the student has {depth} layers, the teacher only {its_depth}; take a shallower "
                        "student")
    if ours.hidden_size != theirs.hidden_size and not cfg.use_stitching_layers:
        raise UserError(f"blockwise: student width {ours.hidden_size} and teacher width {theirs.hidden_size} differ, "
                        "that needs use_stitching_layers")
    for name in ("epochs_per_block", "lr_per_block", "wd_per_block", "max_grad_norm_per_block"):
        if (n := len(getattr(cfg, name))) not in (1, depth):
            raise UserError(f"{name} has {n} values; give one, or one for each of the student's {depth} blocks")
    return {i: round((i + 1) * its_depth / depth) - 1 for i in range(depth)}


def plan_stitches(cfg, student, teacher, head_has_bias):
    """-> {name: (width in, width out, bias)}: up<i> from block i to the teacher's width, down<i> the other way."""
    pairs, a, b = plan_blocks(cfg, student, teacher), *(c.get_text_config().hidden_size for c in (student, teacher))
    # what is folded into the head must fit there: the last stitch of a student whose head has no bias has none
    folded = a != b and cfg.initialize_head_from_teacher and not head_has_bias
    up = {f"up{i}": (a, b, cfg.stitching_layer_bias and not (folded and i + 1 == len(pairs))) for i in pairs}
    down = {f"down{i}": (b, a, cfg.stitching_layer_bias) for i in pairs if cfg.block_input == "teacher"}
    return up | down if cfg.use_stitching_layers else {}


@dataclass
class Phase:
    """A stretch of training with its own loss, parameters and schedule: plain distillation is the last of them. The
    trainer turns rates and block_norms, which name parts of the student (a block's number, embeddings or head), into
    those of its parameters, and adds work and signal_of."""
    name: str
    steps: int
    blocks: list          # what is matched: hidden states after these blocks of the student; none: logits
    objective: dict       # of the loss on logits
    rates: dict           # {part or parameter: peak learning rate}; what is not named is frozen
    weight_decay: float
    max_grad_norm: float  # 0: no clipping
    block_norms: dict = field(default_factory=dict)   # {block: max_grad_norm}, where each is clipped by itself
    work: Any = None      # (model, batch, signal, denominator) -> loss, ce, kl; runs inside the student
    signal_of: Any = None   # batch -> what work takes from the teacher

    @property
    def over(self):
        """What of a batch the loss is a mean over: all real tokens, or targets."""
        return "real" if self.blocks else "labels"


def plan_phases(cfg, depth, steps_per_epoch):
    """-> [Phase, ...]: with block-wise one a block (block_input teacher: one for all), then norm and head; the last is
    plain distillation."""
    steps, phases = lambda epochs: max(1, math.ceil(epochs * steps_per_epoch)), []
    if cfg.blockwise:
        per_block = (cfg.epochs_per_block, cfg.lr_per_block, cfg.wd_per_block, cfg.max_grad_norm_per_block)
        epochs, rates, decays, norms = (v * (depth // len(v)) for v in per_block)
        before = lambda i: [] if i and cfg.freeze_previous_blocks else ["embeddings", *range(i)]
        if cfg.block_input == "teacher":
            phases = [Phase("blocks", steps(epochs[0]), list(range(depth)), {}, dict(enumerate(rates)), decays[0], 0,
                            {i: n for i, n in enumerate(norms) if n})]
        else:
            phases = [Phase(f"block {i}", steps(epochs[i]), [i], {}, dict.fromkeys([*before(i), i], rates[i]),
                            decays[i], norms[i]) for i in range(depth)]
    if cfg.blockwise and cfg.train_lm_head:
        objective = dict(alpha=1.0 if cfg.logit_loss_type == "ce" else 1 - cfg.logit_loss_weight,
                         temperature=cfg.logit_loss_temperature,
                         divergence=cfg.logit_loss_type.replace("kl_div", "forward"))
        phases.append(Phase("head", steps(cfg.lm_head_epochs), [], objective, {"head": cfg.lm_head_lr}, cfg.lm_head_wd,
                            cfg.lm_head_max_grad_norm))
    length = math.ceil(cfg.num_epochs * steps_per_epoch) if cfg.max_steps is None else cfg.max_steps
    if length:   # after blocks it may be 0
        objective = dict(alpha=cfg.alpha, temperature=cfg.temperature, divergence=cfg.divergence)
        phases.append(Phase("distil", length, [], objective, {}, cfg.weight_decay, cfg.max_grad_norm))
    return phases


def block_table(pairs, errors, kind):
    """errors: of every block, once before and perhaps once after."""
    lines = [f"\n{'block':<8}{'teacher block':<15}{f'held-out {kind}':>18}" + f"{'after':>14}" * (len(errors) - 1)]
    return "\n".join(lines + [f"{i:<8}{j:<15}{values[0]:>18.4g}" + "".join(f"{v:>14.4g}" for v in values[1:])
                              for (i, j), *values in zip(pairs.items(), *errors)])


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


MEMORY_ADVICE = ("in this order: --gradient_checkpointing true, a smaller --batch_size with more "
                 "--gradient_accumulation_steps, a smaller --seq_len, --fsdp full_shard on more devices, --cpu_offload")


def describe_run(cfg, run, models, phases, batch, rows, held, *, device, dtype, world, local_world, logits_bytes, free):
    """What a run says before it begins. models: the student, and the teacher if there is one; free: bytes."""
    sizes, (batch_size, micro_steps, global_batch) = [m.num_parameters() for m in models], batch
    itemsize = 4 if dtype == "float32" else 2
    whose = "no teacher (alpha 1)" if cfg.alpha == 1 else f"teacher {run.teacher}: {sizes[1]:,}" if sizes[1:] else \
        f"teacher: cache {cfg.cache_dir}"
    shapes = [m.config.get_text_config() for m in models]
    shape, student, teacher = shapes[0], sizes[0], sum(sizes[1:])
    trained = max(sum(p.numel() for p, rate in x.rates.items() if rate) for x in phases)
    share = {"no_shard": 1, "hybrid_shard": local_world}.get(cfg.fsdp, world)
    tokens, depth, width = batch_size * cfg.seq_len, shape.num_hidden_layers, shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * width
    layer, whole = tokens * (10 * width + 3 * inner) * itemsize, student * itemsize   # one layer's activations
    heads, whole_copy = sum(x.vocab_size * x.hidden_size for x in shapes), cfg.fsdp in ("no_shard", "shard_grad_op")
    parts = {"weights": 4 * student / share, "gradients": 4 * trained / share, "optimiser": 8 * trained / share,
             "gathered": whole if whole_copy else min(whole, heads * itemsize + 2 * whole // depth),
             "activations": tokens * width * itemsize * depth + layer if cfg.gradient_checkpointing else layer * depth,
             "teacher": teacher * itemsize / (world if cfg.shard_teacher else 1),
             "loss": min(2 * logits_bytes, 16 * tokens * shape.vocab_size) + 4 * heads}
    listed_steps = f" ({', '.join(f'{x.name}: {x.steps}' for x in phases)})" * (len(phases) > 1)
    need, listed = sum(parts.values()), ", ".join(f"{k} {v / 1e9:.2f}" for k, v in parts.items())
    return (f"student {run.student}: {student:,} parameters; {whose}\n"
            f"{world} x {device}, {dtype}; {global_batch} sequences a step ({batch_size} x {micro_steps} x {world}) of "
            f"{'a stream' if cfg.streaming else f'{len(rows):,}'}, {sum(x.steps for x in phases)} steps"
            f"{listed_steps}; {len(held)} held out; all goes to {cfg.output_dir}\n"
            f"memory a device, estimated: {need / 1e9:.2f} GB ({listed}), {free / 1e9:.1f} free"
            + (f"; if it runs out, turn {MEMORY_ADVICE}" if need > free else ""))


def closing_table(lines, alpha, more):
    """lines: [(name, what evaluate says, number of parameters), ...]; more: another table below, or nothing."""
    kl = lambda x: "-" if alpha == 1 else f"{x['kl_loss']:.4f}"
    return "\n".join([f"\n{'held out':<15}{'perplexity':>12}{'KL to teacher':>15}{'parameters':>15}"] + [
        f"{name:<15}{x['perplexity']:>12.2f}{kl(x):>15}{size:>15,}" for name, x, size in lines] + [more] * bool(more))


# ----- the demo: text, tokenizer and model shapes from what every machine has, as ordinary files

def stdlib_sources():
    """(name, text) of every module of Python's own library, tests left out."""
    root = sysconfig.get_paths()["stdlib"]
    skip = set("test tests idlelib idle_test lib2to3 site-packages dist-packages turtledemo pydoc_data".split())
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(set(inside) - skip)
        for file in sorted(f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")):
            with open(os.path.join(folder, file), encoding="utf-8", errors="ignore") as f:
                yield os.path.relpath(os.path.join(folder, file), root), f.read()


def plan_demo(cfg):
    """-> cfg with the files that each `demo` stands for, and the run that has to make its teacher first, or None."""
    path, training = functools.partial(os.path.join, cfg.output_dir, "demo"), cfg.mode == "train"
    online = cfg.alpha < 1 and not cfg.cache_dir
    places, teacher_run = {}, None
    if cfg.dataset == "demo" and not (training and cfg.cache_dir):   # there the cache is the dataset
        places["dataset"] = path("corpus")
    if cfg.student == "demo":
        places |= {"student": path("student", "config.json"), "tokenizer": cfg.tokenizer or path("tokenizer")}
    if cfg.teacher == "demo" and (not training or online or cfg.student.startswith("layers:")):
        places["teacher"] = path("teacher", "final")
        if not os.path.exists(places["teacher"]):
            teacher_run = Config(dataset=path("corpus"), student=path("teacher-shape", "config.json"), use_wandb=False,
                                 tokenizer=path("tokenizer"), output_dir=path("teacher"), dtype=cfg.dtype,
                                 log_steps=cfg.log_steps, **DEMO_TEACHER_RUN)
    return dataclasses.replace(cfg, **places) if places else cfg, teacher_run


def make_demo(output_dir):
    """Write corpus, tokenizer and model shapes, once; every twentieth module is held out whole."""
    from tokenizers import ByteLevelBPETokenizer
    path = functools.partial(os.path.join, output_dir, "demo")
    if os.path.exists(path("student", "config.json")):   # what is written last
        return
    os.makedirs(path("corpus"), exist_ok=True)
    parts = {"train": [], "validation": []}
    for name, text in sorted(stdlib_sources(), key=lambda source: digest(source[0])):   # no package stands first
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


# ----- mode generate: what is asked, and which replies are worth training on. Made to be edited.

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


def judge(job, said, finish_reason, usage):
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
    return {row["prompt_id"]: row for row in sorted(read_rows(rejected) + read_rows(train), key=weight)}


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
    save_config({"spent_usd": spent, "tokens_this_time": tokens, "ended": str(ended), **fates}, summary)
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
            if run.stop or job.tries > 5 or not run.hold(job):   # after an Exception the SDK would try again
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


async def ask_all(run, teacher, batches, settle):
    """In prompt order, run.pace batches in flight, until all is answered or run.stop says why not."""
    flying = {}
    async with teacher as ask:
        while flying or batches and not run.stop:
            if batches and not run.stop and len(flying) < int(run.pace) and all(map(run.hold, batches[0])):
                jobs = batches.popleft()
                flying[asyncio.create_task(ask(jobs), name=jobs[0].prompt_id)] = jobs
            elif flying:   # even when stopped: what is in flight is paid for; and it may cost less than is held for it
                for task in (await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))[0]:
                    for job, answer in zip(flying.pop(task), task.result()):
                        settle(job, *answer)
            else:
                run.stop.append("max_cost is reached")


# ----- mode eval: the words of the report, rows under another tokenizer

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


def retell(rows, base, other):
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


def derive(models, tables, sizes, seed):
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
    save_config(dict(setting=setting, models=models, prompts=prompts), os.path.join(folder, "report.json"))
    with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    return start


# ----- what an earlier run left behind, or another one is at work on

def take_lock(folder):
    """-> what is wrong with the folder or None, and what gives it back: a folder that was made for nothing goes."""
    made, problem, handle = not os.path.isdir(folder), None, None
    try:
        os.makedirs(folder, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def sync(*paths):
    """Files or folders to the disk itself."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def checkpoints_in(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step-????????")), reverse=True)


def prepare_output(cfg, step):
    """output_dir as of `step`: no log lines of steps about to be repeated, nothing left of a run that starts over."""
    place = functools.partial(os.path.join, cfg.output_dir)
    if cfg.resume == "never":
        for old in ("checkpoints", "final"):
            shutil.rmtree(place(old), ignore_errors=True)
    os.makedirs(place("checkpoints"), exist_ok=True)
    save_config(cfg, place("config.json"))
    cut_log(place("log.jsonl"), step)


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


def cut_log(path, step):
    """No lines of steps that are about to be repeated."""
    kept = [row for row in read_rows(path) if next(v for k, v in row.items() if k.endswith("/step")) <= step > 0]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(f.name, path)


# ----- the world outside: signals, Weights & Biases

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


def logged_in(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except (TypeError, AttributeError):   # a version that has no prompt to leave out, and still has this
        return wandb.api.api_key


def start_wandb(cfg, run_id, rank, say):
    """-> a run to log to, or one that swallows everything: nothing ever waits at a prompt."""
    silent = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda exit_code: None, id=run_id)
    mode, run = os.environ.get("WANDB_MODE", "online"), None
    try:
        if rank == 0 and cfg.use_wandb and mode != "disabled":
            import wandb
            if mode == "online" and not logged_in(wandb):
                raise UserError("not logged in; run `wandb login`, or pass --no_use_wandb to silence this")
            run = wandb.init(project=cfg.wandb_project, entity=cfg.wandb_entity, name=cfg.wandb_run_name, id=run_id,
                             resume="allow", config=dataclasses.asdict(cfg), dir=cfg.output_dir,
                             settings=wandb.Settings(console="off", silent=True))
    except Exception as e:
        say(f"wandb: going on without it ({e if isinstance(e, UserError) else one_line(e)})")
    return run or silent
