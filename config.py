"""Every knob of simple_distill: its default, its help and all else that is known about it.

    cfg = parse_config(sys.argv[1:])   # default < the demo's value < --config FILE < command line

The knobs are one flat dataclass, `Config`; a knob is one row of it, and the rows stand in
sections. Below it come the checks across knobs, then the parsing: a file is turned into words of
a command line, so there is one way from text to values.
Neither torch nor a model is imported here, so that `--help` and a typo answer at once.
"""
import argparse
import copy
import dataclasses
import difflib
import importlib.util   # optional: generate served
import json
import math
import operator
import os
import re
import sys
import types
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml
from transformers.hf_argparser import HfArgumentParser


class UserError(Exception):
    """Anything the user can mend: shown as one `error:` line without a traceback, exit code 2."""

    def __str__(self):   # it names what strangers wrote: control characters as their escapes
        text = re.sub(r"://\S*@", "://***@", super().__str__())   # user and password of a URL
        if len(text) > 2000:   # a value of thousands of characters
            text = f"{text[:1000]} ... {text[-600:]}"
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(e, limit=160):
    return " ".join(f"{type(e).__name__}: {e}".split())[:limit]


class Section(NamedTuple):
    section: str
    purpose: str           # one line of --help
    read_by: str           # what holds for a row that says nothing else, from here on
    needs: Any
    changes_result: bool


SECTIONS = []


def section(name, purpose, read_by, needs=None, changes_result=True):
    """The rows that follow are of this section."""
    SECTIONS.append(Section(name, purpose, read_by, needs, changes_result))


def knob(default, help, *, at_least=None, above=None, at_most=None, demo=None, **of_section):
    """One row.

    at_least, above, at_most   the range of the value, or of each value of a list
    demo                       its value in the demo
    and what differs from its section:
    read_by                    the modes that read it
    needs                      (knob, value, ...): it is read only beside one of these values;
                               or a function of the settings -> what is missing, in words
    changes_result             may it differ where a run goes on from a checkpoint? False: yes
    """
    facts = SECTIONS[-1]._replace(**of_section)._asdict()
    facts |= dict(help=help, at_least=at_least, above=above, at_most=at_most, demo=demo)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


# ----- what some knobs need beside them, where that is more than the value of another knob

def no_cache(cfg):   # optional: cache
    if cfg.mode == "train" and cfg.cache_dir and cfg.alpha < 1:
        return "no --cache_dir, which has rows and targets of its own"


def a_teacher(cfg):
    if cfg.mode == "train" and cfg.alpha == 1:
        return "--alpha below 1"


def whole_teacher(cfg):   # optional: blockwise on_policy served
    """Not what a cache holds of it."""
    if no_cache(cfg):   # optional: cache
        return no_cache(cfg)
    return a_teacher(cfg)


def teacher_with_states(cfg):   # optional: blockwise
    if cfg.teacher_url:   # optional: served
        return "no --teacher_url: a server gives no hidden states"
    return whole_teacher(cfg)


def drawn_entries(cfg):   # optional: cache
    if cfg.teacher_url:   # optional: served
        return "no --teacher_url: a server gives its likeliest tokens"
    if cfg.cache_method != "sample":
        return "--cache_method sample"


def likeliest_entries(cfg):   # optional: cache
    if cfg.teacher_url:   # optional: served
        return None
    if cfg.mode != "cache" or cfg.cache_method != "topk":
        return "--mode cache --cache_method topk, or --teacher_url"


def local_teacher(cfg):   # optional: generate
    if cfg.mode == "generate" and cfg.provider != "local":
        return "--provider local"


def hub_dataset(cfg):
    if cfg.dataset == "demo" or os.path.isfile(cfg.dataset):
        return "a --dataset of the hub"
    return no_cache(cfg)   # optional: cache


def scheduler_that_warms_up(cfg):
    if cfg.lr_scheduler == "constant" and cfg.warmup_ratio != 0:   # 0 is what it does anyway
        return "--lr_scheduler linear or so"


