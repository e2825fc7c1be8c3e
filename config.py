"""Every knob of simple_distill in one flat dataclass: a default, one line of help, and all cross-field checks.

    cfg = parse_config(sys.argv[1:])     # defaults < demo defaults < --config FILE < command line
"""
import dataclasses
import difflib
import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Literal, Optional

from transformers import HfArgumentParser, SchedulerType


class UserError(Exception):
    """Anything the user can mend: shown as one `error:` line without a traceback, exit code 2."""


def knob(default, help):
    return field(default_factory=lambda: list(default), metadata={"help": help}) if isinstance(default, list) else \
        field(default=default, metadata={"help": help})


# What the embedded demo sets where the user did not: found by a few dozen runs on 2 CPU cores (see README, Results).
DEMO_VOCAB = 1024
DEMO_STUDENT = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                    initializer_range=0.05)
DEMO_TEACHER = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6,
                    initializer_range=0.05)
DEMO_TEACHER_RUN = dict(alpha=1.0, seq_len=128, batch_size=16, max_steps=500, learning_rate=4e-3, warmup_ratio=0.05,
                        gradient_checkpointing=False, save_steps=250, eval_steps=0)
DEMO = dict(seq_len=128, batch_size=16, max_steps=500, learning_rate=4e-3, warmup_ratio=0.05,
            gradient_checkpointing=False, save_steps=250, eval_steps=125)


