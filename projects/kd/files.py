"""Files by name: configs and weights from paths or the model zoo."""

from __future__ import annotations

import filecmp
import os
import tempfile
from importlib import resources
from urllib.parse import urlparse

from .errors import ConfigError

MODEL_ZOO_PREFIX = "model_zoo://"
_ZOO_WEIGHT_PREFIXES = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")


def resolve_config(name: str, key: str = "--config-file") -> str:
    """Turn a path or a ``model_zoo://`` name into a file path.

    Args:
        name: path of a ``.yaml``/``.py`` file, or ``model_zoo://`` plus a path in detectron2's
            ``configs`` folder.
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
    path = os.path.expandvars(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise ConfigError(f"{key}: no such file '{name}'")
    return path


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


def zoo_weights_url(config_name: str) -> str | None:
    """The weights URL that detectron2's model zoo gives for a ``model_zoo://`` config, or None."""
    from detectron2.model_zoo.model_zoo import _ModelZooUrls

    stem = os.path.splitext(config_name[len(MODEL_ZOO_PREFIX) :])[0]
    suffix = _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.get(stem)
    return None if suffix is None else _ModelZooUrls.S3_PREFIX + stem + "/" + suffix


def resolve_weights(name: str, key: str = "MODEL.WEIGHTS") -> str:
    """Turn a path or URL of weights into a local file, downloading through detectron2's cache.

    Raises:
        ConfigError: missing, or not downloadable; names the file and where to put it.
    """
    if "://" not in name:
        path = os.path.expandvars(os.path.expanduser(name))
        if not os.path.isfile(path):
            raise ConfigError(f"{key}: no such file '{name}'")
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


def _cache_path(url: str) -> str:
    """Where iopath's URL cache expects the file of ``url``."""
    from detectron2.utils.file_io import Detectron2Handler
    from iopath.common.file_io import get_cache_dir

    for prefix in _ZOO_WEIGHT_PREFIXES[:1]:
        if url.startswith(prefix):
            url = Detectron2Handler.S3_DETECTRON2_PREFIX + url[len(prefix) :]
    return os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))


def is_zoo_file(name: str) -> bool:
    """Whether ``name`` is weights published by detectron2 (or its ImageNet initialisations)."""
    return name.startswith(_ZOO_WEIGHT_PREFIXES)


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
        with tempfile.TemporaryFile(dir=path):
            pass
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