def scheduler_with_a_shape(cfg):
    if cfg.lr_scheduler.startswith("constant"):
        return "an --lr_scheduler but constant"


def student_that_may_write(cfg):   # optional: on_policy
    if cfg.packing == "documents":
        return "--packing rows, where each document is a prompt of its own"
    return whole_teacher(cfg)


def student_that_writes(cfg):   # optional: on_policy
    if cfg.mode == "train" and cfg.on_policy == 0:
        return "--on_policy above 0"


# ----- the knobs

@dataclass
class Config:
    given: frozenset = frozenset()   # names on the command line or in the file; no knob

    section("run", "what to do, and where it goes", "train cache generate eval")
    mode: Literal[
        "train",
        "cache",      # optional: cache
        "generate",   # optional: generate
        "eval",       # optional: eval
    ] = knob("train", "what to do", changes_result=False)
    output_dir: str = knob("out", "where everything of this run goes", changes_result=False)
    # above 2**28, what a step derives from the seed does not fit into torch's 64 bits
    seed: int = knob(0, "of data order, random weights, dropout", at_least=0, at_most=2**28)
    resume: str = knob(
        "auto", "auto: newest checkpoint of output_dir; never: start over; or a checkpoint path",
        read_by="train", changes_result=False)
    dry_run: bool = knob(
        False, "everything up to the first step; time one, print plan, memory, hours, an example",
        read_by="train", changes_result=False)
    debug: bool = knob(
        False, "show the whole traceback of what could not be read, not in output_dir/error.log",
        changes_result=False)

    section("models", "teacher and student, and how they are held", "train cache generate eval")
    teacher: str = knob(
        "demo", "hub name, local directory, or demo",
        needs=local_teacher,   # optional: generate
    )
    student: str = knob(
        "demo", "hub name, local directory, HF config .json (random weights), layers:N, or demo; "
        "mode eval, unset: output_dir/final", read_by="train cache eval")
    tokenizer: str | None = knob(
        None, "hub name or directory; unset: the student's own, else the teacher's",
        needs=local_teacher,   # optional: generate
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto", "compute type; auto: bf16 where native, else fp32",
        needs=local_teacher,   # optional: generate
    )
    gradient_checkpointing: bool = knob(
        True, "recompute student activations in the backward pass to save memory",
        read_by="train", changes_result=False, demo=False)
    compile: bool = knob(
        False, "torch.compile student and teacher, a decoder layer at a time",
        read_by="train cache eval")
    attention: str | None = knob(
        None, "attn_implementation of transformers for both models; unset: its own choice",
        needs=local_teacher,   # optional: generate
    )
    trust_remote_code: bool = knob(
        False, "run model code that comes with a checkpoint",
        needs=local_teacher,   # optional: generate
    )

    section(
        "data", "what is trained and evaluated on", "train cache eval",
        needs=no_cache,   # optional: cache
    )
    dataset: str = knob(
        "demo", "hub name, .jsonl .json .csv .parquet .txt file, save_to_disk directory, or demo")
    dataset_config: str | None = knob(None, "configuration of a hub dataset", needs=hub_dataset)
    train_split: str = knob("train", "split to train on")
    eval_split: str = knob("validation", "held-out split; unset and absent: a slice of train")
    text_column: str = knob("text", "column of plain text (conversations have their own)")
    max_samples: int | None = knob(None, "use the first so many raw rows; unset: all", at_least=1)
    eval_samples: int = knob(
        256, "sequences to evaluate on, the first of eval_split", at_least=1, needs=())
    seq_len: int = knob(
        512, "tokens a sequence; longer conversations are cut, text is packed into blocks of this",
        at_least=2, needs=(), demo=128)
    packing: Literal["auto", "rows", "blocks", "documents"] = knob(
        "auto", "what shares a row: one document; blocks cut from joined text; or whole documents "
        "that do not see each other. auto: blocks of text, conversations one a row", needs=())
    num_proc: int | None = knob(
        None, "processes that tokenise; unset: one", at_least=1, changes_result=False)

    section("objective", "what the student learns from", "train")
    alpha: float = knob(
        0.5, "weight of the label loss: 1 labels only, 0 teacher only", at_least=0, at_most=1)
    temperature: float = knob(
        1.0, "softens both distributions of the KL term, which is scaled by its square",
        above=0, read_by="train cache eval")
    divergence: Literal["forward", "reverse", "jsd"] = knob(
        "forward", "KL(teacher||student), the reverse, or JSD",
        needs=no_cache,   # optional: cache
        read_by="train eval",   # optional: on_policy
    )

    # these may differ on resume as long as the sequences a step do not: the trainer compares those
    section("steps", "how long, and how much at a time", "train", changes_result=False)
    num_epochs: float = knob(1.0, "passes over the data (max_steps, if set, wins)", at_least=0)
    max_steps: int | None = knob(
        None, "optimiser steps; unset: num_epochs decides",
        at_least=0, demo=500)
    batch_size: int = knob(
        8, "sequences a device and micro-step", at_least=1, read_by="train eval", demo=16)
    gradient_accumulation_steps: int = knob(1, "micro-steps an optimiser step", at_least=1)

    section("optimiser", "AdamW, its rates and what they are in time", "train")
    learning_rate: float = knob(
        1e-4, "peak; cut (layers:N) or random weights want 3e-4 or more", above=0, demo=4e-3)
    warmup_ratio: float = knob(
        0.03, "share of the steps spent warming up",
        at_least=0, at_most=1, needs=scheduler_that_warms_up, demo=0.05)
    lr_scheduler: Literal[   # written down: to ask transformers for the names imports torch
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = knob("cosine", "the schedule, of transformers' get_scheduler")
    lr_scheduler_kwargs: str | None = knob(
        None, 'JSON the scheduler wants besides, e.g. {"min_lr_rate": 0.1}',
        needs=scheduler_with_a_shape)
    weight_decay: float = knob(0.01, "on matrices only (never on norms and biases)", at_least=0)
    max_grad_norm: float = knob(1.0, "clip the global gradient norm; 0: no clipping", at_least=0)
    default_lr_multiplier: float = knob(
        1.0, "learning-rate factor of parameters that no pattern matches; 0 freezes", at_least=0)
    lr_multipliers: list[str] = knob(
        [], "regex=multiplier on parameter names, the first match wins, 0 freezes")

    section("saving", "how often something is written", "train", changes_result=False)
    save_steps: int = knob(200, "between checkpoints; 0: only at the end", at_least=0, demo=250)
    eval_steps: int = knob(200, "between evaluations; 0: only at the end", at_least=0, demo=125)
    keep_checkpoints: int = knob(3, "newest checkpoints to keep", at_least=1)
    log_steps: int = knob(10, "steps between log lines", at_least=1)

    section("sharding", "models over devices", "train cache eval", changes_result=False)
    fsdp: Literal["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"] = knob(
        "full_shard", "how the student is spread: all of it, not its gathered weights, "
        "within a node, or not at all. full_shard and hybrid_shard reduce gradients after every "
        "micro-step, the others once a step: less traffic, 4 bytes a parameter more",
        read_by="train")
    shard_teacher: bool = knob(True, "spread the teacher too (else a whole copy a device)")
    cpu_offload: bool = knob(
        False, "keep weights and optimiser state in host memory between uses",
        read_by="train cache generate eval",
        needs=local_teacher,   # optional: generate
    )

    section("logging", "Weights & Biases, beside log.jsonl", "train", changes_result=False)
    use_wandb: bool = knob(True, "log to Weights & Biases when it is installed and logged in")
    wandb_project: str = knob("slm-distillation", "project name there")
    wandb_entity: str | None = knob(None, "team or user there")
    wandb_run_name: str | None = knob(None, "run name there")

    # ----- optional: streaming
    section("streaming", "data that is read as it comes", "train cache eval")
    streaming: bool = knob(
        False, "read a stream: constant memory and disk, no length",
        needs=no_cache,   # optional: cache
    )
    shuffle_buffer: int = knob(
        10000, "raw rows shuffled together when streaming; 0: as they come",
        at_least=0, read_by="train", needs=("streaming", True))

    # ----- optional: cache
    section("cache", "the teacher's targets, computed once and kept on disk", "cache")
    cache_dir: str | None = knob(
        None, "teacher cache to fill (mode cache) or to train from; unset: online",
        read_by="train cache", needs=a_teacher, changes_result=False)
    cache_method: Literal["sample", "topk"] = knob("sample", "what is kept of a distribution")
    cache_samples: int = knob(
        50, "draws a token", at_least=1, at_most=255, needs=drawn_entries)
    cache_top_k: int = knob(
        64, "likeliest tokens that are kept", at_least=1, needs=likeliest_entries,
        read_by="train cache",   # optional: served
    )
    cache_chunk: int = knob(256, "sequences a cache file", at_least=1)
    force_regenerate: bool = knob(False, "empty cache_dir first")

    # ----- optional: served
    section("served", "a teacher behind a vLLM or SGLang server", "train cache")
    teacher_url: str | None = knob(
        None, "http://HOST:8000/v1 of the server whose model is the teacher: its only one, or the "
        "one whose id or root is --teacher, which else only names a tokenizer and what layers:N "
        "cuts. cache_top_k: how many tokens it lists. Its key, if any, is OPENAI_API_KEY",
        needs=whole_teacher, changes_result=False)

    # ----- optional: blockwise
    section("blockwise", "hidden states first, by blocks", "train", needs=("blockwise", True))
    blockwise: bool = knob(
        False, "match hidden states block by block, then the head, then distil as usual",
        needs=teacher_with_states)
    block_input: Literal["student", "teacher"] = knob(
        "student", "what feeds block i: its own stream or the teacher's")
    distill_loss_type: Literal["relative", "mse", "cosine", "kl_div"] = knob(
        "relative", "between hidden states s, t of a token; relative: |s - t|^2 / |t|^2, so that "
        "few huge states (sinks) do not outweigh the rest")
    distill_loss_temperature: float = knob(
        1.0, "of kl_div over the hidden dimension", above=0, needs=("distill_loss_type", "kl_div"))
    use_stitching_layers: bool = knob(True, "a linear map from student to teacher width a block")
    stitching_layer_bias: bool = knob(
        True, "stitching layers have a bias", needs=("use_stitching_layers", True))
    freeze_previous_blocks: bool = knob(
        True, "block i trains alone", needs=("block_input", "student"))
    epochs_per_block: list[float] = knob(
        [1.0], "passes over the data, one value or one a block", above=0, demo=[0.1])
    lr_per_block: list[float] = knob(
        [1e-3], "learning rate, one value or one a block", above=0, demo=[4e-3])
    wd_per_block: list[float] = knob([0.0], "weight decay, one value or one a block", at_least=0)
    max_grad_norm_per_block: list[float] = knob(
        [0.05], "gradient clipping, one value or one a block; 0: none. The default shortens nearly "
        "every gradient: late steps, with their small errors, count as early ones", at_least=0)
    initialize_head_from_teacher: bool = knob(
        True, "start from the teacher's head, projected through the last stitch")
    train_lm_head: bool = knob(True, "train norm and head on the teacher's logits after the blocks")

    section("head", "the phase after the blocks", "train", needs=("train_lm_head", True))
    lm_head_epochs: float = knob(1.0, "passes over the data", above=0, demo=0.1)
    lm_head_lr: float = knob(1e-3, "learning rate of the head phase", above=0, demo=4e-3)
    lm_head_wd: float = knob(0.0, "weight decay of the head phase", at_least=0)
    lm_head_max_grad_norm: float = knob(1.0, "gradient clipping; 0: none", at_least=0)
    logit_loss_type: Literal["kl_div", "mse", "ce"] = knob(
        "kl_div", "of the teacher's logits, or ce on labels")
    logit_loss_temperature: float = knob(
        1.0, "temperature of the head phase", above=0, needs=("logit_loss_type", "kl_div"))
    logit_loss_weight: float = knob(
        1.0, "weight of the teacher term in the head phase; the rest: ce",
        at_least=0, at_most=1, needs=("logit_loss_type", "kl_div", "mse"))

    # ----- optional: on_policy
    section("on_policy", "texts that the student writes and the teacher corrects", "train eval",
            needs=student_that_writes)
    on_policy: float = knob(
        0.0, "share of the optimiser steps whose texts the student writes", at_least=0, at_most=1,
        read_by="train", needs=student_that_may_write)
    max_new_tokens: int = knob(
        256, "longest text that it writes; prompt and text are at most seq_len", at_least=1)
    on_policy_temperature: float = knob(1.0, "at which it writes", above=0)
    on_policy_prompt: int | None = knob(
        None, "tokens of plain text that it goes on from; unset: a quarter of seq_len. In a "
        "conversation all before the last turn of the assistant", at_least=1)

    # ----- optional: generate
    section("generate", "a dataset that a teacher writes", "generate")
    provider: Literal["openai", "anthropic", "local"] = knob(
        "openai", "who answers: an API, or --teacher's model here")
    num_examples: int | None = knob(
        None, "prompts to ask; unset: 100, or all of prompts_file", at_least=1,
        changes_result=False)
    categories: list[str] = knob([], "task categories, name or name=weight; unset: all eight alike")
    prompts_file: str | None = knob(
        None, "your own prompts: .txt (one a line), .json or .jsonl (prompt or messages)",
        changes_result=False)   # they stand in the rows, and a file may grow
    max_tokens: int = knob(1024, "longest reply in tokens", at_least=1)
    api_temperature: float | None = knob(
        None, "sampling temperature of the replies; unset: the model's own", at_least=0, at_most=2)
    concurrency: int = knob(
        8, "requests in flight (provider local: prompts a batch)", at_least=1,
        changes_result=False)   # local draws hang on the batch, but memory may ask for another

    section("api", "who is asked, and for how much", "generate",
            needs=("provider", "openai", "anthropic"), changes_result=False)
    api_model: str | None = knob(None, "model name at the provider", changes_result=True)
    api_base: str | None = knob(None, "URL of an OpenAI- or Anthropic-compatible server")
    max_cost: float | None = knob(
        None, "USD that are never exceeded, requests in flight included; needs prices", above=0)
    price_in: float | None = knob(None, "USD a million prompt tokens", at_least=0)
    price_out: float | None = knob(None, "USD a million reply tokens", at_least=0)
    request_timeout: float = knob(120.0, "seconds before a request is given up, retried", above=0)

    # ----- optional: eval
    section("eval", "a report on the student beside other models", "eval")
    compare: list[str] = knob([], "more model directories to put beside the student")
    generate_comparisons: bool = knob(True, "show continuations of held-out prompts side by side")

    # ----- what holds for every Config, parsed or made in code
    def __post_init__(self):
        for name in FIELDS:
            check_value(name, getattr(self, name))
        if self.mode == "cache" and self.student == "demo":   # optional: cache
            self.student = self.teacher   # none named: the teacher's tokenizer
        check_training(self)
        check_cache(self)       # optional: cache
        check_served(self)      # optional: served
        check_blockwise(self)   # optional: blockwise
        check_on_policy(self)   # optional: on_policy
        check_generate(self)    # optional: generate


FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.metadata}


