"""metrics.jsonl, the progress line and wandb's mode; the pictures drawn from them."""

import logging

import pytest
from matplotlib.figure import Figure

from moba_train.config.compose import compose
from moba_train.train.metrics import Metrics, read_metrics
from moba_train.train.report import _mark_switches, draw

CONFIG = compose(["recipe=tiny", "train.steps=40"])


def record(step: int) -> dict:
    return {"step": step, "loss": 5.0 - 0.1 * step, "tokens_per_second": 1234.5, "mfu": 0.25}


def test_records_are_written_as_they_come_and_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(CONFIG, tmp_path, 0, enabled=True)
    metrics.write(record(1))
    assert read_metrics(tmp_path) == [record(1)]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xd2\xff\n3\n{"step": ')
    assert read_metrics(tmp_path) == [record(1)]
    metrics.close()
    silent = Metrics(CONFIG, tmp_path / "other", 0, enabled=False)
    silent.write(record(1))
    silent.show(1, 40, record(1), 10.0)
    silent.close()
    assert not (tmp_path / "other").exists()


def test_steps_that_will_be_done_again_are_dropped_with_a_torn_last_line(tmp_path):
    first = Metrics(CONFIG, tmp_path, 0, enabled=True)
    for step in (1, 2, 3, 4):
        first.write(record(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    resumed = Metrics(CONFIG, tmp_path, 2, enabled=True)
    resumed.write(record(3))
    resumed.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_fresh_run_in_an_old_folder_starts_its_file_anew(tmp_path):
    for _ in range(2):
        metrics = Metrics(CONFIG, tmp_path, 0, enabled=True)
        metrics.write(record(1))
        metrics.close()
    assert len(read_metrics(tmp_path)) == 1


def test_without_a_terminal_there_are_about_twenty_plain_lines(tmp_path, capsys):
    metrics = Metrics(CONFIG, tmp_path, 0, enabled=True)
    for step in range(1, 41):
        metrics.show(step, 40, record(step), eta_s=3.0)
    metrics.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 20
    assert lines[-1] == "step 40/40  loss 1.0000  1,234 tokens/s  MFU 25.0%  ETA 3s"


@pytest.mark.parametrize("key, mode", [(None, "offline"), ("0" * 40, "online")])
def test_wandb_online_without_a_key_falls_to_offline_and_says_so(tmp_path, monkeypatch, caplog, key, mode):
    import wandb

    asked = {}

    class Run:
        def log(self, values, step):
            asked["logged"] = (values, step)

        def finish(self):
            asked["finished"] = True

    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Run())
    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    else:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with caplog.at_level(logging.WARNING):
        metrics = Metrics(compose(["recipe=tiny", "wandb.mode=online"]), tmp_path, 0, enabled=True)
        metrics.write(record(1) | {"gate/sink_share": [0.25, None, 0.5]})
        metrics.close()
    assert asked["mode"] == mode
    assert ("no API key" in caplog.text) == (mode == "offline")
    curves = {"gate/sink_share/layer_0": 0.25, "gate/sink_share/layer_2": 0.5}  # the layer between is full
    assert asked["logged"] == ({"loss": 4.9, "tokens_per_second": 1234.5, "mfu": 0.25} | curves, 1)
    assert asked["config"]["model"]["num_layers"] == 4
    assert asked["finished"]


def test_pictures_are_drawn_from_what_there_is(tmp_path):
    metrics = Metrics(CONFIG, tmp_path, 0, enabled=True)
    metrics.close()
    assert draw(tmp_path, 128) == []
    metrics = Metrics(CONFIG, tmp_path, 0, enabled=True)
    metrics.write(record(1))
    metrics.write({"step": 1, "validation_loss": 4.5, "validation_loss_by_position": [5.0, None, 4.0]})
    metrics.close()
    pictures = draw(tmp_path, 128)
    assert [path.name for path in pictures] == ["loss.png", "loss_by_position.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_every_switch_is_a_labelled_line_before_its_first_step_and_a_resume_is_none():
    axes = Figure().subplots()
    plans = [(1, "moba*4(16,3)"), (3, "moba*4(16,3)"), (5, "full*4"), (9, "moba*4(16,3)")]
    _mark_switches(axes, [record(2), *({"step": step, "layer_plan": plan} for step, plan in plans)])
    assert [line.get_xdata()[0] for line in axes.lines] == [4.5, 8.5]
    assert [text.get_text() for text in axes.texts] == ["full*4", "moba*4(16,3)"]
