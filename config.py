"""Every knob of simple_distill in one flat dataclass: a default, one line of help, and all cross-field checks.

    cfg = parse_config(sys.argv[1:])     # defaults < demo defaults < --config FILE < command line

The rule: what needs no torch is here, what touches tensors is simple_distill.py's. Sections: knobs and their checks;
the teacher cache on disk; plans (numbers); the demo's files; mode generate; mode eval; earlier runs; the outside world.
"""
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Literal, Optional

import transformers
import yaml
from transformers import HfArgumentParser, SchedulerType


class UserError(Exception):
    """Anything the user can mend: shown as one `error:` line without a traceback, exit code 2."""


def one_line(e, limit=160):
    return " ".join(f"{type(e).__name__}: {e}".split())[:limit]


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


def result_knobs(cfg):
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NO_EFFECT}


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


def demo_knobs(blockwise=False):
    return DEMO | (DEMO_BLOCKWISE if blockwise else {})


Config.given = frozenset()