@dataclass
class Config:
    # run
    mode: Literal["train", "cache"] = knob("train", "train, or fill a teacher cache")
    output_dir: str = knob("out", "where everything of this run goes")
    seed: int = knob(0, "of data order, random weights and dropout")
    resume: str = knob("auto", "auto: newest checkpoint of output_dir; never: start over; or a checkpoint path")
    # models
    teacher: str = knob("demo", "hub name, local directory, or demo")
    student: str = knob("demo", "hub name, local directory, HF config .json (random weights), layers:N, or demo")
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
            for value in (v if isinstance(v := getattr(self, f.name), list) else [v]):
                need(not isinstance(value, float) or math.isfinite(value), f"{f.name} is {value}; give a finite number")
                low, high = RANGES.get(f.name, (None, None))
                if value is not None and low is not None:
                    bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                    need(low <= value <= high, f"{f.name} is {value}; it must be {bounds}")
        for name in POSITIVE:
            need(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("output_dir", "teacher", "student", "dataset", "train_split", "text_column"):
            need(getattr(self, name).strip(), f"{name} is empty")
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != default_of(f)]
        unread = [name for name in given if name not in READ_BY[self.mode]]
        need(not unread, f"mode {self.mode} does not read {', '.join(unread)}; leave that out")
        known = [s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")]
        need(self.lr_scheduler in known, f"lr_scheduler {self.lr_scheduler!r} is not one of {', '.join(known)}")
        scheduler_kwargs(self), parse_multipliers(self.lr_multipliers)
        if self.mode == "train" and self.cache_dir:
            need(self.alpha < 1, f"alpha {self.alpha:g} uses no teacher, cache_dir {self.cache_dir!r} is one")
            need(self.divergence == "forward", f"divergence {self.divergence} needs whole distributions; a cache holds "
                 "targets of the forward KL")
        if self.mode == "cache":
            need(self.cache_dir, "mode cache writes cache_dir; name it with --cache_dir DIR")
        if self.mode == "train" and self.student.startswith("layers:"):
            need(self.teacher != "demo" or self.student[7:].isdigit(), f"student {self.student!r}; write layers:N")
        if self.mode == "train" and self.student == "demo" and self.teacher != "demo":
            need(self.alpha == 1, f"teacher {self.teacher!r} has no student; name one, for example --student layers:4")


def refuse(message):
    raise UserError(message)


INF = math.inf
RANGES = dict(alpha=(0, 1), seq_len=(2, INF), batch_size=(1, INF), gradient_accumulation_steps=(1, INF),
              warmup_ratio=(0, 1), weight_decay=(0, INF), max_grad_norm=(0, INF), default_lr_multiplier=(0, INF),
              shuffle_buffer=(0, INF),
              max_samples=(1, INF), eval_samples=(1, INF), max_steps=(1, INF), num_proc=(1, INF), seed=(0, 2**31),
              cache_samples=(1, 255), cache_top_k=(1, INF), cache_chunk=(1, INF), save_steps=(0, INF),
              eval_steps=(0, INF), keep_checkpoints=(1, INF), log_steps=(1, INF))
POSITIVE = ("temperature", "num_epochs", "learning_rate")

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
GROUPS, names = {}, list(FIELDS)
starts = dict(run="mode", models="teacher", data="dataset", objective="alpha", optimiser="num_epochs",
              cache="cache_dir", saving="save_steps", sharding="fsdp", logging="use_wandb")
for group, after in zip(starts, [*list(starts)[1:], None]):   # the groups are the runs of fields between these names
    GROUPS[group] = names[names.index(starts[group]):names.index(starts[after]) if after else None]
READ_BY = {
    "train": {n for g in GROUPS if g != "cache" for n in GROUPS[g]} | {"cache_dir"},
    "cache": {n for g in ("models", "data", "cache", "sharding") for n in GROUPS[g]}
             - {"gradient_checkpointing", "fsdp"} | {"mode", "output_dir", "seed", "temperature", "batch_size"},
}


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


def scheduler_kwargs(cfg):
    try:
        given = json.loads(cfg.lr_scheduler_kwargs or "{}")
        assert isinstance(given, dict)
    except (ValueError, AssertionError):
        raise UserError(f"lr_scheduler_kwargs {cfg.lr_scheduler_kwargs!r} is no JSON object")
    return given


class Parser(HfArgumentParser):
    def error(self, message):   # argparse prints its whole usage; one line is enough
        raise UserError(message)


def read_config_file(path):
    """A yaml or json mapping of field names -> the same as command-line words, so that both pass the same checks."""
    try:
        with open(path, encoding="utf-8") as f:
            if path.endswith(".json"):
                values = json.load(f)
            else:
                import yaml
                values = yaml.safe_load(f)
    except OSError as e:
        raise UserError(f"--config {path}: {e.strerror}")
    except Exception as e:
        kind, why = "JSON" if path.endswith(".json") else "YAML", " ".join(str(e).split())[:200]
        raise UserError(f"--config {path} is not valid {kind}: {why}")
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds a {type(values).__name__}, not a mapping of field: value")
    words = []
    for name, value in values.items():
        if name not in FIELDS:
            raise UserError(f"--config {path}: unknown key {name!r}{nearest(name)}")
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


def nearest(name):
    close = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def parse_config(argv):
    about = "Knowledge distillation for language models."
    parser = Parser(Config, allow_abbrev=False, prog="simple_distill.py", description=about)
    parser.add_argument("--config", help="yaml or json file of these fields; the command line wins over it")
    flags = [re.sub("^no_", "", w[2:].split("=")[0].replace("-", "_")) for w in argv if w.startswith("--")]
    twice = sorted({n for n in flags if flags.count(n) > 1})
    if twice:
        raise UserError(f"--{twice[0]} is given more than once; keep one")
    for name in flags:   # before argparse: it would take an unknown word for a value of the list before it
        if name not in FIELDS and name not in ("config", "help"):
            raise UserError(f"unknown flag --{name}{nearest(name)}")
    known, _ = parser.parse_known_args(argv)
    given = (read_config_file(known.config) if known.config else []) + argv
    values, left = parser.parse_known_args(given)
    if left:
        raise UserError(f"cannot make sense of {' '.join(left)!r}; flags start with --")
    if values.student == "demo" and (values.teacher == "demo" or values.mode == "train"):
        parser.set_defaults(**{k: v for k, v in DEMO.items() if k in READ_BY[values.mode]})
        values = parser.parse_args(given)
    values = {k: v for k, v in vars(values).items() if k != "config"}
    return Config(**values)


def save_config(cfg, path):
    aside = f"{path}.{os.getpid()}.tmp"   # workers of a cache may write at the same moment
    with open(aside, "w", encoding="utf-8") as f:
        json.dump(cfg if isinstance(cfg, dict) else dataclasses.asdict(cfg), f, indent=2)
    os.replace(aside, path)
