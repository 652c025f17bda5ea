"""Plans of streams between layers: the programs that are planned are those that run."""

import jax
import pytest

from sst_jax.lab.planning import programs
from sst_jax.lab.planning.count import count
from sst_jax.model import sharding
from sst_jax.training import recipe as recipes
from sst_jax.training.inputs import check_inputs
from sst_jax.training.open_run import compile_programs, open_run
from sst_jax.training.watchdog import Watch
from tests.support.runs import SMALL, TINY

LINKED = ["--config.stream.links=((4,1),)", "--config.stream.state=block", "--config.stream.timing=next"]


def jaxpr_of(function, *arguments):
    return jax.make_jaxpr(function)(*arguments)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("forward", ["exact", "two_pass"])
def test_train_step_and_held_out_losses_are_the_runs_own(tmp_path, forward):
    flags = [*SMALL, *LINKED, f"--config.stream.forward={forward}"]
    recipe = recipes.resolve(recipes.read(TINY, flags))
    with jax.set_mesh(sharding.make_mesh(recipe.mesh)):
        inputs = check_inputs(recipe, tmp_path / "run", None)
        backbone = inputs.config.backbone
        ran, scored, rows = programs_of_a_run(recipe, inputs, tmp_path / "run")
        planned, arguments = programs.training_step(recipe, backbone)
        assert count(jaxpr_of(planned, *jax.eval_shape(arguments))) == count(ran)
        program = programs.evaluation(recipe, backbone, rows)
        assert count(jaxpr_of(program.step, *jax.eval_shape(program.arguments))) == count(scored)
        assert count(ran).flops > 0


def programs_of_a_run(recipe, inputs, workdir):
    """The train step and the held-out losses of a run as it traces them, and the rows of the latter."""
    with open_run(inputs, workdir, Watch()) as run:
        ours, batch = compile_programs(run), next(run.iterator)
        step = ours.train_step(recipe.forward)
        ran = jaxpr_of(step, run.state, run.base, batch, run.dropout_key)
        held = {name: part for name, part in ours.heldout_batches[0].items() if name != "ids"}
        scored = jaxpr_of(ours.heldout_losses, run.base, run.state.trainable, held)
    return ran, scored, len(held["tokens"])
