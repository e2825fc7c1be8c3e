"""Every knob of simple_distill: its default, its help and all else that is known about it.

    cfg = parse_config(sys.argv[1:])   # default < the demo's value < --config FILE < command line

The knobs are one flat dataclass, `Config`; a knob is one row of it, and the rows stand in
sections. Below it come the checks across knobs, one function a chapter, then the parsing.
Neither torch nor a model is imported here, so that `--help` and a typo answer at once.
"""
import dataclasses
import difflib
import importlib.util   # optional: generate
import json
import math
import os
import re
import sys
import types
import urllib.parse   # optional: generate
from argparse import ArgumentTypeError
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool


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
    name: str
    purpose: str           # one line of --help
    read_by: str           # what holds for a row that says nothing else, from here on
    needs: Any
    changes_result: bool


SECTIONS = []


def section(name, purpose, read_by, needs=None, changes_result=True):
    """The rows that follow are of this section."""
    SECTIONS.append(Section(name, purpose, read_by, needs, changes_result))


def knob(default, help, *, at_least=None, above=None, at_most=None, read_by=None, needs=None,
         changes_result=None, demo=None, demo_blockwise=None):
    """One row.

    at_least, above, at_most   the range of the value, or of each value of a list
    read_by                    the modes that read it
    needs                      (knob, value, ...): it is read only beside one of these values;
                               or a function of the settings -> what is missing, in words
    changes_result             may it differ where a run goes on from a checkpoint? False: yes
    demo, demo_blockwise       its value in the demo, and in the demo with --blockwise
    """
    here = SECTIONS[-1]
    facts = dict(
        help=help, section=here.name, at_least=at_least, above=above, at_most=at_most,
        read_by=here.read_by if read_by is None else read_by,
        needs=here.needs if needs is None else needs,
        changes_result=here.changes_result if changes_result is None else changes_result,
        demo=demo, demo_blockwise=demo_blockwise,
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


# ----- what some knobs need beside them, where that is more than the value of another knob

def hub_dataset(cfg):
    if cfg.mode == "train" and cfg.cache_dir:   # optional: cache
        return None   # the dataset is not read, but compared with what the cache is of
    paths = [cfg.dataset]
    for mark in ("state.json", "dataset_dict.json"):   # of save_to_disk
        paths.append(os.path.join(cfg.dataset, mark))
    if cfg.dataset == "demo" or any(os.path.isfile(path) for path in paths):
        return "a --dataset of the hub"


def scheduler_that_warms_up(cfg):
    if cfg.lr_scheduler == "constant" and cfg.warmup_ratio != 0:   # 0 is what it does anyway
        return "--lr_scheduler linear or so"


def scheduler_with_a_shape(cfg):
    if cfg.lr_scheduler.startswith("constant"):
        return "an --lr_scheduler but constant"


def student_that_writes(cfg):   # optional: on_policy
    if cfg.mode == "train" and cfg.on_policy == 0:
        return "--on_policy above 0"


# ----- the knobs

@dataclass
class Config:
    given = frozenset()   # names that stood on the command line or in the file; no knob

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
        needs=("provider", "local"),   # optional: generate
    )
    student: str = knob(
        "demo", "hub name, local directory, HF config .json (random weights), layers:N, or demo; "
        "mode eval, unset: output_dir/final", read_by="train cache eval")
    tokenizer: str | None = knob(
        None, "hub name or directory; unset: the student's own, else the teacher's",
        needs=("provider", "local"),   # optional: generate
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = knob(
        "auto", "compute type; auto: bf16 where native, else fp32",
        needs=("provider", "local"),   # optional: generate
    )
    gradient_checkpointing: bool = knob(
        True, "recompute student activations in the backward pass to save memory",
        read_by="train", changes_result=False, demo=False)
    compile: bool = knob(
        False, "torch.compile student and teacher, a decoder layer at a time",
        read_by="train cache eval")
    trust_remote_code: bool = knob(
        False, "run model code that comes with a checkpoint",
        needs=("provider", "local"),   # optional: generate
    )

    section("data", "what is trained and evaluated on", "train cache eval")
    dataset: str = knob(
        "demo", "hub name, .jsonl .json .csv .parquet .txt file, save_to_disk directory, or demo")
    dataset_config: str | None = knob(None, "configuration of a hub dataset", needs=hub_dataset)
    train_split: str = knob("train", "split to train on")
    eval_split: str = knob("validation", "held-out split; unset and absent: a slice of train")
    text_column: str = knob("text", "column of plain text (conversations have their own)")
    max_samples: int | None = knob(None, "use the first so many raw rows; unset: all", at_least=1)
    eval_samples: int = knob(256, "sequences to evaluate on, the first of eval_split", at_least=1)
    seq_len: int = knob(
        512, "tokens a sequence; longer conversations are cut, text is packed into blocks of this",
        at_least=2, demo=128)
    packing: Literal["auto", "rows", "blocks", "documents"] = knob(
        "auto", "what shares a row: one document; blocks cut from joined text; or whole documents "
        "that do not see each other. auto: blocks of text, conversations one a row")
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
        read_by="train eval",   # optional: on_policy
    )

    # these may differ on resume as long as the sequences a step do not: the trainer compares those
    section("steps", "how long, and how much at a time", "train", changes_result=False)
    num_epochs: float = knob(1.0, "passes over the data (max_steps, if set, wins)", at_least=0)
    max_steps: int | None = knob(
        None, "optimiser steps; unset: num_epochs decides",
        at_least=0, demo=500, demo_blockwise=200)
    batch_size: int = knob(
        8, "sequences a device and micro-step", at_least=1, read_by="train eval", demo=16)
    gradient_accumulation_steps: int = knob(1, "micro-steps an optimiser step", at_least=1)

    section("optimiser", "AdamW, its rates and what they are in time", "train")
    learning_rate: float = knob(1e-4, "peak learning rate", above=0, demo=4e-3)
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
        needs=("provider", "local"),   # optional: generate
    )

    section("logging", "Weights & Biases, beside log.jsonl", "train", changes_result=False)
    use_wandb: bool = knob(True, "log to Weights & Biases when it is installed and logged in")
    wandb_project: str = knob("slm-distillation", "project name there")
    wandb_entity: str | None = knob(None, "team or user there")
    wandb_run_name: str | None = knob(None, "run name there")

    # ----- optional: streaming
    section("streaming", "data that is read as it comes", "train cache eval")
    streaming: bool = knob(False, "read a stream: constant memory and disk, no length")
    shuffle_buffer: int = knob(
        10000, "raw rows shuffled together when streaming; 0: as they come",
        at_least=0, read_by="train", needs=("streaming", True))

    # ----- optional: cache
    section("cache", "the teacher's targets, computed once and kept on disk", "cache")
    cache_dir: str | None = knob(
        None, "teacher cache to fill (mode cache) or to train from; unset: online",
        read_by="train cache", changes_result=False)
    cache_method: Literal["sample", "topk"] = knob("sample", "what is kept of a distribution")
    cache_samples: int = knob(
        50, "draws a token", at_least=1, at_most=255, needs=("cache_method", "sample"))
    cache_top_k: int = knob(
        64, "largest logits a token", at_least=1, needs=("cache_method", "topk"))
    cache_chunk: int = knob(256, "sequences a cache file", at_least=1)
    force_regenerate: bool = knob(False, "empty cache_dir first")

    # ----- optional: blockwise
    section("blockwise", "hidden states first, by blocks", "train", needs=("blockwise", True))
    blockwise: bool = knob(
        False, "match hidden states block by block, then the head, then distil as usual", needs=())
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
        [1.0], "passes over the data, one value or one a block", above=0, demo_blockwise=[0.1])
    lr_per_block: list[float] = knob(
        [1e-3], "learning rate, one value or one a block", above=0, demo_blockwise=[4e-3])
    wd_per_block: list[float] = knob([0.0], "weight decay, one value or one a block", at_least=0)
    max_grad_norm_per_block: list[float] = knob(
        [0.05], "gradient clipping, one value or one a block; 0: none. The default shortens nearly "
        "every gradient: late steps, with their small errors, count as early ones", at_least=0)
    initialize_head_from_teacher: bool = knob(
        True, "start from the teacher's head, projected through the last stitch")
    train_lm_head: bool = knob(True, "train norm and head on the teacher's logits after the blocks")

    section("head", "the phase after the blocks", "train", needs=("train_lm_head", True))
    lm_head_epochs: float = knob(1.0, "passes over the data", above=0, demo_blockwise=0.1)
    lm_head_lr: float = knob(1e-3, "learning rate of the head phase", above=0, demo_blockwise=4e-3)
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
        read_by="train", needs=())
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
        None, "your own prompts: .txt (one a line) or .jsonl (prompt or messages)",
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
        check_eval(self)        # optional: eval
        check_cache(self)       # optional: cache
        check_models(self)
        check_optimiser(self)
        check_blockwise(self)   # optional: blockwise
        check_on_policy(self)   # optional: on_policy
        check_generate(self)    # optional: generate

    @classmethod   # optional: eval
    def from_json(cls, values):   # optional: eval
        """From what asdict and json made of a Config."""
        return cls(**{name: convert(name, value) for name, value in values.items()
                      if value is not None})

    def public(self):   # optional: generate
        """As a dict, less the passwords that a URL may hold."""
        return dataclasses.asdict(self) | {"api_base": self.api_base and public_url(self.api_base)}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def default_of(name):
    field = FIELDS[name]
    if field.default is dataclasses.MISSING:
        return field.default_factory()
    return field.default


