"""What the page draws is what the files of the runs say."""

import json

from support.report_pages import figures, page_of
from support.tiny_reports import add_logs

from trainer.report.figures import MOST_POINTS


def test_the_pictures_show_what_the_files_say(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    training, done, pca = figures(page)
    assert (done["l0"], done["explained_variance"], done["ce_loss_score"]) == (4.25, 0.8125, 0.96875)
    assert done["curves"]["tokens"] == [1000, 2000, 3000, 4000, 5000]
    assert done["curves"]["loss"] == [100.0 / i for i in range(1, 6)]
    assert done["curves"]["dead"] == [i / 48 for i in range(1, 6)]
    assert done["density"] == {"log10": [-2.0, -1.0, -1.0, 0.0], "latents": [40, 40, 2, 2]}
    assert done["added_loss"] == {"position": [1, 2], "nats": [0.25, 0.125]}
    assert done["speed"] == {"tokens": [1000, 2000, 3000, 4000, 5000], "rate": [2000.0] * 5}
    assert "k 5" in done["hover"]
    assert "d_sae 48" in done["hover"]
    assert (pca["baseline"], pca["explained_variance"]) == (True, 0.5)
    assert (training["l0"], training["curves"]["tokens"], training["density"]["log10"]) == (None, [], [])
    assert (training["added_loss"]["nats"], pca["added_loss"]["nats"]) == ([], [0.25, 0.125])
    plots = {name.removeprefix("plot-") for name in page.ids if name.startswith("plot-")}
    assert plots == {"ev", "ce", "loss", "explained", "dead", "density", "position", "speed"}


def test_throughput_is_that_of_the_logs_with_its_share_of_the_bound(runs, tmp_path):
    _, page = page_of(runs, tmp_path)
    training = ["Training", "1 SAE, each of them on every token", "4,000", "steps that never wait for data", "97.0%"]
    assert page.tables[1][1:] == [training]
    log = tmp_path / "cache" / "log"
    log.mkdir(parents=True)
    for number, n_tokens in enumerate((3000, 0)):  # the second call found nothing to do
        seconds = {"n_tokens": n_tokens, "model_busy": 1.5, "total": 2.0}
        text = json.dumps({"finished": "2026-01-01T00:00:00Z", "seconds": seconds})
        (log / f"harvest-{number}.json").write_text(text)
    config = json.loads((runs / "b-done" / "config.json").read_text())
    config["cache"]["path"] = str(tmp_path / "cache")
    (runs / "b-done" / "config.json").write_text(json.dumps(config))
    _, page = page_of(runs, tmp_path)
    harvest = ["Harvest", "3,000 tokens, 2026-01-01T00:00:00Z", "1,500", "the model alone", "75.0%"]
    assert page.tables[1][1:] == [harvest, training]
    (log / "harvest-0.json").write_text("{}")
    _, page = page_of(runs, tmp_path)
    assert len(page.tables[1]) == 2, "a log that says nothing is left out"


def test_numbers_near_the_largest_float_are_drawn_or_left_out(runs, tmp_path):
    largest = 17 * 10**307
    lines = [{"step": step, "n_tokens": n_tokens} for step, n_tokens in enumerate((-largest, largest, 1000))]
    times = [{"step": step, "step_seconds": float(step)} for step in range(3)]
    for name, values in (("metrics.jsonl", lines), ("timing.jsonl", times)):
        (runs / "b-done" / name).write_text("".join(json.dumps(line) + "\n" for line in values))
    (runs / "b-done" / "crc32c.json").unlink(missing_ok=True)
    _, page = page_of(runs, tmp_path)
    assert figures(page)[1]["curves"]["tokens"] == [-1.7e308, 1.7e308, 1000]


def test_long_logs_are_thinned_and_keep_their_end(runs, tmp_path):
    add_logs(runs / "b-done", n=3 * MOST_POINTS + 1)
    _, page = page_of(runs, tmp_path)
    tokens = figures(page)[1]["curves"]["tokens"]
    assert MOST_POINTS / 2 < len(tokens) <= MOST_POINTS
    assert tokens[-1] == 1000 * (3 * MOST_POINTS + 1)