def default_of(name):
    field = FIELDS[name]
    if field.default is dataclasses.MISSING:
        return field.default_factory()
    return field.default


def knobs_in(section_name):
    return [name for name in FIELDS if FIELDS[name].metadata["section"] == section_name]


def knobs_of(cfg):
    return {name: getattr(cfg, name) for name in FIELDS}


def result_knobs(cfg):
    """The settings that a run must share with the checkpoint from which it goes on."""
    names = [name for name in FIELDS if FIELDS[name].metadata["changes_result"]]
    return {name: getattr(cfg, name) for name in names}


# ----- checks of one value

LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


def check_value(name, value):
    facts = FIELDS[name].metadata
    for item in value if isinstance(value, list) else [value]:
        if item == math.inf or isinstance(item, str) and not item.strip():
            raise UserError(f"{name} is {item!r}; give a value, and a finite one, or "
                            "leave it out")
        for limit, holds in LIMITS.items():
            bound = facts[limit]
            if None not in (item, bound) and not holds(item, bound):   # nor does it for nan
                raise UserError(f"{name} is {item}; it must be {limit.replace('_', ' ')} {bound}")


# ----- checks across knobs: what is no matter of being read or not

def check_training(cfg):
    parse_multipliers(cfg.lr_multipliers)
    if cfg.student.startswith("layers:") and not re.fullmatch(r"layers:[1-9][0-9]*", cfg.student):
        raise UserError(f"student {cfg.student!r}; write layers:N, N >= 1")
    homeless = cfg.mode == "train" and cfg.student == "demo" and cfg.teacher != "demo"
    if homeless and cfg.alpha < 1:
        raise UserError(f"teacher {cfg.teacher!r} has no student; name one, for example "
                        "--student layers:4")
    nothing_to_do = 0 in (cfg.max_steps, cfg.num_epochs)
    if cfg.blockwise:   # optional: blockwise
        nothing_to_do = False   # it may end after its blocks
    if nothing_to_do:
        raise UserError(f"max_steps is {cfg.max_steps}, num_epochs {cfg.num_epochs}: 0 is for "
                        "--blockwise, to end after it")


