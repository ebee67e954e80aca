"""Other Python interpreters, asked from outside; part of ``setup_env.py``, which see."""

import glob
import os
import shutil
import subprocess
import tempfile


def minor(version):
    """``3.11`` of ``3.11.7 ...``."""
    return ".".join(version.split()[0].split(".")[:2])


def find_python(versions):
    """Path of an interpreter of one of ``versions`` that really starts; None where there is none.

    Looked for on PATH and, as its shims on PATH need not start, among those that pyenv installed.
    """
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for version in versions:
        name = "python" + version
        installed = glob.glob(os.path.join(pyenv, "versions", version + "*", "bin", name))
        for path in [shutil.which(name), *sorted(installed)]:
            if (
                path
                and minor(output_of(path, "import sys; print(sys.version)") or "none") == version
            ):
                return path
    return None


def output_of(python, code, *arguments):
    """What ``code`` prints under ``python``, None when it fails. No project folder on sys.path."""
    with tempfile.TemporaryDirectory() as neutral:
        result = subprocess.run(
            [python, "-W", "ignore", "-c", code, *arguments],
            cwd=neutral,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    return result.stdout.decode() if result.returncode == 0 else None


def missing_modules(python, modules):
    """Those of ``modules`` that ``python`` cannot import."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except BaseException: print('missing:' + name)\n"
    )
    printed = output_of(python, code, *modules)
    if printed is None:  # a module took the interpreter down with it
        return list(modules)
    lines = printed.splitlines()
    return [line[len("missing:") :] for line in lines if line.startswith("missing:")]