def knobs_in(section_name):
    return [name for name in FIELDS if FIELDS[name].metadata["section"] == section_name]


def result_knobs(cfg):
    """The settings that a run must share with the checkpoint from which it goes on."""
    names = [name for name in FIELDS if FIELDS[name].metadata["changes_result"]]
    return {name: getattr(cfg, name) for name in names}


# ----- checks of one value

def check_value(name, value):
    field = FIELDS[name]
    if value == [] and default_of(name) != []:
        raise UserError(f"{name} is empty; give at least one value")
    if get_origin(field.type) is Literal and value not in get_args(field.type):
        choices = ", ".join(get_args(field.type))
        raise UserError(f"{name} {value!r} is not one of {choices}")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and not item.strip():
            raise UserError(f"{name} is empty; give a value, or leave it out")
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{name} is {item}; give a finite number")
        if item is not None:
            check_range(name, item, **field.metadata)


def check_range(name, value, at_least, above, at_most, **_):
    if above is not None and value <= above:
        raise UserError(f"{name} is {value}; it must be greater than {above}")
    if at_most is not None and not at_least <= value <= at_most:
        raise UserError(f"{name} is {value}; it must be between {at_least} and {at_most:,}")
    if at_least is not None and value < at_least:
        raise UserError(f"{name} is {value}; it must be at least {at_least}")


