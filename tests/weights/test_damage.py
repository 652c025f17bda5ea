"""Damaged checkpoints: whatever happens to their files, none is restored, and the newest good one is found."""

import random
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.weights.checkpoint import TORN, Checkpoints, newest_good, restore_trainable
from sst_jax.weights.store import load_base, save_base

DAMAGES = 200
STEPS = (10, 20, 30)


def tree(step):
    return {"adapter": {"a": jnp.full((40, 30), step, jnp.float32)}, "blend": {"theta": jnp.arange(7.0) + step}}


def data():
    return iter(grain.MapDataset.range(9).to_iter_dataset())


def save(root, step, keep=3):
    checkpoints = Checkpoints(root, keep)
    checkpoints.save(step, tree(step), {"m": jnp.zeros(5)}, data(), {"seconds": 1.0})
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    for step in STEPS:
        save(root, step)
    return root


def damage(rng, file):
    """One of: flipped bits, a cut, bytes behind the end, zeros, a deletion. The file's bytes are never the same."""
    content = file.read_bytes()
    at = rng.randrange(len(content)) if content else 0
    kind = rng.choice(("flip", "flip", "cut", "longer", "zeros", "delete"))
    if kind == "delete" or not content:
        file.unlink()
        return
    changed = {
        "flip": content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        "cut": content[:at],
        "longer": content + rng.randbytes(rng.randrange(1, 9)),
        "zeros": content[:at] + bytes(len(content) - at),
    }[kind]
    file.write_bytes(changed + b"\0" * (changed == content))


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def restored(root, contents):
    """Puts a folder's files back as they were."""
    for file in files(root):
        if file not in contents:
            file.unlink()
    for file, content in contents.items():
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def test_no_damaged_checkpoint_of_a_run_is_restored_and_the_last_good_one_is_found(run, tmp_path):
    """200 damages to one, two or all of three checkpoints: to their files, their manifests, or a whole folder."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    contents = {file: file.read_bytes() for file in files(copy)}
    rng, found = random.Random(0), dict.fromkeys((*STEPS, None), 0)
    for number in range(DAMAGES):
        hit = rng.sample(STEPS, rng.choice((1, 1, 2, 3)))
        for step in hit:
            folder, manifest = copy / "checkpoints" / str(step), copy / "manifests" / f"{step}.json"
            if rng.random() < 0.1:
                shutil.rmtree(rng.choice((folder, folder / "trainable")))
            else:
                damage(rng, rng.choice([*files(folder), manifest]))
        said = []
        expected = max((step for step in STEPS if step not in hit), default=None)
        assert newest_good(copy, warn=said.append) == expected, (number, hit, said)
        passed_over = [step for step in hit if (expected or 0) < step and (copy / "checkpoints" / str(step)).is_dir()]
        assert len(said) == len(passed_over)
        if expected is not None and number % 20 == 0:
            trees = restore_trainable(copy, expected, tree(0))
            assert jax.tree.all(jax.tree.map(np.array_equal, trees, tree(expected)))
        found[expected] += 1
        restored(copy, contents)
    assert all(found.values())


def test_no_damaged_base_folder_is_opened(tmp_path):
    """200 damages, each refused with the name of a file in the folder."""
    params = {"base": {"x": jnp.arange(60.0).reshape(3, 20), "y": jnp.ones(5, jnp.bfloat16)}}
    good = save_base(tmp_path / "good", {}, params, {}, {"tokenizer.json": b'{"a": 1}'})
    rng, contents = random.Random(1), {file: file.read_bytes() for file in files(good)}
    for _ in range(DAMAGES):
        damage(rng, rng.choice(files(good)))
        with pytest.raises(InputError, match=str(good)):
            load_base(good)
        restored(good, contents)
    load_base(good)


def test_what_a_killed_save_leaves_is_passed_over_and_cleared_away(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    torn = copy / "checkpoints" / f"40{TORN}"
    shutil.copytree(copy / "checkpoints" / "30", torn)
    assert newest_good(copy) == 30
    Checkpoints(copy).close()
    assert not torn.exists()
    assert newest_good(copy) == 30


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_steps_do_not_push_good_ones_out(tmp_path, keep):
    """A run that went back behind them and saves before it reaches them again."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        (tmp_path / "manifests" / f"{step}.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.latest_good() == 10
    checkpoints.restore(10, tree(0), {"m": jnp.zeros(5)}, data())
    checkpoints.save(15, tree(15), {"m": jnp.zeros(5)}, data(), {"seconds": 1.0})
    checkpoints.close()
    assert newest_good(tmp_path) == 15
    left = sorted(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir())
    assert left == [10, 15][-keep:]
    assert sorted(int(file.stem) for file in (tmp_path / "manifests").iterdir()) == left


def test_the_old_checkpoint_goes_only_when_the_new_one_counts(tmp_path, monkeypatch):
    """A kill between the two, with keep=1, must leave one."""
    save(tmp_path, 1, keep=1)

    class Killed(BaseException):
        pass

    def killed(path, value):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("sst_jax.weights.checkpoint.write_json", killed)
        with pytest.raises(Killed):
            save(tmp_path, 2, keep=1)
    assert newest_good(tmp_path) == 1
    save(tmp_path, 2, keep=1)
    assert newest_good(tmp_path) == 2
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["2"]
