"""`rbm-dist report` on a finished run: what the page says, how it looks in a browser, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rbm_dist import cli, storage
from rbm_dist.config.run import Config
from rbm_dist.graph.splits import TEST
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.newest_checkpoint import newest
from rbm_dist.serve.artifact import load_student
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.predictor import predict
from rbm_dist.sources.facts import source_facts
from rbm_dist.stages.finished import graph_of
from rbm_dist.stages.plan import make_plan, these_hosts
from rbm_dist.stages.report import chosen_epoch, run_facts
from tests.report.test_html import Page


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["rbm-dist", "report", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def changed(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the figures of a run's evaluation, as if they had been written so."""
    figures = json.loads((run / "evaluate/figures.json").read_text())
    change(figures)
    (run / "evaluate/figures.json").write_text(json.dumps(figures))
    manifest = json.loads((run / "evaluate/manifest.json").read_text())
    manifest["files"]["evaluate/figures.json"] = storage.file_info(str(run / "evaluate/figures.json"))
    (run / "evaluate/manifest.json").write_text(json.dumps(manifest))


def test_the_page_has_the_figures_of_the_run(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(monkeypatch, str(copied_run)) == 0
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    content = (copied_run / "report.html").read_text()
    page = Page(content)
    results = json.loads((copied_run / "results.json").read_text())
    rbm = results["students"]["rbm"]
    assert page.table("model", "val")[-1][:4] == [
        "RbM", *(f"{100 * rbm[split]:.1f} %" for split in ("val", "test", "unseen"))
    ]  # fmt: skip
    weights = [expert["rows"] for expert in _experts(page, "1")]
    assert weights == [f"{100 * share:.1f} %" for share in rbm["mixture"]["expert_load"][1]]
    stages = {row[0]: row[1:] for row in page.table("stage")}
    for stage, seconds in results["seconds"].items():
        assert stages[stage][0] == f"{seconds:,.1f} s"
        assert stages[stage][1] != "–", "predicted"
    charts = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert {f"Training of {loop}, {epochs} epochs" for loop, epochs in
            {"teacher": 6, "mlp": 30, "rbm/pretrain": 4, "rbm": 26}.items()} <= charts  # fmt: skip
    for key, value in (("student.top_k", "3"), ("source.kind", "digits"), ("encodings.positional", "fastrp")):
        assert [key, value] in page.table("cluster.cache_mb")
    assert report(monkeypatch, str(copied_run)) == 0, "its like is written over"
    assert (copied_run / "report.html").read_text() == content, "the same page for the same run"


def _experts(page: Page, layer: str) -> list[dict[str, str]]:
    tables = [rows for rows in page.tables if rows[0][:2] == ["expert", "rows"]]
    return [dict(zip(tables[int(layer)][0], row, strict=True)) for row in tables[int(layer)][1:]]


def test_the_accuracy_of_a_class_is_that_of_its_predictions(finished_run: Path) -> None:
    store = graph_of(str(finished_run), "mlp", ("label", "split"))
    student = load_student(str(finished_run / "student" / "mlp"))
    chunks = predict(freeze(student), student.inputs, store)
    found = np.concatenate([chunk.probability_nC.argmax(1) for chunk in chunks])
    label, split = (store.gather(name, np.arange(store.num_nodes)) for name in ("label", "split"))
    classes = json.loads((finished_run / "results.json").read_text())["classes"]
    assert len(classes) == 10
    for cls, figures in enumerate(classes):
        nodes = (label == cls) & (split == TEST)
        assert figures["nodes"] == nodes.sum()
        assert figures["accuracy"]["mlp"] == pytest.approx(np.mean(found[nodes] == cls))


def test_the_chosen_epoch_is_the_one_whose_weights_were_kept(finished_run: Path) -> None:
    facts = run_facts(str(finished_run))
    for loop, folder in {"teacher": "teacher", "mlp": "student/mlp", "rbm": "student/rbm"}.items():
        with newest(str(finished_run / folder / "checkpoints"), Mesh.single()) as found:
            assert found is not None
            assert facts["chosen"][loop] == found.facts["best_epoch"] - 1
    assert chosen_epoch([{"epoch": 0, "loss": 1.0}], by_loss=False) is None
    rows = [{"epoch": epoch, "val_loss": loss, "val_accuracy": 0.5} for epoch, loss in enumerate((3.0, 1.0, 1.0))]
    assert chosen_epoch(rows, by_loss=True) == chosen_epoch(rows, by_loss=False) == 1


def test_runs_of_other_kinds_are_reported(copied_run: Path, memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_rbm(figures: dict[str, Any]) -> None:
        for each in (figures["students"], figures["latency_us"]):
            del each["rbm"]
        del figures["classes"]  # as in a run of an earlier version

    changed(copied_run, without_rbm)
    config = json.loads((copied_run / "config.json").read_text())
    config["source"] = {"kind": "npz", "path": str(copied_run / "gone.npz")}
    (copied_run / "config.json").write_text(json.dumps(config))
    shutil.rmtree(copied_run / "source")
    (copied_run / "metrics.jsonl").unlink()
    assert report(monkeypatch, str(copied_run), "--out", f"{memory_url}/deep/page.html") == 0
    fs, path = storage.filesystem(f"{memory_url}/deep/page.html")
    text = Page(fs.cat_file(path).decode()).text
    for said in (
        "the source cannot be read any more", "gone.npz", "has no student rbm", "made by an earlier version",
        "no metrics.jsonl", "its summary is not there",
    ):  # fmt: skip
        assert said in text
    assert not (copied_run / "report.html").exists()
    config["student"]["no_longer_a_key"] = 1
    (copied_run / "config.json").write_text(json.dumps(config))
    assert report(monkeypatch, str(copied_run)) == 0
    assert "the configuration is another version's" in (copied_run / "report.html").read_text().replace("&#39;", "'")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run), "not a run directory"),
        (lambda run: (run / "evaluate/manifest.json").unlink(), "the run has not finished; run the same"),
        (lambda run: (run / "student/manifest.json").unlink(), "has not finished"),
        (lambda run: (run / "evaluate/figures.json").write_text("{}"), "figures.json: truncated or changed"),
        (lambda run: (run / "source/source.json").write_text("{}"), "source.json: truncated or changed"),
        (lambda run: (run / "student/rbm/model.safetensors").write_bytes(b""), "model.safetensors: truncated"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "a config.json or"),
        (lambda run: (run / "metrics.jsonl").open("a").write('{"loop": "rbm"'), "metrics.jsonl: line 67 is not"),
        (lambda run: (run / "metrics.jsonl").open("a").write("[1]"), "metrics.jsonl: line 67 is not"),
        (lambda run: (run / "evaluate/manifest.json").write_text("{}"), "a config.json or manifest.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_one_error(
    copied_run: Path, damage: Callable[[Path], None], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(copied_run)
    assert report(monkeypatch, str(copied_run), "--out", str(copied_run.parent / "out.html")) == 2
    shown = capsys.readouterr()
    assert said in shown.err.replace("\n", "")
    assert shown.err.count("error:") == 1
    assert shown.out == ""
    assert not (copied_run.parent / "out.html").exists()


def test_only_a_report_is_written_over(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("page.html", "folder"):
        out = tmp_path / name
        out.mkdir() if name == "folder" else out.write_text("<html>mine</html>")
        assert report(monkeypatch, str(finished_run), "--out", str(out)) == 2
        assert f"{out}: would be written over and is not rbm-dist's" in capsys.readouterr().err.replace("\n", "")
    assert (tmp_path / "page.html").read_text() == "<html>mine</html>"
    assert report(monkeypatch, str(finished_run), "--out", f"{tmp_path}/page.html/below.html") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


LOOK = """() => {
  const box = each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] };
  return {
    width: document.documentElement.scrollWidth,
    charts: [...document.querySelectorAll("svg")].map(chart => ({
      name: chart.getAttribute("aria-label"), box: box(chart), marks: chart.querySelectorAll("path, use").length,
      texts: [...chart.querySelectorAll("text")].filter(text => !/rotate\\(-90/.test(text.getAttribute("transform")))
        .map(text => [text.textContent, ...box(text)]),
    })),
    sizes: [...document.querySelectorAll("body *")].filter(each => each.children.length == 0 && each.textContent.trim())
      .map(each => parseFloat(getComputedStyle(each).fontSize)
        * (each.ownerSVGElement ? each.ownerSVGElement.getBoundingClientRect().width
           / each.ownerSVGElement.viewBox.baseVal.width : 1)),
    colours: ["body", "svg text"].map(each => getComputedStyle(document.querySelector(each))[
      each == "body" ? "backgroundColor" : "fill"]),
  } }"""


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_readable_in_a_browser(
    finished_run: Path, tmp_path: Path, browser: Any, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    assert report(monkeypatch, str(finished_run), "--out", str(out)) == 0
    seen = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))  # noqa: B023
        page.on("pageerror", lambda error: said.append(str(error)))  # noqa: B023
        page.on("request", lambda request: said.append(request.url))  # noqa: B023
        page.goto(out.as_uri())
        seen[scheme] = look = page.evaluate(LOOK)
        page.close()
        assert [each for each in said if not each.startswith("data:image/png;base64,")] == [out.as_uri()]
        assert look["width"] <= width, "the page itself does not scroll sideways"
        assert len(look["charts"]) == 13
        for chart in look["charts"]:
            left, top, right, bottom = chart["box"]
            assert right - left > 250, chart["name"]
            assert bottom - top > 90, chart["name"]
            assert chart["marks"] > 5
            assert len(chart["texts"]) > 4
            assert overlapping(chart["texts"]) == [], chart["name"]
            for text, text_left, text_top, text_right, text_bottom in chart["texts"]:
                across = left - 1 <= text_left <= text_right <= right + 1
                down = top - 1 <= text_top <= text_bottom <= bottom + 1
                assert (across, down) == (True, True), f"{chart['name']}: {text} is cut off"
        assert min(look["sizes"]) > 10, "pixels"
    (page_light, ink_light), (page_dark, ink_dark) = seen["light"]["colours"], seen["dark"]["colours"]
    assert brightness(page_light) > 240 > 40 > brightness(ink_light)
    assert brightness(page_dark) < 40 < 200 < brightness(ink_dark)


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    """Pairs of texts of which one covers more than two pixels of the other, both ways."""
    found = []
    for index, (first, left, top, right, bottom) in enumerate(texts):
        for second, other_left, other_top, other_right, other_bottom in texts[:index]:
            across = min(right, other_right) - max(left, other_left)
            down = min(bottom, other_bottom) - max(top, other_top)
            if across > 2 and down > 2:
                found.append((first, second))
    return found


def brightness(colour: str) -> float:
    red, green, blue = (float(each) for each in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (red + green + blue) / 3


def test_a_plan_of_todays_configuration_is_the_commands(finished_run: Path) -> None:
    config = Config.model_validate_json((finished_run / "config.json").read_text())
    plan = make_plan(config, source_facts(config.source, config.seed), these_hosts(str(finished_run), 1, None, None, 0))
    assert run_facts(str(finished_run))["planned"] == {stage.name: stage.seconds for stage in plan.stages}
