"""The report page: parsed, its figures and pictures checked against the report and the model."""

import base64
import json
import struct
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from cli_models import WORDS, cli, refused
from tiny_models import llama, tokens

from zeroskip.errors import ZeroskipError
from zeroskip.prune import Report, prune
from zeroskip.prune.report import Row
from zeroskip.report import render
from zeroskip.report.chart import HEIGHT, error_chart
from zeroskip.report.masks import masks, png
from zeroskip.report.places import grid, place

HOSTILE = ["</title><script>alert(1)</script>", '" onmouseover="alert(1)', "a&lt;b", "{{ 7 * 7 }}", "<!--"]
SPEED = {"advice": "Do not bother <b>.", "gains": {"1": 1.0, "32": 1.25}, "machine": "<i>CPU</i>"}


def score(value):
    return {"value": value, "tokens": 1234, "context": 16, "dtype": "float32"}


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag, name=None):
        return [found for kind, found in self.tags if kind == tag and (name is None or found.get("class") == name)]


def row(name, sparsity=0.5, error=0.01, before=0.04):
    return Row(name, [1, 8, 16], "2:4", 0.5, sparsity, before, error, 96, 0.25, [])


@pytest.fixture(scope="module")
def pruned():
    model = llama()
    return model, prune(model, "wanda+ls", pattern="2:4", calibration=[tokens()])


def test_the_page_shows_every_site_and_asks_for_nothing(pruned):
    model, report = pruned
    report.quality = {"about": "held.txt", "before": score(18.4), "after": score(None)}
    report.speed = SPEED
    text = render(report, model)
    page = Page(text)
    assert len(page.of("rect", "cell")) == len(report.rows) == 21
    assert len(page.of("circle", "before")) == len(page.of("circle", "after")) == 21
    assert len(page.of("tr")) == 22 and len(page.of("img")) == 2 * 7
    assert not page.of("script") and not page.of("link") and not page.of("iframe") and "url(" not in text
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes[name].startswith("data:image/png") for name in ("src", "href") if name in attributes)
    shown = " ".join(" ".join(page.text).split())
    for expected in ("50.00% zeros in 21 sites", "18.40 → infinite", "held.txt: 1,234 tokens", "1.25x the best dense"):
        assert expected in shown
    assert "Do not bother <b>." in shown and "<i>CPU</i>" in shown and not page.of("i")
    for svg in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")  # well-formed


def test_names_of_layers_cannot_break_out():
    report = Report({"method": HOSTILE[0], "seed": 0}, [row(f"layers.{at}.{name}") for at, name in enumerate(HOSTILE)])
    report.rows[0].notes = ["<script>alert(2)</script>"]
    report.skipped = {"<img src=x onerror=alert(3)>": "<svg onload=alert(4)>"}
    report.quality = {"problem": "<script>alert(5)</script>"}
    page = Page(render(report))
    clean = Page(render(Report({"method": "a"}, [row(f"layers.{at}.b") for at in range(5)])))
    assert not page.of("script") and not page.of("img") and len(page.of("svg")) == len(clean.of("svg")) == 2
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = "".join(page.text)
    assert all(name in shown for name in HOSTILE) and "<script>alert(5)</script>" in shown


def test_a_report_without_errors_or_rows_still_has_a_page():
    assert error_chart(grid([row("a", error=None, before=None), row("b", error=0.0, before=0.0)])) is None
    assert len(Page(render(Report({}, [row("0", error=None, before=None)]))).of("rect", "cell")) == 1
    assert "0.00%" in render(Report({}))


def test_places():
    assert place("model.layers.3.self_attn.q_proj") == ("model.layers.3", "self_attn.q_proj")
    assert place("layers.0.experts.11.up") == ("layers.0", "experts.*.up")
    assert place("head.out") == ("", "head.out") and place("2") == ("2", "")
    rows = [row("a.0.e.0", 0.25), row("a.0.e.1", 0.75), row("a.1.e.0", 1.0), row("out", 0.0)]
    found = grid(rows)
    assert (found.blocks, found.kinds) == (["a.0", "a.1", ""], ["e.*", "out"])
    assert [(cell.row, cell.column, cell.sparsity) for cell in found.cells] == [(0, 0, 0.5), (1, 0, 1.0), (2, 1, 0.0)]
    assert "and 1 more" in found.cells[0].title