# ----- checks across knobs, a function a chapter

def check_models(cfg):
    if cfg.student.startswith("layers:") and not re.fullmatch(r"layers:0*[1-9]\d*", cfg.student):
        raise UserError(f"student {cfg.student!r}; write layers:N, N >= 1")
    homeless = cfg.mode == "train" and cfg.student == "demo" and cfg.teacher != "demo"
    if homeless and cfg.alpha < 1:
        raise UserError(f"teacher {cfg.teacher!r} has no student; name one, for example "
                        "--student layers:4")


def check_optimiser(cfg):
    parse_multipliers(cfg.lr_multipliers)
    try:
        kwargs = json.loads(cfg.lr_scheduler_kwargs or "{}")
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise UserError(f"lr_scheduler_kwargs {cfg.lr_scheduler_kwargs!r} is no JSON object")
    if cfg.blockwise:   # optional: blockwise
        return   # which may end after its blocks, without a step of plain distillation
    for name in ("max_steps", "num_epochs"):
        if getattr(cfg, name) == 0:
            raise UserError(f"{name} is 0: that is for --blockwise, to end after it")


def parse_multipliers(items):
    """['regex=0.1', ...] -> [(compiled regex, 0.1), ...]"""
    rules = []
    for item in items:
        pattern, _, factor = item.rpartition("=")
        try:
            rule = re.compile(pattern), float(factor)
        except (re.error, ValueError) as e:
            raise UserError(f"lr_multipliers {item!r}: {e}; write regex=multiplier, for example "
                            "'lm_head=0.1'")
        if not pattern or not 0 <= rule[1] < math.inf:
            raise UserError(f"lr_multipliers {item!r}: write regex=multiplier with a multiplier "
                            "of 0 or more")
        rules.append(rule)
    return rules


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
    if cfg.mode != "train" or not cfg.cache_dir:
        return
    if cfg.alpha == 1:
        raise UserError(f"alpha {cfg.alpha:g} uses no teacher, cache_dir {cfg.cache_dir!r} is one")
    if cfg.blockwise:   # optional: blockwise
        raise UserError(f"blockwise needs hidden states, cache_dir {cfg.cache_dir!r} has none; "
                        "drop one")
    if cfg.streaming:   # optional: streaming
        raise UserError(f"cache_dir {cfg.cache_dir!r} is the dataset and has a length; "
                        "drop --streaming")
    if cfg.divergence != "forward":
        raise UserError(f"divergence {cfg.divergence} needs whole distributions; a cache holds "
                        "targets of the forward KL")
    if cfg.teacher == "demo" and cfg.student.startswith("layers:"):
        raise UserError(f"student {cfg.student!r}: whose layers? Name the cache's teacher with "
                        "--teacher")


