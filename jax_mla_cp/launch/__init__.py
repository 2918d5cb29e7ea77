"""From a model directory (or the built-in model) to a runner: devices, weights, tokenizer, cache and compiled steps.

`load` is the library's entry. `LaunchOptions` and the functions that take it are what the programs share.
"""

from jax_mla_cp.distributed.cluster import detect
from jax_mla_cp.launch.agreement import agree_on_programs, agree_on_settings
from jax_mla_cp.launch.devices import Devices, set_up_devices
from jax_mla_cp.launch.model import config_and_tokenizer, load, load_model, plan_build
from jax_mla_cp.launch.options import Dtype, EpAxes, LaunchOptions, Speculative
from jax_mla_cp.launch.runner import make_runner, warm_up
from jax_mla_cp.step.runner import Runner

__all__ = [
    "Devices",
    "Dtype",
    "EpAxes",
    "LaunchOptions",
    "Runner",
    "Speculative",
    "agree_on_programs",
    "agree_on_settings",
    "config_and_tokenizer",
    "detect",
    "load",
    "load_model",
    "make_runner",
    "plan_build",
    "set_up_devices",
    "warm_up",
]
