"""`prorl report` on a real run and a real evaluation of three of its models, and in a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from run_folder import make_run, write_rows
from toy_run import SYSTEM, Ended, Start

from megatron_prorl.report.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: Debian's package chromium")

SUITE = {
    "description": "divisors, and what training has not",
    "problems_per_task": 40,
    "system_prompt": SYSTEM,
    "tasks": [
        {"task": "gcd", "params": {"min_value": 2, "max_value": 20}, "difficulty": {"largest number": 20}},
        {
            "task": "gcd",
            "name": "wide",
            "params": {"min_value": 2, "max_value": 60},
            "difficulty": {"largest number": 60},
            "out_of_distribution": True,
        },
        {"task": "lcm", "params": {"min_value": 2, "max_value": 15}, "out_of_distribution": True},
    ],
}
MINUTES = 10  # from three models to the report


def prorl_report(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_prorl.cli", "report", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.timeout(1800)
def test_a_run_and_three_of_its_models_are_one_page(whole_run: Ended, toy_model: Path, tmp_path: Path) -> None:
    assert whole_run.code == 0, whole_run.err
    run, out, suite = whole_run.run_dir, tmp_path / "eval", tmp_path / "divisors.yaml"
    suite.write_text(yaml.safe_dump(SUITE))
    script = tmp_path / "prorl.py"
    script.write_text("import sys\nfrom megatron_prorl.cli import main\nsys.exit(main())\n")
    models = {
        "base": toy_model,
        "mid": run / "checkpoints" / "step-000002",
        "final": run / "checkpoints" / "step-000006",
    }
    words = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    words += ["--samples", "16", "--max-tokens", "24", "--device", "cpu", "--out", str(out)]

    started = time.monotonic()
    with Start({"run_dir": str(out)}, "eval", str(suite), *words, script=script) as evaluation:
        ended = evaluation.ended()
    assert ended.code == 0, ended.err
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The greatest common divisor is <answer>1</answer>.")
    done = prorl_report(str(run), str(out), "--corpus", str(corpus), "--out", str(tmp_path / "report"))
    assert time.monotonic() - started < MINUTES * 60
    assert (done.returncode, done.stderr) == (0, "")

    page = tmp_path / "report" / "report.html"
    assert done.stdout.strip() == str(page)
    titles = re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert titles[:2] == ["Run", "Learning"]
    assert titles[-8:] == [
        *("pass@k", "Regimes", "Gain against the base model", "Shift of pass@1", "Difficulty of gcd"),
        *("Out of distribution", "Length", "Creativity index"),
    ]
    results = json.loads((out / "results.json").read_text())
    for task in results["suite"]["tasks"]:
        found = results["models"]["base"]["tasks"][task]
        assert found["pass_at_k"][0]["mean"] == pytest.approx(sum(found["correct"]) / 16 / 40)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3,000 steps."""
    rng, run = random.Random(0), make_run(tmp_path_factory.mktemp("long") / "run")
    rows = []
    for step in range(1, 3001):
        row = {
            "step": step,
            "reward/mean": 1 - math.exp(-step / 900) + rng.gauss(0, 0.02),
            "policy/entropy": 0.5 + rng.gauss(0, 0.05),
            "policy/kl_reference": 1e-4 * (step % 300),
            "policy/clip_low_fraction": abs(rng.gauss(1e-3, 1e-4)),
            "policy/clip_high_fraction": abs(rng.gauss(1e-3, 1e-4)),
            "policy/grad_norm": 0.3,
            "policy/learning_rate": 2e-6,
            "rollout/response_tokens_mean": 2000 + step + rng.gauss(0, 100),
            "rollout/truncated_fraction": 0.04,
            "rollout/no_answer_fraction": 0.01,
            "rollout/groups_drawn": 400.0,
            "rollout/groups_dropped_all_0": float(rng.randint(50, 90)),
            "rollout/groups_dropped_all_1": float(rng.randint(20, 50)),
            "mismatch/logprob_diff_mean": 0.01,
            "mismatch/logprob_diff_max": 2.0,
            "time/step": 700.0,
            "time/collect": 500.0,
            "time/update": 200.0,
            "reset/happened": float(step % 300 == 0),
            "stage": float(step // 1000),
        }
        domains = ("math", "code", "stem", "logic", "instruction")
        row |= {f"domain/{name}/reward": 0.5 + rng.gauss(0, 0.1) for name in domains}
        rows.append(row | ({"validation/reward": 0.5} if step % 50 == 0 else {}))
    write_rows(run / "metrics.jsonl", rows)
    return run


def test_a_run_of_3000_steps_takes_seconds(long_run: Path) -> None:
    """Processor time, for other work may share the machine: 3 s on a Xeon."""
    began = time.process_time()
    page = report([str(long_run)])
    assert time.process_time() - began < 10.0
    assert page.stat().st_size < 5_000_000


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_answers_to_the_pointer(long_run: Path, tmp_path: Path, width: int) -> None:
    """No sideways scrolling, values under the pointer, a closer look where it was dragged, and back again."""
    html = report([str(long_run)], str(tmp_path / "out")).read_text()
    # Runs after the page's own script, in a frame, for a browser's window does not get as narrow as a phone's.
    probe = """<script>
      const said = {errors: window.failed, width: document.documentElement.scrollWidth, inner: innerWidth};
      const figure = document.querySelector("figure"), svg = figure.querySelector("svg");
      const box = svg.getBoundingClientRect();
      const point = (type, share) => svg.dispatchEvent(new PointerEvent(type, {bubbles: true, pointerType: "mouse",
        pointerId: 1, clientX: box.left + share * box.width, clientY: box.top + box.height / 2}));
      svg.setPointerCapture = () => {};
      const curve = () => svg.querySelector('[id="reward:0:mean"] path').getAttribute("d");
      const last = [...document.querySelectorAll("figure")].at(-2).querySelector("svg");
      said.before = curve();
      point("pointermove", 0.5);
      said.tip = figure.querySelector(".tip").hidden ? null : figure.querySelector(".tip").textContent;
      point("pointerdown", 0.4); point("pointermove", 0.6); point("pointerup", 0.6);
      said.zoomed = curve();
      said.ticks = [...svg.querySelectorAll("text.zoomed")].map(node => node.textContent);
      said.together = last.querySelectorAll("text.zoomed").length;
      svg.dispatchEvent(new MouseEvent("dblclick"));
      said.after = curve();
      const finger = type => svg.dispatchEvent(new PointerEvent(type, {bubbles: true, pointerType: "touch",
        clientX: box.left + box.width / 2, clientY: box.top + box.height / 2}));
      finger("pointerdown"); finger("pointerup"); finger("pointerleave");
      said.touched = figure.querySelector(".tip").textContent;
      said.shown = !figure.querySelector(".tip").hidden;
      document.body.dispatchEvent(new PointerEvent("pointerdown", {bubbles: true, pointerType: "touch"}));
      said.hidden = figure.querySelector(".tip").hidden;
      parent.postMessage(JSON.stringify(said), "*");
    </script>"""
    start = "<script>window.failed = []; onerror = message => { failed.push(message); };</script>"
    page = tmp_path / "probe.html"
    page.write_text(html.replace("<head>", "<head>" + start, 1).replace("</body>", probe + "</body>", 1))
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title></title><script>onmessage = event => { document.title = event.data; };</script>"
        f'<iframe src="probe.html" width="{width}" height="2000" style="border: 0"></iframe>'
    )
    dom = browser("--window-size=1600,2100", "--dump-dom", frame)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    said = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert said["errors"] == []
    assert said["width"] == said["inner"] == width
    # The axes go from 44 to 350 of the picture's 360: step 1,333 is in its middle, with a reward of about 0.77.
    found = re.fullmatch(r"step ([\d,]+)(0\.\d+)", said["tip"])
    assert found is not None, said["tip"]
    assert 1300 < int(found[1].replace(",", "")) < 1370
    assert float(found[2]) == pytest.approx(0.77, abs=0.08)
    assert said["zoomed"] != said["before"] and said["after"] == said["before"]
    steps = [int(tick.replace(",", "")) for tick in said["ticks"] if tick != "step"]
    assert len(steps) > 2 and min(steps) >= 980 and max(steps) <= 1700
    assert said["together"] > 2
    assert said["touched"] == said["tip"] and said["shown"] and said["hidden"]


@needs_chromium
def test_the_page_prints_and_shows(long_run: Path, tmp_path: Path) -> None:
    page = report([str(long_run)], str(tmp_path / "out"))
    picture, pdf = tmp_path / "page.png", tmp_path / "page.pdf"
    browser("--window-size=390,2000", f"--screenshot={picture}", page)
    browser("--no-pdf-header-footer", f"--print-to-pdf={pdf}", page)
    assert pdf.read_bytes().startswith(b"%PDF")
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    assert (0x00, 0x72, 0xB2) in colours  # a curve is there


def browser(*words: str | Path) -> str:
    """A headless browser's standard output; the last word is the page."""
    *options, page = words
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--hide-scrollbars", "--virtual-time-budget=5000", *map(str, options), Path(page).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
