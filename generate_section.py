# ----------------------------------------------------------------------------------------------------------- API data
# Composes prompts for a code assistant, asks a model behind an API (or a local one), filters the replies and hands on
# output_dir/train.jsonl, one conversation a row, which `--dataset FILE --alpha 1` trains on.
TASKS = {"implement": "Write {thing} in {language}.", "complete": "Complete this function; give all of it.",
         "explain": "Explain what this function does.", "debug": "One operator in this function is wrong. Fix it.",
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
        for _, text in rng.sample(files := sorted(stdlib_sources()), len(files) // 3):   # parsing them all takes 5 s
            lines = text.split("\n")
            for f in ast.walk(ast.parse(text)):
                if isinstance(f, ast.FunctionDef) and 5 < f.end_lineno - f.lineno < 30 and not ast.get_docstring(f):
                    yield "\n".join(line[f.col_offset:] for line in lines[f.lineno - 1:f.end_lineno])
    weights, rng, seen, asked, misses = {}, random.Random(seed), set(), collections.Counter(), 0
    for name, _, weight in (item.partition("=") for item in categories or TASKS):
        if name not in TASKS or not re.fullmatch(r"|0*[1-9]\d*|\d*\.0*[1-9]\d*", weight):
            raise UserError(f"categories {name}={weight}: write name or name=weight; the names are {', '.join(TASKS)}")
        weights[name] = float(weight or 1)
    codes, pick = itertools.cycle(real_functions()), rng.choice
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
        for line in filter(str.strip, open(path, encoding="utf-8")):
            row = json.loads(line) if path.endswith(".jsonl") else {"prompt": line.strip()}
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            yield row.get("category", "own"), [{"role": m["role"], "content": m["content"] + ""} for m in messages]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"prompts_file {path}: {e!r}; a row is {{\"prompt\": TEXT}} or {{\"messages\": [...]}}")

def judge(prompt, reply, finish_reason):
    """-> {filter: whether it rejects the reply}; the first that does is the reason."""
    asked, said = (" ".join(re.sub(r"```\w*", " ", text).split()) for text in (prompt, reply))
    fenced = r"(?ms)^[ \t]*(```+)[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*\1`*[ \t]*$"
    sorry = r"(?i)\W*(i.?m |i am )?(\w* ?sorry\b.{,9}\bi\b|as an ai\b|(un|not )able to|i can(.?t|not) (help|assist))"
    broken = re.search(r"(?m)^[ \t]*```", re.sub(fenced, "", reply))   # a fence that nothing closes
    try:
        for _, language, code in re.findall(fenced, reply):
            ast.parse(textwrap.dedent(code) if language.lower() in ("python", "py") and ">>>" not in code else "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        broken = True
    # a loop deflates to an eighth, code to a third; the tail alone shows a reply that ended in one
    loops = [len(zlib.compress(data)) < len(data) / 8 - 40 for data in (reply.encode(), reply.encode()[-1000:])]
    return {"cut off": finish_reason == "length", "empty or too short": len(said) < 20, "repetition loop": any(loops),
            "refusal": finish_reason in ("refusal", "content_filter") or "```" not in reply and re.match(sorry, said),
            "repeats the prompt": said in asked or asked in said and len(said) < 1.2 * len(asked),
            "code does not parse": broken}

def write_json(path, value):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
    os.replace(path + ".tmp", path)

def read_rows(path):
    """Yields the rows of a .jsonl; a last line that a kill cut in half is removed, so its prompt is asked again."""
    with open(path, "ab+") as f:
        f.seek(0)
        for line in f:
            if not line.endswith(b"\n"):
                return f.truncate(f.tell() - len(line))
            yield json.loads(line)

def finish(run, train, rejected, summary):
    """Drops duplicates, sorts train, counts. At the end and in prompt order, so who answered first does not matter."""
    order, texts, similar = {name: i for i, name in enumerate(run.jobs)}, set(), collections.defaultdict(list)
    fate = {row["prompt_id"]: row["reason"].partition(":")[0] for row in read_rows(rejected)}
    with open(train + ".tmp", "w", encoding="utf-8") as kept, open(rejected, "a", encoding="utf-8") as out:
        for row in sorted(read_rows(train), key=lambda row: order.get(row["prompt_id"], -1)):
            words = re.findall(r"\w+", row["messages"][-1]["content"].lower())
            # of all 5-word shingles the 64 smallest hashes: two such sketches overlap about as much as the texts do
            mine = sorted({zlib.crc32(" ".join(words[i:i + 5]).encode()) for i in range(max(1, len(words) - 4))})[:64]
            near = any(len({*mine} & {*other} & (both := {*sorted({*mine, *other})[:64]})) > 0.8 * len(both)
                       for h in mine[:8] for other in similar[h])
            reason = "exact duplicate" if hash(tuple(words)) in texts else "near duplicate" if near else None
            texts.add(hash(tuple(words)))
            for h in () if reason else mine[:8]:
                similar[h] += [mine] * (len(similar[h]) < 50)   # what everybody says is no evidence, and costs time
            if row["prompt_id"] not in fate:   # else a kill between the two files left it in both
                fate[row["prompt_id"]] = reason or "kept"
                row |= {"reason": reason} if reason else {}
                (out if reason else kept).write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(train + ".tmp", train)
    names = ["kept", *judge("", "", None), "exact duplicate", "near duplicate", "failed"]
    counts = {name: sum(name == f for f in fate.values()) for name in names}
    write_json(summary, {"spent_usd": run.spent, "tokens": run.tokens, "stopped": run.stop, **counts})
    print0("\n".join(f"  {name:20}{count:8,}{count / max(1, len(fate)):8.1%}" for name, count in counts.items()))
    print0(f"{run.tokens:,} tokens, {run.spent:.4f} USD; {run.stop or 'all is answered'}; --dataset {train} reads it")

def api_teacher(cfg, run):
    """-> ask(jobs) over the official SDK, which repeats what fails in passing (429, 5xx, time-outs, drops)."""
    try:
        sdk = __import__(cfg.provider)
    except ImportError:
        raise UserError(f"provider {cfg.provider} needs its SDK: pip install {cfg.provider}")
    openai, variable = cfg.provider == "openai", f"{cfg.provider.upper()}_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not key and not cfg.api_base:
        raise UserError(f"provider {cfg.provider} takes its key from the environment: set {variable}")
    clean = lambda text: str(text).replace(key if len(key) > 7 else "\0", "***")   # some servers repeat it in errors

    class Wire(sdk.DefaultAsyncHttpxClient):
        async def send(self, request, **kwargs):   # every try passes here, so none leaves without money held for it
            job = run.jobs[asyncio.current_task().get_name()]
            if run.stop or job["tries"] > 3 or not run.hold(job):
                raise asyncio.CancelledError   # not an Exception: after those the SDK tries again
            job["tries"] += 1
            try:
                async with asyncio.timeout(2 * cfg.request_timeout):   # the SDK's begins again with every byte
                    response = await super().send(request, **kwargs)
            except Exception as e:
                job["tries"] -= type(e).__name__.startswith("Connect")
                raise
            job["tries"] -= response.status_code >= 400   # refused: free, and the money held serves the next try
            if response.status_code == 429 or response.status_code >= 500:
                run.pace = max(1, run.pace * 0.9)
            return response
    client = (sdk.AsyncOpenAI if openai else sdk.AsyncAnthropic)(
        api_key=key or "none", base_url=cfg.api_base, timeout=cfg.request_timeout, http_client=Wire())

    async def ask(jobs):
        messages, client.max_retries = jobs[0]["messages"], 20 if run.answered else 2   # patience once it answered
        # OpenAI's newer models refuse max_tokens, which other servers need; Anthropic's API refuses a temperature
        limit = "max_completion_tokens" if openai and not cfg.api_base else "max_tokens"
        extra = {"temperature": cfg.api_temperature} if openai else {}
        if not openai and messages[0]["role"] == "system":
            extra, messages = {"system": messages[0]["content"]}, messages[1:]
        body = {"model": cfg.api_model, "messages": messages, limit: cfg.max_tokens, **extra}
        try:   # post: the typed methods cost twice the time and change from version to version
            r = await client.post("/chat/completions" if openai else "/v1/messages", body=body, cast_to=object)
            said = r["choices"][0]["message"]["content"] if openai else "".join(b.get("text", "") for b in r["content"])
            end = r["choices"][0]["finish_reason"] if openai else r["stop_reason"]
            sides = ("prompt_tokens", "completion_tokens") if openai else ("input_tokens", "output_tokens")
            end = {"max_tokens": "length", "end_turn": "stop"}.get(end, end)
            return [(clean(said or ""), clean(end), [(r.get("usage") or {}).get(side) for side in sides])]
        except (sdk.APIError, ValueError, LookupError, TypeError, AttributeError, TimeoutError) as e:
            error, status = " ".join(clean(e).split())[:300] or type(e).__name__, getattr(e, "status_code", None)
            if status in (401, 402, 404) or isinstance(e, sdk.APIError) and not run.answered:
                run.stop = run.error = f"{cfg.provider}, model {cfg.api_model}: {error}"   # and so would all others
            return [None if run.error else (None, f"failed: {error}", [None, None])]
    return ask

def local_teacher(cfg):
    """-> ask(jobs) over a transformers model on this device, a batch at a time."""
    if cfg.teacher == "demo":
        raise UserError("provider local asks the model that --teacher names; give a hub name or a directory")
    from transformers import AutoModelForCausalLM
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.teacher, cfg)
    device, dtypes = "cuda" if torch.cuda.is_available() else "cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(cfg.dtype, torch.bfloat16 if cfg.dtype == "auto" and device == "cuda" else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(cfg.teacher, dtype=dtype, trust_remote_code=cfg.trust_remote_code)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    chat, pad, ends = tokenizer.chat_template, tokenizer.pad_token_id, model.generation_config.eos_token_id
    ends = {pad, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    sampling = {"do_sample": True, "temperature": cfg.api_temperature} if cfg.api_temperature else {"do_sample": False}

    async def ask(jobs):
        texts = [tokenizer.apply_chat_template(job["messages"], tokenize=False, add_generation_prompt=True) if chat
                 else "\n\n".join([*(m["content"] for m in job["messages"]), ""]) for job in jobs]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(device)
        new_BT = model.to(device).generate(**inputs, max_new_tokens=cfg.max_tokens, pad_token_id=pad, **sampling)
        rows = zip(new_BT[:, inputs["input_ids"].shape[1]:].tolist(), inputs["attention_mask"].sum(1).tolist())
        return [(tokenizer.decode(row, skip_special_tokens=True).strip(), "stop" if row[-1] in ends else "length",
                 [asked, sum(t != pad for t in row)]) for row, asked in rows]
    return ask

async def ask_all(run, todo, batch, ask, settle):
    """Asks in prompt order, run.pace at a time, until all is answered or run.stop says why not."""
    flying, todo = {}, collections.deque(todo)
    for name in (signal.SIGINT, signal.SIGTERM):   # what is in flight is paid for, so it still arrives
        asyncio.get_running_loop().add_signal_handler(name, setattr, run, "stop", "stopped by a signal")
    while flying or todo and not run.stop:
        room = 0 if run.stop or len(flying) >= int(run.pace) else min(batch, len(todo))
        jobs = [todo.popleft() for _ in range(room) if run.hold(todo[0])]
        if jobs:
            flying[asyncio.create_task(ask(jobs), name=jobs[0]["prompt_id"])] = jobs
        elif flying:   # even where the cap is near: what is in flight may cost less than is held for it
            for task in (await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))[0]:
                jobs = flying.pop(task)
                lost = None if run.stop else (None, "failed: no answer", [None, None])
                for job, answer in zip(jobs, [lost] * len(jobs) if task.cancelled() else task.result()):
                    settle(job, answer)
        else:
            run.stop = "max_cost is reached"

def generate(cfg):
    """Mode generate: asks what has no row yet, and leaves train.jsonl, rejected.jsonl, summary.json in output_dir."""
    train, rejected, summary = (f"{cfg.output_dir}/{n}" for n in ("train.jsonl", "rejected.jsonl", "summary.json"))
    usd = lambda sent, got: (sent * (cfg.price_in or 0) + got * (cfg.price_out or 0)) / 1e6
    jobs, own = {}, cfg.prompts_file
    for category, messages in read_prompts(own) if own else compose_prompts(cfg.categories, cfg.seed):
        name = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
        size = sum(len(m["content"].encode()) + 64 for m in messages)   # a token is a byte or more; 64: chat format
        jobs[name] = {"prompt_id": name, "category": category, "messages": messages, "cost": 0.0,
                      "worst": usd(size, cfg.max_tokens), "tries": 0}   # tries: those that may be billed
        if len(jobs) == cfg.num_examples:
            break
    done = {row["prompt_id"]: row["cost"] for path in (train, rejected) for row in read_rows(path)}
    todo = [job for name, job in jobs.items() if name not in done]
    noted = json.load(open(summary))["spent_usd"] if os.path.exists(summary) else 0   # with what a kill left in flight
    spent = max(sum(done.values()), noted)
    run = SimpleNamespace(jobs=jobs, spent=spent, pace=1, answered=False, tokens=0, stop="", error="")
    size, worst = sum(len(str(job["messages"])) for job in todo), sum(job["worst"] for job in todo)
    print0(f"{len(jobs):,} prompts, {len(jobs) - len(todo):,} done; the others send about {size // 4:,} tokens and get "
           f"at most {len(todo) * cfg.max_tokens:,}, for {worst:.2f} USD at most")

    def hold(job):   # the worst case is spent before a try leaves, on disk too: a cap holds over kills and restarts
        more = (job["tries"] + 1) * job["worst"] - job["cost"]
        if cfg.max_cost is not None and run.spent + more > cfg.max_cost:
            return False
        run.spent, job["cost"] = run.spent + more, job["cost"] + more
        if cfg.max_cost is not None:
            write_json(summary, {"spent_usd": run.spent})
        return True

    def settle(job, answer):
        said, end, usage = answer or (None, None, [None, None])
        known = all(isinstance(n, int) and n >= 0 for n in usage)
        cost = max(0, job["tries"] - known) * job["worst"] + (usd(*usage) if known else 0)   # lost: the worst case
        run.spent, run.tokens = run.spent + cost - job["cost"], run.tokens + (sum(usage) if known else 0)
        if answer is None:   # no answer, no row: a later run asks again
            return
        failed = said is None
        flaws = {end: True} if failed else judge(job["messages"][-1]["content"], said, end)
        reason = next((name for name, bad in flaws.items() if bad), None)
        row = {"messages": job["messages"] + [{"role": "assistant", "content": said}][failed:], "cost": cost,
               "category": job["category"], "model": cfg.api_model or cfg.teacher, "prompt_id": job["prompt_id"],
               "finish_reason": None if failed else end, **({"reason": reason} if reason else {}),
               "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}
        with open(rejected if reason else train, "a", encoding="utf-8", errors="replace") as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        recent.append(failed)
        if not failed:   # one at a time until the first answer, so that what is wrong with all shows on one
            run.pace, run.answered = min(width, run.pace + 0.25) if run.answered else width, True
        if sum(recent) > 10 and not run.stop:
            run.stop = run.error = f"{sum(recent)} of the last {len(recent)} requests failed, the last: {end}"
        bar.set_postfix_str(f"{run.tokens:,} tokens, {run.spent:.4f} USD", refresh=False)
        bar.update()
    run.hold, recent, local = hold, collections.deque(maxlen=50), cfg.provider == "local"
    batch, width = (cfg.concurrency, 1) if local else (1, cfg.concurrency)
    ask = local_teacher(cfg) if local else api_teacher(cfg, run)
    bar = tqdm(total=len(todo), unit="prompt", file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 60)
    try:
        asyncio.run(ask_all(run, todo, batch, ask, settle))
    finally:
        bar.close()
        finish(run, train, rejected, summary)
    if run.error:
        raise UserError(run.error)