# ----- optional: blockwise

def check_blockwise(cfg):
    if not cfg.blockwise:
        return
    if cfg.alpha == 1:
        raise UserError("alpha 1 never loads a teacher, blockwise learns from one; choose alpha "
                        "below 1")
    if cfg.streaming:   # optional: streaming
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
    if cfg.mode != "train" or not cfg.on_policy:
        return
    what = f"on_policy {cfg.on_policy:g}"
    if cfg.alpha == 1:
        raise UserError(f"{what} learns from what a teacher says of the student's own texts, alpha "
                        "1 never loads one; choose alpha below 1")
    if cfg.cache_dir:   # optional: cache
        raise UserError(f"{what} needs the teacher itself: cache_dir {cfg.cache_dir!r} holds "
                        "nothing about texts that are yet to be written; drop one")
    if cfg.packing == "documents":
        raise UserError(f"{what} takes one prompt out of a row, packing documents puts several in "
                        "it; use --packing rows, where each document is a prompt of its own")
    no_steps = cfg.max_steps == 0 or cfg.max_steps is None and cfg.num_epochs == 0
    if no_steps:   # which only block-wise training may have
        raise UserError(f"{what} is of the phase after the blocks, which has no step here; raise "
                        "--max_steps or --num_epochs, or drop --on_policy")


# ----- optional: generate

def check_generate(cfg):
    if cfg.mode != "generate":
        return
    if "RANK" in os.environ:
        raise UserError("mode generate is one process; start it without torchrun or launch.sh")
    if cfg.provider == "local":
        if cfg.teacher == "demo":
            raise UserError("provider local needs --teacher, a hub name or a directory")
    else:
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
    if not importlib.util.find_spec(cfg.provider):
        raise UserError(f"provider {cfg.provider} needs its SDK: pip install {cfg.provider}")
    key = f"{cfg.provider.upper()}_API_KEY"
    value = os.environ.get(key, "").strip()
    if not cfg.api_base and not value:
        raise UserError(f"provider {cfg.provider}: set {key} in the environment")
    if not (value.isascii() and value.isprintable()):
        raise UserError(f"{key} holds what no key does: a line end, or letters beyond ASCII")
    if cfg.api_base and not is_server(cfg.api_base):
        raise UserError(f"api_base {public_url(cfg.api_base)!r} is no URL like "
                        f"http://localhost:8000/v1, without a query; a key belongs into {key}")


def is_server(url):
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0   # port raises where it is no number
    except ValueError:
        return False
    plain = url.isprintable() and not re.search(r"[\s?#]", url)
    return plain and has_host and parts.scheme in ("http", "https")


def public_url(url):
    """A URL less what may be secret: user and password, and what a query says."""
    url = re.sub(r"(?s)^(\w+://)?.*@", r"\1***@", url)
    return re.sub(r"(?s)[?#].*", "?***", url)


# ----- optional: eval

