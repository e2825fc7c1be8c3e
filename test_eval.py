import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, pipeline

import config
from test_simple_distill import cli, log, spawn

# ---- mode eval ------------------------------------------------------------------------------------------------------

_EVAL_QUICK = ("--generate_comparisons", "false", "--dtype", "fp32")


def _eval_tokenizer(texts, size, folder):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def _eval_model(folder, seed, width, layers, vocab=320, padding=0):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=vocab + padding, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.6)).save_pretrained(folder)


@pytest.fixture(scope="module")
def _eval_world(tmp_path_factory):
    """A teacher, two runs of its students (wide ones, and one with a padded vocabulary), a stranger, and text in many scripts."""
    folder = tmp_path_factory.mktemp("eval")
    pick = np.random.default_rng(0)
    words = "the quick brown fox jumps größer über 日本語 naïve 🙂 wizards boil strange soup in green pots and sleep".split()
    texts = [" ".join(pick.choice(words, pick.integers(5, 60))) + "." for _ in range(300)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name, *shape in (("teacher", 0, 32, 4), ("student", 1, 16, 2), ("padded", 2, 32, 2, 320, 7)):
        _eval_model(folder / name, *shape)
        _eval_tokenizer(texts, 320, folder / name)
    _eval_model(folder / "stranger", 3, 16, 2, 290)
    _eval_tokenizer(texts[::3], 290, folder / "stranger")
    for out, more in (("run", ()), ("labels", ("--alpha", "1"))):
        teacher = ("--teacher", str(folder / "teacher")) if not more else more
        cli(*teacher, "--student", folder / "student", "--output_dir", folder / out, "--max_steps", 12, "--save_steps", 6, "--eval_steps", 4,
            "--log_steps", 1, "--learning_rate", 3e-3, *_eval_data(folder))
    return folder


def _eval_data(folder):
    return ["--dataset", str(folder / "data.jsonl"), "--seq_len", "48", "--batch_size", "3"]


def _eval_words(folder, out, student, *more):
    return ["--mode", "eval", "--teacher", str(folder / "teacher"), "--student", str(folder / student), "--output_dir", str(folder / out),
            *_eval_data(folder), *map(str, more)]


def _eval_report(folder, out, student, *more):
    cli(*_eval_words(folder, out, student, *more))
    return json.loads((folder / out / "report.json").read_text())


def _eval_rows(folder, tokenizer):
    """The held-out rows, cut here once more by hand: every 20th text, joined with EOS, blocks of 48."""
    texts = [json.loads(line)["text"] for line in open(folder / "data.jsonl")]
    gap = max(2, len(texts) // min(256, len(texts) // 20))
    ids = [i for t in texts[gap - 1::gap] for i in tokenizer(t)["input_ids"] + [0]]
    return [ids[i:i + 48] for i in range(0, len(ids), 48) if len(ids[i:i + 48]) > 1]


def _eval_reference(model, teacher, rows, vocab):
    """Full logits in float64, one row at a time."""
    model, teacher = (AutoModelForCausalLM.from_pretrained(p).double() for p in (model, teacher))
    nll, kl, agree, right, confidence = [], [], [], [], []
    for row in rows:
        ids = torch.tensor(row)[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1, :vocab].log_softmax(-1) for m in (model, teacher))
        nll.append(-p.gather(1, ids[0, 1:, None])[:, 0])
        kl.append((q.exp() * (q - p)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        right.append(p.argmax(-1) == ids[0, 1:])
        confidence.append(p.max(-1)[0].exp())
    rowwise = torch.stack([x.sum() for x in nll])
    nll, kl, agree, right, confidence = (torch.cat(x).double() for x in (nll, kl, agree, right, confidence))
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        ece += (right[inside].sum() - confidence[inside].sum()).abs().item() / len(right)
    return {"perplexity": nll.mean().exp().item(), "kl": kl.mean().item(), "agreement": agree.mean().item(), "accuracy": right.mean().item(),
            "ece": ece, "nll": nll.sum().item(), "tokens": len(nll), "rows": rowwise}


@pytest.fixture(scope="module")
def _eval_found(_eval_world):
    return _eval_report(_eval_world, "found", "run/final", "--compare", _eval_world / "labels/final", _eval_world / "padded", _eval_world / "stranger")


def test_eval_numbers_equal_full_float64_logits(_eval_world, _eval_found):
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    for label, name in (("student", "run/final"), ("labels", "labels/final"), ("padded", "padded"), ("teacher", "teacher")):
        want, got = _eval_reference(_eval_world / name, _eval_world / "teacher", rows, 320), _eval_found["models"][label]
        assert got["tokens"] == want["tokens"]
        _, *around = config.interval(want["rows"].numpy(), np.array([len(r) - 1 for r in rows]), 0)
        assert got["perplexity_95"] == pytest.approx([math.exp(x) for x in around], rel=1e-5)
        for key in ("perplexity", "kl", "agreement", "accuracy", "ece"):
            assert got[key] == pytest.approx(want[key], rel=1e-5, abs=1e-6), (label, key)


def test_eval_temperature_is_that_of_training(_eval_world, _eval_found):
    hot = _eval_report(_eval_world, "hot", "run/final", "--temperature", 2, *_EVAL_QUICK)["models"]["student"]
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    model, teacher = (AutoModelForCausalLM.from_pretrained(_eval_world / n).double() for n in ("run/final", "teacher"))
    with torch.no_grad():
        pairs = [[(m(torch.tensor(r)[None]).logits[0, :-1] / 2).log_softmax(-1) for m in (model, teacher)] for r in rows]
    kl = torch.cat([(q.exp() * (q - p)).sum(-1) for p, q in pairs]).mean().item() * 4
    assert hot["kl"] == pytest.approx(kl, rel=1e-5) and hot["perplexity"] == _eval_found["models"]["student"]["perplexity"]


def test_eval_teacher_against_itself(_eval_world):
    found = _eval_report(_eval_world, "self", "teacher", *_EVAL_QUICK)
    student = found["models"]["student"]
    assert student["kl"] == 0 and student["agreement"] == 1 and student["perplexity"] == found["models"]["teacher"]["perplexity"]
    assert [x["teacher"] for x in student["layers"]] == [1, 2, 3, 4]
    assert all(x["cka"] == pytest.approx(1, abs=1e-9) and x["mse"] < 1e-12 for x in student["layers"])
    assert found["models"]["teacher"]["student_against_it"] == {"difference": 0, "interval": [0, 0], "verdict": "no significant difference"}


def test_eval_layers_equal_a_direct_computation(_eval_world, _eval_found):
    rows = _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher"))
    for label, name in (("student", "run/final"), ("padded", "padded")):
        states = []
        for path in (name, "teacher"):
            model = AutoModelForCausalLM.from_pretrained(_eval_world / path).double()
            with torch.no_grad():
                per_row = [model.model(torch.tensor(r)[None], output_hidden_states=True).hidden_states[1:] for r in rows]
            states.append([torch.cat([x[i][0, :-1] for x in per_row]) for i in range(len(per_row[0]))])
        for got, (s, t) in zip(_eval_found["models"][label]["layers"], ((0, 1), (1, 3))):
            x, y = states[0][s], states[1][t]
            assert (got["student"], got["teacher"]) == (s + 1, t + 1)
            xc, yc = x - x.mean(0), y - y.mean(0)
            cka = (xc.T @ yc).norm() ** 2 / ((xc.T @ xc).norm() * (yc.T @ yc).norm())
            ones = torch.cat([x, torch.ones(len(x), 1)], 1)
            fitted = ones @ torch.linalg.lstsq(ones, y).solution
            mse = (x - y).square().mean() if x.shape == y.shape else (fitted - y).square().sum() / y.shape[1] / (len(x) - x.shape[1] - 1)
            assert got["cka"] == pytest.approx(cka.item(), rel=1e-4) and got["mse"] == pytest.approx(mse.item(), rel=1e-4)


def test_eval_bits_of_two_tokenizers_are_of_the_same_bytes(_eval_world, _eval_found):
    base, other = (AutoTokenizer.from_pretrained(_eval_world / n) for n in ("teacher", "stranger"))
    ids = _eval_rows(_eval_world, base)
    told = config.retell([{"input_ids": np.array(r), "targets": None} for r in ids], base, other)
    sizes = [len(base.decode(r[1:], skip_special_tokens=True).encode()) for r in ids]
    for row, new, size in zip(ids, told, sizes, strict=True):
        new = new["input_ids"]
        assert new[0] == 0 and other.decode(new[1:]) == base.decode(row[1:]) and new[1:].count(0) == row[1:].count(0)
        assert len(other.decode(new[1:], skip_special_tokens=True).encode()) == size
    stranger = AutoModelForCausalLM.from_pretrained(_eval_world / "stranger").double()
    bits = 0.0
    for new in told:
        new = torch.tensor(new["input_ids"])
        with torch.no_grad():
            bits -= stranger(new[None]).logits[0, :-1].log_softmax(-1).gather(1, new[1:, None]).sum().item() / math.log(2)
    got = _eval_found["models"]["stranger"]
    assert got["bits"] == pytest.approx(bits / sum(sizes), rel=1e-5) and got["kl"] is None and got["agreement"] is None
    want = _eval_reference(_eval_world / "run/final", _eval_world / "teacher", ids, 320)["nll"]
    assert _eval_found["models"]["student"]["bits"] == pytest.approx(want / math.log(2) / sum(sizes), rel=1e-5)


def test_eval_another_tokenizer_and_masked_prompts_are_refused(_eval_world, tmp_path):
    rows = [{"prompt": "the quick brown", "response": "fox jumps"}] * 40
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["--mode", "eval", "--teacher", _eval_world / "teacher", "--student", _eval_world / "stranger", "--dataset", tmp_path / "talk.jsonl",
             "--seq_len", 48, "--output_dir", tmp_path / "out"]
    assert "plain text" in cli(*words, rc=2).err


@pytest.mark.parametrize("n", [12, 60])
def test_eval_intervals_cover(n):
    draw, inside = torch.Generator().manual_seed(n), 0
    for trial in range(200):   # sequences of many lengths, skewed losses that hang together within one; true mean 2
        bottom = torch.randint(20, 60, (n,), generator=draw).double()
        top = bottom * 2 * (0.4 * torch.randn(n, generator=draw, dtype=torch.float64) - 0.08).exp()
        _, low, high = config.interval(top.numpy(), bottom.numpy(), trial)
        inside += low <= 2 <= high
    assert 180 <= inside <= 198


def test_eval_report_files(_eval_world, _eval_found):
    folder = _eval_world / "found"
    text = (folder / "report.md").read_text()
    table = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines() if line.startswith("| "))}
    labels = table[""]
    assert labels == list(_eval_found["models"]) == ["teacher", "student", "labels", "padded", "stranger"]
    for key, title in config.METRICS.items():
        for label, cell in zip(labels, table[title]):
            value, shown = _eval_found["models"][label][key], cell.split(", ")[0].split()[0].replace(",", "")
            if value is None:
                assert shown == "-"
            else:
                assert float(shown) == pytest.approx(value, rel=6e-4)
    for x in (m["student_against_it"] for label, m in _eval_found["models"].items() if label != "student"):
        assert f"{x['difference']:+.4f} bits a byte ({x['interval'][0]:+.4f} to {x['interval'][1]:+.4f})" in text and x["verdict"] in text
    curves = _eval_found["models"]["student"]["curves"]
    assert "report.png" in text and [len(curves[k]) for k in ("train/loss", "train/ce_loss", "train/kl_loss", "eval/ce_loss")] == [12, 12, 12, 3]
    assert len(_eval_found["models"]["student"]["texts"]) == 3
    from matplotlib import image
    picture = image.imread(folder / "report.png")[..., :3]
    assert min(picture.shape[:2]) > 800
    height, width = (x // 2 for x in picture.shape[:2])
    for panel in (picture[:height, :width], picture[:height, width:], picture[height:, :width], picture[height:, width:]):
        assert (np.abs(panel - [0xd5 / 255, 0x5e / 255, 0]).max(-1) < 0.05).sum() > 100   # the third model is in every panel


def test_eval_without_matplotlib(_eval_world, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = cli(*_eval_words(_eval_world, "plain", "run/final", *_EVAL_QUICK)).out
    assert not (_eval_world / "plain/report.png").exists()
    assert "pip install matplotlib" in said and "report.png)" not in (_eval_world / "plain/report.md").read_text()


def test_eval_takes_a_checkpoint_of_a_run(_eval_world):
    """The last checkpoint is final/; an earlier one is another model; a broken one is refused."""
    last, earlier = (_eval_report(_eval_world, f"at{n}", f"run/checkpoints/step-{n:08d}", *_EVAL_QUICK) for n in (12, 6))
    final = _eval_reference(_eval_world / "run/final", _eval_world / "teacher", _eval_rows(_eval_world, AutoTokenizer.from_pretrained(_eval_world / "teacher")), 320)
    assert last["models"]["student"]["perplexity"] == pytest.approx(final["perplexity"], rel=1e-5)
    assert earlier["models"]["student"]["perplexity"] != pytest.approx(final["perplexity"], rel=1e-3)
    broken = _eval_world / "run/checkpoints/step-00000099"
    broken.mkdir()
    (broken / "state.json").write_text("{")
    cli(*_eval_words(_eval_world, "broken", "run/checkpoints/step-00000099"), rc=2)
    (broken / "state.json").unlink(), broken.rmdir()


def test_eval_same_numbers_on_two_ranks(_eval_world, _eval_found):
    words = _eval_words(_eval_world, "two", "run/final", "--compare", _eval_world / "labels/final", _eval_world / "padded", _eval_world / "stranger", *_EVAL_QUICK)
    two = spawn(*words, nproc=2)
    said, _ = two.communicate()
    assert two.returncode == 0, said[-2000:]
    two = json.loads((_eval_world / "two/report.json").read_text())
    for label, one in _eval_found["models"].items():
        for key in ("tokens", "perplexity", "bits", "accuracy", "agreement", "kl", "ece", "parameters", "disk", "perplexity_95"):
            assert one[key] is None or two["models"][label][key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), (label, key)
        for a, b in zip(one["layers"], two["models"][label]["layers"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    for label, one in _eval_found["models"].items():
        a, b = one["student_against_it"], two["models"][label]["student_against_it"]
        assert a["verdict"] == b["verdict"] and a["interval"] == pytest.approx(b["interval"], rel=1e-4, abs=1e-7)


def test_eval_refusals(_eval_world):
    for student in ("nowhere", "data.jsonl"):
        assert cli(*_eval_words(_eval_world, "refused", student), rc=2).err.startswith("error: student ")


def test_eval_final_loads_as_in_lm_evaluation_harness(_eval_world):
    model = AutoModelForCausalLM.from_pretrained(_eval_world / "run/final", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(_eval_world / "run/final")
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)("the quick", max_new_tokens=8, do_sample=False)
    assert said[0]["generated_text"].startswith("the quick")
