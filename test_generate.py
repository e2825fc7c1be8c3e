import collections
import hashlib
import http.server
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest

import config
from test_simple_distill import cli, one_thread, prose, spawn, student, teacher, tiny_model, tiny_tokenizer   # noqa: F401

# ---------------------------------------------------------------------------------------------------------------------
# Mode generate, through the real SDKs, against a server on loopback that misbehaves on demand.
# ---------------------------------------------------------------------------------------------------------------------


def _gen_words(seed, count=40):
    rng, stems = random.Random(seed), "list map tree queue sort find merge split read write open close".split()
    return " ".join(f"{rng.choice(stems)}{rng.randrange(1000)}" for _ in range(count))


class _GenServer(http.server.ThreadingHTTPServer):
    """OpenAI and Anthropic on loopback; `fault(prompt, nth)` says how the nth try of a prompt misbehaves."""
    daemon_threads, request_queue_size, handle_error = True, 200, lambda *_: None   # clients get killed

    def __init__(self, fault=lambda prompt, nth: None, reply=_gen_words, delay=lambda: 0, runner=threading.Thread):
        self.fault, self.reply, self.delay, self.lock = fault, reply, delay, threading.Lock()
        self.tries, self.billed, self.seen = collections.Counter(), collections.Counter(), []
        super().__init__(("127.0.0.1", 0), _GenHandler)
        self.runner = runner(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.runner.start()
        return self

    def __exit__(self, *_):
        self.shutdown() if isinstance(self.runner, threading.Thread) else self.runner.kill()
        self.server_close()


class _GenHandler(http.server.BaseHTTPRequestHandler):
    protocol_version, log_message, wbufsize = "HTTP/1.1", lambda *_: None, -1

    def answer(self, status, body, pause=0, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        for i in range(0, len(data), 200):
            self.wfile.write(data[i:i + 200])
            if pause:
                self.wfile.flush()
                time.sleep(pause)

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt, key = body["messages"][-1]["content"], self.headers["authorization"] or self.headers["x-api-key"]
        key = key.split()[-1]
        with s.lock:
            s.seen.append((body, key))
            s.tries[prompt] += 1
            fault = s.fault(prompt, s.tries[prompt])
        time.sleep(s.delay())
        if isinstance(fault, int):
            wait = {"retry_after": "0.02"} if fault == 429 else {"retry_after_ms": 10}
            return self.answer(fault, {"error": {"message": f"{fault} for {key}", "type": "x"}}, **wait)
        with s.lock:   # from here on a provider sends a bill, whatever becomes of the reply
            s.billed[prompt] += 1
        if fault in ("drop", "hang"):
            time.sleep(5 * (fault == "hang"))
            return self.connection.shutdown(2)
        said = {"refusal": "I'm sorry, but I can't help with that: it is against my rules.", "loop": "and so on " * 99,
                "duplicate": _gen_words("same"), "echo": prompt, "key": key + _gen_words(prompt), "empty": "",
                "fence": "Here it is for you:\n```python\nx = 1",
                "code": "Here it is for you:\n```python\ndef f(:\n    pass\n```"}.get(fault)
        said, end = s.reply(prompt) if said is None else said, "length" if fault == "length" else "stop"
        data = {"choices": [{"finish_reason": end, "message": {"role": "assistant", "content": said}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 200}}
        if self.path == "/v1/messages":
            data = {"content": [{"type": "text", "text": said}], "usage": {"input_tokens": 100, "output_tokens": 200},
                    "stop_reason": {"length": "max_tokens", "stop": "end_turn"}[end]}
        if fault == "no usage":
            del data["usage"]
        self.answer(200, b'{"choices": [{"mess' if fault == "bad json" else data, 0.02 * (fault == "slow"))


def _gen_args(folder, server, n, *more, provider="openai"):
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("".join(f"Question {i}: what is {_gen_words(i, 4)}?\n" for i in range(n)))
    base = f"http://127.0.0.1:{server.server_port}" + "/v1" * (provider == "openai")
    return ["--mode", "generate", "--provider", provider, "--api_model", "m", "--api_base", base, "--max_tokens", 300,
            "--num_examples", n, "--prompts_file", folder / "prompts.txt", "--output_dir", folder / "out", *more]


def _gen_rows(folder):
    files = [folder / "out" / name for name in ("train.jsonl", "rejected.jsonl")]
    return [[json.loads(line) for line in f.read_text().splitlines()] if f.exists() else [] for f in files]


def _gen_errors(*args):
    return [line for line in cli(*args, rc=2).err.splitlines() if line.startswith("error: ")]


def _gen_number(text):
    return int(text.split()[1][:-1])


def _gen_faulty(prompt, nth, share=0.3):
    """This share of the prompts misbehaves: half of them at the first try, half of them at every try."""
    x = int(hashlib.md5(prompt.encode()).hexdigest(), 16) / 2**128 / share
    passing = (429, 500, 503, "drop", "slow", 529)
    lasting = ("bad json", "no usage", "length", "refusal", "duplicate", "code", "empty", "loop")
    return (passing[int(x * 12)] if nth == 1 else None) if x < 0.5 else lasting[int(x * 16) - 8] if x < 1 else None


@pytest.mark.parametrize("provider", ["openai", pytest.param("anthropic", marks=pytest.mark.campaign)])
def test_generate_faults(tmp_path, provider):
    """500 prompts, 30 % faults: all answered or accounted for, none twice, and the order of arrival changes nothing."""
    results = []
    for width, wait in ((16, 0.0), (40, 0.03)):
        with _GenServer(_gen_faulty, delay=lambda: wait * random.random()) as server:
            folder, more = tmp_path / str(width), ("--concurrency", width)
            _, out, err = cli(*_gen_args(folder, server, 500, *more, provider=provider))
        kept, rejected = _gen_rows(folder)
        assert len(kept + rejected) == len({row["prompt_id"] for row in kept + rejected}) == 500
        reasons = collections.Counter(row["reason"].split(":")[0] for row in rejected)
        assert set(reasons) == {"cut off", "refusal", "empty or too short", "exact duplicate", "repetition loop",
                                "code does not parse", "failed"}
        assert all(f"{name:20}{count:8,}" in out for name, count in {**reasons, "kept": len(kept)}.items())
        passing = [p for p in server.tries if isinstance(_gen_faulty(p, 1), int)]
        assert passing and all(server.tries[p] == 2 and server.billed[p] == 1 for p in passing)   # refused, paid once
        results.append((kept, sorted((row["prompt_id"], row["reason"]) for row in rejected)))
    assert results[0] == results[1]


def test_generate_prompts():
    """100,000 distinct prompts, balanced, in less than 10 s of CPU; more only adds to fewer; weights are kept."""
    start, first = time.process_time(), lambda n, *args: list(itertools.islice(config.compose_prompts(*args), n))
    prompts = first(100_000, [], 0)
    assert time.process_time() - start < 10
    assert len({messages[0]["content"] for _, messages in prompts}) == 100_000
    assert collections.Counter(name for name, _ in prompts) == dict.fromkeys(config.TASKS, 100_000 // 8)
    assert first(50, [], 0) == prompts[:50] != first(50, [], 1)
    some = collections.Counter(name for name, _ in first(400, ["implement=3", "debug"], 0))
    assert some == {"implement": 300, "debug": 100}


def test_generate_filters(tmp_path):
    """Each filter by name through the whole path, and replies that none may reject."""
    faults = dict(enumerate(("length", "refusal", "empty", "echo", "loop", "fence", "code", "duplicate", "duplicate")))
    reply = lambda p: _gen_words("near", 400) + p[-20:] if _gen_number(p) in (20, 21) else \
        _gen_words(p) + "\ud800" * (_gen_number(p) == 12)   # half a pair, as some models cut it
    with _GenServer(lambda p, nth: faults.get(_gen_number(p)), reply) as server:
        cli(*_gen_args(tmp_path, server, 22))
    kept, rejected = _gen_rows(tmp_path)
    assert {_gen_number(row["messages"][0]["content"]): row["reason"] for row in rejected} == {
        0: "cut off", 1: "refusal", 2: "empty or too short", 3: "repeats the prompt", 4: "repetition loop",
        5: "code does not parse", 6: "code does not parse", 8: "exact duplicate", 21: "near duplicate"}
    assert [_gen_number(row["messages"][0]["content"]) for row in kept] == [7, *range(9, 21)]
    assert set(kept[0]) == {"messages", "category", "model", "usage", "cost", "finish_reason", "prompt_id"}
    for reply in ("```python\n>>> 1 + 1\n2\n```\nA session.", "````md\n```python\nx = (\n```\n````\nFences in a fence.",
                  "I can't assist but so:\n```python\nx = 1\n```", "   ```python\n   x = 1\n   ```\nindented, as in a list",
                  "```js\nfoo(() => {\n```\nis no Python", "Sorry is a word of five letters.", open(__file__).read()):
        assert not any(config.find_flaws("What is it?", reply, "stop").values()), reply
    for reply in ("I’m sorry, but I cannot help with this.", "As an AI model, I do not.", "I can't help you."):
        assert config.find_flaws("What is it?", reply, "stop")["refusal"], reply


def _gen_spawn(args, server, count):
    """The real command in a process of its own, when the server has billed `count` replies."""
    process = spawn(*args)
    while sum(server.billed.values()) < count and process.poll() is None:
        time.sleep(0.002)
    return process


@pytest.mark.campaign
def test_generate_kill(tmp_path):
    """kill -9 at five moments, then a run to the end: only what was in flight is paid twice, and the cap knows."""
    width, n = 4, 60
    with _GenServer(delay=lambda: 0.03) as server:
        prices = ("--price_in", 1, "--price_out", 2, "--max_cost", 1)
        args = _gen_args(tmp_path, server, n, "--concurrency", width, *prices)
        for moment in (1, 9, 20, 33, 47):
            process = _gen_spawn(args, server, moment)
            process.kill()
            process.communicate()
            with open(tmp_path / "out/train.jsonl", "a") as f:
                f.write('{"messages": [{"role": "us')   # what a full disk leaves
        cli(*args)
        rows = sum(_gen_rows(tmp_path), [])
        assert len({row["prompt_id"] for row in rows}) == len(rows) == n == len(server.billed)
        assert 0 < sum(server.billed.values()) - n <= 5 * width
        spent = json.load(open(tmp_path / "out/summary.json"))["spent_usd"]
        assert sum(server.billed.values()) * 5e-4 <= spent + 1e-9
        tries = server.tries.copy()
        cli(*args)
        assert server.tries == tries   # everything is there: nothing is asked


def test_generate_signal(tmp_path):
    """SIGINT: what is in flight arrives, nothing new is asked, exit 0; the same command goes on."""
    with _GenServer(delay=lambda: 0.05) as server:
        args = _gen_args(tmp_path, server, 40, "--concurrency", 3)
        process = _gen_spawn(args, server, 6)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
        assert process.returncode == 0 and "stopped by a signal" in out and 6 <= len(server.billed) < 40, out
        assert len(_gen_rows(tmp_path)[0]) == len(server.billed)
        cli(*args)
        assert len(_gen_rows(tmp_path)[0]) == 40 and set(server.billed.values()) == {1}


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_generate_cap(tmp_path, provider):
    """The server's own bill stays below 1.00 USD whatever goes wrong, and most of it is used."""
    prices = ("--price_in", 20, "--price_out", 100, "--max_cost", 1)   # a reply costs 0.022, and 0.033 at worst
    with _GenServer(lambda p, nth: _gen_faulty(p, nth, 0.5)) as server:
        args = _gen_args(tmp_path, server, 200, "--concurrency", 16, *prices, provider=provider)
        _, out, err = cli(*args)
        rows = sum(_gen_rows(tmp_path), [])
        bill, spent = sum(server.billed.values()) * 0.022, json.load(open(tmp_path / "out/summary.json"))["spent_usd"]
        assert "max_cost" in out and 0.7 < bill <= spent <= 1, (err, bill, spent)
        assert spent == pytest.approx(sum(row["cost"] for row in rows))
        tries = sum(server.tries.values())
        cli(*args)
        assert sum(server.tries.values()) - tries <= 1   # nothing is left to spend
    unknown = [row["cost"] for row in rows if row["usage"]["prompt_tokens"] is None]
    assert unknown and min(unknown) > 0.03   # nobody said what it cost: the worst case
    assert "price" in cli(*(arg for arg in args if arg not in ("--price_in", 20)), rc=2).err


def test_generate_key(tmp_path, monkeypatch):
    """The key is nowhere, though the server repeats it in its errors and replies."""
    for provider, secret in (("openai", "sk-test-0123456789abcdef"), ("anthropic", "sk-ant-fedcba9876543210")):
        monkeypatch.setenv(f"{provider.upper()}_API_KEY", secret)
        with _GenServer(lambda p, _: 400 if _gen_number(p) % 4 == 3 else "key") as server:
            _, out, err = cli(*_gen_args(tmp_path / provider, server, 40, provider=provider))
        files = "".join(f.read_text() for f in (tmp_path / provider / "out").iterdir())
        assert server.seen[0][1] == secret and "failed: " in files and "***" in files
        assert secret not in files + out + err
        with _GenServer(lambda p, _: 401) as server:
            _, out, err = cli(*_gen_args(tmp_path / "refused", server, 40, provider=provider), rc=2)
        assert "***" in err and secret not in out + err


def test_generate_errors(tmp_path, monkeypatch):
    """What no request would survive is one `error:` line at once, and costs as little."""
    for i, (status, since) in enumerate(((401, 1), (404, 1), (401, 9), (400, 1))):
        folder, provider = tmp_path / str(i), ("openai", "anthropic")[i % 2]
        with _GenServer(lambda p, _: status if sum(server.tries.values()) >= since else None) as server:
            errors = _gen_errors(*_gen_args(folder, server, 50, provider=provider))
        assert len(errors) == 1 and str(status) in errors[0]
        kept, rejected = _gen_rows(folder)
        assert len(kept) == len(server.billed) >= since - 1 and not rejected and sum(server.tries.values()) < since + 8
    plain, gone = ["--mode", "generate", "--output_dir", tmp_path / "o"], _gen_args(tmp_path / "p", server, 50)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    wrong = [(name, "--categories", name) for name in ("poetry", "debug=0", "test=x")]
    wrong += [("none.txt", "--prompts_file", tmp_path / "none.txt")]
    cases = [("onnect", gone), ("--teacher", [*plain, "--provider", "local"]), ("_API_KEY", [*plain, "--api_model", "m"]), ("pip install openai", gone)]
    for named, args in [(named, [*plain, "--api_model", "m", *more]) for named, *more in wrong] + cases:
        if "KEY" in named:
            monkeypatch.delenv("OPENAI_API_KEY")
        if "pip" in named:
            monkeypatch.setitem(sys.modules, "openai", None)
        errors = _gen_errors(*args)
        assert len(errors) == 1 and named in errors[0], errors


def test_generate_slow_server(tmp_path):
    """A server that admits 50 a second slows the run down; one that hangs is asked again after request_timeout."""
    times = collections.deque([0.0] * 5, maxlen=5)

    def limited(prompt, nth):
        if _gen_number(prompt) == 7 and nth == 1:
            return "hang"
        return 429 if time.monotonic() - times[0] < 0.1 else times.append(time.monotonic())
    with _GenServer(limited) as server:
        cli(*_gen_args(tmp_path, server, 100, "--concurrency", 30, "--request_timeout", 2))
    assert len(_gen_rows(tmp_path)[0]) == 100, _gen_rows(tmp_path)[1]
    assert sum(server.tries.values()) > 120


def test_generate_stops(tmp_path):
    """More than 20 % of failures in the last 50: the run stops, keeps what it has and says so."""
    with _GenServer(lambda p, _: 400 if sum(server.tries.values()) > 60 and _gen_number(p) % 2 else None) as server:
        _, out, err = cli(*_gen_args(tmp_path, server, 400), rc=2)
    kept, rejected = _gen_rows(tmp_path)
    assert "11 of the last" in err and len(kept) > 60 and 11 <= len(rejected) < 30
    assert sum(server.tries.values()) < 120


def test_generate_prompts_file(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a trie?"}]
    own = [{"prompt": "What is a heap?"}] * 2 + [{"messages": talk, "category": "explain", "more": 1}]
    for provider, sent in (("openai", (0.3, 300, None)), ("anthropic", (None, 300, "Be brief."))):
        with _GenServer() as server:
            args = _gen_args(tmp_path / provider, server, 9, provider=provider)
            args += ["--api_temperature", 0.3] if provider == "openai" else []
            path = args[args.index("--prompts_file") + 1] = tmp_path / "own.jsonl"
            path.write_text("\n\n".join(map(json.dumps, own)))
            cli(*args)
        kept, _ = _gen_rows(tmp_path / provider)
        assert [row["messages"][:-1] for row in kept] == [[{"role": "user", "content": "What is a heap?"}], talk]
        assert [row["category"] for row in kept] == ["own", "explain"]
        assert tuple(server.seen[-1][0].get(k) for k in ("temperature", "max_tokens", "system")) == sent
    for row in ("nonsense", '{"question": 1}', '{"messages": [{"role": "user"}]}', "[]", '{"prompt": 3}'):
        path.write_text('{"prompt": "What is a heap?"}\n' + row)
        assert "own.jsonl" in cli(*args, rc=2).err


@pytest.mark.campaign
def test_generate_throughput(tmp_path):
    """32 in flight are at least 20 x as fast as one at a time, against 100 ms of latency."""
    rates, fork = [], multiprocessing.get_context("fork").Process   # a process of its own: it must not share our core
    with _GenServer(delay=lambda: 0.1, runner=fork) as server:
        for width, n in ((1, 3), (1, 20), (32, 1000)):   # the first one loads the SDK
            start = time.perf_counter()
            cli(*_gen_args(tmp_path / f"{width}.{n}", server, n, "--concurrency", width))
            rates.append(n / (time.perf_counter() - start))
    if rates[2] < 20 * rates[1] and os.getloadavg()[0] > os.cpu_count():
        pytest.skip(f"the machine is busy: {rates[2] / rates[1]:.1f} x")
    assert rates[2] >= 20 * rates[1], rates


def test_generate_local(tmp_path, teacher):
    args = ["--mode", "generate", "--provider", "local", "--teacher", teacher, "--num_examples", 11, "--max_tokens", 12]
    cli(*args, "--concurrency", 4, "--api_temperature", 1, "--output_dir", tmp_path / "out")
    rows = sum(_gen_rows(tmp_path), [])
    assert len(rows) == 11 and {row["finish_reason"] for row in rows} <= {"stop", "length"}
    for row in rows:
        count = row["usage"]["completion_tokens"]
        assert count == 12 if row["finish_reason"] == "length" else count < 12
        assert row["usage"]["prompt_tokens"] == len((row["messages"][0]["content"] + "\n\n").encode()) + 1   # <|begin|>
    for more in (("--api_model", "x"), ("--price_in", 1)):
        cli(*args, *more, "--output_dir", tmp_path / "other", rc=2)
    (tmp_path / "out/train.jsonl").write_text('{"messages": [\n{}\n')
    assert "train.jsonl" in (err := cli(*args, "--output_dir", tmp_path / "out", rc=2).err) and "line 1" in err


def test_generate_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in cli("--mode", "generate", "--api_model", "m", "--output_dir", tmp_path / "out", rc=2).err


def test_generate_then_train(tmp_path, student):
    """generate -> --dataset out/train.jsonl --alpha 1 -> final/"""
    with _GenServer() as server:
        cli(*_gen_args(tmp_path, server, 60))
    cli("--dataset", tmp_path / "out/train.jsonl", "--alpha", 1, "--student", student, "--max_steps", 4, "--eval_samples", 4,
        "--seq_len", 128, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run/final/model.safetensors").exists()
