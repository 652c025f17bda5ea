"""Pushing to the hub, against a hub of straw: what is asked of it, and what is never overwritten."""

import pytest

from sst_jax.errors import InputError
from sst_jax.weights import hub
from tests.support.straw_hub import Straw


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("x")
    return tmp_path


SETTINGS = {"force": False, "private": True, "message": "m"}


def test_a_new_repository_is_made_and_filled_in_one_commit(folder):
    api = Straw()
    assert hub.check("me/new", False, api) is None
    assert hub.push(folder, "me/new", api=api, **SETTINGS) == "https://hub/me/new/commit/1"
    assert api.repos["me/new"] == [".gitattributes", "config.json", "model.safetensors"]
    asked = dict(api.calls)
    assert asked["create_repo"] == {"repo": "me/new", "private": True, "exist_ok": True}
    assert asked["upload_folder"]["parent"] == "commit-0"  # so that the hub refuses if it moved in between


def test_a_repository_with_files_is_left_alone_unless_forced(folder):
    api = Straw({"me/old": [".gitattributes", "README.md", "weights.bin"]})
    for attempt in (lambda: hub.check("me/old", False, api), lambda: hub.push(folder, "me/old", api=api, **SETTINGS)):
        with pytest.raises(InputError, match=r"already holds README\.md and 1 more files.*--force"):
            attempt()
    assert "upload_folder" not in dict(api.calls)
    assert hub.check("me/old", True, api) == "commit-0"
    hub.push(folder, "me/old", api=api, **{**SETTINGS, "force": True})
    assert "config.json" in api.repos["me/old"]


def test_an_empty_repository_may_be_filled(folder):
    api = Straw({"me/empty": [".gitattributes"]})
    hub.push(folder, "me/empty", api=api, **SETTINGS)
    assert "model.safetensors" in api.repos["me/empty"]


@pytest.mark.parametrize("fail", ["model_info", "create_repo", "upload_folder"])
def test_what_the_hub_says_is_one_line(folder, fail):
    with pytest.raises(InputError, match=r"^--push me/new: the hub says: no route to host \(logged in\?"):
        hub.push(folder, "me/new", api=Straw(fail=fail), **SETTINGS)


@pytest.mark.parametrize("name", ["a/b/c", "white space", "me/--x"])
def test_what_cannot_be_a_repository_is_refused_without_a_request(name):
    with pytest.raises(InputError, match="not a hub id"):
        hub.check(name, False)
