"""Files by name: configs and weights from paths or the model zoo."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import BinaryIO
from urllib.parse import urlparse

from .errors import ConfigError
from .moved_configs import moved

MODEL_ZOO_PREFIX = "model_zoo://"
SCRIPT_PREFIX = "torchscript://"
_ZOO_WEIGHT_PREFIXES = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
_PLAIN_PATH = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)


def resolve_config(name: str, key: str = "--config-file") -> str:
    """Turn a path or a ``model_zoo://`` name into a file path.

    Args:
        name: path of a ``.yaml``/``.py`` file (see :func:`find_shipped`), or ``model_zoo://`` plus
            a path in detectron2's ``configs`` folder.
        key: the config key or flag that holds ``name``, for the error message.

    Raises:
        ConfigError: nothing at that place.
    """
    if not name:
        raise ConfigError(f"{key} is empty: give a config file")
    if name.startswith(MODEL_ZOO_PREFIX):
        relative = name[len(MODEL_ZOO_PREFIX) :]
        path = os.path.join(zoo_config_folder(), relative)
        if not os.path.isfile(path):
            raise ConfigError(f"{key}: detectron2's model zoo has no config '{relative}'")
        return path
    path = find_shipped(expand(name))
    if not os.path.isfile(path):
        raise ConfigError(f"{key}: no such file '{name}'{_where(name)}{moved(path)}")
    return path


# names that configs hold -> the folder of the config, where they were looked for first
_LOOKED_IN: dict[str, str] = {}


def beside(name: str, folder: str) -> str:
    """A relative name as ``_BASE_`` is read: the path in ``folder`` if there is such a file.

    Args:
        name: of a file; addresses and what stands behind a "?" stay as they are.
        folder: of the config that holds it.

    Returns:
        The path, or ``name`` unchanged, which is then relative to the working directory.
    """
    if name.startswith(SCRIPT_PREFIX):  # a path stands behind it
        return SCRIPT_PREFIX + beside(name[len(SCRIPT_PREFIX) :], folder)
    plain = expand(name.partition("?")[0])
    if "://" in name or os.path.isabs(plain):
        return name
    path = os.path.normpath(os.path.join(folder, plain))
    if os.path.isfile(path):
        return path + "".join(name.partition("?")[1:])
    _LOOKED_IN[name] = folder
    return name


def _where(name: str) -> str:
    """The two places of a missing file whose relative name stands in a config."""
    if name not in _LOOKED_IN:
        return ""
    folder = os.path.abspath(_LOOKED_IN[name])
    return f", neither in the config's folder {folder} nor in the working directory {os.getcwd()}"


def shipped_configs() -> str:
    """The folder of the configs that come with this package.

    In a checkout the package holds a link to ``configs``, in a wheel the files themselves.
    """
    return os.path.realpath(os.path.join(os.path.dirname(__file__), "configs"))


def find_shipped(path: str) -> str:
    """A path that begins with ``configs/``: of the shipped file, unless the path itself exists."""
    first, _, rest = os.path.normpath(path).partition(os.sep)
    shipped = os.path.join(shipped_configs(), rest)
    return shipped if first == "configs" and not os.path.exists(path) else path


def zoo_config_folder() -> str:
    """The folder of the model zoo's configs inside the installed detectron2."""
    return os.path.join(str(resources.files("detectron2.model_zoo")), "configs")


def is_zoo_config(path: str) -> bool:
    """Whether ``path`` is a config of the installed model zoo, or a byte-identical copy of one."""
    folder = os.path.realpath(zoo_config_folder())
    if os.path.realpath(path).startswith(folder + os.sep):
        return True
    for root, _, names in os.walk(folder):
        if os.path.basename(path) in names:
            if filecmp.cmp(os.path.join(root, os.path.basename(path)), path, shallow=False):
                return True
    return False


def published_weights(config_name: str, named: str, opts: Sequence = ()) -> str:
    """Weights of a detector that somebody else's config describes.

    A ``model_zoo://`` config names where its training starts; the zoo publishes what it ended in,
    and that is what is meant unless overrides name other weights.

    Args:
        config_name: path or ``model_zoo://`` name.
        named: MODEL.WEIGHTS of the config.
        opts: overrides of the config, ``[KEY, VALUE, ...]``.
    """
    words = {str(word).partition("=")[0] for word in opts}
    own = words & {"MODEL.WEIGHTS", "train.init_checkpoint"}
    if not config_name.startswith(MODEL_ZOO_PREFIX) or own:
        return named
    from detectron2.model_zoo.model_zoo import _ModelZooUrls

    stem = os.path.splitext(config_name[len(MODEL_ZOO_PREFIX) :])[0]
    suffix = _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.get(stem)
    return named if suffix is None else _ModelZooUrls.S3_PREFIX + stem + "/" + suffix


def split_query(name: str) -> tuple[str, str]:
    """Split a name of weights at its "?": the name, and the query ("" if there is none).

    detectron2 takes ``?matching_heuristics=True`` after the name. A file whose own name holds a
    "?" is found first.
    """
    if "://" not in name and os.path.isfile(expand(name)):
        return name, ""
    name, _, query = name.partition("?")
    return name, query


def expand(name: str) -> str:
    """A path with ``~`` and ``$VAR`` filled in."""
    return os.path.expandvars(os.path.expanduser(name))