def check_eval(cfg):
    if cfg.mode == "eval" and cfg.student.startswith("layers:"):
        raise UserError(f"student {cfg.student!r} is not trained yet; name a model or a checkpoint")


# ----- optional: demo

def demo_knobs(blockwise=False):
    """What the demo sets, found by a few dozen runs on 2 CPU cores (README, Results)."""
    values = {}
    for name, field in FIELDS.items():
        if field.metadata["demo"] is not None:
            values[name] = field.metadata["demo"]
        if blockwise and field.metadata["demo_blockwise"] is not None:
            values[name] = field.metadata["demo_blockwise"]
    return values


def add_demo_values(settings):
    """For what the user left open, where a demo is used."""
    draft = with_defaults(settings)
    names = [draft.student] if draft.mode == "train" else [draft.teacher, draft.dataset]
    if "demo" not in names:
        return settings
    values = demo_knobs()
    if draft.blockwise:   # optional: blockwise
        values = demo_knobs(blockwise=True)
    if "num_epochs" in settings:   # over which max_steps would win
        del values["max_steps"]
    read = {name: value for name, value in values.items() if does_something(draft, name)}
    return read | settings


# ----- which knobs do anything

def with_defaults(settings):
    """As the Config of these settings, but unchecked."""
    values = {name: default_of(name) for name in FIELDS}
    return types.SimpleNamespace(**values | settings)


def read_by_mode(cfg, name):
    return cfg.mode in FIELDS[name].metadata["read_by"].split()


def missing_need(cfg, name):
    """What a knob lacks to be read, in words, or None; what its need lacks comes first."""
    needs = FIELDS[name].metadata["needs"]
    if not needs:
        return None
    if callable(needs):
        return needs(cfg)
    other, *values = needs
    if not read_by_mode(cfg, other):
        return None   # teacher needs --provider local where there is a provider: in mode generate
    missing = missing_need(cfg, other)
    if missing is None and getattr(cfg, other) not in values:
        missing = f"--{other} {' or '.join(str(value).lower() for value in values)}"
    return missing


def does_something(cfg, name):
    return read_by_mode(cfg, name) and missing_need(cfg, name) is None


def refuse_idle(typed, settings):
    draft = with_defaults(settings)
    unread = [name for name in typed if not read_by_mode(draft, name)]
    if unread:
        raise UserError(f"mode {draft.mode} does not read {', '.join(unread)}; leave that out")
    for missing in [missing_need(draft, name) for name in typed]:
        if missing:
            idle = [name for name in typed if missing_need(draft, name) == missing]
            raise UserError(f"{', '.join(idle)}: read only with {missing}; give that, or leave it "
                            "out")


# ----- the command line

class Parser(HfArgumentParser):
    def error(self, message):   # argparse prints its whole usage; one line is enough
        raise UserError(message)


def make_parser():
    """A dataclass a section: HfArgumentParser makes a group of --help of each."""
    groups = []
    for part in SECTIONS:
        rows = []
        for name in knobs_in(part.name):
            field = FIELDS[name]
            bare = dataclasses.field(default=field.default, default_factory=field.default_factory,
                                     metadata={"help": field.metadata["help"]})
            rows.append((name, field.type, bare))
        title = {"_argument_group_name": f"{part.name} ({part.purpose})"}
        groups.append(dataclasses.make_dataclass(part.name, rows, namespace=title))
    parser = Parser(groups, allow_abbrev=False, prog="simple_distill.py",
                    usage="%(prog)s [--config FILE] [--KNOB VALUE ...]",
                    description="Distils language models.")
    parser.add_argument("--config",
                        help="yaml or json file of these fields; the command line wins over it")
    return parser


def typed_names(argv):
    """The flags as names, before argparse: it would take an unknown flag's value for a word."""
    names = []
    for word in argv:
        if not word.startswith("--"):
            continue
        flag = word[2:].split("=")[0].replace("-", "_")
        name = flag.removeprefix("no_")
        if name not in FIELDS and name not in ("config", "help"):
            raise UserError(f"unknown flag --{flag}{nearest(name)}")
        if name in names:
            raise UserError(f"--{name} is given more than once; keep one")
        if flag != name:
            refuse_unless_on(flag, name)
        names.append(name)
    return names