def test_errors_stand_on_a_logarithmic_scale():
    chart = error_chart(grid([row("a.0.q", error=0.001, before=0.1), row("a.1.q", error=0.01, before=0.01)]))
    (line,) = chart.lines
    assert [y for _, y, _ in line.before] == [0.0, HEIGHT / 2] and [y for _, y, _ in line.after] == [HEIGHT, HEIGHT / 2]
    assert line.after[0][0] < line.after[1][0]
    assert [tick.text for tick in chart.up] == ["0.001", "0.01", "0.1"]


def pixels(data):
    """Decode a grey PNG of ours."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (size,), tag = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        parts[tag] = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(tag + parts[tag])
        at += 12 + size
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    lines = torch.frombuffer(bytearray(zlib.decompress(parts[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_pictures_show_the_zeros_that_are_there(pruned):
    model, report = pruned
    found = {mask.name: mask for mask in masks(model, report.rows)}
    assert set(found) == {row.name for row in report.rows if ".1." in row.name}  # the middle one of each kind
    weight = model.model.layers[1].mlp.up_proj.weight
    mask = found["model.layers.1.mlp.up_proj"]
    for uri, expected in ((mask.whole, weight != 0), (mask.corner, weight[:48] != 0)):
        assert torch.equal(pixels(base64.b64decode(uri.split(",")[1])) == 0, expected)
    wide = torch.nn.Linear(400, 200)
    wide.weight.data = torch.ones(200, 400).index_fill_(0, torch.arange(100), 0.0)
    (picture,) = masks(torch.nn.ModuleDict({"w": wide}), [row("w")])
    grey = pixels(base64.b64decode(picture.whole.split(",")[1]))
    assert grey.shape == (96, 192) and (grey[:47] == 255).all() and (grey[49:] == 0).all()
    assert masks(torch.nn.Identity(), [row("gone")]) == []
    assert pixels(png(torch.arange(6, dtype=torch.uint8).view(2, 3))).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_report_comes_back_from_json(pruned):
    report = Report({"method": "a"}, [row("a")], {"b": "c"}, 1.5, {"problem": "none"}, SPEED)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    old = report.to_dict()
    del old["quality"], old["speed"]  # as written before there were any
    assert Report.from_dict(old).quality is None
    assert "perplexity not measured: none" in str(report) and "speed: Do not bother" in str(report)


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": None},
        {"rows": [{"name": "a"}]},
        {"rows": [row("a").__dict__ | {"shape": []}]},
        {"rows": [row("a").__dict__ | {"sparsity_asked": "half"}]},
        {"rows": [row("a").__dict__ | {"permuted": {"with": 3}}]},
        {"seconds": None},
        {"seconds": float("nan")},
        {"skipped": ["a"]},
        {"quality": {"about": "a text"}},
        {"speed": {}},
        {"budget": {"name": "owl"}},
    ],
)
def test_what_was_no_report_is_refused_in_one_line(damage):
    report = Report({"method": "a"}, [row("a")], {"b": "c"}, 1.5, {"problem": "none"}, SPEED)
    with pytest.raises(ZeroskipError, match="the report is damaged") as caught:
        Report.from_dict(report.to_dict() | damage)
    assert "\n" not in str(caught.value)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    report = Report({}, [row("a")])
    path = tmp_path / "report.html"
    report.html(path)
    before = path.read_text()
    with pytest.raises(ZeroskipError, match="cannot be written"):
        report.html(tmp_path / "absent" / "report.html")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ZeroskipError, match="No space left"):
        Report({}, [row("b")]).html(path)
    assert path.read_text() == before and [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_prune_writes_both_files(decoder, tmp_path, monkeypatch, short_races):
    from zeroskip.calibrate import text as room

    monkeypatch.setattr(room, "ROWS", 2)
    text = tmp_path / "long.txt"
    text.write_text(" ".join(WORDS * 10))
    out = tmp_path / "out"
    result = cli("prune", decoder, out, "--pattern", "2:4", "--text", text, "--json", tmp_path / "again.json")
    assert result.exit_code == 0, result.output
    told = json.loads((out / "report.json").read_text())
    assert told == json.loads((tmp_path / "again.json").read_text())
    assert "5 windows of long.txt that did not calibrate" in told["quality"]["about"]
    assert told["quality"]["after"]["tokens"] == 5 * 63 and told["quality"]["after"] != told["quality"]["before"]
    assert told["speed"]["advice"] in result.stdout and set(told["speed"]["gains"]) == {"1", "32", "512"}
    assert len(Page((out / "report.html").read_text()).of("img")) == 14


def test_perplexity_is_that_of_fp32_as_eval_measures_it(decoder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(decoder).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "half")
    (tmp_path / "held.txt").write_text(" ".join(WORDS * 10))
    asked = ("--method", "magnitude", "--pattern", "2:4", "--no-speed", "--eval-text", tmp_path / "held.txt")
    assert cli("prune", tmp_path / "half", tmp_path / "out", *asked).exit_code == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())["quality"]
    for model, when in (("half", "before"), ("out", "after")):
        where = ("--text", tmp_path / "held.txt", "--context", 64, "--json", tmp_path / "eval.json")
        assert cli("eval", tmp_path / model, *where).exit_code == 0
        found = json.loads((tmp_path / "eval.json").read_text())["perplexity"]
        assert found["nll"] == pytest.approx(told[when]["nll"], rel=1e-12) and told[when]["dtype"] == "float32"


def test_perplexity_is_measured_on_the_text_that_was_given(decoder, tmp_path):
    text, held = tmp_path / "a.txt", tmp_path / "held.json"
    text.write_text(" ".join(WORDS))
    held.write_text(json.dumps([" ".join(reversed(WORDS))] * 3))
    asked = ("--pattern", "2:4", "--text", text, "--no-speed")
    assert cli("prune", decoder, tmp_path / "one", *asked).exit_code == 0
    assert "this flatters" in json.loads((tmp_path / "one" / "report.json").read_text())["quality"]["about"]
    assert cli("prune", decoder, tmp_path / "none", *asked, "--no-quality").exit_code == 0
    assert json.loads((tmp_path / "none" / "report.json").read_text())["quality"] is None
    more = ("--eval-text", held, "--eval-context", 16)
    assert cli("prune", decoder, tmp_path / "two", *asked, *more).exit_code == 0
    assert cli("eval", tmp_path / "two", "--text", held, "--context", 16, "--json", tmp_path / "e.json").exit_code == 0
    told = json.loads((tmp_path / "two" / "report.json").read_text())
    value = json.loads((tmp_path / "e.json").read_text())["perplexity"]["value"]
    assert told["quality"]["after"]["value"] == pytest.approx(value, rel=1e-6) and told["speed"] is None


def test_what_cannot_be_measured_is_refused_first_or_said_later(decoder, encoder, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    asked = ("--method", "magnitude", "--pattern", "2:4", "--no-speed")
    assert "no causal language model" in refused("prune", encoder, out, *asked, "--eval-text", text)
    assert "leave it out" in refused("prune", decoder, out, *asked, "--eval-context", 8)
    assert "context is 99" in refused("prune", decoder, out, *asked, "--eval-text", text, "--eval-context", 99)
    assert not list(tmp_path.iterdir())
    from zeroskip.quality import judge

    scored, calls = judge.score, []

    def once(*given):
        calls.append(given)
        if len(calls) > 1:
            raise ZeroskipError("the model returns NaN")
        return scored(*given)

    monkeypatch.setattr(judge, "score", once)
    assert cli("prune", decoder, out, *asked, "--eval-text", text).exit_code == 0
    assert json.loads((out / "report.json").read_text())["quality"]["problem"] == "the model returns NaN"
    assert "was not measured: the model returns NaN" in (out / "report.html").read_text()
