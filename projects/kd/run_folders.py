"""Folders and processes of training runs."""

from __future__ import annotations

import os
import subprocess
import textwrap
import time


def move_aside(folder: str) -> str:
    """Rename a folder to the first free ``<folder>.old<n>``; returns that."""
    count = 1
    while os.path.exists(f"{folder}.old{count}"):
        count += 1
    os.rename(folder, f"{folder}.old{count}")
    return f"{folder}.old{count}"


def read_or_none(path: str) -> str | None:
    """Text of a file, None where there is none."""
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return file.read()


def last_line(path: str) -> str:
    """Last line of a file that is not empty."""
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "no output"


def run_quietly(command: list[str], log: str, progress: str, threads: int) -> int:
    """Run with all output in ``log``; show a progress line with ETA about every 15 seconds."""
    shown = time.time()
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with open(log, "a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            for line in process.stdout:
                file.write(line)
                if " eta: " in line and time.time() - shown > 15:
                    shown = time.time()
                    news = textwrap.shorten(line.split(" eta: ")[1], 150, placeholder=" ...")
                    print(f"[{progress}]   {news}", flush=True)
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