def refuse_unless_on(flag, name):
    """--no_NAME turns off what is on by default."""
    default = default_of(name) if name in FIELDS else None
    if default is not True:
        value = "false" if default is False else "VALUE"
        raise UserError(f"there is no --{flag}; write --{name} {value}")


def nearest(name):
    close = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return "; --help lists them all"


# ----- the file

def once_each(pairs):
    """A dict of these, for json; and no key twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given more than once in the --config file; keep one")
    return dict(pairs)


class YamlLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):   # a few lines of them unfold to gigabytes
            raise ValueError(f"aliases (*{self.peek_event().anchor}) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        once_each([(key.value, None) for key in scalars])
        return super().construct_mapping(node, deep)


def read_config_file(path):
    """A yaml or json mapping -> {name: value of the knob's type}; null is as if left out."""
    kind = "JSON" if path.endswith(".json") else "YAML"
    try:
        with open(path, encoding="utf-8") as f:
            if kind == "JSON":
                values = json.load(f, object_pairs_hook=once_each)
            else:
                values = yaml.load(f, YamlLoader)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"--config {path!r}: {e.strerror}")
    except Exception as e:
        raise UserError(f"--config {path} is no valid {kind}: {one_line(e)}")
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds a {type(values).__name__}, not a mapping of "
                        "field: value")
    settings = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise UserError(f"--config {path}: unknown key {name!r}{nearest(str(name))}")
        if value is None:
            continue
        try:
            settings[name] = convert(name, value)
        except (ValueError, ArgumentTypeError) as e:
            raise UserError(f"--config {path}: {name} is {value}; {e}")
        check_value(name, settings[name])
    return settings


def convert(name, value):
    """What yaml or json made of a value -> what the command line would make of it."""
    annotation = FIELDS[name].type
    kind = str if get_origin(annotation) is Literal else annotation
    if get_args(kind):   # kind | None or list[kind]
        kind = get_args(kind)[0]
    if get_origin(annotation) is not list:
        return convert_one(kind, value)
    items = value if isinstance(value, list) else [value]
    for item in items:
        if item is None or isinstance(item, (bool, list, dict)) or str(item).startswith("-"):
            raise ValueError("it takes numbers or texts that do not begin with -")
    return [convert_one(kind, item) for item in items]


def convert_one(kind, value):
    if isinstance(value, list) or isinstance(value, bool) and kind is not bool:
        raise ValueError("it takes one value, a yes or no in quotes")
    text = str(value)   # 1.5 is no int, and 1e-4, which yaml takes for a text, is a number
    if isinstance(value, dict):
        text = json.dumps(value, default=str)   # lr_scheduler_kwargs is JSON
    if kind is bool:
        return string_to_bool(text)
    return kind(text)


# ----- both together

def parse_config(argv):
    parser = make_parser()
    typed = typed_names(argv)
    known, left = parser.parse_known_args(argv)
    if left:
        raise UserError(f"cannot make sense of {' '.join(left)!r}; flags start with --")
    typed = [name for name in typed if name in FIELDS]
    settings = {name: getattr(known, name) for name in typed}
    passed_over = []
    if known.config is not None:
        settings = read_config_file(known.config) | settings
        draft = with_defaults(settings)
        for name in [name for name in settings if name not in typed]:
            if not does_something(draft, name):
                value = settings.pop(name)
                if value != default_of(name):
                    passed_over.append(name)
    changed = [name for name in typed if settings[name] != default_of(name)]
    refuse_idle(changed, settings)
    given = frozenset(settings)
    settings = add_demo_values(settings)   # optional: demo
    cfg = Config(**settings)
    cfg.given = given
    check_streaming(cfg)   # optional: streaming
    if passed_over and os.environ.get("RANK", "0") == "0":
        print(f"--config {known.config}: passed over, as mode {cfg.mode} with these settings does "
              f"not read it: {', '.join(passed_over)}")
    return cfg


def parse_or_exit(argv):
    """For the top of the trainer: a mistake is answered before torch is imported."""
    try:
        return parse_config(argv)
    except UserError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