def parse_multipliers(items):
    """['regex=0.1', ...] -> [(compiled regex, 0.1), ...]"""
    rules = []
    for item in items:
        pattern, _, factor = item.rpartition("=")
        try:
            rules.append((re.compile(pattern), float(factor)))
        except (re.error, ValueError) as e:
            raise UserError(f"lr_multipliers {item!r}: {e}; write regex=multiplier, for example "
                            "'lm_head=0.1'")
        if not pattern or not 0 <= rules[-1][1] < math.inf:
            raise UserError(f"lr_multipliers {item!r}: write regex=multiplier with a multiplier "
                            "of 0 or more")
    return rules


def check_server(name, url, who, sdk):   # optional: generate served
    """-> the key for it. who: needs that SDK."""
    if not importlib.util.find_spec(sdk):
        raise UserError(f"{who} needs its SDK: pip install {sdk}")
    key = f"{sdk.upper()}_API_KEY"
    value = os.environ.get(key, "").strip()
    if not (value.isascii() and value.isprintable()):
        raise UserError(f"{key} holds what no key does: a line end, or letters beyond ASCII")
    if url and not re.fullmatch(r"https?://[\w.:\[\]-]+(/[^\s?#]*)?", url):
        raise UserError(f"{name} is no URL like http://localhost:8000/v1, without user, password "
                        f"and query; a key belongs into {key}")
    return value


