from test_simple_distill import (F, HERE, PLAIN, STILL, Path, break_letter, checkpoint, cli, column, config, contextlib, distil, edit_weights,   # noqa: F401
                                 final_weights, flags, io, itertools, json, load, log, math, nn, one_thread, os, out, pytest, re, same, sd, shutil,
                                 signal, spawn, student, subprocess, sys, talk, teacher, tempfile, text, time, tiny_model, tiny_tokenizer, torch, types, weights, write_splits)

# ---------------------------------------------------------------------------------------------------------------------
# Block-wise: hidden states against plain models with hooks, the head, freezing, resuming, a student class of one's own.
# ---------------------------------------------------------------------------------------------------------------------

BLOCK = dict(blockwise=True, batch_size=4, num_epochs=0, lr_per_block=3e-3, lm_head_lr=3e-3, wd_per_block=0)

@pytest.fixture(scope="session")
def block(tmp_path_factory):
    """Teacher 32 x 5, student 16 x 3, talks of unequal length (so that there is padding) in 5 steps of 4 an epoch."""
    at = tmp_path_factory.mktemp("block")
    tiny_model(at / "teacher", hidden=32, layers=5, seed=1)
    tiny_model(at / "student", hidden=16, layers=3, seed=2, tie_word_embeddings=True)
    data = write_splits(at / "data", talk(20), talk(6, seed=50))
    return types.SimpleNamespace(at=at, data=data, teacher=str(at / "teacher"), student=str(at / "student"))

def _block_run(block, out, rc=0, **fields):
    return distil(out, rc, **{**BLOCK, **dict(teacher=block.teacher, student=block.student, dataset=block.data), **fields})

def _block_batches(block, first, last, seq_len=32):
    """Padded ids and the mask of real tokens of steps first + 1 ... last, as the trainer deals them (that is tested elsewhere)."""
    cfg = config.Config(dataset=block.data, seq_len=seq_len)
    with sd.process_group():
        rows, _ = sd.load_data(cfg, sd.AutoTokenizer.from_pretrained(block.student))
    for picks, _ in itertools.islice(sd.indexed_batches(rows, 0, 4, first), last - first):
        rows_ids = [torch.as_tensor(rows[i]["input_ids"]) for i in picks]
        width = max(map(len, rows_ids))
        mask = torch.stack([torch.arange(width) < len(x) for x in rows_ids])
        yield torch.stack([F.pad(x, (0, width - len(x))) for x in rows_ids]), mask, [rows[i] for i in picks]

def _block_states(model, ids, feed=None):
    """Hooks on every layer of a plain model: its inputs and outputs; feed: {layer: input in place of its own}."""
    before, after, hooks = {}, {}, []
    for i, layer in enumerate(model.model.layers):
        def pre(module, args, kwargs, i=i):
            x = args[0] if not feed or i not in feed else feed[i]
            before[i] = x
            return (x, *args[1:]), kwargs

        def post(module, args, result, i=i):
            after[i] = result[0] if isinstance(result, tuple) else result
        hooks += [layer.register_forward_pre_hook(pre, with_kwargs=True), layer.register_forward_hook(post)]
    model(input_ids=ids, use_cache=False)
    [h.remove() for h in hooks]
    return before, after

def _block_loss(kind, a, b, t):
    if kind == "mse":
        return F.mse_loss(a, b)
    if kind == "cosine":
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    return t * t * F.kl_div(F.log_softmax(a / t, -1), F.softmax(b / t, -1), reduction="sum") / len(a)

def _block_start(block, out, step):
    """Student model and stitches as a checkpoint has them."""
    state, model = checkpoint(out, step), load(block.student)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    missing = model.load_state_dict({k[12:]: v for k, v in state.items() if k.startswith("model.model.")}, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])   # a head that stays tied
    stitches = {}
    for name in {k.split(".")[2] for k in state if k.startswith("model.stitches.")}:
        weight, bias = state[f"model.stitches.{name}.weight"], state.get(f"model.stitches.{name}.bias")
        stitches[name] = nn.Linear(*weight.shape[::-1], bias=bias is not None)
        stitches[name].load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})})
    return model, stitches

_block_slow = lambda *values: pytest.param(*values, marks=pytest.mark.campaign)

