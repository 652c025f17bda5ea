"""`configs/sst.py` with the stream off, and nothing else: the matched control.

    sst-jax train --config configs/baseline.py:size=1b --workdir runs/1b-baseline

Same data in the same order, same adapter, optimizer and number of steps. A step costs about half of the stream's two
passes; the control of equal compute doubles the steps: --config.train.steps.
"""

import importlib.util
import pathlib

_file = pathlib.Path(__file__).with_name("sst.py")
_spec = importlib.util.spec_from_file_location("sst", _file)
_sst = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sst)


def get_config(argument="size=27b"):
    config = _sst.get_config(argument)
    config.stream.on = False
    return config