# ----- optional: streaming

def check_streaming(cfg):
    """Of what was parsed alone: mode eval makes a Config of what a checkpoint says, and that
    leaves max_steps out."""
    if cfg.mode == "train" and cfg.streaming and cfg.max_steps is None:
        raise UserError("a stream has no length: give --max_steps")


# ----- optional: cache

def check_cache(cfg):
    if cfg.mode == "cache" and not cfg.cache_dir:
        raise UserError("mode cache writes cache_dir; name it with --cache_dir DIR")


# ----- optional: served

def check_served(cfg):
    if not cfg.teacher_url:
        return
    if "cache_method" not in cfg.given:
        cfg.cache_method = "topk"
    if cfg.teacher == "demo" != cfg.dataset and (cfg.mode == "cache" or cfg.student != "demo"):
        cfg.teacher = "server:model"   # its only one: none is to be made for a demo
        if cfg.student == "demo":
            cfg.student = cfg.teacher
    wanted = {"temperature": 1.0, "divergence": "forward", "cache_method": "topk"}
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise UserError(f"{name} is {getattr(cfg, name)}: a teacher_url gives the likeliest "
                            f"tokens at temperature 1 and nothing of the others; make it {value}")
    check_server("teacher_url", cfg.teacher_url, "teacher_url", "openai")


