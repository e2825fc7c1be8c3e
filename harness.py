"""Builds build/simple_distill.py = the assumed parts + generate_section.py, so the tests run the section as it is."""
import os
HERE = os.path.dirname(os.path.abspath(__file__))
HEAD = r'''import asyncio, ast, collections, functools, hashlib, itertools, json, os, random, re, signal, sys
import sysconfig, textwrap, time, zlib
from types import SimpleNamespace
import torch
from tqdm import tqdm
sys.path.insert(0, "/work/main")
from config import UserError, parse_config, save_config


def print0(*args, **kw):
    print(*args, **kw)


@functools.cache
def stdlib_sources():
    root, found = sysconfig.get_paths()["stdlib"], []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"})
        for name in sorted(files):
            if name.endswith(".py"):
                try:
                    with open(os.path.join(folder, name), encoding="utf-8") as f:
                        found.append((os.path.relpath(os.path.join(folder, name), root), f.read()))
                except UnicodeDecodeError:
                    pass
    return sorted(found)


def load_tokenizer(name, cfg):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"tokenizer {name}: {str(e).splitlines()[0]}")


'''
TAIL = '''

def main(argv=None):
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv)
        os.makedirs(cfg.output_dir, exist_ok=True)
        save_config(cfg, os.path.join(cfg.output_dir, "config.json"))
        generate(cfg)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
'''
def build(folder=os.path.join(HERE, "build")):
    os.makedirs(folder, exist_ok=True)
    section = open(os.path.join(HERE, "generate_section.py"), encoding="utf-8").read()
    path, text = os.path.join(folder, "simple_distill.py"), HEAD + section + TAIL
    if not os.path.exists(path) or open(path).read() != text:
        open(path, "w").write(text)
    return path
def cli(*args):
    """-> (exit code, stdout, stderr) of simple_distill.main in this process."""
    import contextlib, io
    import simple_distill
    out, err, rc = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            simple_distill.main([str(a) for a in args])
        except SystemExit as e:
            rc = e.code or 0
    return rc, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(build())