@pytest.mark.parametrize("kind, how", [("mse", "frozen"), ("mse", "free"), ("mse", "teacher"), ("cosine", "frozen"), ("kl_div", "frozen"),
                                       ("kl_div", "teacher"), *(_block_slow(*x) for x in (("cosine", "free"), ("cosine", "teacher"), ("kl_div", "free")))])
def test_block_losses_match_a_plain_reference(block, out, kind, how):
    """Ten steps of block 2 (block_input teacher: of all, each alone), full computation on plain models with hooks."""
    at_once, t = how == "teacher", 1.5 if kind == "kl_div" else 1.0
    few, first = ([2.0], 0) if at_once else ([0.1, 0.1, 2.0], 2)
    _block_run(block, out, distill_loss_type=kind, distill_loss_temperature=t, epochs_per_block=few, train_lm_head=False, save_steps=1,
               keep_checkpoints=20, block_input="teacher" if at_once else "student", freeze_previous_blocks=how != "free",
               initialize_head_from_teacher=False, gradient_checkpointing=True)
    got = {e["train/step"]: e["train/loss"] for e in log(out, "train")}
    begin, teacher = first or 1, load(block.teacher)   # the first checkpoint there is
    total = torch.zeros(first + 10 - begin)
    for i in range(3) if at_once else [2]:
        model, stitch = _block_start(block, out, begin)
        mine = [p for n, p in model.named_parameters() if f"layers.{i}." in n or how == "free" and ("layers." in n or "embed" in n)]
        mine += [p for name in (f"up{i}", f"down{i}") if name in stitch for p in stitch[name].parameters()]
        optimizer = torch.optim.AdamW(mine, lr=3e-3, weight_decay=0)
        if at_once:   # moments of the first step
            saved, names = checkpoint(out, begin), {p: n for n, p in model.named_parameters()}
            names |= {p: f"stitches.{k}.{n}" for k, s in stitch.items() for n, p in s.named_parameters()}
            for p in mine:
                key = names[p] if names[p].startswith("stitches") else f"model.{names[p]}"
                optimizer.state[p] = {k: saved[f"{k}.{key}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        for step, (ids, real, _) in enumerate(_block_batches(block, begin, first + 10)):
            with torch.no_grad():
                theirs = _block_states(teacher, ids)
            j = round((i + 1) * 5 / 3) - 1
            feed = {i: stitch[f"down{i}"](theirs[0][j])} if at_once else None
            ours = _block_states(model, ids, feed)[1][i]
            loss = _block_loss(kind, stitch[f"up{i}"](ours[real]), theirs[1][j][real], t)
            total[step] += loss.item()
            grads = torch.autograd.grad(loss, mine, allow_unused=True)
            for p, g in zip(mine, grads):
                p.grad = torch.zeros_like(p) if g is None else g
            nn.utils.clip_grad_norm_(mine, 1.0)
            optimizer.step()
    torch.testing.assert_close(total, torch.tensor([got[s] for s in range(begin + 1, first + 11)]), rtol=1e-5, atol=1e-6)
    assert abs(total[0] - total[-1]) > 1e-4   # something was learned

@pytest.mark.parametrize("kind, source", [("mse", "teacher"), ("cosine", "student"), ("kl_div", "student"),
                                          *(_block_slow(*x) for x in (("mse", "student"), ("cosine", "teacher"), ("kl_div", "teacher")))])
def test_block_student_equal_to_teacher_stays_equal(block, out, kind, source):
    _block_run(block, out, student=block.teacher, distill_loss_type=kind, block_input=source, epochs_per_block=0.4, lm_head_epochs=0.4)
    assert set(column(out, "train/loss")) == {0.0}
    assert all(e[f"block/{i}/loss"] == 0 for e in log(out, "block") for i in range(5)) and len(log(out, "block")) == 2
    assert same(final_weights(out), weights(block.teacher))

def test_block_only_its_own_parameters_move(block, out):
    """Block i and its stitch, block 0 the embeddings too; in the head phase norm and head. Bit for bit."""
    _block_run(block, out, epochs_per_block=0.4, lm_head_epochs=0.4, initialize_head_from_teacher=False, save_steps=2, keep_checkpoints=9,
               resume="never")
    groups = [r"layers\.0\.|up0|embed", r"layers\.1\.|up1", r"layers\.2\.|up2", r"lm_head|model\.norm\."]
    for i, group in enumerate(groups[1:], 1):
        a, b = ({k: v for k, v in checkpoint(out, 2 * n).items() if k.startswith("model.")} for n in (i, i + 1))
        moved = {k for k in a if not torch.equal(a[k], b[k])}
        assert moved == {k for k in a if re.search(group, k)}, (i, moved)
    assert torch.equal(a["model.stitches.up0.weight"], b["model.stitches.up0.weight"])
    assert not [k for k in final_weights(out) if "stitch" in k] and "lm_head.weight" in final_weights(out)

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", ["LlamaConfig", "PhiConfig"])   # Phi: a LayerNorm, a bias in norm and head
def test_block_projected_head_is_the_teachers_on_stitched_states(block, out, tmp_path, cls, bias):
    extra = {} if cls == "LlamaConfig" else {"cls": "PhiConfig"}
    teacher, student = (tiny_model(tmp_path / n, hidden=w, layers=k, seed=w, **extra) for n, w, k in (("t", 32, 3), ("s", 16, 2)))
    norm = "model.norm.weight" if not extra else "model.final_layernorm.weight"

    def stir(tensors):   # a trained norm is not all ones, a trained bias not all zeros
        for k in (norm, norm.replace("weight", "bias"), "lm_head.bias"):
            if k in tensors:
                tensors[k] += torch.rand(tensors[k].shape)
    edit_weights(teacher, stir)
    _block_run(block, out, teacher=teacher, student=student, stitching_layer_bias=bias, epochs_per_block=1, train_lm_head=False)
    state, model, its = checkpoint(out, 10), load(os.path.join(out, "final")), load(teacher)
    assert ("model.stitches.up1.bias" in state) == (bias and bool(extra)) and ("model.stitches.up0.bias" in state) == bias
    h = torch.randn(50, 16)
    stitched = F.linear(h, state["model.stitches.up1.weight"], state.get("model.stitches.up1.bias"))
    gain, shift = weights(teacher)[norm], weights(teacher).get(norm.replace("weight", "bias"), 0)
    want = its.lm_head(stitched * gain + shift)   # what the final norm does, but for dividing by the size
    assert (model.lm_head(h) - want).abs().max() < 1e-5 * want.abs().max()

def test_block_errors_fall_and_beat_the_head_alone(block, tmp_path):
    """At unequal width; the head alone gets as many steps as blocks and head together."""
    whole, alone = str(tmp_path / "whole"), str(tmp_path / "alone")
    _block_run(block, whole, epochs_per_block=10, lm_head_epochs=6)
    _block_run(block, alone, epochs_per_block=0.2, lr_per_block=STILL, lm_head_epochs=35.4, initialize_head_from_teacher=False)
    before, after = log(whole, "block")
    assert all(after[f"block/{i}/loss"] < 0.9 * before[f"block/{i}/loss"] for i in range(3)), (before, after)
    assert log(whole, "eval")[-1]["eval/step"] == log(alone, "eval")[-1]["eval/step"]
    assert column(whole, "eval/kl_loss")[-1] < column(alone, "eval/kl_loss")[-1]

@pytest.mark.parametrize("source", ["student", _block_slow("teacher")])
def test_block_resume_is_exact_in_every_phase(block, tmp_path, source):
    """Killed in a block and in the head phase; and from checkpoints where a phase begins, ends, and in the middle."""
    fields = dict(teacher=block.teacher, student=block.student, dataset=block.data, epochs_per_block=0.8, lm_head_epochs=0.8, max_steps=3,
                  save_steps=2, keep_checkpoints=30, block_input=source)
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    _block_run(block, whole, **fields)
    steps = len(log(whole, "train"))
    assert steps == (19 if source == "student" else 11)
    killer = ("import os, signal, sys; import simple_distill as sd; n, step = int(sys.argv.pop(1)), sd.optimizer_step\n"
              "def kill(*a):\n global n; n -= 1\n return step(*a) if n else os.kill(os.getpid(), signal.SIGKILL)\n"
              "sd.optimizer_step = kill; sys.exit(sd.main())")
    words = flags(**{**PLAIN, **BLOCK, **fields, "output_dir": killed, "use_wandb": False})
    for count, newest in ((4, 2), (steps - 6, steps - 7 - (steps - 7) % 2)) if source == "student" else ((4, 2),):
        process = subprocess.run([sys.executable, "-c", killer, str(count), *words], cwd=HERE, capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    _block_run(block, killed, **fields)
    clean = lambda path: [{k: v for k, v in e.items() if "second" not in k} for e in log(path)]
    want = clean(whole)
    assert clean(killed) == want and same(final_weights(killed), final_weights(whole))
    for step in (4, 12, 14, 16) if source == "student" else (2, 4, 6, 8):   # a phase is 4 steps
        again = str(tmp_path / f"from{step}")
        shutil.copytree(whole, again)
        shutil.rmtree(os.path.join(again, "final"))
        for folder in Path(again, "checkpoints").iterdir():
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        assert "passed over" not in _block_run(block, again, **fields).out
        assert clean(again) == want and same(final_weights(again), final_weights(whole)), step

def test_block_refusals_name_numbers(block, out):
    says = lambda text, **fields: text in _block_run(block, out, 2, **fields).err or pytest.fail(f"{text} {fields}")
    says("student width 16 and teacher width 32", use_stitching_layers=False, stitching_layer_bias=True)
    says("has 5 layers, the teacher only 3", student=block.teacher, teacher=block.student)
    says("lr_per_block has 2 values", lr_per_block=[1e-3, 1e-4])
    says("one value", block_input="teacher", epochs_per_block=[1, 1, 2])
    says("distill_loss_temperature 2", distill_loss_temperature=2)

@pytest.mark.parametrize("kind, weight", [("mse", 1.0), ("mse", 0.5), ("kl_div", 0.3), ("ce", 1.0)])
def test_block_head_losses(block, out, kind, weight):
    """The first step of the head phase against logits of the plain models."""
    _block_run(block, out, epochs_per_block=0.2, lm_head_epochs=0.2, logit_loss_type=kind, logit_loss_weight=weight, save_steps=3)
    model, teacher = _block_start(block, out, 3)[0], load(block.teacher)
    (*_, rows), = _block_batches(block, 3, 4)
    batch, got = sd.collate(rows), next(e for e in log(out, "train") if e["train/step"] == 4)
    z, q = (m(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.positions].detach() for m in (model, teacher))
    ce = F.cross_entropy(z, batch.labels)
    term = {"mse": F.mse_loss(z, q), "ce": ce, "kl_div": _block_loss("kl_div", z, q, 1.0)}[kind]
    assert got["train/loss"] == pytest.approx((weight * term + (1 - weight) * ce).item(), rel=1e-5)

CUSTOM = '''
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
class MixConfig(PretrainedConfig):
    model_type = "mix"
    def __init__(self, vocab_size=263, hidden_size=16, num_hidden_layers=2, **kw):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**{**kw, "use_cache": False})
class Layer(nn.Module):   # no attention: a running mean of what came before
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(2 * width, 3 * width), nn.Linear(3 * width, width)
    def forward(self, hidden_states):
        x = self.norm(hidden_states)
        mean = (x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]).to(x.dtype)
        return hidden_states + self.outer(torch.relu(self.inner(torch.cat([x, mean], -1))))
class Body(nn.Module):   # the norm stands beside the layers
    def __init__(self, config):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(config.vocab_size, config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList([Layer(config.hidden_size) for _ in range(config.num_hidden_layers)])
    def forward(self, input_ids, use_cache=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (self.norm(x),)
class MixForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix = MixConfig, "model"
    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = Body(config), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
    def get_input_embeddings(self):
        return self.model.embed_tokens
    def forward(self, input_ids, attention_mask=None, use_cache=None, **kw):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))
MixConfig.register_for_auto_class()
MixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
'''

def test_block_student_class_of_ones_own(block, out, tmp_path, monkeypatch):
    """A class in a local directory (auto_map), without attention, another family than the teacher's."""
    (tmp_path / "mixlib.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    import mixlib
    torch.manual_seed(0)
    mixlib.MixForCausalLM(mixlib.MixConfig()).save_pretrained(tmp_path / "mix")
    tiny_tokenizer().save_pretrained(tmp_path / "mix")
    mine = dict(student=str(tmp_path / "mix"), trust_remote_code=True, epochs_per_block=4, lm_head_epochs=2)
    assert "--gradient_checkpointing false" in _block_run(block, out, 2, **mine, gradient_checkpointing=True).err
    _block_run(block, out, **mine)
    before, after = log(out, "block")
    assert all(after[f"block/{i}/loss"] < before[f"block/{i}/loss"] for i in range(2))
    final = sd.AutoModelForCausalLM.from_pretrained(os.path.join(out, "final"), trust_remote_code=True)
    assert type(final).__name__ == "MixForCausalLM" and not same(final.state_dict(), weights(str(tmp_path / "mix")))

@pytest.mark.parametrize("cls, extra", [("GPT2Config", {}), ("Gemma2Config", dict(head_dim=8)), ("GPTNeoXConfig", {})])
def test_block_student_of_another_family(block, out, tmp_path, cls, extra):
    """Other norms, learned positions, a capped head: errors fall, and the head starts from the teacher's."""
    student = tiny_model(tmp_path / "s", hidden=16, layers=2, seed=3, cls=cls, **extra)
    _block_run(block, out, student=student, epochs_per_block=6, lm_head_epochs=4)
    before, after = log(out, "block")
    assert all(after[f"block/{i}/loss"] < 0.9 * before[f"block/{i}/loss"] for i in range(2))
    assert load(os.path.join(out, "final")).config.model_type in cls.lower().replace("neox", "_neox")

@pytest.mark.parametrize("phase", ["block", "head"])
def test_block_a_row_that_is_not_finite_skips_its_step_only(block, out, tmp_path, phase):
    """One row in five has the letter that the teacher cannot bear."""
    rows = [{"prompt": "Z" if i % 5 == 0 else "a", "response": "one two three"} for i in range(10)]
    data = write_splits(tmp_path / "d", rows, rows[1:3])
    broken = break_letter(block.teacher, tmp_path / "broken")
    _block_run(block, out, teacher=broken, dataset=data, batch_size=1, epochs_per_block=1 if phase == "block" else 0.1,
               lm_head_epochs=0.1 if phase == "block" else 1, save_steps=0, initialize_head_from_teacher=False)
    skipped = column(out, "train/skipped_steps")
    assert skipped[-1] == sum(x is None for x in column(out, "train/loss")) >= (6 if phase == "block" else 2)
    assert skipped[-1] < len(skipped) and all(x.isfinite().all() for x in checkpoint(out, len(skipped)).values())

def test_log_is_strict_json(out, teacher, student, tmp_path):
    rows = [{"prompt": "Z" if i % 2 else "a", "response": "one two"} for i in range(4)]
    broken = break_letter(student, tmp_path / "broken")
    distil(out, student=broken, alpha=1.0, dataset=write_splits(tmp_path / "d", rows, rows[:2]), batch_size=1)
    refuse = lambda word: pytest.fail(word)
    with open(f"{out}/log.jsonl") as f:
        entries = [json.loads(line, parse_constant=refuse) for line in f]
    assert any(e.get("train/loss", 0) is None for e in entries) and all(e["train/grad_norm"] for e in entries if e.get("train/loss"))

def test_a_pattern_that_matches_only_a_tied_head_says_so(out, text, tmp_path):
    tied = tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    fields = dict(student=tied, alpha=1.0, dataset=text, max_steps=1)
    err = distil(out, rc=2, **fields, lr_multipliers=["layers=0.5", "lm_head=0"]).err
    assert "lm_head" in err and "tied to model.embed_tokens.weight" in err and not os.path.exists(out)
    distil(out, **fields, lr_multipliers=["embed|lm_head=0"])
    assert torch.equal(final_weights(out)["model.embed_tokens.weight"], weights(tied)["model.embed_tokens.weight"])

def test_wandb_is_finished_when_training_fails(out, teacher, student, tmp_path, monkeypatch):
    """A stand-in for the service, not for our code."""
    ended = []
    run = types.SimpleNamespace(id="abc", log=lambda entry, step=None: None, finish=lambda exit_code: ended.append(exit_code))
    fake = types.SimpleNamespace(api=types.SimpleNamespace(api_key="key"), init=lambda **_: run, Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    broken = break_letter(student, tmp_path / "broken")
    rows = [{"prompt": "Z", "response": "one two"}] * 12
    distil(out, rc=2, student=broken, alpha=1.0, dataset=write_splits(tmp_path / "d", rows, rows[:2]), batch_size=1, use_wandb=True)
    assert ended == [1]

@pytest.mark.campaign
def test_block_demo(tmp_path):
    """Every block's held-out error falls, and blocks and head end nearer to the teacher than the head alone."""
    fields = dict(use_wandb=False, max_steps=0, output_dir=str(tmp_path / "whole"))
    shown = cli("--blockwise", *flags(**fields)).out
    before, after = log(fields["output_dir"], "block")
    assert all(after[f"block/{i}/loss"] < before[f"block/{i}/loss"] for i in range(2)) and "teacher block" in shown
    steps, epoch = log(fields["output_dir"], "eval")[-1]["eval/step"], log(fields["output_dir"], "eval")[-1]["eval/epoch"]
    shutil.copytree(tmp_path / "whole" / "demo", tmp_path / "alone" / "demo")
    fields |= dict(output_dir=str(tmp_path / "alone"), epochs_per_block=1e-6, lr_per_block=STILL, initialize_head_from_teacher=False)
    cli("--blockwise", *flags(**fields, lm_head_epochs=epoch * (steps - 2) / steps))
    assert log(fields["output_dir"], "eval")[-1]["eval/step"] == steps
    assert column(tmp_path / "whole", "eval/kl_loss")[-1] < column(tmp_path / "alone", "eval/kl_loss")[-1]

@pytest.mark.campaign
def test_block_two_ranks_bf16_and_accumulation(block, tmp_path):
    """Two ranks, and accumulation, give the losses of one; bf16 runs through and errors fall."""
    fields = {**PLAIN, **BLOCK, **dict(teacher=block.teacher, student=block.student, dataset=block.data, epochs_per_block=1, lm_head_epochs=1)}
    outs = {n: str(tmp_path / n) for n in ("one", "ranks", "micro", "half", "fed", "fed2")}
    cli(*flags(**fields, output_dir=outs["one"]))
    cli(*flags(**{**fields, "batch_size": 1, "gradient_accumulation_steps": 4}, output_dir=outs["micro"]))
    cli(*flags(**fields, block_input="teacher", output_dir=outs["fed"]))
    for name, extra in (("ranks", dict(batch_size=2)), ("fed2", dict(batch_size=2, block_input="teacher")), ("half", dict(batch_size=2, dtype="bf16"))):
        process = spawn(*flags(**{**fields, **extra, "output_dir": outs[name]}), nproc=2)
        text = process.communicate(timeout=600)[0]
        assert process.returncode == 0, text[-3000:]
    for a, b in (("one", "ranks"), ("one", "micro"), ("fed", "fed2")):
        assert column(outs[b], "train/loss") == pytest.approx(column(outs[a], "train/loss"), rel=2e-5)
    before, after = log(outs["half"], "block")
    assert all(after[f"block/{i}/loss"] < before[f"block/{i}/loss"] for i in range(3))

def bench_block(layers=8, width=256, tokens=1024):
    """Cost of the block phase of S equal layers, over running both models whole for each block: about a half."""
    with tempfile.TemporaryDirectory() as at, sd.process_group():
        paths = [tiny_model(os.path.join(at, n), hidden=width, layers=layers, seed=s) for n, s in (("t", 0), ("s", 1))]
        cfg = config.Config(teacher=paths[0], student=paths[1], blockwise=True, gradient_checkpointing=False, dtype="fp32")
        student, teacher = sd.load_student(cfg), sd.load_teacher(cfg)
        batch = sd.collate([{"input_ids": torch.arange(128) % 263, "targets": None}] * (tokens // 128))

        def seconds(work, signal_of, repeat=5):
            times = []
            for _ in range(repeat):
                start = time.process_time()
                student(work, batch, signal_of(batch), 1.0)[0].backward()
                times.append(time.process_time() - start)
            return min(times)
        whole = seconds(sd.functools.partial(sd.distil, alpha=0.0, temperature=1.0), sd.teacher_signal(teacher))
        print(f"\nCPU ms a step; both models whole, everything trained on the logits (vocabulary 263): {1e3 * whole:.0f}")
        costs = []
        for phase in sd.make_phases(cfg, student, teacher, 1)[:layers]:
            with contextlib.redirect_stdout(io.StringIO()):
                sd.make_optimizer(student.parameters(), phase.rates, 0.0)
            costs.append(seconds(phase.work, phase.signal_of))
        print(f"block {', '.join(map(str, range(layers)))}: {', '.join(f'{1e3 * c:.0f}' for c in costs)}")
        print(f"all {layers} blocks: {sum(costs) / (layers * costs[-1]):.2f} of running both models whole for each block (as the last one "
              f"does), {sum(costs) / (layers * whole):.2f} of training the whole student that often")