# ----- optional: blockwise

def check_blockwise(cfg):
    if cfg.blockwise and cfg.streaming:   # optional: streaming
        raise UserError("blockwise counts in epochs, a stream has no length; drop --streaming")
    several = len(cfg.epochs_per_block) > 1 or len(cfg.wd_per_block) > 1
    if cfg.block_input == "teacher" and several:
        raise UserError("block_input teacher trains all blocks at once; one value for "
                        "epochs_per_block and wd_per_block each")


# ----- optional: on_policy

def check_on_policy(cfg):
    if cfg.on_policy_prompt is not None and cfg.on_policy_prompt >= cfg.seq_len:
        raise UserError(f"on_policy_prompt {cfg.on_policy_prompt} leaves no room in seq_len "
                        f"{cfg.seq_len}; lower it")


# ----- optional: generate

def check_generate(cfg):
    if cfg.mode != "generate":
        return
    if "RANK" in os.environ:
        raise UserError("mode generate is one process; start it without torchrun or launch.sh")
    if cfg.provider != "local":
        check_api(cfg)
    prices = [price for price in (cfg.price_in, cfg.price_out) if price is not None]
    if len(prices) == 1 or cfg.max_cost is not None and not prices:
        raise UserError(f"max_cost is {cfg.max_cost}, price_in {cfg.price_in}, price_out "
                        f"{cfg.price_out}; give both prices, or none")
    if cfg.categories and cfg.prompts_file:
        raise UserError("prompts_file brings its own prompts; drop categories")


