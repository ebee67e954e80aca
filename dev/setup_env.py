"""Set up ``.venv``: the pinned versions of requirements/, and this project, installed in place.

Needs nothing but Python's standard library, and starts on any Python 3.7 or newer, so that a wrong
interpreter gets one clear line. Called by the Makefile::

    python3 dev/setup_env.py [--search] [--newest]

What is done already is skipped. Three cases:

* ``.venv`` holds a stamp of its Python version and of what it was made from: nothing to do.
* The calling Python can import detectron2: that one is kept. ``.venv`` sees the packages of the
  calling Python, and only what cannot be imported there is installed; its torch is never replaced.
* Otherwise everything is installed into ``.venv``. detectron2 comes from a wheel that is tagged for
  one Python version although its Python code runs on all supported ones, hence a pip call of its
  own; the compiled part (deformable convolution, rotated boxes) is not available then.

``--newest`` makes ``.venv-newest`` instead, with the newest versions that pyproject.toml allows.

The stamp is written last, so an interrupted or failed run is taken up again by the next one.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile

from interpreters import find_python, minor, missing_modules, output_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUIREMENTS = os.path.join(ROOT, "requirements")
# changed by --newest:
VENV = os.path.join(ROOT, ".venv")
SUPPORTED = ("3.11", "3.12", "3.10")  # in the order in which they are looked for

# Where the module to import is not the distribution's name in lower case with underscores.
MODULES = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "hydra-core": "hydra",
    "pytest-xdist": "xdist",
    "codespell": "codespell_lib",
    "setuptools": "pkg_resources",  # what detectron2's model zoo needs of it
}
DETECTRON2_FLAGS = (
    "--require-hashes --no-deps --only-binary=:all: "
    "--python-version 3.10 --implementation cp --abi none"
).split()


class SetupError(Exception):
    """The set-up cannot go on; the message is the line to show."""


def main(argv=None):
    """Bring ``.venv`` up to date; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--search",
        action="store_true",
        help="the calling Python is only a default: take another supported one where it is not",
    )
    parser.add_argument(
        "--newest", action="store_true", help=".venv-newest, of Python 3.13 and newest versions"
    )
    args = parser.parse_args(argv)
    if args.newest:
        global VENV, SUPPORTED
        VENV, SUPPORTED = os.path.join(ROOT, ".venv-newest"), ("3.13",)
    try:
        return set_up(args.search, args.newest)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1


def set_up(search, newest=False):
    """See the module docstring; raises :class:`SetupError`."""
    running = minor(sys.version)
    flags = ["--newest"] if newest else []
    if not search and running not in SUPPORTED:
        raise SetupError(wrong_python(running))
    if not newest and is_complete(None if search else running):  # newer ones come by themselves
        return 0
    if running not in SUPPORTED:
        python = find_python(SUPPORTED)
        if python is None:
            raise SetupError(wrong_python(running))
        return run_with(python, flags)
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        return run_with(base_python(), flags)  # active: set it up from the Python it came from
    keep = not newest and not missing_modules(sys.executable, ["detectron2"])
    make_venv(running, keep)
    if newest:
        install_newest()
    elif keep:
        install_missing()
    else:
        install_all()
    unusable = missing_modules(venv_python(), ["torch", "torchvision", "cv2", "detectron2"])
    if unusable:
        with tempfile.TemporaryDirectory() as neutral:  # its own traceback
            subprocess.call([venv_python(), "-c", "import " + unusable[0]], cwd=neutral)
        raise SetupError(f"installed, but 'import {unusable[0]}' fails in {VENV} (see above)")
    write_stamp()
    say("done")
    return 0


# --- the interpreter ----------------------------------------------------------------------------


def wrong_python(version):
    """The line for an interpreter that the pinned wheels do not exist for."""
    known = "3.10 to 3.12 are" if len(SUPPORTED) > 1 else SUPPORTED[0] + " is"
    return (
        f"Python {version} is not supported, {known}; install it and name it, as in "
        f"'make setup PYTHON=python{SUPPORTED[0]}'"
    )


def base_python():
    """The interpreter that the active ``.venv`` was made with."""
    path = os.path.join(sys.base_prefix, "bin", "python" + minor(sys.version))
    if not os.path.exists(path):
        raise SetupError("leave the active .venv first ('deactivate'), then call make again")
    return path


def run_with(python, flags=()):
    """This script under another interpreter; its exit status."""
    return subprocess.call([python, os.path.abspath(__file__), "--search", *flags])


# --- what is there ------------------------------------------------------------------------------


def requirement_files():
    """runtime.txt, dev.txt and detectron2.txt."""
    return [os.path.join(REQUIREMENTS, name + ".txt") for name in ("runtime", "dev", "detectron2")]


def digest():
    """Digest of the requirement files and of the project's own description."""
    total = hashlib.sha256()
    for path in [*requirement_files(), os.path.join(ROOT, "pyproject.toml")]:
        with open(path, "rb") as file:
            total.update(file.read() + b"\0")
    return total.hexdigest()


