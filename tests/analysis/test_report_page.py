"""report.html: what is in it, and that a browser shows and sorts it without a network."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest

from projects.kd.analysis import comparison
from projects.kd.analysis.report import METRICS, summarise
from projects.kd.analysis.report_page import curves_of, report_page

SCORES = {"teacher": [50.0], "student": [20.0, 22.0], "student+A": [31.0, 33.0], "b<i>": [9.0, 9.5]}
TOOLS = [shutil.which("chromium"), shutil.which("chromedriver")]


def make_report(points: int = 3) -> dict:
    rows = [
        summarise(
            name,
            [{"AP": value, "AP50": 2 * value} for value in values],
            baseline="student",
            teacher="teacher",
            distilled=name not in ("teacher", "student"),
            curve=[[100 * n, values[0] * n / points] for n in range(1, points + 1)],
            iterations=300,
            seconds_per_run=60.0,
        )
        for name, values in SCORES.items()
    ]
    rows = comparison.compare_rows(rows, "AP")
    return {
        "title": "Shapes & <others>",
        "dataset": "shapes_val",
        "task": "bbox",
        "command": 'compare --only "a<b>"',
        "machine": "a machine",
        "versions": "Python",
        "warnings": [],
        "conclusions": comparison.sentences(rows, "AP"),
        "rows": rows,
        "starts": [],
    }


@pytest.fixture
def page(tmp_path):
    picture = tmp_path / "ap.png"
    cv2.imwrite(str(picture), np.full((30, 40, 3), 200, np.uint8))
    path = tmp_path / "report.html"
    path.write_text(report_page(make_report(), {"Bars": str(picture)}))
    picture.unlink()  # the page must not need it
    return path


def test_all_is_inside_the_page(page):
    text = page.read_text()
    body = text[text.index("<body>") :]
    first = re.search(r"<p[^>]*>(.*?)</p>", body)[1]
    assert first.startswith("student 21.0, distilled (A) 32.0: +11.0 AP, mean of 2 seeds")
    assert "Below student: b&lt;i&gt; 9.2 (-11.8)" in first  # named, and escaped
    assert "<i>" not in text and "Shapes &amp; &lt;others&gt;" in text
    found = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(found), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (30, 40, 3) and (picture == 200).all()
    assert not re.search(r"""(src|href|action)\s*=\s*["'](?!data:|#)""", text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert text.count("<svg") == 1
    for name, value in zip(METRICS, (32.0, 64.0), strict=False):
        assert f">{name}</button>" in text and f'data-value="{value}"' in text


def test_a_teacher_with_nothing_to_teach_comes_first():
    report = make_report() | {"warnings": ["The teacher is not better."]}
    body = report_page(report, {}).split("<body>")[1]
    assert re.search(r"<p[^>]*>(.*?)</p>", body)[1] == "The teacher is not better."


def test_rows_evaluated_once_have_no_curve():
    report = make_report(points=1)
    assert curves_of(report) == {}
    text = report_page(report, {})
    assert "<svg" not in text and "TEST.EVAL_PERIOD" in text
    assert curves_of(make_report())["teacher"] == [[100, 50 / 3], [200, 100 / 3], [300, 50.0]]


class Browser:
    """Chromium through its driver's WebDriver interface."""

    def __init__(self, port: int, folder):
        self.base = f"http://127.0.0.1:{port}"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        options = {"binary": TOOLS[0], "args": flags}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{answer['sessionId']}"

    def ask(self, method: str, path: str, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})


@contextlib.contextmanager
def browser(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [TOOLS[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5):
                    break
            time.sleep(0.05)
        found = Browser(port, folder)
        try:
            yield found
        finally:
            found.ask("DELETE", "")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(None in TOOLS, reason="no chromium and chromedriver on this machine")
def test_a_browser_shows_and_sorts_it(page, tmp_path):
    names = (
        "return [...document.querySelectorAll('#results tbody tr')].map(r => r.cells[0].innerText)"
    )
    click = "document.querySelectorAll('#results th button')[{}].click(); " + names
    with browser(tmp_path / "profile") as chromium:
        chromium.ask("POST", "/url", {"url": page.as_uri()})
        assert chromium.run("return document.images[0].naturalWidth") == 40
        width = "return document.querySelector('#curves svg').getBoundingClientRect().width"
        assert chromium.run(width) > 200
        assert chromium.run("return performance.getEntriesByType('resource').map(r => r.name)"
                            ".filter(name => !name.startsWith('data:'))") == []  # fmt: skip
        assert chromium.run(names) == list(SCORES)
        assert chromium.run(click.format(1)) == ["teacher", "student+A", "student", "b<i>"]
        assert chromium.run(click.format(1)) == ["b<i>", "student", "student+A", "teacher"]
        assert chromium.run(click.format(1)) == list(SCORES)
        assert chromium.run(click.format(0)) == ["b<i>", "student", "student+A", "teacher"]
        heads = chromium.run("return [...document.querySelectorAll('#results th')]"
                             ".map(h => h.innerText.trim())")  # fmt: skip
        order = chromium.run(click.format(heads.index("gain")))
        assert order == ["teacher", "student+A", "b<i>", "student"]  # no gain: last
        wide = "return document.documentElement.scrollWidth <= window.innerWidth"
        assert chromium.run(wide)
        assert chromium.ask("POST", "/se/log", {"type": "browser"}) == []