def resolve_weights(name: str, key: str = "MODEL.WEIGHTS") -> str:
    """Turn a path or URL of weights into a local file, downloading through detectron2's cache.

    Args:
        name: may hold ``~`` and ``$VAR``, and end in a query (:func:`split_query`).
        key: the config key or flag that holds ``name``, for the error message.

    Raises:
        ConfigError: missing, or not downloadable; names the file and where to put it.
    """
    name = split_query(name)[0]
    if "://" not in name:
        path = expand(name)
        if not os.path.isfile(path):
            raise ConfigError(f"{key}: {_why_missing(name, path)}")
        return path
    from detectron2.utils.file_io import PathManager

    try:
        return PathManager.get_local_path(name)
    except Exception as error:
        wanted = _cache_path(name)
        raise ConfigError(
            f"{key}: '{name}' could not be downloaded ({type(error).__name__}); "
            f"fetch it elsewhere and put it at {wanted}, or set {key} to a local file"
        ) from error


def _why_missing(name: str, path: str) -> str:
    if os.path.isdir(path):
        inside = sorted(n for n in os.listdir(path) if n.endswith((".pth", ".pkl", ".safetensors")))
        hint = f", {inside[-1]} for example" if inside else ""
        return f"'{name}' is a folder, name a file of weights in it{hint}"
    unset = [x.strip("{}") for x in re.findall(r"\$(\w+|\{[^}]*\})", path)]
    hint = f" (the environment variable {unset[0]} is not set)" if unset else ""
    return f"no such file '{name}'{hint}{_where(name)}"


def _cache_path(url: str) -> str:
    """Where iopath's URL cache expects the file of ``url``."""
    from detectron2.utils.file_io import Detectron2Handler
    from iopath.common.file_io import get_cache_dir

    for prefix in _ZOO_WEIGHT_PREFIXES[:1]:
        if url.startswith(prefix):
            url = Detectron2Handler.S3_DETECTRON2_PREFIX + url[len(prefix) :]
    return os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))


def is_zoo_file(name: str) -> bool:
    """Whether ``name`` is the address of a file that detectron2 publishes, in its one plain form.

    An address with ``..``, an empty part, a query or anything that a server or a cache may read in
    another way is nobody's: its place in the cache could be any file of this machine.
    """
    return any(
        name.startswith(prefix) and _PLAIN_PATH.fullmatch(name[len(prefix) :])
        for prefix in _ZOO_WEIGHT_PREFIXES
    )


def may_unpickle(name: str, path: str, key: str, allow_pickle: bool) -> bool:
    """Whether a file that runs code when it is read may be read.

    Yes with KD.ALLOW_PICKLE, and for the model zoo's own addresses (:func:`is_zoo_file`). The zoo
    writes the start of a file's MD5 into its name (``model_final_971ab9.pkl``), which has to hold.

    Args:
        name: as the config gives it, without a query.
        path: the local file.
        key: the config key or flag that holds ``name``, for the error message.
        allow_pickle: the value of KD.ALLOW_PICKLE.

    Raises:
        ConfigError: a file under a zoo address that is not the zoo's.
    """
    if allow_pickle:
        return True
    if not is_zoo_file(name):
        return False
    expected = re.search(r"_([0-9a-f]{6})\.pkl$", name)
    if expected:
        digest = hashlib.md5(usedforsecurity=False)
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        found = digest.hexdigest()[:6]
        if found != expected[1]:
            raise ConfigError(
                f"{key}: {path} is not the model zoo's file: its MD5 begins with {found}, that of "
                f"'{name}' with {expected[1]}; remove it, so that it is downloaded again"
            )
    return True


def require_pickles(names: Iterable[str], key: str, allow_pickle: bool) -> None:
    """ConfigError for pickle files, named by the config key ``key``, that may not be read."""
    for name in names:
        path = name if "://" not in name else resolve_weights(name, key)
        if not may_unpickle(name, path, key, allow_pickle):
            raise ConfigError(
                f"{key}: '{name}' is a pickle file, reading it runs code from the file; set "
                "KD.ALLOW_PICKLE True if you trust it"
            )


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """Binary file for writing that replaces ``path`` once it is complete and on the disk."""
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise
    os.replace(partial, path)
    handle = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name as well
    finally:
        os.close(handle)


def write_atomically(path: str, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half."""
    temporary = partial_name(path)
    with open(temporary, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)
    os.replace(temporary, path)


def partial_name(path: str) -> str:
    """Where :func:`write_atomically` writes first."""
    return f"{path}.tmp{os.getpid()}"


def writable_folder(path: str, key: str) -> str:
    """Make a folder to write to, unless it is there; returns ``path``.

    Args:
        path: the folder.
        key: the config key or flag that holds it, for the message.

    Raises:
        ConfigError: it cannot be made, or no file can be made in it.
    """
    start = f"{key} " if key else ""
    if not path:
        raise ConfigError(f"{start}is empty: name a folder to write to")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))  # a full disk takes empty files
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{start}'{path}': the folder cannot be written: {reason}") from error
    return path


def writable_file(path: str, key: str) -> str:
    """:func:`writable_folder` for the folder of a file that is to be written.

    Raises:
        ConfigError: also where ``path`` is a folder, or a file that must not be changed.
    """
    start = f"{key} " if key else ""
    if not path or os.path.isdir(path):
        raise ConfigError(f"{start}'{path}' is a folder or empty: name a file to write")
    if os.path.exists(path):  # a device like /dev/null may lie where no file can be made
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{start}'{path}': the file cannot be changed")
        return path
    writable_folder(os.path.dirname(os.path.abspath(path)), key)
    return path