def check_api(cfg):
    if not cfg.api_model:
        raise UserError(f"provider {cfg.provider} needs --api_model NAME")
    value = check_server("api_base", cfg.api_base, f"provider {cfg.provider}", cfg.provider)
    if not cfg.api_base and not value:
        raise UserError(f"provider {cfg.provider}: set {cfg.provider.upper()}_API_KEY in the "
                        "environment")


# ----- optional: demo

def demo_knobs(settings=None):
    """What the demo sets beside these settings, found by a few dozen runs on 2 CPU cores (README,
    Results)."""
    settings = settings or {}
    draft = with_defaults(settings)
    names = [draft.student] if draft.mode == "train" else [draft.teacher, draft.dataset]
    if "demo" not in names:
        return {}
    values = {}
    for name, field in FIELDS.items():
        if field.metadata["demo"] is not None and lacks(draft, name) is None:
            values[name] = field.metadata["demo"]
    if draft.blockwise:   # optional: blockwise
        values["max_steps"] = 200
    if "num_epochs" in settings:   # over which max_steps would win
        del values["max_steps"]
    return values


# ----- which knobs do anything

def with_defaults(settings):
    """As the Config of these settings, but unchecked."""
    values = {name: default_of(name) for name in FIELDS}
    return types.SimpleNamespace(**values | settings)


def lacks(cfg, name):
    """What a knob lacks to be read, in words, or None; what its need lacks comes first."""
    facts = FIELDS[name].metadata
    modes = facts["read_by"].split()
    if cfg.mode not in modes:
        return f"--mode {' or '.join(modes)}"
    needs = facts["needs"]
    if callable(needs):
        return needs(cfg)
    if not needs:
        return None
    other, *values = needs
    missing = lacks(cfg, other)
    if missing is None and getattr(cfg, other) not in values:
        missing = f"--{other} {' or '.join(str(value).lower() for value in values)}"
    return missing


