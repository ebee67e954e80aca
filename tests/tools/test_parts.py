"""Commands with parts, and what is said to old names."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from projects.kd.commands import benchmark, convert, evaluate, visualize
from projects.kd.errors import ConfigError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COMMANDS = {
    "benchmark": benchmark,
    "convert": convert,
    "evaluate": evaluate,
    "visualize": visualize,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_are_listed_and_a_wrong_one_is_one_line(name, monkeypatch, capsys):
    command = COMMANDS[name]
    folder = Path(command.__file__).parent
    for part, (module, _) in command.PARTS.parts.items():
        assert (folder / f"{module}.py").is_file(), part
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "-h"])
    command.run()
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: {name}.py PART")
    assert all(f"\n  {part} " in printed for part in command.PARTS.parts)
    first = next(iter(command.PARTS.parts))
    with pytest.raises(ConfigError, match=f"'{first}x' is none of .*did you mean {first}"):
        command.PARTS.call([f"{first}x"])
    with pytest.raises(ConfigError, match="^name one of "):
        command.PARTS.call([])
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "--task"])
    with pytest.raises(SystemExit) as end:
        command.run()
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_old_names_lead_to_one_line():
    names = runpy.run_path(str(TOOLS / "moved.py"))["NOW"]
    links = [path for path in TOOLS.parent.glob("*/*.py") if path.is_symlink()]
    assert {path.stem for path in links} == set(names)
    assert all(path.resolve() == TOOLS / "moved.py" for path in links)
    for now in names.values():
        if now.startswith("python tools/"):
            script, part = now.split()[1:3]
            assert part in COMMANDS[Path(script).stem].PARTS.parts
    done = subprocess.run(
        [sys.executable, "tools/visualize_sizes.py", "--dataset", "x"],
        cwd=TOOLS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    line = "error: tools/visualize_sizes.py is now python tools/visualize.py sizes, see -h\n"
    assert done.stderr == line
