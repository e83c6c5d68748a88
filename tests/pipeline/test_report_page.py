import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from cvft.retrieval import rank_matches
from pipeline.report.contents import DataSummary, TransportExample
from pipeline.report.page import build_report, recall_rows

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements close as they opened, and collects text and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def images(index):
    return np.full((14, 77, 3), index, dtype=np.uint8), np.full((32, 32, 3), index, dtype=np.uint8)


def summary(**changes):
    fields = {
        "layout": "cvusa",
        "manifest_digest": "0123456789abcdef",
        "pairs": {"train": 1234, "val": 12},
        "num_shards": 3,
        "num_bytes": 5_500_000,
    }
    return DataSummary(**{**fields, **changes})


def write(out_dir, *, num_queries=12, title="A town", **changes):
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(num_queries, 8, generator=generator), dim=1)
    reference = torch.nn.functional.normalize(query + 0.4 * torch.randn(num_queries, 8, generator=generator), dim=1)
    arguments = {"data": summary(), "history": [], "result": rank_matches(query, reference), "num_examples": 1}
    files = build_report(out_dir, title=title, images=images, **{**arguments, **changes})
    html = files.html.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return files, html, page, " ".join(" ".join(page.text).split())


def full(out_dir):
    plan = np.random.default_rng(0).random((64, 64)) ** 20
    degrees = np.random.default_rng(1).random((12, 2)) / 100
    return write(
        out_dir,
        data=summary(problems={"truncated": 7}, locations_deg={"train": degrees + 45, "val": degrees + 45.02}),
        history=[{"epoch": 1, "loss": 2.0, "recall_at_1": 0.1}, {"epoch": 2, "loss": 1.0, "recall_at_1": 0.5}],
        locations_m=np.random.default_rng(2).random((12, 3)) * 900,
        transports=[TransportExample(index=4, plan=plan, source_grid=(8, 8), target_grid=(8, 8))],
        facts={"commit": "abc123"},
    )


def test_page_needs_nothing_but_itself(tmp_path):
    files, html, page, _ = full(tmp_path)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?://|//cdn|@import|url\(", html)
    assert "script" not in page.tags
    for address in page.addresses:
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).verify()
    assert [path.name for path in files.pngs] == [
        "locations.png", "training.png", "recall_at_k.png", "confusion_by_distance.png",
        "best_1.png", "worst_1.png", "transport_1.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.pngs)


def test_page_states_the_numbers_it_was_given(tmp_path):
    _, _, _, text = full(tmp_path)
    for words in ("pairs in train 1,234", "excluded: truncated 7", "0123456789abcdef", "3, 5.5 MB", "commit abc123"):
        assert words in text
    assert "For recall@1 % k is int(N / 100) + 1, as in the paper's code: here 1." in text
    assert "positions on average" in text


def test_one_query_without_history_locations_or_transport_still_makes_a_page(tmp_path):
    files, _, _, text = write(tmp_path, num_queries=1)
    assert [path.name for path in files.pngs] == ["recall_at_k.png", "best_1.png"]
    for words in ("No training history", "no locations", "its head has no transport", "excluded none"):
        assert words in text


def test_locations_that_are_all_unknown_count_as_none(tmp_path):
    unknown = np.full((12, 2), np.nan)
    data = summary(locations_deg={"train": unknown})
    _, _, _, text = write(tmp_path, data=data, locations_m=np.full((12, 3), np.nan))
    assert "no locations" in text
    assert "median distance" not in text
    assert "The pairs carry no positions, so it is not known how far off wrong answers are." in text


def test_the_page_tells_how_many_answers_lie_within_the_protocols_distances(tmp_path):
    unknown = np.full((12, 3), np.nan)
    unknown[:6] = np.arange(6)[:, None] * 7.0
    files, _, _, text = write(tmp_path, locations_m=unknown)
    assert "confusion_by_distance" in [path.stem for path in files.pngs]
    assert "first answer within this model guessing 5 m " in text
    assert "first answers are wrong, of which" in text


def test_values_are_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    data = summary(pairs={evil: 1}, problems={evil: 2}, layout=evil)
    _, html, page, text = write(tmp_path, title=evil, data=data, facts={evil: evil})
    assert "script" not in page.tags
    assert "&lt;script&gt;" in html
    assert evil in text


def test_a_second_report_replaces_the_first(tmp_path):
    first, *_ = write(tmp_path)
    second, html, _, _ = write(tmp_path, title="Another town")
    assert first == second
    assert "Another town" in html


@pytest.mark.parametrize(("rule", "k"), [("cvft", 3), ("floor", 2)])
def test_recall_rows_name_their_k_and_compare_with_chance(rule, k):
    eye = torch.eye(200)
    rows = recall_rows(rank_matches(eye, eye, one_percent=rule))
    assert [row["k"] for row in rows] == [1, 5, 10, k]
    assert [row["recall"] for row in rows] == [1.0] * 4
    assert rows[0]["chance"] == 1 / 200
    assert rows[0]["ratio"] == 200


def test_recall_without_leaked_queries_stands_beside_the_full_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    result = rank_matches(query, query)
    _, _, _, text = write(tmp_path / "with", result=result, deleaked=result.of_queries(torch.arange(12) > 1))
    assert "de-leaked" in text
    assert "without the 2 queries that share an image" in text
    _, _, _, text = write(tmp_path / "without", result=result)
    assert "de-leaked" not in text
    assert "in the training split as well is not known" in text