# ----- words of a command line

class Parser(HfArgumentParser):
    def error(self, message):   # argparse prints its whole usage; one line is enough
        raise UserError(message)


def make_parser():
    """A dataclass a section: HfArgumentParser makes a group of --help of each."""
    groups = []
    for part in SECTIONS:
        rows = []
        for name in knobs_in(part.section):
            bare = copy.copy(FIELDS[name])
            bare.metadata = {"help": bare.metadata["help"]}
            rows.append((name, bare.type, bare))
        title = {"_argument_group_name": f"{part.section} ({part.purpose})"}
        groups.append(dataclasses.make_dataclass(part.section, rows, namespace=title))
    parser = Parser(groups, allow_abbrev=False, prog="simple_distill.py",
                    usage="%(prog)s [--config FILE] [--KNOB VALUE ...]",
                    description="Distils language models.")
    parser.add_argument("--config",
                        help="yaml or json file of these fields; the command line wins over it")
    return parser


def read_words(words):
    """-> {knob: value} of what stands there; also of "config"."""
    flags = [word.split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise UserError(f"{flag[2:]} is given more than once; keep one")
    unset = argparse.Namespace(**dict.fromkeys(FIELDS))   # where argparse would put defaults
    known, left = make_parser().parse_known_args(words, unset)
    if left:
        hint = nearest(left[0]) if left[0].startswith("--") else "; flags start with --"
        raise UserError(f"cannot make sense of {' '.join(left)!r}{hint}")
    return {name: value for name, value in vars(known).items() if value is not None}


def nearest(flag):
    name = flag.lstrip("-").split("=")[0].removeprefix("no_")
    close = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return "; --help lists all flags"


# ----- a file

def words_of_file(path):
    """A yaml or json mapping -> the words of a command line; null is as if left out."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        if path.endswith(".json"):   # yaml knows no tabs, and no surrogate pairs
            text = json.dumps(json.loads(text), ensure_ascii=False)
        mapping = yaml.compose(text)   # nodes hold what was written: "no" is no False
    except Exception as e:
        raise UserError(f"--config {path}: {one_line(e)}")
    if not isinstance(mapping, yaml.MappingNode):
        raise UserError(f"--config {path} is no mapping of knob: value")
    words = []
    for key, value in mapping.value:
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in [key, *items]):
            raise UserError(f"--config {path}, line {key.start_mark.line + 1}: a value is a number "
                            "or a text, or a list of these")
        if key.value not in FIELDS:
            raise UserError(f"--config {path}: unknown key {key.value!r}{nearest(key.value)}")
        if len(items) == 1 and not value.tag.endswith(":null"):
            words.append(f"--{key.value}={items[0].value}")   # which may begin with -
        elif len(items) > 1:
            words += [f"--{key.value}", *(item.value for item in items)]
    return words


# ----- both together

def parse_config(argv):
    typed = read_words(argv)
    path = typed.pop("config", None)
    in_file = read_words(words_of_file(path)) if path is not None else {}
    settings = in_file | typed
    draft = with_defaults(settings)
    missing = {name: lacks(draft, name) for name in settings}
    changed = [name for name in settings if missing[name] and settings[name] != default_of(name)]
    refused = [f"{name} is read only with {missing[name]}" for name in changed if name in typed]
    if refused:
        raise UserError("; ".join(refused))
    settings = {name: value for name, value in settings.items() if not missing[name]}
    values = settings
    values = demo_knobs(settings) | settings   # optional: demo
    cfg = Config(given=frozenset(settings), **values)
    check_streaming(cfg)   # optional: streaming
    if changed and os.environ.get("RANK", "0") == "0":
        print(f"--config {path}: passed over, as mode {cfg.mode} with these settings does not "
              f"read it: {', '.join(changed)}")
    return cfg


def parse_or_exit(argv):
    """For the top of the trainer: a mistake is answered before torch is imported."""
    try:
        return parse_config(argv)
    except UserError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
