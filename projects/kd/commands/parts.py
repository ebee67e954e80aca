"""Commands with parts: ``kd-benchmark icd --boxes 20``; a part is a module, imported when named."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping

from ..errors import ConfigError, did_you_mean, exit_on_user_error


class Parts:
    """One command.

    Args:
        package: whose modules the parts are. Each has ``parse_arguments(argv)`` and ``main(args)``;
            ``args.part`` is the part's name, as one module may serve several.
        description: what all parts have in common, and an example.
        parts: name to module and what the part does, in a few words.
    """

    def __init__(self, package: str, description: str, parts: Mapping[str, tuple[str, str]]):
        self.package, self.description, self.parts = package, description, parts

    def call(self, words):
        """Run a part; returns what its ``main`` does.

        Args:
            words: of the command line: the part's name and its flags.

        Raises:
            ConfigError: no such part, or what the part raises.
        """
        name, *rest = [str(word) for word in words] or [""]
        if name not in self.parts:
            found = f"'{name}' is none of" if name else "name one of"
            raise ConfigError(f"{found} {', '.join(self.parts)}{did_you_mean(name, self.parts)}")
        module = importlib.import_module(f"{self.package}.{self.parts[name][0]}")
        args = module.parse_arguments(rest)
        args.part = name
        return module.main(args)

    def run(self) -> None:
        """What the console script and the file in ``tools`` start."""
        words = sys.argv[1:]
        if words[:1] in (["-h"], ["--help"]):
            print(self.help())
            return
        if words and words[0] in self.parts:
            sys.argv[0] += f" {words[0]}"  # for the usage line of the part
        with exit_on_user_error():
            self.call(words)

    def help(self) -> str:
        """The parts, a line each."""
        program = os.path.basename(sys.argv[0])
        width = max(map(len, self.parts)) + 2
        lines = [f"  {name:{width}}{line}" for name, (_, line) in self.parts.items()]
        usage = f"usage: {program} PART [-h] [options] [KEY VALUE ...]"
        return "\n".join([usage, "", self.description.strip(), "", "parts:", *lines])
