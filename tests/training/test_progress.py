"""What a run says while it trains, where no terminal shows a bar."""

import time

from sst_jax.training.progress import StepLines, in_millions


def lines_of(monkeypatch, capsys, *, terminal):
    """What is said over eight steps of ten seconds each, resumed after two of them."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    lines = StepLines(steps=10, done=2)
    for step in range(3, 11):
        clock[0] += 10.0
        lines.tell(step, 1.5, 250.0)
    return capsys.readouterr().out.splitlines()


def test_a_line_comes_every_thirty_seconds_with_rate_and_time_left(monkeypatch, capsys):
    assert lines_of(monkeypatch, capsys, terminal=False) == [
        "step 5 of 10: loss 1.5000, 250 tokens/s, about 0:00:50 left",
        "step 8 of 10: loss 1.5000, 250 tokens/s, about 0:00:20 left",
    ]


def test_a_terminal_has_a_bar_instead(monkeypatch, capsys):
    assert lines_of(monkeypatch, capsys, terminal=True) == []


def test_small_models_are_counted_in_full():
    assert [in_millions(count) for count in (512, 999_999, 1_000_000, 268_098_176)] == ["512", "999,999", "1M", "268M"]