def pins():
    """``[(module to import, "name==version"), ...]`` of runtime.txt and dev.txt."""
    found = []
    for path in requirement_files()[:2]:
        with open(path) as file:
            lines = [line.split("#")[0].strip() for line in file]
        for line in filter(None, lines):
            name = line.split("==")[0]
            found.append((MODULES.get(name.lower(), name.lower().replace("-", "_")), line))
    return found


def venv_python():
    """Path of the interpreter in ``.venv``."""
    return os.path.join(VENV, "bin", "python")


def venv_version():
    """Python version of ``.venv`` ("3.11.7"), None where there is no usable one."""
    try:
        with open(os.path.join(VENV, "pyvenv.cfg")) as file:
            found = re.search(r"^version\s*=\s*([\d.]+)", file.read(), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found and os.path.exists(venv_python()) else None


def is_complete(wanted):
    """Whether ``.venv`` is finished, and of Python ``wanted`` (None: any supported)."""
    version = venv_version()
    if version is None or (wanted is not None and minor(version) != wanted):
        return False
    try:
        with open(stamp_file()) as file:
            return json.load(file) == stamp(version)
    except (OSError, ValueError):
        return False


def stamp_file():
    """Where it is written that ``.venv`` is finished."""
    return os.path.join(VENV, "setup_stamp.json")


def stamp(version):
    """What is written there: the project is installed in place, so its folder belongs to it."""
    return {"requirements": digest(), "python": version, "project": ROOT}


def write_stamp():
    """Mark ``.venv`` as finished (atomically)."""
    with open(stamp_file() + ".part", "w") as file:
        json.dump(stamp(venv_version()), file)
    os.replace(stamp_file() + ".part", stamp_file())


# --- what is done -------------------------------------------------------------------------------


def make_venv(running, keep):
    """Make ``.venv`` or repair a half-made one.

    Args:
        running: version of the calling Python. A ``.venv`` of another one is replaced if this
            script made it, else an error.
        keep: ``.venv`` finds the calling Python's packages after its own.
    """
    version = venv_version()
    command = [sys.executable, "-m", "venv", VENV]
    if version is None:
        say(f"creating .venv with Python {running}")
    elif minor(version) != running:
        if not os.path.exists(stamp_file()):
            raise SetupError(
                f"{VENV} holds Python {version} and no finished set-up of ours; remove it, or name "
                f"its Python as in 'make setup PYTHON=python{minor(version)}'"
            )
        say(f"replacing the .venv of Python {version} by one of Python {running}")
        command.append("--clear")
    if os.path.exists(stamp_file()):
        os.remove(stamp_file())
    if keep:
        command.append("--system-site-packages")
    check_call(command, "creating .venv failed")
    link = os.path.join(purelib(), "kept_environment.pth")
    if os.path.exists(link):
        os.remove(link)
    if keep and sys.prefix != sys.base_prefix:
        # the caller is a virtual environment: --system-site-packages means its base Python only
        with open(link, "w") as file:
            file.write(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")


def install_all():
    """runtime.txt, dev.txt, the detectron2 wheel and the project."""
    say("installing the versions pinned in requirements/ into .venv (about 5 GB)")
    runtime, dev, _ = requirement_files()
    pip(["-r", runtime, "-r", dev])
    install_detectron2()
    pip(["--no-deps", "--no-build-isolation", "-e", ROOT])  # built by the pinned setuptools


def install_newest():
    """The newest versions in the ranges of pyproject.toml, and the detectron2 wheel."""
    say("installing the newest versions that pyproject.toml allows into .venv-newest")
    pip(["--upgrade", "--upgrade-strategy", "eager", "-e", ROOT + "[dev]"])
    install_detectron2()


def install_detectron2():
    """The wheel, unless something of that name is there."""
    if missing_modules(venv_python(), ["detectron2"]):
        pip(DETECTRON2_FLAGS + ["--target", purelib(), "-r", requirement_files()[2]])


def install_missing():
    """Keep the calling Python's detectron2, torch and all else it has; install the rest.

    The project is built with a setuptools of its own: the one that is kept may be too old.
    """
    known = pins()
    missing = missing_modules(venv_python(), [module for module, _ in known])
    wanted = [pin for module, pin in known if module in missing]
    say(
        f"keeping detectron2, torch and what else {sys.executable} has; "
        f"installing what it lacks: {', '.join(wanted) or 'nothing'}"
    )
    pip(["--no-deps", "-e", ROOT])
    if not wanted:
        return
    kept = [pin.split("==")[0] for module, pin in known if module not in missing]
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name + '==' + metadata.version(name))\n"
        "    except metadata.PackageNotFoundError: pass\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        constraints = os.path.join(folder, "kept.txt")
        with open(constraints, "w") as file:
            file.write(output_of(venv_python(), code, *kept) or "")
        pip(["-c", constraints, *wanted])


def purelib():
    """The site-packages folder of ``.venv``."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return (output_of(venv_python(), code) or "").strip()


def pip(arguments):
    """pip install into ``.venv``; its own messages are shown."""
    command = [venv_python(), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    check_call(command, "pip could not install what requirements/ names")


def check_call(command, message):
    """Run a command; a failure becomes a :class:`SetupError`."""
    status = subprocess.call(command)
    if status:
        raise SetupError(f"{message} (exit status {status}, its messages are above)")


def say(text):
    """One line of progress."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
