"""A stream between layers behind the server: its answers are the session's, at every depth."""

import pytest

import sst_jax
from sst_jax.serving.queue import Engine
from tests.support.server import start

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the server is an extra: sst-jax[serve]")

RECIRCULATION = {
    "alpha": 0.15, "links": ((5, 2),), "timing": "same", "site": "output", "state": "block", "norm": "match",
    "ramp": 10, "readout": "last",
}  # fmt: skip
PROMPTS = ["one", "a longer prompt, of many tokens", "2 + 2 ="]


@pytest.mark.slow
def test_a_late_state_in_an_early_layer():
    """Recirculation's later iterations alone read a state, so its depth 1 is the plain model's."""
    model = sst_jax.load("random:tiny").with_stream(**RECIRCULATION)
    expected = {depth: model.generate(PROMPTS, depth=depth, max_new_tokens=12) for depth in (1, 2)}
    assert [one.tokens for one in expected[1]] != [two.tokens for two in expected[2]], "the link does nothing"
    engine = Engine(model, rows=2, capacity=128)
    client, server, thread = start(engine)
    try:
        for depth, answers in expected.items():
            whole = client.complete(prompt=PROMPTS, max_tokens=12, temperature=0, depth=depth)
            assert [choice["text"] for choice in whole["choices"]] == [answer.text for answer in answers]
        events = client.stream("/v1/completions", prompt=PROMPTS[1], max_tokens=12, temperature=0, depth=2)
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        assert text == expected[2][1].text
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close(10)
